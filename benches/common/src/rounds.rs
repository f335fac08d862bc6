//! Rounds: every path is measured once in each, so that what changes on the machine hits all.

use std::path::Path as FilePath;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::benchmark::Benchmark;
use super::machine::{self, Machine};
use super::path::Path;
use super::report::Report;
use super::samples::Samples;

/// A share of the processors that others may take without a warning.
const QUIET: f64 = 0.05;

/// How much is measured.
#[derive(Debug, Args)]
pub struct Pace {
    /// How often everything is measured [default: 5, with --quick 2]
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds per measurement [default: 2, with --quick 0.5]
    #[arg(long)]
    seconds: Option<f64>,
    /// Few and short rounds, to see whether it works
    #[arg(long)]
    quick: bool,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

impl Pace {
    fn rounds(&self) -> usize {
        let default = if self.quick { 2 } else { 5 };
        self.rounds.unwrap_or(default).max(1)
    }

    fn duration(&self) -> Duration {
        let default = if self.quick { 0.5 } else { 2.0 };
        Duration::from_secs_f64(self.seconds.unwrap_or(default).clamp(0.05, 60.0))
    }
}

impl<P: Path> Benchmark<P> {
    /// Measures all paths in every round, every second one in opposite order, and reports. What
    /// measures a path returns `false` where this machine has no labs.
    pub fn run(
        self,
        pace: &Pace,
        mut measure: impl FnMut(P, Duration, &mut Samples<P>) -> bool,
    ) -> ExitCode {
        let machine = Machine::look();
        println!("{machine}");
        let (rounds, duration) = (pace.rounds(), pace.duration());
        let mut samples = Samples::default();
        let mut others = Vec::new();
        for round in 0..rounds {
            others.push(machine::warn_if_busy(QUIET));
            let mut paths = self.paths.clone();
            if round % 2 == 1 {
                paths.reverse();
            }
            for path in paths {
                eprint!("round {} of {rounds}, {path}:", round + 1);
                if !measure(path, duration, &mut samples) {
                    return ExitCode::SUCCESS;
                }
                eprintln!();
            }
        }
        let report = Report {
            benchmark: self,
            machine,
            rounds,
            seconds: duration.as_secs_f64(),
            others,
            samples,
        };
        report.print();
        let target = FilePath::new(report.benchmark.temporary).parent().unwrap();
        report.write(target);
        if report.samples.failures().is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}
