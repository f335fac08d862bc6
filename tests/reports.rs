//! What a node reports: what happened to it, reports that are repeated, and what is said of empty ones.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};

use muslin_lab::watch::stretched;
use muslin_lab::{Lab, Node, NodeConfig, SOON, muslin_bin, poll_until};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn store(lab: &Lab) -> String {
    format!("sqlite:{}", lab.directory().join("leases.db").display())
}

/// A node on a host of its own that follows its interface.
fn start(lab: &Lab, number: u8) -> Node {
    let name = format!("n{number}");
    let host = lab.host(&name, Ipv4Addr::new(10, 9, 0, number));
    NodeConfig::on_interface(&name, "eth0", &store(lab)).start(&host)
}

/// Kinds and subjects of all events.
fn events(node: &Node) -> Vec<(String, String)> {
    let rows = node.query("events");
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| (text(row, "kind"), text(row, "subject")))
        .collect()
}

#[track_caller]
fn wait_for(node: &Node, kind: &str, subject: &str) {
    let wanted = (kind.to_owned(), subject.to_owned());
    poll_until(SOON, &format!("{kind} {subject}"), || {
        events(node).contains(&wanted).then_some(())
    });
}

fn run(mut command: Command) -> (String, String, Option<i32>) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(stdout), text(stderr), status.code())
}

/// A command that goes on, and its lines.
struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // Nobody may listen any more.
                let _ = sender.send(line);
            }
        });
        Self { child, lines }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(stretched(SOON)).unwrap()
    }

    /// Its first line with these words.
    fn expect(&self, words: &str) -> String {
        loop {
            let line = self.line();
            if line.contains(words) {
                return line;
            }
        }
    }

    /// Ends it as Ctrl-C does, which must be its end in order.
    fn interrupt(mut self) {
        let pid = Pid::from_raw(self.child.id() as i32);
        kill(pid, Signal::SIGINT).unwrap();
        let status = poll_until(SOON, "the end of a command", || {
            self.child.try_wait().unwrap()
        });
        assert!(status.success(), "{status}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_happens_is_remembered_and_can_be_followed() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab, 1);
    let key = node.status("subnet").replace('/', "-");
    wait_for(&node, "lease-taken", &key);
    let follower = Running::start(node.client(&["events", "--follow"]));
    let objects = Running::start(node.client(&["events", "--follow", "--json"]));
    let pods = ["events", "--follow", "--kind", "pod-attached"];
    let pods = Running::start(node.client(&pods));
    follower.expect("lease-taken");

    let web = node.pod("web");
    assert!(follower.expect("pod-attached").contains("  web  "));
    assert!(pods.line().contains("web"), "nothing else is told");
    drop(web);
    follower.expect("pod-detached");
    let other = start(&lab, 2);
    let subnet = other.status("subnet");
    let joined = follower.expect("peer-joined");
    assert!(joined.contains(&subnet), "{joined}");
    node.host().sh("ip link set eth0 mtu 1300");
    follower.expect("mtu-changed");
    let left = other.client(&["leave"]).output().unwrap();
    assert!(left.status.success(), "{left:?}");
    follower.expect("peer-lost");

    // The list is the same, in order.
    let (list, _, _) = run(node.client(&["events"]));
    let kinds: Vec<_> = list
        .lines()
        .map(|line| line.split_whitespace().nth(1).unwrap().to_owned())
        .collect();
    let expected = [
        "KIND",
        "lease-taken",
        "pod-attached",
        "pod-detached",
        "peer-joined",
        "mtu-changed",
        "peer-lost",
    ];
    assert_eq!(kinds, expected, "{list}");
    let mut numbers = Vec::new();
    for kind in &expected[1..] {
        let event: Value = serde_json::from_str(&objects.line()).unwrap();
        assert_eq!(event["kind"], *kind);
        numbers.push(event["sequence"].as_u64().unwrap());
    }
    assert_eq!(numbers, (1..=6).collect::<Vec<_>>());
    let (none, remark, code) = run(node.client(&["events", "--kind", "store-away"]));
    assert_eq!((none.as_str(), code), ("", Some(0)));
    assert!(remark.starts_with("no events: "), "{remark}");
    let recent = ["events", "--since", "1h", "--kind", "peer-joined", "--json"];
    let (recent, _, _) = run(node.client(&recent));
    let recent: Value = serde_json::from_str(&recent).unwrap();
    assert_eq!(recent.as_array().unwrap().len(), 1);

    // The next process knows what happened, and a reader goes on with it.
    drop(other);
    let mut old = node.take_over();
    poll_until(SOON, "the end of the old process", || {
        old.try_wait().unwrap()
    });
    follower.expect("taken-over");
    assert_eq!(events(&node)[1].0, "pod-attached");
    let seen: Value = serde_json::from_str(&objects.expect("taken-over")).unwrap();
    assert!(seen["sequence"].as_u64() > Some(6), "{seen}");
    // One that begins anew does not, and the reader sees its events nevertheless.
    node.start_again();
    let again = follower.expect("lease-taken");
    assert!(again.contains(&key), "{again}");
}

#[test]
fn a_pod_that_comes_and_goes_does_not_fill_the_memory() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 1);
    for _ in 0..8 {
        let (_, stderr, code) = run(node.client(&["run", "--name", "web", "true"]));
        assert_eq!(code, Some(0), "{stderr}");
    }
    let times = poll_until(SOON, "eight ends", || {
        let rows = node.query("events");
        let rows = rows.as_array().unwrap().clone();
        let detached = rows.iter().filter(|row| row["kind"] == "pod-detached");
        let times: Vec<_> = detached.map(|row| row["times"].as_u64().unwrap()).collect();
        (times.iter().sum::<u64>() == 8).then_some(times)
    });
    assert!(times.len() < 8, "{times:?}");
}

