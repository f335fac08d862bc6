//! What a sender may claim: a pod its own MAC and IP addresses, a peer the addresses of its lease.
//!
//! CVE-2020-10749 and its relatives are why router advertisements from pods are never forwarded:
//! a rogue one takes over the traffic of every host that accepts it. DHCP servers can do the same.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use muslin_encap::ip::v6;
use smoltcp::wire::{
    ArpPacket, EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv6Packet,
};

use crate::datapath::gateway::Own;
use crate::datapath::multicast::{igmp, mld};
use crate::datapath::ndp::Message;
use crate::datapath::port::Attachment;
use crate::drops::DropReason;

/// Where DHCP clients hear servers (RFC 2131 section 4.1, RFC 8415 section 7.2). Nobody else has
/// anything to send there, from whatever port: clients look at no more than their own.
const DHCP_CLIENT: u16 = 68;
const DHCPV6_CLIENT: u16 = 546;

/// Which guards are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Policy {
    /// A datagram must come from a node that holds a lease, with inner sources of that lease.
    pub peers: bool,
}

/// All are on.
impl Default for Policy {
    fn default() -> Self {
        Self { peers: true }
    }
}

/// Checks the sender of a frame from a pod, where `macs` and `own` are the node's own addresses,
/// which no pod may use, guarded or not.
///
/// # Errors
/// The reason to drop it.
pub fn check_pod(
    frame: &EthernetFrame<&[u8]>,
    attachment: &Attachment,
    macs: &[EthernetAddress],
    own: &Own,
) -> Result<(), DropReason> {
    let source = frame.src_addr();
    if !source.is_unicast() {
        return Err(DropReason::SourceMacGroup);
    }
    if macs.contains(&source) {
        return Err(DropReason::SourceMacOwn);
    }
    if attachment.guarded && source != attachment.mac {
        return Err(DropReason::SourceMacSpoofed);
    }
    match frame.ethertype() {
        EthernetProtocol::Arp => check_arp(frame.payload(), attachment, own),
        EthernetProtocol::Ipv4 => check_ipv4(frame.payload(), attachment, own),
        EthernetProtocol::Ipv6 => check_ipv6(frame.payload(), attachment, own),
        // VLAN tags and SNAP headers would hide a forged packet that the receiver takes out of
        // them (CVE-2021-27853 and three more).
        EthernetProtocol::Unknown(_) if attachment.guarded => Err(DropReason::EtherTypeUnsupported),
        EthernetProtocol::Unknown(_) => Ok(()),
    }
}

/// Whether an IPv4 source address cannot be that of one host.
#[must_use]
pub fn is_martian(source: Ipv4Addr) -> bool {
    source.is_multicast()
        || source.is_broadcast()
        || source.is_loopback()
        || source.octets()[0] == 0
        || source.octets()[0] >= 240
}

/// Whether an IPv6 source address cannot be that of one host: a group's, the loopback address, or an
/// IPv4 address in disguise (RFC 4291 sections 2.5.5 and 2.7). The unspecified address is none of
/// these: hosts ask from it whether an address is free.
#[must_use]
pub const fn is_martian_v6(source: Ipv6Addr) -> bool {
    let is_ipv4 = match source.segments() {
        [0, 0, 0, 0, 0, 0, high, low] => high != 0 || low != 0,
        [0, 0, 0, 0, 0, 0xffff, ..] => true,
        _ => false,
    };
    source.is_multicast() || is_ipv4
}

fn owns(attachment: &Attachment, address: impl Into<IpAddr>) -> bool {
    !attachment.guarded || attachment.addresses.contains(&address.into())
}

fn check_arp(payload: &[u8], attachment: &Attachment, own: &Own) -> Result<(), DropReason> {
    let Ok(arp) = ArpPacket::new_checked(payload) else {
        return Ok(());
    };
    if arp.hardware_len() != 6 || arp.protocol_len() != 4 {
        return Ok(());
    }
    if attachment.guarded && arp.source_hardware_addr() != attachment.mac.as_bytes() {
        return Err(DropReason::SourceMacSpoofed);
    }
    let [a, b, c, d] = *arp.source_protocol_addr() else {
        return Ok(());
    };
    let source = Ipv4Addr::new(a, b, c, d);
    // A probe for a duplicate address comes from 0.0.0.0 (RFC 5227 section 2.1.1).
    let may = owns(attachment, source) && !own.contains(source);
    if source.is_unspecified() || may {
        Ok(())
    } else {
        Err(DropReason::SourceAddressSpoofed)
    }
}

