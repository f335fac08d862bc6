//! The service as a pod sees it, with resolvers that do as a test says.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use muslin_stack::control::names::{Names, NodeRecord};
use muslin_stack::datapath::egress::Protocol;
use proptest::prelude::*;
use tokio::net::{TcpListener, UdpSocket, UnixStream};
use tokio::time::{Instant, timeout};
use tokio_seqpacket::UnixSeqpacket;

use super::forward::{read_message, write_message};
use super::message::{Rejected, Request, Transport};
use super::quota::{QUERIES, Quota};
use super::zones::Zones;
use super::*;

const POD: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 1, 1, 2)), 5353);
const SOON: Duration = Duration::from_secs(10);
/// What the resolver of the tests knows of every name.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

fn names() -> Arc<RwLock<Names>> {
    let mut names = Names::default();
    for (node, subnet, pods) in [
        (
            "n1",
            "10.1.1.0/24",
            r#"{"name":"web","address":"10.1.1.2"},{"name":"a.b","address":"10.1.1.3"}"#,
        ),
        (
            "n2",
            "10.1.2.0/24",
            r#"{"name":"web","address":"10.1.2.2"}"#,
        ),
    ] {
        let json = format!(r#"{{"node":"{node}","subnet":"{subnet}","pods":[{pods}]}}"#);
        let record: NodeRecord = serde_json::from_str(&json).unwrap();
        names.lease(record.subnet.ipv4().unwrap());
        names.set(record);
    }
    Arc::new(RwLock::new(names))
}

fn start(resolvers: &[SocketAddr]) -> (Arc<Dns>, DnsConnector) {
    let resolvers = Resolvers::at(resolvers.to_vec());
    start_with(None, resolvers)
}

const NETWORKS: &str = "10.1.0.0/16,fd00:1::/32";

fn start_with(nat64: Option<Nat64Prefix>, resolvers: Resolvers) -> (Arc<Dns>, DnsConnector) {
    let networks: Nets = NETWORKS.parse().unwrap();
    super::start(networks, nat64, names(), resolvers).unwrap()
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_size(mut query: Message, size: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(size);
    query.set_edns(edns);
    query
}

/// A pod's UDP socket.
struct Pod(UnixSeqpacket);

impl Pod {
    fn new(connector: &DnsConnector) -> Self {
        let socket = connector.connect(POD, Protocol::Udp).unwrap();
        Self(UnixSeqpacket::try_from(std::os::fd::OwnedFd::from(socket)).unwrap())
    }

    async fn send(&self, bytes: &[u8]) {
        self.0.send(bytes).await.unwrap();
    }

    async fn receive(&self) -> Vec<u8> {
        let mut buffer = vec![0; 65_536];
        let read = timeout(SOON, self.0.recv(&mut buffer)).await;
        let len = read.expect("an answer").unwrap().bytes_read();
        buffer.truncate(len);
        buffer
    }

    async fn ask(&self, query: &Message) -> Message {
        self.send(&query.to_vec().unwrap()).await;
        answer_to(query, &self.receive().await)
    }
}

fn answer_to(query: &Message, bytes: &[u8]) -> Message {
    let answer = Message::from_vec(bytes).unwrap();
    assert_eq!(answer.id, query.id);
    assert_eq!(answer.message_type, MessageType::Response);
    assert_eq!(answer.queries, query.queries);
    assert_eq!(answer.edns.is_some(), query.edns.is_some());
    answer
}

fn texts(answer: &Message) -> Vec<String> {
    let mut texts: Vec<_> = answer
        .answers
        .iter()
        .map(|it| it.data.to_string())
        .collect();
    texts.sort_unstable();
    texts
}

/// What a resolver of the tests sends for a query that it was sent.
type Behaviour = fn(&Message) -> Vec<Vec<u8>>;

fn honest(query: &Message) -> Vec<Vec<u8>> {
    vec![reply(query).to_vec().unwrap()]
}

fn reply(query: &Message) -> Message {
    let mut answer = query.clone().into_response();
    let name = query.queries[0].name().clone();
    answer.add_answer(Record::from_rdata(name, 60, RData::A(A(OUTSIDE))));
    answer
}

/// Sockets by UDP and by TCP at the same port, which may be taken for the one and not for the other.
async fn sockets() -> (UdpSocket, TcpListener) {
    loop {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let listener = TcpListener::bind(socket.local_addr().unwrap()).await;
        match listener {
            Ok(listener) => return (socket, listener),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse),
        }
    }
}

/// A resolver by UDP, and by TCP at the same port.
async fn resolver(by_udp: Behaviour, by_tcp: Behaviour) -> SocketAddr {
    let (socket, listener) = sockets().await;
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
            for answer in by_udp(&Message::from_vec(&buffer[..len]).unwrap()) {
                socket.send_to(&answer, from).await.unwrap();
            }
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let query = read_message(&mut stream).await.unwrap().unwrap();
            for answer in by_tcp(&Message::from_vec(&query).unwrap()) {
                write_message(&mut stream, &answer).await.unwrap();
            }
        }
    });
    address
}

