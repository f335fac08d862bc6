//! How a node copes with the leases of 5,000 others, in a real etcd: how long it takes to know
//! them at its start, how much memory that needs, and how long a new lease takes until packets
//! follow it.
//!
//! `cargo bench --bench lease_scale`; see `benches/README.md`. Everything runs in namespaces of the
//! benchmark's own: it starts itself anew inside of a lab, where other nodes are addresses of the
//! loopback.

#![allow(clippy::unwrap_used, reason = "a benchmark may")]

use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client as Etcd, PutOptions};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use muslin::agent::{Agent, Ping};
use muslin::control::Client;
use muslin_stack::api::control::{Route, Status, Table};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

/// Tells the benchmark that it is inside.
const INSIDE: &str = "MUSLIN_BENCH_INSIDE";
/// Other nodes at the start.
const LEASES: usize = 5_000;
/// Starts that are measured.
const STARTS: usize = 5;
/// New leases that are measured.
const CHANGES: usize = 200;
/// Where etcd listens, inside.
const ETCD: &str = "127.0.0.1:2379";
/// The node's own public address, which no fake peer has.
const PUBLIC_IP: Ipv4Addr = Ipv4Addr::LOCALHOST;
const PREFIX: &str = "/coreos.com/network";
/// With room for 65,535 subnets. The node's own is below all others.
const CONFIG: &str = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;
/// Where the tunnels end.
const PORT: u16 = 8472;
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    if std::env::args().all(|argument| argument != "--bench") {
        // `cargo test --all-targets` only wants to know whether it starts.
        return;
    }
    let Some(lab) = muslin_lab::Lab::without_limit() else {
        return;
    };
    let mut command = lab.root().command(std::env::current_exe().unwrap());
    command.env(INSIDE, lab.directory());
    let status = command.status().unwrap();
    assert!(status.success(), "{status}");
}

/// Kills what it started.
struct ChildProcess(Child);

impl ChildProcess {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn inside() {
    let directory = PathBuf::from(std::env::var_os(INSIDE).unwrap());
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let _etcd = start_etcd(&directory);
    let mut etcd = runtime.block_on(connect());
    let filled = Instant::now();
    runtime.block_on(fill(&mut etcd));
    println!(
        "{LEASES} leases are in etcd after {:.1} s",
        filled.elapsed().as_secs_f64()
    );

    let mut starts = Vec::new();
    let mut memory = Vec::new();
    for _ in 0..STARTS {
        let node = Node::start(&directory);
        let took = runtime.block_on(node.wait_peers(LEASES));
        let routes: Vec<Route> = runtime.block_on(node.report(Table::Routes));
        let peers = routes.iter().filter(|route| route.via.contains("127."));
        assert!(peers.count() >= LEASES, "{} routes", routes.len());
        starts.push(took);
        memory.push(node.peak_kilobytes());
    }
    print("start until all leases are routed", &mut starts);
    memory.sort_unstable();
    println!(
        "peak RSS of the node: {:.1} MB at most of {STARTS} starts",
        *memory.last().unwrap() as f64 / 1000.0
    );

