//! What happens to a node, as bytes: every field is read from the front, one byte each, so that a
//! seed is written as it is read and small changes to the bytes are small changes to the events.

use std::net::{Ipv4Addr, Ipv6Addr};

use muslin_encap::ip::{checksum, v6};
use muslin_encap::offload::virtio;

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
    /// A frame comes from a port with a virtio-net header.
    Superpacket {
        /// The port.
        port: u8,
        /// The header.
        header: [u8; virtio::LEN],
        /// The frame.
        bytes: Vec<u8>,
    },
    /// Datagrams with frames come from an underlay address and have been merged into one.
    Merged {
        /// The last byte of the address.
        host: u8,
        /// A virtio-net header for the merged frame.
        header: [u8; virtio::LEN],
        /// The merged frame.
        bytes: Vec<u8>,
        /// How many of its bytes are not with the others.
        tail: usize,
    },
    /// Egress sends a packet to a pod, or for the gateway to any pod.
    FromEgress {
        /// A virtio-net header for the packet.
        header: [u8; virtio::LEN],
        /// The packet, which begins with its IP header.
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
        21 => [0x33, 0x33, 0xff, 0, 0, 3],
        22 => [0x33, 0x33, 0, 0, 0, 0xfb],
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
        // The first and last addresses that a host can have, and their neighbours.
        56 => Ipv4Addr::new(0, 255, 255, 255),
        57 => Ipv4Addr::new(1, 0, 0, 0),
        58 => Ipv4Addr::new(126, 255, 255, 255),
        59 => Ipv4Addr::new(128, 0, 0, 0),
        60 => Ipv4Addr::new(223, 255, 255, 255),
        61 => Ipv4Addr::new(224, 0, 0, 0),
        62 => Ipv4Addr::new(239, 255, 255, 255),
        63 => Ipv4Addr::new(240, 0, 0, 0),
        _ => Ipv4Addr::new(10, 244, 1, byte),
    }
}

/// The IPv6 address that a byte stands for: the same.
#[must_use]
pub fn address_v6(byte: u8) -> Ipv6Addr {
    let at = |subnet, host: u8| Ipv6Addr::new(0xfd00, 0, 0, subnet, 0, 0, 0, host.into());
    match byte {
        0..16 => at(1, byte),
        16..32 => at(2, byte - 16),
        32..48 => at(3, byte - 32),
        // The gateway's, a pod's made of its MAC address, and any.
        48 => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
        49 => Ipv6Addr::new(0xfe80, 0, 0, 0, 0x0858, 0x0aff, 0xfef4, 0x0102),
        50 => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9),
        51 => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
        52 => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2),
        53 => Ipv6Addr::LOCALHOST,
        54 => Ipv6Addr::UNSPECIFIED,
        55 => Ipv4Addr::new(10, 244, 1, 2).to_ipv6_mapped(),
        56 => Ipv6Addr::new(0xfd00, 0, 0, 2, 0x8000, 0, 0, 1),
        57 => Ipv6Addr::new(0xfd00, 0, 0, 9, 0, 0, 0, 1),
        // Where solicitations for pod 3 are heard.
        58 => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 3),
        59 => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb),
        60 => Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0, 1),
        61 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 8),
        // An IPv4-compatible address.
        62 => Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0x0af4, 0x0102),
        _ => at(1, byte),
    }
}

/// The events that bytes stand for, until they end.
#[derive(Debug)]
pub struct Events<'a> {
    input: Unstructured<'a>,
    /// Identification of the last IP packet: no two have the same, unless an edit makes it so.
    ident: u16,
    /// The node's MTU, which some lengths aim at.
    mtu: usize,
}

impl<'a> Events<'a> {
    /// The events of these bytes, for a node of this MTU.
    #[must_use]
    pub fn new(bytes: &'a [u8], mtu: usize) -> Self {
        Self {
            input: Unstructured::new(bytes),
            ident: 0,
            mtu,
        }
    }

