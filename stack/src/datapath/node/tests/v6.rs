//! The same in IPv6: whole packets through whole nodes, and what must not get through (RFC 4861, RFC
//! 4443, RFC 8200).

use std::net::{Ipv6Addr, SocketAddr};

use muslin_encap::ip::v6;
use muslin_encap::offload::virtio::{Checksum, Gso, Header};
use smoltcp::wire::{Icmpv6Message, Icmpv6Packet, Ipv6Packet, TcpOption, TcpPacket};

use super::*;
use crate::datapath::gateway::LINK_LOCAL;
use crate::datapath::icmp::IcmpError;
use crate::datapath::ndp::{self, Flags, Message};

mod attacks;

const IPV6: u16 = 0x86dd;
/// The peer of IPv6 has another number than that of IPv4.
const V6: u32 = 10;
const MTU: u16 = 1430;

pub(super) fn at(node: u8, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, node.into(), 0, 0, 0, host)
}

fn outer(node: u8) -> SocketAddr {
    SocketAddr::new(
        Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, node.into()).into(),
        8472,
    )
}

fn vtep_v6(node: u8) -> VtepMac {
    VtepMac::from_random([6, 0, 0, 0, 0, node])
}

fn dual_config(number: u8) -> NodeConfig {
    let nets = format!("10.244.{number}.0/24,fd00:0:0:{number}::/64");
    NodeConfig {
        subnet: nets.parse().unwrap(),
        tunnel: Tunnel::Vxlan {
            vni: Vni::new(1).unwrap(),
            mac: vtep(number),
            mac_v6: Some(vtep_v6(number)),
        },
        ..config(number, "vxlan")
    }
}

fn dual_attachment(node: u8, host: u8, guarded: bool) -> Attachment {
    let mut attachment = attachment(node, host, guarded);
    attachment.addresses.push(at(node, host.into()).into());
    attachment
}

pub(super) fn peer_v6(number: u8) -> Peer {
    let id = PeerId(V6 + u32::from(number));
    let subnet = format!("fd00:0:0:{number}::/64").parse().unwrap();
    Peer::new(id, subnet, outer(number)).with_vtep(vtep_v6(number))
}

/// [`node`] in both versions.
pub(super) fn dual(number: u8) -> Node {
    let mut node = observed(dual_config(number)).unwrap();
    node.attach(POD_PORT, dual_attachment(number, 2, true));
    node.attach(OTHER_PORT, dual_attachment(number, 3, true));
    let other = 3 - number;
    node.set_peer(peer(other, &format!("10.244.{other}.0/24")));
    node.set_peer(peer_v6(other));
    node
}

fn echo(source: Ipv6Addr, destination: Ipv6Addr, hop_limit: u8, payload: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv6(source.octets(), destination.octets(), hop_limit)
        .icmpv6_echo_request(5, 6)
        .write(&mut bytes, &vec![9; payload])
        .unwrap();
    bytes
}

fn udp(source: Ipv6Addr, destination: Ipv6Addr, payload: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv6(source.octets(), destination.octets(), 64)
        .udp(1000, 2000)
        .write(&mut bytes, &vec![9; payload])
        .unwrap();
    bytes
}

/// A frame of the pod for the gateway.
fn routed(packet: &[u8]) -> Vec<u8> {
    ethernet(pod_mac(1, 2), GATEWAY_MAC, IPV6, packet)
}

/// A datagram of node 2.
pub(super) fn tunnelled(packet: &[u8]) -> Vec<u8> {
    let inner = ethernet(vtep_v6(2).get(), vtep_v6(1).get(), IPV6, packet);
    vxlan(1, &inner)
}

pub(super) fn from_peer_v6(node: &mut Node, other: u8, datagram: &[u8]) -> (Verdict, Vec<u8>) {
    through(datagram, |packet| {
        node.from_underlay(NOW, outer(other), packet)
    })
}

fn packet_of(frame: &[u8]) -> Ipv6Packet<&[u8]> {
    let view = EthernetFrame::new_checked(frame).unwrap();
    assert_eq!(view.ethertype(), EthernetProtocol::Ipv6);
    Ipv6Packet::new_checked(&frame[frame::HEADER_LEN..]).unwrap()
}

/// Source, destination, type, code, and the 32 bits behind them of an ICMPv6 message in a frame.
fn icmp_of(frame: &[u8]) -> (Ipv6Addr, Ipv6Addr, Icmpv6Message, u8, u32) {
    let ip = packet_of(frame);
    let (source, destination) = (ip.src_addr(), ip.dst_addr());
    let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
    assert!(icmp.verify_checksum(&source, &destination));
    let rest = u32::from_be_bytes(ip.payload()[4..8].try_into().unwrap());
    (source, destination, icmp.msg_type(), icmp.msg_code(), rest)
}

/// The verdict about a frame of the pod, and the one error that it gets.
fn error_of(node: &mut Node, packet: &[u8]) -> (Verdict, Option<(Icmpv6Message, u8, u32)>) {
    let (verdict, _) = from_pod(node, &routed(packet));
    let out = outputs(node);
    assert!(out.len() < 2, "{out:?}");
    let error = out.first().map(|(verdict, frame)| {
        assert_eq!(*verdict, Verdict::Port(POD_PORT));
        let (source, destination, kind, code, rest) = icmp_of(frame);
        assert_eq!(source, at(1, 1));
        assert_eq!(destination, Ipv6Packet::new_unchecked(packet).src_addr());
        assert!(packet_of(frame).payload().len() + v6::HEADER_LEN <= 1280);
        (kind, code, rest)
    });
    (verdict, error)
}

/// A solicitation of a host for `target`, from `::` if it asks whether that is free.
fn solicitation(mac: EthernetAddress, source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    if source.is_unspecified() {
        return neighbour_message(mac, "::", &target.to_string());
    }
    ndp::write_solicitation((mac, source), target, None).to_vec()
}

