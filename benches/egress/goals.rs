//! What is compared, and what it must be.

use muslin_bench::figures::Figure;
use muslin_bench::samples::Comparison;

use crate::stage::Route;

/// Streams, which count most.
const STREAMS: [Figure; 4] = [
    Figure::TcpUpX1,
    Figure::TcpUpX4,
    Figure::TcpDownX1,
    Figure::TcpDownX4,
];
/// The rest.
const OTHERS: [Figure; 4] = [
    Figure::FlowRate,
    Figure::CpuUp,
    Figure::CpuDown,
    Figure::FlowMemory,
];

/// All comparisons that are of interest.
pub(crate) fn all() -> Vec<Comparison<Route>> {
    let mut all = Vec::new();
    let muslin = |theirs, goal| beside(Route::Muslin, theirs, goal);
    all.extend(muslin(Route::Slirp4netns, Some((3.0, 3.0))));
    // That is only aimed at, and marked nevertheless where it is missed.
    all.extend(muslin(Route::Plain, Some((0.5, 0.5))));
    all.extend(muslin(Route::Pasta, None));
    all.extend(beside(Route::Sidecar, Route::Plain, None));
    all
}

fn beside(
    ours: Route,
    theirs: Route,
    goal: Option<(f64, f64)>,
) -> impl Iterator<Item = Comparison<Route>> {
    let streams = STREAMS.into_iter().map(move |figure| (figure, goal));
    let others = OTHERS.into_iter().map(|figure| (figure, None));
    streams.chain(others).map(move |(figure, goal)| Comparison {
        figure,
        ours,
        theirs: Some(theirs),
        goal,
    })
}
