//! Two workers, and what must be true of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use etherparse::{
    Ethernet2Header, IpHeaders, NetHeaders, PacketBuilder, PacketBuilderStep, PacketHeaders,
    TransportHeader,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use muslin_stack::addresses::Nets;
use muslin_stack::datapath::egress::{
    self, Egress, FlowId, FlowKey, HostError, Owners, Policy, Protocol, Ready, Rules,
};
use muslin_stack::datapath::frame;
use muslin_stack::datapath::host_interface::{HostFlows, HostInterface};
use muslin_stack::datapath::node::{self, Node, Verdict};
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::published::{Client, PublishedPort};
use muslin_stack::datapath::tunnel::Tunnel;
use muslin_stack::datapath::{Datapath, Merging, Output, SiblingMessage, Siblings};
use muslin_stack::drops::DropReason;
use muslin_stack::{Duration, Instant};
use smoltcp::wire::{ArpOperation, EthernetAddress};

use crate::host::{Sent, Sockets};

const SUBNET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 1, 0), 24);
const NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);
/// The same of IPv6.
const SUBNET_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 0), 64);
const NETWORK_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0), 32);
/// The bit of a choice that is for IPv6.
const V6: u8 = 0x80;
const GATEWAY_MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);
const GATEWAY_VTEP: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 2]);
/// The VTEP of IPv6.
const GATEWAY_VTEP_V6: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 3]);
const WORKERS: usize = 2;
/// Guarded pods; the port behind theirs is a bridge's.
const PODS: usize = 2;
/// Other nodes; pods of the first send streams.
const PEERS: u32 = 2;
/// Bytes of such a stream's segments.
const SEGMENT: usize = 400;
/// An address of the host's.
const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
/// The same of IPv6.
const HOST_V6: Ipv6Addr = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1);
/// The host's addresses, as its interface has them. They are none of its clients'.
const HOSTS: [Ipv4Addr; 2] = [Ipv4Addr::new(203, 0, 113, 1), Ipv4Addr::new(203, 0, 113, 2)];
/// How long an end of the host's keeps its port outside at least.
const HOST_IDLE: Duration = Duration::from_secs(120);
/// The published port of each pod.
const PUBLISHED: u16 = 53;
/// Messages that may wait for a worker.
const MAILBOX: usize = 8;
/// Timeouts until all is idle.
const MAX_TIMERS: usize = 2000;

struct Worker {
    path: Datapath,
    sockets: Sockets,
    mailbox: VecDeque<SiblingMessage>,
}

/// The workers of a node.
pub(crate) struct Harness {
    workers: Vec<Worker>,
    now: Instant,
    /// The payload of the next datagram.
    next: u32,
    /// Datagrams of pods that have not gone out: from which socket, and where to.
    offered: BTreeMap<u32, (SocketAddr, SocketAddr)>,
    /// Packets of pods that must not go out any more.
    ended: BTreeSet<u32>,
    lost: u64,
    /// What clients have sent that has not reached a pod: which pod.
    inbound: BTreeMap<u32, usize>,
    /// Whom a pod sees as the client of its published port, and whom it dials.
    client: [Option<SocketAddr>; PODS],
    caller: [Option<(SocketAddr, u32)>; PODS],
    dials: BTreeSet<FlowId>,
    /// By which ports pods of peers know ends of the host, and until when.
    known: BTreeMap<(u32, u16), (SocketAddr, Instant)>,
    /// The sequence number of the next segment of a pod of a peer's.
    sequence: u32,
}

/// A builder of a packet between two addresses of one IP version.
fn between(
    frame: PacketBuilderStep<Ethernet2Header>,
    from: IpAddr,
    to: IpAddr,
) -> PacketBuilderStep<IpHeaders> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => frame.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => frame.ipv6(from.octets(), to.octets(), 64),
        _ => panic!("{from} and {to} are of two versions"),
    }
}

/// Which pod has an address.
fn index_of(address: IpAddr) -> usize {
    let index = (0..PODS).find(|index| addresses(*index).contains(&address));
    index.expect("it is a pod's")
}

/// A pod's address of each IP version.
fn addresses(index: usize) -> [IpAddr; 2] {
    let ipv6 = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 2 + index as u16);
    [pod(index).into(), ipv6.into()]
}

