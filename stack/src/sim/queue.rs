//! Virtual time: what is due when. What is due at the same time happens in the order in which it
//! was asked for.

use std::collections::BTreeMap;

use smoltcp::time::Instant;

/// What is to happen.
#[derive(Debug)]
pub(super) struct Queue<T> {
    now: Instant,
    due: BTreeMap<(Instant, u64), T>,
    count: u64,
}

impl<T> Queue<T> {
    pub(super) fn new(now: Instant) -> Self {
        let due = BTreeMap::new();
        let count = 0;
        Self { now, due, count }
    }

    pub(super) fn now(&self) -> Instant {
        self.now
    }

    /// Lets something happen at a time, or now if that has passed.
    pub(super) fn schedule(&mut self, at: Instant, what: T) {
        self.count += 1;
        self.due.insert((at.max(self.now), self.count), what);
    }

    /// What is due next, if it is by `until`; the time is that then.
    pub(super) fn next(&mut self, until: Instant) -> Option<T> {
        let next = self.due.first_entry()?;
        let (at, _) = *next.key();
        if at > until {
            return None;
        }
        self.now = at;
        Some(next.remove())
    }

    /// Lets time pass in which nothing is due.
    pub(super) fn advance(&mut self, to: Instant) {
        self.now = self.now.max(to);
    }
}
