//! Peers: the other nodes, each with its lease and where its tunnel ends.

use std::fmt;
use std::net::SocketAddr;

use ipnet::IpNet;
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_encap::tunnel::wireguard::PublicKey;
use smoltcp::time::Instant;

use crate::datapath::port::Traffic;

/// A peer's number, chosen by the control plane and stable while its lease lasts. Tables have a
/// place for each number up to the largest, so it is small, and used again after its peer has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// Its identity.
    pub id: PeerId,
    /// Its lease: the pods behind it. A node that has one of each IP version is two peers.
    pub subnet: IpNet,
    /// Where its tunnel ends: public address and UDP port, 0 where there is none. There is a path only
    /// to an address of the IP version of its lease.
    pub address: SocketAddr,
    /// The MAC address of its VTEP; VXLAN needs it.
    pub vtep_mac: Option<VtepMac>,
    /// The TCP and UDP checksums that its node takes from the tunnel. Where they are partial, the UDP
    /// checksum of the tunnel's own datagram protects the packet.
    pub checksums: Checksums,
    /// Whether its node takes packets of groups from the tunnel.
    pub multicast: bool,
    /// What WireGuard needs to know of it, in a network that has it.
    pub wireguard: Option<WireGuardEnd>,
}

/// A peer as WireGuard knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireGuardEnd {
    /// Its public key: who has the private one is the peer, wherever its datagrams come from. The peers of
    /// both IP versions of one node may have the same.
    pub public_key: PublicKey,
    /// Where datagrams go until one comes from elsewhere. It may be of another IP version than its lease.
    pub endpoint: SocketAddr,
}

impl Peer {
    /// A node with this lease, whose tunnel ends there, without a VTEP.
    #[must_use]
    pub const fn new(id: PeerId, subnet: IpNet, address: SocketAddr) -> Self {
        Self {
            id,
            subnet,
            address,
            vtep_mac: None,
            checksums: Checksums::Complete,
            multicast: false,
            wireguard: None,
        }
    }

    /// The same with the MAC address of its VTEP.
    #[must_use]
    pub const fn with_vtep(self, mac: VtepMac) -> Self {
        Self {
            vtep_mac: Some(mac),
            ..self
        }
    }

    /// The same with what WireGuard needs.
    #[must_use]
    pub const fn with_wireguard(self, end: WireGuardEnd) -> Self {
        Self {
            wireguard: Some(end),
            ..self
        }
    }

    /// The same with the checksums that its node takes.
    #[must_use]
    pub const fn with_checksums(self, checksums: Checksums) -> Self {
        Self { checksums, ..self }
    }

    /// The same of a node that takes packets of groups.
    #[must_use]
    pub const fn with_multicast(self, multicast: bool) -> Self {
        Self { multicast, ..self }
    }
}

/// How packets get to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Encapsulated.
    Tunnel,
    /// Bare, in a frame for its host: the next hop is on the uplink's link.
    Uplink,
    /// Not at all: there is no tunnel that carries its IP version, and the host is not on the link of an
    /// uplink.
    Unreachable,
}

/// A peer with what went to and came from it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PeerState {
    /// The peer.
    pub peer: Peer,
    /// How packets get there.
    pub path: Path,
    /// Datagrams and frames from it.
    pub received: Traffic,
    /// Datagrams and frames to it.
    pub sent: Traffic,
    /// When the last datagram or frame came from it, to a sixteenth of a second; `None` if none has.
    pub heard: Option<Instant>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_printed_as_their_numbers() {
        assert_eq!(format!("{:>3}", PeerId(7)), "  7");
    }
}
