//! Nodes with both IP versions, and with IPv6 alone, carry each other's IPv6, and that of a kernel that is set
//! up as flannel does: VXLAN over IPv6 by a device of its own, `flannel-v6.1`.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Stdio;

use muslin::store::EtcdOptions;
use muslin_lab::cni::{Key, Network, Runtime};
use muslin_lab::etcd::{Etcd, PREFIX};
use muslin_lab::flannel::{self, Flannel, KERNEL_IP, NODE_IP};
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until};
use muslin_stack::api::control::Attached;
use muslin_stack::control::lease::{Answer, Op};
use serde_json::Value;

/// The pods of the cluster.
const NETWORK: &str = "fd44::/48";
/// Where hosts are on the underlay.
const UNDERLAY: &str = "fd09::";
/// Bytes of a file that is compared behind the way.
const BULK: usize = 100_000_000;
/// MTU of IPv6 pods on an underlay of 1,500 bytes: less inner Ethernet, VXLAN, UDP and IPv6 headers.
const MTU: u16 = 1430;

/// A pod as a namespace, and its addresses.
struct Pod {
    host: Host,
    ipv4: Option<Ipv4Addr>,
    ipv6: Ipv6Addr,
    attached: Attached,
}

fn pod(lab: &Lab, node: &Node, name: &str) -> Pod {
    let host = lab.namespace(name);
    let pid = host.pid().to_string();
    let mut command = node.client(&["attach", "--pid", &pid, "--name", name, "--json"]);
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "no pod {name}{}", node.log());
    let attached: Attached = serde_json::from_slice(&output.stdout).unwrap();
    Pod {
        host,
        ipv4: attached.address.ipv4().map(|it| it.addr()),
        ipv6: attached.address.ipv6().unwrap().addr(),
        attached,
    }
}

/// A host with addresses of both versions.
fn host(lab: &Lab, name: &str, number: u8) -> Host {
    let host = lab.host(name, Ipv4Addr::new(10, 9, 0, number));
    host.sh(&format!("ip addr add {UNDERLAY}{number}/64 dev eth0 nodad"));
    host
}

/// Sends echo requests of so many bytes of IP until one is answered: a pod that has just come is not known
/// everywhere yet. None may be cut into pieces.
fn ping(from: &Host, to: Ipv6Addr, size: u16) {
    let payload = (size - 48).to_string();
    let to = to.to_string();
    poll_until(SOON, &format!("an echo reply of {to}"), || {
        let words = [
            "busybox", "ping6", "-c", "1", "-W", "1", "-s", &payload, &to,
        ];
        from.output(&words).status.success().then_some(())
    });
}

/// Sends a file to a pod by HTTP, and compares its contents.
fn transfer(lab: &Lab, from: &Host, to: &Host, address: Ipv6Addr, name: &str) {
    let directory = lab.directory().join(name);
    std::fs::create_dir_all(&directory).unwrap();
    let bytes: Vec<u8> = (0..BULK).map(|at| (at % 65_521 % 251) as u8).collect();
    std::fs::write(directory.join("file"), &bytes).unwrap();
    let mut command = from.command("busybox");
    command
        .args(["httpd", "-f", "-p", "[::]:8080", "-h"])
        .arg(&directory);
    let mut server = command.stdin(Stdio::null()).spawn().unwrap();
    let url = format!("http://[{address}]:8080/file");
    let got = directory.join("got");
    poll_until(SOON, "the file", || {
        let mut command = to.command("curl");
        command.args([
            "--silent",
            "--globoff",
            "--fail",
            "--noproxy",
            "*",
            "--output",
        ]);
        let status = command.arg(&got).arg(&url).status();
        status.unwrap().success().then_some(())
    });
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(std::fs::read(&got).unwrap() == bytes, "the contents differ");
    std::fs::remove_dir_all(&directory).unwrap();
}

/// What a node has lost, but for datagrams that came faster than a busy machine let it read them: TCP
/// sends these again.
fn lost(node: &Node) -> BTreeMap<String, u64> {
    let mut lost = node.losses();
    lost.remove("underlay-overflow");
    lost
}

