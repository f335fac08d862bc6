//! Datagrams and echo requests of pods.

use etherparse::UdpHeader;
use muslin_encap::offload::virtio::{Gso, GsoKind, Header};

use super::bed::*;
use super::*;

fn udp(port: u16, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    from_to(pod(), to.ip())
        .udp(port, to.port())
        .write(&mut bytes, payload)
        .unwrap();
    bytes
}

fn echo(ident: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
    ping(false, (pod(), server().ip()), (ident, seq), payload)
}

fn sent(bed: &Bed, id: FlowId) -> Vec<Vec<u8>> {
    let sent = bed.host.sockets[&id].sent.iter();
    sent.map(|(_, datagram)| datagram.clone()).collect()
}

fn arrives(bed: &mut Bed, id: FlowId, datagram: Vec<u8>) {
    arrives_from(bed, id, server(), &datagram);
}

fn arrives_from(bed: &mut Bed, id: FlowId, from: impl Into<SocketAddr>, datagram: &[u8]) {
    let received = &mut bed.fake(id).received;
    received.push_back((from.into(), datagram.to_vec()));
}

/// From where, to which port of the pod, and what has come to it.
fn heard(bed: &mut Bed) -> Vec<(SocketAddr, u16, Vec<u8>)> {
    let packets = bed.received();
    packets.iter().map(|packet| read_udp(packet)).collect()
}

#[test]
fn datagrams_go_on_and_answers_come_from_the_address_that_was_asked() {
    both(|| {
        let mut bed = Bed::new();
        let requests = [pattern(700, 1), Vec::new(), pattern(1400, 2)];
        for request in &requests {
            bed.send(&udp(5000, server(), request));
        }
        let id = bed.last();
        assert_eq!(bed.host.sockets.len(), 1, "one flow");
        assert_eq!(sent(&bed, id), requests);
        let sent = &bed.host.sockets[&id].sent;
        assert!(sent.iter().all(|(to, _)| *to == server()));

        let answers = [pattern(900, 3), Vec::new(), pattern(3001, 4)];
        for answer in &answers {
            arrives(&mut bed, id, answer.clone());
        }
        bed.wake_quietly(id);
        let packets = bed.received();
        assert_eq!(packets.len(), answers.len());
        for (packet, answer) in packets.iter().zip(&answers) {
            let (ip, _) = read(packet);
            assert_eq!((ip.destination, ip.dont_fragment), (pod(), false));
            assert_eq!(read_udp(packet), (server(), 5000, answer.clone()));
        }
        // Another port of the pod is another flow.
        bed.send(&udp(5001, server(), b"x"));
        assert_eq!(bed.egress.counters().open, 2);
        assert_eq!(bed.dropped, []);
    });
}

#[test]
fn all_that_a_port_sends_is_one_mapping_and_all_may_answer() {
    both(|| {
        let mut bed = Bed::new();
        let others = [outside(81, 80), outside(107, 3478)];
        bed.send(&udp(5000, server(), b"1"));
        let id = bed.last();
        bed.send(&udp(5000, others[0], b"2"));
        bed.send(&udp(5000, others[1], b"3"));
        bed.send(&udp(5000, server(), b"4"));
        assert_eq!(bed.host.sockets.len(), 1, "one socket");
        let to = |to, payload: &[u8]| (to, payload.to_vec());
        let expected = [
            to(server(), b"1"),
            to(others[0], b"2"),
            to(others[1], b"3"),
            to(server(), b"4"),
        ];
        assert_eq!(bed.fake(id).sent, expected);
        let [info] = bed.egress.flows().collect::<Vec<_>>()[..] else {
            panic!("one flow");
        };
        assert!(info.key.is_mapping());
        assert_eq!((info.remote, info.sent), (server(), 4));

        // Another port of a server (RFC 1350 section 4), and somebody who was not asked.
        let senders = [
            server(),
            SocketAddr::new(server().ip(), 34_567),
            others[0],
            outside(209, 9),
        ];
        for from in senders {
            arrives_from(&mut bed, id, from, b"answer");
        }
        bed.wake_quietly(id);
        let expected = senders.map(|from| (from, 5000, b"answer".to_vec()));
        assert_eq!(heard(&mut bed), expected);
        assert_eq!(bed.dropped, []);

        let other: SocketAddr = of("[2001:db8::9]:9", "203.0.113.9:9").parse().unwrap();
        arrives_from(&mut bed, id, other, b"answer");
        bed.wake_quietly(id);
        assert_eq!(heard(&mut bed), []);
        assert_eq!(bed.pods.lost[&DropReason::EgressFamily], 1);
    });
}

