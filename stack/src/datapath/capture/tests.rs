//! What is captured, and what filters mean.

use etherparse::PacketBuilder;
use muslin_encap::buffer::PacketBuf;
use proptest::prelude::*;

use super::*;

const NOW: Instant = Instant::ZERO;

fn udp(source: [u8; 4], destination: [u8; 4], ports: (u16, u16)) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4(source, destination, 64)
        .udp(ports.0, ports.1)
        .write(&mut frame, b"payload")
        .unwrap();
    frame
}

fn tcp6(ports: (u16, u16)) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv6([0xfd; 16], [0xfc; 16], 64)
        .tcp(ports.0, ports.1, 1, 1)
        .write(&mut frame, &[])
        .unwrap();
    frame
}

fn matches(filter: &str, frame: &[u8]) -> bool {
    let filter: Filter = filter
        .parse()
        .unwrap_or_else(|error| panic!("{filter}: {error}"));
    filter.matches(&Fields::parse(Hook::FromPod, None, frame))
}

#[test]
fn filters_mean_what_pcap_filters_mean() {
    let frame = udp([10, 0, 0, 1], [10, 0, 0, 2], (5000, 53));
    for (filter, expected) in [
        ("", true),
        ("udp", true),
        ("tcp", false),
        ("ip", true),
        ("ip6 or arp", false),
        ("host 10.0.0.2", true),
        ("src host 10.0.0.2", false),
        ("dst 10.0.0.2", true),
        ("src or dst host 10.0.0.1", true),
        ("10.0.0.9", false),
        ("net 10.0.0.0/8", true),
        ("src net 10.0.0.2/32", false),
        ("port 53", true),
        ("src port 53", false),
        ("udp port 53", true),
        ("tcp port 53", false),
        ("udp dst port 53 and not host 10.0.0.9", true),
        ("portrange 50-60", true),
        ("portrange 60-50", true),
        ("src portrange 1-100", false),
        ("port 1 or 53", true),
        ("dst port 1 or 5000", false),
        ("host 10.0.0.9 or 10.0.0.1", true),
        ("not (udp and port 53)", false),
        ("! udp", false),
        ("tcp || udp && port 54", false),
        ("(udp)", true),
    ] {
        assert_eq!(matches(filter, &frame), expected, "{filter}");
    }
    let six = tcp6((80, 6000));
    assert!(matches("ip6 and tcp port 80", &six));
    assert!(matches(
        "host fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd",
        &six
    ));
    assert!(!matches("ip", &six));
    // Ports are found behind destination options, and behind a first fragment's header.
    for header in [[6, 0, 1, 4, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0, 0, 7]] {
        let mut behind = six.clone();
        behind.splice(54..54, header);
        behind[14 + 5] += 8;
        behind[14 + 6] = if header[2] == 1 { 60 } else { 44 };
        assert!(matches("tcp port 80 and ip6", &behind), "{header:?}");
        // Of a later one nobody knows more than the protocol.
        behind[14 + 6] = 44;
        behind[54 + 3] = 8;
        assert!(matches("tcp", &behind) && !matches("port 80", &behind));
    }
}

#[test]
fn what_is_no_filter_says_why() {
    let error = |filter: &str| filter.parse::<Filter>().unwrap_err();
    assert_eq!(error("ether host x"), FilterError::Word("ether".to_owned()));
    assert_eq!(error("udp port"), FilterError::End);
    assert_eq!(error("udp and"), FilterError::End);
    assert_eq!(error("(udp"), FilterError::Parenthesis);
    assert_eq!(error("udp)"), FilterError::Parenthesis);
    assert_eq!(error("udp tcp"), FilterError::Word("tcp".to_owned()));
    let port = FilterError::Value {
        kind: "port",
        value: "http".to_owned(),
    };
    assert_eq!(error("port http"), port);
    let said = "port needs a number up to 65535, and 'http' is none";
    assert_eq!(port.to_string(), said);
    assert_eq!(error(&"not ".repeat(40)), FilterError::TooLong);
    assert_eq!(error(&"udp or ".repeat(200)), FilterError::TooLong);
}

#[test]
fn fragments_have_no_ports_but_addresses() {
    let mut frame = udp([10, 0, 0, 1], [10, 0, 0, 2], (5000, 53));
    frame[14 + 7] = 1;
    assert!(matches("udp and host 10.0.0.1", &frame));
    assert!(!matches("port 53", &frame));
}

fn wanted(hooks: &[Hook]) -> Wanted {
    Wanted {
        hooks: hooks.to_vec(),
        dropped: false,
        port: None,
        peer: None,
        filter: Filter::ALL,
        snap_len: 64,
        format: None,
    }
}

/// Hooks, verdicts and lengths of what was captured.
fn seen(captures: &mut Captures) -> Vec<(Hook, Verdict, usize, usize)> {
    let batch = captures.take(1, Batch::with_capacity(10, 1000)).unwrap();
    let of =
        |(record, bytes): (&Record, &[u8])| (record.hook, record.verdict, record.len, bytes.len());
    batch.iter().map(of).collect()
}

