//! Bare packets between hosts on one link, and the hosts that are looked for there.

use super::*;
use crate::datapath::peer::Path;
use crate::datapath::uplink::Uplink;

const HOST_PORT: Option<PeerId> = Some(PeerId(2));

fn host_mac(number: u8) -> EthernetAddress {
    EthernetAddress([2, 0x1a, 0, 0, 0, number])
}

fn host(number: u8) -> Ipv4Addr {
    *underlay(number).ip()
}

fn uplink(answers: bool) -> Uplink {
    Uplink {
        mac: host_mac(1),
        nets: "192.168.0.1/24".parse().unwrap(),
        mtu: Mtu::new(1500).unwrap(),
        answers,
    }
}

/// Node 1 with the pods and the peer of [`node`], on a link with that peer.
fn linked(format: &str) -> Node {
    let mut node = node(1, format);
    node.set_uplink(Some(uplink(false)));
    node
}

fn from_uplink_at(node: &mut Node, now: Instant, frame: &[u8]) -> (Verdict, Vec<u8>) {
    through(frame, |packet| node.from_uplink(now, packet))
}

fn from_uplink(node: &mut Node, frame: &[u8]) -> (Verdict, Vec<u8>) {
    from_uplink_at(node, NOW, frame)
}

/// What a host says of itself: to node 1 alone, or to all.
fn reply(mac: EthernetAddress, address: Ipv4Addr) -> Vec<u8> {
    frame::write_arp(ArpOperation::Reply, (mac, address), (host_mac(1), host(1))).to_vec()
}

fn announcement(mac: EthernetAddress, address: Ipv4Addr) -> Vec<u8> {
    let all = (EthernetAddress::BROADCAST, address);
    frame::write_arp(ArpOperation::Request, (mac, address), all).to_vec()
}

/// A bare packet from a host to node 1.
fn bare(mac: EthernetAddress, packet: &[u8]) -> Vec<u8> {
    ethernet(mac, host_mac(1), 0x0800, packet)
}

fn to_peer() -> Vec<u8> {
    pod_frame(&ping(pod(1, 2), pod(2, 2), 64, 8))
}

fn from_pod_at(node: &mut Node, now: Instant, frame: &[u8]) -> (Verdict, Vec<u8>) {
    through(frame, |packet| node.from_port(now, POD_PORT, packet))
}

/// A node that knows where the host of its peer is.
fn acquainted(format: &str) -> Node {
    let mut node = linked(format);
    let (verdict, _) = from_uplink(&mut node, &reply(host_mac(2), host(2)));
    assert_eq!(verdict, Verdict::Consumed);
    node
}

fn asked(frame: &[u8]) -> (EthernetAddress, Ipv4Addr) {
    let view = EthernetFrame::new_checked(frame).unwrap();
    let Some(smoltcp::wire::ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    }) = frame::arp(view.payload())
    else {
        panic!("{frame:?}")
    };
    assert_eq!(view.src_addr(), host_mac(1));
    assert_eq!(
        (source_hardware_addr, source_protocol_addr),
        (host_mac(1), host(1))
    );
    (view.dst_addr(), target_protocol_addr)
}

#[test]
fn a_packet_waits_for_its_next_hop_and_goes_there_bare() {
    let mut node = linked("host-gw");
    assert_eq!(from_pod(&mut node, &to_peer()).0, Verdict::Consumed);
    let out = outputs(&mut node);
    let [(Verdict::Uplink { id: None }, request)] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(asked(request), (EthernetAddress::BROADCAST, host(2)));
    from_uplink(&mut node, &reply(host_mac(2), host(2)));
    let out = outputs(&mut node);
    let [(verdict, frame)] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(*verdict, Verdict::Uplink { id: HOST_PORT });
    assert_eq!(frame[..6], host_mac(2).0);
    assert_eq!(frame[6..12], host_mac(1).0);
    let ip = ip_of(frame);
    assert_eq!((ip.dst_addr(), ip.hop_limit()), (pod(2, 2), 63));
    assert_eq!(node.peers().next().unwrap().sent.packets, 1);
    assert_adds_up(&node);
}

