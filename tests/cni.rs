//! Pods that container runtimes attach to nodes by the CNI plugin: with a real containerd, and with the
//! habits of all runtimes.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use muslin::agent::Agent;
use muslin_lab::cni::{BIN_DIR, CONF_DIR, Key, Netns, Network, Runtime, Verb, address};
use muslin_lab::containerd::Containerd;
use muslin_lab::cri::{Pod, Protocol};
use muslin_lab::keeper::{Keeper, queues};
use muslin_lab::load::Load;
use muslin_lab::watch::stretched;
use muslin_lab::{
    Host, Lab, Node, NodeConfig, SOON, cni_bin, muslin_bin, poll_until, probe_bin, traffic,
};
use nix::sys::signal::Signal;
use rand_pcg::Pcg32;
use rand_pcg::rand_core::Rng as _;
use serde_json::{Value, json};

const HOSTS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 9, 0, 1), Ipv4Addr::new(10, 9, 0, 2)];

/// A node on a host that has directories of its own, as a machine has.
fn start(lab: &Lab, index: usize) -> Node {
    let host = lab.host(&format!("n{}", index + 1), HOSTS[index]);
    host.furnish();
    config(lab, index).start(&host)
}

fn config(lab: &Lab, index: usize) -> NodeConfig {
    let config = NodeConfig::new(&format!("n{}", index + 1), HOSTS[index], &lab.store());
    // Which it needs for ports below 1024 alone.
    config.without_capability("net_bind_service")
}

fn runtime(node: &Node) -> Runtime {
    Runtime::new(node.host(), &Network::muslin(node))
}

/// An agent in a namespace.
fn agent(netns: &Netns) -> Agent {
    let mut agent = Agent::start(&mut netns.command(probe_bin())).unwrap();
    agent.wait_ready(SOON).unwrap();
    agent
}

/// Where an agent listens.
fn listen(agent: &mut Agent) -> SocketAddrV4 {
    SocketAddrV4::new(agent.address("eth0").unwrap(), agent.listen(0).unwrap())
}

fn ipv4(result: &Value) -> Ipv4Addr {
    match address(result) {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => panic!("{address}"),
    }
}

fn pods(node: &Node) -> Vec<String> {
    let pods = node.query("pods");
    let names = pods.as_array().unwrap().iter();
    names
        .map(|pod| pod["pod"].as_str().unwrap().to_owned())
        .collect()
}

/// What is left of attachments on a host and in a node.
fn is_clean(node: &Node) {
    assert_eq!(pods(node), Vec::<String>::new());
    let directory = node.socket().parent().unwrap().join("attachments");
    let files: Vec<_> = std::fs::read_dir(directory).unwrap().collect();
    assert!(files.is_empty(), "{files:?}");
}

/// A node has no privileges, whoever attaches pods to it.
fn has_no_capability(node: &Node) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let line = status.lines().find(|line| line.starts_with(set)).unwrap();
        assert!(line.ends_with("\t0000000000000000"), "{line}");
    }
}

