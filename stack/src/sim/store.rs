//! A simulated etcd: keys with revisions and leases that end, a history that watches read and that
//! is compacted, and a member that lags behind.
//!
//! It does what [`crate::control::lease::Op`] says at one moment. Everything that can go wrong on the way to
//! it and back is the cluster's business.

use std::collections::{BTreeMap, VecDeque};

use smoltcp::time::{Duration, Instant};

use crate::control::lease::{Answer, Entry, LEASE_TTL, Op, Revision, WatchEvent};

/// Changes that are kept at most: etcd's users compact by number or by hour.
const HISTORY: usize = 10_000;

/// Who wrote a key: a machine by its number, or somebody else.
pub(super) type Writer = Option<usize>;

/// A key's value.
#[derive(Debug, Clone)]
struct Stored {
    value: String,
    revision: Revision,
    created: Revision,
    expires: Option<Instant>,
    writer: Writer,
    /// Nobody has put something else in the place of what a machine wrote.
    is_machines: bool,
}

/// A record that its writer lost to another writer, or that expired.
#[derive(Debug, Clone)]
pub(super) struct Lost {
    pub(super) key: String,
    pub(super) writer: usize,
    /// Whether it has not been renewed in time.
    pub(super) expired: bool,
}

/// A record that is to end and had no end before its writer wrote it again, or the other way about.
/// What others have put in its place is none of that.
#[derive(Debug, Clone)]
pub(super) struct Retimed {
    pub(super) key: String,
    pub(super) writer: usize,
    /// Whether it ends now.
    pub(super) ends: bool,
}

/// The store.
#[derive(Debug)]
pub(super) struct Store {
    /// Whether entries say how long they live still; etcd's say only whether they end.
    tells_ttl: bool,
    entries: BTreeMap<String, Stored>,
    revision: Revision,
    /// Changes up to here are no longer in the history.
    compacted: Revision,
    history: VecDeque<WatchEvent>,
    /// What a member that lags behind answers from.
    lagging: Option<(Revision, BTreeMap<String, Stored>)>,
    /// What nobody has asked for yet with [`Self::lost`].
    lost: Vec<Lost>,
    /// What nobody has asked for yet with [`Self::retimed`].
    retimed: Vec<Retimed>,
}

/// The watch asks for changes that are not in the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gap;

impl Store {
    pub(super) fn new(tells_ttl: bool) -> Self {
        Self {
            tells_ttl,
            entries: BTreeMap::new(),
            revision: 1,
            compacted: 1,
            history: VecDeque::new(),
            lagging: None,
            lost: Vec::new(),
            retimed: Vec::new(),
        }
    }

    pub(super) fn revision(&self) -> Revision {
        self.revision
    }

    /// Executes one operation.
    pub(super) fn execute(&mut self, now: Instant, writer: Writer, op: Op) -> Answer {
        self.expire(now);
        match op {
            Op::Get(key) => {
                let (_, entries) = self.view();
                let stored = entries.get(&key);
                Answer::Value(stored.map(|stored| self.entry(now, &key, stored)))
            }
            Op::List(prefix) => {
                let (revision, entries) = self.view();
                let entries = entries
                    .range(prefix.clone()..)
                    .take_while(|(key, _)| key.starts_with(&prefix));
                Answer::Snapshot {
                    revision,
                    entries: entries
                        .map(|(key, stored)| self.entry(now, key, stored))
                        .collect(),
                }
            }
            Op::Create { key, .. } if self.entries.contains_key(&key) => Answer::Conflict,
            Op::Create { key, value, ttl } => Answer::Done(self.put(now, writer, key, value, ttl)),
            Op::Claim {
                key,
                value,
                ttl,
                prefix,
                seen,
                replaces,
            } => {
                let is_new = |key: &str| self.revision_of(key).is_some_and(|at| at > seen);
                let is_gone =
                    |(old, expected): &(String, _)| self.revision_of(old) != Some(*expected);
                if self.entries.contains_key(&key)
                    || self.keys(&prefix).any(is_new)
                    || replaces.as_ref().is_some_and(is_gone)
                {
                    return Answer::Conflict;
                }
                if let Some((old, _)) = replaces {
                    // One transaction of etcd is one revision.
                    self.remove_at(writer, &old, self.revision + 1);
                }
                Answer::Done(self.put(now, writer, key, value, ttl))
            }
            Op::CompareAndPut { key, expected, .. } | Op::CompareAndDelete { key, expected }
                if self.revision_of(&key) != Some(expected) =>
            {
                Answer::Conflict
            }
            Op::CompareAndPut {
                key, value, ttl, ..
            } => Answer::Done(self.put(now, writer, key, value, ttl)),
            Op::CompareAndDelete { key, .. } => {
                self.revision += 1;
                self.remove(writer, &key);
                Answer::Done(self.revision)
            }
        }
    }

    /// Writes a key, whatever it was.
    pub(super) fn put(
        &mut self,
        now: Instant,
        writer: Writer,
        key: String,
        value: String,
        ttl: Option<std::time::Duration>,
    ) -> Revision {
        self.revision += 1;
        let old = self.entries.get(&key);
        let is_same = old.is_some_and(|old| old.is_machines && old.value == value);
        let stored = Stored {
            is_machines: writer.is_some() || is_same,
            value,
            revision: self.revision,
            created: old.map_or(self.revision, |old| old.created),
            expires: ttl.map(|ttl| now + Duration::from_micros(ttl.as_micros() as u64)),
            writer,
        };
        let entry = self.entry(now, &key, &stored);
        let ends = stored.expires.is_some();
        let old = self.entries.insert(key.clone(), stored);
        if let (Some(writer), Some(old)) = (writer, &old)
            && old.expires.is_some() != ends
            && old.is_machines
        {
            let key = key.clone();
            self.retimed.push(Retimed { key, writer, ends });
        }
        self.note_loss(writer, &key, old);
        self.remember(WatchEvent::Put(entry));
        self.revision
    }

