//! The state of a flow.

use smoltcp::time::Duration;

use super::clock::Clock;
use super::datagram::Destination;
use super::flow::{FlowInfo, FlowState, Usage};
use super::host::{HostError, Marks, Ready};
use super::key::Key;
use super::owners::Claim;
use super::tcp::Connection;
use crate::drops::DropReason;

/// The time after now: the least that lets others have their turn.
pub(super) const LATER: Duration = Duration::from_micros(1);

/// How long a pod may take to answer a SYN. A living one needs a round trip; who waits at the host's
/// socket thinks that it is connected, and is not to think so for long.
pub(super) const DIAL_LIMIT: Duration = Duration::from_secs(30);

pub(super) type Step = Result<(), DropReason>;

/// What a flow is waiting for or doing.
pub(super) enum Flow {
    /// The host connects; the pod's SYN waits for how that ends.
    Connecting { syn: Box<[u8]> },
    /// The host's socket is there; the pod is asked.
    Dialling(Box<Dial>),
    /// Bytes go both ways.
    Connected {
        connection: Box<Connection>,
        ready: Ready,
    },
    /// Datagrams go both ways.
    Datagrams {
        readable: bool,
        /// What the host was told last.
        marks: Option<Marks>,
        /// Of a mapping, where the pod has sent to last.
        latest: Option<Destination>,
        claim: Claim,
    },
}

/// A connection to a pod that has not answered.
pub(super) struct Dial {
    pub(super) connection: Connection,
    /// What the pod is sent first.
    pub(super) preface: Box<[u8]>,
    /// Why it cannot answer, if that is known.
    pub(super) fails: Option<HostError>,
}

impl Flow {
    /// Datagrams with one other end, at their beginning.
    pub(super) const DATAGRAMS: Self = Self::Datagrams {
        readable: false,
        marks: None,
        latest: None,
        claim: Claim::Free,
    };

    /// Where the pod of a mapping has sent to last.
    pub(super) const fn latest(&self) -> Option<Destination> {
        match self {
            Self::Datagrams { latest, .. } => *latest,
            Self::Connecting { .. } | Self::Dialling(_) | Self::Connected { .. } => None,
        }
    }

    /// Whether the pod has ended its stream, and the host has all of it.
    pub(super) fn is_delivered(&self) -> bool {
        matches!(self, Self::Connected { connection, .. } if connection.shut)
    }

    pub(super) fn connection(&mut self) -> Option<&mut Connection> {
        match self {
            Self::Dialling(dial) => Some(&mut dial.connection),
            Self::Connected { connection, .. } => Some(connection),
            Self::Connecting { .. } | Self::Datagrams { .. } => None,
        }
    }

    fn state(&self) -> FlowState {
        match self {
            Self::Connecting { .. } | Self::Dialling(_) => FlowState::Connecting,
            Self::Connected { connection, .. } => connection.state(),
            Self::Datagrams { .. } => FlowState::Open,
        }
    }

    /// What is reported of it.
    pub(super) fn info(&self, key: Key, usage: Usage, clock: &Clock) -> FlowInfo {
        FlowInfo {
            key: key.into(),
            remote: self.latest().map_or(key.remote, |latest| latest.remote),
            direction: usage.direction,
            state: self.state(),
            since: clock.outside(usage.since),
            active: clock.outside(usage.active),
            sent: usage.sent,
            received: usage.received,
        }
    }
}
