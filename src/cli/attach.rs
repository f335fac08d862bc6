//! `muslin attach` and `muslin detach`: namespaces made by other programs.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use clap::Args;
use muslin_stack::api::cni::NetworkNamespace;
use muslin_stack::api::control::{Attach, Namespace, PodInterface, Request};
use muslin_stack::control::ipam::PodName;
use nix::sys::stat::fstat;

use super::run::{AddressArguments, PublishArguments};
use super::{CLIENT, NodeChoice};
use crate::attach::{self, Device, InsideProcess};
use crate::confine;
use crate::control::Client;
use crate::error::{Context, Error, Result};
use crate::netns::Target;
use crate::process::block_on;
use crate::terminal::output;

#[derive(Debug, Args)]
pub(super) struct AttachArguments {
    #[command(flatten)]
    node: NodeChoice,
    #[command(flatten)]
    interface: InterfaceArguments,
    #[command(flatten)]
    ip: AddressArguments,
    /// The pod's name [default: pod-1, pod-2 ...]
    #[arg(long)]
    name: Option<PodName>,
    #[command(flatten)]
    publish: PublishArguments,
    /// Print the pod's configuration as JSON
    #[arg(long)]
    json: bool,
}

/// The interface to make, and where.
#[derive(Debug, Args)]
struct InterfaceArguments {
    #[command(flatten)]
    target: TargetArguments,
    /// The interface to make in the namespace
    #[arg(long, value_name = "NAME", default_value = "eth0", value_parser = interface_name)]
    ifname: String,
    /// Make a plain TAP device: no GSO packets, complete checksums
    #[arg(long)]
    no_offload: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct TargetArguments {
    /// A process in the network namespace
    #[arg(long)]
    pid: Option<u32>,
    /// A file that refers to the network namespace, like /run/netns/x
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

/// The arguments of the process in the namespace.
#[derive(Debug, Args)]
pub(super) struct InsideArguments {
    #[command(flatten)]
    interface: InterfaceArguments,
    /// Number of queues of the device
    #[arg(long)]
    queues: usize,
}

impl InterfaceArguments {
    /// Where the interface is, by the network namespace among those that it was made in.
    fn place(&self, namespaces: &[(Namespace, OwnedFd)]) -> Result<Option<PodInterface>> {
        let mut namespaces = namespaces.iter();
        let Some((_, netns)) = namespaces.find(|(kind, _)| *kind == Namespace::Net) else {
            return Ok(None);
        };
        let file = fstat(netns).map_err(Error::failed)?;
        let path = match (&self.target.pid, &self.target.netns) {
            (Some(pid), _) => format!("/proc/{pid}/ns/net"),
            (None, Some(path)) => {
                let path = std::path::absolute(path).context("the namespace")?;
                path.display().to_string()
            }
            (None, None) => return Ok(None),
        };
        Ok(Some(PodInterface {
            name: self.ifname.clone(),
            netns: NetworkNamespace {
                path,
                device: file.st_dev,
                inode: file.st_ino,
            },
        }))
    }

    /// The command that makes it, for the process in the namespace.
    fn words(&self, queues: usize) -> Vec<OsString> {
        let TargetArguments { pid, netns } = &self.target;
        let pid = pid.map(|pid| ("--pid", pid.to_string().into()));
        let netns = netns.as_ref().map(|path| ("--netns", path.into()));
        let flags = pid.into_iter().chain(netns).chain([
            ("--ifname", self.ifname.clone().into()),
            ("--queues", queues.to_string().into()),
        ]);
        let flags = flags.flat_map(|(flag, value): (_, OsString)| [flag.into(), value]);
        let plain = self.no_offload.then(|| "--no-offload".into());
        std::iter::once("attach-inside".into())
            .chain(flags)
            .chain(plain)
            .collect()
    }
}

pub(super) fn attach(arguments: AttachArguments) -> Result<()> {
    let socket = std::path::absolute(arguments.node.socket()?).context("the node's socket")?;
    confine::try_all(&[confine::keep_to_itself, confine::leave_no_core]);
    block_on(async {
        let queues = attach::queues(&socket).await?;
        let (inside, made) = InsideProcess::start(arguments.interface.words(queues)).await?;
        let interface = arguments.interface.place(&made.namespaces)?;
        confine::try_all(&[|| confine::keep_only(&CLIENT)]);
        let device = Device::tap(&made.queues).with_namespaces(made.namespaces);
        let client = Client::connect(&socket).await?;
        let mut request = Attach::new(arguments.name, arguments.ip.addresses()?);
        request.persistent = true;
        request.publish = arguments.publish.ports();
        request.interface = interface;
        let attached = device.attach(&client, request).await?;
        if let Err(error) = inside.configure(&attached).await {
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

/// Runs as the process in the namespace.
pub(super) fn inside(arguments: InsideArguments) -> Result<()> {
    confine::try_all(&[confine::close_inherited]);
    let InterfaceArguments {
        target,
        ifname,
        no_offload,
    } = arguments.interface;
    let target = match (target.pid, target.netns) {
        (Some(pid), _) => Target::Process(pid),
        (None, Some(path)) => Target::File(path),
        (None, None) => return Err(Error::usage("give a namespace with --pid or --netns")),
    };
    block_on(attach::serve(
        &target,
        &ifname,
        !no_offload,
        arguments.queues,
    ))
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
        Err("an interface name has 1 to 15 characters and no '/', ':' or '%'")
    }
}
