//! Reassembly of pods' IPv6 fragments (RFC 8200 section 4.5), since a socket of the host takes whole
//! datagrams, which the host cuts again for the way they go.
//!
//! It is as that of IPv4 and as bounded, but for what the standards have otherwise: fragments that
//! overlap are given up with their packet (RFC 5722), one that is a whole packet waits for no other
//! (RFC 6946), and a sender hears what is wrong with its lengths. That the first one has all headers
//! (RFC 7112) the way through them has seen ([`v6::upper_layer`]).

use std::net::IpAddr;

use muslin_encap::buffer::PacketBuf;
use muslin_encap::ip::v6;
use smoltcp::storage::Assembler;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpProtocol, Ipv6Packet};

use super::head::{self, Head};
use super::output::Outbox;
use super::reassembly::{PACKETS, PACKETS_PER_POD, SPARE};
use crate::datapath::icmp::{self, IcmpError};
use crate::drops::DropReason;

/// After so long what is missing does not come (RFC 8200 section 4.5).
const TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of the longest header in front of a payload, with the Fragment header.
const MAX_HEADERS: usize = v6::HEADER_LEN + v6::MAX_EXTENSIONS_LEN;
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
pub(super) fn was_fragmented(packet: &[u8]) -> bool {
    Ipv6Packet::new_checked(packet).is_ok_and(|packet| packet.flow_label() == IN_FRAGMENTS)
}

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
    source: IpAddr,
    destination: IpAddr,
    id: u32,
}

/// A packet as far as it is there.
struct Parts {
    /// The first fragment's headers, the Fragment header last, end after [`MAX_HEADERS`] bytes, and the
    /// payload begins.
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

/// A first fragment's headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Headers {
    /// Bytes in front of the payload, the Fragment header included.
    len: usize,
    /// Where the header in front of the Fragment header names it.
    named_at: usize,
    /// Bytes of payload behind them in that fragment.
    payload: usize,
}

/// A fragment.
struct Fragment<'a> {
    packet: &'a [u8],
    /// Where its Fragment header is, and where the one in front names that.
    at: usize,
    named_at: usize,
    start: usize,
    is_last: bool,
    payload: &'a [u8],
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

impl<'a> Fragment<'a> {
    /// Finds the Fragment header of a packet that has one.
    fn of(head: &Head, packet: &'a [u8]) -> Option<(Self, u32)> {
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
        let fragment = Self {
            packet,
            at,
            named_at,
            start: info.offset.into(),
            is_last: !info.more,
            payload: packet.get(at + v6::FRAGMENT_HEADER_LEN..)?,
        };
        Some((fragment, info.id))
    }

    fn end(&self) -> usize {
        self.start + self.payload.len()
    }

    /// Whether it can be a part of any packet; what its sender is told, if not.
    fn check(&self) -> Result<(), Option<IcmpError>> {
        let problem = |pointer| Some(IcmpError::ParameterProblem { code: 0, pointer });
        if !self.is_last && !self.payload.len().is_multiple_of(v6::UNIT) {
            return Err(problem(PAYLOAD_LEN));
        }
        // What is in front of the Fragment header stays in the packet.
        if self.at - v6::HEADER_LEN + self.end() > MAX_PAYLOAD {
            return Err(problem((self.at + OFFSET) as u16));
        }
        let is_atomic = self.start == 0 && self.is_last;
        match self.payload.is_empty() && !is_atomic {
            true => Err(None),
            false => Ok(()),
        }
    }
}

