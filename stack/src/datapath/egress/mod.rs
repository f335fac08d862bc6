//! Egress: traffic of pods to addresses outside the overlay ends here and goes on by sockets of the
//! host, as in slirp4netns and pasta. It needs no privileges and no rules in the host's kernel.
//!
//! A packet that the router hands over with [`crate::datapath::node::Verdict::Egress`] belongs to a flow, and
//! each flow has one socket of the host. A pod's TCP connection is answered when the host's
//! connection is there, so that a pod sees what becomes of it, and each end takes no more than the
//! other: what a pod does not read stays in the host's socket.
//!
//! UDP and echo requests are endpoint-independent (RFC 4787 sections 4.1 and 5, RFC 5508 section
//! 3.1): all that one port or identifier of a pod sends is one flow, a *mapping*. Outside it is seen
//! with one port of the host, and whoever sends to that reaches the pod, if the pod may send there.
//!
//! Flows to the gateway's own ports are for services of the node, and flows may begin on the host's
//! side, too, with a pod as their server: see [`Egress::dial`].
//!
//! [`Egress`] does no I/O: packets, events of sockets and the time go in, and what is to be done
//! on the host goes out through [`Host`]. What goes to pods, and what there is to say about their
//! packets, waits until it is polled ([`Egress::poll_output`]), which callers do after every call.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use muslin_encap::buffer::PacketBuf;
use muslin_encap::ip::transport::{ChecksumState, Transport};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::virtio::Checksum;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpProtocol, TcpPacket};

use crate::datapath::hash::Seed;
use crate::datapath::icmp::IcmpError;
use crate::drops::DropReason;

mod audit;
mod clock;
mod config;
mod datagram;
mod flow;
mod foresee;
mod head;
mod host;
mod inbound;
mod key;
mod memory;
mod nat64;
mod output;
mod owners;
mod path;
mod policy;
mod quote;
mod reassembly;
mod sharing;
mod state;
mod succession;
mod table;
mod tcp;
#[cfg(test)]
mod tests;

use clock::Clock;
pub use config::{EgressConfig, Limits};
use datagram::{Datagrams, Destination, Reading, echo_request, header_len, icmp_of};
pub use flow::{Direction, FlowInfo, FlowState};
use head::{Head, Message};
pub use host::{Complaint, FlowId, Host, HostError, Marks, NoHost, Ready};
pub use key::{FlowKey, Protocol};
use key::{Key, key_of, opens};
use memory::Memory;
pub use nat64::{InvalidNat64Prefix, Nat64Prefix};
use output::Outbox;
pub use output::{Holder, Output};
pub use owners::Owners;
use owners::{Claim, Sharing};
pub use policy::{LINK_LOCAL, Policy, Rules};
use quote::{Heard, Quote};
use reassembly::Reassembly;
pub use smoltcp::wire::IpVersion;
use state::{DIAL_LIMIT, Flow, LATER, Step};
use table::{Moved, Table};
use tcp::{Ends, Outcome};

/// How long the host may try to connect; Linux does for a little more than two minutes.
const CONNECT_LIMIT: Duration = Duration::from_secs(150);
/// How long a flow must have been idle to make room for another of the same pod.
const EVICTABLE: Duration = Duration::from_secs(10);

/// Times that a datagram is given to the host, which may have something to say of earlier ones.
const ATTEMPTS: usize = 3;

/// What became of flows since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EgressCounters {
    /// Flows that are there now.
    pub open: u64,
    /// Flows that began.
    pub opened: u64,
    /// Those of them that began on the host's side.
    pub inbound: u64,
    /// TCP connections that the other end refused.
    pub refused: u64,
    /// TCP connections to which there was no way or no answer.
    pub unreachable: u64,
    /// TCP connections that either end reset.
    pub reset: u64,
    /// Flows that were idle for too long.
    pub expired: u64,
    /// Flows that made room for others.
    pub evicted: u64,
}

impl EgressCounters {
    /// Adds another worker's counters.
    pub fn add(&mut self, other: &Self) {
        self.open += other.open;
        self.opened += other.opened;
        self.inbound += other.inbound;
        self.refused += other.refused;
        self.unreachable += other.unreachable;
        self.reset += other.reset;
        self.expired += other.expired;
        self.evicted += other.evicted;
    }
}

