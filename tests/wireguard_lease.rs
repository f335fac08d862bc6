//! Nodes of flannel's `wireguard` backend in the store: what they publish of themselves, what they keep,
//! and whom they take for a peer.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;

use muslin::store::{self, EtcdOptions};
use muslin_lab::etcd::Etcd;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until};
use muslin_stack::control::lease::{Answer, Op};
use serde_json::Value;

const PREFIX: &str = "/coreos.com/network";
const PSK: &str = "4HAXZFAg2aqXKxI1GMXTEDKcNJeuMEJRr8rjFO8XmEY=";
const OTHER: &str = "mDnqJQyJjWLpXnqXRRYBXC5Sqt4nLDFGfaw1Ru5sDyc=";

fn host(lab: &Lab, number: u8) -> Host {
    let host = lab.host(&format!("h{number}"), Ipv4Addr::new(10, 9, 0, number));
    host.sh(&format!("ip addr add fd09::{number}/64 dev eth0 nodad"));
    host
}

/// What flannel writes of one IP version.
fn data(key: &str, port: u16) -> String {
    format!(r#"{{"PublicKey":"{key}","Port":{port}}}"#)
}

fn record(public: &str, key: &str) -> String {
    let data = data(key, 51820);
    format!(
        r#"{{"PublicIP":"{public}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{data}}}"#
    )
}

fn row(node: &Node, table: &str, public: &str) -> Option<Value> {
    let rows = node.query(table);
    let mut rows = rows.as_array().unwrap().iter();
    rows.find(|row| row["public_ip"] == public).cloned()
}

/// The state of a peer, once a node knows of it.
fn state(node: &Node, public: &str, words: &str) {
    let what = format!("'{words}' of {public}{}", node.log());
    poll_until(SOON, &what, || {
        let row = row(node, "peers", public)?;
        row["state"].as_str()?.contains(words).then_some(())
    });
}

#[test]
fn a_node_writes_flannels_record_and_keeps_its_key() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let config = format!(
        r#"{{"Network":"10.5.0.0/16","Backend":{{"type":"wireguard","listenPort":51820,"PSK":"{PSK}"}}}}"#
    );
    etcd.configure(PREFIX, &config);
    let config = NodeConfig::on_interface("n1", "eth0", &etcd.store()).logs("debug");
    let mut node = config.start(&host(&lab, 1));
    let key = node.status("public_key");
    let leases = || {
        let all = etcd.leases(PREFIX).into_iter();
        all.map(|lease| (lease.key, lease.value))
            .collect::<Vec<_>>()
    };
    let before = leases();
    let subnet = node.status("subnet").replace('/', "-");
    let own = format!("{PREFIX}/subnets/{subnet}");
    assert_eq!(before, [(own.clone(), record("10.9.0.1", &key))]);
    // As flannel has it, where `wg` can read it.
    let file = node.state_dir().join("nodes/n1/wireguard.key");
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let private = fs::read_to_string(&file).unwrap();
    assert_eq!(private.len(), 44);
    let env = fs::read_to_string(node.state_dir().join("nodes/n1/subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_MTU=1408\n"), "{env}");
    let status = node.query("status");
    assert_eq!(
        (&status["workers"], &status["port"]),
        (&1.into(), &51820.into())
    );
    assert_eq!(status["backend"], "wireguard");
    let listening = node.host().run(&["ss", "-Hlun"]);
    assert!(listening.contains("10.9.0.1:51820"), "{listening}");

    node.start_again();
    assert_eq!(node.status("public_key"), key);
    assert_eq!(leases(), before);

    // Secrets are nowhere but where they must be.
    let shown = ["status", "peers", "leases", "events"].map(|it| node.query(it).to_string());
    for text in shown.iter().chain([&node.log()]) {
        assert!(!text.contains(PSK) && !text.contains(&private), "{text}");
    }

    // Another key is another record under the same lease, as with flannel at each boot.
    node.kill();
    fs::remove_file(&file).unwrap();
    node.start_again();
    let other = node.status("public_key");
    assert_ne!(other, key);
    assert_eq!(leases(), [(own, record("10.9.0.1", &other))]);
}

#[test]
fn a_key_belongs_to_the_node_that_had_it_first() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    etcd.configure(
        PREFIX,
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"wireguard"}}"#,
    );
    let node = NodeConfig::on_interface("n1", "eth0", &etcd.store()).start(&host(&lab, 1));
    let lease = |subnet: &str| format!("{PREFIX}/subnets/{subnet}");
    etcd.create(&lease("10.5.201.0-24"), &record("10.9.0.201", OTHER));
    state(&node, "10.9.0.201", "silent");
    let peer = row(&node, "peers", "10.9.0.201").unwrap();
    assert_eq!(
        (&peer["public_key"], &peer["usable"]),
        (&OTHER.into(), &true.into())
    );
    etcd.create(&lease("10.5.202.0-24"), &record("10.9.0.202", OTHER));
    state(&node, "10.9.0.202", "its public key is that of 10.9.0.201");
    let own = node.status("public_key");
    etcd.create(&lease("10.5.203.0-24"), &record("10.9.0.203", &own));
    state(&node, "10.9.0.203", "this node's own public key");
    etcd.create(&lease("10.5.204.0-24"), &record("10.9.0.204", ""));
    state(&node, "10.9.0.204", "no public key");
    etcd.create(
        &lease("10.5.205.0-24"),
        &record("10.5.1.1", &own.replace(&own[..3], "AAA")),
    );
    state(&node, "10.5.1.1", "lies in the pod network");
    let routes = node.query("routes").to_string();
    assert!(routes.contains("10.5.201.0/24") && !routes.contains("10.5.202.0/24"));
    // It is the other's once the first has gone.
    etcd.delete(&lease("10.5.201.0-24"));
    state(&node, "10.9.0.202", "silent");
    let doctor = node.client(&["doctor"]).output().unwrap();
    let text = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(text.contains("both have the public key"), "{text}");
    assert!(
        text.contains("node n1 has a private key of its own"),
        "{text}"
    );
}

