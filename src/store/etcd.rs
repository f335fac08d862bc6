//! Leases in etcd, byte for byte as flannel has them, so that its nodes and ours are one network.
//!
//! Flannel's one lease per key and day is kept: a renewal grants a new one and puts the same value
//! under it. Different from flannel, a write names the revision that it replaces, and the lease that
//! it makes useless is ended.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error as EtcdError, EventType,
    GetOptions, GetResponse, Identity, KeyValue, LeaseTimeToLiveOptions, PutOptions, TlsOptions,
    Txn, TxnOp, TxnOpResponse, TxnResponse, WatchOptions, WatchStream,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use muslin_stack::control::lease::{Answer, Entry, LEASE_TTL, Op, Revision, WatchEvent};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tracing::debug;

use super::options::EtcdOptions;
use super::{REFUSES_USER, Store, StoreError, Watch, is_permission};
use crate::error::{Context, Error, Result};

type StoreResult<T> = std::result::Result<T, StoreError>;

/// The port of a server that is named without.
const PORT: u16 = 2379;
/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a server may take to answer a greeting of TLS.
const QUICK: Duration = Duration::from_secs(1);
/// How often a connection is asked whether it is alive; a watch can be silent for a day.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// The longest answer in bytes: more than 100,000 leases.
const MAX_ANSWER: usize = 64 << 20;
/// The number of every cluster of one server that was left at its defaults.
const DEFAULT_CLUSTER: u64 = 0xcdf8_1819_4e3a_8c32;
/// How many questions for a time to live are under way at once.
const QUESTIONS: usize = 64;

impl EtcdOptions {
    /// Finds what cannot work before a server is asked.
    fn check(&self, servers: &[String]) -> Result<()> {
        let has_tls = self.cafile.is_some() || self.certfile.is_some() || self.keyfile.is_some();
        if has_tls && !servers.iter().any(|server| is_tls(server)) {
            return Err(Error::usage(format!(
                "certificates are given, but the URL of {} has no TLS: use https:// or etcds://",
                servers.join(",")
            )));
        }
        if self.certfile.is_some() != self.keyfile.is_some() {
            return Err(Error::usage(
                "a certificate for etcd needs its key, and a key its certificate",
            ));
        }
        if self.username.is_some() != self.password.is_some() {
            return Err(Error::usage(
                "a user of etcd needs a password, and a password a user",
            ));
        }
        self.tls().map(|_| ()).map_err(Error::usage)
    }

    /// The certificates as they are now: who renews them need not restart the node.
    fn tls(&self) -> Result<TlsOptions> {
        let mut tls = TlsOptions::new();
        tls = match &self.cafile {
            Some(path) => tls.ca_certificate(Certificate::from_pem(pem(path, "CERTIFICATE")?)),
            None => tls.with_native_roots(),
        };
        if let (Some(certificate), Some(key)) = (&self.certfile, &self.keyfile) {
            let (certificate, key) = (pem(certificate, "CERTIFICATE")?, pem(key, "PRIVATE KEY")?);
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        Ok(tls)
    }

    fn login(&self) -> Option<(&str, &str)> {
        Some((self.username.as_deref()?, self.password.as_deref()?))
    }
}

fn pem(path: &Path, what: &str) -> Result<String> {
    let at = path.display();
    let text = std::fs::read_to_string(path).context(format!("cannot read {at}"))?;
    if !text.contains(&format!("{what}-----")) {
        return Err(Error::failed(format!("{at} has no {what} in PEM format")));
    }
    Ok(text)
}

/// A store in a cluster of etcd servers.
pub(super) struct EtcdStore {
    url: String,
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    servers: Vec<String>,
    options: EtcdOptions,
    link: Mutex<Link>,
    /// The cluster's number; 0 until it has answered.
    cluster: AtomicU64,
}

/// The server that is asked: one until it fails, so that an error has a place.
#[derive(Default)]
struct Link {
    connection: Option<Connection>,
    /// Which server is tried first the next time.
    next: usize,
    count: u64,
}

/// A connection to one server.
#[derive(Clone)]
struct Connection {
    client: Client,
    server: String,
    number: u64,
}

impl EtcdStore {
    /// A store that has not spoken to its servers yet. `rest` is what follows `scheme:` in `url`.
    ///
    /// # Errors
    /// Bad usage that names the server that cannot be one, or what else cannot work.
    pub(super) fn new(url: &str, scheme: &str, rest: &str, options: &EtcdOptions) -> Result<Self> {
        let wrong = |what: &str| {
            Error::usage(format!(
                "in the store '{url}', '{what}' is not HOST:PORT: use etcd://HOST:PORT[,HOST:PORT], \
                 etcds:// for TLS, or etcd:https://HOST:PORT[,http://HOST:PORT]"
            ))
        };
        let (default, list) = match rest.strip_prefix("//") {
            Some(list) if scheme == "etcds" => (Some("https"), list),
            Some(list) => (Some("http"), list),
            None if scheme == "etcd" => (None, rest),
            None => return Err(wrong(rest)),
        };
        let servers = list.split(',');
        let servers = servers.map(|text| server(default, text).ok_or_else(|| wrong(text)));
        let servers = servers.collect::<Result<Vec<_>>>()?;
        options.check(&servers)?;
        Ok(Self {
            url: url.to_owned(),
            servers,
            options: options.clone(),
            link: Mutex::default(),
            cluster: AtomicU64::new(0),
        })
    }

