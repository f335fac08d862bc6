//! What of a pod's header goes on with its datagrams, and what is said of them on their way.

use etherparse::UdpHeader;
use muslin_encap::ip::checksum;

use super::bed::*;
use super::*;

fn router() -> IpAddr {
    outside(1, 0).ip()
}

const USUAL: Marks = Marks {
    ttl: 64,
    dscp: 0,
    dont_fragment: true,
};

fn udp(marks: Marks, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = from_to(pod(), server().ip()).udp(5000, server().port());
    builder.write(&mut bytes, payload).unwrap();
    let tos = marks.dscp << 2 | 1;
    if is_v6() {
        bytes[0] |= tos >> 4;
        bytes[1] = tos << 4;
        bytes[7] = marks.ttl;
    } else {
        bytes[1] = tos;
        bytes[6] = if marks.dont_fragment { 0x40 } else { 0 };
        bytes[8] = marks.ttl;
        let sum = !checksum::sum(&[&bytes[..10], &bytes[12..20]].concat());
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

fn echo(seq: u16) -> Vec<u8> {
    ping(false, (pod(), server().ip()), (77, seq), &pattern(56, 1))
}

fn complains(bed: &mut Bed, error: IcmpError, from: Option<IpAddr>, quoted: &[u8]) {
    complains_of(bed, server(), error, from, quoted);
}

fn complains_of(
    bed: &mut Bed,
    to: SocketAddr,
    error: IcmpError,
    from: Option<IpAddr>,
    quoted: &[u8],
) {
    let id = bed.last();
    let complaint = Complaint {
        error,
        from,
        to,
        len: quoted.len(),
    };
    let socket = bed.fake(id);
    socket.error = Some(match error {
        IcmpError::FragmentationNeeded(_) => HostError::TooLong,
        _ => HostError::HostUnreachable,
    });
    socket.complaints.push_back((complaint, quoted.to_vec()));
}

fn sent(bed: &mut Bed) -> Vec<Vec<u8>> {
    let id = bed.last();
    let sent = bed.fake(id).sent.iter();
    sent.map(|(_, datagram)| datagram.clone()).collect()
}

#[test]
fn a_datagrams_header_goes_on_as_behind_a_router() {
    both(|| {
        let mut bed = Bed::new();
        let marks = [
            USUAL,
            USUAL,
            Marks { ttl: 2, ..USUAL },
            Marks { dscp: 46, ..USUAL },
            // Of IPv6 no router fragments anything.
            Marks {
                dont_fragment: is_v6(),
                ttl: 32,
                ..USUAL
            },
        ];
        for marks in marks {
            bed.send(&udp(marks, b"x"));
        }
        let id = bed.last();
        let told = bed.fake(id).marks.clone();
        let expected = [marks[0], marks[2], marks[3], marks[4]].map(|marks| Marks {
            ttl: marks.ttl - 1,
            ..marks
        });
        assert_eq!(told, expected, "told when it changes");
        bed.send(&echo(1));
        let id = bed.last();
        assert_eq!(bed.fake(id).marks.len(), 1);
        assert_eq!(bed.fake(id).marks[0].ttl, 63);
    });
}

#[test]
fn a_routers_word_about_a_datagram_reaches_the_pod() {
    both(|| {
        for while_reading in [true, false] {
            let mut bed = Bed::new();
            let payload = pattern(400, 1);
            bed.send(&udp(USUAL, &payload));
            complains(&mut bed, IcmpError::TimeExceeded, Some(router()), &payload);
            let id = bed.last();
            if while_reading {
                bed.wake_quietly(id);
            }
            bed.send(&udp(USUAL, b"next"));
            assert_eq!(sent(&mut bed), [payload.as_slice(), b"next"]);
            assert_eq!((&bed.dropped, &bed.pods.reports), (&vec![], &vec![]));
            let [(from, error, offender)] = bed.pods.relayed.as_slice() else {
                panic!("{:?}", bed.pods.relayed);
            };
            assert_eq!((*from, *error), (router(), IcmpError::TimeExceeded));
            let (ip, rest) = read(offender);
            assert_eq!((ip.source, ip.destination), (pod(), server().ip()));
            let (udp, quoted) = UdpHeader::from_slice(rest).unwrap();
            assert_eq!((udp.source_port, udp.destination_port), (5000, 80));
            assert_eq!(quoted, payload);
        }
    });
}

#[test]
fn a_routers_word_about_an_echo_request_has_the_pods_number() {
    both(|| {
        let mut bed = Bed::new();
        bed.send(&echo(3));
        let mut request = sent(&mut bed).remove(0);
        request[4..6].copy_from_slice(&999_u16.to_be_bytes());
        complains(&mut bed, IcmpError::TimeExceeded, Some(router()), &request);
        let id = bed.last();
        bed.wake_quietly(id);
        let [(from, IcmpError::TimeExceeded, offender)] = bed.pods.relayed.as_slice() else {
            panic!("{:?}", bed.pods.relayed);
        };
        assert_eq!(*from, router());
        assert_whole(offender);
        let (_, rest) = read(offender);
        assert_eq!(rest[..2], [of(8, 128), 0]);
        assert_eq!(rest[4..8], [0, 77, 0, 3]);
    });
}

#[test]
fn a_datagram_that_is_too_long_is_told_with_the_mtu() {
    both(|| {
        let mut bed = Bed::new();
        bed.send(&udp(USUAL, b"short"));
        let payload = pattern(1400, 1);
        let error = IcmpError::FragmentationNeeded(1300);
        complains(&mut bed, error, None, &[]);
        bed.send(&udp(USUAL, &payload));
        assert_eq!(bed.dropped, [DropReason::EgressTooLong]);
        assert_eq!(sent(&mut bed), [b"short"], "once is enough");
        let [(told, offender)] = bed.pods.reports.as_slice() else {
            panic!("{:?}", bed.pods.reports);
        };
        assert_eq!(*told, error);
        let headers = ip_len() + 8;
        assert_eq!(offender[headers..], payload[..offender.len() - headers]);
        // A router farther away says it of an earlier one.
        complains(&mut bed, error, Some(router()), &[]);
        bed.send(&udp(USUAL, b"short"));
        assert_eq!(sent(&mut bed).len(), 2);
        assert_eq!(bed.pods.relayed[0].0, router());
        assert_eq!(bed.dropped.len(), 1);
    });
}

#[test]
fn words_about_one_flow_leave_the_others_their_turn() {
    both(|| {
        let mut bed = Bed::new();
        bed.send(&udp(USUAL, b"x"));
        for _ in 0..40 {
            complains(&mut bed, IcmpError::TimeExceeded, Some(router()), b"x");
        }
        let id = bed.last();
        bed.wake_quietly(id);
        assert_eq!(bed.pods.relayed.len(), 16);
    });
}

#[test]
fn the_hosts_loopback_has_the_address_that_the_pod_knows() {
    both(|| {
        let open = server().ip();
        let policy = Policy::new(Rules {
            host_loopback: Some(open.into()),
            ..Rules::default()
        });
        let mut bed = Bed::with(Limits::default(), policy);
        bed.send(&udp(USUAL, b"x"));
        let error = IcmpError::PortUnreachable;
        let to = SocketAddr::new(localhost(), server().port());
        complains_of(&mut bed, to, error, Some(localhost()), b"x");
        let id = bed.last();
        bed.wake_quietly(id);
        assert_eq!(bed.pods.relayed.len(), 1);
        assert_eq!(bed.pods.relayed[0].0, open);
    });
}

#[test]
fn a_complaint_is_about_the_datagram_that_it_quotes() {
    both(|| {
        let mut bed = Bed::new();
        let first = outside(7, 7);
        let secret = of("169.254.169.254:80", "[fd00:ec2::254]:80");
        let secret: SocketAddr = secret.parse().unwrap();
        let mut packet = Vec::new();
        let builder = from_to(pod(), first.ip()).udp(5000, first.port());
        builder.write(&mut packet, b"x").unwrap();
        bed.send(&packet);
        bed.send(&udp(USUAL, b"y"));
        assert_eq!((bed.egress.counters().open, bed.dropped.len()), (1, 0));
        let error = IcmpError::PortUnreachable;
        complains_of(&mut bed, first, error, Some(first.ip()), b"x");
        complains_of(&mut bed, secret, error, Some(secret.ip()), b"z");
        let id = bed.last();
        bed.wake_quietly(id);
        let [(from, _, offender)] = bed.pods.relayed.as_slice() else {
            panic!("{:?}", bed.pods.relayed);
        };
        assert_eq!(*from, first.ip());
        let (ip, rest) = read(offender);
        let (udp, quoted) = UdpHeader::from_slice(rest).unwrap();
        assert_eq!(ip.destination, first.ip());
        assert_eq!((udp.source_port, udp.destination_port), (5000, 7));
        assert_eq!(quoted, b"x");
    });
}
