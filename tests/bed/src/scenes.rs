//! Nodes with pods and peers, and packets for them: what the benchmarks and the test of
//! allocations run.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddrV4};

use ipnet::Ipv4Net;
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::checksum;
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::vxlan::{self, Vni, VtepMac};
use muslin_stack::Instant;
use muslin_stack::datapath::egress::{Egress, EgressConfig, NoHost, Policy};
use muslin_stack::datapath::filter::Unfiltered;
use muslin_stack::datapath::node::{Node, NodeConfig, Verdict};
use muslin_stack::datapath::observe::{Observer, Unobserved};
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::tunnel::Tunnel;
use muslin_stack::datapath::{Datapath, Merging};
use smoltcp::wire::EthernetAddress;

const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x0a, 0x58, 10, 255, 0, 1]);
const PODS: u32 = 10;
/// The pod that sends and receives, behind the port of the same number.
const POD: u32 = 2;
const OTHER_POD: u32 = 3;
const MTU: u16 = 1450;
const ETHERNET_LEN: usize = 14;
const UDP_HEADERS_LEN: usize = 28;
/// Of the longest packet: VXLAN, Ethernet and IPv4 header, ports.
const HEADERS_LEN: usize = vxlan::HEADER_LEN + ETHERNET_LEN + UDP_HEADERS_LEN;
/// All nodes have subnets of 128 addresses: 10.0.0.0/8 has room for 131,072 of them.
const SUBNET_LEN: u8 = 25;

/// The subnet of a peer.
pub fn subnet(index: u32) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::from_bits(0x0a00_0000 + (index << 7)), SUBNET_LEN)
}

fn own_subnet() -> Ipv4Net {
    subnet((1 << 17) - 1)
}

fn pod(host: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(own_subnet().network().to_bits() + host)
}

fn mac(number: u32) -> EthernetAddress {
    let [a, b, c, d] = number.to_be_bytes();
    EthernetAddress([0x0a, 0x58, a, b, c, d])
}

fn vtep(index: u32) -> VtepMac {
    VtepMac::try_from(mac(index + 0x100)).expect("it is unicast")
}

fn underlay(index: u32) -> SocketAddrV4 {
    let address = Ipv4Addr::from_bits(0xac10_0000 + index);
    SocketAddrV4::new(address, vxlan::PORT)
}

/// A source of evenly distributed numbers that costs a nanosecond (Marsaglia's xorshift).
pub struct Random(u32);

impl Default for Random {
    /// Always the same numbers.
    fn default() -> Self {
        Self(0x9e37_79b9)
    }
}

impl Random {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        ((u64::from(self.0) * u64::from(bound)) >> 32) as u32
    }
}

/// How a node of a scene encapsulates.
pub fn vxlan_tunnel() -> Tunnel {
    Tunnel::Vxlan {
        vni: Vni::new(1).expect("it fits 24 bits"),
        mac: vtep(1 << 20),
        mac_v6: None,
    }
}

/// A node with guarded pods and this many peers.
pub fn node(tunnel: Tunnel, peers: u32) -> Node {
    observed_node(tunnel, peers, Unobserved)
}

fn observed_node<O: Observer>(tunnel: Tunnel, peers: u32, observer: O) -> Node<O> {
    let mtu = Mtu::new(MTU.into()).expect("it is large enough");
    let config = NodeConfig::new(own_subnet(), GATEWAY_MAC, tunnel, mtu, 7);
    let node = Node::with(config, observer, Unfiltered, Instant::ZERO);
    let mut node = node.expect("the subnet is large enough");
    for host in POD..POD + PODS {
        let attachment = Attachment::new(mac(host), vec![pod(host).into()]);
        node.attach(PortId(host), attachment);
    }
    for index in 0..peers {
        let peer = Peer::new(PeerId(index), subnet(index).into(), underlay(index).into());
        node.set_peer(peer.with_vtep(vtep(index)));
    }
    node
}

/// Which way the packets of a scene go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From a pod to a pod of a random peer.
    ToPeer,
    /// From a pod of a random peer to a pod.
    FromPeer,
    /// From a pod to another one of the same node, by the switch.
    Switched,
    /// From a pod to all others.
    Flooded,
}

