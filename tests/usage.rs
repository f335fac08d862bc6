//! Wrong usage and failures: one line that says what is wrong, the right exit code, and nothing
//! left half done.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use muslin_lab::{Host, Lab, NodeConfig, SOON, muslin_bin};

/// Wrong usage or configuration.
const USAGE: i32 = 2;
/// Failed at run time.
const FAILED: i32 = 1;

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Checks that a command failed so, with one line that has all these words in it.
#[track_caller]
fn complains(output: &Output, code: i32, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let shown = format!("{}\n{stderr}", output.status);
    assert_eq!(output.status.code(), Some(code), "{shown}");
    assert!(output.stdout.is_empty(), "{shown}");
    // The command line's parser has its own form: the line, and hints.
    let hint = |line: &&str| {
        let begins = ["  ", "Usage: ", "For more information, try '--help'."];
        stderr.starts_with("error: ") && begins.iter().any(|begin| line.starts_with(begin))
    };
    let lines: Vec<&str> = stderr
        .lines()
        .filter(|line| !line.is_empty() && !hint(line))
        .collect();
    assert_eq!(lines.len(), 1, "one line: {shown}");
    let begins = ["muslin: ", "error: "]
        .iter()
        .any(|word| lines[0].starts_with(word));
    assert!(begins, "{shown}");
    for word in words {
        assert!(lines[0].contains(word), "no '{word}': {shown}");
    }
    for wrong in ["panicked", "RUST_BACKTRACE", "Error(", "Os {"] {
        assert!(!stderr.contains(wrong), "{shown}");
    }
}

/// Runs `muslin node` with these arguments to its end.
fn node(host: &Host, state: &Path, arguments: &[&str]) -> Output {
    let mut command = host.command("timeout");
    command
        .args(["-k", "1", "50", muslin_bin(), "node", "--state-dir"])
        .arg(state)
        .args(arguments)
        .stdin(Stdio::null());
    command.output().unwrap()
}

/// What `muslin status` says about a state directory.
fn status(host: &Host, state: &Path) -> Output {
    let mut command = host.command(muslin_bin());
    command.args(["status", "--state-dir"]).arg(state);
    command.output().unwrap()
}

/// All sockets below a directory.
fn sockets(directory: &Path) -> Vec<String> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(sockets(&entry.path()));
        } else if kind.is_socket() {
            found.push(entry.path().display().to_string());
        }
    }
    found
}

/// Checks that the nodes that failed there left neither sockets nor leases nor a network.
#[track_caller]
fn is_untouched(lab: &Lab, state: &Path) {
    assert_eq!(sockets(state), Vec::<String>::new());
    complains(&status(lab.root(), state), FAILED, &["no node"]);
    let store = state.join("store.db");
    if store.exists() {
        let store = format!("sqlite:{}", store.display());
        let good = NodeConfig::new("good", Ipv4Addr::new(127, 0, 0, 2), &store);
        let good = good.start(lab.root());
        assert_eq!(good.status("network"), "10.244.0.0/16", "a network is left");
        assert_eq!(
            good.query("peers").as_array().unwrap().len(),
            0,
            "a lease is left"
        );
    }
}

