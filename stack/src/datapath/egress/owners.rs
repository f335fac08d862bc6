//! Which worker has the mapping of which socket, in a table that all of them share.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::key::Key;
use crate::datapath::hash::Seed;

/// Places: many for each mapping that there may be by default. A power of two.
const PLACES: usize = 1 << 16;
/// Above how many mappings a place has there is the number of its worker.
const COUNT_BITS: u32 = 24;
const COUNT: u32 = (1 << COUNT_BITS) - 1;

/// Which worker has the mapping of which pod's socket, in a table of a fixed size without locks:
/// sockets are shared out to its places by a hash, and all sockets of one place are one worker's for
/// as long as any of them has a mapping.
#[derive(Debug)]
pub struct Owners {
    places: Box<[AtomicU32]>,
    seed: Seed,
}

/// A worker among others.
#[derive(Debug)]
pub(super) struct Sharing {
    pub(super) owners: Arc<Owners>,
    pub(super) worker: u8,
}

/// Whose a mapping is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// There is one worker that may have it.
    Free,
    Own,
    Anothers,
}

impl Owners {
    /// Nobody has any; `seed` is unpredictable.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            places: (0..PLACES).map(|_| AtomicU32::new(0)).collect(),
            seed: Seed(seed),
        }
    }

    /// The worker that has the socket of a packet of a pod, if any has.
    pub(super) fn of(&self, key: &Key) -> Option<u8> {
        owner(self.place(key).load(Ordering::Relaxed))
    }

    /// Gives a worker one more mapping, if no other has the socket.
    pub(super) fn claim(&self, key: &Key, worker: u8) -> bool {
        let claim = |place| {
            let is_free = owner(place).is_none_or(|owner| owner == worker);
            let count = (place & COUNT) + 1;
            (is_free && count <= COUNT).then_some(u32::from(worker) << COUNT_BITS | count)
        };
        let place = self.place(key);
        let claimed = place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim);
        claimed.is_ok()
    }

    /// Takes a mapping that was claimed from its worker.
    pub(super) fn release(&self, key: &Key) {
        let release = |place: u32| (place & COUNT > 0).then(|| place - 1);
        let place = self.place(key);
        // It had one, so there is one less now.
        let _ = place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, release);
    }

    fn place(&self, key: &Key) -> &AtomicU32 {
        let hash = self.seed.hash_one((key.protocol, key.pod));
        &self.places[hash as usize % PLACES]
    }
}

const fn owner(place: u32) -> Option<u8> {
    if place & COUNT == 0 {
        return None;
    }
    Some((place >> COUNT_BITS) as u8)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::super::key::Protocol;
    use super::*;

    fn key(port: u16) -> Key {
        Key {
            protocol: Protocol::Udp,
            pod: SocketAddr::from(([10, 244, 1, 2], port)),
            remote: SocketAddr::from(([192, 0, 2, 1], 53)),
        }
    }

    #[test]
    fn a_socket_is_one_workers_until_its_mapping_ends() {
        let owners = Owners::new(7);
        assert_eq!(owners.of(&key(1)), None);
        assert!(owners.claim(&key(1), 255));
        let mapping = key(1).mapping_to(key(1).pod);
        assert_eq!(owners.of(&mapping), Some(255));
        assert!(!owners.claim(&key(1), 0), "it is another's");
        assert!(owners.claim(&key(1), 255), "of one more in the same place");
        owners.release(&key(1));
        assert_eq!(owners.of(&key(1)), Some(255));
        owners.release(&key(1));
        assert_eq!(owners.of(&key(1)), None);
        owners.release(&key(1));
        assert!(owners.claim(&key(1), 0));
        assert_eq!(owners.of(&key(1)), Some(0));
    }

    #[test]
    fn of_workers_that_claim_at_once_one_gets_it() {
        let owners = Owners::new(7);
        for port in 0..200 {
            let claims = std::thread::scope(|scope| {
                let claim = |worker| {
                    scope.spawn({
                        let owners = &owners;
                        move || owners.claim(&key(port), worker)
                    })
                };
                let threads = [0, 1, 2].map(claim);
                threads.map(|thread| thread.join().unwrap())
            });
            let winners: Vec<_> = (0..3u8).filter(|it| claims[usize::from(*it)]).collect();
            assert_eq!(winners.len(), 1, "{claims:?}");
            assert_eq!(owners.of(&key(port)), Some(winners[0]));
            owners.release(&key(port));
        }
    }
}
