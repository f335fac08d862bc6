//! What the oracle knows of packets, with plain offsets.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;
use muslin_encap::ip::transport::{Protocol, Transport};
use muslin_encap::offload::virtio::{Checksum, GsoKind, Header};
use muslin_stack::datapath::port::Attachment;

use crate::event::GATEWAY_MAC;
use crate::v6;

/// The node's lease.
pub const SUBNET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 1, 0), 24);

/// The address that begins the bytes.
pub fn ipv4(bytes: &[u8]) -> Ipv4Addr {
    Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])
}

/// Whether an address is the gateway's.
pub fn is_own(address: Ipv4Addr) -> bool {
    address == SUBNET.network() || address == Ipv4Addr::new(10, 244, 1, 1)
}

/// Whether no host can have an address.
pub fn is_martian(address: Ipv4Addr) -> bool {
    matches!(address.octets()[0], 0 | 127 | 224..)
}

/// Whether a frame is one that the gateway makes about ARP.
pub fn is_own_arp(frame: &[u8]) -> bool {
    frame.len() == 42 && frame[12..14] == [8, 6] && frame[6..12] == GATEWAY_MAC.0
}

/// The IPv4 packet in a frame, if it is one.
pub fn inner(frame: &[u8]) -> Option<&[u8]> {
    frame
        .strip_prefix(frame.get(..14)?)
        .filter(|_| frame[12..14] == [8, 0])
}

/// Checks that a frame which was let through is one its pod may send.
///
/// # Panics
/// If it is not.
pub fn check_sender(bytes: &[u8], attachment: &Attachment) {
    let source = &bytes[6..12];
    assert_eq!(source[0] & 1, 0, "a group sends");
    assert!(source != GATEWAY_MAC.0, "a pod poses as the gateway");
    let owns = |address: Ipv4Addr| {
        let owned = attachment.addresses.contains(&IpAddr::V4(address));
        !is_own(address) && (owned || !attachment.guarded)
    };
    if attachment.guarded {
        assert_eq!(source, attachment.mac.0, "a forged MAC address");
    }
    match [bytes[12], bytes[13]] {
        [0x08, 0x00] if bytes.len() >= 14 + 20 => {
            let source = ipv4(&bytes[14 + 12..]);
            assert!(owns(source), "{source} is forged");
            assert!(!is_martian(source), "{source} is no source");
        }
        [0x08, 0x06] if bytes.len() >= 14 + 28 && bytes[18..20] == [6, 4] => {
            let source = ipv4(&bytes[14 + 14..]);
            assert!(
                owns(source) || source.is_unspecified(),
                "{source} is forged"
            );
            assert!(!attachment.guarded || bytes[14 + 8..14 + 14] == attachment.mac.0);
        }
        [0x86, 0xdd] => {
            v6::check_sender(bytes, attachment);
            check_ipv6(&bytes[14..]);
        }
        [0x08, 0x00] | [0x08, 0x06] => {}
        kind => assert!(!attachment.guarded, "a frame of type {kind:02x?}"),
    }
    if let [0x08, 0x00] | [0x86, 0xdd] = [bytes[12], bytes[13]] {
        check_port(&bytes[14..]);
    }
}

/// Nothing for DHCP clients, as etherparse sees it.
fn check_port(packet: &[u8]) {
    let sliced = etherparse::SlicedPacket::from_ip(packet).ok();
    if let Some(etherparse::TransportSlice::Udp(udp)) = sliced.and_then(|sliced| sliced.transport) {
        let port = udp.destination_port();
        assert!(port != 68 && port != 546, "a DHCP server");
    }
}

/// No router advertisement, as etherparse sees it.
fn check_ipv6(packet: &[u8]) {
    let Ok(sliced) = etherparse::SlicedPacket::from_ip(packet) else {
        return;
    };
    if let Some(etherparse::TransportSlice::Icmpv6(icmp)) = sliced.transport {
        assert!(
            !matches!(icmp.slice()[0], 134 | 137),
            "a router advertisement"
        );
    }
}

/// What a virtio-net header says of the IPv4 packet in a frame, if it says the truth.
#[derive(Debug, Clone, Copy)]
pub struct Offload {
    /// The transport checksum's field, from the start of the packet; none if it is finished.
    pub unfinished: Option<(usize, usize)>,
    /// Length of the longest segment.
    pub longest: usize,
}

impl Offload {
    /// What `header` says of the frame, of which `tail` bytes are elsewhere; nothing if it is not
    /// so, if there is no TCP or UDP packet, or if it is of more packets than a kernel makes of one.
    pub fn read(frame: &[u8], header: Header, tail: usize) -> Option<Self> {
        let packet = inner(frame)?;
        if header == Header::default() {
            return Some(Self {
                unfinished: None,
                longest: packet.len(),
            });
        }
        if tail > 0 {
            return Some(Self {
                unfinished: None,
                longest: packet.len(),
            });
        }
        let at = Transport::parse(packet, 0).ok()?;
        let field = at.checksum_offset() - at.l4;
        let unfinished = match header.checksum {
            Checksum::Unknown | Checksum::Valid => None,
            Checksum::Partial { start, offset } => {
                let claimed = (usize::from(start), usize::from(offset));
                (claimed == (14 + at.l4, field)).then_some(())?;
                Some((at.l4, field))
            }
        };
        let longest = match header.gso {
            None => at.end,
            Some(gso) => {
                let tcp = at.protocol == Protocol::Tcp;
                let same = gso.kind == if tcp { GsoKind::TcpV4 } else { GsoKind::Udp };
                (same && unfinished.is_some()).then_some(())?;
                let (payload, size) = (at.payload_len(), usize::from(gso.size));
                // A kernel makes no more segments of one datagram, and none that are shorter. Of a
                // stream no more are taken.
                let (least, most) = if tcp { (8, 256) } else { (1, 128) };
                (size >= least && payload <= most * size).then_some(())?;
                at.payload + payload.min(size)
            }
        };
        Some(Self {
            unfinished,
            longest,
        })
    }
}

/// Finishes the checksum of a packet whose field has the pseudo header's sum.
pub fn finish(packet: &mut [u8], (start, field): (usize, usize)) {
    let mut sum = 0u32;
    for word in packet[start..].chunks(2) {
        sum += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let value = if sum == 0xffff { 0xffff } else { !(sum as u16) };
    packet[start + field..start + field + 2].copy_from_slice(&value.to_be_bytes());
}
