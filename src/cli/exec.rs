//! `muslin exec`: a command in the namespaces of a pod that runs.

use std::ffi::OsString;

use clap::Args;
use muslin_stack::ipam::PodName;

use super::{NodeChoice, block_on};
use crate::attach;
use crate::confine;
use crate::control::Client;
use crate::error::Result;
use crate::netns;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    /// The pod's name
    pod: PodName,
    /// The command, and all that follows is its own; it finds MUSLIN_POD, MUSLIN_NODE and
    /// MUSLIN_ADDRESS in its environment [default: $SHELL]
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Becomes the command, so that terminal, signals and exit code are its own.
pub(super) fn run(arguments: Arguments) -> Result<()> {
    let socket = arguments.node.socket()?;
    let pod = &arguments.pod;
    let (there, namespaces) = block_on(async {
        let client = Client::connect(&socket).await?;
        client.namespaces(pod).await
    })?;
    // The command is its own master again.
    confine::keep_to_itself()?;
    netns::enter_pod(&namespaces)?;
    drop(namespaces);
    let variables = attach::variables(pod, &there.node, there.address);
    let command = attach::or_shell(arguments.command);
    Err(attach::become_command(&command, &variables))
}
