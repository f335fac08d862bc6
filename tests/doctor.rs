//! The doctor: what is fine is called so, and what is wrong comes with what to do.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;

use muslin_lab::etcd::Etcd;
use muslin_lab::{Lab, Node, NodeConfig, cni_bin, muslin_bin};
use serde_json::Value;

const ONE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// The findings, and whether the doctor found nothing wrong.
fn doctor(mut command: Command) -> (Vec<Value>, bool) {
    let output = command.arg("--json").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let findings = serde_json::from_slice(&output.stdout);
    let findings = findings.unwrap_or_else(|error| panic!("{error}: {stderr}"));
    match output.status.code() {
        Some(0) => (findings, true),
        Some(1) => (findings, false),
        code => panic!("{code:?}: {stderr}"),
    }
}

/// The verdict on something, and all that is said about it.
#[track_caller]
fn verdict(findings: &[Value], check: &str) -> (String, String) {
    let found = findings.iter().find(|finding| finding["check"] == check);
    let found = found.unwrap_or_else(|| panic!("no {check}: {findings:#?}"));
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    (
        text("verdict"),
        format!("{} {}", text("detail"), text("advice")),
    )
}

#[track_caller]
fn is(findings: &[Value], check: &str, expected: &str, words: &[&str]) {
    let (verdict, text) = verdict(findings, check);
    assert_eq!(verdict, expected, "{check}: {text}");
    for word in words {
        assert!(text.contains(word), "no '{word}': {check}: {text}");
    }
}

fn config(lab: &Lab, name: &str, address: Ipv4Addr) -> NodeConfig {
    NodeConfig::new(name, address, &lab.store()).with("--mtu", 1500)
}

/// Two nodes on two hosts that know each other.
fn two_nodes(lab: &Lab) -> (Node, Node) {
    let start = |name, address| config(lab, name, address).start(&lab.host(name, address));
    let (one, other) = (start("n1", ONE), start("n2", OTHER));
    one.wait_peers(1);
    other.wait_peers(1);
    (one, other)
}

fn peer(other: &Node) -> String {
    format!("peer {}", other.status("subnet"))
}

#[test]
fn a_healthy_node_has_nothing_wrong() {
    let Some(lab) = Lab::new() else { return };
    let (one, other) = two_nodes(&lab);
    let (findings, healthy) = doctor(one.client(&["doctor"]));
    assert!(healthy, "{findings:#?}");
    for check in [
        "clock",
        "user namespaces",
        "/dev/net/tun",
        "state directory",
        "public address",
        "port",
        "offload",
    ] {
        is(&findings, check, "fine", &[]);
    }
    is(&findings, "MTU", "fine", &["1450"]);
    is(&findings, "store", "fine", &["sqlite:", "2 leases"]);
    is(&findings, "losses", "fine", &[]);
    is(
        &findings,
        &peer(&other),
        "fine",
        &["10.9.0.2", "1450 bytes"],
    );
    // The pod that it sent from is gone.
    assert_eq!(one.query("pods"), Value::Array(Vec::new()));
}

#[test]
fn a_peer_that_is_dead_or_behind_a_small_mtu_is_named() {
    let Some(lab) = Lab::new() else { return };
    let (one, mut other) = two_nodes(&lab);
    let peer = peer(&other);
    // Its name comes by the store, later than its lease.
    wait_state(&one, "alive");
    one.host().run(&[
        "ip", "route", "add", "10.9.0.2", "dev", "eth0", "mtu", "1400",
    ]);
    let (findings, healthy) = doctor(one.client(&["doctor"]));
    is(&findings, &peer, "warning", &["1400", "--mtu 1400"]);
    assert!(healthy, "slow is not wrong: {findings:#?}");
    other.kill();
    let (findings, healthy) = doctor(one.client(&["doctor"]));
    is(
        &findings,
        &peer,
        "wrong",
        &["n2", "10.9.0.2", "UDP 8472", "leases --drop"],
    );
    assert!(!healthy);
}

/// What a node says of its only peer.
fn peer_row(node: &Node) -> Value {
    node.query("peers")[0].clone()
}

/// Waits until a node says this of the state of its only peer, n2, in both tables.
#[track_caller]
fn wait_state(node: &Node, state: &str) {
    let what = format!("a peer that is {state}{}", node.log());
    muslin_lab::poll_until(muslin_lab::SOON, &what, || {
        let row = peer_row(node);
        let leases = node.query("leases");
        let mut leases = leases.as_array()?.iter();
        let lease = leases.find(|lease| lease["subnet"] == row["subnet"])?;
        let is_named = row["node"] == "n2" && lease["node"] == "n2";
        (is_named && row["state"] == state && lease["state"] == state).then_some(())
    });
}

