//! What can be attached to a simulated node's port. A new kind of device is one file that
//! implements [`Device`], and a word in the plan that attaches it.

use std::net::{Ipv4Addr, SocketAddrV4};

use muslin_encap::mtu::Mtu;
use muslin_encap::offload::virtio;
use smoltcp::time::Instant;

use crate::datapath::port::Attachment;

/// A device behind a port. It has no clock and no randomness but what it is given.
pub(super) trait Device {
    /// What the node is told of it.
    fn attachment(&self) -> &Attachment;

    /// Takes a frame from the node.
    fn receive(&mut self, now: Instant, frame: &[u8]);

    /// Its interface has another MTU, in bytes of IP packets.
    fn set_mtu(&mut self, _now: Instant, _mtu: Mtu) {}

    /// Takes an order of the plan. One that it cannot follow is reported as failed.
    fn order(&mut self, now: Instant, order: Order);

    /// Does what is due, and gives each frame for the node to `send`.
    fn poll(&mut self, now: Instant, send: &mut dyn FnMut(Sent));

    /// When it is to be polled next; `None` if nothing is due.
    fn poll_at(&mut self, now: Instant) -> Option<Instant>;

    /// What has happened since the last call.
    fn reports(&mut self) -> Vec<Report>;
}

/// A frame that a device sends.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) frame: Vec<u8>,
    /// Its virtio-net header, which may say anything.
    pub(super) header: [u8; virtio::LEN],
}

impl From<Vec<u8>> for Sent {
    fn from(frame: Vec<u8>) -> Self {
        let header = virtio::Header::default().to_bytes();
        Self { frame, header }
    }
}

/// What a device is asked to do.
#[derive(Debug, Clone, Copy)]
pub(super) enum Order {
    /// Send bytes over TCP, and get as many back.
    Talk {
        to: SocketAddrV4,
        flow: u64,
        bytes: usize,
        /// Whether to end the stream before all is back.
        ends_first: bool,
    },
    /// Send a datagram with a payload of so many bytes, which comes back.
    Query {
        to: SocketAddrV4,
        identity: Identity,
        bytes: usize,
    },
    /// Ping, with a payload of so many bytes.
    Ping {
        to: Ipv4Addr,
        identity: Identity,
        bytes: usize,
    },
    /// Forget all connections.
    Rest,
    /// Send something that a pod must not send, about a victim.
    Misbehave {
        victim: Ipv4Addr,
        identity: Identity,
        trick: u8,
    },
}

/// What a device has to tell.
#[derive(Debug)]
pub(super) enum Report {
    /// Everything came back as it was sent.
    Talked(u64),
    /// The connection ended before that.
    Failed { flow: u64, why: &'static str },
    /// The answer to a ping or a datagram has come.
    Answered(u64),
    /// Something arrived that nobody had sent.
    Wrong(String),
}

/// Which ping a packet is, and which device sent it: the beginning of its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) ping: u64,
    pub(super) sender: u64,
}

const MAGIC: [u8; 8] = *b"sim-ping";

impl Identity {
    /// Bytes of the shortest payload.
    pub(super) const LEN: usize = 24;

    /// A payload of at least `LEN` bytes.
    pub(super) fn payload(self, len: usize) -> Vec<u8> {
        let mut bytes = [MAGIC, self.ping.to_be_bytes(), self.sender.to_be_bytes()].concat();
        bytes.extend((Self::LEN..len).map(|offset| pattern(self.ping, offset)));
        bytes
    }

    /// Reads the beginning of a payload.
    pub(super) fn read(payload: &[u8]) -> Option<Self> {
        let rest = payload.strip_prefix(&MAGIC)?;
        let (ping, rest) = rest.split_first_chunk()?;
        let sender = rest.first_chunk()?;
        Some(Self {
            ping: u64::from_be_bytes(*ping),
            sender: u64::from_be_bytes(*sender),
        })
    }

    /// Finds one anywhere in a datagram.
    pub(super) fn find(datagram: &[u8]) -> Option<Self> {
        let mut windows = datagram.windows(Self::LEN);
        windows.find_map(Self::read)
    }
}

/// The byte that a stream has at an offset. Its period is prime, so that what is lost or repeated
/// does not look right.
pub(super) fn pattern(stream: u64, offset: usize) -> u8 {
    (stream.wrapping_mul(31).wrapping_add(offset as u64) % 251) as u8
}
