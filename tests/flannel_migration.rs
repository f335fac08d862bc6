//! A node of a flannel cluster becomes a muslin node while its pod runs, and a flannel node again, by
//! the commands of `docs/flannel-migration.md`.
//!
//! flanneld is the devices and records that it makes: it can be stopped, and leaves them, as it does.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{Ipv4Addr, SocketAddrV4};

use muslin::agent::{Agent, Ping};
use muslin_lab::etcd::{Etcd, PREFIX, Record};
use muslin_lab::flannel::{self, Flannel, KERNEL_IP, NODE_IP, NODE_SUBNET};
use muslin_lab::{Host, Lab, NodeConfig, SOON, muslin_bin, poll_until, traffic};
use serde_json::Value;

/// MTU of the underlay in bytes.
const UNDERLAY: u16 = 1500;
/// MTU of pods.
const MTU: u16 = UNDERLAY - 50;
/// What the administrator wrote.
const CONFIG: &str = r#"{ "Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}"#;

/// A node of flannel's.
struct Flanneld<'a> {
    etcd: &'a Etcd,
    host: &'a Host,
    address: Ipv4Addr,
    subnet: fn(u8) -> Ipv4Addr,
}

impl Flanneld<'_> {
    fn key(&self) -> String {
        format!("{PREFIX}/subnets/{}-24", (self.subnet)(0))
    }

    /// Makes its device and writes its record, whether that is there or not.
    fn start(&self) {
        let mac = flannel::device(self.host, self.address, (self.subnet)(0), MTU);
        self.etcd
            .publish(&self.key(), &flannel::record(self.address, &mac));
    }

    /// Does what the other nodes' records say.
    fn follow(&self) {
        for record in self.etcd.leases(PREFIX) {
            if record.key != self.key() {
                let (public_ip, mac) = end(&record);
                let subnet = record.key.rsplit('/').next().unwrap();
                flannel::set_up(self.host, subnet, &public_ip, &mac);
            }
        }
    }
}

/// The tunnel's end of a record: public address and VTEP.
fn end(record: &Record) -> (String, String) {
    let value: Value = serde_json::from_str(&record.value).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (
        text(&value["PublicIP"]),
        text(&value["BackendData"]["VtepMAC"]),
    )
}

/// A finding of `muslin doctor`: its verdict, and all that it says.
fn finding(host: &Host, arguments: &[&str], check: &str) -> (String, String) {
    let output = host.output(&[&[muslin_bin(), "doctor", "--json"], arguments].concat());
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut findings = findings.as_array().unwrap().iter();
    let found = findings.find(|it| it["check"] == check).unwrap();
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    (text("verdict"), text("detail") + "; " + &text("advice"))
}

#[track_caller]
fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no '{word}': {text}");
    }
}

/// The pods of both nodes, and connections between them that stay open.
struct Pods {
    near: Agent,
    far: Agent,
    out: u64,
    back: u64,
    rounds: u64,
}

impl Pods {
    fn new(near: &Host, far: &Host) -> Self {
        let (mut near, mut far) = (near.agent(), far.agent());
        let to_far = SocketAddrV4::new(flannel::kernel(2), far.listen(0).unwrap());
        let to_near = SocketAddrV4::new(flannel::node(2), near.listen(0).unwrap());
        let out = near.open(to_far).unwrap();
        let back = far.open(to_near).unwrap();
        Self {
            near,
            far,
            out,
            back,
            rounds: 0,
        }
    }

    /// They reach each other, by their old connections, too.
    fn meet(&mut self) {
        traffic::ping(&mut self.near, flannel::kernel(2));
        traffic::ping(&mut self.far, flannel::node(2));
        self.rounds += 1;
        for (pod, id) in [(&mut self.near, self.out), (&mut self.far, self.back)] {
            assert!(pod.exchange(id, 100_000, self.rounds).unwrap().intact);
        }
    }

    fn are_apart(&mut self) {
        let ping = Ping {
            count: 1,
            timeout_ms: 300,
            ..Ping::new(flannel::node(2))
        };
        let pinged = self.far.ping(&ping).unwrap();
        assert!(pinged.replies.is_empty(), "{pinged:?}");
    }
}

