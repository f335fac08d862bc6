//! Two nodes carry their pods' packets, over VXLAN and over UDP, and nodes that start at the same
//! moment never get the same subnet.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};

use muslin::agent::Agent;
use muslin_lab::{Lab, Node, NodeConfig, traffic};

/// MTU of the underlay in bytes.
const UNDERLAY: u16 = 1500;

/// Two nodes on two hosts, with a pod each whose interface takes more than the tunnel.
struct Bed {
    nodes: [Node; 2],
    pods: [Agent; 2],
    lab: Lab,
}

impl Bed {
    fn new(backend: &str) -> Option<Self> {
        Self::with(backend, ("--offload", "tap,gso,gro"), &[])
    }

    /// The same with a flag for the nodes, and with these flags for the pods.
    fn with(backend: &str, (flag, value): (&str, &str), flags: &[&str]) -> Option<Self> {
        let lab = Lab::new()?;
        let store = lab.store();
        let nodes = [1, 2].map(|number: u8| {
            let address = Ipv4Addr::new(10, 9, 0, number);
            let name = format!("n{number}");
            NodeConfig::new(&name, address, &store)
                .with("--network", "10.244.0.0/16")
                .with("--backend", backend)
                .with("--mtu", UNDERLAY)
                .with(flag, value)
                .start(&lab.host(&name, address))
        });
        for node in &nodes {
            node.wait_peers(1);
        }
        let pods = nodes
            .each_ref()
            .map(|node| node.pod_after("pod", flags, "ip link set eth0 mtu 1500"));
        Some(Self { nodes, pods, lab })
    }

    fn check(mut self, mtu: u16) {
        let gateways = self.nodes.each_ref().map(|node| node.address(1));
        let addresses = self.pods.each_mut().map(|pod| pod.address("eth0").unwrap());
        for (from, to) in [(0, 1), (1, 0)] {
            let pod = &mut self.pods[from];
            for address in [gateways[from], gateways[to], addresses[to]] {
                traffic::ping(pod, address);
            }
            traffic::fits(pod, addresses[to], mtu);
            traffic::exceeds(pod, addresses[to], mtu, gateways[from]);
            let pinged = traffic::ping_of_size(pod, addresses[to], 20_000, false);
            assert!(pinged.is_perfect(1), "in fragments: {pinged:?}");
            traffic::expires(pod, addresses[to], 1, gateways[from]);
            traffic::expires(pod, addresses[to], 2, gateways[to]);
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let port = self.pods[to].listen(0).unwrap();
            let pod = &mut self.pods[from];
            traffic::transfer(pod, addresses[to], port, traffic::BULK);
            let echoed = pod.udp(SocketAddrV4::new(addresses[to], port), 20, 1400);
            assert_eq!(echoed.unwrap().intact, 20);
        }
    }
}

#[test]
fn vxlan_carries_what_pods_send() {
    if let Some(bed) = Bed::new("vxlan") {
        bed.check(UNDERLAY - 50);
    }
}

#[test]
fn udp_carries_what_pods_send() {
    if let Some(bed) = Bed::new("udp") {
        bed.check(UNDERLAY - 28);
    }
}

#[test]
fn the_same_traffic_passes_without_offloads() {
    let plain = ["--no-offload"];
    for (offload, flags, passes) in [
        ("none", &[][..], false),
        ("tap", &[], true),
        ("gso,gro", &[], false),
        ("tap,gso,gro", &plain, false),
    ] {
        for (backend, overhead) in [("vxlan", 50), ("udp", 28)] {
            let Some(bed) = Bed::with(backend, ("--offload", offload), flags) else {
                return;
            };
            for node in &bed.nodes {
                assert_eq!(node.status("offload"), offload);
                let pods = node.query("pods");
                assert_eq!(pods[0]["offload"], passes, "{offload}: {pods}");
            }
            bed.check(UNDERLAY - overhead);
        }
    }
}

#[test]
fn several_workers_carry_the_same_traffic() {
    for (backend, overhead) in [("vxlan", 50), ("udp", 28)] {
        // A plain device has one queue, which the workers share.
        for flags in [&[][..], &["--no-offload"]] {
            let Some(bed) = Bed::with(backend, ("--workers", "3"), flags) else {
                return;
            };
            assert_eq!(bed.nodes[0].query("status")["workers"], 3);
            bed.check(UNDERLAY - overhead);
        }
    }
}

