//! The node: frames and datagrams in, verdicts out.
//!
//! A packet moves one way: port, switch, router, encapsulation; or decapsulation, router, port.
//! It is rewritten in the buffer it came in. A superpacket counts as one packet, whatever becomes of
//! it later; it is taken apart only where it cannot go on whole, since the decision about it is the
//! same for all its segments. What the node sends of its own accord (answers of the
//! gateway, ICMP errors, ARP requests, packets that waited, fragments) goes through a bounded queue
//! that the caller drains with [`Node::poll_output`] after every call.
//!
//! A node belongs to one thread. Several workers each have their own; what they learn from frames
//! they learn for themselves, and what the control plane knows it tells all of them.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use awaited::Awaited;
use home::{Home, HomeV6};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lan::Lan;
use ledger::Ledger;
use multicast::{Copies, Groups};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::virtio::GsoKind;
use muslin_encap::tunnel::Format;
use peers::Peers;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::EthernetAddress;
use thiserror::Error;

use crate::addresses::{Addresses, Nets};
use crate::bucket::TokenBucket;
use crate::datapath::exchange::Mailbox;
use crate::datapath::filter::{Direction, Filter, Unfiltered};
use crate::datapath::frame;
use crate::datapath::gateway::{self, Gateway, Own};
use crate::datapath::guard;
use crate::datapath::hash::Seed;
use crate::datapath::host_interface::HostPort;
use crate::datapath::icmp;
use crate::datapath::link_local::LinkLocals;
use crate::datapath::neighbour::{Neighbours, Place, State};
use crate::datapath::observe::{Observer, Source, Unobserved};
use crate::datapath::peer::{Path, Peer, PeerId, PeerState};
use crate::datapath::port::{Attachment, Port, PortId, Rates, Traffic};
use crate::datapath::route::RouteTable;
use crate::datapath::switch::{Fdb, FdbEntry};
use crate::datapath::trace::TraceStep;
use crate::datapath::tunnel::Tunnel;
pub use crate::datapath::verdict::Verdict;
use crate::datapath::work;
use crate::drops::{Counters, DropReason};

mod awaited;
mod exchange;
mod fork;
mod home;
mod host;
mod ingress;
mod ingress_v6;
mod lan;
mod ledger;
mod multicast;
mod origin;
mod peers;
mod probe;
mod resolve;
mod router;
mod router_v6;
#[cfg(test)]
mod tests;
mod uplink;
mod uplink_v6;

/// How often tables forget what has aged out.
const AGEING_PERIOD: Duration = Duration::from_secs(10);
/// Packets of its own the node may hold until they are polled.
const OUTPUT_LEN: usize = 256;

/// What a node is. Further fields may come: [`NodeConfig::new`] makes one, of which others can be changed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NodeConfig {
    /// Its lease. The first address after the base is the gateway's, of each IP version that it has.
    pub subnet: Nets,
    /// MAC address of the gateway.
    pub gateway_mac: EthernetAddress,
    /// How it encapsulates.
    pub tunnel: Tunnel,
    /// MTU of pods and of the way to peers, in bytes of inner IP packets.
    pub mtu: Mtu,
    /// The same of IPv6 on the way to peers, to which packets go over IPv6: 1,280 bytes or more, if there
    /// is a lease of IPv6. Pods' own links take as much as in IPv4.
    pub mtu_v6: Mtu,
    /// Whether the MSS that TCP connections with peers' pods begin with is lowered to what the path
    /// takes, so that they need no ICMP errors to find that out.
    pub clamp_mss: bool,
    /// What is checked of senders.
    pub guard: guard::Policy,
    /// Bounds of its tables.
    pub limits: Limits,
    /// Unpredictable; the same seed gives the same run.
    pub random_seed: u64,
}

impl NodeConfig {
    /// A node that clamps the MSS, guards against peers, and has the default limits. IPv6 has the same
    /// MTU.
    #[must_use]
    pub fn new(
        subnet: impl Into<Nets>,
        gateway_mac: EthernetAddress,
        tunnel: Tunnel,
        mtu: Mtu,
        random_seed: u64,
    ) -> Self {
        Self {
            subnet: subnet.into(),
            gateway_mac,
            tunnel,
            mtu,
            mtu_v6: mtu,
            clamp_mss: true,
            guard: guard::Policy::default(),
            limits: Limits::default(),
            random_seed,
        }
    }
}

