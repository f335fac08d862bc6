//! What splitting and merging 64 KiB costs beside copying the same bytes, and how fast the
//! checksum is: `cargo bench -p muslin-encap`.
//!
//! Each figure is the median of rounds in which all take turns, so that whatever else the machine
//! does hits all alike. Buffers stay in the cache, as the worker's few do.

use std::hint::black_box;
use std::time::Instant;

use muslin_encap::checksum;
use muslin_encap::merge::{Merger, Settings};
use muslin_encap::overhead::Mtu;
use muslin_encap::split::{Checksums, HEADERS_LEN, Limits, Split};
use muslin_encap::virtio::{Gso, GsoKind};

const ROUNDS: usize = 201;
const CALLS: u32 = 20;
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
    let at = muslin_encap::headers::Transport::parse(&bytes, L3).expect("it is TCP");
    let pseudo = at.pseudo_header(&bytes, at.end - at.l4);
    bytes[at.checksum()..at.checksum() + 2].copy_from_slice(&pseudo.to_be_bytes());
    let sum = checksum::compute(&bytes[at.l3..at.l4]);
    bytes[at.l3 + 10..at.l3 + 12].copy_from_slice(&sum.to_be_bytes());
    bytes
}

fn split(packet: &[u8], headers: &mut [u8], checksums: Checksums) -> usize {
    let mut split = Split::new(packet, L3, GSO, checksums).expect("it is a superpacket");
    let mut total = 0;
    while let Ok(Some(train)) = split.next_train(headers, Limits::UDP_SEGMENT) {
        total += train
            .segments()
            .map(|(header, payload)| header.len() + black_box(payload).len())
            .sum::<usize>();
    }
    total
}

fn merge(segments: &mut [Vec<u8>]) -> usize {
    let settings = Settings {
        mtu: Mtu::new(1450).expect("it is one"),
        udp: true,
    };
    let mut merger = Merger::new(settings);
    let mut outputs = 0;
    let mut sink = |merged: muslin_encap::merge::Merged<'_, '_, u32>| {
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
    while let Ok(Some(train)) = split.next_train(&mut headers, Limits::UDP_SEGMENT) {
        segments.extend(
            train
                .segments()
                .map(|(header, payload)| [header, payload].concat()),
        );
    }
    segments
}

type Case<'a> = (&'static str, Box<dyn FnMut() + 'a>);

fn main() {
    let payload = 46 * 1398;
    let packet = superpacket(payload);
    let small = superpacket(64);
    let mut headers = vec![0; HEADERS_LEN];
    let mut more_headers = headers.clone();
    let mut copy = packet.clone();
    let (complete, partial) = (
        segments(&packet, Checksums::Complete),
        segments(&packet, Checksums::Partial),
    );
    // Merging rewrites the first packet, so each call begins with copies of the first alone.
    let (mut complete_work, mut partial_work) = (complete.clone(), partial.clone());
    let mut alone = vec![small.clone()];
    let mut flows: Vec<Vec<u8>> = (0..64u8)
        .map(|i| {
            let mut packet = superpacket(64);
            packet[L3 + 23] = i;
            packet
        })
        .collect();
    let mut cases: Vec<Case<'_>> = vec![
        (
            "copy 64 KiB",
            Box::new(|| copy.copy_from_slice(black_box(&packet))),
        ),
        (
            "sum 64 KiB",
            Box::new(|| {
                black_box(checksum::sum(black_box(&packet)));
            }),
        ),
        (
            "sum 64 KiB, smoltcp's",
            Box::new(|| {
                black_box(smoltcp::wire::checksum::data(black_box(&packet)));
            }),
        ),
        (
            "sum 20 bytes",
            Box::new(|| {
                black_box(checksum::sum(black_box(&packet[L3..L3 + 20])));
            }),
        ),
        (
            "sum 20 bytes, smoltcp's",
            Box::new(|| {
                black_box(smoltcp::wire::checksum::data(black_box(
                    &packet[L3..L3 + 20],
                )));
            }),
        ),
        (
            "split 64 KiB, checksums finished",
            Box::new(|| {
                black_box(split(&packet, &mut headers, Checksums::Complete));
            }),
        ),
        (
            "split 64 KiB, checksums unfinished",
            Box::new(|| {
                black_box(split(&packet, &mut more_headers, Checksums::Partial));
            }),
        ),
        (
            "merge 64 KiB, checksums verified",
            Box::new(|| {
                complete_work[0].copy_from_slice(&complete[0]);
                assert_eq!(merge(&mut complete_work), 1);
            }),
        ),
        (
            "merge 64 KiB, checksums unfinished",
            Box::new(|| {
                partial_work[0].copy_from_slice(&partial[0]);
                assert_eq!(merge(&mut partial_work), 1);
            }),
        ),
        (
            "merge a batch of one small packet",
            Box::new(|| assert_eq!(merge(&mut alone), 1)),
        ),
        (
            "merge a batch of 64 flows",
            Box::new(|| assert_eq!(merge(&mut flows), 64)),
        ),
    ];
    let mut times = vec![Vec::new(); cases.len()];
    for _ in 0..ROUNDS {
        for ((_, run), times) in cases.iter_mut().zip(&mut times) {
            run();
            let start = Instant::now();
            (0..CALLS).for_each(|_| run());
            times.push(start.elapsed().as_nanos() as u64 / u64::from(CALLS));
        }
    }
    let medians = times.iter_mut().map(|times| {
        times.sort_unstable();
        times[ROUNDS / 2]
    });
    let medians: Vec<u64> = medians.collect();
    for ((name, _), median) in cases.iter().zip(&medians) {
        let ratio = *median as f64 / medians[0] as f64;
        println!("{name:<36} {median:>8} ns {ratio:>8.2} x copy");
    }
}
