//! What a node tells of itself: its tables as rows.

use std::collections::HashMap;

use muslin_encap::mac::DisplayMac;
use muslin_encap::tunnel::vxlan::Vni;
use muslin_stack::api::control::{
    Dns, Drop, Flow, Flows, Neighbour, Packets, Peer, Pod, Ports, Route, Status, Table, Traffic,
};
use muslin_stack::control::lease::Standing;
use muslin_stack::control::tunnel::TunnelPlan;
use muslin_stack::datapath::egress;
use muslin_stack::datapath::gateway;
use muslin_stack::datapath::neighbour::{REACHABLE, State};
use muslin_stack::datapath::node::NextHop;
use muslin_stack::datapath::peer::{Path, PeerId};
use muslin_stack::datapath::port;
use muslin_stack::datapath::tunnel::Tunnel;
use serde::Serialize;
use serde_json::Value;

use super::Offload;
use super::liveness::Census;
use super::running::Running;
use crate::confine;
use crate::error::{Context, Error, Result};
use crate::worker::{self, Report};

/// The rows of a table.
pub(super) async fn rows(running: &Running, table: Table) -> Result<Vec<Value>> {
    match table {
        Table::Leases => return values(running.leases().await?),
        Table::Peers => return values(peers(running, &Census::take(running).await?)),
        _ => {}
    }
    let report = running.workers.report().await.map_err(Error::failed)?;
    match table {
        Table::Status => values([status(running, &report)]),
        Table::Leases | Table::Peers => Ok(Vec::new()),
        Table::Pods => values(pods(running, &report)),
        Table::Routes => values(routes(running, &report)),
        Table::Neighbours => values(neighbours(&report)),
        Table::Drops => values(drops(&report)),
        Table::Flows => values(flows(running, &report)),
    }
}

fn values(rows: impl IntoIterator<Item = impl Serialize>) -> Result<Vec<Value>> {
    let values = rows.into_iter().map(serde_json::to_value);
    values
        .collect::<std::result::Result<_, _>>()
        .context("cannot write the answer")
}

fn status(running: &Running, report: &Report) -> Status {
    let facts = &running.facts;
    let (counters, flows) = (&report.counters, &report.egress);
    let (interface, pods) = (running.interface(), running.pods.lock());
    let (vni, mac) = match facts.plan.tunnel {
        Tunnel::Vxlan { vni, mac } => (Some(Vni::get(vni)), Some(mac.to_string())),
        _ => (None, None),
    };
    Status {
        node: facts.settings.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: running.since.elapsed().as_secs(),
        network: facts.config.network,
        subnet: facts.subnet,
        gateway: gateway::address(facts.subnet),
        public_ip: interface.public_ip,
        tunnel_ip: interface.address,
        interface: interface.name,
        backend: facts.config.backend.name().to_owned(),
        port: facts.plan.port,
        vni,
        vtep_mac: mac,
        uplink: facts
            .plan
            .is_direct
            .then(|| facts.settings.uplink.to_string()),
        mtu: running.plan().mtu.get(),
        device: "tap".to_owned(),
        workers: facts.settings.workers,
        offload: offload(running, report).to_string(),
        store: facts.store.clone(),
        trouble: running.trouble(),
        lease_confirmed_seconds: running.confirmed.lock().elapsed().as_secs(),
        egress: facts.settings.egress.as_ref().map(|_| Flows {
            open: flows.open,
            opened: flows.opened,
            refused: flows.refused,
            unreachable: flows.unreachable,
            reset: flows.reset,
            expired: flows.expired,
            evicted: flows.evicted,
        }),
        dns: dns(running),
        published: Ports {
            ports: pods
                .iter()
                .map(|(_, pod)| pod.details.published.len())
                .sum(),
            flows: flows.inbound,
        },
        pods: pods.len(),
        peers: report.peers.len(),
        packets: Packets {
            received: counters.received,
            originated: counters.originated,
            delivered: counters.delivered,
            sent: counters.sent,
            flooded: counters.flooded,
            consumed: counters.consumed,
            dropped: counters.drops().map(|(_, count)| count).sum(),
        },
        control: facts.control.clone(),
        confinement: Some(confine::in_force()),
    }
}

fn dns(running: &Running) -> Dns {
    let dns = &running.naming.dns;
    let counters = dns.counters();
    let resolvers = dns.resolvers();
    Dns {
        resolvers: resolvers.iter().map(ToString::to_string).collect(),
        queries: counters.queries,
        answered: counters.answered,
        forwarded: counters.forwarded,
        failed: counters.failed,
    }
}

/// What is in use of what was asked for.
fn offload(running: &Running, report: &Report) -> Offload {
    Offload {
        gso: report.gso,
        gro: report.gro,
        ..running.facts.settings.offload
    }
}

fn traffic(traffic: port::Traffic) -> Traffic {
    Traffic {
        packets: traffic.packets,
        bytes: traffic.bytes,
    }
}

fn pods(running: &Running, report: &Report) -> Vec<Pod> {
    let pods = running.pods.lock();
    let row = |(name, pod): (&muslin_stack::control::ipam::PodName, &super::pods::Pod)| {
        let port = report.ports.iter().find(|(id, ..)| *id == pod.port);
        let (received, sent) = port
            .map(|(_, port, _)| (port.received, port.sent))
            .unwrap_or_default();
        Pod {
            pod: name.clone(),
            address: pod.address,
            mac: DisplayMac(pod.mac).to_string(),
            port: pod.port.0,
            persistent: pod.details.persistent,
            offload: port.is_some_and(|(.., offload)| *offload),
            published: pod.details.published.clone(),
            attached_seconds: pod.details.since.elapsed().as_secs(),
            received: traffic(received),
            sent: traffic(sent),
        }
    };
    pods.iter().map(row).collect()
}

