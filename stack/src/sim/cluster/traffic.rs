//! Traffic: frames and datagrams through nodes and links.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::offload::split::{Checksums, MAX_HEADER_LEN, Split, TrainLimits};
use muslin_encap::offload::virtio::Header;
use muslin_encap::tunnel::{Format, ipip};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::IpVersion;

use super::Cluster;
use crate::control::lease::Backend;
use crate::datapath::frame;
use crate::datapath::node::Verdict;
use crate::datapath::port::PortId;
use crate::datapath::trace::{Entrance, Trace};
use crate::datapath::work;
use crate::datapath::{Datapath, Output};
use crate::drops::DropReason;
use crate::sim::constants::LOCAL;
use crate::sim::device::{Identity, Sent};
use crate::sim::due::{Due, Who};
use crate::sim::invariants;
use crate::sim::link::Fate;
use crate::sim::outcome::Violation;
use crate::sim::packet::in_words;
use crate::sim::sockets::Sockets;

/// Datagrams that an eavesdropper remembers.
const CAPTURED: usize = 16;
/// From where nobody's datagrams come (TEST-NET-3).
const OUTSIDER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
/// The same of IPv6 (RFC 3849).
const OUTSIDER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
/// Timeouts that may be handled in one millisecond.
const MAX_TIMEOUTS: u32 = 2_000;
/// One in so many packets is traced before it is taken.
const TRACED: u64 = 5;
/// How long a turn of a port takes.
const TURN: Duration = Duration::from_micros(200);

impl Cluster {
    /// A frame is ready to be taken from a port, which has its turn when all others of this moment
    /// are.
    pub(super) fn hear_device(&mut self, who: Who, port: PortId, sent: Sent) {
        let now = self.queue.now();
        let worker = self.worker_of_frame(who, &sent.frame);
        let running = self.machines[who.machine].running(who);
        let Some(plugged) = running.and_then(|running| running.ports.get_mut(&port)) else {
            return;
        };
        if plugged.waiting.iter().all(VecDeque::is_empty) {
            self.queue.schedule(now, Due::Turn(who, port));
        }
        plugged.waiting[worker].push_back(sent);
    }

    /// Gives the workers what waits at a port's queues, as much as its turn with each has room for.
    pub(super) fn take_turn(&mut self, who: Who, port: PortId) -> Result<(), Violation> {
        for worker in 0..self.workers(who) {
            self.take_turn_of(who, worker, port)?;
        }
        let now = self.queue.now();
        let running = self.machines[who.machine].running(who);
        if let Some(plugged) = running.and_then(|running| running.ports.get_mut(&port))
            && !plugged.waiting.iter().all(VecDeque::is_empty)
        {
            invariants::patience(who.machine, port, plugged.idle_turns)?;
            plugged.idle_turns += 1;
            self.queue.schedule(now + TURN, Due::Turn(who, port));
        }
        Ok(())
    }

    fn take_turn_of(&mut self, who: Who, worker: usize, port: PortId) -> Result<(), Violation> {
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        running.workers[worker].path.node_mut().begin_turn(port);
        let mut taken = 0;
        while let Some(running) = self.machines[who.machine].running(who)
            && running.workers[worker].path.node().goes_on(port)
            && let Some(plugged) = running.ports.get_mut(&port)
            && let Some(sent) = plugged.waiting[worker].pop_front()
        {
            plugged.idle_turns = 0;
            let others = running.ports.len().saturating_sub(1);
            invariants::turn(who.machine, port, taken)?;
            taken += match self.take_frame((who, worker), port, &sent)? {
                Some(Verdict::Flood { .. }) => work::of_packets(others.max(1), 0),
                _ => work::of_packets(1, 0),
            };
        }
        Ok(())
    }

