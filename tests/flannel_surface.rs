//! What flannel's users and their tools find: flags, variables, `subnet.env`, health, the service
//! manager, several networks on a machine, and public addresses that are translated.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use muslin::store;
use muslin_lab::etcd::Etcd;
use muslin_lab::{Host, Lab, NodeConfig, SOON, muslin_bin, poll_until, traffic};
use muslin_stack::control::lease::Op;
use serde_json::Value;

/// A node that is started as a user would, with variables; killed on drop.
struct Daemon {
    host: Host,
    state: PathBuf,
    child: Child,
}

impl Daemon {
    fn start(host: &Host, state: &Path, variables: &[&str], arguments: &[&str]) -> Self {
        fs::create_dir_all(state).unwrap();
        let log = fs::File::create(state.join("log")).unwrap();
        let mut command = host.command("env");
        command
            .args(variables)
            .args([muslin_bin(), "node", "--name", "n", "--state-dir"])
            .arg(state)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        Self {
            host: host.clone(),
            state: state.to_owned(),
            child: command.spawn().unwrap(),
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.state.join("log")).unwrap()
    }

    /// Its status, once it has one.
    fn status(&mut self) -> Value {
        poll_until(SOON, "the node's status", || {
            assert_eq!(self.child.try_wait().unwrap(), None, "{}", self.log());
            let mut command = self.host.command(muslin_bin());
            command.args(["status", "--json", "--state-dir"]);
            let output = command.arg(&self.state).output().unwrap();
            serde_json::from_slice(&output.stdout).ok()
        })
    }

