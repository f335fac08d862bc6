//! What the page shows: the nodes of this machine, as their control sockets tell of them.

use std::path::PathBuf;

use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::api::control::{Peer, Pod, Status, Table};
use muslin_stack::control::ipam::PodName;
use serde::Serialize;
use serde_json::Value;

use crate::control::Client;
use crate::error::{Error, Result};
use crate::state;

/// Rows of a table that are shown.
const MAX_ROWS: usize = 5000;

/// Where the nodes are.
#[derive(Debug, Clone)]
pub(crate) enum Nodes {
    /// All that run in this state directory, whenever somebody asks.
    In(PathBuf),
    /// The one at this socket.
    At(PathBuf),
}

/// The nodes at one moment.
#[derive(Debug, Serialize)]
pub(super) struct View {
    nodes: Vec<Shown>,
}

/// What the picture has of a node of this machine; tables have the rest.
#[derive(Debug, Serialize)]
struct Shown {
    /// Its name.
    node: String,
    /// What does not work, or why nothing else is known of it.
    trouble: Option<String>,
    public_ip: Option<Addresses>,
    subnet: Option<Nets>,
    pods: Vec<(PodName, Addresses)>,
    peers: Vec<Link>,
}

/// What it has of a peer.
#[derive(Debug, Serialize)]
struct Link {
    node: Option<String>,
    public_ip: Addresses,
    subnet: Nets,
    state: String,
    path: Option<String>,
    /// What has passed in both directions.
    bytes: u64,
}

/// The rows of a table of all nodes, each with the name of its node.
#[derive(Debug, Serialize)]
pub(super) struct Rows {
    rows: Vec<(String, Value)>,
    /// Whether there are more.
    more: bool,
}

impl Nodes {
    /// Their sockets.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        match self {
            Self::At(socket) => vec![socket.clone()],
            Self::In(dir) => {
                let all = state::nodes(dir);
                let all = all.iter().map(|name| state::socket_path(dir, name));
                all.filter(|socket| state::is_listening(socket)).collect()
            }
        }
    }
}

impl View {
    pub(super) async fn take(nodes: &Nodes) -> Self {
        let mut shown = Vec::new();
        for socket in nodes.sockets() {
            shown.push(Shown::take(&socket).await);
        }
        Self { nodes: shown }
    }
}

impl Shown {
    async fn take(socket: &std::path::Path) -> Self {
        let name = socket.parent().and_then(|dir| dir.file_name());
        let mut shown = Self {
            node: name.unwrap_or_default().to_string_lossy().into_owned(),
            trouble: None,
            public_ip: None,
            subnet: None,
            pods: Vec::new(),
            peers: Vec::new(),
        };
        if let Err(error) = shown.read(socket).await {
            shown.trouble = Some(error.to_string());
        }
        shown
    }

    async fn read(&mut self, socket: &std::path::Path) -> Result<()> {
        let client = Client::connect(socket).await?;
        client.node().clone_into(&mut self.node);
        if let Some(status) = client.report::<Status>(Table::Status).await?.pop() {
            self.trouble = status.trouble;
            self.public_ip = Some(status.public_ip);
            self.subnet = Some(status.subnet);
        }
        let pods = client.report::<Pod>(Table::Pods).await?;
        self.pods = pods.into_iter().map(|it| (it.pod, it.address)).collect();
        let peers = client.report::<Peer>(Table::Peers).await?;
        self.peers = peers.into_iter().map(Link::from).collect();
        Ok(())
    }
}

impl From<Peer> for Link {
    fn from(peer: Peer) -> Self {
        Self {
            node: peer.node,
            public_ip: peer.public_ip,
            subnet: peer.subnet,
            state: match peer.usable {
                true => peer.state,
                false => "unusable".to_owned(),
            },
            path: peer.path,
            bytes: peer.received.bytes.saturating_add(peer.sent.bytes),
        }
    }
}

impl Rows {
    /// The table of that name, with the rows that have these lower-case letters; nothing if there is none.
    pub(super) async fn take(nodes: &Nodes, name: &str, letters: &str) -> Option<Result<Self>> {
        let table = match name {
            "pods" => Table::Pods,
            "peers" => Table::Peers,
            "leases" => Table::Leases,
            "routes" => Table::Routes,
            "neighbours" => Table::Neighbours,
            "flows" => Table::Flows,
            "drops" => Table::Drops,
            "events" => Table::Events,
            _ => return None,
        };
        Some(Self::read(nodes, table, letters).await)
    }

    async fn read(nodes: &Nodes, table: Table, letters: &str) -> Result<Self> {
        let mut rows = Vec::new();
        let (mut failed, mut more) = (None, false);
        let sockets = nodes.sockets();
        for socket in &sockets {
            let client = Client::connect(socket).await;
            let client = match client {
                Ok(client) => client,
                Err(error) => {
                    failed = Some(error);
                    continue;
                }
            };
            match client.report::<Value>(table).await {
                Ok(its) => {
                    let name = client.node();
                    let is_on = name.to_lowercase().contains(letters);
                    let its = its.into_iter().filter(|row| is_on || has(row, letters));
                    let room = MAX_ROWS - rows.len();
                    let mut its = its.map(|row| (name.to_owned(), row));
                    rows.extend(its.by_ref().take(room));
                    more |= its.next().is_some();
                }
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if rows.is_empty() => return Err(error),
            _ if sockets.is_empty() => return Err(Error::failed("no node runs here")),
            _ => {}
        }
        Ok(Self { rows, more })
    }
}

/// Whether something in a value has these letters, in either case.
fn has(value: &Value, letters: &str) -> bool {
    match value {
        Value::Null => false,
        Value::Array(values) => values.iter().any(|value| has(value, letters)),
        Value::Object(fields) => fields.values().any(|value| has(value, letters)),
        Value::String(text) => text.to_lowercase().contains(letters),
        other => other.to_string().contains(letters),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn letters_are_looked_for_in_all_of_a_row() {
        let row = json!({"pod": "Web", "offload": true, "ports": [{"host": 8080}], "none": null});
        for letters in ["", "web", "e", "tru", "808"] {
            assert!(has(&row, letters), "{letters}");
        }
        for letters in ["pod", "webs", "null", "8081"] {
            assert!(!has(&row, letters), "{letters}");
        }
    }
}
