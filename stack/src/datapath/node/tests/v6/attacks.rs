//! What a pod must not do to others on its link and beyond, as tools such as thc-ipv6 and SI6's do it: each
//! kind is dropped for its reason, and afterwards nothing is known that was not known before.

use super::*;

const ICMP: u8 = 58;
const FRAGMENT: u8 = 44;
const OPTIONS: u8 = 60;
const ROUTING: u8 = 43;
const HOP_BY_HOP: u8 = 0;
/// Options that say nothing; what is behind them comes first.
const NOTHING: [u8; 7] = [0, 1, 4, 0, 0, 0, 0];

/// A packet of these headers and this message, whose ICMPv6 checksum is right.
fn packet(
    (source, destination): (&str, &str),
    hop_limit: u8,
    (first, headers): (u8, &[u8]),
    message: &[u8],
) -> Vec<u8> {
    let header = v6::Header {
        traffic_class: 0,
        flow_label: 0,
        payload_len: (headers.len() + message.len()) as u16,
        next_header: first.into(),
        hop_limit,
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    };
    let mut packet = [&header.to_bytes()[..], headers, message].concat();
    if message.len() >= 4 {
        v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN + headers.len());
    }
    packet
}

/// A message of neighbour discovery about an address, with an option.
fn about(kind: u8, target: &str, option: &[u8]) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    let override_ = if kind == 136 { 0x20 } else { 0 };
    [
        &[kind, 0, 0, 0, override_, 0, 0, 0][..],
        &target.octets(),
        option,
    ]
    .concat()
}

/// The option with a MAC address.
fn mac_option(kind: u8, mac: EthernetAddress) -> Vec<u8> {
    [&[kind, 1][..], &mac.0].concat()
}

/// A router advertisement with a lifetime and a prefix, or a redirect.
fn router(kind: u8) -> Vec<u8> {
    [&[kind, 0, 0, 0, 64, 0, 7, 8][..], &[0; 32]].concat()
}

fn chain(next: u8) -> Vec<u8> {
    [&[next][..], &NOTHING].concat()
}

/// The kinds, each with the frame that it sends, and the reason for which that is dropped.
fn attacks() -> Vec<(&'static str, Vec<u8>, DropReason)> {
    use DropReason as Why;
    let (own, victim, gateway) = ("fd00:0:0:1::2", "fd00:0:0:1::3", "fd00:0:0:1::1");
    let (all, link_local) = ("ff02::1", "fe80::2");
    let (own_mac, others) = (pod_mac(1, 2), EthernetAddress([2, 6, 6, 6, 6, 6]));
    let to_all =
        |packet: &[u8]| ethernet(own_mac, ndp::multicast_mac(ndp::ALL_NODES), IPV6, packet);
    let plain = (ICMP, &[][..]);
    let say = |source, target, mac| {
        let message = about(136, target, &mac_option(2, mac));
        to_all(&packet((source, all), 255, plain, &message))
    };
    let advertise =
        |headers: (u8, &[u8])| to_all(&packet((link_local, all), 255, headers, &router(134)));
    let ask = |source, target, hop_limit, option: &[u8]| {
        let target_address = target_of(target);
        let group = ndp::solicited_node(target_address);
        let bytes = packet(
            (source, &group.to_string()),
            hop_limit,
            plain,
            &about(135, target, option),
        );
        ethernet(own_mac, ndp::multicast_mac(group), IPV6, &bytes)
    };
    let ping = [128, 0, 0, 0, 0, 1, 0, 1];
    let pinged = |source, destination, headers: (u8, &[u8])| {
        routed(&packet((source, destination), 64, headers, &ping))
    };
    let long = [chain(OPTIONS).repeat(9), chain(ICMP)].concat();
    let dhcp = {
        let mut bytes = udp(at(1, 2), at(1, 3), 20);
        bytes[v6::HEADER_LEN + 2..v6::HEADER_LEN + 4].copy_from_slice(&546_u16.to_be_bytes());
        bytes
    };
    vec![
        (
            "parasite6: the victim's address",
            say(own, victim, own_mac),
            Why::SourceAddressSpoofed,
        ),
        (
            "the gateway's address",
            say(own, gateway, own_mac),
            Why::SourceAddressSpoofed,
        ),
        (
            "the gateway's link-local one",
            say(own, "fe80::1", own_mac),
            Why::SourceAddressSpoofed,
        ),
        (
            "in the victim's name",
            say(victim, victim, own_mac),
            Why::SourceAddressSpoofed,
        ),
        (
            "at another MAC address",
            say(own, own, others),
            Why::SourceMacSpoofed,
        ),
        (
            "of nobody",
            say(own, "::", own_mac),
            Why::SourceAddressInvalid,
        ),
        (
            "dos-new-ip6: whether the victim's address is free",
            ask("::", victim, 255, &[]),
            Why::SourceAddressSpoofed,
        ),
        (
            "ns6: as the victim",
            ask(victim, gateway, 255, &mac_option(1, own_mac)),
            Why::SourceAddressSpoofed,
        ),
        ("ns6: from afar", ask(own, victim, 64, &[]), Why::NdpInvalid),
        (
            "ns6: an option without a length",
            ask(own, victim, 255, &[1, 0, 2, 2, 2, 2, 2, 2]),
            Why::NdpInvalid,
        ),
        (
            "ns6: half an option",
            ask(own, victim, 255, &[1, 2, 2, 2, 2, 2, 2, 2]),
            Why::NdpInvalid,
        ),
        ("fake_router26", advertise(plain), Why::RouterAdvertisement),
        (
            "fake_router26 -E D: behind options",
            advertise((OPTIONS, &chain(ICMP))),
            Why::RouterAdvertisement,
        ),
        (
            "fake_router26 -E H: behind hop-by-hop options",
            advertise((HOP_BY_HOP, &chain(ICMP))),
            Why::RouterAdvertisement,
        ),
        (
            "fake_router26 -E F: in a fragment",
            advertise((FRAGMENT, &[ICMP, 0, 0, 1, 0, 0, 0, 7])),
            Why::RouterAdvertisement,
        ),
        (
            "fake_router26: hidden in a later fragment",
            to_all(&packet(
                (link_local, all),
                255,
                (FRAGMENT, &[OPTIONS, 0, 0, 1, 0, 0, 0, 7]),
                &[],
            )),
            Why::Ipv6ExtensionHeaders,
        ),
        (
            "redir6",
            to_all(&packet((link_local, all), 255, plain, &router(137))),
            Why::RouterAdvertisement,
        ),
        ("fake_dhcps6", routed(&dhcp), Why::DhcpServer),
        (
            "smurf6",
            to_all(&packet((own, all), 64, plain, &ping)),
            Why::AllNodesGroup,
        ),
        (
            "denial6: a long chain",
            pinged(own, victim, (OPTIONS, &long)),
            Why::Ipv6ExtensionHeaders,
        ),
        (
            "alive6 -r: a source route",
            pinged(own, victim, (ROUTING, &[ICMP, 0, 0, 1, 0, 0, 0, 0])),
            Why::Ipv6ExtensionHeaders,
        ),
        (
            "implementation6: hop-by-hop options that are not first",
            pinged(
                own,
                victim,
                (OPTIONS, &[chain(HOP_BY_HOP), chain(ICMP)].concat()),
            ),
            Why::Ipv6ExtensionHeaders,
        ),
        (
            "as the victim",
            pinged(victim, "fd00:0:0:2::2", plain),
            Why::SourceAddressSpoofed,
        ),
        (
            "as itself, the loopback",
            pinged("::1", victim, plain),
            Why::SourceAddressInvalid,
        ),
        (
            "as a group",
            pinged("ff02::1", victim, plain),
            Why::SourceAddressInvalid,
        ),
        (
            "as an IPv4 address",
            pinged("::ffff:10.244.1.3", victim, plain),
            Why::SourceAddressInvalid,
        ),
        (
            "to nobody",
            pinged(own, "::", plain),
            Why::DestinationNotUnicast,
        ),
        (
            "to the loopback",
            pinged(own, "::1", plain),
            Why::DestinationNotUnicast,
        ),
        (
            "mldrouter6: queries of another",
            to_all(&packet((own, all), 1, plain, &[130; 24])),
            Why::ForeignQuerier,
        ),
    ]
}

