//! The data path's thread: it reads frames and datagrams, asks the node what to do with each, and
//! does it.
//!
//! Run to completion: the thread that read a packet also sends it, in the buffer it was read into.
//! The control plane speaks to it by a queue of commands and an event descriptor.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_stack::Instant;
use muslin_stack::drops::{Counters, DropReason};
use muslin_stack::neighbour::{Place, State};
use muslin_stack::node::{NextHop, Node, Verdict};
use muslin_stack::peer::{Peer, PeerId, PeerState};
use muslin_stack::port::{Attachment, Port, PortId};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

use crate::device::Tap;
use crate::error::errno;
use crate::underlay::UdpSocket;

/// Packets taken from one descriptor before the others have their turn.
const BATCH: usize = 64;
/// The largest frame or datagram, and room in front of it.
const BUFFER_LEN: usize = HEADROOM + 65_535 + muslin_stack::frame::HEADER_LEN;

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
    /// The ports.
    pub ports: Vec<(PortId, Port)>,
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

/// Epoll's names for the descriptors that are not ports.
const WAKE: u64 = u64::MAX;
const UNDERLAY: u64 = u64::MAX - 1;

struct DataPath {
    node: Node,
    io: Io,
    clock: Clock,
    epoll: Epoll,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    events: mpsc::UnboundedSender<Event>,
    buffer: Box<[u8]>,
}

/// What packets leave by.
struct Io {
    ports: HashMap<PortId, Tap>,
    underlay: UdpSocket,
}

impl DataPath {
    fn new(
        node: Node,
        underlay: UdpSocket,
        clock: Clock,
        events: mpsc::UnboundedSender<Event>,
        (commands, wake): (Receiver<Command>, Arc<EventFd>),
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        epoll.add(&underlay, EpollEvent::new(EpollFlags::EPOLLIN, UNDERLAY))?;
        Ok(Self {
            node,
            io: Io {
                ports: HashMap::new(),
                underlay,
            },
            clock,
            epoll,
            commands,
            wake,
            events,
            buffer: vec![0; BUFFER_LEN].into_boxed_slice(),
        })
    }