/// The values of all leases that a store has.
fn leases(store: &str) -> Vec<String> {
    let store = store::open(store, &EtcdOptions::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    let list = Op::List(format!("{PREFIX}/subnets"));
    match runtime.block_on(store.execute(list)).unwrap() {
        Answer::Snapshot { entries, .. } => entries.into_iter().map(|it| it.value).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dual_node_publishes_both_ends_and_listens_there() {
    let Some(lab) = Lab::new() else { return };
    let psk = lab.directory().join("psk");
    fs::write(&psk, format!("{PSK}\n")).unwrap();
    for (number, mode, port_v6) in [(1, "separate", 4001), (2, "auto", 4000)] {
        // Each in a store of its own.
        let url = format!("sqlite:{}", lab.directory().join(mode).display());
        let config = NodeConfig::on_interface(&format!("n{number}"), "eth0", &url)
            .with("--network", "10.244.0.0/16,fd00:244::/48")
            .with("--backend", "wireguard")
            .with("--port", 4000)
            .with("--wireguard-mode", mode)
            .with("--wireguard-psk-file", psk.display());
        let mut node = config.start(&host(&lab, number));
        let key = node.status("public_key");
        let expected = format!(
            r#"{{"PublicIP":"10.9.0.{number}","PublicIPv6":"fd09::{number}","BackendType":"wireguard","BackendData":{},"BackendV6Data":{}}}"#,
            data(&key, 4000),
            data(&key, port_v6)
        );
        assert_eq!(leases(&url), [expected], "{mode}");
        let listening = node.host().run(&["ss", "-Hlun"]);
        let ends = [
            format!("10.9.0.{number}:4000"),
            format!("[fd09::{number}]:{port_v6}"),
        ];
        for end in &ends {
            assert!(listening.contains(end), "{mode} {end}: {listening}");
        }
        // Another process goes on with the same.
        let mut old = node.take_over();
        assert!(old.wait().unwrap().success());
        assert_eq!(node.status("public_key"), key);
        let listening = node.host().run(&["ss", "-Hlun"]);
        assert!(
            ends.iter().all(|end| listening.contains(end)),
            "{listening}"
        );
        assert_eq!(
            (node.mtu(), node.query("status")["mtu_v6"].as_u64()),
            (1408, Some(1408))
        );
    }
}

#[test]
fn what_a_node_of_wireguard_cannot_be_is_told_in_one_line() {
    let Some(lab) = Lab::new() else { return };
    let host = host(&lab, 1);
    let file = lab.directory().join("wgkey");
    fs::write(&file, PSK).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let config =
        || NodeConfig::on_interface("n1", "eth0", &lab.store()).with("--backend", "wireguard");
    let ends = |config: NodeConfig, words: &str| {
        let mut node = config.spawn(&host);
        let code = node.wait_exit(SOON);
        let log = node.log();
        let mut lines = log.lines().rev();
        let last = lines
            .find(|line| line.starts_with("muslin: "))
            .unwrap_or_default();
        assert!(code.is_some_and(|code| code != 0), "{log}");
        assert!(last.contains(words), "{words}: {log}");
        assert!(!log.contains(&PSK[..8]), "{log}");
    };
    ends(
        config().with("--wireguard-key-file", file.display()),
        "chmod 600",
    );
    ends(config().with("--workers", 2), "one packet thread");
    ends(
        config().with("--wireguard-mode", "ipv6"),
        "needs EnableIPv6",
    );
    let half = lab.directory().join("half");
    fs::write(&half, &PSK[..20]).unwrap();
    ends(
        config().with("--wireguard-psk-file", half.display()),
        "32 bytes in base64",
    );
    // A file that flannel has made is as good as one of the node's own.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).unwrap();
    let node = config()
        .with("--wireguard-key-file", file.display())
        .start(&host);
    assert!(!node.state_dir().join("nodes/n1/wireguard.key").exists());
    assert_eq!(
        leases(&lab.store()),
        [record("10.9.0.1", &node.status("public_key"))]
    );
}

#[test]
fn a_list_has_the_key_of_each_node() {
    let Some(lab) = Lab::new() else { return };
    let list = lab.directory().join("nodes.toml");
    let write = |key: &str| {
        let node = |number: u8, more: &str| {
            format!(
                "[[node]]\npublic-ip = \"10.9.0.{number}\"\nsubnet = \"10.244.{number}.0/24\"\n{more}"
            )
        };
        let own = node(1, key);
        let other = node(2, &format!("public-key = \"{OTHER}\"\n"));
        let head = "network = \"10.244.0.0/16\"\nbackend = \"wireguard\"\nport = 4000\n";
        fs::write(&list, format!("{head}{own}{other}{}", node(3, ""))).unwrap();
    };
    write("");
    let url = format!("file:{}", list.display());
    let config = NodeConfig::on_interface("n1", "eth0", &url);
    let host = host(&lab, 1);
    let mut node = config.spawn(&host);
    node.wait_told(&["this node needs public-key"]);
    let log = node.log();
    let (_, asked) = log.split_once("this node needs ").unwrap();
    let (line, _) = asked.split_once(" there").unwrap();
    // It goes on as soon as the list has it.
    write(&format!("{line}\n"));
    node.wait_ready(SOON);
    assert!(line.contains(&node.status("public_key")));
    state(&node, "10.9.0.2", "silent");
    state(&node, "10.9.0.3", "no public key");
}
