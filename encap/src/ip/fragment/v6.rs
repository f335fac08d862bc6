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
