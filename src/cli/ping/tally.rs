//! What became of the pings to one hop, and their times.

use std::time::Duration;

/// What became of one ping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Echo {
    /// It was answered after this time.
    Answered(Duration),
    /// Somebody says why it cannot be.
    Refused(String),
    /// Nothing was heard in time.
    Silence,
}

/// The pings to one hop, in microseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Tally {
    sent: u64,
    answered: u64,
    min: u64,
    max: u64,
    mean: f64,
    /// The sum of squares of differences from the mean (Welford's algorithm).
    squares: f64,
}

impl Tally {
    /// Counts one.
    pub(super) fn add(&mut self, echo: &Echo) {
        self.sent += 1;
        let Echo::Answered(time) = echo else { return };
        let time = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.min = match self.answered {
            0 => time,
            _ => self.min.min(time),
        };
        self.max = self.max.max(time);
        self.answered += 1;
        let difference = time as f64 - self.mean;
        self.mean += difference / self.answered as f64;
        self.squares += difference * (time as f64 - self.mean);
    }

    /// How many were sent.
    pub(super) const fn sent(&self) -> u64 {
        self.sent
    }

    /// How many were answered.
    pub(super) const fn answered(&self) -> u64 {
        self.answered
    }

    /// The part of them that was not, in per cent.
    pub(super) fn lost(&self) -> f64 {
        match self.sent {
            0 => 0.0,
            sent => (sent - self.answered) as f64 * 100.0 / sent as f64,
        }
    }

    /// The round trips, if there were any.
    pub(super) fn times(&self) -> Option<Times> {
        (self.answered > 0).then(|| Times {
            min: self.min,
            mean: self.mean.round() as u64,
            max: self.max,
            deviation: (self.squares / self.answered as f64).sqrt().round() as u64,
        })
    }
}

/// Round trips in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Times {
    pub(super) min: u64,
    pub(super) mean: u64,
    pub(super) max: u64,
    /// The standard deviation.
    pub(super) deviation: u64,
}

/// Microseconds as people read them.
pub(super) fn milliseconds(us: u64) -> String {
    format!("{:.3} ms", us as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_of_what_was_answered() {
        let mut tally = Tally::default();
        assert_eq!((tally.times(), tally.lost()), (None, 0.0));
        tally.add(&Echo::Silence);
        assert_eq!((tally.times(), tally.lost()), (None, 100.0));
        for us in [200, 400, 400, 400, 500, 500, 700, 900] {
            tally.add(&Echo::Answered(Duration::from_micros(us)));
        }
        tally.add(&Echo::Refused("no".to_owned()));
        let times = Times {
            min: 200,
            mean: 500,
            max: 900,
            deviation: 200,
        };
        assert_eq!(tally.times(), Some(times));
        assert_eq!((tally.sent(), tally.answered()), (10, 8));
        assert!((tally.lost() - 20.0).abs() < 1e-9);
        assert_eq!(milliseconds(1234), "1.234 ms");
    }
}
