//! Merges segments that follow each other into superpackets: the reverse of
//! [`crate::offload::split`], by the rules of Linux' GRO.
//!
//! Writing a frame into a pod costs the kernel about the same for 1,400 bytes as for 64 KiB, so the
//! segments of a batch are merged first. The first one stays where it is, and its headers become
//! those of the merged packet; of the others only the payload is referred to ([`Merged`]). The
//! caller writes virtio-net header, first packet and payloads with one `writev`.
//!
//! A batch is whatever was read before anything is sent: a train received with UDP_GRO and cut into
//! its datagrams, many single datagrams, or both. Datagrams of a kernel peer arrive one by one
//! (their outer checksum is zero, so UDP_GRO leaves them alone), which is why merging goes on
//! beyond the end of a train. Up to [`FLOWS`] flows are open at once, and no packet waits longer
//! than its batch.
//!
//! The order within a flow is kept: a flow has at most one open packet, and a segment that cannot
//! join it closes it first; a packet whose flow is unknown (a fragment) closes all. Flows may
//! overtake each other. The checksum of a segment is verified before it is merged, since the
//! partial checksum of the merged packet vouches for all of it. Packets that stay single cost no
//! pass over their payload.
//!
//! ```
//! use muslin_encap::ip::{transport::Transport, v4};
//! use muslin_encap::mtu::Mtu;
//! use muslin_encap::offload::merge::{Merged, Merger, MergeSettings};
//! # use muslin_encap::ip::checksum;
//! # use muslin_encap::IpProtocol;
//!
//! // A TCP segment over IPv4 with 100 bytes of payload.
//! fn segment(sequence: u8) -> Vec<u8> {
//!     // ...
//! #   let header = v4::Header {
//! #       dscp: 0,
//! #       total_len: 140,
//! #       ident: 1,
//! #       dont_fragment: true,
//! #       ttl: v4::DEFAULT_TTL,
//! #       protocol: IpProtocol::Tcp,
//! #       source: [10, 244, 1, 2].into(),
//! #       destination: [10, 244, 2, 3].into(),
//! #   };
//! #   let mut packet = header.to_bytes().to_vec();
//! #   packet.extend([0x80, 0, 0, 80, 0, 0, 0, sequence, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
//! #   packet.extend([sequence; 100]);
//! #   let at = Transport::parse(&packet, 0).expect("it is TCP");
//! #   let pseudo = at.pseudo_header(&packet, 120);
//! #   packet[36..38].copy_from_slice(&pseudo.to_be_bytes());
//! #   checksum::complete(&mut packet, at.l4, at.protocol.checksum_offset());
//! #   packet
//! }
//!
//! let (mut first, mut second) = (segment(0), segment(100));
//! let mut lens = Vec::new();
//! let mut sink = |merged: Merged<'_, '_, ()>| {
//!     // writev: the virtio-net header, `merged.head`, and each of `merged.tail`.
//!     lens.push((merged.virtio.gso.map(|gso| gso.size), merged.total_len()));
//! };
//! let mut merger = Merger::new(MergeSettings { mtu: Mtu::ETHERNET, mtu_v6: Mtu::ETHERNET, udp: true });
//! merger.push(&mut first, 0, (), &mut sink);
//! merger.push(&mut second, 0, (), &mut sink);
//! merger.flush(&mut sink);
//! assert_eq!(lens, [(Some(100), 240)]);
//! ```
//!
//! # Rules
//! These must be equal: the bytes in front of the IP header, addresses, ports, TOS or traffic
//! class, TTL or hop limit, DF, flow label, extension headers, and of TCP the acknowledgement
//! number, window, urgent pointer, flags and all options (so timestamps). IPv4 packets must have no
//! options and a right header checksum, and identifications that count up or, with DF, stay the
//! same. Sequence numbers must follow. PSH and FIN end a merged packet, which takes them from its
//! last segment. Segments with SYN, RST or URG, without ACK or without payload stay single, and so
//! do those with CWR, as since Linux 6.15: with accurate ECN it is a bit of a counter (RFC 9768),
//! but splitting the superpacket again would treat it by RFC 3168 and clear it in all segments but
//! the first. All segments are as long as the first, except for a shorter last one. UDP, where it
//! is merged, follows the same rules and must have a checksum; the receiver still gets its
//! datagrams.
//!
//! # Acknowledgements
//! With a table of acknowledgements ([`Merger::with_acks`]) a pure acknowledgement waits, too, and
//! one that supersedes it takes its place; [`crate::offload::acknowledgement`] has the rules. The
//! bytes in front of the IP header must be equal.
//!
//! # Cost
//! `cargo bench -p muslin-encap`, 46 segments of 1,398 bytes, all in the cache, as multiples of
//! copying those 64 KiB (1.14 us, a shared EPYC core): splitting 0.4, with complete checksums 1.7,
//! of which the sum is 1.1; merging 2.0 to 2.2, with verified checksums 3.5, so about 50 ns for
//! each segment's headers. A merger costs 0.2 to make, since it clears a table of 8 KiB: a batch of
//! one packet goes through [`header_for_single`]. Packets of more than [`FLOWS`] flows at once cost
//! 55 ns each.

use smoltcp::wire::IpVersion;

use crate::bytes::{be16, be32, put16};
use crate::ip::transport::{Protocol, Transport, tcp, udp};
use crate::ip::v4;
use crate::ip::v6;
use crate::mtu::Mtu;
use crate::offload::acknowledgement::{AckTable, Offer};
use crate::offload::virtio::{Checksum, Gso, GsoKind, Header};

/// The most flows that are open at once; a further one closes the oldest.
pub const FLOWS: usize = 8;
/// The most segments of one merged packet, and so the length of its iovec without the virtio-net
/// header; also `UDP_MAX_SEGMENTS` of kernels before 6.9.
pub const MAX_SEGMENTS: usize = 64;

