//! Asking peers whether they are alive, where nothing has come from them.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use muslin_encap::ip::{v4, v6};
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
/// The ICMPv6 type of echo requests (RFC 4443 section 4.1).
const ECHO_REQUEST_V6: u8 = 128;

impl<O: Observer, F: Filter> Node<O, F> {
    /// Asks a peer for a sign of life: sends echo requests (RFC 792, RFC 4443) from the gateway to the node's
    /// own addresses in its lease, the base, which flannel nodes have, and the gateway. The answer
    /// counts as heard, like everything that comes from a peer.
    pub fn probe(&mut self, now: Instant, id: PeerId) {
        self.begin(now);
        let reachable = self.peers.outgoing(id).copied();
        let reachable = reachable.filter(|peer| peer.path != Path::Unreachable);
        let Some(peer) = reachable else { return };
        let lease = self.peers.iter().find(|peer| peer.id == id);
        match lease.map(|peer| peer.subnet) {
            Some(IpNet::V4(lease)) => self.probe_v4(now, Via::Peer(id, peer), lease),
            Some(IpNet::V6(lease)) => self.probe_v6(now, id, lease),
            None => {}
        }
    }

    fn probe_v4(&mut self, now: Instant, via: Via, lease: Ipv4Net) {
        if self.home.is_none() {
            return;
        }
        for destination in [lease.network(), gateway::address(lease)] {
            self.ident = self.ident.wrapping_add(1);
            let request = echo_request(self.gateway_ipv4(), destination, self.ident);
            self.with_scratch(&request, |node, packet| {
                node.forward(now, destination, via, packet)
            });
        }
    }

    fn probe_v6(&mut self, now: Instant, id: PeerId, lease: Ipv6Net) {
        let (Some(home), Some(peer)) = (self.home_v6, self.peers.outgoing_v6(id)) else {
            return;
        };
        for destination in [lease.network(), gateway::address_v6(lease)] {
            self.ident = self.ident.wrapping_add(1);
            let request = echo_request_v6(home.gateway, destination, self.ident);
            self.with_scratch(&request, |node, packet| {
                node.forward_v6(now, destination, Via::Peer(id, peer), packet)
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

fn echo_request_v6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    ident: u16,
) -> [u8; v6::HEADER_LEN + ECHO_LEN] {
    let mut bytes = [0; v6::HEADER_LEN + ECHO_LEN];
    let header = v6::Header {
        traffic_class: 0,
        flow_label: 0,
        payload_len: ECHO_LEN as u16,
        next_header: IpProtocol::Icmpv6,
        hop_limit: v6::DEFAULT_HOP_LIMIT,
        source,
        destination,
    };
    let (head, message) = bytes.split_at_mut(v6::HEADER_LEN);
    head.copy_from_slice(&header.to_bytes());
    message[0] = ECHO_REQUEST_V6;
    message[4..6].copy_from_slice(&ident.to_be_bytes());
    v6::fill_icmp_checksum(&mut bytes, v6::HEADER_LEN);
    bytes
}