#[test]
fn pings_of_one_number_are_one_mapping() {
    both(|| {
        let mut bed = Bed::new();
        bed.send(&echo(7, 0, b"x"));
        bed.send(&ping(false, (pod(), outside(81, 0).ip()), (7, 1), b"x"));
        let id = bed.last();
        assert_eq!(bed.egress.counters().open, 1);
        let to: Vec<_> = bed.fake(id).sent.iter().map(|(to, _)| *to).collect();
        let others = [outside(80, 0), outside(81, 0)];
        assert_eq!(to, others);
        for from in others {
            let mut reply = echo(999, 0, b"x")[ip_len()..].to_vec();
            reply[0] = of(0, 129);
            arrives_from(&mut bed, id, from, &reply);
        }
        bed.wake_quietly(id);
        let packets = bed.received();
        let sources: Vec<_> = packets.iter().map(|it| read(it).0.source).collect();
        assert_eq!(sources, others.map(|it| it.ip()));
    });
}

#[test]
fn the_policy_holds_for_each_datagram_both_ways() {
    both(|| {
        let allow = vec![of("192.0.2.0/24", "2001:db8::/120").parse().unwrap()];
        let deny = vec![outside(66, 0).ip().into()];
        let mut bed = Bed::with(
            Limits::default(),
            Policy::new(Rules {
                allow,
                deny,
                tunnel_ports: vec![8472],
                ..Rules::default()
            }),
        );
        let denied = [
            outside(66, 80),
            SocketAddr::new(pod_at(7), 80),
            outside(80, 8472),
        ];
        bed.send(&udp(5000, server(), b"x"));
        let id = bed.last();
        for to in denied {
            bed.send(&udp(5000, to, b"x"));
        }
        assert_eq!(bed.dropped, [DropReason::EgressDenied; 3]);
        let errors: Vec<_> = bed.pods.reports.iter().map(|(error, _)| *error).collect();
        assert_eq!(errors, [IcmpError::Prohibited; 3]);
        bed.send(&udp(5000, server(), b"y"));
        assert_eq!(sent(&bed, id), [b"x", b"y"]);

        let gateway = [(gateway(), 53).into(), (pod_at(0), 53).into()];
        let loopback = [SocketAddr::new(localhost(), 80)];
        for from in denied.iter().chain(&gateway).chain(&loopback) {
            arrives_from(&mut bed, id, *from, b"z");
        }
        bed.wake_quietly(id);
        assert_eq!(heard(&mut bed), []);
        assert_eq!(bed.pods.lost[&DropReason::EgressDenied], 6);
    });
}

#[test]
fn the_hosts_loopback_answers_from_the_address_that_the_pod_knows() {
    both(|| {
        let open = outside(7, 0).ip();
        let mut bed = Bed::with(
            Limits::default(),
            Policy::new(Rules {
                host_loopback: Some(open.into()),
                ..Rules::default()
            }),
        );
        bed.send(&udp(5000, SocketAddr::new(open, 53), b"x"));
        let id = bed.last();
        assert_eq!(bed.fake(id).sent[0].0, SocketAddr::new(localhost(), 53));
        bed.send(&udp(5000, server(), b"x"));
        for port in [53, 54] {
            let from = SocketAddr::new(localhost(), port);
            arrives_from(&mut bed, id, from, b"y");
        }
        bed.wake_quietly(id);
        let expected = [53, 54].map(|port| (SocketAddr::new(open, port), 5000, b"y".to_vec()));
        assert_eq!(heard(&mut bed), expected);
    });
}

#[test]
fn what_fails_and_what_strangers_send_is_no_use_of_a_mapping() {
    both(|| {
        let mut bed = Bed::new();
        bed.send(&udp(5000, server(), b"x"));
        let id = bed.last();
        for _ in 0..11 {
            bed.pass(Duration::from_secs(10));
            bed.fake(id).error = Some(HostError::NetUnreachable);
            bed.send(&udp(5000, server(), b"x"));
            arrives_from(&mut bed, id, outside(209, 9), b"noise");
            bed.wake_quietly(id);
        }
        assert_eq!(bed.dropped, [DropReason::EgressUnreachable; 11]);
        assert_eq!(heard(&mut bed).len(), 11);
        let info = bed.egress.flows().next().unwrap();
        assert_eq!((info.sent, info.received), (1, 55));
        bed.pass(Duration::from_secs(10));
        assert_eq!(bed.egress.counters().open, 0);
        assert_eq!(bed.egress.counters().expired, 1);
    });
}

#[test]
fn a_superpacket_is_as_many_datagrams() {
    both(|| {
        for takes_trains in [false, true] {
            let mut bed = Bed::new();
            bed.host.trains = takes_trains.then(Vec::new);
            sends_a_superpacket(&mut bed);
            let trains = takes_trains.then(|| vec![(2500, 1000)]);
            assert_eq!(bed.host.trains, trains, "one call for all of them");
            assert_eq!(bed.egress.flows().next().unwrap().sent, 2500);
        }
    });
}

