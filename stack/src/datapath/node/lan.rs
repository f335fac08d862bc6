//! The host's LAN, as a node with an uplink knows it.

use std::collections::VecDeque;
use std::net::IpAddr;

use smoltcp::wire::EthernetAddress;

use crate::datapath::neighbour::Neighbours;
use crate::datapath::uplink::Uplink;

/// The uplink and the hosts on it.
#[derive(Clone)]
pub(super) struct Lan {
    pub(super) uplink: Uplink,
    pub(super) neighbours: Neighbours,
    pub(super) early: VecDeque<Early>,
}

/// A packet that came before it was known where its sender is.
#[derive(Clone)]
pub(super) struct Early {
    /// The next hop that it must come from.
    pub(super) host: IpAddr,
    /// The MAC address that it came from.
    pub(super) mac: EthernetAddress,
    pub(super) packet: Vec<u8>,
}
