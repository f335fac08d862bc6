//! What the node sends of its own accord: the gateway's replies, ICMP errors, packets that waited.

use std::hash::BuildHasher;
use std::net::IpAddr;

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::fragment::{self, Fragments};
use muslin_encap::ip::v6;
use smoltcp::time::Instant;
use smoltcp::wire::{Ipv4Packet, Ipv6Packet};

use super::Node;
use super::router::{Decision, Via};
use super::router_v6::ViaV6;
use crate::datapath::filter::Filter;
use crate::datapath::frame;
use crate::datapath::guard;
use crate::datapath::icmp::{self, IcmpError};
use crate::datapath::observe::Observer;
use crate::datapath::trace::TraceStep;
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

/// Whether a packet says that it is of IPv6.
fn is_v6(packet: &[u8]) -> bool {
    packet.first().is_some_and(|first| first >> 4 == 6)
}

impl<O: Observer, F: Filter> Node<O, F> {
    /// Gives a packet to the gateway and routes what it answers.
    pub(super) fn deliver_to_gateway(&mut self, now: Instant, packet: &[u8]) {
        let mut answers = std::mem::take(&mut self.answers);
        let free = &mut self.output.free;
        self.gateway.ip(now, packet, |answer| {
            let mut buffer = free.pop().unwrap_or_default();
            buffer.clear();
            buffer.extend_from_slice(answer);
            answers.push(buffer);
        });
        for mut answer in answers.drain(..) {
            self.route_reply(now, &mut answer);
            self.output.free.push(answer);
        }
        self.answers = answers;
    }

    /// Routes an answer of the gateway, in fragments if it is larger than the MTU, unless it is an
    /// error and there were too many.
    fn route_reply(&mut self, now: Instant, answer: &mut [u8]) {
        if icmp::is_error(answer) && !self.errors.take(now, 1) {
            return;
        }
        if is_v6(answer) {
            return self.route_reply_v6(now, answer);
        }
        let mtu = self.config.mtu;
        if answer.len() <= usize::from(mtu.get()) {
            return self.route_own(now, answer);
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
            self.route_own(now, &piece[..len]);
        }
        self.output.free.push(piece);
    }

    fn route_reply_v6(&mut self, now: Instant, answer: &[u8]) {
        let mtu = self.config.mtu_v6;
        if answer.len() <= usize::from(mtu.get()) {
            return self.route_own(now, answer);
        }
        self.ident = self.ident.wrapping_add(1);
        // Nobody foretells it (RFC 7739).
        let ident = self.seed.hash_one(self.ident) as u32;
        let Some(mut fragments) = fragment::v6::Fragments::new(answer, mtu, ident) else {
            return;
        };
        let mut piece = self.output.free.pop().unwrap_or_default();
        piece.resize(mtu.get().into(), 0);
        while let Some(len) = fragments.write_next(&mut piece) {
            self.route_own(now, &piece[..len]);
        }
        self.output.free.push(piece);
    }

    /// Sends an ICMP error about a packet, if it may have one and there were not too many.
    pub fn send_icmp_error(&mut self, now: Instant, error: IcmpError, offender: &[u8]) {
        self.begin(now);
        if let Some(gateway) = self.gateway_for(offender) {
            self.send_icmp_error_from(now, gateway, error, offender);
        }
    }

    /// The gateway's address of the IP version of a packet.
    fn gateway_for(&self, packet: &[u8]) -> Option<IpAddr> {
        match is_v6(packet) {
            false => self.home.map(|home| home.gateway.into()),
            true => self.home_v6.map(|home| home.gateway.into()),
        }
    }

    /// Sends a pod the ICMP error about a packet that `from`, outside the overlay, has sent about it
    /// to the host, as [`Self::send_icmp_error`] does. Where nobody outside can be who speaks the packet's
    /// IP version, the gateway has it.
    pub fn forward_icmp_error(
        &mut self,
        now: Instant,
        from: IpAddr,
        error: IcmpError,
        offender: &[u8],
    ) {
        self.begin(now);
        let may = match from {
            _ if from.is_ipv6() != is_v6(offender) => false,
            IpAddr::V4(from) => {
                let is_inside = self.egress.is_some_and(|network| network.contains(&from));
                !is_inside && !guard::is_martian(from)
            }
            IpAddr::V6(from) => self.is_outside_v6(from) && !from.is_unspecified(),
        };
        let from = if may {
            Some(from)
        } else {
            self.gateway_for(offender)
        };
        if let Some(from) = from {
            self.send_icmp_error_from(now, from, error, offender);
        }
    }

