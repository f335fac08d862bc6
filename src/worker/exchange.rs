//! Messages between nodes on their way between the workers and the control plane.

use std::net::IpAddr;

use muslin_stack::datapath::exchange::Message;
use muslin_stack::datapath::port::PortId;
use muslin_stack::drops::DropReason;
use tokio::sync::mpsc;

use super::message::Command;
use super::packet_loop::PacketLoop;
use super::{Ended, Workers};

/// Messages that may wait for who reads them.
const WAITING: usize = 256;

impl Workers {
    /// Takes messages of other nodes' gateways from now on.
    ///
    /// # Errors
    /// `Ended` if a thread has ended.
    pub fn open_exchange(&self) -> Result<mpsc::Receiver<Message>, Ended> {
        let (sender, messages) = mpsc::channel(WAITING);
        self.send(|| Command::OpenExchange(sender.clone()))?;
        Ok(messages)
    }

    /// Sends a message to another node's gateway. It may be lost.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub fn tell(&self, to: IpAddr, message: Vec<u8>) -> Result<(), Ended> {
        let worker = self.0.first().ok_or(Ended)?;
        worker.send(Command::Tell(to, message))
    }

    /// Takes a frame as if the pod at this port had sent it.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub fn inject(&self, port: PortId, frame: Vec<u8>) -> Result<(), Ended> {
        let worker = self.0.first().ok_or(Ended)?;
        worker.send(Command::Inject(port, frame))
    }

    /// Counts packets that were lost after they had left the data path.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub fn count_drops(&self, reason: DropReason, packets: u64) -> Result<(), Ended> {
        let worker = self.0.first().ok_or(Ended)?;
        worker.send(Command::CountDrops(reason, packets))
    }
}

impl PacketLoop {
    pub(super) fn open_exchange(&mut self, reader: mpsc::Sender<Message>) {
        let now = self.clock.now();
        self.path.node_mut().set_exchange(now, true);
        self.exchange = Some(reader);
    }

    pub(super) fn tell(&mut self, to: IpAddr, message: &[u8]) {
        let now = self.clock.now();
        // The peer may have gone; then nothing was sent that could be lost.
        if self.path.node_mut().send_exchange(now, to, message).is_ok() {
            self.send_own(now);
        }
    }

    /// Hands on what was heard in this turn.
    pub(super) fn flush_exchange(&mut self) {
        let Some(reader) = &self.exchange else {
            return;
        };
        let node = self.path.node_mut();
        let mut lost = 0;
        while let Some(message) = node.poll_exchange() {
            lost += u64::from(reader.try_send(message).is_err());
        }
        if lost > 0 {
            node.count_drops(DropReason::ExchangeRefused, lost);
        }
    }
}
