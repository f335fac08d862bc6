//! The pod's thread: frames from and to its node, sockets of its connections.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::Duration;

use ipnet::IpNet;
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::virtio;
use muslin_stack::Instant;
use muslin_stack::datapath::egress::{
    Complaint, Egress, EgressConfig, FlowId, FlowKey, Host, HostError, IpVersion, Marks, Output,
    Policy, Protocol, Rules,
};
use muslin_stack::datapath::frame;
use muslin_stack::datapath::icmp::IcmpError;
use muslin_stack::drops::DropReason;
use muslin_stack::endpoint::{Endpoint, Taken};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use tokio::sync::{oneshot, watch};
use tracing::{debug, warn};

use super::command::{Command, Datagram, Exposed, Inbox, Place};
use crate::device::{FrameDevice as _, FrameSocket};
use crate::error::errno;
use crate::host::{self, Clock, Sockets, Token, ready_of};
use crate::random::random;

/// Frames taken before the sockets have their turn.
const FRAMES: usize = 64;
/// Commands taken before frames and sockets have theirs.
const COMMANDS: usize = 64;
/// The longest frame, and room in front of it.
const BUFFER_LEN: usize = HEADROOM + frame::MAX_LEN;
/// Interval of ARP requests for the gateway until it answers.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How long the node may take to make room for a frame, in milliseconds. It always goes on reading,
/// so a frame that has to wait is no reason to lose it.
const ROOM: u16 = 100;

/// The thread's parameters.
pub(super) struct Setup {
    pub(super) device: FrameSocket,
    pub(super) place: Place,
    pub(super) exposed: Vec<Exposed>,
    pub(super) commands: Receiver<Command>,
    pub(super) wake: Arc<EventFd>,
    /// Set once the gateway is known.
    pub(super) known: watch::Sender<bool>,
}

/// Starts the thread.
pub(super) fn start(setup: Setup) -> io::Result<JoinHandle<()>> {
    let thread = PodThread::new(setup)?;
    std::thread::Builder::new()
        .name("pod".to_owned())
        .spawn(move || thread.run())
}

struct PodThread {
    egress: Egress,
    locals: LocalSockets,
    link: NodeLink,
    epoll: Arc<Epoll>,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    known: watch::Sender<bool>,
    clock: Clock,
    place: Place,
    ask_at: Option<std::time::Instant>,
    buffer: Box<[u8]>,
}

/// The way to the node.
struct NodeLink {
    device: FrameSocket,
    endpoint: Endpoint,
    /// Whether the node has made no room for the last frame: the next ones do not wait.
    is_stuck: bool,
    drops: HashMap<DropReason, u64>,
}

/// The sockets that flows have here.
struct LocalSockets {
    sockets: Sockets,
    exposed: HashMap<(Protocol, u16), SocketAddr>,
    /// Connections that begin here, until it is known what becomes of them.
    dialled: HashMap<FlowId, oneshot::Sender<Result<(), HostError>>>,
    /// Where those that are there say that they were reset.
    resets: HashMap<FlowId, Arc<AtomicBool>>,
    /// Who reads the datagrams of a port.
    ports: HashMap<u16, Inbox>,
    /// The port of a flow of datagrams, and its other end.
    inboxes: HashMap<FlowId, (u16, SocketAddr)>,
}

