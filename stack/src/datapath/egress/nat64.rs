//! IPv6 addresses in which there is one of IPv4 (RFC 6052, RFC 4291, RFC 3056, RFC 4380).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use thiserror::Error;

/// The prefix that means IPv4 everywhere (RFC 6052 section 2.1).
pub(super) const WELL_KNOWN: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);
/// Where networks have prefixes of their own for that (RFC 8215).
pub(super) const LOCAL_USE: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, 0, 0), 48);
const SIX_TO_FOUR: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16);
const TEREDO: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32);

/// Addresses that mean nothing outside of a network, which the well-known prefix must not stand for
/// (RFC 6052 section 3.1).
const NOT_GLOBAL: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
];

/// Lengths of prefixes with which an address has room for one of IPv4 (RFC 6052 section 2.2).
const LENGTHS: [u8; 6] = [32, 40, 48, 56, 64, 96];
/// The byte that is zero in such an address, whatever its prefix.
const RESERVED: usize = 8;

/// The prefix by which pods with IPv6 reach IPv4 (NAT64).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nat64Prefix(Ipv6Net);

/// A prefix that cannot stand for IPv4.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "'{0}' is no prefix for NAT64: write one of IPv6 with a length of 32, 40, 48, 56, 64 or 96, \
     like 64:ff9b::/96"
)]
pub struct InvalidNat64Prefix(String);

impl Nat64Prefix {
    /// `64:ff9b::/96`, which means public IPv4 addresses wherever it is seen.
    pub const WELL_KNOWN: Self = Self(WELL_KNOWN);

    /// The prefix.
    #[must_use]
    pub const fn net(self) -> Ipv6Net {
        self.0
    }

    /// The IPv6 address of one of IPv4.
    #[must_use]
    pub fn embed(self, address: Ipv4Addr) -> Ipv6Addr {
        let mut octets = self.0.network().octets();
        for (at, octet) in places(self.0.prefix_len()).zip(address.octets()) {
            octets[at] = octet;
        }
        octets.into()
    }

    /// The IPv4 address of one of IPv6, if it has the prefix.
    #[must_use]
    pub fn embedded(self, address: Ipv6Addr) -> Option<Ipv4Addr> {
        let octets = address.octets();
        let is_ours = self.0.contains(&address) && octets[RESERVED] == 0;
        is_ours.then(|| embedded_at(address, self.0.prefix_len()))
    }

    /// Whether the prefix may stand for an IPv4 address: the well-known one not for private ones (RFC
    /// 6052 section 3.1).
    #[must_use]
    pub fn may_mean(self, address: Ipv4Addr) -> bool {
        self.0 != WELL_KNOWN || !NOT_GLOBAL.iter().any(|net| net.contains(&address))
    }
}

impl fmt::Display for Nat64Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Nat64Prefix {
    type Err = InvalidNat64Prefix;

    fn from_str(text: &str) -> Result<Self, InvalidNat64Prefix> {
        let invalid = || InvalidNat64Prefix(text.to_owned());
        let net: Ipv6Net = text.parse().map_err(|_| invalid())?;
        let can_be = LENGTHS.contains(&net.prefix_len())
            && net.addr() == net.network()
            && net.network().octets()[RESERVED] == 0
            && !net.network().is_multicast()
            && !net.network().is_unspecified();
        can_be.then_some(Self(net)).ok_or_else(invalid)
    }
}

/// Where the four bytes are behind a prefix.
fn places(prefix_len: u8) -> impl Iterator<Item = usize> {
    let first = usize::from(prefix_len / 8);
    (first..).filter(|at| *at != RESERVED).take(4)
}

fn embedded_at(address: Ipv6Addr, prefix_len: u8) -> Ipv4Addr {
    let octets = address.octets();
    let mut found = [0; 4];
    for (octet, at) in found.iter_mut().zip(places(prefix_len)) {
        *octet = octets.get(at).copied().unwrap_or_default();
    }
    found.into()
}