/// The headers of a UDP packet of full size, of which one address is different each time.
///
/// A node edits packets in place, so each begins with a new copy of its headers. Which peer it is
/// for or from is decided for each.
struct Headers {
    way: Way,
    peers: u32,
    random: Random,
    bytes: [u8; HEADERS_LEN],
    /// Where in the headers the varying address is, and the IPv4 header.
    address: usize,
    l3: usize,
    /// The sum of the IPv4 header without that address.
    sum: u16,
}

impl Headers {
    fn new(tunnel: Tunnel, peers: u32, way: Way) -> Self {
        let (source, destination) = match way {
            Way::ToPeer => (pod(POD), Ipv4Addr::UNSPECIFIED),
            Way::FromPeer => (Ipv4Addr::UNSPECIFIED, pod(POD)),
            Way::Switched => (pod(POD), pod(OTHER_POD)),
            Way::Flooded => (pod(POD), Ipv4Addr::BROADCAST),
        };
        let mut front = link_headers(tunnel, way);
        let l3 = front.len();
        front.extend(udp_headers(source, destination));
        let mut bytes = [0; HEADERS_LEN];
        bytes[..front.len()].copy_from_slice(&front);
        Self {
            way,
            peers,
            random: Random::default(),
            address: l3 + if way == Way::FromPeer { 12 } else { 16 },
            l3,
            sum: checksum::sum(&bytes[l3..l3 + 20]),
            bytes,
        }
    }

    /// Length of the whole packet.
    fn packet_len(&self) -> usize {
        self.l3 + usize::from(MTU)
    }

    /// Writes those of the next packet, and returns the index of its peer.
    fn write(&mut self, room: &mut [u8]) -> u32 {
        let index = self.random.below(self.peers);
        let room = &mut room[..HEADERS_LEN];
        room.copy_from_slice(&self.bytes);
        if matches!(self.way, Way::ToPeer | Way::FromPeer) {
            let address = (subnet(index).network().to_bits() + 9).to_be_bytes();
            room[self.address..self.address + 4].copy_from_slice(&address);
            let sum = !checksum::add(self.sum, checksum::sum(&address));
            room[self.l3 + 10..self.l3 + 12].copy_from_slice(&sum.to_be_bytes());
        }
        index
    }
}

/// A UDP packet of full size that goes one way through a node, time and again.
pub struct Scene<O = Unobserved> {
    node: Node<O>,
    headers: Headers,
    storage: Vec<u8>,
}

impl Scene {
    /// A scene of a node with this many peers, whose first packet has gone the right way.
    pub fn new(tunnel: Tunnel, peers: u32, way: Way) -> Self {
        Self::observed(tunnel, peers, way, Unobserved)
    }
}

impl<O: Observer> Scene<O> {
    /// The same with who observes the node.
    pub fn observed(tunnel: Tunnel, peers: u32, way: Way, observer: O) -> Self {
        let mut scene = Self {
            node: observed_node(tunnel, peers, observer),
            headers: Headers::new(tunnel, peers, way),
            storage: vec![0; HEADROOM + HEADERS_LEN + usize::from(MTU)],
        };
        let verdict = scene.run();
        assert!(scene.is_right(verdict), "{tunnel:?}, {way:?}: {verdict:?}");
        scene
    }

    /// Who observes the node.
    pub fn observer(&mut self) -> &mut O {
        self.node.observer_mut()
    }

    /// Puts the next packet into the buffer, and returns the index of its peer. All packets have
    /// this cost, which is not the node's.
    pub fn prepare(&mut self) -> u32 {
        self.headers.write(&mut self.storage[HEADROOM..])
    }

    /// Sends the next packet through the node.
    pub fn run(&mut self) -> Verdict {
        let index = self.prepare();
        let len = self.headers.packet_len();
        let mut packet =
            PacketBuf::new(&mut self.storage, HEADROOM, len).expect("there is room for it");
        match self.headers.way {
            Way::FromPeer => {
                self.node
                    .from_underlay(Instant::ZERO, underlay(index).into(), &mut packet)
            }
            Way::ToPeer | Way::Switched | Way::Flooded => {
                self.node.from_port(Instant::ZERO, PortId(POD), &mut packet)
            }
        }
    }

