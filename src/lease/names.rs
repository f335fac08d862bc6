//! The task that tells other nodes of this node's pods, and hears of theirs, by keys beside
//! flannel's.
//!
//! A node writes one record under the subnet of its lease, again whenever its pods change, and has
//! none while it has no pods. The record ends with its time to live, if it is not renewed as a
//! lease is. What is heard stays while the store is away.

use std::collections::HashSet;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use muslin_stack::ipam::PodName;
use muslin_stack::lease::{Answer, Entry, LEASE_TTL, Op, Revision, WatchEvent};
use muslin_stack::names::{Names, NodeRecord, PodRecord, named_subnet, names_key, names_prefix};
use parking_lot::RwLock;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

use super::store::{Store, StoreError, is_permission};

type StoreResult<T> = Result<T, StoreError>;

/// How long a change waits for others, which are then written with it.
const COALESCE: Duration = Duration::from_millis(200);
/// The shortest time between two writes.
const PAUSE: Duration = Duration::from_secs(1);
/// When a record is written again that has not changed.
const RENEWAL: Duration = Duration::from_secs(LEASE_TTL.as_secs() / 2);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// How long a store is left alone that does not let this node do it.
const FORBIDDEN: Duration = Duration::from_secs(60);
/// A watch that lived for longer was no failure.
const LONG_WATCH: Duration = Duration::from_secs(10);

/// A node that shares the names of its pods.
pub struct Sharing {
    /// Where.
    pub store: Arc<dyn Store>,
    /// Where the store has flannel's keys, without a trailing slash.
    pub prefix: String,
    /// All pods of the cluster.
    pub network: Ipv4Net,
    /// The node's name.
    pub node: PodName,
    /// Its lease.
    pub subnet: Ipv4Net,
    /// Its pods.
    pub pods: watch::Receiver<Vec<PodRecord>>,
    /// Whether the record is to be removed, as the lease is.
    pub leave: watch::Receiver<bool>,
    /// Takes the records of other nodes.
    pub names: Arc<RwLock<Names>>,
}

impl Sharing {
    /// Shares until the node leaves. If the store cannot keep names, or refuses for good, it ends
    /// sooner, and only this node's own pods are known.
    pub async fn run(self) {
        if !self.store.keeps_names() {
            let store = self.store.describe();
            return info!("pods of other nodes have no names here: {store} cannot keep them");
        }
        let now = Instant::now();
        let mut sharer = Sharer {
            key: names_key(&self.prefix, self.subnet),
            wanted: None,
            stored: None,
            seen: 0,
            write_at: now,
            renew_at: now,
            failures: 0,
            is_leaving: false,
            is_told: false,
            sharing: self,
        };
        sharer.run().await;
    }
}

struct Sharer {
    sharing: Sharing,
    key: String,
    /// What our key is to have; nothing if there is to be none.
    wanted: Option<String>,
    /// What it has, as far as is known.
    stored: Option<(Revision, String)>,
    /// The last change of our key that is known.
    seen: Revision,
    /// Not before.
    write_at: Instant,
    renew_at: Instant,
    /// Writes that failed in a row.
    failures: u32,
    is_leaving: bool,
    /// Whether it was told that the store forbids it.
    is_told: bool,
}

/// What is next.
enum Step {
    Events(StoreResult<Vec<WatchEvent>>),
    Pods,
    Leave,
    Write,
}

