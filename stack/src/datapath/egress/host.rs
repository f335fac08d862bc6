//! What egress asks of those around it: sockets of the host.

use std::net::{IpAddr, SocketAddr};

use muslin_encap::ip::v6;
use smoltcp::wire::{IpVersion, Ipv4Packet, Ipv6Packet};
use thiserror::Error;

use super::key::{FlowKey, Protocol};
use super::reassembly;
use crate::datapath::icmp::IcmpError;
use crate::drops::DropReason;

/// A flow's identity. It is not used again for long after the flow's end, so that an event that
/// comes late is not taken for another flow's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowId {
    /// Its place in the table.
    pub index: u32,
    /// How many flows have had that place before.
    pub generation: u32,
}

impl FlowId {
    /// How many flows have a place before a generation comes again: a power of two.
    pub const GENERATIONS: u32 = 1 << 30;
}

/// What a socket is ready for, as far as is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ready {
    /// There may be something to read, the end or an error included.
    pub readable: bool,
    /// There may be room to write.
    pub writable: bool,
}

/// What datagrams have in their headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Differentiated services code point (RFC 2474), of six bits.
    pub dscp: u8,
    /// Whether routers, and the host, must not fragment them; of IPv6 it is the host alone that might.
    pub dont_fragment: bool,
}

impl Marks {
    /// Those of a pod's packet behind this router, which has seen that its time to live is not over,
    /// for a socket of an IP version.
    ///
    /// Congestion is not among them: what the network says of it on the way back, the host's socket
    /// does not tell, and a pod that hears nothing would take that for none.
    pub(super) fn behind(packet: &[u8], socket: IpVersion) -> Self {
        let behind = |ttl: u8| ttl.saturating_sub(1).max(1);
        if packet.first().is_some_and(|first| first >> 4 == 6) {
            let view = Ipv6Packet::new_unchecked(packet);
            // The shortest MTU of IPv6 is no promise of IPv4, whose routers may do what the sender
            // would not know that it has to (RFC 7915 section 5.1).
            let fits = socket == IpVersion::Ipv4 && packet.len() <= v6::MIN_MTU.into();
            return Self {
                ttl: behind(view.hop_limit()),
                dscp: view.traffic_class() >> 2,
                dont_fragment: !fits && !reassembly::was_fragmented(packet),
            };
        }
        let view = Ipv4Packet::new_unchecked(packet);
        Self {
            ttl: behind(view.hop_limit()),
            dscp: view.dscp(),
            dont_fragment: view.dont_frag(),
        }
    }
}

/// What is wrong with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Complaint {
    /// What it is.
    pub error: IcmpError,
    /// Who says so, about an earlier datagram; nobody, if the host itself does not send this one.
    pub from: Option<IpAddr>,
    /// Where that datagram was sent; echo requests have no port.
    pub to: SocketAddr,
    /// Bytes that are quoted: of the payload of UDP, or of the echo request.
    pub len: usize,
}

/// Why a socket of the host does not do what it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HostError {
    /// Not now; [`super::Egress::ready`] will tell when.
    #[error("it would block")]
    WouldBlock,
    /// Nobody listens there.
    #[error("connection refused")]
    Refused,
    /// There is no way there.
    #[error("network unreachable")]
    NetUnreachable,
    /// The last router does not find it.
    #[error("host unreachable")]
    HostUnreachable,
    /// Nobody answers.
    #[error("timed out")]
    TimedOut,
    /// The other end reset the connection.
    #[error("connection reset")]
    Reset,
    /// A filter of the host forbids it.
    #[error("not permitted")]
    NotPermitted,
    /// A datagram is larger than the path takes.
    #[error("message too long")]
    TooLong,
    /// It has no port, descriptor or memory left.
    #[error("the host has no port, descriptor or memory left")]
    Exhausted,
    /// Anything else.
    #[error("the host has no socket for it")]
    Failed,
}

impl HostError {
    /// Whether it may be about an earlier datagram than the one that fails.
    pub(super) const fn may_be_earlier(self) -> bool {
        matches!(self, Self::Refused | Self::HostUnreachable)
    }

    /// What tells a pod that its packet does not go on. Where the host has nothing left for a flow
    /// that is "host unreachable", as of any translator (RFC 6888 section 3, REQ-8).
    pub(super) const fn to_icmp(self) -> Option<IcmpError> {
        match self {
            Self::Refused | Self::Reset => Some(IcmpError::PortUnreachable),
            Self::NetUnreachable => Some(IcmpError::NetUnreachable),
            Self::HostUnreachable | Self::Exhausted | Self::Failed => {
                Some(IcmpError::HostUnreachable)
            }
            Self::NotPermitted => Some(IcmpError::Prohibited),
            Self::WouldBlock | Self::TimedOut | Self::TooLong => None,
        }
    }

    /// Why a packet is dropped.
    pub(super) fn to_reason(self, protocol: Protocol) -> DropReason {
        match self {
            Self::WouldBlock => DropReason::EgressHostFull,
            Self::NotPermitted if protocol == Protocol::Ping => DropReason::EgressPing,
            Self::NotPermitted => DropReason::EgressDenied,
            Self::NetUnreachable | Self::HostUnreachable => DropReason::EgressUnreachable,
            Self::TooLong => DropReason::EgressTooLong,
            Self::Exhausted => DropReason::EgressExhausted,
            Self::Refused | Self::TimedOut | Self::Reset | Self::Failed => {
                DropReason::EgressHostFailed
            }
        }
    }
}

