//! Packets to and from the host interface.

use std::sync::Arc;

use super::*;
use crate::datapath::egress::{Policy, Rules};
use crate::datapath::host_interface::{HostFlows, HostInterface};

/// The host's address on the underlay, and another one.
const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// A machine that the host forwards for.
const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 99);

fn interface() -> HostInterface {
    HostInterface {
        addresses: vec![HOST.into(), SECOND.into()],
        flows: Arc::new(HostFlows::new(7)),
    }
}

fn with_host(policy: Policy) -> Node {
    let mut node = node(1, "vxlan");
    node.set_egress(Some("10.244.0.0/16".parse().unwrap()));
    node.set_host(Some(interface()), &policy);
    node
}

fn open() -> Node {
    with_host(Policy::new(Rules::default()))
}

fn from_host(node: &mut Node, packet: &[u8]) -> (Verdict, Vec<u8>) {
    through(packet, |packet| node.from_host(NOW, packet))
}

fn udp(source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16)) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(source.0.octets(), destination.0.octets(), 64)
        .udp(source.1, destination.1)
        .write(&mut bytes, b"datagram")
        .unwrap();
    bytes
}

fn tcp(source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16)) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(source.0.octets(), destination.0.octets(), 64)
        .tcp(source.1, destination.1, 7, 1000)
        .syn()
        .write(&mut bytes, &[])
        .unwrap();
    bytes
}

/// Source and destination of a packet whose checksums an independent parser finds right.
fn ends(packet: &[u8]) -> ((Ipv4Addr, u16), (Ipv4Addr, u16)) {
    let (ip, rest) = etherparse::Ipv4Header::from_slice(packet).unwrap();
    assert_eq!(ip.calc_header_checksum(), ip.header_checksum);
    let ports = match ip.protocol.0 {
        6 => {
            let (tcp, payload) = etherparse::TcpHeader::from_slice(rest).unwrap();
            assert_eq!(tcp.calc_checksum_ipv4(&ip, payload), Ok(tcp.checksum));
            (tcp.source_port, tcp.destination_port)
        }
        17 => {
            let (udp, payload) = etherparse::UdpHeader::from_slice(rest).unwrap();
            assert_eq!(udp.calc_checksum_ipv4(&ip, payload), Ok(udp.checksum));
            (udp.source_port, udp.destination_port)
        }
        _ => (0, 0),
    };
    (
        (ip.source.into(), ports.0),
        (ip.destination.into(), ports.1),
    )
}

/// The packet in a frame of the tunnel.
fn inner(datagram: &[u8]) -> &[u8] {
    &datagram[8 + frame::HEADER_LEN..]
}

fn is_to_peer(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Peer { id: PeerId(2), .. })
}

#[test]
fn the_host_and_pods_of_its_node_see_each_others_addresses() {
    let mut node = open();
    for own in [pod(1, 0), HOST, SECOND] {
        let (verdict, frame) = from_host(&mut node, &ping(own, pod(1, 2), 64, 30));
        assert_eq!(verdict, Verdict::Port(POD_PORT), "{own}");
        let (source, destination, kind, _) = icmp_of(&frame);
        assert_eq!((source, destination), (own, pod(1, 2)));
        assert_eq!(kind, Icmpv4Message::EchoRequest);
        assert_eq!(ip_of(&frame).hop_limit(), 63);
        let packet = udp((pod(1, 2), 4000), (own, 53));
        let (verdict, passed) = from_pod(&mut node, &pod_frame(&packet));
        assert_eq!((verdict, passed), (Verdict::Host, packet));
    }
    let host = node.host().unwrap();
    assert_eq!((host.received.packets, host.sent.packets), (3, 3));
    assert_adds_up(&node);
}

