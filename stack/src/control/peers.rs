//! The other nodes' leases, and which of them are peers.

use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::iter;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use muslin_encap::tunnel::wireguard::PublicKey;
use smoltcp::wire::IpVersion;
use thiserror::Error;

use crate::addresses::Addresses;
use crate::control::lease::{
    Backend, Contested, LeaseRecord, NetworkConfig, SubnetKey, WireGuardMode, WireGuardOptions,
    ipv6_fault, is_public_ipv6,
};
use crate::datapath::peer::{Peer, PeerId, WireGuardEnd};

/// What a node knows of itself that decides how it reaches others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Here {
    /// Its public key, in a network of WireGuard.
    pub public_key: Option<PublicKey>,
    /// Its public addresses.
    pub addresses: Option<Addresses>,
}

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
    /// The peer it describes, in a network of this configuration.
    ///
    /// # Errors
    /// `Unusable` if nothing can be sent to it: the data path must not have it then.
    pub fn peer(
        &self,
        key: SubnetKey,
        config: &NetworkConfig,
        here: &Here,
    ) -> Result<Peer, Unusable> {
        match self.contested.ipv4 {
            Some(holder) => Err(Unusable::Overlap(holder)),
            None => {
                self.check_public_key()?;
                peer_of_lease(self.id, key, &self.record, config, here)
            }
        }
    }

    /// The peer of its IPv6 half; `None` if it has no such half.
    ///
    /// # Errors
    /// `Unusable` as of [`Self::peer`].
    pub fn peer_v6(
        &self,
        key: SubnetKey,
        config: &NetworkConfig,
        here: &Here,
    ) -> Option<Result<Peer, Unusable>> {
        let id = self.id_v6?;
        let peer = || peer_of_ipv6(id, key, &self.record, config, here);
        Some(match self.contested.ipv6 {
            Some(holder) => Err(Unusable::Overlap(holder)),
            None => self.check_public_key().and_then(|()| peer()),
        })
    }

    /// Two nodes with one key would have each other's traffic, and neither could keep a session.
    fn check_public_key(&self) -> Result<(), Unusable> {
        match self.contested.public_key {
            Some(holder) => Err(Unusable::PublicKeyOf(holder)),
            None => Ok(()),
        }
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
    /// Its lease has no public key (yet).
    #[error("its lease has no public key")]
    NoPublicKey,
    /// It has the public key of this node.
    #[error("its lease has this node's own public key: its key file is a copy")]
    OwnPublicKey,
    /// Its public key belongs to the node with this address.
    #[error(
        "its public key is that of {0}, whose lease is older: one key file is a copy of the other"
    )]
    PublicKeyOf(IpAddr),
    /// Its lease has no address of the IP version by which nodes reach each other.
    #[error("its lease has no public address of {0}, by which it is to be reached")]
    NoEndpoint(IpVersion),
    /// This node has none.
    #[error("it is reached by {0}, of which this node has no address")]
    NoWay(IpVersion),
    /// Its tunnel's end would be reached through the tunnel.
    #[error("its public address {0} lies in the pod network")]
    InnerEndpoint(IpAddr),
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
    here: &Here,
) -> Result<Peer, Unusable> {
    if let Some(fault) = ipv6_fault(key, record, Some(config)) {
        return Err(Unusable::Ipv6(fault));
    }
    let subnet = key.ipv6().ok_or(Unusable::NoAddress)?;
    let address = record.public_ipv6.ok_or(Unusable::NoAddress)?;
    let half = Half {
        record,
        config,
        here,
        version: IpVersion::Ipv6,
    };
    half.complete(Peer::new(
        id,
        subnet.into(),
        SocketAddr::new(address.into(), 0),
    ))
}

/// The peer that a lease describes, in a network of this configuration.
///
/// # Errors
/// `Unusable` if nothing can be sent to it.
pub fn peer_of_lease(
    id: PeerId,
    key: SubnetKey,
    record: &LeaseRecord,
    config: &NetworkConfig,
    here: &Here,
) -> Result<Peer, Unusable> {
    let half = Half {
        record,
        config,
        here,
        version: IpVersion::Ipv4,
    };
    half.check_backend()?;
    let subnet = key.ipv4().ok_or(Unusable::Ipv6Only)?;
    let address = public_ip(record).ok_or(Unusable::NoAddress)?;
    half.complete(Peer::new(
        id,
        subnet.into(),
        SocketAddr::new(address.into(), 0),
    ))
}

