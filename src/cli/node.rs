//! `muslin node`.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;

use clap::{Args, ValueEnum};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::udp;
use muslin_encap::tunnel::vxlan::{self, Vni};
use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::control::lease::{
    Backend, Ipv6Range, NetworkConfig, VxlanOptions, WantedConfig, WireGuardMode, WireGuardOptions,
};
use muslin_stack::datapath::egress::Nat64Prefix;
use tracing::warn;

use super::StateChoice;
use super::flannel;
use super::log;
use super::secret;
use crate::confine::{self, Capability, Places};
use crate::daemon::{self, NodeSettings, Offload, TraceSecret};
use crate::error::{Error, Result};
use crate::features::Feature;
use crate::host;
use crate::process::{block_on, die_with_parent};
use crate::state;
use crate::store;
use crate::underlay::UplinkKind;

/// The default pod network.
const NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);

/// Capabilities that a node may need: for unencapsulated packets and IPv4 in IPv4, and for published
/// ports below 1024.
pub(super) const CAPABILITIES: [Capability; 2] =
    [Capability::CAP_NET_RAW, Capability::CAP_NET_BIND_SERVICE];

/// An offload, or the word for having none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OffloadName {
    /// GSO packets and partial checksums from and to pods (virtio-net header)
    Tap,
    /// Segmented sends of datagrams to other nodes (UDP_SEGMENT)
    Gso,
    /// Coalesced receives of datagrams from other nodes (UDP_GRO)
    Gro,
    /// No offload
    None,
}

