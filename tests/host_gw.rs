//! Bare packets between hosts of one link, as flannel's host-gw and DirectRouting have them: among
//! muslin nodes, with a kernel that is routed as flannel does it, and with hosts that lie.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::Ipv4Addr;

use muslin::agent::{Agent, Ping};
use muslin_lab::flannel::{self, Flannel, KERNEL_IP, NODE_IP};
use muslin_lab::skip::skip_on_this_kernel;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until, traffic};

/// MTU of the link, and of all pods, in bytes.
const MTU: u16 = 1500;
/// A second node, and its subnet.
const OTHER_IP: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 3);
const OTHER_SUBNET: &str = "10.244.3.0/24";
/// Where all hosts of the link are.
const LINK: &str = "10.9.0.0/24";

/// A kernel with a pod, and two nodes with a pod each, on one link.
struct Bed {
    kernel: Flannel,
    nodes: [Node; 2],
    pods: [Agent; 3],
    lab: Lab,
}

/// A file of leases for hosts with these addresses and subnets.
fn store(lab: &Lab, backend: &str, nodes: &[(Ipv4Addr, &str)]) -> String {
    let mut text = format!("network = \"{}\"\n{backend}\n", flannel::NETWORK);
    for (ip, subnet) in nodes {
        text.push_str(&format!(
            "[[node]]\npublic-ip = \"{ip}\"\nsubnet = \"{subnet}\"\n"
        ));
    }
    let path = lab.directory().join("nodes.toml");
    std::fs::write(&path, text).unwrap();
    format!("file:{}", path.display())
}

/// A host whose kernel leaves forwarding to the node.
fn node_host(lab: &Lab, name: &str, address: Ipv4Addr) -> Host {
    let host = lab.host(name, address);
    host.sh("echo 0 >/proc/sys/net/ipv4/ip_forward");
    host
}

impl Bed {
    fn new(flags: &[&str]) -> Option<Self> {
        let lab = Lab::new()?;
        let kernel = Flannel::new(&lab, MTU);
        kernel.host.sh(&format!(
            "ip route add {} via {NODE_IP} dev eth0
             ip route add {OTHER_SUBNET} via {OTHER_IP} dev eth0",
            flannel::NODE_SUBNET
        ));
        let store = store(
            &lab,
            "backend = \"host-gw\"",
            &[
                (KERNEL_IP, flannel::KERNEL_SUBNET),
                (NODE_IP, flannel::NODE_SUBNET),
                (OTHER_IP, OTHER_SUBNET),
            ],
        );
        let nodes = [("n2", NODE_IP), ("n3", OTHER_IP)].map(|(name, address)| {
            let config = NodeConfig::on_interface(name, "eth0", &store);
            let config = flags.iter().fold(config, |config, flag| config.flag(flag));
            config.start(&node_host(&lab, name, address))
        });
        let pods = [
            kernel.pod.agent(),
            nodes[0].pod_after("pod", &["--ip", "10.244.2.2"], "ip link set eth0 mtu 1600"),
            nodes[1].pod_after("pod", &["--ip", "10.244.3.2"], ""),
        ];
        Some(Self {
            kernel,
            nodes,
            pods,
            lab,
        })
    }

    fn addresses() -> [Ipv4Addr; 3] {
        [1, 2, 3].map(|node| Ipv4Addr::new(10, 244, node, 2))
    }

    /// Pings and transfers from each pod to each other.
    fn check(&mut self, bytes: u64) {
        let addresses = Self::addresses();
        for (from, to) in [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2)] {
            traffic::ping(&mut self.pods[from], addresses[to]);
            let port = self.pods[to].listen(0).unwrap();
            traffic::transfer(&mut self.pods[from], addresses[to], port, bytes);
        }
    }
}

fn next_hop(node: &Node, address: Ipv4Addr) -> Option<(String, String)> {
    let rows = node.query("neighbours");
    let row = rows
        .as_array()?
        .iter()
        .find(|row| row["address"] == address.to_string() && row["uplink"] == true)?;
    let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
    Some((text("mac"), text("state")))
}

