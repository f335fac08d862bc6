//! All peers, as the data path asks for them.
//!
//! Among many peers a packet waits for memory more than for anything else. So what every packet
//! needs is apart from the rest: one small entry for the way out, one for the way in, each found by
//! the peer's number.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::num::NonZeroU32;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::VtepMac;
use smoltcp::time::Instant;

use crate::addresses::socket_ipv4;
use crate::datapath::peer::{Path, Peer, PeerId, PeerState};
use crate::datapath::port::Traffic;
use crate::datapath::route::RouteTable;

/// Where the tunnel of a peer ends to which no IPv4 packet gets.
const NOWHERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);

/// The peers by their numbers, and by where their datagrams come from.
#[derive(Clone, Default)]
pub(super) struct Peers {
    peers: Vec<Option<Peer>>,
    outgoing: Vec<Option<Outgoing>>,
    incoming: Vec<Option<Incoming>>,
    /// What is longer of IPv6, beside the entries above, as far as the last peer of IPv6.
    ends_v6: Vec<Option<EndV6>>,
    /// The first peer at each outer address: routes to hosts, since those are the smallest there
    /// are. [`Incoming::next`] leads to the others.
    sources: RouteTable<PeerId>,
}

/// What a packet to a peer needs.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
pub(super) struct Outgoing {
    sent: Traffic,
    /// Where its tunnel ends; its host is there in any case.
    pub(super) address: SocketAddrV4,
    /// The MAC address of its VTEP.
    pub(super) vtep_mac: Option<VtepMac>,
    pub(super) path: Path,
    /// The checksums that it takes from the tunnel.
    pub(super) checksums: Checksums,
}

/// What a packet from a peer needs.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
struct Incoming {
    received: Traffic,
    /// The next peer with the same outer address.
    next: Option<Link>,
    /// When the last datagram or frame came.
    heard: Option<Heard>,
    /// The subnet that is routed to it.
    routed: Option<Ipv4Net>,
    /// The UDP port where its tunnel ends.
    port: u16,
}

/// Where the tunnel of a peer of IPv6 ends, and the subnet that is routed to it.
#[derive(Debug, Clone, Copy)]
struct EndV6 {
    address: SocketAddrV6,
    routed: Option<Ipv6Net>,
}

/// What an IPv6 packet to a peer needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct OutgoingV6 {
    /// Where its tunnel ends; its host is there in any case.
    pub(super) address: SocketAddrV6,
    /// The MAC address of its VTEP.
    pub(super) vtep_mac: Option<VtepMac>,
    pub(super) path: Path,
    /// The checksums that it takes from the tunnel.
    pub(super) checksums: Checksums,
}

/// A peer's number that leaves room for there being none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Link(NonZeroU32);

impl Link {
    fn to(id: PeerId) -> Option<Self> {
        NonZeroU32::new(id.0.wrapping_add(1)).map(Self)
    }

    const fn id(self) -> PeerId {
        PeerId(self.0.get() - 1)
    }
}

/// A time in sixteenths of a second, from one on, which suffice for eight years.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Heard(NonZeroU32);

impl Heard {
    const UNIT: i64 = 1_000_000 / 16;

    fn at(now: Instant) -> Self {
        let units = u32::try_from(now.total_micros() / Self::UNIT).unwrap_or(u32::MAX);
        Self(NonZeroU32::MIN.saturating_add(units))
    }

    fn time(self) -> Instant {
        Instant::from_micros(i64::from(self.0.get() - 1) * Self::UNIT)
    }
}

/// Half a line of the cache each.
const _: () = assert!(size_of::<Option<Outgoing>>() == 32 && size_of::<Option<Incoming>>() == 32);

fn index(id: PeerId) -> usize {
    id.0 as usize
}

impl Peers {
    /// Adds a peer whose number is free.
    pub(super) fn insert(&mut self, state: PeerState) {
        let PeerState {
            peer,
            path,
            received,
            sent,
            heard,
        } = state;
        let at = index(peer.id);
        if self.peers.len() <= at {
            self.peers.resize(at + 1, None);
            self.outgoing.resize(at + 1, None);
            self.incoming.resize(at + 1, None);
        }
        self.outgoing[at] = Some(Outgoing {
            sent,
            address: socket_ipv4(peer.address).unwrap_or(NOWHERE),
            vtep_mac: peer.vtep_mac,
            path,
            checksums: peer.checksums,
        });
        self.incoming[at] = Some(Incoming {
            received,
            next: None,
            heard: heard.map(Heard::at),
            routed: None,
            port: peer.address.port(),
        });
        if let SocketAddr::V6(address) = peer.address {
            if self.ends_v6.len() <= at {
                self.ends_v6.resize(at + 1, None);
            }
            let routed = None;
            self.ends_v6[at] = Some(EndV6 { address, routed });
        }
        let source = peer.address.ip();
        match self.chain(self.first_at(source)).last() {
            Some(last) => self.set_next(last, Link::to(peer.id)),
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
        let Outgoing { sent, path, .. } = self.outgoing[at].take()?;
        let gone = self.incoming[at].take()?;
        if let Some(end) = self.ends_v6.get_mut(at) {
            *end = None;
        }
        let source = peer.address.ip();
        let before = self
            .chain(self.first_at(source))
            .find(|other| self.next(*other) == Some(id));
        match (before, gone.next) {
            (Some(before), next) => self.set_next(before, next),
            (None, Some(next)) => {
                self.sources.insert(source.into(), next.id());
            }
            (None, None) => {
                self.sources.remove(source.into());
            }
        }
        Some(PeerState {
            peer,
            path,
            received: gone.received,
            sent,
            heard: gone.heard.map(Heard::time),
        })
    }

    /// All peers, by their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.peers.iter().flatten()
    }

