//! The underlay's interface: which one the tunnel is bound to, chosen by flannel's rules.
//!
//! What the machine has is read without privileges; the choice itself is made from values.

use std::net::{Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::{Ipv4Net, Ipv6Net};
use muslin_stack::addresses::{Addresses, Dual, Nets};
use regex::Regex;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, RouteMessageBuilder};
use smoltcp::wire::EthernetAddress;

use super::links::{self, Address, Interface};
use crate::error::{Context, Error, Result};
use crate::netlink;

/// An address of the world, set aside for documentation (RFC 5737): the way there is the default
/// route.
const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Where the tunnel ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicInterface {
    /// The interface's name.
    pub name: String,
    /// Where the tunnel ends in each IP version.
    pub ends: Dual<Ipv4End, Ipv6End>,
    /// Whether there may be an address of IPv6 soon: one that the kernel still looks for in the link
    /// (RFC 4862 section 5.4), or one that the user names.
    pub awaits_ipv6: bool,
    /// The interface's MTU in bytes.
    pub mtu: u32,
    /// Whether the interface is up.
    pub is_up: bool,
    /// Its MAC address, if it has one.
    pub mac: Option<EthernetAddress>,
    /// Its number: another interface of the same name has another one.
    pub index: u32,
}

/// An end of the tunnel in IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4End {
    /// The address that the tunnel is bound to.
    pub address: Ipv4Addr,
    /// The address that other nodes send to: another one behind NAT.
    pub public_ip: Ipv4Addr,
    /// The network that is on the link, without a router between: that of the address.
    pub prefix: Ipv4Net,
}

/// An end of the tunnel in IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6End {
    /// The address that the tunnel is bound to, and that other nodes send to.
    pub address: Ipv6Addr,
    /// The network that is on the link.
    pub prefix: Ipv6Net,
}

impl PublicInterface {
    /// The addresses that the tunnel is bound to.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.ends.map(|end| end.address, |end| end.address)
    }

    /// The addresses that other nodes send to.
    #[must_use]
    pub fn public(&self) -> Addresses {
        self.ends.map(|end| end.public_ip, |end| end.address)
    }

    /// The networks that are on the link.
    #[must_use]
    pub fn prefixes(&self) -> Nets {
        self.ends.map(|end| end.prefix, |end| end.prefix)
    }

    /// Whether other nodes send to an address that something translates to ours.
    #[must_use]
    pub fn is_translated(&self) -> bool {
        let ipv4 = self.ends.ipv4();
        ipv4.is_some_and(|end| end.address != end.public_ip)
    }

    /// Keeps what it had of an IP version that it has no address of now.
    pub fn keep_ends(&mut self, before: &Self) {
        let ipv4 = self.ends.ipv4().or(before.ends.ipv4());
        let ipv6 = self.ends.ipv6().or(before.ends.ipv6());
        self.ends = Dual::new(ipv4, ipv6).unwrap_or(self.ends);
    }

    /// The same with this end of IPv6, or with none.
    #[must_use]
    pub fn with_ipv6(self, end: Option<Ipv6End>) -> Self {
        let ends = Dual::new(self.ends.ipv4(), end).unwrap_or(self.ends);
        Self { ends, ..self }
    }
}

/// The user's choice of the underlay's interface.
#[derive(Debug, Clone, Default)]
pub struct InterfaceChoice {
    /// Interfaces by name or address; the first one that exists is used.
    pub interfaces: Vec<String>,
    /// Else the first pattern that fits an address, or else a name.
    pub patterns: Vec<Regex>,
    /// Else the interface that packets to this address leave from.
    pub reach: Option<Ipv4Addr>,
    /// The address that other nodes send to; without one it is that of the interface.
    pub public_ip: Option<Ipv4Addr>,
    /// The same for IPv6 ([`super::ipv6`]).
    pub public_ipv6: Option<Ipv6Addr>,
}

/// Who sends to the address that is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Nodes of this machine: a loopback address will do where there is no other.
    Machine,
    /// Nodes of other machines, too: a loopback address counts only if the user names it.
    Others,
}

