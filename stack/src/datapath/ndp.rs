//! IPv6 neighbour discovery (RFC 4861): messages as they come, the answers of who has an address, and
//! questions.
//!
//! This is the twin of ARP, of our own: smoltcp's answers without the flags that make hosts believe
//! it, and not at all who asks for duplicates.

use std::net::Ipv6Addr;

use muslin_encap::ip::v6;
use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv6Packet};

use crate::datapath::frame;
use crate::drops::DropReason;

/// ICMPv6 message types (RFC 4861 section 4).
pub(crate) const ROUTER_SOLICITATION: u8 = 133;
pub(crate) const ROUTER_ADVERTISEMENT: u8 = 134;
pub(crate) const NEIGHBOUR_SOLICITATION: u8 = 135;
pub(crate) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
pub(crate) const REDIRECT: u8 = 137;

/// Options (RFC 4861 section 4.6).
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;
/// Options count their length in units of so many bytes.
const OPTION_UNIT: usize = 8;

/// What no router has passed on has still (RFC 4861 section 3.1).
const HOP_LIMIT: u8 = 255;
/// Bytes of the ICMPv6 header, with the four that solicitations leave zero.
const ICMP_LEN: usize = 8;
/// Bytes of a solicitation or advertisement without options.
const MESSAGE_LEN: usize = ICMP_LEN + 16;

/// Flags of an advertisement (RFC 4861 section 4.4).
const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// Bytes of the frames that are written here, each with one option.
pub const FRAME_LEN: usize = frame::HEADER_LEN + v6::HEADER_LEN + MESSAGE_LEN + OPTION_UNIT;

/// All nodes of a link (RFC 4291 section 2.7.1).
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// A valid message of neighbour discovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Who has this address?
    Solicitation(Solicitation),
    /// This one has.
    Advertisement(Advertisement),
    /// Which routers are there?
    RouterSolicitation {
        /// Who asks; unspecified before it has an address.
        source: Ipv6Addr,
        /// The MAC address of who asks, if the message says it.
        mac: Option<EthernetAddress>,
    },
}

/// A neighbour solicitation (RFC 4861 section 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Solicitation {
    /// Who asks; unspecified if it asks whether it may take the target (RFC 4862 section 5.4.2).
    pub source: Ipv6Addr,
    /// Where it was sent: the target's solicited-node address, or an address of one host.
    pub destination: Ipv6Addr,
    /// The address that is looked for.
    pub target: Ipv6Addr,
    /// The MAC address of who asks, if the message says it.
    pub mac: Option<EthernetAddress>,
}

/// A neighbour advertisement (RFC 4861 section 4.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advertisement {
    /// The sender, which need not be the target.
    pub source: Ipv6Addr,
    /// Where it was sent.
    pub destination: Ipv6Addr,
    /// The address that somebody has.
    pub target: Ipv6Addr,
    /// The MAC address where it is, if the message says it.
    pub mac: Option<EthernetAddress>,
    /// What it says about itself.
    pub flags: Flags,
}

/// What an advertisement says about itself (RFC 4861 section 4.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags {
    /// The sender is a router.
    pub router: bool,
    /// It answers a solicitation.
    pub solicited: bool,
    /// It replaces the MAC address that was known.
    pub override_: bool,
}

/// An address that somebody answers for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The address.
    pub address: Ipv6Addr,
    /// Whether its holder is a router.
    pub router: bool,
    /// Whether others may have it, too (RFC 4861 section 7.2.7).
    pub anycast: bool,
}

