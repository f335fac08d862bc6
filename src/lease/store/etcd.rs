//! Leases in etcd, byte for byte as flannel has them, so that its nodes and ours are one network.
//!
//! Flannel's one lease per key and day is kept: a renewal grants a new one and puts the same value
//! under it. Different from flannel, a write names the revision that it replaces.

use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, Error as EtcdError, EventType, GetOptions,
    KeyValue, PutOptions, Txn, TxnOp, WatchOptions, WatchStream,
};
use muslin_stack::lease::{Answer, Entry, LEASE_TTL, Op, Revision, WatchEvent};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::{Store, StoreError, Watch};
use crate::error::{Error, Result};

type StoreResult<T> = std::result::Result<T, StoreError>;

/// The port of a server that is named without.
const PORT: u16 = 2379;
/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a connection is asked whether it is alive; a watch can be silent for a day.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// The longest answer in bytes: more than 100,000 leases.
const MAX_ANSWER: usize = 64 << 20;

/// A store in a cluster of etcd servers.
pub(super) struct EtcdStore {
    url: String,
    servers: Vec<String>,
    client: OnceCell<Client>,
}

impl EtcdStore {
    /// A store that has not spoken to its servers yet. `rest` is what follows `etcd:` in `url`.
    ///
    /// # Errors
    /// Bad usage that names the server that cannot be one.
    pub(super) fn new(url: &str, rest: &str) -> Result<Self> {
        let wrong = |what: &str| {
            Error::usage(format!(
                "in the store '{url}', '{what}' is not HOST:PORT: use etcd://HOST:PORT[,HOST:PORT]"
            ))
        };
        let servers = rest.strip_prefix("//").ok_or_else(|| wrong(rest))?;
        let servers = servers.split(',');
        let servers = servers.map(|text| server(text).ok_or_else(|| wrong(text)));
        Ok(Self {
            url: url.to_owned(),
            servers: servers.collect::<Result<_>>()?,
            client: OnceCell::new(),
        })
    }

    async fn client(&self) -> StoreResult<Client> {
        let connect = || async {
            let options = ConnectOptions::new()
                .with_connect_timeout(PATIENCE)
                .with_keep_alive(KEEP_ALIVE, PATIENCE)
                .with_keep_alive_while_idle(true)
                .with_require_leader(true);
            Client::connect(&self.servers, Some(options)).await
        };
        let client = self.client.get_or_try_init(connect).await;
        client.cloned().map_err(|error| self.explain(&error))
    }

    async fn read(&self, key: String, options: Option<GetOptions>) -> StoreResult<Answer> {
        let is_list = options.is_some();
        let client = self.client().await?.kv_client();
        let mut client = client.max_decoding_message_size(MAX_ANSWER);
        let mut answer = self.wait(client.get(key, options)).await?;
        let mut entries = answer.take_kvs().into_iter().map(|kv| entry(&kv));
        if !is_list {
            return Ok(Answer::Value(entries.next()));
        }
        Ok(Answer::Snapshot {
            entries: entries.collect(),
            revision: answer.header().map_or(0, |header| header.revision()),
        })
    }

    async fn put(
        &self,
        conditions: Vec<Compare>,
        key: String,
        value: String,
        ttl: Option<Duration>,
    ) -> StoreResult<Answer> {
        let mut client = self.client().await?;
        let lease = match ttl {
            None => 0,
            Some(ttl) => {
                // Servers count in seconds, and lengthen what they find too short.
                let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
                self.wait(client.lease_grant(seconds, None)).await?.id()
            }
        };
        let options = PutOptions::new().with_lease(lease);
        let result = self
            .write(conditions, TxnOp::put(key, value, Some(options)))
            .await;
        if result == Ok(Answer::Conflict) && lease != 0 {
            // Not after an error: the key may be written, and would end with its lease. An empty
            // lease ends by itself, so that it does not matter if this fails.
            let _ = self.wait(client.lease_revoke(lease)).await;
        }
        result
    }

    async fn write(&self, conditions: Vec<Compare>, op: TxnOp) -> StoreResult<Answer> {
        let mut client = self.client().await?;
        let txn = Txn::new().when(conditions).and_then([op]);
        let answer = self.wait(client.txn(txn)).await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok(if answer.succeeded() {
            Answer::Done(revision)
        } else {
            Answer::Conflict
        })
    }

