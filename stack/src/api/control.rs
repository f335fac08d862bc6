//! What is said over the control socket.
//!
//! A client says first who it is ([`Hello`]), and the node who it is ([`Welcome`]). From then on a
//! request is one packet. An answer is one packet, or for reports as many as it takes, all but
//! the last marked `more`. An attachment lives as long as the connection it was made over, unless
//! it is persistent.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

use super::capture::Capture;
use super::cni;
use super::live;
use super::published::PortMapping;
use super::trace;
use crate::addresses::{Addresses, Nets};
use crate::control::ipam::PodName;
use crate::control::lease::TunnelPorts;

/// The version of what is said here. Fields and variants that the other end may leave alone come
/// without another one. [`Hello`] and [`Welcome`] have their form in all versions.
pub const PROTOCOL: u32 = 1;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Request {
    /// Begin to speak, before all else.
    Hello(Hello),
    /// Attach the device whose descriptor is beside this message: a TAP device, or one end of a pair
    /// of `SOCK_SEQPACKET` sockets for a pod without an interface.
    Attach(Attach),
    /// Detach a pod.
    Detach {
        /// Its name.
        pod: PodName,
    },
    /// Keep the namespaces of an attached pod, for [`Request::Namespaces`]. Their descriptors are
    /// beside this message.
    KeepNamespaces {
        /// The pod's name.
        pod: PodName,
        /// What the descriptors stand for, in their order.
        kinds: Vec<Namespace>,
    },
    /// Give the namespaces of a pod.
    Namespaces {
        /// Its name.
        pod: PodName,
    },
    /// Tell one table.
    Report(Table),
    /// Tell events of higher numbers than this, a part of them at once, and wait for a while if there
    /// are none yet. Answered by rows of [`Event`](super::events::Event).
    AwaitEvents {
        /// The number of the last event that is known.
        after: u64,
    },
    /// Give another node's lease back, which does not do it itself any more. Answered by `Dropped`.
    DropLease(DropLease),
    /// Give the lease back and stop.
    Leave,
    /// What a CNI plugin asks. Answered by [`Answer::Cni`].
    Cni(cni::Call),
    /// Capture packets. Answered when that has begun.
    Capture(Capture),
    /// Tell what would become of a packet. Answered by [`Answer::Trace`].
    Trace(trace::Question),
    /// Send and watch probes. Answered by [`Answer::Live`].
    Live(live::Call),
    /// Let this process be the node from now on. What is said then is of this version, and known to
    /// the program alone.
    TakeOver(u32),
}

/// A client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Hello {
    /// The version of what it says.
    pub protocol: u32,
    /// The version of the program.
    #[serde(default)]
    pub version: String,
}

impl Hello {
    /// A client of this version of the program.
    pub fn new(version: impl Into<String>) -> Self {
        Self {
            protocol: PROTOCOL,
            version: version.into(),
        }
    }
}

/// A node, and what is to be known of it before a device is opened for it. One that speaks another
/// version than the client answers this, too, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Welcome {
    /// The version of what it says.
    pub protocol: u32,
    /// The version of the program.
    #[serde(default)]
    pub version: String,
    /// The node's name.
    #[serde(default)]
    pub node: String,
    /// Queues that a pod's device is to have: one for each thread that moves packets.
    #[serde(default)]
    pub queues: usize,
    /// Why it cannot attach pods yet, in one line.
    #[serde(default)]
    pub not_ready: Option<String>,
}

impl Welcome {
    /// A node of this version of the program.
    pub fn new(version: impl Into<String>, node: impl Into<String>, queues: usize) -> Self {
        Self {
            protocol: PROTOCOL,
            version: version.into(),
            node: node.into(),
            queues,
            not_ready: None,
        }
    }
}

/// A lease to be given back for the node that holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropLease {
    /// Its subnet, or the name of the node.
    pub lease: String,
    /// Whether to do it even if the node seems to be alive, and for a reservation.
    pub force: bool,
}

/// A pod that wants to be attached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Attach {
    /// Its name; the node chooses one otherwise.
    pub pod: Option<PodName>,
    /// The addresses it wants; the node chooses others.
    pub address: Option<Addresses>,
    /// Whether it stays when the connection ends.
    pub persistent: bool,
    /// Ports of the machine that lead to it.
    #[serde(default)]
    pub publish: Vec<PortMapping>,
    /// The interface that its device is, if it may outlive the node: it does where the node has a keeper.
    #[serde(default)]
    pub interface: Option<PodInterface>,
}

