//! What runtimes ask of CNI plugins and in which order, with the reference plugins: the baseline, and
//! the proof that the runtime of the lab asks as real ones do.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use muslin_lab::Lab;
use muslin_lab::cni::{Key, Network, Output, Runtime, Verb, address};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);

fn with_bridge(test: impl FnOnce(&Runtime)) {
    let Some(lab) = Lab::new() else { return };
    let Some(network) = Network::bridge("10.88.0.0/24") else {
        return;
    };
    test(&Runtime::new(&lab.host("host", HOST), &network));
}

#[test]
fn runtimes_have_their_habits() {
    with_bridge(|runtime| {
        let netns = runtime.netns();
        let key = Key::new("of-crio", netns.path()).pod("default", "one");
        let [_, add, check] = runtime.add_as_crio(&key);
        let address = address(&add.result());
        assert_eq!(check.result(), serde_json::Value::Null);
        let addresses = netns.sh("ip -o -4 addr show eth0");
        assert!(addresses.contains(&format!(" {address}/")), "{addresses}");
        netns.sh("ip link delete eth0");
        assert!(!runtime.check(&key).is_success());
        assert!(runtime.del(&key).is_success());

        let netns = runtime.netns();
        let key = Key::new("of-nerdctl", netns.path());
        let [del, add] = runtime.add_as_nerdctl(&key);
        assert!(del.is_success() && add.is_success(), "{del:?} {add:?}");
        // host-local does not give two addresses to one interface.
        assert!(!runtime.add(&key).is_success());
        netns.remove();
        assert!(runtime.del(&key.without_netns()).is_success());

        let netns = runtime.netns();
        let key = Key::new("of-containerd", netns.path());
        for output in runtime.add_as_containerd(&key) {
            output.result();
        }
        netns.sh("ip -o link show up dev lo | grep -q LOOPBACK");
        netns.sh("ip -o link show up dev eth0 | grep -q eth0");
        for output in runtime.del_as_containerd(&key) {
            output.result();
        }
    });
}

#[test]
fn errors_are_told_by_the_specification() {
    with_bridge(|runtime| {
        let key = Key::new("pod", runtime.netns().path());
        let mut config = runtime.first_config(Verb::Add, &key);
        config["cniVersion"] = "9.0.0".into();
        assert_eq!(runtime.call(Verb::Add, &key, &config).error().0, 1);
        let nameless = Key::new("", &key.netns);
        assert_eq!(runtime.add(&nameless).error().0, 4);
    });
}

#[test]
fn ten_interfaces_come_at_once() {
    at_once(&[1, 10]);
}

/// For the figures, which are printed.
#[test]
#[ignore = "takes its time"]
fn a_hundred_interfaces_come_at_once() {
    at_once(&[1, 10, 100]);
}

fn at_once(counts: &[usize]) {
    with_bridge(|runtime| {
        for &count in counts {
            let namespaces = runtime.all_netns(count);
            let keys = namespaces
                .iter()
                .enumerate()
                .map(|(index, netns)| Key::new(&format!("pod-{index}"), netns.path()));
            let keys: Vec<_> = keys.collect();
            let added = runtime.add_at_once(&keys);
            let addresses: BTreeSet<_> =
                added.iter().map(|added| address(&added.result())).collect();
            assert_eq!(addresses.len(), count);
            let deleted = runtime.del_at_once(&keys);
            assert!(deleted.iter().all(Output::is_success), "{deleted:?}");
            for (what, outputs) in [("ADD", added), ("DEL", deleted)] {
                let mut times: Vec<_> = outputs.iter().map(|output| output.time).collect();
                times.sort();
                assert!(times[0] > Duration::ZERO);
                println!(
                    "{count} at once: {what} took {:?} in the middle, {:?} at most",
                    times[count / 2],
                    times[count - 1]
                );
            }
        }
    });
}
