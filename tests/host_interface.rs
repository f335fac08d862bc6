//! The host and pods reach each other by `muslin host-interface`: here and on other nodes, with the
//! node's own address as source, as often as the node is started, and without privileges for it.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{Child, Stdio};

use muslin::agent::Agent;
use muslin_lab::flannel::{self, Flannel, NODE_IP};
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until, traffic};

/// MTU of the underlay in bytes.
const UNDERLAY: u16 = 1500;
const NETWORK: &str = "10.244.0.0/16";
/// What each transfer carries.
const BYTES: u64 = 2_000_000;

fn underlay(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, node)
}

/// Two nodes without capabilities and with a pod each. The hosts have an interface.
struct Bed {
    nodes: [Node; 2],
    pods: [Agent; 2],
    hosts: [Agent; 2],
    lab: Lab,
}

impl Bed {
    fn new(flags: &[(&str, &str)]) -> Option<Self> {
        let bed = Self::without_interfaces(flags)?;
        for node in &bed.nodes {
            make(node);
        }
        Some(bed)
    }

    fn without_interfaces(flags: &[(&str, &str)]) -> Option<Self> {
        let lab = Lab::new()?;
        let store = lab.store();
        let nodes = [1, 2].map(|number: u8| {
            let name = format!("n{number}");
            let mut config = NodeConfig::new(&name, underlay(number), &store)
                .with("--network", NETWORK)
                .with("--mtu", UNDERLAY)
                .without_capability("all");
            for (flag, value) in flags {
                config = config.with(flag, value);
            }
            config.start(&lab.host(&name, underlay(number)))
        });
        for node in &nodes {
            node.wait_peers(1);
            assert_eq!(capabilities(node), [0; 3]);
        }
        Some(Self {
            pods: nodes.each_ref().map(|node| node.pod("pod")),
            hosts: nodes.each_ref().map(|node| node.host().agent()),
            nodes,
            lab,
        })
    }

    fn pod_addresses(&mut self) -> [Ipv4Addr; 2] {
        self.pods.each_mut().map(|pod| pod.address("eth0").unwrap())
    }

    /// Ends it: without the interfaces the nodes hold what they held at their start.
    fn end(self) {
        for node in &self.nodes {
            succeed(node, &["host-interface", "--remove"]);
        }
    }
}

/// Permitted, effective and bounding capabilities of a node's process.
fn capabilities(node: &Node) -> [u64; 3] {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    ["CapPrm", "CapEff", "CapBnd"].map(|name| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    })
}

fn succeed(node: &Node, words: &[&str]) {
    let output = node.client(words).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {told}{}", node.log());
    assert_eq!(told, "", "{words:?}");
}

/// Makes a node's interface, and waits until the node has it open.
fn make(node: &Node) {
    succeed(node, &["host-interface"]);
    wait_open(node);
}

fn wait_open(node: &Node) {
    poll_until(SOON, &format!("the host interface{}", node.log()), || {
        let host = &node.query("status")["host_interface"];
        (host["name"] == "muslin0").then_some(())
    });
}

/// Has the host send from this address to pods.
fn send_from(host: &Host, address: Ipv4Addr) {
    host.sh(&format!(
        "ip route replace {NETWORK} dev muslin0 scope link src {address}"
    ));
}

/// A program on a host that tells who connects to it, once.
struct Door {
    child: Child,
    at: SocketAddrV4,
}

