//! Ethernet headers on packets in buffers: read, taken off and put on in place.

use muslin_encap::buffer::{NoRoom, PacketBuf};
use muslin_encap::ip::transport::Transport;
use muslin_encap::ip::v4;
use muslin_encap::offload::virtio::Checksum;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    IPV6_HEADER_LEN, IpProtocol, Ipv6Packet,
};

use crate::datapath::ndp;
use crate::drops::DropReason;

/// Length of an Ethernet header in bytes.
pub const HEADER_LEN: usize = smoltcp::wire::ETHERNET_HEADER_LEN;

/// Bytes of the longest frame: an IP packet behind an Ethernet header.
pub const MAX_LEN: usize = v4::MAX_LEN + HEADER_LEN;

/// Length of an ARP frame in bytes, without padding.
pub const ARP_LEN: usize = HEADER_LEN + 28;

/// Views bytes as an Ethernet frame.
///
/// # Errors
/// `FrameTooShort` for less than a header.
#[inline]
pub fn parse(frame: &[u8]) -> Result<EthernetFrame<&[u8]>, DropReason> {
    EthernetFrame::new_checked(frame).map_err(|_| DropReason::FrameTooShort)
}

/// Holds what is still to be done to a frame against the frame. Finishing a checksum writes to it
/// after the guard has looked at it, perhaps on another machine: where the checksum is not where TCP
/// and UDP have it, it is finished now.
///
/// # Errors
/// `VirtioHeader` if it contradicts the frame, or a checksum begins in front of what IP carries.
pub(crate) fn check_offload(packet: &mut PacketBuf<'_>) -> Result<(), DropReason> {
    check_offload_at(packet, HEADER_LEN, network_end)
}

/// The same for a packet that begins with its IPv4 header.
///
/// # Errors
/// Likewise.
pub(crate) fn check_packet_offload(packet: &mut PacketBuf<'_>) -> Result<(), DropReason> {
    let end = |packet: &[u8]| {
        packet
            .first()
            .map_or(0, |first| usize::from(first & 0x0f) * 4)
    };
    check_offload_at(packet, 0, end)
}

fn check_offload_at(
    packet: &mut PacketBuf<'_>,
    network: usize,
    network_end: impl Fn(&[u8]) -> usize,
) -> Result<(), DropReason> {
    let offload = packet.offload();
    let checked = offload.check(packet.len());
    checked.map_err(|_| DropReason::VirtioHeader)?;
    let Checksum::Partial { start, offset } = offload.checksum else {
        return Ok(());
    };
    let is_usual = Transport::parse(packet.as_slice(), network)
        .is_ok_and(|at| at.has_checksum_at(start, offset));
    if is_usual {
        return Ok(());
    }
    if usize::from(start) < network_end(packet.as_slice()) {
        return Err(DropReason::VirtioHeader);
    }
    packet.complete_checksum();
    Ok(())
}

/// Where the IP header of a frame ends, without extensions; where its Ethernet header does if it has
/// none.
fn network_end(frame: &[u8]) -> usize {
    let Ok(view) = parse(frame) else {
        return HEADER_LEN;
    };
    let len = match (view.ethertype(), view.payload().first()) {
        (EthernetProtocol::Ipv4, Some(first)) => usize::from(first & 0x0f) * 4,
        (EthernetProtocol::Ipv6, _) => IPV6_HEADER_LEN,
        _ => 0,
    };
    HEADER_LEN + len
}

/// Whether a group address is one of those that end at the next bridge: spanning tree, pause
/// frames, LLDP (IEEE 802.1D section 7.12.6).
#[must_use]
pub fn is_reserved_group(address: EthernetAddress) -> bool {
    matches!(address.0, [0x01, 0x80, 0xc2, 0, 0, 0..=0x0f])
}

/// Puts an Ethernet header in front of an IPv4 packet.
///
/// # Errors
/// `NoRoom` if the headroom is too short.
#[inline]
pub fn prepend(
    packet: &mut PacketBuf<'_>,
    source: EthernetAddress,
    destination: EthernetAddress,
) -> Result<(), NoRoom> {
    prepend_as(packet, source, destination, EthernetProtocol::Ipv4)
}

/// The same in front of a packet of this type.
///
/// # Errors
/// Likewise.
#[inline]
pub fn prepend_as(
    packet: &mut PacketBuf<'_>,
    source: EthernetAddress,
    destination: EthernetAddress,
    ethertype: EthernetProtocol,
) -> Result<(), NoRoom> {
    let mut header = EthernetFrame::new_unchecked(packet.prepend(HEADER_LEN)?);
    header.set_src_addr(source);
    header.set_dst_addr(destination);
    header.set_ethertype(ethertype);
    Ok(())
}

/// An ARP message over IPv4 and Ethernet, if that is what a frame's payload is (RFC 826).
#[must_use]
pub fn arp(payload: &[u8]) -> Option<ArpRepr> {
    ArpPacket::new_checked(payload)
        .ok()
        .and_then(|packet| ArpRepr::parse(&packet).ok())
}

/// Whether a frame carries ARP.
#[must_use]
pub fn is_arp(frame: &[u8]) -> bool {
    parse(frame).is_ok_and(|view| view.ethertype() == EthernetProtocol::Arp)
}

/// Whether a frame carries a neighbour solicitation or advertisement (RFC 4861 section 4) as hosts
/// send them, without extension headers.
#[must_use]
pub fn is_neighbour_discovery(frame: &[u8]) -> bool {
    let view = parse(frame).ok();
    let view = view.filter(|view| view.ethertype() == EthernetProtocol::Ipv6);
    let packet = view.and_then(|view| Ipv6Packet::new_checked(view.payload()).ok());
    packet.is_some_and(|packet| {
        packet.next_header() == IpProtocol::Icmpv6
            && matches!(
                packet.payload(),
                [
                    ndp::NEIGHBOUR_SOLICITATION | ndp::NEIGHBOUR_ADVERTISEMENT,
                    ..
                ]
            )
    })
}

/// Writes a whole ARP frame.
#[must_use]
pub fn write_arp(
    operation: ArpOperation,
    source: (EthernetAddress, std::net::Ipv4Addr),
    target: (EthernetAddress, std::net::Ipv4Addr),
) -> [u8; ARP_LEN] {
    let mut bytes = [0; ARP_LEN];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    frame.set_src_addr(source.0);
    frame.set_dst_addr(target.0);
    frame.set_ethertype(EthernetProtocol::Arp);
    ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: source.0,
        source_protocol_addr: source.1,
        target_hardware_addr: match operation {
            ArpOperation::Request => EthernetAddress([0; 6]),
            ArpOperation::Reply | ArpOperation::Unknown(_) => target.0,
        },
        target_protocol_addr: target.1,
    }
    .emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arp_is_told_by_its_type() {
        let (mac, address) = (EthernetAddress([2; 6]), [10, 244, 1, 2].into());
        let asks = (EthernetAddress::BROADCAST, [10, 244, 1, 1].into());
        let mut bytes = write_arp(ArpOperation::Request, (mac, address), asks);
        assert!(is_arp(&bytes));
        assert!(!is_arp(&bytes[..HEADER_LEN - 1]));
        EthernetFrame::new_unchecked(&mut bytes[..]).set_ethertype(EthernetProtocol::Ipv4);
        assert!(!is_arp(&bytes));
    }
}