fn mac_of(host: &Host, interface: &str) -> String {
    let link = host.run(&["ip", "-json", "link", "show", "dev", interface]);
    let link: serde_json::Value = serde_json::from_str(&link).unwrap();
    let mac = link[0]["address"].as_str();
    mac.unwrap_or_else(|| panic!("{link}")).to_owned()
}

#[test]
fn two_nodes_and_a_kernel_are_each_others_next_hops() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    for node in &bed.nodes {
        assert_eq!(node.mtu(), MTU);
        assert_eq!(node.status("backend"), "host-gw");
        assert_eq!(node.status("uplink"), "packet");
        for peer in node.query("peers").as_array().unwrap() {
            assert_eq!(peer["path"], "on-link", "{peer}");
            assert_eq!((&peer["usable"], &peer["mtu"]), (&true.into(), &MTU.into()));
        }
    }
    // They are looked for when their leases appear, before there is any traffic.
    for (node, other) in bed.nodes.iter().zip([OTHER_IP, NODE_IP]) {
        for host in [KERNEL_IP, other] {
            poll_until(SOON, "a next hop is known", || {
                next_hop(node, host).filter(|(mac, _)| !mac.is_empty())
            });
        }
    }
    bed.check(traffic::BULK / 4);
    let [kernel, ours, _] = Bed::addresses();
    traffic::fits(&mut bed.pods[1], kernel, MTU);
    traffic::fits(&mut bed.pods[0], ours, MTU);
    traffic::exceeds(&mut bed.pods[1], kernel, MTU, bed.nodes[0].address(1));
    let pinged = traffic::ping_of_size(&mut bed.pods[1], kernel, 20_000, false);
    assert!(pinged.is_perfect(1), "in fragments: {pinged:?}");
    traffic::expires(&mut bed.pods[0], ours, 2, bed.nodes[0].address(1));
    let to = std::net::SocketAddrV4::new(kernel, bed.pods[0].listen(0).unwrap());
    for size in [0, 1, 1472, 20_000] {
        let echoed = bed.pods[1].udp(to, 5, size).unwrap();
        assert_eq!(echoed.intact, 5, "{size} bytes");
    }
    // The gateway answers from afar, and the kernel's checksums were all right.
    traffic::ping(&mut bed.pods[0], bed.nodes[0].address(1));
    for protocol in ["Icmp", "Tcp", "Udp"] {
        assert_eq!(bed.kernel.pod.counter(protocol, "InCsumErrors"), 0);
    }
    let (mac, state) = next_hop(&bed.nodes[0], KERNEL_IP).unwrap();
    assert_eq!(mac, mac_of(&bed.kernel.host, "eth0"));
    assert_eq!(state, "reachable");
    for node in &bed.nodes {
        let mut losses = node.losses();
        losses.remove("fragmentation-needed");
        losses.remove("ttl-exceeded");
        // A kernel that is asked for a sign of life has no address in its subnet to say so from.
        losses.remove("source-not-in-lease");
        assert_eq!(losses, Default::default());
    }
}

#[test]
fn superpackets_are_not_needed() {
    let Some(mut bed) = Bed::new(&["--offload=none"]) else {
        return;
    };
    bed.check(2_000_000);
}

#[test]
fn several_workers_share_the_link() {
    let Some(mut bed) = Bed::new(&["--workers=2"]) else {
        return;
    };
    bed.check(2_000_000);
    let [kernel, ..] = Bed::addresses();
    let port = bed.pods[0].listen(0).unwrap();
    for _ in 0..20 {
        traffic::transfer(&mut bed.pods[1], kernel, port, 10_000);
    }
    for node in &bed.nodes {
        assert_eq!(node.losses(), Default::default());
    }
}

