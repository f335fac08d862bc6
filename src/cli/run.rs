//! `muslin run`: a command in a namespace of its own, attached to a node for as long as it runs.
//!
//! The process itself moves into the namespaces and stays beside the command: it keeps the device,
//! and when the node is gone it attaches it to the node's successor.
//!
//! A pod is not a jail: its command runs as this user, with this user's files, and so is trusted
//! with the node as all of the user's processes are.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::Path;

use clap::Args;
use muslin_stack::ipam::PodName;

use super::{NodeChoice, block_on, die_with_parent, output};
use crate::attach::{self, Device, Signals};
use crate::confine::{self, Capability};
use crate::control::Client;
use crate::control::protocol::{Attach, Attached, Namespace};
use crate::detached;
use crate::device::Tap;
use crate::error::{Context, Error, Result};
use crate::netns::{self, Resolution};
use crate::publish::{Ports, Published};

/// The interface inside.
const INTERFACE: &str = "eth0";
/// What the process leaves for fresh ones, in the order in which others can enter them.
const NAMESPACES: [Namespace; 4] = [
    Namespace::User,
    Namespace::Mount,
    Namespace::Net,
    Namespace::Uts,
];

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
    /// Return when the command runs, and print the pod's name: 'muslin logs' has what it writes,
    /// 'muslin stop' ends it
    #[arg(short, long, conflicts_with = "die_with_parent")]
    detach: bool,
    /// Be the process beside a detached pod's command
    #[arg(long, hide = true, requires = "detach")]
    beside: bool,
    /// End with the process that started it
    #[arg(long, hide = true)]
    die_with_parent: bool,
    /// The command, and all that follows is its own; it finds MUSLIN_POD, MUSLIN_NODE and
    /// MUSLIN_ADDRESS in its environment [default: $SHELL]
    #[arg(trailing_var_arg = true, value_name = "CMD")]
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
    /// Tell by stdin whether the command has begun
    #[arg(long)]
    reports: bool,
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Becomes the command, in a process that is killed when `muslin run` is.
pub(super) fn guard(arguments: &GuardArguments) -> Result<()> {
    let guard = || attach::guard(arguments.parent, &arguments.command);
    Err(if arguments.reports {
        detached::report_start(guard)
    } else {
        guard()
    })
}

pub(super) fn run(arguments: Arguments) -> Result<()> {
    if arguments.die_with_parent {
        die_with_parent()?;
    }
    if arguments.detach {
        if arguments.command.is_empty() {
            return Err(Error::usage("name the command that is to run detached"));
        }
        if !arguments.beside {
            let words = std::env::args_os().skip(2);
            let flags = ["run", "--beside"].map(OsString::from);
            return output::print(&detached::launch(flags.into_iter().chain(words))?);
        }
        detached::leave_terminal()?;
    }
    let socket = std::path::absolute(arguments.node.socket()?).context("the node's socket")?;
    // A node that is not there is told before anything else happens.
    let queues = block_on(attach::queues(&socket))?;
    netns::enter_fresh()?;
    let tap = Tap::open(INTERFACE, !arguments.no_offload, queues).map_err(Error::failed)?;
    let device = Device::tap(&tap).with_namespaces(&NAMESPACES)?;
    block_on(async {
        let (client, attached) = attach_first(&socket, &arguments, &device).await?;
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
        confine::keep_to_itself()?;
        confine::try_all(&[|| confine::hold_only(&[Capability::CAP_NET_ADMIN])]);
        let signals = Signals::listen()?;
        let state_dir = arguments.node.state_dir();
        let ran = attached.clone();
        let command = async {
            if arguments.detach {
                return detached::run(&state_dir, arguments.command, &ran, signals).await;
            }
            let child = attach::start(arguments.command, &ran, &[])?;
            attach::exit_code(attach::wait(child, signals).await?)
        };
        let follow = async |attached: &Attached| {
            netns::configure(INTERFACE, &attach::assignment(attached)).await
        };
        let resize = async |attached: &Attached| netns::set_link(INTERFACE, attached.link).await;
        let stays = attach::stay_attached(client, &socket, &device, attached, follow, resize);
        tokio::select! {
            result = command => result,
            never = stays => match never {},
        }
    })
}

async fn attach_first(
    socket: &Path,
    arguments: &Arguments,
    device: &Device<'_>,
) -> Result<(Client, Attached)> {
    let client = Client::connect(socket).await?;
    let request = Attach {
        pod: arguments.name.clone(),
        address: arguments.ip,
        persistent: false,
        publish: arguments.publish.ports(),
    };
    let attached = device.attach(&client, request).await?;
    netns::configure(INTERFACE, &attach::assignment(&attached)).await?;
    Ok((client, attached))
}
