//! The rules of having a lease, as a state machine with one operation in flight.
//!
//! The caller asks [`Manager::poll`] what to do, does it, gives the answer to [`Manager::answer`],
//! and drains [`Manager::changes`]. Compatible with flannel, and stricter: nothing is written over
//! another owner's record, a lost race is tried again, keys that do not expire (reservations) stay
//! so, and after a gap in the watch the tables are compared by value.
//!
//! Events may arrive while an operation is in flight, and an answer may be lost after the store
//! has done what was asked. Neither is guessed about: what an answer leaves open, a list tells.
//! While a list is in flight events are ignored, and the watch begins anew after it.
//!
//! A key whose value cannot be read is no peer: what it was before ends, its subnet is not chosen,
//! and it is reported once per writing. If it is our own key, it is written again.
//!
//! Whose record is it? flannel goes by the public address alone. Here a VXLAN record with our VTEP's
//! MAC address is ours too where we had its subnet before: a node that comes back with another
//! public address moves its record and keeps its subnet. Two nodes with one state directory, each
//! alive, have the same claim then. The one that held the record writes it again, and the one that
//! had moved it gives way for good: a node that is alive keeps what its pods use, and the copy ends
//! with a message, whichever of the two came later.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use muslin_encap::vxlan::VtepMac;
use smoltcp::time::{Duration, Instant};
use thiserror::Error;

use super::config::Backend;
use super::reader::{self, NoLease};
use super::{
    Answer, ConfigError, Entry, LeaseRecord, NetworkConfig, Op, Revision, SubnetKey, WatchEvent,
    shorten,
};
use crate::hash::Seed;

/// How long a lease lives without renewal: flannel's 24 hours.
pub const LEASE_TTL: std::time::Duration = std::time::Duration::from_secs(86_400);

/// How much of a lease's time is left when it is renewed: half, so that a store can be away for
/// long.
pub const RENEW_MARGIN: std::time::Duration = std::time::Duration::from_secs(43_200);

/// The longest margin, as flannel has it: a lease lives for a minute at least before it is renewed.
const MAX_RENEW_MARGIN: std::time::Duration = std::time::Duration::from_secs(1_439 * 60);
/// How often a configuration that is missing is asked for, as flannel does.
const CONFIG_RETRY: Duration = Duration::from_secs(1);
/// Free subnets among which one is chosen, as flannel does.
const CANDIDATES: usize = 100;
/// Lost races after which the manager gives up.
const MAX_RACES: u32 = 50;
/// Conflicts that are looked into at once; the later ones wait.
const QUICK_CONFLICTS: u32 = 3;
/// How often our record is written again after others changed it, before the manager gives up.
const MAX_DISPUTES: u32 = 10;
/// After so many challenges in a row the delay before the next answer grows no more.
const MAX_CHALLENGE_DELAY: u32 = 4;
/// Disputes that are further apart than this have nothing to do with each other.
const DISPUTE_MEMORY: Duration = Duration::from_secs(600);
/// A watch that lived shorter than this is not opened again at once.
const SHORT_WATCH: Duration = Duration::from_secs(10);
/// A lease that others let run out earlier is not renewed in a loop.
const SHORTEST_RENEWAL: Duration = Duration::from_secs(1);
/// How long a peer that a wiped store has not is waited for: its node asks the store again within
/// seconds, and publishes its record.
const REPUBLISHING: Duration = Duration::from_secs(60);
/// How long a watch may take to tell of what we have written ourselves.
const TELLING: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);

/// Who a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Where its tunnel ends; one lease per address.
    pub public_ip: Ipv4Addr,
    /// Its VTEP.
    pub vtep_mac: VtepMac,
}

/// Which network configuration a node wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// The one that the store has; without one it waits until there is one.
    Any,
    /// The one that the store has, and this one is written where it has none.
    IfNone(NetworkConfig),
    /// This one: it is written where the store has none, and another one is a loss.
    Exactly(NetworkConfig),
}

/// What a manager is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who the node is.
    pub identity: Identity,
    /// Where the store has flannel's keys, without a trailing slash.
    pub prefix: String,
    /// The subnet of an earlier run.
    pub previous: Option<Ipv4Net>,
    /// The network configuration that the node wants.
    pub wish: Wish,
    /// A lease is renewed when so much of its time is left; [`RENEW_MARGIN`] by default.
    pub renew_margin: std::time::Duration,
    /// Unpredictable.
    pub random_seed: u64,
}

/// What the caller is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Execute this on the store and give the answer, or the error. A watch may stay open
    /// meanwhile, but not during a list: after that it is opened anew.
    Store(Op),
    /// Watch all leases ([`Manager::lease_prefix`]) from this revision on, until it is due to poll
    /// again. A watch that is open goes on.
    Watch {
        /// The first revision not seen yet.
        from: Revision,
        /// When to poll again at the latest.
        until: Instant,
    },
    /// Wait before the next operation.
    Wait {
        /// Until when.
        until: Instant,
    },
    /// Nothing more will happen.
    Stop,
}

/// What has changed.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// The store has no network configuration under this key, and none is proposed: it is asked
    /// again until there is one. Told once.
    NoConfig(String),
    /// The configuration is known.
    Configured(NetworkConfig),
    /// The node has this subnet.
    Acquired(SubnetKey),
    /// The lease lives on.
    Renewed,
    /// Another writer changed our record, which is written again.
    Disputed(SubnetKey),
    /// A record under our public address is taken over, as flannel does, but another VTEP wrote it:
    /// a node that was here before, or one that has the same public address.
    Replaced {
        /// The lease.
        key: SubnetKey,
        /// The MAC address of the other VTEP.
        vtep_mac: VtepMac,
    },
    /// Our record of another public address is moved to the present one, with the same subnet.
    Moved {
        /// The lease.
        key: SubnetKey,
        /// The address that it had.
        from: Ipv4Addr,
    },
    /// A peer is new or has changed.
    Peer(SubnetKey, LeaseRecord),
    /// A peer's lease has ended.
    PeerGone(SubnetKey),
    /// A key under the prefix is no usable lease; it is skipped.
    Skipped {
        /// The key.
        key: String,
        /// Why.
        reason: String,
    },
    /// The lease is given back, or stays as a reservation. Nothing follows.
    Left,
    /// There is no lease (any more), and there will not be one. Nothing follows.
    Lost(Loss),
}

/// Why a node has no lease.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Loss {
    /// The configuration cannot be used.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The store's configuration is not the one asked for.
    #[error("the store has the network {stored}, but {asked} was asked for")]
    OtherConfig {
        /// What the store has.
        stored: String,
        /// What was asked for.
        asked: String,
    },
    /// The network's backend is one whose records this node cannot write.
    #[error(
        "the network has the backend '{0}', and this node has vxlan, udp, host-gw and ipip only"
    )]
    OtherBackend(String),
    /// All subnets are leased.
    #[error("all {0} subnets of the network are leased")]
    OutOfSubnets(usize),
    /// Others were faster every time.
    #[error("other nodes took every subnet that was tried")]
    Races,
    /// Another node holds our subnet now, or one that overlaps it.
    #[error("the subnet {key} is now held by the node {holder}")]
    Taken {
        /// The lease.
        key: String,
        /// The public address of its holder.
        holder: Ipv4Addr,
    },
    /// A node with our identity is alive, and had the subnet before us.
    #[error(
        "the node {holder} is alive and has this node's VTEP MAC address {vtep_mac} and its subnet {key}: is this state directory a copy of that node's? Then start with an empty one"
    )]
    Cloned {
        /// The lease.
        key: String,
        /// The public address of the other node.
        holder: Ipv4Addr,
        /// The MAC address of both.
        vtep_mac: VtepMac,
    },
    /// Another writer changed our record again and again.
    #[error(
        "the lease {key} is rewritten by another writer again and again: does another node have the public address {public_ip}?"
    )]
    Disputed {
        /// The lease.
        key: String,
        /// Our public address.
        public_ip: Ipv4Addr,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    ReadConfig,
    WriteConfig,
    List,
    /// Create the record of a subnet believed free.
    Create(SubnetKey),
    /// Write over our own record, which does not expire if it is a reservation.
    Put(SubnetKey, Revision, bool),
    /// Delete our own record of a subnet that no longer fits, or when leaving.
    Delete(SubnetKey, Revision),
    Hold,
    Over,
}

/// The state machine.
#[derive(Debug)]
pub struct Manager {
    settings: Settings,
    config: Option<NetworkConfig>,
    phase: Phase,
    /// All leases but our own, by key.
    leases: BTreeMap<SubnetKey, LeaseRecord>,
    /// Those that the store has lost with ours, and until when they are waited for.
    missing: BTreeMap<SubnetKey, Instant>,
    /// Keys that are no usable leases.
    skipped: BTreeMap<String, Skipped>,
    own: Option<Own>,
    /// The store's revision at the last list.
    listed: Revision,
    /// The first revision not seen yet.
    watch_from: Revision,
    watch_ended: Option<Instant>,
    short_watches: u32,
    /// Lists in a row that were older than what the watch had told.
    old_lists: u32,
    /// Something happened during an operation that only a list can put in order.
    list_after: bool,
    /// When the store is looked at again that was wiped.
    list_again: Option<Instant>,
    retry: Option<Instant>,
    failures: u32,
    conflicts: u32,
    disputes: u32,
    /// How often a node with our identity took our record.
    challenges: u32,
    disputed: Option<Instant>,
    /// The public address from which our record was moved at the start.
    moved_from: Option<Ipv4Addr>,
    /// The public address before the last change at run time.
    former: Option<Ipv4Addr>,
    misses_config: bool,
    leaving: bool,
    random: u64,
    changes: VecDeque<Change>,
}

#[derive(Debug, Clone, Copy)]
struct Own {
    key: SubnetKey,
    revision: Revision,
    reservation: bool,
    renew_at: Instant,
    /// When the watch has told of it at the latest.
    told_at: Instant,
}

#[derive(Debug)]
struct Skipped {
    revision: Revision,
    /// A subnet that is not free, although nobody can be reached there.
    subnet: Option<SubnetKey>,
}

/// A record that is ours: under our public address, or ours by its VTEP.
type OwnEntry = (SubnetKey, Entry, LeaseRecord);

