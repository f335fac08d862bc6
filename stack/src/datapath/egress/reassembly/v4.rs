//! Fragments of IPv4 (RFC 791 section 3.2).

use muslin_encap::ip::v4::{self, FRAGMENT_UNIT, MAX_LEN};
use smoltcp::time::Duration;
use smoltcp::wire::Ipv4Packet;

use super::{Headers, Key, Piece, ROOM};
use crate::drops::DropReason;

/// After so long what is missing does not come; as in Linux (`ipfrag_time`).
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of the shortest fragment but the last: what the smallest MTU there may be, 68 bytes, leaves
/// when headers end at four bytes and offsets count in eight.
const SHORTEST: usize = 64;

/// Reads a fragment, a well-formed IPv4 packet.
pub(super) fn read(packet: &[u8]) -> Result<(Key, Piece<'_>), DropReason> {
    let view = Ipv4Packet::new_unchecked(packet);
    check(&view)?;
    let key = Key {
        source: view.src_addr().into(),
        destination: view.dst_addr().into(),
        protocol: view.next_header().into(),
        id: view.ident().into(),
    };
    let piece = Piece {
        headers: &packet[..view.header_len().into()],
        named_at: 0,
        start: view.frag_offset().into(),
        is_last: !view.more_frags(),
        payload: view.payload(),
    };
    Ok((key, piece))
}

/// Whether a fragment can be a part of any packet.
fn check(fragment: &Ipv4Packet<&[u8]>) -> Result<(), DropReason> {
    let total = usize::from(fragment.total_len());
    let len = total - usize::from(fragment.header_len());
    let is_whole = len.is_multiple_of(FRAGMENT_UNIT) && total >= SHORTEST;
    if len == 0
        || fragment.more_frags() && !is_whole
        || usize::from(fragment.frag_offset()) + total > MAX_LEN
    {
        return Err(DropReason::EgressFragmentInvalid);
    }
    Ok(())
}

/// Makes the first fragment's header that of the whole packet.
pub(super) fn finish(bytes: &mut [u8], headers: Headers, end: usize) -> Option<(usize, usize)> {
    let total = headers.len + end;
    if total > MAX_LEN {
        return None;
    }
    let start = ROOM - headers.len;
    let mut header = Ipv4Packet::new_unchecked(&mut bytes[start..ROOM]);
    header.set_more_frags(false);
    v4::set_total_len(header.into_inner(), total as u16);
    Some((start, total))
}