impl Door {
    fn open(host: &Host, address: Ipv4Addr) -> Self {
        const SCRIPT: &str = r#"
            use IO::Socket::INET; $| = 1; alarm 50;
            my $listener = IO::Socket::INET->new(LocalAddr => $ARGV[0], Listen => 5) or die "$!";
            print $listener->sockport, "\n";
            my $client = $listener->accept or die "$!";
            print $client->peerhost, "\n";"#;
        let mut command = host.command("perl");
        command.args(["-e", SCRIPT, &address.to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut door = Self {
            child: child.unwrap(),
            at: SocketAddrV4::new(address, 0),
        };
        let port = door.line().parse().unwrap();
        door.at.set_port(port);
        door
    }

    fn line(&mut self) -> String {
        let output = self.child.stdout.as_mut().unwrap();
        // One line at a time comes, and nothing else is read.
        let mut line = String::new();
        BufReader::with_capacity(1, output)
            .read_line(&mut line)
            .unwrap();
        line.trim().to_owned()
    }

    /// The address of who connects.
    fn client(mut self) -> Ipv4Addr {
        let address = self.line();
        self.child.wait().unwrap();
        address.parse().unwrap()
    }
}

/// The host of the first node and both pods exchange what there is to exchange.
fn check_host(bed: &mut Bed) {
    let addresses = bed.pod_addresses();
    let mtu = bed.nodes[0].mtu();
    for (there, to) in addresses.into_iter().enumerate() {
        let host = &mut bed.hosts[0];
        traffic::ping(host, to);
        traffic::fits(host, to, mtu);
        let pinged = traffic::ping_of_size(host, to, 9000, false);
        if there == 0 {
            assert!(pinged.is_perfect(1), "in fragments: {pinged:?}");
        }
        let port = bed.pods[there].listen(0).unwrap();
        for _ in 0..4 {
            traffic::transfer(host, to, port, BYTES);
        }
        let echoed = host.udp(SocketAddrV4::new(to, port), 20, 1300).unwrap();
        assert_eq!(echoed.intact, 20, "{to}");
    }
}

#[test]
fn the_host_reaches_pods_here_and_there_from_any_of_its_addresses() {
    for workers in ["1", "3"] {
        let Some(mut bed) = Bed::new(&[("--workers", workers)]) else {
            return;
        };
        let here = bed.nodes[0].host().clone();
        let base = bed.nodes[0].address(0);
        for own in [base, underlay(1)] {
            send_from(&here, own);
            bed.pods[0].capture("eth0").unwrap();
            bed.pods[1].capture("eth0").unwrap();
            check_host(&mut bed);
            // Its own pods see the host's own address, others that of the interface.
            for (there, expected) in [own, base].into_iter().enumerate() {
                let frames = bed.pods[there].captured().unwrap();
                let is_from = |source: Ipv4Addr| {
                    let frames = frames.iter();
                    frames
                        .filter(|frame| frame.get(26..30) == Some(&source.octets()[..]))
                        .count()
                };
                assert!(is_from(expected) > 20, "from {own} to pod {there}");
                for other in [base, underlay(1)].into_iter().filter(|it| *it != expected) {
                    assert_eq!(is_from(other), 0, "from {own} to pod {there}");
                }
            }
        }
        let [here, _] = bed.pod_addresses();
        let port = bed.pods[0].listen(0).unwrap();
        traffic::transfer(&mut bed.hosts[1], here, port, BYTES);
        for node in &bed.nodes {
            let mut losses = node.losses();
            // What comes back in fragments cannot be translated.
            losses.remove("host-fragment");
            assert_eq!(losses, Default::default());
        }
        let host = &bed.nodes[0].query("status")["host_interface"];
        assert_eq!(host["addresses"][0], underlay(1).to_string());
        assert!(host["received"]["packets"].as_u64() > Some(100), "{host}");
        bed.end();
    }
}

#[test]
fn pods_reach_their_host_with_their_own_addresses() {
    let Some(mut bed) = Bed::without_interfaces(&[]) else {
        return;
    };
    let [own, far] = bed.pod_addresses();
    let here = bed.nodes[0].host().clone();
    let client_of = |pod: &mut Agent, address| {
        let door = Door::open(&here, address);
        pod.open(door.at).unwrap();
        door.client()
    };
    // As before, by sockets of the node.
    assert_eq!(client_of(&mut bed.pods[0], underlay(1)), underlay(1));
    for node in &bed.nodes {
        make(node);
    }
    assert_eq!(client_of(&mut bed.pods[0], underlay(1)), own);
    let base = bed.nodes[0].address(0);
    assert_eq!(client_of(&mut bed.pods[0], base), own);
    assert_eq!(client_of(&mut bed.pods[1], base), far);
    // Other hosts see the node.
    assert_eq!(client_of(&mut bed.pods[1], underlay(1)), underlay(2));
    let port = bed.hosts[0].listen(0).unwrap();
    for to in [underlay(1), base] {
        traffic::ping(&mut bed.pods[0], to);
        traffic::transfer(&mut bed.pods[0], to, port, BYTES);
    }
    // A socket that is bound to no address answers from the one of the route.
    let echoed = bed.pods[0].udp(SocketAddrV4::new(base, port), 20, 1300);
    assert_eq!(echoed.unwrap().intact, 20);
    // The gateway is the node's, for both.
    let gateway = bed.nodes[0].address(1);
    traffic::ping(&mut bed.pods[0], gateway);
    traffic::ping(&mut bed.hosts[0], gateway);
    assert_eq!(bed.nodes[0].losses(), Default::default());
    succeed(&bed.nodes[0], &["host-interface", "--remove"]);
    poll_until(SOON, "the end of the host interface", || {
        bed.nodes[0].query("status")["host_interface"]
            .is_null()
            .then_some(())
    });
    assert_eq!(client_of(&mut bed.pods[0], underlay(1)), underlay(1));
    bed.end();
}

#[test]
fn what_egress_forbids_stays_forbidden_and_probes_work_nevertheless() {
    let Some(mut bed) = Bed::new(&[("--egress", "off")]) else {
        return;
    };
    send_from(bed.nodes[0].host(), underlay(1));
    check_host(&mut bed);
    let port = bed.hosts[0].listen(0).unwrap();
    for to in [underlay(1), bed.nodes[0].address(0)] {
        for pod in &mut bed.pods {
            assert!(pod.open(SocketAddrV4::new(to, port)).is_err(), "{to}");
        }
    }
    let drops = bed.nodes[0].drops();
    assert!(drops["host-denied"] > 0, "{drops:?}");
    bed.end();
}

#[test]
fn a_node_that_is_started_again_opens_the_interface_without_help() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let [_, far] = bed.pod_addresses();
    let port = bed.pods[1].listen(0).unwrap();
    traffic::transfer(&mut bed.hosts[0], far, port, BYTES);
    for _ in 0..2 {
        bed.nodes[0].kill();
        bed.nodes[0].start_again();
        assert_eq!(capabilities(&bed.nodes[0]), [0; 3]);
        wait_open(&bed.nodes[0]);
        bed.nodes[0].wait_peers(1);
        traffic::transfer(&mut bed.hosts[0], far, port, BYTES);
        send_from(bed.nodes[0].host(), underlay(1));
        traffic::transfer(&mut bed.hosts[0], far, port, BYTES);
    }
    bed.end();
}

#[test]
fn a_process_that_takes_the_node_over_goes_on_with_the_interface() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let [near, far] = bed.pod_addresses();
    let ports = bed.pods.each_mut().map(|pod| pod.listen(0).unwrap());
    let ends = [(near, ports[0]), (far, ports[1])];
    let host = &mut bed.hosts[0];
    let streams = ends.map(|(to, port)| host.open(SocketAddrV4::new(to, port)).unwrap());
    for round in 0..3 {
        let mut old = bed.nodes[0].take_over();
        let host = &mut bed.hosts[0];
        for id in streams {
            assert!(host.exchange(id, BYTES, round).unwrap().intact);
        }
        for (to, _) in ends {
            traffic::ping(host, to);
        }
        assert_eq!(capabilities(&bed.nodes[0]), [0; 3]);
        let ended = poll_until(SOON, "the old process' end", || old.try_wait().unwrap());
        assert!(ended.success());
    }
    bed.end();
}

