//! The leases of other nodes, as last reported by the store.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use muslin_encap::tunnel::wireguard::PublicKey;
use smoltcp::time::Instant;

use super::relist::REPUBLISHING;
use crate::control::kv::{Entry, Revision};
use crate::control::lease::change::{Change, Contested, OwnChange};
use crate::control::lease::config::{Ipv6Range, NetworkConfig};
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
    /// When each was created; 0 if that is not known.
    created: BTreeMap<SubnetKey, Revision>,
    /// Those that have an IPv6 subnet by it.
    by_ipv6: BTreeMap<Ipv6Net, BTreeSet<SubnetKey>>,
    /// Those that have a public key by it.
    by_public_key: BTreeMap<PublicKey, BTreeSet<SubnetKey>>,
    /// Those of which others have a subnet or the key, too, and come first.
    contested: BTreeMap<SubnetKey, Contested>,
    /// The lease that this node holds, and its address.
    own: Option<(SubnetKey, IpAddr)>,
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
            created: BTreeMap::new(),
            by_ipv6: BTreeMap::new(),
            by_public_key: BTreeMap::new(),
            contested: BTreeMap::new(),
            own: None,
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
        all.filter(|(key, record)| self.shares.counts(record.node_address(), **key))
    }

    /// The public address of who holds a subnet, or one that overlaps it.
    pub(super) fn holder_of(&self, key: SubnetKey) -> Option<IpAddr> {
        let record = self.leases.get(&key).or_else(|| {
            let mut leases = self.leases.iter();
            let other = leases.find(|(other, _)| other.overlaps(&key));
            other.map(|(_, record)| record)
        });
        record.map(LeaseRecord::node_address)
    }

    /// The leases that have the same subnet as `key` of IPv4, or of IPv6. All that count have the
    /// network's length, so that those that overlap are equal.
    fn rivals(&self, key: SubnetKey) -> [Vec<SubnetKey>; 2] {
        let ipv4 = key.ipv4().map(SubnetKey::new);
        let same = ipv4.into_iter().flat_map(|first| {
            let from_there = self.leases.range(first..).map(|(key, _)| *key);
            from_there.take_while(move |other| other.ipv4() == first.ipv4())
        });
        let same_ipv6 = key.ipv6().and_then(|ipv6| self.by_ipv6.get(&ipv6));
        let same_ipv6 = same_ipv6.into_iter().flatten().copied();
        [
            same.filter(|other| *other != key).collect(),
            same_ipv6.filter(|other| *other != key).collect(),
        ]
    }

    /// When a lease was created, and which one comes first of several then.
    fn order(&self, key: SubnetKey) -> (Revision, SubnetKey) {
        (self.created.get(&key).copied().unwrap_or(0), key)
    }

    /// The public address of the node that had a public key first. It may have left leases behind that
    /// have the key, too.
    fn key_holder(&self, public_key: PublicKey) -> Option<IpAddr> {
        let all = self.by_public_key.get(&public_key)?;
        let first = all.iter().min_by_key(|key| self.order(**key))?;
        self.leases.get(first).map(LeaseRecord::node_address)
    }

    fn key_holders(&self, public_keys: &[PublicKey]) -> Vec<Option<IpAddr>> {
        let holders = public_keys.iter().map(|it| self.key_holder(*it));
        holders.collect()
    }

    /// Who had a public key of a record before its node.
    fn foreign_holder(&self, record: &LeaseRecord) -> Option<IpAddr> {
        let own = record.node_address();
        let mut holders = record.public_keys().filter_map(|it| self.key_holder(it));
        holders.find(|holder| *holder != own)
    }

    /// Who comes before a lease in its subnets: this node, then who was created first; and who in its key.
    fn contested(&self, key: SubnetKey) -> Contested {
        let [own_ipv4, own_ipv6] = match self.own {
            Some((own, _)) if own != key => own.overlaps_each(&key),
            _ => [false; 2],
        };
        let first = |rivals: Vec<SubnetKey>, is_own: bool| match self.own {
            Some((_, address)) if is_own => Some(address),
            _ => {
                let first = rivals.into_iter().min_by_key(|key| self.order(*key))?;
                let record = self.leases.get(&first)?;
                (self.order(first) < self.order(key)).then(|| record.node_address())
            }
        };
        let [ipv4, ipv6] = self.rivals(key);
        let record = self.leases.get(&key);
        Contested {
            ipv4: first(ipv4, own_ipv4),
            ipv6: first(ipv6, own_ipv6),
            public_key: record.and_then(|record| self.foreign_holder(record)),
        }
    }

    /// Whether a lease of another was created before `created` and has one of our subnets: of IPv4,
    /// and of IPv6. Where the store does not know that, nobody comes first.
    pub(super) fn comes_first(&self, key: SubnetKey, created: Revision) -> [bool; 2] {
        let is_earlier = |other: &SubnetKey| {
            let theirs = self.created.get(other).copied().unwrap_or(0);
            theirs != 0 && theirs < created
        };
        self.rivals(key).map(|rivals| rivals.iter().any(is_earlier))
    }

    /// This node holds a lease now: who has a subnet of it, too, has none of its traffic.
    pub(super) fn set_own(&mut self, own: SubnetKey, address: IpAddr, changes: &mut Changes) {
        self.own = Some((own, address));
        for key in self.rivals(own).concat() {
            self.settle_contest(key, changes);
        }
    }

    /// Says who has the subnets of a lease, if that has changed.
    fn settle_contest(&mut self, key: SubnetKey, changes: &mut Changes) {
        let Some(record) = self.leases.get(&key) else {
            self.contested.remove(&key);
            return;
        };
        let contested = self.contested(key);
        if self.contested.get(&key).copied().unwrap_or_default() == contested {
            return;
        }
        changes.push_back(Change::Contested(key, contested));
        if contested.is_empty() {
            self.contested.remove(&key);
        } else {
            self.contested.insert(key, contested);
            let node = record.node_address();
            changes.push_back(Change::Own(OwnChange::Overlap {
                key,
                node,
                contested,
            }));
        }
    }

    fn settle_contests(&mut self, key: SubnetKey, changes: &mut Changes) {
        for rival in [key].into_iter().chain(self.rivals(key).concat()) {
            self.settle_contest(rival, changes);
        }
    }

    /// The same of all that have one of these public keys, where that was another's before.
    fn settle_keys(
        &mut self,
        public_keys: &[PublicKey],
        before: Vec<Option<IpAddr>>,
        changes: &mut Changes,
    ) {
        for (public_key, before) in public_keys.iter().zip(before) {
            if self.key_holder(*public_key) == before {
                continue;
            }
            let all = self.by_public_key.get(public_key).cloned();
            for key in all.into_iter().flatten() {
                self.settle_contest(key, changes);
            }
        }
    }

    /// Takes note of when a key was created.
    pub(super) fn note_created(&mut self, key: SubnetKey, created: Revision) {
        self.created.insert(key, created);
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
    pub(super) fn is_free(&self, subnet: impl Into<IpNet>) -> bool {
        let subnet = subnet.into();
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
        let address = record.node_address();
        let both = self.leases.get(&key).into_iter().chain([&record]);
        let public_keys: Vec<_> = both.flat_map(LeaseRecord::public_keys).collect();
        let holders = self.key_holders(&public_keys);
        let old = self.leases.insert(key, record.clone());
        if let Some(ipv6) = key.ipv6() {
            self.by_ipv6.entry(ipv6).or_default().insert(key);
        }
        self.forget_public_keys(key, &public_keys);
        for public_key in record.public_keys() {
            let keys = self.by_public_key.entry(public_key).or_default();
            keys.insert(key);
        }
        self.settle_contests(key, changes);
        self.settle_keys(&public_keys, holders, changes);
        let old = old.map(|old| old.node_address());
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
        let record = self.leases.get(&key);
        let public_keys: Vec<_> = record
            .into_iter()
            .flat_map(LeaseRecord::public_keys)
            .collect();
        let holders = self.key_holders(&public_keys);
        self.missing.remove(&key);
        self.created.remove(&key);
        if let Some(record) = self.leases.remove(&key) {
            let address = record.node_address();
            if let Some(ipv6) = key.ipv6()
                && let Some(keys) = self.by_ipv6.get_mut(&ipv6)
            {
                keys.remove(&key);
                if keys.is_empty() {
                    self.by_ipv6.remove(&ipv6);
                }
            }
            if self.shares.counts(address, key) {
                changes.push_back(Change::PeerGone(key));
            }
            self.forget_public_keys(key, &public_keys);
            self.release_share(address, key, changes);
            self.settle_contests(key, changes);
            self.settle_keys(&public_keys, holders, changes);
        }
    }

    fn forget_public_keys(&mut self, key: SubnetKey, public_keys: &[PublicKey]) {
        for public_key in public_keys {
            if let Some(keys) = self.by_public_key.get_mut(public_key) {
                keys.remove(&key);
                if keys.is_empty() {
                    self.by_public_key.remove(public_key);
                }
            }
        }
    }

    /// A lease of this public address is gone, and another one may count instead.
    fn release_share(&mut self, address: IpAddr, key: SubnetKey, changes: &mut Changes) {
        if let Some(next) = self.shares.remove(address, key)
            && let Some(record) = self.leases.get(&next)
        {
            changes.push_back(Change::Peer(next, record.clone()));
        }
    }

    /// The first free subnets, upward: one pass over the leases however large the network is.
    pub(super) fn free_subnets(&self, config: &NetworkConfig) -> Vec<Ipv4Net> {
        if !config.enable_ipv4 {
            return Vec::new();
        }
        let occupied = self.occupied().filter_map(|net| match net {
            IpNet::V4(net) => Some((number(net.network()), number(net.broadcast()))),
            IpNet::V6(_) => None,
        });
        let (min, max) = (number(config.subnet_min), number(config.subnet_max));
        let free = first_free(occupied.collect(), min, max, 1 << (32 - config.subnet_len));
        let base = |base| u32::try_from(base).ok();
        free.into_iter()
            .filter_map(|free| Ipv4Net::new(base(free)?.into(), config.subnet_len).ok())
            .collect()
    }

    /// The same of IPv6.
    pub(super) fn free_ipv6_subnets(&self, range: &Ipv6Range) -> Vec<Ipv6Net> {
        let occupied = self.occupied().filter_map(|net| match net {
            IpNet::V4(_) => None,
            IpNet::V6(net) => Some((net.network().into(), net.broadcast().into())),
        });
        let (min, max) = (range.subnet_min.into(), range.subnet_max.into());
        let size = 1 << (128 - range.subnet_len);
        let free = first_free(occupied.collect(), min, max, size);
        free.into_iter()
            .filter_map(|free| Ipv6Net::new(free.into(), range.subnet_len).ok())
            .collect()
    }

    /// Every subnet that is not free.
    pub(super) fn occupied(&self) -> impl Iterator<Item = IpNet> {
        let skipped = self.skipped.values().filter_map(|skipped| skipped.subnet);
        let keys = self.leases.keys().copied().chain(skipped);
        keys.flat_map(|key| {
            let ipv4 = key.ipv4().map(IpNet::from);
            ipv4.into_iter().chain(key.ipv6().map(IpNet::from))
        })
    }

    fn lease_key(&self, key: SubnetKey) -> String {
        reader::lease_key(&self.prefix, key)
    }
}

