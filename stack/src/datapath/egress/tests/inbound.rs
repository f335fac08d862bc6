//! Flows that begin on the host's side.

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;

use super::bed::*;
use super::*;

fn client() -> SocketAddr {
    outside(7, 51_234)
}

const PORT: u16 = 8080;
/// A pod of another node, or its gateway.
fn far(number: u8) -> IpAddr {
    let ipv6 = format!("fd00:10:244:2::{number}");
    of(format!("10.244.2.{number}"), ipv6).parse().unwrap()
}

fn key(protocol: Protocol, remote: SocketAddr) -> FlowKey {
    FlowKey {
        protocol,
        pod: SocketAddr::new(pod(), PORT),
        remote,
    }
}

fn tcp(remote: SocketAddr) -> FlowKey {
    key(Protocol::Tcp, remote)
}

fn dial_with(bed: &mut Bed, key: FlowKey, preface: &[u8]) -> Result<FlowId, DropReason> {
    let id = bed.call(|egress, now, host| egress.dial(now, key, preface, host))?;
    bed.host.adopt(id);
    Ok(id)
}

fn dial(bed: &mut Bed, key: FlowKey) -> FlowId {
    dial_with(bed, key, b"").unwrap()
}

fn deliver_with(bed: &mut Bed, key: FlowKey, payload: &[u8]) -> Result<FlowId, DropReason> {
    let id = bed.call(|egress, now, host| egress.deliver(now, key, payload, host))?;
    bed.host.adopt_datagrams(id);
    Ok(id)
}

/// A connection from a client to the pod, which listens.
fn accepted(bed: &mut Bed) -> (SocketHandle, FlowId) {
    let handle = bed.listen(PORT);
    let id = dial(bed, tcp(client()));
    assert_eq!(bed.egress.poll_at(), Some(bed.now + LATER));
    bed.wait(Duration::from_millis(1));
    assert_eq!(bed.host.dialled.pop(), Some((id, Ok(()))));
    assert_eq!(bed.socket(handle).state(), State::Established);
    (handle, id)
}

fn received(bed: &mut Bed, handle: SocketHandle) -> Vec<u8> {
    let socket = bed.socket(handle);
    let mut all = Vec::new();
    while socket.can_recv() {
        all.extend(socket.recv(|it| (it.len(), it.to_vec())).unwrap());
    }
    all
}

#[test]
fn a_connection_carries_both_streams_and_the_pod_sees_its_client() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = accepted(&mut bed);
        let remote = bed.socket(handle).remote_endpoint().unwrap();
        assert_eq!(remote, client().into());
        let (up, down) = (pattern(300_000, 1), pattern(400_001, 2));
        bed.fake(id).inbox.extend(&up);
        bed.wake(id);
        let (mut got, mut sent) = (Vec::new(), 0);
        for _ in 0..10_000 {
            got.extend(received(&mut bed, handle));
            sent += bed.socket(handle).send_slice(&down[sent..]).unwrap();
            bed.wait(Duration::from_millis(1));
            if got.len() >= up.len() && bed.host.sockets[&id].outbox.len() >= down.len() {
                break;
            }
        }
        assert!(got == up && bed.host.sockets[&id].outbox == down);
        let counters = bed.egress.counters();
        assert_eq!(
            (counters.open, counters.opened, counters.inbound),
            (1, 1, 1)
        );
        assert_eq!(bed.dropped, []);
    });
}

#[test]
fn the_pod_gets_the_preface_first() {
    both(|| {
        let mut bed = Bed::new();
        let handle = bed.listen(PORT);
        let id = dial_with(&mut bed, tcp(client()), b"PROXY ").unwrap();
        bed.fake(id).inbox.extend(b"hello");
        bed.wait(Duration::from_millis(1));
        assert_eq!(received(&mut bed, handle), b"PROXY hello");
    });
}

