//! Messages between nodes: datagrams from gateway to gateway, over the pod network itself.
//!
//! What they say is for whoever runs the nodes. Here it is checked that they come from another node's
//! gateway, and how many. Pods cannot send any.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use muslin_encap::buffer::PacketBuf;
use muslin_encap::ip::{v4, v6};
use smoltcp::time::Instant;
use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv6Packet, UdpPacket};

use crate::bucket::TokenBucket;
use crate::drops::DropReason;

/// The UDP port of the gateway, to which and from which messages are sent.
pub const PORT: u16 = 8486;
/// The longest message, in bytes.
pub const MAX_LEN: usize = 1200;

/// Messages that may wait to be taken.
const WAITING: usize = 64;
/// Messages that may come in a second, and at once.
const RATE: u32 = 200;
const BURST: u32 = 64;
const UDP_HEADER_LEN: usize = 8;

/// A message and the gateway that has sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The gateway's address.
    pub from: IpAddr,
    /// The message.
    pub bytes: Vec<u8>,
}

/// What a node has heard from others.
#[derive(Debug, Clone)]
pub(super) struct Mailbox {
    bucket: TokenBucket,
    waiting: VecDeque<Message>,
}

impl Mailbox {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            bucket: TokenBucket::full(RATE, BURST, now),
            waiting: VecDeque::new(),
        }
    }

    /// Keeps the message in a packet that [`is_message`].
    pub(super) fn take(&mut self, now: Instant, packet: &[u8]) -> Result<(), DropReason> {
        let view = Ipv4Packet::new_unchecked(packet);
        let ends = (view.src_addr().into(), view.dst_addr().into());
        self.take_datagram(now, ends, view.payload())
    }

    /// Keeps the message in a packet that [`is_message_v6`].
    pub(super) fn take_v6(&mut self, now: Instant, packet: &[u8]) -> Result<(), DropReason> {
        let view = Ipv6Packet::new_unchecked(packet);
        // In IPv6 a datagram has a checksum (RFC 8200 section 8.1).
        if view.payload().get(6..8) == Some(&[0, 0]) {
            return Err(DropReason::ExchangeMalformed);
        }
        let ends = (view.src_addr().into(), view.dst_addr().into());
        self.take_datagram(now, ends, view.payload())
    }

    fn take_datagram(
        &mut self,
        now: Instant,
        (from, to): (IpAddr, IpAddr),
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let datagram = UdpPacket::new_checked(datagram);
        let datagram = datagram.map_err(|_| DropReason::ExchangeMalformed)?;
        let is_whole = datagram.verify_checksum(&from.into(), &to.into());
        if !is_whole || datagram.src_port() != PORT || datagram.payload().len() > MAX_LEN {
            return Err(DropReason::ExchangeMalformed);
        }
        if self.waiting.len() >= WAITING || !self.bucket.take(now, 1) {
            return Err(DropReason::ExchangeRate);
        }
        let bytes = datagram.payload().to_vec();
        self.waiting.push_back(Message { from, bytes });
        Ok(())
    }

    pub(super) fn next(&mut self) -> Option<Message> {
        self.waiting.pop_front()
    }
}

/// Whether a packet to the gateway, which begins with its IPv4 header, is a message.
pub(super) fn is_message(packet: &PacketBuf<'_>) -> bool {
    let view = Ipv4Packet::new_unchecked(packet.as_slice());
    let is_fragment = view.more_frags() || view.frag_offset() != 0;
    let port = view.payload().get(2..4);
    view.next_header() == IpProtocol::Udp
        && !is_fragment
        && packet.is_single()
        && port == Some(&PORT.to_be_bytes())
}

/// The same of one that begins with its IPv6 header.
pub(super) fn is_message_v6(packet: &PacketBuf<'_>) -> bool {
    let view = Ipv6Packet::new_unchecked(packet.as_slice());
    let port = view.payload().get(2..4);
    // Messages have no extension headers, and so are no fragments either.
    view.next_header() == IpProtocol::Udp && packet.is_single() && port == Some(&PORT.to_be_bytes())
}

/// Whether an address is that of the gateway of a lease.
pub(super) fn is_gateway(address: IpAddr, lease: IpNet) -> bool {
    match lease {
        IpNet::V4(lease) => super::gateway::address(lease.trunc()) == address,
        IpNet::V6(lease) => super::gateway::address_v6(lease.trunc()) == address,
    }
}

