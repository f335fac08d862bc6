//! The learning switch: which MAC address is behind which port (the forwarding database, FDB).
//!
//! Addresses of attachments are static: no frame can move them. All others are learned from the
//! source of frames, age out, and are bounded in number; at the bound nothing more is learned and
//! frames to unknown addresses are flooded, as Linux' bridges do (`fdb_max_learned`), unless all
//! pods they could be for are guarded.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use smoltcp::time::{Duration, Instant};
use smoltcp::wire::EthernetAddress;

use crate::datapath::hash::Seed;
use crate::datapath::port::PortId;

/// How long a learned address lives without a frame from it, as with Linux' bridges.
pub const AGEING: Duration = Duration::from_secs(300);

/// Where a MAC address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdbEntry {
    /// The port it is behind.
    pub port: PortId,
    /// When a frame from it was last seen; `None` for a static entry.
    pub seen: Option<Instant>,
}

/// The forwarding database.
#[derive(Debug, Clone)]
pub struct Fdb {
    entries: HashMap<EthernetAddress, FdbEntry, Seed>,
    learned: usize,
    limit: usize,
}

impl Fdb {
    /// An empty database that learns at most `limit` addresses.
    #[must_use]
    pub fn new(limit: usize, seed: Seed) -> Self {
        Self {
            entries: HashMap::with_capacity_and_hasher(limit, seed),
            learned: 0,
            limit,
        }
    }

    /// Makes `mac` a static entry.
    pub fn add_static(&mut self, mac: EthernetAddress, port: PortId) {
        let old = self.entries.insert(mac, FdbEntry { port, seen: None });
        if old.is_some_and(|old| old.seen.is_some()) {
            self.learned -= 1;
        }
    }

    /// Learns that a frame from `mac` came in at `port`.
    pub fn learn(&mut self, mac: EthernetAddress, port: PortId, now: Instant) {
        match self.entries.entry(mac) {
            Slot::Occupied(mut slot) if slot.get().seen.is_some() => {
                slot.insert(FdbEntry {
                    port,
                    seen: Some(now),
                });
            }
            Slot::Vacant(slot) if self.learned < self.limit => {
                slot.insert(FdbEntry {
                    port,
                    seen: Some(now),
                });
                self.learned += 1;
            }
            Slot::Occupied(_) | Slot::Vacant(_) => {}
        }
    }

    /// The port `mac` is behind.
    #[must_use]
    pub fn lookup(&self, mac: EthernetAddress, now: Instant) -> Option<PortId> {
        self.entries
            .get(&mac)
            .filter(|entry| is_alive(entry, now))
            .map(|entry| entry.port)
    }

    /// Forgets everything behind `port`.
    pub fn forget_port(&mut self, port: PortId) {
        self.retain(|entry| entry.port != port);
    }

    /// Forgets learned addresses that have aged out.
    pub fn age(&mut self, now: Instant) {
        self.retain(|entry| is_alive(entry, now));
    }

    /// Every entry, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (EthernetAddress, FdbEntry)> + '_ {
        self.entries.iter().map(|(mac, entry)| (*mac, *entry))
    }

    fn retain(&mut self, mut keep: impl FnMut(&FdbEntry) -> bool) {
        self.entries.retain(|_, entry| keep(entry));
        self.learned = self
            .entries
            .values()
            .filter(|entry| entry.seen.is_some())
            .count();
    }
}

fn is_alive(entry: &FdbEntry, now: Instant) -> bool {
    entry.seen.is_none_or(|seen| now < seen + AGEING)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PORT: PortId = PortId(1);

    fn mac(last: u8) -> EthernetAddress {
        EthernetAddress([2, 0, 0, 0, 0, last])
    }

    #[test]
    fn static_entries_do_not_move() {
        let mut fdb = Fdb::new(4, Seed(1));
        fdb.add_static(mac(1), PORT);
        fdb.learn(mac(1), PortId(2), Instant::ZERO);
        assert_eq!(fdb.lookup(mac(1), Instant::ZERO + AGEING * 9), Some(PORT));
    }

    #[test]
    fn learning_stops_at_the_bound_and_goes_on_after_ageing() {
        let mut fdb = Fdb::new(2, Seed(1));
        for last in 0..3 {
            fdb.learn(mac(last), PORT, Instant::ZERO);
        }
        assert_eq!(fdb.iter().count(), 2);
        let later = Instant::ZERO + AGEING;
        assert_eq!(fdb.lookup(mac(0), later), None);
        fdb.age(later);
        fdb.learn(mac(2), PORT, later);
        assert_eq!(fdb.lookup(mac(2), later), Some(PORT));
    }

    #[test]
    fn what_becomes_static_makes_room_for_one_more() {
        let (mut fdb, now) = (Fdb::new(2, Seed(1)), Instant::ZERO);
        fdb.learn(mac(0), PORT, now);
        fdb.learn(mac(1), PORT, now);
        for _ in 0..2 {
            fdb.add_static(mac(0), PORT);
        }
        fdb.learn(mac(2), PORT, now);
        fdb.learn(mac(3), PORT, now);
        let found = [0, 1, 2, 3].map(|last| fdb.lookup(mac(last), now).is_some());
        assert_eq!(found, [true, true, true, false]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Learn(u8, u32),
        Static(u8, u32),
        Forget(u32),
        Wait(u64),
        Age,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0u8..6, 0u32..3).prop_map(|(m, p)| Step::Learn(m, p)),
            1 => (0u8..6, 0u32..3).prop_map(|(m, p)| Step::Static(m, p)),
            1 => (0u32..3).prop_map(Step::Forget),
            2 => (0u64..400).prop_map(Step::Wait),
            1 => Just(Step::Age),
        ]
    }

    proptest! {
        /// The model: a list of what was learned when, searched from the end.
        #[test]
        fn agrees_with_a_model(steps in proptest::collection::vec(step(), 0..60)) {
            let mut fdb = Fdb::new(100, Seed(7));
            let mut model: Vec<(u8, u32, Option<Instant>)> = Vec::new();
            let mut now = Instant::ZERO;
            for step in steps {
                match step {
                    Step::Learn(m, port) => {
                        fdb.learn(mac(m), PortId(port), now);
                        if !model.iter().any(|(n, _, seen)| *n == m && seen.is_none()) {
                            model.retain(|(n, ..)| *n != m);
                            model.push((m, port, Some(now)));
                        }
                    }
                    Step::Static(m, port) => {
                        fdb.add_static(mac(m), PortId(port));
                        model.retain(|(n, ..)| *n != m);
                        model.push((m, port, None));
                    }
                    Step::Forget(port) => {
                        fdb.forget_port(PortId(port));
                        model.retain(|(_, p, _)| *p != port);
                    }
                    Step::Wait(seconds) => now += Duration::from_secs(seconds),
                    Step::Age => fdb.age(now),
                }
                for m in 0..6 {
                    let expected = model
                        .iter()
                        .find(|(n, ..)| *n == m)
                        .filter(|(_, _, seen)| seen.is_none_or(|seen| now - seen < AGEING))
                        .map(|(_, port, _)| PortId(*port));
                    prop_assert_eq!(fdb.lookup(mac(m), now), expected);
                }
            }
        }
    }
}
