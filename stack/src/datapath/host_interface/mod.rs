//! The host interface: a TUN device of the machine's own kernel, by which its processes reach pods
//! and pods reach it with their own addresses.
//!
//! As in a flannel node the interface has the subnet's base address (`.0`). What the host sends to
//! this node's pods they get as it is. Other nodes take only what is from this node's lease (muslin by
//! its guard, flannel's kernels by reverse path filtering), so a packet for one of their pods that is
//! from another of the host's addresses goes out from the base address, and what comes back is
//! translated by the table of [`HostFlows`], which all workers of a node share.
//!
//! What egress forbids stays forbidden: a packet for the host that egress' [`Policy`] does not let
//! through passes only if it answers one of the host's own.

mod flows;
mod packet;

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::sync::Arc;

pub use flows::{Full, HostFlows};
pub(crate) use flows::{Way, WayOut};
pub(crate) use packet::{Content, Ends, content, set_destination, set_error, set_source};

use super::egress::{Policy, Protocol};
use super::port::Traffic;
use super::work::Turn;
use crate::addresses::ipv4;

/// The host, as a worker of the node is told of it.
#[derive(Debug, Clone)]
pub struct HostInterface {
    /// The host's own addresses, without loopback and without those in the pod network. Packets from
    /// others come from where the host has forwarded them.
    pub addresses: Vec<IpAddr>,
    /// The host's flows, of all workers.
    pub flows: Arc<HostFlows>,
}

/// The host interface of a worker, with what went through it.
#[derive(Debug, Clone)]
pub struct HostPort {
    /// What it was told.
    pub interface: HostInterface,
    /// What egress lets pods reach.
    pub(super) policy: Policy,
    /// Packets from the host.
    pub received: Traffic,
    /// Packets to the host.
    pub sent: Traffic,
    /// What is left of its turn.
    pub(super) turn: Turn,
}

impl HostPort {
    /// One through which nothing went yet.
    pub(super) fn new(interface: HostInterface, policy: Policy) -> Self {
        Self {
            interface,
            policy,
            received: Traffic::default(),
            sent: Traffic::default(),
            turn: Turn::default(),
        }
    }

    /// Whether this is an address by which pods reach the host, and egress has no other meaning for it.
    pub(super) fn has(&self, address: Ipv4Addr) -> bool {
        self.interface.addresses.contains(&address.into())
            && self.policy.host_loopback() != Some(address)
    }

    /// Whether pods may begin flows to an end of the host's. By the subnet's `base` address they get to
    /// what is at any other, too.
    pub(super) fn may_reach(&self, protocol: Protocol, end: SocketAddrV4, base: Ipv4Addr) -> bool {
        let may = |ip: Ipv4Addr| {
            let checked = self.policy.check(protocol, (ip, end.port()).into());
            checked.is_ok()
        };
        let mut all = self.interface.addresses.iter().copied().filter_map(ipv4);
        may(*end.ip()) && (*end.ip() != base || all.all(may))
    }
}
