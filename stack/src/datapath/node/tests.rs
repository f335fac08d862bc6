//! Whole packets through whole nodes, and what must not get through.

use std::net::SocketAddrV4;

use etherparse::PacketBuilder;
use proptest::prelude::*;
use smoltcp::wire::{
    ArpOperation, EthernetFrame, EthernetProtocol, Icmpv4Message, Icmpv4Packet, IpProtocol,
    Ipv4Packet,
};

use super::*;
use crate::datapath::frame;
use crate::datapath::ndp;

mod egress;
mod filter;
mod host;
mod liveness;
mod multicast;
mod observe;
mod superpackets;
mod telling;
mod uplink;
mod v6;
mod work;

use filter::Denied;
use muslin_encap::ip::fragment::Fragments;
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use observe::Recorder;

/// Every scene's node is observed, and asks before packets go on.
type Node = super::Node<Recorder, Denied>;

const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x0a, 0x58, 10, 244, 0, 1]);
const POD_PORT: PortId = PortId(1);
const OTHER_PORT: PortId = PortId(2);
const NOW: Instant = Instant::ZERO;

fn vtep(node: u8) -> VtepMac {
    VtepMac::from_random([2, 0, 0, 0, 0, node])
}

fn pod_mac(node: u8, host: u8) -> EthernetAddress {
    EthernetAddress([0x0a, 0x58, 10, 244, node, host])
}

fn pod(node: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, host)
}

fn underlay(node: u8) -> SocketAddrV4 {
    SocketAddrV4::new([192, 168, 0, node].into(), 8472)
}

fn tunnel(node: u8, format: &str) -> Tunnel {
    match format {
        "vxlan" => Tunnel::Vxlan {
            vni: Vni::new(1).unwrap(),
            mac: vtep(node),
            mac_v6: None,
        },
        "udp" => Tunnel::Udp,
        _ => Tunnel::None,
    }
}

fn attachment(node: u8, host: u8, guarded: bool) -> Attachment {
    Attachment {
        mac: pod_mac(node, host),
        addresses: vec![pod(node, host).into()],
        guarded,
        rates: Rates::default(),
    }
}

/// Node 1 or 2 of two, with guarded pods `.2` at port 1 and `.3` at port 2.
fn node(number: u8, format: &str) -> Node {
    let mut node = bare_node(number, format);
    node.attach(POD_PORT, attachment(number, 2, true));
    node.attach(OTHER_PORT, attachment(number, 3, true));
    let other = 3 - number;
    node.set_peer(Peer {
        id: PeerId(other.into()),
        subnet: format!("10.244.{other}.0/24").parse().unwrap(),
        address: underlay(other).into(),
        vtep_mac: Some(vtep(other)),
        checksums: Checksums::Complete,
        multicast: false,
        wireguard: None,
    });
    node
}

fn bare_node(number: u8, format: &str) -> Node {
    observed(config(number, format)).unwrap()
}

fn observed(config: NodeConfig) -> Result<Node, NodeConfigError> {
    Node::with(config, Recorder::default(), Denied::default(), NOW)
}

fn config(number: u8, format: &str) -> NodeConfig {
    NodeConfig {
        subnet: format!("10.244.{number}.0/24").parse().unwrap(),
        gateway_mac: GATEWAY_MAC,
        tunnel: tunnel(number, format),
        mtu: Mtu::new(1450).unwrap(),
        mtu_v6: Mtu::new(1430).unwrap(),
        clamp_mss: true,
        guard: guard::Policy { peers: true },
        limits: Limits::default(),
        random_seed: 7,
    }
}

/// Runs `input` through a call and returns the verdict and the packet as it came out.
fn through(input: &[u8], call: impl FnOnce(&mut PacketBuf<'_>) -> Verdict) -> (Verdict, Vec<u8>) {
    let mut storage = vec![0; HEADROOM + frame::MAX_LEN + 100];
    storage[HEADROOM..HEADROOM + input.len()].copy_from_slice(input);
    let mut packet = PacketBuf::new(&mut storage, HEADROOM, input.len()).unwrap();
    let verdict = call(&mut packet);
    (verdict, packet.as_slice().to_vec())
}

fn from_pod(node: &mut Node, frame: &[u8]) -> (Verdict, Vec<u8>) {
    through(frame, |packet| node.from_port(NOW, POD_PORT, packet))
}

fn from_peer(node: &mut Node, other: u8, datagram: &[u8]) -> (Verdict, Vec<u8>) {
    through(datagram, |packet| {
        node.from_underlay(NOW, underlay(other).into(), packet)
    })
}

fn outputs(node: &mut Node) -> Vec<(Verdict, Vec<u8>)> {
    let mut storage = vec![0; HEADROOM + frame::MAX_LEN];
    let mut all = Vec::new();
    let mut packet = PacketBuf::new(&mut storage, 0, 0).unwrap();
    while let Some(verdict) = node.poll_output(&mut packet) {
        all.push((verdict, packet.as_slice().to_vec()));
    }
    node.observer().assert_agrees(node.counters());
    all
}

fn ping(source: Ipv4Addr, destination: Ipv4Addr, ttl: u8, payload: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(source.octets(), destination.octets(), ttl)
        .icmpv4_echo_request(5, 6)
        .write(&mut bytes, &vec![9; payload])
        .unwrap();
    set_dont_fragment(&mut bytes, false);
    bytes
}

fn set_dont_fragment(packet: &mut [u8], value: bool) {
    let mut view = Ipv4Packet::new_unchecked(packet);
    view.set_dont_frag(value);
    view.fill_checksum();
}

fn ethernet(
    source: EthernetAddress,
    destination: EthernetAddress,
    kind: u16,
    rest: &[u8],
) -> Vec<u8> {
    [&destination.0[..], &source.0, &kind.to_be_bytes(), rest].concat()
}

fn pod_frame(packet: &[u8]) -> Vec<u8> {
    ethernet(pod_mac(1, 2), GATEWAY_MAC, 0x0800, packet)
}

fn vxlan(vni: u8, inner: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0, 0, 0, vni, 0][..], inner].concat()
}

fn peer_frame(packet: &[u8]) -> Vec<u8> {
    vxlan(1, &ethernet(vtep(2).get(), vtep(1).get(), 0x0800, packet))
}

/// The IPv4 packet in a frame; its header checksum is right.
fn ip_of(frame: &[u8]) -> Ipv4Packet<&[u8]> {
    let packet = Ipv4Packet::new_checked(&frame[frame::HEADER_LEN..]).unwrap();
    assert!(packet.verify_checksum());
    packet
}

fn icmp_of(frame: &[u8]) -> (Ipv4Addr, Ipv4Addr, Icmpv4Message, u8) {
    let ip = ip_of(frame);
    assert_eq!(ip.next_header(), IpProtocol::Icmp);
    let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
    assert!(icmp.verify_checksum());
    (
        ip.src_addr(),
        ip.dst_addr(),
        icmp.msg_type(),
        icmp.msg_code(),
    )
}

fn assert_adds_up(node: &Node) {
    let counters = node.counters();
    assert_eq!(counters.came(), counters.went(), "{counters:?}");
    node.observer().assert_agrees(counters);
}

#[test]
fn pods_of_two_nodes_ping_each_other() {
    for format in ["vxlan", "udp"] {
        let (mut one, mut two) = (node(1, format), node(2, format));
        let packet = ping(pod(1, 2), pod(2, 2), 64, 56);
        let (verdict, datagram) = from_pod(&mut one, &pod_frame(&packet));
        let Verdict::Peer {
            id: PeerId(2),
            destination,
            ..
        } = verdict
        else {
            panic!("{format}: {verdict:?}")
        };
        assert_eq!(destination, underlay(2).into());
        let overhead = one
            .config
            .tunnel
            .format()
            .unwrap()
            .overhead(smoltcp::wire::IpVersion::Ipv4)
            - 28;
        assert_eq!(datagram.len(), packet.len() + usize::from(overhead));
        if format == "vxlan" {
            assert_eq!(&datagram[..8], [8, 0, 0, 0, 0, 0, 1, 0]);
            assert_eq!(&datagram[8..14], vtep(2).get().as_bytes());
            assert_eq!(&datagram[14..20], vtep(1).get().as_bytes());
        }
        let (verdict, frame) = from_peer(&mut two, 1, &datagram);
        assert_eq!(verdict, Verdict::Port(POD_PORT), "{format}");
        let view = EthernetFrame::new_checked(&frame[..]).unwrap();
        assert_eq!(
            (view.src_addr(), view.dst_addr()),
            (GATEWAY_MAC, pod_mac(2, 2))
        );
        let ip = ip_of(&frame);
        assert_eq!((ip.src_addr(), ip.dst_addr()), (pod(1, 2), pod(2, 2)));
        assert_eq!(ip.hop_limit(), 62, "both nodes are routers");
        assert_eq!(ip.payload(), &packet[20..]);
        assert_adds_up(&one);
        assert_adds_up(&two);
    }
}

