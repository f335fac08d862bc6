//! What every store must do, and what nodes do with it: the same tests for all that can be
//! written.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_stack::control::lease::{
    Answer, Backend, Change, Entry, Identity, LEASE_TTL, LeaseRecord, Loss, Manager,
    ManagerSettings, NetworkConfig, Op, OwnChange, Revision, SubnetKey, WantedConfig, WatchEvent,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{Store, StoreError};
use crate::error::Result;
use crate::journal::Journal;
use crate::lease::{Controls, News, Reply, run};

/// How long anything may take before a test fails.
const DEADLINE: Duration = Duration::from_secs(30);
/// The least that etcd grants.
const SHORT: Duration = Duration::from_secs(2);

/// Waits for something, but not for ever.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} does not come"),
    }
}

/// A kind of store under test.
pub(crate) trait Place {
    /// A new connection to the same store.
    fn open(&self) -> Arc<dyn Store>;
    /// Forgets the history up to now.
    fn compact(&self) -> impl Future<Output = ()>;
}

/// Runs all tests; each has keys of its own.
pub(crate) async fn run_all(place: &impl Place) {
    operations(place).await;
    claims(place).await;
    watches(place).await;
    gaps(place).await;
    expiry(place).await;
    dropped_futures(place).await;
    nodes_come_and_go(place).await;
    records_follow_the_node(place).await;
    a_copy_gives_way(place).await;
    renewal_keeps_the_value(place).await;
    peers_expire(place).await;
    a_taken_subnet_is_a_loss(place).await;
    reservations_stay(place).await;
    for round in 0..5 {
        race(place, &format!("/race-{round}"), 3).await;
    }
    race(place, "/race", 10).await;
    dual_race(place).await;
    a_lease_becomes_dual_and_back(place).await;
    connections_that_write_at_once(place).await;
}

async fn create(store: &dyn Store, key: &str, value: &str, ttl: Option<Duration>) -> Answer {
    let (key, value) = (key.to_owned(), value.to_owned());
    store.execute(Op::Create { key, value, ttl }).await.unwrap()
}

async fn put(store: &dyn Store, key: &str, value: &str, expected: Revision) -> Answer {
    let op = Op::CompareAndPut {
        key: key.to_owned(),
        value: value.to_owned(),
        expected,
        ttl: Some(LEASE_TTL),
    };
    store.execute(op).await.unwrap()
}

async fn delete(store: &dyn Store, key: &str, expected: Revision) -> Answer {
    let key = key.to_owned();
    let op = Op::CompareAndDelete { key, expected };
    store.execute(op).await.unwrap()
}

async fn get(store: &dyn Store, key: &str) -> Option<Entry> {
    match store.execute(Op::Get(key.to_owned())).await.unwrap() {
        Answer::Value(entry) => entry,
        other => panic!("{other:?}"),
    }
}

async fn list(store: &dyn Store, prefix: &str) -> (Revision, Vec<Entry>) {
    match store.execute(Op::List(prefix.to_owned())).await.unwrap() {
        Answer::Snapshot { revision, entries } => (revision, entries),
        other => panic!("{other:?}"),
    }
}

fn done(answer: Answer) -> Revision {
    match answer {
        Answer::Done(revision) => revision,
        other => panic!("{other:?}"),
    }
}