fn silent(_: &Message) -> Vec<Vec<u8>> {
    Vec::new()
}

/// A port at which nobody listens to us, and which nobody else gets meanwhile.
async fn refusing() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect("127.0.0.1:9").await.unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

#[tokio::test]
async fn names_of_pods_are_answered_here() {
    let (dns, connector) = start(&[]);
    let pod = Pod::new(&connector);
    for (name, kind, expected) in [
        ("web.muslin.", RecordType::A, &["10.1.1.2", "10.1.2.2"][..]),
        ("WEB.Muslin.", RecordType::A, &["10.1.1.2", "10.1.2.2"]),
        ("web.n2.muslin.", RecordType::A, &["10.1.2.2"]),
        ("web.n2.muslin.", RecordType::ANY, &["10.1.2.2"]),
        ("a.b.muslin.", RecordType::A, &["10.1.1.3"]),
        (
            "2.2.1.10.in-addr.arpa.",
            RecordType::PTR,
            &["web.n2.muslin."],
        ),
        (
            "3.1.1.10.IN-ADDR.arpa.",
            RecordType::PTR,
            &["a.b.n1.muslin."],
        ),
        ("localhost.", RecordType::A, &["127.0.0.1"]),
        ("x.localhost.", RecordType::AAAA, &["::1"]),
    ] {
        let answer = pod.ask(&query(name, kind)).await;
        assert_eq!(texts(&answer), expected, "{name}");
        assert!(answer.authoritative && answer.recursion_available);
        assert!(answer.authorities.is_empty());
        assert!(answer.answers.iter().all(|it| it.ttl == 5));
    }
    assert_eq!(dns.counters().answered, 9);
    assert_eq!(dns.counters().queries, 9);
}

#[tokio::test]
async fn what_a_zone_does_not_have_comes_with_its_start() {
    let (_dns, connector) = start(&[]);
    let pod = Pod::new(&connector);
    let (nothing, no_data) = (ResponseCode::NXDomain, ResponseCode::NoError);
    for (name, kind, code, apex) in [
        ("nobody.muslin.", RecordType::A, nothing, "muslin."),
        ("web.n3.muslin.", RecordType::A, nothing, "muslin."),
        ("web.n1.muslin.", RecordType::AAAA, no_data, "muslin."),
        ("web.muslin.", RecordType::PTR, no_data, "muslin."),
        ("n1.muslin.", RecordType::A, no_data, "muslin."),
        ("b.muslin.", RecordType::A, no_data, "muslin."),
        ("muslin.", RecordType::A, no_data, "muslin."),
        (
            "9.1.1.10.in-addr.arpa.",
            RecordType::PTR,
            nothing,
            "1.10.in-addr.arpa.",
        ),
        (
            "1.1.10.in-addr.arpa.",
            RecordType::PTR,
            no_data,
            "1.10.in-addr.arpa.",
        ),
        (
            "x.1.10.in-addr.arpa.",
            RecordType::PTR,
            nothing,
            "1.10.in-addr.arpa.",
        ),
        (
            "02.1.1.10.in-addr.arpa.",
            RecordType::PTR,
            nothing,
            "1.10.in-addr.arpa.",
        ),
        (
            "5.2.1.1.10.in-addr.arpa.",
            RecordType::PTR,
            nothing,
            "1.10.in-addr.arpa.",
        ),
        ("hidden.onion.", RecordType::A, nothing, "onion."),
    ] {
        let answer = pod.ask(&query(name, kind)).await;
        assert_eq!(answer.response_code, code, "{name} {kind}");
        assert!(answer.answers.is_empty() && answer.authoritative, "{name}");
        let [start] = answer.authorities.as_slice() else {
            panic!("{name}: {answer}");
        };
        assert_eq!(start.name.to_string(), apex, "{name}");
        let RData::SOA(data) = &start.data else {
            panic!("{start}")
        };
        assert_eq!((data.minimum, start.ttl), (5, 5));
    }
    let answer = pod.ask(&query("muslin.", RecordType::SOA)).await;
    assert_eq!((answer.answers.len(), answer.authorities.len()), (1, 0));
}

#[tokio::test]
async fn other_names_are_asked_for_as_they_are() {
    fn by_name(query: &Message) -> Vec<Vec<u8>> {
        let mut answer = reply(query);
        // Its own number, flags and the question's letters are the resolver's to see.
        assert!(query.recursion_desired && query.checking_disabled);
        assert_eq!(query.queries[0].name().to_ascii(), "WwW.Example.com.");
        assert_eq!(query.edns.as_ref().unwrap().max_payload(), 1400);
        answer.metadata.authentic_data = true;
        vec![answer.to_vec().unwrap()]
    }
    let (dns, connector) = start(&[resolver(by_name, silent).await]);
    let mut asked = with_size(query("WwW.Example.com.", RecordType::A), 1400);
    asked.metadata.checking_disabled = true;
    let answer = Pod::new(&connector).ask(&asked).await;
    assert_eq!(texts(&answer), ["192.0.2.7"]);
    assert!(answer.authentic_data && !answer.authoritative);
    assert_eq!(answer.answers[0].ttl, 60);
    assert_eq!(dns.counters().forwarded, 1);
}

