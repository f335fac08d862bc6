//! A pod without an interface: an address of the overlay that lives in a process, or one of each IP
//! version.
//!
//! It speaks Ethernet with its node as any pod does: it answers ARP, neighbour discovery and pings for its
//! addresses, and all it sends goes through the gateway. What its packets are about is for
//! [`crate::datapath::egress::Egress`].

use std::net::{Ipv4Addr, Ipv6Addr};

use muslin_encap::buffer::PacketBuf;
use muslin_encap::ip::v4;
use muslin_encap::mac;
use muslin_encap::offload::virtio::Checksum;
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, ArpRepr, EthernetAddress, EthernetProtocol, Icmpv4Message, Icmpv4Packet,
    IpProtocol, Ipv4Packet,
};

use crate::addresses::Addresses;
use crate::bucket::TokenBucket;
use crate::datapath::frame;
use crate::datapath::guard;
use crate::datapath::icmp::{self, IcmpError};
use crate::datapath::ndp;
use crate::drops::DropReason;

mod v6;

/// Its addresses and the way to its gateway.
#[derive(Debug)]
pub struct Endpoint {
    address: Addresses,
    mac: EthernetAddress,
    ipv4: Option<Way<Ipv4Addr>>,
    ipv6: Option<Way<Ipv6Addr>>,
    errors: TokenBucket,
}

/// An address and the way to its gateway.
#[derive(Debug, Clone, Copy)]
struct Way<A> {
    address: A,
    gateway: A,
    gateway_mac: Option<EthernetAddress>,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It was for the pod: the packet begins with its IP header now.
    Packet,
    /// It asked for an answer, which the packet is now.
    Answer,
    /// It told where the gateway is, or something else that is done with.
    Consumed,
}

/// A frame that asks where the gateway is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// The gateway's IPv4 address.
    Arp([u8; frame::ARP_LEN]),
    /// The gateway's IPv6 address.
    Neighbour([u8; ndp::FRAME_LEN]),
}

impl Question {
    /// The frame.
    #[must_use]
    pub const fn as_slice(&self) -> &[u8] {
        match self {
            Self::Arp(frame) => frame,
            Self::Neighbour(frame) => frame,
        }
    }
}

impl<A> Way<A> {
    fn new(address: Option<A>, gateway: Option<A>) -> Option<Self> {
        Some(Self {
            address: address?,
            gateway: gateway?,
            gateway_mac: None,
        })
    }
}

impl Endpoint {
    /// A pod at `address` that does not know yet where its gateway is. It speaks the IP versions of
    /// which there are both; `None` if there is none.
    #[must_use]
    pub fn new(address: Addresses, gateway: Addresses, now: Instant) -> Option<Self> {
        let ipv4 = Way::new(address.ipv4(), gateway.ipv4());
        let ipv6 = Way::new(address.ipv6(), gateway.ipv6());
        let mac = match (&ipv4, &ipv6) {
            (Some(way), _) => mac::from_ipv4(way.address),
            (None, Some(way)) => mac::from_ipv6(way.address),
            (None, None) => return None,
        };
        let spoken = Addresses::new(ipv4.map(|way| way.address), ipv6.map(|way| way.address))?;
        Some(Self {
            address: spoken,
            mac,
            ipv4,
            ipv6,
            errors: icmp::error_limit(now),
        })
    }

    /// Its addresses.
    #[must_use]
    pub fn address(&self) -> Addresses {
        self.address
    }

    /// Whether it knows where its gateway is, for each IP version that it speaks.
    #[must_use]
    pub fn has_gateway(&self) -> bool {
        self.ipv4.is_none_or(|way| way.gateway_mac.is_some())
            && self.ipv6.is_none_or(|way| way.gateway_mac.is_some())
    }

    /// The frames that ask where the gateway is, one for each IP version.
    pub fn ask(&self) -> impl Iterator<Item = Question> + use<> {
        let arp = self.ipv4.map(|way| {
            let source = (self.mac, way.address);
            let target = (EthernetAddress::BROADCAST, way.gateway);
            Question::Arp(frame::write_arp(ArpOperation::Request, source, target))
        });
        let neighbour = self.ipv6.map(|way| {
            let source = (self.mac, way.address);
            Question::Neighbour(ndp::write_solicitation(source, way.gateway, None))
        });
        arp.into_iter().chain(neighbour)
    }

