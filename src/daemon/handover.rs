//! A node that another process takes over (see [`crate::takeover`]): the end of the process that has
//! run it until now.

use std::collections::{BTreeSet, HashSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use muslin_stack::api::control::Code;
use muslin_stack::api::events::EventKind;
use muslin_stack::control::ipam::PodName;
use muslin_stack::datapath::egress::FlowKey;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::front::Front;
use super::pods::Pod;
use super::running::RunningNode;
use super::underlay;
use crate::control::{Connection, Departing, Stage};
use crate::device::FrameSocket;
use crate::error::{Context, Error, Result};
use crate::takeover::{
    About, Demand, FLOWS_PATIENCE, Flow, LEASE_PATIENCE, PATIENCE, Part, PodState, VERSION,
};
use crate::terminal::quantity::count;
use crate::worker::Holdings;

/// How long container runtimes have to complete what they have begun, and clients to be told of.
const SETTLING: Duration = Duration::from_secs(2);
/// How often it is looked at that.
const LOOK: Duration = Duration::from_millis(2);
/// How often it is looked at whether flows have ended.
const FLOWS_LOOK: Duration = Duration::from_millis(500);
/// Flows, or hosts, in one message.
const ROWS: usize = 400;

impl Front {
    /// Hands the node over to the process at the other end of a connection. Once nothing is read any
    /// more, and that process runs, this one serves its flows to their end.
    pub(super) async fn hand_over_to(&self, version: u32, connection: &Connection) -> Result<()> {
        if version != VERSION {
            return Err(Error::refused(
                Code::WrongVersion,
                format!(
                    "it hands a node over in version {VERSION}, and the other program takes one in \
                     version {version}: stop this node and start the other"
                ),
            ));
        }
        let running = self.running().ok_or_else(|| {
            let message = "it has no lease yet: stop it and start the other";
            Error::refused(Code::NotReady, message)
        })?;
        // Nobody else writes to the store from now on. Only one can have it.
        let turn = timeout(PATIENCE, self.turn.clone().write_owned()).await;
        let _turn = turn.map_err(|_| {
            let message = "it is waiting for its store, or another process takes it over";
            Error::refused(Code::Busy, message)
        })?;
        self.prepare(running, connection).await?;
        let demand = timeout(LEASE_PATIENCE, connection.receive::<Demand>()).await;
        if !matches!(demand, Ok(Ok(Some((Demand::Switch, _))))) {
            let text = "another process wanted to take this node over, and did not";
            self.note_failed_take_over(text);
            return Ok(());
        }
        match self.switch(running, connection).await {
            Ok(flows) => self.serve_flows(running, connection, flows).await,
            Err(error) => {
                self.go_on(running);
                let text = format!("another process did not take this node over: {error}");
                self.note_failed_take_over(&text);
            }
        }
        Ok(())
    }

    fn note_failed_take_over(&self, text: &str) {
        self.journal
            .note(EventKind::TakeOverFailed, &self.name, text);
    }

    /// Sends what the other process needs to get the lease.
    async fn prepare(&self, running: &RunningNode, connection: &Connection) -> Result<()> {
        let (facts, plan) = (&running.facts, running.plan());
        let about = About {
            subnet: facts.subnets,
            backend: facts.config.backend.name().to_owned(),
            end: underlay::end_v4(&plan, &running.interface()),
            end_v6: underlay::end_v6(&plan, &running.interface()),
            is_direct: plan.is_direct,
            workers: facts.settings.workers,
        };
        let lock: Vec<_> = self.estate.lock.iter().map(AsFd::as_fd).collect();
        send(connection, &Part::Node(Box::new(about)), &lock).await?;
        for (door, listener) in &self.estate.doors {
            send(connection, &Part::Door(*door), &[listener.as_fd()]).await?;
        }
        send(connection, &Part::Prepared, &[]).await
    }

    /// Stops to read, sends everything, and waits until the other process runs. Returns the flows that
    /// stay.
    async fn switch(
        &self,
        running: &Arc<RunningNode>,
        connection: &Connection,
    ) -> Result<HashSet<FlowKey>> {
        running.leaving.store(true, Ordering::Relaxed);
        let (departures, departing) = mpsc::unbounded_channel();
        self.stage.send_replace(Stage::Leaving(departures));
        let clients = settle(running, departing).await;
        running.frozen.store(true, Ordering::Relaxed);
        let holdings = running.workers.suspend().await;
        let holdings = holdings.context("cannot copy what the workers read")?;
        send_workers(connection, &holdings).await?;
        let pods: Vec<_> = {
            let pods = running.pods.lock();
            let pods = pods.iter();
            pods.map(|(name, pod)| (name.clone(), pod.clone()))
                .collect()
        };
        for (name, pod) in &pods {
            send_pod(connection, (name, pod), &holdings).await?;
        }
        for client in &clients {
            let part = Part::Client {
                hello: client.hello.clone(),
                level: client.level,
                pods: client.pods.clone(),
            };
            send(connection, &part, &[client.socket.as_fd()]).await?;
        }
        let flows = holdings.iter().flat_map(|it| it.flows.iter().copied());
        let flows: HashSet<_> = flows.collect();
        for part in parts(flows.iter().map(|key| Flow::from(*key))) {
            send(connection, &Part::Flows(part), &[]).await?;
        }
        let (ours, theirs) = FrameSocket::pair().context("cannot make a channel for flows")?;
        send(connection, &Part::Stopped, &[theirs.as_fd()]).await?;
        drop(theirs);
        let answer = timeout(PATIENCE, connection.receive::<Demand>()).await;
        match answer {
            Ok(Ok(Some((Demand::Running, _)))) => {}
            _ => return Err(Error::failed("it has ended")),
        }
        // It cannot be undone from here on.
        self.stage.send_replace(Stage::Gone);
        if let Err(error) = running.workers.drain(ours) {
            warn!("flows to and from outside addresses are cut: {error}");
        }
        Ok(flows)
    }

    /// Goes on as before.
    fn go_on(&self, running: &RunningNode) {
        running.leaving.store(false, Ordering::Relaxed);
        running.frozen.store(false, Ordering::Relaxed);
        if let Err(error) = running.workers.read() {
            debug!("{error}");
        }
        self.stage.send_replace(Stage::Here);
    }

    /// Tells the other process which flows end, until all have, or it is time.
    async fn serve_flows(
        &self,
        running: &RunningNode,
        connection: &Connection,
        mut flows: HashSet<FlowKey>,
    ) {
        let what = count(flows.len() as u64, "flow");
        info!("another process has taken this node over; this one serves {what} to the end");
        let until = Instant::now() + FLOWS_PATIENCE;
        while !flows.is_empty() && Instant::now() < until {
            sleep(FLOWS_LOOK).await;
            let Ok(table) = running.workers.flows().await else {
                break;
            };
            let open: HashSet<_> = table.flows.iter().map(|flow| flow.key).collect();
            let ended: Vec<_> = flows
                .difference(&open)
                .map(|key| Flow::from(*key))
                .collect();
            flows.retain(|key| open.contains(key));
            for part in parts(ended.into_iter()) {
                if send(connection, &Part::Ended(part), &[]).await.is_err() {
                    return self.end();
                }
            }
        }
        if !flows.is_empty() {
            let what = count(flows.len() as u64, "flow");
            warn!("{what} to and from outside addresses have not ended in time, and are cut");
        }
        self.end();
    }

    fn end(&self) {
        self.served.send_replace(true);
    }
}

/// Waits until container runtimes have completed what they have begun, and returns the clients with
/// whose connections pods end.
async fn settle(
    running: &RunningNode,
    mut departing: mpsc::UnboundedReceiver<Departing>,
) -> Vec<Departing> {
    let until = Instant::now() + SETTLING;
    while running.cni.lock().is_reserving() && Instant::now() < until {
        sleep(LOOK).await;
    }
    let bound = |pods: &super::pods::Pods| {
        let pods = pods.iter().filter(|(_, pod)| !pod.details.persistent);
        pods.map(|(name, _)| name.clone()).collect::<BTreeSet<_>>()
    };
    let mut awaited = bound(&running.pods.lock());
    let mut clients = Vec::new();
    while !awaited.is_empty() {
        let Ok(Some(client)) = tokio::time::timeout_at(until, departing.recv()).await else {
            let names: Vec<_> = awaited.iter().map(PodName::as_str).collect();
            warn!(
                "the clients of {} have to attach them again",
                names.join(", ")
            );
            break;
        };
        for pod in &client.pods {
            awaited.remove(pod);
        }
        clients.push(client);
    }
    clients
}

async fn send_workers(connection: &Connection, holdings: &[Holdings]) -> Result<()> {
    for held in holdings {
        if let Some(tunnel) = &held.tunnel {
            let all = tunnel.queues.iter().chain(&tunnel.others);
            let beside: Vec<_> = all.map(AsFd::as_fd).collect();
            let queues = tunnel.queues.len();
            send(connection, &Part::Tunnel { queues }, &beside).await?;
        }
        if let Some(uplink) = &held.uplink {
            let beside: Vec<_> = uplink.iter().map(AsFd::as_fd).collect();
            send(connection, &Part::Uplink, &beside).await?;
        }
    }
    for queue in holdings.iter().filter_map(|held| held.host.as_ref()) {
        send(connection, &Part::Host, &[queue.as_fd()]).await?;
    }
    let hosts = holdings.iter().flat_map(|held| &held.next_hops);
    for part in parts(hosts.map(|(host, mac)| (*host, mac.0))) {
        send(connection, &Part::NextHops(part), &[]).await?;
    }
    Ok(())
}

async fn send_pod(
    connection: &Connection,
    (name, pod): (&PodName, &Pod),
    holdings: &[Holdings],
) -> Result<()> {
    let queues = holdings.iter().flat_map(|held| &held.ports);
    let queues = queues.filter(|(port, _)| *port == pod.port);
    let queues: Vec<_> = queues.map(|(_, queue)| queue.as_fd()).collect();
    if queues.is_empty() {
        // Its device is missing; a container runtime brings it.
        return Ok(());
    }
    let state = PodState {
        name: name.clone(),
        address: pod.address,
        mac: pod.mac.0,
        aliases: pod.aliases.clone(),
        persistent: pod.details.persistent,
        attachment: pod.details.attachment.clone(),
    };
    send(connection, &Part::Pod(Box::new(state)), &queues).await?;
    let published = holdings.iter().flat_map(|held| &held.published);
    for (_, mapping, socket) in published.filter(|(port, ..)| *port == pod.port) {
        let part = Part::Published(*mapping);
        send(connection, &part, &[socket.as_fd()]).await?;
    }
    if let Some((kinds, namespaces)) = &pod.details.namespaces {
        let beside: Vec<_> = namespaces.iter().map(AsFd::as_fd).collect();
        let part = Part::Namespaces(kinds.clone());
        send(connection, &part, &beside).await?;
    }
    Ok(())
}

/// Sends a part, which the other process reads at once.
async fn send(connection: &Connection, part: &Part, beside: &[BorrowedFd<'_>]) -> Result<()> {
    let sent = timeout(PATIENCE, connection.send(part, beside)).await;
    let sent = sent.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
    sent.context("the other process takes nothing")
}

/// As many rows as fit into a message each.
fn parts<T>(rows: impl Iterator<Item = T>) -> impl Iterator<Item = Vec<T>> {
    let mut rows = rows;
    std::iter::from_fn(move || {
        let part: Vec<_> = rows.by_ref().take(ROWS).collect();
        (!part.is_empty()).then_some(part)
    })
}