#[test]
fn either_end_may_end_its_stream_first() {
    both(|| {
        for pod_first in [true, false] {
            let mut bed = Bed::new();
            let (handle, id) = accepted(&mut bed);
            if pod_first {
                bed.socket(handle).send_slice(b"last").unwrap();
                bed.socket(handle).close();
                bed.settle();
                assert!(bed.host.sockets[&id].shut, "the client is told");
                bed.fake(id).inbox.extend(b"more");
                bed.wake(id);
                assert_eq!(received(&mut bed, handle), b"more");
                bed.fake(id).ended = true;
                bed.wake(id);
            } else {
                bed.fake(id).ended = true;
                bed.wake(id);
                assert_eq!(bed.socket(handle).state(), State::CloseWait);
                bed.socket(handle).send_slice(b"last").unwrap();
                bed.settle();
                assert!(!bed.host.sockets[&id].shut);
                bed.socket(handle).close();
                bed.settle();
            }
            bed.wait(Duration::from_millis(100));
            assert_eq!(bed.host.closed, [(id, false)], "pod first: {pod_first}");
            assert_eq!(bed.egress.counters().reset, 0);
            assert_eq!(bed.egress.poll_at(), None);
        }
    });
}

#[test]
fn a_reset_of_either_end_reaches_the_other() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = accepted(&mut bed);
        bed.socket(handle).abort();
        bed.settle();
        assert_eq!(bed.host.closed, [(id, true)]);

        let mut bed = Bed::new();
        let (handle, id) = accepted(&mut bed);
        bed.fake(id).error = Some(HostError::Reset);
        bed.wake(id);
        assert_eq!(bed.socket(handle).state(), State::Closed);
        assert_eq!(bed.host.closed, [(id, true)]);
        assert_eq!(bed.egress.counters().reset, 1);
    });
}

#[test]
fn a_pod_that_refuses_is_told_of() {
    both(|| {
        let mut bed = Bed::new();
        let id = dial(&mut bed, tcp(client()));
        bed.wait(Duration::from_millis(1));
        assert_eq!(bed.host.dialled, [(id, Err(HostError::Refused))]);
        assert_eq!(bed.host.closed, [(id, true)]);
        let counters = bed.egress.counters();
        assert_eq!((counters.open, counters.refused), (0, 1));
        assert_eq!(bed.egress.poll_at(), None);
    });
}

#[test]
fn a_pod_to_which_there_is_no_way_is_told_of_at_once() {
    both(|| {
        for (reason, error) in [
            (DropReason::NoRoute, HostError::NetUnreachable),
            (DropReason::HostUnreachable, HostError::HostUnreachable),
        ] {
            let mut bed = Bed::new();
            bed.pods.loses = Some(reason);
            let id = dial(&mut bed, tcp(client()));
            bed.pass(Duration::from_millis(1));
            assert_eq!(bed.host.dialled, [(id, Err(error))]);
            assert_eq!(bed.host.closed, [(id, true)]);
            assert_eq!(bed.egress.counters().unreachable, 1);
        }
    });
}

#[test]
fn a_pod_that_does_not_answer_is_asked_again_and_given_up() {
    both(|| {
        let mut bed = Bed::new();
        let id = dial(&mut bed, tcp(client()));
        let mut syns = bed.received().len();
        for _ in 0..29 {
            bed.pass(Duration::from_secs(1));
            syns += bed.received().len();
        }
        assert!((4..=12).contains(&syns), "{syns} SYNs");
        assert_eq!(bed.host.dialled, []);
        bed.pass(Duration::from_secs(1));
        assert_eq!(bed.host.dialled, [(id, Err(HostError::TimedOut))]);
        assert_eq!(bed.host.closed, [(id, true)]);
        assert_eq!(bed.egress.counters().open, 0);
        assert_eq!(bed.egress.poll_at(), None);
    });
}

/// What `from` says of a packet to a pod: an ICMP destination unreachable message.
fn error(from: IpAddr, code: u8, key: FlowKey) -> Vec<u8> {
    let key = Key::try_from(key).unwrap();
    let mut offender = Vec::new();
    let builder = from_to(key.remote.ip(), key.pod.ip());
    let (remote, pod) = (key.remote.port(), key.pod.port());
    match key.protocol {
        Protocol::Tcp => builder.tcp(remote, pod, 1, 1000).write(&mut offender, &[]),
        _ => builder.udp(remote, pod).write(&mut offender, &[]),
    }
    .unwrap();
    offender.truncate(ip_len() + 8);
    unreachable(from, code, key.remote.ip(), &offender)
}

