//! What is due at which time, and for which process.

use std::net::SocketAddr;

use smoltcp::time::Instant;

use super::device::Sent;
use super::store::Gap;
use crate::control::ipam::PodName;
use crate::control::lease::{Answer, Op, Revision};
use crate::datapath::SiblingMessage;
use crate::datapath::egress::FlowId;
use crate::datapath::port::PortId;

/// A process of a machine. What was meant for an earlier one is not for a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Who {
    pub(super) machine: usize,
    pub(super) process: u64,
}

/// Something that is due.
#[derive(Debug)]
pub(super) enum Due {
    Agent(Who),
    Request(Who, u64, Op),
    Answer(Who, u64, Option<Answer>),
    Open(Who, u64, Revision),
    Opened(Who, u64, Option<Result<Revision, Gap>>),
    Patience(Who, u64),
    Watch(Who, u64),
    WatchEnds(Who),
    KeepAlive(Who, u64),
    Farewell(Who),
    Expiry,
    OpenFlannel(usize, Option<Revision>),
    TellFlannel(usize),
    Start(usize),
    Wake(usize, Instant),
    Plug(Who, PodName),
    Node(Who, usize),
    Message(Who, usize, SiblingMessage),
    Names(Who),
    NameRequest(Who, Op),
    NameWatch(Who),
    Device(Who, PortId),
    ToDevice(Who, PortId, Vec<u8>),
    FromDevice(Who, PortId, Sent),
    Turn(Who, PortId),
    Frame(usize, Vec<u8>),
    Socket(Who, usize, FlowId, Happening),
    Datagram {
        source: SocketAddr,
        destination: SocketAddr,
        bytes: Vec<u8>,
    },
}

impl Due {
    /// The machine that does what is due, if it is one that can stand still. What pods do, what is on
    /// its way and what the store does goes on.
    pub(super) fn machine(&self) -> Option<usize> {
        match self {
            Self::Agent(who)
            | Self::Answer(who, ..)
            | Self::Opened(who, ..)
            | Self::Patience(who, _)
            | Self::Watch(who, _)
            | Self::WatchEnds(who)
            | Self::KeepAlive(who, _)
            | Self::Farewell(who)
            | Self::Plug(who, _)
            | Self::Node(who, _)
            | Self::Message(who, ..)
            | Self::Names(who)
            | Self::NameWatch(who)
            | Self::FromDevice(who, ..)
            | Self::Turn(who, _)
            | Self::Socket(who, ..) => Some(who.machine),
            Self::Frame(machine, _) => Some(*machine),
            Self::Request(..)
            | Self::NameRequest(..)
            | Self::Open(..)
            | Self::Expiry
            | Self::OpenFlannel(..)
            | Self::TellFlannel(_)
            | Self::Start(_)
            | Self::Wake(..)
            | Self::Device(..)
            | Self::ToDevice(..)
            | Self::Datagram { .. } => None,
        }
    }
}

/// What is to become of a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Happening {
    /// Its server goes on.
    Turn,
    /// Its readiness is reported to egress.
    Event,
    /// An answer to a datagram comes from there.
    Answer(SocketAddr, Vec<u8>),
    /// Word comes that a datagram to there has not found anybody.
    Failure(SocketAddr, Vec<u8>),
}

/// When something is scheduled to be polled.
#[derive(Debug, Default)]
pub(super) struct Timer(Option<Instant>);

impl Timer {
    /// Whether something must be scheduled for it to be polled at this time.
    pub(super) fn arm(&mut self, at: Instant) -> bool {
        let is_earlier = self.0.is_none_or(|armed| at < armed);
        if is_earlier {
            self.0 = Some(at);
        }
        is_earlier
    }

    /// Whether it is due; it is no longer armed then.
    pub(super) fn fires(&mut self, now: Instant) -> bool {
        self.0.take_if(|at| *at <= now).is_some()
    }
}
