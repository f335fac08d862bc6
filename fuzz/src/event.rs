//! What happens to a node, as bytes: every field is read from the front, one byte each, so that a
//! seed is written as it is read and small changes to the bytes are small changes to the events.

use std::net::Ipv4Addr;

use arbitrary::{Result, Unstructured};
use smoltcp::wire::EthernetAddress;

/// One thing that happens to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A frame comes from a port.
    Frame {
        /// The port.
        port: u8,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// A datagram with a frame comes from an underlay address.
    Datagram {
        /// The last byte of the address.
        host: u8,
        /// The frame in it; without its header if the tunnel carries bare IP packets.
        bytes: Vec<u8>,
    },
    /// A port is attached.
    Attach {
        /// The port.
        port: u8,
        /// Which pod is behind it.
        pod: u8,
        /// Whether it is guarded.
        guarded: bool,
    },
    /// A port is detached.
    Detach(u8),
    /// A peer is set.
    SetPeer {
        /// The peer.
        id: u8,
        /// Which subnet it has.
        subnet: u8,
        /// The last byte of its underlay address.
        host: u8,
        /// Whether it has a VTEP.
        vtep: bool,
    },
    /// A peer is removed.
    RemovePeer(u8),
    /// Milliseconds pass.
    Wait(u64),
    /// The output is not polled after the next few events.
    Hold(u8),
}

/// MAC address of the gateway.
pub const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x0a, 0x58, 10, 244, 1, 1]);

/// The MAC address that a byte stands for.
#[must_use]
pub fn mac(byte: u8) -> EthernetAddress {
    EthernetAddress(match byte {
        0 => GATEWAY_MAC.0,
        1..8 => [0x0a, 0x58, 10, 244, 1, byte],
        8..16 => [2, 0, 0, 0, 0, byte - 8],
        16 => [0xff; 6],
        17 => [0x01, 0x80, 0xc2, 0, 0, 0x0e],
        18 => [0x33, 0x33, 0, 0, 0, 1],
        19 => [0x01, 0, 0x5e, 0, 0, 1],
        20 => [0; 6],
        _ => [2, 1, 1, 1, 1, byte],
    })
}

/// The IPv4 address that a byte stands for: hosts of this node's subnet, hosts of others, and
/// special ones.
#[must_use]
pub fn address(byte: u8) -> Ipv4Addr {
    match byte {
        0..16 => Ipv4Addr::new(10, 244, 1, byte),
        16..32 => Ipv4Addr::new(10, 244, 2, byte - 16),
        32..48 => Ipv4Addr::new(10, 244, 3, byte - 32),
        48 => Ipv4Addr::new(10, 244, 1, 255),
        49 => Ipv4Addr::new(10, 244, 2, 200),
        50 => Ipv4Addr::new(8, 8, 8, 8),
        51 => Ipv4Addr::new(224, 0, 0, 1),
        52 => Ipv4Addr::BROADCAST,
        53 => Ipv4Addr::LOCALHOST,
        54 => Ipv4Addr::UNSPECIFIED,
        55 => Ipv4Addr::new(169, 254, 169, 254),
        _ => Ipv4Addr::new(10, 244, 1, byte),
    }
}

/// The events that `bytes` stand for, until they end.
#[must_use]
pub fn decode(input: &mut Unstructured<'_>) -> Option<Event> {
    if input.is_empty() {
        return None;
    }
    next(input).ok()
}

fn next(input: &mut Unstructured<'_>) -> Result<Event> {
    let mut byte = || input.arbitrary::<u8>();
    Ok(match byte()? % 16 {
        0..5 => Event::Frame {
            port: byte()? % 6,
            bytes: frame(input)?,
        },
        5..9 => Event::Datagram {
            host: byte()? % 6,
            bytes: frame(input)?,
        },
        9 => Event::Attach {
            port: byte()? % 6,
            pod: byte()? % 8,
            guarded: byte()? % 2 == 0,
        },
        10 => Event::Detach(byte()? % 6),
        11 => Event::SetPeer {
            id: byte()? % 6,
            subnet: byte()? % 9,
            host: byte()? % 6,
            vtep: byte()? % 4 != 3,
        },
        12 => Event::RemovePeer(byte()? % 6),
        13 => Event::Hold(byte()?),
        _ => {
            let time = u64::from(byte()?);
            Event::Wait(time * time * 8)
        }
    })
}