#[test]
fn the_command_makes_corrects_and_removes_the_interface() {
    let Some(bed) = Bed::new(&[]) else { return };
    let node = &bed.nodes[0];
    let host = node.host();
    let state = || {
        let link = host.run(&["ip", "-json", "-4", "address", "show", "muslin0"]);
        let link: serde_json::Value = serde_json::from_str(&link).unwrap();
        let routes = host.run(&["ip", "route", "show", "dev", "muslin0"]);
        let addresses = link[0]["addr_info"].as_array().unwrap();
        let addresses: Vec<_> = addresses.iter().map(|it| it["local"].clone()).collect();
        (link[0]["mtu"].clone(), addresses, routes.trim().to_owned())
    };
    let base = node.address(0).to_string();
    let right = state();
    assert_eq!(right.0, node.mtu());
    assert_eq!(right.1, [base.as_str()]);
    assert_eq!(
        right.2,
        format!("{NETWORK} proto static scope link src {base}")
    );
    succeed(node, &["host-interface"]);
    assert_eq!(state(), right);
    // As after another lease, in another network.
    host.sh(&format!(
        "ip addr add 10.99.7.0/32 dev muslin0; ip link set muslin0 mtu 1200
         ip route add 10.99.0.0/16 dev muslin0 src 10.99.7.0; ip addr del {base}/32 dev muslin0"
    ));
    assert_ne!(state(), right);
    succeed(node, &["host-interface"]);
    assert_eq!(state(), right);
    // The node opens what is its own again.
    let mut agent = host.agent();
    let gateway = node.address(1);
    poll_until(SOON, "the host interface", || {
        let pinged = agent.ping(&muslin::agent::Ping::new(gateway)).unwrap();
        (!pinged.replies.is_empty()).then_some(())
    });
    drop(agent);

    succeed(node, &["host-interface", "--remove"]);
    succeed(node, &["host-interface", "--remove"]);
    assert!(
        !host
            .output(&["ip", "link", "show", "muslin0"])
            .status
            .success()
    );
    host.sh("ip link add muslin0 type bridge");
    for words in [&["host-interface"][..], &["host-interface", "--remove"]] {
        let output = node.client(words).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        assert!(told.contains("muslin0"), "{told}");
    }
    host.sh("ip link del muslin0");
    bed.end();
}

