//! The route table: the longest prefix that holds an address decides.
//!
//! One lookup is made per packet. The leases of a network nearly always have one length, so there
//! is a hash table for each length there is, and the longest are asked first: a lookup among
//! 100,000 routes of one length touches one or two cache lines, where tries and sorted lists of
//! that size follow a chain of them (see `benches/README.md` for both).

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

/// The routes of one address family, by netmask and network. A longer netmask is a larger address.
#[derive(Debug, Clone)]
struct Family<A, T> {
    longest_first: Vec<(A, Networks<A, T>)>,
}

/// The hash needs no secret: packets can only ask, and prefixes come from leases.
type Networks<A, T> = HashMap<A, T, FixedState>;

impl<A, T> Family<A, T>
where
    A: Copy + Ord + Hash + BitAnd<Output = A>,
{
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
            self.longest_first.insert(at, (mask, Networks::default()));
            at
        });
        self.longest_first[at].1.insert(network, value)
    }

    fn remove(&mut self, mask: A, network: A) -> Option<T> {
        let at = self.find(mask).ok()?;
        let networks = &mut self.longest_first[at].1;
        let old = networks.remove(&network);
        if networks.is_empty() {
            self.longest_first.remove(at);
        }
        old
    }

    fn get(&self, mask: A, network: A) -> Option<&T> {
        let at = self.find(mask).ok()?;
        self.longest_first[at].1.get(&network)
    }

    fn lookup(&self, address: A) -> Option<&T> {
        self.longest_first
            .iter()
            .find_map(|(mask, networks)| networks.get(&(address & *mask)))
    }

    /// The same with its netmask and network.
    fn entry(&self, address: A) -> Option<(A, A, &T)> {
        self.longest_first.iter().find_map(|(mask, networks)| {
            let network = address & *mask;
            networks.get(&network).map(|value| (*mask, network, value))
        })
    }

    /// Every netmask, network and value.
    fn iter(&self) -> impl Iterator<Item = (A, A, &T)> {
        self.longest_first.iter().flat_map(|(mask, networks)| {
            networks
                .iter()
                .map(|(network, value)| (*mask, *network, value))
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

    /// Whether a route may lie within another: they have several lengths.
    #[must_use]
    pub const fn may_nest(&self) -> bool {
        self.v4.longest_first.len() > 1 || self.v6.longest_first.len() > 1
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
            operations in proptest::collection::vec((any::<bool>(), prefix()), 1..60),
            probes in proptest::collection::vec(prefix(), 20),
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
