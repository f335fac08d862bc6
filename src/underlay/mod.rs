//! The underlay: UDP sockets that carry encapsulated packets between nodes.

mod udp;

pub use udp::{UdpSocket, path_mtu};