fn peers(running: &Running, census: &Census) -> Vec<Peer> {
    let report = &census.report;
    let names = running.naming.names.read();
    let (backend, plan) = (&running.facts.config.backend, &running.plan());
    let prefix = running.interface().prefix;
    let control = running.control.lock();
    let rows = control.peers().iter().map(|(key, known)| {
        let state = report.peers.iter().find(|state| state.peer.id == known.id);
        let (received, sent) = state
            .map(|state| (state.received, state.sent))
            .unwrap_or_default();
        let path = state.map(|state| state.path);
        let signs = census.known(&names, key.ipv4).signs.unwrap_or_default();
        let obstacle = match (known.peer(*key, backend), path) {
            (Err(unusable), _) => Some(unusable.to_string()),
            (Ok(_), Some(Path::Unreachable)) => Some(format!("not on the link {prefix}")),
            (Ok(_), _) => None,
        };
        Peer {
            node: names.record(key.ipv4).map(|record| record.node.to_string()),
            subnet: key.ipv4,
            public_ip: known.record.public_ip,
            backend: known.record.backend().to_owned(),
            vtep_mac: known.record.vtep_mac().map(|mac| mac.to_string()),
            usable: obstacle.is_none(),
            state: obstacle.unwrap_or_else(|| Standing::of(signs).to_string()),
            heard_seconds: signs.heard.map(|age| age.as_secs()),
            path: path.map(|path| path_name(path, plan).to_owned()),
            mtu: path.and_then(|path| path_mtu(path, plan)),
            received: traffic(received),
            sent: traffic(sent),
        }
    });
    rows.collect()
}

/// How packets get to a peer, and whether that is because its host is on the link.
fn path_name(path: Path, plan: &TunnelPlan) -> &'static str {
    match path {
        Path::Uplink => "on-link",
        Path::Tunnel => plan.tunnel.name(),
        Path::Unreachable => Tunnel::None.name(),
    }
}

fn path_mtu(path: Path, plan: &TunnelPlan) -> Option<u16> {
    match path {
        Path::Tunnel => Some(plan.mtu.get()),
        Path::Uplink => Some(plan.outer.get()),
        Path::Unreachable => None,
    }
}

fn routes(running: &Running, report: &Report) -> Vec<Route> {
    let address = |id: PeerId| {
        let peer = report.peers.iter().find(|state| state.peer.id == id);
        peer.map(|state| state.peer.address.ip().to_string())
    };
    let row = |(prefix, next): &(ipnet::IpNet, NextHop)| Route {
        prefix: prefix.to_string(),
        via: match next {
            NextHop::Local => format!("pods of {}", running.facts.settings.name),
            NextHop::Peer(id) => address(*id).unwrap_or_else(|| format!("peer {id}")),
        },
    };
    report.routes.iter().map(row).collect()
}

fn neighbours(report: &Report) -> Vec<Neighbour> {
    let row = |(address, place, state): &worker::Neighbour, uplink: bool| Neighbour {
        address: *address,
        mac: place.map(|place| DisplayMac(place.mac).to_string()),
        port: place.filter(|_| !uplink).map(|place| place.port.0),
        uplink,
        state: match state {
            State::Permanent => "permanent",
            State::Incomplete { .. } => "incomplete",
            State::Reachable { since } if report.now >= *since + REACHABLE => "stale",
            State::Reachable { .. } => "reachable",
            State::Probing { .. } => "probing",
        }
        .to_owned(),
    };
    let pods = report.neighbours.iter().map(|it| row(it, false));
    let hosts = report.next_hops.iter().map(|it| row(it, true));
    let mut rows: Vec<_> = pods.chain(hosts).collect();
    rows.sort_unstable_by_key(|row| row.address);
    rows
}

fn flows(running: &Running, report: &Report) -> Vec<Flow> {
    let pods = running.pods.lock();
    let names: HashMap<_, _> = pods.iter().map(|(name, pod)| (pod.address, name)).collect();
    let seconds = |since: muslin_stack::Instant| (report.now - since).secs();
    let row = |flow: &egress::FlowInfo| Flow {
        protocol: flow.key.protocol.to_string(),
        pod: names.get(flow.key.pod.ip()).map(|name| (*name).clone()),
        direction: flow.direction.to_string(),
        local: flow.key.pod,
        remote: flow.remote,
        state: flow.state.to_string(),
        age_seconds: seconds(flow.since),
        idle_seconds: seconds(flow.active),
        sent_bytes: flow.sent,
        received_bytes: flow.received,
    };
    let mut rows: Vec<_> = report.flows.iter().map(row).collect();
    // The largest consumers are looked for by pod, and within a pod the latest.
    rows.sort_unstable_by(|a, b| {
        let order = |row: &Flow| (*row.local.ip(), row.idle_seconds, row.local, row.remote);
        order(a)
            .cmp(&order(b))
            .then_with(|| a.protocol.cmp(&b.protocol))
    });
    rows
}

fn drops(report: &Report) -> Vec<Drop> {
    let rows = report.counters.drops().map(|(reason, packets)| Drop {
        reason: reason.name().to_owned(),
        packets,
        description: reason.describe().to_owned(),
    });
    rows.collect()
}
