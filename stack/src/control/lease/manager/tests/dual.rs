//! Leases with IPv6 subnets, alone and beside those of IPv4.

use super::*;
use crate::control::lease::Contested;
use crate::control::lease::config::VxlanOptions;

const DUAL: &str = r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:3::/48",
    "Backend":{"Type":"vxlan"}}"#;
const ALONE: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:3::/48",
    "Backend":{"Type":"vxlan"}}"#;
const PLAIN: &str = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// Three subnets of each version for the nodes that race.
const NARROW: &str = r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.3.0",
    "EnableIPv6":true,"IPv6Network":"fd00:3::/48","IPv6SubnetMin":"fd00:3:0:1::",
    "IPv6SubnetMax":"fd00:3:0:3::","Backend":{"Type":"host-gw"}}"#;

fn ipv6(last: u8) -> Ipv6Addr {
    Ipv6Addr::from([0xfd01, 0, 0, 0, 0, 0, 0, last.into()])
}

/// The node `last` with a public IPv6 address.
fn dual(last: u8) -> Manager {
    let mut manager = manager(last);
    manager.ownership.identity.public_ipv6 = Some(ipv6(last));
    manager
}

fn configure(store: &mut Store, config: &str) {
    store.write(&format!("{PREFIX}/config"), config, None);
}

/// The record of the node `last` for a key, as a node of flannel's writes it.
fn write_lease(store: &mut Store, key: &str, last: u8) {
    let backend = Backend::Vxlan(VxlanOptions::default());
    let mac = VtepMac::from_random([last; 6]);
    let record = LeaseRecord::of(&backend, [192, 168, 0, last].into(), mac);
    let record = match key.contains('&') {
        true => record.with_ipv6(
            &backend,
            ipv6(last),
            VtepMac::from_random([9, last, 9, 9, 9, 9]),
        ),
        false => record,
    };
    let path = format!("{PREFIX}/subnets/{key}");
    store.write(&path, &record.to_json(), Some(LEASE_TTL));
}

fn value(store: &Store, key: &str) -> LeaseRecord {
    LeaseRecord::parse(&store.entries[&format!("{PREFIX}/subnets/{key}")].value).unwrap()
}

fn parse(key: &str) -> SubnetKey {
    key.parse().unwrap()
}

fn overlaps(changes: &[Change]) -> Vec<(String, Contested)> {
    let told = changes.iter().filter_map(|change| match change {
        Change::Contested(key, contested) => Some((key.to_string(), *contested)),
        _ => None,
    });
    told.collect()
}

#[test]
fn a_node_with_both_addresses_leases_both_subnets_in_one_complete_record() {
    let mut store = Store::with_config(DUAL);
    let mut node = dual(1);
    let key = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
    let subnets = parse(&key);
    assert!(
        subnets.ipv4().is_some() && subnets.ipv6().is_some(),
        "{key}"
    );
    let record = value(&store, &key);
    assert_eq!(record.public_ipv6, Some(ipv6(1)));
    assert_eq!(record.vtep_mac(), Some(VtepMac::from_random([1; 6])));
    let mac = record.vtep_mac_v6().unwrap();
    assert_ne!(
        Some(mac),
        record.vtep_mac(),
        "VTEPs have MAC addresses of their own"
    );
    assert!(record.carries_ipv6());
    // Found again, and renewed with the same value.
    let again = acquired(&settle(&mut dual(1), &mut store, Instant::ZERO));
    assert_eq!(again, Some(key.clone()));
    assert_eq!(value(&store, &key), record);
    let later = Instant::ZERO + Duration::from_secs(50_000);
    settle(&mut node, &mut store, later);
    assert_eq!(value(&store, &key), record);
    assert_eq!(store.subnets(), [(key, Some(LEASE_TTL))]);
}