impl PodThread {
    fn new(setup: Setup) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        epoll.add(&*setup.wake, Token::Wake.readable())?;
        epoll.add(&setup.device, Token::Node.readable())?;
        let clock = Clock::start();
        let exposed = setup.exposed.iter();
        let exposed = exposed.map(|it| ((it.protocol, it.port), it.to)).collect();
        let locals = LocalSockets {
            sockets: Sockets::new(epoll.clone(), None),
            exposed,
            dialled: HashMap::new(),
            resets: HashMap::new(),
            ports: HashMap::new(),
            inboxes: HashMap::new(),
        };
        let place = setup.place;
        Ok(Self {
            egress: Egress::new(config(place)?, clock.now()),
            locals,
            link: NodeLink {
                device: setup.device,
                endpoint: endpoint(place, clock.now())?,
                is_stuck: false,
                drops: HashMap::new(),
            },
            epoll,
            commands: setup.commands,
            wake: setup.wake,
            known: setup.known,
            clock,
            place,
            ask_at: Some(std::time::Instant::now()),
            buffer: vec![0; BUFFER_LEN].into_boxed_slice(),
        })
    }

    fn run(mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            self.ask();
            let count = match self.epoll.wait(&mut ready, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => return warn!("the pod cannot wait for packets: {error}"),
            };
            for event in &ready[..count] {
                match Token::try_from(event.data()) {
                    Ok(Token::Wake) => {
                        if self.run_commands().is_break() {
                            return;
                        }
                    }
                    Ok(Token::Flow(flow)) => self.read_flow(flow, event.events()),
                    Ok(Token::Node) => {
                        if let Err(error) = self.read_frames() {
                            return debug!("the pod's node is gone: {error}");
                        }
                    }
                    // Nothing else is watched.
                    token => debug_assert!(false, "{token:?}"),
                }
            }
            let now = self.clock.now();
            if self.egress.poll_at().is_some_and(|due| now >= due) {
                self.egress.handle_timeout(now, &mut self.locals);
                self.link.send_output(now, &mut self.egress);
            }
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let now = self.clock.now();
        let flows = self.egress.poll_at();
        let flows = flows.map_or(60_000, |due| {
            if due > now {
                (due - now).total_millis() + 1
            } else {
                0
            }
        });
        let ask = self.ask_at.map_or(60_000, |at| {
            let wait = at.saturating_duration_since(std::time::Instant::now());
            wait.as_millis() as u64 + 1
        });
        EpollTimeout::try_from(flows.min(ask).min(60_000) as i32).unwrap_or(EpollTimeout::ZERO)
    }

    /// Asks where the gateway is, if it is time to.
    fn ask(&mut self) {
        let now = std::time::Instant::now();
        if self.ask_at.is_some_and(|at| now >= at) {
            for asked in self.link.endpoint.ask() {
                self.link.put(&virtio::Header::default(), asked.as_slice());
            }
            self.ask_at = Some(now + ASK_AGAIN);
        }
    }

    fn run_commands(&mut self) -> std::ops::ControlFlow<()> {
        let _ = self.wake.read();
        for taken in 0.. {
            if taken == COMMANDS {
                // The rest has its turn later.
                let _ = self.wake.write(1);
                break;
            }
            let Ok(command) = self.commands.try_recv() else {
                break;
            };
            match command {
                Command::Dial {
                    to,
                    socket,
                    reset,
                    outcome_sender,
                } => self.dial(to, socket.into(), reset, outcome_sender),
                Command::Bind {
                    inbox,
                    outcome_sender,
                } => {
                    // Whoever asked may have gone.
                    let _ = outcome_sender.send(self.bind(inbox));
                }
                Command::Send { port, datagram } => self.send(port, &datagram),
                Command::Unbind(port) => {
                    self.locals.ports.remove(&port);
                }
                Command::Move(place) => self.move_to(place),
                Command::Stop => return std::ops::ControlFlow::Break(()),
            }
        }
        std::ops::ControlFlow::Continue(())
    }

    fn dial(
        &mut self,
        to: SocketAddr,
        socket: socket2::Socket,
        reset: Arc<AtomicBool>,
        outcome_sender: oneshot::Sender<Result<(), HostError>>,
    ) {
        let Some(own) = self.place.for_peer(to.ip()) else {
            // Whoever asked may have gone.
            let _ = outcome_sender.send(Err(HostError::NetUnreachable));
            return;
        };
        let key = FlowKey {
            protocol: Protocol::Tcp,
            pod: to,
            remote: SocketAddr::new(own, 0),
        };
        let now = self.clock.now();
        let Self {
            egress,
            locals,
            link,
            ..
        } = self;
        match egress.dial(now, key, &[], locals) {
            Ok(flow) => {
                locals.dialled.insert(flow, outcome_sender);
                locals.resets.insert(flow, reset);
                if let Err(error) = locals.sockets.adopt(flow, socket) {
                    // The flow finds that it has no socket, and ends.
                    debug!("cannot wait for a connection to {to}: {error}");
                }
            }
            Err(reason) => {
                debug!("no connection to {to}: {}", reason.name());
                let _ = outcome_sender.send(Err(HostError::Failed));
            }
        }
        link.send_output(now, egress);
    }

    fn bind(&mut self, inbox: Inbox) -> Option<u16> {
        let own = self.place.address.iter().next()?;
        let any = match own {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let Self { egress, locals, .. } = self;
        // Datagrams leave from ports that were taken so alone: one is free in both IP versions.
        let key = FlowKey {
            protocol: Protocol::Udp,
            pod: SocketAddr::new(any, 0),
            remote: SocketAddr::new(own, 0),
        };
        let is_free = |port: &u16| {
            !locals.ports.contains_key(port)
                && !locals.exposed.contains_key(&(Protocol::Udp, *port))
        };
        let mut tries = (0..usize::from(u16::MAX)).map_while(|_| egress.free_port(key).ok());
        let port = tries.find(is_free)?;
        locals.ports.insert(port, inbox);
        Some(port)
    }

    fn send(&mut self, port: u16, datagram: &Datagram) {
        let to = datagram.peer;
        let Some(own) = self.place.for_peer(to.ip()) else {
            return self.link.count(DropReason::EgressFamily);
        };
        let key = FlowKey {
            protocol: Protocol::Udp,
            pod: to,
            remote: SocketAddr::new(own, port),
        };
        let now = self.clock.now();
        let Self {
            egress,
            locals,
            link,
            ..
        } = self;
        match egress.deliver(now, key, &datagram.payload, locals) {
            Ok(flow) => {
                locals.inboxes.insert(flow, (port, to));
            }
            Err(reason) => link.count(reason),
        }
        link.send_output(now, egress);
    }

    /// Takes another place. The gateway may be another one even at the same address.
    fn move_to(&mut self, place: Place) {
        let now = self.clock.now();
        let is_resized = Place {
            mtu: place.mtu,
            ..self.place
        } == place;
        if is_resized && let Ok(mtu) = Mtu::new(place.mtu.into()) {
            self.egress.set_mtu(mtu, now);
            self.place = place;
        } else if place != self.place {
            match config(place) {
                Ok(config) => {
                    self.egress = Egress::new(config, now);
                    self.locals.forget_flows(self.epoll.clone());
                }
                Err(error) => return warn!("the pod cannot move to {}: {error}", place.address),
            }
            self.place = place;
        }
        match endpoint(place, now) {
            Ok(endpoint) => self.link.endpoint = endpoint,
            Err(error) => return warn!("the pod cannot move to {}: {error}", place.address),
        }
        self.ask_at = Some(std::time::Instant::now());
    }

    fn read_flow(&mut self, flow: FlowId, flags: EpollFlags) {
        let now = self.clock.now();
        let Self {
            egress,
            locals,
            link,
            ..
        } = self;
        egress.ready(now, flow, ready_of(flags), locals);
        link.send_output(now, egress);
    }

    fn read_frames(&mut self) -> io::Result<()> {
        let now = self.clock.now();
        for _ in 0..FRAMES {
            match self.link.device.receive(&mut self.buffer[HEADROOM..]) {
                Ok((header, len)) => {
                    if let Err(reason) = self.take(now, &header, len) {
                        self.link.count(reason);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes the frame in the buffer.
    fn take(&mut self, now: Instant, header: &[u8], len: usize) -> Result<(), DropReason> {
        let offload = virtio::Header::parse(header).map_err(|_| DropReason::VirtioHeader)?;
        let packet = PacketBuf::new(&mut self.buffer, HEADROOM, len);
        let packet = packet.map_err(|_| DropReason::HeadroomExceeded)?;
        let mut packet = packet.with_offload(offload);
        let Self {
            link,
            egress,
            locals,
            ..
        } = self;
        match link.endpoint.take(&mut packet)? {
            Taken::Packet => {
                let taken = egress.from_pod(now, &packet, locals);
                link.send_output(now, egress);
                taken
            }
            Taken::Answer => {
                link.put(&packet.offload(), packet.as_slice());
                Ok(())
            }
            Taken::Consumed => {
                if link.endpoint.has_gateway() {
                    self.ask_at = None;
                    self.known.send_replace(true);
                }
                Ok(())
            }
        }
    }
}

impl Place {
    /// The pod's address for who has that one, if it has one of the same IP version.
    fn for_peer(&self, peer: IpAddr) -> Option<IpAddr> {
        match peer {
            IpAddr::V4(_) => self.address.ipv4().map(IpAddr::V4),
            IpAddr::V6(_) => self.address.ipv6().map(IpAddr::V6),
        }
    }
}

/// Egress for which all of the overlay, and what lies behind the gateway, are pods.
fn endpoint(place: Place, now: Instant) -> io::Result<Endpoint> {
    let endpoint = Endpoint::new(place.address, place.gateway, now);
    endpoint.ok_or_else(|| io::Error::other("it has no address"))
}

fn config(place: Place) -> io::Result<EgressConfig> {
    let own = place.address.iter::<IpAddr>().map(IpNet::from);
    let mut rules = Rules::default();
    rules.allow = own.collect();
    let mtu = Mtu::new(place.mtu.into()).map_err(io::Error::other)?;
    let seed = u64::from_ne_bytes(random().map_err(io::Error::other)?);
    let mut config = EgressConfig::new(Policy::new(rules), mtu, seed);
    config.limits = host::limits();
    Ok(config)
}

impl NodeLink {
    /// Gives the node a frame.
    fn put(&mut self, header: &virtio::Header, frame: &[u8]) {
        let is_full = |sent: &io::Result<_>| matches!(sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        let mut sent = self.device.send(header, frame, &[]);
        if is_full(&sent) && !self.is_stuck {
            let mut room = [PollFd::new(self.device.as_fd(), PollFlags::POLLOUT)];
            // The next send shows whether there is room.
            let _ = poll(&mut room, PollTimeout::from(ROOM));
            sent = self.device.send(header, frame, &[]);
        }
        self.is_stuck = is_full(&sent);
        if let Err(error) = sent {
            self.count(match errno(&error) {
                Errno::EAGAIN | Errno::ENOBUFS => DropReason::PortQueueFull,
                _ => DropReason::PortFailed,
            });
        }
    }

    fn count(&mut self, reason: DropReason) {
        let count = self.drops.entry(reason).or_default();
        *count += 1;
        if count.is_power_of_two() {
            debug!("packets of the pod lost, {}: {count}", reason.name());
        }
    }

    /// Gives the node what egress has for it.
    fn send_output(&mut self, now: Instant, egress: &mut Egress) {
        while let Some(output) = egress.poll_output() {
            let lost = match output {
                Output::Packet(packet) => self.send(packet).err(),
                // What is behind the pod's addresses is its own.
                Output::Error(error, offender) | Output::Relayed(_, error, offender) => {
                    self.report(now, error, offender);
                    None
                }
                Output::Lost(reason, packets) => {
                    (0..packets).for_each(|_| self.count(reason));
                    None
                }
                // There is no other worker.
                Output::HandOver(..) => {
                    self.count(DropReason::EgressHandoverFull);
                    None
                }
            };
            if let Some(reason) = lost {
                egress.undelivered(now, reason);
            }
        }
    }

    fn send(&mut self, mut packet: PacketBuf<'_>) -> Result<(), DropReason> {
        let wrapped = self.endpoint.wrap(&mut packet);
        wrapped.inspect_err(|reason| self.count(*reason))?;
        self.put(&packet.offload(), packet.as_slice());
        Ok(())
    }

    fn report(&mut self, now: Instant, error: IcmpError, offender: &[u8]) {
        let mut buffer = [0; HEADROOM + muslin_stack::datapath::icmp::MAX_LEN];
        let Ok(mut packet) = PacketBuf::new(&mut buffer, HEADROOM, 0) else {
            return;
        };
        if self.endpoint.report(now, error, offender, &mut packet) {
            self.put(&virtio::Header::default(), packet.as_slice());
        }
    }
}

impl LocalSockets {
    /// Ends all connections, as resets do.
    fn forget_flows(&mut self, epoll: Arc<Epoll>) {
        for (_, reset) in self.resets.drain() {
            reset.store(true, Ordering::Release);
        }
        self.dialled.clear();
        self.inboxes.clear();
        self.sockets = Sockets::new(epoll, None);
    }
}

impl Host for LocalSockets {
    fn open(&mut self, _: FlowId, _: Protocol, _: IpVersion) -> Result<(), HostError> {
        // Nothing begins here that has no other end.
        Err(HostError::Refused)
    }

    fn connect(
        &mut self,
        flow: FlowId,
        protocol: Protocol,
        to: SocketAddr,
    ) -> Result<(), HostError> {
        let exposed = self.exposed.get(&(protocol, to.port()));
        let to = exposed.ok_or(HostError::Refused)?;
        self.sockets.connect(flow, protocol, *to)
    }

    fn serve(&mut self, _: FlowId, _: FlowKey) -> Result<(), HostError> {
        Err(HostError::Refused)
    }

    fn dialled(&mut self, flow: FlowId, result: Result<(), HostError>) {
        if let Some(outcome_sender) = self.dialled.remove(&flow) {
            // Whoever asked may have gone.
            let _ = outcome_sender.send(result);
        }
    }

    fn connected(&mut self, flow: FlowId) -> Result<(), HostError> {
        self.sockets.connected(flow)
    }

    fn send(&mut self, flow: FlowId, to: SocketAddr, bytes: &[u8]) -> Result<(), HostError> {
        self.sockets.send(flow, to, bytes)
    }

    fn receive(
        &mut self,
        flow: FlowId,
        buffer: &mut [u8],
    ) -> Result<(usize, SocketAddr), HostError> {
        self.sockets.receive(flow, buffer)
    }

    fn read(&mut self, flow: FlowId, buffer: &mut [u8]) -> Result<usize, HostError> {
        if self.inboxes.contains_key(&flow) {
            return Err(HostError::WouldBlock);
        }
        self.sockets.read(flow, buffer)
    }

    fn write(&mut self, flow: FlowId, bytes: &[u8]) -> Result<usize, HostError> {
        let Some((port, from)) = self.inboxes.get(&flow) else {
            return self.sockets.write(flow, bytes);
        };
        let reader = self.ports.get(port).ok_or(HostError::Refused)?;
        reader.put(*from, bytes)?;
        Ok(bytes.len())
    }

    fn send_train(
        &mut self,
        flow: FlowId,
        to: Option<SocketAddr>,
        datagrams: &[u8],
        size: u16,
    ) -> Result<(), HostError> {
        if self.inboxes.contains_key(&flow) {
            return Err(HostError::Failed);
        }
        self.sockets.send_train(flow, to, datagrams, size)
    }

    fn mark(&mut self, flow: FlowId, marks: Marks) {
        self.sockets.mark(flow, marks);
    }

    fn complaint(&mut self, flow: FlowId, quoted: &mut [u8]) -> Option<Complaint> {
        self.sockets.complaint(flow, quoted)
    }

    fn shutdown(&mut self, flow: FlowId) -> Result<(), HostError> {
        self.sockets.shutdown(flow)
    }

    fn close(&mut self, flow: FlowId, reset: bool) {
        if let Some(outcome_sender) = self.resets.remove(&flow) {
            outcome_sender.store(reset, Ordering::Release);
        }
        self.dialled.remove(&flow);
        if self.inboxes.remove(&flow).is_none() {
            self.sockets.close(flow, reset);
        }
    }
}
