use std::collections::VecDeque;

use ipnet::IpNet;

use super::*;

/// What a test's packets carry behind their headers.
const PAYLOAD: &[u8] = b"what pods say";

/// Two nodes and what is on its way between them.
struct Pair {
    now: Instant,
    base: time::Instant,
    nodes: [WireGuard; 2],
    ways: [VecDeque<(SocketAddr, Vec<u8>)>; 2],
    /// Packets that came out, by node.
    delivered: [Vec<(PeerId, Vec<u8>)>; 2],
    reasons: Vec<DropReason>,
    /// Where each node sends from.
    addresses: [SocketAddr; 2],
}

fn key(number: u8) -> Secret {
    [number; 32].into()
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51820))
}

/// The peer of one IP version, and its lease.
fn peer(number: u8, version: IpVersion) -> Peer {
    let (id, subnet): (u32, IpNet) = match version {
        IpVersion::Ipv4 => (
            number.into(),
            format!("10.244.{number}.0/24").parse().unwrap(),
        ),
        IpVersion::Ipv6 => (
            100 + u32::from(number),
            format!("fd00:{number}::/64").parse().unwrap(),
        ),
    };
    Peer::new(PeerId(id), subnet, address(number)).with_wireguard(
        crate::datapath::peer::WireGuardEnd {
            public_key: public_key(&key(number)),
            endpoint: address(number),
        },
    )
}

fn config(number: u8) -> WireGuardConfig {
    WireGuardConfig {
        private_key: key(number),
        preshared_key: None,
        keepalive: None,
        devices: Devices::One,
    }
}

fn packet(len: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 2, 2], 64)
        .udp(7, 9)
        .write(&mut packet, &PAYLOAD.repeat(200)[..len])
        .unwrap();
    packet
}

impl Pair {
    fn new() -> Self {
        Self::with([config(1), config(2)])
    }

    fn with(configs: [WireGuardConfig; 2]) -> Self {
        let (now, base) = (Instant::from_secs(5), time::Instant::now());
        let mut seed = 40;
        let nodes = configs.map(|config| {
            seed += 1;
            WireGuard::new(
                config,
                Origin {
                    now,
                    instant: base,
                    unix: time::Duration::from_secs(1_700_000_000),
                    seed: key(seed),
                },
            )
        });
        let mut pair = Self {
            now,
            base,
            nodes,
            ways: Default::default(),
            delivered: Default::default(),
            reasons: Vec::new(),
            addresses: [address(1), address(2)],
        };
        for version in [IpVersion::Ipv4, IpVersion::Ipv6] {
            pair.nodes[0].set_peer(now, &peer(2, version));
            pair.nodes[1].set_peer(now, &peer(1, version));
        }
        pair
    }

    /// Sends a packet to the other node's peer of IPv4.
    fn send(&mut self, from: usize, packet: &[u8]) {
        self.send_to(from, PeerId(2 - from as u32), packet);
        self.poll(from);
    }

    fn send_to(&mut self, from: usize, peer: PeerId, packet: &[u8]) {
        let node = &mut self.nodes[from];
        match node.ready(self.now, peer) {
            Some(to) => {
                let mut message = vec![0; message_len(packet.len())];
                let len = node.seal(self.now, peer, packet, &mut message).unwrap();
                assert_eq!(len, message.len());
                self.ways[from].push_back((to, message));
            }
            None => {
                let staged = Staged {
                    packet: packet.to_vec(),
                    offload: Header::default(),
                    checksums: Checksums::Complete,
                };
                node.stage(self.now, peer, staged).unwrap();
            }
        }
    }

    /// Takes what a node has to send.
    fn poll(&mut self, from: usize) {
        while let Some(output) = self.nodes[from].poll_output() {
            match output {
                Output::Datagram(to, datagram) => {
                    self.ways[from].push_back((to, datagram.to_vec()));
                }
                Output::Packet(peer, staged) => self.send_to(from, peer, &staged.packet),
            }
        }
    }

