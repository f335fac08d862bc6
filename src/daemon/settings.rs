//! A node's settings.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::Format;
use muslin_encap::tunnel::wireguard::PublicKey;
use muslin_stack::control::lease::{WantedConfig, WireGuardOptions};
use muslin_stack::datapath::wireguard::{self, Devices, WireGuardConfig};
use muslin_stack::secret::Secret;

use crate::host;
use crate::store;
use crate::underlay::{InterfaceChoice, Options, UplinkKind};

/// A node's settings.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    /// Its name, different from those of others on the machine.
    pub name: String,
    /// Where it keeps its state.
    pub state_dir: PathBuf,
    /// Where it listens for commands, if not in its state directory.
    pub socket: Option<PathBuf>,
    /// Where leases are: `sqlite:PATH`, `file:PATH` or `etcd://HOST:PORT`.
    pub store: OsString,
    /// How it proves to etcd who it is.
    pub etcd: store::EtcdOptions,
    /// What the store's keys begin with, without a trailing slash.
    pub prefix: String,
    /// Where its tunnel ends.
    pub underlay: InterfaceChoice,
    /// How it reaches its link below IP, where it has to.
    pub uplink: UplinkKind,
    /// Which network it is to be.
    pub wanted_config: WantedConfig,
    /// MTU of the underlay, if not that of the interface.
    pub mtu: Option<Mtu>,
    /// Resolvers for the pods' queries; the host's if empty.
    pub dns: Vec<IpAddr>,
    /// Whether pods may send only from their own addresses.
    pub guard_pods: bool,
    /// Whether TCP connections with other nodes' pods begin with an MSS that the path takes.
    pub clamp_mss: bool,
    /// Whether it follows groups: only pods that have joined one get what is for it, those of other nodes
    /// included.
    pub multicast: bool,
    /// Whether peers may send only from the addresses of their leases.
    pub guard_peers: bool,
    /// How long before its end a lease is renewed.
    pub renew_margin: Duration,
    /// Where flannel's tools find the subnet, if not in its state directory.
    pub subnet_file: Option<PathBuf>,
    /// Whether the subnet file claims that the node masquerades.
    pub ip_masq: bool,
    /// What pods may reach outside the pod network, if anything.
    pub egress: Option<host::EgressSettings>,
    /// Threads that move packets.
    pub workers: usize,
    /// Whether the user has named that number.
    pub has_named_workers: bool,
    /// Where its private key is, which a network of WireGuard needs, if not in its state directory.
    pub wireguard_key_file: Option<PathBuf>,
    /// Which of the kernel's offloads it uses.
    pub offload: Offload,
    /// The interface by which the host and pods reach each other, if it is to be used.
    pub host_interface: Option<String>,
    /// Where a keeper listens that holds pods' devices while there is no node.
    pub keeper: Option<PathBuf>,
    /// Whether it takes over the node that runs with this socket, if one does.
    pub take_over: bool,
    /// The address that serves the health checks.
    pub health: Option<SocketAddr>,
    /// The address that serves the metrics.
    pub metrics: Option<SocketAddr>,
    /// The address that serves the page.
    pub admin: Option<SocketAddr>,
    /// What is known to those nodes that may ask this one about packets, if any may.
    pub trace_secret: Option<TraceSecret>,
}

/// What a node of a network of WireGuard has beside its peers.
#[derive(Debug, Clone)]
pub struct WireGuardSettings {
    /// Its private key.
    pub private_key: Secret,
    /// What all pairs of nodes share, if they do.
    pub psk: Option<Secret>,
    /// How often a message is to keep a way through NAT open, if it is to.
    pub keepalive: Option<Duration>,
    /// Whether it has one device for both IP versions, as flannel calls it: one port, and one way to each
    /// peer.
    pub single: bool,
}

impl WireGuardSettings {
    /// Those of a node with this key in a network of these options.
    #[must_use]
    pub fn new(private_key: Secret, options: &WireGuardOptions) -> Self {
        let seconds = (options.keepalive != 0).then_some(options.keepalive);
        Self {
            private_key,
            psk: options.psk.clone(),
            keepalive: seconds.map(|seconds| Duration::from_secs(seconds.into())),
            single: options.mode.is_single(),
        }
    }

    /// What its data path has of that.
    pub(super) fn config(&self) -> WireGuardConfig {
        WireGuardConfig {
            private_key: self.private_key.clone(),
            preshared_key: self.psk.clone(),
            keepalive: self.keepalive.map(Into::into),
            devices: match self.single {
                true => Devices::One,
                false => Devices::Two,
            },
        }
    }

    /// The public key that other nodes know it by.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        wireguard::public_key(&self.private_key)
    }
}

/// A secret of nodes that ask each other about packets. It is not printed.
#[derive(Clone)]
pub struct TraceSecret(String);

impl TraceSecret {
    /// One with this text.
    #[must_use]
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl std::fmt::Debug for TraceSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TraceSecret")
    }
}

/// Which of the kernel's offloads a node uses, where the kernel has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offload {
    /// Superpackets and unfinished checksums from and to pods.
    pub tap: bool,
    /// Trains of datagrams to peers (`UDP_SEGMENT`).
    pub gso: bool,
    /// Trains of datagrams from peers (`UDP_GRO`).
    pub gro: bool,
}

impl Offload {
    /// What that means for a tunnel's sockets.
    #[must_use]
    pub const fn sockets(self, format: Format, source_ports: usize) -> Options {
        Options {
            format,
            source_ports,
            gso: self.gso,
            gro: self.gro,
        }
    }
}

impl std::fmt::Display for Offload {
    /// As the command line has it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all = [("tap", self.tap), ("gso", self.gso), ("gro", self.gro)];
        let names: Vec<_> = all
            .iter()
            .filter(|(_, is)| *is)
            .map(|(name, _)| *name)
            .collect();
        match names.as_slice() {
            [] => f.write_str("none"),
            names => f.write_str(&names.join(",")),
        }
    }
}

impl Default for Offload {
    fn default() -> Self {
        Self {
            tap: true,
            gso: true,
            gro: true,
        }
    }
}
