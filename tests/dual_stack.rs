//! Dual-stack nodes carry each other's IPv6, and that of a kernel that is set up as flannel does: VXLAN over
//! IPv6 by a device of its own, `flannel-v6.1`.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Stdio;

use muslin_lab::etcd::{Etcd, PREFIX};
use muslin_lab::flannel::{self, Flannel, KERNEL_IP, NODE_IP};
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until};
use muslin_stack::api::control::Attached;
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
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
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
        ipv4: attached.address.ipv4().unwrap().addr(),
        ipv6: attached.address.ipv6().unwrap().addr(),
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
    let ipv4 = two.ipv4.to_string();
    let words = ["busybox", "ping", "-c", "1", "-W", "9", &ipv4];
    assert!(one.host.output(&words).status.success(), "IPv4");
    transfer(&lab, &one.host, &two.host, one.ipv6, "there");
    transfer(&lab, &two.host, &one.host, two.ipv6, "back");
    for node in &nodes {
        assert_eq!(lost(node), Default::default(), "{}", node.log());
    }
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
