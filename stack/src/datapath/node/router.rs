//! The router: where an IPv4 packet goes, and what it needs to get there.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::fragment::Fragments;
use muslin_encap::ip::transport::Transport;
use muslin_encap::ip::{mss, v4};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::split;
use muslin_encap::offload::split::{Checksums, MAX_HEADER_LEN, Split, TrainLimits};
use muslin_encap::offload::virtio::Checksum;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpProtocol, Ipv4Packet};

use super::home::Home;
use super::peers::Outgoing;
use super::{NextHop, Node};
use crate::datapath::filter::{Direction, Filter};
use crate::datapath::frame;
use crate::datapath::guard;
use crate::datapath::hash;
use crate::datapath::icmp::{self, IcmpError};
use crate::datapath::observe::Observer;
use crate::datapath::peer::{Path, PeerId};
use crate::datapath::port::PortId;
use crate::datapath::trace::{Holding, TraceStep};
use crate::datapath::tunnel::Tunnel;
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

/// What a step decides about a packet.
pub(super) type Decision = Result<Verdict, DropReason>;

/// Where a packet to be routed comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The pod at this port.
    Pod(PortId),
    /// The tunnel; the first of the peers with its outer address, if there is one.
    Peer(Option<PeerId>),
    /// The uplink, from a host with this MAC address.
    Uplink(EthernetAddress),
    /// The host interface.
    Host,
}

impl Origin {
    /// Whose the source of its packets is, once that has been checked.
    pub(super) const fn holder(self) -> Holding {
        match self {
            Self::Pod(port) => Holding::Pod(port),
            Self::Peer(peer) => Holding::Peer(peer),
            Self::Uplink(_) => Holding::Peer(None),
            Self::Host => Holding::Host,
        }
    }
}

