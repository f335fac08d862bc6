//! The other nodes' leases, and which of them are peers.

use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use thiserror::Error;

use crate::control::lease::{Backend, LeaseRecord, SubnetKey};
use crate::datapath::peer::{Peer, PeerId};

/// The leases of other nodes by their keys, each with a number that is stable while it lasts and
/// used again afterwards.
#[derive(Debug, Default)]
pub struct Peers {
    known: BTreeMap<SubnetKey, Known>,
    /// Numbers that are free again. If there are none, all below the number of leases are taken.
    free: BTreeSet<u32>,
}

/// Another node's lease.
#[derive(Debug)]
pub struct Known {
    /// Its identity.
    pub id: PeerId,
    /// What its lease says.
    pub record: LeaseRecord,
}

impl Known {
    /// The peer it describes, in a network of this backend.
    ///
    /// # Errors
    /// `Unusable` if nothing can be sent to it: the data path must not have it then.
    pub fn peer(&self, key: SubnetKey, backend: &Backend) -> Result<Peer, Unusable> {
        peer_of_lease(self.id, key, &self.record, backend)
    }
}

impl Peers {
    /// Takes a lease that is new or has changed.
    pub fn remember(&mut self, key: SubnetKey, record: LeaseRecord) -> &Known {
        let unused = self.known.len() as u32;
        match self.known.entry(key) {
            Slot::Occupied(slot) => {
                let known = slot.into_mut();
                known.record = record;
                known
            }
            Slot::Vacant(slot) => {
                let id = PeerId(self.free.pop_first().unwrap_or(unused));
                slot.insert(Known { id, record })
            }
        }
    }

    /// Forgets a lease that has ended, and says which one it was.
    pub fn forget(&mut self, key: SubnetKey) -> Option<Known> {
        let known = self.known.remove(&key)?;
        self.free.insert(known.id.0);
        Some(known)
    }

    /// All leases by their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&SubnetKey, &Known)> {
        self.known.iter()
    }
}

/// Why a node that has a lease cannot be a peer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
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

/// The peer that a lease describes, in a network of this backend.
///
/// # Errors
/// `Unusable` if nothing can be sent to it.
pub fn peer_of_lease(
    id: PeerId,
    key: SubnetKey,
    record: &LeaseRecord,
    backend: &Backend,
) -> Result<Peer, Unusable> {
    if record.backend() != backend.name() {
        return Err(Unusable::OtherBackend(record.backend().to_owned()));
    }
    let ip = record.public_ip;
    if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() {
        return Err(Unusable::NoAddress);
    }
    let vtep_mac = match backend {
        Backend::Vxlan(_) => Some(record.vtep_mac().ok_or(Unusable::NoVtepMac)?),
        Backend::Udp { .. } | Backend::HostGw | Backend::Ipip { .. } => None,
        Backend::Other(name) => return Err(Unusable::OtherBackend(name.clone())),
    };
    Ok(Peer {
        id,
        subnet: key.ipv4.into(),
        address: SocketAddr::new(ip.into(), backend.port()),
        vtep_mac,
        checksums: record.checksums(),
    })
}

#[cfg(test)]
mod tests {
    use muslin_encap::tunnel::vxlan::{Vni, VtepMac};

    use super::*;
    use crate::control::lease::VxlanOptions;

    #[test]
    fn a_lease_keeps_its_identity_while_it_lasts() {
        let mut peers = Peers::default();
        let [one, two] = ["10.1.1.0-24", "10.1.2.0-24"].map(|key| key.parse().unwrap());
        let record = |last| LeaseRecord::udp([192, 168, 0, last].into());
        let first = peers.remember(one, record(1)).id;
        let second = peers.remember(two, record(2)).id;
        assert_ne!(first, second);
        assert_eq!(peers.remember(one, record(3)).id, first);
        let peer = |known: &Known| known.peer(one, &Backend::Udp { port: 8285 }).unwrap();
        let known = peers.forget(one).unwrap();
        assert_eq!(peer(&known).address, "192.168.0.3:8285".parse().unwrap());
        assert!(peers.forget(one).is_none());
        let three = "10.1.3.0-24".parse().unwrap();
        assert_eq!(peers.remember(three, record(1)).id, first);
        assert_eq!(peers.remember(one, record(1)).id, PeerId(2));
        assert_eq!(peers.iter().count(), 3);
    }

    #[test]
    fn only_nodes_that_can_be_reached_are_peers() {
        let key = "10.244.3.0-24".parse().unwrap();
        let vxlan = Backend::Vxlan(VxlanOptions::default());
        let mac = VtepMac::from_random([1; 6]);
        let good = LeaseRecord::vxlan([192, 168, 0, 3].into(), Vni::new(1).unwrap(), mac);
        let read = |text: &str| LeaseRecord::parse(text).unwrap();
        let peer = |record: &LeaseRecord, backend: &Backend| {
            peer_of_lease(PeerId(1), key, record, backend)
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
