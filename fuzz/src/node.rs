//! A node under a sequence of events, watched by an oracle that keeps its own, much simpler idea
//! of ports, peers and routes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use arbitrary::Unstructured;
use ipnet::{IpNet, Ipv4Net};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::overhead::Mtu;
use muslin_encap::udp;
use muslin_encap::vxlan::{Vni, VtepMac};
use muslin_stack::drops::DropReason;
use muslin_stack::guard::Policy;
use muslin_stack::neighbour::State;
use muslin_stack::node::{Config, Limits, Node, Verdict};
use muslin_stack::peer::{Peer, PeerId, Tunnel};
use muslin_stack::port::{Attachment, PortId};
use muslin_stack::{Duration, Instant};

use crate::event::{self, Event, GATEWAY_MAC, address, mac};

const SUBNET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 1, 0), 24);
const VTEP: u8 = 15;
/// Packets of its own a node may hold.
const OUTPUT_LEN: usize = 256;
const SUBNETS: [&str; 9] = [
    "10.244.2.0/24",
    "10.244.3.0/24",
    "10.244.2.128/25",
    "10.244.2.0/25",
    "10.244.0.0/16",
    "10.244.1.0/24",
    "10.244.1.0/25",
    "0.0.0.0/0",
    "fd00:2::/64",
];

/// Where a packet came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Port(PortId),
    Underlay(IpAddr),
}

struct Harness {
    node: Node,
    vxlan: bool,
    check_peers: bool,
    mtu: usize,
    limits: Limits,
    now: Instant,
    ports: BTreeMap<PortId, Attachment>,
    peers: BTreeMap<PeerId, Peer>,
    /// Whether a pod sent something since the output was last polled to its end.
    pods_sent: bool,
    /// Whether a peer changed since then: what was queued for it before is in flight.
    peers_changed: bool,
    received: u64,
    /// Whether two ports ever had the same pod. No control plane does that, and the addresses go
    /// with whichever leaves.
    shared: bool,
    storage: Vec<u8>,
}

/// Runs the events that `data` stands for. Its first byte chooses a configuration.
///
/// # Panics
/// If the node does what it must not.
pub fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let mut harness = Harness::new(*first);
    let mut input = Unstructured::new(rest);
    let mut hold = 0;
    while let Some(event) = event::decode(&mut input) {
        if let Event::Hold(events) = event {
            hold = events;
            continue;
        }
        harness.apply(event);
        harness.check_tables();
        if hold == 0 {
            harness.poll();
        } else {
            hold -= 1;
        }
    }
    harness.poll();
}

