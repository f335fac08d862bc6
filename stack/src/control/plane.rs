//! What follows from changes of leases: a machine that turns them into operations on the tables of a
//! node.
//!
//! The caller gives it each [`Change`] that a source of leases reports, does what it polls, and sees
//! to the changes that are given back: those that concern the process as a whole. Before the node has
//! its lease and a data path the machine only takes note.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};

use super::peers::{Known, Peers, Unusable};
use crate::control::lease::{Backend, Change, SubnetKey};
use crate::control::names::Names;
use crate::datapath::node::Node;
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
        subnet: Ipv4Net,
        /// Its public address.
        public_ip: Ipv4Addr,
        /// Why.
        unusable: Unusable,
    },
    /// A node's lease has ended.
    RemovePeer {
        /// Its identity.
        id: PeerId,
        /// The lease.
        subnet: Ipv4Net,
        /// Its public address.
        public_ip: Ipv4Addr,
    },
}

impl Operation {
    /// Does it to a data path.
    pub fn apply_to_node(&self, node: &mut Node) {
        match self {
            Self::SetPeer(peer) => node.set_peer(peer.clone()),
            Self::RefusePeer { id, .. } | Self::RemovePeer { id, .. } => {
                node.remove_peer(*id);
            }
        }
    }

    /// Does it to the names of pods, which count while their node has a lease.
    pub fn apply_to_names(&self, names: &mut Names) {
        match self {
            Self::SetPeer(Peer {
                subnet: IpNet::V4(subnet),
                ..
            })
            | Self::RefusePeer { subnet, .. } => names.lease(*subnet),
            // Names of pods have IPv4 addresses.
            Self::SetPeer(_) => {}
            Self::RemovePeer { subnet, .. } => names.release(*subnet),
        }
    }
}

/// What a node knows of the leases of others, and what its tables do not have of that yet.
#[derive(Debug, Default)]
pub struct ControlPlane {
    /// How the network's nodes encapsulate, once this node has its lease.
    backend: Option<Backend>,
    peers: Peers,
    operations: VecDeque<Operation>,
}

impl ControlPlane {
    /// Takes a change of the leases. One that concerns more than tables is given back.
    #[must_use]
    pub fn take(&mut self, change: Change) -> Option<Change> {
        match change {
            Change::Peer(key, record) => {
                let known = self.peers.remember(key, record);
                if let Some(backend) = &self.backend {
                    self.operations.push_back(set_peer(key, known, backend));
                }
                None
            }
            Change::PeerGone(key) => {
                let gone = self.peers.forget(key).filter(|_| self.backend.is_some());
                self.operations
                    .extend(gone.map(|known| Operation::RemovePeer {
                        id: known.id,
                        subnet: key.ipv4,
                        public_ip: known.record.public_ip,
                    }));
                None
            }
            Change::AwaitsConfig(_)
            | Change::Configured(_)
            | Change::Acquired(_)
            | Change::Renewed
            | Change::Disputed(_)
            | Change::Replaced { .. }
            | Change::Moved { .. }
            | Change::Skipped { .. }
            | Change::Left
            | Change::Lost(_) => Some(change),
        }
    }

    /// The node has its lease and a data path in a network of this backend, whose tables are empty.
    pub fn start(&mut self, backend: Backend) {
        let known = self.peers.iter();
        let operations = known.map(|(key, known)| set_peer(*key, known, &backend));
        self.operations = operations.collect();
        self.backend = Some(backend);
    }

    /// The next operation that the tables need.
    pub fn poll(&mut self) -> Option<Operation> {
        self.operations.pop_front()
    }

    /// The leases of others.
    #[must_use]
    pub fn peers(&self) -> &Peers {
        &self.peers
    }
}

fn set_peer(key: SubnetKey, known: &Known, backend: &Backend) -> Operation {
    match known.peer(key, backend) {
        Ok(peer) => Operation::SetPeer(peer),
        Err(unusable) => Operation::RefusePeer {
            id: known.id,
            subnet: key.ipv4,
            public_ip: known.record.public_ip,
            unusable,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::lease::LeaseRecord;
    use crate::control::names::{Found, NodeRecord, PodRecord};

    const UDP: Backend = Backend::Udp { port: 8285 };

    fn key(third: u8) -> SubnetKey {
        format!("10.1.{third}.0-24").parse().unwrap()
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
            if peer.subnet == key(third).ipv4.into() && peer.address.ip().octets()[3] == last)
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
        plane.start(UDP);
        let operations = polled(&mut plane);
        assert!(is_set(&operations[0], 1, 7), "{operations:?}");
        assert_eq!(operations.len(), 1);
    }

    #[test]
    fn each_change_behind_the_start_is_an_operation() {
        let mut plane = ControlPlane::default();
        plane.start(UDP);
        let operations = take(&mut plane, [Change::Peer(key(1), record(1))]);
        assert!(is_set(&operations[0], 1, 1), "{operations:?}");
        let gone = Operation::RemovePeer {
            id: PeerId(0),
            subnet: key(1).ipv4,
            public_ip: [192, 168, 0, 1].into(),
        };
        assert_eq!(take(&mut plane, [Change::PeerGone(key(1))]), [gone]);
        assert_eq!(take(&mut plane, [Change::PeerGone(key(1))]), []);
    }

    #[test]
    fn a_node_that_becomes_unusable_is_no_peer_and_keeps_its_identity() {
        let mut plane = ControlPlane::default();
        plane.start(UDP);
        take(&mut plane, [Change::Peer(key(1), record(1))]);
        let nowhere = LeaseRecord::udp(Ipv4Addr::UNSPECIFIED);
        let refused = Operation::RefusePeer {
            id: PeerId(0),
            subnet: key(1).ipv4,
            public_ip: Ipv4Addr::UNSPECIFIED,
            unusable: Unusable::NoAddress,
        };
        assert_eq!(take(&mut plane, [Change::Peer(key(1), nowhere)]), [refused]);
        let operations = take(&mut plane, [Change::Peer(key(1), record(1))]);
        assert!(matches!(&operations[..], [Operation::SetPeer(peer)] if peer.id == PeerId(0)));
    }

    #[test]
    fn what_concerns_the_process_is_given_back() {
        let mut plane = ControlPlane::default();
        for change in [Change::Acquired(key(1)), Change::Renewed, Change::Left] {
            assert_eq!(plane.take(change.clone()), Some(change));
        }
    }

    #[test]
    fn names_count_while_their_node_has_a_lease() {
        let mut names = Names::default();
        names.set(NodeRecord {
            node: "b".parse().unwrap(),
            subnet: key(1).ipv4,
            pods: vec![PodRecord {
                name: "web".parse().unwrap(),
                address: [10, 1, 1, 2].into(),
            }],
            stopped: false,
        });
        let mut plane = ControlPlane::default();
        plane.start(UDP);
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
}