    /// The connection that stands, or one to the first server that answers.
    async fn connection(&self) -> StoreResult<Connection> {
        let mut link = self.link.lock().await;
        if let Some(connection) = &link.connection {
            return Ok(connection.clone());
        }
        let mut reasons = Vec::new();
        let mut all_refuse = true;
        for step in 0..self.servers.len() {
            let index = (link.next + step) % self.servers.len();
            let server = &self.servers[index];
            match self.connect(server).await {
                Ok(client) => {
                    debug!("requests for leases go to {server}");
                    link.next = index;
                    link.count += 1;
                    let connection = Connection {
                        client,
                        server: server.clone(),
                        number: link.count,
                    };
                    link.connection = Some(connection.clone());
                    return Ok(connection);
                }
                Err(error) => {
                    all_refuse &= matches!(error, StoreError::Refused(_));
                    reasons.push(error.to_string());
                }
            }
        }
        let reasons = reasons.join("; ");
        Err(if all_refuse {
            StoreError::Refused(reasons)
        } else {
            StoreError::Unavailable(reasons)
        })
    }

    async fn connect(&self, server: &str) -> StoreResult<Client> {
        let open = |login: Option<(&str, &str)>| {
            let mut options = ConnectOptions::new()
                .with_connect_timeout(PATIENCE)
                .with_keep_alive(KEEP_ALIVE, PATIENCE)
                .with_keep_alive_while_idle(true)
                .with_require_leader(true)
                .with_auto_token_refresh(true);
            if let Some((user, password)) = login {
                options = options.with_user(user, password);
            }
            if is_tls(server) {
                let tls = self.options.tls();
                let tls = tls.map_err(|error| StoreError::Unavailable(error.to_string()))?;
                options = options.with_tls(tls);
            }
            Ok(Client::connect([server.to_owned()], Some(options)))
        };
        let login = self.options.login();
        let client = match timeout(PATIENCE, open(login)?).await {
            Err(_) => return Err(silent(server)),
            Ok(Err(EtcdError::GRpcStatus(status))) if is_without_users(&status) => {
                // As flannel does: where nobody need say who they are, it does no harm.
                let client = timeout(PATIENCE, open(None)?).await;
                client.map_err(|_| silent(server))?
            }
            Ok(client) => client,
        };
        let mut client = client.map_err(|error| self.explain(server, &error))?;
        if self.servers.len() > 1 {
            // One that is down, frozen or without a leader is passed over.
            let options = GetOptions::new().with_count_only();
            match timeout(PATIENCE, client.get("muslin", Some(options))).await {
                Err(_) => return Err(silent(server)),
                Ok(Err(error)) => {
                    let error = self.explain(server, &error);
                    if !is_permission(&error) {
                        return Err(error);
                    }
                }
                Ok(Ok(_)) => {}
            }
        }
        Ok(client)
    }

