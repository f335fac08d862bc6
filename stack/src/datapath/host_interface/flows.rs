//! The host's flows to pods, in a table that all workers share.
//!
//! It has a fixed size. Whoever looks a flow up takes no lock: each slot has a version, which is odd
//! while the slot is written (a sequence lock). A flow that begins takes one.

use std::hash::BuildHasher;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use smoltcp::time::{Duration, Instant};

use super::packet::Signs;
use crate::datapath::egress::Protocol;
use crate::datapath::hash::Seed;

/// Slots of the table. A power of two.
const SLOTS: usize = 1 << 14;
/// In how many slots a flow may be, from the one that its hash says on.
const WINDOW: usize = 16;
/// How many ports are tried for a flow whose own is taken.
const TRIES: u64 = 64;
/// The first port that is given to a flow whose own is taken (RFC 6335 section 6: the others are
/// system ports).
const FIRST_PORT: u16 = 1024;

/// How long an established TCP connection may be silent (RFC 5382 section 5).
const TCP_IDLE: Duration = Duration::from_secs(2 * 3600 + 4 * 60);
/// How long one may take to be established or closed (the same section).
const TCP_TRANSITORY: Duration = Duration::from_secs(4 * 60);
/// How long UDP may be silent (RFC 4787 section 4.3).
const UDP_IDLE: Duration = Duration::from_secs(120);
/// How long echo requests may be (RFC 5508 section 3.2).
const PING_IDLE: Duration = Duration::from_secs(60);
/// How exact the time is at which a flow was used last: it is not written for each packet.
const GRAIN: u64 = 1000;

/// There were too many flows, and none was idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there are too many flows of the host")]
pub struct Full;

/// What makes packets of the host's one flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WayOut {
    pub(crate) protocol: Protocol,
    /// The pod's end; of an echo request without a port.
    pub(crate) pod: SocketAddrV4,
    /// The host's own end; its identifier is an echo request's port.
    pub(crate) host: SocketAddrV4,
}

/// Where the pod of a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// On this node: it sees the host's own end.
    Local,
    /// On another node: it sees the base address and the port that [`HostFlows`] gives.
    Remote,
}

/// Flows of the host with pods.
#[derive(Debug)]
pub struct HostFlows {
    slots: Box<[Slot]>,
    /// Held while a flow begins.
    begins: Mutex<()>,
    seed: Seed,
}

/// A place for one direction of a flow, or for both where these have one port.
#[derive(Debug, Default)]
struct Slot {
    version: AtomicU64,
    /// Zero in a slot that was never used.
    key: AtomicU64,
    host: AtomicU64,
    /// The slot of the other direction.
    partner: AtomicU64,
    used: AtomicU64,
}

/// What is in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    protocol: Protocol,
    finds: Finds,
    pod: SocketAddrV4,
    host: SocketAddrV4,
    /// The host's port as the pod sees it.
    port: u16,
    partner: usize,
}

/// By which packets a record is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finds {
    /// Those of the host, and the answers of pods of this node, by the host's own end.
    Out,
    /// Those of other nodes' pods.
    Back,
    /// All.
    Both,
}

/// When a flow was used last, and how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Used {
    /// In milliseconds.
    at: u64,
    is_answered: bool,
    is_closing: bool,
}

