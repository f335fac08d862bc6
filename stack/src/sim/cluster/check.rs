//! What must be true of tables between events, and of a cluster once everything works again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr};

use ipnet::IpNet;
use muslin_encap::tunnel::vxlan::VtepMac;
use smoltcp::time::Duration;

use super::Cluster;
use crate::control::lease::{lease_prefix, overlap, read_peer};
use crate::control::peers::{Here, peer_of_ipv6, peer_of_lease};
use crate::datapath::neighbour::State;
use crate::datapath::node::{NextHop, Node};
use crate::datapath::peer::{Peer, PeerId};
use crate::datapath::port::PortId;
use crate::sim::constants::{LIMITS, PREFIX};
use crate::sim::device::Order;
use crate::sim::due::Who;
use crate::sim::machine::{LeasedNode, Machine, Plugged, Process};
use crate::sim::oracle::Flow;
use crate::sim::outcome::Violation;
use crate::sim::random::{Random, Stream};

/// How long tables may take to be right again after everything is mended: a wiped store's peers are
/// waited for a minute, a node that has lost its lease starts again after 10 s.
const CONVERGENCE: u64 = 240;
/// How long all may take to hear of a change that is nobody's doing, and to do something about it.
const TOLD: Duration = Duration::from_secs(10);
/// How long pods may take to talk.
const TALK: u64 = 180;
/// Bytes that pods exchange.
const BYTES: usize = 3_000;
/// Pairs of pods that talk over TCP at the end of a run; all others ping.
const MAX_TALKS: usize = 60;

/// How often a pod that does not answer is pinged.
const ROUNDS: usize = 5;

/// A node with another that is its peer.
#[derive(Debug, PartialEq, Eq)]
struct Pair {
    from: Who,
    /// The other's machine.
    to: usize,
    /// The other's number at the one.
    id: PeerId,
    /// Packets that have come from its address.
    received: u64,
}

/// A pod that is attached, and its address.
type Pod = (Who, PortId, Ipv4Addr);

/// Where a peer's pods are of an IP version: its subnet, its tunnel's end and its VTEP.
type Reach = BTreeMap<IpNet, (SocketAddr, Option<VtepMac>)>;

/// A key below the leases' prefix, and the peers that it is to others.
struct Record {
    key: String,
    value: String,
    peer: Option<Peer>,
    peer_v6: Option<Peer>,
}

/// The peers that a node sends to.
fn reach(node: &Node) -> Reach {
    let peers = node.peers();
    let peers = peers.map(|state| state.peer);
    peers
        .map(|peer| (peer.subnet, (peer.address, peer.vtep_mac)))
        .collect()
}

impl Cluster {
    /// What must be true between two steps of a plan.
    pub(in crate::sim) fn check_tables(&self) -> Result<(), Violation> {
        for (number, machine) in self.machines.iter().enumerate() {
            let process = machine.process.as_ref();
            if let Some(running) = process.and_then(|process| process.running.as_ref()) {
                check_bounds(number, running)?;
            }
        }
        Ok(())
    }

    /// What must be true where nothing has happened for a while. Two nodes with one state directory
    /// never come to rest.
    pub(in crate::sim) fn check_calm(&self) -> Result<(), Violation> {
        let is_told = self.queue.now() >= self.written.1 + TOLD;
        if !is_told || !self.is_calm() || self.machines.iter().any(|machine| machine.is_copy) {
            return Ok(());
        }
        let records = self.records();
        let mut text = String::new();
        for (number, machine) in self.machines.iter().enumerate() {
            if let Some(process) = &machine.process
                && process.running.is_some()
                && machine.frozen.is_none()
                && process.agent.is_settled()
                && self.reaches_store(number)
            {
                self.differences_of(number, process, &records, &mut text);
            }
        }
        if text.is_empty() {
            return Ok(());
        }
        Err(Violation(format!(
            "nothing has happened for a while:{text}"
        )))
    }

    /// Waits until all tables are what the store says.
    pub(in crate::sim) fn converge(&mut self) -> Result<u64, Violation> {
        let began = self.queue.now();
        let mut difference = String::new();
        for _ in 0..CONVERGENCE {
            difference.clear();
            self.differences(&mut difference);
            if difference.is_empty() {
                return Ok((self.queue.now() - began).total_millis());
            }
            self.run(Duration::from_secs(1))?;
        }
        Err(Violation(format!(
            "{CONVERGENCE} s after everything was mended:{difference}"
        )))
    }