/// A pod's interface, and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInterface {
    /// Its name there.
    pub name: String,
    /// Its network namespace.
    pub netns: cni::NetworkNamespace,
}

impl Attach {
    /// A pod that ends with the connection, with this name and these addresses if they matter.
    #[must_use]
    pub fn new(pod: Option<PodName>, address: Option<Addresses>) -> Self {
        Self {
            pod,
            address,
            ..Self::default()
        }
    }
}

/// A kind of namespace (namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Namespace {
    /// Users and capabilities.
    User,
    /// Processes.
    Pid,
    /// Mounts.
    Mount,
    /// Interfaces, addresses and routes.
    Net,
    /// The host name.
    Uts,
}

/// A table that can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Table {
    /// One row of [`Status`].
    Status,
    /// Rows of [`Pod`].
    Pods,
    /// Rows of [`Peer`].
    Peers,
    /// Rows of [`Lease`], which the store is asked for.
    Leases,
    /// Rows of [`Route`].
    Routes,
    /// Rows of [`Neighbour`].
    Neighbours,
    /// Rows of [`Drop`].
    Drops,
    /// Rows of [`Flow`].
    Flows,
    /// Rows of [`Group`].
    Groups,
    /// Rows of [`Event`](super::events::Event), the newest last.
    Events,
}

/// What a node answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Answer {
    /// Who it is.
    Welcome(Welcome),
    /// The pod is attached.
    Attached(Attached),
    /// A pod's namespaces; their descriptors are beside this message.
    Namespaces(PodNamespaces),
    /// Rows of a table, each as JSON.
    Rows {
        /// The rows.
        rows: Vec<serde_json::Value>,
        /// Whether further rows follow in another packet.
        more: bool,
    },
    /// What the interfaces of pods attached over this connection are to have from now on. Nobody has
    /// asked: it comes whenever it changes.
    Changed(Link),
    /// The lease is given back.
    Dropped(Dropped),
    /// What a CNI plugin is answered.
    Cni(cni::Reply),
    /// The node's part of a packet's way.
    Trace(Box<trace::Part>),
    /// What a node says about probes.
    Live(live::Told),
    /// It is done.
    Done,
    /// It cannot be done.
    Refused(Refusal),
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Refusal {
    /// Why, for programs.
    #[serde(default = "Code::of_old_nodes")]
    pub code: Code,
    /// Why, in one line for people.
    pub message: String,
}

impl Serialize for Refusal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Refusal", 3)?;
        // Clients from before there were codes read this one.
        fields.serialize_field("usage", &self.code.is_usage())?;
        fields.serialize_field("code", &self.code)?;
        fields.serialize_field("message", &self.message)?;
        fields.end()
    }
}

/// Why a request is refused, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Code {
    /// The request is wrong in itself.
    Usage,
    /// Client and node speak different versions.
    WrongVersion,
    /// Not by this socket.
    Denied,
    /// The node has no lease yet.
    NotReady,
    /// There is no pod of that name.
    NoSuchPod,
    /// There is no such lease.
    NoSuchLease,
    /// What is to be given back is in use, or may be.
    Busy,
    /// The interface is attached already.
    AlreadyAttached,
    /// An attachment is not as it is to be.
    Amiss,
    /// Another pod has the name, or all that could be chosen are taken.
    NameTaken,
    /// No pod can have the name.
    NameReserved,
    /// Another pod has the address.
    AddressTaken,
    /// No pod of this node can have the address.
    AddressNotAvailable,
    /// All addresses of the node's subnet are in use.
    NoAddressLeft,
    /// Another pod has the MAC address.
    MacTaken,
    /// Another pod or program has the port.
    PortTaken,
    /// Anything else, and what newer nodes say that is not known here.
    #[serde(other)]
    Failed,
}

impl Code {
    /// Whether the request itself was wrong, so that asking again is no use.
    #[must_use]
    pub const fn is_usage(self) -> bool {
        matches!(
            self,
            Self::Usage | Self::NoSuchLease | Self::NameReserved | Self::AddressNotAvailable
        )
    }

    /// Nodes that know of no codes know of no versions either.
    const fn of_old_nodes() -> Self {
        Self::WrongVersion
    }
}

