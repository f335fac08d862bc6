//! Traffic: frames and datagrams through nodes and links.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ipip;
use muslin_encap::overhead::Format;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpProtocol, IpVersion, Ipv4Packet, Ipv4Repr};

use super::Violation;
use super::check;
use super::cluster::{Cluster, Due, LOCAL, in_words};
use super::device::Identity;
use super::link::Fate;
use super::machine::Who;
use crate::drops::DropReason;
use crate::lease::Backend;
use crate::node::{Node, Verdict};
use crate::port::PortId;
use crate::work;

/// Datagrams that an eavesdropper remembers.
const CAPTURED: usize = 16;
/// From where nobody's datagrams come (TEST-NET-3).
const OUTSIDER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
/// How long a turn of a port takes.
const TURN: Duration = Duration::from_micros(200);

impl Cluster {
    /// A frame is ready to be taken from a port, which has its turn when all others of this moment
    /// are.
    pub(super) fn hear_device(&mut self, who: Who, port: PortId, frame: Vec<u8>) {
        let now = self.queue.now();
        let running = self.machines[who.machine].running(who);
        let Some(plugged) = running.and_then(|running| running.ports.get_mut(&port)) else {
            return;
        };
        if plugged.waiting.is_empty() {
            self.queue.schedule(now, Due::Turn(who, port));
        }
        plugged.waiting.push_back(frame);
    }

    /// Gives a node what waits at a port, as much as the port's turn has room for.
    pub(super) fn take_turn(&mut self, who: Who, port: PortId) -> Result<(), Violation> {
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        running.node.begin_turn(port);
        let mut taken = 0;
        while let Some(running) = self.machines[who.machine].running(who)
            && running.node.goes_on(port)
            && let Some(plugged) = running.ports.get_mut(&port)
            && let Some(frame) = plugged.waiting.pop_front()
        {
            plugged.idle_turns = 0;
            let others = running.ports.len().saturating_sub(1);
            check::turn(who.machine, port, taken)?;
            taken += match self.take_frame(who, port, &frame)? {
                Some(Verdict::Flood { .. }) => work::of_packets(others.max(1), 0),
                _ => work::of_packets(1, 0),
            };
        }
        let now = self.queue.now();
        let running = self.machines[who.machine].running(who);
        if let Some(plugged) = running.and_then(|running| running.ports.get_mut(&port))
            && !plugged.waiting.is_empty()
        {
            check::patience(who.machine, port, plugged.idle_turns)?;
            plugged.idle_turns += 1;
            self.queue.schedule(now + TURN, Due::Turn(who, port));
        }
        Ok(())
    }

    fn take_frame(
        &mut self,
        who: Who,
        port: PortId,
        frame: &[u8],
    ) -> Result<Option<Verdict>, Violation> {
        self.figures.frames += 1;
        self.log.note(self.queue.now(), || {
            let (machine, frame) = (who.machine, in_words(frame));
            format!("port {port} of machine {machine} sends {frame}")
        });
        let verdict = self.through(who, frame, |node, now, packet| {
            node.from_port(now, port, packet)
        })?;
        if verdict == Some(Verdict::Drop(DropReason::Storm)) && self.rogue(who) != Some(port) {
            return Err(Violation(format!(
                "port {port} of machine {} is told that it floods, and does not",
                who.machine
            )));
        }
        Ok(verdict)
    }

    pub(super) fn datagram(
        &mut self,
        source: SocketAddr,
        destination: SocketAddr,
        bytes: &[u8],
    ) -> Result<(), Violation> {
        let IpAddr::V4(ip) = destination.ip() else {
            return Ok(());
        };
        let machine = self.addresses.get(&ip).copied();
        let Some(who) = machine.and_then(|machine| self.who(machine)) else {
            return Ok(());
        };
        let received = match (&self.setup.config.backend, source.ip()) {
            (Backend::Ipip { .. }, IpAddr::V4(source)) => in_ipv4((source, ip), bytes),
            _ => Cow::Borrowed(bytes),
        };
        let verdict = self.through(who, &received, |node, now, packet| {
            node.from_underlay(now, source, packet)
        })?;
        let is_dropped = verdict.is_none_or(|verdict| matches!(verdict, Verdict::Drop(_)));
        if source.ip() == IpAddr::V4(OUTSIDER) && self.setup.guards_peers && !is_dropped {
            return Err(Violation(format!(
                "machine {} takes a datagram from a stranger: {verdict:?}",
                who.machine
            )));
        }
        Ok(())
    }

