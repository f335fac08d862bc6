//! `muslin run`: a command in namespaces of its own, attached to a node for as long as it runs.
//!
//! The process itself stays beside the pod: it keeps the device, and when the node is gone it attaches
//! it to the node's successor.
//!
//! A pod is not a jail: its command runs as this user, with this user's files.

use std::ffi::{OsStr, OsString};
use std::io::{self, PipeReader, PipeWriter};
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use clap::Args;
use muslin_stack::addresses::Addresses;
use muslin_stack::api::control::{Attach, Attached};
use muslin_stack::api::published::{PortMapping, Ports};
use muslin_stack::control::ipam::PodName;

use super::NodeChoice;
use crate::attach::{self, Device, Environment, Signals};
use crate::confine::{self, Capability};
use crate::control::Client;
use crate::detached;
use crate::device::Tap;
use crate::error::{Context, Error, Result};
use crate::init::{self, Init};
use crate::netns::{self, Ids};
use crate::process::{block_on, die_with_parent};
use crate::state;
use crate::terminal::job;
use crate::terminal::output;

/// The interface inside the pod.
const INTERFACE: &str = "eth0";

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    #[command(flatten)]
    ip: AddressArguments,
    /// The pod's name and host name [default: pod-1, pod-2 ...]
    #[arg(long)]
    name: Option<PodName>,
    #[command(flatten)]
    publish: PublishArguments,
    /// Make a plain TAP device: no GSO packets, complete checksums
    #[arg(long)]
    no_offload: bool,
    /// Keep your user and group in the pod, without capabilities [default: root in the pod]
    #[arg(long)]
    user: bool,
    #[command(flatten)]
    environment: EnvironmentArguments,
    /// Return once the command runs, and print the pod's name: 'muslin logs' shows its output,
    /// 'muslin stop' stops it
    #[arg(short, long, conflicts_with = "die_with_parent")]
    detach: bool,
    /// Be the process beside a detached pod's command
    #[arg(long, hide = true, requires = "detach")]
    beside: bool,
    /// End with the process that started it
    #[arg(long, hide = true)]
    die_with_parent: bool,
    /// The command and its arguments; MUSLIN_POD, MUSLIN_NODE and MUSLIN_ADDRESS are set in its
    /// environment [default: $SHELL]
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// A command's environment.
#[derive(Debug, Args)]
pub(super) struct EnvironmentArguments {
    /// Pass only HOME, PATH and TERM of your environment to the command
    #[arg(long)]
    clear_env: bool,
    /// Set a variable of the command; without a value it has that of your environment, which other users
    /// cannot see on the command line; may be given several times
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = variable)]
    env: Vec<OsString>,
}

impl EnvironmentArguments {
    pub(super) fn environment(&self) -> Environment {
        let split = |word: &OsString| {
            let bytes = word.as_bytes();
            let Some(at) = bytes.iter().position(|byte| *byte == b'=') else {
                return Some((word.clone(), std::env::var_os(word)?));
            };
            let [name, value] = [&bytes[..at], &bytes[at + 1..]].map(OsStr::from_bytes);
            Some((name.to_owned(), value.to_owned()))
        };
        Environment {
            is_clear: self.clear_env,
            more: self.env.iter().filter_map(split).collect(),
        }
    }
}

/// The addresses of a pod.
#[derive(Debug, Args)]
pub(super) struct AddressArguments {
    /// The pod's address, or one of each IP version [default: what it had before, or a free one]
    #[arg(long, value_name = "ADDRESS[,ADDRESS]", value_delimiter = ',')]
    ip: Vec<IpAddr>,
}

impl AddressArguments {
    /// One of each IP version at most, if there are any.
    ///
    /// # Errors
    /// If there are two of one.
    pub(super) fn addresses(&self) -> Result<Option<Addresses>> {
        let count = |is_ipv4| self.ip.iter().filter(|it| it.is_ipv4() == is_ipv4).count();
        match count(true) > 1 || count(false) > 1 {
            true => Err(Error::usage(
                "--ip: a pod has one address of each IP version at most",
            )),
            false => Ok(Addresses::collect(self.ip.iter().copied())),
        }
    }
}

/// The published ports of a pod.
#[derive(Debug, Args)]
pub(super) struct PublishArguments {
    /// Publish a port of the pod as a port of this machine, on all its addresses if none is given; may be
    /// given several times. Ports may be ranges like 8000-8009, and for host port 0 the node chooses one.
    /// With +proxy each TCP connection begins with a PROXY protocol header (version 2) that names the client
    #[arg(
        short,
        long,
        value_name = "[ADDRESS:]HOST:POD[/tcp|/udp][+proxy]",
        value_delimiter = ','
    )]
    publish: Vec<Ports>,
}

impl PublishArguments {
    pub(super) fn ports(&self) -> Vec<PortMapping> {
        Ports::all(&self.publish)
    }
}