#[test]
fn a_wrong_configuration_is_refused_before_anything_is_begun() {
    let Some(lab) = Lab::new() else { return };
    let state = lab.directory().join("state");
    let public: &[&str] = &["--name", "n", "--public-ip", "127.0.0.1"];
    let cases: &[(&[&str], &[&str])] = &[
        (&["--network", "banana"], &["banana", "--network"]),
        (&["--network", "10.244.0.0/33"], &["10.244.0.0/33"]),
        (&["--network", "10.244.0.0"], &["10.244.0.0"]),
        (&["--network", "fe80::/48"], &["fe80::/48", "link-local"]),
        (&["--network", "10.1.0.0/16,10.2.0.0/16"], &["10.2.0.0/16"]),
        (
            &["--network", "fd00:1::/48", "--ipv6-network", "fd00:2::/48"],
            &["fd00:1::/48"],
        ),
        (
            &["--network", "fd00:1::/48", "--subnet-len", "24"],
            &["--subnet-len", "IPv4"],
        ),
        (
            &["--network", "fd00:1::/48", "--backend", "ipip"],
            &["ipip carries no IPv6"],
        ),
        (&["--network", "10.244.0.0/29"], &["10.244.0.0/29"]),
        (
            &["--network", "10.244.0.0/16", "--subnet-len", "15"],
            &["15"],
        ),
        (
            &["--network", "10.244.0.0/16", "--subnet-len", "32"],
            &["32"],
        ),
        (&["--subnet-len", "many"], &["many"]),
        (&["--backend", "pigeons"], &["pigeons"]),
        (&["--backend", "udp", "--vni", "3"], &["--vni"]),
        (&["--vni", "16777216"], &["16777216"]),
        (&["--port", "0"], &["--port"]),
        (&["--port", "65536"], &["65536"]),
        (&["--mtu", "99"], &["99"]),
        (&["--mtu", "65536"], &["65536"]),
        (&["--offload", "none,tap"], &["none"]),
        (&["--workers", "0"], &["1..=64"]),
        (&["--store", "pigeons:x"], &["pigeons"]),
        (&["--store", ""], &["store"]),
        (&["--nonsense"], &["--nonsense"]),
    ];
    for (number, (arguments, words)) in cases.iter().enumerate() {
        let arguments = [public, arguments].concat();
        eprintln!("{arguments:?}");
        let state = lab.directory().join(format!("state{number}"));
        complains(&node(lab.root(), &state, &arguments), USAGE, words);
        is_untouched(&lab, &state);
    }
    let elsewhere: &[(&[&str], &[&str])] = &[
        (
            &["--name", "n", "--public-ip", "224.0.0.77"],
            &["224.0.0.77"],
        ),
        (&["--name", "n", "--public-ip", "localhost"], &["localhost"]),
        (
            &["--name", "Bad_Name", "--public-ip", "127.0.0.1"],
            &["Bad_Name"],
        ),
        (&["--name", "../n", "--public-ip", "127.0.0.1"], &["../n"]),
        (&["--name", "", "--public-ip", "127.0.0.1"], &[]),
    ];
    for (arguments, words) in elsewhere {
        eprintln!("{arguments:?}");
        complains(&node(lab.root(), &state, arguments), USAGE, words);
    }
    is_untouched(&lab, &state);
}

#[test]
fn a_level_to_log_at_that_is_none_is_refused_by_every_command() {
    let Some(lab) = Lab::new() else { return };
    let state = lab.directory().join("state");
    let commands: [&[&str]; 3] = [&["node", "--name", "n"], &["status"], &["doctor"]];
    for command in commands {
        for level in ["nonsense", "muslin", "info,muslin=loud"] {
            let mut run = lab.root().command(muslin_bin());
            run.args(command).arg("--state-dir").arg(&state);
            let output = run.env("MUSLIN_LOG", level).output().unwrap();
            complains(&output, USAGE, &["MUSLIN_LOG", "off, error, warn"]);
        }
    }
    assert!(!state.exists(), "something was begun");
    let help = lab
        .root()
        .command(muslin_bin())
        .arg("--help")
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(help.contains("MUSLIN_LOG"), "{help}");
}

