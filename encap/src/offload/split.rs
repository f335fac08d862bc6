//! Splits a superpacket into its segments: writes a header for each and does not move the payload.
//!
//! A pod's kernel hands over up to 64 KiB of TCP or UDP payload behind one set of headers. On the
//! wire each segment needs a header of its own in front of its part of the payload. All headers
//! have one length, so a whole train is two slices and two numbers ([`Train`]): segment `i` is
//! header `i` and payload `i`. The caller makes an iovec of each and sends all of them by one
//! system call, without a copy of the payload.
//!
//! The bytes in front of the IP header (VXLAN and inner Ethernet headers, an Ethernet header, or
//! none) are repeated unchanged. Then comes a copy of a template, in which every field that differs
//! between segments is zero and whose sums are computed once. For each segment the length, the
//! sequence number and the flags are written and added to these sums. Only the payload is summed,
//! once, and not even that if the checksum may stay partial.
//!
//! ```
//! use muslin_encap::offload::split::{Checksums, Split, TrainLimits};
//! use muslin_encap::offload::virtio::{Gso, GsoKind};
//!
//! // An IPv4 packet of 28 + 250 bytes: UDP payload for three datagrams of at most 100 bytes.
//! let mut packet = vec![0; 278];
//! packet[..10].copy_from_slice(&[0x45, 0, 1, 22, 0, 0, 0, 0, 64, 17]);
//! packet[24..26].copy_from_slice(&[1, 2]);
//!
//! let gso = Gso { kind: GsoKind::Udp, size: 100, ecn: false };
//! let mut split = Split::new(&packet, 0, gso, Checksums::Complete)?;
//! assert_eq!((split.header_len(), split.remaining()), (28, 3));
//!
//! let mut headers = [0; 3 * 28];
//! let train = split.next_train(&mut headers, TrainLimits::UDP_SEGMENT)?.expect("the first");
//! let lens: Vec<_> = train.segments().map(|(_, payload)| payload.len()).collect();
//! assert_eq!(lens, [100, 100, 50]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use smoltcp::wire::IpVersion;
use thiserror::Error;

use crate::buffer::NoRoom;
use crate::bytes::{be16, be32, put16};
use crate::ip::checksum::{self, add};
use crate::ip::transport::{self, Protocol, Transport, UDP_HEADER_LEN, tcp, udp};
use crate::ip::{v4, v6};
use crate::offload::virtio::{Gso, GsoKind};

/// The longest header of a segment in bytes: VXLAN and Ethernet (22), IPv4 with options (60) and
/// TCP with options (60) add up to 142.
pub const MAX_HEADER_LEN: usize = 160;

/// Bytes of header area that suffice for any train within [`TrainLimits::UDP_SEGMENT`].
pub const HEADERS_LEN: usize = TrainLimits::UDP_SEGMENT.segments * MAX_HEADER_LEN;

/// The least payload of a segment of Linux' TCP (`tcp_min_snd_mss` is 48, of which 40 may be
/// options). Less would only turn one packet into thousands.
const MIN_TCP_SIZE: u16 = 8;
/// The most segments of a TCP superpacket: enough for the largest one in segments of 256 bytes. A
/// kernel exceeds this only for a fast connection whose other end announces a smaller MSS.
const MAX_TCP_SEGMENTS: usize = 256;
/// The most segments of a UDP superpacket: `UDP_MAX_SEGMENTS` since Linux 6.9.
const MAX_UDP_SEGMENTS: usize = 128;

/// The transport checksum that segments get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksums {
    /// A complete one: for a wire, and for any receiver that has not agreed to a partial one.
    Complete,
    /// The sum of the pseudo header only, which takes no pass over the payload: for receivers that
    /// complete checksums or do not need them.
    Partial,
}

/// The most that one system call may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainLimits {
    /// Segments.
    pub segments: usize,
    /// Bytes, headers included.
    pub bytes: usize,
}

