//! The table of flows: by what packets say, by number, and by when something is due.

use std::collections::{BTreeSet, HashMap};

use smoltcp::time::{Duration, Instant};

use super::{FlowId, FlowKey};
use crate::hash::Seed;

/// Flows of type `T`, at most so many.
pub(super) struct Table<T> {
    limit: usize,
    by_key: HashMap<FlowKey, u32, Seed>,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// What each has carried. A column of its own, since the search for the oldest reads all.
    usage: Vec<Usage>,
    due: BTreeSet<(Instant, u32)>,
}

struct Slot<T> {
    generation: u32,
    due: Option<Instant>,
    flow: Option<(FlowKey, T)>,
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
    pub(super) fn new(limit: usize, seed: Seed) -> Self {
        Self {
            limit,
            by_key: HashMap::with_hasher(seed),
            slots: Vec::new(),
            free: Vec::new(),
            usage: Vec::new(),
            due: BTreeSet::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.len() >= self.limit
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
    pub(super) fn insert(&mut self, now: Instant, key: FlowKey, flow: T) -> FlowId {
        let usage = Usage {
            since: now,
            active: now,
            sent: 0,
            received: 0,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                due: None,
                flow: None,
            });
            self.usage.push(usage);
            (self.slots.len() - 1) as u32
        });
        self.slots[index as usize].flow = Some((key, flow));
        self.usage[index as usize] = usage;
        self.by_key.insert(key, index);
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

    /// When a flow was last in use.
    pub(super) fn active(&self, id: FlowId) -> Instant {
        let usage = self.usage.get(id.index as usize);
        usage.map_or(Instant::ZERO, |usage| usage.active)
    }

    /// The flow that has not been in use for the longest time, if that is `idle` at least.
    pub(super) fn oldest(&self, now: Instant, idle: Duration) -> Option<FlowId> {
        let used = self.usage.iter().zip(&self.slots).zip(0..);
        let flows = used.filter(|((_, slot), _)| slot.flow.is_some());
        let ((usage, _), index) = flows.min_by_key(|((usage, _), _)| usage.active)?;
        (usage.active + idle <= now).then(|| self.id(index))
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

    /// The flows and what they have carried, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (FlowId, FlowKey, &T, Usage)> {
        let used = self.slots.iter().zip(&self.usage).zip(0..);
        used.filter_map(|((slot, usage), index)| {
            let (key, flow) = slot.flow.as_ref()?;
            Some((self.id(index), *key, flow, *usage))
        })
    }
}