#[test]
fn a_bare_packet_from_its_peers_host_reaches_the_pod() {
    let mut node = acquainted("host-gw");
    let packet = ping(pod(2, 2), pod(1, 2), 64, 8);
    let (verdict, frame) = from_uplink(&mut node, &bare(host_mac(2), &packet));
    assert_eq!(verdict, Verdict::Port(POD_PORT));
    assert_eq!(ip_of(&frame).src_addr(), pod(2, 2));
    let peer = node.peers().next().unwrap();
    assert_eq!(peer.received.bytes, bare(host_mac(2), &packet).len() as u64);
    // The gateway answers by the same way.
    let echo = ping(pod(2, 2), pod(1, 1), 64, 8);
    let (verdict, _) = from_uplink(&mut node, &bare(host_mac(2), &echo));
    assert_eq!(verdict, Verdict::Consumed);
    assert_eq!(outputs(&mut node)[0].0, Verdict::Uplink { id: HOST_PORT });
    assert_adds_up(&node);
}

#[test]
fn nobody_else_on_the_link_gets_anything_through() {
    use DropReason::*;
    let mut node = acquainted("host-gw");
    let good = ping(pod(2, 2), pod(1, 2), 64, 8);
    let cases = [
        (bare(host_mac(9), &good), NextHopConflict),
        (bare(host_mac(1), &good), SourceMacOwn),
        (bare(EthernetAddress([3; 6]), &good), SourceMacGroup),
        (
            ethernet(host_mac(2), host_mac(7), 0x0800, &good),
            DestinationMacForeign,
        ),
        (
            ethernet(host_mac(2), EthernetAddress::BROADCAST, 0x0800, &good),
            DestinationMacForeign,
        ),
        (
            ethernet(host_mac(2), host_mac(1), 0x86dd, &good),
            EtherTypeUnsupported,
        ),
        (
            bare(host_mac(2), &ping(pod(3, 2), pod(1, 2), 64, 8)),
            SourceNotInLease,
        ),
        (
            bare(host_mac(2), &ping(pod(1, 3), pod(1, 2), 64, 8)),
            SourceNotInLease,
        ),
        (
            bare(host_mac(2), &ping(host(2), pod(1, 2), 64, 8)),
            SourceNotInLease,
        ),
        (
            bare(host_mac(2), &ping(pod(2, 2), pod(2, 3), 64, 8)),
            TunnelToTunnel,
        ),
        (bare(host_mac(2), &good[..19]), Ipv4TooShort),
    ];
    for (frame, reason) in cases {
        let (verdict, _) = from_uplink(&mut node, &frame);
        assert_eq!(verdict, Verdict::Drop(reason));
    }
    outputs(&mut node);
    assert_adds_up(&node);
}

/// Packets for the pod from its peer's pods, of so many lengths, and where they come out.
fn early(node: &mut Node, mac: EthernetAddress, lengths: std::ops::Range<usize>) -> Vec<Verdict> {
    let packets = lengths.map(|len| bare(mac, &ping(pod(2, 2), pod(1, 2), 64, len)));
    packets.map(|frame| from_uplink(node, &frame).0).collect()
}

#[test]
fn what_a_host_sends_before_it_is_known_waits_for_its_answer() {
    let mut node = linked("host-gw");
    let unknown = Verdict::Drop(DropReason::NextHopUnknown);
    let waits = Verdict::Consumed;
    // A stranger's wait, too, and all share four places.
    assert_eq!(early(&mut node, host_mac(9), 8..9), [waits]);
    let verdicts = early(&mut node, host_mac(2), 10..15);
    assert_eq!(verdicts, [waits, waits, waits, unknown, unknown]);
    let out = outputs(&mut node);
    assert_eq!(out.len(), 1, "one question");
    assert_eq!(asked(&out[0].1), (EthernetAddress::BROADCAST, host(2)));
    from_uplink(&mut node, &reply(host_mac(2), host(2)));
    let out = outputs(&mut node);
    let lengths = out.iter().map(|(verdict, frame)| {
        assert_eq!(*verdict, Verdict::Port(POD_PORT));
        let ip = ip_of(frame);
        assert_eq!((ip.src_addr(), ip.hop_limit()), (pod(2, 2), 63));
        ip.payload().len() - 8
    });
    assert_eq!(lengths.collect::<Vec<_>>(), [10, 11, 12]);
    let dropped = |reason| node.counters().dropped_for(reason);
    assert_eq!(dropped(DropReason::NextHopConflict), 1, "the stranger's");
    assert_eq!(dropped(DropReason::NextHopUnknown), 2);
    assert_eq!(node.peers().next().unwrap().received.packets, 3);
    assert_adds_up(&node);
    let verdicts = early(&mut node, host_mac(2), 10..11);
    assert_eq!(verdicts, [Verdict::Port(POD_PORT)]);
}