/// What a pod's interface can send at once. It follows the underlay's interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Link {
    /// MTU in bytes.
    pub mtu: u16,
    /// MTU of the way to other nodes by IPv6 in bytes, where it is less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu_v6: Option<u16>,
    /// Segments of its longest superpacket.
    pub gso_max_segs: u16,
}

impl Link {
    /// The MTU in bytes of routes by this gateway, where it is not the interface's.
    #[must_use]
    pub fn route_mtu(&self, gateway: IpAddr) -> Option<u16> {
        let is_less = |mtu: &u16| gateway.is_ipv6() && *mtu < self.mtu;
        self.mtu_v6.filter(is_less)
    }
}

/// What an attached pod's interface is to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[non_exhaustive]
pub struct Attached {
    /// The pod's name.
    pub pod: PodName,
    /// The node's name.
    pub node: String,
    /// The pod's addresses with the length of the node's subnets.
    pub address: Nets,
    /// The gateways.
    pub gateway: Addresses,
    /// What it can send at once.
    #[serde(flatten)]
    pub link: Link,
    /// What is reached through the gateways.
    #[cfg_attr(feature = "schema", schemars(with = "Vec<String>"))]
    pub routes: Vec<IpNet>,
    /// Resolvers for the pod.
    pub dns: Vec<IpAddr>,
    /// Domains in which it looks for short names, in this order.
    #[serde(default)]
    pub search: Vec<String>,
    /// How it asks, as in resolv.conf(5): `ndots:2`.
    #[serde(default)]
    pub dns_options: Vec<String>,
    /// Ports of the machine that lead to it, with those that were chosen.
    #[serde(default)]
    pub published: Vec<PortMapping>,
}

impl Attached {
    /// A pod of a node with these addresses, and nothing yet beyond its subnet.
    #[must_use]
    pub fn new(pod: PodName, node: String, address: Nets, gateway: Addresses, link: Link) -> Self {
        Self {
            pod,
            node,
            address,
            gateway,
            link,
            routes: Vec::new(),
            dns: Vec::new(),
            search: Vec::new(),
            dns_options: Vec::new(),
            published: Vec::new(),
        }
    }
}

/// What a command needs that is to run in a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PodNamespaces {
    /// The node's name.
    pub node: String,
    /// The pod's addresses.
    pub address: Addresses,
    /// What the descriptors stand for, in their order.
    pub kinds: Vec<Namespace>,
}

impl PodNamespaces {
    /// Those of a pod of a node with these addresses.
    #[must_use]
    pub const fn new(node: String, address: Addresses, kinds: Vec<Namespace>) -> Self {
        Self {
            node,
            address,
            kinds,
        }
    }
}

/// A lease that was given back for another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Dropped {
    /// The lease.
    pub subnet: Nets,
    /// The name of the node that held it, if it is known.
    pub node: Option<String>,
    /// Where its tunnel ended, if that was a lease at all.
    pub public_ip: Option<Addresses>,
    /// How the node was doing, as in [`Lease::state`].
    pub state: String,
    /// Seconds that the lease had left; none if it would not have ended by itself.
    pub seconds_left: Option<u64>,
    /// Whether the record with the names of its pods is gone, too.
    pub names_removed: bool,
}

