//! A Linux kernel's VXLAN device, set up as flannel does, and a muslin node carry each other's
//! packets.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::Command;

use muslin::agent::Agent;
use muslin_lab::flannel::{self, Flannel, KERNEL_IP, NODE_IP};
use muslin_lab::{Host, Lab, Node, NodeConfig, Offload, traffic};

/// The kernel's VTEP, and the node's.
const MACS: (&str, &str) = ("c6:d2:32:6f:8f:44", "8a:11:22:33:44:55");
/// MTU of the underlay in bytes.
const UNDERLAY: u16 = 1500;
/// MTU of pods: less inner Ethernet, VXLAN, UDP and IP headers.
const MTU: u16 = UNDERLAY - 50;

/// A kernel with a pod, and a node with a pod, that reach each other.
struct Bed {
    flannel: Flannel,
    /// An agent on the kernel's host: it sends from `.0`.
    host: Agent,
    theirs: Agent,
    ours: Agent,
    node: Node,
    node_host: Host,
    _lab: Lab,
}

impl Bed {
    /// A bed whose muslin pod ran this script first.
    fn new(script: &str) -> Option<Self> {
        let lab = Lab::new()?;
        let flannel = Flannel::new(&lab, MTU);
        let (theirs, ours) = MACS;
        flannel.host.sh(&format!(
            "ip link add flannel.1 type vxlan id 1 dstport 8472 nolearning local {KERNEL_IP} dev eth0
             ip link set flannel.1 address {theirs} mtu {MTU} up
             ip addr add {base}/32 dev flannel.1
             ip neigh replace {peer} lladdr {ours} dev flannel.1 nud permanent
             bridge fdb replace {ours} dev flannel.1 dst {NODE_IP} self permanent
             ip route replace {subnet} via {peer} dev flannel.1 onlink",
            base = flannel::kernel(0),
            peer = flannel::node(0),
            subnet = flannel::NODE_SUBNET,
        ));
        let node_host = lab.host("node", NODE_IP);
        let store = flannel::store(&lab, "vxlan", "vni = 1\nport = 8472", Some(MACS));
        let node = NodeConfig::new("n", NODE_IP, &store)
            .with("--mtu", UNDERLAY)
            .start(&node_host);
        Some(Self {
            host: flannel.host.agent(),
            theirs: flannel.pod.agent(),
            ours: node.pod_after("pod", &["--ip", &flannel::node(2).to_string()], script),
            flannel,
            node,
            node_host,
            _lab: lab,
        })
    }
}

#[test]
fn every_address_answers_pings_from_everywhere() {
    let Some(mut bed) = Bed::new("") else { return };
    assert_eq!(bed.node.mtu(), MTU);
    assert_eq!(bed.node.status("vtep_mac"), MACS.1);
    for to in [flannel::kernel(2), flannel::kernel(1), flannel::kernel(0)] {
        traffic::ping(&mut bed.ours, to);
    }
    // The node's own `.0` is what its packets would come from if it had a kernel device.
    for to in [flannel::node(2), flannel::node(1), flannel::node(0)] {
        traffic::ping(&mut bed.theirs, to);
        traffic::ping(&mut bed.host, to);
    }
    // flannel's own ping: from one `.0` to the other, with more than one packet's payload.
    let pinged = traffic::ping_of_size(&mut bed.host, flannel::node(0), 4000, false);
    assert!(pinged.is_perfect(1), "{pinged:?}");
    assert_eq!(bed.node.losses(), Default::default());
}

#[test]
fn a_hundred_megabytes_arrive_in_both_directions() {
    let Some(mut bed) = Bed::new("") else { return };
    let port = bed.theirs.listen(0).unwrap();
    traffic::transfer(&mut bed.ours, flannel::kernel(2), port, traffic::BULK);
    let port = bed.ours.listen(0).unwrap();
    traffic::transfer(&mut bed.theirs, flannel::node(2), port, traffic::BULK);
}

#[test]
fn packets_of_the_mtu_pass_and_larger_ones_are_reported() {
    let Some(mut bed) = Bed::new("ip link set eth0 mtu 1500") else {
        return;
    };
    let (theirs, ours) = (flannel::kernel(2), flannel::node(2));
    traffic::fits(&mut bed.ours, theirs, MTU);
    traffic::fits(&mut bed.theirs, ours, MTU);
    traffic::exceeds(&mut bed.ours, theirs, MTU, flannel::node(1));
    for size in [MTU + 1, 9000] {
        let pinged = traffic::ping_of_size(&mut bed.ours, theirs, size, false);
        assert!(pinged.is_perfect(1), "{size} in fragments: {pinged:?}");
        let pinged = traffic::ping_of_size(&mut bed.theirs, ours, size, false);
        assert!(pinged.is_perfect(1), "{size} in fragments: {pinged:?}");
    }
    // TCP finds out for itself.
    let port = bed.theirs.listen(0).unwrap();
    traffic::transfer(&mut bed.ours, theirs, port, 1_000_000);

    // A kernel that believes in a larger path sends more than our pods take: the node says so.
    for host in [&bed.flannel.host, &bed.node_host] {
        host.sh("ip link set eth0 mtu 1600");
    }
    bed.flannel.host.sh("ip link set flannel.1 mtu 1500");
    bed.flannel.set_mtu(1500);
    traffic::exceeds(&mut bed.theirs, ours, MTU, flannel::node(1));
    let drops = bed.node.drops();
    assert_eq!(drops.get("fragmentation-needed"), Some(&2), "{drops:?}");
}

