//! IPv6 link-local addresses of pods: who has one first keeps it.
//!
//! Pods give these addresses to themselves, so that nothing says beforehand whose one is. One that is
//! made of a pod's MAC address (RFC 4291 appendix A) is that pod's in any case.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv6Addr;

use smoltcp::wire::EthernetAddress;

use crate::datapath::hash::Seed;
use crate::datapath::port::PortId;

/// Addresses that a port may have. A host needs one, and has another one after a conflict.
const PER_PORT: usize = 4;

/// Which port has which address.
#[derive(Debug, Clone)]
pub struct LinkLocals {
    holders: HashMap<Ipv6Addr, PortId, Seed>,
    /// The addresses of each port, the oldest first.
    by_port: HashMap<PortId, VecDeque<Ipv6Addr>, Seed>,
}

impl LinkLocals {
    /// An empty table.
    #[must_use]
    pub fn new(seed: Seed) -> Self {
        Self {
            holders: HashMap::with_hasher(seed),
            by_port: HashMap::with_hasher(seed),
        }
    }

    /// Hears that a port has an address; false if another one has it. A port that has too many
    /// gives up its oldest.
    pub fn claim(&mut self, address: Ipv6Addr, port: PortId) -> bool {
        if let Some(holder) = self.holders.get(&address) {
            return *holder == port;
        }
        let own = self.by_port.entry(port).or_default();
        if own.len() >= PER_PORT
            && let Some(oldest) = own.pop_front()
        {
            self.holders.remove(&oldest);
        }
        own.push_back(address);
        self.holders.insert(address, port);
        true
    }

    /// The port that has an address.
    #[must_use]
    pub fn holder(&self, address: Ipv6Addr) -> Option<PortId> {
        self.holders.get(&address).copied()
    }

    /// Forgets the addresses of a port.
    pub fn forget_port(&mut self, port: PortId) {
        for address in self.by_port.remove(&port).into_iter().flatten() {
            self.holders.remove(&address);
        }
    }
}

/// The MAC address that a link-local address is made of, if it is made of one.
#[must_use]
pub const fn mac_of(address: Ipv6Addr) -> Option<EthernetAddress> {
    match address.octets() {
        [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a, b, c, 0xff, 0xfe, d, e, f] => {
            Some(EthernetAddress([a ^ 2, b, c, d, e, f]))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last)
    }

    #[test]
    fn the_first_port_keeps_an_address_until_it_goes() {
        let (one, two) = (PortId(1), PortId(2));
        let mut table = LinkLocals::new(Seed(1));
        for _ in 0..2 {
            assert!(table.claim(address(1), one));
            assert!(!table.claim(address(1), two));
        }
        table.forget_port(two);
        assert!(!table.claim(address(1), two));
        table.forget_port(one);
        assert!(table.claim(address(1), two));
        assert!(!table.claim(address(1), one));
    }

    #[test]
    fn a_port_that_claims_many_has_few() {
        let (one, two) = (PortId(1), PortId(2));
        let mut table = LinkLocals::new(Seed(1));
        assert!(table.claim(address(1000), two));
        for last in 0..500 {
            assert!(table.claim(address(last), one));
        }
        assert_eq!(table.holders.len(), PER_PORT + 1);
        for last in [0, 499 - PER_PORT as u16] {
            assert!(table.claim(address(last), two), "{last}");
        }
        assert!(!table.claim(address(499), two));
        assert!(!table.claim(address(1000), one), "the others' stay");
        table.forget_port(one);
        table.forget_port(two);
        assert!(table.holders.is_empty() && table.by_port.is_empty());
    }

    #[test]
    fn an_address_tells_the_mac_address_that_it_is_made_of() {
        let mac = EthernetAddress([0x0a, 0x58, 10, 244, 1, 2]);
        let made: Ipv6Addr = "fe80::858:aff:fef4:102".parse().unwrap();
        assert_eq!(mac_of(made), Some(mac));
        for other in [
            "fe80::1",
            "fd00::858:aff:fef4:102",
            "fe80:1::858:aff:fef4:102",
        ] {
            assert_eq!(mac_of(other.parse().unwrap()), None, "{other}");
        }
    }
}
