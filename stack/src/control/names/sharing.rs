//! The rules by which nodes tell each other their names and those of their pods, by keys beside
//! flannel's, as a state machine like [`crate::control::lease::Manager`].
//!
//! A node writes one record under the subnet of its lease, again whenever its pods change, and also
//! when it stops and keeps its lease. The record ends with its time to live, if it is not renewed as
//! a lease is. What others have written stays known while the store is away, and what has ended meanwhile is
//! gone after that.
//!
//! The caller asks [`Sharer::poll`] what to do, does it, gives what comes of it to
//! [`Sharer::answer`] or [`Sharer::failed`], and drains [`Sharer::changes`].

use std::collections::{BTreeSet, VecDeque};

use smoltcp::time::{Duration, Instant};

use super::record::{
    InvalidNodeRecord, NodeRecord, PodRecord, named_subnet, names_key, names_prefix,
};
use crate::addresses::Nets;
use crate::control::ipam::PodName;
use crate::control::kv::{Action, Answer, Entry, Op, Revision, WatchEvent};
use crate::control::lease::{LEASE_TTL, SubnetKey};

/// How long a change waits for others, which are then written with it.
const COALESCE: Duration = Duration::from_millis(200);
/// The shortest time between two writes.
const PAUSE: Duration = Duration::from_secs(1);
/// When a record is written again that has not changed.
const RENEWAL: Duration = Duration::from_secs(LEASE_TTL.as_secs() / 2);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// How long a store is left alone that does not let this node do it.
const FORBIDDEN: Duration = Duration::from_secs(60);
/// A watch that lived for longer was no failure.
const LONG_WATCH: Duration = Duration::from_secs(10);

/// The node that shares, and its names.
#[derive(Debug, Clone)]
pub struct SharerSettings {
    /// Where the store has flannel's keys, without a trailing slash.
    pub prefix: String,
    /// All pods of the cluster.
    pub network: Nets,
    /// The node's name.
    pub node: PodName,
    /// Its lease.
    pub subnet: SubnetKey,
}

/// Why something failed that may work later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The store is unreachable, too busy, or its watch has a gap.
    Away,
    /// It does not let this node do it.
    Forbidden,
}

/// What has changed of other nodes' names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NameChange {
    /// A node has these pods now.
    Set(NodeRecord),
    /// The node that has this lease has no record any more.
    Removed(SubnetKey),
    /// A key counts for nothing.
    Skipped(String, InvalidNodeRecord),
}

/// How a node ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It gives its lease back.
    Leave,
    /// It keeps its lease for its return.
    Stop,
}

#[derive(Debug)]
enum Phase {
    /// All records are to be read, not before this.
    Unread(Instant),
    /// They are being read.
    Listing,
    /// What changes is followed, from a revision on, since this time.
    Following(Watching),
    /// The same, while our record is being written, to this.
    Writing(Watching, Option<String>),
    Over,
}

#[derive(Debug, Clone, Copy)]
struct Watching {
    from: Revision,
    since: Instant,
    /// Whether the watch has ended.
    is_over: bool,
}

/// A node that shares the names of its pods.
#[derive(Debug)]
pub struct Sharer {
    settings: SharerSettings,
    key: String,
    phase: Phase,
    pods: Vec<PodRecord>,
    /// What our key is to have; nothing if there is to be none.
    wanted: Option<String>,
    /// What it has, as far as is known.
    stored: Option<(Revision, String)>,
    /// The last change of our key that is known.
    seen: Revision,
    /// The nodes of whose pods the caller knows.
    recorded: BTreeSet<SubnetKey>,
    /// Our key is not written before this.
    write_at: Instant,
    renew_at: Instant,
    /// Writes that failed in a row.
    failed_writes: u32,
    /// Times in a row that all had to be read again soon.
    failed_watches: u32,
    /// How the node ends, if it does.
    end: Option<End>,
    changes: VecDeque<NameChange>,
}

impl Sharer {
    /// A node that has no pods yet and knows of no others.
    #[must_use]
    pub fn new(settings: SharerSettings, now: Instant) -> Self {
        let mut sharer = Self {
            key: names_key(&settings.prefix, settings.subnet),
            settings,
            phase: Phase::Unread(now),
            pods: Vec::new(),
            wanted: None,
            stored: None,
            seen: 0,
            recorded: BTreeSet::new(),
            write_at: now,
            renew_at: now,
            failed_writes: 0,
            failed_watches: 0,
            end: None,
            changes: VecDeque::new(),
        };
        sharer.want_record();
        sharer
    }

    /// What is to be watched: all keys that begin so.
    #[must_use]
    pub fn prefix(&self) -> String {
        names_prefix(&self.settings.prefix)
    }

