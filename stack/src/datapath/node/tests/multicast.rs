//! Groups: who joins them, who hears what is for them, and what stays on its link (RFC 4541).

use std::net::Ipv6Addr;

use muslin_encap::ip::transport::{ChecksumState, Transport};
use muslin_encap::ip::v6;
use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};
use smoltcp::wire::Ipv6Packet;

use super::v6::{at, dual, from_peer_v6, peer_v6, tunnelled};
use super::*;
use crate::datapath::filter::Direction;
use crate::datapath::multicast::{
    self, LAST_MEMBER_INTERVAL, MEMBERSHIP_INTERVAL, QUERY_INTERVAL, igmp, mld,
};

const THIRD_PORT: PortId = PortId(3);
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 2, 3);
const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 1, 3);

/// Node 1 or 2 with pods `.2`, `.3` and `.4`, whose peer follows groups as it does.
fn follower(number: u8) -> Node {
    let mut node = dual(number);
    let third = attachment(number, 4, true);
    node.attach(THIRD_PORT, third);
    let other = 3 - number;
    node.set_peer(peer(other, &format!("10.244.{other}.0/24")).with_multicast(true));
    node.set_peer(peer_v6(other).with_multicast(true));
    node.set_multicast(NOW, Some(true));
    node
}

fn host_of(port: PortId) -> u8 {
    port.0 as u8 + 1
}

/// What becomes of a packet that a pod of node `number` sends to a group, or to all.
fn sends(node: &mut Node, number: u8, port: PortId, packet: &[u8]) -> Verdict {
    let is_v4 = packet[0] >> 4 == 4;
    let to: IpAddr = if is_v4 {
        Ipv4Packet::new_unchecked(packet).dst_addr().into()
    } else {
        Ipv6Packet::new_unchecked(packet).dst_addr().into()
    };
    let mac = match to {
        IpAddr::V4(to) if !to.is_multicast() => EthernetAddress::BROADCAST,
        to => multicast::mac_of(to),
    };
    let kind = if is_v4 { 0x0800 } else { 0x86dd };
    let frame = ethernet(pod_mac(number, host_of(port)), mac, kind, packet);
    through(&frame, |packet| node.from_port(node.now, port, packet)).0
}

fn says(node: &mut Node, port: PortId, records: &[(u8, [u8; 4], u16)]) -> Verdict {
    let source = pod(1, host_of(port));
    let report = igmp::tests::packet(
        source,
        [224, 0, 0, 22].into(),
        &igmp::tests::report(records),
    );
    sends(node, 1, port, &report)
}

fn joins(node: &mut Node, port: PortId, group: Ipv4Addr) {
    assert_eq!(
        says(node, port, &[(4, group.octets(), 0)]),
        Verdict::Consumed
    );
}

fn joins_v6(node: &mut Node, number: u8, port: PortId, group: &str) {
    let link_local = format!("fe80::{}", host_of(port));
    let report = mld::tests::report(&[(4, group, 0)]);
    let report = mld::tests::packet(&link_local, "ff02::16", &report);
    assert_eq!(sends(node, number, port, &report), Verdict::Consumed);
}

fn udp(source: Ipv4Addr, group: Ipv4Addr, ttl: u8, port: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(source.octets(), group.octets(), ttl)
        .udp(port, port)
        .write(&mut bytes, b"words")
        .unwrap();
    bytes
}

fn udp_v6(source: Ipv6Addr, group: Ipv6Addr, hop_limit: u8, port: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv6(source.octets(), group.octets(), hop_limit)
        .udp(port, port)
        .write(&mut bytes, b"words")
        .unwrap();
    bytes
}

/// Where copies go, and each of them, without the queries of the node.
fn copies(node: &mut Node) -> Vec<(Verdict, Vec<u8>)> {
    let mut all = outputs(node);
    all.retain(|(verdict, _)| !matches!(verdict, Verdict::Flood { except: None }));
    all
}

fn ports(node: &mut Node) -> Vec<u32> {
    let number = |(verdict, _): &(Verdict, Vec<u8>)| match verdict {
        Verdict::Port(port) => Some(port.0),
        _ => None,
    };
    copies(node).iter().filter_map(number).collect()
}