/// How a merger treats packets.
#[derive(Debug, Clone, Copy)]
pub struct MergeSettings {
    /// The longest IPv4 packet that the receiver takes. A longer TCP packet is a superpacket that a
    /// kernel peer forwarded whole; its segment size is derived from this MTU.
    pub mtu: Mtu,
    /// The same of IPv6.
    pub mtu_v6: Mtu,
    /// Whether the receiver accepts UDP superpackets (Linux 6.2 and later).
    pub udp: bool,
}

impl MergeSettings {
    const fn mtu(&self, version: IpVersion) -> Mtu {
        match version {
            IpVersion::Ipv4 => self.mtu,
            IpVersion::Ipv6 => self.mtu_v6,
        }
    }
}

/// A packet to be written: the virtio-net header, the first packet and, if segments were merged,
/// the payloads of the others.
///
/// If a device refuses it (some kernels around 6.6 do, if the last segment is shorter), its
/// concatenated bytes can be split again by [`crate::offload::split::Split`].
#[derive(Debug)]
pub struct Merged<'s, 'a, K> {
    /// The key given to [`Merger::push`].
    pub key: K,
    /// The header for the device, whose offsets count from the start of `head`
    /// ([`Header::moved`] if that is to change).
    pub virtio: Header,
    /// The first packet, whose headers are those of the merged packet. The bytes in front of its IP
    /// header are still there.
    pub head: &'a mut [u8],
    /// The payloads of the segments after the first.
    pub tail: &'s [&'a [u8]],
}

impl<K> Merged<'_, '_, K> {
    /// The whole packet's length in bytes.
    #[must_use]
    pub fn total_len(&self) -> usize {
        self.head.len() + self.tail.iter().map(|part| part.len()).sum::<usize>()
    }
}

/// How the identifications of a flow's IPv4 packets continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Idents {
    /// There is one packet only.
    Unknown,
    Counting,
    Fixed,
}

/// A packet that others may still join.
#[derive(Debug)]
struct Open<'a, K> {
    key: K,
    /// The ports, which tell most packets of other flows apart without a look at the head.
    ports: u32,
    head: &'a mut [u8],
    at: Transport,
    /// Whether the checksum of the head has been verified.
    verified: bool,
    idents: Idents,
    /// Segments after the head.
    count: usize,
    /// Bytes of payload in all segments: none in an acknowledgement that waits for a newer one.
    payload: usize,
    /// PSH and FIN of the last segment.
    last_flags: u8,
    /// When it was opened.
    since: u64,
}

