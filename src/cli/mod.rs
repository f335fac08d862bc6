//! The command line: each command's arguments, and the exit codes.

mod attach;
mod capture;
mod cni;
mod detached;
mod doctor;
mod events;
mod examples;
mod exec;
mod flannel;
mod host_interface;
mod keep;
#[cfg(any(test, not(feature = "sidecar")))]
mod left_out;
mod log;
mod manual;
mod node;
mod page;
mod ping;
mod report;
mod run;
mod secret;
#[cfg(feature = "sidecar")]
mod sidecar;
mod top;
mod trace;
mod watch;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
#[cfg(not(feature = "sidecar"))]
use left_out as sidecar;
use muslin_stack::api::control::Request;
use muslin_stack::api::trace::Version;
use nix::unistd::geteuid;
use tracing_subscriber::filter::LevelFilter;

use crate::confine::{self, Capability};
use crate::control::{Client, locate};
use crate::demo;
use crate::error::Result;
use crate::features;
use crate::process::block_on;
use crate::process::exit_code;
use crate::state;

/// A pod network that needs no root: VXLAN and UDP overlays, compatible with flannel, in one
/// ordinary process.
#[derive(Debug, Parser)]
#[command(
    name = "muslin",
    version,
    long_version = features::version(),
    max_term_width = 100,
    propagate_version = true,
    after_help = log::HELP
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a demonstration on this machine: two nodes, four pods, pings, TCP
    Demo(demo::Arguments),
    /// Run a node
    Node(Box<node::Arguments>),
    /// Run a command in namespaces of its own, attached to a node
    ///
    /// It has its own network, processes, host name and files in /etc, and every process that it has
    /// started ends with it. It also has your files, except for the state directory with the node's
    /// sockets.
    Run(run::Arguments),
    /// Run a command in the namespaces of a running pod
    ///
    /// A pod of `muslin run` has its own network, processes, host name and files in /etc; of an attached
    /// pod only the network namespace is entered.
    Exec(exec::Arguments),
    /// Show the stdout and stderr of a detached pod's command
    ///
    /// The last 4 to 8 MiB are kept until another pod of `muslin run -d` takes the name or `muslin rm`
    /// removes them.
    Logs(detached::LogsArguments),
    /// Stop detached pods: the command and every process that it has started
    Stop(detached::StopArguments),
    /// Remove the logs and records of detached pods that have ended
    Rm(detached::RmArguments),
    /// Give one container an address of the pod network, with the privileges that it has
    Sidecar(Box<sidecar::Arguments>),
    /// Attach an existing network namespace
    Attach(attach::AttachArguments),
    /// Detach a pod by its name
    Detach(attach::DetachArguments),
    /// Install the plugin by which container runtimes attach pods
    Cni(Box<cni::Arguments>),
    /// Hold the devices of attached pods while their node is restarted
    ///
    /// It has no privileges and takes nothing from the network. What pods send and receive meanwhile
    /// waits, up to a thousand packets of each.
    Keep(keep::Arguments),
    /// Make the interface by which this machine and pods reach each other
    ///
    /// Kubelet's probes, programs in the host's network and this machine's shell reach local and remote
    /// pods by it, and pods reach this machine with their own addresses. Whoever may make interfaces
    /// runs this once after each boot; the node opens the interface without privileges. What an earlier
    /// run has made otherwise is corrected.
    HostInterface(host_interface::Arguments),
    /// Summarise a node: lease, tunnel, pods, packets
    ///
    /// A superpacket of up to 64 KiB counts as one packet, as in `muslin pods` and `muslin peers`.
    Status(report::Arguments),
    /// List the attached pods
    ///
    /// Packets are counted as they pass the pod's device, as `ip -s link` in the pod counts them: a
    /// superpacket of up to 64 KiB is one.
    Pods(report::Arguments),
    /// List the other nodes, and the traffic to and from each
    ///
    /// Nodes from which nothing was received for a while are probed first. A node is alive, silent if
    /// it does not answer, or stopped if it has shut down in order and will come back.
    ///
    /// Packets are counted as the kernel's VXLAN devices count them: a superpacket of up to 64 KiB is
    /// one, before it is cut into datagrams and after they are joined again. A network card counts
    /// the datagrams, which are more.
    Peers(report::Arguments),
    /// List all leases in the store now, and the keys there that are not leases
    ///
    /// The state of their nodes is as in `muslin peers`; a lease whose renewal is long overdue is
    /// expiring.
    Leases(report::LeaseArguments),
    /// List the routes
    Routes(report::Arguments),
    /// List the neighbours: which address is behind which port
    Neighbours(report::Arguments),
    /// Count the lost packets by reason
    Drops(report::DropArguments),
    /// List the flows between pods and addresses outside the pod network
    ///
    /// Bytes are those of the payload: of streams and datagrams without headers, of echo requests with
    /// the ICMP header.
    Flows(report::FlowArguments),
    /// List the groups that pods have joined, where the node follows groups (`muslin node --multicast`)
    Groups(report::Arguments),
    /// Show the nodes of this machine in a browser: pods, tunnels, traces, tables
    ///
    /// The page is read-only and needs nothing from elsewhere. It prints its URL and runs until it is
    /// interrupted.
    Page(page::Arguments),
    /// Show pods, peers, flows and drops live, with what passes in a second
    ///
    /// Keys: q or Esc ends it, Tab and arrows go to another table or row, s sorts by another column, r
    /// turns the order around, / shows only rows with some letters, ? explains.
    Top(top::Arguments),
    /// Capture packets as the node sees them, with what became of each
    ///
    /// A superpacket of up to 64 KiB is captured as one packet, and of what was merged from several the
    /// first segment. What comes faster than it is read is lost, counted, and noted in the file.
    Capture(capture::Arguments),
    /// Tell what would become of a packet, one decision after another
    ///
    /// The nodes' own data path is asked, on this machine from node to node, and nothing is sent. FROM is a
    /// pod, `host`, or `outside`, a client of a published port; TO is a pod, a node, an address, `gateway`,
    /// `host` or `outside`. The exit code is 1 if the packet would be lost.
    Trace(trace::Arguments),
    /// Ping a pod, a node or an address of the pod network from inside a pod
    ///
    /// The gateways on the way are pinged, too, so that one sees where the time goes. The exit code is 0
    /// only if TARGET has answered.
    Ping(ping::Arguments),
    /// List what happened: leases, peers, pods, the store, limits; the last 1,000 events
    ///
    /// Events are in the node's memory, and its successor by --take-over has them, too. What happens to
    /// one subject again and again is listed a few times a minute, with a number.
    Events(events::EventArguments),
    /// Check each requirement of a node, and suggest how to meet it
    Doctor(Box<doctor::Arguments>),
    /// Give the lease back and stop the node
    Leave(NodeChoice),
    /// Print what a shell needs to complete commands and options
    Completions(manual::CompletionArguments),
    /// Write the manual, a page for each command
    Man(manual::ManArguments),
    /// Ping and transfer on request, inside the demo's pods
    #[command(hide = true)]
    Agent,
    /// Make an interface in a pod's namespaces, for attach
    #[command(hide = true)]
    AttachInside(attach::InsideArguments),
    /// Become a pod's command, for run
    #[command(hide = true)]
    Guard(run::GuardArguments),
    /// Try to make a pod, for the doctor
    #[command(hide = true)]
    ProbeNamespace,
}

