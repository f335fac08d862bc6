//! What splitting and merging 64 KiB costs beside copying the same bytes, how fast the checksum is,
//! and what a tunnel's header costs: `cargo bench -p muslin-encap`.
//!
//! Each figure is the median of rounds in which all take turns, so that whatever else the machine
//! does hits all alike. Buffers stay in the cache, as the worker's few do.

use std::hint::black_box;

use muslin_bed::rounds::{self, Case, Figure, Turns};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::{checksum, v4};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::acknowledgement::AckTable;
use muslin_encap::offload::merge::{MergeSettings, Merger};
use muslin_encap::offload::split::{Checksums, HEADERS_LEN, Split, TrainLimits};
use muslin_encap::offload::virtio::{Gso, GsoKind};
use muslin_encap::tunnel::vxlan::{self, Vni};

/// For what takes microseconds, and for what takes nanoseconds: the clock takes 25 of them.
const LONG: Turns = Turns {
    rounds: 201,
    batches: 1,
    calls: 20,
};
const SHORT: Turns = Turns {
    rounds: 401,
    batches: 1,
    calls: 200,
};
/// In front of the inner IP packet: VXLAN and Ethernet headers.
const L3: usize = 22;
const GSO: Gso = Gso {
    kind: GsoKind::TcpV4,
    size: 1398,
    ecn: false,
};

