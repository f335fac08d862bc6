//! The first steps of a packet: what its sender may send, and whether it is switched or routed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use muslin_encap::buffer::PacketBuf;
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::VtepMac;
use smoltcp::time::Instant;
use smoltcp::wire::{ArpOperation, ArpRepr, EthernetAddress, EthernetProtocol};

use super::home::Home;
use super::router::{Decision, Origin};
use super::{Node, Sender};
use crate::datapath::filter::{Direction, Filter};
use crate::datapath::frame;
use crate::datapath::guard;
use crate::datapath::link_local;
use crate::datapath::ndp::{self, Message};
use crate::datapath::neighbour::Place;
use crate::datapath::observe::Observer;
use crate::datapath::peer::PeerId;
use crate::datapath::port::PortId;
use crate::datapath::trace::{Switched, TraceStep};
use crate::datapath::tunnel::{Inner, Tunnel};
use crate::datapath::verdict::Verdict;
use crate::datapath::work;
use crate::drops::DropReason;

impl<O: Observer, F: Filter> Node<O, F> {
    /// Port, guard, switch.
    pub(super) fn ingress_port(
        &mut self,
        now: Instant,
        id: PortId,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let macs = self.own_macs();
        let port = self.ports.get_mut(&id).ok_or(DropReason::UnknownPort)?;
        port.received.count(packet.total_len());
        if let Some(limit) = &port.attachment.rates.from_pod {
            limit.charge(now, packet.total_len());
        }
        frame::check_offload(packet)?;
        let view = frame::parse(packet.as_slice())?;
        guard::check_pod(&view, &port.attachment, &macs, &self.own)?;
        let (source, destination) = (view.src_addr(), view.dst_addr());
        let ethertype = view.ethertype();
        if port.attachment.guarded {
            self.check_link_locals(now, id, guard::link_locals(&view, &self.own))?;
        } else {
            // A guarded pod has only the address that is static already.
            self.fdb.learn(source, id, now);
        }
        self.ledger.step(|| TraceStep::Guard {
            port: id,
            guarded: self.ports.get(&id).is_some_and(|it| it.attachment.guarded),
        });

        let to_gateway = destination == self.config.gateway_mac;
        if ethertype == EthernetProtocol::Arp {
            self.learn_from_arp(now, id, packet.as_slice());
            if to_gateway || destination.is_multicast() {
                self.ask_gateway(now, packet.as_slice());
            }
        }
        if frame::is_reserved_group(destination) {
            return Err(DropReason::ReservedGroup);
        }
        if destination.is_multicast() {
            return match ethertype {
                EthernetProtocol::Ipv6 => self.ingress_group_v6(now, id, packet),
                EthernetProtocol::Ipv4 if self.groups.is_some() && self.home.is_some() => {
                    self.ingress_group_v4(now, id, packet)
                }
                _ => self.flood(now, id, packet),
            };
        }
        if !to_gateway {
            return match self.fdb.lookup(destination, now) {
                Some(port) if port == id => Err(DropReason::Hairpin),
                Some(port) => {
                    self.ledger.step(|| TraceStep::Switch {
                        mac: destination,
                        to: Switched::Port(port),
                    });
                    self.check_policy_of_frame(Direction::FromPod, id, packet)?;
                    self.check_policy_of_frame(Direction::ToPod, port, packet)?;
                    self.check_rate(port, packet)?;
                    Ok(Verdict::Port(port))
                }
                None if self.others_may_have_it(id) => self.flood(now, id, packet),
                None => Err(DropReason::UnknownDestination),
            };
        }
        self.ledger.step(|| TraceStep::Switch {
            mac: destination,
            to: Switched::Gateway,
        });
        match ethertype {
            EthernetProtocol::Arp => Ok(Verdict::Consumed),
            EthernetProtocol::Ipv4 => {
                packet.trim_front(frame::HEADER_LEN);
                self.route(now, Origin::Pod(id), packet)
            }
            EthernetProtocol::Ipv6 => self.ingress_gateway_v6(now, id, packet),
            EthernetProtocol::Unknown(_) => Err(DropReason::EtherTypeUnsupported),
        }
    }

