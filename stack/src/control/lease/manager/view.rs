//! The leases of other nodes, as last reported by the store.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use smoltcp::time::Instant;

use super::relist::REPUBLISHING;
use crate::control::kv::{Entry, Revision};
use crate::control::lease::change::{Change, OwnChange};
use crate::control::lease::config::NetworkConfig;
use crate::control::lease::key::{SubnetKey, overlap};
use crate::control::lease::reader::{self, NoLease};
use crate::control::lease::record::LeaseRecord;
use crate::control::lease::shares::Shares;
use crate::control::lease::text::shorten;

/// Free subnets among which one is chosen, as flannel does.
pub(super) const CANDIDATES: usize = 100;

/// What is to be reported, in its order.
type Changes = VecDeque<Change>;

/// The leases of others and the keys that are none.
#[derive(Debug)]
pub(super) struct View {
    /// Where the store has flannel's keys.
    prefix: String,
    /// All leases but our own, by key.
    leases: BTreeMap<SubnetKey, LeaseRecord>,
    /// Which of them count: there may be too many of one public address.
    shares: Shares,
    /// Those that the store has lost with ours, and until when they are waited for.
    missing: BTreeMap<SubnetKey, Instant>,
    /// Keys that are not usable leases.
    skipped: BTreeMap<String, Skipped>,
}

/// A key that is not a usable lease.
#[derive(Debug)]
pub(super) struct Skipped {
    revision: Revision,
    /// A subnet that is not free, although it has no reachable node.
    subnet: Option<SubnetKey>,
}

impl View {
    pub(super) fn new(prefix: String) -> Self {
        Self {
            prefix,
            leases: BTreeMap::new(),
            shares: Shares::default(),
            missing: BTreeMap::new(),
            skipped: BTreeMap::new(),
        }
    }

    /// How many leases others have.
    pub(super) fn len(&self) -> usize {
        self.leases.len()
    }

    /// Another node's lease.
    pub(super) fn get(&self, key: SubnetKey) -> Option<&LeaseRecord> {
        self.leases.get(&key)
    }

    /// The leases of peers.
    pub(super) fn peers(&self) -> impl Iterator<Item = (&SubnetKey, &LeaseRecord)> {
        let all = self.leases.iter();
        all.filter(|(key, record)| self.shares.counts(record.public_ip, **key))
    }

    /// The public address of who holds a subnet, or one that overlaps it.
    pub(super) fn holder_of(&self, key: SubnetKey) -> Option<Ipv4Addr> {
        let record = self.leases.get(&key).or_else(|| {
            let mut leases = self.leases.iter();
            let other = leases.find(|(other, _)| overlap(other.ipv4, key.ipv4));
            other.map(|(_, record)| record)
        });
        record.map(|record| record.public_ip)
    }

    /// When a lease's key was last written, if it is not a usable lease.
    pub(super) fn skipped_at(&self, key: SubnetKey) -> Option<Revision> {
        let skipped = self.skipped.get(&self.lease_key(key));
        skipped.map(|skipped| skipped.revision)
    }

    /// Everything is read anew; what were no usable leases until now.
    pub(super) fn begin_list(&mut self) -> BTreeMap<String, Skipped> {
        std::mem::take(&mut self.skipped)
    }

    /// A key is a lease, or is gone.
    pub(super) fn readable(&mut self, key: &str) {
        self.skipped.remove(key);
    }

    /// The store has a lease that it had lost.
    pub(super) fn found_again(&mut self, key: SubnetKey) {
        self.missing.remove(&key);
    }

    /// Whether a subnet, and each one that overlaps it, is free.
    pub(super) fn is_free(&self, subnet: Ipv4Net) -> bool {
        !self.occupied().any(|other| overlap(other, subnet))
    }

    /// A key is no usable lease, for this reason; it is reported unless it was `known` of the same
    /// writing.
    pub(super) fn skip(
        &mut self,
        entry: &Entry,
        unusable: NoLease,
        known: Option<&Skipped>,
        changes: &mut Changes,
    ) {
        let skipped = Skipped {
            revision: entry.revision,
            subnet: unusable.subnet,
        };
        self.skipped.insert(entry.key.clone(), skipped);
        if known.is_none_or(|known| known.revision != entry.revision) {
            changes.push_back(Change::Own(OwnChange::Skipped {
                key: shorten(&entry.key),
                reason: unusable.reason,
            }));
        }
    }

