//! How long the store is left alone after what was in vain.
//!
//! Each kind of failure is counted by itself, and makes its own next attempt wait twice as long as
//! the one before: a store that does not answer, subnets that others take first, watches that end at
//! once, and lists that are older than what was known.

use smoltcp::time::{Duration, Instant};

use super::random::Random;

/// Races are lost for so long at most: where many nodes of two IP versions begin together, each record
/// that one writes is a lost race for all others.
pub(super) const RACING: Duration = Duration::from_secs(600);
/// So many conflicts in a row are worth a word.
const MANY_CONFLICTS: u32 = 10;
/// Conflicts that are looked into at once; the later ones wait.
const QUICK_CONFLICTS: u32 = 3;
/// A watch that lived shorter than this is not opened again at once.
pub(super) const SHORT_WATCH: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);

/// When the next operation may be requested, and how often each kind has failed in a row.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    until: Option<Instant>,
    /// Operations that the store did not answer, or refused.
    failures: u32,
    /// The same of those that were to create our record, whatever was answered in between.
    uncreated: u32,
    /// Answers that the store is not as we believed.
    conflicts: u32,
    /// When the first of them came.
    contended: Option<Instant>,
    short_watches: u32,
    watch_ended: Option<Instant>,
    /// Lists that were older than what the watch had reported.
    old_lists: u32,
}

