//! `muslin sidecar`: an address of the pod network for one pod of a cluster, by what its container
//! may do: an interface in the pod's own network namespace, else one in a namespace of the command's
//! own, else an address that lives in this process.

use std::ffi::OsString;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use muslin_stack::api::control::{Attach, Attached};
use muslin_stack::control::ipam::PodName;
use tempfile::TempDir;
use tokio::process::Command;
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::node;
use super::run::AddressArguments;
use super::secret;
use crate::attach::{self, Device, Signals};
use crate::confine::{self, Capability, Places};
use crate::control::{Client, locate};
use crate::daemon::{self as nodes, Ending};
use crate::device::{FrameSocket, Tap};
use crate::doctor;
use crate::error::{Context, Error, Result};
use crate::netns::{self, Assignment};
use crate::process::{block_on, die_with_parent};
use crate::random::random;
use crate::sidecar::overlay::Overlay;
use crate::sidecar::{Credentials, Expose, Forward, Listen, Proxies, SidecarSettings};
use crate::state;

/// The interface beside the pod's own.
const INTERFACE: &str = "muslin0";
/// Interval of attempts to connect to a node that is not up yet.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
#[group(skip)]
pub(super) struct Arguments {
    /// Join this running node as a pod instead of starting a node
    #[arg(long = "node", value_name = "NAME", conflicts_with = "agent")]
    of_node: Option<String>,
    /// The same, through the node's control socket or its attach.sock, which allows nothing else
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// How the pod gets its address [default: the first level that is possible]
    #[arg(long)]
    level: Option<Level>,
    /// The pod's name [default: pod-1, pod-2 ...]
    #[arg(long, value_name = "NAME")]
    pod: Option<PodName>,
    #[command(flatten)]
    ip: AddressArguments,
    /// Serve a SOCKS5 proxy on this address, to the pod network and whatever its pods reach; open to
    /// all users of this machine unless --proxy-auth-file requires a password
    #[arg(long, value_name = "[ADDR:]PORT", value_delimiter = ',')]
    socks5: Vec<Listen>,
    /// Serve an HTTP proxy on this address, likewise
    #[arg(long, value_name = "[ADDR:]PORT", value_delimiter = ',')]
    http_proxy: Vec<Listen>,
    /// Forward a local port to a pod's
    #[arg(long, value_name = "[ADDR:]PORT=HOST:PORT", value_delimiter = ',')]
    forward: Vec<Forward>,
    /// Forward a port of the pod's address to a local one
    #[arg(long, value_name = "PORT[/udp]=[ADDR:]PORT", value_delimiter = ',')]
    expose: Vec<Expose>,
    /// Accept clients of proxies and forwarded ports from other machines
    #[arg(long)]
    allow_public_proxy: bool,
    /// Credentials that proxy clients must send; better in a file, or in the variable
    /// MUSLIN_PROXY_AUTH [default: for proxies started only for the command a password in its variables,
    /// for others none]
    #[arg(long, value_name = "USER:PASSWORD", value_parser = credentials)]
    proxy_auth: Option<Credentials>,
    /// A file with the USER:PASSWORD that proxy clients must send [default: systemd's credential
    /// proxy-auth]
    #[arg(long, value_name = "FILE", conflicts_with = "proxy_auth")]
    proxy_auth_file: Option<PathBuf>,
    /// Always give the lease back at the end: the state is lost with the container, so that the lease
    /// would not be used again [default: when the command ends, or if no state is kept]
    #[arg(long, conflicts_with_all = ["of_node", "agent"])]
    leave: bool,
    /// The command and its arguments; the sidecar ends with it and returns its exit code
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
    #[command(
        flatten,
        next_help_heading = "Options of its node, where neither --node nor --agent is given"
    )]
    own: node::Arguments,
}

/// How the pod has its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Level {
    /// By an interface in this network namespace (needs CAP_NET_ADMIN and /dev/net/tun)
    Tap,
    /// By an interface in a namespace of the command's own (needs user namespaces)
    Run,
    /// Inside this process, which needs no privileges
    Process,
}