#[test]
fn what_waits_for_a_host_that_does_not_answer_is_lost() {
    for ending in ["silence", "no uplink", "no peer"] {
        let mut node = linked("host-gw");
        early(&mut node, host_mac(2), 8..10);
        match ending {
            "silence" => {
                for second in 1..=4 {
                    node.handle_timeout(NOW + Duration::from_secs(second));
                }
            }
            "no uplink" => node.set_uplink(None),
            _ => {
                node.remove_peer(PeerId(2));
                for second in 1..=4 {
                    node.handle_timeout(NOW + Duration::from_secs(second));
                }
            }
        }
        let to_pod = outputs(&mut node).into_iter();
        let to_pod = to_pod.filter(|(verdict, _)| matches!(verdict, Verdict::Port(_)));
        assert_eq!(to_pod.count(), 0, "{ending}");
        let lost = node.counters().dropped_for(DropReason::NextHopUnknown);
        assert_eq!(lost, 2, "{ending}");
        assert_adds_up(&node);
    }
}

#[test]
fn few_packets_wait_for_all_unknown_hosts_together() {
    let mut node = linked("host-gw");
    let mut waiting = 0;
    for last in 3..=30 {
        node.set_peer(Peer {
            address: underlay(last).into(),
            ..peer(last, &format!("10.244.{last}.0/24"))
        });
        for len in 0..4 {
            let packet = ping(pod(last, 2), pod(1, 2), 64, len);
            let (verdict, _) = from_uplink(&mut node, &bare(host_mac(last), &packet));
            waiting += usize::from(verdict == Verdict::Consumed);
        }
    }
    assert_eq!(waiting, 64);
    assert_adds_up(&node);
}

#[test]
fn next_hops_are_asked_for_when_their_lease_appears() {
    for peer_first in [true, false] {
        let mut node = node(1, "host-gw");
        let set_peer = |node: &mut Node| node.set_peer(peer(2, "10.244.2.0/24"));
        node.remove_peer(PeerId(2));
        if peer_first {
            set_peer(&mut node);
        }
        node.set_uplink(Some(uplink(false)));
        set_peer(&mut node);
        assert!(node.poll_at() <= NOW);
        node.handle_timeout(NOW);
        assert!(node.poll_at() > NOW);
        let out = outputs(&mut node);
        assert_eq!(out.len(), 1);
        assert_eq!(asked(&out[0].1), (EthernetAddress::BROADCAST, host(2)));
        from_uplink(&mut node, &reply(host_mac(2), host(2)));
        let verdicts = early(&mut node, host_mac(2), 8..9);
        assert_eq!(verdicts, [Verdict::Port(POD_PORT)]);
    }
}

#[test]
fn next_hops_of_a_large_link_are_asked_for_in_turn() {
    let mut node = linked("host-gw");
    for last in 3..=102 {
        node.set_peer(Peer {
            address: underlay(last).into(),
            ..peer(last, &format!("10.244.{last}.0/24"))
        });
    }
    let mut asked_at = Vec::new();
    let mut now = NOW;
    while now < NOW + Duration::from_millis(900) {
        node.handle_timeout(now);
        assert!(node.poll_at() > now);
        let out = outputs(&mut node);
        assert!(out.len() <= 16, "{} questions at once", out.len());
        asked_at.extend(out.iter().map(|(_, frame)| asked(frame).1));
        now = node.poll_at();
    }
    let first: std::collections::BTreeSet<_> = asked_at.iter().copied().collect();
    assert_eq!(
        (asked_at.len(), first.len()),
        (101, 101),
        "each of them once"
    );
    // A packet for one does not wait for its turn.
    let mut node = linked("host-gw");
    assert_eq!(from_pod(&mut node, &to_peer()).0, Verdict::Consumed);
    let out = outputs(&mut node);
    assert_eq!(asked(&out[0].1), (EthernetAddress::BROADCAST, host(2)));
    node.handle_timeout(NOW);
    assert_eq!(outputs(&mut node), [], "nor is it asked for twice");
}

