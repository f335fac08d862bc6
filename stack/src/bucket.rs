//! Token buckets: how much of something may be in a time, and how much of it at once.

use smoltcp::time::Instant;

const MICROS: u64 = 1_000_000;

/// A bucket that fills by itself.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Tokens a second.
    rate: u64,
    /// Millionths of tokens that it holds at most, and that it has.
    burst: u64,
    has: u64,
    filled: Instant,
}

impl TokenBucket {
    /// A full bucket of `burst` tokens, which gets `rate` of them a second.
    #[must_use]
    pub const fn full(rate: u32, burst: u32, now: Instant) -> Self {
        let burst = burst as u64 * MICROS;
        Self {
            rate: rate as u64,
            burst,
            has: burst,
            filled: now,
        }
    }

    /// Takes so many tokens, if they are there. What asks for more than it can hold gets it when it
    /// is full.
    pub fn take(&mut self, now: Instant, tokens: u64) -> bool {
        let elapsed = now
            .total_micros()
            .saturating_sub(self.filled.total_micros());
        // A clock may stand still, and never goes back.
        let elapsed = u64::try_from(elapsed).unwrap_or_default();
        self.filled = self.filled.max(now);
        let earned = elapsed.saturating_mul(self.rate);
        self.has = self.has.saturating_add(earned).min(self.burst);
        let wanted = tokens.saturating_mul(MICROS).min(self.burst);
        let is_enough = self.has >= wanted;
        if is_enough {
            self.has -= wanted;
        }
        is_enough
    }
}

#[cfg(test)]
mod tests {
    use smoltcp::time::Duration;

    use super::*;

    fn taken(bucket: &mut TokenBucket, now: Instant) -> usize {
        (0..100).filter(|_| bucket.take(now, 1)).count()
    }

    #[test]
    fn a_burst_is_followed_by_a_rate() {
        let mut now = Instant::ZERO;
        let mut bucket = TokenBucket::full(1000, 50, now);
        assert_eq!(taken(&mut bucket, now), 50);
        now += Duration::from_micros(999);
        assert!(!bucket.take(now, 1));
        now += Duration::from_millis(10);
        assert_eq!(taken(&mut bucket, now), 10);
        let steps = (0..10).filter(|_| {
            now += Duration::from_micros(1900);
            bucket.take(now, 1)
        });
        assert_eq!(steps.count(), 10);
        assert!(bucket.take(now, 1), "parts of a token add up");
        now += Duration::from_secs(3600);
        assert_eq!(taken(&mut bucket, now), 50);
    }

    #[test]
    fn much_at_once_waits_for_a_full_bucket() {
        let mut now = Instant::ZERO;
        let mut bucket = TokenBucket::full(10, 20, now);
        assert!(bucket.take(now, 15));
        assert!(!bucket.take(now, 6));
        assert!(bucket.take(now, 5));
        now += Duration::from_millis(1999);
        assert!(!bucket.take(now, 1_000));
        now += Duration::from_millis(1);
        assert!(bucket.take(now, u64::MAX));
        assert!(!bucket.take(now, 1));
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing() {
        let late = Instant::from_secs(100);
        let mut bucket = TokenBucket::full(1, 1, late);
        assert!(bucket.take(late, 1));
        assert!(!bucket.take(Instant::ZERO, 1));
        assert!(!bucket.take(late, 1));
        assert!(bucket.take(late + Duration::from_secs(1), 1));
    }
}
