//! Nodes whose leases are in a real etcd: what they tell, and how they end when they lose one.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use etcd_client::Client;
use serde_json::Value;
use tempfile::TempDir;

const MUSLIN: &str = env!("CARGO_BIN_EXE_muslin");
const SOON: Duration = Duration::from_secs(20);
const LEASES: &str = "/coreos.com/network/subnets/";
const CONFIG: &str = "/coreos.com/network/config";

/// Asks again and again until there is an answer.
async fn poll_until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
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

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// An etcd, its address, and a client; `None` where etcd is not installed.
async fn etcd(directory: &Path) -> Option<(Guard, String, Client)> {
    let address = format!("127.0.0.1:{}", free_port());
    let (client, peer) = (
        format!("http://{address}"),
        format!("http://127.0.0.1:{}", free_port()),
    );
    let started = Command::new("etcd")
        .arg("--data-dir")
        .arg(directory.join("etcd"))
        .args(["--listen-client-urls", &client])
        .args(["--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer])
        .args(["--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .arg("--unsafe-no-fsync")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(started) = started else {
        eprintln!("skipped: there is no etcd");
        return None;
    };
    let guard = Guard(started);
    let client = poll_until("etcd", async || {
        let mut client = Client::connect([&address], None).await.ok()?;
        client.get("x", None).await.ok()?;
        Some(client)
    })
    .await;
    Some((guard, address, client))
}

/// A node on an address of the loopback, which is its own only by chance of the process' number.
struct Node {
    process: Guard,
    state: PathBuf,
    log: PathBuf,
}

fn loopback(last: u8) -> String {
    let process = std::process::id();
    format!("127.{}.{}.{last}", 80 + process / 256 % 100, process % 256)
}

impl Node {
    fn start(etcd: &str, state: &Path, last: u8) -> Self {
        let log = state.with_extension(format!("{last}.log"));
        let process = Command::new(MUSLIN)
            .args(["node", "--name", "n", "--public-ip", &loopback(last)])
            .args(["--store", &format!("etcd://{etcd}"), "--state-dir"])
            .arg(state)
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
        let mut command = Command::new(MUSLIN);
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
    let directory = TempDir::new().unwrap();
    let Some((etcd, address, mut client)) = etcd(directory.path()).await else {
        return;
    };
    let config = r#"{"Network":"10.7.0.0/16","Backend":{"Type":"vxlan","Port":28472}}"#;
    client.put(CONFIG, config, None).await.unwrap();
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
        (&"this node".into(), &"ok".into())
    );
    assert!(own["seconds_left"].as_u64().unwrap() > 86_000, "{own}");
    let reservation = row("10.7.200.0-24");
    assert_eq!(reservation["owner"], "reservation");
    assert_eq!(reservation["seconds_left"], Value::Null);
    assert_ne!(reservation["state"], "ok", "another backend");
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
        text.contains("is away") && text.contains(&address),
        "{text}"
    );
    assert!(node.rows("status").is_some(), "the node goes on");
}

#[tokio::test]
async fn a_lost_lease_ends_with_its_own_code_and_a_copy_of_a_node_too() {
    let directory = TempDir::new().unwrap();
    let Some((_etcd, address, mut client)) = etcd(directory.path()).await else {
        return;
    };
    let config = r#"{"Network":"10.7.0.0/16","Backend":{"Type":"vxlan","Port":28472}}"#;
    client.put(CONFIG, config, None).await.unwrap();
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