#[test]
fn runtimes_attach_pods_each_in_its_way() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 0);
    let runtime = runtime(&node);
    // CRI-O's.
    let netns = runtime.netns();
    let crio = Key::new("c1", netns.path()).pod("default", "web-0");
    let [version, add, check] = runtime.add_as_crio(&crio);
    assert!(version.is_success() && check.is_success(), "{check:?}");
    let one = add.result();
    let interface = &one["interfaces"][0];
    assert_eq!(interface["name"], "eth0");
    assert_eq!(interface["sandbox"], netns.path());
    assert_eq!(one["ips"][0]["version"], "4", "0.4.0 has it");
    assert_eq!(pods(&node), ["web-0.default"]);
    let text = netns.sh("ip -o -4 addr show dev eth0; ip route; ip link show eth0");
    assert!(text.contains(&format!(" {}/24 ", ipv4(&one))), "{text}");
    assert!(text.contains("default via"), "{text}");
    assert!(text.contains("muslin:c1"), "{text}");
    // The same once more.
    let (code, message) = runtime.add(&crio).error();
    assert!(code >= 100 && message.contains("eth0"), "{code} {message}");
    // containerd's, which brings `lo` up at the same time.
    let second = runtime.netns();
    let containerd = Key::new("c2", second.path()).pod("default", "web-1");
    for output in runtime.add_as_containerd(&containerd) {
        output.result();
    }
    // nerdctl's: the same name in another namespace, since the end of the first was lost.
    let third = runtime.netns();
    let nerdctl = Key::new("c3", third.path());
    let before = runtime.add(&nerdctl).result();
    third.remove();
    let fourth = runtime.netns();
    let again = Key::new("c3", fourth.path());
    let [del, add] = runtime.add_as_nerdctl(&again);
    assert!(del.is_success(), "{del:?}");
    assert_eq!(ipv4(&add.result()), ipv4(&before), "its address is its own");
    // Without the DEL of before, too.
    fourth.remove();
    let fifth = runtime.netns();
    let again = Key::new("c3", fifth.path());
    assert_eq!(ipv4(&runtime.add(&again).result()), ipv4(&before));
    // They reach each other, and the pod's names are known.
    let (mut one, mut two) = (agent(&netns), agent(&second));
    let two_address = two.address("eth0").unwrap();
    traffic::ping(&mut one, two_address);
    traffic::transfer(&mut one, two_address, two.listen(0).unwrap(), 1_000_000);
    drop((one, two));
    has_no_capability(&node);
    for key in [&crio, &containerd, &again] {
        for key in [key, &key.without_netns(), key] {
            assert!(runtime.del(key).is_success());
        }
    }
    is_clean(&node);
    let unknown = Key::new("nobody", netns.path());
    let del = runtime.del(&unknown);
    assert!(del.is_success() && del.stdout.is_empty(), "{del:?}");
    for netns in [netns, second, fifth] {
        let gone = netns.sh("ip -o link | grep -c eth0 || :");
        assert_eq!(gone.trim(), "0");
        netns.remove();
    }
}

#[test]
fn a_pod_has_what_its_runtime_asks_for() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 0);
    let runtime = runtime(&node);
    let netns = runtime.netns();
    let wanted = node.address(77);
    let key = Key::new("c1", netns.path())
        .with("ips", json!([format!("{wanted}/24")]))
        .with("mac", json!("0a:00:00:00:00:77"))
        .with("aliases", json!(["db"]))
        // As containerd writes it.
        .with(
            "portMappings",
            json!([{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}]),
        );
    let result = runtime.add(&key).result();
    assert_eq!(ipv4(&result), wanted);
    assert_eq!(result["interfaces"][0]["mac"], "0a:00:00:00:00:77");
    let other = runtime.netns();
    let another = Key::new("c2", other.path());
    runtime.add(&another).result();
    let mut pod = agent(&netns);
    pod.listen(80).unwrap();
    let mut host = node.host().agent();
    let published = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080);
    let sent = host.send(published, 1_000_000, 7).unwrap();
    assert!(sent.intact);
    let address = wanted.to_string();
    if node
        .host()
        .output(&["sh", "-c", "command -v dig"])
        .status
        .success()
    {
        let answer = other.sh(&format!("dig +short @{} db", node.address(1)));
        assert_eq!(answer.trim(), address);
    }
    // What another has is refused, and nothing is left of the attempt.
    let third = runtime.netns();
    for (capability, value) in [
        ("ips", json!([address])),
        ("mac", json!("0a:00:00:00:00:77")),
        (
            "portMappings",
            json!([{"hostPort": 8080, "containerPort": 81, "protocol": "tcp"}]),
        ),
    ] {
        let refused = Key::new("c3", third.path()).with(capability, value);
        let (code, message) = runtime.add(&refused).error();
        assert!(code != 3 && !message.is_empty(), "{code} {message}");
        assert_eq!(third.sh("ip -o link | grep -c eth0 || :").trim(), "0");
    }
    assert_eq!(pods(&node).len(), 2);
    for key in [&key, &another] {
        assert!(runtime.del(key).is_success());
    }
    is_clean(&node);
}

