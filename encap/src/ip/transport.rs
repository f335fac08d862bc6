//! Where the headers of a packet are: IPv4 or IPv6, then TCP or UDP.
//!
//! [`Transport::parse`] walks over the headers and checks them once. Every offset of a
//! [`Transport`] lies inside the packet that it was made from, so that later code may index.

use smoltcp::wire::IpVersion;
use thiserror::Error;

use crate::bytes::be16;
use crate::ip::checksum::{self, add};
use crate::ip::{v4, v6};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERNET_HEADER_LEN: usize = 14;

/// Bytes of a UDP header.
pub const UDP_HEADER_LEN: usize = 8;
/// Bytes of a TCP header without options.
pub const TCP_HEADER_LEN: usize = 20;

/// Offsets and flags in a TCP header (RFC 9293 section 3.1).
pub(crate) mod tcp {
    pub(crate) const SEQUENCE: usize = 4;
    pub(crate) const ACK_NUMBER: usize = 8;
    pub(crate) const DATA_OFFSET: usize = 12;
    pub(crate) const FLAGS: usize = 13;
    pub(crate) const WINDOW: usize = 14;
    pub(crate) const CHECKSUM: usize = 16;
    pub(crate) const URGENT: usize = 18;

    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const SYN: u8 = 0x02;
    pub(crate) const RST: u8 = 0x04;
    pub(crate) const PSH: u8 = 0x08;
    pub(crate) const ACK: u8 = 0x10;
    pub(crate) const URG: u8 = 0x20;
    pub(crate) const CWR: u8 = 0x80;

    /// Kinds of options (RFC 9293 section 3.1, RFC 2018).
    pub(crate) mod option {
        pub(crate) const END: u8 = 0;
        pub(crate) const NO_OPERATION: u8 = 1;
        pub(crate) const MAX_SEGMENT_SIZE: u8 = 2;
        pub(crate) const SACK: u8 = 5;
    }
}

/// Offsets in a UDP header (RFC 768).
pub(crate) mod udp {
    pub(crate) const LENGTH: usize = 4;
    pub(crate) const CHECKSUM: usize = 6;
}

/// A transport protocol that segmentation offload knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP, protocol number 6.
    Tcp,
    /// UDP, protocol number 17.
    Udp,
}

impl Protocol {
    /// The protocol number in an IP header.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Offset of the checksum in the header, in bytes.
    #[must_use]
    pub const fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => tcp::CHECKSUM,
            Self::Udp => udp::CHECKSUM,
        }
    }
}

/// Why there is no complete TCP or UDP packet at the expected place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// The IPv4 header is malformed.
    #[error(transparent)]
    Ipv4(#[from] v4::Error),
    /// Fewer bytes than the headers have.
    #[error("{len} bytes are too few for the packet's headers")]
    TooShort {
        /// The number of bytes, including those in front of the IP header.
        len: usize,
    },
    /// The type in the link header does not match the IP version.
    #[error("the link header has type {0:#06x}")]
    EtherType(u16),
    /// Neither IPv4 nor IPv6.
    #[error("IP version {0}")]
    Version(u8),
    /// A length field of TCP, UDP or IPv6 contradicts another one or the number of bytes.
    #[error("a length field says {claimed} where there are {len} bytes")]
    Length {
        /// The field's value in bytes.
        claimed: usize,
        /// The bytes that are there, or that another field leaves.
        len: usize,
    },
    /// The packet is a fragment.
    #[error("a fragment")]
    Fragment,
    /// The packet has an IPv6 extension header that cannot be skipped.
    #[error("IPv6 extension header {0}")]
    ExtensionHeader(u8),
    /// Neither TCP nor UDP.
    #[error("IP protocol {0}")]
    Protocol(u8),
}

impl Error {
    /// Whether the packet may be one of a TCP or UDP flow all the same.
    pub(crate) const fn may_hide_flow(self) -> bool {
        match self {
            Self::EtherType(_) | Self::Version(_) | Self::Protocol(_) => false,
            Self::Ipv4(_)
            | Self::TooShort { .. }
            | Self::Length { .. }
            | Self::Fragment
            | Self::ExtensionHeader(_) => true,
        }
    }
}

