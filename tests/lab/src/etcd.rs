//! A real etcd on a host of its own in the lab.
//!
//! Nodes reach it by TCP. The test itself is outside of the lab's networks, so that it speaks to
//! the server by a Unix socket, which has a name in the file system that both see.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, Error, EventType, GetOptions, KeyValue, PutOptions, Txn, TxnOp,
    WatchOptions, WatchStream,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use super::skip::skip;
use super::watch::stretched;
use super::{Host, Lab, SOON};

/// Where flannel has its keys if nothing else is said.
pub const PREFIX: &str = "/coreos.com/network";
/// What a flannel node's lease lives without renewal, in seconds.
pub const TTL: i64 = 86_400;
/// The server on the underlay.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 250);
/// Clients' port.
const PORT: u16 = 2379;
/// The Unix socket's name in the server's directory; etcd wants it to look like this.
const SOCKET: &str = "localhost:0";

/// A key as the server has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The whole key.
    pub key: String,
    /// Its value.
    pub value: String,
    /// The etcd lease it ends with, or 0.
    pub lease: i64,
    /// How often it was written since it was created.
    pub version: i64,
}

/// What a watch tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A key was written.
    Put(Record),
    /// A key was deleted.
    Delete(String),
}

/// A server; it ends with the test, and its data too.
pub struct Etcd {
    host: Host,
    directory: TempDir,
    process: Option<Child>,
    bridge: Bridge,
    runtime: Runtime,
}

