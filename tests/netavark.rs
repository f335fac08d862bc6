//! Containers of Podman: `muslin-netavark` as netavark starts it, and by netavark itself.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use muslin::agent::Agent;
use muslin_lab::cni::{Netns, Network, Runtime};
use muslin_lab::skip::skip_for_lack_of_package;
use muslin_lab::{Lab, Node, NodeConfig, SOON, netavark_bin, probe_bin, traffic};
use serde_json::{Value, json};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const DRIVER: &str = "muslin-netavark";
const ID: &str = "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9";
/// Where distributions have it, and what names another one.
const NETAVARK: [&str; 2] = ["/usr/libexec/podman/netavark", "/usr/lib/podman/netavark"];
const VARIABLE: &str = "MUSLIN_TEST_NETAVARK";

fn start(lab: &Lab) -> Node {
    let host = lab.host("n1", HOST);
    host.furnish();
    let config = NodeConfig::new("n1", HOST, &lab.store());
    config.without_capability("net_bind_service").start(&host)
}

fn network(node: &Node) -> Value {
    json!({
        "name": "pods",
        "id": ID,
        "driver": DRIVER,
        "created": "2026-11-30T12:00:00Z",
        "subnets": [],
        "ipv6_enabled": false,
        "internal": false,
        "dns_enabled": true,
        "ipam_options": {},
        "options": {"socket": node.socket(), "mtu": "1300"},
    })
}

/// What netavark says to a plugin of a container.
fn container(network: &Value, name: &str, options: Value) -> Value {
    json!({
        "container_id": format!("{name}0123456789abcdef"),
        "container_name": name,
        "port_mappings": null,
        "network": network,
        "network_options": {
            "interface_name": "eth0",
            "aliases": [format!("{name}-alias")],
            "options": options,
        },
    })
}

fn run(mut command: Command, input: &Value) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // It need not read it.
    let _ = stdin.write_all(input.to_string().as_bytes());
    drop(stdin);
    child.wait_with_output().unwrap()
}

fn plugin(node: &Node, words: &[&str], input: &Value) -> Output {
    let mut command = node.host().command(netavark_bin());
    command.args(words);
    run(command, input)
}

#[track_caller]
fn answer(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    match output.stdout.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&output.stdout).unwrap(),
    }
}

#[track_caller]
fn error(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    told["error"].as_str().unwrap().to_owned()
}

fn address(status: &Value) -> Ipv4Addr {
    let subnet = &status["interfaces"]["eth0"]["subnets"][0];
    let text = subnet["ipnet"].as_str().unwrap();
    text.split('/').next().unwrap().parse().unwrap()
}

fn agent(netns: &Netns) -> Agent {
    let mut agent = Agent::start(&mut netns.command(probe_bin())).unwrap();
    agent.wait_ready(SOON).unwrap();
    agent
}

fn pods(node: &Node) -> usize {
    node.query("pods").as_array().unwrap().len()
}

fn links(netns: &Netns) -> String {
    netns.sh("ip -o link show eth0 2>&1 || :")
}

