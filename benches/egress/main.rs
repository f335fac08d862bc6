//! A pod's way to a server outside the overlay: muslin's egress beside slirp4netns, pasta and a
//! plain connection of the host, in one run.
//!
//! `cargo bench --bench egress`; see `benches/README.md`. Everything runs in namespaces of the
//! benchmark's own, and it is its own load generator: it starts itself anew at both ends.

#![allow(clippy::unwrap_used, reason = "a benchmark may")]

mod goals;
mod measure;
mod stage;

use std::process::ExitCode;

use clap::Parser;
use measure::Load;
use muslin_bench::benchmark::Benchmark;
use muslin_bench::rounds::Pace;
use stage::Route;

/// Measures muslin's egress beside others'.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    pace: Pace,
    /// Only this path; may be given several times
    #[arg(long, value_name = "PATH")]
    only: Vec<Route>,
    /// Only this load; may be given several times
    #[arg(long)]
    load: Vec<Load>,
}

impl Options {
    /// What is asked for, without what is not installed.
    fn routes(&self) -> Vec<Route> {
        let wanted = |route: &Route| self.only.is_empty() || self.only.contains(route);
        let is_there = |route: &Route| match route.missing() {
            None => true,
            Some(package) => {
                eprintln!("skipped, {route}: Debian's package {package} is not installed");
                false
            }
        };
        let routes = Route::ALL.into_iter().filter(wanted);
        routes.filter(is_there).collect()
    }

    fn loads(&self) -> Vec<Load> {
        let wanted = |load: &Load| self.load.is_empty() || self.load.contains(load);
        Load::ALL.into_iter().filter(wanted).collect()
    }
}

fn main() -> ExitCode {
    muslin_bench::supervise::main(run)
}

fn run(options: &Options) -> ExitCode {
    let benchmark = Benchmark {
        name: "egress",
        title: "Pod to a server outside",
        temporary: env!("CARGO_TARGET_TMPDIR"),
        paths: options.routes(),
        comparisons: goals::all(),
        has_history: true,
    };
    let loads = options.loads();
    benchmark.run(&options.pace, |route, duration, samples| {
        measure::route(route, &loads, duration, samples)
    })
}