fn check_ipv4(payload: &[u8], attachment: &Attachment, own: &Own) -> Result<(), DropReason> {
    // Malformed packets are the router's to refuse, but the switch would pass them on: so the
    // source counts whatever the rest of the header says.
    let Some(&[a, b, c, d]) = payload.get(12..16) else {
        return Ok(());
    };
    let source = Ipv4Addr::new(a, b, c, d);
    if is_martian(source) {
        Err(DropReason::SourceAddressInvalid)
    } else if !owns(attachment, source) || own.contains(source) {
        Err(DropReason::SourceAddressSpoofed)
    } else {
        check_ipv4_upper(payload)
    }
}

/// Checks what an IPv4 packet that need not be whole carries.
fn check_ipv4_upper(packet: &[u8]) -> Result<(), DropReason> {
    let Some(protocol) = packet.get(9) else {
        return Ok(());
    };
    match IpProtocol::from(*protocol) {
        IpProtocol::Udp if ipv4_upper(packet).is_some_and(|udp| is_to(udp, DHCP_CLIENT)) => {
            Err(DropReason::DhcpServer)
        }
        IpProtocol::Igmp if ipv4_upper(packet).is_some_and(igmp::is_query) => {
            Err(DropReason::ForeignQuerier)
        }
        _ => Ok(()),
    }
}

/// What an IPv4 packet that need not be whole has of the beginning of what it carries.
fn ipv4_upper(packet: &[u8]) -> Option<&[u8]> {
    let header_len = usize::from(packet.first()? & 0x0f) * 4;
    let &[high, low] = packet.get(6..8)? else {
        return None;
    };
    let is_first = u16::from_be_bytes([high, low]) & 0x1fff == 0;
    packet.get(header_len..).filter(|_| is_first)
}

/// Whether a UDP datagram is to this port.
fn is_to(udp: &[u8], port: u16) -> bool {
    udp.get(2..4) == Some(&port.to_be_bytes())
}

fn check_ipv6(payload: &[u8], attachment: &Attachment, own: &Own) -> Result<(), DropReason> {
    let packet = &payload[..v6::check(payload)?];
    let source = Ipv6Packet::new_unchecked(packet).src_addr();
    if is_martian_v6(source) {
        return Err(DropReason::SourceAddressInvalid);
    }
    if own.contains(source) || !may_claim(attachment, source) {
        return Err(DropReason::SourceAddressSpoofed);
    }
    let upper = v6::upper_layer(packet)?;
    let (kind, message) = match IpProtocol::from(upper.protocol) {
        // Fragments but the first have nothing to read, and are nothing without the first.
        _ if upper.is_later_fragment() => return check_specified(source),
        kind => (kind, &packet[upper.offset..]),
    };
    match (kind, message) {
        (IpProtocol::Icmpv6, [mld::QUERY..=mld::DONE | mld::REPORT_V2, ..]) => {
            check_mld(packet, source, message[0])
        }
        (IpProtocol::Icmpv6, _) => match Message::parse(packet)? {
            Some(message) => check_ndp(&message, attachment, own),
            None => check_specified(source),
        },
        (IpProtocol::Udp, datagram) if is_to(datagram, DHCPV6_CLIENT) => {
            Err(DropReason::DhcpServer)
        }
        _ => check_specified(source),
    }
}

/// Whether a pod may say of an IPv6 address that it is its own. Which link-local address is whose
/// [`link_locals`] helps to tell, and who has none yet is nobody.
fn may_claim(attachment: &Attachment, address: Ipv6Addr) -> bool {
    address.is_unspecified() || address.is_unicast_link_local() || owns(attachment, address)
}

/// Only questions about addresses come from nobody.
fn check_specified(source: Ipv6Addr) -> Result<(), DropReason> {
    if source.is_unspecified() {
        Err(DropReason::SourceAddressInvalid)
    } else {
        Ok(())
    }
}

