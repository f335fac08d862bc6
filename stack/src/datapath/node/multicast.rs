//! Packets for groups, where they are followed: to members alone, and to other nodes that follow them, too.
//!
//! What a pod sends to a group is copied to the node's members and, by the tunnel, to each peer that takes
//! packets of groups (replication at the head end). What comes from a peer goes to members, never to another
//! peer. Copies wait in the node's output as one packet with a list of where it is to go.

use std::net::{IpAddr, Ipv6Addr};

use muslin_encap::buffer::PacketBuf;
use muslin_encap::ip::{v4, v6};
use muslin_encap::offload::split;
use muslin_encap::offload::virtio::Header;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet};

use super::router::Decision;
use super::{NextHop, Node, Queued};
use crate::bucket::TokenBucket;
use crate::datapath::filter::{Direction, Filter};
use crate::datapath::frame;
use crate::datapath::gateway;
use crate::datapath::multicast::{
    self, FIRST_RESPONSE_INTERVAL, LAST_MEMBER_INTERVAL, Leaving, Memberships, QUERY_INTERVAL,
    QUERY_RESPONSE_INTERVAL, ROBUSTNESS, Report, STARTUP_QUERY_INTERVAL, Scope, TableFull, igmp,
    mld,
};
use crate::datapath::observe::{Observer, Source};
use crate::datapath::peer::{Path, Peer, PeerId};
use crate::datapath::port::PortId;
use crate::datapath::trace::{Switched, TraceStep};
use crate::datapath::verdict::Verdict;
use crate::datapath::work;
use crate::drops::DropReason;

/// How many peers get a copy of a packet.
pub(super) const MAX_PEERS: usize = 256;
/// How long after a pod was attached the hosts are asked: its interface is up by then.
const ATTACHED: Duration = Duration::from_secs(1);

/// The node's part in groups.
#[derive(Debug, Clone)]
pub(super) struct Groups {
    /// Whether this node, of all workers', asks.
    is_querier: bool,
    memberships: Memberships,
    /// Peers that take packets of groups, by their numbers.
    peers: Vec<GroupPeer>,
    next_query: Instant,
    /// General queries that follow each other soon.
    first_queries: u8,
    /// Whether a pod was attached since.
    has_attached: bool,
    /// Lists that are used again.
    free: Vec<Vec<u32>>,
}

#[derive(Debug, Clone)]
struct GroupPeer {
    id: PeerId,
    is_v6: bool,
    /// How much of its packets is copied.
    storm: TokenBucket,
}

/// One packet, and where it is still to go.
pub(super) struct Copies {
    /// It begins with its IP header.
    packet: Vec<u8>,
    offload: Header,
    /// Numbers of ports or of peers.
    to: Vec<u32>,
    sent: usize,
    way: Way,
}

/// How copies travel.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// To ports, in frames from this MAC address to that.
    Ports(EthernetAddress, EthernetAddress),
    /// To peers, by the tunnel.
    Peers,
}

/// How a packet crosses to other nodes.
#[derive(Debug, Clone, Copy)]
enum Crossing {
    /// As it is: to others' pods it is as if the sender were on their link.
    AsIs,
    /// The same, with another source, as the sender's is no more than its link's.
    From(Ipv6Addr),
    /// Routed, as other packets are.
    Routed,
}

/// A packet's head, as far as groups are concerned.
#[derive(Debug, Clone, Copy)]
struct Head {
    source: IpAddr,
    group: IpAddr,
    hop_limit: u8,
    protocol: IpProtocol,
    /// Where what IP carries begins; `None` in fragments.
    upper: Option<usize>,
}

impl Head {
    /// Reads the head of a packet whose IP header was checked.
    fn read(packet: &[u8]) -> Result<Self, DropReason> {
        if packet.first().is_some_and(|first| first >> 4 == 4) {
            let view = Ipv4Packet::new_unchecked(packet);
            let is_whole = !view.more_frags() && view.frag_offset() == 0;
            return Ok(Self {
                source: view.src_addr().into(),
                group: view.dst_addr().into(),
                hop_limit: view.hop_limit(),
                protocol: view.next_header(),
                upper: is_whole.then(|| view.header_len().into()),
            });
        }
        let upper = v6::upper_layer(packet)?;
        let view = Ipv6Packet::new_unchecked(packet);
        Ok(Self {
            source: view.src_addr().into(),
            group: view.dst_addr().into(),
            hop_limit: view.hop_limit(),
            protocol: upper.protocol.into(),
            upper: upper.fragment.is_none().then_some(upper.offset),
        })
    }

