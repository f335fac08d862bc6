//! ICMPv6 errors (RFC 4443).

use std::net::Ipv6Addr;

use muslin_encap::ip::v6;
use smoltcp::wire::{IpProtocol, Ipv6Packet};

use super::{DSCP, HEADER_LEN, IcmpError};
use crate::datapath::guard;
use crate::datapath::ndp;

/// The longest error in bytes, with its IPv6 header: the smallest MTU of all links (RFC 4443 section
/// 2.4 c).
pub const MAX_LEN: usize = v6::MIN_MTU as usize;

const HEADERS_LEN: usize = v6::HEADER_LEN + HEADER_LEN;
/// Types below are errors (RFC 4443 section 2.1).
const FIRST_QUERY: u8 = 128;
/// An option is not known, of a kind that says so even where many receive the packet.
const UNKNOWN_OPTION: u8 = 2;
/// A protocol or extension header is not known.
const UNKNOWN_NEXT_HEADER: u8 = 1;

impl IcmpError {
    /// Type, code and the four bytes behind the checksum.
    fn fields_v6(self, offender: &[u8]) -> (u8, u8, u32) {
        match self {
            Self::NetUnreachable => (1, 0, 0),
            Self::Prohibited => (1, 1, 0),
            Self::BeyondScope => (1, 2, 0),
            Self::HostUnreachable => (1, 3, 0),
            Self::PortUnreachable => (1, 4, 0),
            // No path that carries IPv6 takes less (RFC 8201 section 4).
            Self::FragmentationNeeded(mtu) => (2, 0, mtu.max(v6::MIN_MTU).into()),
            Self::TimeExceeded => (3, 0, 0),
            Self::ReassemblyTimeExceeded => (3, 1, 0),
            Self::ParameterProblem { code, pointer } => (4, code, pointer.into()),
            Self::ProtocolUnreachable => {
                let at = v6::upper_layer(offender).map_or(0, |upper| upper.protocol_at);
                (4, UNKNOWN_NEXT_HEADER, at as u32)
            }
        }
    }

    /// The error that a message of ICMPv6 with this type and code tells, with the MTU that it names in
    /// bytes; `None` if it is no error that a router has to report.
    #[must_use]
    pub fn from_wire_v6(kind: u8, code: u8, mtu: u32) -> Option<Self> {
        Some(match (kind, code) {
            (1, 0) => Self::NetUnreachable,
            // A source that a rule refuses, and a route that rejects, are prohibitions, too.
            (1, 1 | 5 | 6) => Self::Prohibited,
            (1, 2) => Self::BeyondScope,
            (1, 3) => Self::HostUnreachable,
            (1, 4) => Self::PortUnreachable,
            // Receivers ignore its code (RFC 4443 section 3.2).
            (2, _) => Self::FragmentationNeeded(mtu.try_into().unwrap_or(u16::MAX)),
            (3, 0) => Self::TimeExceeded,
            (3, 1) => Self::ReassemblyTimeExceeded,
            (4, UNKNOWN_NEXT_HEADER) => Self::ProtocolUnreachable,
            _ => return None,
        })
    }

    /// Whether the error may be about a packet to many receivers (RFC 4443 section 2.4 e.3).
    const fn may_answer_multicast(self) -> bool {
        matches!(
            self,
            Self::FragmentationNeeded(_)
                | Self::ParameterProblem {
                    code: UNKNOWN_OPTION,
                    ..
                }
        )
    }

    /// Whether the error is about headers, so that it may be about a packet of which nobody knows what
    /// is behind them.
    const fn is_about_headers(self) -> bool {
        matches!(self, Self::ParameterProblem { .. })
    }
}

