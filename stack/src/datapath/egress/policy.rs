//! Which destinations egress reaches.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use ipnet::{IpNet, Ipv4Net};

use super::key::Protocol;
use crate::addresses::Addresses;
use crate::datapath::route::RouteTable;
use crate::drops::DropReason;

/// Addresses of one link (RFC 3927), among them those where clouds tell machines their secrets.
pub const LINK_LOCAL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16);

/// Where clouds tell machines their secrets at addresses that are not link-local: Azure, Alibaba
/// Cloud and Oracle Cloud.
const METADATA: [Ipv4Addr; 3] = [
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(192, 0, 0, 192),
];

/// UDP ports where nodes of other networks have their tunnels, which take what comes from this
/// machine's address for its node's: flannel's udp and vxlan, and VXLAN's own (RFC 7348).
const TUNNELS: [u16; 3] = [8285, 8472, 4789];

/// What somebody has set about destinations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rules {
    /// What is reached; all, if that is nothing.
    pub allow: Vec<IpNet>,
    /// What is not.
    pub deny: Vec<IpNet>,
    /// The addresses that stand for the host's 127.0.0.1 and ::1.
    pub host_loopback: Option<Addresses>,
    /// The UDP port of the node's own tunnel.
    pub tunnel_port: Option<u16>,
    /// Where the store is. Who writes there has all nodes' traffic.
    pub stores: Vec<SocketAddr>,
}

/// Rules for destinations: the longest prefix decides, and of two that are equal the one that
/// denies.
///
/// Without any, all is allowed but what nobody should reach without a word: link-local addresses,
/// the clouds' metadata, stores and tunnels. If something is allowed by name, nothing else is.
#[derive(Debug, Clone)]
pub struct Policy {
    prefixes: RouteTable<bool>,
    rules: Rules,
    closed: bool,
}

impl Policy {
    /// A policy under which nothing is reached.
    #[must_use]
    pub fn closed() -> Self {
        Self {
            closed: true,
            ..Self::new(Rules::default())
        }
    }