impl HostFlows {
    /// A table without flows; `seed` is unpredictable.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            begins: Mutex::new(()),
            seed: Seed(seed),
        }
    }

    /// A table with the same flows.
    pub(crate) fn fork(&self) -> Self {
        let _held = self.begins.lock().unwrap_or_else(PoisonError::into_inner);
        Self {
            slots: self.slots.iter().map(Slot::fork).collect(),
            begins: Mutex::new(()),
            seed: self.seed,
        }
    }

    /// How many records of flows there are at that time.
    #[must_use]
    pub fn count(&self, now: Instant) -> usize {
        let lives = |index: &usize| self.live(*index, now).is_some();
        (0..SLOTS).filter(lives).count()
    }

    /// The port by which the pod of a flow knows the host, if the flow is known.
    pub(crate) fn out(&self, now: Instant, flow: &WayOut, signs: Signs) -> Option<u16> {
        let (index, record) = self.find_out(now, flow)?;
        self.touch(index, now, record.protocol, signs);
        Some(record.port)
    }

    /// Whether a pod of this node answers the host by this packet.
    pub(crate) fn answers(&self, now: Instant, flow: &WayOut, signs: Signs) -> bool {
        let found = self.find_out(now, flow);
        if let Some((index, record)) = found {
            self.touch(index, now, record.protocol, signs.answer());
        }
        found.is_some()
    }

    /// The host's end of the flow with another node's pod, which knows the host by this port.
    pub(crate) fn back(
        &self,
        now: Instant,
        protocol: Protocol,
        pod: SocketAddrV4,
        port: u16,
        signs: Signs,
    ) -> Option<SocketAddrV4> {
        let (index, record) = self.find_back(now, protocol, pod, port)?;
        self.touch(index, now, protocol, signs.answer());
        Some(record.host)
    }

    /// Begins a flow, unless it is known already, and returns the port by which the pod is to know the
    /// host: the host's own, if that is free.
    ///
    /// # Errors
    /// `Full`.
    pub(crate) fn begin(&self, now: Instant, flow: &WayOut, way: Way) -> Result<u16, Full> {
        let _held = self.begins.lock().unwrap_or_else(PoisonError::into_inner);
        // Another worker may have been faster.
        if let Some((_, record)) = self.find_out(now, flow) {
            return Ok(record.port);
        }
        let WayOut {
            protocol,
            pod,
            host,
        } = *flow;
        let mut record = Record {
            protocol,
            finds: Finds::Out,
            pod,
            host,
            port: host.port(),
            partner: 0,
        };
        if way == Way::Remote {
            record.port = self.free_port(now, flow).ok_or(Full)?;
            if record.port == host.port() {
                record.finds = Finds::Both;
            }
        }
        let place = self.place(now, flow, host.port(), None).ok_or(Full)?;
        record.partner = place;
        if way == Way::Remote && record.finds == Finds::Out {
            let back = self.place(now, flow, record.port, Some(place));
            record.partner = back.ok_or(Full)?;
            let answer = Record {
                finds: Finds::Back,
                partner: place,
                ..record
            };
            self.write(record.partner, now, answer);
        }
        self.write(place, now, record);
        Ok(record.port)
    }

    fn find_out(&self, now: Instant, flow: &WayOut) -> Option<(usize, Record)> {
        let is_it = |record: &Record| {
            record.finds != Finds::Back
                && (record.protocol, record.pod, record.host)
                    == (flow.protocol, flow.pod, flow.host)
        };
        self.find(now, (flow.protocol, flow.pod, flow.host.port()), is_it)
    }

    fn find_back(
        &self,
        now: Instant,
        protocol: Protocol,
        pod: SocketAddrV4,
        port: u16,
    ) -> Option<(usize, Record)> {
        let is_it = |record: &Record| {
            record.finds != Finds::Out
                && (record.protocol, record.pod, record.port) == (protocol, pod, port)
        };
        self.find(now, (protocol, pod, port), is_it)
    }

    fn find(
        &self,
        now: Instant,
        key: (Protocol, SocketAddrV4, u16),
        is_it: impl Fn(&Record) -> bool,
    ) -> Option<(usize, Record)> {
        self.window(key).find_map(|index| {
            let record = self.slots[index].read().filter(&is_it)?;
            (!self.used(index).is_over(record.protocol, now)).then_some((index, record))
        })
    }

    /// A port that no other flow with that pod has: the host's own if possible.
    fn free_port(&self, now: Instant, flow: &WayOut) -> Option<u16> {
        let is_free = |port: &u16| {
            let taken = self.find_back(now, flow.protocol, flow.pod, *port);
            taken.is_none()
        };
        let own = Some(flow.host.port()).filter(is_free);
        own.or_else(|| {
            // Ports in use lie side by side: those that are tried do not.
            let hash = self.seed.hash_one((flow.protocol, flow.pod, flow.host));
            let ports = u64::from(u16::MAX - FIRST_PORT) + 1;
            let (first, stride) = (hash % ports, ((hash >> 32) % ports) | 1);
            let tried = (0..TRIES).map(|step| (first + step * stride) % ports);
            let mut tried = tried.map(|at| FIRST_PORT + at as u16);
            tried.find(is_free)
        })
    }

    /// Where a record may be written: a slot that is free or idle, or else the one of a flow that
    /// nobody has answered for the longest time.
    fn place(&self, now: Instant, flow: &WayOut, port: u16, taken: Option<usize>) -> Option<usize> {
        let window = || {
            let window = self.window((flow.protocol, flow.pod, port));
            window.filter(|index| Some(*index) != taken)
        };
        if let Some(free) = window().find(|index| self.live(*index, now).is_none()) {
            return Some(free);
        }
        let unanswered = window().filter(|index| !self.used(*index).is_answered);
        unanswered.min_by_key(|index| self.used(*index).at)
    }

    fn live(&self, index: usize, now: Instant) -> Option<Record> {
        let record = self.slots[index].read()?;
        (!self.used(index).is_over(record.protocol, now)).then_some(record)
    }

    fn window(&self, key: (Protocol, SocketAddrV4, u16)) -> impl Iterator<Item = usize> + use<> {
        let first = self.seed.hash_one(key) as usize;
        (0..WINDOW).map(move |step| first.wrapping_add(step) % SLOTS)
    }

    fn used(&self, index: usize) -> Used {
        Used::from_bits(self.slots[index].used.load(Ordering::Relaxed))
    }

    /// A packet of a flow has passed.
    fn touch(&self, index: usize, now: Instant, protocol: Protocol, signs: Signs) {
        let before = self.used(index);
        let mut after = before;
        if signs.begins && before.is_closing {
            // The same ports, another connection.
            (after.is_answered, after.is_closing) = (false, false);
        }
        after.is_answered |= signs.answers;
        after.is_closing |= protocol == Protocol::Tcp && signs.ends;
        let now = millis(now);
        let is_same =
            (after.is_answered, after.is_closing) == (before.is_answered, before.is_closing);
        if is_same && now < before.at + GRAIN {
            return;
        }
        after.at = now;
        let partner = self.slots[index].partner.load(Ordering::Relaxed) as usize;
        for index in [index, partner % SLOTS] {
            self.slots[index]
                .used
                .store(after.to_bits(), Ordering::Relaxed);
        }
    }

    /// Writes a record in place of what was there, whose other direction goes, too. Only who holds the
    /// lock may.
    fn write(&self, index: usize, now: Instant, record: Record) {
        if let Some(former) = self.slots[index].read()
            && former.partner != index
            && let Some(partner) = self.slots[former.partner].read()
            && partner.partner == index
        {
            self.slots[former.partner].write(None);
        }
        let used = Used {
            at: millis(now),
            is_answered: false,
            is_closing: false,
        };
        self.slots[index]
            .used
            .store(used.to_bits(), Ordering::Relaxed);
        self.slots[index].write(Some(record));
    }
}

