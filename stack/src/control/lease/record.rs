//! The value of a lease: who holds it and how to reach its pods, byte for byte as flannel writes
//! it and as leniently read.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use muslin_encap::tunnel::wireguard::PublicKey;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use thiserror::Error;

use super::config::{Backend, fields};
use super::text::shorten;
use crate::addresses::Addresses;

/// A lease's value. Its fields are in the order in which flannel writes them.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct LeaseRecord {
    /// Where the node's tunnel ends, and the node's identity.
    #[serde(rename = "PublicIP")]
    pub public_ip: Ipv4Addr,
    /// The same for IPv6.
    #[serde(rename = "PublicIPv6")]
    pub public_ipv6: Option<Ipv6Addr>,
    /// `vxlan`, `host-gw` and so on; empty for flannel's UDP format.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub backend_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    backend_data: Option<Box<RawValue>>,
    #[serde(rename = "BackendV6Data", skip_serializing_if = "Option::is_none")]
    backend_v6_data: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    muslin: Option<MuslinData>,
}

/// What Muslin's nodes tell each other. flannel's do not look at it, as at any field that they do not
/// know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct MuslinData {
    /// Whether the node takes partial checksums from the tunnel.
    partial_checksums: bool,
    /// Whether the node takes packets of groups from the tunnel.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    multicast: bool,
}

impl PartialEq for LeaseRecord {
    fn eq(&self, other: &Self) -> bool {
        let raw = |data: &Option<Box<RawValue>>| data.as_ref().map(|raw| raw.get().to_owned());
        (self.public_ip, self.public_ipv6, &self.backend_type)
            == (other.public_ip, other.public_ipv6, &other.backend_type)
            && raw(&self.backend_data) == raw(&other.backend_data)
            && raw(&self.backend_v6_data) == raw(&other.backend_v6_data)
            && self.muslin == other.muslin
    }
}

/// What tells the end of a node's tunnel from those of others, wherever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelEnd {
    /// The MAC address of its VTEP; each IP version has another one.
    Vtep(VtepMac),
    /// Its public key, which is that of both IP versions.
    Key(PublicKey),
}

impl From<VtepMac> for TunnelEnd {
    fn from(mac: VtepMac) -> Self {
        Self::Vtep(mac)
    }
}

impl From<PublicKey> for TunnelEnd {
    fn from(key: PublicKey) -> Self {
        Self::Key(key)
    }
}

impl fmt::Display for TunnelEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vtep(mac) => write!(f, "VTEP MAC address {mac}"),
            Self::Key(key) => write!(f, "public key {key}"),
        }
    }
}

/// What the record of a WireGuard node says of one IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireGuardData {
    /// The node's public key.
    pub public_key: PublicKey,
    /// The UDP port at which it listens; 0 if it does not say that, as flannel before 0.26.5.
    pub port: u16,
}

impl WireGuardData {
    /// The record of a node that listens there.
    fn write(public_key: PublicKey, port: u16) -> Option<Box<RawValue>> {
        let public_key = public_key.to_string();
        serde_json::value::to_raw_value(&WireGuardFields { public_key, port }).ok()
    }

    /// Reads what is there of it, as leniently as flannel.
    fn read(data: &RawValue) -> Option<Self> {
        let mut data = fields(data.get()).ok()?;
        let public_key = data.remove("publickey")?.as_str()?.parse().ok()?;
        let port = data.remove("port").and_then(|port| port.as_u64());
        let port = port.and_then(|port| u16::try_from(port).ok());
        Some(Self {
            public_key,
            port: port.unwrap_or_default(),
        })
    }
}

/// Why a value is not a lease.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidRecord {
    /// It is not a JSON object.
    #[error("it is not a JSON object: {0}")]
    Json(String),
    /// A field has a value of the wrong kind.
    #[error("{field} cannot be {value}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// Its value as JSON.
        value: String,
    },
}

/// The longest name of a backend; people see it in tables.
const MAX_BACKEND: usize = 64;

