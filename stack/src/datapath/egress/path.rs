//! Errors about datagrams and echo requests outside: what routers and hosts there say about them.

use std::net::{SocketAddr, SocketAddrV4};

use super::Egress;
use super::host::{FlowId, Host};
use super::key::Key;
use super::output::Outbox;
use super::quote::{Heard, QUOTED, Quote};
use crate::addresses::{ipv4, socket_ipv4};

/// Errors that are passed on before the others have their turn.
const COMPLAINTS: usize = 16;
impl Egress {
    /// Tells a pod what is wrong with datagrams of a flow, whose socket has failed, at one with this
    /// payload if it was to send one.
    pub(super) fn hear(
        &mut self,
        (id, key): (FlowId, Key),
        payload: &[u8],
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Heard {
        let mut quoted = [0; QUOTED];
        for complaints in 0..COMPLAINTS {
            let Some(complaint) = host.complaint(id, &mut quoted) else {
                return if complaints > 0 {
                    Heard::OfEarlier
                } else {
                    Heard::Nothing
                };
            };
            let Some(from) = complaint.from else {
                let quote = Quote::new(key, payload);
                out.report(complaint.error, quote.as_slice());
                return Heard::TooLong;
            };
            // Nobody complains about what the pod could not have sent.
            if let Some(remote) = self.complained_of(id, key, complaint.to)
                && let Some(from) = ipv4(from)
            {
                // The pod knows the host's loopback by another address.
                let is_loopback = from.is_loopback();
                let from = if is_loopback { *remote.ip() } else { from };
                let quoted = &quoted[..complaint.len.min(QUOTED)];
                let quote = Quote::new(Key { remote, ..key }, quoted);
                out.relay(from, complaint.error, quote.as_slice());
            }
        }
        Heard::OfEarlier
    }

    /// What a pod calls the other end of a datagram that went `to` there on the host.
    fn complained_of(&self, id: FlowId, key: Key, to: SocketAddr) -> Option<SocketAddrV4> {
        let to = socket_ipv4(to)?;
        let (_, flow) = self.flows.get(id)?;
        match flow.latest() {
            None => Some(key.remote),
            Some(latest) if latest.to == to => Some(latest.remote),
            Some(_) => self.config.source(key.protocol, to).ok(),
        }
    }
}
