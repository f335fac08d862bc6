//! Probes: packets as somebody would send them, to be traced.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use muslin_encap::ip::{v4, v6};
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4Message, Icmpv4Packet, Icmpv6Message,
    Icmpv6Packet, IpProtocol, IpVersion, Ipv4Packet, TcpPacket, TcpSeqNumber, UdpPacket,
};
use thiserror::Error;

use crate::datapath::frame;

const MAGIC: &[u8; 8] = b"MslProbe";
const TCP_HEADER_LEN: usize = 20;
const UDP_HEADER_LEN: usize = 8;
const ICMP_HEADER_LEN: usize = 8;

/// What a probe's packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// A SYN, as a connection begins.
    Tcp,
    /// A datagram.
    Udp,
    /// An echo request.
    Icmp,
}

impl Protocol {
    const fn header_len(self) -> usize {
        match self {
            Self::Tcp => TCP_HEADER_LEN,
            Self::Udp => UDP_HEADER_LEN,
            Self::Icmp => ICMP_HEADER_LEN,
        }
    }
}

/// A packet to be traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Who sends it.
    pub source: IpAddr,
    /// Who is to get it.
    pub destination: IpAddr,
    /// What it carries.
    pub protocol: Protocol,
    /// The source port, or the identifier of an echo request.
    pub source_port: u16,
    /// The destination port; an echo request has none.
    pub destination_port: u16,
    /// Its length in bytes with the IP header; as short as can be if that is 0.
    pub len: usize,
    /// The time to live, or hop limit, that it begins with.
    pub ttl: u8,
    /// Whether it must not be cut into fragments, as no router cuts any of IPv6.
    pub dont_fragment: bool,
    /// What its payload begins with, if it is really to be sent.
    pub mark: Option<Mark>,
}

/// By what a probe that is really sent is known again wherever it is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The number of the probes that belong together, which nobody can foresee.
    pub id: u64,
    /// Its own, from 1 on.
    pub sequence: u32,
}

impl Mark {
    /// Its bytes in a packet.
    pub const LEN: usize = MAGIC.len() + 8 + 4;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let (magic, rest) = bytes.split_at_mut(MAGIC.len());
        let (id, sequence) = rest.split_at_mut(8);
        magic.copy_from_slice(MAGIC);
        id.copy_from_slice(&self.id.to_be_bytes());
        sequence.copy_from_slice(&self.sequence.to_be_bytes());
        bytes
    }

    /// The number of the probe with this mark's `id` in a packet, whatever is around it: headers of a
    /// tunnel, or an ICMP error that quotes it.
    #[must_use]
    pub fn find(id: u64, packet: &[u8]) -> Option<u32> {
        let mut windows = packet.windows(Self::LEN);
        windows.find_map(|bytes| {
            let (magic, rest) = bytes.split_first_chunk::<{ MAGIC.len() }>()?;
            let (theirs, sequence) = rest.split_first_chunk::<8>()?;
            let is_it = magic == MAGIC && *theirs == id.to_be_bytes();
            let sequence = sequence.first_chunk::<4>().filter(|_| is_it)?;
            Some(u32::from_be_bytes(*sequence))
        })
    }
}

/// Why there is no such packet.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The addresses are not of one IP version.
    #[error("{0} and {1} are not of one IP version")]
    Versions(IpAddr, IpAddr),
    /// It is shorter than its headers, with its mark, or longer than a packet can be.
    #[error("a packet of this kind has {least} to {} bytes", v4::MAX_LEN)]
    Len {
        /// The length of the headers, and of the mark.
        least: usize,
    },
}

impl Probe {
    /// The length in bytes of the shortest one that carries this, with a mark or without.
    #[must_use]
    pub const fn least(version: IpVersion, protocol: Protocol, is_marked: bool) -> usize {
        let header = match version {
            IpVersion::Ipv4 => v4::HEADER_LEN,
            IpVersion::Ipv6 => v6::HEADER_LEN,
        };
        let mark = if is_marked { Mark::LEN } else { 0 };
        header + protocol.header_len() + mark
    }