    fn terminate(&mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(self.host.output(&["kill", &pid]).status.success());
        let status = poll_until(SOON, "the node's end", || self.child.try_wait().unwrap());
        status.code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

/// Runs `muslin node` with wrong usage to its end.
fn refused(lab: &Lab, arguments: &[&str]) -> Output {
    let state = lab.directory().join("refused");
    let mut command = lab.root().command("timeout");
    command.args(["-k", "1", "50", muslin_bin(), "node", "--state-dir"]);
    command.arg(state).args(arguments).stdin(Stdio::null());
    command.output().unwrap()
}

/// The answer to an HTTP request: its status and its body.
fn ask(host: &Host, port: u16, method: &str, path: &str) -> Option<(u16, String)> {
    let script = r#"use IO::Socket::INET;
        my $server = IO::Socket::INET->new(PeerAddr => "127.0.0.1:$ARGV[0]") or exit 1;
        print $server "$ARGV[1] $ARGV[2] HTTP/1.1\r\nHost: x\r\n\r\n";
        print while <$server>;"#;
    let port = port.to_string();
    let output = host.output(&["perl", "-e", script, &port, method, path]);
    let answer = String::from_utf8(output.stdout).unwrap();
    let status = answer.split(' ').nth(1)?.parse().unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    Some((status, body.to_owned()))
}

#[test]
fn a_flag_comes_before_muslins_variable_and_that_before_flannels() {
    let Some(lab) = Lab::new() else { return };
    let (flannel, muslin) = ("FLANNELD_PUBLIC_IP=127.0.0.1", "MUSLIN_PUBLIC_IP=127.0.0.2");
    let cases: &[(&[&str], &[&str], &str)] = &[
        (&[flannel], &[], "127.0.0.1"),
        (&[flannel, muslin], &[], "127.0.0.2"),
        (&[flannel, "MUSLIN_PUBLIC_IP="], &[], "127.0.0.1"),
        (
            &[flannel, muslin],
            &["--public-ip", "127.0.0.3"],
            "127.0.0.3",
        ),
        (&[flannel, muslin], &["-public-ip=127.0.0.3"], "127.0.0.3"),
        (&["FLANNELD_IFACE=127.0.0.4"], &["-public-ip="], "127.0.0.4"),
        (
            &["MUSLIN_IFACE_REGEX=^l.$"],
            &["-ip-masq=true"],
            "127.0.0.1",
        ),
        (&[], &["-iface-can-reach", "127.0.0.9", "-v=2"], "127.0.0.1"),
        // Only flannel's own flags have flannel's variables.
        (
            &[
                flannel,
                "FLANNELD_PORT=tcp://10.0.0.1:80",
                "MUSLIN_MTU=1400",
            ],
            &[],
            "127.0.0.1",
        ),
    ];
    for (number, (variables, arguments, expected)) in cases.iter().enumerate() {
        let state = lab.directory().join(format!("state{number}"));
        let status = Daemon::start(lab.root(), &state, variables, arguments).status();
        assert_eq!(
            status["public_ip"], *expected,
            "{variables:?} {arguments:?}"
        );
        assert_eq!(status["tunnel_ip"], *expected);
        let mtu = if variables.contains(&"MUSLIN_MTU=1400") {
            1350
        } else {
            65485
        };
        assert_eq!(status["mtu"].as_u64(), Some(mtu));
    }
}

#[test]
fn the_private_key_is_in_the_file_that_flannels_variable_names() {
    let Some(lab) = Lab::new() else { return };
    let file = |name: &str| lab.directory().join(name).join("wgkey");
    let variable =
        |prefix: &str, name: &str| format!("{prefix}WIREGUARD_KEY_FILE={}", file(name).display());
    let [flannels, muslins] = [variable("", "flannel"), variable("MUSLIN_", "muslin")];
    let start = |name: &str, variables: &[&str]| {
        let state = lab.directory().join(name);
        let flags = ["--backend", "wireguard"];
        let status = Daemon::start(lab.root(), &state, variables, &flags).status();
        status["public_key"].as_str().unwrap().to_owned()
    };
    let first = start("one", &[&flannels]);
    assert_eq!(fs::read_to_string(file("flannel")).unwrap().len(), 44);
    assert_eq!(start("two", &[&flannels]), first);
    assert_ne!(start("three", &[&flannels, &muslins]), first);
    assert!(file("muslin").exists());
}

#[test]
fn the_subnet_file_is_flannels_byte_for_byte() {
    let Some(lab) = Lab::new() else { return };
    let file = lab.directory().join("run/flannel/subnet.env");
    let variables = [
        format!("FLANNELD_SUBNET_FILE={}", file.display()),
        "FLANNELD_IP_MASQ=true".to_owned(),
    ];
    let variables = variables.each_ref().map(String::as_str);
    let state = lab.directory().join("state");
    let arguments = ["--public-ip", "127.0.0.1", "--mtu", "1500"];
    let mut node = Daemon::start(lab.root(), &state, &variables, &arguments);
    let status = node.status();
    let expected = format!(
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={}/24\nFLANNEL_MTU=1450\n\
         FLANNEL_IPMASQ=true\n",
        status["gateway"].as_str().unwrap()
    );
    let read = || fs::read_to_string(&file).ok();
    poll_until(SOON, "the subnet file", || {
        (read()? == expected).then_some(())
    });
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&file), 0o644);
    assert_eq!(mode(file.parent().unwrap()), 0o755);
    // It stays when the node ends, and goes when it leaves.
    assert_eq!(node.terminate(), Some(0));
    assert_eq!(read().as_ref(), Some(&expected));
    let mut node = Daemon::start(lab.root(), &state, &variables, &arguments);
    assert_eq!(node.status()["subnet"], status["subnet"]);
    let mut leave = lab.root().command(muslin_bin());
    let left = leave.args(["leave", "--state-dir"]).arg(&state).output();
    assert!(left.unwrap().status.success());
    assert_eq!(read(), None);
}

#[test]
fn without_a_place_for_it_the_subnet_file_is_in_the_state_directory() {
    let Some(lab) = Lab::new() else { return };
    let node = NodeConfig::new("n1", Ipv4Addr::LOCALHOST, &lab.store()).start(lab.root());
    let text = poll_until(SOON, "the subnet file", || {
        fs::read_to_string(node.state_dir().join("nodes/n1/subnet.env")).ok()
    });
    let line = format!("FLANNEL_SUBNET={}/24\n", node.status("gateway"));
    assert!(text.contains(&line), "{text}");
    assert!(text.ends_with("FLANNEL_IPMASQ=false\n"), "{text}");
}

#[test]
fn an_earlier_subnet_comes_from_the_nodes_own_state_or_else_from_the_file() {
    let Some(lab) = Lab::new() else { return };
    let file = lab.directory().join("subnet.env");
    let of_flannel = |subnet: u8| {
        let text = format!("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.{subnet}.1/24\n");
        fs::write(&file, text).unwrap();
    };
    of_flannel(77);
    let config = NodeConfig::new("n1", Ipv4Addr::LOCALHOST, &lab.store());
    let config = config.with("-subnet-file", file.display());
    let mut node = config.start(lab.root());
    assert_eq!(node.status("subnet"), "10.244.77.0/24");
    assert!(node.client(&["leave"]).output().unwrap().status.success());
    assert_eq!(node.wait_exit(SOON), Some(0));
    of_flannel(88);
    node.start_again();
    assert_eq!(node.status("subnet"), "10.244.77.0/24");
    // A new node of another address has no state of its own.
    of_flannel(99);
    let other = NodeConfig::new("n2", Ipv4Addr::new(127, 0, 0, 2), &lab.store());
    let other = other.with("-subnet-file", file.display()).start(lab.root());
    assert_eq!(other.status("subnet"), "10.244.99.0/24");
}

