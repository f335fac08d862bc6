//! Devices that a node has lost: an earlier process of it had their queues. Whoever can enter a pod's
//! network namespace opens them again, which is this plugin, whatever it was called for.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use muslin_stack::api::cni::environment::alias;
use muslin_stack::api::cni::error::Error;
use muslin_stack::api::cni::{Call, Missing, Reply};

use super::call::{Result, log};
use super::interface;
use super::namespace::Namespace;
use super::node::{Node, PATIENCE, Trouble, unexpected};
use crate::device::Tap;

/// How long it may take in all; the rest is for the next call.
const BUDGET: Duration = Duration::from_secs(3);
/// The same where nothing else is to be done.
const REATTACHMENT: Duration = Duration::from_secs(60);
/// How long the node may take to say what it misses.
const ANSWER: Duration = Duration::from_millis(250);

/// Opens whatever the node that listens at a socket misses, for as long as that takes.
///
/// # Errors
/// If there is no node, or it cannot attach pods.
pub(crate) fn reattach(socket: &Path) -> crate::error::Result<()> {
    let path = socket.to_string_lossy();
    let node = Node::await_ready(&path, Instant::now() + PATIENCE);
    let mut node = node.map_err(|trouble| crate::error::Error::failed(trouble.text()))?;
    run_until(&mut node, Instant::now() + REATTACHMENT);
    Ok(())
}

/// Opens what the node misses.
pub(super) fn run(node: &mut Node) {
    run_until(node, Instant::now() + BUDGET);
}

fn run_until(node: &mut Node, until: Instant) {
    // What could not be opened is not tried again: the node goes on naming it.
    let mut tried = BTreeSet::new();
    loop {
        let missing = match node.ask::<Tap>(Call::Missing, &[], Instant::now() + ANSWER) {
            Ok(Reply::Missing(missing)) => missing,
            // One of an older version does not know of it.
            Ok(_) | Err(_) => return,
        };
        let mut is_done = true;
        for missing in missing {
            if Instant::now() >= until {
                return;
            }
            let key = missing.key.clone();
            if !tried.insert(key.clone()) {
                continue;
            }
            is_done = false;
            match one(node, missing, until) {
                Ok(true) => log(format_args!("the node has {key} again")),
                Ok(false) => {}
                Err(why) => log(format_args!(
                    "{key} cannot be given back to the node: {why}"
                )),
            }
        }
        if is_done {
            return;
        }
    }
}

/// Opens one device; says whether it is still there.
fn one(node: &mut Node, missing: Missing, until: Instant) -> std::result::Result<bool, String> {
    let Missing {
        key,
        netns,
        queues,
        offloads,
    } = missing;
    let namespace = match Namespace::open(&netns.path) {
        Ok(namespace) if namespace.id == netns && !namespace.is_own => namespace,
        // Gone, or another one by now: the node will notice.
        Ok(_) | Err(_) => return Ok(false),
    };
    let taps = namespace.within(|| open(&key.interface, &alias(&key.container), queues, offloads));
    let Some(taps) = taps.map_err(|error| error.to_string())? else {
        return Ok(false);
    };
    let restore = Call::Restore {
        key,
        netns: namespace.id,
    };
    let answer = match node.ask(restore, &taps, until) {
        Ok(Reply::Done) => return Ok(true),
        Ok(other) => unexpected(&other),
        Err(trouble) => trouble,
    };
    Err(Trouble::text(answer))
}

/// Opens the device of that name, if it is ours. No other is made in its place.
fn open(name: &str, wanted: &str, queues: usize, offloads: bool) -> Result<Option<Vec<Tap>>> {
    let Some(index) = interface::index(name) else {
        return Ok(None);
    };
    let failed = |error: std::io::Error| Error::Failed(error.to_string());
    if interface::alias(index).map_err(failed)?.as_deref() != Some(wanted) {
        return Ok(None);
    }
    let taps = Tap::open(name, offloads, queues);
    taps.map(Some)
        .map_err(|error| Error::Failed(error.to_string()))
}
