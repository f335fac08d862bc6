//! The loop: wait, read batches, let the data path decide, send.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::offload::virtio;
use muslin_encap::tunnel::Format;
use muslin_stack::Instant;
use muslin_stack::datapath::egress::FlowId;
use muslin_stack::datapath::exchange::Message;
use muslin_stack::datapath::node::Verdict;
use muslin_stack::datapath::peer::Peer;
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::uplink::Uplink;
use muslin_stack::datapath::work::Turn;
use muslin_stack::datapath::{Merging, Output, SiblingMessage, Siblings};
use muslin_stack::drops::DropReason;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::Datapath;
use super::capture::Tap;
use super::message::{Command, Event, Queue, Sibling};
use super::output::{Io, Outbox};
use super::published::PublishedPorts;
use super::report::{PageWriter, Totals, View};
use super::sealing::Sealing;
use crate::dns::DnsConnector;
use crate::host::{Clock, Sockets, Token, ready_of};
use crate::underlay::{Frames, Received, TunnelSockets, Underlay, Uplink as UplinkDevice};

pub(super) struct PacketLoop {
    pub(super) path: Datapath,
    /// The sockets of flows that go on outside the overlay or come from there.
    pub(super) sockets: Sockets,
    pub(super) io: Io,
    pub(super) clock: Clock,
    pub(super) epoll: Arc<Epoll>,
    pub(super) mailbox: Mailbox,
    pub(super) events: mpsc::UnboundedSender<Event>,
    pub(super) outbox: Outbox,
    received: Received,
    /// What the tunnel's queues have left of their turns, and the uplink's.
    tunnel_turns: Vec<Turn>,
    pub(super) uplink_turns: Vec<Turn>,
    /// What came by the uplink; nothing until there is one.
    pub(super) frames: Option<Frames>,
    pub(super) published: PublishedPorts,
    /// Whether it reads packets at all.
    pub(super) reads: bool,
    /// Ports that this worker reads.
    pub(super) readers: BTreeSet<PortId>,
    /// Whether it reads its queue of the host interface.
    pub(super) reads_host: bool,
    /// Who captures packets.
    pub(super) taps: Vec<Tap>,
    /// Who reads what other nodes say.
    pub(super) exchange: Option<mpsc::Sender<Message>>,
    /// Ports that are not read before a time, since their pods may send no faster.
    pub(super) paused: Vec<(Instant, PortId)>,
}

/// A worker's input besides packets, and its siblings.
pub(super) struct Mailbox {
    pub(super) commands: Receiver<Command>,
    pub(super) messages: Receiver<SiblingMessage>,
    pub(super) wake: Arc<EventFd>,
    /// All workers, in the order of their numbers.
    pub(super) all: Vec<Sibling>,
    /// This worker's number.
    pub(super) index: u8,
    /// How often this worker has looked for something to do.
    pub(super) turns: Arc<AtomicU64>,
    /// Where it shows its counters.
    pub(super) page: PageWriter,
    /// The process that was the node before this one, while it has flows.
    pub(super) predecessor: Option<SyncSender<SiblingMessage>>,
}

impl Mailbox {
    /// Tells siblings, as far as there is room, and returns how many packets were lost.
    pub(super) fn send(&self, to: Siblings, message: SiblingMessage) -> u64 {
        match to {
            Siblings::All => {
                let others = (0..).zip(&self.all).filter(|(it, _)| *it != self.index);
                for (_, other) in others {
                    // A full mailbox has the same already, or will be asked again.
                    other.send(message.clone());
                }
                0
            }
            Siblings::One(worker) => {
                let other = self.all.get(usize::from(worker));
                u64::from(!other.is_some_and(|other| other.send(message)))
            }
            Siblings::Predecessor => {
                let other = self.predecessor.as_ref();
                u64::from(other.is_none_or(|other| other.try_send(message).is_err()))
            }
        }
    }
}

impl Drop for PacketLoop {
    fn drop(&mut self) {
        // On an orderly stop the receiver is gone.
        let _ = self.events.send(Event::Ended);
    }
}

