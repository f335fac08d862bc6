//! Mutations of inputs, for a bounded run without libFuzzer. The same seed makes the same inputs.

use fastrand::Rng;

/// Makes inputs of others.
pub(crate) struct Mutator<'a> {
    random: Rng,
    seeds: &'a [Vec<u8>],
    words: &'a [&'a [u8]],
    max_len: usize,
}

const INTERESTING: [u8; 8] = [0, 1, 0x0f, 0x10, 0x7f, 0x80, 0xfe, 0xff];

impl<'a> Mutator<'a> {
    /// Inputs longer than `max_len` are cut.
    pub(crate) fn new(
        seed: u64,
        seeds: &'a [Vec<u8>],
        words: &'a [&'a [u8]],
        max_len: usize,
    ) -> Self {
        Self {
            random: Rng::with_seed(seed),
            seeds,
            words,
            max_len,
        }
    }

    /// The next input.
    pub(crate) fn next_input(&mut self) -> Vec<u8> {
        let mut input = self.random.choice(self.seeds).cloned().unwrap_or_default();
        for _ in 0..self.random.u32(1..8) {
            self.mutate(&mut input);
        }
        input.truncate(self.max_len);
        input
    }

    fn mutate(&mut self, input: &mut Vec<u8>) {
        let random = &mut self.random;
        let at = random.usize(0..=input.len());
        let end = input.len().min(at + random.usize(1..16));
        match random.u8(0..9) {
            0 => change(input, at, |byte| byte ^ (1 << random.u8(0..8))),
            1 => change(input, at, |_| random.u8(..)),
            2 => change(input, at, |_| {
                INTERESTING[random.usize(0..INTERESTING.len())]
            }),
            3 => change(input, at, |byte| {
                byte.wrapping_add(random.u8(0..9)).wrapping_sub(4)
            }),
            4 => drop(input.drain(at..end)),
            5 => {
                let again = input[at..end].to_vec();
                input.splice(at..at, again);
            }
            6 => {
                let some = std::iter::repeat_with(|| random.u8(..)).take(end - at);
                let some: Vec<u8> = some.collect();
                input.splice(at..at, some);
            }
            7 => {
                let word = random.choice(self.words).copied().unwrap_or_default();
                let over = if random.bool() { word.len() } else { 0 };
                input.splice(at..input.len().min(at + over), word.iter().copied());
            }
            _ => {
                let other = random.choice(self.seeds).cloned().unwrap_or_default();
                let from = random.usize(0..=other.len());
                input.splice(at.., other[from..].iter().copied());
            }
        }
    }
}

fn change(input: &mut [u8], at: usize, to: impl FnOnce(u8) -> u8) {
    if let Some(byte) = input.get_mut(at) {
        *byte = to(*byte);
    }
}
