//! Nodes of flannel 0.20 that follow the store, with a watch that loses changes.
//!
//! Such a node lists all leases when it starts, and watches from the next revision on. From one answer
//! of a watch it takes the first change, drops the others and closes the watch; the next one begins
//! with what happens after it is open (`watchSubnets` in flannel's `subnet/etcd/registry.go`). It lists
//! again only where the store no longer has the changes that it asks for. Its own lease and its data
//! path are not simulated, and it always reaches a store that is up.

use std::collections::BTreeMap;
use std::fmt::Write;

use smoltcp::time::Duration;

use super::Cluster;
use crate::control::lease::{Revision, WatchEvent, lease_prefix};
use crate::sim::constants::PREFIX;
use crate::sim::due::Due;
use crate::sim::flannel::{Flannel, Watch};

/// How long such a node takes until its next watch is open: for a question about the lease's time to
/// live, for routes, and for the request.
const REOPENING: Duration = Duration::from_millis(10);
/// How long a change takes from the store to an open watch.
const NOTICE: Duration = Duration::from_micros(500);
/// When a store that is down is asked again.
const RETRY: Duration = Duration::from_secs(1);

impl Cluster {
    /// A node of flannel's with a record starts. It can only where the store is etcd.
    pub(super) fn start_flannel(&mut self, key: String) {
        if !self.setup.is_etcd() {
            return;
        }
        self.flannels.push(Flannel {
            key,
            known: BTreeMap::new(),
            watch: Watch::default(),
        });
        let number = self.flannels.len() - 1;
        self.list_for_flannel(number);
    }

    fn list_for_flannel(&mut self, number: usize) {
        let now = self.queue.now();
        let prefix = lease_prefix(PREFIX);
        let records = self.store.entries(now, &prefix);
        let records = records.map(|(entry, _)| (entry.key, entry.value));
        self.flannels[number].known = records.collect();
        let from = Some(self.store.revision() + 1);
        let open = Due::OpenFlannel(number, from);
        self.queue.schedule(now + REOPENING, open);
    }

    /// The next watch opens, at a revision or with what happens from now on.
    pub(super) fn open_flannel(&mut self, number: usize, from: Option<Revision>) {
        let now = self.queue.now();
        if self.store_weather.is_down {
            let open = Due::OpenFlannel(number, from);
            return self.queue.schedule(now + RETRY, open);
        }
        let from = from.unwrap_or(self.store.revision() + 1);
        if self.store.can_watch(from).is_err() {
            return self.list_for_flannel(number);
        }
        self.flannels[number].watch = Watch::Open(from, false);
        self.wake_flannel(number);
    }

    /// Something was written: open watches are told of it.
    pub(super) fn wake_flannels(&mut self) {
        for number in 0..self.flannels.len() {
            self.wake_flannel(number);
        }
    }

    fn wake_flannel(&mut self, number: usize) {
        let watch = &mut self.flannels[number].watch;
        if let Watch::Open(from, false) = *watch
            && from <= self.store.revision()
        {
            *watch = Watch::Open(from, true);
            let at = self.queue.now() + NOTICE;
            self.queue.schedule(at, Due::TellFlannel(number));
        }
    }

    /// A watch has an answer: the first change counts, and the watch is closed.
    pub(super) fn tell_flannel(&mut self, number: usize) {
        let flannel = &mut self.flannels[number];
        let Watch::Open(from, true) = flannel.watch else {
            return;
        };
        let prefix = lease_prefix(PREFIX);
        let is_lease = |event: &&WatchEvent| match event {
            WatchEvent::Put(entry) => entry.key.starts_with(&prefix),
            WatchEvent::Delete { key, .. } => key.starts_with(&prefix),
        };
        let event = self.store.since(from).find(is_lease).cloned();
        match event {
            None => {
                flannel.watch = Watch::Open(self.store.revision() + 1, false);
                return;
            }
            Some(WatchEvent::Put(entry)) => {
                flannel.known.insert(entry.key, entry.value);
            }
            Some(WatchEvent::Delete { key, .. }) => {
                flannel.known.remove(&key);
            }
        }
        self.close_flannel(number);
    }

    /// All watches end.
    pub(super) fn close_flannels(&mut self) {
        for number in 0..self.flannels.len() {
            if self.flannels[number].watch != Watch::Closed {
                self.close_flannel(number);
            }
        }
    }

    fn close_flannel(&mut self, number: usize) {
        self.flannels[number].watch = Watch::Closed;
        let at = self.queue.now() + REOPENING;
        self.queue.schedule(at, Due::OpenFlannel(number, None));
    }

    /// Whether a record is that of one of flannel's nodes.
    pub(super) fn is_flannels(&self, key: &str) -> bool {
        self.flannels.iter().any(|flannel| flannel.key == key)
    }

    fn runs(&self, flannel: &Flannel) -> bool {
        let now = self.queue.now();
        self.store.entries(now, &flannel.key).next().is_some()
    }

    /// Which nodes' records flannel's nodes do not know.
    pub(super) fn differences_of_flannels(&self, text: &mut String) {
        for (number, machine) in self.machines.iter().enumerate() {
            let Some(process) = &machine.process else {
                continue;
            };
            let Some(running) = &process.running else {
                continue;
            };
            let key = format!("{}/{}", lease_prefix(PREFIX), running.key);
            let value = process.agent.manager.record().to_json();
            let flannels = self.flannels.iter().enumerate();
            for (other, flannel) in flannels.filter(|(_, flannel)| self.runs(flannel)) {
                if flannel.known.get(&key) != Some(&value) {
                    let _ = write!(
                        text,
                        "\n  flannel's node {other} does not know machine {number}'s record of {}",
                        running.key
                    );
                }
            }
        }
    }
}