    /// Deletes all keys that begin with a prefix, at one revision.
    pub(super) fn delete(&mut self, prefix: &str) {
        let keys: Vec<_> = self.keys(prefix).map(str::to_owned).collect();
        self.revision += i64::from(!keys.is_empty());
        for key in keys {
            self.remove(None, &key);
        }
    }

    /// Loses everything, and starts a new history.
    pub(super) fn wipe(&mut self) {
        for (key, stored) in std::mem::take(&mut self.entries) {
            self.note_loss(None, &key, Some(stored));
        }
        self.revision = 1;
        self.compacted = 1;
        self.history.clear();
        self.lagging = None;
    }

    /// Ends what has lived long enough.
    pub(super) fn expire(&mut self, now: Instant) {
        let is_over =
            |(_, stored): &(&String, &Stored)| stored.expires.is_some_and(|end| end <= now);
        let over = self.entries.iter().filter(is_over);
        for key in over.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.revision += 1;
            let before = self.lost.len();
            self.remove(None, &key);
            for lost in self.lost.iter_mut().skip(before) {
                lost.expired = true;
            }
        }
    }

    /// When the next key ends.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        let ends = self.entries.values().filter_map(|stored| stored.expires);
        ends.min()
    }

    /// Forgets the changes that all watches could have seen.
    pub(super) fn compact(&mut self) {
        self.history.clear();
        self.compacted = self.revision;
    }

    /// Answers reads from what it has now, until it is told otherwise: as a member does that lags
    /// behind, to those who accept that (etcd's serializable reads).
    pub(super) fn lag(&mut self, lags: bool) {
        self.lagging = lags.then(|| (self.revision, self.entries.clone()));
    }

    /// Whether reads may be answered from an earlier time.
    pub(super) fn lags(&self) -> bool {
        self.lagging.is_some()
    }

    /// Whether changes from a revision on can be watched. They cannot if its history has them no
    /// more, or had begun anew.
    pub(super) fn can_watch(&self, from: Revision) -> Result<(), Gap> {
        let is_there = from > self.compacted && from <= self.revision + 1;
        if is_there { Ok(()) } else { Err(Gap) }
    }

    /// The changes from a revision on.
    pub(super) fn since(&self, from: Revision) -> impl Iterator<Item = &WatchEvent> {
        let start = self
            .history
            .partition_point(|event| revision_of(event) < from);
        self.history.range(start..)
    }

    /// All keys that begin with a prefix, with their values and writers.
    pub(super) fn entries(
        &self,
        now: Instant,
        prefix: &str,
    ) -> impl Iterator<Item = (Entry, Writer)> {
        self.keys(prefix).filter_map(move |key| {
            let stored = self.entries.get(key)?;
            Some((self.entry(now, key, stored), stored.writer))
        })
    }

    /// The records that machines lost since the last call.
    pub(super) fn lost(&mut self) -> Vec<Lost> {
        std::mem::take(&mut self.lost)
    }

    /// The records whose end machines have set or taken away since the last call.
    pub(super) fn retimed(&mut self) -> Vec<Retimed> {
        std::mem::take(&mut self.retimed)
    }

    fn keys(&self, prefix: &str) -> impl Iterator<Item = &str> {
        let keys = self.entries.range(prefix.to_owned()..);
        let keys = keys.map(|(key, _)| key.as_str());
        keys.take_while(move |key| key.starts_with(prefix))
    }

    fn view(&self) -> (Revision, &BTreeMap<String, Stored>) {
        match &self.lagging {
            Some((revision, entries)) => (*revision, entries),
            None => (self.revision, &self.entries),
        }
    }

    fn revision_of(&self, key: &str) -> Option<Revision> {
        self.entries.get(key).map(|stored| stored.revision)
    }

    fn entry(&self, now: Instant, key: &str, stored: &Stored) -> Entry {
        let left = stored.expires.map(|end| {
            let left = if end > now { end - now } else { Duration::ZERO };
            std::time::Duration::from_micros(left.total_micros())
        });
        Entry {
            key: key.to_owned(),
            value: stored.value.clone(),
            revision: stored.revision,
            created: stored.created,
            ttl: left.map(|left| if self.tells_ttl { left } else { LEASE_TTL }),
        }
    }

    fn remove(&mut self, writer: Writer, key: &str) {
        self.remove_at(writer, key, self.revision);
    }

    fn remove_at(&mut self, writer: Writer, key: &str, revision: Revision) {
        let old = self.entries.remove(key);
        self.note_loss(writer, key, old);
        let key = key.to_owned();
        self.remember(WatchEvent::Delete { key, revision });
    }

    fn note_loss(&mut self, writer: Writer, key: &str, old: Option<Stored>) {
        if let Some(old) = old
            .and_then(|old| old.writer)
            .filter(|old| Some(*old) != writer)
        {
            let key = key.to_owned();
            self.lost.push(Lost {
                key,
                writer: old,
                expired: false,
            });
        }
    }

    fn remember(&mut self, event: WatchEvent) {
        self.history.push_back(event);
        if self.history.len() > HISTORY
            && let Some(event) = self.history.pop_front()
        {
            self.compacted = revision_of(&event);
        }
    }
}

fn revision_of(event: &WatchEvent) -> Revision {
    match event {
        WatchEvent::Put(entry) => entry.revision,
        WatchEvent::Delete { revision, .. } => *revision,
    }
}
