//! What is compared, and what it must be.

use clap::ValueEnum as _;
use muslin_bench::figures::Figure;
use muslin_bench::floods::Flood;
use muslin_bench::samples::Comparison;

use crate::stage::{Scene, System};

/// Round trips in microseconds: 99 of 100 are faster, whatever another pod does.
const ROUND_TRIP: (f64, f64) = (3000.0, 1000.0);
/// Percent of requests that may be lost.
const LOST: (f64, f64) = (0.0, 0.0);
/// Of the rate without a flood.
const RATE: (f64, f64) = (0.33, 0.5);

/// All comparisons that are of interest.
pub(crate) fn all() -> Vec<Comparison<Scene>> {
    Flood::value_variants()
        .iter()
        .flat_map(|flood| of(*flood))
        .collect()
}

fn of(flood: Flood) -> impl Iterator<Item = Comparison<Scene>> {
    let ours = System::Muslin.under(flood);
    let alone = [
        (Figure::HereP99, ROUND_TRIP),
        (Figure::HereLost, LOST),
        (Figure::ThereP99, ROUND_TRIP),
        (Figure::ThereLost, LOST),
    ];
    let alone = alone.into_iter().map(move |(figure, goal)| Comparison {
        figure,
        ours,
        theirs: None,
        goal: Some(goal),
    });
    let quiet = System::Muslin.under(Flood::Quiet);
    let rate = (flood != Flood::Quiet).then_some(Comparison {
        figure: Figure::TcpHere,
        ours,
        theirs: Some(quiet),
        goal: Some(RATE),
    });
    alone.chain(rate)
}
