//! Splitting and merging, against the plain ones of `reference`, each other and etherparse.
#![allow(clippy::unwrap_used, reason = "a test may")]

use muslin_bed::reference::{check_merge, check_split, finish, merge, split};
use muslin_encap::ip::transport::Transport;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::merge::{MAX_SEGMENTS, MergeSettings};
use muslin_encap::offload::split::{Checksums, TrainLimits};
use muslin_encap::offload::virtio::{Gso, GsoKind};
use proptest::prelude::*;

/// A superpacket's shape.
#[derive(Debug, Clone)]
struct Shape {
    v6: bool,
    tcp: bool,
    /// Which of a few flows it is of.
    flow: u8,
    prefix: usize,
    /// Words of IP options or 8-byte extension headers.
    network_options: usize,
    tcp_options: Vec<[u8; 4]>,
    flags: u8,
    ident: u16,
    fragment: u8,
    sequence: u32,
    payload: usize,
    size: u16,
}

impl Shape {
    fn gso(&self) -> Gso {
        let kind = match (self.tcp, self.v6) {
            (false, _) => GsoKind::Udp,
            (true, false) => GsoKind::TcpV4,
            (true, true) => GsoKind::TcpV6,
        };
        Gso {
            kind,
            size: self.size,
            ecn: self.tcp && self.flags & 0x80 != 0,
        }
    }

    /// The packet as a kernel hands it over, its checksum unfinished.
    fn packet(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..self.prefix as u8).collect();
        if let Some(at) = self.prefix.checked_sub(2) {
            let ethertype: u16 = if self.v6 { 0x86dd } else { 0x0800 };
            bytes[at..].copy_from_slice(&ethertype.to_be_bytes());
        }
        let protocol = if self.tcp { 6 } else { 17 };
        if self.v6 {
            let first = if self.network_options > 0 {
                60
            } else {
                protocol
            };
            bytes.extend([0x60, 0x12, 0x34, self.flow, 0, 0, first, 63]);
            bytes.extend([0xfd; 31]);
            bytes.push(self.flow);
            for left in (0..self.network_options).rev() {
                let next = if left > 0 { 60 } else { protocol };
                bytes.extend([next, 0, 1, 4, 0, 0, 0, 0]);
            }
        } else {
            let [high, low] = self.ident.to_be_bytes();
            bytes.extend([0x45 + self.network_options as u8, 2, 0, 0, high, low]);
            bytes.extend([self.fragment, 0, 63, protocol, 0, 0]);
            bytes.extend([10, 244, 1, 2, 10, 244, 2, self.flow]);
            bytes.extend([1].repeat(self.network_options * 4));
        }
        bytes.extend([0x80, self.flow, 0x1f, 0x90]);
        if self.tcp {
            bytes.extend(self.sequence.to_be_bytes());
            let words = 5 + self.tcp_options.len() as u8;
            bytes.extend([9, 8, 7, 6, words << 4, self.flags, 1, 2, 0, 0, 0, 0]);
            bytes.extend(self.tcp_options.concat());
        } else {
            bytes.extend([0; 4]);
        }
        let payload = (0..self.payload).map(|i| (i * 7 + i / 250) as u8);
        bytes.extend(payload);
        self.fill(&mut bytes, Checksums::Partial);
        bytes
    }

    /// Fills in what depends on the rest.
    fn fill(&self, bytes: &mut [u8], checksums: Checksums) {
        let network = match self.v6 {
            true => 40 + self.network_options * 8,
            false => 20 + self.network_options * 4,
        };
        let transport = match self.tcp {
            true => 20 + self.tcp_options.len() * 4,
            false => 8,
        };
        let at = Transport {
            version: match self.v6 {
                true => smoltcp::wire::IpVersion::Ipv6,
                false => smoltcp::wire::IpVersion::Ipv4,
            },
            protocol: match self.tcp {
                true => muslin_encap::ip::transport::Protocol::Tcp,
                false => muslin_encap::ip::transport::Protocol::Udp,
            },
            l3: self.prefix,
            l4: self.prefix + network,
            payload: self.prefix + network + transport,
            end: bytes.len(),
        };
        finish(bytes, &at, checksums);
    }
}