#[test]
fn errors_about_a_syn_count_if_they_come_from_who_may_tell() {
    both(|| {
        let distant = FlowKey {
            pod: SocketAddr::new(far(2), PORT),
            ..tcp(SocketAddr::new(gateway(), 50_000))
        };
        let near = tcp(client());
        let neighbour = pod_at(9);
        let router = far(1);
        for (key, from, code, told) in [
            (near, pod(), of(3, 4), Some(HostError::Refused)),
            (near, neighbour, of(3, 4), None),
            (distant, router, 0, Some(HostError::NetUnreachable)),
            (distant, router, of(1, 3), Some(HostError::HostUnreachable)),
            (distant, router, of(13, 1), Some(HostError::NotPermitted)),
            (distant, pod(), of(1, 3), None),
        ] {
            let mut bed = Bed::new();
            let id = dial(&mut bed, key);
            bed.send(&error(from, code, key));
            let expected: Vec<_> = told.map(|error| (id, Err(error))).into_iter().collect();
            assert_eq!(bed.host.dialled, expected, "{code} from {from}");
            let other = FlowKey {
                remote: server(),
                ..key
            };
            bed.dropped.clear();
            bed.send(&error(from, code, other));
            assert_eq!(bed.dropped, [DropReason::EgressProtocol]);
        }

        let mut bed = Bed::new();
        let (handle, id) = accepted(&mut bed);
        bed.send(&error(pod(), 3, near));
        assert_eq!(bed.dropped, [], "a passing one");
        bed.fake(id).inbox.extend(b"x");
        bed.wake(id);
        assert_eq!(received(&mut bed, handle), b"x");
    });
}

#[test]
fn errors_quote_a_packet_whose_header_can_be() {
    let key = tcp(client());
    let whole = error(pod(), 3, key);
    let offender = &whole[28..];
    let mut with_options = offender.to_vec();
    with_options.splice(20..20, [1, 1, 1, 0]);
    with_options[0] = 0x46;
    let mut too_short = offender.to_vec();
    too_short[0] = 0x44;
    for (offender, is_heard) in [
        (&with_options[..], true),
        (&with_options[..27], false),
        (&too_short, false),
        (&offender[..23], false),
        (&offender[..19], false),
        (&[], false),
    ] {
        let mut bed = Bed::new();
        let id = dial(&mut bed, key);
        bed.send(&unreachable(pod(), 3, client().ip(), offender));
        let refused = (id, Err(HostError::Refused));
        let told: &[_] = if is_heard { &[refused] } else { &[] };
        assert_eq!(bed.host.dialled, told, "{offender:?}");
        let dropped: &[_] = if is_heard {
            &[]
        } else {
            &[DropReason::EgressProtocol]
        };
        assert_eq!(bed.dropped, dropped, "{offender:?}");
    }
}

#[test]
fn an_error_about_a_datagram_is_a_passing_one() {
    both(|| {
        let mut bed = Bed::new();
        let udp = key(Protocol::Udp, client());
        bed.send(&error(pod(), 3, udp));
        assert_eq!(bed.dropped, [DropReason::EgressProtocol], "no flow");
        bed.dropped.clear();
        let id = deliver_with(&mut bed, udp, b"x").unwrap();
        bed.send(&error(pod(), 3, udp));
        assert_eq!(bed.dropped, []);
        assert!(bed.host.sockets.contains_key(&id));
    });
}

#[test]
fn flows_of_a_pod_that_vanishes_end_with_it() {
    both(|| {
        let mut bed = Bed::new();
        let (_, connected) = accepted(&mut bed);
        let dialling = dial(&mut bed, tcp(server()));
        bed.call(|egress, _, host| egress.forget_pod(pod(), host));
        let host = &mut bed.host;
        assert_eq!(host.dialled, [(dialling, Err(HostError::HostUnreachable))]);
        host.closed.sort_unstable();
        assert_eq!(host.closed, [(connected, true), (dialling, true)]);
        assert_eq!(bed.egress.counters().open, 0);
    });
}

