//! What the first process of a pod does: it makes the pod's namespaces, starts its command, passes
//! signals on to it and takes the exit status of all whose own parent has ended.
//!
//! The kernel gives it no signal for which it has no handler, from whomever inside the pod, and of the
//! terminal's none that would stop it. So it needs none but SIGCHLD's, and is told of others.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;

use muslin_stack::api::control::Attached;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stderr, dup2_stdout};
use tokio::signal::unix::{SignalKind, signal};

use super::messages::{InitSettings, Order, Report, connect};
use crate::attach;
use crate::confine;
use crate::control::Connection;
use crate::error::{Context, Error, Result, errno};
use crate::netns::{self, Files, Limits, Parent, Resolution};
use crate::process::{block_on, exit_code};
use crate::terminal::job::{self, Change};

/// The parent has ended, and with it whoever could be told anything.
const ALONE: Error = Error::Command(128 + Signal::SIGKILL as u8);

/// Is the first process, to its end: returns the command's exit code, or 128 and the number of the
/// signal that ended it.
pub(super) fn run(settings: InitSettings, limits: &Limits, socket: OwnedFd, parent: &Parent) -> u8 {
    // With threads there would be no user namespace.
    let made = netns::enter_inner(limits, settings.ids, &settings.hidden);
    let made = made.and_then(|files| parent.end_with_it().map(|()| files));
    let served = block_on(async {
        let connection = connect(socket)?;
        match made {
            Ok(files) => serve(settings, files, &connection).await,
            Err(_) => report(&connection, &made).await.map(|()| 1),
        }
    });
    served.unwrap_or_else(|error| exit_code(&error))
}

async fn serve(settings: InitSettings, files: Files, connection: &Connection) -> Result<u8> {
    report(connection, &Ok(())).await?;
    let Some(Order::Begin(attached)) = order(connection).await? else {
        return Ok(0);
    };
    let changes = signal(SignalKind::child());
    let mut changes = changes.context("cannot listen for signals")?;
    let command = begin(settings, files, &attached);
    report(connection, &command).await?;
    let Ok(command) = command else { return Ok(1) };
    loop {
        tokio::select! {
            _ = changes.recv() => match reap(command.process) {
                Some(Change::Ended(code)) => return Ok(code),
                Some(Change::Stopped(signal)) => {
                    say(connection, &Report::Stopped(signal as i32)).await?;
                }
                None => {}
            },
            order = order(connection) => match order? {
                Some(Order::Signal(number)) => command.signal(number),
                Some(Order::GoOn { has_terminal }) => command.go_on(has_terminal),
                Some(Order::Begin(_)) => {}
                None => return Err(ALONE),
            },
        }
    }
}

async fn report<T>(connection: &Connection, result: &Result<T>) -> Result<()> {
    let report = match result {
        Ok(_) => Report::Done,
        Err(Error::Start { error, .. }) => Report::NoCommand(errno(error) as i32),
        Err(error) => Report::Failed(error.to_string()),
    };
    say(connection, &report).await
}

async fn say(connection: &Connection, report: &Report) -> Result<()> {
    let sent = connection.send(report, &[]).await;
    sent.map_err(|_| ALONE)
}

async fn order(connection: &Connection) -> Result<Option<Order>> {
    let received = connection.receive::<Order>().await;
    Ok(received.map_err(|_| ALONE)?.map(|(order, _)| order))
}

/// A pod's command.
#[derive(Debug, Clone, Copy)]
struct Command {
    process: Pid,
    /// Whether it leads a process group, which has its signals.
    is_leader: bool,
}

impl Command {
    fn signal(self, number: i32) {
        let Ok(signal) = Signal::try_from(number) else {
            return;
        };
        // It may have ended this moment.
        let _ = if self.is_leader {
            killpg(self.process, signal)
        } else {
            kill(self.process, signal)
        };
    }

    fn go_on(self, has_terminal: bool) {
        if has_terminal {
            job::give_to(self.process);
        }
        self.signal(Signal::SIGCONT as i32);
    }
}

/// Starts the command.
fn begin(settings: InitSettings, files: Files, attached: &Attached) -> Result<Command> {
    let resolution = Resolution {
        resolvers: &attached.dns,
        search: &attached.search,
        options: &attached.dns_options,
    };
    let addresses = attached.address.addresses();
    files.fill(attached.pod.as_str(), addresses, &resolution)?;
    // What it knows of our environment is not for the pod.
    confine::keep_to_itself()?;
    if let Some(output) = settings.output {
        let replaced = dup2_stdout(&output).and_then(|()| dup2_stderr(&output));
        replaced.context("cannot use the log")?;
    }
    let words = attach::or_shell(settings.command);
    let variables = attach::variables(&attached.pod, &attached.node, addresses);
    let mut command = attach::command(&words, &settings.environment, &variables)?;
    // Only where a terminal's input is to be shared with others, as in a pipeline, it is in our group.
    let is_leader = settings.has_terminal || !job::is_there();
    if is_leader {
        command.process_group(0);
    }
    let child = command.spawn().map_err(|error| Error::Start {
        program: command.get_program().display().to_string(),
        error,
    })?;
    let process = i32::try_from(child.id()).context("a strange process")?;
    let command = Command {
        process: Pid::from_raw(process),
        is_leader,
    };
    if settings.has_terminal {
        // It may have been stopped by now, since it had not got it yet.
        command.go_on(true);
    }
    Ok(command)
}

/// Takes the exit status of all that have ended, and returns what has become of the command.
fn reap(command: Pid) -> Option<Change> {
    let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED;
    let mut change = None;
    loop {
        match waitpid(None::<Pid>, Some(flags)) {
            Ok(WaitStatus::StillAlive) | Err(_) => return change,
            Ok(status) if status.pid() == Some(command) => {
                change = netns::change(status).or(change);
            }
            Ok(_) => {}
        }
    }
}
