//! Malformed and forged packets, from a pod and from the underlay: nothing crashes, nobody gets
//! them, and each is counted for the right reason.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use etherparse::{EtherType, IpHeaders, PacketBuilder, PacketBuilderStep};
use muslin::agent::Agent;
use muslin_lab::{Host, Lab, Node, NodeConfig, SOON, poll_until, traffic};

type Mac = [u8; 6];

/// What every injected packet carries, if it is long enough.
const MARK: &[u8] = b"by the test of bad input";
/// What the packets carry that must arrive.
const CONTROL: &[u8] = b"by the same, but good";

const NODE_IP: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const PEER_IP: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Holds a lease, too.
const THIRD_IP: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 3);
/// Holds no lease.
const STRANGER_IP: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 99);

const NODE_MAC: Mac = [0x0a, 1, 1, 1, 1, 1];
const PEER_MAC: Mac = [0x0a, 2, 2, 2, 2, 2];
const THIRD_MAC: Mac = [0x0a, 3, 3, 3, 3, 3];
const FOREIGN_MAC: Mac = [0x0a, 9, 9, 9, 9, 9];

/// Pods of the node, and one of each peer.
const ATTACKER: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const VICTIM: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 3);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 77);
const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 2);
const THIRD: Ipv4Addr = Ipv4Addr::new(10, 244, 3, 2);

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn bytes(mac: &str) -> Mac {
    let parse = |part| u8::from_str_radix(part, 16).unwrap();
    mac.split(':')
        .map(parse)
        .collect::<Vec<_>>()
        .try_into()
        .unwrap()
}