    /// Has a frame copied to all other ports, if the sender has not had too many copied.
    pub(super) fn flood(&mut self, now: Instant, id: PortId, packet: &PacketBuf<'_>) -> Decision {
        self.check_policy_of_frame(Direction::ToAll, id, packet)?;
        self.ledger.step(|| TraceStep::Switch {
            mac: frame::parse(packet.as_slice())
                .map_or_else(|_| EthernetAddress::BROADCAST, |view| view.dst_addr()),
            to: Switched::Others(self.ports.len().saturating_sub(1)),
        });
        let copies = work::of_packets(self.others(), packet.total_len());
        let port = self.ports.get_mut(&id).ok_or(DropReason::UnknownPort)?;
        if port.storm.take(now, copies) {
            Ok(Verdict::Flood { except: Some(id) })
        } else {
            Err(DropReason::Storm)
        }
    }

    /// Checks that a pod does not receive faster than it may.
    #[inline]
    pub(super) fn check_rate(
        &self,
        port: PortId,
        packet: &PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        if self.limited == 0 {
            return Ok(());
        }
        let port = self.ports.get(&port);
        match port.and_then(|port| port.attachment.rates.to_pod.as_ref()) {
            Some(limit) if !limit.take(self.now, packet.total_len()) => {
                Err(DropReason::RateExceeded)
            }
            _ => Ok(()),
        }
    }

    /// Asks the filter about a frame, if there is an IP packet in it.
    #[inline(always)]
    pub(super) fn check_policy_of_frame(
        &mut self,
        direction: Direction,
        port: PortId,
        packet: &PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        if !F::REFUSES {
            return Ok(());
        }
        let view = frame::parse(packet.as_slice())?;
        match view.ethertype() {
            // It is to IPv6 what ARP is to IPv4.
            EthernetProtocol::Ipv6 if frame::is_neighbour_discovery(packet.as_slice()) => Ok(()),
            EthernetProtocol::Ipv4 | EthernetProtocol::Ipv6 => {
                self.check_policy(direction, port, view.payload())
            }
            EthernetProtocol::Arp | EthernetProtocol::Unknown(_) => Ok(()),
        }
    }

    /// Checks that a guarded pod's link-local addresses are no other pod's.
    fn check_link_locals(
        &mut self,
        now: Instant,
        id: PortId,
        claimed: [Option<Ipv6Addr>; 2],
    ) -> Result<(), DropReason> {
        for address in claimed.into_iter().flatten() {
            let owner = link_local::mac_of(address).and_then(|mac| self.fdb.lookup(mac, now));
            let is_theirs = match owner {
                Some(owner) => owner == id,
                None => self.link_locals.claim(address, id),
            };
            if !is_theirs {
                return Err(DropReason::LinkLocalTaken);
            }
        }
        Ok(())
    }

    /// Whether an unknown MAC address can be behind another port than `id`: a guarded pod has none
    /// but its own, which is known.
    pub(super) fn others_may_have_it(&self, id: PortId) -> bool {
        let sender = self.ports.get(&id);
        let is_unguarded = sender.is_some_and(|port| !port.attachment.guarded);
        self.unguarded > usize::from(is_unguarded)
    }

    /// Whether a datagram may be one of this network's, as its sender and the tunnel's header say.
    pub(in crate::datapath) fn may_send(&self, sender: Sender, datagram: &[u8]) -> bool {
        self.config.tunnel.takes(datagram) && self.check_sender(sender).is_ok()
    }

    fn check_sender(&self, sender: Sender) -> Result<(), DropReason> {
        if !self.config.guard.peers {
            return Ok(());
        }
        let port = sender.peer.and_then(|id| self.peers.port(id));
        let port = port.ok_or(DropReason::UnknownPeer)?;
        // flannel's own datagrams leave from the tunnel's port; any process of a peer's host can send
        // from another.
        if self.config.tunnel == Tunnel::Udp && port != sender.address.port() {
            return Err(DropReason::TunnelPort);
        }
        Ok(())
    }

