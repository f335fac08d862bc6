//! What traces say, and that they change nothing.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use smoltcp::wire::EthernetAddress;

use super::*;
use crate::addresses::Nets;
use crate::datapath::egress::{Egress, EgressConfig, NoHost, Policy, Rules};
use crate::datapath::frame;
use crate::datapath::icmp::IcmpError;
use crate::datapath::node::{NextHop, NodeConfig};
use crate::datapath::peer::{Path, Peer, PeerId};
use crate::datapath::port::{Attachment, PortId, Rates};
use crate::datapath::rate::RateLimit;
use crate::datapath::tunnel::Tunnel;

const NOW: Instant = Instant::ZERO;
const GATEWAY_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
const OTHER: PeerId = PeerId(0);

fn mac(pod: u8) -> EthernetAddress {
    EthernetAddress([2, 0, 0, 0, 1, pod])
}

fn at(subnet: u8, host: u8) -> IpAddr {
    [10, 244, subnet, host].into()
}

/// A node with pods `.2` and `.3`, and another one with 10.244.2.0/24.
fn path(rates: Rates) -> Datapath {
    let mtu = Mtu::new(1450).unwrap();
    let vtep = |last| VtepMac::from_random([2, 0, 0, 0, 2, last]);
    let tunnel = Tunnel::Vxlan {
        vni: Vni::new(1).unwrap(),
        mac: vtep(1),
        mac_v6: None,
    };
    let config = NodeConfig::new(
        "10.244.1.0/24".parse::<Nets>().unwrap(),
        GATEWAY_MAC,
        tunnel,
        mtu,
        7,
    );
    let mut node = Node::new(config, NOW).unwrap();
    for pod in [2, 3] {
        let attachment = Attachment {
            rates: rates.clone(),
            ..Attachment::new(mac(pod), vec![at(1, pod)])
        };
        node.attach(PortId(pod.into()), attachment);
    }
    let subnet = "10.244.2.0/24".parse().unwrap();
    let address = "192.0.2.2:8472".parse().unwrap();
    node.set_peer(Peer::new(OTHER, subnet, address).with_vtep(vtep(2)));
    let network: IpNet = "10.244.0.0/16".parse().unwrap();
    node.set_egress(Some(Nets::from(network)));
    let mut rules = Rules::default();
    rules.deny.push("203.0.113.0/24".parse().unwrap());
    let mut egress = EgressConfig::new(Policy::new(rules), mtu, 7);
    egress.subnets = Some(Nets::from("10.244.1.0/24".parse::<IpNet>().unwrap()));
    Datapath::new(node, Egress::new(egress, NOW))
}

fn probe(destination: IpAddr) -> Probe {
    Probe {
        source: at(1, 2),
        destination,
        protocol: Protocol::Tcp,
        source_port: 40_000,
        destination_port: 80,
        len: 0,
        ttl: 64,
        dont_fragment: true,
        mark: None,
    }
}

fn trace(path: &Datapath, probe: &Probe, next_hop: EthernetAddress) -> Trace {
    let frame = probe.frame(mac(2), next_hop).unwrap();
    path.trace(NOW, Entrance::Port(PortId(2)), &frame, Header::default())
}

#[test]
fn a_way_to_a_peer_names_the_entries_that_decide() {
    let path = path(Rates::default());
    let trace = trace(&path, &probe(at(2, 9)), GATEWAY_MAC);
    assert!(
        matches!(trace.verdict, Verdict::Peer { id: OTHER, .. }),
        "{trace:?}"
    );
    let prefix = "10.244.2.0/24".parse().unwrap();
    let port = PortId(2);
    let wanted = [
        TraceStep::Guard {
            port,
            guarded: true,
        },
        TraceStep::Switch {
            mac: GATEWAY_MAC,
            to: Switched::Gateway,
        },
        TraceStep::Source {
            address: at(1, 2),
            holder: Holding::Pod(port),
        },
        TraceStep::Route {
            destination: at(2, 9),
            route: Some((prefix, NextHop::Peer(OTHER))),
        },
        TraceStep::Ttl { left: 63 },
        TraceStep::Mtu {
            mtu: 1450,
            len: 40,
            dont_fragment: true,
        },
        TraceStep::Way {
            peer: OTHER,
            address: [192, 0, 2, 2].into(),
            path: Path::Tunnel,
        },
    ];
    assert_eq!(trace.steps[..wanted.len()], wanted);
    assert!(matches!(
        trace.steps[wanted.len()..],
        [TraceStep::Encapsulated { .. }]
    ));
    assert_eq!(trace.packet.len(), 40 + frame::HEADER_LEN + 8);
    assert_eq!(trace.own, []);
}

