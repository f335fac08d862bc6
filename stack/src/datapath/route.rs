//! The route table: the longest prefix that holds an address decides.
//!
//! One lookup is made per packet. The leases of a network nearly always have one length, so there
//! is a table for each length there is, and the longest are asked first. Leases lie side by side in
//! one network, too: then the table is a plain one by the networks' numbers, as are those of routers
//! in hardware ("Routing Lookups in Hardware at Memory Access Speeds", Gupta, Lin and McKeown, 1998). A
//! lookup there touches one line of the cache. It is a hash table where they are few and far between,
//! which touches two; tries and sorted lists of 100,000 routes follow a chain of them (see
//! `benches/README.md` for all).

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::BitAnd;

use foldhash::fast::FixedState;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Routes from prefixes to values of type `T`, longest prefix first.
#[derive(Debug, Clone)]
pub struct RouteTable<T> {
    v4: Family<Ipv4Addr, T>,
    v6: Family<Ipv6Addr, T>,
}

/// An address as a number. A network's size is 2 to the power of its `host_bits`, of which there are fewer
/// than an address has.
trait Address: Copy + Ord + Hash + BitAnd<Output = Self> {
    /// How many bits are not the network's, if any are.
    fn host_bits(mask: Self) -> Option<u32>;

    /// How many networks of this size begin from `base` on and before this one. It is larger than any
    /// table if this one is before `base`.
    fn networks_since(self, base: Self, host_bits: u32) -> usize;

    /// The network that many further on, or back; at most the last or the first there is.
    fn networks_on(self, count: isize, host_bits: u32) -> Self;
}

macro_rules! address {
    ($address:ty, $bits:ty) => {
        impl Address for $address {
            fn host_bits(mask: Self) -> Option<u32> {
                let bits = mask.to_bits().trailing_zeros();
                (bits < <$bits>::BITS).then_some(bits)
            }

            #[inline]
            fn networks_since(self, base: Self, host_bits: u32) -> usize {
                let distance = self.to_bits().wrapping_sub(base.to_bits());
                usize::try_from(distance.wrapping_shr(host_bits)).unwrap_or(usize::MAX)
            }

            fn networks_on(self, count: isize, host_bits: u32) -> Self {
                let networks = <$bits>::try_from(count.unsigned_abs()).unwrap_or(<$bits>::MAX);
                let size: $bits = 1;
                let distance = networks.saturating_mul(size.wrapping_shl(host_bits));
                Self::from_bits(match count {
                    ..0 => self.to_bits().saturating_sub(distance),
                    0.. => self.to_bits().saturating_add(distance),
                })
            }
        }
    };
}

address!(Ipv4Addr, u32);
address!(Ipv6Addr, u128);

/// The routes of one address family, by netmask and network. A longer netmask is a larger address.
#[derive(Debug, Clone)]
struct Family<A, T> {
    longest_first: Vec<(A, Networks<A, T>)>,
}

/// The routes with one netmask.
#[derive(Debug, Clone)]
enum Networks<A, T> {
    Dense(Dense<A, T>),
    Sparse(Sparse<A, T>),
}

/// The hash needs no secret: packets can only ask, and prefixes come from leases.
type Sparse<A, T> = HashMap<A, T, FixedState>;

impl<A: Address, T> Networks<A, T> {
    fn insert(&mut self, mask: A, network: A, value: T) -> Option<T> {
        let value = match self {
            Self::Sparse(routes) => {
                let old = routes.insert(network, value);
                // To look now and then costs little for each.
                if old.is_none() && routes.len().is_power_of_two() {
                    *self = Self::of(std::mem::take(routes), mask);
                }
                return old;
            }
            Self::Dense(table) => match table.insert(network, value) {
                Ok(old) => return old,
                Err(value) => value,
            },
        };
        let mut routes = Sparse::default();
        if let Self::Dense(table) = self {
            routes.extend(table.drain());
        }
        routes.insert(network, value);
        *self = Self::Sparse(routes);
        None
    }

    /// These routes, in the better way.
    fn of(routes: Sparse<A, T>, mask: A) -> Self {
        let Some(mut table) = Dense::empty_for(&routes, mask) else {
            return Self::Sparse(routes);
        };
        for (network, value) in routes {
            table.set(network, value);
        }
        Self::Dense(table)
    }

