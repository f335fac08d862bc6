//! Pods reach what lies outside the pod network, by sockets of their node, and see what a host of
//! its own would see of it.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod faults;
mod load;
mod mappings;
mod programs;
mod workers;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::process::Stdio;

use muslin::agent::{Agent, Ping};
use muslin_lab::etcd::Etcd;
use muslin_lab::script::Script;
use muslin_lab::skip::skip;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until, traffic};

const NODE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// The same of IPv6, where there is one.
const NODE_V6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 1);
const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 2);
/// On the underlay, where nobody has it.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 99);
/// Outside the underlay, whither the node's host has no route.
const NOWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const PORT: u16 = 9000;

/// A node with a pod, and a server outside the pod network.
struct Bed {
    pod: Agent,
    server: Agent,
    node: Node,
    server_host: Host,
    node_host: Host,
    _lab: Lab,
}

impl Bed {
    fn new(flags: &[(&str, &str)]) -> Option<Self> {
        Self::prepared(flags, |_| ())
    }

    /// With hosts that were prepared before anything ran on them.
    fn prepared(flags: &[(&str, &str)], prepare: impl FnOnce([&Host; 2])) -> Option<Self> {
        let lab = Lab::new()?;
        let store = lab.store();
        let (node_host, server_host) = (lab.host("node", NODE), lab.host("server", SERVER));
        prepare([&node_host, &server_host]);
        let mut config = NodeConfig::new("n1", NODE, &store);
        for (flag, value) in flags {
            config = config.with(flag, value);
        }
        let node = config.start(&node_host);
        let mut server = server_host.agent();
        assert_eq!(server.listen(PORT).unwrap(), PORT);
        Some(Self {
            pod: node.pod("pod"),
            server,
            node,
            server_host,
            node_host,
            _lab: lab,
        })
    }

    /// The same with IPv6 beside IPv4; nothing where the kernel has none.
    fn with_ipv6() -> Option<Self> {
        if !std::path::Path::new("/proc/net/if_inet6").exists() {
            skip("the kernel has no IPv6");
            return None;
        }
        let node = NODE_V6.to_string();
        let flags = [
            ("--public-ipv6", &*node),
            ("--network", "10.244.0.0/16,fd44::/48"),
        ];
        Self::prepared(&flags, |hosts| {
            for (host, address) in hosts.into_iter().zip([NODE_V6, SERVER_V6]) {
                host.sh(&format!("ip addr add {address}/64 dev eth0 nodad"));
            }
        })
    }

    fn flows(&self, which: &str) -> u64 {
        let status = self.node.query("status");
        let flows = status["egress"][which].as_u64();
        flows.unwrap_or_else(|| panic!("no flows '{which}' in {status}"))
    }

    /// What the pod is told when it connects.
    fn refusal(&mut self, to: Ipv4Addr, port: u16) -> String {
        let opened = self.pod.open(SocketAddrV4::new(to, port));
        opened.unwrap_err().to_string()
    }
}

#[test]
fn streams_arrive_as_they_were_sent() {
    for offload in ["tap,gso,gro", "none"] {
        let Some(mut bed) = Bed::new(&[("--offload", offload)]) else {
            return;
        };
        traffic::transfer(&mut bed.pod, SERVER, PORT, traffic::BULK);
        let id = bed.pod.open(SocketAddrV4::new(SERVER, PORT)).unwrap();
        let echoed = bed.pod.exchange(id, 20_000_000, 5).unwrap();
        assert!(echoed.intact && echoed.bytes == 20_000_000, "{echoed:?}");
        eprintln!(
            "to and fro with --offload {offload}: {:.0} Mbit/s",
            echoed.bits_per_second() / 1e6
        );
        assert_eq!((bed.flows("open"), bed.flows("opened")), (1, 2));
        bed.pod.close(id).unwrap();
        poll_until(SOON, "the flow's end", || {
            (bed.flows("open") == 0).then_some(())
        });
        assert_eq!(bed.node.losses(), [].into(), "{}", bed.node.log());
    }
}

#[test]
fn pods_see_what_becomes_of_connections() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let refusal = bed.refusal(SERVER, 1);
    assert!(refusal.contains("refused"), "{refusal}");
    let refusal = bed.refusal(NOWHERE, 80);
    assert!(refusal.contains("Network is unreachable"), "{refusal}");
    let refusal = bed.refusal(NOBODY, 80);
    assert!(refusal.contains("No route to host"), "{refusal}");
    assert_eq!((bed.flows("refused"), bed.flows("unreachable")), (1, 2));

    let _resetter = Script::serve(
        &bed.server_host,
        r#"socket(my $l, PF_INET, SOCK_STREAM, 0); setsockopt($l, SOL_SOCKET, SO_REUSEADDR, 1);
           bind($l, pack_sockaddr_in(9001, INADDR_ANY)) or die; listen($l, 5); $| = 1;
           print "READY\n";
           while (accept(my $c, $l)) {
               sysread($c, my $x, 1); setsockopt($c, SOL_SOCKET, SO_LINGER, pack("ii", 1, 0));
               close($c);
           }"#,
        &[],
    );
    let id = bed.pod.open(SocketAddrV4::new(SERVER, 9001)).unwrap();
    let reset = bed.pod.exchange(id, 100, 1).unwrap_err().to_string();
    assert!(reset.contains("reset"), "{reset}");
    poll_until(SOON, "the flow's end", || {
        (bed.flows("open") == 0).then_some(())
    });
    assert_eq!(bed.flows("reset"), 1);
}