/// The packet of a message with this flow label, which is another than that of the message before it:
/// datagrams with a checksum might be merged on their way otherwise.
pub(super) fn packet_v6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    flow_label: u32,
    message: &[u8],
) -> Option<Vec<u8>> {
    if message.len() > MAX_LEN {
        return None;
    }
    let payload_len = UDP_HEADER_LEN + message.len();
    let mut bytes = vec![0; v6::HEADER_LEN + payload_len];
    let header = v6::Header {
        traffic_class: 0,
        flow_label,
        payload_len: payload_len as u16,
        next_header: IpProtocol::Udp,
        hop_limit: v6::DEFAULT_HOP_LIMIT,
        source,
        destination,
    };
    let (head, rest) = bytes.split_at_mut(v6::HEADER_LEN);
    head.copy_from_slice(&header.to_bytes());
    let mut datagram = write_datagram(rest, message);
    datagram.fill_checksum(&source.into(), &destination.into());
    Some(bytes)
}

/// Writes a message's datagram, without a checksum.
fn write_datagram<'a>(room: &'a mut [u8], message: &[u8]) -> UdpPacket<&'a mut [u8]> {
    let mut datagram = UdpPacket::new_unchecked(room);
    datagram.set_src_port(PORT);
    datagram.set_dst_port(PORT);
    datagram.set_len((UDP_HEADER_LEN + message.len()) as u16);
    datagram.payload_mut().copy_from_slice(message);
    datagram.set_checksum(0);
    datagram
}

