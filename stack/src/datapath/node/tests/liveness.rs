//! When a peer was last heard, and how it is asked for a sign of life.

use super::*;
use crate::datapath::peer::PeerState;

fn peer_of(node: &Node) -> PeerState {
    node.peers().next().unwrap()
}

/// Carries what a node sends by itself to its only peer, and nothing else.
fn carry(from: &mut Node, (number, to): (u8, &mut Node), now: Instant) -> usize {
    let sent = outputs(from);
    for (verdict, datagram) in &sent {
        assert!(matches!(verdict, Verdict::Peer { .. }), "{verdict:?}");
        let source = underlay(number).into();
        let (verdict, _) = through(datagram, |packet| to.from_underlay(now, source, packet));
        assert_eq!(verdict, Verdict::Consumed);
    }
    sent.len()
}

#[test]
fn a_peer_that_is_probed_answers_and_both_have_heard() {
    for format in ["vxlan", "udp"] {
        let (mut one, mut two) = (node(1, format), node(2, format));
        assert_eq!(peer_of(&one).heard, None);
        let now = Instant::from_millis(70_250);
        one.probe(now, PeerId(2));
        assert_eq!(carry(&mut one, (1, &mut two), now), 2);
        assert_eq!(peer_of(&two).heard, Some(now));
        let later = Instant::from_millis(70_500);
        assert_eq!(carry(&mut two, (2, &mut one), later), 2);
        assert_eq!(peer_of(&one).heard, Some(later));
        // An answer is not answered.
        assert_eq!(outputs(&mut one), []);
        assert_adds_up(&one);
        assert_adds_up(&two);
    }
}

#[test]
fn a_probe_is_for_who_holds_the_lease_and_can_be_reached() {
    let mut node = node(1, "vxlan");
    node.probe(NOW, PeerId(9));
    assert_eq!(outputs(&mut node), []);
    node.probe(NOW, PeerId(2));
    let asked = outputs(&mut node);
    let asked: Vec<_> = asked
        .iter()
        .map(|(verdict, datagram)| {
            assert!(matches!(verdict, Verdict::Peer { id: PeerId(2), .. }));
            let packet = ip_of(&datagram[8..]);
            let echo = Icmpv4Packet::new_checked(packet.payload()).unwrap();
            assert!(packet.verify_checksum() && echo.verify_checksum());
            assert_eq!(echo.msg_type(), Icmpv4Message::EchoRequest);
            (packet.src_addr(), packet.dst_addr())
        })
        .collect();
    assert_eq!(asked, [(pod(1, 1), pod(2, 0)), (pod(1, 1), pod(2, 1))]);

    // Without a tunnel and an uplink there is no way to it, and nothing is lost.
    let mut cut_off = super::node(1, "host-gw");
    cut_off.probe(NOW, PeerId(2));
    assert_eq!(outputs(&mut cut_off), []);
    assert_eq!(
        cut_off
            .counters()
            .drops()
            .map(|(_, lost)| lost)
            .sum::<u64>(),
        0
    );
}

#[test]
fn what_was_heard_belongs_to_the_host_that_said_it() {
    let mut node = node(1, "udp");
    let now = Instant::from_secs(5);
    let packet = ping(pod(2, 2), pod(1, 2), 9, 0);
    through(&packet, |packet| {
        node.from_underlay(now, underlay(2).into(), packet)
    });
    let known = peer_of(&node);
    assert_eq!(known.heard, Some(now));
    node.set_peer(known.peer.clone());
    assert_eq!(peer_of(&node).heard, Some(now));
    node.set_peer(Peer {
        address: underlay(3).into(),
        ..known.peer
    });
    assert_eq!(peer_of(&node).heard, None);
    // A stranger's datagrams are nobody's.
    from_peer(&mut node, 2, &packet);
    assert_eq!(peer_of(&node).heard, None);
}