#[test]
fn loopback_and_metadata_are_closed_unless_they_are_opened() {
    let open: Ipv4Addr = [192, 0, 2, 1].into();
    let Some(mut bed) = Bed::new(&[("--host-loopback", "192.0.2.1")]) else {
        return;
    };
    // Both are there on the node's host.
    bed.node_host.sh("ip addr add 169.254.169.254/32 dev lo");
    let mut inside = bed.node_host.agent();
    inside.listen(PORT).unwrap();
    for closed in [METADATA, Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 1, 2, 3)] {
        let script = format!(
            r#"socket(my $s, PF_INET, SOCK_STREAM, 0); $SIG{{ALRM}} = sub {{ exit 3 }}; alarm 1;
               exit(connect($s, pack_sockaddr_in({PORT}, inet_aton("{closed}"))) ? 0 : 2)"#
        );
        let mut command = bed
            .node
            .client(&["run", "--", "perl", "-MSocket", "-e", &script]);
        let status = command.status().unwrap();
        assert!(matches!(status.code(), Some(2 | 3)), "{closed}: {status}");
    }
    let denied = bed.node.drops().get("egress-denied").copied();
    assert!(denied >= Some(1), "{:?}", bed.node.drops());
    traffic::transfer(&mut bed.pod, open, PORT, 1000);
    traffic::transfer(&mut bed.pod, NODE, PORT, 1000);
}

#[test]
fn rules_decide_what_is_reached() {
    let rules = [
        ("--egress-allow", "10.9.0.0/24,169.254.169.254/32"),
        ("--egress-deny", "10.9.0.2/32"),
    ];
    let Some(mut bed) = Bed::new(&rules) else {
        return;
    };
    bed.node_host.sh("ip addr add 169.254.169.254/32 dev lo");
    let mut inside = bed.node_host.agent();
    inside.listen(PORT).unwrap();
    traffic::transfer(&mut bed.pod, NODE, PORT, 1000);
    traffic::transfer(&mut bed.pod, METADATA, PORT, 1000);
    let refusal = bed.refusal(SERVER, PORT);
    assert!(refusal.contains("No route to host"), "{refusal}");
    assert_eq!(bed.node.drops().get("egress-denied"), Some(&1));
}

#[test]
fn pods_do_not_reach_the_store() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let network = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
    etcd.configure("/coreos.com/network", network);
    let server = etcd.store().replace("etcd://", "");
    let server: SocketAddrV4 = server.parse().unwrap();
    let named = format!("0.0.0.0/0,{}/32", server.ip());
    for (address, allow) in [(NODE, None), (SERVER, Some(named))] {
        let mut config = NodeConfig::new("n1", address, &etcd.store());
        if let Some(allow) = &allow {
            config = config.with("--egress-allow", allow);
        }
        let node = config.start(&lab.host(&address.to_string(), address));
        let opened = node.pod("pod").open(server).map_err(|it| it.to_string());
        match allow {
            Some(_) => assert!(opened.is_ok(), "{opened:?}"),
            None => assert!(opened.unwrap_err().contains("No route to host")),
        }
    }
}

#[test]
fn without_egress_there_is_no_way_out() {
    let Some(mut bed) = Bed::new(&[("--egress", "off")]) else {
        return;
    };
    traffic::unreachable(&mut bed.pod, SERVER);
    let refusal = bed.refusal(SERVER, PORT);
    assert!(refusal.contains("Network is unreachable"), "{refusal}");
    assert!(bed.node.query("status")["egress"].is_null());
}

#[test]
fn many_connections_at_once_and_one_after_the_other() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    // An agent keeps no more than 64, at either end.
    let mut pods: Vec<_> = (0..4).map(|i| bed.node.pod(&format!("many{i}"))).collect();
    let mut open = Vec::new();
    for (pod, port) in pods.iter_mut().zip(PORT + 1..) {
        bed.server.listen(port).unwrap();
        let ids = (0..50).map(|_| pod.open(SocketAddrV4::new(SERVER, port)).unwrap());
        open.push(ids.collect::<Vec<_>>());
    }
    assert_eq!(bed.flows("open"), 200);
    for (pod, ids) in pods.iter_mut().zip(&open) {
        for id in ids {
            let echoed = pod.exchange(*id, 5000, *id).unwrap();
            assert!(echoed.intact && echoed.bytes == 5000, "{echoed:?}");
        }
    }
    drop(pods);
    poll_until(SOON, "the end of 200 flows", || {
        (bed.flows("open") == 0).then_some(())
    });
    for seed in 0..2000 {
        let to = SocketAddrV4::new(SERVER, PORT);
        let sent = bed.pod.send(to, 300, seed).unwrap();
        assert!(sent.intact && sent.bytes == 300, "{sent:?}");
    }
    assert_eq!(bed.flows("opened"), 2200);
    poll_until(SOON, "the end of 2000 flows", || {
        (bed.flows("open") == 0).then_some(())
    });
    assert_eq!(bed.node.losses(), [].into(), "{}", bed.node.log());
}