/// An IPv4 address to which a packet for an IPv6 address may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behind {
    /// By what the address means.
    Certainly(Ipv4Addr),
    /// By what it may mean to a translator of the network, whose prefix is not known.
    Perhaps(Ipv4Addr),
}

/// The IPv4 addresses to which a packet for an IPv6 address may get, beside that of a prefix of our
/// own: by a relay of 6to4, by a Teredo server and its client, by a translator of the network.
pub(super) fn behind(address: Ipv6Addr) -> impl Iterator<Item = Behind> {
    let octets = address.octets();
    let at = |first: usize| Ipv4Addr::from([0, 1, 2, 3].map(|i| octets[first + i]));
    let certainly = |ipv4| Some(Behind::Certainly(ipv4));
    let all = if SIX_TO_FOUR.contains(&address) {
        [certainly(at(2)), None, None, None]
    } else if TEREDO.contains(&address) {
        // The client's is written with all bits the other way around (RFC 4380 section 4).
        let client = Ipv4Addr::from_bits(!at(12).to_bits());
        [certainly(at(4)), certainly(client), None, None]
    } else if WELL_KNOWN.contains(&address) {
        [certainly(at(12)), None, None, None]
    } else if LOCAL_USE.contains(&address) {
        // What is no address anywhere belongs to another form, and translators drop it.
        let perhaps = |ipv4: Ipv4Addr| (ipv4.octets()[0] != 0).then_some(Behind::Perhaps(ipv4));
        [48, 56, 64, 96].map(|len| perhaps(embedded_at(address, len)))
    } else {
        [None; 4]
    };
    all.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    /// The examples of RFC 6052 section 2.4.
    #[test]
    fn addresses_are_embedded_as_the_standard_shows() {
        let ipv4 = Ipv4Addr::new(192, 0, 2, 33);
        for (prefix, expected) in [
            ("2001:db8::/32", "2001:db8:c000:221::"),
            ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
            ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
            ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
            ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
            ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
            ("64:ff9b::/96", "64:ff9b::192.0.2.33"),
        ] {
            let nat64: Nat64Prefix = prefix.parse().unwrap();
            assert_eq!(nat64.embed(ipv4), ip(expected), "{prefix}");
            assert_eq!(nat64.embedded(ip(expected)), Some(ipv4), "{prefix}");
            assert_eq!(nat64.embedded(ip("2001:db9::1")), None);
            assert_eq!(nat64.to_string(), prefix);
        }
        let odd: Nat64Prefix = "2001:db8::/32".parse().unwrap();
        assert_eq!(odd.embedded(ip("2001:db8:c000:221:100::")), None);
        for bad in [
            "64:ff9b::/97",
            "64:ff9b::1/96",
            "::/96",
            "10.0.0.0/8",
            "2001:db8:0:0:100::/96",
            "ff00::/32",
            "64:ff9b::",
        ] {
            let error = bad.parse::<Nat64Prefix>().unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }

    #[test]
    fn other_forms_have_what_is_behind_them() {
        use Behind::{Certainly, Perhaps};
        let behind = |text: &str| behind(ip(text)).collect::<Vec<_>>();
        let ipv4 = |text: &str| text.parse::<Ipv4Addr>().unwrap();
        let one = Certainly(ipv4("192.0.2.1"));
        assert_eq!(behind("2002:c000:201::1"), [one]);
        assert_eq!(behind("64:ff9b::c000:201"), [one]);
        // The example of RFC 4380 section 4: a server and its client.
        let both = ["65.54.227.120", "192.0.2.45"].map(|it| Certainly(ipv4(it)));
        assert_eq!(behind("2001:0:4136:e378:8000:63bf:3fff:fdd2"), both);
        let local = Perhaps(ipv4("10.1.2.3"));
        assert_eq!(behind("64:ff9b:1::a01:203"), [local]);
        assert!(behind("64:ff9b:1:a01:2:300::").contains(&local));
        assert_eq!(behind("2001:db8::1"), []);
    }
}