fn pass(captures: &mut Captures, source: Source, verdict: Verdict, frame: &[u8]) {
    captures.at(NOW);
    captures.enters(source, frame);
    captures.leaves(source, verdict, &frame[..frame.len() - 4]);
}

#[test]
fn a_packet_is_seen_where_it_comes_in_and_leaves() {
    let mut captures = Captures::default();
    let frame = [7; 100];
    let (port, to) = (Source::Port(PortId(1)), Verdict::Port(PortId(2)));
    pass(&mut captures, port, to, &frame);
    captures.begin(
        1,
        wanted(&[Hook::FromPod, Hook::ToPod]),
        Batch::with_capacity(10, 1000),
    );
    pass(&mut captures, port, to, &frame);
    pass(&mut captures, Source::Uplink, Verdict::Consumed, &frame);
    assert!(captures.is_readable(1));
    let expected = [(Hook::FromPod, to, 100, 64), (Hook::ToPod, to, 96, 64)];
    assert_eq!(seen(&mut captures), expected);
    assert!(!captures.is_readable(1));
    assert!(captures.end(1).unwrap().is_empty());
    assert!(captures.end(1).is_none());
    assert!(captures.is_empty());
}

#[test]
fn what_the_node_makes_meanwhile_is_no_part_of_the_packet() {
    let mut captures = Captures::default();
    captures.begin(
        1,
        wanted(&[Hook::FromPod, Hook::ToPod]),
        Batch::with_capacity(10, 1000),
    );
    let (port, lost) = (
        Source::Port(PortId(1)),
        Verdict::Drop(DropReason::TtlExceeded),
    );
    captures.enters(port, &[7; 100][..]);
    captures.enters(Source::Node, &[8; 20][..]);
    captures.leaves(Source::Node, Verdict::Port(PortId(1)), &[8; 20][..]);
    captures.leaves(port, lost, &[7; 80][..]);
    let own = (Hook::ToPod, Verdict::Port(PortId(1)), 20, 20);
    assert_eq!(seen(&mut captures), [own, (Hook::FromPod, lost, 100, 64)]);
}

#[test]
fn what_was_merged_is_captured_whole() {
    let pieces: [&[u8]; 2] = [&[2; 30], &[3; 20]];
    let (port, peer) = (
        Verdict::Port(PortId(1)),
        Source::Underlay("10.9.0.2:8472".parse().unwrap()),
    );
    for (snap_len, expected) in [
        (1000, [vec![1; 40], vec![2; 30], vec![3; 20]].concat()),
        (64, [vec![1; 40], vec![2; 24]].concat()),
        (16, vec![1; 16]),
    ] {
        let mut captures = Captures::default();
        let wanted = Wanted {
            snap_len,
            ..wanted(&[Hook::FromTunnel, Hook::ToPod])
        };
        captures.begin(1, wanted, Batch::with_capacity(10, 1000));
        let mut head = [1; 40];
        let packet = PacketBuf::new(&mut head, 0, 40).unwrap();
        let mut packet = packet.with_tail(&pieces);
        captures.enters(peer, &packet);
        // What is after the packet in its last piece is padding.
        packet.truncate(85);
        captures.leaves(peer, port, &packet);
        let batch = captures.take(1, Batch::default()).unwrap();
        let seen: Vec<_> = batch.iter().map(|(it, bytes)| (it.len, bytes)).collect();
        let shorter = &expected[..expected.len().min(85)];
        assert_eq!(seen, [(90, &expected[..]), (85, shorter)]);
    }
}

#[test]
fn only_what_is_wanted_is_captured() {
    let frame = [7; 50];
    let lost = Verdict::Drop(DropReason::NoRoute);
    let peer = |id| Verdict::Peer {
        id: PeerId(id),
        destination: "10.9.0.2:8472".parse().unwrap(),
        flow: 0,
        checksums: muslin_encap::offload::split::Checksums::Complete,
    };
    let from = |last: u8| Source::Underlay(([10, 9, 0, last], 8472).into());
    let all = [
        (Source::Port(PortId(1)), lost),
        (Source::Port(PortId(2)), Verdict::Port(PortId(1))),
        (Source::Port(PortId(2)), peer(2)),
        (Source::Port(PortId(3)), peer(3)),
        (from(2), Verdict::Port(PortId(3))),
        (from(3), lost),
    ];
    let count = |wanted: Wanted| {
        let mut captures = Captures::default();
        captures.begin(1, wanted, Batch::with_capacity(100, 10_000));
        for (source, verdict) in all {
            pass(&mut captures, source, verdict, &frame);
        }
        seen(&mut captures).len()
    };
    assert_eq!(count(wanted(&Hook::ALL)), 10);
    let none = wanted(&[]);
    assert_eq!(count(none.clone()), 0);
    assert_eq!(
        count(Wanted {
            dropped: true,
            ..none
        }),
        2
    );
    let of_port = Wanted {
        port: Some(PortId(1)),
        ..wanted(&Hook::ALL)
    };
    assert_eq!(count(of_port), 3);
    let of_peer = Wanted {
        peer: Some(WantedPeer {
            id: PeerId(2),
            address: [10, 9, 0, 2].into(),
            subnet: "10.244.2.0/24".parse().unwrap(),
        }),
        ..wanted(&Hook::ALL)
    };
    assert_eq!(count(of_peer), 4);
    let of_none = Wanted {
        filter: "tcp".parse().unwrap(),
        ..wanted(&Hook::ALL)
    };
    assert_eq!(count(of_none), 0);
}