#[tokio::test]
async fn reverse_names_of_others_are_asked_for() {
    let (_dns, connector) = start(&[resolver(honest, honest).await]);
    let pod = Pod::new(&connector);
    for name in [
        "2.1.2.10.in-addr.arpa.",
        "10.in-addr.arpa.",
        "muslin.example.",
        "xmuslin.",
    ] {
        let answer = pod.ask(&query(name, RecordType::A)).await;
        assert_eq!(texts(&answer), ["192.0.2.7"], "{name}");
    }
}

#[tokio::test]
async fn answers_to_other_questions_do_not_count() {
    fn forged(query: &Message) -> Vec<Vec<u8>> {
        let genuine = reply(query);
        let mut forged = reply(query);
        forged.answers[0].data = RData::A(A([6, 6, 6, 6].into()));
        let mut other_id = forged.clone();
        other_id.metadata.id ^= 1;
        let mut other_name = forged.clone();
        other_name.queries[0].set_name(Name::from_ascii("bank.example.").unwrap());
        let mut other_type = forged.clone();
        other_type.queries[0].set_query_type(RecordType::AAAA);
        let mut none = forged.clone();
        none.queries.clear();
        let mut question = forged.clone();
        question.metadata.message_type = MessageType::Query;
        let all = [other_id, other_name, other_type, none, question, genuine];
        let mut all: Vec<_> = all.iter().map(|it| it.to_vec().unwrap()).collect();
        all.insert(0, b"short".to_vec());
        all
    }
    let (_dns, connector) = start(&[resolver(forged, silent).await]);
    let answer = Pod::new(&connector)
        .ask(&query("example.com.", RecordType::A))
        .await;
    assert_eq!(texts(&answer), ["192.0.2.7"]);
}

#[tokio::test]
async fn numbers_are_not_those_of_the_pod_and_never_the_same() {
    fn tell(query: &Message) -> Vec<Vec<u8>> {
        let mut answer = reply(query);
        answer.answers[0].data = RData::TXT(TXT::new(vec![query.id.to_string()]));
        vec![answer.to_vec().unwrap()]
    }
    let (_dns, connector) = start(&[resolver(tell, silent).await]);
    let pod = Pod::new(&connector);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..20 {
        let mut asked = query("example.com.", RecordType::A);
        asked.metadata.id = 7;
        seen.insert(texts(&pod.ask(&asked).await));
    }
    assert!(seen.len() > 15, "{seen:?}");
}

#[tokio::test]
async fn the_next_resolver_is_asked_and_stays_the_first() {
    static SEEN: AtomicU32 = AtomicU32::new(0);
    fn counting(_: &Message) -> Vec<Vec<u8>> {
        SEEN.fetch_add(1, Ordering::SeqCst);
        Vec::new()
    }
    let (_dead, refusing) = refusing().await;
    let hearing = resolver(honest, honest).await;
    let list = [refusing, resolver(counting, silent).await, hearing];
    let (dns, connector) = start(&list);
    let pod = Pod::new(&connector);
    let began = Instant::now();
    let answer = pod.ask(&query("example.com.", RecordType::A)).await;
    assert_eq!(texts(&answer), ["192.0.2.7"]);
    assert!(began.elapsed() >= Duration::from_secs(1));
    let seen = SEEN.load(Ordering::SeqCst);
    assert!(seen >= 1);
    for _ in 0..5 {
        pod.ask(&query("example.com.", RecordType::A)).await;
    }
    assert_eq!(SEEN.load(Ordering::SeqCst), seen);
    assert_eq!((dns.counters().forwarded, dns.counters().failed), (6, 0));
}

fn with_code(query: &Message, code: ResponseCode) -> Vec<Vec<u8>> {
    let mut answer = query.clone().into_response();
    answer.metadata.recursion_available = true;
    answer.metadata.response_code = code;
    vec![answer.to_vec().unwrap()]
}

fn refused(query: &Message) -> Vec<Vec<u8>> {
    with_code(query, ResponseCode::Refused)
}

fn failed(query: &Message) -> Vec<Vec<u8>> {
    with_code(query, ResponseCode::ServFail)
}

#[tokio::test]
async fn a_failure_of_one_resolver_is_not_the_last_word() {
    fn not_implemented(query: &Message) -> Vec<Vec<u8>> {
        with_code(query, ResponseCode::NotImp)
    }
    fn not_understood(query: &Message) -> Vec<Vec<u8>> {
        let mut answer = query.clone().into_response();
        answer.queries.clear();
        answer.metadata.response_code = ResponseCode::FormErr;
        vec![answer.to_vec().unwrap()]
    }
    /// As a server does that resolves no names.
    fn lame(query: &Message) -> Vec<Vec<u8>> {
        vec![query.clone().into_response().to_vec().unwrap()]
    }
    let asked = query("example.com.", RecordType::A);
    for failing in [failed, refused, not_implemented, not_understood, lame] {
        let list = [
            resolver(failing, failing).await,
            resolver(failing, failing).await,
            resolver(honest, honest).await,
        ];
        let (dns, connector) = start(&list);
        let answer = Pod::new(&connector).ask(&asked).await;
        assert_eq!(texts(&answer), ["192.0.2.7"]);
        let by_tcp = ask_by_tcp(&connector, std::slice::from_ref(&asked)).await.1;
        assert_eq!(texts(&by_tcp[0]), ["192.0.2.7"]);
        assert_eq!((dns.counters().forwarded, dns.counters().failed), (2, 0));
    }
}