#[test]
fn a_full_table_takes_no_more() {
    both(|| {
        let limits = Limits {
            flows: 2,
            ..Limits::default()
        };
        let mut bed = Bed::with(limits, Policy::closed());
        let (_, id) = accepted(&mut bed);
        dial(&mut bed, tcp(SocketAddr::new(gateway(), 0)));
        let full = dial_with(&mut bed, tcp(SocketAddr::new(gateway(), 0)), b"");
        assert_eq!(full, Err(DropReason::EgressTableFull));
        bed.live(EVICTABLE);
        dial(&mut bed, tcp(SocketAddr::new(gateway(), 0)));
        assert_eq!(bed.host.closed, [(id, true)], "the oldest made room");
    });
}

#[test]
fn flows_that_cannot_be_are_not_begun() {
    both(|| {
        let mut bed = Bed::new();
        let nobody = SocketAddr::new(pod(), 0);
        let nowhere = FlowKey {
            pod: nobody,
            ..tcp(client())
        };
        for key in [key(Protocol::Udp, client()), nowhere] {
            let refused = dial_with(&mut bed, key, b"");
            assert_eq!(refused, Err(DropReason::EgressInUse));
        }
        let udp = key(Protocol::Udp, client());
        let from_nobody = SocketAddr::new(client().ip(), 0);
        for key in [
            tcp(client()),
            FlowKey { pod: nobody, ..udp },
            key(Protocol::Udp, from_nobody),
        ] {
            let refused = deliver_with(&mut bed, key, b"x");
            assert_eq!(refused, Err(DropReason::EgressMalformed));
        }
        let other = FlowKey {
            remote: of("[2001:db8::7]:51234", "192.0.2.7:51234")
                .parse()
                .unwrap(),
            ..udp
        };
        let refused = deliver_with(&mut bed, other, b"x");
        assert_eq!(refused, Err(DropReason::EgressFamily));
        let refused = dial_with(&mut bed, other, b"");
        assert_eq!(refused, Err(DropReason::EgressFamily));
        let port = bed.egress.free_port(other);
        assert_eq!(port, Err(DropReason::EgressFamily));
        assert_eq!(bed.egress.find(&other), None);
        assert_eq!(bed.egress.counters(), EgressCounters::default());
    });
}

#[test]
fn a_datagram_has_up_to_all_bytes_that_its_length_can_tell() {
    both(|| {
        let mut bed = Bed::new();
        let most = of(65_507, 65_527);
        let payload = pattern(most + 1, 1);
        let udp = key(Protocol::Udp, client());
        let refused = deliver_with(&mut bed, udp, &payload);
        assert_eq!(refused, Err(DropReason::EgressMalformed));
        deliver_with(&mut bed, udp, &payload[..most]).unwrap();
        let packets = bed.received();
        assert_eq!(packets.len(), 1);
        assert_eq!(packets[0][ip_len() + 8..], payload[..most]);
    });
}

#[test]
fn chosen_ports_are_nobodys_and_differ() {
    both(|| {
        let mut bed = Bed::new();
        let mut ports = std::collections::BTreeSet::new();
        for _ in 0..1000 {
            let id = dial(&mut bed, tcp(SocketAddr::new(gateway(), 0)));
            let port = bed.egress.key(id).unwrap().remote.port();
            assert!(port >= 49_152);
            assert!(ports.insert(port), "{port} twice");
        }
        let key = key(Protocol::Udp, SocketAddr::new(gateway(), 0));
        let one = bed.egress.free_port(key);
        assert_ne!(one, bed.egress.free_port(key), "not the same again at once");
        let taken = *ports.first().unwrap();
        let again = dial_with(&mut bed, tcp(SocketAddr::new(gateway(), taken)), b"");
        assert_eq!(again, Err(DropReason::EgressInUse));
    });
}

