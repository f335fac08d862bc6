//! What the demo does with its nodes and pods, and what it expects.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use ipnet::IpNet;
use muslin_stack::addresses::Addresses;
use muslin_stack::api::control::{Drop, Status, Table};
use serde::Serialize;
use smoltcp::wire::IpVersion;

use super::progress::Progress;
use super::stage::{Children, Node, Pod, Stage};
use crate::agent::{IcmpError, Ping, Pinged};
use crate::error::{Error, Result};

/// The nodes' addresses, all of the loopback interface; those of IPv6 are for documentation (RFC 3849).
const NODES: [(&str, Ipv4Addr, Ipv6Addr); 2] = [
    (
        "n1",
        Ipv4Addr::new(127, 0, 0, 1),
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
    ),
    (
        "n2",
        Ipv4Addr::new(127, 0, 0, 2),
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2),
    ),
];
/// The pods, each with its node's index.
const PODS: [(&str, usize); 4] = [("a1", 0), ("a2", 0), ("b1", 1), ("b2", 1)];
/// Each backend, and whether it carries IPv6.
const BACKENDS: [(&str, bool); 2] = [("vxlan", true), ("udp", false)];
/// Echo requests of one ping.
const COUNT: u16 = 3;
/// A host of the pods' subnets that no pod has.
const MISSING_HOST: u8 = 200;
/// Addresses outside the pod networks (RFC 5737 and RFC 3849).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1);
/// Which pod sends to which: within a node, and both ways between the nodes.
const TRANSFERS: [(usize, usize); 3] = [(0, 1), (0, 2), (2, 0)];

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
    pub(super) address: Addresses,
}

/// What became of a ping.
#[derive(Debug, Serialize)]
pub(super) struct PingFact {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) address: IpAddr,
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
    pub(super) address: IpAddr,
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

/// The nodes' addresses of IPv6, which no machine has.
pub(super) fn addresses_v6() -> Vec<IpNet> {
    NODES
        .map(|(_, _, address)| IpNet::from(IpAddr::from(address)))
        .to_vec()
}

/// Plays a scene for each backend, with IPv6 where the backend and this machine have it.
pub(super) fn play(
    directory: &Path,
    children: &Children,
    progress: &Progress,
    megabytes: u64,
    has_ipv6: bool,
) -> Result<Vec<Scene>> {
    let scenes = BACKENDS.iter().map(|(backend, carries_ipv6)| {
        let say = |what: &str| progress.say(&format!("{backend}: {what}"));
        let stage = Stage::new(directory.join(backend), children)?;
        scene(&stage, backend, has_ipv6 && *carries_ipv6, megabytes, &say)
    });
    scenes.collect()
}

fn scene(
    stage: &Stage<'_>,
    backend: &'static str,
    has_ipv6: bool,
    megabytes: u64,
    say: &dyn Fn(&str),
) -> Result<Scene> {
    let (mut nodes, mut statuses) = (Vec::new(), Vec::new());
    for (name, ipv4, ipv6) in NODES {
        say(&format!("starting node {name}"));
        let (node, status) = stage.node(name, backend, ipv4, has_ipv6.then_some(ipv6))?;
        nodes.push(node);
        statuses.push(status);
    }
    let mut pods = Vec::new();
    for (name, node) in PODS {
        say(&format!("starting pod {name}"));
        pods.push(stage.pod(name, NODES[node].0, has_ipv6)?);
    }
    wait_for_peers(&nodes)?;
    let (mut all_pings, mut all_transfers) = (Vec::new(), Vec::new());
    for version in versions(has_ipv6) {
        all_pings.extend(pings(&mut pods, &statuses, version, say)?);
        let bytes = megabytes * 1_000_000;
        all_transfers.extend(transfers(&mut pods, bytes, version, say)?);
    }
    let pods = pods.iter().zip(PODS).map(|(pod, (_, node))| PodFact {
        pod: pod.name.clone(),
        node: NODES[node].0,
        address: pod.address,
    });
    Ok(Scene {
        backend,
        pods: pods.collect(),
        pings: all_pings,
        transfers: all_transfers,
        drops: drops(&nodes)?,
        nodes: nodes.iter().map(Node::status).collect::<Result<_>>()?,
    })
}

/// The IP versions that pods have.
fn versions(has_ipv6: bool) -> impl Iterator<Item = IpVersion> {
    let ipv6 = has_ipv6.then_some(IpVersion::Ipv6);
    std::iter::once(IpVersion::Ipv4).chain(ipv6)
}

/// The address of an IP version.
fn of_version(addresses: Addresses, version: IpVersion) -> Result<IpAddr> {
    let address = match version {
        IpVersion::Ipv4 => addresses.ipv4().map(IpAddr::from),
        IpVersion::Ipv6 => addresses.ipv6().map(IpAddr::from),
    };
    address.ok_or_else(|| Error::failed(format!("there is no {version} address")))
}

