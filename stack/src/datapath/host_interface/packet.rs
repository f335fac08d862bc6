//! What a packet to or from the host says about flows, and other ends written into it.

use std::net::{Ipv4Addr, SocketAddrV4};

use muslin_encap::ip::{checksum, v4};
use muslin_encap::offload::virtio::Checksum;

use crate::datapath::egress::Protocol;
use crate::datapath::icmp;

/// Offsets in an IPv4 header (RFC 791 section 3.1).
const FRAGMENT: usize = 6;
const PROTOCOL: usize = 9;
const HEADER_CHECKSUM: usize = 10;
const SOURCE: usize = 12;
const DESTINATION: usize = 16;
/// Bits of the word at [`FRAGMENT`]: the offset.
const OFFSET: u16 = 0x1fff;

/// Protocol numbers (RFC 790).
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Offsets in TCP, UDP and ICMP headers.
const TCP_CHECKSUM: usize = 16;
const TCP_FLAGS: usize = 13;
const UDP_CHECKSUM: usize = 6;
const ICMP_CHECKSUM: usize = 2;
const ICMP_IDENTIFIER: usize = 4;
/// Bytes that an ICMP error quotes at least of what its packet carried (RFC 792).
const QUOTED: usize = 8;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// What a packet means for the flow it belongs to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Signs {
    /// A connection begins.
    pub(crate) begins: bool,
    /// It ends.
    pub(crate) ends: bool,
    /// The packet comes from the pod.
    pub(crate) answers: bool,
}

impl Signs {
    #[cfg(test)]
    pub(super) const BEGIN: Self = Self {
        begins: true,
        ends: false,
        answers: false,
    };
    #[cfg(test)]
    pub(super) const END: Self = Self {
        begins: false,
        ends: true,
        answers: false,
    };

    /// The same from the pod. It does not begin what the host has begun.
    pub(super) const fn answer(self) -> Self {
        Self {
            begins: false,
            answers: true,
            ..self
        }
    }
}

/// The two ends of a packet's flow. An echo request has its identifier for the port of who asks, and
/// none for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ends {
    pub(crate) protocol: Protocol,
    pub(crate) source: SocketAddrV4,
    pub(crate) destination: SocketAddrV4,
    pub(crate) signs: Signs,
}

/// What a packet is, as far as flows are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// A packet of a flow, or its first fragment.
    Flow(Ends),
    /// An ICMP error about a packet of a flow.
    Error(Ends),
    /// A fragment without ports.
    Fragment,
    /// Something else.
    Other,
}

/// Reads what a packet is that begins with a well-formed IPv4 header.
pub(crate) fn content(packet: &[u8]) -> Content {
    if is_later_fragment(packet) {
        return Content::Fragment;
    }
    if let Some(ends) = ends(packet) {
        return Content::Flow(ends);
    }
    let quoted = quoted_at(packet).and_then(|at| ends(&packet[at..]));
    quoted.map_or(Content::Other, Content::Error)
}

/// Writes another source into a packet of a flow or a fragment, whose port stays then.
pub(crate) fn set_source(packet: &mut [u8], checksum: Checksum, source: SocketAddrV4) {
    set_end(packet, checksum, Side::Source, source);
}

/// The same for the destination.
pub(crate) fn set_destination(packet: &mut [u8], checksum: Checksum, destination: SocketAddrV4) {
    set_end(packet, checksum, Side::Destination, destination);
}

