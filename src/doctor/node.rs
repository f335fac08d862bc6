//! Checks of a node that runs: its lease, its losses, and its tunnels to the peers.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use muslin_encap::tunnel::Format;
use muslin_stack::api::control::{Drop, Peer, Pod, Table};
use smoltcp::wire::IpVersion;

use super::finding::{Finding, Verdict};
use super::subject::NodeUnderTest;
use crate::agent::{Agent, Ping};
use crate::control::Client;
use crate::error::Result;
use crate::terminal::quantity::duration;
use crate::underlay::path_mtu;

/// Bytes of an IPv4 and an ICMP header.
const PING_HEADERS: u16 = 28;
/// Bytes of a ping whose fragments the pod's kernel hands over at once: they have one length, so they
/// leave in trains, and if one of them is garbled there is no answer.
const IN_TRAINS: usize = 20_000;
/// Losses that say something about the set-up; others are what pods do.
const TELLING: [&str; 11] = [
    "unknown-peer",
    "tunnel-port",
    "next-hop-conflict",
    "next-hop-unreachable",
    "unknown-vni",
    "source-not-in-lease",
    "destination-mac-foreign",
    "underlay-failed",
    "underlay-queue-full",
    "port-queue-full",
    "no-vtep-mac",
];
/// The state of a node that has said that it stops.
const STOPPED: &str = "stopped";
/// A lease that was not confirmed for so long is in danger.
const LONG_AGO: Duration = Duration::from_secs(13 * 3600);

pub(super) async fn examine(tested: &NodeUnderTest, limit: usize, mut report: impl FnMut(Finding)) {
    report(lease(tested));
    let (peers, drops) = match tables(tested).await {
        Ok(tables) => tables,
        Err(error) => return report(Finding::wrong("node", error)),
    };
    report(losses(&drops));
    if peers.is_empty() {
        return report(Finding::fine("peers", "no other node has a lease"));
    }
    let (usable, others): (Vec<_>, Vec<_>) = peers
        .into_iter()
        .partition(|peer| peer.usable && peer.state != STOPPED);
    others.iter().map(absent).for_each(&mut report);
    if usable.is_empty() {
        return;
    }
    let name = format!("doctor-{}", std::process::id());
    let mut agent = match Agent::in_new_pod(&tested.socket, &name) {
        Ok(agent) => agent,
        Err(error) => {
            return report(Finding::new(
                "peers",
                Verdict::Unknown,
                format!("cannot make a pod to test from: {error}"),
            ));
        }
    };
    for peer in usable.iter().take(limit) {
        report(tunnel(&mut agent, tested, peer));
    }
    if usable.len() > limit {
        let rest = usable.len() - limit;
        let finding = Finding::new(
            "peers",
            Verdict::Unknown,
            format!("{rest} more were not tested"),
        );
        report(finding.advise("use a larger --peers to test all of them"));
    }
}

/// What there is to say of a peer to which nothing has to be sent.
fn absent(peer: &Peer) -> Finding {
    let (check, title) = (format!("peer {}", peer.subnet), title(peer));
    if !peer.usable {
        let detail = format!("{title} cannot be reached: {}", peer.state);
        return Finding::new(&check, Verdict::Warning, detail);
    }
    let detail = format!("{title} has stopped in order; its lease is kept for its return");
    Finding::fine(&check, detail).advise(give_back(peer))
}

/// `node n2 at 10.0.0.2`, or the address alone.
fn title(peer: &Peer) -> String {
    match &peer.node {
        Some(node) => format!("node {node} at {}", peer.public_ip),
        None => peer.public_ip.to_string(),
    }
}

fn give_back(peer: &Peer) -> String {
    format!(
        "if it does not come back, 'muslin leases --drop {}' gives its lease back",
        peer.subnet
    )
}

fn lease(tested: &NodeUnderTest) -> Finding {
    let status = &tested.status;
    let confirmed = status.lease_confirmed_seconds;
    let detail = format!(
        "node {} has {}, confirmed {} ago",
        status.node,
        status.subnet,
        duration(confirmed)
    );
    if confirmed < LONG_AGO.as_secs() {
        Finding::fine("lease", detail)
    } else {
        Finding::wrong("lease", detail)
            .advise("the store does not renew it: other nodes will drop this node within a day")
    }
}

/// Its pods' addresses, which the kernel may have: those of pods in the node's own namespace.
pub(super) async fn addresses_of_pods(tested: &NodeUnderTest) -> Vec<Ipv4Addr> {
    let pods = async {
        let client = Client::connect(&tested.socket).await?;
        client.report::<Pod>(Table::Pods).await
    };
    // That the node does not answer is found elsewhere.
    let pods = pods.await.unwrap_or_default();
    pods.iter().filter_map(|pod| pod.address.ipv4()).collect()
}

async fn tables(tested: &NodeUnderTest) -> Result<(Vec<Peer>, Vec<Drop>)> {
    let client = Client::connect(&tested.socket).await?;
    Ok((
        client.report(Table::Peers).await?,
        client.report(Table::Drops).await?,
    ))
}

