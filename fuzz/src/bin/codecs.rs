//! The codecs: what they decode they encode to the same bytes, and the other way about, and
//! etherparse is of the same opinion about what is valid and where its fields are.
#![cfg_attr(fuzzing, no_main)]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{
    ArpHardwareId, ArpPacketSlice, EtherType, Ethernet2Slice, Ipv4HeaderSlice,
    Ipv6FragmentHeaderSlice, Ipv6HeaderSlice, Ipv6RawExtHeaderSlice, TcpHeaderSlice,
    TcpOptionElement, UdpHeaderSlice,
};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::checksum;
use muslin_encap::ip::fragment::{self, Fragments};
use muslin_encap::ip::mss;
use muslin_encap::ip::transport::{self, ChecksumState, Protocol, Transport};
use muslin_encap::ip::v4;
use muslin_encap::ip::v6;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::virtio::{self, Checksum, Gso, GsoKind, Header};
use muslin_encap::tunnel::vxlan::{self, Vni, VtepMac};
use muslin_fuzz::Seed;
use muslin_stack::datapath::frame;
use muslin_stack::datapath::hash;
use muslin_stack::datapath::icmp::{self, IcmpError};
use muslin_stack::datapath::multicast::{
    Leaving, MEMBERSHIP_INTERVAL, Memberships, Report, igmp, mld,
};
use muslin_stack::datapath::ndp::{self, Held, Message};
use muslin_stack::datapath::port::PortId;
use muslin_stack::drops::DropReason;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, Icmpv6Packet, Icmpv6Repr,
    IpProtocol, IpVersion, Ipv6Packet, NdiscNeighborFlags, NdiscRepr,
};

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        // A VXLAN header, and its flags.
        &[8, 0, 0, 0, 0, 0, 1, 0],
        &[0x88, 0],
        // IPv4 headers without and with options, and "don't fragment"; IPv6.
        &[0x45, 0],
        &[0x4f, 0],
        &[0x40, 0],
        &[0x60, 0, 0, 0],
        // Extension headers of IPv6: options with padding, a piece, a way; a jumbogram's length.
        &[60, 0, 1, 4, 0, 0, 0, 0],
        &[44, 0, 0, 1, 0, 0, 0, 7],
        &[43, 0, 2, 0, 0, 0, 0, 0],
        &[51, 1, 0, 0, 0, 0, 0, 0],
        &[0xc2, 4],
        // Options of neighbour discovery.
        &[1, 1, 2, 0, 0, 0, 0, 7],
        &[2, 1, 2, 0, 0, 0, 0, 7],
        // Records of groups: their number, one without and one with a source.
        &[0, 0, 0, 1, 4, 0, 0, 0, 239, 1, 2, 3],
        &[0, 0, 0, 2, 3, 0, 0, 1, 239, 1, 2, 3],
        // ARP over Ethernet, and virtio-net headers of superpackets.
        &[0, 1, 8, 0, 6, 4, 0, 1],
        &[1, 1, 0, 0],
        &[1, 4, 0, 0],
        &[1, 5, 0, 0],
        // MAC addresses as text.
        b"0e:1f:20:a1:b2:c3",
        b"0E-1F-20-A1-B2-C3",
        b"0e1f.20a1.b2c3",
    ],
    inputs: 2_000_000,
    max_len: 2_000,
}

/// What the first byte chooses.
const VXLAN: u8 = 0;
const MAC: u8 = 1;
const VIRTIO: u8 = 2;
const ETHERNET: u8 = 3;
const TRANSPORT: u8 = 4;
const IPV4: u8 = 5;
const IPV6: u8 = 6;
const NDP: u8 = 7;
const CODECS: u8 = 8;
/// The same of messages on a link: not of its neighbours, but of its groups.
const GROUPS_V4: u8 = 1;
const GROUPS_V6: u8 = 2;

/// Where the IP header of a packet may be.
const L3: [usize; 4] = [0, 14, 18, 22];

/// The first byte chooses a codec, and where an IP header is or how an MTU is meant; the next two
/// are a VNI or an MTU.
fn run(data: &[u8]) {
    let [choice, first, second, bytes @ ..] = data else {
        return;
    };
    let number = u16::from_be_bytes([*first, *second]);
    match choice % CODECS {
        VXLAN => {
            let vni = Vni::new(u32::from(number) << 8 | u32::from(*first));
            vxlan_decoded(bytes);
            vxlan_encoded(bytes, vni.expect("it has 24 bits"));
        }
        MAC => mac(bytes),
        VIRTIO => virtio_header(bytes, number),
        ETHERNET => ethernet(bytes),
        TRANSPORT => transport(bytes, L3[usize::from(choice / CODECS % 4)]),
        IPV6 => {
            if let Some(total) = ipv6(bytes) {
                let packet = &bytes[..total];
                let mtu = match choice / CODECS % 2 {
                    0 => 68 + u32::from(number % 4000),
                    _ => exact_mtu_v6(packet, *first, *second),
                };
                let mtu = Mtu::new(mtu).expect("it is in range");
                walk(packet);
                hop(packet);
                clamp(packet, mtu);
                fragment_v6(packet, mtu, number.into());
                report_v6(packet, mtu);
            }
        }
        NDP => match choice / CODECS % 4 {
            GROUPS_V4 => groups(false, *first, *second, bytes),
            GROUPS_V6 => groups(true, *first, *second, bytes),
            _ => neighbour(*first, *second, bytes),
        },
        _ => {
            if let Some(total) = ipv4(bytes) {
                let packet = &bytes[..total];
                let mtu = match choice / CODECS % 2 {
                    0 => 68 + u32::from(number % 4000),
                    _ => exact_mtu(packet, *first, *second),
                };
                let mtu = Mtu::new(mtu).expect("it is in range");
                update(packet, number);
                forward(packet);
                fragment(packet, mtu);
                report(packet, mtu);
            }
        }
    }
}

fn vxlan_decoded(bytes: &[u8]) {
    let mut storage = bytes.to_vec();
    let mut packet = PacketBuf::new(&mut storage, 0, bytes.len()).expect("it fits");
    match vxlan::decapsulate(&mut packet) {
        Ok(vni) => {
            assert_eq!(packet.as_slice(), &bytes[8..]);
            assert_eq!(packet.headroom(), 8);
            vxlan::encapsulate(&mut packet, vni).expect("the old header's room is there");
            let header = [8, 0, 0, 0, bytes[4], bytes[5], bytes[6], 0];
            assert_eq!(packet.as_slice()[..8], header);
            assert_eq!(packet.as_slice()[8..], bytes[8..]);
        }
        Err(vxlan::Error::TooShort { len }) => assert!(len == bytes.len() && len < 8),
        Err(vxlan::Error::NoVni) => assert_eq!(bytes[0] & 8, 0),
    }
}

fn vxlan_encoded(frame: &[u8], vni: Vni) {
    let mut storage = vec![0xaa; HEADROOM + frame.len()];
    let mut packet = PacketBuf::new(&mut storage, HEADROOM, frame.len()).expect("it fits");
    packet.as_mut_slice().copy_from_slice(frame);
    vxlan::encapsulate(&mut packet, vni).expect("there is headroom");
    assert_eq!(packet.len(), frame.len() + vxlan::HEADER_LEN);
    let view = vxlan::Packet::new_checked(packet.as_slice()).expect("it is VXLAN");
    assert_eq!(view.vni(), vni);
    assert_eq!((view.group_policy(), view.payload()), (None, frame));
    assert_eq!(vxlan::decapsulate(&mut packet), Ok(vni));
    assert_eq!(packet.as_slice(), frame);
}

