//! Which destinations egress reaches.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::key::{Protocol, plain};
use super::nat64::{self, Behind, LOCAL_USE, Nat64Prefix, WELL_KNOWN};
use crate::addresses::Addresses;
use crate::datapath::guard;
use crate::datapath::route::RouteTable;
use crate::drops::DropReason;

/// Addresses of one link (RFC 3927), among them those where clouds tell machines their secrets.
pub const LINK_LOCAL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16);

/// Where clouds tell machines their secrets at addresses that are not link-local: Azure, Alibaba
/// Cloud and Oracle Cloud, and in IPv6 Amazon and Google.
const METADATA: [IpAddr; 5] = [
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
];

/// IPv6 addresses that no packet has outside of a machine or of a link, or that are another way to
/// write one of IPv4: no rule opens them. Nobody routes `::/96` and `::ffff:0:0/96` (RFC 4291 section
/// 2.5.5), and a link-local address says nothing without its link.
const NEVER: [Ipv6Net; 5] = [
    // With :: and ::1.
    Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 96),
    Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96),
    // What was link-local and site-local (RFC 4291 sections 2.5.6 and 2.5.7).
    Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0), 10),
    Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
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
    /// The overlay's networks: who is in there is a pod, however its address is written.
    pub networks: Vec<IpNet>,
    /// The addresses that stand for the host's 127.0.0.1 and ::1.
    pub host_loopback: Option<Addresses>,
    /// The prefix by which pods with IPv6 reach IPv4.
    pub nat64: Option<Nat64Prefix>,
    /// The UDP ports of the node's own tunnel.
    pub tunnel_ports: Vec<u16>,
    /// Where the store is. Who writes there has all nodes' traffic.
    pub stores: Vec<SocketAddr>,
}