#[test]
fn a_dual_key_needs_the_config_and_a_public_address() {
    let mut store = Store::with_config(DUAL);
    let changes = settle(&mut manager(1), &mut store, Instant::ZERO);
    let key = acquired(&changes).unwrap();
    assert!(!key.contains('&'), "{key}");
    assert!(
        changes
            .iter()
            .any(|change| matches!(change, Change::Own(OwnChange::NoIpv6(_))))
    );
    assert_eq!(value(&store, &key).public_ipv6, None);
    let mut store = Store::with_config(PLAIN);
    let key = acquired(&settle(&mut dual(1), &mut store, Instant::ZERO)).unwrap();
    assert!(!key.contains('&'), "{key}");
    assert_eq!(value(&store, &key).public_ipv6, None);
}

#[test]
fn nodes_with_ipv6_alone_are_told_apart_by_that() {
    let mut store = Store::with_config(ALONE);
    let mut keys = Vec::new();
    for last in 1..=3 {
        let key = acquired(&settle(&mut dual(last), &mut store, Instant::ZERO)).unwrap();
        assert!(key.starts_with("0.0.0.0-0&fd00:3:0:"), "{key}");
        let record = value(&store, &key);
        assert_eq!(record.public_ip, Ipv4Addr::UNSPECIFIED);
        assert_eq!(record.vtep_mac(), None);
        assert!(record.carries_ipv6());
        keys.push(key);
    }
    assert_eq!(store.subnets().len(), 3, "nobody takes another's lease");
    for (last, key) in [1, 2, 3].into_iter().zip(&keys) {
        let mut node = dual(last);
        let changes = settle(&mut node, &mut store, Instant::ZERO);
        assert_eq!(acquired(&changes).as_ref(), Some(key));
        assert_eq!(node.leases().count(), 2);
    }
    let mut without = manager(4);
    without.poll(Instant::ZERO);
    without.answer(
        Instant::ZERO,
        store.execute(Op::Get(format!("{PREFIX}/config"))),
    );
    let fault = Change::Own(OwnChange::AwaitsConfig(ConfigFault::NoPublicIpv6));
    assert_eq!(without.changes().next(), Some(fault));
}

#[test]
fn a_lease_becomes_dual_and_back_with_its_ipv4_subnet_in_one_step() {
    let mut store = Store::with_config(PLAIN);
    let plain = acquired(&settle(&mut dual(1), &mut store, Instant::ZERO)).unwrap();
    let mut witness = manager(9);
    settle(&mut witness, &mut store, Instant::ZERO);
    for (config, is_dual) in [(DUAL, true), (PLAIN, false), (DUAL, true)] {
        configure(&mut store, config);
        let before = store.revision;
        let from = store.log.len();
        let changes = settle(&mut dual(1), &mut store, Instant::ZERO);
        let key = acquired(&changes).unwrap();
        assert_eq!(key.contains('&'), is_dual);
        assert_eq!(parse(&key).ipv4(), parse(&plain).ipv4());
        assert!(
            changes.iter().any(
                |change| matches!(change, Change::Own(OwnChange::Changed { to, .. }) if *to == parse(&key))
            )
        );
        assert_eq!(store.revision, before + 1, "one transaction");
        let [WatchEvent::Delete { .. }, WatchEvent::Put(put)] = &store.log[from..] else {
            panic!("the deletion comes first: {:?}", &store.log[from..]);
        };
        assert!(put.key.ends_with(&key));
        // Watchers lose one peer and get the other.
        let seen = settle(&mut witness, &mut store, Instant::ZERO);
        assert!(
            matches!(&seen[..], [Change::PeerGone(_), Change::Peer(to, _)] if *to == parse(&key)),
            "{seen:?}"
        );
    }
}

#[test]
fn a_reservation_stays_one_when_it_becomes_dual() {
    let mut store = Store::with_config(DUAL);
    write_lease(&mut store, "10.3.7.0-24", 1);
    let path = format!("{PREFIX}/subnets/10.3.7.0-24");
    store.entries.get_mut(&path).unwrap().ttl = None;
    let key = acquired(&settle(&mut dual(1), &mut store, Instant::ZERO)).unwrap();
    assert!(key.starts_with("10.3.7.0-24&"));
    assert_eq!(store.subnets(), [(key, None)]);
}

