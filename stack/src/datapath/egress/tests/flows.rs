//! What is told of flows.

use super::bed::*;
use super::*;

fn only(bed: &Bed) -> FlowInfo {
    let flows: Vec<_> = bed.egress.flows().collect();
    let [flow] = flows.as_slice() else {
        panic!("{flows:?}");
    };
    *flow
}

#[test]
fn a_connection_tells_how_far_it_is_and_what_it_has_carried() {
    both(|| {
        let mut bed = Bed::new();
        bed.pass(Duration::from_secs(5));
        let handle = bed.connect(server());
        let id = bed.last();
        let flow = only(&bed);
        assert_eq!(
            (flow.key.protocol, flow.key.remote),
            (Protocol::Tcp, server())
        );
        assert_eq!(flow.key.pod.ip(), pod());
        assert_eq!(
            (flow.state, flow.direction),
            (FlowState::Connecting, Direction::Out)
        );
        assert_eq!((flow.since, flow.active), (bed.now, bed.now));

        let began = bed.now;
        bed.pass(Duration::from_secs(1));
        bed.answer(id, Ok(()));
        bed.socket(handle).send_slice(&pattern(700, 1)).unwrap();
        bed.settle();
        bed.fake(id).inbox.extend(pattern(3000, 2));
        bed.wake(id);
        let used = bed.now;
        bed.pass(Duration::from_secs(3));
        let flow = only(&bed);
        assert_eq!(
            (flow.state, flow.since, flow.active),
            (FlowState::Open, began, used)
        );
        assert_eq!((flow.sent, flow.received), (700, 3000));

        bed.socket(handle).close();
        bed.settle();
        assert_eq!(only(&bed).state, FlowState::HalfClosed);
        bed.socket(handle).abort();
        bed.settle();
        assert_eq!(bed.egress.flows().count(), 0);
    });
}

#[test]
fn datagrams_count_by_their_payload() {
    both(|| {
        let mut bed = Bed::new();
        for len in [100, 0, 44] {
            let mut packet = Vec::new();
            from_to(pod(), server().ip())
                .udp(5000, server().port())
                .write(&mut packet, &pattern(len, 1))
                .unwrap();
            bed.send(&packet);
        }
        bed.pass(Duration::from_secs(2));
        let id = bed.last();
        bed.fake(id)
            .received
            .push_back((server(), pattern(1000, 2)));
        bed.wake_quietly(id);
        let flow = only(&bed);
        assert_eq!((flow.sent, flow.received), (144, 1000));
        assert_eq!((flow.state, flow.active), (FlowState::Open, bed.now));
        assert_eq!(flow.since, Instant::ZERO);
    });
}

#[test]
fn a_pod_that_has_its_share_makes_room_by_its_own_flows() {
    both(|| {
        let limits = Limits {
            flows: 10,
            flows_of_pod: 3,
            ..Limits::default()
        };
        let mut bed = Bed::with(limits, Policy::new(Rules::default()));
        let begin = |bed: &mut Bed, pod: IpAddr, port: u16| {
            let mut packet = Vec::new();
            from_to(pod, server().ip())
                .udp(port, server().port())
                .write(&mut packet, b"x")
                .unwrap();
            bed.send(&packet);
            bed.last()
        };
        let neighbour = pod_at(3);
        let theirs = begin(&mut bed, neighbour, 1);
        bed.pass(Duration::from_secs(1));
        let first = begin(&mut bed, pod(), 1);
        begin(&mut bed, pod(), 2);
        begin(&mut bed, pod(), 3);
        begin(&mut bed, pod(), 4);
        assert_eq!(bed.dropped, [DropReason::EgressPodFull]);
        begin(&mut bed, neighbour, 2);
        assert_eq!(bed.egress.counters().open, 5);

        bed.pass(EVICTABLE);
        begin(&mut bed, pod(), 4);
        assert_eq!(bed.host.closed, [(first, true)], "its own oldest");
        assert!(bed.host.sockets.contains_key(&theirs));
        let counters = bed.egress.counters();
        assert_eq!((counters.open, counters.evicted), (5, 1));
        assert_eq!(bed.dropped.len(), 1);
    });
}

