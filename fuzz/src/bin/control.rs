//! What a node says to other programs of its machine: messages of the control socket, and
//! `subnet.env`. What is read is printed as bytes that read the same, what is made reads as it was
//! made, and a plain reading of simple files agrees.
#![cfg_attr(fuzzing, no_main)]

use std::fmt::Debug;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::Ipv4Net;
use muslin_fuzz::Seed;
use muslin_stack::addresses::{Addresses, Dual};
use muslin_stack::api::control::{self, Answer, Attach, Attached, Request};
use muslin_stack::api::events::Event;
use muslin_stack::api::exchange;
use muslin_stack::api::live;
use muslin_stack::api::subnet_env::{SubnetEnv, subnet_of};
use muslin_stack::control::ipam::PodName;
use serde::Serialize;
use serde::de::DeserializeOwned;

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        b"{\"attach\":{\"pod\":null,\"address\":null,\"persistent\":false}}",
        b"{\"detach\":{\"pod\":\"web-1\"}}",
        b"{\"report\":\"neighbours\"}",
        b"\"leave\"",
        b"\"done\"",
        b"{\"hello\":{\"protocol\":1,\"version\":\"\"}}",
        b"{\"welcome\":{\"protocol\":1,\"queues\":2}}",
        b"{\"refused\":{\"usage\":true,\"code\":\"port-taken\",\"message\":\"\"}}",
        b"\"not-ready\"",
        b"\x01\x00\x01{\"live\":{\"seen\":{\"id\":7}}}",
        b"\x02\x00\x01{\"refused\":\"\"}",
        b"{\"trace\":{\"by\":\"tunnel\",\"source\":\"192.0.2.1:8472\",\"packet\":\"4500+20\"}}",
        b"{\"rows\":{\"rows\":[],\"more\":false}}",
        b"{\"packets\":0,\"bytes\":0}",
        b"\"10.244.1.0/24\"",
        b"\"10.244.1.2\"",
        b"\"10.244.1.2,fd00::2\"",
        b"FLANNEL_NETWORK=10.244.0.0/16\n",
        b"FLANNEL_SUBNET=10.244.1.1/24\n",
        b"FLANNEL_SUBNET=",
        b"FLANNEL_MTU=1450\n",
        b"FLANNEL_IPMASQ=true\n",
        b"export ",
        b"${",
        b"\\",
        b"'",
        b"\"",
    ],
    inputs: 1_000_000,
    max_len: 800,
}

/// What the first byte chooses.
const REQUEST: u8 = 0;
const ANSWER: u8 = 1;
const ROW: u8 = 2;
const SUBNET_ENV: u8 = 3;
const MADE_REQUEST: u8 = 4;
const MADE_SUBNET_ENV: u8 = 5;
const EXCHANGE: u8 = 6;
const KINDS: u8 = 7;

/// The first byte chooses what the rest is.
fn run(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    match choice % KINDS {
        REQUEST => request(bytes),
        ANSWER => answer(bytes),
        ROW => row(choice / KINDS, bytes),
        SUBNET_ENV => read_subnet_env(bytes),
        MADE_REQUEST => made_request(bytes),
        EXCHANGE => exchanged(bytes),
        _ => made_subnet_env(bytes),
    }
}

/// A message, and the same once more by way of its bytes.
fn message<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let read: T = serde_json::from_slice(bytes).ok()?;
    let printed = serde_json::to_vec(&read).expect("it can be printed");
    let again: T = serde_json::from_slice(&printed).expect("what is printed is a message");
    assert_eq!(again, read);
    let twice = serde_json::to_vec(&again).expect("it can be printed");
    assert_eq!(twice, printed);
    Some(read)
}

fn request(bytes: &[u8]) {
    let name = match message(bytes) {
        Some(Request::Attach(attach)) => attach.pod,
        Some(
            Request::Detach { pod }
            | Request::KeepNamespaces { pod, .. }
            | Request::Namespaces { pod },
        ) => Some(pod),
        _ => None,
    };
    if let Some(name) = name {
        let name = name.as_str();
        assert!(is_pod_name(name), "{name}");
    }
}

fn answer(bytes: &[u8]) {
    if let Some(Answer::Refused(refusal)) = message(bytes) {
        // Clients from before there were codes can show it.
        let printed = serde_json::to_value(&refusal).expect("it can be printed");
        assert_eq!(printed["usage"], refusal.code.is_usage());
        assert_eq!(printed["message"], refusal.message);
    }
}

/// No secret, so that all is read.
struct Known;

