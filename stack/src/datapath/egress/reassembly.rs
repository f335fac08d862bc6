//! Reassembly of pods' fragments, since a socket of the host takes whole datagrams, which the host cuts
//! again for the way they go.
//!
//! What is kept is bounded, for all pods and for each, and by itself for each IP version. Fragments that
//! contradict each other are given up with all others of their packet, as RFC 5722 has it for IPv6: nobody
//! sends such but to pass a filter by.

mod v4;
mod v6;

use std::net::IpAddr;

use muslin_encap::buffer::PacketBuf;
use muslin_encap::ip;
use smoltcp::storage::Assembler;
use smoltcp::time::{Duration, Instant};
pub(super) use v6::was_fragmented;

use super::head::Head;
use super::output::Outbox;
use crate::datapath::icmp::IcmpError;
use crate::drops::DropReason;

/// Packets that are put together at a time, each of at most 64 KiB.
const PACKETS: usize = 64;
/// Those of one pod.
const PACKETS_PER_POD: usize = 16;
/// Buffers that are kept for the next packets.
const SPARE: usize = 8;
/// Bytes of the longest header in front of a payload: that of IPv6, with extension headers.
const ROOM: usize = ip::v6::HEADER_LEN + ip::v6::MAX_EXTENSIONS_LEN;
const _: () = assert!(ROOM >= ip::v4::MAX_HEADER_LEN);

/// The packets that are being put together.
pub(super) struct Reassembly {
    ipv4: Queue,
    ipv6: Queue,
}

/// Those of one IP version, those that began earliest first.
struct Queue {
    /// After so long what is missing does not come.
    timeout: Duration,
    finish: Finish,
    waiting: Vec<Waiting>,
    spare: Vec<Parts>,
}

/// Has the first fragment's headers, which end after [`ROOM`] bytes, be those of the whole packet, whose
/// payload has this length. Returns where it begins and its length; nothing, if it is too long.
type Finish = fn(bytes: &mut [u8], headers: Headers, end: usize) -> Option<(usize, usize)>;

struct Waiting {
    key: Key,
    since: Instant,
    parts: Parts,
}

/// What makes fragments one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    /// 0 in IPv6, where it does not matter.
    protocol: u8,
    id: u32,
}

/// A fragment.
struct Piece<'a> {
    /// What is in front of its payload.
    headers: &'a [u8],
    /// Where the header in front of the Fragment header names that, in IPv6.
    named_at: usize,
    start: usize,
    is_last: bool,
    payload: &'a [u8],
}

/// A first fragment's headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Headers {
    /// Bytes in front of the payload.
    len: usize,
    /// As of [`Piece`].
    named_at: usize,
    /// Bytes of payload behind them in that fragment.
    payload: usize,
}

/// A packet as far as it is there.
struct Parts {
    /// The first fragment's headers end after [`ROOM`] bytes, and the payload begins.
    bytes: Vec<u8>,
    headers: Option<Headers>,
    received: Assembler,
    /// Length of the whole payload, once the last fragment is there.
    end: Option<usize>,
    /// Fragments that were kept.
    count: u64,
    /// Whether it was given up, and what still comes of it with it.
    is_spoilt: bool,
}

/// A packet that is whole again. Its buffer goes back to [`Reassembly::give_back`].
pub(super) struct Whole {
    parts: Parts,
    start: usize,
    len: usize,
}

impl Whole {
    /// The packet.
    pub(super) fn packet(&mut self) -> Option<PacketBuf<'_>> {
        PacketBuf::new(&mut self.parts.bytes, self.start, self.len).ok()
    }
}

impl Reassembly {
    pub(super) fn new() -> Self {
        Self {
            ipv4: Queue::new(v4::TIMEOUT, v4::finish),
            ipv6: Queue::new(v6::TIMEOUT, v6::finish),
        }
    }

    /// Takes a fragment, a well-formed packet with this head, and returns the packet that it completes.
    pub(super) fn take(
        &mut self,
        now: Instant,
        head: &Head,
        packet: &[u8],
        out: &mut Outbox,
    ) -> Result<Option<Whole>, DropReason> {
        if head.source.is_ipv4() {
            let (key, piece) = v4::read(packet)?;
            return self.ipv4.take(now, key, &piece, out);
        }
        let (key, piece) = v6::read(head, packet, out)?;
        if piece.is_all() {
            return self.ipv6.take_alone(&piece);
        }
        self.ipv6.take(now, key, &piece, out)
    }

    /// Takes back a packet's buffer.
    pub(super) fn give_back(&mut self, head: &Head, whole: Whole) {
        self.queue(head.source).spare(whole.parts);
    }

    /// When [`Self::expire`] is next needed.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let dues = [self.ipv4.next_due(), self.ipv6.next_due()];
        dues.into_iter().flatten().min()
    }

    /// Gives up what has waited for too long.
    pub(super) fn expire(&mut self, now: Instant, out: &mut Outbox) {
        self.ipv4.expire(now, out);
        self.ipv6.expire(now, out);
    }

    /// Gives up what a pod has sent that is no longer there.
    pub(super) fn forget_pod(&mut self, address: IpAddr, out: &mut Outbox) {
        self.queue(address).forget_pod(address, out);
    }

    fn queue(&mut self, pod: IpAddr) -> &mut Queue {
        match pod {
            IpAddr::V4(_) => &mut self.ipv4,
            IpAddr::V6(_) => &mut self.ipv6,
        }
    }
}

