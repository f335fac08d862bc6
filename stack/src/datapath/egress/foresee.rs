//! What egress would do with a packet of a pod, for who traces one. What the host has to say about
//! it nobody knows beforehand.

use muslin_encap::buffer::PacketBuf;
use smoltcp::time::Instant;
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Packet};

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
        let view = Ipv4Packet::new_unchecked(bytes);
        if view.more_frags() || view.frag_offset() != 0 {
            tell(TraceStep::Reassembled);
            return Ok(());
        }
        if let Some(to) = self.holder(bytes) {
            tell(TraceStep::HandedOver { to });
            return Ok(());
        }
        let now = self.clock.clone().look(now, self.next_due());
        match view.next_header() {
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
            IpProtocol::Icmp => self.foresee_icmp(now, &view, tell),
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
            && let Some(id) = self.flows.find(&key.mapping())
        {
            tell(flow(key.mapping(), true));
            let known = self.flows.get(id).and_then(|(_, flow)| flow.latest());
            let to = match known.filter(|known| known.remote == key.remote) {
                Some(known) => known.to,
                None => self.config.policy.check(key.protocol, key.remote)?,
            };
            tell(TraceStep::Socket { to: to.into() });
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
        view: &Ipv4Packet<&[u8]>,
        tell: &mut impl FnMut(TraceStep),
    ) -> Result<(), DropReason> {
        let icmp = Icmpv4Packet::new_checked(view.payload());
        let icmp = icmp.map_err(|_| DropReason::EgressMalformed)?;
        if !icmp.verify_checksum() {
            return Err(DropReason::EgressMalformed);
        }
        match (icmp.msg_type(), icmp.msg_code()) {
            (Icmpv4Message::EchoRequest, 0) => {
                let key = Key::of_ping(view, icmp.echo_ident());
                self.foresee_datagram(now, key, tell)
            }
            (Icmpv4Message::DstUnreachable, _) => {
                let key = quoted(icmp.data()).ok_or(DropReason::EgressProtocol)?;
                let is_known = self.flow_to(&key).is_some();
                tell(flow(key, is_known));
                match is_known && self.may_tell(&key, view.src_addr()) {
                    true => Ok(()),
                    false => Err(DropReason::EgressProtocol),
                }
            }
            _ => Err(DropReason::EgressProtocol),
        }
    }

    /// Where a flow goes that does not exist yet.
    fn foresee_flow(
        &self,
        now: Instant,
        key: Key,
        tell: &mut impl FnMut(TraceStep),
    ) -> Result<Target, DropReason> {
        let remote = *key.remote.ip();
        if !self.is_gateway(remote)
            && let Some((prefix, allows)) = self.config.policy.rule(remote.into())
        {
            tell(TraceStep::Rule { prefix, allows });
        }
        let target = self.target(key)?;
        match target {
            Target::Outside(to) => tell(TraceStep::Socket { to: to.into() }),
            Target::Service => tell(TraceStep::Service {
                port: key.remote.port(),
            }),
        }
        // Nobody makes room for what is refused: the pod is another node's.
        if target == Target::Service && !self.is_local(key) {
            return Err(DropReason::GatewayPort);
        }
        let pod = *key.pod.ip();
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