/// Writes an error as [`IcmpError::write`] does.
pub(super) fn write(
    error: IcmpError,
    buffer: &mut [u8],
    source: Ipv6Addr,
    offender: &[u8],
) -> Option<usize> {
    if !may_have(Some(error), offender) {
        return None;
    }
    let room = buffer.len().min(MAX_LEN).checked_sub(HEADERS_LEN)?;
    let quoted = offender.len().min(room);
    let len = HEADERS_LEN + quoted;
    let packet = buffer.get_mut(..len)?;
    let fields = v6::Header {
        traffic_class: DSCP << 2,
        flow_label: 0,
        payload_len: (HEADER_LEN + quoted) as u16,
        next_header: IpProtocol::Icmpv6,
        hop_limit: v6::DEFAULT_HOP_LIMIT,
        source,
        destination: Ipv6Packet::new_unchecked(offender).src_addr(),
    };
    let (header, icmp) = packet.split_at_mut(v6::HEADER_LEN);
    header.copy_from_slice(&fields.to_bytes());
    let (kind, code, rest) = error.fields_v6(offender);
    icmp[..4].copy_from_slice(&[kind, code, 0, 0]);
    icmp[4..HEADER_LEN].copy_from_slice(&rest.to_be_bytes());
    icmp[HEADER_LEN..].copy_from_slice(&offender[..quoted]);
    v6::fill_icmp_checksum(packet, v6::HEADER_LEN);
    Some(len)
}

/// Whether there may be an ICMPv6 error about `packet`, a well-formed IPv6 packet: not about ICMPv6
/// errors and Redirects, packets from anything but one host (RFC 4443 section 2.4 e), packets whose
/// extension headers hide whether they are errors, or fragments but the first, which hide it, too.
/// That a packet for many receivers may be too big, or have an unknown option, [`IcmpError::write`]
/// knows.
#[must_use]
pub fn may_answer(packet: &[u8]) -> bool {
    may_have(None, packet)
}

fn may_have(error: Option<IcmpError>, packet: &[u8]) -> bool {
    if v6::check(packet).is_err() {
        return false;
    }
    let view = Ipv6Packet::new_unchecked(packet);
    let (source, destination) = (view.src_addr(), view.dst_addr());
    if guard::is_martian_v6(source) || source.is_unspecified() {
        return false;
    }
    if destination.is_multicast() && !error.is_some_and(IcmpError::may_answer_multicast) {
        return false;
    }
    match v6::upper_layer(packet) {
        Ok(upper) if upper.is_later_fragment() => false,
        Ok(upper) if is_icmp(upper.protocol) => {
            let kind = packet.get(upper.offset);
            kind.is_some_and(|kind| *kind >= FIRST_QUERY && *kind != ndp::REDIRECT)
        }
        Ok(_) => true,
        Err(_) => error.is_some_and(IcmpError::is_about_headers),
    }
}

/// Whether `packet`, a well-formed IPv6 packet, is an ICMPv6 error. What a later fragment belongs to it
/// does not tell.
pub(super) fn is_error(packet: &[u8]) -> bool {
    v6::upper_layer(packet).is_ok_and(|upper| {
        let kind = packet.get(upper.offset);
        is_icmp(upper.protocol)
            && !upper.is_later_fragment()
            && kind.is_some_and(|kind| *kind < FIRST_QUERY)
    })
}

fn is_icmp(protocol: u8) -> bool {
    IpProtocol::from(protocol) == IpProtocol::Icmpv6
}

#[cfg(test)]
mod tests {
    use etherparse::Icmpv6Type;
    use etherparse::icmpv6::ParameterProblemHeader;
    use etherparse::icmpv6::{DestUnreachableCode, ParameterProblemCode, TimeExceededCode};

    use super::*;
    use crate::datapath::icmp;