#[test]
fn the_last_free_port_is_found() {
    both(|| {
        let limits = Limits {
            flows: 20_000,
            flows_of_pod: 20_000,
            memory: 1 << 20,
            ..Limits::default()
        };
        let mut bed = Bed::with(limits, Policy::closed());
        let key = |port| key(Protocol::Udp, SocketAddr::new(gateway(), port));
        let deliver = |bed: &mut Bed, port| {
            bed.call(|egress, now, host| egress.deliver(now, key(port), b"x", host))
        };
        for port in (49_152..=65_535).filter(|port| *port != 60_001) {
            deliver(&mut bed, port).unwrap();
        }
        assert_eq!(bed.egress.free_port(key(0)), Ok(60_001));
        deliver(&mut bed, 60_001).unwrap();
        assert_eq!(bed.egress.free_port(key(0)), Err(DropReason::EgressInUse));
    });
}

#[test]
fn datagrams_begin_flows_whose_answers_go_back() {
    both(|| {
        let mut bed = Bed::new();
        let deliver = |bed: &mut Bed, remote, payload: &[u8]| {
            deliver_with(bed, key(Protocol::Udp, remote), payload).unwrap()
        };
        let payloads = [pattern(900, 1), Vec::new(), pattern(4000, 2)];
        let ids = payloads
            .each_ref()
            .map(|it| deliver(&mut bed, client(), it));
        assert_eq!(ids, [ids[0]; 3], "one flow");
        let other = deliver(&mut bed, server(), b"other");
        assert_ne!(other, ids[0]);
        let packets = bed.received();
        for (packet, payload) in packets.iter().zip(&payloads) {
            assert_eq!(read(packet).0.destination, pod());
            assert_eq!(read_udp(packet), (client(), PORT, payload.clone()));
        }
        let mut answer = Vec::new();
        from_to(pod(), client().ip())
            .udp(PORT, client().port())
            .write(&mut answer, b"answer")
            .unwrap();
        bed.send(&answer);
        let (_, sent) = bed.host.sockets[&ids[0]].datagrams.as_ref().unwrap();
        assert_eq!(*sent, [b"answer"]);
        let counters = bed.egress.counters();
        assert_eq!((counters.open, counters.inbound), (2, 2));
        bed.pass(Limits::default().udp_idle);
        assert_eq!(bed.egress.counters().open, 0);
        assert_eq!(bed.host.closed.len(), 2);
    });
}

#[test]
fn ports_of_the_gateway_are_for_services_and_refuse_otherwise() {
    both(|| {
        let at = |port| SocketAddr::new(gateway(), port);
        let udp = |from: IpAddr, to: SocketAddr| {
            let mut bytes = Vec::new();
            from_to(from, to.ip())
                .udp(5000, to.port())
                .write(&mut bytes, b"question")
                .unwrap();
            bytes
        };
        let mut bed = Bed::with(Limits::default(), Policy::closed());
        bed.host.serves = vec![(Protocol::Tcp, 53), (Protocol::Udp, 53)];
        let handle = bed.connect(at(53));
        let id = bed.last();
        bed.answer(id, Ok(()));
        assert_eq!(bed.socket(handle).state(), State::Established);
        bed.send(&udp(pod(), at(53)));
        let (_, sent) = bed.host.sockets[&bed.last()].datagrams.as_ref().unwrap();
        assert_eq!(*sent, [b"question"]);
        assert_eq!(bed.dropped, []);

        let refused = bed.connect(at(54));
        assert_eq!(bed.socket(refused).state(), State::Closed);
        bed.send(&udp(pod(), at(54)));
        // Services are for the node's own pods.
        bed.send(&udp(far(2), at(53)));
        assert_eq!(bed.dropped, [DropReason::GatewayPort; 3]);
        let errors: Vec<_> = bed.pods.reports.iter().map(|(error, _)| *error).collect();
        assert_eq!(errors, [IcmpError::PortUnreachable; 2]);
        assert_eq!(bed.egress.counters().open, 2);
        // A question has its answer soon; a connection may wait for the next.
        bed.live(Limits::default().service_idle);
        assert_eq!(bed.egress.counters().open, 1);
    });
}

