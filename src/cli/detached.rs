//! `muslin logs`, `muslin stop` and `muslin rm`: pods of `muslin run -d`.

use std::io::{self, Write};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use muslin_stack::control::ipam::PodName;
use nix::sys::signal::Signal;

use super::StateChoice;
use crate::detached::{Detached, END_AT_ONCE, End};
use crate::error::{Error, Result};
use crate::terminal::quantity::duration;

/// Time for a pod to end once all its processes are killed.
const KILLED: Duration = Duration::from_secs(5);
/// Interval at which a stopping pod is polled.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The node whose detached pods are meant. It need not run.
#[derive(Debug, Args)]
struct NodeName {
    /// The node's name; required if pods of several nodes have the same name
    #[arg(long, value_name = "NAME", env = "MUSLIN_NODE")]
    node: Option<String>,
    #[command(flatten)]
    state: StateChoice,
}

#[derive(Debug, Args)]
pub(super) struct LogsArguments {
    #[command(flatten)]
    node: NodeName,
    /// Follow the log until the pod ends
    #[arg(short, long)]
    follow: bool,
    /// The pod's name
    pod: PodName,
}

#[derive(Debug, Args)]
pub(super) struct StopArguments {
    #[command(flatten)]
    node: NodeName,
    /// Time that the command has after SIGTERM before the whole pod is killed
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    time: u32,
    /// The pods' names
    #[arg(required = true, value_name = "POD")]
    pods: Vec<PodName>,
}

#[derive(Debug, Args)]
pub(super) struct RmArguments {
    #[command(flatten)]
    node: NodeName,
    /// The pods' names
    #[arg(required = true, value_name = "POD")]
    pods: Vec<PodName>,
}

impl NodeName {
    fn find(&self, pod: &PodName) -> Result<Detached> {
        Detached::find(&self.state.dir(), self.node.as_deref(), pod)
    }
}

/// Copies the log, and prints to stderr how the pod has ended if it has.
pub(super) fn logs(arguments: &LogsArguments) -> Result<()> {
    let pod = arguments.node.find(&arguments.pod)?;
    pod.copy_log(&mut io::stdout().lock(), arguments.follow)?;
    if !pod.is_running()? {
        // Whoever reads only the log does not need it.
        let _ = writeln!(
            io::stderr(),
            "muslin: the pod '{}' {}",
            pod.name(),
            how(pod.end())
        );
    }
    Ok(())
}

fn how(end: Option<End>) -> String {
    let Some(End { exit_code, at }) = end else {
        return "was killed, or its machine was switched off".to_owned();
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let ago = now.unwrap_or_default().as_secs().saturating_sub(at);
    format!("ended {} ago with exit code {exit_code}", duration(ago))
}

/// Stops all of them, each with a timeout of its own; a pod that has ended already is not an error.
pub(super) fn stop(arguments: &StopArguments) -> Result<()> {
    let pods = arguments.pods.iter().map(|pod| arguments.node.find(pod));
    let pods = pods.collect::<Result<Vec<_>>>()?;
    for pod in &pods {
        pod.signal(Signal::SIGTERM)?;
    }
    let deadline = Instant::now() + Duration::from_secs(arguments.time.into());
    for pod in &pods {
        if !has_ended(pod, deadline)? {
            end(pod)?;
        }
    }
    Ok(())
}

/// Kills all of a pod, and if need be the process beside it, which does that otherwise.
fn end(pod: &Detached) -> Result<()> {
    for signal in [END_AT_ONCE, Signal::SIGKILL] {
        pod.signal(signal)?;
        if has_ended(pod, Instant::now() + KILLED)? {
            return Ok(());
        }
    }
    Err(Error::failed(format!(
        "the pod '{}' does not stop: a process that waits for a device cannot be killed",
        pod.name()
    )))
}

fn has_ended(pod: &Detached, deadline: Instant) -> Result<bool> {
    while pod.is_running()? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(true)
}

pub(super) fn rm(arguments: &RmArguments) -> Result<()> {
    for pod in &arguments.pods {
        arguments.node.find(pod)?.remove()?;
    }
    Ok(())
}
