//! A node's reports: its tables as rows.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;
use muslin_encap::mac::DisplayMac;
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::Vni;
use muslin_stack::Duration;
use muslin_stack::addresses::Addresses;
use muslin_stack::api::control::{
    Dns, Drop, Encryption, Flow, Flows, Group, HostInterface, Neighbour, Packets, Peer, Pod, Ports,
    Route, Status, Table, Traffic,
};
use muslin_stack::control::ipam::PodName;
use muslin_stack::control::lease::Standing;
use muslin_stack::control::tunnel::TunnelPlan;
use muslin_stack::datapath::egress;
use muslin_stack::datapath::neighbour::{Place, REACHABLE, State};
use muslin_stack::datapath::node::NextHop;
use muslin_stack::datapath::peer::{Path, PeerId};
use muslin_stack::datapath::port::{self, PortId};
use muslin_stack::datapath::tunnel::Tunnel;
use serde::Serialize;
use serde_json::Value;

use super::liveness::Census;
use super::running::RunningNode;
use super::settings::{Offload, WireGuardSettings};
use super::underlay;
use crate::confine;
use crate::error::{Context, Error, Result};
use crate::worker::{FlowTable, GroupTable, NeighbourTables, Neighbours, PortState, Totals};

/// The rows of a table.
pub(super) async fn rows(running: &RunningNode, table: Table) -> Result<Vec<Value>> {
    let workers = &running.workers;
    match table {
        Table::Status => {
            let totals = workers.totals().await.map_err(Error::failed)?;
            values([status(running, &totals)])
        }
        Table::Pods => {
            let ports = workers.ports().await.map_err(Error::failed)?;
            values(pods(running, &ports))
        }
        Table::Peers => values(peers(running, &Census::take(running).await?)),
        Table::Leases => values(running.leases().await?),
        Table::Routes => {
            let routes = workers.routes().await.map_err(Error::failed)?;
            values(self::routes(running, &routes))
        }
        Table::Neighbours => {
            let tables = workers.neighbours().await.map_err(Error::failed)?;
            values(neighbours(&tables))
        }
        Table::Drops => {
            let totals = workers.totals().await.map_err(Error::failed)?;
            values(drops(&totals))
        }
        Table::Flows => {
            let flows = workers.flows().await.map_err(Error::failed)?;
            values(self::flows(running, &flows))
        }
        Table::Groups => {
            let groups = workers.groups().await.map_err(Error::failed)?;
            values(self::groups(running, &groups))
        }
        _ => Err(Error::usage("this node has no such table")),
    }
}

pub(super) fn values(rows: impl IntoIterator<Item = impl Serialize>) -> Result<Vec<Value>> {
    let values = rows.into_iter().map(serde_json::to_value);
    values
        .collect::<std::result::Result<_, _>>()
        .context("cannot write the answer")
}

fn status(running: &RunningNode, totals: &Totals) -> Status {
    let facts = &running.facts;
    let (counters, flows) = (&totals.counters, &totals.egress);
    let (interface, pods) = (running.interface(), running.pods.lock());
    let (vni, mac) = match facts.plan.tunnel {
        Tunnel::Vxlan { vni, mac, mac_v6 } => {
            let mac_v6 = mac_v6.filter(|_| facts.subnets.ipv4().is_none());
            (Some(Vni::get(vni)), Some(mac_v6.unwrap_or(mac).to_string()))
        }
        _ => (None, None),
    };
    let ports = facts.plan.ports;
    let port_v6 = (ports.ipv6 != ports.ipv4).then_some(ports.ipv6);
    let (port, port_v6) = match (facts.subnets.ipv4(), facts.subnets.ipv6()) {
        (Some(_), Some(_)) => (ports.ipv4, port_v6),
        (Some(_), None) => (ports.ipv4, None),
        (None, _) => (ports.ipv6, None),
    };
    let public_key = facts.wireguard.as_ref().map(WireGuardSettings::public_key);
    // Neither has what the lease does not.
    let ipv6 = running.public_ipv6();
    let of_lease = |all: Addresses| {
        let ipv4 = all.ipv4().filter(|_| facts.subnets.ipv4().is_some());
        Addresses::new(ipv4, ipv6).unwrap_or(all)
    };
    Status {
        node: facts.settings.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: running.since.elapsed().as_secs(),
        network: facts.config.networks(),
        subnet: facts.subnets,
        gateway: facts.gateways(),
        public_ip: of_lease(interface.public()),
        tunnel_ip: of_lease(interface.addresses()),
        interface: interface.name,
        backend: facts.config.backend.name().to_owned(),
        port,
        port_v6,
        vni,
        vtep_mac: mac,
        public_key: public_key.map(|key| key.to_string()),
        uplink: facts
            .plan
            .is_direct
            .then(|| facts.settings.uplink.to_string()),
        mtu: running.plan().mtu.get(),
        mtu_v6: underlay::link(&running.plan(), facts.subnets).mtu_v6,
        device: "tap".to_owned(),
        workers: facts.settings.workers,
        offload: offload(running, totals).to_string(),
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
        multicast: facts.settings.multicast,
        host_interface: host_interface(running, totals),
        dns: dns(running),
        published: Ports {
            ports: pods
                .iter()
                .map(|(_, pod)| pod.details.published.len())
                .sum(),
            flows: flows.inbound,
        },
        pods: pods.len(),
        peers: totals
            .peers
            .saturating_sub(running.control.lock().dual_peers()),
        packets: Packets {
            received: counters.received,
            originated: counters.originated,
            delivered: counters.delivered,
            sent: counters.sent,
            flooded: counters.flooded,
            consumed: counters.consumed,
            superseded: counters.superseded,
            dropped: counters.drops().map(|(_, count)| count).sum(),
        },
        control: facts.control.clone(),
        confinement: Some(confine::in_force()),
    }
}