impl Slot {
    /// What is in it; nothing if it is empty or being written.
    fn read(&self) -> Option<Record> {
        let before = self.version.load(Ordering::Acquire);
        let key = self.key.load(Ordering::Relaxed);
        let host = self.host.load(Ordering::Relaxed);
        let partner = self.partner.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let after = self.version.load(Ordering::Relaxed);
        (before == after && before.is_multiple_of(2))
            .then(|| Record::from_bits(key, host, partner))
            .flatten()
    }

    /// A slot with the same content. Nobody writes it meanwhile.
    fn fork(&self) -> Self {
        let copy = |from: &AtomicU64| AtomicU64::new(from.load(Ordering::Relaxed));
        Self {
            version: copy(&self.version),
            key: copy(&self.key),
            host: copy(&self.host),
            partner: copy(&self.partner),
            used: copy(&self.used),
        }
    }

    fn write(&self, record: Option<Record>) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        let (key, host, partner) = record.map(Record::to_bits).unwrap_or_default();
        self.key.store(key, Ordering::Relaxed);
        self.host.store(host, Ordering::Relaxed);
        self.partner.store(partner, Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }
}

impl Record {
    fn to_bits(self) -> (u64, u64, u64) {
        let protocol: u64 = match self.protocol {
            Protocol::Tcp => 1,
            Protocol::Udp => 2,
            Protocol::Ping => 3,
        };
        let finds: u64 = match self.finds {
            Finds::Out => 1,
            Finds::Back => 2,
            Finds::Both => 3,
        };
        let key = end_bits(self.pod) | protocol << 8 | finds;
        let host = end_bits(self.host) | u64::from(self.port);
        (key, host, self.partner as u64)
    }

