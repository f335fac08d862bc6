//! Turns of ports, what they may have flooded, and how fast they may be.

use std::sync::Arc;

use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};

use super::*;
use crate::datapath::rate::RateLimit;
use crate::datapath::work::TURN;

/// How many frames of this kind a port has in one turn.
fn frames_of_a_turn(node: &mut Node, frame: &[u8], offload: Header) -> usize {
    node.begin_turn(POD_PORT);
    let mut count = 0;
    while node.goes_on(POD_PORT) {
        let mut storage = vec![0; HEADROOM + frame::MAX_LEN];
        storage[HEADROOM..HEADROOM + frame.len()].copy_from_slice(frame);
        let packet = PacketBuf::new(&mut storage, HEADROOM, frame.len()).unwrap();
        node.from_port(NOW, POD_PORT, &mut packet.with_offload(offload));
        count += 1;
        outputs(node);
    }
    count
}

fn udp(destination: Ipv4Addr, payload: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(pod(1, 2).octets(), destination.octets(), 64)
        .udp(5000, 9)
        .write(&mut packet, &vec![7; payload])
        .unwrap();
    packet
}

fn udp_to_outside(payload: usize) -> Vec<u8> {
    let packet = udp([192, 0, 2, 1].into(), payload);
    ethernet(pod_mac(1, 2), GATEWAY_MAC, 0x0800, &packet)
}

fn train(size: u16) -> Header {
    Header {
        checksum: Checksum::Partial {
            start: 34,
            offset: 6,
        },
        gso: Some(Gso {
            kind: GsoKind::Udp,
            size,
            ecn: false,
        }),
        hdr_len: 42,
    }
}

#[test]
fn a_pod_sends_and_receives_no_faster_than_it_may() {
    let mut node = node(1, "vxlan");
    let rates = Rates {
        from_pod: RateLimit::new(8_000_000, 8_000).map(Arc::new),
        to_pod: None,
    };
    let attach = |node: &mut Node, port, host, rates| {
        let mut attachment = attachment(1, host, true);
        attachment.rates = rates;
        node.attach(port, attachment);
    };
    attach(&mut node, POD_PORT, 2, rates);
    let frame = udp(pod(1, 3), 958);
    let frame = ethernet(pod_mac(1, 2), pod_mac(1, 3), 0x0800, &frame);
    assert_eq!(frame.len(), 1000);
    // What has come is taken, and paid for by a pause.
    for pause in [None, None, Some(Duration::from_millis(1))] {
        assert_eq!(node.pause(NOW, POD_PORT), pause);
        let (verdict, _) = from_pod(&mut node, &frame);
        assert_eq!(verdict, Verdict::Port(OTHER_PORT));
    }
    let later = NOW + Duration::from_millis(2);
    assert_eq!(node.pause(later, POD_PORT), None);
    assert_eq!(node.pause(NOW, OTHER_PORT), None);

    let rates = Rates {
        from_pod: None,
        to_pod: RateLimit::new(8_000_000, 8_000).map(Arc::new),
    };
    attach(&mut node, POD_PORT, 2, Rates::default());
    attach(&mut node, OTHER_PORT, 3, rates);
    let routed = ethernet(pod_mac(1, 2), GATEWAY_MAC, 0x0800, &frame[14..]);
    for frame in [&frame, &routed] {
        assert_eq!(from_pod(&mut node, frame).0, Verdict::Port(OTHER_PORT));
    }
    for frame in [&frame, &routed] {
        let (verdict, _) = from_pod(&mut node, frame);
        assert_eq!(verdict, Verdict::Drop(DropReason::RateExceeded));
    }
    node.detach(OTHER_PORT);
    assert_eq!(node.limited, 0);
}

#[test]
fn a_turn_is_work_and_not_frames() {
    let mut node = node(1, "vxlan");
    node.set_egress(Some("10.244.0.0/16".parse().unwrap()));
    let small = udp_to_outside(10);
    let singly = frames_of_a_turn(&mut node, &small, Header::default());
    assert!((50..70).contains(&singly), "{singly}");
    let large = udp_to_outside(60_000);
    let whole = frames_of_a_turn(&mut node, &large, train(30_000));
    assert!((6..10).contains(&whole), "{whole}");
    let cut = frames_of_a_turn(&mut node, &large, train(500));
    assert!(cut < whole, "{cut} frames of 120 datagrams, {whole} of two");
}