#[test]
fn the_gateway_answers_pings_from_pods_and_peers() {
    for (format, payload) in [("vxlan", 56), ("udp", 56), ("vxlan", 1400)] {
        let mut node = node(1, format);
        for own in [pod(1, 1), pod(1, 0)] {
            let packet = ping(pod(1, 2), own, 1, payload);
            assert_eq!(
                from_pod(&mut node, &pod_frame(&packet)).0,
                Verdict::Consumed
            );
            let replies = outputs(&mut node);
            assert_eq!(replies.len(), 1);
            assert_eq!(replies[0].0, Verdict::Port(POD_PORT));
            let (source, destination, kind, _) = icmp_of(&replies[0].1);
            assert_eq!((source, destination), (own, pod(1, 2)));
            assert_eq!(kind, Icmpv4Message::EchoReply);

            // flannel's nodes send from the base address of their own subnet.
            let packet = ping(pod(2, 0), own, 9, payload);
            let datagram = if format == "vxlan" {
                peer_frame(&packet)
            } else {
                packet
            };
            assert_eq!(from_peer(&mut node, 2, &datagram).0, Verdict::Consumed);
            let replies = outputs(&mut node);
            assert!(matches!(
                replies[..],
                [(Verdict::Peer { id: PeerId(2), .. }, _)]
            ));
        }
        assert_adds_up(&node);
    }
}

#[test]
fn a_ping_larger_than_the_mtu_is_answered_in_fragments() {
    for egress in [None, Some("10.244.0.0/16".parse().unwrap())] {
        let mut node = node(1, "vxlan");
        node.set_egress(egress);
        // What is in the later fragments must not be taken for a header.
        let packet = ping(pod(1, 2), pod(1, 1), 64, 4000);
        let mut fragments = Fragments::new(&packet, Mtu::new(1450).unwrap()).unwrap();
        let mut buffer = [0; 1500];
        while let Some(len) = fragments.write_next(&mut buffer) {
            from_pod(&mut node, &pod_frame(&buffer[..len]));
        }
        let replies = outputs(&mut node);
        assert_eq!(replies.len(), 3, "{:?}", node.counters());
        let total: usize = replies
            .iter()
            .map(|(_, frame)| ip_of(frame).payload().len())
            .sum();
        assert_eq!(total, 4008);
        assert!(
            replies
                .iter()
                .all(|(verdict, _)| *verdict == Verdict::Port(POD_PORT))
        );
    }
}

#[test]
fn arp_for_the_gateway_is_answered_and_for_others_is_flooded() {
    let mut node = node(1, "vxlan");
    let ask = |target: Ipv4Addr| {
        frame::write_arp(
            ArpOperation::Request,
            (pod_mac(1, 2), pod(1, 2)),
            (EthernetAddress::BROADCAST, target),
        )
    };
    for own in [pod(1, 1), pod(1, 0)] {
        let (verdict, _) = from_pod(&mut node, &ask(own));
        assert_eq!(
            verdict,
            Verdict::Flood {
                except: Some(POD_PORT)
            }
        );
        let replies = outputs(&mut node);
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].0, Verdict::Port(POD_PORT));
        let expected = frame::write_arp(
            ArpOperation::Reply,
            (GATEWAY_MAC, own),
            (pod_mac(1, 2), pod(1, 2)),
        );
        assert_eq!(replies[0].1, expected);
    }
    let (verdict, _) = from_pod(&mut node, &ask(pod(1, 3)));
    assert_eq!(
        verdict,
        Verdict::Flood {
            except: Some(POD_PORT)
        }
    );
    assert!(
        outputs(&mut node).is_empty(),
        "the gateway answers for nobody else"
    );
}

#[test]
fn pods_of_one_node_meet_on_the_switch() {
    let mut node = node(1, "vxlan");
    let packet = ping(pod(1, 2), pod(1, 3), 1, 10);
    let input = ethernet(pod_mac(1, 2), pod_mac(1, 3), 0x0800, &packet);
    let (verdict, frame) = from_pod(&mut node, &input);
    assert_eq!(verdict, Verdict::Port(OTHER_PORT));
    assert_eq!(frame, input, "a switch changes nothing");
}

#[test]
fn an_unknown_destination_is_flooded_only_if_somebody_may_have_it() {
    let mut node = node(1, "vxlan");
    let packet = ping(pod(1, 2), pod(1, 3), 1, 10);
    let input = ethernet(pod_mac(1, 2), EthernetAddress([6; 6]), 0x0800, &packet);
    let nobody = Verdict::Drop(DropReason::UnknownDestination);
    assert_eq!(from_pod(&mut node, &input).0, nobody, "both are guarded");
    node.attach(OTHER_PORT, attachment(1, 3, false));
    let flood = Verdict::Flood {
        except: Some(POD_PORT),
    };
    assert_eq!(from_pod(&mut node, &input).0, flood);
    // The only unguarded pod is the sender itself.
    node.attach(OTHER_PORT, attachment(1, 3, true));
    node.attach(POD_PORT, attachment(1, 2, false));
    assert_eq!(from_pod(&mut node, &input).0, nobody);
    assert_adds_up(&node);
}

#[test]
fn errors_go_back_to_the_sender() {
    let mut node = node(1, "vxlan");
    let mut big = ping(pod(1, 2), pod(2, 2), 64, 1500);
    set_dont_fragment(&mut big, true);
    let cases = [
        (
            ping(pod(1, 2), pod(2, 2), 1, 10),
            DropReason::TtlExceeded,
            (11, 0),
        ),
        (
            ping(pod(1, 2), Ipv4Addr::new(8, 8, 8, 8), 64, 10),
            DropReason::NoRoute,
            (3, 0),
        ),
        (
            ping(pod(1, 2), pod(9, 9), 64, 10),
            DropReason::NoRoute,
            (3, 0),
        ),
        (
            ping(pod(1, 2), pod(1, 77), 64, 10),
            DropReason::HostUnreachable,
            (3, 1),
        ),
        (big, DropReason::FragmentationNeeded, (3, 4)),
    ];
    for (packet, reason, (kind, code)) in cases {
        assert_eq!(
            from_pod(&mut node, &pod_frame(&packet)).0,
            Verdict::Drop(reason)
        );
        let errors = outputs(&mut node);
        assert_eq!(errors.len(), 1, "{reason:?}");
        assert_eq!(errors[0].0, Verdict::Port(POD_PORT));
        let (source, destination, message, its_code) = icmp_of(&errors[0].1);
        assert_eq!((source, destination), (pod(1, 1), pod(1, 2)));
        assert_eq!((u8::from(message), its_code), (kind, code), "{reason:?}");
        let icmp = &errors[0].1[34..];
        assert_eq!(&icmp[8..16], &packet[..8], "it quotes the packet");
        assert_eq!(&icmp[20..36], &packet[12..28]);
        if reason == DropReason::FragmentationNeeded {
            assert_eq!(u16::from_be_bytes([icmp[6], icmp[7]]), 1450);
        }
    }
    assert_adds_up(&node);
}

