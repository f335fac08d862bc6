//! Devices at ports of simulated nodes: their interface to the simulator, which its own pods and
//! rogues have, too, and what they exchange with it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::virtio;
use smoltcp::time::Instant;
use smoltcp::wire::EthernetAddress;

/// A device behind a port. It has no clock and no randomness but what it is given.
///
/// It is polled when it is attached, when it has got a frame or an order, and when it said that it is
/// to be.
pub trait Device {
    /// Takes an Ethernet frame from the node. A superpacket comes in segments, and the simulator has
    /// checked that the frame is for this device, and from where it says.
    fn receive(&mut self, now: Instant, frame: &[u8]);

    /// Does what is due, and gives the frames to send, in order.
    fn poll(&mut self, now: Instant) -> Vec<Sent>;

    /// When it is to be polled next; `None` if nothing is due.
    fn poll_at(&mut self, now: Instant) -> Option<Instant>;

    /// Its interface has another MTU, in bytes of IP packets.
    fn set_mtu(&mut self, _now: Instant, _mtu: Mtu) {}

    /// Takes an order of the plan. Only a device [that answers](super::DeviceKind::that_answers) gets any.
    fn order(&mut self, _now: Instant, _order: Order) {}

    /// What has happened since the last call. [`Report::Wrong`] ends the run as a violation, which is
    /// how a device has an invariant of its own.
    fn reports(&mut self) -> Vec<Report> {
        Vec::new()
    }
}

/// What a device is given when it is attached. A node that starts anew attaches its devices anew, with
/// another MAC address, and maybe another IP address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Assigned {
    /// The MAC address of its interface.
    pub mac: EthernetAddress,
    /// The address of its interface.
    pub address: Ipv4Addr,
    /// The subnet of its node, which is on its link.
    pub subnet: Ipv4Net,
    /// Its gateway's address, which answers ARP.
    pub gateway: Ipv4Addr,
    /// The address of IPv6 of its interface, if its node has that, and its gateway's.
    pub ipv6: Option<(Ipv6Net, Ipv6Addr)>,
    /// Its gateway's MAC address.
    pub gateway_mac: EthernetAddress,
    /// The MTU of its interface, in bytes of IP packets.
    pub mtu: Mtu,
    /// Which device it is, as [`Identity::sender`] says.
    pub sender: u64,
    /// Its randomness, which follows from the seed of the run.
    pub seed: u64,
}

/// A frame that a device sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// An Ethernet frame, or anything else.
    pub frame: Vec<u8>,
    /// Its virtio-net header, which may say anything.
    pub header: [u8; virtio::LEN],
}

/// A frame of which nothing is left to be done.
impl From<Vec<u8>> for Sent {
    fn from(frame: Vec<u8>) -> Self {
        let header = virtio::Header::default().to_bytes();
        Self { frame, header }
    }
}

/// What a device is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Order {
    /// Send bytes over TCP, behind the flow's number and their own, eight bytes each in network byte
    /// order, and get them back, without those.
    Talk {
        /// Where to.
        to: SocketAddr,
        /// The flow's number, which [`pattern`] makes bytes of.
        flow: u64,
        /// How many bytes.
        bytes: usize,
        /// Whether to end the stream before all is back.
        ends_first: bool,
    },
    /// Send a datagram with a payload of so many bytes, which comes back.
    Query {
        /// Where to.
        to: SocketAddr,
        /// What its payload begins with.
        identity: Identity,
        /// Bytes of payload.
        bytes: usize,
    },
    /// Ping, with a payload of so many bytes.
    Ping {
        /// Where to.
        to: IpAddr,
        /// What its payload begins with.
        identity: Identity,
        /// Bytes of payload.
        bytes: usize,
    },
    /// Forget all connections.
    Rest,
    /// Send something that a pod must not send, about a victim. Only the simulator's own rogues are
    /// asked to.
    Misbehave {
        /// About whom.
        victim: Ipv4Addr,
        /// Its address of IPv6, if it has one.
        victim_v6: Option<Ipv6Addr>,
        /// What payloads begin with.
        identity: Identity,
        /// Which of the rogue's tricks.
        trick: u8,
    },
}

/// What a device has to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Report {
    /// Everything of a flow came back as it was sent.
    Talked(u64),
    /// The connection ended before that.
    Failed {
        /// The flow's number.
        flow: u64,
        /// How.
        why: &'static str,
    },
    /// The answer to the ping or datagram of this number has come.
    Answered(u64),
    /// Something is as it must not be.
    Wrong(String),
}

/// Which ping a packet is, and which device sent it: the beginning of its payload. The simulator sees
/// by it that no packet comes from another than it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The number of the ping or datagram. Each is sent once; the simulator's own count from 1.
    pub ping: u64,
    /// The number of its sender ([`Assigned::sender`]).
    pub sender: u64,
}

const MAGIC: [u8; 8] = *b"sim-ping";

impl Identity {
    /// Bytes of the shortest payload.
    pub const LEN: usize = 24;

    /// A payload of at least [`Self::LEN`] bytes.
    #[must_use]
    pub fn payload(self, len: usize) -> Vec<u8> {
        let mut bytes = [MAGIC, self.ping.to_be_bytes(), self.sender.to_be_bytes()].concat();
        bytes.extend((Self::LEN..len).map(|offset| pattern(self.ping, offset)));
        bytes
    }

    /// Reads the beginning of a payload.
    #[must_use]
    pub fn read(payload: &[u8]) -> Option<Self> {
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
#[must_use]
pub fn pattern(stream: u64, offset: usize) -> u8 {
    (stream.wrapping_mul(31).wrapping_add(offset as u64) % 251) as u8
}

/// The flow's number and the number of bytes, in front of a client's bytes.
pub(super) const HEAD_LEN: usize = 16;