impl fmt::Display for Level {
    /// As the command line has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tap => "tap",
            Self::Run => "run",
            Self::Process => "process",
        })
    }
}

/// A level that is possible, and what it needs.
enum Chosen {
    Tap(Vec<Tap>),
    Run,
    Process,
}

/// Reads the credentials that clients must send.
fn credentials(text: &str) -> std::result::Result<Credentials, &'static str> {
    let fits = |part: &str| (1..=255).contains(&part.len());
    match text.split_once(':') {
        Some((user, password)) if fits(user) && fits(password) => Ok(Credentials {
            user: user.to_owned(),
            password: password.to_owned(),
        }),
        Some(_) | None => Err("write USER:PASSWORD, each of 1 to 255 bytes"),
    }
}

pub(super) fn run(mut arguments: Arguments) -> Result<()> {
    if arguments.own.die_with_parent {
        die_with_parent()?;
    }
    confine::try_all(&[confine::keep_to_itself]);
    arguments.check()?;
    arguments.find_credentials()?;
    // A command has its own rights, and may gain some by programs of its image: what to take from it
    // is for whoever starts it to say.
    let is_alone = arguments.command.is_empty();
    if is_alone {
        confine::try_all(&[confine::leave_no_core, confine::gain_nothing, || {
            let [raw, ports] = node::CAPABILITIES;
            confine::keep_only(&[raw, ports, Capability::CAP_NET_ADMIN])
        }]);
    }
    let of_node = arguments.of_node()?;
    // It is removed when the process ends.
    let scratch = match of_node {
        Some(_) => None,
        None => arguments.make_room_for_state()?,
    };
    arguments.leave |= scratch.is_some();
    let switches = arguments.own.switches();
    let lock = |places: &Places| {
        if is_alone {
            // A command finds those that its caller has left for it. Secrets are read by now.
            confine::try_all(&[confine::close_inherited]);
            confine::lock(switches, places);
        }
    };
    let result = match of_node {
        Some(socket) => {
            lock(&Places::default());
            block_on(arguments.serve_of_node(&socket))
        }
        None => {
            let settings = arguments.own.settings()?;
            if settings.take_over {
                return Err(Error::usage(
                    "--take-over is for 'muslin node': a sidecar's pod ends with its process",
                ));
            }
            let mut places = node::places(&settings);
            if let Some(scratch) = &scratch {
                places.clear(scratch.path());
            }
            lock(&places);
            block_on(arguments.serve_with_node(settings))
        }
    };
    drop(scratch);
    result
}

impl Arguments {
    fn check(&self) -> Result<()> {
        match self.level {
            Some(level @ (Level::Tap | Level::Run)) if self.has_ways() => {
                return Err(Error::usage(format!(
                    "--level {level}: programs use an interface there, so --socks5, --http-proxy, \
                     --forward and --expose require --level process"
                )));
            }
            Some(Level::Run) if self.command.is_empty() => {
                return Err(Error::usage("--level run: give a command"));
            }
            _ => {}
        }
        Ok(())
    }

    /// Finds the credentials that clients of the proxies must send.
    fn find_credentials(&mut self) -> Result<()> {
        secret::warn_of_words("proxy-auth", "MUSLIN_PROXY_AUTH");
        if self.proxy_auth.is_some() {
            return Ok(());
        }
        let read = secret::read(self.proxy_auth_file.as_deref(), "proxy-auth")?;
        self.proxy_auth = match read {
            Some(text) => Some(
                credentials(&text)
                    .map_err(|why| Error::usage(format!("the proxies' credentials: {why}")))?,
            ),
            // Only the command knows of them, so only it may use them.
            None if self.has_ways_by_itself() => Some(Credentials {
                user: "muslin".to_owned(),
                password: u128::from_ne_bytes(random()?).to_string(),
            }),
            None => None,
        };
        Ok(())
    }

