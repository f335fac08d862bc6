//! What is compared, and what it must be.

use muslin_bench::figures::Figure;
use muslin_bench::samples::Comparison;

use crate::stage::{Case, Route, Underlay};

/// What a value must be, and what it is to become.
type Goal = Option<(f64, f64)>;

/// All comparisons that are of interest.
pub(crate) fn all() -> Vec<Comparison<Case>> {
    let mut all = Vec::new();
    for underlay in Underlay::ALL {
        let (ours, theirs) = (Route::MuslinVxlan, Route::KernelVxlan);
        all.extend(vxlan(underlay).map(of(ours.on(underlay), theirs.on(underlay))));
    }
    for underlay in Underlay::ALL {
        let (ours, theirs) = (Route::MuslinHostGw, Route::KernelHostGw);
        all.extend(host_gw(underlay).map(of(ours.on(underlay), theirs.on(underlay))));
    }
    for underlay in Underlay::ALL {
        let (ours, theirs) = (Route::MuslinUdp, Route::MuslinVxlan);
        let goal = (Figure::TcpX1, Some((0.95, 1.05)));
        all.push(of(ours.on(underlay), theirs.on(underlay))(goal));
    }
    let (ours, theirs) = (Route::MuslinUdp, Route::FlannelUdp);
    let goal = (Figure::TcpX1, Some((30.0, 50.0)));
    all.push(of(ours.on(Underlay::Veth), theirs.on(Underlay::Veth))(goal));
    let (ours, theirs) = (Route::MuslinNode, Route::KernelBridge);
    all.extend(SAME_NODE.map(of(ours.alone(), theirs.alone())));
    let (ours, theirs) = (Route::MuslinHost, Route::KernelHost);
    all.extend(FROM_HOST.map(of(ours.on(Underlay::Veth), theirs.on(Underlay::Veth))));
    let (ours, theirs) = (Route::MuslinVxlanWatched, Route::MuslinVxlan);
    all.extend(WATCHED.map(of(ours.on(Underlay::Veth), theirs.on(Underlay::Veth))));
    all.push(Comparison {
        figure: Figure::Memory,
        ours: Route::Memory.alone(),
        theirs: None,
        goal: Some((16.0, 12.0)),
    });
    all
}

/// Makes a comparison of two paths.
fn of(ours: Case, theirs: Case) -> impl Fn((Figure, Goal)) -> Comparison<Case> {
    move |(figure, goal)| Comparison {
        figure,
        ours,
        theirs: Some(theirs),
        goal,
    }
}

/// VXLAN by muslin and by the kernel.
fn vxlan(underlay: Underlay) -> [(Figure, Goal); 8] {
    let (tcp_x1, tcp_x4, udp_64) = match underlay {
        Underlay::Veth => (Some((0.85, 1.0)), Some((0.45, 0.55)), Some((2.8, 4.0))),
        Underlay::Card => (Some((0.8, 1.0)), None, None),
        Underlay::DumbWire => (Some((0.8, 1.0)), Some((0.5, 0.55)), Some((2.5, 4.0))),
        Underlay::Lossy => (None, None, None),
    };
    let usual = |goal| (!underlay.is_special()).then_some(goal);
    [
        (Figure::TcpX1, tcp_x1),
        (Figure::TcpX4, tcp_x4),
        (Figure::Udp64, udp_64),
        (Figure::Udp1400, None),
        (Figure::AskTcpP50, usual((1.1, 0.8))),
        (Figure::AskTcpP99, usual((1.3, 1.0))),
        (Figure::AskUdpP50, None),
        (Figure::CpuPerGigabyte, usual((1.35, 1.1))),
    ]
}

/// Routes without a tunnel, by muslin and by the kernel.
fn host_gw(underlay: Underlay) -> [(Figure, Goal); 5] {
    let on_wire = |goal| (underlay == Underlay::DumbWire).then_some(goal);
    [
        (Figure::TcpX1, on_wire((1.0, 1.2))),
        (Figure::TcpX4, on_wire((0.55, 0.7))),
        (Figure::Udp64, on_wire((1.0, 1.5))),
        (Figure::AskTcpP50, None),
        (Figure::CpuPerGigabyte, None),
    ]
}

/// Pods of one node, by muslin and by the kernel's bridge.
const SAME_NODE: [(Figure, Goal); 5] = [
    (Figure::TcpX1, Some((1.0, 1.1))),
    (Figure::TcpX4, Some((0.6, 0.8))),
    (Figure::Udp64, Some((1.2, 2.0))),
    (Figure::AskTcpP50, None),
    (Figure::CpuPerGigabyte, None),
];

/// A host and another host's pod, by muslin and by the kernel.
const FROM_HOST: [(Figure, Goal); 5] = [
    (Figure::TcpX1, Some((0.5, 1.0))),
    (Figure::TcpX4, None),
    (Figure::Udp64, None),
    (Figure::AskTcpP50, None),
    (Figure::CpuPerGigabyte, None),
];

/// With metrics and pages that are read, and without.
const WATCHED: [(Figure, Goal); 4] = [
    (Figure::TcpX1, Some((0.97, 1.0))),
    (Figure::TcpX4, Some((0.97, 1.0))),
    (Figure::Udp64, Some((0.97, 1.0))),
    (Figure::AskTcpP50, Some((1.03, 1.0))),
];