impl exchange::Secret for Known {
    fn code(&self, _: &[&[u8]]) -> exchange::Code {
        [0; exchange::CODE_LEN]
    }
}

/// A message of another node: kind, piece and pieces, and its part of the JSON.
fn exchanged(bytes: &[u8]) {
    let Some((head, body)) = bytes.split_first_chunk::<3>() else {
        return;
    };
    let id = [7; exchange::ID_LEN];
    let message = [
        b"MTX2",
        &head[..],
        &[0],
        &id,
        body,
        &[0; exchange::CODE_LEN],
    ]
    .concat();
    let ends = exchange::Ends {
        asker: Ipv4Addr::new(10, 244, 1, 1).into(),
        answerer: Ipv4Addr::new(10, 244, 2, 1).into(),
    };
    let Ok((kind, read)) = exchange::kind(&message) else {
        return;
    };
    assert!(message.len() <= exchange::MAX_LEN && read == id);
    match exchange::read_question(&Known, ends, &message) {
        Ok((asked, ask)) => {
            assert_eq!(kind, exchange::Kind::Question);
            // Numbers may be written longer than they were read.
            if let Ok((again, written)) = exchange::write_question(&Known, ends, id, &ask) {
                let reread = exchange::read_question(&Known, ends, &written);
                assert_eq!(reread, Ok((asked, ask)));
                assert_eq!(again, asked);
            }
        }
        Err(_) => {
            let ask = exchange::Ask::Live(live::Call::Seen { id: 1, from: 0 });
            let (asked, _) = exchange::write_question(&Known, ends, id, &ask).expect("it is short");
            let mut answering = exchange::Answering::new(asked);
            let Ok(Some(told)) = answering.take(&Known, ends.answerer, &message) else {
                return;
            };
            assert_eq!(kind, exchange::Kind::Answer);
            let pieces = exchange::write_answer(&Known, &asked, &told).expect("it was short");
            let mut again = exchange::Answering::new(asked);
            let taken = pieces
                .iter()
                .map(|it| again.take(&Known, ends.answerer, it));
            assert_eq!(taken.last(), Some(Ok(Some(told))));
        }
    }
}

/// Whether a name may be used in paths and host names.
fn is_pod_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() <= 63
        && name.starts_with(plain)
        && name.ends_with(plain)
        && name.chars().all(|c| plain(c) || c == '-' || c == '.')
}

fn row(choice: u8, bytes: &[u8]) {
    match choice % 10 {
        0 => drop(message::<control::Status>(bytes)),
        1 => drop(message::<control::Pod>(bytes)),
        2 => drop(message::<control::Peer>(bytes)),
        3 => drop(message::<control::Lease>(bytes)),
        4 => drop(message::<control::Route>(bytes)),
        5 => drop(message::<control::Neighbour>(bytes)),
        6 => drop(message::<control::Drop>(bytes)),
        7 => drop(message::<control::Flow>(bytes)),
        8 => drop(message::<Attached>(bytes)),
        _ => drop(message::<Event>(bytes)),
    }
}

fn made_request(bytes: &[u8]) {
    let Some((&[choices, a, b, c, d], name)) = bytes.split_first_chunk::<5>() else {
        return;
    };
    let name = std::str::from_utf8(name).ok();
    let pod = name.and_then(|name| name.parse::<PodName>().ok());
    assert_eq!(pod.is_some(), name.is_some_and(is_pod_name));
    let request = match pod {
        Some(pod) if choices & 4 != 0 => Request::Detach { pod },
        pod => {
            let ipv4 = (choices & 1 == 0).then_some(Ipv4Addr::new(a, b, c, d));
            let ipv6 = Ipv6Addr::new(0xfd00, a.into(), 0, b.into(), 0, 0, c.into(), d.into());
            let ipv6 = (choices & 8 != 0).then_some(ipv6);
            let mut attach = Attach::new(pod, Addresses::new(ipv4, ipv6));
            attach.persistent = choices & 2 != 0;
            Request::Attach(attach)
        }
    };
    let printed = serde_json::to_vec(&request).expect("it can be printed");
    assert_eq!(message(&printed), Some(request));
}

fn read_subnet_env(bytes: &[u8]) {
    let read = subnet_of(bytes);
    if let Some(subnet) = read {
        assert_eq!(subnet, subnet.trunc());
        // Subnets without an address for the gateway are not told.
        if subnet.prefix_len() < 32 {
            assert_eq!(subnet_of(print(subnet).as_bytes()), read);
        }
    }
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_=./,\n".contains(byte);
    if bytes.iter().all(plain) {
        assert_eq!(read, plain_subnet(&String::from_utf8_lossy(bytes)));
    }
}