impl Queue {
    fn new(timeout: Duration, finish: Finish) -> Self {
        Self {
            timeout,
            finish,
            waiting: Vec::new(),
            spare: Vec::new(),
        }
    }

    fn take(
        &mut self,
        now: Instant,
        key: Key,
        piece: &Piece<'_>,
        out: &mut Outbox,
    ) -> Result<Option<Whole>, DropReason> {
        let known = self.waiting.iter().position(|it| it.key == key);
        let at = known.unwrap_or_else(|| self.begin(now, key, out));
        let parts = &mut self.waiting[at].parts;
        let kept = parts.count;
        match parts.add(piece) {
            Ok(false) => Ok(None),
            Ok(true) => {
                let mut parts = self.waiting.remove(at).parts;
                if let Some((start, len)) = parts.finish(self.finish) {
                    return Ok(Some(Whole { parts, start, len }));
                }
                out.lose(DropReason::EgressFragmentInvalid, kept);
                self.spare(parts);
                Err(DropReason::EgressFragmentInvalid)
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

    /// Takes a fragment that is a whole packet.
    fn take_alone(&mut self, piece: &Piece<'_>) -> Result<Option<Whole>, DropReason> {
        let mut parts = self.spare.pop().unwrap_or_else(Parts::new);
        parts.add(piece)?;
        let whole = parts.finish(self.finish);
        Ok(whole.map(|(start, len)| Whole { parts, start, len }))
    }

    fn next_due(&self) -> Option<Instant> {
        self.waiting.first().map(|it| it.since + self.timeout)
    }

    fn expire(&mut self, now: Instant, out: &mut Outbox) {
        while self.next_due().is_some_and(|due| due <= now) {
            if let Some(first) = self.waiting[0].parts.first_fragment() {
                out.report(IcmpError::ReassemblyTimeExceeded, first);
            }
            self.give_up(0, DropReason::EgressFragmentTimeout, out);
        }
    }

    fn forget_pod(&mut self, address: IpAddr, out: &mut Outbox) {
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

impl Piece<'_> {
    fn end(&self) -> usize {
        self.start + self.payload.len()
    }

    /// Whether it is all of its packet.
    fn is_all(&self) -> bool {
        self.start == 0 && self.is_last
    }
}

impl Parts {
    fn new() -> Self {
        Self {
            bytes: Vec::new(),
            headers: None,
            received: Assembler::new(),
            end: None,
            count: 0,
            is_spoilt: false,
        }
    }

    fn clear(&mut self) {
        self.headers = None;
        self.received.clear();
        self.end = None;
        self.count = 0;
        self.is_spoilt = false;
    }

    /// Adds a fragment, and says whether the packet is whole with it.
    fn add(&mut self, piece: &Piece<'_>) -> Result<bool, DropReason> {
        let (payload, start, end) = (piece.payload, piece.start, piece.end());
        self.check(piece)?;
        let added = self.received.add(start, payload.len());
        added.map_err(|_| DropReason::EgressFragmentsFull)?;
        if self.bytes.len() < ROOM + end {
            self.bytes.resize(ROOM + end, 0);
        }
        self.bytes[ROOM + start..ROOM + end].copy_from_slice(payload);
        if start == 0 {
            let len = piece.headers.len();
            self.bytes[ROOM - len..ROOM].copy_from_slice(piece.headers);
            self.headers = Some(Headers {
                len,
                named_at: piece.named_at,
                payload: payload.len(),
            });
        }
        if piece.is_last {
            self.end = Some(end);
        }
        self.count += 1;
        Ok(self.end == Some(self.received.peek_front()))
    }

    /// Whether a fragment agrees with those that are there.
    fn check(&self, piece: &Piece<'_>) -> Result<(), DropReason> {
        let (payload, start, end) = (piece.payload, piece.start, piece.end());
        if self.is_spoilt || self.end.is_some_and(|known| end > known) {
            return Err(DropReason::EgressFragmentOverlap);
        }
        for (from, to) in self.received.iter_data() {
            if piece.is_last && to > end {
                return Err(DropReason::EgressFragmentOverlap);
            }
            if start >= to || end <= from {
                continue;
            }
            let is_there =
                from <= start && end <= to && self.bytes[ROOM + start..ROOM + end] == *payload;
            return Err(if is_there {
                DropReason::EgressFragmentDuplicate
            } else {
                DropReason::EgressFragmentOverlap
            });
        }
        Ok(())
    }

    /// Makes it the whole packet ([`Finish`]).
    fn finish(&mut self, finish: Finish) -> Option<(usize, usize)> {
        finish(&mut self.bytes, self.headers?, self.end?)
    }

    /// The fragment that an ICMP error may be about.
    fn first_fragment(&self) -> Option<&[u8]> {
        let headers = self.headers.filter(|_| !self.is_spoilt)?;
        let start = ROOM - headers.len;
        self.bytes.get(start..ROOM + headers.payload)
    }
}