impl Etcd {
    /// A server without data on a host of its own; `None`, and a line that says so, where etcd is
    /// not installed.
    ///
    /// # Panics
    /// If it does not come up, and in CI where it is not installed.
    pub fn start(lab: &Lab) -> Option<Self> {
        let is_here = |host: &Host| {
            let output = host.output(&["sh", "-c", "command -v etcd"]);
            output.status.success()
        };
        if !is_here(lab.root()) {
            skip("'etcd' is missing (Debian has it in etcd-server)");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let mut etcd = Self {
            host: lab.host("etcd", ADDRESS),
            bridge: Bridge::new(directory.path().join(SOCKET)),
            directory,
            process: None,
            runtime: Builder::new_current_thread().enable_all().build().unwrap(),
        };
        etcd.start_again();
        Some(etcd)
    }

    /// The store's URL for the lab's nodes.
    pub fn store(&self) -> String {
        format!("etcd://{ADDRESS}:{PORT}")
    }

    /// Starts the server, if it does not run, with the data that it had.
    pub fn start_again(&mut self) {
        self.kill();
        let log = std::fs::File::create(self.directory.path().join("log")).unwrap();
        let url = format!("http://{ADDRESS}:{PORT}");
        let peer = "http://127.0.0.1:2380";
        // A namespace's mounts are entered at their root.
        let mut command = self.host.command("sh");
        command
            .args(["-c", "cd \"$0\" && rm -f localhost:* && exec etcd \"$@\""])
            .arg(self.directory.path())
            .args(["--data-dir", "data", "--unsafe-no-fsync"])
            .args([
                "--listen-client-urls",
                &format!("{url},unix://{SOCKET}"),
                "--advertise-client-urls",
                &url,
            ])
            .args([
                "--listen-peer-urls",
                peer,
                "--initial-advertise-peer-urls",
                peer,
            ])
            .args(["--initial-cluster", &format!("default={peer}")])
            .args(["--heartbeat-interval", "20", "--election-timeout", "200"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.process = Some(command.spawn().unwrap());
        let deadline = Instant::now() + stretched(SOON);
        while let Err(why) = self.ask(Duration::from_secs(2), async |client| {
            client.get("ready", None).await
        }) {
            let mut is_running = || self.process.as_mut().unwrap().try_wait().unwrap().is_none();
            if !is_running() || Instant::now() > deadline {
                let log = std::fs::read_to_string(self.directory.path().join("log"));
                panic!("etcd: {why}\n--- its log:\n{}---", log.unwrap());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it without a warning; its data stays.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Kills it and starts one in its place that has no data.
    pub fn wipe(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.directory.path().join("data")).unwrap();
        self.start_again();
    }

    /// Stops it in the midst of what it does: connections stand and nothing is answered.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = self.process.as_ref().unwrap().id();
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    /// Forgets the history up to now, and returns the revision up to which it did.
    pub fn compact(&self) -> i64 {
        self.with(async |client| {
            let now = client.get("now", None).await?;
            let revision = now.header().unwrap().revision();
            client.compact(revision, None).await?;
            Ok(revision)
        })
    }

    /// Writes a network's configuration, as its administrator does.
    pub fn configure(&self, prefix: &str, json: &str) {
        self.put(&format!("{prefix}/config"), json);
    }

    /// Writes a key that stays.
    pub fn put(&self, key: &str, value: &str) {
        self.with(async |client| client.put(key, value, None).await);
    }

    /// Writes a key like a flannel node that comes or renews: under a new lease of a day, which is
    /// returned.
    pub fn publish(&self, key: &str, value: &str) -> i64 {
        self.with(async |client| {
            let lease = client.lease_grant(TTL, None).await?.id();
            let options = PutOptions::new().with_lease(lease);
            client.put(key, value, Some(options)).await?;
            Ok(lease)
        })
    }

    /// The same for a key that must not exist.
    pub fn create(&self, key: &str, value: &str) -> i64 {
        self.with(async |client| {
            let lease = client.lease_grant(TTL, None).await?.id();
            let options = PutOptions::new().with_lease(lease);
            let put = TxnOp::put(key, value, Some(options));
            let is_missing = Compare::version(key, CompareOp::Equal, 0);
            let written = client.txn(Txn::new().when([is_missing]).and_then([put]));
            assert!(written.await?.succeeded(), "{key} exists");
            Ok(lease)
        })
    }

    /// Writes a key so many times, with the values that `value` makes, as fast as it goes and in
    /// no particular order.
    pub fn put_often(&self, key: &str, count: usize, value: impl Fn(usize) -> String) {
        self.with(async |client| {
            for batch in (0..count).collect::<Vec<_>>().chunks(100) {
                let tasks = batch.iter().map(|index| {
                    let (mut client, key, value) = (client.clone(), key.to_owned(), value(*index));
                    tokio::spawn(async move { client.put(key, value, None).await })
                });
                for task in tasks.collect::<Vec<_>>() {
                    task.await.unwrap()?;
                }
            }
            Ok(())
        });
    }

    /// Deletes a key, which must exist.
    pub fn delete(&self, key: &str) {
        let deleted = self.with(async |client| Ok(client.delete(key, None).await?.deleted()));
        assert_eq!(deleted, 1, "{key}");
    }

    /// Ends a lease, and all keys under it.
    pub fn revoke(&self, lease: i64) {
        self.with(async |client| client.lease_revoke(lease).await);
    }

    /// How long a lease lives if nobody does anything, in seconds: as granted, and what is left.
    pub fn time_to_live(&self, lease: i64) -> (i64, i64) {
        let answer = self.with(async |client| client.lease_time_to_live(lease, None).await);
        (answer.granted_ttl(), answer.ttl())
    }

    /// A key, if it exists.
    pub fn get(&self, key: &str) -> Option<Record> {
        let answer = self.with(async |client| client.get(key, None).await);
        answer.kvs().first().map(record)
    }

    /// All keys that begin like this, and the revision they are of.
    pub fn list(&self, prefix: &str) -> (Vec<Record>, i64) {
        let options = GetOptions::new().with_prefix();
        let answer = self.with(async |client| client.get(prefix, Some(options)).await);
        let revision = answer.header().unwrap().revision();
        (answer.kvs().iter().map(record).collect(), revision)
    }

    /// The leases of a network, in the order of their keys.
    pub fn leases(&self, prefix: &str) -> Vec<Record> {
        self.list(&format!("{prefix}/subnets")).0
    }

    /// Watches all keys that begin like this, from a revision on.
    pub fn watch(&self, prefix: &str, from: i64) -> Watch<'_> {
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        Watch {
            etcd: self,
            stream: self.with(async |client| client.watch(prefix, Some(options)).await),
        }
    }

    /// Does something by a connection of its own, which must succeed.
    fn with<T>(&self, work: impl AsyncFnOnce(&mut Client) -> Result<T, Error>) -> T {
        self.ask(stretched(SOON), work)
            .unwrap_or_else(|why| panic!("etcd: {why}"))
    }

    fn ask<T>(
        &self,
        patience: Duration,
        work: impl AsyncFnOnce(&mut Client) -> Result<T, Error>,
    ) -> Result<T, String> {
        let work = async {
            let mut client = Client::connect([self.bridge.address.to_string()], None).await?;
            work(&mut client).await
        };
        let answer = self
            .runtime
            .block_on(async { timeout(patience, work).await });
        let answer = answer.map_err(|_| "no answer".to_owned())?;
        answer.map_err(|error| error.to_string())
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A watch, which is looked at now and then.
pub struct Watch<'a> {
    etcd: &'a Etcd,
    stream: WatchStream,
}

impl Watch<'_> {
    /// What has happened since, or happens within `patience`; nothing if nothing has.
    pub fn next(&mut self, patience: Duration) -> Vec<Event> {
        let message = self.stream.message();
        let message = async { timeout(patience, message).await };
        let Ok(message) = self.etcd.runtime.block_on(message) else {
            return Vec::new();
        };
        let message = message.unwrap().expect("the watch stays open");
        assert!(!message.canceled(), "{message:?}");
        let events = message.events().iter().map(|event| {
            let kv = event.kv().unwrap();
            match event.event_type() {
                EventType::Put => Event::Put(record(kv)),
                EventType::Delete => Event::Delete(kv.key_str().unwrap().to_owned()),
            }
        });
        events.collect()
    }
}

fn record(kv: &KeyValue) -> Record {
    Record {
        key: kv.key_str().unwrap().to_owned(),
        value: kv.value_str().unwrap().to_owned(),
        lease: kv.lease(),
        version: kv.version(),
    }
}

/// Leads from a port of this machine's loopback to a Unix socket.
struct Bridge {
    address: SocketAddr,
    is_over: Arc<AtomicBool>,
}

impl Bridge {
    fn new(path: PathBuf) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let bridge = Self {
            address: listener.local_addr().unwrap(),
            is_over: Arc::default(),
        };
        let is_over = Arc::clone(&bridge.is_over);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                if is_over.load(Ordering::SeqCst) {
                    return;
                }
                // Where nobody listens, the connection ends at once.
                if let (Ok(near), Ok(far)) = (near, UnixStream::connect(&path)) {
                    let _ = join(near, far);
                }
            }
        });
        bridge
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

/// Carries bytes both ways until one side ends.
fn join(near: TcpStream, far: UnixStream) -> io::Result<()> {
    let (mut from_near, mut to_near) = (near.try_clone()?, near);
    let (mut from_far, mut to_far) = (far.try_clone()?, far);
    to_near.set_nodelay(true)?;
    std::thread::spawn(move || {
        let _ = io::copy(&mut from_near, &mut to_far);
        let _ = to_far.shutdown(Shutdown::Both);
    });
    std::thread::spawn(move || {
        let _ = io::copy(&mut from_far, &mut to_near);
        let _ = to_near.shutdown(Shutdown::Both);
    });
    Ok(())
}
