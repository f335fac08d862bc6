//! The data path's reports. Its threads have packets to pass: the counters, which are
//! read most, they copy to a page that others read, and of their tables they copy only the one
//! requested. The reader adds up the values of several workers and sorts them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use muslin_stack::datapath::egress::{EgressCounters, FlowInfo};
use muslin_stack::datapath::neighbour::{Place, State};
use muslin_stack::datapath::peer::PeerState;
use muslin_stack::datapath::port::{PortId, Traffic};
use muslin_stack::datapath::wireguard::LinkState;
use muslin_stack::drops::Counters;
use muslin_stack::{Duration, Instant};
use tokio::sync::watch;

use super::Datapath;
use super::batches::Batches;
use super::output::Io;
use crate::underlay::{Backlog, TunnelSockets};

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
    /// How many of them there may be.
    pub flow_limit: u64,
    /// What went through the host interface, if there is one.
    pub host: Option<HostTraffic>,
    /// How much was done at once.
    pub batches: Batches,
    /// What waits in the tunnel's queues to be read.
    pub backlog: Backlog,
    /// How many peers there are.
    pub peers: usize,
    /// Whether trains of datagrams may leave.
    pub gso: bool,
    /// Whether they may arrive.
    pub gro: bool,
}

/// What went through the host interface.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostTraffic {
    /// Packets from the host.
    pub received: Traffic,
    /// Packets to the host.
    pub sent: Traffic,
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
    /// How it stands with their keys, if the tunnel is WireGuard.
    pub links: Vec<LinkState>,
}

/// What is known of an address: where it is, and since when.
pub type Neighbours = HashMap<IpAddr, (Option<Place>, State)>;

/// Who has joined which group, and how long that lasts if it is not said again.
pub type GroupTable = BTreeMap<(IpAddr, PortId), Duration>;

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
            flow_limit: view.path.egress().limits().flows as u64,
            host: node.host().map(|host| HostTraffic {
                received: host.received,
                sent: host.sent,
            }),
            batches: view.io.batches,
            backlog: tunnel.map(TunnelSockets::backlog).unwrap_or_default(),
            peers: node.peers().count(),
            gso: tunnel.is_some_and(TunnelSockets::has_gso),
            gro: tunnel.is_some_and(TunnelSockets::has_gro),
        }
    }

    /// Adds what another worker of the same node has to say.
    pub(super) fn add(&mut self, other: &Self) {
        self.counters.add(&other.counters);
        self.egress.add(&other.egress);
        self.flow_limit += other.flow_limit;
        if let (Some(host), Some(theirs)) = (&mut self.host, other.host) {
            host.received.add(theirs.received);
            host.sent.add(theirs.sent);
        }
        self.batches.add(&other.batches);
        self.backlog.add(other.backlog);
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
    pub(super) fn ask(&self) -> u64 {
        self.questions.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// What the worker has shown after that question; one answer does for all before it.
    pub(super) async fn read(&self, question: u64) -> Result<Totals, NoAnswer> {
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
}