/// A node at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Status {
    /// Its name.
    pub node: String,
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since it had its lease.
    pub uptime_seconds: u64,
    /// All pods of the cluster.
    pub network: Nets,
    /// Its own lease.
    pub subnet: Nets,
    /// Its pods' gateway.
    pub gateway: Addresses,
    /// Where other nodes send to.
    pub public_ip: Addresses,
    /// Where its tunnel ends: another address if the public one is translated to it.
    pub tunnel_ip: Addresses,
    /// The interface that has that address.
    pub interface: String,
    /// `vxlan`, `udp`, `host-gw`, `ipip` or `wireguard`.
    pub backend: String,
    /// UDP port of the tunnel; 0 if it has none.
    pub port: u16,
    /// That of IPv6, if it is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_v6: Option<u16>,
    /// VXLAN network identifier, for that backend.
    pub vni: Option<u32>,
    /// MAC address of its VTEP, for VXLAN.
    pub vtep_mac: Option<String>,
    /// Its public key, for WireGuard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
    /// How it reaches its link below IP, if it does: `packet` or `tap:NAME`.
    pub uplink: Option<String>,
    /// MTU of its pods in bytes.
    pub mtu: u16,
    /// The same of what pods send in IPv6 through their gateway, if they have that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu_v6: Option<u16>,
    /// The device pods are attached by.
    pub device: String,
    /// Threads that move packets.
    pub workers: usize,
    /// The kernel's offloads in use, as in `--offload`.
    pub offload: String,
    /// Where leases are stored.
    pub store: String,
    /// What does not work at this moment, such as the store, in one line.
    #[serde(default)]
    pub trouble: Option<String>,
    /// Seconds since the store confirmed the lease.
    pub lease_confirmed_seconds: u64,
    /// Flows of pods to addresses outside the pod network, if they may have any.
    pub egress: Option<Flows>,
    /// Whether it follows groups, and carries their packets to nodes that do.
    #[serde(default)]
    pub multicast: bool,
    /// The host interface, if there is one.
    #[serde(default)]
    pub host_interface: Option<HostInterface>,
    /// What pods have asked their gateway.
    pub dns: Dns,
    /// Ports of this machine that lead to pods.
    pub published: Ports,
    /// Attached pods.
    pub pods: usize,
    /// Other nodes.
    pub peers: usize,
    /// What became of all packets.
    pub packets: Packets,
    /// Where it listens for commands.
    #[serde(default)]
    pub control: Vec<ControlSocket>,
    /// What it has taken from itself, if it is known.
    #[serde(default)]
    pub confinement: Option<Confinement>,
}

impl Status {
    /// The UDP ports of the tunnel.
    #[must_use]
    pub fn ports(&self) -> TunnelPorts {
        TunnelPorts {
            ipv4: self.port,
            ipv6: self.port_v6.unwrap_or(self.port),
        }
    }
}

/// A socket at which a node listens for commands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ControlSocket {
    /// Its path.
    pub path: String,
    /// What clients may ask for there: `all`, `attach` or `status`.
    pub allows: String,
}

impl std::fmt::Display for ControlSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.path, self.allows)
    }
}

/// What a node has taken from itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Confinement {
    /// It can make only the system calls that it needs.
    pub seccomp: Measure,
    /// It can reach only the files that it needs.
    pub landlock: Measure,
    /// No program that it could start has more rights than itself.
    pub no_new_privileges: bool,
    /// Others of its user do not read its memory, and it leaves no core.
    pub not_dumpable: bool,
    /// The capabilities that it has left.
    pub capabilities: Vec<String>,
}

/// Whether a measure is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Measure {
    /// Whether it is, be it in part.
    pub in_force: bool,
    /// Why not, or not all of it.
    pub reason: Option<String>,
}

impl Measure {
    /// All of it is.
    #[must_use]
    pub fn full() -> Self {
        Self {
            in_force: true,
            reason: None,
        }
    }

    /// A part of it is.
    #[must_use]
    pub fn partial(reason: impl ToString) -> Self {
        Self {
            in_force: true,
            reason: Some(reason.to_string()),
        }
    }

    /// Nothing of it is.
    #[must_use]
    pub fn missing(reason: impl ToString) -> Self {
        Self {
            in_force: false,
            reason: Some(reason.to_string()),
        }
    }
}

impl std::fmt::Display for Confinement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, measure) in [("seccomp", &self.seccomp), ("landlock", &self.landlock)] {
            match (measure.in_force, &measure.reason) {
                (true, None) => write!(f, "{name}, ")?,
                (true, Some(reason)) => write!(f, "{name} in part ({reason}), ")?,
                (false, None) => write!(f, "no {name}, ")?,
                (false, Some(reason)) => write!(f, "no {name} ({reason}), ")?,
            }
        }
        if !self.no_new_privileges {
            f.write_str("may gain privileges, ")?;
        }
        if !self.not_dumpable {
            f.write_str("its memory can be read, ")?;
        }
        match self.capabilities.as_slice() {
            [] => f.write_str("no capabilities"),
            names => write!(f, "capabilities {}", names.join(" and ")),
        }
    }
}

/// What became of flows to addresses outside the pod network since the node started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Flows {
    /// Flows that are there now.
    pub open: u64,
    /// Flows that began.
    pub opened: u64,
    /// TCP connections that the other end refused.
    pub refused: u64,
    /// TCP connections to which there was no way or no answer.
    pub unreachable: u64,
    /// TCP connections that either end reset.
    pub reset: u64,
    /// Flows that were idle for too long.
    pub expired: u64,
    /// Flows that made room for others.
    pub evicted: u64,
}