    fn deliver(&mut self, to: usize, source: SocketAddr, mut datagram: Vec<u8>) {
        let opened = self.nodes[to].open(self.now, source, &mut datagram);
        match opened {
            Ok(Opened::Packet(peer, range)) => {
                self.delivered[to].push((peer, datagram[range].to_vec()));
            }
            Ok(Opened::Consumed) => {}
            Err(reason) => self.reasons.push(reason),
        }
        self.poll(to);
    }

    /// Delivers everything, in order, until nothing is on its way.
    fn exchange(&mut self) {
        while self.ways.iter().any(|way| !way.is_empty()) {
            for from in [0, 1] {
                while let Some((_, datagram)) = self.ways[from].pop_front() {
                    self.deliver(1 - from, self.addresses[from], datagram);
                }
            }
        }
    }

    /// Lets time pass, with both nodes' timers, up to `until` after the start.
    fn pass(&mut self, seconds: u64, deliver: bool) {
        let until = self.now + Duration::from_secs(seconds);
        loop {
            let due = self.nodes.iter().filter_map(WireGuard::poll_at).min();
            let Some(due) = due.filter(|due| *due <= until) else {
                break;
            };
            self.now = due.max(self.now);
            for node in [0, 1] {
                self.nodes[node].handle_timeout(self.now);
                self.poll(node);
            }
            match deliver {
                true => self.exchange(),
                false => self.ways.iter_mut().for_each(VecDeque::clear),
            }
        }
        self.now = until;
    }

    fn handshakes(&self) -> [u64; 2] {
        [0, 1].map(|node| self.nodes[node].counters().handshakes)
    }
}

#[test]
fn packets_wait_for_a_handshake_and_arrive_in_order() {
    let mut pair = Pair::new();
    let packets = [packet(100), packet(1), packet(1372)];
    for packet in &packets {
        pair.send(0, packet);
    }
    assert_eq!(pair.ways[0].len(), 1, "the handshake begins once");
    pair.exchange();
    let expected = packets.map(|packet| (PeerId(1), packet));
    assert_eq!(pair.delivered[1], expected);
    // The other side may answer at once.
    pair.send(1, &packet(5));
    pair.exchange();
    assert_eq!(pair.delivered[0], [(PeerId(2), packet(5))]);
    assert_eq!((pair.handshakes(), pair.reasons.len()), ([1, 1], 0));
    for (node, state) in pair
        .nodes
        .iter()
        .map(|node| node.links().next().unwrap())
        .enumerate()
    {
        assert_eq!(state.handshake, Some(pair.now), "{node}");
        assert!(!state.roamed && state.staged == 0);
    }
}

#[test]
fn a_packet_is_of_the_peer_of_its_ip_version() {
    let mut pair = Pair::new();
    let mut v6 = vec![0x60, 0, 0, 0, 0, 3, 59, 64];
    v6.extend([7; 32]);
    v6.extend([1, 2, 3]);
    pair.send(0, &v6);
    pair.exchange();
    assert_eq!(pair.delivered[1], [(PeerId(101), v6.clone())]);
    // What the lease has not, nobody may send.
    pair.nodes[1].remove_peer(PeerId(101));
    pair.send(0, &v6);
    pair.send(0, &packet(1));
    pair.exchange();
    assert_eq!(pair.reasons, [DropReason::SourceNotInLease]);
    assert_eq!(pair.delivered[1][1..], [(PeerId(1), packet(1))]);
}