async fn operations(place: &impl Place) {
    let (one, two) = (place.open(), place.open());
    let (one, two) = (one.as_ref(), two.as_ref());
    assert_eq!(get(one, "/op/a").await, None);
    let first = done(create(one, "/op/a", "é1", None).await);
    assert_eq!(create(two, "/op/a", "2", None).await, Answer::Conflict);
    let entry = get(two, "/op/a").await.unwrap();
    assert_eq!((entry.value.as_str(), entry.revision), ("é1", first));
    assert_eq!(entry.ttl, None);

    assert_eq!(put(two, "/op/a", "2", first - 1).await, Answer::Conflict);
    assert_eq!(put(two, "/op/no", "2", first).await, Answer::Conflict);
    let second = done(put(two, "/op/a", "2", first).await);
    assert!(second > first);
    assert_eq!(put(one, "/op/a", "3", first).await, Answer::Conflict);
    let entry = get(one, "/op/a").await.unwrap();
    assert_eq!((entry.value.as_str(), entry.revision), ("2", second));
    let ttl = entry.ttl.unwrap();
    assert!(ttl <= LEASE_TTL && ttl > LEASE_TTL - DEADLINE, "{ttl:?}");

    done(create(one, "/op/b", "b", None).await);
    done(create(one, "/op/B&%_", "B", None).await);
    done(create(one, "/oq", "no", None).await);
    let (revision, entries) = list(two, "/op/").await;
    let keys: Vec<_> = entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["/op/B&%_", "/op/a", "/op/b"]);
    assert!(revision > second);

    assert_eq!(delete(one, "/op/a", first).await, Answer::Conflict);
    assert_eq!(delete(one, "/op/no", 0).await, Answer::Conflict);
    let third = done(delete(one, "/op/a", second).await);
    assert!(third > revision);
    assert_eq!(delete(one, "/op/a", second).await, Answer::Conflict);
    assert_eq!(get(two, "/op/a").await, None);
}

/// The next `count` events of the keys below `prefix`.
async fn watched(store: &dyn Store, prefix: &str, from: Revision, count: usize) -> Vec<WatchEvent> {
    let mut watch = store.watch(prefix, from).await.unwrap();
    let mut events = Vec::new();
    while events.len() < count {
        events.extend(soon("an event", watch.next()).await.unwrap());
    }
    events
}

/// What a list has not shown is not there, or nothing is written.
async fn claims(place: &impl Place) {
    let store = place.open();
    let store = store.as_ref();
    let prefix = "/claims/subnets/";
    let claim = async |key: &str, seen, replaces: Option<(&str, Revision)>| {
        let op = Op::Claim {
            key: format!("{prefix}{key}"),
            value: "new".to_owned(),
            ttl: Some(LEASE_TTL),
            prefix: prefix.to_owned(),
            seen,
            replaces: replaces.map(|(old, revision)| (format!("{prefix}{old}"), revision)),
        };
        store.execute(op).await.unwrap()
    };
    let keys = async || {
        let (revision, entries) = list(store, prefix).await;
        let keys = entries.iter().map(|entry| entry.key.replace(prefix, ""));
        (revision, keys.collect::<Vec<_>>())
    };
    let (seen, _) = keys().await;
    let first = done(claim("a", seen, None).await);
    assert_eq!(claim("b", seen, None).await, Answer::Conflict, "behind");
    assert_eq!(claim("a", first, None).await, Answer::Conflict, "it exists");
    done(create(store, "/claims/elsewhere", "", None).await);
    let second = done(claim("b", first, None).await);

    // In the place of another: this goes first, and only if it is as it was.
    let replaced = claim("c", second, Some(("a", first + 77))).await;
    assert_eq!(replaced, Answer::Conflict);
    assert_eq!(
        claim("c", first, Some(("a", first))).await,
        Answer::Conflict
    );
    assert_eq!(keys().await.1, ["a", "b"]);
    let mut watch = store.watch(prefix, second + 1).await.unwrap();
    done(claim("c", second, Some(("a", first))).await);
    assert_eq!(keys().await.1, ["b", "c"]);
    let mut told = Vec::new();
    while told.len() < 2 {
        let events = soon("the events", watch.next()).await.unwrap();
        told.extend(events.iter().map(|event| match event {
            WatchEvent::Put(entry) => format!("put {}", entry.key.replace(prefix, "")),
            WatchEvent::Delete { key, .. } => format!("delete {}", key.replace(prefix, "")),
        }));
    }
    assert_eq!(told, ["delete a", "put c"]);
    let (seen, _) = keys().await;
    let gone = claim("d", seen, Some(("a", first))).await;
    assert_eq!(gone, Answer::Conflict, "there is nothing to replace");
}

