//! A static list of nodes in a TOML file, for networks that need no agreement.
//!
//! ```toml
//! network = "10.244.0.0/16"
//! subnet-len = 24            # optional; flannel's default for the network's size
//! backend = "vxlan"          # or "udp", "host-gw", "ipip"; optional
//! vni = 1                    # optional, vxlan only; port and mtu (the underlay's) likewise
//! direct-routing = true      # optional, vxlan and ipip only
//!
//! [[node]]
//! public-ip = "192.168.0.11"
//! subnet = "10.244.1.0/24"
//! vtep-mac = "0e:1f:20:a1:b2:c3"   # optional, vxlan only
//! partial-checksums = true         # optional, vxlan and udp only
//! multicast = true                 # optional, not host-gw
//! ```
//!
//! Every node has the same file. The MAC address of a node's VTEP is made of its public address
//! where none is given: `0a:4d` and the four bytes, locally administered and unicast. A kernel
//! node in the list needs the one that its device has. Nodes of Muslin take partial checksums, which
//! saves their peers a pass over each packet; a kernel's would drop such packets. Those that run with
//! `--multicast` are sent what is for groups if the list says so.
//!
//! The file is read again when it changes; a new version with mistakes is reported once, and the
//! old one stays in force. Entries never expire, and nothing can be written.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ipnet::Ipv4Net;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::udp;
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use muslin_stack::control::lease::{
    Answer, Backend, Entry, LeaseRecord, NetworkConfig, Op, Revision, SubnetKey, TunnelEnd,
    VxlanOptions, WatchEvent, WireGuardOptions,
};
use parking_lot::Mutex;
use serde::Deserialize;
use toml::Spanned;
use tracing::{info, warn};

use super::{Store, StoreError, Watch, blocking};
use crate::error::{Context, Error, Result};
use crate::terminal::quantity::count;

type StoreResult<T> = std::result::Result<T, StoreError>;

/// How often the file is looked at.
const POLL: Duration = Duration::from_millis(500);

/// A static list in a file.
pub(super) struct FileStore {
    file: Arc<ListFile>,
}

impl FileStore {
    /// Reads the file.
    ///
    /// # Errors
    /// A failure if it cannot be read, or has mistakes: line and field.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let stamp = Stamp::of(path);
        let text = std::fs::read_to_string(path)
            .context(format!("cannot read the list of nodes {}", path.display()))?;
        let list = List::parse(path, &text).map_err(Error::Failed)?;
        let state = State {
            list,
            stamp,
            revision: 1,
        };
        Ok(Self {
            file: Arc::new(ListFile {
                path: path.to_path_buf(),
                state: Mutex::new(state),
            }),
        })
    }
}

#[async_trait]
impl Store for FileStore {
    async fn execute(&self, op: Op) -> StoreResult<Answer> {
        let file = Arc::clone(&self.file);
        blocking(move || file.execute(op)).await
    }

    async fn watch(&self, _prefix: &str, from: Revision) -> StoreResult<Box<dyn Watch>> {
        Ok(Box::new(FileWatch {
            file: Arc::clone(&self.file),
            from,
        }))
    }

    fn keeps_names(&self) -> bool {
        false
    }

    fn describe(&self) -> String {
        format!("file:{}", self.file.path.display())
    }

    fn listed(&self, public_ip: Ipv4Addr) -> StoreResult<Option<LeaseRecord>> {
        self.file.refresh();
        let state = self.file.state.lock();
        match state.list.nodes.get(&public_ip) {
            Some(node) => Ok(Some(node.record.clone())),
            None => Err(self.file.missing(public_ip)),
        }
    }
}

struct FileWatch {
    file: Arc<ListFile>,
    from: Revision,
}