    fn run(mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut ready, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => {
                    warn!("the data path cannot wait for packets: {error}");
                    return;
                }
            };
            for event in &ready[..count] {
                match event.data() {
                    WAKE => {
                        if self.obey().is_break() {
                            return;
                        }
                    }
                    UNDERLAY => self.read_underlay(),
                    port => self.read_port(PortId(port as u32)),
                }
            }
            let now = self.clock.now();
            if now >= self.node.poll_at() {
                self.node.handle_timeout(now);
                self.send_own();
            }
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let now = self.clock.now();
        let due = self.node.poll_at();
        let wait = if due > now {
            (due - now).total_millis() + 1
        } else {
            0
        };
        EpollTimeout::try_from(wait.min(60_000) as i32).unwrap_or(EpollTimeout::ZERO)
    }

    fn obey(&mut self) -> std::ops::ControlFlow<()> {
        let _ = self.wake.read();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Attach(port, attachment, tap) => self.attach(port, attachment, tap),
                Command::Detach(port) => self.detach(port),
                Command::SetPeer(peer) => self.node.set_peer(peer),
                Command::RemovePeer(peer) => {
                    self.node.remove_peer(peer);
                }
                Command::Rebind(underlay) => self.rebind(underlay),
                Command::Report(reply) => {
                    // Whoever asked may have gone.
                    let _ = reply.send(self.report());
                }
                Command::Stop => return std::ops::ControlFlow::Break(()),
            }
        }
        self.send_own();
        std::ops::ControlFlow::Continue(())
    }

    fn attach(&mut self, port: PortId, attachment: Attachment, tap: Tap) {
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, port.0.into());
        if let Err(error) = self.epoll.add(&tap, readable) {
            warn!("port {port} cannot be read: {error}");
            let _ = self.events.send(Event::PortGone(port));
            return;
        }
        self.io.ports.insert(port, tap);
        self.node.attach(port, attachment);
    }

    fn rebind(&mut self, underlay: UdpSocket) {
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, UNDERLAY);
        match self.epoll.add(&underlay, readable) {
            // The old socket's events end with its only descriptor.
            Ok(()) => self.io.underlay = underlay,
            Err(error) => warn!("the tunnel's new socket cannot be read: {error}"),
        }
    }

    fn detach(&mut self, port: PortId) {
        self.node.detach(port);
        if let Some(tap) = self.io.ports.remove(&port) {
            // Others may hold copies of the descriptor, so closing ours would not end its events.
            let _ = self.epoll.delete(&tap);
        }
    }

    fn report(&self) -> Report {
        let node = &self.node;
        Report {
            now: self.clock.now(),
            counters: node.counters().clone(),
            ports: node.ports().map(|(id, port)| (id, port.clone())).collect(),
            peers: node.peers().cloned().collect(),
            routes: node
                .routes()
                .map(|(prefix, next)| (prefix, next.clone()))
                .collect(),
            neighbours: node.neighbours().collect(),
        }
    }

    fn read_underlay(&mut self) {
        for _ in 0..BATCH {
            let (len, source) = match self.io.underlay.receive(&mut self.buffer[HEADROOM..]) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    debug!("the underlay socket: {error}");
                    return;
                }
            };
            self.handle(len, |node, now, packet| {
                node.from_underlay(now, source, packet)
            });
        }
    }

    fn read_port(&mut self, port: PortId) {
        for _ in 0..BATCH {
            let Some(tap) = self.io.ports.get(&port) else {
                return;
            };
            match tap.receive(&mut self.buffer[HEADROOM..]) {
                Ok(len) => self.handle(len, |node, now, packet| node.from_port(now, port, packet)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    debug!("port {port} is gone: {error}");
                    self.detach(port);
                    let _ = self.events.send(Event::PortGone(port));
                    return;
                }
            }
        }
    }

    /// Passes the `len` bytes that were read into the buffer to the node and does what it says.
    fn handle(
        &mut self,
        len: usize,
        decide: impl FnOnce(&mut Node, Instant, &mut PacketBuf<'_>) -> Verdict,
    ) {
        let now = self.clock.now();
        let Ok(mut packet) = PacketBuf::new(&mut self.buffer, HEADROOM, len) else {
            return;
        };
        let verdict = decide(&mut self.node, now, &mut packet);
        self.io.send(&mut self.node, verdict, packet.as_slice());
        self.send_own();
    }

    /// Sends what the node itself has to send.
    fn send_own(&mut self) {
        loop {
            let Ok(mut packet) = PacketBuf::new(&mut self.buffer, HEADROOM, 0) else {
                return;
            };
            let Some(verdict) = self.node.poll_output(&mut packet) else {
                return;
            };
            self.io.send(&mut self.node, verdict, packet.as_slice());
        }
    }
}

impl Io {
    fn send(&self, node: &mut Node, verdict: Verdict, packet: &[u8]) {
        match verdict {
            Verdict::Port(port) => {
                if let Err(reason) = self.send_to_port(port, packet) {
                    node.count_drop(reason);
                }
            }
            Verdict::Flood { except } => {
                for (&port, _) in self.ports.iter().filter(|(port, _)| Some(**port) != except) {
                    match self.send_to_port(port, packet) {
                        Ok(()) => node.count_flooded(port, packet.len()),
                        Err(reason) => node.count_drop(reason),
                    }
                }
            }
            Verdict::Peer { destination, .. } => {
                if let Err(reason) = self.send_to_peer(destination, packet) {
                    node.count_drop(reason);
                }
            }
            Verdict::Consumed | Verdict::Drop(_) => {}
        }
    }

    fn send_to_port(&self, port: PortId, frame: &[u8]) -> Result<(), DropReason> {
        let tap = self.ports.get(&port).ok_or(DropReason::PortGone)?;
        tap.send(frame).map_err(|error| match errno(&error) {
            Errno::EAGAIN | Errno::ENOBUFS => DropReason::PortQueueFull,
            Errno::EIO => DropReason::PortDown,
            _ => DropReason::PortFailed,
        })
    }

    fn send_to_peer(&self, destination: SocketAddr, datagram: &[u8]) -> Result<(), DropReason> {
        let sent = self.underlay.send(datagram, destination);
        sent.map_err(|error| match errno(&error) {
            Errno::EAGAIN | Errno::ENOBUFS => DropReason::UnderlayQueueFull,
            _ => DropReason::UnderlayFailed,
        })
    }
}
