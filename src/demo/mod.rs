//! `muslin demo`: two nodes and four pods on this machine, to see that it works and what it does.
//!
//! Everything is real: the nodes are processes that speak over UDP sockets on addresses of a loopback
//! interface and share an embedded store; the pods are namespaces whose kernels send the packets.
//! That interface is in a network namespace of the demo's own, which can have the second address of
//! IPv6 that no machine has, and where nobody else has the tunnels' ports. All of it lives below one
//! temporary directory and ends with this process.

mod progress;
mod show;
mod stage;
mod steps;

use std::sync::Arc;

use clap::Args;
use nix::sys::signal::Signal;
use progress::Progress;
use stage::Children;
use steps::Scene;

use crate::error::{Context, Error, Result};
use crate::features::Feature;
use crate::netns;
use crate::process::block_on;
use crate::signals::Listener;
use crate::terminal::{complain, output};

/// The arguments of `muslin demo`.
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
/// If this build has no embedded store, a step fails, or it is interrupted.
pub fn run(arguments: &Arguments) -> Result<()> {
    // Where its nodes meet.
    Feature::Sqlite.require()?;
    netns::enter_own_network()?;
    let has_ipv6 = block_on(set_up_network())?;
    let ended = block_on(play(arguments.megabytes, has_ipv6));
    Progress::new().clear();
    let scenes = match ended? {
        Ended::Played(scenes) => scenes,
        Ended::Interrupted(signal) => {
            complain(&"interrupted; everything was cleaned up");
            return Err(Error::Command(128 + signal as u8));
        }
    };
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

/// Sets the loopback interface up, and says whether it has IPv6.
async fn set_up_network() -> Result<bool> {
    let reason = netns::ipv6::prepare("lo").err();
    if let Some(reason) = &reason {
        complain(&format!("the demo shows IPv4 alone: {reason}"));
    }
    let has_ipv6 = reason.is_none();
    let addresses = match has_ipv6 {
        true => steps::addresses_v6(),
        false => Vec::new(),
    };
    netns::configure_loopback(&addresses).await?;
    Ok(has_ipv6)
}

/// How the demo ended.
enum Ended {
    Played(Vec<Scene>),
    Interrupted(Signal),
}

/// Plays all scenes in a thread of their own, until they end or a signal comes. No process and no
/// directory is left then.
async fn play(megabytes: u64, has_ipv6: bool) -> Result<Ended> {
    // Before there is anything that an interrupt could leave behind.
    let mut interrupt = Listener::new(Signal::SIGINT)?;
    let mut terminate = Listener::new(Signal::SIGTERM)?;
    let mut hangup = Listener::new(Signal::SIGHUP)?;
    let directory = tempfile::Builder::new().prefix("muslin-demo-").tempdir();
    let directory = directory.context("cannot make a temporary directory")?;
    let children = Arc::new(Children::default());
    let (done, mut finished) = tokio::sync::oneshot::channel();
    let (path, theirs) = (directory.path().to_owned(), children.clone());
    let thread = std::thread::Builder::new().name("play".to_owned());
    thread
        .spawn(move || {
            let progress = Progress::new();
            done.send(steps::play(&path, &theirs, &progress, megabytes, has_ipv6))
        })
        .context("cannot start a thread")?;
    let signal = tokio::select! {
        played = &mut finished => {
            let played = played.map_err(|_| Error::failed("the demo failed because of a bug in it"))?;
            return played.map(Ended::Played);
        }
        () = interrupt.heard() => Signal::SIGINT,
        () = terminate.heard() => Signal::SIGTERM,
        () = hangup.heard() => Signal::SIGHUP,
    };
    // The step that waits for one of them fails, and all others with it.
    children.end(Signal::SIGTERM);
    let _ = finished.await;
    Ok(Ended::Interrupted(signal))
}
