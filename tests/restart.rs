//! A node that is killed and started again is the same node, and its pods notice little.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use muslin_lab::{Lab, Node, NodeConfig, poll_until, traffic};

/// How long pods may be without their node once it serves again.
const BACK: Duration = Duration::from_secs(5);

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, number)
}

fn config(lab: &Lab, number: u8) -> NodeConfig {
    NodeConfig::new(&format!("n{number}"), address(number), &lab.store())
}

fn start(lab: &Lab, number: u8) -> Node {
    let host = lab.host(&format!("n{number}"), address(number));
    config(lab, number).start(&host)
}

fn pods(node: &Node) -> Vec<(String, String, String)> {
    let pods = node.query("pods");
    let mut rows: Vec<_> = pods
        .as_array()
        .unwrap()
        .iter()
        .map(|row| {
            let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
            (text("pod") + &text("name"), text("address"), text("mac"))
        })
        .collect();
    rows.sort();
    rows
}

#[test]
fn a_killed_node_comes_back_with_its_subnet_and_its_pods() {
    let Some(lab) = Lab::new() else { return };
    let (mut node, other) = (start(&lab, 1), start(&lab, 2));
    node.wait_peers(1);
    other.wait_peers(1);
    let (mut near, mut second, mut far) = (node.pod("near"), node.pod("second"), other.pod("far"));
    let near_address = near.address("eth0").unwrap();
    let far_address = far.address("eth0").unwrap();
    let out = SocketAddrV4::new(far_address, far.listen(0).unwrap());
    let back = SocketAddrV4::new(near_address, near.listen(0).unwrap());
    let (out, back) = (near.open(out).unwrap(), far.open(back).unwrap());
    let identity = |node: &Node| (node.status("subnet"), node.status("vtep_mac"));
    let (before, attached) = (identity(&node), pods(&node));
    assert_eq!(attached.len(), 2, "{attached:?}");

    for round in 0..3 {
        for (agent, id) in [(&mut near, out), (&mut far, back)] {
            let sent = agent.exchange(id, 100_000, round).unwrap();
            assert!(sent.intact, "round {round}");
        }
        node.start_again();
        let ready = Instant::now();
        assert_eq!(identity(&node), before, "round {round}");
        poll_until(BACK, "the pods are back", || {
            (pods(&node) == attached).then_some(())
        });
        eprintln!("round {round}: pods are back after {:?}", ready.elapsed());
    }
    for (agent, id) in [(&mut near, out), (&mut far, back)] {
        let sent = agent.exchange(id, 1_000_000, 9).unwrap();
        assert!(sent.intact);
    }
    // Nobody else has moved either.
    assert_eq!(near.address("eth0").unwrap(), near_address);
    traffic::ping(&mut second, far_address);
    traffic::ping(&mut far, near_address);
}

#[test]
fn in_another_store_a_node_begins_anew_and_says_so() {
    let Some(lab) = Lab::new() else { return };
    let file = |name: &str| lab.directory().join(name);
    let config = |name: &str| {
        NodeConfig::new(
            "n1",
            address(1),
            &format!("sqlite:{}", file(name).display()),
        )
    };
    let all = |of: &str| ["", "-wal", "-shm"].map(|end| file(&format!("{of}{end}")));
    let mut node = config("one").start(&lab.host("n1", address(1)));
    let identity = |node: &Node| (node.status("subnet"), node.status("vtep_mac"));
    let before = identity(&node);
    // It has moved.
    node.kill();
    for (from, to) in all("one").iter().zip(all("moved")) {
        std::fs::rename(from, to).unwrap();
    }
    node.start_again_as(config("moved"));
    assert_eq!(identity(&node), before);
    // It was recreated.
    node.kill();
    for file in all("moved") {
        std::fs::remove_file(file).unwrap();
    }
    assert!(!node.log().contains("was recreated"), "{}", node.log());
    node.start_again();
    assert_eq!(identity(&node), before);
    assert!(node.log().contains("was recreated"), "{}", node.log());
    // It is another one.
    node.start_again_as(config("two"));
    let after = identity(&node);
    assert_ne!(after.1, before.1, "{}", node.log());
    let count = |node: &Node| node.log().matches("starts afresh").count();
    assert_eq!(count(&node), 1, "{}", node.log());
    node.start_again();
    assert_eq!(identity(&node), after);
    assert_eq!(count(&node), 1, "{}", node.log());
}

#[test]
fn pods_are_taken_back_by_fewer_workers_and_by_more() {
    let Some(lab) = Lab::new() else { return };
    let with = |workers| config(&lab, 1).with("--workers", workers);
    let mut node = with(3).start(&lab.host("n1", address(1)));
    let other = start(&lab, 2);
    node.wait_peers(1);
    other.wait_peers(1);
    let (mut near, mut far) = (node.pod("near"), other.pod("far"));
    let attached = pods(&node);
    let near_address = near.address("eth0").unwrap();
    let far_address = far.address("eth0").unwrap();
    let (near_port, far_port) = (near.listen(0).unwrap(), far.listen(0).unwrap());
    // The device keeps its three queues, some of which a node has no worker for.
    for workers in [1, 1, 2, 4, 3] {
        node.start_again_as(with(workers));
        poll_until(BACK, "the pods are back", || {
            (pods(&node) == attached).then_some(())
        });
        // Each flow is on one of the queues that are in use, whichever that is.
        for _ in 0..32 {
            traffic::transfer(&mut near, far_address, far_port, 10_000);
            traffic::transfer(&mut far, near_address, near_port, 10_000);
        }
    }
}

#[test]
fn a_node_that_left_gives_its_lease_back_and_takes_nothing_with_it() {
    let Some(lab) = Lab::new() else { return };
    let (mut node, other) = (start(&lab, 1), start(&lab, 2));
    node.wait_peers(1);
    other.wait_peers(1);
    let output = node.client(&["leave"]).output().unwrap();
    assert!(output.status.success(), "{output:?}{}", node.log());
    assert_eq!(node.wait_exit(muslin_lab::SOON), Some(0), "{}", node.log());
    other.wait_peers(0);
    node.start_again();
    other.wait_peers(1);
}
