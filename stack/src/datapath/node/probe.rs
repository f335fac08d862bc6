//! Asking peers whether they are alive, where nothing has come from them.

use std::net::Ipv4Addr;

use ipnet::IpNet;
use muslin_encap::ip::v4;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Instant;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpProtocol};

use super::Node;
use super::router::Via;
use crate::datapath::filter::Filter;
use crate::datapath::gateway;
use crate::datapath::icmp;
use crate::datapath::observe::Observer;
use crate::datapath::peer::{Path, PeerId};

/// Bytes of an echo request without data.
const ECHO_LEN: usize = icmp::HEADER_LEN;

impl<O: Observer, F: Filter> Node<O, F> {
    /// Asks a peer for a sign of life: sends echo requests (RFC 792) from the gateway to the node's
    /// own addresses in its lease, the base, which flannel nodes have, and the gateway. The answer
    /// counts as heard, like everything that comes from a peer.
    pub fn probe(&mut self, now: Instant, id: PeerId) {
        self.begin(now);
        let reachable = self.peers.outgoing(id).copied();
        let reachable = reachable.filter(|peer| peer.path != Path::Unreachable);
        let Some(peer) = reachable else { return };
        let lease = self.peers.iter().find(|peer| peer.id == id);
        let Some(IpNet::V4(lease)) = lease.map(|peer| peer.subnet) else {
            return;
        };
        for destination in [lease.network(), gateway::address(lease)] {
            self.ident = self.ident.wrapping_add(1);
            let request = echo_request(self.gateway_ipv4(), destination, self.ident);
            self.with_scratch(&request, |node, packet| {
                node.forward(now, destination, Via::Peer(id, peer), packet)
            });
        }
    }
}

fn echo_request(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    ident: u16,
) -> [u8; v4::HEADER_LEN + ECHO_LEN] {
    let mut bytes = [0; v4::HEADER_LEN + ECHO_LEN];
    let checksums = ChecksumCapabilities::default();
    let (head, rest) = bytes.split_at_mut(v4::HEADER_LEN);
    let header = v4::Header {
        dscp: 0,
        total_len: (v4::HEADER_LEN + ECHO_LEN) as u16,
        ident: 0,
        dont_fragment: true,
        ttl: v4::DEFAULT_TTL,
        protocol: IpProtocol::Icmp,
        source,
        destination,
    };
    let echo = Icmpv4Repr::EchoRequest {
        ident,
        seq_no: 0,
        data: &[],
    };
    head.copy_from_slice(&header.to_bytes());
    echo.emit(&mut Icmpv4Packet::new_unchecked(rest), &checksums);
    bytes
}
