//! Reassembly of pods' fragments (RFC 791 section 3.2), since a socket of the host takes whole
//! datagrams, which the host cuts again for the way they go.
//!
//! What is kept is bounded, for all pods and for each. Fragments that contradict each other are
//! given up with all others of their packet, as RFC 5722 has it for IPv6: nobody sends such but to
//! pass a filter by.

use std::net::Ipv4Addr;

use muslin_encap::buffer::PacketBuf;
use muslin_encap::ip::v4::{self, FRAGMENT_UNIT, MAX_LEN};
use smoltcp::storage::Assembler;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpProtocol, Ipv4Packet};

use super::output::Outbox;
use crate::datapath::icmp::IcmpError;
use crate::drops::DropReason;

/// Packets that are put together at a time, each of at most 64 KiB.
pub(super) const PACKETS: usize = 64;
/// Those of one pod.
pub(super) const PACKETS_PER_POD: usize = 16;
/// Buffers that are kept for the next packets.
pub(super) const SPARE: usize = 8;
/// After so long what is missing does not come; as in Linux (`ipfrag_time`).
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of the shortest fragment but the last: what the smallest MTU there may be, 68 bytes, leaves
/// when headers end at four bytes and offsets count in eight.
const SHORTEST: usize = 64;

/// The packets that are being put together, those that began earliest first.
pub(super) struct Reassembly {
    waiting: Vec<Waiting>,
    spare: Vec<Parts>,
}

struct Waiting {
    key: Key,
    since: Instant,
    parts: Parts,
}

/// What makes fragments one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: IpProtocol,
    ident: u16,
}

/// A packet as far as it is there.
struct Parts {
    /// The first fragment's header ends after [`v4::MAX_HEADER_LEN`] bytes, and the payload begins.
    bytes: Vec<u8>,
    /// Length of that header; 0 until it is there.
    header_len: usize,
    received: Assembler,
    /// Length of the whole payload, once the last fragment is there.
    end: Option<usize>,
    /// Fragments that were kept.
    count: u64,
    /// Whether it was given up, and what still comes of it with it.
    is_spoilt: bool,
}

/// A packet that is whole again. Its buffer goes back to [`Reassembly::give_back`].
pub(super) struct Whole(Parts);

impl Whole {
    /// The packet.
    pub(super) fn packet(&mut self) -> Option<PacketBuf<'_>> {
        let start = v4::MAX_HEADER_LEN - self.0.header_len;
        let len = self.0.header_len + self.0.end?;
        PacketBuf::new(&mut self.0.bytes, start, len).ok()
    }
}