/// Why there is no interface for the underlay.
#[derive(Debug, thiserror::Error)]
pub enum NoInterface {
    /// There may be one later: interfaces, addresses and routes come and go.
    #[error("{0}")]
    NotYet(String),
    /// There never will be.
    #[error(transparent)]
    Never(#[from] Error),
}

type Found<T> = std::result::Result<T, NoInterface>;

impl InterfaceChoice {
    fn names_an_interface(&self) -> bool {
        !self.interfaces.is_empty() || !self.patterns.is_empty() || self.reach.is_some()
    }

    /// A description of the choice for messages.
    fn describe(&self) -> String {
        let names = self.interfaces.iter().map(|name| format!("--iface {name}"));
        let patterns = self.patterns.iter().map(|it| format!("--iface-regex {it}"));
        let reach = self
            .reach
            .iter()
            .map(|it| format!("--iface-can-reach {it}"));
        let all: Vec<_> = names.chain(patterns).chain(reach).collect();
        all.join(", ")
    }
}

/// Chooses the underlay's interface among those of this machine.
///
/// # Errors
/// Why there is none like that, and what to do.
pub(super) async fn choose(wanted: &InterfaceChoice, audience: Audience) -> Found<PublicInterface> {
    choose_among(wanted, audience, &Machine::read(wanted.reach).await?)
}

/// Whether the kernel forwards IPv4 packets that arrive at an interface; `None` if that cannot be
/// read.
#[must_use]
pub fn forwards_ipv4(interface: &str) -> Option<bool> {
    let path = format!("/proc/sys/net/ipv4/conf/{interface}/forwarding");
    match std::fs::read_to_string(path).ok()?.trim() {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

/// The interfaces of a machine and its routes out.
#[derive(Debug, Default)]
struct Machine {
    interfaces: Vec<Interface>,
    /// The route to the address of `--iface-can-reach`.
    route_to_reach: Option<RouteOut>,
    /// The default route.
    default_route: Option<RouteOut>,
}

/// The interface by which packets leave, and the address they have then.
#[derive(Debug, Clone, Copy)]
struct RouteOut {
    interface: u32,
    source: Option<Ipv4Addr>,
}

/// An interface and the address on it that is meant.
type Place<'a> = (&'a Interface, Ipv4Addr);

fn choose_among(
    wanted: &InterfaceChoice,
    audience: Audience,
    machine: &Machine,
) -> Found<PublicInterface> {
    if let Some(public) = wanted.public_ip.filter(|it| is_nobody(*it)) {
        let error = Error::usage(format!("other nodes cannot reach this one at {public}"));
        return Err(error.into());
    }
    let (interface, mut address) = if wanted.names_an_interface() {
        let place = machine.named(wanted, audience);
        place.ok_or_else(|| machine.no_such_interface(&wanted.describe()))?
    } else {
        machine.unnamed(wanted.public_ip, audience)?
    };
    if let Some(public) = wanted.public_ip {
        match machine.owner(public) {
            Some(owner) if owner.name == interface.name => address = public,
            Some(owner) => {
                let words = format!(
                    "the public address {public} is on the interface {}, not on {}",
                    owner.name, interface.name
                );
                // Loopback addresses do not move.
                return Err(match public.is_loopback() {
                    true => Error::usage(words).into(),
                    false => NoInterface::NotYet(words),
                });
            }
            None => {}
        }
    }
    if interface.mtu == 0 {
        let name = &interface.name;
        return Err(NoInterface::NotYet(format!(
            "the interface {name} has no MTU"
        )));
    }
    let end = Ipv4End {
        address,
        public_ip: wanted.public_ip.unwrap_or(address),
        prefix: interface.prefix(address),
    };
    Ok(interface.public(Dual::with_ipv4(end, None)))
}

/// Whether this is the address of no single machine.
fn is_nobody(ip: Ipv4Addr) -> bool {
    ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast()
}

impl Audience {
    /// Whether it can send to an address, as far as the address itself shows that.
    fn reaches(self, address: Ipv4Addr) -> bool {
        self == Self::Machine || !address.is_loopback()
    }
}

impl Machine {
    /// The first place that one of the user's words fits.
    fn named(&self, wanted: &InterfaceChoice, audience: Audience) -> Option<Place<'_>> {
        let by_name = || {
            wanted
                .interfaces
                .iter()
                .find_map(|text| self.by_name_or_address(text))
        };
        let by_pattern = || {
            let mut patterns = wanted.patterns.iter();
            patterns.find_map(|it| self.matching(it, audience))
        };
        let names_loopback = wanted.reach.is_some_and(|it| it.is_loopback());
        let by_route = || {
            let place = self.via_route(self.route_to_reach);
            place.filter(|place| names_loopback || audience.reaches(place.1))
        };
        by_name().or_else(by_pattern).or_else(by_route)
    }

    /// The place of a public address, or else that of the default route. Without such a route it is
    /// loopback for the nodes of this machine, and for others the only interface with an address
    /// that they can send to.
    fn unnamed(&self, public_ip: Option<Ipv4Addr>, audience: Audience) -> Found<Place<'_>> {
        if let Some(public) = public_ip {
            let owner = self.owner(public).ok_or_else(|| {
                NoInterface::NotYet(format!(
                    "the public address {public} is not on this machine, which has {}: if NAT \
                     translates it to one of these, choose that with --iface",
                    self.list()
                ))
            })?;
            return Ok((owner, public));
        }
        let by_route = self.via_route(self.default_route);
        if let Some(place) = by_route.filter(|place| audience.reaches(place.1)) {
            return Ok(place);
        }
        match audience {
            Audience::Machine => self
                .by_name_or_address(&Ipv4Addr::LOCALHOST.to_string())
                .ok_or_else(|| {
                    NoInterface::NotYet(
                        "this machine has no IPv4 address: give one with --public-ip".to_owned(),
                    )
                }),
            Audience::Others => self.only_global(),
        }
    }

