//! Tests whose own process is inside a lab. A process with threads cannot enter a user namespace, so
//! the test program is started there once more.

use std::process::Command;

use super::Lab;

/// Tells the program that it is inside.
const INSIDE: &str = "MUSLIN_TEST_INSIDE";

/// Whether this process is inside. If it is not, the calling test is run once more in a network
/// namespace of its own, where it must succeed; nothing is left to do then.
pub(crate) fn enter() -> bool {
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
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs one test with this command of the test program, which must succeed.
pub(crate) fn succeeds(command: &mut Command, test: &str) {
    command.args(["--include-ignored", "--exact", "--nocapture", test]);
    let output = command.env(INSIDE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr),
    );
}
