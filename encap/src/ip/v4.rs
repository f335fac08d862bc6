//! IPv4 headers (RFC 791 section 3.1): the check, the lengths, and what a router writes.
//!
//! [`check`] answers whether bytes are one whole IPv4 packet; [`check_head`] does for a packet of
//! which only the first part is in memory. After that its fields may be read with smoltcp's
//! `Ipv4Packet`, none of whose accessors can panic then.

use std::net::Ipv4Addr;

use smoltcp::wire::IpProtocol;
use thiserror::Error;

use crate::bytes::{be16, put16};
use crate::ip::checksum;

/// Bytes of a header without options.
pub const HEADER_LEN: usize = 20;
/// Bytes of the longest header: 40 of them are options.
pub const MAX_HEADER_LEN: usize = 60;
/// Bytes of the longest packet with its header, as the total length field has it.
pub const MAX_LEN: usize = 65_535;
/// Fragment offsets count in units of so many bytes.
pub const FRAGMENT_UNIT: usize = 8;
/// The time to live of packets that a node originates: that of Linux (`ip_default_ttl`), and what
/// RFC 1700 recommends.
pub const DEFAULT_TTL: u8 = 64;

/// Offsets in the header.
pub(crate) mod field {
    pub(crate) const TOS: usize = 1;
    pub(crate) const TOTAL_LEN: usize = 2;
    pub(crate) const IDENT: usize = 4;
    /// Flags and fragment offset.
    pub(crate) const FRAGMENT: usize = 6;
    pub(crate) const TTL: usize = 8;
    pub(crate) const PROTOCOL: usize = 9;
    pub(crate) const CHECKSUM: usize = 10;
    pub(crate) const SOURCE: usize = 12;
    pub(crate) const DESTINATION: usize = 16;
}

/// Bits of the first byte at [`field::FRAGMENT`]: "don't fragment".
pub(crate) const DONT_FRAGMENT: u8 = 0x40;
/// Bits of the word at [`field::FRAGMENT`]: "more fragments".
const MORE_FRAGMENTS: u16 = 0x2000;
/// Bits of the word at [`field::FRAGMENT`]: the offset.
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// Why bytes are not one IPv4 packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Error {
    /// Fewer bytes than an IPv4 header has.
    #[error("{len} bytes are too few for an IPv4 header")]
    TooShort {
        /// The number of bytes.
        len: usize,
    },
    /// The version field is not 4.
    #[error("IP version {0} where 4 is expected")]
    Version(u8),
    /// The header length field is below the minimum of 20 bytes or beyond the packet.
    #[error("an IPv4 header length of {0} bytes is not possible here")]
    HeaderLen(u8),
    /// The total length field is smaller than the header or larger than what arrived.
    #[error("a total length of {total} bytes where {len} bytes arrived")]
    TotalLen {
        /// The field's value in bytes.
        total: u16,
        /// The number of bytes that arrived.
        len: usize,
    },
    /// The header checksum is wrong.
    #[error("the IPv4 header checksum is wrong")]
    Checksum,
}

/// Checks that `packet` begins with one whole IPv4 packet and returns its total length in bytes.
/// Bytes behind that length (Ethernet pads short frames) are not part of it.
///
/// # Errors
/// The first thing that is wrong with the header.
pub fn check(packet: &[u8]) -> Result<usize, Error> {
    check_head(packet, packet.len())
}

/// As [`check`], for a packet of `len` bytes of which only the first part is in `packet`: all of
/// the header, and any number of bytes behind it.
///
/// # Errors
/// As [`check`].
pub fn check_head(packet: &[u8], len: usize) -> Result<usize, Error> {
    let (header_len, total) = lengths(packet, len)?;
    let Some(header) = packet.get(..header_len) else {
        return Err(Error::HeaderLen(header_len as u8));
    };
    if checksum::compute(header) != 0 {
        return Err(Error::Checksum);
    }
    Ok(total)
}

/// Length of the header and total length of a packet of `len` bytes that begins with `packet`; the
/// checksum is not looked at. The total length covers the header and is at most `len`.
pub(crate) fn lengths(packet: &[u8], len: usize) -> Result<(usize, usize), Error> {
    if packet.len() < HEADER_LEN {
        return Err(Error::TooShort { len: packet.len() });
    }
    let version = packet[0] >> 4;
    if version != 4 {
        return Err(Error::Version(version));
    }
    let header_len = usize::from(packet[0] & 0x0f) * 4;
    let total = be16(packet, field::TOTAL_LEN);
    if (HEADER_LEN..=total.into()).contains(&header_len) && usize::from(total) <= len {
        return Ok((header_len, total.into()));
    }
    Err(if header_len < HEADER_LEN || header_len > packet.len() {
        Error::HeaderLen(header_len as u8)
    } else {
        Error::TotalLen { total, len }
    })
}

