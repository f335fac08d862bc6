//! Superpackets by chance.

use muslin_encap::ip::transport::{Protocol, Transport};
use muslin_encap::offload::split::Checksums;
use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};
use proptest::prelude::*;
use smoltcp::wire::IpVersion;

use crate::reference::{finish, split};

/// Length of an Ethernet header: where IP headers are.
pub const L3: usize = 14;
/// TCP's flag of an acknowledgment.
pub const ACK: u8 = 0x10;
/// TCP's flag of a sender that has slowed down (RFC 3168).
pub const CWR: u8 = 0x80;
/// Destination and source of all frames.
const MACS: [u8; 12] = [2, 0, 0, 0, 8, 1, 2, 0, 0, 0, 8, 2];

/// What a superpacket looks like.
#[derive(Debug, Clone)]
pub struct Shape {
    /// IPv6 instead of IPv4.
    pub v6: bool,
    /// TCP instead of UDP.
    pub tcp: bool,
    /// Which of a few flows it is of.
    pub flow: u8,
    /// Words of IPv4 options, or 8-byte extension headers.
    pub network_options: usize,
    /// TCP options of four bytes each.
    pub options: Vec<[u8; 4]>,
    /// TCP's flags.
    pub flags: u8,
    /// The byte with the DF bit.
    pub fragment: u8,
    /// IPv4's identification.
    pub ident: u16,
    /// TCP's sequence number.
    pub sequence: u32,
    /// Bytes of payload.
    pub payload: usize,
    /// Bytes of payload in a segment.
    pub size: u16,
    /// Whether the first segment's checksum comes to zero.
    pub zero: bool,
}

impl Shape {
    /// How it is to be split.
    pub fn gso(&self) -> Gso {
        let kind = match (self.tcp, self.v6) {
            (false, _) => GsoKind::Udp,
            (true, false) => GsoKind::TcpV4,
            (true, true) => GsoKind::TcpV6,
        };
        Gso {
            kind,
            size: self.size,
            ecn: self.tcp && self.flags & CWR != 0,
        }
    }

    /// The frame as a kernel would hand it over, its checksum unfinished, and its header.
    pub fn frame(&self) -> (Header, Vec<u8>) {
        let mut frame = MACS.to_vec();
        match self.v6 {
            true => self.put_ipv6(&mut frame),
            false => self.put_ipv4(&mut frame),
        }
        let l4 = frame.len();
        frame.extend([0x80, self.flow, 0x1f, 0x90]);
        if self.tcp {
            frame.extend(self.sequence.to_be_bytes());
            let words = 5 + self.options.len() as u8;
            frame.extend([9, 8, 7, 6, words << 4, self.flags, 1, 2, 0, 0, 0, 0]);
            frame.extend(self.options.concat());
        } else {
            frame.extend([0; 4]);
        }
        let payload = frame.len();
        frame.extend((0..self.payload).map(|i| (i * 7 + i / 250) as u8));
        let at = Transport {
            version: if self.v6 {
                IpVersion::Ipv6
            } else {
                IpVersion::Ipv4
            },
            protocol: if self.tcp {
                Protocol::Tcp
            } else {
                Protocol::Udp
            },
            l3: L3,
            l4,
            payload,
            end: frame.len(),
        };
        finish(&mut frame, &at, Checksums::Partial);
        if self.zero && self.payload >= 2 && self.size >= 2 {
            let first = split(&frame, L3, self.size.into(), Checksums::Complete).remove(0);
            let missing = word(&first, at.checksum_offset());
            let sum = muslin_encap::ip::checksum::add(word(&frame, payload), missing);
            frame[payload..payload + 2].copy_from_slice(&sum.to_be_bytes());
        }
        let header = Header {
            checksum: Checksum::Partial {
                start: l4 as u16,
                offset: (at.checksum_offset() - l4) as u16,
            },
            gso: Some(self.gso()),
            hdr_len: payload as u16,
        };
        (header, frame)
    }

    fn protocol(&self) -> u8 {
        if self.tcp { 6 } else { 17 }
    }

    fn put_ipv4(&self, frame: &mut Vec<u8>) {
        let words = 5 + self.network_options as u8;
        let [high, low] = self.ident.to_be_bytes();
        frame.extend([8, 0, 0x40 + words, 2, 0, 0, high, low]);
        frame.extend([self.fragment, 0, 63, self.protocol(), 0, 0]);
        frame.extend([10, 244, 1, 2, 10, 244, 2, self.flow]);
        frame.extend([1].repeat(self.network_options * 4));
    }

    fn put_ipv6(&self, frame: &mut Vec<u8>) {
        let mut chain = vec![60; self.network_options];
        chain.push(self.protocol());
        frame.extend([0x86, 0xdd, 0x60, 0x20, 0x34, self.flow, 0, 0, chain[0], 63]);
        frame.extend([0xfd; 31]);
        frame.push(self.flow);
        for next in &chain[1..] {
            frame.extend([*next, 0, 1, 4, 0, 0, 0, 0]);
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// TCP options: none, timestamps, or anything.
fn options() -> impl Strategy<Value = Vec<[u8; 4]>> {
    prop_oneof![
        1 => Just(Vec::new()),
        3 => any::<[[u8; 4]; 2]>().prop_map(|[sent, echoed]| vec![[1, 1, 8, 10], sent, echoed]),
        2 => proptest::collection::vec(any::<[u8; 4]>(), 0..=10),
    ]
}

/// An identification, often one that wraps soon.
fn ident() -> impl Strategy<Value = u16> {
    prop_oneof![any::<u16>(), 0xffe0..=0xffffu16]
}

/// Any superpacket that Muslin splits.
pub fn superpacket() -> impl Strategy<Value = Shape> {
    let kind = (any::<bool>(), prop::bool::weighted(0.7), 0usize..9);
    let flags = proptest::bits::u8::masked(0xc9).prop_map(|flags| flags | ACK);
    let tcp = (options(), flags, any::<u32>());
    let network = (
        ident(),
        prop::sample::select(vec![0u8, 0x40]),
        any::<bool>(),
    );
    let sizes = (
        prop_oneof![0usize..64, 64usize..4000, 4000usize..65_300],
        prop_oneof![8u16..100, 500u16..1500, 1500u16..40_000],
        0usize..4,
    );
    (kind, tcp, network, sizes).prop_map(|(kind, tcp, network, sizes)| {
        let (v6, is_tcp, network_options) = kind;
        let network_options = network_options.saturating_sub(6);
        let headers = if v6 {
            40 + 8 * network_options
        } else {
            20 + 4 * network_options
        };
        let most = 65_535 - headers - if is_tcp { 20 + 4 * tcp.0.len() } else { 8 };
        let (mut payload, mut size, round) = sizes;
        let segments = if is_tcp { 256 } else { 128 };
        size = size.max(payload.div_ceil(segments) as u16);
        if round == 0 {
            payload -= payload % usize::from(size);
        }
        Shape {
            v6,
            tcp: is_tcp,
            flow: 1,
            network_options,
            options: tcp.0,
            flags: tcp.1,
            fragment: network.1,
            ident: network.0,
            sequence: tcp.2,
            payload: payload.min(most),
            size,
            zero: network.2,
        }
    })
}
