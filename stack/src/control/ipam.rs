//! Addresses of pods: which pod of a node has which address of its subnet.
//!
//! Addresses are given from `.2` upward and remembered by the pod's name, so that a pod that comes
//! back finds its old one. When all are used, the one released longest ago is given again.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::addresses::Addresses;
use crate::control::lease::SubnetKey;
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
    Full(u32, IpNet),
}

/// How long an address rests before another pod has it: who spoke to the one before may go on for
/// a while.
const REST: Duration = Duration::from_secs(30);

/// What is remembered of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holding {
    address: Ipv4Addr,
    /// Order of release; 0 while it is in use.
    released: u64,
    /// When its rest is over.
    rests_until: Instant,
}

/// The addresses of one lease: those of its IPv4 subnet. None of IPv6 are given yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressPool {
    subnet: Ipv4Net,
    holdings: BTreeMap<PodName, Holding>,
    releases: u64,
    now: Instant,
}

/// What a pool remembers between runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Memory {
    subnet: Ipv4Net,
    pods: BTreeMap<PodName, Ipv4Addr>,
}

impl Memory {
    /// The addresses of all pods that are remembered.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.pods.values().copied().map(IpAddr::V4)
    }
}

impl AddressPool {
    /// A pool in which all addresses are free.
    #[must_use]
    pub fn new(lease: SubnetKey) -> Self {
        Self {
            subnet: lease.ipv4.trunc(),
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
    pub fn with_memory(lease: SubnetKey, memory: Memory) -> Self {
        let mut pool = Self::new(lease);
        for (name, address) in memory.pods {
            if pool.check(address).is_ok() && pool.holder(address).is_none() {
                pool.releases += 1;
                pool.holdings.insert(
                    name,
                    Holding {
                        address,
                        released: pool.releases,
                        rests_until: Instant::ZERO,
                    },
                );
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
            subnet: self.subnet,
            pods: pods.collect(),
        }
    }

    /// Gives `name` an address: the requested one, else the one it had before, else the first that
    /// nobody had, else the one released longest ago.
    ///
    /// # Errors
    /// `IpamError` if the requested address cannot be had, or none is free.
    pub fn allocate(
        &mut self,
        name: &PodName,
        requested: Option<Addresses>,
    ) -> Result<Addresses, IpamError> {
        self.allocate_ipv4(name, requested, false)
            .map(Addresses::from)
    }

    /// The same for callers that make more of the address. It must have rested since another pod had
    /// it, if they can wait for that.
    pub(super) fn allocate_ipv4(
        &mut self,
        name: &PodName,
        requested: Option<Addresses>,
        has_rested: bool,
    ) -> Result<Ipv4Addr, IpamError> {
        if let Some(address) = requested.and_then(|requested| requested.ipv6()) {
            return Err(IpamError::OutOfSubnet(address.into(), self.subnet.into()));
        }
        let requested = requested.and_then(|requested| requested.ipv4());
        let address = match (requested, self.holdings.get(name)) {
            (Some(address), _) => {
                self.check(address)?;
                if let Some((holder, held)) = self.holder(address)
                    && holder != name
                {
                    if held.released == 0 {
                        return Err(IpamError::Taken(address.into(), holder.clone()));
                    }
                    let holder = holder.clone();
                    self.holdings.remove(&holder);
                }
                address
            }
            (None, Some(held)) => held.address,
            (None, None) => self.free(has_rested)?,
        };
        self.holdings.insert(
            name.clone(),
            Holding {
                address,
                released: 0,
                rests_until: Instant::ZERO,
            },
        );
        Ok(address)
    }

    /// Whether an address that has rested is free for another pod.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let (first, last) = self.bounds();
        let held = self.holdings.values();
        let taken = held.filter(|held| held.released == 0 || held.rests_until > self.now);
        taken.count() < (u64::from(last) + 1).saturating_sub(first.into()) as usize
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

    fn check(&self, address: Ipv4Addr) -> Result<(), IpamError> {
        if !self.subnet.contains(&address) {
            return Err(IpamError::OutOfSubnet(address.into(), self.subnet.into()));
        }
        let (first, last) = self.bounds();
        if (first..=last).contains(&u32::from(address)) {
            Ok(())
        } else {
            let first = Ipv4Addr::from(first);
            Err(IpamError::Reserved(address.into(), first.into()))
        }
    }

    /// The first and last address for pods, in host order.
    fn bounds(&self) -> (u32, u32) {
        let base = u32::from(self.subnet.network());
        (
            base.saturating_add(2),
            u32::from(self.subnet.broadcast()).saturating_sub(1),
        )
    }

    fn holder(&self, address: Ipv4Addr) -> Option<(&PodName, &Holding)> {
        self.holdings
            .iter()
            .find(|(_, held)| held.address == address)
    }

    fn free(&mut self, has_rested: bool) -> Result<Ipv4Addr, IpamError> {
        let (first, last) = self.bounds();
        let mut held: Vec<u32> = self
            .holdings
            .values()
            .map(|held| held.address.into())
            .collect();
        held.sort_unstable();
        // The first gap in the sorted list: as many steps as there are pods, not addresses.
        let mut candidate = first;
        for address in held {
            if address == candidate {
                candidate += 1;
            }
        }
        if candidate <= last {
            return Ok(candidate.into());
        }
        let released = self.holdings.iter().filter(|(_, held)| held.released > 0);
        let oldest = released.filter(|(_, held)| !has_rested || held.rests_until <= self.now);
        let oldest = oldest.min_by_key(|(_, held)| held.released);
        let Some((name, address)) = oldest.map(|(name, held)| (name.clone(), held.address)) else {
            let all = last.saturating_sub(first) + 1;
            return Err(IpamError::Full(all, self.subnet.into()));
        };
        self.holdings.remove(&name);
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(subnet: &str) -> AddressPool {
        AddressPool::new(lease(subnet))
    }

    fn lease(subnet: &str) -> SubnetKey {
        SubnetKey::new(subnet.parse().unwrap())
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
        let full = pool.allocate_ipv4(&names[5], None, true);
        assert!(matches!(full, Err(IpamError::Full(5, _))));
        // Its own pod has it at once, and whoever asks for it.
        assert_eq!(pool.allocate(&names[1], None), Ok(address(3)));
        pool.release(&names[1]);
        pool.set_time(time(129));
        assert!(pool.allocate_ipv4(&names[5], None, true).is_err());
        pool.set_time(time(130));
        assert!(pool.has_room());
        let given = pool.allocate_ipv4(&names[5], None, true);
        assert_eq!(given.map(Addresses::from), Ok(address(3)));
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
            AddressPool::with_memory(lease(subnet), memory).allocate(&name("a"), None)
        };
        assert_eq!(again("10.244.1.0/24", &text), Ok(address(7)));
        assert_eq!(
            again("10.244.2.0/24", &text),
            Ok(Ipv4Addr::new(10, 244, 2, 2).into())
        );
        let reserved = text.replace("10.244.1.7", "10.244.1.1");
        assert_eq!(again("10.244.1.0/24", &reserved), Ok(address(2)));
        let memory = serde_json::from_str(&text).unwrap();
        let mut remembering = AddressPool::with_memory(lease("10.244.1.0/24"), memory);
        let another = remembering.allocate(&name("b"), Some(address(7)));
        assert_eq!(another, Ok(address(7)), "nobody has it now");
        let bad_name = text.replace("\"a\"", "\"A\"");
        assert!(serde_json::from_str::<Memory>(&bad_name).is_err());
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
