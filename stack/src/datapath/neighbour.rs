//! The neighbour table: which MAC address and port an address of the own subnet has.
//!
//! smoltcp's own cache cannot be read, drops what waits and asks once a second for all addresses
//! together; a router needs more. Entries of attachments are permanent: ARP cannot change them.
//! Others are resolved by ARP, three requests a second apart, while a few packets wait. What was
//! learned goes stale after a while: the next packet still goes there, and its owner is asked
//! whether that is right, so a flow does not stop for the question. Without an answer it is
//! forgotten. An entry is not taken over by what another port claims before it has gone stale, nor
//! while its owner is being asked. One that was taken over because its owner was silent is asked
//! every second for a while: a false claimant stops answering, and the owner comes back in silence.

use std::collections::{HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use smoltcp::time::{Duration, Instant};
use smoltcp::wire::EthernetAddress;

use crate::datapath::hash::Seed;
use crate::datapath::port::PortId;

/// How long an answer counts before it is asked for again.
pub const REACHABLE: Duration = Duration::from_secs(60);
/// How long what was learned is kept; after `REACHABLE` it is stale.
pub const KEPT: Duration = Duration::from_secs(120);
const RETRY: Duration = Duration::from_secs(1);
const MAX_TRIES: u8 = 3;
/// The same where another place claims the address: its owner is alive, or has gone.
const CHALLENGE_RETRY: Duration = Duration::from_millis(200);
/// Addresses that are asked for at once without a packet that waits, and how long the others of
/// them wait: a node that joins a large link asks for hundreds of next hops.
const AT_ONCE: usize = 16;
const PACE: Duration = Duration::from_millis(100);
/// Packets that may wait for one address.
const WAITING_PER_ADDRESS: usize = 4;
/// Packets that may wait for all of them; a packet is 64 KiB at most.
const WAITING_IN_ALL: usize = 64;

/// What is known of a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// An attachment's own address.
    Permanent,
    /// Being asked for.
    Incomplete {
        /// Requests sent so far: none if its turn has not come yet.
        tries: u8,
        /// When the next one is due, or the search is over.
        due: Instant,
    },
    /// Learned from ARP; stale after [`REACHABLE`].
    Reachable {
        /// When it was learned.
        since: Instant,
    },
    /// Gone stale, still used, and asked whether it is still there.
    Probing {
        /// Requests sent so far.
        tries: u8,
        /// When the next one is due, or it is forgotten.
        due: Instant,
    },
}

/// A neighbour's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its MAC address.
    pub mac: EthernetAddress,
    /// The port it is behind.
    pub port: PortId,
}

/// What to do with a packet for an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// Send it there.
    Known(Place),
    /// Send it there, and an ARP request to that place alone.
    Stale(Place),
    /// It waits; `ask` says whether an ARP request is due now.
    Wait {
        /// Whether an ARP request is due now.
        ask: bool,
    },
    /// Too many packets wait already, for this address or for all of them.
    QueueFull {
        /// Whether an ARP request is due now.
        ask: bool,
    },
    /// Too many addresses are being asked for already.
    TableFull,
}

/// What became of the claim that an address is at a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// It is believed; these packets waited.
    Believed(VecDeque<Vec<u8>>),
    /// Another place has the address: ask there. If nobody answers, the claim is believed.
    Doubted(Place),
    /// It is not believed: another place has just answered, or is being asked.
    Refused,
}

/// What a timeout asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TimerAction {
    /// Send an ARP request for this address to everybody.
    Request(IpAddr),
    /// Send an ARP request for this address to where it was.
    Probe(IpAddr, Place),
    /// Nobody answers for it; these packets waited.
    Failed(IpAddr, VecDeque<Vec<u8>>),
}

#[derive(Debug, Clone)]
struct NeighbourEntry {
    state: State,
    place: Option<Place>,
    /// Another place that claims the address while the known one is being asked.
    rival: Option<Place>,
    /// Until when its place must answer every second, having been taken from one that was silent.
    doubted: Option<Instant>,
    waiting: VecDeque<Vec<u8>>,
}

