//! How long one process waits for the other.

use std::time::Duration;

/// How long a part of it may take; what there is to be done takes milliseconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long the new process may take to get the lease.
pub(crate) const LEASE_PATIENCE: Duration = Duration::from_secs(60);
/// How long the old process serves its flows.
pub(crate) const FLOWS_PATIENCE: Duration = Duration::from_secs(300);