    /// Whether the command gets proxies although none were requested.
    fn has_ways_by_itself(&self) -> bool {
        !self.command.is_empty() && !self.has_ways()
    }

    /// Whether an option was given that only this process can serve.
    fn has_ways(&self) -> bool {
        !(self.socks5.is_empty()
            && self.http_proxy.is_empty()
            && self.forward.is_empty()
            && self.expose.is_empty())
    }

    /// The ways into the overlay. A command that could use none finds two.
    fn ways(&self) -> SidecarSettings {
        let mut settings = SidecarSettings {
            socks5: self.socks5.clone(),
            http: self.http_proxy.clone(),
            forwards: self.forward.clone(),
            is_public: self.allow_public_proxy,
            credentials: self.proxy_auth.clone().map(Arc::new),
        };
        if self.has_ways_by_itself() {
            let any = Listen(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
            settings.socks5.push(any);
            settings.http.push(any);
        }
        settings
    }

    /// The control socket of the node whose pod this is to be, if it is not to be a node.
    fn of_node(&self) -> Result<Option<PathBuf>> {
        match (&self.agent, &self.of_node) {
            (Some(socket), _) => Ok(Some(socket.clone())),
            (None, Some(name)) => locate(&self.own.state.dir(), Some(name)).map(Some),
            (None, None) => Ok(None),
        }
    }

    /// Finds another place for the node's state where the usual one cannot be written and no other
    /// is named, as in a container with a read-only root.
    fn make_room_for_state(&mut self) -> Result<Option<TempDir>> {
        if self.own.state.state_dir.is_some() || is_writable(&state::default_dir()) {
            return Ok(None);
        }
        let places = [std::env::temp_dir(), "/dev/shm".into()];
        let mut made = places.iter().filter_map(|place| {
            tempfile::Builder::new()
                .prefix("muslin-")
                .tempdir_in(place)
                .ok()
        });
        let scratch = made.next().ok_or_else(|| {
            Error::failed(format!(
                "neither {} nor {} is writable: mount an emptyDir there, or choose another \
                 place with --state-dir",
                state::default_dir().display(),
                places.map(|place| place.display().to_string()).join(" or "),
            ))
        })?;
        info!(
            "no state is kept: {} is not writable, and no --state-dir is given",
            state::default_dir().display()
        );
        self.own.state.state_dir = Some(scratch.path().to_owned());
        Ok(Some(scratch))
    }

    /// Runs as a pod of a running node.
    async fn serve_of_node(self, socket: &Path) -> Result<()> {
        let proxies = Proxies::bind(&self.ways()).await?;
        let signals = Signals::listen()?;
        let chosen = self.choose(attach::queues(socket).await?).await?;
        self.serve(socket, proxies, chosen, signals).await
    }

    /// Runs a node of its own, with one pod. It is known before the node takes a lease that the pod
    /// can have its address.
    async fn serve_with_node(self, settings: nodes::NodeSettings) -> Result<()> {
        let proxies = Proxies::bind(&self.ways()).await?;
        let signals = Signals::listen()?;
        let chosen = self.choose(settings.workers).await?;
        let socket = match &settings.socket {
            Some(socket) => socket.clone(),
            None => state::socket_path(&settings.state_dir, &settings.name),
        };
        let (leaves, has_command) = (self.leave, !self.command.is_empty());
        let (stop, stopped) = oneshot::channel();
        let told = async { stopped.await.unwrap_or(Ending::Stop) };
        let mut node = pin!(nodes::run_until(settings, told));
        let result = tokio::select! {
            result = self.serve(&socket, proxies, chosen, signals) => result,
            result = &mut node => {
                return result.and_then(|()| Err(Error::failed("the node has ended")));
            }
        };
        let is_over = has_command && matches!(result, Ok(()) | Err(Error::Command(_)));
        let ending = if leaves || is_over {
            Ending::Leave
        } else {
            Ending::Stop
        };
        // It may have ended this moment.
        let _ = stop.send(ending);
        match (node.await, ending) {
            (Err(error), Ending::Leave) => {
                // What the command has done is done.
                warn!("{error}");
                result
            }
            (ended, _) => result.and(ended),
        }
    }

    /// Attaches the pod and serves until the command ends or this process is signalled to.
    async fn serve(
        self,
        socket: &Path,
        proxies: Proxies,
        chosen: Chosen,
        mut signals: Signals,
    ) -> Result<()> {
        let client = tokio::select! {
            client = self.reach(socket) => client?,
            _ = signals.next() => return Ok(()),
        };
        match chosen {
            Chosen::Tap(tap) => self.serve_by_tap(client, socket, &tap, signals).await,
            Chosen::Run => self.serve_by_run(socket, signals).await,
            Chosen::Process => {
                self.serve_by_process(client, socket, proxies, signals)
                    .await
            }
        }
    }

    /// Connects to the node; to its own one as soon as that has its lease.
    async fn reach(&self, socket: &Path) -> Result<Client> {
        let is_own = self.agent.is_none() && self.of_node.is_none();
        let reach = async || {
            let client = Client::connect(socket).await?;
            client.queues()?;
            Ok(client)
        };
        loop {
            match reach().await {
                Err(_) if is_own => tokio::time::sleep(LOOK_AGAIN).await,
                result => return result,
            }
        }
    }

    /// The best level that is possible. Reports it, and what prevents better ones.
    async fn choose(&self, queues: usize) -> Result<Chosen> {
        let asked = self.level;
        if asked.is_none() && self.has_ways() {
            info!("level process: the given options need the address in this process");
            return Ok(Chosen::Process);
        }
        if matches!(asked, None | Some(Level::Tap)) {
            match Tap::open(INTERFACE, true, queues) {
                Ok(tap) => {
                    info!("level tap: the pod has the interface {INTERFACE}");
                    return Ok(Chosen::Tap(tap));
                }
                Err(error) if asked.is_some() => {
                    return Err(Error::failed(format!(
                        "--level tap: {error}; the container needs the capability NET_ADMIN and the \
                         device /dev/net/tun, or leave out --level to get the best possible level"
                    )));
                }
                Err(error) => info!("not level tap: {error}"),
            }
        }
        if matches!(asked, None | Some(Level::Run)) {
            let obstacle = match self.command.is_empty() {
                true => Some("there is no command to run in a namespace of its own".to_owned()),
                false => tokio::task::spawn_blocking(doctor::obstacle_to_pods)
                    .await
                    .context("cannot try namespaces")?,
            };
            match obstacle {
                None => {
                    info!("level run: the command has a namespace of its own");
                    return Ok(Chosen::Run);
                }
                Some(obstacle) if asked.is_some() => {
                    return Err(Error::failed(format!(
                        "--level run: {obstacle}; or leave out --level to get the best possible \
                         level"
                    )));
                }
                Some(obstacle) => info!("not level run: {obstacle}"),
            }
        }
        if self.command.is_empty() && !self.has_ways() {
            return Err(Error::usage(
                "level process: nothing could use the address: give --socks5, --http-proxy, \
                 --forward, --expose, or a command",
            ));
        }
        info!("level process: the address is in this process");
        Ok(Chosen::Process)
    }

    fn request(&self) -> Result<Attach> {
        Ok(Attach::new(self.pod.clone(), self.ip.addresses()?))
    }

    async fn serve_by_tap(
        self,
        client: Client,
        socket: &Path,
        tap: &[Tap],
        signals: Signals,
    ) -> Result<()> {
        let device = Device::tap(tap);
        let attached = device.attach(&client, self.request()?).await?;
        netns::configure(INTERFACE, &only_pods(&attached)).await?;
        log_pod(&attached);
        let follow =
            async |attached: &Attached| netns::configure(INTERFACE, &only_pods(attached)).await;
        let resize =
            async |attached: &Attached| netns::set_link(INTERFACE, &only_pods(attached)).await;
        tokio::select! {
            result = self.attend(&attached, &[], signals) => result,
            never = attach::stay_attached(client, socket, &device, attached.clone(), follow, resize)
                => match never {},
        }
    }

    async fn serve_by_run(self, socket: &Path, signals: Signals) -> Result<()> {
        // Re-executes this program by its inode: the path may name another one by now.
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["run", "--die-with-parent", "--socket"])
            .arg(socket);
        if let Some(pod) = &self.pod {
            command.args(["--name", pod.as_str()]);
        }
        if let Some(addresses) = self.ip.addresses()? {
            command.args(["--ip", &addresses.to_string()]);
        }
        command.arg("--").args(&self.command).kill_on_drop(true);
        let child = command.spawn().context("cannot start the command")?;
        attach::exit_code(attach::wait(child, signals).await?)
    }