/// The packet of a message.
pub(super) fn packet(source: Ipv4Addr, destination: Ipv4Addr, message: &[u8]) -> Option<Vec<u8>> {
    let len = v4::HEADER_LEN + UDP_HEADER_LEN + message.len();
    if message.len() > MAX_LEN {
        return None;
    }
    let mut bytes = vec![0; len];
    let header = v4::Header {
        dscp: 0,
        total_len: len as u16,
        ident: 0,
        dont_fragment: true,
        ttl: v4::DEFAULT_TTL,
        protocol: IpProtocol::Udp,
        source,
        destination,
    };
    let (head, rest) = bytes.split_at_mut(v4::HEADER_LEN);
    head.copy_from_slice(&header.to_bytes());
    // Datagrams with a checksum might be merged on their way.
    let _ = write_datagram(rest, message);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use muslin_encap::buffer::HEADROOM;
    use muslin_encap::mtu::Mtu;
    use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
    use smoltcp::time::Duration;
    use smoltcp::wire::EthernetAddress;

    use super::*;
    use crate::addresses::Nets;
    use crate::datapath::egress::{Egress, EgressConfig, NoHost, Policy};
    use crate::datapath::node::{Node, NodeConfig, Verdict};
    use crate::datapath::peer::{Peer, PeerId};
    use crate::datapath::port::{Attachment, PortId};
    use crate::datapath::tunnel::Tunnel;
    use crate::datapath::{Datapath, Merging, frame, gateway};

    const GATEWAY_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
    const POD_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 1, 2]);

    fn outer(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 8472))
    }

    fn at(number: u8, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, number, host)
    }

    fn outer_v6(number: u8) -> SocketAddr {
        let address = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, number.into());
        SocketAddr::from((address, 8472))
    }

    fn at_v6(number: u8, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x244, 0, number.into(), 0, 0, 0, host.into())
    }

    fn subnet_v6(number: u8) -> IpNet {
        format!("{}/64", at_v6(number, 0)).parse().unwrap()
    }

    fn subnet(number: u8) -> IpNet {
        format!("10.244.{number}.0/24").parse().unwrap()
    }

    /// Node 1 or 2, with the other for a peer and a pod at `.2`.
    fn node(number: u8) -> Node {
        let vtep = |last| VtepMac::from_random([2, 0, 0, 0, 2, last]);
        let tunnel = Tunnel::Vxlan {
            vni: Vni::new(1).unwrap(),
            mac: vtep(number),
            mac_v6: Some(vtep(10 + number)),
        };
        let mtu = Mtu::new(1450).unwrap();
        let subnets = format!("{},{}", subnet(number), subnet_v6(number));
        let subnets: Nets = subnets.parse().unwrap();
        let config = NodeConfig::new(subnets, GATEWAY_MAC, tunnel, mtu, 7);
        let mut node = Node::new(config, Instant::ZERO).unwrap();
        let other = 3 - number;
        let (ends, ends_v6) = (outer(other), outer_v6(other));
        node.set_peer(Peer::new(PeerId(0), subnet(other), ends).with_vtep(vtep(other)));
        let peer = Peer::new(PeerId(1), subnet_v6(other), ends_v6);
        node.set_peer(peer.with_vtep(vtep(10 + other)));
        let addresses = vec![at(number, 2).into(), at_v6(number, 2).into()];
        node.attach(PortId(2), Attachment::new(POD_MAC, addresses));
        let network: Nets = "10.244.0.0/16,fd00:244::/48".parse().unwrap();
        node.set_egress(Some(network));
        node
    }

    /// What node 2 decides about a packet that node 1 has sent to it as its own.
    fn arrives(there: &mut Node, now: Instant, packet: &[u8]) -> Verdict {
        let mut here = node(1);
        let mut room = vec![0; HEADROOM + 2000];
        here.route_own(now, packet);
        let mut out = PacketBuf::new(&mut room, HEADROOM, 0).unwrap();
        let sent = here.poll_output(&mut out);
        let outer = match sent {
            Some(Verdict::Peer { destination, .. }) if destination.is_ipv6() => outer_v6(1),
            Some(Verdict::Peer { .. }) => outer(1),
            sent => panic!("{sent:?}"),
        };
        there.from_underlay(now, outer, &mut out)
    }

    fn message(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
        packet(from, to, b"hello").unwrap()
    }

    #[test]
    fn a_message_goes_from_gateway_to_gateway() {
        let now = Instant::ZERO;
        let mut here = node(1);
        here.set_exchange(now, true);
        here.send_exchange(now, at(2, 1).into(), b"hello").unwrap();
        let mut room = vec![0; HEADROOM + 2000];
        let mut out = PacketBuf::new(&mut room, HEADROOM, 0).unwrap();
        assert!(matches!(
            here.poll_output(&mut out),
            Some(Verdict::Peer { .. })
        ));
        let mut there = node(2);
        there.set_exchange(now, true);
        let verdict = there.from_underlay(now, outer(1), &mut out);
        assert_eq!(verdict, Verdict::Consumed);
        let from = at(1, 1).into();
        let bytes = b"hello".to_vec();
        assert_eq!(there.poll_exchange(), Some(Message { from, bytes }));
        assert_eq!(there.poll_exchange(), None);
        // To nobody else, and nothing that would be fragmented.
        for to in [at(2, 2), at(3, 1), at(1, 1), Ipv4Addr::new(192, 0, 2, 2)] {
            let sent = here.send_exchange(now, to.into(), b"hello");
            assert_eq!(sent, Err(DropReason::NoRoute), "{to}");
        }
        let long = here.send_exchange(now, at(2, 1).into(), &[0; MAX_LEN + 1]);
        assert_eq!(long, Err(DropReason::FragmentationNeeded));
    }

    #[test]
    fn nobody_else_is_heard() {
        let now = Instant::ZERO;
        let mut there = node(2);
        // Not if it is not asked for: then it is a datagram to a port where nothing listens.
        let good = message(at(1, 1), at(2, 1));
        assert_eq!(arrives(&mut there, now, &good), Verdict::Egress);
        there.set_exchange(now, true);
        // Pods of the other node, and its other address.
        for (from, to) in [
            (at(1, 2), at(2, 1)),
            (at(1, 0), at(2, 1)),
            (at(1, 1), at(2, 0)),
        ] {
            let verdict = arrives(&mut there, now, &message(from, to));
            assert_eq!(verdict, Verdict::Egress, "{from} {to}");
        }
        // Its own pods.
        let mut room = vec![0; HEADROOM + 200];
        for from in [at(2, 2), at(1, 1)] {
            let packet = message(from, at(2, 1));
            let mut pod = PacketBuf::new(&mut room, HEADROOM, 0).unwrap();
            pod.replace(&packet).unwrap();
            frame::prepend(&mut pod, POD_MAC, GATEWAY_MAC).unwrap();
            let verdict = there.from_port(now, PortId(2), &mut pod);
            let expected = match from == at(2, 2) {
                true => Verdict::Egress,
                false => Verdict::Drop(DropReason::SourceAddressSpoofed),
            };
            assert_eq!(verdict, expected, "{from}");
        }
        // Parts of datagrams.
        let mut part = good.clone();
        let mut view = Ipv4Packet::new_unchecked(&mut part);
        view.set_more_frags(true);
        view.fill_checksum();
        assert_eq!(arrives(&mut there, now, &part), Verdict::Egress);
        let mut broken = good.clone();
        broken[v4::HEADER_LEN + 5] = 200;
        let malformed = Verdict::Drop(DropReason::ExchangeMalformed);
        assert_eq!(arrives(&mut there, now, &broken), malformed);
        assert_eq!(there.poll_exchange(), None);
        assert_eq!(arrives(&mut there, now, &good), Verdict::Consumed);
        assert!(there.poll_exchange().is_some());
    }

    #[test]
    fn messages_of_ipv6_are_not_merged_on_their_way() {
        let now = Instant::ZERO;
        let mut here = node(1);
        let to = at_v6(2, 1);
        let mut datagrams = Vec::new();
        for _ in 0..2 {
            here.send_exchange(now, to.into(), &[7; MAX_LEN]).unwrap();
            let mut room = vec![0; HEADROOM + 2000];
            let mut out = PacketBuf::new(&mut room, HEADROOM, 0).unwrap();
            assert!(matches!(
                here.poll_output(&mut out),
                Some(Verdict::Peer { destination, .. }) if destination == outer_v6(2)
            ));
            datagrams.push(out.as_slice().to_vec());
        }
        let mut there = node(2);
        there.set_exchange(now, true);
        let egress = EgressConfig::new(Policy::closed(), Mtu::new(1450).unwrap(), 7);
        let mut path = Datapath::new(there, Egress::new(egress, now));
        let datagrams = datagrams.iter_mut().map(|it| (outer_v6(1), &mut it[..]));
        let taken = |verdict, _: &mut PacketBuf<'_>| assert_eq!(verdict, Verdict::Consumed);
        path.from_underlay_batch(now, datagrams, Merging::On, &mut NoHost, taken);
        let message = Message {
            from: at_v6(1, 1).into(),
            bytes: vec![7; MAX_LEN],
        };
        for _ in 0..2 {
            let heard = path.node_mut().poll_exchange();
            assert_eq!(heard.as_ref(), Some(&message));
        }
        assert_eq!(path.node_mut().poll_exchange(), None);
        for to in [at_v6(2, 2), at_v6(3, 1), at_v6(1, 1), gateway::LINK_LOCAL] {
            let sent = here.send_exchange(now, to.into(), b"hello");
            assert_eq!(sent, Err(DropReason::NoRoute), "{to}");
        }
    }

    #[test]
    fn nobody_else_is_heard_in_ipv6() {
        let now = Instant::ZERO;
        let mut there = node(2);
        let (from, to) = (at_v6(1, 1), at_v6(2, 1));
        let message = |from, to| packet_v6(from, to, 1, b"hello").unwrap();
        let good = message(from, to);
        assert_eq!(arrives(&mut there, now, &good), Verdict::Egress);
        there.set_exchange(now, true);
        for (from, to) in [(at_v6(1, 2), to), (at_v6(1, 0), to), (from, at_v6(2, 0))] {
            let verdict = arrives(&mut there, now, &message(from, to));
            assert_eq!(verdict, Verdict::Egress, "{from} {to}");
        }
        let mut room = vec![0; HEADROOM + 200];
        for (from, expected) in [
            (at_v6(2, 2), Verdict::Egress),
            (from, Verdict::Drop(DropReason::SourceAddressSpoofed)),
        ] {
            let mut pod = PacketBuf::new(&mut room, HEADROOM, 0).unwrap();
            pod.replace(&message(from, to)).unwrap();
            frame::prepend(&mut pod, POD_MAC, GATEWAY_MAC).unwrap();
            pod.as_mut_slice()[12..14].copy_from_slice(&[0x86, 0xdd]);
            assert_eq!(
                there.from_port(now, PortId(2), &mut pod),
                expected,
                "{from}"
            );
        }
        // A part of a datagram, one with a wrong checksum, and one with none.
        let mut part = good.clone();
        part.splice(40..40, [17, 0, 0, 1, 0, 0, 0, 9]);
        (part[5], part[6]) = (part[5] + 8, 44);
        assert_eq!(arrives(&mut there, now, &part), Verdict::Egress);
        let malformed = Verdict::Drop(DropReason::ExchangeMalformed);
        for checksum in [[1, 2], [0, 0]] {
            let mut broken = good.clone();
            broken[46..48].copy_from_slice(&checksum);
            assert_eq!(arrives(&mut there, now, &broken), malformed);
        }
        assert_eq!(there.poll_exchange(), None);
        assert_eq!(arrives(&mut there, now, &good), Verdict::Consumed);
        assert!(there.poll_exchange().is_some());
    }

    #[test]
    fn too_many_are_counted() {
        let mut now = Instant::ZERO;
        let mut there = node(2);
        there.set_exchange(now, true);
        let good = message(at(1, 1), at(2, 1));
        let taken = |now, there: &mut Node| {
            let verdicts = (0..100).map(|_| arrives(there, now, &good));
            verdicts.filter(|it| *it == Verdict::Consumed).count()
        };
        assert_eq!(taken(now, &mut there), WAITING);
        // None is read.
        now += Duration::from_secs(1);
        assert_eq!(taken(now, &mut there), 0);
        while there.poll_exchange().is_some() {}
        let burst = BURST as usize;
        assert_eq!(taken(now, &mut there), burst);
        while there.poll_exchange().is_some() {}
        assert_eq!(taken(now, &mut there), 0);
        let dropped = there.counters().dropped_for(DropReason::ExchangeRate);
        assert_eq!(dropped, 36 + 100 + 36 + 100);
    }
}