/// How many entries tables may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Learned MAC addresses.
    pub fdb: usize,
    /// Neighbours.
    pub neighbours: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            fdb: 4096,
            neighbours: 4096,
        }
    }
}

/// Why a node cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NodeConfigError {
    /// No room for a base, a gateway and a pod.
    #[error("the subnet {0} has no room for a gateway and a pod")]
    TooSmall(IpNet),
    /// IPv6 needs 1,280 bytes (RFC 8200 section 5).
    #[error("an MTU of {} bytes is too small for IPv6: it must be 1280 or more", .0.get())]
    MtuTooSmall(Mtu),
}

/// Where packets for a prefix go next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextHop {
    /// The pods of this node.
    Local,
    /// Another node.
    Peer(PeerId),
}

/// A whole node, sans I/O.
// It is compiled in the crate that knows its parameters. Functions without any that it calls for each
// packet are `#[inline]`, as they would not be inlined there otherwise.
pub struct Node<O = Unobserved, F = Unfiltered> {
    config: NodeConfig,
    home: Option<Home>,
    home_v6: Option<HomeV6>,
    seed: Seed,
    ports: BTreeMap<PortId, Port>,
    /// Ports whose pods may use any address.
    unguarded: usize,
    /// How many ports send or receive no faster than a limit.
    limited: usize,
    /// The time of the packet that is looked at.
    now: Instant,
    awaited: Awaited,
    peers: Peers,
    routes: RouteTable<NextHop>,
    fdb: Fdb,
    neighbours: Neighbours,
    link_locals: LinkLocals,
    /// The gateway's addresses.
    own: Own,
    gateway: Gateway,
    errors: TokenBucket,
    ledger: Ledger<O>,
    output: Output,
    filter: F,
    uplink: Option<Lan>,
    host: Option<HostPort>,
    /// What other nodes have said, if they are listened to.
    exchange: Option<Mailbox>,
    /// Who has joined which group, if groups are followed.
    groups: Option<Box<Groups>>,
    /// The last claim of a next hop's address that is looked into and that siblings have not heard of.
    claimed: Option<(IpAddr, EthernetAddress)>,
    /// The overlay's networks; packets from pods that leave them are for egress.
    egress: Option<Ipv4Net>,
    egress_v6: Option<Ipv6Net>,
    /// Where packets of the node's own are made.
    scratch: Vec<u8>,
    /// The gateway's answers to one packet, before they are routed.
    answers: Vec<Vec<u8>>,
    /// Identification of the last answer that was cut into fragments.
    ident: u16,
    next_ageing: Instant,
}

/// Who sent a datagram, as [`Node::sender`] says: another node or a stranger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sender {
    address: SocketAddr,
    /// The first of the peers with this address.
    peer: Option<PeerId>,
}

impl Sender {
    /// A peer that is known by its key, whose datagram came from there.
    pub(in crate::datapath) const fn of_peer(peer: PeerId, address: SocketAddr) -> Self {
        Self {
            address,
            peer: Some(peer),
        }
    }

    /// Where it sent from.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

/// What waits for the node's caller.
enum Queued {
    /// A packet.
    Packet(Verdict, Vec<u8>),
    /// A packet of a group, for several places.
    Copies(Copies),
    /// A frame from this port of which the nodes of other workers are to hear.
    Report(PortId, Vec<u8>),
}

/// Packets on their way out that the node made itself.
#[derive(Default)]
struct Output {
    queue: VecDeque<Queued>,
    free: Vec<Vec<u8>>,
}

impl Output {
    fn push(&mut self, verdict: Verdict, packet: &[u8]) -> Result<(), DropReason> {
        if self.queue.len() >= OUTPUT_LEN {
            return Err(DropReason::OutputQueueFull);
        }
        let mut buffer = self.free.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(packet);
        self.queue.push_back(Queued::Packet(verdict, buffer));
        Ok(())
    }

