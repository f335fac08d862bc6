//! When a record is written again although it is what it was, for watchers that lose changes.
//!
//! flannel 0.20 reads one answer of a watch, takes the first change in it, drops the others, closes
//! the watch, and opens the next one from "now" (`watchSubnets` in its `subnet/etcd/registry.go`:
//! the next start is the compaction revision, which is 0 otherwise). A record that is written while
//! it is between two watches stays unknown to it until somebody writes that record again, which its
//! owner does at the renewal, hours later.
//!
//! So a node writes a record that is new or has changed three times more. The intervals grow, so
//! that a watcher that is busy with one burst of changes is through with it at the next time, and
//! are drawn at random, so that nodes that began together do not collide again. In a large cluster
//! they are longer, so that repetitions are few at a time however many nodes join at once.
//!
//! Nobody needs it where no other node has a lease: a node that comes later lists all records first.

use smoltcp::time::{Duration, Instant};

/// When a record is written again, in milliseconds after it was first written, less or more a
/// quarter.
const AFTER: [u64; 3] = [2_000, 15_000, 60_000];
/// What is added for each other lease, in milliseconds at most: where a thousand nodes join at once,
/// so many seconds are shared by all their repetitions. The last ones are so far apart that hardly
/// two meet in the milliseconds that a watcher needs for one.
const SPREAD: [u64; 3] = [10, 20, 100];
/// How long after a write of ours the start of another node is a reason to write again, because that
/// node's first watch may have lost it.
const NEWCOMER: Duration = Duration::from_secs(5);

/// The times at which a node writes its record again.
#[derive(Debug, Default)]
pub(super) struct Repetition {
    /// Whether what is written next is new to others.
    is_news: bool,
    /// When the record that others may not know was last written.
    written: Option<Instant>,
    /// When it is written again, the next time first.
    due: [Option<Instant>; AFTER.len()],
    /// The same because of another node's start, once.
    newcomer: Option<Instant>,
    has_met_newcomer: bool,
}

impl Repetition {
    /// What is written next, others do not know yet.
    pub(super) fn expect_news(&mut self) {
        self.is_news = true;
    }

    /// The store has our record as it is now; `others` have leases, too.
    pub(super) fn written(
        &mut self,
        now: Instant,
        others: usize,
        mut random_below: impl FnMut(u64) -> u64,
    ) {
        if std::mem::take(&mut self.is_news) {
            *self = Self::default();
            for (index, due) in self.due.iter_mut().enumerate() {
                let (base, spread) = (AFTER[index], SPREAD[index] * others as u64);
                let jitter = random_below(base / 2 + 1) + random_below(spread + 1);
                *due = Some(now + Duration::from_millis(base * 3 / 4 + jitter));
            }
        }
        self.written = Some(now);
        self.pass(now);
    }

    /// Another node has a lease that it had not before.
    pub(super) fn meet(&mut self, now: Instant, mut random_below: impl FnMut(u64) -> u64) {
        let is_recent = self.written.is_some_and(|written| now < written + NEWCOMER);
        let [base, ..] = AFTER;
        let at = now + Duration::from_millis(base * 3 / 4 + random_below(base / 2 + 1));
        if is_recent && !self.has_met_newcomer && self.next().is_none_or(|due| due > at) {
            (self.newcomer, self.has_met_newcomer) = (Some(at), true);
        }
    }

    /// When the record is to be written again; `None` if it need not be.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due
            .iter()
            .chain([&self.newcomer])
            .flatten()
            .min()
            .copied()
    }

    /// Whether the record is to be written again now. What is due is over where no other has a
    /// lease.
    pub(super) fn is_due(&mut self, now: Instant, others: usize) -> bool {
        if others == 0 {
            self.pass(now);
        }
        self.next().is_some_and(|due| due <= now)
    }

    /// What was due is over.
    fn pass(&mut self, now: Instant) {
        for due in self.due.iter_mut().chain([&mut self.newcomer]) {
            *due = due.filter(|due| *due > now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Instant = Instant::from_micros_const(100_000_000);

    fn after(millis: u64) -> Instant {
        START + Duration::from_millis(millis)
    }

    fn least(_: u64) -> u64 {
        0
    }

    fn most(bound: u64) -> u64 {
        bound - 1
    }

    /// Milliseconds after the start at which a record is written again, until nothing is due.
    fn times(repetition: &mut Repetition, others: usize) -> Vec<u64> {
        let mut times = Vec::new();
        while let Some(at) = repetition.next() {
            assert!(!repetition.is_due(at - Duration::from_millis(1), others));
            if repetition.is_due(at, others) {
                repetition.written(at, others, least);
                times.push((at - START).total_millis());
            }
        }
        times
    }

    #[test]
    fn a_new_record_is_written_three_times_more() {
        for (others, random, expected) in [
            (1, least as fn(u64) -> u64, [1_500, 11_250, 45_000]),
            (1, most, [2_510, 18_770, 75_100]),
            (1_000, least, [1_500, 11_250, 45_000]),
            (1_000, most, [12_500, 38_750, 175_000]),
        ] {
            let mut repetition = Repetition::default();
            repetition.expect_news();
            repetition.written(START, others, random);
            assert_eq!(times(&mut repetition, others), expected);
        }
    }

    #[test]
    fn a_record_that_others_know_is_not_written_again() {
        let mut repetition = Repetition::default();
        repetition.written(START, 3, least);
        assert_eq!(repetition.next(), None);
        repetition.expect_news();
        repetition.written(START, 3, least);
        assert_eq!(times(&mut repetition, 3).len(), 3);
        // A renewal.
        repetition.written(after(90_000_000), 3, least);
        assert_eq!(repetition.next(), None);
    }

    #[test]
    fn a_change_begins_anew() {
        let mut repetition = Repetition::default();
        repetition.expect_news();
        repetition.written(START, 3, least);
        repetition.expect_news();
        repetition.written(after(1_000), 3, least);
        assert_eq!(times(&mut repetition, 3), [2_500, 12_250, 46_000]);
    }

    #[test]
    fn nothing_is_repeated_for_nobody() {
        let mut repetition = Repetition::default();
        repetition.expect_news();
        repetition.written(START, 0, least);
        assert!(times(&mut repetition, 0).is_empty());
        repetition.expect_news();
        repetition.written(START, 0, least);
        assert!(!repetition.is_due(after(2_000), 0));
        assert_eq!(times(&mut repetition, 1), [11_250, 45_000]);
    }

    #[test]
    fn the_start_of_another_node_is_a_reason_once() {
        let mut repetition = Repetition::default();
        repetition.meet(START, least);
        assert_eq!(repetition.next(), None, "nothing was written");
        repetition.expect_news();
        repetition.written(START, 1, least);
        repetition.meet(after(500), least);
        assert_eq!(repetition.next(), Some(after(1_500)), "soon enough anyway");
        repetition.written(after(1_500), 1, least);
        repetition.meet(after(2_000), least);
        repetition.meet(after(2_500), least);
        assert_eq!(times(&mut repetition, 2), [3_500, 11_250, 45_000]);
        repetition.meet(after(45_100), least);
        assert_eq!(repetition.next(), None, "once");
        repetition.expect_news();
        repetition.written(after(50_000), 1, least);
        repetition.written(after(52_000), 1, least);
        repetition.meet(after(57_000), least);
        assert_eq!(repetition.next(), Some(after(61_250)), "too late");
    }
}
