//! `muslin trace`: asks the nodes of this machine, one after the other, what would become of a packet.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use muslin_stack::api::control::{Code, Status, Table};
use muslin_stack::api::trace::{Beginning, Next, Part, Protocol, Question, Verdict};
use serde::Serialize;

use super::NodeChoice;
use crate::control::Client;
use crate::error::{Error, Result};
use crate::process::block_on;
use crate::state;
use crate::terminal::output::{pairs, print, print_json};
use crate::terminal::text::plain;

/// Nodes that a packet may go through; two are on its way.
const MAX_PARTS: usize = 8;

#[derive(Debug, Args)]
#[command(after_help = "Example: muslin trace web db.n2 --dport 5432 --size 1500 --df")]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    /// Who sends the packet: a pod by its name or address, `host`, or `outside`
    from: String,
    /// Who is to get it: a pod, a node, an address, `gateway`, `host` or `outside`
    to: String,
    /// What it carries: the beginning of a connection, a datagram, or an echo request
    #[arg(long, value_enum, default_value_t = Carries::Tcp)]
    proto: Carries,
    /// Source port, or the identifier of an echo request
    #[arg(long, value_name = "PORT", default_value_t = 40_000)]
    sport: u16,
    /// Destination port
    #[arg(long, value_name = "PORT", default_value_t = 80)]
    dport: u16,
    /// Length of the IP packet [default: that of its headers]
    #[arg(long, value_name = "BYTES")]
    size: Option<u16>,
    /// Time to live
    #[arg(long, default_value_t = 64)]
    ttl: u8,
    /// The packet must not be fragmented
    #[arg(long)]
    df: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Carries {
    Tcp,
    Udp,
    Icmp,
}

/// A packet's way through the nodes of this machine.
#[derive(Debug, Serialize)]
struct Way {
    /// Each node's part.
    parts: Vec<Part>,
    /// The node that would have the next part, if it does not run on this machine.
    unknown: Option<Elsewhere>,
}

/// A node that does not run on this machine.
#[derive(Debug, Serialize)]
struct Elsewhere {
    public_ip: IpAddr,
    node: Option<String>,
}

/// A node of this machine.
struct Reached {
    client: Client,
    public_ip: Option<IpAddr>,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let way = block_on(follow(arguments))?;
    if arguments.json {
        print_json(&way)?;
    } else {
        print(&way.text())?;
    }
    let arrives = way
        .parts
        .last()
        .is_some_and(|part| part.outcome.verdict != Verdict::Dropped);
    // What a script asks.
    if arrives {
        Ok(())
    } else {
        Err(Error::Command(1))
    }
}

async fn follow(arguments: &Arguments) -> Result<Way> {
    let nodes = reach(&sockets(arguments)?).await?;
    let mut part = begin(arguments, &nodes).await?;
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
            return Ok(Way {
                parts,
                unknown: None,
            });
        };
        let found = nodes.iter().find(|it| it.public_ip == Some(public_ip));
        let Some(there) = found.filter(|_| parts.len() < MAX_PARTS) else {
            let unknown = Some(Elsewhere { public_ip, node });
            return Ok(Way { parts, unknown });
        };
        part = there.client.trace(Question::Arrival(arrival)).await?;
    }
}

/// The sockets of the nodes of this machine, the chosen one first.
fn sockets(arguments: &Arguments) -> Result<Vec<PathBuf>> {
    let dir = arguments.node.state_dir();
    let all = state::nodes(&dir);
    let all = all.iter().map(|name| state::socket_path(&dir, name));
    let mut sockets: Vec<_> = all.filter(|socket| state::is_listening(socket)).collect();
    if arguments.node.is_named() || sockets.is_empty() {
        let chosen = arguments.node.socket()?;
        sockets.retain(|socket| *socket != chosen);
        sockets.insert(0, chosen);
    }
    Ok(sockets)
}

async fn reach(sockets: &[PathBuf]) -> Result<Vec<Reached>> {
    let mut nodes = Vec::new();
    for (index, socket) in sockets.iter().enumerate() {
        let reached = async {
            let client = Client::connect(socket).await?;
            let status = client.report::<Status>(Table::Status).await?;
            let public_ip = status.first().and_then(|it| it.public_ip.iter().next());
            Ok(Reached { client, public_ip })
        };
        match reached.await {
            Ok(node) => nodes.push(node),
            // Those of others, and those without a lease, have no part in it.
            Err(_) if index > 0 || sockets.len() > 1 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(nodes)
}

/// Asks the node that has the sender. Every node has `host` and `outside`, so that one is to be named
/// where several run.
async fn begin(arguments: &Arguments, nodes: &[Reached]) -> Result<Part> {
    let beginning = Beginning {
        from: arguments.from.clone(),
        to: arguments.to.clone(),
        protocol: match arguments.proto {
            Carries::Tcp => Protocol::Tcp,
            Carries::Udp => Protocol::Udp,
            Carries::Icmp => Protocol::Icmp,
        },
        source_port: arguments.sport,
        destination_port: arguments.dport,
        size: arguments.size.map_or(0, usize::from),
        ttl: arguments.ttl,
        dont_fragment: arguments.df,
    };
    let asked = match arguments.node.is_named() {
        true => nodes.get(..1).unwrap_or_default(),
        false => nodes,
    };
    let mut refused = None;
    for node in asked {
        match node
            .client
            .trace(Question::Beginning(beginning.clone()))
            .await
        {
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

impl Way {
    fn text(&self) -> String {
        let mut text = String::new();
        if let Some(first) = self.parts.first() {
            let packet = &first.packet;
            text = format!(
                "{} to {}: {}\n",
                packet.source,
                packet.destination,
                plain(&packet.text)
            );
        }
        for part in &self.parts {
            text.push_str(&format!("\nnode {}\n", plain(&part.node)));
            let steps = part.steps.iter();
            let steps: Vec<_> = steps
                .map(|step| (step.kind.as_str(), step.text.clone()))
                .collect();
            for line in pairs(&steps).lines() {
                text.push_str(&format!("  {line}\n"));
            }
            let outcome = &part.outcome;
            let reason = outcome.reason.as_ref();
            let reason =
                reason.map_or_else(String::new, |reason| format!("LOST, {}: ", plain(reason)));
            text.push_str(&format!("  => {reason}{}\n", plain(&outcome.text)));
            for own in &part.own {
                text.push_str(&format!("  also, {}\n", plain(own)));
            }
        }
        if let Some(Elsewhere { public_ip, node }) = &self.unknown {
            let node = node.as_ref().map_or_else(
                || format!("the node at {public_ip}"),
                |name| format!("node {} at {public_ip}", plain(name)),
            );
            text.push_str(&format!(
                "\nThe rest is for {node} to tell, which does not run here.\n"
            ));
        }
        text
    }
}
