//! The router: where an IPv4 packet goes, and what it needs to get there.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::fragment::Fragments;
use muslin_encap::ip::transport::Transport;
use muslin_encap::ip::{mss, v4};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::split;
use muslin_encap::offload::split::{Checksums, MAX_HEADER_LEN, Split, TrainLimits};
use muslin_encap::offload::virtio::Checksum;
use muslin_encap::tunnel::vxlan;
use smoltcp::time::Instant;
use smoltcp::wire::{ArpOperation, EthernetAddress, IpProtocol, Ipv4Packet};

use super::peers::Outgoing;
use super::{NextHop, Node, Verdict};
use crate::addresses::ipv4;
use crate::datapath::frame;
use crate::datapath::guard;
use crate::datapath::hash;
use crate::datapath::icmp::{self, IcmpError};
use crate::datapath::neighbour::{Due, Neighbours, Place, Resolution};
use crate::datapath::peer::{Path, PeerId, Tunnel};
use crate::drops::DropReason;

pub(super) type Step = Result<Verdict, DropReason>;

/// Where a packet to be routed comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Pod,
    /// The tunnel; the first of the peers with its outer address, if there is one.
    Peer(Option<PeerId>),
    /// The uplink, from a host with this MAC address.
    Uplink(EthernetAddress),
}

/// The way of a packet whose route is known.
#[derive(Debug, Clone, Copy)]
pub(super) enum Via {
    /// To a pod of this node.
    Pods,
    /// To a peer, as it is known when the packet is routed.
    Peer(PeerId, Outgoing),
}

/// The link on which the next hop is resolved.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hop {
    /// The node's own pods.
    Pod,
    /// The uplink's, with the host of this peer.
    Host(PeerId, Outgoing),
}

/// One of the node's links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum On {
    /// The switch with the pods.
    Bridge,
    /// The uplink.
    Uplink,
}

impl Hop {
    const fn link(self) -> On {
        match self {
            Self::Pod => On::Bridge,
            Self::Host(..) => On::Uplink,
        }
    }
}

impl From<v4::Error> for DropReason {
    fn from(error: v4::Error) -> Self {
        match error {
            v4::Error::TooShort { .. } => Self::Ipv4TooShort,
            v4::Error::Version(_) => Self::Ipv4Version,
            v4::Error::HeaderLen(_) => Self::Ipv4HeaderLen,
            v4::Error::TotalLen { .. } => Self::Ipv4TotalLen,
            v4::Error::Checksum => Self::Ipv4Checksum,
        }
    }
}

/// Length of the longest IP packet that `packet` becomes on a wire.
fn longest(packet: &PacketBuf<'_>) -> usize {
    // The head of a merged packet is its first segment, which is its longest.
    if packet.is_single() || packet.total_len() > packet.len() {
        return packet.len();
    }
    let size = packet.offload().gso.map_or(0, |gso| gso.size.into());
    Transport::parse(packet.as_slice(), 0)
        .map_or(packet.len(), |at| at.payload + at.payload_len().min(size))
}

/// A packet that came as one stands for no more packets than a kernel makes of one: whoever takes it
/// apart does so in the turn of whoever sent it, at the cost of all others. What we merged ourselves
/// came in packets.
fn check_work(packet: &PacketBuf<'_>) -> Result<(), DropReason> {
    match packet.offload().gso {
        Some(gso) if packet.total_len() == packet.len() => {
            let count = split::segment_count(packet.as_slice(), 0, gso);
            count
                .map(|_| ())
                .map_err(|_| DropReason::SuperpacketRefused)
        }
        _ => Ok(()),
    }
}

/// Whether a packet to the gateway is for flows and services: TCP, UDP and what is said of them.
pub(super) fn is_for_egress(packet: &[u8]) -> bool {
    let protocol = Ipv4Packet::new_unchecked(packet).next_header();
    matches!(protocol, IpProtocol::Tcp | IpProtocol::Udp) || icmp::is_error(packet)
}

