//! Addresses, keys and times that all of a simulated cluster knows.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

use ipnet::Ipv6Net;
use smoltcp::time::Duration;

use crate::datapath::node::Limits;

/// Where the store has flannel's keys.
pub(super) const PREFIX: &str = "/coreos.com/network";
/// How long a frame takes between a pod and its node.
pub(super) const LOCAL: Duration = Duration::from_micros(5);
/// Bounds of a node's tables: few entries, so that they are reached.
pub(super) const LIMITS: Limits = Limits {
    fdb: 64,
    neighbours: 64,
};

/// A router on the way to servers.
pub(super) const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 254);
/// The same of IPv6.
pub(super) const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 254);
/// The metadata service of clouds.
pub(super) const METADATA: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80);
/// Where a node of VXLAN listens.
pub(super) const TUNNEL: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(172, 16, 0, 1), 8472);

/// A machine's public address after so many changes.
pub(super) fn address(machine: usize, changes: usize) -> Ipv4Addr {
    const FIRST: u32 = Ipv4Addr::new(172, 16, 0, 1).to_bits();
    Ipv4Addr::from_bits(FIRST + (changes as u32 % 200) * 4096 + machine as u32 % 4096)
}

/// The prefix of machines' public IPv6 addresses: with host-gw all are on one link.
pub(super) const PUBLIC_IPV6: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 0), 64);

/// The least MTU of an underlay with room for IPv6 and all headers of VXLAN over it (RFC 8200 section 5).
pub(super) const IPV6_UNDERLAY: u16 = 1350;

/// A machine's public IPv6 address where the network has IPv6; the last of three has none.
pub(super) fn public_ipv6(is_dual: bool, machine: usize) -> Option<Ipv6Addr> {
    let number = machine as u16 + 1;
    let address = Ipv6Addr::from_bits(PUBLIC_IPV6.network().to_bits() | u128::from(number));
    (is_dual && machine % 3 != 2).then_some(address)
}
