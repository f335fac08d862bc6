//! The rules of having a lease, as a state machine with one operation in flight.
//!
//! The caller asks [`Manager::poll`] what to do, does it, gives the answer to [`Manager::answer`],
//! and drains [`Manager::changes`]. Compatible with flannel, and stricter: nothing is written over
//! another owner's record, a lost race is tried again, keys that do not expire (reservations) stay
//! so, and after a gap in the watch the tables are compared by value.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use muslin_encap::vxlan::VtepMac;
use smoltcp::time::{Duration, Instant};
use thiserror::Error;

use super::config::Backend;
use super::{
    Answer, ConfigError, Entry, LeaseRecord, NetworkConfig, Op, Revision, SubnetKey, WatchEvent,
};
use crate::hash::Seed;

/// How long a lease lives without renewal: flannel's 24 hours.
pub const LEASE_TTL: std::time::Duration = std::time::Duration::from_secs(86_400);

/// Free subnets among which one is chosen, as flannel does.
const CANDIDATES: usize = 100;
/// Lost races after which the manager gives up.
const MAX_RACES: u32 = 50;
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

/// What a manager is told at its start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who the node is.
    pub identity: Identity,
    /// Where the store has flannel's keys, without a trailing slash.
    pub prefix: String,
    /// The subnet of an earlier run.
    pub previous: Option<Ipv4Net>,
    /// The configuration to write if the store has none.
    pub proposal: Option<NetworkConfig>,
    /// Unpredictable.
    pub random_seed: u64,
}

/// What the caller is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Execute this on the store and give the answer, or the error.
    Store(Op),
    /// Watch all leases from this revision on, until it is due to poll again.
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
    /// The configuration is known.
    Configured(NetworkConfig),
    /// The node has this subnet.
    Acquired(SubnetKey),
    /// The lease lives on.
    Renewed,
    /// A peer is new or has changed.
    Peer(SubnetKey, LeaseRecord),
    /// A peer's lease has ended.
    PeerGone(SubnetKey),
    /// A key under the prefix is no lease; it is skipped.
    Skipped {
        /// The key.
        key: String,
        /// Why.
        reason: String,
    },
    /// The lease is given back.
    Left,
    /// There is no lease (any more), and there will not be one.
    Lost(Loss),
}

