//! `muslin trace` says of a packet what then becomes of it, node by node.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};
use std::process::{Command, Output};

use muslin::agent::{Agent, Ping};
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until, traffic};
use serde_json::Value;

/// The hosts of two nodes of both IP versions, and how these are started.
fn dual(lab: &Lab, backend: &str) -> [(NodeConfig, Host); 2] {
    [1, 2].map(|number: u8| {
        let name = format!("n{number}");
        let host = lab.host(&name, Ipv4Addr::new(10, 9, 0, number));
        host.sh(&format!("ip addr add fd09::{number}/64 dev eth0 nodad"));
        let config = NodeConfig::on_interface(&name, "eth0", &lab.store());
        let config = config
            .with("--network", "10.244.0.0/16")
            .with("--ipv6-network", "fd44::/48")
            .with("--backend", backend);
        (config, host)
    })
}

/// Two nodes, with pods `web` and `api` on the first and `db` on the second.
struct Bed {
    nodes: [Node; 2],
    pods: [Agent; 3],
    _lab: Lab,
}

impl Bed {
    fn new(backend: &str) -> Option<Self> {
        let lab = Lab::new()?;
        let store = lab.store();
        let [(first, host), (second, other)] = [1, 2].map(|number: u8| {
            let address = Ipv4Addr::new(10, 9, 0, number);
            let name = format!("n{number}");
            let config = match backend {
                "host-gw" => NodeConfig::on_interface(&name, "eth0", &store),
                _ => NodeConfig::new(&name, address, &store),
            };
            let config = config
                .with("--network", "10.244.0.0/16")
                .with("--backend", backend);
            (config, lab.host(&name, address))
        });
        Some(Self::of(lab, [(first, host), (second, other)], &[]))
    }

    /// The same in both IP versions.
    fn dual(backend: &str) -> Option<Self> {
        let lab = Lab::new()?;
        let nodes = dual(&lab, backend);
        Some(Self::of(lab, nodes, &["-6"]))
    }

    fn of(lab: Lab, nodes: [(NodeConfig, Host); 2], version: &[&str]) -> Self {
        let [(first, host), (second, other)] = nodes;
        let first = first.start(&host);
        let second = second.start_sharing(&other, &first);
        let nodes = [first, second];
        for node in &nodes {
            node.wait_peers(1);
        }
        let pods = [
            nodes[0].pod_after("web", &["-p", "8080:80"], "ip link set eth0 mtu 2000"),
            nodes[0].pod("api"),
            nodes[1].pod("db"),
        ];
        let bed = Self {
            nodes,
            pods,
            _lab: lab,
        };
        poll_until(SOON, "the names of the other node", || {
            let known = bed.run(&[&["web", "db"], version].concat());
            known.status.success().then_some(())
        });
        bed
    }

    fn run(&self, words: &[&str]) -> Output {
        let words: Vec<_> = ["trace"].iter().chain(words).copied().collect();
        self.nodes[0].client(&words).output().unwrap()
    }

    /// The parts of a packet's way, and whether it gets there.
    fn trace(&self, words: &[&str]) -> (Vec<Value>, bool) {
        let output = self.run(&[words, &["--json"]].concat());
        let way: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            let said = String::from_utf8_lossy(&output.stderr);
            panic!("{words:?}: {error}: {said}")
        });
        assert_eq!(way["unknown"], Value::Null, "{way}");
        (
            way["parts"].as_array().unwrap().clone(),
            output.status.success(),
        )
    }

    /// The last part of a way that ends like this after so many nodes.
    fn ends(&self, words: &[&str], nodes: usize, verdict: &str, reason: Option<&str>) -> Value {
        let (parts, arrives) = self.trace(words);
        assert_eq!(parts.len(), nodes, "{words:?}: {parts:#?}");
        let last = parts.last().unwrap().clone();
        let outcome = &last["outcome"];
        let found = (
            outcome["verdict"].as_str().unwrap(),
            outcome["reason"].as_str(),
        );
        assert_eq!(found, (verdict, reason), "{words:?}: {last:#}");
        assert_eq!(arrives, verdict != "dropped");
        last
    }
}

fn kinds(part: &Value) -> Vec<&str> {
    let steps = part["steps"].as_array().unwrap().iter();
    steps.map(|step| step["kind"].as_str().unwrap()).collect()
}

