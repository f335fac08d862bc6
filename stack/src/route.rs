//! The route table: the longest prefix that holds an address decides.
//!
//! A thousand nodes are a thousand routes, and one lookup is made per packet, so the table is a
//! prefix trie per address family: its lookup costs by the length of the prefix, not by their
//! number.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// Routes from prefixes to values of type `T`, longest prefix first.
#[derive(Debug, Clone)]
pub struct RouteTable<T> {
    v4: PrefixMap<Ipv4Net, T>,
    v6: PrefixMap<Ipv6Net, T>,
}

impl<T> Default for RouteTable<T> {
    fn default() -> Self {
        Self {
            v4: PrefixMap::new(),
            v6: PrefixMap::new(),
        }
    }
}

impl<T> RouteTable<T> {
    /// Adds a route, host bits of `prefix` ignored, and returns the one it replaces.
    pub fn insert(&mut self, prefix: IpNet, value: T) -> Option<T> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.insert(prefix, value),
            IpNet::V6(prefix) => self.v6.insert(prefix, value),
        }
    }

    /// Removes the route to exactly `prefix`, host bits ignored.
    pub fn remove(&mut self, prefix: IpNet) -> Option<T> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.remove(&prefix),
            IpNet::V6(prefix) => self.v6.remove(&prefix),
        }
    }

    /// The value of the route to exactly `prefix`, host bits ignored.
    pub fn get(&self, prefix: IpNet) -> Option<&T> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.get(&prefix),
            IpNet::V6(prefix) => self.v6.get(&prefix),
        }
    }

    /// The value of the longest prefix that holds `address`.
    pub fn lookup(&self, address: IpAddr) -> Option<&T> {
        match address {
            IpAddr::V4(address) => self.v4.get_lpm(&address.into()).map(|(_, value)| value),
            IpAddr::V6(address) => self.v6.get_lpm(&address.into()).map(|(_, value)| value),
        }
    }

    /// Every route, by prefix.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, &T)> {
        let v4 = self
            .v4
            .iter()
            .map(|(prefix, value)| (IpNet::V4(prefix), value));
        v4.chain(
            self.v6
                .iter()
                .map(|(prefix, value)| (IpNet::V6(prefix), value)),
        )
    }
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
            prop_assert_eq!(table.iter().count(), naive.len());
        }
    }
}
