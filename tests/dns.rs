//! Pods find each other by name, on their node and on others, and the world outside by the resolvers
//! of the host.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{RData, Record};
use muslin_lab::etcd::{Etcd, PREFIX, TTL};
use muslin_lab::watch::stretched;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until};

const N1: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const N2: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 53);
/// On the underlay, where nobody has it.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 99);
/// Tells the test program that it is to be the resolver, and where.
const INSIDE: &str = "MUSLIN_TEST_RESOLVER";
/// Bytes of an answer that a datagram of the usual size does not hold.
const LARGE: usize = 3000;

/// A resolver outside the pod network that knows `www.example.`, `intranet.corp.example.` and
/// `large.example.`, and never answers for `silent.example.`.
struct Resolver {
    child: Child,
    _host: Host,
}

impl Resolver {
    fn start(lab: &Lab) -> Self {
        let host = lab.host("resolver", RESOLVER);
        let mut command = host.command(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "--nocapture", "the_resolver"]);
        command.env(INSIDE, RESOLVER.to_string());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap);
        assert!(lines.any(|line| line.contains("READY")));
        Self { child, _host: host }
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "the part inside the lab"]
fn the_resolver() {
    let Ok(address) = std::env::var(INSIDE) else {
        return;
    };
    let socket = UdpSocket::bind((address.as_str(), 53)).unwrap();
    let listener = TcpListener::bind((address.as_str(), 53)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut len = [0; 2];
            stream.read_exact(&mut len).unwrap();
            let mut query = vec![0; u16::from_be_bytes(len).into()];
            stream.read_exact(&mut query).unwrap();
            if let Some(answer) = answer(&query, usize::MAX) {
                let len = u16::try_from(answer.len()).unwrap().to_be_bytes();
                stream.write_all(&[&len[..], &answer].concat()).unwrap();
            }
        }
    });
    println!("READY");
    let mut buffer = [0; 65_536];
    loop {
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        let query = Message::from_vec(&buffer[..len]).unwrap();
        let limit = query.edns.as_ref().map_or(512, |edns| edns.max_payload());
        if let Some(answer) = answer(&buffer[..len], limit.into()) {
            socket.send_to(&answer, from).unwrap();
        }
    }
}

fn answer(query: &[u8], limit: usize) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).unwrap();
    let name = query.queries[0].name().clone();
    let mut answer = query.into_response();
    answer.metadata.recursion_available = true;
    let data = match name.to_ascii().as_str() {
        "www.example." | "intranet.corp.example." => RData::A(A([192, 0, 2, 7].into())),
        "large.example." => RData::TXT(TXT::new(vec!["x".repeat(250); LARGE / 250])),
        "silent.example." => return None,
        _ => {
            answer.metadata.response_code = ResponseCode::NXDomain;
            return answer.to_vec().ok();
        }
    };
    answer.add_answer(Record::from_rdata(name, 60, data));
    let whole = answer.to_vec().unwrap();
    if whole.len() <= limit {
        return Some(whole);
    }
    answer.truncate().to_vec().ok()
}

/// What a script in a pod of its own prints.
fn in_pod(node: &Node, script: &str) -> String {
    let mut command = node.client(&["run", "--", "sh", "-c", script]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.is_empty(), "{script}: {text}\n{told}{}", node.log());
    text
}

fn dig(node: &Node, words: &str) -> String {
    in_pod(node, &format!("dig +tries=1 +time=10 {words}"))
}

/// Waits until pods of a node find this under a name.
fn wait_found(node: &Node, name: &str, expected: &str) {
    let what = format!("{name} to be '{expected}'{}", node.log());
    poll_until(SOON, &what, || {
        (dig(node, &format!("+short {name}")) == expected).then_some(())
    });
}

fn address_of(node: &Node, pod: &str) -> String {
    let pods = node.query("pods");
    let mut rows = pods.as_array().unwrap().iter();
    let row = rows.find(|row| row["pod"] == pod).unwrap();
    row["address"].as_str().unwrap().to_owned()
}

fn counter(node: &Node, which: &str) -> u64 {
    node.query("status")["dns"][which].as_u64().unwrap()
}

fn two_nodes(lab: &Lab, store: &str) -> [Node; 2] {
    let start = |name: &str, address| {
        let config = NodeConfig::new(name, address, store);
        config.start(&lab.host(name, address))
    };
    let nodes = [start("n1", N1), start("n2", N2)];
    nodes.iter().for_each(|node| node.wait_peers(1));
    nodes
}