impl Manager {
    /// A manager that has not spoken to the store yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            random: settings.random_seed,
            settings,
            config: None,
            phase: Phase::ReadConfig,
            leases: BTreeMap::new(),
            missing: BTreeMap::new(),
            skipped: BTreeMap::new(),
            own: None,
            listed: 0,
            watch_from: 0,
            watch_ended: None,
            short_watches: 0,
            old_lists: 0,
            list_after: false,
            list_again: None,
            retry: None,
            failures: 0,
            conflicts: 0,
            disputes: 0,
            challenges: 0,
            disputed: None,
            moved_from: None,
            former: None,
            misses_config: false,
            leaving: false,
            changes: VecDeque::new(),
        }
    }

    /// What to do at `now`. The same until it is done.
    pub fn poll(&mut self, now: Instant) -> Action {
        if self.phase == Phase::Over {
            return Action::Stop;
        }
        if let Some(until) = self.retry.filter(|until| *until > now) {
            return Action::Wait { until };
        }
        self.retry = None;
        if self.phase == Phase::Hold
            && let Some(own) = self.own
        {
            if self.leaving && own.reservation {
                self.end(Change::Left);
            } else if self.leaving {
                self.phase = Phase::Delete(own.key, own.revision);
            } else if own.renew_at <= now && !own.reservation {
                self.phase = Phase::Put(own.key, own.revision, false);
            } else if self.recheck_at().is_some_and(|at| at <= now) {
                self.phase = Phase::List;
            }
        }
        match &self.phase {
            Phase::Over => Action::Stop,
            Phase::ReadConfig => Action::Store(Op::Get(self.config_key())),
            Phase::WriteConfig => Action::Store(Op::Create {
                key: self.config_key(),
                value: self
                    .proposal()
                    .map(NetworkConfig::to_json)
                    .unwrap_or_default(),
                ttl: None,
            }),
            Phase::List => Action::Store(Op::List(self.lease_prefix())),
            Phase::Create(key) => Action::Store(Op::Create {
                key: self.lease_key(*key),
                value: self.record().to_json(),
                ttl: Some(LEASE_TTL),
            }),
            Phase::Put(key, expected, reservation) => Action::Store(Op::CompareAndPut {
                key: self.lease_key(*key),
                value: self.record().to_json(),
                expected: *expected,
                ttl: (!reservation).then_some(LEASE_TTL),
            }),
            Phase::Delete(key, expected) => Action::Store(Op::CompareAndDelete {
                key: self.lease_key(*key),
                expected: *expected,
            }),
            Phase::Hold => Action::Watch {
                from: self.watch_from,
                until: self.next_deadline(now),
            },
        }
    }

    /// Takes the answer to the operation of the last poll.
    pub fn answer(&mut self, now: Instant, answer: Answer) {
        let failures = std::mem::take(&mut self.failures);
        match (self.phase.clone(), answer) {
            (Phase::ReadConfig, Answer::Value(entry)) => self.read_config(now, entry),
            (Phase::WriteConfig, Answer::Done(_)) => self.phase = Phase::ReadConfig,
            (Phase::WriteConfig, Answer::Conflict) => self.look_again(now, Phase::ReadConfig),
            (Phase::List, Answer::Snapshot { revision, entries }) => {
                self.snapshot(now, revision, entries);
            }
            (Phase::Create(key), Answer::Done(revision)) => {
                self.note_written(revision);
                self.hold(now, key, revision, false);
            }
            (Phase::Create(_), Answer::Conflict) => self.lost_race(now),
            (Phase::Put(key, _, reservation), Answer::Done(revision)) => {
                self.note_written(revision);
                self.hold(now, key, revision, reservation);
            }
            (Phase::Delete(..), Answer::Done(_)) if self.leaving => self.end(Change::Left),
            (Phase::Delete(..), Answer::Done(_)) => self.phase = Phase::List,
            // Somebody wrote our record, or it has expired, or an answer of ours was lost.
            (Phase::Put(..) | Phase::Delete(..), Answer::Conflict) => {
                self.look_again(now, Phase::List);
            }
            (Phase::Over | Phase::Hold, _) => {}
            (_, _) => {
                // An answer of another kind is a store's defect; ask again, later and later.
                self.failures = failures;
                self.failed(now);
            }
        }
    }

    /// The store did not answer; the operation is tried again later.
    pub fn failed(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.delay(now, self.failures);
        // Until it answers again, what the last list said may be of a history that is no more.
        self.list_after = true;
        if self.leaving && matches!(self.phase, Phase::Create(_)) {
            // Only to find out whether the store has done it nevertheless.
            self.phase = Phase::List;
        }
    }

    /// Takes a change that the watch reports.
    pub fn event(&mut self, now: Instant, event: WatchEvent) {
        let (WatchEvent::Put(Entry { key, revision, .. }) | WatchEvent::Delete { key, revision }) =
            &event;
        let revision = *revision;
        let is_old = revision <= self.listed;
        if is_old || matches!(self.phase, Phase::Over | Phase::List) {
            return;
        }
        if self.is_another_history(key, revision) {
            return self.read_again();
        }
        self.watch_from = self.watch_from.max(revision.saturating_add(1));
        match event {
            WatchEvent::Put(entry) => self.written(now, &entry),
            WatchEvent::Delete { key, revision } => self.deleted(&key, revision),
        }
    }

    /// Our record, if the watch has not told yet of its writing.
    fn untold(&self) -> Option<Own> {
        self.own.filter(|own| own.revision >= self.watch_from)
    }

    /// When everything is read again, in case the store was wiped without a sign of it.
    fn recheck_at(&self) -> Option<Instant> {
        let untold = self.untold().map(|own| own.told_at);
        self.list_again.into_iter().chain(untold).min()
    }

    /// Whether the writing of our record is not where it must be among the changes. The store was
    /// wiped after it then, and has as many revisions again already, so that nothing else tells.
    fn is_another_history(&self, key: &str, revision: Revision) -> bool {
        self.untold()
            .is_some_and(|own| match revision.cmp(&own.revision) {
                Ordering::Less => false,
                Ordering::Equal => key != self.lease_key(own.key),
                Ordering::Greater => true,
            })
    }

    /// Reads everything again, as soon as an operation that is under way is over.
    fn read_again(&mut self) {
        match self.phase {
            Phase::Hold => self.phase = Phase::List,
            _ => self.list_after = true,
        }
    }

    /// The watch has ended, or has a gap: everything is read again.
    pub fn watch_ended(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Over | Phase::List) {
            return;
        }
        self.read_again();
        let is_short = |ended: Instant| now < ended + SHORT_WATCH;
        if self.watch_ended.replace(now).is_some_and(is_short) {
            self.short_watches = self.short_watches.saturating_add(1);
            self.delay(now, self.short_watches);
        } else {
            self.short_watches = 0;
        }
    }

    /// Gives the lease back and stops. A reservation stays in the store.
    pub fn leave(&mut self) {
        if self.leaving || self.phase == Phase::Over {
            return;
        }
        self.leaving = true;
        self.retry = None;
        let writes = matches!(
            self.phase,
            Phase::Create(_) | Phase::Put(..) | Phase::Delete(..)
        );
        if self.own.is_none() && !writes {
            self.end(Change::Left);
        }
    }

    /// The node's public address is another one now: its record moves there, with the same subnet.
    pub fn set_public_ip(&mut self, public_ip: Ipv4Addr) {
        let old = std::mem::replace(&mut self.settings.identity.public_ip, public_ip);
        if old == public_ip {
            return;
        }
        self.former = Some(old);
        // A list tells whose records are peers' now, and whether the operation in flight has written
        // the old address.
        self.list_after = true;
        if let (Phase::Hold, Some(own)) = (&self.phase, self.own) {
            self.phase = Phase::Put(own.key, own.revision, own.reservation);
        }
    }

    /// What has changed since the last call.
    pub fn changes(&mut self) -> impl Iterator<Item = Change> + '_ {
        self.changes.drain(..)
    }

    /// All leases but the node's own.
    pub fn leases(&self) -> impl Iterator<Item = (&SubnetKey, &LeaseRecord)> {
        self.leases.iter()
    }

    /// What the keys of all leases begin with: flannel lists and watches without a final slash.
    #[must_use]
    pub fn lease_prefix(&self) -> String {
        reader::lease_prefix(&self.settings.prefix)
    }

    /// The record of this node.
    #[must_use]
    pub fn record(&self) -> LeaseRecord {
        let Identity {
            public_ip,
            vtep_mac,
        } = self.settings.identity;
        match &self.config {
            Some(config) => LeaseRecord::of(&config.backend, public_ip, vtep_mac),
            None => LeaseRecord::udp(public_ip),
        }
    }

    fn proposal(&self) -> Option<&NetworkConfig> {
        match &self.settings.wish {
            Wish::Any => None,
            Wish::IfNone(config) | Wish::Exactly(config) => Some(config),
        }
    }

    fn read_config(&mut self, now: Instant, entry: Option<Entry>) {
        let Some(entry) = entry else {
            if self.proposal().is_some() {
                self.phase = Phase::WriteConfig;
            } else {
                if !std::mem::replace(&mut self.misses_config, true) {
                    self.changes.push_back(Change::NoConfig(self.config_key()));
                }
                self.retry = Some(now + CONFIG_RETRY);
            }
            return;
        };
        let config = match NetworkConfig::parse(&entry.value) {
            Ok(config) => config,
            Err(error) => return self.lose(error.into()),
        };
        if let Wish::Exactly(asked) = &self.settings.wish
            && *asked != config
        {
            let (stored, asked) = (config.to_string(), asked.to_string());
            return self.lose(Loss::OtherConfig { stored, asked });
        }
        if let Backend::Other(name) = &config.backend {
            // Its peers would take a record of ours for something that it is not.
            return self.lose(Loss::OtherBackend(shorten(name)));
        }
        self.config = Some(config.clone());
        self.changes.push_back(Change::Configured(config));
        self.phase = Phase::List;
    }

    /// Compares what the store has with what we believed, and looks for our own lease.
    fn snapshot(&mut self, now: Instant, revision: Revision, entries: Vec<Entry>) {
        let went_back = revision.saturating_add(1) < self.watch_from;
        self.listed = revision;
        self.watch_from = revision.saturating_add(1);
        self.list_after = false;
        // It may be wiped again before we have written our record, and then have as many revisions.
        let again = went_back.then(|| now + REPUBLISHING);
        self.list_again = again.or(self.list_again.filter(|at| now < *at));
        self.note_list(now, went_back);
        let mut found = BTreeMap::new();
        let mut own = Vec::new();
        let known = std::mem::take(&mut self.skipped);
        for entry in entries {
            match self.read(&entry) {
                Ok((key, record)) if self.is_ours(key, &record) => own.push((key, entry, record)),
                Ok((key, record)) => {
                    found.insert(key, record);
                }
                Err(unusable) => {
                    let old = known.get(&entry.key).map(|skipped| skipped.revision);
                    self.skip(&entry, unusable, old);
                }
            }
        }
        let held = self.own.map(|own| own.key);
        let lacks_ours = held.is_some_and(|held| own.iter().all(|(key, ..)| *key != held));
        let is_wiped = went_back && lacks_ours;
        self.miss(now, is_wiped, &mut found);
        for (key, record) in &found {
            if self.leases.get(key) != Some(record) {
                self.changes.push_back(Change::Peer(*key, record.clone()));
            }
        }
        self.leases = found;
        match self.own {
            _ if self.leaving => self.give_back(&own),
            Some(held) => self.check_own(now, held, &own),
            None => self.choose(now, &own),
        }
    }

    /// A store that was wiped goes back once. One whose members lag behind each other, or that a
    /// proxy answers for, can do so at each list, and what its watch tells asks for the next.
    fn note_list(&mut self, now: Instant, went_back: bool) {
        if !went_back {
            self.old_lists = 0;
            return;
        }
        self.old_lists = self.old_lists.saturating_add(1);
        if self.old_lists > 1 {
            self.delay(now, self.old_lists);
        }
    }

    /// Takes leave of the peers that a list has no more. If it has not our own record either, and
    /// its history began anew, the store was wiped, and nothing is known of the peers: they stay
    /// for a while.
    fn miss(&mut self, now: Instant, is_wiped: bool, found: &mut BTreeMap<SubnetKey, LeaseRecord>) {
        self.missing.retain(|key, _| !found.contains_key(key));
        let lost = self.leases.keys().filter(|key| !found.contains_key(*key));
        for key in lost.copied().collect::<Vec<_>>() {
            let is_unreadable = self.skipped.contains_key(&self.lease_key(key));
            if is_wiped && !is_unreadable {
                self.missing.entry(key).or_insert(now + REPUBLISHING);
            }
            let is_awaited = self.missing.get(&key).is_some_and(|until| now < *until);
            if is_unreadable || !is_awaited {
                self.remove_peer(key);
            } else if let Some(record) = self.leases.get(&key) {
                found.insert(key, record.clone());
            }
        }
    }

    /// When there is something to do without an event.
    fn next_deadline(&self, now: Instant) -> Instant {
        let renewal = match self.own {
            Some(own) if !own.reservation => own.renew_at,
            // A reservation is never renewed.
            Some(_) | None => now + Duration::from_secs(LEASE_TTL.as_secs()),
        };
        let recheck = self.recheck_at();
        recheck.map_or(renewal, |until| renewal.min(until))
    }

    /// We are leaving: is there a record of ours to delete?
    fn give_back(&mut self, own: &[OwnEntry]) {
        let held = self.own.map(|own| own.key);
        // Not what another node with our identity holds.
        let public_ip = self.settings.identity.public_ip;
        let is_ours = |key, record: &LeaseRecord| {
            let is_here = record.public_ip == public_ip || self.is_former(record);
            is_here && held.is_none_or(|held| held == key)
        };
        match own
            .iter()
            .find(|(key, entry, record)| entry.ttl.is_some() && is_ours(*key, record))
        {
            Some((key, entry, _)) => self.phase = Phase::Delete(*key, entry.revision),
            None => self.end(Change::Left),
        }
    }

    /// After a gap in the watch: do we still have what we had? A running node never changes its
    /// subnet, because its pods would be stranded.
    fn check_own(&mut self, now: Instant, held: Own, own: &[OwnEntry]) {
        if let Some((_, entry, record)) = own.iter().find(|(key, ..)| *key == held.key) {
            if *record == self.record() {
                self.adopt(now, held, entry);
                self.phase = Phase::Hold;
            } else if entry.revision == held.revision {
                // It is as we wrote it, but our address has changed.
                self.phase = Phase::Put(held.key, entry.revision, held.reservation);
            } else {
                self.contested(now, held, entry.revision, record);
            }
        } else if let Some(record) = self.leases.get(&held.key).or_else(|| {
            let mut leases = self.leases.iter();
            let other = leases.find(|(key, _)| overlap(key.ipv4, held.key.ipv4));
            other.map(|(_, record)| record)
        }) {
            let holder = record.public_ip;
            self.taken(held.key, holder);
        } else if let Some(skipped) = self.skipped.get(&self.lease_key(held.key)) {
            self.dispute(now, held, skipped.revision);
        } else {
            // The store was wiped, or the lease has expired: publish it again.
            self.phase = Phase::Create(held.key);
        }
    }

    fn choose(&mut self, now: Instant, own: &[OwnEntry]) {
        let Some(config) = self.config.clone() else {
            self.phase = Phase::ReadConfig;
            return;
        };
        if let Some((key, entry, record)) = self.best(own) {
            let (reservation, unchanged) = (entry.ttl.is_none(), *record == self.record());
            if !config.allows(key.ipv4) || key.ipv6.is_some() {
                self.phase = Phase::Delete(*key, entry.revision);
            } else if reservation && unchanged {
                self.hold(now, *key, entry.revision, true);
            } else {
                self.tell_take_over(*key, record);
                self.phase = Phase::Put(*key, entry.revision, reservation);
            }
            return;
        }
        let previous = self.settings.previous.map(|previous| previous.trunc());
        let previous = previous
            .filter(|net| config.allows(*net) && !self.occupied().any(|key| overlap(key, *net)));
        let subnet = previous.or_else(|| {
            let free = self.free_subnets(&config);
            let index = self.random_below(free.len() as u64);
            free.get(index as usize).copied()
        });
        match subnet {
            Some(subnet) => self.phase = Phase::Create(SubnetKey::new(subnet)),
            None => self.lose(Loss::OutOfSubnets(config.subnets().count())),
        }
    }

    /// The record to go on with: that of the subnet that our pods have, else one that our VTEP
    /// wrote, else the first, as flannel does.
    fn best<'a>(&self, own: &'a [OwnEntry]) -> Option<&'a OwnEntry> {
        let vtep_mac = self.settings.identity.vtep_mac;
        own.iter().min_by_key(|(key, _, record)| {
            let is_foreign = record.vtep_mac().is_some_and(|mac| mac != vtep_mac);
            (!self.is_previous(*key), is_foreign)
        })
    }

    /// Says so if a record that we go on with is not simply our own.
    fn tell_take_over(&mut self, key: SubnetKey, record: &LeaseRecord) {
        let Identity {
            public_ip,
            vtep_mac,
        } = self.settings.identity;
        if record.public_ip != public_ip {
            let from = record.public_ip;
            if self.moved_from.replace(from) != Some(from) {
                self.changes.push_back(Change::Moved { key, from });
            }
        } else if let Some(other) = record.vtep_mac()
            && other != vtep_mac
            && !self.is_previous(key)
        {
            let vtep_mac = other;
            self.changes.push_back(Change::Replaced { key, vtep_mac });
        }
    }

    fn is_previous(&self, key: SubnetKey) -> bool {
        let previous = self.settings.previous;
        previous.is_some_and(|previous| previous.trunc() == key.ipv4)
    }

    /// Whether a record is ours: under our public address, or written by our VTEP for the subnet
    /// that we have or had, or under the address that we had.
    fn is_ours(&self, key: SubnetKey, record: &LeaseRecord) -> bool {
        let identity = &self.settings.identity;
        if record.public_ip == identity.public_ip {
            return true;
        }
        match self.own {
            // The old address is still in what we wrote, whatever the backend.
            Some(own) if own.key == key => {
                self.is_former(record) || record.vtep_mac() == Some(identity.vtep_mac)
            }
            Some(_) => false,
            None => {
                record.vtep_mac() == Some(identity.vtep_mac)
                    && (self.is_previous(key) || self.is_former(record))
            }
        }
    }

    fn is_former(&self, record: &LeaseRecord) -> bool {
        Some(record.public_ip) == self.former
    }

    /// The first free subnets, upward: one pass over the leases however large the network is.
    fn free_subnets(&self, config: &NetworkConfig) -> Vec<Ipv4Net> {
        let bounds = |net: Ipv4Net| (number(net.network()), number(net.broadcast()));
        let mut occupied: Vec<_> = self.occupied().map(bounds).collect();
        occupied.sort_unstable();
        let mut occupied = occupied.into_iter().peekable();
        let size = 1u64 << (32 - config.subnet_len);
        let (mut base, last) = (number(config.subnet_min), number(config.subnet_max));
        let mut free = Vec::new();
        while base <= last && free.len() < CANDIDATES {
            match occupied.next_if(|(first, _)| *first < base + size) {
                Some((_, end)) if end >= base => base = (end / size + 1) * size,
                Some(_) => {}
                None => {
                    let address = u32::try_from(base).ok().map(Ipv4Addr::from);
                    free.extend(
                        address.and_then(|base| Ipv4Net::new(base, config.subnet_len).ok()),
                    );
                    base += size;
                }
            }
        }
        free
    }

    /// Every subnet that is not free.
    fn occupied(&self) -> impl Iterator<Item = Ipv4Net> {
        let skipped = self.skipped.values().filter_map(|skipped| skipped.subnet);
        self.leases
            .keys()
            .copied()
            .chain(skipped)
            .map(|key| key.ipv4)
    }

    fn lost_race(&mut self, now: Instant) {
        self.look_again(now, Phase::List);
        if self.own.is_none() && self.conflicts >= MAX_RACES {
            self.lose(Loss::Races);
        }
    }

    /// The store is not as we believed.
    fn look_again(&mut self, now: Instant, phase: Phase) {
        self.phase = phase;
        self.conflicts = self.conflicts.saturating_add(1);
        if self.conflicts > QUICK_CONFLICTS {
            self.delay(now, self.conflicts - QUICK_CONFLICTS);
        }
    }

    fn hold(&mut self, now: Instant, key: SubnetKey, revision: Revision, reservation: bool) {
        let is_new = self.own.is_none_or(|own| own.key != key);
        self.own = Some(Own {
            key,
            revision,
            reservation,
            renew_at: now + self.renewal(LEASE_TTL),
            told_at: now + TELLING,
        });
        self.conflicts = 0;
        self.skipped.remove(&self.lease_key(key));
        // A peer that had it for a moment, whose end the watch has not reported yet.
        self.remove_peer(key);
        self.phase = if self.list_after {
            Phase::List
        } else {
            Phase::Hold
        };
        self.changes.push_back(if is_new {
            Change::Acquired(key)
        } else {
            Change::Renewed
        });
    }

    /// A history that began anew since the last list has what that did not tell.
    fn note_written(&mut self, revision: Revision) {
        self.list_after |= revision < self.listed;
    }

    /// Takes our record as the store has it.
    fn adopt(&mut self, now: Instant, held: Own, entry: &Entry) {
        let renew_at = entry.ttl.map(|ttl| now + self.renewal(ttl));
        self.own = Some(Own {
            revision: entry.revision,
            reservation: entry.ttl.is_none(),
            renew_at: renew_at.map_or(held.renew_at, |at| at.min(held.renew_at)),
            ..held
        });
    }

    /// How long a lease that lives so long still need not be renewed.
    fn renewal(&self, ttl: std::time::Duration) -> Duration {
        let margin = self.settings.renew_margin.min(MAX_RENEW_MARGIN);
        let rest = ttl.min(LEASE_TTL).saturating_sub(margin);
        Duration::from_millis(rest.as_millis() as u64).max(SHORTEST_RENEWAL)
    }

    /// Our record is another one than we wrote, under our address or by our VTEP.
    fn contested(&mut self, now: Instant, held: Own, revision: Revision, record: &LeaseRecord) {
        let holder = record.public_ip;
        let is_ours = holder == self.settings.identity.public_ip || self.is_former(record);
        if !is_ours && self.moved_from == Some(holder) {
            // We moved it here because nobody seemed to have it, and its holder writes it again.
            let (key, vtep_mac) = (held.key.to_string(), self.settings.identity.vtep_mac);
            return self.lose(Loss::Cloned {
                key,
                holder,
                vtep_mac,
            });
        }
        if is_ours {
            return self.dispute(now, held, revision);
        }
        // A copy of us gives way when it sees our record again, and may be started again and again.
        self.note_dispute(now);
        self.challenges = self.challenges.saturating_add(1);
        self.write_again(
            now,
            held,
            revision,
            self.challenges.min(MAX_CHALLENGE_DELAY),
        );
    }

    fn note_dispute(&mut self, now: Instant) {
        let is_recent = |disputed: Instant| now < disputed + DISPUTE_MEMORY;
        if !self.disputed.replace(now).is_some_and(is_recent) {
            (self.disputes, self.challenges) = (0, 0);
        }
    }

    /// Our record is not what we wrote: write it again, later and later.
    fn dispute(&mut self, now: Instant, held: Own, revision: Revision) {
        self.note_dispute(now);
        self.disputes += 1;
        if self.disputes > MAX_DISPUTES {
            let (key, public_ip) = (held.key.to_string(), self.settings.identity.public_ip);
            return self.lose(Loss::Disputed { key, public_ip });
        }
        self.write_again(now, held, revision, self.disputes);
    }

    fn write_again(&mut self, now: Instant, held: Own, revision: Revision, attempt: u32) {
        self.phase = Phase::Put(held.key, revision, held.reservation);
        self.changes.push_back(Change::Disputed(held.key));
        self.delay(now, attempt);
    }

    fn written(&mut self, now: Instant, entry: &Entry) {
        match self.read(entry) {
            Ok((key, record)) => {
                self.skipped.remove(&entry.key);
                self.missing.remove(&key);
                if self.claims(key) {
                    self.own_written(now, entry, Some(&record));
                } else if self.is_ours(key, &record) {
                    self.remove_peer(key);
                } else if self.leases.get(&key) != Some(&record) {
                    self.leases.insert(key, record.clone());
                    self.changes.push_back(Change::Peer(key, record));
                }
            }
            Err(unusable) => {
                let subnet = unusable.subnet;
                self.skip(entry, unusable, None);
                match subnet {
                    Some(key) if self.claims(key) => self.own_written(now, entry, None),
                    Some(key) => self.remove_peer(key),
                    None => {}
                }
            }
        }
    }

    /// Our key was written, with no record if the value cannot be read.
    fn own_written(&mut self, now: Instant, entry: &Entry, record: Option<&LeaseRecord>) {
        let is_unchanged = record == Some(&self.record());
        let Some(own) = self.own.filter(|_| self.phase == Phase::Hold) else {
            self.list_after |= !is_unchanged;
            return;
        };
        if entry.revision <= own.revision {
            return;
        }
        match record {
            Some(_) if is_unchanged => self.adopt(now, own, entry),
            Some(record) if self.is_ours(own.key, record) => {
                self.contested(now, own, entry.revision, record);
            }
            Some(record) => self.taken(own.key, record.public_ip),
            None => self.dispute(now, own, entry.revision),
        }
    }

    fn deleted(&mut self, key: &str, revision: Revision) {
        self.skipped.remove(key);
        let Some(key) = self.subnet_key(key) else {
            return;
        };
        if !self.claims(key) {
            self.remove_peer(key);
        } else if self.phase != Phase::Hold {
            self.list_after = true;
        } else if self.own.is_some_and(|own| revision > own.revision) {
            self.phase = Phase::List;
        }
    }

    /// Whether the record of `key` is ours, or is about to be.
    fn claims(&self, key: SubnetKey) -> bool {
        match self.phase {
            Phase::Create(ours) | Phase::Put(ours, ..) if ours == key => true,
            _ => self.own.is_some_and(|own| own.key == key),
        }
    }

    fn remove_peer(&mut self, key: SubnetKey) {
        self.missing.remove(&key);
        if self.leases.remove(&key).is_some() {
            self.changes.push_back(Change::PeerGone(key));
        }
    }

    fn read(&self, entry: &Entry) -> Result<(SubnetKey, LeaseRecord), NoLease> {
        let prefix = &self.settings.prefix;
        let (key, record) = reader::read_entry(prefix, entry)?;
        if record.public_ip == self.settings.identity.public_ip {
            return Ok((key, record));
        }
        reader::read_peer(
            prefix,
            entry,
            self.config.as_ref().map(|config| config.network),
        )
    }

    fn skip(&mut self, entry: &Entry, unusable: NoLease, known: Option<Revision>) {
        let skipped = Skipped {
            revision: entry.revision,
            subnet: unusable.subnet,
        };
        self.skipped.insert(entry.key.clone(), skipped);
        if known != Some(entry.revision) {
            self.changes.push_back(Change::Skipped {
                key: shorten(&entry.key),
                reason: unusable.reason,
            });
        }
    }

    fn taken(&mut self, key: SubnetKey, holder: Ipv4Addr) {
        let key = key.to_string();
        self.lose(Loss::Taken { key, holder });
    }

    fn lose(&mut self, loss: Loss) {
        self.end(if self.leaving {
            Change::Left
        } else {
            Change::Lost(loss)
        });
    }

    fn end(&mut self, change: Change) {
        self.phase = Phase::Over;
        self.changes.push_back(change);
    }

    /// Lets the next operation wait: twice as long at each attempt, up to a limit.
    fn delay(&mut self, now: Instant, attempt: u32) {
        let factor = 1u64 << attempt.saturating_sub(1).min(6);
        let delay = FIRST_RETRY.total_millis().saturating_mul(factor);
        let delay = delay.min(LAST_RETRY.total_millis());
        // Between half and all of it, so that many nodes do not come back together.
        let jitter = self.random_below(delay / 2 + 1);
        self.retry = Some(now + Duration::from_millis(delay / 2 + jitter));
    }

    fn random_below(&mut self, bound: u64) -> u64 {
        use std::hash::BuildHasher;
        self.random = Seed(self.random).hash_one(bound);
        if bound == 0 { 0 } else { self.random % bound }
    }

    fn config_key(&self) -> String {
        format!("{}/config", self.settings.prefix)
    }

    fn lease_key(&self, key: SubnetKey) -> String {
        format!("{}/{key}", self.lease_prefix())
    }

    fn subnet_key(&self, key: &str) -> Option<SubnetKey> {
        reader::subnet_key(&self.settings.prefix, key)
    }
}