    /// The only interface that has an address which other machines can send to.
    fn only_global(&self) -> Found<Place<'_>> {
        let up = self.interfaces.iter().filter(|interface| interface.is_up);
        let all = up.filter_map(|interface| {
            let address = interface.preferred()?;
            let is_global = !address.is_loopback() && !address.is_link_local();
            is_global.then_some((interface, address))
        });
        match all.collect::<Vec<_>>().as_slice() {
            [only] => Ok(*only),
            [] => Err(NoInterface::NotYet(format!(
                "this machine has no IPv4 address that other nodes could send to (it has {}): \
                 wait until it has one, or choose one with --public-ip or --iface",
                self.list()
            ))),
            _ => Err(NoInterface::NotYet(format!(
                "this machine has no default route and several addresses, {}: choose one with \
                 --public-ip or --iface",
                self.list()
            ))),
        }
    }

    /// The interface with this name or address.
    fn by_name_or_address(&self, text: &str) -> Option<Place<'_>> {
        if let Ok(ip) = text.parse() {
            return Some((self.owner(ip)?, ip));
        }
        let interface = self.interfaces.iter().find(|it| it.name == text)?;
        Some((interface, interface.preferred()?))
    }

    /// The first interface with an address, or else a name, that has `pattern` in it.
    fn matching(&self, pattern: &Regex, audience: Audience) -> Option<Place<'_>> {
        let by_address = self.interfaces.iter().find_map(|interface| {
            let addresses = interface.by_preference().into_iter();
            let mut addresses = addresses.filter(|ip| audience.reaches(*ip));
            let address = addresses.find(|ip| pattern.is_match(&ip.to_string()))?;
            Some((interface, address))
        });
        by_address.or_else(|| {
            let mut named = self
                .interfaces
                .iter()
                .filter(|interface| pattern.is_match(&interface.name));
            named.find_map(|interface| {
                let address = interface.preferred().filter(|ip| audience.reaches(*ip))?;
                Some((interface, address))
            })
        })
    }

    fn via_route(&self, route: Option<RouteOut>) -> Option<Place<'_>> {
        let route = route?;
        let interface = self
            .interfaces
            .iter()
            .find(|it| it.index == route.interface)?;
        let source = route.source.filter(|source| interface.has(*source));
        Some((interface, source.or_else(|| interface.preferred())?))
    }

    fn owner(&self, ip: Ipv4Addr) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.has(ip))
    }

    fn no_such_interface(&self, what: &str) -> NoInterface {
        NoInterface::NotYet(format!(
            "no interface with an IPv4 address fits {what}; this machine has {}",
            self.list()
        ))
    }

    /// All addresses, for people.
    fn list(&self) -> String {
        let each = self.interfaces.iter().flat_map(|interface| {
            let addresses = interface.addresses.iter();
            addresses.map(|address| format!("{} ({})", address.ip, interface.name))
        });
        let all: Vec<_> = each.collect();
        if all.is_empty() {
            return "none".to_owned();
        }
        all.join(", ")
    }
}

