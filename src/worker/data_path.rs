//! The loop: wait, read batches, ask the node, send.
//!
//! It sleeps as soon as nothing is there. Looking 2, 10 or 50 times more before that changed neither
//! throughput nor latency by more than their noise on two cores: the pod that is to answer needs the
//! core that would be spent.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::offload::merge::{self, Merged, Merger};
use muslin_encap::offload::virtio;
use muslin_encap::tunnel::Format;
use muslin_stack::Instant;
use muslin_stack::drops::DropReason;
use muslin_stack::egress::{Config as EgressConfig, Owners};
use muslin_stack::frame;
use muslin_stack::node::{Node, Verdict};
use muslin_stack::port::{Attachment, PortId};
use muslin_stack::uplink::Uplink;
use muslin_stack::work::Turn;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::egress;
use super::output::{BUFFER_LEN, Io, Outbox};
use super::published::{Published, published_of};
use super::{Clock, Colleague, Command, Event, Heard, Queue, Report};
use crate::dns::Door;
use crate::egress::{HandOver, Outside, is_flow};
use crate::underlay::{Frames, Received, UdpSocket, Underlay};

/// Epoll's names for the descriptors that are not ports.
const WAKE: u64 = u64::MAX;
const UPLINK: u64 = u64::MAX - 1;
/// The first of the tunnel's queues, of which there are fewer than lie between.
const TUNNEL: u64 = u64::MAX - 255;

pub(super) struct DataPath {
    pub(super) node: Node,
    pub(super) io: Io,
    pub(super) clock: Clock,
    pub(super) epoll: Arc<Epoll>,
    pub(super) ear: Ear,
    pub(super) events: mpsc::UnboundedSender<Event>,
    outbox: Outbox,
    received: Received,
    /// What the tunnel's queues have left of their turns.
    turns: Vec<Turn>,
    /// What came by the uplink; nothing until there is one.
    pub(super) frames: Option<Frames>,
    /// What goes on outside the overlay or comes from there.
    pub(super) outside: Outside,
    pub(super) published: Published,
    /// Where packets are that do not come from a port.
    buffer: Box<[u8]>,
}

/// What a worker hears besides packets.
pub(super) struct Ear {
    pub(super) commands: Receiver<Command>,
    pub(super) heard: Receiver<Heard>,
    pub(super) wake: Arc<EventFd>,
    pub(super) colleagues: Vec<Colleague>,
    /// This worker's number, and which of them has which mapping.
    pub(super) index: u8,
    pub(super) owners: Arc<Owners>,
    /// How often this worker has looked for something to do.
    pub(super) turns: Arc<AtomicU64>,
}

impl Ear {
    /// Has a worker's egress give others the packets of their flows.
    fn share(&self, outside: &mut Outside) {
        let hand_over = |to: &Colleague| {
            let to = to.clone();
            Box::new(move |packet: &PacketBuf<'_>| to.hand_over(packet)) as HandOver
        };
        if !self.colleagues.is_empty() {
            let others = self.colleagues.iter().map(hand_over).collect();
            outside.share(self.owners.clone(), self.index, others);
        }
    }

    /// Tells the others of a frame with ARP or neighbour discovery from a port or, without one, of one
    /// with ARP from the uplink.
    pub(super) fn pass_on(&self, port: Option<PortId>, frame: &[u8]) {
        for colleague in &self.colleagues {
            // Whoever has that many to hear has heard this one, or will be asked again.
            let heard = Heard::Neighbour(port, frame.to_vec());
            if colleague.heard.try_send(heard).is_ok() {
                let _ = colleague.wake.write(1);
            }
        }
    }
}

impl Drop for DataPath {
    fn drop(&mut self) {
        // Nobody listens where this is how it should end.
        let _ = self.events.send(Event::Ended);
    }
}

impl DataPath {
    pub(super) fn new(
        node: Node,
        underlay: Underlay,
        outside: (EgressConfig, Door),
        clock: Clock,
        events: mpsc::UnboundedSender<Event>,
        ear: Ear,
    ) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        epoll.add(&*ear.wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        listen(&epoll, &underlay)?;
        let network = node.format().map_or(0, Format::network_offset);
        let mut outside = Outside::new(outside, clock.now(), epoll.clone());
        ear.share(&mut outside);
        if underlay.takes_trains() {
            outside.sockets.send_trains();
        }
        Ok(Self {
            outbox: Outbox::new(network),
            turns: turns(&underlay),
            frames: underlay.uplink.as_ref().map(|_| Frames::default()),
            node,
            io: Io::new(underlay, network),
            published: Published::default(),
            outside,
            clock,
            epoll,
            ear,
            events,
            received: Received::default(),
            buffer: vec![0; BUFFER_LEN].into_boxed_slice(),
        })
    }

