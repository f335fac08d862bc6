//! What a node tells Prometheus: its reports as metrics, which `docs/metrics.md` lists.
//!
//! Nothing is measured for it. The threads that pass packets copy their counters as they do for `muslin
//! status`, at most once in [`FRESH`] however many ask.

mod families;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use muslin_stack::api::control::{Peer, Pod};
use muslin_stack::datapath::peer::PeerId;
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

use super::front::Front;
use super::liveness::Census;
use super::report;
use super::running::RunningNode;
use crate::condition;
use crate::error::{Error, Result};
use crate::http::metrics::Source;
use crate::metrics::{Family, Format, MOST, Shares, process, workers};
use crate::store::Timings;
use crate::worker::Totals;

/// How long an answer is good for others who ask.
const FRESH: Duration = Duration::from_secs(1);
/// How long peers are not asked again whether they are alive.
const ALIVE: Duration = Duration::from_secs(10);
/// How long threads and peers may take for their answers: less than who asks may wait.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is known of a node's store and lease.
#[derive(Debug, Clone, Default)]
pub(super) struct Vitals {
    /// How long the store takes.
    pub(super) timings: Timings,
    /// When the lease ends, by the node's clock.
    pub(super) lease_ends: watch::Sender<Option<muslin_stack::Instant>>,
}

/// Answers Prometheus.
#[derive(Clone)]
pub(super) struct Exporter {
    front: Arc<Front>,
    condition: watch::Receiver<condition::State>,
    memory: Arc<Mutex<Memory>>,
}

/// What is kept from one answer to the next.
struct Memory {
    /// The last answer.
    last: Option<(Instant, Arc<Vec<Family>>)>,
    pods: Shares,
    peers: Shares,
    /// Who has answered when peers were asked last.
    answered: Option<(Instant, HashSet<PeerId>)>,
}

/// The tables of a node that runs.
struct Tables {
    totals: Totals,
    pods: Vec<Pod>,
    peers: Vec<Peer>,
    census: Census,
}

impl Tables {
    /// Those of this moment. Peers are asked whether they are alive unless it is known who has answered.
    async fn read(running: &RunningNode, answered: Option<HashSet<PeerId>>) -> Result<Self> {
        let workers = &running.workers;
        let both = tokio::try_join!(workers.totals(), workers.ports());
        let (totals, ports) = both.map_err(Error::failed)?;
        let census = match answered {
            Some(answered) => Census::knowing(running, answered).await?,
            None => Census::take(running).await?,
        };
        Ok(Self {
            totals,
            pods: report::pods(running, &ports),
            peers: report::peers(running, &census),
            census,
        })
    }
}

impl Exporter {
    pub(super) fn new(front: Arc<Front>, condition: watch::Receiver<condition::State>) -> Self {
        let memory = Memory {
            last: None,
            pods: Shares::new(MOST),
            peers: Shares::new(MOST),
            answered: None,
        };
        Self {
            front,
            condition,
            memory: Arc::new(Mutex::new(memory)),
        }
    }

    /// All metrics as they are now.
    async fn gather(&self, memory: &mut Memory) -> Vec<Family> {
        let running = self.front.running().map(Arc::as_ref);
        let tables = match running {
            Some(running) => memory.read_tables(running).await,
            None => None,
        };
        let (front, tables) = (&self.front, tables.as_ref());
        let parts = [
            families::node(front.name(), running),
            families::health(&self.condition.borrow()),
            families::lease(&front.vitals, running),
            families::store(&front.vitals.timings),
            families::data_path(running, tables),
            families::packets(tables),
            families::batches(tables),
            families::pods(&mut memory.pods, tables),
            families::peers(&mut memory.peers, tables),
            families::host(tables),
            families::egress(tables),
            families::dns(running),
            vec![workers()],
            process(),
        ];
        parts.into_iter().flatten().collect()
    }
}

impl Memory {
    /// The node's tables, if its threads answer in time.
    async fn read_tables(&mut self, running: &RunningNode) -> Option<Tables> {
        let answered = self.answered.as_ref();
        let answered = answered.filter(|(when, _)| when.elapsed() < ALIVE);
        let answered = answered.map(|(_, who)| who.clone());
        let is_new = answered.is_none();
        let read = timeout(PATIENCE, Tables::read(running, answered)).await;
        let tables = read.ok()?.ok()?;
        if is_new {
            self.answered = Some((Instant::now(), tables.census.answered.clone()));
        }
        Some(tables)
    }
}

impl Source for Exporter {
    async fn scrape(&self, format: Format) -> std::result::Result<String, fmt::Error> {
        // One at a time; who has waited gets what the one before got.
        let mut memory = self.memory.lock().await;
        let last = memory.last.as_ref();
        let families = match last.filter(|(when, _)| when.elapsed() < FRESH) {
            Some((_, families)) => families.clone(),
            None => {
                let families = Arc::new(self.gather(&mut memory).await);
                memory.last = Some((Instant::now(), families.clone()));
                families
            }
        };
        drop(memory);
        format.write(families)
    }
}
