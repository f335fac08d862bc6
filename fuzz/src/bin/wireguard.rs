//! WireGuard between two nodes and whoever is between them: what arrives is what was sent, once, whatever is
//! done to datagrams, sessions and peers.
#![cfg_attr(fuzzing, no_main)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time;

use ipnet::IpNet;
use muslin_encap::offload::split::Checksums;
use muslin_encap::offload::virtio::Header;
use muslin_encap::tunnel::wireguard::message_len;
use muslin_fuzz::Seed;
use muslin_stack::datapath::peer::{Peer, PeerId, WireGuardEnd};
use muslin_stack::datapath::wireguard::{
    Devices, Opened, Origin, Output, Staged, WireGuard, WireGuardConfig, public_key,
};
use muslin_stack::secret::Secret;
use muslin_stack::{Duration, Instant};

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        &[SEND, 0, 9, 0],
        &[SEND, 1, 9, 0],
        &[SEND, 2, 9, 0],
        &[DELIVER, 0, 0, 0],
        &[DELIVER, 1, 0, 0],
        &[REPEAT, 0, 0, 0],
        &[CHANGE, 0, 0, 7],
        &[MOVE, 0, 0, 3],
        &[PASS, 1, 10, 0],
        &[PASS, 1, 125, 0],
        &[PASS, 1, 200, 0],
        &[RESTART, 0, 0, 0],
        &[KEY, 1, 3, 0],
        &[REMOVE, 1, 0, 0],
        &[INVENT, 0, 1, 148],
    ],
    inputs: 2_000,
    max_len: 400,
}

const SEND: u8 = 0;
const DELIVER: u8 = 1;
const REPEAT: u8 = 2;
const CHANGE: u8 = 3;
const MOVE: u8 = 4;
const PASS: u8 = 5;
const LOSE: u8 = 6;
const RESTART: u8 = 7;
const KEY: u8 = 8;
const REMOVE: u8 = 9;
const INVENT: u8 = 10;
const KINDS: u8 = 11;

/// Packets that may wait for a node.
const WAITING: usize = 128;
/// What each packet has behind its number, which nobody may see on its way.
const MARKER: &[u8] = b"in the clear";

/// A datagram on its way.
#[derive(Clone)]
struct Flying {
    source: SocketAddr,
    bytes: Vec<u8>,
    /// The number of the packet inside.
    packet: Option<u32>,
}

struct World {
    now: Instant,
    start: time::Instant,
    nodes: [WireGuard; 2],
    /// The number of each node's private key.
    keys: [u8; 2],
    /// What each knows of the other, by IP version.
    peers: [BTreeSet<PeerId>; 2],
    ways: [VecDeque<Flying>; 2],
    next: u32,
    /// Packets that were given to a node and neither sealed nor given up, as far as can be said.
    waiting: [u64; 2],
    /// Packets by their numbers: from whom, to which peer, and whether they have arrived.
    sent: BTreeMap<u32, (usize, PeerId, bool)>,
    restarts: u64,
}

fn run(data: &[u8]) {
    let mut world = World::new(data.first().copied().unwrap_or_default());
    for event in data.get(1..).unwrap_or_default().chunks_exact(4) {
        world.step([event[0], event[1], event[2], event[3]]);
        world.check();
    }
    // Whatever was, two nodes that know each other and whose datagrams arrive understand each other.
    world.settle();
}

fn secret(number: u8) -> Secret {
    [number.wrapping_add(1); 32].into()
}

fn address(node: usize, port: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, node as u8], 50_000 + u16::from(port)))
}

/// The peer that a node is at the other for an IP version.
fn peer_of(node: usize, version: usize, key: u8) -> Peer {
    let subnet: IpNet = match version {
        0 => format!("10.244.{node}.0/24"),
        _ => format!("fd00:{node}::/64"),
    }
    .parse()
    .expect("it is a subnet");
    let id = PeerId((10 * version + node) as u32);
    Peer::new(id, subnet, address(node, 0)).with_wireguard(WireGuardEnd {
        public_key: public_key(&secret(key)),
        endpoint: address(node, 0),
    })
}

