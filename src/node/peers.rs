//! The other nodes' leases, and which of them are peers.

use std::collections::{BTreeMap, BTreeSet};

use muslin_stack::lease::{Backend, LeaseRecord, SubnetKey};
use muslin_stack::peer::{Peer, PeerId, Unusable};

/// The leases of other nodes by their keys.
#[derive(Debug, Default)]
pub(super) struct Peers {
    known: BTreeMap<SubnetKey, Known>,
    /// Numbers that are free again. If there are none, all below the number of leases are taken.
    free: BTreeSet<u32>,
}

/// Another node's lease.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) id: PeerId,
    pub(super) record: LeaseRecord,
}

impl Known {
    /// The peer it describes.
    pub(super) fn peer(&self, key: SubnetKey, backend: &Backend) -> Result<Peer, Unusable> {
        Peer::from_lease(self.id, key, &self.record, backend)
    }
}

impl Peers {
    pub(super) fn remember(&mut self, key: SubnetKey, record: LeaseRecord) {
        match self.known.get_mut(&key) {
            Some(known) => known.record = record,
            None => {
                let id = self.free.pop_first().unwrap_or(self.known.len() as u32);
                let id = PeerId(id);
                self.known.insert(key, Known { id, record });
            }
        }
    }

    pub(super) fn forget(&mut self, key: SubnetKey) {
        if let Some(known) = self.known.remove(&key) {
            self.free.insert(known.id.0);
        }
    }

    pub(super) fn get(&self, key: SubnetKey) -> Option<&Known> {
        self.known.get(&key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&SubnetKey, &Known)> {
        self.known.iter()
    }
}
