//! A pod's command: started so that it ends with whoever attached the pod, and waited for.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::ExitStatus;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use tokio::process::{Child, Command};

use crate::control::protocol::Attached;
use crate::error::{Context, Error, Result};
use crate::signals::Listener;

/// Starts a pod's command, with what it finds in its environment.
///
/// # Errors
/// If no process can be started; that there is no such command only its guard sees.
pub(crate) fn start(
    command: &[OsString],
    attached: &Attached,
    variables: &[(&str, String)],
) -> Result<Child> {
    let shell = [std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into())];
    let command = if command.is_empty() { &shell } else { command };
    // This program by what it is, not by a path that may name another one by now.
    let started = Command::new("/proc/self/exe")
        .args(["guard", &std::process::id().to_string(), "--"])
        .args(command)
        .env("MUSLIN_POD", attached.pod.as_str())
        .env("MUSLIN_NODE", &attached.node)
        .env("MUSLIN_ADDRESS", attached.address.addr().to_string())
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .kill_on_drop(true)
        .spawn();
    started.context("cannot start the command")
}

/// Becomes the command, in a process that is killed when its parent is: without that it would live
/// on without a network.
///
/// # Errors
/// Why there is no such command, with the code that shells end with then.
pub(crate) fn guard(parent: i32, command: &[OsString]) -> Result<Infallible> {
    set_pdeathsig(Signal::SIGKILL).context("cannot watch the parent process")?;
    if getppid() != Pid::from_raw(parent) {
        return Err(Error::Command(128 + Signal::SIGKILL as u8));
    }
    let Some((program, rest)) = command.split_first() else {
        return Err(Error::usage("there is no command to run"));
    };
    let error = std::process::Command::new(program).args(rest).exec();
    crate::cli::complain(&format_args!("cannot run {}: {error}", program.display()));
    // So that scripts can tell them from the command's own.
    let not_found = error.kind() == io::ErrorKind::NotFound;
    Err(Error::Command(if not_found { 127 } else { 126 }))
}

/// What would end this process and leave the command behind.
pub(crate) struct Signals {
    terminate: Listener,
    hangup: Listener,
    interrupt: Listener,
    quit: Listener,
}

impl Signals {
    /// Listens. To be called before the command starts: from then on somebody may ask it to end.
    ///
    /// # Errors
    /// If the kernel does not allow it.
    pub(crate) fn listen() -> Result<Self> {
        Ok(Self {
            terminate: Listener::new(Signal::SIGTERM)?,
            hangup: Listener::new(Signal::SIGHUP)?,
            interrupt: Listener::new(Signal::SIGINT)?,
            quit: Listener::new(Signal::SIGQUIT)?,
        })
    }

    /// Returns when one of them asks this process to end.
    pub(crate) async fn heard(&mut self) {
        tokio::select! {
            () = self.terminate.heard() => {}
            () = self.hangup.heard() => {}
            () = self.interrupt.heard() => {}
            () = self.quit.heard() => {}
        }
    }
}

/// Waits for the command, and passes on what asks it to end. An interrupt from the terminal
/// reaches the command by itself.
///
/// # Errors
/// If it cannot be waited for.
pub(crate) async fn wait(mut child: Child, mut signals: Signals) -> Result<ExitStatus> {
    loop {
        let pass_on = tokio::select! {
            status = child.wait() => return status.context("cannot wait for the command"),
            () = signals.terminate.heard() => Signal::SIGTERM,
            () = signals.hangup.heard() => Signal::SIGHUP,
            () = signals.interrupt.heard() => continue,
            () = signals.quit.heard() => continue,
        };
        if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok()) {
            // It may have ended this moment.
            let _ = kill(Pid::from_raw(id), pass_on);
        }
    }
}

/// The result of this process when its command has ended so: the command's exit code, or 128 and
/// the number of the signal that ended it.
///
/// # Errors
/// Any exit code but 0.
pub(crate) fn exit_code(status: ExitStatus) -> Result<()> {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    match code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1) {
        0 => Ok(()),
        code => Err(Error::Command(code)),
    }
}
