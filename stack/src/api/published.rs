//! How ports of this machine that lead to pods are written.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::datapath::egress::Protocol;

/// Ports that one pod may have. A report of them fits one message.
pub const MAX_PORTS: u16 = 256;

/// A port of this machine that leads to one of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PortMapping {
    /// What is carried.
    pub transport: Transport,
    /// The machine's address; all it has of that IP version, if that is 0.0.0.0 or `::`.
    pub address: IpAddr,
    /// The machine's port; the node chooses one if that is 0.
    pub host_port: u16,
    /// The pod's port.
    pub pod_port: u16,
    /// Whether connections begin with a header that tells their client (PROXY protocol, version 2).
    #[serde(default)]
    pub proxy: bool,
}

/// What a published port carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// TCP connections.
    Tcp,
    /// UDP datagrams.
    Udp,
}

impl From<Transport> for Protocol {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Tcp => Self::Tcp,
            Transport::Udp => Self::Udp,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Protocol::from(*self).fmt(f)
    }
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            transport,
            address,
            host_port,
            pod_port,
            proxy,
        } = self;
        let proxy = if *proxy { "+proxy" } else { "" };
        let at = SocketAddr::new(*address, *host_port);
        write!(f, "{at}->{pod_port}/{transport}{proxy}")
    }
}

impl PortMapping {
    /// Whether two cannot be on one machine.
    pub fn overlaps(&self, other: &Self) -> bool {
        let is_same = self.address.is_ipv4() == other.address.is_ipv4();
        let any = is_same && (self.address.is_unspecified() || other.address.is_unspecified());
        self.transport == other.transport
            && self.host_port == other.host_port
            && self.host_port != 0
            && (any || self.address == other.address)
    }
}

/// Ports as a user writes them, as in podman and Docker:
/// `[ADDRESS:]HOST[-LAST]:POD[-LAST][/tcp|/udp][+proxy]`, with brackets around an address of IPv6.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports(Vec<PortMapping>);

impl Ports {
    /// All ports of all these.
    #[must_use]
    pub fn all(written: &[Self]) -> Vec<PortMapping> {
        written.iter().flat_map(|it| it.0.clone()).collect()
    }
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (rest, proxy) = match text.strip_suffix("+proxy") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let (rest, transport) = match rest.split_once('/') {
            None => (rest, Transport::Tcp),
            Some((rest, "tcp")) => (rest, Transport::Tcp),
            Some((rest, "udp")) if !proxy => (rest, Transport::Udp),
            Some((_, "udp")) => return Err("only TCP has PROXY headers".to_owned()),
            Some((_, other)) => return Err(format!("'{other}' is neither 'tcp' nor 'udp'")),
        };
        let (bracketed, rest) = match rest.strip_prefix('[').and_then(|it| it.split_once("]:")) {
            Some((address, rest)) => {
                let parsed = address.parse::<Ipv6Addr>();
                let parsed = parsed.map_err(|_| format!("'{address}' is not an IPv6 address"))?;
                (Some(IpAddr::V6(parsed)), rest)
            }
            None => (None, rest),
        };
        let parts: Vec<_> = rest.split(':').collect();
        let (address, host, pod) = match (bracketed, &parts[..]) {
            (Some(address), [host, pod]) => (address, *host, *pod),
            (None, [host, pod]) => (Ipv4Addr::UNSPECIFIED.into(), *host, *pod),
            (None, [address, host, pod]) => {
                let parsed = address.parse::<Ipv4Addr>();
                let parsed = parsed.map_err(|_| format!("'{address}' is not an IPv4 address"))?;
                (parsed.into(), *host, *pod)
            }
            _ => return Err("write [ADDRESS:]HOST:POD[/tcp|/udp], like 8080:80".to_owned()),
        };
        let (host, pod) = (range(host)?, range(pod)?);
        if pod.first == 0 {
            return Err("a pod has no port 0".to_owned());
        }
        if host.count != pod.count {
            return Err("the two ranges of ports differ in length".to_owned());
        }
        if host.first == 0 && host.count > 1 {
            return Err("a range does not begin with 0".to_owned());
        }
        let one = |i| PortMapping {
            transport,
            address,
            host_port: host.first + i,
            pod_port: pod.first + i,
            proxy,
        };
        Ok(Self((0..host.count).map(one).collect()))
    }
}

