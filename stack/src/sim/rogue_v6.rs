//! What a pod must not do in IPv6: the twin of what a [`super::rogue::Rogue`] does in IPv4.

use std::net::Ipv6Addr;

use muslin_encap::ip::{checksum, v6};
use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};
use smoltcp::wire::{EthernetAddress, IpProtocol};

use super::device::{Assigned, Identity, Sent};
use super::forge;
use crate::datapath::frame;
use crate::datapath::ndp::{self, Flags};

const IPV6: [u8; 2] = [0x86, 0xdd];
/// A MAC address that is not its own.
const FOREIGN: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0xff, 0xff]);
/// Addresses that a scan asks for.
const SCANNED: u16 = 40;
/// Frames of a flood.
const FLOOD: usize = 300;
/// Where mDNS is heard, which is no pod's.
const GROUP: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);
/// Options that say nothing, in front of more of their kind and in front of ICMPv6.
const OPTIONS: [u8; 8] = [60, 0, 1, 4, 0, 0, 0, 0];
const LAST_OPTIONS: [u8; 8] = [58, 0, 1, 4, 0, 0, 0, 0];

/// What there is in front of UDP.
const UDP_OPTIONS: [u8; 8] = [17, 0, 1, 4, 0, 0, 0, 0];
/// The trick that is about virtio-net headers.
const LIES: u8 = 10;
/// From and to where it sends datagrams and segments, which nobody expects.
const PORTS: [u8; 4] = [0x4e, 0x20, 0x4e, 0x21];
/// Bytes of a superpacket's payload, and of each of its segments.
const LONG: usize = 3_000;
const SEGMENT: u16 = 600;

/// A pod's own addresses, and those of its victim and its gateway.
struct Scene {
    mac: EthernetAddress,
    gateway_mac: EthernetAddress,
    own: Ipv6Addr,
    gateway: Ipv6Addr,
    victim: Ipv6Addr,
    identity: Identity,
}

/// The frames of a trick, if the pod has IPv6.
pub(super) fn trick(
    assigned: &Assigned,
    trick: u8,
    victim: Ipv6Addr,
    identity: Identity,
) -> Vec<Sent> {
    let Some((net, gateway)) = assigned.ipv6 else {
        return Vec::new();
    };
    let scene = Scene {
        mac: assigned.mac,
        gateway_mac: assigned.gateway_mac,
        own: net.addr(),
        gateway,
        victim,
        identity: Identity {
            // Another ping than that of IPv4.
            ping: identity.ping | 1 << 40,
            ..identity
        },
    };
    if trick == LIES {
        return [scene.lies(), scene.oddities()].concat();
    }
    scene.frames(trick).into_iter().map(Sent::from).collect()
}