#[test]
fn each_message_counts_once_whatever_its_order() {
    let mut pair = Pair::new();
    pair.send(0, &packet(1));
    pair.exchange();
    pair.delivered[1].clear();
    for len in 0..8200 {
        pair.send(0, &packet(len % 50));
    }
    let mut way = std::mem::take(&mut pair.ways[0]);
    let (_, last) = way.pop_back().unwrap();
    let (_, first) = way.pop_front().unwrap();
    pair.deliver(1, address(1), last.clone());
    pair.deliver(1, address(1), first);
    assert_eq!(
        pair.reasons,
        [DropReason::WireguardReplayed],
        "too long ago"
    );
    // One that is within the window, and each again.
    for (_, datagram) in way.iter().rev().take(8000) {
        pair.deliver(1, address(1), datagram.clone());
    }
    assert_eq!((pair.delivered[1].len(), pair.reasons.len()), (8001, 1));
    for (_, datagram) in way.iter().rev().take(8000) {
        pair.deliver(1, address(1), datagram.clone());
    }
    assert_eq!((pair.delivered[1].len(), pair.reasons.len()), (8001, 8001));
}

#[test]
fn changed_messages_are_refused() {
    let mut pair = Pair::new();
    pair.send(0, &packet(1));
    pair.exchange();
    pair.send(0, &packet(40));
    let (_, message) = pair.ways[0].pop_front().unwrap();
    for at in 0..message.len() {
        let mut changed = message.clone();
        changed[at] ^= 1;
        pair.deliver(1, address(9), changed);
    }
    assert_eq!(
        (pair.delivered[1].len(), pair.reasons.len()),
        (1, message.len())
    );
    // Nor do they move the endpoint.
    assert_eq!(pair.nodes[1].links().next().unwrap().endpoint, address(1));
    pair.deliver(1, address(1), message);
    assert_eq!(pair.delivered[1].len(), 2);
}

#[test]
fn a_session_is_replaced_while_packets_go() {
    let mut pair = Pair::new();
    for second in 0..400 {
        pair.send((second % 2) as usize, &packet(second as usize % 100));
        pair.exchange();
        pair.pass(1, true);
    }
    let delivered = pair.delivered.each_ref().map(Vec::len);
    assert_eq!((delivered, pair.reasons.len()), ([200, 200], 0));
    // At 0, 120, 240 and 360 seconds, each begun by who began the first.
    assert_eq!(pair.handshakes(), [4, 4]);
    assert_eq!(pair.nodes[1].counters().initiations, 0);
}

#[test]
fn silence_is_answered() {
    let mut pair = Pair::new();
    pair.send(0, &packet(1));
    pair.exchange();
    pair.pass(9, true);
    assert_eq!(pair.reasons, []);
    // Ten seconds after the packet, who has nothing to say says so.
    pair.now += Duration::from_millis(1500);
    pair.nodes[1].handle_timeout(pair.now);
    pair.poll(1);
    let sizes: Vec<usize> = pair.ways[1].iter().map(|(_, it)| it.len()).collect();
    assert_eq!(sizes, [32]);
    pair.exchange();
    // With nothing to send a session is replaced when it ends, no sooner.
    pair.pass(600, true);
    assert!(pair.handshakes()[0] <= 4, "{:?}", pair.handshakes());
    pair.send(0, &packet(2));
    pair.exchange();
    assert_eq!((pair.delivered[1].len(), pair.reasons.len()), (2, 0));
}

#[test]
fn a_node_that_is_away_is_called_for_a_while() {
    let mut pair = Pair::new();
    for _ in 0..200 {
        pair.send(0, &packet(1000));
    }
    // 128 packets wait, and make room for later ones.
    assert_eq!(pair.nodes[0].take_given_up(), 72);
    pair.pass(100, false);
    let tried = pair.nodes[0].counters().initiations;
    assert!((17..=19).contains(&tried), "{tried} times in 90 s");
    assert_eq!(pair.nodes[0].take_given_up(), 128);
    pair.pass(1000, false);
    assert_eq!(pair.nodes[0].counters().initiations, tried);
    // It is back, and there is something to say.
    pair.send(0, &packet(3));
    pair.exchange();
    assert_eq!(pair.delivered[1], [(PeerId(1), packet(3))]);
}

