//! What egress asks of those around it: sockets of the host, and a way to the pods.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};

use muslin_encap::buffer::PacketBuf;
use smoltcp::time::Instant;
use thiserror::Error;

use super::{Complaint, FlowKey, Marks};
use crate::drops::DropReason;
use crate::icmp::IcmpError;

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

/// The transport protocol of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo.
    Ping,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Ping => "ping",
        })
    }
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
    /// Anything else: no descriptors, no ports.
    #[error("the host has no socket for it")]
    Failed,
}

/// Sockets of the host, one for each flow. No call waits.
pub trait Host {
    /// Makes a socket for a flow and begins to connect it. What becomes of a TCP connection
    /// [`Host::connected`] says when the socket is writable.
    ///
    /// # Errors
    /// Why there is no connection, if that is known at once; there is no socket then.
    fn connect(
        &mut self,
        flow: FlowId,
        protocol: Protocol,
        to: SocketAddrV4,
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

    /// Reads a part of a stream, of which no bytes are the end, or one datagram.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing, or what is wrong.
    fn read(&mut self, flow: FlowId, buffer: &mut [u8]) -> Result<usize, HostError>;

    /// Writes a part of a stream, and says how much, or one datagram.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room, or what is wrong.
    fn write(&mut self, flow: FlowId, bytes: &[u8]) -> Result<usize, HostError>;

    /// Has datagrams of a flow sent with these marks from now on, as far as the host permits it.
    fn mark(&mut self, flow: FlowId, marks: Marks);

    /// Takes a complaint about datagrams of a flow, with what it quotes. Reads and writes fail while
    /// there are any.
    fn complaint(&mut self, flow: FlowId, quoted: &mut [u8]) -> Option<Complaint>;

    /// Ends the stream to the other end.
    ///
    /// # Errors
    /// If it has ended otherwise.
    fn shutdown(&mut self, flow: FlowId) -> Result<(), HostError>;

    /// Closes a flow's socket; a TCP connection is reset if `reset` says so.
    fn close(&mut self, flow: FlowId, reset: bool);
}

/// The way to the pods.
pub trait Pods {
    /// Sends an IPv4 packet to a pod. It may be a superpacket, its checksum may be unfinished, and
    /// there are [`muslin_encap::buffer::HEADROOM`] bytes in front.
    ///
    /// # Errors
    /// Why the router drops it; that is counted already.
    fn send(&mut self, now: Instant, packet: &mut PacketBuf<'_>) -> Result<(), DropReason>;

    /// Tells the sender of `offender`, the beginning of an IPv4 packet, of an error.
    fn report(&mut self, now: Instant, error: IcmpError, offender: &[u8]);

    /// Passes on what `from` has to say, who is outside, about `offender`, likewise.
    fn relay(&mut self, now: Instant, from: Ipv4Addr, error: IcmpError, offender: &[u8]);

    /// Counts packets of pods that were kept for a while and are lost.
    fn lose(&mut self, reason: DropReason, packets: u64);
}
