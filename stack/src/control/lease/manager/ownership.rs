//! Whose record is it?
//!
//! flannel goes by the public address alone. Here a VXLAN record with our VTEP's MAC address, or a WireGuard
//! record with our public key, is ours too where we had its subnet before: a node that comes back with another public address moves its
//! record and keeps its subnet. Two nodes with one state directory, each alive, have the same claim
//! then. The one that held the record writes it again, and the one that had moved it gives way for
//! good: a node that is alive keeps what its pods use, and the copy ends with a message, whichever of
//! the two came later.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::tunnel::vxlan::VtepMac;
use smoltcp::time::{Duration, Instant};

use super::own::OwnEntry;
use crate::control::lease::key::SubnetKey;
use crate::control::lease::record::{LeaseRecord, TunnelEnd};
use crate::control::lease::settings::Identity;

/// How often our record is written again after others changed it, before there is no point in it.
pub(super) const MAX_DISPUTES: u32 = 10;
/// After so many challenges in a row the delay before the next answer grows no more.
const MAX_CHALLENGE_DELAY: u32 = 4;
/// Disputes that are further apart than this have nothing to do with each other.
pub(super) const DISPUTE_MEMORY: Duration = Duration::from_secs(600);

/// Who we are and were, and how often others had a say in it.
#[derive(Debug)]
pub(super) struct Ownership {
    pub(super) identity: Identity,
    /// The subnet of an earlier run.
    previous: Option<Ipv4Net>,
    /// The IPv6 subnet of an earlier run.
    previous_ipv6: Option<Ipv6Net>,
    /// The public address before the last change at run time.
    former: Option<Ipv4Addr>,
    /// The same for IPv6.
    former_ipv6: Option<Ipv6Addr>,
    /// The public address from which our record was moved at the start.
    moved_from: Option<IpAddr>,
    disputes: u32,
    /// How often a node with our identity took our record.
    challenges: u32,
    disputed: Option<Instant>,
}

/// What a record of ours that others have written asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contest {
    /// It is written again, after the delay of so many attempts.
    WriteAgain(u32),
    /// Others write it again and again, and always will.
    Hopeless,
    /// A node with our identity is alive, and had the record before us.
    Cloned,
}

/// How a record that we go on with came to be ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TakeOver {
    /// It is moved here from another public address.
    Moved {
        /// That address.
        from: IpAddr,
    },
    /// It has our public address, but is of another tunnel's end.
    Replaced {
        /// What that is known by.
        end: TunnelEnd,
    },
}

impl Ownership {
    pub(super) fn new(identity: Identity, previous: Option<Ipv4Net>) -> Self {
        Self {
            identity,
            previous: previous.map(|previous| previous.trunc()),
            previous_ipv6: None,
            former: None,
            former_ipv6: None,
            moved_from: None,
            disputes: 0,
            challenges: 0,
            disputed: None,
        }
    }

    /// The subnet of an earlier run.
    pub(super) fn previous(&self) -> Option<Ipv4Net> {
        self.previous
    }

    /// The same with the IPv6 subnet of an earlier run.
    pub(super) fn with_previous_ipv6(self, previous: Option<Ipv6Net>) -> Self {
        Self {
            previous_ipv6: previous.map(|previous| previous.trunc()),
            ..self
        }
    }

    /// The IPv6 subnet of an earlier run.
    pub(super) fn previous_ipv6(&self) -> Option<Ipv6Net> {
        self.previous_ipv6
    }

    /// We were never in this store, and have another VTEP there.
    pub(super) fn begin_anew(&mut self, vtep_mac: VtepMac) {
        self.identity.vtep_mac = vtep_mac;
        (self.previous, self.previous_ipv6) = (None, None);
    }

    /// Our public address is this one now; whether that is another.
    pub(super) fn set_public_ip(&mut self, public_ip: Ipv4Addr) -> bool {
        let old = std::mem::replace(&mut self.identity.public_ip, public_ip);
        if old == public_ip {
            return false;
        }
        self.former = Some(old);
        true
    }

    /// Our public IPv6 address is this one now, or there is none; whether that is another.
    pub(super) fn set_public_ipv6(&mut self, public_ipv6: Option<Ipv6Addr>) -> bool {
        let old = std::mem::replace(&mut self.identity.public_ipv6, public_ipv6);
        if old == public_ipv6 {
            return false;
        }
        self.former_ipv6 = old;
        true
    }

