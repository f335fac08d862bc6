//! What a filter asks of a packet.

use std::net::IpAddr;

use muslin_encap::ip::v6;
use muslin_encap::tunnel::{Format, ipip};
use smoltcp::wire::{ArpPacket, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet};

use super::Hook;
use crate::datapath::frame;

/// Bytes of a VXLAN header (RFC 7348 section 5).
const VXLAN_LEN: usize = 8;

/// A packet's protocol, addresses and ports, as far as it has any and they are there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Fields {
    pub(super) ethertype: Option<EthernetProtocol>,
    pub(super) protocol: Option<IpProtocol>,
    pub(super) source: Option<IpAddr>,
    pub(super) destination: Option<IpAddr>,
    /// Source and destination port.
    pub(super) ports: Option<(u16, u16)>,
}

impl Fields {
    /// The fields of what was seen there; of what is in a tunnel those of the inner packet.
    pub(super) fn parse(hook: Hook, format: Option<Format>, bytes: &[u8]) -> Self {
        match (hook, format) {
            (Hook::FromTunnel | Hook::ToTunnel, Some(Format::Vxlan)) => {
                Self::of_frame(bytes.get(VXLAN_LEN..).unwrap_or_default())
            }
            // The kernel writes the outer header of those that leave.
            (Hook::FromTunnel, Some(Format::Ipip)) => {
                let inner = ipip::inner_offset(bytes).ok();
                let inner = inner.and_then(|offset| bytes.get(offset..));
                Self::of_packet(inner.unwrap_or_default())
            }
            _ if hook.has_frames() => Self::of_frame(bytes),
            _ => Self::of_packet(bytes),
        }
    }

    fn of_frame(bytes: &[u8]) -> Self {
        let Ok(view) = frame::parse(bytes) else {
            return Self::default();
        };
        let ethertype = view.ethertype();
        let payload = view.payload();
        let fields = match ethertype {
            EthernetProtocol::Arp => Self::of_arp(payload),
            EthernetProtocol::Ipv4 | EthernetProtocol::Ipv6 => Self::of_packet(payload),
            EthernetProtocol::Unknown(_) => Self::default(),
        };
        Self {
            ethertype: Some(ethertype),
            ..fields
        }
    }

    fn of_arp(payload: &[u8]) -> Self {
        let address = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
        match ArpPacket::new_checked(payload) {
            Ok(arp) => Self {
                source: address(arp.source_protocol_addr()),
                destination: address(arp.target_protocol_addr()),
                ..Self::default()
            },
            Err(_) => Self::default(),
        }
    }

    fn of_packet(bytes: &[u8]) -> Self {
        match bytes.first().map(|byte| byte >> 4) {
            Some(4) => Self::of_ipv4(bytes),
            Some(6) => Self::of_ipv6(bytes),
            _ => Self::default(),
        }
    }

    fn of_ipv4(bytes: &[u8]) -> Self {
        // The packet may be longer than what is captured of it.
        let view = Ipv4Packet::new_unchecked(bytes);
        if bytes.len() < 20 {
            return Self::default();
        }
        let protocol = view.next_header();
        let rest = bytes.get(usize::from(view.header_len())..);
        let rest = rest.filter(|_| view.frag_offset() == 0);
        Self {
            ethertype: Some(EthernetProtocol::Ipv4),
            protocol: Some(protocol),
            source: Some(view.src_addr().into()),
            destination: Some(view.dst_addr().into()),
            ports: rest.and_then(|rest| ports(protocol, rest)),
        }
    }

    fn of_ipv6(bytes: &[u8]) -> Self {
        if bytes.len() < 40 {
            return Self::default();
        }
        let view = Ipv6Packet::new_unchecked(bytes);
        // Other than in pcap filters, extension headers are passed over, as far as they are there.
        let (protocol, rest) = match v6::upper_layer(bytes) {
            Ok(upper) => {
                let rest = bytes.get(upper.offset..);
                let rest = rest.filter(|_| !upper.is_later_fragment());
                (upper.protocol.into(), rest)
            }
            Err(_) => (view.next_header(), None),
        };
        Self {
            ethertype: Some(EthernetProtocol::Ipv6),
            protocol: Some(protocol),
            source: Some(view.src_addr().into()),
            destination: Some(view.dst_addr().into()),
            ports: rest.and_then(|rest| ports(protocol, rest)),
        }
    }
}

fn ports(protocol: IpProtocol, rest: &[u8]) -> Option<(u16, u16)> {
    let has_ports = matches!(protocol, IpProtocol::Tcp | IpProtocol::Udp);
    let &[a, b, c, d] = rest.first_chunk::<4>().filter(|_| has_ports)?;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}
