//! How much memory the buffers of connections may have.
//!
//! smoltcp's buffers do not grow, so a connection gets at its start what it may need: much while
//! there are few, and what is set aside for each place in the table when there are many. One pod has
//! no more than half of what is beyond that.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::datapath::hash::Seed;

/// Bytes of each of a connection's two buffers.
const LARGEST: usize = 256 << 10;
const SMALLEST: usize = 8 << 10;
/// A connection takes at most this part of what is left, for each of its buffers.
const SHARE: usize = 256;

/// A budget of bytes.
pub(super) struct Memory {
    /// What each connection may have without asking, for each of its buffers.
    base: usize,
    /// What else there is, and what is left of it.
    extra: usize,
    left: usize,
    /// What else one pod may have.
    share: usize,
    /// What else pods have.
    used: HashMap<IpAddr, usize, Seed>,
}

/// Buffers' length, to be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grant {
    /// Bytes of each buffer.
    pub(super) len: usize,
}

impl Memory {
    /// A budget of `bytes` for up to `connections`; half of it is set aside for them.
    pub(super) fn new(bytes: usize, connections: usize, seed: Seed) -> Self {
        let base = (bytes / 4 / connections.max(1)).clamp(SMALLEST, LARGEST);
        let left = bytes.saturating_sub(2 * base * connections);
        Self {
            base,
            extra: left,
            left,
            share: left / 2,
            used: HashMap::with_hasher(seed),
        }
    }

    /// Buffers for a connection of a pod.
    pub(super) fn take(&mut self, pod: IpAddr) -> Grant {
        let used = self.used.get(&pod).copied().unwrap_or_default();
        // A pod's share is half of all.
        let its = 2 * self.share.saturating_sub(used);
        let wanted = (self.left.min(its) / SHARE).min(LARGEST);
        if wanted <= self.base {
            return Grant { len: self.base };
        }
        // A power of two below what there is: buffers of few sizes are used again.
        let len = 1 << wanted.ilog2();
        let extra = self.extra(len);
        self.left -= extra;
        *self.used.entry(pod).or_default() += extra;
        Grant { len }
    }

    pub(super) fn give_back(&mut self, pod: IpAddr, grant: Grant) {
        let extra = self.extra(grant.len);
        self.left += extra;
        if let Some(used) = self.used.get_mut(&pod) {
            *used = used.saturating_sub(extra);
            if *used == 0 {
                self.used.remove(&pod);
            }
        }
    }

    /// Holds what live connections of pods have against what is left.
    pub(super) fn audit(
        &self,
        grants: impl Iterator<Item = (IpAddr, Grant)>,
    ) -> Result<(), String> {
        let (mut granted, mut of_pods) = (0, HashMap::<_, usize>::new());
        for (pod, grant) in grants {
            let extra = self.extra(grant.len);
            granted += extra;
            if extra > 0 {
                *of_pods.entry(pod).or_default() += extra;
            }
        }
        if granted + self.left != self.extra {
            let (left, all) = (self.left, self.extra);
            return Err(format!(
                "connections have {granted} bytes and {left} are left of {all}"
            ));
        }
        let is_same = |(pod, used): (&IpAddr, &usize)| self.used.get(pod) == Some(used);
        if of_pods.len() != self.used.len() || !of_pods.iter().all(is_same) {
            let used = &self.used;
            return Err(format!("pods have {of_pods:?} bytes, and {used:?} count"));
        }
        Ok(())
    }

    fn extra(&self, len: usize) -> usize {
        2 * len.saturating_sub(self.base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_connections_have_large_buffers_and_many_stay_within_the_budget() {
        let (bytes, connections) = (128 << 20, 4096);
        let mut memory = Memory::new(bytes, connections, Seed(1));
        let full = memory.left;
        let pod = |number: usize| IpAddr::from([10, 0, 0, number as u8 % 4]);
        let grants: Vec<_> = (0..connections).map(|i| memory.take(pod(i))).collect();
        assert_eq!(grants[0].len, LARGEST);
        assert_eq!(grants[connections - 1].len, SMALLEST);
        let sum: usize = grants.iter().map(|grant| 2 * grant.len).sum();
        assert!(sum <= bytes, "{sum}");
        let live = || grants.iter().enumerate();
        let live = || live().map(|(i, grant)| (pod(i), *grant));
        assert_eq!(memory.audit(live()), Ok(()));
        assert!(memory.audit(live().skip(1)).is_err(), "one is lost");
        assert!(
            memory
                .audit(live().map(|(_, grant)| (pod(0), grant)))
                .is_err(),
            "other pods have them"
        );
        let is_first = |(i, _): &(usize, Grant)| i % 3 == 0;
        let (first, rest): (Vec<_>, Vec<_>) = grants.into_iter().enumerate().partition(is_first);
        for (i, grant) in first {
            memory.give_back(pod(i), grant);
        }
        let live = rest.iter().map(|(i, grant)| (pod(*i), *grant));
        assert_eq!(
            memory.audit(live),
            Ok(()),
            "what is given back is its pod's"
        );
        for (i, grant) in rest {
            memory.give_back(pod(i), grant);
        }
        assert_eq!((memory.left, memory.used.len()), (full, 0));
    }

    #[test]
    fn one_pod_leaves_half_to_the_others() {
        let mut memory = Memory::new(128 << 20, 4096, Seed(1));
        let full = memory.left;
        let (greedy, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let grants: Vec<_> = (0..2048).map(|_| memory.take(greedy)).collect();
        assert_eq!(grants[0].len, LARGEST);
        assert_eq!(grants[2047].len, SMALLEST);
        assert!(memory.left >= full / 2, "{} of {full}", memory.left);
        assert!(memory.take(other).len >= LARGEST / 2);
        memory.give_back(greedy, grants[0]);
        let again = memory.take(greedy).len;
        assert!(again < LARGEST / 8, "the others still count: {again}");
    }
}