fn message_of(frame: &[u8]) -> Message {
    Message::parse(&frame[frame::HEADER_LEN..])
        .unwrap()
        .unwrap()
}

#[test]
fn pods_of_two_nodes_ping_each_other() {
    let (mut one, mut two) = (dual(1), dual(2));
    let packet = echo(at(1, 2), at(2, 2), 64, 56);
    let (verdict, datagram) = from_pod(&mut one, &routed(&packet));
    let Verdict::Peer {
        id, destination, ..
    } = verdict
    else {
        panic!("{verdict:?}")
    };
    assert_eq!((id, destination), (PeerId(V6 + 2), outer(2)));
    assert_eq!(datagram.len(), packet.len() + 22);
    assert_eq!(&datagram[8..14], vtep_v6(2).get().as_bytes());
    assert_eq!(&datagram[14..20], vtep_v6(1).get().as_bytes());
    let (verdict, frame) = from_peer_v6(&mut two, 1, &datagram);
    assert_eq!(verdict, Verdict::Port(POD_PORT));
    let view = EthernetFrame::new_checked(&frame[..]).unwrap();
    assert_eq!(
        (view.src_addr(), view.dst_addr()),
        (GATEWAY_MAC, pod_mac(2, 2))
    );
    let ip = packet_of(&frame);
    assert_eq!((ip.src_addr(), ip.dst_addr()), (at(1, 2), at(2, 2)));
    assert_eq!(ip.hop_limit(), 62, "both nodes are routers");
    assert_eq!(ip.payload(), &packet[40..]);
    // Counted for the peer of IPv6 alone.
    let heard = two
        .peers()
        .map(|state| (state.peer.id, state.received.packets));
    assert_eq!(
        heard.collect::<Vec<_>>(),
        [(PeerId(1), 0), (PeerId(V6 + 1), 1)]
    );
    assert_adds_up(&one);
    assert_adds_up(&two);
}

#[test]
fn pods_of_one_node_are_switched_and_routed() {
    let mut node = dual(1);
    let packet = echo(at(1, 2), at(1, 3), 64, 1400);
    let direct = ethernet(pod_mac(1, 2), pod_mac(1, 3), IPV6, &packet);
    let (verdict, frame) = from_pod(&mut node, &direct);
    assert_eq!((verdict, frame), (Verdict::Port(OTHER_PORT), direct));
    let (verdict, frame) = from_pod(&mut node, &routed(&echo(at(1, 2), at(1, 3), 64, 1300)));
    assert_eq!(verdict, Verdict::Port(OTHER_PORT));
    assert_eq!(packet_of(&frame).hop_limit(), 63);
    assert_eq!(&frame[..6], pod_mac(1, 3).as_bytes());
    assert_adds_up(&node);
}

#[test]
fn a_node_of_one_version_takes_no_packet_of_the_other() {
    let unsupported = Verdict::Drop(DropReason::EtherTypeUnsupported);
    let mut four = node(1, "vxlan");
    four.attach(POD_PORT, dual_attachment(1, 2, true));
    let packet = echo(at(1, 2), at(1, 1), 64, 0);
    assert_eq!(from_pod(&mut four, &routed(&packet)).0, unsupported);
    four.set_peer(peer_v6(2));
    assert!(four.peers().any(|state| state.path == Path::Unreachable));
    let foreign = Verdict::Drop(DropReason::DestinationMacForeign);
    assert_eq!(from_peer_v6(&mut four, 2, &tunnelled(&packet)).0, foreign);

    let mut config = dual_config(1);
    config.subnet = "fd00:0:0:1::/64".parse().unwrap();
    let mut six = observed(config).unwrap();
    six.attach(POD_PORT, dual_attachment(1, 2, true));
    for destination in [pod(1, 1), pod(1, 0), pod(2, 2), Ipv4Addr::UNSPECIFIED] {
        let packet = ping(pod(1, 2), destination, 64, 0);
        assert_eq!(from_pod(&mut six, &pod_frame(&packet)).0, unsupported);
    }
    let asks = frame::write_arp(
        ArpOperation::Request,
        (pod_mac(1, 2), pod(1, 2)),
        (EthernetAddress::BROADCAST, pod(1, 1)),
    );
    from_pod(&mut six, &asks);
    assert_eq!(outputs(&mut six), []);
    from_pod(&mut six, &routed(&echo(at(1, 2), at(1, 1), 64, 0)));
    assert_eq!(outputs(&mut six).len(), 1);
    assert_eq!(six.gateway(), Some(IpAddr::from(at(1, 1)).into()));
    assert_adds_up(&four);
    assert_adds_up(&six);
}

#[test]
fn the_gateway_answers_solicitations_for_its_addresses() {
    let mut node = dual(1);
    let (mac, source) = (pod_mac(1, 2), at(1, 2));
    let mut ask = |frame: &[u8]| {
        assert_eq!(from_pod(&mut node, frame).0, Verdict::Consumed);
        let out = outputs(&mut node);
        assert_eq!(out.len(), 1, "{frame:02x?}");
        assert_eq!(out[0].0, Verdict::Port(POD_PORT));
        let Message::Advertisement(said) = message_of(&out[0].1) else {
            panic!("{out:?}")
        };
        assert_eq!(said.mac, Some(GATEWAY_MAC));
        (said.target, said.destination, said.flags, said.source)
    };
    for (own, override_) in [(at(1, 1), true), (LINK_LOCAL, true), (at(1, 0), false)] {
        let flags = Flags {
            router: true,
            solicited: true,
            override_,
        };
        let from = if override_ { own } else { at(1, 1) };
        // To its group, and to the gateway's MAC address: whether it is still there.
        let grouped = solicitation(mac, source, own);
        let alone = ndp::write_solicitation((mac, source), own, Some(GATEWAY_MAC));
        for frame in [&grouped[..], &alone] {
            assert_eq!(ask(frame), (own, source, flags, from), "{own}");
        }
        // Who asks whether it is free hears that it is not (RFC 4862 section 5.4.3).
        let probe = solicitation(mac, Ipv6Addr::UNSPECIFIED, own);
        let (target, to, flags, _) = ask(&probe);
        assert_eq!((target, to, flags.solicited), (own, ndp::ALL_NODES, false));
    }
    assert_adds_up(&node);
}