/// Pods of one node find those of the other, by every name that they have.
fn find_each_other([n1, n2]: &[Node; 2]) {
    let web = n2.pod("web");
    let address = address_of(n2, "web");
    wait_found(n1, "web.muslin", &address);
    for words in [
        "web.n2.muslin",
        "WEB.N2.MUSLIN",
        "+tcp web.muslin",
        "+noedns web.muslin",
    ] {
        assert_eq!(dig(n1, &format!("+short {words}")), address, "{words}");
    }
    assert_eq!(dig(n1, &format!("+short -x {address}")), "web.n2.muslin.");
    assert_eq!(dig(n2, "+short web.muslin"), address);
    assert_eq!(
        in_pod(n1, "getent ahostsv4 web | head -n 1 | cut -d ' ' -f 1"),
        address
    );
    let found = in_pod(n1, &format!("getent hosts {address}"));
    assert!(found.ends_with("web.n2.muslin"), "{found}");
    let nobody = dig(n1, "nobody.muslin");
    assert!(
        nobody.contains("status: NXDOMAIN") && nobody.contains("SOA"),
        "{nobody}"
    );
    assert!(nobody.contains(" aa "), "{nobody}");
    let no_data = dig(n1, "web.muslin AAAA");
    assert!(
        no_data.contains("status: NOERROR") && no_data.contains("ANSWER: 0"),
        "{no_data}"
    );

    // Two of one name are both found.
    let twin = n1.pod("web");
    let both = {
        let mut both = [address.clone(), address_of(n1, "web")];
        both.sort_unstable();
        both.join("\n")
    };
    poll_until(SOON, "both pods", || {
        (dig(n2, "+short web.muslin | sort") == both).then_some(())
    });
    drop((web, twin));
    for node in [n1, n2] {
        wait_found(node, "web.muslin", "");
        wait_found(node, &format!("-x {address}"), "");
    }
    assert_eq!(counter(n1, "forwarded") + counter(n2, "forwarded"), 0);
}

#[test]
fn pods_of_two_nodes_find_each_other_by_the_embedded_store() {
    let Some(lab) = Lab::new() else { return };
    let nodes = two_nodes(&lab, &lab.store());
    find_each_other(&nodes);
    // A node that leaves takes its names along.
    let [n1, n2] = &nodes;
    let _web = n2.pod("web");
    wait_found(n1, "web.n2.muslin", &address_of(n2, "web"));
    assert!(n2.client(&["leave"]).status().unwrap().success());
    wait_found(n1, "web.n2.muslin", "");
}

