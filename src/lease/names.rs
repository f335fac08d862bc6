//! The task that shares the names of a node and its pods with other nodes: it executes the
//! rules' operations.

use std::future::pending;
use std::ops::ControlFlow;
use std::sync::Arc;

use muslin_stack::addresses::Nets;
use muslin_stack::api::events::EventKind;
use muslin_stack::control::ipam::PodName;
use muslin_stack::control::lease::{Action, Answer, WatchEvent};
use muslin_stack::control::names::{
    NameChange, Names, PodRecord, Sharer, SharerSettings, Trouble, names_prefix,
};
use parking_lot::RwLock;
use smoltcp::time::Instant;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::drive::{Rules, StoreResult, Turn, drive};
use crate::error::Result;
use crate::journal::Journal;
use crate::store::{Store, StoreError, is_permission};
use crate::terminal::quantity::count;

/// What other nodes do not know, or this one, if the store does not do something.
const OF_THIS: &str = "other nodes do not know the names of this node's pods";
const OF_OTHERS: &str = "the names of other nodes' pods are unknown";

/// A node that shares the names of its pods.
pub struct Sharing {
    /// Where.
    pub store: Arc<dyn Store>,
    /// Where the store has flannel's keys, without a trailing slash.
    pub prefix: String,
    /// All pods of the cluster.
    pub networks: Nets,
    /// The node's name.
    pub node: PodName,
    /// Its lease.
    pub subnets: Nets,
    /// Its pods.
    pub pods: watch::Receiver<Vec<PodRecord>>,
    /// Whether the record is to be removed, as the lease is.
    pub leave: watch::Receiver<bool>,
    /// Whether the record is to say that the node has stopped, and keeps its lease.
    pub stop: watch::Receiver<bool>,
    /// Takes the records of other nodes.
    pub names: Arc<RwLock<Names>>,
    /// The right to write to the store.
    pub turn: Turn,
    /// Takes that there are more names than can be shared.
    pub journal: Journal,
}

impl Sharing {
    /// Shares until the node leaves or stops. If the store cannot keep names it ends at once, and only
    /// this node's own pods are known.
    pub async fn run(self) {
        if !self.store.keeps_names() {
            let store = self.store.describe();
            return info!(
                "pods of other nodes cannot be resolved here: {store} cannot store their names"
            );
        }
        let began = std::time::Instant::now();
        let settings = SharerSettings {
            prefix: self.prefix.clone(),
            network: self.networks,
            node: self.node.clone(),
            subnet: self.subnets.into(),
        };
        let mut runner = Runner {
            sharer: Sharer::new(settings, now_since(began)),
            began,
            is_ending: false,
            is_told: false,
            sharing: self,
        };
        runner.set_pods();
        let (store, turn) = (runner.sharing.store.clone(), runner.sharing.turn.clone());
        // No rule of names ends with an error.
        let _ = drive(&mut runner, &*store, &turn).await;
    }
}

struct Runner {
    sharing: Sharing,
    sharer: Sharer,
    began: std::time::Instant,
    is_ending: bool,
    /// Whether it was logged that the store forbids it.
    is_told: bool,
}

impl Runner {
    fn set_pods(&mut self) {
        let pods = self.sharing.pods.borrow_and_update().clone();
        let left_out = self.sharer.set_pods(now_since(self.began), pods);
        if left_out > 0 {
            let pods = count(left_out as u64, "pod");
            let text = format!("other nodes cannot resolve {pods}: there are too many");
            let journal = &self.sharing.journal;
            journal.note(EventKind::LimitReached, "names", text);
        }
    }

    /// Classifies an error. An unreachable store is logged with the leases.
    fn trouble(&mut self, error: &StoreError, what: &str) -> Trouble {
        let is_news = must_be_mended(error) && !std::mem::replace(&mut self.is_told, true);
        match (is_news, is_permission(error)) {
            (false, _) => debug!("{what}: {error}"),
            (true, false) => warn!("{what}: {error}"),
            (true, true) => {
                let prefix = names_prefix(&self.sharing.prefix);
                warn!("{what}: {error}; this requires rights to read and write {prefix}");
            }
        }
        match is_permission(error) {
            true => Trouble::Forbidden,
            false => Trouble::Away,
        }
    }
}

impl Rules for Runner {
    const STORE: &'static str = "names";
    const LOG_FAILURES: bool = true;

    fn now(&self) -> Instant {
        now_since(self.began)
    }

