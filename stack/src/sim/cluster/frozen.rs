//! Machines that stand still for a while: a stopped process, a paused virtual machine, a computer that
//! sleeps. The world goes on, and what it has for them waits until they wake.

use smoltcp::time::{Duration, Instant};

use super::Cluster;
use crate::sim::due::{Due, Who};
use crate::sim::event::Event;
use crate::sim::machine::Frozen;

/// Packets that wait for a machine that stands still, as in the buffers of its sockets; others are
/// lost.
const ROOM: usize = 64;
/// How long a machine may stand still so that nobody loses patience.
const UNNOTICED: Duration = Duration::from_secs(5);

impl Cluster {
    /// Lets a machine stand still for a while.
    pub(super) fn freeze(&mut self, number: usize, seconds: u64) {
        let since = self.queue.now();
        let machine = &mut self.machines[number];
        if machine.frozen.is_none() {
            machine.frozen = Some(Frozen {
                since,
                held: Vec::new(),
                packets: 0,
            });
            let at = since + Duration::from_secs(seconds);
            self.queue.schedule(at, Due::Wake(number, since));
        }
    }

    /// A machine goes on: what it has missed happens now.
    pub(super) fn wake(&mut self, number: usize) {
        let now = self.queue.now();
        let machine = &mut self.machines[number];
        let Some(frozen) = machine.frozen.take() else {
            return;
        };
        if now > frozen.since + UNNOTICED {
            machine.slept = Some(now);
        }
        self.log.note(now, || format!("machine {number} wakes"));
        self.disturbed = now;
        for due in frozen.held {
            self.queue.schedule(now, due);
        }
    }

    /// Wakes a machine that has slept since then.
    pub(super) fn wake_since(&mut self, number: usize, since: Instant) {
        let frozen = &self.machines[number].frozen;
        if frozen.as_ref().is_some_and(|frozen| frozen.since == since) {
            self.wake(number);
        }
    }

    /// Who does something, or has something done to it, does not sleep.
    pub(super) fn wake_for(&mut self, event: &Event) {
        match event {
            Event::Join(machine)
            | Event::Leave(machine)
            | Event::Attach(machine)
            | Event::AttachDevice { machine, .. }
            | Event::Detach { machine, .. }
            | Event::Move(machine)
            | Event::Inherit(machine)
            | Event::Resize { machine, .. }
            | Event::NewCard(machine) => self.wake(*machine),
            Event::Swap(one, other) => {
                self.wake(*one);
                self.wake(*other);
            }
            Event::Mend => (0..self.machines.len()).for_each(|machine| self.wake(machine)),
            _ => {}
        }
    }

    /// What is due, if the machine that it is for is awake; else that waits.
    pub(super) fn unless_frozen(&mut self, due: Due) -> Option<Due> {
        let machine = match &due {
            Due::Datagram { destination, .. } => self.machine_at(destination.ip()),
            due => due.machine(),
        };
        let Some(frozen) = machine.and_then(|machine| self.machines[machine].frozen.as_mut())
        else {
            return Some(due);
        };
        if matches!(
            due,
            Due::Datagram { .. } | Due::Frame(..) | Due::FromDevice(..)
        ) {
            if frozen.packets == ROOM {
                return None;
            }
            frozen.packets += 1;
        }
        frozen.held.push(due);
        None
    }

    /// Lets something happen to a process as soon as it is awake.
    pub(super) fn is_held(&mut self, who: Who, due: impl FnOnce(Who) -> Due) -> bool {
        match &mut self.machines[who.machine].frozen {
            Some(frozen) => {
                frozen.held.push(due(who));
                true
            }
            None => false,
        }
    }

    /// Whether a machine has slept since then for so long that somebody may have lost patience.
    pub(super) fn has_slept(&self, number: usize, since: Instant) -> bool {
        let machine = &self.machines[number];
        machine.frozen.is_some() || machine.slept.is_some_and(|slept| slept >= since)
    }
}
