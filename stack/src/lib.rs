#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod addresses;
#[cfg(feature = "api")]
pub mod api;
pub mod bucket;
pub mod control;
pub mod datapath;
pub mod drops;
pub mod endpoint;
pub mod secret;
#[cfg(feature = "sim")]
pub mod sim;

pub use smoltcp::time::{Duration, Instant};
pub use smoltcp::wire::{ArpOperation, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol};
