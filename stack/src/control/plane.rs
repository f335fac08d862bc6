//! What follows from changes of leases and of the underlay: a machine that turns them into operations
//! on the tables of a node.
//!
//! The caller gives it each [`Change`] that a source of leases reports, does what it polls, and sees
//! to what is given back: changes of the node's own lease, which concern the process as a whole.
//! Before the node has its lease and a data path the machine only takes note.

use std::collections::VecDeque;
use std::net::IpAddr;

use ipnet::IpNet;
use muslin_encap::mtu::Mtu;
use smoltcp::time::Instant;

use super::peers::{Here, Known, Peers, Unusable};
use super::tunnel::TunnelPlan;
use crate::control::lease::{Change, NetworkConfig, OwnChange, SubnetKey};
use crate::control::names::Names;
use crate::datapath::Datapath;
use crate::datapath::filter::Filter;
use crate::datapath::node::Node;
use crate::datapath::observe::Observer;
use crate::datapath::peer::{Peer, PeerId};

/// What a node's tables are to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// A peer is new or has changed.
    SetPeer(Peer),
    /// A node with a lease is not a peer (any more): nothing can be sent to it.
    RefusePeer {
        /// Its identity.
        id: PeerId,
        /// Its lease.
        subnet: IpNet,
        /// Its public address.
        public_ip: IpAddr,
        /// Why.
        unusable: Unusable,
    },
    /// A node's lease has ended.
    RemovePeer {
        /// Its identity.
        id: PeerId,
        /// The lease.
        subnet: IpNet,
        /// Its public address.
        public_ip: IpAddr,
    },
    /// Pods have another MTU.
    SetMtu(Mtu),
}

impl Operation {
    /// Does it to a node. One that has a data path around it is changed with that: [`Self::apply`].
    pub fn apply_to_node<O: Observer, F: Filter>(&self, node: &mut Node<O, F>) {
        match self {
            Self::SetMtu(mtu) => node.set_mtu(*mtu),
            Self::SetPeer(peer) => node.set_peer(peer.clone()),
            Self::RefusePeer { id, .. } | Self::RemovePeer { id, .. } => {
                node.remove_peer(*id);
            }
        }
    }

    /// Does it to a data path.
    pub fn apply<O: Observer, F: Filter>(&self, path: &mut Datapath<O, F>, now: Instant) {
        match self {
            Self::SetMtu(mtu) => path.set_mtu(*mtu, now),
            other => other.apply_to_node(path.node_mut()),
        }
    }

    /// Does it to the names of pods, which count while their node has a lease.
    pub fn apply_to_names(&self, names: &mut Names) {
        match self {
            Self::SetPeer(Peer { subnet, .. }) | Self::RefusePeer { subnet, .. } => {
                names.lease(*subnet);
            }
            Self::RemovePeer { subnet, .. } => names.release(*subnet),
            Self::SetMtu(_) => {}
        }
    }
}

/// What a node knows of the leases of others, and what its tables do not have of that yet.
#[derive(Debug, Default)]
pub struct ControlPlane {
    /// The network's configuration, and what it means for this node, once it has its lease.
    network: Option<Network>,
    peers: Peers,
    operations: VecDeque<Operation>,
}

#[derive(Debug)]
struct Network {
    config: NetworkConfig,
    plan: TunnelPlan,
    /// Whether the node has an IPv6 subnet.
    has_ipv6: bool,
    here: Here,
}

impl Network {
    /// What the tables need of a lease: a peer for each IP version that both nodes have.
    fn set_peers(&self, key: SubnetKey, known: &Known) -> impl Iterator<Item = Operation> {
        let has_ipv4 = key.ipv4().is_some();
        let ipv4 = has_ipv4.then(|| {
            set_peer(
                known.id,
                key.first(),
                known,
                known.peer(key, &self.config, &self.here),
            )
        });
        let ipv6 = known.id_v6.zip(key.ipv6()).filter(|_| self.has_ipv6);
        let ipv6 = ipv6.and_then(|(id, subnet)| {
            Some(set_peer(
                id,
                subnet.into(),
                known,
                known.peer_v6(key, &self.config, &self.here)?,
            ))
        });
        ipv4.into_iter().chain(ipv6)
    }

    /// The same of one that has ended.
    fn remove_peers(&self, key: SubnetKey, known: &Known) -> impl Iterator<Item = Operation> {
        let public_ip = known.record.node_address();
        let ipv4 = key.ipv4().map(|subnet| (known.id, IpNet::V4(subnet)));
        let ipv6 = known.id_v6.zip(key.ipv6().map(IpNet::V6));
        let ended = ipv4.into_iter().chain(ipv6.filter(|_| self.has_ipv6));
        ended.map(move |(id, subnet)| Operation::RemovePeer {
            id,
            subnet,
            public_ip,
        })
    }
}

