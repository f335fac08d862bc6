//! A node's way out: egress, wired to the node and to sockets as the workers of `src/worker/` wire
//! it, and what must be true of it after every call.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::Ipv4Addr;

use muslin_encap::buffer::PacketBuf;
use muslin_encap::offload::split::{Checksums, MAX_HEADER_LEN, Split, TrainLimits};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Packet};

use super::Violation;
use super::cluster::{Cluster, Due};
use super::log::seconds;
use super::machine::{Running, Timer, Who};
use super::oracle::Oracle;
use super::outside::Server;
use super::packet;
use super::sockets::{Happening, Kind, Sockets, TUNNEL};
use crate::drops::DropReason;
use crate::egress::{
    Config, Egress, FlowId, FlowInfo, FlowKey, Limits, Pods, Policy, Protocol, Rules,
};
use crate::frame;
use crate::icmp::{self, IcmpError};
use crate::node::{Node, Verdict};
use crate::port::PortId;

/// Few, so that they are reached.
const FLOWS: usize = 5;
const FLOWS_OF_POD: usize = 4;
/// For buffers that are smaller than what most flows carry.
const MEMORY: usize = 128 << 10;
/// How long a flow is idle that makes room for another.
const EVICTABLE: Duration = Duration::from_secs(10);
/// Timeouts that may be handled in one millisecond.
const MAX_TIMEOUTS: u32 = 2_000;

/// Egress of a node.
pub(super) struct WayOut {
    pub(super) egress: Egress,
    pub(super) sockets: Sockets,
    timer: Timer,
    /// Flows that had made room for others, and those that were there then.
    evicted: u64,
    flows: BTreeSet<FlowKey>,
    /// How often a timeout was handled in which millisecond.
    timeouts: (i64, u32),
}

/// What egress says to the node.
struct ToPods<'a> {
    node: &'a mut Node,
    /// Frames for devices, and packets for others.
    sent: Vec<(Verdict, Vec<u8>)>,
    wrong: Option<String>,
}

impl WayOut {
    fn new(running: &Node, subnet: ipnet::Ipv4Net, now: Instant, seeds: (u64, u64)) -> Self {
        let limits = Limits {
            flows: FLOWS,
            flows_of_pod: FLOWS_OF_POD,
            memory: MEMORY,
            ..Limits::default()
        };
        let config = Config {
            policy: Policy::new(Rules {
                tunnel_port: Some(TUNNEL.port()),
                ..Rules::default()
            }),
            subnet: Some(subnet),
            mtu: running.mtu(),
            limits,
            random_seed: seeds.0,
        };
        Self {
            egress: Egress::new(config, now),
            sockets: Sockets::new(seeds.1, now),
            timer: Timer::default(),
            evicted: 0,
            flows: BTreeSet::new(),
            timeouts: (0, 0),
        }
    }

    /// Flows that were ended to make room, and packets for which there was none.
    pub(super) fn crowded(&self, node: &Node) -> u64 {
        let dropped = |reason| node.counters().dropped_for(reason);
        self.egress.counters().evicted
            + dropped(DropReason::EgressTableFull)
            + dropped(DropReason::EgressPodFull)
    }

    /// Flows and their sockets, in words.
    pub(super) fn describe(&self, text: &mut String) {
        let _ = writeln!(text, "  egress: {:?}", self.egress.counters());
        for (id, socket) in self.sockets.iter() {
            let key = self.egress.key(id);
            let mut flows = self.egress.flows();
            let info = flows.find(|info| Some(info.key) == key);
            let flow = info.map_or("no flow".to_owned(), |info| {
                let (pod, state, since) = (info.key.pod, info.state, seconds(info.since));
                let (sent, received) = (info.sent, info.received);
                format!("{pod}, {state}, since {since}, {sent} bytes out, {received} in")
            });
            let to = socket.to.map(|to| format!(" to {to}")).unwrap_or_default();
            let protocol = socket.protocol;
            let _ = writeln!(text, "  {protocol} socket {}{to}: {flow}", id.index);
        }
    }

    fn count_timeout(&mut self, now: Instant) -> u32 {
        let millis = now.total_millis();
        if self.timeouts.0 != millis {
            self.timeouts = (millis, 0);
        }
        self.timeouts.1 += 1;
        self.timeouts.1
    }
}

impl Running {
    /// Flows that were ended to make room, and packets for which there was none.
    pub(super) fn crowded(&self) -> u64 {
        let way = self.way_out.as_ref();
        way.map_or(0, |way| way.crowded(&self.node))
    }

