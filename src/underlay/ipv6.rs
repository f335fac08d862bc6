//! The IPv6 address by which other nodes reach this one.
//!
//! Other nodes keep it in their tables for as long as the lease says it, so that one that stays is
//! worth more than one that is new: addresses of privacy extensions change within a day, and peers of
//! a node that published one lost it (flannel #2293).

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::Ipv6Net;
use muslin_stack::addresses::Dual;
use muslin_stack::control::lease::is_public_ipv6;
use regex::Regex;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::interface::{InterfaceChoice, Ipv4End, Ipv6End, NoInterface, PublicInterface};
use super::links::{self, Interface};
use crate::netlink;

/// An address outside of all local networks (RFC 3849), to ask for the default route.
const WORLD: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// Flags of addresses that do not last, or that the kernel does not use (yet): `linux/if_addr.h`.
const UNFIT: AddressFlags = AddressFlags::Secondary
    .union(AddressFlags::Optimistic)
    .union(AddressFlags::Dadfailed)
    .union(AddressFlags::Deprecated)
    .union(AddressFlags::Tentative);

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Candidate {
    /// The number of the interface.
    interface: u32,
    address: Ipv6Addr,
    prefix: Ipv6Net,
    flags: AddressFlags,
    /// How long the kernel prefers it, in seconds.
    preferred: u32,
}

impl Candidate {
    fn read(message: &AddressMessage) -> Option<Self> {
        let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
        let (mut local, mut far, mut preferred) = (None, None, u32::MAX);
        for attribute in &message.attributes {
            match attribute {
                // On a point-to-point link that is the other end.
                AddressAttribute::Address(IpAddr::V6(it)) => far = Some(*it),
                AddressAttribute::Local(IpAddr::V6(it)) => local = Some(*it),
                AddressAttribute::Flags(it) => flags |= *it,
                AddressAttribute::CacheInfo(it) => preferred = it.ifa_preferred,
                _ => {}
            }
        }
        let prefix = Ipv6Net::new(far.or(local)?, message.header.prefix_len);
        Some(Self {
            interface: message.header.index,
            address: local.or(far)?,
            prefix: prefix.ok()?.trunc(),
            flags,
            preferred,
        })
    }

    /// Whether other nodes can send to it: pods have none of the pod network on the underlay.
    fn is_public(&self, pods: Option<Ipv6Net>) -> bool {
        let is_pods = pods.is_some_and(|pods| pods.contains(&self.address));
        is_public_ipv6(self.address) && !self.address.is_loopback() && !is_pods
    }

    fn is_fit(&self, pods: Option<Ipv6Net>) -> bool {
        self.is_public(pods) && !self.flags.intersects(UNFIT)
    }

    /// Whether it can still be the source of packets, if it was published already, or the user says so.
    fn is_valid(&self) -> bool {
        let unusable = AddressFlags::Dadfailed | AddressFlags::Tentative;
        is_public_ipv6(self.address) && !self.flags.intersects(unusable)
    }

    /// Whether the kernel still looks whether another host has it.
    fn is_tentative(&self) -> bool {
        let is_tentative = self.flags.intersects(AddressFlags::Tentative);
        is_tentative && !self.flags.intersects(AddressFlags::Dadfailed)
    }

    fn end(&self) -> Ipv6End {
        Ipv6End {
            address: self.address,
            prefix: self.prefix,
        }
    }
}

/// The best address of some for a node of this pod network, or the one that was published, while it is
/// valid: global before local (RFC 4193), without an end before those that end, and of these the one that
/// lasts longest.
fn best<'a>(
    candidates: impl IntoIterator<Item = &'a Candidate> + Clone,
    pods: Option<Ipv6Net>,
    published: Option<Ipv6Addr>,
) -> Option<Candidate> {
    let valid = candidates.clone().into_iter();
    let mut valid = valid.filter(|it| it.is_valid() && it.is_public(pods));
    if let Some(kept) = valid.find(|it| Some(it.address) == published) {
        return Some(*kept);
    }
    let fit = candidates.into_iter().filter(|it| it.is_fit(pods));
    let best = fit.min_by_key(|it| {
        let is_static = it.flags.contains(AddressFlags::Permanent);
        let rank = (it.address.is_unique_local(), !is_static);
        (rank, Reverse(it.preferred), it.address)
    });
    best.copied()
}