/// The subnet in a file without quotes, comments, spaces and references.
fn plain_subnet(text: &str) -> Option<Ipv4Net> {
    let mut values = text
        .lines()
        .filter_map(|line| line.strip_prefix("FLANNEL_SUBNET="));
    let subnets = values
        .next_back()?
        .split(',')
        .filter_map(|text| text.parse().ok());
    let subnets: Vec<Ipv4Net> = subnets.collect();
    let [subnet] = subnets[..] else {
        return None;
    };
    Some(subnet.trunc())
}

fn print(subnet: Ipv4Net) -> String {
    SubnetEnv {
        subnets: Dual::with_ipv4((subnet, subnet), None),
        mtu: 1450,
        ip_masq: false,
    }
    .to_string()
}

fn made_subnet_env(bytes: &[u8]) {
    let Some((&[len, a, b, c, d], after)) = bytes.split_first_chunk::<5>() else {
        return;
    };
    let subnet = Ipv4Net::new(Ipv4Addr::new(a, b, c, d), len % 32).expect("it is below 32");
    let text = [print(subnet.trunc()).as_bytes(), after].concat();
    // What follows does not matter unless it names the subnet too.
    if !after.windows(6).any(|word| word == b"SUBNET") {
        assert_eq!(subnet_of(&text), Some(subnet.trunc()));
    }
}

