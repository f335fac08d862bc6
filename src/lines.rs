//! Rate limit for log lines that others can cause by the thousand.

use std::time::{Duration, Instant};

use tracing::info;

/// Lines of a kind that are logged per `WHILE`.
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
    /// It is logged.
    Logged,
    /// It is logged, after the number of those withheld.
    LoggedAfter(u32),
    /// It is not logged, and neither are the next.
    FirstWithheld,
    /// It is not logged.
    Withheld,
}

impl Lines {
    /// No line has been logged.
    pub(crate) const fn new(now: Instant) -> Self {
        Self {
            since: now,
            count: 0,
        }
    }

    /// Logs a line, or after many the number of those withheld.
    pub(crate) fn log(&mut self, what: &str, line: impl FnOnce()) {
        match self.next(Instant::now()) {
            Line::Logged => line(),
            Line::LoggedAfter(withheld) => {
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
            _ if withheld > 0 => Line::LoggedAfter(withheld),
            count if count <= AT_ONCE => Line::Logged,
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
        let logged = AT_ONCE as usize;
        assert!(all[..logged].iter().all(|line| *line == Line::Logged));
        assert_eq!(all[logged], Line::FirstWithheld);
        assert!(all[logged + 1..].iter().all(|line| *line == Line::Withheld));
        let later = now + WHILE;
        assert_eq!(lines.next(later), Line::LoggedAfter(10_000 - AT_ONCE));
        assert_eq!(lines.next(later), Line::Logged);
        assert_eq!(lines.next(later + WHILE), Line::Logged);
    }
}
