//! Pods that container runtimes attach to nodes by the CNI plugin: with a real containerd, and with the
//! habits of all runtimes.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use muslin::agent::Agent;
use muslin_lab::cni::{BIN_DIR, CONF_DIR, Key, Netns, Network, Output, Runtime, address};
use muslin_lab::containerd::Containerd;
use muslin_lab::cri::{Pod, Protocol};
use muslin_lab::{
    Host, Lab, Node, NodeConfig, SOON, cni_bin, muslin_bin, poll_until, probe_bin, traffic,
};
use serde_json::{Value, json};

const HOSTS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 9, 0, 1), Ipv4Addr::new(10, 9, 0, 2)];

/// A node on a host that has directories of its own, as a machine has.
fn start(lab: &Lab, index: usize) -> Node {
    let host = lab.host(&format!("n{}", index + 1), HOSTS[index]);
    host.furnish();
    let store = format!("sqlite:{}", lab.directory().join("leases.db").display());
    let config = NodeConfig::new(&format!("n{}", index + 1), HOSTS[index], &store);
    // Which it needs for ports below 1024 alone.
    let config = config.without_capability("net_bind_service");
    config.start(&host)
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
    let to = |agent: &mut Agent| {
        SocketAddrV4::new(agent.address("eth0").unwrap(), agent.listen(0).unwrap())
    };
    let (to_limited, to_free) = (to(&mut limited), to(&mut free));
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
    let listen = |agent: &mut Agent| {
        SocketAddrV4::new(agent.address("eth0").unwrap(), agent.listen(0).unwrap())
    };
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

#[test]
fn packets_wait_at_the_keeper_for_a_killed_node() {
    let Some(lab) = Lab::new() else { return };
    let host = lab.host("n1", HOSTS[0]);
    host.furnish();
    let socket = lab.directory().join("keep.sock");
    let mut keeper = host.command(muslin_bin());
    keeper.args(["keep", "--socket"]).arg(&socket);
    let mut keeper = keeper.stdin(Stdio::null()).spawn().unwrap();
    poll_until(SOON, "the keeper", || socket.exists().then_some(()));
    let store = format!("sqlite:{}", lab.directory().join("leases.db").display());
    let config = NodeConfig::new("n1", HOSTS[0], &store);
    let config = config.without_capability("net_bind_service");
    let mut node = config.with("--keeper", socket.display()).start(&host);
    let runtime = runtime(&node);
    let (one, two) = (runtime.netns(), runtime.netns());
    let keys = [("a", &one), ("b", &two)].map(|(name, netns)| Key::new(name, netns.path()));
    for key in &keys {
        runtime.add(key).result();
    }
    let (mut near, mut far) = (agent(&one), agent(&two));
    let to = SocketAddrV4::new(far.address("eth0").unwrap(), far.listen(0).unwrap());
    let id = near.open(to).unwrap();
    for round in 0..5 {
        assert!(near.exchange(id, 200_000, round).unwrap().intact);
        node.kill();
        // With nobody who calls the plugin, the interface keeps its carrier.
        let carrier = one.sh("cat /sys/class/net/eth0/carrier 2>/dev/null || ip link show eth0");
        assert!(!carrier.contains("NO-CARRIER"), "{carrier}");
        let killed = Instant::now();
        node.start_again();
        assert!(near.exchange(id, 200_000, 100 + round).unwrap().intact);
        eprintln!("round {round}: back after {:?}", killed.elapsed());
    }
    drop((near, far));
    for key in &keys {
        assert!(runtime.del(key).is_success());
    }
    is_clean(&node);
    // It holds no device any more, and never had a capability.
    let process = format!("/proc/{}", keeper.id());
    let held = std::fs::read_dir(format!("{process}/fd")).unwrap();
    let held = held.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    assert_eq!(held.filter(|it| it.ends_with("net/tun")).count(), 0);
    keeper.kill().unwrap();
    keeper.wait().unwrap();
}

#[test]
fn many_pods_come_and_go_at_once() {
    const PODS: usize = 100;
    let Some(lab) = Lab::new() else { return };
    lab.limit(Duration::from_secs(300));
    let node = start(&lab, 0);
    let runtime = runtime(&node);
    let all = runtime.all_netns(PODS);
    let keys: Vec<_> = all
        .iter()
        .enumerate()
        .map(|(i, netns)| Key::new(&format!("c{i}"), netns.path()))
        .collect();
    let added = runtime.add_at_once(&keys);
    let addresses: BTreeSet<_> = added.iter().map(|it| ipv4(&it.result())).collect();
    assert_eq!(addresses.len(), PODS);
    assert_eq!(pods(&node).len(), PODS);
    // In another order, and some of them twice.
    let mut order: Vec<_> = keys.iter().rev().step_by(2).cloned().collect();
    order.extend(keys.iter().cloned());
    let failed: Vec<Output> = runtime
        .del_at_once(&order)
        .into_iter()
        .filter(|it| !it.is_success())
        .collect();
    assert!(failed.is_empty(), "{failed:?}");
    is_clean(&node);
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
