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

/// What a value must be, and what it is to become.
type Goal = Option<(f64, f64)>;

/// All comparisons that are of interest.
pub(crate) fn all() -> Vec<Comparison<Route>> {
    let mut all = Vec::new();
    let muslin = |theirs, goal| beside(Route::Muslin, theirs, goal);
    all.extend(muslin(Route::Slirp4netns, |_| Some((3.0, 3.0))));
    all.extend(muslin(Route::Plain, beside_plain));
    all.extend(muslin(Route::Pasta, |_| None));
    all.extend(beside(Route::Sidecar, Route::Plain, |_| None));
    all
}

fn beside_plain(stream: Figure) -> Goal {
    Some(match stream {
        Figure::TcpUpX4 | Figure::TcpDownX4 => (0.45, 0.6),
        _ => (0.6, 0.8),
    })
}

/// All figures of two paths, with a goal for each of the streams.
fn beside(
    ours: Route,
    theirs: Route,
    goal: fn(Figure) -> Goal,
) -> impl Iterator<Item = Comparison<Route>> {
    let streams = STREAMS
        .into_iter()
        .map(move |figure| (figure, goal(figure)));
    let others = OTHERS.into_iter().map(|figure| (figure, None));
    streams.chain(others).map(move |(figure, goal)| Comparison {
        figure,
        ours,
        theirs: Some(theirs),
        goal,
    })
}