fn public_ip(record: &LeaseRecord) -> Option<Ipv4Addr> {
    let ip = record.public_ip;
    let is_none = ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast();
    (!is_none).then_some(ip)
}

fn public_ipv6(record: &LeaseRecord) -> Option<Ipv6Addr> {
    record.public_ipv6.filter(|ip| is_public_ipv6(*ip))
}

/// What a lease says of one IP version, as this node sees it.
struct Half<'a> {
    record: &'a LeaseRecord,
    config: &'a NetworkConfig,
    here: &'a Here,
    version: IpVersion,
}

impl Half<'_> {
    fn check_backend(&self) -> Result<(), Unusable> {
        let name = self.record.backend();
        match &self.config.backend {
            Backend::Other(_) => Err(Unusable::OtherBackend(name.to_owned())),
            backend if backend.name() != name => Err(Unusable::OtherBackend(name.to_owned())),
            _ => Ok(()),
        }
    }

    /// The peer with what the tunnel needs of it.
    fn complete(&self, mut peer: Peer) -> Result<Peer, Unusable> {
        self.check_backend()?;
        peer.checksums = self.record.checksums();
        peer.multicast = self.record.takes_multicast();
        let backend = &self.config.backend;
        peer.address.set_port(backend.ports().of(peer.address.ip()));
        match backend {
            Backend::Vxlan(_) => {
                let mac = match self.version {
                    IpVersion::Ipv4 => self.record.vtep_mac(),
                    IpVersion::Ipv6 => self.record.vtep_mac_v6(),
                };
                peer.vtep_mac = Some(mac.ok_or(Unusable::NoVtepMac)?);
            }
            Backend::WireGuard(options) => {
                peer.address.set_port(self.port(options, self.version));
                peer.wireguard = Some(self.wireguard(options)?);
            }
            Backend::Udp { .. } | Backend::HostGw | Backend::Ipip { .. } | Backend::Other(_) => {}
        }
        Ok(peer)
    }

    fn wireguard(&self, options: &WireGuardOptions) -> Result<WireGuardEnd, Unusable> {
        let (ipv4, ipv6) = (self.record.wireguard(), self.record.wireguard_v6());
        let data = match (options.mode.is_single(), self.version) {
            (false, IpVersion::Ipv4) => ipv4,
            (false, IpVersion::Ipv6) => ipv6,
            // flannel takes the last that it reads.
            (true, _) => ipv6.or(ipv4),
        };
        let public_key = data.ok_or(Unusable::NoPublicKey)?.public_key;
        if self.here.public_key == Some(public_key) {
            return Err(Unusable::OwnPublicKey);
        }
        Ok(WireGuardEnd {
            public_key,
            endpoint: self.endpoint(options)?,
        })
    }

    fn endpoint(&self, options: &WireGuardOptions) -> Result<SocketAddr, Unusable> {
        let outer = match options.mode {
            WireGuardMode::Separate => self.version,
            WireGuardMode::Ipv4 => IpVersion::Ipv4,
            WireGuardMode::Ipv6 => IpVersion::Ipv6,
            WireGuardMode::Auto => self.better_version(),
        };
        let own = self.here.addresses;
        let (address, is_way) = match outer {
            IpVersion::Ipv4 => (
                public_ip(self.record).map(IpAddr::V4),
                own.is_none_or(|own| own.ipv4().is_some()),
            ),
            IpVersion::Ipv6 => (
                public_ipv6(self.record).map(IpAddr::V6),
                own.is_none_or(|own| own.ipv6().is_some()),
            ),
        };
        let address = address.ok_or(Unusable::NoEndpoint(outer))?;
        if !is_way {
            return Err(Unusable::NoWay(outer));
        }
        let networks = self.config.networks();
        if networks
            .iter::<ipnet::IpNet>()
            .any(|it| it.contains(&address))
        {
            return Err(Unusable::InnerEndpoint(address));
        }
        Ok(SocketAddr::new(address, self.port(options, outer)))
    }

    /// The IP version by which a node is more likely to be reached, by flannel's rule.
    fn better_version(&self) -> IpVersion {
        let (ipv4, ipv6) = (public_ip(self.record), public_ipv6(self.record));
        let own = self.here.addresses;
        let own_ipv4 = own.and_then(|own| own.ipv4());
        let own_ipv6 = own.and_then(|own| own.ipv6());
        let (ipv4, ipv6) = match (ipv4, ipv6) {
            (_, None) => return IpVersion::Ipv4,
            (None, Some(_)) => return IpVersion::Ipv6,
            (Some(ipv4), Some(ipv6)) => (ipv4, ipv6),
        };
        let is_global = |ip: Ipv6Addr| !ip.is_unique_local();
        match (own_ipv4, own_ipv6) {
            // flannel would go on to look, and end at an address that it cannot reach.
            (None, Some(_)) => IpVersion::Ipv6,
            (Some(_), _) if !ipv4.is_private() => IpVersion::Ipv4,
            (_, Some(own)) if is_global(ipv6) && is_global(own) => IpVersion::Ipv6,
            _ => IpVersion::Ipv4,
        }
    }

    /// The port at which a node listens for an IP version. What it does not say is as in the configuration,
    /// which all nodes share.
    fn port(&self, options: &WireGuardOptions, outer: IpVersion) -> u16 {
        let (data, configured) = match outer {
            IpVersion::Ipv4 => (self.record.wireguard(), options.ports().ipv4),
            IpVersion::Ipv6 => (self.record.wireguard_v6(), options.ports().ipv6),
        };
        let port = data.map_or(0, |data| data.port);
        // flannel's nodes write the port of a second device there that they have not.
        let is_of_none =
            options.mode.is_single() && outer == IpVersion::Ipv6 && port == options.listen_port_v6;
        match port {
            0 => configured,
            _ if is_of_none => configured,
            port => port,
        }
    }
}