#[test]
fn what_is_copied_to_all_counts_as_often() {
    let mut node = node(1, "vxlan");
    for host in 10..160 {
        node.attach(PortId(host.into()), attachment(1, host, true));
    }
    let packet = ping(pod(1, 2), Ipv4Addr::BROADCAST, 1, 1000);
    let broadcast = ethernet(pod_mac(1, 2), EthernetAddress::BROADCAST, 0x0800, &packet);
    let frames = frames_of_a_turn(&mut node, &broadcast, Header::default());
    assert_eq!(frames, 1, "one is more than a turn");
    // And is waited for.
    node.begin_turn(POD_PORT);
    assert!(!node.goes_on(POD_PORT));
    node.begin_turn(OTHER_PORT);
    assert!(node.goes_on(OTHER_PORT), "another's turn is its own");
}

#[test]
fn what_the_node_says_to_a_frame_is_the_senders_work() {
    let mut node = node(1, "vxlan");
    let long = ping(pod(1, 2), pod(2, 2), 64, 30_000);
    let in_fragments = ethernet(pod_mac(1, 2), GATEWAY_MAC, 0x0800, &long);
    let frames = frames_of_a_turn(&mut node, &in_fragments, Header::default());
    // Each is 22 datagrams.
    assert!(frames <= TURN as usize / (22 * 8192) + 1, "{frames}");
}

#[test]
fn frames_that_cannot_be_read_are_work_too() {
    let mut node = node(1, "vxlan");
    node.begin_turn(POD_PORT);
    let frames = (0..1000).take_while(|_| {
        node.refuse_frame(POD_PORT, 60);
        node.goes_on(POD_PORT)
    });
    assert_eq!(frames.count(), 63);
}

#[test]
fn a_port_that_is_not_attached_has_no_turn() {
    let mut node = node(1, "vxlan");
    node.begin_turn(PortId(9));
    assert!(!node.goes_on(PortId(9)));
}

#[test]
fn a_storm_is_stopped_and_ends_with_itself() {
    let mut node = node(1, "vxlan");
    let packet = ping(pod(1, 2), Ipv4Addr::BROADCAST, 1, 1000);
    let broadcast = ethernet(pod_mac(1, 2), EthernetAddress::BROADCAST, 0x0800, &packet);
    let flooded_in = |node: &mut Node, from: Instant| {
        let verdicts = (0..100_000).map(|i| {
            let now = from + Duration::from_micros(i * 10);
            through(&broadcast, |packet| node.from_port(now, POD_PORT, packet)).0
        });
        let is_flooded = |verdict: &Verdict| match verdict {
            Verdict::Flood { .. } => true,
            Verdict::Drop(DropReason::Storm) => false,
            other => panic!("{other:?}"),
        };
        verdicts.filter(is_flooded).count()
    };
    // A burst, and a second's share of the others.
    let copies = 200_000_000 / (8192 + broadcast.len());
    let first = flooded_in(&mut node, NOW);
    assert!(
        (copies * 3 / 2 - 2..copies * 3 / 2 + 2).contains(&first),
        "{first} of {copies}"
    );
    let next = flooded_in(&mut node, NOW + Duration::from_secs(1));
    assert!(
        (copies - 2..copies + 2).contains(&next),
        "{next} of {copies}"
    );

    // Nothing else of the same pod waits, and nothing of others.
    let to_pod = ethernet(
        pod_mac(1, 2),
        pod_mac(1, 3),
        0x0800,
        &ping(pod(1, 2), pod(1, 3), 1, 10),
    );
    let later = NOW + Duration::from_secs(2);
    assert_eq!(
        through(&to_pod, |packet| node.from_port(later, POD_PORT, packet)).0,
        Verdict::Port(OTHER_PORT)
    );
    let ask = frame::write_arp(
        ArpOperation::Request,
        (pod_mac(1, 3), pod(1, 3)),
        (EthernetAddress::BROADCAST, pod(1, 2)),
    );
    assert_eq!(
        through(&ask, |packet| node.from_port(later, OTHER_PORT, packet)).0,
        Verdict::Flood {
            except: Some(OTHER_PORT)
        }
    );
    assert_adds_up(&node);
}

#[test]
fn the_gateway_answers_during_a_storm() {
    let mut node = node(1, "vxlan");
    let ask = frame::write_arp(
        ArpOperation::Request,
        (pod_mac(1, 2), pod(1, 2)),
        (EthernetAddress::BROADCAST, pod(1, 1)),
    );
    let verdicts = std::iter::repeat_with(|| {
        let verdict = from_pod(&mut node, &ask).0;
        (verdict, outputs(&mut node).len())
    });
    let last = verdicts.take(20_000).last();
    assert_eq!(last, Some((Verdict::Drop(DropReason::Storm), 1)));
}