#[test]
fn next_hops_are_known_while_their_lease_lasts() {
    let mut node = acquainted("host-gw");
    let mut now = NOW;
    let mut pass = |node: &mut Node, seconds: u64| {
        for _ in 0..seconds {
            now += Duration::from_secs(1);
            node.handle_timeout(now);
        }
        now
    };
    let later = pass(&mut node, 3_600);
    let packet = bare(host_mac(2), &ping(pod(2, 2), pod(1, 2), 64, 8));
    let (verdict, _) = from_uplink_at(&mut node, later, &packet);
    assert_eq!(verdict, Verdict::Port(POD_PORT));
    assert_eq!(outputs(&mut node), [], "nobody need be asked for that");
    node.remove_peer(PeerId(2));
    pass(&mut node, 600);
    assert_eq!(node.next_hops().count(), 0);
}

#[test]
fn a_next_hop_that_is_alive_keeps_its_address() {
    let mut node = acquainted("host-gw");
    let later = NOW + Duration::from_secs(2);
    let forged = announcement(host_mac(9), host(2));
    for _ in 0..3 {
        let (verdict, _) = from_uplink_at(&mut node, later, &forged);
        assert_eq!(verdict, Verdict::Drop(DropReason::NextHopConflict));
    }
    let out = outputs(&mut node);
    assert_eq!(out.len(), 1, "one question for many lies");
    assert_eq!(asked(&out[0].1), (host_mac(2), host(2)));
    // Traffic goes on meanwhile, and after the answer.
    assert_eq!(
        from_pod_at(&mut node, later, &to_peer()).1[..6],
        host_mac(2).0
    );
    from_uplink_at(&mut node, later, &reply(host_mac(2), host(2)));
    let after = later + Duration::from_secs(5);
    node.handle_timeout(after);
    assert_eq!(outputs(&mut node), []);
    assert_eq!(
        from_pod_at(&mut node, after, &to_peer()).1[..6],
        host_mac(2).0
    );
    assert_adds_up(&node);
}

#[test]
fn a_host_that_comes_back_after_a_false_claim_is_found_in_two_seconds() {
    let mut node = acquainted("host-gw");
    let mut now = NOW + Duration::from_secs(2);
    // Somebody else claims its address while it is away.
    let forged = announcement(host_mac(9), host(2));
    for _ in 0..30 {
        from_uplink_at(&mut node, now, &forged);
        now += Duration::from_millis(100);
        node.handle_timeout(now);
        outputs(&mut node);
    }
    let to = |node: &mut Node, now| from_pod_at(node, now, &to_peer());
    assert_eq!(to(&mut node, now).1[..6], host_mac(9).0);
    // The host is back, and sends nothing by itself.
    let since = now;
    while from_pod_at(&mut node, now, &to_peer()).0 != Verdict::Consumed {
        outputs(&mut node);
        now += Duration::from_millis(100);
        assert!(now < since + Duration::from_secs(2));
        node.handle_timeout(now);
    }
    let out = outputs(&mut node);
    assert_eq!(asked(&out[0].1), (EthernetAddress::BROADCAST, host(2)));
    from_uplink_at(&mut node, now, &reply(host_mac(2), host(2)));
    assert_eq!(to(&mut node, now).1[..6], host_mac(2).0);
    outputs(&mut node);
    assert_adds_up(&node);
}

