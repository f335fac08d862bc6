//! A node on a link with other hosts, some of which lie: ARP in all its forms, bare packets, peers
//! and an uplink that come and go, and time. The oracle keeps who said what when, and holds that
//!
//! * only our own requests and packets for next hops leave, from our own MAC address;
//! * what leaves bare goes to the MAC address that its next hop is believed to have, one hop less;
//! * what reaches a pod came from the next hop of its peer, unless peers are not checked;
//! * what comes from a host that is not known yet waits for its answer, bounded, and reaches the pod if
//!   the answer confirms it, once;
//! * a next hop that answers keeps its MAC address, whatever others claim;
//! * nothing but next hops is remembered, timers do not spin, counters add up.
#![cfg_attr(fuzzing, no_main)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use arbitrary::{Result, Unstructured};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::checksum;
use muslin_encap::mtu::Mtu;
use muslin_fuzz::{Seed, for_each_event};
use muslin_stack::addresses::{self, Nets};
use muslin_stack::datapath::node::{Node, NodeConfig, Verdict};
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::tunnel::Tunnel;
use muslin_stack::datapath::uplink::Uplink;
use muslin_stack::drops::DropReason;
use muslin_stack::{Duration, Instant};
use smoltcp::wire::EthernetAddress;

muslin_fuzz::target! {
    check: run,
    seeds: seeds,
    words: &[
        // Host 2 answers, announces itself, is asked for by host 3; a stranger claims its address.
        &[0, 2, 1, 2, 2, 1, 1, 0],
        &[0, 2, 15, 1, 2, 15, 2, 0],
        &[0, 9, 15, 1, 2, 15, 2, 0],
        // A packet from host 2 for pod 2, and one from pod 2 for a pod of peer 0.
        &[1, 2, 1, 2, 2, 64, 0],
        &[2, 2, 0, 64, 0],
        // A peer comes, goes; the uplink goes, comes; a second, a minute.
        &[3, 1, 3, 1],
        &[4, 1],
        &[5, 0],
        &[5, 1],
        &[6, 12],
        &[6, 87],
    ],
    inputs: 200_000,
    max_len: 800,
}

/// A pod's frames come from here.
const PORT: PortId = PortId(0);
const GATEWAY: EthernetAddress = EthernetAddress([0x0a, 0x58, 10, 244, 1, 1]);
const MTU: u16 = 1500;
/// A next hop that is silent for less than this after a claim keeps its address: three questions, a
/// fifth of a second apart.
const PATIENCE: Duration = Duration::from_millis(600);
/// Packets that wait until it is known where one host is.
const EARLY: usize = 4;
/// Peers have identities, subnets and hosts below this.
const IDS: u8 = 4;

/// MAC addresses of the link: 1 is ours, 2 to 5 are hosts', 15 is all, the others are strangers'.
fn mac(byte: u8) -> EthernetAddress {
    EthernetAddress(match byte % 16 {
        15 => [0xff; 6],
        14 => [0x33, 0x33, 0, 0, 0, 1],
        13 => [0; 6],
        byte => [2, 0x1a, 0, 0, 0, byte],
    })
}

/// Addresses of the link: 1 is ours, 2 to 5 are hosts', 6 is beyond a router.
fn host(byte: u8) -> Ipv4Addr {
    match byte % 16 {
        6 => Ipv4Addr::new(10, 8, 0, 6),
        15 => Ipv4Addr::UNSPECIFIED,
        byte => Ipv4Addr::new(192, 168, 0, byte),
    }
}

/// A pod of this node (2 or 3), or of the peer that has the subnet.
fn own_pod(byte: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, 2 + byte % 2)
}

fn pod_of(subnet: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 2 + subnet % IDS, 2)
}

fn uplink(answers: bool) -> Uplink {
    let net = format!("{}/24", host(1)).parse::<Nets>();
    let net = net.expect("it is a prefix");
    let mtu = Mtu::new(MTU.into()).expect("it is in range");
    let mut uplink = Uplink::new(mac(1), net, mtu);
    uplink.answers = answers;
    uplink
}

/// Runs the events that `data` stands for. Its first byte chooses a configuration.
fn run(data: &[u8]) {
    let Some((choices, rest)) = data.split_first() else {
        return;
    };
    let mut harness = Harness::new(*choices);
    for_each_event(rest, |input| {
        harness.step(input)?;
        harness.poll();
        harness.check_early();
        harness.check_beliefs();
        Ok(())
    });
    harness.finish();
}

