//! What became of all packets: counted, and told to the observer.

use crate::datapath::observe::{Observed, Observer, Source};
use crate::datapath::trace::TraceStep;
use crate::datapath::verdict::Verdict;
use crate::drops::{Counters, DropReason};

/// The counters, and who is told of each packet that they count.
pub(super) struct Ledger<O> {
    pub(super) counters: Counters,
    pub(super) observer: O,
}

impl<O: Observer> Ledger<O> {
    pub(super) fn new(observer: O) -> Self {
        Self {
            counters: Counters::default(),
            observer,
        }
    }

    /// A packet comes in, or begins.
    #[inline(always)]
    pub(super) fn enters(&mut self, source: Source, packet: &(impl Observed + ?Sized)) {
        match source {
            Source::Port(_) | Source::Underlay(_) | Source::Uplink | Source::Host => {
                self.counters.received += 1;
            }
            Source::Egress | Source::Node => self.counters.originated += 1,
        }
        self.observer.enters(source, packet);
    }

    /// This became of it.
    #[inline(always)]
    pub(super) fn leaves(
        &mut self,
        source: Source,
        verdict: Verdict,
        packet: &(impl Observed + ?Sized),
    ) {
        match verdict {
            Verdict::Port(_) | Verdict::Host => self.counters.delivered += 1,
            Verdict::Flood { .. } => self.counters.flooded += 1,
            Verdict::Peer { .. } | Verdict::Uplink { .. } => self.counters.sent += 1,
            Verdict::Egress | Verdict::Consumed => self.counters.consumed += 1,
            Verdict::Drop(reason) => self.counters.drop(reason),
        }
        self.observer.leaves(source, verdict, packet);
    }

    /// This became of a packet of the node's own, which it does not queue.
    #[inline(always)]
    pub(super) fn own(&mut self, verdict: Verdict, packet: &(impl Observed + ?Sized)) {
        self.enters(Source::Node, packet);
        self.leaves(Source::Node, verdict, packet);
    }

    /// This was decided on the way there.
    #[inline(always)]
    pub(super) fn step(&mut self, step: impl FnOnce() -> TraceStep) {
        if O::STEPS {
            self.observer.step(step());
        }
    }

    /// A packet came that cannot be read.
    #[inline(always)]
    pub(super) fn refuse(&mut self, source: Source, reason: DropReason) {
        self.counters.received += 1;
        self.counters.drop(reason);
        self.observer.refused(source, reason);
    }

    /// Packets were lost after their verdict.
    #[inline(always)]
    pub(super) fn lose(&mut self, reason: DropReason, packets: u64) {
        self.counters.drop_many(reason, packets);
        self.observer.lost(reason, packets);
    }
}