#[test]
fn a_host_that_comes_back_with_another_mac_address_is_believed_when_the_old_one_is_silent() {
    for guarded in [true, false] {
        let mut node = acquainted("host-gw");
        node.config.guard.peers = guarded;
        let mut now = NOW + Duration::from_secs(2);
        // The new one sends on, and does not even announce itself.
        let frame = bare(host_mac(9), &ping(pod(2, 2), pod(1, 2), 64, 8));
        let (verdict, _) = from_uplink_at(&mut node, now, &frame);
        let expected = match guarded {
            true => Verdict::Drop(DropReason::NextHopConflict),
            false => Verdict::Port(POD_PORT),
        };
        assert_eq!(verdict, expected);
        let mut asked_old = 0;
        for _ in 0..10 {
            asked_old += outputs(&mut node).len();
            now += Duration::from_millis(100);
            node.handle_timeout(now);
        }
        assert_eq!(asked_old, 3);
        assert_eq!(
            from_uplink_at(&mut node, now, &frame).0,
            Verdict::Port(POD_PORT)
        );
        assert_eq!(
            from_pod_at(&mut node, now, &to_peer()).1[..6],
            host_mac(9).0
        );
    }
}

#[test]
fn without_a_guard_a_host_need_not_be_known() {
    let mut node = linked("host-gw");
    node.config.guard.peers = false;
    let packet = ping(pod(2, 2), pod(1, 2), 64, 8);
    let (verdict, _) = from_uplink(&mut node, &bare(host_mac(2), &packet));
    assert_eq!(verdict, Verdict::Port(POD_PORT));
    assert_eq!(outputs(&mut node), []);
}

#[test]
fn a_next_hop_that_does_not_answer_is_unreachable() {
    let mut node = linked("host-gw");
    let mut now = NOW;
    from_pod(&mut node, &to_peer());
    outputs(&mut node);
    for _ in 0..4 {
        now += Duration::from_secs(1);
        node.handle_timeout(now);
    }
    let errors: Vec<_> = outputs(&mut node)
        .into_iter()
        .filter(|(verdict, _)| *verdict == Verdict::Port(POD_PORT))
        .collect();
    let [(_, error)] = &errors[..] else {
        panic!("{errors:?}")
    };
    let (from, to, kind, _) = icmp_of(error);
    assert_eq!(
        (from, to, kind),
        (pod(1, 1), pod(1, 2), Icmpv4Message::DstUnreachable)
    );
    assert_eq!(node.next_hops().count(), 0);
    assert_adds_up(&node);
}

#[test]
fn what_is_for_a_link_or_a_next_hop_that_has_gone_is_dropped() {
    for link_goes in [true, false] {
        let mut node = acquainted("host-gw");
        from_pod(&mut node, &pod_frame(&ping(pod(1, 2), pod(2, 2), 9, 2000)));
        if link_goes {
            node.set_uplink(None);
        } else {
            node.remove_peer(PeerId(2));
        }
        let verdicts: Vec<_> = outputs(&mut node).into_iter().map(|(v, _)| v).collect();
        assert_eq!(verdicts, [Verdict::Drop(DropReason::PeerGone); 2]);
        assert_adds_up(&node);
    }
}

#[test]
fn only_next_hops_are_remembered() {
    let mut node = linked("host-gw");
    for last in 3..=255 {
        from_uplink(&mut node, &announcement(host_mac(last), host(last)));
    }
    from_uplink(&mut node, &announcement(host_mac(9), host(2)));
    from_uplink(&mut node, &reply(host_mac(3), host(3)));
    from_uplink(&mut node, &reply(host_mac(3), [192, 168, 1, 2].into()));
    let hops: Vec<_> = node
        .next_hops()
        .map(|(host, place, _)| (host, place))
        .collect();
    assert_eq!(hops, [(host(2).into(), None)], "it is looked for");
    let ask_us = (EthernetAddress::BROADCAST, host(1));
    let request = frame::write_arp(ArpOperation::Request, (host_mac(2), host(2)), ask_us);
    from_uplink(&mut node, &request);
    assert_eq!(node.next_hops().count(), 1);
    // A host that says it is us, or a group, says nothing.
    from_uplink(&mut node, &announcement(host_mac(1), host(2)));
    from_uplink(&mut node, &announcement(EthernetAddress([3; 6]), host(2)));
    let known: Vec<_> = node.next_hops().filter_map(|(_, place, _)| place).collect();
    assert_eq!(known[0].mac, host_mac(2));
    assert_eq!(outputs(&mut node), []);
}