    /// A pod that has flows or published ports and is not attached.
    pub(super) fn stray_flow(&self) -> Option<Ipv4Addr> {
        let is_there = |pod: Ipv4Addr| self.ports.values().any(|it| it.address == pod);
        let way = self.way_out.as_ref()?;
        way.egress.stray_pod(is_there)
    }
}

impl Cluster {
    /// Gives egress a packet of a pod that leaves the overlay.
    pub(super) fn take_out(&mut self, who: Who, bytes: &[u8]) -> Result<(), Violation> {
        let is_datagram = is_whole_datagram(bytes);
        let mut bytes = bytes.to_vec();
        let taken = self.with_egress(who, |egress, now, sockets, pods| {
            let before = sockets.datagrams;
            let len = bytes.len();
            let packet = PacketBuf::new(&mut bytes, 0, len).ok()?;
            let taken = egress.from_pod(now, &packet, sockets, pods);
            if let Err(reason) = taken {
                pods.node.count_drops(reason, 1);
            }
            let went = sockets.datagrams - before;
            if is_datagram && went != u64::from(taken.is_ok()) {
                pods.accuse(format!(
                    "{taken:?} comes of a datagram, and {went} have gone on"
                ));
            }
            taken.err()
        })?;
        if let Some(reason) = taken.flatten() {
            self.note_drop(who, reason);
        }
        Ok(())
    }

    /// Something happens to a socket.
    pub(super) fn socket_event(
        &mut self,
        who: Who,
        id: FlowId,
        happening: Happening,
    ) -> Result<(), Violation> {
        self.with_egress(who, |egress, now, sockets, pods| {
            if let Some(ready) = sockets.happen(id, happening) {
                egress.ready(now, id, ready, sockets, pods);
            }
        })?;
        self.settle(who)
    }

    /// Ends the flows of a port's pod, which goes.
    pub(super) fn forget_flows(&mut self, who: Who, port: PortId) -> Result<(), Violation> {
        let running = self.machines[who.machine].running(who);
        let Some(running) = running.filter(|running| running.way_out.is_some()) else {
            return Ok(());
        };
        let Some(address) = running.ports.get(&port).map(|plugged| plugged.address) else {
            return Ok(());
        };
        self.with_egress(who, |egress, _, sockets, pods| {
            sockets.pod_is_gone = true;
            egress.forget_pod(address, sockets, pods);
            sockets.pod_is_gone = false;
        })?;
        Ok(())
    }

    pub(super) fn flows_timeout(&mut self, who: Who) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        let Some(way) = &mut running.way_out else {
            return Ok(());
        };
        if !way.timer.fires(now) {
            return Ok(());
        }
        if way.count_timeout(now) > MAX_TIMEOUTS {
            return Err(Violation(format!(
                "a timer of egress of machine {} spins",
                who.machine
            )));
        }
        self.with_egress(who, |egress, now, sockets, pods| {
            egress.handle_timeout(now, sockets, pods);
            if egress.poll_at().is_some_and(|due| due <= now) {
                pods.accuse("a timer is due at once".to_owned());
            }
        })?;
        self.settle(who)
    }

    /// All machines have a way out again.
    pub(super) fn heal_outside(&mut self) -> Result<(), Violation> {
        self.outside.heal(self.queue.now());
        for machine in 0..self.machines.len() {
            if let Some(who) = self.who(machine)
                && let Some(running) = self.machines[machine].running(who)
                && running.way_out.is_some()
            {
                self.with_egress(who, |_, _, sockets, _| sockets.resume())?;
            }
        }
        Ok(())
    }

    /// Calls a node's egress, does what it says, and looks whether all is as it must be.
    fn with_egress<R>(
        &mut self,
        who: Who,
        call: impl FnOnce(&mut Egress, Instant, &mut Sockets, &mut ToPods<'_>) -> R,
    ) -> Result<Option<R>, Violation> {
        let now = self.queue.now();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(None);
        };
        let subnet = running.key.ipv4;
        let Running { way_out, node, .. } = running;
        let way = way_out.get_or_insert_with(|| {
            let seeds = (self.outside.seed(), self.outside.seed());
            Box::new(WayOut::new(node, subnet, now, seeds))
        });
        way.sockets.now = now;
        way.sockets.is_cut = self.outside.is_cut(who.machine);
        let mut pods = ToPods::new(node);
        let result = call(&mut way.egress, now, &mut way.sockets, &mut pods);
        let (sent, wrong) = (pods.sent, way.sockets.wrong.take().or(pods.wrong));
        for (at, id, happening) in way.sockets.due.drain(..) {
            self.queue.schedule(at, Due::Socket(who, id, happening));
        }
        if let Some(at) = way.egress.poll_at()
            && way.timer.arm(at)
        {
            self.queue.schedule(at, Due::Flows(who));
        }
        for (id, word) in way.sockets.words.drain(..) {
            let key = way.egress.key(id);
            self.figures.flows += u64::from(matches!(word, "connects" | "opens"));
            self.log.note(now, || {
                let flow = key.map(|key| format!(" of {} to {}", key.pod, key.remote));
                let flow = flow.unwrap_or_default();
                format!("machine {}: socket {}{flow} {word}", who.machine, id.index)
            });
        }
        check(running, &mut self.oracle, wrong)
            .map_err(|what| Violation(format!("egress of machine {}: {what}", who.machine)))?;
        for (verdict, bytes) in sent {
            self.carry_out(who, verdict, &bytes)?;
        }
        Ok(Some(result))
    }
}