    /// The packet, which begins with its IP header.
    ///
    /// # Errors
    /// `ProbeError`.
    pub fn packet(&self) -> Result<Vec<u8>, ProbeError> {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => self.packet_v4(source, destination),
            (IpAddr::V6(source), IpAddr::V6(destination)) => self.packet_v6(source, destination),
            (source, destination) => Err(ProbeError::Versions(source, destination)),
        }
    }

    /// Room for the packet with its mark, and where the IP header ends.
    fn room(&self, version: IpVersion) -> Result<(Vec<u8>, usize), ProbeError> {
        let mark = self.mark.map(Mark::to_bytes);
        let payload = Self::least(version, self.protocol, false);
        let least = Self::least(version, self.protocol, mark.is_some());
        let len = if self.len == 0 { least } else { self.len };
        if !(least..=v4::MAX_LEN).contains(&len) {
            return Err(ProbeError::Len { least });
        }
        let mut bytes = vec![0; len];
        if let Some(mark) = mark {
            bytes[payload..least].copy_from_slice(&mark);
        }
        Ok((bytes, payload - self.protocol.header_len()))
    }

    fn packet_v4(&self, source: Ipv4Addr, destination: Ipv4Addr) -> Result<Vec<u8>, ProbeError> {
        let protocol = match self.protocol {
            Protocol::Tcp => IpProtocol::Tcp,
            Protocol::Udp => IpProtocol::Udp,
            Protocol::Icmp => IpProtocol::Icmp,
        };
        let (mut bytes, header_len) = self.room(IpVersion::Ipv4)?;
        let len = bytes.len();
        let mut view = Ipv4Packet::new_unchecked(&mut bytes);
        view.set_version(4);
        view.set_header_len(v4::HEADER_LEN as u8);
        view.set_total_len(len as u16);
        view.set_dont_frag(self.dont_fragment);
        view.set_hop_limit(self.ttl);
        view.set_next_header(protocol);
        view.set_src_addr(source);
        view.set_dst_addr(destination);
        view.fill_checksum();
        self.write_payload(&mut bytes[header_len..]);
        Ok(bytes)
    }

    fn packet_v6(&self, source: Ipv6Addr, destination: Ipv6Addr) -> Result<Vec<u8>, ProbeError> {
        let next_header = match self.protocol {
            Protocol::Tcp => IpProtocol::Tcp,
            Protocol::Udp => IpProtocol::Udp,
            Protocol::Icmp => IpProtocol::Icmpv6,
        };
        let (mut bytes, header_len) = self.room(IpVersion::Ipv6)?;
        let (head, payload) = bytes.split_at_mut(header_len);
        let header = v6::Header {
            traffic_class: 0,
            flow_label: 0,
            payload_len: payload.len() as u16,
            next_header,
            hop_limit: self.ttl,
            source,
            destination,
        };
        head.copy_from_slice(&header.to_bytes());
        self.write_payload(payload);
        Ok(bytes)
    }

    /// The same in a frame from one MAC address to another.
    ///
    /// # Errors
    /// `ProbeError`.
    pub fn frame(
        &self,
        source: EthernetAddress,
        destination: EthernetAddress,
    ) -> Result<Vec<u8>, ProbeError> {
        let packet = self.packet()?;
        let mut bytes = vec![0; frame::HEADER_LEN + packet.len()];
        bytes[frame::HEADER_LEN..].copy_from_slice(&packet);
        let mut view = EthernetFrame::new_unchecked(&mut bytes);
        view.set_src_addr(source);
        view.set_dst_addr(destination);
        view.set_ethertype(match self.destination {
            IpAddr::V4(_) => EthernetProtocol::Ipv4,
            IpAddr::V6(_) => EthernetProtocol::Ipv6,
        });
        Ok(bytes)
    }

    fn write_payload(&self, payload: &mut [u8]) {
        let (source, destination) = (
            smoltcp::wire::IpAddress::from(self.source),
            smoltcp::wire::IpAddress::from(self.destination),
        );
        let sequence = self.mark.map_or(1, |mark| mark.sequence as u16);
        match self.protocol {
            Protocol::Tcp => {
                let mut segment = TcpPacket::new_unchecked(payload);
                segment.set_src_port(self.source_port);
                segment.set_dst_port(self.destination_port);
                segment.set_seq_number(TcpSeqNumber(0));
                segment.set_header_len(TCP_HEADER_LEN as u8);
                segment.clear_flags();
                segment.set_syn(true);
                segment.set_window_len(u16::MAX);
                segment.fill_checksum(&source, &destination);
            }
            Protocol::Udp => {
                let len = payload.len() as u16;
                let mut datagram = UdpPacket::new_unchecked(payload);
                datagram.set_src_port(self.source_port);
                datagram.set_dst_port(self.destination_port);
                datagram.set_len(len);
                datagram.fill_checksum(&source, &destination);
            }
            Protocol::Icmp => match (self.source, self.destination) {
                (IpAddr::V6(source), IpAddr::V6(destination)) => {
                    let mut echo = Icmpv6Packet::new_unchecked(payload);
                    echo.set_msg_type(Icmpv6Message::EchoRequest);
                    echo.set_msg_code(0);
                    echo.set_echo_ident(self.source_port);
                    echo.set_echo_seq_no(sequence);
                    echo.fill_checksum(&source, &destination);
                }
                _ => {
                    let mut echo = Icmpv4Packet::new_unchecked(payload);
                    echo.set_msg_type(Icmpv4Message::EchoRequest);
                    echo.set_msg_code(0);
                    echo.set_echo_ident(self.source_port);
                    echo.set_echo_seq_no(sequence);
                    echo.fill_checksum();
                }
            },
        }
    }
}
