//! The lease rules against a store in memory.

mod dual;

use ipnet::Ipv4Net;

use super::ownership::{DISPUTE_MEMORY, MAX_DISPUTES};
use super::relist::{REPUBLISHING, TELLING};
use super::*;
use crate::control::lease::settings::{Identity, RENEW_MARGIN};

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
            created: self
                .entries
                .get(&key)
                .map_or(self.revision, |old| old.created),
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

    /// What a watch of all leases tells, from a revision on.
    fn leases_since(&self, from: Revision) -> Vec<WatchEvent> {
        let is_told = |event: &&WatchEvent| match event {
            WatchEvent::Put(entry) => entry.revision >= from && entry.key.contains("/subnets/"),
            WatchEvent::Delete { revision, .. } => *revision >= from,
        };
        self.log.iter().filter(is_told).cloned().collect()
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
            Op::Claim {
                key,
                value,
                ttl,
                prefix,
                seen,
                replaces,
            } => {
                let mut known = self.entries.values();
                let is_as_seen =
                    known.all(|it| it.revision <= seen || !it.key.starts_with(&prefix));
                let is_there = |(old, expected): &(String, Revision)| {
                    self.entries
                        .get(old)
                        .is_some_and(|it| it.revision == *expected)
                };
                if self.entries.contains_key(&key) || !is_as_seen || !replaces.iter().all(is_there)
                {
                    return Answer::Conflict;
                }
                if let Some((old, _)) = replaces {
                    let revision = self.revision + 1;
                    self.entries.remove(&old);
                    self.log.push(WatchEvent::Delete { key: old, revision });
                }
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
    Manager::new(ManagerSettings {
        identity: Identity {
            public_ip: [192, 168, 0, last].into(),
            public_ipv6: None,
            vtep_mac: VtepMac::from_random([last; 6]),
            public_key: None,
        },
        prefix: PREFIX.to_owned(),
        checksums: Checksums::Complete,
        multicast: false,
        previous: None,
        previous_ipv6: None,
        wanted_config: WantedConfig::Any,
        renew_margin: RENEW_MARGIN,
        repeats: false,
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
                let pending = store.leases_since(from);
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
        Change::Own(OwnChange::Acquired(key)) => Some(key.to_string()),
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
        manager.ownership = Ownership::new(manager.ownership.identity, Some(previous));
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        assert_eq!(
            subnet == SubnetKey::new(previous).to_string(),
            expected,
            "{previous}"
        );
    }
}

#[test]
fn in_a_store_where_it_never_was_a_node_asks_for_nothing_of_elsewhere() {
    let mut store = Store::with_config(CONFIG);
    let mut manager = manager(1);
    let previous: Ipv4Net = "10.3.77.0/24".parse().unwrap();
    manager.ownership = Ownership::new(manager.ownership.identity, Some(previous));
    let Action::Store(op) = manager.poll(Instant::ZERO) else {
        panic!()
    };
    let vtep_mac = VtepMac::from_random([77; 6]);
    manager.begin_anew(vtep_mac);
    manager.answer(Instant::ZERO, store.execute(op));
    let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
    assert_ne!(subnet, SubnetKey::new(previous).to_string());
    assert_eq!(manager.ownership.identity.vtep_mac, vtep_mac);
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
    assert_eq!(
        changes.last(),
        Some(&Change::Own(OwnChange::Lost(Loss::OutOfSubnets(4))))
    );
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
            .any(|change| matches!(change, Change::Own(OwnChange::Skipped { .. })))
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
    let mut store = Store::with_config(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let mut manager = manager(1);
    settle(&mut manager, &mut store, Instant::ZERO);
    let key = format!("{PREFIX}/subnets/{}", store.subnets()[0].0);
    let before = store.entries[&key].clone();
    store.entries.get_mut(&key).unwrap().ttl = Some(std::time::Duration::from_secs(9));
    let Action::Watch { until, .. } = manager.poll(Instant::ZERO) else {
        panic!()
    };
    assert_eq!(until, Instant::ZERO + Duration::from_secs(43_200));
    assert_eq!(
        settle(&mut manager, &mut store, until),
        [Change::Own(OwnChange::Renewed)]
    );
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
        changes.contains(&Change::Own(OwnChange::Lost(Loss::Taken {
            key: subnet.clone(),
            holder: holder.into()
        }))),
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
        [Change::Own(OwnChange::Renewed)]
    );
    assert_eq!(store.subnets(), [(subnet.clone(), Some(LEASE_TTL))]);
    store.lease(&subnet, [192, 168, 0, 66]);
    let changes = settle(&mut manager, &mut store, Instant::ZERO);
    assert!(matches!(
        changes.last(),
        Some(Change::Own(OwnChange::Lost(Loss::Taken { .. })))
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
        [Change::Own(OwnChange::Renewed)],
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
    let written = store.revision;
    let mut manager = manager(1);
    let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
    assert_eq!(subnet, "10.3.50.0-24");
    let later = Instant::ZERO + Duration::from_secs(90_000);
    assert_eq!(settle(&mut manager, &mut store, later), []);
    assert_eq!(store.subnets(), [(subnet, None)]);
    assert_eq!(store.revision, written, "it is as it is to be");
    assert_eq!(manager.ends(), None);
}

#[test]
fn a_lease_ends_a_day_after_it_was_written_or_when_the_store_says() {
    let mut store = Store::with_config(CONFIG);
    let mut manager = manager(1);
    assert_eq!(manager.ends(), None);
    let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
    let day = Duration::from_secs(LEASE_TTL.as_secs());
    assert_eq!(manager.ends(), Some(Instant::ZERO + day));
    let renewed = Instant::ZERO + Duration::from_secs(50_000);
    settle(&mut manager, &mut store, renewed);
    assert_eq!(manager.ends(), Some(renewed + day));
    // Another has shortened it.
    let (key, value) = (
        format!("{PREFIX}/subnets/{subnet}"),
        manager.record().to_json(),
    );
    store.write(&key, &value, Some(std::time::Duration::from_secs(60_000)));
    manager.watch_ended(renewed);
    settle(&mut manager, &mut store, renewed);
    assert_eq!(manager.ends(), Some(renewed + Duration::from_secs(60_000)));
}

#[test]
fn a_reservation_follows_the_public_address_and_stays_one() {
    let mut store = Store::with_config(CONFIG);
    let value = LeaseRecord::udp([192, 168, 0, 1].into()).to_json();
    let key = format!("{PREFIX}/subnets/10.3.50.0-24");
    store.write(&key, &value, None);
    let mut manager = manager(1);
    settle(&mut manager, &mut store, Instant::ZERO);
    for last in [7, 8] {
        manager.set_public_ip([192, 168, 0, last].into());
        settle(&mut manager, &mut store, Instant::ZERO);
        assert_eq!(
            holder(&store, "10.3.50.0-24"),
            Ipv4Addr::new(192, 168, 0, last)
        );
        assert_eq!(store.subnets(), [("10.3.50.0-24".to_owned(), None)]);
    }
    manager.leave();
    assert_eq!(
        settle(&mut manager, &mut store, Instant::ZERO),
        [Change::Own(OwnChange::Left)]
    );
    assert_eq!(store.subnets(), [("10.3.50.0-24".to_owned(), None)]);
}

#[test]
fn a_reservation_with_another_value_gets_ours() {
    let mut store = Store::with_config(VXLAN);
    let value = LeaseRecord::udp([192, 168, 0, 1].into()).to_json();
    let key = format!("{PREFIX}/subnets/10.3.50.0-24");
    store.write(&key, &value, None);
    let mut manager = manager(1);
    settle(&mut manager, &mut store, Instant::ZERO);
    assert_eq!(store.subnets(), [("10.3.50.0-24".to_owned(), None)]);
    assert_eq!(store.entries[&key].value, manager.record().to_json());
}

#[test]
fn of_several_records_under_our_address_that_of_our_vtep_goes_on() {
    for ours in ["10.3.40.0-24", "10.3.60.0-24"] {
        let mut store = Store::with_config(VXLAN);
        let mut node = manager(1);
        node.ownership =
            Ownership::new(node.ownership.identity, ours.replace('-', "/").parse().ok());
        settle(&mut node, &mut store, Instant::ZERO);
        let mut other = returning(1, 9, "10.3.50.0/24");
        other.config = node.config.clone();
        let value = other.record().to_json();
        let key = format!("{PREFIX}/subnets/10.3.50.0-24");
        store.write(&key, &value, Some(LEASE_TTL));
        let again = acquired(&settle(&mut manager(1), &mut store, Instant::ZERO));
        assert_eq!(again.as_deref(), Some(ours));
    }
}

#[test]
fn the_margin_says_when_to_renew() {
    for (minutes, at) in [(60, 23 * 60), (1, 1439), (1439, 1), (99_999, 1)] {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        manager.renew_margin = std::time::Duration::from_secs(minutes * 60);
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
    let missing = ConfigFault::Missing(format!("{PREFIX}/config"));
    let told: Vec<_> = manager.changes().collect();
    assert_eq!(told, [Change::Own(OwnChange::AwaitsConfig(missing))]);
    store.write(&format!("{PREFIX}/config"), CONFIG, None);
    assert!(acquired(&settle(&mut manager, &mut store, now)).is_some());
}

/// Asks for the configuration a few times, and returns what has changed.
fn read_config(manager: &mut Manager, store: &mut Store, now: &mut Instant) -> Vec<Change> {
    for _ in 0..3 {
        match manager.poll(*now) {
            Action::Store(op @ Op::Get(_)) => manager.answer(*now, store.execute(op)),
            Action::Wait { until } => *now = until,
            other => panic!("{other:?}"),
        }
        while let Action::Wait { until } = manager.poll(*now) {
            *now = until;
        }
    }
    manager.changes().collect()
}

#[test]
fn a_configuration_that_cannot_be_used_is_waited_for_until_it_is_mended() {
    let key = format!("{PREFIX}/config");
    let mut store = Store::with_config(r#"{"Network": \ }"#);
    let mut manager = wanting(1, WantedConfig::Exactly(proposal("10.3.0.0/16")));
    let mut now = Instant::ZERO;
    let mut told = |manager: &mut Manager, store: &mut Store| {
        let changes = read_config(manager, store, &mut now);
        let [Change::Own(OwnChange::AwaitsConfig(fault))] = &changes[..] else {
            panic!("told once: {changes:?}")
        };
        fault.clone()
    };
    let fault = told(&mut manager, &mut store);
    assert!(matches!(fault, ConfigFault::Invalid(_)), "{fault}");
    store.write(&key, r#"{"Network":"10.3.0.0/31"}"#, None);
    let fault = told(&mut manager, &mut store);
    assert!(matches!(fault, ConfigFault::Invalid(_)), "{fault}");
    store.write(&key, r#"{"Network":"10.4.0.0/16"}"#, None);
    let text = told(&mut manager, &mut store).to_string();
    assert!(
        text.contains("10.4.0.0/16") && text.contains("10.3.0.0/16"),
        "{text}"
    );
    assert_eq!(store.subnets(), [], "nothing is written for others");
    store.write(&key, &proposal("10.3.0.0/16").to_json(), None);
    let changes = settle(&mut manager, &mut store, now);
    assert!(acquired(&changes).is_some(), "{changes:?}");
}

#[test]
fn a_configuration_that_the_caller_cannot_use_is_asked_for_again() {
    let mut store = Store::with_config(CONFIG);
    let mut manager = manager(1);
    let mut now = Instant::ZERO;
    for _ in 0..3 {
        let Action::Store(op @ Op::Get(_)) = manager.poll(now) else {
            panic!("the configuration is not read")
        };
        manager.answer(now, store.execute(op));
        let told: Vec<_> = manager.changes().collect();
        assert!(
            matches!(told[..], [Change::Own(OwnChange::Configured(_))]),
            "{told:?}"
        );
        manager.refuse_config(now);
        let Action::Wait { until } = manager.poll(now) else {
            panic!("it does not wait")
        };
        now = until;
    }
    assert_eq!(store.subnets(), [], "nothing is written");
    assert!(acquired(&settle(&mut manager, &mut store, now)).is_some());
    // A node that has its lease goes on with it.
    manager.refuse_config(now);
    assert!(matches!(manager.poll(now), Action::Watch { .. }));
}

const VXLAN: &str = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// A node that had `subnet` before, has the MAC address `mac` and is at `last` now.
fn returning(last: u8, mac: u8, subnet: &str) -> Manager {
    let mut manager = manager(last);
    manager.ownership.identity.vtep_mac = VtepMac::from_random([mac; 6]);
    manager.ownership = Ownership::new(
        manager.ownership.identity,
        subnet.replace('-', "/").parse().ok(),
    );
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
        [
            Change::Own(OwnChange::Moved { key, from }),
            Change::Own(OwnChange::Acquired(key))
        ]
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
                [
                    Change::Own(OwnChange::Disputed(key)),
                    Change::Own(OwnChange::Renewed)
                ]
            );
            let changes = settle(&mut copy, &mut store, Instant::ZERO);
            let [Change::Own(OwnChange::Lost(loss @ Loss::Cloned { .. }))] = &changes[..] else {
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
    assert!(matches!(
        changes[..],
        [Change::Own(OwnChange::Lost(Loss::Cloned { .. }))]
    ));
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
    let end = VtepMac::from_random([1; 6]).into();
    assert_eq!(
        changes[1..],
        [
            Change::Own(OwnChange::Replaced { key, end }),
            Change::Own(OwnChange::Acquired(key))
        ]
    );
    let changes = settle(&mut returning(1, 8, &subnet), &mut store, Instant::ZERO);
    assert_eq!(
        changes[1..],
        [Change::Own(OwnChange::Acquired(key))],
        "we had it before"
    );
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
            [Change::Own(OwnChange::Renewed)]
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
        Change::Own(OwnChange::Renewed),
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
    let Action::Store(delete @ Op::CompareAndDelete { .. }) = manager.poll(Instant::ZERO) else {
        panic!("nothing is deleted");
    };
    manager.answer(Instant::ZERO, store.execute(delete));
    assert_eq!(manager.poll(Instant::ZERO), Action::Stop);
    assert_eq!(
        manager.changes().collect::<Vec<_>>(),
        [Change::Own(OwnChange::Left)]
    );
    assert_eq!(store.subnets(), []);
}

#[test]
fn leaving_deletes_no_other_record() {
    let mut store = Store::with_config(VXLAN);
    let mut node = manager(1);
    let subnet = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
    // One under our address that is not the one we have, and the one that we have, written again.
    store.lease("10.3.0.0-24", [192, 168, 0, 1]);
    let key = format!("{PREFIX}/subnets/{subnet}");
    store.write(&key, &node.record().to_json(), Some(LEASE_TTL));
    node.leave();
    let changes = settle(&mut node, &mut store, Instant::ZERO);
    assert_eq!(changes, [Change::Own(OwnChange::Left)]);
    let other = ("10.3.0.0-24".to_owned(), Some(LEASE_TTL));
    assert_eq!(store.subnets(), [other]);

    // One that a node with our VTEP has moved to its address.
    let mut store = Store::with_config(VXLAN);
    let mut node = manager(1);
    let subnet = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
    settle(&mut returning(7, 1, &subnet), &mut store, Instant::ZERO);
    node.leave();
    let changes = settle(&mut node, &mut store, Instant::ZERO);
    assert_eq!(changes, [Change::Own(OwnChange::Left)]);
    assert_eq!(holder(&store, &subnet), Ipv4Addr::new(192, 168, 0, 7));
}

fn proposal(network: &str) -> NetworkConfig {
    NetworkConfig::new(network.parse().unwrap(), None, Backend::Udp { port: 8285 }).unwrap()
}

fn wanting(last: u8, wanted_config: WantedConfig) -> Manager {
    let mut manager = manager(last);
    manager.wanted_config = wanted_config;
    manager
}

#[test]
fn a_wish_is_written_once_and_exact_ones_must_agree() {
    let (one, other) = (proposal("10.244.0.0/16"), proposal("10.9.0.0/16"));
    for first in [
        WantedConfig::IfNone(one.clone()),
        WantedConfig::Exactly(one.clone()),
    ] {
        let mut store = Store::default();
        let changes = settle(&mut wanting(1, first), &mut store, Instant::ZERO);
        assert_eq!(changes[0], Change::Own(OwnChange::Configured(one.clone())));
        assert!(acquired(&changes).is_some());

        for agrees in [
            WantedConfig::Any,
            WantedConfig::IfNone(other.clone()),
            WantedConfig::Exactly(one.clone()),
        ] {
            let changes = settle(&mut wanting(2, agrees), &mut store, Instant::ZERO);
            assert_eq!(changes[0], Change::Own(OwnChange::Configured(one.clone())));
        }
        let mut second = wanting(3, WantedConfig::Exactly(other.clone()));
        let changes = read_config(&mut second, &mut store, &mut Instant::ZERO.clone());
        let stored = one.to_string();
        let fault = ConfigFault::OtherNetwork {
            stored,
            asked: other.to_string(),
        };
        assert_eq!(changes, [Change::Own(OwnChange::AwaitsConfig(fault))]);
    }
}

#[test]
fn a_network_whose_records_we_cannot_write_is_left_alone() {
    let mut store = Store::with_config(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"ipsec"}}"#);
    let mut manager = manager(1);
    let mut now = Instant::ZERO;
    let changes = read_config(&mut manager, &mut store, &mut now);
    let fault = ConfigFault::OtherBackend("ipsec".to_owned());
    assert_eq!(changes, [Change::Own(OwnChange::AwaitsConfig(fault))]);
    assert_eq!(store.subnets(), []);
    manager.leave();
    assert_eq!(manager.changes().next(), Some(Change::Own(OwnChange::Left)));
    assert_eq!(manager.poll(now), Action::Stop);
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
    assert!(changes.contains(&Change::Own(OwnChange::Renewed)));
    assert_eq!(changes.last(), Some(&Change::Own(OwnChange::Left)));
}

#[test]
fn an_overlapping_lease_takes_a_subnet_whose_record_is_gone() {
    let mut store = Store::with_config(CONFIG);
    let mut manager = manager(1);
    let key = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
    // Of one length those that overlap differ in IPv6 alone.
    store.lease(&format!("{key}&fd00::-64"), [192, 168, 0, 9]);
    let changes = settle(&mut manager, &mut store, Instant::ZERO);
    let last = changes.last();
    assert!(matches!(last, Some(Change::Peer(..))), "{changes:?}");
    store.delete(&format!("{PREFIX}/subnets/{key}"));
    let changes = settle(&mut manager, &mut store, Instant::ZERO);
    let holder = Ipv4Addr::new(192, 168, 0, 9);
    assert_eq!(
        changes,
        [Change::Own(OwnChange::Lost(Loss::Taken {
            key,
            holder: holder.into()
        }))]
    );
    assert_eq!(store.subnets().len(), 1, "nothing is written any more");
}

/// A manager that has just asked for a write of its record, to be answered at the time that is
/// told: the first one, or a renewal.
fn writing(store: &mut Store, is_renewal: bool) -> (Manager, Op, Instant) {
    let mut manager = manager(1);
    let mut now = Instant::ZERO;
    if is_renewal {
        settle(&mut manager, store, now);
        now += Duration::from_secs(43_200);
    }
    loop {
        match manager.poll(now) {
            Action::Store(op @ (Op::Claim { .. } | Op::CompareAndPut { .. })) => {
                return (manager, op, now);
            }
            Action::Store(op) => manager.answer(now, store.execute(op)),
            other => panic!("{other:?}"),
        }
    }
}

/// Tells of what was written after a revision.
fn tell(manager: &mut Manager, store: &Store, after: Revision, now: Instant) {
    for event in store.leases_since(after + 1) {
        manager.event(now, event);
    }
}

#[test]
fn what_happens_during_an_operation_is_not_lost() {
    // What happens to the record after it is written, before the answer; what follows.
    for (is_renewal, foreign) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut store = Store::with_config(CONFIG);
        let (mut manager, op, now) = writing(&mut store, is_renewal);
        let before = store.revision;
        let answer = store.execute(op);
        let subnet = store.subnets()[0].0.clone();
        if foreign {
            store.lease(&subnet, [192, 168, 0, 66]);
        } else {
            store.delete(&format!("{PREFIX}/subnets/{subnet}"));
        }
        tell(&mut manager, &store, before, now);
        manager.answer(now, answer);
        let changes = settle(&mut manager, &mut store, now);
        if foreign {
            assert!(matches!(
                changes.last(),
                Some(Change::Own(OwnChange::Lost(Loss::Taken { .. })))
            ));
        } else {
            assert_eq!(store.subnets(), [(subnet, Some(LEASE_TTL))]);
        }
    }
}

#[test]
fn peers_come_and_go_during_an_operation() {
    for is_renewal in [false, true] {
        let mut store = Store::with_config(CONFIG);
        store.lease("10.3.201.0-24", [192, 168, 0, 9]);
        let (mut manager, op, now) = writing(&mut store, is_renewal);
        let before = store.revision;
        store.lease("10.3.202.0-24", [192, 168, 0, 8]);
        store.delete(&format!("{PREFIX}/subnets/10.3.201.0-24"));
        let answer = store.execute(op);
        manager.changes().for_each(drop);
        tell(&mut manager, &store, before, now);
        assert_eq!(peers(&manager), ["10.3.202.0-24"]);
        assert_eq!(manager.changes().count(), 2);
        manager.answer(now, answer);
        assert!(matches!(manager.poll(now), Action::Watch { .. }));
    }
}

#[test]
fn our_own_write_is_no_reason_to_read_everything_again() {
    for is_renewal in [false, true] {
        let mut store = Store::with_config(CONFIG);
        let (mut manager, op, now) = writing(&mut store, is_renewal);
        let before = store.revision;
        let answer = store.execute(op);
        tell(&mut manager, &store, before, now);
        manager.answer(now, answer);
        assert!(matches!(manager.poll(now), Action::Watch { .. }));
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
    let Action::Store(list @ Op::List(_)) = manager.poll(Instant::ZERO) else {
        panic!("no list");
    };
    manager.answer(Instant::ZERO, store.execute(list));
    let create = manager.poll(Instant::ZERO);
    assert!(matches!(create, Action::Store(Op::Claim { .. })), "at once");
    let changes = settle(&mut manager, &mut store, Instant::ZERO);
    assert_eq!(changes, [Change::Own(OwnChange::Renewed)]);
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
        let mut store = Store::with_config(CONFIG);
        for _ in 0..3 {
            store.lease("10.3.9.0-24", [192, 168, 0, 9]);
        }
        let (mut manager, create, mut now) = writing(&mut store, false);
        // The watch would begin after our own record, which is not the first of the new history.
        let mut store = Store::with_config(CONFIG);
        store.lease("10.3.8.0-24", [192, 168, 0, 8]);
        if fails {
            for last in 5..8 {
                store.lease(&format!("10.3.{last}.0-24"), [192, 168, 0, last]);
            }
            manager.failed(now);
            now += Duration::from_secs(60);
            // What the store has now is looked at before a subnet is chosen again.
            let Action::Store(list @ Op::List(_)) = manager.poll(now) else {
                panic!("no list")
            };
            manager.answer(now, store.execute(list));
        } else {
            let answer = store.execute(create);
            manager.answer(now, answer);
        }
        let own = acquired(&settle(&mut manager, &mut store, now)).unwrap();
        assert_eq!(peers(&manager), others(&store, &own), "fails: {fails}");
    }
}

#[test]
fn leases_of_other_lengths_and_ranges_are_no_peers_and_take_nothing_from_us() {
    let config = r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.4.0","SubnetMax":"10.3.200.0"}"#;
    let mut store = Store::with_config(config);
    let mut manager = manager(1);
    settle(&mut manager, &mut store, Instant::ZERO);
    let foreign = [
        "10.3.0.0-16",
        "10.3.7.128-25",
        "10.3.2.0-24",
        "10.3.201.0-24",
    ];
    for subnet in foreign {
        store.lease(subnet, [192, 168, 0, 66]);
    }
    store.lease("10.3.150.0-24", [192, 168, 0, 2]);
    for now in [Instant::ZERO, Instant::from_secs(60)] {
        let changes = settle(&mut manager, &mut store, now);
        assert!(
            !changes
                .iter()
                .any(|it| matches!(it, Change::Own(OwnChange::Lost(_))))
        );
        assert_eq!(peers(&manager), ["10.3.150.0-24"]);
        // All is read again, which does not cost us our subnet either.
        manager.watch_ended(now);
    }
}

#[test]
fn the_first_leases_of_a_public_address_are_peers() {
    let mut store = Store::with_config(CONFIG);
    let greedy = [192, 168, 0, 66];
    for third in 100..130 {
        store.lease(&format!("10.3.{third}.0-24"), greedy);
    }
    let mut manager = manager(1);
    let changes = settle(&mut manager, &mut store, Instant::ZERO);
    let expected = |thirds: &[u8]| {
        let keys = thirds.iter().map(|third| format!("10.3.{third}.0-24"));
        keys.collect::<Vec<_>>()
    };
    let first: Vec<u8> = (100..116).collect();
    assert_eq!(peers(&manager), expected(&first));
    let told = changes.iter().filter(|it| matches!(it, Change::Peer(..)));
    assert_eq!(told.count(), 16);
    let is_excess = |it: &&Change| matches!(it, Change::Own(OwnChange::Skipped { reason, .. }) if reason.contains("16"));
    assert_eq!(changes.iter().filter(is_excess).count(), 14);

    // What is told adds up to the same, whatever comes and goes.
    let mut known: BTreeMap<_, _> = changes.into_iter().filter_map(peer_told).collect();
    store.lease("10.3.50.0-24", greedy);
    store.delete(&format!("{PREFIX}/subnets/10.3.103.0-24"));
    store.delete(&format!("{PREFIX}/subnets/10.3.129.0-24"));
    store.lease("10.3.101.0-24", [192, 168, 0, 67]);
    store.lease("10.3.128.0-24", [192, 168, 0, 67]);
    for change in settle(&mut manager, &mut store, Instant::ZERO) {
        match change {
            Change::PeerGone(key) => assert!(known.remove(&key).is_some(), "{key}"),
            change => known.extend(peer_told(change)),
        }
    }
    let now: Vec<u8> = [50, 100, 101, 102]
        .into_iter()
        .chain(104..117)
        .chain([128])
        .collect();
    assert_eq!(peers(&manager), expected(&now));
    let known: Vec<_> = known.keys().map(SubnetKey::to_string).collect();
    assert_eq!(known, expected(&now));
}

fn peer_told(change: Change) -> Option<(SubnetKey, LeaseRecord)> {
    match change {
        Change::Peer(key, record) => Some((key, record)),
        _ => None,
    }
}

/// The subnets of peers, as a manager knows them and as the store has them.
fn peers(manager: &Manager) -> Vec<String> {
    manager.leases().map(|(key, _)| key.to_string()).collect()
}

fn others(store: &Store, own: &str) -> Vec<String> {
    let subnets = store.subnets().into_iter().map(|(subnet, _)| subnet);
    subnets.filter(|subnet| subnet != own).collect()
}

#[test]
fn a_record_written_before_the_list_tells_that_the_store_was_wiped() {
    // Writes of the old history, of which the list tells, and of the new one before ours.
    for (old, new) in [(3, 1), (3, 2), (2, 1)] {
        let mut store = Store::with_config(CONFIG);
        for last in 0..old {
            store.lease("10.3.200.0-24", [192, 168, 0, 10 + last]);
        }
        let (mut manager, create, _) = writing(&mut store, false);
        let mut store = Store::with_config(CONFIG);
        for last in 0..new {
            store.lease("10.3.201.0-24", [192, 168, 0, 20 + last]);
        }
        manager.answer(Instant::ZERO, store.execute(create));
        let own = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        assert_eq!(peers(&manager), others(&store, &own), "{old}, {new}");
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
        let [
            Change::Own(OwnChange::Skipped { reason, .. }),
            Change::PeerGone(gone),
        ] = &changes[..]
        else {
            panic!("{changes:?}")
        };
        assert!(reason.len() < 200, "{reason}");
        assert_eq!(gone.to_string(), "10.3.1.0-24");
        one.watch_ended(Instant::ZERO);
        let changes = settle(&mut one, &mut store, Instant::ZERO);
        assert_eq!(changes, [], "it is reported once");

        // Not chosen, not even as the subnet of an earlier run.
        let mut two = manager(2);
        two.ownership =
            Ownership::new(two.ownership.identity, Some("10.3.1.0/24".parse().unwrap()));
        let changes = settle(&mut two, &mut store, Instant::ZERO);
        assert_eq!(
            changes.last(),
            Some(&Change::Own(OwnChange::Lost(Loss::OutOfSubnets(2))))
        );

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
    let is_skip = |change: &&Change| matches!(change, Change::Own(OwnChange::Skipped { .. }));
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
                    .any(|change| matches!(change, Change::Own(OwnChange::Disputed(_))))
            );
            assert_eq!(changes.last(), Some(&Change::Own(OwnChange::Renewed)));
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
    twins[1].ownership.identity.vtep_mac = VtepMac::from_random([9; 6]);
    let mut now = Instant::ZERO;
    let mut lost = Vec::new();
    for _ in 0..100 {
        for twin in &mut twins {
            lost.extend(settle(twin, &mut store, now).into_iter().filter(|change| {
                matches!(change, Change::Own(OwnChange::Lost(Loss::Disputed { .. })))
            }));
            now += Duration::from_secs(1);
        }
    }
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert!(store.revision < 50, "{} writes", store.revision);
}

#[test]
fn disputes_far_apart_have_nothing_to_do_with_each_other() {
    for (pause, ends) in [
        (DISPUTE_MEMORY, false),
        (DISPUTE_MEMORY - Duration::from_micros(1), true),
    ] {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        let key = subnet.parse().unwrap();
        let mut now = Instant::ZERO;
        for round in 1..=3 * MAX_DISPUTES {
            let key_text = format!("{PREFIX}/subnets/{subnet}");
            store.write(&key_text, "rubbish", Some(LEASE_TTL));
            let changes = settle(&mut manager, &mut store, now);
            if ends && round > MAX_DISPUTES {
                let lost = Change::Own(OwnChange::Lost(Loss::Disputed {
                    key: subnet.clone(),
                    public_ip: [192, 168, 0, 1].into(),
                }));
                assert_eq!(changes.last(), Some(&lost), "{round}");
                break;
            }
            let again = [
                Change::Own(OwnChange::Disputed(key)),
                Change::Own(OwnChange::Renewed),
            ];
            assert!(changes.ends_with(&again), "{round}: {changes:?}");
            now += pause;
        }
        assert_eq!(manager.phase == Phase::Over, ends);
    }
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
    assert_eq!(changes, [Change::Own(OwnChange::Left)]);
    assert_eq!(store.subnets(), [(subnet, None)]);
}

#[test]
fn a_reservation_made_while_nothing_is_heard_stays_one() {
    for moves in [false, true] {
        let mut store = Store::with_config(CONFIG);
        let mut manager = manager(1);
        let subnet = acquired(&settle(&mut manager, &mut store, Instant::ZERO)).unwrap();
        let value = manager.record().to_json();
        manager.watch_ended(Instant::ZERO);
        if moves {
            manager.set_public_ip([192, 168, 0, 2].into());
        }
        store.write(&format!("{PREFIX}/subnets/{subnet}"), &value, None);
        let later = Instant::ZERO + Duration::from_secs(60);
        settle(&mut manager, &mut store, later);
        assert_eq!(store.subnets(), [(subnet.clone(), None)], "{moves}");
        let key = format!("{PREFIX}/subnets/{subnet}");
        assert_eq!(store.entries[&key].value, manager.record().to_json());
    }
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
    assert_eq!(
        settle(&mut manager, &mut store, later),
        [Change::Own(OwnChange::Renewed)]
    );
    assert_eq!(store.subnets(), [(subnet, Some(LEASE_TTL))]);
}

#[test]
fn leaving_sees_a_write_through_that_is_in_flight() {
    for answered in [false, true] {
        let mut store = Store::with_config(CONFIG);
        let (mut manager, op, now) = writing(&mut store, false);
        manager.leave();
        manager.leave();
        let answer = store.execute(op);
        if answered {
            manager.answer(now, answer);
        } else {
            manager.failed(now);
        }
        let changes = settle(&mut manager, &mut store, now);
        assert_eq!(changes.last(), Some(&Change::Own(OwnChange::Left)));
        assert_eq!(store.subnets(), []);
        manager.leave();
        assert_eq!(manager.changes().next(), None, "nothing follows");
    }
    let mut early = manager(1);
    early.leave();
    assert_eq!(
        early.changes().collect::<Vec<_>>(),
        [Change::Own(OwnChange::Left)]
    );
    assert_eq!(early.poll(Instant::ZERO), Action::Stop);
}

#[test]
fn a_store_that_contradicts_itself_is_not_asked_in_a_loop() {
    let mut now = Instant::ZERO;
    let mut manager = wanting(1, WantedConfig::IfNone(proposal("10.244.0.0/16")));
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
    let mut manager = wanting(1, WantedConfig::Any);
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
fn conflicts_are_looked_into_at_once_three_times() {
    let mut store = Store::with_config(CONFIG);
    let mut manager = manager(1);
    let mut now = Instant::ZERO;
    let mut delays = Vec::new();
    while delays.len() < 7 {
        match manager.poll(now) {
            Action::Store(Op::Claim { .. }) => {
                manager.answer(now, Answer::Conflict);
                delays.push(0);
            }
            Action::Store(op) => manager.answer(now, store.execute(op)),
            Action::Wait { until } => {
                *delays.last_mut().unwrap() = (until - now).total_millis();
                now = until;
            }
            other => panic!("{other:?}"),
        }
    }
    // The wait of the last one is not in it.
    assert_eq!(delays[..3], [0; 3], "{delays:?}");
    for (delay, longest) in delays[3..6].iter().zip([100, 200, 400]) {
        assert!((longest / 2..=longest).contains(delay), "{delays:?}");
    }
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
    for pause in [Duration::ZERO, backoff::SHORT_WATCH] {
        settle(&mut manager, &mut store, now);
        now += pause;
        manager.watch_ended(now);
    }
    let list = Op::List(manager.lease_prefix());
    assert_eq!(manager.poll(now), Action::Store(list), "that one was long");
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
    assert_eq!(
        manager.view.free_subnets(&config)[0].to_string(),
        "10.1.57.0/30"
    );
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

#[test]
fn nodes_do_not_come_back_together() {
    let delay = |seed: u64| {
        let mut manager = manager(1);
        manager.random = Random::new(seed);
        assert!(matches!(manager.poll(Instant::ZERO), Action::Store(_)));
        manager.failed(Instant::ZERO);
        let Action::Wait { until } = manager.poll(Instant::ZERO) else {
            panic!("it does not wait");
        };
        until.total_millis()
    };
    let delays: std::collections::BTreeSet<_> = (0..2000).map(delay).collect();
    assert!(delays.into_iter().eq(50..=100), "each of them");
}

/// A node beside flannel's: its record is written again where that is new to others.
fn repeating(last: u8) -> Manager {
    let mut manager = manager(last);
    manager.repeats = true;
    manager
}

/// Lets time pass from `start` to `end`, and returns the seconds after `start` at which the manager
/// wrote its record, each with its time to live.
fn writes(
    manager: &mut Manager,
    store: &mut Store,
    (start, end): (Instant, Instant),
) -> Vec<(u64, Option<std::time::Duration>)> {
    let mut now = start;
    let mut writes = Vec::new();
    loop {
        let before = store.revision;
        settle(manager, store, now);
        let own = |event: &&WatchEvent| matches!(event, WatchEvent::Put(entry) if entry.value == manager.record().to_json());
        for event in store.leases_since(before + 1).iter().filter(own) {
            if let WatchEvent::Put(entry) = event {
                writes.push(((now - start).secs(), entry.ttl));
            }
        }
        match manager.poll(now) {
            Action::Watch { until, .. } if until < end => now = until,
            Action::Watch { .. } => return writes,
            other => panic!("{other:?}"),
        }
    }
}

fn seconds(seconds: u64) -> Instant {
    Instant::ZERO + Duration::from_secs(seconds)
}

/// Whether these are the first writing of a record at `first` and its repetitions.
fn are_repetitions(writes: &[(u64, Option<std::time::Duration>)], first: u64) -> bool {
    let ranges = [0..=0, 1..=2, 11..=18, 45..=75];
    let is_in = |(range, (at, _)): (&std::ops::RangeInclusive<u64>, &(u64, _))| {
        range.contains(&(at.saturating_sub(first)))
    };
    writes.len() == ranges.len() && ranges.iter().zip(writes).all(is_in)
}

#[test]
fn a_new_record_is_written_again_for_watchers_that_lose_changes() {
    let mut store = Store::with_config(CONFIG);
    store.lease("10.3.8.0-24", [192, 168, 0, 8]);
    let mut manager = repeating(1);
    let first = writes(&mut manager, &mut store, (Instant::ZERO, seconds(600)));
    assert!(are_repetitions(&first, 0), "{first:?}");
    assert!(first.iter().all(|(_, ttl)| *ttl == Some(LEASE_TTL)));
    // The renewal comes half a day after the last of them, and no other node needs to hear of it twice.
    let (last, _) = first[3];
    let later = writes(
        &mut manager,
        &mut store,
        (seconds(600), seconds(43_200 * 2)),
    );
    assert_eq!(later, [(last + 43_200 - 600, Some(LEASE_TTL))]);
    // Another address is news, and so is what is written over another's value.
    let now = seconds(43_200 * 2);
    manager.set_public_ip([192, 168, 0, 99].into());
    let moved = writes(
        &mut manager,
        &mut store,
        (now, now + Duration::from_secs(600)),
    );
    assert!(are_repetitions(&moved, 0), "{moved:?}");
    let subnet = store.subnets()[0].0.clone();
    let ours = if subnet == "10.3.8.0-24" {
        store.subnets()[1].0.clone()
    } else {
        subnet
    };
    let now = now + Duration::from_secs(600);
    store.write(
        &format!("{PREFIX}/subnets/{ours}"),
        "rubbish",
        Some(LEASE_TTL),
    );
    let written = writes(
        &mut manager,
        &mut store,
        (now, now + Duration::from_secs(600)),
    );
    assert!(are_repetitions(&written, 0), "{written:?}");
}

#[test]
fn a_record_is_written_once_where_nobody_loses_changes() {
    for (repeats, other) in [(false, true), (true, false)] {
        let mut store = Store::with_config(CONFIG);
        if other {
            store.lease("10.3.8.0-24", [192, 168, 0, 8]);
        }
        let mut manager = manager(1);
        manager.repeats = repeats;
        let writes = writes(&mut manager, &mut store, (Instant::ZERO, seconds(600)));
        assert_eq!(writes, [(0, Some(LEASE_TTL))], "{repeats} {other}");
    }
}

#[test]
fn a_reservation_that_is_written_again_stays_one() {
    let mut store = Store::with_config(CONFIG);
    store.lease("10.3.8.0-24", [192, 168, 0, 8]);
    let key = format!("{PREFIX}/subnets/10.3.7.0-24");
    let value = r#"{"PublicIP":"192.168.0.1","PublicIPv6":"fd00::1"}"#;
    store.write(&key, value, None);
    let mut manager = repeating(1);
    let writes = writes(&mut manager, &mut store, (Instant::ZERO, seconds(86_400)));
    assert!(are_repetitions(&writes, 0), "{writes:?}");
    assert!(writes.iter().all(|(_, ttl)| ttl.is_none()));
    assert_eq!(store.entries[&key].ttl, None);
}

#[test]
fn the_start_of_another_node_is_a_reason_to_write_again() {
    let mut store = Store::with_config(CONFIG);
    store.lease("10.3.8.0-24", [192, 168, 0, 8]);
    let mut manager = repeating(1);
    let start = Instant::ZERO;
    let first = writes(&mut manager, &mut store, (start, seconds(4)));
    assert_eq!(first.len(), 2, "{first:?}");
    store.lease("10.3.9.0-24", [192, 168, 0, 9]);
    // So is no change of a lease that is there already.
    store.lease("10.3.8.0-24", [192, 168, 0, 18]);
    let more = writes(&mut manager, &mut store, (seconds(4), seconds(600)));
    assert_eq!(more.len(), 3, "{more:?}");
    assert!(more[0].0 <= 3, "{more:?}");
}

#[test]
fn repetitions_begin_anew_after_an_outage() {
    let mut store = Store::with_config(CONFIG);
    store.lease("10.3.8.0-24", [192, 168, 0, 8]);
    let mut manager = repeating(1);
    let first = writes(&mut manager, &mut store, (Instant::ZERO, seconds(4)));
    assert_eq!(first.len(), 2, "{first:?}");
    let Action::Watch { until, .. } = manager.poll(seconds(4)) else {
        panic!()
    };
    let mut now = until;
    for _ in 0..50 {
        let action = manager.poll(now);
        match action {
            Action::Store(_) => manager.failed(now),
            Action::Wait { until } => now = until,
            other => panic!("{other:?}"),
        }
    }
    now += Duration::from_secs(100);
    let later = writes(
        &mut manager,
        &mut store,
        (now, now + Duration::from_secs(600)),
    );
    assert!(are_repetitions(&later, 0), "{later:?}");
}

#[test]
fn a_record_whose_writing_was_not_answered_is_written_again() {
    let mut store = Store::with_config(CONFIG);
    store.lease("10.3.8.0-24", [192, 168, 0, 8]);
    let mut manager = repeating(1);
    settle(&mut manager, &mut store, Instant::ZERO);
    let key = format!("{PREFIX}/subnets/{}", acquired_key(&manager));
    store.delete(&key);
    let now = seconds(600);
    for event in store.leases_since(manager.relist.watch_from()) {
        manager.event(now, event);
    }
    let Action::Store(op @ Op::List(_)) = manager.poll(now) else {
        panic!()
    };
    let answer = store.execute(op);
    manager.answer(now, answer);
    let Action::Store(op @ Op::Claim { .. }) = manager.poll(now) else {
        panic!()
    };
    store.execute(op);
    manager.failed(now);
    let writes = writes(&mut manager, &mut store, (now, seconds(1_200)));
    assert!(writes.len() >= 3, "{writes:?}");
    assert!(writes[0].0 <= 3, "{writes:?}");
}

/// A node that stood still hears what the store has said before it was wiped; the store has as many
/// revisions again, so that nothing else shows it.
#[test]
fn a_list_from_before_a_standstill_is_read_again() {
    for patience in [Duration::from_secs(59), Duration::from_secs(100_000)] {
        let mut store = Store::with_config(CONFIG);
        store.lease("10.3.7.0-24", [192, 168, 0, 7]);
        let mut manager = manager(1);
        let now = Instant::ZERO;
        let answer = loop {
            match manager.poll(now) {
                Action::Store(op @ Op::List(_)) => break store.execute(op),
                Action::Store(op) => manager.answer(now, store.execute(op)),
                other => panic!("{other:?}"),
            }
        };
        let mut wiped = Store::with_config(CONFIG);
        wiped.revision = store.revision;
        let later = now + patience;
        manager.answer(later, answer);
        let changes = settle(&mut manager, &mut wiped, later);
        let gone = changes.iter().any(
            |change| matches!(change, Change::Peer(key, _) if key.to_string() == "10.3.7.0-24"),
        );
        assert_eq!(gone, patience < LATE, "{changes:?}");
        assert!(acquired(&changes).is_some());
    }
}

fn acquired_key(manager: &Manager) -> SubnetKey {
    manager.own.unwrap().key
}

const WIREGUARD: &str = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"wireguard","PSK":"4HAXZFAg2aqXKxI1GMXTEDKcNJeuMEJRr8rjFO8XmEY="}}"#;

/// A node with a public key, which it has as soon as it knows that it needs one.
fn with_key(mut manager: Manager, byte: u8) -> Manager {
    manager.set_public_key(PublicKey([byte; 32]));
    manager
}

#[test]
fn a_node_of_wireguard_publishes_its_key_and_is_known_by_it() {
    let mut store = Store::with_config(WIREGUARD);
    let subnet = acquired(&settle(
        &mut with_key(manager(1), 1),
        &mut store,
        Instant::ZERO,
    ))
    .unwrap();
    let path = format!("{PREFIX}/subnets/{subnet}");
    let key = PublicKey([1; 32]);
    let expected = |last| {
        format!(
            r#"{{"PublicIP":"192.168.0.{last}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{key}","Port":51820}}}}"#
        )
    };
    assert_eq!(store.entries[&path].value, expected(1));
    // It comes back with another address, and finds its subnet by the key.
    let previous = subnet.replace('-', "/");
    let mut moved = with_key(returning(7, 1, &previous), 1);
    let changes = settle(&mut moved, &mut store, Instant::ZERO);
    assert_eq!(acquired(&changes), Some(subnet.clone()));
    assert_eq!(store.entries[&path].value, expected(7));
    // Who has another key is another node, whatever its VTEP.
    let mut other = with_key(returning(8, 1, &previous), 8);
    let changes = settle(&mut other, &mut store, Instant::ZERO);
    assert_ne!(acquired(&changes), Some(subnet));
}

#[test]
fn another_preshared_key_is_another_network_and_not_told() {
    let mut store = Store::with_config(WIREGUARD);
    let asked = WIREGUARD.replace("4HAX", "5HAX");
    let mut manager = manager(1);
    manager.wanted_config = WantedConfig::Exactly(NetworkConfig::parse(&asked).unwrap());
    let Action::Store(op) = manager.poll(Instant::ZERO) else {
        panic!("it reads the configuration");
    };
    let answer = store.execute(op);
    manager.answer(Instant::ZERO, answer);
    let change = manager.changes().next().unwrap();
    let Change::Own(OwnChange::AwaitsConfig(fault)) = change else {
        panic!("{change:?}");
    };
    let text = fault.to_string();
    assert!(text.contains("with a PSK that is another one"), "{text}");
    assert!(!text.contains("HAX") && !format!("{fault:?}").contains("HAX"));
}