impl<'a> ToPods<'a> {
    fn new(node: &'a mut Node) -> Self {
        Self {
            node,
            sent: Vec::new(),
            wrong: None,
        }
    }

    fn accuse(&mut self, what: String) {
        self.wrong.get_or_insert(what);
    }

    /// What goes to a device, in frames that each has the length of a packet at most.
    fn deliver(&mut self, verdict: Verdict, packet: &mut PacketBuf<'_>) -> Result<(), String> {
        let Some(gso) = packet.offload().gso else {
            packet.complete_checksum();
            packet::check(packet.as_slice(), self.node.mtu())?;
            self.sent.push((verdict, packet.as_slice().to_vec()));
            return Ok(());
        };
        let offload = packet.offload().check(packet.len());
        offload.map_err(|error| format!("a superpacket has a wrong header: {error}"))?;
        let split = Split::new(
            packet.as_slice(),
            frame::HEADER_LEN,
            gso,
            Checksums::Complete,
        );
        let mut split = split.map_err(|error| format!("a superpacket is none: {error}"))?;
        let mut header = [0; MAX_HEADER_LEN];
        while let Some(train) = split
            .next_train(&mut header, TrainLimits::ONE)
            .map_err(|error| format!("a superpacket cannot be taken apart: {error}"))?
        {
            for (header, payload) in train.segments() {
                let bytes = [header, payload].concat();
                packet::check(&bytes, self.node.mtu())?;
                self.sent.push((verdict, bytes));
            }
        }
        Ok(())
    }
}

impl Pods for ToPods<'_> {
    fn send(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Result<(), DropReason> {
        match self.node.from_egress(now, packet) {
            Verdict::Drop(reason) => return Err(reason),
            verdict @ Verdict::Port(_) => {
                if let Err(wrong) = self.deliver(verdict, packet) {
                    self.accuse(wrong);
                }
            }
            verdict => self.sent.push((verdict, packet.as_slice().to_vec())),
        }
        Ok(())
    }

    fn report(&mut self, now: Instant, error: IcmpError, offender: &[u8]) {
        if !icmp::may_answer(offender) {
            self.accuse(format!("{error:?} is told of {offender:?}"));
        }
        self.node.report(now, error, offender);
    }

    fn relay(&mut self, now: Instant, from: Ipv4Addr, error: IcmpError, offender: &[u8]) {
        if !icmp::may_answer(offender) {
            self.accuse(format!("{error:?} is told of {offender:?}"));
        }
        self.node.relay(now, from, error, offender);
    }

    fn lose(&mut self, reason: DropReason, packets: u64) {
        self.node.count_drops(reason, packets);
    }
}

/// Whether a packet is one that must either go on or be dropped for a reason.
fn is_whole_datagram(bytes: &[u8]) -> bool {
    let Ok(ip) = Ipv4Packet::new_checked(bytes) else {
        return false;
    };
    if ip.more_frags() || ip.frag_offset() != 0 {
        return false;
    }
    match ip.next_header() {
        IpProtocol::Udp => true,
        IpProtocol::Icmp => Icmpv4Packet::new_checked(ip.payload())
            .is_ok_and(|icmp| icmp.msg_type() == Icmpv4Message::EchoRequest),
        _ => false,
    }
}

