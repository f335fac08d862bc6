//! The terminal of this process, and jobs that have it for a while, as a shell's jobs do.
//!
//! What runs in a pod cannot name a process group from outside. A shell there could not give the
//! terminal back to ours at its end, and complains. So a command that is used from a terminal leads a
//! group of its own, which is given the terminal, and this process stops when that group does.

use std::fs::File;
use std::io::{IsTerminal, stdin, stdout};

use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::{Pid, getpgrp, tcgetpgrp, tcsetpgrp};

use crate::error::Result;
use crate::signals::Signals;

/// The terminal of any process that has one.
const PATH: &str = "/dev/tty";

/// Whether there is one.
pub(crate) fn is_there() -> bool {
    File::open(PATH).is_ok()
}

/// Gives the terminal's input to a process group.
pub(crate) fn give_to(group: Pid) {
    let ttou = SigSet::from(Signal::SIGTTOU);
    // Without this who has not the input itself is stopped for it.
    let was_blocked = SigSet::thread_get_mask().is_ok_and(|it| it.contains(Signal::SIGTTOU));
    let _ = ttou.thread_block();
    // The terminal may be gone, and so may the group.
    let _ = File::open(PATH).map(|terminal| tcsetpgrp(terminal, group));
    if !was_blocked {
        let _ = ttou.thread_unblock();
    }
}

/// Whether this process' group has the terminal's input.
fn is_ours() -> bool {
    File::open(PATH).is_ok_and(|terminal| tcgetpgrp(terminal) == Ok(getpgrp()))
}

/// Whether this process is used from a terminal, and a command in its place would be: it is not a part
/// of a pipeline, where others may want to read what is typed.
pub(crate) fn is_used() -> bool {
    stdin().is_terminal() && stdout().is_terminal() && is_ours()
}

/// What has become of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// It has ended, with this exit code.
    Ended(u8),
    /// It has been stopped.
    Stopped(Signal),
}

/// A command that runs for this process.
pub(crate) trait Job {
    /// Waits for its next change.
    async fn changed(&self) -> Result<Change>;
    /// Sends it a signal.
    async fn signal(&self, signal: Signal);
    /// Has it go on after it has been stopped, and gives it the terminal if it is to have that.
    async fn go_on(&self, has_terminal: bool);
}

/// Waits for a job's end, passes on to it what asks it to end, and returns its exit code. One that
/// `has_terminal` has signals that are typed there for itself.
///
/// # Errors
/// If it cannot be waited for.
pub(crate) async fn attend(job: &impl Job, has_terminal: bool, mut signals: Signals) -> Result<u8> {
    let mut has_it_now = has_terminal;
    loop {
        tokio::select! {
            change = job.changed() => match change? {
                Change::Ended(code) => {
                    if has_it_now {
                        take_back(code);
                    }
                    return Ok(code);
                }
                Change::Stopped(signal) if has_terminal => {
                    has_it_now = stop_as_well(signal, has_it_now);
                    job.go_on(has_it_now).await;
                }
                Change::Stopped(_) => {}
            },
            signal = signals.next() => {
                if has_terminal || !is_the_terminals(signal) {
                    job.signal(signal).await;
                }
            }
        }
    }
}

/// Whether a signal is one that a terminal gives to all of a job, and so to the command by itself.
pub(crate) fn is_the_terminals(signal: Signal) -> bool {
    matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && is_there()
}

/// Stops this process as its job was stopped, so that the shell knows, and returns when the shell has
/// it go on: whether with the terminal.
fn stop_as_well(signal: Signal, has_it: bool) -> bool {
    // It wants what we have been given since.
    if matches!(signal, Signal::SIGTTIN | Signal::SIGTTOU) && is_ours() {
        return true;
    }
    if has_it {
        give_to(getpgrp());
    }
    // Where no shell could have it go on, this does nothing.
    let _ = killpg(getpgrp(), Signal::SIGTSTP);
    is_ours()
}

/// Takes the terminal back from a job that has ended. The rest of ours has the interrupt that has
/// ended it, as it would have without a job of its own.
fn take_back(code: u8) {
    give_to(getpgrp());
    if code == 128 + Signal::SIGINT as u8 {
        let _ = killpg(getpgrp(), Signal::SIGINT);
    }
}
