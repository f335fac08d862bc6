//! MSS clamping: lowers the segment size that TCP ends announce to what the path takes.
//!
//! Each end announces in its SYN how much payload it accepts in one segment (the MSS option, RFC
//! 9293 section 3.7.1), which it derives from the MTU of its own interface. A router with a link of
//! a smaller MTU would depend on path MTU discovery and thus on ICMP, which firewalls often drop.
//! So it lowers the option in the SYNs that it forwards, as Linux' `TCPMSS --clamp-mss-to-pmtu`
//! does.

use crate::bytes::{be16, put16};
use crate::ip::transport::{Protocol, TCP_HEADER_LEN, tcp, tcp_header_len, tcp_option_at};
use crate::ip::{checksum, v4, v6};
use crate::mtu::Mtu;
use crate::offload::virtio::Checksum;

/// Lowers the MSS that a TCP SYN announces to what a link of this MTU takes, and returns whether it
/// did. `packet` begins with its IP header, of either version. Anything but a SYN, whole or in a
/// first fragment, stays as it is, and so does a SYN without the option, which stands for 536 bytes
/// (1220 in IPv6).
///
/// The MSS is the MTU less 40 bytes, or 60 in IPv6, whatever options and extension headers there
/// are: the sender of those subtracts their length itself (RFC 6691 section 2). A complete checksum
/// is updated (RFC 1624), so that a wrong one stays wrong; a partial one does not cover the option.
pub fn clamp(packet: &mut [u8], checksum: Checksum, mtu: Mtu) -> bool {
    let is_v6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let (network, segment) = match is_v6 {
        false => (v4::HEADER_LEN, syn_v4(packet)),
        true => (v6::HEADER_LEN, syn_v6(packet)),
    };
    let Some(segment) = segment else {
        return false;
    };
    let most = mtu.get() - (network + TCP_HEADER_LEN) as u16;
    let mut lowered = false;
    let mut at = TCP_HEADER_LEN;
    while let Some((kind, len)) = tcp_option_at(segment, at) {
        // A receiver may take any one of several.
        if kind == tcp::option::MAX_SEGMENT_SIZE && len == 4 && be16(segment, at + 2) > most {
            replace(segment, at + 2, most, checksum);
            lowered = true;
        }
        at += len;
    }
    lowered
}

/// The TCP header, with its options, of an IPv4 packet that opens a connection.
fn syn_v4(packet: &mut [u8]) -> Option<&mut [u8]> {
    if packet.get(v4::field::PROTOCOL) != Some(&Protocol::Tcp.number()) {
        return None;
    }
    let (header_len, total) = v4::lengths(packet, packet.len()).ok()?;
    if v4::is_later_fragment(packet) {
        return None;
    }
    syn(&mut packet[header_len..total])
}

/// The TCP header, with its options, of an IPv6 packet that opens a connection.
fn syn_v6(packet: &mut [u8]) -> Option<&mut [u8]> {
    let total = v6::check(packet).ok()?;
    let packet = &mut packet[..total];
    let upper = v6::upper_layer(packet).ok()?;
    if upper.protocol != Protocol::Tcp.number() || upper.is_later_fragment() {
        return None;
    }
    syn(&mut packet[upper.offset..])
}

/// The header of a TCP segment, with its options, if it opens a connection.
fn syn(segment: &mut [u8]) -> Option<&mut [u8]> {
    let len = tcp_header_len(segment).ok()?;
    let header = &mut segment[..len];
    (header[tcp::FLAGS] & tcp::SYN != 0).then_some(header)
}

/// Writes a number into a TCP header and updates the checksum.
fn replace(header: &mut [u8], at: usize, new: u16, checksum: Checksum) {
    let old = be16(header, at);
    put16(header, at, new);
    if matches!(checksum, Checksum::Partial { .. }) {
        return;
    }
    // At an odd offset its bytes are the low and the high half of two words.
    let (old, new) = match at % 2 {
        0 => (old, new),
        _ => (old.swap_bytes(), new.swap_bytes()),
    };
    let sum = be16(header, tcp::CHECKSUM);
    put16(header, tcp::CHECKSUM, checksum::update(sum, old, new));
}