/// A flow between a pod and an address outside the pod network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Flow {
    /// `tcp`, `udp` or `ping`.
    pub protocol: String,
    /// The pod, if it is attached.
    pub pod: Option<PodName>,
    /// `out` if the pod began it, `in` if it was begun from outside.
    pub direction: String,
    /// The pod's address, with its port or, of echo requests, their identifier.
    pub local: SocketAddr,
    /// The other end as the pod calls it, of UDP and echo requests the one to which it has sent
    /// last; echo requests have no port there.
    pub remote: SocketAddr,
    /// `connecting`, `open`, `half-closed` once one end has nothing more to send, or `closing`.
    pub state: String,
    /// Seconds since it began.
    pub age_seconds: u64,
    /// Seconds since anything went either way.
    pub idle_seconds: u64,
    /// Bytes of payload from the pod.
    pub sent_bytes: u64,
    /// Bytes of payload to the pod.
    pub received_bytes: u64,
}

/// What became of pods' DNS queries since the node started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Dns {
    /// Who is asked for names that are not pods'.
    pub resolvers: Vec<String>,
    /// All queries.
    pub queries: u64,
    /// Those that the node answered by itself.
    pub answered: u64,
    /// Those that a resolver has answered.
    pub forwarded: u64,
    /// Those that no resolver has answered in time, or that were too many at once.
    pub failed: u64,
}

/// Ports of the machine that lead to pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Ports {
    /// How many there are.
    pub ports: usize,
    /// TCP connections and clients' UDP flows that came by them since the node started.
    pub flows: u64,
}

/// What became of all packets, in packets since the node started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Packets {
    /// Frames from pods and datagrams from peers.
    pub received: u64,
    /// Packets of the node's own.
    pub originated: u64,
    /// Frames for one pod.
    pub delivered: u64,
    /// Datagrams for a peer.
    pub sent: u64,
    /// Frames for all pods but the sender.
    pub flooded: u64,
    /// Packets for the node itself.
    pub consumed: u64,
    /// TCP acknowledgements to and from peers that were not carried, since a newer one says the same.
    #[serde(default)]
    pub superseded: u64,
    /// Lost packets.
    pub dropped: u64,
}

/// An attached pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Pod {
    /// Its name.
    pub pod: PodName,
    /// Its address.
    pub address: Addresses,
    /// MAC address of its interface.
    pub mac: String,
    /// Its port's number.
    pub port: u32,
    /// Whether it stays when whoever attached it goes.
    pub persistent: bool,
    /// Whether superpackets and unfinished checksums pass its device.
    pub offload: bool,
    /// Ports of the machine that lead to it.
    #[serde(default)]
    pub published: Vec<PortMapping>,
    /// Seconds since it was attached.
    pub attached_seconds: u64,
    /// Frames and bytes from it.
    pub received: Traffic,
    /// Frames and bytes to it.
    pub sent: Traffic,
}

/// The interface by which the host and pods reach each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HostInterface {
    /// Its name.
    pub name: String,
    /// The host's addresses that pods reach by it, besides the subnet's base address.
    pub addresses: Vec<IpAddr>,
    /// From the host.
    pub received: Traffic,
    /// To the host.
    pub sent: Traffic,
}

/// Packets and bytes in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Traffic {
    /// Packets; a superpacket is one.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Peer {
    /// Its name, if it is a muslin node that shares it.
    #[serde(default)]
    pub node: Option<String>,
    /// Its lease.
    pub subnet: Nets,
    /// Where its tunnel ends.
    pub public_ip: Addresses,
    /// How it encapsulates.
    pub backend: String,
    /// MAC address of its VTEP, for VXLAN.
    pub vtep_mac: Option<String>,
    /// Its public key, for WireGuard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
    /// `alive`, `silent` if it does not answer, `stopped` if it has said that it stops, or why
    /// nothing can be sent to it.
    pub state: String,
    /// Whether packets can be sent to it.
    #[serde(default = "yes")]
    pub usable: bool,
    /// Seconds since something came from it; none if nothing has.
    #[serde(default)]
    pub heard_seconds: Option<u64>,
    /// How packets get there: `vxlan`, `udp` or `ipip`, `on-link` for bare packets to a host on the
    /// node's own link, or `none`; nothing if it is no peer.
    pub path: Option<String>,
    /// MTU of that path in bytes.
    pub mtu: Option<u16>,
    /// Whether packets leave for it with partial checksums, which it has said that it takes.
    #[serde(default)]
    pub partial_checksums: bool,
    /// How packets to it and from it are encrypted, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
    /// Datagrams and bytes from it.
    pub received: Traffic,
    /// Datagrams and bytes to it.
    pub sent: Traffic,
}

