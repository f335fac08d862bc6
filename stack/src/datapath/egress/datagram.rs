//! Datagrams and echo requests of pods. What comes from a flow's socket goes to the pod from the
//! address by which the pod knows its sender.

use std::net::{IpAddr, SocketAddr};

use muslin_encap::buffer::HEADROOM;
use muslin_encap::ip::transport::{self, UDP_HEADER_LEN};
use muslin_encap::ip::{checksum, v4, v6};
use muslin_encap::offload::virtio::{Checksum, Header};
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, UdpPacket};

use super::config::EgressConfig;
use super::head::kind;
use super::host::{FlowId, Host, HostError};
use super::key::{Key, Protocol, plain};
use super::output::{Buffer, Outbox};
use crate::datapath::icmp;
use crate::drops::DropReason;

/// Datagrams read from one socket before the others have their turn.
const READS: usize = 64;

/// Where a datagram of a pod goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Destination {
    /// As the pod calls it.
    pub(super) remote: SocketAddr,
    /// On the host.
    pub(super) to: SocketAddr,
}

/// Where datagrams for pods are made.
pub(super) struct Datagrams {
    storage: Buffer,
    /// Identification of the last one; one that is too long for a pod is cut into fragments.
    ident: u16,
}

/// A flow whose socket is read.
pub(super) struct Reading<'a> {
    pub(super) id: FlowId,
    pub(super) key: Key,
    /// Of a mapping, where the pod has sent to last.
    pub(super) latest: Option<Destination>,
    pub(super) config: &'a EgressConfig,
}

impl Reading<'_> {
    /// The next datagram's length, and who has sent it: nobody but the other end if there is one.
    fn next(
        &self,
        host: &mut impl Host,
        buffer: &mut [u8],
    ) -> Result<(usize, Option<SocketAddr>), HostError> {
        if self.latest.is_none() {
            return host.read(self.id, buffer).map(|len| (len, None));
        }
        let received = host.receive(self.id, buffer);
        received.map(|(len, from)| (len, Some(plain(from))))
    }

    /// What a pod calls the sender.
    fn source(&self, from: Option<SocketAddr>) -> Result<SocketAddr, DropReason> {
        match (from, self.latest) {
            (None, _) => Ok(self.key.remote),
            (Some(from), Some(latest)) if from == latest.to => Ok(latest.remote),
            (Some(from), _) => self.config.source(self.key.protocol, self.key.pod, from),
        }
    }

    /// Whether a datagram keeps its flow in use. Of a mapping that is for those to whom the pod has
    /// sent last, and not for strangers (RFC 4787 section 4.3).
    fn is_use(&self, from: Option<SocketAddr>) -> bool {
        from.is_none_or(|from| {
            self.latest
                .is_some_and(|latest| latest.to.ip() == from.ip())
        })
    }
}

/// How reading from a socket ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Read {
    /// Bytes of payload that went to the pod.
    pub(super) bytes: usize,
    /// Whether any of that keeps the flow in use.
    pub(super) is_use: bool,
    /// What is wrong, if the socket was not just empty or the turn over.
    pub(super) error: Option<HostError>,
}

impl Datagrams {
    pub(super) fn new() -> Self {
        Self {
            storage: Outbox::buffer(),
            ident: 0,
        }
    }

    /// Sends a pod what its flow's socket has, and clears `readable` if there is no more.
    pub(super) fn read(
        &mut self,
        flow: &Reading<'_>,
        readable: &mut bool,
        host: &mut impl Host,
        out: &mut Outbox,
    ) -> Read {
        // An echo reply comes with its header.
        let headers = header_len(flow.key.pod.ip())
            + if flow.key.protocol == Protocol::Udp {
                UDP_HEADER_LEN
            } else {
                0
            };
        let payload = HEADROOM + headers..HEADROOM + max_len(flow.key.pod.ip());
        let mut read = Read::default();
        for _ in 0..READS {
            if !*readable || out.is_full() {
                break;
            }
            match flow.next(host, &mut self.storage[payload.clone()]) {
                Ok((len, from)) => match flow.source(from) {
                    Ok(remote) => {
                        let key = Key { remote, ..flow.key };
                        if self.send(key, headers + len, out) {
                            read.bytes += len;
                            read.is_use |= flow.is_use(from);
                        }
                    }
                    Err(reason) => out.lose(reason, 1),
                },
                Err(HostError::WouldBlock) => *readable = false,
                Err(other) => {
                    read.error = Some(other);
                    break;
                }
            }
        }
        read
    }

    /// Sends a pod a datagram from the host's side of its flow.
    pub(super) fn deliver(
        &mut self,
        key: Key,
        payload: &[u8],
        out: &mut Outbox,
    ) -> Result<(), DropReason> {
        let headers = header_len(key.pod.ip()) + UDP_HEADER_LEN;
        let len = headers + payload.len();
        if len > max_len(key.pod.ip()) {
            return Err(DropReason::EgressMalformed);
        }
        let at = HEADROOM + headers;
        self.storage[at..at + payload.len()].copy_from_slice(payload);
        self.send(key, len, out);
        Ok(())
    }

