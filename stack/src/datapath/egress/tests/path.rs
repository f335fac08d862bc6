//! What of a pod's header goes on with its datagrams, and what is said of them on their way.

use etherparse::{Icmpv4Type, IpNumber, Ipv4Header, PacketBuilder, UdpHeader};
use muslin_encap::ip::checksum;

use super::bed::{Bed, POD, SERVER, pattern};
use super::*;

const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

fn header(protocol: IpNumber, marks: Marks) -> Ipv4Header {
    let mut header =
        Ipv4Header::new(0, marks.ttl, protocol, POD.octets(), SERVER.ip().octets()).unwrap();
    header.dscp = marks.dscp.try_into().unwrap();
    header.ecn = 1.try_into().unwrap();
    header.dont_fragment = marks.dont_fragment;
    header
}

const USUAL: Marks = Marks {
    ttl: 64,
    dscp: 0,
    dont_fragment: true,
};

fn udp(marks: Marks, payload: &[u8]) -> Vec<u8> {
    let ip = etherparse::IpHeaders::Ipv4(header(IpNumber::UDP, marks), Default::default());
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ip(ip).udp(5000, SERVER.port());
    builder.write(&mut bytes, payload).unwrap();
    bytes
}

fn echo(seq: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(POD.octets(), SERVER.ip().octets(), 64)
        .icmpv4_echo_request(77, seq)
        .write(&mut bytes, &pattern(56, 1))
        .unwrap();
    bytes
}

fn complains(bed: &mut Bed, error: IcmpError, from: Option<Ipv4Addr>, quoted: &[u8]) {
    complains_of(bed, SERVER, error, from, quoted);
}

fn complains_of(
    bed: &mut Bed,
    to: SocketAddrV4,
    error: IcmpError,
    from: Option<Ipv4Addr>,
    quoted: &[u8],
) {
    let id = bed.last();
    let complaint = Complaint {
        error,
        from: from.map(IpAddr::V4),
        to: to.into(),
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
    let mut bed = Bed::new();
    let marks = [
        USUAL,
        USUAL,
        Marks { ttl: 2, ..USUAL },
        Marks { dscp: 46, ..USUAL },
        Marks {
            dont_fragment: false,
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
}

#[test]
fn a_routers_word_about_a_datagram_reaches_the_pod() {
    for while_reading in [true, false] {
        let mut bed = Bed::new();
        let payload = pattern(400, 1);
        bed.send(&udp(USUAL, &payload));
        complains(&mut bed, IcmpError::TimeExceeded, Some(ROUTER), &payload);
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
        assert_eq!((*from, *error), (ROUTER, IcmpError::TimeExceeded));
        let (ip, rest) = Ipv4Header::from_slice(offender).unwrap();
        assert_eq!(
            (ip.source, ip.destination),
            (POD.octets(), SERVER.ip().octets())
        );
        let (udp, quoted) = UdpHeader::from_slice(rest).unwrap();
        assert_eq!((udp.source_port, udp.destination_port), (5000, 80));
        assert_eq!(quoted, payload);
    }
}

#[test]
fn a_routers_word_about_an_echo_request_has_the_pods_number() {
    let mut bed = Bed::new();
    bed.send(&echo(3));
    let mut request = sent(&mut bed).remove(0);
    request[4..6].copy_from_slice(&999_u16.to_be_bytes());
    complains(&mut bed, IcmpError::TimeExceeded, Some(ROUTER), &request);
    let id = bed.last();
    bed.wake_quietly(id);
    let [(ROUTER, IcmpError::TimeExceeded, offender)] = bed.pods.relayed.as_slice() else {
        panic!("{:?}", bed.pods.relayed);
    };
    let (_, rest) = Ipv4Header::from_slice(offender).unwrap();
    let icmp = etherparse::Icmpv4Slice::from_slice(rest).unwrap();
    let echo = etherparse::IcmpEchoHeader { id: 77, seq: 3 };
    assert_eq!(icmp.icmp_type(), Icmpv4Type::EchoRequest(echo));
    assert_eq!(checksum::compute(rest), 0);
}

#[test]
fn a_datagram_that_is_too_long_is_told_with_the_mtu() {
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
    assert_eq!(offender[28..], payload[..offender.len() - 28]);
    // A router farther away says it of an earlier one.
    complains(&mut bed, error, Some(ROUTER), &[]);
    bed.send(&udp(USUAL, b"short"));
    assert_eq!(sent(&mut bed).len(), 2);
    assert_eq!(bed.pods.relayed[0].0, ROUTER);
    assert_eq!(bed.dropped.len(), 1);
}

#[test]
fn words_about_one_flow_leave_the_others_their_turn() {
    let mut bed = Bed::new();
    bed.send(&udp(USUAL, b"x"));
    for _ in 0..40 {
        complains(&mut bed, IcmpError::TimeExceeded, Some(ROUTER), b"x");
    }
    let id = bed.last();
    bed.wake_quietly(id);
    assert_eq!(bed.pods.relayed.len(), 16);
}

#[test]
fn the_hosts_loopback_has_the_address_that_the_pod_knows() {
    let open = Ipv4Addr::new(192, 0, 2, 80);
    let policy = Policy::new(Rules {
        host_loopback: Some(open.into()),
        ..Rules::default()
    });
    let mut bed = Bed::with(Limits::default(), policy);
    bed.send(&udp(USUAL, b"x"));
    let error = IcmpError::PortUnreachable;
    let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, SERVER.port());
    complains_of(&mut bed, to, error, Some(Ipv4Addr::LOCALHOST), b"x");
    let id = bed.last();
    bed.wake_quietly(id);
    assert_eq!(bed.pods.relayed.len(), 1);
    assert_eq!(bed.pods.relayed[0].0, open);
}

#[test]
fn a_complaint_is_about_the_datagram_that_it_quotes() {
    let mut bed = Bed::new();
    let first: SocketAddrV4 = "198.51.100.7:7".parse().unwrap();
    let secret: SocketAddrV4 = "169.254.169.254:80".parse().unwrap();
    let mut packet = udp(USUAL, b"x");
    packet[16..20].copy_from_slice(&first.ip().octets());
    packet[22..24].copy_from_slice(&first.port().to_be_bytes());
    // Sums are the test's to make; none is a sum as well (RFC 768).
    packet[26..28].fill(0);
    bed.send(&packet);
    bed.send(&udp(USUAL, b"y"));
    assert_eq!((bed.egress.counters().open, bed.dropped.len()), (1, 0));
    let error = IcmpError::PortUnreachable;
    complains_of(&mut bed, first, error, Some(*first.ip()), b"x");
    complains_of(&mut bed, secret, error, Some(*secret.ip()), b"z");
    let id = bed.last();
    bed.wake_quietly(id);
    let [(from, _, offender)] = bed.pods.relayed.as_slice() else {
        panic!("{:?}", bed.pods.relayed);
    };
    assert_eq!(from, first.ip());
    let (ip, rest) = Ipv4Header::from_slice(offender).unwrap();
    let (udp, quoted) = UdpHeader::from_slice(rest).unwrap();
    assert_eq!(ip.destination, first.ip().octets());
    assert_eq!((udp.source_port, udp.destination_port), (5000, 7));
    assert_eq!(quoted, b"x");
}