/// The host interface with what went through it.
fn host_interface(running: &RunningNode, totals: &Totals) -> Option<HostInterface> {
    let (name, host) = (running.facts.settings.host_interface.clone()?, totals.host?);
    Some(HostInterface {
        name,
        addresses: running.host.addresses(),
        received: traffic(host.received),
        sent: traffic(host.sent),
    })
}

fn dns(running: &RunningNode) -> Dns {
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

/// The requested offloads that are in use.
fn offload(running: &RunningNode, totals: &Totals) -> Offload {
    Offload {
        gso: totals.gso,
        gro: totals.gro,
        ..running.facts.settings.offload
    }
}

pub(super) fn traffic(traffic: port::Traffic) -> Traffic {
    Traffic {
        packets: traffic.packets,
        bytes: traffic.bytes,
    }
}

/// The attached pods.
pub(super) fn pods(running: &RunningNode, ports: &HashMap<PortId, PortState>) -> Vec<Pod> {
    let pods = running.pods.lock();
    let row = |(name, pod): (&PodName, &super::pods::Pod)| {
        let port = ports.get(&pod.port).copied().unwrap_or_default();
        Pod {
            pod: name.clone(),
            address: pod.address,
            mac: DisplayMac(pod.mac).to_string(),
            port: pod.port.0,
            persistent: pod.details.persistent,
            offload: port.offload,
            published: pod.details.published.clone(),
            attached_seconds: pod.details.since.elapsed().as_secs(),
            received: traffic(port.received),
            sent: traffic(port.sent),
        }
    };
    pods.iter().map(row).collect()
}

/// The other nodes.
pub(super) fn peers(running: &RunningNode, census: &Census) -> Vec<Peer> {
    let states = census.states.peers.iter();
    let states: HashMap<_, _> = states.map(|state| (state.peer.id, state)).collect();
    let (links, now) = (&census.states.links, census.states.now);
    let names = running.naming.names.read();
    let (facts, plan) = (&running.facts, &running.plan());
    let prefix = running.interface().prefixes();
    let control = running.control.lock();
    let here = control.here();
    let rows = control.peers().iter().map(|(key, known)| {
        let state = states.get(&known.id);
        let state_v6 = known.id_v6.and_then(|id| states.get(&id));
        let (mut received, mut sent) = <(port::Traffic, port::Traffic)>::default();
        for half in state.into_iter().chain(state_v6) {
            received.add(half.received);
            sent.add(half.sent);
        }
        let state = state.or(state_v6);
        let path = state.map(|state| state.path);
        let signs = census.known(&names, key.first()).signs;
        let signs = signs.unwrap_or_default();
        let ids = [Some(known.id), known.id_v6];
        let link = links.iter().find(|link| ids.contains(&Some(link.peer)));
        let half = match known.peer_v6(*key, &facts.config, &here) {
            Some(ipv6) if key.ipv4().is_none() && facts.subnets.ipv6().is_some() => ipv6,
            _ => known.peer(*key, &facts.config, &here),
        };
        let obstacle = match (half, path) {
            (Err(unusable), _) => Some(unusable.to_string()),
            (Ok(_), Some(Path::Unreachable)) => Some(format!("not on the link {prefix}")),
            (Ok(_), _) => None,
        };
        Peer {
            node: names
                .record(key.first())
                .map(|record| record.node.to_string()),
            subnet: key.nets(),
            public_ip: known.record.addresses(),
            backend: known.record.backend().to_owned(),
            vtep_mac: known.record.first_vtep_mac().map(|mac| mac.to_string()),
            public_key: known.record.public_keys().next().map(|key| key.to_string()),
            usable: obstacle.is_none(),
            state: obstacle.unwrap_or_else(|| Standing::of(signs).to_string()),
            heard_seconds: signs.heard.map(|age| age.as_secs()),
            path: path.map(|path| path_name(path, plan).to_owned()),
            mtu: path.and_then(|path| path_mtu(path, plan)),
            partial_checksums: state.is_some_and(|state| {
                (state.path, state.peer.checksums) == (Path::Tunnel, Checksums::Partial)
            }),
            encryption: link.map(|link| Encryption {
                endpoint: link.endpoint,
                is_roamed: link.roamed,
                handshake_seconds: link.handshake.map(|at| (now - at).secs()),
                waiting: link.staged as u64,
            }),
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

fn routes(running: &RunningNode, routes: &[(IpNet, NextHop)]) -> Vec<Route> {
    let control = running.control.lock();
    let peers = control.peers().iter();
    let peers: HashMap<PeerId, IpAddr> = peers
        .flat_map(|(_, known)| {
            let ipv6 = known.id_v6.zip(known.record.public_ipv6.map(IpAddr::V6));
            [Some((known.id, known.record.node_address())), ipv6]
        })
        .flatten()
        .collect();
    let address = |id: PeerId| peers.get(&id).map(ToString::to_string);
    let row = |(prefix, next): &(IpNet, NextHop)| Route {
        prefix: *prefix,
        via: match next {
            NextHop::Local => format!("pods of {}", running.facts.settings.name),
            NextHop::Peer(id) => address(*id).unwrap_or_else(|| format!("peer {id}")),
        },
    };
    routes.iter().map(row).collect()
}

fn neighbours(tables: &NeighbourTables) -> Vec<Neighbour> {
    let row = |address: &IpAddr, place: &Option<Place>, state: &State, uplink: bool| Neighbour {
        address: *address,
        mac: place.map(|place| DisplayMac(place.mac).to_string()),
        port: place.filter(|_| !uplink).map(|place| place.port.0),
        uplink,
        state: match state {
            State::Permanent => "permanent",
            State::Incomplete { .. } => "incomplete",
            State::Reachable { since } if tables.now >= *since + REACHABLE => "stale",
            State::Reachable { .. } => "reachable",
            State::Probing { .. } => "probing",
        }
        .to_owned(),
    };
    let rows = |table: &Neighbours, uplink| {
        let rows = table.iter();
        let rows = rows.map(|(address, (place, state))| row(address, place, state, uplink));
        rows.collect::<Vec<_>>()
    };
    let mut rows = [rows(&tables.pods, false), rows(&tables.hosts, true)].concat();
    rows.sort_unstable_by_key(|row| row.address);
    rows
}

fn groups(running: &RunningNode, table: &GroupTable) -> Vec<Group> {
    let pods = running.pods.lock();
    let names: HashMap<_, _> = pods.iter().map(|(name, pod)| (pod.port, name)).collect();
    let row = |((group, port), left): (&(IpAddr, PortId), &Duration)| Group {
        group: *group,
        pod: names.get(port).map(|name| (*name).clone()),
        port: port.0,
        expires_seconds: left.secs(),
    };
    table.iter().map(row).collect()
}

fn flows(running: &RunningNode, table: &FlowTable) -> Vec<Flow> {
    let pods = running.pods.lock();
    let names = pods.iter();
    let names = names.flat_map(|(name, pod)| pod.address.iter().map(move |it: IpAddr| (it, name)));
    let names: HashMap<_, _> = names.collect();
    let seconds = |since: muslin_stack::Instant| (table.now - since).secs();
    let row = |flow: &egress::FlowInfo| Flow {
        protocol: flow.key.protocol.to_string(),
        pod: names.get(&flow.key.pod.ip()).map(|name| (*name).clone()),
        direction: flow.direction.to_string(),
        local: flow.key.pod,
        remote: flow.remote,
        state: flow.state.to_string(),
        age_seconds: seconds(flow.since),
        idle_seconds: seconds(flow.active),
        sent_bytes: flow.sent,
        received_bytes: flow.received,
    };
    let mut rows: Vec<_> = table.flows.iter().map(row).collect();
    // The largest consumers are looked for by pod, and within a pod the latest.
    rows.sort_unstable_by(|a, b| {
        let order = |row: &Flow| (row.local.ip(), row.idle_seconds, row.local, row.remote);
        order(a)
            .cmp(&order(b))
            .then_with(|| a.protocol.cmp(&b.protocol))
    });
    rows
}

fn drops(totals: &Totals) -> Vec<Drop> {
    let rows = totals.counters.drops().map(|(reason, packets)| Drop {
        reason: reason.name().to_owned(),
        packets,
        description: reason.describe().to_owned(),
    });
    rows.collect()
}
