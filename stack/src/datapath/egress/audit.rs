//! Closed books: what flows have and what is left for others is what there was.

use std::net::{IpAddr, SocketAddr};

use super::{Egress, Flow};

impl Egress {
    /// Holds the memory of connections against the budget. It looks at every flow: for simulators
    /// and fuzzers, after every call.
    ///
    /// # Errors
    /// What does not agree.
    pub fn audit(&self) -> Result<(), String> {
        let grants = self.flows.iter().filter_map(|(key, flow, _)| {
            let connection = match flow {
                Flow::Dialling(dial) => &dial.connection,
                Flow::Connected { connection, .. } => connection,
                Flow::Connecting { .. } | Flow::Datagrams { .. } => return None,
            };
            Some((key.pod.ip(), connection.grant))
        });
        self.memory.audit(grants)
    }

    /// The ports of pods whose UDP flows may begin on the host's side.
    pub fn expected(&self) -> impl Iterator<Item = SocketAddr> {
        self.published.iter().copied()
    }

    /// A pod that egress knows, of which `is_attached` says that it is not there.
    #[must_use]
    pub fn stray_pod(&self, is_attached: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let flows = self.flows().map(|info| info.key.pod.ip());
        let ports = self.expected().map(|port| port.ip());
        flows.chain(ports).find(|pod| !is_attached(*pod))
    }
}