    async fn serve_by_process(
        self,
        client: Client,
        socket: &Path,
        proxies: Proxies,
        signals: Signals,
    ) -> Result<()> {
        let (ours, theirs) = FrameSocket::pair().context("cannot make a device")?;
        let device = Device::socket(&theirs);
        let attached = device.attach(&client, self.request()?).await?;
        let exposed: Vec<_> = self.expose.iter().map(|it| it.0).collect();
        let overlay = Arc::new(Overlay::start(ours, &attached, &exposed).await?);
        log_pod(&attached);
        for line in proxies.describe()? {
            info!("{line}");
        }
        let variables = variables(&proxies, self.proxy_auth.as_ref());
        proxies.serve(&overlay, &attached)?;
        let follow = async |attached: &Attached| overlay.move_to(attached);
        let stays =
            attach::stay_attached(client, socket, &device, attached.clone(), &follow, &follow);
        tokio::select! {
            result = self.attend(&attached, &variables, signals) => result,
            never = stays => match never {},
        }
    }

    /// Runs the command to its end; without one waits for a signal.
    async fn attend(
        &self,
        attached: &Attached,
        variables: &[(&str, String)],
        mut signals: Signals,
    ) -> Result<()> {
        if self.command.is_empty() {
            signals.next().await;
            return Ok(());
        }
        let child = attach::start(self.command.clone(), attached, variables)?;
        attach::exit_code(attach::wait(child, signals).await?)
    }
}

