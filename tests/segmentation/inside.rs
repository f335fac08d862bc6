//! Tests that run inside a lab: a process with threads cannot enter a user namespace, so the test
//! program is started there once more.

use std::process::Command;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use crate::lab::Lab;
pub(crate) use crate::lab::inside::{is_inside, succeeds};

/// The seed of a run that is to be repeated.
const SEED: &str = "MUSLIN_TEST_SEED";

/// Runs an ignored test of this program in a network namespace of its own.
pub(crate) fn run(test: &str) {
    let Some(lab) = Lab::new() else { return };
    let host = lab.namespace("kernel");
    succeeds(&mut host.command(std::env::current_exe().unwrap()), test);
}

/// Runs a shell script of which every command must succeed.
pub(crate) fn sh(script: &str) {
    let status = Command::new("sh").args(["-e", "-c", script]).status();
    assert!(status.unwrap().success(), "{script}");
}

/// Tries a number of cases.
///
/// # Panics
/// If one fails, with the smallest such case and the seed of this run.
pub(crate) fn cases<S: Strategy>(count: u32, strategy: &S, test: impl Fn(S::Value)) {
    let seed = std::env::var(SEED).map_or_else(|_| rand_seed(), |seed| seed.parse().unwrap());
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        failure_persistence: None,
        max_shrink_time: 20_000,
        ..Config::with_cases(count)
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let tried = TestRunner::new_with_rng(config, rng).run(strategy, |case| {
        test(case);
        Ok::<(), TestCaseError>(())
    });
    if let Err(error) = tried {
        panic!("{error}\nrun it again with {SEED}={seed}");
    }
}

fn rand_seed() -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}