impl TrainLimits {
    /// The limits of one `sendmsg` with `UDP_SEGMENT` on any kernel: 64 segments
    /// (`UDP_MAX_SEGMENTS` up to Linux 6.8; 128 since), and the payload of one IPv4 UDP datagram,
    /// because the train is one datagram until it is segmented.
    pub const UDP_SEGMENT: Self = Self {
        segments: 64,
        bytes: v4::MAX_LEN - v4::HEADER_LEN - UDP_HEADER_LEN,
    };

    /// The most segments of `len` bytes, headers included, within the limits.
    #[must_use]
    pub fn fitting(self, len: usize) -> usize {
        self.segments.min(self.bytes / len.max(1))
    }

    /// One segment per call, for a device or socket that cannot segment.
    pub const ONE: Self = Self {
        segments: 1,
        bytes: usize::MAX,
    };
}

/// Why a packet cannot be split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// The headers are not those of a TCP or UDP packet.
    #[error(transparent)]
    Headers(#[from] transport::Error),
    /// The protocol is not that of the virtio-net header.
    #[error("a superpacket of another protocol than its virtio-net header has")]
    Kind,
    /// A TCP flag that only single packets have: SYN, RST or URG.
    #[error("a superpacket with TCP flags {0:#04x}")]
    Flags(u8),
    /// The headers are longer than [`MAX_HEADER_LEN`].
    #[error("a superpacket with {len} bytes of headers, which are too many")]
    HeaderLen {
        /// Their length in bytes.
        len: usize,
    },
    /// The segments are smaller or more than any kernel makes them.
    #[error("a superpacket of {payload} bytes in segments of {size}")]
    Size {
        /// Bytes of payload.
        payload: usize,
        /// Bytes of payload per segment.
        size: u16,
    },
    /// A segment is longer than the longest datagram.
    #[error("a superpacket with segments of {len} bytes, which no datagram carries")]
    TooLong {
        /// Length in bytes of the longest segment, with all its headers.
        len: usize,
    },
}

/// A superpacket that is being split.
#[derive(Debug)]
pub struct Split<'p> {
    packet: &'p [u8],
    at: Transport,
    size: usize,
    checksums: Checksums,
    /// The headers, with zero in fields that differ between segments.
    template: [u8; MAX_HEADER_LEN],
    /// Sum of the template's IPv4 header.
    network_sum: u16,
    /// Sum of the template's transport header and of the pseudo header without its length.
    transport_sum: u16,
    /// Sum of the pseudo header without its length.
    pseudo_sum: u16,
    /// Bytes of payload, and segments, that are done.
    done: usize,
    index: u16,
}

impl<'p> Split<'p> {
    /// Prepares to split the packet whose IP header is at `l3`. The bytes in front of it are
    /// repeated in every segment. The packet's own checksums are not verified.
    ///
    /// # Errors
    /// `Error` if it is not a superpacket of that kind.
    pub fn new(packet: &'p [u8], l3: usize, gso: Gso, checksums: Checksums) -> Result<Self, Error> {
        let at = Transport::parse(packet, l3)?;
        check(packet, &at, gso)?;
        let mut split = Self {
            packet,
            at,
            size: gso.size.into(),
            checksums,
            template: [0; MAX_HEADER_LEN],
            network_sum: 0,
            transport_sum: 0,
            pseudo_sum: at.pseudo_header(packet, 0),
            done: 0,
            index: 0,
        };
        split.prepare();
        Ok(split)
    }

    /// Fills the template and computes its sums.
    fn prepare(&mut self) {
        let at = self.at;
        let template = &mut self.template[..at.payload];
        template.copy_from_slice(&self.packet[..at.payload]);
        let (network, transport) = template[at.l3..].split_at_mut(at.l4 - at.l3);
        match at.version {
            IpVersion::Ipv4 => {
                for field in [v4::field::TOTAL_LEN, v4::field::IDENT, v4::field::CHECKSUM] {
                    put16(network, field, 0);
                }
                self.network_sum = checksum::sum(network);
            }
            IpVersion::Ipv6 => put16(network, v6::field::PAYLOAD_LEN, 0),
        }
        match at.protocol {
            Protocol::Tcp => {
                transport[tcp::SEQUENCE..tcp::SEQUENCE + 4].fill(0);
                transport[tcp::FLAGS] = 0;
            }
            Protocol::Udp => put16(transport, udp::LENGTH, 0),
        }
        put16(transport, at.protocol.checksum_offset(), 0);
        self.transport_sum = add(self.pseudo_sum, checksum::sum(transport));
    }

