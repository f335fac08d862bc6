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
/// the MAC address `from`; `None` if the target is none of them. Who asks whether the address is free
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
        (solicitation.mac.unwrap_or(from), solicitation.source)
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