#[test]
fn a_home_is_used_whatever_its_bytes_are_and_must_have_room() {
    use std::os::unix::ffi::OsStrExt;
    let Some(lab) = Lab::new() else { return };
    let latin = lab.directory().join(OsStr::from_bytes(b"h\xe9"));
    std::fs::create_dir(&latin).unwrap();
    let start = |home: &Path| {
        let mut command = lab.root().command(muslin_bin());
        command
            .args(["node", "--name", "n", "--public-ip", "127.0.0.1"])
            .env("HOME", home)
            .env_remove("XDG_STATE_HOME")
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut node = start(&latin);
    let state = latin.join(".local/state/muslin");
    muslin_lab::poll_until(SOON, "the node in a home that is not UTF-8", || {
        assert_eq!(node.try_wait().unwrap(), None);
        state.join("nodes/n/control.sock").exists().then_some(())
    });
    assert!(state.join("store.db").exists());
    let siblings = std::fs::read_dir(lab.directory()).unwrap();
    let homes = siblings.filter(|it| it.as_ref().unwrap().file_name().as_bytes()[0] == b'h');
    assert_eq!(homes.count(), 1, "another home is made");
    node.kill().unwrap();
    node.wait().unwrap();

    let full = lab.directory().join("full");
    std::fs::create_dir(&full).unwrap();
    let at = full.display();
    let script = format!(
        "mount -t tmpfs -o size=16k none {at} && head -c 20000 /dev/zero >{at}/x; exec \"$@\""
    );
    let mut command = lab.root().command("sh");
    command.args([
        "-c",
        &script,
        "sh",
        "timeout",
        "20",
        muslin_bin(),
        "node",
        "--name",
        "n",
    ]);
    command
        .args(["--public-ip", "127.0.0.1"])
        .env("HOME", &full);
    let output = command.env_remove("XDG_STATE_HOME").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last = stderr.lines().last().unwrap_or_default();
    assert!(!output.status.success(), "{stderr}");
    for word in ["muslin: ", &full.display().to_string(), "--state-dir"] {
        assert!(last.contains(word), "no '{word}': {stderr}");
    }
}

#[test]
fn an_address_must_be_where_it_is_said_to_be() {
    let Some(lab) = Lab::new() else { return };
    let state = lab.directory().join("state");
    let host = lab.host("host", Ipv4Addr::new(10, 9, 0, 1));
    // What never can be ends at once,
    let arguments = ["--name", "n", "--public-ip", "127.0.0.1", "--iface", "eth0"];
    complains(
        &node(&host, &state, &arguments),
        USAGE,
        &["127.0.0.1", "eth0"],
    );
    is_untouched(&lab, &state);
    // and what may be later is waited for.
    let store = lab.store();
    type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
    let waiting: &[Case<'_>] = &[
        (
            &[("--public-ip", "10.9.0.1"), ("--iface", "lo")],
            &["10.9.0.1", "lo"],
        ),
        (
            &[("--public-ip", "10.9.0.1"), ("--iface", "nosuch0")],
            &["nosuch0", "eth0"],
        ),
        (&[("--iface", "nosuch0")], &["nosuch0", "eth0"]),
        (&[("--public-ip", "192.0.2.77")], &["192.0.2.77", "--iface"]),
    ];
    for (flags, words) in waiting {
        let mut config = NodeConfig::anywhere("n", &store);
        for (flag, value) in *flags {
            config = config.with(flag, value);
        }
        config.spawn(&host).wait_told(words);
    }
}

#[test]
fn a_network_that_has_the_tunnels_ends_in_it_is_not_written_down() {
    let Some(lab) = Lab::new() else { return };
    let state = lab.directory().join("state");
    let arguments = [
        "--name",
        "n",
        "--public-ip",
        "127.0.0.1",
        "--network",
        "127.0.0.0/8",
    ];
    let output = node(lab.root(), &state, &arguments);
    complains(&output, USAGE, &["127.0.0.1", "127.0.0.0/8"]);
    is_untouched(&lab, &state);
}

#[test]
fn a_store_that_is_wrong_or_out_of_reach_is_named() {
    let Some(lab) = Lab::new() else { return };
    let state = lab.directory().join("state");
    let start = |store: &str| {
        let arguments = ["--name", "n", "--public-ip", "127.0.0.1", "--store", store];
        node(lab.root(), &state, &arguments)
    };
    let file = lab.directory().join("peers.toml");
    let path = file.display().to_string();
    let url = format!("file:{path}");
    complains(&start(&url), FAILED, &[&path]);

    let header = "network = \"10.244.0.0/16\"\nbackend = \"vxlan\"\n";
    let row =
        |ip: &str, subnet: &str| format!("[[node]]\npublic-ip = \"{ip}\"\nsubnet = \"{subnet}\"\n");
    let ours = row("127.0.0.1", "10.244.1.0/24");
    let cases = [
        ("not TOML", "network = ".to_owned()),
        ("no network", format!("backend = \"vxlan\"\n{ours}")),
        (
            "overlapping subnets",
            format!("{header}{ours}{}", row("127.0.0.2", "10.244.1.0/25")),
        ),
        (
            "the same subnet twice",
            format!("{header}{ours}{}", row("127.0.0.2", "10.244.1.0/24")),
        ),
        (
            "the same address twice",
            format!("{header}{ours}{}", row("127.0.0.1", "10.244.2.0/24")),
        ),
        (
            "a subnet outside the network",
            format!("{header}{}", row("127.0.0.1", "10.245.1.0/24")),
        ),
        (
            "host bits in a subnet",
            format!("{header}{}", row("127.0.0.1", "10.244.1.7/24")),
        ),
        (
            "a group's MAC address",
            format!("{header}{ours}vtep-mac = \"01:00:5e:00:00:01\"\n"),
        ),
        (
            "an unknown backend",
            format!("network = \"10.244.0.0/16\"\nbackend = \"pigeons\"\n{ours}"),
        ),
        (
            "an unknown key",
            format!("{header}colour = \"red\"\n{ours}"),
        ),
    ];
    for (what, text) in &cases {
        eprintln!("{what}");
        std::fs::write(&file, text).unwrap();
        complains(&start(&url), FAILED, &["peers.toml"]);
    }
    let elsewhere = format!("{header}{}", row("127.0.0.2", "10.244.2.0/24"));
    std::fs::write(&file, elsewhere).unwrap();
    let mut unlisted = NodeConfig::new("n", LOOPBACK, &url).spawn(lab.root());
    unlisted.wait_told(&["peers.toml", "127.0.0.1"]);
    std::fs::write(&file, format!("{header}{ours}")).unwrap();
    unlisted.wait_ready(SOON);
    drop(unlisted);

    for (what, path) in [
        ("below a file", file.join("leases.db")),
        ("a directory", lab.directory().to_owned()),
        ("no database", file.clone()),
    ] {
        eprintln!("{what}");
        let store = format!("sqlite:{}", path.display());
        complains(&start(&store), FAILED, &[&path.display().to_string()]);
    }
    assert_eq!(sockets(&state), Vec::<String>::new());
    complains(&status(lab.root(), &state), FAILED, &["no node"]);
}

#[test]
fn what_another_node_has_is_not_taken() {
    let Some(lab) = Lab::new() else { return };
    let store = format!("sqlite:{}", lab.directory().join("first.db").display());
    let mut first = NodeConfig::new("first", LOOPBACK, &store).start(lab.root());
    let subnet = first.status("subnet");
    let state = first.state_dir();

    // The name.
    let same = [
        "--name",
        "first",
        "--public-ip",
        "127.0.0.2",
        "--store",
        &store,
    ];
    complains(&node(lab.root(), &state, &same), FAILED, &["first"]);
    // The address and the port, in another network.
    let other = format!("sqlite:{}", lab.directory().join("other.db").display());
    let elsewhere = lab.directory().join("elsewhere");
    let port = ["--name", "n", "--public-ip", "127.0.0.1", "--store", &other];
    complains(
        &node(lab.root(), &elsewhere, &port),
        FAILED,
        &["8472", "127.0.0.1"],
    );
    // The address, with another port.
    let same = [
        "--name",
        "n",
        "--public-ip",
        "127.0.0.1",
        "--store",
        &store,
        "--port",
        "8473",
    ];
    let output = node(lab.root(), &elsewhere, &same);
    assert!(
        matches!(output.status.code(), Some(FAILED | USAGE)),
        "{output:?}"
    );
    // Another network in the same store.
    let network = [
        "--name",
        "n",
        "--public-ip",
        "127.0.0.2",
        "--store",
        &store,
        "--network",
        "10.99.0.0/16",
    ];
    complains(
        &node(lab.root(), &elsewhere, &network),
        USAGE,
        &["10.99.0.0/16", "10.244.0.0/16", "--etcd-prefix", "--port"],
    );

    assert!(first.is_running(), "{}", first.log());
    assert_eq!(first.status("subnet"), subnet);
    assert_eq!(first.query("peers").as_array().unwrap().len(), 0);
    assert_eq!(sockets(&elsewhere), Vec::<String>::new());
    let alone = NodeConfig::new("alone", Ipv4Addr::new(127, 0, 0, 2), &other).start(lab.root());
    assert_eq!(
        alone.query("peers").as_array().unwrap().len(),
        0,
        "no lease is left"
    );
    let agent = first.pod("pod");
    drop(agent);
}

#[test]
fn a_pod_that_cannot_be_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    let store = lab.store();
    let node = NodeConfig::new("n", LOOPBACK, &store).start(lab.root());
    let mut pod = node.pod("pod");
    let taken = pod.address("eth0").unwrap().to_string();
    let before = node.query("pods");
    let [base, gateway, broadcast] = [0, 1, 255].map(|offset| node.address(offset).to_string());
    let run = |arguments: &[&str]| {
        let words = [&["run"], arguments, &["--", "true"]].concat();
        node.client(&words).output().unwrap()
    };
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["--name", "Bad_Name"], USAGE, &["Bad_Name"]),
        (&["--name", "-x"], USAGE, &[]),
        (&["--name", "a/b"], USAGE, &["a/b"]),
        (&["--ip", "10.244.300.1"], USAGE, &["10.244.300.1"]),
        (&["--ip", "10.200.0.2"], USAGE, &["10.200.0.2", "subnet"]),
        (&["--ip", &base], USAGE, &[&base]),
        (&["--ip", &gateway], USAGE, &[&gateway]),
        (&["--ip", &broadcast], USAGE, &[&broadcast]),
        (&["--ip", &taken], FAILED, &[&taken, "pod"]),
        (&["--name", "pod"], FAILED, &["'pod'"]),
    ];
    for (arguments, code, words) in cases {
        eprintln!("{arguments:?}");
        complains(&run(arguments), *code, words);
    }
    let missing = node.client(&["run", "--", "/nonexistent/program"]).output();
    complains(&missing.unwrap(), 127, &["/nonexistent/program"]);
    let silent = node
        .client(&["run", "--", "sh", "-c", "exit 42"])
        .output()
        .unwrap();
    assert_eq!(silent.status.code(), Some(42));
    assert!(silent.stderr.is_empty(), "{silent:?}");

    let client = |words: &[&str]| node.client(words).output().unwrap();
    complains(&client(&["detach", "nobody"]), FAILED, &["nobody"]);
    complains(&client(&["detach", "Bad_Name"]), USAGE, &["Bad_Name"]);
    complains(&client(&["attach"]), USAGE, &["required"]);
    complains(&client(&["attach", "--pid", "banana"]), USAGE, &["banana"]);
    complains(
        &client(&["attach", "--pid", "4194305"]),
        FAILED,
        &["4194305"],
    );
    complains(
        &client(&["attach", "--netns", "/nonexistent"]),
        FAILED,
        &["/nonexistent"],
    );
    // A file that is no namespace.
    complains(
        &client(&["attach", "--netns", "/dev/null"]),
        FAILED,
        &["/dev/null"],
    );
    let own = std::process::id().to_string();
    let ifname = ["attach", "--pid", &own, "--ifname", "far-too-long-a-name"];
    complains(&client(&ifname), USAGE, &["far-too-long-a-name"]);

    let shape = |pods: &serde_json::Value| {
        let rows = pods.as_array().unwrap().iter();
        rows.map(|row| row["address"].to_string())
            .collect::<Vec<_>>()
    };
    muslin_lab::poll_until(SOON, "only the pod is left", || {
        (shape(&node.query("pods")) == shape(&before)).then_some(())
    });
    assert_eq!(pod.address("eth0").unwrap().to_string(), taken);
}