/// Everything that it says of one network, beside what happens there.
fn agrees_with_what_happens(backend: &str) {
    let Some(mut bed) = Bed::new(backend) else {
        return;
    };
    let [here, there] = [0, 1].map(|number: usize| bed.nodes[number].address(1));
    let addresses = bed.pods.each_mut().map(|pod| pod.address("eth0").unwrap());
    let [_, near, far] = addresses;
    // What has not been looked for yet is looked for first, and a trace does not look.
    traffic::ping(&mut bed.pods[0], far);
    traffic::ping(&mut bed.pods[2], near);
    let last = bed.ends(&["web", "db"], 2, "delivered", None);
    assert_eq!(last["outcome"]["text"], "Delivered to pod db.");
    assert_eq!(last["node"], "n2");
    assert!(kinds(&last).contains(&"neighbour"), "{last:#}");
    bed.ends(&["web", "db.n2"], 2, "delivered", None);
    bed.ends(&["web", "db.n2.muslin"], 2, "delivered", None);
    bed.ends(&["web", &far.to_string()], 2, "delivered", None);
    // Whoever has the sender is asked, wherever the question comes from.
    bed.ends(&["api", "web", "--proto", "udp"], 1, "delivered", None);
    bed.ends(&["web", "gateway", "--proto", "icmp"], 1, "consumed", None);
    bed.ends(&["web", "n2", "--proto", "icmp"], 2, "consumed", None);
    let names = ["--proto", "udp", "--dport", "53"];
    let last = bed.ends(
        &[&["web", "gateway"], &names[..]].concat(),
        1,
        "consumed",
        None,
    );
    let text = last["outcome"]["text"].as_str().unwrap();
    assert!(text.contains("service of the gateway"), "{text}");
    let words = [&["web", "n2"], &names[..]].concat();
    bed.ends(&words, 2, "dropped", Some("gateway-port"));
    let last = bed.ends(&["web", "web"], 1, "delivered", None);
    assert_eq!(kinds(&last), ["loopback"]);
    let last = bed.ends(&["web", "255.255.255.255"], 1, "flooded", None);
    assert!(kinds(&last).contains(&"switch"), "{last:#}");
    let leased = [here, there].map(|gateway| gateway.octets()[2]);
    let free = (0..=255).find(|it| !leased.contains(it)).unwrap();
    let nobodys = Ipv4Addr::new(10, 244, free, 9).to_string();
    bed.ends(&["web", &nobodys], 1, "dropped", Some("no-route"));
    let mtu = bed.nodes[0].mtu();
    let (fits, exceeds) = (mtu.to_string(), (mtu + 1).to_string());
    bed.ends(
        &["web", "db", "--size", &fits, "--df"],
        2,
        "delivered",
        None,
    );
    bed.ends(
        &["web", "db", "--size", &exceeds, "--df"],
        1,
        "dropped",
        Some("fragmentation-needed"),
    );
    bed.ends(
        &["web", "db", "--size", &exceeds, "--proto", "udp"],
        2,
        "delivered",
        None,
    );
    bed.ends(
        &["web", "db", "--ttl", "1"],
        1,
        "dropped",
        Some("ttl-exceeded"),
    );
    bed.ends(
        &["web", "db", "--ttl", "2"],
        2,
        "dropped",
        Some("ttl-exceeded"),
    );
    bed.ends(&["web", "outside"], 1, "egress", None);
    let metadata = "169.254.169.254";
    let last = bed.ends(&["web", metadata], 1, "dropped", Some("egress-denied"));
    let text = last["steps"].as_array().unwrap().last().unwrap()["text"].as_str();
    assert_eq!(text, Some("169.254.0.0/16 is denied"));
    bed.ends(&["outside", "web", "--dport", "8080"], 1, "delivered", None);

    // And it is so.
    traffic::fits(&mut bed.pods[0], far, mtu);
    traffic::exceeds(&mut bed.pods[0], far, mtu, here);
    traffic::expires(&mut bed.pods[0], far, 1, here);
    traffic::expires(&mut bed.pods[0], far, 2, there);
}

#[test]
fn over_vxlan_it_agrees_with_what_happens() {
    agrees_with_what_happens("vxlan");
}

