//! The stage between decision and delivery: whether a packet to or from a pod may go on.
//!
//! Network policies will need it. A node is generic in its [`Filter`], which is asked when the switch
//! or the router has decided where a packet goes. [`Unfiltered`] permits everything and compiles to
//! nothing.

use smoltcp::time::Instant;

use crate::datapath::port::PortId;

/// Which way a packet goes, seen from the pod at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// From it, to one pod, the gateway or outside.
    FromPod,
    /// From it, in copies to all others: a group's, or for a MAC address that nobody is known to have.
    /// None of them is asked about again, but members of a group that the node follows are.
    ToAll,
    /// To it, from wherever.
    ToPod,
}

/// Decides whether packets may go on; those that may not are lost, for
/// [`crate::drops::DropReason::PolicyDenied`].
///
/// It is asked about IPv4 and IPv6, but not about ARP and what else there is in frames. A packet from
/// one pod to another is asked about twice. What the node itself sends to pods (the gateway's replies,
/// ICMP errors) is asked about, too.
pub trait Filter {
    /// Whether it ever refuses anything. A node does not look at packets for one that does not.
    const REFUSES: bool = true;

    /// It is this time: what is asked next happens now.
    fn at(&mut self, now: Instant);

    /// Whether this packet, which begins with its IP header, may go on. Of a superpacket or one that
    /// was merged from several it is the head; of a packet that is fragmented here, each fragment.
    fn permits(&mut self, direction: Direction, port: PortId, packet: &[u8]) -> bool;
}

/// Everything may go on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unfiltered;

impl Filter for Unfiltered {
    const REFUSES: bool = false;

    #[inline(always)]
    fn at(&mut self, _: Instant) {}

    #[inline(always)]
    fn permits(&mut self, _: Direction, _: PortId, _: &[u8]) -> bool {
        true
    }
}
