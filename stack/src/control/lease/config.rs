//! The network's configuration: what flannel's administrators write under `<prefix>/config`.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::vxlan::{self, Vni};
use muslin_encap::tunnel::{udp, wireguard};
use serde_json::{Value, json};
use thiserror::Error;

use super::key::overlap;
use super::text::shorten;
use crate::addresses::Nets;
use crate::secret::Secret;

/// A validated configuration with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Whether nodes have IPv4 subnets. If not, what follows of IPv4 has no subnet.
    pub enable_ipv4: bool,
    /// All pods of the cluster.
    pub network: Ipv4Net,
    /// Prefix length of a node's subnet.
    pub subnet_len: u8,
    /// The first subnet to lease.
    pub subnet_min: Ipv4Addr,
    /// The last subnet to lease.
    pub subnet_max: Ipv4Addr,
    /// The same for IPv6, if nodes have IPv6 subnets.
    pub ipv6: Option<Ipv6Range>,
    /// How packets travel between nodes.
    pub backend: Backend,
}

/// The IPv6 subnets of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Range {
    /// All pods of the cluster.
    pub network: Ipv6Net,
    /// Prefix length of a node's subnet.
    pub subnet_len: u8,
    /// The first subnet to lease.
    pub subnet_min: Ipv6Addr,
    /// The last subnet to lease.
    pub subnet_max: Ipv6Addr,
}

/// How packets travel between nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// VXLAN.
    Vxlan(VxlanOptions),
    /// flannel's UDP format, on this port.
    Udp {
        /// UDP port of every node.
        port: u16,
    },
    /// No encapsulation: nodes are each other's next hops.
    HostGw,
    /// IPv4 in IPv4.
    Ipip {
        /// Packets go bare to nodes on the same link.
        direct_routing: bool,
    },
    /// WireGuard.
    WireGuard(WireGuardOptions),
    /// Another backend of flannel's, by its name.
    Other(String),
}

/// Options of the VXLAN backend.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VxlanOptions {
    /// The network's identifier.
    pub vni: Vni,
    /// UDP port of every node.
    pub port: u16,
    /// The underlay's MTU, if it is not that of the interface.
    pub mtu: Option<Mtu>,
    /// Frames may come straight from nodes on the same link.
    pub direct_routing: bool,
    /// Nodes may learn from frames where others are.
    pub learning: bool,
    /// Frames may carry a group of the group based policy extension.
    pub gbp: bool,
}

impl Default for VxlanOptions {
    fn default() -> Self {
        Self {
            vni: VNI,
            port: vxlan::PORT,
            mtu: None,
            direct_routing: false,
            learning: false,
            gbp: false,
        }
    }
}

impl VxlanOptions {
    /// The switches that are on, by flannel's names.
    pub fn switches(&self) -> impl Iterator<Item = &'static str> + use<> {
        let all = [
            ("DirectRouting", self.direct_routing),
            ("Learning", self.learning),
            ("GBP", self.gbp),
        ];
        all.into_iter().filter_map(|(name, on)| on.then_some(name))
    }
}

/// Options of the WireGuard backend.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WireGuardOptions {
    /// UDP port of every node; with a device for each IP version that of IPv4.
    pub listen_port: u16,
    /// That of IPv6, with a device for each IP version.
    pub listen_port_v6: u16,
    /// How many devices nodes have, and which addresses of theirs they use.
    pub mode: WireGuardMode,
    /// The secret that all pairs of nodes share beside their keys.
    pub psk: Option<Secret>,
    /// Seconds between messages that keep a way through NAT open; 0 for none.
    pub keepalive: u16,
    /// The underlay's MTU, if it is not that of the interface.
    pub mtu: Option<Mtu>,
}

impl Default for WireGuardOptions {
    fn default() -> Self {
        Self {
            listen_port: wireguard::PORT,
            listen_port_v6: wireguard::PORT_V6,
            mode: WireGuardMode::Separate,
            psk: None,
            keepalive: 0,
            mtu: None,
        }
    }
}

impl WireGuardOptions {
    /// The UDP ports of a node.
    #[must_use]
    pub const fn ports(&self) -> TunnelPorts {
        TunnelPorts {
            ipv4: self.listen_port,
            ipv6: match self.mode.is_single() {
                true => self.listen_port,
                false => self.listen_port_v6,
            },
        }
    }
}

/// How nodes of the WireGuard backend reach each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WireGuardMode {
    /// Each IP version by itself, on a port of its own.
    #[default]
    Separate,
    /// Both by one port, and by the IPv4 or the IPv6 address of a node, whichever seems to be better.
    Auto,
    /// Both by one port and IPv4 addresses.
    Ipv4,
    /// Both by one port and IPv6 addresses.
    Ipv6,
}

impl WireGuardMode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Separate, Self::Auto, Self::Ipv4, Self::Ipv6];

    /// flannel's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Separate => "separate",
            Self::Auto => "auto",
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }

    /// Whether packets of both IP versions go the same way.
    #[must_use]
    pub const fn is_single(self) -> bool {
        !matches!(self, Self::Separate)
    }
}

impl FromStr for WireGuardMode {
    type Err = NetworkConfigError;

    fn from_str(text: &str) -> Result<Self, NetworkConfigError> {
        let mut all = Self::ALL.into_iter();
        let found = all.find(|mode| mode.name() == text);
        found.ok_or_else(|| NetworkConfigError::WireGuardMode(shorten(&text)))
    }
}

/// UDP ports of a node's tunnel by the IP version that carries it, 0 where there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TunnelPorts {
    /// That of IPv4.
    pub ipv4: u16,
    /// That of IPv6.
    pub ipv6: u16,
}

impl TunnelPorts {
    /// One port for both.
    #[must_use]
    pub const fn same(port: u16) -> Self {
        Self {
            ipv4: port,
            ipv6: port,
        }
    }

