//! A fuzz harness of one's own: bytes become frames of a pod, datagrams of a peer and a stranger, and
//! time, all of which a [`Datapath`] takes; after every packet its books must balance.
//!
//! ```text
//! cargo run -p muslin-stack --example fuzz_harness
//! ```
//!
//! For cargo-fuzz (`cargo fuzz init`, `cargo add muslin-encap muslin-stack --manifest-path
//! fuzz/Cargo.toml`) put `Harness` and `check` into a target, with this in place of `main`:
//!
//! ```ignore
//! #![no_main]
//! libfuzzer_sys::fuzz_target!(|data: &[u8]| {
//!     if let Err(wrong) = check(data, Caller::Right) {
//!         panic!("{wrong}");
//!     }
//! });
//! ```
//!
//! and what `seed` gives into `fuzz/corpus/`. Arithmetic that overflows and indices out of range are
//! found, too: a panic is a finding.

use std::collections::BTreeMap;
use std::error::Error;
use std::net::SocketAddr;

use etherparse::PacketBuilder;
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::ip::checksum;
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::vxlan::{Vni, VtepMac};
use muslin_stack::addresses::Nets;
use muslin_stack::datapath::egress::{self, Egress, NoHost, Policy};
use muslin_stack::datapath::node::{Node, NodeConfig, Verdict};
use muslin_stack::datapath::peer::{Peer, PeerId};
use muslin_stack::datapath::port::{Attachment, PortId};
use muslin_stack::datapath::tunnel::Tunnel;
use muslin_stack::datapath::{Datapath, Output};
use muslin_stack::{Duration, EthernetAddress, Instant};

const POD: PortId = PortId(1);
const POD_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
const PEER: &str = "192.168.0.12:8472";
const STRANGER: &str = "192.168.0.66:8472";
/// MTU of pods, and with an Ethernet header the longest frame of theirs.
const MTU: u16 = 1450;
/// Mutations that `main` tries.
const INPUTS: u32 = 20_000;

/// Who calls the data path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Caller {
    Right,
    /// It counts what a verdict says is dropped, which the node has done already.
    CountsTwice,
}

struct Harness {
    path: Datapath,
    caller: Caller,
    now: Instant,
    storage: Vec<u8>,
    /// How often which verdict was seen.
    verdicts: BTreeMap<&'static str, u32>,
}

impl Harness {
    fn new(caller: Caller) -> Result<Self, Box<dyn Error>> {
        let now = Instant::ZERO;
        let mtu = Mtu::new(MTU.into())?;
        let vtep_mac = |node| VtepMac::from_random([2, 0, 0, 1, node, 0]);
        let subnet = "10.244.1.0/24".parse::<Nets>()?;
        let (vni, mac) = (Vni::new(1)?, vtep_mac(1));
        let mac_v6 = None;
        let tunnel = Tunnel::Vxlan { vni, mac, mac_v6 };
        let mut config = NodeConfig::new(subnet, EthernetAddress(GATEWAY_MAC), tunnel, mtu, 7);
        // Bounds that inputs reach.
        (config.limits.fdb, config.limits.neighbours) = (8, 8);
        let mut node = Node::new(config, now)?;
        let addresses = vec![[10, 244, 1, 2].into()];
        node.attach(POD, Attachment::new(EthernetAddress(POD_MAC), addresses));
        let peer = Peer::new(PeerId(0), "10.244.2.0/24".parse()?, PEER.parse()?);
        node.set_peer(peer.with_vtep(vtep_mac(2)));
        let config = egress::EgressConfig::new(Policy::closed(), mtu, 7);
        Ok(Self {
            path: Datapath::new(node, Egress::new(config, now)),
            caller,
            now,
            storage: vec![0; HEADROOM + usize::from(u16::MAX)],
            verdicts: BTreeMap::new(),
        })
    }

