//! Finds TCP acknowledgements that a newer one makes useless, so that they need not be carried
//! ("ACK filtering", RFC 3449 section 5.2.1).
//!
//! A TCP receiver acknowledges every second segment or so, and each acknowledgement says all that
//! the one before has said. Of several that wait for the same system call the last is enough, and
//! each that is carried costs as much to send or to deliver as a packet of 1,400 bytes.
//!
//! An [`AckTable`] is told of every packet, in the order in which they go on, and answers what each
//! means for those that wait ([`Offer`]). It knows flows from batch to batch.
//!
//! # Rules
//! An acknowledgement is *pure* if it is nothing else: an intact segment without payload, with the
//! flag ACK alone, no urgent pointer, and no options or exactly NOP, NOP and timestamps (as Linux
//! sends them; RFC 7323 appendix A); in front of it no IPv4 options or IPv6 extension headers, and
//! behind it no padding. A pure one *supersedes* another, and takes its place, if
//! * they are of one flow and no other packet of it came between the two,
//! * it acknowledges more,
//! * they have the same TOS or traffic class with its ECN bits, TTL or hop limit, DF, flow label,
//!   options and sequence number, and the clock of their timestamps (TSval) does not go back, and
//! * the one that waits acknowledges more than all packets of the flow before it, and
//! * the flow's receiver has not reported a loss by SACK (RFC 2018) within the last [`LOSS_REST`] bytes.
//!
//! The window may differ: the newer one's counts.
//!
//! So all that a sender counts or heeds is carried. Duplicates tell of losses, and acknowledge
//! nothing new (RFC 5681 section 2); nor does an update of the window. SACK and the counters of
//! accurate ECN are options, and ECN's echo is a flag: what has them is not pure.
//!
//! The last rule takes the highest number of *all* packets of a flow, since a pure acknowledgement
//! that repeats the number of data is a duplicate. Where this number is not known, the next
//! acknowledgement is carried, whatever it says. So it is at the beginning of a flow, after a SYN
//! or RST, when another flow has taken the slot, and when a packet has passed that may be of
//! any TCP flow (a fragment). The rule is as good as what the table sees: of a flow that moves from
//! one table to another and back a duplicate may look new, and may be replaced.
//!
//! Fewer acknowledgements make a sender burstier and give it fewer samples of the round trip. One
//! that counts them, instead of the bytes that they acknowledge (RFC 3465), opens its congestion
//! window more slowly; Linux counts bytes. Where losses keep the window small, an acknowledgement of
//! all that is in flight makes the ends take turns instead of working at once: without the last rule
//! a stream of Linux' CUBIC that lost one packet of 200 was slower by a third.
//!
//! # Cost
//! `cargo bench -p muslin-encap`, all in the cache, on a shared core that copies 64 KiB in 1.6 us: 47
//! ns for an acknowledgement, of which 32 verify its checksums; 19 ns for data of a known flow and
//! 14 ns for other data, of which 6 find the headers. A [`crate::offload::merge::Merger`] has found
//! them already.
//!
//! ```
//! use muslin_encap::offload::acknowledgement::{AckTable, Offer};
//! # use muslin_encap::{IpProtocol, ip::{checksum, transport::Transport, v4}};
//!
//! // A TCP segment over IPv4 that acknowledges all bytes before this one.
//! fn acknowledgement(number: u8) -> Vec<u8> {
//!     // ...
//! #   let header = v4::Header {
//! #       dscp: 0,
//! #       total_len: 40,
//! #       ident: 1,
//! #       dont_fragment: true,
//! #       ttl: v4::DEFAULT_TTL,
//! #       protocol: IpProtocol::Tcp,
//! #       source: [10, 244, 1, 2].into(),
//! #       destination: [10, 244, 2, 3].into(),
//! #   };
//! #   let mut packet = header.to_bytes().to_vec();
//! #   packet.extend([0x80, 0, 0, 80, 0, 0, 0, 0, 0, 0, 0, number, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
//! #   let at = Transport::parse(&packet, 0).expect("it is TCP");
//! #   let pseudo = at.pseudo_header(&packet, 20);
//! #   packet[36..38].copy_from_slice(&pseudo.to_be_bytes());
//! #   checksum::complete(&mut packet, at.l4, at.protocol.checksum_offset());
//! #   packet
//! }
//!
//! let mut table = AckTable::new();
//! let mut waiting = Vec::new();
//! for number in [10, 20, 30, 30] {
//!     let packet = acknowledgement(number);
//!     match table.offer(&packet, 0, (), waiting.len()) {
//!         Offer::Replaces(place) => waiting[place] = packet,
//!         Offer::Waits | Offer::Other => waiting.push(packet),
//!     }
//! }
//! // The first of a flow is carried, since it may be a duplicate, and so is the duplicate.
//! assert_eq!(waiting, [10, 30, 30].map(acknowledgement));
//! waiting.clear();
//! table.end_batch();
//! ```

