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