#[cfg(test)]
mod tests {
    use etherparse::{IpNumber, Ipv4Header, TcpHeader, TcpOptionElement, TcpSlice};
    use proptest::prelude::*;

    use super::*;
    use crate::ip::transport::{ChecksumState, Transport};

    const PARTIAL: Checksum = Checksum::Partial {
        start: 20,
        offset: 16,
    };

    /// A TCP packet with these options by an independent builder.
    fn packet(flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut tcp = TcpHeader::new(40_000, 80, 7, 1000);
        tcp.set_options_raw(options).unwrap();
        tcp.syn = flags & tcp::SYN != 0;
        tcp.ack = flags & tcp::ACK != 0;
        let len = (tcp.header_len() + payload.len()) as u16;
        let (from, to) = ([10, 244, 1, 2], [10, 244, 2, 3]);
        let mut ip = Ipv4Header::new(len, 64, IpNumber::TCP, from, to).unwrap();
        ip.header_checksum = ip.calc_header_checksum();
        tcp.checksum = tcp.calc_checksum_ipv4(&ip, payload).unwrap();
        [&ip.to_bytes()[..], &tcp.to_bytes(), payload].concat()
    }

    fn mss_option(mss: u16) -> Vec<u8> {
        let [high, low] = mss.to_be_bytes();
        vec![2, 4, high, low]
    }

    /// The MSS that an independent parser reads.
    fn announced(packet: &[u8]) -> Option<u16> {
        let tcp = TcpSlice::from_slice(&packet[20..]).unwrap();
        tcp.options_iterator()
            .filter_map(Result::ok)
            .find_map(|option| match option {
                TcpOptionElement::MaximumSegmentSize(mss) => Some(mss),
                _ => None,
            })
    }

    fn checked(packet: &[u8]) -> ChecksumState {
        Transport::parse(packet, 0).unwrap().checksum_state(packet)
    }

    /// Whether a packet's TCP checksum is right, by an independent sum. [`checked`] cannot tell:
    /// one packet in 65,536 has a right checksum that equals the sum of its pseudo header.
    fn is_right(packet: &[u8]) -> bool {
        let address = |at: usize| [packet[at], packet[at + 1], packet[at + 2], packet[at + 3]];
        let tcp = TcpSlice::from_slice(&packet[20..]).unwrap();
        let sum = tcp.calc_checksum_ipv4(address(12), address(16)).unwrap();
        checksum::nonzero(sum) == checksum::nonzero(tcp.checksum())
    }

    fn mtu(bytes: u32) -> Mtu {
        Mtu::new(bytes).unwrap()
    }

    #[track_caller]
    fn stays(mut packet: Vec<u8>, bytes: u32) {
        let before = packet.clone();
        assert!(!clamp(&mut packet, Checksum::Unknown, mtu(bytes)));
        assert_eq!(packet, before);
    }

    #[test]
    fn both_ends_syns_are_lowered_to_what_fits() {
        for flags in [tcp::SYN, tcp::SYN | tcp::ACK] {
            let mut packet = packet(flags, &mss_option(1460), b"");
            assert!(clamp(&mut packet, Checksum::Unknown, mtu(1450)));
            assert_eq!(announced(&packet), Some(1410));
            assert_eq!(checked(&packet), ChecksumState::Valid);
            assert!(!clamp(&mut packet, Checksum::Unknown, mtu(1450)), "again");
            assert!(clamp(&mut packet, Checksum::Valid, Mtu::MIN));
            assert_eq!(announced(&packet), Some(28));
            assert_eq!(checked(&packet), ChecksumState::Valid);
        }
    }

    #[test]
    fn what_fits_or_is_no_syn_stays() {
        stays(packet(tcp::SYN, &mss_option(1410), b""), 1450);
        stays(packet(tcp::SYN, &mss_option(536), b""), 9000);
        stays(packet(tcp::ACK, &mss_option(1460), b"data"), 1450);
        stays(packet(tcp::SYN, &[], b""), 68);
        stays(packet(tcp::SYN, &[4, 2, 1, 1], b""), 68);
        stays(crate::testing::udp_packet(&[2; 99]), 68);
    }

