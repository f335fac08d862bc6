//! A packet's journey through the nodes of this machine, as each of them tells its part.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use muslin_stack::api::control::{Code, Status, Table};
use muslin_stack::api::trace::{Beginning, Next, Part, Question, Verdict};
use serde::Serialize;
use tokio::time::timeout;

use crate::control::Client;
use crate::error::{Error, Result};

/// How long a node may take to say who it is: one that hangs must not hold up the others' answers.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nodes that a packet may go through; two are on its way.
const MAX_PARTS: usize = 8;

/// A packet's journey through the nodes of this machine.
#[derive(Debug, Serialize)]
pub(crate) struct Journey {
    /// Each node's part.
    pub(crate) parts: Vec<Part>,
    /// The node that would have the next part, if it does not run on this machine.
    pub(crate) unknown: Option<Elsewhere>,
}

/// A node that does not run on this machine.
#[derive(Debug, Serialize)]
pub(crate) struct Elsewhere {
    pub(crate) public_ip: IpAddr,
    pub(crate) node: Option<String>,
}

/// A node of this machine that answers.
#[derive(Debug)]
pub(crate) struct Reached {
    client: Client,
    public_ip: Option<IpAddr>,
}

impl Journey {
    /// Whether the packet gets to where it was to go, as far as is known.
    pub(crate) fn arrives(&self) -> bool {
        let last = self.parts.last();
        last.is_some_and(|part| part.outcome.verdict != Verdict::Dropped)
    }
}

/// The nodes that listen at these sockets and have a lease. That of a single one must answer.
///
/// # Errors
/// Why a single one does not.
pub(crate) async fn reach(sockets: &[PathBuf]) -> Result<Vec<Reached>> {
    let mut nodes = Vec::new();
    for socket in sockets {
        let reached = timeout(PATIENCE, reach_one(socket.clone())).await;
        let reached = reached.unwrap_or_else(|_| {
            let socket = socket.display();
            Err(Error::failed(format!(
                "the node at {socket} does not answer"
            )))
        });
        match reached {
            Ok(node) => nodes.push(node),
            // Those of others, those without a lease, and those that hang have no part in it.
            Err(_) if sockets.len() > 1 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(nodes)
}

async fn reach_one(socket: PathBuf) -> Result<Reached> {
    let client = Client::connect(&socket).await?;
    let status = client.report::<Status>(Table::Status).await?;
    let public_ip = status.first().and_then(|it| it.public_ip.iter().next());
    Ok(Reached { client, public_ip })
}

/// Follows a packet that begins at whichever of these nodes has its sender.
///
/// # Errors
/// If none has, or there can be no such packet.
pub(crate) async fn follow(
    nodes: &[Reached],
    asked: &[Reached],
    beginning: &Beginning,
) -> Result<Journey> {
    let mut part = begin(asked, beginning).await?;
    let mut parts = Vec::new();
    loop {
        let next = part.next.take();
        parts.push(part);
        let Some(Next {
            public_ip,
            node,
            arrival,
        }) = next
        else {
            return Ok(Journey {
                parts,
                unknown: None,
            });
        };
        let found = nodes.iter().find(|it| it.public_ip == Some(public_ip));
        let Some(there) = found.filter(|_| parts.len() < MAX_PARTS) else {
            let unknown = Some(Elsewhere { public_ip, node });
            return Ok(Journey { parts, unknown });
        };
        part = there.client.trace(Question::Arrival(arrival)).await?;
    }
}

async fn begin(asked: &[Reached], beginning: &Beginning) -> Result<Part> {
    let mut refused = None;
    for node in asked {
        let question = Question::Beginning(beginning.clone());
        match node.client.trace(question).await {
            Err(Error::Refused {
                code: Code::NoSuchPod,
                message,
            }) => {
                refused.get_or_insert(Error::refused(Code::NoSuchPod, message));
            }
            answer => return answer,
        }
    }
    Err(refused.unwrap_or_else(|| Error::failed("no node of this machine has its lease yet")))
}
