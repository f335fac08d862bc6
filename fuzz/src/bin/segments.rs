//! Splitting and merging of arbitrary packets, against the plain ones that the tests use: trains
//! against a plain splitter; a batch of its segments, after some changes, through the merger, where
//! nothing may be lost, reordered within its flow, merged that splitting would not give back, or
//! left unmerged that it would; or acknowledgements alone may be lost that newer ones supersede.
#![cfg_attr(fuzzing, no_main)]

use muslin_bed::reference;
use muslin_encap::ip::transport::{self, ChecksumState, Protocol, Transport};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::batch::{self, Queued, SendBatch};
use muslin_encap::offload::merge::{self, MergeSettings};
use muslin_encap::offload::split::{Checksums, Split, TrainLimits};
use muslin_encap::offload::virtio::Header;
use muslin_fuzz::Seed;
use smoltcp::wire::IpVersion;

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        // virtio-net headers of superpackets.
        &[1, 1, 54, 0, 100, 0, 34, 0, 16, 0],
        &[1, 4, 74, 0, 100, 0, 54, 0, 16, 0],
        &[1, 5, 42, 0, 100, 0, 34, 0, 6, 0],
        // Ethernet types, and the first bytes of IP headers.
        &[8, 0, 0x45, 0],
        &[0x86, 0xdd, 0x60, 0],
        // TCP's data offset and flags.
        &[0x50, 0x10],
        &[0x80, 0x18],
        // Changes: all kinds, of the second packet's TCP flags and its sequence number.
        &[1, 0, 0, 0],
        &[1, 1, 0, 0],
        &[1, 6, 33, 8],
        &[1, 7, 24, 1],
        // What goes on behind the last packet, short and long.
        &[0, 8, 0, 100],
        &[0, 8, 5, 120],
        // Acknowledgements of more, of the same and of less.
        &[0, 9, 0, 10],
        &[0, 9, 0, 0],
        &[0, 9, 255, 246],
    ],
    inputs: 40_000,
    max_len: 4_000,
}

/// TCP's flag of an acknowledgement.
const ACK: u8 = 0x10;
/// The most packets of a batch, and the longest of them.
const MAX_PACKETS: usize = 100;
const MAX_LEN: usize = 65_535;