impl Scene {
    fn frames(&self, trick: u8) -> Vec<Vec<u8>> {
        let routed = |packet: &[u8]| vec![self.frame(self.mac, self.gateway_mac, packet)];
        let all = ndp::multicast_mac(ndp::ALL_NODES);
        match trick {
            0 => routed(&self.ping(self.victim, 64, &[])),
            1 => vec![self.frame(FOREIGN, all, &self.ping(self.own, 64, &[]))],
            2 => vec![self.claim(self.gateway)],
            3 => vec![self.claim(self.victim)],
            4 => vec![self.frame(self.mac, all, &self.advertisement(134, &LAST_OPTIONS, 60))],
            5 => routed(&self.ping(self.own, 64, &[])[..11]),
            6 => vec![self.frame(self.mac, all, &self.advertisement(137, &[], 58))],
            7 => routed(&self.ping(Ipv6Addr::LOCALHOST, 64, &[])),
            8 => routed(&self.ping(self.own, 1, &[])),
            9 => {
                let fragment = [58, 0, 0, 0, 0, 0, 0, 7];
                vec![self.frame(self.mac, all, &self.advertisement(134, &fragment, 44))]
            }
            11 => self.scan(),
            12 => vec![self.solicit(Ipv6Addr::UNSPECIFIED, self.victim)],
            // A source route (RFC 5095).
            13 => routed(&self.ping(self.own, 64, &[58, 2, 0, 1].repeat(6))),
            14 => {
                let options = [OPTIONS.repeat(9), LAST_OPTIONS.to_vec()].concat();
                routed(&self.ping(self.own, 64, &options))
            }
            15 => {
                // The first fragment ends before it is known what it is about (RFC 7112).
                let mut packet = self.ping(self.own, 64, &[60, 0, 0, 1, 0, 0, 0, 7]);
                packet.truncate(v6::HEADER_LEN + 8);
                self.set_head(&mut packet, 44);
                routed(&packet)
            }
            16 => {
                let mut frame = self.solicit(self.own, self.victim);
                let option = frame.len() - 7;
                frame[option] = 0;
                vec![frame]
            }
            17 => {
                let mut packet = self.ping(self.own, 64, &[]);
                packet[24..40].copy_from_slice(&GROUP.octets());
                v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN);
                let frame = self.frame(self.mac, ndp::multicast_mac(GROUP), &packet);
                vec![frame; FLOOD]
            }
            _ => vec![self.frame(self.mac, FOREIGN, &self.ping(self.own, 64, &[]))],
        }
    }

    /// Packets to the victim, each with virtio-net headers that no kernel makes of it.
    fn lies(&self) -> Vec<Sent> {
        let ping = self.ping(self.own, 64, &LAST_OPTIONS);
        let packets = [ping, self.segment(), self.datagram()];
        let mut lies = Vec::new();
        for (kind, packet) in packets.into_iter().enumerate() {
            let frame = self.frame(self.mac, self.gateway_mac, &packet);
            let headers = forge::headers(self.identity).into_iter();
            lies.extend(headers.enumerate().map(|(number, header)| {
                let mut frame = frame.clone();
                if kind == 0 {
                    // Each is another ping.
                    let at = frame.len() - Identity::LEN + 8;
                    frame[at] = number as u8 + 1;
                }
                Sent { frame, header }
            }));
        }
        lies
    }

    /// What a system may send, and few do: superpackets of TCP and UDP, this one with options in front, and
    /// a ping in fragments.
    fn oddities(&self) -> Vec<Sent> {
        let superpacket = |mut packet: Vec<u8>, kind, at: usize, field: u16| {
            let offset = at + usize::from(field);
            let partial = pseudo_header_sum(&packet, at).to_be_bytes();
            packet[offset..offset + 2].copy_from_slice(&partial);
            let header = Header {
                checksum: Checksum::Partial {
                    start: (frame::HEADER_LEN + at) as u16,
                    offset: field,
                },
                gso: Some(Gso {
                    kind,
                    size: SEGMENT,
                    ecn: false,
                }),
                hdr_len: 0,
            };
            let frame = self.frame(self.mac, self.gateway_mac, &packet);
            let header = header.to_bytes();
            Sent { frame, header }
        };
        let options = v6::HEADER_LEN + UDP_OPTIONS.len();
        let whole = self.ping(self.own, 64, &[]);
        let (head, message) = whole.split_at(v6::HEADER_LEN);
        let (first, last) = message.split_at(16);
        let fragment = |header: [u8; 8], part: &[u8]| {
            let mut packet = [head, &header, part].concat();
            self.set_head(&mut packet, 44);
            Sent::from(self.frame(self.mac, self.gateway_mac, &packet))
        };
        vec![
            superpacket(self.segment(), GsoKind::TcpV6, v6::HEADER_LEN, 16),
            superpacket(self.datagram(), GsoKind::Udp, options, 6),
            fragment([58, 0, 0, 1, 0, 0, 0, 9], first),
            fragment([58, 0, 0, 16, 0, 0, 0, 9], last),
        ]
    }

    /// A long segment of no connection.
    fn segment(&self) -> Vec<u8> {
        let head = [&PORTS[..], &[0; 8], &[0x50, 0x10, 0x10, 0, 0, 0, 0, 0]].concat();
        let segment = [head, self.identity.payload(LONG)].concat();
        self.packet((self.own, self.victim), 64, (6, &[]), &segment)
    }

    /// A long datagram behind options.
    fn datagram(&self) -> Vec<u8> {
        let [high, low] = (8 + LONG as u16).to_be_bytes();
        let head = [&PORTS[..], &[high, low, 0, 0]].concat();
        let datagram = [head, self.identity.payload(LONG)].concat();
        let ends = (self.own, self.victim);
        self.packet(ends, 64, (60, &UDP_OPTIONS), &datagram)
    }

    /// Solicitations and pings for addresses that nobody has.
    fn scan(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for number in 0..SCANNED {
            let nobody = Ipv6Addr::from_bits(self.own.to_bits() + 0x100 + u128::from(number));
            frames.push(self.solicit(self.own, nobody));
            let mut packet = self.ping(self.own, 64, &[]);
            packet[24..40].copy_from_slice(&nobody.octets());
            v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN);
            frames.push(self.frame(self.mac, self.gateway_mac, &packet));
        }
        frames
    }

    fn frame(&self, from: EthernetAddress, to: EthernetAddress, packet: &[u8]) -> Vec<u8> {
        [&to.0[..], &from.0, &IPV6, packet].concat()
    }

    /// Says to all that an address is at its own MAC address.
    fn claim(&self, address: Ipv6Addr) -> Vec<u8> {
        let to = (ndp::multicast_mac(ndp::ALL_NODES), ndp::ALL_NODES);
        let flags = Flags {
            router: true,
            override_: true,
            ..Flags::default()
        };
        ndp::write_advertisement((self.mac, self.own), address, to, flags).to_vec()
    }

    fn solicit(&self, source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
        let mut frame = ndp::write_solicitation((self.mac, source), target, None).to_vec();
        if source.is_unspecified() {
            // Who has no address yet says not where it is (RFC 4861 section 4.3).
            frame.truncate(frame.len() - 8);
            let (_, packet) = frame.split_at_mut(14);
            v6::set_payload_len(packet, 24);
            v6::fill_icmp_checksum(packet, v6::HEADER_LEN);
        }
        frame
    }

    /// A ping of the victim, with extension headers.
    fn ping(&self, source: Ipv6Addr, hop_limit: u8, headers: &[u8]) -> Vec<u8> {
        let data = self.identity.payload(Identity::LEN);
        let echo = [&[128, 0, 0, 0, 0, 7, 0, 1][..], &data].concat();
        let first = match headers {
            [58, 2, ..] => 43,
            [] => 58,
            _ => 60,
        };
        self.packet((source, self.victim), hop_limit, (first, headers), &echo)
    }

    /// A router advertisement, or a redirect, to all.
    fn advertisement(&self, kind: u8, headers: &[u8], first: u8) -> Vec<u8> {
        let mut message = [0; 40];
        message[0] = kind;
        let ends = (self.own, ndp::ALL_NODES);
        self.packet(ends, 255, (first, headers), &message)
    }

    fn packet(
        &self,
        (source, destination): (Ipv6Addr, Ipv6Addr),
        hop_limit: u8,
        (first, headers): (u8, &[u8]),
        message: &[u8],
    ) -> Vec<u8> {
        let header = v6::Header {
            traffic_class: 0,
            flow_label: 0,
            payload_len: (headers.len() + message.len()) as u16,
            next_header: IpProtocol::from(first),
            hop_limit,
            source,
            destination,
        };
        let mut packet = [&header.to_bytes()[..], headers, message].concat();
        if let [128..=255, ..] = message {
            v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN + headers.len());
        }
        packet
    }

    /// Gives a packet another first header, and its length.
    fn set_head(&self, packet: &mut [u8], first: u8) {
        v6::set_next_header(packet, IpProtocol::from(first));
        let len = packet.len() - v6::HEADER_LEN;
        v6::set_payload_len(packet, len as u16);
    }
}

/// What a kernel leaves in a checksum that a device is to finish: the sum of the pseudo header (RFC 8200
/// section 8.1) of the upper layer that begins `at` bytes into a packet.
fn pseudo_header_sum(packet: &[u8], at: usize) -> u16 {
    let protocol = if at == v6::HEADER_LEN { 6 } else { 17 };
    let lengths = checksum::add((packet.len() - at) as u16, protocol);
    checksum::add(checksum::sum(&packet[8..v6::HEADER_LEN]), lengths)
}