    /// Takes leave of the peers that a list has no more. If it has not our own record either, and
    /// its history began anew, the store was wiped, and nothing is known of the peers: they stay
    /// for a while.
    pub(super) fn retire_missing(
        &mut self,
        now: Instant,
        is_wiped: bool,
        found: &mut BTreeMap<SubnetKey, LeaseRecord>,
        changes: &mut Changes,
    ) {
        self.missing.retain(|key, _| !found.contains_key(key));
        let lost = self.leases.keys().filter(|key| !found.contains_key(*key));
        for key in lost.copied().collect::<Vec<_>>() {
            let is_unreadable = self.skipped.contains_key(&self.lease_key(key));
            if is_wiped && !is_unreadable {
                self.missing.entry(key).or_insert(now + REPUBLISHING);
            }
            let is_awaited = self.missing.get(&key).is_some_and(|until| now < *until);
            if is_unreadable || !is_awaited {
                self.remove_peer(key, changes);
            } else if let Some(record) = self.leases.get(&key) {
                found.insert(key, record.clone());
            }
        }
    }

    /// A lease is new or has changed. It is a peer's if the public address has not too many.
    pub(super) fn set_peer(&mut self, key: SubnetKey, record: LeaseRecord, changes: &mut Changes) {
        let address = record.public_ip;
        let old = self.leases.insert(key, record.clone());
        let old = old.map(|old| old.public_ip);
        let was_peer = old.is_some_and(|old| self.shares.counts(old, key));
        if let Some(old) = old.filter(|old| *old != address) {
            self.release_share(old, key, changes);
        }
        let excess = self.shares.add(address, key);
        if let Some(other) = excess {
            if other != key || was_peer {
                changes.push_back(Change::PeerGone(other));
            }
            changes.push_back(Change::Own(OwnChange::Skipped {
                key: self.lease_key(other),
                reason: Shares::excess(address),
            }));
        }
        if self.shares.counts(address, key) {
            changes.push_back(Change::Peer(key, record));
        }
    }

    /// A lease has ended, if there was one.
    pub(super) fn remove_peer(&mut self, key: SubnetKey, changes: &mut Changes) {
        self.missing.remove(&key);
        if let Some(LeaseRecord { public_ip, .. }) = self.leases.remove(&key) {
            if self.shares.counts(public_ip, key) {
                changes.push_back(Change::PeerGone(key));
            }
            self.release_share(public_ip, key, changes);
        }
    }

    /// A lease of this public address is gone, and another one may count instead.
    fn release_share(&mut self, public_ip: Ipv4Addr, key: SubnetKey, changes: &mut Changes) {
        if let Some(next) = self.shares.remove(public_ip, key)
            && let Some(record) = self.leases.get(&next)
        {
            changes.push_back(Change::Peer(next, record.clone()));
        }
    }

