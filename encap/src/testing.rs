//! What the tests of several modules need.

use crate::bytes::put16;
use crate::ip::transport::Transport;
use crate::ip::{checksum, v4, v6};

/// A UDP packet over IPv4 by an independent builder.
pub(crate) fn udp_packet(payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    etherparse::PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 2, 3], 64)
        .udp(1, 2)
        .write(&mut bytes, payload)
        .unwrap();
    bytes
}

/// Fills in lengths and checksums of a packet that ends where its bytes do. IPv4 options stay out of
/// the header's checksum.
pub(crate) fn finish(packet: &mut [u8], l3: usize) {
    let len = (packet.len() - l3) as u16;
    if packet[l3] >> 4 == 6 {
        put16(
            packet,
            l3 + v6::field::PAYLOAD_LEN,
            len - v6::HEADER_LEN as u16,
        );
    } else {
        put16(packet, l3 + v4::field::TOTAL_LEN, len);
        v4::fill_checksum(&mut packet[l3..l3 + v4::HEADER_LEN]);
    }
    if let Ok(at) = Transport::parse(packet, l3) {
        let pseudo = at.pseudo_header(packet, at.end - at.l4);
        put16(packet, at.checksum_offset(), pseudo);
        checksum::complete(packet, at.l4, at.protocol.checksum_offset()).unwrap();
    }
}
