//! How many leases one public address has.
//!
//! A node has one lease, and may have left others behind that end within a day. Whoever can write to
//! the store could have them all: each is a route and a peer at every node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::key::SubnetKey;

/// The leases of one public address that count: the first, by their keys, so that all nodes choose
/// the same.
const MAX: usize = 16;

/// The leases of other nodes by their public addresses.
#[derive(Debug, Clone, Default)]
pub struct Shares {
    by_address: BTreeMap<IpAddr, BTreeSet<SubnetKey>>,
}

impl Shares {
    /// Takes a lease, and says which one does not count any more if there are too many now; it may
    /// be this one.
    pub fn add(&mut self, address: IpAddr, key: SubnetKey) -> Option<SubnetKey> {
        let keys = self.by_address.entry(address).or_default();
        if !keys.insert(key) {
            return None;
        }
        // One behind the limit changes nothing for the others.
        keys.iter().nth(MAX).map(|last| key.max(*last))
    }

    /// Forgets a lease, and says which one counts instead, if one waited.
    pub fn remove(&mut self, address: IpAddr, key: SubnetKey) -> Option<SubnetKey> {
        let counted = self.counts(address, key);
        let keys = self.by_address.get_mut(&address)?;
        if !keys.remove(&key) {
            return None;
        }
        let next = keys.iter().nth(MAX - 1).copied();
        if keys.is_empty() {
            self.by_address.remove(&address);
        }
        next.filter(|_| counted)
    }

    /// Whether a lease is among those that count.
    #[must_use]
    pub fn counts(&self, address: IpAddr, key: SubnetKey) -> bool {
        let keys = self.by_address.get(&address);
        keys.is_some_and(|keys| keys.iter().take(MAX).any(|it| *it == key))
    }

    /// Why a lease that is not among them does not count.
    #[must_use]
    pub fn excess(address: IpAddr) -> String {
        format!("{address} has more than {MAX} leases, and only the first count")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_leases_of_an_address_count_whatever_the_order() {
        let address = IpAddr::from([192, 168, 0, 9]);
        let key = |i: u8| SubnetKey::new(ipnet::Ipv4Net::new([10, 3, i, 0].into(), 24).unwrap());
        let counting = |shares: &Shares| {
            let all = (0..=255).filter(|i| shares.counts(address, key(*i)));
            all.collect::<Vec<u8>>()
        };
        let mut shares = Shares::default();
        for i in 100..116 {
            assert_eq!(shares.add(address, key(i)), None, "{i}");
        }
        assert_eq!(shares.add(address, key(116)), Some(key(116)));
        assert_eq!(shares.add(address, key(120)), Some(key(120)));
        assert_eq!(shares.add(address, key(117)), Some(key(117)));
        assert_eq!(counting(&shares), (100..116).collect::<Vec<_>>());
        // A lower one takes the place of the last.
        assert_eq!(shares.add(address, key(50)), Some(key(115)));
        assert_eq!(shares.add(address, key(50)), None);
        // Another address is another share.
        assert_eq!(shares.add([192, 168, 0, 8].into(), key(1)), None);
        assert_eq!(shares.remove(address, key(117)), None);
        assert_eq!(shares.remove(address, key(117)), None);
        assert_eq!(shares.remove(address, key(101)), Some(key(115)));
        let left: Vec<_> = [50, 100].into_iter().chain(102..116).collect();
        assert_eq!(counting(&shares), left);
        for i in left {
            shares.remove(address, key(i));
        }
        assert_eq!(counting(&shares), [116, 120]);
        for i in [116, 120] {
            assert_eq!(shares.remove(address, key(i)), None);
        }
        assert_eq!(shares.by_address.len(), 1, "nothing is left behind");
    }
}
