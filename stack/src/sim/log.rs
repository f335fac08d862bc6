//! The log of a run: a hash of everything, and the words where somebody reads them.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hasher};

use smoltcp::time::Instant;

/// Lines that are kept for those who look for a cause.
const KEPT: usize = 400;

/// The log.
pub(super) struct Log {
    hasher: DefaultHasher,
    lines: Option<VecDeque<String>>,
}

impl Log {
    /// A log that keeps its last lines if that is asked for.
    pub(super) fn new(keeps_lines: bool) -> Self {
        Self {
            hasher: DefaultHasher::new(),
            lines: keeps_lines.then(VecDeque::new),
        }
    }

    /// Notes what happens at a time. The words cost nothing where nobody keeps them.
    pub(super) fn note(&mut self, now: Instant, text: impl FnOnce() -> String) {
        let Some(lines) = &mut self.lines else {
            self.hasher.write_i64(now.total_micros());
            return;
        };
        self.hasher.write_i64(now.total_micros());
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(format!("{:>14} {}", seconds(now), text()));
    }

    /// Hashes bytes that travel: where to, and what.
    pub(super) fn bytes(&mut self, now: Instant, place: u64, bytes: &[u8]) {
        self.hasher.write_i64(now.total_micros());
        self.hasher.write_u64(place);
        self.hasher.write(bytes);
    }

    pub(super) fn hash(&self) -> u64 {
        self.hasher.finish()
    }

    pub(super) fn lines(self) -> Vec<String> {
        self.lines.into_iter().flatten().collect()
    }
}

/// A time of a run, in seconds.
pub(super) fn seconds(at: Instant) -> String {
    format!("{}.{:06} s", at.secs(), at.total_micros() % 1_000_000)
}
