//! The processes of a test, by a mark that they inherit: a variable of their environment.

use std::fmt;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process that has a mark.
pub struct Process {
    pid: Pid,
    command: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.command)
    }
}

/// The processes that were started with this in their environment: a name, `=` and a value.
pub fn marked(mark: &str) -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let process = |pid: i32| {
        // Zombies have no environment, and others' processes cannot be looked at.
        let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        let mut variables = environment.split(|byte| *byte == 0);
        variables.find(|variable| *variable == mark.as_bytes())?;
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some(Process {
            pid: Pid::from_raw(pid),
            command: String::from_utf8_lossy(&command).replace('\0', " "),
        })
    };
    pids.filter_map(process).collect()
}

/// Kills all processes that have this mark.
pub fn kill_all(mark: &str) {
    for process in marked(mark) {
        // It may have ended by itself.
        let _ = kill(process.pid, Signal::SIGKILL);
    }
}
