//! A node's workers: which of them takes a packet, and their messages to each other.

use muslin_encap::tunnel::Format;
use smoltcp::time::Duration;
use smoltcp::wire::{IpProtocol, Ipv4Packet};

use super::Cluster;
use crate::datapath::frame;
use crate::datapath::{SiblingMessage, Siblings};
use crate::sim::due::{Due, Who};
use crate::sim::outcome::Violation;

/// How long a message is on its way from one worker to another.
const DELAY: Duration = Duration::from_micros(30);
/// Packets of a thousand that come by another queue than others of their flow, as those do whose flow
/// the kernel has forgotten.
const STRAYS: u16 = 60;

impl Cluster {
    /// The worker whose queue a frame of a pod or the uplink comes by.
    pub(super) fn worker_of_frame(&mut self, who: Who, bytes: &[u8]) -> usize {
        self.worker_of(who, bytes.get(frame::HEADER_LEN..).unwrap_or_default())
    }

    /// The worker whose queue a datagram of the tunnel comes by.
    pub(super) fn worker_of_datagram(&mut self, who: Who, bytes: &[u8]) -> usize {
        let running = self.machines[who.machine].running(who);
        let format = running.and_then(|running| running.node().format());
        let network = format.map_or(0, Format::received_network_offset);
        self.worker_of(who, bytes.get(network..).unwrap_or_default())
    }

    /// The queue that the kernel chooses for a packet: by the flow, and for fragments by their
    /// addresses. Of datagrams it may choose another one.
    fn worker_of(&mut self, who: Who, packet: &[u8]) -> usize {
        let count = self.workers(who);
        if count < 2 {
            return 0;
        }
        if packet.first().is_some_and(|first| first >> 4 == 6) {
            return self.worker_of_v6(count, packet);
        }
        let view = Ipv4Packet::new_checked(packet);
        let is_fragment = view
            .as_ref()
            .is_ok_and(|view| view.more_frags() || view.frag_offset() > 0);
        let is_stream = view.is_ok_and(|view| view.next_header() == IpProtocol::Tcp);
        if !is_fragment && !is_stream && self.random.chance(STRAYS) {
            return self.random.index(count);
        }
        // Addresses, and ports behind a header without options.
        let len = if is_fragment { 8 } else { 12 };
        let ends = packet.iter().skip(12).take(len);
        ends.map(|byte| usize::from(*byte)).sum::<usize>() % count
    }

    fn worker_of_v6(&mut self, count: usize, packet: &[u8]) -> usize {
        let next = packet.get(6).copied().map(IpProtocol::from);
        if next != Some(IpProtocol::Tcp) && self.random.chance(STRAYS) {
            return self.random.index(count);
        }
        let has_ports = matches!(next, Some(IpProtocol::Tcp | IpProtocol::Udp));
        let ends = packet.iter().skip(8).take(if has_ports { 36 } else { 32 });
        ends.map(|byte| usize::from(*byte)).sum::<usize>() % count
    }

    /// A worker sends others a message.
    pub(super) fn tell_workers(
        &mut self,
        (who, from): (Who, usize),
        to: Siblings,
        message: &SiblingMessage,
    ) -> Result<(), Violation> {
        let at = self.queue.now() + DELAY;
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        let count = running.workers.len();
        let receivers = match to {
            Siblings::All => (0..count).filter(|it| *it != from).collect(),
            Siblings::One(worker) => vec![usize::from(worker)],
            Siblings::Predecessor => {
                return Err(Violation(format!(
                    "worker {from} of machine {} tells a predecessor, which it does not have",
                    who.machine
                )));
            }
        };
        running.workers[from].handed_over += u64::from(matches!(message, SiblingMessage::Stray(_)));
        for worker in receivers {
            if worker >= count || worker == from {
                return Err(Violation(format!(
                    "worker {from} of machine {} tells worker {worker}",
                    who.machine
                )));
            }
            self.queue
                .schedule(at, Due::Message(who, worker, message.clone()));
        }
        Ok(())
    }

    /// A worker receives another's message.
    pub(super) fn take_message(
        &mut self,
        who: Who,
        worker: usize,
        message: SiblingMessage,
    ) -> Result<(), Violation> {
        self.call((who, worker), |path, now, sockets| {
            path.from_sibling(now, message, sockets);
        });
        self.settle(who)
    }
}
