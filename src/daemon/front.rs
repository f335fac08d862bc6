//! The node's side of the control socket from its start on: until it has its lease it says what it
//! waits for, and then its pods and tables are asked for here.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use muslin_stack::api::capture::Capture;
use muslin_stack::api::cni;
use muslin_stack::api::control::{
    Attach, Attached, Code, ControlSocket, DropLease, Dropped, Link, Namespace, PodNamespaces,
    Table, Welcome,
};
use muslin_stack::api::events::Event;
use muslin_stack::api::live;
use muslin_stack::api::trace;
use muslin_stack::control::ipam::PodName;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::sleep;

use super::capture;
use super::cni::Session;
use super::metrics::Vitals;
use super::report;
use super::running::{Attachment, RunningNode};
use crate::condition;
use crate::control::{Connection, Level, Service, Stage};
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::lease::Turn;
use crate::takeover::Estate;

/// Time that the shutdown waits for answers to clients.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long a client waits for events until it has to ask again. It is less than clients wait for an
/// answer.
const EVENTS_PATIENCE: Duration = Duration::from_secs(15);

/// A node as its clients see it.
pub(super) struct Front {
    pub(super) name: String,
    queues: AtomicUsize,
    sockets: Vec<(PathBuf, Level)>,
    pub(super) condition: watch::Receiver<condition::State>,
    running: OnceLock<Arc<RunningNode>>,
    leave: watch::Sender<bool>,
    /// How the node ended, as far as it has.
    finished: watch::Sender<Option<std::result::Result<(), String>>>,
    /// Whether clients are answered: this process is the node.
    is_open: AtomicBool,
    /// What another process begins with that takes the node over.
    pub(super) estate: Estate,
    /// Whether one does.
    pub(super) stage: watch::Sender<Stage>,
    /// Whether the flows have ended that stayed here.
    pub(super) served: watch::Sender<bool>,
    /// The right to write to the store.
    pub(super) turn: Turn,
    /// What is known of the store and the lease.
    pub(super) vitals: Vitals,
    /// What ends when another process is the node.
    tasks: Mutex<Vec<AbortHandle>>,
    /// What happened.
    pub(super) journal: Journal,
}

impl Front {
    /// That of a node with so many queues for each pod which listens at these sockets; `leave` takes
    /// that a client requests it to leave.
    pub(super) fn new(
        name: String,
        queues: usize,
        sockets: Vec<(PathBuf, Level)>,
        condition: watch::Receiver<condition::State>,
        leave: watch::Sender<bool>,
        estate: Estate,
        journal: Journal,
    ) -> Self {
        Self {
            name,
            queues: queues.into(),
            sockets,
            condition,
            running: OnceLock::new(),
            leave,
            finished: watch::Sender::new(None),
            is_open: AtomicBool::new(false),
            estate,
            stage: watch::Sender::new(Stage::Here),
            served: watch::Sender::new(false),
            turn: Turn::default(),
            vitals: Vitals::default(),
            tasks: Mutex::default(),
            journal,
        }
    }

    /// The node's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Each pod is to have so many queues.
    pub(super) fn set_queues(&self, queues: usize) {
        self.queues.store(queues, Ordering::Relaxed);
    }

    /// Clients are answered from now on.
    pub(super) fn set_open(&self) {
        self.is_open.store(true, Ordering::Relaxed);
    }

    /// Does something for as long as this process is the node.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        let task = tokio::spawn(task);
        self.tasks.lock().push(task.abort_handle());
        task
    }

    /// Returns when another process is the node.
    pub(super) async fn gone(&self) {
        let mut stage = self.stage.subscribe();
        // The sender lives as long as this.
        let _ = stage.wait_for(|stage| matches!(stage, Stage::Gone)).await;
    }

    fn is_gone(&self) -> bool {
        matches!(*self.stage.borrow(), Stage::Gone)
    }

    /// Ends what is the other process' now, and serves flows until they have ended.
    pub(super) async fn stay_for_flows(&self) {
        for task in self.tasks.lock().drain(..) {
            task.abort();
        }
        let mut served = self.served.subscribe();
        let _ = served.wait_for(|served| *served).await;
    }

    /// Where it listens.
    pub(super) fn sockets(&self) -> Vec<ControlSocket> {
        let sockets = self.sockets.iter();
        let told = sockets.map(|(path, level)| ControlSocket {
            path: path.display().to_string(),
            allows: level.name().to_owned(),
        });
        told.collect()
    }

    /// The node, if it has its lease.
    pub(super) fn running(&self) -> Option<&Arc<RunningNode>> {
        self.running.get()
    }

    /// The node has its lease. Whether it had none before.
    pub(super) fn serve(&self, running: Arc<RunningNode>) -> bool {
        self.running.set(running).is_ok()
    }

    /// Tells those who asked the node to leave how it went, and removes what clients could find
    /// of a node that has ended.
    pub(super) async fn finish(&self, result: &Result<()>) {
        if let Some(running) = self.running() {
            running.workers.stop();
        }
        if !self.is_open.load(Ordering::Relaxed) || self.is_gone() {
            // They are another process'.
            return;
        }
        for (socket, _) in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
        let told = result.as_ref().copied().map_err(ToString::to_string);
        self.finished.send_replace(Some(told));
        // A task that has its answer sends it before this one goes on.
        let _ = tokio::time::timeout(FAREWELL, self.finished.closed()).await;
    }

    fn ready(&self) -> Result<&Arc<RunningNode>> {
        self.running()
            .ok_or_else(|| Error::refused(Code::NotReady, self.obstacle()))
    }

    /// Why there are no pods and tables yet.
    fn obstacle(&self) -> String {
        let name = &self.name;
        match self.condition.borrow().trouble() {
            Some(trouble) => format!("the node {name} has no lease yet: {trouble}"),
            None => format!("the node {name} has no lease yet"),
        }
    }
}

