//! What `subnet.env` says, as text: written as flannel writes it, read as leniently as shells do.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

use crate::addresses::Dual;
use crate::datapath::gateway;

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// All pods of the cluster, and the node's subnet.
    pub subnets: Dual<(Ipv4Net, Ipv4Net), (Ipv6Net, Ipv6Net)>,
    /// MTU of pods in bytes.
    pub mtu: u16,
    /// Whether the daemon is to masquerade, so that nobody else must.
    pub ip_masq: bool,
}

impl fmt::Display for SubnetEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            subnets,
            mtu,
            ip_masq,
        } = self;
        if let Some((network, subnet)) = subnets.ipv4() {
            writeln!(f, "FLANNEL_NETWORK={network}")?;
            let first = gateway::address(subnet);
            writeln!(f, "FLANNEL_SUBNET={first}/{}", subnet.prefix_len())?;
        }
        if let Some((network, subnet)) = subnets.ipv6() {
            writeln!(f, "FLANNEL_IPV6_NETWORK={network}")?;
            let first = Ipv6Addr::from_bits(subnet.network().to_bits() | 1);
            writeln!(f, "FLANNEL_IPV6_SUBNET={first}/{}", subnet.prefix_len())?;
        }
        writeln!(f, "FLANNEL_MTU={mtu}")?;
        writeln!(f, "FLANNEL_IPMASQ={ip_masq}")
    }
}

/// The subnet that the file's text names; nothing if it names none or several.
#[must_use]
pub fn subnet_of(bytes: &[u8]) -> Option<Ipv4Net> {
    let subnet: Ipv4Net = only(bytes, "FLANNEL_SUBNET")?;
    Some(subnet.trunc())
}

/// The IPv6 subnet that the file's text names; nothing if it names none or several.
#[must_use]
pub fn ipv6_subnet_of(bytes: &[u8]) -> Option<Ipv6Net> {
    let subnet: Ipv6Net = only(bytes, "FLANNEL_IPV6_SUBNET")?;
    Some(subnet.trunc())
}

/// The only subnet in the last line of a name.
fn only<T: FromStr>(bytes: &[u8], name: &str) -> Option<T> {
    let text = String::from_utf8_lossy(bytes);
    let lines = dotenvy::from_read_iter(text.as_bytes());
    // A line that is none does not spoil the others.
    let pairs = lines.filter_map(|line| line.ok());
    let (_, value) = pairs.filter(|(key, _)| key == name).last()?;
    let mut subnets = value.split(',').filter_map(|text| text.trim().parse().ok());
    let first = subnets.next()?;
    subnets.next().is_none().then_some(first)
}
