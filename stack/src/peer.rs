//! Peers: the other nodes, each with its lease and where its tunnel ends.

use std::fmt;
use std::net::SocketAddr;

use ipnet::IpNet;
use muslin_encap::overhead::Format;
use muslin_encap::vxlan::{Vni, VtepMac};

use crate::port::Traffic;

/// A peer's identity, chosen by the control plane and stable while its lease lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its identity.
    pub id: PeerId,
    /// Its lease: the pods behind it.
    pub subnet: IpNet,
    /// Where its tunnel ends: public address and UDP port.
    pub address: SocketAddr,
    /// The MAC address of its VTEP; VXLAN needs it.
    pub vtep_mac: Option<VtepMac>,
}

/// How this node's tunnel encapsulates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunnel {
    /// VXLAN with this network identifier, from a VTEP of this MAC address.
    Vxlan {
        /// The network's identifier.
        vni: Vni,
        /// This node's own VTEP.
        mac: VtepMac,
    },
    /// flannel's UDP format.
    Udp,
}

impl Tunnel {
    /// The encapsulation format.
    #[must_use]
    pub const fn format(&self) -> Format {
        match self {
            Self::Vxlan { .. } => Format::Vxlan,
            Self::Udp => Format::Udp,
        }
    }
}

/// A peer with what went to and came from it.
#[derive(Debug, Clone)]
pub struct PeerState {
    /// The peer.
    pub peer: Peer,
    /// Datagrams from it.
    pub received: Traffic,
    /// Datagrams to it.
    pub sent: Traffic,
}
