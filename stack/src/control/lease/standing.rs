//! How a node that has a lease is doing, as far as another node can know.

use std::fmt;
use std::time::Duration;

/// From a node that was heard so long ago at most nothing more is needed.
const RECENT: Duration = Duration::from_secs(5);
/// Nodes renew their leases long before: muslin after half of a day, flannel an hour before the end.
const OVERDUE: Duration = Duration::from_secs(50 * 60);

/// What is known of a node that has a lease.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signs {
    /// How long ago something came from it; `None` if nothing has.
    pub heard: Option<Duration>,
    /// Whether something came from it after it was probed.
    pub answers: bool,
    /// Whether it has said that it stops, and keeps its lease for its return.
    pub has_stopped: bool,
    /// How long its lease lasts still; `None` if that is not known, or for ever.
    pub time_left: Option<Duration>,
}

/// How a node that has a lease is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Something was received from it a moment ago.
    Alive,
    /// It has stopped in order, and its lease waits for its return.
    Stopped,
    /// Nothing comes from it, and its lease will end soon: it should have been renewed.
    Expiring,
    /// Its lease has ended, and the store is about to notice.
    Expired,
    /// Nothing comes from it.
    Silent,
}

impl Standing {
    /// What the signs stand for.
    #[must_use]
    pub fn of(signs: Signs) -> Self {
        let is_recent = signs.heard.is_some_and(|age| age <= RECENT);
        if signs.answers || (is_recent && !signs.has_stopped) {
            Self::Alive
        } else if signs.time_left.is_some_and(|left| left.is_zero()) {
            Self::Expired
        } else if signs.has_stopped {
            Self::Stopped
        } else if signs.time_left.is_some_and(|left| left < OVERDUE) {
            Self::Expiring
        } else {
            Self::Silent
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Alive => "alive",
            Self::Stopped => "stopped",
            Self::Expiring => "expiring",
            Self::Expired => "expired",
            Self::Silent => "silent",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(count: u64) -> Option<Duration> {
        Some(Duration::from_secs(count))
    }

    #[test]
    fn a_node_is_what_its_signs_say() {
        let signs = |heard, answers, has_stopped, time_left| Signs {
            heard,
            answers,
            has_stopped,
            time_left,
        };
        let day = seconds(86_400);
        for (signs, expected) in [
            (signs(seconds(3), false, false, day), Standing::Alive),
            (signs(None, true, false, day), Standing::Alive),
            (signs(seconds(6), false, false, day), Standing::Silent),
            (signs(None, false, false, None), Standing::Silent),
            (signs(None, false, false, seconds(60)), Standing::Expiring),
            (signs(None, false, false, seconds(0)), Standing::Expired),
            // What came before it stopped does not count, and what comes afterwards does: flannel
            // says nothing when it takes over.
            (signs(seconds(3), false, true, day), Standing::Stopped),
            (signs(seconds(3), true, true, day), Standing::Alive),
            (signs(None, false, true, seconds(60)), Standing::Stopped),
            (signs(None, true, false, seconds(60)), Standing::Alive),
        ] {
            assert_eq!(Standing::of(signs), expected, "{signs:?}");
        }
    }
}