impl Reassembly {
    pub(super) fn new() -> Self {
        Self {
            waiting: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// Takes a fragment, a well-formed IPv4 packet, and returns the packet that it completes.
    pub(super) fn take(
        &mut self,
        now: Instant,
        fragment: &[u8],
        out: &mut Outbox,
    ) -> Result<Option<Whole>, DropReason> {
        let view = Ipv4Packet::new_unchecked(fragment);
        check(&view)?;
        let key = Key {
            source: view.src_addr(),
            destination: view.dst_addr(),
            protocol: view.next_header(),
            ident: view.ident(),
        };
        let known = self.waiting.iter().position(|it| it.key == key);
        let at = known.unwrap_or_else(|| self.begin(now, key, out));
        let parts = &mut self.waiting[at].parts;
        let kept = parts.count;
        match parts.add(&view) {
            Ok(false) => Ok(None),
            Ok(true) => {
                let mut parts = self.waiting.remove(at).parts;
                match parts.finish() {
                    Ok(()) => Ok(Some(Whole(parts))),
                    Err(reason) => {
                        out.lose(reason, kept);
                        self.spare(parts);
                        Err(reason)
                    }
                }
            }
            Err(reason) => {
                if reason == DropReason::EgressFragmentOverlap && !parts.is_spoilt {
                    parts.is_spoilt = true;
                    out.lose(reason, kept);
                }
                Err(reason)
            }
        }
    }

    /// Takes back a packet's buffer.
    pub(super) fn give_back(&mut self, whole: Whole) {
        self.spare(whole.0);
    }

    /// When [`Self::expire`] is next needed.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.waiting.first().map(|it| it.since + TIMEOUT)
    }

    /// Gives up what has waited for too long.
    pub(super) fn expire(&mut self, now: Instant, out: &mut Outbox) {
        while self.next_due().is_some_and(|due| due <= now) {
            if let Some(first) = self.waiting[0].parts.first_fragment() {
                out.report(IcmpError::ReassemblyTimeExceeded, first);
            }
            self.give_up(0, DropReason::EgressFragmentTimeout, out);
        }
    }

    /// Gives up what a pod has sent that is no longer there.
    pub(super) fn forget_pod(&mut self, address: Ipv4Addr, out: &mut Outbox) {
        while let Some(at) = self.waiting.iter().position(|it| it.key.source == address) {
            self.give_up(at, DropReason::EgressFragmentTimeout, out);
        }
    }

    /// Makes room for another packet, and returns its place.
    fn begin(&mut self, now: Instant, key: Key, out: &mut Outbox) -> usize {
        let mut its = self.waiting.iter().filter(|it| it.key.source == key.source);
        let oldest = if its.clone().count() >= PACKETS_PER_POD {
            its.next().map(|it| it.key)
        } else if self.waiting.len() >= PACKETS {
            self.waiting.first().map(|it| it.key)
        } else {
            None
        };
        if let Some(at) = self.waiting.iter().position(|it| Some(it.key) == oldest) {
            self.give_up(at, DropReason::EgressFragmentsFull, out);
        }
        let parts = self.spare.pop().unwrap_or_else(Parts::new);
        self.waiting.push(Waiting {
            key,
            since: now,
            parts,
        });
        self.waiting.len() - 1
    }

    fn give_up(&mut self, at: usize, reason: DropReason, out: &mut Outbox) {
        let parts = self.waiting.remove(at).parts;
        // What is spoilt was counted when it was found to be.
        if !parts.is_spoilt {
            out.lose(reason, parts.count);
        }
        self.spare(parts);
    }

    fn spare(&mut self, mut parts: Parts) {
        if self.spare.len() < SPARE {
            parts.clear();
            self.spare.push(parts);
        }
    }
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

impl Parts {
    fn new() -> Self {
        Self {
            bytes: Vec::new(),
            header_len: 0,
            received: Assembler::new(),
            end: None,
            count: 0,
            is_spoilt: false,
        }
    }

    fn clear(&mut self) {
        self.header_len = 0;
        self.received.clear();
        self.end = None;
        self.count = 0;
        self.is_spoilt = false;
    }

    /// Adds a fragment, and says whether the packet is whole with it.
    fn add(&mut self, fragment: &Ipv4Packet<&[u8]>) -> Result<bool, DropReason> {
        let (payload, start) = (fragment.payload(), usize::from(fragment.frag_offset()));
        let end = start + payload.len();
        self.check(start, payload, !fragment.more_frags())?;
        let added = self.received.add(start, payload.len());
        added.map_err(|_| DropReason::EgressFragmentsFull)?;
        if self.bytes.len() < v4::MAX_HEADER_LEN + end {
            self.bytes.resize(v4::MAX_HEADER_LEN + end, 0);
        }
        self.bytes[v4::MAX_HEADER_LEN + start..v4::MAX_HEADER_LEN + end].copy_from_slice(payload);
        if start == 0 {
            self.header_len = fragment.header_len().into();
            let header = &fragment.as_ref()[..self.header_len];
            self.bytes[v4::MAX_HEADER_LEN - self.header_len..v4::MAX_HEADER_LEN]
                .copy_from_slice(header);
        }
        if !fragment.more_frags() {
            self.end = Some(end);
        }
        self.count += 1;
        Ok(self.end == Some(self.received.peek_front()))
    }

    /// Whether a fragment agrees with those that are there.
    fn check(&self, start: usize, payload: &[u8], is_last: bool) -> Result<(), DropReason> {
        let end = start + payload.len();
        if self.is_spoilt || self.end.is_some_and(|known| end > known) {
            return Err(DropReason::EgressFragmentOverlap);
        }
        for (from, to) in self.received.iter_data() {
            if is_last && to > end {
                return Err(DropReason::EgressFragmentOverlap);
            }
            if start >= to || end <= from {
                continue;
            }
            let is_there = from <= start
                && end <= to
                && self.bytes[v4::MAX_HEADER_LEN + start..v4::MAX_HEADER_LEN + end] == *payload;
            return Err(if is_there {
                DropReason::EgressFragmentDuplicate
            } else {
                DropReason::EgressFragmentOverlap
            });
        }
        Ok(())
    }

    /// Makes the first fragment's header that of the whole packet.
    fn finish(&mut self) -> Result<(), DropReason> {
        let total = self.header_len + self.end.unwrap_or(MAX_LEN);
        if total > MAX_LEN {
            return Err(DropReason::EgressFragmentInvalid);
        }
        let header = &mut self.bytes[v4::MAX_HEADER_LEN - self.header_len..v4::MAX_HEADER_LEN];
        let mut header = Ipv4Packet::new_unchecked(header);
        header.set_more_frags(false);
        v4::set_total_len(header.into_inner(), total as u16);
        Ok(())
    }

    /// The fragment that an ICMP error may be about.
    fn first_fragment(&self) -> Option<&[u8]> {
        if self.header_len == 0 || self.is_spoilt {
            return None;
        }
        let packet = &self.bytes[v4::MAX_HEADER_LEN - self.header_len..];
        let len = Ipv4Packet::new_unchecked(packet).total_len();
        packet.get(..len.into())
    }
}
