//! The rules of having a lease, as a state machine with one operation in flight.
//!
//! The caller asks [`Manager::poll`] what to do, does it, gives the answer to [`Manager::answer`],
//! and drains [`Manager::changes`]. Compatible with flannel, and stricter: nothing is written over
//! another owner's record, a lost race is tried again, keys that do not expire (reservations) stay
//! so, and after a gap in the watch the tables are compared by value.
//!
//! Events may arrive while an operation is in flight, and an answer may be lost after the store
//! has done what was asked. Neither is guessed about: what an answer leaves open, a list tells.
//! While a list is in flight events are ignored, and the watch is reopened after it.
//!
//! A record that is new to others is written several times where flannel's nodes may watch, which lose
//! changes (`repetition.rs`).
//!
//! A key whose value cannot be read is no peer: what it was before ends, its subnet is not chosen,
//! and it is reported once per writing. If it is our own key, it is written again.
//!
//! Here are the phases of having a lease. Machines of their own say how long the store is left alone
//! after a failure (`backoff.rs`), whose record it is (`ownership.rs`), when all leases are read again
//! (`relist.rs`), and which leases others have (`view.rs`).

mod backoff;
mod own;
mod ownership;
mod random;
mod relist;
mod view;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use backoff::Backoff;
use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_encap::tunnel::wireguard::PublicKey;
use own::{Own, OwnEntry};
use ownership::{Contest, Ownership, TakeOver};
use random::Random;
use relist::Relist;
use smoltcp::time::{Duration, Instant};
use view::View;

use super::change::{Change, ConfigFault, Loss, OwnChange};
use super::config::{Backend, NetworkConfig};
use super::key::SubnetKey;
use super::reader::{self, NoLease};
use super::record::{LeaseRecord, TunnelEnd};
use super::repetition::Repetition;
use super::settings::{LEASE_TTL, ManagerSettings, WantedConfig};
use super::text::shorten;
use crate::control::kv::{Action, Answer, Entry, Op, Revision, WatchEvent};

/// The longest margin, as flannel has it: a lease lives for a minute at least before it is renewed.
const MAX_RENEW_MARGIN: std::time::Duration = std::time::Duration::from_secs(1_439 * 60);
/// After so long no store answers: whoever still gets an answer has stood still.
const LATE: Duration = Duration::from_secs(60);
/// Interval of requests for a missing configuration, as in flannel.
const CONFIG_RETRY: Duration = Duration::from_secs(1);
/// A lease that others let run out earlier is not renewed in a loop.
const SHORTEST_RENEWAL: Duration = Duration::from_secs(1);
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    ReadConfig,
    WriteConfig,
    List,
    /// Create the record of a subnet believed free.
    Create(SubnetKey),
    /// Write our record under another key, of which it has a subnet: in the place of that of the
    /// revision, and without an end if it is a reservation.
    Replace(SubnetKey, (SubnetKey, Revision), bool),
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
    /// Where the store has flannel's keys.
    prefix: String,
    wanted_config: WantedConfig,
    renew_margin: std::time::Duration,
    repeats: bool,
    config: Option<NetworkConfig>,
    phase: Phase,
    /// When the operation in flight was asked for.
    asked: Option<Instant>,
    view: View,
    own: Option<Own>,
    relist: Relist,
    backoff: Backoff,
    ownership: Ownership,
    checksums: Checksums,
    /// Why there is no IPv6 subnet, where that is not for want of an address.
    no_ipv6: Option<String>,
    multicast: bool,
    /// Why the configuration that the store had last cannot be used.
    config_fault: Option<ConfigFault>,
    leaving: bool,
    repetition: Repetition,
    random: Random,
    changes: VecDeque<Change>,
}

impl Manager {
    /// A manager that has not spoken to the store yet.
    #[must_use]
    pub fn new(settings: ManagerSettings) -> Self {
        let ManagerSettings {
            identity,
            checksums,
            multicast,
            prefix,
            previous,
            previous_ipv6,
            wanted_config,
            renew_margin,
            repeats,
            random_seed,
        } = settings;
        Self {
            view: View::new(prefix.clone()),
            prefix,
            wanted_config,
            renew_margin,
            repeats,
            random: Random::new(random_seed),
            config: None,
            phase: Phase::ReadConfig,
            asked: None,
            own: None,
            relist: Relist::default(),
            backoff: Backoff::default(),
            ownership: Ownership::new(identity, previous).with_previous_ipv6(previous_ipv6),
            checksums,
            no_ipv6: None,
            multicast,
            config_fault: None,
            leaving: false,
            repetition: Repetition::default(),
            changes: VecDeque::new(),
        }
    }

