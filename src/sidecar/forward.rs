//! Ports that lead from this machine to a pod, and from the pod's address to this machine.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use muslin_stack::api::socks5::{Host, Target, host_name};
use muslin_stack::datapath::egress::Protocol;
use thiserror::Error;
use tokio::net::TcpStream;

use super::command::Exposed;
use super::dial::{DialError, Dialler};
use super::listen::Listen;
use super::relay;

/// A local address that leads to a pod's port, on the command line `[ADDR:]PORT=HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// Where clients come in.
    pub from: Listen,
    /// Where they get to.
    pub to: Target,
}

/// A port of the pod's address that leads to a local one, on the command line
/// `PORT[/udp]=[ADDR:]PORT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expose(pub Exposed);

/// What is wrong with such words.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Malformed {
    /// Of a forward.
    #[error(
        "'{0}' is not a forwarded port: write [ADDR:]PORT=HOST:PORT, such as \
             8080=10.244.1.2:80"
    )]
    Forward(String),
    /// Of an exposed port.
    #[error(
        "'{0}' is not an exposed port: write PORT[/udp]=[ADDR:]PORT, such as \
             80=127.0.0.1:8080"
    )]
    Expose(String),
}

impl FromStr for Forward {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let parse = || {
            let (from, to) = text.split_once('=')?;
            let (host, port) = to.rsplit_once(':')?;
            let port = port.parse().ok().filter(|port| *port > 0)?;
            let bracketed = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
            let host = match bracketed {
                Some(address) => Host::Ip(IpAddr::V6(address.parse().ok()?)),
                // Without brackets nobody knows where an address of IPv6 ends.
                None if host.contains(':') => return None,
                None => host_name(host.as_bytes()).ok()?,
            };
            Some(Self {
                from: from.parse().ok()?,
                to: (host, port),
            })
        };
        parse().ok_or_else(|| Malformed::Forward(text.to_owned()))
    }
}

impl fmt::Display for Forward {
    /// Where it leads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.to {
            (Host::Ip(address), port) => write!(f, "{}", SocketAddr::new(*address, *port)),
            (Host::Name(name), port) => write!(f, "{name}:{port}"),
        }
    }
}

impl FromStr for Expose {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let parse = || {
            let (port, to) = text.split_once('=')?;
            let (port, protocol) = match port.split_once('/').unwrap_or((port, "tcp")) {
                (port, "tcp") => (port, Protocol::Tcp),
                (port, "udp") => (port, Protocol::Udp),
                _ => return None,
            };
            let to = match to.parse::<u16>() {
                Ok(port) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
                Err(_) => to.parse().ok()?,
            };
            let port = port.parse().ok().filter(|port| *port > 0)?;
            (to.port() > 0).then_some(Self(Exposed { protocol, port, to }))
        };
        parse().ok_or_else(|| Malformed::Expose(text.to_owned()))
    }
}

/// Leads one client to its end.
pub(super) async fn serve(
    client: TcpStream,
    dialler: Arc<Dialler>,
    to: Target,
) -> Result<(), ForwardError> {
    match dialler.connect(&to).await {
        Ok((stream, _)) => Ok(relay::relay(client, stream).await?),
        Err(error) => {
            // A client whose connection is not answered is to see that.
            let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
            Err(error.into())
        }
    }
}

/// Why a client gets nowhere.
#[derive(Debug, Error)]
pub(super) enum ForwardError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_name_both_ends() {
        let read = |text: &str| {
            let read = text.parse::<Forward>();
            read.map(|it| (it.from.0.to_string(), it.to_string()))
        };
        let ends = |from: &str, to: &str| Ok((from.to_owned(), to.to_owned()));
        assert_eq!(
            read("8080=10.244.1.2:80"),
            ends("127.0.0.1:8080", "10.244.1.2:80")
        );
        assert_eq!(
            read("[::1]:8080=[fd00::2]:80"),
            ends("[::1]:8080", "[fd00::2]:80")
        );
        assert_eq!(
            read("0.0.0.0:0=web.muslin:80"),
            ends("0.0.0.0:0", "web.muslin:80")
        );
        for bad in [
            "",
            "80",
            "80=",
            "80=web",
            "80=web:0",
            "80=:80",
            "x=web:80",
            "80=fd00::2:80",
            "80=[web]:80",
        ] {
            assert_eq!(read(bad), Err(Malformed::Forward(bad.to_owned())));
        }
    }

    #[test]
    fn exposed_ports_name_a_protocol_and_a_place() {
        let read = |text: &str| {
            let read = text.parse::<Expose>();
            read.map(|Expose(it)| (it.protocol, it.port, it.to.to_string()))
        };
        let local = "127.0.0.1:8080".to_owned();
        assert_eq!(read("80=8080"), Ok((Protocol::Tcp, 80, local.clone())));
        assert_eq!(read("80/tcp=8080"), Ok((Protocol::Tcp, 80, local.clone())));
        let elsewhere = "192.0.2.1:53".to_owned();
        assert_eq!(
            read("53/udp=192.0.2.1:53"),
            Ok((Protocol::Udp, 53, elsewhere))
        );
        let same = "[::1]:8080".to_owned();
        assert_eq!(read("80=[::1]:8080"), Ok((Protocol::Tcp, 80, same)));
        for bad in ["", "80", "80=", "0=80", "80=0", "80/x=80", "80=x:80"] {
            assert_eq!(read(bad), Err(Malformed::Expose(bad.to_owned())));
        }
    }
}