    /// The address that tells us from other nodes.
    pub(super) fn address(&self, is_ipv6_only: bool) -> IpAddr {
        match self.identity.public_ipv6 {
            Some(ipv6) if is_ipv6_only => ipv6.into(),
            _ => self.identity.public_ip.into(),
        }
    }

    /// Whether a record has our public address; that of IPv6 where it has no other.
    pub(super) fn has_our_address(&self, record: &LeaseRecord) -> bool {
        match record.node_address() {
            IpAddr::V4(address) => address == self.identity.public_ip && !address.is_unspecified(),
            IpAddr::V6(address) => Some(address) == self.identity.public_ipv6,
        }
    }

    /// Whether a record is ours: under our public address, or of our tunnel's end for the subnet
    /// that we have (`held`) or had, or under the address that we had; or it is of the subnet that we
    /// had, under our public address of IPv6: without a tunnel there is no end to know it by.
    pub(super) fn is_ours(
        &self,
        held: Option<SubnetKey>,
        key: SubnetKey,
        record: &LeaseRecord,
    ) -> bool {
        if self.has_our_address(record) {
            return true;
        }
        let is_of_our_end = self.is_of_our_end(record);
        match held {
            // The old address is still in what we wrote, whatever the backend.
            Some(held) if held == key => self.is_former(record) || is_of_our_end,
            Some(_) => false,
            None if is_of_our_end => self.is_previous(key) || self.is_former(record),
            None => self.has_our_ipv6(record) && self.is_previous(key),
        }
    }

    fn has_our_ipv6(&self, record: &LeaseRecord) -> bool {
        let own = self.identity.public_ipv6;
        own.is_some() && record.public_ipv6 == own
    }

    /// Whether a record has our public address, or the one that we had: not that of another node with
    /// our identity.
    pub(super) fn is_at_our_address(&self, record: &LeaseRecord) -> bool {
        self.has_our_address(record) || self.is_former(record)
    }

    /// The record to go on with: that of the subnet that our pods have, else one of our tunnel's end, else
    /// the first, as flannel does.
    pub(super) fn preferred_record<'a>(&self, own: &'a [OwnEntry]) -> Option<&'a OwnEntry> {
        own.iter().min_by_key(|(key, _, record)| {
            (!self.is_previous(*key), self.foreign_end(record).is_some())
        })
    }

    /// Notes that we go on with a record; how it came to be ours, if it is not simply our own and that
    /// was not said yet.
    pub(super) fn take_over(&mut self, key: SubnetKey, record: &LeaseRecord) -> Option<TakeOver> {
        let from = record.node_address();
        if !self.has_our_address(record) {
            let is_news = self.moved_from.replace(from) != Some(from);
            return is_news.then_some(TakeOver::Moved { from });
        }
        let end = self.foreign_end(record)?;
        (!self.is_previous(key)).then_some(TakeOver::Replaced { end })
    }

    /// Our record is another one than we wrote, under our address or by our VTEP.
    pub(super) fn on_own_rewritten(&mut self, now: Instant, record: &LeaseRecord) -> Contest {
        if self.is_at_our_address(record) {
            return self.dispute(now);
        }
        if self.moved_from == Some(record.node_address()) {
            // We moved it here because nobody seemed to have it, and its holder writes it again.
            return Contest::Cloned;
        }
        // A copy of us gives way when it sees our record again, and may be started again and again.
        self.note_dispute(now);
        self.challenges = self.challenges.saturating_add(1);
        Contest::WriteAgain(self.challenges.min(MAX_CHALLENGE_DELAY))
    }

    /// Our record is not what we wrote, and nobody else's either.
    pub(super) fn dispute(&mut self, now: Instant) -> Contest {
        self.note_dispute(now);
        self.disputes += 1;
        if self.disputes > MAX_DISPUTES {
            return Contest::Hopeless;
        }
        Contest::WriteAgain(self.disputes)
    }

    fn note_dispute(&mut self, now: Instant) {
        let is_recent = |disputed: Instant| now < disputed + DISPUTE_MEMORY;
        if !self.disputed.replace(now).is_some_and(is_recent) {
            (self.disputes, self.challenges) = (0, 0);
        }
    }

    fn is_previous(&self, key: SubnetKey) -> bool {
        match key.ipv4() {
            Some(ipv4) => self.previous == Some(ipv4),
            None => key.ipv6().is_some() && self.previous_ipv6 == key.ipv6(),
        }
    }

    fn is_former(&self, record: &LeaseRecord) -> bool {
        match record.node_address() {
            IpAddr::V4(address) => Some(address) == self.former,
            IpAddr::V6(address) => Some(address) == self.former_ipv6,
        }
    }

    fn is_of_our_end(&self, record: &LeaseRecord) -> bool {
        record.end().is_some() && self.foreign_end(record).is_none()
    }

    /// What the end of a record's tunnel is known by, if it is not ours.
    fn foreign_end(&self, record: &LeaseRecord) -> Option<TunnelEnd> {
        let vtep_mac = match record.vtep_mac() {
            Some(_) => self.identity.vtep_mac,
            None => self.identity.vtep_mac_v6(),
        };
        record.end().filter(|end| match end {
            TunnelEnd::Vtep(mac) => *mac != vtep_mac,
            TunnelEnd::Key(key) => Some(*key) != self.identity.public_key,
        })
    }
}