    #[test]
    fn a_partial_checksum_stays_and_a_wrong_one_stays_wrong() {
        let mut partial = packet(tcp::SYN, &mss_option(1460), b"");
        let at = Transport::parse(&partial, 0).unwrap();
        let pseudo = at.pseudo_header(&partial, 24);
        put16(&mut partial, at.checksum_offset(), pseudo);
        assert!(clamp(&mut partial, PARTIAL, mtu(1450)));
        assert_eq!(announced(&partial), Some(1410));
        assert_eq!(checked(&partial), ChecksumState::Partial);

        let mut wrong = packet(tcp::SYN, &mss_option(1460), b"x");
        wrong[44] ^= 1;
        assert!(clamp(&mut wrong, Checksum::Unknown, mtu(1450)));
        assert_eq!(checked(&wrong), ChecksumState::Invalid);
    }

    #[test]
    fn a_checksum_that_looks_partial_by_chance_stays_right() {
        let options = [&[1; 5][..], &mss_option(3493), &[1; 3]].concat();
        let mut packet = packet(tcp::SYN, &options, &[179, 61, 77]);
        assert_eq!(checked(&packet), ChecksumState::Partial);
        assert!(!clamp(&mut packet, Checksum::Unknown, mtu(3533)), "it fits");
        assert!(is_right(&packet));
        assert!(clamp(&mut packet, Checksum::Unknown, mtu(3532)));
        assert_eq!(announced(&packet), Some(3492));
        assert!(is_right(&packet));
    }

    #[test]
    fn only_the_first_fragment_has_options() {
        let fragment = |offset: u16| {
            let mut packet = packet(tcp::SYN, &mss_option(1460), &[0; 8]);
            put16(&mut packet, v4::field::FRAGMENT, 0x2000 | offset);
            packet
        };
        let mut first = fragment(0);
        assert!(clamp(&mut first, Checksum::Unknown, mtu(1450)));
        put16(&mut first, v4::field::FRAGMENT, 0);
        assert_eq!(checked(&first), ChecksumState::Valid);
        stays(fragment(1), 1450);
        stays(fragment(0x1000), 1450);
    }

    #[test]
    fn malformed_options_are_left_alone() {
        let with = |options: &[u8]| packet(tcp::SYN, options, b"");
        // Of no length, past the end, of another length, behind the end of options.
        stays(with(&[3, 0, 1, 1, 2, 4, 5, 180]), 1450);
        stays(with(&[3, 1, 1, 1, 2, 4, 5, 180]), 1450);
        stays(with(&[1, 2, 4, 255]), 1450);
        stays(with(&[2, 3, 255, 1]), 1450);
        stays(with(&[2, 5, 5, 180, 180, 1, 1, 1]), 1450);
        stays(with(&[0, 1, 1, 1, 2, 4, 5, 180]), 1450);
        stays(with(&[1, 1, 1, 2]), 1450);
        // A good one before a bad one counts.
        let mut packet = with(&[2, 4, 5, 180, 3, 0, 1, 1]);
        assert!(clamp(&mut packet, Checksum::Unknown, mtu(1450)));
        assert_eq!(checked(&packet), ChecksumState::Valid);
    }

    #[test]
    fn lengths_that_cannot_be_are_left_alone() {
        let good = packet(tcp::SYN, &mss_option(1460), b"");
        for len in 0..good.len() {
            stays(good[..len].to_vec(), 1450);
        }
        let with = |at: usize, value| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        stays(with(0, 0x65), 1450);
        stays(with(0, 0x44), 1450);
        stays(with(3, 43), 1450);
        stays(with(32, 0x40), 1450);
        stays(with(32, 0x70), 1450);
        let mut padded = good.clone();
        padded.extend([7; 9]);
        assert!(clamp(&mut padded, Checksum::Unknown, mtu(1450)));
        assert_eq!(padded[44..], [7; 9]);
    }

