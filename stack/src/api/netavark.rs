//! netavark's plugins, which attach containers of Podman: what they are asked on standard input, and
//! answer (plugin-API.md and src/network/types.rs of containers/netavark, API 1.0.0).
//!
//! Setup and teardown are ADD and DEL of the [CNI plugin](super::cni), with the network's name and its
//! options `socket` and `mtu` in place of a configuration.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::IpAddr;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use super::cni::KubernetesPod;
use super::cni::config::{
    Config, MAX_ADDRESSES, MAX_ALIASES, MAX_NAME, Wanted, check_mtu, check_socket,
};
use super::cni::environment::{
    Arguments, Command, Environment, MAX_PATH, check_container, check_interface,
};
use super::cni::error::{Error, shown};
use super::cni::fields::{is_identifier, mac};
use super::cni::result::{Added, Dns};
use super::cni::version::Version;
use super::published::{MAX_PORTS, PortMapping, Ports};

/// The version of the API, the only one there is.
const API_VERSION: &str = "1.0.0";
/// Options of a network that are known.
const OPTIONS: [&str; 2] = ["socket", "mtu"];
/// By which Podman knows that it is not to choose addresses.
const NO_IPAM: &str = "none";

/// A container that is to be attached or detached, as the CNI plugin is told of one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Container {
    /// In place of the environment.
    pub environment: Environment,
    /// In place of a configuration.
    pub config: Config,
}

/// The input of setup and teardown.
#[derive(Deserialize)]
struct Input {
    container_id: String,
    #[serde(default)]
    container_name: String,
    #[serde(default)]
    port_mappings: Option<Vec<IgnoredAny>>,
    network: Network,
    network_options: Options,
}

/// A network, as far as it matters.
#[derive(Deserialize)]
struct Network {
    name: String,
    #[serde(default)]
    options: Option<BTreeMap<String, String>>,
}

/// What is wanted of one container in a network.
#[derive(Deserialize)]
struct Options {
    #[serde(default)]
    aliases: Option<Vec<String>>,
    interface_name: String,
    #[serde(default)]
    static_ips: Option<Vec<IpAddr>>,
    #[serde(default)]
    static_mac: Option<String>,
    #[serde(default)]
    options: Option<BTreeMap<String, String>>,
}

impl Container {
    /// Reads what setup is asked for a network namespace.
    ///
    /// # Errors
    /// What is malformed, or not possible.
    pub fn setup(input: &[u8], netns: String) -> Result<Self, Error> {
        Self::read(input, netns, Command::Add)
    }

    /// The same for teardown, which does without all that matters to setup alone.
    ///
    /// # Errors
    /// What is malformed.
    pub fn teardown(input: &[u8], netns: String) -> Result<Self, Error> {
        Self::read(input, netns, Command::Del)
    }

    fn read(input: &[u8], netns: String, command: Command) -> Result<Self, Error> {
        let input: Input =
            serde_json::from_slice(input).map_err(|error| Error::Json(shown(error)))?;
        check_container(&input.container_id)?;
        let interface = input.network_options.interface_name.clone();
        check_interface(&interface)?;
        if netns.len() > MAX_PATH {
            return Err(invalid("netns", "it is longer than a path can be"));
        }
        let (socket, mtu) = input.network.read()?;
        let mut config = Config {
            version: Version::NEWEST,
            name: input.network.name,
            socket,
            delegate: None,
            mtu,
            dns: Dns::default(),
            wanted: Wanted::default(),
            previous: None,
            valid: None,
            notes: Vec::new(),
        };
        let mut arguments = Arguments::default();
        if command == Command::Add {
            arguments.pod = Some(input.container_name)
                .filter(|name| !name.is_empty() && name.len() <= MAX_NAME)
                .map(|name| KubernetesPod {
                    name,
                    ..KubernetesPod::default()
                });
            let Options {
                aliases,
                static_ips,
                static_mac,
                options,
                ..
            } = input.network_options;
            // Podman listens at those itself for as long as the container runs, since it expects
            // that they are translated in the kernel before they come there.
            if input.port_mappings.is_some_and(|ports| !ports.is_empty()) {
                let name = &config.name;
                let instead = format!(
                    "Podman keeps published ports to itself: in place of '-p 8080:80' use \
                     '--network {name}:publish=8080:80'"
                );
                return Err(invalid("port_mappings", instead));
            }
            let wanted = &mut config.wanted;
            for (key, value) in options.iter().flatten() {
                match key.as_str() {
                    "publish" => wanted.publish = published(value)?,
                    other => {
                        let problem = format!("'{}' is not publish", shown(other));
                        return Err(invalid("network_options.options", problem));
                    }
                }
            }
            wanted.addresses = static_ips.unwrap_or_default();
            if wanted.addresses.len() > MAX_ADDRESSES {
                let problem = format!("a pod has at most {MAX_ADDRESSES} addresses");
                return Err(invalid("static_ips", problem));
            }
            let text = static_mac.filter(|text| !text.is_empty());
            let read_mac = text.map(|text| mac(&text)).transpose();
            wanted.mac = read_mac.map_err(|why| invalid("static_mac", why))?;
            for name in aliases.iter().flatten().take(MAX_ALIASES) {
                wanted.add_alias(name, &mut config.notes);
            }
        }
        Ok(Self {
            environment: Environment {
                command,
                container: input.container_id,
                netns: Some(netns).filter(|path| !path.is_empty()),
                interface,
                arguments,
                path: String::new(),
                may_be_own_netns: false,
            },
            config,
        })
    }
}