    fn next_event(&mut self) -> Result<Event> {
        let kind = self.byte()? % 16;
        Ok(match kind {
            0..4 => Event::Frame {
                port: self.byte()? % 6,
                bytes: self.frame()?,
            },
            4 => {
                let fields = self.fields()?;
                let mut bytes = Vec::with_capacity(128);
                match fields[0] {
                    128.. => ipv6(&mut bytes, fields, self.next_ident(1), self.mtu),
                    _ => ipv4(&mut bytes, fields, self.next_ident(1), self.mtu),
                }
                let header = [0; virtio::LEN];
                Event::FromEgress { header, bytes }
            }
            5..9 => Event::Datagram {
                host: self.byte()? % 6,
                bytes: self.frame()?,
            },
            9 => Event::Attach {
                port: self.byte()? % 6,
                pod: self.byte()? % 8,
                guarded: self.byte()? % 2 == 0,
            },
            10 => Event::Detach(self.byte()? % 6),
            11 => Event::SetPeer {
                id: self.byte()? % 6,
                subnet: self.byte()? % 13,
                host: self.byte()? % 6,
                vtep: self.byte()? % 4 != 3,
            },
            12 => Event::RemovePeer(self.byte()? % 6),
            13 => Event::Hold(self.byte()?),
            14 => {
                let time = u64::from(self.byte()?);
                Event::Wait(time * time * 8)
            }
            _ => self.superpacket()?,
        })
    }

    fn byte(&mut self) -> Result<u8> {
        self.input.arbitrary()
    }

    fn fields(&mut self) -> Result<[u8; 8]> {
        let mut fields = [0; 8];
        for field in &mut fields {
            *field = self.byte()?;
        }
        Ok(fields)
    }

    fn frame(&mut self) -> Result<Vec<u8>> {
        let (destination, source, kind) = (self.byte()?, self.byte()?, self.byte()?);
        let fields = self.fields()?;
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(mac(destination).0);
        bytes.extend(mac(source).0);
        match kind % 8 {
            0..4 => {
                bytes.extend([0x08, 0]);
                ipv4(&mut bytes, fields, self.next_ident(1), self.mtu);
            }
            4 | 5 => {
                bytes.extend([0x08, 0x06]);
                arp(&mut bytes, fields);
            }
            6 => {
                bytes.extend([0x86, 0xdd]);
                ipv6(&mut bytes, fields, self.next_ident(1), self.mtu);
            }
            _ => {
                bytes.extend(if fields[7] % 2 == 0 {
                    [0x81, 0]
                } else {
                    [0, 46]
                });
                bytes.extend([0, 0, 0x08, 0]);
                ipv4(&mut bytes, fields, self.next_ident(1), self.mtu);
            }
        }
        self.edit(&mut bytes)?;
        Ok(bytes)
    }

    fn edit(&mut self, bytes: &mut Vec<u8>) -> Result<()> {
        let edits = self.byte()?;
        for _ in 0..edits.saturating_sub(250) {
            let (at, value) = (usize::from(self.byte()?), self.byte()?);
            if let Some(place) = bytes.get_mut(at) {
                *place = value;
            }
        }
        // One in a few is cut short.
        if edits % 16 == 15 {
            bytes.truncate(usize::from(self.byte()?));
        }
        Ok(())
    }

    /// Sender, MAC addresses, source, destination, TTL, choices, segment size, payload length, a
    /// byte of the header and what is to be there. The first six senders are ports, the next six
    /// hosts, and then there is egress, which has no MAC addresses.
    fn superpacket(&mut self) -> Result<Event> {
        let sender = self.byte()? % 14;
        let (destination, source) = (self.byte()?, self.byte()?);
        let [spa, dpa, ttl, choices, size, len, at, value] = self.fields()?;
        let tcp = choices & 1 == 0;
        let size = self.segment_size(size, tcp);
        let payload = match choices & 32 {
            0 => usize::from(len) * usize::from(len) / 8,
            // So many full segments, or a byte less, or one or two more.
            _ => (size * usize::from(len) + usize::from(choices >> 6)).saturating_sub(1),
        };
        let shape = Shape {
            addresses: [address(spa), address(dpa)],
            ttl,
            tcp,
            dont_fragment: choices & 2 != 0,
            size: (choices & 4 == 0).then_some(size as u16),
            other_kind: choices & 8 != 0,
            finished: choices & 16 != 0,
            payload: payload.min(MAX_PACKET - 20 - transport_len(tcp)),
        };
        let segments = shape.payload / size.max(1) + 1;
        let ident = self.next_ident(segments as u16);
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(mac(destination).0);
        bytes.extend(mac(source).0);
        bytes.extend([0x08, 0]);
        let mut header = shape.write(&mut bytes, ident);
        if sender >= 12 {
            if let Ok(read) = virtio::Header::parse(&header)
                && let Some(moved) = read.moved(14, 0)
            {
                header = moved.to_bytes();
            }
            let bytes = bytes.split_off(14);
            return Ok(Event::FromEgress { header, bytes });
        }
        Ok(if sender < 6 {
            if let Some(place) = header.get_mut(usize::from(at)) {
                *place = value;
            }
            self.edit(&mut bytes)?;
            Event::Superpacket {
                port: sender,
                header,
                bytes,
            }
        } else {
            let size = shape.size.unwrap_or(u16::MAX);
            let tail = shape.payload.saturating_sub(size.max(1).into());
            Event::Merged {
                host: sender - 6,
                header,
                bytes,
                tail: if shape.is_mergeable() { tail } else { 0 },
            }
        })
    }

