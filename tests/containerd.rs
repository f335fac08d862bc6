//! Containers of a real containerd, by `ctr` and as kubelet starts them.
//!
//! The scenes are told of a network that is a parameter. Played with the reference plugins, a bridge
//! and host-local, they show that the stage itself holds.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{IpAddr, Ipv4Addr};

use muslin_lab::cni::Network;
use muslin_lab::containerd::Containerd;
use muslin_lab::cri::Pod;
use muslin_lab::{Host, Lab};
use serde_json::Value;

const HOSTS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 9, 0, 1), Ipv4Addr::new(10, 9, 0, 2)];
const SUBNETS: [&str; 2] = ["10.88.1.0/24", "10.88.2.0/24"];

/// Two containers reach each other, and are gone with their networks.
fn containers_by_ctr(containerd: &Containerd) {
    let command = ["sleep", "1000000"];
    let one = containerd.container("one", &command);
    let two = containerd.container("two", &command);
    let text = one.exec(&["ip", "-o", "-4", "addr", "show", "eth0"]);
    let text = String::from_utf8(text.stdout).unwrap();
    let address = text.split_whitespace().nth(3).unwrap();
    let address = address.split('/').next().unwrap();
    let ping = two.exec(&["ping", "-c", "2", "-W", "5", address]);
    assert!(ping.status.success(), "{ping:?}");
    one.stop();
    let ping = two.exec(&["ping", "-c", "1", "-W", "1", address]);
    assert!(!ping.status.success(), "{ping:?}");
    two.stop();
}

/// Two pods have addresses as kubelet is told them, reach each other, and are gone.
fn pods_by_cri(containerd: &Containerd) {
    containerd.wait_network(true);
    let one = containerd.pod(&Pod::new("one"));
    let two = containerd.pod(&Pod::new("two"));
    let [first, second] = [&one, &two].map(|pod| {
        let status = pod.status();
        assert!(status.is_ready);
        let text = pod.exec(&["ip", "-o", "-4", "addr", "show", "eth0"]).stdout;
        let text = String::from_utf8(text).unwrap();
        let [address] = status.addresses[..] else {
            panic!("{status:?}")
        };
        assert!(text.contains(&format!(" {address}/")), "{text}, {address}");
        status
    });
    assert_ne!(first.addresses, second.addresses);
    let ping = |pod: &muslin_lab::containerd::Pod<'_>, to: IpAddr| {
        let output = pod.exec(&["ping", "-c", "2", "-W", "5", &to.to_string()]);
        assert_eq!(output.code, 0, "{output:?}");
    };
    ping(&one, second.addresses[0]);
    ping(&two, first.addresses[0]);

    // As kubelet does, more than once.
    let cri = containerd.cri();
    cri.stop(one.sandbox()).unwrap();
    cri.stop(one.sandbox()).unwrap();
    let status = one.status();
    assert!(!status.is_ready);
    assert!(status.addresses.is_empty(), "{status:?}");
    one.stop();
    two.stop();
    assert_eq!(cri.sandboxes(), Vec::<String>::new());
    assert_eq!(namespaces(containerd.host()), "");
}

/// A daemon that was killed finds its pods again.
fn killed_daemon(containerd: &mut Containerd) {
    let pod = Pod::new("lasting");
    containerd.wait_network(true);
    let sandbox = containerd.cri().run(&pod).unwrap();
    let before = containerd.cri().sandbox(&sandbox).unwrap();
    assert!(before.is_ready);
    containerd.kill();
    containerd.start_again();
    assert_eq!(containerd.cri().sandbox(&sandbox).unwrap(), before);
    containerd.wait_network(true);
    containerd.cri().remove(&sandbox).unwrap();
    assert_eq!(namespaces(containerd.host()), "");
}

