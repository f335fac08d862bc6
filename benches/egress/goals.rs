//! What is compared, and what it must be.

use crate::common::figures::Figure;
use crate::common::samples::Comparison;
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
    all.extend(beside(Route::Slirp4netns, Some((3.0, 3.0))));
    // That is only aimed at, and marked nevertheless where it is missed.
    all.extend(beside(Route::Plain, Some((0.5, 0.5))));
    all.extend(beside(Route::Pasta, None));
    all
}

fn beside(theirs: Route, goal: Option<(f64, f64)>) -> impl Iterator<Item = Comparison<Route>> {
    let streams = STREAMS.into_iter().map(move |figure| (figure, goal));
    let others = OTHERS.into_iter().map(|figure| (figure, None));
    streams.chain(others).map(move |(figure, goal)| Comparison {
        figure,
        ours: Route::Muslin,
        theirs: Some(theirs),
        goal,
    })
}
