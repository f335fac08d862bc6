//! What egress has for the router: packets for pods, and word about packets of pods. It waits here
//! until it is polled.

use std::collections::VecDeque;
use std::net::IpAddr;

use muslin_encap::buffer::{HEADROOM, OwnedPacket, PacketBuf};
use muslin_encap::ip::v6;
use muslin_encap::offload::virtio::Header;

use super::host::FlowId;
use crate::datapath::icmp::IcmpError;
use crate::drops::DropReason;

/// Entries that may wait before flows have to wait, too.
const ENTRIES: usize = 64;

/// Something for the router (see [`super::Egress::poll_output`]).
#[derive(Debug)]
pub enum Output<'a> {
    /// A packet for a pod, which begins with its IP header. It may be a superpacket, its checksum may be unfinished, and there
    /// are [`HEADROOM`] bytes in front.
    Packet(PacketBuf<'a>),
    /// The sender of a packet, of which this is the beginning, is to be told of an error.
    Error(IcmpError, &'a [u8]),
    /// Somebody outside has an error to tell about a packet, likewise.
    Relayed(IpAddr, IcmpError, &'a [u8]),
    /// So many packets of pods that had been taken are lost.
    Lost(DropReason, u64),
    /// A packet of a pod whose flow another has: a worker (see [`super::Egress::share`]), which takes it
    /// by [`super::Egress::from_sibling`], or the predecessor (see [`super::Egress::succeed`]), which
    /// takes it by [`super::Egress::from_pod`].
    HandOver(Holder, OwnedPacket),
}

/// Who has a flow that is not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// The worker of this number.
    Worker(u8),
    /// The process that was the node before this one.
    Predecessor,
}

/// The queue of what is to be polled.
#[derive(Default)]
pub(super) struct Outbox {
    queue: VecDeque<QueuedOutput>,
    /// Buffers that nothing is in, the last used last.
    spare: Vec<Buffer>,
    /// What was polled last.
    latest: Option<(Buffer, Option<FlowId>)>,
    /// The flow that is told if its packets do not reach their pod.
    pub(super) asks: Option<FlowId>,
}

/// Room for the longest packet with `HEADROOM` in front.
pub(super) type Buffer = Box<[u8]>;

enum QueuedOutput {
    Packet {
        buffer: Buffer,
        len: usize,
        offload: Header,
        asks: Option<FlowId>,
    },
    Error {
        from: Option<IpAddr>,
        error: IcmpError,
        offender: Buffer,
        len: usize,
    },
    Lost(DropReason, u64),
    HandOver(Holder, OwnedPacket),
}

impl Outbox {
    /// A new buffer.
    pub(super) fn buffer() -> Buffer {
        vec![0; HEADROOM + v6::MAX_LEN].into_boxed_slice()
    }

    /// Whether so much waits that flows should wait, too.
    pub(super) fn is_full(&self) -> bool {
        self.queue.len() >= ENTRIES
    }

    /// Sends the packet of `len` bytes that begins `HEADROOM` into a buffer, and puts another one
    /// in its place.
    pub(super) fn send(&mut self, buffer: &mut Buffer, len: usize, offload: Header) {
        let other = self.spare();
        let entry = QueuedOutput::Packet {
            buffer: std::mem::replace(buffer, other),
            len,
            offload,
            asks: self.asks,
        };
        self.queue.push_back(entry);
    }

    /// Tells the sender of `offender`, the beginning of an IP packet, of an error.
    pub(super) fn report(&mut self, error: IcmpError, offender: &[u8]) {
        self.tell(None, error, offender);
    }

    /// Passes on what `from` has to say, who is outside, about `offender`, likewise.
    pub(super) fn relay(&mut self, from: IpAddr, error: IcmpError, offender: &[u8]) {
        self.tell(Some(from), error, offender);
    }

    fn tell(&mut self, from: Option<IpAddr>, error: IcmpError, offender: &[u8]) {
        let mut buffer = self.spare();
        let len = offender.len().min(buffer.len());
        buffer[..len].copy_from_slice(&offender[..len]);
        self.queue.push_back(QueuedOutput::Error {
            from,
            error,
            offender: buffer,
            len,
        });
    }

    /// Counts packets of pods that were kept for a while and are lost.
    pub(super) fn lose(&mut self, reason: DropReason, packets: u64) {
        self.queue.push_back(QueuedOutput::Lost(reason, packets));
    }

    /// Gives a packet to whoever has its flow.
    pub(super) fn hand_over(&mut self, holder: Holder, packet: &PacketBuf<'_>) {
        let entry = QueuedOutput::HandOver(holder, OwnedPacket::copy(packet));
        self.queue.push_back(entry);
    }

    /// What was sent or told first.
    pub(super) fn poll(&mut self) -> Option<Output<'_>> {
        self.put_back();
        let latest = &mut self.latest;
        Some(match self.queue.pop_front()? {
            QueuedOutput::Packet {
                buffer,
                len,
                offload,
                asks,
            } => {
                let (buffer, _) = latest.insert((buffer, asks));
                let packet = PacketBuf::new(buffer, HEADROOM, len).ok()?;
                Output::Packet(packet.with_offload(offload))
            }
            QueuedOutput::Error {
                from,
                error,
                offender,
                len,
            } => {
                let (offender, _) = latest.insert((offender, None));
                let offender = &offender[..len];
                match from {
                    Some(from) => Output::Relayed(from, error, offender),
                    None => Output::Error(error, offender),
                }
            }
            QueuedOutput::Lost(reason, packets) => Output::Lost(reason, packets),
            QueuedOutput::HandOver(holder, packet) => Output::HandOver(holder, packet),
        })
    }

    /// The buffer of what was polled last; empty if it had none.
    pub(super) fn polled(&mut self) -> &mut [u8] {
        match &mut self.latest {
            Some((buffer, _)) => buffer,
            None => &mut [],
        }
    }

    /// The flow that is told if the packet that was polled last does not reach its pod.
    pub(super) fn latest_asks(&self) -> Option<FlowId> {
        self.latest.as_ref().and_then(|(_, asks)| *asks)
    }

    /// A buffer that nothing is in. It comes back by [`Self::give_back`].
    pub(super) fn spare(&mut self) -> Buffer {
        self.spare.pop().unwrap_or_else(Self::buffer)
    }

    fn put_back(&mut self) {
        if let Some((buffer, _)) = self.latest.take() {
            self.give_back(buffer);
        }
    }

    pub(super) fn give_back(&mut self, buffer: Buffer) {
        if self.spare.len() < ENTRIES {
            self.spare.push(buffer);
        }
    }
}