/// What must be true of egress at any time.
fn check(running: &mut Running, oracle: &mut Oracle, wrong: Option<String>) -> Result<(), String> {
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    if let Some(pod) = running.stray_flow() {
        return Err(format!("it has a flow of {pod}, which is not attached"));
    }
    let Some(way) = &mut running.way_out else {
        return Ok(());
    };
    check_books(way)?;
    check_evicted(way)?;
    let mut of_pods = BTreeMap::new();
    for info in way.egress.flows() {
        let pod = *info.key.pod.ip();
        let count = of_pods.entry(pod).or_insert(0);
        *count += 1;
        if *count > FLOWS_OF_POD {
            return Err(format!("{pod} has {count} flows"));
        }
        check_flow(way, &info, oracle)?;
    }
    for (id, identity) in way.sockets.fresh.drain(..) {
        let pod = way.egress.key(id).map(|key| *key.pod.ip());
        if oracle.address_of(identity.sender) != pod {
            return Err(format!(
                "a datagram of {identity:?} goes out in a flow of {pod:?}"
            ));
        }
        if !oracle.goes_out(identity) {
            return Err(format!("datagram {} goes out again", identity.ping));
        }
    }
    Ok(())
}

/// Flows and sockets are the same ones, and none is lost.
fn check_books(way: &WayOut) -> Result<(), String> {
    let (counters, sockets) = (way.egress.counters(), &way.sockets);
    let open = sockets.iter().count() as u64;
    let has_lost = counters.opened != sockets.made || sockets.made - sockets.closed != open;
    if has_lost || counters.open != open {
        return Err(format!(
            "it counts {counters:?}, where {} sockets were made and {} closed",
            sockets.made, sockets.closed
        ));
    }
    way.egress.audit()?;
    if open > FLOWS as u64 {
        return Err(format!("it has {open} flows"));
    }
    Ok(())
}

/// Flows make room for others only if they are not in use, or their pod has most.
fn check_evicted(way: &mut WayOut) -> Result<(), String> {
    let evicted = way.egress.counters().evicted;
    let count = evicted - std::mem::replace(&mut way.evicted, evicted);
    let now = way.egress.flows().map(|info| info.key).collect();
    let before = std::mem::replace(&mut way.flows, now);
    let idle = way.sockets.idle.drain(..);
    let idle = idle.filter(|idle| *idle >= EVICTABLE).count() as u64;
    if idle >= count {
        return Ok(());
    }
    let mut shares = BTreeMap::<_, usize>::new();
    for key in &before {
        *shares.entry(*key.pod.ip()).or_default() += 1;
    }
    let most = shares.values().max().copied().unwrap_or_default();
    let mut gone = before.difference(&way.flows);
    // One more may have come since.
    if most < 2 || !gone.any(|key| shares[key.pod.ip()] + 1 >= most) {
        return Err(format!(
            "{count} flows make room, {idle} are idle, and the shares are {shares:?}"
        ));
    }
    Ok(())
}

/// A flow has its own socket, to where it says, and has carried what went through that.
fn check_flow(way: &WayOut, info: &FlowInfo, oracle: &Oracle) -> Result<(), String> {
    let key = info.key;
    let socket = way.egress.find(&key).and_then(|id| way.sockets.get(id));
    let socket = socket.ok_or_else(|| format!("{key:?} has no socket"))?;
    let to = (!key.is_mapping()).then_some(key.remote);
    if (socket.protocol, socket.to) != (key.protocol, to) {
        return Err(format!("{key:?} has a socket to {:?}", socket.to));
    }
    if to.is_some() != (key.protocol == Protocol::Tcp) {
        return Err(format!("{key:?} depends on its other end"));
    }
    let carried = match &socket.kind {
        Kind::Connection(connection) => {
            if let Some(flow) = connection.flow()
                && oracle.client_of(flow) != Some((*key.pod.ip(), Server::at(*key.remote.ip())))
            {
                return Err(format!("{key:?} carries flow {flow}"));
            }
            (connection.written, connection.received())
        }
        Kind::Mailbox(mailbox) => (mailbox.written, mailbox.read),
    };
    let is_tcp = key.protocol == Protocol::Tcp;
    if carried != (info.sent, info.received) {
        return Err(format!(
            "{info:?} has carried {carried:?}{}",
            if is_tcp { " bytes of streams" } else { "" }
        ));
    }
    Ok(())
}