/// Whether a text can be a backend's name: flannel's are words.
fn is_backend(text: &str) -> bool {
    text.len() <= MAX_BACKEND && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[derive(Serialize, Deserialize)]
struct VxlanData {
    #[serde(rename = "VNI")]
    vni: u32,
    #[serde(rename = "VtepMAC")]
    vtep_mac: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct WireGuardFields {
    public_key: String,
    port: u16,
}

impl MuslinData {
    /// Reads what is there of it; what else a newer version writes is of no concern to this one.
    fn read(value: &Value) -> Option<Self> {
        let partial_checksums = value.get("PartialChecksums")?.as_bool()?;
        let multicast = value.get("Multicast").and_then(Value::as_bool);
        Some(Self {
            partial_checksums,
            multicast: multicast.unwrap_or_default(),
        })
    }
}

impl LeaseRecord {
    /// The record of a node with the UDP backend.
    #[must_use]
    pub fn udp(public_ip: Ipv4Addr) -> Self {
        Self {
            public_ip,
            public_ipv6: None,
            backend_type: String::new(),
            backend_data: None,
            backend_v6_data: None,
            muslin: None,
        }
    }

    /// The record of a node with the VXLAN backend.
    #[must_use]
    pub fn vxlan(public_ip: Ipv4Addr, vni: Vni, mac: VtepMac) -> Self {
        let data = VxlanData {
            vni: vni.get(),
            vtep_mac: mac.to_string(),
        };
        Self {
            backend_type: "vxlan".to_owned(),
            backend_data: serde_json::value::to_raw_value(&data).ok(),
            ..Self::udp(public_ip)
        }
    }

    /// The same with the checksums that the node takes from the tunnel. They are complete ones if there
    /// is none, or none with a UDP checksum of its own to protect partial ones.
    #[must_use]
    pub fn with_checksums(self, checksums: Checksums) -> Self {
        let is_udp = ["", "vxlan"].contains(&self.backend_type.as_str());
        self.with_muslin(|data| {
            data.partial_checksums = is_udp && checksums == Checksums::Partial;
        })
    }

    /// The same of a node that takes packets of groups from the tunnel, or takes none.
    #[must_use]
    pub fn with_multicast(self, multicast: bool) -> Self {
        let has_tunnel = self.backend_type != "host-gw";
        self.with_muslin(|data| data.multicast = multicast && has_tunnel)
    }

    /// What is as without any is not said.
    fn with_muslin(self, change: impl FnOnce(&mut MuslinData)) -> Self {
        let mut data = self.muslin.unwrap_or_default();
        change(&mut data);
        let muslin = (data != MuslinData::default()).then_some(data);
        Self { muslin, ..self }
    }

    /// The record of a node of a network with this backend, whose tunnel's end is known by this: by its
    /// VTEP for VXLAN, by its key for WireGuard, and by nothing for others.
    #[must_use]
    pub fn of(backend: &Backend, public_ip: Ipv4Addr, end: impl Into<TunnelEnd>) -> Self {
        match (backend, end.into()) {
            (Backend::Vxlan(options), TunnelEnd::Vtep(mac)) => {
                Self::vxlan(public_ip, options.vni, mac)
            }
            (Backend::WireGuard(options), TunnelEnd::Key(key)) => Self {
                backend_type: backend.name().to_owned(),
                backend_data: WireGuardData::write(key, options.ports().ipv4),
                ..Self::udp(public_ip)
            },
            (Backend::Udp { .. }, _) => Self::udp(public_ip),
            (_, _) => Self {
                backend_type: backend.name().to_owned(),
                ..Self::udp(public_ip)
            },
        }
    }

    /// The same of a node that has an IPv6 subnet too: where its tunnel ends, and what that end is known
    /// by.
    #[must_use]
    pub fn with_ipv6(
        self,
        backend: &Backend,
        public_ipv6: Ipv6Addr,
        end: impl Into<TunnelEnd>,
    ) -> Self {
        let data = match (backend, end.into()) {
            (Backend::Vxlan(options), TunnelEnd::Vtep(mac)) => {
                let data = VxlanData {
                    vni: options.vni.get(),
                    vtep_mac: mac.to_string(),
                };
                serde_json::value::to_raw_value(&data).ok()
            }
            (Backend::WireGuard(options), TunnelEnd::Key(key)) => {
                WireGuardData::write(key, options.ports().ipv6)
            }
            (_, _) => None,
        };
        Self {
            public_ipv6: Some(public_ipv6),
            backend_v6_data: data,
            ..self
        }
    }

    /// The same of a node that has an IPv6 subnet alone.
    #[must_use]
    pub fn without_ipv4(self) -> Self {
        Self {
            public_ip: Ipv4Addr::UNSPECIFIED,
            backend_data: None,
            ..self
        }
    }

    /// Reads a lease's value.
    ///
    /// # Errors
    /// `InvalidRecord` for what flannel's nodes would not accept either.
    pub fn parse(text: &str) -> Result<Self, InvalidRecord> {
        let mut fields = fields(text).map_err(InvalidRecord::Json)?;
        let mut take = |name: &'static str| fields.remove(&name.to_ascii_lowercase());
        let wrong = |field, value: &Value| InvalidRecord::Field {
            field,
            value: shorten(value),
        };
        let raw = |value: Option<Value>| {
            value.filter(|value| !value.is_null()).and_then(|value| {
                // Go writes fields in their own order, and so did the text we have read.
                serde_json::value::to_raw_value(&value).ok()
            })
        };
        let public_ip = match take("PublicIP") {
            // A missing key is Go's zero value.
            None => Ipv4Addr::UNSPECIFIED,
            Some(value) => value
                .as_str()
                .and_then(|text| text.parse().ok())
                .ok_or_else(|| wrong("PublicIP", &value))?,
        };
        let public_ipv6 = match take("PublicIPv6") {
            None | Some(Value::Null) => None,
            Some(value) => Some(
                value
                    .as_str()
                    .and_then(|text| text.parse().ok())
                    .ok_or_else(|| wrong("PublicIPv6", &value))?,
            ),
        };
        let backend_type = match take("BackendType") {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) if is_backend(&text) => text,
            Some(value) => return Err(wrong("BackendType", &value)),
        };
        Ok(Self {
            public_ip,
            public_ipv6,
            backend_type,
            backend_data: raw(take("BackendData")),
            backend_v6_data: raw(take("BackendV6Data")),
            muslin: take("Muslin").and_then(|value| MuslinData::read(&value)),
        })
    }

    /// The value as flannel writes it.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The VTEP's MAC address of a VXLAN node. `None` for other backends, and for a node that has
    /// not told it yet (Windows nodes first write an empty one).
    #[must_use]
    pub fn vtep_mac(&self) -> Option<VtepMac> {
        self.mac_in(self.backend_data.as_ref()?)
    }

    /// The same of the VTEP for IPv6, which has another one.
    #[must_use]
    pub fn vtep_mac_v6(&self) -> Option<VtepMac> {
        self.mac_in(self.backend_v6_data.as_ref()?)
    }

    /// That of IPv4, or if there is none that of IPv6.
    #[must_use]
    pub fn first_vtep_mac(&self) -> Option<VtepMac> {
        self.vtep_mac().or_else(|| self.vtep_mac_v6())
    }

    fn mac_in(&self, data: &RawValue) -> Option<VtepMac> {
        if self.backend_type != "vxlan" {
            return None;
        }
        let mut data = fields(data.get()).ok()?;
        data.remove("vtepmac")?.as_str()?.parse().ok()
    }

    /// What a WireGuard node says of IPv4. `None` for other backends, and if there is no key.
    #[must_use]
    pub fn wireguard(&self) -> Option<WireGuardData> {
        self.wireguard_in(self.backend_data.as_ref()?)
    }

    /// The same of IPv6.
    #[must_use]
    pub fn wireguard_v6(&self) -> Option<WireGuardData> {
        self.wireguard_in(self.backend_v6_data.as_ref()?)
    }

    fn wireguard_in(&self, data: &RawValue) -> Option<WireGuardData> {
        match self.backend_type.as_str() {
            "wireguard" => WireGuardData::read(data),
            _ => None,
        }
    }

    /// The public keys of a WireGuard node: one, unless it has another one for IPv6.
    pub fn public_keys(&self) -> impl Iterator<Item = PublicKey> + use<> {
        let ipv4 = self.wireguard().map(|data| data.public_key);
        let ipv6 = self.wireguard_v6().map(|data| data.public_key);
        let other = ipv6.filter(|key| ipv4 != Some(*key));
        ipv4.into_iter().chain(other)
    }

    /// What the end of its tunnel is known by: that of IPv4, or if there is none that of IPv6.
    #[must_use]
    pub fn end(&self) -> Option<TunnelEnd> {
        let vtep = self.first_vtep_mac().map(TunnelEnd::Vtep);
        vtep.or_else(|| self.public_keys().next().map(TunnelEnd::Key))
    }

    /// The address that tells the node from others: that of IPv4, or if there is none that of IPv6.
    #[must_use]
    pub fn node_address(&self) -> IpAddr {
        match self.public_ipv6 {
            Some(ipv6) if self.public_ip.is_unspecified() => ipv6.into(),
            _ => self.public_ip.into(),
        }
    }

    /// The public addresses of the node.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        let ipv4 = (!self.public_ip.is_unspecified()).then_some(self.public_ip);
        Addresses::new(ipv4, self.public_ipv6).unwrap_or_else(|| self.public_ip.into())
    }

    /// Whether it is complete for a key with an IPv6 subnet: flannel's nodes stop to follow leases at
    /// one that is not.
    #[must_use]
    pub fn carries_ipv6(&self) -> bool {
        let has_data = ["vxlan", "wireguard"].contains(&self.backend_type.as_str());
        self.public_ipv6.is_some() && (!has_data || self.backend_v6_data.is_some())
    }

    /// The TCP and UDP checksums that the node takes from the tunnel.
    #[must_use]
    pub fn checksums(&self) -> Checksums {
        match self.muslin {
            Some(MuslinData {
                partial_checksums: true,
                ..
            }) => Checksums::Partial,
            _ => Checksums::Complete,
        }
    }

    /// Whether the node takes packets of groups from the tunnel.
    #[must_use]
    pub fn takes_multicast(&self) -> bool {
        self.muslin.is_some_and(|data| data.multicast)
    }

    /// The backend's name, for people.
    #[must_use]
    pub fn backend(&self) -> &str {
        if self.backend_type.is_empty() {
            "udp"
        } else {
            &self.backend_type
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::lease::{VxlanOptions, WireGuardMode, WireGuardOptions};

    const VXLAN: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;

    #[test]
    fn records_are_byte_for_byte_flannels() {
        let ip = Ipv4Addr::new(1, 2, 3, 4);
        assert_eq!(
            LeaseRecord::udp(ip).to_json(),
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#
        );
        let mac = "c6:d2:32:6f:8f:44".parse().unwrap();
        let vxlan = LeaseRecord::vxlan([192, 168, 64, 3].into(), Vni::new(1).unwrap(), mac);
        assert_eq!(vxlan.to_json(), VXLAN);
        assert_eq!(LeaseRecord::parse(VXLAN).unwrap(), vxlan);
        assert_eq!(vxlan.vtep_mac(), Some(mac));
    }

    #[test]
    fn records_without_data_have_their_backends_type() {
        let ip = Ipv4Addr::new(1, 2, 3, 4);
        let mac: VtepMac = "c6:d2:32:6f:8f:44".parse().unwrap();
        let direct_routing = true;
        for (backend, expected) in [
            (Backend::HostGw, r#","BackendType":"host-gw""#),
            (Backend::Ipip { direct_routing }, r#","BackendType":"ipip""#),
            (Backend::Udp { port: 1 }, ""),
        ] {
            let record = LeaseRecord::of(&backend, ip, mac);
            let start = r#"{"PublicIP":"1.2.3.4","PublicIPv6":null"#;
            assert_eq!(record.to_json(), format!("{start}{expected}}}"));
        }
    }

    #[test]
    fn only_who_says_so_takes_partial_checksums() {
        let (mac, vxlan) = (VtepMac::from_random([1; 6]), VxlanOptions::default());
        let ip = Ipv4Addr::new(1, 2, 3, 4);
        let flannels = LeaseRecord::of(&Backend::Vxlan(vxlan), ip, mac);
        assert_eq!(flannels.checksums(), Checksums::Complete);
        let own = flannels.with_checksums(Checksums::Partial);
        let read = LeaseRecord::parse(&own.to_json()).unwrap();
        assert_eq!((read.checksums(), &read), (Checksums::Partial, &own));
        let muslins = r#","Muslin":{"PartialChecksums":true}}"#;
        assert!(own.to_json().ends_with(muslins), "{own:?}");
        for backend in [
            Backend::HostGw,
            Backend::Ipip {
                direct_routing: true,
            },
        ] {
            let bare = LeaseRecord::of(&backend, ip, mac).with_checksums(Checksums::Partial);
            assert_eq!(bare.checksums(), Checksums::Complete);
        }
        let complete = own.with_checksums(Checksums::Complete);
        assert_eq!(complete.checksums(), Checksums::Complete);
        for other in [
            r#""Muslin":null"#,
            r#""Muslin":[true]"#,
            r#""Muslin":{}"#,
            r#""Muslin":{"PartialChecksums":1}"#,
            r#""Muslin":{"PartialChecksums":false,"Other":true}"#,
            r#""Other":{"PartialChecksums":true}"#,
        ] {
            let record = format!(r#"{{"PublicIP":"1.2.3.4",{other}}}"#);
            let record = LeaseRecord::parse(&record).unwrap();
            assert_eq!(record.checksums(), Checksums::Complete, "{other}");
        }
    }

    #[test]
    fn only_who_says_so_takes_packets_of_groups() {
        let flannels = LeaseRecord::parse(VXLAN).unwrap();
        assert!(!flannels.takes_multicast());
        assert_eq!(flannels.clone().with_multicast(false).to_json(), VXLAN);
        for checksums in [Checksums::Partial, Checksums::Complete] {
            let own = flannels.clone().with_checksums(checksums);
            let own = own.with_multicast(true);
            let read = LeaseRecord::parse(&own.to_json()).unwrap();
            assert_eq!(
                (read.takes_multicast(), read.checksums()),
                (true, checksums)
            );
            let off = own
                .with_multicast(false)
                .with_checksums(Checksums::Complete);
            assert_eq!(off.to_json(), VXLAN);
        }
        // Nodes on an uplink have no tunnel.
        let mac = VtepMac::from_random([1; 6]);
        let bare = LeaseRecord::of(&Backend::HostGw, Ipv4Addr::LOCALHOST, mac);
        assert!(!bare.with_multicast(true).takes_multicast());
        for other in ["1", "null", "\"true\"", "[true]"] {
            let muslin = format!(r#"{{"PartialChecksums":true,"Multicast":{other}}}"#);
            let record = format!(r#"{{"PublicIP":"1.2.3.4","Muslin":{muslin}}}"#);
            let record = LeaseRecord::parse(&record).unwrap();
            let expected = (false, Checksums::Partial);
            assert_eq!((record.takes_multicast(), record.checksums()), expected);
        }
    }

    #[test]
    fn reading_is_as_lenient_as_gos() {
        let record = LeaseRecord::parse(
            r#"{"publicip":"10.0.0.1","BACKENDTYPE":"host-gw","New":[1],"BackendData":null}"#,
        )
        .unwrap();
        assert_eq!(
            (record.public_ip, record.backend()),
            (Ipv4Addr::new(10, 0, 0, 1), "host-gw")
        );
        assert_eq!(
            record.to_json(),
            r#"{"PublicIP":"10.0.0.1","PublicIPv6":null,"BackendType":"host-gw"}"#
        );
        assert_eq!(
            LeaseRecord::parse("{}").unwrap().public_ip,
            Ipv4Addr::UNSPECIFIED
        );
        let dual = r#"{"PublicIP":"1.1.1.1","PublicIPv6":"fd00::3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":""},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}}"#;
        let record = LeaseRecord::parse(dual).unwrap();
        assert_eq!(record.to_json(), dual);
        assert_eq!(record.vtep_mac(), None, "a Windows node that is not ready");
    }

    #[test]
    fn records_of_both_versions_are_byte_for_byte_flannels() {
        let (mac, mac6) = ("c6:d2:32:6f:8f:44", "0e:11:22:33:44:55");
        let (mac, mac6) = (mac.parse().unwrap(), mac6.parse().unwrap());
        let vxlan = Backend::Vxlan(VxlanOptions::default());
        let (ip, ipv6) = ([192, 168, 64, 3].into(), "fd00::3".parse().unwrap());
        let dual = LeaseRecord::of(&vxlan, ip, mac).with_ipv6(&vxlan, ipv6, mac6);
        let text = r#"{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"0e:11:22:33:44:55"}}"#;
        assert_eq!(dual.to_json(), text);
        let read = LeaseRecord::parse(text).unwrap();
        assert_eq!(read, dual);
        assert_eq!(
            (read.vtep_mac(), read.vtep_mac_v6()),
            (Some(mac), Some(mac6))
        );
        assert!(read.carries_ipv6());
        assert_eq!(read.node_address(), IpAddr::V4(ip));

        let only = dual.without_ipv4();
        let text = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::3","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"0e:11:22:33:44:55"}}"#;
        assert_eq!(only.to_json(), text);
        assert_eq!(LeaseRecord::parse(text).unwrap(), only);
        assert_eq!(only.node_address(), IpAddr::V6(ipv6));

        let host_gw = LeaseRecord::of(&Backend::HostGw, ip, mac);
        let host_gw = host_gw.with_ipv6(&Backend::HostGw, ipv6, mac6);
        let text = r#"{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3","BackendType":"host-gw"}"#;
        assert_eq!(host_gw.to_json(), text);
        assert!(host_gw.carries_ipv6());
        for incomplete in [
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"host-gw"}"#,
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":"fd00::3","BackendType":"vxlan"}"#,
        ] {
            assert!(!LeaseRecord::parse(incomplete).unwrap().carries_ipv6());
        }
    }

    const KEY: &str = "mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyc=";

    #[test]
    fn records_of_wireguard_are_byte_for_byte_flannels() {
        let key: PublicKey = KEY.parse().unwrap();
        let (ip, ipv6) = ([192, 168, 64, 3].into(), "fd00::3".parse().unwrap());
        for (mode, port_v6) in [
            (WireGuardMode::Separate, 51821),
            (WireGuardMode::Auto, 51820),
            (WireGuardMode::Ipv4, 51820),
            (WireGuardMode::Ipv6, 51820),
        ] {
            let backend = Backend::WireGuard(WireGuardOptions {
                mode,
                ..WireGuardOptions::default()
            });
            let plain = LeaseRecord::of(&backend, ip, key);
            let data = format!(r#""BackendData":{{"PublicKey":"{KEY}","Port":51820}}"#);
            let data_v6 = format!(r#""BackendV6Data":{{"PublicKey":"{KEY}","Port":{port_v6}}}"#);
            let kind = r#""BackendType":"wireguard""#;
            let text = format!(r#"{{"PublicIP":"192.168.64.3","PublicIPv6":null,{kind},{data}}}"#);
            assert_eq!(plain.to_json(), text);
            assert_eq!(LeaseRecord::parse(&text).unwrap(), plain);
            assert!(!plain.carries_ipv6());

            let dual = plain.with_ipv6(&backend, ipv6, key);
            let text = format!(
                r#"{{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3",{kind},{data},{data_v6}}}"#
            );
            assert_eq!(dual.to_json(), text);
            let read = LeaseRecord::parse(&text).unwrap();
            assert_eq!(read, dual);
            assert!(read.carries_ipv6());
            assert_eq!(read.end(), Some(TunnelEnd::Key(key)));
            assert_eq!(read.public_keys().collect::<Vec<_>>(), [key]);

            let only = dual.without_ipv4();
            let text =
                format!(r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::3",{kind},{data_v6}}}"#);
            assert_eq!(only.to_json(), text);
            assert_eq!(only.end(), Some(TunnelEnd::Key(key)));
        }
    }

    #[test]
    fn what_a_wireguard_node_leaves_out_is_not_there() {
        let read = |data: &str| {
            let text = format!(
                r#"{{"PublicIP":"1.2.3.4","BackendType":"wireguard","BackendData":{data}}}"#
            );
            LeaseRecord::parse(&text).unwrap().wireguard()
        };
        let public_key = KEY.parse().unwrap();
        for (port, expected) in [
            (r#","Port":51900"#, 51900),
            (r#","port":7,"Other":1"#, 7),
            (r#","Port":0"#, 0),
            (r#","Port":null"#, 0),
            (r#","Port":65536"#, 0),
            (r#","Port":-1"#, 0),
            ("", 0),
        ] {
            let data = format!(r#"{{"PublicKey":"{KEY}"{port}}}"#);
            let port = expected;
            assert_eq!(read(&data), Some(WireGuardData { public_key, port }));
        }
        for none in [
            "null",
            "7",
            "{}",
            r#"{"PublicKey":""}"#,
            r#"{"PublicKey":7,"Port":1}"#,
            r#"{"PublicKey":"mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDy","Port":1}"#,
        ] {
            assert_eq!(read(none), None, "{none}");
        }
        let other = format!(
            r#"{{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{{"PublicKey":"{KEY}"}}}}"#
        );
        assert_eq!(LeaseRecord::parse(&other).unwrap().wireguard(), None);
    }

    #[test]
    fn what_go_refuses_is_refused() {
        for bad in [
            "",
            "[]",
            "7",
            r#"{"PublicIP":null}"#,
            r#"{"PublicIP":""}"#,
            r#"{"PublicIP":"::1"}"#,
            r#"{"PublicIP":"1.2.3.4","BackendType":7}"#,
            r#"{"PublicIP":"1.2.3.4","BackendType":"vx lan"}"#,
            r#"{"PublicIP":"1.2.3.4","BackendType":"\u001b[2J"}"#,
            &format!(
                r#"{{"PublicIP":"1.2.3.4","BackendType":"{}"}}"#,
                "x".repeat(65)
            ),
        ] {
            assert!(LeaseRecord::parse(bad).is_err(), "{bad}");
        }
    }
}
