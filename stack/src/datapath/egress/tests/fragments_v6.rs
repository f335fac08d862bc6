//! Datagrams and echo requests of pods that come in fragments of IPv6. The table has the cases of
//! OpenBSD's `regress/sys/netinet6/frag6` and those of RFC 5722, 6946, 7112 and 8200.

use proptest::prelude::*;

use super::bed::{Bed, from_to, pattern, ping, pod, pod_at, server, with};
use super::*;

const TIMEOUT: Duration = Duration::from_secs(60);
const FRAGMENT: u8 = 44;
const UDP: u8 = 17;

/// A packet of UDP from a pod.
fn datagram(from: IpAddr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = from_to(from, server().ip()).udp(5000, server().port());
    builder.write(&mut bytes, payload).unwrap();
    bytes
}

/// A fragment of a packet: bytes of what is behind its header.
fn piece(packet: &[u8], id: u32, start: usize, bytes: &[u8], more: bool) -> Vec<u8> {
    let offset = (start as u16) | u16::from(more);
    let header = [
        &[packet[6], 0][..],
        &offset.to_be_bytes(),
        &id.to_be_bytes(),
    ]
    .concat();
    let mut fragment = [&packet[..40], &header, bytes].concat();
    fragment[6] = FRAGMENT;
    let len = (fragment.len() - 40) as u16;
    fragment[4..6].copy_from_slice(&len.to_be_bytes());
    fragment
}

