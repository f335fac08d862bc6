#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod bucket;
pub mod control;
pub mod datapath;
pub mod drops;
pub mod egress;
pub mod endpoint;
pub mod frame;
pub mod gateway;
pub mod guard;
pub mod hash;
pub mod icmp;
pub mod ipam;
pub mod lease;
pub mod link_local;
pub mod names;
pub mod neighbour;
pub mod node;
pub mod peer;
pub mod port;
pub mod route;
#[cfg(feature = "sim")]
pub mod sim;
pub mod switch;
pub mod uplink;
pub mod work;

pub use smoltcp::time::{Duration, Instant};
pub use smoltcp::wire::EthernetAddress;