    const POD: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 2);
    const OTHER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 2, 0, 0, 0, 3);
    const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 1);
    const GROUP: Ipv6Addr = Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0, 5);

    fn packet(source: Ipv6Addr, destination: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
        let header = v6::Header {
            traffic_class: 0,
            flow_label: 0,
            payload_len: payload.len() as u16,
            next_header: next.into(),
            hop_limit: 1,
            source,
            destination,
        };
        [&header.to_bytes()[..], payload].concat()
    }

    fn udp(source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
        packet(source, destination, 17, &[7; 2000])
    }

    fn icmp_of(kind: u8) -> Vec<u8> {
        packet(POD, OTHER, 58, &[kind, 0, 0, 0, 0, 0, 0, 0])
    }

    /// v6LC.5.1.2 to 5.1.10: types and codes, the quote and its length.
    #[test]
    fn errors_are_what_an_independent_parser_reads() {
        let offender = udp(POD, OTHER);
        let unreachable = Icmpv6Type::DestinationUnreachable;
        let problem =
            |code, pointer| Icmpv6Type::ParameterProblem(ParameterProblemHeader { code, pointer });
        let cases = [
            (
                IcmpError::NetUnreachable,
                unreachable(DestUnreachableCode::NoRoute),
            ),
            (
                IcmpError::Prohibited,
                unreachable(DestUnreachableCode::Prohibited),
            ),
            (
                IcmpError::BeyondScope,
                unreachable(DestUnreachableCode::BeyondScope),
            ),
            (
                IcmpError::HostUnreachable,
                unreachable(DestUnreachableCode::Address),
            ),
            (
                IcmpError::PortUnreachable,
                unreachable(DestUnreachableCode::Port),
            ),
            (
                IcmpError::FragmentationNeeded(1430),
                Icmpv6Type::PacketTooBig { mtu: 1430 },
            ),
            (
                IcmpError::TimeExceeded,
                Icmpv6Type::TimeExceeded(TimeExceededCode::HopLimitExceeded),
            ),
            (
                IcmpError::ReassemblyTimeExceeded,
                Icmpv6Type::TimeExceeded(TimeExceededCode::FragmentReassemblyTimeExceeded),
            ),
            (
                IcmpError::ProtocolUnreachable,
                problem(ParameterProblemCode::UnrecognizedNextHeader, 6),
            ),
        ];
        for (error, expected) in cases {
            let mut buffer = [0xaa; 1400];
            let len = error.write(&mut buffer, GATEWAY, &offender).unwrap();
            assert_eq!(len, 1280);
            let (ip, rest) = etherparse::Ipv6Header::from_slice(&buffer[..len]).unwrap();
            assert_eq!(
                (ip.source, ip.destination),
                (GATEWAY.octets(), POD.octets())
            );
            assert_eq!(
                (ip.traffic_class, ip.hop_limit, ip.next_header.0),
                (0xc0, 64, 58)
            );
            assert_eq!(usize::from(ip.payload_length), len - 40);
            let icmp = etherparse::Icmpv6Slice::from_slice(rest).unwrap();
            assert_eq!(icmp.header().icmp_type, expected);
            assert_eq!(icmp.payload(), &offender[..1280 - 48]);
            let sum = expected.calc_checksum(ip.source, ip.destination, icmp.payload());
            assert_eq!(Ok(icmp.header().checksum), sum);
            let (kind, code, rest) = error.fields_v6(&offender);
            assert_eq!(IcmpError::from_wire_v6(kind, code, rest), Some(error));
            assert!(icmp::is_error(&buffer[..len]));
            assert!(!may_answer(&buffer[..len]));
        }
    }

    #[test]
    fn a_problem_is_where_it_is_said_to_be() {
        let fields = |error: IcmpError, offender: &[u8]| {
            let mut buffer = [0; 200];
            let len = error.write(&mut buffer, GATEWAY, offender).unwrap();
            assert_eq!(
                len,
                (48 + offender.len()).min(200),
                "as far as there is room"
            );
            let rest = buffer[44..48].first_chunk().unwrap();
            (buffer[40], buffer[41], u32::from_be_bytes(*rest))
        };
        let (code, pointer) = (0, 4);
        let problem = IcmpError::ParameterProblem { code, pointer };
        assert_eq!(fields(problem, &udp(POD, OTHER)), (4, 0, 4));
        // The last of two headers in front of it names the protocol.
        let options = [
            &[60, 0, 1, 4, 0, 0, 0, 0][..],
            &[200, 0, 1, 4, 0, 0, 0, 0],
            &[0; 20],
        ];
        let behind = packet(POD, OTHER, 60, &options.concat());
        assert_eq!(fields(IcmpError::ProtocolUnreachable, &behind), (4, 1, 48));
        // No path that carries IPv6 has a smaller MTU.
        assert_eq!(
            fields(IcmpError::FragmentationNeeded(68), &behind),
            (2, 0, 1280)
        );
    }

    #[test]
    fn errors_of_others_are_understood() {
        for (kind, code, expected) in [
            (1, 5, Some(IcmpError::Prohibited)),
            (1, 6, Some(IcmpError::Prohibited)),
            (1, 7, None),
            (2, 9, Some(IcmpError::FragmentationNeeded(u16::MAX))),
            (3, 2, None),
            (4, 0, None),
            (4, 2, None),
            (128, 0, None),
            (137, 0, None),
        ] {
            assert_eq!(
                IcmpError::from_wire_v6(kind, code, 70_000),
                expected,
                "{kind} {code}"
            );
        }
    }

    /// v6LC.5.1.5 and 5.1.12, RFC 4443 section 2.4 e.
    #[test]
    fn there_are_no_errors_about_what_must_not_be_answered() {
        let writes = |error: IcmpError, offender: &[u8]| {
            error.write(&mut [0; MAX_LEN], GATEWAY, offender).is_some()
        };
        let code = |code| IcmpError::ParameterProblem { code, pointer: 0 };
        for kind in [128, 129, 130, 131, 135, 136, 200, 255] {
            assert!(may_answer(&icmp_of(kind)), "{kind}");
        }
        for kind in [1, 2, 3, 4, 100, 127, 137] {
            assert!(!may_answer(&icmp_of(kind)), "{kind}");
            // Nor behind other headers.
            let payload = [&[58, 0, 1, 4, 0, 0, 0, 0][..], &icmp_of(kind)[40..]].concat();
            for next in [0, 60, 44] {
                assert!(
                    !may_answer(&packet(POD, OTHER, next, &payload)),
                    "{kind} {next}"
                );
            }
        }
        assert!(!may_answer(&packet(POD, OTHER, 58, &[])));
        for source in ["::", "::1", "ff02::1", "::ffff:10.1.2.3", "::10.1.2.3"] {
            let bad = udp(source.parse().unwrap(), OTHER);
            assert!(!may_answer(&bad), "{source}");
            assert!(
                !writes(IcmpError::FragmentationNeeded(1280), &bad),
                "{source}"
            );
        }
        // To many only what all of them have to know.
        let many = udp(POD, GROUP);
        assert!(!may_answer(&many));
        for (error, expected) in [
            (IcmpError::FragmentationNeeded(1280), true),
            (code(2), true),
            (code(0), false),
            (code(1), false),
            (code(3), false),
            (IcmpError::TimeExceeded, false),
            (IcmpError::HostUnreachable, false),
        ] {
            assert_eq!(writes(error, &many), expected, "{error:?}");
            assert!(writes(error, &udp(POD, OTHER)), "{error:?}");
        }
        // A later fragment may be of an error, and so may what ends too early; that it does is said.
        let fragment = |offset: u8, payload: &[u8]| {
            let header = [17, 0, 0, offset | 1, 0, 0, 0, 7];
            packet(POD, OTHER, 44, &[&header, payload].concat())
        };
        assert!(may_answer(&fragment(0, &[0; 8])));
        assert!(!may_answer(&fragment(8, &[0; 8])));
        let incomplete = fragment(0, &[0; 7]);
        assert!(!writes(IcmpError::TimeExceeded, &incomplete));
        assert!(writes(code(3), &incomplete));
        // Of the other version, or not whole.
        let from_v4 =
            IcmpError::TimeExceeded.write(&mut [0; 600], [10, 244, 1, 1], &udp(POD, OTHER));
        assert_eq!(from_v4, None);
        let mut v4 = vec![0x45; 40];
        v4[2..4].copy_from_slice(&[0, 40]);
        assert!(!writes(IcmpError::TimeExceeded, &v4));
        assert!(!may_answer(&udp(POD, OTHER)[..100]));
        assert!(!may_answer(&[0x60; 20]));
        let no_room = IcmpError::TimeExceeded.write(&mut [0; 47], GATEWAY, &udp(POD, OTHER));
        assert_eq!(no_room, None);
    }
}
