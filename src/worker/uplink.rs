//! Frames from the LAN, as the loop takes them.

use muslin_encap::buffer::PacketBuf;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::merge::{self, Merged, Merger};
use muslin_encap::offload::virtio::{Checksum, Header};
use muslin_stack::drops::DropReason;
use muslin_stack::frame;
use muslin_stack::node::Verdict;
use nix::errno::Errno;
use tracing::{debug, warn};

use super::data_path::DataPath;
use super::{Event, egress};
use crate::underlay::uplink::Failure;

type LinkHeader = [u8; frame::HEADER_LEN];

/// Calls for frames before the others have their turn.
const RECEIVES: usize = 4;

impl DataPath {
    pub(super) fn read_uplink(&mut self) {
        for _ in 0..RECEIVES {
            let (Some(uplink), Some(frames)) = (&self.io.underlay.uplink, &mut self.frames) else {
                return;
            };
            match uplink
                .receive(frames)
                .map_err(|error| Failure::from(&error))
            {
                Ok(more) => {
                    self.handle_frames();
                    self.send_own();
                    if !more {
                        return;
                    }
                }
                Err(Failure::QueueFull | Failure::Other(Errno::EINTR)) => return,
                // Told once each time the interface goes down; it may come up again.
                Err(Failure::Down) => return warn!("the uplink's interface is down"),
                Err(error) => {
                    debug!("the uplink is gone: {error}");
                    let _ = self.epoll.delete(uplink);
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
            node,
            io,
            frames: Some(frames),
            ear,
            outside,
            ..
        } = self
        else {
            return;
        };
        node.count_drops(DropReason::UnderlayOverflow, frames.lost());
        let settings = merge::Settings {
            mtu: node.uplink().map_or(Mtu::ETHERNET, |uplink| uplink.mtu),
            udp: true,
        };
        let tells = io.underlay.uplink.as_ref().is_some_and(|it| it.is_shared());
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
            if tells && frame::is_arp(packet.as_slice()) {
                ear.pass_on(None, packet.as_slice());
            }
            let verdict = node.from_uplink(now, &mut packet);
            if verdict == Verdict::Egress {
                egress::take_packet(outside, now, &packet, tail, node, io);
            }
            io.send(node, verdict, &mut packet, tail);
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
            self.node.refuse_uplink_frame();
        }
    }
}