    fn poll(&mut self) -> Result<Action> {
        let action = self.sharer.poll(self.now());
        for change in self.sharer.changes() {
            match change {
                NameChange::Set(record) => {
                    let pods = count(record.pods.len() as u64, "pod");
                    debug!(
                        "names: node {} at {} has {pods}",
                        record.node, record.subnet
                    );
                    self.sharing.names.write().set(record);
                }
                NameChange::Removed(subnet) => {
                    debug!("names: no record of {subnet} any more");
                    self.sharing.names.write().remove(subnet.nets());
                }
                NameChange::Skipped(key, reason) => {
                    debug!("the key {key} is not a record of pods: {reason}");
                }
            }
        }
        Ok(action)
    }

    fn answer(&mut self, is_list: bool, answer: StoreResult<Answer>) -> Result<()> {
        let now = self.now();
        match answer {
            Ok(answer) => {
                self.is_told &= is_list;
                self.sharer.answer(now, answer);
            }
            // A list shows the present value of our key.
            Err(StoreError::Gap) => self.sharer.answer(now, Answer::Conflict),
            Err(error) => {
                let what = if is_list { OF_OTHERS } else { OF_THIS };
                let trouble = self.trouble(&error, what);
                self.sharer.failed(now, trouble);
            }
        }
        Ok(())
    }

    fn prefix(&self) -> String {
        self.sharer.prefix()
    }

    fn events(&mut self, events: Vec<WatchEvent>) {
        events.into_iter().for_each(|it| self.sharer.event(it));
    }

    fn watch_ended(&mut self, error: &StoreError) -> Result<()> {
        let trouble = self.trouble(error, OF_OTHERS);
        self.sharer.watch_ended(self.now(), trouble);
        Ok(())
    }

    async fn input(&mut self) -> ControlFlow<()> {
        let sharing = &mut self.sharing;
        tokio::select! {
            () = asked(&mut sharing.leave), if !self.is_ending => {
                self.is_ending = true;
                self.sharer.leave(now_since(self.began));
                ControlFlow::Break(())
            }
            () = asked(&mut sharing.stop), if !self.is_ending => {
                self.is_ending = true;
                self.sharer.stop(now_since(self.began));
                ControlFlow::Break(())
            }
            Ok(()) = sharing.pods.changed(), if !self.is_ending => {
                self.set_pods();
                ControlFlow::Continue(())
            }
            else => pending().await,
        }
    }
}

/// The time for the rules, since a moment.
fn now_since(began: std::time::Instant) -> Instant {
    Instant::from_micros(i64::try_from(began.elapsed().as_micros()).unwrap_or(i64::MAX))
}

/// Whether the store works, but this needs an administrator's intervention.
fn must_be_mended(error: &StoreError) -> bool {
    matches!(error, StoreError::Refused(_)) || is_permission(error)
}

