//! STATUS: whether a pod could be attached now. Runtimes ask every few seconds.

use std::time::{Duration, Instant};

use muslin_stack::api::cni;
use muslin_stack::api::cni::error::Error;

use super::call::{Call, Result};
use super::delegate::Delegate;
use super::node::{Node, Trouble};
use super::restore;

/// How long a node may take. One that runs answers in a fraction of it even on a busy machine, so
/// that a pod's node does not count as broken for that.
const PATIENCE: Duration = Duration::from_millis(250);

pub(super) fn run(call: &Call) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    let not_available = |trouble: Trouble| Error::NotAvailable(trouble.text());
    let mut node = Node::connect(&call.config.socket, until).map_err(not_available)?;
    let ready = match node.not_ready.take() {
        Some(reason) => Err(Error::NotAvailable(reason)),
        None => node.command(cni::Call::Ready, until).map_err(not_available),
    };
    restore::run(&mut node);
    ready?;
    Delegate::of(call)?.map_or(Ok(()), |it| it.forward())
}
