//! TCP connections of pods.

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;

use super::bed::*;
use super::*;

/// Sends bytes from the pod until all are with the host.
fn upload(bed: &mut Bed, handle: SocketHandle, id: FlowId, bytes: &[u8]) {
    let mut sent = 0;
    for _ in 0..10_000 {
        sent += bed.socket(handle).send_slice(&bytes[sent..]).unwrap();
        bed.wait(Duration::from_millis(1));
        if bed.host.sockets[&id].outbox.len() >= bytes.len() {
            break;
        }
    }
    let outbox = std::mem::take(&mut bed.fake(id).outbox);
    assert!(outbox == bytes, "another content");
}

/// What the pod gets until so many bytes are there.
fn download(bed: &mut Bed, handle: SocketHandle, len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for _ in 0..10_000 {
        while bed.socket(handle).can_recv() {
            let socket = bed.socket(handle);
            let received = socket.recv(|bytes| (bytes.len(), bytes.to_vec()));
            all.extend(received.unwrap());
        }
        if all.len() >= len {
            return all;
        }
        bed.wait(Duration::from_millis(1));
    }
    panic!("only {} of {len} bytes", all.len());
}

#[test]
fn a_connection_is_answered_when_the_hosts_is_there_and_carries_both_streams() {
    both(|| {
        let mut bed = Bed::new();
        let handle = bed.connect(server());
        assert_eq!(bed.socket(handle).state(), State::SynSent);
        let id = bed.last();
        assert_eq!(bed.host.sockets[&id].to, Some(server()));
        bed.wake(id);
        assert_eq!(bed.socket(handle).state(), State::SynSent, "not decided");
        bed.answer(id, Ok(()));
        assert_eq!(bed.socket(handle).state(), State::Established);

        let (up, down) = (pattern(700_000, 1), pattern(900_001, 2));
        upload(&mut bed, handle, id, &up);
        bed.fake(id).inbox.extend(&down);
        bed.wake(id);
        assert!(download(&mut bed, handle, down.len()) == down);
        assert!(
            bed.pods.longest > 30_000,
            "large segments: {}",
            bed.pods.longest
        );
        assert_eq!(bed.egress.counters().open, 1);
        assert_eq!(bed.dropped, []);
    });
}

#[test]
fn who_asks_again_while_the_host_connects_has_one_connection() {
    both(|| {
        let mut bed = Bed::new();
        let handle = bed.connect(server());
        let id = bed.last();
        bed.wait(Duration::from_secs(5));
        assert_eq!((bed.host.sockets.len(), bed.last()), (1, id));
        let key = bed.egress.key(id).unwrap();
        assert_eq!(bed.egress.find(&key), Some(id));
        bed.answer(id, Ok(()));
        bed.wait(Duration::from_secs(1));
        assert_eq!(bed.socket(handle).state(), State::Established);
    });
}

#[test]
fn a_refusal_resets() {
    both(|| {
        let mut bed = Bed::new();
        let handle = bed.connect(server());
        let id = bed.last();
        bed.answer(id, Err(HostError::Refused));
        assert_eq!(bed.socket(handle).state(), State::Closed);
        assert_eq!(bed.host.closed, [(id, false)]);
        assert_eq!(bed.pods.reports, []);
        let counters = bed.egress.counters();
        assert_eq!((counters.open, counters.refused), (0, 1));
        assert_eq!(bed.egress.poll_at(), None);
    });
}

