//! MAC addresses: in the text form of Linux and Go, and made from IP addresses.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use smoltcp::wire::EthernetAddress;

/// Displays a MAC address in lower-case hex with colons (smoltcp displays it with dashes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DisplayMac(pub EthernetAddress);

impl fmt::Display for DisplayMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The MAC address of a pod that has an IPv4 address but no device: `0a:58` followed by that
/// address, as CNI plugins generate them.
#[must_use]
pub const fn from_ipv4(address: Ipv4Addr) -> EthernetAddress {
    let [a, b, c, d] = address.octets();
    EthernetAddress([0x0a, 0x58, a, b, c, d])
}

/// The MAC address of a pod that has an IPv6 address, but no IPv4 address and no device: that of the
/// IPv4 address which the last four bytes would be. In a subnet of more than 32 bits others may have it,
/// too.
#[must_use]
pub const fn from_ipv6(address: Ipv6Addr) -> EthernetAddress {
    let [.., a, b, c, d] = address.octets();
    from_ipv4(Ipv4Addr::new(a, b, c, d))
}