#[derive(Debug, Args)]
#[command(
    after_help = format!(
        "Each flag can also be set by a variable: --public-ip by MUSLIN_PUBLIC_IP, and if flanneld has \
         the flag by FLANNELD_PUBLIC_IP. A flag takes precedence, then MUSLIN_.\n\n{}",
        log::HELP
    )
)]
pub(super) struct Arguments {
    /// The node's name [default: this machine's host name]
    #[arg(long)]
    name: Option<String>,
    /// The lease store: sqlite:PATH, file:PATH or etcd://HOST:PORT [default: a database in the state
    /// directory]
    #[arg(long, value_name = "URL")]
    store: Option<OsString>,
    /// The cluster's pod network, if the store has no configuration yet, of IPv4 or IPv6, or one of each
    /// with a comma in between [default: 10.244.0.0/16]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    network: Vec<IpNet>,
    /// The pod network of IPv6 beside that of IPv4
    #[arg(long, value_name = "CIDR")]
    ipv6_network: Option<Ipv6Net>,
    /// Prefix length of a node's IPv6 subnet [default: 64, or two more than the network's]
    #[arg(long, value_name = "BITS")]
    ipv6_subnet_len: Option<u8>,
    /// Prefix length of a node's subnet [default: 24, or two more than the network's]
    #[arg(long, value_name = "BITS")]
    subnet_len: Option<u8>,
    /// How packets travel between nodes [default: vxlan]
    #[arg(long)]
    backend: Option<BackendName>,
    /// With vxlan and ipip, send packets unencapsulated to nodes on the same link
    #[arg(long)]
    direct_routing: bool,
    /// Device for unencapsulated packets: `packet` for a packet socket on the interface, or tap:NAME
    /// for a TAP device that is bridged into the link
    #[arg(long, value_name = "DEVICE", default_value = "packet")]
    uplink: UplinkKind,
    /// VXLAN network identifier [default: 1]
    #[arg(long)]
    vni: Option<u32>,
    /// UDP port of every node's tunnel; with wireguard that of IPv6 is the next one [default: 8472 for vxlan,
    /// 8285 for udp, 51820 for wireguard]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// With wireguard, whether each IP version has a port of its own, or one carries both: by addresses of
    /// IPv4, of IPv6, or of what seems to be better [default: separate]
    #[arg(long, value_name = "MODE")]
    wireguard_mode: Option<ModeName>,
    /// With wireguard, a file with the secret that all nodes share beside their keys, as 'wg genpsk' makes it
    /// [default: systemd's credential wireguard-psk, if there is one]
    #[arg(long, value_name = "FILE")]
    wireguard_psk_file: Option<PathBuf>,
    /// The file with the node's private key, for the backend wireguard; it is made if there is none; also by
    /// flannel's variable WIREGUARD_KEY_FILE [default: wireguard.key in the node's state directory]
    #[arg(long, value_name = "FILE")]
    wireguard_key_file: Option<PathBuf>,
    /// MTU between the nodes in bytes; the pods' MTU is smaller by the encapsulation [default: the
    /// interface's]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u32>,
    /// A resolver to which the node forwards its pods' queries; may be given several times [default:
    /// those in this machine's /etc/resolv.conf; with --egress off none]
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    dns: Vec<IpAddr>,
    /// Number of packet threads; a flow stays on one of them [default: that of processors, at most 4; one for
    /// wireguard]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    workers: Option<u8>,
    /// The kernel offloads to use, where available
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "tap,gso,gro"
    )]
    offload: Vec<OffloadName>,
    /// Do not clamp the MSS of TCP connections with other nodes' pods
    #[arg(long)]
    no_mss_clamp: bool,
    /// Whether pods reach addresses outside the pod network, through sockets of this node
    #[arg(long, default_value = "on")]
    egress: Switch,
    /// The only outside addresses that pods may reach; the longest prefix decides; may be given several
    /// times
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    egress_allow: Vec<IpNet>,
    /// Outside addresses that pods may not reach
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    egress_deny: Vec<IpNet>,
    /// An outside address at which pods reach this machine's 127.0.0.1, or one of IPv6 for ::1, or both
    /// with a comma in between [default: none]
    #[arg(long, value_name = "IP")]
    host_loopback: Option<Addresses>,
    /// Let pods with IPv6 reach IPv4: by this prefix, and by what their resolver answers for names that
    /// have no IPv6 address (NAT64, DNS64)
    #[arg(
        long,
        value_name = "PREFIX",
        num_args = 0..=1,
        default_missing_value = "64:ff9b::/96"
    )]
    nat64: Option<Nat64Prefix>,
    /// Follow groups: give multicast packets to the pods that have joined their group alone, and carry them
    /// to other nodes with this flag (IGMP, MLD; multicast DNS)
    #[arg(long)]
    multicast: bool,
    /// Let pods send from addresses that are not their own
    #[arg(long)]
    no_pod_guard: bool,
    /// Accept packets from addresses that hold no lease (tunnels through NAT)
    #[arg(long)]
    no_peer_guard: bool,
    /// The interface by which this machine and pods reach each other, which `muslin host-interface` makes;
    /// `none` for none
    #[arg(long, value_name = "NAME", default_value = daemon::HOST_INTERFACE)]
    host_interface: String,
    /// Serve metrics for Prometheus at http://ADDR/metrics, as in 127.0.0.1:8482: names, addresses and
    /// counters of the node, its pods and its peers, which whoever reaches the port can read
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    /// Serve a page about the node at http://ADDR/, as in 127.0.0.1:8484: its pods, tunnels and tables, and
    /// traces; read-only. By another address than this machine's own it asks for a token, which is logged
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
    /// Let other nodes ask this one what becomes of packets that they have sent here, and ask them, for
    /// `muslin trace`: those that have the same secret, which this file contains, ask by the pod network
    /// [default: systemd's credential trace-secret, if there is one]
    #[arg(long, value_name = "FILE")]
    trace_secret_file: Option<PathBuf>,
    /// Do not restrict the node's system calls (seccomp)
    #[arg(long)]
    no_seccomp: bool,
    /// Do not restrict the files that the node can reach (Landlock)
    #[arg(long)]
    no_landlock: bool,
    /// The socket of `muslin keep`, which holds the devices of container runtimes' pods while there is no
    /// node
    #[arg(long, value_name = "PATH")]
    keeper: Option<PathBuf>,
    /// Take over the node that runs, without a lost packet: it gives all that it has to this process,
    /// and ends when its last flow to or from outside addresses does. If none runs, start as usual
    #[arg(long)]
    take_over: bool,
    /// The control socket [default: control.sock in the node's state directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    pub(super) state: StateChoice,
    #[command(flatten)]
    flannel: flannel::Arguments,
    /// End with the process that started it
    #[arg(long, hide = true)]
    pub(super) die_with_parent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackendName {
    /// VXLAN frames in UDP datagrams
    Vxlan,
    /// flannel's UDP format
    Udp,
    /// Unencapsulated packets, with the node as next hop; all nodes are on one link
    HostGw,
    /// IPv4 in IPv4
    Ipip,
    /// WireGuard: encrypted IP packets in UDP datagrams
    #[value(name = "wireguard")]
    WireGuard,
}

