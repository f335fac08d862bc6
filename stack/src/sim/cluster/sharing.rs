//! Names: how a node tells others of its pods, and hears of theirs, by the store: what the loop around
//! the rules does in a real node (`src/lease/drive.rs`), in virtual time.
//!
//! The store loses requests and answers, is away, forgets, and ends watches, as it does for leases.

use std::fmt::Write;

use smoltcp::time::Duration;

use super::Cluster;
use crate::control::lease::{Action, Entry, Op, Revision, WatchEvent};
use crate::control::names::{Trouble, names_prefix};
use crate::sim::constants::PREFIX;
use crate::sim::due::{Due, Who};
use crate::sim::outcome::Violation;
use crate::sim::sharing::node_name;

/// Rounds in which the rules may ask for something without time passing.
const MAX_ROUNDS: u32 = 64;

impl Cluster {
    /// Does what the rules about names ask for, until they have to wait.
    pub(super) fn drive_names(&mut self, who: Who) -> Result<(), Violation> {
        if !self.setup.shares_names {
            return Ok(());
        }
        let now = self.queue.now();
        for _ in 0..MAX_ROUNDS {
            let Some(running) = self.machines[who.machine].running(who) else {
                return Ok(());
            };
            let agent = &mut running.names;
            if agent.is_asking {
                return Ok(());
            }
            let action = agent.sharer.poll(now);
            agent.take_changes();
            match action {
                Action::Store(op) => {
                    agent.count_request(now)?;
                    agent.is_asking = true;
                    if matches!(op, Op::List(_)) {
                        agent.watch = None;
                    }
                    let at = now + self.name_delay();
                    self.queue.schedule(at, Due::NameRequest(who, op));
                    return Ok(());
                }
                Action::Watch { from, .. } if agent.watch.is_none() => {
                    agent.count_request(now)?;
                    self.open_names(who, from);
                }
                Action::Watch { until, .. } | Action::Wait { until } if until > now => {
                    if agent.timer.arm(until) {
                        self.queue.schedule(until, Due::Names(who));
                    }
                    return Ok(());
                }
                Action::Watch { .. } | Action::Wait { .. } => {}
                Action::Stop => return Ok(()),
            }
        }
        Err(Violation(format!(
            "the rules about names of machine {} spin",
            who.machine
        )))
    }

    pub(super) fn names_timeout(&mut self, who: Who) -> Result<(), Violation> {
        let now = self.queue.now();
        let running = self.machines[who.machine].running(who);
        match running.is_some_and(|running| running.names.timer.fires(now)) {
            true => self.drive_names(who),
            false => Ok(()),
        }
    }

    fn name_delay(&mut self) -> Duration {
        Duration::from_micros(self.name_random.between(200, 2_000))
    }

    fn open_names(&mut self, who: Who, from: Revision) {
        let now = self.queue.now();
        let is_there = self.reaches_store(who.machine) && !self.store_weather.is_down;
        let can_watch = is_there && self.store.can_watch(from).is_ok();
        let Some(running) = self.machines[who.machine].running(who) else {
            return;
        };
        match can_watch {
            true => {
                running.names.watch = Some(from);
                self.wake_names_of(who);
            }
            false => running.names.sharer.watch_ended(now, Trouble::Away),
        }
    }

    /// A request about names has arrived at the store, and its answer comes back, or one of the two is
    /// lost.
    pub(super) fn serve_names(&mut self, who: Who, op: Op) -> Result<(), Violation> {
        let now = self.queue.now();
        let loss = self.store_weather.loss;
        let arrives = self.reaches_store(who.machine)
            && !self.store_weather.is_down
            && !self.name_random.chance(loss / 2);
        let answer = match arrives {
            true => {
                let answer = self.store.execute(now, Some(who.machine), op);
                self.store_changed()?;
                (!self.name_random.chance(loss.div_ceil(2))).then_some(answer)
            }
            false => None,
        };
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        running.names.is_asking = false;
        match answer {
            Some(answer) => running.names.sharer.answer(now, answer),
            None => running.names.sharer.failed(now, Trouble::Away),
        }
        self.drive_names(who)
    }

    /// Something was written: all who watch are told of it, after a while.
    pub(super) fn wake_names(&mut self) {
        for machine in 0..self.machines.len() {
            if let Some(who) = self.who(machine) {
                self.wake_names_of(who);
            }
        }
    }

    pub(super) fn wake_names_of(&mut self, who: Who) {
        let Some(running) = self.machines[who.machine].running(who) else {
            return;
        };
        if running.names.watch.is_some() && !std::mem::replace(&mut running.names.is_woken, true) {
            let at = self.queue.now() + self.name_delay();
            self.queue.schedule(at, Due::NameWatch(who));
        }
    }

    /// Tells a watch of names what it has not seen yet. One that is cut off ends.
    pub(super) fn tell_names(&mut self, who: Who) -> Result<(), Violation> {
        let is_there = self.reaches_store(who.machine) && !self.store_weather.is_down;
        let prefix = names_prefix(PREFIX);
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        running.names.is_woken = false;
        let Some(next) = running.names.watch else {
            return Ok(());
        };
        if !is_there || self.store.can_watch(next).is_err() {
            return self.end_names(who);
        }
        for event in self.store.since(next) {
            let (WatchEvent::Put(Entry { key, .. }) | WatchEvent::Delete { key, .. }) = event;
            if key.starts_with(&prefix) {
                running.names.sharer.event(event.clone());
            }
        }
        running.names.watch = Some(self.store.revision() + 1);
        self.drive_names(who)
    }

    /// A watch of names has ended.
    pub(super) fn end_names(&mut self, who: Who) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(running) = self.machines[who.machine].running(who) else {
            return Ok(());
        };
        if running.names.watch.take().is_some() {
            running.names.sharer.watch_ended(now, Trouble::Away);
        }
        self.drive_names(who)
    }

    /// What a node does not know of the pods of another, in words.
    pub(super) fn missing_names(&self, number: usize, text: &mut String) {
        let running = |machine: usize| {
            let process = self.machines[machine].process.as_ref()?;
            process.running.as_ref()
        };
        let Some(own) = running(number).filter(|_| self.setup.shares_names) else {
            return;
        };
        for other in (0..self.machines.len()).filter(|other| *other != number) {
            let Some(theirs) = running(other) else {
                continue;
            };
            let known = own.names.names.record(theirs.key.first());
            let expected = theirs.pods.records();
            if known.is_none_or(|known| known.pods != expected || known.node != node_name(other)) {
                let _ = write!(
                    text,
                    "\n  machine {number} knows {known:?} of the pods {expected:?} of machine {other}"
                );
            }
        }
    }
}