    /// The same with copies, which are given back if there is no room.
    fn push_copies(&mut self, copies: Copies) -> Result<(), Copies> {
        if self.queue.len() >= OUTPUT_LEN {
            return Err(copies);
        }
        self.queue.push_back(Queued::Copies(copies));
        Ok(())
    }

    fn push_report(&mut self, port: PortId, frame: &[u8]) -> Result<(), DropReason> {
        if self.queue.len() >= OUTPUT_LEN {
            return Err(DropReason::OutputQueueFull);
        }
        self.queue.push_back(Queued::Report(port, frame.to_vec()));
        Ok(())
    }
}

impl Node {
    /// A node without ports and peers, which nobody observes and which permits all packets.
    ///
    /// # Errors
    /// `NodeConfigError` if the subnet cannot be a node's.
    pub fn new(config: NodeConfig, now: Instant) -> Result<Self, NodeConfigError> {
        Self::with(config, Unobserved, Unfiltered, now)
    }
}

impl<O: Observer, F: Filter> Node<O, F> {
    /// A node without ports and peers, with who observes it and what packets it permits.
    ///
    /// # Errors
    /// `NodeConfigError` if the subnet cannot be a node's.
    pub fn with(
        config: NodeConfig,
        mut observer: O,
        mut filter: F,
        now: Instant,
    ) -> Result<Self, NodeConfigError> {
        observer.at(now);
        filter.at(now);
        let (home, home_v6) = home::of(&config)?;
        let seed = Seed(config.random_seed);
        let mut routes = RouteTable::default();
        for subnet in config.subnet.iter() {
            routes.insert(subnet, NextHop::Local);
        }
        Ok(Self {
            home,
            home_v6,
            seed,
            ports: BTreeMap::new(),
            unguarded: 0,
            limited: 0,
            now,
            awaited: Awaited::new([], now, seed),
            peers: Peers::default(),
            routes,
            fdb: Fdb::new(config.limits.fdb, seed),
            neighbours: Neighbours::new(config.limits.neighbours, seed),
            link_locals: LinkLocals::new(seed),
            own: gateway::addresses(config.subnet),
            gateway: Gateway::new(config.subnet, config.gateway_mac, seed.0, now),
            errors: icmp::error_limit(now),
            ledger: Ledger::new(observer),
            output: Output::default(),
            filter,
            uplink: None,
            host: None,
            exchange: None,
            groups: None,
            claimed: None,
            egress: None,
            egress_v6: None,
            scratch: vec![0; HEADROOM + frame::MAX_LEN],
            answers: Vec::new(),
            ident: config.random_seed as u16,
            next_ageing: now + AGEING_PERIOD,
            config,
        })
    }

    /// Expects pods with these addresses to be attached until `until`, as they were before the node
    /// was restarted. Till then packets for them wait, or are lost without a word: a connection must
    /// not fail because its pod's node starts anew.
    pub fn await_pods(&mut self, addresses: impl IntoIterator<Item = IpAddr>, until: Instant) {
        self.awaited = Awaited::new(addresses, until, self.seed);
    }

    /// Attaches a port, in place of one of the same identity.
    pub fn attach(&mut self, port: PortId, attachment: Attachment) {
        self.detach(port);
        let place = Place {
            mac: attachment.mac,
            port,
        };
        self.fdb.add_static(attachment.mac, port);
        for address in &attachment.addresses {
            self.awaited.remove(*address);
            for packet in self.neighbours.add_permanent(*address, place) {
                self.send_resolved(*address, &packet);
            }
        }
        self.unguarded += usize::from(!attachment.guarded);
        self.limited += usize::from(attachment.rates.is_limited());
        if let Some(groups) = &mut self.groups {
            groups.attach();
        }
        self.ports.insert(port, Port::new(attachment));
    }

    /// Detaches a port; false if there was none.
    pub fn detach(&mut self, port: PortId) -> bool {
        self.fdb.forget_port(port);
        self.neighbours.forget_port(port);
        self.link_locals.forget_port(port);
        if let Some(groups) = &mut self.groups {
            groups.forget_port(port);
        }
        let old = self.ports.remove(&port);
        if let Some(old) = &old {
            self.keep_static(old.attachment.mac);
        }
        let guarded = old.as_ref().is_none_or(|old| old.attachment.guarded);
        self.unguarded -= usize::from(!guarded);
        let rates = old.as_ref().map(|old| &old.attachment.rates);
        self.limited -= usize::from(rates.is_some_and(Rates::is_limited));
        old.is_some()
    }