    /// The port for the IP version of an address.
    #[must_use]
    pub const fn of(self, address: IpAddr) -> u16 {
        match address {
            IpAddr::V4(_) => self.ipv4,
            IpAddr::V6(_) => self.ipv6,
        }
    }

    /// Those that there are.
    pub fn iter(self) -> impl Iterator<Item = u16> {
        let ipv6 = (self.ipv6 != self.ipv4).then_some(self.ipv6);
        let all = [Some(self.ipv4), ipv6].into_iter().flatten();
        all.filter(|port| *port != 0)
    }
}

/// Addresses of IPv6 that pods cannot have, and what they are (RFC 4291 section 2.4).
const UNFIT: [(Ipv6Net, &str); 5] = [
    (net([0; 8], 128), "unspecified"),
    (net([0, 0, 0, 0, 0, 0, 0, 1], 128), "loopback"),
    (net([0, 0, 0, 0, 0, 0xffff, 0, 0], 96), "IPv4-mapped"),
    (net([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), "link-local"),
    (net([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), "multicast"),
];

const fn net(segments: [u16; 8], len: u8) -> Ipv6Net {
    let [a, b, c, d, e, f, g, h] = segments;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), len)
}

/// flannel's VNI where none is named.
const VNI: Vni = match Vni::new(1) {
    Ok(vni) => vni,
    Err(_) => unreachable!(),
};

impl Backend {
    /// The backend's name in configurations.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Vxlan(_) => "vxlan",
            Self::Udp { .. } => "udp",
            Self::HostGw => "host-gw",
            Self::Ipip { .. } => "ipip",
            Self::WireGuard(_) => "wireguard",
            Self::Other(name) => name,
        }
    }

    /// Whether packets go bare to nodes on the same link.
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        match self {
            Self::HostGw => true,
            Self::Vxlan(options) => options.direct_routing,
            Self::Ipip { direct_routing } => *direct_routing,
            Self::Udp { .. } | Self::WireGuard(_) | Self::Other(_) => false,
        }
    }

    /// The UDP ports of all nodes' tunnels.
    #[must_use]
    pub const fn ports(&self) -> TunnelPorts {
        match self {
            Self::Vxlan(options) => TunnelPorts::same(options.port),
            Self::Udp { port } => TunnelPorts::same(*port),
            Self::WireGuard(options) => options.ports(),
            Self::HostGw | Self::Ipip { .. } | Self::Other(_) => TunnelPorts::same(0),
        }
    }

    /// The secret that all pairs of nodes share, if there is one.
    #[must_use]
    pub const fn psk(&self) -> Option<&Secret> {
        match self {
            Self::WireGuard(options) => options.psk.as_ref(),
            _ => None,
        }
    }

    /// How nodes reach each other, if the backend is WireGuard.
    #[must_use]
    pub const fn wireguard_mode(&self) -> Option<WireGuardMode> {
        match self {
            Self::WireGuard(options) => Some(options.mode),
            _ => None,
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NetworkConfigError {
    /// It is not a JSON object.
    #[error("the network configuration is not a JSON object: {0}")]
    Json(String),
    /// A field has a value of the wrong kind.
    #[error("in the network configuration, {field} cannot be {value}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// Its value as JSON.
        value: String,
    },
    /// It does not say which addresses pods have.
    #[error("the network configuration has no Network")]
    NoNetwork,
    /// It enables neither IPv4 nor IPv6.
    #[error("the network configuration has neither EnableIPv4 nor EnableIPv6")]
    NoFamily,
    /// IPv6 is enabled without addresses.
    #[error("the network configuration has EnableIPv6 and no IPv6Network")]
    NoIpv6Network,
    /// The backend carries no IPv6.
    #[error(
        "the network configuration has EnableIPv6, and the backend {0} carries no IPv6: use vxlan, wireguard or host-gw"
    )]
    NoIpv6Backend(&'static str),
    /// The IPv6 subnets do not fit the network.
    #[error("IPv6 subnets of length {len} do not fit the network {network}: use {min} to 126", min = network.prefix_len() + 2)]
    Ipv6SubnetLen {
        /// The network.
        network: Ipv6Net,
        /// The requested length.
        len: u64,
    },
    /// The network has addresses that no pod can have.
    #[error("pods cannot have addresses of {network}: {kind} ones are in it")]
    Ipv6Unfit {
        /// The network.
        network: Ipv6Net,
        /// What these addresses are.
        kind: &'static str,
    },
    /// The network is too small to be divided.
    #[error("the network {0} is too small: at most /124 can be divided into subnets")]
    Ipv6TooSmall(Ipv6Net),
    /// A bound that is not a subnet of the network.
    #[error("{field} {value} is not the base of a subnet of the network")]
    Ipv6Bound {
        /// `IPv6SubnetMin` or `IPv6SubnetMax`.
        field: &'static str,
        /// Its value.
        value: Ipv6Addr,
    },
    /// The bounds leave no subnet.
    #[error("IPv6SubnetMin {0} is above IPv6SubnetMax {1}")]
    Ipv6Bounds(Ipv6Addr, Ipv6Addr),
    /// The subnets do not fit the network.
    #[error("subnets of length {len} do not fit the network {network}: use {min} to 30", min = network.prefix_len() + 2)]
    SubnetLen {
        /// The network.
        network: Ipv4Net,
        /// The requested length.
        len: u64,
    },
    /// The network is too small to be divided.
    #[error("the network {0} is too small: at most /28 can be divided into subnets")]
    TooSmall(Ipv4Net),
    /// A bound that is not a subnet of the network.
    #[error("{field} {value} is not the base of a subnet of the network")]
    Bound {
        /// `SubnetMin` or `SubnetMax`.
        field: &'static str,
        /// Its value.
        value: Ipv4Addr,
    },
    /// The bounds leave no subnet.
    #[error("SubnetMin {0} is above SubnetMax {1}")]
    Bounds(Ipv4Addr, Ipv4Addr),
    /// A mode that is none of WireGuard's.
    #[error("in the network configuration, Mode cannot be {0}: use separate, auto, ipv4 or ipv6")]
    WireGuardMode(String),
    /// All nodes are reached by an IP version that they do not have.
    #[error("the network configuration has Mode {mode}, which needs {field}")]
    WireGuardFamily {
        /// The mode's name.
        mode: &'static str,
        /// `EnableIPv4` or `EnableIPv6`.
        field: &'static str,
    },
    /// A preshared key that is none. It is not repeated: it may be one with a mistake.
    #[error(
        "in the network configuration, PSK is no key: it must be 32 bytes in base64, 44 characters as \
         'wg genpsk' makes them"
    )]
    Psk,
    /// A backend without a type.
    #[error("the network configuration has a Backend without a Type")]
    NoBackendType,
}

