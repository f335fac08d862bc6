//! The other nodes' leases, and which of them are peers.

use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::iter;
use std::net::{IpAddr, SocketAddr};

use thiserror::Error;

use crate::control::lease::{
    Backend, Contested, LeaseRecord, NetworkConfig, SubnetKey, ipv6_fault,
};
use crate::datapath::peer::{Peer, PeerId};

/// The leases of other nodes by their keys, each with a number that is stable while it lasts and
/// used again afterwards.
#[derive(Debug, Default)]
pub struct Peers {
    known: BTreeMap<SubnetKey, Known>,
    /// Numbers that are free again.
    free: BTreeSet<u32>,
    /// The first number that was never used.
    unused: u32,
    /// Leases whose subnets others have, too.
    contested: BTreeMap<SubnetKey, Contested>,
}

/// Another node's lease.
#[derive(Debug)]
pub struct Known {
    /// Its identity.
    pub id: PeerId,
    /// That of its IPv6 half, if it has one: the data path has a peer for each IP version.
    pub id_v6: Option<PeerId>,
    /// What its lease says.
    pub record: LeaseRecord,
    /// Its subnets that belong to other nodes.
    pub contested: Contested,
}

impl Known {
    /// The peer it describes, in a network of this backend.
    ///
    /// # Errors
    /// `Unusable` if nothing can be sent to it: the data path must not have it then.
    pub fn peer(&self, key: SubnetKey, backend: &Backend) -> Result<Peer, Unusable> {
        if let Some(holder) = self.contested.ipv4 {
            return Err(Unusable::Overlap(holder));
        }
        peer_of_lease(self.id, key, &self.record, backend)
    }

    /// The peer of its IPv6 half, in a network of this configuration; `None` if it has no such half.
    ///
    /// # Errors
    /// `Unusable` as of [`Self::peer`].
    pub fn peer_v6(
        &self,
        key: SubnetKey,
        config: &NetworkConfig,
    ) -> Option<Result<Peer, Unusable>> {
        let id = self.id_v6?;
        Some(match self.contested.ipv6 {
            Some(holder) => Err(Unusable::Overlap(holder)),
            None => peer_of_ipv6(id, key, &self.record, config),
        })
    }
}

impl Peers {
    /// Takes a lease that is new or has changed.
    pub fn remember(&mut self, key: SubnetKey, record: LeaseRecord) -> &Known {
        let (free, unused) = (&mut self.free, &mut self.unused);
        let mut next = || {
            PeerId(free.pop_first().unwrap_or_else(|| {
                *unused += 1;
                *unused - 1
            }))
        };
        match self.known.entry(key) {
            Slot::Occupied(slot) => {
                let known = slot.into_mut();
                known.record = record;
                known
            }
            Slot::Vacant(slot) => {
                let contested = self.contested.get(&key).copied().unwrap_or_default();
                slot.insert(Known {
                    id: next(),
                    id_v6: key.ipv6().map(|_| next()),
                    record,
                    contested,
                })
            }
        }
    }

    /// Notes whose the subnets of a lease are, which may be known only later; the lease, if it is
    /// known.
    pub fn contest(&mut self, key: SubnetKey, contested: Contested) -> Option<&Known> {
        if contested.is_empty() {
            self.contested.remove(&key);
        } else {
            self.contested.insert(key, contested);
        }
        let known = self.known.get_mut(&key)?;
        known.contested = contested;
        Some(known)
    }

    /// Forgets a lease that has ended, and says which one it was.
    pub fn forget(&mut self, key: SubnetKey) -> Option<Known> {
        self.contested.remove(&key);
        let known = self.known.remove(&key)?;
        let ids = iter::once(known.id).chain(known.id_v6);
        self.free.extend(ids.map(|id| id.0));
        Some(known)
    }

    /// All leases by their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&SubnetKey, &Known)> {
        self.known.iter()
    }
}

/// Why a node that has a lease cannot be a peer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Unusable {
    /// It encapsulates in another way.
    #[error("it uses the backend {0}")]
    OtherBackend(String),
    /// Its lease has no VTEP MAC address (yet).
    #[error("its lease has no VTEP MAC address")]
    NoVtepMac,
    /// Its lease has no public address that packets could be sent to.
    #[error("its lease has no usable public address")]
    NoAddress,
    /// It has no IPv4 subnet.
    #[error("it has IPv6 alone")]
    Ipv6Only,
    /// The IPv6 half of its lease does not count.
    #[error("{0}")]
    Ipv6(String),
    /// Its subnet belongs to the node with this address.
    #[error("its subnet overlaps with {0}")]
    Overlap(IpAddr),
}

