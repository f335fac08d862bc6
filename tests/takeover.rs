//! Another process takes a node over, and nobody notices.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use muslin::agent::{Agent, Ping};
use muslin_lab::cni::{Key, Network, Runtime};
use muslin_lab::{Lab, Node, NodeConfig, SOON, muslin_bin, poll_until, probe_bin, traffic};

const HOSTS: [Ipv4Addr; 3] = [
    Ipv4Addr::new(10, 9, 0, 1),
    Ipv4Addr::new(10, 9, 0, 2),
    Ipv4Addr::new(10, 9, 0, 3),
];
/// Echo requests, one every two milliseconds.
const PINGS: u16 = 500;

fn config(lab: &Lab, index: usize) -> NodeConfig {
    NodeConfig::new(&format!("n{index}"), HOSTS[index], &lab.store())
        .without_capability("net_bind_service")
}

fn start(lab: &Lab, index: usize) -> Node {
    let host = lab.host(&format!("n{index}"), HOSTS[index]);
    host.furnish();
    config(lab, index).start(&host)
}

fn listen(agent: &mut Agent) -> SocketAddrV4 {
    SocketAddrV4::new(agent.address("eth0").unwrap(), agent.listen(0).unwrap())
}

/// The old process has nothing to do any more.
fn ends(mut old: Child) {
    let status = poll_until(SOON, "the end of the old process", || {
        old.try_wait().unwrap()
    });
    assert!(status.success(), "{status}");
}

/// What must not change.
fn face(node: &Node) -> (String, serde_json::Value, Vec<(String, String)>) {
    let pods = node.query("pods");
    let pods = pods.as_array().unwrap().iter();
    let pods = pods.map(|row| {
        let text = |key: &str| row[key].as_str().unwrap().to_owned();
        (text("pod"), text("address") + &text("mac"))
    });
    (
        node.status("subnet"),
        node.query("status")["vtep_mac"].take(),
        pods.collect(),
    )
}

/// Pings for a while; none may be lost. Returns the longest round trip.
fn ping_all_the_time(agent: &mut Agent, to: Ipv4Addr) -> Duration {
    let ping = Ping {
        count: PINGS,
        interval_ms: 2,
        ..Ping::new(to)
    };
    let pinged = agent.ping(&ping).unwrap();
    assert!(
        pinged.is_perfect(PINGS),
        "to {to}: {} of {PINGS} replies, {:?}, {:?}",
        pinged.replies.len(),
        pinged.errors,
        pinged.refused
    );
    let longest = pinged.replies.iter().map(|reply| reply.rtt_us).max();
    Duration::from_micros(longest.unwrap())
}

/// Nothing is lost on any way.
fn take_over_under_load(mut node: Node, other: Node, rounds: usize) {
    node.wait_peers(1);
    other.wait_peers(1);
    let [mut one, mut two, mut three, mut four] =
        ["one", "two", "three", "four"].map(|name| node.pod(name));
    let [mut far, mut farther] = ["far", "farther"].map(|name| other.pod(name));
    let (near_to, far_to) = (four.address("eth0").unwrap(), far.address("eth0").unwrap());
    let to = listen(&mut farther);
    let stream = three.open(to).unwrap();
    let before = face(&node);
    for round in 0..rounds {
        let is_over = AtomicBool::new(false);
        let (gaps, streamed, old) = thread::scope(|scope| {
            let pings = [(&mut one, far_to), (&mut two, near_to)]
                .map(|(agent, to)| scope.spawn(move || ping_all_the_time(agent, to)));
            let streamed = scope.spawn(|| {
                let mut bytes = 0;
                while !is_over.load(Ordering::Relaxed) {
                    let sent = three.exchange(stream, 2_000_000, round as u64).unwrap();
                    assert!(sent.intact);
                    bytes += sent.bytes;
                }
                bytes
            });
            let old = node.take_over();
            let gaps = pings.map(|ping| ping.join().unwrap());
            is_over.store(true, Ordering::Relaxed);
            (gaps, streamed.join().unwrap(), old)
        });
        eprintln!(
            "round {round}: longest round trip to another node {:?}, on the same {:?}; {streamed} bytes \
             by TCP",
            gaps[0], gaps[1]
        );
        ends(old);
        assert_eq!(face(&node), before);
    }
    // New pods and old, both ways.
    let mut new = node.pod("new");
    traffic::ping(&mut new, far_to);
    traffic::ping(&mut far, four.address("eth0").unwrap());
    assert_eq!(node.losses(), [].into(), "{}", node.log());
}