/// The state of the checksum of a TCP or UDP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChecksumState {
    /// The field holds the sum of the pseudo header: the checksum is still to be completed, or it
    /// is complete and equals that sum by chance.
    Partial,
    /// The checksum is right, or a UDP datagram over IPv4 has none.
    Valid,
    /// The checksum is wrong.
    Invalid,
}

/// Where the parts of a TCP or UDP packet are: offsets in bytes from the start of the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    /// Version of the network layer.
    pub version: IpVersion,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The IP header. What is in front of it is the caller's.
    pub l3: usize,
    /// The TCP or UDP header; it ends at `payload`.
    pub l4: usize,
    /// The transport's payload.
    pub payload: usize,
    /// The end of the IP packet; padding may follow.
    pub end: usize,
}

impl Transport {
    /// Finds the headers of the packet whose IP header is at `l3`. If there are 14 bytes or more in
    /// front of it, they end in an Ethernet header, whose type is checked.
    ///
    /// # Errors
    /// The first thing that is wrong with the headers.
    pub fn parse(packet: &[u8], l3: usize) -> Result<Self, Error> {
        let too_short = Error::TooShort { len: packet.len() };
        let bytes = packet.get(l3..).ok_or(too_short)?;
        let version = bytes.first().ok_or(too_short)? >> 4;
        if l3 >= ETHERNET_HEADER_LEN {
            let announced = be16(packet, l3 - 2);
            if !matches!(
                (announced, version),
                (ETHERTYPE_IPV4, 4) | (ETHERTYPE_IPV6, 6)
            ) {
                return Err(Error::EtherType(announced));
            }
        }
        let (version, l4, end, number) = match version {
            4 => network_v4(bytes).map(|(l4, end, next)| (IpVersion::Ipv4, l4, end, next))?,
            6 => network_v6(bytes).map(|(l4, end, next)| (IpVersion::Ipv6, l4, end, next))?,
            other => return Err(Error::Version(other)),
        };
        let segment = &bytes[l4..end];
        let (protocol, header_len) = match number {
            6 => (Protocol::Tcp, tcp_header_len(segment)?),
            17 => (Protocol::Udp, udp_header_len(segment)?),
            other => return Err(Error::Protocol(other)),
        };
        Ok(Self {
            version,
            protocol,
            l3,
            l4: l3 + l4,
            payload: l3 + l4 + header_len,
            end: l3 + end,
        })
    }

    /// Length of the payload in bytes.
    #[must_use]
    pub const fn payload_len(&self) -> usize {
        self.end - self.payload
    }

    /// Offset of the checksum field.
    #[must_use]
    pub const fn checksum_offset(&self) -> usize {
        self.l4 + self.protocol.checksum_offset()
    }

    /// Whether a checksum that is summed from `start`, and has its field `offset` bytes behind it, is
    /// this packet's own.
    #[must_use]
    pub fn has_checksum_at(&self, start: u16, offset: u16) -> bool {
        let own = (self.l4, self.protocol.checksum_offset());
        own == (start.into(), offset.into())
    }

    /// The sum of the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) for `len` bytes of
    /// transport header and payload: folded, not inverted, in host order.
    #[must_use]
    pub fn pseudo_header(&self, packet: &[u8], len: usize) -> u16 {
        let addresses = match self.version {
            IpVersion::Ipv4 => self.l3 + v4::field::SOURCE..self.l3 + v4::HEADER_LEN,
            IpVersion::Ipv6 => self.l3 + v6::field::ADDRESSES..self.l3 + v6::HEADER_LEN,
        };
        let addresses = checksum::sum(packet.get(addresses).unwrap_or_default());
        // No packet here is longer than 16 bits can say.
        add(
            addresses,
            add(self.protocol.number().into(), len.min(0xffff) as u16),
        )
    }