#[test]
fn long_packets_wait_in_bounds() {
    let mut pair = Pair::new();
    for _ in 0..10 {
        let staged = Staged {
            packet: vec![0x45; 60_000],
            offload: Header::default(),
            checksums: Checksums::Complete,
        };
        pair.nodes[0].stage(pair.now, PeerId(2), staged).unwrap();
    }
    assert_eq!(pair.nodes[0].take_given_up(), 6);
    pair.nodes[0].remove_peer(PeerId(2));
    pair.nodes[0].remove_peer(PeerId(102));
    assert_eq!(pair.nodes[0].take_given_up(), 4);
    let staged = Staged {
        packet: packet(1),
        offload: Header::default(),
        checksums: Checksums::Complete,
    };
    let gone = pair.nodes[0].stage(pair.now, PeerId(2), staged);
    assert_eq!(gone, Err(DropReason::PeerGone));
}

#[test]
fn datagrams_go_to_where_a_node_was_last_heard() {
    let mut pair = Pair::new();
    pair.send(0, &packet(1));
    pair.exchange();
    pair.addresses[0] = "[2001:db8::7]:1234".parse().unwrap();
    pair.send(0, &packet(2));
    pair.exchange();
    let to = |pair: &mut Pair| pair.nodes[1].ready(pair.now, PeerId(1)).unwrap();
    assert_eq!(to(&mut pair), pair.addresses[0]);
    let state = pair.nodes[1].links().next().unwrap();
    assert!(state.roamed);
    // A lease that is renewed says nothing new, another endpoint does.
    pair.nodes[1].set_peer(pair.now, &peer(1, IpVersion::Ipv4));
    assert_eq!(to(&mut pair), pair.addresses[0]);
    let mut moved = peer(1, IpVersion::Ipv4);
    moved.wireguard.as_mut().unwrap().endpoint = address(77);
    pair.nodes[1].set_peer(pair.now, &moved);
    assert_eq!(to(&mut pair), address(77));
}

#[test]
fn another_key_is_another_node() {
    let mut pair = Pair::new();
    pair.send(0, &packet(1));
    pair.exchange();
    let mut other = Pair::with([config(3), config(2)]);
    let spare = WireGuard::new(config(9), origin(&pair));
    other.nodes[1] = std::mem::replace(&mut pair.nodes[1], spare);
    other.now = pair.now;
    other.base = pair.base;
    other.send(0, &packet(1));
    other.exchange();
    assert_eq!(other.reasons, [DropReason::WireguardUnknownKey]);
    let mut changed = peer(1, IpVersion::Ipv4);
    changed.wireguard.as_mut().unwrap().public_key = public_key(&key(3));
    other.nodes[1].set_peer(other.now, &changed);
    other.pass(6, true);
    assert_eq!(other.delivered[1], [(PeerId(1), packet(1))]);
}

fn origin(pair: &Pair) -> Origin {
    Origin {
        now: pair.now,
        instant: pair.base,
        unix: time::Duration::from_secs(1_700_000_000),
        seed: key(99),
    }
}

#[test]
fn nodes_with_other_preshared_keys_do_not_meet() {
    for (theirs, meets) in [(Some(key(60)), true), (Some(key(61)), false), (None, false)] {
        let ours = WireGuardConfig {
            preshared_key: Some(key(60)),
            ..config(1)
        };
        let theirs = WireGuardConfig {
            preshared_key: theirs,
            ..config(2)
        };
        let mut pair = Pair::with([ours, theirs]);
        pair.send(0, &packet(1));
        pair.exchange();
        assert_eq!(!pair.delivered[1].is_empty(), meets);
        let refused = pair.reasons.contains(&DropReason::WireguardForged);
        assert_eq!(refused, !meets, "{:?}", pair.reasons);
    }
}

