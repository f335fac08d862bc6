//! Whether the threads that pass packets still take turns: health and the service manager's watchdog
//! follow them, not the thread that answers questions.

use std::sync::Arc;
use std::time::Duration;

use muslin_stack::api::events::EventKind;
use tokio::time::sleep;

use super::running::RunningNode;
use crate::condition::{Condition, Need};
use crate::notify;

/// How often they are looked at.
const BEAT: Duration = Duration::from_millis(2500);
/// How often in a row a thread must not have taken a turn to hang: a process that stood still may be
/// woken at the wrong moment.
const MISSED: u32 = 2;

/// Looks after them for as long as the node runs.
pub(super) async fn watch(running: Arc<RunningNode>, condition: Condition) {
    // Twice in the time that the service manager gives, as sd_watchdog_enabled(3) recommends.
    let beat = notify::watchdog().map_or(BEAT, |every| BEAT.min(every / 2));
    let mut pulse = Pulse::new(running.workers.turns());
    loop {
        sleep(beat).await;
        let hanging = pulse.hanging(&running.workers.turns());
        if hanging.is_empty() {
            if !condition.subscribe().borrow().is_alive() {
                let text = "all threads of the data path pass packets again";
                running
                    .journal
                    .note(EventKind::HealthBack, "data path", text);
                condition.have(Need::DataPath);
            }
            notify::alive();
        } else {
            let names: Vec<_> = hanging.iter().map(|it| format!("worker-{it}")).collect();
            let reason = format!("the data path hangs in {}", names.join(", "));
            if condition.lack(Need::DataPath, &reason) {
                let text = format!("{reason}: the packets of its pods are delayed");
                running
                    .journal
                    .note(EventKind::HealthLost, "data path", text);
            }
        }
    }
}

/// What was seen of each thread.
struct Pulse {
    turns: Vec<u64>,
    missed: Vec<u32>,
}

impl Pulse {
    fn new(turns: Vec<u64>) -> Self {
        let missed = vec![0; turns.len()];
        Self { turns, missed }
    }

    /// The threads that hang, by the turns that all have taken now.
    fn hanging(&mut self, turns: &[u64]) -> Vec<usize> {
        let pairs = self.turns.iter_mut().zip(turns);
        for ((before, now), missed) in pairs.zip(&mut self.missed) {
            *missed = if before == now { *missed + 1 } else { 0 };
            *before = *now;
        }
        let missed = self.missed.iter().enumerate();
        let hanging = missed.filter(|(_, missed)| **missed >= MISSED);
        hanging.map(|(index, _)| index).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_hangs_that_takes_no_turn_for_long() {
        let mut pulse = Pulse::new(vec![7, 7]);
        assert!(pulse.hanging(&[8, 7]).is_empty());
        assert_eq!(pulse.hanging(&[9, 7]), [1]);
        assert_eq!(pulse.hanging(&[9, 7]), [1]);
        assert_eq!(pulse.hanging(&[9, 8]), [0]);
        assert!(pulse.hanging(&[10, 8]).is_empty());
    }
}