#[test]
fn a_host_that_sends_without_being_asked_still_has_to_answer() {
    let mut node = acquainted("host-gw");
    let packet = bare(host_mac(2), &ping(pod(2, 2), pod(1, 2), 64, 8));
    let later = NOW + crate::datapath::neighbour::REACHABLE;
    let before = NOW + Duration::from_secs(30);
    for now in [before, later] {
        let (verdict, _) = from_uplink_at(&mut node, now, &packet);
        assert_eq!(verdict, Verdict::Port(POD_PORT));
    }
    from_pod_at(&mut node, later, &to_peer());
    let probes = outputs(&mut node);
    assert_eq!(probes.len(), 1);
    assert_eq!(asked(&probes[0].1), (host_mac(2), host(2)));
}

/// A host with another network card that says nothing: only the worker to which its packets come
/// would notice, and the others would send to the old one until it is stale.
#[test]
fn what_a_packet_claims_is_looked_into_by_all_workers() {
    let (mut node, mut sibling) = (acquainted("host-gw"), acquainted("host-gw"));
    let later = NOW + Duration::from_secs(2);
    let packet = bare(host_mac(9), &ping(pod(2, 2), pod(1, 2), 64, 8));
    let claim = announcement(host_mac(9), host(2));
    for told in [Some(claim.clone()), None] {
        let (verdict, _) = from_uplink_at(&mut node, later, &packet);
        assert_eq!(verdict, Verdict::Drop(DropReason::NextHopConflict));
        let taken = node.take_claim().map(|claim| claim.to_vec());
        assert_eq!(taken, told, "once, while it is looked into");
    }
    sibling.learn_from_sibling_uplink(later, &claim);
    let after = later + Duration::from_secs(1);
    for tenth in 1..=10 {
        sibling.handle_timeout(later + Duration::from_millis(100 * tenth));
    }
    assert_eq!(
        from_pod_at(&mut sibling, after, &to_peer()).1[..6],
        host_mac(9).0
    );
}

#[test]
fn what_another_worker_took_from_the_link_is_heard_here() {
    let mut node = linked("host-gw");
    node.learn_from_sibling_uplink(NOW, &reply(EthernetAddress([3; 6]), host(2)));
    assert!(node.next_hops().all(|(_, place, _)| place.is_none()));
    node.learn_from_sibling_uplink(NOW, &reply(host_mac(2), host(2)));
    let known: Vec<_> = node.next_hops().filter_map(|(_, place, _)| place).collect();
    assert_eq!(known[0].mac, host_mac(2));

    node.refuse_uplink_frame();
    assert_eq!(node.counters().received, 1);
    assert_eq!(node.counters().dropped_for(DropReason::VirtioHeader), 1);
    assert_adds_up(&node);
}

#[test]
fn arp_is_answered_for_an_address_of_our_own_only() {
    let ask = |target| {
        let all = (EthernetAddress::BROADCAST, target);
        frame::write_arp(ArpOperation::Request, (host_mac(5), host(5)), all)
    };
    for answers in [false, true] {
        let mut node = node(1, "host-gw");
        node.set_uplink(Some(uplink(answers)));
        let announced = outputs(&mut node);
        assert_eq!(announced.len(), usize::from(answers));
        assert!(
            announced
                .iter()
                .all(|(_, it)| it[..] == announcement(host_mac(1), host(1)))
        );
        for target in [host(1), host(3), pod(1, 2)] {
            from_uplink(&mut node, &ask(target));
        }
        let out = outputs(&mut node);
        assert_eq!(out.len(), usize::from(answers));
        if let [(verdict, frame)] = &out[..] {
            assert_eq!(*verdict, Verdict::Uplink { id: None });
            let mine = (host_mac(1), host(1));
            let expected = frame::write_arp(ArpOperation::Reply, mine, (host_mac(5), host(5)));
            assert_eq!(frame[..], expected);
        }
    }
}

