//! Several workers that share the flows of a node: which of them has the flow of a packet.
//!
//! Flows that begin on the host's side are the first worker's, and they do not begin with a packet of
//! their pod, so that nothing but their place tells where the kernel brings their packets. Mappings
//! are the worker's that saw their first packet, though the kernel may bring packets of one socket
//! to several.

use std::sync::Arc;

use super::key::{EPHEMERAL, Key, Protocol, Role, flow_of};
use super::owners::{Claim, Owners, Sharing};
use super::{Egress, Holder};

/// The worker that has the flows that begin on the host's side.
const FIRST: u8 = 0;

impl Egress {
    /// Says that this is that worker's egress, of a node that has several.
    pub fn share(&mut self, owners: Arc<Owners>, worker: u8) {
        self.sharing = Some(Sharing { owners, worker });
    }

    /// Takes a mapping, which may be another worker's already.
    pub(super) fn claim(&self, key: &Key) -> Claim {
        match &self.sharing {
            Some(sharing) if !self.is_published(key) => {
                if sharing.owners.claim(key, sharing.worker) {
                    Claim::Own
                } else {
                    Claim::Anothers
                }
            }
            Some(_) | None => Claim::Free,
        }
    }

    /// Whose a mapping is, or would be if it was claimed.
    pub(super) fn foresee_claim(&self, key: &Key) -> Claim {
        match &self.sharing {
            Some(sharing) if !self.is_published(key) => match sharing.owners.of(key) {
                Some(owner) if owner != sharing.worker => Claim::Anothers,
                Some(_) | None => Claim::Own,
            },
            Some(_) | None => Claim::Free,
        }
    }

    /// Gives back what was claimed.
    pub(super) fn release(&self, key: &Key, claim: Claim) {
        if let (Some(sharing), Claim::Own) = (&self.sharing, claim) {
            sharing.owners.release(key);
        }
    }

    /// Who has, or is to have, the flow of a packet of a pod, if it is not this worker.
    pub(super) fn holder(&self, packet: &[u8]) -> Option<Holder> {
        if self.is_predecessors(packet) {
            return Some(Holder::Predecessor);
        }
        self.elsewhere(packet).map(Holder::Worker)
    }

    pub(super) fn elsewhere(&self, packet: &[u8]) -> Option<u8> {
        let sharing = self.sharing.as_ref()?;
        let (key, role) = flow_of(packet)?;
        let worker = match (role, key.protocol) {
            (Role::Error, _) => self.flow_to(&key).is_none().then_some(FIRST),
            (Role::Opening, _) => None,
            (Role::Other, Protocol::Tcp) => self.flows.find(&key).is_none().then_some(FIRST),
            (Role::Other, Protocol::Udp | Protocol::Ping) => self.owner(sharing, &key),
        };
        worker.filter(|worker| *worker != sharing.worker)
    }

    /// Who has the flow of a datagram or an echo request.
    fn owner(&self, sharing: &Sharing, key: &Key) -> Option<u8> {
        if self.flows.find(key).is_some() {
            None
        } else if self.is_gateway(key.remote.ip()) {
            EPHEMERAL.contains(&key.remote.port()).then_some(FIRST)
        } else if self.is_published(key) {
            Some(FIRST)
        } else if self.flows.find(&self.mapping_of(key)).is_some() {
            None
        } else {
            sharing.owners.of(key)
        }
    }

    /// Whether flows with this port of a pod may begin on the host's side.
    fn is_published(&self, key: &Key) -> bool {
        key.protocol == Protocol::Udp && self.published.contains(&key.pod)
    }
}
