//! The nodes that have a key, and how they are found: by peer, by key, and by what is in a message.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time;

use foldhash::fast::FixedState;
use muslin_encap::tunnel::wireguard::PublicKey;
use sanstun::{Tunnel, TunnelId};
use smoltcp::time::Instant;
use smoltcp::wire::IpVersion;

use super::{LinkState, Staged};
use crate::datapath::peer::PeerId;

/// Packets that wait for one node's session, as in Linux, and bytes of them.
const STAGED_PACKETS: usize = 128;
const STAGED_BYTES: usize = 256 * 1024;
/// For how long a session seals: some seconds less than it opens, so that what is on its way still arrives.
const SEALS: time::Duration = time::Duration::from_secs(170);

/// The number of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LinkId(u32);

/// A device's number, and a key there.
pub(super) type Key = (usize, PublicKey);

/// A node that has a key, in one device.
pub(super) struct Link {
    pub(super) id: LinkId,
    key: Key,
    /// There is none if the key is no point of the curve, or all that were there have expired.
    pub(super) tunnel: Option<Tunnel>,
    /// Where datagrams go.
    pub(super) endpoint: SocketAddr,
    /// Where its lease says.
    pub(super) leased: SocketAddr,
    /// Its peers, by IP version of what pods send.
    peers: [Option<PeerId>; 2],
    pub(super) staged: Waiting,
    /// When the last handshake was over.
    pub(super) handshake: Option<Instant>,
    /// When to begin one without a packet, if keepalives are wanted.
    pub(super) call_at: Instant,
}

/// Packets that wait, the oldest first.
#[derive(Default)]
pub(super) struct Waiting {
    packets: VecDeque<(PeerId, Staged)>,
    bytes: usize,
}

impl Waiting {
    pub(super) fn take(&mut self) -> impl Iterator<Item = (PeerId, Staged)> + use<> {
        self.bytes = 0;
        std::mem::take(&mut self.packets).into_iter()
    }

    /// Drops what is for a peer, and says how much that is.
    fn forget(&mut self, peer: PeerId) -> usize {
        let before = self.packets.len();
        self.packets.retain(|(owner, _)| *owner != peer);
        self.bytes = self.packets.iter().map(|(_, it)| it.packet.len()).sum();
        before - self.packets.len()
    }

    /// Adds a packet, and says how many others were lost for it.
    fn push(&mut self, peer: PeerId, staged: Staged) -> usize {
        self.bytes += staged.packet.len();
        self.packets.push_back((peer, staged));
        let mut lost = 0;
        while self.packets.len() > STAGED_PACKETS || self.bytes > STAGED_BYTES {
            let Some((_, oldest)) = self.packets.pop_front() else {
                break;
            };
            self.bytes -= oldest.packet.len();
            lost += 1;
        }
        lost
    }
}

const fn place(version: IpVersion) -> usize {
    match version {
        IpVersion::Ipv4 => 0,
        IpVersion::Ipv6 => 1,
    }
}

impl Link {
    pub(super) fn new(key: Key, tunnel: Option<Tunnel>, leased: SocketAddr, now: Instant) -> Self {
        Self {
            id: LinkId(0),
            key,
            tunnel,
            endpoint: leased,
            leased,
            peers: [None; 2],
            staged: Waiting::default(),
            handshake: None,
            call_at: now,
        }
    }

    pub(super) const fn key(&self) -> Key {
        self.key
    }

    /// The peer whose pods send packets of an IP version.
    pub(super) const fn peer(&self, version: IpVersion) -> Option<PeerId> {
        self.peers[place(version)]
    }

    /// Whether packets can be sealed.
    pub(super) fn has_session(&self, at: time::Instant) -> bool {
        let tunnel = self.tunnel.as_ref();
        let age = tunnel.and_then(|it| it.time_since_last_handshake(at));
        age.is_some_and(|age| age < SEALS)
    }

    /// Takes where an authentic message came from for where the node is now (the WireGuard paper, section
    /// 2.1).
    pub(super) const fn heard(&mut self, source: SocketAddr) {
        self.endpoint = source;
    }

    /// The lease says where the node is. It says so again whenever it is renewed, which is no news.
    fn set_leased(&mut self, leased: SocketAddr) {
        if self.leased != leased {
            self.leased = leased;
            self.endpoint = leased;
        }
    }

    /// Keeps a packet, and says how many others were lost for it.
    pub(super) fn stage(&mut self, peer: PeerId, staged: Staged) -> usize {
        self.staged.push(peer, staged)
    }

    pub(super) fn has_staged(&self) -> bool {
        !self.staged.packets.is_empty()
    }

