//! The events that a source of leases reports to the rest of the node.
//!
//! All that follows from the leases of this node and of others follows from these changes, in their
//! order, wherever they come from: [`Manager`](super::Manager) makes them of what an etcd-like store
//! has.

use std::net::IpAddr;

use ipnet::Ipv4Net;
use thiserror::Error;

use super::config::{NetworkConfig, NetworkConfigError};
use super::key::SubnetKey;
use super::record::{LeaseRecord, TunnelEnd};

/// A change of the leases.
///
/// As with verdicts ([`crate::datapath::node::Verdict`]), whoever acts on changes must know all of
/// them: a node that ignores one may go on with a lease that it has lost.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A peer is new or has changed.
    Peer(SubnetKey, LeaseRecord),
    /// A lease shares a subnet or a key with another one that comes first, or does not any more. It is said
    /// before the peer is.
    Contested(SubnetKey, Contested),
    /// A peer's lease has ended.
    PeerGone(SubnetKey),
    /// The node's own lease, or the network that it is in, has changed.
    Own(OwnChange),
}

/// What of a lease belongs to other nodes, by the addresses of these: its node must have no traffic of a
/// subnet of others, and none at all with a key of others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Contested {
    /// Who has its IPv4 subnet.
    pub ipv4: Option<IpAddr>,
    /// Who has its IPv6 subnet.
    pub ipv6: Option<IpAddr>,
    /// Who has a public key that it has.
    pub public_key: Option<IpAddr>,
}

impl Contested {
    /// Whether nothing of it belongs to another.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.ipv4.is_none() && self.ipv6.is_none() && self.public_key.is_none()
    }
}

/// What has changed of the node's own lease, or of the network that it is in.
#[derive(Debug, Clone, PartialEq)]
pub enum OwnChange {
    /// The store has no network configuration that this node can use: it is asked again until it
    /// has. Reported once for each reason.
    AwaitsConfig(ConfigFault),
    /// The configuration is known.
    Configured(NetworkConfig),
    /// The node has this subnet.
    Acquired(SubnetKey),
    /// The lease lives on.
    Renewed,
    /// Another writer changed our record, which is written again.
    Disputed(SubnetKey),
    /// A record under our public address is taken over, as flannel does, but it is of another tunnel's
    /// end: a node was here before, or has the same public address.
    Replaced {
        /// The lease.
        key: SubnetKey,
        /// What the other end is known by.
        end: TunnelEnd,
    },
    /// Other nodes took subnets so often while this one was about to that it is worth a word: it goes on,
    /// with longer and longer breaks.
    Races {
        /// Attempts until now.
        attempts: u32,
    },
    /// The node has no IPv6 subnet although its network has some.
    NoIpv6(String),
    /// Our record names other subnets than before, and keeps that of IPv4 if it had one.
    Changed {
        /// The lease as it was.
        from: SubnetKey,
        /// The lease as it will be.
        to: SubnetKey,
    },
    /// Another lease has a subnet that ours or an earlier one has, or the key of an earlier one: that of it
    /// has no traffic.
    Overlap {
        /// The lease.
        key: SubnetKey,
        /// The public address of its node.
        node: IpAddr,
        /// Who has its subnets and its key.
        contested: Contested,
    },
    /// Our record of another public address is moved to the present one, with the same subnet.
    Moved {
        /// The lease.
        key: SubnetKey,
        /// The address that it had.
        from: IpAddr,
    },
    /// A key under the prefix is not a usable lease; it is skipped.
    Skipped {
        /// The key.
        key: String,
        /// Why.
        reason: String,
    },
    /// The lease is given back, or stays as a reservation. Nothing follows.
    Left,
    /// There is no lease (any more), and there will not be one. Nothing follows.
    Lost(Loss),
}

impl From<OwnChange> for Change {
    fn from(change: OwnChange) -> Self {
        Self::Own(change)
    }
}

/// Why a node cannot use the network configuration that the store has. Whoever has written it can
/// mend it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigFault {
    /// There is none under this key, and none is proposed.
    #[error("there is no network configuration under {0}")]
    Missing(String),
    /// It cannot be read.
    #[error("{0}")]
    Invalid(#[from] NetworkConfigError),
    /// It is not the requested one.
    #[error("the store has the network {stored}, but {asked} was requested")]
    OtherNetwork {
        /// What the store has.
        stored: String,
        /// What was asked for.
        asked: String,
    },
    /// Its nodes have IPv4, and this one has no address of that.
    #[error(
        "the network {0} is of IPv4, and this node has no public IPv4 address: use --public-ip, or a network \
         of IPv6 alone"
    )]
    NoPublicIp(Ipv4Net),
    /// Its nodes have IPv6 alone, and this one has no address of that.
    #[error(
        "the network has IPv6 alone, and this node has no public IPv6 address: use --public-ipv6"
    )]
    NoPublicIpv6,
    /// The network's backend is one whose records this node cannot write.
    #[error(
        "the network has the backend '{0}', and this node has vxlan, udp, host-gw, ipip and \
         wireguard only"
    )]
    OtherBackend(String),
}

/// Why a node has no lease.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Loss {
    /// All subnets are leased.
    #[error("all {0} subnets of the network are leased")]
    OutOfSubnets(usize),
    /// All IPv6 subnets are leased.
    #[error("the network has no free IPv6 subnet among the first")]
    OutOfIpv6Subnets,
    /// Others were faster every time.
    #[error("other nodes took each subnet that this node tried")]
    Races,
    /// Another node holds our subnet now, or one that overlaps it.
    #[error("the subnet {key} is now held by the node {holder}")]
    Taken {
        /// The lease.
        key: String,
        /// The public address of its holder.
        holder: IpAddr,
    },
    /// A node with our identity is alive, and had the subnet before us.
    #[error(
        "the node {holder} is alive and has this node's {end} and its subnet {key}: is this state directory a copy of that node's? Then start with an empty one"
    )]
    Cloned {
        /// The lease.
        key: String,
        /// The public address of the other node.
        holder: IpAddr,
        /// What the tunnel's ends of both are known by.
        end: TunnelEnd,
    },
    /// Another writer changed our record again and again.
    #[error(
        "the lease {key} is repeatedly rewritten by another writer: does another node have the \
         public address {public_ip}?"
    )]
    Disputed {
        /// The lease.
        key: String,
        /// Our public address.
        public_ip: IpAddr,
    },
}