/// Which node a command speaks to.
#[derive(Debug, Clone, Args)]
pub(crate) struct NodeChoice {
    /// The node's name; required if several run
    #[arg(long, value_name = "NAME", env = "MUSLIN_NODE")]
    node: Option<String>,
    /// The node's control socket, if it is not in the state directory
    #[arg(
        long,
        value_name = "PATH",
        env = "MUSLIN_SOCKET",
        conflicts_with = "node"
    )]
    socket: Option<PathBuf>,
    #[command(flatten)]
    state: StateChoice,
}

/// Of which IP version a packet is to be.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct VersionChoice {
    /// Use IPv4 [default: the version of an address that is named, or IPv4 where both ends have it]
    #[arg(short = '4', long = "ipv4", conflicts_with = "ipv6")]
    ipv4: bool,
    /// Use IPv6
    #[arg(short = '6', long = "ipv6")]
    ipv6: bool,
}

impl VersionChoice {
    fn version(self) -> Option<Version> {
        match (self.ipv4, self.ipv6) {
            (true, _) => Some(Version::Ipv4),
            (false, true) => Some(Version::Ipv6),
            (false, false) => None,
        }
    }
}

/// Where state is kept.
#[derive(Debug, Clone, Args)]
pub(crate) struct StateChoice {
    /// Where nodes keep their state and sockets [default: ~/.local/state/muslin]
    #[arg(long, value_name = "DIR", env = "MUSLIN_STATE_DIR")]
    state_dir: Option<PathBuf>,
}

impl StateChoice {
    fn dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(state::default_dir)
    }
}

impl NodeChoice {
    /// Where nodes and detached pods keep their state.
    fn state_dir(&self) -> PathBuf {
        self.state.dir()
    }

    /// Whether a node is named.
    fn is_named(&self) -> bool {
        self.node.is_some() || self.socket.is_some()
    }

    /// The chosen node's control socket.
    fn socket(&self) -> Result<PathBuf> {
        match &self.socket {
            Some(path) => Ok(path.clone()),
            None => locate(&self.state.dir(), self.node.as_deref()),
        }
    }
}

/// Commands that take flannel's flags, in flannel's ways.
const WITH_FLANNELS_FLAGS: [&str; 3] = ["node", "sidecar", "doctor"];

/// Runs the command that the process' arguments name.
#[must_use]
pub fn main() -> ExitCode {
    let cli = parse(std::env::args_os());
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(exit_code(&error)),
    }
}

/// The command line.
fn command() -> clap::Command {
    examples::add(Cli::command())
}

