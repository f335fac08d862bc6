//! The data path's reports. Its threads have packets to pass: the counters, which are
//! read most, they copy to a page that others read, and of their tables they copy only the one
//! requested. The reader adds up the values of several workers and sorts them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ipnet::IpNet;
use muslin_stack::Instant;
use muslin_stack::datapath::Datapath;
use muslin_stack::datapath::egress::{Counters as EgressCounters, FlowInfo};
use muslin_stack::datapath::neighbour::{Place, State};
use muslin_stack::datapath::node::NextHop;
use muslin_stack::datapath::peer::PeerState;
use muslin_stack::datapath::port::{PortId, Traffic};
use muslin_stack::drops::Counters;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout_at;

use super::output::Io;
use super::{Command, Worker, Workers};
use crate::underlay::TunnelSocket;

/// How long an answer may take, which a thread gives when its turn is over.
const PATIENCE: Duration = Duration::from_secs(5);

/// A thread of the data path takes no turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a thread of the data path does not answer")]
pub struct NoAnswer;

/// What became of all packets and flows. What one worker says of itself is of one moment.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// All packets.
    pub counters: Counters,
    /// Flows to and from addresses outside the overlay.
    pub egress: EgressCounters,
    /// How many peers there are.
    pub peers: usize,
    /// Whether trains of datagrams may leave.
    pub gso: bool,
    /// Whether they may arrive.
    pub gro: bool,
}

/// What went through a port.
#[derive(Debug, Clone, Copy, Default)]
pub struct PortState {
    /// Frames from the pod.
    pub received: Traffic,
    /// Frames to the pod.
    pub sent: Traffic,
    /// Whether superpackets pass.
    pub offload: bool,
}

/// The peers at one moment.
#[derive(Debug, Clone)]
pub struct PeerStates {
    /// That moment.
    pub now: Instant,
    /// The peers, by their numbers.
    pub peers: Vec<PeerState>,
}

/// What is known of an address: where it is, and since when.
pub type Neighbours = HashMap<IpAddr, (Option<Place>, State)>;

/// Both neighbour tables at one moment.
#[derive(Debug, Clone)]
pub struct NeighbourTables {
    /// That moment.
    pub now: Instant,
    /// Pods, and who else is behind a port.
    pub pods: Neighbours,
    /// The hosts on the uplink's link.
    pub hosts: Neighbours,
}

/// Flows to and from addresses outside the overlay at one moment.
#[derive(Debug, Clone)]
pub struct FlowTable {
    /// That moment.
    pub now: Instant,
    /// The flows, in no particular order.
    pub flows: Vec<FlowInfo>,
}

/// What a worker can copy of.
pub(super) struct View<'a> {
    pub(super) now: Instant,
    pub(super) path: &'a Datapath,
    pub(super) io: &'a Io,
}

