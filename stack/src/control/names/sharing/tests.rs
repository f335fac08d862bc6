//! Nodes that share names by a store that is away, loses answers and history, and forgets: what a node
//! has set is what others know, after every outage.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use proptest::prelude::*;

use super::super::{Found, Names};
use super::*;

const PREFIX: &str = "/p";
const TICK: Duration = Duration::from_millis(50);
/// After so long without trouble everybody knows everything.
const SOON: Duration = Duration::from_secs(15);

fn subnet(node: usize) -> Ipv4Net {
    Ipv4Net::new([10, 1, node as u8, 0].into(), 24).unwrap()
}

fn settings(node: usize) -> SharerSettings {
    SharerSettings {
        prefix: PREFIX.to_owned(),
        network: "10.1.0.0/16".parse().unwrap(),
        node: format!("n{node}").parse().unwrap(),
        subnet: subnet(node).into(),
    }
}

/// Pods of a node whose names nobody else's have.
fn pods(node: usize, count: u8, version: u8) -> Vec<PodRecord> {
    let pods = (0..count).map(|i| PodRecord {
        name: format!("pod-{node}-{version}-{i}").parse().unwrap(),
        address: Ipv4Addr::new(10, 1, node as u8, 2 + i).into(),
    });
    pods.collect()
}

/// A store as etcd is one.
#[derive(Default)]
struct Store {
    revision: Revision,
    compacted: Revision,
    entries: BTreeMap<String, (Revision, String)>,
    history: Vec<WatchEvent>,
}

impl Store {
    fn execute(&mut self, op: Op) -> Answer {
        let is = |store: &Self, key: &str, expected| {
            store.entries.get(key).map(|(revision, _)| *revision) == expected
        };
        match op {
            Op::List(prefix) => {
                let entries = self.entries.iter();
                let entries = entries.filter(|(key, _)| key.starts_with(&prefix));
                let entries = entries.map(|(key, (revision, value))| Entry {
                    key: key.clone(),
                    value: value.clone(),
                    revision: *revision,
                    created: 0,
                    ttl: None,
                });
                Answer::Snapshot {
                    revision: self.revision,
                    entries: entries.collect(),
                }
            }
            Op::Create { key, value, .. } if is(self, &key, None) => self.put(key, value),
            Op::CompareAndPut {
                key,
                value,
                expected,
                ..
            } if is(self, &key, Some(expected)) => self.put(key, value),
            Op::CompareAndDelete { key, expected } if is(self, &key, Some(expected)) => {
                self.delete(&key)
            }
            _ => Answer::Conflict,
        }
    }

    fn put(&mut self, key: String, value: String) -> Answer {
        self.revision += 1;
        let revision = self.revision;
        self.entries.insert(key.clone(), (revision, value.clone()));
        self.history.push(WatchEvent::Put(Entry {
            key,
            value,
            revision,
            created: 0,
            ttl: None,
        }));
        Answer::Done(revision)
    }

    fn delete(&mut self, key: &str) -> Answer {
        self.revision += 1;
        self.entries.remove(key);
        self.history.push(WatchEvent::Delete {
            key: key.to_owned(),
            revision: self.revision,
        });
        Answer::Done(self.revision)
    }

    fn since(&self, from: Revision) -> Option<Vec<WatchEvent>> {
        let revision = |event: &WatchEvent| match event {
            WatchEvent::Put(entry) => entry.revision,
            WatchEvent::Delete { revision, .. } => *revision,
        };
        let events = self.history.iter().filter(|it| revision(it) >= from);
        (from > self.compacted).then(|| events.cloned().collect())
    }
}

struct Node {
    sharer: Sharer,
    names: Names,
    pods: Vec<PodRecord>,
    has_left: bool,
    watch: Option<Revision>,
    is_cut: bool,
    /// Whether answers of the store get lost, though it does what it is asked.
    loses_answers: bool,
    requests: u32,
}

struct Cluster {
    now: Instant,
    store: Store,
    nodes: Vec<Node>,
}

#[derive(Debug, Clone)]
enum Happening {
    SetPods {
        node: usize,
        count: u8,
        version: u8,
    },
    Cut(usize),
    LoseAnswers(usize),
    Mend(usize),
    Compact,
    EndWatches,
    /// Somebody deletes a node's record, or its time has run out.
    Delete(usize),
    /// Somebody writes something else there.
    Rewrite(usize),
    Pass(u16),
}