/// The peer that the IPv6 half of a lease describes, in a network of this configuration.
///
/// # Errors
/// `Unusable` if nothing can be sent to it.
pub fn peer_of_ipv6(
    id: PeerId,
    key: SubnetKey,
    record: &LeaseRecord,
    config: &NetworkConfig,
) -> Result<Peer, Unusable> {
    if let Some(fault) = ipv6_fault(key, record, Some(config)) {
        return Err(Unusable::Ipv6(fault));
    }
    let backend = &config.backend;
    if record.backend() != backend.name() {
        return Err(Unusable::OtherBackend(record.backend().to_owned()));
    }
    let vtep_mac = match backend {
        Backend::Vxlan(_) => Some(record.vtep_mac_v6().ok_or(Unusable::NoVtepMac)?),
        _ => None,
    };
    let subnet = key.ipv6().ok_or(Unusable::NoAddress)?;
    let address = record.public_ipv6.ok_or(Unusable::NoAddress)?;
    Ok(Peer {
        id,
        subnet: subnet.into(),
        address: SocketAddr::new(address.into(), backend.port()),
        vtep_mac,
        checksums: record.checksums(),
        multicast: record.takes_multicast(),
        wireguard: None,
    })
}

/// The peer that a lease describes, in a network of this backend.
///
/// # Errors
/// `Unusable` if nothing can be sent to it.
pub fn peer_of_lease(
    id: PeerId,
    key: SubnetKey,
    record: &LeaseRecord,
    backend: &Backend,
) -> Result<Peer, Unusable> {
    if record.backend() != backend.name() {
        return Err(Unusable::OtherBackend(record.backend().to_owned()));
    }
    let subnet = key.ipv4().ok_or(Unusable::Ipv6Only)?;
    let ip = record.public_ip;
    if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() {
        return Err(Unusable::NoAddress);
    }
    let vtep_mac = match backend {
        Backend::Vxlan(_) => Some(record.vtep_mac().ok_or(Unusable::NoVtepMac)?),
        Backend::Udp { .. } | Backend::HostGw | Backend::Ipip { .. } => None,
        Backend::Other(name) => return Err(Unusable::OtherBackend(name.clone())),
    };
    Ok(Peer {
        id,
        subnet: subnet.into(),
        address: SocketAddr::new(ip.into(), backend.port()),
        vtep_mac,
        checksums: record.checksums(),
        multicast: record.takes_multicast(),
        wireguard: None,
    })
}

#[cfg(test)]
mod tests {
    use muslin_encap::tunnel::vxlan::{Vni, VtepMac};

    use super::*;
    use crate::control::lease::VxlanOptions;

    #[test]
    fn a_lease_keeps_its_identity_while_it_lasts() {
        let mut peers = Peers::default();
        let [one, two] = ["10.1.1.0-24", "10.1.2.0-24"].map(|key| key.parse().unwrap());
        let record = |last| LeaseRecord::udp([192, 168, 0, last].into());
        let first = peers.remember(one, record(1)).id;
        let second = peers.remember(two, record(2)).id;
        assert_ne!(first, second);
        assert_eq!(peers.remember(one, record(3)).id, first);
        let peer = |known: &Known| known.peer(one, &Backend::Udp { port: 8285 }).unwrap();
        let known = peers.forget(one).unwrap();
        assert_eq!(peer(&known).address, "192.168.0.3:8285".parse().unwrap());
        assert!(peers.forget(one).is_none());
        let three = "10.1.3.0-24".parse().unwrap();
        assert_eq!(peers.remember(three, record(1)).id, first);
        assert_eq!(peers.remember(one, record(1)).id, PeerId(2));
        assert_eq!(peers.iter().count(), 3);
    }

    #[test]
    fn only_nodes_that_can_be_reached_are_peers() {
        let key = "10.244.3.0-24".parse().unwrap();
        let vxlan = Backend::Vxlan(VxlanOptions::default());
        let mac = VtepMac::from_random([1; 6]);
        let good = LeaseRecord::vxlan([192, 168, 0, 3].into(), Vni::new(1).unwrap(), mac);
        let read = |text: &str| LeaseRecord::parse(text).unwrap();
        let peer = |record: &LeaseRecord, backend: &Backend| {
            peer_of_lease(PeerId(1), key, record, backend)
        };
        let usable = peer(&good, &vxlan).unwrap();
        assert_eq!(usable.address, "192.168.0.3:8472".parse().unwrap());
        assert_eq!(usable.vtep_mac, Some(mac));
        let other = Unusable::OtherBackend("vxlan".to_owned());
        assert_eq!(peer(&good, &Backend::Udp { port: 8285 }), Err(other));
        let windows =
            r#"{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VtepMAC":""}}"#;
        assert_eq!(peer(&read(windows), &vxlan), Err(Unusable::NoVtepMac));
        for address in ["0.0.0.0", "224.0.0.5", "255.255.255.255"] {
            let nowhere = LeaseRecord::udp(address.parse().unwrap());
            let nowhere = peer(&nowhere, &Backend::Udp { port: 8285 });
            assert_eq!(nowhere, Err(Unusable::NoAddress), "{address}");
        }
    }