/// Checks a frame with its virtio-net header, and then a batch of packets made of it.
///
/// The first byte chooses where the IP header is (two bits), whether checksums are finished, the
/// limits of a train (two bits) and the MTU (two bits); the second how often the payload is
/// repeated. Then come ten bytes of virtio-net header, a bit that chooses whether acknowledgements
/// replace others, seven of the number of changes, and as many changes of four bytes; the rest is the
/// frame.
///
/// A change names a packet of the batch, what happens to it, and two bytes of where and how. One
/// lets the last packet's stream go on, also beyond what one packet can have; one acknowledges more
/// behind it.
fn run(data: &[u8]) {
    let Some((&[choice, repeat], rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let header = Header::parse(rest);
    let Some((count, rest)) = rest.get(10..).and_then(|rest| rest.split_first()) else {
        return;
    };
    let (with_acks, count) = (count & WITH_ACKS != 0, usize::from(count & !WITH_ACKS));
    let (changes, frame) = rest.split_at(rest.len().min(count * 4));
    let l3 = [0, 14, 18, 22][usize::from(choice & 3)];
    let checksums = [Checksums::Complete, Checksums::Partial][usize::from(choice >> 2 & 1)];
    let packet = lengthen(frame, l3, repeat.into());
    arbitrary(&packet, l3);

    let mut batch = vec![packet.clone()];
    if let Ok(header) = header {
        assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
        let _ = header.check(packet.len());
        if let Some(gso) = header.gso {
            let limits = [
                TrainLimits::UDP_SEGMENT,
                TrainLimits::ONE,
                TrainLimits {
                    segments: 7,
                    bytes: 3000,
                },
            ][usize::from(choice >> 3 & 3).min(2)];
            reference::check_split(&packet, l3, gso, checksums, limits);
            if let Ok(split) = Split::new(&packet, l3, gso, checksums) {
                let fits = l3 + split.mtu_needed() <= TrainLimits::UDP_SEGMENT.bytes;
                leave(&packet, l3, header, fits, repeat & 1 == 0);
                batch = reference::split(&packet, l3, gso.size.into(), checksums);
                batch.truncate(MAX_PACKETS);
            }
        }
    }
    for change in changes.chunks_exact(4) {
        let change = [change[0], change[1], change[2], change[3]];
        happen(&mut batch, l3, change);
    }
    let mtu = [68, 576, 1450, 9000][usize::from(choice >> 5 & 3)];
    let mtu = Mtu::new(mtu).expect("it is in range");
    let settings = MergeSettings {
        mtu,
        mtu_v6: mtu,
        udp: choice & 0x80 == 0,
    };
    if with_acks {
        reference::check_merge_with_acks(&batch, l3, settings);
    } else {
        reference::check_merge(&batch, l3, settings);
    }
}

/// A superpacket between two datagrams leaves in messages as it would leave one by one.
fn leave(packet: &[u8], l3: usize, header: Header, fits: bool, trains: bool) {
    let queued = |packet, offload| Queued {
        key: (),
        packet,
        network: l3,
        offload,
        checksums: Checksums::Complete,
    };
    let single = [7; 100];
    let single = queued(&single, Header::default());
    let size = header.gso.map_or(0, |gso| gso.size.into());
    let mut expected = vec![single.packet.to_vec()];
    if fits {
        expected.extend(reference::split(packet, l3, size, Checksums::Complete));
    }
    expected.push(single.packet.to_vec());

    let mut waiting = [single, queued(packet, header), single]
        .into_iter()
        .peekable();
    let (mut headers, mut split, mut left) = (vec![0; batch::HEADERS_LEN], None, Vec::new());
    while waiting.peek().is_some() {
        let mut batch = SendBatch::new(&mut headers, trains);
        while let Some(next) = waiting.peek() {
            match batch.push(next, &mut split) {
                Ok(Ok(())) => drop(waiting.next()),
                Ok(Err(batch::Full)) => break,
                Err(_) => {
                    assert!(!fits && next.offload == header, "it can be split");
                    waiting.next();
                }
            }
        }
        assert!(!batch.is_empty(), "it does not get on");
        for send in batch.messages() {
            let limits = TrainLimits::UDP_SEGMENT;
            assert!(send.datagrams == 1 || trains && send.datagrams <= limits.segments);
            let first = left.len();
            for pieces in batch.datagrams(send) {
                left.push(pieces.iter().flat_map(|piece| piece.to_vec()).collect());
            }
            let lens = left[first..].iter().map(Vec::len);
            assert_eq!(lens.len(), send.datagrams);
            assert!(lens.clone().sum::<usize>() <= limits.bytes);
            let (last, others) = (lens.len() - 1, lens.clone().take(lens.len() - 1));
            assert!(others.clone().all(|len| len == send.datagram_len));
            assert!(left[first + last].len() <= send.datagram_len);
        }
    }
    assert_eq!(left, expected);
}

/// The frame with the end of it repeated, and the lengths of its IP packet made right.
fn lengthen(frame: &[u8], l3: usize, times: usize) -> Vec<u8> {
    let mut packet = frame.to_vec();
    if times == 0 {
        return packet;
    }
    let end = frame.get(frame.len().saturating_sub(250)..);
    for _ in 0..times {
        packet.extend(end.unwrap_or_default());
    }
    packet.truncate(l3 + MAX_LEN - 40);
    refill(&mut packet, l3, Checksums::Partial);
    packet
}

/// Fills in lengths and checksums if there are headers to do so.
fn refill(packet: &mut Vec<u8>, l3: usize, checksums: Checksums) {
    if let Some(ip) = packet.get_mut(l3..).filter(|ip| ip.len() >= 48) {
        let len = ip.len();
        let (at, value, transport) = match ip[0] >> 4 {
            4 => (2, len, usize::from(ip[0] & 0x0f) * 4),
            _ => (4, len - 40, 40),
        };
        ip[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
        if ip[if at == 2 { 9 } else { 6 }] == 17 && transport + 8 <= len {
            let value = (len - transport) as u16;
            ip[transport + 4..transport + 6].copy_from_slice(&value.to_be_bytes());
        }
    }
    if let Ok(at) = Transport::parse(packet, l3) {
        packet.truncate(at.end);
        reference::finish(packet, &at, checksums);
    }
}

fn happen(batch: &mut Vec<Vec<u8>>, l3: usize, [which, what, at, how]: [u8; 4]) {
    let len = batch.len();
    if len == 0 || len > MAX_PACKETS {
        return;
    }
    let index = usize::from(which) % len;
    let packet = &mut batch[index];
    match what % 10 {
        0 => drop(batch.remove(index)),
        1 => batch.swap(index, (index + 1) % len),
        2 => {
            let again = packet.clone();
            batch.push(again);
        }
        3 => packet.extend(vec![how; usize::from(at)]),
        4 => refill(packet, l3, Checksums::Partial),
        5 => refill(packet, l3, Checksums::Complete),
        8 => batch.extend(next(
            &batch[len - 1],
            l3,
            u16::from_be_bytes([at, how]).into(),
        )),
        9 => batch.extend(acknowledge(
            &batch[len - 1],
            l3,
            i16::from_be_bytes([at, how]),
        )),
        _ => {
            if let Some(byte) = packet.get_mut(l3 + usize::from(at)) {
                *byte ^= how;
            }
            if what % 10 == 6 {
                refill(packet, l3, Checksums::Complete);
            }
        }
    }
}

/// The segment of `len` bytes that goes on where another ends, which it may not be longer than.
fn next(last: &[u8], l3: usize, len: usize) -> Option<Vec<u8>> {
    let at = Transport::parse(last, l3).ok()?;
    let mut packet = last[..at.payload + len.min(at.payload_len())].to_vec();
    if at.version == IpVersion::Ipv4 {
        let ident = u16::from_be_bytes([packet[l3 + 4], packet[l3 + 5]]).wrapping_add(1);
        packet[l3 + 4..l3 + 6].copy_from_slice(&ident.to_be_bytes());
    }
    if at.protocol == Protocol::Tcp {
        let number = &mut packet[at.l4 + 4..at.l4 + 8];
        let sequence = u32::from_be_bytes([number[0], number[1], number[2], number[3]]);
        let sequence = sequence.wrapping_add(at.payload_len() as u32);
        number.copy_from_slice(&sequence.to_be_bytes());
    }
    reference::finish(&mut packet, &at, Checksums::Complete);
    Some(packet)
}

/// The acknowledgement behind a TCP segment, of so much more than that.
fn acknowledge(last: &[u8], l3: usize, more: i16) -> Option<Vec<u8>> {
    let at = Transport::parse(last, l3).ok()?;
    let mut packet = next(last, l3, 0).filter(|_| at.protocol == Protocol::Tcp)?;
    packet[at.l4 + 13] = ACK;
    let number = packet[at.l4 + 8..].first_chunk_mut::<4>()?;
    *number = u32::from_be_bytes(*number)
        .wrapping_add_signed(more.into())
        .to_be_bytes();
    reference::finish(
        &mut packet,
        &Transport {
            end: at.payload,
            ..at
        },
        Checksums::Complete,
    );
    Some(packet)
}

/// What takes any bytes and has an answer of its own.
fn arbitrary(packet: &[u8], l3: usize) {
    let mut finished = packet.to_vec();
    let was_partial = transport::complete_partial(&mut finished, l3);
    match Transport::parse(packet, l3) {
        Ok(at) => {
            assert_eq!(was_partial, at.is_partial(packet));
            if was_partial {
                let state = at.checksum_state(&finished);
                assert_ne!(state, ChecksumState::Invalid, "it is finished");
            }
        }
        Err(_) => assert!(!was_partial),
    }
    let mut changed = (0..packet.len()).filter(|at| packet[*at] != finished[*at]);
    assert!(was_partial || changed.next().is_none());

    let mut lone = packet.to_vec();
    let mtu = Mtu::new(1450).expect("it is in range");
    let settings = MergeSettings {
        mtu,
        mtu_v6: mtu,
        udp: true,
    };
    let header = merge::header_for_single(&mut lone, l3, settings);
    assert_eq!(header.check(lone.len()), Ok(()));
}

/// Choices of the first byte: where the IP header is, and what the receiver takes.
const BARE: u8 = 0;
const BEHIND_VXLAN: u8 = 3;
const UNFINISHED: u8 = 1 << 2;
const ONE_BY_ONE: u8 = 1 << 3;
const MTU_576: u8 = 1 << 5;
const MTU_1450: u8 = 2 << 5;
const MTU_9000: u8 = 3 << 5;
/// A choice of the byte that counts changes.
const WITH_ACKS: u8 = 1 << 7;

/// A frame of a virtio-net type with 100-byte segments; what is to happen to its segments.
fn superpacket(choice: u8, kind: (u8, bool), flags: u8, changes: &[[u8; 4]]) -> Vec<u8> {
    train((choice, 2), kind, flags, (100, 100), changes)
}

/// The same with other lengths: of the frame's payload, and of its segments.
fn train(
    (choice, repeat): (u8, u8),
    (gso, v6): (u8, bool),
    flags: u8,
    (payload, size): (u8, u16),
    changes: &[[u8; 4]],
) -> Vec<u8> {
    let tcp = gso != 5;
    let l3 = if choice & 3 == BEHIND_VXLAN { 22 } else { 0 };
    let protocol = if tcp { 6 } else { 17 };
    let mut frame = vec![0; l3];
    if l3 > 0 {
        frame[l3 - 2..].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
    }
    if v6 {
        frame.extend([0x60, 0, 0, 0, 0, 0, protocol, 64]);
        frame.extend([0xfd; 32]);
    } else {
        frame.extend([0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, protocol, 0, 0]);
        frame.extend([10, 244, 1, 2, 10, 244, 2, 3]);
    }
    let l4 = frame.len();
    frame.extend([0x80, 0, 0x1f, 0x90]);
    if tcp {
        frame.extend([0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 2, 0x80, flags, 1, 2]);
        frame.extend([0, 0, 0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
    } else {
        frame.extend([0; 4]);
    }
    let header_len = frame.len() as u16;
    frame.extend(0..payload);
    let offset = if tcp { 16 } else { 6 };
    let numbers = [header_len, size, l4 as u16, offset].map(u16::to_le_bytes);
    [
        &[choice, repeat, 1, gso][..],
        &numbers.concat(),
        &[changes.len() as u8],
        &changes.concat(),
        &frame,
    ]
    .concat()
}

fn seeds() -> Vec<Seed> {
    let (v4, v6, udp4, udp6) = ((1, false), (4, true), (5, false), (5, true));
    let (ack, psh, fin, cwr, syn) = (0x10, 0x18, 0x11, 0x90, 0x12);
    let [drop, swap, again, pad, unfinish, finish, change, damage] = [0u8, 1, 2, 3, 4, 5, 6, 7];
    let (next, acknowledge) = (8, 9);
    // 45 segments of 1,400 bytes, one more, and one that ends at the byte of all that is named.
    let long = |kind, total: u32| {
        let headers = if kind == udp4 { 28 } else { 52 };
        let [.., high, low] = (total - headers - 46 * 1400).to_be_bytes();
        let changes = [[45, drop, 0, 0], [0, next, 255, 255], [0, next, high, low]];
        train((BARE | MTU_9000, 255), kind, ack, (255, 1400), &changes)
    };
    let (flags, number, ttl, hop_limit, fragment) = (33, 31, 8, 7, 6);
    let plain = |choice, kind, flags| superpacket(choice | MTU_1450, kind, flags, &[]);
    let with = |changes: &[[u8; 4]]| superpacket(BARE | MTU_1450, v4, ack, changes);
    // Behind the data, each of so much more than the last.
    let acknowledged = |choice, kind, changes: &[[u8; 4]]| {
        let mut seed = superpacket(choice | MTU_1450, kind, ack, changes);
        seed[12] |= WITH_ACKS;
        seed
    };
    let more = |more| [0, acknowledge, 0, more];
    vec![
        ("tcp4", plain(BARE, v4, ack)),
        ("tcp4-vxlan", plain(BEHIND_VXLAN, v4, psh)),
        ("tcp4-fin", plain(BARE, v4, fin)),
        ("tcp4-cwr", plain(BARE, (0x81, false), cwr)),
        ("tcp4-syn", plain(BARE, v4, syn)),
        ("tcp4-unfinished", plain(BARE | UNFINISHED, v4, ack)),
        ("tcp4-one-by-one", plain(BARE | ONE_BY_ONE, v4, ack)),
        ("tcp6", plain(BARE, v6, ack)),
        ("tcp6-vxlan", plain(BEHIND_VXLAN, v6, psh)),
        ("udp4", plain(BARE, udp4, 0)),
        ("udp6-vxlan", plain(BEHIND_VXLAN, udp6, 0)),
        ("wrong-kind", plain(BARE, (4, false), ack)),
        ("whole", superpacket(BARE | MTU_576, (0, false), psh, &[])),
        ("lost", with(&[[1, drop, 0, 0]])),
        ("reordered", with(&[[1, swap, 0, 0]])),
        ("repeated", with(&[[1, again, 0, 0]])),
        ("padded", with(&[[5, pad, 6, 0], [0, pad, 6, 0]])),
        (
            "some-unfinished",
            with(&[[1, unfinish, 0, 0], [2, finish, 0, 0]]),
        ),
        ("pushed", with(&[[1, change, flags, 8]])),
        ("reset", with(&[[2, change, flags, 4]])),
        ("other-ttl", with(&[[2, change, ttl, 1]])),
        (
            "other-hop-limit",
            superpacket(BARE | MTU_1450, v6, ack, &[[2, change, hop_limit, 1]]),
        ),
        ("fragment", with(&[[2, change, fragment, 0x60]])),
        ("damaged", with(&[[2, damage, 60, 1], [4, damage, 10, 1]])),
        ("damaged-first", with(&[[0, damage, 60, 1]])),
        ("acknowledged", acknowledged(BARE, v4, &[more(10); 4])),
        (
            "acknowledged-vxlan",
            acknowledged(BEHIND_VXLAN, v6, &[more(10); 4]),
        ),
        (
            "acknowledged-twice",
            acknowledged(BARE, v4, &[more(10), more(10), more(0), more(10), more(10)]),
        ),
        (
            // Data with the number that is acknowledged once more behind it.
            "acknowledged-by-data",
            acknowledged(
                BARE,
                v4,
                &[
                    more(10),
                    more(10),
                    [0, again, 0, 0],
                    [7, change, number, 0x40],
                    more(0),
                    more(10),
                ],
            ),
        ),
        ("longest-tcp4", long(v4, 65_535)),
        ("beyond-longest-tcp4", long(v4, 65_536)),
        ("beyond-longest-udp4", long(udp4, 65_536)),
    ]
}