impl Backoff {
    /// Until when nothing may be requested; `None` if an operation may be at `now`.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Instant> {
        self.until = self.until.filter(|until| *until > now);
        self.until
    }

    /// An operation may be requested at once.
    pub(super) fn reset(&mut self) {
        self.until = None;
    }

    /// Nothing may be requested until this time.
    pub(super) fn wait_until(&mut self, until: Instant) {
        self.until = Some(until);
    }

    /// Lets the next operation wait: twice as long at each attempt, up to a limit.
    pub(super) fn delay(&mut self, now: Instant, attempt: u32, random: &mut Random) {
        let factor = 1u64 << attempt.saturating_sub(1).min(6);
        let delay = FIRST_RETRY.total_millis().saturating_mul(factor);
        let delay = delay.min(LAST_RETRY.total_millis());
        // Between half and all of it, so that many nodes do not come back together.
        let jitter = random.below(delay / 2 + 1);
        self.until = Some(now + Duration::from_millis(delay / 2 + jitter));
    }

    /// The store has answered.
    pub(super) fn answered(&mut self) {
        self.failures = 0;
    }

    /// The store has not answered, or has refused; `creates` if it was to create our record.
    pub(super) fn failed(&mut self, now: Instant, creates: bool, random: &mut Random) {
        self.failures = self.failures.saturating_add(1);
        let mut attempt = self.failures;
        if creates {
            self.uncreated = self.uncreated.saturating_add(1);
            attempt = attempt.max(self.uncreated);
        }
        self.delay(now, attempt, random);
    }

    /// The store is not as we believed.
    pub(super) fn conflict(&mut self, now: Instant, random: &mut Random) {
        self.conflicts = self.conflicts.saturating_add(1);
        self.contended.get_or_insert(now);
        if self.conflicts > QUICK_CONFLICTS {
            self.delay(now, self.conflicts - QUICK_CONFLICTS, random);
        }
    }

    /// Whether others were faster for so long that they always will be.
    pub(super) fn is_hopeless(&self, now: Instant) -> bool {
        self.contended.is_some_and(|since| since + RACING <= now)
    }

    /// The conflicts in a row, when they have just become many.
    pub(super) fn has_many_conflicts(&self) -> Option<u32> {
        (self.conflicts == MANY_CONFLICTS).then_some(self.conflicts)
    }

    /// The store has our record.
    pub(super) fn held(&mut self) {
        self.conflicts = 0;
        self.contended = None;
        self.uncreated = 0;
    }

    /// The watch has ended.
    pub(super) fn watch_ended(&mut self, now: Instant, random: &mut Random) {
        let is_short = |ended: Instant| now < ended + SHORT_WATCH;
        if self.watch_ended.replace(now).is_some_and(is_short) {
            self.short_watches = self.short_watches.saturating_add(1);
            self.delay(now, self.short_watches, random);
        } else {
            self.short_watches = 0;
        }
    }

    /// All leases were listed. A store that was wiped goes back once. One whose members lag behind each
    /// other, or that a proxy answers for, can do so at each list, and what its watch reports asks for
    /// the next.
    pub(super) fn listed(&mut self, now: Instant, went_back: bool, random: &mut Random) {
        if !went_back {
            self.old_lists = 0;
            return;
        }
        self.old_lists = self.old_lists.saturating_add(1);
        if self.old_lists > 1 {
            self.delay(now, self.old_lists, random);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Instant = Instant::from_micros_const(1_000_000_000);

    /// A machine, and how long it makes the next operation wait, in milliseconds.
    struct Bed(Backoff, Random);

    impl Bed {
        fn new() -> Self {
            Self(Backoff::default(), Random::new(1))
        }

        fn after(&mut self, happens: impl FnOnce(&mut Backoff, &mut Random)) -> u64 {
            self.0.reset();
            happens(&mut self.0, &mut self.1);
            let until = self.0.poll(NOW);
            until.map_or(0, |until| (until - NOW).total_millis())
        }
    }

    #[test]
    fn each_failure_waits_longer_up_to_a_limit() {
        let mut bed = Bed::new();
        let mut longest = 100;
        for _ in 0..10 {
            let delay = bed.after(|backoff, random| backoff.failed(NOW, false, random));
            assert!((longest / 2..=longest).contains(&delay), "{delay}");
            longest = (longest * 2).min(5_000);
        }
        bed.0.answered();
        let delay = bed.after(|backoff, random| backoff.failed(NOW, false, random));
        assert!(delay <= 100, "{delay}");
    }

    #[test]
    fn answers_in_between_do_not_make_a_record_that_cannot_be_created_hurry() {
        let mut bed = Bed::new();
        for _ in 0..6 {
            bed.after(|backoff, random| backoff.failed(NOW, true, random));
            bed.0.answered();
        }
        let delay = bed.after(|backoff, random| backoff.failed(NOW, true, random));
        assert!(delay >= 2_500, "{delay}");
        bed.0.answered();
        bed.0.held();
        let delay = bed.after(|backoff, random| backoff.failed(NOW, true, random));
        assert!(delay <= 100, "{delay}");
    }

    #[test]
    fn the_first_conflicts_are_looked_into_at_once_and_ten_minutes_are_too_long() {
        let mut bed = Bed::new();
        let delays: Vec<_> = (0..49)
            .map(|_| bed.after(|backoff, random| backoff.conflict(NOW, random)))
            .collect();
        assert_eq!(delays[..3], [0, 0, 0]);
        assert!(delays[3..].iter().all(|delay| *delay > 0), "{delays:?}");
        let late = NOW + RACING;
        assert!(!bed.0.is_hopeless(late - Duration::from_micros(1)));
        assert!(bed.0.is_hopeless(late));
        bed.0.held();
        assert!(!bed.0.is_hopeless(late));
    }

    #[test]
    fn watches_that_end_at_once_are_opened_later_and_later() {
        let mut bed = Bed::new();
        let end = |bed: &mut Bed| bed.after(|backoff, random| backoff.watch_ended(NOW, random));
        assert_eq!(end(&mut bed), 0);
        assert!((50..=100).contains(&end(&mut bed)));
        assert!((100..=200).contains(&end(&mut bed)));
        let later = NOW + SHORT_WATCH;
        bed.0.reset();
        bed.0.watch_ended(later, &mut bed.1);
        assert_eq!(bed.0.poll(later), None);
    }

    #[test]
    fn the_first_list_that_goes_back_is_believed_at_once() {
        let mut bed = Bed::new();
        let list = |bed: &mut Bed, went_back| {
            bed.after(|backoff, random| backoff.listed(NOW, went_back, random))
        };
        assert_eq!(list(&mut bed, true), 0);
        assert!(list(&mut bed, true) >= 100);
        assert_eq!(list(&mut bed, false), 0);
        assert_eq!(list(&mut bed, true), 0);
    }

    #[test]
    fn waiting_ends_with_its_time() {
        let mut backoff = Backoff::default();
        let until = NOW + Duration::from_secs(1);
        backoff.wait_until(until);
        assert_eq!(backoff.poll(NOW), Some(until));
        assert_eq!(backoff.poll(until), None);
        assert_eq!(backoff.poll(NOW), None);
    }
}
