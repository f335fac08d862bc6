//! The resolver: where on its link the next hop of a packet is, by ARP (RFC 826) or neighbour discovery
//! (RFC 4861).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use muslin_encap::buffer::PacketBuf;
use smoltcp::time::Instant;
use smoltcp::wire::{ArpOperation, EthernetAddress, EthernetProtocol};

use super::Node;
use super::peers::{Outgoing, OutgoingV6};
use super::router::{Decision, Via};
use crate::datapath::filter::{Direction, Filter};
use crate::datapath::frame;
use crate::datapath::icmp::IcmpError;
use crate::datapath::neighbour::{Neighbours, Place, Resolution, TimerAction};
use crate::datapath::observe::Observer;
use crate::datapath::trace::{Known, TraceStep};
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

/// One of the node's links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    /// The switch with the pods.
    Pods,
    /// The uplink.
    Uplink,
}

/// An IP version, named by what its packets need of a peer, as far as the resolver tells it from the
/// other.
pub(super) trait Version: Copy {
    type Address: Copy + Into<IpAddr>;
    const ETHERTYPE: EthernetProtocol;

    /// Sends a packet on in several.
    fn in_pieces<O: Observer, F: Filter>(
        node: &mut Node<O, F>,
        now: Instant,
        host: Self::Address,
        via: Via<Self>,
        packet: &mut PacketBuf<'_>,
    ) -> Decision;
}

impl Version for Outgoing {
    type Address = Ipv4Addr;
    const ETHERTYPE: EthernetProtocol = EthernetProtocol::Ipv4;

    fn in_pieces<O: Observer, F: Filter>(
        node: &mut Node<O, F>,
        now: Instant,
        host: Ipv4Addr,
        via: Via,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        node.in_pieces(now, host, via, packet)
    }
}

impl Version for OutgoingV6 {
    type Address = Ipv6Addr;
    const ETHERTYPE: EthernetProtocol = EthernetProtocol::Ipv6;

    fn in_pieces<O: Observer, F: Filter>(
        node: &mut Node<O, F>,
        now: Instant,
        host: Ipv6Addr,
        via: Via<Self>,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        node.in_segments_v6(now, host, via, packet)
    }
}

impl<P> Via<P> {
    /// The link on which its next hop is resolved.
    const fn link(&self) -> Link {
        match self {
            Self::Pods => Link::Pods,
            Self::Peer(..) => Link::Uplink,
        }
    }
}

/// What an observer is told of a resolution.
fn known_by(resolution: &Resolution) -> Known {
    match resolution {
        Resolution::Known(place) => Known::At(place.mac),
        Resolution::Stale(place) => Known::Stale(place.mac),
        Resolution::Wait { .. } | Resolution::QueueFull { .. } => Known::Sought,
        Resolution::TableFull => Known::Nobody,
    }
}

impl<O: Observer, F: Filter> Node<O, F> {
    /// Sends a packet to a host on one of the node's links, now or when it is known where that is.
    pub(super) fn send_to_host<P: Version>(
        &mut self,
        now: Instant,
        via: Via<P>,
        host: P::Address,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        match self.neighbours_of(via)?.known(host.into(), now) {
            Some(place) => {
                self.step_neighbour(via, host, || Known::At(place.mac));
                self.deliver(via, place, packet)
            }
            None => self.resolve(now, via, host, packet),
        }
    }

    /// Tells an observer what the neighbour table said.
    #[inline(always)]
    fn step_neighbour<P: Version>(
        &mut self,
        via: Via<P>,
        host: P::Address,
        known: impl FnOnce() -> Known,
    ) {
        self.ledger.step(|| {
            let address = host.into();
            let place = self.neighbours.get(address);
            TraceStep::Neighbour {
                address,
                port: place
                    .filter(|_| matches!(via, Via::Pods))
                    .map(|place| place.port),
                known: known(),
            }
        });
    }

    /// The same if it is not known yet, or is to be asked for again.
    fn resolve<P: Version>(
        &mut self,
        now: Instant,
        via: Via<P>,
        host: P::Address,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let address: IpAddr = host.into();
        if self.neighbours_of(via)?.get(address).is_none() {
            if matches!(via, Via::Pods) && self.unguarded == 0 {
                if let Some(until) = self.awaited.until(now, address) {
                    self.step_neighbour(via, host, || Known::Awaited);
                    return self.wait_for_pod::<P>(now, host, packet, until);
                }
                self.step_neighbour(via, host, || Known::Nobody);
                // No attachment has it, and no pod may answer for an address that is not its own.
                self.send_icmp_error(now, IcmpError::HostUnreachable, packet.as_slice());
                return Err(DropReason::HostUnreachable);
            }
            if !packet.is_single() {
                return P::in_pieces(self, now, host, via, packet);
            }
            packet.complete_checksum();
        }
        let resolution = self
            .neighbours_of(via)?
            .resolve(address, packet.as_slice(), now);
        self.step_neighbour(via, host, || known_by(&resolution));
        let (ask, step) = match resolution {
            Resolution::Known(place) => (None, self.deliver(via, place, packet)),
            Resolution::Stale(place) => (Some(Some(place)), self.deliver(via, place, packet)),
            Resolution::Wait { ask } => (ask.then_some(None), Ok(Verdict::Consumed)),
            Resolution::QueueFull { ask } => {
                (ask.then_some(None), Err(DropReason::NeighbourQueueFull))
            }
            Resolution::TableFull => (None, Err(DropReason::NeighbourTableFull)),
        };
        if let Some(place) = ask {
            self.ask(via.link(), address, place);
        }
        step
    }

