//! When another process takes a node over: the workers stop to read, and what they have goes to the
//! workers of that process. Flows to and from outside stay here until they end, and their packets
//! come by a channel from there.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use muslin_encap::buffer::{OwnedPacket, PacketBuf};
use muslin_encap::ip::v4;
use muslin_encap::offload::virtio::Header;
use muslin_stack::api::published::PortMapping;
use muslin_stack::datapath::egress::FlowKey;
use muslin_stack::datapath::port::PortId;
use muslin_stack::datapath::{SiblingMessage, Siblings};
use muslin_stack::drops::DropReason;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use smoltcp::wire::EthernetAddress;
use tokio::sync::oneshot;
use tracing::{debug, warn};

use super::message::{Command, Sibling};
use super::packet_loop::{PacketLoop, listen};
use super::report::NoAnswer;
use super::{Ended, MAILBOX_LEN, Workers};
use crate::device::{FrameDevice, FrameSocket, Tun};
use crate::host::Token;
use crate::underlay::{Adopted, TunnelSockets};

/// What a worker has that another process can go on with.
#[derive(Debug)]
pub(crate) struct Holdings {
    /// The queues that it reads.
    pub(crate) ports: Vec<(PortId, OwnedFd)>,
    /// Its published ports.
    pub(crate) published: Vec<(PortId, PortMapping, OwnedFd)>,
    /// Its queue of the host interface.
    pub(crate) host: Option<OwnedFd>,
    /// The tunnel's sockets.
    pub(crate) tunnel: Option<Adopted>,
    /// The uplink's.
    pub(crate) uplink: Option<Vec<OwnedFd>>,
    /// Where hosts on the uplink's link are.
    pub(crate) next_hops: Vec<(IpAddr, EthernetAddress)>,
    /// The flows that stay.
    pub(crate) flows: Vec<FlowKey>,
}

impl Workers {
    /// Has all workers stop to read, and returns what they have. Flows to and from outside go on.
    ///
    /// # Errors
    /// If one does not answer, or the kernel has no descriptors.
    pub(crate) async fn suspend(&self) -> io::Result<Vec<Holdings>> {
        let asked = self.0.iter().map(|worker| {
            let (sender, receiver) = oneshot::channel();
            let told = worker.send(Command::Suspend(sender));
            told.map(|()| receiver)
        });
        let asked = asked.collect::<Result<Vec<_>, Ended>>();
        let asked = asked.map_err(io::Error::other)?;
        let mut all = Vec::new();
        for holdings in asked {
            all.push(holdings.await.map_err(|_| io::Error::other(NoAnswer))??);
        }
        Ok(all)
    }

    /// Has them read: all that they were told of is there, or another process did not take over.
    ///
    /// # Errors
    /// `Ended` if a thread has ended.
    pub fn read(&self) -> Result<(), Ended> {
        self.send(|| Command::Read)
    }

    /// Has them serve nothing but the flows that they have, whose packets come by a channel.
    ///
    /// # Errors
    /// `Ended` if a thread has ended; else if there are no more threads.
    pub(crate) fn drain(&self, channel: FrameSocket) -> io::Result<()> {
        self.send(|| Command::Drain).map_err(io::Error::other)?;
        let first = self.0.first().ok_or_else(|| io::Error::other(Ended))?;
        let first = first.sibling.clone();
        let thread = thread::Builder::new().name("successor".to_owned());
        thread.spawn(move || take_back(&channel, &first)).map(drop)
    }

    /// Has them give packets of these flows to the process before this one.
    ///
    /// # Errors
    /// `Ended` if a thread has ended; else if there are no more threads.
    pub(crate) fn succeed(&self, flows: &[FlowKey], channel: FrameSocket) -> io::Result<()> {
        let (sender, messages) = sync_channel(MAILBOX_LEN);
        let thread = thread::Builder::new().name("predecessor".to_owned());
        thread.spawn(move || pass_on(&messages, &channel))?;
        let told = self.send(|| Command::Succeed(flows.to_vec(), sender.clone()));
        told.map_err(io::Error::other)
    }

    /// Has them forget flows of the process before this one, which have ended; all, if that has.
    ///
    /// # Errors
    /// `Ended` if a thread has ended.
    pub(crate) fn forget_predecessors(&self, flows: Option<&[FlowKey]>) -> Result<(), Ended> {
        self.send(|| Command::ForgetPredecessors(flows.map(<[_]>::to_vec)))
    }
}

impl PacketLoop {
    /// Stops to read from pods, other nodes and published ports.
    pub(super) fn suspend(&mut self) -> io::Result<Holdings> {
        self.flush();
        self.reads = false;
        self.paused.clear();
        self.published.pauses = None;
        for source in self.sources() {
            // What is gone is not read any more, either.
            let _ = self.epoll.delete(source);
        }
        let own = |socket: BorrowedFd<'_>| socket.try_clone_to_owned();
        let ports = self.readers.iter().filter_map(|port| {
            let device = self.io.ports.get(port)?;
            Some(own(device.as_fd()).map(|device| (*port, device)))
        });
        let published = self.published.ports.values().map(|port| {
            let socket = own(port.socket.as_fd())?;
            Ok((port.device, port.ports, socket))
        });
        let (tunnel, uplink) = (&self.io.underlay.tunnel, &self.io.underlay.uplink);
        let uplink = uplink
            .as_ref()
            .map(|it| it.queues().map(own).collect::<io::Result<_>>());
        let node = self.path.node();
        let next_hops = node.next_hops();
        let known = next_hops.filter_map(|(host, place, _)| Some((host, place?.mac)));
        Ok(Holdings {
            ports: ports.collect::<io::Result<_>>()?,
            published: published.collect::<io::Result<_>>()?,
            host: self
                .host_queue()
                .map(|queue| own(queue.as_fd()))
                .transpose()?,
            tunnel: tunnel.as_ref().map(TunnelSockets::copy).transpose()?,
            uplink: uplink.transpose()?,
            next_hops: known.collect(),
            flows: self.path.egress().keys().collect(),
        })
    }