/// Rules for destinations: the longest prefix decides, and of two that are equal the one that
/// denies.
///
/// Without any, all is allowed but what nobody should reach without a word: link-local addresses,
/// the clouds' metadata, stores and tunnels, and IPv6 addresses for the network's translators to IPv4.
/// If something is allowed by name, nothing else is.
///
/// Of an IPv6 address behind which there is one of IPv4 the rules hold for both.
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
            prefixes.insert(Ipv6Net::default().into(), true);
        }
        for prefix in [LINK_LOCAL.into(), WELL_KNOWN.into(), LOCAL_USE.into()] {
            prefixes.insert(prefix, false);
        }
        for address in METADATA {
            prefixes.insert(address.into(), false);
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

    /// The host's loopback address and the address that stands for it, of the IP version of another.
    fn loopback(&self, of: IpAddr) -> (IpAddr, Option<IpAddr>) {
        let opened = self.rules.host_loopback;
        match of {
            IpAddr::V4(_) => {
                let opened = opened.and_then(|it| it.ipv4());
                (Ipv4Addr::LOCALHOST.into(), opened.map(IpAddr::V4))
            }
            IpAddr::V6(_) => {
                let opened = opened.and_then(|it| it.ipv6());
                (Ipv6Addr::LOCALHOST.into(), opened.map(IpAddr::V6))
            }
        }
    }

    /// The prefix by which pods with IPv6 reach IPv4.
    pub(super) const fn nat64(&self) -> Option<Nat64Prefix> {
        self.rules.nat64
    }

    /// The IPv4 address that an IPv6 address means, if it is one of NAT64.
    pub(super) fn translated(&self, address: IpAddr) -> Option<Ipv4Addr> {
        match (self.rules.nat64, address) {
            (Some(nat64), IpAddr::V6(address)) => nat64.embedded(address),
            _ => None,
        }
    }

    /// Closes these endpoints instead of those of the rules, which the store has left.
    pub(in crate::datapath) fn set_stores(&mut self, stores: Vec<SocketAddr>) {
        self.rules.stores = stores;
    }

    /// The rule for an address: its prefix, and whether that may be reached.
    pub(super) fn rule(&self, address: IpAddr) -> Option<(IpNet, bool)> {
        let address = self.translated(address).map_or(address, IpAddr::V4);
        let rule = self.prefixes.entry(address).filter(|_| !self.closed);
        rule.map(|(prefix, allows)| (prefix, *allows))
    }

    /// By which address a pod of an IP version knows `source`, from where a datagram has come to the
    /// host.
    ///
    /// # Errors
    /// The reason to drop it: a pod hears only those to whom it may speak.
    pub(super) fn check_source(
        &self,
        protocol: Protocol,
        source: SocketAddr,
        is_for_ipv6: bool,
    ) -> Result<SocketAddr, DropReason> {
        let (loopback, opened) = self.loopback(source.ip());
        let known = match opened {
            Some(opened) if source.ip() == loopback => opened,
            // Nobody else has the address that stands for the host's loopback.
            _ if source.ip().is_loopback() || opened == Some(source.ip()) => {
                return Err(DropReason::EgressDenied);
            }
            _ => source.ip(),
        };
        let known = match (known, self.rules.nat64) {
            (IpAddr::V4(known), Some(nat64)) if is_for_ipv6 => nat64.embed(known).into(),
            (known, _) if known.is_ipv6() == is_for_ipv6 => known,
            _ => return Err(DropReason::EgressFamily),
        };
        let known = SocketAddr::new(known, source.port());
        self.check(protocol, known).map(|_| known)
    }

    /// Where a flow to `destination` goes on the host; to IPv4, if that is an address of NAT64.
    ///
    /// # Errors
    /// The reason to drop it.
    pub(in crate::datapath) fn check(
        &self,
        protocol: Protocol,
        destination: SocketAddr,
    ) -> Result<SocketAddr, DropReason> {
        if self.closed {
            return Err(DropReason::EgressClosed);
        }
        match (self.translated(destination.ip()), self.rules.nat64) {
            (Some(ipv4), Some(nat64)) => {
                if !nat64.may_mean(ipv4) || guard::is_martian(ipv4) || self.is_overlay(ipv4.into())
                {
                    return Err(DropReason::EgressDenied);
                }
                self.check_named(protocol, SocketAddr::new(ipv4.into(), destination.port()))
            }
            _ => self.check_named(protocol, plain(destination)),
        }
    }

    fn check_named(
        &self,
        protocol: Protocol,
        destination: SocketAddr,
    ) -> Result<SocketAddr, DropReason> {
        let named = destination.ip();
        let (port, is_udp) = (destination.port(), protocol == Protocol::Udp);
        if is_udp && self.rules.tunnel_ports.contains(&port) {
            return Err(DropReason::EgressDenied);
        }
        let (loopback, opened) = self.loopback(named);
        let is_loopback = opened == Some(named);
        let to = match is_loopback {
            true => SocketAddr::new(loopback, port),
            false => destination,
        };
        let is_guarded = match protocol {
            Protocol::Udp => TUNNELS.contains(&port),
            Protocol::Tcp => self.rules.stores.contains(&to),
            Protocol::Ping => false,
        };
        if is_guarded && !self.rules.allow.contains(&named.into()) {
            return Err(DropReason::EgressDenied);
        }
        if is_loopback || self.is_open(named) {
            Ok(to)
        } else {
            Err(DropReason::EgressDenied)
        }
    }

    /// Whether the rules permit an address, and what there may be behind it.
    fn is_open(&self, address: IpAddr) -> bool {
        let is_named_open = self.prefixes.lookup(address) == Some(&true);
        let IpAddr::V6(address) = address else {
            return is_named_open;
        };
        is_named_open
            && !NEVER.iter().any(|net| net.contains(&address))
            && nat64::behind(address).all(|behind| self.is_open_behind(behind))
    }

    /// Whether the rules permit what may be behind an IPv6 address.
    fn is_open_behind(&self, behind: Behind) -> bool {
        let (ipv4, is_certain) = match behind {
            Behind::Certainly(ipv4) => (ipv4, true),
            Behind::Perhaps(ipv4) => (ipv4, false),
        };
        let permits = match self.prefixes.lookup(ipv4.into()) {
            Some(permits) => *permits,
            // It would have to be allowed by name, if it is meant.
            None => !is_certain,
        };
        permits && !guard::is_martian(ipv4) && !self.is_overlay(ipv4.into())
    }

    /// Whether an address is one of the overlay.
    fn is_overlay(&self, address: IpAddr) -> bool {
        self.rules.networks.iter().any(|net| net.contains(&address))
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
        let to = policy.check(Protocol::Tcp, (loopback, 80).into());
        assert_eq!(to, Ok((Ipv4Addr::LOCALHOST, 80).into()));
        assert!(!allows(&policy, "192.0.2.8:80"));
    }

    #[test]
    fn a_pod_hears_those_to_whom_it_may_speak() {
        let loopback = Ipv4Addr::new(192, 0, 2, 7);
        let rules = |allow: &str, host_loopback| Rules {
            allow: nets(&[allow]),
            host_loopback,
            tunnel_ports: vec![8472],
            ..Rules::default()
        };
        let closed = Policy::new(rules("198.51.100.0/24", None));
        let open = Policy::new(rules("0.0.0.0/0", Some(loopback.into())));
        let hears = |policy: &Policy, source: &str| {
            let known = policy.check_source(Protocol::Udp, source.parse().unwrap(), false);
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
            tunnel_ports: vec![4000],
            ..Rules::default()
        });
        for address in [Ipv4Addr::new(198, 51, 100, 1), loopback, open] {
            for port in [4000, 4789, 8285, 8472, 8473] {
                let tunnel = SocketAddr::from((address, port));
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

    #[test]
    fn addresses_that_say_nothing_outside_are_never_reached() {
        let all = Policy::new(Rules {
            allow: nets(&[
                "::/0",
                "fe80::1/128",
                "::1/128",
                "ff0e::1/128",
                "::ffff:192.0.2.1/128",
            ]),
            ..Rules::default()
        });
        for policy in [&all, &Policy::new(Rules::default())] {
            for address in [
                "::",
                "::1",
                "::192.0.2.1",
                "::ffff:192.0.2.1",
                "::ffff:127.0.0.1",
                "fe80::1",
                "febf::1",
                "fec0::1",
                "ff02::1",
                "ff0e::1",
            ] {
                assert!(!allows(policy, &format!("[{address}]:80")), "{address}");
            }
            assert!(allows(policy, "[2001:db8::1]:80"));
            assert!(
                allows(policy, "[fd00::1]:80"),
                "as a private address of IPv4"
            );
        }
    }

    #[test]
    fn metadata_and_translators_of_ipv6_are_open_if_they_are_named() {
        for address in [
            "fd00:ec2::254",
            "fd20:ce::254",
            "64:ff9b::c000:201",
            "64:ff9b:1::c000:201",
        ] {
            let socket = format!("[{address}]:80");
            assert!(
                !allows(&Policy::new(Rules::default()), &socket),
                "{address}"
            );
            let policy = Policy::new(Rules {
                allow: nets(&["0.0.0.0/0", &format!("{address}/128")]),
                ..Rules::default()
            });
            assert!(allows(&policy, &socket), "{address}");
        }
    }

    #[test]
    fn one_address_of_each_version_stands_for_the_hosts_loopback() {
        let policy = Policy::new(Rules {
            deny: nets(&["0.0.0.0/0", "::/0"]),
            host_loopback: Some("192.0.2.7,2001:db8::7".parse().unwrap()),
            ..Rules::default()
        });
        let check = |to: &str| {
            let checked = policy.check(Protocol::Tcp, to.parse().unwrap());
            checked.ok().map(|to| to.to_string())
        };
        assert_eq!(check("192.0.2.7:80").as_deref(), Some("127.0.0.1:80"));
        assert_eq!(check("[2001:db8::7]:80").as_deref(), Some("[::1]:80"));
        assert_eq!(check("[2001:db8::8]:80"), None);
        let known = |from: &str, is_for_ipv6| {
            let known = policy.check_source(Protocol::Udp, from.parse().unwrap(), is_for_ipv6);
            known.map(|known| known.to_string())
        };
        assert_eq!(known("[::1]:53", true).as_deref(), Ok("[2001:db8::7]:53"));
        assert_eq!(known("127.0.0.1:53", true), Err(DropReason::EgressFamily));
        assert_eq!(known("[::1]:53", false), Err(DropReason::EgressFamily));
        assert_eq!(
            known("[2001:db8::7]:53", true),
            Err(DropReason::EgressDenied)
        );
    }

    /// All forms in which there is an IPv4 address.
    fn forms(ipv4: Ipv4Addr) -> Vec<Ipv6Addr> {
        let [a, b, c, d] = ipv4.octets().map(u16::from);
        let (high, low) = (a << 8 | b, c << 8 | d);
        let mut all = vec![
            ipv4.to_ipv6_mapped(),
            Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
            Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
            // Of a Teredo server, and of a client.
            Ipv6Addr::new(0x2001, 0, high, low, 0x8000, 0x63bf, 0x3fff, 0xfdd2),
            Ipv6Addr::new(0x2001, 0, 0x4136, 0xe378, 0x8000, 0x63bf, !high, !low),
        ];
        for prefix in [
            "64:ff9b::/96",
            "64:ff9b:1::/48",
            "64:ff9b:1:fffe::/64",
            "64:ff9b:1::/96",
        ] {
            all.push(prefix.parse::<Nat64Prefix>().unwrap().embed(ipv4));
        }
        all
    }

    proptest::proptest! {
        /// No other form of an address gets around a rule for it.
        #[test]
        fn an_embedded_address_is_reached_only_if_it_is_itself(
            bits in proptest::prelude::any::<u32>(),
            length in 1u8..=32,
            near in proptest::prelude::any::<u32>(),
            protocol in proptest::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Ping]),
        ) {
            let net = Ipv4Net::new(bits.into(), length).unwrap().trunc();
            // An address in the net.
            let host = u32::from(net.hostmask());
            let inside = Ipv4Addr::from(u32::from(net.network()) | (near & host));
            let allow_six = ["::/0", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"];
            let denies = Policy::new(Rules {
                allow: [nets(&["0.0.0.0/0"]), nets(&allow_six)].concat(),
                deny: vec![net.into()],
                nat64: Some("2001:db8:64::/96".parse().unwrap()),
                ..Rules::default()
            });
            let own = Policy::new(Rules {
                allow: [nets(&["0.0.0.0/0"]), nets(&allow_six)].concat(),
                networks: vec![net.into()],
                nat64: Some("2001:db8:64::/96".parse().unwrap()),
                ..Rules::default()
            });
            let ours = "2001:db8:64::/96".parse::<Nat64Prefix>().unwrap().embed(inside);
            for form in forms(inside).into_iter().chain([ours]) {
                // A number with a zero in front is no address that a translator would take.
                let is_certain = !LOCAL_USE.contains(&form) || inside.octets()[0] != 0;
                for policy in [&denies, &own].into_iter().filter(|_| is_certain) {
                    let to = SocketAddr::new(form.into(), 1000);
                    proptest::prop_assert!(policy.check(protocol, to).is_err(), "{form} is {inside}");
                }
            }
            // And NAT64 gets where IPv4 gets.
            let outside = Ipv4Addr::from(near);
            let meant = SocketAddr::new("2001:db8:64::/96".parse::<Nat64Prefix>().unwrap().embed(outside).into(), 1000);
            let itself = denies.check(protocol, SocketAddr::new(outside.into(), 1000));
            if !guard::is_martian(outside) {
                proptest::prop_assert_eq!(denies.check(protocol, meant), itself);
            }
        }
    }
}
