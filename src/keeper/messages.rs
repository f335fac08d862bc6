//! What a node and its keeper say to each other: one JSON message per packet, a device's queues
//! beside it.

use muslin_stack::api::cni::Key;
use serde::{Deserialize, Serialize};

/// What a node asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Demand {
    /// Hold the queues beside this message, in place of those that are held for the attachment.
    /// Answered by `Done`.
    Hold(Key),
    /// Close the queues of an attachment, if there are some. Answered by `Done`.
    Close(Key),
    /// Send copies of all. Answered by a `Device` for each and then by `Done`.
    Give,
}

/// What a keeper answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// The queues of an attachment, beside this message.
    Device(Key),
    /// It is done.
    Done,
    /// It cannot hold more.
    Full,
}