fn seeds() -> Vec<Seed> {
    let with = |choice: u8, text: &str| [&[choice], text.as_bytes()].concat();
    let row = |kind: u8, text: &str| with(ROW + KINDS * kind, text);
    let traffic = r#"{"packets":3,"bytes":400}"#;
    let attached = r#"{"pod":"web-1","node":"one","address":"10.244.1.2/24","gateway":"10.244.1.1","mtu":1450,"gso_max_segs":64,"routes":["10.244.0.0/16"],"dns":[]}"#;
    let pod = format!(
        r#"{{"pod":"web-1","address":"10.244.1.2","mac":"0a:58:0a:f4:01:02","port":1,"persistent":false,"offload":true,"attached_seconds":9,"received":{traffic},"sent":{traffic}}}"#
    );
    let peer = format!(
        r#"{{"node":"n2","subnet":"10.244.2.0/24","public_ip":"192.168.0.2","backend":"vxlan","vtep_mac":"c6:d2:32:6f:8f:44","state":"alive","usable":true,"heard_seconds":3,"received":{traffic},"sent":{traffic}}}"#
    );
    let lease = r#"{"key":"10.244.7.0-24","subnet":"10.244.7.0/24","public_ip":"192.168.0.7","backend":"vxlan","vtep_mac":null,"owner":"another node","seconds_left":86400,"state":"silent"}"#;
    let env = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    vec![
        (
            "attach",
            with(
                REQUEST,
                r#"{"attach":{"pod":"web-1","address":"10.244.1.9","persistent":true}}"#,
            ),
        ),
        ("detach", with(REQUEST, r#"{"detach":{"pod":"web-1"}}"#)),
        (
            "asked",
            with(
                EXCHANGE,
                "\u{1}\u{0}\u{1}{\"trace\":{\"by\":\"tunnel\",\"source\":\"192.0.2.1:8472\",\"packet\":\"4500+20\"}}",
            ),
        ),
        (
            "asked-live",
            with(
                EXCHANGE,
                "\u{1}\u{0}\u{1}{\"live\":{\"watch\":{\"id\":7,\"source\":\"10.244.1.2\",\"destination\":\"10.244.2.2\",\"for_ms\":9}}}",
            ),
        ),
        (
            "told",
            with(EXCHANGE, "\u{2}\u{0}\u{1}{\"refused\":\"no\"}"),
        ),
        (
            "told-live",
            with(EXCHANGE, "\u{2}\u{0}\u{1}{\"live\":\"done\"}"),
        ),
        ("report", with(REQUEST, r#"{"report":"drops"}"#)),
        (
            "await-events",
            with(REQUEST, r#"{"await-events":{"after":7}}"#),
        ),
        (
            "drop-lease",
            with(
                REQUEST,
                r#"{"drop-lease":{"lease":"10.244.7.0/24","force":false}}"#,
            ),
        ),
        ("leave", with(REQUEST, r#""leave""#)),
        (
            "hello",
            with(REQUEST, r#"{"hello":{"protocol":1,"version":"0.1.0"}}"#),
        ),
        (
            "hello-newer",
            with(REQUEST, r#"{"hello":{"protocol":2,"features":["ipv6"]}}"#),
        ),
        (
            "welcome",
            with(
                ANSWER,
                r#"{"welcome":{"protocol":1,"version":"0.1.0","node":"n1","queues":2,"not_ready":"the node n1 has no lease yet"}}"#,
            ),
        ),
        (
            "attached",
            with(ANSWER, &format!(r#"{{"attached":{attached}}}"#)),
        ),
        (
            "rows",
            with(
                ANSWER,
                r#"{"rows":{"rows":[{"reason":"no-route","packets":1}],"more":true}}"#,
            ),
        ),
        (
            "dropped",
            with(
                ANSWER,
                r#"{"dropped":{"subnet":"10.244.7.0/24","node":null,"public_ip":"192.168.0.7","state":"silent","seconds_left":9,"names_removed":false}}"#,
            ),
        ),
        ("done", with(ANSWER, r#""done""#)),
        (
            "refused",
            with(
                ANSWER,
                r#"{"refused":{"usage":false,"code":"no-such-pod","message":"no such pod"}}"#,
            ),
        ),
        (
            "refused-before-codes",
            with(
                ANSWER,
                r#"{"refused":{"usage":true,"message":"no such pod"}}"#,
            ),
        ),
        (
            "refused-newer",
            with(ANSWER, r#"{"refused":{"code":"too-hot","message":""}}"#),
        ),
        ("row-pod", row(1, &pod)),
        ("row-peer", row(2, &peer)),
        ("row-lease", row(3, lease)),
        (
            "row-route",
            row(4, r#"{"prefix":"10.244.2.0/24","via":"192.168.0.2"}"#),
        ),
        (
            "row-neighbour",
            row(
                5,
                r#"{"address":"10.244.1.9","mac":null,"port":null,"state":"incomplete"}"#,
            ),
        ),
        (
            "row-event",
            row(
                9,
                r#"{"sequence":7,"time_ms":1700000000000,"times":2,"kind":"pod-attached","subject":"web","text":"t"}"#,
            ),
        ),
        (
            "row-drop",
            row(6, r#"{"reason":"no-route","packets":1,"description":""}"#),
        ),
        (
            "row-flow",
            row(
                7,
                r#"{"protocol":"tcp","pod":"web-1","direction":"out","local":"10.244.1.2:4000","remote":"[2001:db8::1]:443","state":"open","age_seconds":9,"idle_seconds":1,"sent_bytes":400,"received_bytes":9}"#,
            ),
        ),
        ("row-attached", row(8, attached)),
        (
            "row-attached-dual",
            row(
                8,
                r#"{"pod":"web-1","node":"one","address":"10.244.1.2/24,fd00:1::2/64","gateway":"10.244.1.1,fd00:1::1","mtu":1450,"gso_max_segs":64,"routes":["10.244.0.0/16","fd00::/16"],"dns":["fd00:1::1"]}"#,
            ),
        ),
        ("subnet-env", with(SUBNET_ENV, env)),
        (
            "subnet-env-quotes",
            with(
                SUBNET_ENV,
                "export FLANNEL_SUBNET='10.5.72.1/24' # ours\r\n",
            ),
        ),
        (
            "subnet-env-several",
            with(SUBNET_ENV, "FLANNEL_SUBNET=10.1.1.1/24,10.2.2.1/24\n"),
        ),
        (
            "subnet-env-reference",
            with(SUBNET_ENV, "A=10.5.72.1\nFLANNEL_SUBNET=\"${A}/24\"\n"),
        ),
        (
            "made-attach",
            [&[MADE_REQUEST, 2, 10, 244, 1, 9], &b"web-1.a"[..]].concat(),
        ),
        (
            "made-attach-longest-name",
            [&[MADE_REQUEST, 2, 10, 244, 1, 9], &[b'a'; 63][..]].concat(),
        ),
        (
            "made-attach-too-long-name",
            [&[MADE_REQUEST, 2, 10, 244, 1, 9], &[b'a'; 64][..]].concat(),
        ),
        (
            "made-attach-dual",
            [&[MADE_REQUEST, 8, 10, 244, 1, 9], &b"web-1"[..]].concat(),
        ),
        (
            "made-detach",
            [&[MADE_REQUEST, 4, 0, 0, 0, 0], &b"web"[..]].concat(),
        ),
        (
            "made-subnet-env",
            [&[MADE_SUBNET_ENV, 24, 10, 5, 72, 0], &b"\nOTHER='1\n"[..]].concat(),
        ),
    ]
}
