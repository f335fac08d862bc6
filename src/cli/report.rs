//! `muslin status`, `pods`, `peers`, `leases`, `routes`, `neighbours`, `drops` and `flows`.

use clap::Args;
use muslin_stack::api::control::{
    Code, Dns, Drop, DropLease, Flow, Lease, Neighbour, Peer, Pod, Route, Status, Table, Traffic,
};
use muslin_stack::api::published::PortMapping;
use muslin_stack::control::ipam::PodName;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::NodeChoice;
use crate::control::Client;
use crate::error::{Error, Result};
use crate::process::block_on;
use crate::terminal::output::{Table as Lines, pairs, print, print_json};
use crate::terminal::quantity::{bytes, count, duration};

/// The owner shown for this node's own leases.
const THIS_NODE: &str = "this node";

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct DropArguments {
    #[command(flatten)]
    common: Arguments,
    /// Include reasons with a count of zero
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Args)]
pub(super) struct LeaseArguments {
    #[command(flatten)]
    common: Arguments,
    /// Give back the lease of a node that is gone for good, by its subnet or the node's name; refused
    /// if the node is alive
    #[arg(long, value_name = "SUBNET|NODE")]
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
    let mut rows = fetch::<Status>(arguments, Table::Status)?;
    let status = rows
        .pop()
        .ok_or_else(|| Error::failed("the node sent no status"))?;
    if arguments.json {
        return print_json(&status);
    }
    let mut tunnel = format!("{} on {}", status.backend, status.tunnel_ip);
    if status.port != 0 {
        tunnel.push_str(&format!(":{}", status.port));
    }
    let public = if status.public_ip == status.tunnel_ip {
        String::new()
    } else {
        format!(", public address {}", status.public_ip)
    };
    let vni = status
        .vni
        .map(|vni| format!(", VNI {vni}"))
        .unwrap_or_default();
    let vtep = status
        .vtep_mac
        .map(|mac| format!(", VTEP {mac}"))
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
            format!("{tunnel} ({}){public}{vni}{vtep}", status.interface),
        ),
        ("uplink", status.uplink.unwrap_or_else(|| "none".to_owned())),
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
            status.host_interface.map_or_else(
                || "no interface".to_owned(),
                |host| {
                    let (from, to) = (traffic(host.received), traffic(host.sent));
                    format!("{}, {from} from it, {to} to it", host.name)
                },
            ),
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
    let confined = status.confinement.map(|it| ("confined", it.to_string()));
    let trouble = status.trouble.map(|trouble| ("trouble", trouble));
    let rows: Vec<_> = rows
        .into_iter()
        .chain(control)
        .chain(confined)
        .chain(trouble)
        .collect();
    print(&pairs(&rows))
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
        (&header, "no pod is attached\n"),
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
        (&header, "no other node has a lease\n"),
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
        "{path}{}{}",
        mtu.unwrap_or_default(),
        checksums.unwrap_or_default()
    )
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
    let none = "the store has no lease\n";
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
        (&["DESTINATION", "VIA"], "there is no route\n"),
        |route: &Route| vec![route.prefix.to_string(), route.via.clone()],
    )
}

pub(super) fn neighbours(arguments: &Arguments) -> Result<()> {
    let header = ["ADDRESS", "MAC", "PORT", "STATE"];
    list(
        arguments,
        Table::Neighbours,
        (&header, "no neighbour is known\n"),
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
    let rows = fetch::<Drop>(&arguments.common, Table::Drops)?;
    if arguments.common.json {
        return print_json(&rows);
    }
    let mut lost: Vec<_> = rows
        .iter()
        .filter(|row| arguments.all || row.packets > 0)
        .collect();
    if lost.is_empty() {
        return print("no packet was lost\n");
    }
    lost.sort_by_key(|row| std::cmp::Reverse(row.packets));
    let mut table = Lines::new(&["PACKETS", "REASON", "WHAT HAPPENED"]);
    for row in lost {
        table.add_row([
            row.packets.to_string(),
            row.reason.clone(),
            row.description.clone(),
        ]);
    }
    print(&table.text())
}

pub(super) fn flows(arguments: &FlowArguments) -> Result<()> {
    let mut rows = fetch::<Flow>(&arguments.common, Table::Flows)?;
    if let Some(name) = &arguments.pod {
        rows.retain(|flow| flow.pod.as_ref() == Some(name));
        let is_attached = |pod: &Pod| pod.pod == *name;
        // One that is not there has no flows, but neither has one whose name is misspelt.
        if rows.is_empty()
            && !fetch(&arguments.common, Table::Pods)?
                .iter()
                .any(is_attached)
        {
            let message = format!("no pod named '{name}' is attached");
            return Err(Error::refused(Code::NoSuchPod, message));
        }
    }
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
    show(
        &arguments.common,
        &rows,
        (&header, "there is no flow\n"),
        cells,
    )
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
    titles: (&[&str], &str),
    cells: impl Fn(&T) -> Vec<String>,
) -> Result<()> {
    show(arguments, &fetch::<T>(arguments, which)?, titles, cells)
}

/// Prints rows under a header, or the given text if there are none.
fn show<T: Serialize>(
    arguments: &Arguments,
    rows: &[T],
    (header, none): (&[&str], &str),
    cells: impl Fn(&T) -> Vec<String>,
) -> Result<()> {
    if arguments.json {
        return print_json(&rows);
    }
    if rows.is_empty() {
        return print(none);
    }
    let mut table = Lines::new(header);
    for row in rows {
        table.add_row(cells(row));
    }
    print(&table.text())
}

fn fetch<T: DeserializeOwned>(arguments: &Arguments, table: Table) -> Result<Vec<T>> {
    let socket = arguments.node.socket()?;
    block_on(async { Client::connect(&socket).await?.report(table).await })
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
