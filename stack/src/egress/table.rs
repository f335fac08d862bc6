//! The table of flows: by what packets say, by number, by pod and use, and by when something is due.

use std::collections::{BTreeSet, HashMap};
use std::net::Ipv4Addr;

use smoltcp::time::{Duration, Instant};

use super::flow::Direction;
use super::{FlowId, FlowKey};
use crate::drops::DropReason;
use crate::hash::Seed;

/// Flows of type `T`, at most so many, and at most so many of one pod.
pub(super) struct Table<T> {
    limit: usize,
    limit_of_pod: usize,
    by_key: HashMap<FlowKey, u32, Seed>,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// What each has carried. A column of its own, since every packet changes it.
    usage: Vec<Usage>,
    by_use: ByUse,
    by_pod: HashMap<Ipv4Addr, ByUse, Seed>,
    due: BTreeSet<(Instant, u32)>,
    /// Flows that [`Table::oldest`] has put in their place.
    #[cfg(test)]
    relisted: usize,
}

/// Flows by their use, as far as it is listed. That is not brought up to date for every packet, but
/// when the oldest is looked for.
type ByUse = BTreeSet<(Instant, u32)>;

struct Slot<T> {
    generation: u32,
    due: Option<Instant>,
    /// The use by which it is listed.
    listed: Instant,
    flow: Option<(FlowKey, T)>,
}

/// Those among whom a place must become free for another flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crowd {
    /// All flows.
    All,
    /// Those of the pod.
    Pod(Ipv4Addr),
}

impl Crowd {
    /// Why there is no other flow if no place becomes free.
    pub(super) const fn reason(self) -> DropReason {
        match self {
            Self::All => DropReason::EgressTableFull,
            Self::Pod(_) => DropReason::EgressPodFull,
        }
    }
}

/// Bytes of payload that were moved at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Moved {
    /// From the pod.
    pub(super) sent: usize,
    /// To the pod.
    pub(super) received: usize,
}

impl Moved {
    /// Whether there were any.
    pub(super) const fn is_any(self) -> bool {
        self.sent + self.received > 0
    }
}

/// What a flow has carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usage {
    /// Who began it.
    pub(super) direction: Direction,
    /// When it began.
    pub(super) since: Instant,
    /// When it was last in use.
    pub(super) active: Instant,
    /// Bytes of payload from the pod.
    pub(super) sent: u64,
    /// Bytes of payload to the pod.
    pub(super) received: u64,
}