fn to_peers(copies: &[(Verdict, Vec<u8>)]) -> Vec<&Vec<u8>> {
    let is_peers = |it: &&(Verdict, Vec<u8>)| matches!(it.0, Verdict::Peer { .. });
    copies.iter().filter(is_peers).map(|it| &it.1).collect()
}

const NOBODY: Verdict = Verdict::Drop(DropReason::GroupWithoutMembers);
const BEYOND: Verdict = Verdict::Drop(DropReason::BeyondScope);
const NOT_UNICAST: Verdict = Verdict::Drop(DropReason::DestinationNotUnicast);

#[test]
fn members_hear_and_others_do_not() {
    let mut node = follower(1);
    let packet = udp(pod(1, 2), GROUP, 1, 9);
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), NOBODY);
    joins(&mut node, THIRD_PORT, GROUP);
    joins(&mut node, POD_PORT, GROUP);
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), Verdict::Consumed);
    let all = copies(&mut node);
    assert_eq!(all.len(), 1);
    // As the sender has sent it.
    let mac = multicast::mac_of(GROUP.into());
    assert_eq!(all[0].0, Verdict::Port(THIRD_PORT));
    assert_eq!(all[0].1, ethernet(pod_mac(1, 2), mac, 0x0800, &packet));
    assert_eq!(
        sends(&mut node, 1, OTHER_PORT, &udp(pod(1, 3), GROUP, 1, 9)),
        Verdict::Consumed
    );
    assert_eq!(ports(&mut node), [1, 3]);
    // One leaves, the other is detached.
    says(&mut node, POD_PORT, &[(3, GROUP.octets(), 0)]);
    node.detach(THIRD_PORT);
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), NOBODY);
    assert_eq!(node.groups(NOW).count(), 0);
    assert_adds_up(&node);
}

#[test]
fn members_hear_and_others_do_not_in_ipv6() {
    let mut node = follower(1);
    let packet = udp_v6(at(1, 2), GROUP_V6, 1, 9);
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), NOBODY);
    joins_v6(&mut node, 1, OTHER_PORT, "ff05::1:3");
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), Verdict::Consumed);
    assert_eq!(ports(&mut node), [2]);
    // A group of the link is followed as others are; solicited nodes and all nodes have no members.
    joins_v6(&mut node, 1, OTHER_PORT, "ff02::c");
    joins_v6(&mut node, 1, OTHER_PORT, "ff02::1:ff00:3");
    assert_eq!(node.groups(NOW).count(), 2);
    let packet = udp_v6(at(1, 2), "ff02::c".parse().unwrap(), 1, 9);
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), Verdict::Consumed);
    assert_eq!(ports(&mut node), [2]);
    let own = udp_v6(at(1, 2), "ff01::c".parse().unwrap(), 1, 9);
    assert_eq!(sends(&mut node, 1, POD_PORT, &own), BEYOND);
    assert_adds_up(&node);
}

#[test]
fn groups_of_a_link_and_broadcasts_are_for_all() {
    let mut node = follower(1);
    let flood = Verdict::Flood {
        except: Some(POD_PORT),
    };
    for to in [[224, 0, 0, 1], [224, 0, 0, 18], [255; 4], [10, 244, 1, 255]] {
        let packet = udp(pod(1, 2), to.into(), 255, 9);
        assert_eq!(sends(&mut node, 1, POD_PORT, &packet), flood, "{to:?}");
        assert!(copies(&mut node).is_empty());
    }
}

#[test]
fn nothing_is_followed_by_default() {
    let mut node = dual(1);
    let flood = Verdict::Flood {
        except: Some(POD_PORT),
    };
    let packet = udp(pod(1, 2), GROUP, 64, 9);
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), flood);
    let packet = udp_v6(at(1, 2), GROUP_V6, 64, 9);
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), flood);
    let verdict = from_peer(&mut node, 2, &peer_frame(&udp(pod(2, 2), GROUP, 64, 9))).0;
    assert_eq!(verdict, NOT_UNICAST);
    let packet = udp_v6(at(2, 2), GROUP_V6, 64, 9);
    assert_eq!(
        from_peer_v6(&mut node, 2, &tunnelled(&packet)).0,
        NOT_UNICAST
    );
    assert_eq!(outputs(&mut node), []);
}