    async fn wait<T>(
        &self,
        request: impl Future<Output = std::result::Result<T, EtcdError>>,
    ) -> StoreResult<T> {
        match timeout(PATIENCE, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.explain(&error)),
            Err(_) => Err(StoreError::Unavailable(format!(
                "{} does not answer within {} s",
                self.url,
                PATIENCE.as_secs()
            ))),
        }
    }

    fn explain(&self, error: &EtcdError) -> StoreError {
        explain(&self.url, error)
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn execute(&self, op: Op) -> StoreResult<Answer> {
        match op {
            Op::Get(key) => self.read(key, None).await,
            Op::List(prefix) => {
                let options = GetOptions::new().with_prefix();
                self.read(prefix, Some(options)).await
            }
            Op::Create { key, value, ttl } => {
                let is_missing = Compare::version(key.as_str(), CompareOp::Equal, 0);
                self.put(vec![is_missing], key, value, ttl).await
            }
            Op::CompareAndPut {
                key,
                value,
                expected,
                ttl,
            } => self.put(is_at(&key, expected), key, value, ttl).await,
            Op::CompareAndDelete { key, expected } => {
                let conditions = is_at(&key, expected);
                self.write(conditions, TxnOp::delete(key, None)).await
            }
        }
    }

    async fn watch(&self, prefix: &str, from: Revision) -> StoreResult<Box<dyn Watch>> {
        let client = self.client().await?.watch_client();
        let mut client = client.max_decoding_message_size(MAX_ANSWER);
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        let stream = self.wait(client.watch(prefix, Some(options))).await?;
        let mut watch = EtcdWatch {
            url: self.url.clone(),
            stream,
            early: Vec::new(),
        };
        // A server says first that the watch stands.
        watch.early = match timeout(PATIENCE, watch.message()).await {
            Ok(events) => events?,
            Err(_) => {
                let error = format!("{} does not open a watch", self.url);
                return Err(StoreError::Unavailable(error));
            }
        };
        Ok(Box::new(watch))
    }

    fn describe(&self) -> String {
        self.url.clone()
    }
}

struct EtcdWatch {
    url: String,
    stream: WatchStream,
    early: Vec<WatchEvent>,
}

impl EtcdWatch {
    /// The events of one message, which can have none.
    async fn message(&mut self) -> StoreResult<Vec<WatchEvent>> {
        let away = |why: &str| StoreError::Unavailable(format!("{}: {why}", self.url));
        let message = match self.stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Err(away("the watch was closed")),
            Err(error) => return Err(explain(&self.url, &error)),
        };
        if message.compact_revision() != 0 {
            return Err(StoreError::Gap);
        }
        if message.canceled() {
            return Err(away(message.cancel_reason()));
        }
        let events = message.events().iter().filter_map(|event| {
            let kv = event.kv()?;
            Some(match event.event_type() {
                EventType::Put => WatchEvent::Put(entry(kv)),
                EventType::Delete => WatchEvent::Delete {
                    key: text(kv.key()),
                    revision: kv.mod_revision(),
                },
            })
        });
        Ok(events.collect())
    }
}

#[async_trait]
impl Watch for EtcdWatch {
    async fn next(&mut self) -> StoreResult<Vec<WatchEvent>> {
        let mut events = std::mem::take(&mut self.early);
        while events.is_empty() {
            events = self.message().await?;
        }
        Ok(events)
    }
}

/// `HOST:PORT` of a server, with flannel's port where none is named.
fn server(text: &str) -> Option<String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (text, PORT),
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    let is_host = match host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
    {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(plain),
    };
    (is_host && port != 0).then(|| format!("{host}:{port}"))
}

/// That a key was last written at a revision. Those that do not exist have 0.
fn is_at(key: &str, revision: Revision) -> Vec<Compare> {
    vec![
        Compare::mod_revision(key, CompareOp::Equal, revision),
        Compare::version(key, CompareOp::Greater, 0),
    ]
}