#[test]
fn a_solicitation_reaches_the_holder_of_its_target_and_nobody_else() {
    let mut node = dual(1);
    let mac = pod_mac(1, 2);
    let mut third = dual_attachment(1, 4, true);
    third.mac = pod_mac(1, 4);
    node.attach(PortId(3), third);
    let unspecified = Ipv6Addr::UNSPECIFIED;
    let of_other: Ipv6Addr = "fe80::858:aff:fef4:103".parse().unwrap();
    for (source, target, expected) in [
        (at(1, 2), at(1, 3), Verdict::Port(OTHER_PORT)),
        // A duplicate is told by its owner.
        (at(1, 2), of_other, Verdict::Port(OTHER_PORT)),
        // Its own: it is not sent back, or every address were taken (RFC 7527).
        (unspecified, at(1, 2), Verdict::Consumed),
        (at(1, 2), at(1, 2), Verdict::Consumed),
        (
            at(1, 2),
            at(1, 9),
            Verdict::Drop(DropReason::UnknownDestination),
        ),
        (
            at(1, 2),
            at(2, 2),
            Verdict::Drop(DropReason::UnknownDestination),
        ),
        (
            at(1, 3),
            at(1, 4),
            Verdict::Drop(DropReason::SourceAddressSpoofed),
        ),
    ] {
        let frame = solicitation(mac, source, target);
        assert_eq!(from_pod(&mut node, &frame).0, expected, "{source} {target}");
    }
    let before = node.neighbours().count();
    // A scan costs nothing that stays (RFC 6583).
    for host in 100..1100 {
        from_pod(&mut node, &solicitation(mac, at(1, 2), at(1, host)));
        from_pod(&mut node, &routed(&echo(at(1, 2), at(1, host), 64, 0)));
    }
    assert_eq!(node.neighbours().count(), before);
    let out = outputs(&mut node);
    assert!(
        out.iter()
            .all(|(verdict, _)| *verdict == Verdict::Port(POD_PORT))
    );
    assert!(out.len() <= 50, "errors are limited: {}", out.len());
    assert_adds_up(&node);
}