    /// Peer, decapsulation.
    pub(super) fn ingress_underlay(
        &mut self,
        now: Instant,
        sender: Sender,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        self.check_sender(sender)?;
        let known = sender.peer;
        self.ledger.step(|| TraceStep::Sender {
            address: sender.address,
            peer: known,
        });
        if let Some(id) = known {
            self.peers.count_received(now, id, packet.total_len());
        }
        let inner = self.config.tunnel.decapsulate(packet)?;
        self.ledger.step(|| TraceStep::Decapsulated);
        match inner {
            Inner::Ipv4 => self.route(now, Origin::Peer(known), packet),
            Inner::Ipv6 => self.route_v6(now, Origin::Peer(known), packet),
            Inner::Arp(mac) => self.answer_tunnelled_arp(known, mac, packet),
            Inner::Group(mac) => self.answer_tunnelled_discovery(known, mac, packet),
        }
    }

    /// flannel's nodes never ask, since leases tell every VTEP's MAC address; one that does gets
    /// the answer its kernel would get from ours.
    fn answer_tunnelled_arp(
        &mut self,
        known: Option<PeerId>,
        mac: VtepMac,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let payload = packet
            .as_slice()
            .get(frame::HEADER_LEN..)
            .unwrap_or_default();
        let Some(ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = frame::arp(payload)
        else {
            return Err(DropReason::EtherTypeUnsupported);
        };
        if !self.is_own(target_protocol_addr) {
            return Err(DropReason::DestinationMacForeign);
        }
        let id = known.ok_or(DropReason::UnknownPeer)?;
        let peer = self.peers.outgoing(id).ok_or(DropReason::PeerGone)?;
        let destination = peer.address;
        if destination.ip().is_unspecified() {
            // It speaks IPv6 alone, over which there is no ARP.
            return Err(DropReason::DestinationMacForeign);
        }
        let answer = frame::write_arp(
            ArpOperation::Reply,
            (mac.get(), target_protocol_addr),
            (source_hardware_addr, source_protocol_addr),
        );
        packet
            .replace(&answer)
            .map_err(|_| DropReason::HeadroomExceeded)?;
        self.config.tunnel.encapsulate_frame(packet)?;
        Ok(Verdict::Peer {
            id,
            destination: destination.into(),
            flow: 0,
            checksums: Checksums::Complete,
        })
    }

    /// The same of IPv6, who asks for neighbours by solicitations. Other frames for groups are nobody's.
    fn answer_tunnelled_discovery(
        &mut self,
        known: Option<PeerId>,
        mac: VtepMac,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let view = frame::parse(packet.as_slice())?;
        let asked = match Message::parse(view.payload())? {
            Some(Message::Solicitation(asked)) if !asked.source.is_unspecified() => asked,
            _ => return Err(DropReason::DestinationMacForeign),
        };

        let held = self.own.held().ok_or(DropReason::DestinationMacForeign)?;
        // On that link no other host has the base.
        let held = held.map(|own| ndp::Held {
            anycast: false,
            ..own
        });
        let answer = ndp::answer(&asked, view.src_addr(), &held, mac.get())
            .filter(|_| !asked.target.is_unicast_link_local())
            .ok_or(DropReason::DestinationMacForeign)?;
        let id = known.ok_or(DropReason::UnknownPeer)?;
        let peer = self.peers.outgoing_v6(id).ok_or(DropReason::PeerGone)?;
        packet
            .replace(&answer)
            .map_err(|_| DropReason::HeadroomExceeded)?;
        self.config.tunnel.encapsulate_frame(packet)?;
        Ok(Verdict::Peer {
            id,
            destination: peer.address.into(),
            flow: 0,
            checksums: Checksums::Complete,
        })
    }

    /// The node's own addresses, in no particular order.
    pub(super) fn own_macs(&self) -> [EthernetAddress; 3] {
        let gateway = self.config.gateway_mac;
        let tunnel = &self.config.tunnel;
        let or_gateway = |mac: Option<VtepMac>| mac.map_or(gateway, VtepMac::get);
        [
            gateway,
            or_gateway(tunnel.vtep_mac()),
            or_gateway(tunnel.vtep_mac_v6()),
        ]
    }

    /// Whether an address is one of the gateway's.
    pub(super) fn is_own(&self, address: Ipv4Addr) -> bool {
        self.home.as_ref().is_some_and(|home| home.is_own(address))
    }

    /// Learns from a frame with ARP or neighbour discovery that another worker's node took from a
    /// port. What is to be done about the frame itself is done there.
    pub fn learn_from_sibling(&mut self, now: Instant, id: PortId, bytes: &[u8]) {
        self.begin(now);
        let macs = self.own_macs();
        let (Some(port), Ok(view)) = (self.ports.get(&id), frame::parse(bytes)) else {
            return;
        };
        if guard::check_pod(&view, &port.attachment, &macs, &self.own).is_err() {
            return;
        }
        let guarded = port.attachment.guarded;
        self.fdb.learn(view.src_addr(), id, now);
        if self.hear_of_report(now, id, bytes) {
            return;
        }
        if view.ethertype() == EthernetProtocol::Arp {
            self.learn_from_arp(now, id, bytes);
        } else if guarded {
            // A claim that is refused here is refused there, or was first there.
            let _ = self.check_link_locals(now, id, guard::link_locals(&view, &self.own));
        } else {
            self.learn_from_discovery(now, id, bytes);
        }
    }

    fn learn_from_arp(&mut self, now: Instant, port: PortId, bytes: &[u8]) {
        let payload = bytes.get(frame::HEADER_LEN..).unwrap_or_default();
        let Some(ArpRepr::EthernetIpv4 {
            source_hardware_addr,
            source_protocol_addr,
            ..
        }) = frame::arp(payload)
        else {
            return;
        };
        let is_pods = |home: &Home| {
            home.subnet.contains(&source_protocol_addr)
                && !home.is_own(source_protocol_addr)
                && source_protocol_addr != home.broadcast
        };
        let is_host = self.home.as_ref().is_some_and(is_pods)
            && source_hardware_addr.is_unicast()
            && !self.own_macs().contains(&source_hardware_addr);
        if is_host {
            let address = IpAddr::V4(source_protocol_addr);
            let place = Place {
                mac: source_hardware_addr,
                port,
            };
            for waited in self.neighbours.hear(address, place, now) {
                self.send_resolved(address, &waited);
            }
        }
    }

    fn ask_gateway(&mut self, now: Instant, bytes: &[u8]) {
        let answer_to_probe = self.answer_to_probe(bytes);
        let Self {
            gateway,
            output,
            ledger,
            fdb,
            ..
        } = self;
        let mut reply = |answer: &[u8]| {
            let target = frame::parse(answer).map(|view| view.dst_addr());
            let verdict = match target.map(|mac| fdb.lookup(mac, now)) {
                Ok(Some(port)) => Verdict::Port(port),
                Ok(None) | Err(_) => Verdict::Flood { except: None },
            };
            if let Err(reason) = output.push(verdict, answer) {
                ledger.own(Verdict::Drop(reason), answer);
            }
        };
        match answer_to_probe {
            Some(answer) => reply(&answer),
            None => gateway.arp(now, bytes, reply),
        }
    }

    /// The answer to a pod that asks, before it has an address, whether one of the gateway's is
    /// free (RFC 5227 section 2.1.1). smoltcp answers only those who have an address.
    fn answer_to_probe(&self, bytes: &[u8]) -> Option<[u8; frame::ARP_LEN]> {
        let ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr: Ipv4Addr::UNSPECIFIED,
            target_protocol_addr,
            ..
        } = frame::arp(bytes.get(frame::HEADER_LEN..)?)?
        else {
            return None;
        };
        let may_answer = self.is_own(target_protocol_addr) && source_hardware_addr.is_unicast();
        may_answer.then(|| {
            frame::write_arp(
                ArpOperation::Reply,
                (self.config.gateway_mac, target_protocol_addr),
                (source_hardware_addr, Ipv4Addr::UNSPECIFIED),
            )
        })
    }
}
