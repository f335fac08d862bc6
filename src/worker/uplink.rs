//! Frames from the LAN, as the loop takes them.

use muslin_encap::buffer::PacketBuf;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::merge::{self, Merged, Merger};
use muslin_encap::offload::virtio::{Checksum, Header};
use muslin_stack::datapath::frame;
use muslin_stack::drops::DropReason;
use nix::errno::Errno;
use tracing::{debug, warn};

use super::Event;
use super::packet_loop::PacketLoop;
use crate::underlay::uplink::Failure;

type LinkHeader = [u8; frame::HEADER_LEN];

impl PacketLoop {
    pub(super) fn read_uplink(&mut self, queue: usize) {
        if let Some(turn) = self.uplink_turns.get_mut(queue) {
            turn.begin();
        }
        while let (Some(turn), Some(uplink), Some(frames)) = (
            self.uplink_turns.get_mut(queue),
            &self.io.underlay.uplink,
            &mut self.frames,
        ) && turn.goes_on()
        {
            match uplink
                .receive(queue, frames)
                .map_err(|error| Failure::from(&error))
            {
                Ok(more) => {
                    turn.take(frames.work());
                    self.handle_frames();
                    if !more {
                        return;
                    }
                }
                Err(Failure::QueueFull | Failure::Other(Errno::EINTR)) => return,
                // Every queue is told, and the first tells others.
                Err(_) if queue > 0 => return,
                // Told once each time the interface goes down; it may come up again.
                Err(Failure::Down) => return warn!("the uplink's interface is down"),
                Err(error) => {
                    debug!("the uplink is gone: {error}");
                    for queue in uplink.queues() {
                        let _ = self.epoll.delete(queue);
                    }
                    let _ = self.events.send(Event::UplinkGone);
                    return;
                }
            }
        }
    }

    /// Joins what the kernel has not joined to superpackets, passes those to the node and does what
    /// it says.
    fn handle_frames(&mut self) {
        let now = self.clock.now();
        let Self {
            path,
            sockets,
            io,
            frames: Some(frames),
            ..
        } = self
        else {
            return;
        };
        let node = path.node_mut();
        node.count_drops(DropReason::UnderlayOverflow, frames.lost());
        let settings = merge::Settings {
            mtu: node.uplink().map_or(Mtu::ETHERNET, |uplink| uplink.mtu),
            udp: true,
        };
        let merges = io.any_takes_superpackets();
        let mut refused = 0;
        let mut deliver = |merged: Merged<'_, '_, LinkHeader>| {
            let (offload, tail) = (merged.virtio, merged.tail);
            let rest = tail.iter().map(|piece| piece.len()).sum();
            let len = merged.head.len();
            let Ok(packet) = PacketBuf::new(merged.head, 0, len) else {
                return;
            };
            let mut packet = packet.with_offload(offload).with_tail(rest);
            let verdict = path.from_uplink(now, &mut packet, tail, sockets);
            io.send(verdict, &mut packet, tail);
        };
        let mut merger = Merger::new(settings);
        for (header, frame) in frames.frames() {
            let Ok(virtio) = Header::parse(&header) else {
                refused += 1;
                continue;
            };
            // Frames of two hosts never become one.
            let key = frame.first_chunk().copied().unwrap_or_default();
            let is_plain =
                virtio.gso.is_none() && !matches!(virtio.checksum, Checksum::Partial { .. });
            if merges && is_plain {
                merger.push(frame, frame::HEADER_LEN, key, &mut deliver);
            } else {
                // The kernel has joined it already, and it stays behind what came before it.
                merger.flush(&mut deliver);
                deliver(Merged {
                    key,
                    virtio,
                    head: frame,
                    tail: &[],
                });
            }
        }
        merger.flush(&mut deliver);
        for _ in 0..refused {
            self.path.node_mut().refuse_uplink_frame();
        }
        self.send_own(now);
    }
}