#[test]
fn over_udp_it_agrees_with_what_happens() {
    agrees_with_what_happens("udp");
}

#[test]
fn on_the_link_it_agrees_with_what_happens() {
    agrees_with_what_happens("host-gw");
}

/// The same in IPv6.
fn agrees_with_what_happens_in_ipv6(backend: &str, mtu: u16) {
    let Some(mut bed) = Bed::dual(backend) else {
        return;
    };
    let [web, near, far] = bed
        .pods
        .each_mut()
        .map(|pod| pod.address_v6("eth0").unwrap());
    let gateway = |pod: Ipv6Addr| {
        let mut gateway = pod.segments();
        gateway[4..].copy_from_slice(&[0, 0, 0, 1]);
        Ipv6Addr::from(gateway)
    };
    let (here, there) = (gateway(near), gateway(far));
    traffic::ping(&mut bed.pods[0], far);
    traffic::ping(&mut bed.pods[2], near);
    let last = bed.ends(&["web", "db", "-6"], 2, "delivered", None);
    assert_eq!(last["outcome"]["text"], "Delivered to pod db.");
    assert_eq!(last["packet"]["destination"], far.to_string());
    assert!(kinds(&last).contains(&"neighbour"), "{last:#}");
    // As by ping(8), an address says which version is meant, and names mean IPv4 by default.
    for ends in [["web", &far.to_string()], [&web.to_string(), "db.n2"]] {
        let last = bed.ends(&ends, 2, "delivered", None);
        assert_eq!(last["packet"]["destination"], far.to_string());
    }
    for words in [&["web", "db"][..], &["web", "db", "-4"]] {
        let last = bed.ends(words, 2, "delivered", None);
        let destination = last["packet"]["destination"].as_str().unwrap();
        assert!(destination.parse::<Ipv4Addr>().is_ok(), "{destination}");
    }
    let udp = ["api", "web", "-6", "--proto", "udp"];
    bed.ends(&udp, 1, "delivered", None);
    let ping = ["-6", "--proto", "icmp"];
    for (target, nodes) in [("gateway", 1), ("fe80::1", 1), ("n1", 1), ("n2", 2)] {
        let words = [&["web", target], &ping[..]].concat();
        bed.ends(&words, nodes, "consumed", None);
    }
    let last = bed.ends(&["web", &web.to_string()], 1, "delivered", None);
    assert_eq!(kinds(&last), ["loopback"]);
    let nobody = gateway(near).to_string() + "99";
    let last = bed.ends(&["web", &nobody], 1, "dropped", None);
    assert_eq!(kinds(&last), ["ndp"]);
    bed.ends(&["web", "fd44:0:0:ffff::9"], 1, "dropped", Some("no-route"));
    let reason = Some("all-nodes-group");
    bed.ends(&["web", "ff02::1"], 1, "dropped", reason);
    bed.ends(&["web", "ff02::fb"], 1, "flooded", None);
    bed.ends(&["web", "outside", "-6"], 1, "egress", None);
    let published = ["outside", "web", "-6", "--dport", "8080"];
    bed.ends(&published, 1, "delivered", None);
    let (fits, exceeds) = (mtu.to_string(), (mtu + 1).to_string());
    let sized = |size| ["web", "db", "-6", "--size", size];
    bed.ends(&sized(&fits), 2, "delivered", None);
    let reason = Some("fragmentation-needed");
    bed.ends(&sized(&exceeds), 1, "dropped", reason);
    for (hops, nodes) in [("1", 1), ("2", 2)] {
        let words = ["web", "db", "-6", "--ttl", hops];
        bed.ends(&words, nodes, "dropped", Some("ttl-exceeded"));
    }

    // And it is so. The interface takes longer packets than the node.
    let sized = |size: u16| Ping {
        count: 1,
        size: usize::from(size) - 48,
        dont_fragment: true,
        ..Ping::new(far)
    };
    bed.pods[0].ping(&sized(mtu)).unwrap();
    let pinged = bed.pods[0].ping(&sized(mtu)).unwrap();
    assert!(pinged.is_perfect(1), "{pinged:?}");
    let pinged = bed.pods[0].ping(&sized(mtu + 1)).unwrap();
    let too_long = pinged
        .errors
        .iter()
        .any(|it| it.is_fragmentation_needed(mtu))
        || pinged.refused.iter().any(|it| it.is_too_long());
    assert!(too_long, "{pinged:?}");
    for (hops, router) in [(1, here), (2, there)] {
        let pinged = bed.pods[0].ping(&Ping {
            ttl: Some(hops),
            ..Ping::new(far)
        });
        let errors = pinged.unwrap().errors;
        let is_right = |it: &muslin::agent::IcmpError| it.is_time_exceeded() && it.from == router;
        assert!(
            errors.len() == 3 && errors.iter().all(is_right),
            "{errors:?}"
        );
    }
}