/// What a machine has of IPv6.
#[derive(Debug, Default)]
struct Machine {
    candidates: Vec<Candidate>,
    /// The interface of the default route.
    default: Option<u32>,
}

impl Machine {
    async fn ask(handle: &Handle) -> Self {
        let request = handle.address().get();
        let mut addresses = request.execute();
        let mut candidates = Vec::new();
        // What the kernel refuses to tell is not there.
        while let Ok(Some(message)) = addresses.try_next().await {
            if message.header.family == AddressFamily::Inet6 {
                candidates.extend(Candidate::read(&message));
            }
        }
        Self {
            candidates,
            default: default_interface(handle).await,
        }
    }

    fn on(&self, interface: u32) -> impl Iterator<Item = &Candidate> + Clone {
        let all = self.candidates.iter();
        all.filter(move |it| it.interface == interface)
    }

    fn owner(&self, address: Ipv6Addr) -> Option<&Candidate> {
        self.candidates.iter().find(|it| it.address == address)
    }

    /// The end beside that of IPv4, and whether there may be one soon.
    fn beside(
        &self,
        (wanted, interface): (&InterfaceChoice, &PublicInterface),
        pods: Option<Ipv6Net>,
        published: Option<Ipv6Addr>,
    ) -> (Option<Ipv6End>, bool) {
        if let Some(public) = wanted.public_ipv6 {
            let owner = self.owner(public).filter(|it| it.is_valid());
            return (owner.map(Candidate::end), owner.is_none());
        }
        let is_loopback = |end: Ipv4End| end.address.is_loopback();
        let others = match interface.ends.ipv4().is_some_and(is_loopback) {
            true => None,
            false => self.default,
        };
        let places = [Some(interface.index), others].into_iter().flatten();
        let places: Vec<_> = places.collect();
        let mut found = places.iter();
        let found = found.find_map(|index| best(self.on(*index), pods, published));
        let mut all = places.iter().flat_map(|index| self.on(*index));
        let may_come = all.any(|it| it.is_public(pods) && it.is_tentative());
        (found.as_ref().map(Candidate::end), may_come)
    }

    /// The end on a machine where that of IPv4 counts for nothing.
    fn alone<'a>(
        &self,
        wanted: &InterfaceChoice,
        interfaces: &'a [Interface],
        pods: Option<Ipv6Net>,
        published: Option<Ipv6Addr>,
    ) -> Option<(&'a Interface, Ipv6End)> {
        let at = |candidate: Candidate| {
            let mut all = interfaces.iter();
            let interface = all.find(|it| it.index == candidate.interface)?;
            Some((interface, candidate.end()))
        };
        let best_on = |index| best(self.on(index), pods, published).and_then(at);
        if let Some(public) = wanted.public_ipv6 {
            let owner = self.owner(public).filter(|it| it.is_valid());
            return owner.copied().and_then(at);
        }
        if wanted.interfaces.is_empty() && wanted.patterns.is_empty() {
            let mut fit: Vec<_> = self.candidates.iter().collect();
            fit.retain(|it| it.is_fit(pods));
            fit.sort_by_key(|it| it.interface);
            fit.dedup_by_key(|it| it.interface);
            let only = match fit.as_slice() {
                [only] => Some(only.interface),
                _ => None,
            };
            return self.default.and_then(best_on).or_else(|| best_on(only?));
        }
        let named = |text: &String| match text.parse() {
            Ok(address) => self
                .owner(address)
                .filter(|it| it.is_valid())
                .copied()
                .and_then(at),
            Err(_) => best_on(interfaces.iter().find(|it| it.name == *text)?.index),
        };
        let fits = |pattern: &Regex| {
            let by_address =
                |it: &&Candidate| it.is_fit(pods) && pattern.is_match(&it.address.to_string());
            let by_name = || {
                let mut all = interfaces.iter().filter(|it| pattern.is_match(&it.name));
                all.find_map(|it| best_on(it.index))
            };
            let found = self.candidates.iter().find(by_address);
            found.copied().and_then(at).or_else(by_name)
        };
        let by_name = wanted.interfaces.iter().find_map(named);
        by_name.or_else(|| wanted.patterns.iter().find_map(fits))
    }
}