use smoltcp::wire::IpVersion;

use crate::bytes::be32;
use crate::ip::transport::{Error, Protocol, TCP_HEADER_LEN, Transport, tcp, tcp_option_at};
use crate::ip::{v4, v6};

/// The flows that a table has room for. Each has one slot by its hash, which it shares with others.
pub const SLOTS: usize = 64;
const _: () = assert!(SLOTS.is_power_of_two());

/// Bytes that a flow has to acknowledge after its receiver has reported a loss before one of its
/// acknowledgements may be replaced again. One loss in so much leaves windows of some hundred kilobytes.
pub const LOSS_REST: u32 = 32 << 20;

/// A TCP header's options as Linux sends timestamps: NOP, NOP, kind, length (RFC 7323 appendix A).
const TIMESTAMPS: [u8; 4] = [1, 1, 8, 10];
/// Bytes of a TCP header with timestamps.
const TIMESTAMPED_LEN: usize = TCP_HEADER_LEN + 12;

/// The two ends of a TCP connection, and which of them sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Connection {
    ports: u32,
    version: IpVersion,
    /// Source and destination; of IPv4 in the first word.
    addresses: [u64; 4],
}

impl Connection {
    fn of(packet: &[u8], at: &Transport) -> Self {
        let word = |offset: usize| {
            let word = packet[at.l3 + offset..].first_chunk();
            word.copied().map_or(0, u64::from_be_bytes)
        };
        let addresses = match at.version {
            IpVersion::Ipv4 => [word(v4::field::SOURCE), 0, 0, 0],
            IpVersion::Ipv6 => [0, 8, 16, 24].map(|offset| word(v6::field::ADDRESSES + offset)),
        };
        Self {
            ports: be32(packet, at.l4),
            version: at.version,
            addresses,
        }
    }

    /// The slot by a multiplicative hash. Who makes flows collide keeps their acknowledgements.
    fn slot(&self) -> usize {
        let ports = u64::from(self.ports);
        let folded = self.addresses.iter();
        let folded = folded.fold(ports, |hash, word| hash.rotate_left(23) ^ word);
        // 2^64 divided by the golden ratio: the high bits depend on all others.
        let hash = folded.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> (u64::BITS - SLOTS.ilog2())) as usize
    }
}

/// What a TCP acknowledgement that is nothing else says, beside the ends of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PureAck {
    /// TOS, DF and TTL; or traffic class, flow label and hop limit.
    network: [u8; 5],
    sequence: u32,
    number: u32,
    /// The sender's clock (TSval), if there are timestamps.
    clock: Option<u32>,
}

impl PureAck {
    /// `None` if the packet is anything but an intact TCP segment without payload, with the flag ACK
    /// alone, no urgent pointer, and no options or exactly NOP, NOP and timestamps; or if it has IPv4
    /// options or IPv6 extension headers, or bytes behind it.
    fn of(packet: &[u8], at: &Transport) -> Option<Self> {
        // Most packets have payload.
        if at.payload_len() != 0 || at.protocol != Protocol::Tcp || at.end != packet.len() {
            return None;
        }
        let (network, segment) = (&packet[at.l3..at.l4], &packet[at.l4..at.payload]);
        let clock = match segment.len() {
            TCP_HEADER_LEN => None,
            TIMESTAMPED_LEN if segment[TCP_HEADER_LEN..].starts_with(&TIMESTAMPS) => {
                Some(be32(segment, TCP_HEADER_LEN + TIMESTAMPS.len()))
            }
            _ => return None,
        };
        // Beside the data offset are reserved bits and a flag (AE, RFC 9768).
        let only_acknowledges = segment[tcp::FLAGS] == tcp::ACK
            && segment[tcp::DATA_OFFSET] & 0x0f == 0
            && segment[tcp::URGENT..TCP_HEADER_LEN] == [0, 0];
        if !only_acknowledges || !at.is_intact(packet) {
            return None;
        }
        let network = match at.version {
            IpVersion::Ipv4 if v4::is_plain(network) => {
                use v4::field::{FRAGMENT, TOS, TTL};
                [network[TOS], network[FRAGMENT], network[TTL], 0, 0]
            }
            IpVersion::Ipv6 if network.len() == v6::HEADER_LEN => {
                let [class, and, flow, label, ..] = *network.first_chunk::<4>()?;
                [class, and, flow, label, network[v6::field::HOP_LIMIT]]
            }
            _ => return None,
        };
        Some(Self {
            network,
            sequence: be32(segment, tcp::SEQUENCE),
            number: be32(segment, tcp::ACK_NUMBER),
            clock,
        })
    }