impl Reassembly {
    pub(super) fn new() -> Self {
        Self {
            waiting: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// Takes a fragment, a well-formed IPv6 packet with this head, and returns the packet that it
    /// completes.
    pub(super) fn take(
        &mut self,
        now: Instant,
        head: &Head,
        packet: &[u8],
        out: &mut Outbox,
    ) -> Result<Option<Whole>, DropReason> {
        let (fragment, id) = Fragment::of(head, packet).ok_or(DropReason::Ipv6ExtensionHeaders)?;
        if let Err(error) = fragment.check() {
            if let Some(error) = error.filter(|_| icmp::may_answer(packet)) {
                out.report(error, packet);
            }
            return Err(DropReason::EgressFragmentInvalid);
        }
        if fragment.start == 0 && fragment.is_last {
            let mut parts = self.spare.pop().unwrap_or_else(Parts::new);
            parts.add(&fragment)?;
            let whole = parts.finish();
            return Ok(whole.map(|(start, len)| Whole { parts, start, len }));
        }
        let key = Key {
            source: head.source,
            destination: head.destination,
            id,
        };
        let known = self.waiting.iter().position(|it| it.key == key);
        let at = known.unwrap_or_else(|| self.begin(now, key, out));
        let parts = &mut self.waiting[at].parts;
        let kept = parts.count;
        match parts.add(&fragment) {
            Ok(false) => Ok(None),
            Ok(true) => {
                let mut parts = self.waiting.remove(at).parts;
                if let Some((start, len)) = parts.finish() {
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

    /// Takes back a packet's buffer.
    pub(super) fn give_back(&mut self, whole: Whole) {
        self.spare(whole.parts);
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
    pub(super) fn forget_pod(&mut self, address: IpAddr, out: &mut Outbox) {
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
    fn add(&mut self, fragment: &Fragment<'_>) -> Result<bool, DropReason> {
        let (payload, start, end) = (fragment.payload, fragment.start, fragment.end());
        self.check(fragment)?;
        let added = self.received.add(start, payload.len());
        added.map_err(|_| DropReason::EgressFragmentsFull)?;
        if self.bytes.len() < MAX_HEADERS + end {
            self.bytes.resize(MAX_HEADERS + end, 0);
        }
        self.bytes[MAX_HEADERS + start..MAX_HEADERS + end].copy_from_slice(payload);
        if start == 0 {
            let len = fragment.at + v6::FRAGMENT_HEADER_LEN;
            self.bytes[MAX_HEADERS - len..MAX_HEADERS].copy_from_slice(&fragment.packet[..len]);
            self.headers = Some(Headers {
                len,
                named_at: fragment.named_at,
                payload: payload.len(),
            });
        }
        if fragment.is_last {
            self.end = Some(end);
        }
        self.count += 1;
        Ok(self.end == Some(self.received.peek_front()))
    }

    /// Whether a fragment agrees with those that are there.
    fn check(&self, fragment: &Fragment<'_>) -> Result<(), DropReason> {
        let (payload, start, end) = (fragment.payload, fragment.start, fragment.end());
        if self.is_spoilt || self.end.is_some_and(|known| end > known) {
            return Err(DropReason::EgressFragmentOverlap);
        }
        for (from, to) in self.received.iter_data() {
            if fragment.is_last && to > end {
                return Err(DropReason::EgressFragmentOverlap);
            }
            if start >= to || end <= from {
                continue;
            }
            let is_there = from <= start
                && end <= to
                && self.bytes[MAX_HEADERS + start..MAX_HEADERS + end] == *payload;
            return Err(if is_there {
                DropReason::EgressFragmentDuplicate
            } else {
                DropReason::EgressFragmentOverlap
            });
        }
        Ok(())
    }

    /// Takes the Fragment header out of the first fragment's headers, and has them be those of the whole
    /// packet. Returns where that begins and its length; nothing, if it is too long.
    fn finish(&mut self) -> Option<(usize, usize)> {
        let (headers, end) = (self.headers?, self.end?);
        let stays = headers.len - v6::FRAGMENT_HEADER_LEN;
        if stays - v6::HEADER_LEN + end > MAX_PAYLOAD {
            return None;
        }
        let old = MAX_HEADERS - headers.len;
        let start = MAX_HEADERS - stays;
        let next = self.bytes[MAX_HEADERS - v6::FRAGMENT_HEADER_LEN];
        self.bytes.copy_within(old..old + stays, start);
        self.bytes[start + headers.named_at] = next;
        let len = stays + end;
        let packet = &mut self.bytes[start..start + len];
        Ipv6Packet::new_unchecked(&mut *packet).set_flow_label(IN_FRAGMENTS);
        head::set_len(packet);
        Some((start, len))
    }

    /// The fragment that an ICMP error may be about.
    fn first_fragment(&self) -> Option<&[u8]> {
        let headers = self.headers.filter(|_| !self.is_spoilt)?;
        let start = MAX_HEADERS - headers.len;
        self.bytes.get(start..MAX_HEADERS + headers.payload)
    }
}
