//! The new process' end.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Instant;

use muslin_stack::api::control::{Answer, Hello, Namespace, PROTOCOL, Refusal, Request, Table};
use muslin_stack::api::events::Event;
use muslin_stack::api::published::PortMapping;
use muslin_stack::datapath::egress::FlowKey;
use smoltcp::wire::EthernetAddress;
use tokio_seqpacket::UnixSeqpacket;

use super::messages::{About, Demand, FrontDoor, Part, PodState, VERSION};
use super::patience::PATIENCE;
use crate::control::{BlockingConnection, Connection, Departing, version};
use crate::device::FrameSocket;
use crate::error::{Context, Error, Result};
use crate::underlay::Adopted;

/// The process that is the node still.
#[derive(Debug)]
pub(crate) struct Predecessor {
    connection: BlockingConnection,
    /// Who the node is.
    pub(crate) about: About,
    /// What has happened to it.
    events: Vec<Event>,
}

/// What a node has from its start on.
#[derive(Debug)]
pub(crate) struct Estate {
    /// The lock of the state directory, until it is taken.
    pub(crate) lock: Option<OwnedFd>,
    /// The listeners.
    pub(crate) doors: Vec<(FrontDoor, OwnedFd)>,
}

impl Estate {
    /// Takes the lock.
    pub(crate) fn take_lock(&mut self) -> Option<OwnedFd> {
        self.lock.take()
    }

    /// Takes a listener.
    pub(crate) fn take(&mut self, door: FrontDoor) -> Option<OwnedFd> {
        let at = self.doors.iter().position(|(it, _)| *it == door)?;
        Some(self.doors.swap_remove(at).1)
    }
}

/// What a node has that runs, and nobody reads now.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    /// For each worker.
    pub(crate) workers: Vec<InheritedWorker>,
    /// Queues of the host interface.
    pub(crate) host: Vec<OwnedFd>,
    /// Where hosts on the uplink's link are.
    pub(crate) next_hops: Vec<(IpAddr, EthernetAddress)>,
    pub(crate) pods: Vec<InheritedPod>,
    /// Connections with which pods end.
    pub(crate) clients: Vec<Departing>,
    /// Flows that stay, and where their packets go.
    pub(crate) flows: Vec<FlowKey>,
    pub(crate) channel: Option<FrameSocket>,
}

/// What a worker reads.
#[derive(Debug, Default)]
pub(crate) struct InheritedWorker {
    pub(crate) tunnel: Option<Adopted>,
    pub(crate) uplink: Option<Vec<OwnedFd>>,
}

/// A pod with its device.
#[derive(Debug)]
pub(crate) struct InheritedPod {
    pub(crate) state: PodState,
    pub(crate) queues: Vec<OwnedFd>,
    pub(crate) published: Vec<(PortMapping, OwnedFd)>,
    pub(crate) namespaces: Option<(Vec<Namespace>, Vec<OwnedFd>)>,
}

impl Predecessor {
    /// Begins to take over the node that listens at a socket; nothing if none does.
    ///
    /// # Errors
    /// Why it cannot be taken over.
    pub(crate) fn find(socket: &Path) -> Result<Option<(Self, Estate)>> {
        let at = socket.display();
        let until = Instant::now() + PATIENCE;
        let connection = match BlockingConnection::connect(socket, until) {
            Ok(connection) => connection,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error).context(format!("cannot connect to the node at {at}")),
        };
        greet(&connection, socket, until)?;
        let events = events(&connection, until)?;
        let ask = Request::TakeOver(VERSION);
        connection.send(&ask, &[], until).context(GONE)?;
        let mut about = None;
        let mut doors = Vec::new();
        loop {
            let (part, beside) = receive(&connection, until)?;
            let mut beside = beside.into_iter();
            match part {
                Part::Node(node) => about = beside.next().map(|lock| (*node, lock)),
                Part::Door(door) => doors.extend(beside.next().map(|it| (door, it))),
                Part::Prepared => break,
                other => return Err(unexpected(&other)),
            }
        }
        let (about, lock) = about.ok_or_else(|| Error::failed(INCOMPLETE))?;
        let estate = Estate {
            lock: Some(lock),
            doors,
        };
        let predecessor = Self {
            connection,
            about,
            events,
        };
        Ok(Some((predecessor, estate)))
    }

    /// What had happened to the node when it was found.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Returns when the old process gives up before it is asked to stop.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub(crate) fn lost(&self) -> Result<impl Future<Output = Error> + use<>> {
        let socket = self.connection.copy().context(GONE)?;
        let socket = UnixSeqpacket::try_from(socket).context(GONE)?;
        Ok(async move {
            // It has nothing to say until then but why.
            match Connection::new(socket).receive::<Part>().await {
                Ok(Some((Part::Refused(refusal), _))) => refused(&refusal),
                _ => Error::failed(GAVE_UP),
            }
        })
    }

    /// Has the old process stop, and takes all that it has.
    ///
    /// # Errors
    /// If it does not, or does not give all; it goes on when this is dropped.
    pub(crate) fn switch(&self) -> Result<Inherited> {
        let until = Instant::now() + PATIENCE;
        self.demand(Demand::Switch, until)?;
        let mut inherited = Inherited::default();
        while inherited.channel.is_none() {
            let (part, beside) = receive(&self.connection, until)?;
            inherited.add(part, beside)?;
        }
        let workers = self.about.workers;
        inherited
            .workers
            .resize_with(workers, InheritedWorker::default);
        Ok(inherited)
    }

    /// Says that this process is the node from now on, and returns the connection by which flows end
    /// that stayed.
    ///
    /// # Errors
    /// If the old process has ended.
    pub(crate) fn succeed(self) -> Result<OwnedFd> {
        self.demand(Demand::Running, Instant::now() + PATIENCE)?;
        Ok(self.connection.into_socket())
    }

    fn demand(&self, demand: Demand, until: Instant) -> Result<()> {
        self.connection.send(&demand, &[], until).context(GONE)
    }
}