/// A packet in fragments of so many bytes.
fn cut(packet: &[u8], id: u32, step: usize) -> Vec<Vec<u8>> {
    let payload = &packet[40..];
    let starts = (0..payload.len()).step_by(step);
    starts
        .map(|start| {
            let end = payload.len().min(start + step);
            piece(packet, id, start, &payload[start..end], end < payload.len())
        })
        .collect()
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

fn v6(test: impl FnOnce()) {
    with(IpVersion::Ipv6, test);
}

#[test]
fn datagrams_in_fragments_go_on_whole_and_may_be_cut_again() {
    v6(|| {
        let mut bed = Bed::new();
        let payloads = [pattern(9000, 1), pattern(65_527, 2), pattern(1500, 3)];
        for (payload, id) in payloads.iter().zip(1..) {
            send_all(&mut bed, &cut(&datagram(pod(), payload), id, 1400));
        }
        assert_eq!(sent(&bed), payloads);
        assert_eq!(bed.host.sockets.len(), 1, "one flow");
        let id = bed.last();
        assert!(bed.fake(id).marks.iter().all(|it| !it.dont_fragment));
        bed.send(&datagram(pod(), b"whole"));
        let last = bed.fake(id).marks.last().copied();
        assert!(last.unwrap().dont_fragment);

        let request = ping(false, (pod(), server().ip()), (7, 1), &pattern(4000, 5));
        send_all(&mut bed, &cut(&request, 9, 1400));
        let id = bed.last();
        assert_eq!(bed.fake(id).sent[0].1, request[40..]);
        assert_eq!((bed.dropped, bed.pods.lost), (vec![], [].into()));
    });
}

/// Fragments of a packet of 64 bytes behind the header, as (offset, length, more, what they hold
/// instead of the packet's bytes), and what becomes of them.
#[test]
fn fragments_that_overlap_take_the_whole_packet_with_them() {
    type Piece = (usize, usize, bool);
    let overlap = DropReason::EgressFragmentOverlap;
    let cases: &[(&str, &[Piece], bool)] = &[
        ("in order", &[(0, 24, true), (24, 40, false)], true),
        (
            "the last one first",
            &[(24, 40, false), (0, 24, true)],
            true,
        ),
        (
            "in three",
            &[(0, 16, true), (16, 16, true), (32, 32, false)],
            true,
        ),
        (
            "the middle last",
            &[(0, 16, true), (32, 32, false), (16, 16, true)],
            true,
        ),
        (
            "one twice",
            &[(0, 24, true), (0, 24, true), (24, 40, false)],
            true,
        ),
        (
            "the last twice",
            &[(24, 40, false), (24, 40, false), (0, 24, true)],
            true,
        ),
        (
            "a part of one again",
            &[(0, 24, true), (8, 8, true), (24, 40, false)],
            true,
        ),
        (
            "overlap at the head",
            &[(16, 48, false), (0, 24, true)],
            false,
        ),
        (
            "overlap at the tail",
            &[(0, 24, true), (16, 48, false)],
            false,
        ),
        (
            "one around another",
            &[(16, 16, true), (8, 32, true), (0, 8, true)],
            false,
        ),
        ("one over the rest", &[(0, 16, true), (8, 56, false)], false),
        (
            "two ends",
            &[(24, 40, false), (24, 32, false), (0, 24, true)],
            false,
        ),
        (
            "behind the end",
            &[(24, 16, false), (40, 24, true), (0, 24, true)],
            false,
        ),
        (
            "an end before what is there",
            &[(32, 32, true), (8, 24, false), (0, 8, true)],
            false,
        ),
        (
            "an end inside",
            &[(32, 32, true), (0, 32, true), (32, 16, false)],
            false,
        ),
    ];
    v6(|| {
        let packet = datagram(pod(), &pattern(56, 3));
        for (what, pieces, is_whole) in cases {
            let mut bed = Bed::new();
            for (start, len, more) in *pieces {
                let bytes = &packet[40 + start..40 + start + len];
                bed.send(&piece(&packet, 1, *start, bytes, *more));
            }
            let expected = if *is_whole {
                vec![pattern(56, 3)]
            } else {
                vec![]
            };
            assert_eq!(sent(&bed), expected, "{what}");
            assert_eq!(!bed.dropped.contains(&overlap), *is_whole, "{what}");
            // Nobody hears of what is given up for that (RFC 5722 section 4).
            assert_eq!(bed.pods.reports, [], "{what}");
            bed.pass(TIMEOUT);
            assert_eq!(bed.pods.reports, [], "{what}");
        }
        // The same place with other bytes.
        let mut bed = Bed::new();
        let other = pattern(24, 77);
        bed.send(&piece(&packet, 1, 0, &packet[40..64], true));
        bed.send(&piece(&packet, 1, 0, &other, true));
        bed.send(&piece(&packet, 1, 24, &packet[64..], false));
        assert_eq!((sent(&bed), bed.dropped), (vec![], vec![overlap; 2]));
    });
}

#[test]
fn a_fragment_that_is_a_whole_packet_waits_for_no_other() {
    v6(|| {
        let mut bed = Bed::new();
        let packet = datagram(pod(), b"atomic");
        // Others with the same number are of another packet (RFC 6946 section 4).
        let long = datagram(pod(), &pattern(3000, 1));
        let fragments = cut(&long, 7, 1400);
        bed.send(&fragments[0]);
        bed.send(&piece(&packet, 7, 0, &packet[40..], false));
        assert_eq!(sent(&bed), [b"atomic"]);
        send_all(&mut bed, &fragments[1..]);
        assert_eq!(sent(&bed).len(), 2);
        assert_eq!(bed.dropped, []);
    });
}

#[test]
fn what_is_wrong_with_lengths_is_told() {
    let problem = |pointer| IcmpError::ParameterProblem { code: 0, pointer };
    v6(|| {
        let packet = datagram(pod(), &[0; 8]);
        let bytes = pattern(1400, 1);
        for (what, fragment, told) in [
            (
                "no multiple of eight",
                piece(&packet, 1, 0, &bytes[..1001], true),
                Some(problem(4)),
            ),
            (
                "too long",
                piece(&packet, 1, 65_528, &bytes[..8], false),
                None,
            ),
            ("empty", piece(&packet, 1, 80, &[], false), None),
        ] {
            let mut bed = Bed::new();
            bed.send(&fragment);
            assert_eq!(bed.dropped, [DropReason::EgressFragmentInvalid], "{what}");
            let reports: Vec<_> = bed.pods.reports.iter().map(|(error, _)| *error).collect();
            assert_eq!(reports, Vec::from_iter(told), "{what}");
            assert_eq!(bed.egress.poll_at(), None, "{what}: nothing is kept");
        }
        // The longest that there can be, and not the last byte more.
        for (len, is_invalid) in [(7, false), (8, true)] {
            let mut bed = Bed::new();
            bed.send(&piece(&packet, 1, 65_528, &bytes[..len], false));
            assert_eq!(!bed.dropped.is_empty(), is_invalid);
        }
    });
}

#[test]
fn headers_in_front_stay_and_the_first_fragment_has_all_headers() {
    v6(|| {
        let mut bed = Bed::new();
        let payload = pattern(2000, 4);
        let packet = datagram(pod(), &payload);
        let with_options = |mut fragment: Vec<u8>| {
            let next = fragment[6];
            fragment[6] = 60;
            fragment.splice(40..40, [next, 0, 1, 4, 0, 0, 0, 0]);
            let len = (fragment.len() - 40) as u16;
            fragment[4..6].copy_from_slice(&len.to_be_bytes());
            fragment
        };
        for fragment in cut(&packet, 1, 1400) {
            bed.send(&with_options(fragment));
        }
        assert_eq!(sent(&bed), [payload]);
        assert_eq!(bed.dropped, []);
        // RFC 7112 section 5: what it is about must be in the first one.
        bed.send(&piece(&packet, 2, 0, &packet[40..40], true));
        let mut options = piece(&packet, 3, 0, &[UDP, 1, 1, 4, 0, 0, 0, 0], true);
        options[40] = 60;
        bed.send(&options);
        assert_eq!(bed.dropped, [DropReason::Ipv6ExtensionHeaders; 2]);
    });
}

#[test]
fn what_does_not_become_whole_in_time_is_given_up() {
    v6(|| {
        let mut bed = Bed::new();
        let packet = datagram(pod(), &pattern(3000, 1));
        let with_first = cut(&packet, 1, 1400);
        let without = cut(&packet, 2, 1400);
        send_all(&mut bed, &with_first[..2]);
        bed.pass(Duration::from_secs(10));
        send_all(&mut bed, &without[1..]);
        bed.pass(TIMEOUT - Duration::from_secs(10) - Duration::from_micros(1));
        assert_eq!(bed.pods.lost, [].into());
        bed.pass(Duration::from_micros(1));
        let timeout = DropReason::EgressFragmentTimeout;
        assert_eq!(bed.pods.lost, [(timeout, 2)].into());
        bed.pass(Duration::from_secs(10));
        assert_eq!(bed.pods.lost, [(timeout, 4)].into());
        // Only of what the first one of came the sender hears (RFC 8200 section 4.5).
        let expected = (IcmpError::ReassemblyTimeExceeded, with_first[0].clone());
        assert_eq!(bed.pods.reports, [expected]);
        assert_eq!(bed.egress.poll_at(), None);
    });
}

#[test]
fn packets_in_fragments_are_bounded_for_each_pod_and_for_all() {
    v6(|| {
        let mut bed = Bed::new();
        let payload = pattern(3000, 1);
        let mine = cut(&datagram(pod_at(3), &payload), 7, 1400);
        bed.send(&mine[0]);
        let other = datagram(pod(), &payload);
        for id in 0..1000 {
            bed.send(&cut(&other, id, 1400)[0]);
        }
        let full = DropReason::EgressFragmentsFull;
        assert_eq!(bed.pods.lost, [(full, 1000 - 16)].into());
        send_all(&mut bed, &mine[1..]);
        assert_eq!(sent(&bed), [payload]);
        for number in 10..99 {
            bed.send(&cut(&datagram(pod_at(number), &[0; 2000]), 1, 1400)[0]);
        }
        assert_eq!(bed.pods.lost, [(full, 1000 - 16 + 16 + 89 - 64)].into());
        bed.call(|egress, _, host| egress.forget_pod(pod_at(98), host));
        assert_eq!(bed.pods.lost[&DropReason::EgressFragmentTimeout], 1);
    });
}

#[test]
fn versions_do_not_mix() {
    v6(|| {
        let mut bed = Bed::new();
        let mut packet = datagram(pod(), b"x");
        packet[6] = 1;
        bed.send(&packet);
        assert_eq!(bed.dropped, [DropReason::EgressProtocol]);
        packet[0] = 0x55;
        bed.send(&packet);
        assert_eq!(bed.dropped[1], DropReason::EgressFamily);
    });
}

proptest! {
    #[test]
    fn fragments_make_the_datagram_in_any_order(
        payload in proptest::collection::vec(any::<u8>(), 200..3000),
        step in 1usize..100,
        order in any::<u64>(),
    ) {
        with(IpVersion::Ipv6, || {
            let mut bed = Bed::new();
            let packet = datagram(pod(), &payload);
            let mut fragments = cut(&packet, 9, (step * 8).max(payload.len() / 20 / 8 * 8));
            let mut order = order;
            while !fragments.is_empty() {
                let len = fragments.len() as u64;
                bed.send(&fragments.remove((order % len) as usize));
                order = order.rotate_right(7) ^ len;
            }
            prop_assert_eq!(sent(&bed), [payload]);
            prop_assert_eq!(&bed.dropped, &[]);
            Ok(())
        })?;
    }

    #[test]
    fn no_fragments_do_harm(
        pieces in proptest::collection::vec((0u32..3, 0usize..30, 0usize..200, any::<bool>()), 1..60),
    ) {
        with(IpVersion::Ipv6, || {
            let mut bed = Bed::new();
            let packet = datagram(pod(), b"x");
            for (id, start, len, more) in &pieces {
                bed.send(&piece(&packet, *id, start * 8, &pattern(*len, *start as u8), *more));
            }
            bed.pass(TIMEOUT + Duration::from_secs(1));
            let lost = bed.pods.lost.values().sum::<u64>() as usize;
            prop_assert!(lost + bed.dropped.len() <= pieces.len());
            prop_assert_eq!(bed.pods.packets.len(), 0);
            Ok(())
        })?;
    }
}