    /// Has the next request go to the next server.
    async fn give_up(&self, connection: &Connection) {
        let mut link = self.link.lock().await;
        let is_same = |current: &Connection| current.number == connection.number;
        if link.connection.as_ref().is_some_and(is_same) {
            link.connection = None;
            link.next = (link.next + 1) % self.servers.len();
        }
    }

    async fn range(&self, key: &str, options: Option<GetOptions>) -> StoreResult<GetResponse> {
        let connection = self.connection().await?;
        let client = connection.client.kv_client();
        let mut client = client.max_decoding_message_size(MAX_ANSWER);
        let answer = self.wait(&connection, client.get(key, options)).await?;
        if let Some(header) = answer.header() {
            self.cluster.store(header.cluster_id(), Ordering::Relaxed);
        }
        Ok(answer)
    }

    async fn read(&self, key: String, options: Option<GetOptions>) -> StoreResult<Answer> {
        let is_list = options.is_some();
        let mut answer = self.range(&key, options).await?;
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
        replaced: Option<String>,
    ) -> StoreResult<Answer> {
        let connection = self.connection().await?;
        let mut client = connection.client.clone();
        let lease = match ttl {
            None => 0,
            Some(ttl) => {
                // Servers count in seconds, and lengthen what they find too short.
                let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
                let grant = client.lease_grant(seconds, None);
                self.wait(&connection, grant).await?.id()
            }
        };
        let options = PutOptions::new().with_lease(lease);
        let former = TxnOp::get(replaced.as_ref().unwrap_or(&key).as_str(), None);
        // Watchers take changes in this order: a deletion behind would end what was written.
        let delete = replaced.map(|key| TxnOp::delete(key, None));
        let put = TxnOp::put(key, value, Some(options));
        let ops: Vec<_> = [former].into_iter().chain(delete).chain([put]).collect();
        let written = self.write(&connection, conditions, ops).await;
        if let Some(former) = written.as_ref().ok().and_then(former_lease) {
            end_unused(&connection, former);
        }
        let result = written.map(|written| answer(&written));
        let is_unwritten = match &result {
            Ok(answer) => *answer == Answer::Conflict,
            // After another error the key may be written, and would end with its lease.
            Err(error) => is_permission(error),
        };
        if is_unwritten && lease != 0 {
            // An empty lease ends by itself, so that it does not matter if this fails.
            let _ = self.wait(&connection, client.lease_revoke(lease)).await;
        }
        result
    }

    async fn write(
        &self,
        connection: &Connection,
        conditions: Vec<Compare>,
        ops: impl Into<Vec<TxnOp>>,
    ) -> StoreResult<TxnResponse> {
        let mut client = connection.client.clone();
        let txn = Txn::new().when(conditions).and_then(ops);
        self.wait(connection, client.txn(txn)).await
    }

    /// How long each of these leases lives still.
    async fn times_to_live(&self, leases: Vec<i64>) -> StoreResult<BTreeMap<i64, Duration>> {
        let connection = self.connection().await?;
        let questions = leases.into_iter().map(|lease| {
            let (connection, mut client) = (&connection, connection.client.lease_client());
            async move {
                let answer = client.time_to_live(lease, None);
                let answer = self.wait(connection, answer).await?;
                // One that has expired has -1.
                let seconds = u64::try_from(answer.ttl()).unwrap_or_default();
                Ok((lease, Duration::from_secs(seconds)))
            }
        });
        stream::iter(questions)
            .buffer_unordered(QUESTIONS)
            .try_collect()
            .await
    }

    async fn wait<T>(
        &self,
        connection: &Connection,
        request: impl Future<Output = std::result::Result<T, EtcdError>>,
    ) -> StoreResult<T> {
        let error = match timeout(PATIENCE, request).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => match self.explain(&connection.server, &error) {
                StoreError::Unavailable(reason) if wants_tls(&connection.server).await => {
                    let hint = "it requires TLS: use https:// or etcds://";
                    StoreError::Unavailable(format!("{reason} ({hint})"))
                }
                error => error,
            },
            Err(_) => silent(&connection.server),
        };
        if error != StoreError::Gap {
            self.give_up(connection).await;
        }
        Err(error)
    }

