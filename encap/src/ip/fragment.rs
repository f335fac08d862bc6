//! IPv4 fragmentation (RFC 791 section 3.2) of packets larger than the next hop's MTU; that of IPv6,
//! which only the packet's originator may do, is in [`v6`].

pub mod v6;

use smoltcp::wire::Ipv4Packet;

use crate::ip::v4::{self, FRAGMENT_UNIT, HEADER_LEN, MAX_HEADER_LEN};
use crate::mtu::Mtu;

/// The option flag that asks for a copy in every fragment.
const COPIED: u8 = 0x80;
const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;

/// A packet that is being cut into fragments.
#[derive(Debug)]
pub struct Fragments<'a> {
    packet: &'a [u8],
    header_len: usize,
    mtu: usize,
    /// Bytes of payload already in fragments.
    done: usize,
}

impl<'a> Fragments<'a> {
    /// Prepares to cut `packet`, a well-formed IPv4 packet, for a link of the given MTU. `None` if
    /// its "don't fragment" flag is set, or if it is itself a fragment that ends beyond the longest
    /// possible packet (a "ping of death"), where offsets would wrap around.
    #[must_use]
    pub fn new(packet: &'a [u8], mtu: Mtu) -> Option<Self> {
        let (header_len, total) = v4::lengths(packet, packet.len()).ok()?;
        let packet = &packet[..total];
        let view = Ipv4Packet::new_unchecked(packet);
        let possible = usize::from(view.frag_offset()) + total <= v4::MAX_LEN;
        (possible && !view.dont_frag()).then_some(Self {
            packet,
            header_len,
            mtu: mtu.get().into(),
            done: 0,
        })
    }

    /// Writes the next fragment into `buffer` and returns its length in bytes. `None` after the
    /// last one, or if the buffer is shorter than the fragment.
    pub fn write_next(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let payload = &self.packet[self.header_len..];
        if self.done >= payload.len() {
            return None;
        }
        let mut header = [0; MAX_HEADER_LEN];
        let header_len = self.header(&mut header);
        let remaining = payload.len() - self.done;
        let room = self.mtu.checked_sub(header_len)?;
        let last = remaining <= room;
        let take = if last {
            remaining
        } else {
            room / FRAGMENT_UNIT * FRAGMENT_UNIT
        };
        if take == 0 {
            return None;
        }
        let len = header_len + take;
        let fragment = buffer.get_mut(..len)?;
        fragment[..header_len].copy_from_slice(&header[..header_len]);
        fragment[header_len..].copy_from_slice(&payload[self.done..self.done + take]);

        let whole = Ipv4Packet::new_unchecked(self.packet);
        let mut view = Ipv4Packet::new_unchecked(fragment);
        view.set_header_len(header_len as u8);
        view.set_total_len(len as u16);
        view.set_frag_offset(whole.frag_offset() + self.done as u16);
        view.set_more_frags(!last || whole.more_frags());
        v4::fill_checksum(&mut buffer[..header_len]);
        self.done += take;
        Some(len)
    }