#[test]
fn limits_that_are_reached_are_events() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 1);
    let other = lab.host("other", Ipv4Addr::new(10, 9, 0, 2));
    // More datagrams than a socket's queue has room for.
    node.signal(Signal::SIGSTOP);
    let script = r#"socket(my $s, PF_INET, SOCK_DGRAM, 0);
        my $to = pack_sockaddr_in(8472, inet_aton("10.9.0.1"));
        send($s, "x" x 1400, 0, $to) // die "send: $!" for 1 .. 20000;"#;
    other.run(&["perl", "-MSocket", "-e", script]);
    node.signal(Signal::SIGCONT);
    wait_for(&node, "limit-reached", "underlay-overflow");
}

#[test]
fn a_store_that_is_away_and_back_is_told() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 1);
    let (place, spare) = (
        lab.directory().join("leases.db"),
        lab.directory().join("spare"),
    );
    let aside = |from: &std::path::Path, to: &std::path::Path| {
        for end in ["", "-wal", "-shm"] {
            let with_end = |path: &std::path::Path| format!("{}{end}", path.display());
            // Not all of them are there at all times.
            let _ = std::fs::rename(with_end(from), with_end(to));
        }
    };
    aside(&place, &spare);
    std::fs::write(&place, "not a database".repeat(1000)).unwrap();
    wait_for(&node, "store-away", &store(&lab));
    aside(&spare, &place);
    wait_for(&node, "store-back", &store(&lab));
}

#[test]
fn reports_are_repeated_in_a_pipe_and_on_a_terminal() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 1);
    let plain = Running::start(node.client(&["status", "--watch", "0.1"]));
    for _ in 0..3 {
        assert!(plain.expect("node  ").contains("n1"));
    }
    plain.interrupt();
    let json = Running::start(node.client(&["pods", "--watch=0.1", "--json"]));
    assert_eq!([json.line(), json.line()], ["[]", "[]"]);
    let _pod = node.pod("web");
    let row = json.expect("web");
    let row: Value = serde_json::from_str(&row).unwrap();
    assert_eq!(row[0]["pod"], "web");
    json.interrupt();
    // A reader that goes ends it.
    let quoted = format!(
        "{} drops --all --watch 0.1 --socket {} | head -n 3",
        muslin_bin(),
        node.socket().display()
    );
    assert_eq!(node.host().sh(&quoted).lines().count(), 3);

    for (no_color, dim) in [("", true), ("1", false)] {
        let size = Winsize {
            ws_row: 6,
            ws_col: 30,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let terminal = openpty(&size, None).unwrap();
        let mut command = node.client(&["drops", "--all", "--watch", "0.1"]);
        command.env("NO_COLOR", no_color).env_remove("COLUMNS");
        command.stdout(terminal.slave);
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut screen = File::from(terminal.master);
        let mut seen = String::new();
        let mut read = || {
            let mut bytes = [0; 4096];
            // At its end a terminal is an error.
            let len = screen.read(&mut bytes).unwrap_or_default();
            seen += &String::from_utf8_lossy(&bytes[..len]);
            (seen.clone(), len)
        };
        // Two screens.
        while read().0.matches("\x1b[H").count() < 3 {}
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        while read().1 > 0 {}
        let (seen, _) = read();
        assert!(child.wait().unwrap().success());
        assert!(seen.starts_with("\x1b[2J\x1b[?25l"), "{seen:?}");
        assert!(seen.ends_with("\x1b[?25h\r\n"), "the cursor: {seen:?}");
        let one = seen.split("\x1b[H").nth(1).unwrap();
        assert_eq!(one.lines().count(), 6, "{one:?}");
        assert!(one.contains("more lines"), "{one:?}");
        assert_eq!(seen.contains("\x1b[2m"), dim, "{one:?}");
    }
}

