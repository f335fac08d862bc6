//! A real etcd: what it is to the rules, with and without TLS and users.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use etcd_client::PermissionType;
use muslin_lab::certificates::Certificates;
use muslin_lab::skip::skip;
use muslin_stack::control::lease::{Change, ConfigFault, LeaseRecord, OwnChange};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use super::super::open;
use super::super::suite::{self, Node, Place, settings, soon};
use super::*;

/// A port of the loopback where nobody listens, and that the kernel gives to nobody as long as this
/// lives: only who asks for it by its number and sets `SO_REUSEADDR`, as etcd does, can have it.
struct Port(Socket);

impl Port {
    fn new() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        socket.bind(&any.into()).unwrap();
        Self(socket)
    }

    fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap().as_socket().unwrap()
    }
}

/// A server of our own, on ports of the loopback.
pub(super) struct Server {
    directory: TempDir,
    pub(super) client: u16,
    peer: u16,
    _ports: [Port; 2],
    pub(super) process: Child,
    arguments: Vec<OsString>,
    scheme: &'static str,
    pub(super) options: EtcdOptions,
}

impl Server {
    /// `None` where etcd is not installed.
    pub(super) async fn start() -> Option<Self> {
        let directory = TempDir::new().unwrap();
        Self::start_with(directory, Vec::new(), "http", EtcdOptions::default()).await
    }

    /// One that has a certificate of `files`, and perhaps wants one of who asks.
    async fn start_tls(wants_certificate: bool, files: Certificates) -> Option<Self> {
        let options = EtcdOptions {
            cafile: Some(files.path("ca.pem")),
            certfile: wants_certificate.then(|| files.path("cert.pem")),
            keyfile: wants_certificate.then(|| files.path("key.pem")),
            ..EtcdOptions::default()
        };
        let mut arguments: Vec<OsString> = vec![
            "--cert-file".into(),
            files.path("cert.pem").into(),
            "--key-file".into(),
            files.path("key.pem").into(),
        ];
        if wants_certificate {
            arguments.extend(["--client-cert-auth".into(), "--trusted-ca-file".into()]);
            arguments.push(files.path("ca.pem").into());
        }
        Self::start_with(files.directory, arguments, "https", options).await
    }

    async fn start_with(
        directory: TempDir,
        arguments: Vec<OsString>,
        scheme: &'static str,
        options: EtcdOptions,
    ) -> Option<Self> {
        let ports = [Port::new(), Port::new()];
        let [client, peer] = ports.each_ref().map(|port| port.address().port());
        let process = spawn(&directory, (scheme, client, peer), &arguments)?;
        let server = Self {
            directory,
            client,
            peer,
            _ports: ports,
            process,
            arguments,
            scheme,
            options,
        };
        server.ready().await;
        Some(server)
    }