    fn states(&self) -> impl Iterator<Item = LinkState> + '_ {
        self.peers.iter().flatten().map(|peer| {
            let is_its = |(owner, _): &&(PeerId, Staged)| owner == peer;
            LinkState {
                peer: *peer,
                public_key: self.key.1,
                endpoint: self.endpoint,
                roamed: self.endpoint != self.leased,
                handshake: self.handshake,
                staged: self.staged.packets.iter().filter(is_its).count(),
            }
        })
    }
}

/// All links.
#[derive(Default)]
pub(super) struct Links {
    all: BTreeMap<LinkId, Link>,
    next: u32,
    /// By the peer's number.
    by_peer: Vec<Option<LinkId>>,
    by_key: BTreeMap<Key, LinkId>,
    /// The numbers are this node's own choice, so that nobody can make them collide.
    by_tunnel: HashMap<(usize, TunnelId), LinkId, FixedState>,
}

impl Links {
    pub(super) fn get_mut(&mut self, id: LinkId) -> Option<&mut Link> {
        self.all.get_mut(&id)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Link> {
        self.all.values_mut()
    }

    fn id_of_peer(&self, peer: PeerId) -> Option<LinkId> {
        *self.by_peer.get(peer.0 as usize)?
    }

    pub(super) fn of_peer(&self, peer: PeerId) -> Option<&Link> {
        self.all.get(&self.id_of_peer(peer)?)
    }

    pub(super) fn of_peer_mut(&mut self, peer: PeerId) -> Option<&mut Link> {
        let id = self.id_of_peer(peer)?;
        self.all.get_mut(&id)
    }

    pub(super) fn by_key(&self, key: Key) -> Option<LinkId> {
        self.by_key.get(&key).copied()
    }

    pub(super) fn by_tunnel(&self, device: usize, tunnel: TunnelId) -> Option<LinkId> {
        self.by_tunnel.get(&(device, tunnel)).copied()
    }

    pub(super) fn states(&self) -> impl Iterator<Item = LinkState> + '_ {
        self.all.values().flat_map(Link::states)
    }

    /// Adds a link with its first peer.
    pub(super) fn insert(&mut self, mut link: Link, peer: (PeerId, IpVersion)) {
        let id = LinkId(self.next);
        self.next = self.next.wrapping_add(1);
        link.id = id;
        let (key, leased) = (link.key, link.leased);
        let tunnel = link.tunnel.take();
        self.by_key.insert(key, id);
        self.all.insert(id, link);
        self.set_tunnel(id, tunnel);
        self.join(id, peer, leased);
    }

    /// A link is a peer's, too, whose lease says where it is. Says how many packets were waiting for the one
    /// that it was.
    pub(super) fn join(
        &mut self,
        id: LinkId,
        (peer, version): (PeerId, IpVersion),
        leased: SocketAddr,
    ) -> usize {
        let Some(link) = self.all.get(&id) else {
            return 0;
        };
        let [was, other] = [link.peers[place(version)], link.peers[1 - place(version)]];
        let mut lost = 0;
        for gone in was
            .filter(|it| *it != peer)
            .into_iter()
            .chain(other.filter(|it| *it == peer))
        {
            lost += self.leave(id, gone);
        }
        if let Some(link) = self.all.get_mut(&id) {
            link.set_leased(leased);
            link.peers[place(version)] = Some(peer);
        }
        let at = peer.0 as usize;
        if self.by_peer.len() <= at {
            self.by_peer.resize(at + 1, None);
        }
        self.by_peer[at] = Some(id);
        lost
    }

    /// A link is not this peer's any more. Says how many packets were waiting for it.
    fn leave(&mut self, id: LinkId, peer: PeerId) -> usize {
        if let Some(slot) = self.by_peer.get_mut(peer.0 as usize) {
            *slot = None;
        }
        let Some(link) = self.all.get_mut(&id) else {
            return 0;
        };
        for slot in &mut link.peers {
            slot.take_if(|it| *it == peer);
        }
        link.staged.forget(peer)
    }

    /// Gives a link another tunnel.
    pub(super) fn set_tunnel(&mut self, id: LinkId, tunnel: Option<Tunnel>) {
        let Some(link) = self.all.get_mut(&id) else {
            return;
        };
        let device = link.key.0;
        if let Some(old) = &link.tunnel {
            self.by_tunnel.remove(&(device, old.id()));
        }
        if let Some(tunnel) = &tunnel {
            self.by_tunnel.insert((device, tunnel.id()), id);
        }
        link.tunnel = tunnel;
    }

    /// Removes a peer, and its link if that is no other's. Says how many packets were waiting.
    pub(super) fn remove_peer(&mut self, peer: PeerId) -> usize {
        let Some(id) = self.id_of_peer(peer) else {
            return 0;
        };
        let lost = self.leave(id, peer);
        let link = self.all.get(&id);
        if let Some(key) = link.filter(|it| it.peers == [None; 2]).map(Link::key) {
            self.set_tunnel(id, None);
            self.by_key.remove(&key);
            self.all.remove(&id);
        }
        lost
    }
}