#[test]
fn unreachable_is_told_by_an_error_about_the_syn() {
    both(|| {
        for (error, icmp) in [
            (HostError::NetUnreachable, IcmpError::NetUnreachable),
            (HostError::HostUnreachable, IcmpError::HostUnreachable),
            (HostError::NotPermitted, IcmpError::Prohibited),
        ] {
            for at_once in [false, true] {
                let mut bed = Bed::new();
                bed.host.refuses = at_once.then_some(error);
                bed.connect(server());
                if !at_once {
                    let id = bed.last();
                    bed.answer(id, Err(error));
                }
                let [(reported, offender)] = bed.pods.reports.as_slice() else {
                    panic!("{:?}", bed.pods.reports);
                };
                assert_eq!(*reported, icmp);
                let (ip, rest) = read(offender);
                assert_eq!(ip.source, pod());
                assert_eq!(ip.destination, server().ip());
                let (tcp, _) = etherparse::TcpHeader::from_slice(rest).unwrap();
                assert!(tcp.syn && !tcp.ack && tcp.destination_port == server().port());
                assert_eq!(bed.egress.counters().unreachable, 1);
                assert_eq!(bed.egress.counters().open, 0);
            }
        }
    });
}

#[test]
fn a_host_without_sockets_and_a_host_that_waits_in_vain_are_silent() {
    both(|| {
        let mut bed = Bed::new();
        bed.host.refuses = Some(HostError::Failed);
        bed.connect(server());
        assert_eq!(bed.dropped, [DropReason::EgressHostFailed]);

        let mut bed = Bed::new();
        bed.connect(server());
        let id = bed.last();
        bed.answer(id, Err(HostError::TimedOut));
        assert_eq!(bed.pods.reports, []);
        assert!(bed.pods.packets.is_empty());
        assert_eq!(bed.egress.counters().unreachable, 1);
    });
}

#[test]
fn a_connection_that_is_refused_at_once_is_refused_as_one_that_is_refused_later() {
    both(|| {
        let mut bed = Bed::new();
        bed.host.refuses = Some(HostError::Refused);
        let handle = bed.connect(server());
        assert_eq!(bed.socket(handle).state(), State::Closed);
        assert_eq!(bed.dropped, []);
        assert_eq!(bed.egress.counters().refused, 1);
    });
}

#[test]
fn what_comes_with_a_syn_waits_until_the_connection_is_there() {
    both(|| {
        let mut bed = Bed::new();
        let mut syn = Vec::new();
        from_to(pod(), server().ip())
            .tcp(1000, server().port(), 76, 1000)
            .syn()
            .write(&mut syn, b"early")
            .unwrap();
        bed.send(&syn);
        assert_eq!(bed.egress.counters().opened, 1);
        assert_eq!(bed.egress.poll_at(), Some(bed.now + CONNECT_LIMIT));
        let id = bed.last();
        bed.fake(id).connected = Some(Ok(()));
        bed.wake_quietly(id);
        let answers = bed.received();
        let (_, rest) = read(&answers[0]);
        let (answer, _) = etherparse::TcpHeader::from_slice(rest).unwrap();
        assert!(answer.syn && answer.ack);
        // It sends that again.
        assert_eq!(answer.acknowledgment_number, 77);
        assert!(bed.fake(id).outbox.is_empty());
    });
}

#[test]
fn the_pods_stream_ends_first() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        let request = pattern(10_000, 3);
        upload(&mut bed, handle, id, &request);
        bed.socket(handle).close();
        bed.wait(Duration::from_millis(20));
        assert!(bed.host.sockets[&id].shut);
        assert_eq!(bed.socket(handle).state(), State::FinWait2);

        let answer = pattern(200_000, 4);
        bed.fake(id).inbox.extend(&answer);
        bed.fake(id).ended = true;
        bed.wake(id);
        assert!(download(&mut bed, handle, answer.len()) == answer);
        bed.settle();
        assert_eq!(bed.socket(handle).state(), State::TimeWait);
        assert_eq!(bed.host.closed, [(id, false)]);
        assert_eq!(bed.egress.counters().open, 0);
    });
}

