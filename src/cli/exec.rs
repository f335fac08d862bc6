//! `muslin exec`: a command in the namespaces of a pod that runs.

use std::ffi::OsString;

use clap::Args;
use muslin_stack::api::control::Namespace;
use muslin_stack::control::ipam::PodName;
use nix::unistd::{Pid, setpgid};

use super::NodeChoice;
use super::run::EnvironmentArguments;
use crate::attach::{self, Signals};
use crate::confine;
use crate::control::Client;
use crate::error::Result;
use crate::netns::{self, Child, Parent};
use crate::process::{block_on, exit_code};
use crate::terminal::job::{self, Job};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    /// The pod's name
    pod: PodName,
    #[command(flatten)]
    environment: EnvironmentArguments,
    /// The command and its arguments; MUSLIN_POD, MUSLIN_NODE and MUSLIN_ADDRESS are set in its
    /// environment [default: $SHELL]
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Becomes the command where it can, so that terminal, signals and exit code are its own. In a pod with
/// processes of its own only a child can be one of them.
pub(super) fn run(arguments: Arguments) -> Result<()> {
    let socket = arguments.node.socket()?;
    let pod = &arguments.pod;
    let (there, namespaces) = block_on(async {
        let client = Client::connect(&socket).await?;
        client.namespaces(pod).await
    })?;
    // The command is its own master again.
    confine::keep_to_itself()?;
    let variables = attach::variables(pod, &there.node, there.address);
    let command = attach::or_shell(arguments.command);
    let environment = arguments.environment.environment();
    let enter = |namespaces: &[_], parent: Option<&Parent>| {
        let entered = netns::enter_pod(namespaces);
        match entered.and_then(|()| parent.map_or(Ok(()), Parent::end_with_it)) {
            Ok(()) => attach::become_command(&command, &environment, &variables),
            Err(error) => error,
        }
    };
    let processes = namespaces
        .iter()
        .position(|(kind, _)| *kind == Namespace::Pid);
    let Some(processes) = processes else {
        return Err(enter(&namespaces, None));
    };
    // This process itself stays where nobody in the pod can get at it.
    let (outer, inner) = namespaces.split_at(processes + 1);
    netns::enter_pod(outer)?;
    let has_terminal = job::is_used();
    let leads = has_terminal || !job::is_there();
    let (child, ()) = Child::fork((), |parent| {
        if leads {
            lead(Pid::from_raw(0));
        }
        exit_code(&enter(inner, Some(parent)))
    })?;
    if leads {
        lead(child.pid());
    }
    block_on(async {
        let signals = Signals::listen()?;
        if has_terminal {
            child.go_on(true).await;
        }
        attach::result_of(job::attend(&child, has_terminal, signals).await?)
    })
}

/// Makes a child lead a process group. Both it and its parent do, since each may be first.
fn lead(child: Pid) {
    let _ = setpgid(child, child);
}
