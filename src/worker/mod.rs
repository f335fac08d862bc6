//! The data path's threads: each reads frames and datagrams, asks its node what to do with each,
//! and does it.
//!
//! Run to completion: the thread that read a packet also sends it, in the buffer it was read into.
//! The control plane speaks to it by a queue of commands and an event descriptor.

pub mod batches;
mod busy_poll;
mod capture;
mod clients;
mod exchange;
mod host;
mod message;
mod output;
mod packet_loop;
mod published;
mod report;
mod sealing;
mod succession;
mod tables;
mod uplink;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant as StdInstant};

pub use capture::Capturing;
pub use message::Event;
use message::{Command, Queue, Sibling};
use muslin_encap::mtu::Mtu;
use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::datapath::capture::Captures;
use muslin_stack::datapath::egress::{Egress, EgressConfig, Owners};
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::uplink::Uplink;
use muslin_stack::datapath::wireguard::WireGuardConfig;
use nix::sys::eventfd::{EfdFlags, EventFd};
use packet_loop::{Mailbox, PacketLoop};
use report::Page;
pub use report::{
    FlowTable, GroupTable, NeighbourTables, Neighbours, NoAnswer, PeerStates, PortState, Totals,
};
use sealing::Sealing;
pub(crate) use succession::Holdings;
use tokio::sync::{mpsc, watch};
use tokio::time::{self, timeout_at};
use tracing::warn;

use crate::device::PodDevice;
use crate::dns::DnsConnector;
use crate::host::Clock;
use crate::host::publish::Bound;
use crate::underlay::Underlay;

/// A worker's node, of which packets can be captured.
pub type Node = muslin_stack::datapath::node::Node<Captures>;
type Datapath = muslin_stack::datapath::Datapath<Captures>;

/// The control plane's end of the workers. Their threads end with it.
///
/// Each has a node and sockets of its own, and a queue of every pod's device: the kernel keeps a
/// flow on the queue and socket it is on, so that few packets pass from one thread to another: ARP,
/// and those that begin on another queue than the egress flow that they belong to. What the control
/// plane says it says to all of them.
#[derive(Debug)]
pub struct Workers(Vec<Worker>);

#[derive(Debug)]
struct Worker {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    /// How often it has looked for something to do.
    turns: Arc<AtomicU64>,
    page: Page,
    /// As its siblings see it.
    sibling: Sibling,
    thread: JoinHandle<()>,
}

/// Messages that may wait for a worker.
const MAILBOX_LEN: usize = 256;
/// How long a command that must be done may take. The data path does not wait for anything.
const PATIENCE: Duration = Duration::from_secs(1);
/// When it is looked again whether a thread has ended.
const LOOK: Duration = Duration::from_millis(2);

/// A port on its way to be closed by all workers.
#[derive(Debug, Clone)]
pub struct Closing {
    /// Each of them has a sender until it is done.
    open: watch::Receiver<()>,
    deadline: time::Instant,
}

impl Closing {
    /// Whether there is nothing more to wait for.
    pub(crate) fn is_over(&self) -> bool {
        self.open.has_changed().is_err() || self.deadline <= time::Instant::now()
    }

    /// Waits until the port's device and its published ports are closed; for a thread that hangs not
    /// for ever.
    pub async fn over(mut self) {
        let _ = timeout_at(self.deadline, self.open.changed()).await;
    }
}

/// The data path has ended, which it only does by a defect or at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the data path's thread has ended")]
pub struct Ended;

