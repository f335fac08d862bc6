//! What a node wants of its lease.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_encap::tunnel::wireguard::PublicKey;

use super::config::{Backend, NetworkConfig};
use super::record::{LeaseRecord, TunnelEnd};

/// How long a lease lives without renewal: flannel's 24 hours.
pub const LEASE_TTL: std::time::Duration = std::time::Duration::from_secs(86_400);

/// How much of a lease's time is left when it is renewed: half, so that a store can be away for
/// long.
pub const RENEW_MARGIN: std::time::Duration = std::time::Duration::from_secs(43_200);

/// Who a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Where its tunnel ends; one lease per address. It is unspecified of a node that has none, as in
    /// its record.
    pub public_ip: Ipv4Addr,
    /// The same for IPv6; without one a node has no IPv6 subnet ([`is_public_ipv6`]).
    pub public_ipv6: Option<Ipv6Addr>,
    /// Its VTEP.
    pub vtep_mac: VtepMac,
    /// Its public key, which a network of WireGuard needs.
    pub public_key: Option<PublicKey>,
}

impl Identity {
    /// The MAC address of its VTEP for IPv6.
    #[must_use]
    pub fn vtep_mac_v6(&self) -> VtepMac {
        vtep_mac_v6(self.vtep_mac)
    }

    /// What the end of its tunnel is known by in a network of this backend.
    #[must_use]
    pub fn end(&self, backend: &Backend) -> TunnelEnd {
        self.end_with(backend, self.vtep_mac)
    }

    /// The same of IPv6.
    #[must_use]
    pub fn end_v6(&self, backend: &Backend) -> TunnelEnd {
        self.end_with(backend, self.vtep_mac_v6())
    }

    fn end_with(&self, backend: &Backend, mac: VtepMac) -> TunnelEnd {
        match (backend, self.public_key) {
            (Backend::WireGuard(_), Some(key)) => TunnelEnd::Key(key),
            _ => TunnelEnd::Vtep(mac),
        }
    }
}

/// The MAC address of a node's VTEP for IPv6: another one than that for IPv4, as flannel's devices
/// have it.
#[must_use]
pub fn vtep_mac_v6(ipv4: VtepMac) -> VtepMac {
    let mut bytes = ipv4.get().0;
    bytes[5] ^= 0x80;
    VtepMac::from_random(bytes)
}

/// Whether the end of a node's tunnel can have this address: link-local ones mean nothing elsewhere,
/// and IPv4 in IPv6 is IPv4.
#[must_use]
pub fn is_public_ipv6(address: Ipv6Addr) -> bool {
    !(address.is_unspecified()
        || address.is_multicast()
        || address.is_unicast_link_local()
        || address.to_ipv4_mapped().is_some())
}

/// Which network configuration a node wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WantedConfig {
    /// The one that the store has; without one it waits until there is one.
    Any,
    /// The one that the store has, and this one is written where it has none.
    IfNone(NetworkConfig),
    /// This one: it is written where the store has none, and another one is a loss.
    Exactly(NetworkConfig),
}

/// A manager's settings.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ManagerSettings {
    /// Who the node is.
    pub identity: Identity,
    /// Where the store has flannel's keys, without a trailing slash.
    pub prefix: String,
    /// The TCP and UDP checksums that the node takes from the tunnel, partial ones by default.
    pub checksums: Checksums,
    /// Whether the node takes packets of groups from the tunnel; not by default.
    pub multicast: bool,
    /// The subnet of an earlier run.
    pub previous: Option<Ipv4Net>,
    /// The IPv6 subnet of an earlier run.
    pub previous_ipv6: Option<Ipv6Net>,
    /// The network configuration that the node wants.
    pub wanted_config: WantedConfig,
    /// A lease is renewed when so much of its time is left; [`RENEW_MARGIN`] by default.
    pub renew_margin: std::time::Duration,
    /// Whether flannel's nodes may watch the store, which lose changes: a record that is new to them
    /// is written several times.
    pub repeats: bool,
    /// Unpredictable.
    pub random_seed: u64,
}

impl ManagerSettings {
    /// A node that has no subnet of an earlier run, renews its lease as flannel does, and has no nodes
    /// of flannel's beside it. `random_seed` is unpredictable.
    #[must_use]
    pub const fn new(
        identity: Identity,
        prefix: String,
        wanted_config: WantedConfig,
        random_seed: u64,
    ) -> Self {
        Self {
            identity,
            prefix,
            checksums: Checksums::Partial,
            multicast: false,
            previous: None,
            previous_ipv6: None,
            wanted_config,
            renew_margin: RENEW_MARGIN,
            repeats: false,
            random_seed,
        }
    }

    /// Takes what a static list says of the node.
    pub fn take(&mut self, listed: &LeaseRecord) {
        self.checksums = listed.checksums();
        self.multicast = listed.takes_multicast();
        if let Some(mac) = listed.vtep_mac() {
            self.identity.vtep_mac = mac;
        }
    }
}
