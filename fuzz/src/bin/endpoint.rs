//! A pod that lives in a process (`muslin_stack::endpoint`), as its node's frames and those of a node
//! that lies come to it. The oracle is a model of what the pod may know, and etherparse:
//!
//! * it takes an address for its gateway's only from ARP or neighbour discovery that says so, and the
//!   last one counts, unless an advertisement leaves what is known;
//! * it answers ARP and solicitations for its own address alone, and whole echo requests to it with a
//!   right checksum: with the same payload, to the gateway, with right lengths and checksums;
//! * what it passes on is an IP packet for its address, from an address that a host can have;
//! * an error that it reports is a packet from its address that quotes the offender, and there is none
//!   about errors and fragments, and none before the gateway is known.
#![cfg_attr(fuzzing, no_main)]

use std::net::{Ipv4Addr, Ipv6Addr};

use arbitrary::{Result, Unstructured};
use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Icmpv6Type, NetHeaders, PacketBuilder, PacketHeaders,
    TransportHeader,
};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::v6;
use muslin_encap::offload::virtio::{Checksum, Header};
use muslin_fuzz::{Seed, for_each_event};
use muslin_stack::addresses::Addresses;
use muslin_stack::datapath::frame;
use muslin_stack::datapath::icmp::IcmpError;
use muslin_stack::datapath::ndp::{self, Flags};
use muslin_stack::endpoint::{Endpoint, Taken};
use muslin_stack::{Duration, Instant};
use smoltcp::wire::{ArpOperation, EthernetAddress};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 2);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 1);
const MAC: EthernetAddress = EthernetAddress([0x0a, 0x58, 10, 244, 1, 2]);

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        // The gateway tells where it is, and asks where the pod is; others do.
        &[0, 0, 0, 1],
        &[0, 1, 0, 1],
        &[0, 0, 2, 1],
        // Echo requests: right, for another, with a wrong checksum, a fragment.
        &[1, 0, 0, 9],
        &[1, 1, 0, 9],
        &[1, 0, 1, 9],
        &[1, 0, 2, 9],
        // Datagrams, one with an unfinished checksum.
        &[2, 0, 0, 9],
        &[2, 0, 34, 9],
        // The gateway tells where it is, asks where the pod is, and others do, in IPv6.
        &[6, 0x0e, 1, 1],
        &[6, 1, 0, 1],
        &[6, 0x11, 0, 1],
        // Echo requests: right, for another, damaged, in pieces, behind options; a datagram.
        &[7, 0, 0, 9],
        &[7, 1, 0, 9],
        &[7, 0, 1, 9],
        &[7, 0, 2, 9],
        &[7, 0, 5, 9],
        &[7, 0, 0x80, 9],
        // An error about the last packet, time.
        &[4, 0],
        &[5, 1],
    ],
    inputs: 60_000,
    max_len: 300,
}

/// The addresses of events.
fn address(which: u8) -> Ipv4Addr {
    match which % 5 {
        0 => ADDRESS,
        1 => GATEWAY,
        2 => Ipv4Addr::new(10, 244, 2, 9),
        3 => Ipv4Addr::new(127, 0, 0, 1),
        _ => Ipv4Addr::BROADCAST,
    }
}

/// The addresses of events.
fn address_v6(which: u8) -> Ipv6Addr {
    match which % 7 {
        0 => ADDRESS_V6,
        1 => GATEWAY_V6,
        2 => Ipv6Addr::new(0xfd00, 0, 0, 2, 0, 0, 0, 9),
        3 => Ipv6Addr::LOCALHOST,
        4 => ndp::ALL_NODES,
        5 => Ipv6Addr::UNSPECIFIED,
        _ => Ipv4Addr::new(10, 244, 1, 2).to_ipv6_mapped(),
    }
}

const fn mac(which: u8) -> EthernetAddress {
    match which % 4 {
        0 => MAC,
        3 => EthernetAddress::BROADCAST,
        other => EthernetAddress([2, 0, 0, 0, 0, other]),
    }
}

struct Harness {
    endpoint: Endpoint,
    now: Instant,
    /// Where the gateway is said to be.
    gateway: Option<EthernetAddress>,
    /// Likewise in IPv6.
    gateway_v6: Option<EthernetAddress>,
    /// The last packet that was passed on.
    packet: Vec<u8>,
}

