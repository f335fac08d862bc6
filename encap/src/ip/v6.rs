//! IPv6 headers (RFC 8200): the check, the lengths, what a router writes, and the way through
//! extension headers.
//!
//! [`check`] answers whether bytes are one whole IPv6 packet; [`check_head`] does for a packet of
//! which only the first part is in memory. After that its fields may be read with smoltcp's
//! `Ipv6Packet`, none of whose accessors of the header can panic then. [`upper_layer`] finds what a
//! packet is about: a check that does not get there must not let the packet pass (RFC 7112 section
//! 5).

use std::net::Ipv6Addr;

use smoltcp::wire::IpProtocol;
use thiserror::Error;

use crate::bytes::{be16, be32, put16};
use crate::ip::checksum::{self, add};
use crate::ip::transport::{TCP_HEADER_LEN, UDP_HEADER_LEN};

/// Bytes of the header, without extension headers.
pub const HEADER_LEN: usize = 40;
/// Bytes of the longest packet with its header, as the payload length field has it.
pub const MAX_LEN: usize = HEADER_LEN + 65_535;
/// The smallest MTU that a link with IPv6 has, in bytes (RFC 8200 section 5).
pub const MIN_MTU: u16 = 1280;
/// The hop limit of packets that a node originates: that of Linux (`hop_limit`).
pub const DEFAULT_HOP_LIMIT: u8 = 64;
/// Extension headers count their length in units of so many bytes, and fragments their offset.
pub const UNIT: usize = 8;
/// Bytes of a Fragment header (RFC 8200 section 4.5).
pub const FRAGMENT_HEADER_LEN: usize = 8;

/// Extension headers that [`upper_layer`] passes over. Senders have reason for two or three; each
/// costs every node that looks a step (RFC 9098 section 2).
pub const MAX_EXTENSIONS: usize = 8;
/// Bytes of extension headers that [`upper_layer`] passes over.
pub const MAX_EXTENSIONS_LEN: usize = 256;

/// Offsets in the header.
pub(crate) mod field {
    pub(crate) const PAYLOAD_LEN: usize = 4;
    pub(crate) const NEXT_HEADER: usize = 6;
    pub(crate) const HOP_LIMIT: usize = 7;
    pub(crate) const ADDRESSES: usize = 8;
    pub(crate) const SOURCE: usize = 8;
    pub(crate) const DESTINATION: usize = 24;
}

/// Hop-by-hop options.
pub(crate) const HOP_BY_HOP: u8 = 0;
/// Routing: the pseudo header would have another destination.
pub(crate) const ROUTING: u8 = 43;
/// A fragment.
pub(crate) const FRAGMENT: u8 = 44;
/// Destination options.
pub(crate) const OPTIONS: u8 = 60;
/// Authentication, whose length is in units of four bytes (RFC 4302 section 2.2).
const AUTHENTICATION: u8 = 51;
/// ICMPv6.
const ICMPV6: u8 = 58;

/// The routing type by which a packet may be sent to and fro (RFC 5095).
const SOURCE_ROUTE: u8 = 0;
/// The hop-by-hop option of packets longer than the payload length field can say (RFC 2675).
const JUMBO: u8 = 0xc2;
/// The option that is a single byte of padding.
const PAD1: u8 = 0;
/// Bits of a Fragment header's third and fourth byte.
const FRAGMENT_OFFSET: u16 = 0xfff8;
const MORE_FRAGMENTS: u16 = 1;

/// Why bytes are not one IPv6 packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Error {
    /// Fewer bytes than an IPv6 header has.
    #[error("{len} bytes are too few for an IPv6 header")]
    TooShort {
        /// The number of bytes.
        len: usize,
    },
    /// The version field is not 6.
    #[error("IP version {0} where 6 is expected")]
    Version(u8),
    /// The payload length field is larger than what arrived.
    #[error("a packet of {total} bytes where {len} bytes arrived")]
    PayloadLen {
        /// What the field says, with the header, in bytes.
        total: usize,
        /// The number of bytes that arrived.
        len: usize,
    },
    /// The packet leaves its length to an option (RFC 2675), which no link here takes.
    #[error("a jumbogram")]
    Jumbo,
}

