//! flannel's UDP format: one datagram is one bare inner IPv4 packet, with no header of any kind.
//!
//! There is nothing to encode. "Decoding" is the question whether the datagram is exactly one
//! well-formed IPv4 packet, which [`crate::ip::v4::check`] answers.

/// UDP port of flannel's `udp` backend where the configuration names none.
pub const PORT: u16 = 8285;