/// Reports come from nobody before a host has an address (RFC 3590 section 4), and all of these from
/// the link (RFC 3810 section 5.1.14).
fn check_mld(packet: &[u8], source: Ipv6Addr, kind: u8) -> Result<(), DropReason> {
    if kind == mld::QUERY {
        return Err(DropReason::ForeignQuerier);
    }
    let is_local = source.is_unicast_link_local()
        || source.is_unspecified() && matches!(kind, mld::REPORT | mld::REPORT_V2);
    if is_local && Ipv6Packet::new_unchecked(packet).hop_limit() == 1 {
        Ok(())
    } else {
        Err(DropReason::MldInvalid)
    }
}

/// Checks what a message of neighbour discovery claims beside its source: what the receivers believe
/// is its target, and the MAC address in its option.
fn check_ndp(message: &Message, attachment: &Attachment, own: &Own) -> Result<(), DropReason> {
    let (claimed, mac) = match message {
        // The gateway answers who asks whether one of its own addresses is free.
        Message::Solicitation(it) if it.source.is_unspecified() && own.contains(it.target) => {
            return Ok(());
        }
        Message::Solicitation(it) if it.source.is_unspecified() => (Some(it.target), it.mac),
        Message::Solicitation(it) => (None, it.mac),
        Message::Advertisement(it) if it.source.is_unspecified() => {
            return Err(DropReason::SourceAddressInvalid);
        }
        Message::Advertisement(it) => (Some(it.target), it.mac),
        Message::RouterSolicitation { mac, .. } => (None, *mac),
    };
    if attachment.guarded && mac.is_some_and(|mac| mac != attachment.mac) {
        return Err(DropReason::SourceMacSpoofed);
    }
    // Nobody has it, and nothing is to be learned of it.
    if claimed.is_some_and(|address| address.is_unspecified()) {
        return Err(DropReason::SourceAddressInvalid);
    }
    let is_free = |address| !own.contains(address) && may_claim(attachment, address);
    if claimed.is_none_or(is_free) {
        Ok(())
    } else {
        Err(DropReason::SourceAddressSpoofed)
    }
}