/// Parses a command line, or ends the process as wrong usage and `--help` do.
fn parse(words: impl IntoIterator<Item = OsString>) -> Cli {
    let mut command = command();
    let mut words: Vec<_> = words.into_iter().collect();
    for name in WITH_FLANNELS_FLAGS {
        command = command.mut_subcommand(name, flannel::with_environment);
        if words.get(1).is_some_and(|word| word == name)
            && let Some(flags) = command.find_subcommand(name)
        {
            let rest = words.split_off(2);
            words.extend(flannel::normalize(rest, flags));
        }
    }
    let parsed = Cli::from_arg_matches(&command.get_matches_from(words));
    parsed.unwrap_or_else(|error| error.exit())
}

fn dispatch(command: Command) -> Result<()> {
    log::to_stderr(match command {
        Command::Node(_) | Command::Sidecar(_) | Command::Cni(_) | Command::Keep(_) => {
            LevelFilter::INFO
        }
        _ => LevelFilter::WARN,
    })?;
    protect(&command);
    match command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Node(arguments) => node::run(&arguments),
        Command::Run(arguments) => run::run(arguments),
        Command::Exec(arguments) => exec::run(arguments),
        Command::Logs(arguments) => detached::logs(&arguments),
        Command::Stop(arguments) => detached::stop(&arguments),
        Command::Rm(arguments) => detached::rm(&arguments),
        Command::Sidecar(arguments) => sidecar::run(*arguments),
        Command::Attach(arguments) => attach::attach(arguments),
        Command::AttachInside(arguments) => attach::inside(arguments),
        Command::Detach(arguments) => attach::detach(arguments),
        Command::Cni(arguments) => cni::run(&arguments),
        Command::Keep(arguments) => keep::run(&arguments),
        Command::HostInterface(arguments) => host_interface::run(&arguments),
        Command::Status(arguments) => report::status(&arguments),
        Command::Pods(arguments) => report::pods(&arguments),
        Command::Peers(arguments) => report::peers(&arguments),
        Command::Leases(arguments) => report::leases(&arguments),
        Command::Routes(arguments) => report::routes(&arguments),
        Command::Neighbours(arguments) => report::neighbours(&arguments),
        Command::Drops(arguments) => report::drops(&arguments),
        Command::Flows(arguments) => report::flows(&arguments),
        Command::Groups(arguments) => report::groups(&arguments),
        Command::Page(arguments) => page::run(&arguments),
        Command::Top(arguments) => top::run(&arguments),
        Command::Trace(arguments) => trace::run(&arguments),
        Command::Capture(arguments) => capture::run(&arguments),
        Command::Ping(arguments) => ping::run(&arguments),
        Command::Events(arguments) => events::run(&arguments),
        Command::Doctor(arguments) => doctor::run(*arguments),
        Command::Leave(choice) => leave(&choice),
        Command::Completions(arguments) => manual::completions(&arguments),
        Command::Man(arguments) => manual::man(&arguments),
        Command::Agent => crate::agent::main(),
        Command::Guard(arguments) => run::guard(&arguments),
        Command::ProbeNamespace => crate::doctor::probe_namespace(),
    }
}

/// What a client needs: root asks the nodes of others, and ends their pods.
const CLIENT: [Capability; 3] = [
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_KILL,
];

/// What the plugin and its installation need besides: the one enters pods' namespaces and opens devices
/// there, the other gives directories to the node's user.
const PLUGIN: [Capability; 3] = [
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_CHOWN,
];

/// Drops the privileges that the command does not need. Commands that start programs of the user's, and
/// nodes, do that themselves at the right moment.
fn protect(command: &Command) {
    match command {
        Command::Node(_)
        | Command::Sidecar(_)
        | Command::Run(_)
        | Command::Exec(_)
        | Command::Attach(_)
        | Command::AttachInside(_)
        | Command::Demo(_)
        | Command::Guard(_)
        | Command::ProbeNamespace => {}
        // It tries what others do, and may know a password.
        Command::Doctor(_) | Command::Ping(_) => {
            confine::try_all(&[confine::keep_to_itself, confine::leave_no_core]);
        }
        Command::Cni(_) => {
            confine::try_all(&[confine::keep_to_itself, confine::leave_no_core, || {
                confine::keep_only(&[&CLIENT[..], &PLUGIN].concat())
            }])
        }
        Command::HostInterface(_) => {
            confine::try_all(&[confine::keep_to_itself, confine::leave_no_core, || {
                confine::keep_only(&[&CLIENT[..], &[Capability::CAP_NET_ADMIN]].concat())
            }])
        }
        // In a pod its user is 0, who has them by nature: nobody is to be lent any by the program.
        Command::Agent if geteuid().is_root() => {}
        Command::Agent => confine::try_all(&[|| confine::keep_only(&[])]),
        _ => confine::try_all(&[confine::keep_to_itself, confine::leave_no_core, || {
            confine::keep_only(&CLIENT)
        }]),
    }
}

fn leave(choice: &NodeChoice) -> Result<()> {
    let socket = choice.socket()?;
    block_on(async {
        let client = Client::connect(&socket).await?;
        client.command(&Request::Leave).await
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
