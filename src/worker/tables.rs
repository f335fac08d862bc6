//! The reader's side of reports: what all workers have, added up.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use muslin_encap::offload::virtio::Header;
use muslin_stack::Instant;
use muslin_stack::datapath::neighbour::{Place, State};
use muslin_stack::datapath::node::NextHop;
use muslin_stack::datapath::port::PortId;
use muslin_stack::datapath::trace::{Entrance, Trace};
use tokio::sync::oneshot;
use tokio::time::timeout_at;

use super::message::Command;
use super::report::{
    FlowTable, GroupTable, NeighbourTables, Neighbours, NoAnswer, PeerStates, PortState, Question,
    Totals, View,
};
use super::{Worker, Workers};

/// How long an answer may take, which a thread gives when its turn is over.
const PATIENCE: Duration = Duration::from_secs(5);

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
            links: view.io.links().collect(),
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

    /// The groups that pods have joined.
    ///
    /// # Errors
    /// If one of the workers does not answer.
    pub async fn groups(&self) -> Result<GroupTable, NoAnswer> {
        let copy = |view: &View<'_>| view.path.node().groups(view.now).collect();
        let all: Vec<Vec<_>> = self.copy(copy).await?;
        let mut whole = GroupTable::new();
        // All are told the same, one after the other.
        for (group, port, left) in all.into_iter().flatten() {
            let known = whole.entry((group, port)).or_insert(left);
            *known = left.max(*known);
        }
        Ok(whole)
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

    /// What would become of a packet that came in now, as one of the workers has it.
    ///
    /// # Errors
    /// If that does not answer.
    pub async fn trace(&self, entrance: Entrance, packet: Vec<u8>) -> Result<Trace, NoAnswer> {
        let first = self.0.get(..1).ok_or(NoAnswer)?;
        let trace = move |view: &View<'_>| {
            let offload = Header::default();
            view.path.trace(view.now, entrance, &packet, offload)
        };
        copy_of(first, trace).await?.pop().ok_or(NoAnswer)
    }

    /// What each worker copies.
    async fn copy<T: Send + 'static>(&self, copy: fn(&View<'_>) -> T) -> Result<Vec<T>, NoAnswer> {
        copy_of(&self.0, copy).await
    }
}

async fn copy_of<T: Send + 'static>(
    workers: &[Worker],
    copy: impl Fn(&View<'_>) -> T + Clone + Send + 'static,
) -> Result<Vec<T>, NoAnswer> {
    let answers = workers.iter().map(|worker| {
        let (sender, receiver) = oneshot::channel();
        let copy = copy.clone();
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
    use super::*;

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