    fn explain(&self, server: &str, error: &EtcdError) -> StoreError {
        let error = explain(server, self.options.username.as_deref(), error);
        match error {
            // A server that misses our certificate may say so too late, after it has hung up.
            StoreError::Unavailable(reason)
                if is_tls(server) && self.options.certfile.is_none() && is_hang_up(&reason) =>
            {
                let hint = "perhaps it requires a client certificate";
                StoreError::Unavailable(format!("{reason} ({hint})"))
            }
            error => error,
        }
    }
}

fn is_missing(key: &str) -> Compare {
    Compare::version(key, CompareOp::Equal, 0)
}

fn answer(written: &TxnResponse) -> Answer {
    if written.succeeded() {
        Answer::Done(written.header().map_or(0, |header| header.revision()))
    } else {
        Answer::Conflict
    }
}

/// The lease that a key was under before it was written, if it was under one.
fn former_lease(written: &TxnResponse) -> Option<i64> {
    let lease = written.op_responses().iter().find_map(|done| match done {
        TxnOpResponse::Get(former) => Some(former.kvs().first()?.lease()),
        _ => None,
    });
    lease.filter(|lease| *lease != 0)
}

/// Ends a lease that no key has any more: a node whose pods come and go would leave one behind with
/// each change.
fn end_unused(connection: &Connection, lease: i64) {
    let mut client = connection.client.lease_client();
    tokio::spawn(async move {
        let ends = async {
            let with_keys = LeaseTimeToLiveOptions::new().with_keys();
            let life = client.time_to_live(lease, Some(with_keys)).await?;
            if life.ttl() > 0 && life.keys().is_empty() {
                client.revoke(lease).await?;
            }
            Ok::<_, EtcdError>(())
        };
        // It ends by itself, so that it does not matter if this fails.
        let _ = timeout(PATIENCE, ends).await;
    });
}

fn silent(server: &str) -> StoreError {
    let seconds = PATIENCE.as_secs();
    StoreError::Unavailable(format!("{server} does not answer within {seconds} s"))
}

#[async_trait]
impl Store for EtcdStore {
    async fn execute(&self, op: Op) -> StoreResult<Answer> {
        let (Op::Get(key)
        | Op::List(key)
        | Op::Create { key, .. }
        | Op::Claim { key, .. }
        | Op::CompareAndPut { key, .. }
        | Op::CompareAndDelete { key, .. }) = &op;
        let key = key.clone();
        let answer = match op {
            Op::Get(key) => self.read(key, None).await,
            Op::List(prefix) => {
                let options = GetOptions::new().with_prefix();
                self.read(prefix, Some(options)).await
            }
            Op::Create { key, value, ttl } => {
                self.put(vec![is_missing(&key)], key, value, ttl, None)
                    .await
            }
            Op::Claim {
                key,
                value,
                ttl,
                prefix,
                seen,
                replaces,
            } => {
                // Of a range each key must be so; one without keys is.
                let behind = seen.saturating_add(1);
                let is_known = Compare::mod_revision(prefix, CompareOp::Less, behind).with_prefix();
                let mut conditions = vec![is_missing(&key), is_known];
                if let Some((old, expected)) = &replaces {
                    conditions.extend(is_at(old, *expected));
                }
                let old = replaces.map(|(old, _)| old);
                self.put(conditions, key, value, ttl, old).await
            }
            Op::CompareAndPut {
                key,
                value,
                expected,
                ttl,
            } => {
                let conditions = is_at(&key, expected);
                self.put(conditions, key, value, ttl, None).await
            }
            Op::CompareAndDelete { key, expected } => {
                let connection = self.connection().await?;
                let conditions = is_at(&key, expected);
                let delete = TxnOp::delete(key, None);
                let written = self.write(&connection, conditions, [delete]).await;
                written.map(|written| answer(&written))
            }
        };
        answer.map_err(|error| with_place(error, &key))
    }

