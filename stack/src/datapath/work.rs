//! What packets cost those who share a thread with their sender, and how much of that a port has
//! before the others have their turn.
//!
//! A frame may stand for 128 datagrams or for a copy to each of 250 pods, so frames say little.
//! Work is counted in bytes: those that are copied, and what a call to the kernel, or a segment that
//! it cuts off a superpacket, takes as long as (measured at 380,000 small frames, 28,000 trains of 64
//! or 30,000 superpackets a second of one core). Turns are those of deficit round robin (Shreedhar and
//! Varghese, SIGCOMM 1995), with the difference that what a frame costs is known when it was read:
//! whoever has had too much waits for as many turns as that was.

use smoltcp::time::Instant;

use crate::bucket::TokenBucket;

/// A call to the kernel, in bytes that could be copied meanwhile.
pub const CALL: u64 = 8192;
/// A segment that the kernel cuts off a superpacket, likewise.
pub const SEGMENT: u64 = 2048;
/// Work of one turn: seven superpackets, or three that are cut apart, or some sixty small frames.
pub const TURN: u64 = 512 << 10;

/// Work of frames that a port may have flooded in a second: some twentieth of a core. With two other
/// ports these are 12,000 small frames, with thirty 800.
pub const STORM_RATE: u32 = 200_000_000;
/// The same at once.
pub const STORM_BURST: u32 = STORM_RATE / 2;

/// Work of so many packets of this length.
#[must_use]
pub const fn of_packets(count: usize, len: usize) -> u64 {
    (CALL + len as u64).saturating_mul(count as u64)
}

/// Work of one that the kernel, or whoever has it next, makes so many of.
#[must_use]
pub const fn of_superpacket(segments: usize, bytes: usize) -> u64 {
    CALL + SEGMENT * segments.saturating_sub(1) as u64 + bytes as u64
}

/// What one sender has left of its turn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Turn {
    left: i64,
}

impl Turn {
    /// Begins another turn. Nothing is left over of one that was not used up, but what was taken
    /// beyond it counts.
    pub fn begin(&mut self) {
        self.left = self.left.min(0) + TURN as i64;
    }

    /// Whether there is something left of it.
    #[must_use]
    pub const fn goes_on(&self) -> bool {
        self.left > 0
    }

    /// Takes this much work.
    pub fn take(&mut self, work: u64) {
        let work = i64::try_from(work).unwrap_or(i64::MAX);
        self.left = self.left.saturating_sub(work);
    }
}

/// A full share of a port in what is flooded.
pub(crate) const fn storm_share() -> TokenBucket {
    TokenBucket::full(STORM_RATE, STORM_BURST, Instant::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_ends_with_its_work() {
        let mut turn = Turn::default();
        assert!(!turn.goes_on());
        turn.begin();
        turn.take(TURN - 1);
        assert!(turn.goes_on());
        turn.take(1);
        assert!(!turn.goes_on());
    }

    #[test]
    fn what_was_too_much_is_waited_for() {
        let mut turn = Turn::default();
        turn.begin();
        turn.take(3 * TURN);
        let waits = std::iter::repeat_with(|| {
            turn.begin();
            turn.goes_on()
        });
        assert_eq!(waits.take_while(|goes_on| !goes_on).count(), 2);
    }

    #[test]
    fn what_was_not_used_is_not_kept() {
        let mut turn = Turn::default();
        (0..10).for_each(|_| turn.begin());
        turn.take(TURN);
        assert!(!turn.goes_on());
    }

    #[test]
    fn no_work_is_too_much_to_count() {
        let mut turn = Turn::default();
        turn.take(u64::MAX);
        turn.take(u64::MAX);
        turn.begin();
        assert!(!turn.goes_on());
    }

    /// A turn is some superpackets, which stay in a core's cache, and as many small frames as one
    /// batch has.
    #[test]
    fn a_turn_is_a_batch() {
        assert_eq!(TURN / of_superpacket(46, 65_000), 3);
        assert_eq!(TURN / of_packets(1, 65_000), 7);
        assert_eq!(TURN / of_packets(1, 60), 63);
    }
}
