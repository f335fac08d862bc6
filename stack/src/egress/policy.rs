//! Which destinations egress reaches.

use std::net::{Ipv4Addr, SocketAddrV4};

use ipnet::Ipv4Net;

use super::Protocol;
use crate::drops::DropReason;
use crate::route::RouteTable;

/// Addresses of one link (RFC 3927), among them those where clouds tell machines their secrets.
pub const LINK_LOCAL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16);

/// Rules for destinations: the longest prefix decides, and of two that are equal the one that
/// denies.
///
/// Without any, all is allowed but link-local addresses. If something is allowed by name, nothing
/// else is.
#[derive(Debug, Clone)]
pub struct Policy {
    rules: RouteTable<bool>,
    host_loopback: Option<Ipv4Addr>,
    tunnel_port: Option<u16>,
    closed: bool,
}

impl Policy {
    /// A policy under which nothing is reached.
    #[must_use]
    pub fn closed() -> Self {
        Self {
            closed: true,
            ..Self::new(&[], &[], None, None)
        }
    }

    /// Whether nothing is reached.
    pub(super) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// A policy with these rules, under which `host_loopback` stands for the host's 127.0.0.1, and
    /// which keeps datagrams from every node's tunnel, that is from `tunnel_port` anywhere: to
    /// other nodes they would look like this node's own.
    #[must_use]
    pub fn new(
        allow: &[Ipv4Net],
        deny: &[Ipv4Net],
        host_loopback: Option<Ipv4Addr>,
        tunnel_port: Option<u16>,
    ) -> Self {
        let mut rules = RouteTable::default();
        if allow.is_empty() {
            rules.insert(Ipv4Net::default().into(), true);
        }
        rules.insert(LINK_LOCAL.into(), false);
        for prefix in allow {
            rules.insert((*prefix).into(), true);
        }
        for prefix in deny {
            rules.insert((*prefix).into(), false);
        }
        Self {
            rules,
            host_loopback,
            tunnel_port,
            closed: false,
        }
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
            && let Some(loopback) = self.host_loopback
        {
            let known = SocketAddrV4::new(loopback, source.port());
            return self.check(protocol, known).map(|_| known);
        }
        // Nobody else has the address that stands for the host's loopback.
        if source.ip().is_loopback() || self.host_loopback == Some(*source.ip()) {
            return Err(DropReason::EgressDenied);
        }
        self.check(protocol, source)
    }

    /// Where a flow to `destination` goes on the host.
    ///
    /// # Errors
    /// The reason to drop it.
    pub(super) fn check(
        &self,
        protocol: Protocol,
        destination: SocketAddrV4,
    ) -> Result<SocketAddrV4, DropReason> {
        if self.closed {
            return Err(DropReason::EgressClosed);
        }
        if protocol == Protocol::Udp && self.tunnel_port == Some(destination.port()) {
            return Err(DropReason::EgressDenied);
        }
        if self.host_loopback == Some(*destination.ip()) {
            return Ok(SocketAddrV4::new(Ipv4Addr::LOCALHOST, destination.port()));
        }
        let allowed = self.rules.lookup((*destination.ip()).into());
        match allowed {
            Some(true) => Ok(destination),
            Some(false) | None => Err(DropReason::EgressDenied),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(prefixes: &[&str]) -> Vec<Ipv4Net> {
        prefixes.iter().map(|it| it.parse().unwrap()).collect()
    }

    fn allows(policy: &Policy, destination: &str) -> bool {
        policy
            .check(Protocol::Tcp, destination.parse().unwrap())
            .is_ok()
    }

    #[test]
    fn all_but_link_local_addresses_is_allowed() {
        let policy = Policy::new(&[], &[], None, None);
        assert!(allows(&policy, "192.0.2.1:80"));
        assert!(!allows(&policy, "169.254.169.254:80"));
        assert!(!allows(&policy, "169.254.0.1:80"));
    }

    #[test]
    fn the_longest_prefix_decides_and_of_two_the_one_that_denies() {
        let policy = Policy::new(
            &nets(&["10.0.0.0/8", "10.1.2.0/24", "192.0.2.0/24"]),
            &nets(&["10.1.0.0/16", "192.0.2.0/24"]),
            None,
            None,
        );
        assert!(allows(&policy, "10.9.9.9:80"));
        assert!(!allows(&policy, "10.1.9.9:80"));
        assert!(allows(&policy, "10.1.2.9:80"));
        assert!(!allows(&policy, "192.0.2.1:80"), "denied and allowed");
        assert!(!allows(&policy, "198.51.100.1:80"), "not allowed by name");
    }

    #[test]
    fn metadata_is_open_if_it_is_named() {
        let allow = nets(&["0.0.0.0/0", "169.254.169.254/32"]);
        let policy = Policy::new(&allow, &[], None, None);
        assert!(allows(&policy, "169.254.169.254:80"));
        assert!(!allows(&policy, "169.254.169.253:80"));
    }

    #[test]
    fn one_address_stands_for_the_hosts_loopback() {
        let loopback = Ipv4Addr::new(192, 0, 2, 7);
        let policy = Policy::new(&[], &nets(&["0.0.0.0/0"]), Some(loopback), None);
        let to = policy.check(Protocol::Tcp, SocketAddrV4::new(loopback, 80));
        assert_eq!(to, Ok(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 80)));
        assert!(!allows(&policy, "192.0.2.8:80"));
    }

    #[test]
    fn a_pod_hears_those_to_whom_it_may_speak() {
        let loopback = Ipv4Addr::new(192, 0, 2, 7);
        let closed = Policy::new(&nets(&["198.51.100.0/24"]), &[], None, Some(8472));
        let open = Policy::new(&nets(&["0.0.0.0/0"]), &[], Some(loopback), Some(8472));
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
        let policy = Policy::new(&[], &[], Some(loopback), Some(8472));
        for address in [Ipv4Addr::new(198, 51, 100, 1), loopback] {
            let tunnel = SocketAddrV4::new(address, 8472);
            let denied = Err(DropReason::EgressDenied);
            assert_eq!(policy.check(Protocol::Udp, tunnel), denied);
            assert!(policy.check(Protocol::Tcp, tunnel).is_ok());
        }
    }
}
