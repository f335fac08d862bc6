//! Pod to pod, muslin beside the kernel, in one run: TCP, UDP, request and response, and what they
//! cost the machine.
//!
//! `cargo bench --bench overlay`; see `benches/README.md`. Everything runs in namespaces of the
//! benchmark's own, and it is its own load generator: it starts itself anew in the pods.

#![allow(clippy::unwrap_used, reason = "a benchmark may")]

mod goals;
mod measure;
mod stage;

use std::process::ExitCode;

use clap::Parser;
use measure::Load;
use muslin_bench::benchmark::Benchmark;
use muslin_bench::rounds::Pace;
use stage::{Case, Route, Underlay};

/// Measures muslin's data path beside the kernel's.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    pace: Pace,
    /// Only this path; may be given several times
    #[arg(long, value_name = "PATH")]
    only: Vec<Route>,
    /// Only this underlay; may be given several times
    #[arg(long)]
    underlay: Vec<Underlay>,
    /// Only this load; may be given several times
    #[arg(long)]
    load: Vec<Load>,
}

impl Options {
    fn cases(&self) -> Vec<Case> {
        let wanted = |case: &Case| {
            let route = self.only.is_empty() || self.only.contains(&case.route);
            let underlay = |underlay| self.underlay.is_empty() || self.underlay.contains(&underlay);
            route && case.underlay.is_none_or(underlay)
        };
        Case::all().into_iter().filter(wanted).collect()
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
        name: "overlay",
        title: "Pod to pod",
        temporary: env!("CARGO_TARGET_TMPDIR"),
        paths: options.cases(),
        comparisons: goals::all(),
    };
    let loads = options.loads();
    benchmark.run(&options.pace, |case, duration, samples| {
        measure::case(case, &loads, duration, samples)
    })
}