    pub(super) fn run(mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        self.send_own();
        loop {
            self.ear.turns.fetch_add(1, Ordering::Relaxed);
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
                    UPLINK => self.read_uplink(),
                    queue @ TUNNEL..UPLINK => self.read_tunnel((queue - TUNNEL) as usize),
                    data if is_flow(data) => self.read_flow(*event),
                    data => match published_of(data) {
                        Some(index) => self.read_published(index),
                        None => self.read_port(PortId(data as u32)),
                    },
                }
            }
            self.flush();
            let now = self.clock.now();
            if now >= self.node.poll_at() {
                self.node.handle_timeout(now);
                self.send_own();
            }
            self.handle_flows(now);
            self.resume_published(now);
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let now = self.clock.now();
        let others = [self.outside.egress.poll_at(), self.published.poll_at()];
        let due = others.into_iter().flatten();
        let due = due.fold(self.node.poll_at(), Instant::min);
        let wait = if due > now {
            (due - now).total_millis() + 1
        } else {
            0
        };
        EpollTimeout::try_from(wait.min(60_000) as i32).unwrap_or(EpollTimeout::ZERO)
    }

    fn obey(&mut self) -> std::ops::ControlFlow<()> {
        let _ = self.ear.wake.read();
        while let Ok(command) = self.ear.commands.try_recv() {
            match command {
                Command::Attach(port, attachment, queue) => self.attach(port, attachment, queue),
                Command::Publish(port, address, network, all) => {
                    self.publish(port, address, network, all);
                }
                Command::Detach(port, done) => {
                    self.detach(port);
                    // Whoever waited may have given up.
                    let _ = done.try_send(());
                }
                Command::SetPeer(peer) => self.node.set_peer(peer),
                Command::RemovePeer(peer) => {
                    self.node.remove_peer(peer);
                }
                Command::Probe(peers) => {
                    let now = self.clock.now();
                    for peer in peers {
                        self.node.probe(now, peer);
                        // What a node says itself waits in a short queue.
                        self.send_own();
                    }
                }
                Command::Rebind(underlay, uplink) => self.rebind(underlay, uplink),
                Command::SetMtu(mtu) => {
                    self.node.set_mtu(mtu);
                    self.outside.egress.set_mtu(mtu, self.clock.now());
                }
                Command::SetStores(stores) => self.outside.egress.set_stores(stores),
                Command::Report(reply) => {
                    // Whoever asked may have gone.
                    let _ = reply.send(self.report());
                }
                Command::Stop => return std::ops::ControlFlow::Break(()),
            }
        }
        let now = self.clock.now();
        while let Ok(heard) = self.ear.heard.try_recv() {
            match heard {
                Heard::Neighbour(Some(port), frame) => self.node.overhear(now, port, &frame),
                Heard::Neighbour(None, frame) => self.node.overhear_uplink(now, &frame),
                Heard::Stray(packet) => self.take_stray(now, packet),
            }
        }
        self.send_own();
        std::ops::ControlFlow::Continue(())
    }

