//! Ports: where pods' frames come in and go out.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use smoltcp::wire::EthernetAddress;

use crate::bucket::TokenBucket;
use crate::datapath::rate::RateLimit;
use crate::datapath::work::{self, Turn};

/// A port's identity, chosen by the control plane and stable while the port is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub u32);

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is attached to a port.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attachment {
    /// The pod's MAC address.
    pub mac: EthernetAddress,
    /// The pod's IP addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether the pod may send only from its own MAC and IP addresses.
    pub guarded: bool,
    /// How fast it may send and receive.
    pub rates: Rates,
}

/// How fast a pod may be, where there is a limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rates {
    /// What it sends. It is read no faster, so that it waits.
    pub from_pod: Option<Arc<RateLimit>>,
    /// What it receives. The rest is dropped.
    pub to_pod: Option<Arc<RateLimit>>,
}

impl Attachment {
    /// A pod that may send only from this MAC address and these IP addresses.
    #[must_use]
    pub fn new(mac: EthernetAddress, addresses: Vec<IpAddr>) -> Self {
        Self {
            mac,
            addresses,
            guarded: true,
            rates: Rates::default(),
        }
    }

    /// The same, if the pod may send from any address, as a bridge does.
    #[must_use]
    pub fn unguarded(self) -> Self {
        Self {
            guarded: false,
            ..self
        }
    }
}

impl Rates {
    /// Whether there is a limit.
    pub(crate) fn is_limited(&self) -> bool {
        self.from_pod.is_some() || self.to_pod.is_some()
    }

    /// The same limits as far as they are used now, of which nobody else knows.
    pub(crate) fn fork(&self) -> Self {
        let fork = |limit: &Arc<RateLimit>| Arc::new(limit.fork());
        Self {
            from_pod: self.from_pod.as_ref().map(fork),
            to_pod: self.to_pod.as_ref().map(fork),
        }
    }
}

/// Packets and bytes in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets; a superpacket is one, as for Linux' TAP and VXLAN devices.
    pub packets: u64,
    /// Bytes, as they were handed over (Ethernet frames at ports, UDP payloads at peers).
    pub bytes: u64,
}

impl Traffic {
    pub(crate) fn count(&mut self, len: usize) {
        self.packets += 1;
        self.bytes += len as u64;
    }

    /// Adds another worker's traffic.
    pub fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// An attached port with what went through it.
#[derive(Debug, Clone)]
pub struct Port {
    /// What is attached.
    pub attachment: Attachment,
    /// Frames from the pod.
    pub received: Traffic,
    /// Frames to the pod.
    pub sent: Traffic,
    /// What is left of its turn.
    pub(crate) turn: Turn,
    /// How much it may have flooded.
    pub(crate) storm: TokenBucket,
}

impl Port {
    pub(crate) fn new(attachment: Attachment) -> Self {
        Self {
            attachment,
            received: Traffic::default(),
            sent: Traffic::default(),
            turn: Turn::default(),
            storm: work::storm_share(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_printed_as_their_numbers() {
        assert_eq!(format!("{:>3}", PortId(7)), "  7");
    }

    #[test]
    fn traffic_of_workers_adds_up() {
        let traffic = |packets, bytes| Traffic { packets, bytes };
        let mut sum = traffic(3, 400);
        sum.add(traffic(20, 1000));
        sum.count(60);
        assert_eq!(sum, traffic(24, 1460));
    }
}