#[test]
fn an_attached_namespace_keeps_nothing_of_an_attempt_that_failed() {
    let Some(lab) = Lab::new() else { return };
    let store = lab.store();
    let node = NodeConfig::new("n", LOOPBACK, &store).start(lab.root());
    let target = lab.namespace("target");
    let pid = target.pid().to_string();
    let attach = |more: &[&str]| {
        let words = [&["attach", "--pid", &pid], more].concat();
        node.client(&words).output().unwrap()
    };
    let links = || target.run(&["ip", "-o", "link"]).lines().count();
    let before = links();
    complains(&attach(&["--ip", "10.200.0.2"]), USAGE, &["10.200.0.2"]);
    assert_eq!(links(), before, "no interface is left");
    complains(&attach(&["--ifname", "lo"]), FAILED, &["'lo'", "--ifname"]);
    assert_eq!(node.query("pods").as_array().unwrap().len(), 0);

    let attached = attach(&["--name", "kept"]);
    assert!(attached.status.success(), "{attached:?}");
    let output = attach(&["--name", "again"]);
    complains(&output, FAILED, &["'eth0'", "--ifname"]);
    complains(
        &attach(&["--name", "kept", "--ifname", "eth1"]),
        FAILED,
        &["kept"],
    );
    assert_eq!(node.query("pods").as_array().unwrap().len(), 1);
    let mut agent = target.agent();
    muslin_lab::traffic::ping(&mut agent, node.address(1));
    let detached = node.client(&["detach", "kept"]).output().unwrap();
    assert!(detached.status.success(), "{detached:?}");
    assert_eq!(node.query("pods").as_array().unwrap().len(), 0);
    assert_eq!(links(), before, "the interface is gone");
}

