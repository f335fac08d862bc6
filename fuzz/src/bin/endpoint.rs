//! A pod that lives in a process (`muslin_stack::endpoint`), as its node's frames and those of a node
//! that lies come to it. The oracle is a model of what the pod may know, and etherparse:
//!
//! * it takes an address for its gateway's only from ARP that says so, and the last one counts;
//! * it answers ARP for its own address alone, and whole echo requests to it with a right checksum:
//!   with the same payload, to the gateway, with right lengths and checksums;
//! * what it passes on is an IPv4 packet for its address, from an address that a host can have;
//! * an error that it reports is a packet from its address that quotes the offender, and there is none
//!   about errors and fragments, and none before the gateway is known.
#![cfg_attr(fuzzing, no_main)]

use std::net::Ipv4Addr;

use arbitrary::{Result, Unstructured};
use etherparse::{
    IcmpEchoHeader, Icmpv4Type, NetHeaders, PacketBuilder, PacketHeaders, TransportHeader,
};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::offload::virtio::{Checksum, Header};
use muslin_fuzz::{Seed, for_each_event};
use muslin_stack::datapath::frame;
use muslin_stack::datapath::icmp::IcmpError;
use muslin_stack::endpoint::{Endpoint, Taken};
use muslin_stack::{Duration, Instant};
use smoltcp::wire::{ArpOperation, EthernetAddress};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
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
    /// The last packet that was passed on.
    packet: Vec<u8>,
}

/// Runs the events that `data` stands for.
fn run(data: &[u8]) {
    let now = Instant::ZERO;
    let mut harness = Harness {
        endpoint: Endpoint::new(ADDRESS.into(), GATEWAY.into(), now).expect("both are of IPv4"),
        now,
        gateway: None,
        packet: Vec::new(),
    };
    for_each_event(data, |input| harness.step(input));
}

impl Harness {
    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut byte = || input.arbitrary::<u8>();
        let plain = Header::default();
        match byte()? % 6 {
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
        assert_eq!(self.endpoint.has_gateway(), self.gateway.is_some());
        self.check_way();
    }

    /// Own packets go to where the gateway is.
    fn check_way(&self) {
        let mut storage = vec![0; HEADROOM + 20];
        let mut packet = PacketBuf::new(&mut storage, HEADROOM, 20).expect("there is room");
        let wrapped = self.endpoint.wrap(&mut packet);
        assert_eq!(wrapped.is_ok(), self.gateway.is_some());
        if let Some(gateway) = self.gateway {
            assert_eq!(packet.as_slice()[..6], gateway.0);
            assert_eq!(packet.as_slice()[6..12], MAC.0);
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
            Ok((Taken::Answer, answer)) => self.check_answer(frame, &answer),
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
        let gateway = self.gateway.expect("it cannot be sent");
        let frame = packet.as_slice();
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
