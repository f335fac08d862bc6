//! flannel's UDP format: one datagram is one bare inner IPv4 packet, with no header of any kind.
//!
//! There is nothing to encode, and decoding only checks that the datagram is one well-formed IPv4
//! packet: [`crate::ip::v4::check`].

/// The default UDP port of flannel's `udp` backend.
pub const PORT: u16 = 8285;