    /// Lets a packet wait for a pod that is about to be attached again.
    fn wait_for_pod<P: Version>(
        &mut self,
        now: Instant,
        host: P::Address,
        packet: &mut PacketBuf<'_>,
        until: Instant,
    ) -> Decision {
        if !packet.is_single() {
            return P::in_pieces(self, now, host, Via::Pods, packet);
        }
        packet.complete_checksum();
        let waits = self.neighbours.wait(host.into(), packet.as_slice(), until);
        if waits {
            Ok(Verdict::Consumed)
        } else {
            Err(DropReason::PodAwaited)
        }
    }

    /// Those on the link of a way.
    fn neighbours_of<P>(&mut self, via: Via<P>) -> Result<&mut Neighbours, DropReason> {
        match (via, &mut self.uplink) {
            (Via::Pods, _) => Ok(&mut self.neighbours),
            (Via::Peer(..), Some(link)) => Ok(&mut link.neighbours),
            (Via::Peer(..), None) => Err(DropReason::NextHopUnreachable),
        }
    }

    /// Puts the link-layer header on a packet.
    pub(super) fn deliver<P: Version>(
        &mut self,
        via: Via<P>,
        place: Place,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let (source, verdict) = match (via, &self.uplink) {
            (Via::Pods, _) => (self.config.gateway_mac, Verdict::Port(place.port)),
            (Via::Peer(id, _), Some(link)) => (link.uplink.mac, Verdict::Uplink { id: Some(id) }),
            (Via::Peer(..), None) => return Err(DropReason::NextHopUnreachable),
        };
        if let Verdict::Port(port) = verdict {
            self.check_policy(Direction::ToPod, port, packet.as_slice())?;
            self.check_rate(port, packet)?;
        }
        frame::prepend_as(packet, source, place.mac, P::ETHERTYPE)
            .map_err(|_| DropReason::HeadroomExceeded)?;
        Ok(verdict)
    }

    /// Asks on a link where an address is: at `place`, or everybody.
    pub(super) fn ask(&mut self, link: Link, address: IpAddr, place: Option<Place>) {
        match (address, link) {
            (IpAddr::V4(address), _) => self.send_arp_request(link, address, place),
            (IpAddr::V6(address), Link::Pods) => self.solicit_pods(address, place),
            (IpAddr::V6(address), Link::Uplink) => self.solicit_host(address, place),
        }
    }

    fn send_arp_request(&mut self, link: Link, address: Ipv4Addr, place: Option<Place>) {
        let mac = place.map_or(EthernetAddress::BROADCAST, |place| place.mac);
        let (verdict, source) = match (link, &self.uplink, place) {
            (Link::Uplink, Some(link), _) => {
                let Some(own) = link.uplink.nets.addresses().ipv4() else {
                    return;
                };
                (Verdict::Uplink { id: None }, (link.uplink.mac, own))
            }
            (Link::Uplink, None, _) => return,
            (Link::Pods, _, Some(place)) => (
                Verdict::Port(place.port),
                (self.config.gateway_mac, self.gateway_ipv4()),
            ),
            (Link::Pods, _, None) => (
                Verdict::Flood { except: None },
                (self.config.gateway_mac, self.gateway_ipv4()),
            ),
        };
        self.queue_frame(
            verdict,
            &frame::write_arp(ArpOperation::Request, source, (mac, address)),
        );
    }

    /// Asks for next hops again, and gives up on those that do not answer.
    pub(super) fn handle_neighbours(&mut self, now: Instant) {
        let mut due = Vec::new();
        self.neighbours
            .handle_timeout(now, |action| due.push((Link::Pods, action)));
        if let Some(link) = &mut self.uplink {
            link.neighbours
                .handle_timeout(now, |action| due.push((Link::Uplink, action)));
        }
        for (link, action) in due {
            match action {
                TimerAction::Request(address) => self.ask(link, address, None),
                TimerAction::Probe(address, place) => self.ask(link, address, Some(place)),
                TimerAction::Failed(address, waiting) => {
                    if link == Link::Uplink {
                        self.lose_early(address);
                    }
                    let is_awaited =
                        link == Link::Pods && self.awaited.until(now, address).is_some();
                    for packet in waiting {
                        if is_awaited {
                            let lost = Verdict::Drop(DropReason::PodAwaited);
                            self.ledger.own(lost, packet.as_slice());
                            continue;
                        }
                        let lost = Verdict::Drop(DropReason::HostUnreachable);
                        self.ledger.own(lost, packet.as_slice());
                        self.send_icmp_error(now, IcmpError::HostUnreachable, &packet);
                    }
                }
            }
        }
    }
}