    fn remove(&mut self, network: A) -> Option<T> {
        match self {
            Self::Dense(table) => table.remove(network),
            Self::Sparse(routes) => routes.remove(&network),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Dense(table) => table.count == 0,
            Self::Sparse(routes) => routes.is_empty(),
        }
    }

    /// The value of the network that holds an address.
    #[inline]
    fn lookup(&self, mask: A, address: A) -> Option<&T> {
        match self {
            Self::Dense(table) => table.lookup(address),
            Self::Sparse(routes) => routes.get(&(address & mask)),
        }
    }

    /// Every network and value.
    fn iter(&self) -> impl Iterator<Item = (A, &T)> {
        let (dense, sparse) = match self {
            Self::Dense(table) => (Some(table), None),
            Self::Sparse(routes) => (None, Some(routes)),
        };
        let sparse = sparse.into_iter().flatten();
        let sparse = sparse.map(|(network, value)| (*network, value));
        dense.into_iter().flat_map(Dense::iter).chain(sparse)
    }
}

/// Routes to networks that lie side by side: a place for each network from `base` on.
#[derive(Debug, Clone)]
struct Dense<A, T> {
    base: A,
    host_bits: u32,
    places: Vec<Option<T>>,
    count: usize,
}

/// Places that a table may have in any case.
const FEW_PLACES: usize = 4096;
/// Places for each route if it has more: what a hash table has is about as large.
const PLACES_PER_ROUTE: usize = 4;

impl<A: Address, T> Dense<A, T> {
    /// An empty one for these routes, if they are dense.
    fn empty_for(routes: &Sparse<A, T>, mask: A) -> Option<Self> {
        let (first, last) = (*routes.keys().min()?, *routes.keys().max()?);
        let table = Self {
            base: first,
            host_bits: A::host_bits(mask)?,
            places: Vec::new(),
            count: routes.len(),
        };
        let may = table.may_have(table.place(last).saturating_add(1));
        may.then_some(Self { count: 0, ..table })
    }

    /// Whether so many places are worth it.
    const fn may_have(&self, places: usize) -> bool {
        places <= FEW_PLACES || places / PLACES_PER_ROUTE <= self.count
    }

    /// The place of an address; it is behind the last if the address is before `base`.
    #[inline]
    fn place(&self, address: A) -> usize {
        address.networks_since(self.base, self.host_bits)
    }

    fn network(&self, place: usize) -> A {
        self.base.networks_on(place as isize, self.host_bits)
    }

    #[inline]
    fn lookup(&self, address: A) -> Option<&T> {
        self.places.get(self.place(address))?.as_ref()
    }

    /// Adds a route, or returns its value if they are not dense with it.
    fn insert(&mut self, network: A, value: T) -> Result<Option<T>, T> {
        let before = match network < self.base {
            true => self.base.networks_since(network, self.host_bits),
            false => 0,
        };
        let places = match before {
            0 => self.place(network).saturating_add(1),
            _ => self.places.len().saturating_add(before),
        };
        if places > self.places.len() && !self.may_have(places) {
            return Err(value);
        }
        if before > 0 {
            // As many again, so that not every smaller network moves all others.
            self.extend_front(before.max(self.places.len()));
        }
        Ok(self.set(network, value))
    }

    /// Makes so many places in front, as far as there are such networks.
    fn extend_front(&mut self, count: usize) {
        let old = self.base;
        self.base = old.networks_on(-(count as isize), self.host_bits);
        let places = std::iter::repeat_with(|| None).take(self.place(old));
        self.places.splice(..0, places);
    }

    /// Adds a route to a network that is not before `base`.
    fn set(&mut self, network: A, value: T) -> Option<T> {
        let at = self.place(network);
        if at >= self.places.len() {
            self.places.resize_with(at + 1, || None);
        }
        let old = self.places[at].replace(value);
        self.count += usize::from(old.is_none());
        old
    }

    fn remove(&mut self, network: A) -> Option<T> {
        let at = self.place(network);
        let old = self.places.get_mut(at)?.take()?;
        self.count -= 1;
        Some(old)
    }

