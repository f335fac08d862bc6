//! Superpackets go through a node as one packet, or come out in pieces where they must.

use muslin_encap::ip::checksum;
use muslin_encap::ip::transport::{ChecksumState, Transport};
use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};

use super::*;

const PAYLOAD: usize = 3000;

/// A UDP packet between pods of two nodes whose checksum is unfinished, and the device's header
/// for the frame it is in.
fn superpacket(to: Ipv4Addr, size: Option<u16>, dont_fragment: bool) -> (Vec<u8>, Header) {
    let mut bytes = Vec::new();
    let payload: Vec<u8> = (0..PAYLOAD).map(|i| i as u8).collect();
    PacketBuilder::ipv4(pod(1, 2).octets(), to.octets(), 64)
        .udp(1, 2)
        .write(&mut bytes, &payload)
        .unwrap();
    set_dont_fragment(&mut bytes, dont_fragment);
    let at = Transport::parse(&bytes, 0).unwrap();
    let partial = at.pseudo_header(&bytes, at.end - at.l4);
    bytes[at.checksum_offset()..at.checksum_offset() + 2].copy_from_slice(&partial.to_be_bytes());
    let header = Header {
        checksum: Checksum::Partial {
            start: 34,
            offset: 6,
        },
        gso: size.map(|size| Gso {
            kind: GsoKind::Udp,
            size,
            ecn: false,
        }),
        hdr_len: 42,
    };
    (bytes, header)
}

/// What becomes of a frame with a device's header: verdict, header, bytes.
fn offloaded(node: &mut Node, frame: &[u8], header: Header) -> (Verdict, Header, Vec<u8>) {
    let mut after = Header::default();
    let (verdict, bytes) = through(frame, |packet| {
        let storage = packet.as_slice().to_vec();
        let mut room = vec![0; HEADROOM + storage.len()];
        room[HEADROOM..].copy_from_slice(&storage);
        let mut inner = PacketBuf::new(&mut room, HEADROOM, storage.len())
            .unwrap()
            .with_offload(header);
        let verdict = node.from_port(NOW, POD_PORT, &mut inner);
        after = inner.offload();
        packet.replace(inner.as_slice()).unwrap();
        verdict
    });
    (verdict, after, bytes)
}

fn checksum_of(packet: &[u8], at: usize) -> ChecksumState {
    let packet = &packet[at..];
    Transport::parse(packet, 0).unwrap().checksum_state(packet)
}

#[test]
fn a_superpacket_leaves_whole_and_its_header_with_it() {
    for (format, before) in [("vxlan", 22), ("udp", 0)] {
        let mut node = node(1, format);
        let (packet, header) = superpacket(pod(2, 2), Some(1000), true);
        let (verdict, after, bytes) = offloaded(&mut node, &pod_frame(&packet), header);
        assert!(matches!(verdict, Verdict::Peer { .. }));
        assert_eq!(
            after,
            header.moved(14, 0).unwrap().moved(0, before).unwrap()
        );
        assert_eq!(bytes.len(), before + packet.len());
        assert_eq!(bytes[before + 28..], packet[28..], "the payload stays");
        let sent: Vec<_> = node.peers().map(|state| state.sent).collect();
        assert_eq!((sent[0].packets, sent[0].bytes), (1, bytes.len() as u64));
        assert_adds_up(&node);
    }
}

#[test]
fn checksums_are_finished_only_for_a_wire() {
    let mut node = node(1, "vxlan");
    let (packet, header) = single(pod(2, 2));
    let (verdict, after, bytes) = offloaded(&mut node, &pod_frame(&packet), header);
    assert!(matches!(verdict, Verdict::Peer { .. }));
    assert_eq!(after, Header::default());
    assert_eq!(checksum_of(&bytes, 22), ChecksumState::Valid);

    let neighbour = ethernet(pod_mac(1, 2), pod_mac(1, 3), 0x0800, &packet);
    let (verdict, after, bytes) = offloaded(&mut node, &neighbour, header);
    assert_eq!((verdict, after), (Verdict::Port(OTHER_PORT), header));
    assert_eq!(bytes, neighbour);
}