/// Two nodes of a network with this backend.
fn nodes(lab: &Lab, backend: &str) -> Vec<Node> {
    let store = lab.store();
    let start = |number: u8| {
        let config = NodeConfig::on_interface(&format!("n{number}"), "eth0", &store);
        let config = config.with("--network", format!("10.244.0.0/16,{NETWORK}"));
        config
            .with("--backend", backend)
            .start(&host(lab, &format!("h{number}"), number))
    };
    let nodes: Vec<_> = [1, 2].map(start).into();
    for node in &nodes {
        node.wait_peers(1);
    }
    nodes
}

#[test]
fn pods_of_two_nodes_reach_each_other_in_both_versions() {
    let Some(lab) = Lab::new() else { return };
    let nodes = nodes(&lab, "vxlan");
    let one = pod(&lab, &nodes[0], "one");
    let two = pod(&lab, &nodes[1], "two");
    let three = pod(&lab, &nodes[1], "three");
    for size in [MTU, 100] {
        ping(&one.host, two.ipv6, size);
        ping(&two.host, one.ipv6, size);
        ping(&two.host, three.ipv6, size);
    }
    // The gateways, as far as others see them.
    for pod in [&one, &two] {
        let mut gateway = pod.ipv6.segments();
        gateway[7] = 1;
        ping(&one.host, gateway.into(), 100);
    }
    let ipv4 = two.ipv4.unwrap().to_string();
    let words = ["busybox", "ping", "-c", "1", "-W", "9", &ipv4];
    assert!(one.host.output(&words).status.success(), "IPv4");
    transfer(&lab, &one.host, &two.host, one.ipv6, "there");
    transfer(&lab, &two.host, &one.host, two.ipv6, "back");
    for node in &nodes {
        assert_eq!(lost(node), Default::default(), "{}", node.log());
    }
}

/// A host without any address of IPv4, not even of itself.
fn host_without_ipv4(lab: &Lab, number: u8) -> Host {
    let host = host(lab, &format!("h{number}"), number);
    host.sh("ip -4 addr flush dev eth0; ip -4 addr flush dev lo");
    host
}

/// Two nodes of a network with IPv6 alone, on hosts that have nothing else.
fn nodes_without_ipv4(lab: &Lab, backend: &str) -> Vec<Node> {
    let store = lab.store();
    let start = |number: u8| {
        let config = NodeConfig::anywhere(&format!("n{number}"), &store);
        let config = config.with("--network", NETWORK);
        config
            .with("--backend", backend)
            .start(&host_without_ipv4(lab, number))
    };
    let nodes: Vec<_> = [1, 2].map(start).into();
    for node in &nodes {
        node.wait_peers(1);
    }
    nodes
}

