//! Addresses and prefixes where there may be some of both IP versions.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// Something of IPv4, of IPv6, or of each. As text, also in JSON, it is what there is of IPv4, or of
/// IPv6, or both with a comma in between, as Kubernetes has it in its flags: `10.244.1.2`, or
/// `10.244.1.2,fd00::2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dual<A, B> {
    ipv4: Option<A>,
    ipv6: Option<B>,
}

/// Addresses of something that has one of IPv4, of IPv6, or of each.
pub type Addresses = Dual<Ipv4Addr, Ipv6Addr>;
/// Prefixes, or addresses with the length of theirs, likewise.
pub type Nets = Dual<Ipv4Net, Ipv6Net>;

/// Text that is not one or two of these.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{0}' is neither of one IP version nor of both, with a comma in between")]
pub struct InvalidDual(pub String);

/// The address, if it is of IPv4.
#[must_use]
pub const fn ipv4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

/// The address, if it is of IPv6.
#[must_use]
pub const fn ipv6(address: IpAddr) -> Option<Ipv6Addr> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(address) => Some(address),
    }
}

/// The address and its port, if it is of IPv4.
#[must_use]
pub const fn socket_ipv4(address: SocketAddr) -> Option<SocketAddrV4> {
    match address {
        SocketAddr::V4(address) => Some(address),
        SocketAddr::V6(_) => None,
    }
}

impl<A: Copy, B: Copy> Dual<A, B> {
    /// Nothing, if there is neither.
    #[must_use]
    pub const fn new(ipv4: Option<A>, ipv6: Option<B>) -> Option<Self> {
        match (&ipv4, &ipv6) {
            (None, None) => None,
            _ => Some(Self { ipv4, ipv6 }),
        }
    }

    /// That of IPv4, and that of IPv6 if there is one.
    #[must_use]
    pub const fn with_ipv4(ipv4: A, ipv6: Option<B>) -> Self {
        Self {
            ipv4: Some(ipv4),
            ipv6,
        }
    }

    /// That of IPv6, without one of IPv4.
    #[must_use]
    pub const fn with_ipv6(ipv6: B) -> Self {
        Self {
            ipv4: None,
            ipv6: Some(ipv6),
        }
    }

    /// That of IPv4.
    #[must_use]
    pub const fn ipv4(&self) -> Option<A> {
        self.ipv4
    }

    /// That of IPv6.
    #[must_use]
    pub const fn ipv6(&self) -> Option<B> {
        self.ipv6
    }

    /// What these make of what there is.
    pub fn map<C, D>(self, ipv4: impl FnOnce(A) -> C, ipv6: impl FnOnce(B) -> D) -> Dual<C, D> {
        Dual {
            ipv4: self.ipv4.map(ipv4),
            ipv6: self.ipv6.map(ipv6),
        }
    }

    /// What there is, IPv4 first.
    pub fn iter<T: From<A> + From<B>>(&self) -> impl Iterator<Item = T> {
        let ipv4 = self.ipv4.map(T::from);
        ipv4.into_iter().chain(self.ipv6.map(T::from))
    }
}

impl Nets {
    /// Whether all of these prefixes are inside, each in that of its version.
    #[must_use]
    pub fn contains(&self, other: Self) -> bool {
        let ipv4 = |net| self.ipv4.is_some_and(|own| own.contains(&net));
        let ipv6 = |net| self.ipv6.is_some_and(|own| own.contains(&net));
        other.ipv4.is_none_or(ipv4) && other.ipv6.is_none_or(ipv6)
    }

    /// The same prefixes without the bits behind them.
    #[must_use]
    pub fn trunc(&self) -> Self {
        self.map(|net| net.trunc(), |net| net.trunc())
    }

    /// Hosts' addresses with the lengths of these prefixes, of the versions that both have.
    #[must_use]
    pub fn of_hosts(&self, hosts: Addresses) -> Option<Self> {
        let ipv4 = self.ipv4.zip(hosts.ipv4);
        let ipv6 = self.ipv6.zip(hosts.ipv6);
        Self::new(
            ipv4.and_then(|(net, host)| Ipv4Net::new(host, net.prefix_len()).ok()),
            ipv6.and_then(|(net, host)| Ipv6Net::new(host, net.prefix_len()).ok()),
        )
    }

