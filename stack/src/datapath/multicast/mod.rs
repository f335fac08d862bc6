//! Groups: which pods have joined them, and how far their packets go.
//!
//! The node is a switch that listens to its pods' membership reports (RFC 4541), and their querier. What is
//! here knows formats, scopes and timers; [`super::node`] moves the packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::EthernetAddress;

pub mod igmp;
pub mod mld;
mod table;

pub use table::{LAST_MEMBER_INTERVAL, Leaving, MEMBERSHIP_INTERVAL, Memberships, TableFull};

use smoltcp::time::Duration;

/// The time between general queries (RFC 3376 section 8.2, RFC 3810 section 9.2).
pub const QUERY_INTERVAL: Duration = Duration::from_secs(125);
/// How long hosts may wait with their answer (RFC 3376 section 8.3, RFC 3810 section 9.3).
pub const QUERY_RESPONSE_INTERVAL: Duration = Duration::from_secs(10);
/// The same at the start and after a pod was attached: until they answer, they hear nothing.
pub const FIRST_RESPONSE_INTERVAL: Duration = Duration::from_secs(1);
/// The time between the first general queries: a fourth (RFC 3376 section 8.6).
pub const STARTUP_QUERY_INTERVAL: Duration = Duration::from_millis(31_250);
/// How many of them there are, and how often other messages are sent (RFC 3376 sections 8.1 and 8.7).
pub const ROBUSTNESS: u8 = 2;

/// Multicast DNS (RFC 6762 section 3).
pub const MDNS: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
/// The same of IPv6.
pub const MDNS_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);
/// The UDP port of multicast DNS.
pub const MDNS_PORT: u16 = 5353;

/// How far packets for a group go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Nowhere: the group is one of the sender's own host, or there is none such (RFC 4291 section 2.7).
    Host,
    /// To hosts of one link: the pods of a node.
    Link,
    /// Beyond it.
    Wider,
}

impl Scope {
    /// That of a group's address; `None` of an address that is no group's.
    #[must_use]
    pub const fn of(group: IpAddr) -> Option<Self> {
        match group {
            IpAddr::V4(group) => match group.octets() {
                // RFC 5771 section 4.
                [224, 0, 0, _] => Some(Self::Link),
                [224..=239, ..] => Some(Self::Wider),
                _ => None,
            },
            IpAddr::V6(group) => match group.octets() {
                [0xff, flags, ..] => Some(match flags & 0x0f {
                    0 | 1 | 15 => Self::Host,
                    2 => Self::Link,
                    _ => Self::Wider,
                }),
                _ => None,
            },
        }
    }
}

/// Whether all pods of a node get what is for a group, whoever has joined it: hosts need not report groups
/// of 224.0.0.0/24 (RFC 4541 section 2.1.2), and multicast DNS is the same in both versions of IP.
#[must_use]
pub fn is_for_all(group: IpAddr) -> bool {
    match group {
        IpAddr::V4(_) => Scope::of(group) == Some(Scope::Link),
        IpAddr::V6(group) => group == MDNS_V6,
    }
}

/// Whether memberships in a group are kept. Those of the groups of all nodes and of solicited nodes are
/// not: neighbour discovery finds its way by other tables.
#[must_use]
pub fn is_followed(group: IpAddr) -> bool {
    const ALL_SYSTEMS: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);
    match (group, Scope::of(group)) {
        (_, None | Some(Scope::Host)) => false,
        (IpAddr::V4(group), _) => group != ALL_SYSTEMS,
        (IpAddr::V6(group), _) => !matches!(
            group.segments(),
            [0xff02, 0, 0, 0, 0, 0, 0, 1] | [0xff02, 0, 0, 0, 0, 1, 0xff00..=0xffff, _]
        ),
    }
}

/// The MAC address of frames for a group (RFC 1112 section 6.4, RFC 2464 section 7).
#[must_use]
pub const fn mac_of(group: IpAddr) -> EthernetAddress {
    match group {
        IpAddr::V4(group) => {
            let [_, b, c, d] = group.octets();
            EthernetAddress([0x01, 0x00, 0x5e, b & 0x7f, c, d])
        }
        IpAddr::V6(group) => {
            let [.., a, b, c, d] = group.octets();
            EthernetAddress([0x33, 0x33, a, b, c, d])
        }
    }
}

/// What a host says of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The group.
    pub group: IpAddr,
    /// Whether the host wants its packets, of whichever sources; it wants none if not.
    pub joins: bool,
}

/// Types of group records (RFC 3376 section 4.2.12, RFC 3810 section 5.2.12).
mod record {
    pub(super) const IS_INCLUDE: u8 = 1;
    pub(super) const IS_EXCLUDE: u8 = 2;
    pub(super) const TO_INCLUDE: u8 = 3;
    pub(super) const TO_EXCLUDE: u8 = 4;
    pub(super) const ALLOW: u8 = 5;
}

/// The group records of a report of IGMPv3 or MLDv2, of which `size` is the length of an address. Sources
/// are looked at only as far as that there are any: hosts filter them themselves (RFC 4541 section 2.1).
#[derive(Debug, Clone)]
struct Records<'a> {
    left: u16,
    rest: &'a [u8],
    size: usize,
}

