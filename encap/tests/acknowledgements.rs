//! Acknowledgements that newer ones replace, against the plain rules of `reference` and against
//! what TCP makes of them.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeSet;

use muslin_bed::reference::{
    check_merge_with_acks, finish, merge_with_acks, split, supersedes, useless,
};
use muslin_encap::ip::transport::Transport;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::acknowledgement::{AckTable, Offer};
use muslin_encap::offload::merge::MergeSettings;
use muslin_encap::offload::split::Checksums;
use proptest::prelude::*;

const ACK: u8 = 0x10;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ECE: u8 = 0x40;

/// What a segment says, besides what all of these tests have in common.
#[derive(Debug, Clone, Default)]
struct Segment {
    v6: bool,
    flow: u8,
    tos: u8,
    sequence: u32,
    number: u32,
    flags: u8,
    window: u16,
    clock: Option<u32>,
    sack: Vec<(u32, u32)>,
    payload: usize,
}

impl Segment {
    fn packet(&self) -> Vec<u8> {
        let mut options = Vec::new();
        if let Some(clock) = self.clock {
            options.extend([1, 1, 8, 10]);
            options.extend(clock.to_be_bytes());
            options.extend([0, 0, 0, 7]);
        }
        if !self.sack.is_empty() {
            options.extend([1, 1, 5, 2 + 8 * self.sack.len() as u8]);
            for (from, to) in &self.sack {
                options.extend([from.to_be_bytes(), to.to_be_bytes()].concat());
            }
        }
        let len = 20 + options.len() + self.payload;
        let mut packet = Vec::new();
        if self.v6 {
            packet.extend([
                0x60 | self.tos >> 4,
                self.tos << 4,
                0,
                0,
                0,
                len as u8,
                6,
                64,
            ]);
            packet.extend([0xfd; 32]);
        } else {
            packet.extend([
                0x45,
                self.tos,
                0,
                20 + len as u8,
                0,
                0,
                0x40,
                0,
                64,
                6,
                0,
                0,
            ]);
            packet.extend([10, 244, 1, 2, 10, 244, 2, 3]);
        }
        packet.extend([0x80, self.flow, 0x1f, 0x90]);
        packet.extend([self.sequence.to_be_bytes(), self.number.to_be_bytes()].concat());
        let words = 5 + options.len() as u8 / 4;
        packet.extend([words << 4, self.flags]);
        packet.extend(self.window.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend(options);
        packet.extend(vec![7; self.payload]);
        let at = Transport::parse(&packet, 0).unwrap();
        finish(&mut packet, &at, Checksums::Complete);
        packet
    }
}

fn settings() -> MergeSettings {
    MergeSettings {
        mtu: Mtu::new(1450).unwrap(),
        mtu_v6: Mtu::new(1450).unwrap(),
        udp: true,
    }
}

/// Two ways to carry a batch.
#[derive(Debug, Clone, Copy)]
enum Carrier {
    /// Packets wait in places until all leave.
    Outbox,
    Merger,
}

fn carry(carrier: Carrier, table: &mut AckTable<()>, batch: &[Vec<u8>]) -> Vec<Vec<u8>> {
    match carrier {
        Carrier::Outbox => {
            let mut waiting: Vec<Vec<u8>> = Vec::new();
            for packet in batch {
                match table.offer(packet, 0, (), waiting.len()) {
                    Offer::Replaces(place) => waiting[place] = packet.clone(),
                    Offer::Waits | Offer::Other => waiting.push(packet.clone()),
                }
            }
            table.end_batch();
            waiting
        }
        Carrier::Merger => {
            let (outputs, superseded) = merge_with_acks(batch, 0, settings(), table);
            let count: usize = outputs.iter().map(|output| output.count).sum();
            assert_eq!(count + superseded, batch.len());
            let outputs = outputs
                .into_iter()
                .flat_map(|output| match output.virtio.gso {
                    Some(gso) => split(&output.bytes, 0, gso.size.into(), Checksums::Complete),
                    None => vec![output.bytes],
                });
            outputs.collect()
        }
    }
}

/// One packet after another, and what is odd about it.
fn segments() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let number = prop_oneof![4 => 0i32..3, 1 => any::<i32>(), 1 => -3i32..0];
    let oddity = prop_oneof![3 => Just(0u8), 1 => 1u8..13];
    let packet = (number, oddity, 0u8..3, any::<u8>());
    let flows = (any::<bool>(), any::<bool>(), any::<u32>());
    (flows, proptest::collection::vec(packet, 1..40)).prop_map(|((v6, stamps, base), packets)| {
        let plain = Segment {
            v6,
            number: base,
            flags: ACK,
            clock: stamps.then_some(base),
            ..Segment::default()
        };
        let mut flows = [0, 1, 2].map(|flow| Segment {
            flow,
            ..plain.clone()
        });
        let packets = packets.into_iter().map(|(ahead, oddity, flow, by)| {
            let flow = &mut flows[usize::from(flow)];
            flow.number = flow.number.wrapping_add_signed(ahead);
            make_odd(flow, oddity, by)
        });
        packets.collect()
    })
}

