//! What is said about probes: marked packets that are really sent, and what nodes see of them.
//!
//! Who asks draws a number, has each node on the way watch for packets with it, has the node of the
//! sender send them, and asks all nodes what they have seen.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::trace::{Beginning, Summary, Verdict};

/// Probes that can be sent at once: a node keeps what it has seen of them.
pub const MAX_COUNT: u32 = 500;
/// Sightings in one answer: they have to fit into one of another node's ([`super::exchange::MAX_PIECES`]).
pub const MAX_TOLD: usize = 40;
/// How long a node may be asked to watch, in milliseconds.
pub const MAX_WATCH_MS: u64 = 240_000;

/// What a node is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Call {
    /// Watch for probes. Answered when that has begun.
    Watch(Watch),
    /// Send a probe, as if a pod of the node had sent it.
    Send(Send),
    /// Tell what was seen until now, the next [`MAX_TOLD`] sightings.
    Seen {
        /// The number of the probes.
        id: u64,
        /// How many sightings are known already.
        #[serde(default)]
        from: usize,
    },
    /// Watch no more.
    End {
        /// The number of the probes.
        id: u64,
    },
    /// Have another node asked that, over the pod network.
    Elsewhere {
        /// Its public address.
        public_ip: IpAddr,
        /// What it is asked.
        call: Box<Call>,
    },
}

/// Probes to be watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Their number.
    pub id: u64,
    /// Who sends them.
    pub source: IpAddr,
    /// Who is to get them.
    pub destination: IpAddr,
    /// For how long, in milliseconds: at most [`MAX_WATCH_MS`].
    pub for_ms: u64,
}

/// A probe to be sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Send {
    /// The number of the probes.
    pub id: u64,
    /// Its own.
    pub sequence: u32,
    /// The packet.
    pub packet: Beginning,
}

/// What a node answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Told {
    /// It is done.
    Done,
    /// What it has seen.
    Seen(Seen),
}

/// What a node has seen of probes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The node's name.
    pub node: String,
    /// What it has seen, behind what is known already, in the order in which it was noted.
    pub sightings: Vec<Sighting>,
    /// Packets of the sender that came faster than they were looked at.
    pub missed: u64,
}

/// A probe, or an answer that has its mark, as a node saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Sighting {
    /// The number of the probe, from 1 on.
    pub sequence: u32,
    /// When, in microseconds since 1970 by the clock of the node's machine.
    pub at_us: u64,
    /// Where it was seen, as in `muslin capture`.
    pub hook: String,
    /// Whether it goes back: it is an echo reply or an ICMP error.
    pub is_answer: bool,
    /// What became of it.
    pub verdict: Verdict,
    /// Why it was lost, as in `muslin drops`, if it was.
    pub reason: Option<String>,
    /// The same in words.
    pub text: String,
}

/// What became of probes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LiveReport {
    /// The packet that was sent.
    pub packet: Summary,
    /// How many were sent.
    pub sent: u32,
    /// How many of them got to where they were to go, as far as the nodes have seen.
    pub arrived: u32,
    /// How many were answered by what has their mark: echo replies, and ICMP errors, which quote it. What
    /// answers a SYN has none.
    pub answered: u32,
    /// The nodes on the way, in its order, with what they have seen.
    pub nodes: Vec<NodeReport>,
}

/// What one node has seen of probes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NodeReport {
    /// Its name, or its public address.
    pub node: String,
    /// What it has seen.
    pub sightings: Vec<Sighting>,
    /// Packets that it could not look at.
    pub missed: u64,
    /// Why it has told nothing, if so.
    pub silent: Option<String>,
}

impl NodeReport {
    /// That of a node which has told nothing yet, or why it will not.
    #[must_use]
    pub fn new(node: &str, silent: Option<String>) -> Self {
        Self {
            node: node.to_owned(),
            sightings: Vec::new(),
            missed: 0,
            silent,
        }
    }
}
