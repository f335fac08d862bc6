//! ICMP errors about packets that cannot go on (RFC 792, RFC 1122 section 3.2.2, RFC 1812 4.3), and
//! those of ICMPv6 ([`v6`]).

use std::net::{IpAddr, Ipv4Addr};

use muslin_encap::ip::{checksum, v4};
use smoltcp::time::Instant;
use smoltcp::wire::{Icmpv4Packet, IpProtocol, Ipv4Packet};

use crate::bucket::TokenBucket;

pub mod v6;

/// The longest error in bytes, with its IP header, of either version.
pub const MAX_LEN: usize = v6::MAX_LEN;
/// The longest error of IPv4 in bytes, with its IP header (RFC 1812 section 4.3.2.3).
pub const MAX_LEN_V4: usize = 576;

/// Bytes of an ICMP header (RFC 792), and of an ICMPv6 header of the kinds that are here (RFC 4443).
pub(crate) const HEADER_LEN: usize = 8;
const HEADERS_LEN: usize = v4::HEADER_LEN + HEADER_LEN;
/// ICMP errors are internetwork control (RFC 1812 section 4.3.2.5), as CS6 has it (RFC 4594 section 3.1).
const DSCP: u8 = 48;

/// An error a router may have to report, of either version. Types and codes are those of IPv4; those
/// of IPv6 are in [`v6`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IcmpError {
    /// Type 11 code 0: the time to live ended in transit.
    TimeExceeded,
    /// Type 11 code 1: the other fragments did not come in time.
    ReassemblyTimeExceeded,
    /// Type 3 code 0: no route.
    NetUnreachable,
    /// Type 3 code 1: the destination does not answer.
    HostUnreachable,
    /// Type 3 code 2: nobody takes that protocol there.
    ProtocolUnreachable,
    /// Type 3 code 3: nobody listens there.
    PortUnreachable,
    /// Type 3 code 13: a rule forbids it (RFC 1812 section 5.2.7.1).
    Prohibited,
    /// Type 3 code 4: larger than the next hop's MTU (in bytes) with "don't fragment" set (RFC
    /// 1191 section 4). In IPv6 it is Packet Too Big.
    FragmentationNeeded(u16),
    /// The packet's source is of its link only, which the packet would have to leave. IPv4 has no
    /// code for that but type 3 code 1.
    BeyondScope,
    /// Type 12: there is something wrong with a field of the header or with an option.
    ParameterProblem {
        /// What is wrong, by the codes of ICMPv6 (RFC 4443 section 3.4, RFC 7112 section 5). IPv4 has
        /// code 0 for all.
        code: u8,
        /// Where it is: bytes from the start of the offender.
        pointer: u16,
    },
}

impl IcmpError {
    fn fields(self) -> (u8, u8, u32) {
        match self {
            Self::TimeExceeded => (11, 0, 0),
            Self::ReassemblyTimeExceeded => (11, 1, 0),
            Self::NetUnreachable => (3, 0, 0),
            Self::HostUnreachable | Self::BeyondScope => (3, 1, 0),
            Self::ProtocolUnreachable => (3, 2, 0),
            Self::PortUnreachable => (3, 3, 0),
            Self::Prohibited => (3, 13, 0),
            Self::FragmentationNeeded(mtu) => (3, 4, u32::from(mtu)),
            Self::ParameterProblem { pointer, .. } => (12, 0, u32::from(pointer) << 24),
        }
    }

    /// The error that a message of ICMP with this type and code tells, with the MTU that it names in
    /// bytes; `None` if it is no error that a router has to report.
    #[must_use]
    pub fn from_wire(kind: u8, code: u8, mtu: u32) -> Option<Self> {
        Some(match (kind, code) {
            // What is not known or not reached as a whole (RFC 1812 section 5.2.7.1).
            (3, 0 | 6 | 11) => Self::NetUnreachable,
            (3, 1 | 5 | 7 | 8 | 12) => Self::HostUnreachable,
            (3, 2) => Self::ProtocolUnreachable,
            (3, 3) => Self::PortUnreachable,
            (3, 4) => Self::FragmentationNeeded(mtu.try_into().unwrap_or(u16::MAX)),
            (3, 9 | 10 | 13..=15) => Self::Prohibited,
            (11, 0) => Self::TimeExceeded,
            (11, 1) => Self::ReassemblyTimeExceeded,
            _ => return None,
        })
    }