fn node(key: u8, choices: u8, origin: Origin) -> WireGuard {
    let config = WireGuardConfig {
        private_key: secret(key),
        preshared_key: (choices & 1 != 0).then(|| secret(90)),
        keepalive: (choices & 2 != 0).then(|| Duration::from_secs(25)),
        devices: Devices::One,
    };
    WireGuard::new(config, origin)
}

/// An IP packet with a number.
fn packet(version: usize, number: u32, len: u8) -> Vec<u8> {
    let mut payload = number.to_be_bytes().to_vec();
    payload.extend(MARKER);
    payload.resize(payload.len() + 5 * usize::from(len), 7);
    let mut packet = Vec::new();
    match version {
        0 => etherparse::PacketBuilder::ipv4([10, 244, 0, 2], [10, 244, 1, 2], 64)
            .udp(1, 2)
            .write(&mut packet, &payload),
        _ => etherparse::PacketBuilder::ipv6([0xfd; 16], [0xfc; 16], 64)
            .udp(1, 2)
            .write(&mut packet, &payload),
    }
    .expect("there is room");
    packet
}

fn number_of(packet: &[u8]) -> u32 {
    let at = if packet[0] >> 4 == 4 { 28 } else { 48 };
    u32::from_be_bytes(packet[at..at + 4].try_into().expect("they are four"))
}

impl World {
    fn new(choices: u8) -> Self {
        let (now, start) = (Instant::from_secs(1), time::Instant::now());
        let mut world = Self {
            now,
            start,
            nodes: [0, 1].map(|key| {
                let origin = Origin {
                    now,
                    instant: start,
                    unix: time::Duration::from_secs(1_700_000_000),
                    seed: secret(100 + key),
                };
                node(key, choices, origin)
            }),
            keys: [0, 1],
            peers: Default::default(),
            ways: Default::default(),
            next: 0,
            waiting: [0; 2],
            sent: BTreeMap::new(),
            restarts: u64::from(choices) << 32,
        };
        for at in [0, 1] {
            world.introduce(at);
        }
        world
    }

    /// Tells a node who the other is.
    fn introduce(&mut self, at: usize) {
        for version in [0, 1] {
            let peer = peer_of(1 - at, version, self.keys[1 - at]);
            self.peers[at].insert(peer.id);
            self.nodes[at].set_peer(self.now, &peer);
        }
        self.poll(at);
    }

    fn step(&mut self, [kind, which, a, b]: [u8; 4]) {
        let at = usize::from(which & 1);
        match kind % KINDS {
            SEND => self.send(at, usize::from(which >> 1 & 1), a, 1 + b % 200),
            DELIVER => {
                if let Some(flying) = self.take(at, a) {
                    self.deliver(1 - at, flying, true);
                }
            }
            REPEAT => {
                if let Some(flying) = self.look(at, a) {
                    self.deliver(1 - at, flying, true);
                }
            }
            CHANGE => {
                if let Some(mut flying) = self.look(at, a) {
                    let place = usize::from(b) * flying.bytes.len() / 256;
                    match which >> 2 & 1 {
                        0 => flying.bytes[place] ^= 1 << (which >> 3 & 7),
                        _ => flying.bytes.truncate(place),
                    }
                    self.deliver(1 - at, flying, false);
                }
            }
            // From another address, as behind a NAT.
            MOVE => {
                if let Some(mut flying) = self.take(at, a) {
                    flying.source = address(at, b);
                    self.deliver(1 - at, flying, true);
                }
            }
            PASS => {
                let unit = [Duration::from_millis(10), Duration::from_secs(1)][at];
                self.pass(unit * u32::from(a));
            }
            LOSE => {
                self.take(at, a);
            }
            RESTART => self.restart(at),
            KEY => {
                self.keys[at] = 2 + a % 4;
                self.restart(at);
                self.introduce(1 - at);
            }
            REMOVE => {
                let peer = peer_of(1 - at, usize::from(a & 1), 0).id;
                self.peers[at].remove(&peer);
                self.nodes[at].remove_peer(peer);
                self.poll(at);
            }
            _ => {
                let mut bytes = vec![b; usize::from(b)];
                if let Some(place) = bytes.first_mut() {
                    *place = a % 6;
                    for reserved in bytes.iter_mut().skip(1).take(3) {
                        *reserved = 0;
                    }
                }
                let source = address(1 - at, a);
                let forged = Flying {
                    source,
                    bytes,
                    packet: None,
                };
                self.deliver(at, forged, false);
            }
        }
    }

