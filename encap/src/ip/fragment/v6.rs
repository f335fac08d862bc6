//! IPv6 fragmentation (RFC 8200 section 4.5) of packets that a node originates. Routers do none:
//! they say that a packet is too big.

use crate::bytes::put16;
use crate::ip::v6::{self, FRAGMENT_HEADER_LEN, HEADER_LEN, UNIT, field};
use crate::mtu::Mtu;

/// A packet that is being cut into fragments.
#[derive(Debug)]
pub struct Fragments<'a> {
    packet: &'a [u8],
    id: u32,
    mtu: usize,
    /// Bytes of payload already in fragments.
    done: usize,
}

impl<'a> Fragments<'a> {
    /// Prepares to cut `packet`, a well-formed IPv6 packet, for a link of the given MTU, into
    /// fragments with the identification `id`, which should be hard to guess (RFC 7739). `None` if
    /// it has extension headers that every fragment would need, or is a fragment itself: a node
    /// originates neither.
    #[must_use]
    pub fn new(packet: &'a [u8], mtu: Mtu, id: u32) -> Option<Self> {
        let packet = &packet[..v6::check(packet).ok()?];
        let may = !matches!(
            packet[field::NEXT_HEADER],
            v6::HOP_BY_HOP | v6::ROUTING | v6::FRAGMENT
        );
        may.then_some(Self {
            packet,
            id,
            mtu: mtu.get().into(),
            done: 0,
        })
    }