/// Writes other ends into an ICMP error: its own address on the side that is the host's, and in what it
/// quotes the host's end, which is on the other side.
pub(crate) fn set_error(packet: &mut [u8], is_to_host: bool, host: SocketAddrV4) {
    let Some(at) = quoted_at(packet) else {
        return;
    };
    let (outer, inner) = match is_to_host {
        true => (Side::Destination, Side::Source),
        false => (Side::Source, Side::Destination),
    };
    let icmp = at - icmp::HEADER_LEN;
    let was_right = checksum::compute(&packet[icmp..]) == 0;
    set_end(&mut packet[at..], Checksum::Unknown, inner, host);
    set_address(packet, outer, *host.ip());
    if was_right {
        put16(packet, icmp + ICMP_CHECKSUM, 0);
        let sum = checksum::compute(&packet[icmp..]);
        put16(packet, icmp + ICMP_CHECKSUM, sum);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.copied().map_or(0, u16::from_be_bytes)
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(word) = bytes.get_mut(at..at + 2) {
        word.copy_from_slice(&value.to_be_bytes());
    }
}

fn is_later_fragment(packet: &[u8]) -> bool {
    be16(packet, FRAGMENT) & OFFSET != 0
}

fn address(packet: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = *packet.get(at..)?.first_chunk()?;
    Some(octets.into())
}

/// The ends of a packet's flow, of which at least the beginning of what it carries is there.
fn ends(packet: &[u8]) -> Option<Ends> {
    let (header, payload) = v4::split_header(packet)?;
    if is_later_fragment(header) || payload.len() < QUOTED {
        return None;
    }
    let (source, destination) = (address(header, SOURCE)?, address(header, DESTINATION)?);
    let (first, second) = (be16(payload, 0), be16(payload, 2));
    let mut signs = Signs::default();
    let (protocol, ports) = match header[PROTOCOL] {
        TCP => {
            // Of one that is quoted they need not be there.
            let flags = payload.get(TCP_FLAGS).copied().unwrap_or_default();
            signs.begins = flags & (SYN | ACK) == SYN;
            signs.ends = flags & (FIN | RST) != 0;
            (Protocol::Tcp, (first, second))
        }
        UDP => (Protocol::Udp, (first, second)),
        ICMP => {
            let identifier = be16(payload, ICMP_IDENTIFIER);
            match payload[0] {
                ECHO_REQUEST => (Protocol::Ping, (identifier, 0)),
                ECHO_REPLY => (Protocol::Ping, (0, identifier)),
                _ => return None,
            }
        }
        _ => return None,
    };
    Some(Ends {
        protocol,
        source: SocketAddrV4::new(source, ports.0),
        destination: SocketAddrV4::new(destination, ports.1),
        signs,
    })
}

/// Types of ICMP messages (RFC 792).
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

/// Where in an ICMP error the packet begins that it is about.
fn quoted_at(packet: &[u8]) -> Option<usize> {
    let (header, _) = v4::split_header(packet)?;
    let at = header.len() + icmp::HEADER_LEN;
    (icmp::is_error(packet) && packet.len() > at).then_some(at)
}

/// Writes another address into an IPv4 header, and returns the former one.
fn set_address(packet: &mut [u8], side: Side, address: Ipv4Addr) {
    let at = match side {
        Side::Source => SOURCE,
        Side::Destination => DESTINATION,
    };
    for (at, new) in words(at, address) {
        let (old, sum) = (be16(packet, at), be16(packet, HEADER_CHECKSUM));
        put16(packet, at, new);
        put16(packet, HEADER_CHECKSUM, checksum::update(sum, old, new));
    }
}

/// The two words of an address that is written at that place.
fn words(at: usize, address: Ipv4Addr) -> [(usize, u16); 2] {
    let [a, b, c, d] = address.octets();
    [
        (at, u16::from_be_bytes([a, b])),
        (at + 2, u16::from_be_bytes([c, d])),
    ]
}

/// Writes another end into a packet, of which at least the beginning of what it carries is there, with
/// its checksums (RFC 1624). A partial one has the sum of the addresses alone.
fn set_end(packet: &mut [u8], offload: Checksum, side: Side, end: SocketAddrV4) {
    let Some((header, payload)) = v4::split_header(packet) else {
        return;
    };
    let l4 = header.len();
    let (protocol, has_ports) = (header[PROTOCOL], !is_later_fragment(header));
    let (source, identifier) = (side == Side::Source, payload.first().copied());
    let former = match side {
        Side::Source => address(packet, SOURCE),
        Side::Destination => address(packet, DESTINATION),
    };
    let Some(former) = former else { return };
    set_address(packet, side, *end.ip());
    if !has_ports {
        return;
    }
    let (field, port) = match (protocol, identifier) {
        (TCP, _) => (TCP_CHECKSUM, Some(if source { 0 } else { 2 })),
        (UDP, _) => (UDP_CHECKSUM, Some(if source { 0 } else { 2 })),
        (ICMP, Some(ECHO_REQUEST)) if source => (ICMP_CHECKSUM, Some(ICMP_IDENTIFIER)),
        (ICMP, Some(ECHO_REPLY)) if !source => (ICMP_CHECKSUM, Some(ICMP_IDENTIFIER)),
        _ => return,
    };
    let field = l4 + field;
    let is_partial = matches!(offload, Checksum::Partial { .. });
    let change = |packet: &mut [u8], old: u16, new: u16| {
        let sum = be16(packet, field);
        let is_there = packet.len() >= field + 2 && !(protocol == UDP && sum == 0);
        if !is_there {
            return;
        }
        // What a partial checksum has is not inverted.
        let updated = match is_partial {
            true => !checksum::update(!sum, old, new),
            false => checksum::update(sum, old, new),
        };
        // Zero would be none (RFC 768).
        let updated = if protocol == UDP && updated == 0 && !is_partial {
            u16::MAX
        } else {
            updated
        };
        put16(packet, field, updated);
    };
    if protocol != ICMP {
        let pairs = words(0, former).into_iter().zip(words(0, *end.ip()));
        for ((_, old), (_, new)) in pairs {
            change(packet, old, new);
        }
    }
    if let Some(port) = port {
        let (at, new) = (l4 + port, end.port());
        let old = be16(packet, at);
        put16(packet, at, new);
        if !is_partial {
            change(packet, old, new);
        }
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{IcmpEchoHeader, Icmpv4Type, PacketBuilder};

    use super::*;

    const HOST: [u8; 4] = [192, 0, 2, 9];
    const BASE: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 0);
    const POD: [u8; 4] = [10, 244, 2, 7];

    fn tcp() -> Vec<u8> {
        let mut bytes = Vec::new();
        PacketBuilder::ipv4(HOST, POD, 64)
            .tcp(40_000, 80, 7, 1000)
            .syn()
            .write(&mut bytes, b"odd")
            .unwrap();
        bytes
    }

    fn udp(source: [u8; 4], port: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        PacketBuilder::ipv4(source, POD, 64)
            .udp(port, 53)
            .write(&mut bytes, b"question")
            .unwrap();
        bytes
    }

    fn ping() -> Vec<u8> {
        let mut bytes = Vec::new();
        PacketBuilder::ipv4(HOST, POD, 64)
            .icmpv4(Icmpv4Type::EchoRequest(IcmpEchoHeader { id: 77, seq: 1 }))
            .write(&mut bytes, b"ping")
            .unwrap();
        bytes
    }

    /// Whether an independent parser finds all checksums right.
    fn is_right(packet: &[u8]) -> bool {
        let (ip, rest) = etherparse::Ipv4Header::from_slice(packet).unwrap();
        let carried = match ip.protocol.0 {
            TCP => {
                let (tcp, payload) = etherparse::TcpHeader::from_slice(rest).unwrap();
                tcp.calc_checksum_ipv4(&ip, payload) == Ok(tcp.checksum)
            }
            UDP => {
                let (udp, payload) = etherparse::UdpHeader::from_slice(rest).unwrap();
                udp.calc_checksum_ipv4(&ip, payload) == Ok(udp.checksum)
            }
            _ => checksum::compute(rest) == 0,
        };
        carried && ip.calc_header_checksum() == ip.header_checksum
    }

    #[test]
    fn ends_are_read_and_written_with_right_checksums() {
        for (packet, protocol, port) in [
            (tcp(), Protocol::Tcp, 80),
            (udp(HOST, 40_000), Protocol::Udp, 53),
            (ping(), Protocol::Ping, 0),
        ] {
            let Content::Flow(before) = content(&packet) else {
                panic!("{protocol} is no flow");
            };
            assert_eq!(before.protocol, protocol);
            assert_eq!(before.destination, SocketAddrV4::new(POD.into(), port));
            assert_eq!(before.signs.begins, protocol == Protocol::Tcp);
            for port in [before.source.port(), 1025, u16::MAX] {
                let mut packet = packet.clone();
                set_source(
                    &mut packet,
                    Checksum::Unknown,
                    SocketAddrV4::new(BASE, port),
                );
                assert!(is_right(&packet), "{protocol}");
                let Content::Flow(after) = content(&packet) else {
                    panic!("{protocol} is no flow");
                };
                assert_eq!(after.source, SocketAddrV4::new(BASE, port));
                assert_eq!(after.destination, before.destination);
                set_source(&mut packet, Checksum::Unknown, before.source);
                assert!(is_right(&packet));
            }
        }
    }

    #[test]
    fn a_partial_checksum_is_completed_to_a_right_one() {
        for mut packet in [tcp(), udp(HOST, 40_000)] {
            let (start, offset) = match packet[PROTOCOL] {
                TCP => (20, TCP_CHECKSUM),
                _ => (20, UDP_CHECKSUM),
            };
            let transport = muslin_encap::ip::transport::Transport::parse(&packet, 0).unwrap();
            let sum = transport.pseudo_header(&packet, packet.len() - start);
            put16(&mut packet, start + offset, sum);
            let partial = Checksum::Partial {
                start: start as u16,
                offset: offset as u16,
            };
            set_source(&mut packet, partial, SocketAddrV4::new(BASE, 1025));
            let pod = SocketAddrV4::new([10, 244, 3, 9].into(), 81);
            set_destination(&mut packet, partial, pod);
            checksum::complete(&mut packet, start, offset).unwrap();
            assert!(is_right(&packet));
        }
    }

    #[test]
    fn a_datagram_without_a_checksum_stays_without() {
        let mut packet = udp(HOST, 40_000);
        put16(&mut packet, 20 + UDP_CHECKSUM, 0);
        set_source(&mut packet, Checksum::Unknown, SocketAddrV4::new(BASE, 1));
        assert_eq!(be16(&packet, 20 + UDP_CHECKSUM), 0);
        assert_eq!(v4::check(&packet), Ok(packet.len()));
    }

    #[test]
    fn errors_are_translated_with_what_they_quote() {
        let sent = udp(BASE.octets(), 1025);
        let mut error = vec![0; icmp::MAX_LEN];
        let router = Ipv4Addr::new(10, 244, 2, 1);
        let len = icmp::IcmpError::PortUnreachable
            .write(&mut error, router, &sent)
            .unwrap();
        error.truncate(len);
        let Content::Error(quoted) = content(&error) else {
            panic!("it is no error");
        };
        assert_eq!(quoted.source, SocketAddrV4::new(BASE, 1025));
        set_error(&mut error, true, SocketAddrV4::new(HOST.into(), 40_000));
        assert!(is_right(&error));
        assert_eq!(address(&error, DESTINATION), Some(HOST.into()));
        assert_eq!(&error[28..], &udp(HOST, 40_000)[..]);
    }

    #[test]
    fn a_later_fragment_has_an_address_alone() {
        let mut packet = udp(HOST, 40_000);
        packet[FRAGMENT + 1] = 3;
        assert_eq!(content(&packet), Content::Fragment);
        let payload = packet[20..].to_vec();
        set_source(&mut packet, Checksum::Unknown, SocketAddrV4::new(BASE, 9));
        assert_eq!(packet[20..], payload);
        assert_eq!(address(&packet, SOURCE), Some(BASE));
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        for packet in [tcp(), udp(HOST, 40_000), ping()] {
            for len in 0..28 {
                let is_flow = matches!(content(&packet[..len]), Content::Flow(_));
                assert!(!is_flow, "{len}");
            }
        }
    }
}