/// Merges the packets of one batch, which live in the caller's buffers for `'a`. Besides addresses
/// and ports, the key tells flows apart (a peer, a port of the switch).
#[derive(Debug)]
pub struct Merger<'a, K> {
    settings: MergeSettings,
    open: [Option<Open<'a, K>>; FLOWS],
    tails: [[&'a [u8]; MAX_SEGMENTS - 1]; FLOWS],
    acks: Option<&'a mut AckTable<K>>,
    superseded: usize,
    /// The number of packets so far: the time by which flows are old or young.
    clock: u64,
}

impl<'a, K: Copy + Eq> Merger<'a, K> {
    /// A merger without packets.
    #[must_use]
    pub fn new(settings: MergeSettings) -> Self {
        Self {
            settings,
            open: [const { None }; FLOWS],
            tails: [[&[]; MAX_SEGMENTS - 1]; FLOWS],
            acks: None,
            superseded: 0,
            clock: 0,
        }
    }

    /// Lets newer acknowledgements take the place of those that wait. The table is to last from batch
    /// to batch, and is for the packets of such mergers alone.
    #[must_use]
    pub fn with_acks(self, acks: &'a mut AckTable<K>) -> Self {
        let acks = Some(acks);
        Self { acks, ..self }
    }

    /// How many acknowledgements newer ones have replaced: these are not passed on.
    #[must_use]
    pub const fn superseded(&self) -> usize {
        self.superseded
    }

    /// Takes the next packet, whose IP header (if it has one) is at `l3`. Passes to `sink` the
    /// packets that must be written before it, and the packet itself if it stays single.
    pub fn push(
        &mut self,
        packet: &'a mut [u8],
        l3: usize,
        key: K,
        sink: &mut impl FnMut(Merged<'_, 'a, K>),
    ) {
        self.clock += 1;
        let parsed = Transport::parse(packet, l3);
        let offer = self.acks.as_mut().map_or(Offer::Other, |acks| {
            // What waits is the open packet of its flow, wherever that is.
            acks.offer_parsed(packet, l3, &parsed, key, 0)
        });
        let at = match parsed {
            Ok(at) => at,
            Err(reason) => {
                if reason.may_hide_flow() {
                    self.flush(sink);
                }
                return pass_through(self.settings, key, packet, None, sink);
            }
        };
        if at.protocol == Protocol::Udp && !self.settings.udp {
            return pass_through(self.settings, key, packet, Some(at), sink);
        }
        let Some(index) = self.find(key, packet, &at) else {
            return self.begin(key, packet, at, offer, sink);
        };
        let joined = match offer {
            Offer::Replaces(_) => self.replace(index, packet, &at),
            Offer::Waits | Offer::Other => self.join(index, packet, &at),
        };
        match joined {
            Ok(true) => self.emit(index, sink),
            Ok(false) => {}
            Err(returned) => {
                self.emit(index, sink);
                self.begin(key, returned, at, offer, sink);
            }
        }
    }

    /// Passes all open packets on, the oldest first, at the end of the batch.
    pub fn flush(&mut self, sink: &mut impl FnMut(Merged<'_, 'a, K>)) {
        while let Some(index) = self.oldest() {
            self.emit(index, sink);
        }
    }

    /// Passes all open packets on before one that is not to be merged and goes another way. It
    /// counts in its flow: the table of acknowledgements learns of it.
    pub fn make_way(
        &mut self,
        packet: &[u8],
        l3: usize,
        key: K,
        sink: &mut impl FnMut(Merged<'_, 'a, K>),
    ) {
        self.flush(sink);
        if let Some(acks) = &mut self.acks {
            // What the table says waits has been passed on.
            let _ = acks.offer(packet, l3, key, 0);
        }
    }

    fn oldest(&self) -> Option<usize> {
        self.first_by(|open| open.since)
    }

    /// The open packet of the lowest rank.
    fn first_by(&self, rank: impl Fn(&Open<'a, K>) -> u64) -> Option<usize> {
        let ranks = self.open.iter().enumerate();
        ranks
            .filter_map(|(index, open)| Some((rank(open.as_ref()?), index)))
            .min()
            .map(|(_, index)| index)
    }

    /// The place of a packet to be opened: a free one, that of the oldest acknowledgement, or that of
    /// the oldest data, which an acknowledgement does not keep from being merged.
    fn place_for(&self, at: &Transport) -> Option<usize> {
        if let Some(free) = self.open.iter().position(Option::is_none) {
            return Some(free);
        }
        let has_data = |open: &Open<'_, K>| open.payload > 0;
        // One number is compared much faster than two.
        let first = self.first_by(|open| u64::from(has_data(open)) << 63 | open.since)?;
        let gives_way = at.payload_len() > 0 || !self.open[first].as_ref().is_some_and(has_data);
        gives_way.then_some(first)
    }

    /// The open packet of the same flow.
    fn find(&self, key: K, packet: &[u8], at: &Transport) -> Option<usize> {
        let ports = be32(packet, at.l4);
        self.open.iter().position(|open| {
            open.as_ref().is_some_and(|open| {
                open.ports == ports
                    && open.key == key
                    && same_addresses((open.head, &open.at), (packet, at))
            })
        })
    }

    /// Joins a segment to an open packet and returns whether that is complete now; or gives the
    /// segment back.
    fn join(
        &mut self,
        index: usize,
        packet: &'a mut [u8],
        at: &Transport,
    ) -> Result<bool, &'a mut [u8]> {
        let Some(open) = &mut self.open[index] else {
            return Err(packet);
        };
        let Some(idents) = open.may_join(packet, at) else {
            return Err(packet);
        };
        if !open.verify() || !at.is_intact(packet) {
            return Err(packet);
        }
        let Some(place) = self.tails[index].get_mut(open.count) else {
            return Err(packet);
        };
        let packet: &'a [u8] = packet;
        *place = &packet[at.payload..at.end];
        open.count += 1;
        open.payload += at.payload_len();
        open.idents = idents;
        open.last_flags = ending_flags(packet, at);
        let full = open.count == MAX_SEGMENTS - 1;
        Ok(full || open.last_flags != 0 || at.payload_len() < open.at.payload_len())
    }

    /// Puts an acknowledgement in the place of the open one that it supersedes, and returns that
    /// another may do so again; or gives it back if other bytes are in front of it.
    fn replace(
        &mut self,
        index: usize,
        packet: &'a mut [u8],
        at: &Transport,
    ) -> Result<bool, &'a mut [u8]> {
        match &mut self.open[index] {
            Some(open) if open.head[..open.at.l3] == packet[..at.l3] => {
                debug_assert_eq!(open.payload, 0, "data is not replaced");
                open.head = packet;
                open.at = *at;
                self.superseded += 1;
                Ok(false)
            }
            _ => Err(packet),
        }
    }

    /// Opens a packet, or passes it on if no other may join or replace it.
    fn begin(
        &mut self,
        key: K,
        packet: &'a mut [u8],
        at: Transport,
        offer: Offer,
        sink: &mut impl FnMut(Merged<'_, 'a, K>),
    ) {
        let opens = offer != Offer::Other || may_begin(packet, &at);
        let fits = at.end - at.l3 <= self.settings.mtu(at.version).get().into();
        let place = (opens && fits).then(|| self.place_for(&at));
        let Some(index) = place.flatten() else {
            return pass_through(self.settings, key, packet, Some(at), sink);
        };
        self.emit(index, sink);
        self.open[index] = Some(Open {
            key,
            ports: be32(packet, at.l4),
            head: packet,
            at,
            verified: false,
            idents: Idents::Unknown,
            count: 0,
            payload: at.payload_len(),
            last_flags: 0,
            since: self.clock,
        });
    }

    /// Passes an open packet on.
    fn emit(&mut self, index: usize, sink: &mut impl FnMut(Merged<'_, 'a, K>)) {
        let Some(open) = self.open[index].take() else {
            return;
        };
        if open.count == 0 {
            return pass_through(self.settings, open.key, open.head, Some(open.at), sink);
        }
        let tail = &self.tails[index][..open.count];
        let (key, (virtio, head)) = (open.key, open.finish());
        sink(Merged {
            key,
            virtio,
            head,
            tail,
        });
    }
}

impl<'a, K> Open<'a, K> {
    /// How identifications continue if a segment of the same flow may join, its checksum aside;
    /// `None` if it may not.
    fn may_join(&self, packet: &[u8], at: &Transport) -> Option<Idents> {
        let (head, first) = (&*self.head, &self.at);
        let same_shape = at.l3 == first.l3 && at.l4 == first.l4 && at.payload == first.payload;
        let len = at.payload_len();
        let fits = (1..=first.payload_len()).contains(&len)
            && first.payload - first.l3 + self.payload + len <= v4::MAX_LEN;
        if !same_shape || !fits || head[..at.l3] != packet[..at.l3] {
            return None;
        }
        let transport = (&head[at.l4..at.payload], &packet[at.l4..at.payload]);
        let follows = match at.protocol {
            // A payload is shorter than 64 KiB.
            Protocol::Tcp => tcp_follows(transport, self.payload as u32),
            Protocol::Udp => has_udp_checksum(transport.1),
        };
        let network = (&head[at.l3..at.l4], &packet[at.l3..at.l4]);
        match at.version {
            _ if !follows => None,
            IpVersion::Ipv4 => self.ipv4_follows(network),
            IpVersion::Ipv6 => ipv6_follows(network).then_some(Idents::Unknown),
        }
    }

    fn ipv4_follows(&self, (head, packet): (&[u8], &[u8])) -> Option<Idents> {
        let equal = |at: usize| head[at] == packet[at];
        let fields = [v4::field::TOS, v4::field::TTL, v4::field::FRAGMENT];
        if !fields.into_iter().all(equal) || !v4::is_plain(packet) {
            return None;
        }
        let (first, ident) = (be16(head, v4::field::IDENT), be16(packet, v4::field::IDENT));
        // There are at most `MAX_SEGMENTS`.
        let counting = ident == first.wrapping_add(self.count as u16 + 1);
        let fixed = ident == first && head[v4::field::FRAGMENT] & v4::DONT_FRAGMENT != 0;
        match self.idents {
            Idents::Unknown | Idents::Counting if counting => Some(Idents::Counting),
            Idents::Unknown | Idents::Fixed if fixed => Some(Idents::Fixed),
            _ => None,
        }
    }

    /// Whether the checksum of the head is right, verified once.
    fn verify(&mut self) -> bool {
        self.verified = self.verified || self.at.is_intact(self.head);
        self.verified
    }

    /// Makes the headers of the first segment those of the merged packet.
    fn finish(self) -> (Header, &'a mut [u8]) {
        let (at, size) = (self.at, self.at.payload_len());
        let head = &mut self.head[..at.end];
        let transport_len = at.payload - at.l4 + self.payload;
        // `may_join` refuses a segment with which it would be longer.
        debug_assert!(at.l4 - at.l3 + transport_len <= v4::MAX_LEN);
        let len = |from: usize| (at.l4 - from + transport_len) as u16;
        match at.version {
            IpVersion::Ipv4 => {
                let network = &mut head[at.l3..at.l4];
                put16(network, v4::field::TOTAL_LEN, len(at.l3));
                v4::fill_checksum(network);
            }
            IpVersion::Ipv6 => {
                let len = len(at.l3 + v6::HEADER_LEN);
                put16(head, at.l3 + v6::field::PAYLOAD_LEN, len);
            }
        }
        match at.protocol {
            Protocol::Tcp => head[at.l4 + tcp::FLAGS] |= self.last_flags,
            Protocol::Udp => put16(head, at.l4 + udp::LENGTH, len(at.l4)),
        }
        let pseudo = at.pseudo_header(head, transport_len);
        put16(head, at.checksum_offset(), pseudo);
        (superpacket(head, &at, size), head)
    }
}

/// The virtio-net header of a superpacket, whose checksum is partial.
fn superpacket(packet: &[u8], at: &Transport, size: usize) -> Header {
    let (kind, ecn) = match (at.protocol, at.version) {
        (Protocol::Udp, _) => (GsoKind::Udp, false),
        (Protocol::Tcp, version) => {
            let ecn = packet[at.l4 + tcp::FLAGS] & tcp::CWR != 0;
            match version {
                IpVersion::Ipv4 => (GsoKind::TcpV4, ecn),
                IpVersion::Ipv6 => (GsoKind::TcpV6, ecn),
            }
        }
    };
    Header {
        checksum: partial(at),
        gso: Some(Gso {
            kind,
            // The payload of a packet fits 16 bits.
            size: size as u16,
            ecn,
        }),
        hdr_len: offset(at.payload),
    }
}

fn partial(at: &Transport) -> Checksum {
    Checksum::Partial {
        start: offset(at.l4),
        offset: at.protocol.checksum_offset() as u16,
    }
}

/// An offset for the virtio-net header. If one does not fit, which takes more than 60 KiB in front
/// of the IP header, the device refuses the header.
fn offset(at: usize) -> u16 {
    u16::try_from(at).unwrap_or(u16::MAX)
}

/// Passes a packet on that no segment has joined.
fn pass_through<'a, K>(
    settings: MergeSettings,
    key: K,
    packet: &'a mut [u8],
    at: Option<Transport>,
    sink: &mut impl FnMut(Merged<'_, 'a, K>),
) {
    let virtio = at.map_or_else(Header::default, |at| header_of(packet, &at, settings));
    sink(Merged {
        key,
        virtio,
        head: packet,
        tail: &[],
    });
}

