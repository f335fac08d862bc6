//! The gateway: a node's own addresses. In IPv4 they are `.1` for its pods and `.0`, from which flannel
//! nodes send; in IPv6 the first address after the subnet's base, the base (the Subnet-Router anycast
//! address, RFC 4291 section 2.6.1), and [`LINK_LOCAL`].
//!
//! This is the one module that wraps smoltcp's interfaces. There are two, because smoltcp's
//! Ethernet interface drops what it has no neighbour for and asks once a second for all of them:
//! the Ethernet one answers ARP and nothing else; IP packets go through one without a link layer,
//! whose replies our own router sends on, to a pod or to a peer alike.
//!
//! In IPv6 smoltcp gets echo requests only, without their extension headers: it would answer others
//! with errors about the wrong place, also about errors and to groups. Neighbour discovery is in
//! [`crate::datapath::ndp`].

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::ip::{v4, v6};
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, IpProtocol, Ipv4Cidr, Ipv6Cidr};

use crate::addresses::Nets;
use crate::datapath::ndp::Held;

/// Larger than any reply. The router cuts replies to the real MTU, because smoltcp panics when it
/// has to cut an ICMP error, and sums what an earlier reply left in its buffer into the checksum
/// of a shorter one. It cuts no IPv6 at all, and is not given what would be longer in that.
const MTU: usize = v4::MAX_LEN;

/// The gateway's link-local address. It is the same on every node, so that a pod that moves keeps its
/// route.
pub const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The ICMPv6 type of echo requests (RFC 4443 section 4.1).
const ECHO_REQUEST: u8 = 128;

/// A node's own addresses, which no pod may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    ipv4: Option<[Ipv4Addr; 2]>,
    ipv6: Option<[Ipv6Addr; 3]>,
}

/// The gateway's addresses in its subnets.
#[must_use]
pub fn addresses(subnets: impl Into<Nets>) -> Own {
    let subnets = subnets.into();
    Own {
        ipv4: subnets.ipv4().map(|net| [address(net), net.network()]),
        ipv6: subnets
            .ipv6()
            .map(|net| [address_v6(net), net.network(), LINK_LOCAL]),
    }
}

impl Own {
    /// Those of IPv4.
    #[must_use]
    pub fn ipv4(&self) -> &[Ipv4Addr] {
        self.ipv4.as_ref().map_or(&[], |it| it.as_slice())
    }

    /// Those of IPv6.
    #[must_use]
    pub fn ipv6(&self) -> &[Ipv6Addr] {
        self.ipv6.as_ref().map_or(&[], |it| it.as_slice())
    }

    /// Whether an address is one of them.
    #[must_use]
    pub fn contains(&self, address: impl Into<IpAddr>) -> bool {
        match address.into() {
            IpAddr::V4(address) => self.ipv4().contains(&address),
            IpAddr::V6(address) => self.ipv6().contains(&address),
        }
    }

    /// What neighbour discovery says of them. Each node has the base of its subnet, and routers of
    /// other makes have it beside us: others may have it, too.
    #[must_use]
    pub fn held(&self) -> Option<[Held; 3]> {
        let held = |address, anycast| Held {
            address,
            router: true,
            anycast,
        };
        let [address, base, link_local] = self.ipv6?;
        Some([
            held(address, false),
            held(base, true),
            held(link_local, false),
        ])
    }
}

/// The services on a node's own addresses.
pub struct Gateway {
    arp: Endpoint,
    ip: Endpoint,
}

struct Endpoint {
    interface: Interface,
    device: Queues,
    sockets: SocketSet<'static>,
}