/// A group record: the address of its group, and whether the host joins or leaves by it.
type Record<'a> = (&'a [u8], Option<bool>);

impl<'a> Records<'a> {
    /// The records behind a report's header of eight bytes, which ends with their number; `None` if
    /// they are more than there is.
    fn new(message: &'a [u8], size: usize) -> Option<Self> {
        let (&[.., high, low], rest) = message.split_first_chunk::<8>()?;
        let records = Self {
            left: u16::from_be_bytes([high, low]),
            rest,
            size,
        };
        let mut walk = records.clone();
        while walk.left > 0 {
            walk.read()?;
        }
        Some(records)
    }

    fn read(&mut self) -> Option<Record<'a>> {
        let &[kind, words, high, low] = self.rest.first_chunk()?;
        let sources = usize::from(u16::from_be_bytes([high, low]));
        let len = 4 + self.size * (1 + sources) + usize::from(words) * 4;
        let (record, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        self.left -= 1;
        let joins = match kind {
            record::IS_EXCLUDE | record::TO_EXCLUDE => Some(true),
            record::ALLOW => (sources > 0).then_some(true),
            record::IS_INCLUDE | record::TO_INCLUDE => Some(sources > 0),
            // Who blocks sources had asked for all others (6); types to come are passed over.
            _ => None,
        };
        Some((&record[4..4 + self.size], joins))
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        (self.left > 0).then(|| self.read()).flatten()
    }
}

/// A time in a code of eight bits: as it is, or with an exponent where it is long (RFC 3376 section
/// 4.1.7, where `unit` bits of the code are the mantissa's).
const fn code(value: u64) -> u8 {
    if value < 128 {
        return value as u8;
    }
    let mut exponent = 0;
    while exponent < 7 && value >> (exponent + 3) > 0x1f {
        exponent += 1;
    }
    let mantissa = (value >> (exponent + 3)) & 0x0f;
    0x80 | (exponent as u8) << 4 | mantissa as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn scopes_are_those_of_the_registries() {
        for (group, scope) in [
            ("224.0.0.1", Some(Scope::Link)),
            ("224.0.0.251", Some(Scope::Link)),
            ("224.0.1.1", Some(Scope::Wider)),
            ("239.255.255.250", Some(Scope::Wider)),
            ("240.0.0.1", None),
            ("255.255.255.255", None),
            ("223.255.255.255", None),
            ("ff00::1", Some(Scope::Host)),
            ("ff01::fb", Some(Scope::Host)),
            ("ff0f::1", Some(Scope::Host)),
            ("ff02::fb", Some(Scope::Link)),
            ("ff12::1", Some(Scope::Link)),
            ("ff03::1", Some(Scope::Wider)),
            ("ff05::2", Some(Scope::Wider)),
            ("ff3e::1:2:3", Some(Scope::Wider)),
            ("fe80::1", None),
            ("::ffff:224.0.0.1", None),
        ] {
            assert_eq!(Scope::of(ip(group)), scope, "{group}");
        }
    }

    #[test]
    fn groups_of_everybody_and_of_nobody() {
        let all = ["224.0.0.1", "224.0.0.251", "224.0.0.7", "ff02::fb"];
        assert!(all.iter().all(|group| is_for_all(ip(group))));
        let members = ["224.0.1.1", "239.1.1.1", "ff02::c", "ff05::fb", "ff02::1"];
        assert!(!members.iter().any(|group| is_for_all(ip(group))));
        for (group, expected) in [
            ("224.0.0.1", false),
            ("224.0.0.251", true),
            ("239.1.1.1", true),
            ("10.0.0.1", false),
            ("ff02::1", false),
            ("ff02::1:ff00:1", false),
            ("ff02::1:fe00:1", true),
            ("ff02::c", true),
            ("ff01::c", false),
            ("ff05::1", true),
        ] {
            assert_eq!(is_followed(ip(group)), expected, "{group}");
        }
    }

    #[test]
    fn macs_have_the_groups_last_bits() {
        let mac = |group| mac_of(ip(group)).0;
        assert_eq!(mac("224.129.2.3"), [1, 0, 0x5e, 1, 2, 3]);
        assert_eq!(mac("239.255.0.1"), [1, 0, 0x5e, 0x7f, 0, 1]);
        assert_eq!(
            mac("ff02::1:ff12:3456"),
            [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]
        );
    }

    /// RFC 3376 section 4.1.1: (mantissa | 0x10) << (exponent + 3).
    #[test]
    fn long_times_have_an_exponent() {
        let decode = |code: u8| match code {
            0..128 => u64::from(code),
            _ => u64::from(code & 0x0f | 0x10) << ((code >> 4 & 7) + 3),
        };
        for value in [0, 10, 100, 127, 128, 255, 256, 1000, 10_000, 31_743] {
            let read = decode(code(value));
            assert!(
                read <= value && value - read <= value / 16,
                "{value}: {read}"
            );
        }
    }
}
