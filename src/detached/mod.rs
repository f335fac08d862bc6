//! Pods without a terminal, `muslin run -d`: a process beside the command outlives the one that
//! started it, keeps what the command writes, and ends all that the command has started with it.

mod descendants;
mod log;
mod record;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tracing::warn;

use crate::attach::{self, Signals};
use crate::control::protocol::Attached;
use crate::error::{Context, Error, Result};
use crate::signals::Listener;

use log::Log;
use record::Record;
pub(crate) use record::{Detached, End};

/// Has the process beside a command end all of the pod at once.
pub(crate) const END_AT_ONCE: Signal = Signal::SIGUSR2;
/// Bytes of output that are taken at once.
const CHUNK: usize = 64 << 10;
/// How long output of a command that has ended may still come.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Bytes of a pod's name, or of an error's number, with a line's end.
const MAX_REPLY: u64 = 256;

/// Starts the process beside the command, which is told so by its first argument, and returns what
/// it prints once the command runs: the pod's name.
///
/// # Errors
/// The exit code of that process, which has said what is wrong.
pub(crate) fn launch(arguments: impl IntoIterator<Item = OsString>) -> Result<String> {
    let mut child = std::process::Command::new("/proc/self/exe")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the process beside the command")?;
    let mut reply = String::new();
    if let Some(output) = &mut child.stdout {
        let read = output.take(MAX_REPLY).read_to_string(&mut reply);
        read.context("cannot hear of the command")?;
    }
    if !reply.is_empty() {
        return Ok(reply);
    }
    let status = child.wait().context("cannot wait for the command")?;
    attach::exit_code(status)?;
    Err(Error::failed("the process beside the command has ended"))
}

/// Leaves the terminal, so that its end is not this process', and takes care of all that is started
/// from here.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn leave_terminal() -> Result<()> {
    setsid().context("cannot leave the terminal")?;
    set_child_subreaper(true).context("cannot take care of the command's processes")
}

/// Runs a pod's command to its end. Its name is printed when the command runs; from then on nothing
/// comes from this process but by its log.
///
/// # Errors
/// If the command cannot be started. How it ended is on record.
pub(crate) async fn run(
    state_dir: &Path,
    command: Vec<OsString>,
    attached: &Attached,
    mut signals: Signals,
) -> Result<()> {
    let record = Record::create(state_dir, &attached.node, &attached.pod)?;
    let mut log = record.log()?;
    let (output, input) = io::pipe().context("cannot make a pipe")?;
    let mut output = receiver(output)?;
    let mut child = match start(command, attached, input).await {
        Ok(child) => child,
        Err(error) => {
            record.discard();
            return Err(error);
        }
    };
    let group = child.id();
    let printed = writeln!(io::stdout(), "{}", attached.pod).and_then(|()| io::stdout().flush());
    if let Err(error) = printed {
        // Whoever has asked for the pod is gone, and does not know of it.
        pass_on(group, Signal::SIGKILL);
        descendants::end_all().await;
        record.discard();
        return Err(Error::failed(format!(
            "cannot print the pod's name: {error}"
        )));
    }
    let mut own = receiver(replace_standard_streams()?)?;
    let mut end_at_once = Listener::new(END_AT_ONCE)?;
    let mut ended_children = signal(SignalKind::child()).context("cannot listen for signals")?;
    let (mut bytes, mut own_bytes) = (vec![0; CHUNK], vec![0; CHUNK]);
    let (mut has_output, mut has_own) = (true, true);
    let status = loop {
        tokio::select! {
            read = output.read(&mut bytes), if has_output => {
                has_output = keep(&mut log, &bytes, read);
            }
            read = own.read(&mut own_bytes), if has_own => {
                has_own = keep(&mut log, &own_bytes, read);
            }
            status = child.wait() => break status,
            _ = ended_children.recv() => descendants::reap_all_but(group),
            signal = signals.next() => pass_on(group, signal),
            () = end_at_once.heard() => pass_on(group, Signal::SIGKILL),
        }
    };
    pass_on(group, Signal::SIGKILL);
    descendants::end_all().await;
    let last_words = async {
        while has_output {
            let read = output.read(&mut bytes).await;
            has_output = keep(&mut log, &bytes, read);
        }
    };
    // What cannot be killed may hold the pipe.
    let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
    let ended = attach::exit_code(status.context("cannot wait for the command")?);
    let code = ended.as_ref().map_or_else(Error::exit_code, |()| 0);
    if let Err(error) = record.finish(code) {
        warn!("how the pod has ended is not on record: {error}");
    }
    ended
}

