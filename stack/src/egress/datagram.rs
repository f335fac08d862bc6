//! Datagrams and echo requests of pods: each flow is a connected socket, and what comes from it goes
//! to the pod from the address that the pod knows.

use std::net::SocketAddrV4;

use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::checksum;
use muslin_encap::virtio::{Checksum, Header};
use smoltcp::time::Instant;
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Packet, UdpPacket};

use super::{FlowId, FlowKey, Host, HostError, Pods, Protocol};
use crate::drops::DropReason;

pub(super) const IP_LEN: usize = 20;
/// Of UDP and of ICMP echo.
pub(super) const HEADER_LEN: usize = 8;
const MAX_LEN: usize = 65_535;
const TTL: u8 = 64;
/// Where UDP's checksum is, from the header's start.
const UDP_CHECKSUM: u16 = 6;
/// Datagrams read from one socket before the others have their turn.
const READS: usize = 64;

/// Where datagrams for pods are made.
pub(super) struct Datagrams {
    storage: Box<[u8]>,
    /// Identification of the last one; one that is too long for a pod is cut into fragments.
    ident: u16,
}

/// How reading from a socket ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Read {
    /// Datagrams that went to the pod.
    pub(super) count: usize,
    /// Bytes of their payload.
    pub(super) bytes: usize,
    /// What is wrong, if the socket was not just empty or the turn over.
    pub(super) error: Option<HostError>,
}

impl Datagrams {
    pub(super) fn new() -> Self {
        Self {
            storage: vec![0; HEADROOM + MAX_LEN].into_boxed_slice(),
            ident: 0,
        }
    }

    /// Sends a pod what its flow's socket has, and clears `readable` if there is no more.
    pub(super) fn read(
        &mut self,
        now: Instant,
        (id, key): (FlowId, FlowKey),
        readable: &mut bool,
        host: &mut impl Host,
        pods: &mut impl Pods,
    ) -> Read {
        // An echo reply comes with its header.
        let at = HEADROOM
            + IP_LEN
            + if key.protocol == Protocol::Udp {
                HEADER_LEN
            } else {
                0
            };
        let (mut count, mut bytes) = (0, 0);
        let mut error = None;
        for _ in 0..READS {
            if !*readable {
                break;
            }
            match host.read(id, &mut self.storage[at..]) {
                Ok(len) => {
                    let packet_len = at + len.min(MAX_LEN) - HEADROOM;
                    if self.send(now, key, packet_len, pods) {
                        count += 1;
                        bytes += len;
                    }
                }
                Err(HostError::WouldBlock) => *readable = false,
                Err(other) => {
                    error = Some(other);
                    break;
                }
            }
        }
        Read {
            count,
            bytes,
            error,
        }
    }

    /// Sends a pod a datagram from the host's side of its flow.
    pub(super) fn deliver(
        &mut self,
        now: Instant,
        key: FlowKey,
        payload: &[u8],
        pods: &mut impl Pods,
    ) -> Result<(), DropReason> {
        let len = IP_LEN + HEADER_LEN + payload.len();
        if len > MAX_LEN {
            return Err(DropReason::EgressMalformed);
        }
        let at = HEADROOM + IP_LEN + HEADER_LEN;
        self.storage[at..at + payload.len()].copy_from_slice(payload);
        self.send(now, key, len, pods);
        Ok(())
    }

    /// Sends the packet of `len` bytes whose payload is in the storage.
    fn send(&mut self, now: Instant, key: FlowKey, len: usize, pods: &mut impl Pods) -> bool {
        let Ok(mut packet) = PacketBuf::new(&mut self.storage, HEADROOM, len) else {
            return false;
        };
        self.ident = self.ident.wrapping_add(1);
        let protocol = match key.protocol {
            Protocol::Ping => IpProtocol::Icmp,
            Protocol::Tcp | Protocol::Udp => IpProtocol::Udp,
        };
        let ends = (key.remote, key.pod);
        write_ip(packet.as_mut_slice(), protocol, ends, self.ident);
        let payload = &mut packet.as_mut_slice()[IP_LEN..];
        if protocol == IpProtocol::Icmp {
            if !answer(payload, key.pod.port()) {
                return false;
            }
            // The router has counted it if it is lost.
            let _ = pods.send(now, &mut packet);
            return true;
        }
        write_udp(payload, ends);
        let _ = pods.send(
            now,
            &mut packet.with_offload(Header {
                checksum: Checksum::Partial {
                    start: IP_LEN as u16,
                    offset: UDP_CHECKSUM,
                },
                ..Header::default()
            }),
        );
        true
    }
}

pub(super) fn write_ip(
    packet: &mut [u8],
    protocol: IpProtocol,
    (from, to): (SocketAddrV4, SocketAddrV4),
    ident: u16,
) {
    let len = packet.len() as u16;
    packet[..IP_LEN].fill(0);
    let mut header = Ipv4Packet::new_unchecked(packet);
    header.set_version(4);
    header.set_header_len(IP_LEN as u8);
    header.set_total_len(len);
    header.set_ident(ident);
    header.set_hop_limit(TTL);
    header.set_next_header(protocol);
    header.set_src_addr(*from.ip());
    header.set_dst_addr(*to.ip());
    header.fill_checksum();
}

/// Writes a header whose checksum is that of the pseudo header.
pub(super) fn write_udp(datagram: &mut [u8], (from, to): (SocketAddrV4, SocketAddrV4)) {
    let len = datagram.len() as u16;
    let addresses = [from.ip().octets(), to.ip().octets()].concat();
    let pseudo = checksum::add(
        checksum::sum(&addresses),
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
