//! The node on its host's LAN: next hops, and bare packets from them.

use std::collections::VecDeque;
use std::net::IpAddr;

use ipnet::IpNet;
use muslin_encap::buffer::PacketBuf;
use smoltcp::time::Instant;
use smoltcp::wire::{ArpOperation, ArpRepr, EthernetAddress, EthernetProtocol};

use super::lan::{Early, Lan};
use super::resolve::Link;
use super::router::{Decision, Origin};
use super::{NextHop, Node, uplink_v6};
use crate::datapath::filter::Filter;
use crate::datapath::frame;
use crate::datapath::neighbour::{Claim, Neighbours, Place, State};
use crate::datapath::observe::{Observer, Source};
use crate::datapath::peer::{Path, Peer, PeerId};
use crate::datapath::port::PortId;
use crate::datapath::trace::TraceStep;
use crate::datapath::tunnel::Tunnel;
use crate::datapath::uplink::Uplink;
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

/// Neighbours are places at ports, and an uplink has but one.
const PORT: PortId = PortId(u32::MAX);

/// Packets that may wait until it is known where one host is.
const EARLY_PER_HOST: usize = 4;
/// Packets that may wait so for all hosts; a packet is 64 KiB at most.
const EARLY_IN_ALL: usize = 64;

impl<O: Observer, F: Filter> Node<O, F> {
    /// Gives the node an uplink, or another one, or takes it away. Peers on its link are sent bare
    /// packets from then on. Addresses of its own are announced (RFC 5227 section 3, RFC 4861 section
    /// 7.2.6).
    pub fn set_uplink(&mut self, uplink: Option<Uplink>) {
        let (known, early) = match self.uplink.take() {
            Some(link) => (Some(link.neighbours), link.early),
            None => (None, VecDeque::new()),
        };
        let early = if uplink.is_none() {
            self.lose(early);
            VecDeque::new()
        } else {
            early
        };
        let limit = self.config.limits.neighbours;
        self.uplink = uplink.map(|uplink| Lan {
            uplink,
            neighbours: known.unwrap_or_else(|| Neighbours::new(limit, self.seed)),
            early,
        });
        let tunnel = self.config.tunnel;
        self.peers
            .set_paths(|peer| path(uplink.as_ref(), tunnel, peer));
        if let Some(link) = &mut self.uplink {
            for peer in self.peers.iter() {
                if path(uplink.as_ref(), tunnel, peer) == Path::Uplink {
                    link.neighbours.seek_in_turn(peer.address.ip());
                }
            }
        }
        if let Some(own) = uplink.filter(|own| own.answers) {
            for address in own.nets.addresses().iter() {
                let words = announcement(own.mac, address);
                self.queue_frame(Verdict::Uplink { id: None }, &words);
            }
        }
    }

    /// The uplink.
    #[must_use]
    pub fn uplink(&self) -> Option<&Uplink> {
        self.uplink.as_ref().map(|link| &link.uplink)
    }

