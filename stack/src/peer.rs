//! Peers: the other nodes, each with its lease and where its tunnel ends.

use std::fmt;
use std::net::SocketAddrV4;

use ipnet::IpNet;
use muslin_encap::tunnel::Format;
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use smoltcp::time::Instant;
use thiserror::Error;

use crate::lease::{Backend, LeaseRecord, SubnetKey};
use crate::port::Traffic;

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
pub struct Peer {
    /// Its identity.
    pub id: PeerId,
    /// Its lease: the pods behind it.
    pub subnet: IpNet,
    /// Where its tunnel ends: public address and UDP port, 0 where there is none.
    pub address: SocketAddrV4,
    /// The MAC address of its VTEP; VXLAN needs it.
    pub vtep_mac: Option<VtepMac>,
}

/// Why a node that has a lease cannot be a peer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unusable {
    /// It encapsulates in another way.
    #[error("it uses the backend {0}")]
    OtherBackend(String),
    /// Its lease has no VTEP MAC address (yet).
    #[error("its lease has no VTEP MAC address")]
    NoVtepMac,
    /// Its lease has no public address that packets could be sent to.
    #[error("its lease has no usable public address")]
    NoAddress,
}

impl Peer {
    /// The peer that a lease describes, in a network of this backend.
    ///
    /// # Errors
    /// `Unusable` if nothing can be sent to it.
    pub fn from_lease(
        id: PeerId,
        key: SubnetKey,
        record: &LeaseRecord,
        backend: &Backend,
    ) -> Result<Self, Unusable> {
        if record.backend() != backend.name() {
            return Err(Unusable::OtherBackend(record.backend().to_owned()));
        }
        let ip = record.public_ip;
        if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() {
            return Err(Unusable::NoAddress);
        }
        let (port, vtep_mac) = match backend {
            Backend::Vxlan(options) => (
                options.port,
                Some(record.vtep_mac().ok_or(Unusable::NoVtepMac)?),
            ),
            Backend::Udp { port } => (*port, None),
            Backend::HostGw | Backend::Ipip { .. } => (0, None),
            Backend::Other(name) => return Err(Unusable::OtherBackend(name.clone())),
        };
        Ok(Self {
            id,
            subnet: key.ipv4.into(),
            address: SocketAddrV4::new(ip, port),
            vtep_mac,
        })
    }
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
    /// IPv4 in IPv4 (RFC 2003).
    Ipip,
    /// There is none: all peers are next hops on the uplink, as with flannel's host-gw.
    None,
}

impl Tunnel {
    /// The encapsulation format.
    #[must_use]
    pub const fn format(&self) -> Option<Format> {
        match self {
            Self::Vxlan { .. } => Some(Format::Vxlan),
            Self::Udp => Some(Format::Udp),
            Self::Ipip => Some(Format::Ipip),
            Self::None => None,
        }
    }
}

/// How packets get to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Encapsulated.
    Tunnel,
    /// Bare, in a frame for its host: the next hop is on the uplink's link.
    Uplink,
    /// Not at all: there is no tunnel, and the host is not on the link of an uplink.
    Unreachable,
}

/// A peer with what went to and came from it.
#[derive(Debug, Clone)]
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
    use crate::lease::VxlanOptions;

    #[test]
    fn peers_are_printed_as_their_numbers() {
        assert_eq!(format!("{:>3}", PeerId(7)), "  7");
    }

    #[test]
    fn only_nodes_that_can_be_reached_are_peers() {
        let key = "10.244.3.0-24".parse().unwrap();
        let vxlan = Backend::Vxlan(VxlanOptions::default());
        let mac = VtepMac::from_random([1; 6]);
        let good = LeaseRecord::vxlan([192, 168, 0, 3].into(), Vni::new(1).unwrap(), mac);
        let read = |text: &str| LeaseRecord::parse(text).unwrap();
        let peer = |record: &LeaseRecord, backend: &Backend| {
            Peer::from_lease(PeerId(1), key, record, backend)
        };
        let usable = peer(&good, &vxlan).unwrap();
        assert_eq!(usable.address, "192.168.0.3:8472".parse().unwrap());
        assert_eq!(usable.vtep_mac, Some(mac));
        let other = Unusable::OtherBackend("vxlan".to_owned());
        assert_eq!(peer(&good, &Backend::Udp { port: 8285 }), Err(other));
        let windows =
            r#"{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VtepMAC":""}}"#;
        assert_eq!(peer(&read(windows), &vxlan), Err(Unusable::NoVtepMac));
        for address in ["0.0.0.0", "224.0.0.5", "255.255.255.255"] {
            let nowhere = LeaseRecord::udp(address.parse().unwrap());
            let nowhere = peer(&nowhere, &Backend::Udp { port: 8285 });
            assert_eq!(nowhere, Err(Unusable::NoAddress), "{address}");
        }
    }
}