    /// Whether this one acknowledges more than another of its connection and else says the same.
    fn supersedes(&self, older: &Self) -> bool {
        let clock_goes_on = match (self.clock, older.clock) {
            (Some(new), Some(old)) => new == old || is_ahead(new, old),
            (None, None) => true,
            _ => false,
        };
        clock_goes_on
            && is_ahead(self.number, older.number)
            && self.sequence == older.sequence
            && self.network == older.network
    }
}

/// Whether a number is ahead of another by less than half of all numbers (RFC 9293 section 3.4).
const fn is_ahead(new: u32, old: u32) -> bool {
    new.wrapping_sub(old) as i32 > 0
}

/// Whether a TCP header, which is whole, has the option SACK (RFC 2018 section 3).
fn has_sack(header: &[u8]) -> bool {
    let mut at = TCP_HEADER_LEN;
    while header.get(at) != Some(&tcp::option::SACK) {
        let Some((_, len)) = tcp_option_at(header, at) else {
            return false;
        };
        at += len;
    }
    true
}

/// What a packet means for those that wait to be carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// It is no pure acknowledgement.
    Other,
    /// It is one, which a later packet may replace in its place.
    Waits,
    /// It is one, and the packet that waits in this place is useless: this one is to take the place,
    /// where a later packet may replace it.
    Replaces(usize),
}

/// The last packet of a flow, which is a pure acknowledgement.
#[derive(Debug, Clone, Copy)]
struct Last {
    ack: PureAck,
    /// Whether it acknowledges more than all before it.
    advances: bool,
    place: usize,
}

/// What is known of a flow.
#[derive(Debug, Clone, Copy)]
struct Flow<K> {
    key: K,
    connection: Connection,
    /// The highest acknowledgement number that has passed.
    highest: u32,
    last: Option<Last>,
    /// All acknowledgements up to this number are carried, since there was a loss.
    spared_until: Option<u32>,
    /// The number of the batch in which the last packet passed.
    batch: u64,
}

impl<K> Flow<K> {
    /// Takes an acknowledgement number, and returns whether it is higher than all before it.
    fn advance(&mut self, number: u32) -> bool {
        let advances = is_ahead(number, self.highest);
        if advances {
            self.highest = number;
        }
        advances
    }

    /// Whether a loss was reported so lately that an acknowledgement of this number is to be carried.
    fn is_spared(&mut self, number: u32) -> bool {
        self.spared_until = self.spared_until.filter(|until| is_ahead(*until, number));
        self.spared_until.is_some()
    }
}

/// The flows whose pure acknowledgements passed lately. Besides addresses and ports, the key tells
/// flows apart (a peer, a port of the switch).
#[derive(Debug, Clone)]
pub struct AckTable<K> {
    flows: [Option<Flow<K>>; SLOTS],
    /// The number of this batch.
    batch: u64,
    /// Flows that passed in an earlier batch only are forgotten.
    first_known: u64,
}

