//! Tunnel formats: the headers in front of an inner packet, and how many bytes they cost.

mod format;
pub mod ipip;
pub mod udp;
pub mod vxlan;
pub mod wireguard;

pub use format::Format;