#[test]
fn other_nodes_see_the_base_address_and_answers_find_the_hosts_own() {
    let mut node = open();
    let mut ports = Vec::new();
    for own in [pod(1, 0), HOST, SECOND] {
        for build in [udp, tcp] {
            let packet = build((own, 40_000), (pod(2, 2), 80));
            let (verdict, datagram) = from_host(&mut node, &packet);
            assert!(is_to_peer(verdict), "{verdict:?}");
            let ((source, port), destination) = ends(inner(&datagram));
            assert_eq!((source, destination), (pod(1, 0), (pod(2, 2), 80)));
            ports.push(port);
            let answer = build((pod(2, 2), 80), (pod(1, 0), port));
            let (verdict, passed) = from_peer(&mut node, 2, &peer_frame(&answer));
            assert_eq!(verdict, Verdict::Host);
            assert_eq!(ends(&passed), ((pod(2, 2), 80), (own, 40_000)));
        }
    }
    // The first has its own, and no two of one protocol have the same.
    assert_eq!(ports[..2], [40_000, 40_000]);
    let udp: std::collections::HashSet<_> = ports.iter().step_by(2).collect();
    assert_eq!(udp.len(), 3);
    assert_adds_up(&node);
}

#[test]
fn pings_of_the_host_to_other_nodes_are_answered() {
    let mut node = open();
    let (verdict, datagram) = from_host(&mut node, &ping(HOST, pod(2, 2), 64, 30));
    assert!(is_to_peer(verdict));
    let (source, destination, ..) = icmp_of(&datagram[8..]);
    assert_eq!((source, destination), (pod(1, 0), pod(2, 2)));
    let mut reply = ping(pod(2, 2), pod(1, 0), 64, 30);
    reply[20] = 0;
    let mut icmp = Icmpv4Packet::new_unchecked(&mut reply[20..]);
    icmp.fill_checksum();
    let (verdict, passed) = from_peer(&mut node, 2, &peer_frame(&reply));
    assert_eq!(verdict, Verdict::Host);
    assert_eq!(ends(&passed).1.0, HOST);
    assert_adds_up(&node);
}

#[test]
fn what_the_host_forwards_is_dropped_and_counted() {
    let mut node = open();
    for destination in [pod(1, 2), pod(2, 2), pod(1, 1)] {
        for source in [STRANGER, pod(1, 3), pod(2, 3), pod(9, 9)] {
            let (verdict, _) = from_host(&mut node, &udp((source, 1), (destination, 2)));
            assert_eq!(verdict, Verdict::Drop(DropReason::HostForwarded));
        }
    }
    let counters = node.counters();
    assert_eq!(counters.dropped_for(DropReason::HostForwarded), 12);
    // Nor does anything go outside by it.
    let (verdict, _) = from_host(&mut node, &udp((HOST, 1), (STRANGER, 2)));
    assert_eq!(verdict, Verdict::Drop(DropReason::NoRoute));
    outputs(&mut node);
    assert_adds_up(&node);
}

#[test]
fn without_an_interface_the_base_address_is_the_gateways() {
    let mut node = open();
    let packet = ping(pod(1, 2), pod(1, 0), 64, 30);
    assert_eq!(from_pod(&mut node, &pod_frame(&packet)).0, Verdict::Host);
    node.set_host(None, &Policy::closed());
    assert_eq!(
        from_pod(&mut node, &pod_frame(&packet)).0,
        Verdict::Consumed
    );
    assert_eq!(outputs(&mut node).len(), 1);
    let to_host = pod_frame(&ping(pod(1, 2), HOST, 64, 30));
    assert_eq!(from_pod(&mut node, &to_host).0, Verdict::Egress);
    let gone = Verdict::Drop(DropReason::PortGone);
    let (verdict, _) = from_host(&mut node, &ping(HOST, pod(1, 2), 64, 30));
    assert_eq!(verdict, gone);
}

#[test]
fn the_gateway_answers_the_host() {
    let mut node = open();
    for own in [pod(1, 0), HOST] {
        let (verdict, _) = from_host(&mut node, &ping(own, pod(1, 1), 64, 30));
        assert_eq!(verdict, Verdict::Consumed);
        let replies = outputs(&mut node);
        let [(Verdict::Host, reply)] = &replies[..] else {
            panic!("{replies:?}")
        };
        assert_eq!(ends(reply), ((pod(1, 1), 0), (own, 0)));
        // It has no services for the host.
        let (verdict, _) = from_host(&mut node, &tcp((own, 9), (pod(1, 1), 53)));
        assert_eq!(verdict, Verdict::Consumed);
        assert!(matches!(&outputs(&mut node)[..], [(Verdict::Host, _)]));
    }
    assert_adds_up(&node);
}

