//! A node's lease rules, what they wait for, and the ways to the store.

use smoltcp::time::{Duration, Instant};

use super::due::Timer;
use super::outcome::Violation;
use super::random::{Random, Stream};
use crate::control::lease::{Manager, Revision};

/// Requests that are fine at once, and per second later.
const BURST: u64 = 100;
const RATE: u64 = 4;

/// A node's lease rules and what they are doing.
pub(super) struct Agent {
    pub(super) manager: Manager,
    pub(super) doing: Doing,
    /// The watch that is open.
    pub(super) watch: Option<Watch>,
    pub(super) is_leaving: bool,
    pub(super) timer: Timer,
    requests: Requests,
}

/// Requests to the store, of which there may not be too many.
#[derive(Debug)]
pub(super) struct Requests {
    count: u64,
    since: Instant,
}

impl Requests {
    pub(super) const fn since(since: Instant) -> Self {
        Self { count: 0, since }
    }

    /// The number of the next one, if whoever asks has not asked too often.
    pub(super) fn count(&mut self, now: Instant, whoever: &str) -> Result<u64, Violation> {
        self.count += 1;
        let seconds = (now - self.since).secs();
        if self.count > BURST + RATE * seconds {
            return Err(Violation(format!(
                "{whoever} have asked the store {} times in {seconds} s",
                self.count
            )));
        }
        Ok(self.count)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    Idle,
    /// A request with this number is with the store.
    Asking(u64),
    /// So is one for a watch.
    Opening(u64),
}

/// A watch that is open.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) number: u64,
    /// The first revision that was not reported yet.
    pub(super) next: Revision,
    pub(super) is_woken: bool,
}

/// How the store and the ways to it are.
#[derive(Debug)]
pub(super) struct StoreWeather {
    pub(super) is_down: bool,
    /// Machines that do not reach it.
    pub(super) cut: std::collections::BTreeSet<usize>,
    /// How many requests or answers of a thousand are lost.
    pub(super) loss: u16,
    /// The longest that a request takes each way, in microseconds.
    pub(super) latency: u64,
    pub(super) random: Random,
}

impl StoreWeather {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            is_down: false,
            cut: std::collections::BTreeSet::new(),
            loss: 0,
            latency: 2_000,
            random: Random::new(seed, Stream::Store),
        }
    }

    pub(super) fn heal(&mut self) {
        self.is_down = false;
        self.cut.clear();
        self.loss = 0;
        self.latency = 2_000;
    }

    /// Whether requests are sure to be answered soon.
    pub(super) fn is_fair(&self) -> bool {
        !self.is_down && self.loss == 0 && self.latency <= 1_000_000
    }

    pub(super) fn delay(&mut self) -> Duration {
        let latency = self.latency;
        Duration::from_micros(self.random.between(200, latency))
    }
}

impl Agent {
    pub(super) fn new(manager: Manager, since: Instant) -> Self {
        Self {
            manager,
            doing: Doing::Idle,
            watch: None,
            is_leaving: false,
            timer: Timer::default(),
            requests: Requests::since(since),
        }
    }

    /// The number of the next request, if there were not too many.
    pub(super) fn count_request(&mut self, now: Instant) -> Result<u64, Violation> {
        self.requests.count(now, "the lease rules")
    }

    /// Whether it holds a lease and receives all changes.
    pub(super) fn is_settled(&self) -> bool {
        self.doing == Doing::Idle && self.watch.is_some()
    }
}
