//! What a node has of IPv6: its half of a lease, and the address that it names.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::net::Ipv4Addr;

use muslin_lab::etcd::{Etcd, PREFIX};
use muslin_lab::skip::skip;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until, traffic};
use serde_json::Value;

const NETWORK: &str = "fd00:244::/48";
/// The network of both IP versions.
const DUAL: &str = "10.244.0.0/16,fd00:244::/48";

fn ip(host: &Host, words: &str) -> bool {
    let words: Vec<_> = ["ip"].into_iter().chain(words.split(' ')).collect();
    host.output(&words).status.success()
}

#[test]
fn a_dual_lease_follows_the_interfaces_address_and_keeps_its_subnets() {
    let Some(lab) = Lab::new() else { return };
    let host = &lab.host("h1", Ipv4Addr::new(10, 9, 0, 1));
    if !ip(host, "addr add fd01::9/64 dev eth0 nodad") {
        return skip("the kernel has no IPv6");
    }
    let config = NodeConfig::on_interface("n1", "eth0", &lab.store());
    let config = config.with("--network", DUAL);
    let node = config.start(host);
    let subnets = node.status("subnet");
    let (ipv4, ipv6) = subnets.split_once(',').unwrap();
    assert!(
        ipv4.starts_with("10.244.") && ipv6.starts_with("fd00:244:0:"),
        "{subnets}"
    );
    assert_eq!(node.status("public_ip"), "10.9.0.1,fd01::9");
    assert_eq!(node.status("network"), format!("10.244.0.0/16,{NETWORK}"));
    let path = node.state_dir().join("nodes/n1/subnet.env");
    let text = poll_until(SOON, "the subnet file", || fs::read_to_string(&path).ok());
    let base = ipv6.strip_suffix("/64").unwrap();
    let lines =
        format!("FLANNEL_IPV6_NETWORK={NETWORK}\nFLANNEL_IPV6_SUBNET={base}1/64\nFLANNEL_MTU=");
    assert!(text.contains(&lines), "{text}");

    assert!(ip(host, "addr add fd01::8/64 dev eth0 nodad"));
    assert_eq!(
        node.status("public_ip"),
        "10.9.0.1,fd01::9",
        "it is valid still"
    );
    assert!(ip(host, "addr del fd01::9/64 dev eth0"));
    poll_until(SOON, "the lease at the other address", || {
        let output = node.client(&["leases", "--json"]).output().unwrap();
        let leases: Value = serde_json::from_slice(&output.stdout).ok()?;
        let lease = &leases[0];
        assert_eq!(lease["subnet"], subnets.as_str(), "{lease}");
        (lease["public_ip"] == "10.9.0.1,fd01::8").then_some(())
    });
}

/// A node goes from a network of IPv4 to one of both versions and back, with its pods' devices on the way.
#[test]
fn another_configuration_of_the_network_makes_no_other_subnet_of_ipv4() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let host = lab.host("h1", Ipv4Addr::new(10, 9, 0, 1));
    if !ip(&host, "addr add fd01::9/64 dev eth0 nodad") {
        return skip("the kernel has no IPv6");
    }
    let plain = r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}"#;
    let dual = format!(
        r#"{{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "{NETWORK}", "Backend": {{"Type": "vxlan"}}}}"#
    );
    etcd.configure(PREFIX, plain);
    let config = NodeConfig::on_interface("n1", "eth0", &etcd.store());
    let mut node = config.start(&host);
    let ipv4 = node.status("subnet");
    assert!(!ipv4.contains(','), "{ipv4}");
    let gateway: Ipv4Addr = ipv4.replace(".0/24", ".1").parse().unwrap();
    let mut ipv6 = None;
    for config in [dual.as_str(), plain, dual.as_str()] {
        node.kill();
        // The kernel takes its time to end a process.
        poll_until(SOON, "the tunnel's port", || {
            let ports = host.run(&["cat", "/proc/net/udp", "/proc/net/udp6"]);
            (!ports.contains(":2118 ")).then_some(())
        });
        etcd.configure(PREFIX, config);
        node.start_again();
        let subnets = node.status("subnet");
        assert!(subnets.starts_with(&ipv4), "{subnets}");
        let keys: Vec<_> = etcd.leases(PREFIX).into_iter().map(|it| it.key).collect();
        assert_eq!(keys.len(), 1, "{keys:?}");
        assert_eq!(keys[0].contains('&'), config != plain, "{keys:?}");
        if config != plain {
            let (_, now) = subnets.split_once(',').unwrap();
            let before = ipv6.replace(now.to_owned());
            assert!(before.is_none_or(|before| before == now), "{subnets}");
        }
        let mut pod = node.pod("p");
        traffic::ping(&mut pod, gateway);
    }
}

