//! What a runtime says on the plugin's standard input: the administrator's configuration, with what
//! the runtime adds.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::environment::{Command, MAX_CONTAINER, MAX_INTERFACE};
use super::error::{Error, shown};
use super::fields::{address, is_identifier, mac};
use super::result::{Added, Dns};
use super::version::Version;
use super::{Key, Rate};
use crate::api::published::{MAX_PORTS, PortMapping, Transport};
use crate::control::ipam::PodName;

/// Bytes of the longest configuration. A pod's annotations, which runtimes pass on, have up to
/// 256 KiB.
pub const MAX_CONFIG: usize = 4 << 20;
/// Bytes of the longest network name.
pub const MAX_NAME: usize = 253;
/// Addresses that can be asked for.
pub const MAX_ADDRESSES: usize = 16;
/// Names that can be asked for.
pub const MAX_ALIASES: usize = 64;
/// The socket of the node if the configuration names none.
pub const SOCKET: &str = "/run/muslin/control.sock";
/// Bytes of the longest path of a socket (unix(7)).
const MAX_SOCKET: usize = 107;
/// What `ipam.type` is where the node chooses addresses.
const OURS: [&str; 2] = ["", "muslin"];
/// Bits of the largest burst, which is what the reference's `bandwidth` takes: 4 GiB, less one bit.
const MAX_BURST: u64 = 8 * (u32::MAX as u64) - 1;
/// The smallest MTU in bytes (RFC 791), and the largest of a packet.
const MTUS: std::ops::RangeInclusive<u64> = 68..=65_535;

/// A configuration, as far as it matters to a command: what does not is left unread, so that it
/// does not stand in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// The version that is spoken.
    pub version: Version,
    /// The network's name.
    pub name: String,
    /// The path of the node's control socket.
    pub socket: String,
    /// The program that chooses addresses, if it is not the node.
    pub delegate: Option<String>,
    /// The largest MTU in bytes that the interface is to have; for ADD, as what follows.
    pub mtu: Option<u16>,
    /// What is to be known of DNS.
    pub dns: Dns,
    /// What the runtime wants for this pod.
    pub wanted: Wanted,
    /// What earlier plugins have answered; also for CHECK, what ADD has.
    pub previous: Option<Added>,
    /// The attachments that are in use; for GC. None if the runtime does not tell.
    pub valid: Option<Vec<Key>>,
    /// What was left out, and why, in one line each for a log.
    pub notes: Vec<String>,
}

/// What a runtime wants for one pod (`runtimeConfig` and `args`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Wanted {
    /// Ports of the machine that lead to it.
    pub publish: Vec<PortMapping>,
    /// What it may receive.
    pub ingress: Option<Rate>,
    /// What it may send.
    pub egress: Option<Rate>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its MAC address.
    pub mac: Option<String>,
    /// Further names.
    pub aliases: Vec<PodName>,
    /// Its annotations in Kubernetes.
    pub annotations: BTreeMap<String, String>,
}

