//! A process that is the node after another one, which still has flows.

use super::bed::*;
use super::*;

const PORT: u16 = 8080;

/// A UDP packet of the pod.
fn udp(from: u16, to: SocketAddr) -> Vec<u8> {
    let mut packet = Vec::new();
    from_to(pod(), to.ip())
        .udp(from, to.port())
        .write(&mut packet, b"hello")
        .unwrap();
    packet
}

fn syn(from: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    from_to(pod(), outside(80, 80).ip())
        .tcp(from, 80, 1, 1000)
        .syn()
        .write(&mut packet, &[])
        .unwrap();
    packet
}

fn ping(identifier: u16) -> Vec<u8> {
    super::bed::ping(false, (pod(), server().ip()), (identifier, 0), b"x")
}

/// The pod says that it does not take a packet that came to it by a flow of this packet.
fn refusal(packet: &[u8]) -> Vec<u8> {
    let mut reversed = packet.to_vec();
    let addresses = if is_v6() { 8 } else { 12 };
    let len = (ip_len() - addresses) / 2;
    reversed[addresses..ip_len()].rotate_left(len);
    reversed[ip_len()..ip_len() + 4].rotate_left(2);
    unreachable(pod(), of(3, 4), server().ip(), &reversed)
}

fn at(last: u8) -> SocketAddr {
    outside(last, 80)
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
    both(|| {
        let (mut old, mut new) = (Bed::new(), Bed::new());
        for packet in [syn(5000), udp(5000, at(80)), ping(5000)] {
            old.send(&packet);
        }
        assert_eq!(old.egress.counters().open, 3);
        new.egress.succeed(old.egress.keys());
        // One mapping sends to anybody.
        for packet in [
            syn(5000),
            udp(5000, at(80)),
            udp(5000, at(81)),
            ping(5000),
            refusal(&udp(5000, at(80))),
            refusal(&syn(5000)),
        ] {
            assert!(handed(&mut new, &packet), "{packet:?}");
            old.send(&packet);
        }
        assert_eq!(old.egress.counters().open, 3);
        assert_eq!(new.egress.counters().open, 0);
        for packet in [syn(5001), udp(5001, at(80)), ping(5001)] {
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
    });
}

#[test]
fn a_socket_asks_the_gateways_services_of_today() {
    both(|| {
        let (mut old, mut new) = (Bed::new(), Bed::new());
        let question = udp(5000, SocketAddr::new(gateway(), 53));
        for bed in [&mut old, &mut new] {
            bed.host.serves.push((Protocol::Udp, 53));
        }
        old.send(&question);
        assert_eq!(old.egress.counters().open, 1);
        new.egress.succeed(old.egress.keys());
        assert!(!handed(&mut new, &question));
        assert_eq!(new.egress.counters().open, 1);
    });
}

#[test]
fn clients_of_published_ports_have_other_ports_than_those_of_before() {
    both(|| {
        let (mut old, mut new) = (Bed::new(), Bed::new());
        let published = SocketAddr::from((pod(), PORT));
        let key = |port| FlowKey {
            protocol: Protocol::Udp,
            pod: published,
            remote: (gateway(), port).into(),
        };
        for bed in [&mut old, &mut new] {
            bed.egress.expect_datagrams(published).unwrap();
        }
        let port = old.egress.free_port(key(0)).unwrap();
        let id = old.call(|egress, now, host| egress.deliver(now, key(port), b"hello", host));
        old.host.adopt_datagrams(id.unwrap());
        new.egress.succeed(old.egress.keys());
        // The same numbers were drawn.
        assert_ne!(new.egress.free_port(key(0)).unwrap(), port);
        let answer = udp(PORT, SocketAddr::new(gateway(), port));
        assert!(handed(&mut new, &answer));
    });
}
