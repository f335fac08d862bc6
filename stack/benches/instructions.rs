//! How many instructions 1,000 packets cost, each way: `cargo bench -p muslin-stack --bench
//! instructions`, which needs valgrind and `gungraun-runner` (see `benches/README.md`).
//!
//! Other than times these do not depend on what else the machine does.
#![expect(missing_docs, reason = "the macros make public items without")]

use std::hint::black_box;
use std::net::Ipv4Addr;

use gungraun::{library_benchmark, library_benchmark_group, main};
use muslin_bed::scenes::{Random, Scene, Way, subnet, vxlan_tunnel};
use muslin_bed::scenes_v6::SceneV6;
use muslin_stack::datapath::route::RouteTable;
use muslin_stack::datapath::tunnel::Tunnel;

const PEERS: u32 = 1_000;

fn vxlan(way: Way) -> Scene {
    Scene::new(vxlan_tunnel(), PEERS, way)
}

fn udp(way: Way) -> Scene {
    Scene::new(Tunnel::Udp, PEERS, way)
}

// What making the packets costs, which is in all other figures but lookups.
#[library_benchmark]
#[bench::alone(vxlan(Way::ToPeer))]
fn prepare(mut scene: Scene) -> Scene {
    for _ in 0..1_000 {
        black_box(scene.prepare());
    }
    scene
}

#[library_benchmark]
#[bench::to_peer_vxlan(vxlan(Way::ToPeer))]
#[bench::from_peer_vxlan(vxlan(Way::FromPeer))]
#[bench::to_peer_udp(udp(Way::ToPeer))]
#[bench::from_peer_udp(udp(Way::FromPeer))]
#[bench::to_pod(vxlan(Way::Switched))]
#[bench::to_all(vxlan(Way::Flooded))]
fn forward(mut scene: Scene) -> Scene {
    for _ in 0..1_000 {
        black_box(scene.run());
    }
    scene
}

#[library_benchmark]
#[bench::to_peer(SceneV6::new(PEERS, Way::ToPeer))]
#[bench::from_peer(SceneV6::new(PEERS, Way::FromPeer))]
fn forward_v6(mut scene: SceneV6) -> SceneV6 {
    for _ in 0..1_000 {
        black_box(scene.run());
    }
    scene
}

fn routes(count: u32) -> RouteTable<u32> {
    let mut table = RouteTable::default();
    for index in 0..count {
        table.insert(subnet(index).into(), index);
    }
    table
}

#[library_benchmark]
#[bench::among_10(10, routes(10))]
#[bench::among_1000(1_000, routes(1_000))]
#[bench::among_100000(100_000, routes(100_000))]
fn look_up(count: u32, table: RouteTable<u32>) -> RouteTable<u32> {
    let mut random = Random::default();
    for _ in 0..1_000 {
        let address = Ipv4Addr::from_bits(0x0a00_0000 + (random.below(count) << 7));
        black_box(table.lookup(address.into()));
    }
    table
}

library_benchmark_group!(
    name = packets,
    benchmarks = [prepare, forward, forward_v6, look_up]
);

main!(library_benchmark_groups = packets);