/// Whether files can be made in a directory, or in the one it would be made in.
fn is_writable(directory: &Path) -> bool {
    let existing = directory.ancestors().find(|path| path.exists());
    existing.is_some_and(|path| nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).is_ok())
}

fn log_pod(attached: &Attached) {
    info!(
        "pod {} of the node {}: {}",
        attached.pod, attached.node, attached.address
    );
}

/// The configuration of an interface beside the pod's own: only the pod network's route is added.
fn only_pods(attached: &Attached) -> Assignment {
    let mut assignment = attach::assignment(attached);
    assignment.routes.retain(|route| route.prefix_len() > 0);
    assignment
}

/// The variables that name the proxies to a command.
fn variables(proxies: &Proxies, credentials: Option<&Credentials>) -> Vec<(&'static str, String)> {
    let user = credentials.map_or_else(String::new, |it| format!("{}:{}@", it.user, it.password));
    let mut variables = Vec::new();
    if let Some(address) = proxies.socks5() {
        // Names are for the proxy, which knows the pods'.
        let url = format!("socks5h://{user}{address}");
        variables.extend(["ALL_PROXY", "all_proxy"].map(|name| (name, url.clone())));
    }
    if let Some(address) = proxies.http() {
        let url = format!("http://{user}{address}");
        let names = ["http_proxy", "https_proxy", "HTTPS_PROXY"];
        variables.extend(names.map(|name| (name, url.clone())));
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_have_two_parts() {
        let read = credentials("me:a:b").unwrap();
        assert_eq!((read.user.as_str(), read.password.as_str()), ("me", "a:b"));
        let long = format!("me:{}", "x".repeat(256));
        for bad in ["", "me", "me:", ":b", &long] {
            assert!(credentials(bad).is_err(), "{bad}");
        }
    }
}