/// Without an address of a version of IP the node asks nobody, so it prunes nothing.
#[test]
fn groups_of_a_version_without_a_subnet_are_for_all() {
    let mut node = node(1, "vxlan");
    node.set_multicast(NOW, Some(true));
    joins_v6(&mut node, 1, OTHER_PORT, "ff05::1:3");
    assert_eq!(node.groups(NOW).count(), 0);
    let packet = udp_v6("fe80::2".parse().unwrap(), GROUP_V6, 64, 9);
    let flood = Verdict::Flood {
        except: Some(POD_PORT),
    };
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), flood);
    let packet = udp(pod(1, 2), GROUP, 64, 9);
    assert_eq!(sends(&mut node, 1, POD_PORT, &packet), NOBODY);
}

#[test]
fn a_datagram_reaches_members_of_another_node_in_both_versions() {
    let (mut one, mut two) = (follower(1), follower(2));
    joins_v6(&mut two, 2, OTHER_PORT, "ff05::1:3");
    let report = igmp::tests::report(&[(4, GROUP.octets(), 0)]);
    let report = igmp::tests::packet(pod(2, 3), [224, 0, 0, 22].into(), &report);
    assert_eq!(sends(&mut two, 2, OTHER_PORT, &report), Verdict::Consumed);
    outputs(&mut two);

    let packet = udp(pod(1, 2), GROUP, 2, 9);
    assert_eq!(sends(&mut one, 1, POD_PORT, &packet), Verdict::Consumed);
    let all = copies(&mut one);
    let [datagram] = to_peers(&all)[..] else {
        panic!("{all:?}")
    };
    let (verdict, _) = from_peer(&mut two, 1, datagram);
    assert_eq!(verdict, Verdict::Consumed);
    let all = copies(&mut two);
    assert_eq!(all.len(), 1, "not back, and to no other pod");
    assert_eq!(all[0].0, Verdict::Port(OTHER_PORT));
    assert_eq!(ip_of(&all[0].1).hop_limit(), 1);
    let view = EthernetFrame::new_checked(&all[0].1[..]).unwrap();
    assert_eq!(view.src_addr(), GATEWAY_MAC);
    assert_eq!(view.dst_addr(), multicast::mac_of(GROUP.into()));

    let packet = udp_v6(at(1, 2), GROUP_V6, 2, 9);
    assert_eq!(sends(&mut one, 1, POD_PORT, &packet), Verdict::Consumed);
    let all = copies(&mut one);
    let [datagram] = to_peers(&all)[..] else {
        panic!("{all:?}")
    };
    let (verdict, _) = from_peer_v6(&mut two, 1, datagram);
    assert_eq!(verdict, Verdict::Consumed);
    let all = copies(&mut two);
    assert_eq!(all.len(), 1);
    assert_eq!((all[0].0, all[0].1[21]), (Verdict::Port(OTHER_PORT), 1));
    assert_adds_up(&one);
    assert_adds_up(&two);
}

#[test]
fn what_is_of_a_link_stays_there() {
    let mut node = follower(1);
    joins(&mut node, OTHER_PORT, GROUP);
    joins_v6(&mut node, 1, OTHER_PORT, "ff05::1:3");
    joins_v6(&mut node, 1, OTHER_PORT, "ff02::c");
    outputs(&mut node);
    let link_local = "fe80::2".parse().unwrap();
    for packet in [
        udp(pod(1, 2), GROUP, 1, 9),
        udp(pod(1, 2), [224, 0, 0, 18].into(), 64, 5353),
        // Not to the port of multicast DNS.
        udp(pod(1, 2), multicast::MDNS, 255, 9),
        udp_v6(at(1, 2), GROUP_V6, 1, 9),
        udp_v6(link_local, GROUP_V6, 64, 9),
        udp_v6(at(1, 2), "ff02::c".parse().unwrap(), 64, 5353),
    ] {
        let verdict = sends(&mut node, 1, POD_PORT, &packet);
        assert!(!matches!(verdict, Verdict::Drop(_)), "{verdict:?}");
        let all = copies(&mut node);
        assert!(to_peers(&all).is_empty(), "{packet:?}");
    }
    // Nor does a node take it from another.
    for packet in [
        udp(pod(2, 2), [224, 0, 0, 18].into(), 64, 5353),
        udp(pod(2, 2), multicast::MDNS, 255, 9),
    ] {
        assert_eq!(from_peer(&mut node, 2, &peer_frame(&packet)).0, BEYOND);
    }
    let all_nodes = udp_v6(at(2, 2), ndp::ALL_NODES, 64, 5353);
    assert_eq!(from_peer_v6(&mut node, 2, &tunnelled(&all_nodes)).0, BEYOND);
    assert_eq!(copies(&mut node), []);
}