    /// Takes the next of an input's records: what it is, the length of its bytes, and those. `None`
    /// if that was the last.
    fn take<'a>(&mut self, input: &'a [u8]) -> Result<Option<&'a [u8]>, String> {
        let Some(([kind, len @ ..], rest)) = input.split_first_chunk::<3>() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_be_bytes(*len)).min(rest.len());
        let (bytes, rest) = rest.split_at(len);
        match kind % 8 {
            0 => self.packet(bytes, None)?,
            1 => self.packet(&mended(bytes, 14), None)?,
            2 => self.packet(bytes, PEER.parse().ok())?,
            3 => self.packet(&mended(bytes, 8 + 14), PEER.parse().ok())?,
            4 => self.packet(bytes, STRANGER.parse().ok())?,
            5 => self.wait(1)?,
            _ => self.wait(u64::from(*kind) * 100)?,
        }
        Ok(Some(rest))
    }

    /// Gives a packet to the data path: a frame of the pod's, or a datagram from `source`.
    fn packet(&mut self, bytes: &[u8], source: Option<SocketAddr>) -> Result<(), String> {
        // What was in front of the last packet must not matter to this one.
        self.storage.fill(0xa5);
        self.storage[HEADROOM..HEADROOM + bytes.len()].copy_from_slice(bytes);
        let packet = PacketBuf::new(&mut self.storage, HEADROOM, bytes.len());
        let mut packet = packet.map_err(|error| error.to_string())?;
        let path = &mut self.path;
        let verdict = match source {
            None => path.from_port(self.now, POD, &mut packet, &mut NoHost),
            Some(source) => path.from_underlay(self.now, source, &mut packet, &mut NoHost),
        };
        let is_stranger = source.is_some_and(|source| source.to_string() == STRANGER);
        if is_stranger && !matches!(verdict, Verdict::Drop(_)) {
            return Err(format!("a stranger's datagram is taken: {verdict:?}"));
        }
        look_at(verdict, &packet, &mut self.verdicts)?;
        if let (Verdict::Drop(reason), Caller::CountsTwice) = (verdict, self.caller) {
            path.node_mut().count_drops(reason, 1);
        }
        self.settle()
    }

    /// Lets time pass, and the data path do what is due.
    fn wait(&mut self, millis: u64) -> Result<(), String> {
        self.now += Duration::from_millis(millis);
        if self.now >= self.path.poll_at() {
            self.path.handle_timeout(self.now, &mut NoHost);
        }
        if self.path.poll_at() <= self.now {
            return Err("a timer spins".to_owned());
        }
        self.settle()
    }

    /// Takes all output, as after every call, and audits the books.
    fn settle(&mut self) -> Result<(), String> {
        while let Some(output) = self.path.poll_output(self.now) {
            match output {
                Output::Packet(verdict, packet) => look_at(verdict, &packet, &mut self.verdicts)?,
                Output::Message(to, _) => return Err(format!("a lone worker tells {to:?}")),
            }
        }
        // The law of `muslin_stack::drops`: received + originated = delivered + sent + flooded +
        // consumed + dropped.
        let counters = self.path.node().counters();
        let (came, went) = (counters.came(), counters.went());
        match came == went {
            true => Ok(()),
            false => Err(format!("{came} packets came, and {went} went")),
        }
    }
}

/// What must be true of every packet that comes out.
fn look_at(
    verdict: Verdict,
    packet: &PacketBuf<'_>,
    verdicts: &mut BTreeMap<&str, u32>,
) -> Result<(), String> {
    let name = match verdict {
        Verdict::Port(POD) => "port",
        Verdict::Flood { except: Some(POD) } => "flood",
        Verdict::Peer { id: PeerId(0), .. } => "peer",
        Verdict::Consumed => "consumed",
        Verdict::Drop(_) => "drop",
        other => return Err(format!("there is no such place: {other:?}")),
    };
    *verdicts.entry(name).or_default() += 1;
    let most = match verdict {
        Verdict::Port(_) => usize::from(MTU) + 14,
        Verdict::Peer { .. } => usize::from(MTU) + 14 + 8,
        _ => return Ok(()),
    };
    let is_whole = packet.offload().gso.is_none() && packet.total_len() == packet.len();
    match packet.len() <= most && is_whole {
        true => Ok(()),
        false => Err(format!("{verdict:?} with {} bytes", packet.total_len())),
    }
}