impl ControlPlane {
    /// Takes a change of the leases. One of the node's own is given back.
    #[must_use]
    pub fn take(&mut self, change: Change) -> Option<OwnChange> {
        match change {
            Change::Peer(key, record) => {
                let known = self.peers.remember(key, record);
                if let Some(network) = &self.network {
                    self.operations.extend(network.set_peers(key, known));
                }
                None
            }
            Change::Contested(key, contested) => {
                let known = self.peers.contest(key, contested);
                if let (Some(known), Some(network)) = (known, &self.network) {
                    self.operations.extend(network.set_peers(key, known));
                }
                None
            }
            Change::PeerGone(key) => {
                let gone = self.peers.forget(key);
                if let (Some(known), Some(network)) = (gone, &self.network) {
                    self.operations.extend(network.remove_peers(key, &known));
                }
                None
            }
            Change::Own(change) => Some(change),
        }
    }

    /// The node has this lease and a data path, whose tables are empty, in a network of this
    /// configuration, and is known there by this.
    pub fn start(&mut self, config: NetworkConfig, plan: TunnelPlan, own: SubnetKey, here: Here) {
        let network = Network {
            config,
            plan,
            has_ipv6: own.ipv6().is_some(),
            here,
        };
        let known = self.peers.iter();
        let operations = known.flat_map(|(key, known)| network.set_peers(*key, known));
        self.operations = operations.collect();
        self.network = Some(network);
    }

    /// How packets travel as things are now; `None` before the node has its lease.
    #[must_use]
    pub fn plan(&self) -> Option<TunnelPlan> {
        self.network.as_ref().map(|network| network.plan)
    }

    /// The underlay is another one, or has another MTU ([`TunnelPlan::on`]).
    pub fn set_plan(&mut self, plan: TunnelPlan) {
        let Some(network) = &mut self.network else {
            return;
        };
        if std::mem::replace(&mut network.plan, plan).mtu != plan.mtu {
            self.operations.push_back(Operation::SetMtu(plan.mtu));
        }
    }

    /// The next operation that the tables need.
    pub fn poll(&mut self) -> Option<Operation> {
        self.operations.pop_front()
    }

    /// How many nodes are two peers of the data path, one for each IP version.
    #[must_use]
    pub fn dual_peers(&self) -> usize {
        let Some(network) = self.network.as_ref().filter(|it| it.has_ipv6) else {
            return 0;
        };
        let is_dual = |(key, known): &(&SubnetKey, &Known)| {
            let (config, here) = (&network.config, &network.here);
            let ipv6 = known.peer_v6(**key, config, here);
            ipv6.is_some_and(|peer| peer.is_ok()) && known.peer(**key, config, here).is_ok()
        };
        self.peers.iter().filter(is_dual).count()
    }

    /// What the node knows of itself, once it has its lease.
    #[must_use]
    pub fn here(&self) -> Here {
        let network = self.network.as_ref();
        network.map_or_else(Here::default, |network| network.here)
    }

    /// The leases of others.
    #[must_use]
    pub fn peers(&self) -> &Peers {
        &self.peers
    }
}

