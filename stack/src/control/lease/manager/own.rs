//! A node's own lease, as its manager holds it.

use smoltcp::time::Instant;

use crate::control::kv::{Entry, Revision};
use crate::control::lease::key::SubnetKey;
use crate::control::lease::record::LeaseRecord;

/// The lease that the store has for this node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own {
    pub(super) key: SubnetKey,
    pub(super) revision: Revision,
    pub(super) reservation: bool,
    pub(super) renew_at: Instant,
    /// When it ends if it is not renewed; of no meaning for a reservation.
    pub(super) ends: Instant,
    /// When the watch must have reported that it was written.
    pub(super) confirmation_by: Instant,
}

/// A record that is ours: under our public address, or ours by its VTEP.
pub(super) type OwnEntry = (SubnetKey, Entry, LeaseRecord);