    /// Bytes of payload of a segment: a number of units of eight, or for the last three just what
    /// the MTU has room for, a byte less, or one more.
    fn segment_size(&self, size: u8, tcp: bool) -> usize {
        match size {
            253.. => (self.mtu + usize::from(size)).saturating_sub(254 + 20 + transport_len(tcp)),
            _ => usize::from(size) * 8,
        }
    }

    /// The identification of a packet that may become so many.
    fn next_ident(&mut self, packets: u16) -> u16 {
        let ident = self.ident.wrapping_add(1);
        self.ident = self.ident.wrapping_add(packets);
        ident
    }
}

impl Iterator for Events<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        if self.input.is_empty() {
            return None;
        }
        self.next_event().ok()
    }
}

/// The longest IPv4 packet.
const MAX_PACKET: usize = 65_535;

const fn transport_len(tcp: bool) -> usize {
    if tcp { 20 } else { 8 }
}

/// A TCP or UDP packet in a frame, and what its virtio-net header says of it.
struct Shape {
    addresses: [Ipv4Addr; 2],
    ttl: u8,
    tcp: bool,
    dont_fragment: bool,
    /// Payload of a segment, unless it is to stay whole.
    size: Option<u16>,
    /// Whether the header has the other protocol's type.
    other_kind: bool,
    /// Whether the transport checksum is there already.
    finished: bool,
    payload: usize,
}

impl Shape {
    /// Whether a merger could have made it.
    fn is_mergeable(&self) -> bool {
        !self.finished && !self.other_kind && self.size.is_some_and(|size| size > 0)
    }

    /// Writes the packet behind an Ethernet header, and returns its header.
    fn write(&self, bytes: &mut Vec<u8>, ident: u16) -> [u8; virtio::LEN] {
        let (protocol, header_len, field) = if self.tcp { (6, 20, 16) } else { (17, 8, 6) };
        let len = header_len + self.payload;
        let flags = if self.dont_fragment { 0x40 } else { 0 };
        bytes.extend([0x45, 0]);
        bytes.extend(((20 + len) as u16).to_be_bytes());
        bytes.extend(ident.to_be_bytes());
        bytes.extend([flags, 0, self.ttl, protocol, 0, 0]);
        bytes.extend(self.addresses.iter().flat_map(Ipv4Addr::octets));
        let sum = checksum::compute(&bytes[14..]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        if self.tcp {
            bytes.extend([
                0x80, 0, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 2,
            ]);
            bytes.extend([0; 4]);
        } else {
            bytes.extend([0x80, 0, 0, 53]);
            bytes.extend((len as u16).to_be_bytes());
            bytes.extend([0; 2]);
        }
        bytes.resize(14 + 20 + len, 1);
        let pseudo = checksum::sum(&bytes[26..34]);
        let pseudo = checksum::add(pseudo, checksum::add(protocol.into(), len as u16));
        bytes[34 + field..36 + field].copy_from_slice(&pseudo.to_be_bytes());
        if self.finished {
            checksum::complete(bytes, 34, field);
        }
        self.header(34 + header_len, field)
    }

    fn header(&self, header_len: usize, field: usize) -> [u8; virtio::LEN] {
        let kind = match (self.size, self.tcp != self.other_kind) {
            (None, _) => 0,
            (Some(_), true) => 1,
            (Some(_), false) => 5,
        };
        let numbers = [
            header_len as u16,
            self.size.unwrap_or_default(),
            34,
            field as u16,
        ];
        let mut header = [(!self.finished).into(), kind, 0, 0, 0, 0, 0, 0, 0, 0];
        for (place, number) in header[2..].chunks_exact_mut(2).zip(numbers) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        header
    }
}

/// A well-formed IPv4 packet: source, destination, TTL, protocol, flags and offset, payload
/// length, options, first byte of the payload. Some lengths are those of so many full fragments and
/// a last one that has just room, a byte less, or one more.
fn ipv4(frame: &mut Vec<u8>, fields: [u8; 8], ident: u16, mtu: usize) {
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
    let most = MAX_PACKET - header_len;
    let payload = match usize::from(len) {
        255 => most,
        len @ 240.. => {
            let room = mtu - header_len;
            let full = (len - 240) / 3;
            (full * (room / 8 * 8) + room + (len - 240) % 3 - 1).min(most)
        }
        len => len * len / 8,
    };
    let total = header_len + payload;
    let start = frame.len();
    frame.resize(start + total, 1);
    let bytes = &mut frame[start..];
    bytes[0] = 0x40 | (header_len / 4) as u8;
    bytes[2..4].copy_from_slice(&(total as u16).to_be_bytes());
    bytes[4..6].copy_from_slice(&ident.to_be_bytes());
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
    let sum = checksum::compute(&bytes[..header_len]);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    let icmp = &mut bytes[header_len..];
    if let Some(place) = icmp.first_mut() {
        *place = first;
    }
    if let Some(code) = icmp.get_mut(1) {
        *code = 0;
    }
    if protocol % 4 == 0 && icmp.len() >= 8 {
        icmp[2..4].fill(0);
        let sum = checksum::compute(icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    }
}

/// ARP: operation, sender's and target's MAC and IP addresses.
fn arp(frame: &mut Vec<u8>, fields: [u8; 8]) {
    let [operation, sha, spa, tha, tpa, ..] = fields;
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation % 4]);
    frame.extend(mac(sha).0);
    frame.extend(address(spa).octets());
    frame.extend(mac(tha).0);
    frame.extend(address(tpa).octets());
}

