//! The router of IPv6: the twin of [`super::router`], by the rules of RFC 8200 and RFC 4443. It fragments
//! nothing, and sends nothing beyond the scope of its addresses.

use std::net::Ipv6Addr;

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::{mss, v6};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::split::Checksums;
use muslin_encap::offload::virtio::Checksum;
use smoltcp::time::Instant;
use smoltcp::wire::{IpProtocol, Ipv6Packet};

use super::home::HomeV6;
use super::peers::OutgoingV6;
use super::router::{Decision, Origin, Via, check_work, longest};
use super::{NextHop, Node};
use crate::datapath::filter::Filter;
use crate::datapath::frame;
use crate::datapath::guard;
use crate::datapath::hash;
use crate::datapath::icmp::{self, IcmpError};
use crate::datapath::observe::Observer;
use crate::datapath::peer::{Path, PeerId};
use crate::datapath::trace::TraceStep;
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

/// The way of an IPv6 packet whose route is known.
pub(super) type ViaV6 = Via<OutgoingV6>;

/// Whether a packet to the gateway is for flows and services: TCP, UDP and what is said of them.
fn is_for_egress(packet: &[u8], upper: v6::Upper) -> bool {
    let protocol = IpProtocol::from(upper.protocol);
    matches!(protocol, IpProtocol::Tcp | IpProtocol::Udp) || icmp::is_error(packet)
}

impl<O: Observer, F: Filter> Node<O, F> {
    /// Routes a packet that begins with its IPv6 header.
    pub(super) fn route_v6(
        &mut self,
        now: Instant,
        origin: Origin,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let home = self.home_v6.ok_or(DropReason::EtherTypeUnsupported)?;
        packet.truncate(v6::check_head(packet.as_slice(), packet.total_len())?);
        // Nobody knows what a packet is about whose upper layer is not found.
        let upper = v6::upper_layer(packet.as_slice())?;
        let view = Ipv6Packet::new_unchecked(packet.as_slice());
        let (source, destination) = (view.src_addr(), view.dst_addr());
        let hop_limit = view.hop_limit();
        // Finishing a checksum must not write into the headers, which are checked before.
        if let Checksum::Partial { start, .. } = packet.offload().checksum
            && usize::from(start) < upper.offset
        {
            return Err(DropReason::VirtioHeader);
        }
        check_work(packet)?;
        match (
            self.check_source_v6(now, &home, origin, source, packet.total_len()),
            origin,
        ) {
            (Err(DropReason::NextHopUnknown), Origin::Uplink(mac)) => {
                let is_for_flows = self.egress_v6.is_some()
                    && home.is_own(destination)
                    && is_for_egress(packet.as_slice(), upper);
                return self.wait_for_sender(mac, source.into(), is_for_flows, packet);
            }
            (checked, _) => checked?,
        }
        self.ledger.step(|| TraceStep::Source {
            address: source.into(),
            holder: origin.holder(),
        });
        // A link-local address of the gateway's is that of the pods' link.
        let leaves_link = |address: Ipv6Addr| address.is_unicast_link_local();
        let is_pods = matches!(origin, Origin::Pod(_));
        if leaves_link(destination) && !(is_pods && home.is_own(destination)) {
            return Err(DropReason::BeyondScope);
        }
        if home.is_own(destination) {
            self.check_policy_from(origin, packet)?;
            self.ledger.step(|| TraceStep::Gateway {
                address: destination.into(),
            });
            if self.is_exchange_v6(origin, packet) {
                packet.complete_checksum();
                self.take_exchange_v6(now, packet)?;
                return Ok(Verdict::Consumed);
            }
            if self.egress_v6.is_some() && is_for_egress(packet.as_slice(), upper) {
                return Ok(Verdict::Egress);
            }
            packet.complete_checksum();
            self.deliver_to_gateway(now, packet.as_slice());
            return Ok(Verdict::Consumed);
        }
        if destination.is_unspecified() {
            return Err(DropReason::DestinationNotUnicast);
        }
        if guard::is_martian_v6(destination) {
            return Err(DropReason::DestinationNotUnicast);
        }
        if leaves_link(source) {
            self.send_icmp_error(now, IcmpError::BeyondScope, packet.as_slice());
            return Err(DropReason::BeyondScope);
        }
        let next = self.routes.lookup(destination.into()).copied();
        self.step_route(destination.into());
        if !is_pods && next != Some(NextHop::Local) {
            return Err(DropReason::TunnelToTunnel);
        }
        self.check_policy_from(origin, packet)?;
        if hop_limit <= 1 {
            self.send_icmp_error(now, IcmpError::TimeExceeded, packet.as_slice());
            return Err(DropReason::TtlExceeded);
        }
        let Some(next) = next else {
            return self.leave_v6(now, destination, packet);
        };
        self.ledger.step(|| TraceStep::Ttl {
            left: hop_limit - 1,
        });
        let via = self.via_v6(next)?;
        let mtu = self.path_mtu_v6(via);
        self.step_mtu_v6(mtu, packet);
        if longest(packet) > usize::from(mtu.get()) {
            let error = IcmpError::FragmentationNeeded(mtu.get());
            self.send_icmp_error(now, error, packet.as_slice());
            return Err(DropReason::FragmentationNeeded);
        }
        v6::decrement_hop_limit(packet.as_mut_slice());
        if self.config.clamp_mss {
            let offload = packet.offload().checksum;
            let mtu = mtu.min(self.way_back(origin, self.config.mtu_v6));
            mss::clamp(packet.as_mut_slice(), offload, mtu);
        }
        self.forward_v6(now, destination, via, packet)
    }