impl NetworkConfig {
    /// The pods of the cluster.
    #[must_use]
    pub fn networks(&self) -> Nets {
        let ipv4 = self.enable_ipv4.then_some(self.network);
        let ipv6 = self.ipv6.map(|range| range.network);
        Nets::new(ipv4, ipv6).unwrap_or_else(|| self.network.into())
    }

    /// A configuration of these parts, with flannel's defaults for the others.
    ///
    /// # Errors
    /// `NetworkConfigError` if the subnets do not fit the network.
    pub fn new(
        network: Ipv4Net,
        subnet_len: Option<u8>,
        backend: Backend,
    ) -> Result<Self, NetworkConfigError> {
        let network = network.trunc();
        let subnet_len = match subnet_len {
            None if network.prefix_len() <= 22 => 24,
            None if network.prefix_len() <= 28 => network.prefix_len() + 2,
            None => return Err(NetworkConfigError::TooSmall(network)),
            Some(len) if (network.prefix_len() + 2..=30).contains(&len) => len,
            Some(len) => {
                return Err(NetworkConfigError::SubnetLen {
                    network,
                    len: len.into(),
                });
            }
        };
        let size = 1u32 << (32 - subnet_len);
        let subnet_min = Ipv4Addr::from(u32::from(network.network()) + size);
        let subnet_max = Ipv4Addr::from(u32::from(network.broadcast()) - (size - 1));
        Ok(Self {
            enable_ipv4: true,
            network,
            subnet_len,
            subnet_min,
            subnet_max,
            ipv6: None,
            backend,
        })
    }

    /// Reads and validates a configuration as flannel does.
    ///
    /// # Errors
    /// `NetworkConfigError` that names the field.
    pub fn parse(text: &str) -> Result<Self, NetworkConfigError> {
        let mut fields = Fields(fields(text).map_err(NetworkConfigError::Json)?);
        let enable_ipv4 = fields.bool("EnableIPv4")?.unwrap_or(true);
        let ipv6 = Ipv6Range::read(&mut fields)?;
        if !enable_ipv4 {
            let range = ipv6.ok_or(NetworkConfigError::NoFamily)?;
            return Self::ipv6_only(range, fields.backend()?);
        }
        let network = fields
            .parsed::<Ipv4Net>("Network")?
            .ok_or(NetworkConfigError::NoNetwork)?;
        let subnet_len = match fields.number("SubnetLen")?.filter(|len| *len != 0) {
            None => None,
            Some(len) => Some(
                u8::try_from(len).map_err(|_| NetworkConfigError::SubnetLen { network, len })?,
            ),
        };
        let (min, max) = (fields.parsed("SubnetMin")?, fields.parsed("SubnetMax")?);
        let mut config = Self::new(network, subnet_len, fields.backend()?)?;
        if let Some(min) = min {
            config.subnet_min = config.check_bound("SubnetMin", min)?;
        }
        if let Some(max) = max {
            config.subnet_max = config.check_bound("SubnetMax", max)?;
        }
        if config.subnet_min > config.subnet_max {
            return Err(NetworkConfigError::Bounds(
                config.subnet_min,
                config.subnet_max,
            ));
        }
        match ipv6 {
            Some(range) => config.with_ipv6(range),
            None => config.without_ipv6(),
        }
    }

    /// The same with IPv6 subnets.
    ///
    /// # Errors
    /// `NetworkConfigError` if the backend carries no IPv6.
    pub fn with_ipv6(self, range: Ipv6Range) -> Result<Self, NetworkConfigError> {
        match self.backend {
            Backend::Udp { .. } => Err(NetworkConfigError::NoIpv6Backend("udp")),
            Backend::Ipip { .. } => Err(NetworkConfigError::NoIpv6Backend("ipip")),
            Backend::Vxlan(_) | Backend::HostGw | Backend::WireGuard(_) | Backend::Other(_) => {
                Ok(Self {
                    ipv6: Some(range),
                    ..self
                })
            }
        }
    }

    /// The same without IPv6 subnets.
    ///
    /// # Errors
    /// `NetworkConfigError` if nodes reach each other by IPv6 alone.
    pub fn without_ipv6(self) -> Result<Self, NetworkConfigError> {
        match self.backend.wireguard_mode() {
            Some(mode @ WireGuardMode::Ipv6) => Err(NetworkConfigError::WireGuardFamily {
                mode: mode.name(),
                field: "EnableIPv6",
            }),
            _ => Ok(Self { ipv6: None, ..self }),
        }
    }

    /// A configuration with IPv6 subnets alone.
    ///
    /// # Errors
    /// `NetworkConfigError` if the backend carries no IPv6, or nodes reach each other by IPv4 alone.
    pub fn ipv6_only(range: Ipv6Range, backend: Backend) -> Result<Self, NetworkConfigError> {
        if let Some(mode @ WireGuardMode::Ipv4) = backend.wireguard_mode() {
            return Err(NetworkConfigError::WireGuardFamily {
                mode: mode.name(),
                field: "EnableIPv4",
            });
        }
        let nothing = Self {
            enable_ipv4: false,
            network: Ipv4Net::default(),
            subnet_len: 0,
            subnet_min: Ipv4Addr::UNSPECIFIED,
            subnet_max: Ipv4Addr::UNSPECIFIED,
            ipv6: None,
            backend,
        };
        nothing.with_ipv6(range)
    }