#[test]
fn with_egress_off_the_network_is_unreachable() {
    both(|| {
        let mut bed = Bed::with(Limits::default(), Policy::closed());
        bed.connect(server());
        assert_eq!(bed.dropped, [DropReason::EgressClosed]);
        assert_eq!(bed.pods.reports[0].0, IcmpError::NetUnreachable);
        // So it is for SCTP, which nothing here speaks.
        let mut packet = Vec::new();
        let sctp = from_to(pod(), server().ip()).udp(1, 2);
        sctp.write(&mut packet, &[]).unwrap();
        packet[of(9, 6)] = 132;
        bed.send(&packet);
        assert_eq!(bed.dropped, [DropReason::EgressClosed; 2]);
        assert_eq!(bed.pods.reports[1], (IcmpError::NetUnreachable, packet));
        assert!(bed.host.sockets.is_empty());
        accepted(&mut bed);
    });
}

#[test]
fn packets_of_flows_that_another_has_are_told_from_those_that_begin() {
    both(|| {
        type Tcp = etherparse::PacketBuilderStep<etherparse::TcpHeader>;
        let build = |to: SocketAddr| from_to(pod(), to.ip());
        let tcp = |to: SocketAddr, flags: fn(Tcp) -> Tcp| {
            let mut bytes = Vec::new();
            let segment = build(to).tcp(PORT, to.port(), 1, 1000);
            flags(segment).write(&mut bytes, &[]).unwrap();
            bytes
        };
        let udp = |from: u16, to: SocketAddr| {
            let mut bytes = Vec::new();
            let datagram = build(to).udp(from, to.port());
            datagram.write(&mut bytes, b"x").unwrap();
            bytes
        };
        let ping = ping(false, (pod(), client().ip()), (1, 2), &[0; 40]);
        let at_gateway = |port| SocketAddr::new(gateway(), port);
        let mut bed = Bed::new();
        let published = SocketAddr::new(pod(), PORT);
        bed.egress.expect_datagrams(published).unwrap();
        bed.egress.share(Owners::new(7).into(), 1);
        let is_stray = |bed: &Bed, packet: &[u8]| bed.egress.elsewhere(packet) == Some(0);
        for (what, packet, stray) in [
            (
                "an answer to a SYN",
                tcp(client(), |it| it.syn().ack(1)),
                true,
            ),
            ("a segment", tcp(client(), |it| it.ack(1)), true),
            ("a reset", tcp(at_gateway(50_000), |it| it.rst()), true),
            ("a SYN", tcp(client(), |it| it.syn()), false),
            ("a published port's datagram", udp(PORT, client()), true),
            ("another port's", udp(PORT + 1, client()), false),
            (
                "an answer to the gateway",
                udp(PORT + 1, at_gateway(50_000)),
                true,
            ),
            ("a question to it", udp(PORT, at_gateway(53)), false),
            (
                "an error about a SYN",
                error(pod(), 3, key(Protocol::Tcp, client())),
                true,
            ),
            ("an echo request", ping, false),
            (
                "what is no packet",
                tcp(client(), |it| it)[..ip_len()].to_vec(),
                false,
            ),
        ] {
            assert_eq!(is_stray(&bed, &packet), stray, "{what}");
        }
        accepted(&mut bed);
        let answer = tcp(client(), |it| it.ack(1));
        assert!(!is_stray(&bed, &answer), "the flow is here");
        let told = error(pod(), 3, key(Protocol::Tcp, client()));
        assert!(!is_stray(&bed, &told), "the flow is here");
        bed.call(|egress, _, host| egress.forget_pod(pod(), host));
        assert!(!is_stray(&bed, &udp(PORT, client())), "published no more");
        bed.egress.share(Owners::new(7).into(), 0);
        let segment = tcp(client(), |it| it.ack(1));
        assert_eq!(bed.egress.elsewhere(&segment), None, "the first has them");
    });
}
