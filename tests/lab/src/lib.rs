//! Rootless labs: hosts, links, nodes and pods inside a user namespace of their own.
//!
//! A test process has threads and so cannot enter a user namespace itself. A lab is held by a
//! process that sits in the namespaces and ends with its standard input, that is with the test;
//! everything else is started by `nsenter` and killed with its parent. Nothing outside is touched.

#![allow(clippy::unwrap_used, reason = "a lab is for tests")]

mod books;
pub mod certificates;
pub mod cni;
pub mod containerd;
pub mod cri;
pub mod etcd;
pub mod flannel;
pub mod gate;
mod image;
pub mod inside;
pub mod keeper;
pub mod load;
pub mod processes;
mod program;
pub mod script;
pub mod skip;
pub mod traffic;
pub mod watch;

use std::cell::Cell;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use books::Books;
use muslin::agent::Agent;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
pub use program::{cni_bin, muslin_bin, netavark_bin, probe_bin};
use serde_json::Value;
use skip::skip;
use tempfile::TempDir;
use watch::{Watch, stretched, waits_for};

/// Ample time for what should take none; waiting stretches it on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);
/// How much nodes log, if nothing else is said.
/// As many packets TCP may make a queue lose before something else is wrong.
const FEW: u64 = 100;

const LOG: &str = "info,muslin::lease=debug,muslin::store=debug";
/// From util-linux, iproute2, tcpdump and perl-base.
const TOOLS: [&str; 9] = [
    "unshare", "nsenter", "setpriv", "prlimit", "ip", "bridge", "tc", "tcpdump", "perl",
];
/// The variables by which the processes of a lab are known, and clients of a node.
const LAB: &str = "MUSLIN_TEST_LAB";
const CLIENT: &str = "MUSLIN_TEST_CLIENT";
/// Prefix of the underlay's addresses.
const UNDERLAY_LEN: u8 = 24;

/// Asks again and again until there is an answer.
///
/// # Panics
/// If there is none within `patience`, or within more of it on a busy machine.
pub fn poll_until<T>(patience: Duration, what: &str, ask: impl FnMut() -> Option<T>) -> T {
    waits_for(what);
    poll_for(patience, ask).unwrap_or_else(|taken| panic!("waited {taken:?} in vain: {what}"))
}

/// The same, or how long it has waited.
fn poll_for<T>(patience: Duration, mut ask: impl FnMut() -> Option<T>) -> Result<T, Duration> {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        let taken = began.elapsed();
        if taken > patience && taken > stretched(patience) {
            return Err(taken);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process in namespaces of its own, which live as long as it does.
struct Holder {
    child: Child,
    /// The lab's directory, by which its processes are known.
    lab: PathBuf,
}

impl Holder {
    /// Starts `command` with `cat` as its last words, and waits until it is there.
    fn start(mut command: Command, lab: &Path) -> Result<Self, String> {
        let mut child = command
            .arg("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{command:?}: {error}"))?;
        let mut echo = String::new();
        let written = child.stdin.as_mut().unwrap().write_all(b"ready\n");
        let output = child.stdout.as_mut().unwrap();
        let read = BufReader::new(output).read_line(&mut echo);
        if written.is_ok() && read.is_ok() && echo == "ready\n" {
            let lab = lab.to_owned();
            return Ok(Self { child, lab });
        }
        let output = child.wait_with_output().unwrap();
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }

    /// A command in its namespaces, that ends with the thread that starts it.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.enter();
        command.args(["setpriv", "--pdeathsig", "KILL", "--"]);
        command.arg(program).env(LAB, &self.lab);
        command
    }

    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.child.id().to_string());
        command.args(["--user", "--preserve-credentials", "--net", "--mount", "--"]);
        command
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A user namespace with a bridge, the underlay, between its hosts. All that was started in it has
/// to end before it does.
pub struct Lab {
    root: Host,
    directory: TempDir,
    links: Cell<u32>,
    watch: Watch,
}