#[test]
fn a_rate_is_kept() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 0);
    let runtime = runtime(&node);
    let (one, two) = (runtime.netns(), runtime.netns());
    // 80 Mbit/s in either direction, and a burst of 1 MB.
    let limit = json!({
        "ingressRate": 80_000_000, "ingressBurst": 8_000_000,
        "egressRate": 80_000_000, "egressBurst": 8_000_000,
    });
    let limited = Key::new("c1", one.path()).with("bandwidth", limit);
    let free = Key::new("c2", two.path());
    runtime.add(&limited).result();
    runtime.add(&free).result();
    let (mut limited, mut free) = (agent(&one), agent(&two));
    let (to_limited, to_free) = (listen(&mut limited), listen(&mut free));
    for (from, to) in [(&mut limited, to_free), (&mut free, to_limited)] {
        let sent = from.send(to, 10_000_000, 1).unwrap();
        assert!(sent.intact);
        let rate = sent.bits_per_second();
        assert!(rate < 100_000_000.0, "{rate}");
    }
}

#[test]
fn what_ends_while_no_node_is_there_has_ended_when_it_comes_back() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab, 0);
    let runtime = runtime(&node);
    let all = runtime.all_netns(3);
    let keys: Vec<_> = all
        .iter()
        .zip(1..)
        .map(|(netns, i)| Key::new(&format!("c{i}"), netns.path()))
        .collect();
    for key in &keys {
        runtime.add(key).result();
    }
    node.kill();
    // One is deleted without a node, one's namespace vanishes, one stays.
    assert!(runtime.del(&keys[0]).is_success());
    assert!(runtime.del(&keys[0].without_netns()).is_success());
    assert_eq!(all[0].sh("ip -o link | grep -c eth0 || :").trim(), "0");
    node.start_again();
    assert_eq!(pods(&node), ["c2", "c3"]);
    let status = runtime.speaks("1.1.0");
    assert!(status.status().is_success());
    poll_until(SOON, "the device is back", || {
        status.check(&keys[2]).is_success().then_some(())
    });
    let (mut one, mut two) = (agent(&all[1]), agent(&all[2]));
    traffic::ping(&mut one, two.address("eth0").unwrap());
    traffic::ping(&mut two, one.address("eth0").unwrap());
    drop((one, two));
    // Whatever is no longer in use, once it is old enough; these are too young.
    assert!(status.gc(&[]).is_success());
    assert_eq!(pods(&node).len(), 2);
    for key in &keys {
        assert!(status.del(key).is_success());
    }
    is_clean(&node);
}

#[test]
fn what_a_busy_node_has_no_time_for_ends_later_and_nothing_else_does() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab, 0);
    let runtime = runtime(&node);
    let all = runtime.all_netns(3);
    let key = |name: &str, netns: &Netns| Key::new(name, netns.path());
    let (again, gone, other) = (key("c1", &all[0]), key("c2", &all[1]), key("c3", &all[2]));
    for key in [&again, &gone, &other] {
        runtime.add(key).result();
    }
    node.signal(Signal::SIGSTOP);
    for key in [&again, &gone] {
        let del = runtime.del(key);
        assert!(del.is_success(), "{del:?}");
        assert!(del.stderr.contains("is ended by the next node"), "{del:?}");
    }
    node.signal(Signal::SIGCONT);
    // The first one starts again under its former name, which nerdctl does.
    let elsewhere = runtime.netns();
    let started = key("c1", &elsewhere);
    runtime.add(&started).result();
    assert!(runtime.del(&other).is_success());
    let left = || (pods(&node) == ["c1"]).then_some(());
    poll_until(SOON, "the end of c2", left);
    node.start_again();
    let status = runtime.speaks("1.1.0");
    poll_until(SOON, "the device is back", || {
        status.check(&started).is_success().then_some(())
    });
    assert!(status.del(&started).is_success());
    is_clean(&node);
}

