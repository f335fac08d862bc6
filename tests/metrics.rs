//! What Prometheus reads of a node: that it agrees with the node's other reports and with what pods did,
//! that Prometheus' own tools have nothing to say against it, and that a real one reads it and evaluates
//! the rules of `deploy/`; that dashboard, rules and documentation name what is there.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use muslin_lab::etcd::{Etcd, PREFIX};
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until, traffic};
use regex::Regex;
use serde_json::Value;

/// Where nodes serve their metrics.
const PORT: u16 = 8482;
/// Where Prometheus answers.
const PROMETHEUS: &str = "127.0.0.1:9090";
/// What a scraper says that knows OpenMetrics.
const OPEN_METRICS: &str = "application/openmetrics-text;version=1.0.0,*/*;q=0.1";
/// Bytes that a pod sends.
const BYTES: u64 = 3_000_000;

/// What is at a place on the network of a host: the head of the answer and its body.
fn get(host: &Host, address: &str, path: &str, accept: &str) -> Option<(String, String)> {
    let script = r#"
        my ($address, $path, $accept) = @ARGV;
        my $s = IO::Socket::INET->new($address) or exit; alarm 10;
        print $s "GET $path HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: $accept\r\n\r\n";
        local $/; print <$s>"#;
    let words = [
        "perl",
        "-MIO::Socket::INET",
        "-e",
        script,
        address,
        path,
        accept,
    ];
    let answer = host.run(&words);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.to_owned(), body.to_owned()))
}

/// The metrics of a node, as text.
fn scrape(host: &Host, accept: &str) -> String {
    let address = format!("127.0.0.1:{PORT}");
    let (head, body) = get(host, &address, "/metrics", accept).unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    body
}

/// The samples by their names and labels.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let mut samples = BTreeMap::new();
    for line in lines {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let again = samples.insert(name.to_owned(), value.parse().unwrap());
        assert_eq!(again, None, "twice: {line}");
    }
    samples
}

/// Two nodes on two hosts that serve metrics, the second one also for others.
struct Bed {
    nodes: Vec<Node>,
    hosts: [Host; 2],
    lab: Lab,
}