    /// Whether it is of multicast DNS (RFC 6762), which crosses to other nodes though its groups are a
    /// link's: pods look for each other by it, wherever they run.
    fn is_mdns(&self, packet: &[u8]) -> bool {
        let udp = self.upper.and_then(|at| packet.get(at..at + 4));
        let port = multicast::MDNS_PORT.to_be_bytes();
        self.protocol == IpProtocol::Udp
            && udp.is_some_and(|udp| udp[2..] == port)
            && (self.group == IpAddr::V4(multicast::MDNS)
                || self.group == IpAddr::V6(multicast::MDNS_V6))
    }

    /// Whether it is of a protocol that ends at its link.
    fn is_of_link(&self, packet: &[u8]) -> bool {
        match self.protocol {
            IpProtocol::Igmp => true,
            // Listener discovery and neighbour discovery.
            IpProtocol::Icmpv6 => {
                let kind = self.upper.and_then(|at| packet.get(at));
                matches!(kind, None | Some(&(130..=137 | mld::REPORT_V2)))
            }
            _ => false,
        }
    }
}

/// What copying a packet to one place costs. A superpacket is one of which no more than a kernel makes
/// of one is made.
fn work_of(packet: &PacketBuf<'_>) -> Result<u64, DropReason> {
    let segments = match packet.offload().gso {
        // It was merged here.
        Some(_) if !packet.tail().is_empty() => 1 + packet.tail().len(),
        Some(gso) => split::segment_count(packet.as_slice(), 0, gso)
            .map_err(|_| DropReason::SuperpacketRefused)?,
        None => 1,
    };
    Ok(work::of_superpacket(segments, packet.total_len()))
}

impl Groups {
    fn new(is_querier: bool, now: Instant) -> Self {
        Self {
            is_querier,
            memberships: Memberships::default(),
            peers: Vec::new(),
            next_query: now,
            first_queries: ROBUSTNESS,
            has_attached: false,
            free: Vec::new(),
        }
    }

    pub(super) fn set_peer(&mut self, peer: &Peer) {
        if peer.multicast
            && let Err(at) = self.find(peer.id)
        {
            let known = GroupPeer {
                id: peer.id,
                is_v6: peer.subnet.addr().is_ipv6(),
                storm: work::storm_share(),
            };
            self.peers.insert(at, known);
        }
    }

    pub(super) fn remove_peer(&mut self, id: PeerId) {
        if let Ok(at) = self.find(id) {
            self.peers.remove(at);
        }
    }

    fn find(&self, id: PeerId) -> Result<usize, usize> {
        self.peers.binary_search_by_key(&id, |peer| peer.id)
    }

    pub(super) fn attach(&mut self) {
        self.has_attached = true;
    }

    pub(super) fn forget_port(&mut self, port: PortId) {
        self.memberships.forget_port(port);
    }

    /// When there is something to do.
    pub(super) fn poll_at(&self) -> Option<Instant> {
        if self.has_attached {
            return Some(Instant::ZERO);
        }
        let query = self.is_querier.then_some(self.next_query);
        let due = [query, self.memberships.poll_at()].into_iter().flatten();
        due.min()
    }

    fn hear(
        &mut self,
        now: Instant,
        port: PortId,
        report: Report,
        leaving: Leaving,
    ) -> Result<(), TableFull> {
        if !multicast::is_followed(report.group) {
            return Ok(());
        }
        if report.joins {
            return self.memberships.join(now, port, report.group);
        }
        self.memberships.leave(now, port, report.group, leaving);
        Ok(())
    }
}

