//! The table of flows: by what packets say, by number, by who has it and use, and by when something
//! is due.
//!
//! A full table is shared out as max-min fairness has it: a place for somebody with few flows comes
//! from whoever has most. What a pod begins and what is begun to its published ports are two shares:
//! strangers cannot take a pod's way out.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use smoltcp::time::{Duration, Instant};

use super::flow::{Direction, Usage};
use super::host::FlowId;
use super::key::{Key, Protocol};
use crate::datapath::hash::Seed;
use crate::drops::DropReason;

/// Flows of type `T`, at most so many, and at most so many of one share.
pub(super) struct Table<T> {
    limit: usize,
    limit_of_share: usize,
    by_key: HashMap<Key, u32, Seed>,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// What each has carried. A column of its own, since every packet changes it.
    usage: Vec<Usage>,
    by_share: HashMap<Share, ByValue, Seed>,
    due: BTreeSet<(Instant, u32)>,
    /// Flows that [`Table::least`] has put in their place.
    #[cfg(test)]
    relisted: usize,
}

/// Flows that are put in their places to find the least one.
const LOOKS: usize = 16;

/// Who has a flow: a pod, by who began it.
type Share = (IpAddr, Direction);

/// Flows by what they are worth, as far as that is listed. It is not brought up to date for every
/// packet, but when the least is looked for.
type ByValue = BTreeSet<(Value, u32)>;

/// What a flow is worth beside others: those whose other end has not said anything less than others,
/// and then those that have not been in use for longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Value {
    is_answered: bool,
    active: Instant,
}

struct Slot<T> {
    generation: u32,
    due: Option<Instant>,
    /// The value by which it is listed.
    listed: Value,
    flow: Option<(Key, T)>,
}

/// Why there is no place for another flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// All places are taken.
    Table,
    /// Those of this share are.
    Share,
}