fn target_of(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// Everything that somebody could have poisoned.
fn tables(node: &Node) -> String {
    let neighbours: Vec<_> = node.neighbours().collect();
    let mut places: Vec<_> = node.fdb().map(|(mac, entry)| (mac, entry.port)).collect();
    places.sort();
    format!("{neighbours:?} {places:?}")
}

#[test]
fn attacks_are_dropped_for_their_reason_and_poison_nothing() {
    for (name, frame, reason) in attacks() {
        let mut node = dual(1);
        // It was there before.
        from_pod(&mut node, &routed(&echo(at(1, 2), at(1, 3), 64, 0)));
        let before = (tables(&node), node.counters().dropped_for(reason));
        let (verdict, _) = from_pod(&mut node, &frame);
        assert_eq!(verdict, Verdict::Drop(reason), "{name}");
        assert_eq!(node.counters().dropped_for(reason), before.1 + 1, "{name}");
        assert_eq!(tables(&node), before.0, "{name}");
        // At most its sender hears of it.
        for (verdict, _) in outputs(&mut node) {
            assert_eq!(verdict, Verdict::Port(POD_PORT), "{name}");
        }
        // The victim's traffic goes on.
        let packet = routed(&echo(at(1, 2), at(1, 3), 64, 0));
        assert_eq!(
            from_pod(&mut node, &packet).0,
            Verdict::Port(OTHER_PORT),
            "{name}"
        );
        assert_adds_up(&node);
    }
}

/// RFC 6583: who looks for all addresses of a subnet costs nothing but what it sends.
#[test]
fn a_scan_of_the_subnet_is_answered_without_a_question() {
    let mut node = dual(1);
    let known = node.neighbours().count();
    let mut told = 0;
    for host in 0x100..0x2100 {
        let scan = routed(&echo(at(1, 2), at(1, host), 64, 0));
        let (verdict, _) = from_pod(&mut node, &scan);
        assert_eq!(verdict, Verdict::Drop(DropReason::HostUnreachable));
        let ask = solicitation(pod_mac(1, 2), at(1, 2), at(1, host));
        let (verdict, _) = from_pod(&mut node, &ask);
        assert_eq!(verdict, Verdict::Drop(DropReason::UnknownDestination));
        for (verdict, frame) in outputs(&mut node) {
            assert_eq!(verdict, Verdict::Port(POD_PORT));
            assert_eq!(icmp_of(&frame).2, Icmpv6Message::DstUnreachable);
            told += 1;
        }
    }
    assert!((1..200).contains(&told), "{told} errors");
    assert_eq!(node.neighbours().count(), known);
    assert_adds_up(&node);
}