    /// Hands a packet without a route to egress, if it leaves the overlay.
    fn leave_v6(
        &mut self,
        now: Instant,
        destination: Ipv6Addr,
        packet: &PacketBuf<'_>,
    ) -> Decision {
        let network = self.egress_v6;
        if let Some(network) = network.filter(|network| !network.contains(&destination)) {
            self.ledger.step(|| TraceStep::Outside {
                network: network.into(),
            });
            return Ok(Verdict::Egress);
        }
        self.send_icmp_error(now, IcmpError::NetUnreachable, packet.as_slice());
        Err(DropReason::NoRoute)
    }

    /// Routes a packet from outside the overlay to a pod of this node, or one from the gateway to
    /// any pod.
    pub(super) fn route_to_pod_v6(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Decision {
        let home = self.home_v6.ok_or(DropReason::NoRoute)?;
        packet.truncate(v6::check_head(packet.as_slice(), packet.total_len())?);
        let view = Ipv6Packet::new_unchecked(packet.as_slice());
        let (source, destination) = (view.src_addr(), view.dst_addr());
        if !self.is_outside_v6(source) && !home.is_own(source) {
            return Err(DropReason::SourceAddressInvalid);
        }
        if destination.is_unicast_link_local() {
            return self.send_on_link(now, destination, packet);
        }
        let next = self.routes.lookup(destination.into()).copied();
        // Other nodes take nothing that is not from this one's subnet.
        self.step_route(destination.into());
        let is_ours = home.subnet.contains(&source) && home.is_own(source);
        let is_way = |next: &NextHop| *next == NextHop::Local || is_ours;
        let next = next.filter(is_way).ok_or(DropReason::NoRoute)?;
        let via = self.via_v6(next)?;
        let mtu = self.path_mtu_v6(via);
        self.step_mtu_v6(mtu, packet);
        if longest(packet) > usize::from(mtu.get()) {
            return Err(DropReason::FragmentationNeeded);
        }
        self.forward_v6(now, destination, via, packet)
    }

    /// Sends a packet to the pod that has a link-local address.
    pub(super) fn send_on_link(
        &mut self,
        now: Instant,
        destination: Ipv6Addr,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let place = self.link_local_place(now, destination);
        let place = place.ok_or(DropReason::HostUnreachable)?;
        if longest(packet) > usize::from(self.path_mtu_v6(ViaV6::Pods).get()) {
            return Err(DropReason::FragmentationNeeded);
        }
        self.deliver(ViaV6::Pods, place, packet)
    }

    /// Whether nobody inside has an address. Anybody may put those in a datagram to a port of the host.
    pub(super) fn is_outside_v6(&self, source: Ipv6Addr) -> bool {
        let is_inside = self
            .egress_v6
            .is_some_and(|network| network.contains(&source));
        let is_nobody = source.is_unspecified() || guard::is_martian_v6(source);
        !is_inside && !source.is_unicast_link_local() && !is_nobody
    }

    /// Tells an observer that a packet was measured.
    #[inline(always)]
    fn step_mtu_v6(&mut self, mtu: Mtu, packet: &PacketBuf<'_>) {
        self.ledger.step(|| TraceStep::Mtu {
            mtu: mtu.get(),
            len: longest(packet),
            dont_fragment: true,
        });
    }

    /// Whose address a pod's source is was checked at its port; a peer's must be in its lease.
    fn check_source_v6(
        &mut self,
        now: Instant,
        home: &HomeV6,
        origin: Origin,
        source: Ipv6Addr,
        len: usize,
    ) -> Result<(), DropReason> {
        if guard::is_martian_v6(source) || source.is_unspecified() {
            return Err(DropReason::SourceAddressInvalid);
        }
        match origin {
            Origin::Pod(_) => return Ok(()),
            // It is of one IP version so far.
            Origin::Host => return Err(DropReason::HostFamily),
            // What is of their link only stays there.
            Origin::Peer(_) | Origin::Uplink(_) if source.is_unicast_link_local() => {
                return Err(DropReason::BeyondScope);
            }
            Origin::Uplink(mac) => self.check_host(now, mac, source.into(), len)?,
            Origin::Peer(first) => {
                if self.config.guard.peers && !self.is_from_v6(first, source) {
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
    fn is_from_v6(&self, first: Option<PeerId>, source: Ipv6Addr) -> bool {
        let Some(first) = first else {
            return false;
        };
        // What is known of the peer spares the route table, where leases have one length.
        !self.routes.may_nest_v6() && self.peers.is_routed_v6(first, source)
            || self.leads_to(source.into(), first)
    }

    /// The way of a route.
    pub(super) fn via_v6(&self, next: NextHop) -> Result<ViaV6, DropReason> {
        match next {
            NextHop::Local => Ok(Via::Pods),
            NextHop::Peer(id) => {
                let peer = self.peers.outgoing_v6(id);
                peer.map(|peer| Via::Peer(id, peer))
                    .ok_or(DropReason::NextHopUnreachable)
            }
        }
    }

    /// The largest packet that a way takes.
    fn path_mtu_v6(&self, via: ViaV6) -> Mtu {
        match (via, &self.uplink) {
            (Via::Peer(_, peer), Some(link)) if peer.path == Path::Uplink => link.uplink.mtu,
            (Via::Peer(..), _) => self.config.mtu_v6,
            // Their interfaces are as wide as those of pods with IPv4 alone.
            (Via::Pods, _) => self.config.mtu.max(self.config.mtu_v6),
        }
    }

    /// Sends a superpacket on as its segments, each of which the way takes.
    pub(super) fn in_segments_v6(
        &mut self,
        now: Instant,
        destination: Ipv6Addr,
        via: ViaV6,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        packet.complete_checksum();
        self.ledger.step(|| TraceStep::InPieces { segments: true });
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(HEADROOM + frame::MAX_LEN, 0);
        let mut is_first = true;
        let mut send = |node: &mut Self, scratch: &mut [u8], len| {
            node.send_piece(scratch, len, &mut is_first, |node, piece| {
                node.forward_v6(now, destination, via, piece)
            });
        };
        let step = self.segments(packet, &mut scratch, &mut send);
        self.scratch = scratch;
        step
    }

    /// The last step: link-layer header or encapsulation.
    pub(super) fn forward_v6(
        &mut self,
        now: Instant,
        destination: Ipv6Addr,
        via: ViaV6,
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
            Path::Tunnel => self.encapsulate_v6(id, &peer, packet),
            Path::Uplink => self.send_to_host(now, via, *peer.address.ip(), packet),
            Path::Unreachable => {
                self.send_icmp_error(now, IcmpError::HostUnreachable, packet.as_slice());
                Err(DropReason::NextHopUnreachable)
            }
        }
    }

    pub(super) fn encapsulate_v6(
        &mut self,
        id: PeerId,
        peer: &OutgoingV6,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        if peer.checksums == Checksums::Complete {
            packet.complete_checksum();
        }
        let flow = hash::flow_v6(packet.as_slice(), self.seed);
        let tunnel = self.config.tunnel;
        tunnel.encapsulate_v6(peer.vtep_mac, packet)?;
        self.ledger.step(|| TraceStep::Encapsulated {
            peer: id,
            destination: peer.address.into(),
            macs: tunnel
                .vtep_mac_v6()
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
