//! Who has joined which group, until when.

use std::collections::BTreeMap;
use std::net::IpAddr;

use smoltcp::time::{Duration, Instant};

use super::{QUERY_INTERVAL, QUERY_RESPONSE_INTERVAL, ROBUSTNESS};
use crate::datapath::port::PortId;

/// How long a membership lasts that is not reported again (RFC 3376 section 8.4, RFC 3810 section 9.4).
pub const MEMBERSHIP_INTERVAL: Duration =
    Duration::from_secs(QUERY_INTERVAL.secs() * ROBUSTNESS as u64 + QUERY_RESPONSE_INTERVAL.secs());
/// How long other hosts behind a port where one left have to say that they stay, each time that they
/// are asked (RFC 3376 section 8.8).
pub const LAST_MEMBER_INTERVAL: Duration = Duration::from_secs(1);

/// How many groups a pod can be in, and how many memberships there can be.
const PER_PORT: usize = 128;
const IN_ALL: usize = 8192;

/// What is to be done when a host leaves a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaving {
    /// There is one host behind the port: the membership ends.
    AtOnce,
    /// There may be others: they are asked, and it ends if none answers. `asks` says whether that is to
    /// be done here; if not, another worker does it.
    AfterQueries {
        /// Whether [`Memberships::next_query`] tells of them.
        asks: bool,
    },
}

/// A port is in as many groups as it can be, or the table is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableFull;

#[derive(Debug, Clone, Copy)]
struct Membership {
    until: Instant,
    /// How often the hosts are still to be asked whether one stays, and when next.
    asks: u8,
    ask_at: Instant,
}

/// The memberships of the pods of a node.
#[derive(Debug, Clone, Default)]
pub struct Memberships {
    members: BTreeMap<(IpAddr, PortId), Membership>,
    per_port: BTreeMap<PortId, usize>,
    /// Nothing is due before.
    next: Option<Instant>,
}

impl Memberships {
    /// Takes a report of a member.
    ///
    /// # Errors
    /// `TableFull`, if it is a new one for which there is no room.
    pub fn join(&mut self, now: Instant, port: PortId, group: IpAddr) -> Result<(), TableFull> {
        let membership = Membership {
            until: now + MEMBERSHIP_INTERVAL,
            asks: 0,
            ask_at: now,
        };
        if let Some(known) = self.members.get_mut(&(group, port)) {
            *known = membership;
        } else {
            let count = self.per_port.get(&port).copied().unwrap_or_default();
            if count >= PER_PORT || self.members.len() >= IN_ALL {
                return Err(TableFull);
            }
            self.per_port.insert(port, count + 1);
            self.members.insert((group, port), membership);
        }
        self.due_at(membership.until);
        Ok(())
    }

    /// Takes what a host says that leaves.
    pub fn leave(&mut self, now: Instant, port: PortId, group: IpAddr, leaving: Leaving) {
        match leaving {
            Leaving::AtOnce => self.end(group, port),
            Leaving::AfterQueries { asks } => {
                let Some(known) = self.members.get_mut(&(group, port)) else {
                    return;
                };
                let until = now + LAST_MEMBER_INTERVAL * ROBUSTNESS.into();
                if known.until <= until {
                    return;
                }
                known.until = until;
                (known.asks, known.ask_at) = (if asks { ROBUSTNESS } else { 0 }, now);
                self.due_at(if asks { now } else { until });
            }
        }
    }

    /// Ends all memberships of a port.
    pub fn forget_port(&mut self, port: PortId) {
        if self.per_port.remove(&port).is_some() {
            self.members.retain(|(_, member), _| *member != port);
        }
    }

    /// Ends what was not reported again.
    pub fn expire(&mut self, now: Instant) {
        let per_port = &mut self.per_port;
        let mut next = None;
        self.members.retain(|(_, port), membership| {
            if membership.until <= now {
                release(per_port, *port);
                return false;
            }
            let due = membership.due();
            next = Some(next.map_or(due, |next: Instant| next.min(due)));
            true
        });
        self.next = next;
    }