/// The way of a packet whose route is known.
#[derive(Debug, Clone, Copy)]
pub(super) enum Via<P = Outgoing> {
    /// To a pod of this node.
    Pods,
    /// To a peer, as it is known when the packet is routed.
    Peer(PeerId, P),
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
#[inline]
pub(super) fn longest(packet: &PacketBuf<'_>) -> usize {
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
#[inline]
pub(super) fn check_work(packet: &PacketBuf<'_>) -> Result<(), DropReason> {
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
fn is_for_egress(packet: &[u8]) -> bool {
    let protocol = Ipv4Packet::new_unchecked(packet).next_header();
    matches!(protocol, IpProtocol::Tcp | IpProtocol::Udp) || icmp::is_error(packet)
}

impl<O: Observer, F: Filter> Node<O, F> {
    /// Routes a packet that begins with its IPv4 header.
    pub(super) fn route(
        &mut self,
        now: Instant,
        origin: Origin,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let home = self.home.ok_or(DropReason::EtherTypeUnsupported)?;
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
            self.check_source(now, &home, origin, source, packet.total_len()),
            origin,
        ) {
            (Err(DropReason::NextHopUnknown), Origin::Uplink(mac)) => {
                let is_for_flows = self.egress.is_some()
                    && home.is_own(destination)
                    && is_for_egress(packet.as_slice());
                return self.wait_for_sender(mac, source.into(), is_for_flows, packet);
            }
            (checked, _) => checked?,
        }
        self.ledger.step(|| TraceStep::Source {
            address: source.into(),
            holder: origin.holder(),
        });
        if self.is_for_host(origin, destination) {
            self.check_policy_from(origin, packet)?;
            self.ledger.step(|| TraceStep::Host {
                address: destination.into(),
            });
            return self.pass_to_host(now, origin, packet);
        }
        if home.is_own(destination) {
            self.check_policy_from(origin, packet)?;
            self.ledger.step(|| TraceStep::Gateway {
                address: destination.into(),
            });
            if self.is_exchange(origin, packet) {
                packet.complete_checksum();
                self.take_exchange(now, packet)?;
                return Ok(Verdict::Consumed);
            }
            let has_egress = self.egress.is_some() && origin != Origin::Host;
            if has_egress && is_for_egress(packet.as_slice()) {
                return Ok(Verdict::Egress);
            }
            packet.complete_checksum();
            self.deliver_to_gateway(now, packet.as_slice());
            return Ok(Verdict::Consumed);
        }
        if guard::is_martian(destination) || destination == home.broadcast {
            return Err(DropReason::DestinationNotUnicast);
        }
        let next = self.routes.lookup(destination.into()).copied();
        self.step_route(destination.into());
        if !matches!(origin, Origin::Pod(_) | Origin::Host) && next != Some(NextHop::Local) {
            return Err(DropReason::TunnelToTunnel);
        }
        self.check_policy_from(origin, packet)?;
        if ttl <= 1 {
            self.send_icmp_error(now, IcmpError::TimeExceeded, packet.as_slice());
            return Err(DropReason::TtlExceeded);
        }
        let Some(next) = next else {
            let is_outside = |network: &Ipv4Net| !network.contains(&destination);
            if let Some(network) = self.egress.filter(is_outside)
                && origin != Origin::Host
            {
                self.ledger.step(|| TraceStep::Outside {
                    network: network.into(),
                });
                return Ok(Verdict::Egress);
            }
            self.send_icmp_error(now, IcmpError::NetUnreachable, packet.as_slice());
            return Err(DropReason::NoRoute);
        };
        self.ledger.step(|| TraceStep::Ttl { left: ttl - 1 });
        let via = self.via(next)?;
        let mtu = self.path_mtu(via);
        let fits = longest(packet) <= usize::from(mtu.get());
        self.step_mtu(mtu, packet);
        if !fits && Ipv4Packet::new_unchecked(packet.as_slice()).dont_frag() {
            self.send_icmp_error(
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
                mtu.min(self.way_back(origin, self.config.mtu)),
            );
        }
        if origin == Origin::Host {
            self.translate_from_host(now, via, packet)?;
        }
        if fits {
            self.forward(now, destination, via, packet)
        } else {
            self.in_pieces(now, destination, via, packet)
        }
    }

    /// Routes a packet from outside the overlay to a pod of this node, or one from the gateway to
    /// any pod.
    pub(super) fn route_to_pod(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Decision {
        match v4::check_head(packet.as_slice(), packet.total_len()) {
            Ok(len) => packet.truncate(len),
            Err(v4::Error::Version(6)) => return self.route_to_pod_v6(now, packet),
            Err(error) => return Err(error.into()),
        }
        let view = Ipv4Packet::new_unchecked(packet.as_slice());
        let (source, destination) = (view.src_addr(), view.dst_addr());
        self.check_outside(source)?;
        let next = self.routes.lookup(destination.into()).copied();
        // Other nodes take nothing that is not from this one's subnet.
        self.step_route(destination.into());
        let is_way = |next: &NextHop| *next == NextHop::Local || self.is_own(source);
        let next = next.filter(is_way).ok_or(DropReason::NoRoute)?;
        let via = self.via(next)?;
        self.step_mtu(self.path_mtu(via), packet);
        if longest(packet) <= usize::from(self.path_mtu(via).get()) {
            self.forward(now, destination, via, packet)
        } else {
            self.in_pieces(now, destination, via, packet)
        }
    }

    /// Tells an observer of the route that was looked up.
    #[inline(always)]
    pub(super) fn step_route(&mut self, destination: IpAddr) {
        self.ledger.step(|| {
            let route = self.routes.entry(destination);
            TraceStep::Route {
                destination,
                route: route.map(|(prefix, next)| (prefix, *next)),
            }
        });
    }

    /// Tells an observer that a packet was measured.
    #[inline(always)]
    fn step_mtu(&mut self, mtu: Mtu, packet: &PacketBuf<'_>) {
        self.ledger.step(|| TraceStep::Mtu {
            mtu: mtu.get(),
            len: longest(packet),
            dont_fragment: Ipv4Packet::new_unchecked(packet.as_slice()).dont_frag(),
        });
    }

    /// Asks the filter about a packet of a pod.
    #[inline(always)]
    pub(super) fn check_policy_from(
        &mut self,
        origin: Origin,
        packet: &PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        match origin {
            Origin::Pod(port) => self.check_policy(Direction::FromPod, port, packet.as_slice()),
            Origin::Peer(_) | Origin::Uplink(_) | Origin::Host => Ok(()),
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
        home: &Home,
        origin: Origin,
        source: Ipv4Addr,
        len: usize,
    ) -> Result<(), DropReason> {
        if guard::is_martian(source) || source == home.broadcast {
            return Err(DropReason::SourceAddressInvalid);
        }
        match origin {
            Origin::Pod(_) => return Ok(()),
            Origin::Host => return self.check_host_source(source),
            Origin::Uplink(mac) => self.check_host(now, mac, source.into(), len)?,
            Origin::Peer(first) => {
                if self.config.guard.peers && !self.is_from(first, source) {
                    return Err(DropReason::SourceNotInLease);
                }
            }
        }
        // Even without that guard nobody outside may pose as one of our own pods.
        if home.subnet.contains(&source) {
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
        !self.routes.may_nest() && self.peers.is_routed(first, source)
            || self.leads_to(source.into(), first)
    }

    /// Whether the route to an address leads to where a peer is.
    pub(super) fn leads_to(&self, address: IpAddr, peer: PeerId) -> bool {
        match self.routes.lookup(address) {
            // A key is a peer's alone, whatever its address.
            Some(NextHop::Peer(owner)) if self.config.tunnel == Tunnel::WireGuard => *owner == peer,
            Some(NextHop::Peer(owner)) => self.peers.share_address(*owner, peer),
            Some(NextHop::Local) | None => false,
        }
    }

    /// The way of a route.
    pub(super) fn via(&self, next: NextHop) -> Result<Via, DropReason> {
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

    /// The largest packet that goes back to where one came from, where the tunnel takes this much; pods
    /// know their own MTU.
    pub(super) fn way_back(&self, origin: Origin, tunnel: Mtu) -> Mtu {
        match (origin, &self.uplink) {
            (Origin::Pod(_) | Origin::Host, _) => Mtu::MAX,
            (Origin::Uplink(_), Some(link)) => link.uplink.mtu,
            (Origin::Uplink(_), None) | (Origin::Peer(_), _) => tunnel,
        }
    }

    /// Sends a packet on in several: a superpacket as its segments, a packet larger than the MTU as
    /// fragments.
    pub(super) fn in_pieces(
        &mut self,
        now: Instant,
        destination: Ipv4Addr,
        via: Via,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        packet.complete_checksum();
        self.ledger.step(|| TraceStep::InPieces {
            segments: !packet.is_single(),
        });
        let mtu = self.path_mtu(via);
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(HEADROOM + frame::MAX_LEN, 0);
        let mut is_first = true;
        let mut send = |node: &mut Self, scratch: &mut [u8], len| {
            node.send_piece(scratch, len, &mut is_first, |node, piece| {
                if len > mtu.get().into() {
                    node.in_pieces(now, destination, via, piece)
                } else {
                    node.forward(now, destination, via, piece)
                }
            });
        };
        let step = if packet.is_single() {
            self.fragments(mtu, packet.as_slice(), &mut scratch, &mut send)
        } else {
            self.segments(packet, &mut scratch, &mut send)
        };
        self.scratch = scratch;
        step
    }

    /// Sends one of several pieces of a packet by `forward`. All but the first are beside what an
    /// observer is told of the packet.
    pub(super) fn send_piece(
        &mut self,
        scratch: &mut [u8],
        len: usize,
        is_first: &mut bool,
        forward: impl FnOnce(&mut Self, &mut PacketBuf<'_>) -> Decision,
    ) {
        let Ok(mut piece) = PacketBuf::new(scratch, HEADROOM, len) else {
            return;
        };
        let is_aside = !std::mem::take(is_first);
        if is_aside {
            self.ledger.observer.aside(true);
        }
        let step = forward(self, &mut piece);
        self.enqueue(step, &piece);
        if is_aside {
            self.ledger.observer.aside(false);
        }
    }

    fn fragments(
        &mut self,
        mtu: Mtu,
        packet: &[u8],
        scratch: &mut [u8],
        send: &mut impl FnMut(&mut Self, &mut [u8], usize),
    ) -> Decision {
        let mut fragments = Fragments::new(packet, mtu).ok_or(DropReason::FragmentationNeeded)?;
        while let Some(len) = fragments.write_next(scratch.get_mut(HEADROOM..).unwrap_or_default())
        {
            send(self, scratch, len);
        }
        Ok(Verdict::Consumed)
    }

    pub(super) fn segments(
        &mut self,
        packet: &PacketBuf<'_>,
        scratch: &mut [u8],
        send: &mut impl FnMut(&mut Self, &mut [u8], usize),
    ) -> Decision {
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
    ) -> Decision {
        let (id, peer) = match via {
            Via::Pods => return self.send_to_host(now, via, destination, packet),
            Via::Peer(id, peer) => (id, peer),
        };
        self.ledger.step(|| TraceStep::Way {
            peer: id,
            address: (*peer.address.ip()).into(),
            path: peer.path,
        });
        match peer.path {
            Path::Tunnel => self.encapsulate(id, &peer, packet),
            Path::Uplink => {
                let host = *peer.address.ip();
                self.send_to_host(now, via, host, packet)
            }
            Path::Unreachable => {
                self.send_icmp_error(now, IcmpError::HostUnreachable, packet.as_slice());
                Err(DropReason::NextHopUnreachable)
            }
        }
    }

    pub(super) fn encapsulate(
        &mut self,
        id: PeerId,
        peer: &Outgoing,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        if peer.checksums == Checksums::Complete {
            packet.complete_checksum();
        }
        let flow = hash::flow(packet.as_slice(), self.seed);
        self.config.tunnel.encapsulate(peer.vtep_mac, packet)?;
        self.ledger.step(|| TraceStep::Encapsulated {
            peer: id,
            destination: peer.address.into(),
            macs: self
                .config
                .tunnel
                .vtep_mac()
                .zip(peer.vtep_mac)
                .map(|(ours, theirs)| (ours.get(), theirs.get())),
            checksums: peer.checksums,
        });
        Ok(Verdict::Peer {
            id,
            destination: peer.address.into(),
            flow,
            checksums: peer.checksums,
        })
    }
}
