//! The host interface's side of the node: what comes from the host, and what goes to it.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use muslin_encap::buffer::PacketBuf;
use smoltcp::time::Instant;
use smoltcp::wire::Ipv4Packet;

use super::router::{Decision, Origin, Via};
use super::{Node, Source};
use crate::datapath::egress::Policy;
use crate::datapath::filter::Filter;
use crate::datapath::frame;
use crate::datapath::host_interface::{self, Content, Ends, HostInterface, HostPort, Way, WayOut};
use crate::datapath::icmp::IcmpError;
use crate::datapath::observe::Observer;
use crate::datapath::trace::TraceStep;
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

impl<O: Observer, F: Filter> Node<O, F> {
    /// The host has an interface, another one, or none any more. With one the subnet's base address is
    /// the host's and no longer the gateway's. What `policy` forbids pods does not reach them.
    pub fn set_host(&mut self, host: Option<HostInterface>, policy: &Policy) {
        self.host = host.map(|interface| {
            let mut port = HostPort::new(interface, policy.clone());
            if let Some(former) = &self.host {
                (port.received, port.sent) = (former.received, former.sent);
            }
            port
        });
    }

    /// The host interface, with what went through it.
    #[must_use]
    pub const fn host(&self) -> Option<&HostPort> {
        self.host.as_ref()
    }

    /// The store is there now: pods do not get there by the host interface.
    pub(in crate::datapath) fn set_stores(&mut self, stores: &[SocketAddr]) {
        if let Some(host) = &mut self.host {
            host.policy.set_stores(stores.to_vec());
        }
    }

    /// Begins the host's turn. Its packets are to be taken as long as [`Self::host_goes_on`] says so.
    pub fn begin_host_turn(&mut self) {
        if let Some(host) = &mut self.host {
            host.turn.begin();
        }
    }

    /// Whether the host's turn goes on.
    #[must_use]
    pub fn host_goes_on(&self) -> bool {
        self.host.as_ref().is_some_and(|host| host.turn.goes_on())
    }