impl Config {
    /// Reads the configuration of a command.
    ///
    /// # Errors
    /// Of codes 6, 7, 1 and 2, in the reference's order; with them the version of the specification
    /// by which they are to be told, if it is known.
    pub fn read(bytes: &[u8], command: Command) -> Result<Self, (Error, Option<Version>)> {
        let unknown = |error| (error, None);
        if bytes.len() > MAX_CONFIG {
            let problem = format!("it has more than {MAX_CONFIG} bytes");
            return Err(unknown(Error::Json(problem)));
        }
        // Of a key that is there twice the last counts, as in Go.
        let map: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| unknown(Error::Json(shown(error))))?;
        let name: String = field(&map, "name").map_err(unknown)?.unwrap_or_default();
        if name.is_empty() {
            return Err(unknown(Error::MissingName));
        }
        if !is_identifier(&name) || name.len() > MAX_NAME {
            return Err(unknown(Error::NameCharacters(name)));
        }
        let version: Option<String> = field(&map, "cniVersion").map_err(unknown)?;
        let version = version.filter(|it| !it.is_empty());
        let version = version.unwrap_or_else(|| Version::UNSTATED.to_owned());
        let Some(version) = Version::named(&version) else {
            return Err(unknown(Error::IncompatibleVersion(version)));
        };
        let since = match command {
            Command::Check => Version::V0_4_0,
            Command::Gc | Command::Status => Version::V1_1_0,
            _ => Version::V0_3_0,
        };
        if version < since {
            return Err((Error::CommandNotAllowed(command), Some(version)));
        }
        Self::of(&map, command, name, version).map_err(|error| (error, Some(version)))
    }

    fn of(
        map: &Map<String, Value>,
        command: Command,
        name: String,
        version: Version,
    ) -> Result<Self, Error> {
        let mut config = Self {
            version,
            socket: socket(map)?,
            delegate: delegate(map)?,
            mtu: None,
            dns: Dns::default(),
            wanted: Wanted::default(),
            previous: None,
            valid: None,
            notes: Vec::new(),
            name,
        };
        match command {
            Command::Add => {
                config.mtu = mtu(map)?;
                let runtime: Map<_, _> = field(map, "runtimeConfig")?.unwrap_or_default();
                // The runtime's for this pod, or the administrator's for all.
                let told: Option<Dns> = read(&runtime, "runtimeConfig.dns", "dns")?;
                let told = told.filter(|dns| !dns.is_empty());
                config.dns = match told {
                    Some(dns) => dns,
                    None => field(map, "dns")?.unwrap_or_default(),
                };
                if !config.dns.is_bounded() {
                    return Err(invalid("dns", "it is too long"));
                }
                config.wanted = Wanted::read(map, &runtime, &config.name, &mut config.notes)?;
                config.previous = previous(map)?;
            }
            Command::Check => config.previous = previous(map)?,
            Command::Gc => config.valid = valid(map, &config.name)?,
            Command::Del | Command::Status | Command::Version => {}
        }
        Ok(config)
    }

    /// What an attachment to this network is known by.
    #[must_use]
    pub fn key(&self, container: &str, interface: &str) -> Key {
        Key::new(&self.name, container, interface)
    }
}

/// A value of a key, if it is there and not null.
fn field<T: DeserializeOwned>(
    map: &Map<String, Value>,
    key: &'static str,
) -> Result<Option<T>, Error> {
    read(map, key, key)
}

/// The same of a key with another name in errors.
fn read<T: DeserializeOwned>(
    map: &Map<String, Value>,
    path: &'static str,
    key: &str,
) -> Result<Option<T>, Error> {
    let Some(value) = map.get(key) else {
        return Ok(None);
    };
    Option::<T>::deserialize(value).map_err(|error| Error::Type {
        key: path,
        problem: shown(error),
    })
}

fn invalid(key: &'static str, problem: impl Into<String>) -> Error {
    let problem = problem.into();
    Error::Invalid { key, problem }
}

fn socket(map: &Map<String, Value>) -> Result<String, Error> {
    check_socket(field(map, "socket")?)
}

/// The path of a socket that a configuration names, or does not.
pub(in crate::api) fn check_socket(path: Option<String>) -> Result<String, Error> {
    let path = path.unwrap_or_else(|| SOCKET.to_owned());
    if !path.starts_with('/') || path.len() > MAX_SOCKET || path.contains('\0') {
        let problem = format!("it is no absolute path of at most {MAX_SOCKET} bytes");
        return Err(invalid("socket", problem));
    }
    Ok(path)
}

fn delegate(map: &Map<String, Value>) -> Result<Option<String>, Error> {
    let ipam: Map<_, _> = field(map, "ipam")?.unwrap_or_default();
    let kind: Option<String> = read(&ipam, "ipam.type", "type")?;
    let kind = kind.filter(|kind| !OURS.contains(&kind.as_str()));
    if let Some(kind) = &kind
        && !is_identifier(kind)
    {
        let problem = format!("'{}' is not the name of a plugin", shown(kind));
        return Err(invalid("ipam.type", problem));
    }
    Ok(kind)
}

fn mtu(map: &Map<String, Value>) -> Result<Option<u16>, Error> {
    check_mtu(field(map, "mtu")?)
}

/// An MTU in bytes that a configuration names, or does not.
pub(in crate::api) fn check_mtu(mtu: Option<u64>) -> Result<Option<u16>, Error> {
    match mtu {
        // As those write it that leave it to the plugin.
        None | Some(0) => Ok(None),
        Some(mtu) if MTUS.contains(&mtu) => Ok(u16::try_from(mtu).ok()),
        Some(mtu) => {
            let (least, most) = (MTUS.start(), MTUS.end());
            let problem = format!("{mtu} is not a number from {least} to {most}");
            Err(invalid("mtu", problem))
        }
    }
}

