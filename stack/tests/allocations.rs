//! No packet costs an allocation once the node has seen the first few.
#![allow(clippy::unwrap_used, reason = "a test may")]

use std::sync::Arc;

use allocation_counter::measure;
use muslin_bed::scenes::{Scene, Way, vxlan_tunnel};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::transport::Transport;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::merge::{MergeSettings, Merger};
use muslin_encap::offload::split::{Checksums, HEADERS_LEN, Split, TrainLimits};
use muslin_encap::offload::virtio::{Gso, GsoKind};
use muslin_stack::addresses::Nets;
use muslin_stack::datapath::egress::Policy;
use muslin_stack::datapath::host_interface::{HostFlows, HostInterface};
use muslin_stack::datapath::node::{Node, NodeConfig, Verdict};
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::tunnel::Tunnel;
use muslin_stack::{EthernetAddress, Instant};

#[test]
fn none_in_the_node() {
    for tunnel in [vxlan_tunnel(), Tunnel::Udp] {
        for way in [Way::ToPeer, Way::FromPeer, Way::Switched, Way::Flooded] {
            let mut scene = Scene::new(tunnel, 100, way);
            let info = measure(|| {
                for _ in 0..1_000 {
                    let verdict = scene.run();
                    assert!(scene.is_right(verdict));
                }
            });
            assert_eq!(info.count_total, 0, "{tunnel:?}, {way:?}: {info:?}");
        }
    }
}

#[test]
fn none_for_the_host() {
    let config = NodeConfig::new(
        "10.244.1.0/24".parse::<Nets>().unwrap(),
        EthernetAddress([2, 0, 0, 0, 0, 1]),
        Tunnel::Udp,
        Mtu::new(1450).unwrap(),
        7,
    );
    let mut node = Node::new(config, Instant::ZERO).unwrap();
    let address = "192.0.2.2:8285".parse().unwrap();
    let subnet = "10.244.2.0/24".parse().unwrap();
    node.set_peer(Peer::new(PeerId(2), subnet, address));
    let host = HostInterface {
        addresses: vec![std::net::IpAddr::from([192, 0, 2, 1])],
        flows: Arc::new(HostFlows::new(7)),
    };
    node.set_host(Some(host), &Policy::closed());
    let udp = |source, destination, ports: (u16, u16)| {
        let mut bytes = vec![0; HEADROOM];
        etherparse::PacketBuilder::ipv4(source, destination, 64)
            .udp(ports.0, ports.1)
            .write(&mut bytes, b"payload")
            .unwrap();
        bytes
    };
    let (pod, base) = ([10, 244, 2, 2], [10, 244, 1, 0]);
    let question = udp([192, 0, 2, 1], pod, (40_000, 53));
    let answer = udp(pod, base, (53, 40_000));
    let (mut one, mut other) = (question.clone(), answer.clone());
    let info = measure(|| {
        for _ in 0..1_000 {
            one.copy_from_slice(&question);
            let len = one.len() - HEADROOM;
            let mut packet = PacketBuf::new(&mut one, HEADROOM, len).unwrap();
            let verdict = node.from_host(Instant::ZERO, &mut packet);
            assert!(matches!(verdict, Verdict::Peer { .. }));
            other.copy_from_slice(&answer);
            let mut packet = PacketBuf::new(&mut other, HEADROOM, len).unwrap();
            let verdict = node.from_underlay(Instant::ZERO, address, &mut packet);
            assert_eq!(verdict, Verdict::Host);
        }
    });
    assert_eq!(info.count_total, 0, "{info:?}");
}

const SEGMENT: usize = 1398;
const SEGMENTS: usize = 40;

/// A TCP superpacket behind some headroom, its checksum unfinished.
fn superpacket() -> Vec<u8> {
    let mut bytes = vec![0; HEADROOM - 2];
    bytes.extend([8, 0]);
    etherparse::PacketBuilder::ipv4([10, 0, 0, 2], [10, 0, 1, 2], 64)
        .tcp(1000, 2000, 1, 500)
        .ack(7)
        .write(&mut bytes, &[5; SEGMENT * SEGMENTS])
        .unwrap();
    let at = Transport::parse(&bytes, HEADROOM).unwrap();
    let pseudo = at.pseudo_header(&bytes, at.end - at.l4);
    bytes[at.checksum_offset()..at.checksum_offset() + 2].copy_from_slice(&pseudo.to_be_bytes());
    bytes
}

/// Splits into the buffers of a batch, and returns how many it took.
fn split(packet: &[u8], headers: &mut [u8], batch: &mut [Vec<u8>]) -> usize {
    let gso = Gso {
        kind: GsoKind::TcpV4,
        size: SEGMENT as u16,
        ecn: false,
    };
    let mut split = Split::new(packet, HEADROOM, gso, Checksums::Complete).unwrap();
    let mut count = 0;
    while let Some(train) = split.next_train(headers, TrainLimits::UDP_SEGMENT).unwrap() {
        for (header, payload) in train.segments() {
            let buffer = &mut batch[count];
            buffer.clear();
            buffer.extend_from_slice(header);
            buffer.extend_from_slice(payload);
            count += 1;
        }
    }
    count
}

/// Merges a batch, and returns how many packets come out of it.
fn merge(batch: &mut [Vec<u8>]) -> usize {
    let settings = MergeSettings {
        mtu: Mtu::new(1450).unwrap(),
        mtu_v6: Mtu::new(1450).unwrap(),
        udp: true,
    };
    let mut merger = Merger::new(settings);
    let mut outputs = 0;
    let mut sink = |_: muslin_encap::offload::merge::Merged<'_, '_, u32>| outputs += 1;
    for segment in batch {
        merger.push(segment, HEADROOM, 1, &mut sink);
    }
    merger.flush(&mut sink);
    outputs
}

#[test]
fn none_for_segments() {
    let packet = superpacket();
    let mut headers = vec![0; HEADERS_LEN];
    let mut batch: Vec<_> = (0..SEGMENTS).map(|_| Vec::with_capacity(2048)).collect();
    let info = measure(|| {
        for _ in 0..100 {
            assert_eq!(split(&packet, &mut headers, &mut batch), SEGMENTS);
            assert_eq!(merge(&mut batch), 1);
        }
    });
    assert_eq!(info.count_total, 0, "{info:?}");
}

#[test]
fn they_would_be_seen() {
    let info = measure(|| drop(std::hint::black_box(vec![1u8; 9])));
    assert_eq!(info.count_total, 1);
}
