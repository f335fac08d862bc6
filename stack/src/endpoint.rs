//! A pod without an interface: an address of the overlay that lives in a process.
//!
//! It speaks Ethernet with its node as any pod does: it answers ARP and pings for its address, and
//! all it sends goes through the gateway. What its packets are about is for
//! [`crate::datapath::egress::Egress`].

use std::net::Ipv4Addr;

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
use crate::drops::DropReason;

/// An address and the way to its gateway.
#[derive(Debug)]
pub struct Endpoint {
    address: Ipv4Addr,
    mac: EthernetAddress,
    gateway: Ipv4Addr,
    gateway_mac: Option<EthernetAddress>,
    errors: TokenBucket,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It was for the pod: the packet begins with its IPv4 header now.
    Packet,
    /// It asked for an answer, which the packet is now.
    Answer,
    /// It told where the gateway is, or something else that is done with.
    Consumed,
}

impl Endpoint {
    /// A pod at `address` that does not know yet where its gateway is. `None` if one of the two has no
    /// IPv4: the pod speaks no IPv6 yet.
    #[must_use]
    pub fn new(address: Addresses, gateway: Addresses, now: Instant) -> Option<Self> {
        let (address, gateway) = (address.ipv4()?, gateway.ipv4()?);
        Some(Self {
            address,
            mac: mac::from_ipv4(address),
            gateway,
            gateway_mac: None,
            errors: icmp::error_limit(now),
        })
    }

    /// Its addresses.
    #[must_use]
    pub fn address(&self) -> Addresses {
        self.address.into()
    }

    /// Whether it knows where its gateway is.
    #[must_use]
    pub fn has_gateway(&self) -> bool {
        self.gateway_mac.is_some()
    }

    /// The ARP frame that asks where the gateway is.
    #[must_use]
    pub fn ask(&self) -> [u8; frame::ARP_LEN] {
        frame::write_arp(
            ArpOperation::Request,
            (self.mac, self.address),
            (EthernetAddress::BROADCAST, self.gateway),
        )
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
            _ if destination != self.mac => Err(DropReason::UnknownDestination),
            EthernetProtocol::Ipv4 => self.take_ipv4(packet),
            _ => Err(DropReason::EtherTypeUnsupported),
        }
    }

    /// Makes an IPv4 packet a frame for the gateway.
    ///
    /// # Errors
    /// If the gateway is not known, or there is no room in front.
    pub fn wrap(&self, packet: &mut PacketBuf<'_>) -> Result<(), DropReason> {
        let gateway = self.gateway_mac.ok_or(DropReason::HostUnreachable)?;
        frame::prepend(packet, self.mac, gateway).map_err(|_| DropReason::HeadroomExceeded)
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
        let len = error.write(&mut buffer, self.address, offender);
        let written = len.is_some_and(|len| packet.replace(&buffer[..len]).is_ok());
        written && self.errors.take(now, 1) && self.wrap(packet).is_ok()
    }

    fn hear(&mut self, packet: &mut PacketBuf<'_>) -> Result<Taken, DropReason> {
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
        if source_protocol_addr == self.gateway && source_hardware_addr.is_unicast() {
            self.gateway_mac = Some(source_hardware_addr);
        }
        if operation != ArpOperation::Request || target_protocol_addr != self.address {
            return Ok(Taken::Consumed);
        }
        let answer = frame::write_arp(
            ArpOperation::Reply,
            (self.mac, self.address),
            (source_hardware_addr, source_protocol_addr),
        );
        let replaced = packet.replace(&answer);
        replaced.map_err(|_| DropReason::HeadroomExceeded)?;
        Ok(Taken::Answer)
    }

    fn take_ipv4(&self, packet: &mut PacketBuf<'_>) -> Result<Taken, DropReason> {
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
        if view.dst_addr() != self.address {
            return Err(DropReason::UnknownDestination);
        }
        if guard::is_martian(source) {
            return Err(DropReason::SourceAddressInvalid);
        }
        if protocol == IpProtocol::Icmp && !is_fragment {
            packet.complete_checksum();
            if self.answer_echo(packet.as_mut_slice()) {
                self.wrap(packet)?;
                return Ok(Taken::Answer);
            }
        }
        Ok(Taken::Packet)
    }

    /// Turns an echo request into its reply, if it is one.
    fn answer_echo(&self, packet: &mut [u8]) -> bool {
        let mut view = Ipv4Packet::new_unchecked(packet);
        let source = view.src_addr();
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
        view.set_src_addr(self.address);
        view.set_hop_limit(v4::DEFAULT_TTL);
        view.fill_checksum();
        true
    }
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
        let asked = endpoint.ask();
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
        assert_eq!(endpoint.gateway_mac, Some(GATEWAY_MAC));
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