#[test]
fn peers_on_the_link_get_bare_packets_and_others_the_tunnel() {
    let mut node = acquainted("vxlan");
    let far = SocketAddrV4::new([172, 16, 0, 9].into(), 8472);
    node.set_peer(Peer {
        address: far.into(),
        ..peer(3, "10.244.3.0/24")
    });
    let paths: Vec<_> = node.peers().map(|state| state.path).collect();
    assert_eq!(paths, [Path::Uplink, Path::Tunnel]);
    let near = from_pod(&mut node, &to_peer()).0;
    assert_eq!(near, Verdict::Uplink { id: HOST_PORT });
    let frame = pod_frame(&ping(pod(1, 2), pod(3, 2), 64, 8));
    let (verdict, datagram) = from_pod(&mut node, &frame);
    assert!(matches!(verdict, Verdict::Peer { destination, .. } if destination == far.into()));
    assert_eq!(&datagram[..8], [8, 0, 0, 0, 0, 0, 1, 0]);
    // What comes through the tunnel from a host on the link is as good as before.
    let tunnelled = peer_frame(&ping(pod(2, 2), pod(1, 2), 64, 8));
    assert_eq!(
        from_peer(&mut node, 2, &tunnelled).0,
        Verdict::Port(POD_PORT)
    );
    // And without the uplink all go through the tunnel again.
    node.set_uplink(None);
    assert!(matches!(
        from_pod(&mut node, &to_peer()).0,
        Verdict::Peer { .. }
    ));
}

#[test]
fn a_host_beyond_a_router_is_no_next_hop() {
    let mut node = linked("host-gw");
    node.set_peer(Peer {
        address: SocketAddrV4::new([172, 16, 0, 9].into(), 0).into(),
        ..peer(2, "10.244.2.0/24")
    });
    assert_eq!(node.peers().next().unwrap().path, Path::Unreachable);
    let (verdict, _) = from_pod(&mut node, &to_peer());
    assert_eq!(verdict, Verdict::Drop(DropReason::NextHopUnreachable));
    let out = outputs(&mut node);
    let (_, _, kind, _) = icmp_of(&out[0].1);
    assert_eq!(kind, Icmpv4Message::DstUnreachable);
    assert_adds_up(&node);
}

#[test]
fn there_is_no_path_to_an_address_of_ipv6() {
    for format in ["vxlan", "udp", "host-gw"] {
        let mut node = linked(format);
        for id in [2, 3] {
            node.set_peer(Peer {
                address: format!("[2001:db8::{id}]:8472").parse().unwrap(),
                ..peer(id, &format!("10.244.{id}.0/24"))
            });
        }
        assert!(node.peers().all(|state| state.path == Path::Unreachable));
        let (verdict, _) = from_pod(&mut node, &to_peer());
        assert_eq!(verdict, Verdict::Drop(DropReason::NextHopUnreachable));
        node.set_uplink(Some(Uplink {
            nets: "2001:db8::1/64".parse().unwrap(),
            ..uplink(true)
        }));
        let (verdict, _) = from_pod(&mut node, &to_peer());
        assert_eq!(verdict, Verdict::Drop(DropReason::NextHopUnreachable));
        assert!(node.remove_peer(PeerId(2)) && node.remove_peer(PeerId(3)));
    }
}

#[test]
fn each_path_has_its_own_mtu() {
    let mut node = acquainted("vxlan");
    node.set_peer(Peer {
        address: SocketAddrV4::new([172, 16, 0, 9].into(), 8472).into(),
        ..peer(3, "10.244.3.0/24")
    });
    let mut large = |to, len: usize| {
        let mut packet = ping(pod(1, 2), to, 64, len - 28);
        set_dont_fragment(&mut packet, true);
        let verdict = from_pod(&mut node, &pod_frame(&packet)).0;
        (verdict, outputs(&mut node))
    };
    assert_eq!(large(pod(2, 2), 1500).0, Verdict::Uplink { id: HOST_PORT });
    for (to, len, mtu) in [(pod(2, 2), 1501, 1500u16), (pod(3, 2), 1451, 1450)] {
        let (verdict, out) = large(to, len);
        assert_eq!(verdict, Verdict::Drop(DropReason::FragmentationNeeded));
        let icmp = &out[0].1[frame::HEADER_LEN + 20..];
        assert_eq!(icmp[..2], [3, 4]);
        assert_eq!(icmp[6..8], mtu.to_be_bytes());
    }
    // Where it may be cut, it is cut to the size of the path.
    let packet = ping(pod(1, 2), pod(2, 2), 64, 3000);
    from_pod(&mut node, &pod_frame(&packet));
    let lengths: Vec<_> = outputs(&mut node).iter().map(|(_, it)| it.len()).collect();
    assert_eq!(lengths, [14 + 1500, 14 + 1500, 14 + 68]);
}