fn losses(drops: &[Drop]) -> Finding {
    let telling = drops
        .iter()
        .filter(|row| row.packets > 0 && TELLING.contains(&row.reason.as_str()));
    let list: Vec<_> = telling
        .map(|row| format!("{} {}", row.packets, row.reason))
        .collect();
    if list.is_empty() {
        return Finding::fine("losses", "none that suggest a misconfiguration");
    }
    Finding::new("losses", Verdict::Warning, list.join(", "))
        .advise("'muslin drops' explains each of them")
}

/// Small and large packets to the peer's own addresses and back.
fn tunnel(agent: &mut Agent, tested: &NodeUnderTest, peer: &Peer) -> Finding {
    let check = format!("peer {}", peer.subnet);
    // A muslin node answers at both; a flannel node's kernel at its base address always.
    let Some(subnet) = peer.subnet.ipv4() else {
        return Finding::new(&check, Verdict::Unknown, "it has no IPv4 addresses to test");
    };
    let base = u32::from(subnet.network());
    let addresses = [Ipv4Addr::from(base), Ipv4Addr::from(base + 1)];
    let small = ping(agent, &addresses, 56, true);
    let Some((address, rtt)) = small else {
        return silent(&check, tested, peer);
    };
    let mtu = tested.status.mtu.min(peer.mtu.unwrap_or(u16::MAX));
    if let Some(smaller) = smaller_path(tested, peer) {
        let detail = format!(
            "{} answers in {rtt:.2} ms, but the path MTU is {smaller} bytes",
            peer.public_ip
        );
        return Finding::new(&check, Verdict::Warning, detail).advise(format!(
            "large packets are fragmented, which is slow: start the nodes with --mtu {smaller}"
        ));
    }
    if ping(agent, &[address], (mtu - PING_HEADERS).into(), true).is_none() {
        let detail = format!(
            "{} answers small packets, but not {mtu} bytes",
            peer.public_ip
        );
        return Finding::wrong(&check, detail)
            .advise("a link on the path has a smaller MTU: start the nodes with that as --mtu");
    }
    let has_trains =
        tested.status.offload.split(',').any(|name| name == "gso") && tested.status.port != 0;
    if has_trains && ping(agent, &[address], IN_TRAINS, false).is_none() {
        let detail = format!(
            "{} answers {mtu} bytes, but not {IN_TRAINS}, whose fragments leave as segmented UDP \
             sends",
            peer.public_ip
        );
        return Finding::new(&check, Verdict::Warning, detail).advise(
            "a kernel, network card or hypervisor may corrupt UDP segmentation, which slows TCP \
             down to almost nothing: start this node with --offload tap,gro, or that one",
        );
    }
    let detail = format!(
        "{} answers in {rtt:.2} ms, also with {mtu} bytes",
        peer.public_ip
    );
    Finding::fine(&check, detail)
}

fn silent(check: &str, tested: &NodeUnderTest, peer: &Peer) -> Finding {
    let (own, theirs) = (tested.status.public_ip, peer.public_ip);
    let title = title(peer);
    let path = peer.path.as_deref().unwrap_or("none");
    let passes = match path {
        "on-link" => {
            return Finding::wrong(check, format!("{title} does not answer on the link")).advise(
                format!(
                    "'muslin neighbours' shows whether {theirs} answers ARP; if it does, its host \
                     must accept packets for {} from this link (with muslin: a running node; with \
                     flannel: IP forwarding)",
                    peer.subnet
                ),
            );
        }
        "ipip" => "IP protocol 4".to_owned(),
        _ => format!("UDP {}", tested.status.port),
    };
    let detail = format!("{title} does not answer through the tunnel");
    Finding::wrong(check, detail).advise(format!(
        "check that {passes} passes between {own} and {theirs} both ways (firewalls; VMware takes \
         UDP 8472), and 'muslin drops' at both ends; {}",
        give_back(peer)
    ))
}

/// The MTU of the way to a peer, if it is smaller than what the node's datagrams need.
fn smaller_path(tested: &NodeUnderTest, peer: &Peer) -> Option<u32> {
    let status = &tested.status;
    let format = match peer.path.as_deref()? {
        "vxlan" => Format::Vxlan,
        "udp" => Format::Udp,
        _ => return None,
    };
    let needed = status.mtu.saturating_add(format.overhead(IpVersion::Ipv4));
    let end = SocketAddrV4::new(peer.public_ip.ipv4()?, status.port);
    let known = path_mtu(status.public_ip.ipv4()?, end, needed).ok()?;
    (known < needed.into()).then_some(known)
}

/// The first of the addresses that answers, with its round trip in milliseconds.
fn ping(
    agent: &mut Agent,
    addresses: &[Ipv4Addr],
    size: usize,
    dont_fragment: bool,
) -> Option<(Ipv4Addr, f64)> {
    addresses.iter().find_map(|address| {
        let mut ping = Ping::new(*address);
        ping.size = size;
        ping.dont_fragment = dont_fragment;
        ping.timeout_ms = 1000;
        let seen = agent.ping(&ping).ok()?;
        let best = seen
            .replies
            .iter()
            .filter(|reply| reply.intact)
            .map(|reply| reply.rtt_us)
            .min()?;
        Some((*address, best as f64 / 1000.0))
    })
}
