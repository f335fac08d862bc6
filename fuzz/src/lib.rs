//! What the fuzz targets share. A target is one file in `src/bin/`: what it holds an input against,
//! its seeds and its dictionary. [`target!`] makes of it a target of cargo-fuzz, ordinary tests,
//! and a command.
#![forbid(unsafe_code)]

mod mutate;
mod target;

use arbitrary::{Result, Unstructured};

#[doc(hidden)]
#[cfg(fuzzing)]
pub use libfuzzer_sys;
pub use target::{Seed, Target};

/// Takes one event after the other from an input, until nothing is left or the rest is none.
pub fn for_each_event(data: &[u8], mut take: impl FnMut(&mut Unstructured<'_>) -> Result<()>) {
    let mut input = Unstructured::new(data);
    while !input.is_empty() && take(&mut input).is_ok() {}
}

/// Makes a target of a file: the entry point of libFuzzer, or on stable Rust a command that writes
/// and replays inputs, and tests that replay all seeds and try mutations of them.
#[macro_export]
macro_rules! target {
    (
        check: $check:ident,
        seeds: $seeds:ident,
        words: $words:expr,
        inputs: $inputs:expr,
        max_len: $max_len:expr $(,)?
    ) => {
        #[cfg(fuzzing)]
        $crate::libfuzzer_sys::fuzz_target!(|data: &[u8]| $check(data));

        #[cfg_attr(fuzzing, allow(dead_code))]
        const TARGET: $crate::Target = $crate::Target {
            name: env!("CARGO_BIN_NAME"),
            check: $check,
            seeds: $seeds,
            words: $words,
            inputs: $inputs,
            max_len: $max_len,
        };

        #[cfg(not(fuzzing))]
        fn main() -> std::process::ExitCode {
            TARGET.command(std::env::args().skip(1))
        }

        #[cfg(test)]
        mod target {
            #[test]
            fn every_seed_passes() {
                super::TARGET.replay_seeds();
            }

            #[test]
            fn the_files_are_what_the_generator_writes() {
                super::TARGET.compare_files();
            }

            #[test]
            fn mutations_of_seeds_pass() {
                super::TARGET.try_some_mutations();
            }
        }
    };
}