/// Why there is no way to what a packet is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChainError {
    /// Fewer bytes than an IPv6 header has.
    #[error("{len} bytes are too few for an IPv6 header")]
    NoHeader {
        /// The number of bytes.
        len: usize,
    },
    /// The packet, or its first fragment, ends before its upper layer begins.
    #[error("the packet ends in its extension headers")]
    Truncated,
    /// There are more than [`MAX_EXTENSIONS`] headers or [`MAX_EXTENSIONS_LEN`] bytes of them.
    #[error("the extension headers are more than a node has to look at")]
    TooMany,
    /// Hop-by-hop options behind another header, or two Fragment headers.
    #[error("extension header {0} where it must not be")]
    Misplaced(u8),
    /// A Routing header of type 0 (RFC 5095).
    #[error("a source route")]
    SourceRoute,
    /// An option for a packet that is longer than its header says (RFC 2675).
    #[error("a jumbogram")]
    Jumbo,
    /// An extension header that has none of the known forms.
    #[error("extension header {0}")]
    Unknown(u8),
}

/// Checks that `packet` begins with one whole IPv6 packet and returns its length with the header,
/// in bytes. Bytes behind that length (Ethernet pads short frames) are not part of it.
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
#[inline]
pub fn check_head(packet: &[u8], len: usize) -> Result<usize, Error> {
    if packet.len() < HEADER_LEN {
        return Err(Error::TooShort { len: packet.len() });
    }
    let version = packet[0] >> 4;
    if version != 6 {
        return Err(Error::Version(version));
    }
    let payload = be16(packet, field::PAYLOAD_LEN);
    if payload == 0 && packet[field::NEXT_HEADER] == HOP_BY_HOP {
        return Err(Error::Jumbo);
    }
    let total = HEADER_LEN + usize::from(payload);
    if total > len {
        return Err(Error::PayloadLen { total, len });
    }
    Ok(total)
}

/// What a Fragment header says (RFC 8200 section 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FragmentInfo {
    /// Where the fragment belongs in the fragmentable part, in bytes: a multiple of eight.
    pub offset: u16,
    /// Whether other fragments follow it.
    pub more: bool,
    /// The identification, by which fragments are put together.
    pub id: u32,
}

impl FragmentInfo {
    /// Whether it stands for a packet that is all there (RFC 6946).
    #[must_use]
    pub const fn is_atomic(&self) -> bool {
        self.offset == 0 && !self.more
    }
}

/// What a packet is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upper {
    /// The protocol of the upper layer. For a fragment but the first it is what the Fragment
    /// header names, which may be an extension header in the first fragment.
    pub protocol: u8,
    /// Where the number of that protocol is: bytes from the start of the packet.
    pub protocol_at: usize,
    /// Where the upper layer begins, or what a fragment but the first carries: bytes from the start
    /// of the packet, at most its length.
    pub offset: usize,
    /// Where the packet belongs, if it has a Fragment header.
    pub fragment: Option<FragmentInfo>,
}

impl Upper {
    /// Whether the upper layer's header is not here but in the first fragment.
    #[must_use]
    pub fn is_later_fragment(&self) -> bool {
        self.fragment.is_some_and(|it| it.offset != 0)
    }
}

