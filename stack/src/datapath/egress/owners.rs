//! Several workers that share the flows of a node: which of them has the flow of a packet.
//!
//! Flows that begin on the host's side are the first worker's, and they do not begin with a packet of
//! their pod, so that nothing but their place tells where the kernel brings their packets. Mappings
//! are the worker's that saw their first packet, though the kernel may bring packets of one socket
//! to several.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use muslin_encap::ip::transport::Transport;
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Packet};

use super::inbound::{EPHEMERAL, quoted};
use super::{Egress, Key, Protocol, key_of, opens};
use crate::datapath::hash::Seed;

/// The worker that has the flows that begin on the host's side.
const FIRST: u8 = 0;
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
    owners: Arc<Owners>,
    worker: u8,
}

impl Egress {
    /// Says that this is that worker's egress, of a node that has several.
    pub fn share(&mut self, owners: Arc<Owners>, worker: u8) {
        self.sharing = Some(Sharing { owners, worker });
    }

    /// Takes a mapping, which may be another worker's already.
    pub(super) fn claim(&self, key: &Key) -> Claim {
        match &self.sharing {
            Some(sharing) if !self.is_published(key) => {
                if sharing.owners.claim(key, sharing.worker) {
                    Claim::Own
                } else {
                    Claim::Anothers
                }
            }
            Some(_) | None => Claim::Free,
        }
    }

    /// Gives back what was claimed.
    pub(super) fn release(&self, key: &Key, claim: Claim) {
        if let (Some(sharing), Claim::Own) = (&self.sharing, claim) {
            sharing.owners.release(key);
        }
    }

    /// The worker that has, or is to have, the flow of a packet of a pod, if it is another one.
    pub(super) fn elsewhere(&self, packet: &[u8]) -> Option<u8> {
        let sharing = self.sharing.as_ref()?;
        let view = Ipv4Packet::new_unchecked(packet);
        let worker = match view.next_header() {
            IpProtocol::Tcp => {
                let at = Transport::parse(packet, 0).ok()?;
                let key = key_of(packet, Protocol::Tcp, &at);
                let is_here = opens(packet, &at) || self.flows.find(&key).is_some();
                (!is_here).then_some(FIRST)
            }
            IpProtocol::Udp => {
                let at = Transport::parse(packet, 0).ok()?;
                self.owner(sharing, &key_of(packet, Protocol::Udp, &at))
            }
            IpProtocol::Icmp => self.owner_of_icmp(sharing, &view),
            _ => None,
        };
        worker.filter(|worker| *worker != sharing.worker)
    }

    fn owner_of_icmp(&self, sharing: &Sharing, view: &Ipv4Packet<&[u8]>) -> Option<u8> {
        let icmp = Icmpv4Packet::new_checked(view.payload()).ok()?;
        match icmp.msg_type() {
            Icmpv4Message::EchoRequest => {
                self.owner(sharing, &Key::of_ping(view, icmp.echo_ident()))
            }
            Icmpv4Message::DstUnreachable => {
                let key = quoted(icmp.data())?;
                self.flow_to(&key).is_none().then_some(FIRST)
            }
            _ => None,
        }
    }

    /// Who has the flow of a datagram or an echo request.
    fn owner(&self, sharing: &Sharing, key: &Key) -> Option<u8> {
        if self.flows.find(key).is_some() {
            None
        } else if self.is_gateway(*key.remote.ip()) {
            EPHEMERAL.contains(&key.remote.port()).then_some(FIRST)
        } else if self.is_published(key) {
            Some(FIRST)
        } else if self.flows.find(&key.mapping()).is_some() {
            None
        } else {
            sharing.owners.of(key)
        }
    }

    /// Whether flows with this port of a pod may begin on the host's side.
    fn is_published(&self, key: &Key) -> bool {
        key.protocol == Protocol::Udp && self.published.contains(&key.pod)
    }
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
    use std::net::{Ipv4Addr, SocketAddrV4};

    use super::super::Protocol;
    use super::*;

    fn key(port: u16) -> Key {
        Key {
            protocol: Protocol::Udp,
            pod: SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, 2), port),
            remote: SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 53),
        }
    }

    #[test]
    fn a_socket_is_one_workers_until_its_mapping_ends() {
        let owners = Owners::new(7);
        assert_eq!(owners.of(&key(1)), None);
        assert!(owners.claim(&key(1), 255));
        assert_eq!(owners.of(&key(1).mapping()), Some(255));
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