fn sends_a_superpacket(bed: &mut Bed) {
    let payload = pattern(2500, 5);
    let mut storage = udp(5000, server(), &payload);
    let len = storage.len();
    let packet = PacketBuf::new(&mut storage, 0, len).unwrap();
    let packet = packet.with_offload(Header {
        checksum: Checksum::Partial {
            start: ip_len() as u16,
            offset: 6,
        },
        gso: Some(Gso {
            kind: GsoKind::Udp,
            size: 1000,
            ecn: false,
        }),
        hdr_len: ip_len() as u16 + 8,
    });
    bed.call(|egress, now, host| egress.from_pod(now, &packet, host))
        .unwrap();
    let id = bed.last();
    let pieces: Vec<_> = payload.chunks(1000).map(<[u8]>::to_vec).collect();
    assert_eq!(sent(bed, id), pieces);
}

#[test]
fn udp_flows_end_after_their_time() {
    both(|| {
        let mut bed = Bed::new();
        bed.send(&udp(5000, server(), b"one"));
        let id = bed.last();
        bed.live(Duration::from_secs(100));
        arrives(&mut bed, id, b"two".to_vec());
        bed.wake_quietly(id);
        bed.live(Duration::from_secs(100));
        assert_eq!(bed.egress.counters().open, 1, "an answer counts");
        bed.send(&udp(5000, server(), b"three"));
        bed.live(Duration::from_secs(100));
        assert_eq!(bed.egress.counters().open, 1, "a request counts");
        bed.live(Duration::from_secs(21));
        assert_eq!(bed.egress.counters().open, 0);
        assert_eq!(bed.host.closed.len(), 1);
        assert_eq!(bed.egress.poll_at(), None);
    });
}

#[test]
fn a_process_that_stood_still_ends_no_mappings() {
    both(|| {
        let mut bed = Bed::new();
        bed.send(&udp(5000, server(), b"one"));
        let of_udp = bed.last();
        bed.send(&echo(7, 0, b"one"));
        bed.pass(Duration::from_secs(20));
        bed.pass(Duration::from_secs(640));
        assert_eq!(bed.egress.counters().open, 2);
        // Its sockets have what came meanwhile.
        arrives(&mut bed, of_udp, b"two".to_vec());
        bed.wake_quietly(of_udp);
        assert_eq!(bed.received().len(), 1);
        let flow = |bed: &Bed| {
            bed.egress
                .flows()
                .find(|it| it.key.protocol == Protocol::Udp)
        };
        assert_eq!(flow(&bed).unwrap().active, bed.now);
        bed.live(Duration::from_secs(40));
        assert_eq!(
            bed.egress.counters().open,
            1,
            "pings were idle for a minute"
        );
        bed.live(Duration::from_secs(80));
        assert_eq!(bed.egress.counters().open, 0);
    });
}

#[test]
fn that_nobody_listens_is_passed_on() {
    both(|| {
        for while_reading in [true, false] {
            let mut bed = Bed::new();
            bed.send(&udp(5000, server(), b"one"));
            let id = bed.last();
            bed.fake(id).error = Some(HostError::Refused);
            if while_reading {
                bed.wake_quietly(id);
            }
            bed.send(&udp(5000, server(), b"two"));
            assert_eq!(sent(&bed, id), [b"one", b"two"]);
            let [(error, offender)] = bed.pods.reports.as_slice() else {
                panic!("{:?}", bed.pods.reports);
            };
            assert_eq!(*error, IcmpError::PortUnreachable);
            let (ip, rest) = read(offender);
            assert_eq!((ip.source, ip.destination), (pod(), server().ip()));
            let (udp, _) = UdpHeader::from_slice(rest).unwrap();
            assert_eq!((udp.source_port, udp.destination_port), (5000, 80));
        }
    });
}

#[test]
fn what_may_not_or_cannot_be_reached_is_told() {
    both(|| {
        let mut bed = Bed::new();
        bed.send(&udp(
            5000,
            of("169.254.169.254:53", "[fd00:ec2::254]:53")
                .parse()
                .unwrap(),
            b"x",
        ));
        bed.host.refuses = Some(HostError::NetUnreachable);
        bed.send(&udp(5000, server(), b"x"));
        bed.host.refuses = Some(HostError::NotPermitted);
        bed.send(&echo(7, 0, b"x"));
        let reasons = [
            DropReason::EgressDenied,
            DropReason::EgressUnreachable,
            DropReason::EgressPing,
        ];
        assert_eq!(bed.dropped, reasons);
        let errors: Vec<_> = bed.pods.reports.iter().map(|(error, _)| *error).collect();
        let expected = [
            IcmpError::Prohibited,
            IcmpError::NetUnreachable,
            IcmpError::Prohibited,
        ];
        assert_eq!(errors, expected);
        assert_eq!(bed.egress.counters().open, 0);
    });
}