fn make_odd(flow: &mut Segment, oddity: u8, by: u8) -> Vec<u8> {
    let mut segment = flow.clone();
    match oddity {
        1 => segment.payload = by.into(),
        2 => segment.flags |= [FIN, SYN, RST, ECE, 0x80, 0x08][usize::from(by % 6)],
        3 => segment.flags = by,
        4 => segment.sack = vec![(flow.number.wrapping_add(5), flow.number.wrapping_add(9))],
        5 => segment.tos = by,
        6 => segment.window = by.into(),
        7 => segment.clock = flow.clock.map(|clock| clock.wrapping_add(by.into())),
        8 => flow.clock = flow.clock.map(|clock| clock.wrapping_sub(by.into())),
        9 => flow.sequence = flow.sequence.wrapping_add(by.into()),
        _ => {}
    }
    segment.payload = segment.payload.min(180);
    let mut packet = segment.packet();
    match oddity {
        10 => {
            let at = usize::from(by) % packet.len();
            packet[at] ^= 1;
        }
        11 => packet.extend([0; 3]),
        12 => {
            let at = Transport::parse(&packet, 0).unwrap();
            finish(&mut packet, &at, Checksums::Partial);
        }
        _ => {}
    }
    packet
}

/// What a TCP sender does with what it hears (RFC 5681 sections 2 and 3.2, RFC 9293 section
/// 3.10.7.4), whose data is never all acknowledged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Sender {
    acknowledged: u32,
    window: u16,
    /// The sequence and acknowledgement numbers of the last update of the window.
    updated: (u32, u32),
    duplicates: u32,
    /// Each duplicate, by what had been acknowledged and how many there were.
    seen: Vec<(u32, u32)>,
    fast_retransmits: Vec<u32>,
    /// Each packet with selective acknowledgements, by its number.
    selective: Vec<(u32, Vec<u8>)>,
    /// The payload's sequence numbers.
    data: Vec<u32>,
}

impl Sender {
    fn new(acknowledged: u32) -> Self {
        Self {
            acknowledged,
            updated: (0, acknowledged),
            ..Self::default()
        }
    }

    fn hear(&mut self, packet: &[u8]) {
        let at = Transport::parse(packet, 0).unwrap();
        let word = |at: usize| u32::from_be_bytes(packet[at..at + 4].try_into().unwrap());
        let (sequence, number) = (word(at.l4 + 4), word(at.l4 + 8));
        let window = u16::from_be_bytes(packet[at.l4 + 14..at.l4 + 16].try_into().unwrap());
        let is_newer = |new: u32, old: u32| new.wrapping_sub(old) as i32 > 0;
        let is_duplicate = at.payload_len() == 0
            && packet[at.l4 + 13] & (SYN | FIN) == 0
            && number == self.acknowledged
            && window == self.window;
        if is_newer(number, self.acknowledged) {
            self.acknowledged = number;
            self.duplicates = 0;
        } else if is_duplicate {
            self.duplicates += 1;
            self.seen.push((number, self.duplicates));
            if self.duplicates == 3 {
                self.fast_retransmits.push(number);
            }
        }
        let (last_sequence, last_number) = self.updated;
        let counts = is_newer(sequence, last_sequence)
            || sequence == last_sequence && !is_newer(last_number, number);
        if counts {
            self.window = window;
            self.updated = (sequence, number);
        }
        if at.payload - at.l4 > 32 {
            let options = packet[at.l4 + 32..at.payload].to_vec();
            self.selective.push((number, options));
        }
        if at.payload_len() > 0 {
            self.data.push(sequence);
        }
    }
}