    /// Whether the checksum field holds the sum of the pseudo header only. This reads no payload.
    #[must_use]
    pub fn is_partial(&self, packet: &[u8]) -> bool {
        self.holds(packet, self.pseudo_header(packet, self.end - self.l4))
    }

    /// Whether the checksum field holds this value.
    fn holds(&self, packet: &[u8], value: u16) -> bool {
        let field = self.checksum_offset();
        packet.get(field..field + 2) == Some(&value.to_be_bytes())
    }

    /// Verifies the checksum of the packet: one pass over it, unless its checksum is partial.
    #[must_use]
    pub fn checksum_state(&self, packet: &[u8]) -> ChecksumState {
        let pseudo = self.pseudo_header(packet, self.end - self.l4);
        if self.holds(packet, pseudo) {
            return ChecksumState::Partial;
        }
        if self.protocol == Protocol::Udp && self.holds(packet, 0) {
            return match self.version {
                IpVersion::Ipv4 => ChecksumState::Valid,
                // RFC 8200 section 8.1: there must be one.
                IpVersion::Ipv6 => ChecksumState::Invalid,
            };
        }
        let segment = packet.get(self.l4..self.end).unwrap_or_default();
        match add(pseudo, checksum::sum(segment)) {
            0xffff => ChecksumState::Valid,
            _ => ChecksumState::Invalid,
        }
    }

    /// Whether the checksum is right or still to be completed.
    pub(crate) fn is_intact(&self, packet: &[u8]) -> bool {
        self.checksum_state(packet) != ChecksumState::Invalid
    }
}

/// Completes the checksum of the TCP or UDP packet whose IP header is at `l3`, if it is partial.
/// Returns whether it was. Fragments and other packets stay as they are.
///
/// Hosts leave the checksum of a packet to the device: its field then has only the pseudo header's
/// sum (`CHECKSUM_PARTIAL` in Linux). Such packets reach a tunnel's socket when the devices of a
/// kernel peer and of this node are joined by something that forwards packets unchanged, such as a
/// veth pair. They are recognized by that value. A
/// *finished* packet whose field has it by chance (one in 65,536) is not harmed: the checksum is
/// computed anew over the same bytes, and that of an intact packet comes out as it was. What is
/// lost is that a packet which was damaged on its way *and* has that value is no longer noticed:
/// the one in 65,536 damaged packets that a 16-bit checksum lets through anyway.
pub fn complete_partial(packet: &mut [u8], l3: usize) -> bool {
    let Ok(at) = Transport::parse(packet, l3) else {
        return false;
    };
    let partial = at.is_partial(packet);
    let offset = at.protocol.checksum_offset();
    partial && checksum::complete(&mut packet[..at.end], at.l4, offset).is_some()
}

/// Offset of the transport header, total length and transport protocol.
type Network = Result<(usize, usize, u8), Error>;

fn network_v4(bytes: &[u8]) -> Network {
    let (header_len, total) = v4::lengths(bytes, bytes.len())?;
    if v4::is_fragment(bytes) {
        return Err(Error::Fragment);
    }
    Ok((header_len, total, bytes[v4::field::PROTOCOL]))
}

/// Passes over the extension headers that change nothing for the transport.
fn network_v6(bytes: &[u8]) -> Network {
    let len = bytes.len();
    if len < v6::HEADER_LEN {
        return Err(Error::TooShort { len });
    }
    let end = v6::HEADER_LEN + usize::from(be16(bytes, v6::field::PAYLOAD_LEN));
    if end > len {
        return Err(Error::Length { claimed: end, len });
    }
    let (mut at, mut next) = (v6::HEADER_LEN, bytes[v6::field::NEXT_HEADER]);
    loop {
        match next {
            v6::HOP_BY_HOP | v6::OPTIONS => {
                let header = bytes[at..end].first_chunk::<8>();
                let [after, len, ..] = *header.ok_or(Error::TooShort { len: end })?;
                next = after;
                at += 8 + usize::from(len) * 8;
                if at > end {
                    return Err(Error::Length {
                        claimed: at,
                        len: end,
                    });
                }
            }
            v6::FRAGMENT => return Err(Error::Fragment),
            v6::ROUTING | 51 | 135 | 139 | 140 => return Err(Error::ExtensionHeader(next)),
            _ => return Ok((at, end, next)),
        }
    }
}

