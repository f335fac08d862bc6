//! Datagrams and echo requests of pods that come in fragments.

use std::net::Ipv4Addr;

use etherparse::{IpNumber, Ipv4Header, PacketBuilder};
use muslin_encap::ip::fragment::Fragments;
use proptest::prelude::*;
use smoltcp::wire::Ipv4Packet;

use super::bed::{Bed, pattern, server};
use super::*;

const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
const OTHER_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 3);
/// Payload of all fragments but the last that fit the MTU.
const STEP: usize = 1424;

/// A datagram from a pod, whose identification is its number.
fn datagram(pod: Ipv4Addr, ident: u16, payload: &[u8]) -> Vec<u8> {
    let mut header = Ipv4Header::new(
        (8 + payload.len()) as u16,
        64,
        IpNumber::UDP,
        pod.octets(),
        SERVER.octets(),
    )
    .unwrap();
    header.identification = ident;
    header.dont_fragment = false;
    let mut bytes = Vec::new();
    PacketBuilder::ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
        .udp(5000, server().port())
        .write(&mut bytes, payload)
        .unwrap();
    bytes
}

fn cut(packet: &[u8], mtu: u16) -> Vec<Vec<u8>> {
    let mut fragments = Fragments::new(packet, Mtu::new(mtu.into()).unwrap()).unwrap();
    let mut buffer = vec![0; 65_535];
    let next = || {
        let len = fragments.write_next(&mut buffer)?;
        Some(buffer[..len].to_vec())
    };
    std::iter::from_fn(next).collect()
}

fn fragments(pod: Ipv4Addr, ident: u16, payload: &[u8]) -> Vec<Vec<u8>> {
    cut(&datagram(pod, ident, payload), super::bed::MTU)
}

/// A fragment of its own, of so many bytes of payload from there on.
fn piece(ident: u16, start: usize, len: usize, more: bool) -> Vec<u8> {
    let mut header =
        Ipv4Header::new(len as u16, 64, IpNumber::UDP, POD.octets(), SERVER.octets()).unwrap();
    header.identification = ident;
    header.dont_fragment = false;
    header.more_fragments = more;
    header.fragment_offset = ((start / 8) as u16).try_into().unwrap();
    header.header_checksum = header.calc_header_checksum();
    let mut bytes = Vec::new();
    header.write(&mut bytes).unwrap();
    bytes.extend(pattern(len, start as u8));
    bytes
}

fn send_all<'a>(bed: &mut Bed, fragments: impl IntoIterator<Item = &'a Vec<u8>>) {
    for fragment in fragments {
        bed.send(fragment);
    }
}

/// What the host's sockets were given.
fn sent(bed: &Bed) -> Vec<Vec<u8>> {
    let sockets = bed.host.sockets.values();
    sockets
        .flat_map(|socket| socket.sent.iter().map(|(_, datagram)| datagram.clone()))
        .collect()
}

#[test]
fn datagrams_in_fragments_go_on_whole() {
    let mut bed = Bed::new();
    let payloads = [pattern(9000, 1), pattern(65_507, 2), pattern(1500, 3)];
    for (payload, ident) in payloads.iter().zip(1..) {
        let fragments = fragments(POD, ident, payload);
        assert!(fragments.len() > 1);
        send_all(&mut bed, &fragments);
    }
    assert_eq!(sent(&bed), payloads);
    assert_eq!(bed.host.sockets.len(), 1, "one flow");
    assert_eq!(bed.dropped, []);
    assert_eq!(bed.pods.lost, [].into());
}

#[test]
fn echo_requests_in_fragments_go_on_whole() {
    let mut bed = Bed::new();
    let mut request = Vec::new();
    PacketBuilder::ipv4(POD.octets(), SERVER.octets(), 64)
        .icmpv4_echo_request(7, 1)
        .write(&mut request, &pattern(4000, 5))
        .unwrap();
    request[6] = 0;
    Ipv4Packet::new_unchecked(&mut request).fill_checksum();
    send_all(&mut bed, &cut(&request, 1450));
    assert_eq!(sent(&bed), [&request[20..]]);
}

#[test]
fn a_datagram_whose_checksum_is_wrong_is_dropped() {
    let mut bed = Bed::new();
    let mut fragments = fragments(POD, 1, &pattern(3000, 1));
    fragments[1][100] ^= 1;
    send_all(&mut bed, &fragments);
    assert_eq!(bed.dropped, [DropReason::EgressMalformed]);
    assert!(bed.host.sockets.is_empty());
}

