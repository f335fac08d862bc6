//! IPv6 frames of pods that the switch does not just pass on: neighbour discovery, frames for groups, and
//! what is for the gateway.
//!
//! Solicitations for a pod's address go to that pod alone: what a pod asks is no other pod's business, and
//! a scan costs nobody but its sender (RFC 6583). None comes back to its sender, which would take it for
//! another host's claim of its address (RFC 7527).

use std::net::{IpAddr, Ipv6Addr};

use muslin_encap::buffer::PacketBuf;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, Ipv6Packet};

use super::Node;
use super::router::{Decision, Origin};
use crate::datapath::filter::Filter;
use crate::datapath::frame;
use crate::datapath::link_local;
use crate::datapath::multicast::mld;
use crate::datapath::ndp::{self, Advertisement, Message, Solicitation};
use crate::datapath::neighbour::Place;
use crate::datapath::observe::Observer;
use crate::datapath::port::PortId;
use crate::datapath::trace::{Switched, TraceStep};
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

/// All routers of a link (RFC 4291 section 2.7.1). There are none but the gateway.
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

impl<O: Observer, F: Filter> Node<O, F> {
    /// Takes a frame for a group.
    pub(super) fn ingress_group_v6(
        &mut self,
        now: Instant,
        id: PortId,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let bytes = packet.as_slice().get(frame::HEADER_LEN..);
        let bytes = bytes.unwrap_or_default();
        match Message::parse(bytes)? {
            Some(Message::RouterSolicitation { .. }) => return Ok(Verdict::Consumed),
            Some(Message::Solicitation(solicitation)) => {
                self.learn_from_solicitation(now, id, &solicitation);
                return self.take_solicitation(now, id, &solicitation, packet);
            }
            Some(Message::Advertisement(advertisement)) => {
                self.learn_from_advertisement(now, id, &advertisement, packet.as_slice());
                return self.flood(now, id, packet);
            }
            None => {}
        }
        // Where nobody asks for members, nobody is one for long (RFC 4541 section 2.1.2).
        let is_followed = self.groups.is_some() && self.home_v6.is_some();
        match Ipv6Packet::new_unchecked(bytes).dst_addr() {
            _ if mld::find(bytes)?.is_some() => match is_followed {
                true => self.take_report(now, id, packet.as_slice(), true),
                // The switch has no use for them if it prunes nothing.
                false => Ok(Verdict::Consumed),
            },
            ALL_ROUTERS => Ok(Verdict::Consumed),
            ndp::ALL_NODES => Err(DropReason::AllNodesGroup),
            _ if is_followed => self.send_to_group(now, id, packet),
            _ => self.flood(now, id, packet),
        }
    }

    /// Takes a frame for the gateway's MAC address.
    pub(super) fn ingress_gateway_v6(
        &mut self,
        now: Instant,
        id: PortId,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        if frame::is_neighbour_discovery(packet.as_slice()) {
            let bytes = packet.as_slice().get(frame::HEADER_LEN..);
            return match Message::parse(bytes.unwrap_or_default())? {
                Some(Message::Solicitation(solicitation)) => {
                    self.learn_from_solicitation(now, id, &solicitation);
                    let answered = self.answer_solicitation(id, &solicitation, packet.as_slice());
                    answered
                        .then_some(Verdict::Consumed)
                        .ok_or(DropReason::UnknownDestination)
                }
                Some(Message::Advertisement(advertisement)) => {
                    self.learn_from_advertisement(now, id, &advertisement, packet.as_slice());
                    Ok(Verdict::Consumed)
                }
                Some(Message::RouterSolicitation { .. }) | None => Ok(Verdict::Consumed),
            };
        }
        packet.trim_front(frame::HEADER_LEN);
        self.route_v6(now, Origin::Pod(id), packet)
    }

    /// Answers a solicitation for an address of the gateway's, or passes it to who has its target.
    fn take_solicitation(
        &mut self,
        now: Instant,
        id: PortId,
        solicitation: &Solicitation,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        if self.answer_solicitation(id, solicitation, packet.as_slice()) {
            return Ok(Verdict::Consumed);
        }
        match self.holder_v6(now, solicitation.target) {
            // It asks whether its own address is free, and it is.
            Some(port) if port == id => Ok(Verdict::Consumed),
            Some(port) => {
                self.ledger.step(|| TraceStep::Switch {
                    mac: ndp::multicast_mac(solicitation.destination),
                    to: Switched::Port(port),
                });
                self.check_rate(port, packet)?;
                Ok(Verdict::Port(port))
            }
            None if self.others_may_have_it(id) => self.flood(now, id, packet),
            None if solicitation.source.is_unspecified() => Ok(Verdict::Consumed),
            None => Err(DropReason::UnknownDestination),
        }
    }