#[test]
fn connections_outlive_a_killed_node() {
    let Some(lab) = Lab::new() else { return };
    let (mut node, other) = (start(&lab, 0), start(&lab, 1));
    node.wait_peers(1);
    other.wait_peers(1);
    let (runtime, far_runtime) = (runtime(&node).speaks("1.1.0"), runtime(&other));
    let (near, second, far) = (runtime.netns(), runtime.netns(), far_runtime.netns());
    runtime.add(&Key::new("near", near.path())).result();
    runtime.add(&Key::new("second", second.path())).result();
    far_runtime.add(&Key::new("far", far.path())).result();
    let (mut near, mut second, mut far) = (agent(&near), agent(&second), agent(&far));
    let (to_second, to_far) = (listen(&mut second), listen(&mut far));
    let connections = [to_second, to_far].map(|to| near.open(to).unwrap());
    for round in 0..5 {
        for id in connections {
            assert!(near.exchange(id, 200_000, round).unwrap().intact);
        }
        node.kill();
        let killed = Instant::now();
        node.start_again();
        // As runtimes do every few seconds.
        assert!(runtime.status().is_success());
        for id in connections {
            assert!(near.exchange(id, 200_000, 100 + round).unwrap().intact);
        }
        eprintln!("round {round}: back after {:?}", killed.elapsed());
    }
    has_no_capability(&node);
}

/// A node whose devices a keeper has, too.
fn start_kept(lab: &Lab, index: usize) -> (Keeper, Node) {
    let host = lab.host(&format!("n{}", index + 1), HOSTS[index]);
    host.furnish();
    let keeper = Keeper::start(&host, &lab.directory().join("keep.sock"));
    let config = config(lab, index).with("--keeper", keeper.socket().display());
    (keeper, config.start(&host))
}

#[test]
fn a_pod_of_attach_outlives_a_killed_node_with_a_keeper() {
    let Some(lab) = Lab::new() else { return };
    let (keeper, mut node) = start_kept(&lab, 0);
    let namespace = lab.namespace("web");
    let pid = namespace.pid().to_string();
    let words = ["attach", "--pid", &pid, "--name", "web"];
    let attached = node.client(&words).output().unwrap();
    assert!(attached.status.success(), "{attached:?}");
    let mut web = namespace.agent();
    let mut other = node.pod("other");
    let id = other.open(listen(&mut web)).unwrap();
    let address = web.address("eth0").unwrap();
    for round in 0..3 {
        assert!(other.exchange(id, 200_000, round).unwrap().intact);
        node.start_again();
        poll_until(SOON, "the pods", || (pods(&node).len() == 2).then_some(()));
        assert!(other.exchange(id, 200_000, 100 + round).unwrap().intact);
        assert_eq!(web.address("eth0").unwrap(), address);
    }
    let detached = node.client(&["detach", "web"]).output().unwrap();
    assert!(detached.status.success(), "{detached:?}");
    assert_eq!(pods(&node), ["other"]);
    drop((web, other));
    is_clean(&node);
    assert_eq!(queues(keeper.pid()), 0, "it holds no device any more");
}

#[test]
fn packets_wait_at_the_keeper_for_a_killed_node() {
    let Some(lab) = Lab::new() else { return };
    let (keeper, mut node) = start_kept(&lab, 0);
    let runtime = runtime(&node);
    let (one, two) = (runtime.netns(), runtime.netns());
    let keys = [("a", &one), ("b", &two)].map(|(name, netns)| Key::new(name, netns.path()));
    for key in &keys {
        runtime.add(key).result();
    }
    let (mut near, mut far) = (agent(&one), agent(&two));
    let id = near.open(listen(&mut far)).unwrap();
    assert!(near.exchange(id, 200_000, 1).unwrap().intact);
    node.kill();
    // With nobody who calls the plugin, the interface keeps its carrier.
    let carrier = one.sh("cat /sys/class/net/eth0/carrier 2>/dev/null || ip link show eth0");
    assert!(!carrier.contains("NO-CARRIER"), "{carrier}");
    node.start_again();
    assert!(near.exchange(id, 200_000, 2).unwrap().intact);
    drop((near, far));
    for key in &keys {
        assert!(runtime.del(key).is_success());
    }
    is_clean(&node);
    assert_eq!(queues(keeper.pid()), 0, "it holds no device any more");
}

