//! Agents in pods of a node.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use muslin_stack::control::ipam::PodName;

use super::Agent;
use crate::error::{Context, Error, Result};

/// How long a pod may take to be there.
const PATIENCE: Duration = Duration::from_secs(5);

impl Agent {
    /// An agent in a new pod of the node that listens at `socket`. The pod ends with it.
    ///
    /// # Errors
    /// Why there can be no such pod.
    pub(crate) fn in_new_pod(socket: &Path, name: &str) -> Result<Self> {
        let mut command = this_program()?;
        command.arg("run").arg("--socket").arg(socket);
        command.args(["--name", name]);
        Self::inside(command)
    }

    /// An agent in a pod that is attached to the node that listens at `socket`.
    ///
    /// # Errors
    /// Why the pod cannot be entered.
    pub(crate) fn in_pod(socket: &Path, pod: &PodName) -> Result<Self> {
        let mut command = this_program()?;
        command.arg("exec").arg("--socket").arg(socket);
        command.arg(pod.as_str());
        Self::inside(command)
    }

    /// An agent where `command` runs what follows in its words.
    fn inside(mut command: Command) -> Result<Self> {
        command.arg("--").arg(this_program()?.get_program());
        command.arg("agent").stderr(Stdio::piped());
        command
            .env_remove("MUSLIN_NODE")
            .env_remove("MUSLIN_SOCKET");
        // What is typed to end this process does not end the agent beneath it.
        command.process_group(0);
        let mut agent = Self::start(&mut command)?;
        match agent.wait_ready(PATIENCE) {
            Ok(()) => Ok(agent),
            Err(error) => Err(agent.last_words().map_or(error, Error::failed)),
        }
    }

    /// Ends it, and returns what it has said of its end.
    fn last_words(mut self) -> Option<String> {
        let child = self.child();
        // It may have ended by itself.
        let _ = child.kill();
        let mut said = String::new();
        child.stderr.take()?.read_to_string(&mut said).ok()?;
        let last = said.lines().rfind(|line| !line.is_empty())?;
        Some(last.strip_prefix("muslin: ").unwrap_or(last).to_owned())
    }
}

fn this_program() -> Result<Command> {
    let program = std::env::current_exe().context("cannot find this program")?;
    Ok(Command::new(program))
}