async fn watches(place: &impl Place) {
    let store = place.open();
    let store = store.as_ref();
    let other = place.open();
    let (before, _) = list(store, "/watch/").await;
    let first = done(create(store, "/watch/a", "1", None).await);
    done(create(store, "/wat", "no", None).await);
    let second = done(put(store, "/watch/a", "2", first).await);
    let third = done(delete(store, "/watch/a", second).await);

    let shown = |events: Vec<WatchEvent>| -> Vec<String> {
        let show = |event| match event {
            WatchEvent::Put(entry) => {
                format!(
                    "{} {}={} {}",
                    entry.revision,
                    entry.key,
                    entry.value,
                    entry.ttl.is_some()
                )
            }
            WatchEvent::Delete { key, revision } => format!("{revision} {key} deleted"),
        };
        events.into_iter().map(show).collect()
    };
    let all = [
        format!("{first} /watch/a=1 false"),
        format!("{second} /watch/a=2 true"),
        format!("{third} /watch/a deleted"),
    ];
    let other = other.as_ref();
    assert_eq!(shown(watched(other, "/watch/", before + 1, 3).await), all);
    assert_eq!(shown(watched(other, "/watch/", second, 2).await), all[1..]);

    // Events of a watch that is open already; a call that is dropped loses none.
    let mut watch = other.watch("/watch/", third + 1).await.unwrap();
    assert!(
        timeout(Duration::from_millis(250), watch.next())
            .await
            .is_err()
    );
    let fourth = done(create(store, "/watch/b", "b", None).await);
    let events = soon("an event", watch.next()).await.unwrap();
    assert_eq!(shown(events), [format!("{fourth} /watch/b=b false")]);
}

async fn has_gap(store: &dyn Store, from: Revision) {
    let error = match store.watch("/gap/", from).await {
        Ok(mut watch) => soon("the gap", watch.next()).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error, StoreError::Gap);
}

async fn gaps(place: &impl Place) {
    let store = place.open();
    let store = store.as_ref();
    let first = done(create(store, "/gap/a", "1", None).await);
    done(put(store, "/gap/a", "2", first).await);
    place.compact().await;
    has_gap(store, first).await;
    // What is to come cannot be known, unless from another history.
    let (revision, _) = list(store, "/gap/").await;
    has_gap(store, revision + 1000).await;
    let (revision, entries) = list(store, "/gap/").await;
    assert_eq!(entries.len(), 1);
    let mut watch = store.watch("/gap/", revision + 1).await.unwrap();
    assert!(
        timeout(Duration::from_millis(250), watch.next())
            .await
            .is_err()
    );
}