    /// What is not yet as the store says.
    pub(in crate::sim) fn differences(&self, text: &mut String) {
        let records = self.records();
        for (number, machine) in self.machines.iter().enumerate() {
            match (&machine.process, machine.is_wanted) {
                (None, true) => {
                    let _ = write!(text, "\n  machine {number} does not run");
                }
                (Some(process), true) => self.differences_of(number, process, &records, text),
                (Some(_), false) => {
                    let _ = write!(text, "\n  machine {number} still runs");
                }
                (None, false) => {}
            }
        }
        for number in 0..self.machines.len() {
            self.missing_names(number, text);
        }
        self.overlaps(text);
        self.differences_of_flannels(text);
    }

    /// Whether there is a point in looking for differences: a quick look at a large cluster.
    pub(in crate::sim) fn is_converged(&self) -> bool {
        let prefix = lease_prefix(PREFIX);
        let records = self.store.entries(self.queue.now(), &prefix);
        let others = records.count().saturating_sub(1);
        self.machines.iter().all(|machine| match &machine.process {
            None => !machine.is_wanted,
            Some(process) => {
                let running = process.running.as_ref();
                machine.is_wanted
                    && process.agent.is_settled()
                    && running.is_some_and(|running| running.node().peers().count() == others)
            }
        })
    }

    /// Routes of all nodes together.
    pub(in crate::sim) fn routes(&self) -> usize {
        let processes = self
            .machines
            .iter()
            .filter_map(|machine| machine.process.as_ref());
        let running = processes.filter_map(|process| process.running.as_ref());
        running.map(|running| running.node().routes().count()).sum()
    }

    /// The leases that the store has.
    fn records(&self) -> Vec<Record> {
        let config = &self.setup.config;
        let here = Here::default();
        let prefix = lease_prefix(PREFIX);
        let entries = self.store.entries(self.queue.now(), &prefix);
        let records = entries.map(|(entry, _)| {
            let read = read_peer(PREFIX, &entry, Some(config)).ok();
            let peer = read.as_ref().and_then(|(key, record)| {
                peer_of_lease(PeerId(0), *key, record, config, &here).ok()
            });
            let peer_v6 = read.and_then(|(key, record)| {
                key.ipv6()?;
                peer_of_ipv6(PeerId(0), key, &record, config, &here).ok()
            });
            Record {
                key: entry.key,
                value: entry.value,
                peer,
                peer_v6,
            }
        });
        records.collect()
    }

    fn overlaps(&self, text: &mut String) {
        let mut subnets = BTreeMap::new();
        let mut of_ipv6 = BTreeMap::new();
        for (number, machine) in self.machines.iter().enumerate() {
            let process = machine.process.as_ref();
            let Some(running) = process.and_then(|process| process.running.as_ref()) else {
                continue;
            };
            let ours = running.ipv4();
            let before = subnets.range(..=ours).next_back();
            let after = subnets.range(ours..).next();
            for (theirs, other) in before.into_iter().chain(after) {
                if overlap(ours, *theirs) {
                    let _ = write!(
                        text,
                        "\n  machines {other} and {number} have {theirs} and {ours}"
                    );
                }
            }
            subnets.insert(ours, number);
            if let Some(ipv6) = running.key.ipv6()
                && let Some(other) = of_ipv6.insert(ipv6, number)
            {
                let _ = write!(text, "\n  machines {other} and {number} both have {ipv6}");
            }
        }
    }

    fn differences_of(
        &self,
        number: usize,
        process: &Process,
        records: &[Record],
        text: &mut String,
    ) {
        let Some(running) = &process.running else {
            let _ = write!(text, "\n  machine {number} has no lease");
            return;
        };
        if !running.unplugged.is_empty() {
            let _ = write!(text, "\n  machine {number} has not all its pods again");
        }
        if !process.agent.is_settled() {
            let _ = write!(text, "\n  machine {number} does not watch the store");
        }
        let public_ip = self.machines[number].public_ip;
        let own = format!("{}/{}", lease_prefix(PREFIX), running.key);
        let record = process.agent.manager.record();
        if record.public_ip != public_ip {
            let _ = write!(text, "\n  machine {number} is not told of its address");
        }
        if record.public_ipv6.is_some() != running.key.ipv6().is_some() {
            let _ = write!(text, "\n  machine {number} has half a record: {record:?}");
        }
        let value = record.to_json();
        let mut all = records.iter();
        if !all.any(|record| record.key == own && record.value == value) {
            let key = running.key;
            let _ = write!(
                text,
                "\n  the store has not machine {number}'s record of {key}"
            );
        }
        let others = records.iter().filter(|record| record.key != own);
        let has_ipv6 = running.key.ipv6().is_some();
        // A record under a node's own address is none of a peer.
        let others = others.filter(|record| {
            let address = record.peer.as_ref().map(|peer| peer.address.ip());
            address != Some(public_ip.into())
        });
        let peers = others.flat_map(|record| {
            let peer_v6 = record.peer_v6.as_ref().filter(|_| has_ipv6);
            record.peer.iter().chain(peer_v6)
        });
        let expected = peers.map(|peer| (peer.subnet, (peer.address, peer.vtep_mac)));
        let expected = expected.collect();
        for worker in &running.workers {
            compare(number, &expected, &reach(worker.path.node()), text);
        }
    }