/// [`WireGuardMode`] on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ModeName {
    /// Each IP version by itself, on a port of its own
    Separate,
    /// Both by one port and the address that seems to be better
    Auto,
    /// Both by one port and IPv4 addresses
    Ipv4,
    /// Both by one port and IPv6 addresses
    Ipv6,
}

impl From<ModeName> for WireGuardMode {
    fn from(mode: ModeName) -> Self {
        match mode {
            ModeName::Separate => Self::Separate,
            ModeName::Auto => Self::Auto,
            ModeName::Ipv4 => Self::Ipv4,
            ModeName::Ipv6 => Self::Ipv6,
        }
    }
}

/// Bytes of the shortest secret of nodes that ask each other.
const MIN_SECRET: usize = 16;

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.die_with_parent {
        die_with_parent()?;
    }
    confine::try_all(&[
        confine::keep_to_itself,
        confine::leave_no_core,
        confine::gain_nothing,
        || confine::keep_only(&CAPABILITIES),
    ]);
    let settings = arguments.settings()?;
    // A secret may come by one of them: --etcd-password-file <(COMMAND).
    confine::try_all(&[confine::close_inherited]);
    confine::lock(arguments.switches(), &places(&settings));
    block_on(daemon::run(settings))
}

/// The files that a node uses.
pub(super) fn places(settings: &NodeSettings) -> Places {
    let mut places = Places::default();
    places.write(&settings.state_dir, 0o700);
    match store::file_of(&settings.store) {
        Some((file, true)) => places.write_beside(file, 0o700),
        Some((file, false)) => places.read(file),
        None => {}
    }
    let etcd = &settings.etcd;
    for file in [&etcd.cafile, &etcd.certfile, &etcd.keyfile]
        .into_iter()
        .flatten()
    {
        places.read(file);
    }
    // Where else certificates of the system may be (rustls-native-certs).
    for variable in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
        if let Some(path) = std::env::var_os(variable) {
            places.read(Path::new(&path));
        }
    }
    if let Some(file) = &settings.subnet_file {
        places.write_beside(file, 0o755);
    }
    if let Some(file) = &settings.wireguard_key_file {
        places.write_beside(file, 0o755);
    }
    if let Some(socket) = &settings.socket {
        places.clear(socket);
        for directory in daemon::directories(socket) {
            places.write(&directory, 0o700);
        }
    }
    places
}

impl Arguments {
    /// The confinement measures that can be switched off.
    pub(super) fn switches(&self) -> confine::Switches {
        confine::Switches {
            seccomp: !self.no_seccomp,
            landlock: !self.no_landlock,
        }
    }

    /// The node's settings. Logs each flag that has no effect.
    pub(super) fn settings(&self) -> Result<NodeSettings> {
        self.flannel.check()?;
        for notice in self.flannel.notices() {
            warn!("{notice}");
        }
        let state_dir = self.state.dir();
        let flannel = &self.flannel;
        Ok(NodeSettings {
            name: match &self.name {
                Some(name) => state::node_name(name)?,
                None => state::default_node_name(),
            },
            etcd: flannel.etcd_options()?,
            store: self.store(&state_dir)?,
            prefix: flannel.prefix()?,
            state_dir,
            socket: self.socket.clone(),
            underlay: flannel.underlay(),
            uplink: self.uplink.clone(),
            wanted_config: self.wanted_config()?,
            mtu: match self.mtu {
                Some(bytes) => Some(Mtu::new(bytes).map_err(Error::usage)?),
                None => None,
            },
            dns: self.dns.clone(),
            clamp_mss: !self.no_mss_clamp,
            guard_pods: !self.no_pod_guard,
            guard_peers: !self.no_peer_guard,
            multicast: self.multicast,
            egress: self.egress()?,
            workers: self.workers.map_or_else(default_workers, usize::from),
            has_named_workers: self.workers.is_some(),
            wireguard_key_file: self.wireguard_key_file.clone(),
            offload: self.offload()?,
            renew_margin: flannel.renew_margin(),
            subnet_file: flannel.subnet_file(),
            ip_masq: flannel.ip_masq(),
            host_interface: (self.host_interface != "none").then(|| self.host_interface.clone()),
            keeper: self.keeper.clone(),
            take_over: self.take_over,
            health: flannel.health(),
            metrics: self.metrics,
            admin: self.admin,
            trace_secret: self.trace_secret()?,
        })
    }