    /// The hosts on the uplink's link that are known or looked for, in no particular order.
    pub fn next_hops(&self) -> impl Iterator<Item = (IpAddr, Option<Place>, State)> + '_ {
        self.uplink.iter().flat_map(|link| link.neighbours.iter())
    }

    /// Says where a host on the uplink's link is, as another process has learned it.
    pub fn learn_next_hop(&mut self, now: Instant, address: IpAddr, mac: EthernetAddress) {
        if let Some(link) = &mut self.uplink {
            let place = Place { mac, port: PORT };
            let waiting = link.neighbours.hear(address, place, now);
            debug_assert!(waiting.is_empty(), "nothing was sent yet");
        }
    }

    /// Takes an Ethernet frame from the uplink.
    pub fn from_uplink(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Verdict {
        self.begin(now);
        self.ledger.enters(Source::Uplink, packet);
        let verdict = self
            .ingress_uplink(now, packet)
            .unwrap_or_else(Verdict::Drop);
        self.count(Source::Uplink, verdict, packet)
    }

    /// Whether a frame of the uplink is an IP packet for this node, as its header says.
    pub(in crate::datapath) fn is_for_uplink(&self, bytes: &[u8]) -> bool {
        let own = self.uplink().map(|uplink| uplink.mac);
        frame::parse(bytes).is_ok_and(|view| {
            let is_ip = matches!(
                view.ethertype(),
                EthernetProtocol::Ipv4 | EthernetProtocol::Ipv6
            );
            Some(view.dst_addr()) == own && is_ip
        })
    }

    /// Counts a frame of the uplink whose virtio-net header could not be read.
    pub fn refuse_uplink_frame(&mut self) {
        self.ledger.refuse(Source::Uplink, DropReason::VirtioHeader);
    }

    /// Learns from a frame with ARP or neighbour discovery that another worker's node took from the uplink.
    pub fn learn_from_sibling_uplink(&mut self, now: Instant, frame: &[u8]) {
        self.begin(now);
        let view = frame::parse(frame).ok();
        let Some(view) = view.filter(|view| view.src_addr().is_unicast()) else {
            return;
        };
        // A claim that is refused here is refused there, too.
        let _ = match view.ethertype() {
            EthernetProtocol::Ipv6 => self.discover_host(now, frame),
            _ => self.hear_host(now, frame),
        };
    }

    /// The claim of a next hop's address that has just begun to be looked into, if there is one, as an
    /// announcement: siblings hear of packets from that host no other way.
    pub(in crate::datapath) fn take_claim(&mut self) -> Option<Vec<u8>> {
        let (host, mac) = self.claimed.take()?;
        Some(announcement(mac, host))
    }

    pub(super) fn path_to(&self, peer: &Peer) -> Path {
        path(self.uplink(), self.config.tunnel, peer)
    }

    fn ingress_uplink(
        &mut self,
        now: Instant,
        packet: &mut PacketBuf<'_>,
    ) -> Result<Verdict, DropReason> {
        let own = self.uplink().ok_or(DropReason::NextHopUnreachable)?.mac;
        frame::check_offload(packet)?;
        let view = frame::parse(packet.as_slice())?;
        let (source, destination) = (view.src_addr(), view.dst_addr());
        let ethertype = view.ethertype();
        if source == own {
            return Err(DropReason::SourceMacOwn);
        }
        if !source.is_unicast() {
            return Err(DropReason::SourceMacGroup);
        }
        let is_arp = ethertype == EthernetProtocol::Arp;
        if destination != own && !(is_arp && destination.is_broadcast()) {
            if !self.hears_group(packet.as_slice(), destination) {
                return Err(DropReason::DestinationMacForeign);
            }
            self.ledger.step(|| TraceStep::Uplink { mac: source });
            return self.discover_host(now, packet.as_slice());
        }
        self.ledger.step(|| TraceStep::Uplink { mac: source });
        match ethertype {
            EthernetProtocol::Arp => {
                self.answer_host(packet.as_slice());
                self.hear_host(now, packet.as_slice())
            }
            EthernetProtocol::Ipv4 => {
                packet.trim_front(frame::HEADER_LEN);
                self.route(now, Origin::Uplink(source), packet)
            }
            EthernetProtocol::Ipv6 if frame::is_neighbour_discovery(packet.as_slice()) => {
                self.discover_host(now, packet.as_slice())
            }
            EthernetProtocol::Ipv6 => {
                packet.trim_front(frame::HEADER_LEN);
                self.route_v6(now, Origin::Uplink(source), packet)
            }
            EthernetProtocol::Unknown(_) => Err(DropReason::EtherTypeUnsupported),
        }
    }

    /// Checks that a packet from a host with this MAC address comes from a pod of its node, and
    /// counts it for that peer. A host that is not known yet is asked for; one that has got another
    /// MAC address has to be believed first.
    #[inline]
    pub(super) fn check_host(
        &mut self,
        now: Instant,
        mac: EthernetAddress,
        source: IpAddr,
        len: usize,
    ) -> Result<(), DropReason> {
        let sender = match self.routes.lookup(source) {
            Some(NextHop::Peer(id)) => self.host_of(source, *id),
            Some(NextHop::Local) | None => None,
        };
        let Some((id, host)) = sender else {
            return match self.config.guard.peers {
                true => Err(DropReason::SourceNotInLease),
                false => Ok(()),
            };
        };
        let link = self.uplink.as_mut().ok_or(DropReason::PeerGone)?;
        match link.neighbours.get(host) {
            Some(place) if place.mac == mac => {}
            Some(_) => {
                // Without a guard, too: its answers would go to where it was.
                let claim = self.claim(now, host, mac);
                if self.config.guard.peers {
                    claim?;
                }
            }
            None if !self.config.guard.peers => {}
            None => {
                if link.neighbours.seek(host, now) {
                    self.ask(Link::Uplink, host, None);
                }
                return Err(DropReason::NextHopUnknown);
            }
        }
        self.peers.count_received(now, id, len + frame::HEADER_LEN);
        Ok(())
    }

    /// A peer on the uplink's link, with its host, to which a packet goes whose source is `source`.
    #[inline]
    fn host_of(&self, source: IpAddr, id: PeerId) -> Option<(PeerId, IpAddr)> {
        let peer = self.peers.outgoing(id);
        let peer = peer.filter(|peer| peer.path == Path::Uplink)?;
        let host = match source {
            IpAddr::V4(_) => IpAddr::V4(*peer.address.ip()),
            IpAddr::V6(_) => IpAddr::V6(*self.peers.outgoing_v6(id)?.address.ip()),
        };
        Some((id, host))
    }

    /// Lets a packet wait for the answer that says whether it comes from the host that it must come
    /// from: it goes on then, or is dropped.
    pub(super) fn wait_for_sender(
        &mut self,
        mac: EthernetAddress,
        source: IpAddr,
        is_for_flows: bool,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let unknown = DropReason::NextHopUnknown;
        // What is for egress cannot be handed over later, and what is sent faster than one packet at
        // a time is sent again.
        if is_for_flows || !packet.is_single() {
            return Err(unknown);
        }
        let host = match self.routes.lookup(source) {
            Some(NextHop::Peer(id)) => self.host_of(source, *id).map(|(_, host)| host),
            Some(NextHop::Local) | None => None,
        };
        let (host, link) = host.zip(self.uplink.as_mut()).ok_or(unknown)?;
        let waiting = link.early.iter().filter(|early| early.host == host).count();
        if !link.neighbours.is_sought(host)
            || waiting >= EARLY_PER_HOST
            || link.early.len() >= EARLY_IN_ALL
        {
            return Err(unknown);
        }
        packet.complete_checksum();
        let packet = packet.as_slice().to_vec();
        link.early.push_back(Early { host, mac, packet });
        Ok(Verdict::Consumed)
    }

    /// Takes the packets that waited until it is known where a host is.
    fn take_early(&mut self, now: Instant, host: IpAddr) {
        for Early { mac, packet, .. } in self.early_of(host) {
            self.with_scratch(&packet, |node, packet| match host {
                IpAddr::V4(_) => node.route(now, Origin::Uplink(mac), packet),
                IpAddr::V6(_) => node.route_v6(now, Origin::Uplink(mac), packet),
            });
        }
    }

    /// Drops the packets that waited for a host that does not answer.
    pub(super) fn lose_early(&mut self, host: IpAddr) {
        let early = self.early_of(host);
        self.lose(early);
    }

    fn early_of(&mut self, host: IpAddr) -> Vec<Early> {
        let Some(link) = self.uplink.as_mut().filter(|link| !link.early.is_empty()) else {
            return Vec::new();
        };
        let early = std::mem::take(&mut link.early).into_iter();
        let (taken, left) = early.partition::<Vec<_>, _>(|early| early.host == host);
        link.early = left.into();
        taken
    }

    /// Counts packets whose sender was not found.
    fn lose(&mut self, early: impl IntoIterator<Item = Early>) {
        for Early { packet, .. } in early {
            let lost = Verdict::Drop(DropReason::NextHopUnknown);
            self.ledger.own(lost, packet.as_slice());
        }
    }

    /// Learns from an ARP message where a next hop is. Nothing else is kept of what hosts say.
    fn hear_host(&mut self, now: Instant, bytes: &[u8]) -> Result<Verdict, DropReason> {
        let payload = bytes.get(frame::HEADER_LEN..).unwrap_or_default();
        let Some(ArpRepr::EthernetIpv4 {
            source_hardware_addr: mac,
            source_protocol_addr: host,
            target_protocol_addr: target,
            ..
        }) = frame::arp(payload)
        else {
            return Err(DropReason::EtherTypeUnsupported);
        };
        let own = self.uplink().map(|own| own.nets.addresses());
        let is_for_us = own.is_some_and(|own| own.ipv4() == Some(target));
        self.hear_next_hop(now, host.into(), mac, is_for_us)
    }

    /// Hears that a host says to us, or to all, where it is.
    pub(super) fn hear_next_hop(
        &mut self,
        now: Instant,
        host: IpAddr,
        mac: EthernetAddress,
        is_for_us: bool,
    ) -> Result<Verdict, DropReason> {
        let is_on_link = |own: &Uplink| own.is_on_link(host);
        let is_next_hop = self.uplink().is_some_and(is_on_link)
            && self.peers.first_at(host).is_some()
            && mac.is_unicast()
            && self.uplink().is_some_and(|own| own.mac != mac);
        // As in Linux: what a host announces to all only changes what is known.
        let link = self.uplink.as_ref();
        let is_known = link.is_some_and(|link| link.neighbours.get(host).is_some());
        if !is_next_hop || !(is_for_us || is_known) {
            return Ok(Verdict::Consumed);
        }
        self.claim(now, host, mac)?;
        Ok(Verdict::Consumed)
    }

    /// Hears that a next hop has this MAC address.
    fn claim(
        &mut self,
        now: Instant,
        host: IpAddr,
        mac: EthernetAddress,
    ) -> Result<(), DropReason> {
        let place = Place { mac, port: PORT };
        let link = self.uplink.as_mut().ok_or(DropReason::PeerGone)?;
        match link.neighbours.claim(host, place, now) {
            Claim::Believed(waited) => {
                for packet in waited {
                    self.route_own(now, &packet);
                }
                self.take_early(now, host);
                Ok(())
            }
            Claim::Doubted(known) => {
                self.claimed = Some((host, mac));
                self.ask(Link::Uplink, host, Some(known));
                Err(DropReason::NextHopConflict)
            }
            Claim::Refused => Err(DropReason::NextHopConflict),
        }
    }

    /// Answers a host that asks for the node's own address.
    fn answer_host(&mut self, bytes: &[u8]) {
        let Some(own) = self.uplink().copied().filter(|own| own.answers) else {
            return;
        };
        let payload = bytes.get(frame::HEADER_LEN..).unwrap_or_default();
        if let Some(ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = frame::arp(payload)
            && own.nets.addresses().ipv4() == Some(target_protocol_addr)
            && source_hardware_addr.is_unicast()
        {
            let answer = frame::write_arp(
                ArpOperation::Reply,
                (own.mac, target_protocol_addr),
                (source_hardware_addr, source_protocol_addr),
            );
            self.queue_frame(Verdict::Uplink { id: None }, &answer);
        }
    }
}

/// A frame that says to all that a host's address is at this MAC address.
fn announcement(mac: EthernetAddress, host: IpAddr) -> Vec<u8> {
    match host {
        IpAddr::V4(host) => {
            let all = (EthernetAddress::BROADCAST, host);
            frame::write_arp(ArpOperation::Request, (mac, host), all).to_vec()
        }
        IpAddr::V6(host) => uplink_v6::announcement(mac, host).to_vec(),
    }
}

/// How packets get to a peer.
fn path(uplink: Option<&Uplink>, tunnel: Tunnel, peer: &Peer) -> Path {
    let host = peer.address.ip();
    match (peer.subnet, host) {
        (IpNet::V4(_), IpAddr::V4(_)) | (IpNet::V6(_), IpAddr::V6(_)) => {}
        (IpNet::V4(_), IpAddr::V6(_)) | (IpNet::V6(_), IpAddr::V4(_)) => return Path::Unreachable,
    }
    match uplink {
        Some(uplink) if uplink.is_on_link(host) => Path::Uplink,
        _ if tunnel.carries(host) => Path::Tunnel,
        _ => Path::Unreachable,
    }
}