    fn check_bound(
        &self,
        field: &'static str,
        value: Ipv4Addr,
    ) -> Result<Ipv4Addr, NetworkConfigError> {
        let aligned = Ipv4Net::new(value, self.subnet_len).is_ok_and(|net| net.network() == value);
        if aligned && self.network.contains(&value) {
            Ok(value)
        } else {
            Err(NetworkConfigError::Bound { field, value })
        }
    }

    /// Whether a node of this network can have `subnet`.
    #[must_use]
    pub fn allows(&self, subnet: Ipv4Net) -> bool {
        self.enable_ipv4
            && subnet.prefix_len() == self.subnet_len
            && (self.subnet_min..=self.subnet_max).contains(&subnet.network())
    }

    /// Every subnet to lease, upward.
    pub fn subnets(&self) -> impl Iterator<Item = Ipv4Net> + use<> {
        let (len, is_enabled) = (self.subnet_len, self.enable_ipv4);
        let (min, max) = (u32::from(self.subnet_min), u32::from(self.subnet_max));
        (min..=max)
            .step_by(1 << (32 - len.max(1)))
            .filter_map(move |base| Ipv4Net::new(base.into(), len).ok())
            .filter(move |_| is_enabled)
    }

    /// The configuration as JSON that flannel reads.
    #[must_use]
    pub fn to_json(&self) -> String {
        let backend = match &self.backend {
            Backend::Udp { port } => json!({"Type": "udp", "Port": port}),
            Backend::HostGw => json!({"Type": "host-gw"}),
            Backend::Ipip {
                direct_routing: true,
            } => json!({"Type": "ipip", "DirectRouting": true}),
            Backend::Ipip { .. } => json!({"Type": "ipip"}),
            Backend::Other(name) => json!({"Type": name}),
            Backend::Vxlan(options) => options.to_json(),
            Backend::WireGuard(options) => options.to_json(),
        };
        let mut config = if self.enable_ipv4 {
            json!({
                "Network": self.network,
                "SubnetLen": self.subnet_len,
                "SubnetMin": self.subnet_min,
                "SubnetMax": self.subnet_max,
            })
        } else {
            json!({ "EnableIPv4": false })
        };
        if let Some(range) = &self.ipv6 {
            config["EnableIPv6"] = true.into();
            config["IPv6Network"] = range.network.to_string().into();
            config["IPv6SubnetLen"] = range.subnet_len.into();
            config["IPv6SubnetMin"] = range.subnet_min.to_string().into();
            config["IPv6SubnetMax"] = range.subnet_max.to_string().into();
        }
        config["Backend"] = backend;
        config.to_string()
    }
}

impl fmt::Display for NetworkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.enable_ipv4 {
            write!(f, "{} in subnets of /{}, ", self.network, self.subnet_len)?;
        }
        if let Some(range) = &self.ipv6 {
            write!(f, "{} in subnets of /{}, ", range.network, range.subnet_len)?;
        }
        match &self.backend {
            Backend::Vxlan(vxlan) => {
                write!(f, "vxlan VNI {} port {}", vxlan.vni, vxlan.port)?;
                let mut switches = vxlan.switches();
                switches.try_for_each(|switch| write!(f, " {switch}"))
            }
            Backend::Udp { port } => write!(f, "udp port {port}"),
            Backend::Ipip {
                direct_routing: true,
            } => f.write_str("ipip DirectRouting"),
            Backend::WireGuard(options) => write!(f, "wireguard {options}"),
            Backend::HostGw | Backend::Ipip { .. } | Backend::Other(_) => {
                f.write_str(self.backend.name())
            }
        }
    }
}

impl Ipv6Range {
    /// The subnets of a network, with flannel's defaults.
    ///
    /// # Errors
    /// `NetworkConfigError` if pods cannot have addresses of the network, or the subnets do not fit it.
    pub fn new(network: Ipv6Net, subnet_len: Option<u8>) -> Result<Self, NetworkConfigError> {
        let network = network.trunc();
        if let Some((_, kind)) = UNFIT.iter().find(|(unfit, _)| overlap(*unfit, network)) {
            return Err(NetworkConfigError::Ipv6Unfit { network, kind });
        }
        let subnet_len = match subnet_len {
            None if network.prefix_len() <= 62 => 64,
            None if network.prefix_len() <= 124 => network.prefix_len() + 2,
            None => return Err(NetworkConfigError::Ipv6TooSmall(network)),
            Some(len) if len <= 126 && len >= network.prefix_len() + 2 => len,
            Some(len) => {
                let len = len.into();
                return Err(NetworkConfigError::Ipv6SubnetLen { network, len });
            }
        };
        let size = 1u128 << (128 - subnet_len);
        Ok(Self {
            network,
            subnet_len,
            subnet_min: (u128::from(network.network()) + size).into(),
            subnet_max: (u128::from(network.broadcast()) - (size - 1)).into(),
        })
    }

    /// What the fields say; nothing if IPv6 is not enabled.
    fn read(fields: &mut Fields) -> Result<Option<Self>, NetworkConfigError> {
        let is_enabled = fields.bool("EnableIPv6")?.unwrap_or_default();
        let network = fields.parsed::<Ipv6Net>("IPv6Network")?;
        let len = fields.number("IPv6SubnetLen")?.filter(|len| *len != 0);
        let bounds = (
            fields.parsed("IPv6SubnetMin")?,
            fields.parsed("IPv6SubnetMax")?,
        );
        if !is_enabled {
            return Ok(None);
        }
        let network = network.ok_or(NetworkConfigError::NoIpv6Network)?;
        let too_long = |len| NetworkConfigError::Ipv6SubnetLen { network, len };
        let len = len.map(|len| u8::try_from(len).map_err(|_| too_long(len)));
        let mut range = Self::new(network, len.transpose()?)?;
        if let Some(min) = bounds.0 {
            range.subnet_min = range.check_bound("IPv6SubnetMin", min)?;
        }
        if let Some(max) = bounds.1 {
            range.subnet_max = range.check_bound("IPv6SubnetMax", max)?;
        }
        let Self {
            subnet_min,
            subnet_max,
            ..
        } = range;
        if subnet_min > subnet_max {
            return Err(NetworkConfigError::Ipv6Bounds(subnet_min, subnet_max));
        }
        Ok(Some(range))
    }