    /// Makes a MAC address that went with a port static again if another port has it, too: a
    /// guarded pod's is not learned.
    fn keep_static(&mut self, mac: EthernetAddress) {
        let heir = self.ports.iter().find(|(_, it)| it.attachment.mac == mac);
        if let Some((port, _)) = heir {
            self.fdb.add_static(mac, *port);
        }
    }

    /// Adds a peer, or replaces the one of the same identity and keeps its counters. There is no
    /// route to a peer that claims this node's own subnet or a part of it.
    pub fn set_peer(&mut self, peer: Peer) {
        let idle = Traffic::default();
        let old = self.take_peer(peer.id);
        let (received, sent) = old
            .as_ref()
            .map_or((idle, idle), |old| (old.received, old.sent));
        // What its subnet's former holder said tells nothing of this one.
        let heard = old
            .filter(|old| old.peer.address.ip() == peer.address.ip())
            .and_then(|old| old.heard);
        let (id, subnet) = (peer.id, peer.subnet);
        let host = peer.address.ip();
        let path = self.path_to(&peer);
        if let (Path::Uplink, Some(link)) = (path, &mut self.uplink) {
            link.neighbours.seek_in_turn(host);
        }
        if let Some(groups) = &mut self.groups {
            groups.set_peer(&peer);
        }
        self.peers.insert(PeerState {
            peer,
            path,
            received,
            sent,
            heard,
        });
        if !self.is_within(subnet) {
            self.set_route(subnet, Some(id));
        }
    }

    /// Removes a peer; false if there was none.
    pub fn remove_peer(&mut self, id: PeerId) -> bool {
        self.take_peer(id).is_some()
    }

    fn take_peer(&mut self, id: PeerId) -> Option<PeerState> {
        let old = self.peers.remove(id)?;
        if let Some(groups) = &mut self.groups {
            groups.remove_peer(id);
        }
        // Another peer may have taken the route over meanwhile, and ours must stay.
        let subnet = old.peer.subnet.trunc();
        if self.routes.get(subnet) == Some(&NextHop::Peer(id)) {
            let heir = self.peers.iter().find(|it| it.subnet.trunc() == subnet);
            self.set_route(subnet, heir.map(|heir| heir.id));
        }
        Some(old)
    }

    /// Routes a subnet to a peer, or no more.
    fn set_route(&mut self, subnet: IpNet, to: Option<PeerId>) {
        let before = match to {
            Some(id) => self.routes.insert(subnet, NextHop::Peer(id)),
            None => self.routes.remove(subnet),
        };
        if let Some(NextHop::Peer(before)) = before {
            self.peers.set_routed(before, None);
        }
        if let Some(id) = to {
            self.peers.set_routed(id, Some(subnet));
        }
    }

    fn is_within(&self, prefix: IpNet) -> bool {
        match prefix {
            IpNet::V4(prefix) => self.home.is_some_and(|home| home.subnet.contains(&prefix)),
            IpNet::V6(prefix) => self
                .home_v6
                .is_some_and(|home| home.subnet.contains(&prefix)),
        }
    }

    /// Begins a port's turn. Its frames are to be taken as long as [`Self::goes_on`] says so.
    pub fn begin_turn(&mut self, port: PortId) {
        if let Some(port) = self.ports.get_mut(&port) {
            port.turn.begin();
        }
    }

    /// How long nothing is to be read from a port, whose pod has sent faster than it may.
    #[must_use]
    pub fn pause(&self, now: Instant, port: PortId) -> Option<Duration> {
        if self.limited == 0 {
            return None;
        }
        let rates = &self.ports.get(&port)?.attachment.rates;
        rates.from_pod.as_ref()?.pause(now)
    }

    /// Whether a port's turn goes on: it is over when its frames have made as much work as the others
    /// may have, too.
    #[must_use]
    pub fn goes_on(&self, port: PortId) -> bool {
        let port = self.ports.get(&port);
        port.is_some_and(|port| port.turn.goes_on())
    }

