//! The key of a lease: `10.5.52.0-24`, `10.12.13.0-24&fd00:12:13::-56` with an IPv6 subnet, or
//! `0.0.0.0-0&fd00:12:13::-56` with that alone.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use thiserror::Error;

use crate::addresses::Nets;

/// The subnets of a lease, as its key names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubnetKey {
    ipv4: Option<Ipv4Net>,
    ipv6: Option<Ipv6Net>,
}

/// Text that is not the key of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{0}' is not a lease key like 10.244.7.0-24")]
pub struct InvalidSubnetKey(pub String);

impl SubnetKey {
    /// The key of an IPv4 subnet.
    #[must_use]
    pub fn new(ipv4: Ipv4Net) -> Self {
        Self {
            ipv4: Some(ipv4.trunc()),
            ipv6: None,
        }
    }

    /// The key of an IPv4 subnet, of an IPv6 subnet, or of both; `None` if there is neither.
    #[must_use]
    pub fn of(ipv4: Option<Ipv4Net>, ipv6: Option<Ipv6Net>) -> Option<Self> {
        // flannel writes all of IPv4 where there is none.
        let ipv4 = ipv4.filter(|net| ipv6.is_none() || net.prefix_len() > 0);
        (ipv4.is_some() || ipv6.is_some()).then(|| Self {
            ipv4: ipv4.map(|net| net.trunc()),
            ipv6: ipv6.map(|net| net.trunc()),
        })
    }

    /// The IPv4 subnet; `None` if the node has an IPv6 subnet alone.
    #[must_use]
    pub const fn ipv4(&self) -> Option<Ipv4Net> {
        self.ipv4
    }

    /// The IPv6 subnet of a node that has one.
    #[must_use]
    pub const fn ipv6(&self) -> Option<Ipv6Net> {
        self.ipv6
    }

    /// The subnet that stands for the lease where there is room for one: that of IPv4, if there is
    /// one.
    #[must_use]
    pub fn first(&self) -> IpNet {
        let ipv6 = || self.ipv6.unwrap_or_default().into();
        self.ipv4.map_or_else(ipv6, IpNet::from)
    }

    /// The subnets themselves.
    #[must_use]
    pub fn nets(&self) -> Nets {
        Nets::new(self.ipv4, self.ipv6).unwrap_or_else(|| self.first().into())
    }

    /// Whether two leases share addresses of either IP version.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let [ipv4, ipv6] = self.overlaps_each(other);
        ipv4 || ipv6
    }

    /// The same for IPv4 and for IPv6.
    #[must_use]
    pub fn overlaps_each(&self, other: &Self) -> [bool; 2] {
        let ipv4 = self.ipv4.zip(other.ipv4);
        let ipv6 = self.ipv6.zip(other.ipv6);
        [
            ipv4.is_some_and(|(one, other)| overlap(one, other)),
            ipv6.is_some_and(|(one, other)| overlap(one, other)),
        ]
    }
}

impl From<Ipv4Net> for SubnetKey {
    fn from(ipv4: Ipv4Net) -> Self {
        Self::new(ipv4)
    }
}

impl From<Nets> for SubnetKey {
    fn from(subnets: Nets) -> Self {
        Self {
            ipv4: subnets.ipv4().map(|net| net.trunc()),
            ipv6: subnets.ipv6().map(|net| net.trunc()),
        }
    }
}

impl From<IpNet> for SubnetKey {
    fn from(subnet: IpNet) -> Self {
        match subnet {
            IpNet::V4(ipv4) => Self::new(ipv4),
            IpNet::V6(ipv6) => Self {
                ipv4: None,
                ipv6: Some(ipv6.trunc()),
            },
        }
    }
}

impl fmt::Display for SubnetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ipv4 = self.ipv4.unwrap_or_default();
        write!(f, "{}-{}", ipv4.network(), ipv4.prefix_len())?;
        match self.ipv6 {
            Some(ipv6) => write!(f, "&{}-{}", ipv6.network(), ipv6.prefix_len()),
            None => Ok(()),
        }
    }
}

impl FromStr for SubnetKey {
    type Err = InvalidSubnetKey;