#[test]
fn no_error_is_said_about_an_error_or_a_later_fragment() {
    let mut node = node(1, "vxlan");
    let mut error = ping(pod(1, 2), pod(2, 2), 1, 36);
    let mut icmp = Icmpv4Packet::new_unchecked(&mut error[20..]);
    icmp.set_msg_type(Icmpv4Message::TimeExceeded);
    icmp.fill_checksum();
    let mut later = ping(pod(1, 2), pod(2, 2), 1, 36);
    let mut view = Ipv4Packet::new_unchecked(&mut later[..]);
    view.set_frag_offset(64);
    view.fill_checksum();
    for packet in [error, later] {
        let (verdict, _) = from_pod(&mut node, &pod_frame(&packet));
        assert_eq!(verdict, Verdict::Drop(DropReason::TtlExceeded));
        assert_eq!(outputs(&mut node), []);
    }
    assert_adds_up(&node);
}

#[test]
fn what_the_node_says_itself_is_bounded_and_counted() {
    let mut node = bare_node(1, "vxlan");
    node.attach(POD_PORT, attachment(1, 2, false));
    let request = frame::write_arp(
        ArpOperation::Request,
        (pod_mac(1, 2), pod(1, 2)),
        (EthernetAddress::BROADCAST, pod(1, 1)),
    );
    for _ in 0..OUTPUT_LEN + 3 {
        from_pod(&mut node, &request);
    }
    assert_eq!(node.counters().dropped_for(DropReason::OutputQueueFull), 3);
    assert_eq!(outputs(&mut node).len(), OUTPUT_LEN);
    assert_adds_up(&node);
}

#[test]
fn without_a_guard_peers_need_no_lease() {
    for peers in [true, false] {
        let mut config = config(1, "udp");
        config.guard.peers = peers;
        let mut node = observed(config).unwrap();
        node.attach(POD_PORT, attachment(1, 2, true));
        let (verdict, _) = from_peer(&mut node, 2, &ping(pod(2, 2), pod(1, 2), 64, 8));
        let expected = match peers {
            true => Verdict::Drop(DropReason::UnknownPeer),
            false => Verdict::Port(POD_PORT),
        };
        assert_eq!(verdict, expected);
    }
}

#[test]
fn packets_wait_for_a_pod_that_is_about_to_be_attached_again() {
    let until = NOW + Duration::from_secs(10);
    for is_guarded in [true, false] {
        let mut node = bare_node(1, "vxlan");
        node.attach(OTHER_PORT, attachment(1, 3, is_guarded));
        node.set_peer(peer(2, "10.244.2.0/24"));
        node.await_pods([2, 3, 4].map(|host| pod(1, host).into()), until);
        // From a peer and from a pod of this node: four wait, and no more.
        let mut verdicts = vec![];
        for len in 0..6 {
            let packet = peer_frame(&ping(pod(2, 2), pod(1, 2), 64, len));
            verdicts.push(from_peer(&mut node, 2, &packet).0);
        }
        let lost = if is_guarded {
            DropReason::PodAwaited
        } else {
            DropReason::NeighbourQueueFull
        };
        assert_eq!(verdicts[..4], [Verdict::Consumed; 4]);
        assert_eq!(verdicts[4..], [Verdict::Drop(lost); 2]);
        let is_asked = |(verdict, _): &(Verdict, Vec<u8>)| matches!(verdict, Verdict::Flood { .. });
        assert!(outputs(&mut node).iter().all(is_asked), "nobody is told");
        node.attach(POD_PORT, attachment(1, 2, true));
        let out = outputs(&mut node);
        assert_eq!(out.len(), 4);
        assert!(
            out.iter()
                .all(|(verdict, _)| *verdict == Verdict::Port(POD_PORT))
        );
        // One that goes again is gone.
        node.detach(POD_PORT);
        if is_guarded {
            let packet = peer_frame(&ping(pod(2, 2), pod(1, 2), 64, 0));
            let gone = Verdict::Drop(DropReason::HostUnreachable);
            assert_eq!(from_peer(&mut node, 2, &packet).0, gone);
        }
        outputs(&mut node);
        assert_adds_up(&node);
    }
}

#[test]
fn a_pod_that_is_not_attached_again_in_time_is_unreachable() {
    let until = NOW + Duration::from_secs(10);
    let mut node = bare_node(1, "vxlan");
    node.set_peer(peer(2, "10.244.2.0/24"));
    node.await_pods([pod(1, 2).into()], until);
    let packet = peer_frame(&ping(pod(2, 2), pod(1, 2), 64, 8));
    assert_eq!(from_peer(&mut node, 2, &packet).0, Verdict::Consumed);
    node.handle_timeout(until - Duration::from_millis(1));
    assert_eq!(outputs(&mut node), []);
    node.handle_timeout(until);
    let out = outputs(&mut node);
    assert!(
        matches!(out[..], [(Verdict::Peer { .. }, _)]),
        "the error: {out:?}"
    );
    let verdict = through(&packet, |packet| {
        node.from_underlay(until, underlay(2).into(), packet)
    })
    .0;
    assert_eq!(verdict, Verdict::Drop(DropReason::HostUnreachable));
    // Another address was never a pod's.
    node.await_pods([pod(1, 2).into()], until + Duration::from_secs(10));
    let other = peer_frame(&ping(pod(2, 2), pod(1, 9), 64, 8));
    let verdict = through(&other, |packet| {
        node.from_underlay(until, underlay(2).into(), packet)
    })
    .0;
    assert_eq!(verdict, Verdict::Drop(DropReason::HostUnreachable));
    assert_adds_up(&node);
}

#[test]
fn an_error_about_a_packet_from_a_peer_goes_to_that_peer() {
    let mut node = node(1, "vxlan");
    let (verdict, _) = from_peer(
        &mut node,
        2,
        &peer_frame(&ping(pod(2, 2), pod(1, 77), 9, 10)),
    );
    assert_eq!(verdict, Verdict::Drop(DropReason::HostUnreachable));
    let errors = outputs(&mut node);
    assert!(matches!(
        errors[..],
        [(Verdict::Peer { id: PeerId(2), .. }, _)]
    ));
    assert_eq!(icmp_of(&errors[0].1[8..]).2, Icmpv4Message::DstUnreachable);
}

#[test]
fn what_may_be_fragmented_is() {
    let mut node = node(1, "udp");
    let packet = ping(pod(1, 2), pod(2, 2), 64, 3000);
    assert_eq!(
        from_pod(&mut node, &pod_frame(&packet)).0,
        Verdict::Consumed
    );
    let pieces = outputs(&mut node);
    assert_eq!(pieces.len(), 3);
    let mut whole = Vec::new();
    for (verdict, piece) in &pieces {
        assert!(matches!(verdict, Verdict::Peer { .. }) && piece.len() <= 1450);
        let ip = Ipv4Packet::new_checked(&piece[..]).unwrap();
        assert_eq!(
            (usize::from(ip.frag_offset()), ip.hop_limit()),
            (whole.len(), 63)
        );
        whole.extend_from_slice(ip.payload());
    }
    assert_eq!(whole, packet[20..]);
    assert_adds_up(&node);
}

#[test]
fn an_unguarded_pod_is_asked_for_and_packets_wait() {
    let mut node = bare_node(1, "vxlan");
    node.attach(POD_PORT, attachment(1, 2, false));
    node.attach(OTHER_PORT, attachment(1, 3, false));
    let packet = ping(pod(1, 2), pod(1, 50), 64, 10);
    assert_eq!(
        from_pod(&mut node, &pod_frame(&packet)).0,
        Verdict::Consumed
    );
    let asked = outputs(&mut node);
    assert_eq!(asked[0].0, Verdict::Flood { except: None });
    assert_eq!(
        EthernetFrame::new_unchecked(&asked[0].1).ethertype(),
        EthernetProtocol::Arp
    );

    let second = EthernetAddress([2, 9, 9, 9, 9, 9]);
    let reply = frame::write_arp(
        ArpOperation::Reply,
        (second, pod(1, 50)),
        (GATEWAY_MAC, pod(1, 1)),
    );
    let (verdict, _) = through(&reply, |packet| node.from_port(NOW, OTHER_PORT, packet));
    assert_eq!(verdict, Verdict::Consumed);
    let released = outputs(&mut node);
    assert_eq!(released.len(), 1);
    assert_eq!(released[0].0, Verdict::Port(OTHER_PORT));
    assert_eq!(&released[0].1[..6], second.as_bytes());

    // Once stale it is asked, alone, and packets go on meanwhile.
    let later = NOW + crate::datapath::neighbour::REACHABLE;
    let (verdict, _) = through(&pod_frame(&packet), |packet| {
        node.from_port(later, POD_PORT, packet)
    });
    assert_eq!(verdict, Verdict::Port(OTHER_PORT));
    let probes = outputs(&mut node);
    assert_eq!(probes.len(), 1);
    assert_eq!(probes[0].0, Verdict::Port(OTHER_PORT));
    assert_eq!(&probes[0].1[..6], second.as_bytes());
    through(&reply, |packet| node.from_port(later, OTHER_PORT, packet));

    // Nobody answers for another one: three requests, then host unreachable.
    from_pod(&mut node, &pod_frame(&ping(pod(1, 2), pod(1, 51), 64, 10)));
    let mut seen = outputs(&mut node);
    while seen.len() < 4 {
        let now = node.poll_at();
        assert!(now < NOW + Duration::from_secs(9));
        node.handle_timeout(now);
        seen.extend(outputs(&mut node));
    }
    assert_eq!(icmp_of(&seen[3].1).2, Icmpv4Message::DstUnreachable);
    assert_eq!(node.counters().dropped_for(DropReason::HostUnreachable), 1);
    assert_adds_up(&node);
}