/// The IPv6 link-local addresses that a frame says are its sender's: its source, and what a
/// neighbour advertisement or a question for duplicates (RFC 4862 section 5.4.2) is about; but none of
/// the node's own.
#[must_use]
pub fn link_locals(frame: &EthernetFrame<&[u8]>, own: &Own) -> [Option<Ipv6Addr>; 2] {
    let packet = frame.payload();
    if frame.ethertype() != EthernetProtocol::Ipv6 || v6::check(packet).is_err() {
        return [None; 2];
    }
    let source = Ipv6Packet::new_unchecked(packet).src_addr();
    let claimed = match Message::parse(packet) {
        Ok(Some(Message::Advertisement(it))) => Some(it.target),
        Ok(Some(Message::Solicitation(it))) if it.source.is_unspecified() => Some(it.target),
        _ => None,
    };
    let is_one = |it: &Ipv6Addr| it.is_unicast_link_local() && !own.contains(*it);
    [Some(source), claimed].map(|address| address.filter(is_one))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::Nets;
    use crate::datapath::gateway;
    use crate::datapath::ndp;

    const MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    const OTHER_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 2]);
    const SPOOFED: Result<(), DropReason> = Err(DropReason::SourceAddressSpoofed);
    const INVALID: Result<(), DropReason> = Err(DropReason::SourceAddressInvalid);

    fn check_from(
        ethertype: EthernetProtocol,
        payload: &[u8],
        guarded: bool,
    ) -> Result<(), DropReason> {
        let addresses = ["10.244.1.2", "fd00:0:0:1::2"];
        let addresses = addresses.map(|it| it.parse().unwrap()).to_vec();
        let pod = Attachment::new(MAC, addresses);
        let pod = if guarded { pod } else { pod.unguarded() };
        let kind = u16::from(ethertype).to_be_bytes();
        let frame = [&[0xff; 6], MAC.as_bytes(), &kind, payload].concat();
        let frame = EthernetFrame::new_checked(&frame[..]).unwrap();
        check_pod(&frame, &pod, &[], &own())
    }

    fn check(ethertype: EthernetProtocol, payload: &[u8]) -> Result<(), DropReason> {
        check_from(ethertype, payload, true)
    }

    fn own() -> Own {
        let subnets: Nets = "10.244.1.0/24,fd00:0:0:1::/64".parse().unwrap();
        gateway::addresses(subnets)
    }

    /// What becomes of an IPv6 packet from a guarded pod, and of the same from another.
    fn both(packet: &[u8]) -> [Result<(), DropReason>; 2] {
        [true, false].map(|guarded| check_from(EthernetProtocol::Ipv6, packet, guarded))
    }

    fn address(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    fn ipv6(source: &str, next: IpProtocol, payload: &[u8]) -> Vec<u8> {
        let header = v6::Header {
            traffic_class: 0,
            flow_label: 0,
            payload_len: payload.len() as u16,
            next_header: next,
            hop_limit: 255,
            source: address(source),
            destination: address("ff02::1"),
        };
        [&header.to_bytes()[..], payload].concat()
    }

    /// An ICMPv6 message with a right checksum behind these headers.
    fn icmp(source: &str, hop_limit: u8, message: &[u8]) -> Vec<u8> {
        let mut packet = ipv6(source, IpProtocol::Icmpv6, message);
        packet[7] = hop_limit;
        v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN);
        packet
    }

    /// A message of neighbour discovery of this kind, with an option.
    fn message(
        kind: u8,
        source: &str,
        target: &str,
        option: Option<(u8, EthernetAddress)>,
    ) -> Vec<u8> {
        let mut bytes = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        if kind != ndp::ROUTER_SOLICITATION {
            bytes.extend(address(target).octets());
        }
        if let Some((kind, mac)) = option {
            bytes.extend([kind, 1]);
            bytes.extend(mac.as_bytes());
        }
        let mut packet = icmp(source, 255, &bytes);
        if kind == ndp::NEIGHBOUR_SOLICITATION {
            packet[24..40].copy_from_slice(&ndp::solicited_node(address(target)).octets());
            v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN);
        }
        packet
    }

    /// v6LC.1.1.10 and RFC 4291: what no host sends from, and what only its holder does.
    #[test]
    fn a_pod_sends_from_its_own_ipv6_addresses() {
        for (source, expected) in [
            ("fd00:0:0:1::2", [Ok(()); 2]),
            ("fe80::2", [Ok(()); 2]),
            ("fd00:0:0:1::3", [SPOOFED, Ok(())]),
            ("2001:db8::1", [SPOOFED, Ok(())]),
            // The gateway's, the subnet's base, and that of all gateways.
            ("fd00:0:0:1::1", [SPOOFED; 2]),
            ("fd00:0:0:1::", [SPOOFED; 2]),
            ("fe80::1", [SPOOFED; 2]),
            ("::", [INVALID; 2]),
            ("::1", [INVALID; 2]),
            ("ff02::1", [INVALID; 2]),
            ("ff0e::1:2", [INVALID; 2]),
            ("::ffff:10.244.1.2", [INVALID; 2]),
            ("::10.244.1.2", [INVALID; 2]),
            ("::0.0.0.2", [INVALID; 2]),
            ("::1:0:0:0", [SPOOFED, Ok(())]),
            ("::1:ffff:10.244.1.2", [SPOOFED, Ok(())]),
        ] {
            let packet = ipv6(source, IpProtocol::Udp, &[0; 8]);
            assert_eq!(both(&packet), expected, "{source}");
            let later = ipv6(source, IpProtocol::Ipv6Frag, &[17, 0, 0, 8, 0, 0, 0, 1, 9]);
            assert_eq!(both(&later), expected, "a later fragment from {source}");
        }
    }

    #[test]
    fn neighbour_discovery_says_what_is_the_pods_own() {
        use ndp::{
            NEIGHBOUR_ADVERTISEMENT as ADVERTISEMENT, NEIGHBOUR_SOLICITATION as SOLICITATION,
        };
        let (slla, tlla) = (Some((1, MAC)), Some((2, MAC)));
        let (foreign_slla, foreign_tlla) = (Some((1, OTHER_MAC)), Some((2, OTHER_MAC)));
        let mac_spoofed = Err(DropReason::SourceMacSpoofed);
        let invalid = Err(DropReason::NdpInvalid);
        let pod = "fd00:0:0:1::2";
        for (kind, source, target, option, expected) in [
            // It asks for whom it likes.
            (SOLICITATION, pod, "fd00:0:0:1::3", slla, [Ok(()); 2]),
            (SOLICITATION, pod, "fd00:0:0:1::1", slla, [Ok(()); 2]),
            (SOLICITATION, "fe80::2", "fe80::1", None, [Ok(()); 2]),
            (
                SOLICITATION,
                pod,
                "fd00:0:0:1::3",
                foreign_slla,
                [mac_spoofed, Ok(())],
            ),
            // Whether its address is free; whether the gateway's are, it hears from the gateway.
            (SOLICITATION, "::", pod, None, [Ok(()); 2]),
            (SOLICITATION, "::", "fe80::2", None, [Ok(()); 2]),
            (SOLICITATION, "::", "fd00:0:0:1::1", None, [Ok(()); 2]),
            (SOLICITATION, "::", "fd00:0:0:1::", None, [Ok(()); 2]),
            (SOLICITATION, "::", "fe80::1", None, [Ok(()); 2]),
            (SOLICITATION, "::", "fd00:0:0:1::3", None, [SPOOFED, Ok(())]),
            (SOLICITATION, "::", pod, slla, [invalid; 2]),
            (ADVERTISEMENT, pod, pod, tlla, [Ok(()); 2]),
            (ADVERTISEMENT, "fe80::2", "fe80::2", None, [Ok(()); 2]),
            (ADVERTISEMENT, pod, pod, foreign_tlla, [mac_spoofed, Ok(())]),
            (ADVERTISEMENT, pod, "fd00:0:0:1::3", tlla, [SPOOFED, Ok(())]),
            (ADVERTISEMENT, pod, "fd00:0:0:1::1", tlla, [SPOOFED; 2]),
            (ADVERTISEMENT, pod, "fd00:0:0:1::", tlla, [SPOOFED; 2]),
            (ADVERTISEMENT, pod, "fe80::1", tlla, [SPOOFED; 2]),
            (ADVERTISEMENT, "::", pod, tlla, [INVALID; 2]),
            (ADVERTISEMENT, pod, "::", tlla, [INVALID; 2]),
            (SOLICITATION, "::", "::", None, [INVALID; 2]),
            (ADVERTISEMENT, "fe80::1", pod, tlla, [SPOOFED; 2]),
            (ndp::ROUTER_SOLICITATION, "::", "::", None, [Ok(()); 2]),
            (ndp::ROUTER_SOLICITATION, "fe80::2", "::", slla, [Ok(()); 2]),
            (
                ndp::ROUTER_SOLICITATION,
                "fe80::2",
                "::",
                foreign_slla,
                [mac_spoofed, Ok(())],
            ),
        ] {
            let packet = message(kind, source, target, option);
            assert_eq!(
                both(&packet),
                expected,
                "{kind} {source} {target} {option:?}"
            );
        }
    }

    /// RFC 6105 and 7113: behind whatever is in front of it.
    #[test]
    fn nobody_is_a_router_here() {
        let never = [Err(DropReason::RouterAdvertisement); 2];
        for kind in [ndp::ROUTER_ADVERTISEMENT, ndp::REDIRECT] {
            let bytes = [&[kind][..], &[0; 39]].concat();
            for headers in [
                &[][..],
                &[(IpProtocol::HopByHop, 0)],
                &[(IpProtocol::Ipv6Opts, 0), (IpProtocol::Ipv6Opts, 0)],
                &[(IpProtocol::Ipv6Frag, 0)],
                &[(IpProtocol::Ipv6Frag, 1)],
                &[(IpProtocol::Ipv6Frag, 1), (IpProtocol::Ipv6Opts, 0)],
            ] {
                let mut payload = bytes.clone();
                let mut next = IpProtocol::Icmpv6;
                for (kind, more) in headers.iter().rev() {
                    let header = [u8::from(next), 0, 0, *more, 0, 0, 0, 0];
                    payload.splice(0..0, header);
                    next = *kind;
                }
                assert_eq!(both(&ipv6("fe80::2", next, &payload)), never, "{headers:?}");
            }
        }
    }

    /// RFC 6980.
    #[test]
    fn neighbour_discovery_is_not_in_fragments() {
        let whole = message(ndp::NEIGHBOUR_ADVERTISEMENT, "fe80::2", "fe80::2", None);
        assert_eq!(both(&whole), [Ok(()); 2]);
        for more in [0, 1] {
            let header = [58, 0, 0, more, 0, 0, 0, 0];
            let payload = [&header, &whole[40..]].concat();
            let packet = ipv6("fe80::2", IpProtocol::Ipv6Frag, &payload);
            assert_eq!(both(&packet), [Err(DropReason::NdpInvalid); 2]);
        }
    }

    #[test]
    fn what_cannot_be_looked_into_does_not_pass() {
        let pod = "fd00:0:0:1::2";
        let hidden = [Err(DropReason::Ipv6ExtensionHeaders); 2];
        let options = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
        let many = |count: usize| {
            let headers = vec![options(60); count - 1].concat();
            [&headers[..], &options(17), &[0; 8]].concat()
        };
        for (next, payload, expected) in [
            (IpProtocol::Ipv6Opts, many(8), [Ok(()); 2]),
            (IpProtocol::Ipv6Opts, many(9), hidden),
            (IpProtocol::Ipv6Opts, options(60).to_vec(), hidden),
            (IpProtocol::Ipv6Opts, vec![58], hidden),
            (IpProtocol::Ipv6Route, vec![17, 0, 0, 0, 0, 0, 0, 0], hidden),
            (
                IpProtocol::Ipv6Opts,
                [options(0), options(58)].concat(),
                hidden,
            ),
            (IpProtocol::from(139), vec![0; 40], hidden),
            (IpProtocol::IpSecEsp, vec![0; 40], [Ok(()); 2]),
            (IpProtocol::Ipv6NoNxt, vec![], [Ok(()); 2]),
        ] {
            let packet = ipv6(pod, next, &payload);
            assert_eq!(both(&packet), expected, "{next} {payload:?}");
        }
        let good = ipv6(pod, IpProtocol::Udp, &[0; 8]);
        let mut old = good.clone();
        old[0] = 0x45;
        for (packet, reason) in [
            (&good[..47], DropReason::Ipv6PayloadLen),
            (&good[..39], DropReason::Ipv6TooShort),
            (&old[..], DropReason::Ipv6Version),
            (&[], DropReason::Ipv6TooShort),
        ] {
            assert_eq!(both(packet), [Err(reason); 2]);
        }
    }

    #[test]
    fn listeners_report_from_their_link() {
        let invalid = Err(DropReason::MldInvalid);
        for (kind, source, hop_limit, expected) in [
            (mld::REPORT_V2, "fe80::2", 1, Ok(())),
            (mld::REPORT_V2, "::", 1, Ok(())),
            (mld::REPORT, "::", 1, Ok(())),
            (mld::DONE, "fe80::2", 1, Ok(())),
            (mld::QUERY, "fe80::2", 1, Err(DropReason::ForeignQuerier)),
            (mld::QUERY, "::", 1, Err(DropReason::ForeignQuerier)),
            (mld::DONE, "::", 1, invalid),
            (mld::REPORT_V2, "fd00:0:0:1::2", 1, invalid),
            (mld::REPORT_V2, "fe80::2", 255, invalid),
            (mld::REPORT_V2, "fe80::2", 2, invalid),
        ] {
            let message = [&[kind][..], &[0; 23]].concat();
            // Router Alert is in front of them (RFC 2710 section 3).
            let alert = [&[58, 0, 5, 2, 0, 0, 1, 0], &message[..]].concat();
            let mut behind = ipv6(source, IpProtocol::HopByHop, &alert);
            behind[7] = hop_limit;
            for packet in [icmp(source, hop_limit, &message), behind] {
                assert_eq!(both(&packet), [expected; 2], "{kind} {source} {hop_limit}");
            }
        }
    }

    #[test]
    fn link_local_addresses_are_the_senders_unless_they_are_the_nodes() {
        use ndp::{
            NEIGHBOUR_ADVERTISEMENT as ADVERTISEMENT, NEIGHBOUR_SOLICITATION as SOLICITATION,
        };
        let claimed = |packet: &[u8]| {
            let frame = [&[0xff; 6], MAC.as_bytes(), &[0x86, 0xdd], packet].concat();
            let frame = EthernetFrame::new_checked(&frame[..]).unwrap();
            link_locals(&frame, &own())
        };
        let two = Some(address("fe80::2"));
        for (packet, expected) in [
            (ipv6("fe80::2", IpProtocol::Udp, &[0; 8]), [two, None]),
            (
                ipv6("fd00:0:0:1::2", IpProtocol::Udp, &[0; 8]),
                [None, None],
            ),
            (message(SOLICITATION, "::", "fe80::2", None), [None, two]),
            (message(SOLICITATION, "::", "fe80::1", None), [None, None]),
            (
                message(SOLICITATION, "fe80::2", "fe80::3", None),
                [two, None],
            ),
            (
                message(ADVERTISEMENT, "fe80::2", "fe80::2", None),
                [two, two],
            ),
            (vec![0x60; 30], [None, None]),
        ] {
            assert_eq!(claimed(&packet), expected, "{packet:x?}");
        }
    }

    #[test]
    fn nobody_sends_to_dhcp_clients() {
        let server = Err(DropReason::DhcpServer);
        let udp = |source: u16, destination: u16| {
            let ports = [source.to_be_bytes(), destination.to_be_bytes()];
            [&ports.concat()[..], &[0, 8, 0, 0]].concat()
        };
        let ipv4 = |protocol: u8, options: usize, fragment: u16, payload: &[u8]| {
            let mut packet = vec![0; 20 + options];
            packet[0] = 0x45 + (options / 4) as u8;
            packet[6..8].copy_from_slice(&fragment.to_be_bytes());
            packet[9] = protocol;
            packet[12..16].copy_from_slice(&[10, 244, 1, 2]);
            [&packet[..], payload].concat()
        };
        for (packet, expected) in [
            (ipv4(17, 0, 0, &udp(67, 68)), server),
            (ipv4(17, 8, 0, &udp(67, 68)), server),
            (ipv4(17, 0, 0x2000, &udp(67, 68)), server),
            (ipv4(17, 0, 0, &udp(5353, 68)), server),
            (ipv4(17, 0, 0, &udp(68, 67)), Ok(())),
            (ipv4(17, 0, 0, &udp(5353, 5353)), Ok(())),
            // The middle of a datagram, another protocol, and too little to be anything.
            (ipv4(17, 0, 0x2001, &udp(67, 68)), Ok(())),
            (ipv4(6, 0, 0, &udp(67, 68)), Ok(())),
            (ipv4(17, 0, 0, &udp(67, 68)[..3]), Ok(())),
        ] {
            assert_eq!(
                check(EthernetProtocol::Ipv4, &packet),
                expected,
                "{packet:?}"
            );
        }
        let behind_options = [&[17, 0, 0, 0, 0, 0, 0, 0][..], &udp(547, 546)].concat();
        for (next, payload, expected) in [
            (IpProtocol::Udp, udp(547, 546), server),
            (IpProtocol::Udp, udp(546, 547), Ok(())),
            (IpProtocol::Ipv6Opts, behind_options, server),
        ] {
            let packet = ipv6("fe80::2", next, &payload);
            assert_eq!(
                check(EthernetProtocol::Ipv6, &packet),
                expected,
                "{packet:?}"
            );
        }
    }

    #[test]
    fn a_fragment_that_ends_in_its_header_is_refused() {
        for len in 0..=8 {
            let packet = ipv6(
                "fd00:0:0:1::2",
                IpProtocol::Ipv6Frag,
                &[59, 0, 0, 0, 0, 0, 0, 0][..len],
            );
            let checked = check(EthernetProtocol::Ipv6, &packet);
            // A first and only fragment of eight bytes is all headers.
            let expected = match len {
                0..8 => Err(DropReason::Ipv6ExtensionHeaders),
                _ => Ok(()),
            };
            assert_eq!(checked, expected, "{len}");
        }
    }

    #[test]
    fn arp_of_other_kinds_of_addresses_says_nothing_about_ours() {
        // Hardware and protocol addresses of four bytes, and of six.
        for len in [4, 6] {
            let mut arp = vec![0, 1, 8, 0, len, len, 0, 1];
            arp.extend(vec![7; 4 * usize::from(len)]);
            assert_eq!(check(EthernetProtocol::Arp, &arp), Ok(()), "{len}");
        }
    }
}