fn shape() -> impl Strategy<Value = Shape> {
    let kind = (any::<bool>(), prop::bool::weighted(0.8), 0u8..3);
    let place = (prop::sample::select(vec![0usize, 14, 22]), 0usize..8);
    let tcp = (
        proptest::collection::vec(any::<[u8; 4]>(), 0..=10),
        prop::sample::select(vec![0x10u8, 0x18, 0x11, 0x19, 0x90, 0xd8, 0x50]),
        any::<u32>(),
    );
    let network = (any::<u16>(), prop::sample::select(vec![0u8, 0x40]));
    let payload = (
        prop_oneof![4 => 0usize..4000, 1 => 50_000usize..65_000],
        prop_oneof![1 => 8u16..100, 4 => 500u16..1500],
    );
    (kind, place, tcp, network, payload).prop_map(
        |((v6, tcp, flow), (prefix, options), (tcp_options, flags, sequence), network, sizes)| {
            Shape {
                v6,
                tcp,
                flow,
                prefix,
                network_options: if options < 6 { 0 } else { options - 5 },
                tcp_options,
                flags,
                ident: network.0,
                fragment: network.1,
                sequence,
                payload: sizes.0,
                size: sizes.1,
            }
        },
    )
}

fn settings(mtu: u32) -> MergeSettings {
    MergeSettings {
        mtu: Mtu::new(mtu).unwrap(),
        mtu_v6: Mtu::new(mtu).unwrap(),
        udp: true,
    }
}

/// Something that happens to a batch on its way.
#[derive(Debug, Clone)]
enum Accident {
    Swap(usize),
    Drop(usize),
    Repeat(usize),
    Pad(usize, usize),
    Partial(usize),
    /// A byte of the headers changes; whether checksums follow.
    Change(usize, usize, u8, bool),
    NoChecksum(usize),
    Fragment(usize),
}

fn accident() -> impl Strategy<Value = Accident> {
    let at = 0usize..64;
    prop_oneof![
        1 => at.clone().prop_map(Accident::Swap),
        1 => at.clone().prop_map(Accident::Drop),
        1 => at.clone().prop_map(Accident::Repeat),
        1 => (at.clone(), 1usize..20).prop_map(|(at, len)| Accident::Pad(at, len)),
        1 => at.clone().prop_map(Accident::Partial),
        8 => (at.clone(), 0usize..60, 0u32..8, prop::bool::weighted(0.8))
            .prop_map(|(at, byte, bit, fix)| Accident::Change(at, byte, 1 << bit, fix)),
        1 => at.clone().prop_map(Accident::NoChecksum),
        1 => at.prop_map(Accident::Fragment),
    ]
}

fn happen(batch: &mut Vec<Vec<u8>>, l3: usize, accident: &Accident) {
    let len = batch.len();
    let (&Accident::Swap(at)
    | &Accident::Drop(at)
    | &Accident::Repeat(at)
    | &Accident::Pad(at, _)
    | &Accident::Partial(at)
    | &Accident::Change(at, ..)
    | &Accident::NoChecksum(at)
    | &Accident::Fragment(at)) = accident;
    if len < 2 {
        return;
    }
    let at = at % len;
    match accident {
        Accident::Swap(_) => batch.swap(at, (at + 1) % len),
        Accident::Drop(_) => drop(batch.remove(at)),
        Accident::Repeat(_) => batch.insert(at, batch[at].clone()),
        Accident::Pad(_, len) => batch[at].extend(vec![0; *len]),
        Accident::Partial(_) => refill(&mut batch[at], l3, Checksums::Partial),
        Accident::Change(_, byte, by, fix) => {
            if let Some(byte) = batch[at].get_mut(l3 + *byte) {
                *byte ^= by;
            }
            if *fix {
                refill(&mut batch[at], l3, Checksums::Complete);
            }
        }
        Accident::NoChecksum(_) => {
            if let Ok(place) = Transport::parse(&batch[at], l3) {
                batch[at][place.checksum_offset()..place.checksum_offset() + 2].fill(0);
            }
        }
        Accident::Fragment(_) => batch[at][l3 + 6] ^= 0x20,
    }
}