fn frame(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut byte = || input.arbitrary::<u8>();
    let (destination, source, kind) = (byte()?, byte()?, byte()?);
    let mut fields = [0; 8];
    for field in &mut fields {
        *field = byte()?;
    }
    let (kind, payload) = match kind % 8 {
        0..4 => (0x0800, ipv4(fields)),
        4 | 5 => (0x0806, arp(fields)),
        6 => (0x86dd, ipv6(fields)),
        _ => {
            let inner = [&[0, 0, 0x08, 0][..], &ipv4(fields)].concat();
            (if fields[7] % 2 == 0 { 0x8100 } else { 46u16 }, inner)
        }
    };
    let mut bytes = [
        &mac(destination).0[..],
        &mac(source).0,
        &kind.to_be_bytes(),
        &payload,
    ]
    .concat();
    let edits = byte()?;
    for _ in 0..edits.saturating_sub(250) {
        let (at, value) = (usize::from(byte()?), byte()?);
        if let Some(place) = bytes.get_mut(at) {
            *place = value;
        }
    }
    // One in a few is cut short.
    if edits % 16 == 15 {
        bytes.truncate(usize::from(byte()?));
    }
    Ok(bytes)
}

/// A well-formed IPv4 packet: source, destination, TTL, protocol, flags and offset, payload
/// length, options, first byte of the payload.
fn ipv4(fields: [u8; 8]) -> Vec<u8> {
    let [
        source,
        destination,
        ttl,
        protocol,
        fragment,
        len,
        options,
        first,
    ] = fields;
    let options = usize::from(options % 11) * 4;
    let header_len = 20 + options;
    let payload = match usize::from(len) {
        255 => 65_535 - header_len,
        len => len * len / 8,
    };
    let total = header_len + payload;
    let mut bytes = vec![1; total];
    bytes[0] = 0x40 | (header_len / 4) as u8;
    bytes[2..4].copy_from_slice(&(total as u16).to_be_bytes());
    // The top three bits are the flags; the others an offset, the last of them the largest.
    bytes[6] = fragment & 0xe0;
    bytes[7] = fragment & 0x1f;
    if fragment & 0x1f == 0x1f {
        bytes[6] |= 0x1f;
        bytes[7] = 0xff;
    }
    bytes[8] = ttl;
    bytes[9] = match protocol % 4 {
        0 => 1,
        1 => 6,
        2 => 17,
        _ => protocol,
    };
    bytes[12..16].copy_from_slice(&address(source).octets());
    bytes[16..20].copy_from_slice(&address(destination).octets());
    bytes[10..12].fill(0);
    let sum = muslin_encap::checksum::compute(&bytes[..header_len]);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    let icmp = &mut bytes[header_len..];
    if let Some(place) = icmp.first_mut() {
        *place = first;
    }
    if let Some(code) = icmp.get_mut(1) {
        *code = 0;
    }
    if icmp.len() >= 8 {
        icmp[2..4].fill(0);
        let sum = muslin_encap::checksum::compute(icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

/// ARP: operation, sender's and target's MAC and IP addresses.
fn arp(fields: [u8; 8]) -> Vec<u8> {
    let [operation, sha, spa, tha, tpa, ..] = fields;
    [
        &[0, 1, 8, 0, 6, 4, 0, operation % 4][..],
        &mac(sha).0,
        &address(spa).octets(),
        &mac(tha).0,
        &address(tpa).octets(),
    ]
    .concat()
}

/// IPv6: last byte of the source, next header, and a payload of the rest.
fn ipv6(fields: [u8; 8]) -> Vec<u8> {
    let [source, next, payload @ ..] = fields;
    let next = match next % 8 {
        0 => 0,
        1 => 43,
        2 => 44,
        3 => 60,
        4 => 51,
        5 => 58,
        _ => next,
    };
    let mut bytes = vec![0x60, 0, 0, 0, 0, 24, next, 255];
    bytes.extend(address(source).to_ipv6_mapped().octets());
    bytes.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    bytes.extend(payload);
    bytes.extend([58, 0, 134, 0, 0, 0, 0, 0, 134, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes
}
