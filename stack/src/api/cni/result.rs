//! What a successful ADD answers, and what earlier plugins and delegates have answered.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use super::version::Version;

/// Interfaces, and addresses, that one result may have.
pub const MAX_ENTRIES: usize = 256;
/// Routes that one result may have.
pub const MAX_ROUTES: usize = 2048;
/// Names that may be told of DNS, of each kind.
pub const MAX_NAMES: usize = 64;
/// Bytes of the longest of its texts.
pub const MAX_TEXT: usize = 4096;

/// What an ADD has brought about, in the form of the newest version. Older ones are read likewise,
/// as they only lack some of it or repeat it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Added {
    /// Interfaces.
    #[serde(default, deserialize_with = "or_default")]
    pub interfaces: Vec<Interface>,
    /// Addresses.
    #[serde(default, deserialize_with = "or_default")]
    pub ips: Vec<Ip>,
    /// Routes.
    #[serde(default, deserialize_with = "or_default")]
    pub routes: Vec<Route>,
    /// What is to be known of DNS.
    #[serde(default, deserialize_with = "or_default")]
    pub dns: Dns,
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Its MTU in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The network namespace that it is in, if that is not the machine's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// The socket that stands for it.
    #[serde(
        default,
        rename = "socketPath",
        skip_serializing_if = "Option::is_none"
    )]
    pub socket_path: Option<String>,
    /// The device on the bus that stands for it.
    #[serde(default, rename = "pciID", skip_serializing_if = "Option::is_none")]
    pub pci_id: Option<String>,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Ip {
    /// The interface that has it: its place among the result's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    /// The address with the length of its prefix.
    pub address: IpNet,
    /// The gateway of its subnet.
    #[serde(
        default,
        deserialize_with = "no_empty",
        skip_serializing_if = "Option::is_none"
    )]
    pub gateway: Option<IpAddr>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Route {
    /// What it leads to.
    pub dst: IpNet,
    /// By which gateway; the gateway of the address if there is none.
    #[serde(
        default,
        deserialize_with = "no_empty",
        skip_serializing_if = "Option::is_none"
    )]
    pub gw: Option<IpAddr>,
    /// Its MTU in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The MSS that it announces in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    /// Its priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i64>,
    /// The table it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<i64>,
    /// Its scope.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<i64>,
}

/// What is to be known of DNS. Runtimes that write resolv.conf(5) themselves leave it alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Dns {
    /// Resolvers.
    #[serde(
        default,
        alias = "Nameservers",
        alias = "servers",
        alias = "Servers",
        deserialize_with = "or_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub nameservers: Vec<String>,
    /// The domain of the container.
    #[serde(
        default,
        alias = "Domain",
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub domain: String,
    /// Domains in which short names are looked for.
    #[serde(
        default,
        alias = "Search",
        alias = "searches",
        alias = "Searches",
        deserialize_with = "or_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub search: Vec<String>,
    /// Options of resolv.conf(5).
    #[serde(
        default,
        alias = "Options",
        deserialize_with = "or_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub options: Vec<String>,
}

impl Interface {
    /// The interface `name` in a namespace.
    #[must_use]
    pub fn new(name: &str, mac: &str, mtu: u32, sandbox: &str) -> Self {
        Self {
            name: name.to_owned(),
            mac: Some(mac.to_owned()),
            mtu: Some(mtu),
            sandbox: Some(sandbox.to_owned()),
            ..Self::default()
        }
    }
}

impl Ip {
    /// An address of the result's only interface.
    #[must_use]
    pub const fn new(address: IpNet, gateway: Option<IpAddr>) -> Self {
        Self {
            interface: Some(0),
            address,
            gateway,
        }
    }
}

impl Route {
    /// A route by a gateway.
    #[must_use]
    pub const fn new(dst: IpNet, gw: Option<IpAddr>) -> Self {
        Self {
            dst,
            gw,
            mtu: None,
            advmss: None,
            priority: None,
            table: None,
            scope: None,
        }
    }
}

impl Dns {
    /// Whether nothing is to be known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        let lists = [&self.nameservers, &self.search, &self.options];
        let texts = lists.into_iter().flatten().chain([&self.domain]);
        texts.map(String::as_str)
    }

    /// Whether there is as much of it as there may be at most.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        let lists = [&self.nameservers, &self.search, &self.options];
        lists.iter().all(|list| list.len() <= MAX_NAMES)
            && self.texts().all(|text| text.len() <= MAX_TEXT)
    }
}