    fn send(&mut self, from: usize, version: usize, len: u8, count: u8) {
        let peer = peer_of(1 - from, version, 0).id;
        for _ in 0..count {
            let number = self.next;
            self.next += 1;
            let packet = packet(version, number, len);
            let own = peer_of(from, version, 0).id;
            self.sent.insert(number, (from, own, false));
            self.waiting[from] += 1;
            self.send_packet(from, peer, packet);
        }
        self.poll(from);
    }

    fn send_packet(&mut self, from: usize, peer: PeerId, packet: Vec<u8>) {
        let node = &mut self.nodes[from];
        let Some(to) = node.ready(self.now, peer) else {
            let staged = Staged {
                packet,
                offload: Header::default(),
                checksums: Checksums::Complete,
            };
            let known = self.peers[from].contains(&peer);
            let kept = node.stage(self.now, peer, staged);
            assert_eq!(kept.is_ok(), known);
            self.waiting[from] -= u64::from(kept.is_err());
            return;
        };
        assert_eq!(to.ip(), address(1 - from, 0).ip());
        let mut message = vec![0; message_len(packet.len())];
        let len = node.seal(self.now, peer, &packet, &mut message);
        assert_eq!(len, Ok(message.len()), "it was ready");
        let is_clear = message.windows(MARKER.len()).any(|part| part == MARKER);
        assert!(!is_clear);
        self.waiting[from] -= 1;
        let packet = Some(number_of(&packet));
        self.fly(from, message, packet);
    }

    fn fly(&mut self, from: usize, bytes: Vec<u8>, packet: Option<u32>) {
        let source = address(from, 0);
        self.ways[from].push_back(Flying {
            source,
            bytes,
            packet,
        });
        // What is lost before anybody sees it.
        if self.ways[from].len() > 500 {
            self.ways[from].pop_front();
        }
    }

    fn poll(&mut self, at: usize) {
        let mut datagrams = 0;
        while let Some(output) = self.nodes[at].poll_output() {
            match output {
                Output::Datagram(_, datagram) => {
                    datagrams += 1;
                    self.fly(at, datagram.to_vec(), None);
                }
                Output::Packet(peer, staged) => self.send_packet(at, peer, staged.packet),
            }
        }
        assert!(datagrams <= 4, "{datagrams} messages at once");
        self.waiting[at] -= self.nodes[at].take_given_up();
    }

    fn look(&self, from: usize, place: u8) -> Option<Flying> {
        let way = &self.ways[from];
        way.get(usize::from(place) % way.len().max(1)).cloned()
    }

    fn take(&mut self, from: usize, place: u8) -> Option<Flying> {
        let way = &mut self.ways[from];
        way.remove(usize::from(place) % way.len().max(1))
    }

