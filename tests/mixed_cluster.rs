//! Muslin nodes and a flannel node that share nothing but etcd.
//!
//! The flannel node is a kernel whose devices the test sets up from the records alone, exactly as
//! flanneld does: per lease a permanent neighbour, a forwarding entry and an on-link route.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use muslin::agent::Agent;
use muslin_lab::etcd::{Etcd, Event, PREFIX, Record, TTL, Watch};
use muslin_lab::flannel::{self, Flannel, KERNEL_IP, KERNEL_SUBNET, NODE_IP};
use muslin_lab::watch::stretched;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until, traffic};
use serde_json::Value;

/// MTU of the underlay in bytes.
const UNDERLAY: u16 = 1500;
/// MTU of pods: less inner Ethernet, VXLAN, UDP and IP headers.
const MTU: u16 = UNDERLAY - 50;
/// What the administrator wrote.
const CONFIG: &str = r#"{ "Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}"#;
/// The third node.
const THIRD_IP: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 3);

/// What flanneld keeps of a peer's record.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Peer {
    public_ip: String,
    mac: String,
}

/// A kernel that does what the records say.
struct KernelNode<'a> {
    etcd: &'a Etcd,
    flannel: Flannel,
    mac: String,
    lease: i64,
    /// By subnet, like `10.244.2.0-24`.
    peers: BTreeMap<String, Peer>,
    watch: Watch<'a>,
}

impl<'a> KernelNode<'a> {
    /// Takes part: its device, its own record, then everybody else's.
    fn join(lab: &Lab, etcd: &'a Etcd) -> Self {
        let flannel = Flannel::new(lab, MTU);
        let mac = device(&flannel.host);
        let lease = etcd.create(&own_key(), &flannel::record(KERNEL_IP, &mac));
        let subnets = format!("{PREFIX}/subnets");
        let (records, revision) = etcd.list(&subnets);
        let mut node = Self {
            etcd,
            flannel,
            mac,
            lease,
            peers: BTreeMap::new(),
            watch: etcd.watch(&subnets, revision + 1),
        };
        for record in records {
            node.apply(Event::Put(record));
        }
        node
    }

    /// Another device with another MAC address, as after a reboot: the same key is written anew.
    fn restart(&mut self) {
        self.flannel.host.sh("ip link del flannel.1");
        self.mac = device(&self.flannel.host);
        self.lease = self
            .etcd
            .publish(&own_key(), &flannel::record(KERNEL_IP, &self.mac));
        for (subnet, peer) in &self.peers {
            set_up(&self.flannel.host, subnet, peer);
        }
    }

    /// Follows the watch until the peers are as wanted.
    fn follow(&mut self, what: &str, is_so: impl Fn(&BTreeMap<String, Peer>) -> bool) {
        let deadline = Instant::now() + stretched(SOON);
        while !is_so(&self.peers) {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.peers);
            for event in self.watch.next(Duration::from_millis(50)) {
                self.apply(event);
            }
        }
    }

    /// Everything it was told about its peers.
    fn tables(&self) -> Vec<String> {
        let text = self
            .flannel
            .host
            .sh("ip route; ip neigh show dev flannel.1; bridge fdb show dev flannel.1");
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Put(record) => {
                let subnet = record.key.rsplit('/').next().unwrap();
                // Its own is known by its subnet.
                if subnet == own_subnet() {
                    return;
                }
                let value: Value = serde_json::from_str(&record.value).unwrap();
                assert_eq!(value["BackendType"], "vxlan", "{record:?}");
                let peer = Peer {
                    public_ip: value["PublicIP"].as_str().unwrap().to_owned(),
                    mac: value["BackendData"]["VtepMAC"].as_str().unwrap().to_owned(),
                };
                set_up(&self.flannel.host, subnet, &peer);
                self.peers.insert(subnet.to_owned(), peer);
            }
            Event::Delete(key) => {
                let subnet = key.rsplit('/').next().unwrap();
                // Nothing but the subnet is told: the rest is what was known.
                if let Some(peer) = self.peers.remove(subnet) {
                    let (base, prefix) = flannel::parts(subnet);
                    let Peer { public_ip, mac } = peer;
                    self.flannel.host.sh(&format!(
                        "ip route del {prefix} via {base} dev flannel.1 onlink
                         bridge fdb del {mac} dev flannel.1 dst {public_ip} self
                         ip neigh del {base} lladdr {mac} dev flannel.1"
                    ));
                }
            }
        }
    }
}

