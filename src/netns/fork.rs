//! A child in which this program goes on: only children are in a fresh PID namespace, or in one that
//! was entered.

#![allow(unsafe_code)] // one call; its block says why it is sound

use std::fs;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use tokio::signal::unix::{SignalKind, signal};

use crate::error::{Context, Error, Result};
use crate::terminal::job::{self, Change, Job};

/// A child of this process.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    /// Shows the child that this process is there.
    _alive: PipeWriter,
}

impl Child {
    /// Has a child do this, and end with the exit code that it returns. What is `own` to this process
    /// is closed there. This process must have one thread.
    ///
    /// # Errors
    /// If there can be no child.
    pub(crate) fn fork<T>(own: T, run: impl FnOnce(&Parent) -> u8) -> Result<(Self, T)> {
        let threads = fs::read_dir("/proc/self/task").context("cannot count threads")?;
        if threads.count() != 1 {
            return Err(Error::failed(
                "a process with threads cannot continue in a child",
            ));
        }
        let (watched, alive) = io::pipe().context("cannot make a pipe")?;
        // SAFETY: No other thread is there, which could hold a lock that nobody in the child would
        // ever release.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { child }) => {
                let child = Self {
                    pid: child,
                    _alive: alive,
                };
                Ok((child, own))
            }
            Ok(ForkResult::Child) => {
                drop((own, alive));
                std::process::exit(run(&Parent(watched)).into())
            }
            // The first process of the PID namespace has ended.
            Err(Errno::ENOMEM) => Err(Error::failed(
                "cannot start a process: the pod has ended, or there is not enough memory",
            )),
            Err(error) => Err(Error::failed(format!("cannot start a process: {error}"))),
        }
    }

    /// Its number here.
    pub(crate) const fn pid(&self) -> Pid {
        self.pid
    }

    /// Kills it.
    pub(crate) fn kill(&self) {
        // It may have ended this moment.
        let _ = kill(self.pid, Signal::SIGKILL);
    }
}

impl Job for Child {
    async fn changed(&self) -> Result<Change> {
        let changes = signal(SignalKind::child());
        let mut changes = changes.context("cannot listen for signals")?;
        loop {
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED;
            let status = waitpid(self.pid, Some(flags));
            match change(status.context("cannot wait for the command")?) {
                Some(change) => return Ok(change),
                None => changes.recv().await,
            };
        }
    }

    async fn signal(&self, signal: Signal) {
        // It may have ended this moment, and not lead a group.
        let _ = killpg(self.pid, signal).or_else(|_| kill(self.pid, signal));
    }

    async fn go_on(&self, has_terminal: bool) {
        if has_terminal {
            job::give_to(self.pid);
        }
        self.signal(Signal::SIGCONT).await;
    }
}

/// What has become of a process, if anything: its exit code is 128 and the number of the signal that
/// has ended it, if one has.
pub(crate) fn change(status: WaitStatus) -> Option<Change> {
    let code = match status {
        WaitStatus::Exited(_, code) => code,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        WaitStatus::Stopped(_, signal) => return Some(Change::Stopped(signal)),
        _ => return None,
    };
    Some(Change::Ended(u8::try_from(code).unwrap_or(1)))
}

/// The parent of a process that was made by [`Child::fork`].
#[derive(Debug)]
pub(crate) struct Parent(PipeReader);

impl Parent {
    /// Has the kernel kill this process with its parent. What changes a process' rights takes that
    /// back (prctl(2)).
    ///
    /// # Errors
    /// If that cannot be had, or the parent has ended.
    pub(crate) fn end_with_it(&self) -> Result<()> {
        set_pdeathsig(Signal::SIGKILL).context("cannot watch the parent process")?;
        // Its number says nothing: it is not in this PID namespace.
        let mut watched = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut watched, PollTimeout::ZERO) {
            Ok(0) => Ok(()),
            Ok(_) => Err(Error::Command(128 + Signal::SIGKILL as u8)),
            Err(error) => Err(Error::failed(format!(
                "cannot watch the parent process: {error}"
            ))),
        }
    }
}