/// Starts the command in a process group of its own, with its output in the pipe, and waits until it
/// has begun.
async fn start(
    command: Vec<OsString>,
    attached: &Attached,
    output: io::PipeWriter,
) -> Result<Child> {
    let program = command.first().cloned().unwrap_or_default();
    let (failure, report) = io::pipe().context("cannot make a pipe")?;
    let failure = receiver(failure)?;
    let mut child = {
        let again = output.try_clone().context("cannot share a pipe")?;
        let mut command = attach::command(command, attached, &["--reports"]);
        command.stdin(report).stdout(output).stderr(again);
        // The ends of the pipes go with it.
        command.process_group(0).spawn()
    }
    .context("cannot start the command")?;
    let mut number = String::new();
    let read = failure.take(MAX_REPLY).read_to_string(&mut number).await;
    read.context("cannot hear of the command")?;
    if number.is_empty() {
        return Ok(child);
    }
    child.wait().await.context("cannot wait for the command")?;
    Err(Error::Start {
        program: program.display().to_string(),
        error: io::Error::from_raw_os_error(number.trim().parse().unwrap_or_default()),
    })
}

/// Takes output into the log, and returns whether there may be more.
fn keep(log: &mut Log, bytes: &[u8], read: io::Result<usize>) -> bool {
    match read {
        Ok(len @ 1..) => {
            log.write(&bytes[..len]);
            true
        }
        Ok(0) => false,
        Err(error) => {
            warn!("the output cannot be read any more: {error}");
            false
        }
    }
}

/// Sends a signal to the command's process group, if that is there still.
fn pass_on(group: Option<u32>, signal: Signal) {
    if let Some(group) = group.and_then(|group| i32::try_from(group).ok()) {
        let _ = killpg(Pid::from_raw(group), signal);
    }
}

/// Gives up the streams of whoever has started this process, and returns where what it writes to
/// stderr can be read from now on.
fn replace_standard_streams() -> Result<PipeReader> {
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.context("cannot open /dev/null")?;
    let (own, stderr) = io::pipe().context("cannot make a pipe")?;
    // This process reads its own words, and so must never wait until it does.
    fcntl(&stderr, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("cannot set up a pipe")?;
    let replaced = dup2_stdin(&null)
        .and_then(|()| dup2_stdout(&null))
        .and_then(|()| dup2_stderr(&stderr));
    replaced.context("cannot give up the terminal")?;
    Ok(own)
}

fn receiver(pipe: PipeReader) -> Result<pipe::Receiver> {
    pipe::Receiver::from_owned_fd(OwnedFd::from(pipe)).context("cannot read from a pipe")
}

/// Becomes the command of a detached pod in the process that [`start`] has made: its stdin leads
/// there, and is closed when the command begins. Returns if it cannot.
pub(crate) fn report_start(exec: impl FnOnce() -> Error) -> Error {
    let report = io::stdin().as_fd().try_clone_to_owned();
    let null = File::open("/dev/null").and_then(|null| Ok(dup2_stdin(null)?));
    let mut report = match (report, null) {
        // The copy is closed on exec.
        (Ok(report), Ok(())) => File::from(report),
        (Err(error), _) | (_, Err(error)) => {
            return Error::failed(format!("cannot prepare the command's stdin: {error}"));
        }
    };
    let error = exec();
    let number = match &error {
        Error::Start { error, .. } => error.raw_os_error().unwrap_or(nix::libc::EINVAL),
        _ => nix::libc::EINVAL,
    };
    // Without a reader there is nobody to know.
    let _ = writeln!(report, "{number}");
    Error::Command(error.exit_code())
}
