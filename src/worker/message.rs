//! What workers are told: by the control plane and by each other.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use muslin_encap::mtu::Mtu;
use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::api::published::PortMapping;
use muslin_stack::datapath::SiblingMessage;
use muslin_stack::datapath::capture::{Batch, Wanted};
use muslin_stack::datapath::egress::FlowKey;
use muslin_stack::datapath::exchange::Message;
use muslin_stack::datapath::host_interface::HostInterface;
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::uplink::Uplink;
use muslin_stack::drops::DropReason;
use nix::sys::eventfd::EventFd;
use socket2::Socket;
use tokio::sync::{oneshot, watch};

use super::capture::Tap;
use super::report::Question;
use super::succession::Holdings;
use crate::device::{PodDevice, Tun};
use crate::underlay::Underlay;

/// A command of the control plane.
pub(super) enum Command {
    Attach(PortId, Attachment, Queue),
    /// PortMapping ports of the pod at these addresses, with their sockets for the worker that has them,
    /// and the overlay's networks.
    Publish(PortId, Addresses, Nets, Vec<(PortMapping, Option<Socket>)>),
    /// Detach a port; the sender goes when that is done.
    Detach(PortId, watch::Sender<()>),
    SetPeer(Peer),
    RemovePeer(PeerId),
    /// Ask these peers for a sign of life.
    Probe(Vec<PeerId>),
    Rebind(Underlay, Option<Uplink>),
    SetMtu(Mtu, Option<Mtu>),
    /// The host interface, by its queue for this worker, and whether this worker reads that.
    OpenHost(HostInterface, Tun, bool),
    /// The host has other addresses.
    SetHost(HostInterface),
    /// There is no host interface.
    CloseHost,
    /// Where the store is.
    SetStores(Vec<SocketAddr>),
    /// Copy a table for a reader.
    Copy(Question),
    /// Capture this into that batch.
    Capture(Box<(Wanted, Batch)>, Tap),
    /// End a capture.
    EndCapture(u64),
    /// Take messages of other nodes from now on, for this reader.
    OpenExchange(tokio::sync::mpsc::Sender<Message>),
    /// Send this to another node's gateway.
    Tell(IpAddr, Vec<u8>),
    /// Take a frame as if the pod at this port had sent it.
    Inject(PortId, Vec<u8>),
    /// Count packets that were lost after they had left the data path.
    CountDrops(DropReason, u64),
    /// Stop to read, for another process to go on with what there is.
    Suspend(oneshot::Sender<io::Result<Holdings>>),
    /// Read all that there is to read.
    Read,
    /// Serve the flows to their end, and nothing else.
    Drain,
    /// Give packets of these flows to the process before this one.
    Succeed(Vec<FlowKey>, SyncSender<SiblingMessage>),
    /// These of its flows have ended, or all.
    ForgetPredecessors(Option<Vec<FlowKey>>),
    Stop,
}

/// A queue of a pod's device.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) device: PodDevice,
    /// Whether this worker reads it; all may write to it.
    pub(super) reads: bool,
}

/// Events that the data path reports by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A port's interface is gone, with its namespace.
    PortGone(PortId),
    /// The uplink's interface is gone.
    UplinkGone,
    /// The host interface is gone.
    HostGone,
    /// A thread has ended.
    Ended,
}

/// A worker, as the others see it.
#[derive(Debug, Clone)]
pub(super) struct Sibling {
    pub(super) messages: SyncSender<SiblingMessage>,
    pub(super) wake: Arc<EventFd>,
}

impl Sibling {
    /// Tells it something; false if its mailbox is full.
    pub(super) fn send(&self, message: SiblingMessage) -> bool {
        let told = self.messages.try_send(message).is_ok();
        let _ = self.wake.write(1);
        told
    }

    /// The same once there is room; false if it has ended.
    pub(super) fn wait_and_send(&self, message: SiblingMessage) -> bool {
        let told = self.messages.send(message).is_ok();
        let _ = self.wake.write(1);
        told
    }
}
