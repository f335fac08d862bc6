//! Addresses of pods: which pod of a node has which address of its subnet, or of each of its two.
//!
//! Addresses are given from `.2` and `::2` upward and remembered by the pod's name, so that a pod that comes
//! back finds its old one. When all are used, the one released longest ago is given again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::addresses::{Addresses, Nets};
use crate::{Duration, Instant};

/// A pod's name: up to 63 lower-case letters, digits, `-` and `.`, with a letter or digit at both
/// ends.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
pub struct PodName(String);

/// Text that is not a pod's name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "'{0}' is not a pod name: use up to 63 of a-z, 0-9, '-' and '.', with a letter or digit at \
     both ends"
)]
pub struct InvalidPodName(pub String);

impl PodName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PodName {
    type Err = InvalidPodName;

    fn from_str(text: &str) -> Result<Self, InvalidPodName> {
        let alphanumeric = |byte: Option<&u8>| {
            byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        };
        let bytes = text.as_bytes();
        let valid = bytes.len() <= 63
            && alphanumeric(bytes.first())
            && alphanumeric(bytes.last())
            && bytes
                .iter()
                .all(|byte| alphanumeric(Some(byte)) || matches!(byte, b'-' | b'.'));
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidPodName(text.to_owned()))
        }
    }
}

impl TryFrom<String> for PodName {
    type Error = InvalidPodName;

    fn try_from(text: String) -> Result<Self, InvalidPodName> {
        text.parse()
    }
}

impl From<PodName> for String {
    fn from(name: PodName) -> Self {
        name.0
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a pod cannot have an address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IpamError {
    /// The requested address is outside the node's subnet.
    #[error("the address {0} is not in this node's subnet {1}")]
    OutOfSubnet(IpAddr, IpNet),
    /// The requested address is the base, the gateway's or the broadcast address.
    #[error("the address {0} is the node's own or the broadcast address; pods have {1} and up")]
    Reserved(IpAddr, IpAddr),
    /// The requested address is another pod's.
    #[error("the address {0} is taken by the pod '{1}'")]
    Taken(IpAddr, PodName),
    /// Every address is in use, or was a moment ago.
    #[error("all {0} addresses of the subnet {1} are in use, or were until a moment ago")]
    Full(u128, IpNet),
}

/// How long an address rests before another pod has it: who spoke to the one before may go on for
/// a while.
const REST: Duration = Duration::from_secs(30);

/// Pods that are remembered at most: an IPv6 subnet has addresses for any number of them.
const MAX_REMEMBERED: usize = 1 << 16;

/// What is remembered of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holding {
    address: Addresses,
    /// Order of release; 0 while it is in use.
    released: u64,
    /// When its rest is over.
    rests_until: Instant,
}

impl Holding {
    fn has(&self, address: IpAddr) -> bool {
        self.address.iter::<IpAddr>().any(|own| own == address)
    }
}

/// The addresses of one lease: a pod has one of each of its subnets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressPool {
    subnets: Nets,
    holdings: BTreeMap<PodName, Holding>,
    releases: u64,
    now: Instant,
}

/// What a pool remembers between runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Memory {
    subnet: Nets,
    pods: BTreeMap<PodName, Addresses>,
}

impl Memory {
    /// The addresses of all pods that are remembered.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.pods.values().flat_map(Addresses::iter)
    }
}

/// The addresses of a subnet that pods may have, by their numbers.
#[derive(Debug, Clone, Copy)]
struct Range {
    subnet: IpNet,
    base: u128,
    first: u128,
    last: u128,
}

impl Range {
    /// An IPv4 subnet's last address is for all (RFC 919), that of an IPv6 subnet is one as any other.
    fn new(subnet: IpNet) -> Self {
        let base = number(subnet.network());
        let last = number(subnet.broadcast());
        Self {
            subnet,
            base,
            first: base.saturating_add(2),
            last: match subnet {
                IpNet::V4(_) => last.saturating_sub(1),
                IpNet::V6(_) => last,
            },
        }
    }

    fn len(&self) -> u128 {
        // An IPv6 subnet may be all there is.
        self.last.saturating_add(1).saturating_sub(self.first)
    }

