//! The host interface: packets of the host's own kernel.

use std::io;

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::offload::virtio;
use muslin_stack::datapath::host_interface::HostInterface;
use tracing::{debug, warn};

use super::message::{Command, Event};
use super::packet_loop::PacketLoop;
use super::{Ended, Workers};
use crate::device::Tun;
use crate::host::Token;

impl Workers {
    /// Uses the host interface by its queues, as [`Self::attach`] uses a pod's device.
    ///
    /// # Errors
    /// If there are no more descriptors, or `Ended` if the thread has ended.
    pub(crate) fn open_host(&self, host: &HostInterface, queues: Vec<Tun>) -> io::Result<()> {
        let first = queues.first().ok_or(io::ErrorKind::InvalidInput)?;
        let first = first.try_clone()?;
        let mut queues = queues.into_iter();
        for worker in &self.0 {
            let (queue, reads) = match queues.next() {
                Some(queue) => (queue, true),
                None => (first.try_clone()?, false),
            };
            let told = worker.send(Command::OpenHost(host.clone(), queue, reads));
            told.map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// The host has other addresses.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub(crate) fn set_host(&self, host: &HostInterface) -> Result<(), Ended> {
        self.send(|| Command::SetHost(host.clone()))
    }

    /// Closes the host interface.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub(crate) fn close_host(&self) -> Result<(), Ended> {
        self.send(|| Command::CloseHost)
    }
}

impl PacketLoop {
    pub(super) fn open_host(&mut self, host: HostInterface, queue: Tun, reads: bool) {
        self.close_host();
        if reads
            && self.reads
            && let Err(error) = self.epoll.add(&queue, Token::Host.readable())
        {
            warn!("cannot read from the host interface: {error}");
            let _ = self.events.send(Event::HostGone);
            return;
        }
        self.io.host = Some(queue);
        self.reads_host = reads;
        self.path.set_host(Some(host));
    }

    pub(super) fn close_host(&mut self) {
        if let Some(queue) = self.io.host.take() {
            // Others may hold copies of the descriptor, so closing ours would not end its events.
            let _ = self.epoll.delete(&queue);
        }
        self.path.set_host(None);
        self.send_own(self.clock.now());
    }

    pub(super) fn read_host(&mut self) {
        let now = self.clock.now();
        self.path.node_mut().begin_host_turn();
        while self.path.node().host_goes_on() {
            if self.outbox.is_full() {
                self.flush();
            }
            let Some(queue) = &self.io.host else {
                return;
            };
            let room = self.outbox.room();
            match queue.receive(&mut room[HEADROOM..]) {
                Ok((header, len)) => {
                    let Ok(offload) = virtio::Header::parse(&header) else {
                        self.path.node_mut().refuse_host_packet();
                        continue;
                    };
                    let Ok(packet) = PacketBuf::new(room, HEADROOM, len) else {
                        return;
                    };
                    let mut packet = packet.with_offload(offload);
                    let verdict = self.path.from_host(now, &mut packet);
                    let place = (packet.headroom(), packet.len());
                    let offload = packet.offload();
                    self.io
                        .send_later(verdict, &mut self.outbox, place, offload);
                    self.send_own(now);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    debug!("the host interface is gone: {error}");
                    self.close_host();
                    let _ = self.events.send(Event::HostGone);
                    return;
                }
            }
        }
    }
}