#[test]
fn health_is_told_from_the_start_and_readiness_when_all_is_done() {
    let Some(lab) = Lab::new() else { return };
    let host = lab.root();
    let port = ["--healthz-port", "18081", "--public-ip", "127.0.0.1"];
    let get = |path| poll_until(SOON, "an answer", || ask(host, 18081, "GET", path));
    let answer = |status, body: &str| (status, body.to_owned());
    let running = answer(200, "flanneld is running");
    let not_yet = answer(503, "flanneld is not ready yet");

    // The store is away.
    let away = [&port[..], &["--etcd-endpoints", "http://127.0.0.1:1"]].concat();
    let node = Daemon::start(host, &lab.directory().join("away"), &[], &away);
    assert_eq!(get("/healthz"), running);
    let body = poll_until(SOON, "what it waits for", || {
        let (status, body) = get("/readyz");
        assert_eq!(status, 503, "{body}");
        body.contains("is unreachable").then_some(body)
    });
    assert!(body.starts_with("flanneld is not ready yet: "), "{body}");
    drop(node);

    // The subnet file cannot be written: the node works, but is never ready.
    let below = lab.directory().join("file");
    fs::write(&below, "").unwrap();
    let below = below.join("subnet.env").display().to_string();
    let unwritable = [&port[..], &["--subnet-file", &below]].concat();
    let mut node = Daemon::start(host, &lab.directory().join("unwritable"), &[], &unwritable);
    node.status();
    poll_until(SOON, "a warning", || {
        node.log().contains(&below).then_some(())
    });
    assert_eq!(get("/healthz"), running);
    assert_eq!(get("/readyz"), not_yet);
    drop(node);

    let mut node = Daemon::start(host, &lab.directory().join("good"), &[], &port);
    node.status();
    let ready = answer(200, "flanneld is ready");
    poll_until(SOON, "readiness", || {
        (get("/readyz") == ready).then_some(())
    });
    assert_eq!(ask(host, 18081, "HEAD", "/readyz"), Some(answer(200, "")));
    assert_eq!(get("/metrics").0, 404);

    // Another node cannot have the port, and takes no lease.
    let store = format!("sqlite:{}", lab.directory().join("good/store.db").display());
    let second = [
        "--name",
        "second",
        "--public-ip",
        "127.0.0.2",
        "--store",
        &store,
    ];
    let second = [&second[..], &["--healthz-port", "18081"]].concat();
    let output = refused(&lab, &second);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("18081") && stderr.contains("--healthz-port"),
        "{stderr}"
    );
    assert_eq!(node.status()["peers"], 0);
}

#[test]
fn a_node_in_flanneld_s_place_waits_for_the_administrators_network() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let host = lab.host("host", Ipv4Addr::new(10, 9, 0, 1));
    let endpoints = etcd
        .store()
        .replace("etcd://", "http://127.0.0.1:4001,http://");
    let endpoints = format!("FLANNELD_ETCD_ENDPOINTS={endpoints}");
    let arguments = [
        "-etcd-prefix=/site/net/",
        "-iface=eth0",
        "-healthz-port=18081",
    ];
    let state = lab.directory().join("state");
    let mut node = Daemon::start(&host, &state, &[&endpoints], &arguments);
    let readiness = || ask(&host, 18081, "GET", "/readyz").map(|(status, _)| status);
    let words = "waiting for a usable one";
    poll_until(SOON, words, || node.log().contains(words).then_some(()));
    assert_eq!(readiness(), Some(503));
    assert_eq!(
        etcd.get("/site/net/config"),
        None,
        "a node does not write it"
    );
    assert!(!state.join("nodes/n/subnet.env").exists());

    let network = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
    etcd.configure("/site/net", network);
    poll_until(SOON, "readiness", || (readiness()? == 200).then_some(()));
    let status = node.status();
    assert_eq!(status["network"], "10.5.0.0/16");
    assert_eq!(status["public_ip"], "10.9.0.1");
    let file = fs::read_to_string(state.join("nodes/n/subnet.env")).unwrap();
    assert!(file.starts_with("FLANNEL_NETWORK=10.5.0.0/16\n"), "{file}");
    assert_eq!(etcd.leases("/site/net").len(), 1);
    // It was told in one line where it looks for what.
    let log = node.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains(words)).collect();
    let [told] = told[..] else { panic!("{told:?}") };
    for name in ["http://10.9.0.250:2379", "/site/net/config"] {
        assert!(told.contains(name), "no '{name}': {told}");
    }
}

