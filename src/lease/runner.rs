//! The task that keeps this node's lease: it executes the lease rules' operations.

use std::future::pending;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_encap::tunnel::wireguard::PublicKey;
use muslin_stack::api::events::EventKind;
use muslin_stack::control::lease::{Action, Answer, Change, Manager, OwnChange, WatchEvent};
use smoltcp::time::Instant;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::debug;

use super::drive::{Rules, StoreResult, Turn, drive};
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::store::{Store, StoreError};

/// How long the store may take to give a lease back.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the running task shares with others.
#[derive(Debug, Clone)]
pub struct Controls {
    /// Whether the lease is to be given back.
    pub leave: watch::Receiver<bool>,
    /// Where the node's tunnel ends, if it does in IPv4: the lease follows it, with the same subnet.
    pub public_ip: watch::Receiver<Option<Ipv4Addr>>,
    /// The same for IPv6, if there is one.
    pub public_ipv6: watch::Receiver<Option<Ipv6Addr>>,
    /// The right to write to the store.
    pub turn: Turn,
    /// Takes when the lease ends ([`Manager::ends`]).
    pub ends: watch::Sender<Option<Instant>>,
    /// Takes what happens to the store.
    pub journal: Journal,
}

/// What the task reports.
#[derive(Debug, Clone, PartialEq)]
pub enum News {
    /// Something about the lease has changed.
    Lease(Change),
    /// The store is unreachable or refuses: why, in one line. Known peers stay.
    StoreFails(String),
    /// The store works again.
    StoreWorks,
    /// The store has answered, so that it says which one it is ([`Store::id`]). Nothing was asked of it
    /// yet that depends on who the node is.
    StoreKnown,
}

/// What becomes of news.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// It is taken.
    Taken,
    /// The network configuration of [`OwnChange::Configured`] cannot be used here now: it is asked for
    /// again in a while, before anything is written.
    ConfigRefused,
    /// The network configuration of [`OwnChange::Configured`] is used, on these terms.
    ConfigTaken(Terms),
    /// The node was never in the store of [`News::StoreKnown`], and has this VTEP there.
    Anew(VtepMac),
}

/// What a node is in a network whose configuration it uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    /// Why it has no part in its IPv6 ([`Manager::go_without_ipv6`]), if it has none.
    pub without_ipv6: Option<String>,
    /// Its public key, if it needs one.
    pub public_key: Option<PublicKey>,
}

/// Keeps a lease until it is given back or lost, and gives all news in order to `apply`, before
/// anything else is asked of the store: a node that cannot use the network's configuration writes no
/// lease.
///
/// It ends after `OwnChange::Left`, which follows `true` in `controls.leave`, and after
/// `OwnChange::Lost`. To stop without giving the lease back, drop it. While the store is away or
/// refuses nothing changes: the last known peers stay, and it is asked again until it works. `clock`
/// must never go back.
///
/// # Errors
/// What `apply` says; a failure if the store does not work when the lease is to be given back.
pub async fn run(
    manager: Manager,
    store: Arc<dyn Store>,
    clock: impl Fn() -> Instant,
    controls: Controls,
    apply: impl FnMut(News) -> Result<Reply>,
) -> Result<()> {
    let name = store.describe();
    let mut deadline = controls.leave.clone();
    let turn = controls.turn.clone();
    let mut runner = Runner {
        outage: Outage::new(name.clone(), controls.journal.clone()),
        manager,
        clock,
        controls,
        is_leaving: false,
        is_known: false,
        apply,
    };
    tokio::select! {
        result = drive(&mut runner, &*store, &turn) => result,
        () = async { leave_requested(&mut deadline).await; sleep(PATIENCE).await } => {
            Err(Error::failed(format!(
                "the lease is not given back, because {name} is unreachable: it expires within a day"
            )))
        }
    }
}

struct Runner<C, A> {
    manager: Manager,
    clock: C,
    controls: Controls,
    is_leaving: bool,
    /// Whether the store has answered.
    is_known: bool,
    apply: A,
    outage: Outage,
}

impl<C: Fn() -> Instant, A: FnMut(News) -> Result<Reply>> Runner<C, A> {
    /// Says once that the store does not work, and why, if it is not said yet.
    fn begin_outage(&mut self, of: OutageOf, error: &StoreError) -> Result<()> {
        if let Some(reason) = self.outage.begin(of, error) {
            (self.apply)(News::StoreFails(reason))?;
        }
        Ok(())
    }