#[async_trait]
impl Watch for FileWatch {
    /// Ends when the list has changed: a list compares by value.
    async fn next(&mut self) -> StoreResult<Vec<WatchEvent>> {
        loop {
            let file = Arc::clone(&self.file);
            if blocking(move || Ok(file.refresh())).await? >= self.from {
                return Err(StoreError::Gap);
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

struct ListFile {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    list: List,
    stamp: Option<Stamp>,
    /// Counts the versions that were read.
    revision: Revision,
}

impl ListFile {
    /// Reads the file again if it has changed. The list's revision.
    fn refresh(&self) -> Revision {
        let mut state = self.state.lock();
        let stamp = Stamp::of(&self.path);
        if stamp == state.stamp {
            return state.revision;
        }
        // Also when it cannot be used: that is said once.
        state.stamp = stamp;
        let path = self.path.display();
        let list = std::fs::read_to_string(&self.path)
            .map_err(|error| format!("{path}: {error}"))
            .and_then(|text| List::parse(&self.path, &text));
        match list {
            Err(error) => warn!("the list of nodes is left unchanged: {error}"),
            Ok(list) if list == state.list => {}
            Ok(list) => {
                if list.config != state.list.config {
                    warn!("{path} has a different network now: nodes read it when they start");
                }
                info!("{path} has {} now", count(list.nodes.len() as u64, "node"));
                state.list = list;
                state.revision += 1;
            }
        }
        state.revision
    }

    fn execute(&self, op: Op) -> StoreResult<Answer> {
        let revision = self.refresh();
        let state = self.state.lock();
        let subnet = |key: &str| key.rsplit('/').next().unwrap_or_default().to_owned();
        match op {
            Op::Get(key) if key.ends_with("/config") => Ok(Answer::Value(Some(Entry {
                key,
                value: state.list.config.to_json(),
                revision,
                created: 0,
                ttl: None,
            }))),
            Op::Get(key) => Ok(Answer::Value(state.list.entry(
                &subnet(&key),
                key,
                revision,
            ))),
            Op::List(prefix) => {
                let key = |node: &Node| format!("{prefix}/{}", node.key);
                let mut entries: Vec<_> = state.list.nodes.values().collect();
                entries.sort_by_key(|node| key(node));
                let entry = |node: &Node| node.entry(key(node), revision);
                Ok(Answer::Snapshot {
                    revision,
                    entries: entries.into_iter().map(entry).collect(),
                })
            }
            Op::Create { key, .. } if key.ends_with("/config") => Ok(Answer::Conflict),
            Op::Create { key, value, .. } | Op::Claim { key, value, .. } => {
                match state.list.entry(&subnet(&key), key.clone(), revision) {
                    Some(_) => Ok(Answer::Conflict),
                    None => Err(self.unlisted(&state.list, &subnet(&key), &value)),
                }
            }
            Op::CompareAndPut {
                key,
                value,
                expected,
                ..
            } => match state.list.entry(&subnet(&key), key.clone(), revision) {
                Some(entry) if entry.value == value && expected == revision => {
                    Ok(Answer::Done(revision))
                }
                Some(entry) if entry.value == value => Ok(Answer::Conflict),
                Some(_) | None => Err(self.unlisted(&state.list, &subnet(&key), &value)),
            },
            Op::CompareAndDelete { key, .. } => {
                let (path, subnet) = (self.path.display(), subnet(&key));
                Err(StoreError::Refused(format!(
                    "{path} is a static list, from which {subnet} is not deleted: edit it"
                )))
            }
        }
    }

    /// Why a record cannot be written.
    fn unlisted(&self, list: &List, subnet: &str, value: &str) -> StoreError {
        let path = self.path.display();
        let Ok(record) = LeaseRecord::parse(value) else {
            return StoreError::Refused(format!("{path} is a static list"));
        };
        let ip = record.public_ip;
        match list.nodes.get(&ip) {
            None => self.missing(ip),
            Some(node) if node.key.to_string() != subnet => StoreError::Refused(format!(
                "{path} has the subnet {} for {ip}, and {subnet} is in use: restart the node",
                node.key.first()
            )),
            Some(node) => {
                let end = match node.record.end() {
                    Some(TunnelEnd::Vtep(mac)) => format!("vtep-mac {mac}"),
                    Some(TunnelEnd::Key(key)) => format!("public-key {key}"),
                    None => "vtep-mac none".to_owned(),
                };
                StoreError::Refused(format!(
                    "{path} describes the node {ip} differently (backend {}, {end}, partial-checksums {}): \
                     restart it",
                    node.record.backend(),
                    node.record.checksums() == Checksums::Partial,
                ))
            }
        }
    }

    fn missing(&self, public_ip: Ipv4Addr) -> StoreError {
        let path = self.path.display();
        StoreError::Refused(format!(
            "{path} has no [[node]] with public-ip \"{public_ip}\": add it"
        ))
    }
}

/// Tells versions of the file apart.
#[derive(PartialEq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

#[derive(Debug, PartialEq)]
struct List {
    config: NetworkConfig,
    nodes: HashMap<Ipv4Addr, Node>,
}

#[derive(Debug, PartialEq)]
struct Node {
    key: SubnetKey,
    record: LeaseRecord,
}

impl Node {
    fn entry(&self, key: String, revision: Revision) -> Entry {
        Entry {
            key,
            value: self.record.to_json(),
            revision,
            created: 0,
            ttl: None,
        }
    }
}

/// The file's text as it is.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Document {
    network: Spanned<String>,
    subnet_len: Option<Spanned<u8>>,
    backend: Option<Spanned<String>>,
    vni: Option<Spanned<u32>>,
    port: Option<Spanned<u16>>,
    mtu: Option<Spanned<u32>>,
    direct_routing: Option<Spanned<bool>>,
    #[serde(default)]
    node: Vec<NodeTable>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct NodeTable {
    public_ip: Spanned<String>,
    subnet: Spanned<String>,
    vtep_mac: Option<Spanned<String>>,
    public_key: Option<Spanned<String>>,
    #[serde(default)]
    partial_checksums: bool,
    #[serde(default)]
    multicast: bool,
}

impl List {
    /// Reads and checks a list. The error is one line with file, line and field.
    fn parse(path: &Path, text: &str) -> std::result::Result<Self, String> {
        let source = Source { path, text };
        let document: Document = toml::from_str(text).map_err(|error| {
            let span = error.span().unwrap_or_default();
            source.mistake(span.clone(), source.field(span), error.message())
        })?;
        let config = source.config(&document)?;
        let mut nodes = HashMap::new();
        // All have one length, so that those that overlap are equal.
        let mut subnets = HashSet::new();
        for table in &document.node {
            let (ip, node) = source.node(&config, table)?;
            let subnet = node.key.first();
            if nodes.insert(ip, node).is_some() {
                let span = table.public_ip.span();
                return Err(source.mistake(span, "public-ip", format!("{ip} is listed twice")));
            }
            if !subnets.insert(subnet) {
                let error = format!("{subnet} is listed twice");
                return Err(source.mistake(table.subnet.span(), "subnet", error));
            }
        }
        Ok(Self { config, nodes })
    }

    fn entry(&self, subnet: &str, key: String, revision: Revision) -> Option<Entry> {
        let mut nodes = self.nodes.values();
        let node = nodes.find(|node| node.key.to_string() == subnet)?;
        Some(node.entry(key, revision))
    }
}

/// Where a list is read from, to say where its mistakes are.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn config(&self, document: &Document) -> std::result::Result<NetworkConfig, String> {
        let network: Ipv4Net = self.read("network", &document.network)?;
        let subnet_len = document.subnet_len.as_ref().map(|len| *len.get_ref());
        let mut config =
            NetworkConfig::new(network, subnet_len, self.backend(document)?).map_err(|error| {
                match &document.subnet_len {
                    Some(len) => self.mistake(len.span(), "subnet-len", error),
                    None => self.mistake(document.network.span(), "network", error),
                }
            })?;
        // Flannel keeps the first subnet free; who writes a list may give it away.
        config.subnet_min = config.network.network();
        Ok(config)
    }

    fn backend(&self, document: &Document) -> std::result::Result<Backend, String> {
        let port = match &document.port {
            Some(port) if *port.get_ref() == 0 => {
                return Err(self.mistake(port.span(), "port", "0 is not a port"));
            }
            port => port.as_ref().map(|port| *port.get_ref()),
        };
        let name = match &document.backend {
            Some(backend) => backend.get_ref().as_str(),
            None => "vxlan",
        };
        let of = [
            (
                "vni",
                document.vni.as_ref().map(Spanned::span),
                &["vxlan"][..],
            ),
            (
                "mtu",
                document.mtu.as_ref().map(Spanned::span),
                &["vxlan", "wireguard"],
            ),
            (
                "port",
                document.port.as_ref().map(Spanned::span),
                &["vxlan", "udp", "wireguard"],
            ),
            (
                "direct-routing",
                document.direct_routing.as_ref().map(Spanned::span),
                &["vxlan", "ipip"],
            ),
        ];
        let known = ["vxlan", "udp", "host-gw", "ipip", "wireguard"];
        for (field, span, backends) in of {
            if let Some(span) = span
                && known.contains(&name)
                && !backends.contains(&name)
            {
                return Err(self.mistake(span, field, format!("the backend {name} has none")));
            }
        }
        let direct_routing = document.direct_routing.as_ref();
        let direct_routing = direct_routing.is_some_and(|value| *value.get_ref());
        match name {
            "udp" => Ok(Backend::Udp {
                port: port.unwrap_or(udp::PORT),
            }),
            "host-gw" => Ok(Backend::HostGw),
            "ipip" => Ok(Backend::Ipip { direct_routing }),
            "vxlan" => {
                let mut options = VxlanOptions::default();
                options.direct_routing = direct_routing;
                if let Some(vni) = &document.vni {
                    options.vni = Vni::new(*vni.get_ref())
                        .map_err(|error| self.mistake(vni.span(), "vni", error))?;
                }
                options.mtu = self.mtu(document)?;
                options.port = port.unwrap_or(options.port);
                Ok(Backend::Vxlan(options))
            }
            "wireguard" => {
                let mut options = WireGuardOptions::default();
                options.mtu = self.mtu(document)?;
                options.listen_port = port.unwrap_or(options.listen_port);
                Ok(Backend::WireGuard(options))
            }
            other => {
                let span = document
                    .backend
                    .as_ref()
                    .map(Spanned::span)
                    .unwrap_or_default();
                let error =
                    format!("'{other}' is not one of vxlan, udp, host-gw, ipip and wireguard");
                Err(self.mistake(span, "backend", error))
            }
        }
    }

    fn mtu(&self, document: &Document) -> std::result::Result<Option<Mtu>, String> {
        let Some(mtu) = &document.mtu else {
            return Ok(None);
        };
        let checked = Mtu::new(*mtu.get_ref());
        let checked = checked.map_err(|error| self.mistake(mtu.span(), "mtu", error));
        checked.map(Some)
    }

    fn node(
        &self,
        config: &NetworkConfig,
        table: &NodeTable,
    ) -> std::result::Result<(Ipv4Addr, Node), String> {
        let ip: Ipv4Addr = self.read("public-ip", &table.public_ip)?;
        if ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() {
            let error = format!("no node can have {ip}");
            return Err(self.mistake(table.public_ip.span(), "public-ip", error));
        }
        let subnet: Ipv4Net = self.read("subnet", &table.subnet)?;
        let wrong = |error: String| Err(self.mistake(table.subnet.span(), "subnet", error));
        if subnet.trunc() != subnet {
            return wrong(format!(
                "{subnet} is not a subnet, but {} is",
                subnet.trunc()
            ));
        }
        if !config.network.contains(&subnet) {
            return wrong(format!("{subnet} is not in the network {}", config.network));
        }
        if subnet.prefix_len() != config.subnet_len {
            let len = config.subnet_len;
            return wrong(format!("{subnet} is not a /{len}, as subnet-len requires"));
        }
        let end = self.end(config, table, ip)?;
        let checksums = match table.partial_checksums {
            true => Checksums::Partial,
            false => Checksums::Complete,
        };
        let record = LeaseRecord::of(&config.backend, ip, end)
            .with_checksums(checksums)
            .with_multicast(table.multicast);
        let key = SubnetKey::new(subnet);
        Ok((ip, Node { key, record }))
    }

    /// What the end of a node's tunnel is known by.
    fn end(
        &self,
        config: &NetworkConfig,
        table: &NodeTable,
        public_ip: Ipv4Addr,
    ) -> std::result::Result<TunnelEnd, String> {
        let is_wireguard = matches!(config.backend, Backend::WireGuard(_));
        if let (Some(key), false) = (&table.public_key, is_wireguard) {
            let error = format!("the backend {} has none", config.backend.name());
            return Err(self.mistake(key.span(), "public-key", error));
        }
        match (&table.public_key, &table.vtep_mac) {
            (Some(key), _) => self.read("public-key", key).map(TunnelEnd::Key),
            (None, Some(mac)) => self.read("vtep-mac", mac).map(TunnelEnd::Vtep),
            (None, None) => Ok(derived_mac(public_ip).into()),
        }
    }

    fn read<T: std::str::FromStr<Err: Display>>(
        &self,
        field: &str,
        text: &Spanned<String>,
    ) -> std::result::Result<T, String> {
        let value = text.get_ref();
        value
            .parse()
            .map_err(|error| self.mistake(text.span(), field, format!("'{value}': {error}")))
    }

    fn mistake(&self, span: Range<usize>, field: &str, error: impl Display) -> String {
        let before = self.text.get(..span.start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let path = self.path.display();
        let field = if field.is_empty() {
            String::new()
        } else {
            format!(", {field}")
        };
        // The parser's own words can have several lines.
        let error = error.to_string().replace('\n', " ");
        format!("{path}, line {line}{field}: {error}")
    }

    /// The field on the line where the parser stopped.
    fn field(&self, span: Range<usize>) -> &str {
        let before = self.text.get(..span.start).unwrap_or_default();
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = self.text.get(start..).unwrap_or_default();
        let line = line.lines().next().unwrap_or_default();
        line.split_once('=').map_or("", |(field, _)| field.trim())
    }
}

/// The MAC address of a node that the list gives none: `0a:4d` and its public address.
fn derived_mac(public_ip: Ipv4Addr) -> VtepMac {
    let [a, b, c, d] = public_ip.octets();
    VtepMac::from_random([0x0a, 0x4d, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use muslin_stack::control::lease::{Change, Loss, OwnChange, WantedConfig};
    use tempfile::TempDir;

    use super::super::suite::{Node, settings};
    use super::*;

    const LIST: &str = r#"
network = "10.244.0.0/16"
vni = 7

[[node]]
public-ip = "192.168.0.1"
subnet = "10.244.0.0/24"

[[node]]
public-ip = "192.168.0.2"
subnet = "10.244.2.0/24"
vtep-mac = "0e:1f:20:a1:b2:c3"
"#;

    struct Directory(TempDir);

    impl Directory {
        fn new(text: &str) -> Self {
            let directory = Self(TempDir::new().unwrap());
            directory.write(text);
            directory
        }

        fn file(&self) -> PathBuf {
            self.0.path().join("nodes.toml")
        }

        /// Replaces the file as editors do.
        fn write(&self, text: &str) {
            let new = self.0.path().join("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, self.file()).unwrap();
        }

        fn open(&self) -> Arc<FileStore> {
            Arc::new(FileStore::open(&self.file()).unwrap())
        }

        /// A node of the list, with the MAC address that the list has for it.
        fn node(&self, last: u8) -> Node {
            let store = self.open();
            let mut settings = settings("/p", last);
            settings.wanted_config = WantedConfig::Any;
            if let Ok(Some(listed)) = store.listed(settings.identity.public_ip) {
                settings.take(&listed);
            }
            Node::start(store, settings)
        }
    }

    #[tokio::test]
    async fn nodes_have_what_the_list_says() {
        let directory = Directory::new(LIST);
        let mut node = directory.node(1);
        let Change::Own(OwnChange::Configured(config)) = node.next().await else {
            panic!()
        };
        assert_eq!(
            config.to_string(),
            "10.244.0.0/16 in subnets of /24, vxlan VNI 7 port 8472"
        );
        let Change::Peer(key, record) = node.next().await else {
            panic!()
        };
        assert_eq!(key.to_string(), "10.244.2.0-24");
        assert_eq!(record.vtep_mac(), "0e:1f:20:a1:b2:c3".parse().ok());
        assert_eq!(node.subnet().await, "10.244.0.0-24");
        let mut other = directory.node(2);
        let peer = loop {
            if let Change::Peer(_, record) = other.next().await {
                break record;
            }
        };
        assert_eq!(peer.vtep_mac(), "0a:4d:c0:a8:00:01".parse().ok());
    }

    #[tokio::test]
    async fn a_change_of_the_list_is_taken_and_a_mistake_is_not() {
        let directory = Directory::new(LIST);
        let mut node = directory.node(1);
        node.subnet().await;
        directory.write(&LIST.replace("192.168.0.2", "192.168.0.22"));
        assert_eq!(node.peer().await, "10.244.2.0-24 192.168.0.22");
        let store = directory.open();
        let before = store.file.refresh();
        directory.write("network = 7");
        assert_eq!(store.file.refresh(), before);
        directory.write(&LIST.replace("10.244.2.0", "10.244.3.0"));
        assert_eq!(node.peer().await, "10.244.2.0-24 gone");
        assert_eq!(node.peer().await, "10.244.3.0-24 192.168.0.2");
        assert_eq!(store.file.refresh(), before + 1);
        std::fs::remove_file(directory.file()).unwrap();
        assert_eq!(store.file.refresh(), before + 1);
    }

    #[tokio::test]
    async fn a_node_without_an_entry_waits_for_one() {
        let directory = Directory::new(LIST);
        let mut node = directory.node(9);
        let words = "no [[node]] with public-ip \"192.168.0.9\"";
        node.trouble(words).await;
        assert!(directory.open().listed([192, 168, 0, 9].into()).is_err());
        let mac = settings("/p", 9).identity.vtep_mac;
        directory.write(&format!(
            "{LIST}\n[[node]]\npublic-ip = \"192.168.0.9\"\nsubnet = \"10.244.9.0/24\"\n\
             vtep-mac = \"{mac}\"\npartial-checksums = true\n"
        ));
        assert_eq!(node.subnet().await, "10.244.9.0-24");
    }

    #[tokio::test]
    async fn a_node_whose_entry_changes_goes_on_until_it_is_mended() {
        let directory = Directory::new(LIST);
        let mut node = directory.node(1);
        let subnet = node.subnet().await;
        // It is removed, it gets another subnet, and the list is no list for a while.
        for list in [
            LIST.replace("192.168.0.1\"", "192.168.0.3\"")
                .replace("10.244.0.0/24", "10.244.3.0/24"),
            LIST.replace("10.244.0.0/24", "10.244.9.0/24"),
        ] {
            directory.write(&list);
            node.trouble("refuses").await;
            directory.write("network = ");
            directory.write(LIST);
            node.recovery().await;
            // It hears of others again.
            directory.write(&LIST.replace("192.168.0.2\"", "192.168.0.7\""));
            while node.peer().await != "10.244.2.0-24 192.168.0.7" {}
            directory.write(LIST);
            while node.peer().await != "10.244.2.0-24 192.168.0.2" {}
        }
        // Another node has its subnet now.
        directory.write(&LIST.replace("192.168.0.1\"", "192.168.0.3\""));
        assert_eq!(subnet, "10.244.0.0-24");
        while !matches!(
            node.next().await,
            Change::Own(OwnChange::Lost(Loss::Taken { .. }))
        ) {}
        node.end().await.unwrap();
    }

    #[tokio::test]
    async fn another_record_than_the_lists_is_refused_with_what_the_list_has() {
        let directory = Directory::new(LIST);
        let mut node = Node::start(directory.open(), settings("/p", 2));
        let listed = "(backend vxlan, vtep-mac 0e:1f:20:a1:b2:c3, partial-checksums false)";
        node.trouble(listed).await;
    }

    #[tokio::test]
    async fn leaving_leaves_the_list_alone() {
        let directory = Directory::new(LIST);
        let mut node = directory.node(1);
        node.subnet().await;
        node.leave().await;
    }

    #[test]
    fn the_udp_backend_has_no_mac_addresses() {
        let list = LIST.replace("vni = 7", "backend = \"udp\"\nport = 9000");
        let directory = Directory::new(&list);
        let store = directory.open();
        let listed = store.listed([192, 168, 0, 2].into()).unwrap().unwrap();
        assert_eq!(listed.vtep_mac(), None);
        let state = store.file.state.lock();
        assert_eq!(state.list.config.backend, Backend::Udp { port: 9000 });
    }

    #[test]
    fn backends_without_a_port_are_read() {
        for (text, expected) in [
            ("backend = \"host-gw\"", Backend::HostGw),
            (
                "backend = \"wireguard\"",
                Backend::WireGuard(WireGuardOptions::default()),
            ),
            (
                "backend = \"ipip\"\ndirect-routing = true",
                Backend::Ipip {
                    direct_routing: true,
                },
            ),
        ] {
            let directory = Directory::new(&LIST.replace("vni = 7", text));
            let store = directory.open();
            let state = store.file.state.lock();
            assert_eq!(state.list.config.backend, expected);
        }
    }

    #[test]
    fn mistakes_are_told_with_file_line_and_field() {
        for (from, to, line, words) in [
            (
                "10.244.0.0/16",
                "10.244.0.0/99",
                2,
                "network: '10.244.0.0/99'",
            ),
            ("10.244.0.0/16", "10.244.0.0/30", 2, "network: "),
            ("network = ", "netwrok = ", 2, "netwrok: unknown field"),
            (
                "network = \"10.244.0.0/16\"",
                "",
                1,
                "missing field `network`",
            ),
            ("vni = 7", "vni = 16777216", 3, "vni: "),
            ("vni = 7", "vni = \"7\"", 3, "vni: invalid type"),
            ("vni = 7", "port = 0", 3, "port: "),
            ("vni = 7", "port = 65536", 3, "port: "),
            ("vni = 7", "mtu = 1", 3, "mtu: "),
            ("vni = 7", "subnet-len = 17", 3, "subnet-len: "),
            (
                "vni = 7",
                "subnet-len = 25",
                7,
                "subnet: 10.244.0.0/24 is not a /25",
            ),
            ("vni = 7", "backend = \"host\"", 3, "backend: 'host'"),
            ("vni = 7", "backend = \"udp\"\nvni = 1", 4, "vni: "),
            ("vni = 7", "backend = \"host-gw\"\nport = 1", 4, "port: "),
            (
                "vni = 7",
                "backend = \"udp\"\ndirect-routing = true",
                4,
                "direct-routing: ",
            ),
            ("vni = 7", "vni = ", 3, "vni: "),
            ("192.168.0.1\"", "192.168.0\"", 6, "public-ip: '192.168.0'"),
            ("192.168.0.1\"", "224.0.0.1\"", 6, "public-ip: "),
            (
                "192.168.0.2\"",
                "192.168.0.1\"",
                10,
                "public-ip: 192.168.0.1 is listed twice",
            ),
            (
                "10.244.2.0/24",
                "10.244.0.0/24",
                11,
                "subnet: 10.244.0.0/24 is listed twice",
            ),
            ("10.244.2.0/24", "10.244.2.1/24", 11, "subnet: "),
            (
                "10.244.2.0/24",
                "10.9.2.0/24",
                11,
                "subnet: 10.9.2.0/24 is not in the network",
            ),
            ("10.244.2.0/24", "10.244.0.0/22", 11, "subnet: "),
            ("0e:1f:20", "01:00:5e", 12, "vtep-mac: "),
            ("vtep-mac", "mac", 12, "mac: unknown field"),
        ] {
            let directory = Directory::new(&LIST.replacen(from, to, 1));
            let error = FileStore::open(&directory.file()).map(|_| ()).unwrap_err();
            assert_eq!(error.exit_code(), 1);
            let text = error.to_string();
            let start = format!("{}, line {line}", directory.file().display());
            assert!(
                text.starts_with(&start) && text.contains(words),
                "{to}: {text}"
            );
            assert!(!text.contains('\n'), "{text}");
        }
        let error = FileStore::open(Path::new("/nonexistent/x"))
            .map(|_| ())
            .unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("/nonexistent/x"));
    }
}