impl Gateway {
    /// A gateway with its addresses in these subnets.
    #[must_use]
    pub fn new(
        subnets: impl Into<Nets>,
        mac: EthernetAddress,
        random_seed: u64,
        now: Instant,
    ) -> Self {
        let subnets = subnets.into();
        let own = self::addresses(subnets);
        let endpoint = |hardware, medium, mtu| {
            let mut device = Queues::new(medium, mtu);
            let mut config = Config::new(hardware);
            config.random_seed = random_seed;
            let mut interface = Interface::new(config, &mut device, now);
            interface.update_ip_addrs(|addresses| {
                // Capacity for eight is a feature of the dependency; five always fit.
                // ARP is answered to who is in the subnet.
                let len = subnets.ipv4().map_or(32, |net| net.prefix_len());
                for (address, len) in own.ipv4().iter().zip([len, 32]) {
                    let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(*address, len)));
                }
                for address in own.ipv6() {
                    let _ = addresses.push(IpCidr::Ipv6(Ipv6Cidr::new(*address, 128)));
                }
            });
            Endpoint {
                interface,
                device,
                sockets: SocketSet::new(Vec::new()),
            }
        };
        Self {
            arp: endpoint(
                HardwareAddress::Ethernet(mac),
                Medium::Ethernet,
                MTU + super::frame::HEADER_LEN,
            ),
            ip: endpoint(HardwareAddress::Ip, Medium::Ip, MTU),
        }
    }

    /// Hears an ARP frame and gives each frame of the answer to `reply`.
    pub fn arp(&mut self, now: Instant, frame: &[u8], reply: impl FnMut(&[u8])) {
        self.arp.process(now, &[frame], reply);
    }

    /// Takes an IP packet for one of the gateway's addresses and gives each packet of the answer
    /// to `reply`. In IPv6 it answers echo requests and nothing else.
    pub fn ip(&mut self, now: Instant, packet: &[u8], reply: impl FnMut(&[u8])) {
        if packet.first().is_none_or(|first| first >> 4 != 6) {
            self.ip.process(now, &[packet], reply);
        } else if let Some((header, message)) = echo_request(packet) {
            self.ip.process(now, &[&header, message], reply);
        }
    }
}

/// The gateway's address in a subnet: the first after the base.
#[must_use]
pub fn address(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()).saturating_add(1))
}

/// The gateway's address in a subnet of IPv6: the first after the base.
#[must_use]
pub fn address_v6(subnet: Ipv6Net) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(subnet.network()).saturating_add(1))
}

/// The echo request in an IPv6 packet, with a header that is right without extension headers between
/// the two. None of those may ask for more than to be passed over.
fn echo_request(packet: &[u8]) -> Option<([u8; v6::HEADER_LEN], &[u8])> {
    let packet = &packet[..v6::check(packet).ok()?];
    let upper = v6::upper_layer(packet).ok()?;
    let is_whole = upper.fragment.is_none_or(|it| it.is_atomic());
    let message = packet.get(upper.offset..)?;
    let is_request = IpProtocol::from(upper.protocol) == IpProtocol::Icmpv6
        && message.starts_with(&[ECHO_REQUEST, 0]);
    if !is_whole || !is_request || packet.len() > MTU || v6::unknown_option(packet).is_some() {
        return None;
    }
    let mut header = *packet.first_chunk()?;
    v6::set_next_header(&mut header, IpProtocol::Icmpv6);
    v6::set_payload_len(&mut header, message.len() as u16);
    Some((header, message))
}

impl Endpoint {
    /// Takes a packet in pieces, and gives `reply` what is answered.
    fn process(&mut self, now: Instant, packet: &[&[u8]], mut reply: impl FnMut(&[u8])) {
        self.device.push(packet);
        self.interface
            .poll_ingress_single(now, &mut self.device, &mut self.sockets);
        while let Some(answer) = self.device.sent.pop_front() {
            reply(&answer);
            self.device.free.push(answer);
        }
    }
}

/// A device of two queues with recycled buffers: a packet needs one, and its answer another.
struct Queues {
    capabilities: DeviceCapabilities,
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
    free: Vec<Vec<u8>>,
}

impl Queues {
    fn new(medium: Medium, mtu: usize) -> Self {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = medium;
        capabilities.max_transmission_unit = mtu;
        Self {
            capabilities,
            received: VecDeque::with_capacity(1),
            sent: VecDeque::with_capacity(1),
            free: Vec::with_capacity(2),
        }
    }

    fn push(&mut self, pieces: &[&[u8]]) {
        let mut buffer = self.free.pop().unwrap_or_default();
        buffer.clear();
        for piece in pieces {
            buffer.extend_from_slice(piece);
        }
        self.received.push_back(buffer);
    }
}