/// Whether a header, which is all of `header`, has no options and a right checksum.
pub(crate) fn is_plain(header: &[u8]) -> bool {
    header.len() == HEADER_LEN && checksum::compute(header) == 0
}

/// Splits a packet behind its header, without a look at anything but the header's length: a packet
/// may be cut short where an ICMP error quotes it (RFC 792). `None` if not even the header is
/// there.
#[must_use]
pub fn split_header(packet: &[u8]) -> Option<(&[u8], &[u8])> {
    let header_len = usize::from(packet.first()? & 0x0f) * 4;
    let parts = packet.split_at_checked(header_len)?;
    (header_len >= HEADER_LEN).then_some(parts)
}

/// Whether a packet, of which a whole header is there, is a fragment.
pub(crate) fn is_fragment(packet: &[u8]) -> bool {
    be16(packet, field::FRAGMENT) & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0
}

/// Whether a packet, of which a whole header is there, is a fragment but not the first: one that
/// has no transport header.
pub(crate) fn is_later_fragment(packet: &[u8]) -> bool {
    be16(packet, field::FRAGMENT) & FRAGMENT_OFFSET != 0
}

/// The fields of a header without options, for packets that a node originates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Differentiated services code point (RFC 2474), of six bits.
    pub dscp: u8,
    /// Bytes of the packet, this header included.
    pub total_len: u16,
    /// The identification, by which fragments are put together.
    pub ident: u16,
    /// Whether routers must not fragment the packet.
    pub dont_fragment: bool,
    /// Time to live.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: IpProtocol,
    /// The sender.
    pub source: Ipv4Addr,
    /// The receiver.
    pub destination: Ipv4Addr,
}

impl Header {
    /// The header with its checksum, ready to be put in front of the payload.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = 0x40 | (HEADER_LEN / 4) as u8;
        bytes[field::TOS] = self.dscp << 2;
        put16(&mut bytes, field::TOTAL_LEN, self.total_len);
        put16(&mut bytes, field::IDENT, self.ident);
        bytes[field::FRAGMENT] = if self.dont_fragment { DONT_FRAGMENT } else { 0 };
        bytes[field::TTL] = self.ttl;
        bytes[field::PROTOCOL] = self.protocol.into();
        bytes[field::SOURCE..field::DESTINATION].copy_from_slice(&self.source.octets());
        bytes[field::DESTINATION..].copy_from_slice(&self.destination.octets());
        fill_checksum(&mut bytes);
        bytes
    }
}

/// Decrements the TTL of an IPv4 packet by one, with its header checksum, and returns the new
/// value. `None` if the packet is too short for a header or its TTL is already zero; it is
/// unchanged then.
pub fn decrement_ttl(packet: &mut [u8]) -> Option<u8> {
    let header = packet.get_mut(..HEADER_LEN)?;
    // The protocol is the other half of the TTL's word.
    let old = be16(header, field::TTL);
    let ttl = header[field::TTL].checked_sub(1)?;
    header[field::TTL] = ttl;
    let new = be16(header, field::TTL);
    let sum = be16(header, field::CHECKSUM);
    put16(header, field::CHECKSUM, checksum::update(sum, old, new));
    Some(ttl)
}

/// Sets the total length of a packet that begins with a well-formed header, and computes the header
/// checksum anew. A packet shorter than its header stays as it is.
pub fn set_total_len(packet: &mut [u8], total_len: u16) {
    let header_len = split_header(packet).map(|(header, _)| header.len());
    if let Some(header) = header_len.and_then(|len| packet.get_mut(..len)) {
        put16(header, field::TOTAL_LEN, total_len);
        fill_checksum(header);
    }
}