#[test]
fn in_ipv6_over_vxlan_it_agrees_with_what_happens() {
    agrees_with_what_happens_in_ipv6("vxlan", 1430);
}

#[test]
fn in_ipv6_on_the_link_it_agrees_with_what_happens() {
    agrees_with_what_happens_in_ipv6("host-gw", 1500);
}

#[test]
fn it_is_read_at_a_glance_and_ends_as_a_script_asks() {
    let Some(bed) = Bed::new("vxlan") else { return };
    let output = bed.run(&["web", "db"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    let parts = [
        "\nnode n1\n",
        "  route  ",
        " by node n2\n",
        "\nnode n2\n",
        "  => Delivered to pod db.\n",
    ];
    let mut rest = text.as_str();
    for part in parts {
        let at = rest
            .find(part)
            .unwrap_or_else(|| panic!("{part:?} is not in {text}"));
        rest = &rest[at + part.len() - 1..];
    }

    for (words, code, said) in [
        (
            &["nobody", "web"][..],
            1,
            "no pod named 'nobody' is attached",
        ),
        (
            &["web", "nobody"],
            1,
            "there is no pod or node called 'nobody'",
        ),
        (&["web", "apj"], 1, "called 'apj' (did you mean 'api'?)"),
        (&["web", "n3"], 1, "called 'n3' (did you mean 'n1'?)"),
        (&["web", "dbx"], 1, "called 'dbx' (did you mean 'db'?)"),
        (&["web", "fd00::1"], 2, "'web' has no address of IPv6"),
        (&["web", "db", "-6"], 2, "'web' has no address of IPv6"),
        (
            &["web", "fd00::1", "-4"],
            2,
            "'fd00::1' has no address of IPv4",
        ),
        (&["web", "db", "--size", "10"], 2, "has 40 to 65535 bytes"),
        (
            &["outside", "web", "--dport", "81"],
            2,
            "it publishes 0.0.0.0:8080->80/tcp",
        ),
        (&["outside", "db"], 1, "no pod named 'db' is attached"),
        (&["host", "db"], 2, "'muslin host-interface'"),
    ] {
        let output = bed.run(words);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
        assert!(
            error.contains(said) && error.lines().count() == 1,
            "{words:?}: {error}"
        );
    }
    let lost = bed.run(&["web", "db", "--ttl", "1"]);
    assert_eq!(lost.status.code(), Some(1));
    let text = String::from_utf8(lost.stdout).unwrap();
    assert!(text.contains("  => LOST, ttl-exceeded: "), "{text}");
    assert!(
        text.contains("  also, to pod web: ICMP time exceeded"),
        "{text}"
    );
}

const SECRET: &str = "of-two-nodes-that-ask-each-other";

fn with_secret(lab: &Lab, config: NodeConfig, number: u8, secret: &str) -> NodeConfig {
    let file = lab.directory().join(format!("secret-{number}"));
    std::fs::write(&file, format!("{secret}\n")).unwrap();
    config.with("--trace-secret-file", file.display())
}

/// Two nodes whose control sockets are on different machines, with these secrets if any, and pods `web`
/// and `db`.
struct Apart {
    nodes: [Node; 2],
    web: Agent,
    db: Agent,
    _lab: Lab,
}

impl Apart {
    fn new(backend: &str, secrets: [Option<&str>; 2]) -> Option<Self> {
        let lab = Lab::new()?;
        let store = lab.store();
        let nodes = [1, 2].map(|number: u8| {
            let address = Ipv4Addr::new(10, 9, 0, number);
            let name = format!("n{number}");
            let mut config = match backend {
                "host-gw" => NodeConfig::on_interface(&name, "eth0", &store),
                _ => NodeConfig::new(&name, address, &store),
            };
            config = config
                .with("--network", "10.244.0.0/16")
                .with("--backend", backend);
            if let Some(secret) = secrets[usize::from(number) - 1] {
                config = with_secret(&lab, config, number, secret);
            }
            config.start(&lab.host(&name, address))
        });
        let mut apart = Self::of(lab, nodes, &[]);
        let far = apart.db.address("eth0").unwrap();
        traffic::ping(&mut apart.web, far);
        Some(apart)
    }

    /// The same in both IP versions.
    fn dual(backend: &str) -> Option<Self> {
        let lab = Lab::new()?;
        let [first, second] = dual(&lab, backend);
        let nodes = [(1, first), (2, second)]
            .map(|(number, (config, host))| with_secret(&lab, config, number, SECRET).start(&host));
        let mut apart = Self::of(lab, nodes, &["-6"]);
        let far = apart.db.address_v6("eth0").unwrap();
        traffic::ping(&mut apart.web, far);
        Some(apart)
    }

    fn of(lab: Lab, nodes: [Node; 2], version: &[&str]) -> Self {
        for node in &nodes {
            node.wait_peers(1);
        }
        let (web, db) = (nodes[0].pod("web"), nodes[1].pod("db"));
        let apart = Self {
            nodes,
            web,
            db,
            _lab: lab,
        };
        poll_until(SOON, "the names of the other node", || {
            let output = apart.run(&[&["web", "db"], version].concat());
            (output.status.code() == Some(0)).then_some(())
        });
        apart
    }

    fn run(&self, words: &[&str]) -> Output {
        let words: Vec<_> = ["trace"].iter().chain(words).copied().collect();
        self.nodes[0].client(&words).output().unwrap()
    }

    fn trace(&self, words: &[&str]) -> (Value, Option<i32>) {
        let output = self.run(&[words, &["--json"]].concat());
        let way = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            let said = String::from_utf8_lossy(&output.stderr);
            panic!("{words:?}: {error}: {said}")
        });
        (way, output.status.code())
    }

    /// How many packets the second node has dropped for this reason.
    fn drops(&self, reason: &str) -> u64 {
        let rows = self.nodes[1].query("drops");
        let mut rows = rows.as_array().unwrap().iter();
        let row = rows.find(|row| row["reason"] == reason);
        row.map_or(0, |row| row["packets"].as_u64().unwrap())
    }
}