#[test]
fn an_address_that_one_worker_hears_of_is_known_to_all() {
    let Some(mut bed) = Bed::with("vxlan", ("--workers", "4"), &[]) else {
        return;
    };
    let [_, there] = &bed.nodes;
    let host = bed.lab.host("n3", Ipv4Addr::new(10, 9, 0, 3));
    let store = format!("sqlite:{}", bed.lab.directory().join("leases.db").display());
    let open = NodeConfig::new("n3", Ipv4Addr::new(10, 9, 0, 3), &store)
        .with("--mtu", UNDERLAY)
        .with("--workers", "4")
        .flag("--no-pod-guard")
        .start(&host);
    there.wait_peers(2);
    bed.nodes[0].wait_peers(2);
    let second = open.address(77);
    let script = format!("ip addr add {second}/24 dev eth0");
    let mut pod = open.pod_after("pod", &[], &script);
    let port = pod.listen(0).unwrap();
    // Each flow may be another worker's, of which only one reads the answer to an ARP request.
    for _ in 0..32 {
        traffic::transfer(&mut bed.pods[0], second, port, 1000);
    }
    assert_eq!(open.losses(), Default::default());
}

#[test]
fn pods_of_one_node_reach_each_other_and_nobody_gets_their_packets() {
    let Some(lab) = Lab::new() else { return };
    let address = Ipv4Addr::new(10, 9, 0, 1);
    let store = lab.store();
    let node = NodeConfig::new("n", address, &store).start(&lab.host("n", address));
    let script = "seen=$(ip -details link show eth0)
        echo \"$seen\" | grep -q 'qlen 4096'
        echo \"$seen\" | grep -q 'gso_max_segs 44'";
    let [mut one, mut other, mut third] =
        ["one", "other", "third"].map(|name| node.pod_after(name, &[], script));
    let to = other.address("eth0").unwrap();
    traffic::ping(&mut one, to);
    third.capture("eth0").unwrap();
    let port = other.listen(0).unwrap();
    traffic::transfer(&mut one, to, port, 10_000_000);
    traffic::transfer(&mut one, to, port, 0);
    let overheard: Vec<_> = third
        .captured()
        .unwrap()
        .into_iter()
        .filter(|frame| frame[12..14] == [0x08, 0x00])
        .collect();
    assert!(overheard.is_empty(), "{} packets", overheard.len());
    assert_eq!(node.losses(), Default::default());
}

#[test]
fn packets_are_counted_as_the_pods_kernels_count_them() {
    let Some(mut bed) = Bed::new("vxlan") else {
        return;
    };
    let to = bed.pods[1].address("eth0").unwrap();
    let port = bed.pods[1].listen(0).unwrap();
    traffic::transfer(&mut bed.pods[0], to, port, 10_000_000);
    for (node, pod) in bed.nodes.iter().zip(&mut bed.pods) {
        let (received, sent) = muslin_lab::poll_until(muslin_lab::SOON, "the same counts", || {
            let counted = node.query("pods");
            let packets = |way: &str| counted[0][way]["packets"].as_u64().unwrap();
            let counts = (packets("received"), packets("sent"));
            (counts == packets_of(pod)).then_some(counts)
        });
        // Superpackets count once, or there would be over 7,000 one way.
        assert!(received < 5000 && sent < 5000, "{received}, {sent}");
    }
}

/// What a pod's interface has sent and received.
fn packets_of(pod: &mut Agent) -> (u64, u64) {
    let path = format!("/proc/{}/net/dev", pod.child().id());
    let table = std::fs::read_to_string(path).unwrap();
    let row = table
        .lines()
        .find_map(|line| line.trim().strip_prefix("eth0:"));
    let row: Vec<u64> = row
        .unwrap()
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    (row[9], row[1])
}

#[test]
fn nodes_that_start_at_once_get_different_subnets_every_time() {
    let Some(lab) = Lab::new() else { return };
    for round in 0..50 {
        let store = format!("sqlite:{}/{round}.db", lab.directory().display());
        let mut nodes = [1, 2, 3].map(|number: u8| {
            NodeConfig::new(
                &format!("n{number}"),
                Ipv4Addr::new(127, 0, 0, number),
                &store,
            )
            .with("--network", "10.244.0.0/16")
            .spawn(lab.root())
        });
        let subnets: BTreeSet<String> = nodes
            .iter_mut()
            .map(|node| {
                node.wait_ready(muslin_lab::SOON);
                node.status("subnet")
            })
            .collect();
        assert_eq!(subnets.len(), 3, "round {round}: {subnets:?}");
        for node in &nodes {
            node.wait_peers(2);
        }
    }
}