/// Copies a table for a waiting reader.
pub(super) type Question = Box<dyn FnOnce(&View<'_>) + Send>;

impl Totals {
    pub(super) fn of(view: &View<'_>) -> Self {
        let (node, tunnel) = (view.path.node(), view.io.underlay.tunnel.as_ref());
        Self {
            counters: node.counters().clone(),
            egress: view.path.egress().counters(),
            peers: node.peers().count(),
            gso: tunnel.is_some_and(TunnelSocket::has_gso),
            gro: tunnel.is_some_and(TunnelSocket::has_gro),
        }
    }

    /// Adds what another worker of the same node has to say.
    fn add(&mut self, other: &Self) {
        self.counters.add(&other.counters);
        self.egress.add(&other.egress);
        self.gso &= other.gso;
        self.gro &= other.gro;
    }
}

/// What is on a worker's page.
#[derive(Debug, Default)]
struct Shown {
    /// The last question that it answers.
    question: u64,
    totals: Totals,
}

/// A worker's page for who reads it.
#[derive(Debug)]
pub(super) struct Page {
    questions: Arc<AtomicU64>,
    shown: watch::Receiver<Shown>,
}

/// A worker's page for the worker.
#[derive(Debug)]
pub(super) struct PageWriter {
    questions: Arc<AtomicU64>,
    answered: u64,
    shown: watch::Sender<Shown>,
}

/// A page with nothing on it yet.
pub(super) fn page() -> (PageWriter, Page) {
    let (sender, receiver) = watch::channel(Shown::default());
    let questions = Arc::<AtomicU64>::default();
    let writer = PageWriter {
        questions: questions.clone(),
        answered: 0,
        shown: sender,
    };
    let page = Page {
        questions,
        shown: receiver,
    };
    (writer, page)
}

impl Page {
    /// Asks for the counters as they are from now on. The worker is to be woken then.
    fn ask(&self) -> u64 {
        self.questions.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// What the worker has shown after that question; one answer does for all before it.
    async fn read(&self, question: u64) -> Result<Totals, NoAnswer> {
        let mut shown = self.shown.clone();
        let shown = shown.wait_for(|shown| shown.question >= question).await;
        shown
            .map(|shown| shown.totals.clone())
            .map_err(|_| NoAnswer)
    }
}

impl PageWriter {
    /// Whether a reader waits for the page.
    pub(super) fn is_asked(&self) -> bool {
        self.questions.load(Ordering::Relaxed) != self.answered
    }

    /// Puts on it what is so at this moment, of which the questions until now are answered.
    pub(super) fn show(&mut self, totals: Totals) {
        // Who asks meanwhile is content with it: nothing has been counted since.
        self.answered = self.questions.load(Ordering::Acquire);
        self.shown.send_replace(Shown {
            question: self.answered,
            totals,
        });
    }
}

impl Workers {
    /// What became of all packets and flows until now.
    ///
    /// # Errors
    /// If one of the workers does not answer.
    pub async fn totals(&self) -> Result<Totals, NoAnswer> {
        let questions = self.0.iter().map(|worker| {
            let question = worker.page.ask();
            let _ = worker.wake.write(1);
            (&worker.page, question)
        });
        let questions: Vec<_> = questions.collect();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut whole: Option<Totals> = None;
        for (page, question) in questions {
            let read = timeout_at(deadline, page.read(question)).await;
            let totals = read.map_err(|_| NoAnswer)??;
            match &mut whole {
                None => whole = Some(totals),
                Some(whole) => whole.add(&totals),
            }
        }
        whole.ok_or(NoAnswer)
    }

    /// What went through the ports.
    ///
    /// # Errors
    /// If one of the workers does not answer.
    pub async fn ports(&self) -> Result<HashMap<PortId, PortState>, NoAnswer> {
        let copy = |view: &View<'_>| {
            let ports = view.path.node().ports().map(|(id, port)| {
                let state = PortState {
                    received: port.received,
                    sent: port.sent,
                    offload: view.io.takes_superpackets(id),
                };
                (id, state)
            });
            ports.collect::<Vec<_>>()
        };
        let mut all = self.copy(copy).await?.into_iter();
        let mut ports: HashMap<_, _> = all.next().into_iter().flatten().collect();
        for (id, theirs) in all.flatten() {
            if let Some(port) = ports.get_mut(&id) {
                port.received.add(theirs.received);
                port.sent.add(theirs.sent);
            }
        }
        Ok(ports)
    }

    /// The peers, and what went to and came from each.
    ///
    /// # Errors
    /// If one of the workers does not answer.
    pub async fn peers(&self) -> Result<PeerStates, NoAnswer> {
        let copy = |view: &View<'_>| PeerStates {
            now: view.now,
            peers: view.path.node().peers().collect(),
        };
        let mut all = self.copy(copy).await?.into_iter();
        let mut whole = all.next().ok_or(NoAnswer)?;
        let peers = whole.peers.iter_mut();
        let mut peers: HashMap<_, _> = peers.map(|state| (state.peer.id, state)).collect();
        for theirs in all {
            whole.now = whole.now.max(theirs.now);
            for theirs in theirs.peers {
                if let Some(state) = peers.get_mut(&theirs.peer.id) {
                    state.received.add(theirs.received);
                    state.sent.add(theirs.sent);
                    state.heard = state.heard.max(theirs.heard);
                }
            }
        }
        Ok(whole)
    }

    /// The route table, by prefix.
    ///
    /// # Errors
    /// If a worker does not answer.
    pub async fn routes(&self) -> Result<Vec<(IpNet, NextHop)>, NoAnswer> {
        let copy = |view: &View<'_>| {
            let routes = view.path.node().routes();
            routes
                .map(|(prefix, next)| (prefix, *next))
                .collect::<Vec<_>>()
        };
        // All have the same.
        let first = self.0.get(..1).ok_or(NoAnswer)?;
        let mut routes: Vec<_> = copy_of(first, copy).await?.concat();
        routes.sort_unstable_by_key(|(prefix, _)| *prefix);
        Ok(routes)
    }

    /// The neighbour tables.
    ///
    /// # Errors
    /// If one of the workers does not answer.
    pub async fn neighbours(&self) -> Result<NeighbourTables, NoAnswer> {
        let copy = |view: &View<'_>| {
            let node = view.path.node();
            let (pods, hosts) = (node.neighbours().collect(), node.next_hops().collect());
            (view.now, pods, hosts)
        };
        let all: Vec<(_, Vec<_>, Vec<_>)> = self.copy(copy).await?;
        let (mut pods, mut hosts) = (Neighbours::new(), Neighbours::new());
        let mut now = Instant::ZERO;
        for (moment, of_pods, of_hosts) in all {
            now = now.max(moment);
            add_known(&mut pods, of_pods);
            add_known(&mut hosts, of_hosts);
        }
        Ok(NeighbourTables { now, pods, hosts })
    }

    /// The flows to and from addresses outside the overlay.
    ///
    /// # Errors
    /// If one of the workers does not answer.
    pub async fn flows(&self) -> Result<FlowTable, NoAnswer> {
        let copy = |view: &View<'_>| (view.now, view.path.egress().flows().collect());
        let all: Vec<(_, Vec<_>)> = self.copy(copy).await?;
        let now = all.iter().map(|(now, _)| *now).max().ok_or(NoAnswer)?;
        let flows = all.into_iter().flat_map(|(_, flows)| flows).collect();
        Ok(FlowTable { now, flows })
    }

    /// What each worker copies.
    async fn copy<T: Send + 'static>(&self, copy: fn(&View<'_>) -> T) -> Result<Vec<T>, NoAnswer> {
        copy_of(&self.0, copy).await
    }
}

