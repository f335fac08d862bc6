//! What the demo shows in the end.

use std::fmt::Write as _;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::steps::{PingFact, Scene, TransferFact};
use crate::terminal::output::Table;
use crate::terminal::quantity::{bytes, count};
use crate::underlay::describe_ends;

/// Everything, for programs.
pub(super) fn json(scenes: &[Scene]) -> Value {
    json!({
        "ok": scenes.iter().all(|scene| scene.failures() == 0),
        "scenes": scenes,
    })
}

/// Everything, for people.
pub(super) fn text(scenes: &[Scene]) -> String {
    let mut text = String::new();
    for scene in scenes {
        let mtu = scene.nodes.first().map(|node| node.mtu).unwrap_or_default();
        let heading = format!("{}: two nodes, four pods, MTU {mtu}", scene.backend);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{heading}\n{}\n", "=".repeat(heading.len()));
        let mut tables = vec![nodes(scene), pings(scene, IpAddr::is_ipv4)];
        if scene.pings.iter().any(|ping| ping.address.is_ipv6()) {
            tables.push(pings(scene, IpAddr::is_ipv6));
        }
        tables.extend([transfers(scene), drops(scene)]);
        for table in tables {
            let _ = writeln!(text, "{}", table.text());
        }
    }
    let failures: usize = scenes.iter().map(Scene::failures).sum();
    if failures == 0 {
        let total = |of: fn(&Scene) -> usize| scenes.iter().map(of).sum::<usize>() as u64;
        let _ = writeln!(
            text,
            "{} and {} succeeded",
            count(total(|scene| scene.pings.len()), "ping"),
            count(total(|scene| scene.transfers.len()), "transfer"),
        );
    }
    text
}

fn nodes(scene: &Scene) -> Table {
    let mut table = Table::new(&["NODE", "LEASE", "TUNNEL", "VTEP MAC", "PODS"]);
    for node in &scene.nodes {
        let pods = scene.pods.iter().filter(|pod| pod.node == node.node);
        let pods: Vec<_> = pods
            .map(|pod| format!("{} {}", pod.pod, pod.address))
            .collect();
        table.add_row([
            node.node.clone(),
            node.subnet.to_string(),
            describe_ends(node.public_ip, node.ports()),
            node.vtep_mac.clone().unwrap_or_else(|| "-".to_owned()),
            pods.join(", "),
        ]);
    }
    table
}

/// The pings to addresses of one IP version.
fn pings(scene: &Scene, is_its: fn(&IpAddr) -> bool) -> Table {
    let its = || scene.pings.iter().filter(|ping| is_its(&ping.address));
    let mut targets: Vec<_> = scene.pods.iter().map(|pod| pod.pod.as_str()).collect();
    for ping in its() {
        if !targets.contains(&ping.to.as_str()) {
            targets.push(&ping.to);
        }
    }
    let from: Vec<_> = scene
        .pods
        .iter()
        .map(|pod| format!("from {}", pod.pod))
        .collect();
    let is_ipv6 = its().all(|ping| ping.address.is_ipv6());
    let mut header = vec![if is_ipv6 { "PING, IPv6" } else { "PING" }];
    header.extend(from.iter().map(String::as_str));
    let mut table = Table::new(&header);
    for to in targets {
        let mut row = vec![format!("to {to}")];
        for pod in &scene.pods {
            let ping = its().find(|ping| ping.from == pod.pod && ping.to == to);
            row.push(ping.map_or_else(|| "-".to_owned(), ping_cell));
        }
        table.add_row(row);
    }
    table
}

fn ping_cell(ping: &PingFact) -> String {
    let seen = match (&ping.error, ping.rtt_us) {
        (Some(error), _) => error.clone(),
        (None, Some(rtt)) => format!("{:.2} ms", rtt as f64 / 1000.0),
        (None, None) => "no answer".to_owned(),
    };
    if ping.ok {
        seen
    } else {
        format!("FAILED: {seen}")
    }
}

fn transfers(scene: &Scene) -> Table {
    let mut table = Table::new(&["TCP", "BY", "WAY", "BYTES", "RATE", "CONTENT"]);
    for transfer in &scene.transfers {
        table.add_row([
            format!("{} -> {}", transfer.from, transfer.to),
            if transfer.address.is_ipv6() {
                "IPv6"
            } else {
                "IPv4"
            }
            .to_owned(),
            if transfer.across {
                "across nodes"
            } else {
                "same node"
            }
            .to_owned(),
            bytes(transfer.bytes),
            format!("{:.2} Gbit/s", transfer.bits_per_second / 1e9),
            content_cell(transfer),
        ]);
    }
    table
}

fn content_cell(transfer: &TransferFact) -> String {
    match (&transfer.error, transfer.ok) {
        (None, true) => "equal".to_owned(),
        (Some(error), _) => format!("FAILED: {error}"),
        (None, false) => "FAILED".to_owned(),
    }
}

fn drops(scene: &Scene) -> Table {
    let mut table = Table::new(&["LOST", "AT", "REASON", "WHAT HAPPENED"]);
    for drop in &scene.drops {
        table.add_row([
            drop.packets.to_string(),
            drop.node.to_owned(),
            drop.reason.clone(),
            drop.description.clone(),
        ]);
    }
    table
}