/// Many pods at once, each with an address of its own.
fn many_pods(containerd: &Containerd, count: usize) {
    containerd.wait_network(true);
    let cri = containerd.cri();
    let pods = (0..count).map(|index| Pod::new(&format!("pod-{index}")));
    let sandboxes = cri.run_all(&pods.collect::<Vec<_>>());
    let sandboxes: Vec<_> = sandboxes.into_iter().map(Result::unwrap).collect();
    let addresses = sandboxes.iter().map(|sandbox| {
        let status = cri.sandbox(sandbox).unwrap();
        status.addresses[0]
    });
    let mut addresses: Vec<_> = addresses.collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), count);
    for stopped in cri.stop_all(&sandboxes) {
        stopped.unwrap();
    }
    for sandbox in &sandboxes {
        cri.remove(sandbox).unwrap();
    }
    assert_eq!(namespaces(containerd.host()), "");
}

/// A network is noticed when its configuration is written, and when it is removed.
fn configured_later(containerd: &Containerd, network: &Network) {
    containerd.wait_network(false);
    network.install(containerd.host());
    network.configure(containerd.host());
    containerd.wait_network(true);
    containerd.pod(&Pod::new("late")).stop();
    Network::unconfigure(containerd.host());
    containerd.wait_network(false);
    assert!(containerd.cri().run(&Pod::new("too-late")).is_err());
    network.configure(containerd.host());
    containerd.wait_network(true);
}

/// The network namespaces that runtimes have on a host.
fn namespaces(host: &Host) -> String {
    host.sh("ls /run/netns")
}

/// The addresses that host-local has given away.
fn given(host: &Host) -> String {
    host.sh("cd /var/lib/cni/networks/reference && ls -d 10.* 2>/dev/null || :")
}

fn with_bridge(scene: impl FnOnce(&Lab, Network)) {
    let Some(lab) = Lab::new() else { return };
    let Some(network) = Network::bridge(SUBNETS[0]) else {
        return;
    };
    scene(&lab, network);
}

#[test]
fn containers_of_ctr_reach_each_other_by_a_bridge() {
    with_bridge(|lab, network| {
        let host = lab.host("host", HOSTS[0]);
        if let Some(containerd) = Containerd::start(&host, Some(&network)) {
            containers_by_ctr(&containerd);
            assert_eq!(given(&host), "");
        }
    });
}

#[test]
fn pods_reach_each_other_by_a_bridge() {
    with_bridge(|lab, network| {
        let host = lab.host("host", HOSTS[0]);
        if let Some(mut containerd) = Containerd::start(&host, Some(&network)) {
            pods_by_cri(&containerd);
            many_pods(&containerd, 10);
            killed_daemon(&mut containerd);
            assert_eq!(given(&host), "");
        }
    });
}

#[test]
fn a_network_is_noticed_when_it_is_configured() {
    with_bridge(|lab, network| {
        let host = lab.host("host", HOSTS[0]);
        if let Some(containerd) = Containerd::start(&host, None) {
            configured_later(&containerd, &network);
        }
    });
}

#[test]
fn two_runtimes_on_two_hosts_do_not_disturb_each_other() {
    with_bridge(|lab, mut network| {
        let mut containerds = Vec::new();
        for (address, subnet) in HOSTS.iter().zip(SUBNETS) {
            let host = lab.host(&address.to_string(), *address);
            network.conflist["plugins"][0]["ipam"]["ranges"][0][0]["subnet"] = Value::from(subnet);
            let Some(containerd) = Containerd::start(&host, Some(&network)) else {
                return;
            };
            containerd.wait_network(true);
            containerds.push(containerd);
        }
        let [one, other] = [&containerds[0], &containerds[1]].map(|containerd| {
            // The same name on both.
            containerd.pod(&Pod::new("pod"))
        });
        let [route, back] = [(1, SUBNETS[1]), (0, SUBNETS[0])];
        let lead = |from: usize, (to, subnet): (usize, &str)| {
            let host = containerds[from].host();
            host.sh(&format!("ip route add {subnet} via {}", HOSTS[to]));
        };
        lead(0, route);
        lead(1, back);
        let address = other.status().addresses[0].to_string();
        let ping = one.exec(&["ping", "-c", "2", "-W", "5", &address]);
        assert_eq!(ping.code, 0, "{ping:?}");
        one.stop();
        assert!(other.status().is_ready);
        other.stop();
    });
}