#[tokio::test]
async fn where_all_resolvers_fail_the_foremost_is_believed() {
    fn nobody(query: &Message) -> Vec<Vec<u8>> {
        with_code(query, ResponseCode::NXDomain)
    }
    fn nothing(query: &Message) -> Vec<Vec<u8>> {
        with_code(query, ResponseCode::NoError)
    }
    let fails = resolver(failed, failed).await;
    let refuses = resolver(refused, refused).await;
    let is_silent = resolver(silent, silent).await;
    let knows = resolver(honest, honest).await;
    let knows_nobody = resolver(nobody, nobody).await;
    let knows_nothing = resolver(nothing, nothing).await;
    for (list, expected) in [
        (vec![refuses, fails], ResponseCode::Refused),
        (vec![fails, refuses, is_silent], ResponseCode::ServFail),
        (vec![is_silent, refuses], ResponseCode::Refused),
        // That there is nothing is an answer.
        (vec![knows_nobody, knows], ResponseCode::NXDomain),
        (vec![knows_nothing, knows], ResponseCode::NoError),
    ] {
        let (dns, connector) = start(&list);
        let answer = Pod::new(&connector)
            .ask(&query("example.com.", RecordType::A))
            .await;
        assert_eq!(answer.response_code, expected, "{list:?}");
        assert!(answer.answers.is_empty());
        assert_eq!((dns.counters().forwarded, dns.counters().failed), (1, 0));
    }
}

#[tokio::test]
async fn who_does_not_answer_is_not_waited_for_at_each_name() {
    static SEEN: AtomicU32 = AtomicU32::new(0);
    fn counting(query: &Message) -> Vec<Vec<u8>> {
        SEEN.fetch_add(1, Ordering::SeqCst);
        match query.queries[0].name().to_ascii().as_str() {
            "again.example." => honest(query),
            _ => Vec::new(),
        }
    }
    let (_dns, connector) = start(&[resolver(counting, silent).await]);
    let pod = Pod::new(&connector);
    let began = Instant::now();
    let answer = pod.ask(&query("one.example.", RecordType::A)).await;
    assert_eq!(answer.response_code, ResponseCode::ServFail);
    assert!(began.elapsed() >= Duration::from_secs(4));
    let first = SEEN.swap(0, Ordering::SeqCst);
    let answer = pod.ask(&query("two.example.", RecordType::A)).await;
    assert_eq!(answer.response_code, ResponseCode::ServFail);
    let second = SEEN.load(Ordering::SeqCst);
    assert!((1..first).contains(&second), "{first} and {second}");
    // It is found out at once that it answers again.
    let answer = pod.ask(&query("again.example.", RecordType::A)).await;
    assert_eq!(texts(&answer), ["192.0.2.7"]);
    let began = Instant::now();
    pod.ask(&query("three.example.", RecordType::A)).await;
    assert!(began.elapsed() >= Duration::from_secs(4));
}

#[tokio::test]
async fn pods_short_names_are_nobody_elses() {
    let (dns, connector) = start(&[resolver(honest, honest).await]);
    let pod = Pod::new(&connector);
    for (kind, expected) in [
        (RecordType::A, &["10.1.1.2", "10.1.2.2"][..]),
        (RecordType::AAAA, &[]),
    ] {
        let answer = pod.ask(&query("Web.", kind)).await;
        assert_eq!(answer.response_code, ResponseCode::NoError);
        assert_eq!(texts(&answer), expected);
        assert_eq!(answer.authorities.len(), usize::from(expected.is_empty()));
    }
    assert_eq!(dns.counters().forwarded, 0);
    for (name, kind) in [
        ("web.", RecordType::DS),
        ("web.", RecordType::NS),
        ("nobody.", RecordType::A),
        ("n1.", RecordType::A),
        ("a.b.", RecordType::A),
        ("web.n1.", RecordType::A),
        (".", RecordType::A),
    ] {
        let answer = pod.ask(&query(name, kind)).await;
        assert_eq!(texts(&answer), ["192.0.2.7"], "{name} {kind}");
    }
}

#[tokio::test]
async fn a_pod_is_told_when_nobody_answers() {
    let (_dead, refusing) = refusing().await;
    let (dns, connector) = start(&[]);
    let answer = Pod::new(&connector)
        .ask(&query("example.com.", RecordType::A))
        .await;
    assert_eq!(answer.response_code, ResponseCode::Refused);
    assert_eq!((dns.counters().answered, dns.counters().failed), (1, 0));
    for (list, least) in [
        (vec![refusing], 0),
        (vec![resolver(silent, silent).await], 3),
    ] {
        let (dns, connector) = start(&list);
        let began = Instant::now();
        let answer = Pod::new(&connector)
            .ask(&query("example.com.", RecordType::A))
            .await;
        assert_eq!(answer.response_code, ResponseCode::ServFail);
        let took = began.elapsed();
        assert!(took >= Duration::from_secs(least), "{list:?}: {took:?}");
        assert_eq!(dns.counters().failed, 1);
    }
}

