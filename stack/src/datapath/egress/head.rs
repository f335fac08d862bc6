//! What egress reads in the headers of pods' packets, of either IP version.

use std::net::IpAddr;

use muslin_encap::ip::{checksum, v4, v6};
use smoltcp::wire::{Icmpv4Message, IpProtocol, Ipv4Packet, Ipv6Packet};

use crate::datapath::icmp;
use crate::drops::DropReason;

/// The IP header of a packet, with extension headers, which the router has checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// What is behind all headers of IP.
    pub(super) protocol: IpProtocol,
    /// Where that begins.
    pub(super) upper: usize,
    /// Where the packet ends.
    pub(super) end: usize,
    /// Whether it is a fragment; of IPv6 that may be all of a packet (RFC 6946).
    pub(super) is_fragment: bool,
}

impl Head {
    /// That of a packet.
    ///
    /// # Errors
    /// The reason to drop it.
    pub(super) fn parse(packet: &[u8]) -> Result<Self, DropReason> {
        match packet.first().map(|first| first >> 4) {
            Some(4) => Ok(Self::of_v4(packet)),
            Some(6) => Self::of_v6(packet),
            Some(_) | None => Err(DropReason::EgressFamily),
        }
    }

    fn of_v4(packet: &[u8]) -> Self {
        let view = Ipv4Packet::new_unchecked(packet);
        let (source, destination) = addresses_v4(packet);
        Self {
            source,
            destination,
            protocol: view.next_header(),
            upper: view.header_len().into(),
            end: view.total_len().into(),
            is_fragment: view.more_frags() || view.frag_offset() != 0,
        }
    }

    fn of_v6(packet: &[u8]) -> Result<Self, DropReason> {
        let upper = v6::upper_layer(packet).map_err(|_| DropReason::Ipv6ExtensionHeaders)?;
        let (source, destination) = addresses_v6(packet);
        Ok(Self {
            source,
            destination,
            protocol: upper.protocol.into(),
            upper: upper.offset,
            end: Ipv6Packet::new_unchecked(packet).total_len(),
            is_fragment: upper.fragment.is_some(),
        })
    }

    /// What is behind all headers of IP.
    pub(super) fn payload<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        packet.get(self.upper..self.end).unwrap_or_default()
    }
}

/// Source and destination of a packet that has a whole IPv4 header.
pub(super) fn addresses_v4(packet: &[u8]) -> (IpAddr, IpAddr) {
    let view = Ipv4Packet::new_unchecked(packet);
    (view.src_addr().into(), view.dst_addr().into())
}

/// Source and destination of a packet that has a whole IPv6 header.
pub(super) fn addresses_v6(packet: &[u8]) -> (IpAddr, IpAddr) {
    let view = Ipv6Packet::new_unchecked(packet);
    (view.src_addr().into(), view.dst_addr().into())
}

/// A message of ICMP or ICMPv6 from a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message<'a> {
    /// An echo request.
    Echo {
        /// Its identifier.
        identifier: u16,
    },
    /// "Destination unreachable".
    Unreachable {
        /// What is said of it.
        code: u8,
        /// The packet that is spoken of, as far as it is quoted.
        offender: &'a [u8],
    },
    /// Anything else.
    Other,
}

/// Types of ICMPv6 (RFC 4443).
pub(super) mod kind {
    pub(in super::super) const UNREACHABLE: u8 = 1;
    pub(in super::super) const ECHO_REQUEST: u8 = 128;
    pub(in super::super) const ECHO_REPLY: u8 = 129;
}

impl<'a> Message<'a> {
    /// That of a packet; nothing, if it has none or not even its header. The checksum is not looked at.
    pub(super) fn parse(head: &Head, packet: &'a [u8]) -> Option<Self> {
        let message = head.payload(packet);
        let header = message.first_chunk::<{ icmp::HEADER_LEN }>()?;
        let (echo, unreachable) = match (head.protocol, head.source) {
            (IpProtocol::Icmp, IpAddr::V4(_)) => (
                Icmpv4Message::EchoRequest.into(),
                Icmpv4Message::DstUnreachable.into(),
            ),
            (IpProtocol::Icmpv6, IpAddr::V6(_)) => (kind::ECHO_REQUEST, kind::UNREACHABLE),
            _ => return None,
        };
        Some(match (header[0], header[1]) {
            (kind, 0) if kind == echo => Self::Echo {
                identifier: u16::from_be_bytes([header[4], header[5]]),
            },
            (kind, code) if kind == unreachable => Self::Unreachable {
                code,
                offender: &message[icmp::HEADER_LEN..],
            },
            _ => Self::Other,
        })
    }
}

/// Whether the checksum of a message of ICMP or ICMPv6 is right.
pub(super) fn has_icmp_checksum(head: &Head, packet: &[u8]) -> bool {
    match head.source {
        IpAddr::V4(_) => checksum::compute(head.payload(packet)) == 0,
        IpAddr::V6(_) => {
            let packet = packet.get(..head.end).unwrap_or_default();
            v6::has_icmp_checksum(packet, head.upper)
        }
    }
}

/// Has a packet end where its buffer does.
pub(super) fn set_len(packet: &mut [u8]) {
    let len = packet.len();
    match packet.first().map(|first| first >> 4) {
        Some(4) => v4::set_total_len(packet, len as u16),
        Some(6) => v6::set_payload_len(packet, len.saturating_sub(v6::HEADER_LEN) as u16),
        Some(_) | None => {}
    }
}

/// Has a packet of TCP end where its buffer does, and its header have no options.
pub(super) fn set_plain(packet: &mut [u8]) {
    match packet.first().map(|first| first >> 4) {
        Some(4) => {
            let header_len = v4::HEADER_LEN as u8;
            Ipv4Packet::new_unchecked(&mut *packet).set_header_len(header_len);
        }
        Some(6) => Ipv6Packet::new_unchecked(&mut *packet).set_next_header(IpProtocol::Tcp),
        Some(_) | None => {}
    }
    set_len(packet);
}
