//! The other nodes' leases, and which of them are peers.

use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet};

use super::{Backend, LeaseRecord, SubnetKey};
use crate::peer::{Peer, PeerId, Unusable};

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
        Peer::from_lease(self.id, key, &self.record, backend)
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
