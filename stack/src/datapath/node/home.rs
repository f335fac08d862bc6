//! The node's own subnets, and its addresses there.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::mtu::Mtu;

use super::{NodeConfig, NodeConfigError};
use crate::datapath::gateway;

/// The longest prefixes with room for a base, a gateway and a pod; in IPv4 for a broadcast address,
/// too.
const MAX_LEN: u8 = 30;
const MAX_LEN_V6: u8 = 126;

/// The subnet of IPv4.
#[derive(Debug, Clone, Copy)]
pub(super) struct Home {
    pub(super) subnet: Ipv4Net,
    /// The first address after the base.
    pub(super) gateway: Ipv4Addr,
    /// From which flannel nodes send.
    pub(super) base: Ipv4Addr,
    pub(super) broadcast: Ipv4Addr,
}

/// The subnet of IPv6.
#[derive(Debug, Clone, Copy)]
pub(super) struct HomeV6 {
    pub(super) subnet: Ipv6Net,
    /// The first address after the base.
    pub(super) gateway: Ipv6Addr,
    /// From which flannel nodes send, and the anycast address of the subnet's routers (RFC 4291
    /// section 2.6.1).
    pub(super) base: Ipv6Addr,
}

impl Home {
    fn new(subnet: Ipv4Net) -> Result<Self, NodeConfigError> {
        let subnet = subnet.trunc();
        if subnet.prefix_len() > MAX_LEN {
            return Err(NodeConfigError::TooSmall(subnet.into()));
        }
        let base = subnet.network();
        Ok(Self {
            subnet,
            gateway: gateway::address(subnet),
            base,
            broadcast: subnet.broadcast(),
        })
    }

    /// Whether an address is the gateway's.
    #[inline]
    pub(super) fn is_own(&self, address: Ipv4Addr) -> bool {
        address == self.gateway || address == self.base
    }
}

impl HomeV6 {
    fn new(subnet: Ipv6Net, mtu: Mtu) -> Result<Self, NodeConfigError> {
        let subnet = subnet.trunc();
        if subnet.prefix_len() > MAX_LEN_V6 {
            return Err(NodeConfigError::TooSmall(subnet.into()));
        }
        if mtu < Mtu::MIN_IPV6 {
            return Err(NodeConfigError::MtuTooSmall(mtu));
        }
        let base = subnet.network();
        Ok(Self {
            subnet,
            gateway: gateway::address_v6(subnet),
            base,
        })
    }

    /// Whether an address is the gateway's.
    #[inline]
    pub(super) fn is_own(&self, address: Ipv6Addr) -> bool {
        address == self.gateway || address == self.base || address == gateway::LINK_LOCAL
    }
}

/// The subnets of a node: of one IP version or of both.
pub(super) fn of(config: &NodeConfig) -> Result<(Option<Home>, Option<HomeV6>), NodeConfigError> {
    let ipv4 = config.subnet.ipv4().map(Home::new).transpose()?;
    let ipv6 = config.subnet.ipv6();
    let ipv6 = ipv6.map(|subnet| HomeV6::new(subnet, config.mtu_v6));
    Ok((ipv4, ipv6.transpose()?))
}