/// Sockets of the host, one for each flow. No call waits.
pub trait Host {
    /// Makes a socket of an IP version for a mapping (see [`FlowKey::is_mapping`]): it has one port, or one identifier
    /// of echo requests, for all destinations, and takes what comes to that from anywhere. Its
    /// datagrams go by [`Host::send`] and come by [`Host::receive`].
    ///
    /// # Errors
    /// Why there is no socket.
    fn open(
        &mut self,
        flow: FlowId,
        protocol: Protocol,
        version: IpVersion,
    ) -> Result<(), HostError>;

    /// Makes a socket for a flow and begins to connect it. What becomes of a TCP connection
    /// [`Host::connected`] says when the socket is writable.
    ///
    /// # Errors
    /// Why there is no connection, if that is known at once; there is no socket then.
    fn connect(
        &mut self,
        flow: FlowId,
        protocol: Protocol,
        to: SocketAddr,
    ) -> Result<(), HostError>;

    /// Makes a socket for a flow of a pod of this node to a port of the gateway, where a service
    /// has the other end. Of a TCP connection [`Host::connected`] tells as of others.
    ///
    /// # Errors
    /// `Refused` if nothing serves there.
    fn serve(&mut self, flow: FlowId, key: FlowKey) -> Result<(), HostError>;

    /// Says, once, what became of [`super::Egress::dial`]. If there is no connection the flow's
    /// socket is closed after this.
    fn dialled(&mut self, flow: FlowId, result: Result<(), HostError>);

    /// Whether a TCP connection is there.
    ///
    /// # Errors
    /// `WouldBlock` if it is not decided, or why there is none.
    fn connected(&mut self, flow: FlowId) -> Result<(), HostError>;

    /// Sends one datagram, or an echo request with its header, of a mapping.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room, or what is wrong.
    fn send(&mut self, flow: FlowId, to: SocketAddr, bytes: &[u8]) -> Result<(), HostError>;

    /// Receives one datagram, or an echo reply with its header, of a mapping: its length and who
    /// has sent it.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing, or what is wrong.
    fn receive(
        &mut self,
        flow: FlowId,
        buffer: &mut [u8],
    ) -> Result<(usize, SocketAddr), HostError>;

    /// Reads a part of a stream, of which no bytes are the end, or one datagram of a flow that is no
    /// mapping.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing, or what is wrong.
    fn read(&mut self, flow: FlowId, buffer: &mut [u8]) -> Result<usize, HostError>;

    /// Writes a part of a stream, and says how much, or one datagram of a flow that is no mapping.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room, or what is wrong.
    fn write(&mut self, flow: FlowId, bytes: &[u8]) -> Result<usize, HostError>;

    /// Sends datagrams of `size` bytes each (the last may be shorter), to an address if it is a
    /// mapping's flow: all of them, or none. One that cannot do so at once is given one after the
    /// other.
    ///
    /// # Errors
    /// Why none is sent.
    fn send_train(
        &mut self,
        _flow: FlowId,
        _to: Option<SocketAddr>,
        _datagrams: &[u8],
        _size: u16,
    ) -> Result<(), HostError> {
        Err(HostError::Failed)
    }

    /// Has datagrams of a flow sent with these marks from now on, as far as the host permits it.
    fn mark(&mut self, flow: FlowId, marks: Marks);

    /// Takes a complaint about datagrams of a flow, with what it quotes. To send and to receive fails
    /// while there are any.
    fn complaint(&mut self, flow: FlowId, quoted: &mut [u8]) -> Option<Complaint>;

    /// Ends the stream to the other end.
    ///
    /// # Errors
    /// If it has ended otherwise.
    fn shutdown(&mut self, flow: FlowId) -> Result<(), HostError>;

    /// Closes a flow's socket; a TCP connection is reset if `reset` says so.
    fn close(&mut self, flow: FlowId, reset: bool);
}

/// A host without sockets, for a data path that reaches nothing outside the overlay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NoHost;

impl Host for NoHost {
    fn open(&mut self, _: FlowId, _: Protocol, _: IpVersion) -> Result<(), HostError> {
        Err(HostError::Failed)
    }

    fn connect(&mut self, _: FlowId, _: Protocol, _: SocketAddr) -> Result<(), HostError> {
        Err(HostError::Failed)
    }

    fn serve(&mut self, _: FlowId, _: FlowKey) -> Result<(), HostError> {
        Err(HostError::Refused)
    }

    fn dialled(&mut self, _: FlowId, _: Result<(), HostError>) {}

    fn connected(&mut self, _: FlowId) -> Result<(), HostError> {
        Err(HostError::Failed)
    }

    fn send(&mut self, _: FlowId, _: SocketAddr, _: &[u8]) -> Result<(), HostError> {
        Err(HostError::Failed)
    }

    fn receive(&mut self, _: FlowId, _: &mut [u8]) -> Result<(usize, SocketAddr), HostError> {
        Err(HostError::Failed)
    }

    fn read(&mut self, _: FlowId, _: &mut [u8]) -> Result<usize, HostError> {
        Err(HostError::Failed)
    }

    fn write(&mut self, _: FlowId, _: &[u8]) -> Result<usize, HostError> {
        Err(HostError::Failed)
    }

    fn mark(&mut self, _: FlowId, _: Marks) {}

    fn complaint(&mut self, _: FlowId, _: &mut [u8]) -> Option<Complaint> {
        None
    }

    fn shutdown(&mut self, _: FlowId) -> Result<(), HostError> {
        Err(HostError::Failed)
    }

    fn close(&mut self, _: FlowId, _: bool) {}
}
