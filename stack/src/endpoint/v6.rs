//! What an endpoint does with IPv6.

use std::net::Ipv6Addr;

use muslin_encap::buffer::PacketBuf;
use muslin_encap::ip::v6;
use muslin_encap::offload::virtio::Checksum;
use smoltcp::wire::{EthernetAddress, IpProtocol, Ipv6Packet};

use super::{Endpoint, Taken, Way};
use crate::datapath::frame;
use crate::datapath::guard;
use crate::datapath::ndp::{self, Held, Message};
use crate::drops::DropReason;

/// ICMPv6 types (RFC 4443 section 4).
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;

impl Endpoint {
    pub(super) fn take_ipv6(&mut self, packet: &mut PacketBuf<'_>) -> Result<Taken, DropReason> {
        let own = self.ipv6.as_mut().ok_or(DropReason::EtherTypeUnsupported)?;
        let from = frame::parse(packet.as_slice())?.src_addr();
        packet.trim_front(frame::HEADER_LEN);
        packet.truncate(v6::check_head(packet.as_slice(), packet.total_len())?);
        let upper = v6::upper_layer(packet.as_slice())?;
        // Finishing a checksum must not write into the headers, which are checked before.
        if let Checksum::Partial { start, .. } = packet.offload().checksum
            && usize::from(start) < upper.offset
        {
            return Err(DropReason::VirtioHeader);
        }
        let view = Ipv6Packet::new_unchecked(packet.as_slice());
        let (source, destination) = (view.src_addr(), view.dst_addr());
        if guard::is_martian_v6(source) {
            return Err(DropReason::SourceAddressInvalid);
        }
        let is_icmp = IpProtocol::from(upper.protocol) == IpProtocol::Icmpv6;
        if is_icmp && !upper.is_later_fragment() {
            packet.complete_checksum();
            if let Some(message) = Message::parse(packet.as_slice())? {
                return hear(own, self.mac, from, &message, packet);
            }
        }
        if destination != own.address {
            return Err(DropReason::UnknownDestination);
        }
        if source.is_unspecified() {
            return Err(DropReason::SourceAddressInvalid);
        }
        let is_whole = upper.fragment.is_none_or(|it| it.is_atomic());
        if is_icmp && is_whole && is_echo_request(packet.as_slice(), upper.offset) {
            if v6::unknown_option(packet.as_slice()).is_some() {
                return Err(DropReason::Ipv6ExtensionHeaders);
            }
            answer_echo(packet, upper.offset);
            self.wrap(packet)?;
            return Ok(Taken::Answer);
        }
        Ok(Taken::Packet)
    }
}

/// Hears a message of neighbour discovery from the MAC address `from`, and makes `packet` the answer if
/// there is one.
fn hear(
    own: &mut Way<Ipv6Addr>,
    mac: EthernetAddress,
    from: EthernetAddress,
    message: &Message,
    packet: &mut PacketBuf<'_>,
) -> Result<Taken, DropReason> {
    match message {
        Message::Advertisement(told) if told.target == own.gateway => {
            own.learn(told.mac, told.flags.override_);
        }
        Message::Solicitation(asked) => {
            if asked.source == own.gateway {
                own.learn(asked.mac, true);
            }
            let held = Held {
                address: own.address,
                router: false,
                anycast: false,
            };
            if let Some(answer) = ndp::answer(asked, from, &[held], mac) {
                let replaced = packet.replace(&answer);
                replaced.map_err(|_| DropReason::HeadroomExceeded)?;
                return Ok(Taken::Answer);
            }
        }
        Message::Advertisement(_) | Message::RouterSolicitation { .. } => {}
    }
    Ok(Taken::Consumed)
}

impl Way<Ipv6Addr> {
    /// Hears where the gateway is. The node lets nobody else speak for it. What it has said counts
    /// until it says that something else does (RFC 4861 section 7.2.5).
    fn learn(&mut self, mac: Option<EthernetAddress>, replaces: bool) {
        if let Some(mac) = mac.filter(EthernetAddress::is_unicast)
            && (replaces || self.gateway_mac.is_none())
        {
            self.gateway_mac = Some(mac);
        }
    }
}

