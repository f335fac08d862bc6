//! What routers and hosts outside the pod network say of pods' datagrams reaches the pods, as if no
//! socket of their node were in between.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::Stdio;

use muslin_lab::{Host, Lab, Node, NodeConfig, traffic};

const NODE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 3);
/// Behind the router.
const FAR: Ipv4Addr = Ipv4Addr::new(10, 9, 1, 4);
/// Of the link behind the router, in bytes.
const FAR_MTU: u16 = 1300;
const PORT: u16 = 9000;

/// A node, and a host behind a router.
struct Bed {
    node: Node,
    far: Host,
    _router: Host,
    _lab: Lab,
}

impl Bed {
    fn new() -> Option<Self> {
        let lab = Lab::new()?;
        let store = lab.store();
        let (host, router) = (lab.host("node", NODE), lab.host("router", ROUTER));
        let far = lab.namespace("far");
        lab.cable((&router, "eth1"), (&far, "eth0"));
        router.sh(&format!(
            "echo 1 >/proc/sys/net/ipv4/ip_forward
             ip addr add 10.9.1.3/24 dev eth1; ip link set eth1 mtu {FAR_MTU}"
        ));
        far.sh(&format!(
            "ip addr add {FAR}/24 dev eth0; ip link set eth0 mtu {FAR_MTU}
             ip route add default via 10.9.1.3"
        ));
        host.sh(&format!(
            "ip route add 10.9.1.0/24 via {ROUTER}
             echo 0 0 >/proc/sys/net/ipv4/ping_group_range"
        ));
        Some(Self {
            node: NodeConfig::new("n1", NODE, &store).start(&host),
            far,
            _router: router,
            _lab: lab,
        })
    }

    /// What a script prints that runs in a pod.
    fn perl(&self, script: &str) -> String {
        let words = ["run", "--", "perl", "-MSocket", "-e", script];
        let output = self.node.client(&words).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}{}", self.node.log());
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn the_routers_on_the_way_are_found_by_their_errors() {
    let Some(bed) = Bed::new() else { return };
    let gateway = bed.node.address(1);
    let mut pod = bed.node.pod("pod");
    traffic::ping(&mut pod, FAR);
    traffic::expires(&mut pod, FAR, 1, gateway);
    traffic::expires(&mut pod, FAR, 2, ROUTER);
    let traced = bed.perl(&format!(
        r#"socket(my $icmp, PF_INET, SOCK_RAW, 1) or die; socket(my $udp, PF_INET, SOCK_DGRAM, 0);
           for my $ttl (1..3) {{
               setsockopt($udp, 0, 2, pack("i", $ttl)) or die; alarm 50;
               send($udp, "probe$ttl", 0, pack_sockaddr_in(33433 + $ttl, inet_aton("{FAR}"))) or die;
               my $from = recv($icmp, my $packet, 2000, 0) or die;
               my $error = substr($packet, 4 * (ord($packet) & 15));
               my $udp = substr($error, 28);
               print inet_ntoa((unpack_sockaddr_in($from))[1]),
                   join(" ", "", unpack("CC", $error), unpack("x2n", $udp), substr($udp, 8)), "\n";
           }}"#
    ));
    let expected = format!(
        "{gateway} 11 0 33434 probe1\n{ROUTER} 11 0 33435 probe2\n{FAR} 3 3 33436 probe3\n"
    );
    assert_eq!(traced, expected, "{}", bed.node.log());
}

#[test]
fn pods_learn_the_mtu_of_a_path() {
    let Some(bed) = Bed::new() else { return };
    let mut far = bed.far.agent();
    far.listen(PORT).unwrap();
    let to = SocketAddrV4::new(FAR, PORT);
    let (mut first, mut second) = (bed.node.pod("first"), bed.node.pod("second"));
    traffic::exceeds(&mut first, FAR, FAR_MTU, ROUTER);
    traffic::fits(&mut first, FAR, FAR_MTU);
    // The node's host knows it now, too.
    traffic::exceeds(&mut second, FAR, FAR_MTU, bed.node.address(1));
    assert_eq!(bed.node.drops().get("egress-too-long"), Some(&1));
    let whole = traffic::ping_of_size(&mut second, FAR, 1400, false);
    assert!(whole.is_perfect(1), "{whole:?}");

    // Another pod's system sends with "don't fragment" until it is told.
    let mut third = bed.node.pod("third");
    let error = third.udp(to, 1, 1400).unwrap_err().to_string();
    assert!(error.contains("too long"), "{error}");
    let echoed = third.udp(to, 20, 1400).unwrap();
    assert_eq!((echoed.sent, echoed.intact), (20, 20), "{}", bed.node.log());
}

#[test]
fn datagrams_keep_their_service_and_their_time_to_live() {
    let Some(bed) = Bed::new() else { return };
    let mut command = bed.far.command("perl");
    command.args([
        "-MSocket",
        "-e",
        r#"socket(my $raw, PF_INET, SOCK_RAW, 17) or die; $| = 1; print "READY\n";
           recv($raw, my $packet, 2000, 0); print join(" ", unpack("xC x6C", $packet)), "\n";"#,
    ]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "READY");
    // Expedited forwarding, and of the two bits for congestion that transport understands it.
    bed.perl(&format!(
        r#"socket(my $udp, PF_INET, SOCK_DGRAM, 0); setsockopt($udp, 0, 1, pack("i", 0xba)) or die;
           send($udp, "x", 0, pack_sockaddr_in({PORT}, inet_aton("{FAR}"))) or die;"#
    ));
    // Two routers on the way: the node and the other.
    assert_eq!(lines.next().unwrap().unwrap(), format!("{} 62", 0xb8));
    child.wait().unwrap();
}
