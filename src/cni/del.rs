//! DEL: succeeds whatever is no longer there. What it cannot end now the node ends later.

use std::time::{Duration, Instant};

use muslin_stack::api::cni;
use muslin_stack::api::cni::error::Error;

use super::call::{Call, Result, log};
use super::delegate::Delegate;
use super::namespace::Namespace;
use super::node::Node;
use super::{deletions, interface};

/// How long a node is waited for. At a shutdown it does not come back, and every pod waits.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long one is waited for that may have started meanwhile.
const AGAIN: Duration = Duration::from_millis(100);

pub(super) fn run(call: &Call) -> Result<()> {
    let Call {
        environment,
        config,
        ..
    } = call;
    let key = config.key(&environment.container, &environment.interface);
    let until = Instant::now() + PATIENCE;
    let release = || cni::Call::Release { key: key.clone() };
    let mut node = Node::connect(&config.socket, until);
    let mut sent = Ok(());
    if let Ok(node) = &mut node {
        sent = node.send::<std::fs::File>(release(), &[], until);
    }
    // What takes longest is done by the kernel while the node does its part.
    remove_interface(call);
    let ended = node.and_then(|mut node| {
        sent?;
        node.answer(until).map(drop)
    });
    if let Err(trouble) = ended {
        later(&config.socket, &key, &trouble.text());
    }
    // The address of a delegate is released in any case, and nobody else does it.
    let delegate = Delegate::of(call);
    let done = delegate.and_then(|it| it.map_or(Ok(()), |it| it.forward()));
    done.map_err(without_not_found)
}

/// Ends an attachment of which the node has not said whether it has it.
pub(super) fn end_without_answer(call: &Call, key: &cni::Key, why: &str) {
    remove_interface(call);
    later(&call.config.socket, key, why);
}

/// Deletes the interface, if the namespace is there and the interface ours.
fn remove_interface(call: &Call) {
    let environment = &call.environment;
    let Some(path) = environment.netns.as_deref() else {
        return;
    };
    // Gone with its namespace, or never there.
    let Ok(namespace) = Namespace::open(path) else {
        return;
    };
    if namespace.is_own && !environment.may_be_own_netns {
        // A process identity was used again: what is there is not the container's.
        return log(format_args!(
            "{path} is the plugin's own network namespace: nothing to do there"
        ));
    }
    let name = &environment.interface;
    let removed = namespace.within(|| {
        let deleted = interface::delete(name, &environment.alias());
        deleted.map_err(|error| Error::Failed(format!("deleting {name}: {error}")))
    });
    if let Err(error) = removed {
        log(error);
    }
}

/// Leaves word for a node that is not there, and tries once more: one that starts at this moment
/// either finds the word or is there by now.
fn later(socket: &str, key: &cni::Key, why: &str) {
    match deletions::leave(socket, key) {
        Ok(()) => log(format_args!("{key} is ended by the next node: {why}")),
        Err(error) => log(format_args!(
            "{key} is ended once the node sees that it is gone: {why}; {error}"
        )),
    }
    let until = Instant::now() + AGAIN;
    if let Ok(mut node) = Node::connect(socket, until) {
        let release = cni::Call::Release { key: key.clone() };
        if node.command(release, until).is_ok() {
            deletions::take_back(socket, key);
        }
    }
}

/// containerd takes errors with these words for success, and forgets the pod.
fn without_not_found(error: Error) -> Error {
    let clean = |text: String| {
        let text = text.replace("not found", "missing");
        text.replace("no such file or directory", "there is no such file")
    };
    Error::Delegate {
        code: error.code(),
        message: clean(error.to_string()),
        details: clean(error.details()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_error_looks_like_success() {
        let error = Error::Failed("plugin \"x\" not found: no such file or directory".to_owned());
        let clean = without_not_found(error);
        assert_eq!(clean.code(), 100);
        assert_eq!(
            clean.to_string(),
            "plugin \"x\" missing: there is no such file"
        );
    }
}