impl Message {
    /// Reads the message in an IPv6 packet, which may have bytes behind it. `None` if the packet is
    /// not of neighbour discovery.
    ///
    /// # Errors
    /// `RouterAdvertisement` for one of those and for Redirects, which nobody has to send here;
    /// `NdpInvalid` for what RFC 4861 (sections 6.1.1, 7.1) and RFC 6980 have ignored; other reasons
    /// for a broken packet.
    pub fn parse(packet: &[u8]) -> Result<Option<Self>, DropReason> {
        let packet = &packet[..v6::check(packet)?];
        let upper = v6::upper_layer(packet)?;
        if IpProtocol::from(upper.protocol) != IpProtocol::Icmpv6 || upper.is_later_fragment() {
            return Ok(None);
        }
        let message = &packet[upper.offset..];
        let kind = message.first().copied().unwrap_or_default();
        match kind {
            ROUTER_ADVERTISEMENT | REDIRECT => return Err(DropReason::RouterAdvertisement),
            ROUTER_SOLICITATION | NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => {}
            _ => return Ok(None),
        }
        let view = Ipv6Packet::new_unchecked(packet);
        let is_valid = view.hop_limit() == HOP_LIMIT
            && upper.fragment.is_none()
            && message.get(1) == Some(&0)
            && v6::has_icmp_checksum(packet, upper.offset);
        let parsed = match kind {
            ROUTER_SOLICITATION => router_solicitation(&view, message),
            NEIGHBOUR_SOLICITATION => solicitation(&view, message),
            _ => advertisement(&view, message),
        };
        match parsed {
            Some(message) if is_valid => Ok(Some(message)),
            _ => Err(DropReason::NdpInvalid),
        }
    }
}

fn router_solicitation(view: &Ipv6Packet<&[u8]>, message: &[u8]) -> Option<Message> {
    let source = view.src_addr();
    let mac = link_layer(message.get(ICMP_LEN..)?, SOURCE_LINK_LAYER)?;
    let may = !(source.is_unspecified() && mac.is_some());
    may.then_some(Message::RouterSolicitation { source, mac })
}

fn solicitation(view: &Ipv6Packet<&[u8]>, message: &[u8]) -> Option<Message> {
    let (source, destination) = (view.src_addr(), view.dst_addr());
    let target = target(message).filter(|target| !target.is_multicast())?;
    let mac = link_layer(message.get(MESSAGE_LEN..)?, SOURCE_LINK_LAYER)?;
    let may = !source.is_unspecified() || (is_solicited_node(destination) && mac.is_none());
    may.then_some(Message::Solicitation(Solicitation {
        source,
        destination,
        target,
        mac,
    }))
}

fn advertisement(view: &Ipv6Packet<&[u8]>, message: &[u8]) -> Option<Message> {
    let (source, destination) = (view.src_addr(), view.dst_addr());
    let target = target(message).filter(|target| !target.is_multicast())?;
    let mac = link_layer(message.get(MESSAGE_LEN..)?, TARGET_LINK_LAYER)?;
    let flags = Flags::from_byte(message[4]);
    let may = !(destination.is_multicast() && flags.solicited);
    may.then_some(Message::Advertisement(Advertisement {
        source,
        destination,
        target,
        mac,
        flags,
    }))
}

impl Flags {
    const fn from_byte(byte: u8) -> Self {
        Self {
            router: byte & ROUTER != 0,
            solicited: byte & SOLICITED != 0,
            override_: byte & OVERRIDE != 0,
        }
    }

    fn to_byte(self) -> u8 {
        let bit = |flag: bool, bit: u8| if flag { bit } else { 0 };
        bit(self.router, ROUTER) | bit(self.solicited, SOLICITED) | bit(self.override_, OVERRIDE)
    }
}

/// The address that a neighbour solicitation or advertisement is about.
pub(crate) fn target(message: &[u8]) -> Option<Ipv6Addr> {
    let bytes = message.get(ICMP_LEN..)?.first_chunk::<16>()?;
    Some(Ipv6Addr::from(*bytes))
}

/// The MAC address in the first option of that kind: `Some(None)` without one, `None` if the options
/// are not well-formed. An address of another length than Ethernet's is none.
fn link_layer(mut options: &[u8], wanted: u8) -> Option<Option<EthernetAddress>> {
    let mut found = None;
    while let [kind, rest @ ..] = options {
        // A length of zero would be the same option for ever.
        let len = usize::from(*rest.first()?) * OPTION_UNIT;
        let (option, rest) = options.split_at_checked(len).filter(|_| len > 0)?;
        if *kind == wanted && len == OPTION_UNIT && found.is_none() {
            found = Some(EthernetAddress::from_bytes(&option[2..]));
        }
        options = rest;
    }
    Some(found)
}

