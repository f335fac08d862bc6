//! A process that is the node after another one, which still has flows.

use etherparse::PacketBuilder;
use smoltcp::wire::Icmpv4Packet;

use super::bed::{Bed, GATEWAY, POD};
use super::*;

const PORT: u16 = 8080;

/// A UDP packet of the pod.
fn udp(from: u16, to: SocketAddrV4) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(POD.octets(), to.ip().octets(), 64)
        .udp(from, to.port())
        .write(&mut packet, b"hello")
        .unwrap();
    packet
}

fn syn(from: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(POD.octets(), [192, 0, 2, 80], 64)
        .tcp(from, 80, 1, 1000)
        .syn()
        .write(&mut packet, &[])
        .unwrap();
    packet
}

fn ping(identifier: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(POD.octets(), [192, 0, 2, 80], 64)
        .icmpv4_echo_request(identifier, 0)
        .write(&mut packet, b"x")
        .unwrap();
    packet
}

/// The pod says that it does not take a packet that came to it by a flow of this packet.
fn refusal(of: &[u8]) -> Vec<u8> {
    let mut reversed = of.to_vec();
    reversed[12..16].copy_from_slice(&of[16..20]);
    reversed[16..20].copy_from_slice(&of[12..16]);
    reversed[20..22].copy_from_slice(&of[22..24]);
    reversed[22..24].copy_from_slice(&of[20..22]);
    let mut packet = Vec::new();
    PacketBuilder::ipv4(POD.octets(), [192, 0, 2, 80], 64)
        .icmpv4_raw(3, 3, [0; 4])
        .write(&mut packet, &reversed)
        .unwrap();
    Icmpv4Packet::new_checked(&packet[20..]).unwrap();
    packet
}

fn server(last: u8) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, last), 80)
}

/// What the new process hands to the old one of this packet.
fn handed(bed: &mut Bed, packet: &[u8]) -> bool {
    bed.send(packet);
    let handed: Vec<_> = bed.pods.to_predecessor.drain(..).collect();
    assert!(handed.is_empty() || handed == [packet], "{handed:?}");
    !handed.is_empty()
}

#[test]
fn flows_of_the_process_before_are_its_own_until_they_end() {
    let (mut old, mut new) = (Bed::new(), Bed::new());
    for packet in [syn(5000), udp(5000, server(80)), ping(5000)] {
        old.send(&packet);
    }
    assert_eq!(old.egress.counters().open, 3);
    new.egress.succeed(old.egress.keys());
    // One mapping sends to anybody.
    for packet in [
        syn(5000),
        udp(5000, server(80)),
        udp(5000, server(81)),
        ping(5000),
        refusal(&udp(5000, server(80))),
        refusal(&syn(5000)),
    ] {
        assert!(handed(&mut new, &packet), "{packet:?}");
        old.send(&packet);
    }
    assert_eq!(old.egress.counters().open, 3);
    assert_eq!(new.egress.counters().open, 0);
    for packet in [syn(5001), udp(5001, server(80)), ping(5001)] {
        assert!(!handed(&mut new, &packet), "{packet:?}");
    }
    assert_eq!(new.egress.counters().open, 3);

    let tcp = old.egress.keys().find(|key| key.protocol == Protocol::Tcp);
    new.egress.forget_predecessors(&[tcp.unwrap()]);
    assert!(!handed(&mut new, &syn(5000)));
    assert!(handed(&mut new, &ping(5000)), "the others stay");
    new.egress.end_predecessor();
    assert!(!handed(&mut new, &ping(5000)));
    assert_eq!(new.egress.counters().open, 5);
}

#[test]
fn a_socket_asks_the_gateways_services_of_today() {
    let (mut old, mut new) = (Bed::new(), Bed::new());
    let question = udp(5000, SocketAddrV4::new(GATEWAY, 53));
    for bed in [&mut old, &mut new] {
        bed.host.serves.push((Protocol::Udp, 53));
    }
    old.send(&question);
    assert_eq!(old.egress.counters().open, 1);
    new.egress.succeed(old.egress.keys());
    assert!(!handed(&mut new, &question));
    assert_eq!(new.egress.counters().open, 1);
}

#[test]
fn clients_of_published_ports_have_other_ports_than_those_of_before() {
    let (mut old, mut new) = (Bed::new(), Bed::new());
    let pod = SocketAddr::from((POD, PORT));
    let key = |port| FlowKey {
        protocol: Protocol::Udp,
        pod,
        remote: (GATEWAY, port).into(),
    };
    for bed in [&mut old, &mut new] {
        bed.egress.expect_datagrams(pod).unwrap();
    }
    let port = old.egress.free_port(key(0)).unwrap();
    let id = old.call(|egress, now, host| egress.deliver(now, key(port), b"hello", host));
    old.host.adopt_datagrams(id.unwrap());
    new.egress.succeed(old.egress.keys());
    // The same numbers were drawn.
    assert_ne!(new.egress.free_port(key(0)).unwrap(), port);
    let answer = udp(PORT, SocketAddrV4::new(GATEWAY, port));
    assert!(handed(&mut new, &answer));
}