#[test]
fn pods_of_two_nodes_find_each_other_by_etcd() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let nodes = two_nodes(&lab, &etcd.store());
    find_each_other(&nodes);
    let [n1, mut n2] = nodes;
    let web = n2.pod("web");
    let address = address_of(&n2, "web");
    wait_found(&n1, "web.n2.muslin", &address);

    // The record is beside flannel's keys, and lives as a lease does.
    let subnet = n2.status("subnet").replace('/', "-");
    let key = format!("{PREFIX}/muslin/pods/{subnet}");
    let record = etcd.get(&key).unwrap();
    assert!(record.value.contains(&address), "{record:?}");
    assert_eq!(etcd.time_to_live(record.lease).0, TTL);
    let mut leases = etcd.leases(PREFIX).into_iter();
    let lease = leases.find(|it| it.key.ends_with(&subnet)).unwrap().lease;
    assert_eq!(etcd.leases(PREFIX).len(), 2);

    // What others write there counts for nothing, and what they delete is written again.
    let forged = |subnet: &str, address: &str| {
        let pods = format!(r#"[{{"name":"forged","address":"{address}"}}]"#);
        format!(r#"{{"node":"n9","subnet":"{subnet}","pods":{pods}}}"#)
    };
    let names = |subnet: &str| format!("{PREFIX}/muslin/pods/{subnet}");
    etcd.put(&names("rubbish"), "rubbish");
    etcd.put(&names("10.244.250.0-24"), "rubbish");
    etcd.put(
        &names("10.244.251.0-24"),
        &forged("10.244.251.0/24", "10.244.251.2"),
    );
    etcd.put(&names("10.99.0.0-24"), &forged("10.99.0.0/24", "10.99.0.2"));
    let own = n1.status("subnet");
    etcd.put(
        &names(&own.replace('/', "-")),
        &forged(&own, &n1.address(9).to_string()),
    );
    etcd.delete(&key);
    poll_until(SOON, "the record", || etcd.get(&key));
    wait_found(&n1, "web.n2.muslin", &address);
    assert_eq!(dig(&n1, "+short forged.muslin"), "");

    // A node that is killed keeps its lease, and its names with it.
    n2.kill();
    assert_eq!(dig(&n1, "+short web.n2.muslin"), address);
    etcd.revoke(lease);
    wait_found(&n1, "web.n2.muslin", "");
    assert!(etcd.get(&key).is_some());
    drop(web);
}

#[test]
fn names_outlive_an_outage_of_the_store() {
    let Some(lab) = Lab::new() else { return };
    let Some(mut etcd) = Etcd::start(&lab) else {
        return;
    };
    let [n1, n2] = two_nodes(&lab, &etcd.store());
    let web = n2.pod("web");
    let address = address_of(&n2, "web");
    wait_found(&n1, "web.muslin", &address);
    etcd.kill();
    let late = n2.pod("late");
    assert_eq!(dig(&n1, "+short web.muslin"), address);
    etcd.start_again();
    wait_found(&n1, "late.muslin", &address_of(&n2, "late"));
    // One that has lost everything learns it anew.
    etcd.wipe();
    poll_until(SOON, "the record", || {
        let records = etcd.list(&format!("{PREFIX}/muslin/pods/")).0;
        records
            .iter()
            .any(|it| it.value.contains("late"))
            .then_some(())
    });
    wait_found(&n1, "late.muslin", &address_of(&n2, "late"));
    assert_eq!(dig(&n1, "+short web.muslin"), address);
    drop((web, late));
}

#[test]
fn other_names_go_to_the_resolvers_of_the_host() {
    let Some(lab) = Lab::new() else { return };
    let _resolver = Resolver::start(&lab);
    let host = lab.host("n1", N1);
    let file = lab.directory().join("resolv.conf");
    std::fs::write(&file, format!("nameserver {RESOLVER}\n")).unwrap();
    host.sh(&format!("mount --bind {} /etc/resolv.conf", file.display()));
    let node = NodeConfig::new("n1", N1, &lab.store()).start(&host);
    assert_eq!(dig(&node, "+short www.example"), "192.0.2.7");
    assert_eq!(dig(&node, "+short +tcp www.example"), "192.0.2.7");
    let found = in_pod(&node, "getent ahostsv4 www.example | head -n 1");
    assert!(found.starts_with("192.0.2.7 "), "{found}");
    assert!(dig(&node, "nobody.example").contains("status: NXDOMAIN"));

    let whole = dig(&node, "+bufsize=4096 large.example TXT");
    assert!(
        !whole.contains("TCP mode") && whole.contains("(UDP)"),
        "{whole}"
    );
    assert!(whole.matches('x').count() > LARGE - 250, "{whole}");
    let cut = dig(&node, "+ignore large.example TXT");
    assert!(cut.contains(" tc ") && cut.contains("ANSWER: 0"), "{cut}");
    let by_tcp = dig(&node, "large.example TXT");
    assert!(
        by_tcp.contains("TCP mode") && by_tcp.contains("(TCP)"),
        "{by_tcp}"
    );
    assert!(by_tcp.matches('x').count() > LARGE - 250, "{by_tcp}");
    assert_eq!(counter(&node, "failed"), 0);
    assert_eq!(node.query("status")["dns"]["resolvers"][0], "10.9.0.53:53");

    // The zones of pods are nobody else's.
    for words in ["nobody.muslin", "-x 10.244.255.254", "muslin NS"] {
        let before = counter(&node, "forwarded");
        dig(&node, words);
        assert_eq!(counter(&node, "forwarded"), before, "{words}");
    }
}

#[test]
fn short_names_of_the_host_are_found_as_the_host_finds_them() {
    let Some(lab) = Lab::new() else { return };
    let _resolver = Resolver::start(&lab);
    let host = lab.host("n1", N1);
    let file = lab.directory().join("resolv.conf");
    let write = |text: &str| std::fs::write(&file, format!("{text}nameserver {RESOLVER}\n"));
    write("search corp.example\noptions timeout:9 edns0\n").unwrap();
    host.sh(&format!("mount --bind {} /etc/resolv.conf", file.display()));
    let node = NodeConfig::new("n1", N1, &lab.store()).start(&host);
    let web = node.pod("web");
    let gateway = node.address(1);
    let expected =
        format!("search muslin corp.example\noptions timeout:9 edns0\nnameserver {gateway}");
    let text = in_pod(&node, "grep -v ^# /etc/resolv.conf");
    assert_eq!(text, expected);
    let first = |name: &str| {
        let script = format!("getent ahostsv4 {name} | head -n 1 | cut -d ' ' -f 1");
        in_pod(&node, &script)
    };
    assert_eq!(first("intranet"), "192.0.2.7");
    let forwarded = counter(&node, "forwarded");
    assert_eq!(first("web"), address_of(&node, "web"));
    // Whoever asks for the name as it is has the same answer, and nobody outside is asked.
    assert_eq!(dig(&node, "+short web."), address_of(&node, "web"));
    assert!(dig(&node, "web. AAAA").contains("status: NOERROR"));
    assert_eq!(counter(&node, "forwarded"), forwarded);
    drop(web);

    // A pod that starts later looks where the host looks by then.
    write("search other.example\n").unwrap();
    let expected = format!("search muslin other.example\nnameserver {gateway}");
    poll_until(SOON, "the new domain", || {
        (in_pod(&node, "grep -v ^# /etc/resolv.conf") == expected).then_some(())
    });
}

#[test]
fn a_pod_is_told_in_time_that_no_resolver_answers() {
    let Some(lab) = Lab::new() else { return };
    let _resolver = Resolver::start(&lab);
    // What the first node has said of its pods may outlive it in the store.
    for (resolver, name, pod) in [
        (NOBODY, "www.example", "one"),
        (RESOLVER, "silent.example", "other"),
    ] {
        let host = lab.host("node", Ipv4Addr::new(10, 9, 0, 1 + resolver.octets()[3]));
        let public_ip = Ipv4Addr::new(10, 9, 0, 1 + resolver.octets()[3]);
        let node = NodeConfig::new("n1", public_ip, &lab.store()).with("--dns", resolver);
        let node = node.start(&host);
        let began = Instant::now();
        let told = dig(&node, name);
        assert!(told.contains("status: SERVFAIL"), "{told}");
        assert!(
            began.elapsed() < stretched(Duration::from_secs(8)),
            "{:?}",
            began.elapsed()
        );
        assert_eq!(counter(&node, "failed"), 1);
        let _pod = node.pod(pod);
        let address = address_of(&node, pod);
        assert_eq!(dig(&node, &format!("+short {pod}.muslin")), address);
    }
}

#[test]
fn garbage_does_no_harm() {
    let Some(lab) = Lab::new() else { return };
    let node = NodeConfig::new("n1", N1, &lab.store()).with("--dns", NOBODY);
    let node = node.start(&lab.host("n1", N1));
    let gateway = node.address(1);
    // By UDP and by TCP: nothing, a little, an answer, and random bytes of every length.
    let script = format!(
        r#"perl -MSocket -e '
            my $to = pack_sockaddr_in(53, inet_aton("{gateway}"));
            socket(my $udp, PF_INET, SOCK_DGRAM, 0) or die;
            for my $len (0 .. 600, 4096, 9000) {{
                send($udp, join("", map {{ chr(rand 256) }} 1 .. $len), 0, $to);
            }}
            send($udp, pack("nnnnnn", 7, 0x8000, 1, 0, 0, 0), 0, $to);
            for my $len (0 .. 20) {{
                socket(my $tcp, PF_INET, SOCK_STREAM, 0) or die;
                connect($tcp, $to) or die;
                syswrite($tcp, join("", map {{ chr(rand 256) }} 1 .. $len));
                close($tcp);
            }}
            print "sent\n"'"#
    );
    assert_eq!(in_pod(&node, &script), "sent");
    let known = node.pod("known");
    let address = address_of(&node, "known");
    assert_eq!(dig(&node, "+short known.muslin"), address);
    assert_eq!(dig(&node, "+short +tcp known.muslin"), address);
    assert!(dig(&node, "+opcode=status known.muslin").contains("status: NOTIMP"));
    assert!(dig(&node, "+edns=1 +noednsnegotiation known.muslin").contains("status: BADVERS"));
    drop(known);
    assert!(!node.log().contains("panicked"), "{}", node.log());
}

#[test]
fn names_of_pods_have_answers_where_there_is_no_way_out() {
    let Some(lab) = Lab::new() else { return };
    let node = NodeConfig::new("n1", N1, &lab.store()).with("--egress", "off");
    let node = node.start(&lab.host("n1", N1));
    let known = node.pod("known");
    assert_eq!(
        dig(&node, "+short known.n1.muslin"),
        address_of(&node, "known")
    );
    assert!(dig(&node, "www.example").contains("status: REFUSED"));
    drop(known);
}

#[test]
fn a_static_list_knows_the_pods_of_its_own_node() {
    let Some(lab) = Lab::new() else { return };
    let list = lab.directory().join("nodes.toml");
    let text = format!(
        "network = \"10.244.0.0/16\"\n[[node]]\npublic-ip = \"{N1}\"\nsubnet = \"10.244.1.0/24\"\n"
    );
    std::fs::write(&list, text).unwrap();
    let node = NodeConfig::new("n1", N1, &format!("file:{}", list.display()));
    let node = node.start(&lab.host("n1", N1));
    let known = node.pod("known");
    assert_eq!(
        dig(&node, "+short known.muslin"),
        address_of(&node, "known")
    );
    assert!(
        node.log().contains("cannot store their names"),
        "{}",
        node.log()
    );
    drop(known);
}