/// Finds the upper layer of a packet whose header has passed [`check_head`], behind any extension
/// headers. All bytes of those must be in `packet`, which ends where the packet does or before. ESP
/// and No Next Header are upper layers of their own. Of a first fragment the upper layer's header
/// must be there, too (RFC 7112).
///
/// # Errors
/// Why it cannot be known what the packet is about. It must not pass then.
pub fn upper_layer(packet: &[u8]) -> Result<Upper, ChainError> {
    let header = packet.get(..HEADER_LEN);
    let header = header.ok_or(ChainError::NoHeader { len: packet.len() })?;
    let mut next = header[field::NEXT_HEADER];
    let (mut at, mut next_at) = (HEADER_LEN, field::NEXT_HEADER);
    let mut fragment = None;
    for passed in 0.. {
        let extension = packet.get(at..).unwrap_or_default();
        let len = match next {
            HOP_BY_HOP if passed > 0 => return Err(ChainError::Misplaced(next)),
            FRAGMENT if fragment.is_some() => return Err(ChainError::Misplaced(next)),
            HOP_BY_HOP | OPTIONS | ROUTING | FRAGMENT | AUTHENTICATION => {
                extension_len(next, extension)?
            }
            // Mobility, HIP, Shim6 and what is for experiments (IANA's list of extension headers).
            135 | 139 | 140 | 253 | 254 => return Err(ChainError::Unknown(next)),
            _ => break,
        };
        (at, next_at) = (at + len, at);
        if passed == MAX_EXTENSIONS || at - HEADER_LEN > MAX_EXTENSIONS_LEN {
            return Err(ChainError::TooMany);
        }
        let bytes = extension.get(..len).ok_or(ChainError::Truncated)?;
        match next {
            HOP_BY_HOP if has_jumbo(bytes) => return Err(ChainError::Jumbo),
            ROUTING if bytes[2] == SOURCE_ROUTE => return Err(ChainError::SourceRoute),
            FRAGMENT => fragment = Some(fragment_info(bytes)),
            _ => {}
        }
        next = bytes[0];
        if fragment.is_some_and(|it| it.offset != 0) {
            break;
        }
    }
    let upper = Upper {
        protocol: next,
        protocol_at: next_at,
        offset: at,
        fragment,
    };
    let is_first = fragment.is_some_and(|it| it.more && it.offset == 0);
    if is_first && packet.len() - at < least_len(next) {
        return Err(ChainError::Truncated);
    }
    Ok(upper)
}

/// The length of the extension header that begins there, in bytes.
fn extension_len(kind: u8, extension: &[u8]) -> Result<usize, ChainError> {
    let &[_, len, ..] = extension else {
        return Err(ChainError::Truncated);
    };
    Ok(match kind {
        FRAGMENT => FRAGMENT_HEADER_LEN,
        AUTHENTICATION => (usize::from(len) + 2) * 4,
        _ => (usize::from(len) + 1) * UNIT,
    })
}

/// Whether hop-by-hop options claim another length for the packet.
fn has_jumbo(header: &[u8]) -> bool {
    options(header).any(|at| header[at] == JUMBO)
}

/// Where the options of an extension header are, which is all of `header` (RFC 8200 section 4.2), the
/// last one whether it is whole or not.
fn options(header: &[u8]) -> impl Iterator<Item = usize> {
    let mut next = 2;
    std::iter::from_fn(move || {
        let at = next;
        let kind = *header.get(at)?;
        next += match kind {
            PAD1 => 1,
            _ => 2 + header.get(at + 1).map_or(0, |len| usize::from(*len)),
        };
        Some(at)
    })
}

/// An option that its receiver does not know, and that may not be passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownOption {
    /// Where it is: bytes from the start of the packet.
    pub at: usize,
    /// What the receiver has to do about the packet beside dropping it.
    pub action: OptionAction,
}

/// What the receiver of an option that it does not know has to do about the packet beside dropping
/// it: the two highest bits of the option's type (RFC 8200 section 4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionAction {
    /// Nothing.
    Drop,
    /// Say so by a Parameter Problem of code 2.
    Report,
    /// The same, unless the packet was to a group.
    ReportUnicast,
}

/// The first option of a packet, whose headers have passed [`upper_layer`], that a node without any
/// options of its own may not pass over.
#[must_use]
pub fn unknown_option(packet: &[u8]) -> Option<UnknownOption> {
    let end = upper_layer(packet).ok()?.offset;
    let mut next = packet[field::NEXT_HEADER];
    let mut at = HEADER_LEN;
    while at < end {
        let len = extension_len(next, &packet[at..end]).ok()?;
        let header = packet.get(at..at + len)?;
        if matches!(next, HOP_BY_HOP | OPTIONS) {
            for option in options(header) {
                let action = match header[option] >> 6 {
                    0 => continue,
                    1 => OptionAction::Drop,
                    2 => OptionAction::Report,
                    _ => OptionAction::ReportUnicast,
                };
                let at = at + option;
                return Some(UnknownOption { at, action });
            }
        }
        (next, at) = (header[0], at + len);
    }
    None
}

