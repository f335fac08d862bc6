//! A pod's command: what it is given, how a process becomes it, and what its end means.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::ExitStatus;

use muslin_stack::addresses::Addresses;
use muslin_stack::control::ipam::PodName;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

use crate::error::{Error, Result};

/// What a pod's command finds in its environment.
pub(crate) fn variables(
    pod: &PodName,
    node: &str,
    addresses: Addresses,
) -> [(&'static str, String); 3] {
    [
        ("MUSLIN_POD", pod.to_string()),
        ("MUSLIN_NODE", node.to_owned()),
        ("MUSLIN_ADDRESS", addresses.to_string()),
    ]
}

/// The given command, or else the user's shell.
pub(crate) fn or_shell(command: Vec<OsString>) -> Vec<OsString> {
    if command.is_empty() {
        vec![std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into())]
    } else {
        command
    }
}

/// Becomes the command, in a process that is killed when its parent is: without that it would live
/// on without a network. Returns if it cannot.
pub(crate) fn guard(parent: i32, command: &[OsString]) -> Error {
    if let Err(error) = set_pdeathsig(Signal::SIGKILL) {
        return Error::failed(format!("cannot watch the parent process: {error}"));
    }
    if getppid() != Pid::from_raw(parent) {
        return Error::Command(128 + Signal::SIGKILL as u8);
    }
    become_command(command, &Environment::default(), &[])
}

/// Where systemd has the secrets of a service (systemd.exec(5), LoadCredential).
pub(crate) const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// Variables in which a node or a sidecar is told secrets, or where they are. They are not the
/// command's.
const SECRETS: [&str; 4] = [
    "MUSLIN_ETCD_PASSWORD",
    "FLANNELD_ETCD_PASSWORD",
    "MUSLIN_PROXY_AUTH",
    CREDENTIALS,
];
/// Variables without which programs are not found, or do not know their terminal and user's files.
const KEPT: [&str; 3] = ["HOME", "PATH", "TERM"];

/// What a command has of this process' environment.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Environment {
    /// Whether it has hardly anything of it, and not all but our secrets.
    pub(crate) is_clear: bool,
    /// What it has in any case.
    pub(crate) more: Vec<(OsString, OsString)>,
}

/// A command with such an environment, to which these variables belong.
///
/// # Errors
/// If there are no words.
pub(crate) fn command(
    words: &[OsString],
    environment: &Environment,
    variables: &[(&str, String)],
) -> Result<std::process::Command> {
    let Some((program, rest)) = words.split_first() else {
        return Err(Error::usage("there is no command to run"));
    };
    let mut command = std::process::Command::new(program);
    command.args(rest);
    if environment.is_clear {
        command.env_clear();
        let kept = KEPT
            .iter()
            .filter_map(|name| Some((name, std::env::var_os(name)?)));
        command.envs(kept);
    } else {
        for secret in SECRETS {
            command.env_remove(secret);
        }
    }
    command
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .envs(environment.more.iter().map(|(name, value)| (name, value)));
    Ok(command)
}

/// Has this process go on as the command. Returns if it cannot.
pub(crate) fn become_command(
    words: &[OsString],
    environment: &Environment,
    variables: &[(&str, String)],
) -> Error {
    match command(words, environment, variables) {
        Ok(mut command) => Error::Start {
            program: command.get_program().display().to_string(),
            error: command.exec(),
        },
        Err(error) => error,
    }
}

/// The result of this process when its command has ended so: the command's exit code, or 128 and
/// the number of the signal that ended it.
///
/// # Errors
/// Any exit code but 0.
pub(crate) fn exit_code(status: ExitStatus) -> Result<()> {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    result_of(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// The result of this process when its command has ended with this exit code.
///
/// # Errors
/// Any but 0.
pub(crate) fn result_of(code: u8) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(Error::Command(code)),
    }
}