fn number(address: std::net::Ipv4Addr) -> u128 {
    u32::from(address).into()
}

/// The first bases of subnets of a size, from one up to another, that are not in ranges which are
/// occupied.
fn first_free(mut occupied: Vec<(u128, u128)>, base: u128, last: u128, size: u128) -> Vec<u128> {
    occupied.sort_unstable();
    let mut occupied = occupied.into_iter().peekable();
    let mut free = Vec::new();
    let mut next = Some(base);
    while let Some(base) = next.filter(|base| *base <= last && free.len() < CANDIDATES) {
        let end = base + (size - 1);
        next = match occupied.next_if(|(first, _)| *first <= end) {
            Some((_, end)) if end >= base => (end / size + 1).checked_mul(size),
            Some(_) => Some(base),
            None => {
                free.push(base);
                base.checked_add(size)
            }
        };
    }
    free
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;
    use smoltcp::time::Duration;

    use super::*;
    use crate::control::lease::{Backend, WireGuardOptions};

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
            created: 0,
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
        assert!(!view.is_free(key(1).first()) && view.is_free(key(2).first()));
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
        assert!(view.is_free(key(1).first()));
    }

    #[test]
    fn who_overlaps_a_subnet_holds_it() {
        let view = view(1);
        let holder = Some(IpAddr::from([192, 168, 0, 1]));
        assert_eq!(view.holder_of(key(1)), holder);
        assert_eq!(view.holder_of("10.3.0.0-16".parse().unwrap()), holder);
        assert_eq!(view.holder_of(key(2)), None);
    }

    #[test]
    fn a_public_key_is_that_of_the_lease_that_was_created_first() {
        let backend = Backend::WireGuard(WireGuardOptions::default());
        let of = |at: u8, byte| {
            LeaseRecord::of(&backend, [192, 168, 0, at].into(), PublicKey([byte; 32]))
        };
        let mut view = View::new("/p".to_owned());
        let set_at = |view: &mut View, third: u8, created, byte, at| {
            let mut changes = Changes::new();
            view.note_created(key(third), created);
            view.set_peer(key(third), of(at, byte), &mut changes);
            let contests = changes.into_iter().filter_map(|change| match change {
                Change::Contested(key, contested) => Some((key, contested.public_key)),
                _ => None,
            });
            contests.collect::<Vec<_>>()
        };
        let set = |view: &mut View, third, created, byte| set_at(view, third, created, byte, third);
        let at = |last: u8| Some(IpAddr::from([192, 168, 0, last]));
        assert_eq!(set(&mut view, 2, 20, 7), []);
        assert_eq!(set(&mut view, 3, 30, 7), [(key(3), at(2))]);
        // One that is earlier is seen later.
        assert_eq!(set(&mut view, 1, 10, 7), [(key(2), at(1)), (key(3), at(1))]);
        // It gets another key, as flannel's nodes do at each boot.
        assert_eq!(set(&mut view, 1, 10, 8), [(key(2), None), (key(3), at(2))]);
        // What a node has left behind does not stand in its own way.
        assert_eq!(set_at(&mut view, 4, 40, 7, 2), []);
        let mut changes = Changes::new();
        view.remove_peer(key(4), &mut changes);
        view.remove_peer(key(2), &mut changes);
        let free = Change::Contested(key(3), Contested::default());
        assert!(changes.contains(&free), "{changes:?}");
        view.remove_peer(key(3), &mut changes);
        view.remove_peer(key(1), &mut changes);
        assert!(view.by_public_key.is_empty());
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
