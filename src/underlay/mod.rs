//! The underlay: the interface and the UDP sockets that carry encapsulated packets between nodes.

mod batch;
mod interface;
mod udp;

pub use batch::Received;
pub use interface::{PublicInterface, Wanted, choose as choose_interface};
pub use udp::{Options, Route, UdpSocket, path_mtu};