    fn take_frame(
        &mut self,
        (who, worker): (Who, usize),
        port: PortId,
        Sent { frame, header }: &Sent,
    ) -> Result<Option<Verdict>, Violation> {
        self.figures.frames += 1;
        self.log.note(self.queue.now(), || {
            let (machine, frame) = (who.machine, in_words(frame));
            format!("port {port} of machine {machine} sends {frame}")
        });
        let Ok(offload) = Header::parse(header) else {
            if let Some(running) = self.machines[who.machine].running(who) {
                let node = running.workers[worker].path.node_mut();
                node.refuse_frame(port, frame.len());
            }
            return self.settle(who).map(|()| None);
        };
        let verdict = self.through((who, worker), Entrance::Port(port), (frame, offload))?;
        let running = self.machines[who.machine].running(who);
        let plugged = running.and_then(|running| running.ports.get(&port));
        let answers = plugged.is_none_or(|plugged| plugged.answers);
        if verdict == Some(Verdict::Drop(DropReason::Storm)) && answers {
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
        let machine = self.machine_at(destination.ip());
        let Some(who) = machine.and_then(|machine| self.who(machine)) else {
            return Ok(());
        };
        let received = match (&self.setup.config.backend, source.ip(), destination.ip()) {
            (Backend::Ipip { .. }, IpAddr::V4(source), IpAddr::V4(ip)) => {
                Cow::Owned(ipip::received(source, ip, bytes))
            }
            _ => Cow::Borrowed(bytes),
        };
        let bare = (&*received, Header::default());
        let worker = self.worker_of_datagram(who, &received);
        let verdict = self.through((who, worker), Entrance::Underlay(source), bare)?;
        let is_dropped = verdict.is_none_or(|verdict| matches!(verdict, Verdict::Drop(_)));
        if is_outsider(source.ip()) && self.setup.guards_peers && !is_dropped {
            return Err(Violation(format!(
                "machine {} takes a datagram from a stranger: {verdict:?}",
                who.machine
            )));
        }
        Ok(())
    }

    /// Gives a packet to a node and does what it says. `None` if no node runs.
    pub(super) fn through(
        &mut self,
        (who, worker): (Who, usize),
        entrance: Entrance,
        (bytes, offload): (&[u8], Header),
    ) -> Result<Option<Verdict>, Violation> {
        let foreseen = self.foresee((who, worker), entrance, (bytes, offload));
        let mut storage = std::mem::take(&mut self.storage);
        let Some(room) = storage.get_mut(HEADROOM..HEADROOM + bytes.len()) else {
            self.storage = storage;
            return Ok(None);
        };
        room.copy_from_slice(bytes);
        let mut result = Ok(None);
        if let Ok(packet) = PacketBuf::new(&mut storage, HEADROOM, bytes.len()) {
            let mut packet = packet.with_offload(offload);
            let before = self.went_out(who);
            let taken = self.call((who, worker), |path, now, sockets| {
                take(path, now, entrance, &mut packet, sockets)
            });
            if let Some(verdict) = taken {
                result = invariants::foreseen(who.machine, foreseen, verdict, packet.as_slice())
                    .and_then(|()| self.carry_out((who, worker), verdict, &mut packet))
                    .and_then(|()| self.settle(who))
                    .and_then(|()| self.check_datagram(who, verdict, bytes, before))
                    .map(|()| Some(verdict));
            }
        }
        self.storage = storage;
        result
    }

    /// What a trace of a packet says; not of every one, since that copies tables.
    fn foresee(
        &mut self,
        (who, worker): (Who, usize),
        entrance: Entrance,
        (bytes, offload): (&[u8], Header),
    ) -> Option<Trace> {
        self.traced += 1;
        if !self.traced.is_multiple_of(TRACED) {
            return None;
        }
        self.call((who, worker), |path, now, _| {
            path.trace(now, entrance, bytes, offload)
        })
    }

    /// Calls a node's data path. `None` if no node runs.
    pub(super) fn call<R>(
        &mut self,
        (who, worker): (Who, usize),
        call: impl FnOnce(&mut Datapath, Instant, &mut Sockets) -> R,
    ) -> Option<R> {
        let now = self.queue.now();
        let is_cut = self.outside.is_cut(who.machine);
        let running = self.machines[who.machine].running(who)?;
        let worker = running.workers.get_mut(worker)?;
        let sockets = &mut worker.way_out.sockets;
        (sockets.now, sockets.is_cut) = (now, is_cut);
        Some(call(&mut worker.path, now, sockets))
    }

    /// Does what a data path says of its own accord, checks its books, and lets its timer run.
    pub(super) fn settle(&mut self, who: Who) -> Result<(), Violation> {
        (0..self.workers(who)).try_for_each(|worker| self.settle_worker(who, worker))
    }

    /// How many workers a node has; none if it does not run.
    pub(super) fn workers(&mut self, who: Who) -> usize {
        let running = self.machines[who.machine].running(who);
        running.map_or(0, |running| running.workers.len())
    }

    fn settle_worker(&mut self, who: Who, number: usize) -> Result<(), Violation> {
        let now = self.queue.now();
        let mut outputs = Vec::new();
        let mut messages = Vec::new();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        let format = running.node().format();
        let path = &mut running.workers[number].path;
        while let Some(output) = path.poll_output(now) {
            match output {
                Output::Packet(verdict, mut packet) => {
                    let is_right = packet.offload().check(packet.len());
                    is_right.map_err(|error| Violation(format!("a packet has {error}")))?;
                    let network = network_of(verdict, format);
                    let segments = segments(&mut packet, network);
                    let segments = segments.ok_or(Violation("a superpacket is none".to_owned()))?;
                    outputs.extend(segments.into_iter().map(|segment| (verdict, segment)));
                }
                Output::Message(to, message) => messages.push((to, message)),
            }
        }
        for (verdict, segment) in &outputs {
            Self::check_arrival(running, *verdict, segment)?;
        }
        for (verdict, segment) in outputs {
            self.carry_out_one((who, number), verdict, &segment)?;
        }
        for (to, message) in messages {
            self.tell_workers((who, number), to, &message)?;
        }
        self.look_outside(who, number)?;
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        let worker = &mut running.workers[number];
        invariants::counters(who.machine, worker.path.node())?;
        let at = worker.path.poll_at();
        if worker.timer.arm(at) {
            self.queue.schedule(at.max(now), Due::Node(who, number));
        }
        Ok(())
    }

    pub(super) fn node_timeout(&mut self, who: Who, number: usize) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        let worker = &mut running.workers[number];
        if !worker.timer.fires(now) {
            return Ok(());
        }
        let is_often = worker.way_out.count_timeout(now) > MAX_TIMEOUTS;
        self.call((who, number), |path, now, sockets| {
            path.handle_timeout(now, sockets);
        });
        self.settle(who)?;
        let running = self.machines[who.machine].running(who);
        let due = running.map(|running| running.workers[number].path.poll_at());
        if is_often || due.is_some_and(|due| due <= now) {
            return Err(Violation(format!(
                "a timer of machine {} spins",
                who.machine
            )));
        }
        Ok(())
    }