impl Cluster {
    fn new(nodes: usize) -> Self {
        let now = Instant::from_secs(100);
        let mut cluster = Self {
            now,
            store: Store {
                revision: 1,
                ..Store::default()
            },
            nodes: Vec::new(),
        };
        for node in 0..nodes {
            let mut names = Names::default();
            (0..nodes).for_each(|other| names.lease(subnet(other)));
            cluster.nodes.push(Node {
                sharer: Sharer::new(settings(node), now),
                names,
                pods: Vec::new(),
                has_left: false,
                watch: None,
                is_cut: false,
                loses_answers: false,
                requests: 0,
            });
        }
        cluster
    }

    fn happen(&mut self, happening: &Happening) {
        let now = self.now;
        match *happening {
            Happening::SetPods {
                node,
                count,
                version,
            } => {
                let pods = pods(node, count, version);
                assert_eq!(self.nodes[node].sharer.set_pods(now, pods.clone()), 0);
                self.nodes[node].pods = pods;
            }
            Happening::Cut(node) => self.nodes[node].is_cut = true,
            Happening::LoseAnswers(node) => self.nodes[node].loses_answers = true,
            Happening::Mend(node) => {
                self.nodes[node].is_cut = false;
                self.nodes[node].loses_answers = false;
            }
            Happening::Compact => {
                self.store.compacted = self.store.revision;
                self.store.history.clear();
            }
            Happening::EndWatches => {
                for node in &mut self.nodes {
                    if node.watch.take().is_some() {
                        node.sharer.watch_ended(now, Trouble::Away);
                    }
                }
            }
            Happening::Delete(node) => {
                let key = names_key(PREFIX, subnet(node));
                if self.store.entries.contains_key(&key) {
                    self.store.delete(&key);
                }
            }
            Happening::Rewrite(node) => {
                let key = names_key(PREFIX, subnet(node));
                self.store.put(key, "rubbish".to_owned());
            }
            Happening::Pass(millis) => self.pass(Duration::from_millis(millis.into())),
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            for node in 0..self.nodes.len() {
                self.tell(node);
                self.drive(node);
            }
            self.now += TICK;
        }
    }

    /// Tells a node's watch what is new.
    fn tell(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        let Some(next) = node.watch else { return };
        match self.store.since(next).filter(|_| !node.is_cut) {
            Some(events) => {
                node.watch = Some(self.store.revision + 1);
                events.into_iter().for_each(|it| node.sharer.event(it));
            }
            None => {
                node.watch = None;
                node.sharer.watch_ended(self.now, Trouble::Away);
            }
        }
    }

    /// Does what a node asks for, until it has to wait.
    fn drive(&mut self, number: usize) {
        let now = self.now;
        for _ in 0..10 {
            let node = &mut self.nodes[number];
            let action = node.sharer.poll(now);
            for change in node.sharer.changes() {
                match change {
                    NameChange::Set(record) => node.names.set(record),
                    NameChange::Removed(subnet) => node.names.remove(subnet.nets()),
                    NameChange::Skipped(..) => {}
                }
            }
            match action {
                Action::Store(op) => {
                    node.requests += 1;
                    if matches!(op, Op::List(_)) {
                        node.watch = None;
                    }
                    if node.is_cut {
                        node.sharer.failed(now, Trouble::Away);
                        continue;
                    }
                    let answer = self.store.execute(op);
                    if node.loses_answers {
                        node.sharer.failed(now, Trouble::Away);
                    } else {
                        node.sharer.answer(now, answer);
                    }
                }
                Action::Watch { from, .. } if node.watch.is_none() => {
                    if node.is_cut || self.store.since(from).is_none() {
                        node.sharer.watch_ended(now, Trouble::Away);
                    } else {
                        node.watch = Some(from);
                    }
                }
                Action::Watch { until, .. } | Action::Wait { until } => {
                    assert!(until > now, "node {number} spins");
                    return;
                }
                Action::Stop => return,
            }
        }
        panic!("node {number} spins");
    }

    /// Everybody knows of all others' pods, and of no more.
    fn check(&self) {
        for (number, node) in self.nodes.iter().enumerate() {
            for (other, theirs) in self.nodes.iter().enumerate() {
                let key = names_key(PREFIX, subnet(other));
                let is_stored = self.store.entries.contains_key(&key);
                assert_eq!(is_stored, !theirs.has_left, "record of {other}");
                if other == number {
                    continue;
                }
                for version in 0..4 {
                    for pod in pods(other, 3, version) {
                        let expected = match theirs.pods.contains(&pod) {
                            true => Found::Addresses(pod.address.iter().collect()),
                            false => Found::Nothing,
                        };
                        let found = node.names.find(pod.name.as_str());
                        assert_eq!(found, expected, "node {number} of {}", pod.name);
                    }
                }
            }
        }
    }
}