    /// Takes a frame from the node.
    ///
    /// # Errors
    /// The reason to drop it.
    pub fn take(&mut self, packet: &mut PacketBuf<'_>) -> Result<Taken, DropReason> {
        let view = frame::parse(packet.as_slice())?;
        let (destination, kind) = (view.dst_addr(), view.ethertype());
        match kind {
            EthernetProtocol::Arp => self.hear(packet),
            EthernetProtocol::Ipv6 if destination.is_multicast() => self.take_ipv6(packet),
            _ if destination != self.mac => Err(DropReason::UnknownDestination),
            EthernetProtocol::Ipv4 => self.take_ipv4(packet),
            EthernetProtocol::Ipv6 => self.take_ipv6(packet),
            EthernetProtocol::Unknown(_) => Err(DropReason::EtherTypeUnsupported),
        }
    }

    /// Makes an IP packet a frame for the gateway.
    ///
    /// # Errors
    /// If the gateway is not known, or there is no room in front.
    pub fn wrap(&self, packet: &mut PacketBuf<'_>) -> Result<(), DropReason> {
        let is_v6 = packet.as_slice().first().is_some_and(|it| it >> 4 == 6);
        let (gateway, kind) = match is_v6 {
            false => (
                self.ipv4.and_then(|way| way.gateway_mac),
                EthernetProtocol::Ipv4,
            ),
            true => (
                self.ipv6.and_then(|way| way.gateway_mac),
                EthernetProtocol::Ipv6,
            ),
        };
        let gateway = gateway.ok_or(DropReason::HostUnreachable)?;
        frame::prepend_as(packet, self.mac, gateway, kind).map_err(|_| DropReason::HeadroomExceeded)
    }

    /// Makes `packet` a frame that tells the sender of `offender` of an error, if it is to be told.
    pub fn report(
        &mut self,
        now: Instant,
        error: IcmpError,
        offender: &[u8],
        packet: &mut PacketBuf<'_>,
    ) -> bool {
        let mut buffer = [0; icmp::MAX_LEN];
        let len = match offender.first().map(|it| it >> 4) {
            Some(6) => self
                .ipv6
                .and_then(|way| error.write(&mut buffer, way.address, offender)),
            _ => self
                .ipv4
                .and_then(|way| error.write(&mut buffer, way.address, offender)),
        };
        let written = len.is_some_and(|len| packet.replace(&buffer[..len]).is_ok());
        written && self.errors.take(now, 1) && self.wrap(packet).is_ok()
    }