/// An address as a key: hashed by its bits alone, since hashing is a large part of what finding a pod
/// costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key(IpAddr);

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self.0 {
            IpAddr::V4(address) => state.write_u32(address.to_bits()),
            IpAddr::V6(address) => state.write_u128(address.to_bits()),
        }
    }
}

/// The neighbour table.
#[derive(Debug, Clone)]
pub struct Neighbours {
    entries: HashMap<Key, NeighbourEntry, Seed>,
    limit: usize,
    permanent: usize,
    waiting: usize,
    /// No timer is due before this; `None` if none runs.
    due: Option<Instant>,
}

impl Neighbours {
    /// An empty table that holds at most `limit` addresses which are not permanent.
    #[must_use]
    pub fn new(limit: usize, seed: Seed) -> Self {
        Self {
            entries: HashMap::with_hasher(seed),
            limit,
            permanent: 0,
            waiting: 0,
            due: None,
        }
    }

    /// Makes an attachment's address permanent, and returns the packets that waited for it.
    pub fn add_permanent(&mut self, address: IpAddr, place: Place) -> VecDeque<Vec<u8>> {
        let entry = NeighbourEntry::new(State::Permanent, Some(place));
        let old = self.entries.insert(Key(address), entry);
        let was = old.as_ref().is_some_and(NeighbourEntry::is_permanent);
        self.permanent += usize::from(!was);
        self.released(old.map(|old| old.waiting).unwrap_or_default())
    }

    /// Where `address` is, as far as that is known; it may have gone stale.
    #[must_use]
    pub fn get(&self, address: IpAddr) -> Option<Place> {
        self.entries
            .get(&Key(address))
            .and_then(|entry| entry.place)
    }

    /// Where `address` is, if that is known and needs no question.
    #[inline]
    pub fn known(&self, address: IpAddr, now: Instant) -> Option<Place> {
        let entry = self.entries.get(&Key(address))?;
        entry.place.filter(|_| !entry.is_stale(now))
    }

    /// Where `address` is. If that is not known, a copy of `packet` waits for the answer.
    pub fn resolve(&mut self, address: IpAddr, packet: &[u8], now: Instant) -> Resolution {
        let due = now + RETRY;
        if let Some(entry) = self.entries.get_mut(&Key(address))
            && let Some(place) = entry.place
        {
            if !entry.is_stale(now) {
                return Resolution::Known(place);
            }
            let due = if entry.is_doubted(now) {
                now + CHALLENGE_RETRY
            } else {
                due
            };
            entry.state = State::Probing { tries: 1, due };
            self.wake_at(due);
            return Resolution::Stale(place);
        }
        let ask = self.seek(address, now);
        if !self.entries.contains_key(&Key(address)) {
            return Resolution::TableFull;
        }
        // The request goes out even so, or packets for a few addresses that nobody has would keep
        // all others from being found.
        if self.push(address, packet) {
            Resolution::Wait { ask }
        } else {
            Resolution::QueueFull { ask }
        }
    }

    /// Begins to look for an address of which nothing is known; whether an ARP request is due now.
    pub fn seek(&mut self, address: IpAddr, now: Instant) -> bool {
        let due = now + RETRY;
        match self.entries.get(&Key(address)).map(|entry| entry.state) {
            None if self.is_full() => return false,
            // Nobody has asked yet.
            None | Some(State::Incomplete { tries: 0, .. }) => {}
            Some(_) => return false,
        }
        let first = State::Incomplete { tries: 1, due };
        let entry = self.entries.entry(Key(address));
        entry
            .or_insert_with(|| NeighbourEntry::new(first, None))
            .state = first;
        self.wake_at(due);
        true
    }