fn happening() -> impl Strategy<Value = Happening> {
    let node = || 0..3usize;
    prop_oneof![
        4 => (node(), 0..3u8, 0..4u8)
            .prop_map(|(node, count, version)| Happening::SetPods { node, count, version }),
        2 => node().prop_map(Happening::Cut),
        1 => node().prop_map(Happening::LoseAnswers),
        2 => node().prop_map(Happening::Mend),
        1 => Just(Happening::Compact),
        1 => Just(Happening::EndWatches),
        1 => node().prop_map(Happening::Delete),
        1 => node().prop_map(Happening::Rewrite),
        4 => prop::sample::select(vec![50u16, 150, 250, 1000, 1200, 6000, 20_000])
            .prop_map(Happening::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_a_node_has_set_is_what_others_know_after_every_outage(
        happenings in prop::collection::vec(happening(), 1..40),
    ) {
        let mut cluster = Cluster::new(3);
        for happening in &happenings {
            cluster.happen(happening);
        }
        (0..3).for_each(|node| cluster.happen(&Happening::Mend(node)));
        cluster.pass(SOON);
        cluster.check();
        // A store is not asked for more than there is to say.
        let before: Vec<_> = cluster.nodes.iter().map(|node| node.requests).collect();
        cluster.pass(Duration::from_secs(60));
        cluster.check();
        let after: Vec<_> = cluster.nodes.iter().map(|node| node.requests).collect();
        prop_assert_eq!(before, after);
        // Whoever leaves takes its names along, also for those who do not hear of it.
        cluster.happen(&Happening::Cut(2));
        let now = cluster.now;
        cluster.nodes[0].sharer.leave(now);
        cluster.nodes[0].pods.clear();
        cluster.nodes[0].has_left = true;
        cluster.pass(SOON);
        prop_assert_eq!(cluster.nodes[0].sharer.poll(cluster.now), Action::Stop);
        cluster.happen(&Happening::Compact);
        cluster.happen(&Happening::Mend(2));
        cluster.pass(SOON);
        cluster.check();
        // Whoever stops says so, and its pods keep their names.
        let is_stopped = |cluster: &Cluster| {
            let names = &cluster.nodes[2].names;
            names.record(subnet(1)).map(|record| record.stopped)
        };
        prop_assert_eq!(is_stopped(&cluster), Some(false));
        let now = cluster.now;
        cluster.nodes[1].sharer.stop(now);
        cluster.pass(SOON);
        prop_assert_eq!(cluster.nodes[1].sharer.poll(cluster.now), Action::Stop);
        prop_assert_eq!(is_stopped(&cluster), Some(true));
        cluster.check();
    }
}

#[test]
fn a_record_is_renewed_in_time_and_changes_are_written_together() {
    let mut cluster = Cluster::new(2);
    for version in 0..4 {
        let happening = Happening::SetPods {
            node: 0,
            count: 2,
            version,
        };
        cluster.happen(&happening);
        cluster.pass(TICK);
    }
    cluster.pass(SOON);
    cluster.check();
    // A list and one write.
    assert_eq!(cluster.nodes[0].requests, 2);
    let revision = cluster.store.revision;
    cluster.now += RENEWAL;
    cluster.pass(SOON);
    // By both nodes.
    assert_eq!(cluster.store.revision, revision + 2);
    cluster.check();
}

#[test]
fn a_store_that_forbids_it_is_left_alone_and_left_at_once() {
    let now = Instant::from_secs(100);
    let mut sharer = Sharer::new(settings(1), now);
    sharer.set_pods(now, pods(1, 1, 0));
    assert_eq!(sharer.poll(now), Action::Store(Op::List(sharer.prefix())));
    sharer.failed(now, Trouble::Forbidden);
    let until = now + FORBIDDEN;
    assert_eq!(sharer.poll(now), Action::Wait { until });
    sharer.leave(now);
    assert_eq!(sharer.poll(now), Action::Store(Op::List(sharer.prefix())));
    sharer.failed(now, Trouble::Forbidden);
    assert_eq!(sharer.poll(now), Action::Stop);
}
