//! What a node has of IPv6: its half of a lease, and the address that it names.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::fs;
use std::net::Ipv4Addr;

use muslin_lab::skip::skip;
use muslin_lab::{Host, Lab, NodeConfig, SOON, poll_until, traffic};
use serde_json::Value;

const NETWORK: &str = "fd00:244::/48";

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
    let config = config.with("--ipv6-network", NETWORK);
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

#[test]
fn another_configuration_of_the_network_makes_no_other_subnet_of_ipv4() {
    let Some(lab) = Lab::new() else { return };
    let host = lab.root();
    if !ip(host, "addr add fd01::1/128 dev lo") {
        return skip("the kernel has no IPv6");
    }
    let store = lab.store();
    let config = || {
        let config = NodeConfig::new("n1", Ipv4Addr::LOCALHOST, &store);
        config
            .with("--public-ipv6", "fd01::1")
            .with("--ipv6-network", NETWORK)
    };
    let mut node = config().start(host);
    let subnets = node.status("subnet");
    assert!(subnets.contains(','), "{subnets}");
    // A pod is in the data path of IPv4, as with any lease.
    let gateways = node.status("gateway");
    let gateway: Ipv4Addr = gateways.split(',').next().unwrap().parse().unwrap();
    let mut pod = node.pod("p");
    traffic::ping(&mut pod, gateway);
    drop(pod);
    node.kill();
    let node = config().start(host);
    assert_eq!(node.status("subnet"), subnets);
}

#[test]
fn an_underlay_without_room_for_ipv6_has_a_lease_of_ipv4() {
    let Some(lab) = Lab::new() else { return };
    let host = &lab.host("h1", Ipv4Addr::new(10, 9, 0, 1));
    if !ip(host, "addr add fd01::9/64 dev eth0 nodad") {
        return skip("the kernel has no IPv6");
    }
    assert!(ip(host, "link set eth0 mtu 1349"));
    let config = NodeConfig::on_interface("n1", "eth0", &lab.store());
    let node = config.with("--ipv6-network", NETWORK).start(host);
    let subnet = node.status("subnet");
    assert!(
        subnet.starts_with("10.244.") && !subnet.contains(','),
        "{subnet}"
    );
    assert!(node.log().contains("no IPv6 subnet"), "{}", node.log());
}