    /// Bytes of header in front of each segment's payload.
    #[must_use]
    pub const fn header_len(&self) -> usize {
        self.at.payload
    }

    /// Length in bytes of the longest segment as an IP packet, to compare with the MTU of a path.
    #[must_use]
    pub fn mtu_needed(&self) -> usize {
        self.at.payload - self.at.l3 + self.size.min(self.at.payload_len())
    }

    /// The number of segments still to come.
    #[must_use]
    pub const fn remaining(&self) -> usize {
        let left = self.at.payload_len() - self.done;
        if left == 0 && self.index == 0 {
            1
        } else {
            left.div_ceil(self.size)
        }
    }

    /// Writes headers for the next segments, as many as `limits` and the header area allow. Returns
    /// `None` after the last segment.
    ///
    /// # Errors
    /// `NoRoom` if not even one segment fits the header area or the limit of bytes; the next call
    /// returns the same segments then.
    pub fn next_train<'h>(
        &mut self,
        headers: &'h mut [u8],
        limits: TrainLimits,
    ) -> Result<Option<Train<'h, 'p>>, NoRoom> {
        let remaining = self.remaining();
        if remaining == 0 {
            return Ok(None);
        }
        let (header_len, full) = (self.header_len(), self.header_len() + self.size);
        let left = &self.packet[self.at.payload + self.done..self.at.end];
        let longest = header_len + self.size.min(left.len());
        if longest > limits.bytes || header_len > headers.len() {
            let (needed, room) = if longest > limits.bytes {
                (longest, limits.bytes)
            } else {
                (header_len, headers.len())
            };
            return Err(NoRoom { needed, room });
        }
        let fitting = (limits.bytes / full).min(headers.len() / header_len);
        let count = remaining.min(fitting).min(limits.segments).max(1);
        let headers = &mut headers[..count * header_len];
        let payload = &left[..left.len().min(count * self.size)];
        for (i, header) in headers.chunks_exact_mut(header_len).enumerate() {
            let start = payload.len().min(i * self.size);
            let end = payload.len().min(start + self.size);
            self.write_header(header, &payload[start..end]);
        }
        Ok(Some(Train {
            headers,
            header_len,
            payload,
            size: self.size,
        }))
    }

    /// Writes the header of the next segment with this payload.
    fn write_header(&mut self, header: &mut [u8], payload: &[u8]) {
        let at = self.at;
        header.copy_from_slice(&self.template[..at.payload]);
        let (network, transport) = header[at.l3..].split_at_mut(at.l4 - at.l3);
        let transport_len = transport.len() + payload.len();
        self.write_network(network, transport_len);
        let varying = match at.protocol {
            Protocol::Tcp => self.write_tcp(transport, payload.len()),
            Protocol::Udp => {
                // No segment is longer than the packet it comes from.
                put16(transport, udp::LENGTH, transport_len as u16);
                transport_len as u16
            }
        };
        let pseudo_len = transport_len as u16;
        let value = match self.checksums {
            Checksums::Partial => add(self.pseudo_sum, pseudo_len),
            Checksums::Complete => {
                let headers = add(self.transport_sum, add(varying, pseudo_len));
                let value = !add(headers, checksum::sum(payload));
                match at.protocol {
                    Protocol::Tcp => value,
                    Protocol::Udp => checksum::nonzero(value),
                }
            }
        };
        put16(transport, at.protocol.checksum_offset(), value);
        self.done += payload.len();
        self.index = self.index.wrapping_add(1);
    }

    fn write_network(&self, network: &mut [u8], transport_len: usize) {
        match self.at.version {
            IpVersion::Ipv4 => {
                let total = (network.len() + transport_len) as u16;
                let ident =
                    be16(self.packet, self.at.l3 + v4::field::IDENT).wrapping_add(self.index);
                put16(network, v4::field::TOTAL_LEN, total);
                put16(network, v4::field::IDENT, ident);
                let sum = add(self.network_sum, add(total, ident));
                put16(network, v4::field::CHECKSUM, !sum);
            }
            IpVersion::Ipv6 => {
                let len = network.len() - v6::HEADER_LEN + transport_len;
                put16(network, v6::field::PAYLOAD_LEN, len as u16);
            }
        }
    }

    /// Writes the TCP fields that differ between segments and returns their sum.
    fn write_tcp(&self, header: &mut [u8], payload_len: usize) -> u16 {
        let original = &self.packet[self.at.l4..];
        let first = self.done == 0;
        let last = self.done + payload_len == self.at.payload_len();
        let mut flags = original[tcp::FLAGS];
        if !first {
            flags &= !tcp::CWR;
        }
        if !last {
            flags &= !(tcp::FIN | tcp::PSH);
        }
        header[tcp::FLAGS] = flags;
        // A packet's payload is shorter than 64 KiB.
        let sequence = be32(original, tcp::SEQUENCE).wrapping_add(self.done as u32);
        let bytes = sequence.to_be_bytes();
        header[tcp::SEQUENCE..tcp::SEQUENCE + 4].copy_from_slice(&bytes);
        let sequence = add((sequence >> 16) as u16, sequence as u16);
        add(sequence, flags.into())
    }
}

