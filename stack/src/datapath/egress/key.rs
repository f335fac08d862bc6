//! What makes packets one flow.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use muslin_encap::ip::transport::Transport;
use muslin_encap::ip::{v4, v6};
use smoltcp::wire::{IpProtocol, IpVersion, Ipv4Packet, Ipv6Packet, TcpPacket};

use super::head::{self, Head, Message};
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

/// What makes packets one flow. Both ends are of one IP version; but of a mapping of an IPv6 pod to
/// which IPv4 is translated (NAT64) the other end is `0.0.0.0`, as its socket is one of IPv4.
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
        Self {
            remote: any(self.pod),
            ..self
        }
    }

    /// Whether the other end may be any.
    #[must_use]
    pub const fn is_mapping(&self) -> bool {
        self.remote.ip().is_unspecified()
    }
}

/// Any address and port of an address's IP version.
const fn any(of: SocketAddr) -> SocketAddr {
    let unspecified = match of {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    SocketAddr::new(unspecified, 0)
}

/// The key of a flow that can be: its ends are of one IP version, but for a mapping of NAT64, and
/// have neither scope nor flow label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) protocol: Protocol,
    pub(super) pod: SocketAddr,
    pub(super) remote: SocketAddr,
}

impl Key {
    /// That of an echo request with this identifier.
    pub(super) fn of_ping(head: &Head, identifier: u16) -> Self {
        Self {
            protocol: Protocol::Ping,
            pod: SocketAddr::new(head.source, identifier),
            remote: SocketAddr::new(head.destination, 0),
        }
    }

    /// The mapping of a pod's socket whose socket on the host is of the IP version of `to`.
    pub(super) const fn mapping_to(self, to: SocketAddr) -> Self {
        Self {
            remote: any(to),
            ..self
        }
    }
}

impl Hash for Key {
    /// Every packet's is hashed: as few numbers as there are.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let ports = u64::from(self.pod.port()) << 16 | u64::from(self.remote.port());
        state.write_u64((self.protocol as u64) << 32 | ports);
        match (self.pod.ip(), self.remote.ip()) {
            (IpAddr::V4(pod), IpAddr::V4(remote)) => {
                state.write_u64(u64::from(pod.to_bits()) << 32 | u64::from(remote.to_bits()));
            }
            (pod, remote) => {
                for ip in [pod, remote] {
                    state.write_u128(match ip {
                        IpAddr::V4(ip) => ip.to_bits().into(),
                        IpAddr::V6(ip) => ip.to_bits(),
                    });
                }
            }
        }
    }
}

impl From<Key> for FlowKey {
    fn from(key: Key) -> Self {
        Self {
            protocol: key.protocol,
            pod: key.pod,
            remote: key.remote,
        }
    }
}

impl TryFrom<FlowKey> for Key {
    type Error = DropReason;

    fn try_from(key: FlowKey) -> Result<Self, DropReason> {
        let is_translated = key.pod.is_ipv6() && key.is_mapping();
        if key.pod.is_ipv4() != key.remote.is_ipv4() && !is_translated {
            return Err(DropReason::EgressFamily);
        }
        Ok(Self {
            protocol: key.protocol,
            pod: plain(key.pod),
            remote: plain(key.remote),
        })
    }
}

/// An address and its port, and nothing else.
pub(super) const fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port())
}

/// Whether a segment asks for a connection.
pub(super) fn opens(packet: &[u8], at: &Transport) -> bool {
    let segment = TcpPacket::new_unchecked(&packet[at.l4..]);
    segment.syn() && !segment.ack() && !segment.rst()
}

