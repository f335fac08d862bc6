//! All peers, as the data path asks for them.
//!
//! Among many peers a packet waits for memory more than for anything else. So what every packet
//! needs is apart from the rest: one small entry for the way out, one for the way in, each found by
//! the peer's number.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use ipnet::{IpNet, Ipv4Net};
use muslin_encap::vxlan::VtepMac;

use crate::peer::{Peer, PeerId, PeerState};
use crate::port::Traffic;
use crate::route::RouteTable;

/// The peers by their numbers, and by where their datagrams come from.
#[derive(Default)]
pub(super) struct Peers {
    peers: Vec<Option<Peer>>,
    outgoing: Vec<Outgoing>,
    incoming: Vec<Incoming>,
    /// The first peer at each outer address: routes to hosts, since those are the smallest there
    /// are. [`Incoming::next`] leads to the others.
    sources: RouteTable<PeerId>,
}

/// What a packet to a peer needs.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(32))]
pub(super) struct Outgoing {
    /// Where its tunnel ends; `None` if there is no such peer.
    address: Option<SocketAddrV4>,
    /// The MAC address of its VTEP.
    pub(super) vtep_mac: Option<VtepMac>,
    sent: Traffic,
}

/// What a packet from a peer needs.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(32))]
struct Incoming {
    received: Traffic,
    subnet: Option<Ipv4Net>,
    /// The next peer with the same outer address.
    next: Option<PeerId>,
}

fn index(id: PeerId) -> usize {
    id.0 as usize
}

/// Half a line of the cache each.
const _: () = assert!(size_of::<Outgoing>() == 32 && size_of::<Incoming>() == 32);

impl Peers {
    /// Adds a peer whose number is free, with this traffic received and sent.
    pub(super) fn insert(&mut self, peer: Peer, received: Traffic, sent: Traffic) {
        let at = index(peer.id);
        if self.peers.len() <= at {
            self.peers.resize(at + 1, None);
            self.outgoing.resize(at + 1, Outgoing::default());
            self.incoming.resize(at + 1, Incoming::default());
        }
        self.outgoing[at] = Outgoing {
            address: Some(peer.address),
            vtep_mac: peer.vtep_mac,
            sent,
        };
        self.incoming[at] = Incoming {
            received,
            subnet: match peer.subnet {
                IpNet::V4(subnet) => Some(subnet),
                IpNet::V6(_) => None,
            },
            next: None,
        };
        let source = IpAddr::V4(*peer.address.ip());
        match self.sharing(source).last() {
            Some(last) => self.incoming[index(last)].next = Some(peer.id),
            None => {
                self.sources.insert(source.into(), peer.id);
            }
        }
        self.peers[at] = Some(peer);
    }

    /// Removes a peer.
    pub(super) fn remove(&mut self, id: PeerId) -> Option<PeerState> {
        let at = index(id);
        let peer = self.peers.get_mut(at)?.take()?;
        let Outgoing { sent, .. } = std::mem::take(&mut self.outgoing[at]);
        let Incoming { received, next, .. } = std::mem::take(&mut self.incoming[at]);
        let source = IpAddr::V4(*peer.address.ip());
        let before = self
            .sharing(source)
            .find(|other| self.incoming[index(*other)].next == Some(id));
        match (before, next) {
            (Some(before), next) => self.incoming[index(before)].next = next,
            (None, Some(next)) => {
                self.sources.insert(source.into(), next);
            }
            (None, None) => {
                self.sources.remove(source.into());
            }
        }
        Some(PeerState {
            peer,
            received,
            sent,
        })
    }

    /// All peers, by their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.peers.iter().flatten()
    }

    /// All peers with what went to and came from them, by their numbers.
    pub(super) fn states(&self) -> impl Iterator<Item = PeerState> {
        self.iter().map(|peer| PeerState {
            peer: peer.clone(),
            received: self.incoming[index(peer.id)].received,
            sent: self.outgoing[index(peer.id)].sent,
        })
    }

    /// What a packet to a peer needs, and where its tunnel ends.
    pub(super) fn outgoing(&self, id: PeerId) -> Option<(&Outgoing, SocketAddr)> {
        let outgoing = self.outgoing.get(index(id))?;
        Some((outgoing, outgoing.address?.into()))
    }

    /// Whether a peer is there, and its tunnel ends at `address`.
    pub(super) fn is_at(&self, id: PeerId, address: SocketAddr) -> bool {
        self.outgoing(id)
            .is_some_and(|(_, theirs)| theirs == address)
    }

    /// Counts a datagram to a peer.
    pub(super) fn count_sent(&mut self, id: PeerId, len: usize) {
        if let Some(outgoing) = self.outgoing.get_mut(index(id)) {
            outgoing.sent.count(len);
        }
    }

    /// Counts a datagram from a peer.
    pub(super) fn count_received(&mut self, id: PeerId, len: usize) {
        if let Some(incoming) = self.incoming.get_mut(index(id)) {
            incoming.received.count(len);
        }
    }

    /// The first peer with this outer address.
    pub(super) fn first_at(&self, source: IpAddr) -> Option<PeerId> {
        self.sources.lookup(source).copied()
    }

    /// Whether `address` is in the lease of a peer that shares the outer address of `first`, the
    /// first one with it.
    pub(super) fn lease_holds(&self, first: PeerId, address: Ipv4Addr) -> bool {
        self.chain(Some(first)).any(|id| {
            let subnet = self.incoming[index(id)].subnet;
            subnet.is_some_and(|subnet| subnet.contains(&address))
        })
    }

    fn sharing(&self, source: IpAddr) -> impl Iterator<Item = PeerId> + '_ {
        self.chain(self.first_at(source))
    }

    fn chain(&self, first: Option<PeerId>) -> impl Iterator<Item = PeerId> + '_ {
        std::iter::successors(first, |id| self.incoming.get(index(*id))?.next)
    }
}