impl<O: Observer, F: Filter> Node<O, F> {
    /// Follows groups from now on, and takes packets for them from peers that do, or no more. Of the workers
    /// of a node one is its querier.
    pub fn set_multicast(&mut self, now: Instant, is_querier: Option<bool>) {
        self.groups = is_querier.map(|is_querier| Box::new(Groups::new(is_querier, now)));
        if let Some(groups) = &mut self.groups {
            self.peers.iter().for_each(|peer| groups.set_peer(peer));
        }
    }

    /// The groups that its pods have joined, with the time until a membership ends that is not
    /// reported again.
    pub fn groups(&self, now: Instant) -> impl Iterator<Item = (IpAddr, PortId, Duration)> + '_ {
        let groups = self.groups.iter();
        groups.flat_map(move |groups| groups.memberships.iter(now))
    }

    /// Takes a frame with IPv4 for a group, or for all.
    pub(super) fn ingress_group_v4(
        &mut self,
        now: Instant,
        id: PortId,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let bytes = packet.as_slice().get(frame::HEADER_LEN..);
        let bytes = bytes.unwrap_or_default();
        let len = v4::check(bytes)?;
        if igmp::is_igmp(bytes) {
            return self.take_report(now, id, packet.as_slice(), true);
        }
        let to = Ipv4Packet::new_unchecked(&bytes[..len]).dst_addr();
        let view = frame::parse(packet.as_slice())?;
        match (to.is_multicast(), view.dst_addr().is_broadcast()) {
            (true, _) => self.send_to_group(now, id, packet),
            (false, true) => self.flood(now, id, packet),
            (false, false) => Err(DropReason::GroupMac),
        }
    }

    /// Takes a frame with a report from a pod; one that did not come `here` but to another worker of the
    /// node tells the same.
    pub(super) fn take_report(
        &mut self,
        now: Instant,
        id: PortId,
        bytes: &[u8],
        here: bool,
    ) -> Decision {
        let Some(groups) = &mut self.groups else {
            return Ok(Verdict::Consumed);
        };
        let packet = bytes.get(frame::HEADER_LEN..).unwrap_or_default();
        let port = self.ports.get(&id).ok_or(DropReason::UnknownPort)?;
        let leaving = if port.attachment.guarded {
            Leaving::AtOnce
        } else {
            Leaving::AfterQueries { asks: here }
        };
        let mut taken = Ok(());
        let mut hear = |report| {
            if let Err(full) = groups.hear(now, id, report, leaving) {
                taken = Err(full);
            }
        };
        if packet.first().is_some_and(|first| first >> 4 == 4) {
            igmp::read(&packet[..v4::check(packet)?], &mut hear)?;
        } else {
            let offset = mld::find(packet)?.ok_or(DropReason::MldInvalid)?;
            mld::read(packet, offset, &mut hear)?;
        }
        if here {
            self.output.push_report(id, bytes)?;
        }
        match taken {
            Ok(()) => Ok(Verdict::Consumed),
            Err(TableFull) => Err(DropReason::MembershipsFull),
        }
    }

    /// Hears of a report that another worker's node took; false if the frame is none.
    pub(super) fn hear_of_report(&mut self, now: Instant, id: PortId, frame: &[u8]) -> bool {
        let packet = frame.get(frame::HEADER_LEN..).unwrap_or_default();
        let is_one = self.groups.is_some()
            && frame::parse(frame).is_ok_and(|view| match view.ethertype() {
                EthernetProtocol::Ipv4 => igmp::is_igmp(packet),
                EthernetProtocol::Ipv6 => mld::find(packet).is_ok_and(|it| it.is_some()),
                EthernetProtocol::Arp | EthernetProtocol::Unknown(_) => false,
            });
        if is_one {
            // It was refused there if it is refused here.
            let _ = self.take_report(now, id, frame, false);
        }
        is_one
    }

    /// The next report that other workers' nodes are to hear of, if it is the next thing in the output.
    pub(in crate::datapath) fn take_report_for_siblings(&mut self) -> Option<(PortId, Vec<u8>)> {
        let Some(Queued::Report(..)) = self.output.queue.front() else {
            return None;
        };
        match self.output.queue.pop_front() {
            Some(Queued::Report(port, frame)) => Some((port, frame)),
            _ => None,
        }
    }

    /// Copies a pod's packet for a group, which is in a frame for one, to its members and to peers.
    pub(super) fn send_to_group(
        &mut self,
        now: Instant,
        id: PortId,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let (view, len) = (frame::parse(packet.as_slice())?, ip_len(packet)?);
        let (from, mac) = (view.src_addr(), view.dst_addr());
        packet.truncate(frame::HEADER_LEN + len);
        let bytes = &packet.as_slice()[frame::HEADER_LEN..];
        let head = Head::read(bytes)?;
        let scope = Scope::of(head.group).ok_or(DropReason::GroupMac)?;
        if mac != multicast::mac_of(head.group) {
            return Err(DropReason::GroupMac);
        }
        if scope == Scope::Host {
            return Err(DropReason::BeyondScope);
        }
        if head.is_of_link(bytes) && scope == Scope::Wider {
            return Err(DropReason::BeyondScope);
        }
        self.check_policy_of_frame(Direction::ToAll, id, packet)?;

        let crossing = self.crossing(id, &head, packet);
        let is_for_all = multicast::is_for_all(head.group);
        let members = self.members(now, head.group, Some(id));
        let peers = self.peers_for(head.group, crossing.is_some());
        let local = if is_for_all {
            self.others()
        } else {
            members.len()
        };
        self.ledger.step(|| TraceStep::Switch {
            mac,
            to: Switched::Others(local),
        });
        packet.trim_front(frame::HEADER_LEN);
        let copied = self.copy_from_pod(now, id, packet, (from, mac), crossing, (members, peers));
        // The frame is as it was.
        packet
            .prepend(frame::HEADER_LEN)
            .map_err(|_| DropReason::HeadroomExceeded)?;
        match (copied?, is_for_all) {
            // All hear of it in one go.
            (_, true) => self.flood(now, id, packet),
            (true, false) => Ok(Verdict::Consumed),
            (false, false) => Err(DropReason::GroupWithoutMembers),
        }
    }

    /// Queues the copies of a pod's packet; false if there are none.
    fn copy_from_pod(
        &mut self,
        now: Instant,
        id: PortId,
        packet: &mut PacketBuf<'_>,
        (from, mac): (EthernetAddress, EthernetAddress),
        crossing: Option<Crossing>,
        (members, peers): (Vec<u32>, Vec<u32>),
    ) -> Result<bool, DropReason> {
        let count = members.len() + peers.len();
        let charged = self.charge(now, id, packet, count);
        if charged.is_err() {
            self.free_list(members);
            self.free_list(peers);
            return charged.map(|()| false);
        }
        self.queue_copies(packet, members, Way::Ports(from, mac), None);
        self.queue_copies(packet, peers, Way::Peers, crossing);
        Ok(count > 0)
    }

    /// Takes from a pod's turn, and from its share in copies, what so many copies of a packet cost.
    fn charge(
        &mut self,
        now: Instant,
        id: PortId,
        packet: &PacketBuf<'_>,
        count: usize,
    ) -> Result<(), DropReason> {
        let work = work_of(packet)?.saturating_mul(count as u64);
        let port = self.ports.get_mut(&id).ok_or(DropReason::UnknownPort)?;
        port.turn.take(work);
        if port.storm.take(now, work) {
            Ok(())
        } else {
            Err(DropReason::Storm)
        }
    }

    /// How a pod's packet crosses to other nodes, if it does.
    fn crossing(&self, id: PortId, head: &Head, packet: &PacketBuf<'_>) -> Option<Crossing> {
        if !self.config.tunnel.carries(head.group) {
            return None;
        }
        let bytes = packet.as_slice().get(frame::HEADER_LEN..)?;
        // Peers take nothing that is not from this node's subnet.
        let is_ours = match head.source {
            IpAddr::V4(source) => self.home?.subnet.contains(&source),
            IpAddr::V6(source) => self.home_v6?.subnet.contains(&source),
        };
        match head.source {
            _ if Scope::of(head.group) == Some(Scope::Wider) => {
                (is_ours && head.hop_limit > 1).then_some(Crossing::Routed)
            }
            _ if !head.is_mdns(bytes) => None,
            _ if is_ours => Some(Crossing::AsIs),
            IpAddr::V6(source) if source.is_unicast_link_local() && packet.is_single() => {
                let attachment = &self.ports.get(&id)?.attachment;
                let mut own = attachment.addresses.iter();
                let own = own.find_map(|it| match it {
                    IpAddr::V6(it) if self.home_v6?.subnet.contains(it) => Some(*it),
                    _ => None,
                });
                own.filter(|_| attachment.guarded).map(Crossing::From)
            }
            _ => None,
        }
    }

    /// The ports where members of a group are, or all where it is for all, of which `except` has no
    /// need of a copy; a pod's own packet for all is flooded.
    fn members(&mut self, now: Instant, group: IpAddr, except: Option<PortId>) -> Vec<u32> {
        let Some(groups) = &mut self.groups else {
            return Vec::new();
        };
        let mut to = groups.free.pop().unwrap_or_default();
        to.clear();
        if !multicast::is_for_all(group) {
            let members = groups.memberships.members(now, group);
            to.extend(members.filter(|port| Some(*port) != except).map(|it| it.0));
        } else if except.is_none() {
            to.extend(self.ports.keys().map(|port| port.0));
        }
        to
    }

    /// The peers that get a copy of a packet, if it crosses.
    fn peers_for(&mut self, group: IpAddr, crosses: bool) -> Vec<u32> {
        let Some(groups) = &mut self.groups else {
            return Vec::new();
        };
        let mut to = groups.free.pop().unwrap_or_default();
        to.clear();
        if crosses {
            let peers = groups.peers.iter();
            let peers = peers.filter(|peer| peer.is_v6 == group.is_ipv6());
            to.extend(peers.map(|peer| peer.id.0).take(MAX_PEERS + 1));
        }
        to
    }

    /// Queues a packet for several places.
    fn queue_copies(
        &mut self,
        packet: &mut PacketBuf<'_>,
        mut to: Vec<u32>,
        way: Way,
        crossing: Option<Crossing>,
    ) {
        let lost = match way {
            Way::Peers if to.len() > MAX_PEERS => Some(DropReason::GroupPeersExceeded),
            Way::Peers if !to.is_empty() && self.is_too_long(packet) => {
                to.clear();
                Some(DropReason::FragmentationNeeded)
            }
            _ => None,
        };
        if let Some(reason) = lost {
            to.truncate(MAX_PEERS);
            self.ledger.own(Verdict::Drop(reason), &*packet);
        }
        if to.is_empty() {
            return self.free_list(to);
        }
        if matches!(crossing, Some(Crossing::From(_))) {
            packet.complete_checksum();
        }
        let mut bytes = self.output.free.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(packet.as_slice());
        for piece in packet.tail() {
            bytes.extend_from_slice(piece);
        }
        bytes.truncate(packet.total_len());
        match crossing {
            Some(Crossing::Routed) if bytes.first().is_some_and(|it| it >> 4 == 4) => {
                v4::decrement_ttl(&mut bytes);
            }
            Some(Crossing::Routed) => {
                v6::decrement_hop_limit(&mut bytes);
            }
            Some(Crossing::From(source)) => readdress(&mut bytes, source),
            Some(Crossing::AsIs) | None => {}
        }
        let copies = Copies {
            packet: bytes,
            offload: packet.offload(),
            to,
            sent: 0,
            way,
        };
        if let Err(copies) = self.output.push_copies(copies) {
            for _ in &copies.to {
                let lost = Verdict::Drop(DropReason::OutputQueueFull);
                self.ledger.own(lost, copies.packet.as_slice());
            }
            self.free_list(copies.to);
            self.output.free.push(copies.packet);
        }
    }

    fn free_list(&mut self, list: Vec<u32>) {
        if let Some(groups) = &mut self.groups {
            groups.free.push(list);
        }
    }

    /// Whether a packet is longer than the tunnel takes. Nobody is told: it is not answered who sends to
    /// groups.
    fn is_too_long(&self, packet: &PacketBuf<'_>) -> bool {
        let is_v4 = packet.as_slice().first().is_some_and(|it| it >> 4 == 4);
        let mtu = if is_v4 {
            self.config.mtu
        } else {
            self.config.mtu_v6
        };
        super::router::longest(packet) > usize::from(mtu.get())
    }

    /// Makes the next copy in `packet`.
    pub(super) fn next_copy(
        &mut self,
        mut copies: Copies,
        packet: &mut PacketBuf<'_>,
    ) -> Option<Verdict> {
        let number = *copies.to.get(copies.sent)?;
        copies.sent += 1;
        self.ledger.enters(Source::Node, copies.packet.as_slice());
        let verdict = match packet.replace(&copies.packet) {
            Ok(()) => {
                packet.set_offload(copies.offload);
                self.address_copy(copies.way, number, packet)
            }
            Err(_) => Err(DropReason::HeadroomExceeded),
        };
        if copies.sent < copies.to.len() {
            self.output.queue.push_front(Queued::Copies(copies));
        } else {
            self.free_list(copies.to);
            self.output.free.push(copies.packet);
        }
        let verdict = verdict.unwrap_or_else(Verdict::Drop);
        Some(self.count(Source::Node, verdict, packet))
    }

    fn address_copy(&mut self, way: Way, number: u32, packet: &mut PacketBuf<'_>) -> Decision {
        let is_v4 = packet.as_slice().first().is_some_and(|it| it >> 4 == 4);
        match way {
            Way::Ports(from, mac) => {
                let port = PortId(number);
                if !self.ports.contains_key(&port) {
                    return Err(DropReason::PortGone);
                }
                self.check_policy(Direction::ToPod, port, packet.as_slice())?;
                self.check_rate(port, packet)?;
                let ethertype = if is_v4 {
                    EthernetProtocol::Ipv4
                } else {
                    EthernetProtocol::Ipv6
                };
                frame::prepend_as(packet, from, mac, ethertype)
                    .map_err(|_| DropReason::HeadroomExceeded)?;
                Ok(Verdict::Port(port))
            }
            Way::Peers if is_v4 => {
                let id = PeerId(number);
                let peer = *self.peers.outgoing(id).ok_or(DropReason::PeerGone)?;
                if peer.path == Path::Unreachable {
                    return Err(DropReason::NextHopUnreachable);
                }
                self.encapsulate(id, &peer, packet)
            }
            Way::Peers => {
                let id = PeerId(number);
                let peer = self.peers.outgoing_v6(id).ok_or(DropReason::PeerGone)?;
                if peer.path == Path::Unreachable {
                    return Err(DropReason::NextHopUnreachable);
                }
                self.encapsulate_v6(id, &peer, packet)
            }
        }
    }

    /// What becomes of a peer's packet that the router refuses. Its source has been checked by then: one for
    /// no single host is copied to the members of its group. Asked here, it costs others nothing.
    #[cold]
    pub(super) fn refuse_or_copy(
        &mut self,
        now: Instant,
        reason: DropReason,
        packet: &mut PacketBuf<'_>,
    ) -> Verdict {
        if reason != DropReason::DestinationNotUnicast || self.groups.is_none() {
            return Verdict::Drop(reason);
        }
        let copied = self.deliver_to_members(now, packet);
        copied.unwrap_or_else(Verdict::Drop)
    }

    /// Copies a peer's packet to members of its group.
    fn deliver_to_members(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Decision {
        let head = Head::read(packet.as_slice())?;
        let scope = Scope::of(head.group).ok_or(DropReason::DestinationNotUnicast)?;
        // Which node has sent it is told by whose the source is.
        let owner = self.routes.lookup(head.source).copied();
        let groups = self.groups.as_ref();
        let at = groups.and_then(|groups| match owner {
            Some(NextHop::Peer(id)) => groups.find(id).ok(),
            Some(NextHop::Local) | None => None,
        });
        let at = at.ok_or(DropReason::DestinationNotUnicast)?;
        let stays = scope != Scope::Wider && !head.is_mdns(packet.as_slice());
        if stays || head.is_of_link(packet.as_slice()) {
            return Err(DropReason::BeyondScope);
        }
        if head.hop_limit == 0 {
            return Err(DropReason::TtlExceeded);
        }
        let each = work_of(packet)?;
        let members = self.members(now, head.group, None);
        let work = each.saturating_mul(members.len() as u64);
        let peer = self.groups.as_mut().and_then(|it| it.peers.get_mut(at));
        let has_share = peer.is_some_and(|peer| peer.storm.take(now, work));
        if members.is_empty() || !has_share {
            let reason = match members.is_empty() {
                true => DropReason::GroupWithoutMembers,
                false => DropReason::Storm,
            };
            self.free_list(members);
            return Err(reason);
        }
        let way = Way::Ports(self.config.gateway_mac, multicast::mac_of(head.group));
        self.queue_copies(packet, members, way, None);
        Ok(Verdict::Consumed)
    }

    /// Asks hosts which groups they are in, and forgets those that have not answered.
    pub(super) fn handle_groups(&mut self, now: Instant) {
        let Some(mut groups) = self.groups.take() else {
            return;
        };
        if std::mem::take(&mut groups.has_attached) {
            groups.next_query = groups.next_query.min(now + ATTACHED);
            groups.first_queries = ROBUSTNESS;
        }
        while let Some((port, group)) = groups.memberships.next_query(now) {
            self.query(Verdict::Port(port), Some(group), LAST_MEMBER_INTERVAL);
        }
        groups.memberships.expire(now);
        if groups.is_querier && now >= groups.next_query {
            let response = match groups.first_queries {
                0 => QUERY_RESPONSE_INTERVAL,
                _ => FIRST_RESPONSE_INTERVAL,
            };
            groups.first_queries = groups.first_queries.saturating_sub(1);
            groups.next_query = now
                + match groups.first_queries {
                    0 => QUERY_INTERVAL,
                    _ => STARTUP_QUERY_INTERVAL,
                };
            if !self.ports.is_empty() {
                self.query(Verdict::Flood { except: None }, None, response);
            }
        }
        self.groups = Some(groups);
    }

    /// Sends a query for one group, or for all of the versions of IP that pods have.
    fn query(&mut self, verdict: Verdict, group: Option<IpAddr>, response: Duration) {
        let mac = self.config.gateway_mac;
        let of_v4 = match group {
            None => Some(None),
            Some(IpAddr::V4(group)) => Some(Some(group)),
            Some(IpAddr::V6(_)) => None,
        };
        if let (Some(home), Some(group)) = (self.home, of_v4) {
            let frame = igmp::write_query((mac, home.gateway), group, response);
            self.queue_frame(verdict, &frame);
        }
        let of_v6 = match group {
            None => Some(None),
            Some(IpAddr::V6(group)) => Some(Some(group)),
            Some(IpAddr::V4(_)) => None,
        };
        if let (Some(_), Some(group)) = (self.home_v6, of_v6) {
            let frame = mld::write_query((mac, gateway::LINK_LOCAL), group, response);
            self.queue_frame(verdict, &frame);
        }
    }
}

/// The length of the IP packet in a frame, whose header is right.
fn ip_len(frame: &PacketBuf<'_>) -> Result<usize, DropReason> {
    let bytes = frame.as_slice().get(frame::HEADER_LEN..);
    let bytes = bytes.unwrap_or_default();
    match bytes.first().map(|first| first >> 4) {
        Some(4) => Ok(v4::check(bytes)?),
        _ => Ok(v6::check(bytes)?),
    }
}

/// Writes another source into a UDP datagram over IPv6, whose checksum is complete.
fn readdress(packet: &mut [u8], source: Ipv6Addr) {
    Ipv6Packet::new_unchecked(&mut *packet).set_src_addr(source);
    let Ok(upper) = v6::upper_layer(packet) else {
        return;
    };
    let Some(field) = packet.get_mut(upper.offset + 6..upper.offset + 8) else {
        return;
    };
    field.fill(0);
    let sum = v6::upper_checksum(packet, upper.protocol, upper.offset);
    // None is written as all ones (RFC 768).
    let sum = if sum == 0 { 0xffff } else { sum };
    packet[upper.offset + 6..upper.offset + 8].copy_from_slice(&sum.to_be_bytes());
}
