//! Capturing: copies of the packets that somebody wants to see, with what became of them.
//!
//! [`Captures`] observes a node. A node that nobody captures of pays one look at an empty list for
//! each packet. What is captured goes into batches of a fixed size that the caller takes, gives to who
//! reads, and gives back; while the reader has all of them, packets are counted as lost.

mod fields;
mod filter;
mod segments;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use fields::Fields;
pub use filter::{Filter, FilterError};
use ipnet::IpNet;
use muslin_encap::offload::virtio::Header;
use muslin_encap::tunnel::Format;
pub use segments::{Segment, Segmenter};
use smoltcp::time::Instant;

use super::observe::{Observed, Observer, Source};
use super::peer::PeerId;
use super::port::PortId;
use super::verdict::Verdict;
use crate::drops::DropReason;

/// Bytes in which the headers of a packet end.
const HEADERS: usize = 256;

/// Where packets are seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// Frames from pods, as they come in.
    FromPod,
    /// Frames to pods.
    ToPod,
    /// What datagrams of the tunnel carry, as they come in.
    FromTunnel,
    /// What datagrams of the tunnel carry, as they leave.
    ToTunnel,
    /// Frames from the uplink, as they come in.
    FromUplink,
    /// Frames to the uplink.
    ToUplink,
    /// Packets from the host interface.
    FromHost,
    /// Packets to the host interface.
    ToHost,
    /// Packets from egress to pods.
    FromEgress,
    /// Packets of pods to egress.
    ToEgress,
}

impl Hook {
    /// All hooks, in the order of their interfaces in a file.
    pub const ALL: [Self; 10] = [
        Self::FromPod,
        Self::ToPod,
        Self::FromTunnel,
        Self::ToTunnel,
        Self::FromUplink,
        Self::ToUplink,
        Self::FromHost,
        Self::ToHost,
        Self::FromEgress,
        Self::ToEgress,
    ];

    /// A short stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromPod => "from-pod",
            Self::ToPod => "to-pod",
            Self::FromTunnel => "from-tunnel",
            Self::ToTunnel => "to-tunnel",
            Self::FromUplink => "from-uplink",
            Self::ToUplink => "to-uplink",
            Self::FromHost => "from-host",
            Self::ToHost => "to-host",
            Self::FromEgress => "from-egress",
            Self::ToEgress => "to-egress",
        }
    }

    /// Where packets come in.
    const fn of_source(source: Source) -> Option<Self> {
        match source {
            Source::Port(_) => Some(Self::FromPod),
            Source::Underlay(_) => Some(Self::FromTunnel),
            Source::Uplink => Some(Self::FromUplink),
            Source::Host => Some(Self::FromHost),
            Source::Egress => Some(Self::FromEgress),
            Source::Node => None,
        }
    }

    /// Where packets with this verdict leave.
    const fn of_verdict(verdict: Verdict) -> Option<Self> {
        match verdict {
            Verdict::Port(_) | Verdict::Flood { .. } => Some(Self::ToPod),
            Verdict::Peer { .. } => Some(Self::ToTunnel),
            Verdict::Uplink { .. } => Some(Self::ToUplink),
            Verdict::Host => Some(Self::ToHost),
            Verdict::Egress => Some(Self::ToEgress),
            Verdict::Consumed | Verdict::Drop(_) => None,
        }
    }

    /// Whether what is seen there begins with an Ethernet header.
    #[must_use]
    pub const fn has_frames(self) -> bool {
        matches!(
            self,
            Self::FromPod | Self::ToPod | Self::FromUplink | Self::ToUplink
        )
    }
}

/// What is to be captured.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Where.
    pub hooks: Vec<Hook>,
    /// Whether packets that are lost are wanted from wherever they came in.
    pub dropped: bool,
    /// Only those from or to this port.
    pub port: Option<PortId>,
    /// Only those from or to this peer.
    pub peer: Option<WantedPeer>,
    /// Only those of which this is true.
    pub filter: Filter,
    /// How much of a packet is copied, in bytes.
    pub snap_len: usize,
    /// The tunnel's format, in which packets are looked for.
    pub format: Option<Format>,
}

/// A peer whose packets are to be captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WantedPeer {
    /// The peer.
    pub id: PeerId,
    /// The outer address from which it sends.
    pub address: IpAddr,
    /// Its subnet, from which what it sends unencapsulated comes.
    pub subnet: IpNet,
}

/// A captured packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// When it was seen.
    pub at: Instant,
    /// Where.
    pub hook: Hook,
    /// Where it came from.
    pub source: Source,
    /// What became of it.
    pub verdict: Verdict,
    /// Its length in bytes, which may be more than is there.
    pub len: usize,
    /// What is left to be done to it.
    pub offload: Header,
    /// Packets that are lost since the one before it.
    pub lost: u64,
    /// How much of the batch's bytes is its.
    captured: usize,
}