#[test]
fn a_host_that_comes_back_with_another_mac_address_is_found_again() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let [_, ours, other] = Bed::addresses();
    traffic::ping(&mut bed.pods[1], other);
    traffic::ping(&mut bed.pods[0], other);
    let known = next_hop(&bed.nodes[0], OTHER_IP).unwrap();

    // The machine is replaced while a connection of its pod is open.
    bed.nodes[1].kill();
    let host = bed.nodes[1].host().clone();
    host.sh(
        "ip link set eth0 down; ip link set eth0 address 02:1a:00:00:00:77; ip link set eth0 up",
    );
    bed.nodes[1].start_again();
    reaches(&mut bed.pods[2], ours);
    // A kernel that does not ask learns of it when it is asked.
    traffic::ping(&mut bed.pods[2], Bed::addresses()[0]);
    let now = next_hop(&bed.nodes[0], OTHER_IP).unwrap();
    assert_ne!(now.0, known.0);
    assert_eq!(now.0, "02:1a:00:00:00:77");
    bed.check(1_000_000);
}

/// Waits until a pod gets an answer from an address.
fn reaches(pod: &mut Agent, to: Ipv4Addr) {
    let ping = Ping {
        count: 1,
        timeout_ms: 300,
        ..Ping::new(to)
    };
    poll_until(SOON, "an answer", || {
        pod.ping(&ping).unwrap().is_perfect(1).then_some(())
    });
}

#[test]
fn an_interface_that_changes_under_a_node_is_followed() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let [kernel, ours, other] = Bed::addresses();
    traffic::ping(&mut bed.pods[1], kernel);
    traffic::ping(&mut bed.pods[2], ours);
    let host = bed.nodes[0].host().clone();
    // Another MAC address while it is up, down and up again, and another interface of that name.
    host.sh("ip link set eth0 address 02:1a:00:00:00:66");
    reaches(&mut bed.pods[1], other);
    assert_eq!(
        next_hop(&bed.nodes[1], NODE_IP).unwrap().0,
        "02:1a:00:00:00:66"
    );
    host.sh("ip link set eth0 down; ip link set eth0 up");
    reaches(&mut bed.pods[1], other);
    host.sh("ip link del eth0");
    bed.lab.replug(&host, "eth0", NODE_IP);
    reaches(&mut bed.pods[1], other);
    reaches(&mut bed.pods[1], kernel);
    traffic::ping(&mut bed.pods[2], ours);
    let log = bed.nodes[0].log();
    assert!(log.contains("the uplink's interface is down"), "{log}");
    assert_eq!(
        log.matches("the uplink on eth0 is reopened").count(),
        2,
        "{log}"
    );
}

#[test]
fn hosts_that_lie_change_nothing() {
    let Some(mut bed) = Bed::new(&[]) else { return };
    let [kernel, ours, _] = Bed::addresses();
    traffic::ping(&mut bed.pods[1], kernel);
    let rogue = bed.lab.host("rogue", Ipv4Addr::new(10, 9, 0, 66));
    let mut liar = rogue.agent();
    let node_mac = mac(&mac_of(bed.nodes[0].host(), "eth0"));
    let rogue_mac = mac(&mac_of(&rogue, "eth0"));
    let arp = |from: [u8; 6], ip: Ipv4Addr| {
        let mut frame = [
            &[0xff; 6][..],
            &from,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &from,
        ]
        .concat();
        frame.extend(ip.octets());
        frame.extend([0; 6]);
        frame.extend(ip.octets());
        frame
    };
    // It is the kernel's host; it is everybody; it is the node itself.
    let mut lies = vec![arp(rogue_mac, KERNEL_IP); 50];
    lies.extend((10..=255).flat_map(|host| {
        (0..4).map(move |net| arp([2, 9, 9, 9, net, host], Ipv4Addr::new(10, 9, net, host)))
    }));
    lies.push(arp(node_mac, KERNEL_IP));
    // A pod of the kernel's that is not there, from the wrong host and from our own address.
    let packet = echo_request(kernel, ours);
    for from in [rogue_mac, node_mac] {
        lies.push([&node_mac[..], &from, &[8, 0], &packet].concat());
    }
    for lie in lies.chunks(64) {
        liar.inject("eth0", lie).unwrap();
        // Traffic goes on meanwhile.
        traffic::ping(&mut bed.pods[1], kernel);
    }
    poll_until(SOON, "the lies to be counted", || {
        let drops = bed.nodes[0].drops();
        let counted = drops.get("next-hop-conflict") > Some(&0);
        (counted && drops.get("source-mac-own") > Some(&0)).then_some(())
    });
    let known = bed.nodes[0].query("neighbours");
    let hosts = known.as_array().unwrap().iter();
    let hosts = hosts.filter(|row| row["uplink"] == true).count();
    assert!(hosts <= 2, "{known}");
    let (known, _) = next_hop(&bed.nodes[0], KERNEL_IP).unwrap();
    assert_eq!(known, mac_of(&bed.kernel.host, "eth0"));
    bed.check(500_000);
}