/// The answer to `muslin leases --drop`, or the exit code and the complaint.
fn drop_lease(node: &Node, words: &[&str]) -> Result<Value, (Option<i32>, String)> {
    let words = [&["leases", "--json", "--drop"], words].concat();
    let output = node.client(&words).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout).unwrap());
    }
    Err((output.status.code(), stderr))
}

#[test]
fn a_node_that_has_stopped_is_no_fault_and_its_lease_can_be_given_back() {
    let Some(lab) = Lab::new() else { return };
    let (one, mut other) = two_nodes(&lab);
    wait_state(&one, "alive");
    let row = peer_row(&one);
    let subnet = row["subnet"].as_str().unwrap().to_owned();
    assert_eq!(row["node"], "n2");
    assert!(row["heard_seconds"].as_u64().unwrap() < 30, "{row}");
    // A node that is alive keeps its lease, and so does the one that is asked.
    let (code, text) = drop_lease(&one, &["n2"]).unwrap_err();
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("n2") && text.contains("alive"), "{text}");
    for (wanted, word) in [
        ("n1", "muslin leave"),
        ("n3", "'n3'"),
        ("10.0.0.0/8", "10.0.0.0/8"),
    ] {
        let (code, text) = drop_lease(&one, &[wanted]).unwrap_err();
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(word), "{text}");
    }
    assert!(other.is_running());

    let pid = other.query("status")["pid"].as_i64().unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(other.wait_exit(muslin_lab::SOON), Some(0));
    wait_state(&one, "stopped");
    let (findings, healthy) = doctor(one.client(&["doctor"]));
    is(
        &findings,
        &format!("peer {subnet}"),
        "fine",
        &["n2", "stopped"],
    );
    assert!(healthy, "{findings:#?}");

    // It writes its record anew when it is back: until then it is one that has stopped.
    let records = || one.log().matches("names: node n2 at").count();
    let before = records();
    other.start_again();
    muslin_lab::poll_until(muslin_lab::SOON, "its record says that it runs", || {
        (records() > before).then_some(())
    });
    wait_state(&one, "alive");
    assert_eq!(peer_row(&one)["subnet"], subnet.as_str());
    other.kill();
    wait_state(&one, "silent");
    let dropped = drop_lease(&one, &[&subnet]).unwrap();
    assert_eq!(dropped["node"], "n2");
    assert_eq!(dropped["state"], "silent");
    assert_eq!(dropped["names_removed"], true);
    assert!(
        dropped["seconds_left"].as_u64().unwrap() > 80_000,
        "{dropped}"
    );
    one.wait_peers(0);
    assert_eq!(one.query("leases").as_array().unwrap().len(), 1);

    // With force a node that is alive loses it, and takes it again.
    other.start_again();
    wait_state(&one, "alive");
    let dropped = drop_lease(&one, &["n2", "--force"]).unwrap();
    assert_eq!(dropped["state"], "alive");
    wait_state(&one, "alive");
}

#[test]
fn a_device_that_garbles_trains_is_noticed() {
    let Some(lab) = Lab::new() else { return };
    let (mut one, other) = two_nodes(&lab);
    one.host().loses_trains("eth0");
    let (findings, healthy) = doctor(one.client(&["doctor"]));
    let words = ["1450 bytes", "segmented UDP sends", "--offload tap,gro"];
    is(&findings, &peer(&other), "warning", &words);
    // The kernel itself is not to blame.
    is(&findings, "offload", "fine", &[]);
    assert!(healthy, "slow is not wrong: {findings:#?}");

    one.start_again_as(config(&lab, "n1", ONE).with("--offload", "tap,gro"));
    one.wait_peers(1);
    let (findings, _) = doctor(one.client(&["doctor"]));
    is(&findings, &peer(&other), "fine", &["1450 bytes"]);
}

#[test]
fn a_kernel_that_garbles_trains_is_not_trusted_with_them() {
    let Some(lab) = Lab::new() else { return };
    let (mut one, other) = two_nodes(&lab);
    assert_eq!(one.status("offload"), "tap,gso,gro");
    one.host().loses_trains("lo");
    one.start_again();
    one.wait_peers(1);
    assert_eq!(one.status("offload"), "tap,gro", "{}", one.log());
    let (findings, healthy) = doctor(one.client(&["doctor"]));
    let words = ["does not segment UDP sends", "or corrupts"];
    is(&findings, "offload", "warning", &words);
    is(&findings, &peer(&other), "fine", &["1450 bytes"]);
    assert!(healthy, "slow is not wrong: {findings:#?}");
}