/// Why a node has no lease.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Loss {
    /// The configuration cannot be used.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The store has no configuration, and none was proposed.
    #[error("the store has no network configuration under {0}")]
    NoConfig(String),
    /// The store's configuration is not the one asked for.
    #[error("the store has the network {stored}, but {asked} was asked for")]
    OtherConfig {
        /// What the store has.
        stored: String,
        /// What was asked for.
        asked: String,
    },
    /// All subnets are leased.
    #[error("all {0} subnets of the network are leased")]
    OutOfSubnets(usize),
    /// Others were faster every time.
    #[error("other nodes took every subnet that was tried")]
    Races,
    /// Another node holds the subnet now.
    #[error("the subnet {key} is now held by the node {holder}")]
    Taken {
        /// The lease.
        key: String,
        /// The public address of its holder.
        holder: Ipv4Addr,
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
    own: Option<Own>,
    /// The first revision not seen yet.
    watch_from: Revision,
    retry: Option<Instant>,
    failures: u32,
    races: u32,
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
}

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
            own: None,
            watch_from: 0,
            retry: None,
            failures: 0,
            races: 0,
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
            if self.leaving {
                self.phase = Phase::Delete(own.key, own.revision);
            } else if own.renew_at <= now && !own.reservation {
                self.phase = Phase::Put(own.key, own.revision, false);
            }
        }
        match &self.phase {
            Phase::Over => Action::Stop,
            Phase::ReadConfig => Action::Store(Op::Get(self.config_key())),
            Phase::WriteConfig => Action::Store(Op::Create {
                key: self.config_key(),
                value: self
                    .settings
                    .proposal
                    .as_ref()
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
                until: self
                    .own
                    .map_or(now + LAST_RETRY, |own| own.renew_at.max(now)),
            },
        }
    }

    /// Takes the answer to the operation of the last poll.
    pub fn answer(&mut self, now: Instant, answer: Answer) {
        self.failures = 0;
        match (self.phase.clone(), answer) {
            (Phase::ReadConfig, Answer::Value(entry)) => self.read_config(entry),
            (Phase::WriteConfig, Answer::Done(_) | Answer::Conflict) => {
                self.phase = Phase::ReadConfig;
            }
            (Phase::List, Answer::Snapshot { revision, entries }) => {
                self.snapshot(now, revision, entries);
            }
            (Phase::Create(key), Answer::Done(revision)) => self.hold(now, key, revision, false),
            (Phase::Create(_), Answer::Conflict) => self.lost_race(now),
            (Phase::Put(key, _, reservation), Answer::Done(revision)) => {
                self.hold(now, key, revision, reservation);
            }
            (Phase::Delete(..), Answer::Done(_)) if self.leaving => {
                self.changes.push_back(Change::Left);
                self.phase = Phase::Over;
            }
            // Somebody wrote our record, or it has expired: look again.
            (Phase::Put(..) | Phase::Delete(..), _) => self.phase = Phase::List,
            (phase, _) => {
                // An answer of another kind is a store's defect; ask again, not too soon.
                self.phase = phase;
                self.failed(now);
            }
        }
    }

    /// The store did not answer; the operation is tried again later.
    pub fn failed(&mut self, now: Instant) {
        let factor = 1u64 << self.failures.min(6);
        self.failures = self.failures.saturating_add(1);
        let delay = FIRST_RETRY.total_millis().saturating_mul(factor);
        let delay = delay.min(LAST_RETRY.total_millis());
        // Between half and all of it, so that many nodes do not come back together.
        let jitter = self.random_below(delay / 2 + 1);
        self.retry = Some(now + Duration::from_millis(delay / 2 + jitter));
    }

    /// Takes a change that the watch reports.
    pub fn event(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Put(entry) => {
                self.watch_from = self.watch_from.max(entry.revision + 1);
                self.put(entry);
            }
            WatchEvent::Delete { key, revision } => {
                self.watch_from = self.watch_from.max(revision + 1);
                self.deleted(&key, revision);
            }
        }
    }

    /// The watch has ended, or has a gap: everything is read again.
    pub fn watch_ended(&mut self) {
        if self.phase == Phase::Hold {
            self.phase = Phase::List;
        }
    }

    /// Gives the lease back and stops.
    pub fn leave(&mut self) {
        self.leaving = true;
        if self.own.is_none() {
            self.phase = Phase::Over;
            self.changes.push_back(Change::Left);
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

    /// The record of this node.
    #[must_use]
    pub fn record(&self) -> LeaseRecord {
        let Identity {
            public_ip,
            vtep_mac,
        } = self.settings.identity;
        match self.config.as_ref().map(|config| &config.backend) {
            Some(Backend::Vxlan(vxlan)) => LeaseRecord::vxlan(public_ip, vxlan.vni, vtep_mac),
            Some(Backend::Udp { .. } | Backend::Other(_)) | None => LeaseRecord::udp(public_ip),
        }
    }

    fn read_config(&mut self, entry: Option<Entry>) {
        let Some(entry) = entry else {
            if self.settings.proposal.is_some() {
                self.phase = Phase::WriteConfig;
            } else {
                self.lose(Loss::NoConfig(self.config_key()));
            }
            return;
        };
        match NetworkConfig::parse(&entry.value) {
            Err(error) => self.lose(error.into()),
            Ok(config) => match &self.settings.proposal {
                Some(asked) if *asked != config => {
                    let (stored, asked) = (config.to_string(), asked.to_string());
                    self.lose(Loss::OtherConfig { stored, asked });
                }
                Some(_) | None => {
                    self.config = Some(config.clone());
                    self.changes.push_back(Change::Configured(config));
                    self.phase = Phase::List;
                }
            },
        }
    }

    /// Compares what the store has with what we believed, and looks for our own lease.
    fn snapshot(&mut self, now: Instant, revision: Revision, entries: Vec<Entry>) {
        self.watch_from = revision + 1;
        let mut found = BTreeMap::new();
        let mut own = Vec::new();
        for entry in entries {
            let Some((key, record)) = self.parse(&entry) else {
                continue;
            };
            if record.public_ip == self.settings.identity.public_ip {
                own.push((key, entry, record));
            } else {
                found.insert(key, record);
            }
        }
        let gone: Vec<_> = self
            .leases
            .keys()
            .filter(|key| !found.contains_key(*key))
            .collect();
        self.changes
            .extend(gone.into_iter().map(|key| Change::PeerGone(*key)));
        for (key, record) in &found {
            if self.leases.get(key) != Some(record) {
                self.changes.push_back(Change::Peer(*key, record.clone()));
            }
        }
        self.leases = found;
        match self.own {
            Some(held) => self.check_own(now, held, own),
            None => self.choose(now, &own),
        }
    }

    /// After a gap in the watch: do we still have what we had?
    fn check_own(&mut self, now: Instant, held: Own, own: Vec<(SubnetKey, Entry, LeaseRecord)>) {
        if let Some((_, entry, record)) = own.iter().find(|(key, ..)| *key == held.key) {
            if *record != self.record() {
                self.phase = Phase::Put(held.key, entry.revision, held.reservation);
                return;
            }
            let own = Own {
                revision: entry.revision,
                ..held
            };
            self.own = Some(own);
            self.phase = Phase::Hold;
        } else if let Some(record) = self.leases.get(&held.key) {
            let holder = record.public_ip;
            self.lose(Loss::Taken {
                key: held.key.to_string(),
                holder,
            });
        } else if self.overlaps(held.key.ipv4) {
            self.own = None;
            self.choose(now, &own);
        } else {
            // The store was wiped, or the lease has expired: publish it again.
            self.phase = Phase::Create(held.key);
        }
    }

    fn choose(&mut self, now: Instant, own: &[(SubnetKey, Entry, LeaseRecord)]) {
        let Some(config) = self.config.clone() else {
            self.phase = Phase::ReadConfig;
            return;
        };
        if let Some((key, entry, record)) = own.first() {
            let (reservation, unchanged) = (entry.ttl.is_none(), *record == self.record());
            if !config.allows(key.ipv4) || key.ipv6.is_some() {
                self.phase = Phase::Delete(*key, entry.revision);
            } else if reservation && unchanged {
                self.hold(now, *key, entry.revision, true);
            } else {
                self.phase = Phase::Put(*key, entry.revision, reservation);
            }
            return;
        }
        let previous = self.settings.previous.map(|previous| previous.trunc());
        let previous = previous.filter(|net| config.allows(*net) && !self.overlaps(*net));
        let subnet = previous.or_else(|| {
            let free = config.subnets().filter(|subnet| !self.overlaps(*subnet));
            let free: Vec<_> = free.take(CANDIDATES).collect();
            let index = self.random_below(free.len() as u64);
            free.get(index as usize).copied()
        });
        match subnet {
            Some(subnet) => self.phase = Phase::Create(SubnetKey::new(subnet)),
            None => self.lose(Loss::OutOfSubnets(config.subnets().count())),
        }
    }

    fn lost_race(&mut self, now: Instant) {
        self.phase = Phase::List;
        self.races += 1;
        if self.races >= MAX_RACES {
            self.lose(Loss::Races);
        } else if self.races > 3 {
            self.failed(now);
        }
    }

    fn hold(&mut self, now: Instant, key: SubnetKey, revision: Revision, reservation: bool) {
        let renew_at = now + Duration::from_millis(LEASE_TTL.as_millis() as u64 / 2);
        let is_new = self.own.is_none_or(|own| own.key != key);
        self.own = Some(Own {
            key,
            revision,
            reservation,
            renew_at,
        });
        self.races = 0;
        self.phase = Phase::Hold;
        self.changes.push_back(if is_new {
            Change::Acquired(key)
        } else {
            Change::Renewed
        });
    }

    fn put(&mut self, entry: Entry) {
        let Some((key, record)) = self.parse(&entry) else {
            return;
        };
        if let Some(own) = &mut self.own
            && own.key == key
        {
            if record.public_ip == self.settings.identity.public_ip {
                own.revision = own.revision.max(entry.revision);
            } else if entry.revision > own.revision {
                let holder = record.public_ip;
                self.lose(Loss::Taken {
                    key: key.to_string(),
                    holder,
                });
            }
        } else if record.public_ip != self.settings.identity.public_ip
            && self.leases.get(&key) != Some(&record)
        {
            self.leases.insert(key, record.clone());
            self.changes.push_back(Change::Peer(key, record));
        }
    }

    fn deleted(&mut self, key: &str, revision: Revision) {
        let Some(key) = self.subnet_key(key) else {
            return;
        };
        if let Some(own) = self.own
            && own.key == key
        {
            if revision > own.revision && self.phase == Phase::Hold && !self.leaving {
                self.phase = Phase::Create(key);
            }
        } else if self.leases.remove(&key).is_some() {
            self.changes.push_back(Change::PeerGone(key));
        }
    }

    fn parse(&mut self, entry: &Entry) -> Option<(SubnetKey, LeaseRecord)> {
        let skipped = |reason: &dyn fmt::Display| Change::Skipped {
            key: entry.key.clone(),
            reason: reason.to_string(),
        };
        let Some(key) = self.subnet_key(&entry.key) else {
            self.changes.push_back(skipped(&"its name is not a subnet"));
            return None;
        };
        match LeaseRecord::parse(&entry.value) {
            Ok(record) => Some((key, record)),
            Err(error) => {
                self.changes.push_back(skipped(&error));
                None
            }
        }
    }

    fn overlaps(&self, subnet: Ipv4Net) -> bool {
        self.leases
            .keys()
            .any(|key| key.ipv4.contains(&subnet.network()) || subnet.contains(&key.ipv4.network()))
    }

    fn lose(&mut self, loss: Loss) {
        self.phase = Phase::Over;
        self.changes.push_back(Change::Lost(loss));
    }

    fn random_below(&mut self, bound: u64) -> u64 {
        use std::hash::BuildHasher;
        self.random = Seed(self.random).hash_one(bound);
        if bound == 0 { 0 } else { self.random % bound }
    }

    fn config_key(&self) -> String {
        format!("{}/config", self.settings.prefix)
    }

    fn lease_prefix(&self) -> String {
        format!("{}/subnets", self.settings.prefix)
    }

    fn lease_key(&self, key: SubnetKey) -> String {
        format!("{}/{key}", self.lease_prefix())
    }

    fn subnet_key(&self, key: &str) -> Option<SubnetKey> {
        key.strip_prefix(&self.lease_prefix())?
            .strip_prefix('/')?
            .parse()
            .ok()
    }
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
            proposal: None,
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
                        manager.event(event);
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
        manager.watch_ended();
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

    #[test]
    fn the_configuration_is_proposed_once_and_must_agree() {
        let proposal = |network: &str| {
            NetworkConfig::new(network.parse().unwrap(), None, Backend::Udp { port: 8285 })
        };
        let mut store = Store::default();
        let mut first = manager(1);
        first.settings.proposal = Some(proposal("10.244.0.0/16").unwrap());
        assert!(acquired(&settle(&mut first, &mut store, Instant::ZERO)).is_some());
        let mut second = manager(2);
        second.settings.proposal = Some(proposal("10.9.0.0/16").unwrap());
        let changes = settle(&mut second, &mut store, Instant::ZERO);
        let [Change::Lost(loss)] = &changes[..] else {
            panic!("{changes:?}")
        };
        let text = loss.to_string();
        assert!(
            text.contains("10.244.0.0/16") && text.contains("10.9.0.0/16"),
            "{text}"
        );
        let changes = settle(&mut manager(3), &mut Store::default(), Instant::ZERO);
        assert!(matches!(changes[..], [Change::Lost(Loss::NoConfig(_))]));
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
