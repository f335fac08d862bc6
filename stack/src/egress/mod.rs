//! Egress: traffic of pods to addresses outside the overlay ends here and goes on by sockets of the
//! host, as in slirp4netns and pasta. It needs no privileges and no rules in the host's kernel.
//!
//! A packet that the router hands over with [`crate::node::Verdict::Egress`] belongs to a flow, by
//! its addresses and ports, and each flow has one socket of the host. A pod's TCP connection is
//! answered when the host's connection is there, so that a pod sees what becomes of it, and each
//! end takes no more than the other: what a pod does not read stays in the host's socket.
//!
//! [`Egress`] does no I/O: packets, events of sockets and the time go in, and what is to be done
//! goes out through [`Host`] and [`Pods`].

use std::net::{Ipv4Addr, SocketAddrV4};

use muslin_encap::buffer::PacketBuf;
use muslin_encap::checksum::{self, Transported};
use muslin_encap::headers::Transport;
use muslin_encap::overhead::Mtu;
use muslin_encap::virtio::Checksum;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpProtocol, Ipv4Packet, TcpPacket};

use crate::drops::DropReason;
use crate::hash::Seed;
use crate::icmp::IcmpError;

mod host;
mod memory;
mod policy;
mod table;
mod tcp;
#[cfg(test)]
mod tests;

pub use host::{FlowId, Host, HostError, Pods, Protocol};
pub use policy::{LINK_LOCAL, Policy};

use memory::Memory;
use table::Table;
use tcp::{Connection, Ends, Outcome};

/// How long the host may try to connect; Linux does for a little more than two minutes.
const CONNECT_LIMIT: Duration = Duration::from_secs(150);
/// How long a flow must have been idle to make room for another.
const EVICTABLE: Duration = Duration::from_secs(10);

/// What egress is.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which destinations it reaches.
    pub policy: Policy,
    /// MTU of pods.
    pub mtu: Mtu,
    /// Bounds.
    pub limits: Limits,
    /// Unpredictable; the same seed gives the same run.
    pub random_seed: u64,
}

/// Bounds of the flow table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Flows of all protocols.
    pub flows: usize,
    /// Bytes of the buffers of TCP connections.
    pub memory: usize,
    /// How long a TCP connection may be idle (RFC 5382 section 5: no less than 2 hours 4 minutes).
    pub tcp_idle: Duration,
}

impl Limits {
    /// The same bounds for each of several workers.
    #[must_use]
    pub fn shared(self, workers: usize) -> Self {
        let workers = workers.max(1);
        Self {
            flows: self.flows.div_ceil(workers),
            memory: self.memory / workers,
            ..self
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: 4096,
            memory: 128 << 20,
            tcp_idle: Duration::from_secs(2 * 3600 + 4 * 60),
        }
    }
}

/// What makes packets one flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// Its protocol.
    pub protocol: Protocol,
    /// The pod's end.
    pub pod: SocketAddrV4,
    /// The other end, as the pod calls it.
    pub remote: SocketAddrV4,
}

/// What a socket is ready for, as far as is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ready {
    /// There may be something to read, the end or an error included.
    pub readable: bool,
    /// There may be room to write.
    pub writable: bool,
}

/// What became of flows since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Flows that are there now.
    pub open: u64,
    /// Flows that began.
    pub opened: u64,
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

impl Counters {
    /// Adds another worker's counters.
    pub fn add(&mut self, other: &Self) {
        self.open += other.open;
        self.opened += other.opened;
        self.refused += other.refused;
        self.unreachable += other.unreachable;
        self.reset += other.reset;
        self.expired += other.expired;
        self.evicted += other.evicted;
    }
}

/// The flows of one worker.
pub struct Egress {
    config: Config,
    flows: Table<Flow>,
    memory: Memory,
    ends: Ends,
    counters: Counters,
}

/// What a flow is waiting for or doing.
enum Flow {
    /// The host connects; the pod's SYN waits for how that ends.
    Connecting { syn: Box<[u8]> },
    /// Bytes go both ways.
    Connected {
        connection: Box<Connection>,
        ready: Ready,
    },
}

type Step = Result<(), DropReason>;

impl Egress {
    /// Egress without flows.
    #[must_use]
    pub fn new(config: Config, now: Instant) -> Self {
        Self {
            flows: Table::new(config.limits.flows, Seed(config.random_seed)),
            memory: Memory::new(config.limits.memory, config.limits.flows),
            ends: Ends::new(config.mtu, config.random_seed, now),
            counters: Counters::default(),
            config,
        }
    }

