//! Datagrams and echo requests of pods. What comes from a flow's socket goes to the pod from the
//! address by which the pod knows its sender.

use std::net::{SocketAddr, SocketAddrV4};

use muslin_encap::buffer::HEADROOM;
use muslin_encap::ip::transport::{self, UDP_HEADER_LEN};
use muslin_encap::ip::{checksum, v4};
use muslin_encap::offload::virtio::{Checksum, Header};
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, UdpPacket};

use super::config::EgressConfig;
use super::host::{FlowId, Host, HostError};
use super::key::{Key, Protocol};
use super::output::{Buffer, Outbox};
use crate::drops::DropReason;

/// Datagrams read from one socket before the others have their turn.
const READS: usize = 64;

/// Where a datagram of a pod goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Destination {
    /// As the pod calls it.
    pub(super) remote: SocketAddrV4,
    /// On the host.
    pub(super) to: SocketAddrV4,
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
        received.map(|(len, from)| (len, Some(from)))
    }

    /// What a pod calls the sender.
    fn source(&self, from: Option<SocketAddr>) -> Result<SocketAddrV4, DropReason> {
        match (from, self.latest) {
            (None, _) => Ok(self.key.remote),
            (Some(SocketAddr::V4(from)), Some(latest)) if from == latest.to => Ok(latest.remote),
            (Some(SocketAddr::V4(from)), _) => self.config.source(self.key.protocol, from),
            (Some(SocketAddr::V6(_)), _) => Err(DropReason::EgressFamily),
        }
    }

    /// Whether a datagram keeps its flow in use. Of a mapping that is for those to whom the pod has
    /// sent last, and not for strangers (RFC 4787 section 4.3).
    fn is_use(&self, from: Option<SocketAddr>) -> bool {
        from.is_none_or(|from| {
            self.latest
                .is_some_and(|latest| *latest.to.ip() == from.ip())
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
        let at = HEADROOM
            + v4::HEADER_LEN
            + if flow.key.protocol == Protocol::Udp {
                UDP_HEADER_LEN
            } else {
                0
            };
        let mut read = Read::default();
        for _ in 0..READS {
            if !*readable || out.is_full() {
                break;
            }
            match flow.next(host, &mut self.storage[at..]) {
                Ok((len, from)) => match flow.source(from) {
                    Ok(remote) => {
                        let key = Key { remote, ..flow.key };
                        let packet_len = at + len.min(v4::MAX_LEN) - HEADROOM;
                        if self.send(key, packet_len, out) {
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
        let len = v4::HEADER_LEN + UDP_HEADER_LEN + payload.len();
        if len > v4::MAX_LEN {
            return Err(DropReason::EgressMalformed);
        }
        let at = HEADROOM + v4::HEADER_LEN + UDP_HEADER_LEN;
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
        let protocol = match key.protocol {
            Protocol::Ping => IpProtocol::Icmp,
            Protocol::Tcp | Protocol::Udp => IpProtocol::Udp,
        };
        let ends = (key.remote, key.pod);
        write_ip(packet, protocol, ends, self.ident);
        let payload = &mut packet[v4::HEADER_LEN..];
        let checksum = if protocol == IpProtocol::Icmp {
            if !answer(payload, key.pod.port()) {
                return false;
            }
            Checksum::Unknown
        } else {
            write_udp(payload, ends);
            Checksum::Partial {
                start: v4::HEADER_LEN as u16,
                offset: transport::Protocol::Udp.checksum_offset() as u16,
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

pub(super) fn write_ip(
    packet: &mut [u8],
    protocol: IpProtocol,
    (from, to): (SocketAddrV4, SocketAddrV4),
    ident: u16,
) {
    let header = v4::Header {
        dscp: 0,
        total_len: packet.len() as u16,
        ident,
        dont_fragment: false,
        ttl: v4::DEFAULT_TTL,
        protocol,
        source: *from.ip(),
        destination: *to.ip(),
    };
    packet[..v4::HEADER_LEN].copy_from_slice(&header.to_bytes());
}

/// Writes a header whose checksum is that of the pseudo header.
pub(super) fn write_udp(datagram: &mut [u8], (from, to): (SocketAddrV4, SocketAddrV4)) {
    let len = datagram.len() as u16;
    let addresses = [from.ip().octets(), to.ip().octets()];
    let pseudo = checksum::add(
        checksum::sum(addresses.as_flattened()),
        checksum::add(u16::from(u8::from(IpProtocol::Udp)), len),
    );
    let mut header = UdpPacket::new_unchecked(datagram);
    header.set_src_port(from.port());
    header.set_dst_port(to.port());
    header.set_len(len);
    header.set_checksum(pseudo);
}

/// Makes an echo reply from the host one that a pod waits for; false if it is none.
fn answer(message: &mut [u8], ident: u16) -> bool {
    let Ok(mut echo) = Icmpv4Packet::new_checked(message) else {
        return false;
    };
    if echo.msg_type() != Icmpv4Message::EchoReply {
        return false;
    }
    // The host's socket has a number of its own.
    echo.set_echo_ident(ident);
    echo.fill_checksum();
    true
}