#[test]
fn what_egress_forbids_the_host_interface_does_not_open() {
    let rules = Rules {
        deny: vec!["198.51.100.0/24".parse().unwrap()],
        tunnel_ports: vec![8472],
        stores: vec![SocketAddr::from((HOST, 2379))],
        ..Rules::default()
    };
    let mut node = with_host(Policy::new(rules));
    let denied = Verdict::Drop(DropReason::HostDenied);
    for (packet, expected) in [
        (tcp((pod(1, 2), 1), (HOST, 22)), Verdict::Host),
        (tcp((pod(1, 2), 1), (HOST, 2379)), denied),
        (tcp((pod(1, 2), 1), (pod(1, 0), 2379)), denied),
        (tcp((pod(1, 2), 1), (SECOND, 22)), denied),
        (udp((pod(1, 2), 1), (HOST, 8472)), denied),
        (udp((pod(1, 2), 1), (pod(1, 0), 4789)), denied),
        (tcp((pod(1, 2), 1), (pod(1, 0), 22)), denied),
        (ping(pod(1, 2), SECOND, 64, 9), denied),
    ] {
        assert_eq!(from_pod(&mut node, &pod_frame(&packet)).0, expected);
        let reports = outputs(&mut node).len();
        assert_eq!(reports, usize::from(expected == denied));
    }
    let packet = peer_frame(&tcp((pod(2, 2), 1), (pod(1, 0), 2379)));
    assert_eq!(from_peer(&mut node, 2, &packet).0, denied);
    outputs(&mut node);
    node.set_stores(&[SocketAddr::from((HOST, 4001))]);
    let packet = tcp((pod(1, 2), 1), (HOST, 4001));
    assert_eq!(from_pod(&mut node, &pod_frame(&packet)).0, denied);
    outputs(&mut node);
    assert_adds_up(&node);
}

#[test]
fn pods_answer_the_host_whatever_egress_forbids() {
    let mut node = with_host(Policy::closed());
    let denied = Verdict::Drop(DropReason::HostDenied);
    for own in [pod(1, 0), HOST] {
        for build in [udp, tcp] {
            let answer = pod_frame(&build((pod(1, 2), 80), (own, 40_000)));
            assert_eq!(from_pod(&mut node, &answer).0, denied);
            let request = build((own, 40_000), (pod(1, 2), 80));
            let (verdict, _) = from_host(&mut node, &request);
            assert_eq!(verdict, Verdict::Port(POD_PORT));
            assert_eq!(from_pod(&mut node, &answer).0, Verdict::Host);
            let other = pod_frame(&build((pod(1, 2), 81), (own, 40_000)));
            assert_eq!(from_pod(&mut node, &other).0, denied);
            // The same of another node's pod.
            let far = |port| peer_frame(&build((pod(2, 2), port), (pod(1, 0), 40_000)));
            let is_known = own == HOST;
            let before = from_peer(&mut node, 2, &far(80)).0;
            assert_eq!(before == Verdict::Host, is_known, "{before:?}");
            let (verdict, _) = from_host(&mut node, &build((own, 40_000), (pod(2, 2), 80)));
            assert!(is_to_peer(verdict));
            assert_eq!(from_peer(&mut node, 2, &far(80)).0, Verdict::Host);
            assert_eq!(from_peer(&mut node, 2, &far(81)).0, denied);
        }
    }
    outputs(&mut node);
    assert_adds_up(&node);
}

