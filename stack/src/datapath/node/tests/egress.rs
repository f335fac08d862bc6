//! Packets to and from addresses outside the overlay.

use super::*;
use crate::datapath::icmp::IcmpError;

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);

fn with_egress() -> Node {
    let mut node = node(1, "vxlan");
    node.set_egress(Some("10.244.0.0/16".parse().unwrap()));
    node
}

fn from_outside(node: &mut Node, packet: &[u8]) -> (Verdict, Vec<u8>) {
    through(packet, |packet| node.from_egress(NOW, packet))
}

#[test]
fn pods_packets_that_leave_the_overlay_are_for_egress() {
    let mut node = with_egress();
    let out = |destination, ttl| {
        let packet = ping(pod(1, 2), destination, ttl, 30);
        (pod_frame(&packet), packet)
    };
    let (frame, packet) = out(OUTSIDE, 64);
    assert_eq!(from_pod(&mut node, &frame), (Verdict::Egress, packet));
    let (frame, _) = out(OUTSIDE, 1);
    let expired = Verdict::Drop(DropReason::TtlExceeded);
    assert_eq!(from_pod(&mut node, &frame).0, expired);
    // Nobody has a lease for it, but it is the overlay's.
    let no_route = Verdict::Drop(DropReason::NoRoute);
    let (frame, _) = out(pod(9, 2), 64);
    assert_eq!(from_pod(&mut node, &frame).0, no_route);
    for own in [pod(1, 1), pod(1, 3), pod(2, 2)] {
        let (frame, _) = out(own, 64);
        assert_ne!(from_pod(&mut node, &frame).0, Verdict::Egress, "{own}");
    }
    node.set_egress(None);
    let (frame, _) = out(OUTSIDE, 64);
    assert_eq!(from_pod(&mut node, &frame).0, no_route);
    assert_adds_up_after(&mut node);
}

#[test]
fn tcp_and_udp_to_the_gateway_are_for_egress_and_pings_are_not() {
    let mut node = with_egress();
    let build = || PacketBuilder::ipv4(pod(1, 2).octets(), pod(1, 1).octets(), 64);
    let (mut tcp, mut udp) = (Vec::new(), Vec::new());
    let segment = build().tcp(1000, 53, 1, 1000).syn();
    segment.write(&mut tcp, &[]).unwrap();
    build().udp(1000, 53).write(&mut udp, b"question").unwrap();
    for packet in [tcp, udp] {
        let frame = pod_frame(&packet);
        assert_eq!(
            from_pod(&mut node, &frame),
            (Verdict::Egress, packet.clone())
        );
        node.set_egress(None);
        assert_eq!(from_pod(&mut node, &frame).0, Verdict::Consumed);
        assert_eq!(outputs(&mut node).len(), 1, "the gateway refuses it");
        node.set_egress(Some("10.244.0.0/16".parse().unwrap()));
    }
    let frame = pod_frame(&ping(pod(1, 2), pod(1, 1), 64, 30));
    assert_eq!(from_pod(&mut node, &frame).0, Verdict::Consumed);
    assert_eq!(outputs(&mut node).len(), 1);
    assert_adds_up_after(&mut node);
}

#[test]
fn packets_of_the_gateway_reach_pods_of_other_nodes_too() {
    let mut node = with_egress();
    for (source, expected) in [
        (pod(1, 1), true),
        (pod(1, 0), true),
        (pod(1, 2), false),
        (OUTSIDE, false),
    ] {
        let (verdict, _) = from_outside(&mut node, &ping(source, pod(2, 2), 64, 30));
        let is_sent = matches!(verdict, Verdict::Peer { .. });
        assert_eq!(is_sent, expected, "{source}: {verdict:?}");
    }
    assert_adds_up_after(&mut node);
}

#[test]
fn packets_from_outside_reach_pods_of_this_node_only() {
    let mut node = with_egress();
    let packet = ping(OUTSIDE, pod(1, 2), 64, 30);
    let (verdict, frame) = from_outside(&mut node, &packet);
    assert_eq!(verdict, Verdict::Port(POD_PORT));
    let view = EthernetFrame::new_checked(&frame).unwrap();
    assert_eq!(
        (view.src_addr(), view.dst_addr()),
        (GATEWAY_MAC, pod_mac(1, 2))
    );
    assert_eq!(view.payload(), packet);
    for (destination, reason) in [
        (pod(1, 9), DropReason::HostUnreachable),
        (pod(2, 2), DropReason::NoRoute),
        (OUTSIDE, DropReason::NoRoute),
    ] {
        let packet = ping(OUTSIDE, destination, 64, 30);
        let dropped = Verdict::Drop(reason);
        assert_eq!(from_outside(&mut node, &packet).0, dropped, "{destination}");
    }
    assert_adds_up_after(&mut node);
}

