//! Splitting and merging of arbitrary packets, against the plain ones that the tests use.

use muslin_encap::checksum;
use muslin_encap::headers::Transport;
use muslin_encap::merge::{self, Settings};
use muslin_encap::overhead::Mtu;
use muslin_encap::split::{Checksums, Limits, Split};
use muslin_encap::virtio::Header;

use crate::reference;

/// The most packets of a batch, and the longest of them.
const MAX_PACKETS: usize = 100;
const MAX_LEN: usize = 65_535;

/// Checks a frame with its virtio-net header, and then a batch of packets made of it.
///
/// The first byte chooses where the IP header is (two bits), whether checksums are finished, the
/// limits of a train (two bits) and the MTU (two bits); the second how often the payload is
/// repeated. Then come ten bytes of virtio-net header, the number of changes, and as many changes
/// of four bytes; the rest is the frame.
///
/// A change names a packet of the batch, what happens to it, and two bytes of where and how.
///
/// # Panics
/// If something is wrong.
pub fn run(data: &[u8]) {
    let Some((&[choice, repeat], rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let header = Header::parse(rest);
    let Some((count, rest)) = rest.get(10..).and_then(|rest| rest.split_first()) else {
        return;
    };
    let (changes, frame) = rest.split_at(rest.len().min(usize::from(*count) * 4));
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
                Limits::UDP_SEGMENT,
                Limits::ONE,
                Limits {
                    segments: 7,
                    bytes: 3000,
                },
            ][usize::from(choice >> 3 & 3).min(2)];
            reference::check_split(&packet, l3, gso, checksums, limits);
            if Split::new(&packet, l3, gso, checksums).is_ok() {
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
    let settings = Settings {
        mtu: Mtu::new(mtu).expect("it is in range"),
        udp: choice & 0x80 == 0,
    };
    reference::check_merge(&batch, l3, settings);
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
    match what % 8 {
        0 => drop(batch.remove(index)),
        1 => batch.swap(index, (index + 1) % len),
        2 => {
            let again = packet.clone();
            batch.push(again);
        }
        3 => packet.extend(vec![how; usize::from(at)]),
        4 => refill(packet, l3, Checksums::Partial),
        5 => refill(packet, l3, Checksums::Complete),
        _ => {
            if let Some(byte) = packet.get_mut(l3 + usize::from(at)) {
                *byte ^= how;
            }
            if what % 8 == 6 {
                refill(packet, l3, Checksums::Complete);
            }
        }
    }
}

/// What takes any bytes and has an answer of its own.
fn arbitrary(packet: &[u8], l3: usize) {
    let mut finished = packet.to_vec();
    let was_partial = checksum::complete_partial(&mut finished, l3);
    match Transport::parse(packet, l3) {
        Ok(at) => {
            assert_eq!(was_partial, checksum::is_partial(packet, &at));
            if was_partial {
                let state = checksum::check(&finished, &at);
                assert_ne!(state, checksum::Transported::Invalid, "it is finished");
            }
        }
        Err(_) => assert!(!was_partial),
    }
    let mut changed = (0..packet.len()).filter(|at| packet[*at] != finished[*at]);
    assert!(was_partial || changed.next().is_none());

    let mut lone = packet.to_vec();
    let header = merge::lone(&mut lone, l3, Mtu::new(1450).expect("it is in range"));
    assert_eq!(header.check(lone.len()), Ok(()));
}
