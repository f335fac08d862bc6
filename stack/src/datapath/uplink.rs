//! The uplink: the node's own way into the LAN of its host, below IP.
//!
//! flannel's `host-gw` and `DirectRouting` send packets for a peer's pods bare to the peer's host,
//! the next hop. Where the host's kernel owns the LAN address it answers for it, and the node does
//! no more than ask others for theirs; where the node has an address of its own it answers itself.

use std::net::IpAddr;

use ipnet::IpNet;
use muslin_encap::mtu::Mtu;
use smoltcp::wire::EthernetAddress;

/// What a node is on its LAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Uplink {
    /// The MAC address that its frames leave from, and that frames for it have.
    pub mac: EthernetAddress,
    /// The address that it asks with: of IPv4, since it does not ask for neighbours of IPv6 yet.
    pub address: IpAddr,
    /// The LAN's prefix: peers with a public address in it are next hops.
    pub prefix: IpNet,
    /// MTU of the LAN.
    pub mtu: Mtu,
    /// Whether the address is the node's own, so that it must answer for it.
    pub answers: bool,
}

impl Uplink {
    /// An uplink with an address for which the host's kernel answers.
    #[must_use]
    pub const fn new(mac: EthernetAddress, address: IpAddr, prefix: IpNet, mtu: Mtu) -> Self {
        Self {
            mac,
            address,
            prefix,
            mtu,
            answers: false,
        }
    }

    /// Whether a packet for this host needs no router.
    #[must_use]
    pub fn is_on_link(&self, host: IpAddr) -> bool {
        self.prefix.contains(&host) && host != self.address
    }
}