    /// All peers with what went to and came from them, by their numbers.
    pub(super) fn states(&self) -> impl Iterator<Item = PeerState> {
        let all = self.peers.iter().zip(&self.outgoing).zip(&self.incoming);
        all.filter_map(|((peer, outgoing), incoming)| {
            let (outgoing, incoming) = (outgoing.as_ref()?, incoming.as_ref()?);
            Some(PeerState {
                peer: peer.clone()?,
                path: outgoing.path,
                received: incoming.received,
                sent: outgoing.sent,
                heard: incoming.heard.map(Heard::time),
            })
        })
    }

    /// Decides anew how packets get to each peer.
    pub(super) fn set_paths(&mut self, path: impl Fn(&Peer) -> Path) {
        for (peer, outgoing) in self.peers.iter().zip(&mut self.outgoing) {
            if let (Some(peer), Some(outgoing)) = (peer, outgoing) {
                outgoing.path = path(peer);
            }
        }
    }

    /// Where the tunnel of a peer ends.
    pub(super) fn address(&self, id: PeerId) -> Option<SocketAddr> {
        let peer = self.peers.get(index(id))?.as_ref();
        peer.map(|peer| peer.address)
    }

    /// What a packet to a peer needs.
    #[inline]
    pub(super) fn outgoing(&self, id: PeerId) -> Option<&Outgoing> {
        self.outgoing.get(index(id))?.as_ref()
    }

    /// The same of an IPv6 packet.
    #[inline]
    pub(super) fn outgoing_v6(&self, id: PeerId) -> Option<OutgoingV6> {
        let end = self.ends_v6.get(index(id))?.as_ref()?;
        let outgoing = self.outgoing(id)?;
        Some(OutgoingV6 {
            address: end.address,
            vtep_mac: outgoing.vtep_mac,
            path: outgoing.path,
            checksums: outgoing.checksums,
        })
    }

    /// Counts a datagram or frame to a peer.
    #[inline]
    pub(super) fn count_sent(&mut self, id: PeerId, len: usize) {
        if let Some(Some(outgoing)) = self.outgoing.get_mut(index(id)) {
            outgoing.sent.count(len);
        }
    }

    /// Counts a datagram or frame from a peer.
    #[inline]
    pub(super) fn count_received(&mut self, now: Instant, id: PeerId, len: usize) {
        if let Some(Some(incoming)) = self.incoming.get_mut(index(id)) {
            incoming.received.count(len);
            incoming.heard = Some(Heard::at(now));
        }
    }

    /// Notes what is routed to a peer, if anything.
    pub(super) fn set_routed(&mut self, id: PeerId, subnet: Option<IpNet>) {
        if let Some(Some(incoming)) = self.incoming.get_mut(index(id)) {
            incoming.routed = match subnet {
                Some(IpNet::V4(subnet)) => Some(subnet),
                Some(IpNet::V6(_)) | None => None,
            };
        }
        if let Some(Some(end)) = self.ends_v6.get_mut(index(id)) {
            end.routed = match subnet {
                Some(IpNet::V6(subnet)) => Some(subnet),
                Some(IpNet::V4(_)) | None => None,
            };
        }
    }

    /// Whether `address` is in the subnet that is routed to a peer. A smaller one within it may be
    /// routed to another.
    #[inline]
    pub(super) fn is_routed(&self, id: PeerId, address: Ipv4Addr) -> bool {
        let subnet = self.incoming(id).and_then(|peer| peer.routed);
        subnet.is_some_and(|subnet| subnet.contains(&address))
    }

    /// The same in IPv6.
    #[inline]
    pub(super) fn is_routed_v6(&self, id: PeerId, address: Ipv6Addr) -> bool {
        let end = self.ends_v6.get(index(id)).and_then(Option::as_ref);
        end.and_then(|end| end.routed)
            .is_some_and(|subnet| subnet.contains(&address))
    }

    /// The UDP port where the tunnel of a peer ends, if the peer is known.
    #[inline]
    pub(super) fn port(&self, id: PeerId) -> Option<u16> {
        self.incoming(id).map(|peer| peer.port)
    }

    #[inline]
    fn incoming(&self, id: PeerId) -> Option<&Incoming> {
        self.incoming.get(index(id))?.as_ref()
    }

    /// The first peer with this outer address.
    #[inline]
    pub(super) fn first_at(&self, source: IpAddr) -> Option<PeerId> {
        self.sources.lookup(source).copied()
    }

    /// Whether two peers have the same outer address.
    pub(super) fn share_address(&self, one: PeerId, other: PeerId) -> bool {
        let address = |id| self.address(id).map(|it| it.ip());
        one == other || address(one).is_some() && address(one) == address(other)
    }

    /// A peer and those behind it with the same outer address.
    fn chain(&self, first: Option<PeerId>) -> impl Iterator<Item = PeerId> + '_ {
        std::iter::successors(first, |id| self.next(*id))
    }

    fn next(&self, id: PeerId) -> Option<PeerId> {
        self.incoming(id)?.next.map(Link::id)
    }

    fn set_next(&mut self, id: PeerId, next: Option<Link>) {
        if let Some(Some(incoming)) = self.incoming.get_mut(index(id)) {
            incoming.next = next;
        }
    }
}
