//! Outcomes: of a run, and of what it counts and finds.

use thiserror::Error;

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Violation(pub String);

/// A run in which everything was as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// A hash of everything that happened.
    pub hash: u64,
    /// How much happened.
    pub figures: Figures,
    /// Milliseconds until all tables were right after everything was mended.
    pub convergence: u64,
    /// The end of the log, if that was requested.
    pub log: Vec<String>,
}

/// A run that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// What was wrong.
    pub violation: Violation,
    /// The end of the log, if that was requested.
    pub log: Vec<String>,
    /// Everybody's tables at that time.
    pub tables: String,
}

/// How much happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Figures {
    /// Things that were due.
    pub steps: u64,
    /// Requests to the store.
    pub requests: u64,
    /// Changes that were delivered to watches.
    pub events: u64,
    /// Datagrams between nodes.
    pub datagrams: u64,
    /// Frames from and to pods.
    pub frames: u64,
    /// Frames of IPv6 that pods got.
    pub frames_v6: u64,
    /// Flows that left the overlay.
    pub flows: u64,
    /// Packets that were lost because it was not known where their sender's host is.
    pub unknown_hops: u64,
    /// TCP connections that brought everything back.
    pub talks: u64,
    /// Pings and datagrams that were answered.
    pub answers: u64,
    /// Clients of published ports that were served.
    pub visits: u64,
}

impl Figures {
    /// How much happened since an earlier time.
    pub(super) fn since(&self, before: &Self) -> Self {
        Self {
            steps: self.steps - before.steps,
            requests: self.requests - before.requests,
            events: self.events - before.events,
            datagrams: self.datagrams - before.datagrams,
            frames: self.frames - before.frames,
            frames_v6: self.frames_v6 - before.frames_v6,
            flows: self.flows - before.flows,
            unknown_hops: self.unknown_hops - before.unknown_hops,
            talks: self.talks - before.talks,
            answers: self.answers - before.answers,
            visits: self.visits - before.visits,
        }
    }
}