    /// All pairs of pods talk to each other.
    pub(in crate::sim) fn talk_all(&mut self, seed: u64) -> Result<(), Violation> {
        let pods = self.plugged();
        // What they are still waiting for, they wait for in vain.
        for (who, port, _) in &pods {
            self.order(*who, *port, Order::Rest)?;
        }
        self.run(Duration::from_secs(1))?;
        let mut pairs = Vec::new();
        for (number, from) in pods.iter().enumerate() {
            let others = pods
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != number);
            pairs.extend(others.map(|(_, (.., to))| (*from, *to)));
        }
        // Not always the same ones.
        let mut random = Random::new(seed, Stream::Check);
        for last in (1..pairs.len()).rev() {
            pairs.swap(last, random.index(last + 1));
        }
        let pings = pairs.split_off(pairs.len().min(MAX_TALKS));
        let mut flows = Vec::new();
        for ((who, port, from), to) in pairs {
            flows.push((self.talk((who, port), to, BYTES)?, from, to));
            self.run(Duration::from_millis(20))?;
        }
        self.await_talks(&flows)?;
        self.await_pings(pings)
    }

    /// Each node hears of all others when it asks them for a sign of life.
    pub(in crate::sim) fn probe_all(&mut self) -> Result<(), Violation> {
        for round in 1..=ROUNDS {
            let now = self.queue.now();
            let asked = self.neighbours();
            for pair in &asked {
                if let Some(running) = self.machines[pair.from.machine].running(pair.from) {
                    running.workers[0].path.node_mut().probe(now, pair.id);
                }
                self.settle(pair.from)?;
            }
            self.run(Duration::from_secs(3))?;
            let later = self.neighbours();
            let mut silent = asked.iter().filter(|pair| later.contains(pair));
            match silent.next() {
                None => return Ok(()),
                Some(pair) if round == ROUNDS => {
                    return Err(Violation(format!(
                        "machine {} hears nothing of machine {}, which it has asked {ROUNDS} times",
                        pair.from.machine, pair.to
                    )));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// All pairs of nodes that can send to each other.
    fn neighbours(&self) -> Vec<Pair> {
        let all: Vec<_> = self.machines.iter().map(Machine::places).collect();
        let mut pairs = Vec::new();
        for (machine, one) in self.machines.iter().enumerate() {
            let Some(process) = &one.process else {
                continue;
            };
            let Some(running) = &process.running else {
                continue;
            };
            let process = process.number;
            for state in running.node().peers() {
                let address = state.peer.address.ip();
                if address.is_ipv6() && !one.carries_ipv6() {
                    continue;
                }
                let place = (state.peer.subnet, address);
                let is_it = |places: &Vec<_>| places.contains(&place);
                if let Some(other) = all.iter().position(is_it) {
                    // What comes from an address counts for the first peer there.
                    let workers = running.workers.iter();
                    let all_there = workers.flat_map(|worker| worker.path.node().peers());
                    let all_there = all_there.filter(|it| it.peer.address.ip() == address);
                    pairs.push(Pair {
                        from: Who { machine, process },
                        to: other,
                        id: state.peer.id,
                        received: all_there.map(|it| it.received.packets).sum(),
                    });
                }
            }
        }
        pairs
    }

    fn await_talks(&mut self, flows: &[(u64, Ipv4Addr, Ipv4Addr)]) -> Result<(), Violation> {
        let mut open: BTreeSet<_> = flows.iter().copied().collect();
        for _ in 0..TALK {
            for (flow, from, to) in std::mem::take(&mut open) {
                match self.oracle.flow(flow) {
                    Flow::Done => {}
                    Flow::Open => {
                        open.insert((flow, from, to));
                    }
                    Flow::Failed(why) => {
                        return Err(Violation(format!("{from} cannot talk to {to}: {why}")));
                    }
                }
            }
            if open.is_empty() {
                return Ok(());
            }
            self.run(Duration::from_secs(1))?;
        }
        let (_, from, to) = open.first().copied().unwrap_or(flows[0]);
        Err(Violation(format!(
            "{from} still talks to {to} after {TALK} s, as do {} pairs",
            open.len()
        )))
    }

    /// Several times, because a pod's stack asks for one neighbour a second, and few pings wait.
    fn await_pings(&mut self, mut pairs: Vec<(Pod, Ipv4Addr)>) -> Result<(), Violation> {
        for _ in 0..ROUNDS {
            let mut pings = Vec::new();
            for (from, to) in &pairs {
                pings.push(self.ping((from.0, from.1), *to, 64)?);
                self.run(Duration::from_millis(20))?;
            }
            self.run(Duration::from_secs(3))?;
            let mut pings = pings.into_iter();
            pairs.retain(|_| {
                pings
                    .next()
                    .is_none_or(|ping| !self.oracle.is_answered(ping))
            });
        }
        match pairs.first() {
            None => Ok(()),
            Some(((.., from), to)) => {
                let pings = format!("{ROUNDS} pings from {from} to {to} have no answer");
                Err(Violation(pings))
            }
        }
    }
}

fn compare(number: usize, expected: &Reach, actual: &Reach, text: &mut String) {
    for (subnet, (address, _)) in expected {
        if !actual.contains_key(subnet) {
            let _ = write!(
                text,
                "\n  machine {number} has no peer for {subnet} at {address}"
            );
        }
    }
    for (subnet, found) in actual {
        match expected.get(subnet) {
            None => {
                let _ = write!(
                    text,
                    "\n  machine {number} has a stale peer for {subnet} at {}",
                    found.0
                );
            }
            Some(wanted) if wanted != found => {
                let _ = write!(
                    text,
                    "\n  machine {number} has the peer for {subnet} at {found:?}, and it is at {wanted:?}"
                );
            }
            Some(_) => {}
        }
    }
}

/// Tables keep their bounds, hold nothing of ports that have gone, and routes are those of peers.
fn check_bounds(number: usize, running: &LeasedNode) -> Result<(), Violation> {
    let mut workers = running.workers.iter();
    workers.try_for_each(|worker| check_node(number, running, worker.path.node()))
}

fn check_node(number: usize, running: &LeasedNode, node: &Node) -> Result<(), Violation> {
    let wrong = |what: &str| Err(Violation(format!("machine {number} {what}")));
    let limits = LIMITS;
    let learned = node.fdb().filter(|(_, entry)| entry.seen.is_some());
    if learned.count() > limits.fdb {
        return wrong("has learned too many MAC addresses");
    }
    let sought = node.neighbours();
    let sought = sought.filter(|(.., state)| *state != State::Permanent);
    if sought.count() > limits.neighbours {
        return wrong("has too many neighbours");
    }
    let is_gone = |port: &PortId| !running.ports.contains_key(port);
    if node.fdb().any(|(_, entry)| is_gone(&entry.port)) {
        return wrong("has a MAC address behind a port that is gone");
    }
    let mut places = node.neighbours().filter_map(|(_, place, _)| place);
    if places.any(|place| is_gone(&place.port)) {
        return wrong("has a neighbour behind a port that is gone");
    }
    if running.stray_flow().is_some() {
        return wrong("has a flow of a pod that is gone");
    }
    if node.ports().count() != running.ports.len() {
        return wrong("has other ports than were attached");
    }
    let own: Vec<IpNet> = running.key.nets().iter().collect();
    let is_own = |peer: &IpNet| own.iter().any(|own| own.contains(peer));
    let peers = node.peers().map(|state| state.peer.subnet);
    let mut expected: BTreeSet<_> = peers.filter(|peer| !is_own(peer)).collect();
    expected.extend(&own);
    let routes: BTreeSet<_> = node.routes().map(|(prefix, _)| prefix).collect();
    if routes != expected {
        return wrong("has other routes than peers");
    }
    let is_lease = |prefix: &IpNet| {
        let of_version = |own: &&IpNet| own.addr().is_ipv4() == prefix.addr().is_ipv4();
        let own = own.iter().find(of_version);
        own.is_some_and(|own| own.prefix_len() == prefix.prefix_len())
    };
    if !routes.iter().all(is_lease) {
        return wrong("has a peer with more or less than a lease");
    }
    let mut hops = node.routes();
    if hops.any(|(prefix, hop)| (*hop == NextHop::Local) != own.contains(&prefix)) {
        return wrong("has a wrong next hop for its own pods");
    }
    let addresses = running.ports.values().flat_map(Plugged::addresses);
    let permanent = node.neighbours();
    let permanent = permanent.filter(|(.., state)| *state == State::Permanent);
    let permanent: BTreeSet<_> = permanent.map(|(address, ..)| address).collect();
    if permanent != addresses.collect() {
        return wrong("has other permanent neighbours than pods");
    }
    Ok(())
}
