//! Errors about datagrams and echo requests outside: what routers and hosts there say about them.

use std::net::{IpAddr, SocketAddr};

use muslin_encap::ip::{v4, v6};

use super::Egress;
use super::host::{FlowId, Host};
use super::key::{Key, plain};
use super::output::Outbox;
use super::quote::{Heard, QUOTED, Quote};
use crate::datapath::icmp::IcmpError;

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
                let error = self.as_heard(key, complaint.error);
                out.report(error, Quote::new(key, payload).as_slice());
                return Heard::TooLong;
            };
            // Nobody complains about what the pod could not have sent.
            if let Some(remote) = self.complained_of(id, key, complaint.to)
                && let Some(from) = self.teller(key, remote.ip(), from)
            {
                let key = Key { remote, ..key };
                let quoted = &quoted[..complaint.len.min(QUOTED)];
                let error = self.as_heard(key, complaint.error);
                out.relay(from, error, Quote::new(key, quoted).as_slice());
            }
        }
        Heard::OfEarlier
    }

    /// What a pod calls the other end of a datagram that went `to` there on the host.
    fn complained_of(&self, id: FlowId, key: Key, to: SocketAddr) -> Option<SocketAddr> {
        let to = plain(to);
        let (_, flow) = self.flows.get(id)?;
        match flow.latest() {
            None => Some(key.remote),
            Some(latest) if latest.to == to => Some(latest.remote),
            Some(_) => self.config.source(key.protocol, key.pod, to).ok(),
        }
    }

    /// By which address a pod knows who says something about packets to `remote`.
    fn teller(&self, key: Key, remote: IpAddr, from: IpAddr) -> Option<IpAddr> {
        match (from, key.pod) {
            // The pod knows the host's loopback by another address.
            _ if from.is_loopback() => Some(remote),
            (IpAddr::V4(from), SocketAddr::V6(_)) => {
                let nat64 = self.config.policy.nat64()?;
                Some(nat64.embed(from).into())
            }
            _ => (from.is_ipv4() == key.pod.is_ipv4()).then_some(from),
        }
    }

    /// An error about what a socket of the host has sent, as it is about what the pod has sent.
    fn as_heard(&self, key: Key, error: IcmpError) -> IcmpError {
        match (error, key.pod) {
            (IcmpError::FragmentationNeeded(mtu), SocketAddr::V6(_)) => {
                // An IPv6 header is longer than the one of IPv4 that has taken its place, and no link of
                // IPv6 has a smaller MTU than the smallest (RFC 7915 section 4.2).
                let is_translated = key.remote.is_ipv4()
                    || self.config.policy.translated(key.remote.ip()).is_some();
                let longer = if is_translated {
                    (v6::HEADER_LEN - v4::HEADER_LEN) as u16
                } else {
                    0
                };
                IcmpError::FragmentationNeeded(mtu.saturating_add(longer).max(v6::MIN_MTU))
            }
            _ => error,
        }
    }
}