    let node = Node::start(&directory);
    runtime.block_on(node.wait_peers(LEASES));
    let (mut all, mut after) = (Vec::new(), Vec::new());
    let mut agent = pod(&node);
    for number in 0..CHANGES {
        let change = measure(&runtime, &etcd, &mut agent, number);
        all.push(change.whole);
        after.push(change.after_answer);
    }
    let mut known: Vec<_> = (0..CHANGES).map(|_| round(&mut agent)).collect();
    print("a packet to a peer that is known", &mut known);
    print("put of a lease until a packet follows it", &mut all);
    print("the same from etcd's answer to the put on", &mut after);
    println!(
        "peak RSS after all: {:.1} MB",
        node.peak_kilobytes() as f64 / 1000.0
    );
}

fn print(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |share: f64| {
        let index = ((times.len() - 1) as f64 * share).round() as usize;
        times[index].as_secs_f64() * 1e3
    };
    println!(
        "{what}: median {:.1} ms, p99 {:.1} ms, longest {:.1} ms of {}",
        at(0.5),
        at(0.99),
        at(1.0),
        times.len()
    );
}

fn start_etcd(directory: &Path) -> ChildProcess {
    let (client, peer) = (format!("http://{ETCD}"), "http://127.0.0.1:2380");
    let log = std::fs::File::create(directory.join("etcd.log")).unwrap();
    ChildProcess::start(
        Command::new("etcd")
            .arg("--data-dir")
            .arg(directory.join("etcd"))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", peer])
            .args(["--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(log.try_clone().unwrap())
            .stderr(log),
    )
}

async fn connect() -> Etcd {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(mut etcd) = Etcd::connect([ETCD], None).await
            && etcd
                .put(format!("{PREFIX}/config"), CONFIG, None)
                .await
                .is_ok()
        {
            return etcd;
        }
        assert!(Instant::now() < deadline, "no etcd");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Another node: each has an address, a subnet and a VTEP of its own.
#[derive(Clone, Copy)]
struct Peer(usize);

impl Peer {
    fn bytes(self) -> [u8; 2] {
        u16::try_from(self.0).unwrap().to_be_bytes()
    }

    fn public_ip(self) -> Ipv4Addr {
        let [high, low] = self.bytes();
        Ipv4Addr::new(127, 1, high, low)
    }

    /// An address of its subnet.
    fn pod(self) -> Ipv4Addr {
        let [high, low] = self.bytes();
        Ipv4Addr::new(10, high + 1, low, 2)
    }

    fn key(self) -> String {
        let [high, low] = self.bytes();
        format!("{PREFIX}/subnets/10.{}.{low}.0-24", high + 1)
    }

    fn value(self) -> String {
        let [high, low] = self.bytes();
        format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:aa:00:00:{high:02x}:{low:02x}"}}}}"#,
            self.public_ip()
        )
    }

    /// Writes its record as flannel does, under a lease of its own.
    async fn publish(self, mut etcd: Etcd) {
        let lease = etcd.lease_grant(86_400, None).await.unwrap().id();
        self.put(etcd, lease).await;
    }

    async fn put(self, mut etcd: Etcd, lease: i64) {
        let options = PutOptions::new().with_lease(lease);
        etcd.put(self.key(), self.value(), Some(options))
            .await
            .unwrap();
    }
}

async fn fill(etcd: &mut Etcd) {
    let peers: Vec<_> = (0..LEASES).map(Peer).collect();
    for batch in peers.chunks(100) {
        let tasks = batch
            .iter()
            .map(|peer| tokio::spawn(peer.publish(etcd.clone())));
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
    }
}

/// A node that is started by the command line, in an empty state directory.
struct Node {
    process: ChildProcess,
    started: Instant,
    state: TempDir,
}

impl Node {
    fn start(directory: &Path) -> Self {
        let state = tempfile::tempdir_in(directory).unwrap();
        let started = Instant::now();
        let mut command = Command::new(muslin_lab::muslin_bin());
        command
            .args(["node", "--name", "n", "--state-dir"])
            .arg(state.path())
            .args(["--store", &format!("etcd://{ETCD}")])
            .args(["--public-ip", &PUBLIC_IP.to_string()])
            // One line per peer is what it does; a file is where that goes.
            .stderr(std::fs::File::create(directory.join("node.log")).unwrap());
        Self {
            process: ChildProcess::start(&mut command),
            started,
            state,
        }
    }

    async fn client(&self) -> Option<Client> {
        let socket = muslin::control::locate(self.state.path(), Some("n")).unwrap();
        Client::connect(&socket).await.ok()
    }

    async fn report<T: serde::de::DeserializeOwned>(&self, table: Table) -> Vec<T> {
        self.client().await.unwrap().report(table).await.unwrap()
    }

    /// Waits until it has so many peers, and returns how long after its start that was.
    async fn wait_peers(&self, count: usize) -> Duration {
        loop {
            if let Some(client) = self.client().await
                && let Ok(rows) = client.report::<Status>(Table::Status).await
                && rows[0].peers >= count
            {
                return self.started.elapsed();
            }
            assert!(self.started.elapsed() < PATIENCE, "not {count} peers");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn peak_kilobytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.process.0.id());
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let line = line.unwrap().trim().trim_end_matches(" kB");
        line.parse::<u64>().unwrap() * 1024 / 1000
    }
}

/// A pod's agent.
fn pod(node: &Node) -> Agent {
    let mut command = Command::new(muslin_lab::muslin_bin());
    command
        .args(["run", "--name", "pod", "--state-dir"])
        .arg(node.state.path())
        .args(["--node", "n", "--", muslin_lab::muslin_bin(), "agent"]);
    let mut agent = Agent::start(&mut command).unwrap();
    agent.wait_ready(PATIENCE).unwrap();
    agent
}

/// Sends echo requests, one a millisecond, that nobody answers. Not the agent's frames: the end of
/// a packet socket takes the kernel up to 20 ms.
fn ping(agent: &mut Agent, peer: Peer, count: u16) {
    let ping = Ping {
        count,
        interval_ms: 1,
        timeout_ms: 0,
        ..Ping::new(peer.pod())
    };
    let pinged = agent.ping(&ping).unwrap();
    assert_eq!(pinged.replies, []);
}

/// How long a change took.
struct Change {
    /// Since the put was sent.
    whole: Duration,
    /// Since etcd said that it was done; nothing if the packet was earlier.
    after_answer: Duration,
}

/// How long a packet takes to a peer that the node knows, from before the pod is asked to send it:
/// what the machine itself adds to every change.
fn round(agent: &mut Agent) -> Duration {
    let peer = Peer(0);
    let socket = UdpSocket::bind((peer.public_ip(), PORT)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    std::thread::scope(|scope| {
        let arrival = scope.spawn(|| receive(&socket, peer));
        let begin = Instant::now();
        ping(agent, peer, 1);
        arrival.join().unwrap() - begin
    })
}

/// Waits for a packet for a peer's pod, and returns when it came.
fn receive(socket: &UdpSocket, peer: Peer) -> Instant {
    let mut buffer = [0; 2000];
    let len = socket.recv(&mut buffer).unwrap();
    let now = Instant::now();
    // VXLAN's header, then the frame that the peer's kernel would see.
    let frame = SlicedPacket::from_ethernet(&buffer[8..len]).unwrap();
    let Some(NetSlice::Ipv4(ip)) = frame.net else {
        panic!("no packet: {frame:?}")
    };
    assert_eq!(ip.header().destination_addr(), peer.pod());
    assert!(matches!(frame.transport, Some(TransportSlice::Icmpv4(_))));
    now
}

/// Puts a record while a pod sends one echo request a millisecond there, and waits for the first that
/// arrives at the new peer, as a VXLAN packet.
fn measure(runtime: &Runtime, etcd: &Etcd, agent: &mut Agent, number: usize) -> Change {
    let peer = Peer(LEASES + number);
    let socket = UdpSocket::bind((peer.public_ip(), PORT)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let lease = runtime.block_on(async { etcd.clone().lease_grant(86_400, None).await });
    let lease = lease.unwrap().id();
    let is_over = AtomicBool::new(false);
    let sent = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                ping(agent, peer, 20);
                sent.fetch_add(1, Ordering::SeqCst);
            }
        });
        let arrival = scope.spawn(|| {
            // Whatever happens, the sender must end.
            let _end = End(&is_over);
            receive(&socket, peer)
        });
        while sent.load(Ordering::SeqCst) == 0 {
            // Not in a loop: that would cost the others their turn.
            std::thread::sleep(Duration::from_millis(1));
        }
        let begin = Instant::now();
        runtime.block_on(peer.put(etcd.clone(), lease));
        let answered = Instant::now();
        let arrived = arrival.join().unwrap();
        assert!(arrived > begin, "it was there before");
        Change {
            whole: arrived - begin,
            after_answer: arrived.saturating_duration_since(answered),
        }
    })
}

/// Says that it is over, also by a panic.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
