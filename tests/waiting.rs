//! What a node does not have yet it waits for, and says so; what is mended later it takes up.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::Ipv4Addr;

use muslin_lab::etcd::{Etcd, PREFIX};
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until};

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// The body of `/readyz` on a host.
fn readiness(host: &Host) -> String {
    let script = r#"
        my $s = IO::Socket::INET->new("127.0.0.1:9999") or exit; alarm 5;
        print $s "GET /readyz HTTP/1.0\r\n\r\n"; local $/; print <$s>"#;
    host.run(&["perl", "-MIO::Socket::INET", "-e", script])
}

/// A node that tells its health.
fn start(name: &str, store: &str, host: &Host) -> Node {
    let config = NodeConfig::anywhere(name, store);
    config.with("--healthz-port", 9999).spawn(host)
}

#[test]
fn an_interface_that_is_named_is_waited_for() {
    let Some(lab) = Lab::new() else { return };
    let store = lab.store();
    let host = lab.host("host", Ipv4Addr::new(10, 9, 0, 1));
    let cases = [
        ("--iface", "late0", "10.7.0.1"),
        ("--iface-regex", "^late", "10.7.1.1"),
        ("--public-ip", "10.7.2.1", "10.7.2.1"),
    ];
    for (flag, value, address) in cases {
        let config = NodeConfig::anywhere("n", &store).with(flag, value);
        let mut node = config.with("--healthz-port", 9999).spawn(&host);
        node.wait_told(&[value, "10.9.0.1 (eth0)"]);
        let body = readiness(&host);
        assert!(body.contains(" 503 ") && body.contains(value), "{body}");
        host.sh(&format!(
            "ip link add late0 type veth peer name late1; ip addr add {address}/24 dev late0; ip link set late0 up"
        ));
        node.wait_ready(SOON);
        assert_eq!(node.status("public_ip"), address);
        assert!(readiness(&host).ends_with("flanneld is ready"));
        host.sh("ip link del late0");
    }
    // One that is told to stop while it waits stops.
    let mut node = NodeConfig::on_interface("n", "late0", &store).spawn(&host);
    node.wait_told(&["late0"]);
    let left = node.client(&["leave"]).output().unwrap();
    assert!(left.status.success(), "{left:?}");
    assert_eq!(node.wait_exit(SOON), Some(0), "{}", node.log());
}

#[test]
fn no_lease_is_for_a_loopback_address_where_others_read_it() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    etcd.configure(PREFIX, CONFIG);
    // There is no default route on any host of the lab.
    let here = lab.host("here", Ipv4Addr::new(10, 9, 0, 1));
    let late = lab.host("late", Ipv4Addr::new(10, 9, 0, 2));
    let several = lab.host("several", Ipv4Addr::new(10, 9, 0, 3));
    late.sh("ip addr flush dev eth0");
    several
        .sh("ip link add eth7 type veth peer name eth8; ip addr add 10.7.0.3/24 dev eth7; ip link set eth7 up");
    let mut first = start("here", &etcd.store(), &here);
    first.wait_ready(SOON);
    assert_eq!(first.status("public_ip"), "10.9.0.1");
    let mut second = start("late", &etcd.store(), &late);
    second.wait_told(&["--public-ip"]);
    let mut third = start("several", &etcd.store(), &several);
    third.wait_told(&[
        "no default route",
        "10.9.0.3 (eth0)",
        "10.7.0.3 (eth7)",
        "--iface",
    ]);
    let body = readiness(&several);
    assert!(
        body.contains("not ready yet: ") && body.contains("--iface"),
        "{body}"
    );
    assert_eq!(etcd.leases(PREFIX).len(), 1);

    late.sh("ip addr add 10.9.0.2/24 dev eth0");
    second.wait_ready(SOON);
    assert_eq!(second.status("public_ip"), "10.9.0.2");
    several.sh("ip route add default via 10.9.0.1");
    third.wait_ready(SOON);
    assert_eq!(third.status("public_ip"), "10.9.0.3");
    for node in [&first, &second, &third] {
        node.wait_peers(2);
    }
    let leases = etcd.leases(PREFIX);
    assert!(
        !leases.iter().any(|lease| lease.value.contains("\"127.")),
        "{leases:?}"
    );
}

#[test]
fn a_configuration_that_cannot_be_used_is_waited_for_and_one_that_comes_later_does_no_harm() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let host = lab.host("host", Ipv4Addr::new(10, 9, 0, 1));
    etcd.configure(PREFIX, "{");
    let mut node = start("n", &etcd.store(), &host);
    // The second has the node's own address in it.
    for (wrong, words) in [
        (r#"{"Network": \ }"#, "JSON"),
        (r#"{"Network":"10.9.0.0/16"}"#, "10.9.0.1"),
        (
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"pigeons"}}"#,
            "pigeons",
        ),
    ] {
        etcd.configure(PREFIX, wrong);
        node.wait_told(&[words]);
        let body = readiness(&host);
        assert!(body.contains(" 503 ") && body.contains(words), "{body}");
        assert_eq!(etcd.leases(PREFIX), []);
    }
    etcd.configure(PREFIX, CONFIG);
    node.wait_ready(SOON);
    assert!(node.status("subnet").starts_with("10.244."));
    let log = node.log();
    assert_eq!(log.matches("pigeons").count(), 1, "{log}");

    etcd.configure(PREFIX, "");
    let mut pod = node.pod("p");
    muslin_lab::traffic::ping(&mut pod, node.address(1));
    assert!(node.is_running());
}

#[test]
fn a_store_that_refuses_is_asked_until_it_does_not() {
    let Some(lab) = Lab::new() else { return };
    let store = lab.directory().join("leases.db");
    let url = format!("sqlite:{}", store.display());
    let host = lab.host("host", Ipv4Addr::new(10, 9, 0, 1));
    let mut node = start("n", &url, &host);
    node.wait_ready(SOON);
    let (mut one, mut two) = (node.pod("a"), node.pod("b"));
    // With the file goes what was written and is not in it yet.
    let move_store = |from: &str, to: &str| {
        lab.root()
            .sh(&format!("mkdir -p {to}; mv -f {from}/leases.db* {to}/"));
    };
    let (place, spare) = (
        lab.directory().display().to_string(),
        lab.directory().join("spare"),
    );
    let spare = spare.display().to_string();
    move_store(&place, &spare);
    std::fs::write(&store, "not a database".repeat(1000)).unwrap();
    let trouble = poll_until(SOON, "the store's refusal", || {
        let trouble = node.query("status")["trouble"].as_str().map(str::to_owned);
        trouble.filter(|trouble| trouble.contains("refuses"))
    });
    assert!(trouble.contains("not a database"), "{trouble}");
    assert!(readiness(&host).ends_with("flanneld is ready"));
    muslin_lab::traffic::ping(&mut one, two.address("eth0").unwrap());
    muslin_lab::traffic::ping(&mut two, one.address("eth0").unwrap());
    drop(node.pod("c"));
    move_store(&spare, &place);
    poll_until(SOON, "the end of the trouble", || {
        node.query("status")["trouble"].is_null().then_some(())
    });
    let log = node.log();
    assert_eq!(
        log.matches("not a database of leases; requests are retried")
            .count(),
        1,
        "{log}"
    );
    NodeConfig::new("other", Ipv4Addr::new(127, 0, 0, 2), &url)
        .start(&host)
        .wait_peers(1);
}