impl Inherited {
    fn add(&mut self, part: Part, beside: Vec<OwnedFd>) -> Result<()> {
        match part {
            Part::Tunnel { queues } => {
                let mut queues_first = beside;
                let others = queues_first.split_off(queues.min(queues_first.len()));
                self.workers.push(InheritedWorker {
                    tunnel: Some(Adopted {
                        queues: queues_first,
                        others,
                    }),
                    uplink: None,
                });
            }
            Part::Uplink => {
                let mut workers = self.workers.iter_mut();
                match workers.find(|worker| worker.uplink.is_none()) {
                    Some(worker) => worker.uplink = Some(beside),
                    None => self.workers.push(InheritedWorker {
                        tunnel: None,
                        uplink: Some(beside),
                    }),
                }
            }
            Part::Host => self.host.extend(beside),
            Part::NextHops(hosts) => {
                let hosts = hosts.into_iter();
                let hosts = hosts.map(|(host, mac)| (host, EthernetAddress(mac)));
                self.next_hops.extend(hosts);
            }
            Part::Pod(state) => self.pods.push(InheritedPod {
                state: *state,
                queues: beside,
                published: Vec::new(),
                namespaces: None,
            }),
            Part::Published(port) => {
                let socket = beside.into_iter().next();
                let pod = self
                    .pods
                    .last_mut()
                    .ok_or_else(|| Error::failed(INCOMPLETE))?;
                pod.published.extend(socket.map(|socket| (port, socket)));
            }
            Part::Namespaces(kinds) => {
                let pod = self
                    .pods
                    .last_mut()
                    .ok_or_else(|| Error::failed(INCOMPLETE))?;
                pod.namespaces = Some((kinds, beside));
            }
            Part::Client { hello, level, pods } => {
                let connection = beside.into_iter().next();
                self.clients.extend(connection.map(|socket| Departing {
                    hello,
                    level,
                    pods,
                    socket,
                }));
            }
            Part::Flows(flows) => self.flows.extend(flows.into_iter().map(FlowKey::from)),
            Part::Stopped => {
                let channel = beside.into_iter().next();
                let channel = channel.ok_or_else(|| Error::failed(INCOMPLETE))?;
                let channel = FrameSocket::from_descriptor(channel).context(INCOMPLETE)?;
                self.channel = Some(channel);
            }
            other => return Err(unexpected(&other)),
        }
        Ok(())
    }
}

/// What is said if the old process has ended.
const GONE: &str =
    "the node that is to be taken over has ended: start this one without --take-over";
/// What is said if it has waited for too long.
const GAVE_UP: &str = "the node that is to be taken over has waited for too long, or has ended: see why this \
                       one had no lease by then";
/// What is said of one that does not do as it should.
const INCOMPLETE: &str = "the node that is to be taken over does not give all that it has";

fn greet(connection: &BlockingConnection, socket: &Path, until: Instant) -> Result<()> {
    let hello = Request::Hello(Hello::new(version::VERSION));
    connection.send(&hello, &[], until).context(GONE)?;
    let received = connection.receive::<Answer>(until).context(GONE)?;
    match received {
        Some((Answer::Welcome(welcome), _)) if welcome.protocol == PROTOCOL => Ok(()),
        Some((Answer::Welcome(welcome), _)) => Err(Error::failed(format!(
            "{}: it cannot be taken over; stop it and start this one",
            version::mismatch(socket.display(), &welcome, "muslin"),
        ))),
        _ => Err(Error::failed(GONE)),
    }
}

/// What has happened to the node; nothing if it is too old to know.
fn events(connection: &BlockingConnection, until: Instant) -> Result<Vec<Event>> {
    let ask = Request::Report(Table::Events);
    connection.send(&ask, &[], until).context(GONE)?;
    let mut events = Vec::new();
    loop {
        let received = connection.receive::<Answer>(until).context(GONE)?;
        match received {
            Some((Answer::Rows { rows, more }, _)) => {
                let known = rows.into_iter().map(serde_json::from_value);
                events.extend(known.filter_map(std::result::Result::ok));
                if !more {
                    return Ok(events);
                }
            }
            Some((Answer::Refused(_), _)) => return Ok(events),
            _ => return Err(Error::failed(GONE)),
        }
    }
}

/// The next part; a refusal is an error.
fn receive(connection: &BlockingConnection, until: Instant) -> Result<(Part, Vec<OwnedFd>)> {
    let received = connection.receive::<Part>(until);
    match received.context("the node that is to be taken over does not answer")? {
        Some((Part::Refused(refusal), _)) => Err(refused(&refusal)),
        Some(received) => Ok(received),
        None => Err(Error::failed(GONE)),
    }
}

fn refused(refusal: &Refusal) -> Error {
    Error::failed(format!(
        "the node cannot be taken over: {}",
        refusal.message
    ))
}

fn unexpected(part: &Part) -> Error {
    Error::failed(format!("{INCOMPLETE}: it says {part:?}"))
}