/// Source and destination of a packet that was seen there, of what is in a tunnel those of the inner
/// packet, if it has any.
#[must_use]
pub fn addresses(hook: Hook, format: Option<Format>, packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let fields = Fields::parse(hook, format, packet);
    fields.source.zip(fields.destination)
}

/// Captured packets, one behind the other.
#[derive(Debug, Default)]
pub struct Batch {
    records: Vec<Record>,
    bytes: Vec<u8>,
    /// Packets that are lost behind the last one, of a capture that has ended.
    lost: u64,
}

impl Batch {
    /// Room for so many packets with so many bytes in all.
    #[must_use]
    pub fn with_capacity(records: usize, bytes: usize) -> Self {
        Self {
            records: Vec::with_capacity(records),
            bytes: Vec::with_capacity(bytes),
            lost: 0,
        }
    }

    /// Packets that are lost behind the last one, if the capture has ended with it.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether nothing is in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The packets with what there is of their bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&Record, &[u8])> {
        let mut rest = self.bytes.as_slice();
        self.records.iter().map(move |record| {
            let (bytes, others) = rest.split_at_checked(record.captured).unwrap_or_default();
            rest = others;
            (record, bytes)
        })
    }

    /// Makes it empty, for the next packets.
    pub fn clear(&mut self) {
        self.records.clear();
        self.bytes.clear();
    }

    /// Adds a packet, without any allocation; false if there is no room for it.
    fn push(&mut self, record: Record, packet: &Seen<'_>) -> bool {
        let has_room = self.records.len() < self.records.capacity()
            && self.bytes.capacity() - self.bytes.len() >= record.captured;
        if has_room {
            self.records.push(record);
            packet.copy(record.captured, &mut self.bytes);
        }
        has_room
    }
}

/// One who captures.
#[derive(Debug)]
struct Capture {
    id: u64,
    wanted: Wanted,
    batch: Batch,
    /// Packets that found no room since the last that did.
    lost: u64,
}

/// Whoever captures packets of a node.
#[derive(Debug)]
pub struct Captures {
    all: Vec<Capture>,
    now: Instant,
    /// The packet that has come in and has no verdict yet, as it came.
    inside: Option<(Source, usize, Header)>,
    /// Where the packet came from that left last.
    last: Source,
    bytes: Vec<u8>,
}

impl Default for Captures {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            now: Instant::ZERO,
            inside: None,
            last: Source::Node,
            bytes: Vec::new(),
        }
    }
}

impl Captures {
    /// Begins to capture into a batch.
    pub fn begin(&mut self, id: u64, wanted: Wanted, batch: Batch) {
        let longest = self.all.iter().map(|it| it.wanted.snap_len);
        // Filters look at headers, however little is copied.
        let longest = longest.max().unwrap_or(HEADERS).max(wanted.snap_len);
        self.bytes.clear();
        self.bytes.reserve(longest);
        self.inside = None;
        self.all.push(Capture {
            id,
            wanted,
            batch,
            lost: 0,
        });
    }

    /// Ends what was begun under this number, and returns what is still to be read.
    pub fn end(&mut self, id: u64) -> Option<Batch> {
        let at = self.all.iter().position(|it| it.id == id)?;
        let Capture {
            mut batch, lost, ..
        } = self.all.swap_remove(at);
        batch.lost = lost;
        Some(batch)
    }

    /// Whether there is something to read.
    #[must_use]
    pub fn is_readable(&self, id: u64) -> bool {
        let mut all = self.all.iter();
        all.any(|it| it.id == id && !it.batch.is_empty())
    }

    /// Whether nobody captures.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Takes what was captured, with an empty batch for what comes next.
    pub fn take(&mut self, id: u64, next: Batch) -> Option<Batch> {
        let capture = self.all.iter_mut().find(|it| it.id == id)?;
        Some(std::mem::replace(&mut capture.batch, next))
    }

    fn see(&mut self, hook: Hook, source: Source, verdict: Verdict, packet: &Seen<'_>) {
        let at = self.now;
        for capture in &mut self.all {
            if capture.wanted.wants(hook, source, verdict, packet.bytes) {
                capture.take(at, hook, (source, verdict), packet);
            }
        }
    }
}

/// A packet that may be captured.
struct Seen<'a> {
    bytes: &'a [u8],
    /// What was merged with it.
    tail: &'a [&'a [u8]],
    len: usize,
    offload: Header,
}

impl<'a> Seen<'a> {
    fn new(packet: &'a (impl Observed + ?Sized)) -> Self {
        Self {
            bytes: packet.bytes(),
            tail: packet.tail(),
            len: packet.total_len(),
            offload: packet.offload(),
        }
    }

    /// How many bytes of it there are.
    fn there(&self) -> usize {
        let tail = self.tail.iter().map(|piece| piece.len());
        self.len.min(self.bytes.len() + tail.sum::<usize>())
    }