    fn deliver(&mut self, to: usize, flying: Flying, is_whole: bool) {
        let Flying {
            source,
            mut bytes,
            packet,
        } = flying;
        let endpoints = |node: &WireGuard| node.links().map(|it| it.endpoint).collect::<Vec<_>>();
        let before = endpoints(&self.nodes[to]);
        let opened = self.nodes[to].open(self.now, source, &mut bytes);
        if !is_whole {
            assert!(
                opened.is_err() || opened == Ok(Opened::Consumed),
                "{opened:?}"
            );
            // A changed cookie reply, or one that asks for a cookie, moves nobody.
            assert_eq!(before, endpoints(&self.nodes[to]));
        }
        if let Ok(Opened::Packet(peer, range)) = opened {
            let packet = packet.expect("nothing else has a packet in it");
            let found = self.sent.get_mut(&packet).expect("it was sent");
            assert_eq!(
                (found.0, found.1, found.2),
                (1 - to, peer, false),
                "once, from its sender"
            );
            found.2 = true;
            assert!(self.peers[to].contains(&peer));
            assert_eq!(number_of(&bytes[range.clone()]), packet);
            // It is what it says it is long, without what it was padded with.
            let expected = match bytes[range.start] >> 4 {
                4 => u16::from_be_bytes([bytes[range.start + 2], bytes[range.start + 3]]).into(),
                _ => {
                    40 + usize::from(u16::from_be_bytes([
                        bytes[range.start + 4],
                        bytes[range.start + 5],
                    ]))
                }
            };
            assert_eq!(range.len(), expected);
        }
        self.poll(to);
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        for _ in 0..2000 {
            let due = self.nodes.iter().filter_map(WireGuard::poll_at).min();
            let Some(due) = due.filter(|due| *due <= until) else {
                break;
            };
            self.now = self.now.max(due);
            for at in [0, 1] {
                self.nodes[at].handle_timeout(self.now);
                assert!(
                    self.nodes[at].poll_at().is_none_or(|due| due > self.now),
                    "it spins"
                );
                self.poll(at);
            }
        }
        assert!(
            self.nodes
                .iter()
                .filter_map(WireGuard::poll_at)
                .all(|due| due > until)
        );
        self.now = until;
    }

    fn restart(&mut self, at: usize) {
        self.restarts += 1;
        let since = self.now.total_micros() as u64;
        let origin = Origin {
            now: self.now,
            instant: self.start + time::Duration::from_micros(since),
            unix: time::Duration::from_secs(1_700_000_000 + self.restarts % (1 << 32))
                + time::Duration::from_micros(since),
            seed: {
                let mut seed = [at as u8; 32];
                seed[..8].copy_from_slice(&self.restarts.to_be_bytes());
                seed.into()
            },
        };
        let choices = (self.restarts >> 32) as u8;
        self.nodes[at] = node(self.keys[at], choices, origin);
        self.waiting[at] = 0;
        self.introduce(at);
    }

    fn check(&self) {
        for (node, waiting) in self.nodes.iter().zip(self.waiting) {
            let staged: usize = node.links().map(|link| link.staged).sum();
            assert_eq!(staged as u64, waiting);
            assert!(staged <= WAITING);
        }
    }

    /// Delivers everything from now on, and expects a packet each way to arrive.
    fn settle(&mut self) {
        self.ways.iter_mut().for_each(VecDeque::clear);
        for at in [0, 1] {
            self.introduce(at);
        }
        // Nodes that have lost their sessions notice in 15 s, those under load answer again after a second.
        for _ in 0..40 {
            for at in [0, 1] {
                self.send(at, 0, 1, 1);
            }
            for _ in 0..20 {
                for at in [0, 1] {
                    while let Some(flying) = self.ways[at].pop_front() {
                        self.deliver(1 - at, flying, true);
                    }
                }
            }
            let mut last = self.sent.values().rev().take(2);
            if last.all(|(_, _, has_arrived)| *has_arrived) {
                return;
            }
            self.pass(Duration::from_secs(1));
        }
        panic!("they do not find together");
    }
}