fn mac(text: &str) -> [u8; 6] {
    let bytes: Vec<_> = text.split(':').collect();
    std::array::from_fn(|at| u8::from_str_radix(bytes[at], 16).unwrap())
}

fn echo_request(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut bytes = Vec::new();
    etherparse::PacketBuilder::ipv4(from.octets(), to.octets(), 64)
        .icmpv4_echo_request(1, 1)
        .write(&mut bytes, b"forged")
        .unwrap();
    bytes
}

/// Two links with a router between them: nodes 1 and 2 on the near one, 3 on the far one.
struct Links {
    nodes: [Node; 3],
    pods: [Agent; 3],
    hosts: [Host; 3],
    _router: Host,
    _lab: Lab,
}

const FAR_IP: Ipv4Addr = Ipv4Addr::new(10, 8, 0, 3);

impl Links {
    fn new(backend: &str) -> Option<Self> {
        let lab = Lab::new()?;
        let router = lab.host("router", Ipv4Addr::new(10, 9, 0, 254));
        let far = lab.namespace("n3");
        lab.cable((&router, "far"), (&far, "eth0"));
        router.sh("ip addr add 10.8.0.254/24 dev far; echo 1 >/proc/sys/net/ipv4/ip_forward");
        far.sh(&format!(
            "ip addr add {FAR_IP}/24 dev eth0; ip route add default via 10.8.0.254
             echo 0 >/proc/sys/net/ipv4/ip_forward"
        ));
        let near = [("n1", KERNEL_IP), ("n2", NODE_IP)].map(|(name, address)| {
            let host = node_host(&lab, name, address);
            host.sh("ip route add default via 10.9.0.254");
            host
        });
        let [one, two] = near;
        let hosts = [one, two, far];
        let ips = [KERNEL_IP, NODE_IP, FAR_IP];
        let subnets = [1, 2, 3].map(|node| format!("10.244.{node}.0/24"));
        let list: Vec<_> = ips
            .into_iter()
            .zip(subnets.each_ref().map(|it| it.as_str()))
            .collect();
        let store = store(&lab, backend, &list);
        let mut numbers = 1..;
        let nodes = hosts.each_ref().map(|host| {
            let name = format!("n{}", numbers.next().unwrap());
            NodeConfig::on_interface(&name, "eth0", &store).start(host)
        });
        let pods = nodes.each_ref().map(|node| {
            let address = node.address(2).to_string();
            node.pod_after("pod", &["--ip", &address], "")
        });
        Some(Self {
            nodes,
            pods,
            hosts,
            _router: router,
            _lab: lab,
        })
    }