#[test]
fn bad_frames_from_a_pod_are_dropped_for_the_right_reason() {
    use DropReason as Why;
    let good = ping(pod(1, 2), pod(2, 2), 64, 30);
    let with = |at: usize, value: u8| {
        let mut packet = good.clone();
        packet[at] = value;
        pod_frame(&packet)
    };
    let arp = |mac, address| {
        frame::write_arp(
            ArpOperation::Request,
            (mac, address),
            (EthernetAddress::BROADCAST, pod(1, 1)),
        )
    };
    let mut lying_arp = arp(EthernetAddress([2; 6]), pod(1, 2));
    lying_arp[6..12].copy_from_slice(pod_mac(1, 2).as_bytes());
    let source = |address: [u8; 4]| pod_frame(&ping(address.into(), pod(2, 2), 9, 0));
    let from_mac = |mac| ethernet(mac, GATEWAY_MAC, 0x0800, &good);
    let mut cases = vec![
        (from_mac(EthernetAddress::BROADCAST), Why::SourceMacGroup),
        (
            from_mac(EthernetAddress([1, 0, 0x5e, 0, 0, 1])),
            Why::SourceMacGroup,
        ),
        (from_mac(GATEWAY_MAC), Why::SourceMacOwn),
        (from_mac(vtep(1).get()), Why::SourceMacOwn),
        (from_mac(pod_mac(1, 3)), Why::SourceMacSpoofed),
        (lying_arp.to_vec(), Why::SourceMacSpoofed),
        (
            arp(pod_mac(1, 2), pod(1, 3)).to_vec(),
            Why::SourceAddressSpoofed,
        ),
        (
            arp(pod_mac(1, 2), pod(1, 1)).to_vec(),
            Why::SourceAddressSpoofed,
        ),
        (source([10, 244, 1, 3]), Why::SourceAddressSpoofed),
        (source([10, 244, 2, 2]), Why::SourceAddressSpoofed),
        (source([224, 0, 0, 1]), Why::SourceAddressInvalid),
        (source([255; 4]), Why::SourceAddressInvalid),
        (source([127, 0, 0, 1]), Why::SourceAddressInvalid),
        (source([0; 4]), Why::SourceAddressInvalid),
        (with(0, 0x65), Why::Ipv4Version),
        (with(0, 0x44), Why::Ipv4HeaderLen),
        (with(2, 0xff), Why::Ipv4TotalLen),
        (with(3, 19), Why::Ipv4TotalLen),
        (with(8, 63), Why::Ipv4Checksum),
        (
            pod_frame(&ping(pod(1, 2), Ipv4Addr::new(224, 0, 0, 9), 9, 0)),
            Why::DestinationNotUnicast,
        ),
        (
            pod_frame(&ping(pod(1, 2), Ipv4Addr::new(127, 0, 0, 1), 9, 0)),
            Why::DestinationNotUnicast,
        ),
        (
            pod_frame(&ping(pod(1, 2), pod(1, 255), 9, 0)),
            Why::DestinationNotUnicast,
        ),
        (
            ethernet(pod_mac(1, 2), GATEWAY_MAC, 0x86dd, &[59; 60]),
            Why::Ipv6Version,
        ),
        (
            ethernet(pod_mac(1, 2), GATEWAY_MAC, 0x8100, &[0; 60]),
            Why::EtherTypeUnsupported,
        ),
        (
            ethernet(pod_mac(1, 2), pod_mac(1, 2), 0x0800, &good),
            Why::Hairpin,
        ),
    ];
    for len in 0..14 {
        cases.push((pod_frame(&good)[..len].to_vec(), Why::FrameTooShort));
    }
    for len in 14..34 {
        cases.push((pod_frame(&good)[..len].to_vec(), Why::Ipv4TooShort));
    }
    for len in 34..64 {
        cases.push((pod_frame(&good)[..len].to_vec(), Why::Ipv4TotalLen));
    }
    let advertisement = {
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2(pod_mac(1, 2).0, [0x33, 0x33, 0, 0, 0, 1])
            .ipv6(
                [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
                [0xff; 16],
                255,
            )
            .icmpv6_raw(134, 0, [0; 4])
            .write(&mut bytes, &[0; 8])
            .unwrap();
        bytes
    };
    cases.push((advertisement, Why::RouterAdvertisement));

    for (frame, reason) in cases {
        let mut node = node(1, "vxlan");
        let (verdict, _) = from_pod(&mut node, &frame);
        assert_eq!(verdict, Verdict::Drop(reason), "{frame:02x?}");
        assert_eq!(node.counters().dropped_for(reason), 1);
        assert!(outputs(&mut node).is_empty(), "{reason:?} is not answered");
        assert_adds_up(&node);
    }
    let mut node = node(1, "vxlan");
    let (verdict, _) = through(&pod_frame(&good), |p| node.from_port(NOW, PortId(9), p));
    assert_eq!(verdict, Verdict::Drop(Why::UnknownPort));
}

#[test]
fn a_lease_within_another_is_its_own_holders_alone() {
    let mut node = node(1, "udp");
    for (id, subnet, host) in [
        (5, "10.244.0.0/16", 5),
        (6, "10.244.2.128/25", 6),
        (7, "10.244.7.0/24", 2),
    ] {
        node.set_peer(Peer {
            id: PeerId(id),
            subnet: subnet.parse().unwrap(),
            address: underlay(host).into(),
            vtep_mac: None,
            checksums: Checksums::Complete,
            multicast: false,
            wireguard: None,
        });
    }
    for (host, source, is_taken) in [
        (5, pod(9, 2), true),
        (5, pod(2, 2), false),
        (5, pod(7, 2), false),
        (5, pod(1, 2), false),
        (2, pod(2, 2), true),
        (2, pod(7, 2), true),
        (2, pod(2, 200), false),
        (2, pod(9, 2), false),
        (6, pod(2, 200), true),
        (6, pod(2, 2), false),
    ] {
        let (verdict, _) = from_peer(&mut node, host, &ping(source, pod(1, 3), 9, 0));
        let expected = match is_taken {
            true => Verdict::Port(OTHER_PORT),
            false => Verdict::Drop(DropReason::SourceNotInLease),
        };
        assert_eq!(verdict, expected, "{source} from {host}");
    }
}

/// All leases have one length here, so that what is known of a peer spares the route table.
#[test]
fn of_two_peers_with_one_lease_the_later_one_has_it() {
    let mut node = node(1, "udp");
    let holder = |node: &mut Node| {
        [2, 3, 4].map(|host| {
            let (verdict, _) = from_peer(node, host, &ping(pod(2, 2), pod(1, 3), 9, 0));
            verdict == Verdict::Port(OTHER_PORT)
        })
    };
    assert_eq!(holder(&mut node), [true, false, false]);
    node.set_peer(peer(3, "10.244.2.0/24"));
    assert_eq!(holder(&mut node), [false, true, false]);
    node.set_peer(peer(4, "10.244.2.77/24"));
    assert_eq!(holder(&mut node), [false, false, true]);
    node.remove_peer(PeerId(4));
    assert_eq!(holder(&mut node), [true, false, false]);
    node.set_peer(peer(2, "10.244.9.0/24"));
    assert_eq!(holder(&mut node), [false, true, false]);
    node.remove_peer(PeerId(3));
    assert_eq!(holder(&mut node), [false, false, false]);
}

/// A neighbour advertisement for `target` from `source`, or a solicitation if that is `::`.
fn neighbour_message(mac: EthernetAddress, source: &str, target: &str) -> Vec<u8> {
    let [source, target] = [source, target].map(|it| it.parse::<std::net::Ipv6Addr>().unwrap());
    let (kind, group) = match source.is_unspecified() {
        true => (135, ndp::solicited_node(target)),
        false => (136, ndp::ALL_NODES),
    };
    let mut packet = vec![0x60, 0, 0, 0, 0, 24, 58, 255];
    packet.extend(source.octets());
    packet.extend(group.octets());
    packet.extend([kind, 0, 0, 0, 0x20, 0, 0, 0]);
    packet.extend(target.octets());
    muslin_encap::ip::v6::fill_icmp_checksum(&mut packet, muslin_encap::ip::v6::HEADER_LEN);
    ethernet(mac, ndp::multicast_mac(group), 0x86dd, &packet)
}

#[test]
fn a_pod_does_not_take_another_ones_link_local_address() {
    let mut node = node(1, "vxlan");
    let (one, two) = ((POD_PORT, pod_mac(1, 2)), (OTHER_PORT, pod_mac(1, 3)));
    let send = |node: &mut Node, from: (PortId, EthernetAddress), source: &str, target: &str| {
        let frame = neighbour_message(from.1, source, target);
        through(&frame, |packet| node.from_port(NOW, from.0, packet)).0
    };
    let passed = |port| Verdict::Flood { except: Some(port) };
    let taken = Verdict::Drop(DropReason::LinkLocalTaken);
    // One that is made of a MAC address is its holder's, whoever speaks first.
    let of_two = "fe80::858:aff:fef4:103";
    assert_eq!(send(&mut node, one, "fe80::2", of_two), taken);
    assert_eq!(send(&mut node, one, of_two, of_two), taken);
    assert_eq!(send(&mut node, one, "::", of_two), taken);
    assert_eq!(send(&mut node, two, of_two, of_two), passed(OTHER_PORT));
    // Others are of who asks first whether anybody has them.
    assert_eq!(send(&mut node, two, "::", "fe80::77"), Verdict::Consumed);
    for (source, target) in [
        ("fe80::77", "fe80::77"),
        ("fe80::2", "fe80::77"),
        ("::", "fe80::77"),
    ] {
        assert_eq!(
            send(&mut node, one, source, target),
            taken,
            "{source} {target}"
        );
        assert_eq!(
            send(&mut node, two, source, target),
            match source {
                // It was the first to have this one, too.
                "fe80::2" => taken,
                // Nobody else can have it, so that nobody else is asked.
                "::" => Verdict::Consumed,
                _ => passed(OTHER_PORT),
            }
        );
    }
    assert_eq!(node.counters().dropped_for(DropReason::LinkLocalTaken), 7);
    // What another worker's node has heard counts here.
    node.learn_from_sibling(NOW, POD_PORT, &neighbour_message(one.1, "::", "fe80::88"));
    assert_eq!(send(&mut node, two, "::", "fe80::88"), taken);
    // It is free again when the pod has gone.
    node.detach(OTHER_PORT);
    assert_eq!(send(&mut node, one, "::", "fe80::77"), Verdict::Consumed);
    assert_adds_up(&node);
}

#[test]
fn flannels_udp_format_comes_from_the_tunnels_port() {
    let from = |node: &mut Node, source: &str, datagram: &[u8]| {
        let source = source.parse().unwrap();
        through(datagram, |packet| node.from_underlay(NOW, source, packet)).0
    };
    let packet = ping(pod(2, 2), pod(1, 3), 9, 0);
    let mut udp = node(1, "udp");
    let foreign = Verdict::Drop(DropReason::TunnelPort);
    for port in [1, 8471, 8473, 40_000] {
        let source = format!("192.168.0.2:{port}");
        assert_eq!(from(&mut udp, &source, &packet), foreign, "{port}");
    }
    assert_eq!(
        udp.peers().next().unwrap().heard,
        None,
        "that was not the peer"
    );
    let delivered = Verdict::Port(OTHER_PORT);
    assert_eq!(from(&mut udp, "192.168.0.2:8472", &packet), delivered);
    assert_adds_up(&udp);
    // VXLAN's source port spreads flows (RFC 7348 section 5).
    let mut spread = node(1, "vxlan");
    let datagram = peer_frame(&packet);
    assert_eq!(from(&mut spread, "192.168.0.2:40000", &datagram), delivered);
    let open = NodeConfig {
        guard: guard::Policy { peers: false },
        ..config(1, "udp")
    };
    let mut open = observed(open).unwrap();
    open.attach(OTHER_PORT, attachment(1, 3, true));
    assert_eq!(from(&mut open, "192.168.0.2:40000", &packet), delivered);
}

#[test]
fn bad_datagrams_are_dropped_for_the_right_reason() {
    use DropReason as Why;
    let good = ping(pod(2, 2), pod(1, 2), 64, 30);
    let inner = |source, destination, kind| vxlan(1, &ethernet(source, destination, kind, &good));
    let (theirs, ours) = (vtep(2).get(), vtep(1).get());
    let packet = |source: Ipv4Addr, destination| peer_frame(&ping(source, destination, 9, 0));
    let mut no_vni = peer_frame(&good);
    no_vni[0] = 0;
    let mut cases = vec![
        (no_vni, Why::VxlanNoVni),
        (vxlan(2, &peer_frame(&good)[8..]), Why::UnknownVni),
        (inner(ours, ours, 0x0800), Why::SourceMacOwn),
        (
            inner(EthernetAddress::BROADCAST, ours, 0x0800),
            Why::SourceMacGroup,
        ),
        (
            inner(theirs, EthernetAddress::BROADCAST, 0x0800),
            Why::DestinationMacForeign,
        ),
        (
            inner(theirs, pod_mac(1, 2), 0x0800),
            Why::DestinationMacForeign,
        ),
        (inner(theirs, ours, 0x86dd), Why::EtherTypeUnsupported),
        (packet(pod(1, 3), pod(1, 2)), Why::SourceNotInLease),
        (packet(pod(3, 2), pod(1, 2)), Why::SourceNotInLease),
        (
            packet(Ipv4Addr::new(8, 8, 8, 8), pod(1, 2)),
            Why::SourceNotInLease,
        ),
        (
            packet(Ipv4Addr::new(224, 0, 0, 1), pod(1, 2)),
            Why::SourceAddressInvalid,
        ),
        (
            packet(Ipv4Addr::BROADCAST, pod(1, 2)),
            Why::SourceAddressInvalid,
        ),
        (packet(pod(2, 2), pod(2, 3)), Why::TunnelToTunnel),
        (
            packet(pod(2, 2), Ipv4Addr::new(8, 8, 8, 8)),
            Why::TunnelToTunnel,
        ),
        (packet(pod(2, 2), pod(1, 255)), Why::DestinationNotUnicast),
        (
            packet(pod(2, 2), Ipv4Addr::BROADCAST),
            Why::DestinationNotUnicast,
        ),
    ];
    let whole = peer_frame(&good);
    for len in 0..8 {
        cases.push((whole[..len].to_vec(), Why::VxlanTooShort));
    }
    for inner in 0..60 {
        let reason = match inner {
            0..14 => Why::FrameTooShort,
            14..34 => Why::Ipv4TooShort,
            _ => Why::Ipv4TotalLen,
        };
        cases.push((whole[..8 + inner].to_vec(), reason));
    }
    for (datagram, reason) in cases {
        let mut node = node(1, "vxlan");
        let (verdict, _) = from_peer(&mut node, 2, &datagram);
        assert_eq!(verdict, Verdict::Drop(reason), "{datagram:02x?}");
        assert_eq!(node.counters().dropped_for(reason), 1);
        assert!(outputs(&mut node).is_empty());
        assert_adds_up(&node);
    }
    let mut vxlan = node(1, "vxlan");
    assert_eq!(
        from_peer(&mut vxlan, 9, &whole).0,
        Verdict::Drop(Why::UnknownPeer)
    );
    let mut udp = node(1, "udp");
    let lease = ping(pod(3, 2), pod(1, 2), 9, 0);
    assert_eq!(
        from_peer(&mut udp, 2, &lease).0,
        Verdict::Drop(Why::SourceNotInLease)
    );
    assert_eq!(
        from_peer(&mut udp, 2, &good[..30]).0,
        Verdict::Drop(Why::Ipv4TotalLen)
    );
}

#[test]
fn a_tunnelled_arp_request_for_the_gateway_is_answered() {
    let mut node = node(1, "vxlan");
    let ask = |target| {
        vxlan(
            1,
            &frame::write_arp(
                ArpOperation::Request,
                (vtep(2).get(), pod(2, 0)),
                (EthernetAddress::BROADCAST, target),
            ),
        )
    };
    let (verdict, answer) = from_peer(&mut node, 2, &ask(pod(1, 0)));
    assert!(matches!(verdict, Verdict::Peer { id: PeerId(2), .. }));
    let expected = frame::write_arp(
        ArpOperation::Reply,
        (vtep(1).get(), pod(1, 0)),
        (vtep(2).get(), pod(2, 0)),
    );
    assert_eq!(answer, vxlan(1, &expected));
    let (verdict, _) = from_peer(&mut node, 2, &ask(pod(1, 2)));
    assert_eq!(verdict, Verdict::Drop(DropReason::DestinationMacForeign));
}

#[test]
fn a_peer_that_goes_takes_its_route_with_it() {
    let mut node = node(1, "udp");
    let frame = pod_frame(&ping(pod(1, 2), pod(2, 2), 64, 0));
    assert!(matches!(
        from_pod(&mut node, &frame).0,
        Verdict::Peer { .. }
    ));
    // The lease moves to another node before the old one's end is heard of.
    let subnet = "10.244.2.0/24".parse().unwrap();
    node.set_peer(Peer {
        id: PeerId(7),
        subnet,
        address: underlay(7).into(),
        vtep_mac: None,
        checksums: Checksums::Complete,
        multicast: false,
        wireguard: None,
    });
    assert!(node.remove_peer(PeerId(2)));
    assert!(matches!(
        from_pod(&mut node, &frame).0,
        Verdict::Peer { id: PeerId(7), .. }
    ));
    assert_eq!(
        from_peer(&mut node, 2, &[]).0,
        Verdict::Drop(DropReason::UnknownPeer)
    );
    assert!(node.remove_peer(PeerId(7)));
    assert_eq!(
        from_pod(&mut node, &frame).0,
        Verdict::Drop(DropReason::NoRoute)
    );
    assert!(node.detach(POD_PORT));
    assert_eq!(
        from_pod(&mut node, &frame).0,
        Verdict::Drop(DropReason::UnknownPort)
    );
}

#[test]
fn icmp_errors_are_rate_limited() {
    let mut node = node(1, "vxlan");
    let frame = pod_frame(&ping(pod(1, 2), pod(2, 2), 1, 0));
    for _ in 0..200 {
        from_pod(&mut node, &frame);
    }
    assert_eq!(outputs(&mut node).len(), 50);
    // But path MTU discovery does not fail because somebody else uses the errors up.
    let mut big = ping(pod(1, 2), pod(2, 2), 64, 1500);
    set_dont_fragment(&mut big, true);
    from_pod(&mut node, &pod_frame(&big));
    assert_eq!(outputs(&mut node).len(), 1);
    assert_adds_up(&node);
}

#[test]
fn the_gateway_answers_in_pieces_that_add_up() {
    let mut config = bare_node(1, "udp").config;
    config.mtu = Mtu::MIN;
    let mut node = observed(config).unwrap();
    node.attach(POD_PORT, attachment(1, 2, true));
    let mut udp = Vec::new();
    PacketBuilder::ipv4(pod(1, 2).octets(), pod(1, 1).octets(), 9)
        .udp(1, 2)
        .write(&mut udp, &[7; 900])
        .unwrap();
    let mut idents = std::collections::HashSet::new();
    // The second answer is shorter than the one before, which must leave no trace in it.
    for (request, expected) in [
        (
            ping(pod(1, 2), pod(1, 1), 64, 4000),
            Icmpv4Message::EchoReply,
        ),
        (
            ping(pod(1, 2), pod(1, 1), 64, 2000),
            Icmpv4Message::EchoReply,
        ),
        (udp, Icmpv4Message::DstUnreachable),
    ] {
        from_pod(&mut node, &pod_frame(&request));
        let mut whole = Vec::new();
        for (_, frame) in outputs(&mut node) {
            let piece = ip_of(&frame);
            assert!(frame.len() <= frame::HEADER_LEN + 68);
            assert_eq!(usize::from(piece.frag_offset()), whole.len());
            assert!(!idents.contains(&piece.ident()) && !piece.dont_frag());
            whole.extend_from_slice(piece.payload());
            if !piece.more_frags() {
                idents.insert(piece.ident());
            }
        }
        let icmp = Icmpv4Packet::new_checked(&whole[..]).unwrap();
        assert!(icmp.verify_checksum(), "{expected}");
        assert_eq!(icmp.msg_type(), expected);
        assert_adds_up(&node);
    }
}

#[test]
fn another_mtu_counts_at_once() {
    let mut node = node(1, "udp");
    let mut packet = ping(pod(1, 2), pod(2, 2), 64, 2000);
    set_dont_fragment(&mut packet, true);
    let send = |node: &mut Node| from_pod(node, &pod_frame(&packet)).0;
    for (mtu, fits) in [
        (1450, false),
        (2028, true),
        (2027, false),
        (9000, true),
        (68, false),
    ] {
        node.set_mtu(Mtu::new(mtu).unwrap());
        let verdict = send(&mut node);
        if fits {
            assert!(
                matches!(verdict, Verdict::Peer { .. }),
                "{mtu}: {verdict:?}"
            );
            continue;
        }
        assert_eq!(
            verdict,
            Verdict::Drop(DropReason::FragmentationNeeded),
            "{mtu}"
        );
        let errors = outputs(&mut node);
        let icmp = &errors[0].1[34..];
        assert_eq!(u32::from(u16::from_be_bytes([icmp[6], icmp[7]])), mtu);
    }
    assert_adds_up(&node);
}

#[test]
fn the_smallest_subnet_has_room_for_one_pod() {
    for (len, fits) in [(29, true), (30, true), (31, false), (32, false)] {
        let mut config = config(1, "vxlan");
        config.subnet = format!("10.244.1.0/{len}").parse().unwrap();
        let Ok(mut node) = observed(config) else {
            assert!(!fits, "/{len}");
            continue;
        };
        assert!(fits, "/{len}");
        node.attach(POD_PORT, attachment(1, 2, true));
        from_pod(&mut node, &pod_frame(&ping(pod(1, 2), pod(1, 1), 64, 8)));
        assert_eq!(outputs(&mut node).len(), 1, "/{len}: the gateway answers");
    }
}

#[test]
fn an_error_fits_a_small_mtu() {
    let mut config = bare_node(1, "udp").config;
    config.mtu = Mtu::MIN;
    let mut node = observed(config).unwrap();
    node.attach(POD_PORT, attachment(1, 2, true));
    from_pod(&mut node, &pod_frame(&ping(pod(1, 2), pod(2, 2), 1, 900)));
    let errors = outputs(&mut node);
    assert_eq!(errors.len(), 1);
    assert_eq!(icmp_of(&errors[0].1).2, Icmpv4Message::TimeExceeded);
    assert_eq!(errors[0].1.len(), frame::HEADER_LEN + 68);
}

fn peer(id: u8, subnet: &str) -> Peer {
    Peer {
        id: PeerId(id.into()),
        subnet: subnet.parse().unwrap(),
        address: underlay(id).into(),
        vtep_mac: Some(vtep(id)),
        checksums: Checksums::Complete,
        multicast: false,
        wireguard: None,
    }
}

#[test]
fn no_peer_takes_the_nodes_own_subnet() {
    let mut node = node(1, "udp");
    for subnet in ["10.244.1.0/24", "10.244.1.2/32"] {
        node.set_peer(peer(7, subnet));
        let (verdict, _) = from_peer(&mut node, 2, &ping(pod(2, 2), pod(1, 2), 9, 0));
        assert_eq!(verdict, Verdict::Port(POD_PORT), "{subnet}");
        node.remove_peer(PeerId(7));
        let (verdict, _) = from_peer(&mut node, 2, &ping(pod(2, 2), pod(1, 2), 9, 0));
        assert_eq!(verdict, Verdict::Port(POD_PORT), "{subnet}");
    }
}

#[test]
fn a_route_goes_with_its_peer_and_no_other() {
    let mut node = bare_node(1, "udp");
    let to = |node: &Node, address: Ipv4Addr| node.routes.lookup(address.into()).cloned();
    // A longer prefix in it does not keep a route alive.
    node.set_peer(peer(2, "10.244.2.0/24"));
    node.set_peer(peer(3, "10.244.2.0/25"));
    node.remove_peer(PeerId(2));
    assert_eq!(to(&node, pod(2, 200)), None);
    assert_eq!(to(&node, pod(2, 2)), Some(NextHop::Peer(PeerId(3))));
    // Of two peers with one subnet the one that stays has the route.
    node.set_peer(peer(4, "10.244.2.9/25"));
    node.remove_peer(PeerId(4));
    assert_eq!(to(&node, pod(2, 2)), Some(NextHop::Peer(PeerId(3))));
}

#[test]
fn peers_behind_one_address_come_and_go() {
    let behind = |id: u8, subnet: &str, address: u8| Peer {
        address: underlay(address).into(),
        ..peer(id, subnet)
    };
    let mut node = bare_node(1, "udp");
    for id in 2..6 {
        node.set_peer(behind(id, &format!("10.244.{id}.0/24"), 9));
    }
    node.attach(POD_PORT, attachment(1, 2, true));
    let assert_heard = |node: &mut Node, expected: &[u8]| {
        for id in 2..6 {
            let (verdict, _) = from_peer(node, 9, &ping(pod(id, 2), pod(1, 2), 9, 0));
            let heard = verdict == Verdict::Port(POD_PORT);
            assert_eq!(heard, expected.contains(&id), "{id}: {verdict:?}");
        }
    };
    assert_heard(&mut node, &[2, 3, 4, 5]);
    node.remove_peer(PeerId(3));
    assert_heard(&mut node, &[2, 4, 5]);
    node.remove_peer(PeerId(2));
    assert_heard(&mut node, &[4, 5]);
    node.set_peer(behind(4, "10.244.4.0/24", 8));
    assert_heard(&mut node, &[5]);
    node.set_peer(behind(3, "10.244.3.0/24", 9));
    node.remove_peer(PeerId(5));
    assert_heard(&mut node, &[3]);
    node.remove_peer(PeerId(3));
    assert_heard(&mut node, &[]);
    assert_eq!(node.counters().dropped_for(DropReason::UnknownPeer), 4);
}

#[test]
fn what_waits_for_a_peer_that_moves_is_dropped() {
    let mut node = node(1, "udp");
    from_pod(&mut node, &pod_frame(&ping(pod(1, 2), pod(2, 2), 9, 2000)));
    node.set_peer(Peer {
        address: underlay(7).into(),
        ..peer(2, "10.244.2.0/24")
    });
    let gone = Verdict::Drop(DropReason::PeerGone);
    let verdicts: Vec<_> = outputs(&mut node).into_iter().map(|(v, _)| v).collect();
    assert_eq!(verdicts, [gone, gone]);
}

#[test]
fn what_is_for_a_port_or_peer_that_has_gone_is_dropped() {
    let mut node = node(1, "udp");
    from_pod(&mut node, &pod_frame(&ping(pod(1, 2), pod(1, 1), 9, 0)));
    from_pod(&mut node, &pod_frame(&ping(pod(1, 2), pod(2, 2), 9, 2000)));
    node.detach(POD_PORT);
    node.remove_peer(PeerId(2));
    let verdicts: Vec<_> = outputs(&mut node).into_iter().map(|(v, _)| v).collect();
    assert_eq!(
        verdicts,
        [
            Verdict::Drop(DropReason::PortGone),
            Verdict::Drop(DropReason::PeerGone),
            Verdict::Drop(DropReason::PeerGone)
        ]
    );
    assert_adds_up(&node);
}

#[test]
fn a_mac_address_of_two_pods_stays_with_the_one_that_stays() {
    let mut node = node(1, "vxlan");
    let late = PortId(9);
    node.attach(late, attachment(1, 3, true));
    let packet = ping(pod(1, 2), pod(1, 3), 64, 8);
    let frame = ethernet(pod_mac(1, 2), pod_mac(1, 3), 0x0800, &packet);
    assert_eq!(from_pod(&mut node, &frame).0, Verdict::Port(late));
    node.detach(late);
    assert_eq!(from_pod(&mut node, &frame).0, Verdict::Port(OTHER_PORT));
}

#[test]
fn frames_for_the_bridge_itself_are_not_flooded() {
    let mut node = bare_node(1, "vxlan");
    node.attach(POD_PORT, attachment(1, 2, false));
    for last in 0..=0x10 {
        let group = EthernetAddress([0x01, 0x80, 0xc2, 0, 0, last]);
        let (verdict, _) = from_pod(&mut node, &ethernet(pod_mac(1, 2), group, 0x88cc, &[0; 46]));
        let expected = if last < 0x10 {
            Verdict::Drop(DropReason::ReservedGroup)
        } else {
            Verdict::Flood {
                except: Some(POD_PORT),
            }
        };
        assert_eq!(verdict, expected, "{group}");
    }
}

#[test]
fn a_guarded_pod_cannot_hide_a_packet_from_the_guard() {
    let mut node = node(1, "vxlan");
    let forged = ping(pod(1, 1), pod(1, 3), 9, 0);
    // A kernel takes a tag of VLAN 0 off and goes on with what is behind it (CVE-2021-27853).
    let tagged = [&[0, 0, 0x08, 0x00][..], &forged].concat();
    let snap = [&[0xaa, 0xaa, 3, 0, 0, 0, 0x08, 0x00][..], &forged].concat();
    for (kind, rest) in [(0x8100, &tagged), (0x88a8, &tagged), (46, &snap)] {
        let frame = ethernet(pod_mac(1, 2), pod_mac(1, 3), kind, rest);
        let (verdict, _) = from_pod(&mut node, &frame);
        assert_eq!(verdict, Verdict::Drop(DropReason::EtherTypeUnsupported));
    }
    // Nor with lengths that do not add up, which the switch would not look at.
    let mut longer = forged.clone();
    longer[2] = 0x7f;
    let frame = ethernet(pod_mac(1, 2), pod_mac(1, 3), 0x0800, &longer);
    assert_eq!(
        from_pod(&mut node, &frame).0,
        Verdict::Drop(DropReason::SourceAddressSpoofed)
    );
    // One that is not guarded may use tags, between pods.
    node.attach(POD_PORT, attachment(1, 2, false));
    let frame = ethernet(pod_mac(1, 2), pod_mac(1, 3), 0x8100, &tagged);
    assert_eq!(from_pod(&mut node, &frame).0, Verdict::Port(OTHER_PORT));
}

#[test]
fn nobody_poses_as_the_gateway_or_the_broadcast_address() {
    let mut node = bare_node(1, "vxlan");
    node.attach(POD_PORT, attachment(1, 2, false));
    for own in [pod(1, 0), pod(1, 1)] {
        let claim = frame::write_arp(
            ArpOperation::Reply,
            (pod_mac(1, 2), own),
            (EthernetAddress::BROADCAST, own),
        );
        for frame in [claim.to_vec(), pod_frame(&ping(own, pod(1, 9), 9, 0))] {
            assert_eq!(
                from_pod(&mut node, &frame).0,
                Verdict::Drop(DropReason::SourceAddressSpoofed)
            );
        }
    }
    for destination in [pod(1, 1), pod(8, 8)] {
        assert_eq!(
            from_pod(&mut node, &pod_frame(&ping(pod(1, 255), destination, 9, 0))).0,
            Verdict::Drop(DropReason::SourceAddressInvalid)
        );
    }
    assert!(outputs(&mut node).is_empty());
}

#[test]
fn a_probe_for_the_gateways_address_is_answered() {
    let mut node = node(1, "vxlan");
    let probe = |address| {
        let (all, nobody) = (EthernetAddress::BROADCAST, Ipv4Addr::UNSPECIFIED);
        frame::write_arp(
            ArpOperation::Request,
            (pod_mac(1, 2), nobody),
            (all, address),
        )
    };
    from_pod(&mut node, &probe(pod(1, 9)));
    assert_eq!(outputs(&mut node), [], "it is not the gateway's");
    from_pod(&mut node, &probe(pod(1, 1)));
    let expected = frame::write_arp(
        ArpOperation::Reply,
        (GATEWAY_MAC, pod(1, 1)),
        (pod_mac(1, 2), Ipv4Addr::UNSPECIFIED),
    );
    assert_eq!(
        outputs(&mut node),
        [(Verdict::Port(POD_PORT), expected.to_vec())]
    );
    assert_adds_up(&node);
}

#[test]
fn a_router_advertisement_is_found_behind_other_headers() {
    let mut node = bare_node(1, "vxlan");
    node.attach(POD_PORT, attachment(1, 2, false));
    let frame = |first: u8, payload: &[u8]| {
        let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, first, 255];
        packet.extend(pod_v6(2).octets());
        packet.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfb]);
        packet.extend(payload);
        let group = EthernetAddress([0x33, 0x33, 0, 0, 0, 0xfb]);
        ethernet(pod_mac(1, 2), group, 0x86dd, &packet)
    };
    let advertisement = [134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let behind = |headers: &[u8]| [headers, &advertisement].concat();
    let hidden = [
        // Destination options, and hop-by-hop options before them.
        frame(60, &behind(&[58, 0, 1, 4, 0, 0, 0, 0])),
        frame(
            0,
            &behind(&[60, 0, 1, 4, 0, 0, 0, 0, 58, 0, 1, 4, 0, 0, 0, 0]),
        ),
        frame(51, &behind(&[58, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1])),
        // The first of several fragments.
        frame(44, &behind(&[58, 0, 0, 1, 0, 0, 0, 7])),
    ];
    for frame in hidden {
        assert_eq!(
            from_pod(&mut node, &frame).0,
            Verdict::Drop(DropReason::RouterAdvertisement),
            "{frame:02x?}"
        );
    }
    // One that ends before it is known what it is about.
    let cut = frame(44, &[60, 0, 0, 1, 0, 0, 0, 7, 58, 2, 1, 4, 0, 0, 0, 0]);
    let hides = Verdict::Drop(DropReason::Ipv6ExtensionHeaders);
    assert_eq!(from_pod(&mut node, &cut).0, hides);
    let echo = [128, 0, 0, 0, 0, 0, 0, 0];
    for harmless in [
        frame(58, &echo),
        frame(60, &[&[58, 0, 1, 4, 0, 0, 0, 0][..], &echo].concat()),
        frame(44, &[58, 0, 0, 8, 0, 0, 0, 7, 134, 0]),
        frame(17, &[0; 8]),
        frame(59, &[]),
    ] {
        assert!(matches!(
            from_pod(&mut node, &harmless).0,
            Verdict::Flood { .. }
        ));
    }
}