/// Reads a Fragment header, which is all of `header`.
fn fragment_info(header: &[u8]) -> FragmentInfo {
    let offset = be16(header, 2);
    FragmentInfo {
        offset: offset & FRAGMENT_OFFSET,
        more: offset & MORE_FRAGMENTS != 0,
        id: be32(header, 4),
    }
}

/// Bytes that the header of an upper layer has at least, as far as it is known.
fn least_len(protocol: u8) -> usize {
    match IpProtocol::from(protocol) {
        IpProtocol::Tcp => TCP_HEADER_LEN,
        IpProtocol::Udp => UDP_HEADER_LEN,
        // Type, code, checksum, and four bytes that depend on the type (RFC 4443 section 2.1).
        IpProtocol::Icmpv6 => 8,
        _ => 0,
    }
}

/// The fields of a header, for packets that a node originates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Traffic class: differentiated services code point and ECN (RFC 2474, RFC 3168).
    pub traffic_class: u8,
    /// Flow label, of 20 bits (RFC 6437); what is above is ignored.
    pub flow_label: u32,
    /// Bytes behind this header.
    pub payload_len: u16,
    /// Protocol of the payload, or an extension header's number.
    pub next_header: IpProtocol,
    /// Hop limit.
    pub hop_limit: u8,
    /// The sender.
    pub source: Ipv6Addr,
    /// The receiver.
    pub destination: Ipv6Addr,
}

impl Header {
    /// The header, ready to be put in front of the payload.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let first = 6 << 28 | u32::from(self.traffic_class) << 20 | self.flow_label & 0x000f_ffff;
        bytes[..field::PAYLOAD_LEN].copy_from_slice(&first.to_be_bytes());
        put16(&mut bytes, field::PAYLOAD_LEN, self.payload_len);
        bytes[field::NEXT_HEADER] = self.next_header.into();
        bytes[field::HOP_LIMIT] = self.hop_limit;
        bytes[field::SOURCE..field::DESTINATION].copy_from_slice(&self.source.octets());
        bytes[field::DESTINATION..].copy_from_slice(&self.destination.octets());
        bytes
    }
}

/// Decrements the hop limit of an IPv6 packet by one and returns the new value. `None` if the
/// packet is too short for a header or its hop limit is already zero; it is unchanged then.
#[inline]
pub fn decrement_hop_limit(packet: &mut [u8]) -> Option<u8> {
    let header = packet.get_mut(..HEADER_LEN)?;
    let hop_limit = header[field::HOP_LIMIT].checked_sub(1)?;
    header[field::HOP_LIMIT] = hop_limit;
    Some(hop_limit)
}

/// Sets the payload length of a packet: the bytes behind its header. A packet shorter than its
/// header stays as it is.
pub fn set_payload_len(packet: &mut [u8], payload_len: u16) {
    if let Some(header) = packet.get_mut(..HEADER_LEN) {
        put16(header, field::PAYLOAD_LEN, payload_len);
    }
}

/// Sets what follows the header of a packet. A packet shorter than its header stays as it is.
pub fn set_next_header(packet: &mut [u8], next_header: IpProtocol) {
    if let Some(header) = packet.get_mut(..HEADER_LEN) {
        header[field::NEXT_HEADER] = next_header.into();
    }
}

/// The Internet checksum of an upper layer that begins `offset` bytes into a packet and ends where
/// `packet` does, with the pseudo header of RFC 8200 section 8.1: what its field must have, if that
/// is zero now, and zero if it has it. A packet shorter than that has none, which is no zero.
#[must_use]
pub fn upper_checksum(packet: &[u8], protocol: u8, offset: usize) -> u16 {
    let (Some(addresses), Some(upper)) = (
        packet.get(field::ADDRESSES..HEADER_LEN),
        packet.get(offset..),
    ) else {
        return 0xffff;
    };
    let len = upper.len() as u32;
    let len = add((len >> 16) as u16, len as u16);
    let pseudo = add(checksum::sum(addresses), add(len, protocol.into()));
    !add(pseudo, checksum::sum(upper))
}