    /// Says once that the store has answered.
    fn get_to_know(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.is_known, true)
            && let Reply::Anew(vtep_mac) = (self.apply)(News::StoreKnown)?
        {
            self.manager.begin_anew(vtep_mac);
        }
        Ok(())
    }

    fn end_outage(&mut self, of: OutageOf) -> Result<()> {
        if self.outage.end(of) {
            (self.apply)(News::StoreWorks)?;
        }
        Ok(())
    }
}

impl<C: Fn() -> Instant, A: FnMut(News) -> Result<Reply>> Rules for Runner<C, A> {
    const STORE: &'static str = "lease store";
    const LOG_FAILURES: bool = false;

    fn now(&self) -> Instant {
        (self.clock)()
    }

    fn poll(&mut self) -> Result<Action> {
        loop {
            let action = self.manager.poll(self.now());
            self.controls.ends.send_replace(self.manager.ends());
            let mut of_config = None;
            for change in self.manager.changes() {
                let is_last = matches!(change, Change::Own(OwnChange::Left | OwnChange::Lost(_)));
                let reply = (self.apply)(News::Lease(change))?;
                of_config = Some(reply).filter(|it| *it != Reply::Taken).or(of_config);
                if is_last {
                    return Ok(Action::Stop);
                }
            }
            match of_config {
                Some(Reply::ConfigRefused) => self.manager.refuse_config(self.now()),
                Some(Reply::ConfigTaken(terms)) => {
                    if let Some(reason) = terms.without_ipv6 {
                        self.manager.go_without_ipv6(reason);
                    }
                    if let Some(public_key) = terms.public_key {
                        self.manager.set_public_key(public_key);
                    }
                }
                _ => return Ok(action),
            }
        }
    }

    fn answer(&mut self, _: bool, answer: StoreResult<Answer>) -> Result<()> {
        let now = self.now();
        match answer {
            Ok(answer) => {
                self.end_outage(OutageOf::Operation)?;
                self.get_to_know()?;
                self.manager.answer(now, answer);
            }
            Err(error) => {
                self.begin_outage(OutageOf::Operation, &error)?;
                self.manager.failed(now);
            }
        }
        Ok(())
    }

    fn prefix(&self) -> String {
        self.manager.lease_prefix()
    }

    fn watch_opened(&mut self) -> Result<()> {
        self.end_outage(OutageOf::Watch)
    }

    fn events(&mut self, events: Vec<WatchEvent>) {
        let now = self.now();
        for event in events {
            debug!("lease store: {event}");
            self.manager.event(now, event);
        }
    }

    fn watch_ended(&mut self, error: &StoreError) -> Result<()> {
        let now = self.now();
        match error {
            StoreError::Gap => debug!("the watch has a gap: all leases are read again"),
            error => self.begin_outage(OutageOf::Watch, error)?,
        }
        self.manager.watch_ended(now);
        Ok(())
    }

    async fn input(&mut self) -> ControlFlow<()> {
        tokio::select! {
            () = leave_requested(&mut self.controls.leave), if !self.is_leaving => {
                self.is_leaving = true;
                self.manager.leave();
                ControlFlow::Break(())
            }
            public_ipv6 = next(&mut self.controls.public_ipv6) => {
                if let Some(public_ipv6) = public_ipv6 {
                    self.manager.set_public_ipv6(public_ipv6);
                }
                ControlFlow::Continue(())
            }
            public_ip = next(&mut self.controls.public_ip) => {
                if let Some(public_ip) = public_ip {
                    self.manager.set_public_ip(public_ip);
                }
                ControlFlow::Continue(())
            }
        }
    }
}

/// Waits until the lease is to be given back; for ever if the sender is gone.
async fn leave_requested(leave: &mut watch::Receiver<bool>) {
    if leave.wait_for(|leave| *leave).await.is_err() {
        pending().await
    }
}

/// Waits for the next public address; for ever if the sender is gone.
async fn next<T: Copy>(address: &mut watch::Receiver<T>) -> T {
    if address.changed().await.is_err() {
        pending().await
    }
    *address.borrow_and_update()
}

/// What does not work, and what therefore must work again before an outage is over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OutageOf {
    Operation,
    Watch,
}

/// Says once that a store does not work, and once that it does again.
struct Outage {
    store: String,
    journal: Journal,
    began: Option<Began>,
}

struct Began {
    of: OutageOf,
    since: std::time::Instant,
    reason: String,
}

impl Outage {
    fn new(store: String, journal: Journal) -> Self {
        Self {
            store,
            journal,
            began: None,
        }
    }

