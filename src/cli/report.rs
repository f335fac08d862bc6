//! `muslin status`, `pods`, `peers`, `leases`, `routes`, `neighbours`, `drops`, `flows` and `groups`.

use std::time::Duration;

use clap::Args;
use muslin_stack::api::control::{
    Code, Dns, Drop, DropLease, Encryption, Flow, Group, Lease, Neighbour, Peer, Pod, Route,
    Status, Table, Traffic,
};
use muslin_stack::api::published::PortMapping;
use muslin_stack::control::ipam::PodName;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::NodeChoice;
use super::watch::{self, View};
use crate::control::Client;
use crate::error::{Error, Result};
use crate::process::block_on;
use crate::terminal::output::{Table as Lines, pairs, print, print_json};
use crate::terminal::quantity::{bytes, count, duration};
use crate::terminal::suggest::hint;
use crate::underlay::describe_ends;

/// The owner shown for this node's own leases.
const THIS_NODE: &str = "this node";

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) node: NodeChoice,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Repeat every SECONDS, 2 unless told; with --json one line each time
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "2",
        value_parser = watch::seconds
    )]
    watch: Option<Duration>,
}

#[derive(Debug, Args)]
pub(super) struct DropArguments {
    #[command(flatten)]
    common: Arguments,
    /// Include reasons with a count of zero
    #[arg(long)]
    all: bool,
    /// Only this reason; can be repeated
    #[arg(long, value_name = "REASON")]
    reason: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct LeaseArguments {
    #[command(flatten)]
    common: Arguments,
    /// Give back the lease of a node that is gone for good, by its subnet or the node's name; refused
    /// if the node is alive
    #[arg(long, value_name = "SUBNET|NODE", conflicts_with = "watch")]
    drop: Option<String>,
    /// With --drop: even if the node may be alive, or the lease is reserved
    #[arg(long, requires = "drop")]
    force: bool,
}

#[derive(Debug, Args)]
pub(super) struct FlowArguments {
    #[command(flatten)]
    common: Arguments,
    /// Only flows of this pod
    #[arg(long, value_name = "NAME")]
    pod: Option<PodName>,
}

pub(super) fn status(arguments: &Arguments) -> Result<()> {
    arguments.show(async || {
        let mut rows = arguments.fetch::<Status>(Table::Status).await?;
        let status = rows.pop();
        let status = status.ok_or_else(|| Error::failed("the node sent no status"))?;
        View::new(&status, describe(&status))
    })
}

/// A node's status for people.
fn describe(status: &Status) -> String {
    let ends = describe_ends(status.tunnel_ip, status.ports());
    let tunnel = format!("{} on {ends}", status.backend);
    let public = if status.public_ip == status.tunnel_ip {
        String::new()
    } else {
        format!(", public address {}", status.public_ip)
    };
    let vni = status
        .vni
        .map(|vni| format!(", VNI {vni}"))
        .unwrap_or_default();
    let vtep = status.vtep_mac.as_ref();
    let vtep = vtep.map(|mac| format!(", VTEP {mac}")).unwrap_or_default();
    let key = status.public_key.as_ref();
    let key = key
        .map(|key| format!(", public key {key}"))
        .unwrap_or_default();
    let packets = status.packets;
    let rows = [
        (
            "node",
            format!(
                "{} (muslin {}, process {})",
                status.node, status.version, status.pid
            ),
        ),
        ("up", duration(status.uptime_seconds)),
        ("network", status.network.to_string()),
        (
            "subnet",
            format!("{}, gateway {}", status.subnet, status.gateway),
        ),
        (
            "lease",
            format!(
                "confirmed {} ago by {}",
                duration(status.lease_confirmed_seconds),
                status.store
            ),
        ),
        (
            "tunnel",
            format!("{tunnel} ({}){public}{vni}{vtep}{key}", status.interface),
        ),
        ("uplink", status.uplink.clone().unwrap_or("none".to_owned())),
        (
            "pods",
            format!("{}, MTU {}, by {}", status.pods, status.mtu, status.device),
        ),
        ("offload", status.offload.replace(',', ", ")),
        (
            "egress",
            status.egress.map_or_else(
                || "off".to_owned(),
                |flows| {
                    format!(
                        "on, {} open of {} since the start",
                        count(flows.open, "flow"),
                        flows.opened
                    )
                },
            ),
        ),
        (
            "host",
            status.host_interface.as_ref().map_or_else(
                || "no interface".to_owned(),
                |host| {
                    let (from, to) = (traffic(host.received), traffic(host.sent));
                    format!("{}, {from} from it, {to} to it", host.name)
                },
            ),
        ),
        (
            "multicast",
            if status.multicast { "on" } else { "off" }.to_owned(),
        ),
        ("dns", dns(&status.dns)),
        (
            "published",
            format!(
                "{}, {} since the start",
                count(status.published.ports as u64, "port"),
                count(status.published.flows, "flow")
            ),
        ),
        ("workers", status.workers.to_string()),
        ("peers", status.peers.to_string()),
        (
            "packets",
            format!(
                "{} received, {} delivered, {} sent, {} flooded, {} for the node, {} dropped, {} \
                 acknowledgements superseded",
                packets.received,
                packets.delivered,
                packets.sent,
                packets.flooded,
                packets.consumed,
                packets.dropped,
                packets.superseded
            ),
        ),
    ];
    let control: Vec<_> = status.control.iter().map(ToString::to_string).collect();
    let control = (!control.is_empty()).then(|| ("control", control.join(", ")));
    let confined = status.confinement.as_ref();
    let confined = confined.map(|it| ("confined", it.to_string()));
    let trouble = status.trouble.clone();
    let trouble = trouble.map(|trouble| ("trouble", trouble));
    let rows: Vec<_> = rows
        .into_iter()
        .chain(control)
        .chain(confined)
        .chain(trouble)
        .collect();
    pairs(&rows)
}

fn dns(dns: &Dns) -> String {
    format!(
        "{}, {} answered here, {} forwarded to {}, {} failed",
        count(dns.queries, "query"),
        dns.answered,
        dns.forwarded,
        match dns.resolvers.as_slice() {
            [] => "nobody".to_owned(),
            resolvers => resolvers.join(", "),
        },
        dns.failed
    )
}

pub(super) fn pods(arguments: &Arguments) -> Result<()> {
    let header = [
        "POD", "ADDRESS", "MAC", "PORTS", "ATTACHED", "FROM IT", "TO IT",
    ];
    list(
        arguments,
        Table::Pods,
        (
            &header,
            "no pods: none is attached to this node now ('muslin run' and 'muslin attach' attach one)",
        ),
        |pod: &Pod| {
            vec![
                pod.pod.to_string(),
                pod.address.to_string(),
                pod.mac.clone(),
                ports(&pod.published),
                duration(pod.attached_seconds),
                traffic(pod.received),
                traffic(pod.sent),
            ]
        },
    )
}

pub(super) fn peers(arguments: &Arguments) -> Result<()> {
    let header = [
        "NODE",
        "SUBNET",
        "PUBLIC IP",
        "PATH",
        "STATE",
        "FROM IT",
        "TO IT",
    ];
    list(
        arguments,
        Table::Peers,
        (
            &header,
            "no peers: no other node has a lease in this store yet",
        ),
        |peer: &Peer| {
            vec![
                peer.node.clone().unwrap_or_default(),
                peer.subnet.to_string(),
                peer.public_ip.to_string(),
                path(peer),
                format!("{}, {}", peer.state, heard(peer.heard_seconds)),
                traffic(peer.received),
                traffic(peer.sent),
            ]
        },
    )
}

/// The path to a peer, its MTU, and whether checksums are left to it.
fn path(peer: &Peer) -> String {
    let path = peer.path.as_ref().unwrap_or(&peer.backend);
    let mtu = peer.mtu.map(|mtu| format!(", MTU {mtu}"));
    let checksums = peer.partial_checksums.then_some(", partial checksums");
    format!(
        "{path}{}{}{}",
        mtu.unwrap_or_default(),
        checksums.unwrap_or_default(),
        peer.encryption.as_ref().map(encryption).unwrap_or_default()
    )
}

/// How old a peer's keys are, and where it is if that is not where its lease says.
fn encryption(encryption: &Encryption) -> String {
    let handshake = match encryption.handshake_seconds {
        Some(seconds) => format!(", encrypted, handshake {} ago", duration(seconds)),
        None => ", encrypted, no handshake yet".to_owned(),
    };
    match encryption.is_roamed {
        true => format!("{handshake}, at {}", encryption.endpoint),
        false => handshake,
    }
}

fn heard(seconds: Option<u64>) -> String {
    seconds.map_or_else(
        || "never heard".to_owned(),
        |seconds| format!("heard {} ago", duration(seconds)),
    )
}

pub(super) fn leases(arguments: &LeaseArguments) -> Result<()> {
    let common = &arguments.common;
    if let Some(lease) = &arguments.drop {
        return drop_lease(common, lease, arguments.force);
    }
    let header = [
        "LEASE",
        "NODE",
        "PUBLIC IP",
        "BACKEND",
        "OWNER",
        "ENDS IN",
        "STATE",
    ];
    let cells = |lease: &Lease| {
        vec![
            match lease.subnet {
                Some(subnet) => subnet.to_string(),
                None => lease.key.clone(),
            },
            lease.node.clone().unwrap_or_default(),
            lease.public_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            lease.backend.clone().unwrap_or_default(),
            lease.owner.clone(),
            match lease.seconds_left {
                Some(seconds) => duration(seconds),
                None => "never".to_owned(),
            },
            match lease.public_ip {
                Some(_) if !lease.owner.starts_with(THIS_NODE) => {
                    format!("{}, {}", lease.state, heard(lease.heard_seconds))
                }
                _ => lease.state.clone(),
            },
        ]
    };
    let none = "no leases: the store has none now";
    list(common, Table::Leases, (&header, none), cells)
}

/// Gives another node's lease back, and prints which it was.
fn drop_lease(common: &Arguments, lease: &str, force: bool) -> Result<()> {
    let socket = common.node.socket()?;
    let request = DropLease {
        lease: lease.to_owned(),
        force,
    };
    let dropped = block_on(async { Client::connect(&socket).await?.drop_lease(request).await })?;
    if common.json {
        return print_json(&dropped);
    }
    let holder = match (&dropped.node, dropped.public_ip) {
        (Some(node), Some(ip)) => format!("of node {node} ({ip}, {})", dropped.state),
        (None, Some(ip)) => format!("of {ip} ({})", dropped.state),
        (_, None) => format!("({})", dropped.state),
    };
    let end = match dropped.seconds_left {
        Some(seconds) => format!("it had {} left to expiry", duration(seconds)),
        None => "it did not expire".to_owned(),
    };
    let names = match dropped.names_removed {
        true => "; the names of its pods are removed",
        false => "",
    };
    print(&format!(
        "{} {holder} is given back: {end}{names}\n",
        dropped.subnet
    ))
}

pub(super) fn routes(arguments: &Arguments) -> Result<()> {
    list(
        arguments,
        Table::Routes,
        (
            &["DESTINATION", "VIA"],
            "no routes: the node knows no subnet yet",
        ),
        |route: &Route| vec![route.prefix.to_string(), route.via.clone()],
    )
}

pub(super) fn neighbours(arguments: &Arguments) -> Result<()> {
    let header = ["ADDRESS", "MAC", "PORT", "STATE"];
    list(
        arguments,
        Table::Neighbours,
        (
            &header,
            "no neighbours: no pod is attached, and nothing was sent to one yet",
        ),
        |neighbour: &Neighbour| {
            vec![
                neighbour.address.to_string(),
                neighbour.mac.clone().unwrap_or_default(),
                match neighbour.port {
                    _ if neighbour.uplink => "uplink".to_owned(),
                    port => port.map(|port| port.to_string()).unwrap_or_default(),
                },
                neighbour.state.clone(),
            ]
        },
    )
}

pub(super) fn drops(arguments: &DropArguments) -> Result<()> {
    let common = &arguments.common;
    common.show(async || {
        let mut rows = common.fetch::<Drop>(Table::Drops).await?;
        let wanted = &arguments.reason;
        for reason in wanted {
            let names = || rows.iter().map(|row| row.reason.as_str());
            if !names().any(|name| name == reason) {
                let hint = hint(reason, names());
                let message = format!("no packet can be lost for '{reason}'{hint}");
                return Err(Error::usage(message));
            }
        }
        let is_all = wanted.is_empty();
        rows.retain(|row| is_all || wanted.contains(&row.reason));
        let is_shown = |row: &&Drop| arguments.all || !is_all || row.packets > 0;
        let mut lost: Vec<_> = rows.iter().filter(is_shown).collect();
        lost.sort_by_key(|row| std::cmp::Reverse(row.packets));
        let mut table = Lines::new(&["PACKETS", "REASON", "WHAT HAPPENED"]);
        for row in &lost {
            table.add_row([
                row.packets.to_string(),
                row.reason.clone(),
                row.description.clone(),
            ]);
        }
        if lost.is_empty() {
            let why =
                "no drops: no packet was lost since the node started (--all lists all reasons)";
            return Ok(View::new(&rows, String::new())?.with_remark(why));
        }
        View::new(&rows, table.text())
    })
}

pub(super) fn flows(arguments: &FlowArguments) -> Result<()> {
    let header = [
        "PROTOCOL", "POD", "FLOW", "STATE", "AGE", "IDLE", "SENT", "RECEIVED",
    ];
    let cells = |flow: &Flow| {
        vec![
            flow.protocol.clone(),
            flow.pod
                .as_ref()
                .map(PodName::to_string)
                .unwrap_or_default(),
            ends(flow),
            flow.state.clone(),
            duration(flow.age_seconds),
            duration(flow.idle_seconds),
            bytes(flow.sent_bytes),
            bytes(flow.received_bytes),
        ]
    };
    let (common, none) = (
        &arguments.common,
        "no flows: no pod speaks with an address outside the pod network now",
    );
    common.show(async || {
        let mut rows = common.fetch::<Flow>(Table::Flows).await?;
        if let Some(name) = &arguments.pod {
            rows.retain(|flow| flow.pod.as_ref() == Some(name));
            if rows.is_empty() {
                check_pod(common, name).await?;
            }
        }
        View::table(&rows, &header, none, cells)
    })
}

pub(super) fn groups(arguments: &Arguments) -> Result<()> {
    list(
        arguments,
        Table::Groups,
        (
            &["GROUP", "POD", "EXPIRES"],
            "no groups: no pod has joined one, or the node does not follow them (muslin node --multicast)",
        ),
        |row: &Group| {
            vec![
                row.group.to_string(),
                row.pod.as_ref().map(PodName::to_string).unwrap_or_default(),
                duration(row.expires_seconds),
            ]
        },
    )
}

/// Checks that a pod is attached. One that is not has no flows, but neither has one whose name is
/// misspelt.
async fn check_pod(common: &Arguments, name: &PodName) -> Result<()> {
    let pods = common.fetch::<Pod>(Table::Pods).await?;
    let mut names = pods.iter().map(|pod| &pod.pod);
    if names.any(|it| it == name) {
        return Ok(());
    }
    let hint = hint(name.as_str(), pods.iter().map(|pod| pod.pod.as_str()));
    let message = format!("no pod named '{name}' is attached{hint}");
    Err(Error::refused(Code::NoSuchPod, message))
}

/// Both ends of a flow, and which of them began it.
fn ends(flow: &Flow) -> String {
    let arrow = if flow.direction == "in" { "<-" } else { "->" };
    match flow.remote.port() {
        0 => format!("{} {arrow} {}", flow.local, flow.remote.ip()),
        _ => format!("{} {arrow} {}", flow.local, flow.remote),
    }
}

fn list<T: Serialize + DeserializeOwned>(
    arguments: &Arguments,
    which: Table,
    (header, none): (&[&str], &str),
    cells: impl Fn(&T) -> Vec<String>,
) -> Result<()> {
    arguments.show(async || {
        let rows = arguments.fetch::<T>(which).await?;
        View::table(&rows, header, none, &cells)
    })
}

impl Arguments {
    /// Shows a report as it is wanted.
    pub(super) fn show(&self, look: impl AsyncFn() -> Result<View>) -> Result<()> {
        watch::show(self.watch, self.json, look)
    }

    /// The rows of a table.
    pub(super) async fn fetch<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<T>> {
        let socket = self.node.socket()?;
        Client::connect(&socket).await?.report(table).await
    }
}

fn ports(published: &[PortMapping]) -> String {
    let all: Vec<_> = published.iter().map(ToString::to_string).collect();
    all.join(", ")
}

fn traffic(traffic: Traffic) -> String {
    format!(
        "{}, {}",
        count(traffic.packets, "packet"),
        bytes(traffic.bytes)
    )
}