#[test]
fn connections_under_load_outlive_a_node_that_is_killed_again_and_again() {
    const KILLS: usize = 20;
    /// What is wanted of a node with a keeper, and what a busy machine does.
    const WANTED: Duration = Duration::from_millis(100);
    const BOUND: Duration = Duration::from_secs(2);

    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(300));
    let (_keeper, mut node) = start_kept(&lab, 0);
    let other = start(&lab, 1);
    node.wait_peers(1);
    other.wait_peers(1);
    let (runtime, far_runtime) = (runtime(&node), runtime(&other));
    let (near, second, far) = (runtime.netns(), runtime.netns(), far_runtime.netns());
    runtime.add(&Key::new("near", near.path())).result();
    runtime.add(&Key::new("second", second.path())).result();
    far_runtime.add(&Key::new("far", far.path())).result();
    let [to_near, to_second, to_far] = [&near, &second, &far].map(|netns| {
        let mut server = agent(netns);
        (listen(&mut server), server)
    });
    let loads = [
        ("to a local pod", Load::start(agent(&near), to_second.0)),
        ("to a remote pod", Load::start(agent(&near), to_far.0)),
        ("from a remote pod", Load::start(agent(&far), to_near.0)),
    ];
    let mut longest = [Duration::ZERO; 3];
    for kill in 1..=KILLS {
        let _before = loads.each_ref().map(|(_, load)| load.gap());
        node.kill();
        node.start_again();
        let gaps = loads.each_ref().map(|(_, load)| load.gap());
        eprintln!("kill {kill}: nothing came for {gaps:.0?}");
        for (longest, gap) in longest.iter_mut().zip(gaps) {
            *longest = gap.max(*longest);
        }
    }
    for ((what, load), gap) in loads.into_iter().zip(longest) {
        let (_, bytes) = load.end();
        eprintln!("{what}: {bytes} bytes, none for {gap:.0?} at the longest; wanted: {WANTED:.0?}");
        assert!(gap < stretched(BOUND), "{what}: {gap:?}");
    }
    has_no_capability(&node);
}