    /// Reads all that there is to read.
    pub(super) fn read_all(&mut self) {
        if std::mem::replace(&mut self.reads, true) {
            return;
        }
        let begun = listen(&self.epoll, &self.io.underlay).and_then(|()| {
            for port in &self.readers {
                if let Some(device) = self.io.ports.get(port) {
                    self.epoll.add(device, Token::Port(*port).readable())?;
                }
            }
            for (index, port) in &self.published.ports {
                let event = Token::Published(*index).readable();
                self.epoll.add(&*port.socket, event)?;
            }
            match self.host_queue() {
                Some(queue) => Ok(self.epoll.add(queue, Token::Host.readable())?),
                None => Ok(()),
            }
        });
        if let Err(error) = begun {
            warn!("cannot read packets: {error}");
        }
    }

    /// Closes what the other process reads now. Flows write to pods, and answer clients of published
    /// ports, until they end.
    pub(super) fn drain(&mut self) {
        self.io.underlay.tunnel = None;
        self.io.underlay.uplink = None;
        self.path.node_mut().set_uplink(None);
        self.published.ports.clear();
        self.readers.clear();
        self.io.host = None;
        self.path.set_host(None);
    }

    /// Gives packets of these flows to the process before this one.
    pub(super) fn succeed(&mut self, flows: Vec<FlowKey>, predecessor: SyncSender<SiblingMessage>) {
        self.path.succeed(flows);
        self.mailbox.predecessor = Some(predecessor);
    }

    pub(super) fn forget_predecessors(&mut self, flows: Option<&[FlowKey]>) {
        self.path.forget_predecessors(flows);
        if flows.is_none() {
            self.mailbox.predecessor = None;
        }
    }

    /// What is for this worker. A packet that came back from the process after this one goes to the next
    /// one if its flow is not here; the last one answers for flows that none has.
    pub(super) fn unless_next(&mut self, message: SiblingMessage) -> Option<SiblingMessage> {
        let SiblingMessage::FromSuccessor(mut packet) = message else {
            return Some(message);
        };
        let next = self.mailbox.index + 1;
        let is_last = usize::from(next) >= self.mailbox.all.len();
        if is_last || self.path.egress().has_flow_of(packet.packet().as_slice()) {
            return Some(SiblingMessage::FromSuccessor(packet));
        }
        let message = SiblingMessage::FromSuccessor(packet);
        let lost = self.mailbox.send(Siblings::One(next), message);
        let node = self.path.node_mut();
        node.count_drops(DropReason::EgressHandoverFull, lost);
        None
    }

    /// The queue of the host interface that this worker reads.
    fn host_queue(&self) -> Option<&Tun> {
        self.io.host.as_ref().filter(|_| self.reads_host)
    }

    /// All that is read.
    fn sources(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let underlay = &self.io.underlay;
        let tunnel = underlay.tunnel.iter().flat_map(TunnelSockets::queues);
        let tunnel = tunnel.map(|(_, queue)| queue);
        let uplink = underlay.uplink.iter().flat_map(|it| it.queues());
        let ports = self.readers.iter();
        let ports = ports.filter_map(|port| self.io.ports.get(port).map(AsFd::as_fd));
        let published = self.published.ports.values();
        let published = published.map(|port| port.socket.as_fd());
        let host = self.host_queue().map(AsFd::as_fd);
        tunnel
            .chain(uplink)
            .chain(ports)
            .chain(published)
            .chain(host)
    }
}

/// Gives packets to the process before this one, until either end has gone.
fn pass_on(messages: &Receiver<SiblingMessage>, channel: &FrameSocket) {
    for message in messages {
        let SiblingMessage::Stray(mut packet) = message else {
            continue;
        };
        let packet = packet.packet();
        let offload = packet.offload();
        let sent = in_time(channel, PollFlags::POLLOUT, || {
            channel.send(&offload, packet.as_slice(), &[])
        });
        if let Err(error) = sent {
            return debug!("the process before this one takes no packets: {error}");
        }
    }
}

/// Takes packets from the process after this one, until that has gone.
fn take_back(channel: &FrameSocket, first: &Sibling) {
    let mut buffer = vec![0; v4::MAX_LEN];
    loop {
        let received = in_time(channel, PollFlags::POLLIN, || channel.receive(&mut buffer));
        let Ok((header, len)) = received else {
            return;
        };
        let packet = PacketBuf::new(&mut buffer, 0, len).ok();
        let offload = Header::parse(&header).ok();
        let (Some(packet), Some(offload)) = (packet, offload) else {
            continue;
        };
        let packet = OwnedPacket::copy(&packet.with_offload(offload));
        if !first.wait_and_send(SiblingMessage::FromSuccessor(packet)) {
            return;
        }
    }
}

/// Does what a socket that does not wait can do as soon as it can.
fn in_time<T>(
    socket: &FrameSocket,
    event: PollFlags,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut waits = [PollFd::new(socket.as_fd(), event)];
                // Whatever it says, the next attempt shows what there is.
                let _ = poll(&mut waits, PollTimeout::NONE);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