async fn expiry(place: &impl Place) {
    let (store, other) = (place.open(), place.open());
    let (store, other) = (store.as_ref(), other.as_ref());
    let first = done(create(store, "/expiry/a", "1", Some(SHORT)).await);
    done(create(store, "/expiry/b", "1", None).await);
    let events = watched(other, "/expiry/", first + 2, 1).await;
    let [WatchEvent::Delete { key, revision }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(key, "/expiry/a");
    assert!(*revision > first + 1);
    assert_eq!(get(store, "/expiry/a").await, None);
    assert!(done(create(store, "/expiry/a", "2", None).await) > *revision);
}

async fn dropped_futures(place: &impl Place) {
    let store = place.open();
    for index in 0..20 {
        let key = format!("/drop/{index}");
        let value = String::new();
        let op = Op::Create {
            key,
            value,
            ttl: None,
        };
        let _ = timeout(Duration::ZERO, store.execute(op)).await;
    }
    done(create(store.as_ref(), "/drop/after", "", None).await);
}

/// A node's lease task.
pub(crate) struct Node {
    changes: mpsc::UnboundedReceiver<Change>,
    leave: watch::Sender<bool>,
    public_ip: watch::Sender<Option<Ipv4Addr>>,
    trouble: mpsc::UnboundedReceiver<Option<String>>,
    task: JoinHandle<Result<()>>,
    /// The subnets that it has reported.
    peers: BTreeSet<String>,
}

impl Node {
    /// Starts a node whose clock runs `speed` times as fast as ours.
    pub(crate) fn at_speed(store: Arc<dyn Store>, settings: ManagerSettings, speed: u64) -> Self {
        let (sender, changes) = mpsc::unbounded_channel();
        let (leave, asked) = watch::channel(false);
        let (public_ip, moved) = watch::channel(Some(settings.identity.public_ip));
        let moved_ipv6 = watch::channel(settings.identity.public_ipv6).1;
        let controls = Controls {
            turn: crate::lease::Turn::default(),
            leave: asked,
            public_ip: moved,
            public_ipv6: moved_ipv6,
            ends: watch::Sender::default(),
            journal: Journal::default(),
        };
        let start = Instant::now();
        let clock = move || {
            let micros = start.elapsed().as_micros() as u64 * speed;
            smoltcp::time::Instant::from_micros(micros as i64)
        };
        let manager = Manager::new(settings);
        let (fails, trouble) = mpsc::unbounded_channel();
        let task = tokio::spawn(run(manager, store, clock, controls, move |news| {
            // A test that waits for the end hears nothing more.
            let _ = match news {
                News::Lease(change) => sender.send(change).is_ok(),
                News::StoreFails(reason) => fails.send(Some(reason)).is_ok(),
                News::StoreWorks => fails.send(None).is_ok(),
                News::StoreKnown => true,
            };
            Ok(Reply::Taken)
        }));
        Self {
            changes,
            leave,
            public_ip,
            trouble,
            task,
            peers: BTreeSet::new(),
        }
    }

    /// Waits until it says these words of what is wrong with its store.
    pub(crate) async fn trouble(&mut self, words: &str) {
        let told = |reason: Option<String>| reason.is_some_and(|it| it.contains(words));
        while !told(soon(words, self.trouble.recv()).await.unwrap()) {}
    }

    /// Waits until its store works again.
    pub(crate) async fn recovery(&mut self) {
        while soon("the end of an outage", self.trouble.recv())
            .await
            .unwrap()
            .is_some()
        {}
    }

    /// How many peers it has reported that are there still.
    pub(crate) fn peers(&self) -> usize {
        self.peers.len()
    }

    /// Ends the task where it is, and waits until it has.
    pub(crate) async fn cancel(mut self) {
        self.task.abort();
        let ended = soon("the end", &mut self.task).await;
        assert!(ended.is_err_and(|error| error.is_cancelled()));
    }

    pub(crate) fn start(store: Arc<dyn Store>, settings: ManagerSettings) -> Self {
        Self::at_speed(store, settings, 1)
    }

    /// The next change.
    pub(crate) async fn next(&mut self) -> Change {
        let change = soon("a change", self.changes.recv()).await.unwrap();
        match &change {
            Change::Peer(key, _) => self.peers.insert(key.to_string()),
            Change::PeerGone(key) => self.peers.remove(&key.to_string()),
            _ => false,
        };
        change
    }

    /// The subnet that it acquires.
    pub(crate) async fn subnet(&mut self) -> String {
        loop {
            match self.next().await {
                Change::Own(OwnChange::Acquired(key)) => return key.to_string(),
                Change::Own(OwnChange::Lost(loss)) => panic!("{loss}"),
                _ => {}
            }
        }
    }

    /// The next peer that comes (with its address) or goes.
    pub(crate) async fn peer(&mut self) -> String {
        loop {
            match self.next().await {
                Change::Peer(key, record) => return format!("{key} {}", record.public_ip),
                Change::PeerGone(key) => return format!("{key} gone"),
                Change::Own(OwnChange::Lost(loss)) => panic!("{loss}"),
                _ => {}
            }
        }
    }

    /// Waits until it knows a peer.
    pub(crate) async fn sees(&mut self, subnet: &str) {
        while !self.peers.contains(subnet) {
            self.next().await;
        }
    }

    /// Gives it another public address.
    pub(crate) fn move_to(&self, public_ip: Ipv4Addr) {
        self.public_ip.send(Some(public_ip)).unwrap();
    }

    /// Gives the lease back.
    pub(crate) async fn leave(mut self) {
        self.leave.send(true).unwrap();
        while self.next().await != Change::Own(OwnChange::Left) {}
        self.end().await.unwrap();
    }

    /// How the task ends when it is asked to leave.
    pub(crate) async fn leave_result(self) -> Result<()> {
        self.leave.send(true).unwrap();
        self.end().await
    }

    /// How the task ends by itself.
    pub(crate) async fn end(mut self) -> Result<()> {
        soon("the end", &mut self.task).await.unwrap()
    }
}

impl Drop for Node {
    /// As if its process was killed.
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) fn settings(prefix: &str, last: u8) -> ManagerSettings {
    let network = "10.244.0.0/16".parse().unwrap();
    let backend = Backend::Vxlan(Default::default());
    let identity = Identity {
        public_ip: [192, 168, 0, last].into(),
        public_ipv6: None,
        vtep_mac: VtepMac::from_random([last; 6]),
        public_key: None,
    };
    let wanted = WantedConfig::IfNone(NetworkConfig::new(network, None, backend).unwrap());
    ManagerSettings::new(identity, prefix.to_owned(), wanted, u64::from(last) * 7919)
}

async fn nodes_come_and_go(place: &impl Place) {
    let settings = |last| settings("/nodes", last);
    let mut one = Node::start(place.open(), settings(1));
    let first = one.subnet().await;
    let mut two = Node::start(place.open(), settings(2));
    assert_eq!(two.peer().await, format!("{first} 192.168.0.1"));
    let second = two.subnet().await;
    assert_eq!(one.peer().await, format!("{second} 192.168.0.2"));

    // Killed and started again: nobody notices, and the subnet is the same.
    drop(two);
    let mut two = Node::start(place.open(), settings(2));
    assert_eq!(two.subnet().await, second);

    // Another MAC address: the peer has changed.
    drop(two);
    let mut changed = settings(2);
    changed.identity.vtep_mac = VtepMac::from_random([77; 6]);
    let mut two = Node::start(place.open(), changed);
    assert_eq!(two.subnet().await, second);
    assert_eq!(one.peer().await, format!("{second} 192.168.0.2"));

    two.leave().await;
    assert_eq!(one.peer().await, format!("{second} gone"));
    one.leave().await;
    assert_eq!(list(place.open().as_ref(), "/nodes/subnets").await.1, []);
}

async fn records_follow_the_node(place: &impl Place) {
    let mut other = Node::start(place.open(), settings("/moves", 2));
    other.subnet().await;
    let mut node = Node::start(place.open(), settings("/moves", 1));
    let subnet = node.subnet().await;
    assert_eq!(other.peer().await, format!("{subnet} 192.168.0.1"));
    // While it runs,
    node.move_to([192, 168, 0, 11].into());
    assert_eq!(other.peer().await, format!("{subnet} 192.168.0.11"));
    // and while it does not.
    drop(node);
    let mut moved = settings("/moves", 21);
    moved.identity.vtep_mac = settings("/moves", 1).identity.vtep_mac;
    moved.previous = subnet.replace('-', "/").parse().ok();
    let mut node = Node::start(place.open(), moved);
    assert_eq!(node.subnet().await, subnet);
    assert_eq!(other.peer().await, format!("{subnet} 192.168.0.21"));
    node.leave().await;
    assert_eq!(other.peer().await, format!("{subnet} gone"));
}

/// Two nodes with one state directory, both alive: the first keeps the lease.
async fn a_copy_gives_way(place: &impl Place) {
    let mut node = Node::start(place.open(), settings("/copy", 1));
    let subnet = node.subnet().await;
    for _ in 0..3 {
        let mut copied = settings("/copy", 7);
        copied.identity.vtep_mac = settings("/copy", 1).identity.vtep_mac;
        copied.previous = subnet.replace('-', "/").parse().ok();
        let mut copy = Node::start(place.open(), copied);
        let lost = loop {
            match copy.next().await {
                Change::Own(OwnChange::Lost(loss)) => break loss,
                Change::PeerGone(key) => panic!("{key}"),
                _ => {}
            }
        };
        assert!(matches!(lost, Loss::Cloned { .. }), "{lost}");
        copy.end().await.unwrap();
        while node.next().await != Change::Own(OwnChange::Renewed) {}
        let entries = list(place.open().as_ref(), "/copy/subnets").await.1;
        let record = LeaseRecord::parse(&entries[0].value).unwrap();
        assert_eq!(
            (entries.len(), record.public_ip),
            (1, [192, 168, 0, 1].into())
        );
    }
    node.leave().await;
}

async fn renewal_keeps_the_value(place: &impl Place) {
    let store = place.open();
    let mut other = Node::start(place.open(), settings("/renewal", 2));
    other.subnet().await;
    // Half a day passes in a second.
    let mut node = Node::at_speed(place.open(), settings("/renewal", 1), 43_200);
    let subnet = node.subnet().await;
    let key = format!("/renewal/subnets/{subnet}");
    let before = get(store.as_ref(), &key).await.unwrap();
    while node.next().await != Change::Own(OwnChange::Renewed) {}
    let after = get(store.as_ref(), &key).await.unwrap();
    assert_eq!(before.value, after.value);
    assert!(before.revision < after.revision);
    assert_eq!(other.peer().await, format!("{subnet} 192.168.0.1"));
    node.leave().await;
    assert_eq!(
        other.peer().await,
        format!("{subnet} gone"),
        "a renewal is no change for others"
    );
}

async fn peers_expire(place: &impl Place) {
    let store = place.open();
    let mut node = Node::start(place.open(), settings("/expire", 1));
    node.subnet().await;
    let value = LeaseRecord::udp([192, 168, 0, 9].into()).to_json();
    done(
        create(
            store.as_ref(),
            "/expire/subnets/10.244.200.0-24",
            &value,
            Some(SHORT),
        )
        .await,
    );
    assert_eq!(node.peer().await, "10.244.200.0-24 192.168.0.9");
    assert_eq!(node.peer().await, "10.244.200.0-24 gone");
}

async fn a_taken_subnet_is_a_loss(place: &impl Place) {
    let store = place.open();
    let mut node = Node::start(place.open(), settings("/taken", 1));
    let key = format!("/taken/subnets/{}", node.subnet().await);
    let revision = get(store.as_ref(), &key).await.unwrap().revision;
    let value = LeaseRecord::udp([192, 168, 0, 9].into()).to_json();
    done(put(store.as_ref(), &key, &value, revision).await);
    let lost = node.next().await;
    assert!(
        matches!(lost, Change::Own(OwnChange::Lost(Loss::Taken { .. }))),
        "{lost:?}"
    );
    node.end().await.unwrap();
    assert_eq!(get(store.as_ref(), &key).await.unwrap().value, value);
}

async fn reservations_stay(place: &impl Place) {
    let store = place.open();
    let value = LeaseRecord::udp([192, 168, 0, 1].into()).to_json();
    let key = "/reserved/subnets/10.244.50.0-24";
    done(create(store.as_ref(), key, &value, None).await);
    for _ in 0..2 {
        let mut node = Node::start(place.open(), settings("/reserved", 1));
        assert_eq!(node.subnet().await, "10.244.50.0-24");
        let entry = get(store.as_ref(), key).await.unwrap();
        assert_eq!(entry.ttl, None);
        assert!(entry.value.contains("VtepMAC"), "{}", entry.value);
        node.leave().await;
    }
    assert!(get(store.as_ref(), key).await.is_some());
}

/// Whoever writes while others do waits; nobody is refused, and nothing is lost.
async fn connections_that_write_at_once(place: &impl Place) {
    const WRITES: i64 = 200;
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let store = place.open();
            tokio::spawn(async move {
                let (key, value) = (format!("/many/{writer}"), "0".to_owned());
                let ttl = None;
                let mut revision = done(store.execute(Op::Create { key, value, ttl }).await?);
                for number in 1..=WRITES {
                    let op = Op::CompareAndPut {
                        key: format!("/many/{writer}"),
                        value: number.to_string(),
                        expected: revision,
                        ttl: None,
                    };
                    revision = done(store.execute(op).await?);
                }
                Ok::<_, StoreError>(())
            })
        })
        .collect();
    for writer in writers {
        let written = soon("a writer", writer).await.unwrap();
        assert_eq!(written, Ok(()));
    }
    let (_, entries) = list(place.open().as_ref(), "/many/").await;
    let values: Vec<_> = entries.iter().map(|entry| entry.value.as_str()).collect();
    assert_eq!(values, ["200"; 4]);
}