fn ethernet(source: Mac, destination: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [destination, source].concat();
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A good UDP packet.
fn ipv4(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    ipv4_with(source, destination, 64, MARK)
}

fn ipv4_with(source: Ipv4Addr, destination: Ipv4Addr, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(source.octets(), destination.octets(), ttl)
        .udp(4000, 4000)
        .write(&mut packet, payload)
        .unwrap();
    packet
}

/// Changes one byte of a header and makes its checksum right again.
fn with(mut packet: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    packet[at] = value;
    packet[10..12].fill(0);
    let header_len = usize::from(packet[0] & 0xf).max(5) * 4;
    let words = packet[..header_len.min(packet.len())].chunks(2);
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[10..12].copy_from_slice(&(!sum as u16).to_be_bytes());
    packet
}

fn arp(operation: u8, sender: (Mac, Ipv4Addr), target: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
    packet.extend(sender.0);
    packet.extend(sender.1.octets());
    packet.extend([0; 6]);
    packet.extend(target.octets());
    packet
}

/// An IPv6 router advertisement.
fn router_advertisement() -> Vec<u8> {
    let source = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
    let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let mut packet = Vec::new();
    PacketBuilder::ipv6(source, all_nodes, 255)
        .icmpv6_raw(134, 0, [64, 0, 7, 8])
        .write(&mut packet, &[0; 8])
        .unwrap();
    packet
}

/// A DHCP server's answer, of one family or the other, to the port of clients.
fn dhcp_answer(builder: PacketBuilderStep<IpHeaders>, port: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = builder.udp(port - 1, port);
    builder.write(&mut packet, MARK).unwrap();
    packet
}

/// The link-local address that is made of a MAC address.
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> [u8; 16] {
    [
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ]
}

/// A neighbour advertisement for `target`.
fn advertisement(source: [u8; 16], target: [u8; 16]) -> Vec<u8> {
    let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let mut packet = Vec::new();
    PacketBuilder::ipv6(source, all_nodes, 255)
        .icmpv6_raw(136, 0, [0x20, 0, 0, 0])
        .write(&mut packet, &target)
        .unwrap();
    packet
}

/// A router advertisement behind a destination options header.
fn hidden_router_advertisement() -> Vec<u8> {
    let mut packet = router_advertisement();
    let options = [58, 0, 1, 4, 0, 0, 0, 0];
    packet.splice(40..40, options);
    packet[5] += options.len() as u8;
    packet[6] = 60;
    packet
}

/// A good IPv6 packet, on the link only.
fn ipv6() -> Vec<u8> {
    let address = |last| [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    let mut packet = Vec::new();
    PacketBuilder::ipv6(address(1), address(2), 64)
        .udp(4000, 4000)
        .write(&mut packet, MARK)
        .unwrap();
    packet
}

/// Martians: no host has such an address.
const MARTIANS: [Ipv4Addr; 5] = [
    Ipv4Addr::new(0, 0, 0, 0),
    Ipv4Addr::new(127, 0, 0, 1),
    Ipv4Addr::new(224, 0, 0, 1),
    Ipv4Addr::new(240, 0, 0, 1),
    Ipv4Addr::BROADCAST,
];

/// Bad IPv4 packets whoever they come from, and what for: all but too short ones.
fn malformed(source: Ipv4Addr) -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let good = || ipv4(source, VICTIM);
    let len = good().len() as u8;
    vec![
        (
            "ipv4-version",
            [0x05, 0x15, 0x55, 0x65, 0xf5]
                .map(|first| with(good(), 0, first))
                .into(),
        ),
        (
            "ipv4-header-len",
            (0..5)
                .map(|words| with(good(), 0, 0x40 | words))
                // The header is longer than all that is there.
                .chain([with(good()[..40].to_vec(), 0, 0x4f)])
                .collect(),
        ),
        (
            "ipv4-total-len",
            [0, 1, 19, len + 1, 0xff]
                .map(|total| with(good(), 3, total))
                .into(),
        ),
        (
            "ipv4-total-len",
            [0xff, 1].map(|high| with(good(), 2, high)).into(),
        ),
        ("ipv4-checksum", {
            let wrong = |at: usize| {
                let mut packet = good();
                packet[at] ^= 1;
                packet
            };
            [1, 4, 6, 8, 9, 10, 11, 19].map(wrong).into()
        }),
    ]
}

/// The node, its pods, and a place in the underlay from where datagrams can be forged.
struct Bed {
    attacker: Agent,
    victim: Agent,
    injector: Agent,
    node: Node,
    attacker_mac: Mac,
    gateway_mac: Mac,
    /// Of the node's and the injector's interfaces on the underlay.
    underlay_macs: (Mac, Mac),
    tunnel_port: u16,
    _hosts: [Host; 2],
    _lab: Lab,
}

impl Bed {
    fn new(backend: &str) -> Option<Self> {
        let lab = Lab::new()?;
        let mut store = format!("network = \"10.244.0.0/16\"\nbackend = \"{backend}\"\n");
        let leases = [
            (NODE_IP, 1, NODE_MAC),
            (PEER_IP, 2, PEER_MAC),
            (THIRD_IP, 3, THIRD_MAC),
        ];
        for (public_ip, number, mac) in leases {
            store += &format!(
                "[[node]]\npublic-ip = \"{public_ip}\"\nsubnet = \"10.244.{number}.0/24\"\n"
            );
            if backend == "vxlan" {
                store += &format!("vtep-mac = \"{}\"\n", text(mac));
            }
        }
        let path = lab.directory().join("peers.toml");
        std::fs::write(&path, store).unwrap();
        let host = lab.host("node", NODE_IP);
        let peer = lab.host("peer", PEER_IP);
        let store = format!("file:{}", path.display());
        let node = NodeConfig::new("n", NODE_IP, &store)
            .with("--egress", "off")
            .start(&host);
        node.wait_peers(2);
        let mut injector = peer.agent();
        let mut attacker = node.pod_after("attacker", &["--ip", &ATTACKER.to_string()], "");
        let mut victim = node.pod_after("victim", &["--ip", &VICTIM.to_string()], "");
        let underlay_macs = (mac(&mut host.agent(), "eth0"), mac(&mut injector, "eth0"));
        let attacker_mac = mac(&mut attacker, "eth0");

        // Who the gateway is, it says itself.
        attacker.capture("eth0").unwrap();
        let ask = arp(1, (attacker_mac, ATTACKER), GATEWAY);
        let ask = ethernet(attacker_mac, [0xff; 6], 0x0806, &ask);
        attacker.inject("eth0", &[ask]).unwrap();
        traffic::ping(&mut attacker, GATEWAY);
        let answers = attacker.captured().unwrap();
        let answer = answers
            .iter()
            .find(|frame| frame[12..14] == [8, 6])
            .unwrap();
        let gateway_mac = answer[6..12].try_into().unwrap();
        victim.capture("eth0").unwrap();
        Some(Self {
            attacker,
            victim,
            injector,
            attacker_mac,
            gateway_mac,
            underlay_macs,
            tunnel_port: if backend == "vxlan" { 8472 } else { 8285 },
            node,
            _hosts: [host, peer],
            _lab: lab,
        })
    }

    /// A datagram to the node's tunnel, as a frame on the underlay.
    fn datagram(&self, source: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
        self.datagram_from(self.tunnel_port, source, payload)
    }

    fn datagram_from(&self, port: u16, source: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
        let (node, injector) = self.underlay_macs;
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(injector, node)
            .ipv4(source.octets(), NODE_IP.octets(), 64)
            .udp(port, self.tunnel_port)
            .write(&mut frame, payload)
            .unwrap();
        frame
    }

    /// Injects packets and waits until all of them are counted, for that reason and no other.
    fn refuses(&mut self, from: From, what: &str, reason: &str, frames: &[Vec<u8>]) {
        let mut expected = self.node.drops();
        *expected.entry(reason.to_owned()).or_default() += frames.len() as u64;
        let injector = match from {
            From::Pod => &mut self.attacker,
            From::Underlay => &mut self.injector,
        };
        injector.inject("eth0", frames).unwrap();
        let sum = |drops: &BTreeMap<String, u64>| drops.values().sum::<u64>();
        let mut last = BTreeMap::new();
        let what = format!(
            "{what}: {reason} of {} frames{}",
            frames.len(),
            self.node.log()
        );
        let drops = poll_until(SOON, &what, || {
            let drops = self.node.drops();
            if drops != last {
                eprintln!("{reason}: {drops:?}");
                last = drops.clone();
            }
            (sum(&drops) >= sum(&expected)).then_some(drops)
        });
        assert_eq!(drops, expected, "{what}");
    }

    /// The victim must have seen nothing but what it should, and the node must still work.
    fn finish(mut self, controls: usize) {
        traffic::ping(&mut self.attacker, VICTIM);
        traffic::ping(&mut self.attacker, GATEWAY);
        traffic::ping(&mut self.victim, GATEWAY);
        let frames = self.victim.captured().unwrap();
        let contains =
            |frame: &[u8], mark: &[u8]| frame.windows(mark.len()).any(|window| window == mark);
        let count = |mark| frames.iter().filter(|frame| contains(frame, mark)).count();
        assert_eq!(count(CONTROL), controls);
        assert_eq!(count(MARK), 0);
        for frame in &frames {
            let source: Mac = frame[6..12].try_into().unwrap();
            let known = [self.gateway_mac, self.attacker_mac].contains(&source);
            assert!(known, "from {source:02x?}: {frame:02x?}");
            match EtherType(u16::from_be_bytes([frame[12], frame[13]])) {
                // The pings, and the packets that must arrive.
                EtherType::IPV4 => {
                    assert!(frame[23] == 1 || contains(frame, CONTROL), "{frame:02x?}")
                }
                EtherType::ARP => {
                    let sender = &frame[28..32];
                    let hosts = [ATTACKER, GATEWAY].map(|host| host.octets());
                    assert!(hosts.iter().any(|host| host == sender), "{frame:02x?}");
                }
                // Whatever kernels do of their own accord: but no router lives here.
                EtherType::IPV6 => {
                    assert!(frame[54] != 134 && frame[20] != 60, "{frame:02x?}");
                }
                other => panic!("{other:?}: {frame:02x?}"),
            }
        }
        // When the node ends, its books say what became of every packet.
        assert!(self.node.is_running());
    }
}

#[derive(Clone, Copy)]
enum From {
    Pod,
    Underlay,
}

fn mac(agent: &mut Agent, interface: &str) -> Mac {
    let interfaces = agent.interfaces().unwrap();
    let row = interfaces.iter().find(|row| row.name == interface).unwrap();
    bytes(row.mac.as_ref().unwrap())
}

#[test]
fn a_pod_cannot_send_what_it_must_not() {
    let Some(mut bed) = Bed::new("vxlan") else {
        return;
    };
    let (own, gateway) = (bed.attacker_mac, bed.gateway_mac);
    let victim = mac(&mut bed.victim, "eth0");
    let routed = |packet: &[u8]| ethernet(own, gateway, 0x0800, packet);
    let from_mac = |source| ethernet(source, victim, 0x0800, &ipv4(ATTACKER, VICTIM));
    let from_ip = |source| ethernet(own, victim, 0x0800, &ipv4(source, VICTIM));
    let mut control = || {
        let packet = ipv4_with(ATTACKER, VICTIM, 64, CONTROL);
        let frames = [ethernet(own, victim, 0x0800, &packet), routed(&packet)];
        bed.attacker.inject("eth0", &frames).unwrap();
    };
    control();

    let mut cases = vec![
        (
            "nothing to a whole header",
            "ipv4-too-short",
            (0..20)
                .map(|len| routed(&ipv4(ATTACKER, VICTIM)[..len]))
                .collect(),
        ),
        (
            "a group as the source",
            "source-mac-group",
            vec![
                from_mac([0xff; 6]),
                from_mac([1, 0, 0x5e, 0, 0, 1]),
                from_mac([3; 6]),
            ],
        ),
        (
            "the node as the source",
            "source-mac-own",
            vec![from_mac(gateway), from_mac(NODE_MAC)],
        ),
        (
            "somebody else as the source",
            "source-mac-spoofed",
            vec![
                from_mac(victim),
                from_mac(FOREIGN_MAC),
                from_mac([0; 6]),
                ethernet(
                    own,
                    [0xff; 6],
                    0x0806,
                    &arp(2, (FOREIGN_MAC, ATTACKER), VICTIM),
                ),
            ],
        ),
        (
            "somebody else's address",
            "source-address-spoofed",
            [
                VICTIM,
                GATEWAY,
                NOBODY,
                REMOTE,
                NODE_IP,
                Ipv4Addr::new(8, 8, 8, 8),
            ]
            .into_iter()
            .map(from_ip)
            .chain(
                [GATEWAY, VICTIM, NOBODY]
                    .map(|sender| ethernet(own, [0xff; 6], 0x0806, &arp(2, (own, sender), VICTIM))),
            )
            .collect(),
        ),
        (
            "nobody's address",
            "source-address-invalid",
            MARTIANS.map(from_ip).into(),
        ),
        (
            "a router advertisement",
            "router-advertisement",
            [[0x33, 0x33, 0, 0, 0, 1], victim, gateway]
                .into_iter()
                .flat_map(|to| {
                    [router_advertisement(), hidden_router_advertisement()]
                        .map(|packet| ethernet(own, to, 0x86dd, &packet))
                })
                .collect(),
        ),
        (
            "a DHCP server",
            "dhcp-server",
            [[0xff; 6], victim]
                .into_iter()
                .flat_map(|to| {
                    let ipv4 = |to| dhcp_answer(PacketBuilder::ipv4(ATTACKER.octets(), to, 64), 68);
                    let ipv6 = PacketBuilder::ipv6(link_local(own), link_local(victim), 64);
                    [
                        ethernet(own, to, 0x0800, &ipv4([255; 4])),
                        ethernet(own, to, 0x0800, &ipv4(VICTIM.octets())),
                        ethernet(own, to, 0x86dd, &dhcp_answer(ipv6, 546)),
                    ]
                })
                .collect(),
        ),
        (
            "another pod's link-local address",
            "link-local-taken",
            [link_local(own), link_local(victim)]
                .map(|source| advertisement(source, link_local(victim)))
                .map(|packet| ethernet(own, [0x33, 0x33, 0, 0, 0, 1], 0x86dd, &packet))
                .into(),
        ),
        (
            "back to where it came from",
            "hairpin",
            vec![ethernet(own, own, 0x0800, &ipv4(ATTACKER, ATTACKER))],
        ),
        (
            "what is not routed",
            "ether-type-unsupported",
            [0x8100, 0x88cc, 0x0000, 0x05dc, 0xffff]
                .map(|ethertype| ethernet(own, gateway, ethertype, &[0; 46]))
                .into_iter()
                .chain([ethernet(own, gateway, 0x86dd, &ipv6())])
                .collect(),
        ),
        (
            "to no single host",
            "destination-not-unicast",
            MARTIANS
                .into_iter()
                .chain([Ipv4Addr::new(10, 244, 1, 255)])
                .map(|to| routed(&ipv4(ATTACKER, to)))
                .collect(),
        ),
        (
            "at the end of its time",
            "ttl-exceeded",
            [0, 1]
                .map(|ttl| routed(&ipv4_with(ATTACKER, VICTIM, ttl, MARK)))
                .into(),
        ),
        (
            "to nowhere",
            "no-route",
            [routed(&ipv4(ATTACKER, [10, 244, 9, 9].into()))].into(),
        ),
        (
            "to the outside, which is closed",
            "egress-closed",
            [[8, 8, 8, 8], [10, 245, 0, 1], [10, 9, 0, 2]]
                .map(|to| routed(&ipv4(ATTACKER, to.into())))
                .into(),
        ),
        (
            "to nobody",
            "host-unreachable",
            vec![routed(&ipv4(ATTACKER, NOBODY))],
        ),
    ];
    for (reason, packets) in malformed(ATTACKER) {
        let frames = packets.iter().map(|packet| routed(packet)).collect();
        cases.push(("a malformed packet", reason, frames));
    }
    for (what, reason, frames) in &cases {
        bed.refuses(From::Pod, what, reason, frames);
    }
    bed.finish(2);
}

#[test]
fn a_vxlan_datagram_that_is_wrong_goes_nowhere() {
    let Some(mut bed) = Bed::new("vxlan") else {
        return;
    };
    let vxlan = |flags: u8, vni: u8, frame: &[u8]| {
        let mut payload = vec![flags, 0, 0, 0, 0, 0, vni, 0];
        payload.extend(frame);
        payload
    };
    let inner = |packet: &[u8]| ethernet(PEER_MAC, NODE_MAC, 0x0800, packet);
    let good = vxlan(8, 1, &inner(&ipv4(REMOTE, VICTIM)));
    let from_peer = |payload: &[u8]| bed.datagram(PEER_IP, payload);
    let framed = |frame: &[u8]| from_peer(&vxlan(8, 1, frame));
    let routed = |packet: &[u8]| framed(&inner(packet));
    let long = inner(&ipv4_with(REMOTE, VICTIM, 64, &[7; 100]));

    let control = routed(&ipv4_with(REMOTE, VICTIM, 64, CONTROL));
    let mut cases: Vec<(&str, &str, Vec<Vec<u8>>)> = vec![
        (
            "less than a VXLAN header",
            "vxlan-too-short",
            (0..8).map(|len| from_peer(&good[..len])).collect(),
        ),
        (
            "no I flag",
            "vxlan-no-vni",
            [0, 0x80, 0xf7]
                .map(|flags| from_peer(&vxlan(flags, 1, &good[8..])))
                .into(),
        ),
        (
            "another network",
            "unknown-vni",
            [0, 2, 255]
                .map(|vni| from_peer(&vxlan(8, vni, &good[8..])))
                .into(),
        ),
        (
            "less than an Ethernet header",
            "frame-too-short",
            (0..14).map(|len| framed(&long[..len])).collect(),
        ),
        (
            "less than an IPv4 header",
            "ipv4-too-short",
            (14..34).map(|len| framed(&long[..len])).collect(),
        ),
        (
            "less than the packet",
            "ipv4-total-len",
            (34..=60).map(|len| framed(&long[..len])).collect(),
        ),
        (
            "from somebody without a lease",
            "unknown-peer",
            vec![
                bed.datagram(STRANGER_IP, &good),
                bed.datagram(STRANGER_IP, &[]),
            ],
        ),
        (
            "an inner source of somebody else",
            "source-not-in-lease",
            [THIRD, ATTACKER, GATEWAY, NODE_IP, Ipv4Addr::new(8, 8, 8, 8)]
                .map(|source| routed(&ipv4(source, VICTIM)))
                .into(),
        ),
        (
            "an inner source of nobody",
            "source-address-invalid",
            MARTIANS.map(|source| routed(&ipv4(source, VICTIM))).into(),
        ),
        (
            "one peer for another",
            "source-not-in-lease",
            vec![bed.datagram(THIRD_IP, &good)],
        ),
        (
            "through us to another",
            "tunnel-to-tunnel",
            [THIRD, REMOTE, Ipv4Addr::new(8, 8, 8, 8)]
                .map(|to| routed(&ipv4(REMOTE, to)))
                .into(),
        ),
        (
            "another VTEP",
            "destination-mac-foreign",
            [
                THIRD_MAC,
                bed.gateway_mac,
                bed.attacker_mac,
                [0xff; 6],
                [0; 6],
            ]
            .map(|to| framed(&ethernet(PEER_MAC, to, 0x0800, &ipv4(REMOTE, VICTIM))))
            .into_iter()
            .chain([framed(&ethernet(
                PEER_MAC,
                [0xff; 6],
                0x0806,
                &arp(1, (PEER_MAC, REMOTE), VICTIM),
            ))])
            .collect(),
        ),
        (
            "our own VTEP as the source",
            "source-mac-own",
            vec![framed(&ethernet(
                NODE_MAC,
                NODE_MAC,
                0x0800,
                &ipv4(REMOTE, VICTIM),
            ))],
        ),
        (
            "a group as the source",
            "source-mac-group",
            vec![framed(&ethernet(
                [0xff; 6],
                NODE_MAC,
                0x0800,
                &ipv4(REMOTE, VICTIM),
            ))],
        ),
        (
            "what is not routed",
            "ether-type-unsupported",
            [0x86dd, 0x8100, 0x88cc]
                .map(|ethertype| {
                    framed(&ethernet(
                        PEER_MAC,
                        NODE_MAC,
                        ethertype,
                        &router_advertisement(),
                    ))
                })
                .into(),
        ),
        (
            "to no single host",
            "destination-not-unicast",
            MARTIANS
                .into_iter()
                .chain([Ipv4Addr::new(10, 244, 1, 255)])
                .map(|to| routed(&ipv4(REMOTE, to)))
                .collect(),
        ),
        (
            "at the end of its time",
            "ttl-exceeded",
            [0, 1]
                .map(|ttl| routed(&ipv4_with(REMOTE, VICTIM, ttl, MARK)))
                .into(),
        ),
        (
            "to nobody",
            "host-unreachable",
            vec![routed(&ipv4(REMOTE, NOBODY))],
        ),
    ];
    for (reason, packets) in malformed(REMOTE) {
        let frames = packets.iter().map(|packet| routed(packet)).collect();
        cases.push(("a malformed packet", reason, frames));
    }
    bed.injector.inject("eth0", &[control]).unwrap();
    for (what, reason, frames) in &cases {
        bed.refuses(From::Underlay, what, reason, frames);
    }
    bed.finish(1);
}

#[test]
fn a_udp_datagram_that_is_wrong_goes_nowhere() {
    let Some(mut bed) = Bed::new("udp") else {
        return;
    };
    let from_peer = |packet: &[u8]| bed.datagram(PEER_IP, packet);
    let good = ipv4(REMOTE, VICTIM);
    let control = from_peer(&ipv4_with(REMOTE, VICTIM, 64, CONTROL));
    let mut cases: Vec<(&str, &str, Vec<Vec<u8>>)> = vec![
        (
            "less than an IPv4 header",
            "ipv4-too-short",
            (0..20).map(|len| from_peer(&good[..len])).collect(),
        ),
        (
            "less than the packet",
            "ipv4-total-len",
            (20..good.len())
                .map(|len| from_peer(&good[..len]))
                .collect(),
        ),
        (
            "from somebody without a lease",
            "unknown-peer",
            vec![bed.datagram(STRANGER_IP, &good)],
        ),
        (
            "from another port of a peer",
            "tunnel-port",
            [1, 4000, bed.tunnel_port + 1]
                .map(|port| bed.datagram_from(port, PEER_IP, &good))
                .into(),
        ),
        (
            "an inner source of somebody else",
            "source-not-in-lease",
            [THIRD, ATTACKER, GATEWAY]
                .map(|source| from_peer(&ipv4(source, VICTIM)))
                .into(),
        ),
        (
            "one peer for another",
            "source-not-in-lease",
            vec![bed.datagram(THIRD_IP, &good)],
        ),
        (
            "through us to another",
            "tunnel-to-tunnel",
            vec![from_peer(&ipv4(REMOTE, THIRD))],
        ),
    ];
    for (reason, packets) in malformed(REMOTE) {
        let frames = packets.iter().map(|packet| from_peer(packet)).collect();
        cases.push(("a malformed packet", reason, frames));
    }
    bed.injector.inject("eth0", &[control]).unwrap();
    for (what, reason, frames) in &cases {
        bed.refuses(From::Underlay, what, reason, frames);
    }
    bed.finish(1);
}
