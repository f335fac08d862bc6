//! Tunnel formats: what is in front of an inner packet, and how many bytes that costs.

mod format;
pub mod ipip;
pub mod udp;
pub mod vxlan;

pub use format::Format;
