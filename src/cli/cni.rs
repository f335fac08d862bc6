//! `muslin cni`: the plugin for container runtimes, and where they find it.

use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tracing::{info, warn};

use super::NodeChoice;
use crate::cni;
use crate::cni::install::{BIN_DIR, CONF_DIR, Installation, Mended, Places};
use crate::control::Client;
use crate::error::{Context, Error, Result};
use crate::process::block_on;
use crate::replace::directory;

/// Time between two looks at what is installed, if nothing is heard of it.
const LOOK: Duration = Duration::from_secs(30);
/// Time between two looks at a node that has no lease yet.
const ASK_AGAIN: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Copy the plugin and write its configuration where container runtimes look
    ///
    /// Runtimes find the network from then on. Run it as root.
    Install(InstallArguments),
    /// Remove the plugin and its configuration
    ///
    /// Pods that are attached stay so, but runtimes cannot detach them until it is installed again.
    Uninstall(PlaceArguments),
    /// Make the directories of a node's socket and state, for the user that it will run as
    ///
    /// Run it as root.
    Prepare(PrepareArguments),
    /// Open the devices of attached pods again for a node that was restarted
    ///
    /// The plugin does so with each of its calls; this is for runtimes that make none for long. Run it
    /// as root.
    Reattach(NodeChoice),
}

#[derive(Debug, Args)]
struct InstallArguments {
    #[command(flatten)]
    node: NodeChoice,
    #[command(flatten)]
    place: PlaceArguments,
    /// The plugin to install [default: muslin-cni beside this program]
    #[arg(long, value_name = "PATH")]
    plugin: Option<PathBuf>,
    /// The network's name
    #[arg(long, value_name = "NAME", default_value = "muslin", value_parser = network_name)]
    network: String,
    /// Install the plugin alone, without a configuration
    #[arg(long, conflicts_with = "watch")]
    plugin_only: bool,
    /// Wait until the node has its lease before writing the configuration
    #[arg(long)]
    wait: bool,
    /// Stay, and install again what somebody removes or changes
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Args)]
struct PrepareArguments {
    /// The node's control socket, which is made by the node
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The node's state directory
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// The user that the node will run as
    #[arg(long, value_name = "UID")]
    owner: u32,
}

#[derive(Debug, Args)]
struct PlaceArguments {
    /// Where the runtime has its plugins
    #[arg(long, value_name = "DIR", default_value = BIN_DIR)]
    bin_dir: PathBuf,
    /// Where the runtime has its configurations
    #[arg(long, value_name = "DIR", default_value = CONF_DIR)]
    conf_dir: PathBuf,
    /// The configuration's file name; runtimes take the first in alphabetical order
    #[arg(long, value_name = "NAME", default_value = "10-muslin.conflist", value_parser = conf_name)]
    conf_name: String,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.command {
        Command::Install(arguments) => arguments.run(),
        Command::Uninstall(place) => place.places().uninstall(),
        Command::Prepare(arguments) => arguments.run(),
        Command::Reattach(node) => reattach(node),
    }
}

impl InstallArguments {
    fn run(&self) -> Result<()> {
        let plugin = match &self.plugin {
            Some(plugin) => plugin.clone(),
            None => Installation::own_plugin()?,
        };
        let installation = Installation {
            places: self.place.places(),
            plugin,
            network: self.network.clone(),
            socket: self.node.socket()?,
        };
        installation.install_plugin()?;
        if self.plugin_only {
            return Ok(());
        }
        if self.wait {
            block_on(wait_for_lease(&installation))?;
        }
        installation.install_configuration()?;
        let earlier = installation.places.earlier_configurations();
        if !earlier.is_empty() {
            warn!(
                "container runtimes take the first configuration in {}: {} comes before {}",
                self.place.conf_dir.display(),
                earlier.join(", "),
                self.place.conf_name
            );
        }
        match self.watch {
            true => watch(&installation),
            false => Ok(()),
        }
    }
}

impl PrepareArguments {
    fn run(&self) -> Result<()> {
        for made in [directory(&self.socket), &self.state_dir] {
            let at = made.display();
            std::fs::create_dir_all(made).context(format!("cannot make the directory {at}"))?;
            chown(made, Some(self.owner), None)
                .context(format!("cannot give {at} to the user {}", self.owner))?;
        }
        Ok(())
    }
}

impl PlaceArguments {
    fn places(&self) -> Places {
        Places {
            bin_dir: self.bin_dir.clone(),
            conf_dir: self.conf_dir.clone(),
            conf_name: self.conf_name.clone(),
        }
    }
}

/// Waits until the node of an installation can attach pods.
async fn wait_for_lease(installation: &Installation) -> Result<()> {
    let mut told = String::new();
    loop {
        let obstacle = match Client::reach(&installation.socket).await? {
            Some(client) => client.obstacle(),
            None => Some(format!(
                "no node listens at {}",
                installation.socket.display()
            )),
        };
        let Some(obstacle) = obstacle else {
            return Ok(());
        };
        if obstacle != told {
            info!("waiting: {obstacle}");
            told = obstacle;
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// Installs again whatever is removed or changed, for ever.
fn watch(installation: &Installation) -> Result<()> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
    let inotify = inotify.map_err(|error| Error::failed(format!("cannot watch files: {error}")))?;
    let changes = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO;
    let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX);
    loop {
        for watched in [&installation.places.bin_dir, &installation.places.conf_dir] {
            // It may be another directory by now; one that is watched already stays so.
            if let Err(error) = inotify.add_watch(watched, changes) {
                warn!("cannot watch {}: {error}", watched.display());
            }
        }
        mend("the plugin", installation.install_plugin());
        mend("the configuration", installation.install_configuration());
        let _ = poll(
            &mut [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)],
            timeout,
        );
        while inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
    }
}

fn mend(what: &str, mended: Result<Mended>) {
    match mended {
        Ok(Mended::Nothing) => {}
        Ok(Mended::Written) => info!("{what} was gone or changed: it is installed again"),
        Err(error) => warn!("{what} cannot be installed again: {error}"),
    }
}

fn reattach(node: &NodeChoice) -> Result<()> {
    cni::reattach(&node.socket()?)
}

/// A network's name, as CNI has it.
fn network_name(text: &str) -> std::result::Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    match begins && text.chars().all(is_plain) && text.len() <= 63 {
        true => Ok(text.to_owned()),
        false => Err(
            "use letters, digits, '_', '.' and '-', beginning with a letter or digit".to_owned(),
        ),
    }
}

fn conf_name(text: &str) -> std::result::Result<String, String> {
    match text.ends_with(".conflist") && !text.contains('/') && !text.starts_with('.') {
        true => Ok(text.to_owned()),
        false => Err("it is a file name that ends with '.conflist'".to_owned()),
    }
}
