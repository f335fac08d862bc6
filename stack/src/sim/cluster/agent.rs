//! The way between a node's lease rules and the store: what the loop around them does in a real
//! node (`src/lease/drive.rs`), in virtual time.
//!
//! Between the two are requests that are lost, answers that are lost after the store has done the
//! work, a store that is down or out of reach, and watches that fall silent.

use smoltcp::time::Duration;

use super::Cluster;
use crate::control::lease::{Action, Answer, Entry, Op, Revision, WatchEvent};
use crate::control::names::names_prefix;
use crate::sim::agent::{Doing, Watch};
use crate::sim::constants::PREFIX;
use crate::sim::due::{Due, Who};
use crate::sim::outcome::Violation;
use crate::sim::store::Gap;

/// How long a request may take, as with etcd.
const PATIENCE: Duration = Duration::from_secs(3);
/// When a client has noticed that a silent connection is dead: it asks every 10 s.
const KEEP_ALIVE: Duration = Duration::from_secs(13);
/// How long the store may take to give a lease back.
const FAREWELL: Duration = Duration::from_secs(5);
/// Rounds in which the lease rules may ask for something without time passing.
const MAX_ROUNDS: u32 = 64;

impl Cluster {
    /// Does what the lease rules ask for, until they have to wait.
    pub(super) fn drive(&mut self, who: Who) -> Result<(), Violation> {
        let now = self.queue.now();
        for _ in 0..MAX_ROUNDS {
            let Some(process) = self.machines[who.machine].process(who) else {
                return Ok(());
            };
            let agent = &mut process.agent;
            if agent.doing != Doing::Idle {
                return Ok(());
            }
            let action = agent.manager.poll(now);
            let changes: Vec<_> = agent.manager.changes().collect();
            for change in changes {
                if self.take_change(who, change)?.is_break() {
                    return Ok(());
                }
            }
            let Some(process) = self.machines[who.machine].process(who) else {
                return Ok(());
            };
            let agent = &mut process.agent;
            match action {
                Action::Store(op) => return self.ask(who, op),
                Action::Watch { from, .. } if agent.watch.is_none() => {
                    return self.ask_to_watch(who, from);
                }
                Action::Watch { until, .. } | Action::Wait { until } if until > now => {
                    if agent.timer.arm(until) {
                        self.queue.schedule(until, Due::Agent(who));
                    }
                    return Ok(());
                }
                Action::Watch { .. } | Action::Wait { .. } => {}
                Action::Stop => {
                    self.end_for_now(who, "has stopped");
                    return Ok(());
                }
            }
        }
        Err(Violation(format!(
            "the lease rules of machine {} spin",
            who.machine
        )))
    }

