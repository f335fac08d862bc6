//! Attaching a pod's device to a node, keeping it attached, and running the pod's command: what
//! `muslin run`, `muslin attach` and `muslin sidecar` share.

mod command;
mod stay;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use crate::control::Client;
use crate::control::protocol::{Attached, Status, Table};
use crate::device::Tap;
use crate::error::Result;
use crate::netns::Assignment;

pub(crate) use command::{Signals, exit_code, guard, start, wait};
pub(crate) use stay::stay_attached;

/// Queues that a pod's device is to have: one for each worker of the node.
///
/// # Errors
/// If the node does not answer.
pub(crate) async fn queues(socket: &Path) -> Result<usize> {
    let client = Client::connect(socket).await?;
    let status = client.report::<Status>(Table::Status).await?;
    Ok(status.first().map_or(1, |status| status.workers))
}

/// What the node is given of a device.
pub(crate) fn descriptors(tap: &[Tap]) -> Vec<BorrowedFd<'_>> {
    tap.iter().map(AsFd::as_fd).collect()
}

/// What a node's answer means for the interface.
pub(crate) fn assignment(attached: &Attached) -> Assignment {
    Assignment {
        address: attached.address,
        gateway: attached.gateway,
        mtu: attached.mtu,
        gso_max_segs: attached.gso_max_segs,
        routes: attached.routes.clone(),
    }
}