/// The flows of one worker.
pub struct Egress {
    config: EgressConfig,
    clock: Clock,
    flows: Table<Flow>,
    memory: Memory,
    ends: Ends,
    datagrams: Datagrams,
    fragments: Reassembly,
    counters: EgressCounters,
    /// Connections that a port was chosen for.
    ports_chosen: u64,
    /// Ports of pods whose UDP flows may begin on the host's side.
    published: HashSet<SocketAddr>,
    /// The others, if there are any.
    sharing: Option<Sharing>,
    /// Flows that the process before this one has still.
    predecessors: HashSet<Key, Seed>,
    out: Outbox,
}

/// Where a flow of a pod goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// A socket outside, of IPv4 also where the pod's is of IPv6 (NAT64).
    Outside(SocketAddr),
    /// A port of the gateway.
    Service,
}

impl Egress {
    /// Egress without flows.
    #[must_use]
    pub fn new(config: EgressConfig, now: Instant) -> Self {
        Self {
            flows: Table::new(
                config.limits.flows,
                config.limits.flows_of_pod,
                Seed(config.random_seed),
            ),
            memory: Memory::new(
                config.limits.memory,
                config.limits.flows,
                Seed(config.random_seed),
            ),
            clock: Clock::new(now),
            ends: Ends::new(&config, now),
            datagrams: Datagrams::new(),
            fragments: Reassembly::new(),
            counters: EgressCounters::default(),
            ports_chosen: 0,
            published: HashSet::new(),
            sharing: None,
            predecessors: HashSet::with_hasher(Seed(config.random_seed)),
            out: Outbox::default(),
            config,
        }
    }

    /// Pods have another MTU, in bytes of IP packets: what goes to them fits it from now on, on
    /// connections that are open too.
    pub fn set_mtu(&mut self, mtu: Mtu, now: Instant) {
        self.config.mtu = mtu;
        self.ends.set_mtu(mtu, now);
    }

    /// Which destinations it reaches.
    pub(in crate::datapath) const fn policy(&self) -> &Policy {
        &self.config.policy
    }

    /// The store is here now: new flows do not get there. Those that are open stay.
    pub fn set_stores(&mut self, stores: Vec<SocketAddr>) {
        self.config.policy.set_stores(stores);
    }

    /// Takes a packet from a pod that begins with its IP header, which the router has checked. It
    /// is handed over if its flow is another worker's, or the predecessor's ([`Output::HandOver`]).
    ///
    /// # Errors
    /// The reason to drop it; where the sender may be told, it was.
    pub fn from_pod(&mut self, now: Instant, packet: &PacketBuf<'_>, host: &mut impl Host) -> Step {
        self.awake(now, |egress, now, out| {
            let head = Head::parse(packet.as_slice())?;
            if head.is_fragment {
                return egress.take_fragment(now, &head, packet, host, out);
            }
            egress.take_or_hand_over(now, packet, host, out)
        })
    }

    /// Takes a packet that another worker has handed over.
    ///
    /// # Errors
    /// The reason to drop it; where the sender may be told, it was.
    pub fn from_sibling(
        &mut self,
        now: Instant,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
    ) -> Step {
        self.awake(now, |egress, now, out| {
            egress.take_whole(now, packet, host, out)
        })
    }

    fn take_or_hand_over(
        &mut self,
        now: Instant,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        match self.holder(packet.as_slice()) {
            Some(holder) => {
                out.hand_over(holder, packet);
                Ok(())
            }
            None => self.take_whole(now, packet, host, out),
        }
    }

    fn take_fragment(
        &mut self,
        now: Instant,
        head: &Head,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        let whole = self.fragments.take(now, head, packet.as_slice(), out)?;
        let Some(mut whole) = whole else {
            return Ok(());
        };
        let packet = whole.packet();
        let step = packet.map_or(Ok(()), |packet| {
            self.take_or_hand_over(now, &packet, host, out)
        });
        self.fragments.give_back(head, whole);
        step
    }

    fn take_whole(
        &mut self,
        now: Instant,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        let head = Head::parse(packet.as_slice())?;
        match head.protocol {
            IpProtocol::Tcp => self.take_segment(now, packet, host, out),
            IpProtocol::Udp => self.take_datagram(now, packet, host, out),
            protocol if protocol == icmp_of(head.source) => {
                self.take_icmp(now, &head, packet, host, out)
            }
            _ if self.config.policy.is_closed() => {
                out.report(IcmpError::NetUnreachable, packet.as_slice());
                Err(DropReason::EgressClosed)
            }
            _ => {
                out.report(IcmpError::ProtocolUnreachable, packet.as_slice());
                Err(DropReason::EgressProtocol)
            }
        }
    }

