//! What the demo does with its nodes and pods, and what it expects.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use muslin_stack::api::control::{Drop, Status, Table};
use serde::Serialize;

use super::progress::Progress;
use super::stage::{Children, Node, Pod, Stage, free_port, is_free};
use crate::agent::{IcmpError, Ping, Pinged};
use crate::error::{Error, Result};

/// The nodes' addresses.
const NODES: [(&str, Ipv4Addr); 2] = [
    ("n1", Ipv4Addr::new(127, 0, 0, 1)),
    ("n2", Ipv4Addr::new(127, 0, 0, 2)),
];
/// The pods, each with its node's index.
const PODS: [(&str, usize); 4] = [("a1", 0), ("a2", 0), ("b1", 1), ("b2", 1)];
/// Each backend with its usual port.
const BACKENDS: [(&str, u16); 2] = [("vxlan", 8472), ("udp", 8285)];
/// How often nodes are started before their port is given up.
const MAX_TRIES: u32 = 3;
/// Echo requests of one ping.
const COUNT: u16 = 3;
/// A host of the pods' subnets that no pod has.
const MISSING_HOST: u8 = 200;
/// An address outside the pod network (RFC 5737).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// All that was seen with one backend.
#[derive(Debug, Serialize)]
pub(super) struct Scene {
    pub(super) backend: &'static str,
    pub(super) nodes: Vec<Status>,
    pub(super) pods: Vec<PodFact>,
    pub(super) pings: Vec<PingFact>,
    pub(super) transfers: Vec<TransferFact>,
    pub(super) drops: Vec<DropFact>,
}

/// A pod.
#[derive(Debug, Serialize)]
pub(super) struct PodFact {
    pub(super) pod: String,
    pub(super) node: &'static str,
    pub(super) address: Ipv4Addr,
}

/// What became of a ping.
#[derive(Debug, Serialize)]
pub(super) struct PingFact {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) address: Ipv4Addr,
    /// The median round trip in microseconds, if there were replies.
    pub(super) rtt_us: Option<u64>,
    /// What a router or the kernel said instead.
    pub(super) error: Option<String>,
    /// Whether it is as expected.
    pub(super) ok: bool,
}

/// What became of a TCP transfer.
#[derive(Debug, Serialize)]
pub(super) struct TransferFact {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) across: bool,
    pub(super) bytes: u64,
    pub(super) seconds: f64,
    pub(super) bits_per_second: f64,
    pub(super) error: Option<String>,
    /// Whether the receiver had what the sender sent.
    pub(super) ok: bool,
}

/// Packets a node lost for one reason.
#[derive(Debug, Serialize)]
pub(super) struct DropFact {
    pub(super) node: &'static str,
    pub(super) reason: String,
    pub(super) packets: u64,
    pub(super) description: String,
}

impl Scene {
    /// Steps that did not go as expected.
    pub(super) fn failures(&self) -> usize {
        let pings = self.pings.iter().filter(|ping| !ping.ok).count();
        pings
            + self
                .transfers
                .iter()
                .filter(|transfer| !transfer.ok)
                .count()
    }
}

/// Plays a scene for each backend.
pub(super) fn play(
    directory: &Path,
    children: &Children,
    progress: &Progress,
    megabytes: u64,
) -> Result<Vec<Scene>> {
    let scenes = BACKENDS.iter().map(|(backend, port)| {
        let say = |what: &str| progress.say(&format!("{backend}: {what}"));
        let started = start(directory, children, backend, *port, &say)?;
        scene(started, backend, megabytes, &say)
    });
    scenes.collect()
}

/// Nodes that run, with what they said at their start.
struct Started<'a> {
    stage: Stage<'a>,
    nodes: Vec<Node<'a>>,
    statuses: Vec<Status>,
}