struct Harness {
    node: Node,
    now: Instant,
    checks_peers: bool,
    answers: bool,
    has_uplink: bool,
    /// Whether the last frame asked for our address.
    asked: bool,
    peers: [Option<Peer>; IDS as usize],
    /// The hosts that peers ever had.
    hosts: BTreeSet<Ipv4Addr>,
    beliefs: BTreeMap<Ipv4Addr, EthernetAddress>,
    /// When another MAC address first claimed a next hop's address since that was last heard.
    doubts: BTreeMap<Ipv4Addr, Instant>,
    /// Frames that wait, with the hosts that they may have come from.
    early: Vec<(Vec<u8>, Vec<Ipv4Addr>)>,
    storage: Vec<u8>,
}

impl Harness {
    /// Peers 0 and 1 are at hosts 2 and 3.
    fn new(choices: u8) -> Self {
        let checks_peers = choices & 1 == 0;
        let subnet = "10.244.1.0/24".parse::<Nets>().expect("it is a subnet");
        let mtu = Mtu::new(MTU.into()).expect("it is in range");
        let mut config = NodeConfig::new(subnet, GATEWAY, Tunnel::None, mtu, 7);
        config.guard.peers = checks_peers;
        (config.limits.fdb, config.limits.neighbours) = (4, 4);
        let mut node = Node::new(config, Instant::ZERO).expect("the subnet has room");
        node.attach(PORT, Attachment::new(mac(12), vec![own_pod(0).into()]));
        let mut harness = Self {
            node,
            now: Instant::ZERO,
            checks_peers,
            answers: choices & 2 != 0,
            has_uplink: false,
            asked: false,
            peers: Default::default(),
            hosts: BTreeSet::new(),
            beliefs: BTreeMap::new(),
            doubts: BTreeMap::new(),
            early: Vec::new(),
            storage: vec![0; HEADROOM + 2048],
        };
        harness.set_uplink(true);
        for id in 0..2 {
            harness.set_peer(id, id, 2 + id);
        }
        harness
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut byte = || input.arbitrary::<u8>();
        match byte()? % 7 {
            0 => {
                let [source, destination, operation, spa, tha, tpa, edits] = [
                    byte()?,
                    byte()?,
                    byte()?,
                    byte()?,
                    byte()?,
                    byte()?,
                    byte()?,
                ];
                let mut frame = [&mac(destination).0[..], &mac(source).0, &[8, 6]].concat();
                frame.extend([0, 1, 8, 0, 6, 4, 0, operation % 4]);
                frame.extend(mac(source).0);
                frame.extend(host(spa).octets());
                frame.extend(mac(tha).0);
                frame.extend(host(tpa).octets());
                for _ in 0..edits.saturating_sub(252) {
                    let (at, value) = (usize::from(byte()?) % frame.len(), byte()?);
                    frame[at] = value;
                }
                if edits % 16 == 8 {
                    frame.truncate(byte()?.into());
                }
                self.take_link_frame(&frame);
            }
            1 => {
                let [source, destination, from, to, ttl, len] =
                    [byte()?, byte()?, byte()?, byte()?, byte()?, byte()?];
                let packet = udp(pod_of(from), own_pod(to), ttl, len);
                let frame = [&mac(destination).0[..], &mac(source).0, &[8, 0], &packet].concat();
                self.take_link_frame(&frame);
            }
            2 => {
                let [_, to, ttl, len] = [byte()?, byte()?, byte()?, byte()?];
                self.take_pod_packet(&udp(own_pod(0), pod_of(to), ttl, len));
            }
            3 => {
                let [id, subnet, at] = [byte()?, byte()?, byte()?];
                self.set_peer(id % IDS, subnet % IDS, 2 + at % 5);
            }
            4 => {
                let id = byte()? % IDS;
                self.node.remove_peer(PeerId(id.into()));
                self.peers[usize::from(id)] = None;
            }
            5 => {
                let has_uplink = byte()? % 2 == 1;
                self.set_uplink(has_uplink);
            }
            _ => {
                let time = u64::from(byte()?);
                self.now += Duration::from_millis(time * time * 8);
                self.node.handle_timeout(self.now);
                assert!(self.node.poll_at() > self.now, "a timer spins");
            }
        }
        Ok(())
    }

