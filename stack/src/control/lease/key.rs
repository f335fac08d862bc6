//! The key of a lease: `10.5.52.0-24`, or `10.12.13.0-24&fd00:12:13::-56` with an IPv6 subnet.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use thiserror::Error;

use crate::addresses::Nets;

/// The subnets of a lease, as its key names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubnetKey {
    /// The IPv4 subnet.
    pub ipv4: Ipv4Net,
    /// The IPv6 subnet of a dual-stack node.
    pub ipv6: Option<Ipv6Net>,
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
            ipv4: ipv4.trunc(),
            ipv6: None,
        }
    }

    /// The subnets themselves.
    #[must_use]
    pub fn nets(&self) -> Nets {
        Nets::with_ipv4(self.ipv4, self.ipv6)
    }
}

impl From<Ipv4Net> for SubnetKey {
    fn from(ipv4: Ipv4Net) -> Self {
        Self::new(ipv4)
    }
}

impl fmt::Display for SubnetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ipv4.network(), self.ipv4.prefix_len())?;
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
    Some(SubnetKey { ipv4, ipv6 })
}

fn split(text: &str, max_len: u8) -> Option<(&str, u8)> {
    let (address, len) = text.split_once('-')?;
    let digits = !len.is_empty() && len.bytes().all(|b| b.is_ascii_digit());
    let len = len.parse().ok().filter(|len| digits && *len <= max_len)?;
    Some((address, len))
}

/// Whether two networks share addresses.
#[must_use]
pub fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn u14_keys_are_read_and_refused_as_flannel_does() {
        for good in ["10.12.13.0-24", "10.12.13.0-24&fd00:12:13::-56"] {
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

    proptest! {
        #[test]
        fn what_is_printed_is_read(
            v4: u32, len in 0u8..32, v6: Option<u128>, len6 in 0u8..128,
        ) {
            let key = SubnetKey {
                ipv4: Ipv4Net::new(v4.into(), len).unwrap().trunc(),
                ipv6: v6.map(|v6| Ipv6Net::new(v6.into(), len6).unwrap().trunc()),
            };
            prop_assert_eq!(key.to_string().parse(), Ok(key));
        }
    }
}