#[test]
fn a_node_that_is_not_there_is_named() {
    let Some(lab) = Lab::new() else { return };
    let state = lab.directory().join("state");
    let client = |host: &Host, arguments: &[&str]| {
        let mut command: Command = host.command(muslin_bin());
        command.args(arguments).arg("--state-dir").arg(&state);
        command.output().unwrap()
    };
    for subcommand in [
        "status",
        "pods",
        "peers",
        "routes",
        "drops",
        "flows",
        "groups",
        "neighbours",
        "leave",
    ] {
        complains(&client(lab.root(), &[subcommand]), FAILED, &["no node"]);
        let output = client(lab.root(), &[subcommand, "--node", "nosuch"]);
        complains(&output, FAILED, &["nosuch"]);
    }
    complains(&client(lab.root(), &["run"]), FAILED, &["no node"]);
    complains(&client(lab.root(), &["frobnicate"]), USAGE, &["frobnicate"]);
    assert!(!state.exists(), "looking leaves nothing");

    // Two nodes of one state directory must be told apart, and a third does not exist.
    let store = lab.store();
    let first = NodeConfig::new("first", LOOPBACK, &store).start(lab.root());
    let second = NodeConfig::new("second", Ipv4Addr::new(127, 0, 0, 2), &store);
    let second = second.start_beside(&first);
    let ask = |more: &[&str]| {
        let state = first.state_dir().display().to_string();
        let words = [&[muslin_bin(), "status", "--state-dir", &state], more].concat();
        lab.root().output(&words)
    };
    let output = ask(&[]);
    complains(&output, USAGE, &["first", "second", "--node"]);
    complains(&ask(&["--node", "third"]), FAILED, &["third"]);
    assert!(ask(&["--node", "second"]).status.success());
    drop(second);
}