#[test]
fn a_fragment_that_comes_twice_does_no_harm() {
    let mut bed = Bed::new();
    let payload = pattern(5000, 1);
    let mut fragments = fragments(POD, 1, &payload);
    for (round, count) in [(1, 3), (2, 6)] {
        for fragment in &fragments[..fragments.len() - 1] {
            send_all(&mut bed, [fragment, fragment]);
        }
        bed.send(fragments.last().unwrap());
        assert_eq!(sent(&bed), vec![payload.clone(); round]);
        assert_eq!(
            bed.dropped,
            [DropReason::EgressFragmentDuplicate; 6][..count]
        );
        fragments.reverse();
    }
}

#[test]
fn fragments_that_overlap_take_the_whole_packet_with_them() {
    let fragments = fragments(POD, 1, &pattern(5000, 1));
    let mut other_bytes = fragments[1].clone();
    other_bytes[100] ^= 1;
    let intruders = [
        ("from within", piece(1, STEP + 8, STEP, true)),
        ("around", piece(1, STEP - 8, 1440, true)),
        ("on the same place", other_bytes),
        ("with an end before it", piece(1, STEP, 100, false)),
    ];
    for (what, intruder) in intruders {
        let mut bed = Bed::new();
        send_all(&mut bed, &fragments[..2]);
        bed.send(&intruder);
        send_all(&mut bed, &fragments[2..]);
        assert!(bed.host.sockets.is_empty(), "{what}");
        let overlap = DropReason::EgressFragmentOverlap;
        assert_eq!(bed.dropped, [overlap; 3], "{what}");
        assert_eq!(bed.pods.lost, [(overlap, 2)].into(), "{what}");
        // Its name is free again after its time, without another word.
        bed.pass(Duration::from_secs(30));
        assert_eq!(bed.pods.reports, [], "{what}");
        send_all(&mut bed, &fragments);
        assert_eq!(sent(&bed), [pattern(5000, 1)], "{what}");
    }
}

#[test]
fn a_packet_has_one_end() {
    let overlap = DropReason::EgressFragmentOverlap;
    for (first, second) in [
        (piece(1, 160, 80, false), piece(1, 240, 80, true)),
        (piece(1, 160, 80, false), piece(1, 240, 80, false)),
        (piece(1, 160, 80, false), piece(1, 80, 72, false)),
        (piece(1, 160, 80, true), piece(1, 80, 72, false)),
    ] {
        let mut bed = Bed::new();
        send_all(&mut bed, [&first, &second]);
        assert_eq!(bed.dropped, [overlap]);
        assert_eq!(bed.pods.lost, [(overlap, 1)].into());
    }
}

#[test]
fn fragments_that_no_link_makes_are_refused() {
    let mut bed = Bed::new();
    let refused = [
        piece(1, 0, 8, true),
        piece(2, 0, 40, true),
        piece(3, 0, 100, true),
        piece(4, 80, 0, false),
        // Beyond the end of the longest packet.
        piece(5, 65_528, 80, false),
        piece(6, 65_448, 80, false),
    ];
    send_all(&mut bed, &refused);
    assert_eq!(bed.dropped, [DropReason::EgressFragmentInvalid; 6]);
    assert_eq!(bed.egress.poll_at(), None, "nothing is kept");
    // The longest packet there can be, and one that a longer header makes longer.
    let mut with_options = piece(8, 0, 72, true);
    with_options.splice(20..20, [1, 1, 1, 0]);
    with_options[0] = 0x46;
    with_options[3] += 4;
    for (ident, mut first) in [(7, piece(7, 0, 72, true)), (8, with_options)] {
        first[9] = 132;
        send_all(&mut bed, [&first]);
        for start in (72..65_448).step_by(65_376 / 2) {
            let mut next = piece(ident, start, 65_376 / 2, true);
            next[9] = 132;
            bed.send(&next);
        }
        let mut last = piece(ident, 65_448, 67, false);
        last[9] = 132;
        bed.send(&last);
    }
    let reasons = [
        DropReason::EgressProtocol,
        DropReason::EgressFragmentInvalid,
    ];
    assert_eq!(bed.dropped[6..], reasons);
    assert_eq!(
        bed.pods.lost,
        [(DropReason::EgressFragmentInvalid, 3)].into()
    );
}

#[test]
fn what_does_not_become_whole_in_time_is_given_up() {
    let mut bed = Bed::new();
    let payload = pattern(3000, 1);
    let with_first = fragments(POD, 1, &payload);
    let without = fragments(POD, 2, &payload);
    send_all(&mut bed, &with_first[..2]);
    bed.pass(Duration::from_secs(10));
    send_all(&mut bed, &without[1..]);
    bed.pass(Duration::from_secs(20) - Duration::from_micros(1));
    assert_eq!(bed.pods.lost, [].into());
    bed.pass(Duration::from_micros(1));
    let timeout = DropReason::EgressFragmentTimeout;
    assert_eq!(bed.pods.lost, [(timeout, 2)].into());
    bed.pass(Duration::from_secs(10));
    assert_eq!(bed.pods.lost, [(timeout, 4)].into());
    // Only the first fragment says what it was about (RFC 792).
    let [(error, offender)] = bed.pods.reports.as_slice() else {
        panic!("{:?}", bed.pods.reports);
    };
    assert_eq!(*error, IcmpError::ReassemblyTimeExceeded);
    assert_eq!(*offender, with_first[0]);
    assert_eq!(bed.egress.poll_at(), None);
    // What comes too late waits again, for others.
    bed.send(&with_first[2]);
    assert!(bed.host.sockets.is_empty());
    assert_eq!(bed.dropped, []);
}