/// The group in which a host hears solicitations for an address (RFC 4291 section 2.7.1).
#[must_use]
pub const fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., high, low] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | high & 0x00ff, low)
}

/// Whether an address is the solicited-node address of some address.
#[must_use]
pub const fn is_solicited_node(address: Ipv6Addr) -> bool {
    matches!(
        address.segments(),
        [0xff02, 0, 0, 0, 0, 1, 0xff00..=0xffff, _]
    )
}

/// The MAC address of a multicast group (RFC 2464 section 7).
#[must_use]
pub const fn multicast_mac(group: Ipv6Addr) -> EthernetAddress {
    let [.., a, b, c, d] = group.octets();
    EthernetAddress([0x33, 0x33, a, b, c, d])
}

/// The frame that answers a solicitation for one of the addresses that `mac` holds, which came from
/// the MAC address `from`; `None` if the target is none of them, or who asks has the address of a group. Who asks whether the address is free
/// hears that it is not, as all others do (RFC 4861 section 7.2.4, RFC 4862 section 5.4.3).
#[must_use]
pub fn answer(
    solicitation: &Solicitation,
    from: EthernetAddress,
    held: &[Held],
    mac: EthernetAddress,
) -> Option<[u8; FRAME_LEN]> {
    let target = solicitation.target;
    let own = held.iter().find(|own| own.address == target)?;
    let is_probe = solicitation.source.is_unspecified();
    let to = if is_probe {
        (multicast_mac(ALL_NODES), ALL_NODES)
    } else {
        let mut macs = solicitation.mac.into_iter().chain([from]);
        (macs.find(EthernetAddress::is_unicast)?, solicitation.source)
    };
    // Nobody sends from an address that others have, too.
    let source = if own.anycast {
        held.iter().find(|it| !it.anycast)?.address
    } else {
        target
    };
    let flags = Flags {
        router: own.router,
        solicited: !is_probe,
        override_: !own.anycast,
    };
    Some(write_advertisement((mac, source), target, to, flags))
}

/// Writes a solicitation for `target`: to its solicited-node group, or to the MAC address where it was
/// last.
#[must_use]
pub fn write_solicitation(
    source: (EthernetAddress, Ipv6Addr),
    target: Ipv6Addr,
    to: Option<EthernetAddress>,
) -> [u8; FRAME_LEN] {
    let to = match to {
        Some(mac) => (mac, target),
        None => {
            let group = solicited_node(target);
            (multicast_mac(group), group)
        }
    };
    write(
        source,
        to,
        (NEIGHBOUR_SOLICITATION, 0),
        target,
        (SOURCE_LINK_LAYER, source.0),
    )
}

/// Writes an advertisement: `target` is at the MAC address of `source`.
#[must_use]
pub fn write_advertisement(
    source: (EthernetAddress, Ipv6Addr),
    target: Ipv6Addr,
    to: (EthernetAddress, Ipv6Addr),
    flags: Flags,
) -> [u8; FRAME_LEN] {
    let kind = (NEIGHBOUR_ADVERTISEMENT, flags.to_byte());
    write(source, to, kind, target, (TARGET_LINK_LAYER, source.0))
}

fn write(
    source: (EthernetAddress, Ipv6Addr),
    to: (EthernetAddress, Ipv6Addr),
    (kind, flags): (u8, u8),
    target: Ipv6Addr,
    option: (u8, EthernetAddress),
) -> [u8; FRAME_LEN] {
    let mut bytes = [0; FRAME_LEN];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    frame.set_src_addr(source.0);
    frame.set_dst_addr(to.0);
    frame.set_ethertype(EthernetProtocol::Ipv6);
    let packet = frame.payload_mut();
    let header = v6::Header {
        traffic_class: 0,
        flow_label: 0,
        payload_len: (MESSAGE_LEN + OPTION_UNIT) as u16,
        next_header: IpProtocol::Icmpv6,
        hop_limit: HOP_LIMIT,
        source: source.1,
        destination: to.1,
    };
    let (head, message) = packet.split_at_mut(v6::HEADER_LEN);
    head.copy_from_slice(&header.to_bytes());
    message[0] = kind;
    message[4] = flags;
    message[ICMP_LEN..MESSAGE_LEN].copy_from_slice(&target.octets());
    message[MESSAGE_LEN..MESSAGE_LEN + 2].copy_from_slice(&[option.0, 1]);
    message[MESSAGE_LEN + 2..].copy_from_slice(option.1.as_bytes());
    v6::fill_icmp_checksum(packet, v6::HEADER_LEN);
    bytes
}

