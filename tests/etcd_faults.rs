//! What can befall an etcd, and that pods do not notice: connections live on, peers stay, and who
//! joins afterwards is reached.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use muslin::agent::{Agent, Ping};
use muslin_lab::etcd::{Etcd, PREFIX, Record};
use muslin_lab::{Lab, Node, NodeConfig, SOON, poll_until, traffic};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The configuration that nodes write where there is none.
const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// Time for what waits for the timeouts of requests and of idle connections.
const OUTAGE: Duration = Duration::from_secs(60);

fn config(number: u8, etcd: &Etcd) -> (NodeConfig, Ipv4Addr) {
    let address = Ipv4Addr::new(10, 9, 0, number);
    let name = format!("n{number}");
    (NodeConfig::new(&name, address, &etcd.store()), address)
}

/// Two nodes with a pod each, and a connection in each direction.
struct Bed {
    nodes: [Node; 2],
    pods: [Agent; 2],
    connections: [u64; 2],
    /// What the nodes said of their peers.
    peers: [Vec<String>; 2],
    records: Vec<Record>,
    rounds: u64,
    etcd: Etcd,
    lab: Lab,
}

impl Bed {
    fn new() -> Option<Self> {
        let lab = Lab::new()?;
        let etcd = Etcd::start(&lab)?;
        etcd.configure(PREFIX, CONFIG);
        let nodes = [1, 2].map(|number| {
            let (config, address) = config(number, &etcd);
            config.start(&lab.host(&format!("h{number}"), address))
        });
        for node in &nodes {
            node.wait_peers(1);
        }
        let mut pods = nodes.each_ref().map(|node| node.pod("pod"));
        let ends = pods.each_mut().map(|pod| {
            let port = pod.listen(0).unwrap();
            SocketAddrV4::new(pod.address("eth0").unwrap(), port)
        });
        let connections = [
            pods[0].open(ends[1]).unwrap(),
            pods[1].open(ends[0]).unwrap(),
        ];
        let mut bed = Self {
            connections,
            peers: nodes.each_ref().map(peers),
            records: etcd.leases(PREFIX),
            rounds: 0,
            nodes,
            pods,
            etcd,
            lab,
        };
        assert_eq!(bed.records.len(), 2, "{:?}", bed.records);
        bed.carries();
        Some(bed)
    }

    /// The connections carry what they are given.
    fn carries(&mut self) {
        for (pod, id) in self.pods.iter_mut().zip(self.connections) {
            self.rounds += 1;
            let sent = pod.exchange(id, 100_000, self.rounds).unwrap();
            assert!(sent.intact, "round {}", self.rounds);
        }
    }

    /// Nothing has changed: connections, and each node's peer.
    fn is_unmoved(&mut self) {
        self.carries();
        assert_eq!(self.nodes.each_ref().map(peers), self.peers);
    }

    /// Waits until both nodes have said something so many times; data flows meanwhile.
    fn wait_said(&mut self, words: &str, times: usize) {
        let deadline = Instant::now() + OUTAGE;
        let is_said = |node: &Node| node.log().matches(words).count() >= times;
        while !self.nodes.iter().all(is_said) {
            assert!(Instant::now() < deadline, "'{words}' is not said");
            self.carries();
        }
    }

    /// A node that joins now is reached from everywhere, and everybody from it.
    fn welcomes(&mut self, number: u8) {
        let (config, address) = config(number, &self.etcd);
        let node = config.spawn(&self.lab.host(&format!("h{number}"), address));
        self.takes_in(node);
    }

    fn takes_in(&mut self, mut node: Node) {
        node.wait_ready(OUTAGE);
        node.wait_peers(2);
        let mut pod = node.pod("pod");
        let address = pod.address("eth0").unwrap();
        for other in &mut self.pods {
            let its = other.address("eth0").unwrap();
            poll_until(SOON, "the newcomer is reached", || reaches(other, address));
            poll_until(SOON, "the newcomer reaches us", || reaches(&mut pod, its));
            traffic::ping(other, address);
            traffic::ping(&mut pod, its);
        }
        self.carries();
        for node in &self.nodes {
            node.wait_peers(2);
        }
    }

    /// Both records are as they were, but for the lease they end with.
    fn wait_records(&mut self) {
        let wanted = contents(&self.records);
        poll_until(SOON, "the records are back", || {
            let records = self.etcd.leases(PREFIX);
            assert!(records.len() <= 2, "{records:?}");
            (contents(&records) == wanted).then_some(())
        });
    }
}

fn content(record: &Record) -> (String, String) {
    assert_ne!(record.lease, 0, "{record:?}");
    (record.key.clone(), record.value.clone())
}

/// Without their leases, since a node writes its record again as it is for watchers that missed it.
fn contents(records: &[Record]) -> Vec<(String, String)> {
    records.iter().map(content).collect()
}

fn peers(node: &Node) -> Vec<String> {
    let peers = node.query("peers");
    let rows = peers.as_array().unwrap().iter();
    rows.map(|row| {
        let text = |key: &str| row[key].as_str().unwrap().to_owned();
        ["subnet", "public_ip", "vtep_mac", "state"]
            .map(text)
            .join(" ")
    })
    .collect()
}

fn reaches(from: &mut Agent, to: Ipv4Addr) -> Option<()> {
    let ping = Ping {
        count: 1,
        timeout_ms: 200,
        ..Ping::new(to)
    };
    from.ping(&ping).unwrap().is_perfect(1).then_some(())
}

