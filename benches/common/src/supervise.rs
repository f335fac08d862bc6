//! The benchmark's processes: one that measures, and one that removes its files however it ends.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use super::load;

/// The word that says that this process is a load, in a pod.
pub const INSIDE: &str = "inside";
/// Tells the benchmark its supervisor's process.
const SUPERVISOR: &str = "MUSLIN_BENCH_SUPERVISOR";

/// What a benchmark's `main` does: `run` measures, with the options of the command line.
pub fn main<O: Parser>(run: fn(&O) -> ExitCode) -> ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(INSIDE) {
        return load::inside(&words.collect::<Vec<_>>());
    }
    if std::env::args().all(|argument| argument != "--bench") {
        // `cargo test --all-targets` only wants to know whether it starts.
        return ExitCode::SUCCESS;
    }
    let options = O::parse();
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