fn header_of(packet: &mut [u8], at: &Transport, settings: MergeSettings) -> Header {
    if let Some(header) = oversized(packet, at, settings.mtu(at.version)) {
        return header;
    }
    let is_partial = at.is_partial(packet);
    Header {
        checksum: if is_partial {
            partial(at)
        } else {
            Checksum::Unknown
        },
        ..Header::default()
    }
}

/// Whether a packet is all that its virtio-net header says, as a [`Merger`] takes for granted: it is no
/// superpacket, and a partial checksum is that of TCP or UDP, which the merger sees by itself.
#[must_use]
pub fn is_plain(header: &Header, packet: &[u8], l3: usize) -> bool {
    if header.gso.is_some() {
        return false;
    }
    let Checksum::Partial { start, offset } = header.checksum else {
        return true;
    };
    Transport::parse(packet, l3)
        .is_ok_and(|at| at.has_checksum_at(start, offset) && at.is_partial(packet))
}

/// The virtio-net header for a batch of one packet, which needs no merger. It leaves a partial
/// checksum to the receiver, and the segmentation of a TCP packet longer than the receiver's MTU,
/// whose checksum becomes a partial one.
pub fn header_for_single(packet: &mut [u8], l3: usize, settings: MergeSettings) -> Header {
    Transport::parse(packet, l3)
        .map_or_else(|_| Header::default(), |at| header_of(packet, &at, settings))
}

/// The header for a TCP packet longer than the MTU, whose checksum becomes a partial one. `None` if
/// it is not such a packet or cannot be segmented.
fn oversized(packet: &mut [u8], at: &Transport, mtu: Mtu) -> Option<Header> {
    let mtu = usize::from(mtu.get());
    if at.protocol != Protocol::Tcp || at.end - at.l3 <= mtu || at.end != packet.len() {
        return None;
    }
    let size = mtu
        .checked_sub(at.payload - at.l3)
        .filter(|size| *size > 0)?;
    let flags = packet[at.l4 + tcp::FLAGS];
    if flags & (tcp::SYN | tcp::RST | tcp::URG) != 0 || !at.is_intact(packet) {
        return None;
    }
    let pseudo = at.pseudo_header(packet, at.end - at.l4);
    put16(packet, at.checksum_offset(), pseudo);
    Some(superpacket(packet, at, size))
}