#[cfg(test)]
mod tests {
    use muslin_encap::tunnel::vxlan::Vni;
    use muslin_encap::tunnel::wireguard::PublicKey;

    use super::*;
    use crate::control::lease::{Backend, Entry, WireGuardOptions};

    const NOW: Instant = Instant::from_micros_const(1_000_000_000);

    fn ip(last: u8) -> Ipv4Addr {
        [192, 168, 0, last].into()
    }

    fn mac(number: u8) -> VtepMac {
        VtepMac::from_random([number; 6])
    }

    fn record(at: u8, vtep: u8) -> LeaseRecord {
        LeaseRecord::vxlan(ip(at), Vni::new(1).unwrap(), mac(vtep))
    }

    fn key(third: u8) -> SubnetKey {
        format!("10.244.{third}.0-24").parse().unwrap()
    }

    /// The node at 192.168.0.1 with the VTEP 1, which had 10.244.1.0/24.
    fn ownership() -> Ownership {
        let identity = Identity {
            public_ip: ip(1),
            public_ipv6: None,
            vtep_mac: mac(1),
            public_key: None,
        };
        Ownership::new(identity, Some("10.244.1.0/24".parse().unwrap()))
    }

    #[test]
    fn an_address_is_an_identity_and_a_vtep_only_where_we_were() {
        let own = ownership();
        let is_ours = |held, key, record| own.is_ours(held, key, &record);
        assert!(is_ours(None, key(9), record(1, 9)));
        assert!(is_ours(None, key(1), record(2, 1)), "the subnet we had");
        assert!(!is_ours(None, key(2), record(2, 1)));
        assert!(!is_ours(None, key(1), record(2, 2)));
        assert!(is_ours(Some(key(2)), key(2), record(2, 1)));
        assert!(!is_ours(Some(key(2)), key(1), record(2, 1)));
    }

    #[test]
    fn what_has_the_address_that_we_had_is_ours_where_we_hold_it() {
        let mut own = ownership();
        assert!(!own.set_public_ip(ip(1)));
        assert!(own.set_public_ip(ip(5)));
        assert!(own.is_ours(Some(key(2)), key(2), &record(1, 9)));
        assert!(own.is_ours(None, key(2), &record(1, 1)));
        assert!(!own.is_ours(None, key(2), &record(1, 9)));
        assert!(own.is_at_our_address(&record(1, 9)));
        assert!(!own.is_at_our_address(&record(2, 1)));
    }

    #[test]
    fn a_public_key_is_an_identity_as_a_vtep_is() {
        let key_of = |byte| PublicKey([byte; 32]);
        let backend = Backend::WireGuard(WireGuardOptions::default());
        let of = |at, byte| LeaseRecord::of(&backend, ip(at), key_of(byte));
        let mut own = ownership();
        own.identity.public_key = Some(key_of(1));
        let is_ours = |held, key, record| own.is_ours(held, key, &record);
        assert!(is_ours(None, key(1), of(2, 1)), "the subnet we had");
        assert!(!is_ours(None, key(1), of(2, 2)));
        assert!(!is_ours(None, key(2), of(2, 1)));
        assert!(is_ours(Some(key(2)), key(2), of(2, 1)));
        // flannel makes another key at each boot.
        let end = key_of(9).into();
        let replaced = Some(TakeOver::Replaced { end });
        assert_eq!(own.take_over(key(2), &of(1, 9)), replaced);
        assert_eq!(own.take_over(key(2), &of(1, 1)), None);
    }