    /// Takes a packet from a pod that begins with its IPv4 header, which the router has checked.
    ///
    /// # Errors
    /// The reason to drop it; where the sender may be told, it was.
    pub fn from_pod(
        &mut self,
        now: Instant,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
        pods: &mut impl Pods,
    ) -> Step {
        let view = Ipv4Packet::new_unchecked(packet.as_slice());
        if view.more_frags() || view.frag_offset() != 0 {
            return Err(DropReason::EgressFragment);
        }
        match view.next_header() {
            IpProtocol::Tcp => self.from_tcp(now, packet, host, pods),
            _ => {
                pods.report(now, IcmpError::ProtocolUnreachable, packet.as_slice());
                Err(DropReason::EgressProtocol)
            }
        }
    }

    /// Takes an event of a flow's socket.
    pub fn ready(
        &mut self,
        now: Instant,
        id: FlowId,
        event: Ready,
        host: &mut impl Host,
        pods: &mut impl Pods,
    ) {
        match self.flows.get_mut(id) {
            Some((_, Flow::Connecting { .. })) => self.connecting(now, id, host, pods),
            Some((_, Flow::Connected { ready, .. })) => {
                ready.readable |= event.readable;
                ready.writable |= event.writable;
                self.look_after(now, id, host, pods);
            }
            None => {}
        }
    }

    /// When [`Self::handle_timeout`] is next needed.
    #[must_use]
    pub fn poll_at(&self) -> Option<Instant> {
        self.flows.next_due()
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant, host: &mut impl Host, pods: &mut impl Pods) {
        while let Some(id) = self.flows.pop_due(now) {
            let active = self.flows.active(id);
            let limit = match self.flows.get_mut(id) {
                Some((_, Flow::Connecting { .. })) => CONNECT_LIMIT,
                Some((_, Flow::Connected { .. })) => self.config.limits.tcp_idle,
                None => continue,
            };
            if active + limit <= now {
                self.counters.expired += 1;
                self.end(now, id, host, pods);
                continue;
            }
            self.flows.schedule(id, active + limit);
            self.look_after(now, id, host, pods);
        }
    }

    /// Ends the flows of a pod that is no longer there.
    pub fn forget_pod(&mut self, address: Ipv4Addr, host: &mut impl Host) {
        let its = self
            .flows
            .iter()
            .filter(|(_, key, _)| *key.pod.ip() == address);
        let its: Vec<_> = its.map(|(id, ..)| id).collect();
        for id in its {
            self.remove(id, true, host);
        }
    }

