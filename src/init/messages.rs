//! What the first process is to do, and what it says of that.

use std::ffi::OsString;
use std::io::PipeWriter;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use muslin_stack::api::control::Attached;
use serde::{Deserialize, Serialize};
use tokio_seqpacket::UnixSeqpacket;

use crate::attach::Environment;
use crate::control::Connection;
use crate::error::{Context, Result};
use crate::netns::Ids;

/// What is known of a pod before it has an address.
#[derive(Debug)]
pub(crate) struct InitSettings {
    /// Its command.
    pub(crate) command: Vec<OsString>,
    /// What that has of our environment.
    pub(crate) environment: Environment,
    /// Who its user is inside.
    pub(crate) ids: Ids,
    /// Whether it has the terminal for itself.
    pub(crate) has_terminal: bool,
    /// Paths at which the pod is to find nothing.
    pub(crate) hidden: Vec<PathBuf>,
    /// Where its output goes, if that is not ours.
    pub(crate) output: Option<PipeWriter>,
}

impl InitSettings {
    /// Those of a pod that is made to see whether one can be.
    pub(crate) fn without_command() -> Self {
        Self {
            command: Vec::new(),
            environment: Environment::default(),
            ids: Ids::of_pod(false),
            has_terminal: false,
            hidden: Vec::new(),
            output: None,
        }
    }
}

/// Messages to the first process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// To start the command, in the pod that was attached so.
    Begin(Box<Attached>),
    /// To send a signal to the command.
    Signal(i32),
    /// To have it go on, and with the terminal.
    GoOn { has_terminal: bool },
}

/// What the first process says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// The namespaces are made; and once more when the command has begun.
    Done,
    /// The command cannot be started, with the system's number of the error.
    NoCommand(i32),
    Failed(String),
    /// The command has been stopped by this signal.
    Stopped(i32),
}

/// Either end of the socket between the two.
pub(super) fn connect(socket: OwnedFd) -> Result<Connection> {
    let socket = UnixSeqpacket::try_from(socket);
    socket.map(Connection::new).context("cannot use a socket")
}
