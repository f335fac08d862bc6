//! `muslin node`.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use ipnet::Ipv4Net;
use muslin_encap::overhead::Mtu;
use muslin_encap::udp;
use muslin_encap::vxlan::{self, Vni};
use muslin_stack::lease::{Backend, NetworkConfig, VxlanOptions, Wish};

use super::{StateChoice, block_on};
use crate::error::{Error, Result};
use crate::node::{self, Settings};
use crate::state;

/// Pods of a network that nobody described.
const NETWORK: &str = "10.244.0.0/16";

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Its name [default: this machine's host name]
    #[arg(long, env = "MUSLIN_NAME")]
    name: Option<String>,
    /// Where leases are: sqlite:PATH, file:PATH or etcd://HOST:PORT [default: a database in the
    /// state directory]
    #[arg(long, value_name = "URL", env = "MUSLIN_STORE")]
    store: Option<String>,
    /// The address other nodes send to [default: the one packets to the world leave from]
    #[arg(long, value_name = "IP", env = "MUSLIN_PUBLIC_IP")]
    public_ip: Option<Ipv4Addr>,
    /// The interface whose address that is
    #[arg(long, value_name = "NAME", env = "MUSLIN_IFACE")]
    iface: Option<String>,
    /// All pods of the cluster, where the store does not say it yet [default: 10.244.0.0/16]
    #[arg(long, value_name = "CIDR", env = "MUSLIN_NETWORK")]
    network: Option<Ipv4Net>,
    /// Prefix length of a node's subnet [default: 24, or two more than the network's]
    #[arg(long, value_name = "BITS", env = "MUSLIN_SUBNET_LEN")]
    subnet_len: Option<u8>,
    /// How packets travel between nodes [default: vxlan]
    #[arg(long, env = "MUSLIN_BACKEND")]
    backend: Option<BackendName>,
    /// VXLAN network identifier [default: 1]
    #[arg(long, env = "MUSLIN_VNI")]
    vni: Option<u32>,
    /// UDP port of every node's tunnel [default: 8472 for vxlan, 8285 for udp]
    #[arg(long, env = "MUSLIN_PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// MTU between the nodes in bytes; pods get it less the encapsulation [default: the interface's]
    #[arg(long, value_name = "BYTES", env = "MUSLIN_MTU")]
    mtu: Option<u32>,
    /// A resolver for pods, reachable from them; may be given several times
    #[arg(long, value_name = "IP")]
    dns: Vec<Ipv4Addr>,
    /// Let pods send from addresses that are not theirs
    #[arg(long)]
    no_pod_guard: bool,
    /// Take packets from addresses that hold no lease (tunnels through NAT)
    #[arg(long)]
    no_peer_guard: bool,
    /// Where to listen for commands [default: control.sock in the node's state directory]
    #[arg(long, value_name = "PATH", env = "MUSLIN_SOCKET")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    state: StateChoice,
    /// End with the process that started it
    #[arg(long, hide = true)]
    die_with_parent: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackendName {
    Vxlan,
    Udp,
}

pub(super) fn run(arguments: Arguments) -> Result<()> {
    if arguments.die_with_parent {
        let end = nix::sys::signal::Signal::SIGTERM;
        nix::sys::prctl::set_pdeathsig(end).map_err(Error::failed)?;
    }
    let state_dir = arguments.state.dir();
    let settings = Settings {
        name: match &arguments.name {
            Some(name) => state::node_name(name)?,
            None => state::default_node_name(),
        },
        store: arguments
            .store
            .clone()
            .unwrap_or_else(|| state::default_store(&state_dir)),
        state_dir,
        socket: arguments.socket.clone(),
        public_ip: arguments.public_ip,
        interface: arguments.iface.clone(),
        wish: arguments.wish()?,
        mtu: match arguments.mtu {
            Some(bytes) => Some(Mtu::new(bytes).map_err(Error::usage)?),
            None => None,
        },
        dns: arguments.dns.clone(),
        guard_pods: !arguments.no_pod_guard,
        guard_peers: !arguments.no_peer_guard,
    };
    block_on(node::run(settings))
}

impl Arguments {
    /// The network asked for, or the default one if nothing is asked for.
    fn wish(&self) -> Result<Wish> {
        let Self {
            network,
            subnet_len,
            backend,
            vni,
            port,
            ..
        } = self;
        let config = NetworkConfig::new(
            match network {
                Some(network) => *network,
                None => NETWORK.parse().map_err(Error::usage)?,
            },
            *subnet_len,
            self.backend()?,
        );
        let config = config.map_err(Error::usage)?;
        let asked = network.is_some() || subnet_len.is_some() || backend.is_some();
        if asked || vni.is_some() || port.is_some() {
            Ok(Wish::Exactly(config))
        } else {
            Ok(Wish::IfNone(config))
        }
    }

    fn backend(&self) -> Result<Backend> {
        match (self.backend.unwrap_or(BackendName::Vxlan), self.vni) {
            (BackendName::Vxlan, vni) => {
                let mut options = VxlanOptions {
                    port: self.port.unwrap_or(vxlan::PORT),
                    ..VxlanOptions::default()
                };
                if let Some(vni) = vni {
                    options.vni = Vni::new(vni).map_err(Error::usage)?;
                }
                Ok(Backend::Vxlan(options))
            }
            (BackendName::Udp, None) => Ok(Backend::Udp {
                port: self.port.unwrap_or(udp::PORT),
            }),
            (BackendName::Udp, Some(_)) => {
                Err(Error::usage("--vni goes with --backend vxlan only"))
            }
        }
    }
}