    fn check_bound(
        &self,
        field: &'static str,
        value: Ipv6Addr,
    ) -> Result<Ipv6Addr, NetworkConfigError> {
        let aligned = Ipv6Net::new(value, self.subnet_len).is_ok_and(|net| net.network() == value);
        if aligned && self.network.contains(&value) {
            Ok(value)
        } else {
            Err(NetworkConfigError::Ipv6Bound { field, value })
        }
    }

    /// Whether a node of this network can have `subnet`.
    #[must_use]
    pub fn allows(&self, subnet: Ipv6Net) -> bool {
        subnet.prefix_len() == self.subnet_len
            && (self.subnet_min..=self.subnet_max).contains(&subnet.network())
    }
}

/// Why no node of a network can have a subnet that is not among those to lease.
pub(super) fn misfit(
    subnet: IpNet,
    network: IpNet,
    len: u8,
    min: impl fmt::Display,
    max: impl fmt::Display,
    prefix: &str,
) -> String {
    if !network.contains(&subnet) {
        format!("it is not in the network {network}")
    } else if subnet.prefix_len() != len {
        format!("the network's {prefix}SubnetLen is {len}")
    } else {
        format!("it is not between {prefix}SubnetMin {min} and {prefix}SubnetMax {max}")
    }
}

impl Backend {
    fn parse(value: &Value) -> Result<Self, NetworkConfigError> {
        let object = fields(&value.to_string());
        let mut fields = Fields(object.map_err(|_| NetworkConfigError::Field {
            field: "Backend",
            // Not the value itself, in which a key may be.
            value: kind_of(value).to_owned(),
        })?);
        let kind = match fields.0.remove("type") {
            Some(Value::String(kind)) if !kind.is_empty() => kind.to_ascii_lowercase(),
            _ => return Err(NetworkConfigError::NoBackendType),
        };
        let port = fields.port()?;
        match kind.as_str() {
            "udp" => Ok(Self::Udp {
                port: port.unwrap_or(udp::PORT),
            }),
            "vxlan" => Ok(Self::Vxlan(VxlanOptions {
                vni: fields.checked("VNI", Vni::new)?.unwrap_or(VNI),
                port: port.unwrap_or(vxlan::PORT),
                mtu: fields.checked("MTU", Mtu::new)?,
                direct_routing: fields.bool("DirectRouting")?.unwrap_or_default(),
                learning: fields.bool("Learning")?.unwrap_or_default(),
                gbp: fields.bool("GBP")?.unwrap_or_default(),
            })),
            "host-gw" => Ok(Self::HostGw),
            "ipip" => Ok(Self::Ipip {
                direct_routing: fields.bool("DirectRouting")?.unwrap_or_default(),
            }),
            "wireguard" => WireGuardOptions::read(&mut fields).map(Self::WireGuard),
            _ => Ok(Self::Other(kind)),
        }
    }
}

impl VxlanOptions {
    fn to_json(&self) -> Value {
        let mut backend = json!({
            "Type": "vxlan", "VNI": self.vni.get(), "Port": self.port,
        });
        if let Some(mtu) = self.mtu {
            backend["MTU"] = mtu.get().into();
        }
        for switch in self.switches() {
            backend[switch] = true.into();
        }
        backend
    }
}

impl WireGuardOptions {
    fn read(fields: &mut Fields) -> Result<Self, NetworkConfigError> {
        let default = Self::default();
        let port = fields.checked("ListenPort", u16::try_from)?;
        let port_v6 = fields.checked("ListenPortV6", u16::try_from)?;
        let mode = match fields.0.remove("mode") {
            None | Some(Value::Null) => default.mode,
            Some(Value::String(mode)) => mode.parse()?,
            Some(other) => return Err(NetworkConfigError::WireGuardMode(shorten(&other))),
        };
        let psk = match fields.0.remove("psk") {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) if text.is_empty() => None,
            Some(Value::String(text)) => Some(text.parse().map_err(|_| NetworkConfigError::Psk)?),
            Some(_) => return Err(NetworkConfigError::Psk),
        };
        let keepalive = fields.checked("PersistentKeepaliveInterval", u16::try_from)?;
        Ok(Self {
            listen_port: port.unwrap_or(default.listen_port),
            listen_port_v6: port_v6.unwrap_or(default.listen_port_v6),
            mode,
            psk,
            keepalive: keepalive.unwrap_or_default(),
            mtu: fields.checked("MTU", Mtu::new)?,
        })
    }

    fn to_json(&self) -> Value {
        let mut backend = json!({
            "Type": "wireguard",
            "ListenPort": self.listen_port,
            "ListenPortV6": self.listen_port_v6,
            "Mode": self.mode.name(),
        });
        if let Some(psk) = &self.psk {
            backend["PSK"] = psk.to_text().as_str().into();
        }
        if self.keepalive != 0 {
            backend["PersistentKeepaliveInterval"] = self.keepalive.into();
        }
        if let Some(mtu) = self.mtu {
            backend["MTU"] = mtu.get().into();
        }
        backend
    }
}