impl Node {
    /// Routes a packet that begins with its IPv4 header.
    pub(super) fn route(
        &mut self,
        now: Instant,
        origin: Origin,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        packet.truncate(v4::check_head(packet.as_slice(), packet.total_len())?);
        let view = Ipv4Packet::new_unchecked(packet.as_slice());
        let (source, destination) = (view.src_addr(), view.dst_addr());
        let (ttl, header_len) = (view.hop_limit(), view.header_len());
        // Finishing a checksum must not write into the header, which is checked before.
        if let Checksum::Partial { start, .. } = packet.offload().checksum
            && start < header_len.into()
        {
            return Err(DropReason::VirtioHeader);
        }
        check_work(packet)?;
        match (
            self.check_source(now, origin, source, packet.total_len()),
            origin,
        ) {
            (Err(DropReason::NextHopUnknown), Origin::Uplink(mac)) => {
                return self.wait_for_sender(mac, source, packet);
            }
            (checked, _) => checked?,
        }
        if self.is_own(destination) {
            if self.egress.is_some() && is_for_egress(packet.as_slice()) {
                return Ok(Verdict::Egress);
            }
            packet.complete_checksum();
            self.serve(now, packet.as_slice());
            return Ok(Verdict::Consumed);
        }
        if guard::is_martian(destination) || destination == self.subnet.broadcast() {
            return Err(DropReason::DestinationNotUnicast);
        }
        let next = self.routes.lookup(destination.into()).copied();
        if origin != Origin::Pod && next != Some(NextHop::Local) {
            return Err(DropReason::TunnelToTunnel);
        }
        if ttl <= 1 {
            self.report(now, IcmpError::TimeExceeded, packet.as_slice());
            return Err(DropReason::TtlExceeded);
        }
        let Some(next) = next else {
            if self
                .egress
                .is_some_and(|network| !network.contains(&destination))
            {
                return Ok(Verdict::Egress);
            }
            self.report(now, IcmpError::NetUnreachable, packet.as_slice());
            return Err(DropReason::NoRoute);
        };
        let via = self.via(next)?;
        let mtu = self.path_mtu(via);
        let fits = longest(packet) <= usize::from(mtu.get());
        if !fits && Ipv4Packet::new_unchecked(packet.as_slice()).dont_frag() {
            self.report(
                now,
                IcmpError::FragmentationNeeded(mtu.get()),
                packet.as_slice(),
            );
            return Err(DropReason::FragmentationNeeded);
        }
        v4::decrement_ttl(packet.as_mut_slice());
        if self.config.clamp_mss {
            let offload = packet.offload().checksum;
            mss::clamp(
                packet.as_mut_slice(),
                offload,
                mtu.min(self.way_back(origin)),
            );
        }
        if fits {
            self.forward(now, destination, via, packet)
        } else {
            self.in_pieces(now, destination, via, packet)
        }
    }