    /// Gives bytes to a node and does what it says. `None` if no node runs.
    pub(super) fn through(
        &mut self,
        who: Who,
        bytes: &[u8],
        call: impl FnOnce(&mut Node, Instant, &mut PacketBuf<'_>) -> Verdict,
    ) -> Result<Option<Verdict>, Violation> {
        let now = self.queue.now();
        let mut storage = std::mem::take(&mut self.storage);
        let mut result = Ok(None);
        if let Some(running) = self.machines[who.machine].running(who)
            && let Some(room) = storage.get_mut(HEADROOM..HEADROOM + bytes.len())
        {
            room.copy_from_slice(bytes);
            if let Ok(mut packet) = PacketBuf::new(&mut storage, HEADROOM, bytes.len()) {
                let verdict = call(&mut running.node, now, &mut packet);
                result = self
                    .carry_out(who, verdict, packet.as_slice())
                    .map(|()| Some(verdict));
            }
        }
        self.storage = storage;
        let verdict = result?;
        self.settle(who)?;
        Ok(verdict)
    }

    /// Sends what a node has to send itself, checks its books, and lets its timer run.
    pub(super) fn settle(&mut self, who: Who) -> Result<(), Violation> {
        let now = self.queue.now();
        let mut storage = std::mem::take(&mut self.storage);
        let mut result = Ok(());
        while result.is_ok()
            && let Some(running) = self.machines[who.machine].running(who)
            && let Ok(mut packet) = PacketBuf::new(&mut storage, HEADROOM, 0)
            && let Some(verdict) = running.node.poll_output(&mut packet)
        {
            result = self.carry_out(who, verdict, packet.as_slice());
        }
        self.storage = storage;
        result?;
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        check::counters(who.machine, &running.node)?;
        let at = running.node.poll_at();
        if running.timer.arm(at) {
            self.queue.schedule(at.max(now), Due::Node(who));
        }
        Ok(())
    }

    pub(super) fn node_timeout(&mut self, who: Who) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        if !running.timer.fires(now) {
            return Ok(());
        }
        running.node.handle_timeout(now);
        if running.node.poll_at() <= now {
            return Err(Violation(format!(
                "a timer of machine {} spins",
                who.machine
            )));
        }
        self.settle(who)
    }