/// Text and back, and bytes to text and back.
fn mac(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(&bytes[..bytes.len().min(20)])
        && let Ok(mac) = text.parse::<VtepMac>()
    {
        let digits = text.bytes().filter(u8::is_ascii_hexdigit);
        let ours = mac.to_string().into_bytes();
        let ours = ours.into_iter().filter(u8::is_ascii_hexdigit);
        assert!(digits.map(|digit| digit.to_ascii_lowercase()).eq(ours));
        assert_eq!(mac.to_string().parse(), Ok(mac));
        assert!(mac.get().is_unicast());
    }
    if let Some(bytes) = bytes.first_chunk::<6>() {
        let mac = VtepMac::try_from(EthernetAddress(*bytes));
        assert_eq!(mac.is_ok(), bytes[0] & 1 == 0 && *bytes != [0; 6]);
        if let Ok(mac) = mac {
            assert_eq!(mac.to_string().parse(), Ok(mac));
        }
    }
}

fn virtio_header(bytes: &[u8], len: u16) {
    let decoded = Header::parse(bytes);
    if let Ok(header) = decoded {
        // What no flag says counts is not kept.
        let mut canonical = bytes[..virtio::LEN].to_vec();
        canonical[0] = match canonical[0] & 3 {
            0 => 0,
            2 => 2,
            _ => 1,
        };
        if canonical[0] != 1 {
            canonical[6..].fill(0);
        }
        if canonical[1] == 0 {
            canonical[4..6].fill(0);
        }
        assert_eq!(header.to_bytes()[..], canonical);
        assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
        virtio_offsets(header, len.into());
    } else {
        let known = matches!(bytes.get(1), Some(0 | 1 | 4 | 5 | 0x81 | 0x84));
        let sized = matches!(bytes.get(1), Some(0)) || bytes.get(4..6) != Some(&[0, 0]);
        assert!(bytes.len() < virtio::LEN || !known || !sized);
    }
    virtio_encoded(bytes);
}

/// A header that is made rather than read.
fn virtio_encoded(bytes: &[u8]) {
    let Some(&[state, kind, s0, s1, o0, o1, g0, g1, h0, h1]) = bytes.first_chunk() else {
        return;
    };
    let checksum = match state % 3 {
        0 => Checksum::Unknown,
        1 => Checksum::Valid,
        _ => Checksum::Partial {
            start: u16::from_ne_bytes([s0, s1]),
            offset: u16::from_ne_bytes([o0, o1]),
        },
    };
    let kind = [
        None,
        Some(GsoKind::TcpV4),
        Some(GsoKind::TcpV6),
        Some(GsoKind::Udp),
    ][usize::from(kind % 4)];
    let header = Header {
        checksum,
        gso: kind.map(|kind| Gso {
            kind,
            size: u16::from_ne_bytes([g0, g1]).max(1),
            ecn: kind != GsoKind::Udp && state > 127,
        }),
        hdr_len: u16::from_ne_bytes([h0, h1]),
    };
    assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
}

/// The header against a frame of `len` bytes, and moved with it.
fn virtio_offsets(header: Header, len: usize) {
    let partial = match header.checksum {
        Checksum::Partial { start, offset } => Some((usize::from(start), usize::from(offset))),
        Checksum::Unknown | Checksum::Valid => None,
    };
    let inside = partial.is_none_or(|(start, offset)| start + offset + 2 <= len);
    let hinted = usize::from(header.hdr_len) <= len;
    let superpacket = header.gso.is_none() || partial.is_some();
    assert_eq!(header.check(len).is_ok(), inside && hinted && superpacket);

    let (from, to) = (len % 32, len / 32 % 64);
    let moved = header.moved(from, to);
    let possible = partial
        .is_none_or(|(start, _)| start >= from && start - from + to <= usize::from(u16::MAX));
    assert_eq!(moved.is_some(), possible);
    if let Some(moved) = moved {
        assert_eq!(moved.gso, header.gso);
        let back = moved.moved(to, from).expect("it was there");
        assert_eq!(back.checksum, header.checksum);
        assert!(back.hdr_len == header.hdr_len || back.hdr_len == 0);
    }
}

fn ethernet(bytes: &[u8]) {
    let theirs = Ethernet2Slice::from_slice_without_fcs(bytes).ok();
    let ours = frame::parse(bytes).ok();
    assert_eq!(ours.is_some(), theirs.is_some());
    if let (Some(ours), Some(theirs)) = (ours, theirs) {
        assert_eq!(ours.src_addr().0, theirs.source());
        assert_eq!(ours.dst_addr().0, theirs.destination());
        assert_eq!(u16::from(ours.ethertype()), theirs.ether_type().0);
        assert_eq!(ours.payload(), theirs.payload_slice());
        assert_eq!(frame::is_arp(bytes), theirs.ether_type() == EtherType::ARP);
        arp(ours.payload());
        let mut storage = [&[0xaa; 14], ours.payload()].concat();
        let len = ours.payload().len();
        let mut packet = PacketBuf::new(&mut storage, 14, len).expect("it fits");
        frame::prepend(&mut packet, ours.src_addr(), ours.dst_addr()).expect("there is room");
        assert_eq!(packet.as_slice()[..12], bytes[..12]);
        assert_eq!(packet.as_slice()[12..14], [8, 0]);
        assert_eq!(packet.as_slice()[14..], bytes[14..]);
    }
}

fn arp(payload: &[u8]) {
    let theirs = ArpPacketSlice::from_slice(payload).ok().filter(|arp| {
        let types = (arp.hw_addr_type(), arp.proto_addr_type());
        types == (ArpHardwareId::ETHERNET, EtherType::IPV4)
            && (arp.hw_addr_size(), arp.proto_addr_size()) == (6, 4)
    });
    let ours = frame::arp(payload);
    assert_eq!(ours.is_some(), theirs.is_some());
    let (Some(ours), Some(theirs)) = (ours, theirs) else {
        return;
    };
    let mut bytes = [0; 28];
    ours.emit(&mut ArpPacket::new_unchecked(&mut bytes[..]));
    assert_eq!(bytes, payload[..28]);
    let ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: sha,
        source_protocol_addr: spa,
        target_hardware_addr: tha,
        target_protocol_addr: tpa,
    } = ours
    else {
        panic!("it is over Ethernet and IPv4");
    };
    assert_eq!(u16::from(operation), theirs.operation().0);
    assert_eq!(
        (&sha.0[..], &spa.octets()[..]),
        (theirs.sender_hw_addr(), theirs.sender_protocol_addr())
    );
    assert_eq!(
        (&tha.0[..], &tpa.octets()[..]),
        (theirs.target_hw_addr(), theirs.target_protocol_addr())
    );
    let written = frame::write_arp(operation, (sha, spa), (tha, tpa));
    assert_eq!(
        (&written[..6], &written[6..12], &written[12..14]),
        (&tha.0[..], &sha.0[..], &[8, 6][..])
    );
    // Who asks does not know the address it asks for.
    let target = if operation == ArpOperation::Request {
        [0; 6]
    } else {
        tha.0
    };
    let expected = [&bytes[..18], &target, &bytes[24..]].concat();
    assert_eq!(written[14..], expected);
}