    async fn watch(&self, prefix: &str, from: Revision) -> StoreResult<Box<dyn Watch>> {
        let connection = self.connection().await?;
        let client = connection.client.watch_client();
        let mut client = client.max_decoding_message_size(MAX_ANSWER);
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        let stream = client.watch(prefix, Some(options));
        let stream = self.wait(&connection, stream).await?;
        let mut watch = EtcdWatch {
            server: connection.server.clone(),
            user: self.options.username.clone(),
            stream,
            from,
            early: Vec::new(),
        };
        // A server says first that the watch stands.
        watch.early = match timeout(PATIENCE, watch.message()).await {
            Ok(Ok(events)) => events,
            Ok(Err(error)) => {
                if error != StoreError::Gap {
                    self.give_up(&connection).await;
                }
                return Err(with_place(error, prefix));
            }
            Err(_) => {
                self.give_up(&connection).await;
                let error = format!("{} does not open a watch", connection.server);
                return Err(StoreError::Unavailable(error));
            }
        };
        Ok(Box::new(watch))
    }

    async fn survey(&self, prefix: &str) -> StoreResult<Vec<Entry>> {
        let options = GetOptions::new().with_prefix();
        let mut answer = self.range(prefix, Some(options)).await?;
        let kvs = answer.take_kvs();
        let leases = kvs.iter().map(KeyValue::lease).filter(|lease| *lease != 0);
        let times = self.times_to_live(leases.collect()).await?;
        let with_time = |kv: &KeyValue| Entry {
            ttl: times.get(&kv.lease()).copied(),
            ..entry(kv)
        };
        Ok(kvs.iter().map(with_time).collect())
    }

    fn is_shared_with_flannel(&self) -> bool {
        true
    }

    fn servers(&self) -> &[String] {
        &self.servers
    }

    fn id(&self) -> Option<String> {
        match self.cluster.load(Ordering::Relaxed) {
            0 => None,
            DEFAULT_CLUSTER => Some(format!("{DEFAULT_CLUSTER:x} at {}", self.url)),
            cluster => Some(format!("{cluster:x}")),
        }
    }

    fn describe(&self) -> String {
        self.url.clone()
    }
}

struct EtcdWatch {
    server: String,
    user: Option<String>,
    stream: WatchStream,
    from: Revision,
    early: Vec<WatchEvent>,
}