#[test]
fn many_pods_come_and_go_at_once() {
    const PODS: usize = 250;
    const ROUNDS: u32 = 2;
    const SEED: &str = "MUSLIN_TEST_SEED";

    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(300));
    let seed = std::env::var(SEED).map_or_else(|_| 1, |text| text.parse().unwrap());
    eprintln!("{SEED}={seed}");
    let mut random = Pcg32::new(seed, 3);
    let mut shuffle = |calls: &mut Vec<(Verb, Key)>| {
        for i in (1..calls.len()).rev() {
            calls.swap(i, random.next_u32() as usize % (i + 1));
        }
    };
    let host = lab.host("n1", HOSTS[0]);
    host.furnish();
    // Addresses that were given up rest.
    let node = config(&lab, 0).with("--subnet-len", 21).start(&host);
    let runtime = runtime(&node);
    let keys = |name: &str, all: &[Netns]| -> Vec<Key> {
        let all = all.iter().enumerate();
        all.map(|(i, netns)| Key::new(&format!("{name}{i}"), netns.path()))
            .collect()
    };
    // As kubelet does, which takes every error for one that may pass.
    let all_at_once = |mut calls: Vec<(Verb, Key)>| {
        let mut outputs = Vec::new();
        while !calls.is_empty() {
            let answers = runtime.at_once(&calls);
            for (call, output) in std::mem::take(&mut calls).into_iter().zip(answers) {
                match output.is_success() {
                    true => outputs.push((call, output)),
                    false => {
                        let (code, message) = output.error();
                        assert_eq!(code, 11, "{:?} {}: {message}", call.0, call.1.container);
                        calls.push(call);
                    }
                }
            }
        }
        outputs
    };
    let count = |expected: usize| {
        // The node ends later what it had no time for.
        poll_until(SOON, &format!("{expected} pods"), || {
            (pods(&node).len() == expected).then_some(())
        });
    };
    for round in 0..ROUNDS {
        // Containers of the same names in each round, and namespaces with the numbers of the last.
        let mut namespaces = runtime.all_netns(PODS);
        let first = keys("c", &namespaces);
        let began = Instant::now();
        let added = all_at_once(first.iter().map(|key| (Verb::Add, key.clone())).collect());
        eprintln!("round {round}: {PODS} pods within {:?}", began.elapsed());
        let container = |(_, key): &(Verb, Key)| key.container.clone();
        let addresses: BTreeMap<_, _> = added
            .iter()
            .map(|(call, output)| (container(call), ipv4(&output.result())))
            .collect();
        let different: BTreeSet<_> = addresses.values().copied().collect();
        assert_eq!(different.len(), PODS);
        count(PODS);

        // Half of them go while others come, and some start again elsewhere without a word.
        let (going, staying) = first.split_at(PODS / 2);
        let more = runtime.all_netns(PODS / 2 + PODS / 10);
        let (of_new, of_again) = more.split_at(PODS / 2);
        let new = keys(&format!("r{round}-"), of_new);
        let again: Vec<_> = staying
            .iter()
            .zip(of_again)
            .map(|(key, netns)| Key::new(&key.container, netns.path()))
            .collect();
        let mut calls: Vec<_> = going.iter().map(|key| (Verb::Del, key.clone())).collect();
        calls.extend(going.iter().step_by(3).map(|key| (Verb::Del, key.clone())));
        let adds = new.iter().chain(&again);
        calls.extend(adds.map(|key| (Verb::Add, key.clone())));
        shuffle(&mut calls);
        let mut fresh = BTreeSet::new();
        for (call, output) in all_at_once(calls) {
            if call.0 == Verb::Add {
                let address = ipv4(&output.result());
                match addresses.get(&call.1.container) {
                    Some(former) => assert_eq!(address, *former, "{}", call.1.container),
                    None => assert!(fresh.insert(address), "{address} twice"),
                }
            }
        }
        assert!(fresh.is_disjoint(&different), "an address has not rested");
        count(PODS);

        // All go, some of them twice, and some without their namespaces.
        let left: Vec<_> = staying.iter().chain(&new).chain(&again).collect();
        let mut calls: Vec<_> = left.iter().map(|key| (Verb::Del, (*key).clone())).collect();
        let twice = left.iter().step_by(2).map(|key| key.without_netns());
        calls.extend(twice.map(|key| (Verb::Del, key)));
        shuffle(&mut calls);
        all_at_once(calls);
        count(0);
        is_clean(&node);
        assert_eq!(queues(node.pid()), 0);
        namespaces.extend(more);
        Netns::remove_all(&namespaces);
    }
}

/// Usernetes and rootless Podman: the runtime is in a user namespace without the machine's network, and
/// the node outside. All that it needs of the runtime are descriptors.
#[test]
fn pods_of_a_rootless_runtime_join_a_node_outside_of_its_namespaces() {
    let Some(lab) = Lab::new() else { return };
    let (mut node, other) = (start(&lab, 0), start(&lab, 1));
    node.wait_peers(1);
    other.wait_peers(1);
    let inside = lab.rootless(node.host(), "inside");
    assert_eq!(
        inside.sh("ip -o link | wc -l").trim(),
        "1",
        "it has no network"
    );
    let (runtime, far_runtime) = (
        Runtime::new(&inside, &Network::muslin(&node)).speaks("1.1.0"),
        runtime(&other),
    );
    let all = runtime.all_netns(2);
    let far = far_runtime.netns();
    let enter = format!("--net={}", all[0].path());
    let entered = node.host().output(&["nsenter", &enter, "true"]);
    assert!(!entered.status.success(), "the node does not see them");
    let web = Key::new("web", all[0].path()).with(
        "portMappings",
        json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]),
    );
    let second = Key::new("second", all[1].path());
    runtime.add(&web).result();
    runtime.add(&second).result();
    far_runtime.add(&Key::new("far", far.path())).result();
    let (mut near, mut far) = (agent(&all[0]), agent(&far));
    near.listen(80).unwrap();
    // By the tunnel of the machine, and by a port of it, from another.
    for round in 0..2 {
        traffic::ping(&mut near, far.address("eth0").unwrap());
        traffic::transfer(&mut far, near.address("eth0").unwrap(), 80, 10_000_000);
        let published = SocketAddrV4::new(HOSTS[0], 8080);
        assert!(
            other
                .host()
                .agent()
                .send(published, 100_000, 1)
                .unwrap()
                .intact
        );
        if round == 0 {
            node.start_again();
            assert!(runtime.status().is_success());
        }
    }
    assert!(runtime.check(&web).is_success());
    drop((near, far));
    has_no_capability(&node);
    for key in [&web, &second] {
        assert!(runtime.del(key).is_success());
    }
    is_clean(&node);
    assert_eq!(queues(node.pid()), 0);
}