impl Lab {
    /// A lab, or `None` and one line that says why this machine has none. The test has a minute
    /// from now on, if it does not ask for more.
    ///
    /// # Panics
    /// Where it may not be skipped, in CI.
    pub fn new() -> Option<Self> {
        let lab = Self::try_new();
        lab.map_err(|why| skip(format_args!("no lab: {why}"))).ok()
    }

    /// A lab for a benchmark, which may take as long as it wants.
    ///
    /// # Panics
    /// Where it may not be skipped, in CI.
    pub fn without_limit() -> Option<Self> {
        let lab = Self::new()?;
        lab.limit(Duration::MAX);
        Some(lab)
    }

    /// Sets another time after which the test is ended, from the lab's beginning; more on a busy
    /// machine.
    pub fn limit(&self, limit: Duration) {
        self.watch.limit(limit);
    }

    fn try_new() -> Result<Self, String> {
        for tool in TOOLS {
            let found = Command::new("sh")
                .args(["-c", &format!("command -v {tool}")])
                .output()
                .is_ok_and(|output| output.status.success());
            if !found {
                return Err(format!("'{tool}' is missing; needed are {TOOLS:?}"));
            }
        }
        std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .map_err(|error| format!("/dev/net/tun: {error}"))?;
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "--mount"]);
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        let holder = Holder::start(command, directory.path());
        let holder = holder.map_err(|why| format!("no user namespace: {why}"))?;
        let lab = Self {
            root: Host::new("underlay", holder),
            watch: Watch::start(mark(LAB, directory.path())),
            directory,
            links: Cell::new(0),
        };
        lab.root.sh(
            "ip link set lo up; ip link add underlay type bridge; ip link set underlay up
             ip link set underlay mtu 65535",
        );
        Ok(lab)
    }

    /// The namespace of the underlay's bridge, where loopback addresses are all there is.
    pub fn root(&self) -> &Host {
        &self.root
    }

    /// A directory for the test's files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// An embedded store there, by its URL.
    pub fn store(&self) -> String {
        format!("sqlite:{}", self.directory().join("leases.db").display())
    }

    /// Nodes `n1` and `n2` at 10.9.0.1 and 10.9.0.2, of one state directory and with each other for peers.
    /// `configure` is given the number of each with what all such nodes are started with.
    pub fn two_nodes(&self, configure: impl Fn(u8, NodeConfig) -> NodeConfig) -> [Node; 2] {
        self.start_two(|number| {
            let (name, address) = (format!("n{number}"), Ipv4Addr::new(10, 9, 0, number));
            let config = NodeConfig::new(&name, address, &self.store());
            let config = configure(number, config.with("--network", "10.244.0.0/16"));
            (config, self.host(&name, address))
        })
    }

    /// The same with IPv6 besides, at fd09::1 and fd09::2.
    pub fn two_dual_nodes(&self, configure: impl Fn(u8, NodeConfig) -> NodeConfig) -> [Node; 2] {
        self.start_two(|number| {
            let (name, address) = (format!("n{number}"), Ipv4Addr::new(10, 9, 0, number));
            let host = self.host(&name, address);
            host.sh(&format!("ip addr add fd09::{number}/64 dev eth0 nodad"));
            let config = NodeConfig::new(&name, address, &self.store());
            let config = config
                .with("--network", "10.244.0.0/16")
                .with("--ipv6-network", "fd44::/48")
                .with("--public-ipv6", format_args!("fd09::{number}"));
            (configure(number, config), host)
        })
    }

    fn start_two(&self, prepare: impl FnMut(u8) -> (NodeConfig, Host)) -> [Node; 2] {
        let [(first, host), (second, other)] = [1, 2].map(prepare);
        let first = first.start(&host);
        let second = second.start_sharing(&other, &first);
        let nodes = [first, second];
        for node in &nodes {
            node.wait_peers(1);
        }
        nodes
    }

    /// A network namespace with nothing but loopback in it.
    pub fn namespace(&self, name: &str) -> Host {
        let mut command = self.root.holder.enter();
        command.args(["unshare", "--net", "--mount"]);
        let holder = Holder::start(command, self.directory());
        let host = Host::new(name, holder.unwrap());
        host.sh("ip link set lo up");
        host
    }

    /// Namespaces of a user's own within a host, as RootlessKit makes them: with another root, without
    /// the host's network, and with mounts that the host does not see.
    pub fn rootless(&self, host: &Host, name: &str) -> Host {
        let mut command = host.holder.enter();
        command.args(["unshare", "--user", "--map-root-user", "--net", "--mount"]);
        let holder = Holder::start(command, self.directory());
        Host::new(name, holder.unwrap())
    }

    /// A host on the underlay: its `eth0` has this address of a /24. Only that interface's MTU
    /// limits what it sends and takes.
    pub fn host(&self, name: &str, address: Ipv4Addr) -> Host {
        let host = self.namespace(name);
        self.replug(&host, "eth0", address);
        host
    }

    /// Gives a host an interface on the underlay, with this address.
    pub fn replug(&self, host: &Host, name: &str, address: Ipv4Addr) {
        let port = self.plug(host, name);
        self.root
            .sh(&format!("ip link set {port} master underlay mtu 65535 up"));
        host.sh(&format!("ip addr add {address}/{UNDERLAY_LEN} dev {name}"));
    }

    /// Gives a host one end of a cable and returns the name of the other, in the root namespace.
    fn plug(&self, host: &Host, name: &str) -> String {
        let port = format!("port{}", self.links.replace(self.links.get() + 1));
        let pid = host.pid();
        self.root.sh(&format!(
            "ip link add {port} type veth peer name {name} netns {pid}"
        ));
        host.sh(&format!("ip link set {name} up"));
        port
    }

    /// A cable between two hosts.
    pub fn cable(&self, (one, name): (&Host, &str), (other, its): (&Host, &str)) {
        let port = self.plug(one, name);
        let pid = other.pid();
        self.root
            .sh(&format!("ip link set {port} netns {pid} name {its}"));
        other.sh(&format!("ip link set {its} up"));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let mark = mark(LAB, self.directory());
        if std::thread::panicking() {
            return processes::kill_all(&mark);
        }
        waits_for("the end of all processes of the lab");
        let left = || processes::marked(&mark);
        let is_empty = || left().is_empty().then_some(());
        if poll_for(SOON, is_empty).is_err() {
            let left: Vec<_> = left().iter().map(ToString::to_string).collect();
            processes::kill_all(&mark);
            panic!("processes are left: {left:#?}");
        }
    }
}