#[test]
fn what_a_peer_sends_by_the_uplink_is_known_by_its_subnet() {
    let of_peer = Wanted {
        peer: Some(WantedPeer {
            id: PeerId(2),
            address: [10, 9, 0, 2].into(),
            subnet: "10.244.2.0/24".parse().unwrap(),
        }),
        ..wanted(&[Hook::FromUplink, Hook::ToPod])
    };
    let mut captures = Captures::default();
    captures.begin(1, of_peer, Batch::with_capacity(100, 10_000));
    for (source, expected) in [([10, 244, 2, 9], 2), ([10, 244, 3, 9], 0)] {
        let frame = udp(source, [10, 244, 1, 2], (5000, 53));
        let verdict = Verdict::Port(PortId(1));
        pass(&mut captures, Source::Uplink, verdict, &frame);
        assert_eq!(seen(&mut captures).len(), expected, "{source:?}");
    }
}

#[test]
fn what_egress_does_not_take_is_lost_there() {
    let mut captures = Captures::default();
    let dropped = Wanted {
        dropped: true,
        ..wanted(&[])
    };
    captures.begin(1, dropped, Batch::with_capacity(10, 1000));
    pass(
        &mut captures,
        Source::Port(PortId(1)),
        Verdict::Egress,
        &[7; 50],
    );
    captures.lost_in_egress(DropReason::EgressDenied, &[8; 36][..]);
    let lost = Verdict::Drop(DropReason::EgressDenied);
    let batch = captures.take(1, Batch::default()).unwrap();
    let records: Vec<_> = batch.iter().map(|(record, _)| *record).collect();
    let [record] = records[..] else {
        panic!("{records:?}");
    };
    assert_eq!(
        (record.hook, record.verdict, record.len),
        (Hook::ToEgress, lost, 36)
    );
    assert_eq!(record.source, Source::Port(PortId(1)));
}

#[test]
fn what_finds_no_room_is_counted_with_the_next() {
    let mut captures = Captures::default();
    captures.begin(1, wanted(&[Hook::FromPod]), Batch::with_capacity(2, 1000));
    let capacity = captures.all[0].batch.records.capacity();
    for _ in 0..capacity + 3 {
        pass(
            &mut captures,
            Source::Port(PortId(1)),
            Verdict::Consumed,
            &[7; 50],
        );
    }
    let batch = captures.take(1, Batch::with_capacity(2, 1000)).unwrap();
    assert_eq!(batch.iter().count(), capacity);
    assert!(batch.iter().all(|(record, _)| record.lost == 0));
    pass(
        &mut captures,
        Source::Port(PortId(1)),
        Verdict::Consumed,
        &[7; 50],
    );
    let batch = captures.take(1, Batch::default()).unwrap();
    assert_eq!(
        batch
            .iter()
            .map(|(record, _)| record.lost)
            .collect::<Vec<_>>(),
        [3]
    );
}

proptest! {
    #[test]
    fn no_text_and_no_packet_is_too_much(text in "[a-z0-9. ()!|&:/-]{0,60}", bytes in any::<Vec<u8>>()) {
        let filter = text.parse::<Filter>();
        for hook in Hook::ALL {
            for format in [None, Some(Format::Vxlan), Some(Format::Udp), Some(Format::Ipip)] {
                let fields = Fields::parse(hook, format, &bytes);
                if let Ok(filter) = &filter {
                    let _ = filter.matches(&fields);
                }
            }
        }
    }

    #[test]
    fn a_filter_is_the_one_that_is_printed(
        words in proptest::collection::vec(proptest::sample::select(vec![
            "not", "(", ")", "and", "or", "src", "dst", "host 10.0.0.1", "net 10.0.0.0/8", "port 53", "tcp",
            "ip", "portrange 1-99", "10.0.0.2", "80",
        ]), 0..12),
    ) {
        if let Ok(filter) = words.join(" ").parse::<Filter>() {
            let again: Filter = filter.to_string().parse().unwrap();
            for frame in [udp([10, 0, 0, 1], [9, 9, 9, 9], (1, 53)), tcp6((80, 1))] {
                let fields = Fields::parse(Hook::FromPod, None, &frame);
                prop_assert_eq!(again.matches(&fields), filter.matches(&fields));
            }
        }
    }
}
