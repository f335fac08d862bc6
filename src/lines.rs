//! Lines of a log that come by the thousand when somebody else wants them to.

use std::time::{Duration, Instant};

use tracing::info;

/// Lines of a kind that are told in a while.
const AT_ONCE: u32 = 50;
const WHILE: Duration = Duration::from_secs(60);

/// Lines of one kind.
#[derive(Debug)]
pub(crate) struct Lines {
    since: Instant,
    count: u32,
}

/// What becomes of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// It is told.
    Told,
    /// It is told, and before it that so many were not.
    ToldAfter(u32),
    /// It is not told, and neither are the next.
    FirstWithheld,
    /// It is not told.
    Withheld,
}

impl Lines {
    /// None has been told.
    pub(crate) const fn new(now: Instant) -> Self {
        Self {
            since: now,
            count: 0,
        }
    }

    /// Tells a line, or after many how many more there were.
    pub(crate) fn tell(&mut self, what: &str, line: impl FnOnce()) {
        match self.next(Instant::now()) {
            Line::Told => line(),
            Line::ToldAfter(withheld) => {
                info!("{withheld} more {what} were not logged");
                line();
            }
            Line::FirstWithheld => info!("further {what} are not logged for now"),
            Line::Withheld => {}
        }
    }

    /// What becomes of one at `now`.
    fn next(&mut self, now: Instant) -> Line {
        let mut withheld = 0;
        if now.duration_since(self.since) >= WHILE {
            withheld = self.count.saturating_sub(AT_ONCE);
            *self = Self::new(now);
        }
        self.count = self.count.saturating_add(1);
        match self.count {
            _ if withheld > 0 => Line::ToldAfter(withheld),
            count if count <= AT_ONCE => Line::Told,
            count if count == AT_ONCE + 1 => Line::FirstWithheld,
            _ => Line::Withheld,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_lines_are_fifty_and_their_number() {
        let now = Instant::now();
        let mut lines = Lines::new(now);
        let all: Vec<_> = (0..10_000).map(|_| lines.next(now)).collect();
        let told = AT_ONCE as usize;
        assert!(all[..told].iter().all(|line| *line == Line::Told));
        assert_eq!(all[told], Line::FirstWithheld);
        assert!(all[told + 1..].iter().all(|line| *line == Line::Withheld));
        let later = now + WHILE;
        assert_eq!(lines.next(later), Line::ToldAfter(10_000 - AT_ONCE));
        assert_eq!(lines.next(later), Line::Told);
        assert_eq!(lines.next(later + WHILE), Line::Told);
    }
}
