//! All that a pod's command has started, and what was left to this process when its parent ended.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long the last of them may take to go; one that waits for a device cannot be killed.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often they are looked at meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Takes the exit status of those that have ended, but for the command's own, which somebody else
/// waits for.
pub(super) fn reap_all_but(command: Option<u32>) {
    for child in children() {
        if let Some(orphan) = pid(child).filter(|_| Some(child) != command) {
            // It may run still.
            let _ = waitpid(orphan, Some(WaitPidFlag::WNOHANG));
        }
    }
}

/// Kills those that are left once the command itself has ended.
pub(super) async fn end_all() {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        // The children of one that dies are ours next.
        for child in children() {
            if let Some(child) = pid(child) {
                let _ = kill(child, Signal::SIGKILL);
            }
        }
        match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => tokio::time::sleep(LOOK_AGAIN).await,
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

fn pid(number: u32) -> Option<Pid> {
    i32::try_from(number).ok().map(Pid::from_raw)
}

/// This process' children.
fn children() -> Vec<u32> {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    let mut children = Vec::new();
    for thread in threads.flatten() {
        // Without CONFIG_PROC_CHILDREN there is no such file.
        let list = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        children.extend(
            list.split_whitespace()
                .filter_map(|it| it.parse::<u32>().ok()),
        );
    }
    children
}