    /// Does what a node says of a packet, which reaches devices and wires in segments.
    pub(super) fn carry_out(
        &mut self,
        (who, worker): (Who, usize),
        verdict: Verdict,
        packet: &mut PacketBuf<'_>,
    ) -> Result<(), Violation> {
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        let format = running.node().format();
        match segments(packet, network_of(verdict, format)) {
            Some(segments) => {
                let mut each = segments.iter();
                each.try_for_each(|segment| self.carry_out_one((who, worker), verdict, segment))
            }
            // Whoever has the device counts it, which is no part of the node's own books.
            None => {
                self.note_drop(who, DropReason::SuperpacketRefused);
                Ok(())
            }
        }
    }

    fn carry_out_one(
        &mut self,
        (who, worker): (Who, usize),
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
                    running.workers[worker]
                        .path
                        .node_mut()
                        .count_flooded(port, bytes.len());
                    let due = Due::ToDevice(who, port, bytes.to_vec());
                    self.queue.schedule(now + LOCAL, due);
                }
            }
            Verdict::Peer { destination, .. } => self.send(who.machine, destination, bytes)?,
            Verdict::Uplink { .. } => self.send_frame(who.machine, bytes)?,
            Verdict::Drop(reason) => {
                if reason == DropReason::HostUnreachable {
                    invariants::refusal(who.machine, running, now, bytes)?;
                }
                self.note_drop(who, reason);
            }
            // Simulated machines have no host interface.
            Verdict::Host | Verdict::Egress | Verdict::Consumed => {}
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
        let format = running.and_then(|running| running.node().format());
        let version = match destination {
            SocketAddr::V4(_) => IpVersion::Ipv4,
            SocketAddr::V6(_) => IpVersion::Ipv6,
        };
        let outer = bytes.len() + format.map_or(0, |format| outer_headers(format, version));
        if version == IpVersion::Ipv6 && !machine.carries_ipv6() {
            // The interface has got an MTU since that has no room for IPv6.
            return Ok(());
        }
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
        let source = match version {
            IpVersion::Ipv4 => Some(IpAddr::V4(machine.public_ip)),
            IpVersion::Ipv6 => machine.public_ipv6.map(IpAddr::V6),
        };
        let Some(source) = source else {
            return Err(Violation(format!(
                "machine {from} sends to {destination} and has no such address"
            )));
        };
        let source = SocketAddr::new(source, destination.port());
        let Some(to) = self.machine_at(destination.ip()) else {
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
            // The kernel verifies the checksum that UDP has over IPv6 (RFC 8200 section 8.1).
            Fate::Arrives {
                corrupted: Some(_), ..
            } if version == IpVersion::Ipv6 => self.log.note(now, || {
                format!("a datagram from machine {from} to machine {to} is damaged")
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
            let host = match destination {
                SocketAddr::V4(_) => OUTSIDER.into(),
                SocketAddr::V6(_) => OUTSIDER_V6.into(),
            };
            let source = SocketAddr::new(host, destination.port());
            self.arrive(now, source, destination, bytes);
        }
    }
}