    /// Takes note of an error; what is wrong, if that is news.
    fn begin(&mut self, of: OutageOf, error: &StoreError) -> Option<String> {
        let store = &self.store;
        let reason = match error {
            StoreError::Refused(why) => format!("the lease store {store} refuses: {why}"),
            _ => format!("the lease store {store} is unreachable: {error}"),
        };
        let refuses = matches!(error, StoreError::Refused(_));
        let began = self.began.get_or_insert_with(|| Began {
            of,
            since: std::time::Instant::now(),
            reason: String::new(),
        });
        if of == OutageOf::Watch {
            began.of = of;
        }
        // An unreachable store gives many reasons in turn; a refusal needs an administrator.
        let is_logged = !began.reason.is_empty() && (!refuses || began.reason == reason);
        if is_logged {
            return None;
        }
        began.reason.clone_from(&reason);
        let then = match refuses {
            true => "requests are retried until that is fixed, and the known peers stay",
            false => "the known peers stay",
        };
        let text = format!("{reason}; {then}");
        self.journal.note(EventKind::StoreAway, store, text);
        Some(reason)
    }

    /// Takes note that something works; whether that ends an outage.
    fn end(&mut self, of: OutageOf) -> bool {
        // Operations can work where watches do not, but not the other way round.
        let ends = |began: &mut Began| began.of == of || of == OutageOf::Watch;
        let Some(began) = self.began.take_if(ends) else {
            return false;
        };
        let (store, seconds) = (&self.store, began.since.elapsed().as_secs());
        let text = format!("the lease store {store} is back after {seconds} s");
        self.journal.note(EventKind::StoreBack, store, text);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use async_trait::async_trait;
    use muslin_stack::control::lease::{Op, Revision};
    use parking_lot::Mutex;
    use tempfile::TempDir;

    use super::*;
    use crate::store::suite::{Node, settings, soon};
    use crate::store::{self, Watch};

    /// A store that can be made unreachable, or to refuse.
    struct Flaky {
        store: Arc<dyn Store>,
        is_away: Arc<AtomicBool>,
        refuses: AtomicBool,
        requests: AtomicU32,
    }

    impl Flaky {
        fn new(directory: &TempDir) -> Arc<Self> {
            let path = directory.path().join("leases.db");
            Arc::new(Self {
                store: store::open(format!("sqlite:{}", path.display()), &Default::default())
                    .unwrap(),
                is_away: Arc::default(),
                refuses: AtomicBool::new(false),
                requests: AtomicU32::new(0),
            })
        }

        fn set_away(&self, is_away: bool) {
            self.is_away.store(is_away, Ordering::SeqCst);
        }

        fn check(&self) -> StoreResult<()> {
            self.requests.fetch_add(1, Ordering::SeqCst);
            if self.refuses.load(Ordering::SeqCst) {
                return Err(StoreError::Refused("unknown service".to_owned()));
            }
            check(&self.is_away)
        }
    }

    fn check(is_away: &AtomicBool) -> StoreResult<()> {
        if is_away.load(Ordering::SeqCst) {
            return Err(StoreError::Unavailable("it was taken away".to_owned()));
        }
        Ok(())
    }

    #[async_trait]
    impl Store for Flaky {
        async fn execute(&self, op: Op) -> StoreResult<Answer> {
            self.check()?;
            self.store.execute(op).await
        }

        async fn watch(&self, prefix: &str, from: Revision) -> StoreResult<Box<dyn Watch>> {
            self.check()?;
            Ok(Box::new(FlakyWatch {
                watch: self.store.watch(prefix, from).await?,
                is_away: Arc::clone(&self.is_away),
            }))
        }

        fn describe(&self) -> String {
            "flaky:".to_owned()
        }
    }

    struct FlakyWatch {
        watch: Box<dyn Watch>,
        is_away: Arc<AtomicBool>,
    }

    #[async_trait]
    impl Watch for FlakyWatch {
        async fn next(&mut self) -> StoreResult<Vec<WatchEvent>> {
            loop {
                check(&self.is_away)?;
                tokio::select! {
                    events = self.watch.next() => return events,
                    () = sleep(Duration::from_millis(10)) => {}
                }
            }
        }
    }

    /// What was logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Log {
        fn text(&self) -> String {
            String::from_utf8_lossy(&self.0.lock()).into_owned()
        }

        fn count(&self, words: &str) -> usize {
            String::from_utf8_lossy(&self.0.lock())
                .matches(words)
                .count()
        }
    }

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn an_outage_is_said_once_and_changes_nothing() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        // With one subscriber only, tracing lets the thread that comes first decide for all.
        let _second = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::new());

        let directory = TempDir::new().unwrap();
        let (flaky, steady) = (Flaky::new(&directory), Flaky::new(&directory));
        let mut node = Node::start(flaky.clone(), settings("/p", 1));
        let first = node.subnet().await;
        let mut other = Node::start(steady.clone(), settings("/p", 2));
        let second = other.subnet().await;
        node.sees(&second).await;
        for outages in 1..=2 {
            flaky.set_away(true);
            let before = flaky.requests.load(Ordering::SeqCst);
            soon("many requests", async {
                while flaky.requests.load(Ordering::SeqCst) < before + 4 {
                    sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
            assert_eq!(log.count("is unreachable"), outages, "{}", log.text());
            flaky.set_away(false);
            soon("the end of the outage", async {
                while log.count("is back") < outages {
                    sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
        // Nothing was reported meanwhile: the next is what happens now.
        other.leave().await;
        assert_eq!(node.peer().await, format!("{second} gone"));
        let mut third = Node::start(steady, settings("/p", 3));
        third.sees(&first).await;
        assert_eq!((log.count("is unreachable"), log.count("is back")), (2, 2));
        // Three lists, three watches and what an outage asks: no loop.
        let requests = flaky.requests.load(Ordering::SeqCst);
        assert!(requests < 60, "{requests}");
    }

    #[tokio::test]
    async fn a_store_that_refuses_is_asked_again_until_it_does_not() {
        let directory = TempDir::new().unwrap();
        let (flaky, steady) = (Flaky::new(&directory), Flaky::new(&directory));
        flaky.refuses.store(true, Ordering::SeqCst);
        // Before there is a lease,
        let mut node = Node::start(flaky.clone(), settings("/p", 1));
        node.trouble("refuses: unknown service").await;
        flaky.refuses.store(false, Ordering::SeqCst);
        node.subnet().await;
        // and after.
        let mut other = Node::start(steady.clone(), settings("/p", 2));
        let subnet = other.subnet().await;
        node.sees(&subnet).await;
        flaky.refuses.store(true, Ordering::SeqCst);
        node.move_to([192, 168, 0, 9].into());
        node.trouble("refuses: unknown service").await;
        assert_eq!(node.peers(), 1, "the known peers stay");
        flaky.refuses.store(false, Ordering::SeqCst);
        node.recovery().await;
        while !other.peer().await.ends_with("192.168.0.9") {}
    }

    /// A store that never answers.
    struct Silent;

    #[async_trait]
    impl Store for Silent {
        async fn execute(&self, _: Op) -> StoreResult<Answer> {
            pending().await
        }

        async fn watch(&self, _: &str, _: Revision) -> StoreResult<Box<dyn Watch>> {
            pending().await
        }

        fn describe(&self) -> String {
            "silent:".to_owned()
        }
    }

    #[tokio::test]
    async fn u05_a_task_that_waits_is_cancelled_at_once() {
        Node::start(Arc::new(Silent), settings("/p", 1))
            .cancel()
            .await;
        let directory = TempDir::new().unwrap();
        let mut node = Node::start(Flaky::new(&directory), settings("/p", 1));
        // Its receiver hears nothing of what comes after this.
        node.subnet().await;
        node.cancel().await;
    }

    #[tokio::test]
    async fn leaving_an_absent_store_fails_after_a_while() {
        let directory = TempDir::new().unwrap();
        let flaky = Flaky::new(&directory);
        let mut node = Node::start(flaky.clone(), settings("/p", 1));
        node.subnet().await;
        flaky.set_away(true);
        let error = node.leave_result().await.unwrap_err();
        assert!(error.to_string().contains("not given back"), "{error}");
        assert_eq!(error.exit_code(), 1);
    }

    #[tokio::test]
    async fn leaving_before_there_is_a_lease_ends_too() {
        let directory = TempDir::new().unwrap();
        let flaky = Flaky::new(&directory);
        flaky.set_away(true);
        Node::start(flaky.clone(), settings("/p", 1)).leave().await;
        flaky.set_away(false);
        for _ in 0..5 {
            Node::start(flaky.clone(), settings("/p", 1)).leave().await;
        }
        let Answer::Snapshot { entries, .. } = flaky
            .execute(Op::List("/p/subnets".to_owned()))
            .await
            .unwrap()
        else {
            panic!()
        };
        assert_eq!(entries, []);
    }
}