#[test]
fn a_replayed_handshake_changes_nothing() {
    let mut pair = Pair::new();
    pair.send(0, &packet(1));
    let (_, initiation) = pair.ways[0][0].clone();
    pair.exchange();
    pair.deliver(1, address(9), initiation);
    assert_eq!(pair.reasons, [DropReason::WireguardReplayed]);
    assert!(pair.ways[1].is_empty());
    assert_eq!(pair.nodes[1].links().next().unwrap().endpoint, address(1));
}

#[test]
fn too_many_handshakes_are_asked_where_they_come_from() {
    let mut pair = Pair::new();
    let mut strangers = WireGuard::new(config(8), origin(&pair));
    let mut answers = 0;
    for number in 0..1000 {
        // Each begins anew, as a flood does.
        let to = peer(2, IpVersion::Ipv4);
        strangers.remove_peer(to.id);
        strangers.set_peer(pair.now, &to);
        let staged = Staged {
            packet: packet(1),
            offload: Header::default(),
            checksums: Checksums::Complete,
        };
        strangers.stage(pair.now, to.id, staged).unwrap();
        let Some(Output::Datagram(_, datagram)) = strangers.poll_output() else {
            panic!("{number}")
        };
        pair.deliver(1, address(8), datagram.to_vec());
        answers += pair.ways[1].len();
        pair.ways[1].clear();
    }
    let cookies = pair.nodes[1].counters().cookies;
    assert_eq!(answers as u64, cookies, "cookies are all they get");
    assert!(cookies >= 1000 - HANDSHAKES - 1, "{cookies}");
    // A node of the cluster gets through with the cookie at its next try.
    pair.send(0, &packet(4));
    pair.exchange();
    pair.pass(6, true);
    assert_eq!(pair.delivered[1], [(PeerId(1), packet(4))]);
}

#[test]
fn keepalives_begin_a_session_and_keep_it() {
    let often = WireGuardConfig {
        keepalive: Some(Duration::from_secs(25)),
        ..config(1)
    };
    let mut pair = Pair::with([often, config(2)]);
    pair.pass(1, true);
    assert_eq!(pair.handshakes(), [1, 1]);
    pair.pass(600, true);
    // It is always ready for a packet the other way.
    pair.send(1, &packet(1));
    assert_eq!(pair.nodes[1].counters().initiations, 0);
    pair.exchange();
    assert_eq!(pair.delivered[0].len(), 1);
    assert_eq!(pair.reasons, []);
}

#[test]
fn a_node_that_has_lost_its_sessions_calls_back() {
    let mut pair = Pair::new();
    pair.send(1, &packet(1));
    pair.exchange();
    let mut anew = WireGuard::new(config(1), origin(&pair));
    anew.set_peer(pair.now, &peer(2, IpVersion::Ipv4));
    pair.nodes[0] = anew;
    // The time of day has gone on meanwhile.
    pair.nodes[0].clock.instant -= time::Duration::from_secs(1);
    pair.send(1, &packet(2));
    pair.exchange();
    assert_eq!(pair.reasons, [DropReason::WireguardNoSession]);
    pair.send(1, &packet(3));
    pair.exchange();
    assert_eq!(
        pair.delivered[0],
        [(PeerId(2), packet(1)), (PeerId(2), packet(3))]
    );
    // Strangers are not called.
    let before = pair.nodes[0].counters().initiations;
    let mut unknown = vec![4, 0, 0, 0];
    unknown.resize(100, 3);
    pair.now += Duration::from_secs(1);
    pair.deliver(0, address(9), unknown);
    assert_eq!(pair.nodes[0].counters().initiations, before);
}

