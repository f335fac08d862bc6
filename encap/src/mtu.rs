//! Maximum transmission units.

use thiserror::Error;

/// A maximum transmission unit: the bytes of the largest IP packet, with its IP header and without
/// a link header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mtu(u16);

/// The number of bytes is no possible MTU of a link that carries IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("an MTU of {0} bytes is not possible: it must be 68 to 65535")]
pub struct InvalidMtu(pub u32);

impl Mtu {
    /// The smallest MTU of an IPv4 link (RFC 791 section 3.2): 68 bytes.
    pub const MIN: Self = Self(68);
    /// The smallest MTU of an IPv6 link (RFC 8200 section 5): 1,280 bytes.
    pub const MIN_IPV6: Self = Self(1280);
    /// The length of the longest IPv4 packet: 65,535 bytes.
    pub const MAX: Self = Self(u16::MAX);
    /// The MTU of Ethernet: 1,500 bytes.
    pub const ETHERNET: Self = Self(1500);

    /// An MTU of `bytes`.
    ///
    /// # Errors
    /// `InvalidMtu` below 68 or above 65535.
    pub fn new(bytes: u32) -> Result<Self, InvalidMtu> {
        match u16::try_from(bytes) {
            Ok(mtu) if mtu >= Self::MIN.0 => Ok(Self(mtu)),
            _ => Err(InvalidMtu(bytes)),
        }
    }

    /// Bytes of the largest IP packet.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mtu_is_one_that_ipv4_can_use() {
        assert_eq!(Mtu::new(67), Err(InvalidMtu(67)));
        assert_eq!(Mtu::new(65_536), Err(InvalidMtu(65_536)));
        assert_eq!(Mtu::new(65_535).unwrap().get(), 65_535);
    }
}