impl Added {
    /// What another plugin has answered.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(value: &Value) -> Result<Self, String> {
        if !value.is_object() {
            return Err("it is no object".to_owned());
        }
        let read = Self::deserialize(value).map_err(|error| error.to_string())?;
        read.check().map(|()| read)
    }

    fn check(&self) -> Result<(), String> {
        let count = self.interfaces.len().max(self.ips.len());
        if count > MAX_ENTRIES || self.routes.len() > MAX_ROUTES || !self.dns.is_bounded() {
            return Err("it has too many entries, or one that is too long".to_owned());
        }
        let has = |index: usize| index < self.interfaces.len();
        if let Some(index) = self
            .ips
            .iter()
            .filter_map(|ip| ip.interface)
            .find(|it| !has(*it))
        {
            return Err(format!(
                "an address is of interface {index}, which is not there"
            ));
        }
        for interface in &self.interfaces {
            let texts = [
                Some(&interface.name),
                interface.mac.as_ref(),
                interface.sandbox.as_ref(),
                interface.socket_path.as_ref(),
                interface.pci_id.as_ref(),
            ];
            if texts.iter().flatten().any(|text| text.len() > MAX_TEXT) {
                return Err("an interface has a text that is too long".to_owned());
            }
        }
        Ok(())
    }

    /// Adds an interface with addresses and routes to what earlier plugins have brought about.
    pub fn add(&mut self, interface: Interface, ips: Vec<Ip>, routes: Vec<Route>, dns: Dns) {
        let index = self.interfaces.len();
        self.interfaces.push(interface);
        self.ips.extend(ips.into_iter().map(|ip| Ip {
            interface: Some(index),
            ..ip
        }));
        self.routes.extend(routes);
        if self.dns.is_empty() {
            self.dns = dns;
        }
    }

    /// The place of an interface in a namespace, and its addresses.
    #[must_use]
    pub fn interface(&self, name: &str, sandbox: &str) -> Option<(&Interface, Vec<&Ip>)> {
        let is_it = |it: &Interface| it.name == name && it.sandbox.as_deref() == Some(sandbox);
        let index = self.interfaces.iter().position(is_it)?;
        let ips = self.ips.iter().filter(|ip| ip.interface == Some(index));
        Some((&self.interfaces[index], ips.collect()))
    }

    /// What goes to standard output, in one line, as a version of the specification has it.
    #[must_use]
    pub fn print(&self, version: Version) -> String {
        let mut printed = Map::new();
        printed.insert("cniVersion".to_owned(), version.as_str().into());
        let mut list = |name: &str, entries: Vec<Value>| {
            if !entries.is_empty() {
                printed.insert(name.to_owned(), entries.into());
            }
        };
        let is_newest = version >= Version::V1_1_0;
        let interfaces = self.interfaces.iter().cloned().map(|mut interface| {
            if !is_newest {
                interface.mtu = None;
                interface.socket_path = None;
                interface.pci_id = None;
            }
            json!(interface)
        });
        list("interfaces", interfaces.collect());
        let ips = self.ips.iter().map(|ip| {
            let mut entry = Map::new();
            if version < Version::V1_0_0 {
                let family = if ip.address.addr().is_ipv4() {
                    "4"
                } else {
                    "6"
                };
                entry.insert("version".to_owned(), family.into());
            }
            if let Value::Object(rest) = json!(ip) {
                entry.extend(rest);
            }
            Value::Object(entry)
        });
        list("ips", ips.collect());
        let routes = self.routes.iter().map(|route| match is_newest {
            true => json!(route),
            false => json!(Route::new(route.dst, route.gw)),
        });
        list("routes", routes.collect());
        if !self.dns.is_empty() {
            printed.insert("dns".to_owned(), json!(self.dns));
        }
        Value::Object(printed).to_string()
    }
}