    const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:3::/48",
        "Backend":{"Type":"vxlan"}}"#;

    /// A record of both IP versions.
    fn dual(backend: &Backend) -> LeaseRecord {
        let mac = VtepMac::from_random([1; 6]);
        let mac_v6 = VtepMac::from_random([2; 6]);
        let record = LeaseRecord::of(backend, [192, 168, 0, 3].into(), mac);
        record.with_ipv6(backend, "fd09::3".parse().unwrap(), mac_v6)
    }

    #[test]
    fn the_ipv6_half_of_a_lease_is_a_peer_of_its_own() {
        let config = NetworkConfig::parse(DUAL).unwrap();
        let both = "10.244.3.0-24&fd00:3:0:3::-64".parse().unwrap();
        let alone = "0.0.0.0-0&fd00:3:0:3::-64".parse().unwrap();
        let record = dual(&config.backend);
        for (key, record) in [
            (both, record.clone()),
            (alone, record.clone().without_ipv4()),
        ] {
            let mut peers = Peers::default();
            let known = peers.remember(key, record);
            let peer = known.peer_v6(key, &config).unwrap().unwrap();
            assert_eq!(Some(peer.id), known.id_v6);
            assert_ne!(peer.id, known.id);
            assert_eq!(peer.subnet, "fd00:3:0:3::/64".parse().unwrap());
            assert_eq!(peer.address, "[fd09::3]:8472".parse().unwrap());
            assert_eq!(peer.vtep_mac, Some(VtepMac::from_random([2; 6])));
        }
        let mut peers = Peers::default();
        let plain = "10.244.3.0-24".parse().unwrap();
        assert!(
            peers
                .remember(plain, record)
                .peer_v6(plain, &config)
                .is_none()
        );
    }

    #[test]
    fn an_ipv6_half_that_cannot_be_reached_is_no_peer() {
        let config = NetworkConfig::parse(DUAL).unwrap();
        let host_gw = NetworkConfig {
            backend: Backend::HostGw,
            ..config.clone()
        };
        let ipv4 = NetworkConfig {
            ipv6: None,
            ..config.clone()
        };
        let key = "10.244.3.0-24&fd00:3:0:3::-64";
        let vxlan = dual(&config.backend);
        let of = |key: &str, record: &LeaseRecord, config: &NetworkConfig| {
            peer_of_ipv6(PeerId(1), key.parse().unwrap(), record, config)
        };
        let bare = of(key, &dual(&Backend::HostGw), &host_gw).unwrap();
        assert_eq!(bare.address, "[fd09::3]:0".parse().unwrap());
        assert_eq!(bare.vtep_mac, None);
        let other = Unusable::OtherBackend("vxlan".to_owned());
        assert_eq!(of(key, &vxlan, &host_gw), Err(other));
        for (key, record, config) in [
            (key, &vxlan, &ipv4),
            ("10.244.3.0-24&fd00:4:0:3::-64", &vxlan, &config),
            ("10.244.3.0-24&fd00:3:0:3::-72", &vxlan, &config),
        ] {
            let found = of(key, record, config);
            assert!(matches!(found, Err(Unusable::Ipv6(_))), "{found:?}");
        }
        for address in ["fe80::1", "::ffff:192.0.2.1", "::"] {
            let mut record = vxlan.clone();
            record.public_ipv6 = address.parse().ok();
            let found = of(key, &record, &config);
            assert!(
                matches!(found, Err(Unusable::Ipv6(_))),
                "{address}: {found:?}"
            );
        }
        // Who has the subnet comes first.
        let mut peers = Peers::default();
        let key: SubnetKey = key.parse().unwrap();
        peers.remember(key, vxlan);
        let holder = IpAddr::from([192, 168, 0, 9]);
        let contested = Contested {
            ipv4: None,
            ipv6: Some(holder),
        };
        let known = peers.contest(key, contested).unwrap();
        let refused = known.peer_v6(key, &config).unwrap();
        assert_eq!(refused, Err(Unusable::Overlap(holder)));
        assert!(known.peer(key, &config.backend).is_ok());
    }
}