    fn send_icmp_error_from(
        &mut self,
        now: Instant,
        from: IpAddr,
        error: IcmpError,
        offender: &[u8],
    ) {
        let own = |packet| match from {
            IpAddr::V4(_) => {
                let source = Ipv4Packet::new_unchecked(packet).src_addr();
                self.is_own(source) && !self.is_at_host(source)
            }
            IpAddr::V6(_) => {
                let source = Ipv6Packet::new_unchecked(packet).src_addr();
                self.home_v6.is_some_and(|home| home.is_own(source))
            }
        };
        if !icmp::may_answer(offender) || own(offender) {
            return;
        }
        // As in Linux, path MTU discovery is not limited: a connection stalls without it, and any
        // pod can use the others up.
        if !matches!(error, IcmpError::FragmentationNeeded(_)) && !self.errors.take(now, 1) {
            return;
        }
        self.ledger.step(|| TraceStep::Error { error });
        let mut buffer = [0; icmp::MAX_LEN];
        // An error larger than the MTU would have to be fragmented; it quotes less instead. No MTU of
        // IPv6 is smaller than the longest error.
        let room = match from {
            IpAddr::V4(_) => icmp::MAX_LEN.min(self.config.mtu.get().into()),
            IpAddr::V6(_) => icmp::MAX_LEN,
        };
        if let Some(len) = error.write(&mut buffer[..room], from, offender) {
            self.route_own(now, &buffer[..len]);
        }
    }

    /// Routes a packet of the node's own.
    pub(in crate::datapath) fn route_own(&mut self, now: Instant, bytes: &[u8]) {
        if is_v6(bytes) {
            return self.route_own_v6(now, bytes);
        }
        let Ok(view) = Ipv4Packet::new_checked(bytes) else {
            return;
        };
        let destination = view.dst_addr();
        if self.is_at_host(destination) {
            return self.with_scratch(bytes, |node, packet| node.deliver_to_host(packet));
        }
        let next = self.routes.lookup(destination.into()).copied();
        self.with_scratch(bytes, |node, packet| match next {
            Some(next) => {
                let via = node.via(next)?;
                node.forward(now, destination, via, packet)
            }
            None => Err(DropReason::NoRoute),
        });
    }

    fn route_own_v6(&mut self, now: Instant, bytes: &[u8]) {
        if v6::check(bytes).is_err() {
            return;
        }
        let destination = Ipv6Packet::new_unchecked(bytes).dst_addr();
        let next = self.routes.lookup(destination.into()).copied();
        self.with_scratch(bytes, |node, packet| match next {
            _ if destination.is_unicast_link_local() => node.send_on_link(now, destination, packet),
            Some(next) => {
                let via = node.via_v6(next)?;
                node.forward_v6(now, destination, via, packet)
            }
            None => Err(DropReason::NoRoute),
        });
    }

    /// Sends on a packet that waited for `address`, which is known now.
    pub(super) fn send_resolved(&mut self, address: IpAddr, bytes: &[u8]) {
        let place = self.neighbours.get(address);
        self.with_scratch(bytes, |node, packet| {
            let place = place.ok_or(DropReason::HostUnreachable)?;
            match address {
                IpAddr::V4(_) => node.deliver(<Via>::Pods, place, packet),
                IpAddr::V6(_) => node.deliver(ViaV6::Pods, place, packet),
            }
        });
    }

    /// Takes a packet of the node's own one step on, and queues what comes out.
    pub(super) fn with_scratch(
        &mut self,
        bytes: &[u8],
        step: impl FnOnce(&mut Self, &mut PacketBuf<'_>) -> Decision,
    ) {
        self.ledger.observer.aside(true);
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
        self.ledger.observer.aside(false);
    }

    /// Queues a packet of the node's own for [`Node::poll_output`], or counts why not.
    pub(super) fn enqueue(&mut self, step: Decision, packet: &PacketBuf<'_>) {
        let queued = match step {
            Ok(Verdict::Consumed) => {
                self.ledger.own(Verdict::Consumed, packet);
                return;
            }
            Ok(verdict) => self.output.push(verdict, packet.as_slice()),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = queued {
            self.ledger.own(Verdict::Drop(reason), packet);
        }
    }

    /// Queues a frame of the node's own, or counts why not.
    pub(super) fn queue_frame(&mut self, verdict: Verdict, frame: &[u8]) {
        if let Err(reason) = self.output.push(verdict, frame) {
            self.ledger.own(Verdict::Drop(reason), frame);
        }
    }
}
