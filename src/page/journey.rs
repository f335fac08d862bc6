//! A packet's journey through the nodes of this machine, as each of them tells its part.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use muslin_stack::addresses::Addresses;
use muslin_stack::api::control::{Code, Status, Table};
use muslin_stack::api::live;
use muslin_stack::api::trace::{Beginning, Elsewhere, Journey, Next, Part, Question};
use tokio::time::timeout;

use crate::control::Client;
use crate::error::{Error, Result};

/// How long a node may take to say who it is: one that hangs must not hold up the others' answers.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nodes that a packet may go through; two are on its way.
const MAX_PARTS: usize = 8;

/// A node of this machine that answers.
#[derive(Debug)]
pub(crate) struct Reached {
    client: Client,
    public_ip: Option<Addresses>,
}

impl Reached {
    /// Whether that is an address of the node's.
    fn is_at(&self, address: IpAddr) -> bool {
        let all = self.public_ip.iter();
        all.flat_map(Addresses::iter::<IpAddr>)
            .any(|own| own == address)
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
    let public_ip = status.first().map(|it| it.public_ip);
    Ok(Reached { client, public_ip })
}

/// A node on a packet's way, and how it is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stop<'a> {
    /// The node of this machine that is asked.
    reached: &'a Reached,
    /// The public address of the one that this one asks, if the stop is that.
    pub(crate) elsewhere: Option<IpAddr>,
}

impl Stop<'_> {
    /// Asks the node about probes.
    ///
    /// # Errors
    /// What it says against it.
    pub(crate) async fn live(&self, call: live::Call) -> Result<live::Told> {
        let call = match self.elsewhere {
            Some(public_ip) => live::Call::Elsewhere {
                public_ip,
                call: Box::new(call),
            },
            None => call,
        };
        self.reached.client.live(call).await
    }
}

/// Follows a packet that begins at whichever of these nodes has its sender.
///
/// # Errors
/// If none has, or there can be no such packet.
pub(crate) async fn follow<'a>(
    nodes: &'a [Reached],
    asked: &'a [Reached],
    beginning: &Beginning,
) -> Result<Journey> {
    Ok(stops(nodes, asked, beginning).await?.0)
}

/// The same, with the nodes that have told their parts.
///
/// # Errors
/// As those.
pub(crate) async fn stops<'a>(
    nodes: &'a [Reached],
    asked: &'a [Reached],
    beginning: &Beginning,
) -> Result<(Journey, Vec<Stop<'a>>)> {
    let (mut part, mut here) = begin(asked, beginning).await?;
    let mut parts = Vec::new();
    let mut stops = vec![Stop {
        reached: here,
        elsewhere: None,
    }];
    loop {
        let next = part.next.take();
        parts.push(part);
        let Some(Next {
            public_ip,
            node,
            arrival,
        }) = next
        else {
            let unknown = None;
            return Ok((Journey { parts, unknown }, stops));
        };
        let mut elsewhere = None;
        let found = nodes.iter().find(|it| it.is_at(public_ip));
        part = match found {
            _ if parts.len() >= MAX_PARTS => {
                let why = format!("{MAX_PARTS} nodes have told theirs, and no more are asked");
                return Ok((ends(parts, public_ip, node, why), stops));
            }
            Some(there) => {
                here = there;
                there.client.trace(Question::Arrival(arrival)).await?
            }
            None => {
                let question = Question::Elsewhere { public_ip, arrival };
                match here.client.trace(question).await {
                    Ok(part) => {
                        elsewhere = Some(public_ip);
                        part
                    }
                    Err(error) => {
                        let why = error.to_string();
                        return Ok((ends(parts, public_ip, node, why), stops));
                    }
                }
            }
        };
        stops.push(Stop {
            reached: here,
            elsewhere,
        });
    }
}

/// A journey that goes on at a node which does not tell its part.
fn ends(parts: Vec<Part>, public_ip: IpAddr, node: Option<String>, why: String) -> Journey {
    Journey {
        parts,
        unknown: Some(Elsewhere {
            public_ip,
            node,
            why,
        }),
    }
}

/// The first part, and the node that has told it.
async fn begin<'a>(asked: &'a [Reached], beginning: &Beginning) -> Result<(Part, &'a Reached)> {
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
            answer => return answer.map(|part| (part, node)),
        }
    }
    Err(refused.unwrap_or_else(|| Error::failed("no node of this machine has its lease yet")))
}
