//! Limits that a node reaches, as its counters of lost packets tell.

use std::sync::Arc;
use std::time::Duration;

use muslin_stack::api::events::EventKind;
use muslin_stack::drops::{Counters, DropReason};
use tokio::time::sleep;

use super::running::RunningNode;
use crate::terminal::quantity::count;

/// How often the counters are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// Looks without another loss after which a limit that is reached is told again.
const QUIET: u32 = 12;

/// Tells of limits for as long as the node runs.
pub(super) async fn watch(running: Arc<RunningNode>) {
    let mut limits = Limits::default();
    loop {
        sleep(LOOK).await;
        // That a worker hangs others tell.
        let Ok(totals) = running.workers.totals().await else {
            continue;
        };
        for (reason, packets) in limits.reached(&totals.counters) {
            let lost = count(packets, "packet");
            let text = format!("{lost} lost within {LOOK:?}: {}", reason.describe());
            let journal = &running.journal;
            journal.note(EventKind::LimitReached, reason.name(), text);
        }
    }
}

/// What was seen of each limit: the packets lost by it, and how many looks ago there were fewer.
struct Limits(Vec<(DropReason, u64, u32)>);

impl Default for Limits {
    fn default() -> Self {
        let limits = DropReason::ALL.iter().filter(|reason| reason.is_limit());
        Self(limits.map(|reason| (*reason, 0, QUIET)).collect())
    }
}

impl Limits {
    /// The limits that are reached now and were not a while ago, and the packets lost since the last look.
    fn reached(&mut self, counters: &Counters) -> Vec<(DropReason, u64)> {
        let mut reached = Vec::new();
        for (reason, before, quiet) in &mut self.0 {
            let now = counters.dropped_for(*reason);
            let lost = now.saturating_sub(std::mem::replace(before, now));
            if lost == 0 {
                *quiet = quiet.saturating_add(1);
                continue;
            }
            if std::mem::take(quiet) >= QUIET {
                reached.push((*reason, lost));
            }
        }
        reached
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_told_when_it_is_reached_and_again_after_a_while() {
        let mut limits = Limits::default();
        let mut counters = Counters::default();
        counters.drop_many(DropReason::NoRoute, 7);
        assert_eq!(limits.reached(&counters), [], "that is no limit");
        counters.drop_many(DropReason::Storm, 3);
        assert_eq!(limits.reached(&counters), [(DropReason::Storm, 3)]);
        for _ in 0..QUIET {
            counters.drop(DropReason::Storm);
            assert_eq!(limits.reached(&counters), [], "it goes on");
        }
        for _ in 0..QUIET {
            assert_eq!(limits.reached(&counters), []);
        }
        counters.drop(DropReason::Storm);
        assert_eq!(limits.reached(&counters), [(DropReason::Storm, 1)]);
    }
}