impl Service for Front {
    type Attachment = Attachment;
    type Session = Session;

    fn welcome(&self) -> Welcome {
        let mut welcome = Welcome::new(
            env!("CARGO_PKG_VERSION"),
            &self.name,
            self.queues.load(Ordering::Relaxed),
        );
        welcome.not_ready = match self.running() {
            Some(_) => None,
            None => Some(self.obstacle()),
        };
        welcome
    }

    async fn attach(
        &self,
        request: Attach,
        device: Vec<OwnedFd>,
    ) -> Result<(Attached, Option<Attachment>)> {
        self.ready()?.attach(request, device).await
    }

    fn keep_namespaces(
        &self,
        pod: &PodName,
        kinds: Vec<Namespace>,
        namespaces: Vec<OwnedFd>,
    ) -> Result<()> {
        self.ready()?.keep_namespaces(pod, kinds, namespaces)
    }

    fn namespaces(&self, pod: &PodName) -> Result<(PodNamespaces, Arc<[OwnedFd]>)> {
        self.ready()?.namespaces(pod)
    }

    fn link(&self) -> Result<watch::Receiver<Link>> {
        Ok(self.ready()?.link())
    }

    async fn detach(&self, pod: &PodName) -> Result<()> {
        self.ready()?.detach(pod).await
    }

    async fn release(&self, attachment: Attachment) {
        drop(attachment);
        if let Some(running) = self.running() {
            running.closed().await;
        }
    }

    async fn cni(
        &self,
        call: cni::Call,
        device: Vec<OwnedFd>,
        session: &mut Session,
    ) -> Result<cni::Reply> {
        self.ready()?.cni(call, device, session).await
    }

    fn capture(&self, request: Capture, stream: Vec<OwnedFd>) -> Result<()> {
        let running = self.ready()?;
        let ready = capture::prepare(running, &request, stream)?;
        self.spawn(capture::run(running.clone(), ready));
        Ok(())
    }

    async fn trace(&self, question: trace::Question) -> Result<trace::Part> {
        super::trace::part(self.ready()?, question).await
    }

    async fn live(&self, call: live::Call) -> Result<live::Told> {
        super::live::call(self.ready()?, call).await
    }

    async fn report(&self, table: Table) -> Result<Vec<serde_json::Value>> {
        match table {
            // There are some before there is a lease.
            Table::Events => report::values(self.journal.events()),
            table => report::rows(self.ready()?, table).await,
        }
    }

    async fn await_events(&self, after: u64) -> Vec<Event> {
        let mut stage = self.stage.subscribe();
        tokio::select! {
            events = self.journal.after(after) => events,
            // Nobody else sees whether the client is still there.
            () = sleep(EVENTS_PATIENCE) => Vec::new(),
            // Another process waits for this one's clients.
            _ = stage.wait_for(|stage| !matches!(stage, Stage::Here)) => Vec::new(),
        }
    }

    async fn drop_lease(&self, request: DropLease) -> Result<Dropped> {
        self.ready()?.drop_lease(request).await
    }

    async fn leave(&self) -> Result<()> {
        if let Some(running) = self.running() {
            running.check_leaving()?;
        }
        let mut finished = self.finished.subscribe();
        self.leave.send_replace(true);
        let result = finished
            .wait_for(Option::is_some)
            .await
            .map_err(Error::failed)?;
        match &*result {
            Some(Err(reason)) => Err(Error::failed(reason)),
            Some(Ok(())) | None => Ok(()),
        }
    }

    fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    async fn hand_over(&self, version: u32, connection: &Connection) -> Result<()> {
        self.hand_over_to(version, connection).await
    }

    fn take_again(&self, pod: &PodName) -> Option<Attachment> {
        self.running()?.take_again(pod)
    }
}