/// The number of segments of the superpacket whose IP header is at `l3`, a measure for the work of
/// splitting it.
///
/// # Errors
/// `Error` if it is of another kind, or of more segments than any kernel makes of one packet.
pub fn segment_count(packet: &[u8], l3: usize, gso: Gso) -> Result<usize, Error> {
    let at = Transport::parse(packet, l3)?;
    check_size(&at, gso)
}

fn check_size(at: &Transport, gso: Gso) -> Result<usize, Error> {
    let kind = match (at.protocol, at.version) {
        (Protocol::Tcp, IpVersion::Ipv4) => GsoKind::TcpV4,
        (Protocol::Tcp, IpVersion::Ipv6) => GsoKind::TcpV6,
        (Protocol::Udp, _) => GsoKind::Udp,
    };
    if kind != gso.kind {
        return Err(Error::Kind);
    }
    let (payload, size) = (at.payload_len(), gso.size);
    let (least, most) = match at.protocol {
        Protocol::Tcp => (MIN_TCP_SIZE, MAX_TCP_SEGMENTS),
        Protocol::Udp => (1, MAX_UDP_SEGMENTS),
    };
    let count = payload.div_ceil(size.max(1).into());
    if size < least || count > most {
        return Err(Error::Size { payload, size });
    }
    Ok(count)
}

fn check(packet: &[u8], at: &Transport, gso: Gso) -> Result<(), Error> {
    check_size(at, gso)?;
    if at.payload > MAX_HEADER_LEN {
        return Err(Error::HeaderLen { len: at.payload });
    }
    if at.protocol == Protocol::Tcp {
        let flags = packet[at.l4 + tcp::FLAGS];
        if flags & (tcp::SYN | tcp::RST | tcp::URG) != 0 {
            return Err(Error::Flags(flags));
        }
    }
    Ok(())
}

/// Segments that are sent by one system call. All but the last have [`Train::datagram_len`] bytes;
/// the last may be shorter.
#[derive(Debug, Clone, Copy)]
pub struct Train<'h, 'p> {
    headers: &'h [u8],
    header_len: usize,
    payload: &'p [u8],
    size: usize,
}