#[cfg(test)]
mod tests {
    use etherparse::{PacketHeaders, TransportHeader};
    use proptest::prelude::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{Icmpv6Packet, Icmpv6Repr, NdiscNeighborFlags, NdiscRepr};

    use super::*;

    const POD_MAC: EthernetAddress = EthernetAddress([0x0a, 0x58, 10, 244, 1, 2]);
    const GATEWAY_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
    const POD: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 2);
    const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 1);
    const BASE: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 0);

    fn held() -> [Held; 2] {
        [(GATEWAY, false), (BASE, true)].map(|(address, anycast)| Held {
            address,
            router: true,
            anycast,
        })
    }

    /// A packet with this message, whose checksum is right.
    fn packet(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> Vec<u8> {
        let header = v6::Header {
            traffic_class: 0,
            flow_label: 0,
            payload_len: message.len() as u16,
            next_header: IpProtocol::Icmpv6,
            hop_limit: 255,
            source,
            destination,
        };
        let mut packet = [&header.to_bytes()[..], message].concat();
        v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN);
        packet
    }

    /// A solicitation or advertisement about the gateway's address with these options.
    fn about(kind: u8, source: Ipv6Addr, destination: Ipv6Addr, options: &[u8]) -> Vec<u8> {
        let message = [&[kind, 0, 0, 0, 0, 0, 0, 0], &GATEWAY.octets()[..], options].concat();
        packet(source, destination, &message)
    }

    fn solicitation(frame: &[u8]) -> Solicitation {
        match Message::parse(&frame[frame::HEADER_LEN..]) {
            Ok(Some(Message::Solicitation(it))) => it,
            other => panic!("{other:?}"),
        }
    }

    fn advertisement(frame: &[u8]) -> Advertisement {
        match Message::parse(&frame[frame::HEADER_LEN..]) {
            Ok(Some(Message::Advertisement(it))) => it,
            other => panic!("{other:?}"),
        }
    }

    /// What smoltcp reads in a frame: its MAC addresses and the message.
    fn smoltcps(frame: &[u8], read: impl FnOnce(EthernetAddress, EthernetAddress, NdiscRepr<'_>)) {
        let view = EthernetFrame::new_checked(frame).unwrap();
        let packet = Ipv6Packet::new_checked(view.payload()).unwrap();
        assert_eq!(
            (packet.hop_limit(), packet.next_header()),
            (255, IpProtocol::Icmpv6)
        );
        let message = Icmpv6Packet::new_checked(packet.payload()).unwrap();
        let all = ChecksumCapabilities::default();
        let message = Icmpv6Repr::parse(&packet.src_addr(), &packet.dst_addr(), &message, &all);
        let Ok(Icmpv6Repr::Ndisc(message)) = message else {
            panic!("{message:?}");
        };
        read(view.src_addr(), view.dst_addr(), message);
    }

    #[test]
    fn groups_are_those_of_the_rfcs() {
        // RFC 4291 section 2.7.1 has this example.
        let address: Ipv6Addr = "4037::1:800:200e:8c6c".parse().unwrap();
        let group: Ipv6Addr = "ff02::1:ff0e:8c6c".parse().unwrap();
        assert_eq!(solicited_node(address), group);
        assert!(is_solicited_node(group));
        for other in [
            "ff02::1",
            "ff02::1:fe0e:8c6c",
            "ff05::1:ff0e:8c6c",
            "fe80::1:ff0e:8c6c",
        ] {
            assert!(!is_solicited_node(other.parse().unwrap()), "{other}");
        }
        let mac = EthernetAddress([0x33, 0x33, 0xff, 0x0e, 0x8c, 0x6c]);
        assert_eq!(multicast_mac(group), mac);
    }

    /// v6LC.2.1.8 and 2.2.x: what an invalid message is, each thing alone.
    #[test]
    fn each_rule_of_validation_counts() {
        let (nobody, group) = (Ipv6Addr::UNSPECIFIED, solicited_node(GATEWAY));
        let mac = &[1, 1, 2, 3, 4, 5, 6, 7];
        let good = about(NEIGHBOUR_SOLICITATION, POD, group, mac);
        assert!(matches!(
            Message::parse(&good),
            Ok(Some(Message::Solicitation(_)))
        ));
        let with = |at: usize, value: u8| {
            let mut packet = good.clone();
            packet[at] = value;
            v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN);
            packet
        };
        let mut damaged = good.clone();
        damaged[63] ^= 1;
        let cut = |len: usize| {
            let message = &good[40..40 + len];
            packet(POD, group, message)
        };
        let fragment = {
            let mut packet = good.clone();
            packet[6] = 44;
            packet.splice(40..40, [58, 0, 0, 0, 0, 0, 0, 0]);
            v6::set_payload_len(&mut packet, 40);
            v6::fill_icmp_checksum(&mut packet, 48);
            packet
        };
        let group_flags = {
            let mut packet = about(NEIGHBOUR_ADVERTISEMENT, GATEWAY, ALL_NODES, &[]);
            packet[44] = SOLICITED;
            v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN);
            packet
        };
        let router = |source, options: &[u8]| {
            packet(
                source,
                ALL_NODES,
                &[&[133, 0, 0, 0, 0, 0, 0, 0], options].concat(),
            )
        };
        for (name, bytes) in [
            ("hop limit", with(7, 254)),
            ("hop limit of a link", with(7, 1)),
            ("code", with(41, 1)),
            ("checksum", damaged),
            ("a target of many", with(48, 0xff)),
            ("an option of no length", with(65, 0)),
            ("an option beyond the end", with(65, 2)),
            ("an option cut off", cut(25)),
            ("no target", cut(23)),
            ("nothing but its type", cut(4)),
            ("fragments", fragment),
            (
                "nobody's MAC address",
                about(NEIGHBOUR_SOLICITATION, nobody, group, mac),
            ),
            (
                "nobody, to one host",
                about(NEIGHBOUR_SOLICITATION, nobody, GATEWAY, &[]),
            ),
            (
                "nobody, to all",
                about(NEIGHBOUR_SOLICITATION, nobody, ALL_NODES, &[]),
            ),
            ("solicited by all", group_flags),
            ("nobody's MAC address for routers", router(nobody, mac)),
            ("an option of no length for routers", router(POD, &[1, 0])),
        ] {
            assert_eq!(
                Message::parse(&bytes),
                Err(DropReason::NdpInvalid),
                "{name}"
            );
        }
        for kind in [ROUTER_ADVERTISEMENT, REDIRECT] {
            let never = Err(DropReason::RouterAdvertisement);
            assert_eq!(Message::parse(&with(40, kind)), never);
        }
        // Those beside it are.
        for bytes in [
            with(44, 0xff),
            with(43, 0xff),
            cut(24),
            about(NEIGHBOUR_SOLICITATION, nobody, group, &[]),
            about(NEIGHBOUR_SOLICITATION, POD, GATEWAY, &[]),
            about(
                NEIGHBOUR_SOLICITATION,
                POD,
                group,
                &[14, 1, 9, 9, 9, 9, 9, 9],
            ),
            about(NEIGHBOUR_ADVERTISEMENT, GATEWAY, ALL_NODES, &[]),
            router(nobody, &[]),
            router(POD, mac),
            [&good[..], &[0; 20]].concat(),
        ] {
            assert!(matches!(Message::parse(&bytes), Ok(Some(_))), "{bytes:x?}");
        }
        for other in [with(40, 128), with(40, 132), with(6, 17)] {
            assert_eq!(Message::parse(&other), Ok(None));
        }
    }

    #[test]
    fn the_first_mac_address_of_the_right_kind_counts() {
        let group = solicited_node(GATEWAY);
        let options = [
            // Of the other kind, and too long for Ethernet.
            &[2, 1, 9, 9, 9, 9, 9, 9][..],
            &[1, 2, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8],
            &[1, 1, 1, 2, 3, 4, 5, 6],
            &[1, 1, 7, 7, 7, 7, 7, 7],
        ]
        .concat();
        let mac = Some(EthernetAddress([1, 2, 3, 4, 5, 6]));
        let asked = Message::parse(&about(NEIGHBOUR_SOLICITATION, POD, group, &options));
        let expected = Solicitation {
            source: POD,
            destination: group,
            target: GATEWAY,
            mac,
        };
        assert_eq!(asked, Ok(Some(Message::Solicitation(expected))));
        let told = Message::parse(&about(NEIGHBOUR_ADVERTISEMENT, POD, GATEWAY, &options));
        let Ok(Some(Message::Advertisement(told))) = told else {
            panic!("{told:?}");
        };
        assert_eq!(told.mac, Some(EthernetAddress([9; 6])));
    }

    /// v6LC.2.1.4 and 2.1.5: a question is answered with all flags, to who asked.
    #[test]
    fn a_question_is_answered_to_who_asked() {
        let asked = write_solicitation((POD_MAC, POD), GATEWAY, None);
        smoltcps(&asked, |source, destination, message| {
            assert_eq!(
                (source, destination),
                (POD_MAC, multicast_mac(solicited_node(GATEWAY)))
            );
            let NdiscRepr::NeighborSolicit {
                target_addr,
                lladdr,
            } = message
            else {
                panic!("{message:?}");
            };
            assert_eq!((target_addr, lladdr), (GATEWAY, Some(POD_MAC.into())));
        });
        let question = solicitation(&asked);
        assert_eq!(question.destination, solicited_node(GATEWAY));
        let answered = answer(&question, GATEWAY_MAC, &held(), GATEWAY_MAC).unwrap();
        smoltcps(&answered, |source, destination, message| {
            // The option says where the answer goes, not the frame.
            assert_eq!((source, destination), (GATEWAY_MAC, POD_MAC));
            let NdiscRepr::NeighborAdvert {
                flags,
                target_addr,
                lladdr,
            } = message
            else {
                panic!("{message:?}");
            };
            assert_eq!(flags, NdiscNeighborFlags::all());
            assert_eq!((target_addr, lladdr), (GATEWAY, Some(GATEWAY_MAC.into())));
        });
        let told = advertisement(&answered);
        assert_eq!((told.source, told.destination), (GATEWAY, POD));
        // Whether it is still there is asked of it alone, and without an option.
        let mut probe = about(NEIGHBOUR_SOLICITATION, POD, GATEWAY, &[]);
        probe.splice(0..0, [0; frame::HEADER_LEN]);
        let answered = answer(&solicitation(&probe), POD_MAC, &held(), GATEWAY_MAC).unwrap();
        assert_eq!(
            EthernetFrame::new_unchecked(&answered[..]).dst_addr(),
            POD_MAC
        );
        assert!(advertisement(&answered).flags.solicited);
        let again = write_solicitation((POD_MAC, POD), GATEWAY, Some(GATEWAY_MAC));
        assert_eq!(
            EthernetFrame::new_unchecked(&again[..]).dst_addr(),
            GATEWAY_MAC
        );
        assert_eq!(solicitation(&again).destination, GATEWAY);
        // A group of stations is nobody's address.
        let group = write_solicitation((EthernetAddress([3; 6]), POD), GATEWAY, None);
        let answered = answer(&solicitation(&group), POD_MAC, &held(), GATEWAY_MAC).unwrap();
        assert_eq!(
            EthernetFrame::new_unchecked(&answered[..]).dst_addr(),
            POD_MAC
        );
        let nobody = answer(
            &solicitation(&probe),
            EthernetAddress([3; 6]),
            &held(),
            GATEWAY_MAC,
        );
        assert_eq!(nobody, None);
        // Others answer for themselves.
        let other = write_solicitation((POD_MAC, POD), POD, None);
        assert_eq!(
            answer(&solicitation(&other), POD_MAC, &held(), GATEWAY_MAC),
            None
        );
    }

    /// RFC 4861 section 7.2.7.
    #[test]
    fn an_address_of_many_replaces_nothing() {
        let asked = write_solicitation((POD_MAC, POD), BASE, None);
        let answered = answer(&solicitation(&asked), POD_MAC, &held(), GATEWAY_MAC).unwrap();
        let told = advertisement(&answered);
        let flags = Flags {
            router: true,
            solicited: true,
            override_: false,
        };
        assert_eq!(
            (told.flags, told.target, told.source),
            (flags, BASE, GATEWAY)
        );
        assert_eq!(told.mac, Some(GATEWAY_MAC));
    }

    /// v6LC.3.1.1 (RFC 4862 section 5.4.3): who asks whether the address is free hears it, with all
    /// others.
    #[test]
    fn who_has_no_address_yet_is_told_with_all_others() {
        let mut probe = about(
            NEIGHBOUR_SOLICITATION,
            Ipv6Addr::UNSPECIFIED,
            solicited_node(GATEWAY),
            &[],
        );
        probe.splice(0..0, [0; frame::HEADER_LEN]);
        let answered = answer(&solicitation(&probe), POD_MAC, &held(), GATEWAY_MAC).unwrap();
        smoltcps(&answered, |_, destination, message| {
            assert_eq!(destination, EthernetAddress([0x33, 0x33, 0, 0, 0, 1]));
            let NdiscRepr::NeighborAdvert { flags, .. } = message else {
                panic!("{message:?}");
            };
            assert_eq!(
                flags,
                NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE
            );
        });
        assert_eq!(advertisement(&answered).destination, ALL_NODES);
    }

    #[test]
    fn frames_are_what_an_independent_parser_reads() {
        let flags = Flags {
            router: false,
            solicited: true,
            override_: true,
        };
        let written = write_advertisement((POD_MAC, POD), POD, (GATEWAY_MAC, GATEWAY), flags);
        let headers = PacketHeaders::from_ethernet_slice(&written).unwrap();
        let Some(TransportHeader::Icmpv6(icmp)) = headers.transport else {
            panic!("{headers:?}");
        };
        let etherparse::Icmpv6Type::NeighborAdvertisement(told) = icmp.icmp_type else {
            panic!("{icmp:?}");
        };
        assert!(!told.router && told.solicited && told.r#override);
        let payload = headers.payload.slice();
        assert_eq!(payload[..16], POD.octets());
        assert_eq!(payload[16..], [2, 1, 0x0a, 0x58, 10, 244, 1, 2]);
        let sum = icmp
            .icmp_type
            .calc_checksum(POD.octets(), GATEWAY.octets(), payload);
        assert_eq!(sum, Ok(icmp.checksum));
    }

    proptest! {
        #[test]
        fn nothing_panics_and_what_is_read_is_there(
            kind in 130u8..140,
            source in any::<[u8; 16]>(),
            destination in any::<[u8; 16]>(),
            rest in proptest::collection::vec(any::<u8>(), 0..90),
            lens in proptest::collection::vec(0u8..3, 9),
        ) {
            let mut message = [&[kind, 0, 0, 0], &rest[..]].concat();
            for (at, len) in (25..).step_by(8).zip(lens) {
                if let Some(byte) = message.get_mut(at) {
                    *byte = len;
                }
            }
            let packet = packet(source.into(), destination.into(), &message);
            if let Ok(Some(Message::Solicitation(it))) = Message::parse(&packet) {
                prop_assert!(message.len() >= 24 && message.len() % 8 == 0);
                prop_assert_eq!(&it.target.octets()[..], &message[8..24]);
                prop_assert_eq!(it.source.octets(), source);
                let own = [Held { address: it.target, router: true, anycast: false }];
                let answered = answer(&it, POD_MAC, &own, GATEWAY_MAC).unwrap();
                let told = advertisement(&answered);
                prop_assert_eq!(told.target, it.target);
                prop_assert_eq!(told.flags.solicited, !it.source.is_unspecified());
            }
            for len in 0..packet.len() {
                let _ = Message::parse(&packet[..len]);
            }
        }
    }
}