/// Whether the ICMPv6 message there is an echo request with a right checksum.
fn is_echo_request(packet: &[u8], offset: usize) -> bool {
    let message = packet.get(offset..).unwrap_or_default();
    message.len() >= 8
        && message.starts_with(&[ECHO_REQUEST, 0])
        && v6::has_icmp_checksum(packet, offset)
}

/// Turns an echo request, whose message is there, into its reply, without extension headers.
fn answer_echo(packet: &mut PacketBuf<'_>, offset: usize) {
    let view = Ipv6Packet::new_unchecked(packet.as_slice());
    let (source, own, traffic_class) = (view.src_addr(), view.dst_addr(), view.traffic_class());
    packet.trim_front(offset - v6::HEADER_LEN);
    let packet = packet.as_mut_slice();
    let header = v6::Header {
        traffic_class,
        flow_label: 0,
        payload_len: (packet.len() - v6::HEADER_LEN) as u16,
        next_header: IpProtocol::Icmpv6,
        hop_limit: v6::DEFAULT_HOP_LIMIT,
        source: own,
        destination: source,
    };
    packet[..v6::HEADER_LEN].copy_from_slice(&header.to_bytes());
    packet[v6::HEADER_LEN] = ECHO_REPLY;
    v6::fill_icmp_checksum(packet, v6::HEADER_LEN);
}

