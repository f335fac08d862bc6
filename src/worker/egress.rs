//! Packets for and from addresses outside the overlay, as the loop takes them.

use muslin_encap::buffer::PacketBuf;
use muslin_stack::Instant;
use muslin_stack::egress::{Config, Pods};
use muslin_stack::icmp::IcmpError;
use muslin_stack::node::Node;
use muslin_stack::port::PortId;
use nix::sys::epoll::EpollEvent;

use super::data_path::DataPath;
use super::output::Io;
use crate::egress::{Outside, event_of};

/// The way to pods: the node decides, and the devices take it.
struct ToPods<'a> {
    node: &'a mut Node,
    io: &'a mut Io,
}

impl Pods for ToPods<'_> {
    fn send(&mut self, now: Instant, packet: &mut PacketBuf<'_>) {
        let verdict = self.node.from_egress(now, packet);
        self.io.send(self.node, verdict, packet, &[]);
    }

    fn report(&mut self, now: Instant, error: IcmpError, offender: &[u8]) {
        self.node.report(now, error, offender);
    }
}

/// Gives a packet that the node handed over to egress.
pub(super) fn take_packet(
    outside: Option<&mut Outside>,
    now: Instant,
    packet: &PacketBuf<'_>,
    node: &mut Node,
    io: &mut Io,
) {
    let Some(Outside { egress, sockets }) = outside else {
        return;
    };
    let mut pods = ToPods { node, io };
    if let Err(reason) = egress.from_pod(now, packet, sockets, &mut pods) {
        node.count_drops(reason, 1);
    }
}

impl DataPath {
    /// Lets pods reach addresses outside the overlay.
    pub(super) fn open_outside(&mut self, config: Config) {
        let outside = Outside::new(config, self.clock.now(), self.epoll.clone());
        self.outside = Some(outside);
    }

    /// Takes an event of a flow's socket.
    pub(super) fn read_flow(&mut self, event: EpollEvent) {
        let now = self.clock.now();
        let Self {
            node, io, outside, ..
        } = self;
        let Some(Outside { egress, sockets }) = outside else {
            return;
        };
        let (flow, ready) = event_of(event.data(), event.events());
        egress.ready(now, flow, ready, sockets, &mut ToPods { node, io });
        self.send_own();
    }

    /// Does what is due of flows.
    pub(super) fn handle_flows(&mut self, now: Instant) {
        let Self {
            node, io, outside, ..
        } = self;
        let Some(Outside { egress, sockets }) = outside else {
            return;
        };
        if egress.poll_at().is_some_and(|due| now >= due) {
            egress.handle_timeout(now, sockets, &mut ToPods { node, io });
            self.send_own();
        }
    }

    /// Ends the flows of a port's pod.
    pub(super) fn end_flows(&mut self, port: PortId) {
        let Some(Outside { egress, sockets }) = &mut self.outside else {
            return;
        };
        let pod = self.node.ports().find(|(id, _)| *id == port);
        let addresses = pod.map(|(_, port)| port.attachment.addresses.as_slice());
        for address in addresses.unwrap_or_default() {
            if let std::net::IpAddr::V4(address) = address {
                egress.forget_pod(*address, sockets);
            }
        }
    }
}