/// Kind and length of the option at that offset of a TCP header; `None` behind the last one, or if its length is
/// wrong.
pub(crate) fn tcp_option_at(header: &[u8], at: usize) -> Option<(u8, usize)> {
    let kind = *header.get(at)?;
    match kind {
        tcp::option::END => None,
        tcp::option::NO_OPERATION => Some((kind, 1)),
        _ => {
            let len = usize::from(*header.get(at + 1)?);
            (len >= 2 && at + len <= header.len()).then_some((kind, len))
        }
    }
}

pub(crate) fn tcp_header_len(segment: &[u8]) -> Result<usize, Error> {
    let len = segment.len();
    if len < TCP_HEADER_LEN {
        return Err(Error::TooShort { len });
    }
    let claimed = usize::from(segment[tcp::DATA_OFFSET] >> 4) * 4;
    if (TCP_HEADER_LEN..=len).contains(&claimed) {
        Ok(claimed)
    } else {
        Err(Error::Length { claimed, len })
    }
}

fn udp_header_len(datagram: &[u8]) -> Result<usize, Error> {
    let len = datagram.len();
    if len < UDP_HEADER_LEN {
        return Err(Error::TooShort { len });
    }
    let claimed = be16(datagram, udp::LENGTH).into();
    if claimed == len {
        Ok(UDP_HEADER_LEN)
    } else {
        Err(Error::Length { claimed, len })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bytes::put16;
    use crate::testing::udp_packet;

    fn udp4(payload: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 2, 3], 64)
            .udp(1, 2)
            .write(&mut bytes, &vec![7; payload])
            .unwrap();
        bytes
    }

    #[test]
    fn padding_is_not_part_of_the_packet() {
        let mut bytes = udp4(5);
        bytes.extend([0; 13]);
        let at = Transport::parse(&bytes, 0).unwrap();
        assert_eq!((at.l4, at.payload, at.end), (20, 28, 33));
        assert_eq!(at.pseudo_header(&bytes, 13), {
            let sum = (0x0af4u32 + 0x0102) + (0x0af4 + 0x0203) + 17 + 13;
            sum as u16
        });
    }

    #[test]
    fn each_malformation_has_its_own_error() {
        let good = udp4(5);
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            Transport::parse(&bytes, 0)
        };
        let ipv4 = |error| Err(Error::Ipv4(error));
        assert_eq!(with(0, 0x55), Err(Error::Version(5)));
        assert_eq!(with(6, 0x20), Err(Error::Fragment));
        assert_eq!(with(7, 1), Err(Error::Fragment));
        assert_eq!(with(9, 1), Err(Error::Protocol(1)));
        let (total, len) = (34, 33);
        assert_eq!(with(3, 34), ipv4(v4::Error::TotalLen { total, len }));
        assert_eq!(with(0, 0x44), ipv4(v4::Error::HeaderLen(16)));
        let (claimed, len) = (14, 13);
        assert_eq!(with(25, 14), Err(Error::Length { claimed, len }));
        let len = 19;
        assert_eq!(
            Transport::parse(&good[..19], 0),
            ipv4(v4::Error::TooShort { len })
        );
        let len = 33;
        assert_eq!(Transport::parse(&good, 40), Err(Error::TooShort { len }));
        let framed = [&[0; 12][..], &[0x86, 0xdd], &good].concat();
        assert_eq!(Transport::parse(&framed, 14), Err(Error::EtherType(0x86dd)));
    }

    #[test]
    fn ipv6_extension_headers_are_passed_over_where_they_may_be() {
        let packet = |chain: &[u8], first: u8| {
            let len = (chain.len() + 8) as u8;
            let mut bytes = vec![0x60, 0, 0, 0, 0, len, first, 64];
            bytes.extend([9; 32]);
            bytes.extend(chain);
            bytes.extend([0, 1, 0, 2, 0, 8, 0, 0]);
            bytes
        };
        let options = [60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0];
        let at = Transport::parse(&packet(&options, 0), 0).unwrap();
        assert_eq!((at.l4, at.payload, at.end), (56, 64, 64));
        let routing = [17, 0, 1, 4, 0, 0, 0, 0];
        assert_eq!(
            Transport::parse(&packet(&routing, 43), 0),
            Err(Error::ExtensionHeader(43))
        );
        assert_eq!(
            Transport::parse(&packet(&routing, 44), 0),
            Err(Error::Fragment)
        );
        let endless = [0, 255, 1, 4, 0, 0, 0, 0];
        assert!(Transport::parse(&packet(&endless, 0), 0).is_err());
    }

    #[test]
    fn a_partial_checksum_is_found_and_completed() {
        let good = udp_packet(b"odd");
        let mut partial = good.clone();
        let at = Transport::parse(&partial, 0).unwrap();
        let pseudo = at.pseudo_header(&partial, 11);
        partial[26..28].copy_from_slice(&pseudo.to_be_bytes());
        assert_eq!(at.checksum_state(&partial), ChecksumState::Partial);
        partial.extend([9; 9]);
        assert!(complete_partial(&mut partial, 0));
        assert_eq!(partial[..31], good, "padding does not count");
        assert_eq!(at.checksum_state(&partial), ChecksumState::Valid);
        assert!(!complete_partial(&mut partial, 0));
        partial[30] ^= 1;
        assert_eq!(at.checksum_state(&partial), ChecksumState::Invalid);
        partial[26..28].fill(0);
        assert_eq!(
            at.checksum_state(&partial),
            ChecksumState::Valid,
            "it has none"
        );
        partial[26..28].copy_from_slice(&pseudo.to_be_bytes());
        partial[6] = 0x20;
        assert!(!complete_partial(&mut partial, 0), "a fragment");
    }

    #[test]
    fn a_complete_checksum_that_looks_partial_stays_as_it_is() {
        // Two bytes of payload can bring the checksum to any value.
        let mut packet = udp_packet(&[0, 0]);
        let at = Transport::parse(&packet, 0).unwrap();
        let pseudo = at.pseudo_header(&packet, 10);
        let missing = add(!pseudo, u16::from_be_bytes([packet[26], packet[27]]));
        packet[28..30].copy_from_slice(&missing.to_be_bytes());
        packet[26..28].copy_from_slice(&pseudo.to_be_bytes());
        assert_eq!(
            add(pseudo, checksum::sum(&packet[20..])),
            0xffff,
            "it is right"
        );
        let before = packet.clone();
        assert!(complete_partial(&mut packet, 0));
        assert_eq!(packet, before);
    }

    proptest! {
        #[test]
        fn offsets_lie_inside(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..120),
            first in prop::sample::select(vec![0x45u8, 0x46, 0x60]),
            protocol in prop::sample::select(vec![6u8, 17, 0, 60]),
            l3 in 0usize..20,
        ) {
            if let Some(ip) = bytes.get_mut(l3..).filter(|ip| ip.len() > 60) {
                let len = ip.len() as u16;
                ip[0] = first;
                if first == 0x60 {
                    ip[6] = protocol;
                    put16(ip, v6::field::PAYLOAD_LEN, len - 40);
                } else {
                    ip[9] = protocol;
                    put16(ip, v4::field::TOTAL_LEN, len);
                    put16(ip, v4::field::FRAGMENT, 0);
                }
            }
            if let Ok(at) = Transport::parse(&bytes, l3) {
                prop_assert!(at.l3 < at.l4 && at.l4 < at.payload);
                prop_assert!(at.payload <= at.end && at.end <= bytes.len());
                prop_assert!(at.checksum_offset() + 2 <= at.payload);
            }
        }
    }
}