#[cfg(test)]
mod tests {
    use etherparse::{Icmpv6Type, NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
    use muslin_encap::buffer::HEADROOM;
    use muslin_encap::offload::virtio::Header;
    use smoltcp::time::Instant;

    use super::super::Question;
    use super::*;
    use crate::addresses::Addresses;
    use crate::datapath::icmp::IcmpError;
    use crate::datapath::ndp::Flags;

    const ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 2);
    const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 1);
    const OTHER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 2, 0, 0, 0, 9);
    const GATEWAY_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
    const MAC: EthernetAddress = EthernetAddress([0x0a, 0x58, 0, 0, 0, 2]);
    const TOLD: Flags = Flags {
        router: true,
        solicited: true,
        override_: true,
    };

    fn addresses(text: &str) -> Addresses {
        text.parse().unwrap()
    }

    /// One that does not know where its gateway is.
    fn unresolved() -> Endpoint {
        let address = Addresses::new(None, Some(ADDRESS)).unwrap();
        let gateway = Addresses::new(None, Some(GATEWAY)).unwrap();
        Endpoint::new(address, gateway, Instant::ZERO).unwrap()
    }

    fn told(mac: EthernetAddress, target: Ipv6Addr, flags: Flags) -> Vec<u8> {
        ndp::write_advertisement((mac, target), target, (MAC, ADDRESS), flags).to_vec()
    }

    fn endpoint() -> Endpoint {
        let mut endpoint = unresolved();
        assert!(!endpoint.has_gateway());
        let taken = take(&mut endpoint, &told(GATEWAY_MAC, GATEWAY, TOLD)).0;
        assert_eq!(taken, Ok(Taken::Consumed));
        assert!(endpoint.has_gateway());
        endpoint
    }

    fn take_with(
        endpoint: &mut Endpoint,
        frame: &[u8],
        offload: Header,
    ) -> (Result<Taken, DropReason>, Vec<u8>) {
        let mut storage = [&[0; HEADROOM], frame].concat();
        let packet = PacketBuf::new(&mut storage, HEADROOM, frame.len()).unwrap();
        let mut packet = packet.with_offload(offload);
        let taken = endpoint.take(&mut packet);
        (taken, packet.as_slice().to_vec())
    }

    fn take(endpoint: &mut Endpoint, frame: &[u8]) -> (Result<Taken, DropReason>, Vec<u8>) {
        take_with(endpoint, frame, Header::default())
    }

    fn to(
        mac: EthernetAddress,
        source: Ipv6Addr,
        destination: Ipv6Addr,
    ) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
        let ethernet = PacketBuilder::ethernet2(GATEWAY_MAC.0, mac.0);
        ethernet.ipv6(source.octets(), destination.octets(), 9)
    }

    fn udp(mac: EthernetAddress, source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
        let mut frame = Vec::new();
        let builder = to(mac, source, destination).udp(7, 8);
        builder.write(&mut frame, b"payload").unwrap();
        frame
    }

    fn ping(source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
        let mut frame = Vec::new();
        let builder = to(MAC, source, destination).icmpv6_echo_request(5, 6);
        builder.write(&mut frame, b"ping").unwrap();
        frame
    }

    /// Puts an extension header in front of what a frame's packet is about.
    fn behind(frame: &[u8], kind: u8, header: [u8; 8]) -> Vec<u8> {
        let mut frame = [&frame[..54], &header, &frame[54..]].concat();
        let len = (frame.len() - 54) as u16;
        v6::set_payload_len(&mut frame[14..], len);
        v6::set_next_header(&mut frame[14..], kind.into());
        frame
    }

    #[test]
    fn it_speaks_what_it_and_its_gateway_have() {
        let now = Instant::ZERO;
        let new = |address, gateway| Endpoint::new(addresses(address), addresses(gateway), now);
        let asks = |endpoint: &Endpoint| {
            let asked = endpoint
                .ask()
                .map(|it| matches!(it, Question::Neighbour(_)));
            asked.collect::<Vec<_>>()
        };
        let both = ("10.244.1.2,fd00::2", "10.244.1.1,fd00::1");
        let dual = new(both.0, both.1).unwrap();
        assert_eq!(asks(&dual), [false, true]);
        assert_eq!(dual.address(), addresses(both.0));
        let ipv6 = new(both.0, "fd00::1").unwrap();
        assert_eq!(asks(&ipv6), [true]);
        assert_eq!(ipv6.address(), addresses("fd00::2"));
        assert_eq!(asks(&new("10.244.1.2", both.1).unwrap()), [false]);
        assert!(new("10.244.1.2", "fd00::1").is_none());
    }

    #[test]
    fn both_gateways_are_asked_for_and_each_packet_goes_to_its_own() {
        use smoltcp::wire::ArpOperation;
        let (v4, v4_gateway) = ([10, 244, 1, 2].into(), [10, 244, 1, 1].into());
        let address = Addresses::with_ipv4(v4, Some(ADDRESS));
        let gateway = Addresses::with_ipv4(v4_gateway, Some(GATEWAY));
        let mut endpoint = Endpoint::new(address, gateway, Instant::ZERO).unwrap();
        let mac = EthernetAddress([0x0a, 0x58, 10, 244, 1, 2]);
        assert_eq!(endpoint.mac, mac);
        let wrapped = |endpoint: &Endpoint, first: u8| {
            let mut storage = [0; 200];
            let mut packet = PacketBuf::new(&mut storage, 100, 40).unwrap();
            packet.as_mut_slice()[0] = first;
            endpoint.wrap(&mut packet)?;
            Ok(packet.as_slice()[..14].to_vec())
        };
        let lost = Err(DropReason::HostUnreachable);
        let arp = ArpOperation::Reply;
        let arp = frame::write_arp(arp, (GATEWAY_MAC, v4_gateway), (mac, v4));
        assert_eq!(take(&mut endpoint, &arp).0, Ok(Taken::Consumed));
        assert!(!endpoint.has_gateway(), "of IPv6");
        assert!(wrapped(&endpoint, 0x45).is_ok());
        assert_eq!(wrapped(&endpoint, 0x60), lost);
        let v6_mac = EthernetAddress([2, 0, 0, 0, 0, 6]);
        let told = ndp::write_advertisement((v6_mac, GATEWAY), GATEWAY, (mac, ADDRESS), TOLD);
        assert_eq!(take(&mut endpoint, &told).0, Ok(Taken::Consumed));
        assert!(endpoint.has_gateway());
        for (first, to, kind) in [(0x45, GATEWAY_MAC, [8, 0]), (0x60, v6_mac, [0x86, 0xdd])] {
            let expected = [to.as_bytes(), mac.as_bytes(), &kind].concat();
            assert_eq!(wrapped(&endpoint, first), Ok(expected));
        }
    }

    #[test]
    fn it_asks_for_its_gateway_and_answers_for_itself() {
        let mut endpoint = endpoint();
        let asked = endpoint.ask().collect::<Vec<_>>();
        let expected = ndp::write_solicitation((MAC, ADDRESS), GATEWAY, None);
        assert_eq!(asked, [Question::Neighbour(expected)]);
        assert_eq!(asked[0].as_slice(), expected);

        let peer = (
            EthernetAddress([2, 0, 0, 0, 0, 7]),
            "fd00:0:0:1::7".parse().unwrap(),
        );
        let flags = Flags {
            router: false,
            ..TOLD
        };
        for to in [None, Some(MAC)] {
            let asked = ndp::write_solicitation(peer, ADDRESS, to);
            let (taken, answer) = take(&mut endpoint, &asked);
            assert_eq!(taken, Ok(Taken::Answer));
            let expected = ndp::write_advertisement((MAC, ADDRESS), ADDRESS, peer, flags);
            assert_eq!(answer, expected);
        }
        let other = ndp::write_solicitation(peer, OTHER, None);
        assert_eq!(take(&mut endpoint, &other).0, Ok(Taken::Consumed));
        // Who wants its address hears that it is taken.
        let mut probe = ndp::write_solicitation(peer, ADDRESS, None)[..78].to_vec();
        v6::set_payload_len(&mut probe[14..], 24);
        probe[22..38].fill(0);
        v6::fill_icmp_checksum(&mut probe[14..], 40);
        let (taken, answer) = take(&mut endpoint, &probe);
        assert_eq!(taken, Ok(Taken::Answer));
        assert_eq!(answer[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(answer[38..54], ndp::ALL_NODES.octets());
    }

    #[test]
    fn only_the_gateway_says_where_it_is() {
        let mut endpoint = endpoint();
        let mac = |last| EthernetAddress([2, 0, 0, 0, 0, last]);
        let weak = Flags {
            override_: false,
            ..TOLD
        };
        let mut says = |frame: Vec<u8>| {
            let taken = take(&mut endpoint, &frame).0;
            (taken.is_ok(), endpoint.ipv6.unwrap().gateway_mac)
        };
        for (frame, is_valid, expected) in [
            (told(mac(7), OTHER, TOLD), true, GATEWAY_MAC),
            (told(mac(7), GATEWAY, weak), true, GATEWAY_MAC),
            (
                told(EthernetAddress([3; 6]), GATEWAY, TOLD),
                true,
                GATEWAY_MAC,
            ),
            (told(mac(8), GATEWAY, TOLD), true, mac(8)),
            // It asks, and so says where it is.
            (
                ndp::write_solicitation((mac(9), GATEWAY), ADDRESS, None).to_vec(),
                true,
                mac(9),
            ),
            (
                ndp::write_solicitation((mac(7), OTHER), ADDRESS, None).to_vec(),
                true,
                mac(9),
            ),
            (
                {
                    let mut frame = told(mac(7), GATEWAY, TOLD);
                    frame[21] = 254;
                    frame
                },
                false,
                mac(9),
            ),
        ] {
            assert_eq!(says(frame), (is_valid, Some(expected)));
        }
    }

    #[test]
    fn packets_come_without_padding_and_go_through_the_gateway() {
        let mut endpoint = endpoint();
        let mut frame = udp(MAC, OTHER, ADDRESS);
        let packet = frame[frame::HEADER_LEN..].to_vec();
        frame.extend([0; 11]);
        assert_eq!(take(&mut endpoint, &frame), (Ok(Taken::Packet), packet));
        let mut out = vec![0; 200];
        let mut out = PacketBuf::new(&mut out, 100, 60).unwrap();
        out.as_mut_slice()[0] = 0x60;
        assert_eq!(
            unresolved().wrap(&mut out),
            Err(DropReason::HostUnreachable)
        );
    }

    #[test]
    fn what_is_not_for_it_is_dropped() {
        let mut endpoint = endpoint();
        let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let udp_to = |source, destination| udp(MAC, source, destination);
        let other_mac = EthernetAddress([2; 6]);
        let all_nodes = ndp::multicast_mac(group);
        let header = |first: u8, kind: u8| {
            behind(&udp_to(OTHER, ADDRESS), kind, [first, 0, 0, 0, 0, 0, 0, 0])
        };
        for (frame, reason) in [
            (
                udp(other_mac, OTHER, ADDRESS),
                DropReason::UnknownDestination,
            ),
            (udp_to(OTHER, GATEWAY), DropReason::UnknownDestination),
            (udp(all_nodes, OTHER, group), DropReason::UnknownDestination),
            (ping(OTHER, group), DropReason::UnknownDestination),
            (
                udp_to(Ipv6Addr::LOCALHOST, ADDRESS),
                DropReason::SourceAddressInvalid,
            ),
            (
                udp_to(Ipv6Addr::UNSPECIFIED, ADDRESS),
                DropReason::SourceAddressInvalid,
            ),
            (udp_to(group, ADDRESS), DropReason::SourceAddressInvalid),
            (
                udp_to("::ffff:10.1.2.3".parse().unwrap(), ADDRESS),
                DropReason::SourceAddressInvalid,
            ),
            (header(17, 43), DropReason::Ipv6ExtensionHeaders),
            (header(140, 60), DropReason::Ipv6ExtensionHeaders),
            (
                udp_to(OTHER, ADDRESS)[..50].to_vec(),
                DropReason::Ipv6TooShort,
            ),
            (
                udp_to(OTHER, ADDRESS)[..60].to_vec(),
                DropReason::Ipv6PayloadLen,
            ),
        ] {
            assert_eq!(take(&mut endpoint, &frame).0, Err(reason), "{frame:x?}");
        }
        let ipv4 = [&MAC.0[..], &GATEWAY_MAC.0, &[8, 0], &[0x45; 40]].concat();
        let none = Err(DropReason::EtherTypeUnsupported);
        assert_eq!(take(&mut endpoint, &ipv4).0, none, "it has no IPv4");
        let now = Instant::ZERO;
        let v4 = (addresses("10.244.1.2"), addresses("10.244.1.1"));
        let mut v4 = Endpoint::new(v4.0, v4.1, now).unwrap();
        let mut frame = udp_to(OTHER, ADDRESS);
        frame[..6].copy_from_slice(&[0x0a, 0x58, 10, 244, 1, 2]);
        assert_eq!(take(&mut v4, &frame).0, none, "it has no IPv6");
    }

    #[test]
    fn checksums_are_not_finished_in_the_headers() {
        let mut endpoint = endpoint();
        let frame = behind(&udp(MAC, OTHER, ADDRESS), 60, [17, 0, 1, 4, 0, 0, 0, 0]);
        let partial = |start| Header {
            checksum: Checksum::Partial { start, offset: 6 },
            ..Header::default()
        };
        for (start, expected) in [
            (39, Err(DropReason::VirtioHeader)),
            (47, Err(DropReason::VirtioHeader)),
            (48, Ok(Taken::Packet)),
        ] {
            let offload = partial(frame::HEADER_LEN as u16 + start);
            let (taken, packet) = take_with(&mut endpoint, &frame, offload);
            assert_eq!(taken, expected, "{start}");
            assert_eq!(packet, frame[frame::HEADER_LEN..]);
        }
    }

    /// v6LC.5.1.2 and 5.1.3, and those of v6LC.1.2 with options.
    #[test]
    fn pings_are_answered_and_errors_told() {
        let mut endpoint = endpoint();
        let request = ping(OTHER, ADDRESS);
        let (taken, answer) = take(&mut endpoint, &request);
        assert_eq!(taken, Ok(Taken::Answer));
        let headers = PacketHeaders::from_ethernet_slice(&answer).unwrap();
        let Some(NetHeaders::Ipv6(ip, _)) = headers.net else {
            panic!("{headers:?}")
        };
        assert_eq!(
            (ip.source, ip.destination),
            (ADDRESS.octets(), OTHER.octets())
        );
        assert_eq!((ip.hop_limit, ip.payload_length), (64, 12));
        let Some(TransportHeader::Icmpv6(icmp)) = headers.transport else {
            panic!()
        };
        let Icmpv6Type::EchoReply(echo) = icmp.icmp_type else {
            panic!("{icmp:?}")
        };
        assert_eq!(
            (echo.id, echo.seq, headers.payload.slice()),
            (5, 6, &b"ping"[..])
        );
        assert!(v6::has_icmp_checksum(&answer[14..], 40));
        for (name, kind, header, expected) in [
            ("padding", 60, [58, 0, 1, 4, 0, 0, 0, 0], Ok(Taken::Answer)),
            (
                "an atomic fragment",
                44,
                [58, 0, 0, 0, 0, 0, 0, 7],
                Ok(Taken::Answer),
            ),
            (
                "the first fragment",
                44,
                [58, 0, 0, 1, 0, 0, 0, 7],
                Ok(Taken::Packet),
            ),
            (
                "a later fragment",
                44,
                [58, 0, 0, 8, 0, 0, 0, 7],
                Ok(Taken::Packet),
            ),
            (
                "an option to drop",
                60,
                [58, 0, 0x41, 4, 0, 0, 0, 0],
                Err(DropReason::Ipv6ExtensionHeaders),
            ),
        ] {
            let frame = behind(&request, kind, header);
            let (taken, packet) = take(&mut endpoint, &frame);
            assert_eq!(taken, expected, "{name}");
            match taken {
                Ok(Taken::Answer) => assert_eq!(packet, answer, "{name}"),
                _ => assert_eq!(packet, frame[14..], "{name}"),
            }
        }

        // What is no request, or not whole, is for sockets to look at.
        let mut reply = Vec::new();
        let pong = to(MAC, OTHER, ADDRESS).icmpv6_echo_reply(5, 6);
        pong.write(&mut reply, b"ping").unwrap();
        let mut damaged = request.clone();
        *damaged.last_mut().unwrap() ^= 1;
        for other in [reply, damaged] {
            let (taken, packet) = take(&mut endpoint, &other);
            assert_eq!(taken, Ok(Taken::Packet));
            assert_eq!(packet, other[frame::HEADER_LEN..]);
        }

        let mut storage = vec![0; 2000];
        let mut error = PacketBuf::new(&mut storage, 0, 0).unwrap();
        let offender = &udp(MAC, OTHER, ADDRESS)[frame::HEADER_LEN..];
        let unreachable = IcmpError::PortUnreachable;
        assert!(endpoint.report(Instant::ZERO, unreachable, offender, &mut error));
        let headers = PacketHeaders::from_ethernet_slice(error.as_slice()).unwrap();
        let Some(NetHeaders::Ipv6(ip, _)) = headers.net else {
            panic!("{headers:?}")
        };
        assert_eq!(
            (ip.source, ip.destination),
            (ADDRESS.octets(), OTHER.octets())
        );
        assert_eq!(headers.payload.slice(), offender);
        // Not without a way, and not more than there may be.
        assert!(!unresolved().report(Instant::ZERO, unreachable, offender, &mut error));
        let told =
            (0..100).filter(|_| endpoint.report(Instant::ZERO, unreachable, offender, &mut error));
        assert_eq!(told.count(), 49);
    }
}