#[test]
fn what_a_pod_sends_behind_its_end_goes_nowhere() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        upload(&mut bed, handle, id, b"all");
        let port = bed.socket(handle).local_endpoint().unwrap().port;
        bed.socket(handle).close();
        bed.pod.poll(bed.now);
        let fin = bed.pod.device.outgoing.pop_front().unwrap();
        bed.send(&fin);
        assert!(bed.fake(id).shut);
        let (_, rest) = read(&fin);
        let (fin, _) = etherparse::TcpHeader::from_slice(rest).unwrap();
        let behind = from_to(pod(), server().ip())
            .tcp(port, server().port(), fin.sequence_number + 1, 1000)
            .ack(fin.acknowledgment_number);
        let mut packet = Vec::new();
        behind.write(&mut packet, b"more").unwrap();
        bed.send(&packet);
        bed.wake_quietly(id);
        assert_eq!(bed.fake(id).outbox, b"");
        assert_eq!(bed.host.closed, []);
    });
}

#[test]
fn the_hosts_stream_ends_first() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        let greeting = pattern(5000, 5);
        bed.fake(id).inbox.extend(&greeting);
        bed.fake(id).ended = true;
        bed.wake(id);
        assert!(download(&mut bed, handle, greeting.len()) == greeting);
        assert_eq!(bed.socket(handle).state(), State::CloseWait);
        assert_eq!(bed.host.closed, []);

        let answer = pattern(150_000, 6);
        upload(&mut bed, handle, id, &answer);
        bed.socket(handle).close();
        bed.settle();
        assert_eq!(bed.socket(handle).state(), State::Closed);
        assert_eq!(bed.host.closed, [(id, false)]);
        assert_eq!(bed.egress.counters().reset, 0);
    });
}

#[test]
fn a_slow_host_gets_the_whole_stream_of_a_pod_that_has_gone() {
    both(|| {
        for host_first in [true, false] {
            let mut bed = Bed::new();
            let (handle, id) = bed.established();
            let bytes = pattern(50_000, 7);
            bed.fake(id).room = 1000;
            if host_first {
                bed.fake(id).ended = true;
                bed.wake(id);
            }
            bed.socket(handle).send_slice(&bytes).unwrap();
            bed.socket(handle).close();
            bed.settle();
            if !host_first {
                bed.fake(id).ended = true;
                bed.wake(id);
            }
            // Long enough for the pod's side of the connection to be over and forgotten.
            bed.wait(Duration::from_secs(60));
            assert_eq!(bed.host.closed, [], "host first: {host_first}");
            bed.fake(id).room = bytes.len() - 1001;
            bed.wake(id);
            assert!(bed.host.sockets[&id].outbox == bytes[..bytes.len() - 1]);
            bed.wake(id);
            assert!(!bed.host.sockets[&id].shut);
            bed.fake(id).room = 1;
            bed.wake(id);
            assert_eq!(bed.host.closed, [(id, false)], "host first: {host_first}");
            assert_eq!(bed.egress.counters().reset, 0);
        }
    });
}

#[test]
fn a_pod_is_told_of_the_hosts_end_again_while_the_host_is_slow() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        bed.fake(id).room = 1000;
        bed.socket(handle).send_slice(&pattern(50_000, 7)).unwrap();
        bed.socket(handle).close();
        bed.settle();
        bed.fake(id).ended = true;
        bed.wake_quietly(id);
        assert_eq!(bed.received().len(), 1);
        for _ in 0..10 {
            bed.pass(Duration::from_secs(1));
        }
        let again = bed.received();
        assert!((2..=9).contains(&again.len()), "{} packets", again.len());
        for packet in again {
            let (_, rest) = read(&packet);
            assert!(etherparse::TcpHeader::from_slice(rest).unwrap().0.fin);
        }
    });
}

