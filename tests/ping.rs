//! `muslin ping`: who answers, where time goes, and which packets fit.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use muslin::agent::Agent;
use muslin_lab::skip::skip;
use muslin_lab::{Lab, Node, SOON, poll_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Two nodes, with pod `web` on the first, whose interface takes longer packets than its node, and `db`
/// on the second.
struct Bed {
    nodes: [Node; 2],
    _web: Agent,
    db: Agent,
    _lab: Lab,
}

impl Bed {
    fn new() -> Option<Self> {
        let lab = Lab::new()?;
        let nodes = lab.two_nodes(|_, config| config);
        Some(Self::of(lab, nodes, &[]))
    }

    /// The same in both IP versions.
    fn dual() -> Option<Self> {
        let lab = Lab::new()?;
        let nodes = lab.two_dual_nodes(|_, config| config);
        Some(Self::of(lab, nodes, &["-6"]))
    }

    fn of(lab: Lab, nodes: [Node; 2], version: &[&str]) -> Self {
        let web = nodes[0].pod_after("web", &[], "ip link set eth0 mtu 2000");
        let db = nodes[1].pod("db");
        let bed = Self {
            nodes,
            _web: web,
            db,
            _lab: lab,
        };
        poll_until(SOON, "the names of the other node", || {
            let (_, _, code) = bed.ping(&[&["-c", "1", "db"], version].concat());
            (code == Some(0)).then_some(())
        });
        bed
    }

    fn ping(&self, words: &[&str]) -> (String, String, Option<i32>) {
        let words: Vec<_> = ["ping"].iter().chain(words).copied().collect();
        let output = self.nodes[0].client(&words).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            text(output.stdout),
            text(output.stderr),
            output.status.code(),
        )
    }

    fn report(&self, words: &[&str]) -> (Value, Option<i32>) {
        let (stdout, stderr, code) = self.ping(&[words, &["--json"]].concat());
        let report = serde_json::from_str(&stdout);
        let report = report.unwrap_or_else(|error| panic!("{words:?}: {error}: {stderr}"));
        (report, code)
    }

    /// The MTU of a way and who limits it.
    fn mtu(&self, words: &[&str]) -> (u64, String) {
        let (report, code) = self.report(&[words, &["--mtu"]].concat());
        assert_eq!(code, Some(0), "{report}");
        let mtu = &report["path_mtu"];
        let limit = mtu["limit"].as_str();
        let limit = limit.unwrap_or_else(|| panic!("no MTU: {report}"));
        (mtu["mtu_bytes"].as_u64().unwrap(), limit.to_owned())
    }
}

