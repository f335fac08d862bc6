//! GC: ends what the runtime no longer knows of.

use std::time::{Duration, Instant};

use muslin_stack::api::cni;
use muslin_stack::api::cni::Key;
use muslin_stack::api::cni::request::parts;

use super::call::{Call, Result};
use super::delegate::Delegate;
use super::node::{Node, PATIENCE, Trouble};
use crate::control::MAX_MESSAGE;

/// Bytes of keys in one message, which has some of its own.
const PART: usize = MAX_MESSAGE - 4096;
/// How long a node is waited for.
const CONNECT: Duration = Duration::from_secs(1);

pub(super) fn run(call: &Call) -> Result<()> {
    let config = &call.config;
    let collected = match &config.valid {
        // It tells nothing of what is in use: no reason to end all.
        None => Ok(()),
        Some(valid) => collect(call, valid.clone()).map_err(Trouble::into_error),
    };
    // One error is no reason to leave the rest undone.
    let forwarded = Delegate::of(call).and_then(|it| it.map_or(Ok(()), |it| it.forward()));
    collected.and(forwarded)
}

fn collect(call: &Call, valid: Vec<Key>) -> std::result::Result<(), Trouble> {
    let config = &call.config;
    let mut node = Node::connect(&config.socket, Instant::now() + CONNECT)?;
    let parts = parts(valid, PART);
    let last = parts.len().saturating_sub(1);
    for (i, valid) in parts.into_iter().enumerate() {
        let collect = cni::Call::Collect {
            network: config.name.clone(),
            valid,
            more: i < last,
        };
        node.command(collect, Instant::now() + PATIENCE)?;
    }
    Ok(())
}