    /// Writes the next fragment into `buffer` and returns its length in bytes. `None` after the
    /// last one, or if the buffer is shorter than the fragment.
    pub fn write_next(&mut self, buffer: &mut [u8]) -> Option<usize> {
        const HEADERS_LEN: usize = HEADER_LEN + FRAGMENT_HEADER_LEN;
        let (header, payload) = self.packet.split_at(HEADER_LEN);
        let rest = &payload[self.done..];
        let room = self.mtu.checked_sub(HEADERS_LEN)?;
        let last = rest.len() <= room;
        let take = if last { rest.len() } else { room / UNIT * UNIT };
        if take == 0 {
            return None;
        }
        let len = HEADERS_LEN + take;
        let fragment = buffer.get_mut(..len)?;
        fragment[..HEADER_LEN].copy_from_slice(header);
        fragment[field::NEXT_HEADER] = v6::FRAGMENT;
        v6::set_payload_len(fragment, (FRAGMENT_HEADER_LEN + take) as u16);
        let extension = &mut fragment[HEADER_LEN..HEADERS_LEN];
        extension[0] = header[field::NEXT_HEADER];
        extension[1] = 0;
        // An offset is a multiple of eight; the lowest bit says that more follow.
        put16(extension, 2, self.done as u16 | u16::from(!last));
        extension[4..].copy_from_slice(&self.id.to_be_bytes());
        fragment[HEADERS_LEN..].copy_from_slice(&rest[..take]);
        self.done += take;
        Some(len)
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{Ipv6FragmentHeader, Ipv6Header};
    use proptest::prelude::*;

    use super::*;

    fn packet(payload: &[u8]) -> Vec<u8> {
        let header = v6::Header {
            traffic_class: 0xb9,
            flow_label: 0x1_2345,
            payload_len: payload.len() as u16,
            next_header: 17.into(),
            hop_limit: 63,
            source: [0xfd; 16].into(),
            destination: [0xfe; 16].into(),
        };
        [&header.to_bytes()[..], payload].concat()
    }

    fn fragments(packet: &[u8], mtu: u32, id: u32) -> Vec<Vec<u8>> {
        let mut fragments = Fragments::new(packet, Mtu::new(mtu).unwrap(), id).unwrap();
        let mut buffer = [0xee; v6::MAX_LEN];
        std::iter::from_fn(|| {
            let len = fragments.write_next(&mut buffer)?;
            Some(buffer[..len].to_vec())
        })
        .collect()
    }

    #[test]
    fn what_nodes_do_not_originate_is_not_cut() {
        for next in [v6::HOP_BY_HOP, v6::ROUTING, v6::FRAGMENT] {
            let mut packet = packet(&[1; 99]);
            packet[field::NEXT_HEADER] = next;
            assert!(Fragments::new(&packet, Mtu::ETHERNET, 1).is_none());
        }
        let cut = &packet(&[1; 99])[..138];
        assert!(Fragments::new(cut, Mtu::ETHERNET, 1).is_none());
        // Options for the destination go into the first fragment.
        let mut options = packet(&[1; 99]);
        options[field::NEXT_HEADER] = v6::OPTIONS;
        assert!(Fragments::new(&options, Mtu::ETHERNET, 1).is_some());
    }

    #[test]
    fn a_short_buffer_or_mtu_ends_it() {
        let packet = packet(&[1; 2000]);
        let mut fragments = Fragments::new(&packet, Mtu::ETHERNET, 1).unwrap();
        assert_eq!(fragments.write_next(&mut [0; 1495]), None);
        assert_eq!(fragments.write_next(&mut [0; 1496]), Some(1496));
        assert_eq!(fragments.write_next(&mut [0; 1496]), Some(48 + 552));
        assert_eq!(fragments.write_next(&mut [0; 1496]), None);
    }

    /// An MTU, and a length of payload: any, or so many full pieces and one that is as long as there
    /// is room, a byte less, or a byte more.
    fn sizes() -> impl Strategy<Value = (u32, usize)> {
        let mtu = prop_oneof![1280u32..1500, 1280u32..9000, 68u32..1280];
        mtu.prop_flat_map(|mtu| {
            let room = mtu as usize - 48;
            let exact = (0usize..6, 0usize..3);
            let exact =
                exact.prop_map(move |(pieces, more)| pieces * (room / 8 * 8) + room + more - 1);
            let len = prop_oneof![3 => 1usize..5000, 6 => exact, 1 => Just(65_535)];
            (Just(mtu), len)
        })
    }

    proptest! {
        #[test]
        fn the_pieces_make_the_packet((mtu, len) in sizes(), first in any::<u8>(), id in any::<u32>()) {
            let payload: Vec<_> = (0..len).map(|at| first.wrapping_add((at * 7 + at / 256) as u8)).collect();
            let packet = packet(&payload);
            let original = Ipv6Header::from_slice(&packet).unwrap().0;
            let mut whole = vec![None; payload.len()];
            let pieces = fragments(&packet, mtu, id);
            for (i, piece) in pieces.iter().enumerate() {
                prop_assert!(piece.len() <= mtu as usize);
                prop_assert_eq!(v6::check(piece), Ok(piece.len()));
                let (header, rest) = Ipv6Header::from_slice(piece).unwrap();
                let expected = Ipv6Header {
                    payload_length: (piece.len() - 40) as u16,
                    next_header: 44.into(),
                    ..original.clone()
                };
                prop_assert_eq!(header, expected);
                let (fragment, body) = Ipv6FragmentHeader::from_slice(rest).unwrap();
                prop_assert_eq!((fragment.next_header.0, fragment.identification), (17, id));
                prop_assert_eq!(fragment.more_fragments, i + 1 < pieces.len());
                prop_assert!(!fragment.more_fragments || body.len() % 8 == 0);
                let at = usize::from(fragment.fragment_offset.value()) * 8;
                let all = 48 + payload.len() - at;
                prop_assert_eq!(fragment.more_fragments, all > mtu as usize, "as few as can be");
                for (slot, byte) in whole[at..].iter_mut().zip(body) {
                    prop_assert!(slot.replace(*byte).is_none(), "overlap");
                }
                if i > 0 || body.len() >= 8 {
                    let upper = v6::upper_layer(piece).unwrap();
                    prop_assert_eq!(upper.is_later_fragment(), i > 0);
                }
            }
            prop_assert_eq!(whole, payload.into_iter().map(Some).collect::<Vec<_>>());
        }
    }
}