#[test]
fn each_part_of_the_way_answers() {
    let Some(mut bed) = Bed::new() else { return };
    let [here, there] = [0, 1].map(|number: usize| bed.nodes[number].address(1).to_string());
    let address = bed.db.address("eth0").unwrap().to_string();
    for target in ["db", "db.n2", &address] {
        let (report, code) = bed.report(&["-c", "3", "-i", "0.1", target]);
        assert_eq!(code, Some(0), "{report}");
        assert_eq!(report["address"], address);
        let way = report["way"].as_array().unwrap();
        let names = ["gateway of n1", "gateway of n2", target];
        assert_eq!(way.len(), 3, "{report}");
        for (hop, (name, address)) in way.iter().zip(names.iter().zip([&here, &there, &address])) {
            assert_eq!(
                (&hop["name"], &hop["address"]),
                (&(*name).into(), &address.as_str().into())
            );
            assert_eq!((&hop["sent"], &hop["answered"]), (&3.into(), &3.into()));
            let [min, mean, max] = ["min_us", "mean_us", "max_us"].map(|key| hop[key].as_u64());
            assert!(min > Some(0) && min <= mean && mean <= max, "{hop}");
        }
    }
    let (text, stderr, code) = bed.ping(&["-c", "2", "-i", "0.1", "db.n2"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(
        text.starts_with(&format!("ping db.n2 ({address}) from pod ping-")),
        "{text}"
    );
    assert!(
        text.contains("2 pings sent, 2 answered, 0 % lost"),
        "{text}"
    );
    assert_eq!(text.matches("gateway of n2 ").count(), 3, "{text}");

    // A node is its gateway, which is then no part of the way to itself, and none to its own pods.
    let _near = bed.nodes[0].pod("near");
    for (target, hops) in [("n2", 2), (here.as_str(), 1), ("near", 1)] {
        let (report, _) = bed.report(&["-c", "1", "--from", "web", target]);
        assert_eq!(report["way"].as_array().unwrap().len(), hops, "{report}");
        assert_eq!(report["from"], "web");
    }
    poll_until(SOON, "the end of the pods of pings", || {
        (bed.nodes[0].query("pods").as_array().unwrap().len() == 2).then_some(())
    });
}

#[test]
fn each_part_of_the_way_answers_in_ipv6() {
    let Some(mut bed) = Bed::dual() else { return };
    let address = bed.db.address_v6("eth0").unwrap();
    let gateways = [0, 1].map(|number: usize| {
        let gateways = bed.nodes[number].status("gateway");
        gateways.split_once(',').unwrap().1.to_owned()
    });
    let [here, there] = &gateways;
    let address = address.to_string();
    for words in [&["db", "-6"][..], &["db.n2", "-6"], &[&address]] {
        let (report, code) = bed.report(&[words, &["-c", "3", "-i", "0.1"]].concat());
        assert_eq!(
            (&report["address"], code),
            (&address.as_str().into(), Some(0))
        );
        let way = report["way"].as_array().unwrap();
        let names = ["gateway of n1", "gateway of n2", words[0]];
        assert_eq!(way.len(), 3, "{report}");
        for (hop, (name, address)) in way.iter().zip(names.iter().zip([here, there, &address])) {
            assert_eq!(
                (&hop["name"], &hop["address"]),
                (&(*name).into(), &address.as_str().into())
            );
            assert_eq!((&hop["sent"], &hop["answered"]), (&3.into(), &3.into()));
        }
    }
    let (report, code) = bed.report(&["db", "-c", "1"]);
    assert_eq!(code, Some(0));
    let is_v4 = |text: &str| text.parse::<std::net::Ipv4Addr>().is_ok();
    assert!(is_v4(report["address"].as_str().unwrap()), "{report}");
    let _near = bed.nodes[0].pod("near");
    for (target, hops) in [("n2", 2), (here.as_str(), 1), ("near", 1)] {
        let (report, _) = bed.report(&["-6", "-c", "1", "--from", "web", target]);
        assert_eq!(report["way"].as_array().unwrap().len(), hops, "{report}");
    }
    let mtu = u64::from(bed.nodes[0].mtu() - 20);
    let (found, limit) = bed.mtu(&["db", "-6"]);
    assert_eq!(found, mtu, "{limit}");
    assert!(
        limit.starts_with("the default route of pod ping-"),
        "{limit}"
    );
    let (found, limit) = bed.mtu(&["near", "-6"]);
    assert_eq!(found, u64::from(bed.nodes[0].mtu()), "{limit}");
    let (_, stderr, code) = bed.ping(&["2001:db8::1"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("is not in the pod network"), "{stderr}");
}

#[test]
fn who_does_not_answer_is_told_by_the_exit_code() {
    let Some(bed) = Bed::new() else { return };
    let nobody = bed.nodes[1].address(200).to_string();
    let (report, code) = bed.report(&["-c", "1", &nobody]);
    assert_eq!(code, Some(1));
    let way = report["way"].as_array().unwrap();
    assert_eq!(way[1]["answered"], 1, "its node does: {report}");
    assert_eq!(
        (&way[2]["answered"], &way[2]["min_us"]),
        (&0.into(), &Value::Null)
    );
    let (text, _, code) = bed.ping(&["-c", "1", &nobody, "--mtu"]);
    assert_eq!(code, Some(1));
    assert!(
        text.contains("1 ping sent, 0 answered, 100 % lost"),
        "{text}"
    );
    assert!(!text.contains("path MTU"), "{text}");
    for (words, code, meant) in [
        (&["nobody"][..], 1, "no pod or node called 'nobody'"),
        (&["192.0.2.1"], 2, "not in the pod network 10.244.0.0/16"),
        (&["db", "--from", "wbe"], 1, "'web'"),
        (&["db", "-c", "0"], 2, "0"),
        (&["db", "-i", "0"], 2, "0.1"),
    ] {
        let (stdout, stderr, status) = bed.ping(words);
        assert_eq!(
            (stdout.as_str(), status),
            ("", Some(code)),
            "{words:?}: {stderr}"
        );
        assert!(stderr.contains(meant), "{words:?}: {stderr}");
    }
}

#[test]
fn an_interrupted_ping_sums_up() {
    let Some(bed) = Bed::new() else { return };
    let mut command = bed.nodes[0].client(&["ping", "-i", "0.1", "db"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let is_third = |line: &String| line.starts_with("   3  ");
    assert!(
        lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| is_third(&line))
    );
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let rest: Vec<_> = lines.map_while(Result::ok).collect();
    assert!(
        rest.iter().any(|line| line.contains("answered, 0 % lost")),
        "{rest:?}"
    );
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_path_mtu_is_found_with_who_limits_it() {
    let Some(bed) = Bed::new() else { return };
    let mtu = u64::from(bed.nodes[0].mtu());
    let (found, limit) = bed.mtu(&["db"]);
    assert_eq!(found, mtu, "{limit}");
    assert!(limit.starts_with("the interface of pod ping-"), "{limit}");
    let (found, limit) = bed.mtu(&["db", "--from", "web"]);
    assert_eq!(found, mtu, "{limit}");
    assert!(limit.starts_with("gateway of n1 ("), "{limit}");
    // The pod's kernel remembers that.
    let (text, _, _) = bed.ping(&["db", "--from", "web", "--mtu"]);
    assert!(text.contains(&format!("path MTU {mtu} bytes: ")), "{text}");
}

#[test]
fn where_long_packets_are_lost_is_found_though_nobody_says_it() {
    let Some(bed) = Bed::new() else { return };
    let rule = [
        "-A", "INPUT", "-m", "length", "--length", "1401:", "-j", "DROP",
    ];
    let filter = bed.nodes[1]
        .host()
        .output(&[&["iptables"], &rule[..]].concat());
    if !filter.status.success() {
        return skip(format_args!("no iptables: {filter:?}"));
    }
    let (found, limit) = bed.mtu(&["db"]);
    // Less outer IP, UDP, VXLAN and Ethernet headers.
    assert_eq!(found, 1400 - 50, "{limit}");
    let between = "longer packets are lost between gateway of n1 (";
    assert!(limit.starts_with(between), "{limit}");
    assert!(limit.contains(") and gateway of n2 ("), "{limit}");
}