fn previous(map: &Map<String, Value>) -> Result<Option<Added>, Error> {
    let value = map.get("prevResult").filter(|value| !value.is_null());
    let read = value.map(Added::read).transpose();
    read.map_err(|problem| Error::Type {
        key: "prevResult",
        problem: shown(problem),
    })
}

/// An attachment as GC names it.
#[derive(Deserialize)]
struct Attachment {
    #[serde(rename = "containerID")]
    container: String,
    #[serde(rename = "ifname")]
    interface: String,
}

fn valid(map: &Map<String, Value>, network: &str) -> Result<Option<Vec<Key>>, Error> {
    let named: Option<Vec<Attachment>> = match field(map, "cni.dev/valid-attachments")? {
        Some(named) => Some(named),
        // So libcni called it first.
        None => field(map, "cni.dev/attachments")?,
    };
    let key = |it: Attachment| {
        // One that cannot be is no reason to keep any, nor to end those behind it.
        let is_possible = is_identifier(&it.container)
            && it.container.len() <= MAX_CONTAINER
            && (1..=MAX_INTERFACE).contains(&it.interface.len());
        is_possible.then(|| Key::new(network, it.container, it.interface))
    };
    Ok(named.map(|named| named.into_iter().filter_map(key).collect()))
}

/// A port as runtimes write it: containerd's Go structures have no JSON names.
#[derive(Deserialize)]
struct PortArgument {
    #[serde(default, rename = "hostPort", alias = "HostPort")]
    host_port: Option<i64>,
    #[serde(default, rename = "containerPort", alias = "ContainerPort")]
    container_port: Option<i64>,
    #[serde(default, alias = "Protocol")]
    protocol: Option<String>,
    #[serde(default, rename = "hostIP", alias = "HostIP", alias = "hostIp")]
    host_ip: Option<String>,
}

impl PortArgument {
    /// Nothing if there is no port of the machine.
    fn published(&self) -> Result<Option<PortMapping>, Error> {
        const KEY: &str = "runtimeConfig.portMappings";
        let port = |name: &str, port: Option<i64>| {
            let port = port.unwrap_or_default();
            let problem = || format!("{name} {port} is not a number from 0 to 65535");
            u16::try_from(port).map_err(|_| invalid(KEY, problem()))
        };
        let host_port = port("host port", self.host_port)?;
        if host_port == 0 {
            return Ok(None);
        }
        let pod_port = port("container port", self.container_port)?;
        if pod_port == 0 {
            return Err(invalid(
                KEY,
                format!("host port {host_port} leads to no port"),
            ));
        }
        let protocol = self.protocol.as_deref().unwrap_or_default();
        let transport = match protocol.to_ascii_lowercase().as_str() {
            "" | "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            _ => {
                let value = protocol.to_owned();
                let key = "runtimeConfig.portMappings.protocol";
                return Err(Error::Unsupported { key, value });
            }
        };
        let address = match self.host_ip.as_deref() {
            None | Some("") => Ipv4Addr::UNSPECIFIED.into(),
            Some(text) => address(text).map_err(|why| invalid(KEY, why))?,
        };
        Ok(Some(PortMapping {
            transport,
            address,
            host_port,
            pod_port,
            proxy: false,
        }))
    }
}

/// Limits as runtimes write them, in bits.
#[derive(Default, Deserialize)]
struct Bandwidth {
    #[serde(default, rename = "ingressRate", alias = "IngressRate")]
    ingress_rate: Option<u64>,
    #[serde(default, rename = "ingressBurst", alias = "IngressBurst")]
    ingress_burst: Option<u64>,
    #[serde(default, rename = "egressRate", alias = "EgressRate")]
    egress_rate: Option<u64>,
    #[serde(default, rename = "egressBurst", alias = "EgressBurst")]
    egress_burst: Option<u64>,
}