    /// Takes an Ethernet frame from a port.
    pub fn from_port(&mut self, now: Instant, port: PortId, packet: &mut PacketBuf<'_>) -> Verdict {
        let source = Source::Port(port);
        self.begin(now);
        self.ledger.enters(source, packet);
        let waiting = self.output.queue.len();
        let verdict = self
            .ingress_port(now, port, packet)
            .unwrap_or_else(Verdict::Drop);
        let own = self.output.queue.len().saturating_sub(waiting);
        let work = self.work(verdict, packet) + work::of_packets(own, 0);
        if let Some(port) = self.ports.get_mut(&port) {
            port.turn.take(work);
        }
        self.count(source, verdict, packet)
    }

    /// What a packet with this verdict costs.
    fn work(&self, verdict: Verdict, packet: &PacketBuf<'_>) -> u64 {
        let len = packet.total_len();
        let is_cut = match (verdict, packet.offload().gso) {
            (Verdict::Flood { .. }, _) => return work::of_packets(self.others().max(1), len),
            (Verdict::Peer { .. } | Verdict::Uplink { .. }, gso) => gso,
            // A stream goes on as one.
            (Verdict::Egress, gso) => gso.filter(|gso| gso.kind == GsoKind::Udp),
            (Verdict::Port(_) | Verdict::Host | Verdict::Consumed | Verdict::Drop(_), _) => None,
        };
        let size = is_cut.map_or(len, |gso| gso.size.into());
        // What goes outside goes through all that the host does with its own datagrams.
        let weight = if verdict == Verdict::Egress { 2 } else { 1 };
        work::of_superpacket(weight * len.div_ceil(size.max(1)), len)
    }

    /// How many ports a frame is flooded to that came from one.
    pub(super) fn others(&self) -> usize {
        self.ports.len().saturating_sub(1)
    }

    /// Counts a frame of `len` bytes whose virtio-net header could not be read.
    pub fn refuse_frame(&mut self, port: PortId, len: usize) {
        if let Some(port) = self.ports.get_mut(&port) {
            port.received.count(len);
            port.turn.take(work::of_packets(1, len));
        }
        self.ledger
            .refuse(Source::Port(port), DropReason::VirtioHeader);
    }

    /// Takes the payload of a datagram of the tunnel that came from `source`.
    pub fn from_underlay(
        &mut self,
        now: Instant,
        source: SocketAddr,
        packet: &mut PacketBuf<'_>,
    ) -> Verdict {
        self.from_sender(now, self.sender(source), packet)
    }

    /// Who sends from an address.
    #[must_use]
    pub fn sender(&self, address: SocketAddr) -> Sender {
        Sender {
            address,
            peer: self.peers.first_at(address.ip()),
        }
    }

    /// Takes the payload of a datagram of the tunnel.
    pub fn from_sender(
        &mut self,
        now: Instant,
        sender: Sender,
        packet: &mut PacketBuf<'_>,
    ) -> Verdict {
        let source = Source::Underlay(sender.address);
        self.begin(now);
        self.ledger.enters(source, packet);
        let verdict = self
            .ingress_underlay(now, sender, packet)
            .unwrap_or_else(|reason| self.refuse_or_copy(now, reason, packet));
        self.count(source, verdict, packet)
    }

    /// Hands pods' packets to addresses outside `network`, the overlay's, to egress from now on, and
    /// TCP and UDP to the gateway; in an IP version without a network there is no route for the former,
    /// and the gateway refuses the latter itself.
    pub fn set_egress(&mut self, network: Option<Nets>) {
        let ipv4 = network.and_then(|network| network.ipv4());
        self.egress = ipv4.map(|network| network.trunc());
        let ipv6 = network.and_then(|network| network.ipv6());
        self.egress_v6 = ipv6.map(|network| network.trunc());
    }

    /// Takes a packet from egress that begins with its IP header, for a pod: one of this node
    /// unless the gateway is its source.
    pub fn from_egress(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Verdict {
        self.begin(now);
        self.ledger.enters(Source::Egress, packet);
        let verdict = self.route_to_pod(now, packet).unwrap_or_else(Verdict::Drop);
        self.count(Source::Egress, verdict, packet)
    }

    /// Whether there is a packet that the node itself has to send.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.queue.is_empty()
    }