/// The one that a choice is about.
fn address_of(index: usize, choice: u8) -> IpAddr {
    addresses(index)[usize::from(choice & V6 != 0)]
}

/// The one by which a pod reaches another end.
fn address_towards(index: usize, other: SocketAddr) -> IpAddr {
    addresses(index)[usize::from(other.is_ipv6())]
}

fn pod(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, 2 + index as u8)
}

fn mac(index: usize) -> EthernetAddress {
    EthernetAddress([2, 0, 0, 0, 1, index as u8])
}

const fn underlay(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 0, 2 + index)
}

fn vtep(index: u32) -> VtepMac {
    VtepMac::from_random([2, 0, 0, 0, 2, index as u8])
}

fn peer(index: u32) -> Peer {
    let subnet = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 2 + index as u8, 0), 24);
    let address = SocketAddr::new(underlay(index as u8).into(), 8472);
    Peer::new(PeerId(index), subnet.into(), address).with_vtep(vtep(index))
}

/// The same peer's half of IPv6, which has another number.
fn peer_v6(index: u32) -> Peer {
    let subnet = Ipv6Addr::new(0xfd00, 0, 0, 2 + index as u16, 0, 0, 0, 0);
    let subnet = Ipv6Net::new_assert(subnet, 64);
    let address = SocketAddr::new(underlay_v6(index as u8), 8472);
    Peer::new(PeerId(PEERS + index), subnet.into(), address).with_vtep(vtep(index))
}

fn underlay_v6(index: u8) -> IpAddr {
    Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 2 + u16::from(index)).into()
}

/// A pod of a peer.
fn far(index: u32) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 2 + index as u8, 2)
}

/// Source and destination of a UDP datagram that begins with its IPv4 header.
fn ends_of(packet: &[u8]) -> (SocketAddr, SocketAddr) {
    let headers = PacketHeaders::from_ip_slice(packet).expect("it is a packet");
    let (Some(NetHeaders::Ipv4(ip, _)), Some(TransportHeader::Udp(udp))) =
        (headers.net, headers.transport)
    else {
        panic!("it is no datagram");
    };
    let payload = headers.payload.slice();
    let sum = udp.calc_checksum_ipv4(&ip, payload);
    assert_eq!(sum, Ok(udp.checksum), "the checksum is wrong");
    let end = |address: [u8; 4], port| SocketAddr::new(Ipv4Addr::from(address).into(), port);
    (
        end(ip.source, udp.source_port),
        end(ip.destination, udp.destination_port),
    )
}

fn outside(byte: u8, is_v6: bool) -> SocketAddr {
    let number = 1 + byte % 3;
    let address = match is_v6 {
        false => Ipv4Addr::new(192, 0, 2, number).into(),
        true => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()).into(),
    };
    SocketAddr::new(address, 7)
}

fn attachment(index: usize) -> Attachment {
    if index < PODS {
        return Attachment::new(mac(index), addresses(index).to_vec());
    }
    Attachment::new(mac(index), Vec::new()).unguarded()
}

fn worker(owners: &Arc<Owners>, flows: &Arc<HostFlows>, number: u8) -> Worker {
    let mtu = Mtu::new(1450).expect("it is in range");
    let tunnel = Tunnel::Vxlan {
        vni: Vni::new(1).expect("it is in range"),
        mac: VtepMac::try_from(GATEWAY_VTEP).expect("it is one host's"),
        mac_v6: Some(VtepMac::try_from(GATEWAY_VTEP_V6).expect("it is one host's")),
    };
    let nets = Nets::with_ipv4(SUBNET, Some(SUBNET_V6));
    let config = node::NodeConfig::new(nets, GATEWAY_MAC, tunnel, mtu, 7);
    let mut node = Node::new(config, Instant::ZERO).expect("the subnet has room");
    node.set_egress(Some(Nets::with_ipv4(NETWORK, Some(NETWORK_V6))));
    for id in 0..PEERS {
        node.set_peer(peer(id));
        node.set_peer(peer_v6(id));
    }
    for index in 0..=PODS {
        node.attach(PortId(index as u32), attachment(index));
    }
    let mut config = egress::EgressConfig::new(Policy::new(Rules::default()), mtu, 7);
    config.subnets = Some(nets);
    config.limits.flows = 6;
    config.limits.flows_of_pod = 3;
    config.limits.memory = 1 << 18;
    let mut path = Datapath::new(node, Egress::new(config, Instant::ZERO));
    path.share(owners.clone(), number);
    path.set_host(Some(HostInterface {
        addresses: HOSTS.map(IpAddr::V4).to_vec(),
        flows: flows.clone(),
    }));
    for index in 0..PODS {
        for address in addresses(index) {
            let published = SocketAddr::new(address, PUBLISHED);
            path.expect_datagrams(published).expect("there is room");
        }
    }
    Worker {
        path,
        sockets: Sockets::default(),
        mailbox: VecDeque::new(),
    }
}

