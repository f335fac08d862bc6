//! `muslin run`: a command in a namespace of its own, attached to a node for as long as it runs.
//!
//! The process itself moves into the namespaces and stays beside the command: it keeps the device,
//! and when the node is gone it attaches it to the node's successor.
//!
//! A pod is not a jail: its command runs as this user, with this user's files, and so is trusted
//! with the node as all of the user's processes are.

use std::ffi::OsString;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use clap::Args;
use muslin_stack::ipam::PodName;
use nix::sys::prctl::{set_dumpable, set_pdeathsig};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use tokio::process::{Child, Command};
use tracing::{info, warn};

use super::{Listener, NodeChoice, block_on, complain, die_with_parent};
use crate::control::Client;
use crate::control::protocol::{Attach, Attached, Status, Table};
use crate::device::Tap;
use crate::error::{Context, Error, Result};
use crate::netns::{self, Assignment, Resolution};
use crate::publish::{Ports, Published};

/// The interface inside.
const INTERFACE: &str = "eth0";
/// How often a node that is gone is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How long to wait after a node has refused.
const ASK_AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    /// The pod's address [default: the one it had before, or a free one]
    #[arg(long)]
    ip: Option<Ipv4Addr>,
    /// The pod's name and host name [default: pod-1, pod-2 ...]
    #[arg(long)]
    name: Option<PodName>,
    #[command(flatten)]
    publish: PublishArguments,
    /// Make the plain TAP device: one packet per frame, checksums finished
    #[arg(long)]
    no_offload: bool,
    /// End with the process that started it
    #[arg(long, hide = true)]
    die_with_parent: bool,
    /// The command; it finds MUSLIN_POD, MUSLIN_NODE and MUSLIN_ADDRESS in its environment
    /// [default: $SHELL]
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Which ports of this machine lead to a pod.
#[derive(Debug, Args)]
pub(super) struct PublishArguments {
    /// Lead a port of this machine to one of the pod, on all its addresses if none is given; may be
    /// given several times. Ports may be ranges like 8000-8009, and 0 has the node choose one. With
    /// +proxy a TCP connection begins with a PROXY protocol header (version 2) that tells its client
    #[arg(
        short,
        long,
        value_name = "[ADDRESS:]HOST:POD[/tcp|/udp][+proxy]",
        value_delimiter = ','
    )]
    publish: Vec<Ports>,
}

impl PublishArguments {
    pub(super) fn ports(&self) -> Vec<Published> {
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

/// Becomes the command, in a process that is killed when `muslin run` is: without it the command
/// would live on without a network.
pub(super) fn guard(arguments: GuardArguments) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("cannot watch the parent process")?;
    if getppid() != Pid::from_raw(arguments.parent) {
        return Err(Error::Command(128 + Signal::SIGKILL as u8));
    }
    let Some((program, rest)) = arguments.command.split_first() else {
        return Err(Error::usage("there is no command to run"));
    };
    let error = std::process::Command::new(program).args(rest).exec();
    complain(&format_args!("cannot run {}: {error}", program.display()));
    // The codes that shells use, so that scripts can tell them from the command's own.
    let not_found = error.kind() == io::ErrorKind::NotFound;
    Err(Error::Command(if not_found { 127 } else { 126 }))
}

pub(super) fn run(arguments: Arguments) -> Result<()> {
    if arguments.die_with_parent {
        die_with_parent()?;
    }
    let socket = std::path::absolute(arguments.node.socket()?).context("the node's socket")?;
    // A node that is not there is told before anything else happens.
    let queues = block_on(queues(&socket))?;
    netns::enter_fresh()?;
    let tap = Tap::open(INTERFACE, !arguments.no_offload, queues).map_err(Error::failed)?;
    block_on(async {
        let (client, attached) = attach_first(&socket, &arguments, &tap).await?;
        netns::give_files(
            attached.pod.as_str(),
            attached.address.addr(),
            &Resolution {
                resolvers: &attached.dns,
                search: &attached.search,
                options: &attached.dns_options,
            },
        )?;
        // The command must not take the device out of this process (pidfd_getfd(2)).
        set_dumpable(false).context("cannot protect this process")?;
        let signals = Signals::listen()?;
        let child = start(&arguments.command, &attached, &[])?;
        let pod = Pod {
            socket,
            tap,
            attached,
        };
        let status = tokio::select! {
            status = attend(child, signals) => status?,
            never = pod.stay_attached(client) => match never {},
        };
        match exit_code(status) {
            0 => Ok(()),
            code => Err(Error::Command(code)),
        }
    })
}

/// Queues that a pod's device is to have: one for each worker of the node.
pub(super) async fn queues(socket: &Path) -> Result<usize> {
    let client = Client::connect(socket).await?;
    let status = client.report::<Status>(Table::Status).await?;
    Ok(status.first().map_or(1, |status| status.workers))
}

/// What the node is given of a device.
pub(super) fn descriptors(tap: &[Tap]) -> Vec<BorrowedFd<'_>> {
    tap.iter().map(AsFd::as_fd).collect()
}

