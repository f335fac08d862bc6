//! `muslin trace`: asks the nodes of this machine, one after the other, what would become of a packet.

mod live;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use muslin_stack::api::live::MAX_COUNT;
use muslin_stack::api::trace::{Beginning, Elsewhere, Journey, Part, Protocol};

use super::{NodeChoice, VersionChoice};
use crate::error::{Error, Result};
use crate::page::journey::{self, Reached};
use crate::process::block_on;
use crate::state;
use crate::terminal::output::{pairs, print, print_json};
use crate::terminal::quantity::count;
use crate::terminal::text::plain;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    #[command(flatten)]
    version: VersionChoice,
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
    /// Time to live, or hop limit
    #[arg(long, default_value_t = 64)]
    ttl: u8,
    /// The packet must not be fragmented
    #[arg(long)]
    df: bool,
    /// Send real packets, which the destination gets, and tell where each of them went, with the time at
    /// each node; the sender is a pod, and they are as if it had sent them
    #[arg(long)]
    live: bool,
    /// How many packets --live sends
    #[arg(long, value_name = "COUNT", default_value_t = 3, requires = "live",
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_COUNT)))]
    count: u32,
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

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.live {
        return live::run(arguments);
    }
    let journey = block_on(follow(arguments))?;
    if arguments.json {
        print_json(&journey)?;
    } else {
        print(&text(&journey))?;
    }
    // What a script asks.
    if journey.arrives() {
        Ok(())
    } else {
        Err(Error::Command(1))
    }
}

async fn follow(arguments: &Arguments) -> Result<Journey> {
    let nodes = journey::reach(&sockets(arguments)?).await?;
    journey::follow(&nodes, asked(arguments, &nodes), &arguments.beginning()).await
}

/// The nodes that may have the sender. Every node has `host` and `outside`, so that one is to be named
/// where several run.
fn asked<'a>(arguments: &Arguments, nodes: &'a [Reached]) -> &'a [Reached] {
    match arguments.node.is_named() {
        true => nodes.get(..1).unwrap_or_default(),
        false => nodes,
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

impl Arguments {
    fn beginning(&self) -> Beginning {
        Beginning {
            from: self.from.clone(),
            to: self.to.clone(),
            protocol: match self.proto {
                Carries::Tcp => Protocol::Tcp,
                Carries::Udp => Protocol::Udp,
                Carries::Icmp => Protocol::Icmp,
            },
            source_port: self.sport,
            destination_port: self.dport,
            size: self.size.map_or(0, usize::from),
            ttl: self.ttl,
            dont_fragment: self.df,
            version: self.version.version(),
            has_mark: self.live,
        }
    }
}

/// A journey for people.
fn text(journey: &Journey) -> String {
    let mut text = String::new();
    if let Some(first) = journey.parts.first() {
        let packet = &first.packet;
        let ends = format!("{} to {}", packet.source, packet.destination);
        text = format!("{ends}: {}\n", plain(&packet.text));
    }
    for part in &journey.parts {
        add_part(&mut text, part);
    }
    if let Some(Elsewhere {
        public_ip,
        node,
        why,
    }) = &journey.unknown
    {
        let node = node.as_ref().map_or_else(
            || format!("the node at {public_ip}"),
            |name| format!("node {} at {public_ip}", plain(name)),
        );
        text.push_str(&format!(
            "\nThe rest is for {node} to tell: {}.\n",
            plain(why)
        ));
    }
    text
}

fn add_part(text: &mut String, part: &Part) {
    text.push_str(&format!("\nnode {}\n", plain(&part.node)));
    let kinds = part.steps.iter().map(|step| format!("  {}", step.kind));
    let kinds: Vec<_> = kinds.collect();
    let steps = kinds.iter().zip(&part.steps);
    let steps: Vec<_> = steps
        .map(|(kind, step)| (kind.as_str(), step.text.clone()))
        .collect();
    text.push_str(&pairs(&steps));
    let outcome = &part.outcome;
    let reason = outcome.reason.as_ref();
    let reason = reason.map_or_else(String::new, |reason| format!("LOST, {}: ", plain(reason)));
    text.push_str(&format!("  => {reason}{}\n", plain(&outcome.text)));
    for own in &part.own {
        text.push_str(&format!("  also, {}\n", plain(own)));
    }
    if part.more_own > 0 {
        let more = count(part.more_own as u64, "more packet");
        text.push_str(&format!("  and {more}\n"));
    }
}