#[test]
fn a_pod_without_a_window_that_has_all_is_not_probed() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        bed.socket(handle).send_slice(b"x").unwrap();
        bed.pod.poll(bed.now);
        let sent = bed.pod.device.outgoing.pop_front().unwrap();
        bed.send(&sent);
        let (_, rest) = read(&sent);
        let (sent, _) = etherparse::TcpHeader::from_slice(rest).unwrap();
        let acknowledges = |bed: &mut Bed, more: u32| {
            let builder = from_to(pod(), server().ip())
                .tcp(
                    sent.source_port,
                    server().port(),
                    sent.sequence_number + 1,
                    0,
                )
                .ack(sent.acknowledgment_number + more);
            let mut packet = Vec::new();
            builder.write(&mut packet, &[]).unwrap();
            bed.send(&packet);
        };
        acknowledges(&mut bed, 0);
        bed.received();
        bed.fake(id).inbox.extend(b"y");
        bed.fake(id).ended = true;
        bed.wake_quietly(id);
        assert_eq!(bed.received().len(), 0, "there is no window");
        let probe = (0..20).find_map(|_| {
            bed.pass(Duration::from_millis(500));
            bed.received()
                .into_iter()
                .find(|packet| packet.len() > ip_len() + 20)
        });
        let probe = probe.expect("it is probed");
        let (_, rest) = read(&probe);
        let (probe, data) = etherparse::TcpHeader::from_slice(rest).unwrap();
        assert!(probe.fin && data == b"y");
        acknowledges(&mut bed, 2);
        for _ in 0..10 {
            bed.pass(Duration::from_secs(10));
        }
        assert_eq!(bed.received().len(), 0);
        // The other stream goes on.
        assert_eq!(bed.fake(id).outbox, b"x");
        assert_eq!(bed.egress.counters().open, 1);
    });
}

#[test]
fn a_reset_is_passed_on() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        bed.fake(id).error = Some(HostError::Reset);
        bed.wake(id);
        assert_eq!(bed.socket(handle).state(), State::Closed);
        assert_eq!(bed.host.closed, [(id, true)]);

        let (handle, id) = bed.established();
        bed.socket(handle).abort();
        bed.settle();
        assert_eq!(bed.host.closed.last(), Some(&(id, true)));
        assert_eq!(bed.egress.counters().reset, 2);
        assert_eq!(bed.egress.counters().open, 0);

        // When one stream has ended, too.
        let (handle, id) = bed.established();
        bed.socket(handle).close();
        bed.settle();
        assert!(bed.fake(id).shut);
        bed.socket(handle).abort();
        bed.settle();
        assert_eq!(bed.host.closed.last(), Some(&(id, true)));
        let (handle, id) = bed.established();
        bed.fake(id).ended = true;
        bed.wake(id);
        bed.socket(handle).abort();
        bed.settle();
        assert_eq!(bed.host.closed.last(), Some(&(id, true)));
        assert_eq!(bed.egress.counters().reset, 4);
    });
}

#[test]
fn a_pod_that_gives_up_has_no_socket() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, _) = (bed.connect(server()), bed.last());
        let port = bed.socket(handle).local_endpoint().unwrap().port;
        let mut reset = Vec::new();
        from_to(pod(), server().ip())
            .tcp(port, server().port(), 1, 0)
            .rst()
            .write(&mut reset, &[])
            .unwrap();
        bed.send(&reset);
        assert!(bed.host.sockets.is_empty());
        assert_eq!(bed.egress.counters().open, 0);
    });
}

#[test]
fn what_the_host_does_not_take_stays_with_the_pod() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        bed.fake(id).room = 1000;
        let bytes = pattern(2_000_000, 8);
        let mut sent = 0;
        for _ in 0..200 {
            sent += bed.socket(handle).send_slice(&bytes[sent..]).unwrap();
            bed.wait(Duration::from_millis(20));
        }
        assert_eq!(bed.host.sockets[&id].outbox.len(), 1000);
        assert!(sent < 500_000, "{sent} bytes are on their way");
        while sent < bytes.len() {
            bed.fake(id).room = 50_000;
            bed.wake(id);
            sent += bed.socket(handle).send_slice(&bytes[sent..]).unwrap();
            bed.wait(Duration::from_secs(1));
        }
        bed.fake(id).room = usize::MAX;
        bed.wake(id);
        bed.wait(Duration::from_secs(5));
        assert!(bed.host.sockets[&id].outbox == bytes);
    });
}