    /// Looks for an address for which nothing waits yet, in its turn.
    pub fn seek_in_turn(&mut self, address: IpAddr) {
        if self.entries.contains_key(&Key(address)) || self.is_full() {
            return;
        }
        let due = Instant::ZERO;
        let entry = NeighbourEntry::new(State::Incomplete { tries: 0, due }, None);
        self.entries.insert(Key(address), entry);
        self.wake_at(due);
    }

    /// Lets a copy of `packet` wait for an address that is not asked for, but will be there, until
    /// `until`; false if too many wait.
    pub fn wait(&mut self, address: IpAddr, packet: &[u8], until: Instant) -> bool {
        if !self.entries.contains_key(&Key(address)) && !self.is_full() {
            let (tries, due) = (MAX_TRIES, until);
            let entry = NeighbourEntry::new(State::Incomplete { tries, due }, None);
            self.entries.insert(Key(address), entry);
            self.wake_at(due);
        }
        self.push(address, packet)
    }

    /// Lets a copy of `packet` wait for an address that is looked for; false if too many wait.
    fn push(&mut self, address: IpAddr, packet: &[u8]) -> bool {
        let all = self.waiting;
        let entry = self.entries.get_mut(&Key(address));
        let entry = entry.filter(|entry| {
            entry.place.is_none()
                && entry.waiting.len() < WAITING_PER_ADDRESS
                && all < WAITING_IN_ALL
        });
        let Some(entry) = entry else {
            return false;
        };
        entry.waiting.push_back(packet.to_vec());
        self.waiting += 1;
        true
    }

    /// Whether `address` is being looked for, and nothing is known of it.
    #[must_use]
    pub fn is_sought(&self, address: IpAddr) -> bool {
        let entry = self.entries.get(&Key(address));
        entry.is_some_and(|entry| matches!(entry.state, State::Incomplete { .. }))
    }

    /// Hears that `address` is at `place` on a link where anybody can say so. A place that is known
    /// keeps the address for as long as it answers.
    pub fn claim(&mut self, address: IpAddr, place: Place, now: Instant) -> Claim {
        let Some(entry) = self.entries.get_mut(&Key(address)) else {
            return Claim::Believed(self.hear(address, place, now));
        };
        let Some(known) = entry.place.filter(|known| *known != place) else {
            return Claim::Believed(self.hear(address, place, now));
        };
        match entry.state {
            State::Reachable { since } if now >= since + RETRY => {
                let due = now + CHALLENGE_RETRY;
                entry.state = State::Probing { tries: 1, due };
                entry.rival = Some(place);
                self.wake_at(due);
                Claim::Doubted(known)
            }
            State::Probing { tries, due } => {
                if entry.rival.is_none() {
                    entry.rival = Some(place);
                    // It has been asked already, if not so often.
                    let due = due.min(now + CHALLENGE_RETRY);
                    entry.state = State::Probing { tries, due };
                    self.wake_at(due);
                }
                Claim::Refused
            }
            State::Permanent | State::Incomplete { .. } | State::Reachable { .. } => Claim::Refused,
        }
    }

    fn wake_at(&mut self, due: Instant) {
        self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
    }

    /// Hears in an ARP message that `address` is at `place`, and returns the packets that waited
    /// for it. Only addresses that were asked for, are known, or are announced to us are kept.
    pub fn hear(&mut self, address: IpAddr, place: Place, now: Instant) -> VecDeque<Vec<u8>> {
        let full = self.is_full();
        match self.entries.get_mut(&Key(address)) {
            Some(entry) if entry.accepts(place, now) => {
                entry.state = State::Reachable { since: now };
                entry.place = Some(place);
                entry.rival = None;
                let waiting = std::mem::take(&mut entry.waiting);
                self.released(waiting)
            }
            None if !full => {
                let state = State::Reachable { since: now };
                self.entries
                    .insert(Key(address), NeighbourEntry::new(state, Some(place)));
                VecDeque::new()
            }
            Some(_) | None => VecDeque::new(),
        }
    }