impl Workers {
    /// Starts a thread for each pair of node and sockets, each with its share of egress and the way
    /// to `dns`; their events go to `events`. With WireGuard there is one. They read nothing until [`Self::read`].
    ///
    /// # Errors
    /// If the kernel gives no threads or descriptors.
    pub fn start(
        nodes: Vec<(Node, Underlay)>,
        wireguard: Option<&WireGuardConfig>,
        outside: &EgressConfig,
        dns: &DnsConnector,
        clock: Clock,
        events: &mpsc::UnboundedSender<Event>,
    ) -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let mut share = outside.clone();
        share.limits = outside.limits.shared(nodes.len());
        let (mut all, mut inboxes) = (Vec::new(), Vec::new());
        for _ in &nodes {
            let (sender, messages) = sync_channel(MAILBOX_LEN);
            all.push(Sibling {
                messages: sender,
                wake: Arc::new(EventFd::from_flags(flags)?),
            });
            inboxes.push(messages);
        }
        let owners = Arc::new(Owners::new(outside.random_seed));
        let mut workers = Self(Vec::new());
        for (index, ((node, underlay), messages)) in nodes.into_iter().zip(inboxes).enumerate() {
            let sibling = all[index].clone();
            let wake = sibling.wake.clone();
            let (commands, receiver) = channel();
            let (writer, page) = report::page();
            let mailbox = Mailbox {
                commands: receiver,
                messages,
                wake: wake.clone(),
                all: all.clone(),
                // There are no more than fit (`--workers`).
                index: u8::try_from(index).unwrap_or(u8::MAX),
                turns: Arc::default(),
                page: writer,
                predecessor: None,
            };
            let mut path = Datapath::new(node, Egress::new(share.clone(), clock.now()));
            if all.len() > 1 {
                path.share(owners.clone(), mailbox.index);
            }
            let peers = path.node().peers();
            let sealing = wireguard.map(|config| Sealing::new(config.clone(), clock, peers));
            let sealing = sealing.transpose().map_err(io::Error::other)?;
            let turns = mailbox.turns.clone();
            let (dns, events) = (dns.clone(), events.clone());
            let packet_loop =
                PacketLoop::new(path, underlay, sealing, dns, clock, events, mailbox)?;
            let thread = std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || packet_loop.run())?;
            workers.0.push(Worker {
                commands,
                wake,
                turns,
                page,
                sibling,
                thread,
            });
        }
        Ok(workers)
    }

    /// Attaches a port by the queues of its device. If there are fewer than workers, those without
    /// one write to the first, and ports differ in who those are; if there are more, those are not used.
    ///
    /// # Errors
    /// If there are no more descriptors, or `Ended` if the thread has ended.
    pub fn attach(
        &self,
        port: PortId,
        attachment: &Attachment,
        queues: Vec<PodDevice>,
    ) -> io::Result<()> {
        if queues.len() > 1 {
            for (index, queue) in queues.iter().enumerate() {
                queue.use_queue(index < self.0.len());
            }
        }
        let first = queues
            .first()
            .ok_or(io::ErrorKind::InvalidInput)?
            .try_clone()?;
        let begin = match queues.len() < self.0.len() {
            true => port.0 as usize % self.0.len(),
            false => 0,
        };
        let mut queues = queues.into_iter();
        for worker in self.0[begin..].iter().chain(&self.0[..begin]) {
            let queue = match queues.next() {
                Some(device) => Queue {
                    device,
                    reads: true,
                },
                None => Queue {
                    device: first.try_clone()?,
                    reads: false,
                },
            };
            let told = worker.send(Command::Attach(port, attachment.clone(), queue));
            told.map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Publishes ports of an attached pod at its address, which has the length of the overlay's network.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub(crate) fn publish(
        &self,
        port: PortId,
        address: Addresses,
        network: Nets,
        bound: Vec<Bound>,
    ) -> Result<(), Ended> {
        let known: Vec<_> = bound.iter().map(|bound| bound.published).collect();
        let mut all = Some(bound.into_iter().map(|it| (it.published, Some(it.socket))));
        for worker in &self.0 {
            // The first has the sockets.
            let ports = match all.take() {
                Some(all) => all.collect(),
                None => known.iter().map(|it| (*it, None)).collect(),
            };
            worker.send(Command::Publish(port, address, network, ports))?;
        }
        Ok(())
    }

    /// Detaches a port, closes its device and its published ports. They are free when what this
    /// returns is over.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub fn detach(&self, port: PortId) -> Result<Closing, Ended> {
        let (open, closing) = watch::channel(());
        self.send(|| Command::Detach(port, open.clone()))?;
        Ok(Closing {
            open: closing,
            deadline: time::Instant::now() + PATIENCE,
        })
    }

    /// Adds or changes a peer.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub fn set_peer(&self, peer: &Peer) -> Result<(), Ended> {
        self.send(|| Command::SetPeer(peer.clone()))
    }

    /// Removes a peer.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub fn remove_peer(&self, peer: PeerId) -> Result<(), Ended> {
        self.send(|| Command::RemovePeer(peer))
    }

    /// Asks peers for a sign of life. What comes back is counted like all that comes from them.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub fn probe(&self, peers: Vec<PeerId>) -> Result<(), Ended> {
        match self.0.first() {
            Some(worker) => worker.send(Command::Probe(peers)),
            None => Err(Ended),
        }
    }

    /// Sends and receives by other sockets from now on, for each worker its own, with this uplink.
    /// Where there is none for a tunnel the tunnel stays.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub fn rebind(&self, underlays: Vec<Underlay>, uplink: Option<Uplink>) -> Result<(), Ended> {
        let mut pairs = self.0.iter().zip(underlays);
        pairs.try_for_each(|(worker, underlay)| worker.send(Command::Rebind(underlay, uplink)))
    }

    /// Ends the data path, whatever is requested after this: nothing reports that pods are gone
    /// which are only detached because the node stops.
    pub(crate) fn stop(&self) {
        // One that has ended already is as good.
        let _ = self.send(|| Command::Stop);
    }

    /// Changes the MTU of pods and of the way to peers, and that of IPv6.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub fn set_mtu(&self, mtu: Mtu, mtu_v6: Option<Mtu>) -> Result<(), Ended> {
        self.send(|| Command::SetMtu(mtu, mtu_v6))
    }

    /// Closes egress to where the store is now.
    ///
    /// # Errors
    /// `Ended` if the thread has ended.
    pub(crate) fn set_stores(&self, stores: &[SocketAddr]) -> Result<(), Ended> {
        self.send(|| Command::SetStores(stores.to_vec()))
    }

    /// How often each worker has looked for something to do. All look once more, so that one whose
    /// number stays what it is hangs.
    pub(crate) fn turns(&self) -> Vec<u64> {
        let turns = self.0.iter().map(|worker| {
            let turns = worker.turns.load(Ordering::Relaxed);
            let _ = worker.wake.write(1);
            turns
        });
        turns.collect()
    }

    fn send(&self, command: impl Fn() -> Command) -> Result<(), Ended> {
        self.0.iter().try_for_each(|worker| worker.send(command()))
    }
}

