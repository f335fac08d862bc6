//! What one pod's flood costs the others, muslin beside the kernel, in one run.
//!
//! `cargo bench --bench fairness`; see `benches/README.md`. Everything runs in namespaces of the
//! benchmark's own, and each flood ends by itself.

#![allow(clippy::unwrap_used, reason = "a benchmark may")]

mod goals;
mod measure;
mod stage;

use std::process::ExitCode;

use clap::Parser;
use muslin_bench::benchmark::Benchmark;
use muslin_bench::floods::Flood;
use muslin_bench::rounds::Pace;
use stage::{Scene, System};

/// Measures what a pod's flood costs others.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    pace: Pace,
    /// Only this system; may be given several times
    #[arg(long, value_name = "SYSTEM")]
    only: Vec<System>,
    /// Only this flood; may be given several times
    #[arg(long)]
    flood: Vec<Flood>,
}

impl Options {
    fn scenes(&self) -> Vec<Scene> {
        let wanted = |scene: &Scene| {
            let flood = self.flood.is_empty() || self.flood.contains(&scene.flood);
            flood && (self.only.is_empty() || self.only.contains(&scene.system))
        };
        Scene::all().filter(wanted).collect()
    }
}

fn main() -> ExitCode {
    muslin_bench::supervise::main(run)
}

fn run(options: &Options) -> ExitCode {
    let benchmark = Benchmark {
        name: "fairness",
        title: "While a pod floods",
        temporary: env!("CARGO_TARGET_TMPDIR"),
        paths: options.scenes(),
        comparisons: goals::all(),
        has_history: false,
    };
    benchmark.run(&options.pace, measure::scene)
}