#[test]
fn packets_whose_time_is_over_are_reported() {
    let Some(mut bed) = Bed::new("") else { return };
    let (theirs, ours) = (flannel::kernel(2), flannel::node(2));
    // The kernel's errors come from the address it has towards us.
    traffic::expires(&mut bed.ours, theirs, 1, flannel::node(1));
    traffic::expires(&mut bed.ours, theirs, 2, flannel::kernel(0));
    traffic::expires(&mut bed.theirs, ours, 1, flannel::kernel(1));
    traffic::expires(&mut bed.theirs, ours, 2, flannel::node(1));
    let drops = bed.node.drops();
    assert_eq!(drops.get("ttl-exceeded"), Some(&6), "{drops:?}");
}

#[test]
fn every_checksum_is_right() {
    let Some(mut bed) = Bed::new("ip link set eth0 mtu 1500") else {
        return;
    };
    // So that what is captured is what a wire would carry.
    bed.flannel.host.without("flannel.1", Offload::Checksums);
    bed.flannel.host.without("flannel.1", Offload::Merging);
    bed.node_host.segments("eth0");
    let (theirs, ours) = (flannel::kernel(2), flannel::node(2));
    let port = bed.theirs.listen(0).unwrap();
    let to = std::net::SocketAddrV4::new(theirs, port);
    bed.host.capture("flannel.1").unwrap();
    // What the node forwards, fragments, answers and reports.
    traffic::ping(&mut bed.ours, theirs);
    traffic::ping(&mut bed.theirs, flannel::node(1));
    traffic::ping_of_size(&mut bed.ours, theirs, 4000, false);
    traffic::expires(&mut bed.theirs, ours, 2, flannel::node(1));
    traffic::transfer(&mut bed.ours, theirs, port, 200_000);
    for size in [0, 1, 33, 1000] {
        let echoed = bed.ours.udp(to, 5, size).unwrap();
        assert_eq!(echoed.intact, 5, "{size} bytes");
    }
    let frames = bed.host.captured().unwrap();
    let text = tcpdump(&frames);
    assert!(text.contains("time exceeded"), "{text}");
    assert!(text.contains("[udp sum ok]"), "{text}");
    assert!(text.contains("(correct)"), "{text}");
    for wrong in [
        "bad cksum",
        "bad udp cksum",
        "(incorrect",
        "wrong icmp cksum",
    ] {
        let found = text.lines().find(|line| line.contains(wrong));
        assert_eq!(found, None);
    }
    for host in [&bed.flannel.host, &bed.flannel.pod] {
        for protocol in ["Icmp", "Tcp", "Udp", "IpExt"] {
            let wrong = host.counter(protocol, "InCsumErrors");
            assert_eq!(wrong, 0, "{protocol}");
        }
    }
    // The counters do count.
    let address: Ipv4Addr = flannel::kernel(2);
    assert_ne!(
        bed.flannel.pod.counter("Udp", "InDatagrams"),
        0,
        "{address}"
    );
}

/// What tcpdump says of frames, in all detail.
fn tcpdump(frames: &[Vec<u8>]) -> String {
    assert!(frames.len() > 100, "{} frames", frames.len());
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let word = |value: u32| value.to_ne_bytes();
    for header in [0xa1b2_c3d4, 0x0004_0002, 0, 0, 65_535, 1] {
        file.write_all(&word(header)).unwrap();
    }
    for frame in frames {
        let len = frame.len() as u32;
        for header in [0, 0, len, len] {
            file.write_all(&word(header)).unwrap();
        }
        file.write_all(frame).unwrap();
    }
    file.flush().unwrap();
    let mut command = Command::new("tcpdump");
    command.args(["-vv", "-n", "-r"]).arg(file.path());
    if std::fs::metadata(file.path()).is_ok_and(|it| {
        use std::os::unix::fs::MetadataExt as _;
        it.uid() == 0
    }) {
        // It would take another user's rights, who cannot read the file.
        command.args(["-Z", "root"]);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