    fn hear(&mut self, packet: &mut PacketBuf<'_>) -> Result<Taken, DropReason> {
        let own = self.ipv4.as_mut().ok_or(DropReason::EtherTypeUnsupported)?;
        let payload = &packet.as_slice()[frame::HEADER_LEN..];
        let Some(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = frame::arp(payload)
        else {
            return Err(DropReason::EtherTypeUnsupported);
        };
        // The node lets nobody else speak for its gateway.
        if source_protocol_addr == own.gateway && source_hardware_addr.is_unicast() {
            own.gateway_mac = Some(source_hardware_addr);
        }
        if operation != ArpOperation::Request || target_protocol_addr != own.address {
            return Ok(Taken::Consumed);
        }
        let answer = frame::write_arp(
            ArpOperation::Reply,
            (self.mac, own.address),
            (source_hardware_addr, source_protocol_addr),
        );
        let replaced = packet.replace(&answer);
        replaced.map_err(|_| DropReason::HeadroomExceeded)?;
        Ok(Taken::Answer)
    }

    fn take_ipv4(&self, packet: &mut PacketBuf<'_>) -> Result<Taken, DropReason> {
        let own = self.ipv4.ok_or(DropReason::EtherTypeUnsupported)?;
        packet.trim_front(frame::HEADER_LEN);
        packet.truncate(v4::check_head(packet.as_slice(), packet.total_len())?);
        let view = Ipv4Packet::new_unchecked(packet.as_slice());
        let (source, protocol) = (view.src_addr(), view.next_header());
        let is_fragment = view.more_frags() || view.frag_offset() != 0;
        // Finishing a checksum must not write into the header, which is checked before.
        if let Checksum::Partial { start, .. } = packet.offload().checksum
            && start < view.header_len().into()
        {
            return Err(DropReason::VirtioHeader);
        }
        if view.dst_addr() != own.address {
            return Err(DropReason::UnknownDestination);
        }
        if guard::is_martian(source) {
            return Err(DropReason::SourceAddressInvalid);
        }
        if protocol == IpProtocol::Icmp && !is_fragment {
            packet.complete_checksum();
            if answer_echo(packet.as_mut_slice()) {
                self.wrap(packet)?;
                return Ok(Taken::Answer);
            }
        }
        Ok(Taken::Packet)
    }
}

/// Turns an echo request into its reply, if it is one.
fn answer_echo(packet: &mut [u8]) -> bool {
    let mut view = Ipv4Packet::new_unchecked(packet);
    let (source, own) = (view.src_addr(), view.dst_addr());
    let Ok(mut echo) = Icmpv4Packet::new_checked(view.payload_mut()) else {
        return false;
    };
    let is_request = (echo.msg_type(), echo.msg_code()) == (Icmpv4Message::EchoRequest, 0);
    if !is_request || !echo.verify_checksum() {
        return false;
    }
    echo.set_msg_type(Icmpv4Message::EchoReply);
    echo.fill_checksum();
    view.set_dst_addr(source);
    view.set_src_addr(own);
    view.set_hop_limit(v4::DEFAULT_TTL);
    view.fill_checksum();
    true
}

#[cfg(test)]
mod tests {
    use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
    use muslin_encap::buffer::HEADROOM;
    use muslin_encap::offload::virtio::Header;

    use super::*;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
    const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 9);
    const GATEWAY_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
    const MAC: EthernetAddress = EthernetAddress([0x0a, 0x58, 10, 244, 1, 2]);

    /// One that does not know where its gateway is.
    fn unresolved() -> Endpoint {
        Endpoint::new(ADDRESS.into(), GATEWAY.into(), Instant::ZERO).unwrap()
    }

    fn endpoint() -> Endpoint {
        let mut endpoint = unresolved();
        assert!(!endpoint.has_gateway());
        let told = frame::write_arp(ArpOperation::Reply, (GATEWAY_MAC, GATEWAY), (MAC, ADDRESS));
        assert_eq!(take(&mut endpoint, &told).0, Ok(Taken::Consumed));
        assert!(endpoint.has_gateway());
        endpoint
    }

    /// What becomes of a frame, and the packet after that.
    fn take(endpoint: &mut Endpoint, frame: &[u8]) -> (Result<Taken, DropReason>, Vec<u8>) {
        let mut storage = vec![0; HEADROOM + 2000];
        storage[HEADROOM..][..frame.len()].copy_from_slice(frame);
        let mut packet = PacketBuf::new(&mut storage, HEADROOM, frame.len()).unwrap();
        let taken = endpoint.take(&mut packet);
        (taken, packet.as_slice().to_vec())
    }

