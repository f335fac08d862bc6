//! The way of datagrams and echo requests outside: what of a pod's header goes on with them, and what
//! routers and hosts there say about them.

use std::net::{IpAddr, SocketAddr, SocketAddrV4};

use muslin_encap::ip::transport::UDP_HEADER_LEN;
use muslin_encap::ip::v4;
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Packet};

use super::datagram::{write_ip, write_udp};
use super::output::Outbox;
use super::{Egress, FlowId, Host, Key, Protocol};
use crate::addresses::{ipv4, socket_ipv4};
use crate::datapath::icmp::{self, IcmpError};

/// Errors that are passed on before the others have their turn.
const COMPLAINTS: usize = 16;
/// The most an ICMP error quotes.
const QUOTED: usize = icmp::MAX_LEN - v4::HEADER_LEN - icmp::HEADER_LEN;

/// What datagrams have in their headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Time to live.
    pub ttl: u8,
    /// Differentiated services code point (RFC 2474), of six bits.
    pub dscp: u8,
    /// Whether routers, and the host, must not fragment them.
    pub dont_fragment: bool,
}

impl Marks {
    /// Those of a pod's packet behind this router, which has seen that its time to live is not over.
    ///
    /// Congestion is not among them: what the network says of it on the way back, the host's socket
    /// does not tell, and a pod that hears nothing would take that for none.
    pub(super) fn behind(packet: &[u8]) -> Self {
        let view = Ipv4Packet::new_unchecked(packet);
        Self {
            ttl: view.hop_limit().saturating_sub(1).max(1),
            dscp: view.dscp(),
            dont_fragment: view.dont_frag(),
        }
    }
}

/// What is wrong with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Complaint {
    /// What it is.
    pub error: IcmpError,
    /// Who says so, about an earlier datagram; nobody, if the host itself does not send this one.
    pub from: Option<IpAddr>,
    /// Where that datagram was sent; echo requests have no port.
    pub to: SocketAddr,
    /// Bytes that are quoted: of the payload of UDP, or of the echo request.
    pub len: usize,
}

/// What there is to hear about datagrams after one has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// Others have complained about earlier ones; this one may find somebody.
    OfEarlier,
    /// The host sends no datagrams of this length.
    TooLong,
    Nothing,
}

impl Egress {
    /// Tells a pod what is wrong with datagrams of a flow, whose socket has failed, at one with this
    /// payload if it was to send one.
    pub(super) fn hear(
        &mut self,
        (id, key): (FlowId, Key),
        payload: &[u8],
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Heard {
        let mut quoted = [0; QUOTED];
        for complaints in 0..COMPLAINTS {
            let Some(complaint) = host.complaint(id, &mut quoted) else {
                return if complaints > 0 {
                    Heard::OfEarlier
                } else {
                    Heard::Nothing
                };
            };
            let Some(from) = complaint.from else {
                let quote = Quote::new(key, payload);
                out.report(complaint.error, quote.as_slice());
                return Heard::TooLong;
            };
            // Nobody complains about what the pod could not have sent.
            if let Some(remote) = self.complained_of(id, key, complaint.to)
                && let Some(from) = ipv4(from)
            {
                // The pod knows the host's loopback by another address.
                let is_loopback = from.is_loopback();
                let from = if is_loopback { *remote.ip() } else { from };
                let quoted = &quoted[..complaint.len.min(QUOTED)];
                let quote = Quote::new(Key { remote, ..key }, quoted);
                out.relay(from, complaint.error, quote.as_slice());
            }
        }
        Heard::OfEarlier
    }

    /// What a pod calls the other end of a datagram that went `to` there on the host.
    fn complained_of(&self, id: FlowId, key: Key, to: SocketAddr) -> Option<SocketAddrV4> {
        let to = socket_ipv4(to)?;
        let (_, flow) = self.flows.get(id)?;
        match flow.latest() {
            None => Some(key.remote),
            Some(latest) if latest.to == to => Some(latest.remote),
            Some(_) => self.config.source(key.protocol, to).ok(),
        }
    }
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