    /// What to do at `now`. The same until it is done.
    pub fn poll(&mut self, now: Instant) -> Action {
        if self.phase == Phase::Over {
            return Action::Stop;
        }
        if let Some(until) = self.backoff.poll(now) {
            return Action::Wait { until };
        }
        if self.phase == Phase::Hold
            && let Some(own) = self.own
        {
            if self.leaving && own.reservation {
                self.end(OwnChange::Left);
            } else if self.leaving {
                self.phase = Phase::Delete(own.key, own.revision);
            } else if own.renew_at <= now && !own.reservation {
                self.phase = Phase::Put(own.key, own.revision, false);
            } else if self.repetition.is_due(now, self.view.len()) {
                self.phase = Phase::Put(own.key, own.revision, own.reservation);
            } else if self.relist.due(self.own).is_some_and(|at| at <= now) {
                self.phase = Phase::List;
            }
        }
        self.asked = match self.phase {
            Phase::Over | Phase::Hold => None,
            _ => self.asked.or(Some(now)),
        };
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
            Phase::Create(key) => Action::Store(self.claim(*key, None, false)),
            Phase::Replace(key, old, reservation) => {
                Action::Store(self.claim(*key, Some(*old), *reservation))
            }
            Phase::Put(key, expected, reservation) => Action::Store(Op::CompareAndPut {
                key: self.lease_key(*key),
                value: self.record_of(*key).to_json(),
                expected: *expected,
                ttl: (!reservation).then_some(LEASE_TTL),
            }),
            Phase::Delete(key, expected) => Action::Store(Op::CompareAndDelete {
                key: self.lease_key(*key),
                expected: *expected,
            }),
            Phase::Hold => Action::Watch {
                from: self.relist.watch_from(),
                until: self.next_deadline(now),
            },
        }
    }

    /// Takes the answer to the operation of the last poll.
    pub fn answer(&mut self, now: Instant, answer: Answer) {
        if self.asked.take().is_some_and(|asked| asked + LATE < now) {
            // The process stood still, and the store may have been wiped meanwhile. What a list says
            // is of before that; what was written is still to be put in order.
            self.relist.require();
            if self.phase == Phase::List {
                return;
            }
        }
        match (self.phase.clone(), answer) {
            (Phase::ReadConfig, Answer::Value(entry)) => self.read_config(now, entry),
            (Phase::WriteConfig, Answer::Done(_)) => self.phase = Phase::ReadConfig,
            (Phase::WriteConfig, Answer::Conflict) => self.look_again(now, Phase::ReadConfig),
            (Phase::List, Answer::Snapshot { revision, entries }) => {
                self.snapshot(now, revision, entries);
            }
            (Phase::Create(key), Answer::Done(revision)) => {
                self.relist.written(revision);
                self.hold(now, key, revision, false);
            }
            (Phase::Replace(key, (old, _), reservation), Answer::Done(revision)) => {
                self.relist.written(revision);
                self.report(OwnChange::Changed { from: old, to: key });
                self.hold(now, key, revision, reservation);
            }
            (Phase::Create(_) | Phase::Replace(..), Answer::Conflict) => self.lost_race(now),
            (Phase::Put(key, _, reservation), Answer::Done(revision)) => {
                self.relist.written(revision);
                self.hold(now, key, revision, reservation);
            }
            (Phase::Delete(..), Answer::Done(_)) if self.leaving => self.end(OwnChange::Left),
            (Phase::Delete(..), Answer::Done(_)) => self.phase = Phase::List,
            // Somebody wrote our record, or it has expired, or an answer of ours was lost.
            (Phase::Put(..) | Phase::Delete(..), Answer::Conflict) => {
                self.look_again(now, Phase::List);
            }
            (Phase::Over | Phase::Hold, _) => {}
            // An answer of another kind is a store's defect; ask again, later and later.
            (_, _) => return self.failed(now),
        }
        self.backoff.answered();
    }

    /// The store did not answer, or refused; the operation is tried again later.
    pub fn failed(&mut self, now: Instant) {
        self.asked = None;
        // Until it answers again, the last list may predate a reset of the store.
        self.relist.require();
        if self.repetition.next().is_some() {
            // When it is back many write at once, and what is due now would be one of them only.
            self.expect_news();
        }
        let creates = matches!(self.phase, Phase::Create(_) | Phase::Replace(..));
        if creates {
            // It may have done it nevertheless, or have a subnet for us that it does not refuse. When
            // we are leaving only the former counts.
            self.phase = Phase::List;
        }
        self.backoff.failed(now, creates, &mut self.random);
    }

    /// Takes a change that the watch reports.
    pub fn event(&mut self, now: Instant, event: WatchEvent) {
        let (WatchEvent::Put(Entry { key, revision, .. }) | WatchEvent::Delete { key, revision }) =
            &event;
        let revision = *revision;
        if self.relist.has_seen(revision) || matches!(self.phase, Phase::Over | Phase::List) {
            return;
        }
        // A record that has taken the place of another ends that in the same step.
        let is_end = matches!(event, WatchEvent::Delete { .. });
        let is_key_of = |own: Own| is_end || *key == self.lease_key(own.key);
        if self
            .relist
            .is_another_history(self.own, is_key_of, revision)
        {
            return self.read_again();
        }
        self.relist.reported(revision);
        match event {
            WatchEvent::Put(entry) => self.written(now, &entry),
            WatchEvent::Delete { key, revision } => self.deleted(&key, revision),
        }
    }

    /// Reads everything again, as soon as an operation that is under way is over.
    fn read_again(&mut self) {
        match self.phase {
            Phase::Hold => self.phase = Phase::List,
            _ => self.relist.require(),
        }
    }

    /// The watch has ended, or has a gap: everything is read again.
    pub fn watch_ended(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Over | Phase::List) {
            return;
        }
        self.read_again();
        self.backoff.watch_ended(now, &mut self.random);
    }

    /// Gives the lease back and stops. A reservation stays in the store.
    pub fn leave(&mut self) {
        if self.leaving || self.phase == Phase::Over {
            return;
        }
        self.leaving = true;
        self.backoff.reset();
        let writes = matches!(
            self.phase,
            Phase::Create(_) | Phase::Replace(..) | Phase::Put(..) | Phase::Delete(..)
        );
        if self.own.is_none() && !writes {
            self.end(OwnChange::Left);
        }
    }

    /// The node's public address is another one now: its record moves there, with the same subnet.
    pub fn set_public_ip(&mut self, public_ip: Ipv4Addr) {
        if !self.ownership.set_public_ip(public_ip) {
            return;
        }
        // A list tells whose records are peers' now, and whether the operation in flight has written
        // the old address.
        self.relist.require();
        self.expect_news();
        if let (Phase::Hold, Some(own)) = (&self.phase, self.own) {
            self.phase = Phase::Put(own.key, own.revision, own.reservation);
        }
    }

    /// The same of the node's public IPv6 address. A node that has no IPv6 subnet gets none before it
    /// begins anew.
    pub fn set_public_ipv6(&mut self, public_ipv6: Ipv6Addr) {
        if !self.ownership.set_public_ipv6(Some(public_ipv6)) {
            return;
        }
        self.relist.require();
        if let (Phase::Hold, Some(own)) = (&self.phase, self.own)
            && own.key.ipv6().is_some()
        {
            self.expect_news();
            self.phase = Phase::Put(own.key, own.revision, own.reservation);
        }
    }

    /// The node's public IPv6 address is of no use in the network of [`OwnChange::Configured`], for this
    /// reason: it has no IPv6 subnet there. To be said before anything else is asked of the store.
    pub fn go_without_ipv6(&mut self, reason: String) {
        self.ownership.set_public_ipv6(None);
        self.no_ipv6 = Some(reason);
    }

    /// The node was never in this store: there it has this VTEP, and asks for no subnet that it had
    /// elsewhere. To be said after the first answer at the latest.
    pub fn begin_anew(&mut self, vtep_mac: VtepMac) {
        self.ownership.begin_anew(vtep_mac);
    }

    /// The node has this public key in the network of [`OwnChange::Configured`]. To be said before anything
    /// else is asked of the store.
    pub fn set_public_key(&mut self, public_key: PublicKey) {
        self.ownership.identity.public_key = Some(public_key);
    }

    /// What has changed since the last call.
    pub fn changes(&mut self) -> impl Iterator<Item = Change> + '_ {
        self.changes.drain(..)
    }

    /// The leases of peers.
    pub fn leases(&self) -> impl Iterator<Item = (&SubnetKey, &LeaseRecord)> {
        self.view.peers()
    }

    /// When the node's own lease ends if it is not renewed, as far as is known; nothing if there is none
    /// or it does not end by itself.
    #[must_use]
    pub fn ends(&self) -> Option<Instant> {
        let own = self.own.filter(|own| !own.reservation);
        own.map(|own| own.ends)
    }

    /// What the keys of all leases begin with: flannel lists and watches without a final slash.
    #[must_use]
    pub fn lease_prefix(&self) -> String {
        reader::lease_prefix(&self.prefix)
    }

    /// The record of this node for the lease that it has, or would have of IPv4.
    #[must_use]
    pub fn record(&self) -> LeaseRecord {
        match self.own {
            Some(own) => self.record_of(own.key),
            None => self.ipv4_record(),
        }
    }

    /// What the end of our tunnel is known by.
    fn tunnel_end(&self) -> TunnelEnd {
        let identity = &self.ownership.identity;
        match &self.config {
            Some(config) => identity.end(&config.backend),
            None => identity.vtep_mac.into(),
        }
    }

    fn ipv4_record(&self) -> LeaseRecord {
        let public_ip = self.ownership.identity.public_ip;
        match &self.config {
            Some(config) => LeaseRecord::of(&config.backend, public_ip, self.tunnel_end())
                .with_checksums(self.checksums)
                .with_multicast(self.multicast),
            None => LeaseRecord::udp(public_ip),
        }
    }

    /// The record of this node for a lease.
    fn record_of(&self, key: SubnetKey) -> LeaseRecord {
        let identity = &self.ownership.identity;
        let record = self.ipv4_record();
        let record = match (&self.config, identity.public_ipv6) {
            (Some(config), Some(public_ipv6)) if key.ipv6().is_some() => {
                let end = identity.end_v6(&config.backend);
                record.with_ipv6(&config.backend, public_ipv6, end)
            }
            _ => record,
        };
        match key.ipv4() {
            Some(_) => record,
            None => record.without_ipv4(),
        }
    }

    /// What creates our record of a key. One of IPv4 alone is safe if no other key begins with that
    /// subnet. One of IPv6 is not told by what its key begins with: nobody may have written any lease
    /// that we do not know.
    fn claim(
        &self,
        key: SubnetKey,
        replaced: Option<(SubnetKey, Revision)>,
        reservation: bool,
    ) -> Op {
        let prefix = match key.ipv6() {
            Some(_) => format!("{}/", self.lease_prefix()),
            None => self.lease_key(key),
        };
        Op::Claim {
            key: self.lease_key(key),
            value: self.record_of(key).to_json(),
            ttl: (!reservation).then_some(LEASE_TTL),
            // What takes the place of a longer key begins like it, and names its revision.
            prefix,
            seen: self.relist.watch_from().saturating_sub(1),
            replaces: replaced.map(|(key, revision)| (self.lease_key(key), revision)),
        }
    }

    fn proposal(&self) -> Option<&NetworkConfig> {
        match &self.wanted_config {
            WantedConfig::Any => None,
            WantedConfig::IfNone(config) | WantedConfig::Exactly(config) => Some(config),
        }
    }

    fn read_config(&mut self, now: Instant, entry: Option<Entry>) {
        let Some(entry) = entry else {
            let fault = match self.proposal() {
                Some(config) => self.lacks_address(config),
                None => Some(ConfigFault::Missing(self.config_key())),
            };
            return match fault {
                Some(fault) => self.await_config(now, fault),
                None => self.phase = Phase::WriteConfig,
            };
        };
        match self.usable_config(&entry.value) {
            Ok(config) => {
                self.config_fault = None;
                self.config = Some(config.clone());
                self.report(OwnChange::Configured(config));
                self.phase = Phase::List;
            }
            Err(fault) => self.await_config(now, fault),
        }
    }

    fn usable_config(&self, value: &str) -> Result<NetworkConfig, ConfigFault> {
        let config = NetworkConfig::parse(value)?;
        if let WantedConfig::Exactly(asked) = &self.wanted_config
            && *asked != config
        {
            let is_other_psk = config.backend.psk() != asked.backend.psk();
            let (stored, mut asked) = (config.to_string(), asked.to_string());
            if is_other_psk && stored == asked {
                asked.push_str(" that is another one");
            }
            return Err(ConfigFault::OtherNetwork { stored, asked });
        }
        if let Some(fault) = self.lacks_address(&config) {
            return Err(fault);
        }
        if let Backend::Other(name) = &config.backend {
            // Its peers would take a record of ours for something that it is not.
            return Err(ConfigFault::OtherBackend(shorten(name)));
        }
        Ok(config)
    }

    /// Whether this node has no address to be a node of a network with, as things are now.
    fn lacks_address(&self, config: &NetworkConfig) -> Option<ConfigFault> {
        let identity = &self.ownership.identity;
        if config.enable_ipv4 {
            let network = config.network;
            let lacks = identity.public_ip.is_unspecified();
            lacks.then_some(ConfigFault::NoPublicIp(network))
        } else {
            let lacks = identity.public_ipv6.is_none();
            lacks.then_some(ConfigFault::NoPublicIpv6)
        }
    }

    /// Asks for the configuration again, in a while.
    fn await_config(&mut self, now: Instant, fault: ConfigFault) {
        if self.config_fault.as_ref() != Some(&fault) {
            self.config_fault = Some(fault.clone());
            self.report(OwnChange::AwaitsConfig(fault));
        }
        self.backoff.wait_until(now + CONFIG_RETRY);
    }

    /// The caller cannot use the configuration that [`Change::Configured`] told of, for a reason that
    /// lies outside of it: it is asked for again before anything is written. It may be another one
    /// by then, or the reason may be gone. Without effect on a node that has its lease.
    pub fn refuse_config(&mut self, now: Instant) {
        if self.phase == Phase::List && self.own.is_none() {
            self.config = None;
            self.phase = Phase::ReadConfig;
            self.backoff.wait_until(now + CONFIG_RETRY);
        }
    }

    /// Compares what the store has with what we believed, and looks for our own lease.
    fn snapshot(&mut self, now: Instant, revision: Revision, entries: Vec<Entry>) {
        let went_back = self.relist.listed(now, revision);
        self.backoff.listed(now, went_back, &mut self.random);
        let mut found = BTreeMap::new();
        let mut own = Vec::new();
        let known = self.view.begin_list();
        for entry in entries {
            match self.read(&entry) {
                Ok((key, record)) if self.is_ours(key, &record) => own.push((key, entry, record)),
                Ok((key, record)) => {
                    self.view.note_created(key, entry.created);
                    found.insert(key, record);
                }
                Err(unusable) => {
                    let changes = &mut self.changes;
                    let known = known.get(&entry.key);
                    self.view.skip(&entry, unusable, known, changes);
                }
            }
        }
        let held = self.own.map(|own| own.key);
        let lacks_ours = held.is_some_and(|held| own.iter().all(|(key, ..)| *key != held));
        let is_wiped = went_back && lacks_ours;
        self.view
            .retire_missing(now, is_wiped, &mut found, &mut self.changes);
        if found.keys().any(|key| self.view.get(*key).is_none()) {
            self.meet(now);
        }
        // Those that are gone have been taken leave of.
        for (key, record) in found {
            if self.view.get(key) != Some(&record) {
                self.set_peer(key, record);
            }
        }
        match self.own {
            _ if self.leaving => self.give_back(&own),
            Some(held) => self.check_own(now, held, &own),
            None => self.choose(now, &own),
        }
    }

    /// When there is something to do without an event.
    fn next_deadline(&self, now: Instant) -> Instant {
        let renewal = match self.own {
            Some(own) if !own.reservation => own.renew_at,
            // A reservation is never renewed.
            Some(_) | None => now + Duration::from_secs(LEASE_TTL.as_secs()),
        };
        let others = self
            .relist
            .due(self.own)
            .into_iter()
            .chain(self.repetition.next());
        others.fold(renewal, Instant::min)
    }

    /// We are leaving: is there a record of ours to delete?
    fn give_back(&mut self, own: &[OwnEntry]) {
        let held = self.own.map(|own| own.key);
        // Not what another node with our identity holds.
        let is_ours = |key, record: &LeaseRecord| {
            self.ownership.is_at_our_address(record) && held.is_none_or(|held| held == key)
        };
        match own
            .iter()
            .find(|(key, entry, record)| entry.ttl.is_some() && is_ours(*key, record))
        {
            Some((key, entry, _)) => self.phase = Phase::Delete(*key, entry.revision),
            None => self.end(OwnChange::Left),
        }
    }

    /// After a gap in the watch: do we still have what we had? A running node never changes its
    /// subnet, because its pods would be stranded.
    fn check_own(&mut self, now: Instant, held: Own, own: &[OwnEntry]) {
        if let Some((_, entry, record)) = own.iter().find(|(key, ..)| *key == held.key) {
            if *record == self.record_of(held.key) {
                if entry.revision != held.revision {
                    // Perhaps by ourselves, and the answer was lost.
                    self.note_own_written(now);
                }
                self.adopt(now, held, entry);
                self.phase = Phase::Hold;
            } else if entry.revision == held.revision {
                // It is as we wrote it, but our address has changed.
                self.expect_news();
                self.phase = Phase::Put(held.key, entry.revision, held.reservation);
            } else {
                self.on_own_rewritten(now, held, entry, record);
            }
        } else if let Some(holder) = self.view.holder_of(held.key) {
            self.taken(held.key, holder);
        } else if let Some(revision) = self.view.skipped_at(held.key) {
            self.dispute(now, held, revision);
        } else {
            // The store was wiped, or the lease has expired: publish it again.
            self.expect_news();
            self.phase = Phase::Create(held.key);
        }
    }

    fn choose(&mut self, now: Instant, own: &[OwnEntry]) {
        let Some(config) = self.config.clone() else {
            self.phase = Phase::ReadConfig;
            return;
        };
        if let Some(entry) = self.ownership.preferred_record(own) {
            return self.go_on(now, &config, entry);
        }
        let ipv4 = self.choose_ipv4(&config);
        if config.enable_ipv4 && ipv4.is_none() {
            return self.lose(Loss::OutOfSubnets(config.subnets().count()));
        }
        let ipv6 = self.choose_ipv6(&config, None);
        match SubnetKey::of(ipv4, ipv6) {
            Some(key) => {
                self.expect_news();
                self.phase = Phase::Create(key);
            }
            None => self.lose(Loss::OutOfIpv6Subnets),
        }
    }

    /// Goes on with a record of ours, if what it is fits the network: its subnet of IPv4 stays, whether
    /// there is one of IPv6 beside it or not.
    fn go_on(&mut self, now: Instant, config: &NetworkConfig, (key, entry, record): &OwnEntry) {
        let (key, reservation) = (*key, entry.ttl.is_none());
        let allows_ipv6 = |net| config.ipv6.is_some_and(|range| range.allows(net));
        let [is_others, is_others_ipv6] = self.view.comes_first(key, entry.created);
        let ipv6 = key
            .ipv6()
            .filter(|net| allows_ipv6(*net) && !is_others_ipv6);
        let fits = match key.ipv4() {
            Some(ipv4) => config.allows(ipv4) && !is_others,
            None => !config.enable_ipv4 && ipv6.is_some(),
        };
        if !fits {
            // Also if another node created it first: no pod has an address of it yet.
            self.phase = Phase::Delete(key, entry.revision);
            return;
        }
        let ipv6 = self.choose_ipv6(config, ipv6);
        let wanted = SubnetKey::of(key.ipv4(), ipv6).unwrap_or(key);
        if wanted == key && reservation && *record == self.record_of(key) {
            return self.hold(now, key, entry.revision, true);
        }
        let take_over = self.ownership.take_over(key, record);
        let reported = take_over.map(|how| match how {
            TakeOver::Moved { from } => OwnChange::Moved { key, from },
            TakeOver::Replaced { end } => OwnChange::Replaced { key, end },
        });
        self.changes.extend(reported.map(Change::Own));
        // Perhaps an earlier process wrote it and ended before others knew.
        self.expect_news();
        self.phase = if wanted == key {
            Phase::Put(key, entry.revision, reservation)
        } else {
            Phase::Replace(wanted, (key, entry.revision), reservation)
        };
    }

    /// A free subnet of IPv4: the previous one, or one of the first.
    fn choose_ipv4(&mut self, config: &NetworkConfig) -> Option<Ipv4Net> {
        let previous = self.ownership.previous();
        let previous = previous.filter(|net| config.allows(*net) && self.view.is_free(*net));
        previous.or_else(|| {
            let free = self.view.free_subnets(config);
            let index = self.random.below(free.len() as u64);
            free.get(index as usize).copied()
        })
    }

    /// The subnet of IPv6 that we have, or the previous one, or one of the first, if the network has
    /// IPv6 and so have we.
    fn choose_ipv6(&mut self, config: &NetworkConfig, ours: Option<Ipv6Net>) -> Option<Ipv6Net> {
        let range = config.ipv6.as_ref()?;
        self.ownership.identity.public_ipv6?;
        let previous = self.ownership.previous_ipv6();
        let previous = previous.filter(|net| range.allows(*net) && self.view.is_free(*net));
        if let Some(net) = ours.or(previous) {
            return Some(net);
        }
        let free = self.view.free_ipv6_subnets(range);
        let index = self.random.below(free.len() as u64);
        let chosen = free.get(index as usize).copied();
        if chosen.is_none() {
            self.no_ipv6 = Some("all IPv6 subnets of the network are leased".to_owned());
        }
        chosen
    }

    fn is_ours(&self, key: SubnetKey, record: &LeaseRecord) -> bool {
        let held = self.own.map(|own| own.key);
        self.ownership.is_ours(held, key, record)
    }

    fn lost_race(&mut self, now: Instant) {
        self.look_again(now, Phase::List);
        if self.own.is_some() {
            return;
        }
        if self.backoff.is_hopeless(now) {
            self.lose(Loss::Races);
        } else if let Some(attempts) = self.backoff.has_many_conflicts() {
            self.report(OwnChange::Races { attempts });
        }
    }

    /// The store is not as we believed.
    fn look_again(&mut self, now: Instant, phase: Phase) {
        self.phase = phase;
        self.backoff.conflict(now, &mut self.random);
    }

    fn hold(&mut self, now: Instant, key: SubnetKey, revision: Revision, reservation: bool) {
        let is_new = self.own.is_none_or(|own| own.key != key);
        self.own = Some(Own {
            key,
            revision,
            reservation,
            renew_at: now + self.renewal(LEASE_TTL),
            ends: now + Duration::from_secs(LEASE_TTL.as_secs()),
            confirmation_by: Relist::confirmation_by(now),
        });
        self.backoff.held();
        self.note_own_written(now);
        self.view.readable(&self.lease_key(key));
        // A peer that had it for a moment, whose end the watch has not reported yet.
        self.remove_peer(key);
        let address = self.ownership.address(key.ipv4().is_none());
        self.view.set_own(key, address, &mut self.changes);
        self.phase = if self.relist.is_required() {
            Phase::List
        } else {
            Phase::Hold
        };
        let has_ipv6 = self.config.as_ref().is_some_and(|it| it.ipv6.is_some());
        if is_new && has_ipv6 && key.ipv6().is_none() {
            let reason = self.no_ipv6.take();
            let no_address = || "this node has no public IPv6 address".to_owned();
            self.report(OwnChange::NoIpv6(reason.unwrap_or_else(no_address)));
        }
        self.report(if is_new {
            OwnChange::Acquired(key)
        } else {
            OwnChange::Renewed
        });
    }

    /// What is written next is not what others know.
    fn expect_news(&mut self) {
        if self.repeats {
            self.repetition.expect_news();
        }
    }

    /// The store has our record as it is now.
    fn note_own_written(&mut self, now: Instant) {
        let (others, random) = (self.view.len(), &mut self.random);
        let below = |bound| random.below(bound);
        self.repetition.written(now, others, below);
    }

    /// Another node has a lease now.
    fn meet(&mut self, now: Instant) {
        if self.repeats && self.own.is_some() {
            let random = &mut self.random;
            self.repetition.meet(now, |bound| random.below(bound));
        }
    }

    /// Takes our record as the store has it.
    fn adopt(&mut self, now: Instant, held: Own, entry: &Entry) {
        let renew_at = entry.ttl.map(|ttl| now + self.renewal(ttl));
        let ends = entry
            .ttl
            .map(|ttl| now + Duration::from_secs(ttl.as_secs()));
        self.own = Some(Own {
            revision: entry.revision,
            reservation: entry.ttl.is_none(),
            renew_at: renew_at.map_or(held.renew_at, |at| at.min(held.renew_at)),
            ends: ends.unwrap_or(held.ends),
            ..held
        });
    }

    /// How long a lease that lives so long still need not be renewed.
    fn renewal(&self, ttl: std::time::Duration) -> Duration {
        let margin = self.renew_margin.min(MAX_RENEW_MARGIN);
        let rest = ttl.min(LEASE_TTL).saturating_sub(margin);
        Duration::from_millis(rest.as_millis() as u64).max(SHORTEST_RENEWAL)
    }

    /// Our record is another one than we wrote, under our address or by our VTEP.
    fn on_own_rewritten(&mut self, now: Instant, held: Own, entry: &Entry, record: &LeaseRecord) {
        // Who has written it last says whether it is a reservation.
        let reservation = entry.ttl.is_none();
        let held = Own {
            reservation,
            ..held
        };
        let contest = self.ownership.on_own_rewritten(now, record);
        self.contest(now, held, entry.revision, contest, record.node_address());
    }

    /// Our record is not what we wrote, and says nothing that could be read.
    fn dispute(&mut self, now: Instant, held: Own, revision: Revision) {
        let contest = self.ownership.dispute(now);
        let holder = self.ownership.address(held.key.ipv4().is_none());
        self.contest(now, held, revision, contest, holder);
    }

    /// Writes our record again where `holder` has changed it, if there is a point in it.
    fn contest(
        &mut self,
        now: Instant,
        held: Own,
        revision: Revision,
        contest: Contest,
        holder: IpAddr,
    ) {
        let public_ip = self.ownership.address(held.key.ipv4().is_none());
        let end = self.tunnel_end();
        let key = held.key.to_string();
        match contest {
            Contest::WriteAgain(attempt) => self.write_again(now, held, revision, attempt),
            Contest::Hopeless => self.lose(Loss::Disputed { key, public_ip }),
            Contest::Cloned => self.lose(Loss::Cloned { key, holder, end }),
        }
    }

    fn write_again(&mut self, now: Instant, held: Own, revision: Revision, attempt: u32) {
        self.expect_news();
        self.phase = Phase::Put(held.key, revision, held.reservation);
        self.report(OwnChange::Disputed(held.key));
        self.delay(now, attempt);
    }

    fn written(&mut self, now: Instant, entry: &Entry) {
        match self.read(entry) {
            Ok((key, record)) => {
                self.view.readable(&entry.key);
                self.view.found_again(key);
                if self.claims(key) {
                    self.own_written(now, entry, Some(&record));
                } else if self.is_ours(key, &record) {
                    self.remove_peer(key);
                } else if self.view.get(key) != Some(&record) {
                    if self.view.get(key).is_none() {
                        self.meet(now);
                    }
                    self.view.note_created(key, entry.created);
                    self.set_peer(key, record);
                }
            }
            Err(unusable) => {
                let subnet = unusable.subnet;
                self.view.skip(entry, unusable, None, &mut self.changes);
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
        let ours = self.subnet_key(&entry.key).map(|key| self.record_of(key));
        let is_unchanged = record.is_some() && record == ours.as_ref();
        let Some(own) = self.own.filter(|_| self.phase == Phase::Hold) else {
            if !is_unchanged {
                self.relist.require();
            }
            return;
        };
        if entry.revision <= own.revision {
            return;
        }
        match record {
            Some(_) if is_unchanged => self.adopt(now, own, entry),
            Some(record) if self.is_ours(own.key, record) => {
                self.on_own_rewritten(now, own, entry, record);
            }
            Some(record) => self.taken(own.key, record.node_address()),
            None => self.dispute(now, own, entry.revision),
        }
    }

    fn deleted(&mut self, key: &str, revision: Revision) {
        self.view.readable(key);
        let Some(key) = self.subnet_key(key) else {
            return;
        };
        if !self.claims(key) {
            self.remove_peer(key);
        } else if self.phase != Phase::Hold {
            self.relist.require();
        } else if self.own.is_some_and(|own| revision > own.revision) {
            self.phase = Phase::List;
        }
    }

    /// Whether the record of `key` is ours, or is about to be.
    fn claims(&self, key: SubnetKey) -> bool {
        match self.phase {
            Phase::Create(ours) | Phase::Replace(ours, ..) | Phase::Put(ours, ..)
                if ours == key =>
            {
                true
            }
            _ => self.own.is_some_and(|own| own.key == key),
        }
    }

    fn set_peer(&mut self, key: SubnetKey, record: LeaseRecord) {
        self.view.set_peer(key, record, &mut self.changes);
    }

    fn remove_peer(&mut self, key: SubnetKey) {
        self.view.remove_peer(key, &mut self.changes);
    }

    fn read(&self, entry: &Entry) -> Result<(SubnetKey, LeaseRecord), NoLease> {
        let (key, record) = reader::read_entry(&self.prefix, entry)?;
        if !self.ownership.has_our_address(&record) {
            reader::check_peer(key, &record, self.config.as_ref())?;
        }
        Ok((key, record))
    }

    fn taken(&mut self, key: SubnetKey, holder: IpAddr) {
        let key = key.to_string();
        self.lose(Loss::Taken { key, holder });
    }

    fn lose(&mut self, loss: Loss) {
        self.end(if self.leaving {
            OwnChange::Left
        } else {
            OwnChange::Lost(loss)
        });
    }

    fn end(&mut self, change: OwnChange) {
        self.phase = Phase::Over;
        self.report(change);
    }

    fn report(&mut self, change: OwnChange) {
        self.changes.push_back(Change::Own(change));
    }

    /// Lets the next operation wait, the longer the more attempts there were.
    fn delay(&mut self, now: Instant, attempt: u32) {
        self.backoff.delay(now, attempt, &mut self.random);
    }

    fn config_key(&self) -> String {
        format!("{}/config", self.prefix)
    }

    fn lease_key(&self, key: SubnetKey) -> String {
        reader::lease_key(&self.prefix, key)
    }

    fn subnet_key(&self, key: &str) -> Option<SubnetKey> {
        reader::subnet_key(&self.prefix, key)
    }
}

#[cfg(test)]
mod tests;