/// IPv6: source, destination, hop limit, upper layer, extension headers, payload length, type or
/// protocol, and an address that it is about. Some lengths are what just fits, a byte less, or one more.
fn ipv6(frame: &mut Vec<u8>, fields: [u8; 8], ident: u16, mtu: usize) {
    let [
        source,
        destination,
        hop_limit,
        protocol,
        headers,
        len,
        kind,
        about,
    ] = fields;
    let upper = match protocol % 4 {
        0 => 58,
        1 => 6,
        2 => 17,
        _ => kind,
    };
    let (first, chain) = extension_headers(headers, upper);
    let message = match (upper, kind) {
        (58, 133..=137) => discovery(kind, len, about),
        _ => {
            let room = mtu.saturating_sub(v6::HEADER_LEN + chain.len());
            let payload = match usize::from(len) {
                // As many headers as there are may leave no room at all.
                len @ 240.. => (room + len % 3).saturating_sub(1 + 20 * (len - 240 > 7) as usize),
                len => len * len / 8,
            };
            let mut message = vec![1; payload.min(MAX_PACKET - 200)];
            if let Some(place) = message.first_mut() {
                *place = kind;
            }
            message
        }
    };
    let start = frame.len();
    let len = (chain.len() + message.len()) as u16;
    let [high, low] = ident.to_be_bytes();
    let [len_high, len_low] = len.to_be_bytes();
    frame.extend([0x60, 0, high, low, len_high, len_low, first, hop_limit]);
    frame.extend(address_v6(source % 128).octets());
    frame.extend(address_v6(destination % 128).octets());
    frame.extend(&chain);
    frame.extend(message);
    if upper == 58 && usize::from(len) >= chain.len() + 4 {
        v6::fill_icmp_checksum(&mut frame[start..], v6::HEADER_LEN + chain.len());
    }
}

/// Extension headers in front of an upper layer, and the number of the first.
fn extension_headers(choice: u8, upper: u8) -> (u8, Vec<u8>) {
    let options = |next| [next, 0, 1, 4, 0, 0, 0, 0];
    let fragment = |offset: u8| [upper, 0, 0, offset, 0, 0, 0, 7];
    match choice % 16 {
        1 => (0, options(upper).to_vec()),
        2 => (60, options(upper).to_vec()),
        3 => (43, options(upper).to_vec()),
        4 => (44, fragment(1).to_vec()),
        5 => (44, fragment(8).to_vec()),
        6 => (44, fragment(0).to_vec()),
        7 => (51, [upper, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1].to_vec()),
        8 => (60, [options(44), fragment(1)].concat()),
        9 => (
            60,
            [options(60).repeat(9), options(upper).to_vec()].concat(),
        ),
        10 => (60, [options(0), options(upper)].concat()),
        11 => (60, [upper, 200, 1, 4].to_vec()),
        _ => (upper, Vec::new()),
    }
}

/// A message of neighbour discovery about an address, with an option if the length is odd.
fn discovery(kind: u8, len: u8, about: u8) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    if kind != 133 {
        message.extend(address_v6(about % 128).octets());
    }
    if len % 2 == 1 {
        message.extend([if kind == 136 { 2 } else { 1 }, 1]);
        message.extend(mac(len >> 1).0);
    }
    message
}