/// RFC 6762: the overlay is one link for it.
#[test]
fn multicast_dns_crosses_as_it_is() {
    let (mut one, mut two) = (follower(1), follower(2));
    let flood = Verdict::Flood {
        except: Some(POD_PORT),
    };
    let question = udp(pod(1, 2), multicast::MDNS, 255, 5353);
    assert_eq!(sends(&mut one, 1, POD_PORT, &question), flood);
    let all = copies(&mut one);
    let (verdict, _) = from_peer(&mut two, 1, to_peers(&all)[0]);
    assert_eq!(verdict, Verdict::Consumed);
    let heard = copies(&mut two);
    assert_eq!(heard.len(), 3);
    assert!(
        heard
            .iter()
            .all(|(_, frame)| frame[frame::HEADER_LEN..] == question)
    );

    let global = udp_v6(at(1, 2), multicast::MDNS_V6, 255, 5353);
    assert_eq!(sends(&mut one, 1, POD_PORT, &global), flood);
    let all = copies(&mut one);
    assert!(to_peers(&all)[0].ends_with(&global));
    // From its link-local address, as responders send it, it goes on from the pod's own.
    let question = udp_v6("fe80::2".parse().unwrap(), multicast::MDNS_V6, 255, 5353);
    assert_eq!(sends(&mut one, 1, POD_PORT, &question), flood);
    let all = copies(&mut one);
    assert!(to_peers(&all)[0].ends_with(&global));
    let (verdict, _) = from_peer_v6(&mut two, 1, to_peers(&all)[0]);
    assert_eq!(verdict, Verdict::Consumed);
    assert_eq!(ports(&mut two), [1, 2, 3]);
    // A pod without such an address has nothing to say there.
    let question = udp_v6("fe80::4".parse().unwrap(), multicast::MDNS_V6, 255, 5353);
    let verdict = sends(&mut one, 1, THIRD_PORT, &question);
    assert!(matches!(verdict, Verdict::Flood { .. }));
    assert!(copies(&mut one).is_empty());
}