    fn set_peer(&mut self, id: u8, subnet: u8, at: u8) {
        let subnet = ipnet::Ipv4Net::new_assert(pod_of(subnet), 24).trunc();
        let address = SocketAddrV4::new(host(at), 0);
        let peer = Peer::new(PeerId(id.into()), subnet.into(), address.into());
        self.hosts.insert(host(at));
        self.node.set_peer(peer.clone());
        self.peers[usize::from(id)] = Some(peer);
    }

    fn set_uplink(&mut self, has_uplink: bool) {
        self.has_uplink = has_uplink;
        let answers = self.answers;
        self.node.set_uplink(has_uplink.then(|| uplink(answers)));
        if !has_uplink {
            self.beliefs.clear();
        }
    }

    /// The hosts of the peer that packets for, or from, a pod go to.
    fn hosts_of(&self, pod: Ipv4Addr) -> Vec<Ipv4Addr> {
        let peers = self.peers.iter().flatten();
        let holding = peers.filter(|peer| peer.subnet.contains(&IpAddr::V4(pod)));
        holding
            .filter_map(|peer| addresses::ipv4(peer.address.ip()))
            .collect()
    }

    fn through(
        &mut self,
        bytes: &[u8],
        call: impl FnOnce(&mut Node, Instant, &mut PacketBuf<'_>) -> Verdict,
    ) -> (Verdict, Vec<u8>) {
        self.storage[HEADROOM..HEADROOM + bytes.len()].copy_from_slice(bytes);
        let packet = PacketBuf::new(&mut self.storage, HEADROOM, bytes.len());
        let mut packet = packet.expect("it fits");
        let verdict = call(&mut self.node, self.now, &mut packet);
        (verdict, packet.as_slice().to_vec())
    }

    fn take_link_frame(&mut self, frame: &[u8]) {
        let target = frame.get(38..42).map(ipv4);
        self.asked = frame.get(12..14) == Some(&[8, 6]) && target == Some(host(1));
        let believed = self.beliefs.clone();
        let (verdict, out) = self.through(frame, |node, now, packet| node.from_uplink(now, packet));
        match verdict {
            Verdict::Port(PORT) => {
                assert!(self.has_uplink && frame[..6] == mac(1).0);
                assert_eq!(out[..12], [mac(12).0, GATEWAY.0].concat()[..]);
                let (before, after) = (&frame[14..], &out[14..]);
                check_hop(before, after);
                let hosts = self.hosts_of(ipv4(&before[12..]));
                let known = hosts.iter().filter_map(|host| believed.get(host));
                let sender = EthernetAddress(frame[6..12].try_into().expect("it has six bytes"));
                let is_sender = known.into_iter().any(|mac| *mac == sender);
                assert!(is_sender || !self.checks_peers, "{sender} is no next hop");
            }
            Verdict::Consumed if frame[12..14] == [8, 0] => self.let_wait(frame, &believed),
            Verdict::Consumed => self.hear(frame),
            Verdict::Drop(DropReason::NextHopConflict) => {
                for address in self.claimed(frame) {
                    self.doubts.entry(address).or_insert(self.now);
                }
            }
            Verdict::Drop(_) => {}
            verdict => panic!("{verdict:?} for a frame from the link"),
        }
        if !self.checks_peers {
            self.doubt_others(frame, &believed);
        }
    }

    /// A frame waits because none of the hosts that it may have come from is known.
    fn let_wait(&mut self, frame: &[u8], believed: &BTreeMap<Ipv4Addr, EthernetAddress>) {
        assert!(self.has_uplink && self.checks_peers && frame[..6] == mac(1).0);
        let hosts = self.hosts_of(ipv4(&frame[26..]));
        let is_unknown = |host: &Ipv4Addr| !believed.contains_key(host);
        let unknown: Vec<_> = hosts.into_iter().filter(is_unknown).collect();
        assert!(!unknown.is_empty(), "its host is known");
        self.early.push((frame.to_vec(), unknown.clone()));
        let of_host = self.early.iter().filter(|(_, hosts)| *hosts == unknown);
        let most = EARLY * unknown.len();
        assert!(of_host.count() <= most, "too many frames wait");
    }

    /// A packet that the node itself sends to the pod is the gateway's, or one that waited.
    fn take_early(&mut self, out: &[u8]) {
        assert_eq!(out[6..12], GATEWAY.0);
        let source = ipv4(&out[26..]);
        if source == Ipv4Addr::new(10, 244, 1, 1) {
            return;
        }
        let places = self.places();
        let is_it = |(frame, hosts): &(Vec<u8>, Vec<Ipv4Addr>)| {
            let mut macs = hosts.iter().filter_map(|host| places.get(host)?.as_ref());
            let rest = |packet: &[u8]| [&packet[..8], &packet[12..]].concat();
            // Of frames that differ in their time to live alone, one that has none left is lost.
            let is_hop_less = out[22].checked_add(1) == Some(frame[22]);
            let is_same = is_hop_less && rest(&frame[14..]) == rest(&out[14..]);
            is_same && macs.any(|mac| mac.0 == frame[6..12])
        };
        let found = self.early.iter().position(is_it);
        let (frame, _) = self
            .early
            .remove(found.expect("it waited, and was confirmed"));
        check_hop(&frame[14..], &out[14..]);
    }

    /// The hosts that are known, or looked for.
    fn places(&self) -> BTreeMap<Ipv4Addr, Option<EthernetAddress>> {
        let hops = self.node.next_hops();
        let hops = hops.filter_map(|(address, place, _)| match address {
            IpAddr::V4(address) => Some((address, place.map(|place| place.mac))),
            IpAddr::V6(_) => None,
        });
        hops.collect()
    }

    /// What waits still, waits for a host that is looked for. None that was confirmed is lost.
    fn check_early(&mut self) {
        let places = self.places();
        let early = std::mem::take(&mut self.early).into_iter();
        let (waiting, over): (Vec<_>, Vec<_>) = early.partition(|(_, hosts)| {
            let mut hosts = hosts.iter();
            self.has_uplink && hosts.any(|host| places.get(host) == Some(&None))
        });
        self.early = waiting;
        for (frame, hosts) in over {
            let now = self.hosts_of(ipv4(&frame[26..]));
            let is_confirmed = |host: &Ipv4Addr| {
                let place = places.get(host).copied().flatten();
                place.is_some_and(|mac| mac.0 == frame[6..12])
            };
            let is_for_pod = frame[30..34] == own_pod(0).octets() && frame[22] > 1;
            // Of several peers with one subnet only the route says whose it is.
            let is_lost = is_for_pod && now.len() == 1 && hosts == now && is_confirmed(&now[0]);
            assert!(!is_lost, "a packet of {} is lost", now[0]);
        }
    }

    /// Where peers are not checked, a packet of another host than the known one is a claim, too, and
    /// goes on.
    fn doubt_others(&mut self, frame: &[u8], believed: &BTreeMap<Ipv4Addr, EthernetAddress>) {
        if frame.get(12..14) != Some(&[8, 0]) {
            return;
        }
        for address in self.claimed(frame) {
            if believed
                .get(&address)
                .is_some_and(|mac| mac.0 != frame[6..12])
            {
                self.doubts.entry(address).or_insert(self.now);
            }
        }
    }

    /// The next hops that a frame may come from, by what it says.
    fn claimed(&self, frame: &[u8]) -> Vec<Ipv4Addr> {
        match (&frame[12..14], frame.get(14..34)) {
            ([8, 6], Some(arp)) => vec![ipv4(&arp[14..])],
            (_, Some(packet)) => self.hosts_of(ipv4(&packet[12..])),
            (_, None) => Vec::new(),
        }
    }

    /// A next hop that is heard again is doubted no longer.
    fn hear(&mut self, frame: &[u8]) {
        if let (Some(arp), Some([8, 6])) = (frame.get(14..42), frame.get(12..14)) {
            let address = ipv4(&arp[14..]);
            let mut peers = self.peers.iter().flatten();
            let believed = self.beliefs.get(&address);
            if peers.any(|peer| peer.address.ip() == address)
                && believed.is_some_and(|mac| mac.0 == arp[8..14])
            {
                self.doubts.remove(&address);
            }
        }
    }

    fn take_pod_packet(&mut self, packet: &[u8]) {
        let frame = [&GATEWAY.0[..], &mac(12).0, &[8, 0], packet].concat();
        let (verdict, out) =
            self.through(&frame, |node, now, frame| node.from_port(now, PORT, frame));
        match verdict {
            Verdict::Uplink { id: Some(_) } => self.check_bare(packet, &out),
            Verdict::Consumed | Verdict::Drop(_) => {}
            verdict => panic!("{verdict:?} for a packet to a peer"),
        }
    }

    /// A frame for the link with a pod's packet goes to where its next hop is believed to be.
    fn check_bare(&self, packet: &[u8], out: &[u8]) {
        assert!(self.has_uplink);
        assert_eq!(out[6..14], [&mac(1).0[..], &[8, 0]].concat()[..]);
        check_hop(packet, &out[14..]);
        let hosts = self.hosts_of(ipv4(&packet[16..]));
        let places: Vec<_> = self
            .node
            .next_hops()
            .filter(|(address, ..)| hosts.iter().any(|host| IpAddr::V4(*host) == *address))
            .filter_map(|(_, place, _)| place)
            .collect();
        let is_known = places.iter().any(|place| place.mac.0 == out[..6]);
        assert!(is_known, "to a stranger");
    }

    fn poll(&mut self) {
        let mut storage = vec![0; HEADROOM + 2048];
        loop {
            let mut packet = PacketBuf::new(&mut storage, HEADROOM, 0).expect("it fits");
            let Some(verdict) = self.node.poll_output(&mut packet) else {
                return;
            };
            let out = packet.as_slice();
            match verdict {
                Verdict::Uplink { id: None } => self.check_arp(out),
                Verdict::Uplink { id: Some(_) } => {
                    assert_eq!(out[6..14], [&mac(1).0[..], &[8, 0]].concat()[..]);
                    assert!(out[0] & 1 == 0, "a packet for a group");
                }
                Verdict::Port(PORT) => {
                    let out = out.to_vec();
                    self.take_early(&out);
                }
                Verdict::Drop(_) => {}
                verdict => panic!("{verdict:?} of the node's own"),
            }
        }
    }

    /// What we say in ARP is of ourselves: questions about next hops, and answers about an address
    /// of our own.
    fn check_arp(&self, out: &[u8]) {
        assert_eq!(out.len(), 42);
        assert_eq!(out[6..14], [&mac(1).0[..], &[8, 6]].concat()[..]);
        assert_eq!(out[22..28], mac(1).0);
        assert_eq!(ipv4(&out[28..]), host(1), "we pose as another");
        let target = ipv4(&out[38..]);
        match out[21] {
            1 if target == host(1) => assert!(self.answers, "it is not ours to announce"),
            1 => assert!(uplink(self.answers).is_on_link(target.into())),
            2 => assert!(self.answers && self.asked, "it is not ours to answer for"),
            operation => panic!("ARP operation {operation}"),
        }
    }

    fn check_beliefs(&mut self) {
        let mut beliefs = BTreeMap::new();
        let mut count = 0;
        for (address, place, _) in self.node.next_hops() {
            count += 1;
            let IpAddr::V4(address) = address else {
                panic!("{address} on the link");
            };
            assert!(uplink(self.answers).is_on_link(address.into()));
            if let Some(place) = place {
                assert!(place.mac.is_unicast() && place.mac != mac(1));
                beliefs.insert(address, place.mac);
            }
        }
        assert!(count <= 4, "{count} hosts are remembered");
        for (address, mac) in &beliefs {
            assert!(self.hosts.contains(address), "{address} is no next hop");
            match self.beliefs.get(address) {
                Some(before) if before != mac => {
                    let doubted = self.doubts.remove(address);
                    let silent = doubted.is_some_and(|since| self.now >= since + PATIENCE);
                    assert!(silent, "{address} was taken from {before}, which is alive");
                }
                _ => {}
            }
        }
        self.doubts
            .retain(|address, _| beliefs.contains_key(address));
        self.beliefs = beliefs;
    }

    fn finish(mut self) {
        self.poll();
        let counters = self.node.counters();
        assert_eq!(counters.came(), counters.went(), "{counters:?}");
    }
}

/// All of a packet is as it was but for a hop, and its header's checksum is right.
fn check_hop(before: &[u8], after: &[u8]) {
    assert_eq!(after.len(), before.len());
    assert_eq!(after[8] + 1, before[8], "not a hop less");
    assert_eq!(checksum::compute(&after[..20]), 0, "a wrong checksum");
    let rest = |packet: &[u8]| [&packet[..8], &packet[9..10], &packet[12..]].concat();
    assert_eq!(rest(before), rest(after), "the packet changes");
}

fn ipv4(bytes: &[u8]) -> Ipv4Addr {
    Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])
}