impl<'h, 'p> Train<'h, 'p> {
    /// The number of segments, at least one.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.headers.len() / self.header_len
    }

    /// Length in bytes of the first segment, headers included: the value for `UDP_SEGMENT`.
    #[must_use]
    pub fn datagram_len(&self) -> usize {
        self.header_len + self.size.min(self.payload.len())
    }

    /// Length in bytes of all segments together, headers included.
    #[must_use]
    pub const fn total_len(&self) -> usize {
        self.headers.len() + self.payload.len()
    }

    /// The segments in order, each as header and payload.
    pub fn segments(&self) -> impl ExactSizeIterator<Item = (&'h [u8], &'p [u8])> + use<'h, 'p> {
        let Self { payload, size, .. } = *self;
        let headers = self.headers.chunks_exact(self.header_len);
        headers.enumerate().map(move |(i, header)| {
            let start = payload.len().min(i * size);
            let end = payload.len().min(start + size);
            (header, &payload[start..end])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::udp_packet;

    const GSO: Gso = Gso {
        kind: GsoKind::TcpV4,
        size: 1398,
        ecn: false,
    };

    /// An IPv4 packet of TCP with timestamps, behind `l3` bytes of something.
    fn tcp(l3: usize, flags: u8, payload: usize) -> Vec<u8> {
        let mut bytes = vec![0; l3];
        if l3 >= 2 {
            bytes[l3 - 2] = 8;
        }
        bytes.extend([0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, 6, 0, 0]);
        put16(&mut bytes, l3 + v4::field::TOTAL_LEN, (52 + payload) as u16);
        bytes.extend([10, 244, 1, 2, 10, 244, 2, 3]);
        bytes.extend([0x80, 0, 0x1f, 0x90, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 2]);
        bytes.extend([0x80, flags, 1, 2, 0, 0, 0, 0]);
        bytes.extend([1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
        bytes.extend(vec![7; payload]);
        bytes
    }

    #[test]
    fn the_largest_superpacket_needs_two_sends() {
        let packet = tcp(22, tcp::ACK, 46 * 1398 + 1);
        let mut split = Split::new(&packet, 22, GSO, Checksums::Complete).unwrap();
        assert_eq!((split.header_len(), split.mtu_needed()), (74, 1450));
        let mut headers = vec![0; HEADERS_LEN];
        let mut counts = Vec::new();
        while let Some(train) = split
            .next_train(&mut headers, TrainLimits::UDP_SEGMENT)
            .unwrap()
        {
            assert!(train.total_len() <= 65_507);
            counts.push((train.count(), train.datagram_len(), train.total_len()));
        }
        let full = 1398 + 74;
        assert_eq!(counts, [(44, full, 44 * full), (3, full, 2 * full + 75)]);
    }

    #[test]
    fn flags_and_numbers_by_their_place() {
        let flags = tcp::ACK | tcp::PSH | tcp::FIN | tcp::CWR;
        let packet = tcp(0, flags, 250);
        let gso = Gso { size: 100, ..GSO };
        let mut split = Split::new(&packet, 0, gso, Checksums::Partial).unwrap();
        let mut headers = [0; 3 * 52];
        let train = split.next_train(&mut headers, TrainLimits::UDP_SEGMENT);
        let train = train.unwrap().unwrap();
        let seen: Vec<_> = train
            .segments()
            .map(|(header, payload)| {
                let ident = be16(header, v4::field::IDENT);
                let sequence = be32(header, 20 + tcp::SEQUENCE);
                (header[20 + tcp::FLAGS], ident, sequence, payload.len())
            })
            .collect();
        let expected = [
            (tcp::ACK | tcp::CWR, 0xffff, 0xffff_ffff, 100),
            (tcp::ACK, 0, 99, 100),
            (tcp::ACK | tcp::PSH | tcp::FIN, 1, 199, 50),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn what_has_no_room_comes_with_the_next_call() {
        let packet = tcp(0, tcp::ACK, 250);
        let gso = Gso { size: 100, ..GSO };
        let mut split = Split::new(&packet, 0, gso, Checksums::Complete).unwrap();
        let refused = split.next_train(&mut [0; 51], TrainLimits::ONE).map(|_| ());
        assert_eq!(
            refused,
            Err(NoRoom {
                needed: 52,
                room: 51
            })
        );
        let limits = TrainLimits {
            segments: 9,
            bytes: 151,
        };
        let refused = split.next_train(&mut [0; 160], limits).map(|_| ());
        assert_eq!(
            refused,
            Err(NoRoom {
                needed: 152,
                room: 151
            })
        );
        let mut headers = [0; 2 * 52 + 51];
        let mut counts = Vec::new();
        while let Some(train) = split
            .next_train(&mut headers, TrainLimits::UDP_SEGMENT)
            .unwrap()
        {
            counts.push(train.count());
        }
        assert_eq!(counts, [2, 1]);
    }

    #[test]
    fn a_udp_checksum_is_never_zero() {
        let mut payload = [0; 40];
        let at = Transport::parse(&udp_packet(&payload), 0).unwrap();
        let mut half = udp_packet(&payload[..20]);
        put16(&mut half, 20 + udp::CHECKSUM, 0);
        let at_half = Transport { end: 48, ..at };
        let sum = add(at_half.pseudo_header(&half, 28), checksum::sum(&half[20..]));
        payload[..2].copy_from_slice(&(!sum).to_be_bytes());
        let packet = udp_packet(&payload);
        let gso = Gso {
            kind: GsoKind::Udp,
            size: 20,
            ecn: false,
        };
        let mut split = Split::new(&packet, 0, gso, Checksums::Complete).unwrap();
        let mut headers = [0; 200];
        let train = split.next_train(&mut headers, TrainLimits::UDP_SEGMENT);
        let segments: Vec<_> = train.unwrap().unwrap().segments().collect();
        assert_eq!(be16(segments[0].0, 26), 0xffff);
        assert_eq!(be16(segments[1].0, 26), !sum);
    }

    #[test]
    fn each_refusal_has_its_own_error() {
        let refusal = |packet: &[u8], gso| Split::new(packet, 0, gso, Checksums::Complete).err();
        let good = tcp(0, tcp::ACK, 250);
        for kind in [GsoKind::TcpV6, GsoKind::Udp] {
            assert_eq!(refusal(&good, Gso { kind, ..GSO }), Some(Error::Kind));
        }
        let udp_gso = |size| Gso {
            kind: GsoKind::Udp,
            size,
            ecn: false,
        };
        assert_eq!(refusal(&udp_packet(&[0; 9]), GSO), Some(Error::Kind));
        for flag in [tcp::SYN, tcp::RST, tcp::URG] {
            let flags = tcp::ACK | flag;
            let packet = tcp(0, flags, 250);
            assert_eq!(refusal(&packet, GSO), Some(Error::Flags(flags)));
        }
        let size = |payload, size| Some(Error::Size { payload, size });
        assert_eq!(refusal(&good, Gso { size: 7, ..GSO }), size(250, 7));
        assert_eq!(refusal(&good, Gso { size: 8, ..GSO }), None);
        assert_eq!(refusal(&udp_packet(&[0; 129]), udp_gso(1)), size(129, 1));
        assert_eq!(refusal(&udp_packet(&[0; 128]), udp_gso(1)), None);
        assert_eq!(refusal(&udp_packet(&[]), udp_gso(0)), size(0, 0));
        assert_eq!(
            segment_count(&udp_packet(&[0; 128]), 0, udp_gso(1)),
            Ok(128)
        );
        assert_eq!(
            segment_count(&udp_packet(&[0; 129]), 0, udp_gso(1)).err(),
            size(129, 1)
        );
        assert_eq!(segment_count(&good, 0, Gso { size: 100, ..GSO }), Ok(3));
        let small = Gso { size: 8, ..GSO };
        let most = tcp(0, tcp::ACK, 256 * 8);
        assert_eq!(segment_count(&most, 0, small), Ok(256));
        let more = tcp(0, tcp::ACK, 256 * 8 + 1);
        assert_eq!(refusal(&more, small), size(256 * 8 + 1, 8));
        assert_eq!(segment_count(&good, 0, udp_gso(100)), Err(Error::Kind));
        let far = tcp(109, tcp::ACK, 250);
        let refused = Split::new(&far, 109, GSO, Checksums::Complete).err();
        assert_eq!(refused, Some(Error::HeaderLen { len: 161 }));
        let mut fragment = good;
        fragment[6] = 0x20;
        let fragment = refusal(&fragment, GSO);
        assert_eq!(fragment, Some(Error::Headers(transport::Error::Fragment)));
    }
}