fn refill(packet: &mut Vec<u8>, l3: usize, checksums: Checksums) {
    if let Ok(at) = Transport::parse(packet, l3) {
        packet.truncate(at.end);
        finish(packet, &at, checksums);
    }
}

fn assert_valid(segment: &[u8], l3: usize) {
    let sliced = etherparse::SlicedPacket::from_ip(&segment[l3..]).unwrap();
    let ip = sliced.net.unwrap();
    let payload_len = ip.ip_payload_ref().unwrap().payload.len();
    let header = match &ip {
        etherparse::NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.calc_header_checksum(), header.header_checksum);
            usize::from(header.total_len) - payload_len
        }
        etherparse::NetSlice::Ipv6(ip) => {
            40 + usize::from(ip.header().payload_length()) - payload_len
        }
        _ => unreachable!(),
    };
    assert_eq!(l3 + header + payload_len, segment.len());
    match (sliced.transport.unwrap(), &ip) {
        (etherparse::TransportSlice::Tcp(tcp), etherparse::NetSlice::Ipv4(ip)) => {
            let sum = tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination());
            assert_eq!(sum.unwrap(), tcp.checksum());
        }
        (etherparse::TransportSlice::Tcp(tcp), etherparse::NetSlice::Ipv6(ip)) => {
            let sum = tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination());
            assert_eq!(sum.unwrap(), tcp.checksum());
        }
        (etherparse::TransportSlice::Udp(udp), etherparse::NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            let sum = udp.to_header().calc_checksum_ipv4(&header, udp.payload());
            assert_eq!(sum.unwrap(), udp.checksum());
        }
        (etherparse::TransportSlice::Udp(udp), etherparse::NetSlice::Ipv6(ip)) => {
            let header = ip.header().to_header();
            let sum = udp.to_header().calc_checksum_ipv6(&header, udp.payload());
            assert_eq!(sum.unwrap(), udp.checksum());
        }
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn segments_are_what_a_plain_split_makes(
        shape in shape(),
        partial: bool,
        limits in prop::sample::select(vec![
            TrainLimits::UDP_SEGMENT,
            TrainLimits::ONE,
            TrainLimits { segments: 3, bytes: 2500 },
        ]),
    ) {
        let checksums = if partial { Checksums::Partial } else { Checksums::Complete };
        check_split(&shape.packet(), shape.prefix, shape.gso(), checksums, limits);
    }

    #[test]
    fn segments_are_valid_by_another_opinion(shape in shape()) {
        let segments = split(&shape.packet(), shape.prefix, shape.size.into(), Checksums::Complete);
        for segment in segments {
            assert_valid(&segment, shape.prefix);
        }
    }

    #[test]
    fn merging_undoes_splitting(mut shape in shape(), partial: bool) {
        let most = usize::from(shape.size) * MAX_SEGMENTS;
        shape.payload = shape.payload.clamp(1, most);
        if !shape.v6 {
            shape.network_options = 0;
        }
        let checksums = if partial { Checksums::Partial } else { Checksums::Complete };
        let packet = shape.packet();
        let segments = split(&packet, shape.prefix, shape.size.into(), checksums);
        let outputs = merge(&segments, shape.prefix, settings(1700));
        if segments.len() == 1 {
            prop_assert_eq!(outputs.len(), 1);
            prop_assert_eq!(&outputs[0].bytes, &segments[0]);
        } else if shape.gso().ecn {
            // CWR is on the first segment, which stays alone.
            prop_assert_eq!(outputs.len(), 2);
            prop_assert_eq!(&outputs[0].bytes, &segments[0]);
            let rest = split(&outputs[1].bytes, shape.prefix, shape.size.into(), checksums);
            prop_assert_eq!(&rest[..], &segments[1..]);
        } else {
            prop_assert_eq!(outputs.len(), 1);
            prop_assert_eq!(&outputs[0].bytes, &packet);
            prop_assert_eq!(outputs[0].virtio.gso, Some(shape.gso()));
        }
    }

    #[test]
    fn batches_are_merged_as_the_rules_allow(
        shapes in proptest::collection::vec(shape(), 1..4),
        accidents in proptest::collection::vec(accident(), 0..4),
        stride in 1usize..4,
        mtu in prop::sample::select(vec![576u32, 1450, 1700]),
    ) {
        let l3 = shapes[0].prefix;
        let mut queues: Vec<_> = shapes.iter().map(|shape| {
            let shape = Shape { prefix: l3, payload: shape.payload % 6000, ..shape.clone() };
            let mut segments = split(&shape.packet(), l3, shape.size.into(), Checksums::Complete);
            segments.truncate(12);
            segments.into_iter()
        }).collect();
        let mut batch = Vec::new();
        loop {
            let before = batch.len();
            for queue in &mut queues {
                batch.extend(queue.by_ref().take(stride));
            }
            if batch.len() == before {
                break;
            }
        }
        for accident in &accidents {
            happen(&mut batch, l3, accident);
        }
        check_merge(&batch, l3, settings(mtu));
    }

    #[test]
    fn a_whole_superpacket_with_a_partial_checksum_is_passed_on_as_one(shape in shape()) {
        check_merge(&[shape.packet()], shape.prefix, settings(576));
    }

    #[test]
    fn any_bytes_are_answered(
        batch in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..120), 0..6),
        first in prop::sample::select(vec![0x45u8, 0x46, 0x60, 0]),
        protocol in prop::sample::select(vec![6u8, 17, 0, 60]),
        l3 in prop::sample::select(vec![0usize, 14, 22, 1000]),
        size: u16,
    ) {
        let mut batch = batch;
        for packet in &mut batch {
            let len = packet.len();
            if let Some(ip) = packet.get_mut(l3..).filter(|ip| ip.len() >= 40) {
                ip[0] = first;
                ip[if first == 0x60 { 6 } else { 9 }] = protocol;
                let len = (len - l3) as u16;
                let (at, len) = if first == 0x60 { (4, len - 40) } else { (2, len) };
                ip[at..at + 2].copy_from_slice(&len.to_be_bytes());
                ip[6] &= 0xc0;
            }
            for kind in [GsoKind::TcpV4, GsoKind::TcpV6, GsoKind::Udp] {
                let gso = Gso { kind, size, ecn: false };
                check_split(packet, l3, gso, Checksums::Complete, TrainLimits::UDP_SEGMENT);
            }
        }
        check_merge(&batch, l3, settings(1450));
    }
}

