//! Splitting and merging once more, as plainly as possible, and what must hold between the two and
//! the real ones.
//!
//! Whether segments may be merged is not decided by a list of rules here but by what the rules are
//! for: splitting the merged packet must give the segments back.

use std::collections::{BTreeMap, BTreeSet};

use muslin_encap::ip::transport::{ChecksumState, Error, Protocol, Transport};
use muslin_encap::ip::v4::MAX_LEN;
use muslin_encap::offload::acknowledgement::{AckTable, LOSS_REST};
use muslin_encap::offload::merge::{FLOWS, MAX_SEGMENTS, MergeSettings, Merger};
use muslin_encap::offload::split::{Checksums, HEADERS_LEN, MAX_HEADER_LEN, Split, TrainLimits};
use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};
use smoltcp::wire::IpVersion;

const CWR: u8 = 0x80;
const URG: u8 = 0x20;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const RST: u8 = 0x04;
const SYN: u8 = 0x02;
const FIN: u8 = 0x01;

/// The folded sum of 16-bit words.
fn sum<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u16 {
    let mut total = 0u64;
    for part in parts {
        let (words, rest) = part.as_chunks::<2>();
        total += words
            .iter()
            .map(|word| u64::from(u16::from_be_bytes(*word)))
            .sum::<u64>();
        total += rest.first().map_or(0, |last| u64::from(*last) << 8);
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

fn put(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
}

fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn flags_at(at: &Transport) -> usize {
    at.l4 + 13
}

fn pseudo(packet: &[u8], at: &Transport) -> u16 {
    let number = match at.protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    };
    let addresses = match at.version {
        IpVersion::Ipv4 => &packet[at.l3 + 12..at.l3 + 20],
        IpVersion::Ipv6 => &packet[at.l3 + 8..at.l3 + 40],
    };
    let len = (at.end - at.l4) as u16;
    sum([addresses, &[0, number], &len.to_be_bytes()])
}

/// Fills in all lengths and checksums of a packet that is to end where its bytes do.
pub fn finish(packet: &mut [u8], at: &Transport, checksums: Checksums) {
    let len = packet.len();
    let at = Transport { end: len, ..*at };
    match at.version {
        IpVersion::Ipv4 => {
            put(packet, at.l3 + 2, len - at.l3);
            put(packet, at.l3 + 10, 0);
            let value = !sum([&packet[at.l3..at.l4]]);
            put(packet, at.l3 + 10, value.into());
        }
        IpVersion::Ipv6 => put(packet, at.l3 + 4, len - at.l3 - 40),
    }
    if at.protocol == Protocol::Udp {
        put(packet, at.l4 + 4, len - at.l4);
    }
    let field = at.checksum_offset();
    let pseudo = pseudo(packet, &at);
    put(packet, field, pseudo.into());
    if checksums == Checksums::Complete {
        let value = !sum([&packet[at.l4..]]);
        let none = value == 0 && at.protocol == Protocol::Udp;
        put(packet, field, if none { 0xffff } else { value.into() });
    }
}

/// A superpacket in segments of `size` bytes of payload.
pub fn split(packet: &[u8], l3: usize, size: usize, checksums: Checksums) -> Vec<Vec<u8>> {
    let at = Transport::parse(packet, l3).expect("the real one could");
    let payload = &packet[at.payload..at.end];
    let chunks: Vec<&[u8]> = if payload.is_empty() {
        vec![payload]
    } else {
        payload.chunks(size).collect()
    };
    let count = chunks.len();
    let mut segments = Vec::new();
    for (i, chunk) in chunks.into_iter().enumerate() {
        let mut segment = [&packet[..at.payload], chunk].concat();
        if at.version == IpVersion::Ipv4 {
            let ident = usize::from(get(packet, l3 + 4)) + i;
            put(&mut segment, l3 + 4, ident);
        }
        if at.protocol == Protocol::Tcp {
            let field = at.l4 + 4..at.l4 + 8;
            let first = packet[field.clone()].try_into().expect("four bytes");
            let sequence = u32::from_be_bytes(first).wrapping_add((i * size) as u32);
            segment[field].copy_from_slice(&sequence.to_be_bytes());
            let flags = &mut segment[flags_at(&at)];
            if i > 0 {
                *flags &= !CWR;
            }
            if i + 1 < count {
                *flags &= !(FIN | PSH);
            }
        }
        finish(&mut segment, &at, checksums);
        segments.push(segment);
    }
    segments
}

/// Splits a packet, if it can be, and holds every train against the plain split.
///
/// # Panics
/// If something is wrong.
pub fn check_split(packet: &[u8], l3: usize, gso: Gso, checksums: Checksums, limits: TrainLimits) {
    let Ok(mut split) = Split::new(packet, l3, gso, checksums) else {
        return;
    };
    let expected = self::split(packet, l3, gso.size.into(), checksums);
    assert_eq!(split.remaining(), expected.len());
    let longest = expected.iter().map(|segment| segment.len() - l3).max();
    assert_eq!(Some(split.mtu_needed()), longest);
    assert!(split.header_len() <= MAX_HEADER_LEN);
    let mut headers = vec![0xaa; HEADERS_LEN];
    let mut segments = Vec::new();
    loop {
        let before = split.remaining();
        match split.next_train(&mut headers, limits) {
            Ok(None) => break,
            Err(_) => {
                assert_eq!(split.remaining(), before);
                assert!(split.header_len() + usize::from(gso.size) > limits.bytes);
                return;
            }
            Ok(Some(train)) => {
                let (count, total) = (train.count(), train.total_len());
                assert!(count <= limits.segments.max(1) && total <= limits.bytes);
                let mut left = total;
                for (header, payload) in train.segments() {
                    let segment = [header, payload].concat();
                    assert_eq!(segment.len(), left.min(train.datagram_len()));
                    left -= segment.len();
                    segments.push(segment);
                }
                assert_eq!((left, before - count), (0, split.remaining()));
            }
        }
    }
    assert_eq!(segments, expected);
}

/// A packet as it is compared: checksums finished, and the two forms of zero as one.
fn canonical(packet: &[u8], at: &Transport) -> Vec<u8> {
    let mut packet = packet[..at.end].to_vec();
    let field = at.checksum_offset();
    if get(&packet, field) == pseudo(&packet, at) {
        let value = !sum([&packet[at.l4..]]);
        put(&mut packet, field, value.into());
    }
    let mut fields = vec![field];
    if at.version == IpVersion::Ipv4 {
        fields.push(at.l3 + 10);
    }
    for field in fields {
        if get(&packet, field) == 0xffff {
            put(&mut packet, field, 0);
        }
    }
    packet
}

fn forbidden(packet: &[u8], at: &Transport, first: bool, settings: MergeSettings) -> bool {
    let flags = packet[flags_at(at).min(at.payload - 1)];
    let tcp = at.protocol == Protocol::Tcp;
    let empty = at.payload_len() == 0;
    let single = flags & (SYN | RST | URG | CWR) != 0 || flags & ACK == 0;
    let ends = flags & (FIN | PSH) != 0;
    let no_checksum = get(packet, at.checksum_offset()) == 0;
    empty
        || at.end - at.l3 > usize::from(settings.mtu.get())
        || at.version == IpVersion::Ipv4 && at.l4 - at.l3 != 20
        || tcp && (single || first && ends)
        || !tcp && (!settings.udp || no_checksum)
}

/// The merged packet of a group with finished checksums, if splitting it gives the group back.
fn join(group: &[&[u8]], l3: usize, settings: MergeSettings) -> Option<Vec<u8>> {
    let mut places = Vec::new();
    for (i, packet) in group.iter().enumerate() {
        let at = Transport::parse(packet, l3).ok()?;
        if forbidden(packet, &at, i == 0, settings) {
            return None;
        }
        places.push(at);
    }
    let (first, at) = (group[0], places[0]);
    let mut merged = first[..at.payload].to_vec();
    for (packet, at) in group.iter().zip(&places) {
        merged.extend(&packet[at.payload..at.end]);
    }
    if merged.len() - l3 > MAX_LEN || group.len() > MAX_SEGMENTS {
        return None;
    }
    if at.protocol == Protocol::Tcp {
        let last = group[group.len() - 1];
        let last_at = places[places.len() - 1];
        merged[flags_at(&at)] |= last[flags_at(&last_at)] & (FIN | PSH);
    }
    finish(&mut merged, &at, Checksums::Complete);
    let segments = split(&merged, l3, at.payload_len(), Checksums::Complete);
    if segments.len() != group.len() {
        return None;
    }
    let fixed = at.version == IpVersion::Ipv4
        && first[l3 + 6] & 0x40 != 0
        && group
            .iter()
            .all(|packet| packet[l3 + 4..l3 + 6] == first[l3 + 4..l3 + 6]);
    for ((mut segment, packet), at) in segments.into_iter().zip(group).zip(&places) {
        if fixed {
            segment[l3 + 4..l3 + 6].copy_from_slice(&first[l3 + 4..l3 + 6]);
            let at = Transport::parse(&segment, l3).ok()?;
            finish(&mut segment, &at, Checksums::Complete);
        }
        let theirs = Transport::parse(&segment, l3).ok()?;
        if canonical(&segment, &theirs) != canonical(packet, at) {
            return None;
        }
    }
    Some(merged)
}

/// Whether a group takes nobody after its last.
fn is_closed(group: &[&[u8]], l3: usize) -> bool {
    let at = |packet: &[u8]| Transport::parse(packet, l3).expect("it is in a group");
    let (first, last) = (group[0], group[group.len() - 1]);
    let ends = at(first).protocol == Protocol::Tcp && last[flags_at(&at(last))] & (FIN | PSH) != 0;
    ends || at(last).payload_len() < at(first).payload_len()
}

/// What tells flows apart; `None` if that is not known or no matter.
fn flow(packet: &[u8], l3: usize) -> Result<Vec<u8>, Error> {
    let at = Transport::parse(packet, l3)?;
    let addresses = match at.version {
        IpVersion::Ipv4 => &packet[l3 + 12..l3 + 20],
        IpVersion::Ipv6 => &packet[l3 + 8..l3 + 40],
    };
    let protocol = [(at.protocol == Protocol::Tcp).into()];
    Ok([&protocol, addresses, &packet[at.l4..at.l4 + 4]].concat())
}

fn is_barrier(packet: &[u8], l3: usize) -> bool {
    !matches!(
        flow(packet, l3),
        Ok(_) | Err(Error::EtherType(_) | Error::Version(_) | Error::Protocol(_))
    )
}

/// Whether a packet may be of any TCP flow, and whose acknowledgement number is not known.
fn hides_number(packet: &[u8], l3: usize) -> bool {
    let is_tcp = match packet.get(l3..) {
        Some(ip) if ip.len() >= 20 && ip[0] >> 4 == 4 => ip[9] == 6,
        _ => true,
    };
    is_barrier(packet, l3) && is_tcp
}

/// What is left of an acknowledgement that is nothing else, once what a newer one may change is
/// blank; and its number and TSval.
fn blank_ack(packet: &[u8], l3: usize) -> Option<(Vec<u8>, u32, u32)> {
    let at = Transport::parse(packet, l3).ok()?;
    let tcp = &packet[at.l4..at.end];
    let stamps = [1, 1, 8, 10];
    let is_pure = at.protocol == Protocol::Tcp
        && at.payload == at.end
        && at.end == packet.len()
        && match tcp.len() {
            20 => tcp[12] == 0x50,
            32 => tcp[12] == 0x80 && tcp[20..24] == stamps,
            _ => false,
        }
        && tcp[13] == ACK
        && tcp[18..20] == [0, 0]
        && at.checksum_state(packet) != ChecksumState::Invalid;
    let mut blank = packet.to_vec();
    let is_plain = match at.version {
        IpVersion::Ipv4 => {
            blank[l3 + 4..l3 + 6].fill(0);
            blank[l3 + 10..l3 + 12].fill(0);
            at.l4 - l3 == 20 && sum([&packet[l3..at.l4]]) == 0xffff
        }
        IpVersion::Ipv6 => at.l4 - l3 == 40,
    };
    if !is_pure || !is_plain {
        return None;
    }
    blank[at.l4 + 8..at.l4 + 12].fill(0);
    blank[at.l4 + 14..at.l4 + 18].fill(0);
    let clock = blank
        .get_mut(at.l4 + 24..)
        .filter(|stamps| !stamps.is_empty());
    clock.into_iter().for_each(|stamps| stamps.fill(0));
    let word = |at: usize| u32::from(get(packet, at)) << 16 | u32::from(get(packet, at + 2));
    let clock = if tcp.len() == 32 { word(at.l4 + 24) } else { 0 };
    Some((blank, word(at.l4 + 8), clock))
}

/// Whether a packet is an acknowledgement that says all that an older one says, and more.
#[must_use]
pub fn supersedes(newer: &[u8], older: &[u8], l3: usize) -> bool {
    let (Some(newer), Some(older)) = (blank_ack(newer, l3), blank_ack(older, l3)) else {
        return false;
    };
    newer.0 == older.0
        && (1..1 << 31).contains(&newer.1.wrapping_sub(older.1))
        && newer.2.wrapping_sub(older.2) < 1 << 31
}

/// Which packets of a batch are acknowledgements that the next packet of their flow makes useless.
#[must_use]
pub fn useless(packets: &[Vec<u8>], l3: usize) -> Vec<bool> {
    let is_useless = |(index, packet): (usize, &Vec<u8>)| {
        let after = packets.iter().enumerate().skip(index + 1);
        let mut after = after.take_while(|(_, packet)| !is_barrier(packet, l3));
        let next = after.find(|(_, next)| flow(next, l3).ok() == flow(packet, l3).ok());
        next.is_some_and(|(place, next)| {
            supersedes(next, packet, l3) && !is_spared(&packets[..place], next, l3)
        }) && advances(&packets[..index], packet, l3)
    };
    packets.iter().enumerate().map(is_useless).collect()
}

/// What is known of a flow: the highest acknowledgement number, and up to which one all are carried.
type Known = (u32, Option<u32>);

/// How far a number is ahead of another, if it is.
fn ahead(new: u32, old: u32) -> Option<u32> {
    Some(new.wrapping_sub(old)).filter(|ahead| (1..1 << 31).contains(ahead))
}

/// Whether an acknowledgement's number is higher than all that are known of its flow, and one is.
fn advances(before: &[Vec<u8>], packet: &[u8], l3: usize) -> bool {
    let number = blank_ack(packet, l3).map(|(_, number, _)| number);
    let highest = known(before, packet, l3).map(|(highest, _)| highest);
    highest
        .zip(number)
        .is_some_and(|(highest, number)| ahead(number, highest).is_some())
}

/// Whether an acknowledgement is carried because of a loss before it.
fn is_spared(before: &[Vec<u8>], packet: &[u8], l3: usize) -> bool {
    let number = blank_ack(packet, l3).map(|(_, number, _)| number);
    let until = known(before, packet, l3).and_then(|(_, until)| until);
    until
        .zip(number)
        .is_some_and(|(until, number)| ahead(until, number).is_some())
}

/// What earlier packets tell of the flow of a packet.
fn known(before: &[Vec<u8>], packet: &[u8], l3: usize) -> Option<Known> {
    before.iter().fold(None, |known, earlier| {
        let known = known.filter(|_| !hides_number(earlier, l3));
        if flow(earlier, l3) == flow(packet, l3) {
            learn(known, earlier, l3)
        } else {
            known
        }
    })
}

/// What is known of a flow after one of its segments.
fn learn(known: Option<Known>, segment: &[u8], l3: usize) -> Option<Known> {
    let at = Transport::parse(segment, l3).ok()?;
    let (number, flags) = (at.l4 + 8, segment[flags_at(&at)]);
    let number = u32::from(get(segment, number)) << 16 | u32::from(get(segment, number + 2));
    if flags & (SYN | RST | ACK) != ACK {
        return None;
    }
    let is_pure = blank_ack(segment, l3).is_some();
    let Some((highest, until)) = known else {
        return is_pure.then_some((number, None));
    };
    let highest = ahead(number, highest).map_or(highest, |_| number);
    let tells_of_loss =
        at.payload == at.end && flags == ACK && has_sack(&segment[at.l4..at.payload]);
    let until = match until {
        until if is_pure => until.filter(|until| ahead(*until, number).is_some()),
        _ if tells_of_loss => Some(highest.wrapping_add(LOSS_REST)),
        until => until,
    };
    Some((highest, until))
}

/// Whether there is an option of kind 5 in a TCP header.
fn has_sack(header: &[u8]) -> bool {
    let mut at = 20;
    while let Some(kind) = header.get(at) {
        let len = header.get(at + 1).copied().unwrap_or(0);
        match kind {
            5 => return true,
            1 => at += 1,
            0 => return false,
            _ if len < 2 => return false,
            _ => at += usize::from(len),
        }
    }
    false
}

/// What a merger has passed on.
pub struct Output {
    /// Its virtio-net header.
    pub virtio: Header,
    /// All its bytes.
    pub bytes: Vec<u8>,
    /// How many packets it is of.
    pub count: usize,
}

/// Runs a batch through a merger.
pub fn merge(packets: &[Vec<u8>], l3: usize, settings: MergeSettings) -> Vec<Output> {
    merge_by(Merger::new(settings), packets, l3).0
}

/// As [`merge`], where newer acknowledgements replace older ones: also how many they have replaced.
pub fn merge_with_acks(
    packets: &[Vec<u8>],
    l3: usize,
    settings: MergeSettings,
    acks: &mut AckTable<()>,
) -> (Vec<Output>, usize) {
    merge_by(Merger::new(settings).with_acks(acks), packets, l3)
}

fn merge_by(merger: Merger<'_, ()>, packets: &[Vec<u8>], l3: usize) -> (Vec<Output>, usize) {
    let mut buffers = packets.to_vec();
    let mut outputs = Vec::new();
    let mut merger = merger;
    let mut sink = |merged: muslin_encap::offload::merge::Merged<'_, '_, ()>| {
        let bytes = [&*merged.head, &merged.tail.concat()].concat();
        assert_eq!(bytes.len(), merged.total_len());
        outputs.push(Output {
            virtio: merged.virtio,
            bytes,
            count: 1 + merged.tail.len(),
        });
    };
    for buffer in &mut buffers {
        merger.push(buffer, l3, (), &mut sink);
    }
    merger.flush(&mut sink);
    let superseded = merger.superseded();
    (outputs, superseded)
}

/// Merges a batch and holds what comes out against the plain rules: nothing is lost, changed,
/// reordered within its flow, merged that may not be or, where few enough flows are open, left
/// unmerged that could be.
///
/// # Panics
/// If something is wrong.
pub fn check_merge(packets: &[Vec<u8>], l3: usize, settings: MergeSettings) {
    let outputs = merge(packets, l3, settings);
    let none = vec![false; packets.len()];
    let lost = check_outputs(packets, l3, settings, outputs, &none);
    assert_eq!(lost, 0, "none is lost");
}

/// As [`check_merge`], where newer acknowledgements replace older ones: those alone that are
/// useless by the plain rules are missing, and counted, and none of a lone flow is left.
///
/// # Panics
/// If something is wrong.
pub fn check_merge_with_acks(packets: &[Vec<u8>], l3: usize, settings: MergeSettings) {
    let mut useless = useless(packets, l3);
    for (useless, packet) in useless.iter_mut().zip(packets) {
        *useless &= packet.len().saturating_sub(l3) <= usize::from(settings.mtu.get());
    }
    let (outputs, superseded) = merge_with_acks(packets, l3, settings, &mut AckTable::new());
    let lost = check_outputs(packets, l3, settings, outputs, &useless);
    assert_eq!(lost, superseded);
    // Others need its slot, or its place.
    let keys = |packets: &mut dyn Iterator<Item = &Vec<u8>>| {
        packets
            .map(|packet| flow(packet, l3).ok())
            .collect::<BTreeSet<_>>()
            .len()
    };
    let acks = &mut packets
        .iter()
        .filter(|packet| blank_ack(packet, l3).is_some());
    if keys(acks) == 1 && keys(&mut packets.iter()) <= FLOWS {
        let expected = useless.iter().filter(|useless| **useless).count();
        assert_eq!(superseded, expected, "useless ones are left");
    }
}

/// Returns how many packets are missing, all of which are useless.
fn check_outputs(
    packets: &[Vec<u8>],
    l3: usize,
    settings: MergeSettings,
    outputs: Vec<Output>,
    useless: &[bool],
) -> usize {
    let mut waiting = BTreeMap::<_, Vec<(usize, &[u8])>>::new();
    for (index, packet) in packets.iter().enumerate().rev() {
        let flow = flow(packet, l3).ok();
        waiting.entry(flow).or_default().push((index, packet));
    }
    let few = waiting.len() <= FLOWS;
    let mut before: BTreeMap<Option<Vec<u8>>, Vec<usize>> = BTreeMap::new();
    let (mut passed, mut lost) = (0, 0);
    for output in outputs {
        let key = flow(&output.bytes, l3).ok();
        let queue = waiting.get_mut(&key).expect("it has come in");
        while let Some((index, packet)) = queue.last()
            && useless[*index]
            && *packet != output.bytes
        {
            queue.pop();
            lost += 1;
        }
        let taken = queue.split_off(queue.len() - output.count);
        let (indices, group): (Vec<_>, Vec<_>) = taken.into_iter().rev().unzip();
        if is_barrier(group[0], l3) {
            assert_eq!(passed + lost, indices[0], "nothing overtakes it");
        }
        passed += output.count;
        check_output(&output, &group, l3, settings);
        if let (Some(previous), Some(_), true) = (before.get(&key), &key, few) {
            check_complete(packets, previous, indices[0], l3, settings);
        }
        before.insert(key, indices);
    }
    assert_eq!(passed + lost, packets.len(), "none is lost");
    lost
}

/// The group before could not have gone on with this packet.
fn check_complete(
    packets: &[Vec<u8>],
    group: &[usize],
    next: usize,
    l3: usize,
    settings: MergeSettings,
) {
    let last = group[group.len() - 1];
    let stopped = packets[last..next]
        .iter()
        .any(|packet| is_barrier(packet, l3));
    let mut group: Vec<&[u8]> = group.iter().map(|index| &packets[*index][..]).collect();
    let closed = Transport::parse(group[0], l3).is_err() || is_closed(&group, l3);
    group.push(&packets[next]);
    assert!(
        stopped || closed || join(&group, l3, settings).is_none(),
        "they could have been merged"
    );
}

fn check_output(output: &Output, group: &[&[u8]], l3: usize, settings: MergeSettings) {
    let (virtio, bytes) = (output.virtio, &output.bytes);
    assert_eq!(Header::parse(&virtio.to_bytes()), Ok(virtio));
    let Ok(at) = Transport::parse(bytes, l3) else {
        assert_eq!(virtio, Header::default());
        assert_eq!(bytes, group[0]);
        return;
    };
    if l3 < 1000 {
        assert_eq!(virtio.check(bytes.len()), Ok(()));
    }
    let partial = get(bytes, at.checksum_offset()) == pseudo(bytes, &at);
    if l3 < 1000 {
        assert_eq!(matches!(virtio.checksum, Checksum::Partial { .. }), partial);
    }
    if group.len() > 1 {
        let mut expected = join(group, l3, settings).expect("they may be merged");
        finish(&mut expected, &at, Checksums::Partial);
        assert_eq!(*bytes, expected);
        let (field, counted_from) = match at.version {
            IpVersion::Ipv4 => (l3 + 2, l3),
            IpVersion::Ipv6 => (l3 + 4, l3 + 40),
        };
        let written = usize::from(get(bytes, field));
        assert_eq!(written, bytes.len() - counted_from, "its length is told");
        let gso = virtio.gso.expect("it is a superpacket");
        let size = Transport::parse(group[0], l3).map(|at| at.payload_len());
        assert_eq!(Ok(gso.size.into()), size);
        check_gso(bytes, &at, gso);
    } else if let Some(gso) = virtio.gso {
        assert!(at.end - l3 > usize::from(settings.mtu.get()));
        assert_eq!(
            usize::from(gso.size) + at.payload - l3,
            usize::from(settings.mtu.get())
        );
        check_gso(bytes, &at, gso);
        let mut before = group[0].to_vec();
        assert_ne!(at.checksum_state(&before), ChecksumState::Invalid);
        put(&mut before, at.checksum_offset(), pseudo(bytes, &at).into());
        assert_eq!(*bytes, before);
    } else {
        assert_eq!(bytes, group[0]);
    }
}

fn check_gso(packet: &[u8], at: &Transport, gso: Gso) {
    let tcp = at.protocol == Protocol::Tcp;
    let kind = match at.version {
        _ if !tcp => GsoKind::Udp,
        IpVersion::Ipv4 => GsoKind::TcpV4,
        IpVersion::Ipv6 => GsoKind::TcpV6,
    };
    assert_eq!(gso.kind, kind);
    assert_eq!(gso.ecn, tcp && packet[flags_at(at)] & CWR != 0);
}