    /// Whether nothing is reached.
    pub(super) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// A policy with these rules. Datagrams reach no node's tunnel: to other nodes they would look
    /// like this node's own.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        let mut prefixes = RouteTable::default();
        if rules.allow.is_empty() {
            prefixes.insert(Ipv4Net::default().into(), true);
        }
        prefixes.insert(LINK_LOCAL.into(), false);
        for address in METADATA {
            prefixes.insert(Ipv4Net::from(address).into(), false);
        }
        for prefix in &rules.allow {
            prefixes.insert(*prefix, true);
        }
        for prefix in &rules.deny {
            prefixes.insert(*prefix, false);
        }
        Self {
            prefixes,
            rules,
            closed: false,
        }
    }

    /// The address of IPv4 that stands for the host's loopback.
    pub(in crate::datapath) fn host_loopback(&self) -> Option<Ipv4Addr> {
        self.rules.host_loopback.and_then(|it| it.ipv4())
    }

    /// Closes these endpoints instead of those of the rules, which the store has left.
    pub(in crate::datapath) fn set_stores(&mut self, stores: Vec<SocketAddr>) {
        self.rules.stores = stores;
    }

    /// The rule for an address: its prefix, and whether that may be reached.
    pub(super) fn rule(&self, address: IpAddr) -> Option<(IpNet, bool)> {
        let rule = self.prefixes.entry(address).filter(|_| !self.closed);
        rule.map(|(prefix, allows)| (prefix, *allows))
    }

    /// By which address a pod knows `source`, from where a datagram has come to the host.
    ///
    /// # Errors
    /// The reason to drop it: a pod hears only those to whom it may speak.
    pub(super) fn check_source(
        &self,
        protocol: Protocol,
        source: SocketAddrV4,
    ) -> Result<SocketAddrV4, DropReason> {
        if *source.ip() == Ipv4Addr::LOCALHOST
            && let Some(loopback) = self.host_loopback()
        {
            let known = SocketAddrV4::new(loopback, source.port());
            return self.check(protocol, known).map(|_| known);
        }
        // Nobody else has the address that stands for the host's loopback.
        if source.ip().is_loopback() || self.host_loopback() == Some(*source.ip()) {
            return Err(DropReason::EgressDenied);
        }
        self.check(protocol, source)
    }

    /// Where a flow to `destination` goes on the host.
    ///
    /// # Errors
    /// The reason to drop it.
    pub(in crate::datapath) fn check(
        &self,
        protocol: Protocol,
        destination: SocketAddrV4,
    ) -> Result<SocketAddrV4, DropReason> {
        if self.closed {
            return Err(DropReason::EgressClosed);
        }
        let named = *destination.ip();
        let (port, is_udp) = (destination.port(), protocol == Protocol::Udp);
        if is_udp && self.rules.tunnel_port == Some(port) {
            return Err(DropReason::EgressDenied);
        }
        let is_loopback = self.host_loopback() == Some(named);
        let to = match is_loopback {
            true => SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
            false => destination,
        };
        let is_guarded = match protocol {
            Protocol::Udp => TUNNELS.contains(&port),
            Protocol::Tcp => self.rules.stores.contains(&to.into()),
            Protocol::Ping => false,
        };
        if is_guarded && !self.rules.allow.contains(&IpAddr::from(named).into()) {
            return Err(DropReason::EgressDenied);
        }
        match self.prefixes.lookup(named.into()) {
            _ if is_loopback => Ok(to),
            Some(true) => Ok(to),
            Some(false) | None => Err(DropReason::EgressDenied),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(prefixes: &[&str]) -> Vec<IpNet> {
        prefixes.iter().map(|it| it.parse().unwrap()).collect()
    }

    fn allows(policy: &Policy, destination: &str) -> bool {
        policy
            .check(Protocol::Tcp, destination.parse().unwrap())
            .is_ok()
    }

    #[test]
    fn all_but_link_local_addresses_is_allowed() {
        let policy = Policy::new(Rules::default());
        assert!(allows(&policy, "192.0.2.1:80"));
        assert!(!allows(&policy, "169.254.169.254:80"));
        assert!(!allows(&policy, "169.254.0.1:80"));
    }

    #[test]
    fn the_longest_prefix_decides_and_of_two_the_one_that_denies() {
        let policy = Policy::new(Rules {
            allow: nets(&["10.0.0.0/8", "10.1.2.0/24", "192.0.2.0/24"]),
            deny: nets(&["10.1.0.0/16", "192.0.2.0/24"]),
            ..Rules::default()
        });
        assert!(allows(&policy, "10.9.9.9:80"));
        assert!(!allows(&policy, "10.1.9.9:80"));
        assert!(allows(&policy, "10.1.2.9:80"));
        assert!(!allows(&policy, "192.0.2.1:80"), "denied and allowed");
        assert!(!allows(&policy, "198.51.100.1:80"), "not allowed by name");
    }

    #[test]
    fn metadata_is_open_if_it_is_named() {
        let all = [
            "169.254.169.254",
            "168.63.129.16",
            "100.100.100.200",
            "192.0.0.192",
        ];
        for address in all {
            let allow = nets(&["0.0.0.0/0", &format!("{address}/32")]);
            let policy = Policy::new(Rules {
                allow,
                ..Rules::default()
            });
            for other in all {
                assert_eq!(allows(&policy, &format!("{other}:80")), other == address);
            }
            assert!(!allows(&policy, "169.254.169.253:80"));
            assert!(allows(&policy, "168.63.129.17:80"));
        }
    }

    #[test]
    fn one_address_stands_for_the_hosts_loopback() {
        let loopback = Ipv4Addr::new(192, 0, 2, 7);
        let policy = Policy::new(Rules {
            deny: nets(&["0.0.0.0/0"]),
            host_loopback: Some(loopback.into()),
            ..Rules::default()
        });
        let to = policy.check(Protocol::Tcp, SocketAddrV4::new(loopback, 80));
        assert_eq!(to, Ok(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 80)));
        assert!(!allows(&policy, "192.0.2.8:80"));
    }

    #[test]
    fn a_pod_hears_those_to_whom_it_may_speak() {
        let loopback = Ipv4Addr::new(192, 0, 2, 7);
        let rules = |allow: &str, host_loopback| Rules {
            allow: nets(&[allow]),
            host_loopback,
            tunnel_port: Some(8472),
            ..Rules::default()
        };
        let closed = Policy::new(rules("198.51.100.0/24", None));
        let open = Policy::new(rules("0.0.0.0/0", Some(loopback.into())));
        let hears = |policy: &Policy, source: &str| {
            let known = policy.check_source(Protocol::Udp, source.parse().unwrap());
            known.ok().map(|known| known.to_string())
        };
        let same = |source: &str| Some(source.to_owned());
        assert_eq!(hears(&closed, "198.51.100.9:53"), same("198.51.100.9:53"));
        assert_eq!(hears(&closed, "203.0.113.9:53"), None, "not allowed");
        assert_eq!(hears(&closed, "198.51.100.9:8472"), None, "a tunnel");
        assert_eq!(hears(&closed, "127.0.0.1:53"), None, "the host's loopback");
        assert_eq!(hears(&open, "203.0.113.9:53"), same("203.0.113.9:53"));
        assert_eq!(hears(&open, "127.0.0.1:53"), same("192.0.2.7:53"));
        assert_eq!(hears(&open, "127.0.0.1:8472"), None);
        assert_eq!(hears(&open, "127.0.0.2:53"), None, "it has no address");
        assert_eq!(hears(&open, "192.0.2.7:53"), None, "it is the loopback's");
        assert_eq!(hears(&Policy::closed(), "198.51.100.9:53"), None);
    }

    #[test]
    fn datagrams_reach_no_tunnel() {
        let loopback = Ipv4Addr::new(192, 0, 2, 7);
        let open = Ipv4Addr::new(198, 51, 100, 9);
        let policy = Policy::new(Rules {
            allow: nets(&["0.0.0.0/0", "198.51.100.9/32"]),
            host_loopback: Some(loopback.into()),
            tunnel_port: Some(4000),
            ..Rules::default()
        });
        for address in [Ipv4Addr::new(198, 51, 100, 1), loopback, open] {
            for port in [4000, 4789, 8285, 8472, 8473] {
                let tunnel = SocketAddrV4::new(address, port);
                // Those of other networks' nodes are open where the address is named.
                let is_open = port == 8473 || (address == open && port != 4000);
                let checked = policy.check(Protocol::Udp, tunnel);
                assert_eq!(checked.is_ok(), is_open, "{tunnel}");
                assert!(policy.check(Protocol::Tcp, tunnel).is_ok());
            }
        }
    }

    #[test]
    fn the_store_is_open_only_by_its_own_address() {
        let loopback = Ipv4Addr::new(192, 0, 2, 7);
        let rules = Rules {
            host_loopback: Some(loopback.into()),
            stores: vec![
                "127.0.0.1:2379".parse().unwrap(),
                "10.0.0.1:2379".parse().unwrap(),
            ],
            ..Rules::default()
        };
        let policy = Policy::new(rules.clone());
        assert!(!allows(&policy, "192.0.2.7:2379"));
        assert!(!allows(&policy, "10.0.0.1:2379"));
        assert!(allows(&policy, "10.0.0.1:2380") && allows(&policy, "10.0.0.2:2379"));
        for (allow, opens) in [("10.0.0.0/31", false), ("10.0.0.1/32", true)] {
            let allow = nets(&["0.0.0.0/0", allow]);
            let policy = Policy::new(Rules {
                allow,
                ..rules.clone()
            });
            assert_eq!(allows(&policy, "10.0.0.1:2379"), opens);
        }
        // It moves.
        let mut policy = policy;
        policy.set_stores(vec!["10.0.0.2:2379".parse().unwrap()]);
        assert!(!allows(&policy, "10.0.0.2:2379") && allows(&policy, "10.0.0.1:2379"));
    }
}
