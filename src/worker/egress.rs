//! Packets for and from addresses outside the overlay, as the loop takes them.

use muslin_encap::buffer::{OwnedPacket, PacketBuf};
use muslin_stack::Instant;
use muslin_stack::drops::DropReason;
use muslin_stack::egress::Output;
use muslin_stack::node::{Node, Verdict};
use muslin_stack::port::PortId;
use nix::sys::epoll::EpollEvent;

use super::data_path::DataPath;
use super::output::Io;
use super::{Colleague, Heard};
use crate::egress::{Outside, event_of};

/// Does what egress has for the router: the node decides, and the devices take it.
pub(super) fn route_output(outside: &mut Outside, now: Instant, node: &mut Node, io: &mut Io) {
    let egress = &mut outside.egress;
    while let Some(output) = egress.poll_output() {
        let lost = match output {
            Output::Packet(mut packet) => match node.from_egress(now, &mut packet) {
                Verdict::Drop(reason) => Some(reason),
                verdict => {
                    io.send(node, verdict, &mut packet, &[]);
                    None
                }
            },
            Output::Error(error, offender) => {
                node.report(now, error, offender);
                None
            }
            Output::Relayed(from, error, offender) => {
                node.relay(now, from, error, offender);
                None
            }
            Output::Lost(reason, packets) => {
                node.count_drops(reason, packets);
                None
            }
        };
        if let Some(reason) = lost {
            egress.undelivered(now, reason);
        }
    }
}

/// Gives a packet that the node handed over, with what belongs to it and is elsewhere, to egress.
pub(super) fn take_packet(
    outside: &mut Outside,
    now: Instant,
    packet: &PacketBuf<'_>,
    tail: &[&[u8]],
    node: &mut Node,
    io: &mut Io,
) {
    if tail.is_empty() {
        return take_whole(outside, now, packet, node, io);
    }
    let mut flat = std::mem::take(&mut outside.flat);
    flat.clear();
    flat.extend_from_slice(packet.as_slice());
    tail.iter().for_each(|piece| flat.extend_from_slice(piece));
    let len = flat.len();
    if let Ok(whole) = PacketBuf::new(&mut flat, 0, len) {
        let whole = whole.with_offload(packet.offload());
        take_whole(outside, now, &whole, node, io);
    }
    outside.flat = flat;
}

fn take_whole(
    outside: &mut Outside,
    now: Instant,
    packet: &PacketBuf<'_>,
    node: &mut Node,
    io: &mut Io,
) {
    let Outside {
        egress, sockets, ..
    } = outside;
    if let Err(reason) = egress.from_pod(now, packet, sockets) {
        node.count_drops(reason, 1);
    }
    route_output(outside, now, node, io);
}

impl Colleague {
    /// Gives it a packet of a flow that it has.
    pub(super) fn hand_over(&self, packet: &PacketBuf<'_>) -> Result<(), DropReason> {
        let stray = Heard::Stray(OwnedPacket::copy(packet));
        let sent = self.heard.try_send(stray);
        let _ = self.wake.write(1);
        sent.map_err(|_| DropReason::EgressHandoverFull)
    }
}

impl DataPath {
    /// Takes a packet that another worker has handed over.
    pub(super) fn take_stray(&mut self, now: Instant, mut packet: OwnedPacket) {
        let Self {
            node, io, outside, ..
        } = self;
        let Outside {
            egress, sockets, ..
        } = outside;
        let packet = packet.packet();
        if let Err(reason) = egress.from_sibling(now, &packet, sockets) {
            node.count_drops(reason, 1);
        }
        route_output(outside, now, node, io);
    }

    /// Takes an event of a flow's socket.
    pub(super) fn read_flow(&mut self, event: EpollEvent) {
        let now = self.clock.now();
        let Self {
            node, io, outside, ..
        } = self;
        let Outside {
            egress, sockets, ..
        } = outside;
        let (flow, ready) = event_of(event.data(), event.events());
        egress.ready(now, flow, ready, sockets);
        route_output(outside, now, node, io);
        self.send_own();
    }

    /// Does what is due of flows.
    pub(super) fn handle_flows(&mut self, now: Instant) {
        let Self {
            node, io, outside, ..
        } = self;
        let Outside {
            egress, sockets, ..
        } = outside;
        if egress.poll_at().is_some_and(|due| now >= due) {
            egress.handle_timeout(now, sockets);
            route_output(outside, now, node, io);
            self.send_own();
        }
    }

    /// Ends the flows of a port's pod.
    pub(super) fn end_flows(&mut self, port: PortId) {
        let Self {
            node, io, outside, ..
        } = self;
        let Outside {
            egress, sockets, ..
        } = outside;
        let pod = node.ports().find(|(id, _)| *id == port);
        let addresses = pod.map(|(_, port)| port.attachment.addresses.clone());
        for address in addresses.unwrap_or_default() {
            if let std::net::IpAddr::V4(address) = address {
                egress.forget_pod(address, sockets);
            }
        }
        route_output(outside, self.clock.now(), node, io);
    }
}