#[test]
fn only_peers_that_follow_groups_are_sent_copies_and_heard() {
    let mut node = follower(1);
    joins(&mut node, OTHER_PORT, GROUP);
    node.set_peer(peer(2, "10.244.2.0/24"));
    node.set_peer(peer(7, "10.244.7.0/24").with_multicast(true));
    outputs(&mut node);
    assert_eq!(
        sends(&mut node, 1, POD_PORT, &udp(pod(1, 2), GROUP, 64, 9)),
        Verdict::Consumed
    );
    let all = copies(&mut node);
    let peers: Vec<_> = all
        .iter()
        .filter_map(|it| match it.0 {
            Verdict::Peer { id, .. } => Some(id.0),
            _ => None,
        })
        .collect();
    assert_eq!(peers, [7]);
    let flannels = peer_frame(&udp(pod(2, 2), GROUP, 64, 9));
    assert_eq!(from_peer(&mut node, 2, &flannels).0, NOT_UNICAST);
    // One that follows them speaks for its own pods alone, and not as their querier.
    node.set_peer(peer(2, "10.244.2.0/24").with_multicast(true));
    assert_eq!(from_peer(&mut node, 2, &flannels).0, Verdict::Consumed);
    assert_eq!(ports(&mut node), [2]);
    for (source, reason) in [
        (pod(7, 2), DropReason::SourceNotInLease),
        (pod(1, 2), DropReason::SourceNotInLease),
        (GROUP, DropReason::SourceAddressInvalid),
    ] {
        let forged = peer_frame(&udp(source, GROUP, 64, 9));
        let verdict = from_peer(&mut node, 2, &forged).0;
        assert_eq!(verdict, Verdict::Drop(reason), "{source}");
    }
    let query = igmp::tests::packet(pod(2, 1), GROUP, &[0x11, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(from_peer(&mut node, 2, &peer_frame(&query)).0, BEYOND);
    node.remove_peer(PeerId(2));
    node.remove_peer(PeerId(7));
    assert_eq!(
        sends(&mut node, 1, OTHER_PORT, &udp(pod(1, 3), GROUP, 64, 9)),
        NOBODY
    );
    assert_adds_up(&node);
}

#[test]
fn no_pod_is_a_querier() {
    let mut node = follower(1);
    let foreign = Verdict::Drop(DropReason::ForeignQuerier);
    let query = igmp::tests::packet(
        pod(1, 2),
        [224, 0, 0, 1].into(),
        &[0x11, 0, 0, 0, 0, 0, 0, 0],
    );
    for mac in [
        multicast::mac_of(IpAddr::from([224, 0, 0, 1])),
        EthernetAddress::BROADCAST,
        pod_mac(1, 3),
        GATEWAY_MAC,
    ] {
        let frame = ethernet(pod_mac(1, 2), mac, 0x0800, &query);
        assert_eq!(from_pod(&mut node, &frame).0, foreign, "{mac}");
    }
    let message = [&[130, 0, 0, 0, 0, 0, 0, 0][..], &[0; 16]].concat();
    let query = mld::tests::packet("fe80::2", "ff02::1", &message);
    for mac in [multicast::mac_of(ndp::ALL_NODES.into()), pod_mac(1, 3)] {
        let frame = ethernet(pod_mac(1, 2), mac, 0x86dd, &query);
        assert_eq!(from_pod(&mut node, &frame).0, foreign, "{mac}");
    }
}

#[test]
fn a_frame_is_for_the_group_that_its_packet_is_for() {
    let mut node = follower(1);
    let wrong = Verdict::Drop(DropReason::GroupMac);
    let mac = multicast::mac_of(GROUP.into());
    let unicast = udp(pod(1, 2), pod(1, 3), 64, 9);
    let other = udp(pod(1, 2), [239, 9, 9, 9].into(), 64, 9);
    let mac_v6 = multicast::mac_of(GROUP_V6.into());
    let unicast_v6 = udp_v6(at(1, 2), at(1, 3), 64, 9);
    for (mac, kind, packet) in [
        (mac, 0x0800, &unicast),
        (mac, 0x0800, &other),
        (EthernetAddress::BROADCAST, 0x0800, &other),
        (mac_v6, 0x86dd, &unicast_v6),
        (EthernetAddress::BROADCAST, 0x86dd, &unicast_v6),
    ] {
        let frame = ethernet(pod_mac(1, 2), mac, kind, packet);
        assert_eq!(from_pod(&mut node, &frame).0, wrong, "{mac}");
    }
}

/// The node asks at the start, soon again, and then every now and then.
#[test]
fn the_gateway_asks_and_forgets_who_does_not_answer() {
    let mut node = follower(1);
    joins(&mut node, OTHER_PORT, GROUP);
    outputs(&mut node);
    let (mut now, mut queries) = (NOW, Vec::new());
    while now < NOW + QUERY_INTERVAL * 2 {
        now = now.max(node.poll_at());
        node.handle_timeout(now);
        for (verdict, frame) in outputs(&mut node) {
            assert_eq!(verdict, Verdict::Flood { except: None });
            queries.push((now.total_millis(), frame[frame::HEADER_LEN] >> 4));
        }
        now += Duration::from_millis(250);
    }
    let times: Vec<_> = queries.iter().map(|(at, _)| at / 1000).collect();
    assert_eq!(times, [0, 0, 31, 31, 156, 156]);
    assert!(queries.chunks(2).all(|two| (two[0].1, two[1].1) == (4, 6)));
    let end = NOW + MEMBERSHIP_INTERVAL;
    assert_eq!(node.groups(end - Duration::from_micros(1)).count(), 1);
    assert_eq!(node.groups(end).count(), 0);
    // A pod that comes is asked, too.
    node.attach(POD_PORT, attachment(1, 2, true));
    node.handle_timeout(now);
    node.handle_timeout(now + Duration::from_secs(1));
    assert_eq!(outputs(&mut node).len(), 2);
    assert_adds_up(&node);
}

/// Several hosts may be behind a port without a guard.
#[test]
fn others_behind_a_bridge_are_asked_whether_they_stay() {
    let mut node = follower(1);
    node.attach(OTHER_PORT, attachment(1, 3, false));
    joins(&mut node, OTHER_PORT, GROUP);
    outputs(&mut node);
    says(&mut node, OTHER_PORT, &[(3, GROUP.octets(), 0)]);
    node.handle_timeout(NOW);
    let asked = copies(&mut node);
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].0, Verdict::Port(OTHER_PORT));
    assert_eq!(ip_of(&asked[0].1).dst_addr(), GROUP);
    let later = NOW + LAST_MEMBER_INTERVAL;
    assert_eq!(node.groups(later).count(), 1);
    assert_eq!(node.groups(later + LAST_MEMBER_INTERVAL).count(), 0);
}