/// Whether two packets have the same protocol and addresses.
fn same_addresses((a, at_a): (&[u8], &Transport), (b, at_b): (&[u8], &Transport)) -> bool {
    if at_a.protocol != at_b.protocol || at_a.version != at_b.version {
        return false;
    }
    let (a, b) = (&a[at_a.l3..], &b[at_b.l3..]);
    match at_a.version {
        IpVersion::Ipv4 => {
            let addresses = |ip: &[u8]| {
                [
                    be32(ip, v4::field::SOURCE),
                    be32(ip, v4::field::DESTINATION),
                ]
            };
            addresses(a) == addresses(b)
        }
        IpVersion::Ipv6 => {
            let addresses = v6::field::ADDRESSES..v6::HEADER_LEN;
            a[addresses.clone()] == b[addresses]
        }
    }
}

/// Whether a packet can be the first of several.
fn may_begin(packet: &[u8], at: &Transport) -> bool {
    let transport = &packet[at.l4..at.payload];
    let begins = match at.protocol {
        Protocol::Tcp => {
            let alone = tcp::SYN | tcp::RST | tcp::URG | tcp::CWR | tcp::FIN | tcp::PSH;
            transport[tcp::FLAGS] & (alone | tcp::ACK) == tcp::ACK
        }
        Protocol::Udp => has_udp_checksum(transport),
    };
    let network = match at.version {
        IpVersion::Ipv4 => v4::is_plain(&packet[at.l3..at.l4]),
        IpVersion::Ipv6 => true,
    };
    begins && network && at.payload_len() > 0
}

/// Whether a TCP header follows the first one behind `sent` bytes of payload.
fn tcp_follows((head, header): (&[u8], &[u8]), sent: u32) -> bool {
    use tcp::{ACK_NUMBER, DATA_OFFSET, FLAGS, SEQUENCE, URGENT, WINDOW};
    let changed = head[FLAGS] ^ header[FLAGS];
    be32(header, SEQUENCE) == be32(head, SEQUENCE).wrapping_add(sent)
        && be32(head, ACK_NUMBER) == be32(header, ACK_NUMBER)
        && head[DATA_OFFSET] == header[DATA_OFFSET]
        && changed & !(tcp::FIN | tcp::PSH) == 0
        && be16(head, WINDOW) == be16(header, WINDOW)
        && head[URGENT..] == header[URGENT..]
}

/// Whether two IPv6 headers, with extension headers, are equal but for their lengths.
fn ipv6_follows((head, packet): (&[u8], &[u8])) -> bool {
    use v6::field::{HOP_LIMIT, NEXT_HEADER, PAYLOAD_LEN};
    head[..PAYLOAD_LEN] == packet[..PAYLOAD_LEN]
        && head[NEXT_HEADER..=HOP_LIMIT] == packet[NEXT_HEADER..=HOP_LIMIT]
        && head[v6::HEADER_LEN..] == packet[v6::HEADER_LEN..]
}

fn has_udp_checksum(header: &[u8]) -> bool {
    be16(header, udp::CHECKSUM) != 0
}

