//! Where the store is, so that pods and proxies do not get there.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};

use tracing::warn;

/// Addresses of one server that are remembered: a name may lead to some of them at a time.
const REMEMBERED: usize = 64;

/// The servers of a store. Their names may lead elsewhere later.
#[derive(Debug, Clone, Default)]
pub(crate) struct Endpoints(Vec<Server>);

#[derive(Debug, Clone)]
struct Server {
    url: String,
    host: String,
    port: u16,
    /// Where it is, and was before.
    addresses: Vec<IpAddr>,
    /// Whether the failure was logged.
    is_told: bool,
}

impl Endpoints {
    /// Servers by their URLs.
    pub(crate) fn new(servers: &[String]) -> Self {
        let server = |url: &String| {
            let (host, port) = host_and_port(url)?;
            Some(Server {
                url: url.clone(),
                host,
                port,
                addresses: Vec::new(),
                is_told: false,
            })
        };
        Self(servers.iter().filter_map(server).collect())
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Finds out where they are now, which takes as long as resolvers do, and gives that with where they
    /// were before. One on this machine is behind all of its `own` addresses.
    pub(crate) fn look(&mut self, own: &[IpAddr]) -> Vec<SocketAddr> {
        self.look_by(own, |host, port| {
            let addresses = (host, port).to_socket_addrs()?;
            Ok(addresses.map(|address| address.ip()).collect())
        })
    }

    fn look_by(
        &mut self,
        own: &[IpAddr],
        resolve: impl Fn(&str, u16) -> io::Result<Vec<IpAddr>>,
    ) -> Vec<SocketAddr> {
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let mut endpoints = Vec::new();
        for server in &mut self.0 {
            match resolve(&server.host, server.port) {
                Ok(found) => server.add(&found),
                Err(error) => server.log_failure(&error),
            }
            for ip in &server.addresses {
                endpoints.push(SocketAddr::new(*ip, server.port));
                if ip.is_loopback() || own.contains(ip) {
                    let all = own.iter().chain(&loopback);
                    endpoints.extend(all.map(|ip| SocketAddr::new(*ip, server.port)));
                }
            }
        }
        endpoints.sort_unstable();
        endpoints.dedup();
        endpoints
    }
}

impl Server {
    /// Adds where it is now; what was longest ago is forgotten.
    fn add(&mut self, found: &[IpAddr]) {
        for ip in found {
            // An address of IPv4 is that, however it is written.
            let ip = ip.to_canonical();
            self.addresses.retain(|known| *known != ip);
            self.addresses.push(ip);
        }
        let former = self.addresses.len().saturating_sub(REMEMBERED);
        self.addresses.drain(..former);
    }

    /// Says once that egress is not closed to it.
    fn log_failure(&mut self, error: &io::Error) {
        if self.addresses.is_empty() && !std::mem::replace(&mut self.is_told, true) {
            let url = &self.url;
            warn!(
                "cannot resolve {url}, so egress to it is not closed until that succeeds: \
                 {error}"
            );
        }
    }
}

fn host_and_port(url: &str) -> Option<(String, u16)> {
    let uri: http::Uri = url.parse().ok()?;
    let host = uri.host()?.trim_matches(['[', ']']).to_owned();
    Some((host, uri.port_u16()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn texts(found: &[SocketAddr]) -> Vec<String> {
        found.iter().map(ToString::to_string).collect()
    }

    fn of(servers: &[&str]) -> Endpoints {
        let servers: Vec<_> = servers.iter().map(|it| (*it).to_owned()).collect();
        Endpoints::new(&servers)
    }

    #[test]
    fn a_store_on_this_machine_is_behind_all_its_addresses() {
        let own = [ip("127.0.0.1"), ip("10.9.0.1"), ip("2001:db8::9")];
        let found = |servers: &[&str]| texts(&of(servers).look(&own));
        assert!(found(&[]).is_empty());
        let here = [
            "10.9.0.1:2379",
            "127.0.0.1:2379",
            "[::1]:2379",
            "[2001:db8::9]:2379",
        ];
        for server in [
            "http://10.9.0.1:2379",
            "https://127.0.0.1:2379",
            "https://[::1]:2379",
            "https://[2001:db8::9]:2379",
            "https://[::ffff:10.9.0.1]:2379",
            "http://localhost:2379",
        ] {
            assert_eq!(found(&[server]), here, "{server}");
        }
        let there = ["10.9.0.7:2379", "10.9.0.8:4001"];
        assert_eq!(
            found(&["http://10.9.0.7:2379", "https://10.9.0.8:4001"]),
            there
        );
        let far = ["http://[2001:db8::1]:2379", "http://a b:2379"];
        assert_eq!(found(&far), ["[2001:db8::1]:2379"]);
    }

    #[test]
    fn a_name_is_followed_to_where_it_leads_and_stays_where_it_led() {
        let mut endpoints = of(&["https://etcd:2379"]);
        let unknown = |_: &str, _| Err(io::Error::other("no such name"));
        assert!(endpoints.look_by(&[], unknown).is_empty());
        let at = |last: u8| move |_: &str, _: u16| Ok(vec![Ipv4Addr::new(10, 9, 0, last).into()]);
        assert_eq!(texts(&endpoints.look_by(&[], at(7))), ["10.9.0.7:2379"]);
        let both = ["10.9.0.7:2379", "10.9.0.8:2379"];
        assert_eq!(texts(&endpoints.look_by(&[], at(8))), both);
        assert_eq!(texts(&endpoints.look_by(&[], unknown)), both);
        // A machine that gets its address later is it, too.
        let all = texts(&endpoints.look_by(&[ip("10.9.0.8"), ip("10.9.0.9")], at(8)));
        let more = [
            "10.9.0.7:2379",
            "10.9.0.8:2379",
            "10.9.0.9:2379",
            "127.0.0.1:2379",
            "[::1]:2379",
        ];
        assert_eq!(all, more);
        for last in 0..=u8::MAX {
            endpoints.look_by(&[], at(last));
        }
        assert_eq!(endpoints.look_by(&[], unknown).len(), REMEMBERED);
    }
}
