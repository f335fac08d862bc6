//! A node whose machine gets another address takes its lease, its subnet and its pods' connections
//! along, and pods follow the MTU of its interface.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::{Ipv4Addr, SocketAddrV4};

use muslin::agent::{Agent, Ping};
use muslin_lab::{Lab, Node, NodeConfig, SOON, poll_until};
use nix::sys::signal::Signal;

/// Datagrams that are more than a socket's queue has room for.
const FLOOD: u64 = 20_000;

/// Sends a node that stands still so many datagrams from another one's host.
fn overflow(node: &Node, from: &Node, address: &str, count: u64) {
    node.signal(Signal::SIGSTOP);
    let script = r#"socket(my $s, PF_INET, SOCK_DGRAM, 0); my ($to, $count) = @ARGV;
        $to = pack_sockaddr_in(8472, inet_aton($to));
        send($s, "x" x 1400, 0, $to) // die "send: $!" for 1 .. $count;"#;
    let count = count.to_string();
    from.host()
        .run(&["perl", "-MSocket", "-e", script, address, &count]);
    node.signal(Signal::SIGCONT);
}

#[test]
fn connections_outlive_a_change_of_the_public_address() {
    let Some(lab) = Lab::new() else { return };
    let store = lab.store();
    let start = |name: &str, last: u8| {
        let address = Ipv4Addr::new(10, 9, 0, last);
        let host = lab.host(name, address);
        // One follows its interface, the other has its address fixed.
        let config = match last {
            1 => NodeConfig::on_interface(name, "eth0", &store),
            _ => NodeConfig::new(name, address, &store),
        };
        config.with("--mtu", 1500).start(&host)
    };
    let (moving, fixed) = (start("n1", 1), start("n2", 2));
    moving.wait_peers(1);
    fixed.wait_peers(1);
    let (mut here, mut there) = (moving.pod("a"), fixed.pod("b"));
    let port = there.listen(0).unwrap();
    let to = SocketAddrV4::new(there.address("eth0").unwrap(), port);
    let connection = here.open(to).unwrap();
    assert!(here.exchange(connection, 100_000, 1).unwrap().intact);
    let (subnet, mac) = (moving.status("subnet"), moving.status("vtep_mac"));

    // The old socket loses what comes while nobody reads.
    overflow(&moving, &fixed, "10.9.0.1", FLOOD);
    let lost = |node: &Node| node.drops().get("underlay-overflow").copied();
    poll_until(SOON, "the losses of the old socket", || {
        assert!(here.exchange(connection, 1000, 3).unwrap().intact);
        lost(&moving)
    });

    moving
        .host()
        .sh("ip addr del 10.9.0.1/24 dev eth0; ip addr add 10.9.0.77/24 dev eth0");
    poll_until(SOON, "the peer's news of the new address", || {
        let peers = fixed.query("peers");
        (peers[0]["public_ip"] == "10.9.0.77").then_some(())
    });
    assert!(here.exchange(connection, 100_000, 2).unwrap().intact);
    // The new one begins to count anew, and has not lost as much.
    let before = lost(&moving).unwrap_or_default();
    overflow(&moving, &fixed, "10.9.0.77", FLOOD - before / 2);
    let losses = poll_until(SOON, "the losses of the new socket", || {
        assert!(here.exchange(connection, 1000, 3).unwrap().intact);
        lost(&moving).filter(|lost| *lost > before)
    });
    assert!(losses <= 2 * FLOOD, "{losses} of twice {FLOOD} datagrams");
    let now = (moving.status("subnet"), moving.status("vtep_mac"));
    assert_eq!(now, (subnet, mac));
    assert_eq!(moving.status("public_ip"), "10.9.0.77");
    assert_eq!(
        fixed.query("peers").as_array().unwrap().len(),
        1,
        "no second lease"
    );
    assert_eq!(fixed.query("leases").as_array().unwrap().len(), 2);
}

/// A ping of so many bytes that must not be fragmented.
fn whole(to: Ipv4Addr, len: usize) -> Ping {
    Ping {
        size: len - 28,
        count: 1,
        dont_fragment: true,
        ..Ping::new(to)
    }
}

/// Whether a pod's interface has this MTU: it sends its gateway nothing that is longer.
fn has_mtu(pod: &mut Agent, gateway: Ipv4Addr, mtu: usize) -> bool {
    let fits = pod.ping(&whole(gateway, mtu)).unwrap();
    let exceeds = pod.ping(&whole(gateway, mtu + 1)).unwrap();
    fits.refused.is_empty() && exceeds.refused.iter().any(|it| it.is_too_long())
}

#[test]
fn pods_follow_the_mtu_of_the_interface() {
    let Some(lab) = Lab::new() else { return };
    let store = lab.store();
    let start = |name: &str, last: u8| {
        let host = lab.host(name, Ipv4Addr::new(10, 9, 0, last));
        NodeConfig::on_interface(name, "eth0", &store).start(&host)
    };
    let (node, other) = (start("n1", 1), start("n2", 2));
    node.wait_peers(1);
    other.wait_peers(1);
    let (mut here, mut there) = (node.pod("a"), other.pod("b"));
    let attached = lab.namespace("attached");
    let pid = attached.pid().to_string();
    let output = node
        .client(&["attach", "--pid", &pid, "--name", "c"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let port = there.listen(0).unwrap();
    let to = SocketAddrV4::new(there.address("eth0").unwrap(), port);
    let connection = here.open(to).unwrap();
    assert!(here.exchange(connection, 200_000, 1).unwrap().intact);
    assert_eq!(node.mtu(), 1450);

    let subnet_file = node.state_dir().join("nodes/n1/subnet.env");
    for (seed, mtu) in [(2, 1300), (3, 1500), (4, 1400)] {
        // All of a link have one MTU.
        for (node, pod) in [(&node, &mut here), (&other, &mut there)] {
            node.host().sh(&format!("ip link set eth0 mtu {mtu}"));
            poll_until(SOON, "the pod's new MTU", || {
                has_mtu(pod, node.address(1), mtu - 50).then_some(())
            });
        }
        assert_eq!(usize::from(node.mtu()), mtu - 50);
        poll_until(SOON, "the new MTU for flannel's tools", || {
            let text = std::fs::read_to_string(&subnet_file).ok()?;
            text.contains(&format!("FLANNEL_MTU={}\n", mtu - 50))
                .then_some(())
        });
        // Connections go on, and one begins.
        assert!(here.exchange(connection, 200_000, seed).unwrap().intact);
        let later = here.open(to).unwrap();
        assert!(here.exchange(later, 200_000, seed).unwrap().intact);
    }
    // A pod that comes later has it from the start.
    let mut late = node.pod("late");
    assert!(has_mtu(&mut late, node.address(1), 1350));
    // Nobody is left in the namespace of a pod that was attached: that is said, and what it sends is
    // answered with what fits (RFC 1191).
    let log = node.log();
    assert!(log.contains("of c keep their MTU"), "{log}");
    let far = there.address("eth0").unwrap();
    let pinged = attached.agent().ping(&whole(far, 1400)).unwrap();
    let fits = pinged
        .errors
        .iter()
        .any(|it| it.is_fragmentation_needed(1350));
    assert!(fits, "{pinged:?}");
    assert_eq!(node.status("public_ip"), "10.9.0.1", "it has not moved");
}