fn own_subnet() -> String {
    KERNEL_SUBNET.replace('/', "-")
}

fn own_key() -> String {
    format!("{PREFIX}/subnets/{}", own_subnet())
}

/// flannel's device.
fn device(host: &Host) -> String {
    flannel::device(host, KERNEL_IP, flannel::kernel(0), MTU)
}

fn set_up(host: &Host, subnet: &str, Peer { public_ip, mac }: &Peer) {
    flannel::set_up(host, subnet, public_ip, mac);
}

fn config(name: &str, address: Ipv4Addr, etcd: &Etcd) -> NodeConfig {
    NodeConfig::new(name, address, &etcd.store()).with("--mtu", UNDERLAY)
}

fn subnet(node: &Node) -> String {
    node.status("subnet").replace('/', "-")
}

/// A node's own record is what flannel's would be, and one field more: the key, the value, and a day to
/// live.
fn is_flannels(etcd: &Etcd, node: &Node, public_ip: Ipv4Addr) -> Record {
    let key = format!("{PREFIX}/subnets/{}", subnet(node));
    let record = etcd.get(&key).unwrap();
    assert_eq!(
        record.value,
        flannel::muslin_record(public_ip, &node.status("vtep_mac"))
    );
    let (granted, left) = etcd.time_to_live(record.lease);
    assert_eq!(granted, TTL, "{record:?}");
    assert!((TTL - 60..=TTL).contains(&left), "{left} s: {record:?}");
    record
}

fn gateway(node: &Node) -> Ipv4Addr {
    node.address(1)
}

#[test]
fn a_flannel_node_and_a_muslin_node_are_one_network() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    etcd.configure(PREFIX, CONFIG);
    let mut kernel = KernelNode::join(&lab, &etcd);
    let node = config("n", NODE_IP, &etcd).start(&lab.host("n", NODE_IP));
    node.wait_peers(1);
    kernel.follow("the node joins", |peers| peers.len() == 1);
    assert_eq!(node.mtu(), MTU);

    let own = is_flannels(&etcd, &node, NODE_IP);
    let theirs = etcd.get(&own_key()).unwrap();
    assert_eq!(etcd.leases(PREFIX), [theirs, own.clone()]);
    let stored = etcd.get(&format!("{PREFIX}/config")).unwrap();
    assert_eq!((stored.value.as_str(), stored.version), (CONFIG, 1));

    let mut host = kernel.flannel.host.agent();
    let mut theirs = kernel.flannel.pod.agent();
    let mut ours = node.pod("pod");
    let address = ours.address("eth0").unwrap();
    for to in [flannel::kernel(2), flannel::kernel(1), flannel::kernel(0)] {
        traffic::ping(&mut ours, to);
    }
    for to in [address, gateway(&node), node.address(0)] {
        traffic::ping(&mut theirs, to);
        traffic::ping(&mut host, to);
    }
    let port = theirs.listen(0).unwrap();
    traffic::transfer(&mut ours, flannel::kernel(2), port, traffic::BULK);
    let port = ours.listen(0).unwrap();
    traffic::transfer(&mut theirs, address, port, traffic::BULK);
    assert_eq!(node.losses(), Default::default());

    // A connection outlives the other side's device.
    let id = theirs.open(SocketAddrV4::new(address, port)).unwrap();
    assert!(theirs.exchange(id, 100_000, 1).unwrap().intact);
    let before = kernel.mac.clone();
    kernel.restart();
    assert_ne!(kernel.mac, before);
    poll_until(SOON, "the new MAC address", || {
        let peers = node.query("peers");
        let peers = peers.as_array().unwrap();
        assert_eq!(peers.len(), 1, "{peers:?}");
        (peers[0]["vtep_mac"] == kernel.mac.as_str()).then_some(())
    });
    assert!(theirs.exchange(id, 1_000_000, 2).unwrap().intact);
    traffic::ping(&mut ours, flannel::kernel(2));

    // It has not changed its own record since, and takes the end of the other's to heart.
    assert_eq!(etcd.get(&own.key).map(|it| it.value), Some(own.value));
    etcd.revoke(kernel.lease);
    node.wait_peers(0);
    traffic::unreachable(&mut ours, flannel::kernel(2));
}

