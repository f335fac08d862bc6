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
use measure::{Generator, Load};
use muslin_bench::benchmark::Benchmark;
use muslin_bench::iperf3;
use muslin_bench::path::Path as _;
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
    /// Packet threads of each node [default: as many as nodes choose]
    #[arg(long, value_name = "N")]
    workers: Option<u8>,
    /// Streams by iperf3 in place of the benchmark's own loads
    #[arg(long)]
    iperf3: bool,
}

impl Options {
    fn cases(&self) -> Vec<Case> {
        let wanted = |case: &Case| {
            let fits = case.is_path() || !self.iperf3;
            let route = match self.only.as_slice() {
                [] => !case.route.is_special(),
                named => named.contains(&case.route),
            };
            let underlay = |underlay: Underlay| match self.underlay.as_slice() {
                [] => !underlay.is_special(),
                named => named.contains(&underlay),
            };
            fits && route && case.underlay.is_none_or(underlay)
        };
        Case::all().into_iter().filter(wanted).collect()
    }

    fn loads(&self) -> Vec<Load> {
        let wanted = |load: &Load| {
            let fits = load.is_of_streams() || !self.iperf3;
            fits && (self.load.is_empty() || self.load.contains(load))
        };
        Load::ALL.into_iter().filter(wanted).collect()
    }
}

fn main() -> ExitCode {
    muslin_bench::supervise::main(run)
}

fn run(options: &Options) -> ExitCode {
    let (name, title, generator) = match options.iperf3 {
        true if !iperf3::is_installed() => {
            eprintln!("skipped: Debian's package iperf3 is not installed");
            return ExitCode::SUCCESS;
        }
        true => ("overlay-iperf3", "Pod to pod, by iperf3", Generator::Iperf3),
        false => ("overlay", "Pod to pod", Generator::Own),
    };
    if let Some(count) = options.workers {
        muslin_bench::pods::set_workers(count);
    }
    let benchmark = Benchmark {
        name,
        title,
        temporary: env!("CARGO_TARGET_TMPDIR"),
        paths: options.cases(),
        comparisons: goals::all(),
        has_history: !options.iperf3 && options.workers.is_none(),
    };
    let loads = options.loads();
    benchmark.run(&options.pace, |case, duration, samples| {
        measure::case(case, &loads, generator, duration, samples)
    })
}
