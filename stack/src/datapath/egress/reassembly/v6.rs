//! Fragments of IPv6 (RFC 8200 section 4.5), and what the standards have otherwise than for IPv4: one that
//! is a whole packet waits for no other (RFC 6946), and a sender hears what is wrong with its lengths. That
//! the first one has all headers (RFC 7112) the way through them has seen ([`v6::upper_layer`]).

use muslin_encap::ip::v6;
use smoltcp::time::Duration;
use smoltcp::wire::{IpProtocol, Ipv6Packet};

use super::{Headers, Key, Piece, ROOM};
use crate::datapath::egress::head::{self, Head};
use crate::datapath::egress::output::Outbox;
use crate::datapath::icmp::{self, IcmpError};
use crate::drops::DropReason;

/// After so long what is missing does not come (RFC 8200 section 4.5).
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes that the payload length can tell.
const MAX_PAYLOAD: usize = v6::MAX_LEN - v6::HEADER_LEN;
/// Where a header says how much is behind it and what, and where a Fragment header has its offset.
const PAYLOAD_LEN: u16 = 4;
const NEXT_HEADER: usize = 6;
const OFFSET: usize = 2;

/// The flow label of a packet that has come in fragments, and may go on in such. Nobody but egress
/// sees it: a packet that is handed over says so itself. A pod that writes this label says the same.
const IN_FRAGMENTS: u32 = 0x5_f7a6;

/// Whether a packet has come in fragments.
pub(in crate::datapath::egress) fn was_fragmented(packet: &[u8]) -> bool {
    Ipv6Packet::new_checked(packet).is_ok_and(|packet| packet.flow_label() == IN_FRAGMENTS)
}

/// Reads a fragment, a well-formed IPv6 packet with this head. Its sender hears what it did wrong.
pub(super) fn read<'a>(
    head: &Head,
    packet: &'a [u8],
    out: &mut Outbox,
) -> Result<(Key, Piece<'a>), DropReason> {
    let (piece, id) = find(head, packet).ok_or(DropReason::Ipv6ExtensionHeaders)?;
    if let Err(error) = check(&piece) {
        if let Some(error) = error.filter(|_| icmp::may_answer(packet)) {
            out.report(error, packet);
        }
        return Err(DropReason::EgressFragmentInvalid);
    }
    let key = Key {
        source: head.source,
        destination: head.destination,
        protocol: 0,
        id,
    };
    Ok((key, piece))
}

/// Finds the Fragment header of a packet that has one.
fn find<'a>(head: &Head, packet: &'a [u8]) -> Option<(Piece<'a>, u32)> {
    let packet = packet.get(..head.end)?;
    let info = v6::upper_layer(packet).ok()?.fragment?;
    let (mut at, mut named_at) = (v6::HEADER_LEN, NEXT_HEADER);
    loop {
        match IpProtocol::from(*packet.get(named_at)?) {
            IpProtocol::Ipv6Frag => break,
            // Its length counts otherwise; it is behind the Fragment header (RFC 4302 section 3.3.4).
            IpProtocol::IpSecAh => return None,
            _ => {}
        }
        named_at = at;
        at += v6::UNIT * (usize::from(*packet.get(at + 1)?) + 1);
    }
    let (headers, payload) = packet.split_at_checked(at + v6::FRAGMENT_HEADER_LEN)?;
    let piece = Piece {
        headers,
        named_at,
        start: info.offset.into(),
        is_last: !info.more,
        payload,
    };
    Some((piece, info.id))
}

/// Whether a fragment can be a part of any packet; what its sender is told, if not.
fn check(piece: &Piece<'_>) -> Result<(), Option<IcmpError>> {
    let problem = |pointer| Some(IcmpError::ParameterProblem { code: 0, pointer });
    let at = piece.headers.len() - v6::FRAGMENT_HEADER_LEN;
    if !piece.is_last && !piece.payload.len().is_multiple_of(v6::UNIT) {
        return Err(problem(PAYLOAD_LEN));
    }
    // What is in front of the Fragment header stays in the packet.
    if at - v6::HEADER_LEN + piece.end() > MAX_PAYLOAD {
        return Err(problem((at + OFFSET) as u16));
    }
    match piece.payload.is_empty() && !piece.is_all() {
        true => Err(None),
        false => Ok(()),
    }
}

/// Takes the Fragment header out of the first fragment's headers, and has them be those of the whole
/// packet.
pub(super) fn finish(bytes: &mut [u8], headers: Headers, end: usize) -> Option<(usize, usize)> {
    let stays = headers.len - v6::FRAGMENT_HEADER_LEN;
    if stays - v6::HEADER_LEN + end > MAX_PAYLOAD {
        return None;
    }
    let old = ROOM - headers.len;
    let start = ROOM - stays;
    let next = bytes[ROOM - v6::FRAGMENT_HEADER_LEN];
    bytes.copy_within(old..old + stays, start);
    bytes[start + headers.named_at] = next;
    let len = stays + end;
    let packet = &mut bytes[start..start + len];
    Ipv6Packet::new_unchecked(&mut *packet).set_flow_label(IN_FRAGMENTS);
    head::set_len(packet);
    Some((start, len))
}