#[test]
fn what_the_pod_does_not_take_stays_with_the_host() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        let bytes = pattern(2_000_000, 9);
        bed.fake(id).inbox.extend(&bytes);
        bed.wake(id);
        bed.wait(Duration::from_secs(30));
        let left = bed.host.sockets[&id].inbox.len();
        assert!(left > 1_500_000, "only {left} bytes are left");
        assert!(download(&mut bed, handle, bytes.len()) == bytes);
        assert_eq!(bed.egress.counters().reset, 0);
    });
}

#[test]
fn a_connection_whose_pod_lives_is_not_idle() {
    both(|| {
        for tcp_idle in [Limits::default().tcp_idle, Duration::from_secs(40)] {
            let limits = Limits {
                tcp_idle,
                ..Limits::default()
            };
            let mut bed = Bed::with(limits, Policy::new(Rules::default()));
            let (handle, id) = bed.established();
            bed.wait(tcp_idle * 3);
            assert_eq!(bed.socket(handle).state(), State::Established);
            assert_eq!(bed.egress.counters().open, 1);
            let info = bed.egress.flows().next().unwrap();
            assert_eq!(info.active, Instant::ZERO, "nothing has gone either way");
            upload(&mut bed, handle, id, b"still here");
        }
    });
}

#[test]
fn a_pods_own_keep_alives_are_life() {
    both(|| {
        let limits = Limits {
            tcp_idle: Duration::from_secs(40),
            ..Limits::default()
        };
        let mut bed = Bed::with(limits, Policy::new(Rules::default()));
        let (handle, id) = bed.established();
        let keep_alive = Some(Duration::from_secs(5));
        bed.socket(handle).set_keep_alive(keep_alive);
        for _ in 0..20 {
            bed.wait(Duration::from_secs(6));
            assert_eq!(bed.egress.counters().open, 1);
        }
        upload(&mut bed, handle, id, b"still here");
    });
}

#[test]
fn a_pod_that_is_silent_for_its_time_is_given_up() {
    both(|| {
        let limits = Limits {
            tcp_idle: Duration::from_secs(40),
            ..Limits::default()
        };
        let mut bed = Bed::with(limits, Policy::new(Rules::default()));
        let (_, id) = bed.established();
        let mut asked = 0;
        for _ in 0..40 {
            assert_eq!(bed.egress.counters().open, 1);
            bed.pass(Duration::from_secs(1));
            // Nobody hears what goes to the pod.
            asked += bed.received().len();
        }
        assert!(asked >= 3, "asked {asked} times");
        assert_eq!(bed.host.closed, [(id, true)]);
        assert_eq!(bed.egress.counters().expired, 1);
        assert_eq!(bed.egress.poll_at(), None);
    });
}

#[test]
fn a_process_that_stood_still_resets_nothing() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        bed.pass(Duration::from_secs(11 * 60));
        bed.settle();
        assert_eq!(bed.socket(handle).state(), State::Established);
        upload(&mut bed, handle, id, b"still here");
        // Again and again, for longer than a connection may be silent.
        for _ in 0..20 {
            bed.pass(Duration::from_secs(11 * 60));
            bed.settle();
        }
        upload(&mut bed, handle, id, b"still here");
        assert_eq!(bed.egress.counters().open, 1);

        // A pod that has gone meanwhile is found out, at the time that it takes awake.
        bed.pod.sockets.remove(handle);
        bed.pass(Duration::from_secs(11 * 60));
        bed.pods.packets.clear();
        bed.live(Duration::from_secs(9 * 60));
        assert_eq!(bed.egress.counters().open, 1);
        bed.live(Duration::from_secs(2 * 60));
        assert_eq!(bed.egress.counters().open, 0);
    });
}

#[test]
fn a_pod_that_does_not_answer_is_given_up() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        bed.pod.sockets.remove(handle);
        bed.live(Duration::from_secs(30 * 60));
        assert_eq!(bed.host.closed, [(id, true)]);
        assert_eq!(bed.egress.counters().open, 0);
    });
}

