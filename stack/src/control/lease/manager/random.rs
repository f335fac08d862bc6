//! Numbers that cannot be predicted, from a seed.

use std::hash::BuildHasher;

use crate::datapath::hash::Seed;

/// A sequence of numbers; the same seed makes the same one.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number below a bound; 0 if that is 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 = Seed(self.0).hash_one(bound);
        if bound == 0 { 0 } else { self.0 % bound }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_below_their_bound_and_all_occur() {
        let mut random = Random::new(7);
        let drawn: Vec<_> = (0..100).map(|_| random.below(3)).collect();
        assert!(drawn.iter().all(|number| *number < 3));
        assert!((0..3).all(|number| drawn.contains(&number)));
        assert_eq!(random.below(0), 0);
        let mut again = Random::new(7);
        assert!(drawn.iter().all(|number| again.below(3) == *number));
    }
}