/// TCP and UDP headers at a place, and their checksums.
fn transport(packet: &[u8], l3: usize) {
    let ours = Transport::parse(packet, l3).ok();
    let theirs = their_transport(packet, l3);
    assert_eq!(ours, theirs);
    let Some(at) = ours else {
        return;
    };
    let partial = at.pseudo_header(packet, at.end - at.l4).to_be_bytes();
    let field = at.checksum_offset()..at.checksum_offset() + 2;
    let is_partial = packet[field.clone()] == partial;
    let right = their_checksum(packet, &at).to_be_bytes();
    let zero = |value: &[u8]| matches!(value, [0, 0] | [0xff, 0xff]);
    let value = &packet[field.clone()];
    let none = at.protocol == Protocol::Udp && value == [0, 0];
    let expected = match at.version {
        _ if is_partial => ChecksumState::Partial,
        IpVersion::Ipv4 if none => ChecksumState::Valid,
        IpVersion::Ipv6 if none => ChecksumState::Invalid,
        _ if value == right || zero(value) && zero(&right) => ChecksumState::Valid,
        _ => ChecksumState::Invalid,
    };
    assert_eq!(at.checksum_state(packet), expected);

    let mut finished = packet.to_vec();
    finished[field.clone()].copy_from_slice(&partial);
    assert!(transport::complete_partial(&mut finished, l3));
    let value = &finished[field.clone()];
    assert!(value == right || zero(value) && zero(&right));
    finished[field.clone()].copy_from_slice(&packet[field]);
    assert_eq!(finished, packet);
}

/// The same headers, found by etherparse.
fn their_transport(packet: &[u8], l3: usize) -> Option<Transport> {
    let ip = packet.get(l3..)?;
    let announced = if l3 < 14 {
        None
    } else {
        packet.get(l3 - 2..l3)
    };
    let (version, ethertype, number, l4, end) = match ip.first()? >> 4 {
        4 => {
            let header = Ipv4HeaderSlice::from_slice(ip).ok()?;
            let (len, total) = (header.slice().len(), usize::from(header.total_len()));
            let whole = (len..=ip.len()).contains(&total) && !header.is_fragmenting_payload();
            let number = header.protocol().0;
            whole.then_some((IpVersion::Ipv4, [8, 0], number, len, total))?
        }
        6 => {
            let header = Ipv6HeaderSlice::from_slice(ip).ok()?;
            let end = 40 + usize::from(header.payload_length());
            let (mut number, mut at) = (header.next_header().0, 40);
            let all = ip.get(..end)?;
            // Hop-by-hop and destination options.
            while matches!(number, 0 | 60) {
                let options = Ipv6RawExtHeaderSlice::from_slice(&all[at..]).ok()?;
                number = options.next_header().0;
                at += options.slice().len();
            }
            (IpVersion::Ipv6, [0x86, 0xdd], number, at, end)
        }
        _ => return None,
    };
    if announced.is_some_and(|announced| announced != ethertype) {
        return None;
    }
    let segment = &ip[l4..end];
    let (protocol, header_len) = match number {
        6 => (
            Protocol::Tcp,
            TcpHeaderSlice::from_slice(segment).ok()?.slice().len(),
        ),
        17 => {
            let header = UdpHeaderSlice::from_slice(segment).ok()?;
            let whole = usize::from(header.length()) == segment.len();
            whole.then_some((Protocol::Udp, 8))?
        }
        _ => return None,
    };
    Some(Transport {
        version,
        protocol,
        l3,
        l4: l3 + l4,
        payload: l3 + l4 + header_len,
        end: l3 + end,
    })
}

fn their_checksum(packet: &[u8], at: &Transport) -> u16 {
    let address = |from: usize| -> [u8; 4] { packet[at.l3 + from..][..4].try_into().expect("4") };
    let address6 =
        |from: usize| -> [u8; 16] { packet[at.l3 + from..][..16].try_into().expect("16") };
    let (segment, payload) = (&packet[at.l4..at.end], &packet[at.payload..at.end]);
    match (at.protocol, at.version) {
        (Protocol::Tcp, version) => {
            let tcp = TcpHeaderSlice::from_slice(segment).expect("it is TCP");
            match version {
                IpVersion::Ipv4 => tcp.calc_checksum_ipv4_raw(address(12), address(16), payload),
                IpVersion::Ipv6 => tcp.calc_checksum_ipv6_raw(address6(8), address6(24), payload),
            }
        }
        (Protocol::Udp, version) => {
            let udp = UdpHeaderSlice::from_slice(segment)
                .expect("it is UDP")
                .to_header();
            match version {
                IpVersion::Ipv4 => udp.calc_checksum_ipv4_raw(address(12), address(16), payload),
                IpVersion::Ipv6 => udp.calc_checksum_ipv6_raw(address6(8), address6(24), payload),
            }
        }
    }
    .expect("it is not too long")
}

/// Whether the bytes begin with an IPv4 packet, by two opinions.
fn ipv4(bytes: &[u8]) -> Option<usize> {
    let theirs = Ipv4HeaderSlice::from_slice(bytes).ok().filter(|header| {
        let total = usize::from(header.total_len());
        // Its own sum forgets the reserved flag, so the sum is made here.
        let sum = header.slice().chunks(2).fold(0u32, |sum, word| {
            sum + u32::from(u16::from_be_bytes([word[0], word[1]]))
        });
        let sum = (sum & 0xffff) + (sum >> 16);
        (header.slice().len()..=bytes.len()).contains(&total)
            && (sum & 0xffff) + (sum >> 16) == 0xffff
    });
    let total = theirs
        .as_ref()
        .map(|header| usize::from(header.total_len()));
    assert_eq!(v4::check(bytes).ok(), total);
    if let Some(header) = theirs {
        // The header is all that is needed to know it.
        let head = header.slice();
        assert_eq!(v4::check_head(head, bytes.len()).ok(), total);
        assert_eq!(v4::check(head).is_ok(), total == Some(head.len()));
    }
    total
}

/// The checksum after the identification has changed, also to where the sum is all ones and a carry
/// has another.
fn update(packet: &[u8], new: u16) {
    let mut header = packet[..usize::from(packet[0] & 0x0f) * 4].to_vec();
    let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let (old, before) = (word(4), word(10));
    for new in [new, before.wrapping_add(old).wrapping_add(1)] {
        let updated = checksum::update(before, old, new);
        header[4..6].copy_from_slice(&new.to_be_bytes());
        header[10..12].fill(0);
        let sum = checksum::compute(&header);
        assert!(updated == sum || matches!((updated, sum), (0xffff, 0) | (0, 0xffff)));
    }
}