/// Two hosts with a containerd and a node each.
fn with_containerd(scene: impl FnOnce(&[Node; 2], &mut [Containerd; 2])) {
    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(300));
    let nodes = [start(&lab, 0), start(&lab, 1)];
    let started = nodes.each_ref().map(|node| {
        node.wait_peers(1);
        Containerd::start(node.host(), Some(&Network::muslin(node)))
    });
    let [Some(one), Some(two)] = started else {
        return;
    };
    scene(&nodes, &mut [one, two]);
}

fn host_ip(host: &Host) -> Ipv4Addr {
    let text = host.sh("ip -o -4 addr show scope global");
    let address = text.split_whitespace().nth(3).unwrap();
    address.split('/').next().unwrap().parse().unwrap()
}

#[test]
fn pods_of_two_containerds_reach_each_other() {
    with_containerd(|nodes, runtimes| {
        let [one, two] = &*runtimes;
        for runtime in [one, two] {
            runtime.wait_network(true);
        }
        let near = one.pod(&Pod::new("near").publishes(Protocol::Tcp, 8080, 80));
        let far = two.pod(&Pod::new("far"));
        let [near_address, far_address] = [&near, &far].map(|pod| pod.status().addresses[0]);
        for (pod, to) in [(&near, far_address), (&far, near_address)] {
            let output = pod.exec(&["ping", "-c", "2", "-W", "5", &to.to_string()]);
            assert_eq!(output.code, 0, "{output:?}");
        }
        // A container without a pod, by ctr.
        let container = one.container("plain", &["sleep", "1000000"]);
        let ping = container.exec(&["ping", "-c", "1", "-W", "5", &far_address.to_string()]);
        assert!(ping.status.success(), "{ping:?}");
        // The port of the host leads to the pod.
        let serve = "mkdir -p /tmp/w && echo hello >/tmp/w/index.html && httpd -p 80 -h /tmp/w";
        let output = near.exec(&["sh", "-c", serve]);
        assert_eq!(output.code, 0, "{output:?}");
        let url = format!("http://{}:8080/", host_ip(one.host()));
        let output = far.exec(&["wget", "-q", "-O", "-", &url]);
        assert_eq!(output.stdout, b"hello\n", "{output:?}");
        assert_eq!(pods(&nodes[0]).len(), 2);
        container.stop();
        near.stop();
        far.stop();
        for node in nodes {
            has_no_capability(node);
            poll_until(SOON, "the pods are gone", || {
                pods(node).is_empty().then_some(())
            });
            is_clean(node);
        }
    });
}

#[test]
fn a_killed_containerd_and_a_killed_node_find_their_pods() {
    with_containerd(|nodes, [one, two]| {
        one.wait_network(true);
        two.wait_network(true);
        let pod = Pod::new("lasting");
        let sandbox = one.cri().run(&pod).unwrap();
        let far = two.pod(&Pod::new("far"));
        let before = one.cri().sandbox(&sandbox).unwrap();
        one.kill();
        one.start_again();
        assert_eq!(one.cri().sandbox(&sandbox).unwrap(), before);
        let ping = |to: IpAddr| far.exec(&["ping", "-c", "1", "-W", "5", &to.to_string()]);
        assert_eq!(ping(before.addresses[0]).code, 0);
        one.cri().remove(&sandbox).unwrap();
        far.stop();
        for node in nodes {
            poll_until(SOON, "the pods are gone", || {
                pods(node).is_empty().then_some(())
            });
        }
    });
}

