//! Packets to addresses outside the overlay that no system of a pod would send.

use std::net::{Ipv4Addr, SocketAddrV4};

use muslin_encap::offload::virtio;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
    UdpPacket, UdpRepr,
};

use super::device::Identity;

/// Connections that are begun at once.
const SYNS: u16 = 12;
const FIRST_PORT: u16 = 20_000;
const IP_LEN: usize = 20;
/// With UDP's header a length that a first fragment may have.
const PAYLOAD: usize = 600;
const LONG_PAYLOAD: usize = 4000;

/// Segments that each ask for another connection.
pub(super) fn syns(from: Ipv4Addr, to: SocketAddrV4, identity: Identity) -> Vec<Vec<u8>> {
    let first = FIRST_PORT + (identity.ping % 1000) as u16 * SYNS;
    let ports = first..first + SYNS;
    ports.map(|port| syn(from, port, to)).collect()
}

fn syn(from: Ipv4Addr, port: u16, to: SocketAddrV4) -> Vec<u8> {
    let tcp = TcpRepr {
        src_port: port,
        dst_port: to.port(),
        control: TcpControl::Syn,
        seq_number: TcpSeqNumber(port.into()),
        ack_number: None,
        window_len: 1000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let mut bytes = packet((from, *to.ip()), IpProtocol::Tcp, tcp.buffer_len());
    tcp.emit(
        &mut TcpPacket::new_unchecked(&mut bytes[IP_LEN..]),
        &IpAddress::from(from),
        &IpAddress::from(*to.ip()),
        &ChecksumCapabilities::default(),
    );
    bytes
}

/// A datagram from any port to any address.
pub(super) fn datagram(from: Ipv4Addr, to: SocketAddrV4, identity: Identity) -> Vec<u8> {
    datagram_of(PAYLOAD, from, to, identity)
}

/// The same, longer than any MTU.
pub(super) fn long_datagram(from: Ipv4Addr, to: SocketAddrV4, identity: Identity) -> Vec<u8> {
    datagram_of(LONG_PAYLOAD, from, to, identity)
}

/// Virtio-net headers of all kinds of segmentation, sizes from nothing to everything, and checksums
/// that are anywhere.
pub(super) fn headers(identity: Identity) -> Vec<[u8; virtio::LEN]> {
    let places: [(u16, u16); 5] = [(34, 6), (34, 16), (0, 0), (9000, 6), (u16::MAX, u16::MAX)];
    let sizes: [u16; 6] = [0, 1, 7, 600, 1400, u16::MAX];
    // No segmentation, TCP by IPv4, UDP fragments, TCP by IPv6, UDP, and what there is not.
    let kinds: [u8; 7] = [0, 1, 3, 4, 5, 9, 0x85];
    let number = identity.ping as usize;
    let each = kinds.into_iter().enumerate().map(|(index, kind)| {
        let number = number.wrapping_add(index);
        let (start, offset) = places[number % places.len()];
        let size = sizes[number / 2 % sizes.len()];
        let flags = (number / 3 % 3) as u8;
        let numbers = [number as u16, size, start, offset].map(u16::to_ne_bytes);
        let [[h0, h1], [g0, g1], [s0, s1], [o0, o1]] = numbers;
        [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1]
    });
    each.collect()
}

fn datagram_of(len: usize, from: Ipv4Addr, to: SocketAddrV4, identity: Identity) -> Vec<u8> {
    let payload = identity.payload(len);
    let udp = UdpRepr {
        src_port: FIRST_PORT + (identity.ping % 1000) as u16,
        dst_port: to.port(),
    };
    let len = udp.header_len() + payload.len();
    let mut bytes = packet((from, *to.ip()), IpProtocol::Udp, len);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut bytes[IP_LEN..]),
        &IpAddress::from(from),
        &IpAddress::from(*to.ip()),
        payload.len(),
        |room| room.copy_from_slice(&payload),
        &ChecksumCapabilities::default(),
    );
    bytes
}

/// The same with another byte at its end.
pub(super) fn broken(mut packet: Vec<u8>) -> Vec<u8> {
    if let Some(last) = packet.last_mut() {
        *last ^= 1;
    }
    packet
}

/// The same as a first fragment, of which the rest does not come.
pub(super) fn half(mut packet: Vec<u8>) -> Vec<u8> {
    let mut ip = Ipv4Packet::new_unchecked(&mut packet);
    ip.set_more_frags(true);
    ip.set_dont_frag(false);
    ip.fill_checksum();
    packet
}

fn packet(ends: (Ipv4Addr, Ipv4Addr), protocol: IpProtocol, len: usize) -> Vec<u8> {
    let ip = Ipv4Repr {
        src_addr: ends.0,
        dst_addr: ends.1,
        next_header: protocol,
        payload_len: len,
        hop_limit: 64,
    };
    let mut bytes = vec![0; IP_LEN + len];
    ip.emit(
        &mut Ipv4Packet::new_unchecked(&mut bytes),
        &ChecksumCapabilities::default(),
    );
    bytes
}