#[test]
fn a_third_node_comes_and_goes_while_traffic_runs() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    etcd.configure(PREFIX, CONFIG);
    // This time the flannel node comes second; it does not choose its subnet, which is kept for it.
    let kept = etcd.create(&own_key(), &flannel::record(KERNEL_IP, "02:00:00:00:00:01"));
    let node = config("n", NODE_IP, &etcd).start(&lab.host("n", NODE_IP));
    etcd.revoke(kept);
    node.wait_peers(0);
    let mut kernel = KernelNode::join(&lab, &etcd);
    node.wait_peers(1);
    assert_eq!(kernel.peers.len(), 1);
    let (first, key, tables) = (kernel.peers.clone(), subnet(&node), kernel.tables());
    assert!(first.contains_key(&key), "{first:?}");

    let mut theirs = kernel.flannel.pod.agent();
    let mut ours = node.pod("pod");
    let [mut near, mut far] = [node.pod("near"), kernel.flannel.pod.agent()];
    let address = ours.address("eth0").unwrap();
    let to = SocketAddrV4::new(address, ours.listen(0).unwrap());
    let back = SocketAddrV4::new(flannel::kernel(2), theirs.listen(0).unwrap());
    let (out, back) = (far.open(to).unwrap(), near.open(back).unwrap());

    let is_over = AtomicBool::new(false);
    let exchanged = std::thread::scope(|scope| {
        let run = |mut agent: Agent, id: u64| {
            let is_over = &is_over;
            scope.spawn(move || {
                let mut rounds = 0;
                let mut longest = Duration::ZERO;
                while !is_over.load(Ordering::SeqCst) {
                    let begin = Instant::now();
                    let sent = agent.exchange(id, 100_000, rounds).unwrap();
                    assert!(sent.intact, "round {rounds}");
                    longest = longest.max(begin.elapsed());
                    rounds += 1;
                }
                (rounds, longest)
            })
        };
        let running = [run(far, out), run(near, back)];
        let end = End(&is_over);

        for visit in 0..2 {
            let host = lab.host(&format!("third{visit}"), THIRD_IP);
            let mut third = config("third", THIRD_IP, &etcd).start(&host);
            third.wait_peers(2);
            node.wait_peers(2);
            kernel.follow("the third joins", |peers| peers.len() == 2);
            let record = is_flannels(&etcd, &third, THIRD_IP);
            let mut pod = third.pod("pod");
            let its = pod.address("eth0").unwrap();
            for to in [address, flannel::kernel(2), gateway(&node)] {
                traffic::ping(&mut pod, to);
            }
            for agent in [&mut ours, &mut theirs] {
                traffic::ping(agent, its);
                traffic::ping(agent, gateway(&third));
            }
            let port = pod.listen(0).unwrap();
            for agent in [&mut ours, &mut theirs] {
                traffic::transfer(agent, its, port, 1_000_000);
            }

            let output = third.client(&["leave"]).output().unwrap();
            assert!(output.status.success(), "{output:?}{}", third.log());
            assert_eq!(third.wait_exit(SOON), Some(0), "{}", third.log());
            assert_eq!(etcd.get(&record.key), None, "visit {visit}");
            node.wait_peers(1);
            kernel.follow("the third leaves", |peers| *peers == first);
            traffic::unreachable(&mut ours, its);
            // The address is free for the next.
            host.sh("ip addr flush dev eth0");
        }
        drop(end);
        running.map(|thread| thread.join().unwrap())
    });
    for (rounds, longest) in exchanged {
        eprintln!("{rounds} exchanges, the longest took {longest:?}");
        assert!(rounds > 10, "{rounds}");
        assert!(longest < stretched(Duration::from_secs(5)), "{longest:?}");
    }
    let peers = node.query("peers");
    assert_eq!(peers[0]["public_ip"], KERNEL_IP.to_string());
    assert_eq!(kernel.tables(), tables);
}

/// Ends the traffic also where a check has failed.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
