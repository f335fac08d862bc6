//! A pod's command as a child: started so that it ends with whoever attached the pod, and waited for.

use std::ffi::OsString;
use std::process::ExitStatus;

use muslin_stack::api::control::Attached;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use super::command::{or_shell, variables};
use crate::error::{Context, Result};
use crate::signals::Signals;
use crate::terminal::job;

/// Starts a command that ends with this process, with these variables besides those of all pods.
///
/// # Errors
/// If no process can be started; that there is no such command only its guard sees.
pub(crate) fn start(
    words: Vec<OsString>,
    attached: &Attached,
    more: &[(&str, String)],
) -> Result<Child> {
    // Re-executes this program by its inode: the path may name another one by now.
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["guard", &std::process::id().to_string(), "--"])
        .args(or_shell(words))
        .envs(variables(
            &attached.pod,
            &attached.node,
            attached.address.addresses(),
        ))
        .envs(more.iter().map(|(name, value)| (name, value)))
        .kill_on_drop(true);
    command.spawn().context("cannot start the command")
}

/// Waits for the command, and passes on what asks it to end.
///
/// # Errors
/// If it cannot be waited for.
pub(crate) async fn wait(mut child: Child, mut signals: Signals) -> Result<ExitStatus> {
    loop {
        let signal = tokio::select! {
            status = child.wait() => return status.context("cannot wait for the command"),
            signal = signals.next() => signal,
        };
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(id) = id.filter(|_| !job::is_the_terminals(signal)) {
            // It may have ended this moment.
            let _ = kill(Pid::from_raw(id), signal);
        }
    }
}