#[test]
fn steps_end_where_a_packet_is_lost() {
    let path = path(Rates::default());
    let large = Probe {
        len: 1451,
        ..probe(at(2, 9))
    };
    let lost = trace(&path, &large, GATEWAY_MAC);
    assert_eq!(lost.verdict, Verdict::Drop(DropReason::FragmentationNeeded));
    let error = IcmpError::FragmentationNeeded(1450);
    assert_eq!(lost.steps.last(), Some(&TraceStep::Error { error }));
    // Only the error itself, and no step of its own way.
    assert!(
        matches!(lost.own[..], [(Verdict::Port(PortId(2)), _)]),
        "{lost:?}"
    );

    let forged = Probe {
        source: at(1, 3),
        ..probe(at(2, 9))
    };
    let lost = trace(&path, &forged, GATEWAY_MAC);
    assert_eq!(
        lost.verdict,
        Verdict::Drop(DropReason::SourceAddressSpoofed)
    );
    assert_eq!(lost.steps, []);
}

#[test]
fn pieces_are_told_of_once() {
    let path = path(Rates::default());
    let large = Probe {
        len: 4000,
        dont_fragment: false,
        ..probe(at(2, 9))
    };
    let cut = trace(&path, &large, GATEWAY_MAC);
    assert_eq!(cut.verdict, Verdict::Consumed);
    assert_eq!((cut.own.len(), cut.more_own), (3, 0));
    let larger = Probe {
        len: 40_000,
        ..large
    };
    let many = trace(&path, &larger, GATEWAY_MAC);
    assert_eq!((many.own.len(), many.more_own), (16, 13));
    let is_last = |step: &TraceStep| matches!(step, TraceStep::Encapsulated { .. });
    assert_eq!(
        cut.steps.iter().filter(|step| is_last(step)).count(),
        1,
        "{cut:?}"
    );
}

#[test]
fn egress_tells_its_rule_and_what_it_would_do() {
    let path = path(Rates::default());
    let outside = trace(&path, &probe([198, 51, 100, 7].into()), GATEWAY_MAC);
    assert_eq!(outside.verdict, Verdict::Egress);
    let [
        ..,
        TraceStep::Flow {
            is_known: false, ..
        },
        rule,
        socket,
    ] = outside.steps[..]
    else {
        panic!("{outside:?}");
    };
    let all = "0.0.0.0/0".parse().unwrap();
    assert_eq!(
        rule,
        TraceStep::Rule {
            prefix: all,
            allows: true
        }
    );
    let to = "198.51.100.7:80".parse().unwrap();
    assert_eq!(socket, TraceStep::Socket { to });

    let denied = trace(&path, &probe([203, 0, 113, 7].into()), GATEWAY_MAC);
    assert_eq!(denied.verdict, Verdict::Drop(DropReason::EgressDenied));
    let prefix = "203.0.113.0/24".parse().unwrap();
    let rule = TraceStep::Rule {
        prefix,
        allows: false,
    };
    assert_eq!(denied.steps.last(), Some(&rule));
}

#[test]
fn services_of_the_gateway_are_for_its_own_pods() {
    let path = path(Rates::default());
    let gateway = at(1, 1);
    let own = trace(&path, &probe(gateway), GATEWAY_MAC);
    assert_eq!(own.verdict, Verdict::Egress);
    let service = Some(&TraceStep::Service { port: 80 });
    assert_eq!(own.steps.last(), service);

    let from_peer = Probe {
        source: at(2, 9),
        ..probe(gateway)
    };
    let vtep = |last| VtepMac::from_random([2, 0, 0, 0, 2, last]).get();
    let frame = from_peer.frame(vtep(2), vtep(1)).unwrap();
    let datagram = [&[8, 0, 0, 0, 0, 0, 1, 0][..], &frame].concat();
    let entrance = Entrance::Underlay("192.0.2.2:8472".parse().unwrap());
    let foreign = path.trace(NOW, entrance, &datagram, Header::default());
    assert_eq!(foreign.steps.last(), service);
    assert_eq!(foreign.verdict, Verdict::Drop(DropReason::GatewayPort));
}