/// How it stands with a peer whose packets are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Encryption {
    /// Where datagrams go.
    pub endpoint: SocketAddr,
    /// Whether that is where it was last heard, and not where its lease says.
    #[serde(rename = "roamed")]
    pub is_roamed: bool,
    /// Seconds since the last handshake; none if there was none. Without one for 180 s nothing passes until the
    /// next, which the next packet begins.
    pub handshake_seconds: Option<u64>,
    /// Packets that wait for a handshake.
    pub waiting: u64,
}

/// A key where the store has leases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Lease {
    /// The key without its prefix: `10.244.7.0-24` for a lease.
    pub key: String,
    /// The subnet that it names, if it does.
    pub subnet: Option<Nets>,
    /// The name of its holder, if it is a muslin node that shares it.
    #[serde(default)]
    pub node: Option<String>,
    /// Where the tunnel of its holder ends.
    pub public_ip: Option<Addresses>,
    /// How its holder encapsulates.
    pub backend: Option<String>,
    /// MAC address of its holder's VTEP, for VXLAN.
    pub vtep_mac: Option<String>,
    /// Its holder's public key, for WireGuard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
    /// `this node`, `this node, reservation`, `this node's address` for another lease of it,
    /// `another node`, `reservation`, or `nobody` for a key that is no lease.
    pub owner: String,
    /// Seconds until it ends; none if it does not end by itself.
    pub seconds_left: Option<u64>,
    /// Seconds since something came from its holder; none if nothing has.
    #[serde(default)]
    pub heard_seconds: Option<u64>,
    /// As of a [`Peer`], and `expiring` if it should have been renewed long ago, `expired` if its
    /// time is over.
    pub state: String,
}

/// What nodes that do not tell it mean.
const fn yes() -> bool {
    true
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Route {
    /// Destinations.
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub prefix: IpNet,
    /// `pods of this node`, or the peer's public address.
    pub via: String,
}

/// A neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its MAC address, if it is known.
    pub mac: Option<String>,
    /// The port it is behind, if it is known.
    pub port: Option<u32>,
    /// Whether it is a host on the node's own link, and no pod.
    pub uplink: bool,
    /// `permanent`, `incomplete`, `reachable`, `stale` or `probing`.
    pub state: String,
}

/// A pod's membership in a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Group {
    /// The group.
    pub group: IpAddr,
    /// The pod, if it is still attached.
    #[cfg_attr(feature = "schema", schemars(with = "Option<String>"))]
    pub pod: Option<PodName>,
    /// Its port.
    pub port: u32,
    /// Seconds until it is forgotten if the pod does not say again that it is in the group.
    pub expires_seconds: u64,
}

/// Packets lost for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Drop {
    /// The reason's name.
    pub reason: String,
    /// How many.
    pub packets: u64,
    /// The reason in a sentence.
    pub description: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_read_by_newer_and_older_programs() {
        let read = |text: &str| serde_json::from_str::<Refusal>(text).unwrap();
        let newer = read(r#"{"code":"too-hot","message":"m","degrees":40}"#);
        assert_eq!((newer.code, newer.message.as_str()), (Code::Failed, "m"));
        let older = read(r#"{"usage":true,"message":"m"}"#);
        assert_eq!(older.code, Code::WrongVersion);
        for (code, usage, name) in [
            (Code::AddressTaken, false, "address-taken"),
            (Code::AddressNotAvailable, true, "address-not-available"),
            (Code::Failed, false, "failed"),
        ] {
            let refusal = Refusal {
                code,
                message: "m".to_owned(),
            };
            let told = serde_json::to_value(&refusal).unwrap();
            let expected = serde_json::json!({"usage": usage, "code": name, "message": "m"});
            assert_eq!(told, expected);
            assert_eq!(serde_json::from_value::<Refusal>(told).unwrap(), refusal);
        }
    }
}
