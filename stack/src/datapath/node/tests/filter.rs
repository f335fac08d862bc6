//! What a filter is asked, and what becomes of packets that it does not permit.

use super::*;
use crate::datapath::filter::Direction;

/// A policy that denies UDP and TCP to one port, until some time.
#[derive(Default)]
pub(super) struct Denied {
    now: Option<Instant>,
    port: Option<(u16, Direction)>,
    until: Option<Instant>,
    pub(super) asked: Vec<(Direction, PortId)>,
}

impl Filter for Denied {
    fn at(&mut self, now: Instant) {
        self.now = Some(now);
    }

    fn permits(&mut self, direction: Direction, port: PortId, packet: &[u8]) -> bool {
        self.asked.push((direction, port));
        let Ok(ip) = Ipv4Packet::new_checked(packet) else {
            return true;
        };
        let to = ip.payload().get(2..4);
        let to = to.map(|port| u16::from_be_bytes([port[0], port[1]]));
        let is_denied = to.zip(Some(direction)) == self.port && ip.next_header() == IpProtocol::Udp;
        !is_denied || self.until <= self.now
    }
}

const OPEN: u16 = 80;
const CLOSED: u16 = 81;

fn udp(source: Ipv4Addr, destination: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(source.octets(), destination.octets(), 64)
        .udp(1000, port)
        .write(&mut bytes, b"words")
        .unwrap();
    bytes
}

/// A node with egress that denies `CLOSED` that way.
fn denying(direction: Direction) -> Node {
    let mut node = node(1, "vxlan");
    node.set_egress(Some("10.244.0.0/16".parse().unwrap()));
    let filter = node.filter_mut();
    filter.port = Some((CLOSED, direction));
    filter.until = Some(NOW + Duration::from_secs(1));
    node
}

#[test]
fn what_a_filter_denies_is_not_delivered() {
    use Direction::{FromPod, ToAll, ToPod};
    let switched = |mac: EthernetAddress| {
        move |port| ethernet(pod_mac(1, 2), mac, 0x0800, &udp(pod(1, 2), pod(1, 3), port))
    };
    let outside = Ipv4Addr::new(192, 0, 2, 1);
    let to = |destination| move |port| pod_frame(&udp(pod(1, 2), destination, port));
    type Frame<'a> = &'a dyn Fn(u16) -> Vec<u8>;
    let from_pods: [(&str, Frame<'_>, &[_]); 6] = [
        (
            "switched",
            &switched(pod_mac(1, 3)),
            &[(FromPod, POD_PORT), (ToPod, OTHER_PORT)],
        ),
        (
            "to all",
            &switched(EthernetAddress::BROADCAST),
            &[(ToAll, POD_PORT)],
        ),
        (
            "routed",
            &to(pod(1, 3)),
            &[(FromPod, POD_PORT), (ToPod, OTHER_PORT)],
        ),
        ("to a peer", &to(pod(2, 2)), &[(FromPod, POD_PORT)]),
        ("outside", &to(outside), &[(FromPod, POD_PORT)]),
        ("to the gateway", &to(pod(1, 1)), &[(FromPod, POD_PORT)]),
    ];
    let refused = Verdict::Drop(DropReason::PolicyDenied);
    for (name, frame, asked) in from_pods {
        for direction in [FromPod, ToAll, ToPod] {
            let mut node = denying(direction);
            let (verdict, _) = from_pod(&mut node, &frame(OPEN));
            assert!(!matches!(verdict, Verdict::Drop(_)), "{name}: {verdict:?}");
            assert_eq!(node.filter_mut().asked, asked, "{name}");
            let is_asked = asked.iter().any(|(asked, _)| *asked == direction);
            let (verdict, _) = from_pod(&mut node, &frame(CLOSED));
            assert_eq!(verdict == refused, is_asked, "{name}: {direction:?}");
            assert!(outputs(&mut node).is_empty(), "nobody is told");
            assert_adds_up(&node);
        }
    }
    for port in [OPEN, CLOSED] {
        let mut node = denying(ToPod);
        let expected = if port == OPEN {
            Verdict::Port(POD_PORT)
        } else {
            refused
        };
        let packet = udp(pod(2, 2), pod(1, 2), port);
        let (verdict, _) = from_peer(&mut node, 2, &peer_frame(&packet));
        assert_eq!(verdict, expected);
        let packet = udp(outside, pod(1, 2), port);
        let (verdict, _) = through(&packet, |packet| node.from_egress(NOW, packet));
        assert_eq!(verdict, expected);
        assert_eq!(node.filter_mut().asked, [(ToPod, POD_PORT); 2]);
        assert_adds_up(&node);
    }
}

#[test]
fn a_filter_knows_the_time_and_is_not_asked_about_arp() {
    let mut node = denying(Direction::FromPod);
    let frame = pod_frame(&udp(pod(1, 2), pod(2, 2), CLOSED));
    let later = NOW + Duration::from_secs(1);
    let (verdict, _) = through(&frame, |packet| node.from_port(later, POD_PORT, packet));
    assert!(matches!(verdict, Verdict::Peer { .. }));
    node.filter_mut().asked.clear();
    let question = frame::write_arp(
        ArpOperation::Request,
        (pod_mac(1, 2), pod(1, 2)),
        (EthernetAddress::BROADCAST, pod(1, 3)),
    );
    let (verdict, _) = from_pod(&mut node, &question);
    assert!(matches!(verdict, Verdict::Flood { .. }));
    assert!(node.filter_mut().asked.is_empty());
}
