//! What the processes say to each other: one JSON message per packet, descriptors beside it.

use std::net::{IpAddr, SocketAddr};

use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::api::cni::Key;
use muslin_stack::api::control::{Hello, Namespace, Refusal};
use muslin_stack::api::published::PortMapping;
use muslin_stack::control::ipam::PodName;
use muslin_stack::datapath::egress::{FlowKey, Protocol};
use serde::{Deserialize, Serialize};

use crate::control::Level;

/// The version of what is said here.
pub(crate) const VERSION: u32 = 1;

/// What the new process asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Demand {
    /// Stop to read, and send the rest.
    Switch,
    /// The new process runs: it cannot be undone any more.
    Running,
}

/// What the old process sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Part {
    /// Who the node is; beside it is the lock of its state directory.
    Node(Box<About>),
    /// A listener, which is beside it.
    Door(FrontDoor),
    /// That is all for now.
    Prepared,
    /// The sockets that a worker gets datagrams of other nodes by, so many, and then those that it sends
    /// them by. One for each worker, in order.
    Tunnel { queues: usize },
    /// The sockets by which a worker gets frames of its link. One for each worker, in order.
    Uplink,
    /// A queue of the host interface, which is beside it.
    Host,
    /// Where hosts on the uplink's link are.
    NextHops(Vec<(IpAddr, [u8; 6])>),
    /// A pod; beside it are the queues of its device.
    Pod(Box<PodState>),
    /// A published port of the pod that was sent last; its socket is beside it.
    Published(PortMapping),
    /// The namespaces of the pod that was sent last, which are beside it.
    Namespaces(Vec<Namespace>),
    /// A connection, which is beside it, with which these pods end.
    Client {
        /// What its client said first.
        hello: Hello,
        /// What it may ask for.
        level: Level,
        /// Its pods.
        pods: Vec<PodName>,
    },
    /// Flows that stay.
    Flows(Vec<Flow>),
    /// Nothing is read any more. The channel for packets of those flows is beside it.
    Stopped,
    /// Flows that stayed have ended.
    Ended(Vec<Flow>),
    /// It cannot be done.
    Refused(Refusal),
}

/// Who a node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    /// Its lease.
    pub(crate) subnet: Nets,
    /// How it sends packets to others.
    pub(crate) backend: String,
    /// Where its tunnel ends, if it does in IPv4.
    pub(crate) end: Option<SocketAddr>,
    /// The same of IPv6.
    #[serde(default)]
    pub(crate) end_v6: Option<SocketAddr>,
    /// Whether it sends bare packets on its link.
    pub(crate) is_direct: bool,
    /// Its workers.
    pub(crate) workers: usize,
}

/// What somebody from outside comes in by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FrontDoor {
    /// A control socket.
    Control(Level),
    /// Health checks.
    Health,
    /// Metrics.
    Metrics,
    /// The page.
    Page,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodState {
    pub(crate) name: PodName,
    pub(crate) address: Addresses,
    pub(crate) mac: [u8; 6],
    pub(crate) aliases: Vec<PodName>,
    /// Whether it stays without its client.
    pub(crate) persistent: bool,
    /// The attachment of a container runtime that it is.
    pub(crate) attachment: Option<Key>,
}

/// A flow to or from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Flow(Transport, SocketAddr, SocketAddr);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Transport {
    Tcp,
    Udp,
    Ping,
}

impl From<FlowKey> for Flow {
    fn from(key: FlowKey) -> Self {
        let transport = match key.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Ping => Transport::Ping,
        };
        Self(transport, key.pod, key.remote)
    }
}

impl From<Flow> for FlowKey {
    fn from(Flow(transport, pod, remote): Flow) -> Self {
        let protocol = match transport {
            Transport::Tcp => Protocol::Tcp,
            Transport::Udp => Protocol::Udp,
            Transport::Ping => Protocol::Ping,
        };
        Self {
            protocol,
            pod,
            remote,
        }
    }
}
