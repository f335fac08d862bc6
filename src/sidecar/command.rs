//! The pod's thread's commands, and the data passed to and from it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use muslin_stack::addresses::Addresses;
use muslin_stack::api::control::Attached;
use muslin_stack::datapath::egress::{HostError, Protocol};
use tokio::sync::{mpsc, oneshot};

use super::room::{Room, Taken};
use crate::error::Error;

/// Who the pod is: its addresses, of the IP versions in which it has a gateway, and those of its gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) address: Addresses,
    pub(super) gateway: Addresses,
    pub(super) mtu: u16,
}

impl TryFrom<&Attached> for Place {
    type Error = Error;

    fn try_from(attached: &Attached) -> Result<Self, Error> {
        let (address, gateway) = (attached.address.addresses(), attached.gateway);
        let ipv4 = address.ipv4().filter(|_| gateway.ipv4().is_some());
        let ipv6 = address.ipv6().filter(|_| gateway.ipv6().is_some());
        let address = Addresses::new(ipv4, ipv6);
        let address = address.ok_or_else(|| Error::failed("the node gave the pod no address"))?;
        let link = attached.link;
        Ok(Self {
            address,
            gateway,
            // Its connections are of one length, whatever they lead through.
            mtu: ipv6.and(link.mtu_v6).unwrap_or(link.mtu).min(link.mtu),
        })
    }
}

/// A port of the pod's address that leads to a socket of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exposed {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port of the pod's address.
    pub port: u16,
    /// Who serves it.
    pub to: SocketAddr,
}

/// Commands for the thread.
pub(super) enum Command {
    Dial {
        to: SocketAddr,
        socket: OwnedFd,
        reset: Arc<AtomicBool>,
        outcome_sender: oneshot::Sender<Result<(), HostError>>,
    },
    Bind {
        inbox: Inbox,
        outcome_sender: oneshot::Sender<Option<u16>>,
    },
    Send {
        port: u16,
        datagram: Datagram,
    },
    Unbind(u16),
    Move(Place),
    Stop,
}

/// A datagram that waits.
#[derive(Debug)]
pub(super) struct Datagram {
    /// Who it is from, or to.
    pub(super) peer: SocketAddr,
    pub(super) payload: Vec<u8>,
    _room: Taken,
}

impl Datagram {
    /// One that takes this room while it waits.
    pub(super) fn new(peer: SocketAddr, payload: &[u8], room: Taken) -> Self {
        Self {
            peer,
            payload: payload.to_vec(),
            _room: room,
        }
    }
}

/// A port's queue of received datagrams.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) reader: mpsc::UnboundedSender<Datagram>,
    pub(super) room: Room,
}

impl Inbox {
    /// Puts a datagram there.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room, `Refused` if the reader is gone.
    pub(super) fn put(&self, from: SocketAddr, payload: &[u8]) -> Result<(), HostError> {
        let room = self.room.take(payload.len()).ok_or(HostError::WouldBlock)?;
        let put = self.reader.send(Datagram::new(from, payload, room));
        put.map_err(|_| HostError::Refused)
    }
}
