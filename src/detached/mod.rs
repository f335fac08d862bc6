//! Pods without a terminal, `muslin run -d`: a process beside the command outlives the one that
//! started it, and keeps what the command writes.

mod log;
mod record;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;

use log::Log;
use muslin_stack::api::control::Attached;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use record::Record;
pub(crate) use record::{Detached, End};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tracing::warn;

use crate::attach::{self, Signals};
use crate::error::{Context, Error, Result};
use crate::init::Init;
use crate::signals::Listener;
use crate::terminal::job::{Change, Job};

/// Has the process beside a command end all of the pod at once.
pub(crate) const END_AT_ONCE: Signal = Signal::SIGUSR2;
/// Bytes of output that are taken at once.
const CHUNK: usize = 64 << 10;
/// Bytes of a pod's name with a line's end.
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
        read.context("cannot read the state of the command")?;
    }
    if !reply.is_empty() {
        return Ok(reply);
    }
    let status = child.wait().context("cannot wait for the command")?;
    attach::exit_code(status)?;
    Err(Error::failed("the process beside the command has ended"))
}

/// Leaves the terminal, so that its end is not this process'.
///
/// # Errors
/// If the kernel does not allow it.
pub(crate) fn leave_terminal() -> Result<()> {
    setsid().context("cannot leave the terminal")?;
    Ok(())
}

/// Runs a pod's command to its end. Its name is printed when the command runs; from then on nothing
/// comes from this process but by its log, as the command's output does.
///
/// # Errors
/// If the command cannot be started. How it ended is on record.
pub(crate) async fn run(
    state_dir: &Path,
    init: &Init,
    attached: &Attached,
    output: PipeReader,
    mut signals: Signals,
) -> Result<()> {
    let record = Record::create(state_dir, &attached.node, &attached.pod)?;
    let mut log = record.log()?;
    let mut output = receiver(output)?;
    if let Err(error) = init.begin(attached).await {
        record.discard();
        return Err(error);
    }
    let printed = writeln!(io::stdout(), "{}", attached.pod).and_then(|()| io::stdout().flush());
    if let Err(error) = printed {
        // The process that requested the pod is gone, and does not know of it.
        init.kill();
        record.discard();
        return Err(Error::failed(format!(
            "cannot print the pod's name: {error}"
        )));
    }
    let mut own = receiver(replace_standard_streams()?)?;
    let mut end_at_once = Listener::new(END_AT_ONCE)?;
    let (mut bytes, mut own_bytes) = (vec![0; CHUNK], vec![0; CHUNK]);
    let (mut has_output, mut has_own) = (true, true);
    let code = loop {
        tokio::select! {
            read = output.read(&mut bytes), if has_output => {
                has_output = keep(&mut log, &bytes, read);
            }
            read = own.read(&mut own_bytes), if has_own => {
                has_own = keep(&mut log, &own_bytes, read);
            }
            change = init.changed() => if let Change::Ended(code) = change? {
                break code;
            },
            signal = signals.next() => init.signal(signal).await,
            () = end_at_once.heard() => init.kill(),
        }
    };
    // All who could write more have ended.
    while has_output {
        let read = output.read(&mut bytes).await;
        has_output = keep(&mut log, &bytes, read);
    }
    if let Err(error) = record.finish(code) {
        warn!("cannot record how the pod has ended: {error}");
    }
    attach::result_of(code)
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
            warn!("cannot read the output any more: {error}");
            false
        }
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
