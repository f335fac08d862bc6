//! Steps: how the data path comes to a verdict, one decision after another.
//!
//! A node tells them to its [`crate::datapath::observe::Observer`], if that wants to know. They are
//! told where the decision is made, so that who asks gets the data path's own answer.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use muslin_encap::offload::split::Checksums;
use smoltcp::wire::EthernetAddress;

use crate::datapath::egress::{FlowKey, Holder};
use crate::datapath::filter::Direction;
use crate::datapath::icmp::IcmpError;
use crate::datapath::node::NextHop;
use crate::datapath::peer::{Path, PeerId};
use crate::datapath::port::PortId;

/// A decision about a packet on its way to a verdict. One that drops it is not a step: the reason is
/// in the verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TraceStep {
    /// A frame came in at a port, and its sender's addresses are its own, or anybody's if it is not
    /// guarded.
    Guard {
        /// The port.
        port: PortId,
        /// Whether the pod may use its own addresses only.
        guarded: bool,
    },
    /// The switch knows where frames for this MAC address go.
    Switch {
        /// The destination.
        mac: EthernetAddress,
        /// What is there.
        to: Switched,
    },
    /// A datagram of the tunnel came from this address.
    Sender {
        /// The outer source.
        address: SocketAddr,
        /// The first of the peers with this address, if one has it.
        peer: Option<PeerId>,
    },
    /// The datagram's headers are those of this node's tunnel, and are gone.
    Decapsulated,
    /// A frame came by the uplink from a host with this MAC address.
    Uplink {
        /// The source.
        mac: EthernetAddress,
    },
    /// The source may send this.
    Source {
        /// The inner source address.
        address: IpAddr,
        /// Whose address it is.
        holder: Holding,
    },
    /// The packet is for an address of the gateway's.
    Gateway {
        /// The address.
        address: IpAddr,
    },
    /// The packet is for the host, by the host interface.
    Host {
        /// The address.
        address: IpAddr,
    },
    /// The route table was asked.
    Route {
        /// The destination.
        destination: IpAddr,
        /// The longest prefix that holds it, and what is behind it.
        route: Option<(IpNet, NextHop)>,
    },
    /// There is no route, and the destination is outside this network: the packet leaves the overlay.
    Outside {
        /// The overlay's network.
        network: IpNet,
    },
    /// The filter lets the packet go on.
    Permitted {
        /// Which way the packet goes.
        direction: Direction,
        /// The pod's port.
        port: PortId,
    },
    /// The time to live is enough for one hop more.
    Ttl {
        /// With which the packet goes on.
        left: u8,
    },
    /// The packet was measured.
    Mtu {
        /// The largest packet that the way takes, in bytes.
        mtu: u16,
        /// The length of the packet, or of the longest segment of a superpacket, in bytes.
        len: usize,
        /// Whether it must not be cut into fragments.
        dont_fragment: bool,
    },
    /// It goes on in pieces: the segments of a superpacket, or fragments. The next steps are those of the
    /// first.
    InPieces {
        /// Whether they are segments.
        segments: bool,
    },
    /// How packets get to a peer.
    Way {
        /// The peer.
        peer: PeerId,
        /// Where its host is.
        address: IpAddr,
        /// By what.
        path: Path,
    },
    /// The neighbour table was asked.
    Neighbour {
        /// The address on the link of the pods, or on the uplink's.
        address: IpAddr,
        /// The port behind which it is, if it is a pod's and known.
        port: Option<PortId>,
        /// What it says.
        known: Known,
    },
    /// The headers of the tunnel are in front of the packet.
    Encapsulated {
        /// The peer.
        peer: PeerId,
        /// Where the datagram goes.
        destination: SocketAddr,
        /// The inner source and destination MAC addresses, if the tunnel has frames.
        macs: Option<(EthernetAddress, EthernetAddress)>,
        /// The TCP or UDP checksum with which the packet leaves.
        checksums: Checksums,
    },
    /// An address of the packet was written anew.
    Translated {
        /// Whether that is the source; else it is the destination.
        is_source: bool,
        /// What it is now.
        to: SocketAddr,
    },
    /// The sender gets an ICMP error, unless it has had too many.
    Error {
        /// Which.
        error: IcmpError,
    },
    /// Egress looked for the flow.
    Flow {
        /// Its ends.
        flow: FlowKey,
        /// Whether it is there.
        is_known: bool,
    },
    /// It is a fragment, and waits for the others of its packet.
    Reassembled,
    /// The flow is another worker's, or the predecessor's.
    HandedOver {
        /// Whose.
        to: Holder,
    },
    /// The flow goes to a service of the node at the gateway's address.
    Service {
        /// Its port.
        port: u16,
    },
    /// Egress' policy has a rule for the destination.
    Rule {
        /// The longest prefix that holds it.
        prefix: IpNet,
        /// Whether flows may go there, as far as this rule says.
        allows: bool,
    },
    /// Egress' policy lets the flow go there on the host.
    Socket {
        /// Where the host's socket sends to.
        to: SocketAddr,
    },
}

/// Where the switch sends a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switched {
    /// To the router: it is the gateway's MAC address.
    Gateway,
    /// To this port.
    Port(PortId),
    /// To so many other ports: it is a group's, or nobody knows where it is.
    Others(usize),
}

/// Whose a source address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    /// That of the pod at this port.
    Pod(PortId),
    /// It is in a lease of this sender, or senders are not checked.
    Peer(Option<PeerId>),
    /// The host has it.
    Host,
}

/// What the neighbour table knows of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It is at this MAC address.
    At(EthernetAddress),
    /// It was there, and is asked whether it still is.
    Stale(EthernetAddress),
    /// It is asked for, and the packet waits.
    Sought,
    /// A pod that was attached before the node began anew had it; the packet waits for that.
    Awaited,
    /// Nobody has it.
    Nobody,
}