fn ending_flags(packet: &[u8], at: &Transport) -> u8 {
    match at.protocol {
        Protocol::Tcp => packet[at.l4 + tcp::FLAGS] & (tcp::FIN | tcp::PSH),
        Protocol::Udp => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    /// Offsets in the packets of these tests: Ethernet, IPv4, TCP with timestamps.
    const L3: usize = 14;
    const L4: usize = 34;
    const PAYLOAD: usize = 66;

    fn settings() -> MergeSettings {
        let mtu = Mtu::new(1450).unwrap();
        MergeSettings {
            mtu,
            mtu_v6: mtu,
            udp: true,
        }
    }

    fn fill(packet: &mut [u8]) {
        testing::finish(packet, L3);
    }

    /// The `i`th segment of a flow.
    fn segment(flow: u8, i: u8, payload: usize) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        bytes.extend([0x45, 2, 0, 0, 1, 7 + i, 0x40, 0, 63, 6, 0, 0]);
        bytes.extend([10, 244, 1, 2, 10, 244, 2, flow]);
        bytes.extend([0x80, 0, 0x1f, 0x90]);
        bytes.extend(
            (u32::MAX - 120)
                .wrapping_add(u32::from(i) * 100)
                .to_be_bytes(),
        );
        bytes.extend([0, 0, 0, 9, 0x80, 0x10, 1, 2, 0, 0, 0, 0]);
        bytes.extend([1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
        bytes.extend(vec![i; payload]);
        fill(&mut bytes);
        bytes
    }

    /// How many packets each output is of, with the flow it is of.
    fn merge(packets: &[Vec<u8>]) -> Vec<(u8, usize)> {
        let mut buffers = packets.to_vec();
        let mut merger = Merger::new(settings());
        let mut outputs = Vec::new();
        let mut sink = |merged: Merged<'_, '_, ()>| {
            outputs.push((merged.head[L4 - 1], 1 + merged.tail.len()));
        };
        for buffer in &mut buffers {
            merger.push(buffer, L3, (), &mut sink);
        }
        merger.flush(&mut sink);
        outputs
    }

    /// The counts for three segments of which one was changed, checksums following.
    fn with(which: usize, change: impl Fn(&mut Vec<u8>)) -> Vec<usize> {
        let mut packets = [0, 1, 2].map(|i| segment(1, i, 100));
        change(&mut packets[which]);
        fill(&mut packets[which]);
        merge(&packets)
            .into_iter()
            .map(|(_, count)| count)
            .collect()
    }

    #[test]
    fn what_must_be_equal_in_all_segments() {
        assert_eq!(with(0, |_| {}), [3]);
        let fields = [
            ("Ethernet source", 11),
            ("TOS", L3 + v4::field::TOS),
            ("identification", L3 + v4::field::IDENT + 1),
            ("DF", L3 + v4::field::FRAGMENT),
            ("TTL", L3 + v4::field::TTL),
            ("sequence", L4 + tcp::SEQUENCE + 3),
            ("acknowledgement", L4 + tcp::ACK_NUMBER + 3),
            ("reserved bits", L4 + tcp::DATA_OFFSET),
            ("window", L4 + tcp::WINDOW),
            ("urgent pointer", L4 + tcp::URGENT + 1),
            ("timestamp", L4 + 27),
            ("last option byte", PAYLOAD - 1),
        ];
        for (name, at) in fields {
            let bit = match name {
                "DF" => 0x40,
                "reserved bits" => 1,
                _ => 0x10,
            };
            assert_eq!(with(1, |packet| packet[at] ^= bit), [1, 1, 1], "{name}");
            assert_eq!(with(2, |packet| packet[at] ^= bit), [2, 1], "{name}");
        }
        // A flow of its own lets the others join across the gap only if their numbers follow.
        assert_eq!(with(1, |packet| packet[L4 + 1] ^= 1), [1, 1, 1], "port");
        assert_eq!(with(1, |packet| packet[L4 - 1] ^= 2), [1, 1, 1], "address");
    }

    #[test]
    fn what_must_be_equal_in_all_segments_of_ipv6() {
        let segments = |which: usize, change: &dyn Fn(&mut Vec<u8>)| {
            let mut packets = [0, 1, 2].map(|i| {
                let v4 = segment(1, i, 100);
                let mut packet = [&v4[..12], &[0x86, 0xdd]].concat();
                packet.extend([0x60, 0x12, 0x34, 0x56, 0, 0, v6::OPTIONS, 63]);
                packet.extend([0xfd; 32]);
                packet.extend([6, 0, 1, 4, 0, 0, 0, 0]);
                packet.extend(&v4[L4..]);
                packet
            });
            change(&mut packets[which]);
            packets.iter_mut().for_each(|packet| fill(packet));
            let counts = merge(&packets).into_iter().map(|(_, count)| count);
            counts.collect::<Vec<_>>()
        };
        assert_eq!(segments(0, &|_| {}), [3]);
        for (name, at, bit) in [
            ("DSCP", 0, 0x08),
            ("ECN", 1, 0x10),
            ("flow label", 1, 0x01),
            ("flow label", 3, 0x01),
            ("hop limit", v6::field::HOP_LIMIT, 0x01),
            ("source", v6::field::SOURCE + 15, 0x01),
            ("destination", v6::field::DESTINATION, 0x01),
            ("extension header", v6::HEADER_LEN + 7, 0x01),
        ] {
            let change = |packet: &mut Vec<u8>| packet[L3 + at] ^= bit;
            // A flow of its own lets the others join only if their numbers follow.
            assert_eq!(segments(1, &change), [1, 1, 1], "{name}");
            assert_eq!(segments(2, &change), [2, 1], "{name}");
        }
    }

    #[test]
    fn flags_by_their_place() {
        let flags = |which: usize, flags: u8| with(which, |packet| packet[L4 + tcp::FLAGS] = flags);
        let (ack, ece) = (tcp::ACK, 0x40);
        for (name, value, first, middle, last) in [
            ("PSH", ack | tcp::PSH, vec![1, 2], vec![2, 1], vec![3]),
            ("FIN", ack | tcp::FIN, vec![1, 2], vec![2, 1], vec![3]),
            ("CWR", ack | tcp::CWR, vec![1, 2], vec![1, 1, 1], vec![2, 1]),
            ("ECE", ack | ece, vec![1, 2], vec![1, 1, 1], vec![2, 1]),
            ("SYN", ack | tcp::SYN, vec![1, 2], vec![1, 1, 1], vec![2, 1]),
            ("RST", ack | tcp::RST, vec![1, 2], vec![1, 1, 1], vec![2, 1]),
            ("URG", ack | tcp::URG, vec![1, 2], vec![1, 1, 1], vec![2, 1]),
            ("no ACK", tcp::PSH, vec![1, 2], vec![1, 1, 1], vec![2, 1]),
        ] {
            assert_eq!(flags(0, value), first, "{name} on the first");
            assert_eq!(flags(1, value), middle, "{name} in the middle");
            assert_eq!(flags(2, value), last, "{name} on the last");
        }
    }

    #[test]
    fn lengths_by_their_place() {
        let shorter = |which| with(which, |packet| packet.truncate(PAYLOAD + 99));
        assert_eq!(shorter(0), [1, 2]);
        assert_eq!(shorter(1), [2, 1]);
        assert_eq!(shorter(2), [3]);
        let empty = |which| with(which, |packet| packet.truncate(PAYLOAD));
        assert_eq!(empty(0), [1, 2]);
        assert_eq!(empty(1), [1, 1, 1]);
        assert_eq!(empty(2), [2, 1]);
        assert_eq!(with(1, |packet| packet.push(0)), [1, 1, 1]);
        assert_eq!(with(2, |packet| packet.push(0)), [2, 1]);
    }

    #[test]
    fn identifications_count_or_stay_where_df_allows() {
        let merge_idents = |idents: [u16; 3], df: u8| {
            let mut packets = [0, 1, 2].map(|i| segment(1, i, 100));
            for (packet, ident) in packets.iter_mut().zip(idents) {
                put16(packet, L3 + v4::field::IDENT, ident);
                packet[L3 + v4::field::FRAGMENT] = df;
                fill(packet);
            }
            let outputs = merge(&packets).into_iter();
            outputs.map(|(_, count)| count).collect::<Vec<_>>()
        };
        for df in [0, 0x40] {
            assert_eq!(merge_idents([0xffff, 0, 1], df), [3]);
            assert_eq!(merge_idents([7, 9, 10], df), [1, 2]);
        }
        assert_eq!(merge_idents([7, 7, 7], 0x40), [3]);
        assert_eq!(merge_idents([7, 7, 7], 0), [1, 1, 1]);
        assert_eq!(merge_idents([7, 7, 8], 0x40), [2, 1]);
        assert_eq!(merge_idents([7, 8, 7], 0x40), [2, 1]);
    }

    #[test]
    fn what_is_not_intact_is_not_merged() {
        for (which, expected) in [(0, vec![1, 2]), (1, vec![1, 1, 1]), (2, vec![2, 1])] {
            for at in [L3 + v4::field::CHECKSUM, L4 + tcp::CHECKSUM, PAYLOAD + 50] {
                let mut packets = [0, 1, 2].map(|i| segment(1, i, 100));
                packets[which][at] ^= 1;
                let counts: Vec<_> = merge(&packets).iter().map(|(_, count)| *count).collect();
                assert_eq!(counts, expected, "byte {at} of segment {which}");
            }
        }
    }

    #[test]
    fn order_is_kept_within_a_flow() {
        let other = |i| segment(2, i, 100);
        let batch = [
            segment(1, 0, 100),
            other(0),
            segment(1, 1, 100),
            other(1),
            segment(1, 1, 100),
            segment(1, 2, 100),
        ];
        assert_eq!(merge(&batch), [(1, 2), (2, 2), (1, 2)], "a retransmission");
        let mut fragment = segment(3, 0, 100);
        fragment[L3 + v4::field::FRAGMENT] = 0x20;
        let batch = [segment(1, 0, 100), other(0), fragment, other(1)];
        assert_eq!(merge(&batch), [(1, 1), (2, 1), (3, 1), (2, 1)]);
        let mut arp = other(0);
        arp[L3 - 1] = 6;
        let batch = [segment(1, 0, 100), arp, segment(1, 1, 100)];
        assert_eq!(merge(&batch), [(2, 1), (1, 2)], "no flow's concern");
    }

    #[test]
    fn the_oldest_flow_makes_room() {
        let flows = 1..=FLOWS as u8 + 1;
        let begin = flows.clone().map(|flow| segment(flow, 0, 100));
        let go_on = flows.rev().map(|flow| segment(flow, 1, 100));
        let batch: Vec<_> = begin.chain(go_on).collect();
        let outputs = merge(&batch);
        assert_eq!(outputs[0], (1, 1));
        assert_eq!(outputs.len(), FLOWS + 2);
        assert_eq!(outputs.iter().map(|(_, count)| count).sum::<usize>(), 18);
    }

    #[test]
    fn a_merged_packet_has_limits() {
        let long = |i: u32, len: usize| {
            let mut packet = segment(1, 0, len);
            let sequence = i.wrapping_mul(len as u32).to_be_bytes();
            packet[L4 + tcp::SEQUENCE..L4 + tcp::SEQUENCE + 4].copy_from_slice(&sequence);
            fill(&mut packet);
            packet
        };
        let batch: Vec<_> = (0..100).map(|i| long(i, 10)).collect();
        assert_eq!(merge(&batch), [(1, MAX_SEGMENTS), (1, 100 - MAX_SEGMENTS)]);
        let batch: Vec<_> = (0..50).map(|i| long(i, 1398)).collect();
        assert_eq!(merge(&batch), [(1, 46), (1, 4)], "52 + 46 * 1398 = 64,360");
        // To the byte: 52 + 46 * 1398 + 1175 = 65,535.
        for (last, counts) in [(1174, [47, 0]), (1175, [47, 0]), (1176, [46, 1])] {
            let mut batch: Vec<_> = (0..46).map(|i| long(i, 1398)).collect();
            let mut end = long(46, 1398);
            end.truncate(PAYLOAD + last);
            fill(&mut end);
            batch.push(end);
            let counts = counts.into_iter().filter(|count| *count > 0);
            let outputs = counts.map(|count| (1, count));
            assert_eq!(merge(&batch), outputs.collect::<Vec<_>>(), "{last}");
        }
    }

    #[test]
    fn keys_tell_flows_apart() {
        let mut packets = [0, 1, 2].map(|i| segment(1, i, 100));
        let mut merger = Merger::new(settings());
        let mut outputs = Vec::new();
        let mut sink = |merged: Merged<'_, '_, u8>| outputs.push((merged.key, merged.tail.len()));
        for (packet, key) in packets.iter_mut().zip([7, 8, 7]) {
            merger.push(packet, L3, key, &mut sink);
        }
        merger.flush(&mut sink);
        assert_eq!(outputs, [(7, 0), (8, 0), (7, 0)]);
    }

    #[test]
    fn what_a_kernel_peer_left_partial_stays_so() {
        let mut whole = segment(1, 0, 3000);
        let at = Transport::parse(&whole, L3).unwrap();
        let pseudo = at.pseudo_header(&whole, at.end - at.l4);
        put16(&mut whole, at.checksum_offset(), pseudo);
        let header = header_for_single(&mut whole, L3, settings());
        let gso = header.gso.unwrap();
        assert_eq!((gso.kind, gso.size), (GsoKind::TcpV4, 1398));
        assert_eq!(header.checksum, partial(&at));
        assert_eq!(header.hdr_len, 66);

        let mut small = segment(1, 0, 10);
        assert_eq!(
            header_for_single(&mut small, L3, settings()),
            Header::default()
        );
        let at = Transport::parse(&small, L3).unwrap();
        let pseudo = at.pseudo_header(&small, at.end - at.l4);
        put16(&mut small, at.checksum_offset(), pseudo);
        let header = header_for_single(&mut small, L3, settings());
        assert_eq!((header.checksum, header.gso), (partial(&at), None));
    }

    /// A pure acknowledgement of a flow, by what `segment` numbers its segments.
    fn ack(flow: u8, number: u8) -> Vec<u8> {
        let mut packet = segment(flow, 0, 0);
        packet[L4 + tcp::ACK_NUMBER + 3] = number;
        fill(&mut packet);
        packet
    }

    /// What is left of batches by flow: the low byte of the acknowledgement number, and how many
    /// packets each is of. No packet may be missing that was not counted.
    fn acknowledge<const N: usize>(batches: [&[Vec<u8>]; N]) -> [Vec<(u8, u8, usize)>; N] {
        let mut table = AckTable::new();
        batches.map(|batch| {
            let mut buffers = batch.to_vec();
            let mut outputs = Vec::new();
            let mut sink = |merged: Merged<'_, '_, ()>| {
                let number = merged.head[L4 + tcp::ACK_NUMBER + 3];
                outputs.push((merged.head[L4 - 1], number, 1 + merged.tail.len()));
            };
            let mut merger = Merger::new(settings()).with_acks(&mut table);
            for buffer in &mut buffers {
                merger.push(buffer, L3, (), &mut sink);
            }
            merger.flush(&mut sink);
            let superseded = merger.superseded();
            let left: usize = outputs.iter().map(|(.., count)| count).sum();
            assert_eq!(left + superseded, batch.len());
            outputs
        })
    }

    #[test]
    fn the_last_acknowledgement_is_passed_on() {
        let first = [10, 20, 30].map(|number| ack(1, number));
        let second = [40, 50].map(|number| ack(1, number));
        let [first, second] = acknowledge([&first, &second]);
        assert_eq!(first, [(1, 10, 1), (1, 30, 1)]);
        assert_eq!(second, [(1, 50, 1)]);
        assert_eq!(
            merge(&[ack(1, 10), ack(1, 20), ack(1, 30)]).len(),
            3,
            "without a table"
        );
    }

    #[test]
    fn acknowledgements_keep_their_place_in_their_flow() {
        let data = |number, i| {
            let mut packet = segment(1, i, 100);
            packet[L4 + tcp::ACK_NUMBER + 3] = number;
            fill(&mut packet);
            packet
        };
        let known = [ack(1, 10)];
        let batch = [
            ack(1, 20),
            data(20, 0),
            data(20, 1),
            ack(1, 20),
            ack(1, 30),
            ack(1, 40),
            ack(2, 5),
        ];
        let [_, outputs] = acknowledge([&known, &batch]);
        let expected = [(1, 20, 1), (1, 20, 2), (1, 20, 1), (1, 40, 1), (2, 5, 1)];
        assert_eq!(outputs, expected);
        let mut fragment = segment(3, 0, 100);
        fragment[L3 + v4::field::FRAGMENT] = 0x20;
        let batch = [ack(1, 20), fragment, ack(1, 30)];
        let [_, outputs] = acknowledge([&known, &batch]);
        assert_eq!(outputs, [(1, 20, 1), (3, 9, 1), (1, 30, 1)]);
        let mut reserved = ack(1, 30);
        reserved[0] ^= 4;
        let [_, outputs] = acknowledge([&known, &[ack(1, 20), reserved, ack(1, 40)]]);
        assert_eq!(
            outputs,
            [(1, 20, 1), (1, 30, 1), (1, 40, 1)],
            "another frame"
        );
    }

    #[test]
    fn what_goes_another_way_counts_in_its_flow() {
        let mut table = AckTable::new();
        let mut buffers = [10, 20, 30, 40, 40, 50].map(|number| ack(1, number));
        let mut outputs = Vec::new();
        let mut sink = |merged: Merged<'_, '_, ()>| {
            outputs.push(merged.head[L4 + tcp::ACK_NUMBER + 3]);
        };
        let mut merger = Merger::new(settings()).with_acks(&mut table);
        for (index, packet) in buffers.iter_mut().enumerate() {
            if index == 3 {
                merger.make_way(packet, L3, (), &mut sink);
            } else {
                merger.push(packet, L3, (), &mut sink);
            }
        }
        merger.flush(&mut sink);
        assert_eq!(merger.superseded(), 1);
        assert_eq!(outputs, [10, 30, 40, 50], "40 is a duplicate");
    }

    #[test]
    fn acknowledgements_give_way_to_data() {
        let flows = FLOWS as u8;
        let data = |i: u8| (1..=flows).map(move |flow| segment(flow, i, 100));
        let acks = [ack(100, 10), ack(100, 20), ack(101, 10)];
        // Data of all flows is merged, although acknowledgements came first.
        let batch: Vec<_> = acks.into_iter().chain(data(0)).chain(data(1)).collect();
        let [outputs] = acknowledge([&batch]);
        let counts: Vec<_> = outputs
            .iter()
            .map(|&(flow, _, count)| (flow, count))
            .collect();
        let expected: Vec<_> = [(100, 1), (100, 1), (101, 1)]
            .into_iter()
            .chain((1..=flows).map(|flow| (flow, 2)))
            .collect();
        assert_eq!(counts, expected);
        // Nor although they came later.
        let most = (1..flows).map(|flow| segment(flow, 0, 100));
        let last = segment(flows, 0, 100);
        let batch = most.chain([ack(100, 10), last]).chain(data(1));
        let [outputs] = acknowledge([&batch.collect::<Vec<_>>()]);
        assert_eq!(outputs[0], (100, 10, 1));
        assert!(outputs[1..].iter().all(|(.., count)| *count == 2));
        // And they find no place where there is data.
        let acks = [ack(100, 20), ack(100, 30)];
        let batch: Vec<_> = data(0).chain(acks).chain(data(1)).collect();
        let [_, outputs] = acknowledge([&[ack(100, 10)], &batch]);
        let counts: Vec<_> = outputs
            .iter()
            .map(|&(flow, _, count)| (flow, count))
            .collect();
        assert_eq!(counts[..2], [(100, 1), (100, 1)]);
        assert!(counts[2..].iter().all(|(_, count)| *count == 2));
    }

    #[test]
    fn keys_tell_acknowledgements_apart() {
        let mut table = AckTable::new();
        let mut packets = [10, 20, 30, 40].map(|number| ack(1, number));
        let mut merger = Merger::new(settings()).with_acks(&mut table);
        let mut outputs = Vec::new();
        let mut sink = |merged: Merged<'_, '_, u8>| {
            outputs.push((merged.key, merged.head[L4 + tcp::ACK_NUMBER + 3]));
        };
        for (packet, key) in packets.iter_mut().zip([7, 7, 8, 7]) {
            merger.push(packet, L3, key, &mut sink);
        }
        merger.flush(&mut sink);
        assert_eq!(merger.superseded(), 0, "both keys need the slot");
        assert_eq!(outputs, [(7, 10), (7, 20), (8, 30), (7, 40)]);
    }
}