/// The flow of a packet of a pod.
pub(super) fn key_of(packet: &[u8], protocol: Protocol, at: &Transport) -> Key {
    let (source, destination) = match at.version {
        IpVersion::Ipv4 => head::addresses_v4(packet),
        IpVersion::Ipv6 => head::addresses_v6(packet),
    };
    let port = |offset| u16::from_be_bytes([packet[at.l4 + offset], packet[at.l4 + offset + 1]]);
    Key {
        protocol,
        pod: SocketAddr::new(source, port(0)),
        remote: SocketAddr::new(destination, port(2)),
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
    let head = Head::parse(packet).ok()?;
    match head.protocol {
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
        _ => match Message::parse(&head, packet)? {
            Message::Echo { identifier } => Some((Key::of_ping(&head, identifier), Role::Other)),
            Message::Unreachable { offender, .. } => Some((quoted(offender)?, Role::Error)),
            Message::Other => None,
        },
    }
}

/// The flow of a packet to a pod, of which there is at least what an ICMP error quotes.
pub(super) fn quoted(packet: &[u8]) -> Option<Key> {
    let ((source, destination), protocol, rest) = match packet.first()? >> 4 {
        4 => {
            let (header, rest) = v4::split_header(packet)?;
            let protocol = Ipv4Packet::new_unchecked(header).next_header();
            (head::addresses_v4(packet), protocol, rest)
        }
        6 => {
            // What goes to pods has no extension headers.
            let (header, rest) = packet.split_at_checked(v6::HEADER_LEN)?;
            let protocol = Ipv6Packet::new_unchecked(header).next_header();
            (head::addresses_v6(packet), protocol, rest)
        }
        _ => return None,
    };
    let protocol = match protocol {
        IpProtocol::Tcp => Protocol::Tcp,
        IpProtocol::Udp => Protocol::Udp,
        _ => return None,
    };
    let ports = rest.first_chunk::<4>()?;
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    Some(Key {
        protocol,
        pod: SocketAddr::new(destination, port(2)),
        remote: SocketAddr::new(source, port(0)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::hash::Seed;

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
    fn both_ends_are_of_one_version() {
        for (pod, remote) in [
            ("10.244.1.2:53", "192.0.2.1:53"),
            ("[fd00::2]:53", "[2001:db8::1]:53"),
            // A mapping to IPv4 of a pod of IPv6.
            ("[fd00::2]:53", "0.0.0.0:0"),
        ] {
            let both = key(pod, remote);
            assert_eq!(Key::try_from(both).map(FlowKey::from), Ok(both));
        }
        for (pod, remote) in [
            ("10.244.1.2:53", "[2001:db8::1]:53"),
            ("10.244.1.2:53", "[::]:0"),
            ("[fd00::2]:53", "192.0.2.1:53"),
        ] {
            let refused = Key::try_from(key(pod, remote));
            assert_eq!(refused, Err(DropReason::EgressFamily));
        }
    }

    #[test]
    fn a_scope_makes_no_other_flow() {
        let mut scoped = key("[fd00::2]:53", "[2001:db8::1]:53");
        let plain = Key::try_from(scoped);
        scoped.pod = std::net::SocketAddrV6::new("fd00::2".parse().unwrap(), 53, 7, 9).into();
        assert_eq!(Key::try_from(scoped), plain);
    }

    #[test]
    fn each_part_of_a_key_counts_in_its_hash() {
        use std::hash::BuildHasher;
        let hash = |key: FlowKey| Seed(7).hash_one(Key::try_from(key).unwrap());
        let keys = [
            key("10.244.1.2:53", "192.0.2.1:54"),
            key("10.244.1.3:53", "192.0.2.1:54"),
            key("10.244.1.2:53", "192.0.2.2:54"),
            key("10.244.1.2:54", "192.0.2.1:53"),
            key("[fd00::2]:53", "[2001:db8::1]:54"),
            key("[fd00::3]:53", "[2001:db8::1]:54"),
            key("[fd00:1::2]:53", "[2001:db8::1]:54"),
            key("[fd00::2]:53", "[2001:db8:1::1]:54"),
            key("[fd00::2]:0", "[::]:0"),
        ];
        let hashes: std::collections::HashSet<_> = keys.iter().map(|it| hash(*it)).collect();
        assert_eq!(hashes.len(), keys.len());
    }
}