    /// The addresses without the length of their prefixes.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.map(|net| net.addr(), |net| net.addr())
    }
}

impl Addresses {
    /// The last of each version among these; nothing if there is none.
    #[must_use]
    pub fn collect(all: impl IntoIterator<Item = IpAddr>) -> Option<Self> {
        let mut found = Self {
            ipv4: None,
            ipv6: None,
        };
        for address in all {
            match address {
                IpAddr::V4(address) => found.ipv4 = Some(address),
                IpAddr::V6(address) => found.ipv6 = Some(address),
            }
        }
        Self::new(found.ipv4, found.ipv6)
    }
}

impl From<Ipv4Addr> for Addresses {
    fn from(address: Ipv4Addr) -> Self {
        Self {
            ipv4: Some(address),
            ipv6: None,
        }
    }
}

impl From<Ipv6Addr> for Addresses {
    fn from(address: Ipv6Addr) -> Self {
        Self {
            ipv4: None,
            ipv6: Some(address),
        }
    }
}

impl From<IpAddr> for Addresses {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => address.into(),
        }
    }
}

impl From<Ipv4Net> for Nets {
    fn from(net: Ipv4Net) -> Self {
        Self {
            ipv4: Some(net),
            ipv6: None,
        }
    }
}

impl From<IpNet> for Nets {
    fn from(net: IpNet) -> Self {
        match net {
            IpNet::V4(net) => net.into(),
            IpNet::V6(net) => Self {
                ipv4: None,
                ipv6: Some(net),
            },
        }
    }
}

impl<A: fmt::Display, B: fmt::Display> fmt::Display for Dual<A, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.ipv4, &self.ipv6) {
            (Some(ipv4), Some(ipv6)) => write!(f, "{ipv4},{ipv6}"),
            (Some(ipv4), None) => ipv4.fmt(f),
            (None, Some(ipv6)) => ipv6.fmt(f),
            (None, None) => Ok(()),
        }
    }
}

impl<A: FromStr, B: FromStr> FromStr for Dual<A, B> {
    type Err = InvalidDual;

    fn from_str(text: &str) -> Result<Self, InvalidDual> {
        let invalid = || InvalidDual(text.to_owned());
        let (mut ipv4, mut ipv6) = (None, None);
        for part in text.split(',') {
            match (part.parse::<A>(), part.parse::<B>()) {
                (Ok(part), _) if ipv4.is_none() => ipv4 = Some(part),
                (Err(_), Ok(part)) if ipv6.is_none() => ipv6 = Some(part),
                _ => return Err(invalid()),
            }
        }
        Ok(Self { ipv4, ipv6 })
    }
}

impl<A: fmt::Display, B: fmt::Display> Serialize for Dual<A, B> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "schema")]
impl<A, B> schemars::JsonSchema for Dual<A, B> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Dual".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string" })
    }
}

impl<'de, A: FromStr, B: FromStr> Deserialize<'de> for Dual<A, B> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_of_each_version_at_most() {
        for text in ["10.244.1.2", "fd00::2", "10.244.1.2,fd00::2"] {
            let addresses: Addresses = text.parse().unwrap();
            assert_eq!(addresses.to_string(), text);
            let json = serde_json::to_string(&addresses).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<Addresses>(&json).unwrap(), addresses);
            let all: Vec<IpAddr> = addresses.iter().collect();
            assert_eq!(all.len(), text.split(',').count());
        }
        let swapped: Addresses = "fd00::2,10.244.1.2".parse().unwrap();
        assert_eq!(swapped.to_string(), "10.244.1.2,fd00::2");
        for bad in [
            "",
            ",",
            "10.244.1.2,",
            "10.244.1.2,10.244.1.3",
            "::1,::2",
            "x",
        ] {
            assert!(bad.parse::<Addresses>().is_err(), "{bad}");
        }
        assert_eq!(Addresses::new(None, None), None);
    }

    #[test]
    fn nets_have_addresses() {
        let nets: Nets = "10.244.1.2/24,fd00::2/64".parse().unwrap();
        assert_eq!(nets.addresses().to_string(), "10.244.1.2,fd00::2");
        assert_eq!(nets.ipv4().unwrap().prefix_len(), 24);
        assert!("10.244.1.2".parse::<Nets>().is_err());
    }
}
