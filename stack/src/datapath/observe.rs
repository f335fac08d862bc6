//! The observer of decisions: what comes into a node, and what becomes of it.
//!
//! Tracing and capturing need to see each packet with the decision about it. A node is generic in
//! its [`Observer`]; the one of a node that nobody observes, [`Unobserved`], compiles to nothing.
//!
//! What an observer is told agrees with [`crate::drops::Counters`]: each packet that enters leaves
//! with one verdict, if not at once. Packets that the node makes on account of another (ICMP errors,
//! fragments) may enter and leave before that one leaves.

use std::net::SocketAddr;

use muslin_encap::buffer::PacketBuf;
use muslin_encap::offload::virtio::Header;
use smoltcp::time::Instant;

use crate::datapath::port::PortId;
use crate::datapath::trace::TraceStep;
use crate::datapath::verdict::Verdict;
use crate::drops::DropReason;

/// Where a packet comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Source {
    /// This port: a packet is an Ethernet frame.
    Port(PortId),
    /// A datagram of the tunnel that came from this address: a packet is what it carries.
    Underlay(SocketAddr),
    /// The uplink: a packet is an Ethernet frame.
    Uplink,
    /// The host interface: a packet begins with its IPv4 header.
    Host,
    /// Egress: a packet begins with its IPv4 header.
    Egress,
    /// The node itself, which made the packet or let it wait. It begins with what the verdict says,
    /// or with its IPv4 header if it was lost or kept before that was known.
    Node,
}

/// A packet as an observer sees it: as it is in its buffer.
pub trait Observed {
    /// Its bytes; of a packet that was merged from several the head.
    fn bytes(&self) -> &[u8];

    /// What was merged with it, in pieces.
    fn tail(&self) -> &[&[u8]] {
        &[]
    }

    /// Its length with all that was merged, in bytes.
    fn total_len(&self) -> usize {
        self.bytes().len()
    }

    /// What is left to be done to it.
    fn offload(&self) -> Header {
        Header::default()
    }
}

impl Observed for PacketBuf<'_> {
    fn bytes(&self) -> &[u8] {
        self.as_slice()
    }

    fn tail(&self) -> &[&[u8]] {
        self.tail()
    }

    fn total_len(&self) -> usize {
        self.total_len()
    }

    fn offload(&self) -> Header {
        self.offload()
    }
}

impl Observed for [u8] {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// Sees packets and the decisions about them.
pub trait Observer {
    /// Whether it wants to know how verdicts come about. A node makes no steps for one that does not.
    const STEPS: bool = false;

    /// It is this time: what is told next happens now.
    fn at(&mut self, now: Instant);

    /// A packet comes in, or begins.
    fn enters(&mut self, source: Source, packet: &(impl Observed + ?Sized));

    /// This became of the packet that entered last from there, which is what the verdict says now.
    fn leaves(&mut self, source: Source, verdict: Verdict, packet: &(impl Observed + ?Sized));

    /// A packet came that cannot be read: it entered and is lost.
    fn refused(&mut self, source: Source, reason: DropReason);

    /// Packets were lost after their verdict, in egress or where verdicts are carried out.
    fn lost(&mut self, reason: DropReason, packets: u64);

    /// The packet that left last, for egress, is lost there. [`Self::lost`] is told as well.
    #[inline(always)]
    fn lost_in_egress(&mut self, _: DropReason, _: &(impl Observed + ?Sized)) {}

    /// This was decided about the packet that entered last.
    #[inline(always)]
    fn step(&mut self, _: TraceStep) {}

    /// The steps that follow are about a packet that the node makes on account of that one, until this
    /// is called with false.
    #[inline(always)]
    fn aside(&mut self, _: bool) {}
}

/// Nobody observes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unobserved;

impl Observer for Unobserved {
    #[inline(always)]
    fn at(&mut self, _: Instant) {}

    #[inline(always)]
    fn enters(&mut self, _: Source, _: &(impl Observed + ?Sized)) {}

    #[inline(always)]
    fn leaves(&mut self, _: Source, _: Verdict, _: &(impl Observed + ?Sized)) {}

    #[inline(always)]
    fn refused(&mut self, _: Source, _: DropReason) {}

    #[inline(always)]
    fn lost(&mut self, _: DropReason, _: u64) {}
}