/// Runs the events that `data` stands for.
fn run(data: &[u8]) {
    let now = Instant::ZERO;
    let address = Addresses::with_ipv4(ADDRESS, Some(ADDRESS_V6));
    let gateway = Addresses::with_ipv4(GATEWAY, Some(GATEWAY_V6));
    let mut harness = Harness {
        endpoint: Endpoint::new(address, gateway, now).expect("there are both of each"),
        now,
        gateway: None,
        gateway_v6: None,
        packet: Vec::new(),
    };
    for_each_event(data, |input| harness.step(input));
}

impl Harness {
    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut byte = || input.arbitrary::<u8>();
        let plain = Header::default();
        match byte()? % 8 {
            0 => {
                let (what, target, source) = (byte()?, byte()?, byte()?);
                let operation = match what & 1 {
                    0 => ArpOperation::Reply,
                    _ => ArpOperation::Request,
                };
                let sender = (mac(source), address((what >> 1).wrapping_add(1)));
                let arp = frame::write_arp(operation, sender, (MAC, address(target)));
                self.hear_arp(operation, sender, address(target), &arp);
            }
            1 => {
                let (to, kind, len) = (byte()?, byte()?, byte()?);
                let frame = echo(address(to), address(kind >> 2), kind & 3, len);
                self.take(&frame, plain);
            }
            2 => {
                let (to, start, len) = (byte()?, byte()?, byte()?);
                let mut frame = Vec::new();
                PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], MAC.0)
                    .ipv4([10, 244, 2, 9], address(to).octets(), 9)
                    .udp(5000, 53)
                    .write(&mut frame, &vec![7; len.into()])
                    .expect("a vector grows");
                let checksum = Checksum::Partial {
                    start: start.into(),
                    offset: 6,
                };
                let unfinished = Header {
                    checksum,
                    ..Header::default()
                };
                self.take(&frame, if start > 0 { unfinished } else { plain });
            }
            3 => {
                let len = usize::from(byte()?).min(input.len());
                let frame = input.bytes(len)?.to_vec();
                self.take(&frame, plain);
            }
            4 => self.report(byte()?),
            6 => {
                let (what, target, source) = (byte()?, byte()?, byte()?);
                let sender = (mac(source), address_v6((what >> 4).wrapping_add(1)));
                let frame = neighbour(what, sender, address_v6(target));
                self.take(&frame, plain);
            }
            7 => {
                let (to, kind, len) = (byte()?, byte()?, byte()?);
                let frame = packet_v6(address_v6(to), address_v6(kind >> 3 & 7), kind, len);
                self.take(&frame, plain);
            }
            _ => self.now += Duration::from_millis(u64::from(byte()?) * 10),
        }
        Ok(())
    }

    fn hear_arp(
        &mut self,
        operation: ArpOperation,
        sender: (EthernetAddress, Ipv4Addr),
        target: Ipv4Addr,
        frame: &[u8],
    ) {
        if sender.1 == GATEWAY && sender.0.is_unicast() {
            self.gateway = Some(sender.0);
        }
        let is_asked = operation == ArpOperation::Request && target == ADDRESS;
        match self.through(frame, Header::default()) {
            Ok((Taken::Answer, answer)) => {
                assert!(is_asked, "it answers what it is not asked");
                let expected = frame::write_arp(ArpOperation::Reply, (MAC, ADDRESS), sender);
                assert_eq!(answer, expected);
            }
            taken => assert!(
                !is_asked && matches!(taken, Ok((Taken::Consumed, _))),
                "{taken:?}"
            ),
        }
        self.check_way();
    }

    /// Own packets go to where the gateway is.
    fn check_way(&self) {
        let is_known = self.gateway.is_some() && self.gateway_v6.is_some();
        assert_eq!(self.endpoint.has_gateway(), is_known);
        for (first, known, kind) in [
            (0x45, self.gateway, [8, 0]),
            (0x60, self.gateway_v6, [0x86, 0xdd]),
        ] {
            let mut storage = vec![first; HEADROOM + 40];
            let mut packet = PacketBuf::new(&mut storage, HEADROOM, 40).expect("there is room");
            let wrapped = self.endpoint.wrap(&mut packet);
            assert_eq!(wrapped.is_ok(), known.is_some());
            if let Some(gateway) = known {
                let header = [&gateway.0[..], &MAC.0, &kind].concat();
                assert_eq!(packet.as_slice()[..14], header);
            }
        }
    }

    fn through(
        &mut self,
        frame: &[u8],
        offload: Header,
    ) -> std::result::Result<(Taken, Vec<u8>), muslin_stack::drops::DropReason> {
        let mut storage = [vec![0; HEADROOM], frame.to_vec()].concat();
        let packet = PacketBuf::new(&mut storage, HEADROOM, frame.len()).expect("there is room");
        let mut packet = packet.with_offload(offload);
        let taken = self.endpoint.take(&mut packet)?;
        Ok((taken, packet.as_slice().to_vec()))
    }

    fn take(&mut self, frame: &[u8], offload: Header) {
        match self.through(frame, offload) {
            Ok((Taken::Answer, answer)) if is_v6(frame) => self.check_answer_v6(frame, &answer),
            Ok((Taken::Answer, answer)) => self.check_answer(frame, &answer),
            Ok((Taken::Packet, packet)) if is_v6(frame) => {
                let (ip, _) = etherparse::Ipv6Header::from_slice(&packet).expect("a valid header");
                assert_eq!(ip.destination, ADDRESS_V6.octets(), "for another");
                assert_eq!(packet.len(), 40 + usize::from(ip.payload_length));
                let source = Ipv6Addr::from(ip.source);
                let is_host = !source.is_loopback() && !source.is_multicast();
                assert!(is_host && !source.is_unspecified(), "from {source}");
                assert_eq!(source.to_ipv4_mapped(), None);
                self.packet = packet;
            }
            Ok((Taken::Consumed, _)) if is_v6(frame) => {
                self.learn_v6(frame);
            }
            Ok((Taken::Packet, packet)) => {
                let (ip, _) = etherparse::Ipv4Header::from_slice(&packet).expect("a valid header");
                assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                assert_eq!(ip.destination, ADDRESS.octets(), "for another");
                let source = Ipv4Addr::from(ip.source);
                assert!(
                    !source.is_loopback() && !source.is_broadcast(),
                    "from {source}"
                );
                self.packet = packet;
            }
            Ok((Taken::Consumed, _)) => {
                // ARP, of which the model knows nothing here.
                assert_eq!(frame[12..14], [8, 6]);
                self.learn(frame);
            }
            Err(_) => {}
        }
    }

    /// Takes ARP that came as bytes into the model.
    fn learn(&mut self, bytes: &[u8]) {
        let sender = EthernetAddress::from_bytes(&bytes[22..28]);
        if bytes[28..32] == GATEWAY.octets() && sender.is_unicast() {
            self.gateway = Some(sender);
        }
        self.check_way();
    }

    fn check_answer(&mut self, frame: &[u8], answer: &[u8]) {
        if frame[12..14] == [8, 6] {
            return self.learn(frame);
        }
        let asked = PacketHeaders::from_ethernet_slice(frame).expect("it was understood");
        let headers = PacketHeaders::from_ethernet_slice(answer).expect("a valid frame");
        assert_eq!(
            Some(&answer[..6]),
            self.gateway.as_ref().map(|it| &it.0[..])
        );
        let (Some(NetHeaders::Ipv4(ip, _)), Some(NetHeaders::Ipv4(to, _))) =
            (&headers.net, &asked.net)
        else {
            panic!("it is no ping");
        };
        assert_eq!((ip.source, ip.destination), (to.destination, to.source));
        assert_eq!(ip.source, ADDRESS.octets());
        assert_eq!(ip.header_checksum, ip.calc_header_checksum());
        assert!(
            !to.more_fragments && to.fragment_offset.value() == 0,
            "of a part"
        );
        let Some(TransportHeader::Icmpv4(echo)) = &headers.transport else {
            panic!("it is no ping");
        };
        let Icmpv4Type::EchoReply(reply) = echo.icmp_type else {
            panic!("it is no reply");
        };
        let Some(TransportHeader::Icmpv4(request)) = &asked.transport else {
            panic!("nobody asked");
        };
        assert_eq!(request.icmp_type, Icmpv4Type::EchoRequest(reply));
        let payload = headers.payload.slice();
        assert_eq!(payload, asked.payload.slice());
        assert_eq!(echo.checksum, echo.icmp_type.calc_checksum(payload));
        assert_eq!(request.checksum, request.icmp_type.calc_checksum(payload));
    }

    /// Takes neighbour discovery into the model, whose message is valid, and returns its kind and target.
    fn learn_v6(&mut self, frame: &[u8]) -> (u8, Ipv6Addr) {
        let packet = &frame[14..54 + usize::from(u16::from_be_bytes([frame[18], frame[19]]))];
        let upper = v6::upper_layer(packet).expect("it was found");
        let message = &packet[upper.offset..];
        assert_eq!((upper.protocol, packet[7], upper.fragment), (58, 255, None));
        let address =
            |bytes: &[u8]| Ipv6Addr::from(*bytes.first_chunk::<16>().expect("an address"));
        let source = address(&packet[8..]);
        let kind = message[0];
        if kind == 133 {
            return (kind, source);
        }
        let target = address(&message[8..]);
        let mut options = &message[24..];
        let wanted = if kind == 135 { 1 } else { 2 };
        let mut mac = None;
        while let [option, len, rest @ ..] = options {
            if (*option, *len) == (wanted, 1) && mac.is_none() {
                mac = Some(EthernetAddress::from_bytes(&rest[..6]));
            }
            options = &options[usize::from(*len) * 8..];
        }
        let is_told = match kind {
            135 => source == GATEWAY_V6,
            136 => {
                let replaces = message[4] & 0x20 != 0 || self.gateway_v6.is_none();
                target == GATEWAY_V6 && replaces
            }
            other => panic!("no message of neighbour discovery: {other}"),
        };
        if is_told && let Some(mac) = mac.filter(EthernetAddress::is_unicast) {
            self.gateway_v6 = Some(mac);
        }
        self.check_way();
        (kind, target)
    }

    fn check_answer_v6(&mut self, frame: &[u8], answer: &[u8]) {
        let headers = PacketHeaders::from_ethernet_slice(answer).expect("a valid frame");
        let (Some(NetHeaders::Ipv6(ip, _)), Some(TransportHeader::Icmpv6(message))) =
            (&headers.net, &headers.transport)
        else {
            panic!("it answers nothing");
        };
        let payload = headers.payload.slice();
        let sum = message
            .icmp_type
            .calc_checksum(ip.source, ip.destination, payload);
        assert_eq!(Ok(message.checksum), sum);
        assert_eq!(ip.source, ADDRESS_V6.octets());
        let asker: [u8; 16] = *frame[22..].first_chunk().expect("a source");
        match message.icmp_type {
            Icmpv6Type::NeighborAdvertisement(told) => {
                let (kind, target) = self.learn_v6(frame);
                assert_eq!(
                    (kind, target),
                    (135, ADDRESS_V6),
                    "it answers what it is not asked"
                );
                let nobody = asker == [0; 16];
                let to = if nobody {
                    ndp::ALL_NODES.octets()
                } else {
                    asker
                };
                assert_eq!((ip.destination, ip.hop_limit), (to, 255));
                assert_eq!(
                    (told.router, told.solicited, told.r#override),
                    (false, !nobody, true)
                );
                let own = [&ADDRESS_V6.octets()[..], &[2, 1], &MAC.0].concat();
                assert_eq!(payload, own);
                assert_eq!(answer[0] & 1 != 0, nobody);
            }
            Icmpv6Type::EchoReply(reply) => {
                assert_eq!(
                    Some(&answer[..6]),
                    self.gateway_v6.as_ref().map(|it| &it.0[..])
                );
                assert_eq!(ip.destination, asker);
                assert_eq!(frame[38..54], ADDRESS_V6.octets());
                let packet =
                    &frame[14..54 + usize::from(u16::from_be_bytes([frame[18], frame[19]]))];
                let upper = v6::upper_layer(packet).expect("it was found");
                assert!(upper.fragment.is_none_or(|it| it.is_atomic()), "of a part");
                let request = &packet[upper.offset..];
                assert_eq!(request[..2], [128, 0], "nobody asked");
                assert!(v6::has_icmp_checksum(packet, upper.offset));
                let ends = [reply.id.to_be_bytes(), reply.seq.to_be_bytes()].concat();
                assert_eq!((&request[4..8], &request[8..]), (&ends[..], payload));
            }
            other => panic!("{other:?}"),
        }
    }

    /// Somebody is told that the last packet has found nobody.
    fn report(&mut self, which: u8) {
        let error = match which % 2 {
            0 => IcmpError::PortUnreachable,
            _ => IcmpError::HostUnreachable,
        };
        let mut storage = vec![0; HEADROOM + 1500];
        let mut packet = PacketBuf::new(&mut storage, HEADROOM, 0).expect("there is room");
        let offender = self.packet.clone();
        if !self
            .endpoint
            .report(self.now, error, &offender, &mut packet)
        {
            return;
        }
        let frame = packet.as_slice();
        if offender[0] >> 4 == 6 {
            return self.check_error_v6(frame, &offender);
        }
        let gateway = self.gateway.expect("it cannot be sent");
        assert_eq!(frame[..6], gateway.0);
        assert!(frame.len() <= 14 + 576, "RFC 1812 section 4.3.2.3");
        let headers = PacketHeaders::from_ethernet_slice(frame).expect("a valid frame");
        let Some(NetHeaders::Ipv4(ip, _)) = headers.net else {
            panic!("it is no IPv4");
        };
        assert_eq!(ip.source, ADDRESS.octets());
        assert_eq!(ip.destination[..], offender[12..16]);
        let quoted = headers.payload.slice();
        assert!(
            !quoted.is_empty() && offender.starts_with(quoted),
            "another packet"
        );
    }

    fn check_error_v6(&self, frame: &[u8], offender: &[u8]) {
        let gateway = self.gateway_v6.expect("it cannot be sent");
        assert_eq!(frame[..6], gateway.0);
        assert!(frame.len() <= 14 + 1280, "RFC 4443 section 2.4 c");
        let headers = PacketHeaders::from_ethernet_slice(frame).expect("a valid frame");
        let (Some(NetHeaders::Ipv6(ip, _)), Some(TransportHeader::Icmpv6(error))) =
            (headers.net, headers.transport)
        else {
            panic!("it is no error");
        };
        assert!(matches!(
            error.icmp_type,
            Icmpv6Type::DestinationUnreachable(_)
        ));
        assert_eq!(ip.source, ADDRESS_V6.octets());
        assert_eq!(ip.destination[..], offender[8..24]);
        let quoted = headers.payload.slice();
        assert!(offender.starts_with(quoted), "another packet");
        let sum = error
            .icmp_type
            .calc_checksum(ip.source, ip.destination, quoted);
        assert_eq!(Ok(error.checksum), sum);
    }
}

