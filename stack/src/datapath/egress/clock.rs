//! Time as flows live it: it stands still while the process does.
//!
//! A process that is stopped, or whose group is frozen, hears nothing of its pods, and what it has
//! not heard is no silence of theirs. Nobody tells it afterwards but the clock: something was due
//! long ago, and nobody has asked for it.

use smoltcp::time::{Duration, Instant};

/// By how much what is due may be late on a machine that is only busy.
const LATE: Duration = Duration::from_secs(5);

/// The difference between the time outside and that of flows.
#[derive(Debug, Clone)]
pub(super) struct Clock {
    /// When it was last looked at, in time of flows.
    last: Instant,
    /// How long the process stood still.
    asleep: Duration,
}

impl Clock {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            last: now,
            asleep: Duration::ZERO,
        }
    }

    /// The time of flows at `now`, if something was due at `due` in that time. When the process
    /// stopped nobody knows; that it was at once after the clock was last looked at harms nobody.
    pub(super) fn look(&mut self, now: Instant, due: Option<Instant>) -> Instant {
        let lived = now - self.asleep;
        if due.is_some_and(|due| lived > due + LATE) {
            self.asleep += lived - self.last;
        }
        self.last = self.last.max(now - self.asleep);
        self.last
    }

    /// The time outside when it is `lived` for flows.
    pub(super) fn outside(&self, lived: Instant) -> Instant {
        lived + self.asleep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Instant {
        Instant::from_secs(seconds)
    }

    #[test]
    fn time_passes_as_long_as_what_is_due_is_done() {
        let mut clock = Clock::new(at(100));
        assert_eq!(clock.look(at(110), None), at(110));
        assert_eq!(clock.look(at(1000), None), at(1000), "nothing was due");
        assert_eq!(clock.look(at(1010), Some(at(1020))), at(1010));
        assert_eq!(clock.look(at(1025), Some(at(1020))), at(1025), "busy");
        assert_eq!(clock.outside(at(1025)), at(1025));
    }

    #[test]
    fn it_stands_still_while_the_process_does() {
        let mut clock = Clock::new(at(100));
        assert_eq!(clock.look(at(110), Some(at(220))), at(110));
        assert_eq!(clock.look(at(750), Some(at(220))), at(110));
        assert_eq!(clock.outside(at(110)), at(750));
        assert_eq!(clock.look(at(760), Some(at(220))), at(120));
        assert_eq!(clock.look(at(860), Some(at(220))), at(220));
        assert_eq!(clock.look(at(9_000), Some(at(230))), at(220), "again");
        assert_eq!(clock.outside(at(230)), at(9_010));
    }
}