    /// How one node gets to each other, with what stands in the way and the MTU.
    fn paths(&self, from: usize) -> Vec<(String, String, Option<u64>)> {
        let rows = self.nodes[from].query("peers");
        let rows = rows.as_array().unwrap().iter();
        let rows = rows.map(|row| {
            let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
            let obstacle = match row["usable"].as_bool().unwrap() {
                true => "none".to_owned(),
                false => text("state"),
            };
            (text("path"), obstacle, row["mtu"].as_u64())
        });
        rows.collect()
    }

    /// Whether a ping from one pod to another crosses its host's interface bare, and the frames.
    fn is_bare(&mut self, from: usize, to: usize) -> (bool, Vec<Vec<u8>>) {
        let address = self.nodes[to].address(2);
        let mut watcher = self.hosts[to].agent();
        watcher.capture("eth0").unwrap();
        traffic::ping(&mut self.pods[from], address);
        let frames = watcher.captured().unwrap();
        let bare = |frame: &Vec<u8>| frame.get(30..34) == Some(&address.octets()[..]);
        (frames.iter().any(bare), frames)
    }
}

#[test]
fn direct_routing_is_bare_on_the_link_and_encapsulated_beyond() {
    for (backend, tunnel, mtu) in [
        ("backend = \"vxlan\"\ndirect-routing = true", "vxlan", 1450),
        ("backend = \"ipip\"\ndirect-routing = true", "ipip", 1480),
    ] {
        let Some(mut links) = Links::new(backend) else {
            return;
        };
        let on_link = ("on-link".to_owned(), "none".to_owned(), Some(1500));
        let beyond = (tunnel.to_owned(), "none".to_owned(), Some(mtu));
        assert_eq!(links.paths(0), [on_link.clone(), beyond.clone()]);
        assert_eq!(links.paths(2), [beyond.clone(), beyond]);
        let (bare, frames) = links.is_bare(0, 1);
        assert!(bare, "{frames:x?}");
        let (bare, frames) = links.is_bare(0, 2);
        assert!(!bare, "{frames:x?}");
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            let address = links.nodes[to].address(2);
            let port = links.pods[to].listen(0).unwrap();
            traffic::transfer(&mut links.pods[from], address, port, 5_000_000);
            traffic::fits(&mut links.pods[from], address, mtu as u16);
        }
        for node in &links.nodes {
            assert_eq!(node.losses(), Default::default());
        }
    }
}

#[test]
fn an_uplink_is_opened_anew_beside_its_tunnel() {
    let Some(mut links) = Links::new("backend = \"vxlan\"\ndirect-routing = true") else {
        return;
    };
    let addresses = [0, 1, 2].map(|node: usize| links.nodes[node].address(2));
    traffic::ping(&mut links.pods[0], addresses[1]);
    links.hosts[1].sh("ip link set eth0 address 02:1a:00:00:00:55");
    let what = format!("the new uplink{}", links.nodes[1].log());
    poll_until(SOON, &what, || {
        let log = links.nodes[1].log();
        log.contains("the uplink on eth0 is reopened").then_some(())
    });
    // Others learn of it from what it sends.
    reaches(&mut links.pods[1], addresses[0]);
    let (mac, _) = next_hop(&links.nodes[0], NODE_IP).unwrap();
    assert_eq!(mac, "02:1a:00:00:00:55");
    traffic::ping(&mut links.pods[1], addresses[2]);
    traffic::ping(&mut links.pods[2], addresses[1]);
}

#[test]
fn a_host_beyond_a_router_is_told_to_be_no_next_hop() {
    let Some(mut links) = Links::new("backend = \"host-gw\"") else {
        return;
    };
    let on_link = ("on-link".to_owned(), "none".to_owned(), Some(1500));
    let state = format!("not on the link {LINK}");
    assert_eq!(links.paths(0), [on_link, ("none".to_owned(), state, None)]);
    let far = links.nodes[2].address(2);
    let pinged = links.pods[0].ping(&Ping::new(far)).unwrap();
    assert!(pinged.replies.is_empty());
    assert_eq!(
        (pinged.errors[0].kind, pinged.errors[0].code),
        (3, 1),
        "{pinged:?}"
    );
    let drops = links.nodes[0].drops();
    assert_eq!(drops.get("next-hop-unreachable"), Some(&3), "{drops:?}");
}