    /// Reads what flannel reads: prefix lengths up to 31 and 127, lower-case hex.
    fn from_str(text: &str) -> Result<Self, InvalidSubnetKey> {
        parse(text).ok_or_else(|| InvalidSubnetKey(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<SubnetKey> {
    let (v4, v6) = match text.split_once('&') {
        Some((v4, v6)) => (v4, Some(v6)),
        None => (text, None),
    };
    let (address, len) = split(v4, 31)?;
    let ipv4 = Ipv4Net::new(address.parse::<Ipv4Addr>().ok()?, len)
        .ok()?
        .trunc();
    let ipv6 = match v6 {
        None => None,
        Some(v6) => {
            let (address, len) = split(v6, 127)?;
            let plain = |b: u8| b.is_ascii_digit() || matches!(b, b'a'..=b'f' | b':');
            if !address.bytes().all(plain) {
                return None;
            }
            Some(
                Ipv6Net::new(address.parse::<Ipv6Addr>().ok()?, len)
                    .ok()?
                    .trunc(),
            )
        }
    };
    SubnetKey::of(Some(ipv4), ipv6)
}

fn split(text: &str, max_len: u8) -> Option<(&str, u8)> {
    let (address, len) = text.split_once('-')?;
    let digits = !len.is_empty() && len.bytes().all(|b| b.is_ascii_digit());
    let len = len.parse().ok().filter(|len| digits && *len <= max_len)?;
    Some((address, len))
}

/// Whether two networks share addresses.
#[must_use]
pub fn overlap(one: impl Into<IpNet>, other: impl Into<IpNet>) -> bool {
    let (one, other) = (one.into(), other.into());
    one.contains(&other.network()) || other.contains(&one.network())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn u14_keys_are_read_and_refused_as_flannel_does() {
        for good in [
            "10.12.13.0-24",
            "10.12.13.0-24&fd00:12:13::-56",
            "10.5.34.0-24&fd00:1:2:3::-64",
            "0.0.0.0-0&fd00:1:2:3::-64",
        ] {
            assert_eq!(good.parse::<SubnetKey>().unwrap().to_string(), good);
        }
        for bad in [
            "10",
            "10.12.13.0",
            "10.12.13-24",
            "10.12.13.300-24",
            "10.12.13.0-24hi",
            "&2001::-56",
            "10.12.13.0-24&:12:13:-56",
            "10.12.13.0-24&20011::-56",
            "10.12.13.0-24&2001-56",
            "10.12.13.0-24&2001::",
            "10.12.13.0-24&2001::-56hi",
            "10.12.13.0-32",
            "10.12.13.0-24&2001::-128",
            "10.12.13.0-24&FD00::-56",
            "10.12.13.0-+24",
        ] {
            assert_eq!(
                bad.parse::<SubnetKey>(),
                Err(InvalidSubnetKey(bad.to_owned()))
            );
        }
    }

    #[test]
    fn leases_overlap_in_either_version() {
        let key = |text: &str| text.parse::<SubnetKey>().unwrap();
        let one = key("10.5.7.0-24&fd00:5:7::-64");
        for (other, expected) in [
            ("10.5.7.0-24&fd00:5:8::-64", [true, false]),
            ("10.5.8.0-24&fd00:5:7::-64", [false, true]),
            ("0.0.0.0-0&fd00:5:7::-64", [false, true]),
            ("10.5.0.0-16", [true, false]),
            ("10.5.8.0-24", [false, false]),
        ] {
            assert_eq!(one.overlaps_each(&key(other)), expected, "{other}");
            assert_eq!(key(other).overlaps(&one), expected.contains(&true));
        }
        assert_eq!(key("0.0.0.0-0&fd00::-64").first().to_string(), "fd00::/64");
        assert_eq!(key("0.0.0.0-0&fd00::-64").ipv4(), None);
        assert_eq!(one.first().to_string(), "10.5.7.0/24");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read(
            v4: u32, len in 0u8..32, v6: Option<u128>, len6 in 0u8..128,
        ) {
            let ipv4 = Ipv4Net::new(v4.into(), len).unwrap();
            let ipv6 = v6.map(|v6| Ipv6Net::new(v6.into(), len6).unwrap());
            let key = SubnetKey::of(Some(ipv4), ipv6).unwrap();
            prop_assert_eq!(key.ipv4().is_none(), len == 0 && v6.is_some());
            prop_assert_eq!(key.to_string().parse(), Ok(key));
        }
    }
}