#[derive(Debug, Args)]
pub(super) struct GuardArguments {
    /// The process that must not die before
    parent: i32,
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Becomes the command, in a process that is killed when its parent is.
pub(super) fn guard(arguments: &GuardArguments) -> Result<()> {
    Err(attach::guard(arguments.parent, &arguments.command))
}

pub(super) fn run(arguments: Arguments) -> Result<()> {
    if arguments.die_with_parent {
        die_with_parent()?;
    }
    if arguments.detach {
        if arguments.command.is_empty() {
            return Err(Error::usage("name the command to run detached"));
        }
        if !arguments.beside {
            let words = std::env::args_os().skip(2);
            let flags = ["run", "--beside"].map(OsString::from);
            return output::print(&detached::launch(flags.into_iter().chain(words))?);
        }
        detached::leave_terminal()?;
    }
    let socket = std::path::absolute(arguments.node.socket()?).context("the node's socket")?;
    let (log, output) = match arguments.detach {
        true => io::pipe().map(|(log, output)| (Some(log), Some(output))),
        false => Ok((None, None)),
    }
    .context("cannot make a pipe")?;
    let has_terminal = job::is_used();
    let starting = init::start(arguments.settings(&socket, has_terminal, output))?;
    block_on(async {
        // A missing node is reported before anything else.
        let queues = attach::queues(&socket).await?;
        let (init, namespaces) = starting.ready().await?;
        let tap = Tap::create(INTERFACE, !arguments.no_offload, queues).map_err(Error::failed)?;
        let device = Device::tap(&tap).with_namespaces(namespaces);
        let (client, attached) = attach_first(&socket, &arguments, &device).await?;
        // The command must not take the device out of this process (pidfd_getfd(2)).
        confine::keep_to_itself()?;
        confine::try_all(&[|| confine::hold_only(&[Capability::CAP_NET_ADMIN])]);
        let follow = async |attached: &Attached| {
            netns::configure(INTERFACE, &attach::assignment(attached)).await
        };
        let resize = async |attached: &Attached| {
            netns::set_link(INTERFACE, &attach::assignment(attached)).await
        };
        let command = arguments.attend(&init, has_terminal, attached.clone(), log);
        let stays = attach::stay_attached(client, &socket, &device, attached, follow, resize);
        tokio::select! {
            result = command => result,
            never = stays => match never {},
        }
    })
}

impl Arguments {
    fn settings(
        &self,
        socket: &Path,
        has_terminal: bool,
        output: Option<PipeWriter>,
    ) -> init::InitSettings {
        init::InitSettings {
            command: self.command.clone(),
            environment: self.environment.environment(),
            ids: Ids::of_pod(self.user),
            has_terminal,
            hidden: vec![
                state::directory_of(socket),
                self.node.state_dir(),
                state::default_dir(),
            ],
            output,
        }
    }

    /// Runs the command to its end.
    async fn attend(
        &self,
        init: &Init,
        has_terminal: bool,
        attached: Attached,
        log: Option<PipeReader>,
    ) -> Result<()> {
        let signals = Signals::listen()?;
        if let Some(log) = log {
            return detached::run(&self.node.state_dir(), init, &attached, log, signals).await;
        }
        init.begin(&attached).await?;
        attach::result_of(job::attend(init, has_terminal, signals).await?)
    }
}

async fn attach_first(
    socket: &Path,
    arguments: &Arguments,
    device: &Device<'_>,
) -> Result<(Client, Attached)> {
    let client = Client::connect(socket).await?;
    let mut request = Attach::new(arguments.name.clone(), arguments.ip.addresses()?);
    request.publish = arguments.publish.ports();
    let attached = device.attach(&client, request).await?;
    netns::configure(INTERFACE, &attach::assignment(&attached)).await?;
    Ok((client, attached))
}

/// Checks that a variable has a name.
fn variable(text: &str) -> std::result::Result<OsString, &'static str> {
    match text.starts_with('=') || text.is_empty() {
        true => Err("write NAME or NAME=VALUE"),
        false => Ok(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_has_its_value_or_that_of_the_environment() {
        let of = |words: &[&str]| {
            let env = words.iter().map(|word| variable(word).unwrap()).collect();
            let arguments = EnvironmentArguments {
                clear_env: false,
                env,
            };
            arguments.environment().more
        };
        let pair = |name: &str, value: &str| (OsString::from(name), OsString::from(value));
        assert_eq!(
            of(&["A=", "B=x=y", "MUSLIN_TEST_NOWHERE"]),
            [pair("A", ""), pair("B", "x=y")]
        );
        let path = std::env::var_os("PATH").unwrap();
        assert_eq!(of(&["PATH"]), [(OsString::from("PATH"), path)]);
        for bad in ["", "=", "=x"] {
            assert!(variable(bad).is_err(), "{bad}");
        }
    }
}