#[test]
fn a_full_table_evicts_the_oldest_idle_flow_and_no_other() {
    both(|| {
        let limits = Limits {
            flows: 3,
            ..Limits::default()
        };
        let mut bed = Bed::with(limits, Policy::new(Rules::default()));
        let mut flows = Vec::new();
        for _ in 0..3 {
            flows.push(bed.established());
            bed.wait(Duration::from_secs(1));
        }
        let refused = bed.connect(server());
        assert_eq!(bed.dropped, [DropReason::EgressTableFull], "none is idle");
        bed.pod.sockets.remove(refused);
        bed.wait(EVICTABLE);
        let (first, id) = flows[0];
        upload(&mut bed, first, id, b"in use");
        bed.established();
        assert_eq!(
            bed.host.closed,
            [(flows[1].1, true)],
            "the oldest is another"
        );
        assert_eq!(bed.socket(flows[1].0).state(), State::Closed);
        assert_eq!(bed.socket(first).state(), State::Established);
        let counters = bed.egress.counters();
        assert_eq!((counters.open, counters.evicted), (3, 1));
    });
}

#[test]
fn a_late_event_is_not_taken_for_another_flows() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        bed.socket(handle).abort();
        bed.settle();
        let other = bed.connect(server());
        let new = bed.last();
        assert_eq!((new.index, new == id), (id.index, false));
        bed.fake(new).connected = Some(Ok(()));
        bed.wake(id);
        assert_eq!(bed.socket(other).state(), State::SynSent);
        bed.wake(new);
        assert_eq!(bed.socket(other).state(), State::Established);
    });
}

#[test]
fn flows_of_a_pod_end_with_it() {
    both(|| {
        let mut bed = Bed::new();
        let (_, id) = bed.established();
        bed.call(|egress, _, host| egress.forget_pod(pod_at(3), host));
        assert_eq!(bed.host.closed, []);
        bed.call(|egress, _, host| egress.forget_pod(pod(), host));
        assert_eq!(bed.host.closed, [(id, true)]);
        assert_eq!(bed.egress.poll_at(), None);
    });
}

#[test]
fn a_pod_that_is_done_may_go_before_the_host_is() {
    both(|| {
        for room in [usize::MAX, 10] {
            let mut bed = Bed::new();
            let (handle, id) = bed.established();
            bed.fake(id).room = room;
            bed.socket(handle).send_slice(b"all there is").unwrap();
            bed.socket(handle).close();
            bed.settle();
            bed.call(|egress, _, host| egress.forget_pod(pod(), host));
            // Of a part nobody is to think that it is the whole.
            assert_eq!(bed.host.closed, [(id, room == 10)]);
            assert_eq!(
                (bed.egress.counters().open, bed.egress.poll_at()),
                (0, None)
            );
        }
    });
}

#[test]
fn what_may_not_be_reached_is_refused_with_an_error() {
    both(|| {
        let mut bed = Bed::new();
        bed.connect(
            of("169.254.169.254:80", "[fd00:ec2::254]:80")
                .parse()
                .unwrap(),
        );
        assert!(bed.host.sockets.is_empty());
        assert_eq!(bed.dropped, [DropReason::EgressDenied]);
        assert_eq!(bed.pods.reports[0].0, IcmpError::Prohibited);
    });
}

#[test]
fn broken_and_foreign_packets_are_dropped() {
    both(|| {
        type Step = etherparse::PacketBuilderStep<etherparse::TcpHeader>;
        let tcp = |flag: fn(Step) -> Step| {
            let mut bytes = Vec::new();
            let header = from_to(pod(), server().ip());
            flag(header.tcp(1000, 80, 1, 1000))
                .write(&mut bytes, b"payload")
                .unwrap();
            bytes
        };
        let syn = tcp(|it| it.syn());
        let mut bed = Bed::new();
        let mut damaged = syn.clone();
        damaged[ip_len() + 20] ^= 1;
        bed.send(&damaged);
        let mut other = syn.clone();
        other[of(9, 6)] = 132;
        bed.send(&other);
        bed.send(&syn[..ip_len() + 19]);
        assert_eq!(
            bed.dropped,
            [
                DropReason::EgressMalformed,
                DropReason::EgressProtocol,
                DropReason::EgressMalformed,
            ]
        );
        assert_eq!(bed.pods.reports[0].0, IcmpError::ProtocolUnreachable);
        assert!(bed.pods.packets.is_empty() && bed.host.sockets.is_empty());

        bed.send(&tcp(|it| it.ack(77)));
        assert_eq!(bed.dropped.last(), Some(&DropReason::EgressNoFlow));
        let reset = bed.pods.packets.pop_front().unwrap();
        let (ip, rest) = read(&reset);
        let (tcp, _) = etherparse::TcpHeader::from_slice(rest).unwrap();
        assert_eq!((ip.source, tcp.rst), (server().ip(), true));
        assert_eq!((tcp.sequence_number, tcp.destination_port), (77, 1000));
    });
}