/// The subnets of a node, and the address that its lease names of IPv6.
fn dual_lease(node: &Node) -> (String, String) {
    (node.status("subnet"), node.status("public_ip"))
}

#[test]
fn an_address_that_is_away_at_a_start_costs_no_subnet() {
    let Some(lab) = Lab::new() else { return };
    let host = &lab.host("h1", Ipv4Addr::new(10, 9, 0, 1));
    if !ip(host, "addr add fd01::9/64 dev eth0 nodad") {
        return skip("the kernel has no IPv6");
    }
    let config = NodeConfig::on_interface("n1", "eth0", &lab.store());
    let mut node = config.with("--network", DUAL).start(host);
    let (subnets, _) = dual_lease(&node);
    assert!(subnets.contains(','), "{subnets}");
    // It is late: the node waits for it.
    node.kill();
    assert!(ip(host, "addr del fd01::9/64 dev eth0"));
    node.start_anew();
    node.wait_told(&["no public IPv6 address, but had one before"]);
    let waits = "waiting for another address of IPv6 for up to 10 s";
    assert!(node.log().contains(waits), "{}", node.log());
    assert!(ip(host, "addr add fd01::8/64 dev eth0"));
    node.wait_ready(SOON);
    assert_eq!(
        dual_lease(&node),
        (subnets.clone(), "10.9.0.1,fd01::8".to_owned())
    );
    // It is away for a whole run, and back at the next.
    node.kill();
    assert!(ip(host, "addr del fd01::8/64 dev eth0"));
    node.start_again();
    let ipv4 = subnets.split(',').next().unwrap();
    assert_eq!(node.status("subnet"), ipv4);
    assert!(node.log().contains("no IPv6 subnet"), "{}", node.log());
    node.kill();
    assert!(ip(host, "addr add fd01::9/64 dev eth0 nodad"));
    node.start_again();
    assert_eq!(
        dual_lease(&node),
        (subnets.clone(), "10.9.0.1,fd01::9".to_owned())
    );
    // What was published stays over a start, though another would be chosen.
    assert!(ip(host, "addr add 2001:db8::1/64 dev eth0 nodad"));
    node.start_again();
    assert_eq!(dual_lease(&node), (subnets, "10.9.0.1,fd01::9".to_owned()));
}

#[test]
fn an_address_in_the_pod_network_is_not_published() {
    let Some(lab) = Lab::new() else { return };
    let host = &lab.host("h1", Ipv4Addr::new(10, 9, 0, 1));
    if !ip(host, "addr add fd00:244:0:ffff::9/64 dev eth0 nodad") {
        return skip("the kernel has no IPv6");
    }
    let config = NodeConfig::on_interface("n1", "eth0", &lab.store());
    let node = config.with("--network", DUAL).start(host);
    assert_eq!(node.status("public_ip"), "10.9.0.1");
    assert!(node.log().contains("no IPv6 subnet"), "{}", node.log());
}

#[test]
fn an_underlay_without_room_for_ipv6_has_a_lease_of_ipv4() {
    let Some(lab) = Lab::new() else { return };
    for (number, backend, mtu, has_room) in [
        (1, "vxlan", 1349, false),
        (2, "vxlan", 1350, true),
        (3, "host-gw", 1280, true),
    ] {
        let host = &lab.host(&format!("h{number}"), Ipv4Addr::new(10, 9, 0, number));
        if !ip(host, &format!("addr add fd01::{number}/64 dev eth0 nodad")) {
            return skip("the kernel has no IPv6");
        }
        assert!(ip(host, &format!("link set eth0 mtu {mtu}")));
        let store = format!("sqlite:{}", lab.directory().join(backend).display());
        let config = NodeConfig::on_interface(&format!("n{number}"), "eth0", &store);
        let config = config
            .with("--network", DUAL)
            .with("--backend", backend)
            .with("--public-ipv6", format!("fd01::{number}"));
        let node = config.start(host);
        let subnet = node.status("subnet");
        assert!(subnet.starts_with("10.244."), "{subnet}");
        assert_eq!(subnet.contains(','), has_room, "{backend} {mtu}: {subnet}");
        let why = "IPv6 needs an MTU of 1350 with vxlan, and that of eth0 is 1349";
        assert_eq!(node.log().contains(why), !has_room, "{}", node.log());
    }
}
