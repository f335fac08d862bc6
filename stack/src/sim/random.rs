//! Randomness of a run: PCG streams, whose numbers their crate promises to keep.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

/// What a stream of numbers is for. Streams of one seed have nothing to do with each other, so that
/// a plan that is cut short keeps its weather.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stream {
    Plan,
    Underlay,
    Store,
    Machines,
    Check,
    Outside,
    Workers,
    Names,
    Families,
}

/// One stream of a seed.
#[derive(Debug, Clone)]
pub(super) struct Random(Pcg64);

impl Random {
    pub(super) fn new(seed: u64, stream: Stream) -> Self {
        // An odd factor keeps different seeds different.
        let mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stream as u64;
        Self(Pcg64::seed_from_u64(mixed))
    }

    pub(super) fn number(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `bound`, or 0 (Lemire's multiplication; its bias does not matter here).
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.number()) * u128::from(bound)) >> 64) as u64
    }

    /// A number from `least` to `most`.
    pub(super) fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most.saturating_sub(least) + 1)
    }

    pub(super) fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True so many times out of a thousand. Asks for no number where none can matter.
    pub(super) fn chance(&mut self, permille: u16) -> bool {
        permille > 0 && self.below(1000) < permille.into()
    }

    pub(super) fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())].clone()
    }

    /// The bytes of a MAC address.
    pub(super) fn mac(&mut self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.number().to_be_bytes();
        [a, b, c, d, e, f]
    }
}