#[test]
fn why_there_is_no_socket_is_the_reason_of_the_drop() {
    both(|| {
        let packets = (udp(5000, server(), b"x"), echo(7, 0, b"x"));
        for (error, of_udp, of_ping) in [
            (
                HostError::Exhausted,
                DropReason::EgressExhausted,
                DropReason::EgressExhausted,
            ),
            (
                HostError::WouldBlock,
                DropReason::EgressHostFull,
                DropReason::EgressHostFull,
            ),
            (
                HostError::NotPermitted,
                DropReason::EgressDenied,
                DropReason::EgressPing,
            ),
            (
                HostError::HostUnreachable,
                DropReason::EgressUnreachable,
                DropReason::EgressUnreachable,
            ),
            (
                HostError::TooLong,
                DropReason::EgressTooLong,
                DropReason::EgressTooLong,
            ),
            (
                HostError::Refused,
                DropReason::EgressHostFailed,
                DropReason::EgressHostFailed,
            ),
        ] {
            let mut bed = Bed::new();
            bed.host.refuses = Some(error);
            bed.send(&packets.0);
            bed.send(&packets.1);
            assert_eq!(bed.dropped, [of_udp, of_ping], "{error:?}");
        }
    });
}

#[test]
fn ports_are_never_zero() {
    both(|| {
        let nowhere = SocketAddr::new(server().ip(), 0);
        let mut bed = Bed::new();
        bed.send(&udp(0, server(), b"x"));
        bed.send(&udp(5000, nowhere, b"x"));
        assert_eq!(bed.dropped, [DropReason::EgressMalformed; 2]);
        assert!(bed.host.sockets.is_empty());
    });
}

#[test]
fn a_flow_of_many_datagrams_lets_others_have_their_turn() {
    both(|| {
        let mut bed = Bed::new();
        bed.send(&udp(5000, server(), b"x"));
        assert_eq!(bed.egress.counters().opened, 1);
        let idle = bed.now + Limits::default().udp_idle;
        assert_eq!(bed.egress.poll_at(), Some(idle));
        let id = bed.last();
        for _ in 0..100 {
            arrives(&mut bed, id, b"y".to_vec());
        }
        bed.wake_quietly(id);
        assert_eq!(bed.received().len(), 64);
        assert_eq!(bed.egress.poll_at(), Some(bed.now + LATER));
        bed.pass(LATER);
        assert_eq!(bed.received().len(), 36);
    });
}

#[test]
fn echo_requests_go_on_and_replies_have_the_pods_number() {
    both(|| {
        let mut bed = Bed::new();
        let payload = pattern(56, 9);
        bed.send(&echo(77, 1, &payload));
        let id = bed.last();
        let [request] = &sent(&bed, id)[..] else {
            panic!("no request");
        };
        assert_eq!((request[0], &request[8..]), (of(8, 128), &payload[..]));
        // The host's socket has its own number, and it hears of errors, too.
        let mut reply = request.clone();
        reply[0] = of(0, 129);
        reply[4..6].copy_from_slice(&999_u16.to_be_bytes());
        let mut error = reply.clone();
        error[0] = of(3, 1);
        arrives(&mut bed, id, error);
        arrives(&mut bed, id, reply);
        bed.wake_quietly(id);
        let packets = bed.received();
        assert_eq!(packets.len(), 1);
        let mut expected = ping(true, (server().ip(), pod()), (77, 1), &payload);
        assert_whole(&packets[0]);
        // Identification and flags, and the sum over them, are the node's.
        if !is_v6() {
            for at in (4..8).chain(10..12) {
                expected[at] = packets[0][at];
            }
        }
        assert_eq!(packets[0], expected);
        bed.pass(Duration::from_secs(60));
        assert_eq!(bed.egress.counters().open, 0);
    });
}

#[test]
fn other_icmp_messages_and_damaged_ones_are_dropped() {
    both(|| {
        let mut bed = Bed::new();
        let mut damaged = echo(7, 0, b"payload");
        damaged[ip_len() + 10] ^= 1;
        bed.send(&damaged);
        bed.send(&ping(true, (pod(), server().ip()), (7, 0), b"payload"));
        let reasons = [DropReason::EgressMalformed, DropReason::EgressProtocol];
        assert_eq!(bed.dropped, reasons);
        assert!(bed.host.sockets.is_empty());
    });
}