/// Adds the end of IPv6 for a node whose pods have addresses of this network, as far as that is known:
/// at the address that the user names, else at one of the underlay's interface, else at one of the
/// interface that the default route of IPv6 leads to. None is added if there is none.
pub(super) async fn complete(
    interface: PublicInterface,
    wanted: &InterfaceChoice,
    pods: Option<Ipv6Net>,
    published: Option<Ipv6Addr>,
) -> PublicInterface {
    let machine = netlink::with(async |handle| Machine::ask(handle).await).await;
    let machine = machine.unwrap_or_default();
    let (end, may_come) = machine.beside((wanted, &interface), pods, published);
    let awaits_ipv6 = end.is_none() && may_come;
    PublicInterface {
        awaits_ipv6,
        ..interface.with_ipv6(end)
    }
}

/// The underlay's interface of a node without IPv4: that of the address that the user names, or the
/// interface that the user names, or that of the default route of IPv6, or the only one that has an address
/// which other nodes can send to.
///
/// # Errors
/// Why there is none, and what to do.
pub(super) async fn choose(
    wanted: &InterfaceChoice,
    pods: Option<Ipv6Net>,
    published: Option<Ipv6Addr>,
) -> Result<PublicInterface, NoInterface> {
    let ask = async |handle: &Handle| {
        let interfaces = links::interfaces(handle).await.unwrap_or_default();
        let machine = Machine::ask(handle).await;
        let found = machine.alone(wanted, &interfaces, pods, published);
        found.map(|(interface, end)| interface.public(Dual::with_ipv6(end)))
    };
    let not_yet = || {
        NoInterface::NotYet(match wanted.public_ipv6 {
            Some(public) => format!("the public address {public} is not on this machine"),
            None => "this machine has no IPv6 address that other nodes could send to, or several and no \
                     default route: choose one with --public-ipv6 or --iface"
                .to_owned(),
        })
    };
    netlink::with(ask).await?.ok_or_else(not_yet)
}

