//! What a sender may claim: a pod its own MAC and IP addresses, a peer the addresses of its lease.
//!
//! CVE-2020-10749 and its relatives are why router advertisements from pods are never forwarded:
//! a rogue one takes over the traffic of every host that accepts it. DHCP servers can do the same.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::{
    ArpPacket, EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv6Packet,
};

use crate::datapath::port::Attachment;
use crate::drops::DropReason;

/// ICMPv6 message types (RFC 4861 section 4).
const ROUTER_ADVERTISEMENT: u8 = 134;
pub(crate) const NEIGHBOUR_SOLICITATION: u8 = 135;
pub(crate) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

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

/// Checks the sender of a frame from a pod, where `macs` and `addresses` are the node's own, which
/// no pod may use, guarded or not.
///
/// # Errors
/// The reason to drop it.
pub fn check_pod(
    frame: &EthernetFrame<&[u8]>,
    attachment: &Attachment,
    macs: &[EthernetAddress],
    addresses: &[Ipv4Addr],
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
        EthernetProtocol::Arp => check_arp(frame.payload(), attachment, addresses),
        EthernetProtocol::Ipv4 => check_ipv4(frame.payload(), attachment, addresses),
        EthernetProtocol::Ipv6 => check_ipv6(frame.payload(), attachment),
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

fn owns(attachment: &Attachment, address: impl Into<IpAddr>) -> bool {
    !attachment.guarded || attachment.addresses.contains(&address.into())
}

fn check_arp(payload: &[u8], attachment: &Attachment, own: &[Ipv4Addr]) -> Result<(), DropReason> {
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
    let may = owns(attachment, source) && !own.contains(&source);
    if source.is_unspecified() || may {
        Ok(())
    } else {
        Err(DropReason::SourceAddressSpoofed)
    }
}

fn check_ipv4(payload: &[u8], attachment: &Attachment, own: &[Ipv4Addr]) -> Result<(), DropReason> {
    // Malformed packets are the router's to refuse, but the switch would pass them on: so the
    // source counts whatever the rest of the header says.
    let Some(&[a, b, c, d]) = payload.get(12..16) else {
        return Ok(());
    };
    let source = Ipv4Addr::new(a, b, c, d);
    if is_martian(source) {
        Err(DropReason::SourceAddressInvalid)
    } else if !owns(attachment, source) || own.contains(&source) {
        Err(DropReason::SourceAddressSpoofed)
    } else if ipv4_udp(payload).is_some_and(|udp| is_to(udp, DHCP_CLIENT)) {
        Err(DropReason::DhcpServer)
    } else {
        Ok(())
    }
}

/// What an IPv4 packet that need not be whole has of a UDP datagram's beginning.
fn ipv4_udp(packet: &[u8]) -> Option<&[u8]> {
    let header_len = usize::from(packet.first()? & 0x0f) * 4;
    let &[high, low] = packet.get(6..8)? else {
        return None;
    };
    let is_first = u16::from_be_bytes([high, low]) & 0x1fff == 0;
    let is_udp = IpProtocol::from(*packet.get(9)?) == IpProtocol::Udp;
    packet.get(header_len..).filter(|_| is_first && is_udp)
}

/// Whether a UDP datagram is to this port.
fn is_to(udp: &[u8], port: u16) -> bool {
    udp.get(2..4) == Some(&port.to_be_bytes())
}

fn check_ipv6(payload: &[u8], attachment: &Attachment) -> Result<(), DropReason> {
    let Ok(packet) = Ipv6Packet::new_checked(payload) else {
        return Ok(());
    };
    let source = packet.src_addr();
    match upper_layer(packet.next_header(), packet.payload())? {
        Some((IpProtocol::Icmpv6, [ROUTER_ADVERTISEMENT | REDIRECT, ..])) => {
            return Err(DropReason::RouterAdvertisement);
        }
        Some((IpProtocol::Icmpv6, message @ [NEIGHBOUR_ADVERTISEMENT, ..])) => {
            // Its target is what the receiver believes, not its source.
            let target = target(message);
            if target.is_some_and(|it| !it.is_unicast_link_local() && !owns(attachment, it)) {
                return Err(DropReason::SourceAddressSpoofed);
            }
        }
        Some((IpProtocol::Udp, datagram)) if is_to(datagram, DHCPV6_CLIENT) => {
            return Err(DropReason::DhcpServer);
        }
        _ => {}
    }
    if source.is_multicast() || source.is_loopback() {
        Err(DropReason::SourceAddressInvalid)
    } else if source.is_unspecified() || source.is_unicast_link_local() || owns(attachment, source)
    {
        Ok(())
    } else {
        Err(DropReason::SourceAddressSpoofed)
    }
}

/// The address that a neighbour solicitation or advertisement is about.
fn target(message: &[u8]) -> Option<Ipv6Addr> {
    let bytes = <[u8; 16]>::try_from(message.get(8..24)?).ok()?;
    Some(bytes.into())
}

/// The IPv6 link-local addresses that a frame says are its sender's: its source, and what a
/// neighbour advertisement or a question for duplicates (RFC 4862 section 5.4.2) is about.
#[must_use]
pub fn link_locals(frame: &EthernetFrame<&[u8]>) -> [Option<Ipv6Addr>; 2] {
    let packet = match frame.ethertype() {
        EthernetProtocol::Ipv6 => Ipv6Packet::new_checked(frame.payload()).ok(),
        EthernetProtocol::Arp | EthernetProtocol::Ipv4 | EthernetProtocol::Unknown(_) => None,
    };
    let Some(packet) = packet else {
        return [None; 2];
    };
    let source = packet.src_addr();
    let claimed = match upper_layer(packet.next_header(), packet.payload()) {
        Ok(Some((IpProtocol::Icmpv6, message @ [NEIGHBOUR_ADVERTISEMENT, ..]))) => target(message),
        Ok(Some((IpProtocol::Icmpv6, message @ [NEIGHBOUR_SOLICITATION, ..])))
            if source.is_unspecified() =>
        {
            target(message)
        }
        _ => None,
    };
    [Some(source), claimed].map(|address| address.filter(Ipv6Addr::is_unicast_link_local))
}

/// The UDP datagram or ICMPv6 message in the payload of an IPv6 packet, behind any extension
/// headers; `None` if there is none. A packet that ends, or is cut into fragments, before that is
/// known is refused (RFC 7113 section 3): a router advertisement may be in it.
fn upper_layer(
    first: IpProtocol,
    payload: &[u8],
) -> Result<Option<(IpProtocol, &[u8])>, DropReason> {
    let (mut kind, mut rest) = (first, payload);
    loop {
        let (next, len) = match (kind, rest) {
            (IpProtocol::Icmpv6 | IpProtocol::Udp, rest) => return Ok(Some((kind, rest))),
            (IpProtocol::HopByHop | IpProtocol::Ipv6Route | IpProtocol::Ipv6Opts, header) => {
                let [next, len, ..] = header else {
                    return Err(DropReason::RouterAdvertisement);
                };
                (*next, (usize::from(*len) + 1) * 8)
            }
            (IpProtocol::Ipv6Frag, [next, _, high, low, ..]) => {
                // Pieces but the first have nothing to read, and are nothing without the first.
                if u16::from_be_bytes([*high, *low]) & 0xfff8 != 0 {
                    return Ok(None);
                }
                (*next, 8)
            }
            (IpProtocol::Ipv6Frag, _) => return Err(DropReason::RouterAdvertisement),
            (IpProtocol::IpSecAh, [next, len, ..]) => (*next, (usize::from(*len) + 2) * 4),
            _ => return Ok(None),
        };
        kind = IpProtocol::from(next);
        rest = rest.get(len..).ok_or(DropReason::RouterAdvertisement)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::port::Rates;

    const MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    fn check(ethertype: EthernetProtocol, payload: &[u8]) -> Result<(), DropReason> {
        let pod = Attachment {
            mac: MAC,
            addresses: vec![
                Ipv4Addr::new(10, 244, 1, 2).into(),
                "fd00::2".parse().unwrap(),
            ],
            guarded: true,
            rates: Rates::default(),
        };
        let kind = u16::from(ethertype).to_be_bytes();
        let frame = [&[0xff; 6], MAC.as_bytes(), &kind, payload].concat();
        let frame = EthernetFrame::new_checked(&frame[..]).unwrap();
        check_pod(&frame, &pod, &[], &[])
    }

    fn ipv6(source: &str, next: IpProtocol, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
        packet[6] = next.into();
        packet[8..24].copy_from_slice(&source.parse::<Ipv6Addr>().unwrap().octets());
        packet[24..40].copy_from_slice(&Ipv6Addr::LOCALHOST.octets());
        [&packet, payload].concat()
    }

    #[test]
    fn a_pod_without_an_address_yet_asks_and_is_heard() {
        for (source, expected) in [
            ("::", Ok(())),
            ("fe80::2", Ok(())),
            ("fd00::2", Ok(())),
            ("fd00::3", Err(DropReason::SourceAddressSpoofed)),
            ("::1", Err(DropReason::SourceAddressInvalid)),
            ("ff02::1", Err(DropReason::SourceAddressInvalid)),
        ] {
            let packet = ipv6(source, IpProtocol::Udp, &[0; 8]);
            assert_eq!(check(EthernetProtocol::Ipv6, &packet), expected, "{source}");
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
        for len in 0..8 {
            let packet = ipv6("fd00::2", IpProtocol::Ipv6Frag, &[0; 8][..len]);
            let checked = check(EthernetProtocol::Ipv6, &packet);
            assert_eq!(checked, Err(DropReason::RouterAdvertisement), "{len}");
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