#[test]
fn killed_and_started_again_with_its_data() {
    let Some(mut bed) = Bed::new() else { return };
    for round in 1..=2 {
        bed.etcd.kill();
        bed.wait_said("is unreachable", round);
        bed.is_unmoved();
        bed.etcd.start_again();
        bed.wait_said("is back", round);
        bed.is_unmoved();
    }
    assert_eq!(contents(&bed.etcd.leases(PREFIX)), contents(&bed.records));
    bed.welcomes(3);
}

#[test]
fn frozen_for_longer_than_anybody_waits() {
    let Some(mut bed) = Bed::new() else { return };
    bed.etcd.freeze();
    // One that starts now waits, and ends neither.
    let (config, address) = config(3, &bed.etcd);
    let mut third = config.spawn(&bed.lab.host("h3", address));
    bed.wait_said("is unreachable", 1);
    poll_until(OUTAGE, "the newcomer is told", || {
        third.log().contains("is unreachable").then_some(())
    });
    assert!(third.is_running(), "{}", third.log());
    bed.is_unmoved();
    bed.etcd.thaw();
    bed.wait_said("is back", 1);
    bed.takes_in(third);
    let records = bed.etcd.leases(PREFIX);
    let before = contents(&bed.records);
    let same = contents(&records)
        .into_iter()
        .filter(|it| before.contains(it));
    assert_eq!((records.len(), same.count()), (3, 2), "{records:?}");
}

#[test]
fn compacted_while_a_node_is_behind() {
    /// Unlike all values before.
    const LAST: usize = 200;
    let Some(mut bed) = Bed::new() else { return };
    let pid = bed.nodes[0].query("status")["pid"].as_i64().unwrap();
    let pid = Pid::from_raw(pid.try_into().unwrap());
    let key = |number: u8| format!("{PREFIX}/subnets/10.244.{number}.0-24");
    let taken: Vec<_> = bed.records.iter().map(|it| it.key.clone()).collect();
    let mut free = (1..=255).map(key).filter(|key| !taken.contains(key));
    let [mut gone, mut kept] = [(); 2].map(|()| free.next().unwrap());
    if gone < kept {
        std::mem::swap(&mut gone, &mut kept);
    }
    // As long as a value may be, so that connections fill up.
    let value = |octet: usize| {
        let padding = "x".repeat(15_000);
        format!(
            r#"{{"PublicIP":"10.9.1.{octet}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{octet:02x}"}},"Padding":"{padding}"}}"#
        )
    };
    for key in [&gone, &kept] {
        bed.etcd.publish(key, &value(1));
    }
    for node in &bed.nodes {
        node.wait_peers(3);
    }

    kill(pid, Signal::SIGSTOP).unwrap();
    bed.etcd
        .put_often(&kept, 4000, |number| value(number % 200));
    bed.etcd.put(&kept, &value(LAST));
    bed.etcd.delete(&gone);
    bed.etcd.compact();
    kill(pid, Signal::SIGCONT).unwrap();

    // What happened meanwhile is found out by value: the last writing of one, the other's end.
    let mac = format!("02:00:00:00:00:{LAST:02x}");
    for node in &bed.nodes {
        poll_until(SOON, "the peers are as they are now", || {
            let peers = peers(node);
            (peers.len() == 2 && peers.iter().any(|peer| peer.contains(&mac))).then_some(())
        });
    }
    assert!(
        bed.nodes[0].log().contains("the watch has a gap"),
        "the history was not lost on it{}",
        bed.nodes[0].log()
    );
    bed.carries();
    // And it follows again.
    bed.etcd.delete(&kept);
    for node in &bed.nodes {
        node.wait_peers(1);
    }
    bed.is_unmoved();
    assert_eq!(contents(&bed.etcd.leases(PREFIX)), contents(&bed.records));
    bed.welcomes(3);
}

#[test]
fn wiped() {
    let Some(mut bed) = Bed::new() else { return };
    bed.etcd.wipe();
    bed.carries();
    bed.wait_records();
    for node in &bed.nodes {
        node.wait_peers(1);
    }
    bed.is_unmoved();
    bed.welcomes(3);
}

/// Nodes ask again at different times then, and the first finds nobody's record.
#[test]
fn wiped_after_a_long_outage() {
    let Some(mut bed) = Bed::new() else { return };
    bed.lab.limit(OUTAGE + SOON + SOON);
    bed.etcd.kill();
    // Until there are seconds between two attempts.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(14) {
        bed.is_unmoved();
    }
    bed.etcd.wipe();
    let is_back = |node: &Node| node.log().contains("is back");
    let begin = Instant::now();
    while !bed.nodes.iter().all(is_back) {
        assert!(begin.elapsed() < OUTAGE, "the store is not back");
        bed.is_unmoved();
    }
    bed.wait_records();
    bed.is_unmoved();
}

#[test]
fn a_record_deleted_by_hand() {
    let Some(mut bed) = Bed::new() else { return };
    for index in [0, 1, 0] {
        let key = bed.records[index].key.clone();
        bed.etcd.delete(&key);
        bed.wait_records();
        bed.carries();
    }
    for node in &bed.nodes {
        node.wait_peers(1);
    }
    bed.is_unmoved();
    bed.welcomes(3);
}