    /// Writes this error about `offender`, a well-formed IP packet, as a whole packet of the same
    /// version from `source` into `buffer`, and returns its length. It quotes the offender as far as
    /// 576 bytes in IPv4, 1280 bytes in IPv6, and the buffer reach. `None` if there must be no error
    /// about that packet, the source is of the other version, or the buffer is shorter than the
    /// headers.
    #[must_use]
    pub fn write(
        self,
        buffer: &mut [u8],
        source: impl Into<IpAddr>,
        offender: &[u8],
    ) -> Option<usize> {
        match source.into() {
            IpAddr::V4(source) => self.write_v4(buffer, source, offender),
            IpAddr::V6(source) => v6::write(self, buffer, source, offender),
        }
    }

    fn write_v4(self, buffer: &mut [u8], source: Ipv4Addr, offender: &[u8]) -> Option<usize> {
        if !may_answer_v4(offender) {
            return None;
        }
        let room = buffer.len().min(MAX_LEN_V4).checked_sub(HEADERS_LEN)?;
        let quoted = offender.len().min(room);
        let len = HEADERS_LEN + quoted;
        let packet = buffer.get_mut(..len)?;
        let (header, icmp) = packet.split_at_mut(v4::HEADER_LEN);

        let (kind, code, rest) = self.fields();
        icmp[..HEADER_LEN].fill(0);
        icmp[0] = kind;
        icmp[1] = code;
        icmp[4..8].copy_from_slice(&rest.to_be_bytes());
        icmp[HEADER_LEN..].copy_from_slice(&offender[..quoted]);
        let sum = checksum::compute(icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());

        let fields = v4::Header {
            dscp: DSCP,
            total_len: len as u16,
            ident: 0,
            dont_fragment: false,
            ttl: v4::DEFAULT_TTL,
            protocol: IpProtocol::Icmp,
            source,
            destination: Ipv4Packet::new_unchecked(offender).src_addr(),
        };
        header.copy_from_slice(&fields.to_bytes());
        Some(len)
    }
}

/// Whether there may be an ICMP error about `packet`, a well-formed IP packet: in IPv4 not about ICMP
/// errors, fragments but the first, or packets to or from anything but one host (RFC 1122 section
/// 3.2.2); in IPv6 as [`v6::may_answer`] has it.
#[must_use]
pub fn may_answer(packet: &[u8]) -> bool {
    if is_v6(packet) {
        v6::may_answer(packet)
    } else {
        may_answer_v4(packet)
    }
}

fn is_v6(packet: &[u8]) -> bool {
    packet.first().is_some_and(|first| first >> 4 == 6)
}

fn may_answer_v4(packet: &[u8]) -> bool {
    let Ok(packet) = Ipv4Packet::new_checked(packet) else {
        return false;
    };
    if packet.version() != 4 {
        return false;
    }
    let one_host = |address: Ipv4Addr| {
        !(address.is_multicast()
            || address.is_broadcast()
            || address.is_unspecified()
            || address.is_loopback()
            || address.octets()[0] >= 240)
    };
    packet.frag_offset() == 0
        && one_host(packet.src_addr())
        && one_host(packet.dst_addr())
        && (packet.next_header() != IpProtocol::Icmp || is_query(packet.payload()))
}

/// Whether `packet`, a well-formed IP packet, is an ICMP error; in IPv4, ICMP but none of the queries
/// and their answers. What a later fragment belongs to it does not tell.
#[must_use]
pub fn is_error(packet: &[u8]) -> bool {
    if is_v6(packet) {
        return v6::is_error(packet);
    }
    Ipv4Packet::new_checked(packet).is_ok_and(|packet| {
        packet.next_header() == IpProtocol::Icmp
            && packet.frag_offset() == 0
            && !is_query(packet.payload())
    })
}

fn is_query(icmp: &[u8]) -> bool {
    use smoltcp::wire::Icmpv4Message as Message;
    Icmpv4Packet::new_checked(icmp).is_ok_and(|icmp| {
        matches!(
            icmp.msg_type(),
            Message::EchoRequest
                | Message::EchoReply
                | Message::Timestamp
                | Message::TimestampReply
        )
    })
}