fn is_v6(frame: &[u8]) -> bool {
    frame[12..14] == [0x86, 0xdd]
}

/// A message about a neighbour: what it is, and how an advertisement has its flags; those of others may
/// be damaged.
fn neighbour(what: u8, sender: (EthernetAddress, Ipv6Addr), target: Ipv6Addr) -> Vec<u8> {
    let flags = Flags {
        router: what & 2 != 0,
        solicited: what & 4 != 0,
        override_: what & 8 != 0,
    };
    let frame = match what & 1 {
        0 => ndp::write_advertisement(sender, target, (MAC, ADDRESS_V6), flags),
        _ => ndp::write_solicitation(sender, target, (what & 2 != 0).then_some(MAC)),
    };
    let mut frame = frame.to_vec();
    if what & 1 != 0 && sender.1.is_unspecified() {
        // Who has no address says nothing of its own.
        frame.truncate(78);
        v6::set_payload_len(&mut frame[14..], 24);
        v6::fill_icmp_checksum(&mut frame[14..], 40);
    }
    if what & 0x0d == 0x0d {
        frame[21] = 64;
    }
    frame
}

/// An echo request to the pod's interface, or a datagram; the kind says what is wrong with it.
fn packet_v6(to: Ipv6Addr, from: Ipv6Addr, kind: u8, len: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let from = if from == ADDRESS_V6 { GATEWAY_V6 } else { from };
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], MAC.0);
    let builder = builder.ipv6(from.octets(), to.octets(), 9);
    let payload = vec![5; len.into()];
    let written = match kind & 0x80 {
        0 => builder
            .icmpv6_echo_request(7, 1)
            .write(&mut bytes, &payload),
        _ => builder.udp(5000, 53).write(&mut bytes, &payload),
    };
    written.expect("a vector grows");
    let protocol = bytes[20];
    let header = match kind & 7 {
        1 => {
            bytes[56] ^= 1;
            return bytes;
        }
        2 => (44, [protocol, 0, 0, 1, 0, 0, 0, 7]),
        3 => (44, [protocol, 0, 0, 8, 0, 0, 0, 7]),
        4 => (44, [protocol, 0, 0, 0, 0, 0, 0, 7]),
        5 => (60, [protocol, 0, 1, 4, 0, 0, 0, 0]),
        6 => (60, [protocol, 0, 0x81, 4, 0, 0, 0, 0]),
        7 => (43, [protocol, 0, 0, 0, 0, 0, 0, 0]),
        _ => return bytes,
    };
    bytes.splice(54..54, header.1);
    let len = (bytes.len() - 54) as u16;
    v6::set_payload_len(&mut bytes[14..], len);
    v6::set_next_header(&mut bytes[14..], header.0.into());
    bytes
}

