//! Nodes whose leases are in a real etcd: what they tell, and how they end when they lose one.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{
    Certificate, Client, ConnectOptions, EventType, Identity, Permission, PermissionType,
    PutOptions, TlsOptions, Txn, TxnOp, WatchOptions,
};
use muslin_lab::certificates::Certificates;
use muslin_lab::skip::skip;
use muslin_lab::watch::stretched;
use muslin_lab::{SOON, inside, muslin_bin};
use serde_json::Value;
use tempfile::TempDir;

const LEASES: &str = "/coreos.com/network/subnets/";
const CONFIG: &str = "/coreos.com/network/config";
const NETWORK: &str = r#"{"Network":"10.7.0.0/16","Backend":{"Type":"vxlan","Port":28472}}"#;

/// Asks again and again until there is an answer.
async fn poll_until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + stretched(SOON);
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A process that ends with the test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port that nobody else has: of this network namespace, and below those that the kernel gives.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Starts an etcd that clients reach at `client`, whose data is in `directory`; `None` where etcd
/// is not installed.
fn spawn(directory: &Path, client: &str, arguments: &[&str]) -> Option<Guard> {
    let started = Command::new("etcd")
        .arg("--data-dir")
        .arg(directory)
        .args(["--listen-client-urls", client])
        .args(["--advertise-client-urls", client])
        .arg("--unsafe-no-fsync")
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if started.is_err() {
        skip("'etcd' is missing (Debian has it in etcd-server)");
    }
    started.ok().map(Guard)
}

/// The flags of an etcd that is alone.
fn alone() -> [String; 3] {
    let peer = format!("http://127.0.0.1:{}", free_port());
    [
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
    ]
}

/// A client, once the server answers it.
async fn client(server: &str, options: Option<ConnectOptions>) -> Client {
    poll_until(server, async || {
        let mut client = Client::connect([server], options.clone()).await.ok()?;
        client.get("x", None).await.ok()?;
        Some(client)
    })
    .await
}

/// An etcd, its address, and a client; `None` where etcd is not installed.
async fn etcd(directory: &Path) -> Option<(Guard, String, Client)> {
    let address = format!("127.0.0.1:{}", free_port());
    let url = format!("http://{address}");
    let peer = alone();
    let guard = spawn(
        &directory.join("etcd"),
        &url,
        &peer.each_ref().map(|s| s.as_str()),
    )?;
    Some((guard, address, client(&url, None).await))
}

/// A node on an address of the loopback.
struct Node {
    process: Guard,
    state: PathBuf,
    log: PathBuf,
}

fn loopback(last: u8) -> String {
    format!("127.80.0.{last}")
}

impl Node {
    fn start(etcd: &str, state: &Path, last: u8) -> Self {
        Self::start_with(state, last, &["--store", &format!("etcd://{etcd}")])
    }

    fn start_with(state: &Path, last: u8, arguments: &[&str]) -> Self {
        let log = state.with_extension(format!("{last}.log"));
        let process = Command::new(muslin_bin())
            .args(["node", "--name", "n", "--public-ip", &loopback(last)])
            .arg("--state-dir")
            .arg(state)
            .args(arguments)
            .env("MUSLIN_LOG", "info,muslin::lease=debug,muslin::store=debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self {
            process: Guard(process),
            state: state.to_path_buf(),
            log,
        }
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(muslin_bin());
        command.args(arguments).arg("--state-dir").arg(&self.state);
        command.output().unwrap()
    }