impl From<Full> for DropReason {
    fn from(full: Full) -> Self {
        match full {
            Full::Table => Self::EgressTableFull,
            Full::Share => Self::EgressPodFull,
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

impl<T> Table<T> {
    pub(super) fn new(limit: usize, limit_of_share: usize, seed: Seed) -> Self {
        Self {
            limit,
            limit_of_share,
            by_key: HashMap::with_hasher(seed),
            slots: Vec::new(),
            free: Vec::new(),
            usage: Vec::new(),
            by_share: HashMap::with_hasher(seed),
            due: BTreeSet::new(),
            #[cfg(test)]
            relisted: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// The flow that has to make room for another one of a pod, if one has to.
    ///
    /// # Errors
    /// What is full, if there is no flow that does: those of the pod's own share, and of others that have
    /// as many, only do once they have been idle for `idle`. Whoever has more than one flow more than
    /// this share loses one in any case.
    pub(super) fn victim(
        &mut self,
        now: Instant,
        idle: Duration,
        pod: IpAddr,
        direction: Direction,
    ) -> Result<Option<FlowId>, Full> {
        let share = (pod, direction);
        let its = self.by_share.get(&share).map_or(0, ByValue::len);
        if its >= self.limit_of_share {
            return self
                .least_idle(now, idle, share)
                .ok_or(Full::Share)
                .map(Some);
        }
        if self.len() < self.limit {
            return Ok(None);
        }
        let largest = self.by_share.iter().map(|(share, all)| (all.len(), *share));
        match largest.max() {
            Some((most, largest)) if most > its + 1 => Ok(self.least(largest)),
            Some(_) => {
                let own = self.least_idle(now, idle, share);
                let least = own.or_else(|| self.idle_of_others(now, idle, its));
                least.ok_or(Full::Table).map(Some)
            }
            None => Err(Full::Table),
        }
    }

    /// Whether there is room for another flow of a pod, or [`Self::victim`] finds one that makes room.
    ///
    /// # Errors
    /// What is full.
    pub(super) fn has_room(
        &self,
        now: Instant,
        idle: Duration,
        pod: IpAddr,
        direction: Direction,
    ) -> Result<(), Full> {
        let its = self.by_share.get(&(pod, direction));
        let count = its.map_or(0, ByValue::len);
        let is_idle = |(_, index): &(Value, u32)| {
            let usage = self.usage.get(*index as usize);
            usage.is_some_and(|usage| usage.active + idle <= now)
        };
        if count >= self.limit_of_share {
            let has_idle = its.is_some_and(|its| its.iter().any(is_idle));
            return if has_idle { Ok(()) } else { Err(Full::Share) };
        }
        let mut shares = self.by_share.iter();
        let makes_room = |(share, all): (&Share, &ByValue)| {
            let is_larger = all.len() > count + 1;
            let may_be_idle = *share == (pod, direction) || all.len() >= count;
            is_larger || may_be_idle && all.iter().any(is_idle)
        };
        if self.len() < self.limit || shares.any(makes_room) {
            Ok(())
        } else {
            Err(Full::Table)
        }
    }

    /// The flow of a share that is worth least of those that are idle.
    fn least_idle(&mut self, now: Instant, idle: Duration, share: Share) -> Option<FlowId> {
        let is_idle = |value: Value| value.active + idle <= now;
        [false, true].into_iter().find_map(|is_answered| {
            loop {
                let (listed, index) = self.first(share, is_answered)?;
                if !is_idle(listed) {
                    return None;
                }
                if !self.relist(index, share) {
                    return Some(self.id(index));
                }
            }
        })
    }

    /// An idle flow of one of those who have no fewer: the one that has been so for longest, or nearly
    /// so.
    fn idle_of_others(&mut self, now: Instant, idle: Duration, its: usize) -> Option<FlowId> {
        for _ in 0..LOOKS {
            let others = self.by_share.iter().filter(|(_, all)| all.len() >= its);
            let firsts = others.flat_map(|(share, _)| {
                let firsts = [false, true].map(|is_answered| self.first(*share, is_answered));
                let firsts = firsts.into_iter().flatten();
                firsts.map(|(value, _)| (value.active, *share, value.is_answered))
            });
            let (active, share, is_answered) = firsts.min()?;
            if active + idle > now {
                return None;
            }
            // What has been in use since it was listed says nothing of its share.
            if self.refresh(share, is_answered) {
                continue;
            }
            let least = self.least_idle(now, idle, share);
            if least.is_some() {
                return least;
            }
        }
        None
    }

    /// The flow of a share that is worth least, or nearly so.
    fn least(&mut self, share: Share) -> Option<FlowId> {
        let mut least = None;
        for _ in 0..LOOKS {
            let first = self.first(share, false).or_else(|| self.first(share, true));
            least = first.map(|(_, index)| index);
            if !least.is_some_and(|index| self.relist(index, share)) {
                break;
            }
        }
        least.map(|index| self.id(index))
    }

    /// Has the first of a share's flows that are listed as answered or not be one that is; whether
    /// another was.
    fn refresh(&mut self, share: Share, is_answered: bool) -> bool {
        let mut was_another = false;
        while let Some((_, index)) = self.first(share, is_answered)
            && self.relist(index, share)
        {
            was_another = true;
        }
        was_another
    }

    /// The first of a share's flows that are listed as answered or not.
    fn first(&self, share: Share, is_answered: bool) -> Option<(Value, u32)> {
        let from = Value {
            is_answered,
            active: Instant::from_micros(i64::MIN),
        };
        let first = self.by_share.get(&share)?.range((from, 0)..).next();
        first
            .copied()
            .filter(|(value, _)| value.is_answered == is_answered)
    }

    pub(super) fn find(&self, key: &Key) -> Option<FlowId> {
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
        key: Key,
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
                listed: Value {
                    is_answered: false,
                    active: now,
                },
                flow: None,
            });
            self.usage.push(usage);
            (self.slots.len() - 1) as u32
        });
        self.slots[index as usize].flow = Some((key, flow));
        self.usage[index as usize] = usage;
        self.by_key.insert(key, index);
        self.list(index, (key.pod.ip(), direction));
        self.id(index)
    }

    fn slot(&self, id: FlowId) -> Option<&Slot<T>> {
        let slot = self.slots.get(id.index as usize)?;
        (slot.generation == id.generation).then_some(slot)
    }

    pub(super) fn get(&self, id: FlowId) -> Option<(Key, &T)> {
        let (key, flow) = self.slot(id)?.flow.as_ref()?;
        Some((*key, flow))
    }

    pub(super) fn get_mut(&mut self, id: FlowId) -> Option<(Key, &mut T)> {
        let slot = self.slots.get_mut(id.index as usize)?;
        let (key, flow) = slot.flow.as_mut()?;
        (slot.generation == id.generation).then_some((*key, flow))
    }

    pub(super) fn remove(&mut self, id: FlowId) -> Option<(Key, T)> {
        self.slot(id)?;
        let slot = self.slots.get_mut(id.index as usize)?;
        let (key, flow) = slot.flow.take()?;
        slot.generation = (slot.generation + 1) % FlowId::GENERATIONS;
        if let Some(due) = slot.due.take() {
            self.due.remove(&(due, id.index));
        }
        let direction = self.usage[id.index as usize].direction;
        self.unlist(id.index, (key.pod.ip(), direction));
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

    fn value(&self, index: u32) -> Option<Value> {
        let usage = self.usage.get(index as usize)?;
        let (key, _) = self.slots.get(index as usize)?.flow.as_ref()?;
        let heard = match (key.protocol, usage.direction) {
            // Whoever takes a connection has answered; but one that carries nothing shows no more.
            (Protocol::Tcp, _) => usage.sent + usage.received,
            (Protocol::Udp | Protocol::Ping, Direction::Out) => usage.received,
            (Protocol::Udp | Protocol::Ping, Direction::In) => usage.sent,
        };
        Some(Value {
            is_answered: heard > 0,
            active: usage.active,
        })
    }

    /// Puts a flow in its place; false if it is there.
    fn relist(&mut self, index: u32, share: Share) -> bool {
        let listed = self.slots.get(index as usize).map(|slot| slot.listed);
        if self.value(index) == listed {
            return false;
        }
        self.unlist(index, share);
        self.list(index, share);
        #[cfg(test)]
        {
            self.relisted += 1;
        }
        true
    }

    fn list(&mut self, index: u32, share: Share) {
        if let Some(value) = self.value(index) {
            self.slots[index as usize].listed = value;
            self.by_share
                .entry(share)
                .or_default()
                .insert((value, index));
        }
    }

    fn unlist(&mut self, index: u32, share: Share) {
        let entry = (self.slots[index as usize].listed, index);
        if let Some(its) = self.by_share.get_mut(&share) {
            its.remove(&entry);
            if its.is_empty() {
                self.by_share.remove(&share);
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
    pub(super) fn of_pod(&self, pod: IpAddr) -> impl Iterator<Item = FlowId> {
        let shares = [Direction::Out, Direction::In].map(|direction| (pod, direction));
        let its = shares
            .into_iter()
            .filter_map(|share| self.by_share.get(&share));
        its.flatten().map(|(_, index)| self.id(*index))
    }

    /// The flows and what they have carried, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &T, Usage)> {
        let used = self.slots.iter().zip(&self.usage);
        used.filter_map(|(slot, usage)| {
            let (key, flow) = slot.flow.as_ref()?;
            Some((*key, flow, *usage))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use proptest::prelude::*;

    use super::*;

    const IDLE: Duration = Duration::from_secs(10);

    fn pod(number: u8) -> IpAddr {
        Ipv4Addr::new(10, 244, 1, number).into()
    }

    fn key(pod: IpAddr, port: u16) -> Key {
        Key {
            protocol: Protocol::Udp,
            pod: SocketAddr::new(pod, port),
            remote: SocketAddr::new(Ipv4Addr::new(192, 0, 2, 1).into(), 53),
        }
    }

    fn table(limit: usize, limit_of_pod: usize) -> Table<()> {
        Table::new(limit, limit_of_pod, Seed(1))
    }

    fn at(seconds: i64) -> Instant {
        Instant::from_secs(seconds)
    }

    const NOBODY: Moved = Moved {
        sent: 0,
        received: 0,
    };
    const ASKED: Moved = Moved {
        sent: 1,
        received: 0,
    };
    const ANSWERED: Moved = Moved {
        sent: 1,
        received: 1,
    };

    fn fill(table: &mut Table<()>, number: u8, direction: Direction, count: usize) -> Vec<FlowId> {
        let ports = 0..count as u16;
        ports
            .map(|port| table.insert(at(0), direction, key(pod(number), port), ()))
            .collect()
    }

    fn victim(table: &mut Table<()>, now: Instant, number: u8) -> Result<Option<FlowId>, Full> {
        table.victim(now, IDLE, pod(number), Direction::Out)
    }

    #[test]
    fn many_flows_through_a_full_share_cost_little_each() {
        const FLOWS: usize = 4096;
        let mut table = table(2 * FLOWS, FLOWS);
        let ids = fill(&mut table, 2, Direction::Out, FLOWS);
        // All have been in use, but none for so long that it makes room.
        for id in &ids {
            table.count(*id, at(15), ANSWERED);
        }
        for _ in 0..1000 {
            assert_eq!(victim(&mut table, at(20), 2), Err(Full::Share));
        }
        assert_eq!(table.relisted, FLOWS, "once each, and not 1000 times");
        for port in 0..FLOWS {
            let least = victim(&mut table, at(25), 2).unwrap().unwrap();
            assert!(table.remove(least).is_some());
            let id = table.insert(at(25), Direction::Out, key(pod(2), port as u16), ());
            table.count(id, at(25), ANSWERED);
        }
        assert_eq!(victim(&mut table, at(25), 2), Err(Full::Share));
    }

    #[test]
    fn whoever_has_most_makes_room_for_others() {
        let mut table = table(10, 8);
        let few = fill(&mut table, 3, Direction::Out, 2);
        let many = fill(&mut table, 2, Direction::Out, 8);
        for id in few.iter().chain(&many) {
            table.count(*id, at(1), ANSWERED);
        }
        table.count(many[0], at(2), ANSWERED);
        // However busy all are.
        assert_eq!(victim(&mut table, at(2), 3), Ok(Some(many[1])));
        assert_eq!(victim(&mut table, at(2), 4), Ok(Some(many[1])));
        assert_eq!(victim(&mut table, at(2), 2), Err(Full::Share));
        table.remove(many[1]);
        assert_eq!(victim(&mut table, at(2), 2), Ok(None), "there is room");
    }

    #[test]
    fn shares_come_to_rest() {
        let mut table = table(20, 20);
        fill(&mut table, 2, Direction::Out, 20);
        for port in 0..100 {
            for number in [3, 4] {
                if let Ok(least) = victim(&mut table, at(1), number) {
                    least.map(|least| table.remove(least));
                    table.insert(at(1), Direction::Out, key(pod(number), 100 + port), ());
                }
            }
        }
        let mut shares = [2, 3, 4].map(|number| table.of_pod(pod(number)).count());
        shares.sort_unstable();
        assert_eq!(shares, [6, 7, 7]);
    }

    #[test]
    fn who_is_not_answered_makes_room_first() {
        let mut table = table(4, 4);
        let ids = fill(&mut table, 2, Direction::Out, 4);
        for (id, seconds) in ids.iter().zip([1, 2, 3, 4]) {
            let moved = if seconds == 3 { ASKED } else { ANSWERED };
            table.count(*id, at(seconds), moved);
        }
        assert_eq!(victim(&mut table, at(9), 3), Ok(Some(ids[2])));
        // Of one's own only what is idle.
        assert_eq!(victim(&mut table, at(10), 2), Err(Full::Share));
        assert_eq!(victim(&mut table, at(11), 2), Ok(Some(ids[0])));
        assert_eq!(victim(&mut table, at(13), 2), Ok(Some(ids[2])));
    }

    #[test]
    fn a_connection_that_carries_anything_is_answered() {
        let mut table = table(2, 2);
        let ids: Vec<_> = (0..2)
            .map(|port| {
                let mut key = key(pod(2), port);
                key.protocol = Protocol::Tcp;
                table.insert(at(0), Direction::Out, key, ())
            })
            .collect();
        table.count(ids[0], at(0), ASKED);
        table.count(ids[1], at(5), NOBODY);
        assert_eq!(victim(&mut table, at(5), 3), Ok(Some(ids[1])));
    }

    #[test]
    fn where_all_have_as_many_an_idle_flow_makes_room() {
        let mut table = table(3, 2);
        let ids: Vec<_> = (2..5)
            .map(|number| {
                let ids = fill(&mut table, number, Direction::Out, 1);
                table.count(ids[0], at(number.into()), ANSWERED);
                ids[0]
            })
            .collect();
        assert_eq!(victim(&mut table, at(11), 9), Err(Full::Table));
        assert_eq!(victim(&mut table, at(12), 9), Ok(Some(ids[0])));
        table.count(ids[0], at(12), ANSWERED);
        assert_eq!(victim(&mut table, at(13), 9), Ok(Some(ids[1])));
    }

    #[test]
    fn strangers_do_not_take_a_pods_way_out() {
        let mut table = table(6, 4);
        let inwards = fill(&mut table, 2, Direction::In, 4);
        assert_eq!(victim(&mut table, at(0), 2), Ok(None));
        let full = table.victim(at(0), IDLE, pod(2), Direction::In);
        assert_eq!(full, Err(Full::Share));
        for port in 10..12 {
            table.insert(at(0), Direction::Out, key(pod(2), port), ());
        }
        assert_eq!(victim(&mut table, at(0), 2), Ok(Some(inwards[0])));
        assert_eq!(table.of_pod(pod(2)).count(), 6);
    }

    /// What a flow of the model is, and when it was last in use.
    type Modelled = (Key, FlowId, Direction, bool, Instant);

    /// The flow that [`Table::victim`] finds, by a search.
    fn search(model: &[Modelled], now: Instant, number: u8, limit: usize) -> Option<FlowId> {
        let its = |pod: IpAddr, direction| {
            let of_it = move |it: &&Modelled| (it.0.pod.ip(), it.2) == (pod, direction);
            model.iter().filter(of_it)
        };
        let least = |pod, direction, idle: Option<Duration>| {
            its(pod, direction)
                .filter(|it| idle.is_none_or(|idle| it.4 + idle <= now))
                .min_by_key(|it| (it.3, it.4, it.1.index))
                .map(|it| it.1)
        };
        let own = its(pod(number), Direction::Out).count();
        if own >= limit {
            return least(pod(number), Direction::Out, Some(IDLE));
        }
        let shares = (0..3).flat_map(|number| {
            [Direction::Out, Direction::In].map(|direction| (pod(number), direction))
        });
        let sizes = shares.clone();
        let largest = sizes.map(|(pod, direction)| (its(pod, direction).count(), pod, direction));
        let (most, largest, direction) = largest.max().unwrap();
        if most > own + 1 {
            return least(largest, direction, None);
        }
        least(pod(number), Direction::Out, Some(IDLE)).or_else(|| {
            let others = shares.filter(|(pod, direction)| its(*pod, *direction).count() >= own);
            let oldest = others.filter_map(|(pod, direction)| {
                let active = its(pod, direction).map(|it| it.4).min()?;
                Some((active, pod, direction))
            });
            let (_, pod, direction) = oldest.min()?;
            least(pod, direction, Some(IDLE))
        })
    }

    proptest! {
        #[test]
        fn the_least_is_the_one_that_a_search_finds(
            steps in proptest::collection::vec(
                (0u8..4, 0u8..3, any::<bool>(), 0u16..6, 0u64..8), 1..120,
            ),
        ) {
            let mut table = table(1, 5);
            let mut model: Vec<Modelled> = Vec::new();
            let mut now = at(0);
            for (step, number, inwards, port, wait) in steps {
                now += Duration::from_secs(wait);
                let direction = if inwards { Direction::In } else { Direction::Out };
                let key = key(pod(number), port + if inwards { 100 } else { 0 });
                let known = model.iter().position(|it| it.0 == key);
                match (step, known) {
                    (0, Some(known)) => {
                        table.remove(model.remove(known).1);
                    }
                    (_, Some(known)) => {
                        let moved = if step == 1 { ANSWERED } else { NOBODY };
                        table.count(model[known].1, now, moved);
                        model[known].3 |= step == 1;
                        model[known].4 = now;
                    }
                    (_, None) => {
                        let id = table.insert(now, direction, key, ());
                        model.push((key, id, direction, false, now));
                    }
                }
                if !model.is_empty() {
                    let expected = search(&model, now, number, 5);
                    let room = table.has_room(now, IDLE, pod(number), Direction::Out);
                    // Some looks may not be enough to put all in their places.
                    let found = (0..8).map(|_| victim(&mut table, now, number)).last().unwrap();
                    prop_assert_eq!(room, found.map(drop));
                    prop_assert_eq!(found.ok().flatten(), expected);
                }
            }
        }
    }
}