/// A superpacket's segments are sealed as they are cut.
#[test]
fn segments_leave_as_one_train_of_messages() {
    use muslin_encap::offload::batch::{Queued, SendBatch};
    use muslin_encap::offload::virtio::{Gso, GsoKind};
    let mut pair = Pair::new();
    pair.send(0, &packet(1));
    pair.exchange();
    pair.delivered[1].clear();
    let superpacket = packet(2500);
    let gso = Gso {
        kind: GsoKind::Udp,
        size: 1000,
        ecn: false,
    };
    let queued = Queued {
        key: (),
        packet: &superpacket,
        network: 0,
        offload: Header {
            gso: Some(gso),
            ..Header::default()
        },
        checksums: Checksums::Complete,
    };
    let mut area = vec![0; 10_000];
    let mut batch = SendBatch::new(&mut area, true);
    let mut sealer = pair.nodes[0].sealer(pair.now, PeerId(2));
    batch
        .push_sealed(&queued, &mut None, &mut sealer)
        .unwrap()
        .unwrap();
    let [message] = batch.messages() else {
        panic!("one train")
    };
    assert_eq!(
        (message.datagrams, message.datagram_len),
        (3, message_len(1028))
    );
    let datagrams: Vec<Vec<u8>> = batch
        .datagrams(message)
        .map(|pieces| pieces.iter().flat_map(|piece| piece.to_vec()).collect())
        .collect();
    for datagram in datagrams {
        pair.deliver(1, address(1), datagram);
    }
    let said: Vec<u8> = pair.delivered[1]
        .iter()
        .flat_map(|(_, it)| it[28..].to_vec())
        .collect();
    assert_eq!(said, superpacket[28..]);
}

#[test]
fn what_is_no_message_is_told_apart() {
    let mut pair = Pair::new();
    for odd in [
        vec![],
        vec![4, 0, 0],
        vec![9; 148],
        vec![1; 148],
        vec![4, 0, 0, 0],
    ] {
        pair.deliver(1, address(1), odd);
    }
    let mut unknown = vec![4, 0, 0, 0];
    unknown.resize(100, 3);
    pair.deliver(1, address(1), unknown);
    let malformed = DropReason::WireguardMalformed;
    let expected = [vec![malformed; 5], vec![DropReason::WireguardNoSession]].concat();
    assert_eq!(pair.reasons, expected);
}

/// With two devices, a node has the same key at two ports, whose handshakes may be of the same moment.
#[test]
fn devices_do_not_take_each_others_handshakes_for_replays() {
    let two = |number| WireGuardConfig {
        devices: Devices::Two,
        ..config(number)
    };
    let mut pair = Pair::with([two(1), two(2)]);
    let v6_end: SocketAddr = "[2001:db8::2]:51821".parse().unwrap();
    let mut other = peer(2, IpVersion::Ipv6);
    other.wireguard.as_mut().unwrap().endpoint = v6_end;
    pair.nodes[0].set_peer(pair.now, &other);
    let own_end: SocketAddr = "[2001:db8::1]:51821".parse().unwrap();
    let mut own = peer(1, IpVersion::Ipv6);
    own.wireguard.as_mut().unwrap().endpoint = own_end;
    pair.nodes[1].set_peer(pair.now, &own);
    let mut v6 = vec![0x60, 0, 0, 0, 0, 0, 59, 64];
    v6.extend([7; 32]);
    pair.send(0, &packet(1));
    pair.send_to(0, PeerId(102), &v6);
    pair.poll(0);
    // Everything of the second device is between the ends of IPv6.
    while pair.ways.iter().any(|way| !way.is_empty()) {
        for from in [0, 1] {
            while let Some((to, datagram)) = pair.ways[from].pop_front() {
                let source = match (to.is_ipv6(), from) {
                    (true, 0) => own_end,
                    (true, _) => v6_end,
                    (false, _) => address(from as u8 + 1),
                };
                pair.deliver(1 - from, source, datagram);
            }
        }
    }
    assert_eq!(pair.reasons, []);
    assert_eq!(
        pair.delivered[1],
        [(PeerId(1), packet(1)), (PeerId(101), v6)]
    );
}