    fn iter(&self) -> impl Iterator<Item = (A, &T)> {
        let places = self.places.iter().enumerate();
        places.filter_map(|(at, value)| Some((self.network(at), value.as_ref()?)))
    }

    /// Takes all routes out.
    fn drain(&mut self) -> impl Iterator<Item = (A, T)> {
        let places = std::mem::take(&mut self.places).into_iter().enumerate();
        places.filter_map(|(at, value)| Some((self.network(at), value?)))
    }
}

impl<A: Address, T> Family<A, T> {
    const fn new() -> Self {
        Self {
            longest_first: Vec::new(),
        }
    }

    /// Where the routes with this netmask are, or where they belong.
    fn find(&self, mask: A) -> Result<usize, usize> {
        self.longest_first
            .binary_search_by(|(other, _)| mask.cmp(other))
    }

    fn insert(&mut self, mask: A, network: A, value: T) -> Option<T> {
        let at = self.find(mask).unwrap_or_else(|at| {
            let none = Networks::Sparse(Sparse::default());
            self.longest_first.insert(at, (mask, none));
            at
        });
        self.longest_first[at].1.insert(mask, network, value)
    }

    fn remove(&mut self, mask: A, network: A) -> Option<T> {
        let at = self.find(mask).ok()?;
        let networks = &mut self.longest_first[at].1;
        let old = networks.remove(network);
        if networks.is_empty() {
            self.longest_first.remove(at);
        }
        old
    }

    fn get(&self, mask: A, network: A) -> Option<&T> {
        let at = self.find(mask).ok()?;
        self.longest_first[at].1.lookup(mask, network)
    }

    #[inline]
    fn lookup(&self, address: A) -> Option<&T> {
        self.longest_first
            .iter()
            .find_map(|(mask, networks)| networks.lookup(*mask, address))
    }

    /// The same with its netmask and network.
    fn entry(&self, address: A) -> Option<(A, A, &T)> {
        self.longest_first.iter().find_map(|(mask, networks)| {
            let value = networks.lookup(*mask, address)?;
            Some((*mask, address & *mask, value))
        })
    }

    /// Every netmask, network and value.
    fn iter(&self) -> impl Iterator<Item = (A, A, &T)> {
        self.longest_first.iter().flat_map(|(mask, networks)| {
            networks
                .iter()
                .map(|(network, value)| (*mask, network, value))
        })
    }
}

impl<T> Default for RouteTable<T> {
    fn default() -> Self {
        Self {
            v4: Family::new(),
            v6: Family::new(),
        }
    }
}

impl<T> RouteTable<T> {
    /// Adds a route, host bits of `prefix` ignored, and returns the one it replaces.
    pub fn insert(&mut self, prefix: IpNet, value: T) -> Option<T> {
        match prefix {
            IpNet::V4(prefix) => self.v4.insert(prefix.netmask(), prefix.network(), value),
            IpNet::V6(prefix) => self.v6.insert(prefix.netmask(), prefix.network(), value),
        }
    }

    /// Removes the route to exactly `prefix`, host bits ignored.
    pub fn remove(&mut self, prefix: IpNet) -> Option<T> {
        match prefix {
            IpNet::V4(prefix) => self.v4.remove(prefix.netmask(), prefix.network()),
            IpNet::V6(prefix) => self.v6.remove(prefix.netmask(), prefix.network()),
        }
    }

    /// The value of the route to exactly `prefix`, host bits ignored.
    pub fn get(&self, prefix: IpNet) -> Option<&T> {
        match prefix {
            IpNet::V4(prefix) => self.v4.get(prefix.netmask(), prefix.network()),
            IpNet::V6(prefix) => self.v6.get(prefix.netmask(), prefix.network()),
        }
    }

    /// The value of the longest prefix that holds `address`.
    #[inline]
    pub fn lookup(&self, address: IpAddr) -> Option<&T> {
        match address {
            IpAddr::V4(address) => self.v4.lookup(address),
            IpAddr::V6(address) => self.v6.lookup(address),
        }
    }