#[test]
fn the_service_manager_is_told() {
    let Some(lab) = Lab::new() else { return };
    let path = lab.directory().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let hear = || {
        let mut message = [0; 1024];
        let length = manager.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let socket = format!("NOTIFY_SOCKET={}", path.display());
    let state = lab.directory().join("state");
    let public = ["--public-ip", "127.0.0.1"];
    let mut node = Daemon::start(lab.root(), &state, &[&socket], &public);
    assert_eq!(hear(), "STATUS=waiting for a lease\n");
    let ready = hear();
    assert!(
        ready.starts_with("READY=1\nSTATUS=node n is ready: subnet 10.244."),
        "{ready}"
    );
    node.status();
    assert_eq!(node.terminate(), Some(0));
    assert!(hear().starts_with("STOPPING=1\n"));
}

#[test]
fn networks_of_two_prefixes_are_side_by_side() {
    let Some(lab) = Lab::new() else { return };
    let hosts = [1, 2].map(|number| {
        let address = Ipv4Addr::new(10, 9, 0, number);
        (lab.host(&format!("host{number}"), address), address)
    });
    let start = |prefix: &str, network: &str, port: u16| {
        hosts.each_ref().map(|(host, address)| {
            let name = format!("n{port}");
            let config = NodeConfig::new(&name, *address, &lab.store());
            let config = config.with("--etcd-prefix", prefix).with("--port", port);
            config.with("--network", network).start(host)
        })
    };
    let red = start("/red/network/", "10.11.0.0/16", 8472);
    let blue = start("/blue//network", "10.12.0.0/16", 8473);
    let pods = [&red, &blue].map(|nodes| {
        for node in nodes {
            node.wait_peers(1);
        }
        let mut pods = nodes.each_ref().map(|node| node.pod("pod"));
        let address = pods[1].address("eth0").unwrap();
        traffic::ping(&mut pods[0], address);
        (pods, address)
    });
    let [(mut red_pods, _), (_, blue_address)] = pods;
    let out = SocketAddrV4::new(blue_address, 7);
    assert!(red_pods[0].open(out).is_err(), "networks must not meet");
    for (nodes, begin) in [(red, "10.11."), (blue, "10.12.")] {
        for node in nodes {
            assert!(node.status("subnet").starts_with(begin));
        }
    }
}

#[test]
fn a_node_behind_nat_is_reached_by_its_public_address() {
    let Some(lab) = Lab::new() else { return };
    let (bound, public) = (Ipv4Addr::new(10, 8, 0, 1), Ipv4Addr::new(10, 9, 0, 77));
    let outside = lab.host("outside", Ipv4Addr::new(10, 9, 0, 1));
    let router = lab.host("router", public);
    let inside = lab.namespace("inside");
    lab.cable((&router, "eth1"), (&inside, "eth0"));
    router.sh("ip addr add 10.8.0.254/24 dev eth1; echo 1 >/proc/sys/net/ipv4/ip_forward");
    inside.sh("ip addr add 10.8.0.1/24 dev eth0; ip route add default via 10.8.0.254");
    // What a router translates: datagrams to its own address go inside.
    let script = r#"use IO::Socket::INET;
        my ($public, $bound) = @ARGV;
        my $from = IO::Socket::INET->new(Proto => "udp", LocalAddr => "$public:8472") or die;
        my $to = IO::Socket::INET->new(Proto => "udp", PeerAddr => "$bound:8472") or die;
        $| = 1; print "ready\n";
        $to->send($data) while defined $from->recv($data, 65535);"#;
    let mut relay = router.command("perl");
    relay.args(["-e", script, &public.to_string(), &bound.to_string()]);
    let mut relay = relay.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let output = BufReader::new(relay.stdout.take().unwrap()).read_line(&mut line);
    assert_eq!((output.unwrap(), &*line), (6, "ready\n"));

    // Without a named interface it waits, and says what would help.
    let mut mistaken = NodeConfig::new("mistaken", public, &lab.store()).spawn(&inside);
    mistaken.wait_told(&["--iface"]);
    drop(mistaken);

    let guard = |name: &str, address, iface: &str| {
        let config = NodeConfig::new(name, address, &lab.store());
        config
            .with("--iface", iface)
            .with("--mtu", 1500)
            .flag("--no-peer-guard")
    };
    let outer = guard("outer", Ipv4Addr::new(10, 9, 0, 1), "eth0").start(&outside);
    let inner = guard("inner", public, "eth0").start(&inside);
    let ends = |node: &muslin_lab::Node| (node.status("public_ip"), node.status("tunnel_ip"));
    assert_eq!(ends(&inner), (public.to_string(), bound.to_string()));
    outer.wait_peers(1);
    inner.wait_peers(1);
    assert_eq!(outer.query("peers")[0]["public_ip"], public.to_string());
    let shown = inner.client(&["status"]).output().unwrap().stdout;
    let shown = String::from_utf8(shown).unwrap();
    let line = "10.8.0.1:8472 (eth0), public address 10.9.0.77";
    assert!(shown.contains(line), "{shown}");

    let (mut near, mut far) = (outer.pod("near"), inner.pod("far"));
    let (near_address, far_address) = (near.address("eth0").unwrap(), far.address("eth0").unwrap());
    traffic::ping(&mut near, far_address);
    traffic::ping(&mut far, near_address);
    relay.kill().unwrap();
    relay.wait().unwrap();
}

#[test]
fn flags_without_meaning_say_so_and_others_are_refused() {
    let Some(lab) = Lab::new() else { return };
    let idle = [
        "-iptables-resync=5",
        "-iptables-forward-rules=false",
        "-ip-masq",
        "-ip-blackhole-route",
        "-v=9",
    ];
    let arguments = [&["--public-ip", "127.0.0.1"], &idle[..]].concat();
    let mut node = Daemon::start(lab.root(), &lab.directory().join("idle"), &[], &arguments);
    node.status();
    let log = node.log();
    for word in idle {
        let flag = word.trim_start_matches('-').split('=').next().unwrap();
        let notice = format!("--{flag} ");
        assert_eq!(log.matches(&notice).count(), 1, "{flag}: {log}");
    }
    let cases: &[(&[&str], &str)] = &[
        (&["-kube-subnet-mgr"], "--kube-subnet-mgr"),
        (&["--kubeconfig-file=x"], "--kubeconfig-file"),
        (&["--public-ipv6", "fe80::1"], "--public-ipv6"),
        (&["--subnet-lease-renew-margin=0"], "1..=1439"),
        (&["--subnet-lease-renew-margin=1440"], "1..=1439"),
        (
            &["--etcd-endpoints=http://h:1", "--store=file:x"],
            "--etcd-endpoints",
        ),
        (&["--etcd-endpoints=gopher://h:1"], "gopher://h:1"),
        (&["--etcd-cafile=/ca.pem"], "--etcd-endpoints"),
        (&["--etcd-username=u"], "--etcd-password"),
        (&["--etcd-prefix=.."], "--etcd-prefix"),
        (&["--iface-regex=("], "--iface-regex"),
        (&["--healthz-ip=x"], "--healthz-ip"),
    ];
    for (arguments, word) in cases {
        let output = refused(&lab, arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(word), "{arguments:?}: {stderr}");
    }
}

#[test]
fn switches_of_the_network_that_are_not_followed_are_said_once() {
    let Some(lab) = Lab::new() else { return };
    let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","Learning":true,
        "GBP":true}}"#;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let written = runtime.block_on(async {
        let op = Op::Create {
            key: "/f/config".to_owned(),
            value: config.to_owned(),
            ttl: None,
        };
        store::open(lab.store(), &store::EtcdOptions::default())
            .unwrap()
            .execute(op)
            .await
    });
    written.unwrap();
    let node = NodeConfig::new("n1", Ipv4Addr::LOCALHOST, &lab.store());
    let node = node.with("--etcd-prefix", "/f").start(lab.root());
    assert!(node.status("subnet").starts_with("10.5."));
    let log = node.log();
    for switch in ["Learning", "GBP"] {
        let line = format!("the network has {switch}");
        assert_eq!(log.matches(&line).count(), 1, "{log}");
    }
}