fn forward(packet: &[u8]) {
    let mut copy = packet.to_vec();
    match v4::decrement_ttl(&mut copy) {
        Some(ttl) => {
            assert_eq!(ttl, packet[8] - 1);
            assert_eq!(v4::check(&copy), Ok(packet.len()));
            assert_eq!((&copy[..8], copy[9]), (&packet[..8], packet[9]));
            assert_eq!(copy[12..], packet[12..]);
        }
        None => assert!(packet[8] == 0 && copy == packet),
    }
    let (one, two) = (
        hash::flow(packet, hash::Seed(1)),
        hash::flow(&copy, hash::Seed(1)),
    );
    assert_eq!(one, two, "a hop does not change a flow");
}

/// The MTU at which a packet is so many pieces, the last of which has just room, or room for a byte
/// more, or for all but one.
fn exact_mtu(packet: &[u8], pieces: u8, more: u8) -> u32 {
    let header_len = usize::from(packet[0] & 0x0f) * 4;
    let payload = packet.len() - header_len + usize::from(more % 3);
    let room = payload.saturating_sub(1) / usize::from(pieces % 8 + 1);
    (header_len + room).max(68) as u32
}

fn fragment(packet: &[u8], mtu: Mtu) {
    let (flags, header_len) = (packet[6], usize::from(packet[0] & 0x0f) * 4);
    let offset = |packet: &[u8]| usize::from(u16::from_be_bytes([packet[6] & 0x1f, packet[7]])) * 8;
    let possible = offset(packet) + packet.len() <= 65_535;
    let Some(mut fragments) = Fragments::new(packet, mtu) else {
        assert!(flags & 0x40 != 0 || !possible);
        return;
    };
    assert!(flags & 0x40 == 0 && possible);
    let (mut done, mut buffer) = (0, vec![0; mtu.get().into()]);
    while let Some(len) = fragments.write_next(&mut buffer) {
        let piece = &buffer[..len];
        assert!(len <= mtu.get().into());
        assert_eq!(v4::check(piece), Ok(len));
        assert_eq!(offset(piece), offset(packet) + done);
        let body = &piece[usize::from(piece[0] & 0x0f) * 4..];
        let rest = packet.len() - header_len - done;
        let fits = piece.len() - body.len() + rest <= mtu.get().into();
        assert_eq!(body.len() == rest, fits, "what fits is the last piece");
        assert!(fits || len + 8 > mtu.get().into(), "a piece is full");
        assert_eq!(
            body,
            &packet[header_len + done..header_len + done + body.len()]
        );
        done += body.len();
        let last = header_len + done == packet.len();
        assert_eq!(piece[6] & 0x20 != 0, !last || flags & 0x20 != 0);
        assert!(last || body.len() % 8 == 0);
    }
    assert_eq!(header_len + done, packet.len());
}

fn report(packet: &[u8], mtu: Mtu) {
    let mut buffer = vec![0; usize::from(mtu.get()).min(700)];
    let source = Ipv4Addr::new(10, 244, 1, 1);
    if let Some(len) = IcmpError::TimeExceeded.write(&mut buffer, source, packet) {
        let error = &buffer[..len];
        assert!(len <= 576);
        assert_eq!(v4::check(error), Ok(len));
        assert_eq!(checksum::compute(&error[20..]), 0);
        assert_eq!(error[16..20], packet[12..16]);
        assert_eq!(error[28..], packet[..len - 28]);
    }
}

/// Checks that the packet is valid if etherparse says so, and returns its length.
fn ipv6(bytes: &[u8]) -> Option<usize> {
    let theirs = Ipv6HeaderSlice::from_slice(bytes).ok();
    let total = theirs.map(|header| 40 + usize::from(header.payload_length()));
    // A length of zero in front of hop-by-hop options is in these.
    let is_jumbo = theirs.is_some_and(|it| it.payload_length() == 0 && it.next_header().0 == 0);
    let expected = total.filter(|total| *total <= bytes.len() && !is_jumbo);
    assert_eq!(v6::check(bytes).ok(), expected);
    assert_eq!(
        v6::check_head(&bytes[..bytes.len().min(40)], bytes.len()).ok(),
        expected
    );
    expected
}

/// What the upper layer is, where it is, and what a Fragment header says.
type Way = (u8, usize, Option<(u16, bool, u32)>);

/// The way through the extension headers, as etherparse has it for each of them.
fn way(packet: &[u8]) -> Option<Way> {
    let (mut next, mut at, mut fragment) = (packet[6], 40, None);
    for count in 0.. {
        let rest = packet.get(at..).unwrap_or_default();
        let len = match next {
            0 | 43 | 60 => {
                let header = Ipv6RawExtHeaderSlice::from_slice(rest).ok()?;
                let is_late = next == 0 && count > 0;
                let is_source_route = next == 43 && header.payload()[0] == 0;
                if is_late || is_source_route || next == 0 && claims_length(header.payload()) {
                    return None;
                }
                next = header.next_header().0;
                header.slice().len()
            }
            44 if fragment.is_some() => return None,
            44 => {
                let header = Ipv6FragmentHeaderSlice::from_slice(rest).ok()?;
                let offset = header.fragment_offset().value() * 8;
                fragment = Some((offset, header.more_fragments(), header.identification()));
                next = header.next_header().0;
                8
            }
            51 => {
                let len = (usize::from(*rest.get(1)?) + 2) * 4;
                next = *rest.get(..len)?.first()?;
                len
            }
            135 | 139 | 140 | 253 | 254 => return None,
            _ => break,
        };
        at += len;
        if count >= 8 || at > 40 + 256 {
            return None;
        }
        if fragment.is_some_and(|(offset, ..)| offset > 0) {
            break;
        }
    }
    let least = match next {
        6 => 20,
        17 | 58 => 8,
        _ => 0,
    };
    let is_first = fragment.is_some_and(|(offset, more, _)| offset == 0 && more);
    (!is_first || packet.len() >= at + least).then_some((next, at, fragment))
}

/// Whether one of these options is a jumbogram's.
fn claims_length(mut options: &[u8]) -> bool {
    loop {
        options = match options {
            [] => return false,
            [0xc2, ..] => return true,
            [0, rest @ ..] => rest,
            [_] => return false,
            [_, len, rest @ ..] => rest.get(usize::from(*len)..).unwrap_or_default(),
        };
    }
}

fn walk(packet: &[u8]) {
    let ours = v6::upper_layer(packet).ok();
    let fragment = |it: v6::FragmentInfo| (it.offset, it.more, it.id);
    let read = ours.map(|it| (it.protocol, it.offset, it.fragment.map(fragment)));
    assert_eq!(read, way(packet));
    let Some(ours) = ours else {
        return;
    };
    assert_eq!(packet[ours.protocol_at], ours.protocol);
    if let Some(option) = v6::unknown_option(packet) {
        assert!((42..ours.offset).contains(&option.at) && packet[option.at] >= 0x40);
    }
}

fn hop(packet: &[u8]) {
    let mut copy = packet.to_vec();
    let left = v6::decrement_hop_limit(&mut copy);
    assert_eq!(left, packet[7].checked_sub(1));
    copy[7] = packet[7];
    assert_eq!(copy, packet, "it changes nothing else");
}

