#![doc = include_str!("../README.md")]
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

pub use smoltcp::wire::{EthernetAddress, IpProtocol, IpVersion};