    pub(super) fn carry_out(
        &mut self,
        who: Who,
        verdict: Verdict,
        bytes: &[u8],
    ) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        match verdict {
            Verdict::Port(port) => {
                if !running.ports.contains_key(&port) {
                    return Err(Violation(format!(
                        "machine {} delivers to port {port}, which is not attached",
                        who.machine
                    )));
                }
                let due = Due::ToDevice(who, port, bytes.to_vec());
                self.queue.schedule(now + LOCAL, due);
            }
            Verdict::Flood { except } => {
                let ports: Vec<_> = running.ports.keys().copied().collect();
                for port in ports.into_iter().filter(|port| Some(*port) != except) {
                    running.node.count_flooded(port, bytes.len());
                    let due = Due::ToDevice(who, port, bytes.to_vec());
                    self.queue.schedule(now + LOCAL, due);
                }
            }
            Verdict::Peer { destination, .. } => self.send(who.machine, destination, bytes)?,
            Verdict::Uplink { .. } => self.send_frame(who.machine, bytes)?,
            Verdict::Drop(reason) => {
                if reason == DropReason::HostUnreachable {
                    check::refusal(who.machine, running, now, bytes)?;
                }
                self.note_drop(who, reason);
            }
            Verdict::Egress => self.take_out(who, bytes)?,
            Verdict::Consumed => {}
        }
        Ok(())
    }

    pub(super) fn note_drop(&mut self, who: Who, reason: DropReason) {
        let now = self.queue.now();
        self.figures.unknown_hops += u64::from(reason == DropReason::NextHopUnknown);
        self.log.note(now, || {
            format!("machine {} drops: {}", who.machine, reason.describe())
        });
    }

    /// Sends a datagram from a machine.
    fn send(
        &mut self,
        from: usize,
        destination: SocketAddr,
        bytes: &[u8],
    ) -> Result<(), Violation> {
        let now = self.queue.now();
        let machine = &self.machines[from];
        let process = machine.process.as_ref();
        let running = process.and_then(|process| process.running.as_ref());
        let format = running.and_then(|running| running.plan.tunnel.format());
        let outer = bytes.len() + format.map_or(0, outer_headers);
        if outer > machine.mtu.get().into() {
            return Err(Violation(format!(
                "machine {from} sends {outer} bytes where its interface has an MTU of {}",
                machine.mtu.get()
            )));
        }
        self.figures.datagrams += 1;
        if self.captured.len() == CAPTURED {
            self.captured.pop_front();
        }
        self.captured.push_back((destination, bytes.to_vec()));
        let source = SocketAddr::new(machine.public_ip.into(), destination.port());
        let IpAddr::V4(ip) = destination.ip() else {
            return Ok(());
        };
        let Some(to) = self.addresses.get(&ip).copied() else {
            return Ok(());
        };
        let is_too_large = outer > self.machines[to].mtu.get().into();
        let fate = match is_too_large {
            true => Fate::Lost("too large for the receiver"),
            false => self.underlay.carry(now, (from, to), bytes.len(), outer),
        };
        match fate {
            Fate::Lost(why) => self.log.note(now, || {
                format!("a datagram from machine {from} to machine {to} is lost: {why}")
            }),
            Fate::Arrives {
                at,
                corrupted,
                again,
            } => {
                let mut bytes = bytes.to_vec();
                if let Some(at) = again {
                    self.oracle.allow_again(Identity::find(&bytes));
                    let bytes = bytes.clone();
                    self.arrive(at, source, destination, bytes);
                }
                if let Some((index, change)) = corrupted
                    && let Some(byte) = bytes.get_mut(index)
                {
                    *byte ^= change;
                }
                self.arrive(at, source, destination, bytes);
            }
        }
        Ok(())
    }

    fn arrive(&mut self, at: Instant, source: SocketAddr, destination: SocketAddr, bytes: Vec<u8>) {
        let due = Due::Datagram {
            source,
            destination,
            bytes,
        };
        self.queue.schedule(at, due);
    }

    /// Somebody who is no peer sends datagrams again that he has seen.
    pub(super) fn replay(&mut self) {
        let now = self.queue.now();
        if !self.setup.guards_peers {
            return;
        }
        for (destination, bytes) in std::mem::take(&mut self.captured) {
            let source = SocketAddr::new(OUTSIDER.into(), destination.port());
            self.arrive(now, source, destination, bytes);
        }
    }
}

/// Bytes that the kernel writes in front of what a node gives to its socket.
fn outer_headers(format: Format) -> usize {
    usize::from(format.overhead(IpVersion::Ipv4)) - format.network_offset()
}

/// What a raw socket has of a packet in IPv4: the outer header, too.
fn in_ipv4((source, destination): (Ipv4Addr, Ipv4Addr), inner: &[u8]) -> Cow<'static, [u8]> {
    let header = Ipv4Repr {
        src_addr: source,
        dst_addr: destination,
        next_header: IpProtocol::from(ipip::PROTOCOL),
        payload_len: inner.len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; header.buffer_len()];
    let mut packet = Ipv4Packet::new_unchecked(&mut bytes);
    header.emit(&mut packet, &ChecksumCapabilities::default());
    bytes.extend(inner);
    bytes.into()
}