impl<T> Table<T> {
    pub(super) fn new(limit: usize, limit_of_pod: usize, seed: Seed) -> Self {
        Self {
            limit,
            limit_of_pod,
            by_key: HashMap::with_hasher(seed),
            slots: Vec::new(),
            free: Vec::new(),
            usage: Vec::new(),
            by_use: ByUse::new(),
            by_pod: HashMap::with_hasher(seed),
            due: BTreeSet::new(),
            #[cfg(test)]
            relisted: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Those who leave no room for another flow of a pod.
    pub(super) fn crowd(&self, pod: Ipv4Addr) -> Option<Crowd> {
        let its = self.by_pod.get(&pod).map_or(0, ByUse::len);
        if its >= self.limit_of_pod {
            return Some(Crowd::Pod(pod));
        }
        (self.len() >= self.limit).then_some(Crowd::All)
    }

    pub(super) fn find(&self, key: &FlowKey) -> Option<FlowId> {
        self.by_key.get(key).map(|index| self.id(*index))
    }

    fn id(&self, index: u32) -> FlowId {
        FlowId {
            index,
            generation: self.slots[index as usize].generation,
        }
    }

    /// The identity that the next flow will have.
    pub(super) fn next_id(&self) -> FlowId {
        match self.free.last() {
            Some(index) => self.id(*index),
            None => FlowId {
                index: self.slots.len() as u32,
                generation: 0,
            },
        }
    }

    /// Adds a flow whose key is in no other; its identity was [`Self::next_id`].
    pub(super) fn insert(
        &mut self,
        now: Instant,
        direction: Direction,
        key: FlowKey,
        flow: T,
    ) -> FlowId {
        let usage = Usage {
            direction,
            since: now,
            active: now,
            sent: 0,
            received: 0,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                due: None,
                listed: now,
                flow: None,
            });
            self.usage.push(usage);
            (self.slots.len() - 1) as u32
        });
        self.slots[index as usize].flow = Some((key, flow));
        self.usage[index as usize] = usage;
        self.by_key.insert(key, index);
        self.list(index, *key.pod.ip(), now);
        self.id(index)
    }

    fn slot(&self, id: FlowId) -> Option<&Slot<T>> {
        let slot = self.slots.get(id.index as usize)?;
        (slot.generation == id.generation).then_some(slot)
    }

    pub(super) fn get(&self, id: FlowId) -> Option<(FlowKey, &T)> {
        let (key, flow) = self.slot(id)?.flow.as_ref()?;
        Some((*key, flow))
    }

    pub(super) fn get_mut(&mut self, id: FlowId) -> Option<(FlowKey, &mut T)> {
        let slot = self.slots.get_mut(id.index as usize)?;
        let (key, flow) = slot.flow.as_mut()?;
        (slot.generation == id.generation).then_some((*key, flow))
    }

    pub(super) fn remove(&mut self, id: FlowId) -> Option<(FlowKey, T)> {
        self.slot(id)?;
        let slot = self.slots.get_mut(id.index as usize)?;
        let (key, flow) = slot.flow.take()?;
        slot.generation = (slot.generation + 1) % FlowId::GENERATIONS;
        if let Some(due) = slot.due.take() {
            self.due.remove(&(due, id.index));
        }
        self.unlist(id.index, *key.pod.ip());
        self.by_key.remove(&key);
        self.free.push(id.index);
        Some((key, flow))
    }

    /// Marks a flow as in use by so many bytes of payload from and to the pod.
    pub(super) fn count(&mut self, id: FlowId, now: Instant, moved: Moved) {
        if let Some(usage) = self.usage.get_mut(id.index as usize) {
            usage.active = now;
            usage.sent += moved.sent as u64;
            usage.received += moved.received as u64;
        }
    }

    /// Counts bytes that are no use of a flow.
    pub(super) fn count_idle(&mut self, id: FlowId, moved: Moved) {
        let active = self.active(id);
        self.count(id, active, moved);
    }

    /// When a flow was last in use.
    pub(super) fn active(&self, id: FlowId) -> Instant {
        let usage = self.usage.get(id.index as usize);
        usage.map_or(Instant::ZERO, |usage| usage.active)
    }

    /// The flow of a crowd that has not been in use for the longest time, if that is `idle` at
    /// least. To find it, a flow is put in its place no more than once in that time.
    pub(super) fn oldest(&mut self, now: Instant, idle: Duration, crowd: Crowd) -> Option<FlowId> {
        loop {
            let flows = match crowd {
                Crowd::All => &self.by_use,
                Crowd::Pod(pod) => self.by_pod.get(&pod)?,
            };
            let (listed, index) = *flows.first()?;
            if listed + idle > now {
                return None;
            }
            let active = self.usage[index as usize].active;
            if active == listed {
                return Some(self.id(index));
            }
            let (key, _) = self.slots[index as usize].flow.as_ref()?;
            let pod = *key.pod.ip();
            self.unlist(index, pod);
            self.list(index, pod, active);
            #[cfg(test)]
            {
                self.relisted += 1;
            }
        }
    }

    fn list(&mut self, index: u32, pod: Ipv4Addr, active: Instant) {
        self.slots[index as usize].listed = active;
        self.by_use.insert((active, index));
        self.by_pod.entry(pod).or_default().insert((active, index));
    }

    fn unlist(&mut self, index: u32, pod: Ipv4Addr) {
        let entry = (self.slots[index as usize].listed, index);
        self.by_use.remove(&entry);
        if let Some(its) = self.by_pod.get_mut(&pod) {
            its.remove(&entry);
            if its.is_empty() {
                self.by_pod.remove(&pod);
            }
        }
    }

    /// Has a flow looked at no later than `due`; it may happen earlier.
    pub(super) fn schedule(&mut self, id: FlowId, due: Instant) {
        let Some(slot) = self.slots.get_mut(id.index as usize) else {
            return;
        };
        if slot.flow.is_none() || slot.due.is_some_and(|set| set <= due) {
            return;
        }
        if let Some(old) = slot.due.replace(due) {
            self.due.remove(&(old, id.index));
        }
        self.due.insert((due, id.index));
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Takes a flow that is to be looked at.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<FlowId> {
        let (due, index) = *self.due.first()?;
        if due > now {
            return None;
        }
        self.due.pop_first();
        self.slots[index as usize].due = None;
        Some(self.id(index))
    }

    /// The flows of a pod.
    pub(super) fn of_pod(&self, pod: Ipv4Addr) -> impl Iterator<Item = FlowId> {
        let its = self.by_pod.get(&pod).into_iter().flatten();
        its.map(|(_, index)| self.id(*index))
    }

    /// The flows and what they have carried, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (FlowKey, &T, Usage)> {
        let used = self.slots.iter().zip(&self.usage);
        used.filter_map(|(slot, usage)| {
            let (key, flow) = slot.flow.as_ref()?;
            Some((*key, flow, *usage))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV4;

    use proptest::prelude::*;

    use super::super::Protocol;
    use super::*;

    const IDLE: Duration = Duration::from_secs(10);

    fn pod(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, 1, number)
    }

    fn key(pod: Ipv4Addr, port: u16) -> FlowKey {
        FlowKey {
            protocol: Protocol::Udp,
            pod: SocketAddrV4::new(pod, port),
            remote: SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 53),
        }
    }

    fn table(limit: usize, limit_of_pod: usize) -> Table<()> {
        Table::new(limit, limit_of_pod, Seed(1))
    }

    fn at(seconds: i64) -> Instant {
        Instant::from_secs(seconds)
    }

    #[test]
    fn many_flows_through_a_full_table_cost_little_each() {
        const FLOWS: usize = 4096;
        let mut table = table(FLOWS, FLOWS);
        let ids: Vec<_> = (0..FLOWS)
            .map(|port| table.insert(at(0), Direction::Out, key(pod(2), port as u16), ()))
            .collect();
        // All have been in use, but none for so long that it makes room.
        for id in &ids {
            table.count(*id, at(15), Moved::default());
        }
        for _ in 0..1000 {
            assert_eq!(table.oldest(at(20), IDLE, Crowd::All), None);
        }
        assert_eq!(table.relisted, FLOWS, "once each, and not 1000 times");
        for port in 0..FLOWS {
            let oldest = table.oldest(at(25), IDLE, Crowd::All).unwrap();
            assert!(table.remove(oldest).is_some());
            table.insert(at(25), Direction::Out, key(pod(3), port as u16), ());
        }
        assert_eq!(table.relisted, FLOWS, "none had been in use since");
        assert_eq!(table.oldest(at(25), IDLE, Crowd::All), None);
    }

    #[test]
    fn a_pod_crowds_before_all_do() {
        let mut table = table(4, 2);
        let ids: Vec<_> = (0..2)
            .map(|port| table.insert(at(0), Direction::Out, key(pod(2), port), ()))
            .collect();
        assert_eq!(table.crowd(pod(2)), Some(Crowd::Pod(pod(2))));
        assert_eq!(table.crowd(pod(3)), None);
        for port in 0..2 {
            table.insert(at(0), Direction::Out, key(pod(3), port), ());
        }
        assert_eq!(table.crowd(pod(4)), Some(Crowd::All));
        assert_eq!(table.of_pod(pod(2)).collect::<Vec<_>>(), ids);
        for id in ids {
            table.remove(id);
        }
        assert_eq!(table.crowd(pod(2)), None);
        assert_eq!(table.of_pod(pod(2)).count(), 0);
    }

    proptest! {
        #[test]
        fn the_oldest_is_the_one_that_a_search_finds(
            steps in proptest::collection::vec((0u8..4, 0u8..3, 0u16..6, 0u64..8), 1..120),
        ) {
            let mut table = table(100, 100);
            let mut model: Vec<(FlowKey, FlowId, Instant)> = Vec::new();
            let mut now = at(0);
            for (step, number, port, wait) in steps {
                now += Duration::from_secs(wait);
                let key = key(pod(number), port);
                let known = model.iter().position(|it| it.0 == key);
                match (step, known) {
                    (0, Some(known)) => {
                        table.remove(model.remove(known).1);
                    }
                    (_, Some(known)) => {
                        table.count(model[known].1, now, Moved::default());
                        model[known].2 = now;
                    }
                    (_, None) => model.push((key, table.insert(now, Direction::Out, key, ()), now)),
                }
                for crowd in [Crowd::All, Crowd::Pod(pod(number))] {
                    let its = model.iter().filter(|(key, ..)| match crowd {
                        Crowd::All => true,
                        Crowd::Pod(pod) => *key.pod.ip() == pod,
                    });
                    let oldest = its.min_by_key(|(_, id, active)| (*active, id.index));
                    let oldest = oldest.filter(|it| it.2 + IDLE <= now).map(|it| it.1);
                    prop_assert_eq!(table.oldest(now, IDLE, crowd), oldest);
                }
            }
        }
    }
}
