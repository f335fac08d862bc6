//! What ICMP errors quote of a flow, and what is heard of them.

use std::net::IpAddr;

use muslin_encap::ip::transport::UDP_HEADER_LEN;
use muslin_encap::ip::{v4, v6};
use smoltcp::wire::IpProtocol;

use super::datagram::{
    IDENTIFIER, echo_request, fill_icmp_checksum, header_len, icmp_of, write_ip, write_udp,
};
use super::key::{Key, Protocol};
use crate::datapath::icmp;

/// The most an ICMP error quotes: that of IPv6.
pub(super) const QUOTED: usize = icmp::v6::MAX_LEN - v6::HEADER_LEN - icmp::HEADER_LEN;
const QUOTED_V4: usize = icmp::MAX_LEN_V4 - v4::HEADER_LEN - icmp::HEADER_LEN;

/// What there is to hear about datagrams after one has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// Others have complained about earlier ones; this one may find somebody.
    OfEarlier,
    /// The host sends no datagrams of this length.
    TooLong,
    Nothing,
}

/// What a pod has sent of a flow, as far as an ICMP error quotes it.
pub(super) struct Quote {
    bytes: [u8; QUOTED],
    len: usize,
}

impl Quote {
    /// A packet with as much of the payload, of UDP or the echo request, as is known and has room.
    pub(super) fn new(key: Key, payload: &[u8]) -> Self {
        let mut bytes = [0; QUOTED];
        let ends = (key.pod, key.remote);
        let is_ping = key.protocol == Protocol::Ping;
        let header = header_len(key.pod.ip());
        let at = if is_ping {
            header
        } else {
            header + UDP_HEADER_LEN
        };
        let most = match key.pod.ip() {
            IpAddr::V4(_) => QUOTED_V4,
            IpAddr::V6(_) => QUOTED,
        };
        let known = payload.len().min(most - at);
        bytes[at..at + known].copy_from_slice(&payload[..known]);
        let len = (at + known).max(header + icmp::HEADER_LEN);
        let packet = &mut bytes[..len];
        if is_ping {
            write_ip(packet, icmp_of(key.pod.ip()), ends, 0);
            // The host's socket has a number of its own, and may be of the other version.
            let echo = &mut packet[header..];
            (echo[0], echo[1]) = (echo_request(key.pod.ip()), 0);
            echo[IDENTIFIER].copy_from_slice(&key.pod.port().to_be_bytes());
            fill_icmp_checksum(packet, header);
        } else {
            write_ip(packet, IpProtocol::Udp, ends, 0);
            write_udp(&mut packet[header..], ends);
        }
        Self { bytes, len }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