/// A limit, if there is one. Texts are the reference's.
fn rate(rate: Option<u64>, burst: Option<u64>) -> Result<Option<Rate>, Error> {
    const KEY: &str = "runtimeConfig.bandwidth";
    match (rate.unwrap_or_default(), burst.unwrap_or_default()) {
        (0, 0) => Ok(None),
        (_, 0) => Err(invalid(KEY, "if rate is set, burst must also be set")),
        (0, _) => Err(invalid(KEY, "if burst is set, rate must also be set")),
        (_, burst) if burst > MAX_BURST => Err(invalid(KEY, "burst cannot be more than 4GB")),
        (bits_per_second, burst_bits) => Ok(Some(Rate {
            bits_per_second,
            burst_bits,
        })),
    }
}

/// Names: CRI-O has a list, podman one for each network.
#[derive(Deserialize)]
#[serde(untagged)]
enum Aliases {
    All(Vec<String>),
    ByNetwork(BTreeMap<String, Vec<String>>),
}

impl Wanted {
    /// Adds a further name. Runtimes also pass on what is no name for DNS, and the pod can do without.
    pub(in crate::api) fn add_alias(&mut self, name: &str, notes: &mut Vec<String>) {
        match name.to_ascii_lowercase().parse::<PodName>() {
            Ok(name) if self.aliases.contains(&name) => {}
            Ok(name) => self.aliases.push(name),
            Err(_) => notes.push(format!("the alias {:?} is left out", shown(name))),
        }
    }

    fn read(
        map: &Map<String, Value>,
        runtime: &Map<String, Value>,
        network: &str,
        notes: &mut Vec<String>,
    ) -> Result<Self, Error> {
        let mut wanted = Self::default();
        let ports: Option<Vec<PortArgument>> =
            read(runtime, "runtimeConfig.portMappings", "portMappings")?;
        for port in ports.unwrap_or_default() {
            wanted.publish.extend(port.published()?);
        }
        if wanted.publish.len() > usize::from(MAX_PORTS) {
            let problem = format!("a pod has at most {MAX_PORTS} ports");
            return Err(invalid("runtimeConfig.portMappings", problem));
        }
        let limits: Option<Bandwidth> = read(runtime, "runtimeConfig.bandwidth", "bandwidth")?;
        let limits = limits.unwrap_or_default();
        wanted.ingress = rate(limits.ingress_rate, limits.ingress_burst)?;
        wanted.egress = rate(limits.egress_rate, limits.egress_burst)?;
        let ips: Option<Vec<String>> = read(runtime, "runtimeConfig.ips", "ips")?;
        let args: Map<_, _> = field(map, "args")?.unwrap_or_default();
        let cni: Map<_, _> = read(&args, "args.cni", "cni")?.unwrap_or_default();
        let of_args: Option<Vec<String>> = read(&cni, "args.cni.ips", "ips")?;
        let all = [("runtimeConfig.ips", ips), ("args.cni.ips", of_args)];
        for (key, ips) in all {
            for text in ips.unwrap_or_default() {
                let read = address(&text).map_err(|why| invalid(key, why))?;
                if !wanted.addresses.contains(&read) {
                    wanted.addresses.push(read);
                }
            }
            if wanted.addresses.len() > MAX_ADDRESSES {
                let problem = format!("a pod has at most {MAX_ADDRESSES} addresses");
                return Err(invalid(key, problem));
            }
        }
        let text: Option<String> = read(runtime, "runtimeConfig.mac", "mac")?;
        let text = text.filter(|text| !text.is_empty());
        let read_mac = text.map(|text| mac(&text)).transpose();
        wanted.mac = read_mac.map_err(|why| invalid("runtimeConfig.mac", why))?;
        let aliases: Option<Aliases> = read(runtime, "runtimeConfig.aliases", "aliases")?;
        let aliases = match aliases {
            None => Vec::new(),
            Some(Aliases::All(names)) => names,
            Some(Aliases::ByNetwork(mut all)) => all.remove(network).unwrap_or_default(),
        };
        if aliases.len() > MAX_ALIASES {
            let problem = format!("a pod has at most {MAX_ALIASES} of them");
            return Err(invalid("runtimeConfig.aliases", problem));
        }
        for name in aliases {
            wanted.add_alias(&name, notes);
        }
        let annotations: Option<BTreeMap<String, String>> = read(
            runtime,
            "runtimeConfig.io.kubernetes.cri.pod-annotations",
            "io.kubernetes.cri.pod-annotations",
        )?;
        wanted.annotations = annotations.unwrap_or_default();
        Ok(wanted)
    }
}

#[cfg(test)]
mod tests;