    /// The secret of nodes that ask each other, which nobody may guess.
    fn trace_secret(&self) -> Result<Option<TraceSecret>> {
        let secret = secret::read(self.trace_secret_file.as_deref(), "trace-secret")?;
        match secret {
            Some(secret) if secret.len() < MIN_SECRET => Err(Error::usage(format!(
                "the secret of --trace-secret-file has {} bytes, and needs {MIN_SECRET}: make one \
                 with 'openssl rand -hex 32'",
                secret.len()
            ))),
            secret => Ok(secret.map(TraceSecret::new)),
        }
    }

    fn egress(&self) -> Result<Option<host::EgressSettings>> {
        let settings = host::EgressSettings {
            allow: self.egress_allow.clone(),
            deny: self.egress_deny.clone(),
            host_loopback: self.host_loopback,
            nat64: self.nat64,
        };
        match self.egress {
            Switch::On => Ok(Some(settings)),
            Switch::Off if settings == host::EgressSettings::default() => Ok(None),
            Switch::Off => Err(Error::usage(
                "--egress off: cannot be combined with --egress-allow, --egress-deny, --host-loopback or \
                 --nat64",
            )),
        }
    }

    fn offload(&self) -> Result<Offload> {
        let has = |name| self.offload.contains(&name);
        if has(OffloadName::None) && self.offload.iter().any(|name| *name != OffloadName::None) {
            return Err(Error::usage(
                "--offload: 'none' cannot be combined with others",
            ));
        }
        Ok(Offload {
            tap: has(OffloadName::Tap),
            gso: has(OffloadName::Gso),
            gro: has(OffloadName::Gro),
        })
    }

    fn store(&self, state_dir: &Path) -> Result<OsString> {
        let store = match (self.flannel.etcd_store(), &self.store) {
            (Some(store), _) => store.into(),
            (None, Some(store)) => store.clone(),
            (None, None) => {
                let embedded = Feature::Sqlite.require();
                embedded.map_err(|error| {
                    Error::usage(format!("{error}: name another store with --store"))
                })?;
                state::default_store(state_dir)
            }
        };
        match self.flannel.needs_etcd() {
            Some(flag) if !store.as_bytes().starts_with(b"etcd") => Err(Error::usage(format!(
                "{flag} requires --etcd-endpoints, but leases are in {}",
                store.display()
            ))),
            _ => Ok(store),
        }
    }

    /// The network configuration of the command line. Without one it is the flannel cluster's, or else
    /// the store's or the default.
    fn wanted_config(&self) -> Result<WantedConfig> {
        let Self {
            ipv6_subnet_len,
            subnet_len,
            backend,
            vni,
            port,
            ..
        } = self;
        let asked_networks = self.networks()?;
        let networks = asked_networks.unwrap_or(NETWORK.into());
        let lacks = |flag, network| {
            let text = format!("{flag} requires a --network of {network}");
            Err(Error::usage(text))
        };
        if ipv6_subnet_len.is_some() && networks.ipv6().is_none() {
            return lacks("--ipv6-subnet-len", "IPv6");
        }
        if subnet_len.is_some() && networks.ipv4().is_none() {
            return lacks("--subnet-len", "IPv4");
        }
        let ipv6 = networks.ipv6();
        let ipv6 = ipv6.map(|network| Ipv6Range::new(network, *ipv6_subnet_len));
        let ipv6 = ipv6.transpose().map_err(Error::usage)?;
        let (backend_asked, backend) = (backend.is_some(), self.backend()?);
        let config = match (networks.ipv4(), ipv6) {
            (None, Some(range)) => NetworkConfig::ipv6_only(range, backend),
            (ipv4, ipv6) => {
                let config = NetworkConfig::new(ipv4.unwrap_or_default(), *subnet_len, backend);
                config.and_then(|config| match ipv6 {
                    Some(range) => config.with_ipv6(range),
                    None => config.without_ipv6(),
                })
            }
        };
        let config = config.map_err(Error::usage)?;
        let asked = asked_networks.is_some() || subnet_len.is_some() || backend_asked;
        if asked || vni.is_some() || port.is_some() || self.direct_routing {
            Ok(WantedConfig::Exactly(config))
        } else if self.flannel.etcd_store().is_some() {
            // As in flannel, the administrator writes it, not a node.
            Ok(WantedConfig::Any)
        } else {
            Ok(WantedConfig::IfNone(config))
        }
    }