/// The segment size of a SYN is what fits, and nothing else has changed but the checksum, as it must.
fn clamp(packet: &[u8], mtu: Mtu) {
    let mut copy = packet.to_vec();
    let lowered = mss::clamp(&mut copy, Checksum::Unknown, mtu);
    assert_eq!(lowered, copy != packet);
    let Some((6, at, fragment)) = way(packet) else {
        return assert!(!lowered);
    };
    let is_later = fragment.is_some_and(|(offset, ..)| offset > 0);
    let Some(tcp) = TcpHeaderSlice::from_slice(&copy[at..])
        .ok()
        .filter(|_| !is_later)
    else {
        return assert!(!lowered);
    };
    if !tcp.syn() {
        return assert!(!lowered);
    }
    for option in tcp.options_iterator().map_while(Result::ok) {
        if let TcpOptionElement::MaximumSegmentSize(mss) = option {
            assert!(mss <= mtu.get() - 60);
        }
    }
    assert_eq!(copy[..at + 16], packet[..at + 16]);
    let [ours, theirs] = [&copy, packet].map(|it| v6::upper_checksum(it, 6, at));
    let is_same = ours == theirs || matches!((ours, theirs), (0, 0xffff) | (0xffff, 0));
    assert!(is_same, "a right sum stays right, and a wrong one wrong");
}

/// As [`exact_mtu`].
fn exact_mtu_v6(packet: &[u8], pieces: u8, more: u8) -> u32 {
    let payload = packet.len() - 40 + usize::from(more % 3);
    let room = payload.saturating_sub(1) / usize::from(pieces % 8 + 1);
    (48 + room).clamp(68, 65_535) as u32
}

fn fragment_v6(packet: &[u8], mtu: Mtu, id: u32) {
    let Some(mut fragments) = fragment::v6::Fragments::new(packet, mtu, id) else {
        return assert!(matches!(packet[6], 0 | 43 | 44));
    };
    let (mut done, mut buffer) = (40, vec![0; mtu.get().into()]);
    while let Some(len) = fragments.write_next(&mut buffer) {
        let piece = &buffer[..len];
        assert_eq!(v6::check(piece), Ok(len));
        assert_eq!((&piece[..4], piece[6]), (&packet[..4], 44));
        assert_eq!(piece[7..40], packet[7..40]);
        let header = Ipv6FragmentHeaderSlice::from_slice(&piece[40..]).expect("it is one");
        assert_eq!(
            (header.next_header().0, header.identification()),
            (packet[6], id)
        );
        assert_eq!(usize::from(header.fragment_offset().value()) * 8, done - 40);
        let body = &piece[48..];
        assert_eq!(body, &packet[done..done + body.len()]);
        let fits = 48 + packet.len() - done <= mtu.get().into();
        done += body.len();
        assert_eq!(fits, done == packet.len(), "what fits is the last piece");
        assert_eq!(header.more_fragments(), !fits);
        assert!(fits || body.len() % 8 == 0 && len + 8 > mtu.get().into());
    }
    assert_eq!(done, packet.len());
}

fn report_v6(packet: &[u8], mtu: Mtu) {
    let mut buffer = vec![0; usize::from(mtu.get()).min(1400)];
    let source: Ipv6Addr = [0xfd; 16].into();
    let way = way(packet);
    let is_icmp_error = way.is_some_and(|(protocol, at, _)| {
        protocol == 58
            && packet
                .get(at)
                .is_none_or(|kind| *kind < 128 || *kind == 137)
    });
    let is_later = way.is_some_and(|(_, _, it)| it.is_some_and(|(offset, ..)| offset > 0));
    for error in [
        IcmpError::TimeExceeded,
        IcmpError::FragmentationNeeded(1300),
    ] {
        let Some(len) = error.write(&mut buffer, source, packet) else {
            continue;
        };
        assert!(way.is_some() && !is_icmp_error && !is_later);
        let to_many = packet[24] == 0xff;
        assert!(!to_many || error != IcmpError::TimeExceeded);
        assert!(
            packet[8] != 0xff && packet[8..24] != [0; 16],
            "from nobody or many"
        );
        let error = &buffer[..len];
        assert!(len <= 1280);
        assert_eq!(v6::check(error), Ok(len));
        assert_eq!(
            (&error[8..24], &error[24..40]),
            (&[0xfd; 16][..], &packet[8..24])
        );
        let message = Icmpv6Packet::new_checked(&error[40..]).expect("it is whole");
        assert!(message.verify_checksum(&source, &Ipv6Packet::new_unchecked(error).dst_addr()));
        assert_eq!(error[48..], packet[..len - 48]);
        assert!(icmp::is_error(error) && !icmp::may_answer(error));
    }
}

/// A message of neighbour discovery of this kind and shape: what is valid is said by the rules of RFC
/// 4861, one after the other, and what is answered is read by smoltcp.
fn neighbour(kind: u8, shape: u8, rest: &[u8]) {
    let own: Ipv6Addr = "fd00::1".parse().expect("an address");
    let pod: Ipv6Addr = "fd00::2".parse().expect("an address");
    let kind = 132 + kind % 7;
    let mut message = [&[kind, u8::from(shape & 0x80 != 0), 0, 0], rest].concat();
    if shape & 0x40 != 0
        && let Some(target) = message.get_mut(8..24)
    {
        target.copy_from_slice(&own.octets());
    }
    let source = if shape & 1 != 0 {
        Ipv6Addr::UNSPECIFIED
    } else {
        pod
    };
    let destination = match shape >> 1 & 3 {
        0 => ndp::solicited_node(own),
        1 => ndp::ALL_NODES,
        _ => own,
    };
    let header = v6::Header {
        traffic_class: 0,
        flow_label: 0,
        payload_len: message.len() as u16,
        next_header: IpProtocol::Icmpv6,
        hop_limit: if shape & 8 != 0 { 64 } else { 255 },
        source,
        destination,
    };
    let mut packet = [&header.to_bytes()[..], &message].concat();
    v6::fill_icmp_checksum(&mut packet, 40);
    if shape & 0x10 != 0 && packet.len() >= 44 {
        packet[42] ^= 1;
    }
    let in_piece = shape & 0x20 != 0;
    if in_piece {
        packet.splice(40..40, [58, 0, 0, 0, 0, 0, 0, 7]);
        v6::set_next_header(&mut packet, 44.into());
        let len = (packet.len() - 40) as u16;
        v6::set_payload_len(&mut packet, len);
    }
    let parsed = Message::parse(&packet);
    let head = match kind {
        133 => 8,
        135 | 136 => 24,
        134 | 137 => return assert!(parsed.is_err(), "nobody is a router"),
        _ => return assert_eq!(parsed, Ok(None)),
    };
    let wanted = if kind == 136 { 2 } else { 1 };
    let options = message.get(head..).and_then(|it| options_of(it, wanted));
    let (nobody, many) = (shape & 1 != 0, destination.is_multicast());
    let is_valid = shape & (0x80 | 0x20 | 0x10 | 8) == 0
        && options.is_some_and(|mac| match kind {
            133 => !nobody || mac.is_none(),
            135 => message[8] != 0xff && (!nobody || (shape >> 1 & 3 == 0 && mac.is_none())),
            _ => message[8] != 0xff && !(many && message[4] & 0x40 != 0),
        });
    assert_eq!(parsed.is_ok(), is_valid, "{packet:x?}");
    let Ok(Some(Message::Solicitation(asked))) = parsed else {
        return;
    };
    assert_eq!(asked.mac, options.flatten());
    assert_eq!(
        (asked.source, asked.target.octets()),
        (source, *message[8..].first_chunk().expect("a target"))
    );
    let (mac, from) = (
        EthernetAddress([2, 0, 0, 0, 0, 1]),
        EthernetAddress([2, 0, 0, 0, 0, 2]),
    );
    let held = [Held {
        address: own,
        router: true,
        anycast: false,
    }];
    let answered = ndp::answer(&asked, from, &held, mac);
    assert_eq!(answered.is_some(), asked.target == own);
    let Some(answered) = answered else {
        return;
    };
    let frame = EthernetFrame::new_checked(&answered[..]).expect("a frame");
    let packet = Ipv6Packet::new_checked(frame.payload()).expect("a packet");
    let message = Icmpv6Packet::new_checked(packet.payload()).expect("a message");
    let all = ChecksumCapabilities::default();
    let read = Icmpv6Repr::parse(&packet.src_addr(), &packet.dst_addr(), &message, &all);
    let Ok(Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags,
        target_addr,
        lladdr,
    })) = read
    else {
        panic!("{read:?}");
    };
    assert_eq!(
        (target_addr, lladdr, packet.hop_limit()),
        (own, Some(mac.into()), 255)
    );
    assert_eq!(flags.contains(NdiscNeighborFlags::SOLICITED), !nobody);
    let to = if nobody { ndp::ALL_NODES } else { pod };
    assert_eq!(packet.dst_addr(), to);
    assert_eq!(frame.dst_addr().is_multicast(), nobody);
}