/// Where a packet with this verdict has its IP header.
fn network_of(verdict: Verdict, format: Option<Format>) -> usize {
    match verdict {
        Verdict::Peer { .. } => format.map_or(0, Format::network_offset),
        _ => frame::HEADER_LEN,
    }
}

/// What a packet is as a device without offloads sees it. `None` for a superpacket that nobody can
/// take apart.
fn segments(packet: &mut PacketBuf<'_>, network: usize) -> Option<Vec<Vec<u8>>> {
    let Some(gso) = packet.offload().gso else {
        packet.complete_checksum();
        return Some(vec![packet.as_slice().to_vec()]);
    };
    let mut split = Split::new(packet.as_slice(), network, gso, Checksums::Complete).ok()?;
    let mut header = [0; MAX_HEADER_LEN];
    let mut segments = Vec::new();
    while let Some(train) = split.next_train(&mut header, TrainLimits::ONE).ok()? {
        let each = train.segments();
        segments.extend(each.map(|(header, payload)| [header, payload].concat()));
    }
    Some(segments)
}

/// Bytes that the kernel writes in front of what a node gives to its socket.
fn outer_headers(format: Format, outer: IpVersion) -> usize {
    usize::from(format.overhead(outer)) - format.network_offset()
}

fn is_outsider(address: IpAddr) -> bool {
    address == OUTSIDER || address == OUTSIDER_V6
}

/// Gives a packet to a data path where it comes in.
fn take(
    path: &mut Datapath,
    now: Instant,
    entrance: Entrance,
    packet: &mut PacketBuf<'_>,
    sockets: &mut Sockets,
) -> Verdict {
    match entrance {
        Entrance::Port(port) => path.from_port(now, port, packet, sockets),
        Entrance::Underlay(source) => path.from_underlay(now, source, packet, sockets),
        Entrance::Uplink => path.from_uplink(now, packet, sockets),
        Entrance::Host => path.from_host(now, packet),
        Entrance::Egress => path.node_mut().from_egress(now, packet),
    }
}