impl Sharer {
    async fn run(&mut self) {
        self.look_at_pods();
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let error = match self.follow().await {
                Ok(()) => return,
                Err(error) => error,
            };
            if matches!(error, StoreError::Refused(_)) {
                return warn!("names of pods are not shared: {error}");
            }
            if self.is_leaving && is_permission(&error) {
                // The record, if there is one, ends by itself.
                return;
            }
            failures = if began.elapsed() > LONG_WATCH {
                0
            } else {
                failures + 1
            };
            let delay = self.delay(&error, failures, "names of other nodes' pods are not known");
            tokio::select! {
                () = sleep(delay) => {}
                () = asked(&mut self.sharing.leave), if !self.is_leaving => self.leave(),
            }
        }
    }

    /// Reads all records, and then follows what changes here and there; it ends well when the node
    /// has left.
    async fn follow(&mut self) -> StoreResult<()> {
        let prefix = names_prefix(&self.sharing.prefix);
        let revision = self.list(&prefix).await?;
        let store = self.sharing.store.clone();
        let mut stream = store.watch(&prefix, revision + 1).await?;
        while !(self.is_leaving && self.stored.is_none()) {
            let due = self.due();
            let sharing = &mut self.sharing;
            let step = tokio::select! {
                biased;
                events = stream.next() => Step::Events(events),
                () = asked(&mut sharing.leave), if !self.is_leaving => Step::Leave,
                Ok(()) = sharing.pods.changed(), if !self.is_leaving => Step::Pods,
                () = sleep_until(due) => Step::Write,
            };
            match step {
                Step::Events(events) => events?.into_iter().for_each(|event| self.take(event)),
                Step::Pods => {
                    self.write_at = self.write_at.max(Instant::now() + COALESCE);
                    self.look_at_pods();
                }
                Step::Leave => self.leave(),
                Step::Write => self.write().await?,
            }
        }
        Ok(())
    }

    fn leave(&mut self) {
        self.is_leaving = true;
        self.wanted = None;
        self.write_at = Instant::now();
    }

    fn look_at_pods(&mut self) {
        let pods = self.sharing.pods.borrow_and_update().clone();
        if pods.is_empty() {
            self.wanted = None;
            return;
        }
        let record = NodeRecord {
            node: self.sharing.node.clone(),
            subnet: self.sharing.subnet,
            pods,
        };
        let (json, left_out) = record.to_json();
        if left_out > 0 {
            warn!("{left_out} pods have no names on other nodes: there are too many");
        }
        self.wanted = Some(json);
    }

    /// When our record is to be written.
    fn due(&self) -> Instant {
        let stored = self.stored.as_ref().map(|(_, value)| value);
        if stored != self.wanted.as_ref() {
            self.write_at
        } else if self.wanted.is_some() {
            self.renew_at.max(self.write_at)
        } else {
            Instant::now() + RENEWAL
        }
    }

    /// Reads all records; the store's revision.
    async fn list(&mut self, prefix: &str) -> StoreResult<Revision> {
        let listed = self
            .sharing
            .store
            .execute(Op::List(prefix.to_owned()))
            .await?;
        let Answer::Snapshot { revision, entries } = listed else {
            return Err(StoreError::Unavailable(format!("unexpected: {listed:?}")));
        };
        self.forget_unlisted(&entries);
        self.stored = None;
        self.seen = revision;
        for entry in entries {
            if entry.key == self.key {
                self.stored = Some((entry.revision, entry.value));
            } else {
                self.note(&entry);
            }
        }
        Ok(revision)
    }

    /// Forgets the records of other nodes that a list has no more.
    fn forget_unlisted(&self, entries: &[Entry]) {
        let prefix = &self.sharing.prefix;
        let listed = entries.iter();
        let listed: HashSet<_> = listed
            .filter_map(|it| named_subnet(prefix, &it.key))
            .collect();
        let mut names = self.sharing.names.write();
        let gone = names.recorded().filter(|it| !listed.contains(it));
        for subnet in gone.collect::<Vec<_>>() {
            if subnet != self.sharing.subnet {
                names.remove(subnet);
            }
        }
    }

    fn take(&mut self, event: WatchEvent) {
        let (key, revision) = match &event {
            WatchEvent::Put(entry) => (&entry.key, entry.revision),
            WatchEvent::Delete { key, revision } => (key, *revision),
        };
        if *key != self.key {
            match &event {
                WatchEvent::Put(entry) => self.note(entry),
                WatchEvent::Delete { key, .. } => self.forget(key),
            }
        } else if revision > self.seen {
            // What this task has written it knows already.
            self.seen = revision;
            self.stored = match event {
                WatchEvent::Put(entry) => Some((revision, entry.value)),
                WatchEvent::Delete { .. } => None,
            };
        }
    }

    /// Takes another node's record.
    fn note(&self, entry: &Entry) {
        let record = NodeRecord::read(&self.sharing.prefix, entry);
        match record {
            Ok(record) if self.sharing.network.contains(&record.subnet) => {
                self.sharing.names.write().set(record);
            }
            Ok(record) => debug!(
                "the pods of {} are in no subnet of the network",
                record.node
            ),
            Err(error) => {
                debug!("the key {} tells no pods: {error}", entry.key);
                self.forget(&entry.key);
            }
        }
    }

    fn forget(&self, key: &str) {
        if let Some(subnet) = named_subnet(&self.sharing.prefix, key) {
            self.sharing.names.write().remove(subnet);
        }
    }

    /// Makes our key what it is to be. Only what has to be read again is an error.
    async fn write(&mut self) -> StoreResult<()> {
        let (key, ttl) = (self.key.clone(), Some(LEASE_TTL));
        let op = match (&self.stored, self.wanted.clone()) {
            (None, Some(value)) => Op::Create { key, value, ttl },
            (Some((expected, _)), Some(value)) => Op::CompareAndPut {
                key,
                value,
                expected: *expected,
                ttl,
            },
            (Some((expected, _)), None) => Op::CompareAndDelete {
                key,
                expected: *expected,
            },
            (None, None) => return Ok(()),
        };
        let written = self.sharing.store.execute(op).await;
        let now = Instant::now();
        self.write_at = now + PAUSE;
        match written {
            Ok(Answer::Done(revision)) => {
                self.seen = revision;
                self.stored = self.wanted.clone().map(|value| (revision, value));
                self.renew_at = now + RENEWAL;
                self.failures = 0;
                self.is_told = false;
                Ok(())
            }
            // Others have written it, or an answer was lost.
            Ok(_) => Err(StoreError::Gap),
            Err(error @ StoreError::Unavailable(_))
                if !(self.is_leaving && is_permission(&error)) =>
            {
                self.failures += 1;
                let what = "other nodes do not know the names of this node's pods";
                self.write_at = now + self.delay(&error, self.failures, what);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// How long to wait after a failure. That the store is away is told with the leases.
    fn delay(&mut self, error: &StoreError, failures: u32, what: &str) -> Duration {
        if !is_permission(error) {
            debug!("{what}: {error}");
            let longer = FIRST_RETRY.saturating_mul(1 << failures.min(10));
            return longer.min(LAST_RETRY);
        }
        if !std::mem::replace(&mut self.is_told, true) {
            let prefix = names_prefix(&self.sharing.prefix);
            warn!("{what}: {error}; that takes the rights to read and write {prefix}");
        }
        FORBIDDEN
    }
}

/// Until the node is to leave; for ever if nobody can ask any more.
async fn asked(leave: &mut watch::Receiver<bool>) {
    if leave.wait_for(|leave| *leave).await.is_err() {
        pending().await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use muslin_stack::names::Found;
    use tempfile::TempDir;
    use tokio::task::JoinHandle;

    use super::super::store::{EtcdOptions, Watch, open};
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn subnet(number: u8) -> Ipv4Net {
        Ipv4Net::new([10, 1, number, 0].into(), 24).unwrap()
    }

    /// A node and what it knows.
    struct Node {
        pods: watch::Sender<Vec<PodRecord>>,
        leave: watch::Sender<bool>,
        names: Arc<RwLock<Names>>,
        task: JoinHandle<()>,
        number: u8,
    }

    impl Node {
        /// A node that knows that the subnets of nodes 1 and 2 are leased.
        fn start(store: &Arc<dyn Store>, number: u8) -> Self {
            let (pods, leave) = (watch::Sender::default(), watch::Sender::new(false));
            let names = Arc::new(RwLock::new(Names::default()));
            names.write().lease(subnet(1));
            names.write().lease(subnet(2));
            let sharing = Sharing {
                store: store.clone(),
                prefix: "/p".to_owned(),
                network: "10.1.0.0/16".parse().unwrap(),
                node: format!("n{number}").parse().unwrap(),
                subnet: subnet(number),
                pods: pods.subscribe(),
                leave: leave.subscribe(),
                names: names.clone(),
            };
            Self {
                pods,
                leave,
                names,
                task: tokio::spawn(sharing.run()),
                number,
            }
        }

        fn set_pods(&self, names: &[&str]) {
            let pods = names.iter().zip(2..).map(|(name, last)| PodRecord {
                name: name.parse().unwrap(),
                address: [10, 1, self.number, last].into(),
            });
            self.pods.send_replace(pods.collect());
        }

        /// Waits until it knows the pods of the other nodes by these names, and no others.
        async fn knows(&self, known: &[&str], unknown: &[&str]) {
            let deadline = Instant::now() + SOON;
            loop {
                let is_known =
                    |name: &&str| matches!(self.names.read().find(name), Found::Addresses(_));
                if known.iter().all(is_known) && !unknown.iter().any(is_known) {
                    return;
                }
                assert!(Instant::now() < deadline, "{known:?} but not {unknown:?}");
                sleep(Duration::from_millis(10)).await;
            }
        }
    }

    fn embedded(directory: &TempDir) -> Arc<dyn Store> {
        let url = format!("sqlite:{}", directory.path().join("s.db").display());
        open(&url, &EtcdOptions::default()).unwrap()
    }

    async fn records(store: &Arc<dyn Store>) -> Vec<Entry> {
        let listed = store.execute(Op::List(names_prefix("/p"))).await.unwrap();
        let Answer::Snapshot { entries, .. } = listed else {
            panic!()
        };
        entries
    }

    #[tokio::test]
    async fn nodes_hear_of_each_others_pods_while_they_are_there() {
        let directory = TempDir::new().unwrap();
        let store = embedded(&directory);
        let [one, two] = [1, 2].map(|number| Node::start(&store, number));
        one.set_pods(&["a", "b"]);
        two.set_pods(&["c"]);
        one.knows(&["c", "c.n2"], &["a"]).await;
        two.knows(&["a", "b", "a.n1"], &["c"]).await;
        // One that comes later finds all, and what changes is told.
        let late = Node::start(&store, 3);
        late.knows(&["a", "b", "c"], &[]).await;
        one.set_pods(&["b"]);
        late.knows(&["b", "c"], &["a"]).await;
        assert_eq!(records(&store).await.len(), 2);
        assert!(records(&store).await[0].ttl.unwrap() > RENEWAL);
        one.set_pods(&[]);
        late.knows(&["c"], &["b"]).await;
        two.leave.send_replace(true);
        two.task.await.unwrap();
        late.knows(&[], &["c"]).await;
        assert_eq!(records(&store).await, []);
        late.leave.send_replace(true);
        late.task.await.unwrap();
    }

    #[tokio::test]
    async fn changes_that_follow_each_other_are_one_write() {
        let directory = TempDir::new().unwrap();
        let store = embedded(&directory);
        let [one, two] = [1, 2].map(|number| Node::start(&store, number));
        one.set_pods(&["first"]);
        two.knows(&["first"], &[]).await;
        let before = records(&store).await[0].revision;
        for i in 0..100 {
            one.set_pods(&[&format!("pod-{i}")]);
            sleep(Duration::from_millis(1)).await;
        }
        two.knows(&["pod-99"], &["first"]).await;
        assert!(records(&store).await[0].revision <= before + 2);
    }

    #[tokio::test]
    async fn what_others_do_to_a_record_is_undone() {
        let directory = TempDir::new().unwrap();
        let store = embedded(&directory);
        let key = names_key("/p", subnet(1));
        let forged = r#"{"node":"n1","subnet":"10.1.1.0/24","pods":[]}"#.to_owned();
        let create = Op::Create {
            key: key.clone(),
            value: forged.clone(),
            ttl: None,
        };
        store.execute(create).await.unwrap();
        let [one, two] = [1, 2].map(|number| Node::start(&store, number));
        one.set_pods(&["a"]);
        two.knows(&["a"], &[]).await;
        for value in [Some(forged), None, Some("rubbish".to_owned())] {
            let entry = records(&store).await.remove(0);
            let (key, expected) = (key.clone(), entry.revision);
            let op = match value {
                Some(value) => Op::CompareAndPut {
                    key,
                    value,
                    expected,
                    ttl: None,
                },
                None => Op::CompareAndDelete { key, expected },
            };
            let Answer::Done(done) = store.execute(op).await.unwrap() else {
                panic!()
            };
            let deadline = Instant::now() + SOON;
            let is_ours = |it: &Entry| it.revision > done && it.value.contains(r#""a""#);
            while !records(&store).await.iter().any(is_ours) {
                assert!(Instant::now() < deadline);
                sleep(Duration::from_millis(10)).await;
            }
            two.knows(&["a"], &[]).await;
        }
        let other = names_key("/p", subnet(9));
        for (key, value) in [(other, "rubbish"), (names_prefix("/p"), "{}")] {
            let (value, ttl) = (value.to_owned(), None);
            store.execute(Op::Create { key, value, ttl }).await.unwrap();
        }
        one.set_pods(&["a", "b"]);
        two.knows(&["a", "b"], &[]).await;
    }

    /// A store that lets a node read at most, and not write.
    struct ReadOnly {
        inner: Arc<dyn Store>,
        may_read: bool,
        refused: AtomicUsize,
    }

    #[async_trait]
    impl Store for ReadOnly {
        async fn execute(&self, op: Op) -> StoreResult<Answer> {
            if self.may_read && matches!(op, Op::List(_)) {
                return self.inner.execute(op).await;
            }
            self.refused.fetch_add(1, Ordering::SeqCst);
            let error = "http://h:1 refuses the user 'node': permission denied";
            Err(StoreError::Unavailable(error.to_owned()))
        }

        async fn watch(&self, prefix: &str, from: Revision) -> StoreResult<Box<dyn Watch>> {
            self.inner.watch(prefix, from).await
        }

        fn describe(&self) -> String {
            "read-only".to_owned()
        }
    }

    #[tokio::test]
    async fn a_node_that_may_not_write_hears_of_others() {
        let directory = TempDir::new().unwrap();
        let store = embedded(&directory);
        let read_only = Arc::new(ReadOnly {
            inner: store.clone(),
            may_read: true,
            refused: AtomicUsize::new(0),
        });
        let one = Node::start(&(read_only.clone() as Arc<dyn Store>), 1);
        let two = Node::start(&store, 2);
        one.set_pods(&["a"]);
        for name in ["c", "d", "e"] {
            two.set_pods(&[name]);
            one.knows(&[name], &[]).await;
        }
        one.set_pods(&["b"]);
        two.set_pods(&["f"]);
        one.knows(&["f"], &[]).await;
        assert_eq!(read_only.refused.load(Ordering::SeqCst), 1);
        assert_eq!(records(&store).await.len(), 1);
    }

    #[tokio::test]
    async fn a_node_that_may_not_even_read_leaves_at_once() {
        let directory = TempDir::new().unwrap();
        let forbidding = Arc::new(ReadOnly {
            inner: embedded(&directory),
            may_read: false,
            refused: AtomicUsize::new(0),
        });
        let node = Node::start(&(forbidding.clone() as Arc<dyn Store>), 1);
        node.set_pods(&["a"]);
        while forbidding.refused.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        node.leave.send_replace(true);
        tokio::time::timeout(SOON, node.task)
            .await
            .expect("an end")
            .unwrap();
        assert_eq!(forbidding.refused.load(Ordering::SeqCst), 2);
    }
}