    /// The next packet the node itself has to send, copied into `packet`.
    pub fn poll_output(&mut self, packet: &mut PacketBuf<'_>) -> Option<Verdict> {
        let (verdict, bytes) = loop {
            match self.output.queue.pop_front()? {
                Queued::Packet(verdict, bytes) => break (verdict, bytes),
                Queued::Copies(copies) => return self.next_copy(copies, packet),
                // There are no other workers.
                Queued::Report(..) => {}
            }
        };
        self.ledger.enters(Source::Node, bytes.as_slice());
        let verdict = match (verdict, packet.replace(&bytes)) {
            (_, Err(_)) => Verdict::Drop(DropReason::HeadroomExceeded),
            // The control plane may have taken away what the packet was for while it was queued.
            (Verdict::Port(port), _) if !self.ports.contains_key(&port) => {
                Verdict::Drop(DropReason::PortGone)
            }
            (Verdict::Host, _) if self.host.is_none() => Verdict::Drop(DropReason::PortGone),
            (Verdict::Peer { .. } | Verdict::Uplink { .. }, _) if !self.is_there(verdict) => {
                Verdict::Drop(DropReason::PeerGone)
            }
            (verdict, Ok(())) => verdict,
        };
        self.output.free.push(bytes);
        Some(self.count(Source::Node, verdict, packet))
    }

    /// When [`Self::handle_timeout`] is next needed.
    #[must_use]
    pub fn poll_at(&self) -> Instant {
        let links = [
            self.groups.as_ref().and_then(|groups| groups.poll_at()),
            self.neighbours.poll_at(),
            self.uplink
                .as_ref()
                .and_then(|link| link.neighbours.poll_at()),
        ];
        let due = links.into_iter().flatten().min();
        due.map_or(self.next_ageing, |due| due.min(self.next_ageing))
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.begin(now);
        self.handle_neighbours(now);
        self.handle_groups(now);
        if now >= self.next_ageing {
            self.fdb.age(now);
            self.neighbours.age(now, |_| false);
            if let Some(link) = &mut self.uplink {
                let is_next_hop = |host| self.peers.first_at(host).is_some();
                link.neighbours.age(now, is_next_hop);
            }
            self.next_ageing = now + AGEING_PERIOD;
        }
    }

    /// Counts packets that the shell could not receive or hand over after their verdict.
    pub fn count_drops(&mut self, reason: DropReason, packets: u64) {
        self.ledger.lose(reason, packets);
    }

    /// Counts a packet that egress does not take.
    pub(in crate::datapath) fn lose_in_egress(
        &mut self,
        reason: DropReason,
        packet: &PacketBuf<'_>,
    ) {
        self.count_drops(reason, 1);
        self.ledger.observer.lost_in_egress(reason, packet);
    }

    /// Counts TCP acknowledgements that need not be carried (see [`Counters::superseded`]).
    pub const fn count_superseded(&mut self, packets: u64) {
        self.ledger.counters.superseded += packets;
    }

    /// Counts a frame that the shell handed to a port after [`Verdict::Flood`].
    pub fn count_flooded(&mut self, port: PortId, len: usize) {
        if let Some(port) = self.ports.get_mut(&port) {
            port.sent.count(len);
        }
    }

    /// What became of all packets.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.ledger.counters
    }

    /// What packets it permits, to be told of other policies.
    pub const fn filter_mut(&mut self) -> &mut F {
        &mut self.filter
    }

    /// Who observes it.
    #[must_use]
    pub const fn observer(&self) -> &O {
        &self.ledger.observer
    }

    /// The same, to be told what it is to see.
    pub const fn observer_mut(&mut self) -> &mut O {
        &mut self.ledger.observer
    }

    /// The attached ports.
    pub fn ports(&self) -> impl Iterator<Item = (PortId, &Port)> {
        self.ports.iter().map(|(id, port)| (*id, port))
    }

    /// The peers, by their numbers.
    pub fn peers(&self) -> impl Iterator<Item = PeerState> {
        self.peers.states()
    }