#[test]
fn errors_about_translated_packets_name_the_hosts_own() {
    let mut node = open();
    // Two with one port, so that the second has another one outside.
    from_host(&mut node, &udp((HOST, 40_000), (pod(2, 2), 80)));
    let sent = udp((SECOND, 40_000), (pod(2, 2), 80));
    let (_, datagram) = from_host(&mut node, &sent);
    let outside = inner(&datagram).to_vec();
    let mut error = [0; icmp::MAX_LEN];
    let unreachable = icmp::IcmpError::PortUnreachable;
    let len = unreachable.write(&mut error, pod(2, 2), &outside).unwrap();
    let (verdict, passed) = from_peer(&mut node, 2, &peer_frame(&error[..len]));
    assert_eq!(verdict, Verdict::Host);
    assert_eq!(ends(&passed).1.0, SECOND);
    assert_eq!(ends(&passed[28..]).0, (SECOND, 40_000));
    assert!(Icmpv4Packet::new_unchecked(&passed[20..]).verify_checksum());

    // The other way: the host refuses what a pod answers.
    let (_, port) = ends(&outside).0;
    let answer = udp((pod(2, 2), 80), (pod(1, 0), port));
    let (_, answer) = from_peer(&mut node, 2, &peer_frame(&answer));
    let len = unreachable.write(&mut error, SECOND, &answer).unwrap();
    let (verdict, datagram) = from_host(&mut node, &error[..len]);
    assert!(is_to_peer(verdict));
    assert_eq!(ends(inner(&datagram)).0.0, pod(1, 0));
    assert_eq!(ends(&inner(&datagram)[28..]).1, (pod(1, 0), port));

    // And what this node has to say itself.
    let mut late = udp((SECOND, 40_000), (pod(2, 2), 80));
    late[8] = 1;
    let mut view = Ipv4Packet::new_unchecked(&mut late[..]);
    view.fill_checksum();
    let (verdict, _) = from_host(&mut node, &late);
    assert_eq!(verdict, Verdict::Drop(DropReason::TtlExceeded));
    let reports = outputs(&mut node);
    let [(Verdict::Host, report)] = &reports[..] else {
        panic!("{reports:?}")
    };
    assert_eq!(ends(report).1.0, SECOND);
    assert_adds_up(&node);
}

#[test]
fn fragments_to_other_nodes_have_the_base_address() {
    let mut node = open();
    let packet = ping(HOST, pod(2, 2), 64, 4000);
    let mut fragments = Fragments::new(&packet, Mtu::new(1450).unwrap()).unwrap();
    let mut buffer = [0; 1500];
    let mut seen = 0;
    while let Some(len) = fragments.write_next(&mut buffer) {
        let (verdict, datagram) = from_host(&mut node, &buffer[..len]);
        assert!(is_to_peer(verdict));
        assert_eq!(ip_of(&datagram[8..]).src_addr(), pod(1, 0));
        seen += 1;
    }
    assert_eq!(seen, 3);
    // Those that come back cannot be told apart.
    let reply = ping(pod(2, 2), pod(1, 0), 64, 4000);
    let mut reply = reply;
    reply[20] = 0;
    let mut fragments = Fragments::new(&reply, Mtu::new(1450).unwrap()).unwrap();
    let len = fragments.write_next(&mut buffer).unwrap();
    let (verdict, _) = from_peer(&mut node, 2, &peer_frame(&buffer[..len]));
    assert_eq!(verdict, Verdict::Drop(DropReason::HostFragment));
    assert_adds_up(&node);
}

#[test]
fn what_has_no_ports_is_not_translated() {
    let mut node = open();
    let mut packet = udp((HOST, 1), (pod(2, 2), 2));
    packet[9] = 132;
    let mut view = Ipv4Packet::new_unchecked(&mut packet[..]);
    view.fill_checksum();
    let (verdict, _) = from_host(&mut node, &packet);
    assert_eq!(verdict, Verdict::Drop(DropReason::HostProtocol));
    view = Ipv4Packet::new_unchecked(&mut packet[..]);
    view.set_src_addr(pod(1, 0));
    view.fill_checksum();
    assert!(is_to_peer(from_host(&mut node, &packet).0));
    assert_adds_up(&node);
}

#[test]
fn two_workers_share_the_hosts_flows() {
    let (mut one, mut two) = (open(), open());
    let shared = one.host().unwrap().interface.clone();
    two.set_host(Some(shared), &Policy::new(Rules::default()));
    let packet = tcp((HOST, 40_000), (pod(2, 2), 80));
    from_host(&mut one, &packet);
    let answer = peer_frame(&tcp((pod(2, 2), 80), (pod(1, 0), 40_000)));
    let (verdict, passed) = from_peer(&mut two, 2, &answer);
    assert_eq!(verdict, Verdict::Host);
    assert_eq!(ends(&passed).1, (HOST, 40_000));
}