    #[test]
    fn what_has_our_ipv6_address_is_ours_where_we_were() {
        let ipv6 = |last: u16| [0xfd01, 0, 0, 0, 0, 0, 0, last].into();
        let host_gw = |at: Ipv4Addr, last| {
            LeaseRecord::of(&Backend::HostGw, at, mac(9)).with_ipv6(
                &Backend::HostGw,
                ipv6(last),
                mac(9),
            )
        };
        let mut own = ownership();
        assert!(!own.is_ours(None, key(1), &host_gw(ip(2), 1)));
        own.set_public_ipv6(Some(ipv6(1)));
        assert!(own.is_ours(None, key(1), &host_gw(ip(2), 1)));
        assert!(!own.is_ours(None, key(1), &host_gw(ip(2), 2)));
        assert!(!own.is_ours(None, key(2), &host_gw(ip(2), 1)));
        // Who has no address of IPv4 has nothing in common with others that have none.
        own.set_public_ip(Ipv4Addr::UNSPECIFIED);
        assert!(!own.has_our_address(&LeaseRecord::udp(Ipv4Addr::UNSPECIFIED)));
        assert!(own.has_our_address(&host_gw(Ipv4Addr::UNSPECIFIED, 1)));
        assert!(!own.has_our_address(&host_gw(Ipv4Addr::UNSPECIFIED, 2)));
    }

    #[test]
    fn the_subnet_that_pods_have_is_preferred_then_our_vteps() {
        let own = ownership();
        let entry = |key: SubnetKey, record| {
            let entry = Entry {
                key: key.to_string(),
                value: String::new(),
                revision: 1,
                created: 0,
                ttl: None,
            };
            (key, entry, record)
        };
        let all = [
            entry(key(3), record(1, 9)),
            entry(key(4), record(1, 1)),
            entry(key(1), record(1, 9)),
        ];
        let preferred = |all: &[OwnEntry]| own.preferred_record(all).map(|(key, ..)| *key);
        assert_eq!(preferred(&all), Some(key(1)));
        assert_eq!(preferred(&all[..2]), Some(key(4)));
        assert_eq!(preferred(&all[..1]), Some(key(3)));
        assert_eq!(preferred(&[]), None);
    }

    #[test]
    fn who_is_taken_over_from_is_said_once() {
        let mut own = ownership();
        let moved = Some(TakeOver::Moved { from: ip(2).into() });
        assert_eq!(own.take_over(key(1), &record(2, 1)), moved);
        assert_eq!(own.take_over(key(1), &record(2, 1)), None);
        let replaced = Some(TakeOver::Replaced { end: mac(9).into() });
        assert_eq!(own.take_over(key(2), &record(1, 9)), replaced);
        assert_eq!(own.take_over(key(1), &record(1, 9)), None, "an own subnet");
        assert_eq!(own.take_over(key(2), &record(1, 1)), None);
    }

    #[test]
    fn a_writer_who_does_not_give_way_is_not_fought_for_ever() {
        let mut own = ownership();
        for attempt in 1..=10 {
            let contest = own.on_own_rewritten(NOW, &record(1, 9));
            assert_eq!(contest, Contest::WriteAgain(attempt));
        }
        assert_eq!(own.dispute(NOW), Contest::Hopeless);
        let later = NOW + DISPUTE_MEMORY;
        assert_eq!(own.dispute(later), Contest::WriteAgain(1), "another one");
    }

    #[test]
    fn the_copy_gives_way_and_the_original_does_not() {
        let mut original = ownership();
        for attempt in [1, 2, 3, 4, 4, 4] {
            let contest = original.on_own_rewritten(NOW, &record(2, 1));
            assert_eq!(contest, Contest::WriteAgain(attempt));
        }
        let mut copy = ownership();
        copy.take_over(key(1), &record(2, 1));
        assert_eq!(copy.on_own_rewritten(NOW, &record(2, 1)), Contest::Cloned);
    }

    #[test]
    fn in_another_store_nothing_is_remembered() {
        let mut own = ownership();
        own.begin_anew(mac(7));
        assert!(!own.is_ours(None, key(1), &record(2, 1)));
        assert_eq!(own.previous(), None);
        assert_eq!(own.identity.vtep_mac, mac(7));
    }
}