    fn to(
        mac: EthernetAddress,
        source: Ipv4Addr,
        destination: Ipv4Addr,
    ) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
        PacketBuilder::ethernet2(GATEWAY_MAC.0, mac.0).ipv4(
            source.octets(),
            destination.octets(),
            9,
        )
    }

    fn udp(mac: EthernetAddress, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
        let mut frame = Vec::new();
        let builder = to(mac, source, destination).udp(7, 8);
        builder.write(&mut frame, b"payload").unwrap();
        frame
    }

    #[test]
    fn it_asks_for_its_gateway_and_answers_for_itself() {
        let mut endpoint = endpoint();
        let [Question::Arp(asked)] = *endpoint.ask().collect::<Vec<_>>() else {
            panic!("it has IPv4 alone");
        };
        let view = frame::parse(&asked).unwrap();
        assert_eq!(
            (view.src_addr(), view.dst_addr()),
            (MAC, EthernetAddress::BROADCAST)
        );
        let Some(ArpRepr::EthernetIpv4 {
            target_protocol_addr,
            ..
        }) = frame::arp(view.payload())
        else {
            panic!("{view:?}");
        };
        assert_eq!(target_protocol_addr, GATEWAY);

        let peer = (
            EthernetAddress([2, 0, 0, 0, 0, 7]),
            Ipv4Addr::new(10, 244, 1, 7),
        );
        for (target, expected) in [(ADDRESS, Taken::Answer), (GATEWAY, Taken::Consumed)] {
            let asks = (EthernetAddress::BROADCAST, target);
            let asked = frame::write_arp(ArpOperation::Request, peer, asks);
            let (taken, answer) = take(&mut endpoint, &asked);
            assert_eq!(taken, Ok(expected));
            if expected == Taken::Answer {
                let reply = frame::write_arp(ArpOperation::Reply, (MAC, ADDRESS), peer);
                assert_eq!(answer, reply);
            }
        }
        // Neither they nor a group of stations are its gateway.
        let group = (EthernetAddress([3, 0, 0, 0, 0, 1]), GATEWAY);
        let told = frame::write_arp(ArpOperation::Reply, group, (MAC, ADDRESS));
        assert_eq!(take(&mut endpoint, &told).0, Ok(Taken::Consumed));
        assert_eq!(endpoint.ipv4.unwrap().gateway_mac, Some(GATEWAY_MAC));
    }

    #[test]
    fn packets_come_without_padding_and_go_through_the_gateway() {
        let mut endpoint = endpoint();
        let mut frame = udp(MAC, OTHER, ADDRESS);
        let packet = frame[frame::HEADER_LEN..].to_vec();
        frame.extend([0; 11]);
        assert_eq!(
            take(&mut endpoint, &frame),
            (Ok(Taken::Packet), packet.clone())
        );

        let mut storage = vec![0; 2000];
        let mut out = PacketBuf::new(&mut storage, 0, 0).unwrap();
        out.replace(&packet).unwrap();
        endpoint.wrap(&mut out).unwrap();
        let view = frame::parse(out.as_slice()).unwrap();
        assert_eq!((view.src_addr(), view.dst_addr()), (MAC, GATEWAY_MAC));
        assert_eq!(view.payload(), packet);
        let lost = unresolved().wrap(&mut out);
        assert_eq!(lost, Err(DropReason::HostUnreachable));
    }

    #[test]
    fn what_is_not_for_it_is_dropped() {
        let mut endpoint = endpoint();
        let loopback = Ipv4Addr::LOCALHOST;
        let mut broken = udp(MAC, OTHER, ADDRESS);
        broken[frame::HEADER_LEN + 8] ^= 1;
        for (frame, reason) in [
            (
                udp(EthernetAddress([2; 6]), OTHER, ADDRESS),
                DropReason::UnknownDestination,
            ),
            (udp(MAC, OTHER, GATEWAY), DropReason::UnknownDestination),
            (
                udp(MAC, loopback, ADDRESS),
                DropReason::SourceAddressInvalid,
            ),
            (broken, DropReason::Ipv4Checksum),
            (
                udp(MAC, OTHER, ADDRESS)[..30].to_vec(),
                DropReason::Ipv4TooShort,
            ),
            (vec![0; 5], DropReason::FrameTooShort),
        ] {
            assert_eq!(take(&mut endpoint, &frame).0, Err(reason), "{frame:x?}");
        }
    }

    #[test]
    fn checksums_are_finished_by_who_knows_the_protocol_and_not_in_the_header() {
        let mut endpoint = endpoint();
        let frame = udp(MAC, OTHER, ADDRESS);
        let partial = |start| Header {
            checksum: Checksum::Partial { start, offset: 6 },
            ..Header::default()
        };
        for (start, expected) in [
            (19, Err(DropReason::VirtioHeader)),
            (20, Ok(Taken::Packet)),
            (28, Ok(Taken::Packet)),
        ] {
            let mut storage = vec![0; HEADROOM + 2000];
            storage[HEADROOM..][..frame.len()].copy_from_slice(&frame);
            let packet = PacketBuf::new(&mut storage, HEADROOM, frame.len()).unwrap();
            let mut packet = packet.with_offload(partial(frame::HEADER_LEN as u16 + start));
            let taken = endpoint.take(&mut packet);
            assert_eq!(taken, expected, "{start}");
            if expected.is_ok() {
                assert_eq!(packet.as_slice(), &frame[frame::HEADER_LEN..]);
                assert_eq!(packet.offload(), partial(start));
            }
        }
    }

    #[test]
    fn a_part_of_an_echo_request_is_not_answered() {
        let mut endpoint = endpoint();
        let mut frame = Vec::new();
        let ping = to(MAC, OTHER, ADDRESS).icmpv4_echo_request(5, 6);
        ping.write(&mut frame, b"pingping").unwrap();
        for (more, offset) in [(true, 0), (false, 8), (true, 8)] {
            let mut ip = Ipv4Packet::new_unchecked(&mut frame[frame::HEADER_LEN..]);
            ip.set_more_frags(more);
            ip.set_frag_offset(offset);
            ip.fill_checksum();
            assert_eq!(take(&mut endpoint, &frame).0, Ok(Taken::Packet));
        }
    }

    #[test]
    fn pings_are_answered_and_errors_told() {
        let mut endpoint = endpoint();
        let mut frame = Vec::new();
        let ping = to(MAC, OTHER, ADDRESS).icmpv4_echo_request(5, 6);
        ping.write(&mut frame, b"ping").unwrap();
        let (taken, answer) = take(&mut endpoint, &frame);
        assert_eq!(taken, Ok(Taken::Answer));
        let headers = PacketHeaders::from_ethernet_slice(&answer).unwrap();
        let Some(NetHeaders::Ipv4(ip, _)) = headers.net else {
            panic!("{headers:?}")
        };
        assert_eq!(
            (ip.source, ip.destination),
            (ADDRESS.octets(), OTHER.octets())
        );
        assert_eq!(ip.header_checksum, ip.calc_header_checksum());
        let Some(TransportHeader::Icmpv4(icmp)) = headers.transport else {
            panic!()
        };
        let etherparse::Icmpv4Type::EchoReply(echo) = icmp.icmp_type else {
            panic!("{icmp:?}")
        };
        assert_eq!(
            (echo.id, echo.seq, headers.payload.slice()),
            (5, 6, &b"ping"[..])
        );
        assert_eq!(icmp.checksum, icmp.icmp_type.calc_checksum(b"ping"));

        // What is no request, or not whole, is for sockets to look at.
        let mut reply = Vec::new();
        let pong = to(MAC, OTHER, ADDRESS).icmpv4_echo_reply(5, 6);
        pong.write(&mut reply, b"ping").unwrap();
        *frame.last_mut().unwrap() ^= 1;
        for other in [reply, frame] {
            let (taken, packet) = take(&mut endpoint, &other);
            assert_eq!(taken, Ok(Taken::Packet));
            assert_eq!(packet, other[frame::HEADER_LEN..]);
        }

        let mut storage = vec![0; 2000];
        let mut error = PacketBuf::new(&mut storage, 0, 0).unwrap();
        let offender = &udp(MAC, OTHER, ADDRESS)[frame::HEADER_LEN..];
        let told = endpoint.report(
            Instant::ZERO,
            IcmpError::PortUnreachable,
            offender,
            &mut error,
        );
        assert!(told);
        let headers = PacketHeaders::from_ethernet_slice(error.as_slice()).unwrap();
        let Some(NetHeaders::Ipv4(ip, _)) = headers.net else {
            panic!("{headers:?}")
        };
        assert_eq!(
            (ip.source, ip.destination),
            (ADDRESS.octets(), OTHER.octets())
        );
        assert_eq!(&headers.payload.slice()[..28], &offender[..28]);
    }
}