impl Interface {
    /// The same as the underlay's interface, with these ends of the tunnel.
    pub(super) fn public(&self, ends: Dual<Ipv4End, Ipv6End>) -> PublicInterface {
        PublicInterface {
            name: self.name.clone(),
            ends,
            awaits_ipv6: false,
            mtu: self.mtu,
            is_up: self.is_up,
            mac: self.mac,
            index: self.index,
        }
    }

    /// Its addresses without deprecated ones: global ones first, then link-local ones, then
    /// loopback; permanent ones first among equals.
    fn by_preference(&self) -> Vec<Ipv4Addr> {
        let usable = self.addresses.iter().filter(|address| !address.deprecated);
        let mut usable: Vec<_> = usable.collect();
        usable.sort_by_key(|address| {
            (
                address.ip.is_loopback(),
                address.ip.is_link_local(),
                !address.permanent,
                address.secondary,
            )
        });
        usable.into_iter().map(|address| address.ip).collect()
    }

    fn preferred(&self) -> Option<Ipv4Addr> {
        self.by_preference().first().copied()
    }

    fn has(&self, ip: Ipv4Addr) -> bool {
        self.entry(ip).is_some()
    }

    /// The network on the link of an address; one that is not here is alone.
    fn prefix(&self, ip: Ipv4Addr) -> Ipv4Net {
        self.entry(ip).map_or(ip.into(), |address| address.prefix)
    }

    fn entry(&self, ip: Ipv4Addr) -> Option<&Address> {
        // All of 127.0.0.0/8 is on the loopback interface.
        let fits = |it: &&Address| it.ip == ip || (it.ip.is_loopback() && ip.is_loopback());
        self.addresses.iter().find(fits)
    }
}

impl Machine {
    async fn read(reach: Option<Ipv4Addr>) -> Result<Self> {
        let machine = netlink::with(async |handle| Self::ask(handle, reach).await).await?;
        machine.context("cannot read this machine's interfaces")
    }

    async fn ask(
        handle: &Handle,
        reach: Option<Ipv4Addr>,
    ) -> std::result::Result<Self, rtnetlink::Error> {
        Ok(Self {
            interfaces: links::interfaces(handle).await?,
            route_to_reach: match reach {
                Some(reach) => route_out(handle, reach).await,
                None => None,
            },
            default_route: route_out(handle, WORLD).await,
        })
    }
}