/// The settings of a node with an IPv6 address, in a network that somebody else has configured.
fn dual(prefix: &str, last: u8) -> ManagerSettings {
    let mut settings = settings(prefix, last);
    settings.identity.public_ipv6 = Some([0xfd01, 0, 0, 0, 0, 0, 0, last.into()].into());
    settings.wanted_config = WantedConfig::Any;
    settings
}

const DUAL: &str = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.24.0",
    "EnableIPv6":true,"IPv6Network":"fd00:244::/48","IPv6SubnetMin":"fd00:244:0:1::",
    "IPv6SubnetMax":"fd00:244:0:18::","Backend":{"Type":"vxlan"}}"#;

/// Twenty nodes that start at once, of which every fourth has no IPv6, share no subnet of either
/// version, although their keys differ.
async fn dual_race(place: &impl Place) {
    let prefix = "/dual-race";
    let store = place.open();
    let config = format!("{prefix}/config");
    done(create(store.as_ref(), &config, DUAL, None).await);
    let settings = (1..=20).map(|last| {
        let mut settings = dual(prefix, last);
        settings.identity.public_ipv6 = settings.identity.public_ipv6.filter(|_| last % 4 != 0);
        settings
    });
    let mut nodes: Vec<_> = settings
        .map(|settings| Node::start(place.open(), settings))
        .collect();
    let mut keys = Vec::<SubnetKey>::new();
    for node in &mut nodes {
        let key = node.subnet().await.parse().unwrap();
        let other = keys.iter().find(|other| other.overlaps(&key));
        assert_eq!(other, None, "{key}");
        keys.push(key);
    }
    assert_eq!(keys.iter().filter(|key| key.ipv6().is_some()).count(), 15);
    let (_, entries) = list(store.as_ref(), &format!("{prefix}/subnets/")).await;
    assert_eq!(entries.len(), nodes.len());
}