    /// Routes a packet from outside the overlay to a pod of this node, or one from the gateway to
    /// any pod.
    pub(super) fn route_to_pod(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Step {
        packet.truncate(v4::check_head(packet.as_slice(), packet.total_len())?);
        let view = Ipv4Packet::new_unchecked(packet.as_slice());
        let (source, destination) = (view.src_addr(), view.dst_addr());
        self.check_outside(source)?;
        let next = self.routes.lookup(destination.into()).copied();
        // Other nodes take nothing that is not from this one's subnet.
        let is_way = |next: &NextHop| *next == NextHop::Local || self.is_own(source);
        let next = next.filter(is_way).ok_or(DropReason::NoRoute)?;
        let via = self.via(next)?;
        if longest(packet) <= usize::from(self.path_mtu(via).get()) {
            self.forward(now, destination, via, packet)
        } else {
            self.in_pieces(now, destination, via, packet)
        }
    }

    /// Nobody outside has an address of the overlay, or one that is no host's. Anybody may put them
    /// in a datagram to a port of the host.
    fn check_outside(&self, source: Ipv4Addr) -> Result<(), DropReason> {
        let is_inside = self.egress.is_some_and(|network| network.contains(&source));
        if guard::is_martian(source) || is_inside && !self.is_own(source) {
            return Err(DropReason::SourceAddressInvalid);
        }
        Ok(())
    }

    /// Whose address a pod's source is was checked at its port; a peer's must be in its lease.
    fn check_source(
        &mut self,
        now: Instant,
        origin: Origin,
        source: Ipv4Addr,
        len: usize,
    ) -> Result<(), DropReason> {
        if guard::is_martian(source) || source == self.subnet.broadcast() {
            return Err(DropReason::SourceAddressInvalid);
        }
        match origin {
            Origin::Pod => return Ok(()),
            Origin::Uplink(mac) => self.check_host(now, mac, source, len)?,
            Origin::Peer(first) => {
                if self.config.guard.peers && !self.is_from(first, source) {
                    return Err(DropReason::SourceNotInLease);
                }
            }
        }
        // Even without that guard nobody outside may pose as one of our own pods.
        if self.subnet.contains(&source) {
            return Err(DropReason::SourceNotInLease);
        }
        Ok(())
    }

    /// Whether packets to `source` go to where one came from that is said to be from there: a lease
    /// within another is its own holder's alone.
    fn is_from(&self, first: Option<PeerId>, source: Ipv4Addr) -> bool {
        let Some(first) = first else {
            return false;
        };
        // What is known of the peer spares the route table, where leases have one length.
        if !self.routes.may_nest() && self.peers.is_routed(first, source) {
            return true;
        }
        match self.routes.lookup(source.into()) {
            Some(NextHop::Peer(owner)) => self.peers.share_address(*owner, first),
            Some(NextHop::Local) | None => false,
        }
    }

    /// The way of a route.
    fn via(&self, next: NextHop) -> Result<Via, DropReason> {
        match next {
            NextHop::Local => Ok(Via::Pods),
            NextHop::Peer(id) => {
                let peer = self.peers.outgoing(id).ok_or(DropReason::PeerGone)?;
                Ok(Via::Peer(id, *peer))
            }
        }
    }

    /// The largest packet that a way takes.
    fn path_mtu(&self, via: Via) -> Mtu {
        match (via, &self.uplink) {
            (Via::Peer(_, peer), Some(link)) if peer.path == Path::Uplink => link.uplink.mtu,
            _ => self.config.mtu,
        }
    }

    /// The largest packet that goes back to where one came from; pods know their own MTU.
    fn way_back(&self, origin: Origin) -> Mtu {
        match (origin, &self.uplink) {
            (Origin::Pod, _) => Mtu::MAX,
            (Origin::Uplink(_), Some(link)) => link.uplink.mtu,
            (Origin::Uplink(_), None) | (Origin::Peer(_), _) => self.config.mtu,
        }
    }

    /// Sends a packet on in several: a superpacket as its segments, a packet larger than the MTU as
    /// fragments.
    fn in_pieces(
        &mut self,
        now: Instant,
        destination: Ipv4Addr,
        via: Via,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        packet.complete_checksum();
        let mtu = self.path_mtu(via);
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(HEADROOM + frame::MAX_LEN, 0);
        let mut send = |node: &mut Self, scratch: &mut [u8], len| {
            if let Ok(mut piece) = PacketBuf::new(scratch, HEADROOM, len) {
                let step = if len > mtu.get().into() {
                    node.in_pieces(now, destination, via, &mut piece)
                } else {
                    node.forward(now, destination, via, &mut piece)
                };
                node.enqueue(step, &piece);
            }
        };
        let step = if packet.is_single() {
            self.fragments(mtu, packet.as_slice(), &mut scratch, &mut send)
        } else {
            self.segments(packet, &mut scratch, &mut send)
        };
        self.scratch = scratch;
        step
    }

    fn fragments(
        &mut self,
        mtu: Mtu,
        packet: &[u8],
        scratch: &mut [u8],
        send: &mut impl FnMut(&mut Self, &mut [u8], usize),
    ) -> Step {
        let mut fragments = Fragments::new(packet, mtu).ok_or(DropReason::FragmentationNeeded)?;
        while let Some(len) = fragments.write_next(scratch.get_mut(HEADROOM..).unwrap_or_default())
        {
            send(self, scratch, len);
        }
        Ok(Verdict::Consumed)
    }

    fn segments(
        &mut self,
        packet: &PacketBuf<'_>,
        scratch: &mut [u8],
        send: &mut impl FnMut(&mut Self, &mut [u8], usize),
    ) -> Step {
        let refused = DropReason::SuperpacketRefused;
        // What was merged came in packets that fit, from a peer; those are lost like any that come
        // too fast for a neighbour to be found.
        if packet.total_len() > packet.len() {
            return Err(refused);
        }
        let gso = packet.offload().gso.ok_or(refused)?;
        let mut split =
            Split::new(packet.as_slice(), 0, gso, Checksums::Complete).map_err(|_| refused)?;
        let mut header = [0; MAX_HEADER_LEN];
        while let Ok(Some(train)) = split.next_train(&mut header, TrainLimits::ONE) {
            for (header, payload) in train.segments() {
                let len = header.len() + payload.len();
                if let Some(room) = scratch.get_mut(HEADROOM..HEADROOM + len) {
                    room[..header.len()].copy_from_slice(header);
                    room[header.len()..].copy_from_slice(payload);
                    send(self, scratch, len);
                }
            }
        }
        Ok(Verdict::Consumed)
    }

    /// The last step: link-layer header or encapsulation.
    pub(super) fn forward(
        &mut self,
        now: Instant,
        destination: Ipv4Addr,
        via: Via,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        let (id, peer) = match via {
            Via::Pods => return self.send_to_host(now, Hop::Pod, destination, packet),
            Via::Peer(id, peer) => (id, peer),
        };
        match peer.path {
            Path::Tunnel => self.encapsulate(id, &peer, packet),
            Path::Uplink => {
                let host = *peer.address.ip();
                self.send_to_host(now, Hop::Host(id, peer), host, packet)
            }
            Path::Unreachable => {
                self.report(now, IcmpError::HostUnreachable, packet.as_slice());
                Err(DropReason::NextHopUnreachable)
            }
        }
    }

    /// Sends a packet to a host on one of the node's links, now or when it is known where that is.
    fn send_to_host(
        &mut self,
        now: Instant,
        hop: Hop,
        host: Ipv4Addr,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        match self.neighbours_of(hop)?.known(host.into(), now) {
            Some(place) => self.deliver(hop, place, packet),
            None => self.resolve(now, hop, host, packet),
        }
    }

    fn resolve(
        &mut self,
        now: Instant,
        hop: Hop,
        host: Ipv4Addr,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        let address = IpAddr::V4(host);
        if self.neighbours_of(hop)?.get(address).is_none() {
            if matches!(hop, Hop::Pod) && self.unguarded == 0 {
                if let Some(until) = self.awaited.until(now, host) {
                    return self.wait_for_pod(now, host, packet, until);
                }
                // No attachment has it, and no pod may answer for an address that is not its own.
                self.report(now, IcmpError::HostUnreachable, packet.as_slice());
                return Err(DropReason::HostUnreachable);
            }
            if !packet.is_single() {
                let via = match hop {
                    Hop::Pod => Via::Pods,
                    Hop::Host(id, peer) => Via::Peer(id, peer),
                };
                return self.in_pieces(now, host, via, packet);
            }
            packet.complete_checksum();
        }
        let resolution = self
            .neighbours_of(hop)?
            .resolve(address, packet.as_slice(), now);
        let (ask, step) = match resolution {
            Resolution::Known(place) => (None, self.deliver(hop, place, packet)),
            Resolution::Stale(place) => (Some(Some(place)), self.deliver(hop, place, packet)),
            Resolution::Wait { ask } => (ask.then_some(None), Ok(Verdict::Consumed)),
            Resolution::QueueFull { ask } => {
                (ask.then_some(None), Err(DropReason::NeighbourQueueFull))
            }
            Resolution::TableFull => (None, Err(DropReason::NeighbourTableFull)),
        };
        if let Some(place) = ask {
            self.ask_for(hop.link(), host, place);
        }
        step
    }

    /// Lets a packet wait for a pod that is about to be attached again.
    fn wait_for_pod(
        &mut self,
        now: Instant,
        host: Ipv4Addr,
        packet: &mut PacketBuf<'_>,
        until: Instant,
    ) -> Step {
        if !packet.is_single() {
            return self.in_pieces(now, host, Via::Pods, packet);
        }
        packet.complete_checksum();
        let waits = self.neighbours.wait(host.into(), packet.as_slice(), until);
        if waits {
            Ok(Verdict::Consumed)
        } else {
            Err(DropReason::PodAwaited)
        }
    }

    fn neighbours_of(&mut self, hop: Hop) -> Result<&mut Neighbours, DropReason> {
        match (hop, &mut self.uplink) {
            (Hop::Pod, _) => Ok(&mut self.neighbours),
            (Hop::Host(..), Some(link)) => Ok(&mut link.neighbours),
            (Hop::Host(..), None) => Err(DropReason::NextHopUnreachable),
        }
    }

    fn deliver(&mut self, hop: Hop, place: Place, packet: &mut PacketBuf<'_>) -> Step {
        let (source, verdict) = match (hop, &self.uplink) {
            (Hop::Pod, _) => (self.config.gateway_mac, Verdict::Port(place.port)),
            (Hop::Host(id, _), Some(link)) => (link.uplink.mac, Verdict::Uplink { id: Some(id) }),
            (Hop::Host(..), None) => return Err(DropReason::NextHopUnreachable),
        };
        frame::prepend(packet, source, place.mac).map_err(|_| DropReason::HeadroomExceeded)?;
        Ok(verdict)
    }

    fn encapsulate(&mut self, id: PeerId, peer: &Outgoing, packet: &mut PacketBuf<'_>) -> Step {
        packet.complete_checksum();
        let flow = hash::flow(packet.as_slice(), self.seed);
        if let Tunnel::Vxlan { mac, .. } = self.config.tunnel {
            let theirs = peer.vtep_mac.ok_or(DropReason::NoVtepMac)?;
            frame::prepend(packet, mac.get(), theirs.get())
                .map_err(|_| DropReason::HeadroomExceeded)?;
        }
        self.encapsulate_frame(id, peer.address, flow, packet)
    }

    /// Puts the header of the tunnel on an inner frame or, in flannel's UDP format, none.
    pub(super) fn encapsulate_frame(
        &mut self,
        id: PeerId,
        destination: SocketAddrV4,
        flow: u32,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        if let Tunnel::Vxlan { vni, .. } = self.config.tunnel {
            vxlan::encapsulate(packet, vni).map_err(|_| DropReason::HeadroomExceeded)?;
        }
        Ok(Verdict::Peer {
            id,
            destination: destination.into(),
            flow,
        })
    }

    /// Gives a packet to the gateway and routes what it answers.
    fn serve(&mut self, now: Instant, packet: &[u8]) {
        let mut answers = std::mem::take(&mut self.answers);
        let free = &mut self.output.free;
        self.gateway.ip(now, packet, |answer| {
            let mut buffer = free.pop().unwrap_or_default();
            buffer.clear();
            buffer.extend_from_slice(answer);
            answers.push(buffer);
        });
        for mut answer in answers.drain(..) {
            self.answer(now, &mut answer);
            self.output.free.push(answer);
        }
        self.answers = answers;
    }

    /// Routes an answer of the gateway, in fragments if it is larger than the MTU, unless it is an
    /// error and there were too many.
    fn answer(&mut self, now: Instant, answer: &mut [u8]) {
        if icmp::is_error(answer) && !self.errors.take(now, 1) {
            return;
        }
        let mtu = self.config.mtu;
        if answer.len() <= usize::from(mtu.get()) {
            return self.originate(now, answer);
        }
        self.ident = self.ident.wrapping_add(1);
        let mut view = Ipv4Packet::new_unchecked(&mut *answer);
        view.set_dont_frag(false);
        view.set_ident(self.ident);
        view.fill_checksum();
        let Some(mut fragments) = Fragments::new(answer, mtu) else {
            return;
        };
        let mut piece = self.output.free.pop().unwrap_or_default();
        piece.resize(mtu.get().into(), 0);
        while let Some(len) = fragments.write_next(&mut piece) {
            self.originate(now, &piece[..len]);
        }
        self.output.free.push(piece);
    }

    /// Sends an ICMP error about a packet, if it may have one and there were not too many.
    pub fn report(&mut self, now: Instant, error: IcmpError, offender: &[u8]) {
        self.report_as(now, self.gateway(), error, offender);
    }

    /// Sends a pod the ICMP error about a packet that `from`, outside the overlay, has sent about it
    /// to the host, as [`Self::report`] does. Where nobody outside can be who speaks IPv4, the gateway
    /// has it.
    pub fn relay(&mut self, now: Instant, from: IpAddr, error: IcmpError, offender: &[u8]) {
        let is_outside = |from: &Ipv4Addr| {
            let is_inside = self.egress.is_some_and(|network| network.contains(from));
            !is_inside && !guard::is_martian(*from)
        };
        let from = ipv4(from).filter(is_outside);
        self.report_as(now, from.unwrap_or_else(|| self.gateway()), error, offender);
    }

    fn report_as(&mut self, now: Instant, from: Ipv4Addr, error: IcmpError, offender: &[u8]) {
        let own = |packet| self.is_own(Ipv4Packet::new_unchecked(packet).src_addr());
        if !icmp::may_answer(offender) || own(offender) {
            return;
        }
        // As in Linux, path MTU discovery is not limited: a connection stalls without it, and any
        // pod can use the others up.
        if !matches!(error, IcmpError::FragmentationNeeded(_)) && !self.errors.take(now, 1) {
            return;
        }
        let mut buffer = [0; icmp::MAX_LEN];
        // An error larger than the MTU would have to be fragmented; it quotes less instead.
        let room = icmp::MAX_LEN.min(self.config.mtu.get().into());
        if let Some(len) = error.write(&mut buffer[..room], from, offender) {
            self.originate(now, &buffer[..len]);
        }
    }

    /// Routes a packet of the node's own.
    pub(super) fn originate(&mut self, now: Instant, bytes: &[u8]) {
        let Ok(view) = Ipv4Packet::new_checked(bytes) else {
            return;
        };
        let destination = view.dst_addr();
        let next = self.routes.lookup(destination.into()).copied();
        self.with_scratch(bytes, |node, packet| match next {
            Some(next) => {
                let via = node.via(next)?;
                node.forward(now, destination, via, packet)
            }
            None => Err(DropReason::NoRoute),
        });
    }

    /// Sends on a packet that waited for `address`, which is known now.
    pub(super) fn resume(&mut self, address: IpAddr, bytes: &[u8]) {
        let place = self.neighbours.get(address);
        self.with_scratch(bytes, |node, packet| {
            node.deliver(Hop::Pod, place.ok_or(DropReason::HostUnreachable)?, packet)
        });
    }

    pub(super) fn with_scratch(
        &mut self,
        bytes: &[u8],
        step: impl FnOnce(&mut Self, &mut PacketBuf<'_>) -> Step,
    ) {
        // A packet may lead to one about it, while the buffer is in use.
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(HEADROOM + frame::MAX_LEN, 0);
        if let Some(room) = scratch.get_mut(HEADROOM..HEADROOM + bytes.len().min(frame::MAX_LEN)) {
            room.copy_from_slice(&bytes[..room.len()]);
            let len = room.len();
            if let Ok(mut packet) = PacketBuf::new(&mut scratch, HEADROOM, len) {
                let step = step(self, &mut packet);
                self.enqueue(step, &packet);
            }
        }
        self.scratch = scratch;
    }

    /// Queues a packet of the node's own for [`Node::poll_output`], or counts why not.
    fn enqueue(&mut self, step: Step, packet: &PacketBuf<'_>) {
        let queued = match step {
            Ok(Verdict::Consumed) => {
                self.counters.originated += 1;
                self.counters.consumed += 1;
                return;
            }
            Ok(verdict) => self.output.push(verdict, packet.as_slice()),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = queued {
            self.counters.originated += 1;
            self.counters.drop(reason);
        }
    }

    /// Sends an ARP request on a link to `place`, or to all.
    pub(super) fn ask_for(&mut self, on: On, address: Ipv4Addr, place: Option<Place>) {
        let mac = place.map_or(EthernetAddress::BROADCAST, |place| place.mac);
        let (verdict, source) = match (on, &self.uplink, place) {
            (On::Uplink, Some(link), _) => {
                let Some(own) = ipv4(link.uplink.address) else {
                    return;
                };
                (Verdict::Uplink { id: None }, (link.uplink.mac, own))
            }
            (On::Uplink, None, _) => return,
            (On::Bridge, _, Some(place)) => (
                Verdict::Port(place.port),
                (self.config.gateway_mac, self.gateway()),
            ),
            (On::Bridge, _, None) => (
                Verdict::Flood { except: None },
                (self.config.gateway_mac, self.gateway()),
            ),
        };
        self.say(
            verdict,
            &frame::write_arp(ArpOperation::Request, source, (mac, address)),
        );
    }

    /// Queues a frame of the node's own, or counts why not.
    pub(super) fn say(&mut self, verdict: Verdict, frame: &[u8]) {
        if let Err(reason) = self.output.push(verdict, frame) {
            self.counters.originated += 1;
            self.counters.drop(reason);
        }
    }

    pub(super) fn handle_neighbours(&mut self, now: Instant) {
        let mut due = Vec::new();
        self.neighbours
            .handle_timeout(now, |action| due.push((On::Bridge, action)));
        if let Some(link) = &mut self.uplink {
            link.neighbours
                .handle_timeout(now, |action| due.push((On::Uplink, action)));
        }
        for (on, action) in due {
            match action {
                Due::Ask(IpAddr::V4(address)) => self.ask_for(on, address, None),
                Due::Probe(IpAddr::V4(address), place) => self.ask_for(on, address, Some(place)),
                Due::Ask(IpAddr::V6(_)) | Due::Probe(IpAddr::V6(_), _) => {}
                Due::GivenUp(address, waiting) => {
                    if on == On::Uplink {
                        self.lose_early(address);
                    }
                    let is_awaited = matches!(address, IpAddr::V4(address) if on == On::Bridge
                        && self.awaited.until(now, address).is_some());
                    for packet in waiting {
                        self.counters.originated += 1;
                        if is_awaited {
                            self.counters.drop(DropReason::PodAwaited);
                            continue;
                        }
                        self.counters.drop(DropReason::HostUnreachable);
                        self.report(now, IcmpError::HostUnreachable, &packet);
                    }
                }
            }
        }
    }
}