impl PacketLoop {
    pub(super) fn new(
        path: Datapath,
        underlay: Underlay,
        sealing: Option<Sealing>,
        dns: DnsConnector,
        clock: Clock,
        events: mpsc::UnboundedSender<Event>,
        mailbox: Mailbox,
    ) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        epoll.add(&*mailbox.wake, Token::Wake.readable())?;
        let network = path.node().format().map_or(0, Format::network_offset);
        let mut sockets = Sockets::new(epoll.clone(), Some(dns));
        if underlay.takes_trains() {
            sockets.send_trains();
        }
        Ok(Self {
            outbox: Outbox::new(network),
            tunnel_turns: tunnel_turns(underlay.tunnel.as_ref()),
            uplink_turns: turns(underlay.uplink.iter().flat_map(UplinkDevice::queues)),
            frames: underlay.uplink.as_ref().map(|_| Frames::default()),
            path,
            sockets,
            io: Io::new(underlay, sealing, network),
            published: PublishedPorts::default(),
            reads: false,
            readers: BTreeSet::new(),
            reads_host: false,
            taps: Vec::new(),
            exchange: None,
            paused: Vec::new(),
            clock,
            epoll,
            mailbox,
            events,
            received: Received::default(),
        })
    }

    pub(super) fn run(mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        self.send_own(self.clock.now());
        loop {
            self.mailbox.turns.fetch_add(1, Ordering::Relaxed);
            let count = match self.wait(&mut ready) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => {
                    warn!("the data path cannot wait for packets: {error}");
                    return;
                }
            };
            for event in &ready[..count] {
                match Token::try_from(event.data()) {
                    Ok(Token::Wake) => {
                        if self.run_commands().is_break() {
                            return;
                        }
                    }
                    Ok(Token::Uplink(queue)) => self.read_uplink(queue as usize),
                    Ok(Token::Tunnel(queue)) => self.read_tunnel(queue as usize),
                    Ok(Token::Flow(flow)) => self.read_flow(flow, event.events()),
                    Ok(Token::Published(index)) => self.read_published(index),
                    Ok(Token::Port(port)) => self.read_port(port),
                    Ok(Token::Host) => self.read_host(),
                    // Nothing else is watched.
                    token @ (Ok(Token::Node) | Err(_)) => debug_assert!(false, "{token:?}"),
                }
            }
            self.flush();
            let now = self.clock.now();
            if now >= self.path.poll_at() {
                self.path.handle_timeout(now, &mut self.sockets);
                self.send_own(now);
            }
            if self.io.poll_at().is_some_and(|due| now >= due) {
                self.io.handle_timeout();
                self.io.settle(self.path.node_mut());
            }
            self.flush_captures();
            self.flush_exchange();
            self.resume_published(now);
            self.resume_ports(now);
            self.show_totals();
        }
    }

    /// Waits for something to do; looks a few times before it sleeps where that pays.
    fn wait(&mut self, ready: &mut [EpollEvent]) -> nix::Result<usize> {
        let polls = self.io.busy_poll.time();
        let timeout = self.timeout();
        if timeout == EpollTimeout::ZERO {
            return self.epoll.wait(ready, timeout);
        }
        let mut before = self.clock.now();
        let until = before + polls;
        while before < until {
            let count = self.epoll.wait(ready, EpollTimeout::ZERO)?;
            if count > 0 {
                return Ok(count);
            }
            // Whoever is to answer may need this processor.
            std::thread::yield_now();
            before = self.clock.now();
        }
        let count = self.epoll.wait(ready, timeout)?;
        if count > 0 {
            self.io.busy_poll.slept(self.clock.now() - before);
        }
        Ok(count)
    }

    fn timeout(&self) -> EpollTimeout {
        let now = self.clock.now();
        let due = self.path.poll_at();
        let due = self.io.poll_at().map_or(due, |sealing| sealing.min(due));
        let due = self.published.poll_at().map_or(due, |pause| pause.min(due));
        let paused = self.paused.iter().map(|(until, _)| *until);
        let due = paused.fold(due, Instant::min);
        let wait = if due > now {
            (due - now).total_millis() + 1
        } else {
            0
        };
        EpollTimeout::try_from(wait.min(60_000) as i32).unwrap_or(EpollTimeout::ZERO)
    }

    fn run_commands(&mut self) -> std::ops::ControlFlow<()> {
        let _ = self.mailbox.wake.read();
        while let Ok(command) = self.mailbox.commands.try_recv() {
            match command {
                Command::Attach(port, attachment, queue) => self.attach(port, attachment, queue),
                Command::Publish(port, address, network, all) => {
                    self.publish(port, address, network, all);
                }
                Command::Detach(port, open) => {
                    self.detach(port);
                    drop(open);
                }
                Command::SetPeer(peer) => self.set_peer(peer),
                Command::RemovePeer(peer) => {
                    self.path.node_mut().remove_peer(peer);
                    if let Some(sealing) = &mut self.io.sealing {
                        sealing.wireguard.remove_peer(peer);
                    }
                }
                Command::Probe(peers) => {
                    let now = self.clock.now();
                    for peer in peers {
                        self.path.node_mut().probe(now, peer);
                        // What a node says itself waits in a short queue.
                        self.send_own(now);
                    }
                }
                Command::Rebind(underlay, uplink) => self.rebind(underlay, uplink),
                Command::SetMtu(mtu, mtu_v6) => {
                    self.path.set_mtu(mtu, self.clock.now());
                    if let Some(mtu) = mtu_v6 {
                        self.path.node_mut().set_mtu_v6(mtu);
                    }
                }
                Command::SetStores(stores) => self.path.set_stores(stores),
                Command::OpenHost(host, queue, reads) => self.open_host(host, queue, reads),
                Command::SetHost(host) => self.path.set_host(Some(host)),
                Command::CloseHost => self.close_host(),
                Command::Copy(question) => question(&self.view()),
                Command::Capture(what, tap) => self.begin_capture(what.0, what.1, tap),
                Command::EndCapture(id) => self.end_capture(id),
                Command::OpenExchange(reader) => self.open_exchange(reader),
                Command::Tell(to, message) => self.tell(to, &message),
                Command::Inject(port, frame) => self.inject(port, &frame),
                Command::CountDrops(reason, packets) => {
                    self.path.node_mut().count_drops(reason, packets);
                }
                Command::Suspend(answer) => {
                    let holdings = self.suspend();
                    // Whoever asked may have gone.
                    let _ = answer.send(holdings);
                }
                Command::Read => self.read_all(),
                Command::Drain => self.drain(),
                Command::Succeed(flows, predecessor) => self.succeed(flows, predecessor),
                Command::ForgetPredecessors(flows) => self.forget_predecessors(flows.as_deref()),
                Command::Stop => return std::ops::ControlFlow::Break(()),
            }
        }
        let now = self.clock.now();
        while let Ok(message) = self.mailbox.messages.try_recv() {
            if let Some(message) = self.unless_next(message) {
                self.path.from_sibling(now, message, &mut self.sockets);
                self.send_own(now);
            }
        }
        self.send_own(now);
        std::ops::ControlFlow::Continue(())
    }

    fn set_peer(&mut self, peer: Peer) {
        if let Some(sealing) = &mut self.io.sealing {
            sealing.wireguard.set_peer(self.clock.now(), &peer);
        }
        self.path.node_mut().set_peer(peer);
    }

    fn attach(&mut self, port: PortId, attachment: Attachment, Queue { device, reads }: Queue) {
        if reads
            && self.reads
            && let Err(error) = self.epoll.add(&device, Token::Port(port).readable())
        {
            warn!("cannot read from port {port}: {error}");
            let _ = self.events.send(Event::PortGone(port));
            return;
        }
        if reads {
            self.readers.insert(port);
        }
        self.io.ports.insert(port, device);
        self.path.node_mut().attach(port, attachment);
    }

    /// Takes another uplink, and another tunnel if there is one.
    fn rebind(&mut self, underlay: Underlay, uplink: Option<Uplink>) {
        // The old descriptors' events end with them.
        if self.reads
            && let Err(error) = listen(&self.epoll, &underlay)
        {
            return warn!("cannot read from the new underlay: {error}");
        }
        self.flush();
        self.count_losses();
        if let Some(tunnel) = underlay.tunnel {
            let own = self.io.underlay.tunnel.get_or_insert_default();
            own.take_over(tunnel);
            self.tunnel_turns = tunnel_turns(Some(own));
        }
        self.uplink_turns = turns(underlay.uplink.iter().flat_map(UplinkDevice::queues));
        self.frames = underlay.uplink.as_ref().map(|_| Frames::default());
        self.io.underlay.uplink = underlay.uplink;
        self.path.node_mut().set_uplink(uplink);
        self.send_own(self.clock.now());
    }

    fn detach(&mut self, port: PortId) {
        self.path.detach(port, &mut self.sockets);
        self.published.close(port);
        self.send_own(self.clock.now());
        self.readers.remove(&port);
        if let Some(tap) = self.io.ports.remove(&port) {
            // Others may hold copies of the descriptor, so closing ours would not end its events.
            let _ = self.epoll.delete(&tap);
        }
    }

    /// Counts packets lost by the queues of the tunnel and the uplink that are not counted yet.
    fn count_losses(&mut self) {
        let Underlay { tunnel, uplink } = &self.io.underlay;
        let lost = tunnel.as_ref().map_or(0, TunnelSockets::take_losses)
            + uplink.as_ref().map_or(0, UplinkDevice::take_losses);
        let node = self.path.node_mut();
        node.count_drops(DropReason::UnderlayOverflow, lost);
    }

    /// What there is to copy of for others.
    fn view(&self) -> View<'_> {
        View {
            now: self.clock.now(),
            path: &self.path,
            io: &self.io,
        }
    }

    /// Copies the counters to the shared page, if a reader waits for them.
    fn show_totals(&mut self) {
        if self.mailbox.page.is_asked() {
            self.count_losses();
            let totals = Totals::of(&self.view());
            self.mailbox.page.show(totals);
        }
    }

    fn read_port(&mut self, port: PortId) {
        let now = self.clock.now();
        self.path.node_mut().begin_turn(port);
        while self.path.node().goes_on(port) {
            if let Some(pause) = self.path.node().pause(now, port) {
                return self.pause_port(port, now + pause);
            }
            if self.outbox.is_full() {
                self.flush();
            }
            let Some(tap) = self.io.ports.get(&port) else {
                return;
            };
            let room = self.outbox.room();
            match tap.receive(&mut room[HEADROOM..]) {
                Ok((header, len)) => self.handle_frame(now, port, &header, len),
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

    /// Reads nothing from a port until then.
    fn pause_port(&mut self, port: PortId, until: Instant) {
        let Some(device) = self.io.ports.get(&port) else {
            return;
        };
        match self.epoll.modify(device, &mut Token::Port(port).silent()) {
            Ok(()) => self.paused.push((until, port)),
            Err(error) => debug!("port {port} cannot pause: {error}"),
        }
    }

    /// Reads the ports again whose pauses are over.
    fn resume_ports(&mut self, now: Instant) {
        for (_, port) in self.paused.extract_if(.., |(until, _)| *until <= now) {
            // It may be detached by now.
            if let Some(device) = self.io.ports.get(&port)
                && let Err(error) = self.epoll.modify(device, &mut Token::Port(port).readable())
            {
                warn!("cannot read from port {port} again: {error}");
            }
        }
    }

    /// Passes the frame that was read into the outbox to the node and does what it says.
    fn handle_frame(&mut self, now: Instant, port: PortId, header: &[u8], len: usize) {
        let Self {
            path,
            sockets,
            io,
            outbox,
            ..
        } = self;
        let Ok(packet) = PacketBuf::new(outbox.room(), HEADROOM, len) else {
            return;
        };
        let Ok(offload) = virtio::Header::parse(header) else {
            return path.node_mut().refuse_frame(port, len);
        };
        io.batches.from_pods += u64::from(offload.gso.is_some());
        let mut packet = packet.with_offload(offload);
        let verdict = path.from_port(now, port, &mut packet, sockets);
        let place = (packet.headroom(), packet.len());
        let offload = packet.offload();
        io.send_later(verdict, outbox, place, offload);
        self.send_own(now);
    }

    /// Takes a frame as if the pod at this port had sent it.
    fn inject(&mut self, port: PortId, frame: &[u8]) {
        if self.outbox.is_full() {
            self.flush();
        }
        let room = self.outbox.room().get_mut(HEADROOM..);
        let Some(room) = room.and_then(|room| room.get_mut(..frame.len())) else {
            return;
        };
        room.copy_from_slice(frame);
        let header = virtio::Header::default().to_bytes();
        self.handle_frame(self.clock.now(), port, &header, frame.len());
    }

    fn read_tunnel(&mut self, queue: usize) {
        if let Some(turn) = self.tunnel_turns.get_mut(queue) {
            turn.begin();
        }
        while let (Some(turn), Some(tunnel)) =
            (self.tunnel_turns.get_mut(queue), &self.io.underlay.tunnel)
            && turn.goes_on()
        {
            match tunnel.receive(queue, &mut self.received) {
                Ok(more) => {
                    turn.take(self.received.work());
                    self.io.batches.received.note(self.received.messages());
                    self.handle_datagrams();
                    if !more {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    debug!("the tunnel's socket: {error}");
                    return;
                }
            }
        }
    }

    /// Passes what was received to the data path and does what it says.
    fn handle_datagrams(&mut self) {
        let now = self.clock.now();
        let Self {
            path,
            sockets,
            io,
            received,
            ..
        } = self;
        let lost = received.lost();
        path.node_mut()
            .count_drops(DropReason::UnderlayOverflow, lost);
        let merging = match io.any_takes_superpackets() && !received.is_lone() {
            true => Merging::On,
            false => Merging::Off,
        };
        let opened = io.open(received);
        let send = |verdict: Verdict, packet: &mut PacketBuf<'_>| {
            io.batches.merged += u64::from(!packet.is_single());
            io.send(verdict, packet);
        };
        match &opened {
            Some(opened) => {
                let packets = opened.packets(received.datagrams());
                path.from_wireguard_batch(now, packets, merging, sockets, send);
            }
            None => path.from_underlay_batch(now, received.datagrams(), merging, sockets, send),
        }
        if let (Some(sealing), Some(opened)) = (&mut io.sealing, opened) {
            sealing.recycle(opened);
        }
        self.send_own(now);
    }

    pub(super) fn flush(&mut self) {
        self.io.flush(&mut self.outbox);
        self.io.settle(self.path.node_mut());
    }

    /// Takes an event of a flow's socket.
    fn read_flow(&mut self, flow: FlowId, flags: EpollFlags) {
        let now = self.clock.now();
        self.path
            .ready(now, flow, ready_of(flags), &mut self.sockets);
        self.send_own(now);
    }

    /// Sends what the data path has to send of its own accord.
    pub(super) fn send_own(&mut self, now: Instant) {
        while let Some(output) = self.path.poll_output(now) {
            match output {
                Output::Packet(verdict, mut packet) => {
                    self.io.send(verdict, &mut packet);
                }
                Output::Message(to, message) => {
                    let lost = self.mailbox.send(to, message);
                    let node = self.path.node_mut();
                    node.count_drops(DropReason::EgressHandoverFull, lost);
                }
            }
        }
        self.io.settle(self.path.node_mut());
    }
}

/// A turn for each number of a tunnel's queues.
fn tunnel_turns(tunnel: Option<&TunnelSockets>) -> Vec<Turn> {
    turns(0..tunnel.map_or(0, TunnelSockets::queue_numbers))
}

/// A turn for each of these queues.
fn turns<T>(queues: impl Iterator<Item = T>) -> Vec<Turn> {
    queues.map(|_| Turn::default()).collect()
}

/// Waits for what comes from other nodes.
pub(super) fn listen(epoll: &Epoll, underlay: &Underlay) -> io::Result<()> {
    if let Some(tunnel) = &underlay.tunnel {
        for (number, queue) in tunnel.queues() {
            // There are few.
            epoll.add(queue, Token::Tunnel(number as u32).readable())?;
        }
    }
    if let Some(uplink) = &underlay.uplink {
        for (queue, place) in uplink.queues().zip(0..) {
            epoll.add(queue, Token::Uplink(place).readable())?;
        }
    }
    Ok(())
}