/// Waits until the node is to end this way; for ever if the sender is gone.
async fn asked(leave: &mut watch::Receiver<bool>) {
    if leave.wait_for(|leave| *leave).await.is_err() {
        pending().await
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use async_trait::async_trait;
    use muslin_stack::control::lease::{Entry, LEASE_TTL, Op, Revision};
    use muslin_stack::control::names::{Found, names_key};
    use tempfile::TempDir;
    use tokio::task::JoinHandle;
    use tokio::time::{Instant, sleep};

    use ipnet::Ipv4Net;

    use super::*;
    use crate::store::{EtcdOptions, Watch, open};

    const SOON: Duration = Duration::from_secs(20);

    fn subnet(number: u8) -> Ipv4Net {
        Ipv4Net::new([10, 1, number, 0].into(), 24).unwrap()
    }

    /// A node and what it knows.
    struct Node {
        pods: watch::Sender<Vec<PodRecord>>,
        leave: watch::Sender<bool>,
        stop: watch::Sender<bool>,
        names: Arc<RwLock<Names>>,
        task: JoinHandle<()>,
        number: u8,
    }

    impl Node {
        /// A node that knows that the subnets of nodes 1 and 2 are leased.
        fn start(store: &Arc<dyn Store>, number: u8) -> Self {
            let (leave, stop) = (watch::Sender::new(false), watch::Sender::new(false));
            let pods = watch::Sender::default();
            let names = Arc::new(RwLock::new(Names::default()));
            names.write().lease(subnet(1));
            names.write().lease(subnet(2));
            let sharing = Sharing {
                turn: Turn::default(),
                store: store.clone(),
                prefix: "/p".to_owned(),
                networks: "10.1.0.0/16".parse().unwrap(),
                node: format!("n{number}").parse().unwrap(),
                subnets: subnet(number).into(),
                pods: pods.subscribe(),
                leave: leave.subscribe(),
                stop: stop.subscribe(),
                names: names.clone(),
                journal: Journal::default(),
            };
            Self {
                pods,
                leave,
                stop,
                names,
                task: tokio::spawn(sharing.run()),
                number,
            }
        }

        fn set_pods(&self, names: &[&str]) {
            let pods = names.iter().zip(2..).map(|(name, last)| PodRecord {
                name: name.parse().unwrap(),
                address: Ipv4Addr::new(10, 1, self.number, last).into(),
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
        // A later subscriber gets the present state, then all changes.
        let late = Node::start(&store, 3);
        late.knows(&["a", "b", "c"], &[]).await;
        one.set_pods(&["b"]);
        late.knows(&["b", "c"], &["a"]).await;
        assert!(records(&store).await[0].ttl.unwrap() > LEASE_TTL / 2);
        one.set_pods(&[]);
        late.knows(&["c"], &["b"]).await;
        two.leave.send_replace(true);
        two.task.await.unwrap();
        late.knows(&[], &["c"]).await;
        // Nodes without pods are known as well.
        let keys: Vec<_> = records(&store).await.into_iter().map(|it| it.key).collect();
        assert_eq!(keys, [1, 3].map(|number| names_key("/p", subnet(number))));
        late.leave.send_replace(true);
        late.task.await.unwrap();
        assert_eq!(records(&store).await.len(), 1);
    }

    #[tokio::test]
    async fn a_node_that_stops_says_so_until_it_is_back() {
        let directory = TempDir::new().unwrap();
        let store = embedded(&directory);
        let [one, two] = [1, 2].map(|number| Node::start(&store, number));
        one.set_pods(&["a"]);
        two.knows(&["a"], &[]).await;
        let has_stopped = || {
            let names = two.names.read();
            names.record(subnet(1)).map(|record| record.stopped)
        };
        assert_eq!(has_stopped(), Some(false));
        one.stop.send_replace(true);
        one.task.await.unwrap();
        let until = async |expected| {
            let deadline = Instant::now() + SOON;
            while has_stopped() != Some(expected) {
                assert!(Instant::now() < deadline, "not {expected}");
                sleep(Duration::from_millis(10)).await;
            }
        };
        until(true).await;
        two.knows(&["a"], &[]).await;
        let again = Node::start(&store, 1);
        until(false).await;
        again.leave.send_replace(true);
        again.task.await.unwrap();
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

    /// A store that is away at times.
    struct AtTimes {
        inner: Arc<dyn Store>,
        is_away: watch::Receiver<bool>,
    }

    fn away() -> StoreError {
        StoreError::Unavailable("it is unreachable".to_owned())
    }

    #[async_trait]
    impl Store for AtTimes {
        async fn execute(&self, op: Op) -> StoreResult<Answer> {
            if *self.is_away.borrow() {
                return Err(away());
            }
            self.inner.execute(op).await
        }

        async fn watch(&self, prefix: &str, from: Revision) -> StoreResult<Box<dyn Watch>> {
            if *self.is_away.borrow() {
                return Err(away());
            }
            Ok(Box::new(UntilAway {
                inner: self.inner.watch(prefix, from).await?,
                is_away: self.is_away.clone(),
            }))
        }

        fn describe(&self) -> String {
            "at times".to_owned()
        }
    }

    struct UntilAway {
        inner: Box<dyn Watch>,
        is_away: watch::Receiver<bool>,
    }

    #[async_trait]
    impl Watch for UntilAway {
        async fn next(&mut self) -> StoreResult<Vec<WatchEvent>> {
            tokio::select! {
                biased;
                _ = self.is_away.wait_for(|is_away| *is_away) => Err(away()),
                events = self.inner.next() => events,
            }
        }
    }

    #[tokio::test]
    async fn what_ends_while_the_store_is_away_is_gone_after_it() {
        let directory = TempDir::new().unwrap();
        let store = embedded(&directory);
        let (outage, is_away) = watch::channel(false);
        let at_times = Arc::new(AtTimes {
            inner: store.clone(),
            is_away,
        });
        let one = Node::start(&(at_times as Arc<dyn Store>), 1);
        let two = Node::start(&store, 2);
        one.set_pods(&["a"]);
        two.set_pods(&["c"]);
        one.knows(&["c"], &[]).await;
        two.knows(&["a"], &[]).await;
        for (pods, known, unknown) in [
            (&["d"][..], &["d"][..], &["c"][..]),
            (&[], &[], &["c", "d"]),
            (&["c", "e"], &["c", "e"], &["d"]),
            (&[], &[], &["c", "d", "e"]),
        ] {
            let before = records(&store).await;
            outage.send_replace(true);
            two.set_pods(pods);
            let deadline = Instant::now() + SOON;
            while records(&store).await == before {
                assert!(Instant::now() < deadline, "{pods:?} are not written");
                sleep(Duration::from_millis(10)).await;
            }
            outage.send_replace(false);
            one.knows(known, unknown).await;
            // Its own record has outlived the outage.
            two.knows(&["a"], &[]).await;
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