#[test]
fn several_workers_have_what_one_has_and_tell_it_as_one() {
    let all = Limits {
        flows: 10,
        flows_of_pod: 7,
        memory: 900,
        ..Limits::default()
    };
    assert_eq!(all.shared(1), all);
    assert_eq!(all.shared(0), all);
    let third = Limits {
        flows: 4,
        flows_of_pod: 3,
        memory: 300,
        ..all
    };
    assert_eq!(all.shared(3), third);

    let counters = |unit| EgressCounters {
        open: unit,
        opened: 2 * unit,
        inbound: 3 * unit,
        refused: 4 * unit,
        unreachable: 5 * unit,
        reset: 6 * unit,
        expired: 7 * unit,
        evicted: 8 * unit,
    };
    let mut sum = counters(1);
    sum.add(&counters(10));
    assert_eq!(sum, counters(11));
}

#[test]
fn a_flow_is_told_in_words() {
    let told = [
        Protocol::Tcp.to_string(),
        Protocol::Udp.to_string(),
        Protocol::Ping.to_string(),
        Direction::Out.to_string(),
        Direction::In.to_string(),
        FlowState::Connecting.to_string(),
        FlowState::Open.to_string(),
        FlowState::HalfClosed.to_string(),
        FlowState::Closing.to_string(),
    ];
    let words = "tcp udp ping out in connecting open half-closed closing";
    assert_eq!(told.join(" "), words);
}

#[test]
fn a_socket_of_a_pod_has_one_mapping_among_workers() {
    both(|| {
        let owners = std::sync::Arc::new(Owners::new(7));
        let mut beds = [Bed::new(), Bed::new()];
        for (bed, worker) in beds.iter_mut().zip(0..) {
            bed.egress.share(owners.clone(), worker);
        }
        let to = |port: u16, last: u8| {
            let mut packet = Vec::new();
            from_to(pod(), outside(last, 80).ip())
                .udp(port, 80)
                .write(&mut packet, b"x")
                .unwrap();
            packet
        };
        let ping =
            |last: u8| super::bed::ping(false, (pod(), outside(last, 0).ip()), (5000, 0), b"x");
        // The kernel brings two destinations of one socket to two workers.
        let [first, second] = &mut beds;
        for packet in [to(5000, 80), ping(80)] {
            second.send(&packet);
            assert_eq!(second.pods.handed_over, []);
        }
        for packet in [to(5000, 81), ping(81)] {
            first.send(&packet);
            let [(1, handed)] = &first.pods.handed_over[..] else {
                panic!("{:?}", first.pods.handed_over);
            };
            assert_eq!(*handed, packet);
            first.pods.handed_over.clear();
            let mut storage = packet.clone();
            let whole = PacketBuf::new(&mut storage, 0, packet.len()).unwrap();
            second
                .call(|egress, now, host| egress.from_sibling(now, &whole, host))
                .unwrap();
        }
        assert_eq!(
            (first.egress.counters().open, second.egress.counters().open),
            (0, 2)
        );
        first.send(&to(5001, 80));
        assert_eq!(first.egress.counters().open, 1, "another socket");
        // When it has ended anybody may have it.
        second.pass(Limits::default().ping_idle);
        second.pass(Limits::default().udp_idle - Limits::default().ping_idle);
        assert_eq!(second.egress.counters().open, 0);
        first.send(&to(5000, 81));
        assert_eq!(first.egress.counters().open, 2);
        assert_eq!(first.pods.handed_over, []);
    });
}

#[test]
fn fragments_are_handed_over_as_the_packet_that_they_are_of() {
    let mut bed = Bed::new();
    bed.egress.share(Owners::new(7).into(), 1);
    let published = SocketAddr::new(pod(), 5000);
    bed.egress.expect_datagrams(published).unwrap();
    let mut packet = Vec::new();
    from_to(pod(), server().ip())
        .udp(5000, 80)
        .write(&mut packet, &pattern(2000, 1))
        .unwrap();
    let piece = |from: usize, to: usize, more: bool| {
        let mut bytes = [&packet[..20], &packet[20 + from..20 + to]].concat();
        let mut header = smoltcp::wire::Ipv4Packet::new_unchecked(&mut bytes);
        header.set_dont_frag(false);
        header.set_more_frags(more);
        header.set_frag_offset(from as u16);
        let len = bytes.len() as u16;
        muslin_encap::ip::v4::set_total_len(&mut bytes, len);
        bytes
    };
    bed.send(&piece(0, 1400, true));
    bed.send(&piece(1400, 2008, false));
    assert_eq!(bed.dropped, []);
    let [(0, whole)] = &bed.pods.handed_over[..] else {
        panic!("{:?}", bed.pods.handed_over);
    };
    assert_eq!(whole[20..], packet[20..]);
    assert_eq!(bed.egress.counters().open, 0);
}
