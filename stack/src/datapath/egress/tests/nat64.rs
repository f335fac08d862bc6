//! IPv4 for pods that have IPv6 only (NAT64, RFC 6146 and 7915).

use super::bed::{Bed, assert_whole, from_to, pattern, ping, pod, read, read_udp, with};
use super::*;

fn policy(prefix: &str) -> Policy {
    Policy::new(Rules {
        nat64: Some(prefix.parse().unwrap()),
        deny: vec!["198.51.100.0/24".parse().unwrap()],
        networks: vec!["10.244.0.0/16".parse().unwrap()],
        ..Rules::default()
    })
}

fn bed() -> Bed {
    Bed::with(Limits::default(), policy("64:ff9b::/96"))
}

fn v6(test: impl FnOnce()) {
    with(IpVersion::Ipv6, test);
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn udp(port: u16, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = from_to(pod(), to.ip()).udp(port, to.port());
    builder.write(&mut bytes, payload).unwrap();
    bytes
}

#[test]
fn a_connection_goes_to_the_address_that_is_meant() {
    v6(|| {
        let mut bed = bed();
        let handle = bed.connect(at("[64:ff9b::192.0.2.80]:80"));
        let id = bed.last();
        assert_eq!(bed.fake(id).to, Some(at("192.0.2.80:80")));
        bed.answer(id, Ok(()));
        assert!(bed.socket(handle).may_send());
    });
}

#[test]
fn datagrams_have_a_socket_of_each_version() {
    v6(|| {
        let mut bed = bed();
        let meant = at("[64:ff9b::192.0.2.80]:53");
        bed.send(&udp(5000, meant, b"four"));
        let four = bed.last();
        bed.send(&udp(5000, at("[2001:db8::80]:53"), b"six"));
        let six = bed.last();
        assert_ne!(four, six);
        assert_eq!(
            bed.fake(four).sent,
            [(at("192.0.2.80:53"), b"four".to_vec())]
        );
        assert_eq!(
            bed.fake(six).sent,
            [(at("[2001:db8::80]:53"), b"six".to_vec())]
        );
        // Routers of IPv4 may cut what a link of IPv6 would have taken (RFC 7915 section 5.1).
        assert!(!bed.fake(four).marks[0].dont_fragment);
        assert!(bed.fake(six).marks[0].dont_fragment);
        bed.send(&udp(5000, meant, &pattern(1300, 1)));
        assert!(bed.fake(four).marks[1].dont_fragment);
        let mappings: Vec<_> = bed
            .egress
            .keys()
            .map(|key| key.remote.to_string())
            .collect();
        assert!(mappings.contains(&"0.0.0.0:0".to_owned()), "{mappings:?}");

        for from in [
            "192.0.2.80:53",
            "203.0.113.9:9",
            "198.51.100.1:1",
            "10.244.1.9:1",
        ] {
            bed.fake(four)
                .received
                .push_back((at(from), b"answer".to_vec()));
        }
        bed.wake_quietly(four);
        let heard: Vec<_> = bed.received().iter().map(|it| read_udp(it).0).collect();
        assert_eq!(heard, [meant, at("[64:ff9b::203.0.113.9]:9")]);
        assert_eq!(bed.pods.lost[&DropReason::EgressDenied], 2);
    });
}

#[test]
fn a_ping_is_one_of_the_other_version_there_and_back() {
    v6(|| {
        let mut bed = bed();
        let meant: IpAddr = "64:ff9b::192.0.2.80".parse().unwrap();
        bed.send(&ping(false, (pod(), meant), (77, 3), b"payload"));
        let id = bed.last();
        let (to, request) = bed.fake(id).sent.pop().unwrap();
        assert_eq!(
            (to, request[0], &request[8..]),
            (at("192.0.2.80:0"), 8, &b"payload"[..])
        );
        let mut reply = request.clone();
        reply[0] = 0;
        reply[4..6].copy_from_slice(&[9, 9]);
        bed.fake(id).received.push_back((to, reply));
        bed.wake_quietly(id);
        let packets = bed.received();
        assert_whole(&packets[0]);
        assert_eq!(packets[0], ping(true, (meant, pod()), (77, 3), b"payload"));

        // So are errors, from an address that means who says them.
        let complaint = Complaint {
            error: IcmpError::TimeExceeded,
            from: Some("203.0.113.1".parse().unwrap()),
            to,
            len: request.len(),
        };
        bed.fake(id).complaints.push_back((complaint, request));
        bed.fake(id).error = Some(HostError::HostUnreachable);
        bed.wake_quietly(id);
        let [(from, IcmpError::TimeExceeded, offender)] = &bed.pods.relayed[..] else {
            panic!("{:?}", bed.pods.relayed);
        };
        assert_eq!(*from, "64:ff9b::203.0.113.1".parse::<IpAddr>().unwrap());
        assert_whole(offender);
        assert_eq!(read(offender).0.destination, meant);
        assert_eq!(read(offender).1[0], 128);
    });
}

#[test]
fn a_path_of_ipv4_has_room_for_longer_packets_of_ipv6() {
    v6(|| {
        for (mtu, told) in [(1400, 1420), (576, 1280)] {
            let mut bed = bed();
            bed.send(&udp(5000, at("[64:ff9b::192.0.2.80]:53"), b"x"));
            let id = bed.last();
            let complaint = Complaint {
                error: IcmpError::FragmentationNeeded(mtu),
                from: None,
                to: at("192.0.2.80:53"),
                len: 0,
            };
            bed.fake(id).complaints.push_back((complaint, Vec::new()));
            bed.fake(id).error = Some(HostError::TooLong);
            bed.send(&udp(
                5000,
                at("[64:ff9b::192.0.2.80]:53"),
                &pattern(1390, 1),
            ));
            assert_eq!(bed.dropped, [DropReason::EgressTooLong]);
            assert_eq!(bed.pods.reports[0].0, IcmpError::FragmentationNeeded(told));
        }
    });
}

#[test]
fn the_rules_of_ipv4_hold_for_what_is_meant() {
    v6(|| {
        let denied = [
            "198.51.100.7",
            "169.254.169.254",
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "10.244.2.2",
            "10.0.0.1",
            "192.168.1.1",
        ];
        let mut bed = bed();
        for address in denied {
            bed.send(&udp(5000, at(&format!("[64:ff9b::{address}]:53")), b"x"));
        }
        assert_eq!(bed.dropped, [DropReason::EgressDenied; 9]);
        assert!(bed.host.sockets.is_empty());
        // What is not public a prefix of one's own may mean (RFC 6052 section 3.1).
        let mut bed = Bed::with(Limits::default(), policy("2001:db8:64::/96"));
        bed.send(&udp(5000, at("[2001:db8:64::10.0.0.1]:53"), b"x"));
        let id = bed.last();
        assert_eq!(bed.fake(id).sent[0].0, at("10.0.0.1:53"));
        for other in ["[2001:db8:64::10.244.1.1]:53", "[64:ff9b::192.0.2.1]:53"] {
            bed.send(&udp(5000, at(other), b"x"));
        }
        assert_eq!(bed.dropped, [DropReason::EgressDenied; 2]);
    });
}

#[test]
fn both_mappings_of_a_socket_are_one_workers_and_one_process() {
    v6(|| {
        let owners = std::sync::Arc::new(Owners::new(7));
        let (mut first, mut second, mut new) = (bed(), bed(), bed());
        first.egress.share(owners.clone(), 0);
        second.egress.share(owners, 1);
        let packet = udp(5000, at("[64:ff9b::192.0.2.80]:53"), b"x");
        second.send(&packet);
        first.send(&packet);
        assert_eq!(first.pods.handed_over, [(1, packet.clone())]);
        assert_eq!(second.egress.counters().open, 1);
        new.egress.succeed(second.egress.keys());
        new.send(&packet);
        assert_eq!(new.pods.to_predecessor, [packet]);
    });
}
