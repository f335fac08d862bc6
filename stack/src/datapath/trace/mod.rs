//! Tracing: what the data path would do with a packet, and why, without doing it.
//!
//! [`Datapath::trace`] gives a packet to a copy of the node, so that the answer is that of the code
//! that forwards packets, and nothing is counted, learned or sent.

mod probe;
mod step;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::offload::virtio::Header;
pub use probe::{Mark, Probe, ProbeError, Protocol};
use smoltcp::time::Instant;
pub use step::{Holding, Known, Switched, TraceStep};

use super::Datapath;
use super::filter::Filter;
use super::node::Node;
use super::observe::{Observed, Observer, Source};
use super::verdict::Verdict;
use crate::drops::DropReason;

/// Packets of the node's own that a trace shows.
const OWN: usize = 16;

/// Where a packet that is to be traced comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entrance {
    /// At a port, as an Ethernet frame.
    Port(super::port::PortId),
    /// As what a datagram of the tunnel carries, from this address.
    Underlay(SocketAddr),
    /// By the uplink, as an Ethernet frame.
    Uplink,
    /// By the host interface, as an IP packet.
    Host,
    /// From egress, as an IP packet for a pod.
    Egress,
}

/// What would become of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// How the data path would come to its verdict.
    pub steps: Vec<TraceStep>,
    /// The verdict. [`Verdict::Egress`] means that egress would take the packet; if it would not, the
    /// verdict is its reason.
    pub verdict: Verdict,
    /// The packet as it would go on.
    pub packet: Vec<u8>,
    /// Packets of the node's own that it would send because of it, as ARP requests and ICMP errors are,
    /// and packets into which it would be cut: the first 16.
    pub own: Vec<(Verdict, Vec<u8>)>,
    /// How many more it would send.
    pub more_own: usize,
}

/// Notes the steps of one packet.
#[derive(Debug, Default)]
struct Notes {
    steps: Vec<TraceStep>,
    /// How many packets of the node's own it is about at the moment, one because of the other.
    aside: usize,
}

impl Observer for Notes {
    const STEPS: bool = true;

    fn at(&mut self, _: Instant) {}

    fn enters(&mut self, _: Source, _: &(impl Observed + ?Sized)) {}

    fn leaves(&mut self, _: Source, _: Verdict, _: &(impl Observed + ?Sized)) {}

    fn refused(&mut self, _: Source, _: DropReason) {}

    fn lost(&mut self, _: DropReason, _: u64) {}

    fn step(&mut self, step: TraceStep) {
        if self.aside == 0 {
            self.steps.push(step);
        }
    }

    fn aside(&mut self, begins: bool) {
        self.aside = match begins {
            true => self.aside + 1,
            false => self.aside.saturating_sub(1),
        };
    }
}

impl<O: Observer, F: Filter + Clone> Datapath<O, F> {
    /// What would become of a packet that came in now. It is given to a copy of the node: that takes as
    /// long as copying its tables.
    #[must_use]
    pub fn trace(&self, now: Instant, entrance: Entrance, packet: &[u8], offload: Header) -> Trace {
        let mut node = self.node.fork(Notes::default());
        let mut buffer = vec![0; HEADROOM + packet.len()];
        buffer[HEADROOM..].copy_from_slice(packet);
        let Ok(buf) = PacketBuf::new(&mut buffer, HEADROOM, packet.len()) else {
            return Trace {
                steps: Vec::new(),
                verdict: Verdict::Drop(DropReason::HeadroomExceeded),
                packet: packet.to_vec(),
                own: Vec::new(),
                more_own: 0,
            };
        };
        let mut buf = buf.with_offload(offload);
        let mut verdict = match entrance {
            Entrance::Port(port) => node.from_port(now, port, &mut buf),
            Entrance::Underlay(source) => node.from_underlay(now, source, &mut buf),
            Entrance::Uplink => node.from_uplink(now, &mut buf),
            Entrance::Host => node.from_host(now, &mut buf),
            Entrance::Egress => node.from_egress(now, &mut buf),
        };
        let mut steps = node.observer().steps.clone();
        if verdict == Verdict::Egress
            && let Err(reason) = self.egress.foresee(now, &buf, &mut |step| steps.push(step))
        {
            verdict = Verdict::Drop(reason);
        }
        let (own, more_own) = own_packets(&mut node);
        Trace {
            steps,
            verdict,
            packet: buf.as_slice().to_vec(),
            own,
            more_own,
        }
    }
}

/// What a node has to send of its own: the first packets, and how many more there are.
fn own_packets<O: Observer, F: Filter>(node: &mut Node<O, F>) -> (Vec<(Verdict, Vec<u8>)>, usize) {
    let mut room = vec![0; super::ROOM];
    let (mut own, mut more) = (Vec::new(), 0);
    while let Ok(mut packet) = PacketBuf::new(&mut room, HEADROOM, 0)
        && let Some(verdict) = node.poll_output(&mut packet)
    {
        match own.len() < OWN {
            true => own.push((verdict, packet.as_slice().to_vec())),
            false => more += 1,
        }
    }
    (own, more)
}