    fn rows(&self, table: &str) -> Option<Value> {
        let output = self.ask(&[table, "--json"]);
        let is_well = output.status.success();
        is_well.then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    async fn subnet(&self) -> String {
        let what = format!("the node: {}", self.log());
        let status = poll_until(&what, async || self.rows("status")).await;
        status["subnet"].as_str().unwrap().to_owned()
    }

    fn log(&self) -> String {
        let mut text = String::new();
        let mut file = fs::File::open(&self.log).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    /// The code with which it ends by itself, and what it says then.
    async fn end(mut self) -> (Option<i32>, String) {
        let code = poll_until("the end", async || self.process.0.try_wait().unwrap()).await;
        let log = self.log();
        let last = log.lines().last().unwrap_or_default().to_owned();
        (code.code(), last)
    }
}

fn key(subnet: &str) -> String {
    format!("{LEASES}{}", subnet.replace('/', "-"))
}

/// Copies a directory without its sockets.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            copy(&entry.path(), &to.join(entry.file_name()));
        } else if kind.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

#[tokio::test]
async fn a_node_shows_every_lease_and_says_when_the_store_is_away() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let Some((etcd, address, mut client)) = etcd(directory.path()).await else {
        return;
    };
    client.put(CONFIG, NETWORK, None).await.unwrap();
    let node = Node::start(&address, &directory.path().join("one"), 1);
    let subnet = node.subnet().await;
    let record = r#"{"PublicIP":"127.0.0.9"}"#;
    client
        .put(key("10.7.200.0/24"), record, None)
        .await
        .unwrap();
    client.put(format!("{LEASES}odd"), "", None).await.unwrap();
    let rows = node.rows("leases").unwrap();
    let row = |wanted: &str| {
        let mut rows = rows.as_array().unwrap().iter();
        rows.find(|row| row["key"] == wanted).unwrap().clone()
    };
    let own = row(&subnet.replace('/', "-"));
    assert_eq!(
        (&own["owner"], &own["state"]),
        (&"this node".into(), &"alive".into())
    );
    assert!(own["seconds_left"].as_u64().unwrap() > 86_000, "{own}");
    let reservation = row("10.7.200.0-24");
    assert_eq!(reservation["owner"], "reservation");
    assert_eq!(reservation["seconds_left"], Value::Null);
    let state = reservation["state"].as_str().unwrap();
    assert!(state.contains("backend"), "{state}");
    assert!(
        row("odd")["state"]
            .as_str()
            .unwrap()
            .contains("not a subnet")
    );
    let text = node.ask(&["leases"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains(&subnet) && text.contains("never"), "{text}");

    drop(etcd);
    let output = node.ask(&["leases"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), text.lines().count()),
        (Some(1), 1),
        "{text}"
    );
    assert!(
        text.contains("is unreachable") && text.contains(&address),
        "{text}"
    );
    assert!(node.rows("status").is_some(), "the node goes on");
}

/// flannel 0.20 closes its watch after the first change of each answer, and the next one begins with
/// what happens once it is open: here, after the node has written its record.
#[tokio::test]
async fn a_record_that_a_flannel_node_has_missed_is_written_again() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let Some((_etcd, address, mut client)) = etcd(directory.path()).await else {
        return;
    };
    client.put(CONFIG, NETWORK, None).await.unwrap();
    let flannel = r#"{"PublicIP":"127.0.0.9","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}"#;
    client
        .put(key("10.7.200.0/24"), flannel, None)
        .await
        .unwrap();
    let node = Node::start(&address, &directory.path().join("one"), 71);
    let own = key(&node.subnet().await);
    let first = client.get(own.as_str(), None).await.unwrap();
    let first = &first.kvs()[0];

    let options = WatchOptions::new().with_prefix();
    let mut watch = client.watch(LEASES, Some(options)).await.unwrap();
    let heard = async {
        loop {
            let message = watch.message().await.unwrap().unwrap();
            if let [event, ..] = message.events() {
                return event.clone();
            }
        }
    };
    let event = tokio::time::timeout(SOON, heard).await.unwrap();
    let again = event.kv().unwrap();
    assert_eq!(event.event_type(), EventType::Put);
    assert_eq!(
        (again.key_str().unwrap(), again.value()),
        (own.as_str(), first.value())
    );
    assert_eq!(
        again.create_revision(),
        first.create_revision(),
        "the same lease goes on"
    );
    let left = client
        .lease_time_to_live(again.lease(), None)
        .await
        .unwrap();
    assert!(left.ttl() > 86_000, "{left:?}");
}