#[test]
fn no_packet_is_lost_when_a_node_is_taken_over() {
    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(300));
    let (node, other) = (start(&lab, 0), start(&lab, 1));
    take_over_under_load(node, other, 20);
}

#[test]
fn nor_with_several_workers_and_other_backends() {
    for (backend, workers) in [("udp", "2"), ("host-gw", "2")] {
        let Some(lab) = Lab::new() else { return };
        let [node, other] = [0, 1].map(|index| {
            let host = lab.host(&format!("n{index}"), HOSTS[index]);
            NodeConfig::new(&format!("n{index}"), HOSTS[index], &lab.store())
                .with("--backend", backend)
                .with("--workers", workers)
                .start(&host)
        });
        take_over_under_load(node, other, 1);
    }
}

#[test]
fn flows_to_outside_and_from_there_go_on() {
    let Some(lab) = Lab::new() else { return };
    // Which of several workers has a flow only the kernel knows.
    let host = lab.host("n0", HOSTS[0]);
    host.furnish();
    let mut node = config(&lab, 0).with("--workers", 3).start(&host);
    let outside = lab.host("outside", HOSTS[2]);
    let (mut server, mut client) = (outside.agent(), outside.agent());
    let (port, later) = (server.listen(0).unwrap(), server.listen(0).unwrap());
    let mut pod = node.pod("pod");
    let mut published = node.pod_after("published", &["-p", "8080:80"], "");
    published.listen(80).unwrap();
    let out = pod.open(SocketAddrV4::new(HOSTS[2], port)).unwrap();
    let inward = client.open(SocketAddrV4::new(HOSTS[0], 8080)).unwrap();
    let exchange = |agent: &mut Agent, id, seed| {
        let sent = agent.exchange(id, 3_000_000, seed).unwrap();
        assert!(sent.intact && sent.bytes == 3_000_000);
    };
    exchange(&mut pod, out, 1);
    exchange(&mut client, inward, 2);

    let first = node.take_over();
    // By the process that has ended otherwise.
    exchange(&mut pod, out, 3);
    exchange(&mut client, inward, 4);
    // By the new one.
    let new_out = pod.open(SocketAddrV4::new(HOSTS[2], later)).unwrap();
    let new_inward = client.open(SocketAddrV4::new(HOSTS[0], 8080)).unwrap();
    exchange(&mut pod, new_out, 5);
    exchange(&mut client, new_inward, 6);
    exchange(&mut pod, out, 7);

    // A service manager asks the old one to end. It does with its flows.
    let pid = nix::unistd::Pid::from_raw(first.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    exchange(&mut pod, out, 8);
    pod.close(out).unwrap();
    exchange(&mut client, inward, 9);
    client.close(inward).unwrap();
    ends(first);
    exchange(&mut pod, new_out, 10);
    exchange(&mut client, new_inward, 11);
    pod.close(new_out).unwrap();
    client.close(new_inward).unwrap();
    poll_until(SOON, "the flows' end", || {
        (node.query("status")["egress"]["open"] == 0).then_some(())
    });
}

#[test]
fn pods_of_runtimes_and_of_clients_are_the_new_processes() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab, 0);
    let runtime = Runtime::new(node.host(), &Network::muslin(&node)).speaks("1.1.0");
    let (one, two) = (runtime.netns(), runtime.netns());
    let keys = [("a", &one), ("b", &two)].map(|(name, netns)| Key::new(name, netns.path()));
    let mapping = serde_json::json!([{"hostPort": 8081, "containerPort": 80, "protocol": "tcp"}]);
    let published = keys[1].clone().with("portMappings", mapping);
    runtime.add(&keys[0]).result();
    runtime.add(&published).result();
    let [mut near, mut far] = [&one, &two].map(|netns| {
        let mut agent = Agent::start(&mut netns.command(probe_bin())).unwrap();
        agent.wait_ready(SOON).unwrap();
        agent
    });
    far.listen(80).unwrap();
    let mut bound = node.pod("bound");
    let to = listen(&mut far);
    let id = near.open(to).unwrap();
    let before = face(&node);
    for round in 0..3 {
        let old = node.take_over();
        assert!(near.exchange(id, 500_000, round).unwrap().intact);
        ends(old);
        assert_eq!(face(&node), before);
        assert!(runtime.check(&keys[0]).is_success());
        assert!(runtime.check(&published).is_success());
        traffic::ping(&mut bound, *to.ip());
    }
    // Each ends as it would have.
    drop(bound);
    poll_until(SOON, "the end of a pod whose client has ended", || {
        (face(&node).2.len() == 2).then_some(())
    });
    drop((near, far));
    for key in [&keys[0], &published] {
        assert!(runtime.del(key).is_success());
    }
    assert_eq!(face(&node).2, []);
}