/// A key as it is stored. Bytes that are no text become none of ours.
fn entry(kv: &KeyValue) -> Entry {
    Entry {
        key: text(kv.key()),
        value: text(kv.value()),
        revision: kv.mod_revision(),
        // How much is left would be one more request per key; all that counts is whether it ends.
        ttl: (kv.lease() != 0).then_some(LEASE_TTL),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn explain(url: &str, error: &EtcdError) -> StoreError {
    let EtcdError::GRpcStatus(status) = error else {
        return match error {
            EtcdError::InvalidArgs(_) | EtcdError::InvalidUri(_) => {
                StoreError::Refused(format!("{url}: {error}"))
            }
            _ => StoreError::Unavailable(format!("{url}: {error}")),
        };
    };
    // Numbers of gRPC: the client does not export its names.
    match i32::from(status.code()) {
        OUT_OF_RANGE => StoreError::Gap,
        PERMISSION_DENIED | UNIMPLEMENTED | UNAUTHENTICATED => {
            StoreError::Refused(format!("{url} refuses: {}", status.message()))
        }
        INVALID_ARGUMENT if status.message().contains("user name is empty") => {
            StoreError::Refused(format!("{url} refuses: {}", status.message()))
        }
        _ => StoreError::Unavailable(format!("{url}: {}", status.message())),
    }
}

const INVALID_ARGUMENT: i32 = 3;
const PERMISSION_DENIED: i32 = 7;
const OUT_OF_RANGE: i32 = 11;
const UNIMPLEMENTED: i32 = 12;
const UNAUTHENTICATED: i32 = 16;

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::process::{Child, Command, Stdio};
    use std::sync::Arc;

    use muslin_stack::lease::Change;
    use tempfile::TempDir;

    use super::super::suite::{self, Node, Place, settings, soon};
    use super::*;

    /// A server of our own, on ports of the loopback.
    struct Server {
        directory: TempDir,
        client: u16,
        peer: u16,
        process: Child,
    }

    impl Server {
        /// `None` where etcd is not installed.
        async fn start() -> Option<Self> {
            let ports: Vec<_> = (0..2)
                .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
                .collect();
            let port = |index: usize| ports[index].local_addr().unwrap().port();
            let (client, peer) = (port(0), port(1));
            drop(ports);
            let directory = TempDir::new().unwrap();
            let Some(process) = spawn(&directory, client, peer) else {
                eprintln!("skipped: there is no etcd");
                return None;
            };
            let server = Self {
                directory,
                client,
                peer,
                process,
            };
            server.ready().await;
            Some(server)
        }

        async fn ready(&self) {
            soon("the server", async {
                let store = self.open();
                while store.execute(Op::Get("x".to_owned())).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
            .await;
        }

        fn stop(&mut self) {
            self.process.kill().unwrap();
            self.process.wait().unwrap();
        }

        async fn start_again(&mut self) {
            self.process = spawn(&self.directory, self.client, self.peer).unwrap();
            self.ready().await;
        }

        async fn client(&self) -> Client {
            let server = format!("127.0.0.1:{}", self.client);
            Client::connect([server], None).await.unwrap()
        }
    }

    fn spawn(directory: &TempDir, client: u16, peer: u16) -> Option<Child> {
        let (client, peer) = (
            format!("http://127.0.0.1:{client}"),
            format!("http://127.0.0.1:{peer}"),
        );
        Command::new("etcd")
            .arg("--data-dir")
            .arg(directory.path().join("data"))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .arg("--unsafe-no-fsync")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()
    }

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }

    impl Place for Server {
        fn open(&self) -> Arc<dyn Store> {
            let rest = format!("//127.0.0.1:{}", self.client);
            Arc::new(EtcdStore::new(&format!("etcd:{rest}"), &rest).unwrap())
        }

        async fn compact(&self) {
            let mut client = self.client().await;
            let now = client.get("x", None).await.unwrap();
            let revision = now.header().unwrap().revision();
            client.compact(revision, None).await.unwrap();
        }
    }

    #[tokio::test]
    async fn it_is_a_store() {
        if let Some(server) = Server::start().await {
            suite::run_all(&server).await;
        }
    }

    #[tokio::test]
    async fn a_lease_of_a_lost_race_is_revoked_and_others_live_a_day() {
        let Some(server) = Server::start().await else {
            return;
        };
        let store = server.open();
        let create = || {
            store.execute(Op::Create {
                key: "/a".to_owned(),
                value: String::new(),
                ttl: Some(LEASE_TTL),
            })
        };
        assert!(matches!(create().await, Ok(Answer::Done(_))));
        assert_eq!(create().await, Ok(Answer::Conflict));
        let mut client = server.client().await;
        let leases = client.leases().await.unwrap();
        let [lease] = leases.leases() else {
            panic!("{leases:?}")
        };
        let life = client.lease_time_to_live(lease.id(), None).await.unwrap();
        assert_eq!(life.granted_ttl(), 86_400);
    }

    #[tokio::test]
    async fn the_outage_of_the_server_changes_nothing() {
        let Some(mut server) = Server::start().await else {
            return;
        };
        let mut one = Node::start(server.open(), settings("/outage", 1));
        let first = one.subnet().await;
        let mut two = Node::start(server.open(), settings("/outage", 2));
        let second = two.subnet().await;
        assert_eq!(one.peer().await, format!("{second} 192.168.0.2"));
        server.stop();
        let mut three = Node::start(server.open(), settings("/outage", 3));
        server.start_again().await;
        let third = three.subnet().await;
        // The next that the first hears is this, and the others are as they were.
        assert_eq!(one.peer().await, format!("{third} 192.168.0.3"));
        assert!(![&first, &second].contains(&&third));
    }

    #[tokio::test]
    async fn a_server_that_is_away_is_no_reason_to_stop() {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let rest = format!("//{port}");
        let store = EtcdStore::new(&format!("etcd:{rest}"), &rest).unwrap();
        let error = store.execute(Op::Get("x".to_owned())).await.unwrap_err();
        assert!(
            matches!(&error, StoreError::Unavailable(text) if text.contains(&rest)),
            "{error:?}"
        );
        assert!(!error.to_string().contains('\n'));
    }

    #[tokio::test]
    async fn keys_and_values_that_are_no_text_do_no_harm() {
        let Some(server) = Server::start().await else {
            return;
        };
        let mut client = server.client().await;
        let key = [b"/odd/subnets/10.244.7.0-24".as_slice(), &[0xff, 0xfe]].concat();
        client.put(key, [0xff, 0x00], None).await.unwrap();
        client
            .put("/odd/subnets/10.244.8.0-24", [0xff], None)
            .await
            .unwrap();
        let mut node = Node::start(server.open(), settings("/odd", 1));
        let mut skipped = 0;
        while !matches!(node.next().await, Change::Acquired(_)) {
            skipped += 1;
        }
        assert_eq!(skipped, 3, "the configuration and two that are skipped");
    }
}