/// Another worker's node knows the same, and asks nobody.
#[test]
fn workers_tell_each_other_of_members() {
    let (mut one, mut two) = (follower(1), follower(1));
    two.set_multicast(NOW, Some(false));
    joins(&mut one, OTHER_PORT, GROUP);
    let (port, frame) = one.take_report_for_siblings().unwrap();
    assert_eq!(one.take_report_for_siblings(), None);
    two.learn_from_sibling(NOW, port, &frame);
    assert_eq!(two.groups(NOW).count(), 1);
    assert_eq!(two.take_report_for_siblings(), None);
    for seconds in [0, 1, 2, 40, 200] {
        two.handle_timeout(NOW + Duration::from_secs(seconds));
    }
    assert_eq!(outputs(&mut two), []);
    // Forged ones are refused by both.
    let forged = igmp::tests::report(&[(4, [239, 9, 9, 9], 0)]);
    let forged = igmp::tests::packet(pod(1, 2), [224, 0, 0, 22].into(), &forged);
    let mac = multicast::mac_of(IpAddr::from([224, 0, 0, 22]));
    let frame = ethernet(pod_mac(1, 3), mac, 0x0800, &forged);
    two.learn_from_sibling(NOW, port, &frame);
    assert_eq!(two.groups(NOW).count(), 1);
}

#[test]
fn groups_that_a_pod_is_in_are_bounded() {
    let mut node = follower(1);
    let full = Verdict::Drop(DropReason::MembershipsFull);
    let groups = (0..).map(|at: u32| Ipv4Addr::from(0xe100_0000 + at));
    let mut taken = groups.take_while(|group| {
        let verdict = says(&mut node, POD_PORT, &[(4, group.octets(), 0)]);
        outputs(&mut node);
        verdict != full
    });
    assert_eq!(taken.by_ref().count(), 128);
    joins(&mut node, OTHER_PORT, GROUP);
}

#[test]
fn copies_are_bounded() {
    let mut node = follower(1);
    for id in 20..400_u32 {
        let subnet = format!("10.{}.{}.0/24", 100 + id / 200, id % 200);
        let address =
            std::net::SocketAddr::from(([172, 16, (id / 200) as u8, (id % 200) as u8], 8472));
        let peer = Peer::new(PeerId(id), subnet.parse().unwrap(), address);
        node.set_peer(peer.with_vtep(vtep(9)).with_multicast(true));
    }
    let packet = udp(pod(1, 2), GROUP, 64, 9);
    let mut sent = 0;
    let last = (0..100).find_map(|_| match sends(&mut node, 1, POD_PORT, &packet) {
        Verdict::Consumed => {
            let all = copies(&mut node);
            assert_eq!(to_peers(&all).len(), super::super::multicast::MAX_PEERS);
            sent += 1;
            None
        }
        other => Some(other),
    });
    assert_eq!(last, Some(Verdict::Drop(DropReason::Storm)));
    assert!(sent > 10, "{sent}");
    let lost = node.counters().dropped_for(DropReason::GroupPeersExceeded);
    assert_eq!(lost, sent);
    assert_adds_up(&node);
}

/// What a peer's pods send is bounded, too: its own share.
#[test]
fn what_comes_from_a_peer_is_bounded() {
    let mut node = follower(1);
    joins(&mut node, OTHER_PORT, GROUP);
    outputs(&mut node);
    let datagram = peer_frame(&udp(pod(2, 2), GROUP, 64, 9));
    let verdicts = (0..50_000).map(|_| {
        let verdict = from_peer(&mut node, 2, &datagram).0;
        outputs(&mut node);
        verdict
    });
    let refused = verdicts.filter(|it| *it == Verdict::Drop(DropReason::Storm));
    let refused = refused.count();
    assert!((20_000..45_000).contains(&refused), "{refused}");
}