fn udp(from: Ipv4Addr, to: Ipv4Addr, ttl: u8, len: u8) -> Vec<u8> {
    let len = usize::from(len) * 4;
    let total = (28 + len) as u16;
    let mut bytes = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, ttl, 17, 0, 0];
    bytes[2..4].copy_from_slice(&total.to_be_bytes());
    bytes.extend(from.octets());
    bytes.extend(to.octets());
    let sum = checksum::compute(&bytes);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend([0x80, 0, 0, 53]);
    bytes.extend((total - 20).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.resize(usize::from(total), 7);
    bytes
}

fn seeds() -> Vec<Seed> {
    // Bits of the first byte: peers are not checked, the address is the node's own.
    let (checked, unchecked, own) = (0, 1, 2);
    let answer = [0, 2, 1, 2, 2, 1, 1, 0];
    let announce = [0, 2, 15, 1, 2, 15, 2, 0];
    let lie = [0, 9, 15, 1, 2, 15, 2, 0];
    let ask_us = [0, 5, 15, 1, 5, 13, 1, 0];
    let bare = [1, 2, 1, 0, 0, 64, 20];
    let forged = [1, 9, 1, 0, 0, 64, 20];
    let to_peer = [2, 0, 0, 64, 20];
    let wait = |time: u8| [6, time];
    let run = |first: u8, events: &[&[u8]]| [&[first][..], &events.concat()].concat();
    vec![
        ("waits", run(checked, &[&to_peer, &answer])),
        ("there-and-back", run(checked, &[&answer, &to_peer, &bare])),
        ("unknown-yet", run(checked, &[&bare, &answer, &bare])),
        (
            "early",
            run(
                checked,
                &[
                    &wait(1),
                    &bare,
                    &forged,
                    &bare,
                    &bare,
                    &bare,
                    &bare,
                    &answer,
                ],
            ),
        ),
        (
            "early-silent",
            run(checked, &[&bare, &wait(12), &wait(12), &wait(12), &answer]),
        ),
        (
            "early-without-uplink",
            run(checked, &[&bare, &[5, 0], &[5, 1], &answer]),
        ),
        (
            "early-without-peer",
            run(checked, &[&bare, &[4, 0], &answer]),
        ),
        ("forged", run(checked, &[&answer, &forged, &bare])),
        ("unchecked", run(unchecked, &[&forged])),
        (
            "announced",
            run(checked, &[&announce, &to_peer, &answer, &announce]),
        ),
        (
            "lie",
            run(checked, &[&answer, &wait(12), &lie, &answer, &to_peer]),
        ),
        (
            "moved",
            run(
                checked,
                &[
                    &answer,
                    &wait(12),
                    &lie,
                    &wait(5),
                    &wait(5),
                    &wait(5),
                    &wait(5),
                    &to_peer,
                    &forged,
                ],
            ),
        ),
        ("asked", run(own, &[&ask_us])),
        (
            "asked-for-another",
            run(own, &[&[0, 5, 15, 1, 5, 13, 3, 0]]),
        ),
        (
            "silent",
            run(checked, &[&to_peer, &wait(12), &wait(12), &wait(12)]),
        ),
        (
            "stale",
            run(checked, &[&answer, &wait(88), &to_peer, &answer]),
        ),
        (
            "comes-and-goes",
            run(
                checked,
                &[&to_peer, &[5, 0], &answer, &[5, 1], &answer, &[4, 0]],
            ),
        ),
        ("beyond-a-router", run(checked, &[&[3, 0, 0, 4], &to_peer])),
        (
            "many-hosts",
            run(
                checked,
                &[
                    &[3, 2, 2, 2],
                    &[3, 3, 3, 3],
                    &to_peer,
                    &[2, 0, 1, 64, 20],
                    &[2, 0, 2, 64, 20],
                    &[2, 0, 3, 64, 20],
                ],
            ),
        ),
    ]
}