    /// Takes a packet from the host interface that begins with its IP header.
    pub fn from_host(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Verdict {
        self.begin(now);
        self.ledger.enters(Source::Host, packet);
        let len = packet.total_len();
        let verdict = self.ingress_host(now, packet).unwrap_or_else(Verdict::Drop);
        let work = self.work(verdict, packet);
        if let Some(host) = &mut self.host {
            host.received.count(len);
            host.turn.take(work);
        }
        self.count(Source::Host, verdict, packet)
    }

    /// Counts a packet of the host whose virtio-net header could not be read.
    pub fn refuse_host_packet(&mut self) {
        self.ledger.refuse(Source::Host, DropReason::VirtioHeader);
    }

    fn ingress_host(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Decision {
        if self.host.is_none() {
            return Err(DropReason::PortGone);
        }
        frame::check_packet_offload(packet)?;
        self.route(now, Origin::Host, packet)
    }

    pub(super) fn count_to_host(&mut self, len: usize) {
        if let Some(host) = &mut self.host {
            host.sent.count(len);
        }
    }

    /// Whether the host interface leads to an address.
    pub(in crate::datapath) fn is_at_host(&self, address: Ipv4Addr) -> bool {
        let host = self.host.as_ref();
        host.is_some_and(|host| address == self.base() || host.has(address))
    }

    /// Whether a packet goes to the host interface. Other nodes reach the host there by the base
    /// address alone: all others they reach without this one.
    pub(super) fn is_for_host(&self, origin: Origin, destination: Ipv4Addr) -> bool {
        match origin {
            Origin::Pod(_) => self.is_at_host(destination),
            Origin::Peer(_) | Origin::Uplink(_) => {
                self.host.is_some() && destination == self.base()
            }
            Origin::Host => false,
        }
    }

    /// Whether the host has that address, or has forwarded what comes from there.
    pub(super) fn check_host_source(&self, source: Ipv4Addr) -> Result<(), DropReason> {
        let host = self.host.as_ref();
        let is_own = |host: &HostPort| host.interface.addresses.contains(&source.into());
        if source == self.base() || host.is_some_and(is_own) {
            Ok(())
        } else {
            Err(DropReason::HostForwarded)
        }
    }

    /// The subnet's base address, which is the host interface's.
    fn base(&self) -> Ipv4Addr {
        self.home.map_or(Ipv4Addr::UNSPECIFIED, |home| home.base)
    }

    /// Lets a packet of the host go its way: to other nodes from the base address. What its answer
    /// needs is remembered.
    pub(super) fn translate_from_host(
        &mut self,
        now: Instant,
        via: Via,
        packet: &mut PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        let base = self.base();
        let Some(host) = &self.host else {
            return Err(DropReason::PortGone);
        };
        let flows = &host.interface.flows;
        let bytes = packet.as_slice();
        let source = Ipv4Packet::new_unchecked(bytes).src_addr();
        let way = match via {
            Via::Pods => Way::Local,
            Via::Peer(..) => Way::Remote,
        };
        let offload = packet.offload().checksum;
        match host_interface::content(bytes) {
            Content::Flow(ends) => {
                let flow = ends.of_host();
                let known = flows.out(now, &flow, ends.signs);
                // Pods may answer what they may send, without anybody remembering it.
                if known.is_none()
                    && way == Way::Local
                    && host.may_reach(ends.protocol, ends.source, base)
                {
                    return Ok(());
                }
                let port = match known {
                    Some(port) => port,
                    None => {
                        let begun = flows.begin(now, &flow, way);
                        begun.map_err(|_| DropReason::HostTableFull)?
                    }
                };
                let outside = SocketAddrV4::new(base, port);
                if way == Way::Remote && outside != ends.source {
                    host_interface::set_source(packet.as_mut_slice(), offload, outside);
                    self.ledger.step(|| TraceStep::Translated {
                        is_source: true,
                        to: outside.into(),
                    });
                }
                Ok(())
            }
            Content::Error(quoted) if way == Way::Remote => {
                // What the host says of a packet of a pod, which the pod knows by its own ends.
                let flow = WayOut {
                    protocol: quoted.protocol,
                    pod: quoted.source,
                    host: quoted.destination,
                };
                let port = flows.out(now, &flow, quoted.signs);
                let port = port.unwrap_or(quoted.destination.port());
                let outside = SocketAddrV4::new(base, port);
                packet.complete_checksum();
                host_interface::set_error(packet.as_mut_slice(), false, outside);
                Ok(())
            }
            Content::Fragment if way == Way::Remote => {
                let outside = SocketAddrV4::new(base, 0);
                host_interface::set_source(packet.as_mut_slice(), offload, outside);
                Ok(())
            }
            Content::Other if way == Way::Remote && source != base => Err(DropReason::HostProtocol),
            Content::Error(_) | Content::Fragment | Content::Other => Ok(()),
        }
    }

    /// Hands a packet of a pod to the host, if egress lets it through or it is an answer.
    pub(super) fn pass_to_host(
        &mut self,
        now: Instant,
        origin: Origin,
        packet: &mut PacketBuf<'_>,
    ) -> Decision {
        let Some(host) = &self.host else {
            return Err(DropReason::PortGone);
        };
        let (flows, base) = (&host.interface.flows, self.base());
        let is_local = matches!(origin, Origin::Pod(_));
        // The host's end of a known flow of which a packet with these ends is an answer.
        let answers = |ends: &Ends| {
            let flow = ends.of_pod();
            match is_local {
                true => flows.answers(now, &flow, ends.signs).then_some(flow.host),
                false => {
                    let port = flow.host.port();
                    flows.back(now, flow.protocol, flow.pod, port, ends.signs)
                }
            }
        };
        let may = |ends: &Ends| host.may_reach(ends.protocol, ends.destination, base);
        let bytes = packet.as_slice();
        let is_partial = Ipv4Packet::new_unchecked(bytes).more_frags();
        let offload = packet.offload().checksum;
        match host_interface::content(bytes) {
            Content::Flow(ends) => match answers(&ends) {
                Some(to) if to == ends.destination => {}
                Some(_) if is_partial => return Err(DropReason::HostFragment),
                Some(to) => {
                    host_interface::set_destination(packet.as_mut_slice(), offload, to);
                    self.ledger.step(|| TraceStep::Translated {
                        is_source: false,
                        to: to.into(),
                    });
                }
                None if may(&ends) => {}
                None => {
                    self.send_icmp_error(now, IcmpError::Prohibited, packet.as_slice());
                    return Err(DropReason::HostDenied);
                }
            },
            Content::Error(quoted) => {
                let ends = quoted.turned();
                match answers(&ends) {
                    Some(to) if to == ends.destination => {}
                    Some(to) => {
                        packet.complete_checksum();
                        host_interface::set_error(packet.as_mut_slice(), true, to);
                    }
                    None if may(&ends) => {}
                    None => return Err(DropReason::HostDenied),
                }
            }
            // The first fragment decides: without it no other is of use.
            Content::Fragment => {}
            Content::Other => return Err(DropReason::HostProtocol),
        }
        Ok(Verdict::Host)
    }

    /// Hands the host a packet of the node's own.
    pub(super) fn deliver_to_host(&mut self, packet: &mut PacketBuf<'_>) -> Decision {
        let now = self.now;
        let Some(host) = &self.host else {
            return Err(DropReason::PortGone);
        };
        // An error about a packet that was translated already.
        if let Content::Error(quoted) = host_interface::content(packet.as_slice())
            && *quoted.source.ip() == self.base()
        {
            let flow = quoted.turned().of_pod();
            let (port, signs) = (flow.host.port(), quoted.signs);
            let flows = &host.interface.flows;
            if let Some(to) = flows.back(now, flow.protocol, flow.pod, port, signs)
                && to != quoted.source
            {
                host_interface::set_error(packet.as_mut_slice(), true, to);
            }
        }
        Ok(Verdict::Host)
    }
}

impl Ends {
    /// The flow of a packet that the host sends.
    const fn of_host(&self) -> WayOut {
        WayOut {
            protocol: self.protocol,
            pod: self.destination,
            host: self.source,
        }
    }

    /// The flow of a packet that a pod sends.
    const fn of_pod(&self) -> WayOut {
        WayOut {
            protocol: self.protocol,
            pod: self.source,
            host: self.destination,
        }
    }

    /// The ends of an answer.
    const fn turned(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ..self
        }
    }
}