#[test]
fn a_machine_without_a_node_is_told_what_it_lacks() {
    let Some(lab) = Lab::new() else { return };
    let host = lab.host("n1", ONE);
    let ask = |flags: &[&str], script: &str| {
        let mut command = host.command("sh");
        let state = lab.directory().join("none");
        command.args([
            "-e",
            "-c",
            &format!("{script}\nexec \"$0\" \"$@\""),
            muslin_bin(),
            "doctor",
        ]);
        command.arg("--state-dir").arg(state).args(flags);
        doctor(command)
    };
    let (findings, healthy) = ask(&["--iface", "eth0"], "");
    assert!(healthy, "{findings:#?}");
    is(&findings, "public address", "fine", &["10.9.0.1", "eth0"]);
    is(&findings, "port", "fine", &["8472"]);
    is(&findings, "node", "unknown", &["muslin node"]);

    let (findings, _) = ask(&["--iface", "nosuch0"], "");
    is(&findings, "public address", "wrong", &["nosuch0"]);

    let (findings, healthy) = ask(&["--store", "etcd://127.0.0.1:1"], "");
    is(&findings, "store", "wrong", &["127.0.0.1:1"]);
    assert!(!healthy);

    let vxlan =
        "ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0; ip link set flannel.1 up";
    let (findings, _) = ask(&["--public-ip", "10.9.0.1"], vxlan);
    is(&findings, "port", "wrong", &["8472", "flannel"]);

    let none = "exec unshare --user --map-root-user sh -c \
                'echo 0 > /proc/sys/user/max_user_namespaces; exec \"$0\" \"$@\"' \"$0\" \"$@\"";
    let (findings, healthy) = ask(&[], none);
    is(
        &findings,
        "user namespaces",
        "wrong",
        &["user.max_user_namespaces"],
    );
    is(&findings, "/dev/net/tun", "unknown", &[]);
    assert!(!healthy);
}

#[test]
fn routes_into_the_pod_network_are_named() {
    let Some(lab) = Lab::new() else { return };
    let (one, _other) = two_nodes(&lab);
    one.host().sh(
        "ip link add cni0 type bridge; ip addr add 10.244.200.1/24 dev cni0; ip link set cni0 up",
    );
    let (findings, _) = doctor(one.client(&["doctor"]));
    is(
        &findings,
        "routes",
        "warning",
        &["10.244.200.0/24", "10.244.0.0/16"],
    );
}