/// What happens to a TCP receiver.
#[derive(Debug, Clone, Copy)]
enum Event {
    /// A segment of the stream arrives: so many segments before or behind the first that is missing.
    Arrives(i8),
    /// The application reads so many segments.
    Reads(u8),
    /// The timer of delayed acknowledgements fires.
    Timer,
    /// It sends data itself, with an acknowledgement.
    Sends(u8),
    /// Its clock ticks.
    Ticks,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        12 => Just(Event::Arrives(0)),
        4 => (1i8..6).prop_map(Event::Arrives),
        1 => (-3i8..0).prop_map(Event::Arrives),
        3 => (1u8..8).prop_map(Event::Reads),
        1 => Just(Event::Timer),
        1 => (1u8..100).prop_map(Event::Sends),
        2 => Just(Event::Ticks),
    ]
}

/// Bytes of the segments that a receiver gets.
const SEGMENT: u32 = 1000;

/// A TCP receiver (RFC 9293 section 3.8.6, RFC 5681 section 4.2): it acknowledges every second
/// segment, and at once what leaves or fills a gap.
struct Receiver {
    /// What it says next.
    segment: Segment,
    /// The number of its first byte.
    first: u32,
    /// Segments in order, and those behind a gap.
    received: u32,
    beyond: BTreeSet<u32>,
    read: u32,
    /// Segments that were not acknowledged yet.
    delayed: u32,
    with_sack: bool,
    packets: Vec<Vec<u8>>,
}

/// Segments that a receiver's window has room for.
const WINDOW: u32 = 40;

impl Receiver {
    fn new(flow: u8, v6: bool, first: u32, clock: Option<u32>, with_sack: bool) -> Self {
        let mut receiver = Self {
            segment: Segment {
                v6,
                flow,
                flags: ACK,
                clock,
                ..Segment::default()
            },
            first,
            received: 0,
            beyond: BTreeSet::new(),
            read: 0,
            delayed: 0,
            with_sack,
            packets: Vec::new(),
        };
        // The end of the handshake.
        receiver.acknowledge(0);
        receiver
    }

    fn number_of(&self, segment: u32) -> u32 {
        self.first.wrapping_add(segment * SEGMENT)
    }

    fn acknowledge(&mut self, payload: usize) {
        let blocks = self.beyond.iter().map(|segment| {
            let from = self.number_of(*segment);
            (from, from.wrapping_add(SEGMENT))
        });
        let segment = Segment {
            number: self.number_of(self.received),
            window: (WINDOW - (self.received - self.read)) as u16,
            sack: blocks.take(if self.with_sack { 3 } else { 0 }).collect(),
            payload,
            ..self.segment.clone()
        };
        self.packets.push(segment.packet());
        self.segment.sequence += payload as u32;
        self.delayed = 0;
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Arrives(offset) => {
                let segment = self.received.saturating_add_signed(offset.into());
                if segment >= self.read + WINDOW {
                    return;
                }
                let had_gap = !self.beyond.is_empty();
                if segment >= self.received {
                    self.beyond.insert(segment);
                }
                let before = self.received;
                while self.beyond.remove(&self.received) {
                    self.received += 1;
                }
                self.delayed += 1;
                if self.received == before || had_gap || self.delayed == 2 {
                    self.acknowledge(0);
                }
            }
            Event::Reads(segments) => {
                let was_small = self.received - self.read > WINDOW / 2;
                self.read = (self.read + u32::from(segments)).min(self.received);
                if was_small && self.received - self.read <= WINDOW / 2 {
                    self.acknowledge(0);
                }
            }
            Event::Timer if self.delayed > 0 => self.acknowledge(0),
            Event::Timer => {}
            Event::Sends(payload) => self.acknowledge(payload.into()),
            Event::Ticks => {
                let clock = self.segment.clock.as_mut();
                clock
                    .into_iter()
                    .for_each(|clock| *clock = clock.wrapping_add(1));
            }
        }
    }
}

/// Holds what is carried against what went in: unchanged, in its order within its flow, and nothing
/// missing but what one that is carried supersedes.
fn check_content(batch: &[Vec<u8>], carried: &[Vec<u8>]) {
    let flow_of = |packet: &[u8]| {
        let at = Transport::parse(packet, 0).unwrap();
        packet[at.l4 + 1]
    };
    for flow in batch
        .iter()
        .map(|packet| flow_of(packet))
        .collect::<BTreeSet<_>>()
    {
        let of_flow = |packet: &&Vec<u8>| flow_of(packet) == flow;
        let mut carried = carried.iter().filter(of_flow).peekable();
        let mut missing: Vec<&Vec<u8>> = Vec::new();
        for packet in batch.iter().filter(of_flow) {
            if carried.peek() != Some(&packet) {
                missing.push(packet);
                continue;
            }
            carried.next();
            assert!(missing.iter().all(|older| supersedes(packet, older, 0)));
            missing.clear();
        }
        assert!(missing.is_empty());
        assert_eq!(carried.next(), None, "it has come in");
    }
}

