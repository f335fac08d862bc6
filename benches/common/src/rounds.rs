//! Rounds: every path is measured once in each, so that what changes on the machine hits all.

use std::path::{Path as FilePath, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::benchmark::Benchmark;
use super::calibration::calibrate;
use super::history::Stamp;
use super::machine::{self, Machine};
use super::path::Path;
use super::phases::{Calibration, Phases, REPEATS};
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
    /// Where the history of runs is that this one is added to [default: benches/history, with --quick
    /// none]
    #[arg(long, value_name = "DIR|none")]
    history: Option<String>,
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

    fn history(&self) -> Option<PathBuf> {
        let directory = self.history.as_deref().unwrap_or("benches/history");
        (!self.quick && directory != "none").then(|| directory.into())
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
        let stamp = Stamp::now();
        let machine = Machine::look();
        println!("{machine}");
        let (rounds, duration) = (pace.rounds(), pace.duration());
        let mut run = Run::new();
        let mut others = Vec::new();
        for round in 0..rounds {
            others.push(machine::warn_if_busy(QUIET));
            let mut paths = self.paths.clone();
            if round % 2 == 1 {
                paths.reverse();
            }
            for path in paths {
                eprint!("round {} of {rounds}, {path}:", round + 1);
                if !run.measure(path, |samples| measure(path, duration, samples)) {
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
            phases: run.count(),
            samples: run.samples,
        };
        report.print();
        let target = FilePath::new(report.benchmark.temporary).parent().unwrap();
        report.write(target);
        if !report.samples.failures().is_empty() {
            return ExitCode::FAILURE;
        }
        let has_history = report.benchmark.has_history;
        if let Some(directory) = pace.history().filter(|_| has_history) {
            report.remember(&directory, &stamp, target);
        }
        ExitCode::SUCCESS
    }
}

/// Measurements so far, each between two calibrations.
struct Run<P> {
    phases: Phases,
    /// The last one, which is before the next measurement.
    calibration: Calibration,
    samples: Samples<P>,
    /// Those around each measurement that counts.
    around: Vec<[Calibration; 2]>,
    repeated: usize,
}

/// How many measurements of a path in a round fell into slow phases of the machine.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PhaseCount {
    pub(crate) measurements: usize,
    /// Made more than once.
    pub(crate) repeated: usize,
    /// Slow nevertheless, by all that is known at the end.
    pub(crate) slow: usize,
    /// Before and after each measurement that counts.
    pub(crate) calibrations: Vec<[Calibration; 2]>,
}

impl<P: Path> Run<P> {
    fn new() -> Self {
        let mut run = Self {
            phases: Phases::default(),
            calibration: Calibration::default(),
            samples: Samples::default(),
            around: Vec::new(),
            repeated: 0,
        };
        // The first one also warms up.
        calibrate();
        run.calibrate();
        run
    }

    fn calibrate(&mut self) {
        self.calibration = calibrate();
        self.phases.learn(self.calibration);
    }

    /// Measures a path, and again while the machine is slow, but not without end. Returns `false`
    /// where `measure` does.
    fn measure(&mut self, path: P, mut measure: impl FnMut(&mut Samples<P>) -> bool) -> bool {
        let (mut attempts, mut around) = (Vec::new(), Vec::new());
        let counts = loop {
            let mut samples = Samples::default();
            let before = self.calibration;
            if !measure(&mut samples) {
                return false;
            }
            self.calibrate();
            around.push([before, self.calibration]);
            let has_failed = !samples.failures().is_empty();
            attempts.push(samples);
            if has_failed || !path.is_path() {
                break attempts.len() - 1;
            }
            let is_slow = self.phases.is_slow(&[before, self.calibration]);
            if !is_slow || attempts.len() > REPEATS {
                break self.phases.fastest(&around).unwrap_or_default();
            }
            eprint!(" again, since the machine was slow:");
        };
        self.repeated += usize::from(attempts.len() > 1);
        self.samples.append(attempts.swap_remove(counts));
        self.around.push(around[counts]);
        true
    }

    fn count(&self) -> PhaseCount {
        let slow = |around: &&[Calibration; 2]| self.phases.is_slow(*around);
        PhaseCount {
            measurements: self.around.len(),
            repeated: self.repeated,
            slow: self.around.iter().filter(slow).count(),
            calibrations: self.around.clone(),
        }
    }
}