/// A single UDP packet of 1,000 bytes of payload whose checksum is unfinished.
fn single(to: Ipv4Addr) -> (Vec<u8>, Header) {
    let (mut packet, header) = superpacket(to, None, false);
    packet.truncate(1028);
    let mut view = Ipv4Packet::new_unchecked(&mut packet[..]);
    view.set_total_len(1028);
    view.fill_checksum();
    packet[24..26].copy_from_slice(&1008u16.to_be_bytes());
    let at = Transport::parse(&packet, 0).unwrap();
    let partial = at.pseudo_header(&packet, 1008);
    packet[26..28].copy_from_slice(&partial.to_be_bytes());
    (
        packet,
        Header {
            hdr_len: 0,
            ..header
        },
    )
}

#[test]
fn checksums_are_left_to_a_peer_that_takes_them() {
    for format in ["vxlan", "udp"] {
        let (mut one, mut two) = (node(1, format), node(2, format));
        let peers: Vec<_> = one.peers().map(|state| state.peer).collect();
        let [peer] = &peers[..] else { panic!() };
        one.set_peer(peer.clone().with_checksums(Checksums::Partial));
        let (packet, header) = single(pod(2, 2));
        let (verdict, _, datagram) = offloaded(&mut one, &pod_frame(&packet), header);
        assert!(
            matches!(
                verdict,
                Verdict::Peer {
                    checksums: Checksums::Partial,
                    ..
                }
            ),
            "{verdict:?}"
        );
        let network = if format == "vxlan" { 22 } else { 0 };
        assert_eq!(checksum_of(&datagram, network), ChecksumState::Partial);
        // Its device gets it with the word that this is so.
        let (verdict, frame) = from_peer(&mut two, 1, &datagram);
        assert_eq!(verdict, Verdict::Port(POD_PORT));
        assert_eq!(
            checksum_of(&frame, frame::HEADER_LEN),
            ChecksumState::Partial
        );

        // What is not TCP's or UDP's checksum, and where those have it, is finished here.
        let mut other = packet.clone();
        other[9] = 132;
        Ipv4Packet::new_unchecked(&mut other[..]).fill_checksum();
        let (_, after, datagram) = offloaded(&mut one, &pod_frame(&other), header);
        assert_eq!(after.checksum, Checksum::Unknown);
        assert_ne!(datagram[network + 26..network + 28], packet[26..28]);
    }
}

#[test]
fn segments_larger_than_the_mtu_are_reported_or_fragmented() {
    let mut node = node(1, "udp");
    let (packet, header) = superpacket(pod(2, 2), Some(1460), true);
    let (verdict, ..) = offloaded(&mut node, &pod_frame(&packet), header);
    assert_eq!(verdict, Verdict::Drop(DropReason::FragmentationNeeded));
    let errors = outputs(&mut node);
    assert_eq!(icmp_of(&errors[0].1).2, Icmpv4Message::DstUnreachable);

    let (packet, header) = superpacket(pod(2, 2), Some(1460), false);
    let (verdict, ..) = offloaded(&mut node, &pod_frame(&packet), header);
    assert_eq!(verdict, Verdict::Consumed);
    let pieces = outputs(&mut node);
    assert_eq!(
        pieces.len(),
        5,
        "two segments in two fragments and a small one"
    );
    for (verdict, piece) in &pieces {
        assert!(matches!(verdict, Verdict::Peer { .. }) && piece.len() <= 1450);
        assert_eq!(Ipv4Packet::new_checked(&piece[..]).unwrap().hop_limit(), 63);
    }
    assert_eq!(checksum_of(&pieces[4].1, 0), ChecksumState::Valid);
    assert_adds_up(&node);
}

