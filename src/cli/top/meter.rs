//! Rates: what counters have grown by between two looks at them.

use std::collections::HashMap;
use std::time::Duration;

/// Counters of each row, and what they have grown by in a second.
#[derive(Debug)]
pub(super) struct Meter<const N: usize> {
    looked: Option<Duration>,
    counters: HashMap<String, [u64; N]>,
    rates: HashMap<String, [f64; N]>,
}

impl<const N: usize> Default for Meter<N> {
    fn default() -> Self {
        Self {
            looked: None,
            counters: HashMap::new(),
            rates: HashMap::new(),
        }
    }
}

impl<const N: usize> Meter<N> {
    /// Takes the counters of all rows at a moment; what is no more among them is forgotten.
    pub(super) fn read(
        &mut self,
        at: Duration,
        rows: impl IntoIterator<Item = (String, [u64; N])>,
    ) {
        let counters: HashMap<_, _> = rows.into_iter().collect();
        let passed = self.looked.map(|before| at.saturating_sub(before));
        let passed = passed.filter(|passed| !passed.is_zero());
        let rates = counters.iter().filter_map(|(key, now)| {
            let before = self.counters.get(key)?;
            // One that has become less counts anew: whoever counts has begun again.
            let is_same = before.iter().zip(now).all(|(before, now)| before <= now);
            let seconds = passed.filter(|_| is_same)?.as_secs_f64();
            let grown = |index: usize| (now[index] - before[index]) as f64 / seconds;
            Some((key.clone(), std::array::from_fn(grown)))
        });
        self.rates = rates.collect();
        self.counters = counters;
        self.looked = Some(at);
    }

    /// What a row's counters grow by in a second; nothing of a row that is new.
    pub(super) fn rates(&self, key: &str) -> Option<[f64; N]> {
        self.rates.get(key).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn rows(rows: &[(&str, u64)]) -> Vec<(String, [u64; 1])> {
        let rows = rows.iter();
        rows.map(|(key, count)| ((*key).to_owned(), [*count]))
            .collect()
    }

    #[test]
    fn a_rate_is_a_difference_by_time() {
        let mut meter = Meter::default();
        meter.read(seconds(10.0), rows(&[("a", 100), ("b", 0)]));
        assert_eq!(meter.rates("a"), None, "nothing to compare with");
        meter.read(seconds(12.0), rows(&[("a", 150), ("b", 0), ("c", 7)]));
        assert_eq!(meter.rates("a"), Some([25.0]));
        assert_eq!(meter.rates("b"), Some([0.0]));
        assert_eq!(meter.rates("c"), None, "it is new");
        meter.read(seconds(12.5), rows(&[("a", 10), ("c", 8)]));
        assert_eq!(meter.rates("a"), None, "it counts anew");
        assert_eq!(meter.rates("b"), None, "it is gone");
        assert_eq!(meter.rates("c"), Some([2.0]));
        // Two looks at one moment say nothing.
        meter.read(seconds(12.5), rows(&[("c", 9)]));
        assert_eq!(meter.rates("c"), None);
    }
}