    /// The route table, in no particular order.
    pub fn routes(&self) -> impl Iterator<Item = (IpNet, &NextHop)> {
        self.routes.iter()
    }

    /// The forwarding database, in no particular order.
    pub fn fdb(&self) -> impl Iterator<Item = (EthernetAddress, FdbEntry)> + '_ {
        self.fdb.iter()
    }

    /// The neighbour table, in no particular order.
    pub fn neighbours(&self) -> impl Iterator<Item = (IpAddr, Option<Place>, State)> + '_ {
        self.neighbours.iter()
    }

    /// How it encapsulates, if it does.
    #[must_use]
    pub fn format(&self) -> Option<Format> {
        self.config.tunnel.format()
    }

    /// Changes the MTU of pods and of the way to peers, in bytes of inner IP packets: the underlay's
    /// interface has another one. Packets that are too long for it are fragmented or refused with
    /// the new one from now on (RFC 1191), and connections begin with what it takes.
    pub fn set_mtu(&mut self, mtu: Mtu) {
        self.config.mtu = mtu;
    }

    /// MTU of pods and of the way to peers.
    #[must_use]
    pub fn mtu(&self) -> Mtu {
        self.config.mtu
    }

    /// The same of IPv6, which never has less than 1,280 bytes.
    pub fn set_mtu_v6(&mut self, mtu: Mtu) {
        self.config.mtu_v6 = mtu.max(Mtu::MIN_IPV6);
    }

    /// MTU of IPv6 of the way to peers.
    #[must_use]
    pub fn mtu_v6(&self) -> Mtu {
        self.config.mtu_v6
    }

    /// The gateway's addresses.
    #[must_use]
    pub fn gateway(&self) -> Option<Addresses> {
        let ipv4 = self.home.map(|home| home.gateway);
        Addresses::new(ipv4, self.home_v6.map(|home| home.gateway))
    }

    /// The gateway's address of IPv4, which is none where the node has no subnet of IPv4.
    pub(crate) fn gateway_ipv4(&self) -> Ipv4Addr {
        self.home.map_or(Ipv4Addr::UNSPECIFIED, |home| home.gateway)
    }

    /// Whether the peer a packet is for is there, at the same place.
    fn is_there(&self, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Peer {
                id, destination, ..
            } => self.peers.address(id) == Some(destination),
            Verdict::Uplink { id } => {
                self.uplink.is_some() && id.is_none_or(|id| self.peers.outgoing(id).is_some())
            }
            Verdict::Port(_)
            | Verdict::Flood { .. }
            | Verdict::Host
            | Verdict::Egress
            | Verdict::Consumed
            | Verdict::Drop(_) => true,
        }
    }

    /// Something happens now.
    #[inline(always)]
    fn begin(&mut self, now: Instant) {
        self.now = now;
        self.ledger.observer.at(now);
        self.filter.at(now);
    }

    /// Asks the filter whether an IP packet may go on.
    #[inline(always)]
    fn check_policy(
        &mut self,
        direction: Direction,
        port: PortId,
        packet: &[u8],
    ) -> Result<(), DropReason> {
        if !F::REFUSES {
            return Ok(());
        }
        if !self.filter.permits(direction, port, packet) {
            return Err(DropReason::PolicyDenied);
        }
        self.ledger
            .step(|| TraceStep::Permitted { direction, port });
        Ok(())
    }

    #[inline]
    fn count(&mut self, source: Source, verdict: Verdict, packet: &PacketBuf<'_>) -> Verdict {
        let len = packet.total_len();
        match verdict {
            Verdict::Port(port) => {
                if let Some(port) = self.ports.get_mut(&port) {
                    port.sent.count(len);
                }
            }
            Verdict::Host => self.count_to_host(len),
            Verdict::Peer { id, .. } | Verdict::Uplink { id: Some(id) } => {
                self.peers.count_sent(id, len);
            }
            Verdict::Uplink { id: None }
            | Verdict::Flood { .. }
            | Verdict::Egress
            | Verdict::Consumed
            | Verdict::Drop(_) => {}
        }
        self.ledger.leaves(source, verdict, packet);
        verdict
    }
}