#[test]
fn containers_are_attached_and_detached() {
    let Some(lab) = Lab::new() else { return };
    let mut node = start(&lab);
    let info = answer(&plugin(&node, &["info"], &Value::Null));
    assert_eq!(info["api_version"], "1.0.0");
    assert!(
        info["version"]
            .as_str()
            .unwrap()
            .starts_with(env!("CARGO_PKG_VERSION"))
    );
    let created = answer(&plugin(&node, &["create"], &network(&node)));
    assert_eq!(created["ipam_options"], json!({"driver": "none"}));
    assert_eq!(created["id"], ID);

    let namespaces = Runtime::new(node.host(), &Network::muslin(&node)).all_netns(2);
    let [one, two] = [&namespaces[0], &namespaces[1]];
    let web = container(&created, "web", json!({"publish": "8080:80"}));
    let other = container(&created, "other", Value::Null);
    let status = answer(&plugin(&node, &["setup", one.path()], &web));
    answer(&plugin(&node, &["setup", two.path()], &other));
    assert!(links(one).contains("mtu 1300"), "{}", links(one));
    assert_eq!(
        status["dns_server_ips"],
        json!([node.address(1)]),
        "{status}"
    );
    let (mut server, mut client) = (agent(one), agent(two));
    let to = address(&status);
    assert_eq!(server.address("eth0").unwrap(), to);
    traffic::ping(&mut client, to);
    server.listen(80).unwrap();
    let published = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080);
    assert!(
        node.host()
            .agent()
            .send(published, 100_000, 1)
            .unwrap()
            .intact
    );
    drop((server, client));
    let again = error(&plugin(&node, &["setup", one.path()], &web));
    assert_eq!(again, "an interface 'eth0' is in the container already");

    for _ in 0..2 {
        assert_eq!(
            answer(&plugin(&node, &["teardown", one.path()], &web)),
            Value::Null
        );
    }
    assert_eq!(pods(&node), 1);
    assert!(!links(one).contains("muslin"), "{}", links(one));
    // Without a node a container can be removed, but not started.
    node.kill();
    answer(&plugin(&node, &["teardown", two.path()], &other));
    let absent = error(&plugin(&node, &["setup", two.path()], &other));
    assert!(absent.contains("no node listens at"), "{absent}");
    node.start_again();
    muslin_lab::poll_until(SOON, "the end of the other", || {
        (pods(&node) == 0).then_some(())
    });
}

#[test]
fn what_is_malformed_is_told_as_netavark_reads_it() {
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    for (words, input) in [
        (&["setup", "/run/netns/none"][..], json!({})),
        (&["setup"], json!({})),
        (&["frob"], json!({})),
        (
            &["create"],
            json!({"name": "pods", "options": {"isolate": "true"}}),
        ),
        (
            &["setup", "/dev/null"],
            container(&network(&node), "web", Value::Null),
        ),
    ] {
        let told = error(&plugin(&node, words, &input));
        assert!(!told.is_empty(), "{words:?}");
    }
}

/// netavark, if it is one that knows plugins (since 1.5).
fn netavark() -> Option<String> {
    let named = std::env::var(VARIABLE).ok();
    let all = named.into_iter().chain(NETAVARK.map(str::to_owned));
    let mut there = all.filter(|path| Path::new(path).is_file());
    let found = there.find(|path| {
        let help = Command::new(path).arg("--help").output();
        help.is_ok_and(|it| String::from_utf8_lossy(&it.stdout).contains("--plugin-directory"))
    });
    if found.is_none() {
        skip_for_lack_of_package(format_args!(
            "there is no netavark 1.5 or newer ({VARIABLE} may name one)"
        ));
    }
    found
}

#[test]
fn netavark_attaches_and_detaches_containers() {
    let Some(netavark) = netavark() else { return };
    let Some(lab) = Lab::new() else { return };
    let node = start(&lab);
    let plugins = Path::new(netavark_bin()).parent().unwrap();
    let netns = Runtime::new(node.host(), &Network::muslin(&node)).netns();
    let created = answer(&plugin(&node, &["create"], &network(&node)));
    let input = json!({
        "container_id": "web0123456789abcdef",
        "container_name": "web",
        "networks": {"pods": {"interface_name": "eth0", "aliases": ["alias"]}},
        "network_info": {"pods": created},
    });
    let call = |verb: &str| {
        let mut command = node.host().command(&netavark);
        command.arg("--plugin-directory").arg(plugins);
        command.args(["--config", "/run/netavark", verb, netns.path()]);
        run(command, &input)
    };
    let status = answer(&call("setup"));
    let to = address(&status["pods"]);
    assert_eq!(pods(&node), 1);
    traffic::ping(&mut agent(&netns), node.address(1));
    assert_eq!(agent(&netns).address("eth0").unwrap(), to);
    assert_eq!(answer(&call("teardown")), Value::Null);
    assert_eq!(pods(&node), 0);
    // And an error is passed on.
    assert!(call("setup").status.success());
    let again = call("setup");
    let told = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(told.contains("in the container already"), "{again:?}");
    answer(&call("teardown"));
}