    /// A group whose members behind a port are to be asked now whether they stay.
    pub fn next_query(&mut self, now: Instant) -> Option<(PortId, IpAddr)> {
        let is_due = |it: &Membership| it.asks > 0 && it.ask_at <= now;
        let due = self.members.iter_mut().find(|(_, it)| is_due(it));
        let ((group, port), membership) = due?;
        membership.asks -= 1;
        membership.ask_at = now + LAST_MEMBER_INTERVAL;
        Some((*port, *group))
    }

    /// When [`Self::next_query`] and [`Self::expire`] are to be called, in this order.
    #[must_use]
    pub const fn poll_at(&self) -> Option<Instant> {
        self.next
    }

    /// The ports with members of a group.
    pub fn members(&self, now: Instant, group: IpAddr) -> impl Iterator<Item = PortId> + '_ {
        let (first, last) = (PortId(0), PortId(u32::MAX));
        let all = self.members.range((group, first)..=(group, last));
        let alive = all.filter(move |(_, membership)| membership.until > now);
        alive.map(|((_, port), _)| *port)
    }

    /// All memberships with the time that is left of each, by groups.
    pub fn iter(&self, now: Instant) -> impl Iterator<Item = (IpAddr, PortId, Duration)> + '_ {
        let all = self.members.iter();
        let alive = all.filter(move |(_, membership)| membership.until > now);
        alive.map(move |((group, port), it)| (*group, *port, it.until - now))
    }

    fn end(&mut self, group: IpAddr, port: PortId) {
        if self.members.remove(&(group, port)).is_some() {
            release(&mut self.per_port, port);
        }
    }

    fn due_at(&mut self, at: Instant) {
        self.next = Some(self.next.map_or(at, |next| next.min(at)));
    }
}

impl Membership {
    fn due(&self) -> Instant {
        if self.asks > 0 {
            self.until.min(self.ask_at)
        } else {
            self.until
        }
    }
}