/// A plugin that stops between what it asks for and what it makes, and is killed there.
#[test]
fn a_plugin_that_is_killed_leaves_nothing_behind() {
    use muslin::control::Connection;
    use muslin_stack::api::cni::{Call, Key as NodeKey, NetworkNamespace, Reply, Reserve};
    use muslin_stack::api::control::{Answer, Hello, Request};
    use tokio_seqpacket::UnixSeqpacket;

    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 0);
    let runtime = runtime(&node);
    let netns = runtime.netns();
    let reserve = || {
        let key = NodeKey::new("muslin", "c1", "eth0");
        let namespace = NetworkNamespace {
            path: netns.path().to_owned(),
            device: 1,
            inode: 2,
        };
        Request::Cni(Call::Reserve(Box::new(Reserve::new(key, namespace))))
    };
    let executor = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    executor.block_on(async {
        let socket = UnixSeqpacket::connect(node.socket()).await.unwrap();
        let connection = Connection::new(socket);
        let ask = async |request: &Request| {
            connection.send(request, &[]).await.unwrap();
            connection.receive::<Answer>().await.unwrap().unwrap().0
        };
        ask(&Request::Hello(Hello::new("test"))).await;
        let answer = ask(&reserve()).await;
        assert!(
            matches!(answer, Answer::Cni(Reply::Reserved(_))),
            "{answer:?}"
        );
        assert_eq!(pods(&node), ["c1"], "its place is reserved");
    });
    poll_until(SOON, "the reservation's end", || {
        pods(&node).is_empty().then_some(())
    });
    let key = Key::new("c1", netns.path());
    runtime.add(&key).result();
    assert!(runtime.del(&key).is_success());
    is_clean(&node);
}

#[test]
fn containerd_notices_what_is_installed_and_removed() {
    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(300));
    let node = start(&lab, 0);
    let host = node.host();
    let without_ours = Network {
        plugins: Vec::new(),
        ..Network::muslin(&node)
    };
    without_ours.install(host);
    let Some(containerd) = Containerd::start(host, None) else {
        return;
    };
    containerd.wait_network(false);
    let cni = |words: &[&str]| {
        let mut command = host.command(muslin_bin());
        command.args(["cni"]).args(words);
        command.args(["--bin-dir", BIN_DIR, "--conf-dir", CONF_DIR]);
        command
    };
    let install = |words: &[&str]| {
        let mut install = cni(&[&["install", "--plugin", cni_bin()], words].concat());
        install.arg("--socket").arg(node.socket());
        install
    };
    let succeeds = |mut command: Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(succeeds(install(&["--wait"])), "");
    containerd.wait_network(true);
    containerd.pod(&Pod::new("one")).stop();
    // What comes first in the alphabet is what runtimes take.
    host.sh(&format!(
        "cp {CONF_DIR}/10-muslin.conflist {CONF_DIR}/05-other.conflist"
    ));
    let notice = succeeds(install(&[]));
    assert!(
        notice.contains("05-other.conflist comes before"),
        "{notice}"
    );
    host.sh(&format!("rm {CONF_DIR}/05-other.conflist"));
    succeeds(cni(&["uninstall"]));
    containerd.wait_network(false);
    // Somebody removes both while they are watched.
    let mut watcher = install(&["--watch"]);
    watcher.stdin(Stdio::null()).stdout(Stdio::null());
    let mut watcher = watcher.spawn().unwrap();
    containerd.wait_network(true);
    for file in [
        format!("{BIN_DIR}/muslin-cni"),
        format!("{CONF_DIR}/10-muslin.conflist"),
    ] {
        host.sh(&format!("rm {file}"));
        poll_until(SOON, &file, || {
            let there = host.output(&["test", "-s", &file]);
            there.status.success().then_some(())
        });
    }
    containerd.wait_network(true);
    containerd.pod(&Pod::new("two")).stop();
    watcher.kill().unwrap();
    watcher.wait().unwrap();
    is_clean(&node);
}
