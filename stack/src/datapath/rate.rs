//! How fast a pod may send and receive: a limit that all workers of a node share.
//!
//! It is the virtual scheduling of the generic cell rate algorithm (ITU-T I.371 annex A), a token
//! bucket in one number: the time by which all that has passed would have passed at the rate. A packet
//! passes while that is no further ahead than the burst, whatever its own length, since a superpacket
//! may be longer than a small burst.

use std::sync::atomic::{AtomicU64, Ordering};

use smoltcp::time::{Duration, Instant};

const NANOS: u128 = 1_000_000_000;
const NANOS_PER_MICRO: u64 = 1_000;

/// A rate, and how much may pass at once after a pause.
#[derive(Debug)]
pub struct RateLimit {
    bits_per_second: u64,
    /// The burst, as the nanoseconds that it takes at the rate.
    burst: u64,
    /// When all that has passed would have, in nanoseconds.
    passed: AtomicU64,
}

impl PartialEq for RateLimit {
    /// Whether the rates and bursts are the same, not what has passed.
    fn eq(&self, other: &Self) -> bool {
        (self.bits_per_second, self.burst) == (other.bits_per_second, other.burst)
    }
}

impl Eq for RateLimit {}

impl RateLimit {
    /// A limit that nothing has passed yet; a rate of 0 is none.
    #[must_use]
    pub fn new(bits_per_second: u64, burst_bits: u64) -> Option<Self> {
        let limit = Self {
            bits_per_second,
            burst: nanos(burst_bits, bits_per_second)?,
            passed: AtomicU64::new(0),
        };
        Some(limit)
    }

    /// The same limit as far as it is used now.
    pub(crate) fn fork(&self) -> Self {
        Self {
            passed: AtomicU64::new(self.passed.load(Ordering::Relaxed)),
            ..*self
        }
    }

    /// Lets so many bytes pass, if the limit is not reached.
    pub fn take(&self, now: Instant, bytes: usize) -> bool {
        self.pass(now, bytes, self.burst)
    }

    /// Counts bytes that have come already.
    pub fn charge(&self, now: Instant, bytes: usize) {
        self.pass(now, bytes, u64::MAX);
    }

    /// Counts bytes, unless what has passed is further ahead than this.
    fn pass(&self, now: Instant, bytes: usize, most: u64) -> bool {
        let now = nanos_of(now);
        let cost = nanos(bytes as u64 * 8, self.bits_per_second).unwrap_or(u64::MAX);
        let passed = self
            .passed
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |passed| {
                let begin = passed.max(now);
                (begin - now <= most).then(|| begin.saturating_add(cost))
            });
        passed.is_ok()
    }

    /// How long nothing may pass.
    pub fn pause(&self, now: Instant) -> Option<Duration> {
        let ahead = self
            .passed
            .load(Ordering::Relaxed)
            .saturating_sub(nanos_of(now));
        let pause = ahead.checked_sub(self.burst).filter(|pause| *pause > 0)?;
        Some(Duration::from_micros(pause.div_ceil(NANOS_PER_MICRO)))
    }
}

/// What bits take at a rate.
fn nanos(bits: u64, bits_per_second: u64) -> Option<u64> {
    let nanos = (u128::from(bits) * NANOS).checked_div(bits_per_second.into())?;
    Some(u64::try_from(nanos).unwrap_or(u64::MAX))
}

fn nanos_of(now: Instant) -> u64 {
    let micros = u64::try_from(now.total_micros()).unwrap_or_default();
    micros.saturating_mul(NANOS_PER_MICRO)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that pass in packets of `len` bytes from one time to another.
    fn passes(limit: &RateLimit, len: usize, micros: std::ops::Range<i64>) -> usize {
        let times = micros.map(Instant::from_micros);
        let packets = times.filter(|now| limit.take(*now, len)).count();
        packets * len
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        for len in [100, 1500, 65_000] {
            let limit = RateLimit::new(80_000_000, 8_000_000).unwrap();
            let all = passes(&limit, len, 0..1_000_000);
            let expected = 1_000_000 + 10_000_000;
            assert!(all.abs_diff(expected) <= 2 * len + 1000, "{len}: {all}");
        }
    }

    #[test]
    fn a_packet_longer_than_the_burst_passes_and_is_paid_for() {
        let limit = RateLimit::new(8_000, 8).unwrap();
        assert!(limit.take(Instant::ZERO, 1_000));
        assert!(!limit.take(Instant::ZERO, 1));
        let pause = limit.pause(Instant::ZERO).unwrap();
        assert_eq!(pause, Duration::from_millis(999));
        assert!(!limit.take(Instant::ZERO + pause - Duration::from_micros(1), 1));
        assert_eq!(limit.pause(Instant::ZERO + pause), None);
        assert!(limit.take(Instant::ZERO + pause, 1));
    }

    #[test]
    fn what_has_come_is_waited_for() {
        let limit = RateLimit::new(8_000_000, 0).unwrap();
        limit.charge(Instant::from_secs(5), 1_000_000);
        limit.charge(Instant::from_secs(5), 1_000_000);
        assert_eq!(
            limit.pause(Instant::from_secs(5)),
            Some(Duration::from_secs(2))
        );
        assert_eq!(limit.pause(Instant::from_secs(7)), None);
    }

    #[test]
    fn the_bursts_that_runtimes_send_fit() {
        assert!(RateLimit::new(0, 8).is_none());
        for (rate, burst) in [
            (1, u64::MAX),
            (u64::MAX, 1),
            (1_000_000, u64::from(u32::MAX)),
            (1_000_000, 8 * u64::from(u32::MAX) - 1),
        ] {
            let limit = RateLimit::new(rate, burst).unwrap();
            assert!(limit.take(Instant::from_secs(1), usize::MAX >> 4));
        }
    }
}
