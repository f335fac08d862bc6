//! `muslin attach` and `muslin detach`: namespaces that somebody else made.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::Args;
use muslin_stack::ipam::PodName;

use super::run::PublishArguments;
use super::{NodeChoice, block_on, output};
use crate::attach::{Device, assignment, queues};
use crate::confine::{self, Capability};
use crate::control::Client;
use crate::control::protocol::{Attach, Namespace, Request};
use crate::device::{OpenError, Tap};
use crate::error::{Context, Error, Result};
use crate::netns::{self, Target};

#[derive(Debug, Args)]
pub(super) struct AttachArguments {
    #[command(flatten)]
    node: NodeChoice,
    #[command(flatten)]
    target: TargetArguments,
    /// The pod's address [default: the one it had before, or a free one]
    #[arg(long)]
    ip: Option<Ipv4Addr>,
    /// The pod's name [default: pod-1, pod-2 ...]
    #[arg(long)]
    name: Option<PodName>,
    /// The interface to make in the namespace
    #[arg(long, value_name = "NAME", default_value = "eth0", value_parser = interface_name)]
    ifname: String,
    /// Make the plain TAP device: one packet per frame, checksums finished
    #[arg(long)]
    no_offload: bool,
    #[command(flatten)]
    publish: PublishArguments,
    /// Print what the pod was given as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct TargetArguments {
    /// A process whose network namespace it is
    #[arg(long)]
    pid: Option<u32>,
    /// A file that stands for it, like /run/netns/x
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct DetachArguments {
    #[command(flatten)]
    node: NodeChoice,
    /// The pod's name
    pod: PodName,
}

pub(super) fn attach(arguments: AttachArguments) -> Result<()> {
    let socket = std::path::absolute(arguments.node.socket()?).context("the node's socket")?;
    let queues = block_on(queues(&socket))?;
    let target = match (arguments.target.pid, arguments.target.netns) {
        (Some(pid), _) => Target::Process(pid),
        (None, Some(path)) => Target::File(path),
        (None, None) => return Err(Error::usage("name a namespace with --pid or --netns")),
    };
    // Who is user 0 there must not take the device, or the connection to the node, out of this process.
    confine::keep_to_itself()?;
    confine::try_all(&[confine::leave_no_core]);
    netns::enter(&target)?;
    let tap = Tap::open(&arguments.ifname, !arguments.no_offload, queues);
    let tap = tap.map_err(|error| match error {
        OpenError::Exists(name) => Error::failed(format!(
            "an interface '{name}' is in that network namespace already: choose another name with \
             --ifname"
        )),
        error => Error::failed(error),
    })?;
    confine::try_all(&[|| confine::keep_only(&[Capability::CAP_NET_ADMIN])]);
    let device = Device::tap(&tap).with_namespaces(&[Namespace::User, Namespace::Net])?;
    block_on(async {
        let client = Client::connect(&socket).await?;
        let request = Attach {
            pod: arguments.name,
            address: arguments.ip,
            persistent: true,
            publish: arguments.publish.ports(),
        };
        let attached = device.attach(&client, request).await?;
        let configured = netns::configure(&arguments.ifname, &assignment(&attached)).await;
        if let Err(error) = configured {
            let pod = attached.pod.clone();
            // Why it cannot be detached either says less than why that is to be done.
            let _ = client.command(&Request::Detach { pod }).await;
            return Err(error);
        }
        if arguments.json {
            output::print_json(&attached)
        } else {
            let mut text = format!("{} has {}\n", attached.pod, attached.address);
            for port in &attached.published {
                text += &format!("{port}\n");
            }
            output::print(&text)
        }
    })
}

pub(super) fn detach(arguments: DetachArguments) -> Result<()> {
    let socket = arguments.node.socket()?;
    block_on(async {
        let client = Client::connect(&socket).await?;
        client
            .command(&Request::Detach { pod: arguments.pod })
            .await
    })
}

/// Checks a name as the kernel does (`dev_valid_name`).
fn interface_name(text: &str) -> std::result::Result<String, &'static str> {
    let fits = !text.is_empty() && text.len() < nix::libc::IFNAMSIZ;
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    if fits && text != "." && text != ".." && text.bytes().all(plain) {
        Ok(text.to_owned())
    } else {
        Err("an interface's name has 1 to 15 letters and no '/', ':' or '%'")
    }
}
