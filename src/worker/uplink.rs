//! Frames from the LAN, as the loop takes them.

use muslin_stack::datapath::Merging;
use muslin_stack::drops::DropReason;
use nix::errno::Errno;
use tracing::{debug, warn};

use super::message::Event;
use super::packet_loop::PacketLoop;
use crate::underlay::uplink::Failure;

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
                    self.io.batches.received.note(frames.count());
                    self.handle_frames();
                    if !more {
                        return;
                    }
                }
                Err(Failure::QueueFull | Failure::Other(Errno::EINTR)) => return,
                // Every queue reports it, and the first one informs the others.
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

    /// Passes what was received to the data path and does what it says.
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
        let lost = frames.lost();
        path.node_mut()
            .count_drops(DropReason::UnderlayOverflow, lost);
        let merging = match io.any_takes_superpackets() {
            true => Merging::On,
            false => Merging::Off,
        };
        path.from_uplink_batch(now, frames.frames(), merging, sockets, |verdict, packet| {
            io.batches.merged += u64::from(!packet.is_single());
            io.send(verdict, packet);
        });
        self.send_own(now);
    }
}