#[test]
fn the_step_to_a_dual_lease_is_taken_again_if_the_store_has_changed() {
    let mut store = Store::with_config(DUAL);
    write_lease(&mut store, "10.3.7.0-24", 1);
    let mut node = dual(1);
    for _ in 0..2 {
        let Action::Store(op) = node.poll(Instant::ZERO) else {
            panic!()
        };
        node.answer(Instant::ZERO, store.execute(op));
    }
    let Action::Store(op @ Op::Claim { .. }) = node.poll(Instant::ZERO) else {
        panic!()
    };
    let Op::Claim { key, .. } = &op else { panic!() };
    let (_, taken) = key.rsplit_once('&').unwrap();
    write_lease(&mut store, &format!("10.3.8.0-24&{taken}"), 8);
    let answer = store.execute(op.clone());
    assert_eq!(answer, Answer::Conflict);
    node.answer(Instant::ZERO, answer);
    let key = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
    assert!(
        key.starts_with("10.3.7.0-24&") && !key.ends_with(taken),
        "{key}"
    );
}

#[test]
fn the_previous_ipv6_subnet_is_taken_if_it_is_free_and_fits() {
    for (previous, is_taken) in [
        ("fd00:3:0:77::/64", true),
        ("fd00:3:0:9::/64", false),
        ("fd00:4:0:77::/64", false),
        ("fd00:3:0:40::/60", false),
    ] {
        let mut store = Store::with_config(DUAL);
        write_lease(&mut store, "10.3.9.0-24&fd00:3:0:9::-64", 9);
        let mut node = dual(1);
        let previous: Ipv6Net = previous.parse().unwrap();
        node.ownership =
            Ownership::new(node.ownership.identity, None).with_previous_ipv6(Some(previous));
        let key = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
        assert_eq!(parse(&key).ipv6() == Some(previous), is_taken, "{key}");
    }
}

/// Runs managers, one operation each in an order that the round says, until all have a lease.
fn race(round: u64, store: &mut Store, managers: &mut [Manager]) {
    let (mut now, mut order) = (Instant::ZERO, round);
    for step in 0..4_000 {
        order = order
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(step);
        let manager = &mut managers[(order >> 33) as usize % managers.len()];
        now += Duration::from_millis(10);
        if let Action::Store(op) = manager.poll(now) {
            let answer = store.execute(op);
            manager.answer(now, answer);
        }
    }
    let holds = managers.iter().all(|manager| manager.phase == Phase::Hold);
    assert!(holds, "round {round}");
}

#[test]
fn a_node_that_loses_many_races_goes_on_and_says_so_once() {
    let mut store = Store::with_config(DUAL);
    let mut node = dual(1);
    let (mut now, mut told, mut others) = (Instant::ZERO, 0, 0);
    while node.phase != Phase::Hold {
        match node.poll(now) {
            Action::Store(op @ Op::Claim { .. }) => {
                if others < 80 {
                    others += 1;
                    write_lease(&mut store, &format!("10.3.{others}.0-24"), 9);
                }
                let answer = store.execute(op);
                node.answer(now, answer);
            }
            Action::Store(op) => {
                let answer = store.execute(op);
                node.answer(now, answer);
            }
            Action::Wait { until } => now = until,
            other => panic!("{other:?}"),
        }
        let races = |change: &Change| matches!(change, Change::Own(OwnChange::Races { .. }));
        told += node.changes().filter(races).count();
    }
    assert_eq!((others, told), (80, 1));
    assert!(now > Instant::ZERO + Duration::from_secs(180), "{now}");
}

#[test]
fn a_node_goes_without_ipv6_if_its_address_is_of_no_use() {
    let mut store = Store::with_config(DUAL);
    let mut node = dual(1);
    node.poll(Instant::ZERO);
    node.answer(
        Instant::ZERO,
        store.execute(Op::Get(format!("{PREFIX}/config"))),
    );
    node.go_without_ipv6("why".to_owned());
    let changes = settle(&mut node, &mut store, Instant::ZERO);
    let key = acquired(&changes).unwrap();
    assert!(!key.contains('&'), "{key}");
    let told = Change::Own(OwnChange::NoIpv6("why".to_owned()));
    assert!(changes.contains(&told), "{changes:?}");
}

