//! CNI, the plug of container runtimes: what a plugin and a node say to each other.
//!
//! The plugin, which the runtime starts as root, makes the device in the pod's network namespace.
//! The node, which has no privileges, reserves a place for the pod ([`Call::Reserve`]) before
//! and takes the device ([`Call::Commit`]) after that. A reservation ends with the connection it
//! was made over, so that a plugin that is killed leaves nothing behind.
//!
//! The modules have what a runtime says to a plugin, and is answered: [`environment`], [`config`],
//! [`result`] and [`error`], of versions 0.3.0 to 1.1.0 of the specification.

pub mod config;
pub mod deletion;
pub mod environment;
pub mod error;
pub(in crate::api) mod fields;
pub mod request;
pub mod result;
pub mod version;

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::control::Attached;
use super::published::PortMapping;
use crate::control::ipam::PodName;

/// What an attachment is known by: never by the pod's name, which a successor may have already.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The name of the network in the runtime's configuration.
    pub network: String,
    /// The container's identity (`CNI_CONTAINERID`).
    pub container: String,
    /// The interface's name in the pod (`CNI_IFNAME`).
    pub interface: String,
}

impl Key {
    /// The interface of a container, attached to a network.
    pub fn new(
        network: impl Into<String>,
        container: impl Into<String>,
        interface: impl Into<String>,
    ) -> Self {
        Self {
            network: network.into(),
            container: container.into(),
            interface: interface.into(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            network,
            container,
            interface,
        } = self;
        write!(f, "{interface} of {container} in {network}")
    }
}

/// A network namespace. A path alone is not enough: it may come to stand for another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkNamespace {
    /// Where the runtime has it (`CNI_NETNS`).
    pub path: String,
    /// The device of its inode.
    pub device: u64,
    /// The number of its inode.
    pub inode: u64,
}

impl NetworkNamespace {
    /// Whether both are one, by whatever paths.
    #[must_use]
    pub const fn is_same(&self, other: &Self) -> bool {
        self.device == other.device && self.inode == other.inode
    }
}

/// What a plugin asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Call {
    /// Reserve a name, an address, a MAC address and ports for a pod. Answered by `Reserved`.
    Reserve(Box<Reserve>),
    /// Attach the device whose queues are beside this message to what this connection has reserved.
    /// Answered by `Done` once the attachment is recorded.
    Commit {
        /// What was reserved.
        key: Key,
    },
    /// End an attachment. Answered by `Done` whether there is one or not.
    Release {
        /// The attachment.
        key: Key,
    },
    /// Say whether an attachment is as it is to be. Answered by `Done`, or by a refusal that says
    /// what is amiss.
    Check {
        /// The attachment.
        key: Key,
        /// The namespace that it is to be in.
        netns: NetworkNamespace,
    },
    /// End all attachments of a network but these. Answered by `Done`.
    Collect {
        /// The network.
        network: String,
        /// What is still in use.
        valid: Vec<Key>,
        /// Whether more that is in use follows in another call, as it does not fit one message.
        /// Nothing ends before the last of them.
        #[serde(default)]
        more: bool,
    },
    /// Say whether a pod could be attached now. Answered by `Done` or a refusal.
    Ready,
    /// Name the attachments whose devices the node has lost, as an earlier process of it had them.
    /// Answered by `Missing`.
    Missing,
    /// Take the queues beside this message for an attachment whose device was lost. Answered by
    /// `Done`.
    Restore {
        /// The attachment.
        key: Key,
        /// The namespace that they were opened in.
        netns: NetworkNamespace,
    },
}

/// A place for a pod, as far as it matters to the runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Reserve {
    /// What it is to be known by.
    pub key: Key,
    /// Where its interface will be.
    pub netns: NetworkNamespace,
    /// The pod as Kubernetes names it.
    #[serde(default)]
    pub pod: Option<KubernetesPod>,
    /// The addresses that it is to have; the node chooses others.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// The MAC address that it is to have, with colons.
    #[serde(default)]
    pub mac: Option<String>,
    /// Ports of the machine that lead to it.
    #[serde(default)]
    pub publish: Vec<PortMapping>,
    /// What it may receive.
    #[serde(default)]
    pub ingress: Option<Rate>,
    /// What it may send.
    #[serde(default)]
    pub egress: Option<Rate>,
    /// Further names that it is to be found by.
    #[serde(default)]
    pub aliases: Vec<PodName>,
}

impl Reserve {
    /// A pod to which nothing matters.
    #[must_use]
    pub const fn new(key: Key, netns: NetworkNamespace) -> Self {
        Self {
            key,
            netns,
            pod: None,
            addresses: Vec::new(),
            mac: None,
            publish: Vec::new(),
            ingress: None,
            egress: None,
            aliases: Vec::new(),
        }
    }
}

/// A pod as Kubernetes names it (`CNI_ARGS`). Podman gives a name alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubernetesPod {
    /// Its namespace, `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// Its name, `K8S_POD_NAME`.
    pub name: String,
    /// Its identity, `K8S_POD_UID`.
    pub uid: String,
}

/// A limit of a token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Bits in a second.
    pub bits_per_second: u64,
    /// Bits that may be sent at once after a pause.
    pub burst_bits: u64,
}

/// What a node answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Reply {
    /// The place is reserved.
    Reserved(Box<Reserved>),
    /// The attachments whose devices are missing.
    Missing(Vec<Missing>),
    /// It is done.
    Done,
}

/// A reserved place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Reserved {
    /// What the interface is to have.
    pub attached: Attached,
    /// Its MAC address, with colons.
    pub mac: String,
    /// Queues that its device is to have.
    pub queues: usize,
    /// Whether it is to have offloads.
    pub offloads: bool,
    /// The user that the device is to belong to: the node's.
    pub owner: u32,
}

impl Reserved {
    /// A place for a device with one queue, without offloads, of user `owner`.
    #[must_use]
    pub const fn new(attached: Attached, mac: String, owner: u32) -> Self {
        Self {
            attached,
            mac,
            queues: 1,
            offloads: false,
            owner,
        }
    }
}

/// An attachment whose device is missing. Whoever can enter the namespace opens it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// The attachment.
    pub key: Key,
    /// Where its interface is.
    pub netns: NetworkNamespace,
    /// Queues that the device is to have.
    pub queues: usize,
    /// Whether it is to have offloads.
    pub offloads: bool,
}