fn release(per_port: &mut BTreeMap<PortId, usize>, port: PortId) {
    if let Some(count) = per_port.get_mut(&port) {
        *count -= 1;
        if *count == 0 {
            per_port.remove(&port);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    const PORT: PortId = PortId(1);

    fn group(last: u8) -> IpAddr {
        Ipv4Addr::new(239, 0, 0, last).into()
    }

    fn members(table: &Memberships, now: Instant, of: u8) -> Vec<u32> {
        table.members(now, group(of)).map(|port| port.0).collect()
    }

    #[test]
    fn a_membership_lasts_until_it_is_not_reported() {
        let (mut table, mut now) = (Memberships::default(), Instant::ZERO);
        table.join(now, PORT, group(1)).unwrap();
        assert_eq!(MEMBERSHIP_INTERVAL, Duration::from_secs(260));
        now += MEMBERSHIP_INTERVAL - Duration::from_micros(1);
        assert_eq!(members(&table, now, 1), [1]);
        table.join(now, PORT, group(1)).unwrap();
        now += MEMBERSHIP_INTERVAL - Duration::from_micros(1);
        assert_eq!(members(&table, now, 1), [1]);
        now += Duration::from_micros(1);
        assert!(members(&table, now, 1).is_empty());
        assert!(table.poll_at().is_some_and(|due| due <= now));
        table.expire(now);
        assert_eq!((table.poll_at(), table.per_port.len()), (None, 0));
    }

    #[test]
    fn hosts_behind_one_port_are_asked_before_it_leaves() {
        let (mut table, now) = (Memberships::default(), Instant::ZERO);
        let asks = Leaving::AfterQueries { asks: true };
        table.join(now, PORT, group(1)).unwrap();
        table.leave(now, PORT, group(1), asks);
        assert_eq!(table.poll_at(), Some(now));
        assert_eq!(table.next_query(now), Some((PORT, group(1))));
        assert_eq!(table.next_query(now), None);
        table.expire(now);
        let later = now + LAST_MEMBER_INTERVAL;
        assert_eq!(table.poll_at(), Some(later));
        // It is asked no more often if several leave.
        table.leave(later, PORT, group(1), asks);
        assert_eq!(table.next_query(later), Some((PORT, group(1))));
        assert_eq!(table.next_query(later), None);
        assert_eq!(members(&table, later, 1), [1]);
        let end = now + LAST_MEMBER_INTERVAL * 2;
        assert!(members(&table, end, 1).is_empty());
        // One stays.
        table.join(later, PORT, group(1)).unwrap();
        table.expire(end);
        assert_eq!(members(&table, end, 1), [1]);
        assert_eq!(table.next_query(end), None);
    }

    #[test]
    fn there_is_room_for_so_many() {
        let (mut table, now) = (Memberships::default(), Instant::ZERO);
        let each = (0..PER_PORT).map(|at| Ipv4Addr::from(0xe100_0000 + at as u32).into());
        let each: Vec<IpAddr> = each.collect();
        for group in &each {
            table.join(now, PORT, *group).unwrap();
        }
        assert_eq!(table.join(now, PORT, group(1)), Err(TableFull));
        // Those that are known stay so, and others have room.
        table.join(now, PORT, each[5]).unwrap();
        table.join(now, PortId(2), group(1)).unwrap();
        table.leave(now, PORT, each[5], Leaving::AtOnce);
        table.join(now, PORT, group(1)).unwrap();
        assert_eq!(table.join(now, PORT, each[5]), Err(TableFull));
        table.forget_port(PORT);
        assert_eq!(table.iter(now).count(), 1);
        let ports = (10..).map(PortId);
        let joined = ports.flat_map(|port| each.iter().map(move |group| (port, *group)));
        let joined = joined.take_while(|(port, group)| table.join(now, *port, *group).is_ok());
        assert_eq!(joined.count(), IN_ALL - 1);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Join(u8, u32),
        Leave(u8, u32),
        Ask(u8, u32),
        Forget(u32),
        Wait(u64),
        Expire,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0u8..4, 0u32..4).prop_map(|(g, p)| Step::Join(g, p)),
            2 => (0u8..4, 0u32..4).prop_map(|(g, p)| Step::Leave(g, p)),
            2 => (0u8..4, 0u32..4).prop_map(|(g, p)| Step::Ask(g, p)),
            1 => (0u32..4).prop_map(Step::Forget),
            3 => (0u64..200).prop_map(Step::Wait),
            1 => Just(Step::Expire),
        ]
    }

    proptest! {
        /// The model: a list of who is a member until when.
        #[test]
        fn agrees_with_a_model(steps in proptest::collection::vec(step(), 0..80)) {
            let mut table = Memberships::default();
            let mut model: Vec<(u8, u32, Instant)> = Vec::new();
            let mut now = Instant::ZERO;
            for step in steps {
                match step {
                    Step::Join(g, p) => {
                        table.join(now, PortId(p), group(g)).unwrap();
                        model.retain(|(h, q, _)| (*h, *q) != (g, p));
                        model.push((g, p, now + MEMBERSHIP_INTERVAL));
                    }
                    Step::Leave(g, p) => {
                        table.leave(now, PortId(p), group(g), Leaving::AtOnce);
                        model.retain(|(h, q, _)| (*h, *q) != (g, p));
                    }
                    Step::Ask(g, p) => {
                        let leaving = Leaving::AfterQueries { asks: true };
                        table.leave(now, PortId(p), group(g), leaving);
                        let end = now + LAST_MEMBER_INTERVAL * 2;
                        for it in model.iter_mut().filter(|(h, q, _)| (*h, *q) == (g, p)) {
                            it.2 = it.2.min(end);
                        }
                    }
                    Step::Forget(p) => {
                        table.forget_port(PortId(p));
                        model.retain(|(_, q, _)| *q != p);
                    }
                    Step::Wait(seconds) => now += Duration::from_secs(seconds),
                    Step::Expire => table.expire(now),
                }
                let ends = model.iter().map(|it| it.2).filter(|end| *end > now).min();
                if let Some(end) = ends {
                    prop_assert!(table.poll_at().is_some_and(|due| due <= end));
                }
                for g in 0..4 {
                    let mut expected: Vec<_> = model
                        .iter()
                        .filter(|(h, _, end)| *h == g && *end > now)
                        .map(|(_, port, _)| *port)
                        .collect();
                    expected.sort_unstable();
                    prop_assert_eq!(members(&table, now, g), expected);
                }
                let counted: usize = table.per_port.values().sum();
                prop_assert_eq!(counted, table.members.len());
            }
        }
    }
}