/// A TCP superpacket with timestamps, as a pod with an MTU of 1450 sends it.
fn superpacket(payload: usize) -> Vec<u8> {
    let total = (52 + payload) as u16;
    let mut bytes = vec![0; L3 - 2];
    bytes.extend([8, 0, 0x45, 0]);
    bytes.extend(total.to_be_bytes());
    bytes.extend([1, 2, 0x40, 0, 64, 6, 0, 0, 10, 244, 1, 2, 10, 244, 2, 3]);
    bytes.extend([0x80, 0, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 2, 0x80, 0x10]);
    bytes.extend([1, 2, 0, 0, 0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
    bytes.extend((0..payload).map(|i| (i * 7) as u8));
    let at = muslin_encap::ip::transport::Transport::parse(&bytes, L3).expect("it is TCP");
    let pseudo = at.pseudo_header(&bytes, at.end - at.l4);
    bytes[at.checksum_offset()..at.checksum_offset() + 2].copy_from_slice(&pseudo.to_be_bytes());
    let sum = checksum::compute(&bytes[at.l3..at.l4]);
    bytes[at.l3 + 10..at.l3 + 12].copy_from_slice(&sum.to_be_bytes());
    bytes
}

fn split(packet: &[u8], headers: &mut [u8], checksums: Checksums) -> usize {
    let mut split = Split::new(packet, L3, GSO, checksums).expect("it is a superpacket");
    let mut total = 0;
    while let Ok(Some(train)) = split.next_train(headers, TrainLimits::UDP_SEGMENT) {
        total += train
            .segments()
            .map(|(header, payload)| header.len() + black_box(payload).len())
            .sum::<usize>();
    }
    total
}

fn merge(segments: &mut [Vec<u8>]) -> usize {
    let settings = MergeSettings {
        mtu: Mtu::new(1450).expect("it is one"),
        mtu_v6: Mtu::new(1450).expect("it is one"),
        udp: true,
    };
    let mut merger = Merger::new(settings);
    let mut outputs = 0;
    let mut sink = |merged: muslin_encap::offload::merge::Merged<'_, '_, u32>| {
        outputs += 1;
        black_box((merged.virtio, merged.head, merged.tail));
    };
    for segment in segments {
        merger.push(segment, L3, 1, &mut sink);
    }
    merger.flush(&mut sink);
    outputs
}

fn segments(packet: &[u8], checksums: Checksums) -> Vec<Vec<u8>> {
    let mut headers = vec![0; HEADERS_LEN];
    let mut split = Split::new(packet, L3, GSO, checksums).expect("it is a superpacket");
    let mut segments = Vec::new();
    while let Ok(Some(train)) = split.next_train(&mut headers, TrainLimits::UDP_SEGMENT) {
        segments.extend(
            train
                .segments()
                .map(|(header, payload)| [header, payload].concat()),
        );
    }
    segments
}

/// Gives a call the packet behind the headroom.
fn with_packet(storage: &mut [u8], call: impl FnOnce(&mut PacketBuf<'_>)) {
    let len = storage.len() - HEADROOM;
    let mut packet = PacketBuf::new(storage, HEADROOM, len).expect("it fits");
    call(&mut packet);
    black_box(packet.as_slice());
}

fn case<'a>(name: &str, call: impl FnMut() + 'a) -> Case<'a> {
    (name.to_owned(), Box::new(call))
}

fn superpackets() {
    let packet = superpacket(46 * 1398);
    let mut headers = vec![0; HEADERS_LEN];
    let mut more_headers = headers.clone();
    let mut copy = packet.clone();
    let (complete, partial) = (
        segments(&packet, Checksums::Complete),
        segments(&packet, Checksums::Partial),
    );
    // Merging rewrites the first packet, so each call begins with copies of the first alone.
    let (mut complete_work, mut partial_work) = (complete.clone(), partial.clone());
    let mut cases = [
        case("copy 64 KiB", || copy.copy_from_slice(black_box(&packet))),
        case("sum 64 KiB", || {
            black_box(checksum::sum(black_box(&packet)));
        }),
        case("sum 64 KiB, smoltcp's", || {
            black_box(smoltcp::wire::checksum::data(black_box(&packet)));
        }),
        case("split 64 KiB, checksums finished", || {
            black_box(split(&packet, &mut headers, Checksums::Complete));
        }),
        case("split 64 KiB, checksums unfinished", || {
            black_box(split(&packet, &mut more_headers, Checksums::Partial));
        }),
        case("merge 64 KiB, checksums verified", || {
            complete_work[0].copy_from_slice(&complete[0]);
            assert_eq!(merge(&mut complete_work), 1);
        }),
        case("merge 64 KiB, checksums unfinished", || {
            partial_work[0].copy_from_slice(&partial[0]);
            assert_eq!(merge(&mut partial_work), 1);
        }),
    ];
    let figures = rounds::time(&mut cases, LONG);
    for ((name, _), figure) in cases.iter().zip(&figures) {
        let ratio = figure.median / figures[0].median;
        let speed = packet.len() as f64 / figure.median;
        let Figure { median, quartile } = figure;
        println!("{name:<36} {median:>8.0} {quartile:>8.0} {ratio:>8.2} {speed:>8.1}");
    }
}

fn small_things() {
    let vni = Vni::new(1).expect("it fits 24 bits");
    let packet = superpacket(1398);
    let mut frame = [&[0; HEADROOM][..], &packet[vxlan::HEADER_LEN..]].concat();
    let mut datagram = [&[0; HEADROOM][..], &[8, 0, 0, 0, 0, 0, 1, 0]].concat();
    datagram.extend_from_slice(&packet[vxlan::HEADER_LEN..]);
    let mut ttl = packet[L3..].to_vec();
    let mut alone = vec![superpacket(64)];
    let flow = |port| {
        let mut packet = superpacket(64);
        packet[L3 + 23] = port;
        packet
    };
    let mut flows: Vec<Vec<u8>> = (0..64).map(flow).collect();
    // 64 acknowledgements, of more and more, and as many data packets of the same flow.
    let complete = |payload, number: u8| {
        let mut packet = superpacket(payload);
        packet[L3 + 31] = number;
        checksum::complete(&mut packet, L3 + 20, 16).expect("it is inside");
        packet
    };
    let acks: Vec<_> = (0..64).map(|number| complete(0, number)).collect();
    let data = complete(1398, 3);
    let (mut acks_table, mut data_table, mut other_table) =
        (AckTable::new(), AckTable::new(), AckTable::new());
    let mut next = acks.iter().cycle();
    let _ = data_table.offer(&acks[0], L3, (), 0);
    let mut cases = [
        case("sum 20 bytes", || {
            black_box(checksum::sum(black_box(&packet[L3..L3 + 20])));
        }),
        case("sum 20 bytes, smoltcp's", || {
            let header = black_box(&packet[L3..L3 + 20]);
            black_box(smoltcp::wire::checksum::data(header));
        }),
        case("decrement a TTL", || {
            ttl[8] = 64;
            black_box(v4::decrement_ttl(black_box(&mut ttl)));
        }),
        case("encapsulate, VXLAN", || {
            with_packet(&mut frame, |packet| {
                vxlan::encapsulate(black_box(packet), vni).expect("there is headroom");
            });
        }),
        case("decapsulate, VXLAN", || {
            with_packet(&mut datagram, |packet| {
                assert_eq!(vxlan::decapsulate(black_box(packet)), Ok(vni));
            });
        }),
        case("decapsulate, UDP: check the packet", || {
            assert_eq!(v4::check(black_box(&packet[L3..])), Ok(1450));
        }),
        case("offer an acknowledgement", || {
            let ack = next.next().expect("they begin again");
            black_box(acks_table.offer(black_box(ack), L3, (), 0));
        }),
        case("offer data of a known flow", || {
            black_box(data_table.offer(black_box(&data), L3, (), 0));
        }),
        case("offer data of another flow", || {
            black_box(other_table.offer(black_box(&data), L3, (), 0));
        }),
        case("merge a batch of one small packet", || {
            assert_eq!(merge(&mut alone), 1);
        }),
        case("merge a batch of 64 flows", || {
            assert_eq!(merge(&mut flows), 64);
        }),
    ];
    let figures = rounds::time(&mut cases, SHORT);
    for ((name, _), figure) in cases.iter().zip(figures) {
        let Figure { median, quartile } = figure;
        println!("{name:<36} {median:>8.1} {quartile:>8.1}");
    }
}

fn main() {
    println!(
        "{:<36} {:>8} {:>8} {:>8} {:>8}",
        "ns", "median", "quartile", "x copy", "GB/s"
    );
    superpackets();
    small_things();
}