impl Harness {
    /// Every run begins with pods 2 and 3, guarded, at ports 0 and 1, pod 4 at port 2, guarded if
    /// the first byte says so, and peers 0 and 1.
    fn new(choices: u8) -> Self {
        let vxlan = choices & 1 == 0;
        let check_peers = choices & 2 == 0;
        let mtu = [1450, 68, 576, 65_535][usize::from(choices >> 2 & 3)];
        let small = choices & 16 != 0;
        let limits = Limits {
            fdb: if small { 2 } else { 64 },
            neighbours: if small { 2 } else { 64 },
        };
        let config = Config {
            subnet: SUBNET.into(),
            gateway_mac: GATEWAY_MAC,
            tunnel: if vxlan {
                Tunnel::Vxlan {
                    vni: Vni::new(1).expect("it is small"),
                    mac: vtep(VTEP),
                }
            } else {
                Tunnel::Udp
            },
            mtu: Mtu::new(mtu).expect("it is in range"),
            guard: Policy { peers: check_peers },
            limits,
            random_seed: 7,
        };
        let now = Instant::ZERO;
        let mut harness = Self {
            node: Node::new(config, now).expect("the subnet has room"),
            vxlan,
            check_peers,
            mtu: mtu as usize,
            limits,
            now,
            ports: BTreeMap::new(),
            peers: BTreeMap::new(),
            pods_sent: false,
            peers_changed: false,
            received: 0,
            shared: false,
            storage: vec![0; HEADROOM + 14 + 65_535 + 64],
        };
        for port in 0..3 {
            harness.apply(Event::Attach {
                port,
                pod: port + 2,
                guarded: port < 2 || choices & 32 == 0,
            });
        }
        for id in 0..2 {
            harness.apply(Event::SetPeer {
                id,
                subnet: id,
                host: id,
                vtep: true,
            });
        }
        harness
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Frame { port, bytes } => self.frame(PortId(port.into()), &bytes),
            Event::Datagram { host, bytes } => self.datagram(host, &bytes),
            Event::Attach { port, pod, guarded } => {
                let attachment = Attachment {
                    mac: mac(pod),
                    addresses: vec![address(pod).into(), address(pod).to_ipv6_mapped().into()],
                    guarded,
                };
                // No control plane gives a pod the node's own address.
                if pod >= 2 {
                    let port_id = PortId(port.into());
                    let mut others = self.ports.iter().filter(|(id, _)| **id != port_id);
                    self.shared |= others.any(|(_, other)| other.mac == attachment.mac);
                    self.node.attach(PortId(port.into()), attachment.clone());
                    self.ports.insert(PortId(port.into()), attachment);
                }
            }
            Event::Detach(port) => {
                let port = PortId(port.into());
                let was = self.ports.remove(&port).is_some();
                assert_eq!(self.node.detach(port), was);
            }
            Event::SetPeer {
                id,
                subnet,
                host,
                vtep: has_vtep,
            } => {
                let peer = Peer {
                    id: PeerId(id.into()),
                    subnet: SUBNETS[usize::from(subnet)]
                        .parse()
                        .expect("it is a subnet"),
                    address: underlay(host),
                    vtep_mac: has_vtep.then(|| vtep(8 + id)),
                };
                self.peers_changed = true;
                self.node.set_peer(peer.clone());
                self.peers.insert(peer.id, peer);
            }
            Event::RemovePeer(id) => {
                let id = PeerId(id.into());
                let was = self.peers.remove(&id).is_some();
                assert_eq!(self.node.remove_peer(id), was);
            }
            Event::Wait(millis) => {
                self.now += Duration::from_millis(millis);
                self.node.handle_timeout(self.now);
                assert!(self.node.poll_at() > self.now, "a timer spins");
            }
            Event::Hold(_) => {}
        }
    }

    /// Runs bytes through a call and gives back what it left in the buffer.
    fn through(
        &mut self,
        bytes: &[u8],
        call: impl FnOnce(&mut Node, Instant, &mut PacketBuf<'_>) -> Verdict,
    ) -> (Verdict, Vec<u8>) {
        self.storage[HEADROOM..HEADROOM + bytes.len()].copy_from_slice(bytes);
        let mut packet = PacketBuf::new(&mut self.storage, HEADROOM, bytes.len()).expect("it fits");
        let verdict = call(&mut self.node, self.now, &mut packet);
        self.received += 1;
        assert_eq!(self.node.counters().received, self.received);
        (verdict, packet.as_slice().to_vec())
    }

    fn frame(&mut self, port: PortId, bytes: &[u8]) {
        let (verdict, out) =
            self.through(bytes, |node, now, packet| node.from_port(now, port, packet));
        self.pods_sent = true;
        let Some(attachment) = self.ports.get(&port) else {
            assert_eq!(verdict, Verdict::Drop(DropReason::UnknownPort));
            return;
        };
        if matches!(verdict, Verdict::Drop(_)) {
            self.check_not_lost(port, bytes, verdict);
            return;
        }
        check_sender(bytes, attachment);
        let to_gateway = bytes[..6] == GATEWAY_MAC.0;
        match verdict {
            Verdict::Port(to) if !to_gateway => {
                assert!(self.ports.contains_key(&to), "{to} is not attached");
                assert_ne!(to, port, "a frame goes back");
                assert_eq!(out, bytes, "a switch changes nothing");
            }
            Verdict::Flood { except } => {
                assert_eq!(except, Some(port));
                assert!(!to_gateway && out == bytes);
                let reserved = matches!(bytes[..6], [0x01, 0x80, 0xc2, 0, 0, 0..16]);
                assert!(!reserved, "a reserved group address is flooded");
            }
            Verdict::Port(_) | Verdict::Peer { .. } => {
                self.check_routed(From::Port(port), &bytes[14..], verdict, &out);
            }
            Verdict::Consumed | Verdict::Drop(_) => {}
        }
    }

    fn datagram(&mut self, host: u8, frame: &[u8]) {
        let source = SocketAddr::V4(underlay(host));
        let bytes = if self.vxlan {
            [&[8, 0, 0, 0, 0, 0, 1, 0], frame].concat()
        } else {
            frame.get(14..).unwrap_or_default().to_vec()
        };
        let (verdict, out) = self.through(&bytes, |node, now, packet| {
            node.from_underlay(now, source, packet)
        });
        let known = self
            .peers
            .values()
            .any(|peer| IpAddr::from(*peer.address.ip()) == source.ip());
        if !known && self.check_peers {
            assert_eq!(verdict, Verdict::Drop(DropReason::UnknownPeer));
        }
        match verdict {
            // Only ARP for the gateway is answered straight away.
            Verdict::Peer {
                id, destination, ..
            } => {
                assert!(self.vxlan && frame[12..14] == [8, 6]);
                assert_eq!(IpAddr::from(*self.peers[&id].address.ip()), source.ip());
                assert_eq!(destination, self.peers[&id].address.into());
                assert_eq!(out.len(), 8 + 42);
                assert_eq!(out[8 + 20..8 + 22], [0, 2]);
                assert!(is_own(ipv4(&out[8 + 28..])));
            }
            Verdict::Port(_) => {
                let inner = if self.vxlan { &frame[14..] } else { &bytes[..] };
                self.check_routed(From::Underlay(source.ip()), inner, verdict, &out);
            }
            Verdict::Flood { .. } => panic!("a datagram is flooded"),
            Verdict::Consumed | Verdict::Drop(_) => {}
        }
    }

    /// Checks a packet that went through the router straight away.
    fn check_routed(&self, from: From, packet: &[u8], verdict: Verdict, out: &[u8]) {
        let total = udp::check(packet).expect("only whole packets are routed");
        let packet = &packet[..total];
        let (source, destination) = (ipv4(&packet[12..]), ipv4(&packet[16..]));
        let out = self.strip(verdict, out);
        assert_eq!(udp::check(out), Ok(out.len()), "what leaves is malformed");
        assert!(out.len() <= self.mtu);
        assert_eq!(out[8], packet[8] - 1, "a hop is one");
        assert!(packet[8] > 1);
        let edited = |at: usize| matches!(at, 8 | 10 | 11);
        assert_eq!(out.len(), packet.len());
        assert!((0..out.len()).all(|at| edited(at) || out[at] == packet[at]));
        assert!(!is_own(destination) && !is_own(source));
        let broadcast = SUBNET.broadcast();
        for address in [source, destination] {
            assert!(!is_martian(address) && address != broadcast);
        }
        let expected = self.route(destination);
        match verdict {
            Verdict::Port(_) => assert_eq!(expected, Route::Local),
            Verdict::Peer { id, .. } => {
                assert!(matches!(expected, Route::Peers(ids) if ids.contains(&id)));
                assert!(matches!(from, From::Port(_)), "tunnel to tunnel");
            }
            Verdict::Flood { .. } | Verdict::Consumed | Verdict::Drop(_) => unreachable!(),
        }
        if let From::Underlay(outer) = from {
            assert!(!SUBNET.contains(&source), "a peer poses as a pod");
            let mut sharing = self
                .peers
                .values()
                .filter(|peer| IpAddr::from(*peer.address.ip()) == outer);
            let in_lease = sharing.any(|peer| peer.subnet.contains(&IpAddr::V4(source)));
            assert!(
                in_lease || !self.check_peers,
                "a peer sends from another's lease"
            );
        }
    }

    /// The IPv4 packet that leaves, after a look at what is around it.
    fn strip<'a>(&self, verdict: Verdict, out: &'a [u8]) -> &'a [u8] {
        match verdict {
            Verdict::Port(port) => {
                assert!(self.ports.contains_key(&port), "{port} is not attached");
                assert_eq!(out[6..12], GATEWAY_MAC.0);
                assert_eq!(out[0] & 1, 0, "an IP packet goes to a group");
                assert_eq!(out[12..14], [8, 0]);
                &out[14..]
            }
            Verdict::Peer {
                id, destination, ..
            } => {
                let peer = &self.peers[&id];
                assert!(destination == peer.address.into() || self.peers_changed);
                if !self.vxlan {
                    return out;
                }
                assert_eq!(out[..8], [8, 0, 0, 0, 0, 0, 1, 0]);
                let theirs = peer.vtep_mac.map(|mac| mac.get().0);
                assert!(theirs.is_some_and(|mac| out[8..14] == mac) || self.peers_changed);
                assert_eq!(out[14..20], vtep(VTEP).get().0);
                assert_eq!(out[20..22], [8, 0]);
                &out[22..]
            }
            Verdict::Flood { .. } | Verdict::Consumed | Verdict::Drop(_) => unreachable!(),
        }
    }

    /// A plain packet of a guarded pod, for an address with a route, must get there.
    fn check_not_lost(&self, port: PortId, bytes: &[u8], verdict: Verdict) {
        let attachment = &self.ports[&port];
        let Some(packet) = bytes.get(14..).filter(|_| {
            bytes[..6] == GATEWAY_MAC.0
                && bytes[6..12] == attachment.mac.0
                && bytes[12..14] == [8, 0]
        }) else {
            return;
        };
        let Ok(total) = udp::check(packet) else {
            return;
        };
        let (source, destination) = (ipv4(&packet[12..]), ipv4(&packet[16..]));
        if !attachment.addresses.contains(&IpAddr::V4(source))
            || packet[8] <= 1
            || total > self.mtu
            || is_martian(destination)
        {
            return;
        }
        match self.route(destination) {
            Route::None => assert_eq!(verdict, Verdict::Drop(DropReason::NoRoute)),
            Route::Peers(_) => assert_eq!(verdict, Verdict::Drop(DropReason::NoVtepMac)),
            Route::Local => {
                let address = IpAddr::V4(destination);
                let mut ports = self.ports.values();
                let attached = ports.any(|other| other.addresses.contains(&address));
                assert!(!attached || self.shared, "lost: {verdict:?}");
            }
        }
    }

    fn route(&self, destination: Ipv4Addr) -> Route {
        if SUBNET.contains(&destination) {
            return Route::Local;
        }
        let holding = |peer: &&Peer| {
            let inside = matches!(peer.subnet, IpNet::V4(net) if SUBNET.contains(&net));
            !inside && peer.subnet.contains(&IpAddr::V4(destination))
        };
        let longest = self.peers.values().filter(holding);
        let Some(longest) = longest.map(|peer| peer.subnet.prefix_len()).max() else {
            return Route::None;
        };
        let peers = self.peers.values().filter(holding);
        let peers = peers.filter(|peer| peer.subnet.prefix_len() == longest);
        Route::Peers(peers.map(|peer| peer.id).collect())
    }

    /// Polls all output and checks each packet, and that the counters add up.
    fn poll(&mut self) {
        let mut storage = std::mem::take(&mut self.storage);
        let mut count = 0;
        let mut packet = PacketBuf::new(&mut storage, 0, 0).expect("it is empty");
        while let Some(verdict) = self.node.poll_output(&mut packet) {
            count += 1;
            self.check_output(verdict, packet.as_slice());
        }
        self.storage = storage;
        assert!(count <= OUTPUT_LEN, "{count} packets were queued");
        self.pods_sent = false;
        self.peers_changed = false;
        let counters = self.node.counters();
        assert_eq!(
            counters.received + counters.originated,
            counters.delivered
                + counters.sent
                + counters.flooded
                + counters.consumed
                + counters.dropped(),
            "{counters:?}"
        );
    }

    fn check_output(&self, verdict: Verdict, out: &[u8]) {
        let is_arp =
            |out: &[u8]| out.len() == 42 && out[12..14] == [8, 6] && out[6..12] == GATEWAY_MAC.0;
        match verdict {
            Verdict::Port(port) if is_arp(out) => {
                assert!(self.ports.contains_key(&port), "{port} is not attached");
                assert!(is_own(ipv4(&out[28..])), "the gateway answers for another");
            }
            Verdict::Flood { except } => {
                assert_eq!(except, None);
                assert!(is_arp(out) && is_own(ipv4(&out[28..])));
            }
            Verdict::Port(_) | Verdict::Peer { .. } => {
                let packet = self.strip(verdict, out);
                assert_eq!(udp::check(packet), Ok(packet.len()), "malformed");
                assert!(packet.len() <= self.mtu, "{} bytes", packet.len());
                let source = ipv4(&packet[12..]);
                if is_own(source) {
                    assert_eq!(packet[9], 1, "the gateway speaks ICMP only");
                } else if matches!(verdict, Verdict::Peer { .. }) {
                    assert!(self.pods_sent, "tunnel to tunnel");
                }
                assert!(!is_martian(source) && !is_martian(ipv4(&packet[16..])));
            }
            Verdict::Drop(reason) => {
                assert!(matches!(
                    reason,
                    DropReason::PortGone | DropReason::PeerGone
                ));
            }
            Verdict::Consumed => panic!("output that is consumed"),
        }
    }

    fn check_tables(&self) {
        let learned = self.node.fdb().filter(|(_, entry)| entry.seen.is_some());
        assert!(learned.count() <= self.limits.fdb);
        let others = self.node.neighbours();
        let others = others.filter(|(.., state)| *state != State::Permanent);
        assert!(others.count() <= self.limits.neighbours);
        let gone = |port: &PortId| !self.ports.contains_key(port);
        assert!(!self.node.fdb().any(|(_, entry)| gone(&entry.port)));
        let places = self.node.neighbours().filter_map(|(_, place, _)| place);
        assert!(!places.into_iter().any(|place| gone(&place.port)));
        let routes = self.node.routes();
        let peers = self.peers.values().map(|peer| peer.subnet.trunc());
        let expected: std::collections::BTreeSet<_> = peers
            .filter(|net| !matches!(net, IpNet::V4(net) if SUBNET.contains(net)))
            .chain([IpNet::V4(SUBNET)])
            .collect();
        assert_eq!(
            routes
                .map(|(prefix, _)| prefix)
                .collect::<std::collections::BTreeSet<_>>(),
            expected
        );
        assert_eq!(self.node.ports().count(), self.ports.len());
        assert_eq!(self.node.peers().count(), self.peers.len());
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Route {
    None,
    Local,
    Peers(Vec<PeerId>),
}

/// Checks with plain offsets that a frame which was let through is one its pod may send.
fn check_sender(bytes: &[u8], attachment: &Attachment) {
    let source = &bytes[6..12];
    assert_eq!(source[0] & 1, 0, "a group sends");
    assert!(source != GATEWAY_MAC.0, "a pod poses as the gateway");
    let owns = |address: Ipv4Addr| {
        let owned = attachment.addresses.contains(&IpAddr::V4(address));
        !is_own(address) && (owned || !attachment.guarded)
    };
    if attachment.guarded {
        assert_eq!(source, attachment.mac.0, "a forged MAC address");
    }
    match [bytes[12], bytes[13]] {
        [0x08, 0x00] if bytes.len() >= 14 + 20 => {
            let source = ipv4(&bytes[14 + 12..]);
            assert!(owns(source), "{source} is forged");
            assert!(!is_martian(source), "{source} is no source");
        }
        [0x08, 0x06] if bytes.len() >= 14 + 28 && bytes[18..20] == [6, 4] => {
            let source = ipv4(&bytes[14 + 14..]);
            assert!(
                owns(source) || source.is_unspecified(),
                "{source} is forged"
            );
            assert!(!attachment.guarded || bytes[14 + 8..14 + 14] == attachment.mac.0);
        }
        [0x86, 0xdd] => check_ipv6(&bytes[14..]),
        [0x08, 0x00] | [0x08, 0x06] => {}
        kind => assert!(!attachment.guarded, "a frame of type {kind:02x?}"),
    }
}

/// No router advertisement, as etherparse sees it.
fn check_ipv6(packet: &[u8]) {
    let Ok(sliced) = etherparse::SlicedPacket::from_ip(packet) else {
        return;
    };
    if let Some(etherparse::TransportSlice::Icmpv6(icmp)) = sliced.transport {
        assert!(
            !matches!(icmp.slice()[0], 134 | 137),
            "a router advertisement"
        );
    }
}

fn ipv4(bytes: &[u8]) -> Ipv4Addr {
    Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])
}

fn is_own(address: Ipv4Addr) -> bool {
    address == SUBNET.network() || address == Ipv4Addr::new(10, 244, 1, 1)
}

fn is_martian(address: Ipv4Addr) -> bool {
    matches!(address.octets()[0], 0 | 127 | 224..)
}

fn vtep(byte: u8) -> VtepMac {
    VtepMac::from_random(mac(8 + byte % 8).0)
}

fn underlay(host: u8) -> SocketAddrV4 {
    SocketAddrV4::new([192, 168, 0, 2 + host % 4].into(), 8472)
}
