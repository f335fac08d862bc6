//! The same in IPv6: a packet of full size to and from pods of peers, by VXLAN.

use std::net::{Ipv6Addr, SocketAddr};

use ipnet::Ipv6Net;
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::v6;
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::vxlan::{self, Vni, VtepMac};
use muslin_stack::Instant;
use muslin_stack::addresses::Nets;
use muslin_stack::datapath::node::{Node, NodeConfig, Verdict};
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::tunnel::Tunnel;
use smoltcp::wire::{EthernetAddress, IpProtocol};

use crate::scenes::{Random, Way};

const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x0a, 0x58, 10, 255, 0, 1]);
const POD_MAC: EthernetAddress = EthernetAddress([0x0a, 0x58, 0, 0, 0, 2]);
const POD: PortId = PortId(2);
const MTU: u16 = 1430;
const ETHERNET_LEN: usize = 14;
const UDP_LEN: usize = 8;
/// Of the longest packet: VXLAN, Ethernet, IPv6 and UDP.
const HEADERS_LEN: usize = vxlan::HEADER_LEN + ETHERNET_LEN + v6::HEADER_LEN + UDP_LEN;

const OWN_SUBNET: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0), 64);

/// The IPv6 subnet of a peer.
fn subnet(index: u32) -> Ipv6Net {
    Ipv6Net::new_assert(inside(0xfd00, index), 64)
}

fn inside(first: u16, index: u32) -> Ipv6Addr {
    Ipv6Addr::new(first, 0, (index >> 16) as u16, index as u16, 0, 0, 0, 0)
}

fn underlay(index: u32) -> SocketAddr {
    SocketAddr::new(inside(0xfd99, index).into(), vxlan::PORT)
}

fn vtep(number: u32) -> VtepMac {
    let [a, b, c, d] = number.to_be_bytes();
    VtepMac::from_random([6, 1, a, b, c, d])
}

/// The VTEP of the node.
const OWN_VTEP: u32 = u32::MAX;

fn pod() -> Ipv6Addr {
    Ipv6Addr::from_bits(OWN_SUBNET.network().to_bits() + 2)
}

/// A node of both IP versions with a guarded pod, and this many peers of IPv6.
fn node(peers: u32) -> Node {
    let tunnel = Tunnel::Vxlan {
        vni: Vni::new(1).expect("it fits 24 bits"),
        mac: vtep(OWN_VTEP - 1),
        mac_v6: Some(vtep(OWN_VTEP)),
    };
    let ipv4 = "10.255.0.0/24".parse().expect("it is a subnet");
    let mtu = Mtu::new((MTU + 20).into()).expect("it is large enough");
    let nets = Nets::with_ipv4(ipv4, Some(OWN_SUBNET));
    let mut config = NodeConfig::new(nets, GATEWAY_MAC, tunnel, mtu, 7);
    config.mtu_v6 = Mtu::new(MTU.into()).expect("it is large enough");
    let mut node = Node::new(config, Instant::ZERO).expect("the subnets are large enough");
    node.attach(POD, Attachment::new(POD_MAC, vec![pod().into()]));
    for index in 0..peers {
        let peer = Peer::new(PeerId(index), subnet(index).into(), underlay(index));
        node.set_peer(peer.with_vtep(vtep(index)));
    }
    node
}

/// An IPv6 packet of UDP and of full size that goes one way through a node, time and again.
pub struct SceneV6 {
    node: Node,
    way: Way,
    peers: u32,
    random: Random,
    /// Each packet begins with a new copy: a node edits packets in place.
    headers: [u8; HEADERS_LEN],
    /// Where the address is that is another one each time.
    address: usize,
    l3: usize,
    storage: Vec<u8>,
}

impl SceneV6 {
    /// A scene of a node with this many peers, whose first packet has gone the right way: to a peer, or
    /// from one.
    pub fn new(peers: u32, way: Way) -> Self {
        let (ethernet, ends, at) = match way {
            Way::FromPeer => {
                let ours = vtep(OWN_VTEP).get();
                ((ours, vtep(0).get()), (Ipv6Addr::UNSPECIFIED, pod()), 8)
            }
            _ => {
                let ends = (pod(), Ipv6Addr::UNSPECIFIED);
                ((GATEWAY_MAC, POD_MAC), ends, 24)
            }
        };
        let front = match way {
            Way::FromPeer => vec![8, 0, 0, 0, 0, 0, 1, 0],
            _ => Vec::new(),
        };
        let ((destination, source), link) = (ethernet, [0x86, 0xdd]);
        let front = [&front[..], &destination.0, &source.0, &link].concat();
        let l3 = front.len();
        let payload_len = MTU - v6::HEADER_LEN as u16;
        let header = v6::Header {
            traffic_class: 0,
            flow_label: 0,
            payload_len,
            next_header: IpProtocol::Udp,
            hop_limit: 64,
            source: ends.0,
            destination: ends.1,
        };
        let [high, low] = payload_len.to_be_bytes();
        let udp = [0x80, 1, 0x1f, 0x90, high, low, 1, 1];
        let front = [&front[..], &header.to_bytes(), &udp].concat();
        let mut headers = [0; HEADERS_LEN];
        headers[..front.len()].copy_from_slice(&front);
        let mut scene = Self {
            node: node(peers),
            way,
            peers,
            random: Random::default(),
            headers,
            address: l3 + at,
            l3,
            storage: vec![0; HEADROOM + HEADERS_LEN + usize::from(MTU)],
        };
        let verdict = scene.run();
        assert!(scene.is_right(verdict), "{way:?}: {verdict:?}");
        scene
    }

    /// Sends the next packet through the node.
    pub fn run(&mut self) -> Verdict {
        let index = self.random.below(self.peers);
        let room = &mut self.storage[HEADROOM..HEADROOM + HEADERS_LEN];
        room.copy_from_slice(&self.headers);
        let other = subnet(index).network().to_bits() + 9;
        room[self.address..self.address + 16].copy_from_slice(&other.to_be_bytes());
        let len = self.l3 + usize::from(MTU);
        let mut packet =
            PacketBuf::new(&mut self.storage, HEADROOM, len).expect("there is room for it");
        match self.way {
            Way::FromPeer => self
                .node
                .from_underlay(Instant::ZERO, underlay(index), &mut packet),
            _ => self.node.from_port(Instant::ZERO, POD, &mut packet),
        }
    }

    /// Whether a verdict is the one that packets of this scene have to get.
    pub fn is_right(&self, verdict: Verdict) -> bool {
        match (self.way, verdict) {
            (Way::FromPeer, verdict) => verdict == Verdict::Port(POD),
            (_, Verdict::Peer { .. }) => true,
            _ => false,
        }
    }
}