#[test]
fn what_flannel_has_left_is_named_at_the_start_too() {
    let Some(lab) = Lab::new() else { return };
    let (mut one, _other) = two_nodes(&lab);
    // Of a flannel with another port, so that the tunnels do not get in each other's way.
    one.host().sh(&format!(
        "ip link add cni0 type bridge; ip link set cni0 up; ip addr add {}/24 dev cni0
         ip link add flannel.1 type vxlan id 1 dstport 8473 dev eth0; ip link set flannel.1 up
         ip addr add {}/32 dev flannel.1
         ip route add 10.244.250.0/24 via 10.244.250.0 dev flannel.1 onlink",
        one.address(1),
        one.address(0),
    ));
    let bridge = format!("cni0 has {}/24", one.address(1));
    let bridge = [&*bridge, "cut off", "ip link del cni0"];
    let routes = ["flannel.1: 10.244.250.0/24", "ip link del flannel.1"];
    let (findings, healthy) = doctor(one.client(&["doctor"]));
    is(&findings, "own subnet", "wrong", &bridge);
    is(&findings, "routes", "warning", &routes);
    assert!(!healthy);
    one.start_again();
    for words in [&bridge[..], &routes] {
        let log = one.log();
        let line = log.lines().find(|line| line.contains(words[0]));
        let line = line.unwrap_or_else(|| panic!("no {words:?}{log}"));
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
    one.host().sh("ip link del cni0; ip link del flannel.1");
    let (findings, _) = doctor(one.client(&["doctor"]));
    is(&findings, "own subnet", "fine", &[]);
    is(&findings, "routes", "fine", &[]);
}

/// A server of HTTP that answers everything in this way.
fn server(answer: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    address
}

#[test]
fn a_clock_far_from_that_of_etcd_is_told_how_far() {
    let state = tempfile::tempdir().unwrap();
    let ask = |store: String| {
        let mut command = Command::new(muslin_bin());
        command.args(["doctor", "--store", &store, "--state-dir"]);
        command.arg(state.path());
        doctor(command).0
    };
    let past = server("HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n{}");
    let future = server("HTTP/1.1 200 OK\r\nDate: Fri, 01 Jan 9999 00:00:00 GMT\r\n\r\n{}");
    let mute = server("HTTP/1.1 200 OK\r\n\r\n{}");
    let name = past.to_string();
    let findings = ask(format!("etcd://{past},{mute}"));
    is(
        &findings,
        "clock",
        "warning",
        &["ahead of", " d ", &name, "synchronisation"],
    );
    let findings = ask(format!("etcd://{future}"));
    is(&findings, "clock", "warning", &["behind", " d "]);
    let findings = ask(format!("etcd://{mute}"));
    is(&findings, "clock", "unknown", &["does not report its time"]);
}

#[test]
fn the_clock_of_a_nodes_etcd_is_looked_at() {
    let Some(lab) = Lab::new() else { return };
    let Some(mut etcd) = Etcd::start(&lab) else {
        return;
    };
    let host = lab.host("n1", ONE);
    let node = NodeConfig::new("n1", ONE, &etcd.store()).start(&host);
    let server = etcd.store().replace("etcd:", "http:");
    let (findings, healthy) = doctor(node.client(&["doctor"]));
    assert!(healthy, "{findings:#?}");
    is(&findings, "clock", "fine", &["within 30 s", &server]);
    is(&findings, "store", "fine", &["etcd:"]);
    etcd.kill();
    let (findings, _) = doctor(node.client(&["doctor"]));
    is(&findings, "clock", "unknown", &[&server]);
    is(&findings, "store", "wrong", &["check that it runs"]);
}

#[test]
fn a_program_that_its_user_may_not_read_makes_pods_all_the_same() {
    // As one with file capabilities, it has files in /proc that are root's.
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("muslin");
    std::fs::copy(muslin_bin(), &program).unwrap();
    let mode = |path: &std::path::Path, mode| {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(directory.path(), 0o777);
    mode(&program, 0o111);
    let mut command = Command::new("setpriv");
    if nix::unistd::geteuid().is_root() {
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    }
    command
        .arg("--")
        .arg(&program)
        .args(["doctor", "--state-dir"]);
    command.arg(directory.path().join("state"));
    let (findings, _) = doctor(command);
    is(&findings, "user namespaces", "fine", &[]);
}

#[test]
fn what_container_runtimes_find_is_looked_at() {
    let Some(lab) = Lab::new() else { return };
    let host = lab.host("n1", ONE);
    let node = config(&lab, "n1", ONE).start(&host);
    let directory = |name: &str| {
        let path = lab.directory().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (conf, bin) = (directory("conf"), directory("bin"));
    let examine = || {
        let mut command = node.client(&["doctor"]);
        command.arg("--cni-conf-dir").arg(&conf);
        command.arg("--cni-bin-dir").arg(&bin);
        doctor(command)
    };
    let (findings, healthy) = examine();
    assert!(!healthy);
    is(
        &findings,
        "CNI configuration",
        "wrong",
        &["muslin cni install"],
    );

    let mut install = host.command(muslin_bin());
    install.args(["cni", "install", "--plugin", cni_bin(), "--socket"]);
    install.arg(node.socket()).arg("--bin-dir").arg(&bin);
    assert!(
        install
            .arg("--conf-dir")
            .arg(&conf)
            .status()
            .unwrap()
            .success()
    );
    let (findings, healthy) = examine();
    assert!(healthy, "{findings:#?}");
    is(
        &findings,
        "CNI configuration",
        "fine",
        &["10-muslin.conflist"],
    );
    is(&findings, "CNI plugin", "fine", &["muslin-cni"]);

    // Another first, plugins behind that are useless or missing, another socket, an old plugin.
    let chain = |plugins: Value| {
        let list = serde_json::json!({"cniVersion": "1.0.0", "name": "a", "plugins": plugins});
        std::fs::write(conf.join("10-muslin.conflist"), list.to_string()).unwrap();
    };
    std::fs::write(conf.join("05-other.conf"), "{}").unwrap();
    chain(
        serde_json::json!([{"type": "muslin-cni", "socket": "/run/other.sock"}, {"type": "portmap"}]),
    );
    let script = "printf '#!/bin/sh\necho muslin-cni 0.0.1: old >&2\n' >\"$0\"";
    let plugin = bin.join("muslin-cni");
    host.run(&["sh", "-c", script, plugin.to_str().unwrap()]);
    let (findings, healthy) = examine();
    assert!(!healthy);
    is(
        &findings,
        "CNI configuration",
        "wrong",
        &["05-other.conf", "--conf-name"],
    );
    is(&findings, "CNI socket", "warning", &["/run/other.sock"]);
    is(
        &findings,
        "CNI plugin",
        "wrong",
        &["0.0.1", "muslin cni install"],
    );
    is(
        &findings,
        "CNI chain",
        "wrong",
        &["portmap", "portMappings"],
    );
    let missing = findings.iter().filter(|it| it["check"] == "CNI plugin");
    assert!(
        missing
            .clone()
            .any(|it| it["detail"].as_str().unwrap().contains("is not there"))
    );
    chain(serde_json::json!([{"type": "muslin-cni"}, {"type": "firewall"}]));
    is(&examine().0, "CNI chain", "warning", &["no effect"]);
    chain(serde_json::json!([{"type": "muslin-cni"}, {"type": "bandwidth"}]));
    is(&examine().0, "CNI chain", "wrong", &["capability"]);
}