#[test]
fn a_network_waits_for_the_address_that_it_needs() {
    let without_ipv4 = |last| {
        let mut manager = dual(last);
        manager.ownership.identity.public_ip = Ipv4Addr::UNSPECIFIED;
        manager
    };
    let mut store = Store::with_config(DUAL);
    let mut node = without_ipv4(1);
    let get = || Op::Get(format!("{PREFIX}/config"));
    node.poll(Instant::ZERO);
    node.answer(Instant::ZERO, store.execute(get()));
    let fault = ConfigFault::NoPublicIp("10.3.0.0/16".parse().unwrap());
    let awaits = Change::Own(OwnChange::AwaitsConfig(fault));
    assert_eq!(node.changes().next(), Some(awaits.clone()));
    node.set_public_ip([192, 168, 0, 1].into());
    let key = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
    assert!(parse(&key).ipv4().is_some(), "{key}");
    // It proposes no network that it cannot be in, and is in one that others have made.
    let mut store = Store::default();
    let mut node = without_ipv4(1);
    node.wanted_config = WantedConfig::IfNone(NetworkConfig::parse(DUAL).unwrap());
    node.poll(Instant::ZERO);
    node.answer(Instant::ZERO, store.execute(get()));
    assert_eq!(node.changes().next(), Some(awaits));
    configure(&mut store, ALONE);
    let key = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
    assert_eq!(parse(&key).ipv4(), None, "{key}");
}

#[test]
fn nodes_that_race_share_no_subnet_of_either_version() {
    for round in 0..50 {
        let mut store = Store::with_config(NARROW);
        let mut managers: Vec<_> = (1..=3).map(dual).collect();
        race(round, &mut store, &mut managers);
        let keys: Vec<_> = store.subnets().iter().map(|(key, _)| parse(key)).collect();
        assert_eq!(keys.len(), 3);
        for (index, one) in keys.iter().enumerate() {
            for other in &keys[index + 1..] {
                assert!(!one.overlaps(other), "round {round}: {one} and {other}");
            }
        }
    }
}

#[test]
fn a_node_without_ipv6_does_not_race_with_a_dual_one_for_a_subnet() {
    for round in 0..50 {
        let mut store = Store::with_config(NARROW);
        let mut managers = [manager(1), dual(2), manager(3)];
        race(round, &mut store, &mut managers);
        let mut ipv4: Vec<_> = store
            .subnets()
            .iter()
            .map(|(key, _)| parse(key).ipv4())
            .collect();
        ipv4.sort_unstable();
        ipv4.dedup();
        assert_eq!(ipv4.len(), 3, "round {round}");
    }
}

#[test]
fn a_lease_that_comes_later_with_a_subnet_of_ours_has_no_traffic_of_it() {
    let mut store = Store::with_config(DUAL);
    let mut node = dual(1);
    let own = parse(&acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap());
    let (ipv4, ipv6) = (own.ipv4().unwrap(), own.ipv6().unwrap());
    let ours = Some(IpAddr::from([192, 168, 0, 1]));
    let same_ipv4 = SubnetKey::of(Some(ipv4), "fd00:3:0:f000::/64".parse().ok()).unwrap();
    let same_ipv6 = SubnetKey::of("10.3.250.0/24".parse().ok(), Some(ipv6)).unwrap();
    for (key, contested) in [
        (
            same_ipv4,
            Contested {
                ipv4: ours,
                ipv6: None,
                public_key: None,
            },
        ),
        (
            same_ipv6,
            Contested {
                ipv4: None,
                ipv6: ours,
                public_key: None,
            },
        ),
    ] {
        write_lease(&mut store, &key.to_string(), 8);
        let changes = settle(&mut node, &mut store, Instant::ZERO);
        assert_eq!(overlaps(&changes), [(key.to_string(), contested)]);
        let Some(Change::Contested(..)) = changes.first() else {
            panic!("it is said before the peer is: {changes:?}");
        };
        assert!(changes.iter().any(|change| matches!(
            change,
            Change::Own(OwnChange::Overlap { node, .. }) if *node == IpAddr::from([192, 168, 0, 8])
        )));
        store.delete(&format!("{PREFIX}/subnets/{key}"));
        let changes = settle(&mut node, &mut store, Instant::ZERO);
        assert_eq!(changes, [Change::PeerGone(key)]);
    }
    assert_eq!(node.phase, Phase::Hold);
}

