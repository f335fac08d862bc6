//! What the page shows: the nodes of this machine, as their control sockets tell of them.

use std::path::PathBuf;

use muslin_stack::api::control::{Peer, Pod, Status, Table};
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

/// A node of this machine.
#[derive(Debug, Serialize)]
struct Shown {
    /// Its name.
    node: String,
    /// Why nothing else is known of it.
    trouble: Option<String>,
    status: Option<Status>,
    pods: Vec<Pod>,
    peers: Vec<Peer>,
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
            status: None,
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
        self.status = client.report(Table::Status).await?.pop();
        self.pods = client.report(Table::Pods).await?;
        self.peers = client.report(Table::Peers).await?;
        Ok(())
    }
}

impl Rows {
    /// The table of that name; nothing if there is none.
    pub(super) async fn take(nodes: &Nodes, name: &str) -> Option<Result<Self>> {
        let table = match name {
            "leases" => Table::Leases,
            "routes" => Table::Routes,
            "neighbours" => Table::Neighbours,
            "flows" => Table::Flows,
            "drops" => Table::Drops,
            "events" => Table::Events,
            _ => return None,
        };
        Some(Self::read(nodes, table).await)
    }

    async fn read(nodes: &Nodes, table: Table) -> Result<Self> {
        let mut rows = Vec::new();
        let mut failed = None;
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
                    let name = client.node().to_owned();
                    rows.extend(its.into_iter().map(|row| (name.clone(), row)));
                }
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if rows.is_empty() => return Err(error),
            _ if sockets.is_empty() => return Err(Error::failed("no node runs here")),
            _ => {}
        }
        let more = rows.len() > MAX_ROWS;
        rows.truncate(MAX_ROWS);
        Ok(Self { rows, more })
    }
}
