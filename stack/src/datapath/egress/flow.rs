//! What is told of a flow.

use std::fmt;
use std::net::SocketAddr;

use smoltcp::time::Instant;

use super::key::FlowKey;

/// A flow at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowInfo {
    /// Whose it is.
    pub key: FlowKey,
    /// The other end, as the pod calls it; of a mapping the one to which the pod has sent last.
    pub remote: SocketAddr,
    /// Who began it.
    pub direction: Direction,
    /// How far it is.
    pub state: FlowState,
    /// When it began.
    pub since: Instant,
    /// When anything last went either way.
    pub active: Instant,
    /// Bytes of payload from the pod.
    pub sent: u64,
    /// Bytes of payload to the pod.
    pub received: u64,
}

/// Who began a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// The pod.
    Out,
    /// The host's side.
    In,
}

/// How far a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FlowState {
    /// A TCP connection that is not there at both ends.
    Connecting,
    /// Both ends may send.
    Open,
    /// One end of a TCP connection has nothing more to send.
    HalfClosed,
    /// Neither end has, and not all is acknowledged.
    Closing,
}

/// What a flow has carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usage {
    /// Who began it.
    pub(super) direction: Direction,
    /// When it began.
    pub(super) since: Instant,
    /// When it was last in use.
    pub(super) active: Instant,
    /// Bytes of payload from the pod.
    pub(super) sent: u64,
    /// Bytes of payload to the pod.
    pub(super) received: u64,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Out => "out",
            Self::In => "in",
        })
    }
}

impl fmt::Display for FlowState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connecting => "connecting",
            Self::Open => "open",
            Self::HalfClosed => "half-closed",
            Self::Closing => "closing",
        })
    }
}