struct PortRange {
    first: u16,
    count: u16,
}

fn range(text: &str) -> std::result::Result<PortRange, String> {
    let port = |text: &str| {
        let port = text.parse::<u16>();
        port.map_err(|_| format!("'{text}' is not a port: ports go up to 65535"))
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(text)?, port(text)?),
    };
    match last.checked_sub(first) {
        Some(more) if more < MAX_PORTS => Ok(PortRange {
            first,
            count: more + 1,
        }),
        Some(_) => Err(format!("'{text}' is more than {MAX_PORTS} ports")),
        None => Err(format!("'{text}' ends before it begins")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(written: &str) -> String {
        match written.parse::<Ports>() {
            Ok(Ports(all)) => {
                let all: Vec<_> = all.iter().map(ToString::to_string).collect();
                all.join(" ")
            }
            Err(error) => error,
        }
    }

    #[test]
    fn ports_are_written_as_elsewhere() {
        for (written, expected) in [
            ("8080:80", "0.0.0.0:8080->80/tcp"),
            ("8080:80/tcp", "0.0.0.0:8080->80/tcp"),
            ("127.0.0.1:53:5353/udp", "127.0.0.1:53->5353/udp"),
            ("[::1]:8080:80", "[::1]:8080->80/tcp"),
            ("[::]:53:5353/udp", "[::]:53->5353/udp"),
            ("0:80+proxy", "0.0.0.0:0->80/tcp+proxy"),
            ("80:80/tcp+proxy", "0.0.0.0:80->80/tcp+proxy"),
            (
                "8000-8001:90-91",
                "0.0.0.0:8000->90/tcp 0.0.0.0:8001->91/tcp",
            ),
        ] {
            assert_eq!(text(written), expected, "{written}");
        }
    }

    #[test]
    fn what_cannot_be_is_told() {
        for (written, part) in [
            ("80", "like 8080:80"),
            ("", "like 8080:80"),
            ("1:2:3:4", "like 8080:80"),
            ("80:0", "no port 0"),
            ("80:65536", "up to 65535"),
            ("-1:80", "'' is not a port"),
            ("x:80:80", "'x' is not an IPv4 address"),
            ("[x]:80:80", "'x' is not an IPv6 address"),
            ("[fe80::1%2]:80:80", "not an IPv6 address"),
            ("[::1]:80", "like 8080:80"),
            ("80:80/sctp", "neither 'tcp' nor 'udp'"),
            ("80:80/udp+proxy", "only TCP"),
            ("80-90:80-91", "differ in length"),
            ("90-80:90-80", "ends before"),
            ("1-60000:1-60000", "more than"),
            ("0-1:80-81", "begin with 0"),
        ] {
            assert!(text(written).contains(part), "{written}: {}", text(written));
        }
    }

    #[test]
    fn ports_overlap_where_one_socket_would_have_both() {
        let ports = |text: &str| text.parse::<Ports>().unwrap().0[0];
        let one = ports("80:1");
        for (other, overlaps) in [
            ("127.0.0.1:80:2", true),
            ("80:2/udp", false),
            ("81:1", false),
        ] {
            assert_eq!(one.overlaps(&ports(other)), overlaps, "{other}");
        }
        assert!(!ports("127.0.0.1:80:1").overlaps(&ports("127.0.0.2:80:1")));
        assert!(!ports("0:80").overlaps(&ports("0:80")));
        assert!(!one.overlaps(&ports("[::]:80:1")));
        assert!(ports("[::1]:80:1").overlaps(&ports("[::]:80:1")));
    }
}