/// A variable of processes' environment.
fn mark(name: &str, value: &Path) -> String {
    format!("{name}={}", value.display())
}

/// What an interface leaves to others, or does for them.
#[derive(Clone, Copy)]
pub enum Offload {
    /// Checksums of what it sends.
    Checksums,
    /// Segments it receives become superpackets.
    Merging,
    /// So do datagrams that no socket here is for.
    ForwardedMerging,
    /// TCP superpackets become segments.
    Segmentation,
    /// Trains become datagrams.
    TrainSegmentation,
}

impl Offload {
    /// What the kernel calls it.
    fn features(self) -> &'static str {
        match self {
            Self::Checksums => "tx-checksum-ip-generic tx-checksum-sctp",
            Self::Merging => "rx-gro",
            Self::ForwardedMerging => "rx-udp-gro-forwarding",
            Self::Segmentation => {
                "tx-tcp-segmentation tx-tcp-ecn-segmentation tx-tcp-mangleid-segmentation \
                 tx-tcp6-segmentation"
            }
            Self::TrainSegmentation => "tx-udp-segmentation",
        }
    }

    /// A shell script like `ethtool --features NAME rx-gro on`.
    pub fn on(self, interface: &str) -> String {
        self.set(interface, 1)
    }

    /// A shell script like `ethtool --features NAME rx-gro off`.
    pub fn off(self, interface: &str) -> String {
        self.set(interface, 0)
    }

    /// Not every machine has `ethtool`. `ETHTOOL_GSSET_INFO` (0x37) says how many features there
    /// are, `ETHTOOL_GSTRINGS` (0x1b) their names in the order of their bits, and
    /// `ETHTOOL_SFEATURES` (0x3b) sets bits. SIOCETHTOOL (0x8946) has a `struct ifreq` with the
    /// address of one of these commands.
    fn set(self, interface: &str, on: u8) -> String {
        let features = self.features();
        format!(
            r#"perl -e '
    my ($interface, $on, @features) = @ARGV;
    socket(my $socket, 2, 2, 0) or die "socket: $!";
    sub ask {{ my $command = shift;
        ioctl($socket, 0x8946, pack("a16 P x16", $interface, $command)) or die "ioctl: $!";
        $command }}
    my ($count) = unpack("x16 L", ask(pack("L L Q L", 0x37, 0, 1 << 4, 0)));
    my $names = ask(pack("L L L x" . 32 * $count, 0x1b, 4, $count));
    my @names = unpack("x12" . "Z32" x $count, $names);
    my %bits = map {{ $names[$_] => $_ }} 0 .. $#names;
    my @words = (0) x (2 * int(($count + 31) / 32));
    for (@features) {{
        my $bit = $bits{{$_}} // die "$interface: no feature $_";
        my ($word, $mask) = (2 * ($bit >> 5), 1 << ($bit & 31));
        $words[$word] |= $mask;
        $words[$word + 1] |= $mask if $on;
    }}
    ask(pack("L L L*", 0x3b, @words / 2, @words));
' {interface} {on} {features}"#
        )
    }
}