#[tokio::test]
async fn a_query_that_is_sent_again_finds_a_resolver_that_lost_one() {
    static SEEN: AtomicU32 = AtomicU32::new(0);
    fn forgetful(query: &Message) -> Vec<Vec<u8>> {
        match SEEN.fetch_add(1, Ordering::SeqCst) {
            0 => Vec::new(),
            _ => honest(query),
        }
    }
    let (_dns, connector) = start(&[resolver(forgetful, silent).await]);
    let answer = Pod::new(&connector)
        .ask(&query("example.com.", RecordType::A))
        .await;
    assert_eq!(texts(&answer), ["192.0.2.7"]);
}

#[tokio::test]
async fn long_answers_are_for_those_who_take_them() {
    fn long(query: &Message) -> Vec<Vec<u8>> {
        let mut answer = reply(query);
        answer.answers[0].data = RData::TXT(TXT::new(vec!["x".repeat(250); 6]));
        vec![answer.to_vec().unwrap()]
    }
    let (_dns, connector) = start(&[resolver(long, long).await]);
    let pod = Pod::new(&connector);
    let plain = query("example.com.", RecordType::TXT);
    for (asked, is_whole) in [
        (plain.clone(), false),
        (with_size(plain.clone(), 100), false),
        (with_size(plain.clone(), 1232), false),
        (with_size(plain.clone(), 1600), true),
        (with_size(plain.clone(), 65_535), true),
    ] {
        let answer = pod.ask(&asked).await;
        assert_eq!(answer.truncation, !is_whole, "{asked}");
        assert_eq!(answer.answers.len(), usize::from(is_whole));
    }
    let (_dns, by_tcp) = ask_by_tcp(&connector, std::slice::from_ref(&plain)).await;
    assert_eq!(by_tcp[0].answers.len(), 1);
    assert!(!by_tcp[0].truncation);
}

/// The answers to queries that are sent at once by one connection, in the queries' order.
async fn ask_by_tcp(connector: &DnsConnector, queries: &[Message]) -> (UnixStream, Vec<Message>) {
    let socket = connector.connect(POD, Protocol::Tcp).unwrap();
    let stream = std::os::unix::net::UnixStream::from(std::os::fd::OwnedFd::from(socket));
    let mut stream = UnixStream::from_std(stream).unwrap();
    for query in queries {
        let bytes = query.to_vec().unwrap();
        write_message(&mut stream, &bytes).await.unwrap();
    }
    let mut answers = std::collections::HashMap::new();
    for _ in queries {
        let bytes = timeout(SOON, read_message(&mut stream)).await.unwrap();
        let bytes = bytes.unwrap().expect("an answer");
        let answer = Message::from_vec(&bytes).unwrap();
        answers.insert(answer.id, bytes);
    }
    let answers = queries
        .iter()
        .map(|query| answer_to(query, &answers[&query.id]));
    let answers = answers.collect();
    (stream, answers)
}

#[tokio::test]
async fn a_connection_has_many_queries_and_ends_when_it_is_idle() {
    let (_dns, connector) = start(&[resolver(silent, honest).await]);
    let all: Vec<_> = (0..40)
        .map(|i| match i % 2 {
            0 => query("web.n1.muslin.", RecordType::A),
            _ => query("example.com.", RecordType::A),
        })
        .collect();
    let (mut stream, answers) = ask_by_tcp(&connector, &all).await;
    for (i, answer) in answers.iter().enumerate() {
        let expected = ["10.1.1.2", "192.0.2.7"][i % 2];
        assert_eq!(texts(answer), [expected]);
    }
    let end = timeout(Duration::from_secs(20), read_message(&mut stream)).await;
    assert_eq!(end.unwrap().unwrap(), None);
}

#[tokio::test]
async fn a_pod_has_so_many_connections_and_queries_and_others_have_theirs() {
    let (dns, connector) = start(&[resolver(silent, silent).await]);
    let mut open = Vec::new();
    for _ in 0..32 {
        let web = query("web.n1.muslin.", RecordType::A);
        open.push(ask_by_tcp(&connector, std::slice::from_ref(&web)).await.0);
    }
    let one_more = connector.connect(POD, Protocol::Tcp).unwrap();
    let one_more = std::os::unix::net::UnixStream::from(std::os::fd::OwnedFd::from(one_more));
    let mut one_more = UnixStream::from_std(one_more).unwrap();
    let end = timeout(SOON, read_message(&mut one_more)).await.unwrap();
    assert!(matches!(end, Ok(None) | Err(_)), "{end:?}");

    let pod = Pod::new(&connector);
    for _ in 0..257 {
        pod.send(&query("example.com.", RecordType::A).to_vec().unwrap())
            .await;
    }
    // The one too many is told at once.
    let began = Instant::now();
    let answer = Message::from_vec(&pod.receive().await).unwrap();
    assert_eq!(answer.response_code, ResponseCode::ServFail);
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(dns.counters().failed, 1);
    assert!(dns.queries.enter(POD.ip()).is_none());
    assert!(dns.queries.enter([10, 1, 1, 3].into()).is_some());
    let known = pod.ask(&query("web.n1.muslin.", RecordType::A)).await;
    assert_eq!(texts(&known), ["10.1.1.2"]);
}