impl Network {
    /// The node's control socket and the MTU.
    fn read(&self) -> Result<(String, Option<u16>), Error> {
        if !is_identifier(&self.name) || self.name.len() > MAX_NAME {
            return Err(Error::NameCharacters(self.name.clone()));
        }
        let none = BTreeMap::new();
        let options = self.options.as_ref().unwrap_or(&none);
        let mtu = options.get("mtu").map(|text| text.parse());
        let mtu = mtu
            .transpose()
            .map_err(|_| invalid("mtu", "it is no number"))?;
        Ok((
            check_socket(options.get("socket").cloned())?,
            check_mtu(mtu)?,
        ))
    }
}

/// The published ports that an option names: as `muslin run -p` has them, several with `;` in between.
fn published(text: &str) -> Result<Vec<PortMapping>, Error> {
    const KEY: &str = "network_options.options.publish";
    let ports = text.split(';').map(str::parse::<Ports>);
    let ports: Result<Vec<_>, _> = ports.collect();
    let all = Ports::all(&ports.map_err(|why| invalid(KEY, shown(why)))?);
    if all.len() > usize::from(MAX_PORTS) {
        return Err(invalid(KEY, format!("a pod has at most {MAX_PORTS} ports")));
    }
    Ok(all)
}

fn invalid(key: &'static str, problem: impl Into<String>) -> Error {
    let problem = problem.into();
    Error::Invalid { key, problem }
}

/// Answers create: the network as it is asked for, if it is possible, and without addresses that Podman
/// would choose. Subnets only tell Podman which addresses `--ip` may name.
///
/// # Errors
/// What is malformed, or not possible.
pub fn create(input: &[u8]) -> Result<String, Error> {
    let mut network: Map<String, Value> =
        serde_json::from_slice(input).map_err(|error| Error::Json(shown(error)))?;
    let known = Network::deserialize(&Value::Object(network.clone()));
    let known = known.map_err(|error| Error::Json(shown(error)))?;
    known.read()?;
    let options = known.options.iter().flatten();
    if let Some((key, _)) = options
        .clone()
        .find(|(key, _)| !OPTIONS.contains(&key.as_str()))
    {
        return Err(invalid(
            "options",
            format!("'{}' is not one of {}", shown(key), OPTIONS.join(", ")),
        ));
    }
    if network.get("internal") == Some(&json!(true)) {
        return Err(invalid(
            "internal",
            "whether pods reach the outside is the node's choice (--egress)",
        ));
    }
    let has_routes = |routes: &Value| routes.as_array().is_some_and(|all| !all.is_empty());
    if network.get("routes").is_some_and(has_routes) {
        return Err(invalid("routes", "they are the node's"));
    }
    let ipam = network.entry("ipam_options").or_insert_with(|| json!({}));
    match ipam.as_object_mut() {
        Some(ipam) => {
            ipam.insert("driver".to_owned(), NO_IPAM.into());
        }
        None => *ipam = json!({"driver": NO_IPAM}),
    }
    // There is no aardvark-dns for it: the node answers.
    network.insert("dns_enabled".to_owned(), false.into());
    Ok(Value::Object(network).to_string())
}