/// An address of a gateway's subnet that no pod has.
fn missing(gateway: IpAddr) -> IpAddr {
    match gateway {
        IpAddr::V4(gateway) => {
            let [a, b, c, _] = gateway.octets();
            Ipv4Addr::new(a, b, c, MISSING_HOST).into()
        }
        IpAddr::V6(gateway) => {
            let [a, b, c, d, ..] = gateway.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, MISSING_HOST.into()).into()
        }
    }
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
    /// A router, or the pod's own kernel, says that nobody has the address.
    HostUnreachable,
    /// A router says that no way leads there.
    NetUnreachable,
}

impl Expected {
    /// Type and code of ICMP (RFC 792) or ICMPv6 (RFC 4443).
    const fn error(self, version: IpVersion) -> Option<(u8, u8)> {
        match (self, version) {
            (Self::Replies, _) => None,
            (Self::HostUnreachable, IpVersion::Ipv4) => Some((3, 1)),
            (Self::HostUnreachable, IpVersion::Ipv6) => Some((1, 3)),
            (Self::NetUnreachable, IpVersion::Ipv4) => Some((3, 0)),
            (Self::NetUnreachable, IpVersion::Ipv6) => Some((1, 0)),
        }
    }
}

fn pings(
    pods: &mut [Pod<'_>],
    nodes: &[Status],
    version: IpVersion,
    say: &dyn Fn(&str),
) -> Result<Vec<PingFact>> {
    let mut facts = Vec::new();
    let known = pods
        .iter()
        .map(|pod| Ok((pod.name.clone(), of_version(pod.address, version)?)));
    let known = known.collect::<Result<Vec<_>>>()?;
    for (pod, (_, node)) in pods.iter_mut().zip(PODS) {
        let mut targets: Vec<_> = known
            .iter()
            .filter(|(name, _)| *name != pod.name)
            .map(|(name, address)| (name.clone(), *address, Expected::Replies))
            .collect();
        let own = of_version(nodes[node].gateway, version)?;
        let other = of_version(nodes[1 - node].gateway, version)?;
        targets.push(("own gateway".to_owned(), own, Expected::Replies));
        targets.push(("other gateway".to_owned(), other, Expected::Replies));
        let no_host = Expected::HostUnreachable;
        targets.push(("no pod, there".to_owned(), missing(other), no_host));
        if Some(&pod.name) == known.first().map(|(name, _)| name) {
            // Its own kernel looks for a neighbour for three seconds: once is enough.
            targets.push(("no pod, here".to_owned(), missing(own), no_host));
        }
        let outside = match version {
            IpVersion::Ipv4 => OUTSIDE.into(),
            IpVersion::Ipv6 => OUTSIDE_V6.into(),
        };
        targets.push(("outside".to_owned(), outside, Expected::NetUnreachable));
        for (to, address, expected) in targets {
            say(&format!("ping {} -> {to}, {version}", pod.name));
            facts.push(ping(pod, to, address, expected.error(version))?);
        }
    }
    Ok(facts)
}

fn ping(
    pod: &mut Pod<'_>,
    to: String,
    address: IpAddr,
    expected: Option<(u8, u8)>,
) -> Result<PingFact> {
    let mut ping = Ping::new(address);
    ping.count = COUNT;
    ping.interval_ms = 5;
    let seen = pod.agent.ping(&ping)?;
    let mut round_trips: Vec<_> = seen.replies.iter().map(|reply| reply.rtt_us).collect();
    round_trips.sort_unstable();
    let ok = match expected {
        None => seen.is_perfect(COUNT),
        Some(expected) => {
            let right = |error: &IcmpError| (error.kind, error.code) == expected;
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
        return Some(match (error.from, error.kind, error.code) {
            (IpAddr::V4(_), 3, 0) | (IpAddr::V6(_), 1, 0) => "net unreachable".to_owned(),
            (IpAddr::V4(_), 3, 1) | (IpAddr::V6(_), 1, 3) => "host unreachable".to_owned(),
            (_, kind, code) => format!("ICMP type {kind} code {code}"),
        });
    }
    match seen.refused.first() {
        Some(refused) => Some(refused.error.clone()),
        None if seen.replies.len() < COUNT.into() => Some("no answer".to_owned()),
        None => None,
    }
}

fn transfers(
    pods: &mut [Pod<'_>],
    bytes: u64,
    version: IpVersion,
    say: &dyn Fn(&str),
) -> Result<Vec<TransferFact>> {
    let mut facts = Vec::new();
    for (seed, (from, to)) in (1..).zip(TRANSFERS) {
        let port = pods[to].agent.listen(0)?;
        let address = SocketAddr::new(of_version(pods[to].address, version)?, port);
        let (to, across) = (pods[to].name.clone(), PODS[from].1 != PODS[to].1);
        let pod = &mut pods[from];
        say(&format!("TCP {} -> {to}, {version}", pod.name));
        let sent = pod.agent.send(address, bytes, seed);
        let (seconds, rate) = sent
            .as_ref()
            .map_or((0.0, 0.0), |sent| (sent.seconds, sent.bits_per_second()));
        facts.push(TransferFact {
            from: pod.name.clone(),
            to,
            address: address.ip(),
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
    for (node, (name, ..)) in nodes.iter().zip(NODES) {
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