impl Harness {
    pub(crate) fn new() -> Self {
        let (owners, flows) = (Arc::new(Owners::new(7)), Arc::new(HostFlows::new(7)));
        let worker = |number| worker(&owners, &flows, number);
        Self {
            workers: (0..WORKERS as u8).map(worker).collect(),
            now: Instant::ZERO,
            next: 0,
            offered: BTreeMap::new(),
            ended: BTreeSet::new(),
            lost: 0,
            inbound: BTreeMap::new(),
            client: [None; PODS],
            caller: [None; PODS],
            dials: BTreeSet::new(),
            known: BTreeMap::new(),
            sequence: 0,
        }
    }

    pub(crate) fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut byte = || input.arbitrary::<u8>();
        match byte()? % 13 {
            0 => {
                let (at, which) = (usize::from(byte()?) % WORKERS, byte()?);
                let from = SocketAddr::new(
                    address_of(usize::from(which) % PODS, which),
                    40_000 + u16::from(which >> 1) % 2,
                );
                self.datagram(at, from, outside(which >> 3, which & V6 != 0));
            }
            1 => self.ask(byte()?),
            2 => {
                let (at, index) = (usize::from(byte()?) % WORKERS, usize::from(byte()?) % PODS);
                if let Some(client) = self.client[index] {
                    let address = address_towards(index, client);
                    self.datagram(at, SocketAddr::new(address, PUBLISHED), client);
                }
            }
            3 => {
                let at = usize::from(byte()?) % WORKERS;
                self.deliver(at, byte()?.into());
            }
            4 => {
                let at = usize::from(byte()?) % WORKERS;
                let address = Ipv4Addr::new(10, 244, 1, 100 + byte()? % 16);
                let answer = frame::write_arp(
                    ArpOperation::Reply,
                    (mac(PODS), address),
                    (GATEWAY_MAC, Ipv4Addr::new(10, 244, 1, 1)),
                );
                self.frame(at, PODS, &answer);
            }
            5 => self.dial(byte()?),
            6 => {
                let (at, what) = (usize::from(byte()?) % WORKERS, byte()?);
                self.answer_dial(at, usize::from(what >> 1) % PODS, what & 1 != 0);
            }
            7 => self.arrive(usize::from(byte()?) % WORKERS, byte()?),
            8 => {
                let micros = [1, 1000, 5_000_000, 31_000_000, 200_000_000];
                let micros = micros[usize::from(byte()?) % micros.len()];
                // No message waits for seconds.
                self.deliver_all();
                self.pass(self.now + Duration::from_micros(micros));
            }
            9 => self.replace(usize::from(byte()?) % PODS),
            11 => {
                let at = usize::from(byte()?) % WORKERS;
                self.host_asks(at, byte()?);
            }
            12 => {
                let at = usize::from(byte()?) % WORKERS;
                self.host_is_answered(at, byte()?);
            }
            _ => {
                let (at, what, count) = (usize::from(byte()?) % WORKERS, byte()?, byte()? % 8);
                let datagrams = (0..count).map(|_| byte()).collect::<Result<Vec<_>>>()?;
                self.batch(at, what, &datagrams);
            }
        }
        Ok(())
    }

    /// What must be true at any time.
    pub(crate) fn check(&self) {
        let mut mappings = BTreeSet::new();
        for worker in &self.workers {
            let counters = worker.path.node().counters();
            assert_eq!(counters.came(), counters.went(), "the counters add up");
            let egress = worker.path.egress();
            egress.audit().expect("the books of memory agree");
            assert_eq!(egress.counters().open, worker.sockets.open.len() as u64);
            for info in egress.flows().filter(|info| info.key.is_mapping()) {
                assert!(mappings.insert(info.key), "{:?} has two sockets", info.key);
            }
        }
    }

    /// All messages arrive, and all flows end.
    pub(crate) fn finish(mut self) {
        self.deliver_all();
        let known = |worker: &Worker| -> BTreeSet<_> {
            let all = worker.path.node().neighbours();
            all.filter_map(|(address, place, _)| Some((address, place?.mac)))
                .collect()
        };
        // Nothing was lost in a mailbox but packets of flows.
        if self.lost == 0 {
            assert_eq!(known(&self.workers[0]), known(&self.workers[1]));
        }
        let dropped: u64 = self.workers.iter().map(Self::dropped).sum();
        assert!(
            self.offered.len() as u64 <= dropped,
            "{:?} are neither sent nor counted",
            self.offered
        );
        for _ in 0..MAX_TIMERS {
            let due = self.workers.iter().filter(|it| !it.sockets.open.is_empty());
            let Some(due) = due.map(|it| it.path.poll_at()).min() else {
                break;
            };
            self.pass(due.max(self.now));
        }
        for worker in &self.workers {
            assert!(worker.sockets.open.is_empty(), "flows that do not end");
        }
        assert!(self.dials.is_empty(), "{:?} wait for ever", self.dials);
    }

    fn dropped(worker: &Worker) -> u64 {
        let counters = worker.path.node().counters();
        counters.drops().map(|(_, count)| count).sum()
    }

    /// Gives a worker a frame of a port.
    fn frame(&mut self, at: usize, port: usize, bytes: &[u8]) {
        let mut storage = [vec![0; HEADROOM], bytes.to_vec()].concat();
        let packet = PacketBuf::new(&mut storage, HEADROOM, bytes.len());
        let mut packet = packet.expect("there is room");
        let Worker { path, sockets, .. } = &mut self.workers[at];
        let verdict = path.from_port(self.now, PortId(port as u32), &mut packet, sockets);
        assert_ne!(verdict, Verdict::Egress, "it has gone there");
        self.settle(at, false);
    }

    fn datagram(&mut self, at: usize, from: SocketAddr, to: SocketAddr) {
        let id = self.next;
        self.next += 1;
        self.offered.insert(id, (from, to));
        let index = index_of(from.ip());
        let frame = PacketBuilder::ethernet2(mac(index).0, GATEWAY_MAC.0);
        let builder = between(frame, from.ip(), to.ip()).udp(from.port(), to.port());
        let mut frame = Vec::new();
        builder
            .write(&mut frame, &id.to_be_bytes())
            .expect("a vector grows");
        self.frame(at, index, &frame);
    }

    /// The host sends a datagram from one of its ends to a pod of a peer, which sees the base address.
    fn host_asks(&mut self, at: usize, which: u8) {
        let peer = u32::from(which) % PEERS;
        let end = SocketAddr::new(
            HOSTS[usize::from(which >> 1) % HOSTS.len()].into(),
            40_000 + u16::from(which >> 2) % 2,
        );
        let mut bytes = vec![0; HEADROOM];
        let IpAddr::V4(host) = end.ip() else {
            return;
        };
        PacketBuilder::ipv4(host.octets(), far(peer).octets(), 64)
            .udp(end.port(), 53)
            .write(&mut bytes, b"question")
            .expect("a vector grows");
        let len = bytes.len() - HEADROOM;
        let packet = PacketBuf::new(&mut bytes, HEADROOM, len);
        let mut packet = packet.expect("there is room");
        let verdict = self.workers[at].path.from_host(self.now, &mut packet);
        let is_there = matches!(verdict, Verdict::Peer { id, .. } if id == PeerId(peer));
        assert!(is_there, "{verdict:?}");
        let (source, _) = ends_of(&packet.as_slice()[8 + frame::HEADER_LEN..]);
        assert_eq!(source.ip(), SUBNET.network());
        let until = self.now + HOST_IDLE;
        let former = self.known.insert((peer, source.port()), (end, until));
        let is_free = former.is_none_or(|(owner, until)| owner == end || until < self.now);
        assert!(is_free, "port {} has two owners", source.port());
        self.settle(at, false);
    }

    /// A pod of a peer answers what the host has sent it, by any worker.
    fn host_is_answered(&mut self, at: usize, which: u8) {
        let now = self.now;
        let known = self.known.iter().filter(|(_, (_, until))| *until >= now);
        let known: Vec<_> = known.map(|(key, (end, _))| (*key, *end)).collect();
        let Some(((peer, port), end)) = known.get(usize::from(which) % known.len().max(1)) else {
            return;
        };
        let mut inner = Vec::new();
        PacketBuilder::ethernet2(vtep(*peer).get().0, GATEWAY_VTEP.0)
            .ipv4(far(*peer).octets(), SUBNET.network().octets(), 64)
            .udp(53, *port)
            .write(&mut inner, b"answer")
            .expect("a vector grows");
        let mut bytes = [&[0; HEADROOM][..], &[8, 0, 0, 0, 0, 0, 1, 0], &inner].concat();
        let len = bytes.len() - HEADROOM;
        let packet = PacketBuf::new(&mut bytes, HEADROOM, len);
        let mut packet = packet.expect("there is room");
        let source = SocketAddr::new(underlay(*peer as u8).into(), 8472);
        let Worker { path, sockets, .. } = &mut self.workers[at];
        let verdict = path.from_underlay(now, source, &mut packet, sockets);
        assert_eq!(verdict, Verdict::Host);
        let (_, destination) = ends_of(packet.as_slice());
        assert_eq!(destination, *end, "an answer goes astray");
        self.settle(at, false);
    }

    /// A client sends to a pod's published port.
    fn ask(&mut self, which: u8) {
        let index = usize::from(which) % PODS;
        let id = self.next;
        self.next += 1;
        let is_v6 = which & V6 != 0;
        let number = 1 + (which >> 1) % 3;
        let client = match is_v6 {
            false => Ipv4Addr::new(198, 51, 100, number).into(),
            true => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, number.into()).into(),
        };
        let client = SocketAddr::new(client, 1000 + u16::from((which & !V6) >> 3));
        self.inbound.insert(id, index);
        let Worker { path, sockets, .. } = &mut self.workers[0];
        match path.deliver(
            self.now,
            published(Protocol::Udp, address_of(index, which)),
            at_host(client),
            None,
            &id.to_be_bytes(),
            sockets,
        ) {
            Ok(flow) => {
                sockets.adopt(flow, false);
                self.client[index] = Some(client);
                self.settle(0, false);
                assert!(!self.inbound.contains_key(&id), "it does not arrive");
            }
            Err(_) => {
                self.inbound.remove(&id);
                self.settle(0, false);
            }
        }
    }

    /// Datagrams of one TCP stream come in a batch: from the peer whose pod sends, from another peer,
    /// from a stranger, or for another network.
    fn batch(&mut self, at: usize, what: u8, which: &[u8]) {
        let (index, merges) = (usize::from(what >> 1) % PODS, what & 1 != 0);
        let is_v6 = what & V6 != 0;
        let host = |index| match is_v6 {
            false => IpAddr::V4(underlay(index)),
            true => underlay_v6(index),
        };
        let mut datagrams = Vec::new();
        let mut expected = Vec::new();
        for which in which {
            let id = self.next;
            self.next += 1;
            let kind = which % 8;
            let len = if which & 8 == 0 { SEGMENT } else { SEGMENT / 2 };
            let (source, vni) = match kind {
                0 => (1, 1),
                1 => (9, 1),
                2 => (0, 2),
                _ => {
                    expected.extend([id].repeat(len / 4));
                    (0, 1)
                }
            };
            datagrams.push((
                SocketAddr::new(host(source), 8472),
                self.segment(
                    address_of(index, what),
                    vni,
                    &id.to_be_bytes().repeat(len / 4),
                ),
            ));
            // Others send what would come next.
            if kind > 2 {
                self.sequence = self.sequence.wrapping_add(len as u32);
            }
        }
        let merging = if merges { Merging::On } else { Merging::Off };
        let mut came = Vec::new();
        let Worker { path, sockets, .. } = &mut self.workers[at];
        path.from_underlay_batch(
            self.now,
            datagrams
                .iter_mut()
                .map(|(source, bytes)| (*source, &mut bytes[..])),
            merging,
            sockets,
            |verdict, packet| match verdict {
                Verdict::Port(port) => {
                    assert_eq!(port, PortId(index as u32), "it is that pod's");
                    came.extend(stream(packet));
                }
                Verdict::Drop(_) => {}
                other => panic!("it goes astray: {other:?}"),
            },
        );
        assert_eq!(
            came, expected,
            "the stream of a peer's pod, and nothing else"
        );
        self.settle(at, false);
    }

    /// A segment of a pod of the first peer's, in VXLAN.
    fn segment(&self, to: IpAddr, vni: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![8, 0, 0, 0, 0, 0, vni, 0];
        let (ours, from): (_, IpAddr) = match to {
            IpAddr::V4(_) => (GATEWAY_VTEP, Ipv4Addr::new(10, 244, 2, 9).into()),
            IpAddr::V6(_) => {
                let from = Ipv6Addr::new(0xfd00, 0, 0, 2, 0, 0, 0, 9);
                (GATEWAY_VTEP_V6, from.into())
            }
        };
        let frame = PacketBuilder::ethernet2(vtep(0).get().0, ours.0);
        between(frame, from, to)
            .tcp(5000, 80, self.sequence, 1000)
            .ack(1)
            .write(&mut bytes, payload)
            .expect("a vector grows");
        bytes
    }

    /// A client connects to a pod's published port: one of the host itself or another, again with a
    /// port that it had before.
    fn dial(&mut self, which: u8) {
        let address: IpAddr = match (which >> 1 & 1, which & V6) {
            (0, 0) => HOST.into(),
            (_, 0) => Ipv4Addr::new(198, 51, 100, 1).into(),
            (0, _) => HOST_V6.into(),
            _ => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1).into(),
        };
        let client = at_host(SocketAddr::new(address, 1000));
        let pod = address_of(usize::from(which) % PODS, which);
        let published = published(Protocol::Tcp, pod);
        let Worker { path, sockets, .. } = &mut self.workers[0];
        match path.accept(self.now, published, client, b"hello", sockets) {
            Ok(flow) => {
                sockets.adopt(flow, true);
                assert!(self.dials.insert(flow), "{flow:?} is dialled twice");
            }
            Err(reason) => assert_ne!(reason, DropReason::EgressInUse, "a port is free"),
        }
        self.settle(0, false);
    }

    /// The pod that was asked last answers, or refuses.
    fn answer_dial(&mut self, at: usize, index: usize, refuses: bool) {
        let Some((caller, number)) = self.caller[index] else {
            return;
        };
        let frame = PacketBuilder::ethernet2(mac(index).0, GATEWAY_MAC.0);
        let builder = between(frame, address_towards(index, caller), caller.ip())
            .tcp(80, caller.port(), 9000, 1000)
            .ack(number.wrapping_add(1));
        let builder = if refuses {
            builder.rst()
        } else {
            builder.syn()
        };
        let mut frame = Vec::new();
        builder.write(&mut frame, &[]).expect("a vector grows");
        self.frame(at, index, &frame);
    }

    /// A datagram arrives at a mapping's socket.
    fn arrive(&mut self, at: usize, which: u8) {
        let egress = self.workers[at].path.egress();
        let keys = egress.flows().map(|info| info.key);
        let mappings: Vec<_> = keys.filter(FlowKey::is_mapping).collect();
        let Some(key) = mappings.get(usize::from(which) % mappings.len().max(1)) else {
            return;
        };
        let flow = egress.find(key).expect("it was listed");
        let id = self.next;
        self.next += 1;
        self.inbound.insert(id, index_of(key.pod.ip()));
        let Worker { path, sockets, .. } = &mut self.workers[at];
        let socket = sockets.open.get_mut(&flow).expect("it has a socket");
        let datagram = (
            outside(which >> 3, key.pod.is_ipv6()),
            id.to_be_bytes().to_vec(),
        );
        socket.waiting.push_back(datagram);
        let ready = Ready {
            readable: true,
            writable: false,
        };
        path.ready(self.now, flow, ready, sockets);
        self.settle(at, false);
        assert!(!self.inbound.contains_key(&id), "it does not arrive");
    }

    /// So many messages arrive at a worker.
    fn deliver(&mut self, at: usize, count: usize) {
        for _ in 0..count {
            let Some(message) = self.workers[at].mailbox.pop_front() else {
                return;
            };
            let is_stray = matches!(message, SiblingMessage::Stray(_));
            let Worker { path, sockets, .. } = &mut self.workers[at];
            path.from_sibling(self.now, message, sockets);
            self.settle(at, is_stray);
        }
    }

    fn deliver_all(&mut self) {
        while self.workers.iter().any(|it| !it.mailbox.is_empty()) {
            (0..WORKERS).for_each(|at| self.deliver(at, MAILBOX));
        }
    }

    fn pass(&mut self, to: Instant) {
        self.now = to;
        for at in 0..WORKERS {
            let Worker { path, sockets, .. } = &mut self.workers[at];
            path.handle_timeout(to, sockets);
            self.settle(at, false);
            let due = self.workers[at].path.poll_at();
            assert!(due > to, "timers spin");
        }
    }

    /// A pod goes, and another one comes in its place.
    fn replace(&mut self, index: usize) {
        let port = PortId(index as u32);
        for at in 0..WORKERS {
            let Worker { path, sockets, .. } = &mut self.workers[at];
            assert!(path.detach(port, sockets), "it was attached");
            let its = |key: &FlowKey| addresses(index).contains(&key.pod.ip());
            assert!(!path.egress().flows().any(|info| its(&info.key)));
            self.settle(at, false);
            let path = &mut self.workers[at].path;
            path.node_mut().attach(port, attachment(index));
            for address in addresses(index) {
                let published = SocketAddr::new(address, PUBLISHED);
                path.expect_datagrams(published).expect("there is room");
            }
            self.settle(at, false);
        }
        (self.client[index], self.caller[index]) = (None, None);
    }

    /// Does what a worker's data path says, and looks at what its sockets have sent.
    fn settle(&mut self, at: usize, is_handed_over: bool) {
        let mut frames = Vec::new();
        while let Some(output) = self.workers[at].path.poll_output(self.now) {
            match output {
                Output::Packet(Verdict::Port(port), mut packet) => {
                    let offload = packet.offload().check(packet.len());
                    offload.expect("a valid header");
                    packet.complete_checksum();
                    frames.push((port, packet.as_slice().to_vec()));
                }
                Output::Packet(..) => {}
                Output::Message(to, message) => {
                    let is_stray = matches!(message, SiblingMessage::Stray(_));
                    assert!(!(is_handed_over && is_stray), "it is handed on");
                    let to = match to {
                        Siblings::All => 1 - at,
                        Siblings::One(worker) => usize::from(worker),
                        Siblings::Predecessor => panic!("there is none"),
                    };
                    assert_ne!(to, at, "it tells itself");
                    self.tell(to, message);
                }
            }
        }
        for (port, frame) in frames {
            self.receive(port, &frame);
        }
        let sockets = &mut self.workers[at].sockets;
        let (sent, dialled) = (
            std::mem::take(&mut sockets.sent),
            std::mem::take(&mut sockets.dialled),
        );
        for sent in sent {
            self.check_sent(at, &sent);
        }
        for (flow, result) in dialled {
            assert!(self.dials.remove(&flow), "{flow:?} is told twice");
            assert_ne!(result, Err(HostError::WouldBlock));
        }
    }

    fn tell(&mut self, to: usize, message: SiblingMessage) {
        let mailbox = &mut self.workers[to].mailbox;
        if mailbox.len() < MAILBOX {
            return mailbox.push_back(message);
        }
        self.lost += 1;
        if let SiblingMessage::Stray(mut packet) = message {
            let bytes = packet.packet().as_slice().to_vec();
            self.ended.extend(payload(&bytes));
            // Whoever had no room counts it.
            let node = self.workers[1 - to].path.node_mut();
            node.count_drops(DropReason::EgressHandoverFull, 1);
        }
    }

    /// A pod gets a frame.
    fn receive(&mut self, port: PortId, frame: &[u8]) {
        let headers = PacketHeaders::from_ethernet_slice(frame).expect("a valid frame");
        let data = headers.payload.slice();
        let (source, destination, sums): (IpAddr, IpAddr, _) =
            match (headers.net, &headers.transport) {
                (Some(NetHeaders::Ipv4(ip, _)), transport) => {
                    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                    let sum = match transport {
                        Some(TransportHeader::Udp(udp)) => udp.calc_checksum_ipv4(&ip, data).ok(),
                        Some(TransportHeader::Tcp(tcp)) => tcp.calc_checksum_ipv4(&ip, data).ok(),
                        _ => None,
                    };
                    (ip.source.into(), ip.destination.into(), sum)
                }
                (Some(NetHeaders::Ipv6(ip, _)), transport) => {
                    let sum = match transport {
                        Some(TransportHeader::Udp(udp)) => udp.calc_checksum_ipv6(&ip, data).ok(),
                        Some(TransportHeader::Tcp(tcp)) => tcp.calc_checksum_ipv6(&ip, data).ok(),
                        _ => None,
                    };
                    (ip.source.into(), ip.destination.into(), sum)
                }
                _ => return,
            };
        let index = port.0 as usize;
        match headers.transport {
            Some(TransportHeader::Udp(udp)) => {
                assert_eq!(sums, Some(udp.checksum), "the checksum is wrong");
                assert!(addresses(index).contains(&destination));
                let id = data.try_into().map(u32::from_be_bytes);
                let id = id.expect("it is as long as it was");
                assert_eq!(self.inbound.remove(&id), Some(index), "{id} comes again");
            }
            Some(TransportHeader::Tcp(tcp)) if tcp.syn => {
                assert_eq!(sums, Some(tcp.checksum), "the checksum is wrong");
                let caller = SocketAddr::new(source, tcp.source_port);
                let hosts = [IpAddr::V4(HOST), HOST_V6.into()];
                assert!(!hosts.contains(&source), "no pod could answer it");
                self.caller[index] = Some((caller, tcp.sequence_number));
            }
            _ => {}
        }
    }

    /// A datagram of a pod goes out.
    fn check_sent(&mut self, at: usize, sent: &Sent) {
        let id = <[u8; 4]>::try_from(&sent.bytes[..]).map(u32::from_be_bytes);
        let id = id.expect("it is as long as it was");
        assert!(!self.ended.contains(&id), "{id} was lost");
        let (from, to) = self.offered.remove(&id).expect("it goes out once");
        // A flow may make room for another in the same call.
        let Some(key) = self.workers[at].path.egress().key(sent.flow) else {
            return;
        };
        assert_eq!(key.pod, from, "by its own socket");
        // Clients know a published port by the sockets of the first worker.
        assert!(from.port() != PUBLISHED || at == 0, "an answer goes astray");
        match sent.to {
            Some(mapped) => assert_eq!((mapped, key.is_mapping()), (to, true)),
            None => assert_eq!(key.remote, to, "to its client"),
        }
    }
}