    fn attach(&mut self, port: PortId, attachment: Attachment, Queue { device, reads }: Queue) {
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, port.0.into());
        if reads && let Err(error) = self.epoll.add(&device, readable) {
            warn!("port {port} cannot be read: {error}");
            let _ = self.events.send(Event::PortGone(port));
            return;
        }
        self.io.ports.insert(port, device);
        self.node.attach(port, attachment);
    }

    /// Takes another uplink, and another tunnel if there is one.
    fn rebind(&mut self, underlay: Underlay, uplink: Option<Uplink>) {
        // The old descriptors' events end with them.
        if let Err(error) = listen(&self.epoll, &underlay) {
            return warn!("the new underlay cannot be read: {error}");
        }
        self.flush();
        if underlay.tunnel.is_some() {
            self.count_losses();
            self.turns = turns(&underlay);
            self.io.underlay.tunnel = underlay.tunnel;
        }
        self.frames = underlay.uplink.as_ref().map(|_| Frames::default());
        self.io.underlay.uplink = underlay.uplink;
        self.node.set_uplink(uplink);
        self.send_own();
    }

    fn detach(&mut self, port: PortId) {
        self.end_flows(port);
        self.published.close(port);
        self.node.detach(port);
        if let Some(tap) = self.io.ports.remove(&port) {
            // Others may hold copies of the descriptor, so closing ours would not end its events.
            let _ = self.epoll.delete(&tap);
        }
    }

    /// Counts what the tunnel's queues have lost that nothing has told of.
    fn count_losses(&mut self) {
        let tunnel = self.io.underlay.tunnel.as_ref();
        let lost = tunnel.map_or(0, UdpSocket::take_losses);
        self.node.count_drops(DropReason::UnderlayOverflow, lost);
    }

    fn report(&mut self) -> Report {
        self.count_losses();
        let node = &self.node;
        let tunnel = self.io.underlay.tunnel.as_ref();
        Report {
            now: self.clock.now(),
            counters: node.counters().clone(),
            ports: node
                .ports()
                .map(|(id, port)| (id, port.clone(), self.io.takes_superpackets(id)))
                .collect(),
            gso: tunnel.is_some_and(UdpSocket::has_gso),
            gro: tunnel.is_some_and(UdpSocket::has_gro),
            peers: node.peers().collect(),
            routes: node
                .routes()
                .map(|(prefix, next)| (prefix, *next))
                .collect(),
            neighbours: node.neighbours().collect(),
            next_hops: node.next_hops().collect(),
            egress: self.outside.egress.counters(),
            flows: self.outside.egress.flows().collect(),
        }
    }

    fn read_port(&mut self, port: PortId) {
        let now = self.clock.now();
        self.node.begin_turn(port);
        while self.node.goes_on(port) {
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

    /// Passes the frame that was read into the outbox to the node and does what it says.
    fn handle_frame(&mut self, now: Instant, port: PortId, header: &[u8], len: usize) {
        let Self {
            node,
            io,
            outbox,
            ear,
            outside,
            ..
        } = self;
        let Ok(packet) = PacketBuf::new(outbox.room(), HEADROOM, len) else {
            return;
        };
        let Ok(offload) = virtio::Header::parse(header) else {
            return node.refuse_frame(port, len);
        };
        let mut packet = packet.with_offload(offload);
        if frame::is_arp(packet.as_slice()) || frame::is_neighbour_discovery(packet.as_slice()) {
            ear.pass_on(Some(port), packet.as_slice());
        }
        let verdict = node.from_port(now, port, &mut packet);
        if verdict == Verdict::Egress {
            egress::take_packet(outside, now, &packet, &[], node, io);
        }
        let place = (packet.headroom(), packet.len());
        let offload = packet.offload();
        io.send_later(node, verdict, outbox, place, offload);
        self.send_own();
    }

    fn read_tunnel(&mut self, queue: usize) {
        if let Some(turn) = self.turns.get_mut(queue) {
            turn.begin();
        }
        while let (Some(turn), Some(tunnel)) = (self.turns.get_mut(queue), &self.io.underlay.tunnel)
            && turn.goes_on()
        {
            match tunnel.receive(queue, &mut self.received) {
                Ok(more) => {
                    turn.take(self.received.work());
                    self.handle_datagrams();
                    self.send_own();
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

    /// Joins what was received to superpackets, passes those to the node and does what it says.
    fn handle_datagrams(&mut self) {
        let now = self.clock.now();
        let Self {
            node,
            io,
            received,
            buffer,
            outside,
            ..
        } = self;
        node.count_drops(DropReason::UnderlayOverflow, received.lost());
        let network = node.format().map_or(0, Format::received_network_offset);
        let settings = merge::Settings {
            mtu: node.mtu(),
            udp: true,
        };
        let merging = io.any_takes_superpackets() && !received.is_lone();
        let mut deliver = |merged: Merged<'_, '_, SocketAddr>| {
            let (source, offload, tail) = (merged.key, merged.virtio, merged.tail);
            let rest = tail.iter().map(|piece| piece.len()).sum();
            let mut handle = |packet: PacketBuf<'_>| {
                let mut packet = packet.with_offload(offload).with_tail(rest);
                let verdict = node.from_underlay(now, source, &mut packet);
                if verdict == Verdict::Egress {
                    egress::take_packet(outside, now, &packet, tail, node, io);
                }
                io.send(node, verdict, &mut packet, tail);
            };
            if network > 0 {
                let len = merged.head.len();
                if let Ok(packet) = PacketBuf::new(merged.head, 0, len) {
                    handle(packet);
                }
            } else if let Ok(mut packet) = PacketBuf::new(buffer, 0, 0) {
                // There is no room for an Ethernet header in front: that is another datagram.
                if packet.replace(merged.head).is_ok() {
                    handle(packet);
                }
            }
        };
        if merging {
            let mut merger = Merger::new(settings);
            for (source, datagram) in received.datagrams() {
                merger.push(datagram, network, source, &mut deliver);
            }
            merger.flush(&mut deliver);
        } else {
            for (source, head) in received.datagrams() {
                let virtio = merge::header_for_single(head, network, settings.mtu);
                deliver(Merged {
                    key: source,
                    virtio,
                    head,
                    tail: &[],
                });
            }
        }
    }

    fn flush(&mut self) {
        self.io.flush(&mut self.node, &mut self.outbox);
    }

    /// Sends what the node itself has to send.
    pub(super) fn send_own(&mut self) {
        loop {
            let Ok(mut packet) = PacketBuf::new(&mut self.buffer, HEADROOM, 0) else {
                return;
            };
            let Some(verdict) = self.node.poll_output(&mut packet) else {
                return;
            };
            self.io.send(&mut self.node, verdict, &mut packet, &[]);
        }
    }
}

/// Turns of the tunnel's queues.
fn turns(underlay: &Underlay) -> Vec<Turn> {
    let queues = underlay.tunnel.iter().flat_map(UdpSocket::queues);
    queues.map(|_| Turn::default()).collect()
}

/// Waits for what comes from other nodes.
fn listen(epoll: &Epoll, underlay: &Underlay) -> io::Result<()> {
    let readable = |name| EpollEvent::new(EpollFlags::EPOLLIN, name);
    if let Some(tunnel) = &underlay.tunnel {
        for (queue, name) in tunnel.queues().zip(TUNNEL..UPLINK) {
            epoll.add(queue, readable(name))?;
        }
    }
    if let Some(uplink) = &underlay.uplink {
        epoll.add(uplink, readable(UPLINK))?;
    }
    Ok(())
}
