//! What a node wants of its lease.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::VtepMac;

use super::config::NetworkConfig;
use super::record::LeaseRecord;

/// How long a lease lives without renewal: flannel's 24 hours.
pub const LEASE_TTL: std::time::Duration = std::time::Duration::from_secs(86_400);

/// How much of a lease's time is left when it is renewed: half, so that a store can be away for
/// long.
pub const RENEW_MARGIN: std::time::Duration = std::time::Duration::from_secs(43_200);

/// Who a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Where its tunnel ends; one lease per address.
    pub public_ip: Ipv4Addr,
    /// Its VTEP.
    pub vtep_mac: VtepMac,
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
    /// The subnet of an earlier run.
    pub previous: Option<Ipv4Net>,
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
            previous: None,
            wanted_config,
            renew_margin: RENEW_MARGIN,
            repeats: false,
            random_seed,
        }
    }

    /// Takes what a static list says of the node.
    pub fn take(&mut self, listed: &LeaseRecord) {
        self.checksums = listed.checksums();
        if let Some(mac) = listed.vtep_mac() {
            self.identity.vtep_mac = mac;
        }
    }
}