/// Go writes lists that are not there as `null`.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Go writes an address that is not there as an empty text.
fn no_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    let text = text.filter(|text| !text.is_empty());
    text.map(|text| text.parse().map_err(serde::de::Error::custom))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added() -> Added {
        let mut added = Added::default();
        let dns = Dns {
            nameservers: vec!["10.244.1.1".to_owned()],
            ..Dns::default()
        };
        let gateway: IpAddr = "10.244.1.1".parse().unwrap();
        added.add(
            Interface::new("eth0", "02:00:0a:f4:01:02", 1450, "/run/netns/x"),
            vec![
                Ip::new("10.244.1.2/24".parse().unwrap(), Some(gateway)),
                Ip::new("fd00::2/64".parse().unwrap(), None),
            ],
            vec![Route {
                mtu: Some(1400),
                ..Route::new("0.0.0.0/0".parse().unwrap(), Some(gateway))
            }],
            dns,
        );
        added
    }

    #[test]
    fn results_are_as_each_version_has_them() {
        let old = concat!(
            r#"{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","mac":"02:00:0a:f4:01:02","#,
            r#""sandbox":"/run/netns/x"}],"ips":[{"version":"4","interface":0,"#,
            r#""address":"10.244.1.2/24","gateway":"10.244.1.1"},{"version":"6","interface":0,"#,
            r#""address":"fd00::2/64"}],"routes":[{"dst":"0.0.0.0/0","gw":"10.244.1.1"}],"#,
            r#""dns":{"nameservers":["10.244.1.1"]}}"#
        );
        let text = added().print(Version::V0_4_0);
        assert_eq!(text, old);
        for version in [Version::V0_3_0, Version::V0_3_1] {
            let expected = old.replace("0.4.0", version.as_str());
            assert_eq!(added().print(version), expected);
        }
        let without = old.replace(r#""version":"4","#, "");
        let without = without.replace(r#""version":"6","#, "");
        assert_eq!(
            added().print(Version::V1_0_0),
            without.replace("0.4.0", "1.0.0")
        );
        let newest = without.replace("0.4.0", "1.1.0");
        let newest = newest.replace(r#""sandbox""#, r#""mtu":1450,"sandbox""#);
        let newest = newest.replace(r#""gw":"10.244.1.1"}"#, r#""gw":"10.244.1.1","mtu":1400}"#);
        assert_eq!(added().print(Version::V1_1_0), newest);
        let read = |text: &str| Added::read(&serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!(read(&newest), added());
        assert_eq!(read(&text).print(Version::V0_4_0), text);
    }

    #[test]
    fn what_earlier_plugins_did_stays() {
        let mut chained = added();
        chained.add(
            Interface::new("net1", "02:00:0a:f4:01:03", 1450, "/run/netns/x"),
            vec![Ip::new("10.1.0.2/24".parse().unwrap(), None)],
            Vec::new(),
            Dns::default(),
        );
        assert_eq!(chained.ips[2].interface, Some(1));
        assert_eq!(chained.dns, added().dns);
        let (_, ips) = chained.interface("net1", "/run/netns/x").unwrap();
        assert_eq!(ips, [&chained.ips[2]]);
        assert!(chained.interface("net1", "/run/netns/y").is_none());
    }

    #[test]
    fn results_of_others_are_checked() {
        let read = |value: Value| Added::read(&value);
        let of_host_local = json!({
            "cniVersion": "0.3.1",
            "ips": [{"version": "4", "address": "10.244.1.5/24", "gateway": "10.244.1.1"}],
            "routes": [{"dst": "10.244.0.0/16", "gw": ""}],
            "interfaces": null,
            "dns": {},
        });
        let of_host_local = read(of_host_local).unwrap();
        assert_eq!(of_host_local.ips[0].interface, None);
        assert_eq!(of_host_local.routes[0].gw, None);
        for bad in [
            json!([]),
            json!({"ips": [{}]}),
            json!({"ips": [{"address": "10.0.0.1"}]}),
            json!({"ips": [{"address": "10.0.0.1/24", "interface": 0}]}),
            json!({"ips": [{"address": "10.0.0.1/24", "interface": -1}]}),
            json!({"routes": [{"dst": "10.0.0.1/33"}]}),
            json!({"routes": [{"dst": "10.0.0.0/8", "gw": "x"}]}),
            json!({"interfaces": [{"name": "x".repeat(MAX_TEXT + 1)}]}),
            json!({"interfaces": vec![json!({"name": "x"}); MAX_ENTRIES + 1]}),
            json!({"dns": {"search": vec!["x"; MAX_NAMES + 1]}}),
        ] {
            let text = bad.to_string();
            assert!(read(bad).is_err(), "{text}");
        }
    }
}