impl fmt::Display for WireGuardOptions {
    /// Without the preshared key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            listen_port,
            listen_port_v6,
            mode,
            psk,
            keepalive,
            mtu,
        } = self;
        write!(f, "mode {} port {listen_port}", mode.name())?;
        if !mode.is_single() {
            write!(f, " and {listen_port_v6}")?;
        }
        if *keepalive != 0 {
            write!(f, " keepalive {keepalive}")?;
        }
        if let Some(mtu) = mtu {
            write!(f, " MTU {}", mtu.get())?;
        }
        match psk {
            Some(_) => f.write_str(" with a PSK"),
            None => Ok(()),
        }
    }
}

/// What a JSON value is, for people who must not see it.
fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The fields of a JSON object by their lower-case names: Go matches names whatever their case.
pub(super) fn fields(text: &str) -> Result<BTreeMap<String, Value>, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    // serde_json's own error of a text would repeat it.
    let Value::Object(object) = value else {
        return Err(format!("it is {}", kind_of(&value)));
    };
    Ok(object
        .into_iter()
        .map(|(name, value)| (name.to_ascii_lowercase(), value))
        .collect())
}

struct Fields(BTreeMap<String, Value>);

impl Fields {
    fn take<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, NetworkConfigError> {
        match self.0.remove(&field.to_ascii_lowercase()) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(&value) {
                Some(read) => Ok(Some(read)),
                None => Err(NetworkConfigError::Field {
                    field,
                    value: shorten(&value),
                }),
            },
        }
    }

    fn bool(&mut self, field: &'static str) -> Result<Option<bool>, NetworkConfigError> {
        self.take(field, Value::as_bool)
    }

    fn number(&mut self, field: &'static str) -> Result<Option<u64>, NetworkConfigError> {
        self.take(field, Value::as_u64)
    }

    fn parsed<T: std::str::FromStr>(
        &mut self,
        field: &'static str,
    ) -> Result<Option<T>, NetworkConfigError> {
        self.take(field, |value| value.as_str()?.parse().ok())
    }

    /// A number that zero stands for "default" of.
    fn checked<T, E>(
        &mut self,
        field: &'static str,
        check: impl FnOnce(u32) -> Result<T, E>,
    ) -> Result<Option<T>, NetworkConfigError> {
        let zero = |value: &Value| value.as_u64() == Some(0);
        if self.0.get(&field.to_ascii_lowercase()).is_some_and(zero) {
            return Ok(None);
        }
        self.take(field, |value| {
            check(u32::try_from(value.as_u64()?).ok()?).ok()
        })
    }

    fn backend(&mut self) -> Result<Backend, NetworkConfigError> {
        match self.0.remove("backend") {
            None | Some(Value::Null) => Ok(Backend::Udp { port: udp::PORT }),
            Some(value) => Backend::parse(&value),
        }
    }

    fn port(&mut self) -> Result<Option<u16>, NetworkConfigError> {
        self.checked("Port", u16::try_from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NetworkConfig, NetworkConfigError> {
        NetworkConfig::parse(text)
    }

    #[test]
    fn u13_defaults_are_flannels() {
        let config = parse(r#"{"network":"10.3.0.0/16"}"#).unwrap();
        assert_eq!(config.subnet_len, 24);
        assert_eq!(config.subnet_min, Ipv4Addr::new(10, 3, 1, 0));
        assert_eq!(config.subnet_max, Ipv4Addr::new(10, 3, 255, 0));
        assert_eq!(config.backend, Backend::Udp { port: 8285 });
        let config = parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap();
        let Backend::Vxlan(vxlan) = &config.backend else {
            panic!("{config:?}")
        };
        assert_eq!((vxlan.vni.get(), vxlan.port, vxlan.mtu), (1, 8472, None));
        for (network, subnet) in [(22, 24), (23, 25), (26, 28), (27, 29), (28, 30)] {
            let text = format!(r#"{{"Network":"10.3.0.0/{network}"}}"#);
            assert_eq!(parse(&text).unwrap().subnet_len, subnet, "{text}");
        }
        let too_small = Err(NetworkConfigError::TooSmall("10.3.0.0/29".parse().unwrap()));
        assert_eq!(parse(r#"{"Network":"10.3.0.0/29"}"#), too_small);
    }

    #[test]
    fn u13_what_is_said_counts() {
        let config = parse(
            r#"{"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.10.0.0",
                "SubnetMax":"10.99.0.0","Backend":{"type":"UDP","Port":7890}}"#,
        )
        .unwrap();
        assert_eq!(config.backend, Backend::Udp { port: 7890 });
        assert!(config.allows("10.10.16.0/20".parse().unwrap()));
        assert!(!config.allows("10.9.0.0/20".parse().unwrap()));
        assert!(!config.allows("10.10.16.0/24".parse().unwrap()));
        assert_eq!(
            config.subnets().next(),
            Some("10.10.0.0/20".parse().unwrap())
        );
        assert_eq!(
            config.subnets().last(),
            Some("10.99.0.0/20".parse().unwrap())
        );
        assert_eq!(parse(&config.to_json()), Ok(config));
        let other = parse(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"ipsec"}}"#).unwrap();
        assert_eq!(other.backend, Backend::Other("ipsec".to_owned()));
    }

    #[test]
    fn subnets_of_ipv6_have_flannels_defaults() {
        let ipv6 = |network: &str| {
            let text = format!(
                r#"{{"enableIPv6":true,"ipv6Network":"{network}","enableIPv4":false,
                    "backend":{{"type":"vxlan"}}}}"#
            );
            let config = parse(&text).unwrap();
            assert_eq!(parse(&config.to_json()), Ok(config.clone()));
            assert_eq!(config.subnets().count(), 0);
            assert!(!config.allows(Ipv4Net::default()));
            config.ipv6.unwrap()
        };
        let range = ipv6("fc00::/48");
        assert_eq!(range.subnet_len, 64);
        assert_eq!(
            range.subnet_min,
            "fc00:0:0:1::".parse::<Ipv6Addr>().unwrap()
        );
        assert_eq!(
            range.subnet_max,
            "fc00:0:0:ffff::".parse::<Ipv6Addr>().unwrap()
        );
        for (network, subnet) in [(62, 64), (63, 65), (96, 98), (124, 126), (8, 64)] {
            assert_eq!(ipv6(&format!("fd00::/{network}")).subnet_len, subnet);
        }
    }

    #[test]
    fn dual_networks_are_read_told_and_written() {
        let text = r#"{"Network":"10.42.0.0/16","IPv6Network":"2001:cafe:42::/56","EnableIPv6":true,
            "IPv6SubnetMin":"2001:cafe:42:8::","Backend":{"Type":"vxlan","VNI":1,"Port":8472}}"#;
        let config = parse(text).unwrap();
        let range = config.ipv6.unwrap();
        for (subnet, is_allowed) in [
            ("2001:cafe:42:8::/64", true),
            ("2001:cafe:42:ff::/64", true),
            ("2001:cafe:42:7::/64", false),
            ("2001:cafe:42:8::/65", false),
            ("2001:cafe:43::/64", false),
        ] {
            assert_eq!(
                range.allows(subnet.parse().unwrap()),
                is_allowed,
                "{subnet}"
            );
        }
        assert!(config.enable_ipv4);
        assert!(
            config
                .to_string()
                .contains("2001:cafe:42::/56 in subnets of /64")
        );
        assert_eq!(parse(&config.to_json()), Ok(config));
        let off = r#"{"Network":"10.42.0.0/16","IPv6Network":"2001:cafe:42::/56"}"#;
        assert_eq!(parse(off).unwrap().ipv6, None);
    }

    #[test]
    fn a_network_may_have_one_subnet() {
        let text = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.9.0"}"#;
        let subnets: Vec<_> = parse(text).unwrap().subnets().collect();
        assert_eq!(subnets, ["10.5.9.0/24".parse().unwrap()]);
    }

    #[test]
    fn switches_of_vxlan_are_read_told_and_written() {
        let text = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","directrouting":true,
            "Learning":true,"GBP":true}}"#;
        let config = parse(text).unwrap();
        let Backend::Vxlan(vxlan) = &config.backend else {
            panic!("{config:?}")
        };
        assert!(vxlan.direct_routing && vxlan.learning && vxlan.gbp);
        assert!(config.to_string().ends_with("DirectRouting Learning GBP"));
        assert_eq!(parse(&config.to_json()), Ok(config));
    }

    #[test]
    fn backends_without_a_tunnel_are_told() {
        for (backend, is_direct) in [
            (r#"{"Type":"udp"}"#, false),
            (r#"{"Type":"vxlan"}"#, false),
            (r#"{"Type":"vxlan","DirectRouting":true}"#, true),
            (r#"{"Type":"ipip"}"#, false),
            (r#"{"Type":"ipip","DirectRouting":true}"#, true),
            (r#"{"Type":"host-gw"}"#, true),
            (r#"{"Type":"wireguard"}"#, false),
            (r#"{"Type":"ipsec"}"#, false),
        ] {
            let config = parse(&format!(
                r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#
            ));
            let config = config.unwrap();
            assert_eq!(config.backend.is_direct(), is_direct, "{backend}");
            assert_eq!(parse(&config.to_json()), Ok(config), "{backend}");
        }
    }

    /// As 'wg genpsk' makes them.
    const PSK: &str = "4HAXZFAg2aqXKxI1GMXTEDKcNJeuMEJRr8rjFO8XmEY=";

    fn wireguard(backend: &str) -> Result<WireGuardOptions, NetworkConfigError> {
        let text = format!(
            r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48",
                "Backend":{{"Type":"wireguard"{backend}}}}}"#
        );
        let config = parse(&text)?;
        assert_eq!(parse(&config.to_json()), Ok(config.clone()), "{backend}");
        match config.backend {
            Backend::WireGuard(options) => Ok(options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn wireguard_has_flannels_defaults() {
        let options = wireguard("").unwrap();
        assert_eq!(options, WireGuardOptions::default());
        assert_eq!(
            (options.listen_port, options.listen_port_v6),
            (51820, 51821)
        );
        assert_eq!(options.mode, WireGuardMode::Separate);
        let zero =
            r#","ListenPort":0,"ListenPortV6":0,"PSK":"","PersistentKeepaliveInterval":0,"MTU":0"#;
        assert_eq!(wireguard(zero), Ok(options));
    }

    #[test]
    fn wireguard_is_read_told_and_written() {
        let all = format!(
            r#","LISTENPORT":1000,"listenportv6":1001,"mode":"auto","psk":"{PSK}",
               "PersistentKeepaliveInterval":25,"mtu":1400"#
        );
        let options = wireguard(&all).unwrap();
        assert_eq!((options.listen_port, options.listen_port_v6), (1000, 1001));
        assert_eq!((options.mode, options.keepalive), (WireGuardMode::Auto, 25));
        assert_eq!(options.psk, PSK.parse().ok());
        assert_eq!(options.mtu.map(Mtu::get), Some(1400));
        let text = options.to_string();
        assert_eq!(text, "mode auto port 1000 keepalive 25 MTU 1400 with a PSK");
        assert_eq!(
            wireguard("").unwrap().to_string(),
            "mode separate port 51820 and 51821"
        );
    }

    #[test]
    fn nodes_listen_on_one_port_where_they_have_one_device() {
        for (mode, ipv6) in [("separate", 2), ("auto", 1), ("ipv4", 1), ("ipv6", 1)] {
            let options = format!(r#","Mode":"{mode}","ListenPort":1,"ListenPortV6":2"#);
            let ports = wireguard(&options).unwrap().ports();
            assert_eq!(ports, TunnelPorts { ipv4: 1, ipv6 }, "{mode}");
        }
        assert_eq!(TunnelPorts::same(0).iter().count(), 0);
        assert_eq!(TunnelPorts::same(1).iter().collect::<Vec<_>>(), [1]);
        let both = TunnelPorts { ipv4: 1, ipv6: 2 };
        assert_eq!(both.iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_preshared_key_is_nowhere_but_in_the_store() {
        let text = format!(
            r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"wireguard","PSK":"{PSK}"}}}}"#
        );
        let config = parse(&text).unwrap();
        assert!(config.to_json().contains(PSK));
        for shown in [config.to_string(), format!("{config:?}")] {
            assert!(!shown.contains(&PSK[..8]), "{shown}");
        }
        // Neither where there is a mistake.
        let quoted = serde_json::to_string(&text).unwrap();
        for mistaken in [
            text.replace(PSK, &PSK[..43]),
            text.replace(&format!(r#""{PSK}""#), &format!(r#"["{PSK}"]"#)),
            text.replace("}}", "}"),
            quoted.clone(),
            format!("[{quoted}]"),
            format!(r#"{{"Network":"10.5.0.0/16","Backend":{quoted}}}"#),
            format!(r#"{{"Network":"10.5.0.0/16","Backend":[{text}]}}"#),
        ] {
            let error = parse(&mistaken).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains(&PSK[..8]), "{shown}");
        }
    }

    #[test]
    fn wireguards_mistakes_are_named() {
        let short = r#","PSK":"4HAXZFAg2aqXKxI1GMXTEDKcNJeuMEJRr8rjFO8XmE=""#;
        for (backend, words) in [
            (
                r#","Mode":"ipv5""#,
                "Mode cannot be ipv5: use separate, auto, ipv4 or ipv6",
            ),
            (r#","Mode":"""#, "use separate, auto"),
            (r#","Mode":"Auto""#, "use separate, auto"),
            (r#","Mode":4"#, "Mode cannot be 4"),
            (short, "PSK is no key"),
            (r#","PSK":"secret""#, "32 bytes in base64"),
            (r#","PSK":7"#, "PSK is no key"),
            (r#","ListenPort":65536"#, "ListenPort cannot be 65536"),
            (r#","ListenPortV6":"x""#, "ListenPortV6 cannot be"),
            (
                r#","PersistentKeepaliveInterval":-1"#,
                "PersistentKeepaliveInterval cannot be -1",
            ),
            (r#","MTU":1"#, "MTU cannot be 1"),
        ] {
            let error = wireguard(backend).unwrap_err().to_string();
            assert!(error.contains(words), "{backend}: {error}");
        }
        let backend = r#""Backend":{"Type":"wireguard","Mode":"ipv6"}"#;
        let error = parse(&format!(r#"{{"Network":"10.5.0.0/16",{backend}}}"#)).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("Mode ipv6, which needs EnableIPv6")
        );
        let backend = backend.replace("ipv6", "ipv4");
        let text = format!(
            r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48",{backend}}}"#
        );
        let error = parse(&text).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("Mode ipv4, which needs EnableIPv4")
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (text, words) in [
            ("", "not a JSON object"),
            ("[]", "not a JSON object"),
            ("{}", "no Network"),
            (r#"{"Network":""}"#, "Network cannot be"),
            (r#"{"Network":"fc00::/48"}"#, "Network cannot be"),
            (r#"{"Network":"10.0.0.0/29"}"#, "too small"),
            (
                r#"{"Network":"10.0.0.0/16","SubnetLen":17}"#,
                "use 18 to 30",
            ),
            (
                r#"{"Network":"10.0.0.0/16","SubnetLen":31}"#,
                "use 18 to 30",
            ),
            (
                r#"{"Network":"10.0.0.0/16","SubnetLen":999}"#,
                "use 18 to 30",
            ),
            (
                r#"{"Network":"10.0.0.0/16","SubnetLen":"24"}"#,
                "SubnetLen cannot be",
            ),
            (
                r#"{"Network":"10.0.0.0/16","SubnetMin":"10.1.1.0"}"#,
                "SubnetMin 10.1.1.0",
            ),
            (
                r#"{"Network":"10.0.0.0/16","SubnetMax":"10.0.1.1"}"#,
                "SubnetMax 10.0.1.1",
            ),
            (
                r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.9.0","SubnetMax":"10.0.8.0"}"#,
                "above SubnetMax",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv4":false}"#,
                "neither EnableIPv4",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv6":true}"#,
                "no IPv6Network",
            ),
            (
                r#"{"Network":"10.0.0.0/16","IPv6Network":"10.1.0.0/16"}"#,
                "IPv6Network cannot be",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/125","Backend":{"Type":"vxlan"}}"#,
                "too small: at most /124",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":49}"#,
                "use 50 to 126",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":127}"#,
                "use 50 to 126",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":300}"#,
                "use 50 to 126",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetMin":"fd00::1"}"#,
                "IPv6SubnetMin fd00::1",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetMin":"fd00:0:0:9::","IPv6SubnetMax":"fd00:0:0:8::"}"#,
                "above IPv6SubnetMax",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"::/48"}"#,
                "unspecified",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"::1/128"}"#,
                "loopback",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"::ffff:10.1.0.0/112"}"#,
                "IPv4-mapped",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fe80:1::/48"}"#,
                "link-local",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"ff05::/48"}"#,
                "multicast",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#,
                "the backend udp carries no IPv6",
            ),
            (
                r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"ipip"}}"#,
                "the backend ipip carries no IPv6",
            ),
            (
                r#"{"Network":"10.0.0.0/16","Backend":{}}"#,
                "without a Type",
            ),
            (
                r#"{"Network":"10.0.0.0/16","Backend":{"Type":""}}"#,
                "without a Type",
            ),
            (
                r#"{"Network":"10.0.0.0/16","Backend":7}"#,
                "Backend cannot be",
            ),
            (
                r#"{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
                "VNI",
            ),
            (
                r#"{"Network":"10.0.0.0/16","Backend":{"Type":"udp","Port":65536}}"#,
                "Port",
            ),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