/// Starts the nodes, on another port if somebody is faster to take the one that was free.
fn start<'a>(
    directory: &Path,
    children: &'a Children,
    backend: &str,
    port: u16,
    say: &dyn Fn(&str),
) -> Result<Started<'a>> {
    let addresses = NODES.map(|(_, ip)| ip);
    let mut tries = 1;
    loop {
        // A network has its port for good, so each try is a network of its own.
        let stage = Stage::new(directory.join(format!("{backend}-{tries}")), children)?;
        let port = free_port(&addresses, port)?;
        match start_on(stage, backend, port, say) {
            Err(_) if tries < MAX_TRIES && !is_free(&addresses, port) => tries += 1,
            started => return started,
        }
    }
}

fn start_on<'a>(
    stage: Stage<'a>,
    backend: &str,
    port: u16,
    say: &dyn Fn(&str),
) -> Result<Started<'a>> {
    let (mut nodes, mut statuses) = (Vec::new(), Vec::new());
    for (name, ip) in NODES {
        say(&format!("starting node {name}"));
        let (node, status) = stage.node(name, ip, backend, port)?;
        nodes.push(node);
        statuses.push(status);
    }
    Ok(Started {
        stage,
        nodes,
        statuses,
    })
}

fn scene(
    started: Started<'_>,
    backend: &'static str,
    megabytes: u64,
    say: &dyn Fn(&str),
) -> Result<Scene> {
    let Started {
        stage,
        nodes,
        statuses,
    } = started;
    let mut pods = Vec::new();
    for (name, node) in PODS {
        say(&format!("starting pod {name}"));
        pods.push(stage.pod(name, NODES[node].0)?);
    }
    wait_for_peers(&nodes)?;
    let pings = pings(&mut pods, &statuses, say)?;
    let transfers = transfers(&mut pods, megabytes * 1_000_000, say)?;
    let pods = pods.iter().zip(PODS).map(|(pod, (_, node))| PodFact {
        pod: pod.name.clone(),
        node: NODES[node].0,
        address: pod.address,
    });
    Ok(Scene {
        backend,
        pods: pods.collect(),
        pings,
        transfers,
        drops: drops(&nodes)?,
        nodes: nodes.iter().map(Node::status).collect::<Result<_>>()?,
    })
}

