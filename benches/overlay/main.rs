//! Pod to pod, muslin beside the kernel, in one run: TCP, UDP, request and response, and what they
//! cost the machine.
//!
//! `cargo bench --bench overlay`; see `benches/README.md`. Everything runs in namespaces of the
//! benchmark's own, and it is its own load generator: it starts itself anew in the pods.

#![allow(clippy::unwrap_used, reason = "a benchmark may")]

mod batch;
mod chart;
mod figures;
#[path = "../../tests/lab/mod.rs"]
mod lab;
mod load;
mod machine;
mod measure;
mod report;
mod stage;
mod wire;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use figures::Samples;
use machine::Machine;
use measure::Load;
use stage::{Case, Route, Underlay};

/// The word that says that this process is a load, in a pod.
const INSIDE: &str = "inside";
/// Tells the benchmark its supervisor's process.
const SUPERVISOR: &str = "OVERLAY_BENCH_SUPERVISOR";
/// A share of the processors that others may take without a warning.
const QUIET: f64 = 0.05;

/// Measures muslin's data path beside the kernel's.
#[derive(Debug, Parser)]
struct Options {
    /// How often everything is measured [default: 5, with --quick 2]
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds per measurement [default: 2, with --quick 0.5]
    #[arg(long)]
    seconds: Option<f64>,
    /// Few and short rounds, to see whether it works
    #[arg(long)]
    quick: bool,
    /// Only this path; may be given several times
    #[arg(long, value_name = "PATH")]
    only: Vec<Route>,
    /// Only this underlay; may be given several times
    #[arg(long)]
    underlay: Vec<Underlay>,
    /// Only this load; may be given several times
    #[arg(long)]
    load: Vec<Load>,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn rounds(&self) -> usize {
        let default = if self.quick { 2 } else { 5 };
        self.rounds.unwrap_or(default).max(1)
    }

    fn duration(&self) -> Duration {
        let default = if self.quick { 0.5 } else { 2.0 };
        Duration::from_secs_f64(self.seconds.unwrap_or(default).clamp(0.05, 60.0))
    }

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
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(INSIDE) {
        return load::inside(&words.collect::<Vec<_>>());
    }
    if std::env::args().all(|argument| argument != "--bench") {
        // `cargo test --all-targets` only wants to know whether it starts.
        return ExitCode::SUCCESS;
    }
    let options = Options::parse();
    match std::env::var(SUPERVISOR) {
        Ok(parent) => {
            set_pdeathsig(Signal::SIGKILL).unwrap();
            assert_eq!(getppid().to_string(), parent, "its supervisor is gone");
            run(&options)
        }
        Err(_) => supervise(),
    }
}

/// Runs the benchmark in a process of its own and removes its files however it ends.
fn supervise() -> ExitCode {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let code = runtime.block_on(watch(directory.path()));
    // What the benchmark started dies with it, but not before it, and may write until then.
    for _ in 0..50 {
        if std::fs::remove_dir_all(directory.path()).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    ExitCode::from(code)
}

async fn watch(directory: &Path) -> u8 {
    let mut interrupt = signal(SignalKind::interrupt()).unwrap();
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    let mut hangup = signal(SignalKind::hangup()).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(std::env::args_os().skip(1))
        .env(SUPERVISOR, std::process::id().to_string())
        .env("TMPDIR", directory)
        .spawn()
        .unwrap();
    let ended = tokio::select! {
        status = child.wait() => status.ok().and_then(|status| status.code()),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
        _ = hangup.recv() => None,
    };
    // It may have ended by itself.
    let _ = child.kill().await;
    ended
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(130)
}

fn run(options: &Options) -> ExitCode {
    let machine = Machine::look();
    println!("{machine}");
    let (rounds, duration) = (options.rounds(), options.duration());
    let mut samples = Samples::default();
    let mut others = Vec::new();
    for round in 0..rounds {
        others.push(machine::warn_if_busy(QUIET));
        let mut cases = options.cases();
        if round % 2 == 1 {
            cases.reverse();
        }
        for case in cases {
            eprint!("round {} of {rounds}, {case}:", round + 1);
            if !measure::case(case, &options.loads(), duration, &mut samples) {
                return ExitCode::SUCCESS;
            }
            eprintln!();
        }
    }
    let report = report::Report {
        machine,
        rounds,
        seconds: duration.as_secs_f64(),
        others,
        samples,
    };
    report.print();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    report.write(&target.join("overlay"));
    if report.samples.failures().is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