proptest! {
    // Each case is a whole packet of 64 KiB.
    #![proptest_config(ProptestConfig {
        cases: ProptestConfig::default().cases / 4,
        ..ProptestConfig::default()
    })]

    /// Trains that go on beyond the longest packet: what is merged ends at 65,535 bytes or before.
    #[test]
    fn what_is_merged_is_no_longer_than_a_packet_can_be(
        shape in shape(),
        size in 1050usize..1400,
        more in -40isize..=40,
        then in 0usize..3,
    ) {
        let network_options = if shape.v6 { shape.network_options } else { 0 };
        let flags = if shape.tcp { 0x10 } else { 0 };
        let shape = Shape { network_options, flags, ..shape };
        let headers = Shape { payload: 0, ..shape.clone() }.packet().len() - shape.prefix;
        let payload = (65_535 - headers).checked_add_signed(more).unwrap();
        let mut lens = vec![size; payload / size];
        lens.extend(Some(payload % size).filter(|len| *len > 0));
        let mut expected = headers;
        for len in &lens {
            if expected + len > 65_535 {
                break;
            }
            expected += len;
        }
        lens.extend([size].repeat(then));
        let mut sent = 0;
        let batch: Vec<_> = lens.into_iter().enumerate().map(|(index, len)| {
            let segment = Shape {
                payload: len,
                sequence: shape.sequence.wrapping_add(sent),
                ident: shape.ident.wrapping_add(index as u16),
                ..shape.clone()
            };
            sent += len as u32;
            let mut packet = segment.packet();
            segment.fill(&mut packet, Checksums::Complete);
            packet
        }).collect();
        check_merge(&batch, shape.prefix, settings(1700));
        let outputs = merge(&batch, shape.prefix, settings(1700));
        prop_assert_eq!(outputs[0].bytes.len() - shape.prefix, expected);
    }
}