    /// Forgets everything behind `port`.
    pub fn forget_port(&mut self, port: PortId) {
        let permanent = &mut self.permanent;
        self.entries.retain(|_, entry| {
            let stays = entry.place.is_none_or(|place| place.port != port);
            *permanent -= usize::from(!stays && entry.is_permanent());
            stays
        });
    }

    fn is_full(&self) -> bool {
        self.entries.len() - self.permanent >= self.limit
    }

    /// When [`Self::handle_timeout`] is next needed.
    #[must_use]
    pub fn poll_at(&self) -> Option<Instant> {
        self.due
    }

    /// Does what is due at `now`, and gives each thing to be sent or dropped to `act`.
    pub fn handle_timeout(&mut self, now: Instant, mut act: impl FnMut(TimerAction)) {
        if self.due.is_none_or(|due| due > now) {
            return;
        }
        let (mut next, mut released, mut begun) = (None, 0, 0);
        self.entries.retain(|Key(address), entry| {
            let is_doubted = entry.is_doubted(now);
            let (State::Incomplete { tries, due } | State::Probing { tries, due }) =
                &mut entry.state
            else {
                return true;
            };
            let is_first = *tries == 0;
            if *due <= now && is_first && begun == AT_ONCE {
                *due = now + PACE;
            }
            if *due <= now {
                begun += usize::from(is_first);
                if *tries >= MAX_TRIES && entry.rival.is_some() {
                    entry.place = entry.rival.take();
                    entry.state = State::Reachable { since: now };
                    entry.doubted = Some(now + KEPT);
                    return true;
                }
                if *tries >= MAX_TRIES {
                    released += entry.waiting.len();
                    act(TimerAction::Failed(
                        *address,
                        std::mem::take(&mut entry.waiting),
                    ));
                    return false;
                }
                *tries += 1;
                let is_urgent = entry.rival.is_some() || is_doubted;
                *due = now + if is_urgent { CHALLENGE_RETRY } else { RETRY };
                act(match entry.place {
                    Some(place) => TimerAction::Probe(*address, place),
                    None => TimerAction::Request(*address),
                });
            }
            next = Some(next.map_or(*due, |earlier: Instant| earlier.min(*due)));
            true
        });
        self.waiting -= released;
        self.due = next;
    }

    /// Forgets learned addresses that have not been heard of for a while, but for those to be kept
    /// while there is room for others.
    pub fn age(&mut self, now: Instant, is_kept: impl Fn(IpAddr) -> bool) {
        let has_room = !self.is_full();
        self.entries
            .retain(|Key(address), entry| match entry.state {
                State::Permanent | State::Incomplete { .. } | State::Probing { .. } => true,
                State::Reachable { since } => now < since + KEPT || has_room && is_kept(*address),
            });
    }

    /// Every entry, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (IpAddr, Option<Place>, State)> + '_ {
        self.entries
            .iter()
            .map(|(Key(address), entry)| (*address, entry.place, entry.state))
    }

    fn released(&mut self, waiting: VecDeque<Vec<u8>>) -> VecDeque<Vec<u8>> {
        self.waiting -= waiting.len();
        waiting
    }
}

impl NeighbourEntry {
    fn new(state: State, place: Option<Place>) -> Self {
        Self {
            state,
            place,
            rival: None,
            doubted: None,
            waiting: VecDeque::new(),
        }
    }

    fn is_permanent(&self) -> bool {
        self.state == State::Permanent
    }

    fn is_doubted(&self, now: Instant) -> bool {
        self.doubted.is_some_and(|until| now < until)
    }

    fn is_stale(&self, now: Instant) -> bool {
        let reachable = if self.is_doubted(now) {
            RETRY
        } else {
            REACHABLE
        };
        matches!(self.state, State::Reachable { since } if now >= since + reachable)
    }