#[test]
fn who_cannot_take_over_says_why_and_the_node_goes_on() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 0);
    let mut pod = node.pod("pod");
    let gateway = node.address(1);
    let other = |flags: &[&str]| {
        let state = node.state_dir();
        let store = lab.store();
        let mut command = node.host().command(muslin_bin());
        command.args(["node", "--take-over", "--name", "n0", "--store", &store]);
        command.arg("--state-dir").arg(state).args(flags);
        let output = command.output().unwrap();
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let has = format!("has --workers {}", node.query("status")["workers"]);
    let told = other(&["--public-ip", "10.9.0.1", "--workers", "7"]);
    assert!(told.contains(&has), "{told}");
    traffic::ping(&mut pod, gateway);
    // It takes in new pods, too.
    drop(node.pod("another"));
}

#[test]
fn who_is_killed_while_it_takes_over_leaves_the_node_as_it_was() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab, 0);
    let (mut pod, mut other) = (node.pod("pod"), node.pod("other"));
    let to = listen(&mut other);
    let id = pod.open(to).unwrap();
    let before = face(&node);
    let store = lab.store();
    let mut took = 0;
    for round in 0..30 {
        let mut command = node.host().command(muslin_bin());
        command.args(["node", "--take-over", "--name", "n0", "--store", &store]);
        command.args(["--public-ip", "10.9.0.1", "--state-dir"]);
        command.arg(node.state_dir()).stdout(Stdio::null());
        let log = lab.directory().join(format!("killed-{round}"));
        command.stderr(std::fs::File::create(&log).unwrap());
        let mut killed = command.spawn().unwrap();
        // At another step each time.
        thread::sleep(Duration::from_millis(4 * round));
        killed.kill().unwrap();
        killed.wait().unwrap();
        let is_there = poll_until(SOON, "whose the node is", || {
            let answer = node.client(&["status"]).output().unwrap();
            match answer.status.success() {
                true => Some(true),
                false => (!node.is_running()).then_some(false),
            }
        });
        if !is_there {
            took += 1;
            node.start_again();
        }
        assert!(pod.exchange(id, 100_000, round).unwrap().intact);
        poll_until(SOON, "the pods", || (face(&node) == before).then_some(()));
        traffic::ping(&mut pod, node.address(1));
    }
    eprintln!("{took} of 30 had taken it over when they were killed");
}