#[test]
fn datagrams_have_answers() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let to = SocketAddrV4::new(SERVER, PORT);
    // The last two come in fragments, to either end.
    for size in [0, 1, 1000, 1400, 9000, 65_507] {
        let echoed = bed.pod.udp(to, 50, size).unwrap();
        assert_eq!((echoed.sent, echoed.intact), (50, 50), "{size} bytes");
    }
    assert_eq!(bed.node.losses(), [].into(), "{}", bed.node.log());
    let refusal = bed.pod.udp(SocketAddrV4::new(SERVER, 1), 2, 10);
    let refusal = refusal.unwrap_err().to_string();
    assert!(refusal.contains("refused"), "{refusal}");
    let tunnel = bed.pod.udp(SocketAddrV4::new(SERVER, 8472), 2, 10);
    assert!(tunnel.is_err(), "{tunnel:?}");
    assert!(bed.node.drops().contains_key("egress-denied"));
}

#[test]
fn pings_have_answers_where_the_host_permits_them() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let pinged = bed.pod.ping(&Ping::new(SERVER)).unwrap();
    assert!(pinged.replies.is_empty(), "{pinged:?}");
    let drops = bed.node.drops();
    assert_eq!(drops.get("egress-ping"), Some(&3), "{drops:?}");
    bed.node_host
        .sh("echo 0 0 >/proc/sys/net/ipv4/ping_group_range");
    traffic::ping(&mut bed.pod, SERVER);
    let long = traffic::ping_of_size(&mut bed.pod, SERVER, 4028, false);
    assert!(long.is_perfect(1), "{long:?}");
    let nobody = bed.pod.ping(&Ping::new(NOBODY)).unwrap();
    assert!(nobody.replies.is_empty(), "{nobody:?}");
}

#[test]
fn flows_are_told_with_what_they_have_carried() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let mut idle = bed.node.pod("idle");
    assert!(bed.node.query("flows").as_array().unwrap().is_empty());
    let id = bed.pod.open(SocketAddrV4::new(SERVER, PORT)).unwrap();
    bed.pod.exchange(id, 5000, 3).unwrap();
    bed.pod
        .udp(SocketAddrV4::new(SERVER, PORT), 3, 100)
        .unwrap();

    let rows = bed.node.query("flows");
    let address = bed.node.query("pods")[1]["address"].clone();
    let address = address.as_str().unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 2, "{rows}");
    // A connection of the agents begins with a byte of its own.
    for (protocol, sent, received) in [("tcp", 5001, 5000), ("udp", 300, 300)] {
        let mut rows = rows.as_array().unwrap().iter();
        let row = rows.find(|row| row["protocol"] == protocol).unwrap();
        assert_eq!(row["pod"], "pod", "{row}");
        assert_eq!(
            (&row["direction"], &row["state"]),
            (&"out".into(), &"open".into())
        );
        assert_eq!(row["remote"], format!("{SERVER}:{PORT}"));
        let local = row["local"].as_str().unwrap();
        assert!(local.starts_with(&format!("{address}:")), "{row}");
        assert_eq!(
            (&row["sent_bytes"], &row["received_bytes"]),
            (&sent.into(), &received.into())
        );
        assert!(
            row["age_seconds"].as_u64() >= row["idle_seconds"].as_u64(),
            "{row}"
        );
    }

    let flows = |words: &[&str]| {
        let output = bed
            .node
            .client(&[&["flows"], words].concat())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        (
            String::from_utf8(output.stdout).unwrap(),
            stderr,
            output.status.code(),
        )
    };
    let (table, ..) = flows(&["--pod", "pod"]);
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert!(lines[0].starts_with("PROTOCOL"), "{table}");
    assert!(
        lines[1..].iter().all(|line| line.contains(" -> ")),
        "{table}"
    );
    let (none, _, code) = flows(&["--pod", "idle"]);
    assert_eq!((none.as_str(), code), ("", Some(0)));
    let (_, error, code) = flows(&["--pod", "nobody"]);
    assert_eq!(code, Some(1));
    assert_eq!(error, "muslin: no pod named 'nobody' is attached\n");
    let (_, error, code) = flows(&["--pod", "No_Name"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("No_Name"), "{error}");
    traffic::transfer(&mut idle, SERVER, PORT, 10);
}