    /// Takes an event of a flow's socket.
    pub fn ready(&mut self, now: Instant, id: FlowId, event: Ready, host: &mut impl Host) {
        self.awake(now, |egress, now, out| match egress.flows.get_mut(id) {
            Some((_, Flow::Connecting { .. })) => egress.connecting(now, id, host, out),
            // It is ready for anything as soon as the pod has answered.
            Some((_, Flow::Dialling(_))) => {}
            Some((_, Flow::Connected { ready, .. })) => {
                ready.readable |= event.readable;
                ready.writable |= event.writable;
                egress.look_after(now, id, host, out);
            }
            Some((_, Flow::Datagrams { readable, .. })) => {
                *readable |= event.readable;
                egress.read_datagrams(now, id, host, out);
            }
            None => {}
        });
    }

    /// The next packet for a pod, or word about one of a pod's. To be called after every other call
    /// until nothing is left.
    pub fn poll_output(&mut self) -> Option<Output<'_>> {
        self.out.poll()
    }

    /// The buffer of the packet that was polled last.
    pub(crate) fn polled(&mut self) -> &mut [u8] {
        self.out.polled()
    }

    /// The packet that was polled last does not get to its pod.
    pub fn undelivered(&mut self, now: Instant, reason: DropReason) {
        if let Some(id) = self.out.latest_asks() {
            let lived = self.clock.look(now, self.next_due());
            self.unreachable(lived, id, reason);
        }
    }

    /// When [`Self::handle_timeout`] is next needed.
    #[must_use]
    pub fn poll_at(&self) -> Option<Instant> {
        self.next_due().map(|due| self.clock.outside(due))
    }

    fn next_due(&self) -> Option<Instant> {
        let dues = [self.flows.next_due(), self.fragments.next_due()];
        dues.into_iter().flatten().min()
    }

    /// Calls with the time of flows, which is not that of others (see [`clock`]).
    fn awake<R>(
        &mut self,
        now: Instant,
        call: impl FnOnce(&mut Self, Instant, &mut Outbox) -> R,
    ) -> R {
        let lived = self.clock.look(now, self.next_due());
        let mut out = std::mem::take(&mut self.out);
        let result = call(self, lived, &mut out);
        self.out = out;
        result
    }

    /// Does what is due at `now`. What there is no room for stays due: it goes on when the output has
    /// been polled.
    pub fn handle_timeout(&mut self, now: Instant, host: &mut impl Host) {
        self.awake(now, |egress, now, out| egress.do_due(now, host, out));
    }

    fn do_due(&mut self, now: Instant, host: &mut impl Host, out: &mut Outbox) {
        self.fragments.expire(now, out);
        while !out.is_full()
            && let Some(id) = self.flows.pop_due(now)
        {
            let mut active = self.flows.active(id);
            let limit = match self.flows.get_mut(id) {
                Some((_, Flow::Connecting { .. })) => CONNECT_LIMIT,
                Some((_, Flow::Dialling(_))) => DIAL_LIMIT,
                Some((_, Flow::Connected { connection, .. })) => {
                    active = active.max(connection.heard);
                    self.config.limits.tcp_idle
                }
                Some((key, Flow::Datagrams { .. })) => self.idle(key),
                None => continue,
            };
            if active + limit <= now {
                self.counters.expired += 1;
                self.end(now, id, host, out);
                continue;
            }
            self.flows.schedule(id, active + limit);
            self.dialling(now, id, host, out);
            self.look_after(now, id, host, out);
            self.read_datagrams(now, id, host, out);
        }
    }

    /// Ends the flows of a pod that is no longer there. Of a stream that the pod has ended, and the
    /// host has all of, the host sends the rest and the end, as the kernel does for a process.
    pub fn forget_pod(&mut self, address: IpAddr, host: &mut impl Host) {
        self.fragments.forget_pod(address, &mut self.out);
        let its: Vec<_> = self.flows.of_pod(address).collect();
        self.published.retain(|pod| pod.ip() != address);
        for id in its {
            let flow = self.flows.get_mut(id);
            if flow.is_some_and(|(_, flow)| flow.is_delivered()) {
                self.remove(id, false, host);
            } else {
                self.give_up(id, HostError::HostUnreachable, host);
            }
        }
    }

    /// The flow with these ends, if there is one.
    #[must_use]
    pub fn find(&self, key: &FlowKey) -> Option<FlowId> {
        self.flows.find(&Key::try_from(*key).ok()?)
    }

    /// A flow's ends, if it is there still.
    #[must_use]
    pub fn key(&self, id: FlowId) -> Option<FlowKey> {
        self.flows.get(id).map(|(key, _)| key.into())
    }

    /// How much it may have.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.config.limits
    }

    /// What became of flows.
    #[must_use]
    pub fn counters(&self) -> EgressCounters {
        EgressCounters {
            open: self.flows.len() as u64,
            ..self.counters
        }
    }

    /// Their ends, in no particular order.
    pub fn keys(&self) -> impl Iterator<Item = FlowKey> {
        self.flows.iter().map(|(key, _, _)| key.into())
    }

    /// The flows, in no particular order.
    pub fn flows(&self) -> impl Iterator<Item = FlowInfo> {
        let infos = self.flows.iter();
        infos.map(|(key, flow, usage)| flow.info(key, usage, &self.clock))
    }

    fn take_segment(
        &mut self,
        now: Instant,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        let (key, at) = self.identify(packet, Protocol::Tcp)?;
        if at.l4 != header_len(key.pod.ip()) && key.pod.is_ipv6() {
            // smoltcp finds no segment behind extension headers, and no kernel puts one there.
            return Err(DropReason::Ipv6ExtensionHeaders);
        }
        let opens = opens(packet.as_slice(), &at);
        let resets = TcpPacket::new_unchecked(&packet.as_slice()[at.l4..]).rst();
        let Some(id) = self.flows.find(&key) else {
            if opens {
                return self.connect(now, key, &packet.as_slice()[..at.payload], host, out);
            }
            self.ends.refuse(now, packet.as_slice(), out);
            return Err(DropReason::EgressNoFlow);
        };
        match self.flows.get_mut(id) {
            Some((_, Flow::Connected { connection, .. })) => {
                self.ends.receive(now, connection, packet.as_slice(), out);
                self.look_after(now, id, host, out);
            }
            Some((_, Flow::Dialling(dial))) => {
                let connection = &mut dial.connection;
                self.ends.receive(now, connection, packet.as_slice(), out);
                self.dialling(now, id, host, out);
            }
            Some((_, Flow::Connecting { .. })) if resets => {
                self.remove(id, true, host);
            }
            // The pod asks again; it will have its answer.
            Some(_) | None => {}
        }
        Ok(())
    }

    /// The flow that a packet belongs to, and its parts.
    fn identify(
        &self,
        packet: &PacketBuf<'_>,
        protocol: Protocol,
    ) -> Result<(Key, Transport), DropReason> {
        let bytes = packet.as_slice();
        let at = Transport::parse(bytes, 0).map_err(|_| DropReason::EgressMalformed)?;
        let is_verified = packet.offload().checksum != Checksum::Unknown;
        if !is_verified && at.checksum_state(bytes) == ChecksumState::Invalid {
            return Err(DropReason::EgressMalformed);
        }
        let key = key_of(bytes, protocol, &at);
        if !self.config.carries(key.pod) {
            return Err(DropReason::EgressFamily);
        }
        if key.pod.port() == 0 || key.remote.port() == 0 {
            return Err(DropReason::EgressMalformed);
        }
        Ok((key, at))
    }

    /// Where a new flow goes, if it may, and there is room for it.
    fn admit(
        &mut self,
        now: Instant,
        key: Key,
        offender: &[u8],
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Result<Target, DropReason> {
        let target = self.target(key);
        let target = target.inspect_err(|reason| report_refusal(*reason, offender, out))?;
        if target == Target::Service && !self.is_local(key) {
            // Which is refused, so nobody makes room for it.
            return Ok(target);
        }
        let room = self.make_room(now, key.pod.ip(), Direction::Out, host, out);
        room.inspect_err(|_| out.report(IcmpError::HostUnreachable, offender))?;
        Ok(target)
    }

    /// Where a new flow goes, if it may.
    fn target(&self, key: Key) -> Result<Target, DropReason> {
        if self.is_gateway(key.remote.ip()) {
            Ok(Target::Service)
        } else if self.is_local(key) {
            let to = self.config.policy.check(key.protocol, key.remote)?;
            Ok(Target::Outside(to))
        } else {
            // There is no way back to it.
            Err(DropReason::EgressNoFlow)
        }
    }

    /// Makes room for one more flow of a pod.
    fn make_room(
        &mut self,
        now: Instant,
        pod: IpAddr,
        direction: Direction,
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        if let Some(least) = self.flows.victim(now, EVICTABLE, pod, direction)? {
            self.counters.evicted += 1;
            self.end(now, least, host, out);
        }
        Ok(())
    }

    /// Has the host make a socket for the next flow.
    fn begin(&self, key: Key, target: Target, host: &mut impl Host) -> Result<(), HostError> {
        let id = self.flows.next_id();
        match target {
            Target::Outside(to) if self.is_mapped(key) => {
                host.open(id, key.protocol, version_of(to))
            }
            Target::Outside(to) => host.connect(id, key.protocol, to),
            Target::Service if self.is_local(key) => host.serve(id, key.into()),
            Target::Service => Err(HostError::Refused),
        }
    }

    /// Whether a flow's pod is one of this node's.
    fn is_local(&self, key: Key) -> bool {
        self.config.subnets.is_none() || self.config.is_in_subnet(key.pod.ip())
    }

    /// How long a flow of datagrams may be idle.
    fn idle(&self, key: Key) -> Duration {
        match self.config.limits.idle(key.protocol) {
            limit if !self.is_gateway(key.remote.ip()) => limit,
            limit => limit.min(self.config.limits.service_idle),
        }
    }

    /// Whether a pod's packet belongs to a mapping if it begins a flow. Behind a node's gateway each
    /// port is a service, and behind an endpoint each is a program.
    fn is_mapped(&self, key: Key) -> bool {
        key.protocol != Protocol::Tcp
            && self.config.subnets.is_some()
            && !self.is_gateway(key.remote.ip())
    }

    fn is_gateway(&self, address: IpAddr) -> bool {
        self.config.is_gateway(address)
    }

    /// The mapping of a pod's packet, if it belongs to one.
    fn mapping_of(&self, key: &Key) -> Key {
        match self.config.policy.translated(key.remote.ip()) {
            Some(ipv4) => key.mapping_to(SocketAddr::new(ipv4.into(), 0)),
            None => key.mapping_to(key.pod),
        }
    }

    /// Begins a connection for a SYN, given without payload.
    fn connect(
        &mut self,
        now: Instant,
        key: Key,
        syn: &[u8],
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        let target = self.admit(now, key, syn, host, out)?;
        let mut syn = Box::<[u8]>::from(syn);
        head::set_len(&mut syn);
        match self.begin(key, target, host) {
            Ok(()) => {}
            Err(HostError::Refused) if target == Target::Service => {
                self.ends.refuse(now, &syn, out);
                return Err(DropReason::GatewayPort);
            }
            Err(error) => return self.unconnected(now, error, &syn, out),
        }
        self.counters.opened += 1;
        let id = self
            .flows
            .insert(now, Direction::Out, key, Flow::Connecting { syn });
        self.flows.schedule(id, now + CONNECT_LIMIT);
        Ok(())
    }

    /// Tells a pod why there is no connection.
    fn unconnected(
        &mut self,
        now: Instant,
        error: HostError,
        syn: &[u8],
        out: &mut Outbox,
    ) -> Step {
        let icmp = match error {
            HostError::Refused | HostError::Reset => {
                self.counters.refused += 1;
                self.ends.refuse(now, syn, out);
                return Ok(());
            }
            HostError::NetUnreachable => IcmpError::NetUnreachable,
            HostError::HostUnreachable => IcmpError::HostUnreachable,
            HostError::NotPermitted => IcmpError::Prohibited,
            HostError::TimedOut => {
                self.counters.unreachable += 1;
                // Silence is what the pod would have heard.
                return Ok(());
            }
            HostError::WouldBlock
            | HostError::TooLong
            | HostError::Exhausted
            | HostError::Failed => {
                out.report(IcmpError::HostUnreachable, syn);
                return Err(match error {
                    HostError::Exhausted => DropReason::EgressExhausted,
                    _ => DropReason::EgressHostFailed,
                });
            }
        };
        self.counters.unreachable += 1;
        out.report(icmp, syn);
        Ok(())
    }

    /// Looks how far the host's connection is.
    fn connecting(&mut self, now: Instant, id: FlowId, host: &mut impl Host, out: &mut Outbox) {
        match host.connected(id) {
            Ok(()) => self.connected(now, id, host, out),
            Err(HostError::WouldBlock) => {}
            Err(error) => {
                if let Some((_, Flow::Connecting { syn })) = self.remove(id, false, host)
                    && let Err(reason) = self.unconnected(now, error, &syn, out)
                {
                    out.lose(reason, 1);
                }
            }
        }
    }

    fn connected(&mut self, now: Instant, id: FlowId, host: &mut impl Host, out: &mut Outbox) {
        let Some((key, flow)) = self.flows.get_mut(id) else {
            return;
        };
        let grant = self.memory.take(key.pod.ip());
        let mut connection = Box::new(self.ends.accept(now, key, grant));
        if let Flow::Connecting { syn } = flow {
            self.ends.receive(now, &mut connection, syn, out);
        }
        let ready = Ready {
            readable: true,
            writable: true,
        };
        *flow = Flow::Connected { connection, ready };
        self.flows.count(id, now, Moved::default());
        self.flows.schedule(id, now + self.config.limits.tcp_idle);
        self.look_after(now, id, host, out);
    }

    fn take_datagram(
        &mut self,
        now: Instant,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        let (key, at) = self.identify(packet, Protocol::Udp)?;
        let bytes = packet.as_slice();
        let (id, to) = self.datagram_flow(now, key, bytes, host, out)?;
        let payload = &bytes[at.payload..at.end];
        self.mark(id, bytes, to, host);
        let size = packet.offload().gso.map_or(0, |gso| gso.size);
        if size == 0 {
            return self.write_datagram(now, (id, key, to), payload, host, out);
        }
        if host.send_train(id, to, payload, size).is_ok() {
            self.count_sent(now, id, payload.len());
            return Ok(());
        }
        // What is wrong is found out one by one.
        payload
            .chunks(size.into())
            .try_for_each(|payload| self.write_datagram(now, (id, key, to), payload, host, out))
    }

    fn take_icmp(
        &mut self,
        now: Instant,
        head: &Head,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        let bytes = packet.as_slice();
        let identifier = match self.message(head, bytes)? {
            Message::Echo { identifier } => identifier,
            Message::Unreachable { code, offender } => {
                return self.take_unreachable(head.source, code, offender, host);
            }
            Message::Other => return Err(DropReason::EgressProtocol),
        };
        let key = Key::of_ping(head, identifier);
        let (id, to) = self.datagram_flow(now, key, bytes, host, out)?;
        self.mark(id, bytes, to, host);
        let message = head.payload(bytes);
        match self.config.policy.translated(head.destination) {
            None => self.write_datagram(now, (id, key, to), message, host, out),
            Some(ipv4) => {
                // The host's socket is one of IPv4, where requests have another type; their checksum the
                // host makes.
                let mut buffer = out.spare();
                let copy = &mut buffer[..message.len()];
                copy.copy_from_slice(message);
                copy[0] = echo_request(ipv4.into());
                let step = self.write_datagram(now, (id, key, to), copy, host, out);
                out.give_back(buffer);
                step
            }
        }
    }

    /// What a pod says by ICMP, if that is whole.
    fn message<'a>(&self, head: &Head, packet: &'a [u8]) -> Result<Message<'a>, DropReason> {
        let message = Message::parse(head, packet).ok_or(DropReason::EgressMalformed)?;
        if !head::has_icmp_checksum(head, packet) {
            return Err(DropReason::EgressMalformed);
        }
        if !self.config.carries(SocketAddr::new(head.source, 0)) {
            return Err(DropReason::EgressFamily);
        }
        Ok(message)
    }

    /// Tells the host what a flow's datagrams have in their headers, if that is new.
    fn mark(&mut self, id: FlowId, packet: &[u8], to: Option<SocketAddr>, host: &mut impl Host) {
        let Some((key, flow)) = self.flows.get_mut(id) else {
            return;
        };
        // Who has one other end has a socket of its own IP version, but where that is translated.
        let is_translated = self.config.policy.translated(key.remote.ip()).is_some();
        let version = match to {
            Some(to) => version_of(to),
            None if is_translated => IpVersion::Ipv4,
            None => version_of(key.pod),
        };
        let now = Marks::behind(packet, version);
        if let Flow::Datagrams { marks, .. } = flow
            && *marks != Some(now)
        {
            *marks = Some(now);
            host.mark(id, now);
        }
    }

    /// The flow of a datagram, which it begins if there is none, and, if that is a mapping, where
    /// it goes on the host.
    fn datagram_flow(
        &mut self,
        now: Instant,
        key: Key,
        packet: &[u8],
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Result<(FlowId, Option<SocketAddr>), DropReason> {
        if let Some(id) = self.flows.find(&key) {
            return Ok((id, None));
        }
        if self.is_mapped(key)
            && let Some(id) = self.flows.find(&self.mapping_of(&key))
        {
            let to = self.turn(id, key, packet, out)?;
            return Ok((id, Some(to)));
        }
        let target = self.admit(now, key, packet, host, out)?;
        let claim = match target {
            Target::Outside(_) if self.is_mapped(key) => self.claim(&key),
            Target::Outside(_) | Target::Service => Claim::Free,
        };
        if claim == Claim::Anothers {
            // It has become so since this packet was handed over.
            return Err(DropReason::EgressHandoverFull);
        }
        self.begin(key, target, host).map_err(|error| {
            self.release(&key, claim);
            if let Some(icmp) = error.to_icmp() {
                out.report(icmp, packet);
            }
            match (target, error) {
                (Target::Service, HostError::Refused) => DropReason::GatewayPort,
                _ => error.to_reason(key.protocol),
            }
        })?;
        Ok(match target {
            Target::Outside(to) if self.is_mapped(key) => {
                let latest = Some(Destination {
                    remote: key.remote,
                    to,
                });
                let flow = Flow::Datagrams {
                    readable: false,
                    marks: None,
                    latest,
                    claim,
                };
                let mapping = self.mapping_of(&key);
                let id = self.add_datagrams(now, Direction::Out, mapping, flow);
                (id, Some(to))
            }
            _ => {
                let id = self.add_datagrams(now, Direction::Out, key, Flow::DATAGRAMS);
                (id, None)
            }
        })
    }

    /// Turns a mapping to where a pod sends now, if it may.
    fn turn(
        &mut self,
        id: FlowId,
        key: Key,
        packet: &[u8],
        out: &mut Outbox,
    ) -> Result<SocketAddr, DropReason> {
        let known = self.flows.get(id).and_then(|(_, flow)| flow.latest());
        if let Some(known) = known.filter(|known| known.remote == key.remote) {
            return Ok(known.to);
        }
        let to = self.config.policy.check(key.protocol, key.remote);
        let to = to.inspect_err(|reason| report_refusal(*reason, packet, out))?;
        if let Some((_, Flow::Datagrams { latest, .. })) = self.flows.get_mut(id) {
            *latest = Some(Destination {
                remote: key.remote,
                to,
            });
        }
        Ok(to)
    }

    fn add_datagrams(
        &mut self,
        now: Instant,
        direction: Direction,
        key: Key,
        flow: Flow,
    ) -> FlowId {
        self.counters.opened += 1;
        let id = self.flows.insert(now, direction, key, flow);
        self.flows.schedule(id, now + self.idle(key));
        id
    }

    /// Gives a datagram to the host. To fail is no use of a flow.
    fn write_datagram(
        &mut self,
        now: Instant,
        (id, key, to): (FlowId, Key, Option<SocketAddr>),
        payload: &[u8],
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        self.offer((id, key, to), payload, host, out)?;
        self.count_sent(now, id, payload.len());
        Ok(())
    }

    fn count_sent(&mut self, now: Instant, id: FlowId, sent: usize) {
        let moved = Moved { sent, received: 0 };
        self.flows.count(id, now, moved);
    }

    fn offer(
        &mut self,
        (id, key, to): (FlowId, Key, Option<SocketAddr>),
        payload: &[u8],
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Step {
        // What may be wrong with an earlier datagram, or with this one if it comes again.
        let mut earlier = None;
        for _ in 0..ATTEMPTS {
            let written = match to {
                Some(to) => host.send(id, to, payload),
                None => host.write(id, payload).map(|_| ()),
            };
            match written {
                Ok(()) => {
                    if let Some(error) = earlier {
                        refuse(key, error, &[], out);
                    }
                    return Ok(());
                }
                Err(HostError::WouldBlock) => return Err(DropReason::EgressHostFull),
                Err(error) => match self.hear((id, key), payload, host, out) {
                    Heard::OfEarlier => {}
                    Heard::TooLong => return Err(DropReason::EgressTooLong),
                    Heard::Nothing if error.may_be_earlier() && earlier.is_none() => {
                        earlier = Some(error);
                    }
                    Heard::Nothing => return Err(refuse(key, error, payload, out)),
                },
            }
        }
        Err(DropReason::EgressUnreachable)
    }

    /// Gives a pod the datagrams that are there for it.
    fn read_datagrams(&mut self, now: Instant, id: FlowId, host: &mut impl Host, out: &mut Outbox) {
        let Some((key, flow)) = self.flows.get_mut(id) else {
            return;
        };
        let latest = flow.latest();
        let Flow::Datagrams { readable, .. } = flow else {
            return;
        };
        let flow = Reading {
            id,
            key,
            latest,
            config: &self.config,
        };
        let read = self.datagrams.read(&flow, readable, host, out);
        let goes_on = *readable;
        if let Some(error) = read.error {
            let key = Key {
                remote: latest.map_or(key.remote, |latest| latest.remote),
                ..key
            };
            if self.hear((id, key), &[], host, out) == Heard::Nothing {
                // There is no datagram at hand that could be dropped.
                refuse(key, error, &[], out);
            }
        }
        let moved = Moved {
            sent: 0,
            received: read.bytes,
        };
        if read.is_use {
            self.flows.count(id, now, moved);
        } else {
            self.flows.count_idle(id, moved);
        }
        if goes_on {
            // The others have their turn first.
            self.flows.schedule(id, now + LATER);
        }
    }

    /// Moves what can be moved between a connection's ends.
    fn look_after(&mut self, now: Instant, id: FlowId, host: &mut impl Host, out: &mut Outbox) {
        let Some((_, Flow::Connected { connection, ready })) = self.flows.get_mut(id) else {
            return;
        };
        let moved = connection.relay(id, ready, host);
        if moved.is_err() {
            connection.abort();
        }
        match self.ends.transmit(now, connection, out) {
            Outcome::Open(due) => {
                if let Ok(moved) = moved
                    && moved.is_any()
                {
                    self.flows.count(id, now, moved);
                }
                if let Some(due) = due {
                    self.flows.schedule(id, due.max(now + LATER));
                }
            }
            Outcome::Over { reset } => {
                self.counters.reset += u64::from(reset);
                self.remove(id, reset, host);
            }
        }
    }

    /// Ends a flow before its time; those at both ends are told.
    fn end(&mut self, now: Instant, id: FlowId, host: &mut impl Host, out: &mut Outbox) {
        if let Some((_, flow)) = self.flows.get_mut(id)
            && let Some(connection) = flow.connection()
        {
            connection.abort();
            self.ends.transmit(now, connection, out);
        }
        self.give_up(id, HostError::TimedOut, host);
    }

    /// Removes a flow before its time, and says why to who waits for its pod.
    fn give_up(&mut self, id: FlowId, error: HostError, host: &mut impl Host) {
        if let Some((_, Flow::Dialling(_))) = self.flows.get_mut(id) {
            match error {
                HostError::Refused => self.counters.refused += 1,
                _ => self.counters.unreachable += 1,
            }
            host.dialled(id, Err(error));
        }
        self.remove(id, true, host);
    }

    fn remove(&mut self, id: FlowId, reset: bool, host: &mut impl Host) -> Option<(Key, Flow)> {
        let (key, mut flow) = self.flows.remove(id)?;
        host.close(id, reset);
        if let Flow::Datagrams { claim, .. } = flow {
            self.release(&key, claim);
        }
        if let Some(connection) = flow.connection() {
            self.memory.give_back(key.pod.ip(), connection.grant);
        }
        Some((key, flow))
    }
}

const fn version_of(address: SocketAddr) -> IpVersion {
    match address {
        SocketAddr::V4(_) => IpVersion::Ipv4,
        SocketAddr::V6(_) => IpVersion::Ipv6,
    }
}

/// Tells a pod that its packet goes nowhere, if a rule forbids it.
fn report_refusal(reason: DropReason, offender: &[u8], out: &mut Outbox) {
    match reason {
        DropReason::EgressClosed => out.report(IcmpError::NetUnreachable, offender),
        DropReason::EgressNoFlow => {}
        _ => out.report(IcmpError::Prohibited, offender),
    }
}

/// Tells a pod why a datagram with this payload does not go on, and returns the reason to drop it.
fn refuse(key: Key, error: HostError, payload: &[u8], out: &mut Outbox) -> DropReason {
    if let Some(icmp) = error.to_icmp() {
        out.report(icmp, Quote::new(key, payload).as_slice());
    }
    error.to_reason(key.protocol)
}