async fn a_lease_becomes_dual_and_back(place: &impl Place) {
    let prefix = "/dual";
    let store = place.open();
    let config = format!("{prefix}/config");
    let plain =
        r#"{"Network":"10.244.0.0/16","SubnetMax":"10.244.24.0","Backend":{"Type":"vxlan"}}"#;
    let mut revision = done(create(store.as_ref(), &config, plain, None).await);
    let mut witness = Node::start(place.open(), dual(prefix, 9));
    witness.subnet().await;
    let mut node = Node::start(place.open(), dual(prefix, 1));
    let first: SubnetKey = node.subnet().await.parse().unwrap();
    assert_eq!(first.ipv6(), None);
    let mut held = first;
    assert_eq!(witness.peer().await, format!("{first} 192.168.0.1"));
    for (text, is_dual) in [(DUAL, true), (plain, false)] {
        let op = Op::CompareAndPut {
            key: config.clone(),
            value: text.to_owned(),
            expected: revision,
            ttl: None,
        };
        revision = done(store.execute(op).await.unwrap());
        drop(node);
        let mut settings = dual(prefix, 1);
        settings.previous = first.ipv4();
        node = Node::start(place.open(), settings);
        let key: SubnetKey = node.subnet().await.parse().unwrap();
        assert_eq!((key.ipv4(), key.ipv6().is_some()), (first.ipv4(), is_dual));
        while witness.next().await != Change::PeerGone(held) {}
        held = key;
        assert_eq!(witness.peer().await, format!("{key} 192.168.0.1"));
    }
    let (_, entries) = list(store.as_ref(), &format!("{prefix}/subnets/")).await;
    assert_eq!(entries.len(), 2);
}

/// Nodes that start at once on an empty store get different subnets, and all see all.
async fn race(place: &impl Place, prefix: &str, count: u8) {
    let mut nodes: Vec<_> = (1..=count)
        .map(|last| {
            let mut settings = settings(prefix, last);
            // All want the same.
            settings.random_seed = 1;
            Node::start(place.open(), settings)
        })
        .collect();
    let mut subnets = BTreeSet::new();
    for node in &mut nodes {
        let mut peers = BTreeSet::new();
        let mut own = None;
        while own.is_none() || peers.len() + 1 < usize::from(count) {
            match node.next().await {
                Change::Own(OwnChange::Acquired(key)) => own = Some(key),
                Change::Peer(key, _) => {
                    peers.insert(key);
                }
                Change::PeerGone(key) => panic!("{key} is gone"),
                Change::Own(OwnChange::Lost(loss)) => panic!("{loss}"),
                _ => {}
            }
        }
        subnets.extend(own);
        assert!(peers.is_disjoint(&own.into_iter().collect()));
    }
    assert_eq!(subnets.len(), nodes.len());
}
