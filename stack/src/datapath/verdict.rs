//! What becomes of a packet.

use std::net::SocketAddr;

use muslin_encap::offload::split::Checksums;

use crate::datapath::peer::PeerId;
use crate::datapath::port::PortId;
use crate::drops::DropReason;

/// What to do with a packet. Counted already, whatever it is.
///
/// There is a further verdict only in a version that breaks others: who carries verdicts out must
/// not have an arm that ignores those that it does not know, or packets are lost and counted as sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The packet is an Ethernet frame for this port.
    Port(PortId),
    /// The packet is an Ethernet frame for every port but this one.
    Flood {
        /// The port it came from, if any.
        except: Option<PortId>,
    },
    /// The packet is an Ethernet frame for the uplink.
    Uplink {
        /// The peer it is for; an ARP message is for none.
        id: Option<PeerId>,
    },
    /// The packet is what the tunnel's datagram carries: the payload of a UDP datagram or, of IPv4 in
    /// IPv4, that of an IPv4 packet.
    Peer {
        /// The peer it is for.
        id: PeerId,
        /// Where its tunnel ends.
        destination: SocketAddr,
        /// A hash of the inner flow.
        flow: u32,
        /// The TCP or UDP checksum with which it leaves. If that is a partial one, so is that of a
        /// single packet already.
        checksums: Checksums,
    },
    /// The packet is an IPv4 packet for the host interface.
    Host,
    /// The packet is an IPv4 packet for [`crate::datapath::egress::Egress`].
    Egress,
    /// The node keeps it.
    Consumed,
    /// It is lost.
    Drop(DropReason),
}