    /// Answers a pod that looks for an address of the gateway's; false if its target is none.
    fn answer_solicitation(
        &mut self,
        id: PortId,
        solicitation: &Solicitation,
        bytes: &[u8],
    ) -> bool {
        let held = self.own.held();
        let answer = frame::parse(bytes).ok().zip(held).and_then(|(view, held)| {
            let (from, mac) = (view.src_addr(), self.config.gateway_mac);
            ndp::answer(solicitation, from, &held, mac)
        });
        if let Some(answer) = &answer {
            self.queue_frame(Verdict::Port(id), answer);
        }
        answer.is_some()
    }

    /// The port of the pod that alone may have an address.
    fn holder_v6(&self, now: Instant, address: Ipv6Addr) -> Option<PortId> {
        if address.is_unicast_link_local() {
            return self.link_local_port(now, address);
        }
        let port = self.neighbours.get(address.into())?.port;
        let attachment = &self.ports.get(&port)?.attachment;
        attachment
            .addresses
            .contains(&address.into())
            .then_some(port)
    }

    /// The port of the pod that has a link-local address.
    fn link_local_port(&self, now: Instant, address: Ipv6Addr) -> Option<PortId> {
        let by_mac = link_local::mac_of(address).and_then(|mac| self.fdb.lookup(mac, now));
        by_mac.or_else(|| self.link_locals.holder(address))
    }

    /// Where the pod is that has a link-local address.
    pub(super) fn link_local_place(&self, now: Instant, address: Ipv6Addr) -> Option<Place> {
        if let Some(place) = self.neighbours.get(address.into()) {
            return Some(place);
        }
        let port = self.link_local_port(now, address)?;
        let attachment = &self.ports.get(&port)?.attachment;
        let mac = match link_local::mac_of(address) {
            Some(mac) if !attachment.guarded => mac,
            _ => attachment.mac,
        };
        Some(Place { mac, port })
    }

    /// Learns where the sender of a solicitation is (RFC 4861 section 7.2.3).
    fn learn_from_solicitation(&mut self, now: Instant, port: PortId, message: &Solicitation) {
        if let Some(mac) = message.mac {
            self.hear_pod(now, message.source, Place { mac, port });
        }
    }

    /// Learns where the target of an advertisement is (RFC 4861 section 7.2.5): it tells nothing of an
    /// address for which nobody looks, and does not move one unless it says so.
    fn learn_from_advertisement(
        &mut self,
        now: Instant,
        port: PortId,
        message: &Advertisement,
        bytes: &[u8],
    ) {
        let from = frame::parse(bytes).map(|view| view.src_addr());
        let Some(mac) = message.mac.or(from.ok()) else {
            return;
        };
        let address = IpAddr::V6(message.target);
        let may_tell = match self.neighbours.get(address) {
            Some(known) => known.mac == mac || message.flags.override_,
            None => self.neighbours.is_sought(address),
        };
        if may_tell {
            self.hear_pod(now, message.target, Place { mac, port });
        }
    }

    /// Hears that a pod has an address. Those of guarded pods are known already.
    fn hear_pod(&mut self, now: Instant, address: Ipv6Addr, place: Place) {
        let is_guarded = |port| self.ports.get(&port).is_none_or(|it| it.attachment.guarded);
        let may_be_pods = address.is_unicast_link_local()
            || self
                .home_v6
                .is_some_and(|home| home.subnet.contains(&address));
        let is_host = may_be_pods
            && !self.own.contains(address)
            && !is_guarded(place.port)
            && place.mac.is_unicast()
            && !self.own_macs().contains(&place.mac);
        if is_host {
            let address = IpAddr::V6(address);
            for waited in self.neighbours.hear(address, place, now) {
                self.send_resolved(address, &waited);
            }
        }
    }

    /// Learns from a frame with neighbour discovery that another worker's node took from a port.
    pub(super) fn learn_from_discovery(&mut self, now: Instant, port: PortId, bytes: &[u8]) {
        let packet = bytes.get(frame::HEADER_LEN..).unwrap_or_default();
        match Message::parse(packet) {
            Ok(Some(Message::Solicitation(message))) => {
                self.learn_from_solicitation(now, port, &message);
            }
            Ok(Some(Message::Advertisement(message))) => {
                self.learn_from_advertisement(now, port, &message, bytes);
            }
            Ok(Some(Message::RouterSolicitation { .. }) | None) | Err(_) => {}
        }
    }

    /// Asks a pod, or all of them, where an address is.
    pub(super) fn solicit_pods(&mut self, address: Ipv6Addr, place: Option<Place>) {
        let Some(home) = &self.home_v6 else {
            return;
        };
        let source = (self.config.gateway_mac, home.gateway);
        let to: Option<EthernetAddress> = place.map(|place| place.mac);
        let verdict = match place {
            Some(place) => Verdict::Port(place.port),
            None => Verdict::Flood { except: None },
        };
        self.queue_frame(verdict, &ndp::write_solicitation(source, address, to));
    }
}