fn seeds() -> Vec<Seed> {
    let events = |choices: u8, events: &[[u8; 4]]| [&[choices][..], events.as_flattened()].concat();
    let all = |count: u8| [[DELIVER, 0, 0, 0], [DELIVER, 1, 0, 0]].repeat(count.into());
    let handshake = || [vec![[SEND, 0, 9, 0]], all(3)].concat();
    let with = |more: &[[u8; 4]]| [&handshake()[..], more].concat();
    vec![
        ("handshake", events(0, &handshake())),
        ("preshared-key", events(1, &handshake())),
        (
            "keepalives",
            events(3, &[[PASS, 1, 60, 0], [DELIVER, 0, 0, 0]]),
        ),
        (
            "both-at-once",
            events(
                0,
                &[vec![[SEND, 0, 9, 0], [SEND, 1, 9, 0]], all(5)].concat(),
            ),
        ),
        (
            "ipv6",
            events(0, &with(&[[SEND, 2, 40, 2], [DELIVER, 0, 2, 0]])),
        ),
        (
            "changed",
            events(
                0,
                &with(&[[SEND, 0, 3, 0], [CHANGE, 0, 0, 90], [CHANGE, 4, 0, 90]]),
            ),
        ),
        (
            "changed-handshake",
            events(
                0,
                &[
                    [SEND, 0, 3, 0],
                    [CHANGE, 0, 0, 90],
                    [DELIVER, 0, 0, 0],
                    [CHANGE, 1, 0, 99],
                ],
            ),
        ),
        (
            "repeated",
            events(
                0,
                &with(&[
                    [SEND, 0, 3, 0],
                    [REPEAT, 0, 0, 0],
                    [REPEAT, 0, 0, 0],
                    [DELIVER, 0, 0, 0],
                ]),
            ),
        ),
        (
            "moved",
            events(
                0,
                &with(&[
                    [SEND, 0, 3, 0],
                    [MOVE, 0, 0, 9],
                    [SEND, 1, 3, 0],
                    [DELIVER, 1, 0, 0],
                ]),
            ),
        ),
        (
            "rekey",
            events(
                0,
                &with(&[
                    [PASS, 1, 121, 0],
                    [SEND, 0, 3, 0],
                    [DELIVER, 0, 0, 0],
                    [PASS, 1, 2, 0],
                    [DELIVER, 0, 0, 0],
                    [DELIVER, 1, 0, 0],
                    [DELIVER, 0, 0, 0],
                ]),
            ),
        ),
        (
            "restarted",
            events(
                0,
                &with(&[
                    [RESTART, 1, 0, 0],
                    [SEND, 0, 3, 0],
                    [DELIVER, 0, 0, 0],
                    [DELIVER, 1, 0, 0],
                    [DELIVER, 0, 0, 0],
                ]),
            ),
        ),
        (
            "another-key",
            events(
                0,
                &with(&[
                    [KEY, 0, 1, 0],
                    [SEND, 0, 3, 0],
                    [DELIVER, 0, 0, 0],
                    [DELIVER, 1, 0, 0],
                ]),
            ),
        ),
        (
            "away",
            events(
                0,
                &[
                    [SEND, 0, 9, 199],
                    [PASS, 1, 100, 0],
                    [PASS, 1, 255, 0],
                    [SEND, 0, 1, 0],
                ],
            ),
        ),
        (
            "removed",
            events(
                0,
                &[
                    [SEND, 0, 9, 50],
                    [SEND, 2, 9, 50],
                    [REMOVE, 0, 0, 0],
                    [REMOVE, 0, 1, 0],
                    [SEND, 0, 1, 0],
                ],
            ),
        ),
        (
            "invented",
            events(
                0,
                &[
                    [INVENT, 0, 1, 148],
                    [INVENT, 0, 2, 92],
                    [INVENT, 0, 3, 64],
                    [INVENT, 0, 4, 60],
                    [INVENT, 0, 0, 0],
                ],
            ),
        ),
        (
            "reordered",
            events(
                0,
                &with(&[
                    [SEND, 0, 3, 9],
                    [DELIVER, 0, 9, 0],
                    [DELIVER, 0, 0, 0],
                    [DELIVER, 0, 4, 0],
                ]),
            ),
        ),
    ]
}
