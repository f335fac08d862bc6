//! What ICMP errors quote of a flow, and what is heard of them.

use muslin_encap::ip::transport::UDP_HEADER_LEN;
use muslin_encap::ip::v4;
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol};

use super::datagram::{write_ip, write_udp};
use super::key::{Key, Protocol};
use crate::datapath::icmp;

/// The most an ICMP error quotes.
pub(super) const QUOTED: usize = icmp::MAX_LEN_V4 - v4::HEADER_LEN - icmp::HEADER_LEN;

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
        let at = if is_ping {
            v4::HEADER_LEN
        } else {
            v4::HEADER_LEN + UDP_HEADER_LEN
        };
        let known = payload.len().min(QUOTED - at);
        bytes[at..at + known].copy_from_slice(&payload[..known]);
        let len = (at + known).max(v4::HEADER_LEN + icmp::HEADER_LEN);
        if is_ping {
            write_ip(&mut bytes[..len], IpProtocol::Icmp, ends, 0);
            let mut echo = Icmpv4Packet::new_unchecked(&mut bytes[v4::HEADER_LEN..len]);
            echo.set_msg_type(Icmpv4Message::EchoRequest);
            echo.set_msg_code(0);
            // The host's socket has a number of its own.
            echo.set_echo_ident(key.pod.port());
            echo.fill_checksum();
        } else {
            write_ip(&mut bytes[..len], IpProtocol::Udp, ends, 0);
            write_udp(&mut bytes[v4::HEADER_LEN..len], ends);
        }
        Self { bytes, len }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