impl Bed {
    fn new() -> Option<Self> {
        let lab = Lab::new()?;
        lab.limit(Duration::from_secs(180));
        let store = format!("sqlite:{}", lab.directory().join("leases.db").display());
        let address = |number| Ipv4Addr::new(10, 9, 0, number);
        let hosts = [1, 2].map(|number| lab.host(&format!("h{number}"), address(number)));
        let served = [
            format!("127.0.0.1:{PORT}"),
            format!("{}:{PORT}", address(2)),
        ];
        let nodes = (1..).zip(hosts.iter().zip(served));
        let nodes: Vec<_> = nodes
            .map(|(number, (host, served))| {
                let config = NodeConfig::new(&format!("n{number}"), address(number), &store);
                config.with("--metrics", served).start(host)
            })
            .collect();
        for node in &nodes {
            node.wait_peers(1);
        }
        Some(Self { nodes, hosts, lab })
    }
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

/// What the other reports of a node say of what is in its metrics.
fn reported(node: &Node) -> BTreeMap<String, f64> {
    let mut all = BTreeMap::new();
    let mut put = |name: String, value: &Value| {
        all.insert(name, value.as_f64().unwrap());
    };
    let status = node.query("status");
    for what in [
        "received",
        "originated",
        "delivered",
        "sent",
        "flooded",
        "consumed",
    ] {
        put(
            format!("muslin_{what}_packets_total"),
            &status["packets"][what],
        );
    }
    put(
        "muslin_superseded_acknowledgements_total".to_owned(),
        &status["packets"]["superseded"],
    );
    put("muslin_egress_flows".to_owned(), &status["egress"]["open"]);
    put(
        "muslin_egress_flows_opened_total".to_owned(),
        &status["egress"]["opened"],
    );
    put(
        "muslin_dns_queries_total".to_owned(),
        &status["dns"]["queries"],
    );
    put("muslin_workers".to_owned(), &status["workers"]);
    put("muslin_pods".to_owned(), &status["pods"]);
    put(
        "muslin_published_ports".to_owned(),
        &status["published"]["ports"],
    );
    for row in rows(&node.query("drops")) {
        let reason = row["reason"].as_str().unwrap();
        let name = format!("muslin_dropped_packets_total{{reason=\"{reason}\"}}");
        put(name, &row["packets"]);
    }
    for (table, label, key) in [("pods", "pod", "pod"), ("peers", "peer", "subnet")] {
        for row in rows(&node.query(table)) {
            let who = row[key].as_str().unwrap();
            for (direction, of) in [("from", "received"), ("to", "sent")] {
                for unit in ["packets", "bytes"] {
                    let labels = format!("{{{label}=\"{who}\",direction=\"{direction}\"}}");
                    put(
                        format!("muslin_{label}_{unit}_total{labels}"),
                        &row[of][unit],
                    );
                }
            }
        }
    }
    all
}

#[test]
fn metrics_agree_with_reports_and_with_what_pods_did() {
    let Some(bed) = Bed::new() else { return };
    let (node, host) = (&bed.nodes[0], &bed.hosts[0]);
    let mut pod = node.pod_after("web", &["-p", "127.0.0.1:8080:80"], "");
    let mut other = bed.nodes[1].pod("other");
    let address = other.address("eth0").unwrap();
    let port = other.listen(0).unwrap();
    traffic::transfer(&mut pod, address, port, BYTES);
    traffic::expires(&mut pod, address, 1, node.address(1));

    let (text, open) = poll_until(SOON, "metrics that are as the reports", || {
        let reported = reported(node);
        let text = scrape(host, "*/*");
        let samples = samples(&text);
        let is_same = reported.iter().all(|(name, value)| {
            let sample = samples.get(name);
            assert!(sample.is_some(), "no {name}: {text}");
            sample == Some(value)
        });
        is_same.then(|| (text, scrape(host, OPEN_METRICS)))
    });
    let samples = samples(&text);
    let value = |name: &str| {
        let sample = samples.get(name);
        *sample.unwrap_or_else(|| panic!("no {name}: {text}"))
    };
    let from = r#"{pod="web",direction="from"}"#;
    assert!(value(&format!("muslin_pod_bytes_total{from}")) > BYTES as f64);
    let subnet = bed.nodes[1].status("subnet");
    let to = format!("muslin_peer_bytes_total{{peer=\"{subnet}\",direction=\"to\"}}");
    assert!(value(&to) > BYTES as f64, "{text}");
    assert_eq!(
        value(r#"muslin_dropped_packets_total{reason="ttl-exceeded"}"#),
        3.0
    );
    assert!(value("muslin_superpackets_total{from=\"pod\"}") > 0.0);
    assert!(value("muslin_sent_batch_size_count") > 0.0);
    assert!(value("muslin_received_batch_size_sum") >= value("muslin_received_batch_size_count"));
    assert_eq!(value("muslin_published_ports"), 1.0);
    assert_eq!(value("muslin_data_path_up"), 1.0);
    assert_eq!(value("muslin_store_up"), 1.0);
    assert_eq!(value(r#"muslin_healthy{check="readyz"}"#), 1.0);
    assert_eq!(value(&format!("muslin_peer_up{{peer=\"{subnet}\"}}")), 1.0);
    assert_eq!(value(r#"muslin_peers{state="alive"}"#), 1.0);
    assert!(value("muslin_egress_flow_limit") > 100.0);
    assert!(value(r#"muslin_worker_cpu_seconds_total{worker="0"}"#) > 0.0);
    assert!(value("process_open_fds") < value("process_max_fds"));
    assert!(
        value("process_start_time_seconds")
            <= value("muslin_lease_acquired_timestamp_seconds") + 1.0
    );
    let writes = r#"muslin_store_request_duration_seconds_count{request="create"}"#;
    assert!(value(writes) >= 1.0, "{text}");
    // It was written a moment ago, for a day.
    let written = value("muslin_lease_confirmed_timestamp_seconds");
    let left = value("muslin_lease_expiry_timestamp_seconds") - written;
    assert!((86_300.0..=86_402.0).contains(&left), "{left}");
    let who = format!(
        "muslin_node_info{{node=\"n1\",version=\"{}\",backend=\"vxlan\",network=\"10.244.0.0/16\",\
         subnet=\"{}\"}}",
        env!("CARGO_PKG_VERSION"),
        node.status("subnet")
    );
    assert_eq!(value(&who), 1.0);
    // The same in the other format.
    assert!(open.ends_with("# EOF\n"), "{open}");
    assert!(open.contains("# TYPE muslin_pod_bytes counter\n"), "{open}");
    assert!(open.contains("# UNIT muslin_pod_bytes bytes\n"), "{open}");

    documented(&text);
    named(&text);
}

/// The names of all samples, with those of which there is none now.
fn names(text: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for line in text.lines() {
        match line.strip_prefix("# TYPE ") {
            Some(rest) => {
                let (name, kind) = rest.split_once(' ').unwrap();
                match kind {
                    "histogram" => {
                        let parts = ["bucket", "sum", "count"];
                        names.extend(parts.map(|part| format!("{name}_{part}")));
                    }
                    _ => {
                        names.insert(name.to_owned());
                    }
                }
            }
            None => assert!(
                line.starts_with("# HELP ") || !line.starts_with('#'),
                "{line}"
            ),
        }
    }
    names
}

fn read(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `docs/metrics.md` has each metric in a row, with its type, its labels and what it says of itself.
fn documented(text: &str) {
    let labels = Regex::new(r#"([a-z]+)=""#).unwrap();
    let mut kind = BTreeMap::new();
    let mut help = BTreeMap::new();
    let mut used: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, rest)) = line
            .strip_prefix("# HELP ")
            .and_then(|it| it.split_once(' '))
        {
            help.insert(name, rest);
        } else if let Some((name, rest)) = line
            .strip_prefix("# TYPE ")
            .and_then(|it| it.split_once(' '))
        {
            kind.insert(name, rest);
        } else {
            let name = line.split(['{', ' ']).next().unwrap();
            let family = help.keys().filter(|family| name.starts_with(**family));
            let family = family.max_by_key(|family| family.len()).unwrap();
            let own = labels.captures_iter(line).map(|it| it[1].to_owned());
            let own = own.filter(|label| label != "le");
            used.entry(family).or_default().extend(own);
        }
    }
    let document = read("docs/metrics.md");
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `"));
    let mut rows: BTreeMap<_, _> = rows
        .map(|row| {
            let cells: Vec<_> = row.trim_end_matches(" |").split(" | ").collect();
            let [name, kind, labels, help] = cells[..] else {
                panic!("{row}")
            };
            (name.trim_end_matches('`').to_owned(), (kind, labels, help))
        })
        .collect();
    for (name, help) in &help {
        let row = rows.remove(*name);
        let (told, labels, text) = row.unwrap_or_else(|| {
            panic!(
                "docs/metrics.md has no row: | `{name}` | {} | | {help} |",
                kind[name]
            )
        });
        assert_eq!((told, text), (kind[name], *help), "{name}");
        if let Some(used) = used.get(name) {
            let told = labels
                .split(", ")
                .map(|it| it.trim_matches(['`', ' ']).to_owned());
            let told: BTreeSet<_> = told.filter(|it| !it.is_empty()).collect();
            assert_eq!(&told, used, "{name}");
        }
    }
    assert_eq!(rows.keys().collect::<Vec<_>>(), [""; 0]);
}

/// Dashboard and alert rules use metrics and reasons that are there.
fn named(text: &str) {
    let names = names(text);
    let used = Regex::new(r"\b(?:muslin|process)_[a-z0-9_]+").unwrap();
    let matches = Regex::new(r#"([a-z]+)\s*(?:=|=~|!=)\s*\\?"([^"\\]+)\\?""#).unwrap();
    let values = |label: &str, text: &str| -> BTreeSet<String> {
        let found = matches.captures_iter(text).filter(|it| &it[1] == label);
        found
            .flat_map(|it| it[2].split('|').map(str::to_owned).collect::<Vec<_>>())
            .collect()
    };
    for file in [
        "deploy/grafana/muslin.json",
        "deploy/prometheus/alerts.yaml",
    ] {
        let content = read(file);
        let expressions = expressions(file, &content);
        assert!(expressions.len() > 10, "{file}: {expressions:?}");
        let mut count = 0;
        for expression in &expressions {
            for found in used.find_iter(expression) {
                assert!(
                    names.contains(found.as_str()),
                    "{file}: {}: {expression}",
                    found.as_str()
                );
                count += 1;
            }
            for label in [
                "reason",
                "state",
                "check",
                "direction",
                "request",
                "from",
                "result",
            ] {
                let known = values(label, text);
                for value in values(label, expression) {
                    let is_any = [".*", ".+"].contains(&value.as_str());
                    assert!(is_any || known.contains(&value), "{file}: {label} {value}");
                }
            }
        }
        assert!(count >= expressions.len() - 1, "{file}: {expressions:?}");
    }
}

/// The expressions of a dashboard or of rules.
fn expressions(file: &str, content: &str) -> Vec<String> {
    let parsed: Value = match file.ends_with(".json") {
        true => serde_json::from_str(content).unwrap(),
        false => serde_saphyr::from_str(content).unwrap(),
    };
    let mut found = Vec::new();
    let mut left = vec![&parsed];
    while let Some(value) = left.pop() {
        match value {
            Value::Array(all) => left.extend(all),
            Value::Object(all) => {
                left.extend(all.values());
                found.extend(all.get("expr").and_then(Value::as_str).map(str::to_owned));
            }
            _ => {}
        }
    }
    found
}

#[test]
fn prometheus_own_tool_has_nothing_to_say() {
    let Some(bed) = Bed::new() else { return };
    let host = &bed.hosts[0];
    if !host.has("promtool", "prometheus") {
        return;
    }
    let mut pod = bed.nodes[0].pod("web");
    traffic::ping(&mut pod, bed.nodes[1].address(1));
    let text = scrape(host, "text/plain");
    let mut command = host.command("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut tool = command.spawn().unwrap();
    let mut input = tool.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let output = tool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.is_empty(), "{said}\n{text}");

    let rules = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus/alerts.yaml");
    let said = host.run(&["promtool", "check", "rules", rules.to_str().unwrap()]);
    assert!(said.contains("SUCCESS"), "{said}");
}

/// A Prometheus; it ends with the test.
struct Prometheus {
    host: Host,
    process: Child,
    log: PathBuf,
}

impl Prometheus {
    /// One that reads these nodes each second and evaluates the rules without patience.
    fn start(bed: &Bed, targets: &[&str]) -> Self {
        let directory = bed.lab.directory();
        let file = |name: &str| directory.join(name);
        let patience = Regex::new(r"(?m)^(\s+for:) .*$").unwrap();
        let rules = read("deploy/prometheus/alerts.yaml");
        let rules = patience.replace_all(&rules, "$1 0s");
        std::fs::write(file("alerts.yaml"), &*rules).unwrap();
        let targets: Vec<_> = targets.iter().map(|it| format!("'{it}'")).collect();
        let config = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}\n\
             rule_files: ['{}']\n\
             scrape_configs:\n- job_name: muslin\n  static_configs: [{{targets: [{}]}}]\n",
            file("alerts.yaml").display(),
            targets.join(", ")
        );
        std::fs::write(file("prometheus.yml"), config).unwrap();
        let log = file("prometheus.log");
        let output = std::fs::File::create(&log).unwrap();
        let host = bed.hosts[0].clone();
        let mut command = host.command("prometheus");
        command
            .arg(format!(
                "--config.file={}",
                file("prometheus.yml").display()
            ))
            .arg(format!("--storage.tsdb.path={}", file("tsdb").display()))
            .arg(format!("--web.listen-address={PROMETHEUS}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        let process = command.spawn().unwrap();
        Self { host, process, log }
    }

    /// The data of an answer, once it has one.
    fn ask(&self, path: &str) -> Option<Value> {
        let (head, body) = get(&self.host, PROMETHEUS, path, "*/*")?;
        if !head.starts_with("HTTP/1.1 200 ") {
            return None;
        }
        // It may come in chunks.
        let begin = body.find('{')?;
        let body = match head
            .to_ascii_lowercase()
            .contains("transfer-encoding: chunked")
        {
            true => unchunked(&body)?,
            false => body[begin..].to_owned(),
        };
        let answer: Value = serde_json::from_str(&body).ok()?;
        (answer["status"] == "success").then(|| answer["data"].clone())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The alerts that fire, with the instances that they are about.
    fn alerts(&self) -> BTreeSet<(String, String)> {
        let data = self.ask("/api/v1/alerts");
        let alerts = data.iter().flat_map(|data| rows(&data["alerts"]));
        let fire = alerts.filter(|alert| alert["state"] == "firing");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        fire.map(|alert| {
            let labels = &alert["labels"];
            (text(&labels["alertname"]), text(&labels["instance"]))
        })
        .collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("--- log of Prometheus:\n{}---", self.log());
        }
    }
}

/// A body that came in chunks (RFC 9112 section 7.1).
fn unchunked(mut body: &str) -> Option<String> {
    let mut whole = String::new();
    loop {
        let (len, rest) = body.split_once("\r\n")?;
        let len = usize::from_str_radix(len, 16).ok()?;
        if len == 0 {
            return Some(whole);
        }
        whole.push_str(rest.get(..len)?);
        body = rest.get(len..)?.strip_prefix("\r\n")?;
    }
}

#[test]
fn a_real_prometheus_reads_it_and_raises_an_alert_when_a_peer_is_killed() {
    let Some(mut bed) = Bed::new() else { return };
    if !bed.hosts[0].has("prometheus", "prometheus") {
        return;
    }
    let pod = bed.nodes[0].pod("web");
    let here = format!("127.0.0.1:{PORT}");
    let there = format!("10.9.0.2:{PORT}");
    let prometheus = Prometheus::start(&bed, &[&here, &there]);
    let minute = Duration::from_secs(60);
    poll_until(minute, "two nodes that are up", || {
        let data = prometheus.ask("/api/v1/query?query=sum(up)")?;
        (data["result"][0]["value"][1] == "2").then_some(())
    });
    poll_until(minute, "the series of a pod", || {
        let query = "/api/v1/query?query=muslin_pod_packets_total%7Bpod%3D%22web%22%7D";
        let data = prometheus.ask(query)?;
        (rows(&data["result"]).len() == 2).then_some(())
    });
    let targets = prometheus.ask("/api/v1/targets").unwrap();
    for target in rows(&targets["activeTargets"]) {
        assert_eq!(target["lastError"], "", "{target}");
    }
    poll_until(minute, "that all rules are evaluated", || {
        let data = prometheus.ask("/api/v1/rules")?;
        let mut rules = rows(&data["groups"])
            .iter()
            .flat_map(|it| rows(&it["rules"]));
        rules
            .all(|rule| {
                assert_ne!(rule["health"], "err", "{rule}");
                rule["health"] == "ok"
            })
            .then_some(())
    });
    assert_eq!(prometheus.alerts(), BTreeSet::new());

    bed.nodes[1].kill();
    let wanted = [("MuslinDown", &there), ("MuslinPeerSilent", &here)];
    let wanted = wanted.map(|(name, instance)| (name.to_owned(), instance.clone()));
    let wanted = BTreeSet::from(wanted);
    poll_until(minute, "alerts about the node that was killed", || {
        (prometheus.alerts() == wanted).then_some(())
    });
    bed.nodes[1].start_again();
    poll_until(minute, "the end of the alerts", || {
        prometheus.alerts().is_empty().then_some(())
    });
    assert_eq!(prometheus.log(), "", "it warns of nothing");
    drop(pod);
}

#[test]
fn an_address_that_cannot_be_had_is_told_in_a_line() {
    let Some(bed) = Bed::new() else { return };
    let store = format!("sqlite:{}", bed.lab.directory().join("leases.db").display());
    let config = NodeConfig::new("third", Ipv4Addr::new(127, 0, 0, 3), &store);
    for (address, code, words) in [
        ("8482".to_owned(), 2, "--metrics"),
        ("localhost:8482".to_owned(), 2, "--metrics"),
        (format!("127.0.0.1:{PORT}"), 1, "--metrics"),
        ("10.9.0.77:8482".to_owned(), 1, "10.9.0.77:8482"),
    ] {
        let mut node = config
            .clone()
            .with("--metrics", &address)
            .spawn(&bed.hosts[0]);
        assert_eq!(
            node.wait_exit(SOON),
            Some(code),
            "{address}: {}",
            node.log()
        );
        let log = node.log();
        let told = log.lines().filter(|line| line.contains(words));
        assert_eq!(told.count(), 1, "{address}: {log}");
    }
    assert_eq!(bed.nodes[0].query("status")["peers"], 1, "it took no lease");
}

#[test]
fn metrics_are_there_before_the_lease_and_after_a_take_over() {
    let Some(lab) = Lab::new() else { return };
    let host = lab.host("host", Ipv4Addr::new(10, 9, 0, 1));
    let store = format!("sqlite:{}", lab.directory().join("leases.db").display());
    let config = NodeConfig::on_interface("n", "late0", &store);
    let mut node = config
        .with("--metrics", format!("127.0.0.1:{PORT}"))
        .spawn(&host);
    node.wait_told(&["late0"]);
    let waiting = samples(&scrape(&host, "*/*"));
    assert_eq!(waiting[r#"muslin_healthy{check="healthz"}"#], 1.0);
    assert_eq!(waiting[r#"muslin_healthy{check="readyz"}"#], 0.0);
    assert!(!waiting.contains_key("muslin_received_packets_total"));
    host.sh(
        "ip link add late0 type veth peer name late1; ip addr add 10.7.0.1/24 dev late0
         ip link set late0 up",
    );
    node.wait_ready(SOON);
    let mut pod = node.pod("p");
    traffic::ping(&mut pod, node.address(1));
    let began = |node: &Node| {
        let what = format!("metrics of the process {}", node.pid());
        poll_until(SOON, &what, || {
            let samples = samples(&scrape(node.host(), "*/*"));
            let name = "muslin_pod_packets_total{pod=\"p\",direction=\"from\"}";
            samples.contains_key(name).then_some(samples)
        })
    };
    let before = began(&node);
    let mut old = node.take_over();
    let after = began(&node);
    let start = "process_start_time_seconds";
    assert!(after[start] >= before[start]);
    assert!(old.wait().unwrap().success());
    traffic::ping(&mut pod, node.address(1));
}

#[test]
fn a_store_that_is_away_is_seen() {
    let Some(lab) = Lab::new() else { return };
    let Some(mut etcd) = Etcd::start(&lab) else {
        return;
    };
    etcd.configure(PREFIX, r#"{"Network":"10.244.0.0/16"}"#);
    let host = lab.host("host", Ipv4Addr::new(10, 9, 0, 1));
    let config = NodeConfig::anywhere("n", &etcd.store());
    let config = config.with("--metrics", format!("127.0.0.1:{PORT}"));
    let node = config.start(&host);
    let failures = |samples: &BTreeMap<String, f64>| {
        let name = "muslin_store_request_failures_total";
        let all = samples.iter().filter(|(key, _)| key.starts_with(name));
        all.map(|(_, count)| count).sum::<f64>()
    };
    let wait = |is_up: f64| {
        let what = format!("muslin_store_up {is_up}{}", node.log());
        poll_until(SOON, &what, || {
            let samples = samples(&scrape(&host, "*/*"));
            (samples["muslin_store_up"] == is_up).then_some(samples)
        })
    };
    let before = wait(1.0);
    etcd.kill();
    let away = wait(0.0);
    assert!(failures(&away) > failures(&before), "{away:?}");
    // Its pods are served nevertheless, and the lease ends when it would have.
    assert_eq!(away[r#"muslin_healthy{check="readyz"}"#], 1.0);
    let ends = "muslin_lease_expiry_timestamp_seconds";
    assert!((away[ends] - before[ends]).abs() <= 2.0, "{away:?}");
    etcd.start_again();
    wait(1.0);
}