impl EtcdWatch {
    /// The events of one message, which can have none.
    async fn message(&mut self) -> StoreResult<Vec<WatchEvent>> {
        let away = |why: &str| StoreError::Unavailable(format!("{}: {why}", self.server));
        let message = match self.stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Err(away("the watch was closed")),
            Err(error) => return Err(explain(&self.server, self.user.as_deref(), &error)),
        };
        let revision = message.header().map_or(0, |header| header.revision());
        // A server that has not come so far was wiped since, or knows less than the one before.
        let is_beyond = message.created() && revision.saturating_add(1) < self.from;
        if message.compact_revision() != 0 || is_beyond {
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

fn is_tls(server: &str) -> bool {
    server.starts_with("https://")
}

/// Whether a server that is asked without TLS wants it: it hangs up without a word, but answers a
/// client's greeting.
async fn wants_tls(server: &str) -> bool {
    let Some(place) = server.strip_prefix("http://") else {
        return false;
    };
    let greet = async {
        let mut stream = TcpStream::connect(place).await?;
        stream.write_all(&CLIENT_HELLO).await?;
        let mut answer = [0; 2];
        stream.read_exact(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    match timeout(QUICK, greet).await {
        // An alert or a handshake of any version from 3.0 on (RFC 8446 section 5.1).
        Ok(Ok([kind, version])) => matches!(kind, 21 | 22) && version == 3,
        Ok(Err(_)) | Err(_) => false,
    }
}

/// The shortest greeting of TLS 1.2 (RFC 5246 section 7.4.1.2), with one cipher suite and no
/// extension: all servers answer it, if only by an alert.
const CLIENT_HELLO: [u8; 50] = {
    let mut hello = [0; 50];
    // A handshake record, and in it a greeting, each with its length.
    let head = [22, 3, 1, 0, 45, 1, 0, 0, 41, 3, 3];
    let mut at = 0;
    while at < head.len() {
        hello[at] = head[at];
        at += 1;
    }
    // After 32 bytes of which nobody needs to be sure, and no session: ECDHE-RSA-AES128-GCM-SHA256,
    // and no compression.
    hello[45] = 2;
    hello[46] = 0xc0;
    hello[47] = 0x2f;
    hello[48] = 1;
    hello
};

/// The URL of a server that is named with a scheme, or without one where there is a default.
fn server(default: Option<&str>, text: &str) -> Option<String> {
    let (scheme, text) = match (default, text.split_once("://")) {
        (Some(scheme), None) => (scheme, text),
        (None, Some((scheme @ ("http" | "https"), rest))) => {
            (scheme, rest.strip_suffix('/').unwrap_or(rest))
        }
        _ => return None,
    };
    Some(format!("{scheme}://{}", place(text)?))
}

/// `HOST:PORT` of a server, with etcd's port where none is named.
fn place(text: &str) -> Option<String> {
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
        created: kv.create_revision(),
        // How much is left would be one more request per key; all that counts is whether it ends.
        ttl: (kv.lease() != 0).then_some(LEASE_TTL),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn explain(server: &str, user: Option<&str>, error: &EtcdError) -> StoreError {
    let EtcdError::GRpcStatus(status) = error else {
        let reason = format!("{server}: {}", line(&error.to_string()));
        return match error {
            EtcdError::InvalidArgs(_) | EtcdError::InvalidUri(_) => StoreError::Refused(reason),
            _ => StoreError::Unavailable(reason),
        };
    };
    let message = line(status.message().trim_start_matches("etcdserver: "));
    // Numbers of gRPC: the client does not export its names.
    let code = i32::from(status.code());
    let is_about_users = match code {
        PERMISSION_DENIED | UNAUTHENTICATED => true,
        INVALID_ARGUMENT => message.contains("user name is empty") || message.contains(BAD_LOGIN),
        _ => false,
    };
    match (code, user) {
        (OUT_OF_RANGE, _) => StoreError::Gap,
        // Who manages the users can mend it while the node tries on.
        (_, Some(user)) if is_about_users => {
            StoreError::Unavailable(format!("{server} {REFUSES_USER} '{user}': {message}"))
        }
        (_, None) if is_about_users => StoreError::Refused(format!(
            "{server} refuses: {message}; it requires a user and a password"
        )),
        (UNIMPLEMENTED, _) => StoreError::Refused(format!("{server} refuses: {message}")),
        _ => StoreError::Unavailable(format!("{server}: {}", cause(status, message))),
    }
}

/// What is at the bottom of an error: the status itself says only that the transport failed.
fn cause(status: &dyn std::error::Error, message: String) -> String {
    let mut error = status;
    while let Some(source) = error.source() {
        error = source;
    }
    if std::ptr::addr_eq(error, status) {
        return message;
    }
    let text = line(&error.to_string());
    let hint = if text.contains("UnknownIssuer") || text.contains("BadSignature") {
        " (another CA has signed the server's certificate)"
    } else if text.contains("CertificateRequired") {
        " (it requires a client certificate and key)"
    } else {
        ""
    };
    text + hint
}

fn is_hang_up(reason: &str) -> bool {
    let reason = reason.to_ascii_lowercase();
    let words = ["connection closed", "broken pipe", "reset", "eof"];
    words.iter().any(|word| reason.contains(word))
}

/// Text on one line.
fn line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a server has no users, so that it refuses those who say who they are.
fn is_without_users(status: &impl std::error::Error) -> bool {
    status.to_string().contains("authentication is not enabled")
}

/// Names the key that a user may not have, or what all the keys begin with: rights on what begins
/// with `.../subnets/` are none on flannel's `.../subnets`.
fn with_place(error: StoreError, key: &str) -> StoreError {
    if is_permission(&error) {
        StoreError::Unavailable(format!("{error} at '{key}'"))
    } else {
        error
    }
}

/// What etcd says of a wrong name or password.
const BAD_LOGIN: &str = "authentication failed";
const INVALID_ARGUMENT: i32 = 3;
const PERMISSION_DENIED: i32 = 7;
const OUT_OF_RANGE: i32 = 11;
const UNIMPLEMENTED: i32 = 12;
const UNAUTHENTICATED: i32 = 16;

#[cfg(test)]
mod faults;
#[cfg(test)]
mod scenarios;
#[cfg(test)]
mod tests;