/// The same with a right checksum of the IPv4 header that begins at `at`, behind which few mutations
/// would get otherwise.
fn mended(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let Some(header) = bytes.get_mut(at..at + 20) {
        header[10..12].fill(0);
        checksum::complete(header, 0, 10);
    }
    bytes
}

/// The target: runs an input, and says how often which verdict was seen, or what was wrong.
fn check(data: &[u8], caller: Caller) -> Result<BTreeMap<&'static str, u32>, String> {
    let mut harness = Harness::new(caller).map_err(|error| error.to_string())?;
    let mut rest = data;
    while let Some(next) = harness.take(rest)? {
        rest = next;
    }
    Ok(harness.verdicts)
}

/// An input to begin with: the pod pings its gateway and a pod of the peer, which answers, and time
/// passes. Of all packets the kind is such that checksums are mended.
fn seed() -> Result<Vec<u8>, Box<dyn Error>> {
    let (pod, far, gateway) = ([10, 244, 1, 2], [10, 244, 2, 5], [10, 244, 1, 1]);
    let to_gateway = || PacketBuilder::ethernet2(POD_MAC, GATEWAY_MAC);
    let from_peer = PacketBuilder::ethernet2([2, 0, 0, 1, 2, 0], [2, 0, 0, 1, 1, 0]);
    let first = to_gateway().ipv4(pod, gateway, 64);
    let second = to_gateway().ipv4(pod, far, 64);
    let answer = from_peer.ipv4(far, pod, 63);
    // VXLAN's header is a flag, and the VNI 1.
    let vxlan: &[u8] = &[8, 0, 0, 0, 0, 0, 1, 0];
    let mut input = Vec::new();
    for (kind, header, builder) in [
        (1, &[][..], first.icmpv4_echo_request(1, 1)),
        (1, &[][..], second.icmpv4_echo_request(1, 2)),
        (3, vxlan, answer.icmpv4_echo_reply(1, 2)),
    ] {
        let mut bytes = header.to_vec();
        builder.write(&mut bytes, b"hello")?;
        input.push(kind);
        input.extend((bytes.len() as u16).to_be_bytes());
        input.extend(bytes);
    }
    input.extend([6, 0, 0]);
    Ok(input)
}

/// Stands in for libFuzzer: other bytes of the seed each time, the same for the same number.
fn mutation(seed: &[u8], number: u32) -> Vec<u8> {
    let mut state = u64::from(number) + 1;
    let mut random = |below: usize| {
        // xorshift64 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut input = seed.to_vec();
    for _ in 0..=random(4) {
        let at = random(input.len());
        match random(3) {
            0 => input[at] ^= 1 << random(8),
            1 => input[at] = random(256) as u8,
            _ => input.extend_from_within(at..),
        }
    }
    input
}

fn main() -> Result<(), Box<dyn Error>> {
    let seed = seed()?;
    let mut seen = BTreeMap::new();
    for number in 0..INPUTS {
        let verdicts = check(&mutation(&seed, number), Caller::Right);
        let verdicts = verdicts.map_err(|wrong| format!("mutation {number}: {wrong}"))?;
        for (verdict, times) in verdicts {
            *seen.entry(verdict).or_insert(0) += times;
        }
    }
    println!("{INPUTS} mutations are well: {seen:?}");
    // Does it detect bugs? All targets must be reached, and each mutation must be noticed.
    for verdict in ["port", "peer", "consumed", "drop"] {
        assert!(seen.get(verdict) > Some(&1000), "{verdict}");
    }
    let mut numbers = 0..INPUTS;
    let broken = |number: &u32| check(&mutation(&seed, *number), Caller::CountsTwice).is_err();
    let number = numbers.find(broken).ok_or("nothing is noticed")?;
    println!("a caller that counts drops twice is noticed at mutation {number}");
    Ok(())
}
