//! Tests whose own process is inside a lab. A process with threads cannot enter a user namespace, so
//! the test program is started there once more.

use std::process::Command;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::Lab;

/// Tells the program that it is inside.
const INSIDE: &str = "MUSLIN_TEST_INSIDE";
/// The seed of a run that is to be repeated.
const SEED: &str = "MUSLIN_TEST_SEED";

/// Whether this process is inside. If it is not, the calling test is run once more in a network
/// namespace of its own, where it must succeed; nothing is left to do then.
pub fn enter() -> bool {
    if is_inside() {
        return true;
    }
    if let Some(lab) = Lab::new() {
        let test = std::thread::current();
        let test = test.name().expect("tests' threads have their names");
        let host = lab.namespace("inside");
        succeeds(&mut host.command(std::env::current_exe().unwrap()), test);
    }
    false
}

/// Whether this is the process inside.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs one test with this command of the test program, which must succeed.
pub fn succeeds(command: &mut Command, test: &str) {
    command.args(["--include-ignored", "--exact", "--nocapture", test]);
    let output = command.env(INSIDE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr),
    );
}

/// Runs an ignored test of this program in a network namespace of its own.
pub fn run(test: &str) {
    let Some(lab) = Lab::new() else { return };
    let host = lab.namespace("kernel");
    succeeds(&mut host.command(std::env::current_exe().unwrap()), test);
}

/// Runs a shell script of which every command must succeed.
pub fn sh(script: &str) {
    let status = Command::new("sh").args(["-e", "-c", script]).status();
    assert!(status.unwrap().success(), "{script}");
}

/// Tries a number of cases.
///
/// # Panics
/// If one fails, with the smallest such case and the seed of this run.
pub fn cases<S: Strategy>(count: u32, strategy: &S, test: impl Fn(S::Value)) {
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
