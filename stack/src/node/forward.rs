//! The router: where an IPv4 packet goes, and what it needs to get there.

use std::net::{IpAddr, Ipv4Addr};

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::headers::Transport;
use muslin_encap::split::{Checksums, Limits, MAX_HEADER_LEN, Split};
use muslin_encap::{checksum, udp, vxlan};
use smoltcp::time::Instant;
use smoltcp::wire::{ArpOperation, EthernetAddress, Ipv4Packet};

use super::{MAX_PACKET, NextHop, Node, Verdict};
use crate::drops::DropReason;
use crate::fragment::Fragments;
use crate::frame;
use crate::guard;
use crate::hash;
use crate::icmp::{self, IcmpError};
use crate::neighbour::{Due, Place, Resolution};
use crate::peer::{PeerId, Tunnel};

type Step = Result<Verdict, DropReason>;

/// Where a packet to be routed comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Pod,
    /// The tunnel; the first of the peers with its outer address, if there is one.
    Peer(Option<PeerId>),
}

impl From<udp::Error> for DropReason {
    fn from(error: udp::Error) -> Self {
        match error {
            udp::Error::TooShort { .. } => Self::Ipv4TooShort,
            udp::Error::Version(_) => Self::Ipv4Version,
            udp::Error::HeaderLen(_) => Self::Ipv4HeaderLen,
            udp::Error::TotalLen { .. } => Self::Ipv4TotalLen,
            udp::Error::Checksum => Self::Ipv4Checksum,
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

impl Node {
    /// Routes a packet that begins with its IPv4 header.
    pub(super) fn route(
        &mut self,
        now: Instant,
        origin: Origin,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        packet.truncate(udp::check_head(packet.as_slice(), packet.total_len())?);
        let view = Ipv4Packet::new_unchecked(packet.as_slice());
        let (source, destination) = (view.src_addr(), view.dst_addr());
        let ttl = view.hop_limit();
        self.check_source(origin, source)?;
        if self.is_own(destination) {
            packet.complete();
            self.serve(now, packet.as_slice());
            return Ok(Verdict::Consumed);
        }
        if guard::is_martian(destination) || destination == self.subnet.broadcast() {
            return Err(DropReason::DestinationNotUnicast);
        }
        let next = self.routes.lookup(destination.into()).copied();
        if matches!(origin, Origin::Peer(_)) && !matches!(next, Some(NextHop::Local)) {
            return Err(DropReason::TunnelToTunnel);
        }
        if ttl <= 1 {
            self.report(now, IcmpError::TimeExceeded, packet.as_slice());
            return Err(DropReason::TtlExceeded);
        }
        let Some(next) = next else {
            self.report(now, IcmpError::NetUnreachable, packet.as_slice());
            return Err(DropReason::NoRoute);
        };
        let mtu = self.config.mtu;
        let fits = longest(packet) <= usize::from(mtu.get());
        if !fits && Ipv4Packet::new_unchecked(packet.as_slice()).dont_frag() {
            self.report(
                now,
                IcmpError::FragmentationNeeded(mtu.get()),
                packet.as_slice(),
            );
            return Err(DropReason::FragmentationNeeded);
        }
        checksum::decrement_ttl(packet.as_mut_slice());
        if fits {
            self.forward(now, destination, &next, packet)
        } else {
            self.in_pieces(now, destination, &next, packet)
        }
    }

    /// Whose address a pod's source is was checked at its port; a peer's must be in its lease.
    fn check_source(&self, origin: Origin, source: Ipv4Addr) -> Result<(), DropReason> {
        if guard::is_martian(source) || source == self.subnet.broadcast() {
            return Err(DropReason::SourceAddressInvalid);
        }
        let Origin::Peer(first) = origin else {
            return Ok(());
        };
        let in_lease = |first| self.peers.lease_holds(first, source);
        if self.config.guard.peers && !first.is_some_and(in_lease) {
            return Err(DropReason::SourceNotInLease);
        }
        // Even without that guard nobody outside may pose as one of our own pods.
        if self.subnet.contains(&source) {
            return Err(DropReason::SourceNotInLease);
        }
        Ok(())
    }

    /// Sends a packet on in several: a superpacket as its segments, a packet larger than the MTU as
    /// fragments.
    fn in_pieces(
        &mut self,
        now: Instant,
        destination: Ipv4Addr,
        next: &NextHop,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        packet.complete();
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(HEADROOM + MAX_PACKET, 0);
        let mut send = |node: &mut Self, scratch: &mut [u8], len| {
            if let Ok(mut piece) = PacketBuf::new(scratch, HEADROOM, len) {
                let step = if len > node.config.mtu.get().into() {
                    node.in_pieces(now, destination, next, &mut piece)
                } else {
                    node.forward(now, destination, next, &mut piece)
                };
                node.enqueue(step, &piece);
            }
        };
        let step = if packet.is_single() {
            self.fragments(packet.as_slice(), &mut scratch, &mut send)
        } else {
            self.segments(packet, &mut scratch, &mut send)
        };
        self.scratch = scratch;
        step
    }

    fn fragments(
        &mut self,
        packet: &[u8],
        scratch: &mut [u8],
        send: &mut impl FnMut(&mut Self, &mut [u8], usize),
    ) -> Step {
        let mut fragments =
            Fragments::new(packet, self.config.mtu).ok_or(DropReason::FragmentationNeeded)?;
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
        while let Ok(Some(train)) = split.next_train(&mut header, Limits::ONE) {
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
    fn forward(
        &mut self,
        now: Instant,
        destination: Ipv4Addr,
        next: &NextHop,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        match next {
            NextHop::Peer(id) => self.encapsulate(*id, packet),
            NextHop::Local => match self.neighbours.known(destination.into(), now) {
                Some(place) => self.deliver(place, packet),
                None => self.resolve(now, destination, packet),
            },
        }
    }

    /// Finds out where an address of our own is, and sends the packet there now or later.
    fn resolve(&mut self, now: Instant, destination: Ipv4Addr, packet: &mut PacketBuf<'_>) -> Step {
        let address = IpAddr::V4(destination);
        if self.neighbours.get(address).is_none() {
            if self.unguarded == 0 {
                // No attachment has it, and no pod may answer for an address that is not its own.
                self.report(now, IcmpError::HostUnreachable, packet.as_slice());
                return Err(DropReason::HostUnreachable);
            }
            if !packet.is_single() {
                return self.in_pieces(now, destination, &NextHop::Local, packet);
            }
            packet.complete();
        }
        match self.neighbours.resolve(address, packet.as_slice(), now) {
            Resolution::Known(place) => self.deliver(place, packet),
            Resolution::Stale(place) => {
                self.ask_for(destination, Some(place));
                self.deliver(place, packet)
            }
            Resolution::Wait { ask } => {
                if ask {
                    self.ask_for(destination, None);
                }
                Ok(Verdict::Consumed)
            }
            Resolution::QueueFull { ask } => {
                if ask {
                    self.ask_for(destination, None);
                }
                Err(DropReason::NeighbourQueueFull)
            }
            Resolution::TableFull => Err(DropReason::NeighbourTableFull),
        }
    }

    fn deliver(&mut self, place: Place, packet: &mut PacketBuf<'_>) -> Step {
        frame::prepend(packet, self.config.gateway_mac, place.mac)
            .map_err(|_| DropReason::HeadroomExceeded)?;
        Ok(Verdict::Port(place.port))
    }

    fn encapsulate(&mut self, id: PeerId, packet: &mut PacketBuf<'_>) -> Step {
        packet.complete();
        let flow = hash::flow(packet.as_slice(), self.seed);
        if let Tunnel::Vxlan { mac, .. } = self.config.tunnel {
            let (peer, _) = self.peers.outgoing(id).ok_or(DropReason::PeerGone)?;
            let theirs = peer.vtep_mac.ok_or(DropReason::NoVtepMac)?;
            frame::prepend(packet, mac.get(), theirs.get())
                .map_err(|_| DropReason::HeadroomExceeded)?;
        }
        self.encapsulate_frame(id, flow, packet)
    }

    /// Puts the header of the tunnel on an inner frame or, in flannel's UDP format, none.
    pub(super) fn encapsulate_frame(
        &mut self,
        id: PeerId,
        flow: u32,
        packet: &mut PacketBuf<'_>,
    ) -> Step {
        let (_, destination) = self.peers.outgoing(id).ok_or(DropReason::PeerGone)?;
        if let Tunnel::Vxlan { vni, .. } = self.config.tunnel {
            vxlan::encapsulate(packet, vni).map_err(|_| DropReason::HeadroomExceeded)?;
        }
        Ok(Verdict::Peer {
            id,
            destination,
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
        if icmp::is_error(answer) && !self.errors.allow(now) {
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
    fn report(&mut self, now: Instant, error: IcmpError, offender: &[u8]) {
        let own = |packet| self.is_own(Ipv4Packet::new_unchecked(packet).src_addr());
        if !icmp::may_answer(offender) || own(offender) {
            return;
        }
        // As in Linux, path MTU discovery is not limited: a connection stalls without it, and any
        // pod can use the others up.
        if !matches!(error, IcmpError::FragmentationNeeded(_)) && !self.errors.allow(now) {
            return;
        }
        let mut buffer = [0; icmp::MAX_LEN];
        // An error larger than the MTU would have to be fragmented; it quotes less instead.
        let room = icmp::MAX_LEN.min(self.config.mtu.get().into());
        if let Some(len) = error.write(&mut buffer[..room], self.gateway(), offender) {
            self.originate(now, &buffer[..len]);
        }
    }

    /// Routes a packet of the node's own.
    fn originate(&mut self, now: Instant, bytes: &[u8]) {
        let Ok(view) = Ipv4Packet::new_checked(bytes) else {
            return;
        };
        let destination = view.dst_addr();
        let next = self.routes.lookup(destination.into()).copied();
        self.with_scratch(bytes, |node, packet| match next {
            Some(next) => node.forward(now, destination, &next, packet),
            None => Err(DropReason::NoRoute),
        });
    }

    /// Sends on a packet that waited for `address`, which is known now.
    pub(super) fn resume(&mut self, address: IpAddr, bytes: &[u8]) {
        let place = self.neighbours.get(address);
        self.with_scratch(bytes, |node, packet| {
            node.deliver(place.ok_or(DropReason::HostUnreachable)?, packet)
        });
    }

    fn with_scratch(
        &mut self,
        bytes: &[u8],
        step: impl FnOnce(&mut Self, &mut PacketBuf<'_>) -> Step,
    ) {
        // A packet may lead to one about it, while the buffer is in use.
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(HEADROOM + MAX_PACKET, 0);
        if let Some(room) = scratch.get_mut(HEADROOM..HEADROOM + bytes.len().min(MAX_PACKET)) {
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

    /// Sends an ARP request to `place`, or to all.
    fn ask_for(&mut self, address: Ipv4Addr, place: Option<Place>) {
        let (verdict, mac) = match place {
            Some(place) => (Verdict::Port(place.port), place.mac),
            None => (Verdict::Flood { except: None }, EthernetAddress::BROADCAST),
        };
        let request = frame::write_arp(
            ArpOperation::Request,
            (self.config.gateway_mac, self.gateway()),
            (mac, address),
        );
        if let Err(reason) = self.output.push(verdict, &request) {
            self.counters.originated += 1;
            self.counters.drop(reason);
        }
    }

    pub(super) fn handle_neighbours(&mut self, now: Instant) {
        let mut due = Vec::new();
        self.neighbours
            .handle_timeout(now, |action| due.push(action));
        for action in due {
            match action {
                Due::Ask(IpAddr::V4(address)) => self.ask_for(address, None),
                Due::Probe(IpAddr::V4(address), place) => self.ask_for(address, Some(place)),
                Due::Ask(IpAddr::V6(_)) | Due::Probe(IpAddr::V6(_), _) => {}
                Due::GivenUp(_, waiting) => {
                    for packet in waiting {
                        self.counters.originated += 1;
                        self.counters.drop(DropReason::HostUnreachable);
                        self.report(now, IcmpError::HostUnreachable, &packet);
                    }
                }
            }
        }
    }
}