    /// The pod networks that are asked for: one of an IP version at most.
    fn networks(&self) -> Result<Option<Nets>> {
        let (mut ipv4, mut ipv6) = match self.ipv6_network {
            // Beside the default.
            Some(network) if self.network.is_empty() => (Some(NETWORK), Some(network)),
            network => (None, network),
        };
        for network in &self.network {
            let is_second = match network {
                IpNet::V4(network) => ipv4.replace(*network).is_some(),
                IpNet::V6(network) => ipv6.replace(*network).is_some(),
            };
            if is_second {
                return Err(Error::usage(format!(
                    "--network {network}: a cluster has one pod network of IPv4 and one of IPv6 at most"
                )));
            }
        }
        Ok(Nets::new(ipv4, ipv6))
    }

    fn backend(&self) -> Result<Backend> {
        let name = self.backend.unwrap_or(BackendName::Vxlan);
        let goes_with = |flag, others| Err(Error::usage(format!("{flag} requires {others}")));
        match name {
            BackendName::Vxlan => {}
            _ if self.vni.is_some() => return goes_with("--vni", "--backend vxlan"),
            BackendName::Udp | BackendName::WireGuard => {}
            _ if self.port.is_some() => {
                return goes_with("--port", "--backend vxlan, udp or wireguard");
            }
            BackendName::HostGw | BackendName::Ipip => {}
        }
        match name {
            BackendName::WireGuard => {}
            _ if self.wireguard_mode.is_some() => {
                return goes_with("--wireguard-mode", "--backend wireguard");
            }
            _ if self.wireguard_psk_file.is_some() => {
                return goes_with("--wireguard-psk-file", "--backend wireguard");
            }
            _ => {}
        }
        match name {
            BackendName::Vxlan => {
                let mut options = VxlanOptions::default();
                options.port = self.port.unwrap_or(vxlan::PORT);
                options.direct_routing = self.direct_routing;
                if let Some(vni) = self.vni {
                    options.vni = Vni::new(vni).map_err(Error::usage)?;
                }
                Ok(Backend::Vxlan(options))
            }
            BackendName::Ipip => Ok(Backend::Ipip {
                direct_routing: self.direct_routing,
            }),
            BackendName::Udp | BackendName::HostGw | BackendName::WireGuard
                if self.direct_routing =>
            {
                goes_with("--direct-routing", "--backend vxlan or ipip")
            }
            BackendName::WireGuard => self.wireguard().map(Backend::WireGuard),
            BackendName::HostGw => Ok(Backend::HostGw),
            BackendName::Udp => Ok(Backend::Udp {
                port: self.port.unwrap_or(udp::PORT),
            }),
        }
    }

    fn wireguard(&self) -> Result<WireGuardOptions> {
        if self.workers.is_some_and(|workers| workers > 1) {
            return Err(Error::usage(
                "--workers: a node of the backend wireguard has one packet thread",
            ));
        }
        let mut options = WireGuardOptions::default();
        options.mode = self.wireguard_mode.map(Into::into).unwrap_or_default();
        if let Some(port) = self.port {
            options.listen_port = port;
            options.listen_port_v6 = port.checked_add(1).ok_or_else(|| {
                Error::usage(format!(
                    "--port {port}: wireguard needs the next port, too, and there is none"
                ))
            })?;
        }
        let psk = secret::read(self.wireguard_psk_file.as_deref(), "wireguard-psk")?;
        options.psk = match psk.map(|psk| psk.parse()) {
            None => None,
            Some(Ok(psk)) => Some(psk),
            Some(Err(error)) => {
                let text = format!(
                    "the secret of --wireguard-psk-file is none: {error}, as of 'wg genpsk'"
                );
                return Err(Error::usage(text));
            }
        };
        Ok(options)
    }
}

/// As many packet threads as this process may use processors, within reason: each has tables of its
/// own, and a few carry more than most links.
fn default_workers() -> usize {
    const MOST: usize = 4;
    thread::available_parallelism().map_or(1, |count| count.get().min(MOST))
}