#[tokio::test]
async fn a_peer_of_another_backend_is_shown_as_such_and_skipped() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let Some((_etcd, address, mut client)) = etcd(directory.path()).await else {
        return;
    };
    client.put(CONFIG, NETWORK, None).await.unwrap();
    let node = Node::start(&address, &directory.path().join("one"), 51);
    node.subnet().await;
    for (subnet, backend) in [
        ("10.7.200.0/24", r#""BackendType":"host-gw""#),
        (
            "10.7.201.0/24",
            r#""BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#,
        ),
    ] {
        let record = format!(r#"{{"PublicIP":"127.0.0.9","PublicIPv6":null,{backend}}}"#);
        client.put(key(subnet), record, None).await.unwrap();
    }
    // Records come in order, so that the first was looked at when the second is routed.
    routes(&node, "10.7.201.0/24", "127.0.0.9").await;
    let peers = node.rows("peers").unwrap();
    let mut rows = peers.as_array().unwrap().iter();
    let row = rows.find(|row| row["subnet"] == "10.7.200.0/24").unwrap();
    assert!(row["state"].as_str().unwrap().contains("host-gw"), "{row}");
    let table = node.rows("routes").unwrap();
    let mut rows = table.as_array().unwrap().iter();
    assert!(!rows.any(|row| row["prefix"] == "10.7.200.0/24"), "{table}");
}

#[tokio::test]
async fn leases_that_do_not_count_are_shown_and_not_routed() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let Some((_etcd, address, mut client)) = etcd(directory.path()).await else {
        return;
    };
    client.put(CONFIG, NETWORK, None).await.unwrap();
    let node = Node::start(&address, &directory.path().join("one"), 61);
    let own = node.subnet().await;
    let record = r#"{"PublicIP":"127.0.0.66","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:66"}}"#;
    let half = own.replace("/24", "/25");
    let foreign = ["10.7.0.0/16", &half, "10.7.0.0/24", "10.9.1.0/24"];
    let many = (200..220).map(|third| format!("10.7.{third}.0/24"));
    let many: Vec<_> = many.collect();
    for subnet in foreign
        .iter()
        .copied()
        .chain(many.iter().map(String::as_str))
    {
        client.put(key(subnet), record, None).await.unwrap();
    }
    // What a terminal would obey, and a line that the node has not written.
    let odd = format!("{LEASES}\u{1b}[2J\nINFO all is well");
    client.put(odd, "{}", None).await.unwrap();
    let backend = record.replace(r#""vxlan""#, r#""\u001b[2Jvxlan""#);
    client
        .put(key("10.7.230.0/24"), backend, None)
        .await
        .unwrap();
    let last = record.replace("127.0.0.66", "127.0.0.67");
    client.put(key("10.7.231.0/24"), last, None).await.unwrap();

    routes(&node, "10.7.231.0/24", "127.0.0.67").await;
    let table = node.rows("routes").unwrap();
    let prefixes = table.as_array().unwrap().iter();
    let mut prefixes: Vec<_> = prefixes
        .map(|row| row["prefix"].as_str().unwrap())
        .collect();
    prefixes.retain(|prefix| *prefix != own && *prefix != "10.7.231.0/24");
    assert_eq!(prefixes, many[..16]);
    let leases = node.rows("leases").unwrap();
    let state = |key: &str| {
        let mut rows = leases.as_array().unwrap().iter();
        let row = rows
            .find(|row| row["key"] == key.replace('/', "-"))
            .unwrap();
        row["state"].as_str().unwrap().to_owned()
    };
    for (key, why) in [
        ("10.7.0.0/16", "SubnetLen is 24"),
        (&half, "SubnetLen is 24"),
        ("10.7.0.0/24", "SubnetMin 10.7.1.0"),
        ("10.9.1.0/24", "not in the network"),
        (&many[16], "more than 16 leases"),
        ("10.7.230.0/24", "BackendType cannot be"),
    ] {
        assert!(state(key).contains(why), "{key}: {}", state(key));
    }
    for table in ["leases", "peers", "routes"] {
        let text = String::from_utf8(node.ask(&[table]).stdout).unwrap();
        assert!(!text.contains('\u{1b}'), "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("INFO")), "{text}");
    }
    let log = node.log();
    assert!(
        !log.contains('\u{1b}') && log.contains("\\u{1b}[2J"),
        "{log:?}"
    );
    assert!(!log.lines().any(|line| line.starts_with("INFO")), "{log}");

    client.delete(key(&many[3]), None).await.unwrap();
    routes(&node, &many[16], "127.0.0.66").await;
}

#[tokio::test]
async fn a_lost_lease_ends_with_its_own_code_and_a_copy_of_a_node_too() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let Some((_etcd, address, mut client)) = etcd(directory.path()).await else {
        return;
    };
    client.put(CONFIG, NETWORK, None).await.unwrap();
    let state = directory.path().join("one");
    let node = Node::start(&address, &state, 11);
    let subnet = node.subnet().await;

    // A copy of its state directory, on another address.
    let copied = directory.path().join("two");
    copy(&state, &copied);
    let (code, line) = Node::start(&address, &copied, 12).end().await;
    assert_eq!(code, Some(3), "{line}");
    assert!(
        line.contains(&loopback(11)) && line.contains("copy"),
        "{line}"
    );
    let holder = async |client: &mut Client| {
        let answer = client.get(key(&subnet), None).await.unwrap();
        let record: Value = serde_json::from_slice(answer.kvs()[0].value()).unwrap();
        record["PublicIP"].as_str().unwrap().to_owned()
    };
    assert_eq!(holder(&mut client).await, loopback(11));
    assert_eq!(node.subnet().await, subnet);

    // It is started again elsewhere, when it is no more.
    drop(node);
    let moved = Node::start(&address, &state, 13);
    assert_eq!(moved.subnet().await, subnet);
    assert_eq!(holder(&mut client).await, loopback(13));

    let record = r#"{"PublicIP":"127.0.0.9"}"#;
    client.put(key(&subnet), record, None).await.unwrap();
    let (code, line) = moved.end().await;
    assert_eq!(code, Some(3), "{line}");
    assert!(line.contains("127.0.0.9"), "{line}");
}

/// The password of the user `node`.
const PASSWORD: &str = "4pr1c0t";

/// An etcd that has a certificate, wants one of its clients, and lets the user `node` have some of
/// the network's keys.
struct Guarded {
    _process: Guard,
    server: String,
    /// Where it tells its counters.
    metrics: u16,
    files: Certificates,
    /// With all rights.
    admin: Client,
}

/// What the user may have: all keys that begin so.
type Rights<'a> = &'a [(PermissionType, &'a str)];

const ALL: Rights<'static> = &[(PermissionType::Readwrite, "/coreos.com/network/")];
/// As much as flannel needs, which lists what begins with `subnets`.
const FLANNELS: [(PermissionType, &str); 2] = [
    (PermissionType::Readwrite, CONFIG),
    (PermissionType::Readwrite, "/coreos.com/network/subnets"),
];

impl Guarded {
    async fn start(directory: &Path) -> Option<Self> {
        Self::with_rights(directory, ALL).await
    }

    async fn with_rights(directory: &Path, rights: Rights<'_>) -> Option<Self> {
        let files = Certificates::generate();
        let metrics = free_port();
        let server = format!("https://127.0.0.1:{}", free_port());
        let path = |name: &str| files.path(name).display().to_string();
        let mut arguments = alone().to_vec();
        arguments.push(format!("--cert-file={}", path("cert.pem")));
        arguments.push(format!("--key-file={}", path("key.pem")));
        arguments.push(format!("--trusted-ca-file={}", path("ca.pem")));
        arguments.push("--client-cert-auth".to_owned());
        arguments.push(format!("--listen-metrics-urls=http://127.0.0.1:{metrics}"));
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let process = spawn(&directory.join("etcd"), &server, &arguments)?;
        let text = |name: &str| fs::read_to_string(files.path(name)).unwrap();
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(text("ca.pem")))
            .identity(Identity::from_pem(text("cert.pem"), text("key.pem")));
        let options = ConnectOptions::new().with_tls(tls);
        let mut first = client(&server, Some(options.clone())).await;
        first.put(CONFIG, NETWORK, None).await.unwrap();
        add_users(&mut first, rights).await;
        let admin = client(&server, Some(options.with_user("root", "root"))).await;
        Some(Self {
            _process: process,
            server,
            metrics,
            files,
            admin,
        })
    }

    /// A node with flannel's flags that is told a password and the CA in a file, and its port for
    /// `/readyz`.
    fn node(&self, last: u8, directory: &Path, password: &str, cafile: &Path) -> (Node, u16) {
        let health = free_port();
        let path = |name: &str| self.files.path(name).display().to_string();
        let state = directory.join("one");
        let secret = directory.join("password");
        fs::write(&secret, format!("{password}\n")).unwrap();
        let flags = [
            ("--etcd-endpoints", self.server.clone()),
            ("--etcd-cafile", cafile.display().to_string()),
            ("--etcd-certfile", path("cert.pem")),
            ("--etcd-keyfile", path("key.pem")),
            ("--etcd-username", "node".to_owned()),
            ("--etcd-password-file", secret.display().to_string()),
            (
                "--subnet-file",
                directory.join("subnet.env").display().to_string(),
            ),
            ("--healthz-ip", "127.0.0.1".to_owned()),
            ("--healthz-port", health.to_string()),
        ];
        let flags: Vec<_> = flags
            .iter()
            .flat_map(|(flag, value)| [*flag, value])
            .collect();
        (Node::start_with(&state, last, &flags), health)
    }

    /// How many requests it has refused to users who may not make them.
    fn denials(&self) -> u64 {
        let metrics = get(self.metrics, "/metrics").unwrap();
        let handled = metrics
            .lines()
            .filter(|line| line.starts_with("grpc_server_handled_total"));
        let denied = handled.filter(|line| line.contains(r#"grpc_code="PermissionDenied""#));
        let counts = denied.map(|line| line.split(' ').next_back().unwrap().parse::<u64>());
        counts.sum::<Result<_, _>>().unwrap()
    }
}

async fn add_users(admin: &mut Client, rights: Rights<'_>) {
    admin.user_add("root", "root", None).await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.role_add("nodes").await.unwrap();
    for (kind, prefix) in rights {
        let right = Permission::new(*kind, *prefix).with_prefix();
        admin.role_grant_permission("nodes", right).await.unwrap();
    }
    admin.user_add("node", PASSWORD, None).await.unwrap();
    admin.user_grant_role("node", "nodes").await.unwrap();
    admin.auth_enable().await.unwrap();
}

/// What an HTTP server says.
fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    // Of version 1.0, so that the answer comes without lengths in between.
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// What `/readyz` says.
fn readiness(port: u16) -> Option<String> {
    let answer = get(port, "/readyz")?;
    answer.split(' ').nth(1).map(str::to_owned)
}

async fn ready(port: u16) {
    let is_ready = async || (readiness(port)? == "200").then_some(());
    poll_until("readiness", is_ready).await;
}

/// Waits until a node says that it cannot use its store, once, and checks that it goes on.
async fn complains(node: &mut Node, health: u16, words: &[&str]) {
    let line = poll_until("a complaint", async || {
        let log = node.log();
        let mut lines = log.lines().filter(|line| line.contains("is unreachable"));
        lines.next().map(str::to_owned)
    })
    .await;
    for word in words {
        assert!(line.contains(word), "no '{word}': {line}");
    }
    assert_eq!(readiness(health).as_deref(), Some("503"));
    assert_eq!(node.process.0.try_wait().unwrap(), None, "{}", node.log());
}

#[tokio::test]
async fn a_node_with_flannels_flags_joins_an_etcd_that_wants_certificate_and_password() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let Some(mut etcd) = Guarded::start(directory.path()).await else {
        return;
    };
    let ca = etcd.files.path("ca.pem");
    let (node, health) = etcd.node(21, directory.path(), PASSWORD, &ca);
    let subnet = node.subnet().await;
    ready(health).await;
    let answer = etcd.admin.get(key(&subnet), None).await.unwrap();
    let [kv] = answer.kvs() else {
        panic!("{answer:?}")
    };
    let begin = format!(
        r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":""#,
        loopback(21)
    );
    assert!(kv.value_str().unwrap().starts_with(&begin), "{kv:?}");
    let life = etcd
        .admin
        .lease_time_to_live(kv.lease(), None)
        .await
        .unwrap();
    assert_eq!(life.granted_ttl(), 86_400);
    let text = fs::read_to_string(directory.path().join("subnet.env")).unwrap();
    let gateway = subnet.replace(".0/", ".1/");
    for line in [
        "FLANNEL_NETWORK=10.7.0.0/16",
        &format!("FLANNEL_SUBNET={gateway}"),
    ] {
        assert!(text.lines().any(|it| it == line), "no '{line}': {text}");
    }
    assert!(!node.log().contains("is unreachable"), "{}", node.log());
}

#[tokio::test]
async fn a_wrong_ca_is_told_in_one_line_and_mended_while_the_node_tries_on() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let Some(etcd) = Guarded::start(directory.path()).await else {
        return;
    };
    let cafile = directory.path().join("ca.pem");
    fs::copy(Certificates::generate().path("ca.pem"), &cafile).unwrap();
    let (mut node, health) = etcd.node(22, directory.path(), PASSWORD, &cafile);
    complains(&mut node, health, &[&etcd.server, "another CA"]).await;
    fs::copy(etcd.files.path("ca.pem"), &cafile).unwrap();
    node.subnet().await;
    ready(health).await;
    assert_eq!(
        node.log().matches("is unreachable").count(),
        1,
        "{}",
        node.log()
    );
}

#[tokio::test]
async fn a_wrong_password_is_told_in_one_line_and_mended_while_the_node_tries_on() {
    if !inside::enter() {
        return;
    }
    const LATER: &str = "m4r4sch1n0";
    let directory = TempDir::new().unwrap();
    let Some(mut etcd) = Guarded::start(directory.path()).await else {
        return;
    };
    let ca = etcd.files.path("ca.pem");
    let (mut node, health) = etcd.node(23, directory.path(), LATER, &ca);
    let words = [etcd.server.as_str(), "'node'", "authentication failed"];
    complains(&mut node, health, &words).await;
    assert!(!node.log().contains(LATER), "{}", node.log());
    let changed = etcd.admin.user_change_password("node", LATER);
    changed.await.unwrap();
    node.subnet().await;
    ready(health).await;
    assert_eq!(
        node.log().matches("is unreachable").count(),
        1,
        "{}",
        node.log()
    );
}

/// What a node says of the names that it may not share, which it says once.
async fn names_are_refused(node: &Node, what: &str) {
    let line = poll_until("a word about names", async || {
        let log = node.log();
        let mut lines = log.lines().filter(|line| line.contains(" WARN "));
        lines.next().map(str::to_owned)
    })
    .await;
    let prefix = "/coreos.com/network/muslin/pods/";
    let advice = &format!("requires rights to read and write {prefix}");
    for part in [what, "refuses the user 'node'", "permission denied", advice] {
        assert!(line.contains(part), "no '{part}': {line}");
    }
}

/// Peers come one after the other, and meanwhile a node asks no more for what it may not have.
async fn goes_on_in_silence(etcd: &mut Guarded, node: &mut Node, health: u16) {
    let denials = etcd.denials();
    for last in 201..=210 {
        peer_arrives(&mut etcd.admin, node, last).await;
    }
    assert_eq!((denials, etcd.denials()), (1, 1), "{}", node.log());
    let log = node.log();
    assert_eq!(log.matches(" WARN ").count(), 1, "{log}");
    assert_eq!(log.matches("permission denied").count(), 1, "{log}");
    assert_eq!(log.matches("requests for leases go to").count(), 1, "{log}");
    assert_eq!(readiness(health).as_deref(), Some("200"));
    let prefix = Some(etcd_client::GetOptions::new().with_prefix());
    let names = etcd.admin.get("/coreos.com/network/muslin/", prefix).await;
    let names = names.unwrap();
    assert!(names.kvs().is_empty(), "{names:?}");
}

/// A pod whose address is in its own process.
fn pod(node: &Node, name: &str) -> Guard {
    let socket = node.state.join("nodes/n/control.sock");
    let mut command = Command::new(muslin_bin());
    command.args(["sidecar", "--pod", name, "--expose", "80=7000", "--agent"]);
    command
        .arg(socket)
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    Guard(command.spawn().unwrap())
}

async fn has_pods(node: &Node, names: &[&str]) {
    poll_until(&format!("the pods {names:?}"), async || {
        let rows = node.rows("pods")?;
        let rows = rows.as_array()?.iter();
        rows.map(|row| row["pod"].as_str())
            .eq(names.iter().map(|name| Some(*name)))
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_node_with_flannels_rights_works_and_says_once_that_names_are_not_shared() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let Some(mut etcd) = Guarded::with_rights(directory.path(), &FLANNELS).await else {
        return;
    };
    let ca = etcd.files.path("ca.pem");
    let (mut node, health) = etcd.node(24, directory.path(), PASSWORD, &ca);
    node.subnet().await;
    ready(health).await;
    names_are_refused(&node, "the names of other nodes' pods are unknown").await;
    let _pods = [pod(&node, "one"), pod(&node, "two")];
    has_pods(&node, &["one", "two"]).await;
    goes_on_in_silence(&mut etcd, &mut node, health).await;
    let left = node.ask(&["leave"]);
    assert!(left.status.success(), "{left:?}");
    assert_eq!(node.end().await.0, Some(0));
    // It has asked once more whether there is something to take back.
    assert_eq!(etcd.denials(), 2);
}

#[tokio::test]
async fn a_node_that_may_only_read_names_works_and_says_once_that_its_own_are_not_shared() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let read = (PermissionType::Read, "/coreos.com/network/muslin/pods/");
    let rights = [&FLANNELS[..], &[read]].concat();
    let Some(mut etcd) = Guarded::with_rights(directory.path(), &rights).await else {
        return;
    };
    let ca = etcd.files.path("ca.pem");
    let (mut node, health) = etcd.node(25, directory.path(), PASSWORD, &ca);
    node.subnet().await;
    ready(health).await;
    let _first = pod(&node, "one");
    let what = "other nodes do not know the names of this node's pods";
    names_are_refused(&node, what).await;
    for name in ["three", "two"] {
        let _passing = pod(&node, name);
        has_pods(&node, &["one", name]).await;
    }
    has_pods(&node, &["one"]).await;
    goes_on_in_silence(&mut etcd, &mut node, health).await;
}

/// One of several etcd servers that have the same data.
struct Member {
    directory: PathBuf,
    client: String,
    arguments: Vec<String>,
    process: Option<Guard>,
}

impl Member {
    /// Starts it, with the data that it had; whether etcd is installed.
    fn start(&mut self) -> bool {
        let arguments: Vec<_> = self.arguments.iter().map(String::as_str).collect();
        self.process = spawn(&self.directory, &self.client, &arguments);
        self.process.is_some()
    }
}

/// Three members on the loopback; `None` where etcd is not installed.
fn cluster(directory: &Path) -> Option<Vec<Member>> {
    let urls: Vec<_> = (0..6)
        .map(|_| format!("http://127.0.0.1:{}", free_port()))
        .collect();
    let (clients, peers) = urls.split_at(3);
    let all: Vec<_> = (0..3).map(|at| format!("m{at}={}", peers[at])).collect();
    let mut members: Vec<_> = (0..3)
        .map(|at| Member {
            directory: directory.join(format!("m{at}")),
            client: clients[at].clone(),
            arguments: vec![
                format!("--name=m{at}"),
                format!("--listen-peer-urls={}", peers[at]),
                format!("--initial-advertise-peer-urls={}", peers[at]),
                format!("--initial-cluster={}", all.join(",")),
                "--heartbeat-interval=50".to_owned(),
                "--election-timeout=500".to_owned(),
            ],
            process: None,
        })
        .collect();
    members.iter_mut().all(Member::start).then_some(members)
}

/// The member that a node speaks to, by what it says.
fn used(node: &Node, members: &[Member]) -> Option<usize> {
    let log = node.log();
    let mut lines = log.lines().rev();
    let line = lines.find(|line| line.contains("requests for leases go to"))?;
    let is_it = |member: &Member| line.contains(&member.client);
    members.iter().position(is_it)
}

/// Waits until a node routes a subnet to a peer.
async fn routes(node: &Node, subnet: &str, via: &str) {
    poll_until(&format!("a route to {subnet}"), async || {
        let routes = node.rows("routes")?;
        let mut rows = routes.as_array()?.iter();
        let is_it = |row: &&Value| row["prefix"] == subnet && row["via"] == via;
        rows.find(is_it).map(|_| ())
    })
    .await;
}

/// Publishes a peer, and waits until a node has a route to it.
async fn peer_arrives(client: &mut Client, node: &Node, last: u8) {
    let (subnet, via) = (format!("10.7.{last}.0/24"), format!("127.0.0.{last}"));
    let record = format!(
        r#"{{"PublicIP":"{via}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{last:02x}"}}}}"#
    );
    let lease = client.lease_grant(86_400, None).await.unwrap().id();
    let options = PutOptions::new().with_lease(lease);
    client
        .put(key(&subnet), record, Some(options))
        .await
        .unwrap();
    routes(node, &subnet, &via).await;
}

/// The same by one member.
async fn arrives_by(member: &Member, node: &Node, last: u8) {
    peer_arrives(&mut client(&member.client, None).await, node, last).await;
}

/// Ends the node's etcd lease by hand, and waits until it has published the same record again.
async fn is_published_again(member: &Member, node: &Node, subnet: &str) {
    let mut client = client(&member.client, None).await;
    let before = client.get(key(subnet), None).await.unwrap().kvs()[0].clone();
    client.lease_revoke(before.lease()).await.unwrap();
    let after = poll_until("the record", async || {
        let answer = client.get(key(subnet), None).await.ok()?;
        answer.kvs().first().cloned()
    })
    .await;
    assert_eq!(after.value(), before.value());
    assert_ne!(after.lease(), before.lease());
    let life = client.lease_time_to_live(after.lease(), None).await;
    assert_eq!(life.unwrap().granted_ttl(), 86_400);
    assert_eq!(node.subnet().await, subnet);
}

#[tokio::test]
async fn when_the_member_that_a_node_uses_is_killed_it_goes_on_with_the_others() {
    if !inside::enter() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let Some(mut members) = cluster(directory.path()) else {
        return;
    };
    let mut admin = client(&members[0].client, None).await;
    admin.put(CONFIG, NETWORK, None).await.unwrap();
    let endpoints: Vec<_> = members
        .iter()
        .map(|member| member.client.as_str())
        .collect();
    let flags = ["--etcd-endpoints", &endpoints.join(",")];
    let node = Node::start_with(&directory.path().join("one"), 31, &flags);
    let subnet = node.subnet().await;
    let first = used(&node, &members).unwrap();
    arrives_by(&members[(first + 1) % 3], &node, 201).await;

    members[first].process = None;
    arrives_by(&members[(first + 1) % 3], &node, 202).await;
    let second = used(&node, &members).unwrap();
    assert_ne!(second, first);
    is_published_again(&members[(first + 2) % 3], &node, &subnet).await;

    // It comes back, and without it there would be no majority now.
    assert!(members[first].start());
    client(&members[first].client, None).await;
    members[second].process = None;
    arrives_by(&members[first], &node, 203).await;
    assert_ne!(used(&node, &members), Some(second));
    is_published_again(&members[first], &node, &subnet).await;
    let routes = node.rows("routes").unwrap();
    assert_eq!(routes.as_array().unwrap().len(), 4, "{routes}");
}

#[tokio::test]
async fn five_thousand_leases_are_routed_in_little_memory() {
    if !inside::enter() {
        return;
    }
    const COUNT: usize = 5_000;
    let directory = TempDir::new().unwrap();
    let Some((_etcd, address, mut client)) = etcd(directory.path()).await else {
        return;
    };
    let config =
        r#"{"Network":"10.64.0.0/11","SubnetLen":24,"Backend":{"Type":"vxlan","Port":28472}}"#;
    client.put(CONFIG, config, None).await.unwrap();
    let lease = client.lease_grant(86_400, None).await.unwrap().id();
    let put = |index: usize| {
        let (high, low) = (index / 250, index % 250);
        let key = key(&format!("10.{}.{}.0/24", 64 + high, low + 1));
        let record = format!(
            r#"{{"PublicIP":"172.16.{high}.{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:{high:02x}:{low:02x}"}}}}"#,
            low + 1
        );
        TxnOp::put(key, record, Some(PutOptions::new().with_lease(lease)))
    };
    let puts: Vec<_> = (0..COUNT).map(put).collect();
    for puts in puts.chunks(100) {
        client.txn(Txn::new().and_then(puts)).await.unwrap();
    }

    let node = Node::start(&address, &directory.path().join("one"), 41);
    node.subnet().await;
    poll_until("all routes", async || {
        let routes = node.rows("routes")?;
        (routes.as_array()?.len() == COUNT + 1).then_some(())
    })
    .await;
    let log = node.log();
    let told = log.lines().filter(|line| line.contains(" peer 172.16."));
    let told = told.filter(|line| line.contains("INFO")).count();
    assert!((1..=100).contains(&told), "{told} lines");
    assert!(log.contains("further changes of peers"), "{log}");
    let status = fs::read_to_string(format!("/proc/{}/status", node.process.0.id())).unwrap();
    let mut lines = status.lines();
    let peak = lines.find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kilobytes < 200_000, "{kilobytes} kB");
}