#[test]
fn a_node_with_a_pod_moves_from_flannel_to_muslin_and_back() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    etcd.configure(PREFIX, CONFIG);
    let other = Flannel::new(&lab, MTU);
    let this = Flannel::at(&lab, ("node", NODE_IP), flannel::node, MTU);
    let (host, pod) = (&this.host, &this.pod);
    let pid = pod.pid().to_string();
    let [stays, moves] = [
        (
            &other.host,
            KERNEL_IP,
            flannel::kernel as fn(u8) -> Ipv4Addr,
        ),
        (host, NODE_IP, flannel::node),
    ]
    .map(|(host, address, subnet)| Flanneld {
        etcd: &etcd,
        host,
        address,
        subnet,
    });
    stays.start();
    moves.start();
    stays.follow();
    moves.follow();
    let mut pods = Pods::new(pod, &other.pod);
    pods.meet();

    // What flanneld leaves holds the port.
    let config = NodeConfig::new("n", NODE_IP, &etcd.store()).with("--mtu", UNDERLAY);
    let words = ["UDP port 8472", "flannel.1", "'sudo ip link del flannel.1'"];
    let mut early = config.spawn(host);
    assert_eq!(early.wait_exit(SOON), Some(1), "{}", early.log());
    says(&early.log(), &words);
    let state = early.state_dir().display().to_string();
    let before_start = ["--state-dir", &state, "--iface", "eth0"];
    let (verdict, text) = finding(host, &before_start, "port");
    assert_eq!(verdict, "wrong", "{text}");
    says(&text, &words);
    pods.meet();

    host.sh("ip link del flannel.1");
    let mut node = config.start(host);
    assert_eq!(node.status("subnet"), NODE_SUBNET);
    let vtep = node.status("vtep_mac");
    stays.follow();
    // Until its pod is moved the node says what is wrong.
    pods.are_apart();
    let words = [
        "cni0 has 10.244.2.1/24",
        "cut off",
        "'muslin attach'",
        "'sudo ip link del cni0'",
    ];
    says(&node.log(), &words);
    let state = node.state_dir().display().to_string();
    let of_node = ["--state-dir", &state, "--peers", "0"];
    let (verdict, text) = finding(host, &of_node, "own subnet");
    assert_eq!(verdict, "wrong", "{text}");
    says(&text, &words);

    let address = flannel::node(2).to_string();
    host.sh(&format!("nsenter -t {pid} -n ip link del eth0"));
    let attach = ["attach", "--pid", &pid, "--name", "web", "--ip", &address];
    let attached = node.client(&attach).output().unwrap();
    assert!(attached.status.success(), "{attached:?}");
    host.sh("ip link del cni0");
    assert_eq!(pods.near.address("eth0").unwrap(), flannel::node(2));
    pods.meet();
    let (verdict, text) = finding(host, &of_node, "own subnet");
    assert_eq!(verdict, "fine", "{text}");
    let seen = etcd.get(&moves.key()).unwrap();
    assert_eq!(end(&seen), (NODE_IP.to_string(), vtep));
    assert_eq!(etcd.leases(PREFIX).len(), 2);

    // And back: the lease stays, the pod's device does not.
    let process = node.query("status")["pid"].to_string();
    host.run(&["kill", &process]);
    assert_eq!(node.wait_exit(SOON), Some(0), "{}", node.log());
    // It may have been said again meanwhile.
    let left = etcd.get(&moves.key()).unwrap();
    assert_eq!(left.value, seen.value);
    poll_until(SOON, "the device is gone", || {
        (!pod.run(&["ip", "-o", "link"]).contains("eth0")).then_some(())
    });
    moves.start();
    moves.follow();
    stays.follow();
    host.sh(&format!(
        "ip link add cni0 type bridge
         ip link set cni0 mtu {MTU} up
         ip addr add 10.244.2.1/24 dev cni0

         ip link add veth-web mtu {MTU} type veth peer name eth0 mtu {MTU} netns {pid}
         ip link set veth-web master cni0 up
         nsenter -t {pid} -n ip addr add {address}/24 dev eth0
         nsenter -t {pid} -n ip link set eth0 up
         nsenter -t {pid} -n ip route add default via 10.244.2.1"
    ));
    pods.meet();
}