    fn address(&self, number: u128) -> IpAddr {
        match self.subnet {
            // It is one of the subnet, so it has 32 bits.
            IpNet::V4(_) => Ipv4Addr::from(number as u32).into(),
            IpNet::V6(_) => Ipv6Addr::from(number).into(),
        }
    }

    fn check(&self, address: IpAddr) -> Result<(), IpamError> {
        if !self.subnet.contains(&address) {
            return Err(IpamError::OutOfSubnet(address, self.subnet));
        }
        match (self.first..=self.last).contains(&number(address)) {
            true => Ok(()),
            false => Err(IpamError::Reserved(address, self.address(self.first))),
        }
    }
}

/// Whether a pod of a node with these subnets may have an address.
#[must_use]
pub(super) fn is_pods(subnets: Nets, address: IpAddr) -> bool {
    let mut ranges = subnets.iter::<IpNet>().map(Range::new);
    ranges.any(|range| range.check(address).is_ok())
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// Whether both are of one IP version.
fn is_of(subnet: IpNet, address: IpAddr) -> bool {
    subnet.addr().is_ipv4() == address.is_ipv4()
}

/// An address for a pod, and who is forgotten for that.
#[derive(Debug, Clone, Copy)]
struct Choice<'a> {
    address: IpAddr,
    forgotten: Option<&'a PodName>,
}

impl AddressPool {
    /// A pool in which all addresses are free.
    #[must_use]
    pub fn new(subnets: Nets) -> Self {
        Self {
            subnets: subnets.trunc(),
            holdings: BTreeMap::new(),
            releases: 0,
            now: Instant::ZERO,
        }
    }

    /// It is this time now. Without one addresses do not rest.
    pub fn set_time(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// A pool that remembers earlier pods, none of them attached. Of a memory of another subnet,
    /// or one that is no longer consistent, only what still holds is kept.
    #[must_use]
    pub fn with_memory(subnets: Nets, memory: Memory) -> Self {
        let mut pool = Self::new(subnets);
        let mut taken = BTreeSet::new();
        for (name, addresses) in memory.pods {
            let all = addresses.iter::<IpAddr>();
            let valid =
                all.filter(|address| is_pods(pool.subnets, *address) && taken.insert(*address));
            if let Some(address) = Addresses::collect(valid) {
                pool.releases += 1;
                let released = pool.releases;
                pool.hold(name, address, released);
            }
        }
        pool
    }

    /// What to remember until the next run.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let pods = self
            .holdings
            .iter()
            .map(|(name, held)| (name.clone(), held.address));
        Memory {
            subnet: self.subnets,
            pods: pods.collect(),
        }
    }

    /// Gives `name` an address of each subnet: the requested one, else the one it had before, else the
    /// first that nobody had, else the one released longest ago. That of IPv6 has the same number in
    /// its subnet as that of IPv4, if it is free.
    ///
    /// # Errors
    /// `IpamError` if the requested address cannot be had, or none is free; nothing has changed then.
    pub fn allocate(
        &mut self,
        name: &PodName,
        requested: Option<Addresses>,
    ) -> Result<Addresses, IpamError> {
        self.allocate_rested(name, requested, false)
    }

    /// The same for who can wait until an address has rested since another pod had it.
    pub(super) fn allocate_rested(
        &mut self,
        name: &PodName,
        requested: Option<Addresses>,
        has_rested: bool,
    ) -> Result<Addresses, IpamError> {
        let requested: Vec<IpAddr> = requested.iter().flat_map(Addresses::iter).collect();
        self.check_families(&requested)?;
        let held = self.holdings.get(name).map(|held| held.address);
        let held: Vec<IpAddr> = held.iter().flat_map(Addresses::iter).collect();
        let mut choices: Vec<Choice<'_>> = Vec::new();
        let mut alike = None;
        for range in self.ranges() {
            let of = |all: &[IpAddr]| all.iter().copied().find(|it| is_of(range.subnet, *it));
            let forgotten: Vec<_> = choices.iter().filter_map(|it| it.forgotten).collect();
            let choice = match (of(&requested), of(&held)) {
                (Some(address), _) => self.requested(&range, name, address)?,
                (None, Some(address)) => Choice {
                    address,
                    forgotten: None,
                },
                (None, None) => self.free(&range, alike, &forgotten, has_rested)?,
            };
            alike = Some(number(choice.address) - range.base);
            choices.push(choice);
        }
        let addresses = Addresses::collect(choices.iter().map(|it| it.address));
        let forgotten = choices.into_iter().filter_map(|it| it.forgotten.cloned());
        let forgotten: Vec<PodName> = forgotten.collect();
        for name in &forgotten {
            self.holdings.remove(name);
        }
        // There is a subnet, so there is an address.
        let addresses = addresses.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        self.hold(name.clone(), addresses, 0);
        self.forget_some();
        Ok(addresses)
    }

