//! Flows of the process that was the node before this one, which serves them to their end: their packets
//! are handed to it.

use super::Egress;
use super::key::{EPHEMERAL, FlowKey, Key, Protocol, flow_of};

impl Egress {
    /// Says which flows the process before this one has. What it answers itself in one datagram, it has
    /// answered: a socket that asks a service of the gateway again asks this process.
    pub fn succeed(&mut self, flows: impl IntoIterator<Item = FlowKey>) {
        let keys = flows.into_iter().filter_map(|key| Key::try_from(key).ok());
        for key in keys {
            let is_question = key.protocol == Protocol::Udp
                && self.is_gateway(key.remote.ip())
                && !EPHEMERAL.contains(&key.remote.port());
            if !is_question {
                self.predecessors.insert(key);
            }
        }
    }

    /// Says that flows of the process before this one have ended.
    pub fn forget_predecessors(&mut self, flows: &[FlowKey]) {
        for key in flows {
            if let Ok(key) = Key::try_from(*key) {
                self.predecessors.remove(&key);
            }
        }
    }

    /// Says that the process before this one has ended, and all of its flows with it.
    pub fn end_predecessor(&mut self) {
        self.predecessors.clear();
    }

    /// Whether a packet of a pod is of a flow that is here, or the packet that an ICMP error of it quotes.
    #[must_use]
    pub fn has_flow_of(&self, packet: &[u8]) -> bool {
        let flow = flow_of(packet);
        flow.is_some_and(|(key, _)| self.flow_to(&key).is_some())
    }

    /// Whether a packet of a pod is of a flow that the process before this one has.
    pub(super) fn is_predecessors(&self, packet: &[u8]) -> bool {
        if self.predecessors.is_empty() {
            return false;
        }
        let Some((key, _)) = flow_of(packet) else {
            return false;
        };
        let has = |key: &Key| self.predecessors.contains(key);
        (has(&key) || has(&self.mapping_of(&key))) && self.flows.find(&key).is_none()
    }
}