#[test]
fn an_empty_report_says_why_and_a_wrong_name_what_is_meant() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab, 1);
    for report in ["pods", "peers", "flows", "drops"] {
        let (stdout, stderr, code) = run(node.client(&[report]));
        assert_eq!((stdout.as_str(), code), ("", Some(0)), "{report}");
        assert!(stderr.starts_with(&format!("no {report}: ")), "{stderr}");
        let (stdout, stderr, _) = run(node.client(&[report, "--json"]));
        assert!(serde_json::from_str::<Value>(&stdout).unwrap().is_array());
        assert_eq!(stderr, "", "{report}");
    }
    let _pod = node.pod("database");
    for (words, code, meant) in [
        (&["flows", "--pod", "databse"][..], 1, "'database'"),
        (&["detach", "datbase"], 1, "'database'"),
        (&["exec", "databasee", "true"], 1, "'database'"),
        (&["drops", "--reason", "strom"], 2, "'storm'"),
        (&["events", "--kind", "pod-atached"], 2, "'pod-attached'"),
    ] {
        let (_, stderr, status) = run(node.client(words));
        assert_eq!(status, Some(code), "{words:?}: {stderr}");
        assert!(stderr.contains(meant), "{words:?}: {stderr}");
    }
    let mut wrong = node.host().command(muslin_bin());
    wrong.args(["pods", "--state-dir"]).arg(node.state_dir());
    wrong.args(["--node", "n"]);
    let (_, stderr, code) = run(wrong);
    assert!(stderr.contains("(did you mean 'n1'?)"), "{stderr}");
    assert_eq!(code, Some(1));
    let mut wrong = node.host().command(muslin_bin());
    wrong.arg("pears");
    let (_, stderr, code) = run(wrong);
    assert!(stderr.contains("'peers'"), "{stderr}");
    assert_eq!(code, Some(2));
}

/// What is wrong with a value, by those parts of JSON schema that ours have. Undocumented fields are wrong.
fn check(value: &Value, schema: &Value, root: &Value, at: &str) -> Result<(), String> {
    if let Some(name) = schema["$ref"].as_str() {
        let name = name.strip_prefix("#/$defs/").unwrap();
        return check(value, &root["$defs"][name], root, at);
    }
    for choice in ["anyOf", "oneOf"] {
        if let Some(choices) = schema[choice].as_array() {
            let fits = |schema: &Value| check(value, schema, root, at).is_ok();
            let fits = choices.iter().any(fits);
            return fits
                .then_some(())
                .ok_or(format!("{at}: no choice fits {value}"));
        }
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let is_kind = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().any(|it| it == kind),
        one => one == kind,
    };
    if !is_kind {
        return Err(format!("{at} is {kind}: {schema}"));
    }
    let only = schema.get("const").is_none_or(|only| only == value);
    let listed = schema["enum"].as_array();
    if !only || listed.is_some_and(|all| !all.contains(value)) {
        return Err(format!("{at} cannot be {value}"));
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        check(item, &schema["items"], root, &format!("{at}[{index}]"))?;
    }
    if let Some(fields) = value.as_object() {
        for (name, field) in fields {
            let known = schema["properties"].get(name);
            let known = known.ok_or(format!("{at}.{name} is not documented"))?;
            check(field, known, root, &format!("{at}.{name}"))?;
        }
        for name in schema["required"].as_array().into_iter().flatten() {
            let name = name.as_str().unwrap();
            let field = fields.get(name);
            field.ok_or(format!("{at}.{name} is missing"))?;
        }
    }
    Ok(())
}

#[test]
fn what_is_printed_is_as_documented() {
    let Some(lab) = Lab::new() else { return };
    let (node, other) = (start(&lab, 1), start(&lab, 2));
    node.wait_peers(1);
    let _web = node.pod_after("web", &["-p", "8080:80"], "");
    let mut there = other.pod("there");
    let gateway = node.address(1);
    muslin_lab::traffic::ping(&mut there, gateway);
    let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schema");
    for report in [
        "status",
        "pods",
        "peers",
        "leases",
        "routes",
        "neighbours",
        "drops",
        "flows",
        "groups",
        "events",
    ] {
        let schema = std::fs::read(docs.join(format!("{report}.json"))).unwrap();
        let schema: Value = serde_json::from_slice(&schema).unwrap();
        let printed = node.query(report);
        let is_empty = printed.as_array().is_some_and(Vec::is_empty);
        assert!(
            !is_empty || ["flows", "groups"].contains(&report),
            "{report}: nothing to check"
        );
        if let Err(wrong) = check(&printed, &schema, &schema, report) {
            panic!("{wrong}");
        }
    }
    poll_until(SOON, "the names of the other node", || {
        let (_, _, code) = run(node.client(&["trace", "web", "there"]));
        (code == Some(0)).then_some(())
    });
    for (report, words) in [
        ("trace", &["web", "there"][..]),
        ("trace", &["web", "gateway", "--proto", "icmp"]),
        (
            "trace-live",
            &["web", "there", "--live", "--proto", "icmp", "--count", "1"],
        ),
        ("ping", &["gateway", "--count", "1", "--mtu"]),
    ] {
        let schema = std::fs::read(docs.join(format!("{report}.json"))).unwrap();
        let schema: Value = serde_json::from_slice(&schema).unwrap();
        let command = report.split('-').next().unwrap();
        let (stdout, stderr, _) = run(node.client(&[&[command], words, &["--json"]].concat()));
        let printed = serde_json::from_str(&stdout).unwrap_or_else(|error| {
            panic!("{words:?}: {error}: {stderr}");
        });
        if let Err(wrong) = check(&printed, &schema, &schema, report) {
            panic!("{wrong}");
        }
    }
}