async fn default_interface(handle: &Handle) -> Option<u32> {
    let mut message = RouteMessageBuilder::<Ipv6Addr>::new().build();
    message.header.destination_prefix_length = 128;
    let to = RouteAttribute::Destination(RouteAddress::Inet6(WORLD));
    message.attributes.push(to);
    let mut routes = handle.route().get(message).execute();
    let route = routes.try_next().await.ok()??;
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOREVER: u32 = u32::MAX;

    fn candidate(address: &str, flags: AddressFlags, preferred: u32) -> Candidate {
        let address: Ipv6Addr = address.parse().unwrap();
        Candidate {
            interface: 2,
            address,
            prefix: Ipv6Net::new(address, 64).unwrap().trunc(),
            flags,
            preferred,
        }
    }

    fn best(all: &[Candidate], published: Option<Ipv6Addr>) -> Option<Ipv6Addr> {
        super::best(all, None, published).map(|it| it.address)
    }

    #[test]
    fn no_address_of_the_pod_network_is_published() {
        let pods = "2001:db8::/48".parse().ok();
        let all = [
            candidate("2001:db8::7", AddressFlags::Permanent, FOREVER),
            candidate("fd01::5", AddressFlags::Permanent, FOREVER),
        ];
        let published = Some(all[0].address);
        assert_eq!(best(&all, published), published);
        let other = super::best(&all, pods, published).map(|it| it.address);
        assert_eq!(other, Some(all[1].address));
    }

    #[test]
    fn a_machine_without_ipv4_has_the_interface_of_its_address() {
        let interface = |index, name: &str| Interface {
            index,
            name: name.to_owned(),
            mtu: 1500,
            ..Interface::default()
        };
        let interfaces = [
            interface(1, "lo"),
            interface(2, "eth0"),
            interface(3, "eth1"),
        ];
        let on = |index, address| Candidate {
            interface: index,
            ..candidate(address, AddressFlags::Permanent, FOREVER)
        };
        let mut machine = Machine {
            candidates: vec![on(1, "::1"), on(2, "fe80::2"), on(2, "fd01::2")],
            default: None,
        };
        let chosen = |machine: &Machine, wanted: &InterfaceChoice| {
            let found = machine.alone(wanted, &interfaces, None, None);
            found.map(|(interface, end)| format!("{} {}", interface.name, end.address))
        };
        let any = InterfaceChoice::default();
        assert_eq!(chosen(&machine, &any).as_deref(), Some("eth0 fd01::2"));
        machine.candidates.push(on(3, "fd01::3"));
        assert_eq!(chosen(&machine, &any), None, "two, and no route");
        let named = |text: &str| InterfaceChoice {
            interfaces: vec![text.to_owned()],
            ..InterfaceChoice::default()
        };
        for wanted in [
            named("eth1"),
            named("fd01::3"),
            InterfaceChoice {
                patterns: vec![Regex::new("1$").unwrap()],
                ..InterfaceChoice::default()
            },
            InterfaceChoice {
                public_ipv6: "fd01::3".parse().ok(),
                ..InterfaceChoice::default()
            },
        ] {
            assert_eq!(chosen(&machine, &wanted).as_deref(), Some("eth1 fd01::3"));
        }
        assert_eq!(chosen(&machine, &named("fd01::9")), None);
        machine.default = Some(2);
        assert_eq!(chosen(&machine, &any).as_deref(), Some("eth0 fd01::2"));
    }

    #[test]
    fn an_address_that_the_kernel_still_looks_for_may_come() {
        let interface = Interface {
            index: 2,
            ..Interface::default()
        };
        let end = Ipv4End {
            address: [10, 9, 0, 1].into(),
            public_ip: [10, 9, 0, 1].into(),
            prefix: "10.9.0.0/24".parse().unwrap(),
        };
        let interface = interface.public(Dual::with_ipv4(end, None));
        let wanted = InterfaceChoice::default();
        for (flags, expected) in [
            (AddressFlags::Tentative, (None, true)),
            (
                AddressFlags::Tentative | AddressFlags::Dadfailed,
                (None, false),
            ),
            (AddressFlags::Permanent, (Some("fd01::5"), false)),
        ] {
            let machine = Machine {
                candidates: vec![candidate("fd01::5", flags, FOREVER)],
                default: None,
            };
            let (end, may_come) = machine.beside((&wanted, &interface), None, None);
            let end = end.map(|end| end.address.to_string());
            assert_eq!((end.as_deref(), may_come), expected, "{flags:?}");
        }
    }

    #[test]
    fn the_address_that_lasts_longest_is_published() {
        let dynamic = AddressFlags::empty();
        let mut all = vec![
            candidate("fe80::1", AddressFlags::Permanent, FOREVER),
            candidate("::1", AddressFlags::Permanent, FOREVER),
            candidate("::ffff:192.0.2.1", AddressFlags::Permanent, FOREVER),
            candidate("2001:db8::1", AddressFlags::Secondary, 86_400),
            candidate("2001:db8::2", AddressFlags::Deprecated, 0),
            candidate("2001:db8::3", AddressFlags::Tentative, FOREVER),
            candidate(
                "2001:db8::4",
                AddressFlags::Dadfailed | AddressFlags::Permanent,
                FOREVER,
            ),
        ];
        let none = best(&all, None);
        assert_eq!(none, None);
        // From the worst to the best.
        for (address, flags, preferred) in [
            ("fd01::5", dynamic, 86_400),
            ("fd01::6", AddressFlags::Permanent, FOREVER),
            ("2001:db8::7", dynamic, 3_600),
            (
                "2001:db8::8",
                dynamic | AddressFlags::Managetempaddr,
                86_400,
            ),
            ("2001:db8::9", AddressFlags::Permanent, FOREVER),
        ] {
            all.insert(0, candidate(address, flags, preferred));
            assert_eq!(best(&all, None), address.parse().ok());
        }
    }

    #[test]
    fn what_is_published_stays_while_it_is_valid() {
        let (old, new) = ("2001:db8::2", "2001:db8::9");
        let published: Option<Ipv6Addr> = old.parse().ok();
        let new = candidate(new, AddressFlags::Permanent, FOREVER);
        for (flags, stays) in [
            (AddressFlags::empty(), true),
            (AddressFlags::Deprecated, true),
            (AddressFlags::Dadfailed, false),
        ] {
            let all = [new, candidate(old, flags, 0)];
            let expected = if stays { published } else { Some(new.address) };
            assert_eq!(best(&all, published), expected, "{flags:?}");
        }
        assert_eq!(best(&[new], published), Some(new.address));
        assert_eq!(best(&[], published), None);
    }
}
