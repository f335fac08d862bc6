//! Pods that were attached before the node was restarted, and are about to be attached again.

use std::collections::HashSet;
use std::net::IpAddr;

use smoltcp::time::Instant;

use crate::datapath::hash::Seed;

/// The addresses of such pods, and until when they are waited for.
#[derive(Clone)]
pub(super) struct Awaited {
    addresses: HashSet<IpAddr, Seed>,
    until: Instant,
}

impl Awaited {
    pub(super) fn new(
        addresses: impl IntoIterator<Item = IpAddr>,
        until: Instant,
        seed: Seed,
    ) -> Self {
        let mut awaited = HashSet::with_hasher(seed);
        awaited.extend(addresses);
        Self {
            addresses: awaited,
            until,
        }
    }

    /// Until when the pod with this address is waited for; `None` if it is not.
    pub(super) fn until(&self, now: Instant, address: IpAddr) -> Option<Instant> {
        let is_awaited = now < self.until && self.addresses.contains(&address);
        is_awaited.then_some(self.until)
    }

    /// The pod is there. If it goes again, nobody waits for it.
    pub(super) fn remove(&mut self, address: IpAddr) {
        self.addresses.remove(&address);
    }
}
