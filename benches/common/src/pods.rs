//! Hosts, nodes and pods that benchmarks are made of, and the kernel's network as flannel sets it up.

use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::OnceLock;

use muslin_lab::{Host, Lab, Node, NodeConfig};
use muslin_stack::api::control::Attached;

use super::flannel_udp::{DEVICE, MTU};
use super::window::Process;

/// MTU of pods by VXLAN over an underlay of 1,500 bytes.
pub const VXLAN_MTU: u16 = 1450;
/// Between the hosts.
pub const UNDERLAY: &str = "eth0";
/// VTEPs of the kernel's hosts.
const MACS: [&str; 2] = ["c6:d2:32:6f:8f:01", "c6:d2:32:6f:8f:02"];

/// The underlay's address of a host.
pub fn host_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, number)
}

/// Two hosts and a cable between them.
pub fn hosts(lab: &Lab) -> Vec<Host> {
    let hosts = vec![lab.namespace("host 1"), lab.namespace("host 2")];
    lab.cable((&hosts[0], UNDERLAY), (&hosts[1], UNDERLAY));
    for (host, number) in hosts.iter().zip([1, 2]) {
        let address = host_address(number);
        host.sh(&format!(
            "echo 0 >/proc/sys/net/ipv4/ip_forward; ip addr add {address}/24 dev {UNDERLAY}"
        ));
    }
    hosts
}

/// What gives one of two hosts the kernel's VXLAN device as flannel does, with the other's lease.
pub fn flannel_vxlan(number: u8) -> String {
    let peer = 3 - number;
    format!(
        "ip link add flannel.1 type vxlan id 1 dstport 8472 nolearning local {own_ip} dev {UNDERLAY}
         ip link set flannel.1 address {own_mac} mtu {VXLAN_MTU} up
         ip addr add 10.244.{number}.0/32 dev flannel.1
         ip neigh replace 10.244.{peer}.0 lladdr {peer_mac} dev flannel.1 nud permanent
         bridge fdb replace {peer_mac} dev flannel.1 dst {peer_ip} self permanent
         ip route replace 10.244.{peer}.0/24 via 10.244.{peer}.0 dev flannel.1 onlink",
        own_ip = host_address(number),
        own_mac = MACS[usize::from(number - 1)],
        peer_ip = host_address(peer),
        peer_mac = MACS[usize::from(peer - 1)],
    )
}

/// Gives one of two hosts flannel's `udp` backend, with the other's lease. It lasts as long as the process.
pub fn flannel_udp(host: &Host, number: u8) -> Process {
    let peer = 3 - number;
    let [own, next] = [number, peer].map(|number| host_address(number).to_string());
    let subnet = format!("10.244.{peer}.0/24");
    let mut proxy = Process::start(host, &["flannel-udp", &own, &subnet, &next]);
    let is_open: Result<bool, _> = proxy.hear();
    is_open.unwrap();
    host.sh(&format!(
        "ip addr add 10.244.{number}.0/16 dev {DEVICE}
         ip link set {DEVICE} mtu {MTU} up"
    ));
    proxy
}

/// Has a host's kernel forward, with the bridge of its pods.
pub fn bridge(host: &Host, number: u8, mtu: u16) {
    host.sh(&format!(
        "echo 1 >/proc/sys/net/ipv4/ip_forward
         ip link add cni0 type bridge
         ip addr add 10.244.{number}.1/24 dev cni0
         ip link set cni0 mtu {mtu} up"
    ));
}

/// A pod on a host's bridge.
pub fn bridged_pod(lab: &Lab, host: &Host, (number, offset): (u8, u8), mtu: u16) -> Host {
    let pod = lab.namespace("pod");
    let port = format!("veth{offset}");
    lab.cable((host, &port), (&pod, "eth0"));
    host.sh(&format!("ip link set {port} mtu {mtu} master cni0"));
    pod.sh(&format!(
        "ip link set eth0 mtu {mtu}
         ip addr add 10.244.{number}.{offset}/24 dev eth0
         ip route add default via 10.244.{number}.1"
    ));
    pod
}

/// How many packet threads nodes have, if not as many as they choose.
static WORKERS: OnceLock<u8> = OnceLock::new();

/// Gives all nodes from now on so many packet threads. Said once.
pub fn set_workers(count: u8) {
    WORKERS.get_or_init(|| count);
}

/// A node on the underlay.
pub fn node(lab: &Lab, host: &Host, number: u8, backend: &str) -> Node {
    node_config(lab, number, backend).start(host)
}

/// Where a watched node serves its metrics and its page.
const METRICS: &str = "127.0.0.1:8482";
const PAGE: &str = "127.0.0.1:8490";

/// A node on the underlay that serves metrics and its page, and who reads both: the metrics once a second,
/// the page as often as a browser does that has it open.
pub fn watched_node(lab: &Lab, host: &Host, number: u8, backend: &str) -> (Node, [Process; 2]) {
    let config = node_config(lab, number, backend);
    let config = config.with("--metrics", METRICS).with("--admin", PAGE);
    let node = config.start(host);
    let served = [(METRICS, "/metrics", "1"), (PAGE, "/api/view", "2")];
    let readers = served.map(|(address, path, seconds)| {
        host.sh(&format!(
            "curl --silent --fail --output /dev/null http://{address}{path}"
        ));
        Process::start(host, &["read", address, path, seconds])
    });
    (node, readers)
}

fn node_config(lab: &Lab, number: u8, backend: &str) -> NodeConfig {
    let store = lab.store();
    let config = NodeConfig::on_interface(&format!("n{number}"), UNDERLAY, &store)
        .with("--network", "10.244.0.0/16")
        .with("--backend", backend);
    match WORKERS.get() {
        Some(count) => config.with("--workers", count),
        None => config,
    }
}

/// A pod of a node, and its address.
pub fn attached_pod(lab: &Lab, node: &Node, name: &str) -> (Host, Ipv4Addr) {
    let pod = lab.namespace(name);
    let pid = pod.pid().to_string();
    let mut command = node.client(&["attach", "--pid", &pid, "--name", name, "--json"]);
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "no pod {name}{}", node.log());
    let attached: Attached = serde_json::from_slice(&output.stdout).unwrap();
    (pod, attached.address.ipv4().unwrap().addr())
}