    /// The longest prefix that holds `address`, with its value.
    pub fn entry(&self, address: IpAddr) -> Option<(IpNet, &T)> {
        match address {
            IpAddr::V4(address) => self.v4.entry(address).and_then(net_v4),
            IpAddr::V6(address) => self.v6.entry(address).and_then(net_v6),
        }
    }

    /// Whether a route of IPv4 may lie within another: they have several lengths.
    #[must_use]
    pub const fn may_nest(&self) -> bool {
        self.v4.longest_first.len() > 1
    }

    /// The same of IPv6.
    #[must_use]
    pub const fn may_nest_v6(&self) -> bool {
        self.v6.longest_first.len() > 1
    }

    /// Every route, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, &T)> {
        let v4 = self.v4.iter().filter_map(net_v4);
        let v6 = self.v6.iter().filter_map(net_v6);
        v4.chain(v6)
    }
}

fn net_v4<T>((mask, network, value): (Ipv4Addr, Ipv4Addr, T)) -> Option<(IpNet, T)> {
    Some((Ipv4Net::with_netmask(network, mask).ok()?.into(), value))
}

fn net_v6<T>((mask, network, value): (Ipv6Addr, Ipv6Addr, T)) -> Option<(IpNet, T)> {
    Some((Ipv6Net::with_netmask(network, mask).ok()?.into(), value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_longest_prefix_wins_whatever_the_order() {
        let mut table = RouteTable::default();
        for (prefix, value) in [
            ("10.244.3.0/24", "lease"),
            ("10.244.0.0/16", "network"),
            ("fd00::/8", "six"),
        ] {
            table.insert(prefix.parse().unwrap(), value);
        }
        let lookup = |address: &str| table.lookup(address.parse().unwrap()).copied();
        assert_eq!(lookup("10.244.3.9"), Some("lease"));
        assert_eq!(lookup("10.244.4.9"), Some("network"));
        assert_eq!(lookup("10.245.0.1"), None);
        assert_eq!(lookup("fd12::1"), Some("six"));
    }

    #[test]
    fn routes_of_one_length_do_not_nest() {
        let mut table = RouteTable::default();
        for prefix in ["10.1.2.0/24", "10.1.3.0/24", "fd00::/64"] {
            table.insert(prefix.parse().unwrap(), ());
        }
        assert!(!table.may_nest());
        table.insert("10.1.0.0/16".parse().unwrap(), ());
        assert!(table.may_nest());
        table.remove("10.1.0.0/16".parse().unwrap());
        assert!(!table.may_nest());
    }

    #[test]
    fn host_bits_do_not_count() {
        let mut table = RouteTable::default();
        assert_eq!(table.insert("10.1.2.3/24".parse().unwrap(), 1), None);
        assert_eq!(table.insert("10.1.2.0/24".parse().unwrap(), 2), Some(1));
        assert_eq!(table.remove("10.1.2.77/24".parse().unwrap()), Some(2));
        assert_eq!(table.iter().count(), 0);
    }

    /// Whether the IPv4 routes of the longest length are dense, and how many places they have.
    fn places<T>(table: &RouteTable<T>) -> Option<usize> {
        match &table.v4.longest_first.first()?.1 {
            Networks::Dense(dense) => Some(dense.places.len()),
            Networks::Sparse(_) => None,
        }
    }

    fn leases(numbers: impl Iterator<Item = u32>) -> RouteTable<u32> {
        let mut table = RouteTable::default();
        for number in numbers {
            let network = Ipv4Net::new_assert(Ipv4Addr::from_bits(number << 8), 24);
            assert_eq!(table.insert(network.into(), number), None);
        }
        table
    }

    #[test]
    fn leases_side_by_side_have_a_place_each() {
        let numbers = 0x0a_0000..0x0a_8000;
        for table in [leases(numbers.clone()), leases(numbers.clone().rev())] {
            let places = places(&table).unwrap();
            assert!(places <= 2 * numbers.len(), "{places}");
            for number in numbers.clone() {
                let address = Ipv4Addr::from_bits(number << 8 | 9);
                assert_eq!(table.lookup(address.into()), Some(&number));
            }
            for outside in ["9.255.255.255", "10.128.0.0", "0.0.0.0", "255.255.255.255"] {
                assert_eq!(table.lookup(outside.parse().unwrap()), None);
            }
        }
    }

    #[test]
    fn leases_far_apart_take_no_more_memory_than_others() {
        let mut table = leases([0x0a_0000, 0x0a_0fff].into_iter());
        assert_eq!(places(&table), Some(FEW_PLACES));
        table.insert("10.16.0.0/24".parse().unwrap(), 1);
        assert_eq!(places(&table), None);
        let all = ["10.0.0.9", "10.15.255.9", "10.16.0.9"].map(|it| it.parse().unwrap());
        assert!(all.iter().all(|it| table.lookup(*it).is_some()));
        // With enough of them between it is worth it again.
        for number in 0x0a_0001..0x0a_0500 {
            let network = Ipv4Net::new_assert(Ipv4Addr::from_bits(number << 8), 24);
            table.insert(network.into(), number);
        }
        assert_eq!(places(&table), Some(FEW_PLACES + 1));
        assert!(all.iter().all(|it| table.lookup(*it).is_some()));
        assert_eq!(table.iter().count(), 0x502);
    }

    /// Networks of one length, most of them side by side.
    fn lease() -> impl Strategy<Value = IpNet> {
        let numbers = prop_oneof![
            8 => 0x0a_1000_u32..0x0a_1040,
            1 => 0x0a_0000_u32..0x0b_0000,
            1 => 0_u32..0x100_0000,
        ];
        let v4 =
            numbers.prop_map(|it| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from_bits(it << 8), 24)));
        let v6 = (0_u128..64, any::<bool>()).prop_map(|(low, far)| {
            let number = low | u128::from(far) << 70;
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from_bits(number << 20), 108))
        });
        prop_oneof![3 => v4, 1 => v6]
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        // Few distinct bits, so that prefixes often nest and repeat.
        let v4 = (any::<[bool; 4]>(), 0u8..=32).prop_map(|(bits, len)| {
            let address: u32 = bits
                .iter()
                .enumerate()
                .map(|(i, b)| u32::from(*b) << (i * 9))
                .sum();
            IpNet::V4(Ipv4Net::new(address.into(), len).unwrap())
        });
        let v6 = (any::<[bool; 4]>(), 0u8..=128).prop_map(|(bits, len)| {
            let address: u128 = bits
                .iter()
                .enumerate()
                .map(|(i, b)| u128::from(*b) << (i * 40))
                .sum();
            IpNet::V6(Ipv6Net::new(address.into(), len).unwrap())
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_table(
            operations in prop_oneof![
                proptest::collection::vec((any::<bool>(), prefix()), 1..60),
                proptest::collection::vec((proptest::bool::weighted(0.7), lease()), 1..60),
            ],
            probes in proptest::collection::vec(prop_oneof![prefix(), lease()], 20),
        ) {
            let mut table = RouteTable::default();
            let mut naive: Vec<(IpNet, usize)> = Vec::new();
            for (i, (insert, prefix)) in operations.into_iter().enumerate() {
                let prefix = prefix.trunc();
                let old = naive.iter().position(|(p, _)| *p == prefix).map(|at| naive.remove(at).1);
                prop_assert_eq!(table.get(prefix).copied(), old);
                if insert {
                    prop_assert_eq!(table.insert(prefix, i), old);
                    naive.push((prefix, i));
                } else {
                    prop_assert_eq!(table.remove(prefix), old);
                }
            }
            for probe in probes {
                let expected = naive
                    .iter()
                    .filter(|(prefix, _)| prefix.contains(&probe.addr()))
                    .max_by_key(|(prefix, _)| prefix.prefix_len())
                    .map(|(_, value)| value);
                prop_assert_eq!(table.lookup(probe.addr()), expected);
            }
            naive.sort_unstable_by_key(|(prefix, _)| (prefix.addr(), prefix.prefix_len()));
            let mut all: Vec<_> = table.iter().map(|(prefix, i)| (prefix, *i)).collect();
            all.sort_unstable_by_key(|(prefix, _)| (prefix.addr(), prefix.prefix_len()));
            prop_assert_eq!(all, naive);
        }
    }
}