/// Computes the checksum of a header, which is all of `header`.
pub(crate) fn fill_checksum(header: &mut [u8]) {
    put16(header, field::CHECKSUM, 0);
    let sum = checksum::compute(header);
    put16(header, field::CHECKSUM, sum);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::udp_packet;

    #[test]
    fn a_packet_is_as_long_as_it_says() {
        let mut bytes = udp_packet(b"hello");
        assert_eq!(check(&bytes), Ok(33));
        bytes.extend([0; 13]);
        assert_eq!(check(&bytes), Ok(33), "Ethernet padding is not part of it");
    }

    #[test]
    fn each_malformation_has_its_own_error() {
        let good = udp_packet(b"hello");
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            check(&bytes)
        };
        assert_eq!(check(&[]), Err(Error::TooShort { len: 0 }));
        assert_eq!(check(&good[..19]), Err(Error::TooShort { len: 19 }));
        assert_eq!(with(0, 0x65), Err(Error::Version(6)));
        assert_eq!(with(0, 0x44), Err(Error::HeaderLen(16)));
        assert_eq!(with(0, 0x4f), Err(Error::HeaderLen(60)));
        assert_eq!(with(3, 19), Err(Error::TotalLen { total: 19, len: 33 }));
        assert_eq!(with(3, 34), Err(Error::TotalLen { total: 34, len: 33 }));
        assert_eq!(
            check(&good[..32]),
            Err(Error::TotalLen { total: 33, len: 32 })
        );
        assert_eq!(with(8, 63), Err(Error::Checksum));
    }

    #[test]
    fn a_short_packet_or_a_dead_one_is_left_alone() {
        assert_eq!(decrement_ttl(&mut [0x45; 19]), None);
        let mut dead = [0; 20];
        assert_eq!(decrement_ttl(&mut dead), None);
        assert_eq!(dead, [0; 20]);
    }

    #[test]
    fn an_independent_builder_writes_the_same_header() {
        let theirs = udp_packet(b"hello");
        let header = Header {
            dscp: 0,
            total_len: 33,
            ident: 0,
            dont_fragment: true,
            ttl: DEFAULT_TTL,
            protocol: IpProtocol::Udp,
            source: Ipv4Addr::new(10, 244, 1, 2),
            destination: Ipv4Addr::new(10, 244, 2, 3),
        };
        assert_eq!(header.to_bytes(), theirs[..20]);
        let marked = Header {
            dscp: 48,
            ident: 0x1234,
            dont_fragment: false,
            ..header
        };
        let bytes = marked.to_bytes();
        let read = etherparse::Ipv4HeaderSlice::from_slice(&bytes)
            .unwrap()
            .to_header();
        assert_eq!((read.dscp.value(), read.identification), (48, 0x1234));
        assert!(!read.dont_fragment);
        assert_eq!(read.header_checksum, read.calc_header_checksum());
    }

    #[test]
    fn a_new_length_leaves_a_valid_header() {
        let mut packet = udp_packet(b"hello");
        packet.extend(b" there");
        set_total_len(&mut packet, 39);
        assert_eq!(check(&packet), Ok(39));
        let mut short = [0x46; 23];
        set_total_len(&mut short, 1);
        assert_eq!(short, [0x46; 23]);
    }

    #[test]
    fn a_quoted_packet_is_split_behind_its_header() {
        let packet = udp_packet(b"hello");
        let (header, rest) = split_header(&packet[..28]).unwrap();
        assert_eq!((header.len(), rest.len()), (20, 8));
        assert_eq!(split_header(&[]), None);
        assert_eq!(split_header(&[0x44; 30]), None);
        assert_eq!(split_header(&packet[..19]), None);
        assert_eq!(split_header(&[0x4f; 59]), None);
    }

    proptest! {
        #[test]
        fn an_independent_parser_agrees(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..80),
            version in prop::sample::select(vec![0x45u8, 0x46, 0x4f, 0x44, 0x65]),
            total in 0u16..90,
            fix in any::<bool>(),
        ) {
            if bytes.len() >= 20 {
                bytes[0] = version;
                bytes[2..4].copy_from_slice(&total.to_be_bytes());
                // Their parser forgets the reserved flag, which counts in the checksum.
                bytes[6] &= 0x7f;
                let header = usize::from(version & 0x0f) * 4;
                if fix && (20..=bytes.len()).contains(&header) {
                    bytes[10..12].fill(0);
                    let sum = checksum::compute(&bytes[..header]);
                    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                }
            }
            let theirs = etherparse::Ipv4HeaderSlice::from_slice(&bytes).ok().filter(|header| {
                let total = usize::from(header.total_len());
                total >= header.slice().len()
                    && total <= bytes.len()
                    && header.to_header().calc_header_checksum() == header.header_checksum()
            });
            prop_assert_eq!(
                check(&bytes).ok(),
                theirs.map(|header| usize::from(header.total_len()))
            );
        }

        #[test]
        fn a_decremented_ttl_leaves_a_valid_header(
            mut header in proptest::collection::vec(any::<u8>(), 20..60),
            ttl in 1u8..,
        ) {
            header.truncate(header.len() & !1);
            header[0] = 0x45;
            header[field::TTL] = ttl;
            fill_checksum(&mut header);
            prop_assert_eq!(decrement_ttl(&mut header), Some(ttl - 1));
            prop_assert_eq!(header[field::TTL], ttl - 1);
            prop_assert_eq!(checksum::compute(&header), 0);
        }
    }
}