    fn ask(&mut self, who: Who, op: Op) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(process) = self.machines[who.machine].process(who) else {
            return Ok(());
        };
        let agent = &mut process.agent;
        if matches!(op, Op::List(_)) {
            agent.watch = None;
        }
        let id = agent.count_request(now)?;
        agent.doing = Doing::Asking(id);
        self.log.note(now, || {
            format!("machine {} asks: {}", who.machine, name(&op))
        });
        self.figures.requests += 1;
        self.queue.schedule(now + PATIENCE, Due::Patience(who, id));
        self.send_request(Due::Request(who, id, op));
        Ok(())
    }

    fn ask_to_watch(&mut self, who: Who, from: Revision) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(process) = self.machines[who.machine].process(who) else {
            return Ok(());
        };
        let id = process.agent.count_request(now)?;
        process.agent.doing = Doing::Opening(id);
        let machine = who.machine;
        self.log.note(now, || {
            format!("machine {machine} watches from revision {from}")
        });
        self.figures.requests += 1;
        self.queue.schedule(now + PATIENCE, Due::Patience(who, id));
        self.send_request(Due::Open(who, id, from));
        Ok(())
    }

    fn send_request(&mut self, request: Due) {
        let weather = &mut self.store_weather;
        let at = self.queue.now() + weather.delay();
        if !weather.random.chance(weather.loss / 2) {
            self.queue.schedule(at, request);
        }
    }

    fn send_answer(&mut self, who: Who, answer: Due) {
        let weather = &mut self.store_weather;
        let at = self.queue.now() + weather.delay();
        let is_lost = weather.random.chance(weather.loss.div_ceil(2));
        if !is_lost && self.reaches_store(who.machine) {
            self.queue.schedule(at, answer);
        }
    }

    /// Whether packets get from a machine to the store and back.
    pub(super) fn reaches_store(&self, machine: usize) -> bool {
        !self.store_weather.cut.contains(&machine) && !self.underlay.other_side.contains(&machine)
    }

    /// A request has arrived at the store.
    pub(super) fn serve(&mut self, who: Who, id: u64, op: Op) -> Result<(), Violation> {
        if !self.reaches_store(who.machine) {
            return Ok(());
        }
        let now = self.queue.now();
        let answer = if self.store_weather.is_down {
            None
        } else {
            let answer = self.store.execute(now, Some(who.machine), op);
            self.log.note(now, || {
                format!(
                    "the store answers machine {}: {}",
                    who.machine,
                    outcome(&answer)
                )
            });
            self.store_changed()?;
            Some(answer)
        };
        self.send_answer(who, Due::Answer(who, id, answer));
        Ok(())
    }

    /// A request for a watch has arrived at the store.
    pub(super) fn serve_watch(&mut self, who: Who, id: u64, from: Revision) {
        if self.reaches_store(who.machine) {
            let opened = match self.store_weather.is_down {
                true => None,
                false => Some(self.store.can_watch(from).map(|()| from)),
            };
            self.send_answer(who, Due::Opened(who, id, opened));
        }
    }

    /// The store's answer has come, or an error in place of it.
    pub(super) fn take_answer(
        &mut self,
        who: Who,
        id: u64,
        answer: Option<Answer>,
    ) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(process) = self.machines[who.machine].process(who) else {
            return Ok(());
        };
        let agent = &mut process.agent;
        if agent.doing != Doing::Asking(id) {
            return Ok(());
        }
        agent.doing = Doing::Idle;
        match answer {
            Some(answer) => agent.manager.answer(now, answer),
            None => agent.manager.failed(now),
        }
        self.drive(who)
    }

    pub(super) fn take_watch(
        &mut self,
        who: Who,
        id: u64,
        opened: Option<Result<Revision, Gap>>,
    ) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(process) = self.machines[who.machine].process(who) else {
            return Ok(());
        };
        let agent = &mut process.agent;
        if agent.doing != Doing::Opening(id) {
            return Ok(());
        }
        agent.doing = Doing::Idle;
        match opened {
            Some(Ok(from)) => {
                agent.watch = Some(Watch {
                    number: id,
                    next: from,
                    is_woken: false,
                });
                self.wake_watch(who);
            }
            Some(Err(Gap)) | None => {
                self.log.note(now, || {
                    format!("machine {} has no watch: {opened:?}", who.machine)
                });
                agent.manager.watch_ended(now);
            }
        }
        self.drive(who)
    }

    /// Nothing has come for too long.
    pub(super) fn lose_patience(&mut self, who: Who, id: u64) -> Result<(), Violation> {
        let Some(process) = self.machines[who.machine].process(who) else {
            return Ok(());
        };
        match process.agent.doing {
            Doing::Asking(asked) if asked == id => self.take_answer(who, id, None),
            Doing::Opening(asked) if asked == id => self.take_watch(who, id, None),
            _ => Ok(()),
        }
    }

    /// Lets a watch be told of changes, after a while.
    fn wake_watch(&mut self, who: Who) {
        let Some(process) = self.machines[who.machine].process(who) else {
            return;
        };
        if let Some(watch) = process.agent.watch.as_mut().filter(|watch| !watch.is_woken) {
            watch.is_woken = true;
            let number = watch.number;
            let at = self.queue.now() + self.store_weather.delay();
            self.queue.schedule(at, Due::Watch(who, number));
        }
    }

    /// Something was written: all watches report it.
    pub(super) fn wake_watches(&mut self) {
        for machine in 0..self.machines.len() {
            if let Some(who) = self.who(machine) {
                self.wake_watch(who);
            }
        }
    }

    /// Tells a watch what it has not seen yet.
    pub(super) fn tell_watch(&mut self, who: Who, number: u64) -> Result<(), Violation> {
        let now = self.queue.now();
        let is_reachable = self.reaches_store(who.machine) && !self.store_weather.is_down;
        let Some(process) = self.machines[who.machine].process(who) else {
            return Ok(());
        };
        let agent = &mut process.agent;
        let Some(watch) = agent.watch.as_mut().filter(|watch| watch.number == number) else {
            return Ok(());
        };
        watch.is_woken = false;
        if !is_reachable {
            return Ok(());
        }
        if self.store.can_watch(watch.next).is_err() {
            return self.end_watch(who);
        }
        let prefix = names_prefix(PREFIX);
        for event in self.store.since(watch.next) {
            let (WatchEvent::Put(Entry { key, .. }) | WatchEvent::Delete { key, .. }) = event;
            // A watch of leases does not report names.
            if !key.starts_with(&prefix) {
                self.figures.events += 1;
                agent.manager.event(now, event.clone());
            }
        }
        watch.next = self.store.revision() + 1;
        self.drive(who)
    }

    /// A watch has ended.
    pub(super) fn end_watch(&mut self, who: Who) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(process) = self.machines[who.machine].process(who) else {
            return Ok(());
        };
        if process.agent.watch.take().is_some() {
            process.agent.manager.watch_ended(now);
        }
        self.drive(who)
    }

    /// All watches end.
    pub(super) fn end_watches(&mut self) -> Result<(), Violation> {
        self.close_flannels();
        for machine in 0..self.machines.len() {
            if let Some(who) = self.who(machine)
                && !self.is_held(who, Due::WatchEnds)
            {
                self.end_watch(who)?;
                self.end_names(who)?;
            }
        }
        Ok(())
    }

    /// Ways to the store have changed: watches that are cut off find out after a while, and those
    /// that are not are told what they have missed.
    pub(super) fn ways_changed(&mut self) {
        let now = self.queue.now();
        for machine in 0..self.machines.len() {
            let Some(who) = self.who(machine) else {
                continue;
            };
            self.wake_names_of(who);
            if self.reaches_store(machine) {
                self.wake_watch(who);
            } else if let Some(process) = self.machines[machine].process(who)
                && let Some(watch) = &process.agent.watch
            {
                let due = Due::KeepAlive(who, watch.number);
                self.queue.schedule(now + KEEP_ALIVE, due);
            }
        }
    }

    /// A client asks whether its watch is alive.
    pub(super) fn keep_alive(&mut self, who: Who, number: u64) -> Result<(), Violation> {
        let is_cut = !self.reaches_store(who.machine);
        let process = self.machines[who.machine].process(who);
        let watch = process.and_then(|process| process.agent.watch.as_ref());
        if is_cut && watch.is_some_and(|watch| watch.number == number) {
            return self.end_watch(who);
        }
        Ok(())
    }

    /// The node is to give its lease back and stop.
    pub(super) fn leave(&mut self, who: Who) -> Result<(), Violation> {
        let now = self.queue.now();
        let Some(process) = self.machines[who.machine].process(who) else {
            return Ok(());
        };
        let agent = &mut process.agent;
        if std::mem::replace(&mut agent.is_leaving, true) {
            return Ok(());
        }
        agent.manager.leave();
        if matches!(agent.doing, Doing::Opening(_)) {
            agent.doing = Doing::Idle;
        }
        self.queue.schedule(now + FAREWELL, Due::Farewell(who));
        if let Some(running) = &mut process.running {
            running.names.sharer.leave(now);
        }
        self.drive_names(who)?;
        self.drive(who)
    }

    /// The node has another public address.
    pub(super) fn tell_address(&mut self, who: Who) -> Result<(), Violation> {
        let machine = &mut self.machines[who.machine];
        let public_ip = machine.public_ip;
        let Some(process) = machine.process(who) else {
            return Ok(());
        };
        process.agent.manager.set_public_ip(public_ip);
        self.drive(who)
    }
}

fn name(op: &Op) -> String {
    match op {
        Op::Get(key) => format!("get {key}"),
        Op::List(prefix) => format!("list {prefix}"),
        Op::Create { key, value, .. } => format!("create {key} = {value}"),
        Op::Claim { value, .. } => format!("{op} = {value}"),
        Op::CompareAndPut {
            key,
            value,
            expected,
            ..
        } => format!("put {key} = {value} if it is of revision {expected}"),
        Op::CompareAndDelete { key, expected } => {
            format!("delete {key} if it is of revision {expected}")
        }
    }
}

fn outcome(answer: &Answer) -> String {
    match answer {
        Answer::Value(None) => "there is no such key".to_owned(),
        Answer::Value(Some(entry)) => entry.value.clone(),
        Answer::Snapshot { revision, entries } => {
            format!("{} keys at revision {revision}", entries.len())
        }
        Answer::Done(revision) => format!("done at revision {revision}"),
        Answer::Conflict => "conflict".to_owned(),
    }
}