    fn from_bits(key: u64, host: u64, partner: u64) -> Option<Self> {
        let protocol = match key >> 8 & 0xff {
            1 => Protocol::Tcp,
            2 => Protocol::Udp,
            3 => Protocol::Ping,
            _ => return None,
        };
        let finds = match key & 0xff {
            1 => Finds::Out,
            2 => Finds::Back,
            3 => Finds::Both,
            _ => return None,
        };
        Some(Self {
            protocol,
            finds,
            pod: end(key),
            host: end(host),
            port: host as u16,
            partner: partner as usize % SLOTS,
        })
    }
}

/// An address and a port in the upper 48 bits.
fn end_bits(end: SocketAddrV4) -> u64 {
    u64::from(end.ip().to_bits()) << 32 | u64::from(end.port()) << 16
}

fn end(bits: u64) -> SocketAddrV4 {
    SocketAddrV4::new(
        Ipv4Addr::from_bits((bits >> 32) as u32),
        (bits >> 16) as u16,
    )
}

impl Used {
    const fn to_bits(self) -> u64 {
        self.at << 2 | (self.is_answered as u64) << 1 | self.is_closing as u64
    }

    const fn from_bits(bits: u64) -> Self {
        Self {
            at: bits >> 2,
            is_answered: bits & 2 != 0,
            is_closing: bits & 1 != 0,
        }
    }

    /// Whether a flow has been idle for too long.
    fn is_over(self, protocol: Protocol, now: Instant) -> bool {
        let idle = match protocol {
            Protocol::Tcp if self.is_answered && !self.is_closing => TCP_IDLE,
            Protocol::Tcp => TCP_TRANSITORY,
            Protocol::Udp => UDP_IDLE,
            Protocol::Ping => PING_IDLE,
        };
        millis(now) > self.at + idle.total_millis() + GRAIN
    }
}