    /// What became of flows.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            open: self.flows.len() as u64,
            ..self.counters
        }
    }

    fn from_tcp(
        &mut self,
        now: Instant,
        packet: &PacketBuf<'_>,
        host: &mut impl Host,
        pods: &mut impl Pods,
    ) -> Step {
        let (key, at) = self.identify(packet, Protocol::Tcp)?;
        let segment = TcpPacket::new_unchecked(&packet.as_slice()[at.l4..]);
        let opens = segment.syn() && !segment.ack() && !segment.rst();
        let resets = segment.rst();
        let Some(id) = self.flows.find(&key) else {
            if opens {
                return self.connect(now, key, &packet.as_slice()[..at.payload], host, pods);
            }
            self.ends.refuse(now, packet.as_slice(), pods);
            return Err(DropReason::EgressNoFlow);
        };
        match self.flows.get_mut(id) {
            Some((_, Flow::Connected { connection, .. })) => {
                self.ends.receive(now, connection, packet.as_slice(), pods);
                self.look_after(now, id, host, pods);
            }
            Some((_, Flow::Connecting { .. })) if resets => {
                self.remove(id, true, host);
            }
            // The pod asks again; it will have its answer.
            Some((_, Flow::Connecting { .. })) | None => {}
        }
        Ok(())
    }

    /// The flow that a packet belongs to, and its parts.
    fn identify(
        &self,
        packet: &PacketBuf<'_>,
        protocol: Protocol,
    ) -> Result<(FlowKey, Transport), DropReason> {
        let bytes = packet.as_slice();
        let at = Transport::parse(bytes, 0).map_err(|_| DropReason::EgressMalformed)?;
        let is_verified = packet.offload().checksum != Checksum::Unknown;
        if !is_verified && checksum::check(bytes, &at) == Transported::Invalid {
            return Err(DropReason::EgressMalformed);
        }
        let view = Ipv4Packet::new_unchecked(bytes);
        let port = |offset| u16::from_be_bytes([bytes[at.l4 + offset], bytes[at.l4 + offset + 1]]);
        let key = FlowKey {
            protocol,
            pod: SocketAddrV4::new(view.src_addr(), port(0)),
            remote: SocketAddrV4::new(view.dst_addr(), port(2)),
        };
        if key.pod.port() == 0 || key.remote.port() == 0 {
            return Err(DropReason::EgressMalformed);
        }
        Ok((key, at))
    }

    /// Where a new flow goes, if it may, and there is room for it.
    fn admit(
        &mut self,
        now: Instant,
        key: FlowKey,
        offender: &[u8],
        host: &mut impl Host,
        pods: &mut impl Pods,
    ) -> Result<SocketAddrV4, DropReason> {
        let to = self.config.policy.check(key.protocol, key.remote);
        let to = to.inspect_err(|_| pods.report(now, IcmpError::Prohibited, offender))?;
        if self.flows.is_full() {
            let oldest = self.flows.oldest(now, EVICTABLE);
            let oldest = oldest.ok_or(DropReason::EgressTableFull)?;
            self.counters.evicted += 1;
            self.end(now, oldest, host, pods);
        }
        Ok(to)
    }

    /// Begins a connection for a SYN, given without payload.
    fn connect(
        &mut self,
        now: Instant,
        key: FlowKey,
        syn: &[u8],
        host: &mut impl Host,
        pods: &mut impl Pods,
    ) -> Step {
        let to = self.admit(now, key, syn, host, pods)?;
        let mut syn = Box::from(syn);
        set_total_len(&mut syn);
        let connects = host.connect(self.flows.next_id(), key.protocol, to);
        if let Err(error) = connects {
            return self.unconnected(now, error, &syn, pods);
        }
        self.counters.opened += 1;
        let id = self.flows.insert(now, key, Flow::Connecting { syn });
        self.flows.schedule(id, now + CONNECT_LIMIT);
        Ok(())
    }

    /// Tells a pod why there is no connection.
    fn unconnected(
        &mut self,
        now: Instant,
        error: HostError,
        syn: &[u8],
        pods: &mut impl Pods,
    ) -> Step {
        let icmp = match error {
            HostError::Refused | HostError::Reset => {
                self.counters.refused += 1;
                self.ends.refuse(now, syn, pods);
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
            HostError::WouldBlock | HostError::TooLong | HostError::Failed => {
                return Err(DropReason::EgressHostFailed);
            }
        };
        self.counters.unreachable += 1;
        pods.report(now, icmp, syn);
        Ok(())
    }

    /// Looks how far the host's connection is.
    fn connecting(&mut self, now: Instant, id: FlowId, host: &mut impl Host, pods: &mut impl Pods) {
        match host.connected(id) {
            Ok(()) => self.connected(now, id, host, pods),
            Err(HostError::WouldBlock) => {}
            Err(error) => {
                if let Some((_, Flow::Connecting { syn })) = self.remove(id, false, host) {
                    // There is no packet at hand that could be dropped.
                    let _ = self.unconnected(now, error, &syn, pods);
                }
            }
        }
    }

    fn connected(&mut self, now: Instant, id: FlowId, host: &mut impl Host, pods: &mut impl Pods) {
        let Some((key, flow)) = self.flows.get_mut(id) else {
            return;
        };
        let mut connection = Box::new(Connection::new(key, self.memory.take()));
        if let Flow::Connecting { syn } = flow {
            self.ends.receive(now, &mut connection, syn, pods);
        }
        let ready = Ready {
            readable: true,
            writable: true,
        };
        *flow = Flow::Connected { connection, ready };
        self.flows.touch(id, now);
        self.flows.schedule(id, now + self.config.limits.tcp_idle);
        self.look_after(now, id, host, pods);
    }

    /// Moves what can be moved between a connection's ends.
    fn look_after(&mut self, now: Instant, id: FlowId, host: &mut impl Host, pods: &mut impl Pods) {
        let Some((_, Flow::Connected { connection, ready })) = self.flows.get_mut(id) else {
            return;
        };
        let moved = connection.relay(id, ready, host);
        if moved.is_err() {
            connection.abort();
        }
        match self.ends.transmit(now, connection, pods) {
            Outcome::Open(due) => {
                if moved == Ok(true) {
                    self.flows.touch(id, now);
                }
                if let Some(due) = due {
                    self.flows.schedule(id, due.max(now));
                }
            }
            Outcome::Over { reset } => {
                self.counters.reset += u64::from(reset);
                self.remove(id, reset, host);
            }
        }
    }

    /// Ends a flow before its time; those at both ends are told.
    fn end(&mut self, now: Instant, id: FlowId, host: &mut impl Host, pods: &mut impl Pods) {
        if let Some((_, Flow::Connected { connection, .. })) = self.flows.get_mut(id) {
            connection.abort();
            self.ends.transmit(now, connection, pods);
        }
        self.remove(id, true, host);
    }

    fn remove(&mut self, id: FlowId, reset: bool, host: &mut impl Host) -> Option<(FlowKey, Flow)> {
        let removed = self.flows.remove(id)?;
        host.close(id, reset);
        if let (_, Flow::Connected { connection, .. }) = &removed {
            self.memory.give_back(connection.grant);
        }
        Some(removed)
    }
}

/// Makes a packet's total length that of what there is of it.
fn set_total_len(packet: &mut [u8]) {
    let len = packet.len() as u16;
    let mut view = Ipv4Packet::new_unchecked(packet);
    view.set_total_len(len);
    view.fill_checksum();
}