impl<K: Copy + Eq> Default for AckTable<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Copy + Eq> AckTable<K> {
    /// A table that knows no flow.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            flows: [None; SLOTS],
            batch: 0,
            first_known: 0,
        }
    }

    /// Takes the next packet, whose IP header (if it has one) is at `l3`, and which is to wait in
    /// `place` of the batch unless it replaces another one. Every packet that may be of a flow in the
    /// table must be offered, in the order in which they go on.
    #[must_use]
    pub fn offer(&mut self, packet: &[u8], l3: usize, key: K, place: usize) -> Offer {
        self.offer_parsed(packet, l3, &Transport::parse(packet, l3), key, place)
    }

    /// As [`Self::offer`], for a packet whose headers have been looked for.
    pub(super) fn offer_parsed(
        &mut self,
        packet: &[u8],
        l3: usize,
        parsed: &Result<Transport, Error>,
        key: K,
        place: usize,
    ) -> Offer {
        match parsed {
            Ok(at) if at.protocol == Protocol::Tcp => match PureAck::of(packet, at) {
                Some(ack) => {
                    let connection = Connection::of(packet, at);
                    return self.offer_ack(connection, ack, key, place);
                }
                None => self.pass(packet, at, key),
            },
            Err(reason) if reason.may_hide_flow() && may_be_tcp(packet, l3) => self.forget(),
            Ok(_) | Err(_) => {}
        }
        Offer::Other
    }

    /// Forgets all flows, since something has passed that the table was not told of. No packet waits
    /// any more.
    pub fn forget(&mut self) {
        self.end_batch();
        self.first_known = self.batch;
    }

    /// Ends the batch: no packet waits any more, and places are those of the next one.
    pub fn end_batch(&mut self) {
        self.batch += 1;
    }

    fn offer_ack(&mut self, connection: Connection, ack: PureAck, key: K, place: usize) -> Offer {
        let batch = self.batch;
        let slot = connection.slot();
        let Some(flow) = self.known(slot, key, &connection) else {
            self.flows[slot] = Some(Flow {
                key,
                connection,
                highest: ack.number,
                last: Some(Last {
                    ack,
                    advances: false,
                    place,
                }),
                spared_until: None,
                batch,
            });
            return Offer::Waits;
        };
        let may_replace = !flow.is_spared(ack.number) && flow.batch == batch;
        let waiting = flow
            .last
            .filter(|last| may_replace && last.advances && ack.supersedes(&last.ack));
        flow.last = Some(Last {
            ack,
            advances: flow.advance(ack.number),
            place: waiting.map_or(place, |waiting| waiting.place),
        });
        flow.batch = batch;
        waiting.map_or(Offer::Waits, |waiting| Offer::Replaces(waiting.place))
    }

    /// Takes a segment that is no pure acknowledgement.
    fn pass(&mut self, packet: &[u8], at: &Transport, key: K) {
        let batch = self.batch;
        let connection = Connection::of(packet, at);
        let slot = connection.slot();
        let Some(flow) = self.known(slot, key, &connection) else {
            return;
        };
        let segment = &packet[at.l4..at.payload];
        if segment[tcp::FLAGS] & (tcp::SYN | tcp::RST | tcp::ACK) != tcp::ACK {
            // The number of another connection, or of none.
            self.flows[slot] = None;
            return;
        }
        // Its checksum is not verified: a number that is too high only keeps what could be replaced.
        flow.advance(be32(segment, tcp::ACK_NUMBER));
        if at.payload_len() == 0 && segment[tcp::FLAGS] == tcp::ACK && has_sack(segment) {
            flow.spared_until = Some(flow.highest.wrapping_add(LOSS_REST));
        }
        flow.last = None;
        flow.batch = batch;
    }

    /// What is known of a flow in its slot.
    fn known(&mut self, slot: usize, key: K, connection: &Connection) -> Option<&mut Flow<K>> {
        let first = self.first_known;
        self.flows[slot]
            .as_mut()
            .filter(|flow| flow.connection == *connection && flow.key == key && flow.batch >= first)
    }
}

