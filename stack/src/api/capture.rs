//! What is said over the control socket of packets that are to be captured.

use serde::{Deserialize, Serialize};

use crate::control::ipam::PodName;

/// What is to be captured. Beside it is a stream socket, into which the node writes a pcapng file; once
/// the client has shut down its own direction the node finishes the file and closes the socket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Capture {
    /// Where packets are seen, by the names of hooks; everywhere, if this is empty and lost packets are
    /// not asked for.
    #[serde(default)]
    pub hooks: Vec<String>,
    /// Whether packets that are lost are wanted, wherever they came in.
    #[serde(default)]
    pub dropped: bool,
    /// Only those from or to this pod.
    #[serde(default)]
    pub pod: Option<PodName>,
    /// Only those from or to this node: its name, or its public address.
    #[serde(default)]
    pub peer: Option<String>,
    /// Only those of which this is true, in the words of pcap-filter(7).
    #[serde(default)]
    pub filter: String,
    /// How much of a packet is copied, in bytes; all of it if that is 0.
    #[serde(default)]
    pub snap_len: u32,
    /// Whether superpackets are written as the segments that they stand for.
    #[serde(default)]
    pub segments: bool,
}
