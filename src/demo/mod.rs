//! `muslin demo`: two nodes and four pods on this machine, to see that it works and what it does.
//!
//! Everything is real: the nodes are processes that speak over UDP sockets on two loopback
//! addresses and share an embedded store; the pods are namespaces whose kernels send the packets.
//! All of it lives below one temporary directory and ends with this process.

pub mod agent;
mod show;
mod stage;
mod steps;

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{block_on, complain, output};
use crate::error::{Context, Error, Result};
use stage::Children;
use steps::Scene;

/// What `muslin demo` can be told.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Megabytes of each TCP transfer
    #[arg(long, value_name = "MB", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    megabytes: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Shows it.
///
/// # Errors
/// If a step fails, or it is interrupted.
pub fn run(arguments: &Arguments) -> Result<()> {
    let directory = tempfile::Builder::new().prefix("muslin-demo-").tempdir();
    let directory = directory.context("cannot make a temporary directory")?;
    let children = Children::default();
    let progress = Progress::new();
    let interrupted = AtomicBool::new(false);
    let scenes = std::thread::scope(|scope| {
        let (done, finished) = tokio::sync::oneshot::channel();
        let (children, progress, directory) = (&children, &progress, directory.path());
        let play = scope.spawn(move || {
            let scenes = steps::play(directory, children, progress, arguments.megabytes);
            // Nobody listens any more after an interrupt.
            let _ = done.send(());
            scenes
        });
        interrupted.store(until_interrupted(finished)?, Ordering::Relaxed);
        if interrupted.load(Ordering::Relaxed) {
            // The step that waits for one of them fails, and all others with it.
            children.end(Signal::SIGTERM);
        }
        play.join()
            .map_err(|_| Error::failed("the demo failed by a defect of its own"))?
    });
    progress.clear();
    if interrupted.load(Ordering::Relaxed) {
        complain(&"interrupted; nothing is left behind");
        return Err(Error::Command(130));
    }
    let scenes = scenes?;
    if arguments.json {
        output::print_json(&show::json(&scenes))?;
    } else {
        output::print(&show::text(&scenes))?;
    }
    match scenes.iter().map(Scene::failures).sum::<usize>() {
        0 => Ok(()),
        1 => Err(Error::failed("one step of the demo failed")),
        many => Err(Error::failed(format!("{many} steps of the demo failed"))),
    }
}

/// Whether an interrupt came before the end.
fn until_interrupted(finished: tokio::sync::oneshot::Receiver<()>) -> Result<bool> {
    block_on(async {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        let mut interrupt = listen(SignalKind::interrupt())?;
        let mut terminate = listen(SignalKind::terminate())?;
        let mut hangup = listen(SignalKind::hangup())?;
        Ok(tokio::select! {
            _ = finished => false,
            _ = interrupt.recv() => true,
            _ = terminate.recv() => true,
            _ = hangup.recv() => true,
        })
    })
}

/// One line that changes, on a terminal; nothing in a pipe.
struct Progress {
    on_terminal: bool,
}

impl Progress {
    fn new() -> Self {
        Self {
            on_terminal: std::io::stderr().is_terminal(),
        }
    }

    fn say(&self, what: &str) {
        if self.on_terminal {
            // Erases the line (ECMA-48 EL); a terminal that is gone is no reason to stop.
            let _ = write!(std::io::stderr(), "\r\x1b[K{what} ...");
        }
    }

    fn clear(&self) {
        if self.on_terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