/// The service shares the test's thread, so that all queries are there before it sees one.
#[tokio::test]
async fn a_pod_with_many_full_sockets_does_not_hold_up_another() {
    let resolvers = Resolvers::at(Vec::new());
    let dns = Dns::new(NETWORKS.parse().unwrap(), None, names(), resolvers);
    let (connector, pod_sockets) = DnsConnector::new();
    let web = query("web.n1.muslin.", RecordType::A);
    let bytes = web.to_vec().unwrap();
    let fill = || {
        let socket = connector.connect(POD, Protocol::Udp).unwrap();
        let sent = std::iter::repeat_with(|| socket.send(&bytes)).take(50);
        (sent.filter(|sent| sent.is_ok()).count(), socket)
    };
    let full: Vec<_> = std::iter::repeat_with(fill).take(40).collect();
    let waiting: usize = full.iter().map(|(sent, _)| sent).sum();
    assert!(waiting > 1000, "only {waiting} queries wait");
    let other = connector.connect(SocketAddr::from(([10, 1, 1, 3], 5353)), Protocol::Udp);
    let other = Pod(UnixSeqpacket::try_from(std::os::fd::OwnedFd::from(other.unwrap())).unwrap());
    other.send(&bytes).await;
    tokio::spawn(serve::receive(dns.clone(), pod_sockets));
    assert_eq!(
        texts(&answer_to(&web, &other.receive().await)),
        ["10.1.1.2"]
    );
    let before = dns.counters().queries;
    assert!(before < 20, "{before} queries came first");
    let deadline = Instant::now() + SOON;
    while dns.counters().queries < waiting as u64 + 1 {
        assert!(Instant::now() < deadline, "{:?}", dns.counters());
        tokio::task::yield_now().await;
    }
}

#[test]
fn pods_that_want_all_places_leave_some() {
    let quota = Quota::new(QUERIES);
    let pods = |last: u8| (0..last).map(|pod| Ipv4Addr::new(10, 1, 1, pod));
    let mut tickets = Vec::new();
    for _ in 0..1024 {
        tickets.extend(pods(7).filter_map(|pod| quota.enter(pod.into())));
    }
    assert_eq!(tickets.len(), 7 * 128);
    let late = std::iter::from_fn(|| quota.enter([10, 1, 2, 2].into()));
    assert_eq!(late.take(1024).collect::<Vec<_>>().len(), 64);
    tickets.clear();
    let one = std::iter::from_fn(|| quota.enter(POD.ip())).collect::<Vec<_>>();
    assert_eq!(one.len(), 256);
}

#[tokio::test]
async fn what_is_not_understood_is_told_by_its_code() {
    let (_dns, connector) = start(&[]);
    let pod = Pod::new(&connector);
    let good = query("web.muslin.", RecordType::A);
    let bytes = good.to_vec().unwrap();
    let change = |what: &dyn Fn(&mut Message)| {
        let mut message = good.clone();
        what(&mut message);
        message.to_vec().unwrap()
    };
    for (bytes, code) in [
        (
            change(&|it| it.metadata.op_code = OpCode::Notify),
            ResponseCode::NotImp,
        ),
        (
            change(&|it| it.metadata.op_code = OpCode::Update),
            ResponseCode::NotImp,
        ),
        (change(&|it| it.queries.clear()), ResponseCode::FormErr),
        (
            change(&|it| it.queries.push(it.queries[0].clone())),
            ResponseCode::FormErr,
        ),
        (bytes[..bytes.len() - 1].to_vec(), ResponseCode::FormErr),
        (bytes[..12].to_vec(), ResponseCode::FormErr),
        (
            change(&|it| {
                it.queries[0].set_query_type(RecordType::AXFR);
            }),
            ResponseCode::Refused,
        ),
        (
            change(&|it| {
                it.queries[0].set_query_class(DNSClass::CH);
            }),
            ResponseCode::Refused,
        ),
        (
            change(&|it| {
                it.set_edns(Edns::new())
                    .edns
                    .as_mut()
                    .unwrap()
                    .set_version(1);
            }),
            ResponseCode::BADVERS,
        ),
    ] {
        // Nothing is answered to an answer, nor to what has no header.
        pod.send(&change(&|it| {
            it.metadata.message_type = MessageType::Response
        }))
        .await;
        pod.send(&bytes[..11]).await;
        pod.send(&bytes).await;
        let answer = Message::from_vec(&pod.receive().await).unwrap();
        assert_eq!(
            (answer.id, u16::from(answer.response_code)),
            (good.id, u16::from(code)),
            "{bytes:?}"
        );
    }
}