#[cfg(test)]
mod tests {
    use muslin_encap::tunnel::vxlan::{Vni, VtepMac};

    use super::*;
    use crate::control::lease::VxlanOptions;

    /// Who has no key and needs none.
    const HERE: Here = Here {
        public_key: None,
        addresses: None,
    };

    fn config_of(backend: &Backend) -> NetworkConfig {
        let network = "10.0.0.0/8".parse().unwrap();
        NetworkConfig::new(network, None, backend.clone()).unwrap()
    }

    #[test]
    fn a_lease_keeps_its_identity_while_it_lasts() {
        let mut peers = Peers::default();
        let [one, two] = ["10.1.1.0-24", "10.1.2.0-24"].map(|key| key.parse().unwrap());
        let record = |last| LeaseRecord::udp([192, 168, 0, last].into());
        let first = peers.remember(one, record(1)).id;
        let second = peers.remember(two, record(2)).id;
        assert_ne!(first, second);
        assert_eq!(peers.remember(one, record(3)).id, first);
        let peer = |known: &Known| {
            known
                .peer(one, &config_of(&Backend::Udp { port: 8285 }), &HERE)
                .unwrap()
        };
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
            peer_of_lease(PeerId(1), key, record, &config_of(backend), &HERE)
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
            let peer = known.peer_v6(key, &config, &HERE).unwrap().unwrap();
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
                .peer_v6(plain, &config, &HERE)
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
            peer_of_ipv6(PeerId(1), key.parse().unwrap(), record, config, &HERE)
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
            public_key: None,
        };
        let known = peers.contest(key, contested).unwrap();
        let refused = known.peer_v6(key, &config, &HERE).unwrap();
        assert_eq!(refused, Err(Unusable::Overlap(holder)));
        assert!(known.peer(key, &config, &HERE).is_ok());
    }

    const KEY: PublicKey = PublicKey([7; 32]);

    /// A dual network of WireGuard with other ports than by default.
    fn wireguard(mode: WireGuardMode) -> NetworkConfig {
        let backend = format!(
            r#"{{"Type":"wireguard","Mode":"{}","ListenPort":1004,"ListenPortV6":1006}}"#,
            mode.name()
        );
        let text = format!(
            r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{backend}}}"#
        );
        NetworkConfig::parse(&text).unwrap()
    }

    /// A lease of both versions as flannel writes it, with these ports.
    fn record(ipv4: &str, ipv6: &str, ports: [&str; 2]) -> LeaseRecord {
        let [data, data_v6] = ports.map(|port| format!(r#"{{"PublicKey":"{KEY}"{port}}}"#));
        let text = format!(
            r#"{{"PublicIP":"{ipv4}","PublicIPv6":{ipv6},"BackendType":"wireguard","BackendData":{data},"BackendV6Data":{data_v6}}}"#
        );
        LeaseRecord::parse(&text).unwrap()
    }

    /// The peers of both halves.
    fn halves(
        record: &LeaseRecord,
        config: &NetworkConfig,
        here: Here,
    ) -> [Result<Peer, Unusable>; 2] {
        let key = "10.244.3.0-24&fd00:244:0:3::-64".parse().unwrap();
        [
            peer_of_lease(PeerId(1), key, record, config, &here),
            peer_of_ipv6(PeerId(2), key, record, config, &here),
        ]
    }

    fn here(addresses: &str) -> Here {
        Here {
            public_key: Some(PublicKey([1; 32])),
            addresses: Some(addresses.parse().unwrap()),
        }
    }

    const PORTS: [&str; 2] = [r#","Port":2004"#, r#","Port":2006"#];

    #[test]
    fn the_endpoint_of_a_peer_follows_the_mode() {
        use WireGuardMode::{Auto, Ipv4, Ipv6, Separate};
        let own = "192.168.0.1,fd09::1";
        let global = "192.168.0.1,2001:db8::1";
        let (private, public) = ("192.168.0.3", "192.0.2.3");
        let (local, wide) = (r#""fd09::3""#, r#""2001:db8::3""#);
        for (mode, own, ipv4, ipv6, expected) in [
            (
                Separate,
                own,
                private,
                local,
                ["192.168.0.3:2004", "[fd09::3]:2006"],
            ),
            (Ipv4, own, private, local, ["192.168.0.3:2004"; 2]),
            (Ipv6, own, private, local, ["[fd09::3]:2006"; 2]),
            (Auto, own, private, local, ["192.168.0.3:2004"; 2]),
            (Auto, own, public, wide, ["192.0.2.3:2004"; 2]),
            (Auto, own, private, wide, ["192.168.0.3:2004"; 2]),
            (Auto, global, private, wide, ["[2001:db8::3]:2006"; 2]),
            (Auto, global, private, local, ["192.168.0.3:2004"; 2]),
            (Auto, global, public, wide, ["192.0.2.3:2004"; 2]),
            // Without IPv4 of its own there is one way only.
            (Auto, "fd09::1", private, local, ["[fd09::3]:2006"; 2]),
            (Auto, "2001:db8::1", public, wide, ["[2001:db8::3]:2006"; 2]),
        ] {
            let record = record(ipv4, ipv6, PORTS);
            let peers = halves(&record, &wireguard(mode), here(own));
            for ((peer, expected), is_ipv6) in peers.into_iter().zip(expected).zip([false, true]) {
                let peer = peer.unwrap();
                let end = WireGuardEnd {
                    public_key: KEY,
                    endpoint: expected.parse().unwrap(),
                };
                assert_eq!(peer.wireguard, Some(end), "{mode:?} {own} {ipv4} {ipv6}");
                // The node's tables know it by the version of its lease.
                assert_eq!(peer.address.is_ipv6(), is_ipv6);
                assert_eq!(peer.vtep_mac, None);
            }
        }
    }

    #[test]
    fn a_port_that_nobody_listens_at_is_not_sent_to() {
        use WireGuardMode::{Ipv4, Ipv6, Separate};
        let own = here("192.168.0.1,fd09::1");
        let ports = |mode, ports| {
            let record = record("192.168.0.3", r#""fd09::3""#, ports);
            let peers = halves(&record, &wireguard(mode), own);
            peers.map(|peer| peer.unwrap().wireguard.unwrap().endpoint.port())
        };
        // Old nodes do not name their port, and flannel's name 0 where they have no second device.
        for none in ["", r#","Port":0"#] {
            assert_eq!(ports(Separate, [none; 2]), [1004, 1006]);
            assert_eq!(ports(Ipv4, [none; 2]), [1004; 2]);
            assert_eq!(ports(Ipv6, [none; 2]), [1004; 2]);
        }
        // Or the one that a second device would have.
        let flannels = [r#","Port":1004"#, r#","Port":1006"#];
        assert_eq!(ports(Separate, flannels), [1004, 1006]);
        assert_eq!(ports(Ipv6, flannels), [1004; 2]);
        assert_eq!(ports(Ipv6, [r#","Port":1004"#; 2]), [1004; 2]);
    }

    #[test]
    fn who_cannot_be_a_peer_of_wireguard_says_why() {
        use WireGuardMode::{Auto, Ipv4, Ipv6, Separate};
        let own = here("192.168.0.1,fd09::1");
        let good = record("192.168.0.3", r#""fd09::3""#, PORTS);
        let none = LeaseRecord::parse(
            r#"{"PublicIP":"192.168.0.3","PublicIPv6":"fd09::3","BackendType":"wireguard"}"#,
        );
        let [none, none_v6] = halves(&none.unwrap(), &wireguard(Separate), own);
        assert_eq!(
            (none, none_v6),
            (Err(Unusable::NoPublicKey), Err(Unusable::NoPublicKey))
        );
        let copy = Here {
            public_key: Some(KEY),
            ..own
        };
        let refused = Err(Unusable::OwnPublicKey);
        assert_eq!(
            halves(&good, &wireguard(Auto), copy),
            [refused.clone(), refused]
        );

        // A node of IPv4 alone in a network where all are reached by IPv6, and the reverse.
        let key: SubnetKey = "10.244.3.0-24".parse().unwrap();
        let plain = LeaseRecord::of(&wireguard(Ipv6).backend, [192, 168, 0, 3].into(), KEY);
        let of = |mode, here| peer_of_lease(PeerId(1), key, &plain, &wireguard(mode), &here);
        let refused = Err(Unusable::NoEndpoint(IpVersion::Ipv6));
        assert_eq!(of(Ipv6, own), refused);
        assert!(of(Auto, own).is_ok());
        let away = here("fd09::1");
        assert_eq!(of(Auto, away), Err(Unusable::NoWay(IpVersion::Ipv4)));
        let only: SubnetKey = "0.0.0.0-0&fd00:244:0:3::-64".parse().unwrap();
        let ipv6 = good.clone().without_ipv4();
        let of = |mode| peer_of_ipv6(PeerId(1), only, &ipv6, &wireguard(mode), &own);
        assert_eq!(of(Ipv4), Err(Unusable::NoEndpoint(IpVersion::Ipv4)));
        for mode in [Auto, Ipv6, Separate] {
            assert!(of(mode).is_ok(), "{mode:?}");
        }

        // A tunnel in the tunnel.
        let inner = record("10.244.9.1", r#""fd00:244::9""#, PORTS);
        for (mode, [ipv4, ipv6]) in [
            (Separate, ["10.244.9.1", "fd00:244::9"]),
            (Ipv4, ["10.244.9.1"; 2]),
            (Ipv6, ["fd00:244::9"; 2]),
        ] {
            let refused = |ip: &str| Err(Unusable::InnerEndpoint(ip.parse().unwrap()));
            let peers = halves(&inner, &wireguard(mode), own);
            assert_eq!(peers, [refused(ipv4), refused(ipv6)]);
        }
        let backend = Backend::Vxlan(VxlanOptions::default());
        let other = Unusable::OtherBackend("wireguard".to_owned());
        let [refused, _] = halves(&good, &config_of(&backend), own);
        assert_eq!(refused, Err(other));
    }

    #[test]
    fn a_public_key_of_an_older_lease_is_no_peers() {
        let mut peers = Peers::default();
        let key = "10.244.3.0-24&fd00:244:0:3::-64".parse().unwrap();
        peers.remember(key, record("192.168.0.3", r#""fd09::3""#, PORTS));
        let (config, own) = (
            wireguard(WireGuardMode::Separate),
            here("192.168.0.1,fd09::1"),
        );
        let holder = IpAddr::from([192, 168, 0, 9]);
        let contested = Contested {
            public_key: Some(holder),
            ..Contested::default()
        };
        let known = peers.contest(key, contested).unwrap();
        let refused = Err(Unusable::PublicKeyOf(holder));
        assert_eq!(known.peer(key, &config, &own), refused);
        assert_eq!(known.peer_v6(key, &config, &own), Some(refused));
        let known = peers.contest(key, Contested::default()).unwrap();
        assert!(known.peer(key, &config, &own).is_ok());
    }
}