async fn attach_first(
    socket: &Path,
    arguments: &Arguments,
    tap: &[Tap],
) -> Result<(Client, Attached)> {
    let client = Client::connect(socket).await?;
    let request = Attach {
        pod: arguments.name.clone(),
        address: arguments.ip,
        persistent: false,
        publish: arguments.publish.ports(),
    };
    let attached = client.attach(request, &descriptors(tap)).await?;
    netns::configure(INTERFACE, &assignment(&attached)).await?;
    Ok((client, attached))
}

/// What a node's answer means for the interface.
pub(super) fn assignment(attached: &Attached) -> Assignment {
    Assignment {
        address: attached.address,
        gateway: attached.gateway,
        mtu: attached.mtu,
        gso_max_segs: attached.gso_max_segs,
        routes: attached.routes.clone(),
    }
}

/// Starts a pod's command, with what it finds in its environment.
pub(super) fn start(
    command: &[OsString],
    attached: &Attached,
    variables: &[(&str, String)],
) -> Result<Child> {
    let shell = [std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into())];
    let command = if command.is_empty() { &shell } else { command };
    // This program by what it is, not by a path that may name another one by now.
    let started = Command::new("/proc/self/exe")
        .args(["guard", &std::process::id().to_string(), "--"])
        .args(command)
        .env("MUSLIN_POD", attached.pod.as_str())
        .env("MUSLIN_NODE", &attached.node)
        .env("MUSLIN_ADDRESS", attached.address.addr().to_string())
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .kill_on_drop(true)
        .spawn();
    started.context("cannot start the command")
}

/// What would end this process and leave the command behind.
pub(super) struct Signals {
    terminate: Listener,
    hangup: Listener,
    interrupt: Listener,
    quit: Listener,
}

impl Signals {
    /// Returns when one of them asks this process to end.
    pub(super) async fn heard(&mut self) {
        tokio::select! {
            () = self.terminate.heard() => {}
            () = self.hangup.heard() => {}
            () = self.interrupt.heard() => {}
            () = self.quit.heard() => {}
        }
    }

    /// Listens. To be called before the command starts: from then on somebody may ask it to end.
    pub(super) fn listen() -> Result<Self> {
        Ok(Self {
            terminate: Listener::new(Signal::SIGTERM)?,
            hangup: Listener::new(Signal::SIGHUP)?,
            interrupt: Listener::new(Signal::SIGINT)?,
            quit: Listener::new(Signal::SIGQUIT)?,
        })
    }
}

/// Waits for the command, and passes on what asks it to end. An interrupt from the terminal
/// reaches the command by itself.
pub(super) async fn attend(mut child: Child, mut signals: Signals) -> Result<ExitStatus> {
    loop {
        let pass_on = tokio::select! {
            status = child.wait() => return status.context("cannot wait for the command"),
            () = signals.terminate.heard() => Signal::SIGTERM,
            () = signals.hangup.heard() => Signal::SIGHUP,
            () = signals.interrupt.heard() => continue,
            () = signals.quit.heard() => continue,
        };
        if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok()) {
            // It may have ended this moment.
            let _ = kill(Pid::from_raw(id), pass_on);
        }
    }
}

/// The code that this process ends with when its command has ended so.
pub(super) fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// A pod that is attached.
struct Pod {
    socket: PathBuf,
    tap: Vec<Tap>,
    attached: Attached,
}

impl Pod {
    /// Attaches the device again whenever the node is gone and comes back.
    async fn stay_attached(mut self, mut client: Client) -> std::convert::Infallible {
        loop {
            client.closed().await;
            info!("the node is gone; waiting for its successor");
            client = self.reattach().await;
        }
    }

    async fn reattach(&mut self) -> Client {
        let mut told = String::new();
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            let Ok(client) = Client::connect(&self.socket).await else {
                continue;
            };
            match self.attach_again(&client).await {
                Ok(()) => return client,
                Err(error) => {
                    let text = error.to_string();
                    if text != told {
                        warn!("the node does not take the pod back: {text}");
                        told = text;
                    }
                    tokio::time::sleep(ASK_AGAIN).await;
                }
            }
        }
    }

    async fn attach_again(&mut self, client: &Client) -> Result<()> {
        let attached = attach_again(client, &descriptors(&self.tap), &self.attached).await?;
        if attached != self.attached {
            warn!("the pod's address is {} now", attached.address);
            netns::configure(INTERFACE, &assignment(&attached)).await?;
            self.attached = attached;
        }
        Ok(())
    }
}

/// Asks for what a pod had; a node that has another subnet now gives another address.
pub(super) async fn attach_again(
    client: &Client,
    device: &[BorrowedFd<'_>],
    attached: &Attached,
) -> Result<Attached> {
    let request = |address| Attach {
        pod: Some(attached.pod.clone()),
        address,
        persistent: false,
        publish: attached.published.clone(),
    };
    let same = client
        .attach(request(Some(attached.address.addr())), device)
        .await;
    match same {
        Err(Error::Usage(_)) => client.attach(request(None), device).await,
        other => other,
    }
}
