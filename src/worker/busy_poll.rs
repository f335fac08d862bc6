//! Busy polling: how often a worker looks for packets again before it sleeps.
//!
//! Whoever sleeps has to be woken: on a virtual machine that takes 20 µs and more, three times for
//! each direction of a request. Between two looks a worker yields its processor, so that the pod that
//! is to answer gets it, even where there is only one. It looks again only after a round of small packets, as
//! requests and their answers are: with bulk data there is always something to do, or the processor
//! is needed elsewhere.
//!
//! Looking pays if the next packet comes soon. As KVM's halt polling does, sleeps tell: after one that
//! was short a worker looks for its full time, and each long one halves that.

use muslin_stack::Duration;

/// Bytes of the longest packet of a round of small ones.
const SMALL: usize = 1000;
/// How long it looks at most.
const MOST: Duration = Duration::from_micros(100);
/// The longest sleep that looking would have spared, with what it takes to wake up.
const SHORT: Duration = Duration::from_micros(200);
/// The shortest sleep that is too long to look for its end.
const LONG: Duration = Duration::from_millis(1);

/// What the packets of this round and the sleeps before it say.
#[derive(Debug, Default)]
pub(super) struct BusyPoll {
    /// Bytes of the longest packet since the last wait; zero if there was none.
    longest: usize,
    /// How long to look.
    limit: Duration,
}

impl BusyPoll {
    /// Notes a packet of this many bytes, whatever becomes of it.
    pub(super) fn note(&mut self, len: usize) {
        self.longest = self.longest.max(len);
    }

    /// How long to look before this sleep. Begins the next round.
    pub(super) fn time(&mut self) -> Duration {
        match std::mem::take(&mut self.longest) {
            1..=SMALL => self.limit,
            _ => Duration::ZERO,
        }
    }

    /// Learns how long a sleep was that ended with packets.
    pub(super) fn slept(&mut self, time: Duration) {
        if time <= SHORT {
            self.limit = MOST;
        } else if time >= LONG {
            self.limit /= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After a round whose longest packet has this many bytes.
    fn time_after(poll: &mut BusyPoll, lens: &[usize]) -> Duration {
        lens.iter().for_each(|len| poll.note(*len));
        poll.time()
    }

    #[test]
    fn only_after_small_packets_it_looks_again() {
        let mut poll = BusyPoll::default();
        poll.slept(SHORT);
        assert_eq!(time_after(&mut poll, &[60, 1000]), MOST);
        assert_eq!(time_after(&mut poll, &[60, 1001, 60]), Duration::ZERO);
        assert_eq!(
            time_after(&mut poll, &[]),
            Duration::ZERO,
            "it has done nothing"
        );
        assert_eq!(time_after(&mut poll, &[60]), MOST);
    }

    #[test]
    fn who_is_seldom_needed_sleeps_at_once() {
        let mut poll = BusyPoll::default();
        assert_eq!(
            time_after(&mut poll, &[60]),
            Duration::ZERO,
            "nothing says that it pays"
        );
        poll.slept(SHORT);
        let looks: Vec<_> = std::iter::repeat_with(|| {
            poll.slept(LONG);
            time_after(&mut poll, &[60])
        })
        .take(7)
        .collect();
        assert_eq!(looks, [50, 25, 12, 6, 3, 1, 0].map(Duration::from_micros));
        poll.slept(SHORT);
        assert_eq!(time_after(&mut poll, &[60]), MOST);
    }

    #[test]
    fn sleeps_of_middle_length_say_nothing() {
        let mut poll = BusyPoll::default();
        poll.slept(SHORT);
        poll.slept((SHORT + LONG) / 2);
        assert_eq!(time_after(&mut poll, &[60]), MOST);
    }
}