    /// What has changed since the last call.
    pub fn changes(&mut self) -> impl Iterator<Item = NameChange> + '_ {
        self.changes.drain(..)
    }

    /// The node has these pods from now on. Returns how many of them others will not know, because
    /// there are too many.
    pub fn set_pods(&mut self, now: Instant, pods: Vec<PodRecord>) -> usize {
        if self.end.is_some() {
            return 0;
        }
        self.write_at = self.write_at.max(now + COALESCE);
        self.pods = pods;
        self.want_record()
    }

    /// Has our key say what there is to say. Returns how many pods are left out.
    fn want_record(&mut self) -> usize {
        let record = NodeRecord {
            node: self.settings.node.clone(),
            subnet: self.settings.subnet.nets(),
            pods: self.pods.clone(),
            stopped: self.end == Some(End::Stop),
        };
        let (json, left_out) = record.to_json();
        self.wanted = Some(json);
        left_out
    }

    /// The node gives its lease back, and its record with it.
    pub fn leave(&mut self, now: Instant) {
        self.wanted = None;
        self.begin_to(now, End::Leave);
    }

    /// The node stops, and keeps its lease for its return. Its pods, which wait for that, keep their
    /// names.
    pub fn stop(&mut self, now: Instant) {
        self.begin_to(now, End::Stop);
        self.want_record();
    }

    fn begin_to(&mut self, now: Instant, end: End) {
        self.end = Some(end);
        self.write_at = now;
        if let Phase::Unread(at) = &mut self.phase {
            *at = now;
        }
    }

    /// What to do next. A watch may stay open while our record is written, but not during a list.
    pub fn poll(&mut self, now: Instant) -> Action {
        match &self.phase {
            Phase::Unread(at) if now < *at => Action::Wait { until: *at },
            Phase::Unread(_) => {
                self.phase = Phase::Listing;
                Action::Store(Op::List(self.prefix()))
            }
            Phase::Following(_) if self.end.is_some() && self.is_written() => {
                self.phase = Phase::Over;
                Action::Stop
            }
            Phase::Following(watching) => {
                let (watching, due) = (*watching, self.due());
                if let Some(due) = due.filter(|due| *due > now) {
                    return Action::Watch {
                        from: watching.from,
                        until: due,
                    };
                }
                let op = due.and_then(|_| self.operation());
                let Some(op) = op else {
                    return Action::Watch {
                        from: watching.from,
                        until: now + RENEWAL,
                    };
                };
                self.phase = Phase::Writing(watching, self.wanted.clone());
                Action::Store(op)
            }
            // Nothing is to be asked before there is an answer.
            Phase::Listing | Phase::Writing(..) => Action::Wait { until: now + PAUSE },
            Phase::Over => Action::Stop,
        }
    }

    /// Whether our key has what it is to have.
    fn is_written(&self) -> bool {
        self.stored.as_ref().map(|(_, value)| value) == self.wanted.as_ref()
    }

    /// When our record is to be written, if it is.
    fn due(&self) -> Option<Instant> {
        if !self.is_written() {
            Some(self.write_at)
        } else if self.wanted.is_some() {
            Some(self.renew_at.max(self.write_at))
        } else {
            None
        }
    }

    /// What makes our key what it is to be.
    fn operation(&self) -> Option<Op> {
        let (key, ttl) = (self.key.clone(), Some(LEASE_TTL));
        match (&self.stored, self.wanted.clone()) {
            (None, Some(value)) => Some(Op::Create { key, value, ttl }),
            (Some((expected, _)), Some(value)) => Some(Op::CompareAndPut {
                key,
                value,
                expected: *expected,
                ttl,
            }),
            (Some((expected, _)), None) => Some(Op::CompareAndDelete {
                key,
                expected: *expected,
            }),
            (None, None) => None,
        }
    }

    /// The store has done the operation of [`Self::poll`].
    pub fn answer(&mut self, now: Instant, answer: Answer) {
        match (std::mem::replace(&mut self.phase, Phase::Over), answer) {
            (Phase::Listing, Answer::Snapshot { revision, entries }) => {
                self.read(revision, entries);
                self.phase = Phase::Following(Watching {
                    from: revision.saturating_add(1),
                    since: now,
                    is_over: false,
                });
            }
            (Phase::Writing(watching, value), Answer::Done(revision)) => {
                // Somebody may have written it since.
                if revision >= self.seen {
                    self.seen = revision;
                    self.stored = value.map(|value| (revision, value));
                }
                self.write_at = now + PAUSE;
                self.renew_at = now + RENEWAL;
                self.failed_writes = 0;
                self.go_on(now, watching);
            }
            // Others have written our key, or an answer was lost: what it has now a list tells.
            (Phase::Listing | Phase::Writing(..), _) => {
                self.write_at = now + PAUSE;
                self.read_again(now, Trouble::Away);
            }
            (other, _) => self.phase = other,
        }
    }

    /// What [`Self::poll`] asked for has failed; it may have been done.
    pub fn failed(&mut self, now: Instant, trouble: Trouble) {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            // The record, if there is one, ends by itself.
            Phase::Listing | Phase::Writing(..)
                if self.end.is_some() && trouble == Trouble::Forbidden => {}
            Phase::Listing => self.read_again(now, trouble),
            Phase::Writing(watching, _) => {
                self.failed_writes += 1;
                self.write_at = now + delay(self.failed_writes, trouble);
                self.go_on(now, watching);
            }
            other => self.phase = other,
        }
    }

    fn go_on(&mut self, now: Instant, watching: Watching) {
        self.phase = Phase::Following(watching);
        if watching.is_over {
            self.watch_ended(now, Trouble::Away);
        }
    }

    /// The watch has ended, or could not be opened.
    pub fn watch_ended(&mut self, now: Instant, trouble: Trouble) {
        match &mut self.phase {
            Phase::Following(_) if self.end.is_some() && trouble == Trouble::Forbidden => {
                self.phase = Phase::Over;
            }
            Phase::Following(watching) => {
                if now > watching.since + LONG_WATCH {
                    self.failed_watches = 0;
                }
                self.read_again(now, trouble);
            }
            Phase::Writing(watching, _) => watching.is_over = true,
            Phase::Unread(_) | Phase::Listing | Phase::Over => {}
        }
    }

    fn read_again(&mut self, now: Instant, trouble: Trouble) {
        self.failed_watches += 1;
        self.phase = Phase::Unread(now + delay(self.failed_watches, trouble));
    }

    /// Takes all records that there are.
    fn read(&mut self, revision: Revision, entries: Vec<Entry>) {
        self.forget_unlisted(&entries);
        self.stored = None;
        self.seen = revision;
        for entry in entries {
            if entry.key == self.key {
                self.stored = Some((entry.revision, entry.value));
            } else {
                self.note(&entry);
            }
        }
    }

    /// Forgets the records of other nodes that a list has no more.
    fn forget_unlisted(&mut self, entries: &[Entry]) {
        let prefix = &self.settings.prefix;
        let listed = entries.iter();
        let listed: BTreeSet<_> = listed
            .filter_map(|it| named_subnet(prefix, &it.key))
            .collect();
        let gone: Vec<_> = self.recorded.difference(&listed).copied().collect();
        gone.into_iter().for_each(|subnet| self.forget(subnet));
    }

    /// Something has changed in the store.
    pub fn event(&mut self, event: WatchEvent) {
        if !matches!(self.phase, Phase::Following(_) | Phase::Writing(..)) {
            // The list that follows tells it.
            return;
        }
        let (key, revision) = match &event {
            WatchEvent::Put(entry) => (&entry.key, entry.revision),
            WatchEvent::Delete { key, revision } => (key, *revision),
        };
        if *key != self.key {
            match &event {
                WatchEvent::Put(entry) => self.note(entry),
                WatchEvent::Delete { key, .. } => {
                    if let Some(subnet) = named_subnet(&self.settings.prefix, key) {
                        self.forget(subnet);
                    }
                }
            }
        } else if revision > self.seen {
            // What this node has written it knows already.
            self.seen = revision;
            self.stored = match event {
                WatchEvent::Put(entry) => Some((revision, entry.value)),
                WatchEvent::Delete { .. } => None,
            };
        }
    }

    /// Takes another node's record.
    fn note(&mut self, entry: &Entry) {
        let subnet = named_subnet(&self.settings.prefix, &entry.key);
        // Pods of other networks are irrelevant here.
        if subnet.is_some_and(|subnet| !self.settings.network.contains(subnet.nets())) {
            return;
        }
        match NodeRecord::read(&self.settings.prefix, entry) {
            Ok(record) => {
                self.recorded.extend(subnet);
                self.changes.push_back(NameChange::Set(record));
            }
            Err(error) => {
                let skipped = NameChange::Skipped(entry.key.clone(), error);
                self.changes.push_back(skipped);
                if let Some(subnet) = subnet {
                    self.forget(subnet);
                }
            }
        }
    }

    fn forget(&mut self, subnet: SubnetKey) {
        if self.recorded.remove(&subnet) {
            self.changes.push_back(NameChange::Removed(subnet));
        }
    }
}

/// How long to wait after so many failures in a row.
fn delay(failures: u32, trouble: Trouble) -> Duration {
    match trouble {
        Trouble::Away => (FIRST_RETRY * (1 << failures.min(10))).min(LAST_RETRY),
        Trouble::Forbidden => FORBIDDEN,
    }
}

#[cfg(test)]
mod tests;