/// The MAC address in the first option of a kind, if there is one; `None` if they are not whole options.
fn options_of(options: &[u8], wanted: u8) -> Option<Option<EthernetAddress>> {
    let (mut at, mut found) = (0, None);
    while at < options.len() {
        let len = usize::from(*options.get(at + 1)?) * 8;
        if len == 0 || at + len > options.len() {
            return None;
        }
        if options[at] == wanted && len == 8 && found.is_none() {
            found = Some(EthernetAddress::from_bytes(&options[at + 2..at + 8]));
        }
        at += len;
    }
    Some(found)
}

/// A message about groups of this kind and shape: who joins and leaves by it is said by a model of the
/// records of RFC 3376 and RFC 3810, and whoever joins is a member.
fn groups(is_v6: bool, kind: u8, shape: u8, rest: &[u8]) {
    let kinds: &[u8] = if is_v6 {
        &[130, 131, 132, 143]
    } else {
        &[0x11, 0x12, 0x16, 0x17, 0x22, 0x13]
    };
    let kind = kinds[usize::from(kind) % kinds.len()];
    let message = [&[kind, 0, 0, 0], rest].concat();
    let packet = if is_v6 {
        listener(&message, shape)
    } else {
        member(&message, shape)
    };
    let mut read = Vec::new();
    let mut each = |it: Report| read.push((it.group, it.joins));
    let result = if is_v6 {
        match mld::find(&packet) {
            Ok(Some(offset)) => mld::read(&packet, offset, &mut each),
            other => panic!("{other:?}: it is one"),
        }
    } else {
        igmp::read(&packet, &mut each)
    };
    let is_right = shape & 4 == 0 && (is_v6 || shape & 3 == 0);
    let expected = modelled(&message, if is_v6 { 16 } else { 4 }).filter(|_| is_right);
    match (kind, expected) {
        (0x11 | 130, _) => assert_eq!(result, Err(DropReason::ForeignQuerier)),
        (_, None) => assert!(result.is_err() && read.is_empty(), "{message:x?}"),
        (_, Some(expected)) => {
            assert_eq!((result, &read), (Ok(()), &expected), "{message:x?}");
            hear(&read);
        }
    }
}

/// Has a table take what was read.
fn hear(read: &[(IpAddr, bool)]) {
    let (mut table, now, port) = (Memberships::default(), Instant::ZERO, PortId(1));
    let mut model = BTreeSet::new();
    for (group, joins) in read {
        if !joins {
            table.leave(now, port, *group, Leaving::AtOnce);
            model.remove(group);
        } else if table.join(now, port, *group).is_ok() {
            model.insert(*group);
        } else {
            assert!(model.len() >= 128 && !model.contains(group));
        }
    }
    assert_eq!(table.iter(now).count(), model.len());
    assert!(model.iter().all(|it| table.members(now, *it).eq([port])));
    table.expire(now + MEMBERSHIP_INTERVAL);
    assert!(table.iter(now).next().is_none() && table.poll_at().is_none());
}

/// A packet with IGMP: of another link, in pieces or damaged, as the shape says.
fn member(message: &[u8], shape: u8) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(field) = message.get_mut(2..4) {
        field.fill(0);
    }
    let sum = checksum::compute(&message).wrapping_add(u16::from(shape & 4));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let options: &[u8] = if shape & 8 != 0 {
        &[0x94, 4, 0, 0]
    } else {
        &[]
    };
    let fragment = [if shape & 2 != 0 { 0x20 } else { 0 }, 0];
    let mut packet = packet_v4(options, fragment, 2, &message);
    packet[8] = if shape & 1 != 0 { 2 } else { 1 };
    packet
}

/// A packet with MLD, behind other headers or damaged, as the shape says. Of which link it is, the guard
/// has to say.
fn listener(message: &[u8], shape: u8) -> Vec<u8> {
    let options: &[u8] = if shape & 8 != 0 {
        &[58, 0, 5, 2, 0, 0, 1, 0]
    } else {
        &[]
    };
    let next = if options.is_empty() { 58 } else { 0 };
    let mut packet = packet_v6(next, &[options, message].concat());
    v6::set_payload_len(&mut packet, (options.len() + message.len()) as u16);
    v6::fill_icmp_checksum(&mut packet, 40 + options.len());
    packet[40 + options.len() + 3] ^= shape & 4;
    packet
}

/// What a report says; `None` if it is not whole, or none.
fn modelled(message: &[u8], size: usize) -> Option<Vec<(IpAddr, bool)>> {
    let group = |at: usize| -> Option<IpAddr> {
        let bytes = message.get(at..at + size)?;
        Some(match size {
            4 => <[u8; 4]>::try_from(bytes).ok()?.into(),
            _ => <[u8; 16]>::try_from(bytes).ok()?.into(),
        })
    };
    let number =
        |at: usize| Some(usize::from(*message.get(at)?) << 8 | usize::from(*message.get(at + 1)?));
    let mut all = Vec::new();
    message.get(7)?;
    match message[0] {
        0x12 | 0x16 => all.push((group(4)?, true)),
        0x17 => all.push((group(4)?, false)),
        131 => all.push((group(8)?, true)),
        132 => all.push((group(8)?, false)),
        0x22 | 143 => {
            let mut at = 8;
            for _ in 0..number(6)? {
                let sources = number(at + 2)?;
                let end = at + 4 + size + sources * size + usize::from(message[at + 1]) * 4;
                if end > message.len() {
                    return None;
                }
                // "Include nobody" is to leave; blocking some is neither.
                match (message[at], sources) {
                    (2 | 4, _) | (1 | 3 | 5, 1..) => all.push((group(at + 4)?, true)),
                    (1 | 3, 0) => all.push((group(at + 4)?, false)),
                    _ => {}
                }
                at = end;
            }
        }
        _ => return None,
    }
    all.retain(|(group, _)| group.is_multicast());
    Some(all)
}