#[test]
fn nobody_outside_has_an_address_of_the_overlay_or_of_no_host() {
    let mut node = with_egress();
    for source in [
        pod(1, 2),
        pod(1, 9),
        pod(9, 9),
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::BROADCAST,
        Ipv4Addr::UNSPECIFIED,
    ] {
        let packet = ping(source, pod(1, 2), 64, 30);
        let dropped = Verdict::Drop(DropReason::SourceAddressInvalid);
        assert_eq!(from_outside(&mut node, &packet).0, dropped, "{source}");
    }
    assert_adds_up_after(&mut node);
}

#[test]
fn packets_from_outside_that_are_too_long_are_fragmented() {
    let mut node = with_egress();
    let packet = ping(OUTSIDE, pod(1, 2), 64, 3000);
    assert_eq!(from_outside(&mut node, &packet).0, Verdict::Consumed);
    let pieces = outputs(&mut node);
    assert_eq!(pieces.len(), 3);
    let payload = pieces.iter().flat_map(|(verdict, frame)| {
        assert_eq!(*verdict, Verdict::Port(POD_PORT));
        assert!(frame.len() <= 1450 + frame::HEADER_LEN);
        frame[frame::HEADER_LEN + 20..].to_vec()
    });
    assert_eq!(payload.collect::<Vec<_>>(), packet[20..]);
    assert_adds_up_after(&mut node);
}

#[test]
fn a_packet_of_the_mtu_goes_on_whole_and_a_longer_one_does_not() {
    type Way = (
        Ipv4Addr,
        Ipv4Addr,
        fn(&mut Node, &[u8]) -> (Verdict, Vec<u8>),
    );
    let ways: [Way; 3] = [
        (OUTSIDE, pod(1, 2), from_outside),
        (pod(1, 1), pod(2, 2), from_outside),
        (pod(1, 2), pod(2, 2), |node, packet| {
            from_pod(node, &pod_frame(packet))
        }),
    ];
    for (source, destination, send) in ways {
        for (len, dont_fragment) in [(1449, true), (1450, true), (1450, false)] {
            let mut node = with_egress();
            let mut packet = ping(source, destination, 64, len - 28);
            set_dont_fragment(&mut packet, dont_fragment);
            let (verdict, _) = send(&mut node, &packet);
            let is_sent = matches!(verdict, Verdict::Port(_) | Verdict::Peer { .. });
            assert!(is_sent, "{len} bytes to {destination}: {verdict:?}");
            assert_adds_up_after(&mut node);
        }
        let mut node = with_egress();
        let mut packet = ping(source, destination, 64, 1451 - 28);
        assert_eq!(send(&mut node, &packet).0, Verdict::Consumed);
        assert_eq!(outputs(&mut node).len(), 2, "to {destination}");
        set_dont_fragment(&mut packet, true);
        let too_long = Verdict::Drop(DropReason::FragmentationNeeded);
        assert_eq!(send(&mut node, &packet).0, too_long, "to {destination}");
        assert_adds_up_after(&mut node);
    }
}

fn assert_adds_up_after(node: &mut Node) {
    outputs(node);
    assert_adds_up(node);
}

#[test]
fn errors_from_outside_have_their_senders_address() {
    let router = Ipv4Addr::new(198, 51, 100, 1);
    let mut node = with_egress();
    let offender = ping(pod(1, 2), OUTSIDE, 1, 30);
    // Nobody outside can be in the overlay, or everywhere.
    for (from, source) in [
        (router, router),
        (pod(1, 3), pod(1, 1)),
        (pod(9, 9), pod(1, 1)),
        (Ipv4Addr::BROADCAST, pod(1, 1)),
        (Ipv4Addr::LOCALHOST, pod(1, 1)),
    ] {
        node.forward_icmp_error(NOW, from.into(), IcmpError::TimeExceeded, &offender);
        let outputs = outputs(&mut node);
        assert_eq!(outputs.len(), 1, "{from}");
        let (verdict, frame) = &outputs[0];
        assert_eq!(*verdict, Verdict::Port(POD_PORT));
        let view = Ipv4Packet::new_checked(&frame[frame::HEADER_LEN..]).unwrap();
        assert_eq!(
            (view.src_addr(), view.dst_addr()),
            (source, pod(1, 2)),
            "{from}"
        );
        assert_eq!(view.payload()[..2], [11, 0]);
    }
    assert_adds_up_after(&mut node);
}