fn set_peer(id: PeerId, subnet: IpNet, known: &Known, peer: Result<Peer, Unusable>) -> Operation {
    match peer {
        Ok(peer) => Operation::SetPeer(peer),
        Err(unusable) => Operation::RefusePeer {
            id,
            subnet,
            public_ip: known.record.node_address(),
            unusable,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use muslin_encap::tunnel::vxlan::VtepMac;

    use super::*;
    use crate::control::lease::{Backend, LeaseRecord};
    use crate::control::names::{Found, NodeRecord, PodRecord};

    const UDP: Backend = Backend::Udp { port: 8285 };

    fn config() -> NetworkConfig {
        NetworkConfig::parse(r#"{"Network": "10.1.0.0/16"}"#).unwrap()
    }

    fn key(third: u8) -> SubnetKey {
        format!("10.1.{third}.0-24").parse().unwrap()
    }

    fn plan() -> TunnelPlan {
        let vtep = VtepMac::from_random([7; 6]);
        TunnelPlan::new(&UDP, vtep, None, 1500).unwrap()
    }

    fn record(last: u8) -> LeaseRecord {
        LeaseRecord::udp([192, 168, 0, last].into())
    }

    fn polled(plane: &mut ControlPlane) -> Vec<Operation> {
        std::iter::from_fn(|| plane.poll()).collect()
    }

    /// Gives it changes of which nothing comes back.
    fn take(plane: &mut ControlPlane, changes: impl IntoIterator<Item = Change>) -> Vec<Operation> {
        for change in changes {
            assert_eq!(plane.take(change), None);
        }
        polled(plane)
    }

    fn is_set(operation: &Operation, third: u8, last: u8) -> bool {
        matches!(operation, Operation::SetPeer(peer)
            if peer.subnet == key(third).first() && peer.address.ip() == record(last).public_ip)
    }

    #[test]
    fn what_is_known_before_the_start_is_done_at_the_start() {
        let mut plane = ControlPlane::default();
        let before = [
            Change::Peer(key(1), record(1)),
            Change::Peer(key(2), record(2)),
            Change::Peer(key(1), record(7)),
            Change::PeerGone(key(2)),
        ];
        assert_eq!(take(&mut plane, before), []);
        plane.start(config(), plan(), key(9), Here::default());
        let operations = polled(&mut plane);
        assert!(is_set(&operations[0], 1, 7), "{operations:?}");
        assert_eq!(operations.len(), 1);
    }

    #[test]
    fn each_change_behind_the_start_is_an_operation() {
        let mut plane = ControlPlane::default();
        plane.start(config(), plan(), key(9), Here::default());
        let operations = take(&mut plane, [Change::Peer(key(1), record(1))]);
        assert!(is_set(&operations[0], 1, 1), "{operations:?}");
        let gone = Operation::RemovePeer {
            id: PeerId(0),
            subnet: key(1).first(),
            public_ip: [192, 168, 0, 1].into(),
        };
        assert_eq!(take(&mut plane, [Change::PeerGone(key(1))]), [gone]);
        assert_eq!(take(&mut plane, [Change::PeerGone(key(1))]), []);
    }

    #[test]
    fn a_node_that_becomes_unusable_is_no_peer_and_keeps_its_identity() {
        let mut plane = ControlPlane::default();
        plane.start(config(), plan(), key(9), Here::default());
        take(&mut plane, [Change::Peer(key(1), record(1))]);
        let nowhere = LeaseRecord::udp(Ipv4Addr::UNSPECIFIED);
        let refused = Operation::RefusePeer {
            id: PeerId(0),
            subnet: key(1).first(),
            public_ip: Ipv4Addr::UNSPECIFIED.into(),
            unusable: Unusable::NoAddress,
        };
        assert_eq!(take(&mut plane, [Change::Peer(key(1), nowhere)]), [refused]);
        let operations = take(&mut plane, [Change::Peer(key(1), record(1))]);
        assert!(matches!(&operations[..], [Operation::SetPeer(peer)] if peer.id == PeerId(0)));
    }

    #[test]
    fn what_concerns_the_process_is_given_back() {
        let mut plane = ControlPlane::default();
        for own in [
            OwnChange::Acquired(key(1)),
            OwnChange::Renewed,
            OwnChange::Left,
        ] {
            assert_eq!(plane.take(own.clone().into()), Some(own));
        }
        assert_eq!(polled(&mut plane), []);
    }

    #[test]
    fn names_count_while_their_node_has_a_lease() {
        let mut names = Names::default();
        names.set(NodeRecord {
            node: "b".parse().unwrap(),
            subnet: key(1).first().into(),
            pods: vec![PodRecord {
                name: "web".parse().unwrap(),
                address: Ipv4Addr::new(10, 1, 1, 2).into(),
            }],
            stopped: false,
        });
        let mut plane = ControlPlane::default();
        plane.start(config(), plan(), key(9), Here::default());
        let is_found = |names: &Names| matches!(names.find("web"), Found::Addresses(_));
        for (change, expected) in [
            (Change::Peer(key(1), record(1)), true),
            (Change::Peer(key(1), record(0)), true),
            (Change::PeerGone(key(1)), false),
        ] {
            for operation in take(&mut plane, [change]) {
                operation.apply_to_names(&mut names);
            }
            assert_eq!(is_found(&names), expected);
        }
    }

    #[test]
    fn another_mtu_of_the_underlay_is_one_for_pods() {
        let mut plane = ControlPlane::default();
        plane.set_plan(plan());
        assert_eq!(polled(&mut plane), [], "there is no data path yet");
        plane.start(config(), plan(), key(9), Here::default());
        plane.set_plan(plan());
        assert_eq!(polled(&mut plane), []);
        let jumbo = plan().on(9000).unwrap();
        plane.set_plan(jumbo);
        assert_eq!(polled(&mut plane), [Operation::SetMtu(jumbo.mtu)]);
        assert_eq!(plane.plan(), Some(jumbo));
    }
}