/// Writes the checksum of the ICMPv6 message that begins `offset` bytes into a packet and ends
/// where `packet` does (RFC 4443 section 2.3). A packet that has no room for one stays as it is.
pub fn fill_icmp_checksum(packet: &mut [u8], offset: usize) {
    if let Some(field) = packet.get_mut(offset..).and_then(|it| it.get_mut(2..4)) {
        field.fill(0);
        let sum = upper_checksum(packet, ICMPV6, offset);
        put16(packet, offset + 2, sum);
    }
}

/// Whether the checksum of the ICMPv6 message that begins `offset` bytes into a packet and ends
/// where `packet` does is right.
#[must_use]
pub fn has_icmp_checksum(packet: &[u8], offset: usize) -> bool {
    upper_checksum(packet, ICMPV6, offset) == 0
}

#[cfg(test)]
mod tests {
    use etherparse::{Ipv6Extensions, Ipv6FragmentHeader, Ipv6RawExtHeader, PacketBuilder};
    use proptest::prelude::*;

    use super::*;

    const SOURCE: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2];
    const DESTINATION: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3];
    const UDP: u8 = 17;

    /// A UDP packet by an independent builder.
    fn udp(payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        PacketBuilder::ipv6(SOURCE, DESTINATION, 64)
            .udp(1, 2)
            .write(&mut bytes, payload)
            .unwrap();
        bytes
    }

    /// A packet with extension headers in this order: each is its number and its bytes, of which the
    /// first is filled in.
    fn chain(headers: &[(u8, Vec<u8>)], last: u8, upper: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; HEADER_LEN];
        packet[0] = 0x60;
        packet[field::HOP_LIMIT] = 64;
        let mut at = field::NEXT_HEADER;
        for (kind, bytes) in headers {
            packet[at] = *kind;
            at = packet.len();
            packet.extend(bytes);
        }
        packet[at] = last;
        packet.extend(upper);
        let len = (packet.len() - HEADER_LEN) as u16;
        set_payload_len(&mut packet, len);
        packet
    }

    /// An extension header of this many bytes, a multiple of eight, with padding.
    fn options_of(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[1] = (len / 8 - 1) as u8;
        bytes
    }

    fn fragment(offset: u16, more: bool) -> Vec<u8> {
        let field = (offset | u16::from(more)).to_be_bytes();
        vec![0, 0, field[0], field[1], 0, 0, 0, 7]
    }

    fn found(headers: &[(u8, Vec<u8>)], last: u8, upper: &[u8]) -> Result<Upper, ChainError> {
        upper_layer(&chain(headers, last, upper))
    }

    /// v6LC.1.1.1 and 1.1.5: version and payload length.
    #[test]
    fn a_header_is_checked() {
        let packet = udp(&[7; 20]);
        assert_eq!(check(&packet), Ok(68));
        let padded = [&packet[..], &[0; 9]].concat();
        assert_eq!(check(&padded), Ok(68));
        assert_eq!(check_head(&packet[..40], 68), Ok(68));
        let (total, len) = (68, 67);
        let cut = Err(Error::PayloadLen { total, len });
        assert_eq!(check(&packet[..67]), cut);
        assert_eq!(check_head(&packet[..40], 67), cut);
        assert_eq!(check(&packet[..39]), Err(Error::TooShort { len: 39 }));
        for version in [0, 4, 5, 7, 15] {
            let mut other = packet.clone();
            other[0] = version << 4;
            assert_eq!(check(&other), Err(Error::Version(version)));
        }
        // A length of zero is that of a packet without payload, or of a jumbogram.
        let mut empty = packet.clone();
        set_payload_len(&mut empty, 0);
        assert_eq!(check(&empty), Ok(40));
        set_next_header(&mut empty, IpProtocol::HopByHop);
        assert_eq!(check(&empty), Err(Error::Jumbo));
    }

    /// v6LC.1.1.6 and the cases beside it: each kind is passed over, also several of them.
    #[test]
    fn the_upper_layer_is_behind_all_extension_headers() {
        let no_headers = found(&[], UDP, &[1; 8]);
        let expected = Upper {
            protocol: UDP,
            protocol_at: 6,
            offset: 40,
            fragment: None,
        };
        assert_eq!(no_headers, Ok(expected));
        let mut authentication = vec![0; 24];
        authentication[1] = 4;
        let mut routing = options_of(24);
        routing[2] = 2;
        let all = [
            (HOP_BY_HOP, options_of(8)),
            (OPTIONS, options_of(16)),
            (ROUTING, routing),
            (FRAGMENT, fragment(0, true)),
            (AUTHENTICATION, authentication),
            (OPTIONS, options_of(8)),
        ];
        let upper = found(&all, UDP, &[1; 8]).unwrap();
        assert_eq!((upper.protocol, upper.offset), (UDP, 40 + 88));
        assert_eq!(upper.protocol_at, 40 + 80);
        let info = upper.fragment.unwrap();
        assert_eq!((info.offset, info.more, info.id), (0, true, 7));
        assert!(!info.is_atomic() && !upper.is_later_fragment());
        for (ends, offset) in [(50, 48), (59, 48)] {
            let upper = found(&[(OPTIONS, options_of(8))], ends, &[]).unwrap();
            assert_eq!((upper.protocol, upper.offset), (ends, offset));
        }
    }

    #[test]
    fn what_a_later_fragment_has_is_not_looked_at() {
        // What it carries looks like a source route.
        let packet = chain(&[(FRAGMENT, fragment(1448, false))], ROUTING, &[0; 8]);
        let upper = upper_layer(&packet).unwrap();
        assert!(upper.is_later_fragment());
        assert_eq!((upper.protocol, upper.offset), (ROUTING, 48));
        let atomic = found(&[(FRAGMENT, fragment(0, false))], UDP, &[]).unwrap();
        assert!(atomic.fragment.unwrap().is_atomic());
    }

    #[test]
    fn what_hides_the_upper_layer_is_refused() {
        let hop_by_hop = |options: &[u8]| {
            let mut bytes = options_of(16);
            bytes[2..2 + options.len()].copy_from_slice(options);
            vec![(HOP_BY_HOP, bytes)]
        };
        let many = |count| vec![(OPTIONS, options_of(8)); count];
        assert!(found(&many(MAX_EXTENSIONS), UDP, &[]).is_ok());
        assert!(found(&[(OPTIONS, options_of(256))], UDP, &[]).is_ok());
        assert!(found(&hop_by_hop(&[5, 2, 0, 0]), UDP, &[]).is_ok());
        // A longer option hides what would be one of length.
        assert!(found(&hop_by_hop(&[1, 4, JUMBO, 4, 0, 1]), UDP, &[]).is_ok());
        let misplaced = |kind| Err(ChainError::Misplaced(kind));
        for (headers, expected) in [
            (many(MAX_EXTENSIONS + 1), Err(ChainError::TooMany)),
            (vec![(OPTIONS, options_of(264))], Err(ChainError::TooMany)),
            (
                vec![(OPTIONS, options_of(8)), (HOP_BY_HOP, options_of(8))],
                misplaced(HOP_BY_HOP),
            ),
            (
                vec![
                    (FRAGMENT, fragment(0, false)),
                    (FRAGMENT, fragment(0, false)),
                ],
                misplaced(FRAGMENT),
            ),
            (vec![(ROUTING, options_of(8))], Err(ChainError::SourceRoute)),
            (hop_by_hop(&[JUMBO, 4, 0, 1, 0, 0]), Err(ChainError::Jumbo)),
            (hop_by_hop(&[0, 1, 0, JUMBO, 4]), Err(ChainError::Jumbo)),
            (
                hop_by_hop(&[1, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, JUMBO]),
                Err(ChainError::Jumbo),
            ),
        ] {
            assert_eq!(found(&headers, UDP, &[1; 8]), expected, "{headers:?}");
        }
        for kind in [135, 139, 140, 253, 254] {
            let unknown = found(&[(OPTIONS, options_of(8))], kind, &[0; 8]);
            assert_eq!(unknown, Err(ChainError::Unknown(kind)));
        }
        let no_header = Err(ChainError::NoHeader { len: 39 });
        assert_eq!(upper_layer(&[0x60; 39]), no_header);
    }

    /// A chain that ends too early, wherever that is (RFC 7112).
    #[test]
    fn a_first_fragment_has_the_whole_chain() {
        let headers = [(FRAGMENT, fragment(0, true)), (OPTIONS, options_of(16))];
        for (protocol, least) in [(6, 20), (UDP, 8), (58, 8), (132, 0)] {
            let packet = chain(&headers, protocol, &[1; 20]);
            for len in 40..packet.len() {
                let upper = upper_layer(&packet[..len]);
                let is_there = len >= 64 + least;
                assert_eq!(upper.is_ok(), is_there, "{protocol}, {len}");
                assert!(is_there || upper == Err(ChainError::Truncated));
            }
        }
    }

    /// v6LC.1.2.3 to 1.2.7: what is to be done about options that are not known.
    #[test]
    fn options_say_what_to_do_about_them() {
        let with = |kind: u8, option: u8| {
            let mut bytes = options_of(8);
            bytes[2..6].copy_from_slice(&[0, option, 2, 0xff]);
            let mut headers = vec![(kind, bytes)];
            if kind == OPTIONS {
                headers.insert(0, (HOP_BY_HOP, options_of(8)));
            }
            chain(&headers, UDP, &[0; 8])
        };
        for (kind, at) in [(HOP_BY_HOP, 43), (OPTIONS, 51)] {
            for (option, expected) in [
                (0x05, None),
                (0x3f, None),
                (0x47, Some(OptionAction::Drop)),
                (0x87, Some(OptionAction::Report)),
                (0xc7, Some(OptionAction::ReportUnicast)),
            ] {
                let unknown = unknown_option(&with(kind, option));
                let expected = expected.map(|action| UnknownOption { at, action });
                assert_eq!(unknown, expected, "{kind} {option:x}");
            }
        }
        assert_eq!(unknown_option(&udp(&[0xff; 30])), None);
    }

    #[test]
    fn a_hop_limit_ends_at_zero() {
        let mut packet = udp(&[]);
        packet[7] = 2;
        assert_eq!(decrement_hop_limit(&mut packet), Some(1));
        assert_eq!(decrement_hop_limit(&mut packet), Some(0));
        assert_eq!(decrement_hop_limit(&mut packet), None);
        assert_eq!(packet[7], 0);
        assert_eq!(decrement_hop_limit(&mut packet[..39]), None);
    }

    #[test]
    fn checksums_are_those_of_an_independent_builder() {
        for len in [0, 1, 2, 7, 100, 1001] {
            let mut packet = Vec::new();
            PacketBuilder::ipv6(SOURCE, DESTINATION, 64)
                .icmpv6_echo_request(5, 6)
                .write(&mut packet, &vec![0x5a; len])
                .unwrap();
            assert!(has_icmp_checksum(&packet, 40));
            let mut damaged = packet.clone();
            damaged[23] ^= 1;
            assert!(!has_icmp_checksum(&damaged, 40));
            let expected = packet.clone();
            packet[42..44].fill(0xab);
            fill_icmp_checksum(&mut packet, 40);
            assert_eq!(packet, expected);
            let mut payload = vec![0x5a; len];
            payload.extend([0; 2]);
            assert_eq!(upper_checksum(&udp(&payload), UDP, 40), 0);
        }
        let mut short = [7; 43];
        fill_icmp_checksum(&mut short, 40);
        assert_eq!(short, [7; 43]);
        assert!(!has_icmp_checksum(&[0; 39], 40));
    }

    fn extension() -> impl Strategy<Value = (u8, Vec<u8>)> {
        let body = proptest::collection::vec(any::<u8>(), 6);
        (0u8..4, 0usize..5, body, any::<bool>()).prop_map(|(kind, words, body, more)| match kind {
            0 => (FRAGMENT, fragment(0, more)),
            1 => {
                let mut bytes = options_of(8 + 8 * words);
                bytes[2..8].copy_from_slice(&body);
                bytes[2] |= 1;
                (ROUTING, bytes)
            }
            2 => {
                let mut bytes = vec![0; 12 + 4 * words];
                bytes[1] = 1 + words as u8;
                (AUTHENTICATION, bytes)
            }
            _ => (OPTIONS, options_of(8 + 8 * words)),
        })
    }

    proptest! {
        #[test]
        fn a_header_is_what_an_independent_parser_reads(
            traffic_class in any::<u8>(),
            flow_label in any::<u32>(),
            payload_len in any::<u16>(),
            next_header in any::<u8>(),
            hop_limit in any::<u8>(),
            source in any::<[u8; 16]>(),
            destination in any::<[u8; 16]>(),
        ) {
            let bytes = Header {
                traffic_class,
                flow_label,
                payload_len,
                next_header: next_header.into(),
                hop_limit,
                source: source.into(),
                destination: destination.into(),
            }
            .to_bytes();
            let (read, rest) = etherparse::Ipv6Header::from_slice(&bytes).unwrap();
            prop_assert!(rest.is_empty());
            prop_assert_eq!(read.traffic_class, traffic_class);
            prop_assert_eq!(read.flow_label.value(), flow_label & 0xf_ffff);
            prop_assert_eq!(read.payload_length, payload_len);
            prop_assert_eq!(read.next_header.0, next_header);
            prop_assert_eq!(read.hop_limit, hop_limit);
            prop_assert_eq!((read.source, read.destination), (source, destination));
        }

        /// An independent parser passes over the same headers.
        #[test]
        fn the_way_is_that_of_an_independent_parser(
            headers in proptest::collection::vec(extension(), 0..6),
            last in proptest::sample::select(vec![6u8, UDP, 58, 59, 50, 132]),
        ) {
            let packet = chain(&headers, last, &[0x11; 24]);
            let (theirs, next, rest) =
                Ipv6Extensions::from_slice(packet[6].into(), &packet[40..]).unwrap();
            let ours = upper_layer(&packet);
            // It reads each kind once, in the usual order; the rest is left.
            if next.0 == last && rest.len() == 24 {
                let ours = ours.unwrap();
                prop_assert_eq!((ours.protocol, ours.offset), (last, packet.len() - 24));
                let theirs = theirs.fragment;
                prop_assert_eq!(
                    ours.fragment.map(|it| (it.offset, it.more, it.id)),
                    theirs.map(|it| (it.fragment_offset.value() * 8, it.more_fragments, it.identification))
                );
            } else if let Ok(ours) = ours {
                prop_assert_eq!((ours.protocol, ours.offset), (last, packet.len() - 24));
            }
        }

        /// It reads nothing behind the end, whatever the bytes are, and finds the same in a packet that
        /// goes on.
        #[test]
        fn a_walk_ends_inside(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..400),
            kinds in proptest::collection::vec(proptest::sample::select(vec![0u8, 43, 44, 51, 60, 58]), 4),
            lens in proptest::collection::vec(0u8..4, 4),
            cut in 0usize..400,
        ) {
            let mut at = 40;
            for (kind, len) in kinds.iter().zip(&lens) {
                let place = if at == 40 { 6 } else { at };
                if let Some(byte) = bytes.get_mut(place) {
                    *byte = *kind;
                }
                if at != 40 && let Some(byte) = bytes.get_mut(at + 1) {
                    *byte = *len;
                }
                at += 8 * (usize::from(*len) + 1);
            }
            let _ = unknown_option(&bytes);
            let whole = upper_layer(&bytes);
            let part = upper_layer(&bytes[..cut.min(bytes.len())]);
            if let Ok(upper) = whole {
                prop_assert!(upper.offset <= bytes.len() && upper.protocol_at < upper.offset);
                prop_assert_eq!(bytes[upper.protocol_at], upper.protocol);
                prop_assert!(upper.offset <= HEADER_LEN + MAX_EXTENSIONS_LEN);
            }
            if let Ok(part) = part {
                prop_assert_eq!(whole, Ok(part));
            }
        }
    }

    /// The kinds that etherparse writes by itself are the same bytes.
    #[test]
    fn headers_by_an_independent_writer_are_read() {
        let raw = Ipv6RawExtHeader::new_raw(UDP.into(), &[1, 2, 0, 0, 1, 2]).unwrap();
        let piece = Ipv6FragmentHeader::new(UDP.into(), 9.try_into().unwrap(), true, 0x0102_0304);
        let packet = chain(
            &[
                (OPTIONS, raw.to_bytes().to_vec()),
                (FRAGMENT, piece.to_bytes().to_vec()),
            ],
            UDP,
            &[0; 16],
        );
        let info = upper_layer(&packet).unwrap().fragment.unwrap();
        assert_eq!((info.offset, info.more, info.id), (72, true, 0x0102_0304));
    }
}