    /// The first free subnets, upward: one pass over the leases however large the network is.
    pub(super) fn free_subnets(&self, config: &NetworkConfig) -> Vec<Ipv4Net> {
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
    pub(super) fn occupied(&self) -> impl Iterator<Item = Ipv4Net> {
        let skipped = self.skipped.values().filter_map(|skipped| skipped.subnet);
        self.leases
            .keys()
            .copied()
            .chain(skipped)
            .map(|key| key.ipv4)
    }

    fn lease_key(&self, key: SubnetKey) -> String {
        reader::lease_key(&self.prefix, key)
    }
}

fn number(address: Ipv4Addr) -> u64 {
    u32::from(address).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::time::Duration;

    use super::*;

    const NOW: Instant = Instant::from_micros_const(1_000_000_000);

    fn key(third: u8) -> SubnetKey {
        format!("10.3.{third}.0-24").parse().unwrap()
    }

    fn record(last: u8) -> LeaseRecord {
        LeaseRecord::udp([192, 168, 0, last].into())
    }

    fn unusable(third: u8, revision: Revision) -> (Entry, NoLease) {
        let entry = Entry {
            key: format!("/p/subnets/{}", key(third)),
            value: String::new(),
            revision,
            ttl: None,
        };
        let no_lease = NoLease {
            subnet: Some(key(third)),
            reason: "why".to_owned(),
        };
        (entry, no_lease)
    }

    /// A view of peers with the subnets 10.3.1.0/24 up to 10.3.`count`.0/24.
    fn view(count: u8) -> View {
        let mut view = View::new("/p".to_owned());
        let mut changes = Changes::new();
        for number in 1..=count {
            view.set_peer(key(number), record(number), &mut changes);
        }
        assert_eq!(changes.len(), usize::from(count));
        view
    }

    /// The peers that a list without `found` retires.
    fn retired(view: &mut View, now: Instant, is_wiped: bool, found: &[u8]) -> Vec<SubnetKey> {
        let mut found = found.iter().map(|n| (key(*n), record(*n))).collect();
        let mut changes = Changes::new();
        view.retire_missing(now, is_wiped, &mut found, &mut changes);
        let gone = changes.into_iter().map(|change| match change {
            Change::PeerGone(key) => key,
            other => panic!("{other:?}"),
        });
        gone.collect()
    }

    #[test]
    fn peers_that_a_list_has_no_more_are_gone() {
        let mut view = view(3);
        assert_eq!(retired(&mut view, NOW, false, &[2]), [key(1), key(3)]);
        assert_eq!(view.len(), 1);
        assert_eq!(view.get(key(2)), Some(&record(2)));
    }

    #[test]
    fn peers_that_a_wiped_store_has_lost_are_waited_for() {
        let mut view = view(2);
        assert_eq!(retired(&mut view, NOW, true, &[]), []);
        assert_eq!(view.peers().count(), 2);
        view.found_again(key(1));
        let before = NOW + REPUBLISHING - Duration::from_micros(1);
        assert_eq!(retired(&mut view, before, false, &[1]), []);
        assert_eq!(
            retired(&mut view, NOW + REPUBLISHING, false, &[1]),
            [key(2)]
        );
    }

    #[test]
    fn a_key_that_became_unreadable_is_not_waited_for() {
        let mut view = view(2);
        let (entry, no_lease) = unusable(1, 9);
        view.skip(&entry, no_lease, None, &mut Changes::new());
        assert_eq!(retired(&mut view, NOW, true, &[]), [key(1)]);
    }

    #[test]
    fn an_unreadable_key_is_reported_once_per_writing_and_its_subnet_is_taken() {
        let mut view = view(0);
        let mut changes = Changes::new();
        let (entry, no_lease) = unusable(1, 9);
        view.skip(&entry, no_lease.clone(), None, &mut changes);
        assert_eq!(changes.len(), 1);
        assert_eq!(view.skipped_at(key(1)), Some(9));
        assert!(!view.is_free(key(1).ipv4) && view.is_free(key(2).ipv4));
        let known = view.begin_list();
        assert_eq!(view.skipped_at(key(1)), None);
        view.skip(
            &entry,
            no_lease.clone(),
            known.get(&entry.key),
            &mut changes,
        );
        assert_eq!(changes.len(), 1, "the same writing");
        let known = view.begin_list();
        let (entry, _) = unusable(1, 10);
        view.skip(&entry, no_lease, known.get(&entry.key), &mut changes);
        assert_eq!(changes.len(), 2);
        view.readable(&entry.key);
        assert!(view.is_free(key(1).ipv4));
    }

    #[test]
    fn who_overlaps_a_subnet_holds_it() {
        let view = view(1);
        let holder = Some([192, 168, 0, 1].into());
        assert_eq!(view.holder_of(key(1)), holder);
        assert_eq!(view.holder_of("10.3.0.0-16".parse().unwrap()), holder);
        assert_eq!(view.holder_of(key(2)), None);
    }

    proptest! {
        #[test]
        fn the_first_free_subnets_are_found(
            (min, count) in (0u32..200, 0u32..120),
            leases in proptest::collection::vec((0u32..0x10000, 19u8..=28), 0..40),
        ) {
            let address = |third: u32| Ipv4Addr::from(0x0a03_0000 + (third << 8));
            let config = format!(
                r#"{{"Network":"10.3.0.0/16","SubnetMin":"{}","SubnetMax":"{}"}}"#,
                address(min),
                address((min + count).min(255))
            );
            let config = NetworkConfig::parse(&config).unwrap();
            let mut view = View::new("/p".to_owned());
            for (offset, len) in leases {
                let net = Ipv4Net::new(Ipv4Addr::from(0x0a03_0000 + offset), len).unwrap();
                let record = LeaseRecord::udp([192, 168, 0, 9].into());
                view.leases.insert(SubnetKey::new(net.trunc()), record);
            }
            let is_free = |net: &Ipv4Net| !view.occupied().any(|other| overlap(other, *net));
            let expected: Vec<_> = config.subnets().filter(is_free).take(CANDIDATES).collect();
            prop_assert_eq!(view.free_subnets(&config), expected);
        }
    }
}