/// A network namespace of a lab.
#[derive(Clone)]
pub struct Host {
    name: String,
    holder: Rc<Holder>,
}

impl Host {
    fn new(name: &str, holder: Holder) -> Self {
        Self {
            name: name.to_owned(),
            holder: Rc::new(holder),
        }
    }

    /// Whether a program of a Debian package is there; else the test is skipped for lack of it.
    pub fn has(&self, program: &str, package: &str) -> bool {
        let found = self.output(&["sh", "-c", &format!("command -v {program}")]);
        let is_there = found.status.success();
        if !is_there {
            skip(format_args!(
                "'{program}' is missing (Debian has it in {package})"
            ));
        }
        is_there
    }

    /// A command on this host, killed with the thread that starts it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.holder.command(program)
    }

    /// Runs a command to its end.
    pub fn output(&self, words: &[&str]) -> Output {
        waits_for(format!("the end on {} of {words:?}", self.name));
        let (program, arguments) = words.split_first().unwrap();
        let mut command = self.command(program);
        command.args(arguments).stdin(Stdio::null());
        command.output().unwrap()
    }

    /// Runs a command that must succeed, and returns its output.
    pub fn run(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(
            output.status.success(),
            "on {}: {words:?}: {}\n{}{}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout),
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a shell script of which every command must succeed.
    pub fn sh(&self, script: &str) -> String {
        self.run(&["sh", "-e", "-c", script])
    }

    /// Makes an interface do something itself that it leaves to devices further on, which with
    /// virtual devices nobody ever does.
    pub fn without(&self, interface: &str, offload: Offload) {
        self.sh(&offload.off(interface));
    }

    /// Makes an interface leave something to devices further on, or do it for them.
    pub fn with(&self, interface: &str, offload: Offload) {
        self.sh(&offload.on(interface));
    }

    /// Makes an interface a wire on which no packet is longer than its MTU.
    pub fn segments(&self, interface: &str) {
        self.sh(&format!("ip link set {interface} gso_max_segs 1"));
    }

    /// Makes an interface lose what it sends in trains, as a device does that garbles them.
    pub fn loses_trains(&self, interface: &str) {
        // BPF: those whose length is greater, which go to a cable that leads nowhere.
        let giants = "4,128 0 0 0,37 0 1 1600,6 0 0 4294967295,6 0 0 0";
        self.sh(&format!(
            "ip link add nowhere type veth peer name nobody; ip link set nowhere up
             tc qdisc add dev {interface} clsact
             tc filter add dev {interface} egress bpf bytecode '{giants}' flowid 1:1 \
                 action mirred egress redirect dev nowhere"
        ));
    }

    /// The process that holds the namespace.
    pub fn pid(&self) -> u32 {
        self.holder.child.id()
    }

    /// Lets a process of this host have about so many descriptors more than it has now.
    pub fn leaves_descriptors(&self, pid: u32, more: usize) {
        // What is limited are their numbers, some of which may be free.
        let limit = descriptors(pid) + more;
        let (pid, soft) = (pid.to_string(), format!("--nofile={limit}:"));
        self.run(&["prlimit", "--pid", &pid, &soft]);
    }

    /// Gives it what each machine has of its own: empty `/run`, `/opt` and `/var/lib`, and an `/etc`
    /// to which files can be added. What is mounted below `/run` is seen in namespaces that are
    /// made of this one, and the other way round.
    pub fn furnish(&self) {
        self.sh(r#"[ ! -e /run/furnished ] || exit 0
            for directory in /run /opt /var/lib; do mount -t tmpfs none "$directory"; done
            mount --make-shared /run
            mkdir /run/etc /run/lock /run/netns
            mount --rbind /etc /run/etc
            mount -t tmpfs none /etc
            for file in /run/etc/*; do ln -s "$file" /etc/; done
            touch /run/furnished"#);
    }

    /// An agent on the host itself.
    pub fn agent(&self) -> Agent {
        let mut agent = Agent::start(&mut self.command(probe_bin())).unwrap();
        agent.wait_ready(SOON).unwrap();
        agent
    }

    /// A counter of `/proc/net/snmp` or `netstat`, such as `("Udp", "InCsumErrors")`.
    pub fn counter(&self, protocol: &str, name: &str) -> u64 {
        let table = self.run(&["cat", "/proc/net/snmp", "/proc/net/netstat"]);
        let mut rows = table
            .lines()
            .filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(':'));
        let names = rows.next().unwrap().split_whitespace();
        let values = rows.next().unwrap().split_whitespace();
        let value = names.zip(values).find(|(column, _)| *column == name);
        value.unwrap().1.parse().unwrap()
    }
}

/// How many descriptors a process has.
pub fn descriptors(pid: u32) -> usize {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd"));
    all.unwrap().count()
}

/// A shell script that leaves the file `$0` open as descriptor 7 for the command behind it.
pub const LEAVES_OPEN: &str = r#"exec 7<"$0" "$@""#;

/// How a node is started.
#[derive(Clone)]
pub struct NodeConfig {
    name: String,
    /// What it is started by, with its own words behind.
    launcher: Vec<String>,
    arguments: Vec<String>,
}

impl NodeConfig {
    /// A node of this name on this public address, with leases in this store.
    pub fn new(name: &str, public_ip: Ipv4Addr, store: &str) -> Self {
        Self::bare(name, store).with("--public-ip", public_ip)
    }

    /// A node of this name that ends its tunnel where this interface has its address.
    pub fn on_interface(name: &str, interface: &str, store: &str) -> Self {
        Self::bare(name, store).with("--iface", interface)
    }

    /// A node of this name that chooses its interface by itself.
    pub fn anywhere(name: &str, store: &str) -> Self {
        Self::bare(name, store)
    }

    fn bare(name: &str, store: &str) -> Self {
        Self {
            name: name.to_owned(),
            launcher: Vec::new(),
            arguments: Vec::new(),
        }
        .with("--store", store)
    }

    /// One more flag with a value.
    pub fn with(mut self, flag: &str, value: impl ToString) -> Self {
        self.arguments.push(flag.to_owned());
        self.arguments.push(value.to_string());
        self
    }

    /// One more flag without a value.
    pub fn flag(mut self, flag: &str) -> Self {
        self.arguments.push(flag.to_owned());
        self
    }

    /// With a log of all that this filter takes, as in `MUSLIN_LOG`.
    pub fn logs(mut self, filter: &str) -> Self {
        let words = ["env", &format!("MUSLIN_LOG={filter}")];
        self.launcher.extend(words.map(str::to_owned));
        self
    }

    /// By a shell that leaves a file open for it.
    pub fn leaves_open(mut self, file: &Path) -> Self {
        let file = file.to_str().unwrap();
        let words = ["sh", "-c", LEAVES_OPEN, file];
        self.launcher.extend(words.map(str::to_owned));
        self
    }

    /// Without one of the capabilities that root has, such as `net_bind_service`.
    pub fn without_capability(mut self, name: &str) -> Self {
        let words = ["setpriv", "--bounding-set", &format!("-{name}"), "--"];
        self.launcher.extend(words.map(str::to_owned));
        self
    }

    /// Starts it on a host, with a state directory of its own, and waits until it serves.
    pub fn start(&self, host: &Host) -> Node {
        let mut node = self.spawn(host);
        node.wait_ready(SOON);
        node
    }

    /// Starts it on the host and in the state directory of another, and waits until it serves.
    pub fn start_beside(&self, other: &Node) -> Node {
        self.start_sharing(&other.host, other)
    }

    /// Starts it on a host and in the state directory of another node, as on a machine with several
    /// network namespaces, and waits until it serves.
    pub fn start_sharing(&self, host: &Host, other: &Node) -> Node {
        let mut node = self.spawn_in(host, other.directory.clone());
        node.wait_ready(SOON);
        node
    }

    /// Starts it and does not wait.
    pub fn spawn(&self, host: &Host) -> Node {
        self.spawn_in(host, Rc::new(tempfile::tempdir().unwrap()))
    }

    fn spawn_in(&self, host: &Host, directory: Rc<TempDir>) -> Node {
        let log = directory.path().join(format!("{}.log", self.name));
        let mut node = Node {
            config: self.clone(),
            host: host.clone(),
            child: None,
            books: None,
            directory,
            log,
        };
        node.launch();
        node
    }
}

/// A running node; killed on drop. What the test has started by it is killed before, and then it
/// must hold no more than at its start.
pub struct Node {
    config: NodeConfig,
    host: Host,
    child: Option<Child>,
    /// What it held when it was ready for the first time.
    books: Option<Books>,
    directory: Rc<TempDir>,
    log: PathBuf,
}

impl Node {
    fn launch(&mut self) {
        self.launch_with(&[]);
    }

    fn launch_with(&mut self, flags: &[&str]) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .unwrap();
        let words = [&self.config.launcher[..], &[muslin_bin().to_owned()]].concat();
        let mut command = self.host.command(&words[0]);
        command
            .args(&words[1..])
            .arg("node")
            .args(["--name", &self.config.name, "--state-dir"])
            .arg(self.state_dir())
            .args(&self.config.arguments)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if std::env::var_os("MUSLIN_LOG").is_none() {
            command.env("MUSLIN_LOG", LOG);
        }
        self.child = Some(command.spawn().unwrap());
    }

    /// Waits until it answers.
    pub fn wait_ready(&mut self, patience: Duration) {
        waits_for(format!("readiness of the node {}", self.config.name));
        let answer = poll_for(patience, || match self.try_query("status") {
            Some(status) => Some(Some(status)),
            None => (!self.is_running()).then_some(None),
        });
        let Ok(Some(status)) = answer else {
            let name = &self.config.name;
            panic!("the node {name} does not answer{}", self.log());
        };
        if self.books.is_none() {
            self.books = Books::open(&status);
        }
    }

    /// Whether its process is there still.
    pub fn is_running(&mut self) -> bool {
        let child = self.child.as_mut();
        child.is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    /// Whether it has ended, without taking its exit status.
    fn has_ended(&self) -> bool {
        let pid = Pid::from_raw(self.pid().try_into().unwrap());
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(pid), flags).is_ok_and(|status| status != WaitStatus::StillAlive)
    }

    /// Waits for its end and returns the exit code.
    pub fn wait_exit(&mut self, patience: Duration) -> Option<i32> {
        let child = self.child.as_mut().unwrap();
        let status = poll_until(patience, "the node's end", || child.try_wait().unwrap());
        status.code()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().try_into().unwrap()), signal).unwrap();
    }

    /// Ends it without a warning.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Starts it again as it was started before, and waits until it serves.
    pub fn start_again(&mut self) {
        self.start_anew();
        self.wait_ready(SOON);
    }

    /// Starts it again and waits for nothing.
    pub fn start_anew(&mut self) {
        self.kill();
        self.launch();
    }

    /// The same as another configuration has it.
    pub fn start_again_as(&mut self, config: NodeConfig) {
        self.config = config;
        self.start_again();
    }

    /// Has another process take it over, and returns the one that was the node before.
    pub fn take_over(&mut self) -> Child {
        let taken = |log: &str| log.matches("has taken over the node").count();
        let before = taken(&self.log());
        let old = self.child.take().unwrap();
        self.launch_with(&["--take-over"]);
        poll_until(SOON, "that another process takes the node over", || {
            assert!(self.is_running(), "{}", self.log());
            (taken(&self.log()) > before).then_some(())
        });
        old
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Kills the clients that the test has left and detaches what has no client, and checks that
    /// the node holds then what it held at its start.
    fn close(&self, books: &Books) -> Result<(), String> {
        processes::kill_all(&self.mark());
        let mut why = String::new();
        let is_closed = || {
            let answers = ["status", "drops", "pods"].map(|table| self.try_query(table));
            let [Some(status), Some(drops), Some(pods)] = answers else {
                // It may have been about to end.
                if self.has_ended() {
                    return Some(());
                }
                why = "it does not answer".to_owned();
                return None;
            };
            for pod in pods.as_array().into_iter().flatten() {
                let name = pod["pod"].as_str().unwrap_or_default();
                // It may be detached by now.
                let _ = self.client(&["detach", name]).output();
            }
            let closed = books.close(&status, &drops);
            closed.map_err(|error| why = error).ok()
        };
        waits_for(format!("the end of what the node {} has", self.config.name));
        poll_for(SOON, is_closed).map_err(|_| why)
    }

    /// The mark of its clients' processes.
    fn mark(&self) -> String {
        mark(CLIENT, &self.state_dir().join(&self.config.name))
    }

    /// Its host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Waits until it says that it has no lease yet, and that with these words.
    pub fn wait_told(&mut self, words: &[&str]) {
        let what = format!("{words:?} of {}{}", self.config.name, self.log());
        poll_until(SOON, &what, || {
            let output = self.client(&["status"]).output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            let all = ["has no lease yet"].iter().chain(words);
            (output.status.code() == Some(1) && all.clone().all(|word| told.contains(word)))
                .then_some(())
        });
        assert!(self.is_running(), "{}", self.log());
    }

    /// Where its state is.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        muslin::state::socket_path(&self.state_dir(), &self.config.name)
    }

    /// What it has logged, for messages.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        format!("\n--- log of the node {}:\n{log}---", self.config.name)
    }

    /// A client's command to it: the subcommand and what follows.
    pub fn client(&self, words: &[&str]) -> Command {
        let (subcommand, rest) = words.split_first().unwrap();
        let mut command = self.host.command(muslin_bin());
        command
            .args([subcommand, "--state-dir"])
            .arg(self.state_dir())
            .args(["--node", &self.config.name])
            .args(rest)
            .env(CLIENT, self.state_dir().join(&self.config.name))
            .stdin(Stdio::null());
        command
    }

    fn try_query(&self, subcommand: &str) -> Option<Value> {
        let output = self.client(&[subcommand, "--json"]).output().unwrap();
        let answer = serde_json::from_slice(&output.stdout).ok();
        answer.filter(|_| output.status.success())
    }

    /// What a reporting command tells.
    pub fn query(&self, subcommand: &str) -> Value {
        self.try_query(subcommand)
            .unwrap_or_else(|| panic!("no answer to '{subcommand}'{}", self.log()))
    }

    /// A text of its status.
    pub fn status(&self, key: &str) -> String {
        let status = self.query("status");
        let text = status[key].as_str();
        text.unwrap_or_else(|| panic!("no text '{key}' in {status}"))
            .to_owned()
    }

    /// An address of its subnet, by its offset.
    pub fn address(&self, offset: u32) -> Ipv4Addr {
        let subnet = self.status("subnet");
        let base: Ipv4Addr = subnet.split('/').next().unwrap().parse().unwrap();
        Ipv4Addr::from(u32::from(base) + offset)
    }

    /// Its MTU for pods.
    pub fn mtu(&self) -> u16 {
        let status = self.query("status");
        let mtu = status["mtu"].as_u64();
        mtu.unwrap_or_else(|| panic!("no 'mtu' in {status}")) as u16
    }

    /// How many packets it has dropped, by reason; those it has not are not there.
    pub fn drops(&self) -> std::collections::BTreeMap<String, u64> {
        let drops = self.query("drops");
        let rows = drops.as_array();
        let rows = rows.unwrap_or_else(|| panic!("no list: {drops}"));
        rows.iter()
            .map(|row| {
                let reason = row["reason"].as_str().unwrap().to_owned();
                (reason, row["packets"].as_u64().unwrap())
            })
            .filter(|(_, packets)| *packets > 0)
            .collect()
    }

    /// The same without packets for pods that were not up yet, as kernels send when interfaces
    /// come up, and without the few that TCP makes the underlay's queue lose when it looks for how
    /// much that holds: its window is larger.
    pub fn losses(&self) -> std::collections::BTreeMap<String, u64> {
        let mut drops = self.drops();
        drops.remove("port-down");
        if drops
            .get("underlay-overflow")
            .is_some_and(|lost| *lost <= FEW)
        {
            drops.remove("underlay-overflow");
        }
        drops
    }

    /// Waits until it knows so many peers.
    pub fn wait_peers(&self, count: usize) {
        let what = format!("{count} peers of {}{}", self.config.name, self.log());
        poll_until(SOON, &what, || {
            // Without asking them anything, as `muslin peers` does.
            (self.query("status")["peers"] == count).then_some(())
        });
    }

    /// A pod by `muslin run`, and in it an agent.
    pub fn pod(&self, name: &str) -> Agent {
        self.pod_after(name, &[], "")
    }

    /// A pod in which a shell script is run before the agent.
    pub fn pod_after(&self, name: &str, flags: &[&str], script: &str) -> Agent {
        let script = format!("{script}\nexec \"$0\"");
        let mut words = vec!["run", "--name", name];
        words.extend(flags);
        words.extend(["--", "sh", "-e", "-c", &script, probe_bin()]);
        let mut command = self.client(&words);
        let started = Agent::start(&mut command).and_then(|mut agent| {
            agent.wait_ready(SOON)?;
            Ok(agent)
        });
        started.unwrap_or_else(|error| panic!("no pod {name}: {error}{}", self.log()))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let books = self.books.take();
        let closed = match books {
            Some(books) if !std::thread::panicking() && self.is_running() => self.close(&books),
            _ => Ok(()),
        };
        self.kill();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        if let Err(why) = closed {
            let name = &self.config.name;
            panic!("at the end of the node {name}: {why}{}", self.log());
        }
    }
}