#[test]
fn nodes_without_ipv4_carry_each_others_pods() {
    let Some(lab) = Lab::new() else { return };
    let nodes = nodes_without_ipv4(&lab, "vxlan");
    for (number, node) in [1, 2].into_iter().zip(&nodes) {
        let subnet = node.status("subnet");
        assert!(
            subnet.starts_with("fd44:") && !subnet.contains(','),
            "{subnet}"
        );
        assert_eq!(node.status("network"), NETWORK);
        assert_eq!(node.status("public_ip"), format!("{UNDERLAY}{number}"));
        assert_eq!(node.status("tunnel_ip"), format!("{UNDERLAY}{number}"));
        assert_eq!(node.mtu(), MTU);
        let path = node.state_dir().join(format!("nodes/n{number}/subnet.env"));
        let text = poll_until(SOON, "the subnet file", || {
            std::fs::read_to_string(&path).ok()
        });
        let first = subnet.replace("::/", "::1/");
        let lines = format!(
            "FLANNEL_IPV6_NETWORK={NETWORK}\nFLANNEL_IPV6_SUBNET={first}\nFLANNEL_MTU={MTU}\n"
        );
        assert!(text.starts_with(&lines), "{text}");
        let peer = &node.query("peers")[0];
        assert_eq!(
            peer["public_ip"],
            format!("{UNDERLAY}{}", 3 - number),
            "{peer}"
        );
        assert_eq!(
            (&peer["usable"], &peer["state"]),
            (&true.into(), &"alive".into()),
            "{peer}"
        );
        let leases = node.query("leases");
        for lease in leases.as_array().unwrap() {
            let key = lease["key"].as_str().unwrap();
            assert!(key.starts_with("0.0.0.0-0&fd44:"), "{lease}");
            assert_eq!(lease["state"], "alive", "{lease}");
        }
        assert_eq!(leases.as_array().unwrap().len(), 2);
        let doctor = node.client(&["doctor"]).output().unwrap();
        let told = String::from_utf8_lossy(&doctor.stdout);
        assert!(
            !told.contains("WRONG") && !told.contains("0.0.0.0"),
            "{told}"
        );
    }
    let one = pod(&lab, &nodes[0], "one");
    let two = pod(&lab, &nodes[1], "two");
    let three = pod(&lab, &nodes[1], "three");
    assert_eq!(one.ipv4, None);
    let gateway = one.attached.gateway.ipv6().unwrap();
    assert_eq!(one.attached.dns, [gateway]);
    for size in [MTU, 100] {
        ping(&one.host, two.ipv6, size);
        ping(&two.host, one.ipv6, size);
        ping(&two.host, three.ipv6, size);
    }
    ping(&one.host, gateway, 100);
    transfer(&lab, &one.host, &two.host, one.ipv6, "there");
    transfer(&lab, &two.host, &one.host, two.ipv6, "back");
    // Names, by the resolver that a pod gets.
    let (name, server) = ("two.muslin", gateway.to_string());
    poll_until(SOON, "the name of another node's pod", || {
        let words = ["busybox", "nslookup", "-type=aaaa", name, &server];
        let output = one.host.output(&words);
        let text = String::from_utf8_lossy(&output.stdout);
        text.contains(&two.ipv6.to_string()).then_some(())
    });
    let words = ["run", "--name", "four", "--", "cat", "/etc/resolv.conf"];
    let output = nodes[0].client(&words).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let servers: Vec<_> = text
        .lines()
        .filter(|it| it.starts_with("nameserver"))
        .collect();
    assert_eq!(servers, [format!("nameserver {gateway}")], "{output:?}");
    // The world outside, by sockets of the node: what a program of another host serves.
    let outside = format!("{UNDERLAY}2").parse().unwrap();
    transfer(&lab, nodes[1].host(), &one.host, outside, "out");
    for node in &nodes {
        assert_eq!(lost(node), Default::default(), "{}", node.log());
    }
}

#[test]
fn a_container_runtime_is_told_of_ipv6_alone() {
    let Some(lab) = Lab::new() else { return };
    let host = host_without_ipv4(&lab, 1);
    host.furnish();
    let config = NodeConfig::anywhere("n1", &lab.store()).with("--network", NETWORK);
    let node = config.start(&host);
    let runtime = Runtime::new(node.host(), &Network::muslin(&node));
    let netns = runtime.netns();
    let added = runtime.add(&Key::new("c1", netns.path()).pod("default", "web"));
    let result = added.result();
    let ips = result["ips"].as_array().unwrap();
    assert_eq!(ips.len(), 1, "{result}");
    let gateway = node.status("gateway");
    assert_eq!(ips[0]["gateway"], gateway, "{result}");
    assert_eq!(result["dns"]["nameservers"], serde_json::json!([gateway]));
    let routes = result["routes"].as_array().unwrap();
    let has_ipv4 = |it: &Value| !it["dst"].as_str().unwrap().contains(':');
    assert!(!routes.iter().any(has_ipv4), "{result}");
    netns.sh(&format!("busybox ping6 -c 1 -W 5 {gateway}"));
}

#[test]
fn nodes_without_ipv4_are_each_others_next_hops() {
    let Some(lab) = Lab::new() else { return };
    let nodes = nodes_without_ipv4(&lab, "host-gw");
    let one = pod(&lab, &nodes[0], "one");
    let two = pod(&lab, &nodes[1], "two");
    for size in [1500, 100] {
        ping(&one.host, two.ipv6, size);
        ping(&two.host, one.ipv6, size);
    }
    transfer(&lab, &one.host, &two.host, one.ipv6, "there");
    transfer(&lab, &two.host, &one.host, two.ipv6, "back");
    let peer = &nodes[0].query("peers")[0];
    assert_eq!(peer["path"], "on-link", "{peer}");
}

#[test]
fn dual_nodes_are_each_others_next_hops() {
    let Some(lab) = Lab::new() else { return };
    let nodes = nodes(&lab, "host-gw");
    let one = pod(&lab, &nodes[0], "one");
    let two = pod(&lab, &nodes[1], "two");
    for size in [1500, 100] {
        ping(&one.host, two.ipv6, size);
        ping(&two.host, one.ipv6, size);
    }
}