impl Worker {
    fn send(&self, command: Command) -> Result<(), Ended> {
        self.commands.send(command).map_err(|_| Ended)?;
        // A full counter wakes the thread as well.
        let _ = self.wake.write(1);
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
        let deadline = StdInstant::now() + PATIENCE;
        for (index, worker) in self.0.drain(..).enumerate() {
            while !worker.thread.is_finished() && StdInstant::now() < deadline {
                std::thread::sleep(LOOK);
            }
            if worker.thread.is_finished() {
                // A panic has been reported already.
                let _ = worker.thread.join();
            } else {
                // It ends with the process.
                warn!("worker-{index} does not stop");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_is_closed_when_all_workers_have_closed_it() {
        let port = |patience| {
            let (open, closing) = watch::channel(());
            let closing = Closing {
                open: closing,
                deadline: time::Instant::now() + patience,
            };
            (open, closing)
        };
        let (open, closing) = port(Duration::from_secs(3600));
        let other = open.clone();
        drop(open);
        assert!(!closing.is_over());
        tokio::join!(closing.clone().over(), async {
            time::sleep(Duration::ZERO).await;
            drop(other);
        });
        assert!(closing.is_over());

        // One that hangs is not waited for.
        let (_open, closing) = port(Duration::ZERO);
        closing.clone().over().await;
        assert!(closing.is_over());
    }
}