/// The payload of a UDP packet.
fn payload(packet: &[u8]) -> Option<u32> {
    let headers = PacketHeaders::from_ip_slice(packet).ok()?;
    let bytes = headers.payload.slice().try_into().ok()?;
    Some(u32::from_be_bytes(bytes))
}

/// What the pieces of a packet carry: numbers, one behind the other.
fn stream(packet: &PacketBuf<'_>) -> Vec<u32> {
    let tail = packet.tail();
    let offload = packet.offload().check(packet.len());
    offload.expect("a valid header");
    let segment = packet.offload().gso.map(|gso| usize::from(gso.size));
    assert_eq!(segment.is_some(), !tail.is_empty(), "it is a superpacket");
    let whole = [packet.as_slice(), &tail.concat()].concat();
    let headers = PacketHeaders::from_ethernet_slice(&whole).expect("a valid frame");
    let all = headers.payload.slice();
    let len = segment.unwrap_or(all.len());
    let first = all.len() - (whole.len() - packet.len());
    assert_eq!(first, len, "segments have one length");
    for (position, piece) in tail.iter().enumerate() {
        assert!(piece.len() == len || piece.len() < len && position + 1 == tail.len());
    }
    let (numbers, rest) = all.as_chunks();
    assert!(rest.is_empty(), "a part is lost");
    numbers.iter().copied().map(u32::from_be_bytes).collect()
}

/// The published port of a pod.
fn published(protocol: Protocol, pod: IpAddr) -> PublishedPort {
    let port = match protocol {
        Protocol::Udp => PUBLISHED,
        Protocol::Tcp | Protocol::Ping => 80,
    };
    PublishedPort {
        protocol,
        pod: SocketAddr::new(pod, port),
        network: match pod {
            IpAddr::V4(_) => IpNet::V4(NETWORK),
            IpAddr::V6(_) => IpNet::V6(NETWORK_V6),
        },
    }
}

/// A client that used the host's address.
const fn at_host(address: SocketAddr) -> Client {
    let local = match address {
        SocketAddr::V4(_) => IpAddr::V4(HOST),
        SocketAddr::V6(_) => IpAddr::V6(HOST_V6),
    };
    Client { address, local }
}