/// An echo request to the pod's interface; the kind says whether its checksum is wrong (1), or whether
/// it is a fragment (2, 3).
fn echo(to: Ipv4Addr, from: Ipv4Addr, kind: u8, len: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let from = if from == ADDRESS { GATEWAY } else { from };
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], MAC.0)
        .ipv4(from.octets(), to.octets(), 9)
        .icmpv4_echo_request(IcmpEchoHeader { id: 7, seq: 1 }.id, 1)
        .write(&mut bytes, &vec![5; len.into()])
        .expect("a vector grows");
    match kind {
        1 => bytes[36] ^= 1,
        2 | 3 => {
            let ip = bytes[14..34].try_into().expect("a header");
            let mut ip: [u8; 20] = ip;
            ip[6] = if kind == 2 { 0x20 } else { 0 };
            ip[7] = u8::from(kind == 3);
            ip[10..12].fill(0);
            let (header, _) = etherparse::Ipv4Header::from_slice(&ip).expect("a header");
            ip[10..12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
            bytes[14..34].copy_from_slice(&ip);
        }
        _ => {}
    }
    bytes
}

fn seeds() -> Vec<Seed> {
    vec![
        ("gateway", vec![0, 0, 0, 1, 0, 1, 0, 1, 0, 0, 2, 2]),
        ("gateway-moves", vec![0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3]),
        ("ping", vec![0, 0, 0, 1, 1, 0, 4, 9, 1, 1, 4, 9, 1, 0, 8, 0]),
        (
            "ping-wrong",
            vec![0, 0, 0, 1, 1, 0, 5, 9, 1, 0, 6, 9, 1, 0, 7, 9],
        ),
        ("ping-without-gateway", vec![1, 0, 4, 9]),
        ("datagram", vec![2, 0, 0, 9, 0, 0, 0, 1, 4, 0, 4, 1]),
        (
            "unfinished",
            vec![0, 0, 0, 1, 2, 0, 34, 9, 4, 0, 2, 0, 20, 9],
        ),
        ("martian", vec![0, 0, 0, 1, 1, 0, 12, 9, 1, 0, 16, 9, 4, 0]),
        (
            "gateway-v6",
            vec![
                0, 0, 0, 1, 6, 0x0e, 1, 1, 6, 1, 0, 1, 6, 0x0e, 1, 2, 6, 6, 1, 1, 6, 0x0e, 2, 1,
            ],
        ),
        (
            "solicitations-v6",
            // From another, of its own, from nobody, for another, and one that was passed on.
            vec![
                6, 0x11, 0, 1, 6, 0x13, 0, 2, 6, 0x41, 0, 1, 6, 0x11, 2, 1, 6, 0x1d, 0, 1, 6, 0x1e,
                1, 3,
            ],
        ),
        (
            "ping-v6",
            vec![
                6, 0x0e, 1, 1, 7, 0, 0x10, 9, 7, 1, 0x10, 9, 7, 0, 0x14, 0, 7, 0, 0x15, 9,
            ],
        ),
        (
            "ping-v6-wrong",
            vec![
                6, 0x0e, 1, 1, 7, 0, 0x11, 9, 7, 0, 0x12, 9, 7, 0, 0x13, 9, 7, 0, 0x16, 9, 7, 0,
                0x17, 9,
            ],
        ),
        (
            "datagram-v6",
            vec![
                6, 0x0e, 1, 1, 7, 0, 0x90, 9, 4, 0, 4, 1, 7, 0, 0x92, 9, 4, 0, 7, 0, 0x93, 9, 4, 0,
            ],
        ),
        (
            "martian-v6",
            vec![
                6, 0x0e, 1, 1, 7, 0, 0x98, 9, 7, 0, 0xa0, 9, 7, 0, 0xa8, 9, 7, 0, 0xb0, 9, 7, 4,
                0x90, 9,
            ],
        ),
        (
            "many-errors",
            [
                vec![0, 0, 0, 1, 2, 0, 0, 9],
                [4, 0].repeat(40),
                vec![5, 255, 4, 0],
            ]
            .concat(),
        ),
    ]
}