#[test]
fn the_hosts_resolvers_are_read_again_when_they_change() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("resolv.conf");
    let read = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let resolvers = Resolvers::in_file(&path, NETWORKS.parse::<Nets>().unwrap());
        let list = resolvers.list();
        list.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(
        read("search x\nnameserver 127.0.0.53\n# no\nnameserver 10.1.1.1\nnameserver fe80::1%1\n"),
        ["127.0.0.53:53", "[fe80::1%1]:53"]
    );
    assert_eq!(read(""), ["127.0.0.1:53", "[::1]:53"]);
    assert_eq!(read("nameserver 10.1.1.1\n").len(), 0);
    assert_eq!(
        read("rubbish\nnameserver 1.1.1.1\nnameserver x\n"),
        ["1.1.1.1:53"]
    );
    let missing = Resolvers::in_file("/nonexistent", NETWORKS.parse::<Nets>().unwrap());
    assert!(!missing.list().is_empty());
    let changing = Resolvers::in_file(&path, NETWORKS.parse::<Nets>().unwrap());
    assert_eq!(changing.list(), ["1.1.1.1:53".parse().unwrap()]);
    std::fs::write(&path, "nameserver 9.9.9.9\n").unwrap();
    let deadline = std::time::Instant::now() + SOON;
    while changing.list() != ["9.9.9.9:53".parse().unwrap()] {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn resolvers_in_the_pod_network_are_refused() {
    let network: Nets = NETWORKS.parse().unwrap();
    for bad in ["10.1.1.1", "0.0.0.0", "224.0.0.1", "fd00:1::1", "ff02::1"] {
        let error = Resolvers::named(&[bad.parse().unwrap()], network).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(bad), "{error}");
    }
    let good = ["127.0.0.1", "::1", "10.2.0.1"].map(|it| it.parse().unwrap());
    assert_eq!(Resolvers::named(&good, network).unwrap().list().len(), 3);
}

/// A pod that asks by IPv6.
fn pod_v6(connector: &DnsConnector) -> Pod {
    let address: SocketAddr = "[fd00:1:1::2]:5353".parse().unwrap();
    let socket = connector.connect(address, Protocol::Udp).unwrap();
    Pod(UnixSeqpacket::try_from(std::os::fd::OwnedFd::from(socket)).unwrap())
}

fn records(query: &Message, records: &[(&str, u32, RData)]) -> Vec<Vec<u8>> {
    let mut answer = Message::response(query.id, OpCode::Query);
    answer.metadata.recursion_available = true;
    answer.add_query(query.queries[0].clone());
    for (name, ttl, data) in records {
        let name = Name::from_ascii(name).unwrap();
        answer.add_answer(Record::from_rdata(name, *ttl, data.clone()));
    }
    vec![answer.to_vec().unwrap()]
}

/// What a resolver knows of names that have addresses of one version or of both.
fn of_versions(query: &Message) -> Vec<Vec<u8>> {
    let question = &query.queries[0];
    let name = question.name().to_string();
    let a = |ttl, octets: [u8; 4]| (ttl, RData::A(A(octets.into())));
    let aaaa = |text: &str| (300, RData::AAAA(AAAA(text.parse().unwrap())));
    let all = match (name.as_str(), question.query_type()) {
        ("four.example.", RecordType::A) => vec![a(60, [192, 0, 2, 7]), a(900, [10, 0, 0, 1])],
        ("private.example.", RecordType::A) => vec![a(60, [10, 0, 0, 1])],
        ("mapped.example.", RecordType::A) => vec![a(900, [192, 0, 2, 8])],
        ("mapped.example.", RecordType::AAAA) => vec![aaaa("::ffff:192.0.2.8")],
        ("six.example.", RecordType::AAAA) => vec![aaaa("2001:db8::7")],
        ("six.example.", RecordType::A) => vec![a(60, [192, 0, 2, 9])],
        _ => vec![],
    };
    let all: Vec<_> = all
        .into_iter()
        .map(|(ttl, data)| (&*name, ttl, data))
        .collect();
    records(query, &all)
}

