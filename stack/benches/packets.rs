//! What a packet costs in the node, from the call to the verdict, and what a route lookup costs:
//! `cargo bench -p muslin-stack --bench packets`.
//!
//! Destinations are random, so that with 100,000 peers hardly anything a packet needs is in the
//! cache by chance.

use std::hint::black_box;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use muslin_bed::rounds::{self, Case, Figure, Turns};
use muslin_bed::scenes::{Batches, Random, Scene, Way, subnet, vxlan_tunnel};
use muslin_bed::scenes_v6::SceneV6;
use muslin_encap::tunnel::Format;
use muslin_stack::datapath::capture::{Batch, Captures, Hook, Wanted};
use muslin_stack::datapath::route::RouteTable;
use muslin_stack::datapath::tunnel::Tunnel;

const TURNS: Turns = Turns {
    rounds: 15,
    batches: 100,
    calls: 1_000,
};

/// The packets alone, without a node.
fn preparing(peers: u32) -> Case<'static> {
    let mut scene = Scene::new(vxlan_tunnel(), peers, Way::ToPeer);
    let call = move || {
        black_box(scene.prepare());
    };
    (format!("a packet alone, {peers} peers"), Box::new(call))
}

fn forwarding(name: &str, tunnel: Tunnel, peers: u32, way: Way) -> Case<'static> {
    let mut scene = Scene::new(tunnel, peers, way);
    let call = move || {
        black_box(scene.run());
    };
    (format!("{name}, {peers} peers"), Box::new(call))
}

fn forwarding_v6(name: &str, peers: u32, way: Way) -> Case<'static> {
    let mut scene = SceneV6::new(peers, way);
    let call = move || {
        black_box(scene.run());
    };
    (format!("{name}, {peers} peers"), Box::new(call))
}

fn receiving(name: &str, tunnel: Tunnel, peers: u32) -> Case<'static> {
    let mut batches = Batches::new(tunnel, peers);
    let call = move || batches.run();
    (format!("{name}, {peers} peers"), Box::new(call))
}

/// What is captured of the packets of a case: nothing, as nobody captures; those that a filter takes, and so
/// many bytes of each.
type Captured = Option<(&'static str, usize)>;

/// Packets through a node that can be captured of. What was captured is taken after as many packets as a
/// worker reads at once, and not written to a file.
fn captured(name: &str, way: Way, wanted: Captured) -> Case<'static> {
    const ID: u64 = 1;
    const TURN: u32 = 64;
    let mut scene = Scene::observed(vxlan_tunnel(), 1, way, Captures::default());
    let room = || Batch::with_capacity(4096, 1 << 20);
    if let Some((filter, snap_len)) = wanted {
        let wanted = Wanted {
            hooks: Hook::ALL.to_vec(),
            dropped: false,
            port: None,
            peer: None,
            filter: filter.parse().expect("it is a filter"),
            snap_len,
            format: Some(Format::Vxlan),
        };
        scene.observer().begin(ID, wanted, room());
    }
    let (mut spare, mut done) = (room(), 0);
    let call = move || {
        black_box(scene.run());
        done += 1;
        if done == TURN {
            done = 0;
            let captures = scene.observer();
            if captures.is_readable(ID)
                && let Some(mut batch) = captures.take(ID, std::mem::take(&mut spare))
            {
                batch.clear();
                spare = batch;
            }
        }
    };
    (name.to_owned(), Box::new(call))
}

/// Lookups of random addresses among routes to the subnets of this many peers, whose lengths are
/// `lengths` by turns.
fn lookups(count: u32, lengths: u8) -> Case<'static> {
    let mut table = RouteTable::default();
    for index in 0..count {
        let len = 25 + (index % u32::from(lengths)) as u8;
        let network = Ipv4Net::new_assert(subnet(index).network(), len);
        table.insert(network.into(), index);
    }
    let mut random = Random::default();
    let call = move || {
        let index = random.below(count);
        let address = Ipv4Addr::from_bits(0x0a00_0000 + (index << 7));
        assert_eq!(table.lookup(address.into()), Some(&index));
    };
    let name = format!("lookup, {count} routes of {lengths} lengths");
    (name, Box::new(call))
}

fn main() {
    let vxlan = vxlan_tunnel();
    let mut cases = vec![preparing(1), preparing(100_000)];
    for peers in [1, 1_000, 100_000] {
        cases.push(forwarding("pod to peer, VXLAN", vxlan, peers, Way::ToPeer));
        cases.push(forwarding(
            "peer to pod, VXLAN",
            vxlan,
            peers,
            Way::FromPeer,
        ));
        cases.push(forwarding_v6(
            "pod to peer, VXLAN, IPv6",
            peers,
            Way::ToPeer,
        ));
        cases.push(forwarding_v6(
            "peer to pod, VXLAN, IPv6",
            peers,
            Way::FromPeer,
        ));
        cases.push(receiving("a batch to a pod, VXLAN", vxlan, peers));
    }
    for (name, way) in [
        ("pod to peer, UDP", Way::ToPeer),
        ("peer to pod, UDP", Way::FromPeer),
    ] {
        cases.push(forwarding(name, Tunnel::Udp, 1, way));
    }
    cases.push(forwarding("pod to pod", vxlan, 1, Way::Switched));
    cases.push(forwarding("pod to all", vxlan, 1, Way::Flooded));
    let whole = 1 << 17;
    for (name, way) in [("to peer", Way::ToPeer), ("from peer", Way::FromPeer)] {
        cases.push(forwarding(
            &format!("captures, {name}: none can be"),
            vxlan,
            1,
            way,
        ));
        for (what, wanted) in [
            ("nobody captures", None),
            ("a filter takes none", Some(("tcp port 1", whole))),
            ("a filter takes all", Some(("udp", whole))),
            ("all, 96 bytes", Some(("", 96))),
        ] {
            cases.push(captured(&format!("captures, {name}: {what}"), way, wanted));
        }
    }
    for (count, lengths) in [(10, 1), (1_000, 1), (100_000, 1), (100_000, 8)] {
        cases.push(lookups(count, lengths));
    }
    // An argument selects: `-- "pod to"`.
    let wanted = std::env::args().skip(1).find(|it| !it.starts_with('-'));
    cases.retain(|(name, _)| wanted.as_ref().is_none_or(|wanted| name.contains(wanted)));
    println!("{:<44} {:>8} {:>8}", "ns", "median", "quartile");
    let figures = rounds::time(&mut cases, TURNS);
    for ((name, _), Figure { median, quartile }) in cases.iter().zip(figures) {
        println!("{name:<44} {median:>8.1} {quartile:>8.1}");
    }
}