/// A trace goes on where the other node's part is asked for over the pod network.
fn goes_on_at_another_machine(apart: Option<Apart>, version: &[&str]) {
    let Some(apart) = apart else { return };
    let trace = |words: &[&str]| apart.trace(&[words, version].concat());
    let (way, code) = trace(&["web", "db"]);
    assert_eq!((&way["unknown"], code), (&Value::Null, Some(0)), "{way:#}");
    let last = &way["parts"][1];
    assert_eq!(last["node"], "n2");
    assert_eq!(last["outcome"]["text"], "Delivered to pod db.");
    // As it does for one machine.
    let (way, code) = trace(&["web", "db", "--ttl", "2"]);
    let reason = &way["parts"][1]["outcome"]["reason"];
    assert_eq!((reason.as_str(), code), (Some("ttl-exceeded"), Some(1)));
    let (way, _) = trace(&["web", "db", "--size", "1430"]);
    assert_eq!(way["parts"].as_array().unwrap().len(), 2, "{way:#}");
    assert_eq!(apart.drops("exchange-refused"), 0);
    assert_eq!(apart.drops("gateway-port"), 0);
}

#[test]
fn over_vxlan_it_goes_on_at_another_machine() {
    goes_on_at_another_machine(Apart::new("vxlan", [Some(SECRET); 2]), &[]);
}

#[test]
fn on_the_link_it_goes_on_at_another_machine() {
    goes_on_at_another_machine(Apart::new("host-gw", [Some(SECRET); 2]), &[]);
}

/// Gateways ask each other in the version of the packet.
#[test]
fn in_ipv6_it_goes_on_at_another_machine() {
    goes_on_at_another_machine(Apart::dual("vxlan"), &["-6"]);
    goes_on_at_another_machine(Apart::dual("host-gw"), &["-6"]);
}