fn seeds() -> Vec<Seed> {
    let with = |choice: u8, number: [u8; 2], bytes: &[u8]| [&[choice], &number[..], bytes].concat();
    let small = |choice, bytes: &[u8]| with(choice, [0, 40], bytes);
    let place = |index: u8| TRANSPORT + index * CODECS;
    let tcp = tcp_segment();
    let udp = [&[0x80, 0, 0, 53, 0, 12, 1, 2][..], b"muslin"[..4].as_ref()].concat();
    let options = [17, 0, 1, 4, 0, 0, 0, 0];
    let mut syn = tcp.clone();
    syn[13] = 2;
    let framed = |ethertype: [u8; 2], packet: &[u8]| [&[2; 12], &ethertype[..], packet].concat();
    vec![
        (
            "vxlan",
            small(VXLAN, &[&[8, 0, 0, 0, 0, 0, 1, 0][..], &[2; 60]].concat()),
        ),
        (
            "vxlan-group-policy",
            small(VXLAN, &[0x88, 0x40, 0x12, 0x34, 0, 0, 7, 0xff]),
        ),
        ("vxlan-no-vni", small(VXLAN, &[0xf7, 0, 0, 0, 0, 0, 1, 0])),
        ("mac-colons", small(MAC, b"0e:1f:20:a1:b2:c3")),
        ("mac-dots", small(MAC, b"0e1f.20a1.b2c3")),
        (
            "virtio-tcp4",
            with(VIRTIO, [0x0b, 14], &[1, 1, 66, 0, 0x76, 5, 34, 0, 16, 0]),
        ),
        (
            "virtio-tcp6-ecn",
            with(VIRTIO, [0x0b, 14], &[1, 0x84, 86, 0, 0x62, 5, 54, 0, 16, 0]),
        ),
        (
            "virtio-udp",
            with(VIRTIO, [0x0b, 14], &[1, 5, 42, 0, 0, 4, 34, 0, 6, 0]),
        ),
        (
            "virtio-valid",
            with(VIRTIO, [0, 60], &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ),
        (
            "virtio-ufo",
            with(VIRTIO, [0, 60], &[1, 3, 0, 0, 9, 0, 34, 0, 6, 0]),
        ),
        (
            "ethernet-arp",
            small(ETHERNET, &framed([8, 6], &arp_request())),
        ),
        (
            "ethernet-ipv4",
            small(ETHERNET, &framed([8, 0], &packet_v4(&[], [0, 0], 17, &udp))),
        ),
        ("tcp4", small(place(0), &packet_v4(&[], [0x40, 0], 6, &tcp))),
        (
            "tcp4-framed",
            small(
                place(1),
                &framed([8, 0], &packet_v4(&[1, 1, 1, 0], [0, 0], 6, &tcp)),
            ),
        ),
        (
            "udp4-padded",
            small(
                place(0),
                &[&packet_v4(&[], [0, 0], 17, &udp)[..], &[0; 6]].concat(),
            ),
        ),
        (
            "udp4-fragment",
            small(place(0), &packet_v4(&[], [0x20, 0], 17, &udp)),
        ),
        (
            "udp4-exact-pieces",
            with(
                IPV4 + CODECS,
                [1, 1],
                &packet_v4(&[], [0, 0], 17, &[3; 112]),
            ),
        ),
        ("tcp6", small(place(0), &packet_v6(6, &tcp))),
        (
            "udp6-options",
            small(place(0), &packet_v6(60, &[&options[..], &udp].concat())),
        ),
        (
            "udp6-vxlan",
            small(
                place(3),
                &[
                    &[8, 0, 0, 0, 0, 0, 1, 0][..],
                    &framed([0x86, 0xdd], &packet_v6(17, &udp)),
                ]
                .concat(),
            ),
        ),
        ("ipv4", small(IPV4, &packet_v4(&[], [0, 0], 17, &[9; 300]))),
        (
            "ipv4-dont-fragment",
            small(IPV4, &packet_v4(&[], [0x40, 0], 17, &[9; 300])),
        ),
        (
            "ipv4-options",
            small(
                IPV4,
                &packet_v4(&[7, 3, 4, 1, 148, 4, 0, 0], [0, 0], 17, &[9; 300]),
            ),
        ),
        ("ipv6", small(IPV6, &packet_v6(17, &udp))),
        (
            "ipv6-exact-pieces",
            with(IPV6 + CODECS, [1, 1], &packet_v6(17, &[3; 112])),
        ),
        ("ipv6-syn", small(IPV6, &packet_v6(6, &syn))),
        (
            "ipv6-syn-behind",
            small(
                IPV6,
                &packet_v6(60, &[&[6, 0, 1, 4, 0, 0, 0, 0][..], &syn].concat()),
            ),
        ),
        (
            "ipv6-chain",
            small(
                IPV6,
                &packet_v6(
                    0,
                    &[
                        &[60, 0, 5, 2, 0, 0, 1, 0][..],
                        &[43, 1, 0, 1, 0, 1, 0x45, 1, 8, 0, 0, 0, 0, 0, 0, 0],
                        &[51, 0, 2, 0, 0, 0, 0, 0],
                        &[44, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1],
                        &[17, 0, 0, 1, 0, 0, 0, 7],
                        &udp,
                    ]
                    .concat(),
                ),
            ),
        ),
        (
            "ipv6-many",
            small(
                IPV6,
                &packet_v6(60, &[[60, 0, 1, 4, 0, 0, 0, 0]; 10].concat()),
            ),
        ),
        (
            "ipv6-eight",
            small(
                IPV6,
                &packet_v6(
                    60,
                    &[&[60, 0, 1, 4, 0, 0, 0, 0].repeat(7)[..], &options, &udp].concat(),
                ),
            ),
        ),
        (
            "ipv6-long",
            small(
                IPV6,
                &packet_v6(60, &[&[17, 31][..], &[0; 254 - 8]].concat()),
            ),
        ),
        (
            "ipv6-jumbo",
            small(
                IPV6,
                &packet_v6(0, &[&[17, 0, 0xc2, 4, 0, 1, 0, 0][..], &udp].concat()),
            ),
        ),
        (
            "ipv6-source-route",
            small(
                IPV6,
                &packet_v6(43, &[&[17, 0, 0, 0, 0, 0, 0, 0][..], &udp].concat()),
            ),
        ),
        (
            "ipv6-two-pieces",
            small(
                IPV6,
                &packet_v6(
                    44,
                    &[
                        &[44, 0, 0, 0, 0, 0, 0, 7][..],
                        &[17, 0, 0, 0, 0, 0, 0, 7],
                        &udp,
                    ]
                    .concat(),
                ),
            ),
        ),
        (
            "ipv6-cut-piece",
            small(
                IPV6,
                &packet_v6(44, &[&[6, 0, 0, 1, 0, 0, 0, 7][..], &tcp[..19]].concat()),
            ),
        ),
        (
            "ipv6-later-piece",
            small(IPV6, &packet_v6(44, &[60, 0, 0, 8, 0, 0, 0, 7, 60])),
        ),
        (
            "ipv6-error",
            small(
                IPV6,
                &packet_v6(60, &[58, 0, 1, 4, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
            ),
        ),
        (
            "ipv6-many-receivers",
            small(IPV6, &to_many(&packet_v6(17, &udp))),
        ),
        (
            "ndp-asks",
            with(NDP, [3, 0x40], &neighbour_body(&[1, 1, 2, 0, 0, 0, 0, 7])),
        ),
        ("ndp-probe", with(NDP, [3, 0x41], &neighbour_body(&[]))),
        (
            "ndp-probe-to-one",
            with(NDP, [3, 0x45], &neighbour_body(&[])),
        ),
        (
            "ndp-probe-to-all",
            with(NDP, [3, 0x43], &neighbour_body(&[])),
        ),
        (
            "ndp-probe-with-mac",
            with(NDP, [3, 0x41], &neighbour_body(&[1, 1, 2, 0, 0, 0, 0, 7])),
        ),
        ("ndp-old", with(NDP, [3, 0x48], &neighbour_body(&[]))),
        ("ndp-damaged", with(NDP, [3, 0x50], &neighbour_body(&[]))),
        ("ndp-piece", with(NDP, [3, 0x60], &neighbour_body(&[]))),
        ("ndp-code", with(NDP, [3, 0xc0], &neighbour_body(&[]))),
        (
            "ndp-no-length",
            with(NDP, [3, 0x40], &neighbour_body(&[1, 0, 2, 0, 0, 0, 0, 7])),
        ),
        (
            "ndp-too-long",
            with(NDP, [3, 0x40], &neighbour_body(&[1, 2, 2, 0, 0, 0, 0, 7])),
        ),
        (
            "ndp-many",
            with(NDP, [3, 0], &[&[0; 4][..], &[0xff; 16]].concat()),
        ),
        (
            "ndp-tells",
            with(NDP, [4, 0x44], &neighbour_body(&[2, 1, 2, 0, 0, 0, 0, 7])),
        ),
        (
            "ndp-tells-all",
            with(NDP, [4, 0x42], &[&[0x40, 0, 0, 0][..], &[0; 16]].concat()),
        ),
        (
            "ndp-routers",
            with(NDP, [1, 2], &[0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 7]),
        ),
        ("ndp-router", with(NDP, [2, 2], &[0; 12])),
        (
            "groups-v2",
            with(NDP + GROUPS_V4 * CODECS, [2, 8], &[239, 1, 2, 3]),
        ),
        (
            "groups-v2-leaves",
            with(NDP + GROUPS_V4 * CODECS, [3, 0], &[239, 1, 2, 3]),
        ),
        (
            "groups-v3",
            with(
                NDP + GROUPS_V4 * CODECS,
                [4, 8],
                &[
                    &[0, 0, 0, 2, 4, 0, 0, 0, 239, 1, 2, 3][..],
                    &[3, 0, 0, 1, 239, 1, 2, 4, 1, 2, 3, 4],
                ]
                .concat(),
            ),
        ),
        (
            "groups-v3-leaves",
            with(
                NDP + GROUPS_V4 * CODECS,
                [4, 0],
                &[
                    &[
                        0, 0, 0, 3, 4, 0, 0, 0, 239, 1, 2, 3, 6, 0, 0, 0, 239, 1, 2, 3,
                    ][..],
                    &[3, 0, 0, 0, 239, 1, 2, 3],
                ]
                .concat(),
            ),
        ),
        (
            "groups-v3-blocks",
            with(
                NDP + GROUPS_V4 * CODECS,
                [4, 0],
                &[0, 0, 0, 1, 6, 0, 0, 1, 239, 1, 2, 3, 192, 0, 2, 1],
            ),
        ),
        (
            "groups-v3-cut",
            with(
                NDP + GROUPS_V4 * CODECS,
                [4, 0],
                &[0, 0, 0, 1, 4, 1, 0, 0, 239, 1, 2, 3],
            ),
        ),
        (
            "groups-v3-none",
            with(
                NDP + GROUPS_V4 * CODECS,
                [4, 0],
                &[0, 0, 0, 1, 4, 0, 0, 0, 10, 1, 2, 3],
            ),
        ),
        (
            "groups-elsewhere",
            with(NDP + GROUPS_V4 * CODECS, [2, 1], &[239, 1, 2, 3]),
        ),
        (
            "groups-piece",
            with(NDP + GROUPS_V4 * CODECS, [2, 2], &[239, 1, 2, 3]),
        ),
        (
            "groups-damaged",
            with(NDP + GROUPS_V4 * CODECS, [2, 4], &[239, 1, 2, 3]),
        ),
        (
            "groups-query",
            with(NDP + GROUPS_V4 * CODECS, [0, 0], &[0; 4]),
        ),
        (
            "listeners-v1",
            with(
                NDP + GROUPS_V6 * CODECS,
                [1, 8],
                &[
                    &[0; 4][..],
                    &[0xff, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3],
                ]
                .concat(),
            ),
        ),
        (
            "listeners-v2",
            with(
                NDP + GROUPS_V6 * CODECS,
                [3, 8],
                &[
                    &[0, 0, 0, 1, 4, 0, 0, 0][..],
                    &[0xff, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3],
                ]
                .concat(),
            ),
        ),
        (
            "listeners-damaged",
            with(
                NDP + GROUPS_V6 * CODECS,
                [1, 4],
                &[&[0; 4][..], &[0xff; 16]].concat(),
            ),
        ),
        (
            "ipv4-last-fragment",
            small(IPV4, &packet_v4(&[], [0x1f, 0xff], 17, &[9; 300])),
        ),
    ]
}

fn tcp_segment() -> Vec<u8> {
    let header = [
        0x80, 0, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 2, 0x60, 0x18, 1, 2, 0, 0, 0, 0,
    ];
    [&header[..], &[2, 4, 5, 0xb4], b"hello"].concat()
}

fn arp_request() -> Vec<u8> {
    let sender = [0x0a, 0x58, 10, 244, 1, 2, 10, 244, 1, 2];
    [
        &[0, 1, 8, 0, 6, 4, 0, 1][..],
        &sender,
        &[0; 6],
        &[10, 244, 1, 1],
    ]
    .concat()
}

fn packet_v4(options: &[u8], fragment: [u8; 2], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let header_len = 20 + options.len();
    let total = (header_len + payload.len()) as u16;
    let mut bytes = vec![0x40 | (header_len / 4) as u8, 0];
    bytes.extend(total.to_be_bytes());
    bytes.extend([0, 7, fragment[0], fragment[1], 64, protocol, 0, 0]);
    bytes.extend([10, 244, 1, 2, 10, 244, 2, 3]);
    bytes.extend(options);
    let sum = checksum::compute(&bytes);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The same packet to all nodes.
fn to_many(packet: &[u8]) -> Vec<u8> {
    [&packet[..24], &ndp::ALL_NODES.octets(), &packet[40..]].concat()
}

/// What is behind the checksum of a message about a neighbour.
fn neighbour_body(options: &[u8]) -> Vec<u8> {
    [&[0; 20], options].concat()
}

fn packet_v6(next_header: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next_header, 64];
    bytes.extend([0xfd; 32]);
    bytes.extend(payload);
    bytes
}
