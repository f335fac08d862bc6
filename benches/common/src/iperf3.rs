//! iperf3 as the load, for a second opinion.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::window::{Ends, Process};

/// Seconds at the beginning that do not count; it takes none but whole ones.
const OMIT: &str = "1";

/// Whether it is installed.
pub fn is_installed() -> bool {
    let mut command = Command::new("iperf3");
    command.arg("--version").stdout(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Gigabits per second of payload that arrived, by so many streams in at least so much time.
pub fn streams(ends: &Ends, count: usize, duration: Duration) -> Result<f64, String> {
    let mut server = ends.sink.command("iperf3");
    server.args(["--server", "--one-off", "--forceflush"]);
    let mut server = Process::of(server);
    while !server.line()?.contains("listening") {}
    let seconds = duration.as_secs_f64().ceil().to_string();
    let mut client = ends.source.command("iperf3");
    client
        .args(["--json", "--client", &ends.address.to_string()])
        .args(["--omit", OMIT, "--time", &seconds])
        .args(["--parallel", &count.to_string()]);
    let output = client.output().map_err(|error| error.to_string())?;
    let said: Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("iperf3 said '{}'", String::from_utf8_lossy(&output.stdout)))?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    let gigabits = bits.map(|bits| bits / 1e9).filter(|rate| *rate > 0.0);
    gigabits.ok_or_else(|| format!("iperf3: {}", said["error"]))
}
