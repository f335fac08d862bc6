//! The data path's thread: it reads frames and datagrams, asks the node what to do with each, and
//! does it.
//!
//! Run to completion: the thread that read a packet also sends it, in the buffer it was read into.
//! The control plane speaks to it by a queue of commands and an event descriptor.

mod data_path;
mod output;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use muslin_stack::Instant;
use muslin_stack::drops::Counters;
use muslin_stack::neighbour::{Place, State};
use muslin_stack::node::{NextHop, Node};
use muslin_stack::peer::{Peer, PeerId, PeerState};
use muslin_stack::port::{Attachment, Port, PortId};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::{mpsc, oneshot};

use crate::device::Tap;
use crate::underlay::UdpSocket;

use data_path::DataPath;

/// Time since the process' first look at it, as the packet and lease rules count it.
#[derive(Debug, Clone, Copy)]
pub struct Clock(std::time::Instant);

impl Clock {
    /// A clock that begins now.
    #[must_use]
    pub fn start() -> Self {
        Self(std::time::Instant::now())
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Instant {
        let micros = self.0.elapsed().as_micros();
        Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }
}

enum Command {
    Attach(PortId, Attachment, Tap),
    Detach(PortId),
    SetPeer(Peer),
    RemovePeer(PeerId),
    Rebind(UdpSocket),
    Report(oneshot::Sender<Report>),
    Stop,
}

/// What the data path has to tell of its own accord.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A port's interface is gone, with its namespace.
    PortGone(PortId),
}

/// The tables and counters at one moment.
#[derive(Debug, Clone)]
pub struct Report {
    /// That moment.
    pub now: Instant,
    /// What became of all packets.
    pub counters: Counters,
    /// The ports, and whether superpackets pass them.
    pub ports: Vec<(PortId, Port, bool)>,
    /// Whether trains of datagrams may leave.
    pub gso: bool,
    /// Whether they may arrive.
    pub gro: bool,
    /// The peers.
    pub peers: Vec<PeerState>,
    /// The route table.
    pub routes: Vec<(ipnet::IpNet, NextHop)>,
    /// The neighbour table, with the age of what was learned.
    pub neighbours: Vec<(std::net::IpAddr, Option<Place>, State)>,
}

/// The control plane's end of a worker. The thread ends with the last of them.
#[derive(Debug)]
pub struct Worker {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// The data path has ended, which it only does by a defect or at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the data path's thread has ended")]
pub struct Ended;

impl Worker {
    /// Starts the thread; what it has to tell goes to `events`, whose end means that it has ended.
    ///
    /// # Errors
    /// If the kernel gives no thread or descriptors.
    pub fn start(
        node: Node,
        underlay: UdpSocket,
        clock: Clock,
        events: mpsc::UnboundedSender<Event>,
    ) -> io::Result<Self> {
        let wake = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
        )?);
        let (commands, receiver) = channel();
        let data_path = DataPath::new(node, underlay, clock, events, (receiver, wake.clone()))?;
        let thread = std::thread::Builder::new()
            .name("worker".to_owned())
            .spawn(move || data_path.run())?;
        Ok(Self {
            commands,
            wake,
            thread: Some(thread),
        })
    }

    /// Attaches a port.
    ///
    /// # Errors
    /// `Ended` if there is nobody to do it.
    pub fn attach(&self, port: PortId, attachment: Attachment, tap: Tap) -> Result<(), Ended> {
        self.tell(Command::Attach(port, attachment, tap))
    }

    /// Detaches a port and closes its device.
    ///
    /// # Errors
    /// `Ended` if there is nobody to do it.
    pub fn detach(&self, port: PortId) -> Result<(), Ended> {
        self.tell(Command::Detach(port))
    }

    /// Adds or changes a peer.
    ///
    /// # Errors
    /// `Ended` if there is nobody to do it.
    pub fn set_peer(&self, peer: Peer) -> Result<(), Ended> {
        self.tell(Command::SetPeer(peer))
    }

    /// Removes a peer.
    ///
    /// # Errors
    /// `Ended` if there is nobody to do it.
    pub fn remove_peer(&self, peer: PeerId) -> Result<(), Ended> {
        self.tell(Command::RemovePeer(peer))
    }

    /// Sends and receives by another socket from now on.
    ///
    /// # Errors
    /// `Ended` if there is nobody to do it.
    pub fn rebind(&self, underlay: UdpSocket) -> Result<(), Ended> {
        self.tell(Command::Rebind(underlay))
    }

    /// The tables and counters as they are now.
    ///
    /// # Errors
    /// `Ended` if there is nobody to tell.
    pub async fn report(&self) -> Result<Report, Ended> {
        let (sender, receiver) = oneshot::channel();
        self.tell(Command::Report(sender))?;
        receiver.await.map_err(|_| Ended)
    }

    fn tell(&self, command: Command) -> Result<(), Ended> {
        self.commands.send(command).map_err(|_| Ended)?;
        // A full counter wakes the thread as well.
        let _ = self.wake.write(1);
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.tell(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