#[test]
fn a_superpacket_stays_one() {
    let mut node = follower(1);
    joins(&mut node, OTHER_PORT, GROUP);
    outputs(&mut node);
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(pod(1, 2).octets(), GROUP.octets(), 64)
        .udp(1, 2)
        .write(&mut bytes, &[7; 3000])
        .unwrap();
    let at = Transport::parse(&bytes, 0).unwrap();
    let partial = at.pseudo_header(&bytes, at.end - at.l4);
    bytes[26..28].copy_from_slice(&partial.to_be_bytes());
    let header = Header {
        checksum: Checksum::Partial {
            start: 34,
            offset: 6,
        },
        gso: Some(Gso {
            kind: GsoKind::Udp,
            size: 1000,
            ecn: false,
        }),
        hdr_len: 42,
    };
    let mac = multicast::mac_of(GROUP.into());
    let frame = ethernet(pod_mac(1, 2), mac, 0x0800, &bytes);
    let mut room = [&[0; HEADROOM][..], &frame].concat();
    let packet = PacketBuf::new(&mut room, HEADROOM, frame.len()).unwrap();
    let mut packet = packet.with_offload(header);
    let verdict = node.from_port(NOW, POD_PORT, &mut packet);
    assert_eq!(verdict, Verdict::Consumed);
    assert_eq!(packet.as_slice(), frame);

    let mut storage = vec![0; HEADROOM + frame::MAX_LEN];
    let mut copy = PacketBuf::new(&mut storage, 0, 0).unwrap();
    assert_eq!(node.poll_output(&mut copy), Some(Verdict::Port(OTHER_PORT)));
    assert_eq!((copy.offload(), copy.as_slice()), (header, &frame[..]));
    let verdict = node.poll_output(&mut copy);
    assert!(matches!(verdict, Some(Verdict::Peer { .. })), "{verdict:?}");
    let moved = header.moved(0, 8).unwrap();
    assert_eq!(copy.offload(), moved);
    assert_eq!(node.poll_output(&mut copy), None);
}

/// A single packet's checksum is finished for a peer that takes no partial ones, and for another source.
#[test]
fn checksums_are_right_where_packets_cross() {
    let mut node = follower(1);
    let mut bytes = udp_v6("fe80::2".parse().unwrap(), multicast::MDNS_V6, 255, 5353);
    let at = Transport::parse(&bytes, 0).unwrap();
    let partial = at.pseudo_header(&bytes, at.end - at.l4);
    bytes[46..48].copy_from_slice(&partial.to_be_bytes());
    let header = Header {
        checksum: Checksum::Partial {
            start: 54,
            offset: 6,
        },
        ..Header::default()
    };
    let mac = multicast::mac_of(multicast::MDNS_V6.into());
    let frame = ethernet(pod_mac(1, 2), mac, 0x86dd, &bytes);
    let mut room = [&[0; HEADROOM][..], &frame].concat();
    let packet = PacketBuf::new(&mut room, HEADROOM, frame.len()).unwrap();
    node.from_port(NOW, POD_PORT, &mut packet.with_offload(header));
    let all = copies(&mut node);
    let inner = &to_peers(&all)[0][22..];
    assert_eq!(v6::check(inner), Ok(inner.len()));
    let state = Transport::parse(inner, 0).unwrap().checksum_state(inner);
    assert_eq!(state, ChecksumState::Valid);
}

#[test]
fn policies_are_asked_about_the_sender_and_each_member() {
    let mut node = follower(1);
    joins(&mut node, OTHER_PORT, GROUP);
    outputs(&mut node);
    node.filter_mut().asked.clear();
    sends(&mut node, 1, POD_PORT, &udp(pod(1, 2), GROUP, 1, 9));
    outputs(&mut node);
    let asked = [(Direction::ToAll, POD_PORT), (Direction::ToPod, OTHER_PORT)];
    assert_eq!(node.filter_mut().asked, asked);
}