#[tokio::test]
async fn names_without_ipv6_have_addresses_that_mean_ipv4_for_who_asks_by_ipv6() {
    let address = resolver(of_versions, silent).await;
    let nat64 = Some(Nat64Prefix::WELL_KNOWN);
    let (dns, connector) = start_with(nat64, Resolvers::at(vec![address]));
    let pod = pod_v6(&connector);
    for (name, expected) in [
        // The well-known prefix means public addresses (RFC 6052 section 3.1).
        ("four.example.", &["64:ff9b::c000:207"][..]),
        ("mapped.example.", &["64:ff9b::c000:208"]),
        ("six.example.", &["2001:db8::7"]),
        ("private.example.", &[]),
        ("none.example.", &[]),
    ] {
        let answer = pod.ask(&query(name, RecordType::AAAA)).await;
        assert_eq!(texts(&answer), expected, "{name}");
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    }
    let answer = pod.ask(&query("four.example.", RecordType::AAAA)).await;
    assert_eq!(answer.answers[0].ttl, 60);
    let answer = pod.ask(&query("mapped.example.", RecordType::AAAA)).await;
    assert_eq!(answer.answers[0].ttl, 600, "as long as made ones hold");

    // Who verifies names is told what there is (RFC 6147 section 5.5), and so is who asks by IPv4.
    let mut checking = query("four.example.", RecordType::AAAA);
    checking.metadata.checking_disabled = true;
    let mut secure = with_size(query("four.example.", RecordType::AAAA), 1232);
    secure.edns.as_mut().unwrap().set_dnssec_ok(true);
    for query in [checking, secure] {
        pod.send(&query.to_vec().unwrap()).await;
        let answer = Message::from_vec(&pod.receive().await).unwrap();
        assert_eq!(answer.answers, []);
    }
    let by_ipv4 = Pod::new(&connector);
    let answer = by_ipv4.ask(&query("four.example.", RecordType::AAAA)).await;
    assert_eq!(answer.answers, []);
    assert_eq!(dns.counters().failed, 0);
}

#[tokio::test]
async fn the_name_that_tells_the_prefix_is_answered_here_if_there_is_one() {
    let (_dns, connector) = start_with(Some(Nat64Prefix::WELL_KNOWN), Resolvers::at(vec![]));
    let pod = pod_v6(&connector);
    for (kind, expected) in [
        (RecordType::A, &["192.0.0.170", "192.0.0.171"][..]),
        (RecordType::AAAA, &["64:ff9b::c000:aa", "64:ff9b::c000:ab"]),
        (RecordType::TXT, &[]),
    ] {
        let answer = pod.ask(&query("ipv4only.arpa.", kind)).await;
        assert_eq!(texts(&answer), expected);
    }
    let (_dns, connector) = start(&[]);
    let pod = pod_v6(&connector);
    let answer = pod.ask(&query("ipv4only.arpa.", RecordType::AAAA)).await;
    assert_eq!(
        answer.metadata.response_code,
        ResponseCode::Refused,
        "it is for resolvers"
    );
}

#[tokio::test]
async fn addresses_of_ipv6_have_names_and_names_have_them() {
    let names = names();
    let json = r#"{"node":"n1","subnet":"10.1.1.0/24,fd00:1:1::/64",
        "pods":[{"name":"dual","address":"10.1.1.9,fd00:1:1::9"}]}"#;
    let record: NodeRecord = serde_json::from_str(json).unwrap();
    names.write().lease(record.subnet.ipv6().unwrap());
    names.write().set(record);
    let networks: Nets = NETWORKS.parse().unwrap();
    let (_dns, connector) = super::start(networks, None, names, Resolvers::at(vec![])).unwrap();
    let pod = pod_v6(&connector);
    let reverse = Name::from(IpAddr::from_str("fd00:1:1::9").unwrap()).to_string();
    for (name, kind, expected) in [
        ("dual.n1.muslin.", RecordType::AAAA, &["fd00:1:1::9"][..]),
        ("dual.n1.muslin.", RecordType::A, &["10.1.1.9"]),
        (&reverse, RecordType::PTR, &["dual.n1.muslin."]),
    ] {
        let answer = pod.ask(&query(name, kind)).await;
        assert_eq!(texts(&answer), expected, "{name}");
    }
    for (name, code) in [
        ("0.0.d.f.ip6.arpa.", ResponseCode::Refused),
        ("1.0.0.0.0.0.d.f.ip6.arpa.", ResponseCode::NoError),
        ("x.1.0.0.0.0.0.d.f.ip6.arpa.", ResponseCode::NXDomain),
        ("8.b.d.0.1.0.0.2.ip6.arpa.", ResponseCode::Refused),
    ] {
        let answer = pod.ask(&query(name, RecordType::PTR)).await;
        assert_eq!(answer.metadata.response_code, code, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_bytes_are_taken(
        head in prop::sample::select(vec![0u8, 1]),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        place in 0usize..60,
        flip: u8,
    ) {
        let zones = Zones::new(NETWORKS.parse().unwrap(), None);
        let all = names();
        let mut mutated = with_size(query("web.n1.muslin.", RecordType::A), 1232).to_vec().unwrap();
        if let Some(byte) = mutated.get_mut(place) {
            *byte ^= flip;
        }
        let mut random = vec![0, 7, head, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        random.extend(&bytes);
        for bytes in [&bytes, &mutated, &random] {
            match Request::read(bytes, Transport::Datagram) {
                Ok(request) => {
                    if let Some(answer) = zones.answer(&request, &all.read()) {
                        let answer = request.encode(&answer);
                        prop_assert!(answer.len() <= request.limit());
                        prop_assert_eq!(&answer[..2], &bytes[..2]);
                    }
                    prop_assert_eq!(&request.failure()[..2], &bytes[..2]);
                }
                Err(Rejected::With(answer)) => prop_assert_eq!(&answer[..2], &bytes[..2]),
                Err(Rejected::NoQuery) => {}
            }
        }
    }
}
