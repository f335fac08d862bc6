//! What the tests of several modules need.

/// A UDP packet over IPv4 by an independent builder.
pub(crate) fn udp_packet(payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    etherparse::PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 2, 3], 64)
        .udp(1, 2)
        .write(&mut bytes, payload)
        .unwrap();
    bytes
}
