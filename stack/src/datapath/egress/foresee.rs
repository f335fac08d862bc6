//! What egress would do with a packet of a pod, for who traces one. What the host has to say about
//! it nobody knows beforehand.

use muslin_encap::buffer::PacketBuf;
use smoltcp::time::Instant;
use smoltcp::wire::IpProtocol;

use super::datagram::icmp_of;
use super::head::{Head, Message};
use super::key::{Key, Protocol, opens, quoted};
use super::owners::Claim;
use super::{Direction, EVICTABLE, Egress, Target};
use crate::datapath::trace::TraceStep;
use crate::drops::DropReason;

impl Egress {
    /// What [`Self::from_pod`] would do with a packet now, with each step that it would take.
    ///
    /// # Errors
    /// The reason for which it would drop the packet.
    pub(in crate::datapath) fn foresee(
        &self,
        now: Instant,
        packet: &PacketBuf<'_>,
        tell: &mut impl FnMut(TraceStep),
    ) -> Result<(), DropReason> {
        let bytes = packet.as_slice();
        let head = Head::parse(bytes)?;
        if head.is_fragment {
            tell(TraceStep::Reassembled);
            return Ok(());
        }
        if let Some(to) = self.holder(bytes) {
            tell(TraceStep::HandedOver { to });
            return Ok(());
        }
        let now = self.clock.clone().look(now, self.next_due());
        match head.protocol {
            IpProtocol::Tcp => {
                let (key, at) = self.identify(packet, Protocol::Tcp)?;
                let is_known = self.flows.find(&key).is_some();
                tell(flow(key, is_known));
                if is_known {
                    return Ok(());
                }
                if !opens(bytes, &at) {
                    return Err(DropReason::EgressNoFlow);
                }
                self.foresee_flow(now, key, tell).map(drop)
            }
            IpProtocol::Udp => {
                let (key, _) = self.identify(packet, Protocol::Udp)?;
                self.foresee_datagram(now, key, tell)
            }
            protocol if protocol == icmp_of(head.source) => {
                self.foresee_icmp(now, &head, bytes, tell)
            }
            _ if self.config.policy.is_closed() => Err(DropReason::EgressClosed),
            _ => Err(DropReason::EgressProtocol),
        }
    }

    fn foresee_datagram(
        &self,
        now: Instant,
        key: Key,
        tell: &mut impl FnMut(TraceStep),
    ) -> Result<(), DropReason> {
        if self.flows.find(&key).is_some() {
            tell(flow(key, true));
            return Ok(());
        }
        if self.is_mapped(key)
            && let Some(id) = self.flows.find(&self.mapping_of(&key))
        {
            tell(flow(self.mapping_of(&key), true));
            let known = self.flows.get(id).and_then(|(_, flow)| flow.latest());
            let to = match known.filter(|known| known.remote == key.remote) {
                Some(known) => known.to,
                None => self.config.policy.check(key.protocol, key.remote)?,
            };
            tell(TraceStep::Socket { to });
            return Ok(());
        }
        tell(flow(key, false));
        let target = self.foresee_flow(now, key, tell)?;
        let is_anothers = matches!(target, Target::Outside(_))
            && self.is_mapped(key)
            && self.foresee_claim(&key) == Claim::Anothers;
        match is_anothers {
            true => Err(DropReason::EgressHandoverFull),
            false => Ok(()),
        }
    }

    fn foresee_icmp(
        &self,
        now: Instant,
        head: &Head,
        packet: &[u8],
        tell: &mut impl FnMut(TraceStep),
    ) -> Result<(), DropReason> {
        match self.message(head, packet)? {
            Message::Echo { identifier } => {
                let key = Key::of_ping(head, identifier);
                self.foresee_datagram(now, key, tell)
            }
            Message::Unreachable { offender, .. } => {
                let key = quoted(offender).ok_or(DropReason::EgressProtocol)?;
                let is_known = self.flow_to(&key).is_some();
                tell(flow(key, is_known));
                match is_known && self.may_tell(&key, head.source) {
                    true => Ok(()),
                    false => Err(DropReason::EgressProtocol),
                }
            }
            Message::Other => Err(DropReason::EgressProtocol),
        }
    }

    /// Where a flow goes that does not exist yet.
    fn foresee_flow(
        &self,
        now: Instant,
        key: Key,
        tell: &mut impl FnMut(TraceStep),
    ) -> Result<Target, DropReason> {
        let remote = key.remote.ip();
        if !self.is_gateway(remote)
            && let Some((prefix, allows)) = self.config.policy.rule(remote)
        {
            tell(TraceStep::Rule { prefix, allows });
        }
        let target = self.target(key)?;
        match target {
            Target::Outside(to) => tell(TraceStep::Socket { to }),
            Target::Service => tell(TraceStep::Service {
                port: key.remote.port(),
            }),
        }
        // Nobody makes room for what is refused: the pod is another node's.
        if target == Target::Service && !self.is_local(key) {
            return Err(DropReason::GatewayPort);
        }
        let pod = key.pod.ip();
        let room = self.flows.has_room(now, EVICTABLE, pod, Direction::Out);
        room.map_err(DropReason::from)?;
        Ok(target)
    }
}

fn flow(key: Key, is_known: bool) -> TraceStep {
    TraceStep::Flow {
        flow: key.into(),
        is_known,
    }
}
