//! What makes packets one flow.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use muslin_encap::ip::transport::Transport;
use muslin_encap::ip::v4;
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Packet, TcpPacket};

use crate::addresses::socket_ipv4;
use crate::drops::DropReason;

/// Ports that are nobody's (RFC 6335 section 6).
pub(super) const EPHEMERAL: std::ops::RangeInclusive<u16> = 49_152..=65_535;

/// The transport protocol of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo.
    Ping,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Ping => "ping",
        })
    }
}

/// What makes packets one flow. Both ends are of one IP version; there are no flows of IPv6 yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// Its protocol.
    pub protocol: Protocol,
    /// The pod's end.
    pub pod: SocketAddr,
    /// The other end, as the pod calls it; unspecified if there may be many.
    pub remote: SocketAddr,
}

impl FlowKey {
    /// The mapping of a pod's socket, whatever the other end is.
    #[must_use]
    pub const fn mapping(self) -> Self {
        let unspecified = match self.pod {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self {
            remote: SocketAddr::new(unspecified, 0),
            ..self
        }
    }

    /// Whether the other end may be any.
    #[must_use]
    pub const fn is_mapping(&self) -> bool {
        self.remote.ip().is_unspecified()
    }
}

/// A key of IPv4, which is less than half as large: every packet's is hashed and compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) protocol: Protocol,
    pub(super) pod: SocketAddrV4,
    pub(super) remote: SocketAddrV4,
}

impl Key {
    /// That of an echo request with this identifier.
    pub(super) fn of_ping(request: &Ipv4Packet<&[u8]>, identifier: u16) -> Self {
        Self {
            protocol: Protocol::Ping,
            pod: SocketAddrV4::new(request.src_addr(), identifier),
            remote: SocketAddrV4::new(request.dst_addr(), 0),
        }
    }

    /// See [`FlowKey::mapping`].
    pub(super) const fn mapping(self) -> Self {
        Self {
            remote: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
            ..self
        }
    }
}

impl From<Key> for FlowKey {
    fn from(key: Key) -> Self {
        Self {
            protocol: key.protocol,
            pod: key.pod.into(),
            remote: key.remote.into(),
        }
    }
}

impl TryFrom<FlowKey> for Key {
    type Error = DropReason;

    fn try_from(key: FlowKey) -> Result<Self, DropReason> {
        match (socket_ipv4(key.pod), socket_ipv4(key.remote)) {
            (Some(pod), Some(remote)) => Ok(Self {
                protocol: key.protocol,
                pod,
                remote,
            }),
            _ => Err(DropReason::EgressFamily),
        }
    }
}

/// Whether a segment asks for a connection.
pub(super) fn opens(packet: &[u8], at: &Transport) -> bool {
    let segment = TcpPacket::new_unchecked(&packet[at.l4..]);
    segment.syn() && !segment.ack() && !segment.rst()
}

/// The flow of a packet of a pod.
pub(super) fn key_of(packet: &[u8], protocol: Protocol, at: &Transport) -> Key {
    let view = Ipv4Packet::new_unchecked(packet);
    let port = |offset| u16::from_be_bytes([packet[at.l4 + offset], packet[at.l4 + offset + 1]]);
    Key {
        protocol,
        pod: SocketAddrV4::new(view.src_addr(), port(0)),
        remote: SocketAddrV4::new(view.dst_addr(), port(2)),
    }
}

/// What a packet of a pod is to its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// It asks for a connection.
    Opening,
    /// It is another of the pod's packets.
    Other,
    /// It is an ICMP error that quotes a packet to the pod.
    Error,
}

/// The flow of a packet of a pod, or of the packet that an ICMP error of it quotes.
pub(super) fn flow_of(packet: &[u8]) -> Option<(Key, Role)> {
    let view = Ipv4Packet::new_unchecked(packet);
    match view.next_header() {
        IpProtocol::Tcp => {
            let at = Transport::parse(packet, 0).ok()?;
            let role = match opens(packet, &at) {
                true => Role::Opening,
                false => Role::Other,
            };
            Some((key_of(packet, Protocol::Tcp, &at), role))
        }
        IpProtocol::Udp => {
            let at = Transport::parse(packet, 0).ok()?;
            Some((key_of(packet, Protocol::Udp, &at), Role::Other))
        }
        IpProtocol::Icmp => {
            let icmp = Icmpv4Packet::new_checked(view.payload()).ok()?;
            match icmp.msg_type() {
                Icmpv4Message::EchoRequest => {
                    Some((Key::of_ping(&view, icmp.echo_ident()), Role::Other))
                }
                Icmpv4Message::DstUnreachable => Some((quoted(icmp.data())?, Role::Error)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// The flow of a packet to a pod, of which there is at least what an ICMP error quotes.
pub(super) fn quoted(packet: &[u8]) -> Option<Key> {
    let (header, rest) = v4::split_header(packet)?;
    let view = Ipv4Packet::new_unchecked(header);
    let protocol = match view.next_header() {
        IpProtocol::Tcp => Protocol::Tcp,
        IpProtocol::Udp => Protocol::Udp,
        _ => return None,
    };
    let ports = rest.first_chunk::<4>()?;
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    Some(Key {
        protocol,
        pod: SocketAddrV4::new(view.dst_addr(), port(2)),
        remote: SocketAddrV4::new(view.src_addr(), port(0)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(pod: &str, remote: &str) -> FlowKey {
        FlowKey {
            protocol: Protocol::Udp,
            pod: pod.parse().unwrap(),
            remote: remote.parse().unwrap(),
        }
    }

    #[test]
    fn a_mapping_is_of_its_pods_version() {
        for (pod, any) in [("10.244.1.2:53", "0.0.0.0:0"), ("[fd00::2]:53", "[::]:0")] {
            let mapping = key(pod, "192.0.2.1:53").mapping();
            assert_eq!(mapping, key(pod, any));
            assert!(mapping.is_mapping());
        }
    }

    #[test]
    fn both_ends_are_of_ipv4() {
        let ipv4 = key("10.244.1.2:53", "192.0.2.1:53");
        assert_eq!(Key::try_from(ipv4).map(FlowKey::from), Ok(ipv4));
        for (pod, remote) in [
            ("[fd00::2]:53", "[2001:db8::1]:53"),
            ("10.244.1.2:53", "[2001:db8::1]:53"),
            ("[fd00::2]:53", "192.0.2.1:53"),
        ] {
            let refused = Key::try_from(key(pod, remote));
            assert_eq!(refused, Err(DropReason::EgressFamily));
        }
    }
}