    /// Waits until it answers, whatever it says.
    async fn ready(&self) {
        soon("the server", async {
            let store = self.open();
            let is_away = |error: &StoreError| !error.to_string().contains("refuses");
            while matches!(&store.execute(Op::Get("x".to_owned())).await, Err(error) if is_away(error))
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    pub(super) fn stop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    pub(super) fn wipe(&self) {
        std::fs::remove_dir_all(self.directory.path().join("data")).unwrap();
    }

    pub(super) async fn start_again(&mut self) {
        let place = (self.scheme, self.client, self.peer);
        self.process = spawn(&self.directory, place, &self.arguments).unwrap();
        self.ready().await;
    }

    /// Its own client, with all rights.
    pub(super) async fn client(&self) -> Client {
        let server = format!("{}://127.0.0.1:{}", self.scheme, self.client);
        let mut options = ConnectOptions::new();
        if self.scheme == "https" {
            options = options.with_tls(self.options.tls().unwrap());
        }
        Client::connect([server], Some(options)).await.unwrap()
    }

    pub(super) fn open_with(&self, options: &EtcdOptions) -> Arc<dyn Store> {
        let url = format!("etcd:{}://127.0.0.1:{}", self.scheme, self.client);
        open(&url, options).unwrap()
    }
}

fn spawn(
    directory: &TempDir,
    (scheme, client, peer): (&str, u16, u16),
    arguments: &[OsString],
) -> Option<Child> {
    let client = format!("{scheme}://127.0.0.1:{client}");
    let peer = format!("http://127.0.0.1:{peer}");
    let child = Command::new("etcd")
        .arg("--data-dir")
        .arg(directory.path().join("data"))
        .args(["--listen-client-urls", &client])
        .args(["--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer])
        .args(["--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .arg("--unsafe-no-fsync")
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if child.is_err() {
        skip("'etcd' is missing (Debian has it in etcd-server)");
    }
    child.ok()
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Place for Server {
    fn open(&self) -> Arc<dyn Store> {
        self.open_with(&self.options)
    }

    async fn compact(&self) {
        let mut client = self.client().await;
        let now = client.get("x", None).await.unwrap();
        let revision = now.header().unwrap().revision();
        client.compact(revision, None).await.unwrap();
    }
}

/// What the store says against a request.
async fn refused(store: Arc<dyn Store>) -> StoreError {
    let error = store.execute(Op::Get("/x".to_owned())).await.unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
    error
}

#[tokio::test]
async fn it_is_a_store_behind_tls_that_knows_its_clients() {
    let Some(server) = Server::start_tls(true, Certificates::generate()).await else {
        return;
    };
    suite::run_all(&server).await;
    let place = format!("https://127.0.0.1:{}", server.client);
    let anonymous = EtcdOptions {
        certfile: None,
        keyfile: None,
        ..server.options.clone()
    };
    let error = refused(server.open_with(&anonymous)).await;
    let StoreError::Unavailable(text) = &error else {
        panic!("{error:?}")
    };
    assert!(text.starts_with(&place), "{text}");
    assert!(text.to_lowercase().contains("certificate"), "{text}");
}

#[tokio::test]
async fn the_ca_alone_is_enough_and_another_is_told() {
    let Some(server) = Server::start_tls(false, Certificates::generate()).await else {
        return;
    };
    let mut node = Node::start(server.open(), settings("/tls", 1));
    node.subnet().await;
    let place = format!("https://127.0.0.1:{}", server.client);
    let other = Certificates::generate();
    let wrong = EtcdOptions {
        cafile: Some(other.path("ca.pem")),
        ..EtcdOptions::default()
    };
    for options in [wrong, EtcdOptions::default()] {
        let text = refused(server.open_with(&options)).await.to_string();
        assert!(text.starts_with(&place), "{text}");
        assert!(text.contains("certificate"), "{text}");
    }
    // Without TLS where there is TLS.
    let plain = format!("etcd://127.0.0.1:{}", server.client);
    let text = refused(open(&plain, &EtcdOptions::default()).unwrap()).await;
    let text = text.to_string();
    assert!(text.starts_with("http://127.0.0.1"), "{text}");
    assert!(text.contains("it requires TLS: use https://"), "{text}");
}

#[test]
fn options_that_cannot_work_are_refused_by_name() {
    let files = Certificates::generate();
    let some = |name: &str| Some(files.path(name));
    let check = |url: &str, options: EtcdOptions| {
        let error = open(url, &options).map(|_| ()).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    let with = |cafile, certfile, keyfile| EtcdOptions {
        cafile,
        certfile,
        keyfile,
        ..EtcdOptions::default()
    };
    let text = check("etcds://h", with(some("absent.pem"), None, None));
    assert!(text.contains("absent.pem"), "{text}");
    let text = check("etcds://h", with(some("key.pem"), None, None));
    assert!(text.contains("key.pem has no CERTIFICATE"), "{text}");
    let text = check("etcds://h", with(None, some("cert.pem"), some("ca.pem")));
    assert!(text.contains("ca.pem has no PRIVATE KEY"), "{text}");
    let text = check("etcds://h", with(None, some("cert.pem"), None));
    assert!(text.contains("needs its key"), "{text}");
    let text = check("etcd://h:7", with(some("ca.pem"), None, None));
    assert!(text.contains("http://h:7"), "{text}");
    let username = Some("u".to_owned());
    let lonely = EtcdOptions {
        username,
        ..EtcdOptions::default()
    };
    assert!(check("etcd://h", lonely).contains("needs a password"));
    let secret = EtcdOptions {
        password: Some("secret".to_owned()),
        ..EtcdOptions::default()
    };
    assert!(!format!("{secret:?}").contains("secret"));
}

#[tokio::test]
async fn users_are_known_and_a_wrong_password_can_be_mended() {
    let Some(mut server) = Server::start().await else {
        return;
    };
    let login = |name: &str, password: &str| EtcdOptions {
        username: Some(name.to_owned()),
        password: Some(password.to_owned()),
        ..EtcdOptions::default()
    };
    // Where nobody need say who they are, it does no harm.
    let store = server.open_with(&login("node", "right"));
    assert!(store.execute(Op::Get("/x".to_owned())).await.is_ok());

    let mut admin = server.client().await;
    admin.user_add("root", "root", None).await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.role_add("nodes").await.unwrap();
    let permission = etcd_client::Permission::new(PermissionType::Readwrite, "/auth/");
    let permission = permission.with_prefix();
    admin
        .role_grant_permission("nodes", permission)
        .await
        .unwrap();
    admin.user_add("node", "right", None).await.unwrap();
    admin.user_grant_role("node", "nodes").await.unwrap();
    admin.auth_enable().await.unwrap();

    let place = format!("http://127.0.0.1:{}", server.client);
    let anonymous = refused(server.open()).await;
    let StoreError::Refused(text) = &anonymous else {
        panic!("{anonymous:?}")
    };
    assert!(text.starts_with(&place) && text.contains("user"), "{text}");
    let elsewhere = refused(server.open_with(&login("node", "right"))).await;
    assert!(
        elsewhere.to_string().contains("permission denied at '/"),
        "{elsewhere}"
    );

    // So does one that says nobody.
    let mut anonymous = Node::start(server.open(), settings("/auth-later", 9));
    anonymous.trouble("requires a user and a password").await;

    // A node with a wrong password goes on trying, and the administrator corrects it.
    let wrong = server.open_with(&login("node", "later"));
    let error = refused(wrong.clone()).await;
    let StoreError::Unavailable(text) = &error else {
        panic!("{error:?}")
    };
    assert!(text.starts_with(&place), "{text}");
    assert!(
        text.contains("'node'") && text.contains("authentication failed"),
        "{text}"
    );
    let mut late = Node::start(wrong, settings("/auth", 2));
    let options = ConnectOptions::new().with_user("root", "root");
    let mut admin = Client::connect([&place], Some(options)).await.unwrap();
    admin.user_change_password("node", "later").await.unwrap();
    let first = late.subnet().await;

    // Tokens are lost with the server's memory.
    let store = server.open_with(&login("node", "later"));
    let get = || store.execute(Op::Get("/auth/config".to_owned()));
    assert!(get().await.is_ok());
    server.stop();
    server.start_again().await;
    soon("an answer", async {
        while get().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let mut other = Node::start(
        server.open_with(&login("node", "later")),
        settings("/auth", 3),
    );
    other.sees(&first).await;
    let second = other.subnet().await;
    late.sees(&second).await;

    // Users are done away with.
    let options = ConnectOptions::new().with_user("root", "root");
    let mut admin = Client::connect([&place], Some(options)).await.unwrap();
    admin.auth_disable().await.unwrap();
    anonymous.recovery().await;
    anonymous.subnet().await;
}

#[tokio::test]
async fn of_several_servers_one_is_enough() {
    let Some(server) = Server::start().await else {
        return;
    };
    let nobodys = Port::new();
    let dead = nobodys.address();
    // One that takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let (silent_at, alive) = (silent.local_addr().unwrap(), server.client);
    let mut ids = Vec::new();
    for url in [
        format!("etcd:http://{dead},http://127.0.0.1:{alive}"),
        format!("etcd://{silent_at},127.0.0.1:{alive}"),
        format!("etcd:http://127.0.0.1:{alive},https://{dead}"),
    ] {
        let store = open(&url, &EtcdOptions::default()).unwrap();
        assert_eq!(store.id(), None);
        for _ in 0..3 {
            let answer = store.execute(Op::Get("/x".to_owned())).await;
            assert_eq!(answer, Ok(Answer::Value(None)), "{url}");
        }
        ids.push(store.id().unwrap());
        store.watch("/x", 1).await.unwrap();
    }
    ids.dedup();
    assert_eq!(ids.len(), 1, "whatever its servers are called: {ids:?}");
    let all_dead = format!("etcd://{dead},{silent_at}");
    let text = refused(open(&all_dead, &EtcdOptions::default()).unwrap()).await;
    let text = text.to_string();
    for place in [format!("http://{dead}"), format!("http://{silent_at}")] {
        assert!(text.contains(&place), "{text}");
    }
}

#[tokio::test]
async fn u01_records_and_configurations_are_flannels_and_a_field_more() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut client = server.client().await;
    let mut told = settings("/u01", 1);
    told.wanted_config = muslin_stack::control::lease::WantedConfig::Any;
    let mut node = Node::start(server.open(), told);
    let missing = Change::Own(OwnChange::AwaitsConfig(ConfigFault::Missing(
        "/u01/config".to_owned(),
    )));
    assert_eq!(node.next().await, missing);
    let config = r#"{ "Network": "10.1.0.0/16", "SubnetMin": "10.1.5.0", "SubnetMax": "10.1.5.0"}"#;
    client.put("/u01/config", config, None).await.unwrap();
    assert_eq!(node.subnet().await, "10.1.5.0-24");
    let answer = client.get("/u01/subnets/10.1.5.0-24", None).await.unwrap();
    let kv = &answer.kvs()[0];
    assert_eq!(
        kv.value(),
        br#"{"PublicIP":"192.168.0.1","PublicIPv6":null,"Muslin":{"PartialChecksums":true}}"#
    );
    let life = client.lease_time_to_live(kv.lease(), None).await.unwrap();
    assert!((86_300..=86_400).contains(&life.ttl()), "{life:?}");
    let answer = client.get("/u01/config", None).await.unwrap();
    assert_eq!(answer.kvs()[0].value(), config.as_bytes());
}

#[tokio::test]
async fn u10_a_short_lease_comes_and_goes_and_its_time_is_known() {
    let Some(server) = Server::start().await else {
        return;
    };
    let mut node = Node::start(server.open(), settings("/u10", 1));
    let own = node.subnet().await;
    let mut client = server.client().await;
    let lease = client.lease_grant(3, None).await.unwrap().id();
    let options = PutOptions::new().with_lease(lease);
    let record = LeaseRecord::udp([192, 168, 0, 9].into()).to_json();
    let key = "/u10/subnets/10.244.200.0-24";
    client.put(key, record, Some(options)).await.unwrap();
    client.put("/u10/subnets/odd", "", None).await.unwrap();
    assert_eq!(node.peer().await, "10.244.200.0-24 192.168.0.9");
    let entries = server.open().survey("/u10/subnets").await.unwrap();
    let seconds = |key: &str| {
        let entry = entries.iter().find(|entry| entry.key.ends_with(key));
        entry.unwrap().ttl.map(|ttl| ttl.as_secs())
    };
    assert!(seconds("10.244.200.0-24").unwrap() <= 3);
    assert!(seconds(&own).unwrap() > 86_000);
    assert_eq!(seconds("odd"), None);
    assert_eq!(node.peer().await, "10.244.200.0-24 gone");
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
async fn a_lease_that_no_key_has_any_more_is_revoked() {
    let Some(server) = Server::start().await else {
        return;
    };
    let store = server.open();
    let mut client = server.client().await;
    let shared = client.lease_grant(600, None).await.unwrap().id();
    for key in ["/a", "/b"] {
        let options = etcd_client::PutOptions::new().with_lease(shared);
        client.put(key, "old", Some(options)).await.unwrap();
    }
    let mut revision = client.get("/a", None).await.unwrap().kvs()[0].mod_revision();
    for value in ["1", "2", "3"] {
        let put = Op::CompareAndPut {
            key: "/a".to_owned(),
            value: value.to_owned(),
            expected: revision,
            ttl: Some(LEASE_TTL),
        };
        let Ok(Answer::Done(done)) = store.execute(put).await else {
            panic!()
        };
        revision = done;
    }
    // What another key has stays.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while client.leases().await.unwrap().leases().len() != 2 {
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for (key, expected) in [("/a", "3"), ("/b", "old")] {
        let answer = client.get(key, None).await.unwrap();
        assert_eq!(answer.kvs()[0].value(), expected.as_bytes(), "{key}");
    }
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
    let nobodys = Port::new();
    let port = nobodys.address();
    let rest = format!("http://{port}");
    let store = open(format!("etcd://{port}"), &EtcdOptions::default()).unwrap();
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
    while !matches!(node.next().await, Change::Own(OwnChange::Acquired(_))) {
        skipped += 1;
    }
    assert_eq!(skipped, 3, "the configuration and two that are skipped");
}