#[test]
fn ipip_carries_what_pods_send() {
    let Some(mut links) = Links::new("backend = \"ipip\"") else {
        return;
    };
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        let address = links.nodes[to].address(2);
        let (bare, frames) = links.is_bare(from, to);
        assert!(!bare);
        let ipip = frames
            .iter()
            .filter(|frame| frame.get(23) == Some(&4))
            .count();
        assert!(ipip >= 3, "{frames:x?}");
        let port = links.pods[to].listen(0).unwrap();
        traffic::transfer(&mut links.pods[from], address, port, 5_000_000);
        traffic::fits(&mut links.pods[from], address, 1480);
    }
    for node in &links.nodes {
        assert_eq!(node.losses(), Default::default());
    }
}

#[test]
fn a_kernels_ipip_device_and_a_node_carry_each_others_packets() {
    let Some(lab) = Lab::new() else { return };
    let mtu = MTU - 20;
    let kernel = Flannel::new(&lab, mtu);
    // As flannel makes it.
    let made = kernel.host.output(&[
        "ip",
        "link",
        "add",
        "flannel.ipip",
        "type",
        "ipip",
        "local",
        "10.9.0.1",
        "remote",
        "any",
        "dev",
        "eth0",
    ]);
    if !made.status.success() {
        let why = String::from_utf8_lossy(&made.stderr);
        return skip_on_this_kernel(format_args!(
            "this kernel has no ipip devices: {}",
            why.trim()
        ));
    }
    kernel.host.sh(&format!(
        "ip addr add {}/32 dev flannel.ipip; ip link set flannel.ipip mtu {mtu} up
         ip route add {} via {NODE_IP} dev flannel.ipip onlink",
        flannel::kernel(0),
        flannel::NODE_SUBNET
    ));
    let nodes = [
        (KERNEL_IP, flannel::KERNEL_SUBNET),
        (NODE_IP, flannel::NODE_SUBNET),
    ];
    let store = store(&lab, "backend = \"ipip\"", &nodes);
    let host = node_host(&lab, "n2", NODE_IP);
    let node = NodeConfig::on_interface("n2", "eth0", &store).start(&host);
    let mut ours = node.pod_after("pod", &["--ip", "10.244.2.2"], "");
    let mut theirs = kernel.pod.agent();
    let port = theirs.listen(0).unwrap();
    traffic::transfer(&mut ours, flannel::kernel(2), port, 10_000_000);
    traffic::fits(&mut ours, flannel::kernel(2), mtu);
    let port = ours.listen(0).unwrap();
    traffic::transfer(&mut theirs, flannel::node(2), port, 10_000_000);
    traffic::fits(&mut theirs, flannel::node(2), mtu);
    assert_eq!(node.losses(), Default::default());
}

#[test]
fn a_bridged_tap_has_an_address_of_its_own() {
    let Some(lab) = Lab::new() else { return };
    let kernel = Flannel::new(&lab, MTU);
    let own = Ipv4Addr::new(10, 9, 0, 50);
    kernel.host.sh(&format!(
        "ip route add {} via {own} dev eth0",
        flannel::NODE_SUBNET
    ));
    let store = store(
        &lab,
        "backend = \"host-gw\"",
        &[
            (KERNEL_IP, flannel::KERNEL_SUBNET),
            (own, flannel::NODE_SUBNET),
        ],
    );
    // The host's own address is on the bridge.
    let host = node_host(&lab, "n2", NODE_IP);
    host.sh(&format!(
        "ip link add lan type bridge; ip link set eth0 master lan; ip addr flush dev eth0
         ip addr add {NODE_IP}/24 dev lan; ip link set lan up
         ip tuntap add mode tap name muslin0 vnet_hdr; ip link set muslin0 master lan up"
    ));
    let node = NodeConfig::on_interface("n2", "lan", &store)
        .with("--public-ip", own)
        .with("--uplink", "tap:muslin0")
        .start(&host);
    assert_eq!(node.status("uplink"), "tap:muslin0");
    let mut ours = node.pod_after("pod", &["--ip", "10.244.2.2"], "");
    let mut theirs = kernel.pod.agent();
    traffic::ping(&mut ours, flannel::kernel(2));
    let port = theirs.listen(0).unwrap();
    traffic::transfer(&mut ours, flannel::kernel(2), port, 20_000_000);
    let port = ours.listen(0).unwrap();
    traffic::transfer(&mut theirs, flannel::node(2), port, 20_000_000);
    let mut losses = node.losses();
    // A bridge also gives what it does not know where to send.
    losses.remove("destination-mac-foreign");
    assert_eq!(losses, Default::default());
}