async fn copy_of<T: Send + 'static>(
    workers: &[Worker],
    copy: fn(&View<'_>) -> T,
) -> Result<Vec<T>, NoAnswer> {
    let answers = workers.iter().map(|worker| {
        let (sender, receiver) = oneshot::channel();
        let question: Question = Box::new(move |view| {
            // Whoever asked may have gone.
            let _ = sender.send(copy(view));
        });
        let told = worker.send(Command::Copy(question));
        told.map(|()| receiver).map_err(|_| NoAnswer)
    });
    let answers = answers.collect::<Result<Vec<_>, _>>()?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut all = Vec::new();
    for answer in answers {
        let answer = timeout_at(deadline, answer).await;
        all.push(answer.map_err(|_| NoAnswer)?.map_err(|_| NoAnswer)?);
    }
    Ok(all)
}

/// Adds what another worker knows and others do not.
fn add_known(
    all: &mut Neighbours,
    theirs: impl IntoIterator<Item = (IpAddr, Option<Place>, State)>,
) {
    for (address, place, state) in theirs {
        let is_known = |known: &(Option<Place>, _)| known.0.is_some();
        if !all.get(&address).is_some_and(is_known) {
            all.insert(address, (place, state));
        }
    }
}

#[cfg(test)]
mod tests {
    use muslin_stack::drops::DropReason;

    use super::*;

    fn totals(received: u64, delivered: u64, lost: u64) -> Totals {
        let mut totals = Totals::default();
        totals.counters.received = received;
        totals.counters.delivered = delivered;
        totals.counters.drop_many(DropReason::NoRoute, lost);
        totals
    }

    #[tokio::test]
    async fn a_page_answers_all_questions_before_it() {
        let (mut writer, page) = page();
        assert!(!writer.is_asked());
        let (first, second) = (page.ask(), page.ask());
        assert!(writer.is_asked());
        writer.show(totals(3, 2, 1));
        assert!(!writer.is_asked());
        for question in [first, second] {
            let read = page.read(question).await.unwrap();
            assert_eq!((read.counters.received, read.counters.delivered), (3, 2));
        }

        // What was shown before says nothing of now.
        let third = page.ask();
        let (read, ()) = tokio::join!(page.read(third), async {
            tokio::task::yield_now().await;
            writer.show(totals(5, 4, 1));
        });
        assert_eq!(read.unwrap().counters.received, 5);
        let fourth = page.ask();
        drop(writer);
        assert_eq!(page.read(fourth).await.unwrap_err(), NoAnswer);
    }

    #[test]
    fn workers_add_up_to_a_node_that_loses_nothing_uncounted() {
        let mut whole = totals(3, 2, 1);
        whole.add(&totals(10, 6, 4));
        let counters = &whole.counters;
        let dropped: u64 = counters.drops().map(|(_, count)| count).sum();
        assert_eq!(counters.received, counters.delivered + dropped);
        assert_eq!((counters.received, dropped), (13, 5));
    }

    #[test]
    fn a_neighbour_is_where_any_worker_knows_it_to_be() {
        let address = IpAddr::from([10, 244, 1, 2]);
        let unknown = State::Incomplete {
            tries: 1,
            due: Instant::ZERO,
        };
        let place = Place {
            mac: smoltcp::wire::EthernetAddress([2, 0, 0, 0, 0, 1]),
            port: PortId(1),
        };
        let known = (address, Some(place), State::Permanent);
        for tables in [
            [(address, None, unknown), known],
            [known, (address, None, unknown)],
        ] {
            let mut all = Neighbours::new();
            tables.into_iter().for_each(|it| add_known(&mut all, [it]));
            assert_eq!(all[&address], (Some(place), State::Permanent));
        }
    }
}