#[test]
fn nothing_is_changed_by_a_trace() {
    // It lets one packet pass, and then none for a while.
    let limit = RateLimit::new(8, 0).map(Arc::new);
    let mut path = path(Rates {
        from_pod: None,
        to_pod: limit,
    });
    let counters = path.node().counters().clone();
    let tables = |path: &Datapath| {
        let node = path.node();
        let mut neighbours: Vec<_> = node.neighbours().map(|it| format!("{it:?}")).collect();
        neighbours.sort();
        (
            node.fdb().count(),
            neighbours,
            path.egress().counters(),
            path.poll_at(),
        )
    };
    let before = tables(&path);
    let near = probe(at(1, 3));
    for _ in 0..3 {
        let passed = trace(&path, &near, mac(3));
        assert_eq!(passed.verdict, Verdict::Port(PortId(3)));
        let _ = trace(&path, &probe(at(1, 77)), GATEWAY_MAC);
        let _ = trace(&path, &probe([198, 51, 100, 7].into()), GATEWAY_MAC);
    }
    assert_eq!(*path.node().counters(), counters);
    assert_eq!(tables(&path), before);
    assert!(path.poll_output(NOW).is_none());

    // The pod may still send what it may.
    let frame = near.frame(mac(2), mac(3)).unwrap();
    let mut verdicts = [0, 1].map(|_| {
        let mut buffer = vec![0; HEADROOM + frame.len()];
        buffer[HEADROOM..].copy_from_slice(&frame);
        let mut packet = PacketBuf::new(&mut buffer, HEADROOM, frame.len()).unwrap();
        path.from_port(NOW, PortId(2), &mut packet, &mut NoHost)
    });
    verdicts.reverse();
    let limited = Verdict::Drop(DropReason::RateExceeded);
    assert_eq!(verdicts, [limited, Verdict::Port(PortId(3))]);
    assert_eq!(trace(&path, &near, mac(3)).verdict, limited);
}

#[test]
fn probes_are_packets_or_refused() {
    let shortest = probe(at(2, 9)).packet().unwrap();
    assert_eq!(shortest.len(), 40);
    for (protocol, least) in [
        (Protocol::Tcp, 40),
        (Protocol::Udp, 28),
        (Protocol::Icmp, 28),
    ] {
        let of = |len| Probe {
            len,
            protocol,
            ..probe(at(2, 9))
        };
        assert_eq!(of(0).packet().unwrap().len(), least);
        assert_eq!(of(least - 1).packet(), Err(ProbeError::Len { least }));
        assert_eq!(of(65_536).packet(), Err(ProbeError::Len { least }));
        let whole = of(1400).packet().unwrap();
        let headers = etherparse::PacketHeaders::from_ip_slice(&whole).unwrap();
        let transport = headers.transport.unwrap();
        assert_eq!(transport.header_len() + headers.payload.slice().len(), 1380);
    }
    let six = "fd00::1".parse().unwrap();
    let mixed = probe(six);
    let versions = ProbeError::Versions(mixed.source, six);
    assert_eq!(mixed.packet(), Err(versions));
    for (protocol, least) in [
        (Protocol::Tcp, 60),
        (Protocol::Udp, 48),
        (Protocol::Icmp, 48),
    ] {
        let of = |len| Probe {
            source: "fd00::2".parse().unwrap(),
            len,
            protocol,
            ..probe(six)
        };
        assert_eq!(of(0).packet().unwrap().len(), least);
        assert_eq!(of(least - 1).packet(), Err(ProbeError::Len { least }));
        let frame = of(1400).frame(GATEWAY_MAC, GATEWAY_MAC).unwrap();
        let headers = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
        let Some(etherparse::NetHeaders::Ipv6(ip, _)) = headers.net else {
            panic!("{headers:?}")
        };
        let payload = headers.payload.slice();
        let is_right = match headers.transport.unwrap() {
            etherparse::TransportHeader::Tcp(tcp) => {
                tcp.checksum == tcp.calc_checksum_ipv6(&ip, payload).unwrap()
            }
            etherparse::TransportHeader::Udp(udp) => {
                udp.checksum == udp.calc_checksum_ipv6(&ip, payload).unwrap()
            }
            etherparse::TransportHeader::Icmpv6(icmp) => {
                let sum = icmp
                    .icmp_type
                    .calc_checksum(ip.source, ip.destination, payload);
                icmp.checksum == sum.unwrap()
            }
            other => panic!("{other:?}"),
        };
        assert!(is_right, "{protocol:?}");
    }
}

#[test]
fn a_mark_is_found_wherever_the_packet_is() {
    let mark = Mark {
        id: 0x0102_0304_0506_0708,
        sequence: 9,
    };
    for (protocol, least) in [
        (Protocol::Tcp, 60),
        (Protocol::Udp, 48),
        (Protocol::Icmp, 48),
    ] {
        let probe = Probe {
            protocol,
            mark: Some(mark),
            ..probe(at(2, 9))
        };
        let packet = probe.packet().unwrap();
        assert_eq!(packet.len(), least);
        let frame = probe.frame(mac(2), GATEWAY_MAC).unwrap();
        assert_eq!(Mark::find(mark.id, &frame), Some(9));
        assert_eq!(Mark::find(mark.id + 1, &frame), None);
        assert_eq!(Mark::find(mark.id, &frame[..frame.len() - 1]), None);
        let trace = trace(&path(Rates::default()), &probe, GATEWAY_MAC);
        assert!(matches!(trace.verdict, Verdict::Peer { .. }), "{trace:?}");
        assert_eq!(Mark::find(mark.id, &trace.packet), Some(9));
        let short = Probe {
            len: least - 1,
            ..probe
        };
        assert_eq!(short.packet(), Err(ProbeError::Len { least }));
    }
}
