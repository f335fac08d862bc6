//! Whether packets that egress makes for pods are valid.

use std::net::Ipv4Addr;

use muslin_encap::ip::v6;
use muslin_encap::mtu::Mtu;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Message, Icmpv4Packet, IpAddress, IpProtocol,
    Ipv4Packet, Ipv6Packet, PrettyPrinter, TcpPacket, UdpPacket,
};

use crate::datapath::frame;

/// Bytes of an ICMP error in front of what it quotes.
const ICMP_LEN: usize = 8;

/// Whether a frame has a packet that a pod's system takes: no longer than its interface says, with
/// right lengths and checksums.
pub(super) fn check(bytes: &[u8], mtu: Mtu) -> Result<(), String> {
    let view = frame::parse(bytes).map_err(|_| "a frame has no header".to_owned())?;
    let packet = view.payload();
    if packet.len() > mtu.get().into() {
        return Err(format!("a packet has {} bytes", packet.len()));
    }
    match view.ethertype() {
        EthernetProtocol::Ipv4 => check_v4(packet),
        EthernetProtocol::Ipv6 => check_v6(packet, true),
        other => Err(format!("a frame has the type {other}")),
    }
}

fn check_v4(packet: &[u8]) -> Result<(), String> {
    let ip = Ipv4Packet::new_checked(packet);
    let ip = ip.map_err(|_| "a packet has no IPv4 header".to_owned())?;
    let is_right = usize::from(ip.total_len()) == packet.len() && ip.verify_checksum();
    if !is_right || ip.hop_limit() == 0 {
        return Err(format!("a packet has a wrong header: {ip}"));
    }
    if ip.more_frags() || ip.frag_offset() != 0 || is_transport_right(&ip) {
        return Ok(());
    }
    Err(format!("a packet has a wrong checksum: {ip}"))
}

fn is_transport_right(ip: &Ipv4Packet<&[u8]>) -> bool {
    let (from, to) = (IpAddress::from(ip.src_addr()), ip.dst_addr().into());
    match ip.next_header() {
        IpProtocol::Tcp => TcpPacket::new_checked(ip.payload())
            .is_ok_and(|segment| segment.verify_checksum(&from, &to)),
        IpProtocol::Udp => UdpPacket::new_checked(ip.payload()).is_ok_and(|datagram| {
            usize::from(datagram.len()) == ip.payload().len()
                && datagram.verify_checksum(&from, &to)
        }),
        IpProtocol::Icmp => {
            Icmpv4Packet::new_checked(ip.payload()).is_ok_and(|icmp| icmp.verify_checksum())
        }
        _ => false,
    }
}

/// Whether an IPv6 packet has a right length, and a right checksum unless it is a fragment or its sender
/// need not have had that.
pub(super) fn check_v6(packet: &[u8], is_trusted: bool) -> Result<(), String> {
    let ip = Ipv6Packet::new_checked(packet);
    let ip = ip.map_err(|_| "a packet has no IPv6 header".to_owned())?;
    if ip.total_len() != packet.len() || ip.hop_limit() == 0 {
        return Err(format!("a packet has a wrong header: {ip}"));
    }
    let upper = v6::upper_layer(packet);
    let upper = upper.map_err(|_| format!("a packet is about nothing: {ip}"))?;
    let payload = &packet[upper.offset..];
    let (from, to) = (IpAddress::from(ip.src_addr()), ip.dst_addr().into());
    let is_right = match IpProtocol::from(upper.protocol) {
        _ if upper.fragment.is_some() || !is_trusted => true,
        IpProtocol::Tcp => {
            TcpPacket::new_checked(payload).is_ok_and(|segment| segment.verify_checksum(&from, &to))
        }
        IpProtocol::Udp => UdpPacket::new_checked(payload).is_ok_and(|datagram| {
            usize::from(datagram.len()) == payload.len() && datagram.verify_checksum(&from, &to)
        }),
        IpProtocol::Icmpv6 => v6::has_icmp_checksum(packet, upper.offset),
        _ => true,
    };
    is_right
        .then_some(())
        .ok_or_else(|| format!("a packet has a wrong checksum: {ip}"))
}

/// The source of the packet that a whole ICMP error quotes.
pub(super) fn quoted_source(ip: &Ipv4Packet<&[u8]>) -> Option<Ipv4Addr> {
    let icmp = Icmpv4Packet::new_checked(ip.payload()).ok()?;
    let is_error = matches!(
        icmp.msg_type(),
        Icmpv4Message::DstUnreachable | Icmpv4Message::TimeExceeded
    );
    if !is_error || !icmp.verify_checksum() {
        return None;
    }
    let quoted = ip.payload().get(ICMP_LEN..ICMP_LEN + 20)?;
    Some(Ipv4Packet::new_unchecked(quoted).src_addr())
}

/// A frame for people, on one line.
pub(super) fn in_words(frame: &[u8]) -> String {
    let printer = PrettyPrinter::<EthernetFrame<&[u8]>>::new("", &frame);
    let text = printer.to_string();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
