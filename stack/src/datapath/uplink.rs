//! The uplink: the node's own way into the LAN of its host, below IP.
//!
//! flannel's `host-gw` and `DirectRouting` send packets for a peer's pods bare to the peer's host,
//! the next hop. Where the host's kernel owns the LAN address it answers for it, and the node does
//! no more than ask others for theirs; where the node has an address of its own it answers itself.

use std::net::IpAddr;

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::mtu::Mtu;
use smoltcp::wire::EthernetAddress;

use crate::addresses::Nets;

/// What a node is on its LAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Uplink {
    /// The MAC address that its frames leave from, and that frames for it have.
    pub mac: EthernetAddress,
    /// The addresses that it asks with, each with the length of the LAN's prefix: peers with a public
    /// address in that are next hops.
    pub nets: Nets,
    /// MTU of the LAN.
    pub mtu: Mtu,
    /// Whether the addresses are the node's own, so that it must answer for them.
    pub answers: bool,
}

impl Uplink {
    /// An uplink with addresses for which the host's kernel answers.
    #[must_use]
    pub fn new(mac: EthernetAddress, nets: impl Into<Nets>, mtu: Mtu) -> Self {
        Self {
            mac,
            nets: nets.into(),
            mtu,
            answers: false,
        }
    }

    /// Whether a packet for this host needs no router.
    #[must_use]
    pub fn is_on_link(&self, host: IpAddr) -> bool {
        match host {
            IpAddr::V4(host) => {
                let is_on = |net: Ipv4Net| net.contains(&host) && host != net.addr();
                self.nets.ipv4().is_some_and(is_on)
            }
            IpAddr::V6(host) => {
                let is_on = |net: Ipv6Net| net.contains(&host) && host != net.addr();
                self.nets.ipv6().is_some_and(is_on)
            }
        }
    }
}