/// How many ICMP errors a node may send: Linux' defaults of 1000 a second and bursts of 50
/// (`icmp_msgs_per_sec`, `icmp_msgs_burst`).
#[must_use]
pub const fn error_limit(now: Instant) -> TokenBucket {
    TokenBucket::full(1000, 50, now)
}

#[cfg(test)]
mod tests {
    use etherparse::{Icmpv4Type, icmpv4::DestUnreachableHeader, icmpv4::TimeExceededCode};

    use super::*;

    const POD: [u8; 4] = [10, 244, 1, 2];
    const OTHER: [u8; 4] = [10, 244, 2, 3];
    const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);

    fn udp(source: [u8; 4], destination: [u8; 4], payload: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ipv4(source, destination, 1)
            .udp(1, 2)
            .write(&mut bytes, &vec![7; payload])
            .unwrap();
        bytes
    }

    fn icmp(kind: Icmpv4Type) -> Vec<u8> {
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ipv4(POD, OTHER, 1)
            .icmpv4(kind)
            .write(&mut bytes, &[0; 30])
            .unwrap();
        bytes
    }

    #[test]
    fn errors_are_what_an_independent_parser_reads() {
        let offender = udp(POD, OTHER, 1000);
        let cases = [
            (
                IcmpError::TimeExceeded,
                Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit),
            ),
            (
                IcmpError::ReassemblyTimeExceeded,
                Icmpv4Type::TimeExceeded(TimeExceededCode::FragmentReassemblyTimeExceeded),
            ),
            (
                IcmpError::NetUnreachable,
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Network),
            ),
            (
                IcmpError::HostUnreachable,
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Host),
            ),
            (
                IcmpError::ProtocolUnreachable,
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Protocol),
            ),
            (
                IcmpError::PortUnreachable,
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port),
            ),
            (
                IcmpError::Prohibited,
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FilterProhibited),
            ),
            (
                IcmpError::FragmentationNeeded(1450),
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                    next_hop_mtu: 1450,
                }),
            ),
        ];
        for (error, expected) in cases {
            let mut buffer = [0xaa; 600];
            let len = error.write(&mut buffer, GATEWAY, &offender).unwrap();
            assert_eq!(len, MAX_LEN_V4);
            let (ip, rest) = etherparse::Ipv4Header::from_slice(&buffer[..len]).unwrap();
            assert_eq!(ip.calc_header_checksum(), ip.header_checksum);
            assert_eq!((ip.source, ip.destination), (GATEWAY.octets(), POD));
            assert_eq!((buffer[1], ip.time_to_live), (0xc0, 64));
            assert_eq!(usize::from(ip.total_len), len);
            let icmp = etherparse::Icmpv4Slice::from_slice(rest).unwrap();
            assert_eq!(icmp.header().icmp_type, expected);
            assert_eq!(
                icmp.header().checksum,
                expected.calc_checksum(icmp.payload())
            );
            assert_eq!(icmp.payload(), &offender[..MAX_LEN_V4 - 28]);
            let (kind, code, rest) = error.fields();
            assert_eq!(IcmpError::from_wire(kind, code, rest), Some(error));
        }
    }

    #[test]
    fn there_are_no_errors_about_what_must_not_be_answered() {
        use etherparse::IcmpEchoHeader;
        assert!(may_answer(&udp(POD, OTHER, 0)));
        assert!(may_answer(&icmp(Icmpv4Type::EchoRequest(IcmpEchoHeader {
            id: 1,
            seq: 1
        }))));
        assert!(!may_answer(&icmp(Icmpv4Type::DestinationUnreachable(
            DestUnreachableHeader::Host
        ))));
        assert!(!may_answer(&icmp(Icmpv4Type::Unknown {
            type_u8: 99,
            code_u8: 0,
            bytes5to8: [0; 4]
        })));
        for bad in [
            [224, 0, 0, 1],
            [255; 4],
            [0; 4],
            [127, 0, 0, 1],
            [240, 0, 0, 1],
        ] {
            assert!(!may_answer(&udp(bad, OTHER, 0)), "from {bad:?}");
            assert!(!may_answer(&udp(POD, bad, 0)), "to {bad:?}");
        }
        let mut fragment = udp(POD, OTHER, 0);
        fragment[7] = 1;
        assert!(!may_answer(&fragment));
        assert_eq!(
            IcmpError::TimeExceeded.write(&mut [0; 27], GATEWAY, &udp(POD, OTHER, 0)),
            None
        );
    }
}