#[test]
fn what_stands_in_the_way_is_told() {
    let Some(lab) = Lab::new() else { return };
    let host = node_host(&lab, "n2", NODE_IP);
    let store = store(
        &lab,
        "backend = \"host-gw\"",
        &[(NODE_IP, flannel::NODE_SUBNET)],
    );
    let state = lab.directory().join("state");
    let state = state.to_str().unwrap();
    let refused = |prefix: &[&str], flags: &[&str]| {
        let node = [
            muslin_lab::muslin_bin(),
            "node",
            "--state-dir",
            state,
            "--store",
            &store,
        ];
        let words: Vec<&str> = prefix.iter().chain(&node).chain(flags).copied().collect();
        let output = host.output(&words);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), text)
    };
    let no_raw = ["setpriv", "--bounding-set", "-net_raw", "--"];
    let (code, text) = refused(&no_raw, &["--iface", "eth0"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("CAP_NET_RAW"), "{text}");
    // Whoever keeps the list may mend it.
    let translated = NodeConfig::on_interface("n2", "eth0", &store).with("--public-ip", "10.9.0.9");
    translated.spawn(&host).wait_told(&["10.9.0.9"]);
    host.sh("ip link set eth0 down");
    let (code, text) = refused(&[], &["--iface", "eth0"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("eth0") && text.contains("down"), "{text}");
    host.sh("ip link set eth0 up; ip addr flush dev eth0");
    let mut waiting = NodeConfig::on_interface("n2", "eth0", &store).spawn(&host);
    waiting.wait_told(&["eth0", "address"]);
}

#[test]
fn direct_routing_without_the_means_is_a_tunnel_and_a_warning() {
    let Some(lab) = Lab::new() else { return };
    let host = node_host(&lab, "n2", NODE_IP);
    let store = store(
        &lab,
        "backend = \"vxlan\"\ndirect-routing = true",
        &[
            (KERNEL_IP, flannel::KERNEL_SUBNET),
            (NODE_IP, flannel::NODE_SUBNET),
        ],
    );
    host.sh("echo 1 >/proc/sys/net/ipv4/conf/eth0/forwarding");
    let node = NodeConfig::on_interface("n2", "eth0", &store).start(&host);
    assert!(
        node.log().contains("net.ipv4.conf.eth0.forwarding=0"),
        "{}",
        node.log()
    );
    drop(node);
    let state = lab.directory().join("state");
    let mut command = host.command("setpriv");
    command.args([
        "--bounding-set",
        "-net_raw",
        "--",
        muslin_lab::muslin_bin(),
        "node",
        "--iface",
        "eth0",
    ]);
    command.args(["--store", &store, "--state-dir"]).arg(&state);
    let log = lab.directory().join("log");
    let file = std::fs::File::create(&log).unwrap();
    let mut child = command.stderr(file).spawn().unwrap();
    poll_until(SOON, "a node that is ready", || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.contains("is ready").then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(log.contains("DirectRouting, but"), "{log}");
}