/// Whether two networks share addresses.
#[must_use]
pub fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

fn number(address: Ipv4Addr) -> u64 {
    u32::from(address).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIX: &str = "/coreos.com/network";

    /// A store in memory that counts revisions and expires nothing by itself.
    #[derive(Default)]
    struct Store {
        revision: Revision,
        entries: BTreeMap<String, Entry>,
        log: Vec<WatchEvent>,
    }

    impl Store {
        fn with_config(config: &str) -> Self {
            let mut store = Self::default();
            store.write(&format!("{PREFIX}/config"), config, None);
            store
        }

        fn write(&mut self, key: &str, value: &str, ttl: Option<std::time::Duration>) {
            self.revision += 1;
            let (key, value) = (key.to_owned(), value.to_owned());
            let entry = Entry {
                key: key.clone(),
                value,
                revision: self.revision,
                ttl,
            };
            self.log.push(WatchEvent::Put(entry.clone()));
            self.entries.insert(key, entry);
        }

        fn lease(&mut self, subnet: &str, ip: [u8; 4]) {
            let value = LeaseRecord::udp(ip.into()).to_json();
            self.write(
                &format!("{PREFIX}/subnets/{subnet}"),
                &value,
                Some(LEASE_TTL),
            );
        }

        fn delete(&mut self, key: &str) {
            self.revision += 1;
            self.entries.remove(key);
            self.log.push(WatchEvent::Delete {
                key: key.to_owned(),
                revision: self.revision,
            });
        }

        fn execute(&mut self, op: Op) -> Answer {
            match op {
                Op::Get(key) => Answer::Value(self.entries.get(&key).cloned()),
                Op::List(prefix) => Answer::Snapshot {
                    revision: self.revision,
                    entries: self
                        .entries
                        .values()
                        .filter(|entry| entry.key.starts_with(&prefix))
                        .cloned()
                        .collect(),
                },
                Op::Create { key, .. } if self.entries.contains_key(&key) => Answer::Conflict,
                Op::Create { key, value, ttl } => {
                    self.write(&key, &value, ttl);
                    Answer::Done(self.revision)
                }
                Op::CompareAndPut {
                    key,
                    value,
                    expected,
                    ttl,
                } => {
                    if self
                        .entries
                        .get(&key)
                        .is_none_or(|entry| entry.revision != expected)
                    {
                        return Answer::Conflict;
                    }
                    self.write(&key, &value, ttl);
                    Answer::Done(self.revision)
                }
                Op::CompareAndDelete { key, expected } => {
                    if self
                        .entries
                        .get(&key)
                        .is_none_or(|entry| entry.revision != expected)
                    {
                        return Answer::Conflict;
                    }
                    self.delete(&key);
                    Answer::Done(self.revision)
                }
            }
        }

        fn subnets(&self) -> Vec<(String, Option<std::time::Duration>)> {
            let leases = self
                .entries
                .values()
                .filter(|entry| entry.key.contains("/subnets/"));
            leases
                .map(|entry| (entry.key.rsplit('/').next().unwrap().to_owned(), entry.ttl))
                .collect()
        }
    }

    fn manager(last: u8) -> Manager {
        Manager::new(Settings {
            identity: Identity {
                public_ip: [192, 168, 0, last].into(),
                vtep_mac: VtepMac::from_random([last; 6]),
            },
            prefix: PREFIX.to_owned(),
            previous: None,
            wish: Wish::Any,
            renew_margin: RENEW_MARGIN,
            random_seed: last.into(),
        })
    }

    const CONFIG: &str = r#"{"Network":"10.3.0.0/16"}"#;

    /// Runs a manager until it has nothing to ask, and returns what has changed.
    fn settle(manager: &mut Manager, store: &mut Store, now: Instant) -> Vec<Change> {
        let mut now = now;
        let mut changes = Vec::new();
        loop {
            match manager.poll(now) {
                Action::Store(op) => {
                    let answer = store.execute(op);
                    manager.answer(now, answer);
                }
                Action::Wait { until } => now = until,
                Action::Watch { from, .. } => {
                    let pending: Vec<_> = store
                        .log
                        .iter()
                        .filter(|event| match event {
                            WatchEvent::Put(entry) => entry.revision >= from,
                            WatchEvent::Delete { revision, .. } => *revision >= from,
                        })
                        .filter(|event| match event {
                            WatchEvent::Put(entry) => entry.key.contains("/subnets/"),
                            WatchEvent::Delete { .. } => true,
                        })
                        .cloned()
                        .collect();
                    let idle = pending.is_empty();
                    for event in pending {
                        manager.event(now, event);
                    }
                    changes.extend(manager.changes());
                    if idle {
                        return changes;
                    }
                }
                Action::Stop => {
                    changes.extend(manager.changes());
                    return changes;
                }
            }
        }
    }

    fn acquired(changes: &[Change]) -> Option<String> {
        changes.iter().find_map(|change| match change {
            Change::Acquired(key) => Some(key.to_string()),
            _ => None,
        })
    }

    #[test]
    fn u7_a_subnet_in_range_is_leased_for_a_day_and_found_again() {
        let mut store = Store::with_config(CONFIG);
        let subnet = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO)).unwrap();
        assert_eq!(store.subnets(), [(subnet.clone(), Some(LEASE_TTL))]);
        let third: u8 = subnet.split('.').nth(2).unwrap().parse().unwrap();
        assert!((1..=100).contains(&third), "one of the first 100: {subnet}");
        let again = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO)).unwrap();
        assert_eq!(again, subnet);
        assert_eq!(store.subnets().len(), 1);
    }

    #[test]
    fn u7_the_previous_subnet_is_taken_if_it_is_free_and_fits() {
        for (previous, expected) in [
            ("10.3.77.0/24", true),
            ("10.3.200.1/24", true),
            ("10.3.9.0/24", false),
            ("10.4.77.0/24", false),
            ("10.3.64.0/20", false),
        ] {
            let mut store = Store::with_config(CONFIG);
            store.lease("10.3.9.0-24", [192, 168, 0, 9]);
            let mut manager = manager(1);
            let previous: Ipv4Net = previous.parse().unwrap();
            manager.settings.previous = Some(previous);
            let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
            assert_eq!(
                subnet == SubnetKey::new(previous).to_string(),
                expected,
                "{previous}"
            );
        }
    }

    #[test]
    fn u8_a_lease_that_no_longer_fits_is_given_up_for_a_new_one() {
        let mut store = Store::with_config(CONFIG);
        store.lease("10.9.9.0-24", [192, 168, 0, 1]);
        let subnet = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO)).unwrap();
        assert!(subnet.starts_with("10.3."));
        assert_eq!(store.subnets(), [(subnet, Some(LEASE_TTL))]);
    }

    #[test]
    fn overlapping_leases_of_any_length_are_respected() {
        let mut store = Store::with_config(r#"{"Network":"10.3.0.0/16","SubnetMax":"10.3.4.0"}"#);
        store.lease("10.3.0.0-22", [192, 168, 0, 9]);
        let subnet = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO)).unwrap();
        assert_eq!(subnet, "10.3.4.0-24");
        let changes = settle(&mut manager(2), &mut store, Instant::ZERO);
        assert_eq!(changes.last(), Some(&Change::Lost(Loss::OutOfSubnets(4))));
    }

    #[test]
    fn managers_that_race_get_different_subnets() {
        for round in 0..50u64 {
            let mut store = Store::with_config(
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.3.0"}"#,
            );
            let mut managers: Vec<_> = (1..=3).map(manager).collect();
            let mut now = Instant::ZERO;
            let mut order = round;
            // One operation each in a changing order, until all hold.
            for step in 0..1000 {
                order = order
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(step);
                let manager = &mut managers[(order >> 33) as usize % 3];
                now += Duration::from_millis(10);
                if let Action::Store(op) = manager.poll(now) {
                    let answer = store.execute(op);
                    manager.answer(now, answer);
                }
            }
            assert!(
                managers.iter().all(|manager| manager.phase == Phase::Hold),
                "round {round}"
            );
            let keys: Vec<_> = store.subnets().into_iter().map(|(key, _)| key).collect();
            assert_eq!(keys, ["10.3.1.0-24", "10.3.2.0-24", "10.3.3.0-24"]);
        }
    }

    #[test]
    fn u9_peers_are_reported_and_the_own_lease_is_not() {
        let mut store = Store::with_config(CONFIG);
        store.lease("10.3.8.0-24", [192, 168, 0, 8]);
        store.write(&format!("{PREFIX}/subnets/rubbish"), "{}", None);
        let mut manager = manager(1);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        let peers = |changes: &[Change]| -> Vec<String> {
            changes
                .iter()
                .filter_map(|change| match change {
                    Change::Peer(key, record) => Some(format!("{key} {}", record.public_ip)),
                    Change::PeerGone(key) => Some(format!("{key} gone")),
                    _ => None,
                })
                .collect()
        };
        assert_eq!(peers(&changes), ["10.3.8.0-24 192.168.0.8"]);
        assert!(
            changes
                .iter()
                .any(|change| matches!(change, Change::Skipped { .. }))
        );

        store.lease("10.3.9.0-24", [192, 168, 0, 9]);
        store.lease("10.3.8.0-24", [192, 168, 0, 8]);
        store.lease("10.3.8.0-24", [192, 168, 0, 18]);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        assert_eq!(
            peers(&changes),
            ["10.3.9.0-24 192.168.0.9", "10.3.8.0-24 192.168.0.18"],
            "a renewal of the same value is no change"
        );

        // A gap in the watch: compared by value.
        store.delete(&format!("{PREFIX}/subnets/10.3.9.0-24"));
        store.lease("10.3.8.0-24", [192, 168, 0, 28]);
        store.log.clear();
        manager.watch_ended(Instant::ZERO);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        assert_eq!(
            peers(&changes),
            ["10.3.9.0-24 gone", "10.3.8.0-24 192.168.0.28"]
        );
    }

    #[test]
    fn u12_renewal_restores_the_full_time_and_keeps_the_value() {
        let mut store =
            Store::with_config(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let mut manager = manager(1);
        settle(&mut manager, &mut store, Instant::ZERO);
        let key = format!("{PREFIX}/subnets/{}", store.subnets()[0].0);
        let before = store.entries[&key].clone();
        store.entries.get_mut(&key).unwrap().ttl = Some(std::time::Duration::from_secs(9));
        let Action::Watch { until, .. } = manager.poll(Instant::ZERO) else {
            panic!()
        };
        assert_eq!(until, Instant::ZERO + Duration::from_secs(43_200));
        assert_eq!(settle(&mut manager, &mut store, until), [Change::Renewed]);
        assert_eq!(store.entries[&key].ttl, Some(LEASE_TTL));
        assert_eq!(store.entries[&key].value, before.value);
        assert!(before.value.contains("VtepMAC"));
    }

    #[test]
    fn a_record_of_another_owner_is_never_written_over() {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        store.lease(&subnet, [192, 168, 0, 66]);
        let later = Instant::ZERO + Duration::from_secs(43_200);
        let Action::Store(op) = manager.poll(later) else {
            panic!("it renews")
        };
        let answer = store.execute(op);
        assert_eq!(answer, Answer::Conflict);
        manager.answer(later, answer);
        let changes = settle(&mut manager, &mut store, later);
        let holder = Ipv4Addr::new(192, 168, 0, 66);
        assert!(
            changes.contains(&Change::Lost(Loss::Taken {
                key: subnet.clone(),
                holder
            })),
            "{changes:?}"
        );
        assert_eq!(manager.poll(later), Action::Stop);
    }

    #[test]
    fn a_deleted_record_is_published_again_and_a_foreign_one_is_a_loss() {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        store.delete(&format!("{PREFIX}/subnets/{subnet}"));
        assert_eq!(
            settle(&mut manager, &mut store, Instant::ZERO),
            [Change::Renewed]
        );
        assert_eq!(store.subnets(), [(subnet.clone(), Some(LEASE_TTL))]);
        store.lease(&subnet, [192, 168, 0, 66]);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        assert!(matches!(
            changes.last(),
            Some(Change::Lost(Loss::Taken { .. }))
        ));
    }

    #[test]
    fn peers_stay_while_they_publish_their_records_in_a_wiped_store() {
        let mut store = Store::with_config(CONFIG);
        store.lease("10.3.7.0-24", [192, 168, 0, 7]);
        store.lease("10.3.8.0-24", [192, 168, 0, 8]);
        let mut manager = manager(1);
        settle(&mut manager, &mut store, Instant::ZERO);
        let mut store = Store::default();
        manager.watch_ended(Instant::ZERO);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        assert_eq!(
            changes,
            [Change::Renewed],
            "our record is there again, and no peer is gone"
        );
        store.lease("10.3.7.0-24", [192, 168, 0, 7]);
        assert_eq!(settle(&mut manager, &mut store, Instant::ZERO), []);
        // A list that has our record again does not end the patience.
        manager.watch_ended(Instant::ZERO);
        let soon = Instant::ZERO + Duration::from_secs(30);
        assert_eq!(settle(&mut manager, &mut store, soon), []);
        let Action::Watch { until, .. } = manager.poll(soon) else {
            panic!("it watches")
        };
        assert_eq!(until, Instant::ZERO + REPUBLISHING);
        let gone = Change::PeerGone("10.3.8.0-24".parse().unwrap());
        assert_eq!(settle(&mut manager, &mut store, until), [gone]);
        assert_eq!(manager.leases().count(), 1);
    }

    #[test]
    fn reservations_stay_without_a_time_to_live() {
        let mut store = Store::with_config(CONFIG);
        let value = LeaseRecord::udp([192, 168, 0, 1].into()).to_json();
        store.write(&format!("{PREFIX}/subnets/10.3.50.0-24"), &value, None);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        assert_eq!(subnet, "10.3.50.0-24");
        let later = Instant::ZERO + Duration::from_secs(90_000);
        assert_eq!(settle(&mut manager, &mut store, later), []);
        assert_eq!(store.subnets(), [(subnet, None)]);
    }

    #[test]
    fn the_margin_says_when_to_renew() {
        for (minutes, at) in [(60, 23 * 60), (1, 1439), (1439, 1), (99_999, 1)] {
            let mut store = Store::with_config(CONFIG);
            let mut manager = manager(1);
            manager.settings.renew_margin = std::time::Duration::from_secs(minutes * 60);
            settle(&mut manager, &mut store, Instant::ZERO);
            let Action::Watch { until, .. } = manager.poll(Instant::ZERO) else {
                panic!()
            };
            assert_eq!(until, Instant::ZERO + Duration::from_secs(at * 60));
        }
    }

    #[test]
    fn u1_a_missing_configuration_is_told_once_and_waited_for() {
        let mut store = Store::default();
        let mut manager = manager(1);
        let mut now = Instant::ZERO;
        let mut reads = 0;
        while reads < 20 {
            match manager.poll(now) {
                Action::Store(op) => {
                    reads += 1;
                    manager.answer(now, store.execute(op));
                }
                Action::Wait { until } => now = until,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(now, Instant::ZERO + Duration::from_secs(19));
        let missing = Change::NoConfig(format!("{PREFIX}/config"));
        assert_eq!(manager.changes().collect::<Vec<_>>(), [missing]);
        store.write(&format!("{PREFIX}/config"), CONFIG, None);
        assert!(acquired(&settle(&mut manager, &mut store, now)).is_some());
    }

    const VXLAN: &str = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#;

    /// A node that had `subnet` before, has the MAC address `mac` and is at `last` now.
    fn returning(last: u8, mac: u8, subnet: &str) -> Manager {
        let mut manager = manager(last);
        manager.settings.identity.vtep_mac = VtepMac::from_random([mac; 6]);
        manager.settings.previous = subnet.replace('-', "/").parse().ok();
        manager
    }

    fn holder(store: &Store, subnet: &str) -> Ipv4Addr {
        let entry = &store.entries[&format!("{PREFIX}/subnets/{subnet}")];
        LeaseRecord::parse(&entry.value).unwrap().public_ip
    }

    #[test]
    fn a_node_with_another_public_address_keeps_its_subnet() {
        let mut store = Store::with_config(VXLAN);
        let subnet = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO)).unwrap();
        let (key, from) = (subnet.parse().unwrap(), [192, 168, 0, 1].into());
        let mut moved = returning(7, 1, &subnet);
        let changes = settle(&mut moved, &mut store, Instant::ZERO);
        assert_eq!(
            changes[1..],
            [Change::Moved { key, from }, Change::Acquired(key)]
        );
        assert_eq!(holder(&store, &subnet), Ipv4Addr::new(192, 168, 0, 7));
        assert_eq!(store.subnets(), [(subnet.clone(), Some(LEASE_TTL))]);

        // Neither another MAC address nor another previous subnet proves that it is ours.
        for other in [returning(8, 8, &subnet), returning(9, 1, "10.3.250.0/24")] {
            let mut other = other;
            let changes = settle(&mut other, &mut store, Instant::ZERO);
            assert_ne!(acquired(&changes), Some(subnet.clone()));
        }
        // Nor does anything with a backend that has no MAC address.
        let mut store = Store::with_config(CONFIG);
        let subnet = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO)).unwrap();
        let changes = settle(&mut returning(7, 1, &subnet), &mut store, Instant::ZERO);
        assert_ne!(acquired(&changes), Some(subnet));
    }

    #[test]
    fn nodes_that_exchange_their_public_addresses_keep_their_subnets() {
        let mut store = Store::with_config(VXLAN);
        let first = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO)).unwrap();
        let second = acquired(&settle(&mut manager(2), &mut store, Instant::ZERO)).unwrap();
        let mut one = returning(2, 1, &first);
        let changes = settle(&mut one, &mut store, Instant::ZERO);
        assert_eq!(acquired(&changes), Some(first.clone()));
        let mut two = returning(1, 2, &second);
        let changes = settle(&mut two, &mut store, Instant::ZERO);
        assert_eq!(acquired(&changes), Some(second.clone()));
        settle(&mut one, &mut store, Instant::ZERO);
        assert_eq!(holder(&store, &first), Ipv4Addr::new(192, 168, 0, 2));
        assert_eq!(holder(&store, &second), Ipv4Addr::new(192, 168, 0, 1));
        let peers: Vec<_> = one.leases().map(|(key, _)| key.to_string()).collect();
        assert_eq!(peers, [second]);
    }

    #[test]
    fn a_copy_of_a_node_that_is_alive_gives_way() {
        for has_gap in [false, true] {
            let mut store = Store::with_config(VXLAN);
            let mut node = manager(1);
            let subnet = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
            // More often than a record may be disputed: the node must not be worn down.
            for round in 0..3 * MAX_DISPUTES {
                let mut copy = returning(7, 1, &subnet);
                let changes = settle(&mut copy, &mut store, Instant::ZERO);
                assert_eq!(acquired(&changes), Some(subnet.clone()), "{round}");
                if has_gap {
                    node.watch_ended(Instant::ZERO);
                }
                let key = subnet.parse().unwrap();
                assert_eq!(
                    settle(&mut node, &mut store, Instant::ZERO),
                    [Change::Disputed(key), Change::Renewed]
                );
                let changes = settle(&mut copy, &mut store, Instant::ZERO);
                let [Change::Lost(loss @ Loss::Cloned { .. })] = &changes[..] else {
                    panic!("{changes:?}")
                };
                assert!(loss.to_string().contains("192.168.0.1"), "{loss}");
                assert_eq!(holder(&store, &subnet), Ipv4Addr::new(192, 168, 0, 1));
            }
            assert_eq!(node.phase, Phase::Hold);
        }
    }

    #[test]
    fn the_copy_keeps_the_subnet_if_the_first_was_dead_and_comes_back() {
        let mut store = Store::with_config(VXLAN);
        let subnet = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO)).unwrap();
        settle(&mut returning(7, 1, &subnet), &mut store, Instant::ZERO);
        // Started again, it holds a record under its own address and had it before.
        let mut copy = returning(7, 1, &subnet);
        settle(&mut copy, &mut store, Instant::ZERO);
        let mut back = returning(1, 1, &subnet);
        settle(&mut back, &mut store, Instant::ZERO);
        settle(&mut copy, &mut store, Instant::ZERO);
        let changes = settle(&mut back, &mut store, Instant::ZERO);
        assert!(matches!(changes[..], [Change::Lost(Loss::Cloned { .. })]));
        assert_eq!(holder(&store, &subnet), Ipv4Addr::new(192, 168, 0, 7));
        assert_eq!(copy.phase, Phase::Hold);
    }

    #[test]
    fn a_lease_of_another_vtep_under_our_address_is_reused_and_told() {
        let mut store = Store::with_config(VXLAN);
        let subnet = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO)).unwrap();
        let key = subnet.parse().unwrap();
        let mut other = returning(1, 9, "10.3.250.0/24");
        let changes = settle(&mut other, &mut store, Instant::ZERO);
        let vtep_mac = VtepMac::from_random([1; 6]);
        assert_eq!(
            changes[1..],
            [Change::Replaced { key, vtep_mac }, Change::Acquired(key)]
        );
        let changes = settle(&mut returning(1, 8, &subnet), &mut store, Instant::ZERO);
        assert_eq!(changes[1..], [Change::Acquired(key)], "we had it before");
    }

    #[test]
    fn a_record_follows_the_public_address() {
        for config in [VXLAN, CONFIG] {
            let mut store = Store::with_config(config);
            let mut manager = manager(1);
            let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
            manager.set_public_ip([192, 168, 0, 1].into());
            assert_eq!(settle(&mut manager, &mut store, Instant::ZERO), []);
            manager.set_public_ip([192, 168, 0, 77].into());
            assert_eq!(
                settle(&mut manager, &mut store, Instant::ZERO),
                [Change::Renewed]
            );
            assert_eq!(holder(&store, &subnet), Ipv4Addr::new(192, 168, 0, 77));
            // During a renewal, which still writes the old address.
            let later = Instant::ZERO + Duration::from_secs(50_000);
            let Action::Store(op) = manager.poll(later) else {
                panic!()
            };
            let answer = store.execute(op);
            manager.set_public_ip([192, 168, 0, 78].into());
            manager.answer(later, answer);
            settle(&mut manager, &mut store, later);
            assert_eq!(holder(&store, &subnet), Ipv4Addr::new(192, 168, 0, 78));
            assert_eq!(store.subnets().len(), 1);
            assert_eq!(manager.leases().count(), 0);
        }
    }

    #[test]
    fn records_of_the_old_and_the_new_address_change_sides() {
        let mut store = Store::with_config(CONFIG);
        // The lease of a node that has gone, and whose address we get.
        store.lease("10.3.9.0-24", [192, 168, 0, 9]);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        let (gone, ours) = ("10.3.9.0-24", "10.3.8.0-24");
        let (gone, ours) = (gone.parse().unwrap(), ours.parse().unwrap());
        store.lease("10.3.8.0-24", [192, 168, 0, 1]);
        assert_eq!(settle(&mut manager, &mut store, Instant::ZERO), []);
        manager.set_public_ip([192, 168, 0, 9].into());
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        assert_eq!(holder(&store, &subnet), Ipv4Addr::new(192, 168, 0, 9));
        let record = LeaseRecord::udp([192, 168, 0, 1].into());
        assert_eq!(changes.len(), 3, "{changes:?}");
        for change in [
            Change::Renewed,
            Change::PeerGone(gone),
            Change::Peer(ours, record),
        ] {
            assert!(changes.contains(&change), "{changes:?}");
        }
    }

    #[test]
    fn leaving_deletes_the_record() {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        settle(&mut manager, &mut store, Instant::ZERO);
        manager.leave();
        assert_eq!(
            settle(&mut manager, &mut store, Instant::ZERO),
            [Change::Left]
        );
        assert_eq!(store.subnets(), []);
    }

    fn proposal(network: &str) -> NetworkConfig {
        NetworkConfig::new(network.parse().unwrap(), None, Backend::Udp { port: 8285 }).unwrap()
    }

    fn wishing(last: u8, wish: Wish) -> Manager {
        let mut manager = manager(last);
        manager.settings.wish = wish;
        manager
    }

    #[test]
    fn a_wish_is_written_once_and_exact_ones_must_agree() {
        let (one, other) = (proposal("10.244.0.0/16"), proposal("10.9.0.0/16"));
        for first in [Wish::IfNone(one.clone()), Wish::Exactly(one.clone())] {
            let mut store = Store::default();
            let changes = settle(&mut wishing(1, first), &mut store, Instant::ZERO);
            assert_eq!(changes[0], Change::Configured(one.clone()));
            assert!(acquired(&changes).is_some());

            for agrees in [
                Wish::Any,
                Wish::IfNone(other.clone()),
                Wish::Exactly(one.clone()),
            ] {
                let changes = settle(&mut wishing(2, agrees), &mut store, Instant::ZERO);
                assert_eq!(changes[0], Change::Configured(one.clone()));
            }
            let mut second = wishing(3, Wish::Exactly(other.clone()));
            let changes = settle(&mut second, &mut store, Instant::ZERO);
            let [Change::Lost(loss)] = &changes[..] else {
                panic!("{changes:?}")
            };
            let text = loss.to_string();
            assert!(
                text.contains("10.244.0.0/16") && text.contains("10.9.0.0/16"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_network_whose_records_we_cannot_write_is_left_alone() {
        let mut store =
            Store::with_config(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"wireguard"}}"#);
        let changes = settle(&mut manager(1), &mut store, Instant::ZERO);
        let loss = Loss::OtherBackend("wireguard".to_owned());
        assert_eq!(changes, [Change::Lost(loss)]);
        assert_eq!(store.subnets(), []);
    }

    #[test]
    fn a_store_that_lost_the_answer_has_the_record_nevertheless() {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        let mut now = Instant::ZERO;
        // The first answer to each kind of write is lost.
        let (mut lost, mut is_renewal) = (Vec::new(), false);
        loop {
            match manager.poll(now) {
                Action::Store(op) => {
                    let kind = (std::mem::discriminant(&op), is_renewal);
                    let is_write = !matches!(op, Op::Get(_) | Op::List(_));
                    let answer = store.execute(op);
                    if is_write && !lost.contains(&kind) {
                        lost.push(kind);
                        manager.failed(now);
                    } else {
                        manager.answer(now, answer);
                    }
                }
                Action::Wait { until } => now = until,
                Action::Watch { .. } if is_renewal => manager.leave(),
                // The first watch has nothing to tell of what was written.
                Action::Watch { until, .. } => {
                    (now, is_renewal) = (until, until > now + TELLING);
                }
                Action::Stop => break,
            }
        }
        assert_eq!(lost.len(), 4, "Create, Put, Put of the renewal, Delete");
        assert_eq!(store.subnets(), []);
        let changes: Vec<_> = manager.changes().collect();
        assert!(acquired(&changes).is_some());
        assert!(changes.contains(&Change::Renewed));
        assert_eq!(changes.last(), Some(&Change::Left));
    }

    #[test]
    fn an_overlapping_lease_takes_a_subnet_whose_record_is_gone() {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        let key = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        store.lease("10.3.0.0-17", [192, 168, 0, 9]);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        assert!(matches!(changes[..], [Change::Peer(..)]), "{changes:?}");
        store.delete(&format!("{PREFIX}/subnets/{key}"));
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        let holder = Ipv4Addr::new(192, 168, 0, 9);
        assert_eq!(changes, [Change::Lost(Loss::Taken { key, holder })]);
        assert_eq!(store.subnets().len(), 1, "nothing is written any more");
    }

    #[test]
    fn what_happens_during_an_operation_is_not_lost() {
        let renewal = Instant::ZERO + Duration::from_secs(43_200);
        // (what happens to the record after the renewal, before its answer; what follows)
        for foreign in [false, true] {
            let mut store = Store::with_config(CONFIG);
            let mut manager = manager(1);
            let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
            let Action::Store(op) = manager.poll(renewal) else {
                panic!("it renews")
            };
            let before = store.revision;
            let answer = store.execute(op);
            if foreign {
                store.lease(&subnet, [192, 168, 0, 66]);
            } else {
                store.delete(&format!("{PREFIX}/subnets/{subnet}"));
            }
            for event in store.log.clone() {
                match &event {
                    WatchEvent::Put(entry) if entry.revision > before => {}
                    WatchEvent::Delete { revision, .. } if *revision > before => {}
                    _ => continue,
                }
                manager.event(renewal, event);
            }
            manager.answer(renewal, answer);
            let changes = settle(&mut manager, &mut store, renewal);
            if foreign {
                assert!(matches!(
                    changes.last(),
                    Some(Change::Lost(Loss::Taken { .. }))
                ));
            } else {
                assert_eq!(store.subnets(), [(subnet, Some(LEASE_TTL))]);
            }
        }
    }

    #[test]
    fn events_older_than_the_list_are_ignored() {
        let mut store = Store::with_config(CONFIG);
        store.lease("10.3.9.0-24", [192, 168, 0, 9]);
        store.delete(&format!("{PREFIX}/subnets/10.3.9.0-24"));
        let mut manager = manager(1);
        settle(&mut manager, &mut store, Instant::ZERO);
        for event in store.log.clone() {
            manager.event(Instant::ZERO, event);
        }
        assert_eq!(manager.changes().next(), None);
        assert_eq!(manager.leases().next(), None);
    }

    #[test]
    fn a_store_that_was_wiped_gets_our_record_again() {
        let mut store = Store::with_config(CONFIG);
        store.lease("10.3.9.0-24", [192, 168, 0, 9]);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        let mut store = Store::default();
        manager.watch_ended(Instant::ZERO);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        assert_eq!(changes, [Change::Renewed]);
        assert_eq!(store.subnets(), [(subnet, Some(LEASE_TTL))]);
        store.lease("10.3.8.0-24", [192, 168, 0, 8]);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        assert!(matches!(changes[..], [Change::Peer(..)]), "{changes:?}");
    }

    #[test]
    fn a_store_that_is_wiped_before_the_watch_is_read_again() {
        for others_write in [true, false] {
            let mut manager = manager(1);
            let mut store = Store::with_config(CONFIG);
            while let Action::Store(op) = manager.poll(Instant::ZERO) {
                manager.answer(Instant::ZERO, store.execute(op));
            }
            let held = store.subnets();
            // The new history has as many revisions as the watch asks for.
            let mut store = Store::with_config(CONFIG);
            if others_write {
                store.lease("10.3.9.0-24", [192, 168, 0, 9]);
                manager.event(Instant::ZERO, store.log.last().unwrap().clone());
            } else {
                let Action::Watch { until, .. } = manager.poll(Instant::ZERO) else {
                    panic!("no watch");
                };
                assert_eq!(until, Instant::ZERO + TELLING);
            }
            settle(&mut manager, &mut store, Instant::ZERO + TELLING);
            assert!(store.subnets().contains(&held[0]), "{others_write}");
            let Action::Watch { until, .. } = manager.poll(Instant::ZERO + TELLING) else {
                panic!("no watch");
            };
            assert!(until > Instant::ZERO + TELLING * 2, "it is told");
        }
    }

    #[test]
    fn a_store_that_is_wiped_again_before_our_record_is_there_is_read_again() {
        let wiped = |subnet| {
            let mut store = Store::with_config(CONFIG);
            store.lease(subnet, [192, 168, 0, 9]);
            store
        };
        let mut manager = manager(1);
        let mut now = Instant::ZERO;
        let mut store = wiped("10.3.7.0-24");
        store.lease("10.3.8.0-24", [192, 168, 0, 8]);
        settle(&mut manager, &mut store, now);
        manager.watch_ended(now);
        let Action::Store(list @ Op::List(_)) = manager.poll(now) else {
            panic!("no list");
        };
        manager.answer(now, wiped("10.3.8.0-24").execute(list));
        // This one's record has the revision that the list had.
        let mut store = wiped("10.3.9.0-24");
        settle(&mut manager, &mut store, now);
        now += REPUBLISHING;
        settle(&mut manager, &mut store, now);
        let peers: Vec<_> = manager.leases().map(|(key, _)| key.to_string()).collect();
        assert_eq!(peers, ["10.3.9.0-24"]);
        let Action::Watch { until, .. } = manager.poll(now) else {
            panic!("no watch");
        };
        assert!(until > now + REPUBLISHING, "once");
    }

    #[test]
    fn a_store_that_is_wiped_while_it_is_away_is_read_again() {
        for fails in [true, false] {
            let mut manager = manager(1);
            let mut store = Store::with_config(CONFIG);
            for _ in 0..3 {
                store.lease("10.3.9.0-24", [192, 168, 0, 9]);
            }
            let mut now = Instant::ZERO;
            let create = loop {
                match manager.poll(now) {
                    Action::Store(op @ Op::Create { .. }) => break op,
                    Action::Store(op) => manager.answer(now, store.execute(op)),
                    other => panic!("{other:?}"),
                }
            };
            // The watch would begin after our own record, which is not the first of the new history.
            let mut store = Store::with_config(CONFIG);
            store.lease("10.3.8.0-24", [192, 168, 0, 8]);
            if fails {
                for last in 5..8 {
                    store.lease(&format!("10.3.{last}.0-24"), [192, 168, 0, last]);
                }
                manager.failed(now);
                now += Duration::from_secs(60);
                assert_eq!(manager.poll(now), Action::Store(create.clone()));
            }
            let answer = store.execute(create);
            manager.answer(now, answer);
            settle(&mut manager, &mut store, now);
            let others = store.subnets().len() - 1;
            assert_eq!(manager.leases().count(), others, "fails: {fails}");
        }
    }

    #[test]
    fn a_value_that_cannot_be_read_is_no_peer_and_no_free_subnet() {
        let key = format!("{PREFIX}/subnets/10.3.1.0-24");
        for bad in [
            "rubbish",
            r#"{"PublicIP":7}"#,
            "{}",
            r#"{"PublicIP":"224.0.0.1"}"#,
            &"x".repeat(reader::MAX_VALUE + 1),
        ] {
            let mut store = Store::with_config(
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.2.0"}"#,
            );
            store.lease("10.3.1.0-24", [192, 168, 0, 9]);
            let mut one = manager(1);
            settle(&mut one, &mut store, Instant::ZERO);
            store.write(&key, bad, Some(LEASE_TTL));
            let changes = settle(&mut one, &mut store, Instant::ZERO);
            let [Change::Skipped { reason, .. }, Change::PeerGone(gone)] = &changes[..] else {
                panic!("{changes:?}")
            };
            assert!(reason.len() < 200, "{reason}");
            assert_eq!(gone.to_string(), "10.3.1.0-24");
            one.watch_ended(Instant::ZERO);
            let changes = settle(&mut one, &mut store, Instant::ZERO);
            assert_eq!(changes, [], "it is reported once");

            // Not chosen, not even as the subnet of an earlier run.
            let mut two = manager(2);
            two.settings.previous = Some("10.3.1.0/24".parse().unwrap());
            let changes = settle(&mut two, &mut store, Instant::ZERO);
            assert_eq!(changes.last(), Some(&Change::Lost(Loss::OutOfSubnets(2))));

            store.lease("10.3.1.0-24", [192, 168, 0, 9]);
            let changes = settle(&mut one, &mut store, Instant::ZERO);
            assert!(matches!(changes[..], [Change::Peer(..)]), "{changes:?}");
        }
    }

    #[test]
    fn a_peers_record_with_our_address_is_not_a_peer_any_more() {
        let mut store = Store::with_config(CONFIG);
        store.lease("10.3.200.0-24", [192, 168, 0, 9]);
        let mut manager = manager(1);
        settle(&mut manager, &mut store, Instant::ZERO);
        store.lease("10.3.200.0-24", [192, 168, 0, 1]);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        assert!(matches!(changes[..], [Change::PeerGone(_)]), "{changes:?}");
    }

    #[test]
    fn keys_outside_the_network_or_in_another_spelling_are_skipped() {
        let mut store = Store::with_config(CONFIG);
        for key in [
            "0.0.0.0-0",
            "10.4.0.0-24",
            "10.3.5.1-24",
            "10.3.5.0-024",
            "10.3.6.0-24&fd00:0::-64",
        ] {
            store.lease(key, [192, 168, 0, 9]);
        }
        let mut manager = manager(1);
        let changes = settle(&mut manager, &mut store, Instant::ZERO);
        let is_skip = |change: &&Change| matches!(change, Change::Skipped { .. });
        assert_eq!(changes.iter().filter(is_skip).count(), 5);
        assert_eq!(manager.leases().next(), None);
    }

    #[test]
    fn our_record_is_written_again_where_others_change_it() {
        for (value, ttl) in [
            ("rubbish", None),
            (
                r#"{"PublicIP":"192.168.0.1","BackendType":"x"}"#,
                Some(LEASE_TTL),
            ),
        ] {
            for gap in [false, true] {
                let mut store = Store::with_config(CONFIG);
                let mut manager = manager(1);
                let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
                let key = format!("{PREFIX}/subnets/{subnet}");
                store.write(&key, value, ttl);
                if gap {
                    manager.watch_ended(Instant::ZERO);
                }
                let changes = settle(&mut manager, &mut store, Instant::ZERO);
                assert!(
                    changes
                        .iter()
                        .any(|change| matches!(change, Change::Disputed(_)))
                );
                assert_eq!(changes.last(), Some(&Change::Renewed));
                assert_eq!(store.entries[&key].value, manager.record().to_json());
                assert_eq!(store.entries[&key].ttl, Some(LEASE_TTL));
            }
        }
    }

    #[test]
    fn two_nodes_with_one_address_do_not_fight_for_ever() {
        let config = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#;
        let mut store = Store::with_config(config);
        let mut twins = [manager(1), manager(1)];
        twins[1].settings.identity.vtep_mac = VtepMac::from_random([9; 6]);
        let mut now = Instant::ZERO;
        let mut lost = Vec::new();
        for _ in 0..100 {
            for twin in &mut twins {
                lost.extend(
                    settle(twin, &mut store, now)
                        .into_iter()
                        .filter(|change| matches!(change, Change::Lost(Loss::Disputed { .. }))),
                );
                now += Duration::from_secs(1);
            }
        }
        assert_eq!(lost.len(), 1, "{lost:?}");
        assert!(store.revision < 50, "{} writes", store.revision);
    }

    #[test]
    fn a_record_that_was_made_a_reservation_is_not_renewed() {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        let value = manager.record().to_json();
        store.write(&format!("{PREFIX}/subnets/{subnet}"), &value, None);
        settle(&mut manager, &mut store, Instant::ZERO);
        let later = Instant::ZERO + Duration::from_secs(500_000);
        assert_eq!(settle(&mut manager, &mut store, later), []);
        let Action::Watch { until, .. } = manager.poll(later) else {
            panic!("it holds")
        };
        assert!(until > later, "no busy loop");
        manager.leave();
        let changes = settle(&mut manager, &mut store, later);
        assert_eq!(changes, [Change::Left]);
        assert_eq!(store.subnets(), [(subnet, None)]);
    }

    #[test]
    fn a_record_that_was_given_a_short_life_is_renewed_in_time() {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        let value = manager.record().to_json();
        let short = Some(std::time::Duration::from_secs(60));
        store.write(&format!("{PREFIX}/subnets/{subnet}"), &value, short);
        settle(&mut manager, &mut store, Instant::ZERO);
        let later = Instant::ZERO + Duration::from_secs(30);
        assert_eq!(settle(&mut manager, &mut store, later), [Change::Renewed]);
        assert_eq!(store.subnets(), [(subnet, Some(LEASE_TTL))]);
    }

    #[test]
    fn leaving_sees_a_write_through_that_is_in_flight() {
        for answered in [false, true] {
            let mut store = Store::with_config(CONFIG);
            let mut manager = manager(1);
            let now = Instant::ZERO;
            let op = loop {
                match manager.poll(now) {
                    Action::Store(op @ Op::Create { .. }) => break op,
                    Action::Store(op) => manager.answer(now, store.execute(op)),
                    other => panic!("{other:?}"),
                }
            };
            manager.leave();
            manager.leave();
            let answer = store.execute(op);
            if answered {
                manager.answer(now, answer);
            } else {
                manager.failed(now);
            }
            let changes = settle(&mut manager, &mut store, now);
            assert_eq!(changes.last(), Some(&Change::Left));
            assert_eq!(store.subnets(), []);
            manager.leave();
            assert_eq!(manager.changes().next(), None, "nothing follows");
        }
        let mut early = manager(1);
        early.leave();
        assert_eq!(early.changes().collect::<Vec<_>>(), [Change::Left]);
        assert_eq!(early.poll(Instant::ZERO), Action::Stop);
    }

    #[test]
    fn a_store_that_contradicts_itself_is_not_asked_in_a_loop() {
        let mut now = Instant::ZERO;
        let mut manager = wishing(1, Wish::IfNone(proposal("10.244.0.0/16")));
        let mut operations = 0;
        while now < Instant::ZERO + Duration::from_secs(60) {
            match manager.poll(now) {
                Action::Store(Op::Get(_)) => manager.answer(now, Answer::Value(None)),
                Action::Store(_) => manager.answer(now, Answer::Conflict),
                Action::Wait { until } => now = until,
                other => panic!("{other:?}"),
            }
            operations += 1;
        }
        assert!(operations < 150, "{operations}");
        let mut manager = wishing(1, Wish::Any);
        let mut delays = Vec::new();
        for _ in 0..10 {
            assert!(matches!(manager.poll(now), Action::Store(_)));
            manager.answer(now, Answer::Done(1));
            let Action::Wait { until } = manager.poll(now) else {
                panic!()
            };
            delays.push((until - now).total_millis());
            now = until;
        }
        assert!(delays[9] >= 2500, "{delays:?}");
    }

    #[test]
    fn lists_that_lag_behind_the_watch_are_asked_for_later_and_later() {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        // A member of the store that answers lists has not heard of what the watch tells.
        let answer = store.execute(Op::List(format!("{PREFIX}/subnets")));
        let key = format!("{PREFIX}/subnets/{subnet}");
        let revision = store.revision + 1;
        let deletion = WatchEvent::Delete { key, revision };
        let mut now = Instant::ZERO;
        let mut lists = 0;
        while now < Instant::ZERO + Duration::from_secs(60) && lists < 1000 {
            match manager.poll(now) {
                Action::Store(Op::List(_)) => {
                    lists += 1;
                    manager.answer(now, answer.clone());
                }
                Action::Wait { until } => now = until,
                Action::Watch { from, .. } if from == revision => {
                    manager.event(now, deletion.clone());
                }
                other => panic!("{other:?}"),
            }
        }
        assert!((10..60).contains(&lists), "{lists}");
    }

    #[test]
    fn watches_that_end_at_once_are_opened_later_and_later() {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        settle(&mut manager, &mut store, Instant::ZERO);
        let mut now = Instant::ZERO;
        let mut watches = 0;
        while now < Instant::ZERO + Duration::from_secs(60) {
            match manager.poll(now) {
                Action::Store(op) => manager.answer(now, store.execute(op)),
                Action::Wait { until } => now = until,
                Action::Watch { .. } => {
                    watches += 1;
                    manager.watch_ended(now);
                }
                Action::Stop => panic!(),
            }
        }
        assert!((10..60).contains(&watches), "{watches}");
    }

    #[test]
    fn a_large_network_is_searched_in_one_pass() {
        let config = r#"{"Network":"10.0.0.0/8","SubnetLen":30}"#;
        let mut store = Store::with_config(config);
        for index in 0..20_000u32 {
            let base = Ipv4Addr::from(0x0a00_0000 + index * 4);
            store.lease(&format!("{base}-30"), [192, 168, 0, 9]);
        }
        store.lease("10.1.56.128-25", [192, 168, 0, 9]);
        let mut manager = manager(1);
        let key = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        let config = NetworkConfig::parse(config).unwrap();
        assert_eq!(manager.free_subnets(&config)[0].to_string(), "10.1.57.0/30");
        assert!(key.starts_with("10.1.5"), "{key}");
    }

    #[test]
    fn a_store_that_is_away_is_asked_again_later_and_later() {
        let mut manager = manager(1);
        let mut now = Instant::ZERO;
        let mut delays = Vec::new();
        for _ in 0..20 {
            assert!(matches!(manager.poll(now), Action::Store(_)));
            manager.failed(now);
            let Action::Wait { until } = manager.poll(now) else {
                panic!()
            };
            delays.push((until - now).total_millis());
            now = until;
        }
        assert!((50..=100).contains(&delays[0]), "{delays:?}");
        assert!(
            delays[10..]
                .iter()
                .all(|delay| (2500..=5000).contains(delay)),
            "{delays:?}"
        );
    }
}