    /// Whether addresses that have rested are free for another pod.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let held = self.holdings.values();
        let taken = held.filter(|held| held.released == 0 || held.rests_until > self.now);
        let taken: Vec<IpAddr> = taken.flat_map(|held| held.address.iter()).collect();
        self.ranges().all(|range| {
            let its = taken.iter().filter(|it| is_of(range.subnet, **it));
            (its.count() as u128) < range.len()
        })
    }

    /// Takes the address back; it stays remembered.
    pub fn release(&mut self, name: &PodName) {
        self.releases += 1;
        if let Some(held) = self.holdings.get_mut(name) {
            held.released = self.releases;
            if self.now > Instant::ZERO {
                held.rests_until = self.now + REST;
            }
        }
    }

    fn ranges(&self) -> impl Iterator<Item = Range> {
        self.subnets.iter().map(Range::new)
    }

    fn hold(&mut self, name: PodName, address: Addresses, released: u64) {
        let holding = Holding {
            address,
            released,
            rests_until: Instant::ZERO,
        };
        self.holdings.insert(name, holding);
    }

    /// Whether there is a subnet for each of these.
    fn check_families(&self, requested: &[IpAddr]) -> Result<(), IpamError> {
        let lacks = |address: &&IpAddr| !self.ranges().any(|it| is_of(it.subnet, **address));
        match (requested.iter().find(lacks), self.ranges().next()) {
            (Some(address), Some(range)) => Err(IpamError::OutOfSubnet(*address, range.subnet)),
            _ => Ok(()),
        }
    }

    fn requested(
        &self,
        range: &Range,
        name: &PodName,
        address: IpAddr,
    ) -> Result<Choice<'_>, IpamError> {
        range.check(address)?;
        let mut all = self.holdings.iter();
        let forgotten = match all.find(|(holder, held)| *holder != name && held.has(address)) {
            Some((holder, held)) if held.released == 0 => {
                return Err(IpamError::Taken(address, holder.clone()));
            }
            holder => holder.map(|(holder, _)| holder),
        };
        Ok(Choice { address, forgotten })
    }

    /// An address that nobody has but perhaps who is forgotten anyway: `alike` from the base if that
    /// is one, else the first.
    fn free(
        &self,
        range: &Range,
        alike: Option<u128>,
        forgotten: &[&PodName],
        has_rested: bool,
    ) -> Result<Choice<'_>, IpamError> {
        let held = self.holdings.iter();
        let held = held.filter(|(name, _)| !forgotten.contains(name));
        let mut taken: Vec<u128> = held
            .flat_map(|(_, held)| held.address.iter::<IpAddr>())
            .filter(|address| is_of(range.subnet, *address))
            .map(number)
            .collect();
        taken.sort_unstable();
        let alike = alike.and_then(|number| range.base.checked_add(number));
        let mut candidate = match alike.filter(|it| (range.first..=range.last).contains(it)) {
            Some(alike) if taken.binary_search(&alike).is_err() => alike,
            _ => range.first,
        };
        // The first gap in the sorted list: as many steps as there are pods, not addresses.
        for number in taken {
            if number == candidate {
                candidate = candidate.saturating_add(1);
            }
        }
        if candidate <= range.last {
            let address = range.address(candidate);
            return Ok(Choice {
                address,
                forgotten: None,
            });
        }
        let released = self.holdings.iter().filter(|(_, held)| held.released > 0);
        let oldest = released.filter(|(_, held)| !has_rested || held.rests_until <= self.now);
        let its_address = |held: &Holding| {
            let mut all = held.address.iter::<IpAddr>();
            all.find(|address| is_of(range.subnet, *address))
        };
        let with_address = oldest.filter_map(|(name, held)| Some((name, held, its_address(held)?)));
        let oldest = with_address.min_by_key(|(_, held, _)| held.released);
        let full = || IpamError::Full(range.len(), range.subnet);
        let (name, _, address) = oldest.ok_or_else(full)?;
        Ok(Choice {
            address,
            forgotten: Some(name),
        })
    }

    /// Forgets the pod that was released longest ago, if there are too many.
    fn forget_some(&mut self) {
        if self.holdings.len() <= MAX_REMEMBERED {
            return;
        }
        let released = self.holdings.iter().filter(|(_, held)| held.released > 0);
        let oldest = released.min_by_key(|(_, held)| held.released);
        if let Some(name) = oldest.map(|(name, _)| name.clone()) {
            self.holdings.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(subnet: &str) -> AddressPool {
        AddressPool::new(nets(subnet))
    }

    fn nets(subnet: &str) -> Nets {
        subnet.parse().unwrap()
    }

    fn name(text: &str) -> PodName {
        text.parse().unwrap()
    }

    fn ip(last: u8) -> IpAddr {
        [10, 244, 1, last].into()
    }

    fn address(last: u8) -> Addresses {
        ip(last).into()
    }

    #[test]
    fn names_are_the_text_that_they_were() {
        assert_eq!(name("web-1.a").as_str(), "web-1.a");
        assert_eq!(name("web-1.a").to_string(), "web-1.a");
    }

    #[test]
    fn addresses_are_given_upward_and_stick_to_names() {
        let mut pool = pool("10.244.1.0/24");
        assert_eq!(pool.allocate(&name("a"), None), Ok(address(2)));
        assert_eq!(pool.allocate(&name("b"), None), Ok(address(3)));
        pool.release(&name("a"));
        assert_eq!(pool.allocate(&name("c"), None), Ok(address(4)));
        assert_eq!(pool.allocate(&name("a"), None), Ok(address(2)));
    }

    #[test]
    fn a_request_is_granted_or_refused_with_the_reason() {
        let mut pool = pool("10.244.1.0/24");
        let (a, b) = (name("a"), name("b"));
        assert_eq!(pool.allocate(&a, Some(address(9))), Ok(address(9)));
        assert_eq!(
            pool.allocate(&b, Some(address(9))),
            Err(IpamError::Taken(ip(9), a.clone()))
        );
        for own in [0, 1, 255] {
            assert!(matches!(
                pool.allocate(&b, Some(address(own))),
                Err(IpamError::Reserved(_, first)) if first == ip(2)
            ));
        }
        for outside in ["10.244.2.9", "fd00::9", "10.244.1.9,fd00::9"] {
            let refused = pool.allocate(&b, Some(outside.parse().unwrap()));
            assert!(matches!(refused, Err(IpamError::OutOfSubnet(..))));
        }
        pool.release(&a);
        assert_eq!(pool.allocate(&b, Some(address(9))), Ok(address(9)));
        assert_eq!(
            pool.allocate(&a, None),
            Ok(address(2)),
            "its old one is another's now"
        );
    }

    #[test]
    fn a_full_pool_reuses_what_was_released_longest_ago() {
        let mut pool = pool("10.244.1.0/29");
        let names: Vec<_> = (0..6).map(|i| name(&format!("p{i}"))).collect();
        for pod in &names[..5] {
            pool.allocate(pod, None).unwrap();
        }
        assert!(matches!(
            pool.allocate(&names[5], None),
            Err(IpamError::Full(5, _))
        ));
        pool.release(&names[3]);
        pool.release(&names[1]);
        assert_eq!(pool.allocate(&names[5], None), Ok(address(5)));
    }

    #[test]
    fn an_address_rests_before_another_pod_has_it() {
        let mut pool = pool("10.244.1.0/29");
        let names: Vec<_> = (0..6).map(|i| name(&format!("p{i}"))).collect();
        let time = |seconds: i64| Instant::from_secs(seconds);
        pool.set_time(time(100));
        for pod in &names[..5] {
            pool.allocate(pod, None).unwrap();
        }
        pool.release(&names[1]);
        assert!(!pool.has_room());
        let full = pool.allocate_rested(&names[5], None, true);
        assert!(matches!(full, Err(IpamError::Full(5, _))));
        // Its own pod has it at once, and whoever asks for it.
        assert_eq!(pool.allocate(&names[1], None), Ok(address(3)));
        pool.release(&names[1]);
        pool.set_time(time(129));
        assert!(pool.allocate_rested(&names[5], None, true).is_err());
        pool.set_time(time(130));
        assert!(pool.has_room());
        let given = pool.allocate_rested(&names[5], None, true);
        assert_eq!(given, Ok(address(3)));
        // Who cannot wait has it at once.
        pool.release(&names[5]);
        assert_eq!(pool.allocate(&name("p6"), None), Ok(address(3)));
    }

    #[test]
    fn memory_survives_as_far_as_it_is_consistent() {
        let mut pool = pool("10.244.1.0/24");
        pool.allocate(&name("a"), Some(address(7))).unwrap();
        let text = serde_json::to_string(&pool.memory()).unwrap();
        let again = |subnet: &str, text: &str| {
            let memory = serde_json::from_str(text).unwrap();
            AddressPool::with_memory(nets(subnet), memory).allocate(&name("a"), None)
        };
        assert_eq!(again("10.244.1.0/24", &text), Ok(address(7)));
        assert_eq!(
            again("10.244.2.0/24", &text),
            Ok(Ipv4Addr::new(10, 244, 2, 2).into())
        );
        let reserved = text.replace("10.244.1.7", "10.244.1.1");
        assert_eq!(again("10.244.1.0/24", &reserved), Ok(address(2)));
        let memory = serde_json::from_str(&text).unwrap();
        let mut remembering = AddressPool::with_memory(nets("10.244.1.0/24"), memory);
        let another = remembering.allocate(&name("b"), Some(address(7)));
        assert_eq!(another, Ok(address(7)), "nobody has it now");
        let bad_name = text.replace("\"a\"", "\"A\"");
        assert!(serde_json::from_str::<Memory>(&bad_name).is_err());
    }

    fn dual() -> AddressPool {
        pool("10.244.1.0/29,fd00:0:0:7::/64")
    }

    fn both(text: &str) -> Addresses {
        text.parse().unwrap()
    }

    #[test]
    fn a_pod_has_an_address_of_each_subnet_with_the_same_number() {
        let mut pool = dual();
        let mut give = |pod: &str, requested: &str| {
            let given = pool.allocate(&name(pod), requested.parse().ok());
            given.map(|it| it.to_string())
        };
        assert_eq!(give("a", ""), Ok("10.244.1.2,fd00:0:0:7::2".to_owned()));
        let asked = "fd00:0:0:7::4";
        assert_eq!(give("b", asked), Ok(format!("10.244.1.3,{asked}")));
        // Another has that of the same number, so it is the first free one.
        assert_eq!(give("c", ""), Ok("10.244.1.4,fd00:0:0:7::3".to_owned()));
        let pair = "10.244.1.6,fd00::7:1:2:3:4";
        assert_eq!(give("d", pair), Ok(pair.to_owned()));
        for (refused, why) in [
            ("fd00:0:0:7::", "the node's own"),
            ("fd00:0:0:7::1", "pods have fd00:0:0:7::2 and up"),
            ("fd00:0:0:8::2", "not in this node's subnet fd00:0:0:7::/64"),
            ("fd00:0:0:7::3", "taken by the pod 'c'"),
            ("10.244.1.5,fd00:0:0:7::3", "taken by the pod 'c'"),
        ] {
            let error = give("e", refused).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert_eq!(give("e", ""), Ok("10.244.1.5,fd00:0:0:7::5".to_owned()));
    }

    #[test]
    fn a_subnet_of_ipv6_alone_has_the_same_rules() {
        let mut pool = pool("fd00::/126");
        let give = |pool: &mut AddressPool, pod| pool.allocate(&name(pod), None);
        assert_eq!(give(&mut pool, "a"), Ok(both("fd00::2")));
        assert_eq!(give(&mut pool, "b"), Ok(both("fd00::3")), "none is for all");
        assert!(matches!(give(&mut pool, "c"), Err(IpamError::Full(2, _))));
        assert!(!pool.has_room());
        pool.release(&name("b"));
        assert!(pool.has_room());
        assert_eq!(give(&mut pool, "c"), Ok(both("fd00::3")));
        let refused = pool.allocate(&name("d"), Some(address(2)));
        assert!(matches!(refused, Err(IpamError::OutOfSubnet(..))));
    }

    #[test]
    fn who_is_forgotten_for_one_address_is_for_the_other() {
        let mut pool = dual();
        let names: Vec<_> = (0..6).map(|i| name(&format!("p{i}"))).collect();
        for pod in &names[..5] {
            pool.allocate(pod, None).unwrap();
        }
        pool.release(&names[2]);
        let given = pool.allocate(&names[5], None);
        assert_eq!(given, Ok(both("10.244.1.4,fd00:0:0:7::4")));
        assert!(matches!(
            pool.allocate(&names[2], None),
            Err(IpamError::Full(5, IpNet::V4(_)))
        ));
    }

    #[test]
    fn of_a_memory_of_other_subnets_what_still_holds_is_kept() {
        let mut pool = dual();
        let asked = both("10.244.1.5,fd00:0:0:7::9");
        pool.allocate(&name("a"), Some(asked)).unwrap();
        let again = |subnets: &str| {
            let mut pool = AddressPool::with_memory(nets(subnets), pool.memory());
            pool.allocate(&name("a"), None).unwrap().to_string()
        };
        assert_eq!(again("10.244.1.0/29,fd00:0:0:7::/64"), asked.to_string());
        assert_eq!(again("10.244.1.0/24"), "10.244.1.5");
        assert_eq!(again("fd00:0:0:7::/64"), "fd00:0:0:7::9");
        assert_eq!(
            again("10.9.9.0/24,fd00:0:0:7::/64"),
            "10.9.9.2,fd00:0:0:7::9"
        );
        // One of a node that had IPv4 only.
        let old = r#"{"subnet":"10.244.1.0/24","pods":{"a":"10.244.1.7"}}"#;
        let memory = serde_json::from_str(old).unwrap();
        let mut pool = AddressPool::with_memory(nets("10.244.1.0/24,fd00::/64"), memory);
        let given = pool.allocate(&name("a"), None);
        assert_eq!(given, Ok(both("10.244.1.7,fd00::7")));
    }

    #[test]
    fn not_all_pods_are_remembered_for_ever() {
        let mut pool = pool("fd00::/64");
        for number in 0..=MAX_REMEMBERED {
            pool.hold(
                name(&format!("p{number}")),
                Ipv6Addr::from(number as u128).into(),
                1 + number as u64,
            );
        }
        pool.allocate(&name("new"), None).unwrap();
        assert!(!pool.holdings.contains_key(&name("p0")));
        assert!(pool.holdings.contains_key(&name("p1")));
    }

    #[test]
    fn names_are_dns_labels() {
        let longest = "a".repeat(63);
        for good in ["a", "web-1", "x.y", "0", &longest] {
            assert!(good.parse::<PodName>().is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", "../a", "ä", &long] {
            assert_eq!(bad.parse::<PodName>(), Err(InvalidPodName(bad.to_owned())));
        }
    }

    proptest! {
        #[test]
        fn no_two_attached_pods_share_an_address(
            steps in proptest::collection::vec((0u8..12, any::<Option<u8>>(), any::<bool>()), 0..80),
        ) {
            let mut pool = pool("10.244.1.0/28");
            let mut attached: BTreeMap<PodName, Addresses> = BTreeMap::new();
            for (pod, request, attach) in steps {
                let pod = name(&format!("p{pod}"));
                if !attach {
                    pool.release(&pod);
                    attached.remove(&pod);
                } else if !attached.contains_key(&pod) {
                    let request = request.map(|last| address(last % 18));
                    match pool.allocate(&pod, request) {
                        Ok(given) => {
                            prop_assert!((2..15).contains(&given.ipv4().unwrap().octets()[3]));
                            prop_assert!(request.is_none_or(|request| request == given));
                            prop_assert!(!attached.values().any(|other| *other == given));
                            attached.insert(pod, given);
                        }
                        Err(IpamError::Taken(address, by)) => {
                            prop_assert_eq!(attached.get(&by), Some(&address.into()));
                        }
                        Err(IpamError::Full(..)) => prop_assert_eq!(attached.len(), 13),
                        Err(IpamError::Reserved(..) | IpamError::OutOfSubnet(..)) => {
                            prop_assert!(request.is_some());
                        }
                    }
                }
            }
        }
    }
}