    fn accepts(&self, place: Place, now: Instant) -> bool {
        match self.state {
            State::Permanent => false,
            State::Incomplete { .. } => true,
            State::Reachable { .. } | State::Probing { .. } => {
                self.place.is_none_or(|known| known.port == place.port) || self.is_stale(now)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 1, 9));

    fn place(port: u32) -> Place {
        Place {
            mac: EthernetAddress([2, 0, 0, 0, 0, port as u8]),
            port: PortId(port),
        }
    }

    #[test]
    fn packets_wait_for_the_answer_and_then_go() {
        let mut table = Neighbours::new(8, Seed(1));
        let now = Instant::ZERO;
        assert_eq!(
            table.resolve(ADDRESS, b"one", now),
            Resolution::Wait { ask: true }
        );
        assert_eq!(
            table.resolve(ADDRESS, b"two", now),
            Resolution::Wait { ask: false }
        );
        assert_eq!(table.hear(ADDRESS, place(1), now), [b"one", b"two"]);
        assert_eq!(
            table.resolve(ADDRESS, b"", now),
            Resolution::Known(place(1))
        );
    }

    #[test]
    fn a_stale_entry_is_used_while_it_is_asked() {
        let mut table = Neighbours::new(8, Seed(1));
        table.hear(ADDRESS, place(1), Instant::ZERO);
        let mut now = Instant::ZERO + REACHABLE;
        table.age(now, |_| false);
        let (stale, known) = (Resolution::Stale(place(1)), Resolution::Known(place(1)));
        assert_eq!(table.resolve(ADDRESS, b"", now), stale);
        assert_eq!(table.resolve(ADDRESS, b"", now), known, "one request");
        // Another port has no say in it, the owner has.
        table.hear(ADDRESS, place(2), now);
        assert_eq!(table.resolve(ADDRESS, b"", now), known);
        now += RETRY;
        let mut seen = Vec::new();
        table.handle_timeout(now, |due| seen.push(due));
        assert_eq!(seen, [TimerAction::Probe(ADDRESS, place(1))]);
        assert!(table.hear(ADDRESS, place(1), now).is_empty());
        table.handle_timeout(now + RETRY, |due| panic!("{due:?}"));
        assert_eq!(table.poll_at(), None);
        now += REACHABLE - RETRY;
        assert_eq!(table.resolve(ADDRESS, b"", now), known);
    }

    #[test]
    fn a_stale_entry_is_forgotten_without_an_answer() {
        let mut table = Neighbours::new(8, Seed(1));
        table.hear(ADDRESS, place(1), Instant::ZERO);
        let mut now = Instant::ZERO + REACHABLE;
        table.resolve(ADDRESS, b"", now);
        let mut seen = Vec::new();
        while let Some(due) = table.poll_at() {
            assert_eq!(due, now + RETRY);
            assert_eq!(
                table.resolve(ADDRESS, b"", now),
                Resolution::Known(place(1))
            );
            now = due;
            table.handle_timeout(now, |due| seen.push(due));
        }
        let probe = TimerAction::Probe(ADDRESS, place(1));
        let given_up = TimerAction::Failed(ADDRESS, VecDeque::new());
        assert_eq!(seen, [probe.clone(), probe, given_up]);
        assert_eq!(
            table.resolve(ADDRESS, b"", now),
            Resolution::Wait { ask: true }
        );
    }

    #[test]
    fn three_requests_a_second_apart_then_the_packets_come_back() {
        let mut table = Neighbours::new(8, Seed(1));
        let mut now = Instant::ZERO;
        table.resolve(ADDRESS, b"one", now);
        let mut seen = Vec::new();
        while let Some(due) = table.poll_at() {
            assert_eq!(due, now + RETRY);
            now = due;
            table.handle_timeout(now, |due| seen.push(due));
        }
        let given_up = TimerAction::Failed(ADDRESS, [b"one".to_vec()].into());
        assert_eq!(
            seen,
            [
                TimerAction::Request(ADDRESS),
                TimerAction::Request(ADDRESS),
                given_up
            ]
        );
        assert_eq!(table.iter().count(), 0);
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut table = Neighbours::new(20, Seed(1));
        let address = |i: u8| IpAddr::from([10, 244, 1, i]);
        for _ in 0..WAITING_PER_ADDRESS {
            assert!(matches!(
                table.resolve(ADDRESS, b"", Instant::ZERO),
                Resolution::Wait { .. }
            ));
        }
        assert_eq!(
            table.resolve(ADDRESS, b"", Instant::ZERO),
            Resolution::QueueFull { ask: false }
        );
        for i in 0..(WAITING_IN_ALL / WAITING_PER_ADDRESS - 1) as u8 {
            for _ in 0..WAITING_PER_ADDRESS {
                table.resolve(address(100 + i), b"", Instant::ZERO);
            }
        }
        assert_eq!(
            table.resolve(address(99), b"", Instant::ZERO),
            Resolution::QueueFull { ask: true }
        );
        let mut table = Neighbours::new(2, Seed(1));
        table.resolve(address(1), b"", Instant::ZERO);
        table.resolve(address(2), b"", Instant::ZERO);
        assert_eq!(
            table.resolve(address(3), b"", Instant::ZERO),
            Resolution::TableFull
        );
        table.hear(address(3), place(1), Instant::ZERO);
        assert_eq!(table.iter().count(), 2);
    }

    /// Lets as many packets wait as may, each for another address.
    fn fill(table: &mut Neighbours, address: impl Fn(usize) -> IpAddr, now: Instant) {
        for i in 0..WAITING_IN_ALL {
            let resolved = table.resolve(address(i), b"x", now);
            assert_eq!(resolved, Resolution::Wait { ask: true });
        }
        let full = table.resolve(address(WAITING_IN_ALL), b"x", now);
        assert_eq!(full, Resolution::QueueFull { ask: true });
    }

    #[test]
    fn what_is_given_up_makes_room_even_if_that_is_late() {
        let mut table = Neighbours::new(100, Seed(1));
        let address = |i: usize| IpAddr::from([10, 244, 1, i as u8]);
        let mut now = Instant::ZERO;
        for _ in 0..2 {
            fill(&mut table, address, now);
            for _ in 0..MAX_TRIES {
                now += RETRY * 3;
                table.handle_timeout(now, |_| {});
            }
            assert_eq!((table.poll_at(), table.iter().count()), (None, 0));
        }
    }

    #[test]
    fn what_is_answered_makes_room() {
        let mut table = Neighbours::new(1000, Seed(1));
        let now = Instant::ZERO;
        for round in 1..=3 {
            let address = |i: usize| IpAddr::from([10, 244, round, i as u8]);
            fill(&mut table, address, now);
            for i in 0..WAITING_IN_ALL {
                let released = match round {
                    1 => table.hear(address(i), place(1), now),
                    _ => table.add_permanent(address(i), place(1)),
                };
                assert_eq!(released, [b"x"]);
            }
        }
    }

    #[test]
    fn permanent_entries_take_no_room_from_others() {
        let mut table = Neighbours::new(1, Seed(1));
        let address = |i: u8| IpAddr::from([10, 244, 1, i]);
        let now = Instant::ZERO;
        table.add_permanent(address(1), place(1));
        table.add_permanent(address(2), place(1));
        let wait = Resolution::Wait { ask: true };
        assert_eq!(table.resolve(address(3), b"", now), wait);
        assert_eq!(table.resolve(address(4), b"", now), Resolution::TableFull);
        // What was learned makes room when it becomes permanent, and so does what is forgotten.
        table.add_permanent(address(3), place(1));
        table.hear(address(4), place(2), now);
        table.hear(address(5), place(2), now);
        assert_eq!(table.iter().count(), 4);
        table.forget_port(PortId(2));
        assert_eq!(table.resolve(address(5), b"", now), wait);
        while let Some(due) = table.poll_at() {
            table.handle_timeout(due, |_| {});
        }
        table.hear(address(6), place(2), now);
        table.age(now + KEPT, |_| false);
        assert_eq!(table.resolve(address(7), b"", now), wait);
    }

    #[test]
    fn an_address_is_asked_for_even_if_its_packets_cannot_wait() {
        let mut table = Neighbours::new(100, Seed(1));
        let address = |i: u8| IpAddr::from([10, 244, 1, i]);
        for i in 0..(WAITING_IN_ALL / WAITING_PER_ADDRESS) as u8 {
            for _ in 0..WAITING_PER_ADDRESS {
                table.resolve(address(100 + i), b"", Instant::ZERO);
            }
        }
        for ask in [true, false] {
            assert_eq!(
                table.resolve(ADDRESS, b"", Instant::ZERO),
                Resolution::QueueFull { ask }
            );
        }
        table.hear(ADDRESS, place(1), Instant::ZERO);
        assert_eq!(
            table.resolve(ADDRESS, b"", Instant::ZERO),
            Resolution::Known(place(1))
        );
    }

    #[test]
    fn a_live_entry_is_not_taken_over_by_another_port() {
        let mut table = Neighbours::new(8, Seed(1));
        let now = Instant::ZERO;
        table.add_permanent(ADDRESS, place(1));
        table.hear(ADDRESS, place(2), now + REACHABLE * 2);
        assert_eq!(
            table.resolve(ADDRESS, b"", now),
            Resolution::Known(place(1))
        );
        table.forget_port(PortId(1));
        table.hear(ADDRESS, place(2), now);
        table.hear(ADDRESS, place(3), now);
        assert_eq!(
            table.resolve(ADDRESS, b"", now),
            Resolution::Known(place(2))
        );
        table.hear(ADDRESS, place(3), now + REACHABLE);
        assert_eq!(
            table.resolve(ADDRESS, b"", now + REACHABLE),
            Resolution::Known(place(3))
        );
    }

    #[test]
    fn what_is_sought_is_asked_for_once_and_known_for_a_while() {
        let mut table = Neighbours::new(1, Seed(1));
        let now = Instant::ZERO;
        assert!(table.seek(ADDRESS, now));
        assert!(!table.seek(ADDRESS, now), "under way");
        assert!(!table.seek([10, 244, 1, 8].into(), now), "full");
        assert_eq!(table.poll_at(), Some(now + RETRY));
        assert_eq!(table.known(ADDRESS, now), None);
        table.hear(ADDRESS, place(1), now);
        assert_eq!(table.known(ADDRESS, now), Some(place(1)));
        assert_eq!(table.known(ADDRESS, now + REACHABLE), None, "stale");
        assert_eq!(table.get(ADDRESS), Some(place(1)));
    }

    #[test]
    fn a_claim_to_a_known_address_wins_only_if_nobody_answers_for_it() {
        let mut table = Neighbours::new(8, Seed(1));
        let believed = Claim::Believed(VecDeque::new());
        let doubted = Claim::Doubted(place(1));
        let mut now = Instant::ZERO;
        assert_eq!(table.claim(ADDRESS, place(1), now), believed);
        // It has just been heard from.
        now += RETRY;
        let just = Instant::from_micros(now.total_micros() - 1);
        assert_eq!(table.claim(ADDRESS, place(2), just), Claim::Refused);
        for answered in [true, false] {
            assert_eq!(table.claim(ADDRESS, place(2), now), doubted);
            assert_eq!(table.claim(ADDRESS, place(3), now), Claim::Refused);
            assert_eq!(table.known(ADDRESS, now), Some(place(1)));
            assert_eq!(table.poll_at(), Some(now + CHALLENGE_RETRY));
            if answered {
                assert_eq!(table.claim(ADDRESS, place(1), now), believed);
                table.handle_timeout(now + CHALLENGE_RETRY, |due| panic!("{due:?}"));
                now += RETRY;
            }
        }
        let mut asked = Vec::new();
        while let Some(due) = table.poll_at() {
            assert_eq!(due, now + CHALLENGE_RETRY);
            now = due;
            table.handle_timeout(now, |due| asked.push(due));
        }
        assert_eq!(asked, vec![TimerAction::Probe(ADDRESS, place(1)); 2]);
        assert_eq!(table.known(ADDRESS, now), Some(place(2)), "the first rival");
    }

    /// A table whose entry was taken over by the second place, and when.
    fn taken_over() -> (Neighbours, Instant) {
        let mut table = Neighbours::new(8, Seed(1));
        let mut now = Instant::ZERO;
        table.claim(ADDRESS, place(1), now);
        now += RETRY;
        assert_eq!(
            table.claim(ADDRESS, place(2), now),
            Claim::Doubted(place(1))
        );
        while let Some(due) = table.poll_at() {
            now = due;
            table.handle_timeout(now, |_| {});
        }
        assert_eq!(table.known(ADDRESS, now), Some(place(2)));
        (table, now)
    }

    #[test]
    fn who_has_taken_an_address_over_answers_for_it_every_second() {
        let (mut table, mut now) = taken_over();
        let until = now + KEPT;
        while now + RETRY < until {
            assert_eq!(
                table.resolve(ADDRESS, b"", now),
                Resolution::Known(place(2))
            );
            now += RETRY;
            assert_eq!(
                table.resolve(ADDRESS, b"", now),
                Resolution::Stale(place(2))
            );
            assert_eq!(
                table.claim(ADDRESS, place(2), now),
                Claim::Believed(VecDeque::new())
            );
        }
        // Whoever has answered for so long is believed as others are.
        now = until + RETRY;
        assert_eq!(
            table.resolve(ADDRESS, b"", now),
            Resolution::Known(place(2))
        );
    }

    #[test]
    fn a_host_that_comes_back_in_silence_is_found_when_the_claimant_is_silent() {
        let (mut table, mut now) = taken_over();
        let taken = now;
        now += RETRY;
        let mut seen = Vec::new();
        assert_eq!(
            table.resolve(ADDRESS, b"", now),
            Resolution::Stale(place(2))
        );
        while let Some(due) = table.poll_at() {
            now = due;
            table.handle_timeout(now, |due| seen.push(due));
        }
        let probe = TimerAction::Probe(ADDRESS, place(2));
        let given_up = TimerAction::Failed(ADDRESS, VecDeque::new());
        assert_eq!(seen, [probe.clone(), probe, given_up]);
        assert_eq!(now, taken + RETRY + CHALLENGE_RETRY * 3);
        // All are asked, and what is heard now is believed at once.
        assert_eq!(
            table.resolve(ADDRESS, b"", now),
            Resolution::Wait { ask: true }
        );
        table.claim(ADDRESS, place(1), now);
        assert_eq!(table.known(ADDRESS, now + RETRY), Some(place(1)));
    }

    #[test]
    fn a_claim_to_an_address_that_is_being_asked_for_hurries_the_question() {
        let mut table = Neighbours::new(8, Seed(1));
        table.hear(ADDRESS, place(1), Instant::ZERO);
        let mut now = Instant::ZERO + REACHABLE;
        table.resolve(ADDRESS, b"", now);
        assert_eq!(table.poll_at(), Some(now + RETRY));
        assert_eq!(table.claim(ADDRESS, place(2), now), Claim::Refused);
        let began = now;
        while let Some(due) = table.poll_at() {
            now = due;
            table.handle_timeout(now, |_| {});
        }
        assert_eq!(now, began + CHALLENGE_RETRY * 3);
        assert_eq!(table.known(ADDRESS, now), Some(place(2)));
    }
}