#[test]
fn a_guarded_pod_advertises_only_itself() {
    let mut node = node(1, "vxlan");
    let mut own = attachment(1, 2, true);
    own.addresses.push(pod_v6(2).into());
    node.attach(POD_PORT, own);
    let advertise = |target: std::net::Ipv6Addr| {
        let source = pod_v6(2).to_string();
        neighbour_message(pod_mac(1, 2), &source, &target.to_string())
    };
    assert!(matches!(
        from_pod(&mut node, &advertise(pod_v6(2))).0,
        Verdict::Flood { .. }
    ));
    assert_eq!(
        from_pod(&mut node, &advertise(pod_v6(3))).0,
        Verdict::Drop(DropReason::SourceAddressSpoofed)
    );
}

fn pod_v6(host: u16) -> std::net::Ipv6Addr {
    std::net::Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, host)
}

#[test]
fn the_gateways_own_errors_count_too() {
    let mut node = node(1, "vxlan");
    let mut udp = Vec::new();
    PacketBuilder::ipv4(pod(1, 2).octets(), pod(1, 1).octets(), 9)
        .udp(1, 2)
        .write(&mut udp, &[])
        .unwrap();
    for _ in 0..100 {
        from_pod(&mut node, &pod_frame(&udp));
    }
    assert_eq!(outputs(&mut node).len(), 50);
    for _ in 0..100 {
        from_pod(&mut node, &pod_frame(&ping(pod(1, 2), pod(1, 1), 9, 0)));
    }
    assert_eq!(outputs(&mut node).len(), 100, "answers to pings do not");
}

