//! What becomes of a test on a machine that lacks what it needs.

use std::fmt::Display;
use std::fs::File;
use std::io::Write as _;

/// Names the file that has a line for each test that was skipped; `.ci/test` counts them.
const REPORT: &str = "MUSLIN_TEST_SKIPPED";

/// Says that the calling test is not done, and why. The test has to return then.
///
/// # Panics
/// In CI, where nothing may be skipped.
pub fn skip(why: impl Display) {
    let line = line(why);
    assert!(std::env::var_os("CI").is_none(), "{line}");
    report(&line);
}

/// The same where the kernel lacks something, which no package brings: in CI, too, the test is only
/// counted as skipped.
pub fn skip_on_this_kernel(why: impl Display) {
    report(&line(why));
}

/// The same where the distributions that tests are run on have no package of what is needed.
pub fn skip_for_lack_of_package(why: impl Display) {
    report(&line(why));
}

fn line(why: impl Display) -> String {
    let thread = std::thread::current();
    format!("skipped: {}: {why}\n", thread.name().unwrap_or("a test"))
}

fn report(line: &str) {
    // Past the test runner, which keeps what passing tests print.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os(REPORT) {
        let report = File::options().create(true).append(true).open(path);
        let written = report.and_then(|mut report| report.write_all(line.as_bytes()));
        written.expect("the report of skipped tests can be written");
    }
}
