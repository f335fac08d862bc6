//! When all leases are read again.
//!
//! A watch tells of every change behind the last list, as long as the store's history goes on. A store
//! that was wiped has another history, of which the watch need not say anything: its revisions go
//! back, or have come so far again already that only our own record, which is not where we wrote it,
//! shows it. What happens while an operation is in flight only a list can put in order, too.

use std::cmp::Ordering;

use smoltcp::time::{Duration, Instant};

use super::own::Own;
use crate::control::kv::Revision;

/// How long a peer that a wiped store has not is waited for: its node asks the store again within
/// seconds, and publishes its record.
pub(super) const REPUBLISHING: Duration = Duration::from_secs(60);

/// How long a watch may take to report what we have written ourselves.
pub(super) const TELLING: Duration = Duration::from_secs(10);

/// How far the store's history is known, and what makes a list of it necessary.
#[derive(Debug, Default)]
pub(super) struct Relist {
    /// The store's revision at the last list.
    listed: Revision,
    /// The first revision not seen yet.
    watch_from: Revision,
    /// Something happened during an operation that only a list can put in order.
    is_required: bool,
    /// When the store is looked at again that was wiped.
    again: Option<Instant>,
}

impl Relist {
    /// The first revision that a watch is to report.
    pub(super) fn watch_from(&self) -> Revision {
        self.watch_from
    }

    /// All leases are to be read once the operation in flight is over.
    pub(super) fn require(&mut self) {
        self.is_required = true;
    }

    /// Whether a list was requested since the last one.
    pub(super) fn is_required(&self) -> bool {
        self.is_required
    }

    /// All leases were read at this revision; whether the store's history went back.
    pub(super) fn listed(&mut self, now: Instant, revision: Revision) -> bool {
        let went_back = revision.saturating_add(1) < self.watch_from;
        self.listed = revision;
        self.watch_from = revision.saturating_add(1);
        self.is_required = false;
        // It may be wiped again before we have written our record, and then have as many revisions.
        let again = went_back.then(|| now + REPUBLISHING);
        self.again = again.or(self.again.filter(|at| now < *at));
        went_back
    }

    /// Whether the last list had a change of this revision already.
    pub(super) fn has_seen(&self, revision: Revision) -> bool {
        revision <= self.listed
    }

    /// The watch has reported a change of this revision.
    pub(super) fn reported(&mut self, revision: Revision) {
        self.watch_from = self.watch_from.max(revision.saturating_add(1));
    }

    /// We have written at this revision. If the last list had as many already, the history began
    /// anew since, and has what that did not say.
    pub(super) fn written(&mut self, revision: Revision) {
        self.is_required |= self.has_seen(revision);
    }

    /// When the watch must have reported what we write now.
    pub(super) fn confirmation_by(now: Instant) -> Instant {
        now + TELLING
    }

    /// When everything is read again, in case the store was wiped without a sign of it.
    pub(super) fn due(&self, own: Option<Own>) -> Option<Instant> {
        let unconfirmed = self.unconfirmed(own).map(|own| own.confirmation_by);
        self.again.into_iter().chain(unconfirmed).min()
    }

    /// Whether the writing of our record is not where it must be among the changes: one of this
    /// revision is another one, or one behind it comes first. The store was wiped after it then, and
    /// has as many revisions again already, so that nothing else tells.
    pub(super) fn is_another_history(
        &self,
        own: Option<Own>,
        is_key_of: impl FnOnce(Own) -> bool,
        revision: Revision,
    ) -> bool {
        self.unconfirmed(own)
            .is_some_and(|own| match revision.cmp(&own.revision) {
                Ordering::Less => false,
                Ordering::Equal => !is_key_of(own),
                Ordering::Greater => true,
            })
    }

    /// Our record, if the watch has not yet reported its writing.
    fn unconfirmed(&self, own: Option<Own>) -> Option<Own> {
        own.filter(|own| own.revision >= self.watch_from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Instant = Instant::from_micros_const(1_000_000_000);

    fn own(revision: Revision) -> Option<Own> {
        Some(Own {
            key: "10.244.1.0-24".parse().unwrap(),
            revision,
            reservation: false,
            renew_at: NOW,
            ends: NOW,
            confirmation_by: Relist::confirmation_by(NOW),
        })
    }

    #[test]
    fn a_list_older_than_what_was_reported_went_back_and_is_looked_at_again() {
        let mut relist = Relist::default();
        assert!(!relist.listed(NOW, 10));
        relist.reported(15);
        assert_eq!(relist.watch_from(), 16);
        assert!(!relist.listed(NOW, 15));
        assert_eq!(relist.due(None), None);
        assert!(relist.listed(NOW, 14));
        assert_eq!(relist.watch_from(), 15);
        assert_eq!(relist.due(None), Some(NOW + REPUBLISHING));
        assert!(!relist.listed(NOW + REPUBLISHING, 14));
        assert_eq!(relist.due(None), None);
    }

    #[test]
    fn what_happens_during_an_operation_asks_for_one_list() {
        let mut relist = Relist::default();
        relist.listed(NOW, 10);
        relist.written(11);
        assert!(!relist.is_required());
        relist.written(10);
        assert!(relist.is_required(), "as many revisions once more");
        relist.listed(NOW, 12);
        assert!(!relist.is_required());
        relist.require();
        assert!(relist.is_required());
    }

    #[test]
    fn our_record_must_be_reported_where_and_while_it_is_new() {
        let mut relist = Relist::default();
        relist.listed(NOW, 10);
        let by = Relist::confirmation_by(NOW);
        assert_eq!(relist.due(own(12)), Some(by));
        assert!(!relist.is_another_history(own(12), |_| false, 11));
        assert!(!relist.is_another_history(own(12), |_| true, 12));
        assert!(relist.is_another_history(own(12), |_| false, 12));
        assert!(relist.is_another_history(own(12), |_| false, 13));
        relist.reported(12);
        assert_eq!(relist.due(own(12)), None);
        assert!(!relist.is_another_history(own(12), |_| false, 13));
        assert!(!relist.is_another_history(None, |_| false, 13));
    }

    #[test]
    fn a_watch_that_repeats_itself_does_not_go_back() {
        let mut relist = Relist::default();
        relist.listed(NOW, 10);
        relist.reported(20);
        relist.reported(15);
        assert_eq!(relist.watch_from(), 21);
        assert!(relist.has_seen(10) && !relist.has_seen(11));
        relist.reported(Revision::MAX);
        assert_eq!(relist.watch_from(), Revision::MAX);
    }
}
