//! The underlay: the interface and the UDP sockets that carry encapsulated packets between nodes.

mod interface;
mod udp;

pub use interface::{PublicInterface, Wanted, choose as choose_interface};
pub use udp::{UdpSocket, path_mtu};