/// Whether a packet whose headers could not be read may be TCP. Datagrams are often fragments.
fn may_be_tcp(packet: &[u8], l3: usize) -> bool {
    match packet.get(l3..) {
        Some(ip) if ip.len() >= v4::HEADER_LEN && ip[0] >> 4 == 4 => {
            ip[v4::field::PROTOCOL] == Protocol::Tcp.number()
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::finish;

    const V4: usize = v4::HEADER_LEN;
    const V6: usize = v6::HEADER_LEN;

    /// A pure acknowledgement between two ports.
    fn ack_of(version: IpVersion, timestamps: bool, port: u16, number: u32) -> Vec<u8> {
        let mut packet = match version {
            IpVersion::Ipv4 => {
                let mut header = vec![0x45, 2, 0, 0, 1, 7, 0x40, 0, 63, 6, 0, 0];
                header.extend([10, 244, 1, 2, 10, 244, 2, 3]);
                header
            }
            IpVersion::Ipv6 => {
                let mut header = vec![0x60, 0x21, 0x23, 0x45, 0, 0, 6, 63];
                header.extend([0xfd; 32]);
                header
            }
        };
        packet.extend(port.to_be_bytes());
        packet.extend([0x1f, 0x90, 9, 8, 7, 6]);
        packet.extend(number.to_be_bytes());
        let words = if timestamps { 8 } else { 5 };
        packet.extend([words << 4, 0x10, 1, 2, 0, 0, 0, 0]);
        if timestamps {
            packet.extend([1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
        }
        finish(&mut packet, 0);
        packet
    }

    fn ack(number: u32) -> Vec<u8> {
        ack_of(IpVersion::Ipv4, true, 0x8000, number)
    }

    fn pure(packet: &[u8]) -> Option<PureAck> {
        PureAck::of(packet, &Transport::parse(packet, 0).ok()?)
    }

    fn changed(mut packet: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        change(&mut packet);
        finish(&mut packet, 0);
        packet
    }

    /// Both versions, with and without timestamps, and the length of their IP header.
    fn forms() -> impl Iterator<Item = (IpVersion, bool, usize)> {
        let versions = [(IpVersion::Ipv4, V4), (IpVersion::Ipv6, V6)];
        versions
            .into_iter()
            .flat_map(|(version, l4)| [false, true].map(|timestamps| (version, timestamps, l4)))
    }

    #[test]
    fn what_is_pure() {
        type Change = fn(&mut Vec<u8>, usize);
        let changes: [(&str, Change); 12] = [
            ("payload", |packet, _| packet.push(7)),
            ("FIN", |packet, l4| packet[l4 + tcp::FLAGS] |= tcp::FIN),
            ("SYN", |packet, l4| packet[l4 + tcp::FLAGS] |= tcp::SYN),
            ("RST", |packet, l4| packet[l4 + tcp::FLAGS] |= tcp::RST),
            ("PSH", |packet, l4| packet[l4 + tcp::FLAGS] |= tcp::PSH),
            ("URG", |packet, l4| packet[l4 + tcp::FLAGS] |= tcp::URG),
            ("ECE", |packet, l4| packet[l4 + tcp::FLAGS] |= 0x40),
            ("CWR", |packet, l4| packet[l4 + tcp::FLAGS] |= tcp::CWR),
            ("no ACK", |packet, l4| packet[l4 + tcp::FLAGS] = 0),
            ("AE", |packet, l4| packet[l4 + tcp::DATA_OFFSET] |= 1),
            ("reserved", |packet, l4| packet[l4 + tcp::DATA_OFFSET] |= 8),
            ("urgent", |packet, l4| packet[l4 + tcp::URGENT + 1] = 1),
        ];
        for (version, timestamps, l4) in forms() {
            let good = ack_of(version, timestamps, 1, 2);
            assert!(pure(&good).is_some());
            for (name, change) in changes {
                let packet = changed(good.clone(), |packet| change(packet, l4));
                assert!(Transport::parse(&packet, 0).is_ok(), "{name}");
                assert_eq!(pure(&packet), None, "{name}");
            }
            for damaged in [l4 + tcp::WINDOW, l4 + tcp::CHECKSUM] {
                let mut packet = good.clone();
                packet[damaged] ^= 0x10;
                assert_eq!(pure(&packet), None, "byte {damaged}");
            }
            let padded = [&good[..], &[0; 6]].concat();
            assert_eq!(pure(&padded), None, "padding");
        }
    }

    #[test]
    fn which_options_are_timestamps() {
        let with = |options: &[u8]| {
            let packet = changed(ack_of(IpVersion::Ipv4, false, 1, 2), |packet| {
                packet[V4 + tcp::DATA_OFFSET] = ((5 + options.len() / 4) as u8) << 4;
                packet.extend(options);
            });
            assert!(Transport::parse(&packet, 0).is_ok());
            pure(&packet).map(|ack| ack.clock)
        };
        assert_eq!(with(&[]), Some(None));
        let clock = 0x0102_0304;
        assert_eq!(
            with(&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]),
            Some(Some(clock))
        );
        assert_eq!(
            with(&[8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1]),
            None,
            "another place"
        );
        assert_eq!(with(&[1, 1, 5, 10, 1, 2, 3, 4, 5, 6, 7, 8]), None, "SACK");
        assert_eq!(with(&[1, 1, 1, 1]), None, "no option");
        let sack = [
            1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 5, 10, 0, 0, 0, 5, 0, 0, 0, 6,
        ];
        assert_eq!(with(&sack), None, "SACK behind timestamps");
        let ecn = [
            1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 172, 5, 0, 0, 1, 1, 1, 1,
        ];
        assert_eq!(with(&ecn), None, "accurate ECN behind timestamps");
    }

    #[test]
    fn after_a_loss_all_are_carried() {
        let sack = |number: u32| {
            changed(ack(number), |packet| {
                packet[V4 + tcp::DATA_OFFSET] = 11 << 4;
                let block = number.wrapping_add(20).to_be_bytes();
                packet.extend([&[1, 1, 5, 10][..], &block, &block].concat());
            })
        };
        for base in [0, u32::MAX - 100] {
            let mut table = AckTable::new();
            let mut offer = |packet: Vec<u8>| table.offer(&packet, 0, (), 0);
            let number = |ahead: u32| base.wrapping_add(ahead);
            assert_eq!(offer(ack(number(0))), Offer::Waits);
            assert_eq!(offer(ack(number(10))), Offer::Waits);
            assert_eq!(offer(ack(number(20))), Offer::Replaces(0));
            assert_eq!(offer(sack(number(20))), Offer::Other);
            for ahead in [30, 40, LOSS_REST + 10, LOSS_REST + 19] {
                assert_eq!(offer(ack(number(ahead))), Offer::Waits, "{ahead}");
            }
            assert_eq!(offer(ack(number(LOSS_REST + 20))), Offer::Replaces(0));
            // It has been so long that the numbers have come round.
            assert_eq!(offer(ack(number(1 << 31))), Offer::Replaces(0));
            assert_eq!(offer(ack(number(u32::MAX - 5))), Offer::Replaces(0));
            assert_eq!(offer(ack(number(15))), Offer::Replaces(0));
        }
    }

    #[test]
    fn which_headers_have_sack() {
        for (options, expected) in [
            (&[][..], false),
            (&[1, 1, 5, 10, 0, 0, 0, 5, 0, 0, 0, 6], true),
            (&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 5, 2], true),
            (&[8, 10, 5, 5, 5, 5, 5, 5, 5, 5, 1, 1], false),
            (&[0, 5, 5, 5], false),
            (&[7, 0, 5, 2], false),
            (&[7, 1, 5, 2], false),
            (&[7, 40, 5, 2], false),
            (&[1, 1, 1, 7], false),
        ] {
            let header = [&[0; TCP_HEADER_LEN], options].concat();
            assert_eq!(has_sack(&header), expected, "{options:?}");
        }
    }

    #[test]
    fn network_headers_of_pure_ones() {
        let good = ack(2);
        for (name, at, value) in [
            ("a fragment", v4::field::FRAGMENT, 0x20),
            ("a later fragment", v4::field::FRAGMENT + 1, 1),
            ("UDP", v4::field::PROTOCOL, 17),
        ] {
            let packet = changed(good.clone(), |packet| packet[at] = value);
            assert_eq!(pure(&packet), None, "{name}");
        }
        let mut damaged = good.clone();
        damaged[v4::field::IDENT] ^= 1;
        assert_eq!(pure(&damaged), None, "the header's checksum");
        let mut options = good.clone();
        options.splice(V4..V4, [1; 4]);
        options[0] = 0x46;
        finish(&mut options, 0);
        v4::fill_checksum(&mut options[..V4 + 4]);
        assert!(Transport::parse(&options, 0).is_ok_and(|at| at.is_intact(&options)));
        assert_eq!(pure(&options), None, "IPv4 options");
        let mut extended = ack_of(IpVersion::Ipv6, true, 1, 2);
        extended.splice(V6..V6, [6, 0, 1, 4, 0, 0, 0, 0]);
        extended[v6::field::NEXT_HEADER] = v6::OPTIONS;
        finish(&mut extended, 0);
        assert!(Transport::parse(&extended, 0).is_ok_and(|at| at.is_intact(&extended)));
        assert_eq!(pure(&extended), None, "extension headers");
    }

    #[test]
    fn an_unfinished_checksum_is_as_good_as_a_right_one() {
        let mut packet = ack(2);
        let at = Transport::parse(&packet, 0).unwrap();
        let pseudo = at.pseudo_header(&packet, at.end - at.l4);
        crate::bytes::put16(&mut packet, at.checksum_offset(), pseudo);
        assert_eq!(pure(&packet), pure(&ack(2)));
    }

    #[test]
    fn what_must_be_equal() {
        let both: &[(&str, usize, bool)] = &[
            ("source port", 1, false),
            ("destination port", 3, false),
            ("sequence", tcp::SEQUENCE + 3, false),
            ("window", tcp::WINDOW, true),
        ];
        let network_v4: &[(&str, usize, bool)] = &[
            ("DSCP and ECN", v4::field::TOS, false),
            ("identification", v4::field::IDENT + 1, true),
            ("TTL", v4::field::TTL, false),
            ("source", v4::field::SOURCE + 3, false),
            ("destination", v4::field::DESTINATION + 3, false),
        ];
        let network_v6: &[(&str, usize, bool)] = &[
            ("DSCP", 0, false),
            ("ECN", 1, false),
            ("flow label", 1, false),
            ("flow label", 3, false),
            ("hop limit", v6::field::HOP_LIMIT, false),
            ("source", v6::field::ADDRESSES + 15, false),
            ("destination", V6 - 1, false),
        ];
        for (version, timestamps, l4) in forms() {
            let older = ack_of(version, timestamps, 1, 10);
            let newer = ack_of(version, timestamps, 1, 11);
            let network = if l4 == V4 { network_v4 } else { network_v6 };
            let fields = network.iter().map(|&(name, at, may)| (name, at, may));
            let fields = fields.chain(both.iter().map(|&(name, at, may)| (name, l4 + at, may)));
            assert!(replaces(&newer, &older));
            for (name, at, may_differ) in fields {
                for bit in [0x01, 0x02, 0x04, 0x08] {
                    let newer = changed(newer.clone(), |packet| packet[at] ^= bit);
                    assert!(pure(&newer).is_some(), "{name}");
                    assert_eq!(replaces(&newer, &older), may_differ, "{name}, {bit:#x}");
                }
            }
            let other = ack_of(version, !timestamps, 1, 11);
            assert!(!replaces(&other, &older), "options");
        }
        let newer = changed(ack(11), |packet| packet[v4::field::FRAGMENT] = 0);
        assert!(!replaces(&newer, &ack(10)), "DF");
    }

    /// Whether one replaces another, which acknowledges more than is known of its flow.
    fn replaces(newer: &[u8], older: &[u8]) -> bool {
        let at = Transport::parse(older, 0).unwrap();
        let before = changed(older.to_vec(), |packet| {
            packet[at.l4 + tcp::ACK_NUMBER + 3] -= 1
        });
        let mut table = AckTable::new();
        assert_eq!(table.offer(&before, 0, (), 7), Offer::Waits);
        assert_eq!(table.offer(older, 0, (), 8), Offer::Waits);
        table.offer(newer, 0, (), 9) == Offer::Replaces(8)
    }

    #[test]
    fn numbers_go_on_and_clocks_do_not_go_back() {
        let parse = |number: u32, clock: u32| {
            let packet = changed(ack(number), |packet| {
                packet[V4 + 24..V4 + 28].copy_from_slice(&clock.to_be_bytes());
            });
            pure(&packet).unwrap()
        };
        for base in [0, 1, 1 << 31, u32::MAX] {
            for (ahead, clock, expected) in [
                (0, 0, false),
                (1, 0, true),
                (i32::MAX, 0, true),
                (i32::MIN, 0, false),
                (-1, 0, false),
                (1, 1, true),
                (1, i32::MAX, true),
                (1, i32::MIN, false),
                (1, -1, false),
                (0, 1, false),
            ] {
                let older = parse(base, base);
                let newer = parse(
                    base.wrapping_add_signed(ahead),
                    base.wrapping_add_signed(clock),
                );
                assert_eq!(newer.supersedes(&older), expected, "{ahead}, {clock}");
            }
        }
    }

    /// A batch's packets, and which of them wait at its end.
    fn left(table: &mut AckTable<()>, packets: &[Vec<u8>]) -> Vec<usize> {
        let (mut places, mut left) = (Vec::new(), Vec::new());
        for (index, packet) in packets.iter().enumerate() {
            match table.offer(packet, 0, (), places.len()) {
                Offer::Replaces(place) => left[place] = index,
                Offer::Waits | Offer::Other => {
                    places.push(index);
                    left.push(index);
                }
            }
        }
        table.end_batch();
        left
    }

    /// Which of a flow's packets are carried in one batch, if it is known that 10 was acknowledged.
    fn left_of(packets: &[Vec<u8>]) -> Vec<usize> {
        let mut table = AckTable::new();
        assert_eq!(left(&mut table, &[ack(10)]), [0]);
        left(&mut table, packets)
    }

    #[test]
    fn the_last_of_those_that_advance_is_carried() {
        assert_eq!(left_of(&[20, 30, 40].map(ack)), [2]);
        let mut table = AckTable::new();
        let numbers = [u32::MAX - 10, u32::MAX, 5, 10];
        assert_eq!(
            left(&mut table, &numbers.map(ack)),
            [0, 3],
            "the first is not known"
        );
        assert_eq!(left(&mut table, &[15, 20].map(ack)), [1]);
        assert_eq!(left(&mut table, &[25].map(ack)), [0], "the batch is over");
        assert_eq!(left(&mut table, &[30].map(ack)), [0]);
    }

    #[test]
    fn duplicates_are_carried() {
        assert_eq!(left_of(&[10, 20].map(ack)), [0, 1], "of an earlier batch");
        assert_eq!(left_of(&[20, 20, 20, 30, 40].map(ack)), [0, 1, 2, 4]);
        // Those that come late are none, but what follows may be.
        assert_eq!(left_of(&[30, 20, 30, 40].map(ack)), [0, 1, 2, 3]);
        assert_eq!(left_of(&[30, 20, 25, 30, 40].map(ack)), [0, 1, 2, 3, 4]);
        let opened = changed(ack(20), |packet| packet[V4 + tcp::WINDOW] += 1);
        assert_eq!(left_of(&[ack(20), opened, ack(30)]), [0, 1, 2], "a window");
    }

    #[test]
    fn other_packets_of_the_flow_stand_between() {
        let data = |number| changed(ack(number), |packet| packet.push(7));
        let fin = |number| changed(ack(number), |packet| packet[V4 + tcp::FLAGS] |= tcp::FIN);
        for other in [data, fin] {
            assert_eq!(left_of(&[ack(20), other(20), ack(30), ack(40)]), [0, 1, 3]);
            assert_eq!(
                left_of(&[other(20), ack(20), ack(30)]),
                [0, 1, 2],
                "a duplicate"
            );
            assert_eq!(left_of(&[other(20), ack(25), ack(30)]), [0, 2]);
        }
        let damaged = [&ack(25)[..V4 + tcp::WINDOW], &ack(20)[V4 + tcp::WINDOW..]].concat();
        assert_eq!(left_of(&[ack(20), damaged, ack(30)]), [0, 1, 2]);
    }

    #[test]
    fn another_connection_of_the_same_ends_is_not_known() {
        for flags in [
            tcp::SYN,
            tcp::SYN | tcp::ACK,
            tcp::RST,
            tcp::RST | tcp::ACK,
            0,
        ] {
            let other = changed(ack(15), |packet| packet[V4 + tcp::FLAGS] = flags);
            assert_eq!(left_of(&[other, ack(20), ack(30), ack(40)]), [0, 1, 3]);
        }
    }

    #[test]
    fn what_may_be_of_any_flow_stands_between_all() {
        let fragment = changed(ack(15), |packet| packet[v4::field::FRAGMENT] = 0x20);
        assert_eq!(
            left_of(&[ack(20), fragment.clone(), ack(30), ack(40)]),
            [0, 1, 2, 3]
        );
        let next = left_of(&[fragment.clone(), ack(20), ack(30), ack(40)]);
        assert_eq!(next, [0, 1, 3], "its number is not known");
        let datagram = changed(fragment, |packet| packet[v4::field::PROTOCOL] = 17);
        let mut other = ack(20);
        other[0] = 0x50;
        for none in [datagram, other] {
            assert_eq!(left_of(&[ack(20), none, ack(30)]), [2, 1]);
        }
        let mut v6 = ack_of(IpVersion::Ipv6, true, 1, 2);
        v6[v6::field::NEXT_HEADER] = v6::FRAGMENT;
        assert_eq!(left_of(&[ack(20), v6, ack(30)]), [0, 1, 2]);
        assert_eq!(left_of(&[ack(20), vec![0x45; 10], ack(30)]), [0, 1, 2]);
    }

    #[test]
    fn flows_and_keys_do_not_meet() {
        let other = |number| ack_of(IpVersion::Ipv4, true, 0x8001, number);
        assert_ne!(slot_of(0x8000), slot_of(0x8001));
        assert_eq!(
            left_of(&[ack(20), other(15), ack(30), other(25), other(35)]),
            [2, 1, 4]
        );
        let mut table = AckTable::new();
        for (key, number, expected) in [
            (1, 10, Offer::Waits),
            (2, 20, Offer::Waits),
            (2, 30, Offer::Waits),
            (2, 40, Offer::Replaces(30)),
            (1, 50, Offer::Waits),
        ] {
            assert_eq!(table.offer(&ack(number), 0, key, number as usize), expected);
        }
    }

    fn slot_of(port: u16) -> usize {
        let packet = ack_of(IpVersion::Ipv4, true, port, 1);
        Connection::of(&packet, &Transport::parse(&packet, 0).unwrap()).slot()
    }

    #[test]
    fn flows_of_one_slot_keep_what_they_send() {
        let mine = slot_of(0x8000);
        let port = (0..=u16::MAX).find(|port| *port != 0x8000 && slot_of(*port) == mine);
        let other = |number| ack_of(IpVersion::Ipv4, true, port.unwrap(), number);
        assert_eq!(
            left_of(&[ack(20), other(5), ack(30), ack(40)]),
            [0, 1, 2, 3]
        );
        let data = changed(other(5), |packet| packet.push(7));
        assert_eq!(
            left_of(&[ack(20), data, ack(30)]),
            [2, 1],
            "it needs no slot"
        );
        // Ports alone spread over the slots.
        let slots: std::collections::BTreeSet<_> = (0x8000..0x8100).map(slot_of).collect();
        assert!(slots.len() > SLOTS * 3 / 4, "{}", slots.len());
    }
}