    /// Sends the packet of `len` bytes whose payload is in the storage.
    fn send(&mut self, key: Key, len: usize, out: &mut Outbox) -> bool {
        let Some(packet) = self.storage.get_mut(HEADROOM..HEADROOM + len) else {
            return false;
        };
        self.ident = self.ident.wrapping_add(1);
        let ends = (key.remote, key.pod);
        let at = header_len(key.pod.ip());
        let checksum = match key.protocol {
            Protocol::Ping => {
                if !answer(packet, at, key.pod) {
                    return false;
                }
                write_ip(packet, icmp_of(key.pod.ip()), ends, self.ident);
                fill_icmp_checksum(packet, at);
                Checksum::Unknown
            }
            Protocol::Tcp | Protocol::Udp => {
                write_ip(packet, IpProtocol::Udp, ends, self.ident);
                write_udp(&mut packet[at..], ends);
                Checksum::Partial {
                    start: at as u16,
                    offset: transport::Protocol::Udp.checksum_offset() as u16,
                }
            }
        };
        let offload = Header {
            checksum,
            ..Header::default()
        };
        out.send(&mut self.storage, len, offload);
        true
    }
}

/// Bytes of an IP header without more than that.
pub(super) const fn header_len(of: IpAddr) -> usize {
    match of {
        IpAddr::V4(_) => v4::HEADER_LEN,
        IpAddr::V6(_) => v6::HEADER_LEN,
    }
}

/// Bytes of the longest packet.
const fn max_len(of: IpAddr) -> usize {
    match of {
        IpAddr::V4(_) => v4::MAX_LEN,
        IpAddr::V6(_) => v6::MAX_LEN,
    }
}

/// The protocol of pings.
pub(super) const fn icmp_of(address: IpAddr) -> IpProtocol {
    match address {
        IpAddr::V4(_) => IpProtocol::Icmp,
        IpAddr::V6(_) => IpProtocol::Icmpv6,
    }
}

/// Writes a header without more than that.
pub(super) fn write_ip(
    packet: &mut [u8],
    protocol: IpProtocol,
    (from, to): (SocketAddr, SocketAddr),
    ident: u16,
) {
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let header = v4::Header {
                dscp: 0,
                total_len: packet.len() as u16,
                ident,
                dont_fragment: false,
                ttl: v4::DEFAULT_TTL,
                protocol,
                source,
                destination,
            };
            packet[..v4::HEADER_LEN].copy_from_slice(&header.to_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let header = v6::Header {
                traffic_class: 0,
                flow_label: 0,
                payload_len: (packet.len() - v6::HEADER_LEN) as u16,
                next_header: protocol,
                hop_limit: v6::DEFAULT_HOP_LIMIT,
                source,
                destination,
            };
            packet[..v6::HEADER_LEN].copy_from_slice(&header.to_bytes());
        }
        // No key is of both versions but a mapping's, to which nobody sends.
        _ => {}
    }
}

/// Writes a header whose checksum is that of the pseudo header.
pub(super) fn write_udp(datagram: &mut [u8], (from, to): (SocketAddr, SocketAddr)) {
    let len = datagram.len() as u16;
    let addresses = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            checksum::sum([from.octets(), to.octets()].as_flattened())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            checksum::sum([from.octets(), to.octets()].as_flattened())
        }
        _ => 0,
    };
    let protocol = u16::from(u8::from(IpProtocol::Udp));
    let pseudo = checksum::add(addresses, checksum::add(protocol, len));
    let mut header = UdpPacket::new_unchecked(datagram);
    header.set_src_port(from.port());
    header.set_dst_port(to.port());
    header.set_len(len);
    header.set_checksum(pseudo);
}

/// Writes the checksum of the message of ICMP or ICMPv6 that begins `at` bytes into a packet.
pub(super) fn fill_icmp_checksum(packet: &mut [u8], at: usize) {
    match packet.first().map(|first| first >> 4) {
        Some(6) => v6::fill_icmp_checksum(packet, at),
        Some(_) | None => {
            if let Some(message) = packet.get_mut(at..) {
                Icmpv4Packet::new_unchecked(message).fill_checksum();
            }
        }
    }
}

/// The type of an echo request.
pub(super) fn echo_request(of: IpAddr) -> u8 {
    match of {
        IpAddr::V4(_) => Icmpv4Message::EchoRequest.into(),
        IpAddr::V6(_) => kind::ECHO_REQUEST,
    }
}

/// Where the identifier of an echo is.
pub(super) const IDENTIFIER: std::ops::Range<usize> = 4..6;

/// Makes an echo reply from the host, of either version, one that a pod waits for, whose checksum is
/// still to be filled; false if it is none.
fn answer(packet: &mut [u8], at: usize, pod: SocketAddr) -> bool {
    let Some(message) = packet.get_mut(at..) else {
        return false;
    };
    let of_v4 = u8::from(Icmpv4Message::EchoReply);
    let is_reply = matches!(message, [kind, 0, ..] if [of_v4, kind::ECHO_REPLY].contains(kind));
    if !is_reply || message.len() < icmp::HEADER_LEN {
        return false;
    }
    message[0] = match pod {
        SocketAddr::V4(_) => of_v4,
        SocketAddr::V6(_) => kind::ECHO_REPLY,
    };
    // The host's socket has a number of its own.
    message[IDENTIFIER].copy_from_slice(&pod.port().to_be_bytes());
    true
}