fn millis(now: Instant) -> u64 {
    u64::try_from(now.total_millis()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 244, 2, 7), 80);

    fn flow(last: u8, port: u16) -> WayOut {
        WayOut {
            protocol: Protocol::Tcp,
            pod: POD,
            host: SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, last), port),
        }
    }

    fn back(flows: &HostFlows, now: Instant, port: u16) -> Option<SocketAddrV4> {
        flows.back(now, Protocol::Tcp, POD, port, Signs::default())
    }

    #[test]
    fn a_port_is_kept_where_it_is_free_and_answers_find_their_way() {
        let flows = HostFlows::new(7);
        let now = Instant::ZERO;
        let first = flow(1, 40_000);
        assert_eq!(flows.out(now, &first, Signs::default()), None);
        assert_eq!(flows.begin(now, &first, Way::Remote), Ok(40_000));
        assert_eq!(flows.begin(now, &first, Way::Remote), Ok(40_000));
        assert_eq!(flows.out(now, &first, Signs::default()), Some(40_000));
        let second = flow(2, 40_000);
        let port = flows.begin(now, &second, Way::Remote).unwrap();
        assert!(port != 40_000 && port >= FIRST_PORT);
        assert_eq!(flows.out(now, &second, Signs::default()), Some(port));
        assert_eq!(back(&flows, now, 40_000), Some(first.host));
        assert_eq!(back(&flows, now, port), Some(second.host));
        assert_eq!(back(&flows, now, port ^ 1), None);
        let other = SocketAddrV4::new(*POD.ip(), 81);
        let strangers = flows.back(now, Protocol::Tcp, other, 40_000, Signs::default());
        assert_eq!(strangers, None);
        // One port is taken for each flow, and each has one record or two.
        assert_eq!(flows.count(now), 3);
    }

    #[test]
    fn flows_of_pods_of_this_node_take_no_port() {
        let flows = HostFlows::new(7);
        let now = Instant::ZERO;
        assert_eq!(flows.begin(now, &flow(1, 40_000), Way::Local), Ok(40_000));
        assert_eq!(back(&flows, now, 40_000), None);
        assert!(flows.answers(now, &flow(1, 40_000), Signs::default()));
        assert!(!flows.answers(now, &flow(2, 40_000), Signs::default()));
    }

    #[test]
    fn a_flow_ends_when_it_was_idle_for_too_long() {
        let (syn, fin) = (Signs::BEGIN, Signs::END);
        let flows = HostFlows::new(7);
        let at = Instant::from_secs;
        let one = flow(1, 40_000);
        let lives = |now| flows.out(now, &one, Signs::default()).is_some();
        flows.begin(at(0), &one, Way::Remote).unwrap();
        assert!(flows.find_out(at(242), &one).is_none(), "unanswered");
        flows.begin(at(300), &one, Way::Remote).unwrap();
        assert!(back(&flows, at(301), 40_000).is_some());
        assert!(lives(at(301 + 7000)) && lives(at(301 + 14_000)));
        flows.out(at(20_000), &one, fin);
        assert!(lives(at(20_200)));
        // Another connection of the same ports.
        flows.out(at(20_300), &one, syn);
        flows.back(at(20_300), Protocol::Tcp, POD, 40_000, Signs::default());
        assert!(lives(at(20_300 + 7000)));
        flows.out(at(30_000), &one, fin);
        assert!(!lives(at(30_242)));
    }

    #[test]
    fn both_directions_of_a_flow_live_and_end_together() {
        let flows = HostFlows::new(7);
        let at = Instant::from_secs;
        flows.begin(at(0), &flow(1, 40_000), Way::Remote).unwrap();
        let second = flow(2, 40_000);
        let port = flows.begin(at(0), &second, Way::Remote).unwrap();
        back(&flows, at(1), port).unwrap();
        // Only one direction is used for hours.
        for hour in 1..10 {
            flows
                .out(at(hour * 3600), &second, Signs::default())
                .unwrap();
        }
        assert_eq!(back(&flows, at(9 * 3600 + 7000), port), Some(second.host));
    }

    #[test]
    fn a_full_table_takes_the_place_of_who_was_never_answered() {
        let flows = HostFlows::new(7);
        let now = Instant::from_secs(1);
        let answered: Vec<_> = (1..2000).map(|port| flow(1, port)).collect();
        for flow in &answered {
            flows.begin(now, flow, Way::Remote).unwrap();
            assert!(back(&flows, now, flow.host.port()).is_some());
        }
        for last in 2..=60 {
            for port in 2000..2500 {
                let _ = flows.begin(now, &flow(last, port), Way::Remote);
            }
        }
        for flow in &answered {
            let port = flow.host.port();
            assert_eq!(back(&flows, now, port), Some(flow.host));
        }
        assert!(flows.count(now) > SLOTS / 2);
    }

    #[test]
    fn workers_that_begin_flows_at_once_give_no_port_twice() {
        let flows = HostFlows::new(7);
        let now = Instant::ZERO;
        std::thread::scope(|scope| {
            for worker in 1..=4 {
                let flows = &flows;
                scope.spawn(move || {
                    for port in 1000..1200 {
                        flows.begin(now, &flow(worker, port), Way::Remote).unwrap();
                    }
                });
            }
        });
        let mut ports = std::collections::HashSet::new();
        for worker in 1..=4 {
            for port in 1000..1200 {
                let flow = flow(worker, port);
                let given = flows.out(now, &flow, Signs::default()).unwrap();
                assert!(ports.insert(given), "{given} is given twice");
                assert_eq!(back(&flows, now, given), Some(flow.host));
            }
        }
    }
}
