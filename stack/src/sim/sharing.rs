//! A node's rules about names, and what it knows of others' pods.

use smoltcp::time::Instant;

use super::agent::Requests;
use super::due::Timer;
use super::outcome::Violation;
use crate::control::ipam::PodName;
use crate::control::lease::Revision;
use crate::control::names::{NameChange, Names, Sharer, SharerSettings};

/// A node's rules about names, what they are doing, and what is known of others.
pub(super) struct NameAgent {
    pub(super) sharer: Sharer,
    pub(super) names: Names,
    /// Whether a request is with the store.
    pub(super) is_asking: bool,
    /// The first revision that the watch has not reported yet, if one is open.
    pub(super) watch: Option<Revision>,
    pub(super) is_woken: bool,
    pub(super) timer: Timer,
    requests: Requests,
}

impl NameAgent {
    pub(super) fn new(settings: SharerSettings, now: Instant) -> Self {
        Self {
            sharer: Sharer::new(settings, now),
            names: Names::default(),
            is_asking: false,
            watch: None,
            is_woken: false,
            timer: Timer::default(),
            requests: Requests::since(now),
        }
    }

    pub(super) fn count_request(&mut self, now: Instant) -> Result<(), Violation> {
        self.requests.count(now, "the rules about names").map(drop)
    }

    /// Takes what is new of others.
    pub(super) fn take_changes(&mut self) {
        for change in self.sharer.changes() {
            match change {
                NameChange::Set(record) => self.names.set(record),
                NameChange::Removed(subnet) => self.names.remove(subnet.nets()),
                NameChange::Skipped(..) => {}
            }
        }
    }
}

/// The name of a machine's node.
pub(super) fn node_name(machine: usize) -> PodName {
    let name = format!("node-{machine}").parse();
    name.unwrap_or_else(|error| unreachable!("{error:?}"))
}