/// A trace ends with one line that says why the other node's part is not known.
fn ends_with(secrets: [Option<&str>; 2], why: &str, dropped: Option<&str>) {
    let Some(apart) = Apart::new("vxlan", secrets) else {
        return;
    };
    let (way, code) = apart.trace(&["web", "db"]);
    assert_eq!((way["parts"].as_array().unwrap().len(), code), (1, Some(0)));
    assert_eq!(way["unknown"]["node"], "n2");
    let said = way["unknown"]["why"].as_str().unwrap();
    assert!(said.contains(why), "{said}");
    let text = String::from_utf8(apart.run(&["web", "db"]).stdout).unwrap();
    let last = text.lines().last().unwrap();
    assert!(
        last.starts_with("The rest is for node n2 at ") && last.contains(why),
        "{text}"
    );
    if let Some(reason) = dropped {
        assert!(apart.drops(reason) > 0, "{reason}");
    }
}

#[test]
fn who_is_not_allowed_to_ask_is_told_so() {
    ends_with(
        [None, Some(SECRET)],
        "this one has no --trace-secret-file",
        None,
    );
}

#[test]
fn who_asks_a_node_that_allows_nobody_is_told_so() {
    ends_with(
        [Some(SECRET), None],
        "does not answer",
        Some("gateway-port"),
    );
}

#[test]
fn who_asks_by_another_secret_is_told_so() {
    let other = Some("of-others-that-are-not-asked");
    ends_with(
        [other, Some(SECRET)],
        "does not answer",
        Some("exchange-refused"),
    );
}

#[test]
fn no_pod_can_ask() {
    let Some(mut apart) = Apart::new("vxlan", [Some(SECRET); 2]) else {
        return;
    };
    let gateway = SocketAddrV4::new(apart.nodes[1].address(1), 8486);
    for pod in [&mut apart.db, &mut apart.web] {
        // It is refused, which is an error of the socket.
        let _ = pod.udp(gateway, 3, 100);
    }
    poll_until(SOON, "packets of both pods", || {
        (apart.drops("gateway-port") >= 2).then_some(())
    });
    let messages = ["exchange-malformed", "exchange-rate", "exchange-refused"];
    assert_eq!(messages.map(|reason| apart.drops(reason)), [0; 3]);
}

/// What became of probes, by a report of `--live`, and how it ended.
fn live(mut command: Command) -> (Value, Option<i32>) {
    let output = command.output().unwrap();
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (report, output.status.code())
}

fn probes(node: &Node, words: &[&str]) -> (Value, Option<i32>) {
    live(node.client(&[&["trace", "--live", "--json"], words].concat()))
}

/// How many were sent, arrived and were answered.
fn counts(report: &Value) -> [u64; 3] {
    ["sent", "arrived", "answered"].map(|key| report[key].as_u64().unwrap())
}

/// Where a node has seen a probe on its way there, and what it did, in short.
fn seen(report: &Value, node: usize, sequence: u64) -> Vec<(String, String)> {
    let sightings = report["nodes"][node]["sightings"].as_array().unwrap();
    let own = sightings.iter().filter(|it| it["sequence"] == sequence);
    let words = own.map(|it| {
        let way = if it["is_answer"] == true { "back " } else { "" };
        let verdict = it["reason"].as_str().or(it["verdict"].as_str());
        let hook = it["hook"].as_str().unwrap();
        (format!("{way}{hook}"), verdict.unwrap().to_owned())
    });
    words.collect()
}

fn words(all: &[(&str, &str)]) -> Vec<(String, String)> {
    let all = all.iter();
    all.map(|(hook, verdict)| ((*hook).to_owned(), (*verdict).to_owned()))
        .collect()
}