#[test]
fn a_datagram_larger_than_the_mtu_is_reported_or_fragmented() {
    for (dont_fragment, expected, pieces) in [
        (true, Verdict::Drop(DropReason::FragmentationNeeded), 1),
        (false, Verdict::Consumed, 3),
    ] {
        let mut node = node(1, "udp");
        let (packet, header) = superpacket(pod(2, 2), None, dont_fragment);
        let (verdict, ..) = offloaded(&mut node, &pod_frame(&packet), header);
        assert_eq!(verdict, expected);
        assert_eq!(outputs(&mut node).len(), pieces);
        assert_adds_up(&node);
    }
}

#[test]
fn what_must_wait_for_a_neighbour_waits_in_segments() {
    let mut node = bare_node(1, "vxlan");
    node.attach(POD_PORT, attachment(1, 2, false));
    let (packet, header) = superpacket(pod(1, 50), Some(1000), true);
    let (verdict, ..) = offloaded(&mut node, &pod_frame(&packet), header);
    assert_eq!(verdict, Verdict::Consumed);
    outputs(&mut node);
    let reply = frame::write_arp(
        ArpOperation::Reply,
        (pod_mac(1, 50), pod(1, 50)),
        (GATEWAY_MAC, pod(1, 1)),
    );
    node.attach(OTHER_PORT, attachment(1, 3, false));
    through(&reply, |packet| node.from_port(NOW, OTHER_PORT, packet));
    let released = outputs(&mut node);
    assert_eq!(released.len(), 3);
    for (i, (verdict, bytes)) in released.iter().enumerate() {
        assert_eq!(*verdict, Verdict::Port(OTHER_PORT));
        assert_eq!(bytes[42..], packet[28 + 1000 * i..28 + 1000 * (i + 1)]);
        assert_eq!(checksum_of(bytes, 14), ChecksumState::Valid);
    }
    assert_adds_up(&node);
}

/// Two further segments of [`merged`].
const TAIL: [&[u8]; 2] = [&[5; 1000], &[5; 1000]];