#[test]
fn frames_for_groups_go_where_they_belong() {
    let mut node = dual(1);
    let group = |group: &str, packet: Vec<u8>| {
        let mac = ndp::multicast_mac(group.parse().unwrap());
        ethernet(pod_mac(1, 2), mac, IPV6, &packet)
    };
    let to = |group: &str| udp(at(1, 2), group.parse().unwrap(), 9);
    // A report of the groups that a host hears, behind the alert for routers (RFC 9777).
    let mut report = vec![0x60, 0, 0, 0, 0, 36, 0, 1];
    report.extend(
        "fe80::858:aff:fef4:102"
            .parse::<Ipv6Addr>()
            .unwrap()
            .octets(),
    );
    report.extend("ff02::16".parse::<Ipv6Addr>().unwrap().octets());
    report.extend([58, 0, 5, 2, 0, 0, 1, 0]);
    report.extend([143, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0]);
    report.extend("ff02::fb".parse::<Ipv6Addr>().unwrap().octets());
    v6::fill_icmp_checksum(&mut report, 48);
    let solicits = {
        let mut packet = vec![0x60, 0, 0, 0, 0, 8, 58, 255];
        packet.extend(at(1, 2).octets());
        packet.extend("ff02::2".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend([133, 0, 0, 0, 0, 0, 0, 0]);
        v6::fill_icmp_checksum(&mut packet, 40);
        packet
    };
    let flood = Verdict::Flood {
        except: Some(POD_PORT),
    };
    for (frame, expected) in [
        (group("ff02::fb", to("ff02::fb")), flood),
        (group("ff05::1:3", to("ff05::1:3")), flood),
        (group("ff02::2", to("ff02::2")), Verdict::Consumed),
        (group("ff02::2", solicits), Verdict::Consumed),
        (group("ff02::16", report), Verdict::Consumed),
        (
            group("ff02::1", to("ff02::1")),
            Verdict::Drop(DropReason::AllNodesGroup),
        ),
    ] {
        assert_eq!(from_pod(&mut node, &frame).0, expected, "{frame:02x?}");
    }
    // What is for a group in the gateway's frame is not routed.
    let odd = routed(&to("ff05::1:3"));
    let not_unicast = Verdict::Drop(DropReason::DestinationNotUnicast);
    assert_eq!(from_pod(&mut node, &odd).0, not_unicast);
    assert_eq!(outputs(&mut node), []);
    assert_adds_up(&node);
}

#[test]
fn packets_that_cannot_go_on_are_told_so_once() {
    let mut node = dual(1);
    let own = at(1, 2);
    let unreachable = Icmpv6Message::DstUnreachable;
    let outside: Ipv6Addr = "2001:db8::1".parse().unwrap();
    for (packet, reason, error) in [
        (
            echo(own, at(2, 2), 1, 2000 - 48),
            DropReason::TtlExceeded,
            Some((Icmpv6Message::TimeExceeded, 0, 0)),
        ),
        (
            echo(own, outside, 64, 0),
            DropReason::NoRoute,
            Some((unreachable, 0, 0)),
        ),
        (
            echo(own, at(1, 77), 64, 0),
            DropReason::HostUnreachable,
            Some((unreachable, 3, 0)),
        ),
        (
            echo(own, at(2, 2), 64, usize::from(MTU) - 47),
            DropReason::FragmentationNeeded,
            Some((Icmpv6Message::PktTooBig, 0, MTU.into())),
        ),
        (
            echo("fe80::858:aff:fef4:102".parse().unwrap(), at(2, 2), 64, 0),
            DropReason::BeyondScope,
            Some((unreachable, 2, 0)),
        ),
        (
            echo(own, "fe80::858:aff:fef4:103".parse().unwrap(), 64, 0),
            DropReason::BeyondScope,
            None,
        ),
        (
            echo(own, "::1".parse().unwrap(), 64, 0),
            DropReason::DestinationNotUnicast,
            None,
        ),
        (
            echo(own, "::ffff:10.244.1.3".parse().unwrap(), 64, 0),
            DropReason::DestinationNotUnicast,
            None,
        ),
    ] {
        let told = error_of(&mut node, &packet);
        assert_eq!(told, (Verdict::Drop(reason), error), "{reason:?}");
    }
    // As large as the way takes.
    let fits = routed(&echo(own, at(2, 2), 64, usize::from(MTU) - 48));
    assert!(matches!(from_pod(&mut node, &fits).0, Verdict::Peer { .. }));
    // There is no error about an error (RFC 4443 section 2.4 e).
    let mut error = echo(own, outside, 64, 0);
    error[40] = 1;
    v6::fill_icmp_checksum(&mut error, 40);
    let lost = Verdict::Drop(DropReason::NoRoute);
    assert_eq!(error_of(&mut node, &error), (lost, None));
    assert_adds_up(&node);
}

#[test]
fn malformed_packets_are_dropped_for_the_right_reason() {
    use DropReason as Why;
    let good = echo(at(1, 2), at(2, 2), 64, 20);
    let with = |at: usize, value: u8| {
        let mut packet = good.clone();
        packet[at] = value;
        packet
    };
    // Headers in front of what the packet is about.
    let chained = |first: u8, headers: &[u8]| {
        let mut packet = good[..40].to_vec();
        packet.extend(headers);
        packet.extend(&good[40..]);
        packet[5] += headers.len() as u8;
        packet[6] = first;
        packet
    };
    let options = [60, 0, 1, 4, 0, 0, 0, 0];
    let mut too_many = options.repeat(9);
    let last = too_many.len() - 8;
    too_many[last] = 58;
    for (packet, reason) in [
        (good[..39].to_vec(), Why::Ipv6TooShort),
        (with(0, 0x50), Why::Ipv6Version),
        (with(5, good.len() as u8), Why::Ipv6PayloadLen),
        (chained(60, &too_many), Why::Ipv6ExtensionHeaders),
        // A source route (RFC 5095), and hop-by-hop options that are not first.
        (
            chained(43, &[58, 0, 0, 1, 0, 0, 0, 0]),
            Why::Ipv6ExtensionHeaders,
        ),
        (
            chained(60, &[0, 0, 1, 4, 0, 0, 0, 0, 58, 0, 1, 4, 0, 0, 0, 0]),
            Why::Ipv6ExtensionHeaders,
        ),
        (chained(253, &options), Why::Ipv6ExtensionHeaders),
    ] {
        // Behind both doors: that of the pods, and that of peers.
        let mut node = dual(1);
        assert_eq!(
            from_pod(&mut node, &routed(&packet)).0,
            Verdict::Drop(reason),
            "{packet:02x?}"
        );
        let mut turned = packet.clone();
        if let Some(addresses) = turned.get_mut(8..40) {
            addresses[..16].copy_from_slice(&at(2, 2).octets());
            addresses[16..].copy_from_slice(&at(1, 2).octets());
        }
        let (verdict, _) = from_peer_v6(&mut node, 2, &tunnelled(&turned));
        assert_eq!(verdict, Verdict::Drop(reason), "{packet:02x?}");
        assert_adds_up(&node);
    }
    // Few are walked over, and stay as they were.
    let few = chained(60, &[58, 0, 1, 4, 0, 0, 0, 0]);
    let (verdict, _) = from_pod(&mut dual(1), &routed(&few));
    assert!(matches!(verdict, Verdict::Peer { .. }), "{verdict:?}");
}

#[test]
fn a_pod_poses_as_nobody_else() {
    let mut node = dual(1);
    let advertise = |target: Ipv6Addr, to: Ipv6Addr| {
        let flags = Flags {
            override_: true,
            ..Flags::default()
        };
        let to = (ndp::multicast_mac(to), to);
        ndp::write_advertisement((pod_mac(1, 2), at(1, 2)), target, to, flags).to_vec()
    };
    let spoofed = Verdict::Drop(DropReason::SourceAddressSpoofed);
    for target in [at(1, 3), at(1, 1), at(1, 0), at(2, 2)] {
        let frame = advertise(target, ndp::ALL_NODES);
        assert_eq!(from_pod(&mut node, &frame).0, spoofed, "{target}");
    }
    for source in [at(1, 3), at(1, 1), at(2, 2)] {
        let frame = routed(&echo(source, at(2, 2), 64, 0));
        assert_eq!(from_pod(&mut node, &frame).0, spoofed, "{source}");
    }
    for (kind, len) in [(134, 16), (137, 40)] {
        for first in [58, 60, 44] {
            let headers: &[u8] = match first {
                60 => &[58, 0, 1, 4, 0, 0, 0, 0],
                44 => &[58, 0, 0, 0, 0, 0, 0, 7],
                _ => &[],
            };
            let mut message = vec![0; len];
            message[0] = kind;
            let mut packet = vec![0x60, 0, 0, 0, 0, (headers.len() + len) as u8, first, 255];
            packet.extend(
                "fe80::858:aff:fef4:102"
                    .parse::<Ipv6Addr>()
                    .unwrap()
                    .octets(),
            );
            packet.extend(at(1, 3).octets());
            packet.extend(headers);
            packet.extend(&message);
            v6::fill_icmp_checksum(&mut packet, 40 + headers.len());
            for to in [
                pod_mac(1, 3),
                GATEWAY_MAC,
                ndp::multicast_mac(ndp::ALL_NODES),
            ] {
                let frame = ethernet(pod_mac(1, 2), to, IPV6, &packet);
                assert_eq!(
                    from_pod(&mut node, &frame).0,
                    Verdict::Drop(DropReason::RouterAdvertisement),
                    "{kind} behind {first}"
                );
            }
        }
    }
    let places: Vec<_> = node
        .neighbours()
        .map(|(_, place, _)| place.unwrap().mac)
        .collect();
    assert!(
        places
            .iter()
            .all(|mac| [pod_mac(1, 2), pod_mac(1, 3)].contains(mac))
    );
    assert_eq!(outputs(&mut node), []);
    assert_adds_up(&node);
}

#[test]
fn a_peer_sends_from_its_lease_and_to_this_nodes_pods() {
    use DropReason as Why;
    let mut node = dual(1);
    node.set_peer(peer_v6(3));
    let link_local = "fe80::2".parse().unwrap();
    for (from, packet, expected) in [
        (2, echo(at(2, 2), at(1, 2), 9, 0), Ok(POD_PORT)),
        (
            3,
            echo(at(2, 2), at(1, 2), 9, 0),
            Err(Why::SourceNotInLease),
        ),
        (
            2,
            echo(at(1, 3), at(1, 2), 9, 0),
            Err(Why::SourceNotInLease),
        ),
        (
            2,
            echo("2001:db8::2".parse().unwrap(), at(1, 2), 9, 0),
            Err(Why::SourceNotInLease),
        ),
        (2, echo(link_local, at(1, 2), 9, 0), Err(Why::BeyondScope)),
        (2, echo(at(2, 2), LINK_LOCAL, 9, 0), Err(Why::BeyondScope)),
        (
            2,
            echo("::".parse().unwrap(), at(1, 2), 9, 0),
            Err(Why::SourceAddressInvalid),
        ),
        (
            2,
            echo("ff02::1".parse().unwrap(), at(1, 2), 9, 0),
            Err(Why::SourceAddressInvalid),
        ),
        (
            2,
            echo("::ffff:10.244.2.2".parse().unwrap(), at(1, 2), 9, 0),
            Err(Why::SourceAddressInvalid),
        ),
        (2, echo(at(2, 2), at(3, 2), 9, 0), Err(Why::TunnelToTunnel)),
        (
            2,
            echo(at(2, 2), "2001:db8::2".parse().unwrap(), 9, 0),
            Err(Why::TunnelToTunnel),
        ),
        (9, echo(at(2, 2), at(1, 2), 9, 0), Err(Why::UnknownPeer)),
    ] {
        let expected = expected.map_or_else(Verdict::Drop, Verdict::Port);
        let (verdict, _) = from_peer_v6(&mut node, from, &tunnelled(&packet));
        assert_eq!(verdict, expected, "{packet:02x?}");
    }
    // An address of the other version is that of another peer, whatever its node.
    let packet = tunnelled(&echo(at(2, 2), at(1, 2), 9, 0));
    let not_theirs = Verdict::Drop(Why::SourceNotInLease);
    assert_eq!(from_peer(&mut node, 2, &packet).0, not_theirs);
    // Nor does IPv4 come by the VTEP of IPv6.
    let packet = peer_frame(&ping(pod(2, 2), pod(1, 2), 9, 0));
    assert_eq!(from_peer_v6(&mut node, 2, &packet).0, not_theirs);
    for (to, kind, packet, reason) in [
        (
            vtep(1),
            0x86dd,
            echo(at(2, 2), at(1, 2), 9, 0),
            Why::EtherTypeUnsupported,
        ),
        (
            vtep_v6(1),
            0x0800,
            ping(pod(2, 2), pod(1, 2), 9, 0),
            Why::EtherTypeUnsupported,
        ),
        (
            vtep(7),
            0x86dd,
            echo(at(2, 2), at(1, 2), 9, 0),
            Why::DestinationMacForeign,
        ),
    ] {
        let datagram = vxlan(1, &ethernet(vtep_v6(2).get(), to.get(), kind, &packet));
        let (verdict, _) = from_peer_v6(&mut node, 2, &datagram);
        assert_eq!(verdict, Verdict::Drop(reason), "{to} {kind:x}");
    }
    let looped = vxlan(
        1,
        &ethernet(
            vtep_v6(1).get(),
            vtep_v6(1).get(),
            IPV6,
            &echo(at(2, 2), at(1, 2), 9, 0),
        ),
    );
    let own = Verdict::Drop(Why::SourceMacOwn);
    assert_eq!(from_peer_v6(&mut node, 2, &looped).0, own);
    assert_adds_up(&node);
}

#[test]
fn the_gateway_answers_pings_from_pods_and_peers() {
    let mut node = dual(1);
    let link_local = "fe80::858:aff:fef4:102".parse().unwrap();
    for (source, own) in [
        (at(1, 2), at(1, 1)),
        (at(1, 2), at(1, 0)),
        (at(1, 2), LINK_LOCAL),
        (link_local, LINK_LOCAL),
        (link_local, at(1, 1)),
    ] {
        let frame = routed(&echo(source, own, 1, 56));
        assert_eq!(from_pod(&mut node, &frame).0, Verdict::Consumed);
        let out = outputs(&mut node);
        assert_eq!(out.len(), 1, "{source} {own}");
        assert_eq!(out[0].0, Verdict::Port(POD_PORT));
        assert_eq!(&out[0].1[..6], pod_mac(1, 2).as_bytes());
        let (from, to, kind, ..) = icmp_of(&out[0].1);
        assert_eq!((from, to, kind), (own, source, Icmpv6Message::EchoReply));
    }
    let (verdict, _) = from_peer_v6(&mut node, 2, &tunnelled(&echo(at(2, 0), at(1, 1), 9, 0)));
    assert_eq!(verdict, Verdict::Consumed);
    let out = outputs(&mut node);
    assert!(matches!(out[0].0, Verdict::Peer { id: PeerId(12), .. }));
    // One that is longer than the way comes in fragments, of which no router makes any.
    let large = echo(at(1, 2), at(1, 1), 64, 3000);
    from_pod(&mut node, &routed(&large));
    let out = outputs(&mut node);
    let mut whole: Vec<u8> = Vec::new();
    for (verdict, frame) in &out {
        assert_eq!(*verdict, Verdict::Port(POD_PORT));
        let ip = packet_of(frame);
        assert!(frame.len() <= usize::from(MTU) + frame::HEADER_LEN);
        assert_eq!(ip.next_header(), IpProtocol::Ipv6Frag);
        whole.extend(&ip.payload()[8..]);
    }
    assert_eq!(out.len(), 3);
    assert_eq!(whole[4..], large[44..]);
    assert_adds_up(&node);
}

#[test]
fn a_tunnelled_solicitation_for_the_base_is_answered() {
    let mut node = dual(1);
    let asks = |target| {
        let words = ndp::write_solicitation((vtep_v6(2).get(), at(2, 0)), target, None);
        vxlan(1, &words)
    };
    let (verdict, datagram) = from_peer_v6(&mut node, 2, &asks(at(1, 0)));
    assert!(
        matches!(verdict, Verdict::Peer { id: PeerId(12), destination, .. } if destination == outer(2))
    );
    let Message::Advertisement(said) = message_of(&datagram[8..]) else {
        panic!("{datagram:02x?}")
    };
    assert_eq!((said.target, said.mac), (at(1, 0), Some(vtep_v6(1).get())));
    assert_eq!(&datagram[8..14], vtep_v6(2).get().as_bytes());
    for target in [at(1, 2), at(1, 9), LINK_LOCAL] {
        let (verdict, _) = from_peer_v6(&mut node, 2, &asks(target));
        assert_eq!(verdict, Verdict::Drop(DropReason::DestinationMacForeign));
    }
    assert_adds_up(&node);
}

/// What is of IPv4 has no way back to a peer of IPv6.
#[test]
fn arp_over_ipv6_is_not_answered() {
    let mut node = dual(1);
    let ask = frame::write_arp(
        ArpOperation::Request,
        (vtep(2).get(), pod(2, 0)),
        (EthernetAddress::BROADCAST, pod(1, 0)),
    );
    let (verdict, _) = from_peer_v6(&mut node, 2, &vxlan(1, &ask));
    assert_eq!(verdict, Verdict::Drop(DropReason::DestinationMacForeign));
    let (verdict, _) = from_peer(&mut node, 2, &vxlan(1, &ask));
    assert!(matches!(verdict, Verdict::Peer { id: PeerId(2), .. }));
    assert_adds_up(&node);
}

#[test]
fn an_unguarded_pod_is_solicited_and_packets_wait() {
    let mut node = dual(1);
    let mut free = attachment(1, 4, false);
    free.addresses.clear();
    let port = PortId(3);
    node.attach(port, free);
    let packet = routed(&echo(at(1, 2), at(1, 40), 64, 0));
    assert_eq!(from_pod(&mut node, &packet).0, Verdict::Consumed);
    let out = outputs(&mut node);
    assert_eq!(out[0].0, Verdict::Flood { except: None });
    let Message::Solicitation(asked) = message_of(&out[0].1) else {
        panic!("{out:?}")
    };
    assert_eq!(asked.target, at(1, 40));
    assert_eq!((asked.source, asked.mac), (at(1, 1), Some(GATEWAY_MAC)));
    // Its answer brings the packet there. One that a guarded pod gives does not.
    let answer = |mac, solicited| {
        let flags = Flags {
            solicited,
            ..Flags::default()
        };
        let to = (GATEWAY_MAC, at(1, 1));
        ndp::write_advertisement((mac, at(1, 40)), at(1, 40), to, flags)
    };
    let forged = answer(pod_mac(1, 2), true);
    let spoofed = Verdict::Drop(DropReason::SourceAddressSpoofed);
    assert_eq!(from_pod(&mut node, &forged).0, spoofed);
    let mac = EthernetAddress([2, 7, 7, 7, 7, 7]);
    let said = through(&answer(mac, true), |it| node.from_port(NOW, port, it)).0;
    assert_eq!(said, Verdict::Consumed);
    let out = outputs(&mut node);
    assert_eq!((out.len(), out[0].0), (1, Verdict::Port(port)));
    assert_eq!(&out[0].1[..6], mac.as_bytes());
    // Without the flag it moves nowhere (RFC 4861 section 7.2.5).
    let moved = answer(EthernetAddress([2, 7, 7, 7, 7, 8]), false);
    through(&moved, |it| node.from_port(NOW, port, it));
    let (_, frame) = from_pod(&mut node, &packet);
    assert_eq!(&frame[..6], mac.as_bytes());
    // Nobody is asked for three times, and then the sender is told.
    let nobody = routed(&echo(at(1, 2), at(1, 50), 64, 0));
    from_pod(&mut node, &nobody);
    let mut asked = outputs(&mut node).len();
    for second in 1..5 {
        node.handle_timeout(NOW + Duration::from_secs(second));
        let out = outputs(&mut node);
        if let Some((Verdict::Port(POD_PORT), frame)) = out.first() {
            let (_, _, kind, code, _) = icmp_of(frame);
            assert_eq!((kind, code), (Icmpv6Message::DstUnreachable, 3));
            assert_eq!((asked, second), (3, 3));
        } else {
            asked += out.len();
        }
    }
    assert_eq!(node.counters().dropped_for(DropReason::HostUnreachable), 1);
    assert_adds_up(&node);
}

#[test]
fn an_awaited_pod_is_waited_for() {
    let mut node = dual(1);
    node.detach(OTHER_PORT);
    node.await_pods([at(1, 3).into()], NOW + Duration::from_secs(9));
    let packet = routed(&echo(at(1, 2), at(1, 3), 64, 0));
    assert_eq!(from_pod(&mut node, &packet).0, Verdict::Consumed);
    assert_eq!(outputs(&mut node), []);
    node.attach(OTHER_PORT, dual_attachment(1, 3, true));
    let out = outputs(&mut node);
    assert_eq!((out.len(), out[0].0), (1, Verdict::Port(OTHER_PORT)));
    assert_eq!(packet_of(&out[0].1).dst_addr(), at(1, 3));
    assert_adds_up(&node);
}

/// A superpacket of TCP from the pod whose segments have this payload.
fn stream(node: &mut Node, destination: Ipv6Addr, segment: u16) -> Verdict {
    let mut bytes = Vec::new();
    PacketBuilder::ipv6(at(1, 2).octets(), destination.octets(), 64)
        .tcp(1000, 80, 7, 9000)
        .ack(1)
        .write(&mut bytes, &[9; 5000])
        .unwrap();
    let offload = Header {
        gso: Some(Gso {
            kind: GsoKind::TcpV6,
            size: segment,
            ecn: false,
        }),
        checksum: Checksum::Partial {
            start: 14 + 40,
            offset: 16,
        },
        ..Header::default()
    };
    let frame = routed(&bytes);
    let mut storage = vec![0; HEADROOM + frame.len()];
    storage[HEADROOM..].copy_from_slice(&frame);
    let len = frame.len();
    let mut packet = PacketBuf::new(&mut storage, HEADROOM, len)
        .unwrap()
        .with_offload(offload);
    node.from_port(NOW, POD_PORT, &mut packet)
}

#[test]
fn a_superpacket_counts_by_its_segments() {
    let mut node = dual(1);
    let verdict = stream(&mut node, at(2, 2), MTU - 60);
    assert!(matches!(verdict, Verdict::Peer { .. }), "{verdict:?}");
    let too_long = Verdict::Drop(DropReason::FragmentationNeeded);
    assert_eq!(stream(&mut node, at(2, 2), MTU - 59), too_long);
    let (_, _, kind, _, mtu) = icmp_of(&outputs(&mut node)[0].1);
    assert_eq!((kind, mtu), (Icmpv6Message::PktTooBig, MTU.into()));
    // One that has to wait does so in segments.
    let mut free = attachment(1, 4, false);
    free.addresses.clear();
    node.attach(PortId(3), free);
    assert_eq!(stream(&mut node, at(1, 40), 1300), Verdict::Consumed);
    let source = (EthernetAddress([2, 7, 7, 7, 7, 7]), at(1, 40));
    let words = ndp::write_solicitation(source, at(1, 1), None);
    through(&words, |it| node.from_port(NOW, PortId(3), it));
    let out = outputs(&mut node);
    let lens = out
        .iter()
        .filter(|(verdict, _)| *verdict == Verdict::Port(PortId(3)));
    let lens: Vec<_> = lens
        .map(|(_, frame)| packet_of(frame).payload_len())
        .collect();
    // And its own answer.
    assert_eq!(lens, [1320, 1320, 1320, 1120, 32]);
    assert_adds_up(&node);
}

#[test]
fn connections_begin_with_what_the_way_takes() {
    let mut node = dual(1);
    let mut syn = Vec::new();
    PacketBuilder::ipv6(at(1, 2).octets(), at(2, 2).octets(), 64)
        .tcp(1000, 80, 7, 9000)
        .syn()
        .options(&[etherparse::TcpOptionElement::MaximumSegmentSize(9000)])
        .unwrap()
        .write(&mut syn, &[])
        .unwrap();
    let (verdict, datagram) = from_pod(&mut node, &routed(&syn));
    assert!(matches!(verdict, Verdict::Peer { .. }));
    let ip = Ipv6Packet::new_checked(&datagram[22..]).unwrap();
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    assert!(tcp.verify_checksum(&at(1, 2).into(), &at(2, 2).into()));
    let option = TcpOption::parse(tcp.options()).unwrap().1;
    assert_eq!(option, TcpOption::MaxSegmentSize(MTU - 60));
}

#[test]
fn neighbour_discovery_is_no_matter_of_policy() {
    let mut node = dual(1);
    from_pod(&mut node, &solicitation(pod_mac(1, 2), at(1, 2), at(1, 3)));
    let answer = ndp::write_advertisement(
        (pod_mac(1, 2), at(1, 2)),
        at(1, 2),
        (pod_mac(1, 3), at(1, 3)),
        Flags::default(),
    );
    assert_eq!(from_pod(&mut node, &answer).0, Verdict::Port(OTHER_PORT));
    let ask = |node: &mut Node| std::mem::take(&mut node.filter_mut().asked);
    assert_eq!(ask(&mut node), []);
    from_pod(&mut node, &routed(&echo(at(1, 2), at(1, 3), 64, 0)));
    let asked = [
        (Direction::FromPod, POD_PORT),
        (Direction::ToPod, OTHER_PORT),
    ];
    assert_eq!(ask(&mut node), asked);
    from_pod(&mut node, &routed(&echo(at(1, 2), at(2, 2), 64, 0)));
    assert_eq!(ask(&mut node), asked[..1]);
}

#[test]
fn packets_from_and_to_outside() {
    let mut node = dual(1);
    let outside: Ipv6Addr = "2001:db8::1".parse().unwrap();
    let network = "10.244.0.0/16,fd00::/16".parse().unwrap();
    let from_egress =
        |node: &mut Node, packet: &[u8]| through(packet, |packet| node.from_egress(NOW, packet)).0;
    node.set_egress(Some(network));
    // The pod says which one is its own.
    let link_local: Ipv6Addr = "fe80::2".parse().unwrap();
    let words = solicitation(pod_mac(1, 2), link_local, at(1, 1));
    from_pod(&mut node, &words);
    outputs(&mut node);
    let leaves = routed(&echo(at(1, 2), outside, 64, 0));
    assert_eq!(from_pod(&mut node, &leaves).0, Verdict::Egress);
    // Inside there is no way out.
    let inside = echo(at(1, 2), "fd00:0:0:9::1".parse().unwrap(), 64, 0);
    assert_eq!(
        error_of(&mut node, &inside).0,
        Verdict::Drop(DropReason::NoRoute)
    );
    let service = routed(&udp(at(1, 2), at(1, 1), 4));
    assert_eq!(from_pod(&mut node, &service).0, Verdict::Egress);
    let ping = routed(&echo(at(1, 2), at(1, 1), 64, 0));
    assert_eq!(from_pod(&mut node, &ping).0, Verdict::Consumed);
    outputs(&mut node);
    // A host takes this for itself.
    let nobody = routed(&udp(at(1, 2), Ipv6Addr::UNSPECIFIED, 4));
    let dropped = Verdict::Drop(DropReason::DestinationNotUnicast);
    assert_eq!(from_pod(&mut node, &nobody).0, dropped);
    for (packet, expected) in [
        (udp(outside, at(1, 2), 9), Ok(POD_PORT)),
        (udp(at(1, 1), at(1, 2), 9), Ok(POD_PORT)),
        (udp(LINK_LOCAL, at(1, 2), 9), Ok(POD_PORT)),
        (udp(outside, at(2, 2), 9), Err(DropReason::NoRoute)),
        (
            udp(at(2, 2), at(1, 2), 9),
            Err(DropReason::SourceAddressInvalid),
        ),
        (
            udp("fe80::9".parse().unwrap(), at(1, 2), 9),
            Err(DropReason::SourceAddressInvalid),
        ),
        (
            udp(Ipv6Addr::UNSPECIFIED, at(1, 2), 9),
            Err(DropReason::SourceAddressInvalid),
        ),
        (
            udp("::1".parse().unwrap(), at(1, 2), 9),
            Err(DropReason::SourceAddressInvalid),
        ),
        // The pod's own link takes more than the way to peers does.
        (udp(outside, at(1, 2), 1450 - 48), Ok(POD_PORT)),
        (
            udp(LINK_LOCAL, link_local, 1451 - 48),
            Err(DropReason::FragmentationNeeded),
        ),
        (udp(LINK_LOCAL, link_local, 1450 - 48), Ok(POD_PORT)),
        (
            udp(outside, at(1, 2), 1451 - 48),
            Err(DropReason::FragmentationNeeded),
        ),
        (
            udp(at(1, 1), at(2, 2), MTU as usize - 47),
            Err(DropReason::FragmentationNeeded),
        ),
    ] {
        let expected = expected.map_or_else(Verdict::Drop, Verdict::Port);
        assert_eq!(from_egress(&mut node, &packet), expected, "{packet:02x?}");
    }
    let to_peer = from_egress(&mut node, &udp(at(1, 1), at(2, 2), 9));
    assert!(matches!(to_peer, Verdict::Peer { id: PeerId(12), .. }));
    // What a host outside says is said in its name, one inside has none.
    let offender = udp(at(1, 2), outside, 9);
    for (from, expected) in [(outside, outside), (at(2, 7), at(1, 1))] {
        let error = IcmpError::PortUnreachable;
        node.forward_icmp_error(NOW, from.into(), error, &offender);
        let (source, _, kind, code, _) = icmp_of(&outputs(&mut node)[0].1);
        assert_eq!(
            (source, kind, code),
            (expected, Icmpv6Message::DstUnreachable, 4)
        );
    }
    node.forward_icmp_error(NOW, pod(8, 8).into(), IcmpError::TimeExceeded, &offender);
    assert_eq!(icmp_of(&outputs(&mut node)[0].1).0, at(1, 1));
    assert_adds_up(&node);
}

#[test]
fn a_silent_peer_is_asked_whether_it_lives() {
    let (mut one, mut two) = (dual(1), dual(2));
    one.probe(NOW, PeerId(V6 + 2));
    let asked = outputs(&mut one);
    assert_eq!(asked.len(), 2);
    for (verdict, datagram) in asked {
        assert!(matches!(verdict, Verdict::Peer { id: PeerId(12), .. }));
        assert_eq!(from_peer_v6(&mut two, 1, &datagram).0, Verdict::Consumed);
        let (_, answer) = outputs(&mut two).remove(0);
        assert_eq!(from_peer_v6(&mut one, 2, &answer).0, Verdict::Consumed);
    }
    let heard = |it: PeerState| it.peer.id == PeerId(12) && it.heard.is_some();
    assert!(one.peers().any(heard));
}

#[test]
fn subnets_and_mtus_are_such_as_ipv6_can_use() {
    for (len, mtu, fits) in [
        (64, 1280, true),
        (126, 1430, true),
        (127, 1430, false),
        (64, 1279, false),
    ] {
        let mut config = dual_config(1);
        config.subnet = format!("fd00:0:0:1::/{len}").parse().unwrap();
        config.mtu_v6 = Mtu::new(mtu).unwrap();
        assert_eq!(observed(config).is_ok(), fits, "/{len} with {mtu}");
    }
    let mut node = dual(1);
    node.set_mtu_v6(Mtu::new(1000).unwrap());
    assert_eq!(node.mtu_v6(), Mtu::MIN_IPV6);
}
