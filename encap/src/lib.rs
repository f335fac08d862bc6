//! Tunnel formats as pure codecs over buffers with headroom: VXLAN (RFC 7348), flannel's UDP
//! format and IPv4 in IPv4 (RFC 2003), the MTU arithmetic that goes with them, checksums, and
//! superpackets: their virtio-net header, their split into segments and the merge back.
//!
//! Nothing here does I/O, allocates, reads a clock or panics on input. Encapsulating writes only
//! the header in front of a packet that stays where it is.
#![forbid(unsafe_code)]

pub mod buffer;
mod bytes;
pub mod ip;
pub mod mac;
pub mod mtu;
pub mod offload;
#[cfg(test)]
mod testing;
pub mod tunnel;