#[test]
fn of_two_others_the_one_that_was_first_has_the_subnet_until_it_goes() {
    let mut store = Store::with_config(DUAL);
    // The later one has the lower key.
    let (first, second) = (
        "10.3.200.0-24&fd00:3:0:f009::-64",
        "10.3.200.0-24&fd00:3:0:f008::-64",
    );
    write_lease(&mut store, first, 9);
    write_lease(&mut store, second, 8);
    let mut node = dual(1);
    let changes = settle(&mut node, &mut store, Instant::ZERO);
    let contested = Contested {
        ipv4: Some(IpAddr::from([192, 168, 0, 9])),
        ipv6: None,
        public_key: None,
    };
    assert_eq!(
        overlaps(&changes).last(),
        Some(&(second.to_owned(), contested))
    );
    store.delete(&format!("{PREFIX}/subnets/{first}"));
    let changes = settle(&mut node, &mut store, Instant::ZERO);
    assert_eq!(changes[0], Change::PeerGone(parse(first)));
    assert_eq!(
        overlaps(&changes),
        [(second.to_owned(), Contested::default())]
    );
}

#[test]
fn a_record_of_ours_that_was_later_yields_before_there_are_pods() {
    // A node of flannel's was first, and created the same subnet.
    let mut store = Store::with_config(DUAL);
    write_lease(&mut store, "10.3.200.0-24&fd00:3:0:f009::-64", 9);
    write_lease(&mut store, "10.3.200.0-24&fd00:3:0:f001::-64", 1);
    let key = parse(&acquired(&settle(&mut dual(1), &mut store, Instant::ZERO)).unwrap());
    assert_ne!(key.ipv4(), "10.3.200.0/24".parse().ok());
    assert_eq!(store.subnets().len(), 2);
    // The same of IPv6 alone costs the subnet of IPv4 nothing.
    let mut store = Store::with_config(DUAL);
    write_lease(&mut store, "10.3.201.0-24&fd00:3:0:f009::-64", 9);
    write_lease(&mut store, "10.3.200.0-24&fd00:3:0:f009::-64", 1);
    let key = parse(&acquired(&settle(&mut dual(1), &mut store, Instant::ZERO)).unwrap());
    assert_eq!(key.ipv4(), "10.3.200.0/24".parse().ok());
    assert_ne!(key.ipv6(), "fd00:3:0:f009::/64".parse().ok());
    // Who was first stays.
    let mut store = Store::with_config(DUAL);
    write_lease(&mut store, "10.3.200.0-24&fd00:3:0:f001::-64", 1);
    write_lease(&mut store, "10.3.200.0-24&fd00:3:0:f009::-64", 9);
    let key = acquired(&settle(&mut dual(1), &mut store, Instant::ZERO)).unwrap();
    assert_eq!(key, "10.3.200.0-24&fd00:3:0:f001::-64");
}

#[test]
fn another_public_ipv6_address_is_published_and_the_lease_stays() {
    let mut store = Store::with_config(DUAL);
    let mut node = dual(1);
    let key = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
    node.set_public_ipv6(ipv6(77));
    settle(&mut node, &mut store, Instant::ZERO);
    assert_eq!(value(&store, &key).public_ipv6, Some(ipv6(77)));
    assert_eq!(store.subnets().len(), 1);
    // One of IPv6 alone is known by the address that it had.
    let mut store = Store::with_config(ALONE);
    let mut node = dual(1);
    let key = acquired(&settle(&mut node, &mut store, Instant::ZERO)).unwrap();
    node.set_public_ipv6(ipv6(77));
    settle(&mut node, &mut store, Instant::ZERO);
    assert_eq!(value(&store, &key).public_ipv6, Some(ipv6(77)));
    assert_eq!(node.phase, Phase::Hold);
}
