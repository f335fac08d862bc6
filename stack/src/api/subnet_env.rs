//! What `subnet.env` says, as text: written as flannel writes it, read as leniently as shells do.

use std::fmt;

use ipnet::Ipv4Net;

use crate::datapath::gateway;

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// All pods of the cluster.
    pub network: Ipv4Net,
    /// The node's subnet.
    pub subnet: Ipv4Net,
    /// MTU of pods in bytes.
    pub mtu: u16,
    /// Whether the daemon is to masquerade, so that nobody else must.
    pub ip_masq: bool,
}

impl fmt::Display for SubnetEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            network,
            subnet,
            mtu,
            ip_masq,
        } = self;
        writeln!(f, "FLANNEL_NETWORK={network}")?;
        let first = gateway::address(*subnet);
        writeln!(f, "FLANNEL_SUBNET={first}/{}", subnet.prefix_len())?;
        writeln!(f, "FLANNEL_MTU={mtu}")?;
        writeln!(f, "FLANNEL_IPMASQ={ip_masq}")
    }
}

/// The subnet that the file's text names; nothing if it names none or several.
#[must_use]
pub fn subnet_of(bytes: &[u8]) -> Option<Ipv4Net> {
    let text = String::from_utf8_lossy(bytes);
    let lines = dotenvy::from_read_iter(text.as_bytes());
    // A line that is none does not spoil the others.
    let pairs = lines.filter_map(|line| line.ok());
    let (_, value) = pairs.filter(|(key, _)| key == "FLANNEL_SUBNET").last()?;
    let mut subnets = value
        .split(',')
        .filter_map(|text| text.trim().parse::<Ipv4Net>().ok());
    let first = subnets.next()?;
    subnets.next().is_none().then(|| first.trunc())
}