    /// Copies its first bytes, `len` of them if there are as many.
    fn copy(&self, len: usize, to: &mut Vec<u8>) {
        let mut left = len.min(self.there());
        for piece in std::iter::once(&self.bytes).chain(self.tail) {
            let piece = &piece[..piece.len().min(left)];
            to.extend_from_slice(piece);
            left -= piece.len();
        }
    }
}

impl Capture {
    fn take(
        &mut self,
        at: Instant,
        hook: Hook,
        (source, verdict): (Source, Verdict),
        packet: &Seen<'_>,
    ) {
        let record = Record {
            at,
            hook,
            source,
            verdict,
            len: packet.len,
            offload: packet.offload,
            lost: self.lost,
            captured: packet.there().min(self.wanted.snap_len),
        };
        match self.batch.push(record, packet) {
            true => self.lost = 0,
            false => self.lost += 1,
        }
    }
}

impl Wanted {
    fn wants(&self, hook: Hook, source: Source, verdict: Verdict, packet: &[u8]) -> bool {
        let is_there = hook == Hook::ToEgress || Hook::of_source(source) == Some(hook);
        let is_lost = matches!(verdict, Verdict::Drop(_)) && is_there;
        (self.hooks.contains(&hook) || self.dropped && is_lost)
            && self.is_of_port(source, verdict)
            && self.is_of_peer(source, verdict, || Fields::parse(hook, self.format, packet))
            && (self.filter.is_all() || {
                let fields = Fields::parse(hook, self.format, packet);
                self.filter.matches(&fields)
            })
    }

    fn is_of_port(&self, source: Source, verdict: Verdict) -> bool {
        let Some(wanted) = self.port else {
            return true;
        };
        let is_to = match verdict {
            Verdict::Port(port) => port == wanted,
            Verdict::Flood { except } => except != Some(wanted),
            _ => false,
        };
        source == Source::Port(wanted) || is_to
    }

    fn is_of_peer(
        &self,
        source: Source,
        verdict: Verdict,
        fields: impl FnOnce() -> Fields,
    ) -> bool {
        let Some(wanted) = self.peer else {
            return true;
        };
        let is_to = match verdict {
            Verdict::Peer { id, .. } | Verdict::Uplink { id: Some(id) } => id == wanted.id,
            _ => false,
        };
        let is_from = || match source {
            Source::Underlay(from) => from.ip() == wanted.address,
            Source::Uplink => {
                let inner = fields().source;
                inner.is_some_and(|inner| wanted.subnet.contains(&inner))
            }
            _ => false,
        };
        is_to || is_from()
    }
}

impl Observer for Captures {
    #[inline(always)]
    fn at(&mut self, now: Instant) {
        self.now = now;
    }

    #[inline(always)]
    fn enters(&mut self, source: Source, packet: &(impl Observed + ?Sized)) {
        if !self.all.is_empty() {
            self.keep(source, &Seen::new(packet));
        }
    }

    #[inline(always)]
    fn leaves(&mut self, source: Source, verdict: Verdict, packet: &(impl Observed + ?Sized)) {
        if !self.all.is_empty() {
            self.decided(source, verdict, &Seen::new(packet));
        }
    }

    #[inline(always)]
    fn refused(&mut self, _: Source, _: DropReason) {}

    #[inline(always)]
    fn lost(&mut self, _: DropReason, _: u64) {}

    #[inline(always)]
    fn lost_in_egress(&mut self, reason: DropReason, packet: &(impl Observed + ?Sized)) {
        if !self.all.is_empty() {
            let lost = Verdict::Drop(reason);
            self.see(Hook::ToEgress, self.last, lost, &Seen::new(packet));
        }
    }
}

impl Captures {
    /// Keeps a packet as it came in until it is known what becomes of it.
    #[cold]
    fn keep(&mut self, source: Source, packet: &Seen<'_>) {
        // What the node makes on account of it comes and goes meanwhile.
        if source == Source::Node {
            return;
        }
        self.bytes.clear();
        packet.copy(self.bytes.capacity(), &mut self.bytes);
        self.inside = Some((source, packet.len, packet.offload));
    }

    #[cold]
    fn decided(&mut self, source: Source, verdict: Verdict, packet: &Seen<'_>) {
        self.last = source;
        if let Some((from, len, offload)) = self.inside.filter(|(from, ..)| *from == source) {
            self.inside = None;
            if let Some(hook) = Hook::of_source(from) {
                let bytes = std::mem::take(&mut self.bytes);
                let came = Seen {
                    bytes: &bytes,
                    tail: &[],
                    len,
                    offload,
                };
                self.see(hook, source, verdict, &came);
                self.bytes = bytes;
            }
        }
        if let Some(hook) = Hook::of_verdict(verdict) {
            self.see(hook, source, verdict, packet);
        }
    }
}
