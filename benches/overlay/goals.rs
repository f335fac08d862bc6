//! What is compared, and what it must be.

use muslin_bench::figures::Figure;
use muslin_bench::samples::Comparison;

use crate::stage::{Case, Route, Underlay};

/// All comparisons that are of interest.
pub(crate) fn all() -> Vec<Comparison<Case>> {
    let mut all = Vec::new();
    for underlay in [Underlay::Veth, Underlay::DumbWire] {
        all.extend(against_kernel(underlay));
    }
    for underlay in [Underlay::Veth, Underlay::DumbWire] {
        let ours = Route::MuslinHostGw.on(underlay);
        all.extend(beside_kernel(ours, Route::KernelHostGw.on(underlay)));
    }
    for underlay in [Underlay::Veth, Underlay::DumbWire] {
        let ours = Route::MuslinUdp.on(underlay);
        let theirs = Some(Route::MuslinVxlan.on(underlay));
        all.push(Comparison {
            figure: Figure::TcpX1,
            ours,
            theirs,
            goal: Some((0.95, 1.05)),
        });
    }
    all.extend(beside_kernel(
        Route::MuslinNode.alone(),
        Route::KernelBridge.alone(),
    ));
    all.extend(beside_kernel(
        Route::MuslinHost.on(Underlay::Veth),
        Route::KernelHost.on(Underlay::Veth),
    ));
    all.push(Comparison {
        figure: Figure::Memory,
        ours: Route::Memory.alone(),
        theirs: None,
        goal: Some((40.0, 15.0)),
    });
    all
}

/// VXLAN by muslin and by the kernel.
fn against_kernel(underlay: Underlay) -> impl Iterator<Item = Comparison<Case>> {
    let is_veth = underlay == Underlay::Veth;
    let goals = [
        (Figure::TcpX1, Some((0.5, 1.0))),
        (Figure::TcpX4, is_veth.then_some((0.5, 1.0))),
        (Figure::Udp64, Some((1.0, 1.5))),
        (Figure::Udp1400, None),
        (Figure::AskTcpP50, Some((3.0, 1.5))),
        (Figure::AskUdpP50, None),
        (Figure::CpuPerGigabyte, None),
    ];
    goals.into_iter().map(move |(figure, goal)| Comparison {
        figure,
        ours: Route::MuslinVxlan.on(underlay),
        theirs: Some(Route::KernelVxlan.on(underlay)),
        goal,
    })
}

/// A path without a tunnel, by muslin and by the kernel.
fn beside_kernel(ours: Case, theirs: Case) -> impl Iterator<Item = Comparison<Case>> {
    let goals = [
        (Figure::TcpX1, Some((0.5, 1.0))),
        (Figure::TcpX4, None),
        (Figure::Udp64, None),
        (Figure::AskTcpP50, None),
        (Figure::CpuPerGigabyte, None),
    ];
    goals.into_iter().map(move |(figure, goal)| Comparison {
        figure,
        ours,
        theirs: Some(theirs),
        goal,
    })
}