/// A frame or datagram that is valid but for a few bytes.
fn mutated() -> impl Strategy<Value = (bool, Vec<u8>)> {
    let packet = (1u8..4, 0u8..6, 1u8..4, 0u8..6, 0u8..4, 0usize..2000).prop_map(
        |(from_node, from, to_node, to, ttl, payload)| {
            ping(pod(from_node, from), pod(to_node, to), ttl, payload)
        },
    );
    let edits = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    (any::<bool>(), packet, edits, any::<bool>()).prop_map(|(port, packet, edits, cut)| {
        let mut bytes = if port {
            pod_frame(&packet)
        } else {
            peer_frame(&packet)
        };
        for (at, value) in edits {
            let at = at.index(bytes.len().min(70));
            bytes[at] = value;
        }
        if cut {
            bytes.truncate(bytes.len() / 2);
        }
        (port, bytes)
    })
}

proptest! {
    #[test]
    fn nothing_goes_back_to_its_sender_and_the_counters_add_up(
        inputs in proptest::collection::vec(mutated(), 1..40),
        guarded: bool,
    ) {
        let mut node = node(1, "vxlan");
        node.attach(POD_PORT, attachment(1, 2, guarded));
        node.set_egress(Some("10.244.0.0/16".parse().unwrap()));
        for (i, (port, bytes)) in inputs.iter().enumerate() {
            let now = NOW + Duration::from_millis(300 * i as u64);
            node.handle_timeout(now);
            let (verdict, packet) = through(bytes, |packet| if *port {
                node.from_port(now, POD_PORT, packet)
            } else {
                node.from_underlay(now, underlay(2).into(), packet)
            });
            match verdict {
                Verdict::Port(to) => prop_assert!(!*port || to != POD_PORT || bytes[..6] == GATEWAY_MAC.0),
                Verdict::Flood { except } => prop_assert_eq!(except, port.then_some(POD_PORT)),
                Verdict::Peer { .. } | Verdict::Uplink { .. } => prop_assert!(*port),
                Verdict::Egress => {
                    let to = Ipv4Packet::new_unchecked(&packet).dst_addr();
                    prop_assert!(*port || [pod(1, 0), pod(1, 1)].contains(&to));
                }
                Verdict::Host => prop_assert!(false, "there is no host interface"),
                Verdict::Consumed | Verdict::Drop(_) => {}
            }
            outputs(&mut node);
            assert_adds_up(&node);
        }
    }

    #[test]
    fn random_bytes_are_harmless(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        for format in ["vxlan", "udp"] {
            let mut node = node(1, format);
            from_pod(&mut node, &bytes);
            from_peer(&mut node, 2, &bytes);
            outputs(&mut node);
            assert_adds_up(&node);
        }
    }
}

#[test]
fn a_large_frame_finds_room() {
    let mut node = node(1, "vxlan");
    let packet = ping(pod(1, 2), pod(2, 2), 64, 65_535 - 28);
    assert_eq!(
        from_pod(&mut node, &pod_frame(&packet)).0,
        Verdict::Consumed
    );
    assert_eq!(outputs(&mut node).len(), 47);
}