/// Does something to the store that the lab's nodes share.
fn execute(lab: &Lab, op: Op) {
    let store = muslin::store::open(lab.store(), &EtcdOptions::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    let answer = runtime.block_on(store.execute(op)).unwrap();
    assert!(matches!(answer, Answer::Done(_)), "{answer:?}");
}

#[test]
fn a_kernel_without_ipv4_and_a_node_carry_each_others_pods() {
    let Some(lab) = Lab::new() else { return };
    let node = NodeConfig::anywhere("n2", &lab.store()).with("--network", NETWORK);
    let node = node.start(&host_without_ipv4(&lab, 2));
    // As flanneld with EnableIPv4 false.
    let kernel = host_without_ipv4(&lab, 1);
    let their_pod = lab.namespace("their pod");
    lab.cable((&kernel, "cni0"), (&their_pod, "eth0"));
    kernel.sh(&format!(
        "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
         ip link add flannel-v6.1 type vxlan id 1 dstport 8472 nolearning local {UNDERLAY}1 dev eth0
         ip link set flannel-v6.1 mtu {MTU} up
         ip addr add fd44:0:0:fff1::/128 dev flannel-v6.1 nodad
         ip addr add fd44:0:0:fff1::1/64 dev cni0 nodad"
    ));
    their_pod.sh(&format!(
        "ip link set eth0 mtu {MTU}; ip addr add fd44:0:0:fff1::2/64 dev eth0 nodad
         ip -6 route add default via fd44:0:0:fff1::1"
    ));
    let text = kernel.run(&["ip", "-json", "link", "show", "flannel-v6.1"]);
    let links: Value = serde_json::from_str(&text).unwrap();
    let mac = links[0]["address"].as_str().unwrap();
    execute(
        &lab,
        Op::Create {
            key: format!("{PREFIX}/subnets/0.0.0.0-0&fd44:0:0:fff1::-64"),
            value: format!(
                r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{UNDERLAY}1","BackendType":"vxlan","BackendV6Data":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
            ),
            ttl: None,
        },
    );
    node.wait_peers(1);
    let subnet = node.status("subnet");
    let (base, _) = subnet.split_once('/').unwrap();
    let ours = node.status("vtep_mac");
    kernel.sh(&format!(
        "ip -6 neigh replace {base} lladdr {ours} dev flannel-v6.1 nud permanent
         bridge fdb replace {ours} dev flannel-v6.1 dst {UNDERLAY}2 self permanent
         ip -6 route replace {subnet} via {base} dev flannel-v6.1 onlink"
    ));
    let pod = pod(&lab, &node, "pod");
    let theirs: Ipv6Addr = "fd44:0:0:fff1::2".parse().unwrap();
    for size in [MTU, 100] {
        ping(&pod.host, theirs, size);
        ping(&their_pod, pod.ipv6, size);
    }
    transfer(&lab, &pod.host, &their_pod, pod.ipv6, "to the kernel");
    transfer(&lab, &their_pod, &pod.host, theirs, "to the node");
    assert_eq!(lost(&node), Default::default(), "{}", node.log());
}

#[test]
fn leases_of_ipv4_of_both_and_of_ipv6_alone_are_peers_by_what_they_have() {
    let Some(lab) = Lab::new() else { return };
    let nodes = nodes(&lab, "vxlan");
    let plain = lab.host("h3", Ipv4Addr::new(10, 9, 0, 3));
    let plain = NodeConfig::on_interface("n3", "eth0", &lab.store()).start(&plain);
    assert!(!plain.status("subnet").contains(','));
    execute(
        &lab,
        Op::Create {
            key: format!("{PREFIX}/subnets/0.0.0.0-0&fd44:0:0:fff1::-64"),
            value: format!(
                r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{UNDERLAY}4","BackendType":"vxlan","BackendV6Data":{{"VNI":1,"VtepMAC":"0e:00:00:00:00:04"}}}}"#
            ),
            ttl: None,
        },
    );
    let state = |node: &Node, public: &str| {
        let peers = node.query("peers");
        let mut peers = peers.as_array().unwrap().iter();
        let peer = peers.find(|it| it["public_ip"] == public)?;
        Some((peer["usable"] == true, peer["state"].as_str()?.to_owned()))
    };
    let alone = format!("{UNDERLAY}4");
    for node in &nodes {
        node.wait_peers(3);
        assert_eq!(state(node, &alone), Some((true, "silent".to_owned())));
        assert_eq!(state(node, "10.9.0.3"), Some((true, "alive".to_owned())));
    }
    plain.wait_peers(2);
    let found = state(&plain, &alone);
    assert_eq!(found, Some((false, "it has IPv6 alone".to_owned())));
    for node in &nodes {
        let routes = node.query("routes").to_string();
        assert!(routes.contains(&alone), "{routes}");
    }
    let one = pod(&lab, &nodes[0], "one");
    let two = pod(&lab, &nodes[1], "two");
    ping(&one.host, two.ipv6, 100);
}

#[test]
fn a_kernel_with_flannels_devices_and_a_node_carry_each_others_ipv6() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let config = format!(
        r#"{{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "{NETWORK}", "Backend": {{"Type": "vxlan"}}}}"#
    );
    etcd.configure(PREFIX, &config);
    let kernel = Flannel::new(&lab, MTU);
    // The same VNI and port as the device of IPv4, over IPv6, with a MAC address of its own.
    kernel.host.sh(&format!(
        "ip addr add {UNDERLAY}1/64 dev eth0 nodad
         echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
         ip link add flannel-v6.1 type vxlan id 1 dstport 8472 nolearning local {UNDERLAY}1 dev eth0
         ip link set flannel-v6.1 mtu {MTU} up
         ip addr add fd44:0:0:1::/128 dev flannel-v6.1 nodad
         ip addr add fd44:0:0:1::1/64 dev cni0 nodad"
    ));
    kernel.pod.sh(
        "ip addr add fd44:0:0:1::2/64 dev eth0 nodad; ip -6 route add default via fd44:0:0:1::1",
    );
    let mac = |device: &str| {
        let text = kernel.host.run(&["ip", "-json", "link", "show", device]);
        let links: Value = serde_json::from_str(&text).unwrap();
        links[0]["address"].as_str().unwrap().to_owned()
    };
    let mac_v4 = flannel::device(&kernel.host, KERNEL_IP, flannel::kernel(0), MTU);
    let mac_v6 = mac("flannel-v6.1");
    etcd.create(
        &format!("{PREFIX}/subnets/10.244.1.0-24&fd44:0:0:1::-64"),
        &format!(
            r#"{{"PublicIP":"{KERNEL_IP}","PublicIPv6":"{UNDERLAY}1","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac_v4}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{mac_v6}"}}}}"#
        ),
    );

    let node = NodeConfig::new("n", NODE_IP, &etcd.store()).start(&host(&lab, "node", 2));
    node.wait_peers(1);
    // What flanneld makes of the node's record.
    let records = etcd.leases(PREFIX);
    let ours = records
        .iter()
        .find(|it| !it.key.contains("10.244.1.0"))
        .unwrap();
    let (_, subnet) = ours.key.rsplit_once('&').unwrap();
    let (base, subnet) = flannel::parts(subnet);
    let record: Value = serde_json::from_str(&ours.value).unwrap();
    assert_eq!(record["PublicIPv6"], format!("{UNDERLAY}2"));
    let ours = record["BackendV6Data"]["VtepMAC"].as_str().unwrap();
    kernel.host.sh(&format!(
        "ip -6 neigh replace {base} lladdr {ours} dev flannel-v6.1 nud permanent
         bridge fdb replace {ours} dev flannel-v6.1 dst {UNDERLAY}2 self permanent
         ip -6 route replace {subnet} via {base} dev flannel-v6.1 onlink"
    ));

    let pod = pod(&lab, &node, "pod");
    let theirs: Ipv6Addr = "fd44:0:0:1::2".parse().unwrap();
    for size in [MTU, 100] {
        ping(&pod.host, theirs, size);
        ping(&kernel.pod, pod.ipv6, size);
    }
    transfer(&lab, &pod.host, &kernel.pod, pod.ipv6, "to the kernel");
    transfer(&lab, &kernel.pod, &pod.host, theirs, "to the node");
    assert_eq!(lost(&node), Default::default(), "{}", node.log());
}