    /// Copies the packet's header for the next fragment and returns its length. The first fragment
    /// has all options, the others have those with the copied flag.
    fn header(&self, header: &mut [u8; MAX_HEADER_LEN]) -> usize {
        if self.done == 0 {
            header[..self.header_len].copy_from_slice(&self.packet[..self.header_len]);
            return self.header_len;
        }
        header[..HEADER_LEN].copy_from_slice(&self.packet[..HEADER_LEN]);
        let mut options = &self.packet[HEADER_LEN..self.header_len];
        let mut end = HEADER_LEN;
        while let [kind, rest @ ..] = options {
            let len = match (*kind, rest) {
                (END_OF_OPTIONS, _) => break,
                (NO_OPERATION, _) => 1,
                (_, [len, ..]) if (2..=options.len()).contains(&usize::from(*len)) => {
                    usize::from(*len)
                }
                _ => break,
            };
            if kind & COPIED != 0 {
                header[end..end + len].copy_from_slice(&options[..len]);
                end += len;
            }
            options = &options[len..];
        }
        // The header is padded to whole words with "end of options", which is zero.
        end.next_multiple_of(4)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ip::checksum;

    fn packet(options: &[u8], payload: &[u8], dont_fragment: bool) -> Vec<u8> {
        let mut header = etherparse::Ipv4Header::new(
            payload.len() as u16,
            9,
            etherparse::IpNumber::UDP,
            [10, 0, 0, 1],
            [10, 0, 0, 2],
        )
        .unwrap();
        header.identification = 77;
        header.dont_fragment = dont_fragment;
        header.options = options.try_into().unwrap();
        header.set_payload_len(payload.len()).unwrap();
        header.header_checksum = header.calc_header_checksum();
        let mut bytes = Vec::new();
        header.write(&mut bytes).unwrap();
        bytes.extend(payload);
        bytes
    }

    fn fragments(packet: &[u8], mtu: u32) -> Vec<Vec<u8>> {
        let mut fragments = Fragments::new(packet, Mtu::new(mtu).unwrap()).unwrap();
        let mut buffer = [0xee; v4::MAX_LEN];
        std::iter::from_fn(|| {
            fragments
                .write_next(&mut buffer)
                .map(|len| buffer[..len].to_vec())
        })
        .collect()
    }

    #[test]
    fn what_must_not_be_fragmented_is_not() {
        assert!(Fragments::new(&packet(&[], &[1; 99], true), Mtu::MIN).is_none());
    }

    #[test]
    fn pieces_beyond_the_largest_packet_are_not_made() {
        let mut piece = packet(&[], &[1; 3000], false);
        let offset = |piece: &mut [u8], units: u16| {
            piece[6..8].copy_from_slice(&units.to_be_bytes());
        };
        // 65,515 bytes are the most a packet carries behind a header without options.
        offset(&mut piece, (65_515 - 3000) / 8);
        assert_eq!(fragments(&piece, 1500).len(), 3);
        offset(&mut piece, (65_515 - 3000) / 8 + 1);
        assert!(Fragments::new(&piece, Mtu::ETHERNET).is_none());
        offset(&mut piece, 0x1fff);
        assert!(Fragments::new(&piece, Mtu::ETHERNET).is_none());
    }

    #[test]
    fn only_options_with_the_copied_flag_are_in_every_fragment() {
        // Record route (7, not copied), no operation, router alert (148, copied), padding.
        let options = [7, 3, 4, 1, 148, 4, 0, 0];
        let pieces = fragments(&packet(&options, &[5; 300], false), 128);
        assert_eq!(&pieces[0][20..28], options);
        assert_eq!(pieces[1][0], 0x46);
        assert_eq!(&pieces[1][20..24], [148, 4, 0, 0]);
        // What is behind the end of options is none.
        let pieces = fragments(&packet(&[0, 2, 148, 4, 0, 0, 0, 0], &[5; 300], false), 128);
        assert_eq!(pieces[1][0], 0x45);
    }

    /// Words of options, an MTU, and a length of payload: any, or so many full pieces and one that
    /// is as long as there is room, a byte less, or a byte more.
    fn sizes() -> impl Strategy<Value = (usize, u32, usize)> {
        let mtu = |words: usize| {
            let header = 20 + 4 * words as u32;
            prop_oneof![
                68u32..1500,
                (6u32..180).prop_map(move |units| header + 8 * units)
            ]
        };
        let shape = (0usize..=10).prop_flat_map(move |words| (Just(words), mtu(words)));
        shape.prop_flat_map(|(words, mtu)| {
            let room = mtu.max(68) as usize - 20 - 4 * words;
            let full = room / FRAGMENT_UNIT * FRAGMENT_UNIT;
            let most = 65_515 - 4 * words;
            let exact = (0usize..6, 0usize..3);
            let exact = exact.prop_map(move |(pieces, more)| pieces * full + room + more - 1);
            let len = prop_oneof![3 => 1usize..3000, 6 => exact, 1 => Just(most)];
            (Just(words), Just(mtu.max(68)), len)
        })
    }

    proptest! {
        #[test]
        fn the_pieces_make_the_packet(
            (words, mtu, len) in sizes(),
            first in any::<u8>(),
            raw in any::<[u8; 40]>(),
        ) {
            let payload: Vec<_> = (0..len).map(|at| first.wrapping_add((at * 7 + at / 256) as u8)).collect();
            let packet = packet(&raw[..words * 4], &payload, false);
            let mut whole = vec![None; payload.len()];
            let pieces = fragments(&packet, mtu);
            for (i, piece) in pieces.iter().enumerate() {
                prop_assert!(piece.len() <= mtu as usize);
                let (header, body) = etherparse::Ipv4Header::from_slice(piece).unwrap();
                prop_assert_eq!(checksum::compute(&piece[..header.header_len()]), 0);
                prop_assert_eq!(usize::from(header.total_len), piece.len());
                prop_assert_eq!((header.identification, header.time_to_live), (77, 9));
                prop_assert_eq!(header.more_fragments, i + 1 < pieces.len());
                let at = usize::from(header.fragment_offset.value()) * FRAGMENT_UNIT;
                let all = header.header_len() + payload.len() - at;
                prop_assert_eq!(header.more_fragments, all > mtu as usize, "as few as can be");
                for (slot, byte) in whole[at..].iter_mut().zip(body) {
                    prop_assert!(slot.replace(*byte).is_none(), "overlap");
                }
            }
            prop_assert_eq!(whole, payload.into_iter().map(Some).collect::<Vec<_>>());
        }
    }
}