#[test]
fn many_idle_connections_need_no_more_than_their_share() {
    let mut bed = Bed::new();
    let count = 3000;
    let open = |bed: &mut Bed| {
        for port in 0..count {
            let mut syn = Vec::new();
            // No pod may have all.
            from_to(pod_at(2 + (port % 2) as u8), server().ip())
                .tcp(1000 + port, 80, 1, 1000)
                .syn()
                .write(&mut syn, &[])
                .unwrap();
            bed.send(&syn);
            let id = bed.last();
            bed.fake(id).connected = Some(Ok(()));
            bed.call(|egress, now, host| egress.ready(now, id, Ready::default(), host));
            bed.pods.packets.clear();
        }
    };
    let info = allocation_counter::measure(|| open(&mut bed));
    assert_eq!(bed.egress.counters().open, u64::from(count));
    let each = info.bytes_current / i64::from(count);
    println!("{each} bytes for each of {count} connections");
    assert!(info.bytes_current < 140 << 20, "{}", info.bytes_current);
}

/// Also on connections that are open when it changes, whether it becomes smaller or larger again.
#[test]
fn segments_fit_another_mtu_at_once() {
    both(|| {
        let mut bed = Bed::new();
        let (handle, id) = bed.established();
        let mut all = Vec::new();
        for mtu in of([600, MTU, 1000], [1280, MTU, 1300]) {
            bed.egress.set_mtu(Mtu::new(mtu.into()).unwrap(), bed.now);
            let bytes = pattern(40_000, mtu as u8);
            bed.fake(id).inbox.extend(&bytes);
            let ready = Ready {
                readable: true,
                writable: false,
            };
            bed.call(|egress, now, host| egress.ready(now, id, ready, host));
            let longest = bed.pods.packets.iter().map(Vec::len).max().unwrap();
            assert_eq!(longest, usize::from(mtu));
            all.extend(bytes);
            let received = download(&mut bed, handle, 40_000);
            assert!(received[..] == all[all.len() - 40_000..], "another content");
        }
        // The pod's own stream goes on, too.
        upload(&mut bed, handle, id, &pattern(50_000, 3));
        // So do connections that begin now.
        let (_, id) = bed.established();
        bed.fake(id).inbox.extend(pattern(40_000, 1));
        let ready = Ready {
            readable: true,
            writable: false,
        };
        bed.call(|egress, now, host| egress.ready(now, id, ready, host));
        assert!(bed.pods.packets.iter().all(|it| it.len() <= of(1000, 1300)));
    });
}

#[test]
fn segments_fit_the_pods_mtu() {
    both(|| {
        let mut bed = Bed::new();
        let (_, id) = bed.established();
        bed.fake(id).inbox.extend(pattern(40_000, 1));
        let ready = Ready {
            readable: true,
            writable: false,
        };
        bed.call(|egress, now, host| egress.ready(now, id, ready, host));
        assert!(bed.pods.packets.len() > 20);
        assert!(bed.pods.packets.iter().all(|it| it.len() <= MTU.into()));
        assert!(
            bed.pods
                .packets
                .iter()
                .any(|it| it.len() == usize::from(MTU))
        );
    });
}