/// A datagram from node 2 whose segments were merged, as a head of one segment and the rest,
/// with the device's header.
fn merged(to: Ipv4Addr) -> (Vec<u8>, [&'static [u8]; 2], Header) {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(pod(2, 2).octets(), to.octets(), 64)
        .udp(1, 2)
        .write(&mut packet, &[5; PAYLOAD])
        .unwrap();
    let mut storage = peer_frame(&packet);
    storage.truncate(storage.len() - TAIL.concat().len());
    let header = Header {
        gso: Some(Gso {
            kind: GsoKind::Udp,
            size: 1000,
            ecn: false,
        }),
        checksum: Checksum::Partial {
            start: 42,
            offset: 6,
        },
        hdr_len: 50,
    };
    (storage, TAIL, header)
}

#[test]
fn a_merged_packet_is_delivered_by_its_head() {
    let mut node = node(1, "vxlan");
    let (mut storage, tail, header) = merged(pod(1, 2));
    let head = storage.len();
    let mut merged = PacketBuf::new(&mut storage, 0, head)
        .unwrap()
        .with_offload(header)
        .with_tail(&tail);
    let verdict = node.from_underlay(NOW, underlay(2).into(), &mut merged);
    assert_eq!(verdict, Verdict::Port(POD_PORT));
    assert_eq!(merged.offload(), header.moved(22, 14).unwrap());
    assert_eq!(
        (merged.len(), merged.total_len()),
        (head - 8, head - 8 + 2000)
    );
    assert_adds_up(&node);
}

#[test]
fn a_merged_packet_does_not_wait_for_a_neighbour() {
    let mut node = node(1, "vxlan");
    node.attach(PortId(3), attachment(1, 4, false));
    let (mut storage, tail, header) = merged(pod(1, 50));
    let head = storage.len();
    let mut merged = PacketBuf::new(&mut storage, 0, head)
        .unwrap()
        .with_offload(header)
        .with_tail(&tail);
    let verdict = node.from_underlay(NOW, underlay(2).into(), &mut merged);
    assert_eq!(verdict, Verdict::Drop(DropReason::SuperpacketRefused));
    assert_adds_up(&node);
}

#[test]
fn a_superpacket_of_more_packets_than_a_kernel_makes_goes_nowhere() {
    // 128 segments are as many as Linux has in one.
    let (least, outside) = (PAYLOAD.div_ceil(128) as u16, Ipv4Addr::new(192, 0, 2, 9));
    for to in [pod(2, 2), outside, pod(1, 1)] {
        for (size, is_refused) in [(1, true), (least - 1, true), (least, false)] {
            let mut node = node(1, "vxlan");
            node.set_egress(Some("10.244.0.0/16".parse().unwrap()));
            let (packet, header) = superpacket(to, Some(size), false);
            let (verdict, ..) = offloaded(&mut node, &pod_frame(&packet), header);
            let refused = Verdict::Drop(DropReason::SuperpacketRefused);
            assert_eq!(verdict == refused, is_refused, "{to} {size}: {verdict:?}");
            assert_adds_up(&node);
        }
        // TCP is what its header says, not UDP.
        let mut node = node(1, "vxlan");
        node.set_egress(Some("10.244.0.0/16".parse().unwrap()));
        let (packet, mut header) = superpacket(to, Some(1000), false);
        header.gso = header.gso.map(|gso| Gso {
            kind: GsoKind::TcpV4,
            ..gso
        });
        let (verdict, ..) = offloaded(&mut node, &pod_frame(&packet), header);
        assert_eq!(
            verdict,
            Verdict::Drop(DropReason::SuperpacketRefused),
            "{to}"
        );
    }
}

#[test]
fn a_header_that_contradicts_its_frame_is_refused() {
    let mut node = node(1, "vxlan");
    let (packet, mut header) = superpacket(pod(2, 2), Some(1000), true);
    header.checksum = Checksum::Unknown;
    let (verdict, ..) = offloaded(&mut node, &pod_frame(&packet), header);
    assert_eq!(verdict, Verdict::Drop(DropReason::VirtioHeader));
    node.refuse_frame(POD_PORT, 60);
    assert_eq!(node.counters().dropped_for(DropReason::VirtioHeader), 2);

    assert_adds_up(&node);
}

#[test]
fn a_checksum_is_not_finished_where_the_guard_has_looked() {
    let neighbour = |packet: &[u8]| ethernet(pod_mac(1, 2), pod_mac(1, 3), 0x0800, packet);
    let (packet, header) = superpacket(pod(2, 2), None, false);
    let frames = [pod_frame(&packet), neighbour(&packet)];
    // In the Ethernet header, and where IPv4 has its addresses.
    for (start, offset) in [(0, 0), (0, 6), (13, 20), (14, 12), (14, 16), (33, 0)] {
        for frame in &frames {
            let mut node = node(1, "vxlan");
            let checksum = Checksum::Partial { start, offset };
            let header = Header { checksum, ..header };
            let (verdict, ..) = offloaded(&mut node, frame, header);
            let refused = Verdict::Drop(DropReason::VirtioHeader);
            assert_eq!(verdict, refused, "{start} {offset}");
            assert_adds_up(&node);
        }
    }

    // Behind it it is finished first. Here that makes a datagram one of a DHCP server.
    let mut packet = Vec::new();
    PacketBuilder::ipv4(pod(1, 2).octets(), pod(1, 3).octets(), 64)
        .udp(67, 69)
        .write(&mut packet, &[0; 40])
        .unwrap();
    let becomes_server = |last: &u16| {
        let mut packet = packet.clone();
        packet[66..].copy_from_slice(&last.to_be_bytes());
        checksum::complete(&mut packet, 20, 2);
        packet[22..24] == 68u16.to_be_bytes()
    };
    let last = (0..=u16::MAX).find(becomes_server).unwrap();
    packet[66..].copy_from_slice(&last.to_be_bytes());
    let checksum = Checksum::Partial {
        start: 34,
        offset: 2,
    };
    let mut node = node(1, "vxlan");
    let header = Header { checksum, ..header };
    let (verdict, ..) = offloaded(&mut node, &neighbour(&packet), header);
    assert_eq!(verdict, Verdict::Drop(DropReason::DhcpServer));
    assert_adds_up(&node);
}