/// Probes are seen by both nodes on their way and back.
fn are_seen_on_their_way(node: &Node, version: &[&str]) {
    let probes = |words: &[&str]| probes(node, &[words, version].concat());
    let (report, code) = probes(&["web", "db", "--proto", "icmp", "--count", "2"]);
    assert_eq!((counts(&report), code), ([2, 2, 2], Some(0)), "{report:#}");
    for sequence in [1, 2] {
        let here = words(&[("from-pod", "sent"), ("back from-tunnel", "delivered")]);
        assert_eq!(seen(&report, 0, sequence), here, "{report:#}");
        let there = words(&[("from-tunnel", "delivered"), ("back from-pod", "sent")]);
        assert_eq!(seen(&report, 1, sequence), there, "{report:#}");
    }
    // The destination's kernel may have refused them already, and quotes what it refuses.
    for protocol in ["tcp", "udp"] {
        let (report, code) = probes(&["web", "db", "--proto", protocol, "--count", "1"]);
        let [sent, arrived, _] = counts(&report);
        assert_eq!((sent, arrived, code), (1, 1, Some(0)), "{report:#}");
        let there = &seen(&report, 1, 1)[0];
        let wanted = words(&[("from-tunnel", "delivered")]);
        assert_eq!(*there, wanted[0], "{report:#}");
    }
    let lost = ["web", "db", "--ttl", "2", "--count", "1"];
    let (report, code) = probes(&lost);
    assert_eq!((counts(&report), code), ([1, 0, 0], Some(1)), "{report:#}");
    let there = &seen(&report, 1, 1)[0];
    assert_eq!(there.1, "ttl-exceeded", "{report:#}");
}

#[test]
fn probes_are_seen_by_nodes_of_one_machine() {
    let Some(bed) = Bed::new("vxlan") else { return };
    are_seen_on_their_way(&bed.nodes[0], &[]);
    // More than one answer of a node has room for.
    let many = ["web", "db", "--proto", "icmp", "--count", "25"];
    let (report, code) = probes(&bed.nodes[0], &many);
    assert_eq!((counts(&report), code), ([25; 3], Some(0)), "{report:#}");
    for node in [0, 1] {
        let sightings = report["nodes"][node]["sightings"].as_array().unwrap();
        assert_eq!(sightings.len(), 50, "{report:#}");
    }
    let words = ["trace", "--live", "web", "db", "--proto", "icmp"];
    let output = bed.nodes[0].client(&words).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.ends_with("\n3 probes sent, 3 arrived, 3 answered\n"),
        "{text}"
    );
    // More often than a node captures at once.
    for _ in 0..6 {
        let words = ["web", "api", "--proto", "icmp", "--count", "1"];
        let (report, code) = probes(&bed.nodes[0], &words);
        assert_eq!((counts(&report), code), ([1, 1, 1], Some(0)), "{report:#}");
    }
    let lost = [&words[..], &["--ttl", "1", "--count", "1"]].concat();
    let output = bed.nodes[0].client(&lost).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("ICMP echo request, 48 bytes, TTL 1"),
        "{text}"
    );
    assert!(text.contains("  LOST, ttl-exceeded: "), "{text}");
    for (words, said) in [
        (&["--live", "host", "db"][..], "--live sends as a pod"),
        (&["--live", "web", "web"], "is the sender's own address"),
        (&["web", "db", "--count", "2"], "--live"),
        (&["--live", "web", "db", "--count", "501"], "1..=500"),
    ] {
        let output = bed.run(words);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {error}");
        assert!(error.contains(said), "{words:?}: {error}");
    }
}

#[test]
fn probes_are_seen_by_nodes_of_two_machines() {
    let Some(apart) = Apart::new("vxlan", [Some(SECRET); 2]) else {
        return;
    };
    are_seen_on_their_way(&apart.nodes[0], &[]);
}

#[test]
fn probes_of_ipv6_are_seen_by_nodes_of_two_machines() {
    let Some(apart) = Apart::dual("vxlan") else {
        return;
    };
    are_seen_on_their_way(&apart.nodes[0], &["-6"]);
}

#[test]
fn probes_are_answered_where_the_other_node_tells_nothing() {
    let Some(apart) = Apart::new("vxlan", [None; 2]) else {
        return;
    };
    let words = ["web", "db", "--proto", "icmp", "--count", "1"];
    let (report, code) = probes(&apart.nodes[0], &words);
    assert_eq!((counts(&report), code), ([1, 1, 1], Some(0)), "{report:#}");
    let there = &report["nodes"][1];
    assert_eq!(there["node"], "n2");
    let why = there["silent"].as_str().unwrap();
    assert!(why.contains("--trace-secret-file"), "{why}");
}