/// Answers setup: what has come of it.
#[must_use]
pub fn status(added: &Added, interface: &str) -> String {
    let index = added.interfaces.iter().position(|it| it.name == interface);
    let mac = index.and_then(|index| added.interfaces[index].mac.as_deref());
    let ips = added.ips.iter().filter(|ip| ip.interface == index);
    let subnets: Vec<_> = ips
        .map(|ip| match ip.gateway {
            Some(gateway) => json!({"ipnet": ip.address, "gateway": gateway}),
            None => json!({"ipnet": ip.address}),
        })
        .collect();
    json!({
        "dns_search_domains": added.dns.search,
        "dns_server_ips": added.dns.nameservers,
        "interfaces": {
            interface: {"mac_address": mac.unwrap_or_default(), "subnets": subnets},
        },
    })
    .to_string()
}

/// Answers info.
#[must_use]
pub fn info(version: &str) -> String {
    json!({"version": version, "api_version": API_VERSION}).to_string()
}

/// What goes to standard output instead of an answer.
#[must_use]
pub fn error(error: impl Display) -> String {
    json!({"error": error.to_string()}).to_string()
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::*;
    use crate::api::cni::result::{Interface, Ip};
    use crate::api::published::Transport;

    /// As netavark's documentation has it, with the options of this plugin.
    fn input() -> Value {
        json!({
            "container_id": "752947ff91f961eb3cb47ffe9315016979f3ffbec09e4d96a4fae3fb03391697",
            "container_name": "testctr",
            "port_mappings": null,
            "network": {
                "dns_enabled": false,
                "driver": "muslin-netavark",
                "id": "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9",
                "internal": false,
                "ipv6_enabled": false,
                "name": "pods",
                "network_interface": null,
                "options": {"socket": "/run/muslin/control.sock", "mtu": "1400"},
                "ipam_options": {"driver": "none"},
                "subnets": [{"gateway": "10.88.0.1", "lease_range": null, "subnet": "10.88.0.0/16"}],
                "network_dns_servers": null,
            },
            "network_options": {
                "aliases": ["752947ff91f9", "No Name"],
                "interface_name": "eth0",
                "static_ips": ["10.88.0.50"],
                "static_mac": "aa:bb:cc:dd:aa:00",
                "options": {"publish": "127.0.0.1:8080:80"},
            },
        })
    }

    fn setup(input: &Value) -> Result<Container, String> {
        let read = Container::setup(input.to_string().as_bytes(), "/run/netns/a".to_owned());
        read.map_err(|error| error.to_string())
    }

    #[test]
    fn a_container_is_one_of_cni() {
        let Container {
            environment,
            config,
        } = setup(&input()).unwrap();
        assert!(environment.container.starts_with("752947ff91f9"));
        assert_eq!(environment.interface, "eth0");
        assert_eq!(environment.netns.as_deref(), Some("/run/netns/a"));
        assert_eq!(environment.arguments.pod.unwrap().name, "testctr");
        assert_eq!((config.name.as_str(), config.mtu), ("pods", Some(1400)));
        let wanted = config.wanted;
        assert_eq!(wanted.addresses, ["10.88.0.50".parse::<IpAddr>().unwrap()]);
        assert_eq!(wanted.mac.as_deref(), Some("aa:bb:cc:dd:aa:00"));
        assert_eq!(wanted.aliases, ["752947ff91f9".parse().unwrap()]);
        assert_eq!(config.notes, ["the alias \"No Name\" is left out"]);
        let port = wanted.publish[0];
        assert_eq!((port.host_port, port.pod_port), (8080, 80));
        assert_eq!(port.address, IpAddr::from([127, 0, 0, 1]));
        let teardown = Container::teardown(input().to_string().as_bytes(), String::new()).unwrap();
        assert_eq!(teardown.environment.command, Command::Del);
        assert_eq!(teardown.environment.netns, None);
        assert!(teardown.config.wanted.publish.is_empty());
    }

    #[test]
    fn ports_are_published_by_an_option() {
        let mut all = input();
        all["network_options"]["options"] = json!({"publish": "8080-8081:80-81;5300:53/udp"});
        let ports = setup(&all).unwrap().config.wanted.publish;
        let ports: Vec<_> = ports
            .iter()
            .map(|it| (it.transport, it.host_port, it.pod_port))
            .collect();
        let (tcp, udp) = (Transport::Tcp, Transport::Udp);
        assert_eq!(ports, [(tcp, 8080, 80), (tcp, 8081, 81), (udp, 5300, 53)]);
        all["network_options"]["options"] = json!(null);
        assert!(setup(&all).unwrap().config.wanted.publish.is_empty());
        // As netavark's documentation has it, and Podman says it for `-p`.
        all["port_mappings"] = json!([{
            "container_port": 80,
            "host_ip": "127.0.0.1",
            "host_port": 8080,
            "protocol": "tcp",
            "range": 1,
        }]);
        let told = setup(&all).unwrap_err();
        assert!(told.contains("--network pods:publish=8080:80"), "{told}");
        assert!(Container::teardown(all.to_string().as_bytes(), String::new()).is_ok());
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let with = |pointer: &str, value: Value| {
            let mut all = input();
            *all.pointer_mut(pointer).unwrap() = value;
            setup(&all).unwrap_err()
        };
        let option = |key: &str, value: &str| with("/network_options/options", json!({key: value}));
        for error in [
            with("/container_id", json!("a/b")),
            with("/network/name", json!("a b")),
            with("/network/options", json!({"mtu": "many"})),
            with("/network/options", json!({"socket": "control.sock"})),
            with("/network_options/interface_name", json!("0123456789012345")),
            with("/network_options/static_ips", json!(["10.88.0.0.1"])),
            with("/network_options/static_mac", json!("ff:ff:ff:ff:ff:ff")),
            with("/network", json!(null)),
            option("publish", ""),
            option("publish", "8080:80;"),
            option("publish", "1-257:1-257"),
            option("publish", "1-200:1-200;1001-1200:1-200"),
            option("host_interface_name", "veth0"),
        ] {
            assert!(!error.is_empty());
        }
        assert!(Container::setup(b"{", String::new()).is_err());
        assert!(setup(&json!({})).is_err());
    }

    #[test]
    fn a_network_is_created_as_it_was_asked_for() {
        let network = json!({
            "name": "pods",
            "id": "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9",
            "driver": "muslin-netavark",
            "created": "0001-01-01T00:00:00Z",
            "ipv6_enabled": false,
            "internal": false,
            "dns_enabled": true,
            "ipam_options": {},
            "options": {"socket": "/run/user/1000/muslin/control.sock"},
        });
        let create = |network: &Value| create(network.to_string().as_bytes());
        let created: Value = serde_json::from_str(&create(&network).unwrap()).unwrap();
        let mut expected = network.clone();
        expected["ipam_options"] = json!({"driver": "none"});
        expected["dns_enabled"] = json!(false);
        assert_eq!(created, expected);
        for (key, value) in [
            ("options", json!({"isolate": "true"})),
            ("options", json!({"mtu": "1"})),
            ("internal", json!(true)),
            (
                "routes",
                json!([{"destination": "10.0.0.0/8", "gateway": "10.88.0.1"}]),
            ),
            ("name", json!("")),
        ] {
            let mut other = network.clone();
            other[key] = value;
            assert!(create(&other).is_err(), "{other}");
        }
        assert!(super::create(b"[]").is_err());
    }

    #[test]
    fn a_result_is_told_as_netavark_reads_it() {
        let mut added = Added::default();
        let ip =
            |net: &str, gateway: &str| Ip::new(net.parse::<IpNet>().unwrap(), gateway.parse().ok());
        let ips = vec![ip("10.88.0.50/16", "10.88.0.1"), ip("fd00::2/64", "")];
        let mut dns = Dns::default();
        dns.nameservers.push("10.88.0.1".to_owned());
        let interface = Interface::new("eth0", "aa:bb:cc:dd:aa:00", 1450, "/run/netns/a");
        added.add(interface, ips, Vec::new(), dns);
        let expected = json!({
            "dns_search_domains": [],
            "dns_server_ips": ["10.88.0.1"],
            "interfaces": {"eth0": {
                "mac_address": "aa:bb:cc:dd:aa:00",
                "subnets": [
                    {"ipnet": "10.88.0.50/16", "gateway": "10.88.0.1"},
                    {"ipnet": "fd00::2/64"},
                ],
            }},
        });
        let told: Value = serde_json::from_str(&status(&added, "eth0")).unwrap();
        assert_eq!(told, expected);
        assert_eq!(
            info("0.1.0"),
            r#"{"version":"0.1.0","api_version":"1.0.0"}"#
        );
        assert_eq!(error("no node"), r#"{"error":"no node"}"#);
    }
}