    /// Whether a verdict is the one that packets of this scene have to get.
    pub fn is_right(&self, verdict: Verdict) -> bool {
        match (self.headers.way, verdict) {
            (Way::ToPeer, Verdict::Peer { .. })
            | (
                Way::Flooded,
                Verdict::Flood {
                    except: Some(PortId(POD)),
                },
            ) => true,
            (Way::FromPeer, Verdict::Port(port)) => port == PortId(POD),
            (Way::Switched, Verdict::Port(port)) => port == PortId(OTHER_POD),
            _ => false,
        }
    }
}

/// Such packets from random peers, as they come by one system call: [`BATCH`] at once.
pub struct Batches {
    path: Datapath,
    headers: Headers,
    datagrams: Vec<(SocketAddrV4, Vec<u8>)>,
    used: usize,
}

/// As many as a worker reads at once.
const BATCH: usize = 64;

impl Batches {
    /// Batches for a node with this many peers, none of which has come yet.
    pub fn new(tunnel: Tunnel, peers: u32) -> Self {
        let mtu = Mtu::new(MTU.into()).expect("it is large enough");
        let egress = EgressConfig::new(Policy::closed(), mtu, 7);
        let egress = Egress::new(egress, Instant::ZERO);
        let datagram = (underlay(0), vec![0; HEADERS_LEN + usize::from(MTU)]);
        Self {
            path: Datapath::new(node(tunnel, peers), egress),
            headers: Headers::new(tunnel, peers, Way::FromPeer),
            datagrams: vec![datagram; BATCH],
            used: 0,
        }
    }

    /// Adds the next packet, and sends them all through the data path if that was the last of a
    /// batch: so the mean of many calls is the cost of a packet.
    pub fn run(&mut self) {
        let (source, datagram) = &mut self.datagrams[self.used];
        *source = underlay(self.headers.write(datagram));
        self.used += 1;
        if self.used < BATCH {
            return;
        }
        self.used = 0;
        let len = self.headers.packet_len();
        let datagrams = self.datagrams.iter_mut();
        let datagrams = datagrams.map(|(source, bytes)| ((*source).into(), &mut bytes[..len]));
        let send = |verdict, _: &mut PacketBuf<'_>| {
            assert_eq!(black_box(verdict), Verdict::Port(PortId(POD)));
        };
        let path = &mut self.path;
        path.from_underlay_batch(Instant::ZERO, datagrams, Merging::On, &mut NoHost, send);
    }
}

/// What is in front of the IPv4 header of a packet that goes this way.
fn link_headers(tunnel: Tunnel, way: Way) -> Vec<u8> {
    let (destination, source) = match (way, tunnel) {
        (Way::ToPeer, _) => (GATEWAY_MAC, mac(POD)),
        (Way::Switched, _) => (mac(OTHER_POD), mac(POD)),
        (Way::Flooded, _) => (EthernetAddress::BROADCAST, mac(POD)),
        (Way::FromPeer, Tunnel::Vxlan { mac, .. }) => (mac.get(), vtep(0).get()),
        (Way::FromPeer, _) => return Vec::new(),
    };
    let ethernet = [&destination.0[..], &source.0, &[8, 0]].concat();
    match way {
        Way::FromPeer => [&[8, 0, 0, 0, 0, 0, 1, 0], &ethernet[..]].concat(),
        Way::ToPeer | Way::Switched | Way::Flooded => ethernet,
    }
}

fn udp_headers(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let [high, low] = MTU.to_be_bytes();
    let mut bytes = vec![0x45, 0, high, low, 0, 1, 0x40, 0, 64, 17, 0, 0];
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    let [high, low] = (MTU - 20).to_be_bytes();
    bytes.extend([0x80, 1, 0x1f, 0x90, high, low, 0, 0]);
    bytes
}
