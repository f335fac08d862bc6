//! The codecs on arbitrary bytes, against each other and against etherparse.

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::checksum;
use muslin_encap::overhead::Mtu;
use muslin_encap::udp;
use muslin_encap::vxlan::{self, Vni, VtepMac};
use muslin_stack::fragment::Fragments;
use muslin_stack::hash::{self, Seed};
use muslin_stack::icmp::IcmpError;

/// Checks everything that takes bytes. The first two bytes choose a VNI and an MTU, the rest is
/// the packet.
///
/// # Panics
/// If something is wrong.
pub fn run(data: &[u8]) {
    let [first, second, packet @ ..] = data else {
        return;
    };
    let vni = Vni::new(u32::from_be_bytes([0, *first, *second, *first])).expect("it has 24 bits");
    let mtu = Mtu::new(68 + u32::from(u16::from_be_bytes([*first, *second]) % 4000))
        .expect("it is in range");
    decapsulate(packet);
    encapsulate(packet, vni);
    mac(packet);
    if let Some(total) = ipv4(packet) {
        let packet = &packet[..total];
        forward(packet);
        fragment(packet, mtu);
        report(packet, mtu);
    }
}

fn decapsulate(bytes: &[u8]) {
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

fn encapsulate(frame: &[u8], vni: Vni) {
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

fn mac(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(&bytes[..bytes.len().min(20)])
        && let Ok(mac) = text.parse::<VtepMac>()
    {
        assert_eq!(mac.to_string().parse(), Ok(mac));
        assert!(mac.get().is_unicast());
    }
}

/// Whether the bytes begin with an IPv4 packet, by two opinions.
fn ipv4(bytes: &[u8]) -> Option<usize> {
    let theirs = etherparse::Ipv4HeaderSlice::from_slice(bytes)
        .ok()
        .filter(|header| {
            let total = usize::from(header.total_len());
            // Its own sum forgets the reserved flag, so the sum is made here.
            let sum = header.slice().chunks(2).fold(0u32, |sum, word| {
                sum + u32::from(u16::from_be_bytes([word[0], word[1]]))
            });
            let sum = (sum & 0xffff) + (sum >> 16);
            (header.slice().len()..=bytes.len()).contains(&total)
                && (sum & 0xffff) + (sum >> 16) == 0xffff
        })
        .map(|header| usize::from(header.total_len()));
    assert_eq!(udp::check(bytes).ok(), theirs);
    theirs
}

fn forward(packet: &[u8]) {
    let mut copy = packet.to_vec();
    match checksum::decrement_ttl(&mut copy) {
        Some(ttl) => {
            assert_eq!(ttl, packet[8] - 1);
            assert_eq!(udp::check(&copy), Ok(packet.len()));
            let changed = (0..copy.len()).filter(|at| copy[*at] != packet[*at]);
            assert!(changed.into_iter().all(|at| matches!(at, 8 | 10 | 11)));
        }
        None => assert!(packet[8] == 0 && copy == packet),
    }
    let (one, two) = (hash::flow(packet, Seed(1)), hash::flow(&copy, Seed(1)));
    assert_eq!(one, two, "a hop does not change a flow");
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
    let (mut done, mut buffer) = (0, vec![0; 65_535]);
    while let Some(len) = fragments.write_next(&mut buffer) {
        let piece = &buffer[..len];
        assert!(len <= mtu.get().into());
        assert_eq!(udp::check(piece), Ok(len));
        assert_eq!(offset(piece), offset(packet) + done);
        let body = &piece[usize::from(piece[0] & 0x0f) * 4..];
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
    let source = std::net::Ipv4Addr::new(10, 244, 1, 1);
    if let Some(len) = IcmpError::TimeExceeded.write(&mut buffer, source, packet) {
        let error = &buffer[..len];
        assert!(len <= 576);
        assert_eq!(udp::check(error), Ok(len));
        assert_eq!(checksum::compute(&error[20..]), 0);
        assert_eq!(error[16..20], packet[12..16]);
        assert_eq!(error[28..], packet[..len - 28]);
    }
}