/// The first node learns of the second by its watch.
fn wait_for_peers(nodes: &[Node<'_>]) -> Result<()> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(15);
    for node in nodes {
        while node.status()?.peers + 1 < nodes.len() {
            if std::time::Instant::now() > deadline {
                return Err(crate::error::Error::failed(
                    "the nodes do not find each other",
                ));
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
    Ok(())
}

/// What a ping is expected to end with.
#[derive(Clone, Copy)]
enum Expected {
    Replies,
    /// Destination unreachable with this code (RFC 792).
    Unreachable(u8),
}

fn pings(pods: &mut [Pod<'_>], nodes: &[Status], say: &dyn Fn(&str)) -> Result<Vec<PingFact>> {
    let mut facts = Vec::new();
    let known: Vec<_> = pods
        .iter()
        .map(|pod| (pod.name.clone(), pod.address))
        .collect();
    for (pod, (_, node)) in pods.iter_mut().zip(PODS) {
        let mut targets: Vec<_> = known
            .iter()
            .filter(|(name, _)| *name != pod.name)
            .map(|(name, address)| (name.clone(), *address, Expected::Replies))
            .collect();
        let (own, other) = (&nodes[node], &nodes[1 - node]);
        let gateway = |status: &Status| {
            let gateway = status.gateway.ipv4();
            gateway.ok_or_else(|| Error::failed("a node has no IPv4 gateway"))
        };
        let missing = |status: &Status| {
            let [a, b, c, _] = gateway(status)?.octets();
            Ok::<_, Error>(Ipv4Addr::new(a, b, c, MISSING_HOST))
        };
        targets.push(("own gateway".to_owned(), gateway(own)?, Expected::Replies));
        targets.push((
            "other gateway".to_owned(),
            gateway(other)?,
            Expected::Replies,
        ));
        let no_host = Expected::Unreachable(1);
        targets.push(("no pod, there".to_owned(), missing(other)?, no_host));
        if Some(&pod.name) == known.first().map(|(name, _)| name) {
            // Its own kernel looks for a neighbour for three seconds: once is enough.
            targets.push(("no pod, here".to_owned(), missing(own)?, no_host));
        }
        targets.push(("outside".to_owned(), OUTSIDE, Expected::Unreachable(0)));
        for (to, address, expected) in targets {
            say(&format!("ping {} -> {to}", pod.name));
            facts.push(ping(pod, to, address, expected)?);
        }
    }
    Ok(facts)
}

fn ping(pod: &mut Pod<'_>, to: String, address: Ipv4Addr, expected: Expected) -> Result<PingFact> {
    let mut ping = Ping::new(address);
    ping.count = COUNT;
    ping.interval_ms = 5;
    let seen = pod.agent.ping(&ping)?;
    let mut round_trips: Vec<_> = seen.replies.iter().map(|reply| reply.rtt_us).collect();
    round_trips.sort_unstable();
    let ok = match expected {
        Expected::Replies => seen.is_perfect(COUNT),
        Expected::Unreachable(code) => {
            let right = |error: &IcmpError| (error.kind, error.code) == (3, code);
            seen.replies.is_empty() && !seen.errors.is_empty() && seen.errors.iter().all(right)
        }
    };
    Ok(PingFact {
        from: pod.name.clone(),
        to,
        address,
        rtt_us: round_trips.get(round_trips.len() / 2).copied(),
        error: said(&seen),
        ok,
    })
}

/// What was said instead of replies.
fn said(seen: &Pinged) -> Option<String> {
    if let Some(error) = seen.errors.first() {
        return Some(match (error.kind, error.code) {
            (3, 0) => "net unreachable".to_owned(),
            (3, 1) => "host unreachable".to_owned(),
            (kind, code) => format!("ICMP type {kind} code {code}"),
        });
    }
    match seen.refused.first() {
        Some(refused) => Some(refused.error.clone()),
        None if seen.replies.len() < COUNT.into() => Some("no answer".to_owned()),
        None => None,
    }
}

fn transfers(pods: &mut [Pod<'_>], bytes: u64, say: &dyn Fn(&str)) -> Result<Vec<TransferFact>> {
    // Within a node, and both ways between the nodes.
    let mut facts = Vec::new();
    for (seed, (from, to)) in (1..).zip([(0, 1), (0, 2), (2, 0)]) {
        let port = pods[to].agent.listen(0)?;
        let address = SocketAddrV4::new(pods[to].address, port);
        let (to, across) = (pods[to].name.clone(), PODS[from].1 != PODS[to].1);
        let pod = &mut pods[from];
        say(&format!("TCP {} -> {to}", pod.name));
        let sent = pod.agent.send(address, bytes, seed);
        let (seconds, rate) = sent
            .as_ref()
            .map_or((0.0, 0.0), |sent| (sent.seconds, sent.bits_per_second()));
        facts.push(TransferFact {
            from: pod.name.clone(),
            to,
            across,
            bytes,
            seconds,
            bits_per_second: rate,
            ok: sent
                .as_ref()
                .is_ok_and(|sent| sent.intact && sent.bytes == bytes),
            error: match sent {
                Ok(sent) => (!sent.intact).then(|| "other bytes arrived".to_owned()),
                Err(error) => Some(error.to_string()),
            },
        });
    }
    Ok(facts)
}

fn drops(nodes: &[Node<'_>]) -> Result<Vec<DropFact>> {
    let mut facts = Vec::new();
    for (node, (name, _)) in nodes.iter().zip(NODES) {
        let lost = node.report::<Drop>(Table::Drops)?;
        facts.extend(
            lost.into_iter()
                .filter(|row| row.packets > 0)
                .map(|row| DropFact {
                    node: name,
                    reason: row.reason,
                    packets: row.packets,
                    description: row.description,
                }),
        );
    }
    Ok(facts)
}