    /// A SYN over IPv6 with its upper layer behind these bytes of extension headers.
    fn packet_v6(first: u8, extensions: &[u8], options: &[u8]) -> Vec<u8> {
        let v4 = packet(tcp::SYN, options, b"");
        let segment = &v4[20..];
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, first, 64];
        packet.extend([0xfd; 32]);
        packet.extend(extensions);
        packet.extend(segment);
        let len = (packet.len() - v6::HEADER_LEN) as u16;
        v6::set_payload_len(&mut packet, len);
        let at = packet.len() - segment.len();
        put16(&mut packet, at + tcp::CHECKSUM, 0);
        let sum = v6::upper_checksum(&packet, 6, at);
        put16(&mut packet, at + tcp::CHECKSUM, sum);
        packet
    }

    /// Where a link's MTU leaves 60 bytes less, whatever is in front of the SYN.
    #[test]
    fn syns_over_ipv6_are_lowered_to_what_fits() {
        let options = [6, 0, 1, 4, 0, 0, 0, 0];
        let first = [6, 0, 0, 1, 0, 0, 0, 7];
        for (next, extensions) in [
            (6, &[][..]),
            (v6::OPTIONS, &options),
            (v6::FRAGMENT, &first),
        ] {
            let good = packet_v6(next, extensions, &mss_option(1440));
            let at = v6::HEADER_LEN + extensions.len();
            let mss = |packet: &[u8]| be16(packet, at + 22);
            stays(good.clone(), 1500);
            let mut packet = good.clone();
            assert!(clamp(&mut packet, Checksum::Unknown, mtu(1430)));
            assert_eq!(mss(&packet), 1370);
            assert_eq!(v6::upper_checksum(&packet, 6, at), 0);
            assert!(!clamp(&mut packet, Checksum::Unknown, mtu(1430)), "again");
            let mut packet = good.clone();
            let checksum = be16(&packet, at + tcp::CHECKSUM);
            assert!(clamp(&mut packet, PARTIAL, Mtu::MIN));
            assert_eq!(
                (mss(&packet), be16(&packet, at + tcp::CHECKSUM)),
                (8, checksum)
            );
            // Not a byte less than all of it, and nothing behind it.
            for len in 0..good.len() {
                stays(good[..len].to_vec(), 1280);
            }
        }
        let later = packet_v6(v6::FRAGMENT, &[6, 0, 5, 169, 0, 0, 0, 7], &mss_option(1440));
        stays(later, 1280);
        let source_route = packet_v6(v6::ROUTING, &[6, 0, 0, 0, 0, 0, 0, 0], &mss_option(1440));
        stays(source_route, 1280);
        stays(packet_v6(17, &[], &mss_option(1440)), 1280);
    }

    proptest! {
        /// Wherever the option is, at an odd place too.
        #[test]
        fn a_lowered_packet_is_whole(
            before in 0usize..8,
            mss in any::<u16>(),
            link in 68u32..=65_535,
            payload in proptest::collection::vec(any::<u8>(), 0..9),
        ) {
            let mut options = vec![1; before];
            options.extend(mss_option(mss));
            options.resize(options.len().next_multiple_of(4), 1);
            let original = packet(tcp::SYN, &options, &payload);
            let mut clamped = original.clone();
            let most = u16::try_from(link - 40).unwrap();
            let lowered = clamp(&mut clamped, Checksum::Unknown, mtu(link));
            prop_assert_eq!(lowered, mss > most);
            prop_assert_eq!(announced(&clamped), Some(mss.min(most)));
            prop_assert!(is_right(&clamped));
            let at = 40 + before + 2;
            for (index, (new, old)) in clamped.iter().zip(&original).enumerate() {
                let may_differ = (at..at + 2).contains(&index) || (36..38).contains(&index);
                prop_assert!(may_differ || new == old, "{}", index);
            }
        }

        #[test]
        fn nothing_panics_and_lengths_stay(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..90),
            is_tcp in any::<bool>(),
        ) {
            if let (true, Some(start)) = (is_tcp, bytes.first_chunk_mut::<20>()) {
                start[..4].copy_from_slice(&[0x45, 0, 0, 40]);
                start[6..10].copy_from_slice(&[0, 0, 64, 6]);
            }
            let _ = clamp(&mut bytes, Checksum::Unknown, Mtu::MIN);
            if let Some(start) = bytes.first_chunk_mut::<8>() {
                *start = [0x60, 0, 0, 0, 0, start[5] % 50, if is_tcp { 6 } else { start[6] }, 64];
            }
            let _ = clamp(&mut bytes, Checksum::Unknown, Mtu::MIN);
        }
    }
}