#[test]
fn without_a_node_one_line_says_so_and_with_wait_it_is_waited_for() {
    let Some(lab) = Lab::new() else { return };
    let config = NodeConfig::new("n", underlay(1), &lab.store()).with("--network", NETWORK);
    let mut node = config.start(&lab.host("n", underlay(1)));
    node.kill();
    let output = node.client(&["host-interface"]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(
        told.lines().count() == 1 && told.contains("muslin node"),
        "{told}"
    );
    let mut waiting = node.client(&["host-interface", "--wait"]).spawn().unwrap();
    node.start_again();
    assert!(waiting.wait().unwrap().success());
    wait_open(&node);
    succeed(&node, &["host-interface", "--remove"]);
}

#[test]
fn what_the_host_forwards_is_dropped_and_counted() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let here = bed.nodes[0].host();
    here.sh("echo 1 >/proc/sys/net/ipv4/ip_forward");
    let stranger = bed.lab.host("stranger", underlay(9));
    stranger.sh(&format!("ip route add {NETWORK} via {}", underlay(1)));
    let mut stranger = stranger.agent();
    for to in bed.pod_addresses() {
        let ping = muslin::agent::Ping::new(to);
        let pinged = stranger.ping(&ping).unwrap();
        assert!(pinged.replies.is_empty(), "{pinged:?}");
    }
    drop(stranger);
    let drops = bed.nodes[0].drops();
    assert!(drops["host-forwarded"] >= 2, "{drops:?}");
    bed.end();
}

#[test]
fn a_kernels_pods_are_reached_from_the_base_address() {
    const MACS: (&str, &str) = ("c6:d2:32:6f:8f:44", "8a:11:22:33:44:55");
    let Some(lab) = Lab::new() else { return };
    let mtu = UNDERLAY - 50;
    let theirs = Flannel::new(&lab, mtu);
    let (its, ours) = MACS;
    let base = flannel::kernel(0);
    flannel::device(&theirs.host, flannel::KERNEL_IP, base, mtu);
    theirs
        .host
        .sh(&format!("ip link set flannel.1 address {its}"));
    flannel::set_up(&theirs.host, "10.244.2.0-24", &NODE_IP.to_string(), ours);
    // As kernels check it that are set up strictly.
    theirs.host.sh("for it in all default flannel.1; do
            echo 1 >/proc/sys/net/ipv4/conf/$it/rp_filter; done");
    let host = lab.host("node", NODE_IP);
    let store = flannel::store(&lab, "vxlan", "vni = 1\nport = 8472", Some(MACS));
    let node = NodeConfig::new("n", NODE_IP, &store)
        .with("--mtu", UNDERLAY)
        .without_capability("all")
        .start(&host);
    make(&node);
    let (mut pod, mut ours) = (theirs.pod.agent(), host.agent());
    let mut their_host = theirs.host.agent();
    let port = pod.listen(0).unwrap();
    pod.capture("eth0").unwrap();
    for own in [flannel::node(0), NODE_IP] {
        send_from(&host, own);
        traffic::ping(&mut ours, flannel::kernel(2));
        traffic::ping(&mut ours, base);
        traffic::transfer(&mut ours, flannel::kernel(2), port, BYTES);
    }
    let frames = pod.captured().unwrap();
    let from = |source: Ipv4Addr| {
        let is_from = |frame: &&Vec<u8>| frame.get(26..30) == Some(&source.octets()[..]);
        frames.iter().filter(is_from).count()
    };
    assert!(from(flannel::node(0)) > 20);
    assert_eq!(from(NODE_IP), 0);
    // flannel's own ping, from one base address to the other.
    traffic::ping(&mut their_host, flannel::node(0));
    let port = ours.listen(0).unwrap();
    traffic::transfer(&mut pod, flannel::node(0), port, BYTES);
    assert_eq!(node.losses(), Default::default());
    succeed(&node, &["host-interface", "--remove"]);
}

#[test]
fn a_node_that_is_told_so_uses_no_interface() {
    let Some(bed) = Bed::without_interfaces(&[("--host-interface", "none")]) else {
        return;
    };
    succeed(&bed.nodes[0], &["host-interface"]);
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert!(bed.nodes[0].query("status")["host_interface"].is_null());
    bed.end();
}