/// Carries packets in batches of these sizes, over and over, and shows each with what was carried.
fn carry_all(
    carrier: Carrier,
    packets: &[Vec<u8>],
    sizes: &[usize],
    mut each: impl FnMut(&[Vec<u8>], &[Vec<u8>]),
) {
    let mut table = AckTable::new();
    let mut rest = packets;
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (batch, after) = rest.split_at(rest.len().min(*size));
        each(batch, &carry(carrier, &mut table, batch));
        rest = after;
    }
}

#[test]
fn a_stream_without_losses_is_acknowledged_once_a_batch() {
    for carrier in [Carrier::Outbox, Carrier::Merger] {
        for (v6, clock) in [
            (false, None),
            (false, Some(9)),
            (true, None),
            (true, Some(9)),
        ] {
            let mut receiver = Receiver::new(0, v6, u32::MAX - 5000, clock, false);
            for _ in 0..200 {
                receiver.take(Event::Arrives(0));
                receiver.take(Event::Reads(1));
            }
            assert_eq!(receiver.packets.len(), 101);
            let mut counts = Vec::new();
            carry_all(carrier, &receiver.packets, &[10], |batch, carried| {
                assert_eq!(carried.last(), batch.last());
                counts.push(carried.len());
            });
            // The first of all is not known to be none that was there before.
            assert_eq!(counts, [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
        }
    }
}

proptest! {
    #[test]
    fn what_is_replaced_is_useless_by_the_plain_rules(batch in segments()) {
        let useless = useless(&batch, 0);
        let expected: Vec<_> = batch.iter().zip(&useless).filter(|(_, useless)| !**useless).collect();
        let carried = carry(Carrier::Outbox, &mut AckTable::new(), &batch);
        // The one that replaces others comes in their place.
        prop_assert_eq!(
            carried.iter().collect::<BTreeSet<_>>(),
            expected.iter().map(|(packet, _)| *packet).collect::<BTreeSet<_>>()
        );
        prop_assert_eq!(carried.len(), expected.len());
        check_merge_with_acks(&batch, 0, settings());
    }

    #[test]
    fn a_sender_learns_the_same(
        events in proptest::collection::vec((0u8..2, event()), 1..300),
        sizes in proptest::collection::vec(1usize..40, 1..5),
        swaps in proptest::collection::vec(1usize..100, 0..4),
        (v6, with_sack, stamps) in any::<(bool, bool, bool)>(),
        first: u32,
    ) {
        let clock = stamps.then_some(first ^ 5);
        let mut receivers = [0, 1].map(|flow| Receiver::new(flow, v6, first, clock, with_sack));
        let mut packets: Vec<_> = receivers.iter().flat_map(|it| it.packets.clone()).collect();
        for (flow, event) in events {
            let receiver = &mut receivers[usize::from(flow)];
            let before = receiver.packets.len();
            receiver.take(event);
            packets.extend_from_slice(&receiver.packets[before..]);
        }
        // On its way here some have overtaken others, if not the first of their flow.
        for swap in swaps {
            if swap > 1 && swap + 1 < packets.len() {
                packets.swap(swap, swap + 1);
            }
        }
        let flow_of = |packet: &[u8]| packet[if v6 { 41 } else { 21 }];
        for carrier in [Carrier::Outbox, Carrier::Merger] {
            let mut heard = [0, 1].map(|_| (Sender::new(first), Sender::new(first)));
            carry_all(carrier, &packets, &sizes, |batch, carried| {
                if matches!(carrier, Carrier::Outbox) {
                    check_content(batch, carried);
                }
                for packet in batch {
                    heard[usize::from(flow_of(packet))].0.hear(packet);
                }
                for packet in carried {
                    heard[usize::from(flow_of(packet))].1.hear(packet);
                }
                for (all, carried) in &heard {
                    assert_eq!(all, carried, "after a batch");
                }
            });
        }
    }
}