struct Received<'a> {
    packet: Vec<u8>,
    free: &'a mut Vec<Vec<u8>>,
}

struct Send<'a> {
    sent: &'a mut VecDeque<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Device for Queues {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Send<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Send<'_>)> {
        let packet = self.received.pop_front()?;
        let buffer = self.free.pop().unwrap_or_default();
        let send = Send {
            sent: &mut self.sent,
            buffer,
        };
        Some((
            Received {
                packet,
                free: &mut self.free,
            },
            send,
        ))
    }

    /// There are no sockets: all that is sent answers something.
    fn transmit(&mut self, _: Instant) -> Option<Send<'_>> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(&self.packet);
        self.free.push(self.packet);
        result
    }
}

impl TxToken for Send<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(mut self, len: usize, f: F) -> R {
        self.buffer.clear();
        self.buffer.resize(len, 0);
        let result = f(&mut self.buffer);
        self.sent.push_back(self.buffer);
        result
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{Icmpv6Type, PacketBuilder, PacketHeaders, TransportHeader};

    use super::*;

    const POD: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 2);
    const OWN: [&str; 3] = ["fd00:0:0:1::1", "fd00:0:0:1::", "fe80::1"];

    fn subnets() -> Nets {
        "10.244.1.0/24,fd00:0:0:1::/64".parse().unwrap()
    }

    fn gateway(subnets: Nets) -> Gateway {
        Gateway::new(
            subnets,
            EthernetAddress([2, 0, 0, 0, 0, 1]),
            1,
            Instant::ZERO,
        )
    }

    fn answers(gateway: &mut Gateway, packet: &[u8]) -> Vec<Vec<u8>> {
        let mut answers = Vec::new();
        gateway.ip(Instant::ZERO, packet, |answer| {
            answers.push(answer.to_vec())
        });
        answers
    }

    fn ping(destination: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv6(POD.octets(), destination.octets(), 3)
            .icmpv6_echo_request(5, 6)
            .write(&mut packet, payload)
            .unwrap();
        packet
    }

    /// Puts extension headers between a packet's header and what it is about.
    fn behind(packet: &[u8], first: u8, headers: &[u8]) -> Vec<u8> {
        let mut packet = [
            &packet[..v6::HEADER_LEN],
            headers,
            &packet[v6::HEADER_LEN..],
        ]
        .concat();
        v6::set_next_header(&mut packet, first.into());
        let len = (packet.len() - v6::HEADER_LEN) as u16;
        v6::set_payload_len(&mut packet, len);
        packet
    }

    #[test]
    fn a_node_has_addresses_of_each_family_that_it_has() {
        let both = addresses(subnets());
        assert_eq!(
            both.ipv4(),
            [[10, 244, 1, 1], [10, 244, 1, 0]].map(Ipv4Addr::from)
        );
        assert_eq!(both.ipv6(), OWN.map(|it| it.parse::<Ipv6Addr>().unwrap()));
        for own in both.ipv6() {
            assert!(both.contains(*own));
        }
        assert!(both.contains(Ipv4Addr::new(10, 244, 1, 0)) && !both.contains(POD));
        let ipv4 = addresses("10.244.1.0/24".parse::<Nets>().unwrap());
        assert!(ipv4.ipv6().is_empty() && ipv4.held().is_none());
        assert!(!ipv4.contains(LINK_LOCAL));
        let ipv6 = addresses("fd00:0:0:1::/64".parse::<Nets>().unwrap());
        assert!(ipv6.ipv4().is_empty());
        let anycast = ipv6.held().unwrap().map(|it| it.anycast);
        assert_eq!(anycast, [false, true, false]);
    }

    /// v6LC.5.1.1: an echo request to each of the addresses, of any length.
    #[test]
    fn echo_requests_over_ipv6_are_answered() {
        let mut gateway = gateway(subnets());
        for own in OWN.map(|it| it.parse::<Ipv6Addr>().unwrap()) {
            for len in [0, 1, 56, 1500, 9000, 65_535 - 48] {
                let payload: Vec<_> = (0..len).map(|at| at as u8).collect();
                let answers = answers(&mut gateway, &ping(own, &payload));
                let [answer] = answers.as_slice() else {
                    panic!("{answers:x?}");
                };
                let headers = PacketHeaders::from_ip_slice(answer).unwrap();
                let Some(etherparse::NetHeaders::Ipv6(ip, _)) = headers.net else {
                    panic!("{headers:?}");
                };
                assert_eq!((ip.source, ip.destination), (own.octets(), POD.octets()));
                assert_eq!(ip.hop_limit, 64);
                let Some(TransportHeader::Icmpv6(icmp)) = headers.transport else {
                    panic!();
                };
                let Icmpv6Type::EchoReply(echo) = icmp.icmp_type else {
                    panic!("{icmp:?}");
                };
                assert_eq!(
                    (echo.id, echo.seq, headers.payload.slice()),
                    (5, 6, &payload[..])
                );
                assert!(v6::has_icmp_checksum(answer, 40));
            }
        }
        assert!(answers(&mut gateway, &ping(POD, b"other")).is_empty());
        let ipv4 = "10.244.1.0/24".parse().unwrap();
        let other = answers(&mut super::tests::gateway(ipv4), &ping(LINK_LOCAL, b""));
        assert!(other.is_empty(), "it has no IPv6");
    }

    /// v6LC.1.2.1 to 1.2.7: an echo request behind headers and options is one.
    #[test]
    fn extension_headers_are_passed_over_if_they_may_be() {
        let mut gateway = gateway(subnets());
        let request = ping(LINK_LOCAL, b"ping");
        let plain = answers(&mut gateway, &request);
        let option = |kind: u8| [58, 0, kind, 4, 0, 0, 0, 0];
        for (name, first, headers, is_answered) in [
            ("padding", 60, option(1).to_vec(), true),
            ("an option to skip", 60, option(0x3f).to_vec(), true),
            (
                "an option to skip on each hop",
                0,
                option(0x1e).to_vec(),
                true,
            ),
            ("router alert", 0, vec![58, 0, 5, 2, 0, 0, 1, 0], true),
            ("an option to drop", 60, option(0x40).to_vec(), false),
            ("an option to report", 0, option(0x80).to_vec(), false),
            (
                "an option to report to one",
                60,
                option(0xc0).to_vec(),
                false,
            ),
            (
                "an atomic fragment",
                44,
                vec![58, 0, 0, 0, 0, 0, 0, 7],
                true,
            ),
            (
                "the first fragment",
                44,
                vec![58, 0, 0, 1, 0, 0, 0, 7],
                false,
            ),
            ("a later fragment", 44, vec![58, 0, 0, 8, 0, 0, 0, 7], false),
            ("a source route", 43, vec![58, 0, 0, 0, 0, 0, 0, 0], false),
            ("a jumbogram", 0, vec![58, 0, 0xc2, 4, 0, 1, 0, 0], false),
        ] {
            let answers = answers(&mut gateway, &behind(&request, first, &headers));
            let expected = if is_answered { plain.as_slice() } else { &[] };
            assert_eq!(answers, expected, "{name}");
        }
    }

    /// smoltcp would answer some of these, with errors about the wrong place.
    #[test]
    fn nothing_but_echo_requests_is_answered_over_ipv6() {
        let mut gateway = gateway(subnets());
        let request = ping(LINK_LOCAL, b"ping");
        let with = |at: usize, value: u8| {
            let mut packet = request.clone();
            packet[at] = value;
            v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN);
            packet
        };
        let mut damaged = request.clone();
        *damaged.last_mut().unwrap() ^= 1;
        for packet in [
            damaged,
            with(40, 129),
            with(40, 1),
            with(40, 135),
            with(40, 130),
            with(41, 1),
            with(6, 6),
            with(6, 17),
            with(6, 59),
            with(6, 200),
            with(8, 0xff),
            request[..51].to_vec(),
            request[..39].to_vec(),
        ] {
            assert!(answers(&mut gateway, &packet).is_empty(), "{packet:x?}");
        }
        let padded = [&request[..], &[7; 5]].concat();
        assert_eq!(answers(&mut gateway, &padded).len(), 1);
    }
}