#[test]
fn a_pod_that_completes_nothing_is_in_no_others_way() {
    let mut bed = Bed::new();
    let payload = pattern(3000, 1);
    let mine = fragments(OTHER_POD, 7, &payload);
    bed.send(&mine[0]);
    for ident in 0..10_000 {
        bed.send(&fragments(POD, ident, &payload)[0]);
    }
    let full = DropReason::EgressFragmentsFull;
    assert_eq!(bed.pods.lost, [(full, 10_000 - 16)].into());
    send_all(&mut bed, &mine[1..]);
    assert_eq!(sent(&bed), std::slice::from_ref(&payload));
    // Its own latest are still there.
    send_all(&mut bed, &fragments(POD, 9_999, &payload)[1..]);
    assert_eq!(sent(&bed).len(), 2);
    assert_eq!(bed.dropped, []);
}

#[test]
fn packets_of_all_pods_are_bounded() {
    let mut bed = Bed::new();
    let payload = pattern(3000, 1);
    for pod in 2..=200 {
        let pod = Ipv4Addr::new(10, 244, 1, pod);
        bed.send(&fragments(pod, 1, &payload)[0]);
    }
    let full = DropReason::EgressFragmentsFull;
    assert_eq!(bed.pods.lost, [(full, 199 - 64)].into());
    // Too many holes in one packet are too much as well.
    let mut bed = Bed::new();
    for start in (160..32_000).step_by(160) {
        bed.send(&piece(1, start, 80, true));
    }
    let count = bed.dropped.len();
    assert!((100..=198).contains(&count), "{count} of 199");
    assert!(bed.dropped.iter().all(|reason| *reason == full));
}

#[test]
fn fragments_of_a_pod_end_with_it() {
    let mut bed = Bed::new();
    let payload = pattern(3000, 1);
    send_all(&mut bed, &fragments(POD, 1, &payload)[..2]);
    send_all(&mut bed, &fragments(OTHER_POD, 1, &payload)[..2]);
    bed.call(|egress, _, host| egress.forget_pod(POD.into(), host));
    let timeout = DropReason::EgressFragmentTimeout;
    assert_eq!(bed.pods.lost, [(timeout, 2)].into());
    bed.send(&fragments(POD, 1, &payload)[2]);
    assert!(bed.host.sockets.is_empty());
    bed.send(&fragments(OTHER_POD, 1, &payload)[2]);
    assert_eq!(sent(&bed), [payload]);
}

proptest! {
    #[test]
    fn fragments_make_the_datagram_in_any_order(
        payload in proptest::collection::vec(any::<u8>(), 200..3000),
        mtu in 300u16..1450,
        order in any::<u64>(),
    ) {
        let mut bed = Bed::new();
        let mut fragments = cut(&datagram(POD, 9, &payload), mtu);
        // A permutation from the number, by Lehmer's code.
        let mut order = order;
        let mut shuffled = Vec::new();
        while !fragments.is_empty() {
            let len = fragments.len() as u64;
            shuffled.push(fragments.remove((order % len) as usize));
            order = order.rotate_right(7) ^ len;
        }
        if shuffled.len() > 1 {
            send_all(&mut bed, &shuffled);
            prop_assert_eq!(sent(&bed), [payload]);
            prop_assert_eq!(&bed.dropped, &[]);
        }
    }

    #[test]
    fn no_fragments_do_harm(
        pieces in proptest::collection::vec((0usize..20, 0usize..30, 0usize..200, any::<bool>()), 1..60),
    ) {
        let mut bed = Bed::new();
        for (ident, start, len, more) in &pieces {
            bed.send(&piece(*ident as u16, start * 8, *len, *more));
        }
        bed.pass(Duration::from_secs(31));
        // Each was counted, or was a part of a packet that was.
        let lost = bed.pods.lost.values().sum::<u64>() as usize;
        prop_assert!(lost + bed.dropped.len() <= pieces.len());
        prop_assert!(!bed.dropped.is_empty() || lost == pieces.len());
        prop_assert_eq!(bed.egress.poll_at(), None);
    }
}
