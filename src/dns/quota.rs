//! What leaves each pod its share of the service: a quota of what it has under way, and turns.
//!
//! A pod may have many sockets and fill them all. So one query of each pod is worked on, and then one
//! of the next: whoever asks once waits for as many queries as there are pods that flood.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// Queries under way to resolvers.
pub(super) const QUERIES: Limits = Limits {
    all: 1024,
    pod: 256,
};
/// Connections.
pub(super) const CONNECTIONS: Limits = Limits { all: 256, pod: 32 };

/// How many there may be at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    all: usize,
    /// Of one pod, so that there is room for others.
    pod: usize,
}

/// Counts what pods have under way.
#[derive(Debug)]
pub(super) struct Quota {
    limits: Limits,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    of_pods: HashMap<IpAddr, usize>,
}

/// A place that one of them has, until it is dropped.
pub(super) struct Ticket {
    quota: Arc<Quota>,
    pod: IpAddr,
}

impl Quota {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            taken: Mutex::default(),
        })
    }

    /// A place for one more of a pod, if there is one: it has no more than are left, so that those
    /// who want most leave as much as each of them has.
    pub(super) fn enter(self: &Arc<Self>, pod: IpAddr) -> Option<Ticket> {
        let mut taken = self.taken.lock();
        let left = self.limits.all - taken.all;
        let of_pod = taken.of_pods.entry(pod).or_default();
        if *of_pod >= self.limits.pod.min(left) {
            return None;
        }
        *of_pod += 1;
        taken.all += 1;
        Some(Ticket {
            quota: self.clone(),
            pod,
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut taken = self.quota.taken.lock();
        taken.all -= 1;
        if let Some(of_pod) = taken.of_pods.get_mut(&self.pod) {
            *of_pod -= 1;
            if *of_pod == 0 {
                taken.of_pods.remove(&self.pod);
            }
        }
    }
}

/// Whose turn it is among the sockets of each pod.
#[derive(Default)]
pub(super) struct Turns(Mutex<HashMap<IpAddr, Weak<Turn>>>);

/// Whoever has it of a pod's sockets has its query worked on; the others wait in line.
pub(super) type Turn = tokio::sync::Mutex<()>;

impl Turns {
    /// That of a pod.
    pub(super) fn of(&self, pod: IpAddr) -> Arc<Turn> {
        let mut turns = self.0.lock();
        if let Some(turn) = turns.get(&pod).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(Turn::default());
        turns.insert(pod, Arc::downgrade(&turn));
        turn
    }
}