/// The MSS that a SYN with this one goes on with, and whether its checksum is right.
fn mss_of(packet: &[u8]) -> (u16, bool) {
    let sliced = etherparse::SlicedPacket::from_ip(packet).unwrap();
    let Some(etherparse::TransportSlice::Tcp(tcp)) = &sliced.transport else {
        panic!("{packet:?}")
    };
    let Some(etherparse::NetSlice::Ipv4(ip)) = &sliced.net else {
        panic!("{packet:?}")
    };
    let sum = tcp
        .to_header()
        .calc_checksum_ipv4(&ip.header().to_header(), tcp.payload());
    let options: Vec<_> = tcp.options_iterator().map(Result::unwrap).collect();
    let [etherparse::TcpOptionElement::MaximumSegmentSize(mss), ..] = options[..] else {
        panic!("{options:?}")
    };
    (mss, sum == Ok(tcp.checksum()))
}

#[test]
fn connections_begin_with_what_their_path_takes() {
    let syn = |from: Ipv4Addr, to: Ipv4Addr, mss| {
        let mut bytes = Vec::new();
        PacketBuilder::ipv4(from.octets(), to.octets(), 64)
            .tcp(1000, 80, 7, 1000)
            .syn()
            .options(&[etherparse::TcpOptionElement::MaximumSegmentSize(mss)])
            .unwrap()
            .write(&mut bytes, &[])
            .unwrap();
        bytes
    };
    for clamp in [true, false] {
        let mut node = acquainted("vxlan");
        node.config.clamp_mss = clamp;
        node.set_peer(Peer {
            address: SocketAddrV4::new([172, 16, 0, 9].into(), 8472).into(),
            ..peer(3, "10.244.3.0/24")
        });
        // On the link 1500 bytes, through the tunnel 1450.
        for (to, mss, expected) in [
            (pod(2, 2), 8960, 1460),
            (pod(2, 2), 1400, 1400),
            (pod(3, 2), 1460, 1410),
        ] {
            let frame = pod_frame(&syn(pod(1, 2), to, mss));
            let (verdict, out) = from_pod(&mut node, &frame);
            let at = match verdict {
                Verdict::Uplink { .. } => frame::HEADER_LEN,
                _ => 22,
            };
            let expected = if clamp { expected } else { mss };
            assert_eq!(mss_of(&out[at..]), (expected, true));
        }
        // What a peer's pod begins with, a pod would send.
        let (_, out) = from_uplink(
            &mut node,
            &bare(host_mac(2), &syn(pod(2, 2), pod(1, 2), 8960)),
        );
        assert_eq!(mss_of(&out[14..]), (if clamp { 1410 } else { 8960 }, true));
    }
}

proptest! {
    #[test]
    fn frames_from_the_link_are_harmless(
        mutations in proptest::collection::vec((0usize..60, any::<u8>()), 0..4),
        arp: bool,
        known: bool,
        answers: bool,
    ) {
        let mut node = node(1, "host-gw");
        node.set_uplink(Some(uplink(answers)));
        if known {
            from_uplink(&mut node, &reply(host_mac(2), host(2)));
        }
        let mut frame = if arp {
            announcement(host_mac(2), host(2))
        } else {
            bare(host_mac(2), &ping(pod(2, 2), pod(1, 2), 64, 8))
        };
        for (at, value) in mutations {
            let at = at % frame.len();
            frame[at] = value;
        }
        let (verdict, _) = from_uplink(&mut node, &frame);
        let ok = matches!(verdict, Verdict::Port(POD_PORT | OTHER_PORT) | Verdict::Consumed | Verdict::Drop(_));
        prop_assert!(ok, "{:?}", verdict);
        if matches!(verdict, Verdict::Port(_)) {
            prop_assert!(known);
            prop_assert_eq!(&frame[..12], &bare(host_mac(2), &[])[..12]);
        }
        outputs(&mut node);
        assert_adds_up(&node);
    }
}