/// How packets to `destination` leave; nothing if they cannot.
async fn route_out(handle: &Handle, destination: Ipv4Addr) -> Option<RouteOut> {
    let message = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(destination, 32)
        .build();
    let mut routes = handle.route().get(message).execute();
    let route = routes.try_next().await.ok()??;
    let interface = route.attributes.iter().find_map(|it| match it {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    let source = route.attributes.iter().find_map(|it| match it {
        RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => Some(*ip),
        _ => None,
    });
    Some(RouteOut {
        interface: interface?,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    fn interface(index: u32, name: &str, mtu: u32, addresses: &[&str]) -> Interface {
        Interface {
            index,
            name: name.to_owned(),
            mtu,
            is_up: true,
            addresses: addresses.iter().map(|text| address(text)).collect(),
            ..Interface::default()
        }
    }

    fn address(text: &str) -> Address {
        let ip = ip(text);
        let len = if ip.is_loopback() { 8 } else { 24 };
        Address::configured(Ipv4Net::new(ip, len).unwrap())
    }

    /// Two cables, one bridge without an address.
    fn machine() -> Machine {
        Machine {
            interfaces: vec![
                interface(1, "lo", 65536, &["127.0.0.1"]),
                interface(2, "eth0", 1500, &["192.168.1.5", "192.168.1.6"]),
                interface(3, "eth1", 9000, &["169.254.7.7", "10.0.0.5"]),
                interface(4, "br0", 1500, &[]),
            ],
            route_to_reach: None,
            default_route: Some(RouteOut {
                interface: 2,
                source: Some(ip("192.168.1.5")),
            }),
        }
    }

    fn named(names: &[&str]) -> InterfaceChoice {
        InterfaceChoice {
            interfaces: names.iter().map(|&name| name.to_owned()).collect(),
            ..InterfaceChoice::default()
        }
    }

    fn patterns(patterns: &[&str]) -> InterfaceChoice {
        let patterns = patterns.iter().map(|text| Regex::new(text).unwrap());
        InterfaceChoice {
            patterns: patterns.collect(),
            ..InterfaceChoice::default()
        }
    }

    #[track_caller]
    fn chosen(wanted: &InterfaceChoice) -> (String, String) {
        let found = choose_among(wanted, Audience::Others, &machine()).unwrap();
        assert!(!found.is_translated());
        (found.name, found.ends.ipv4().unwrap().address.to_string())
    }

    #[track_caller]
    fn refused(wanted: &InterfaceChoice, words: &[&str]) {
        let error = choose_among(wanted, Audience::Others, &machine()).unwrap_err();
        assert!(matches!(error, NoInterface::NotYet(_)), "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    fn pair(name: &str, address: &str) -> (String, String) {
        (name.to_owned(), address.to_owned())
    }

    #[test]
    fn u19_by_name() {
        assert_eq!(chosen(&named(&["eth0"])), pair("eth0", "192.168.1.5"));
        // A global address before a link-local one.
        assert_eq!(chosen(&named(&["eth1"])), pair("eth1", "10.0.0.5"));
        refused(&named(&["br0"]), &["--iface br0", "10.0.0.5 (eth1)"]);
        refused(&named(&["eth"]), &["--iface eth"]);
    }

    #[test]
    fn u19_by_address() {
        let found = chosen(&named(&["192.168.1.6"]));
        assert_eq!(found, pair("eth0", "192.168.1.6"));
        assert_eq!(chosen(&named(&["127.0.0.9"])), pair("lo", "127.0.0.9"));
        refused(&named(&["192.168.1.7"]), &["192.168.1.7"]);
    }

    #[test]
    fn u19_by_address_pattern() {
        let found = chosen(&patterns(&[r"^192\.168\.1\.[6-9]$"]));
        assert_eq!(found, pair("eth0", "192.168.1.6"));
        // Addresses of all interfaces come before names.
        assert_eq!(chosen(&patterns(&["lo|^10"])), pair("eth1", "10.0.0.5"));
    }

    #[test]
    fn u19_by_name_pattern() {
        assert_eq!(chosen(&patterns(&["th1$"])), pair("eth1", "10.0.0.5"));
        assert_eq!(
            chosen(&patterns(&["wlan", "e.h"])),
            pair("eth0", "192.168.1.5")
        );
        refused(&patterns(&["^br", "wlan"]), &["^br", "wlan"]);
    }

    #[test]
    fn u19_by_pattern_and_public_ip() {
        let wanted = InterfaceChoice {
            public_ip: Some(ip("203.0.113.9")),
            ..patterns(&["eth1"])
        };
        let found = choose_among(&wanted, Audience::Others, &machine()).unwrap();
        assert!(found.is_translated());
        assert_eq!(found.name, "eth1");
        assert_eq!(found.ends.ipv4().unwrap().address, ip("10.0.0.5"));
        assert_eq!(found.ends.ipv4().unwrap().public_ip, ip("203.0.113.9"));
        assert_eq!(found.mtu, 9000);
    }

    #[test]
    fn u19_by_what_it_can_reach() {
        let wanted = InterfaceChoice {
            reach: Some(ip("10.0.0.77")),
            ..InterfaceChoice::default()
        };
        let mut machine = machine();
        let error = choose_among(&wanted, Audience::Others, &machine)
            .unwrap_err()
            .to_string();
        assert!(error.contains("--iface-can-reach 10.0.0.77"), "{error}");
        for (source, expected) in [
            (Some("169.254.7.7"), "169.254.7.7"),
            (None, "10.0.0.5"),
            // A source of another interface cannot be bound to this one.
            (Some("192.168.1.5"), "10.0.0.5"),
        ] {
            machine.route_to_reach = Some(RouteOut {
                interface: 3,
                source: source.map(ip),
            });
            let found = choose_among(&wanted, Audience::Others, &machine).unwrap();
            assert_eq!(
                (&*found.name, found.ends.ipv4().unwrap().address),
                ("eth1", ip(expected))
            );
        }
    }

    #[test]
    fn names_come_before_patterns_and_patterns_before_routes() {
        let mut wanted = named(&["wlan0", "eth1"]);
        wanted.patterns = patterns(&["eth0"]).patterns;
        wanted.reach = Some(ip("192.168.1.77"));
        assert_eq!(chosen(&wanted), pair("eth1", "10.0.0.5"));
        wanted.interfaces.pop();
        assert_eq!(chosen(&wanted), pair("eth0", "192.168.1.5"));
        wanted.patterns.clear();
        refused(
            &wanted,
            &["--iface wlan0", "--iface-can-reach 192.168.1.77"],
        );
    }

    #[test]
    fn a_public_address_chooses_its_interface() {
        let public = |text: &str| InterfaceChoice {
            public_ip: Some(ip(text)),
            ..InterfaceChoice::default()
        };
        assert_eq!(chosen(&public("10.0.0.5")), pair("eth1", "10.0.0.5"));
        assert_eq!(chosen(&public("127.0.0.2")), pair("lo", "127.0.0.2"));
        refused(&public("203.0.113.9"), &["10.0.0.5 (eth1)", "--iface"]);
    }

    #[test]
    fn a_public_address_of_another_interface_is_refused() {
        let on = |name: &str, public: &str| InterfaceChoice {
            public_ip: Some(ip(public)),
            ..named(&[name])
        };
        let found = chosen(&on("eth0", "192.168.1.6"));
        assert_eq!(found, pair("eth0", "192.168.1.6"));
        refused(&on("eth0", "10.0.0.5"), &["10.0.0.5", "eth1", "eth0"]);
        for nobody in ["0.0.0.0", "224.0.0.1", "255.255.255.255", "127.0.0.1"] {
            let wanted = on("eth0", nobody);
            let error = choose_among(&wanted, Audience::Others, &machine()).unwrap_err();
            let NoInterface::Never(error) = error else {
                panic!("{error}")
            };
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(nobody), "{error}");
        }
    }

    #[test]
    fn without_a_word_it_is_the_default_route() {
        assert_eq!(
            chosen(&InterfaceChoice::default()),
            pair("eth0", "192.168.1.5")
        );
    }

    /// A machine without a default route.
    fn isolated(interfaces: Vec<Interface>) -> Machine {
        Machine {
            interfaces,
            ..Machine::default()
        }
    }

    #[track_caller]
    fn place(
        wanted: &InterfaceChoice,
        audience: Audience,
        machine: &Machine,
    ) -> Option<(String, String)> {
        match choose_among(wanted, audience, machine) {
            Ok(found) => Some((found.name, found.ends.ipv4().unwrap().address.to_string())),
            Err(NoInterface::NotYet(_)) => None,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn without_a_default_route_the_only_global_address_counts() {
        let lo = || interface(1, "lo", 65536, &["127.0.0.1"]);
        let eth0 = || interface(2, "eth0", 1500, &["172.27.0.1", "172.27.0.9"]);
        let eth1 = || interface(3, "eth1", 1500, &["10.0.0.5"]);
        let local = || interface(4, "eth2", 1500, &["169.254.7.7"]);
        let mut down = eth1();
        down.is_up = false;
        let any = InterfaceChoice::default();
        let others = |interfaces| place(&any, Audience::Others, &isolated(interfaces));
        assert_eq!(
            others(vec![lo(), local(), eth0(), down]),
            Some(pair("eth0", "172.27.0.1"))
        );
        assert_eq!(others(vec![lo(), eth0(), eth1()]), None);
        assert_eq!(others(vec![lo(), local()]), None);
        assert_eq!(others(vec![]), None);
        for interfaces in [vec![lo(), eth0(), eth1()], vec![lo()], vec![]] {
            let machine = isolated(interfaces);
            let error = choose_among(&any, Audience::Others, &machine).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains("--public-ip") && text.contains("--iface"),
                "{text}"
            );
        }
        // Nodes of the same machine find each other there.
        let machine = isolated(vec![lo(), eth0()]);
        let found = place(&any, Audience::Machine, &machine);
        assert_eq!(found, Some(pair("lo", "127.0.0.1")));
        assert_eq!(place(&any, Audience::Machine, &isolated(vec![])), None);
    }

    #[test]
    fn loopback_is_for_others_only_where_the_user_names_it() {
        let lo = || interface(1, "lo", 65536, &["127.0.0.1"]);
        let mut machine = isolated(vec![lo()]);
        machine.route_to_reach = Some(RouteOut {
            interface: 1,
            source: Some(ip("127.0.0.1")),
        });
        machine.default_route = machine.route_to_reach;
        let found = |wanted: InterfaceChoice, audience| {
            place(&wanted, audience, &machine).map(|(_, address)| address)
        };
        let loopback = Some("127.0.0.1".to_owned());
        let reach = |text: &str| InterfaceChoice {
            reach: Some(ip(text)),
            ..InterfaceChoice::default()
        };
        let public = InterfaceChoice {
            public_ip: Some(ip("127.0.0.1")),
            ..InterfaceChoice::default()
        };
        for named in [
            named(&["lo"]),
            named(&["127.0.0.1"]),
            public,
            reach("127.0.0.3"),
        ] {
            assert_eq!(found(named, Audience::Others), loopback);
        }
        // A default route to nowhere, what fits any interface, and the machine's own address.
        for wanted in [
            InterfaceChoice::default(),
            patterns(&["."]),
            patterns(&["lo"]),
            reach("10.0.0.5"),
        ] {
            assert_eq!(found(wanted.clone(), Audience::Others), None);
            assert_eq!(found(wanted, Audience::Machine), loopback);
        }
    }

    #[test]
    fn addresses_that_last_come_first() {
        let mut eth0 = interface(2, "eth0", 1500, &[]);
        let mut add = |text: &str, change: fn(&mut Address)| {
            let mut address = address(text);
            change(&mut address);
            eth0.addresses.push(address);
        };
        add("10.0.0.1", |address| address.deprecated = true);
        add("10.0.0.2", |address| address.permanent = false);
        add("10.0.0.3", |address| address.secondary = true);
        add("10.0.0.4", |_| {});
        assert_eq!(
            eth0.by_preference(),
            ["10.0.0.4", "10.0.0.3", "10.0.0.2"].map(ip)
        );
    }

    #[test]
    fn an_interface_without_mtu_is_refused() {
        let machine = Machine {
            interfaces: vec![interface(1, "eth0", 0, &["10.0.0.1"])],
            ..Machine::default()
        };
        let error = choose_among(&named(&["eth0"]), Audience::Others, &machine).unwrap_err();
        assert!(error.to_string().contains("no MTU"), "{error}");
    }

    #[test]
    fn the_link_of_an_address_has_its_prefix() {
        let chosen = |name: &str, machine: &Machine| {
            choose_among(&named(&[name]), Audience::Others, machine).unwrap()
        };
        let found = |name: &str| chosen(name, &machine());
        for (name, prefix) in [
            ("eth0", "192.168.1.0/24"),
            ("eth1", "10.0.0.0/24"),
            ("169.254.7.7", "169.254.7.0/24"),
            ("127.0.0.9", "127.0.0.0/8"),
        ] {
            let interface = found(name);
            assert_eq!(
                interface.ends.ipv4().unwrap().prefix,
                prefix.parse::<Ipv4Net>().unwrap()
            );
            assert!(interface.is_up);
        }
        let mut machine = machine();
        machine.interfaces[1].is_up = false;
        assert!(!chosen("eth0", &machine).is_up);
    }

    #[test]
    fn forwarding_is_read_where_it_can_be() {
        assert!(forwards_ipv4("lo").is_some());
        assert_eq!(forwards_ipv4("no-such-iface"), None);
    }

    #[tokio::test]
    async fn this_machine_has_a_loopback_interface() {
        let choose =
            async |wanted: InterfaceChoice| choose(&wanted, Audience::Others).await.unwrap();
        let found = choose(named(&["127.0.0.2"])).await;
        assert_eq!(
            (&*found.name, found.ends.ipv4().unwrap().address),
            ("lo", ip("127.0.0.2"))
        );
        assert!(found.mtu >= 1280 && found.is_up);
        assert_eq!(
            found.ends.ipv4().unwrap().prefix,
            "127.0.0.0/8".parse::<Ipv4Net>().unwrap()
        );
        let wanted = InterfaceChoice {
            reach: Some(ip("127.0.0.3")),
            ..InterfaceChoice::default()
        };
        assert_eq!(choose(wanted).await.name, "lo");
    }
}
