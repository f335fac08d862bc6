//! The events, and egress between the two sides of the world.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use arbitrary::{Result, Unstructured};
use etherparse::{IpHeaders, PacketBuilder, PacketBuilderStep};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};
use muslin_stack::datapath::egress::{
    Egress, EgressConfig, FlowId, FlowKey, HostError, Policy, Protocol, Ready, Rules,
};
use muslin_stack::{Duration, Instant};
use smoltcp::wire::{Ipv4Packet, Ipv6Packet};

use crate::world::{
    Act, FLOWS, HostSide, METADATA, MTU, PodSide, SUBNETS, TUNNEL, World, initial, pattern, seed,
};

/// TCP without options.
const TCP_HEADER_LEN: usize = 20;
const UDP_HEADER_LEN: usize = 8;
/// Events of timers until all flows have ended, however long they are idle: keep-alives every two
/// minutes for two hours, retransmissions, and reading on.
const MAX_TIMERS: usize = FLOWS * 1000;
/// By how much what is due may be late if the process has not stood still.
const LATE: Duration = Duration::from_secs(5);

const ERRORS: [HostError; 8] = [
    HostError::Refused,
    HostError::NetUnreachable,
    HostError::HostUnreachable,
    HostError::TimedOut,
    HostError::Reset,
    HostError::NotPermitted,
    HostError::TooLong,
    HostError::Failed,
];

/// A segment's payload, flags and what is wrong with it.
struct Segment {
    len: usize,
    syn: bool,
    fin: bool,
    rst: bool,
    window: u16,
    /// Whether it is one superpacket.
    is_super: bool,
}

pub(crate) struct Harness {
    egress: Egress,
    now: Instant,
    world: Rc<RefCell<World>>,
    host: HostSide,
    pods: PodSide,
    /// Whether pods acknowledge what comes at once.
    answers: bool,
    /// Whether the end is that all flows are idle for too long, not that pods vanish.
    ends_idle: bool,
    /// Whether first fragments may wait for others, which never come.
    has_fragments: bool,
    /// Whether pods speak IPv6.
    is_v6: bool,
}

fn pod(is_v6: bool, byte: u8) -> IpAddr {
    let number = 2 + byte % 2;
    match is_v6 {
        false => IpAddr::from([10, 244, 1, number]),
        true => IpAddr::from([0xfd00, 0x10, 0, 0, 0, 0, 0, number.into()]),
    }
}

/// Bytes of an IP header.
fn header_len(key: &FlowKey) -> usize {
    if key.pod.is_ipv6() { 40 } else { 20 }
}

/// Payload of a full segment.
fn mss(key: &FlowKey) -> usize {
    usize::from(MTU) - header_len(key) - TCP_HEADER_LEN
}

/// A packet from a pod.
fn of(key: &FlowKey) -> PacketBuilderStep<IpHeaders> {
    match (key.pod.ip(), key.remote.ip()) {
        (IpAddr::V4(pod), IpAddr::V4(remote)) => {
            PacketBuilder::ipv4(pod.octets(), remote.octets(), 64)
        }
        (IpAddr::V6(pod), IpAddr::V6(remote)) => {
            PacketBuilder::ipv6(pod.octets(), remote.octets(), 64)
        }
        _ => panic!("{key:?}"),
    }
}

/// Two pods, four ports of each, and four places outside, of which two are forbidden in part.
fn key(is_v6: bool, protocol: Protocol, byte: u8) -> FlowKey {
    let (ipv4, ipv6, port) = match (byte >> 3) % 4 {
        0 => ("192.0.2.1", "2001:db8::1", 80),
        1 => ("192.0.2.2", "2001:db8::2", 443),
        2 => ("169.254.169.254", METADATA, 80),
        _ => ("192.0.2.1", "2001:db8::1", TUNNEL),
    };
    let address: IpAddr = if is_v6 { ipv6 } else { ipv4 }.parse().expect("an address");
    let is_ping = protocol == Protocol::Ping;
    FlowKey {
        protocol,
        pod: SocketAddr::new(pod(is_v6, byte), 40_000 + u16::from(byte >> 1) % 4),
        remote: SocketAddr::new(address, if is_ping { 0 } else { port }),
    }
}

fn content(seed: u32, at: u32, len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| pattern(seed, at.wrapping_add(i)))
        .collect()
}

impl Harness {
    pub(crate) fn new(choices: u8) -> Self {
        let mut rules = Rules::default();
        rules.tunnel_ports = vec![TUNNEL];
        let mtu = Mtu::new(MTU.into()).expect("it is in range");
        let mut config = EgressConfig::new(Policy::new(rules), mtu, 7);
        config.subnets = Some(SUBNETS.parse().expect("two nets"));
        config.limits.flows = FLOWS;
        config.limits.memory = 1 << 18;
        let world = Rc::new(RefCell::new(World::default()));
        Self {
            egress: Egress::new(config, Instant::ZERO),
            now: Instant::ZERO,
            host: HostSide(world.clone()),
            pods: PodSide(world.clone()),
            world,
            answers: choices & 1 != 0,
            ends_idle: choices & 2 != 0,
            has_fragments: false,
            is_v6: choices & 4 != 0,
        }
    }

    pub(crate) fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        self.world.borrow_mut().burst = 0;
        let is_v6 = self.is_v6;
        let mut byte = || input.arbitrary::<u8>();
        match byte()? % 8 {
            0 => {
                let (key, kind, fault) = (key(is_v6, Protocol::Tcp, byte()?), byte()? % 8, byte()?);
                let len = if kind == 2 { byte()?.into() } else { 0 };
                self.segment(key, kind, len, fault);
            }
            1 => {
                let (key, len, fault) = (key(is_v6, Protocol::Udp, byte()?), byte()?, byte()?);
                self.datagram(key, len.into(), fault);
            }
            2 => {
                let (key, len, fault) = (key(is_v6, Protocol::Ping, byte()?), byte()?, byte()?);
                self.echo(key, len.into(), fault);
            }
            3 => {
                let (which, kind) = (byte()?, byte()? % 8);
                let more = if matches!(kind, 0 | 4) { 0 } else { byte()? };
                let sockets: Vec<_> = self.world.borrow().sockets.keys().copied().collect();
                if !sockets.is_empty() {
                    let id = sockets[usize::from(which) % sockets.len()];
                    self.act(id, kind, more);
                }
            }
            4 => {
                let micros = [
                    0,
                    1,
                    1000,
                    10_000,
                    250_000,
                    11_000_000,
                    130_000_000,
                    8_000_000_000,
                ];
                let chosen = byte()?;
                let to = self.now + Duration::from_micros(micros[usize::from(chosen % 8)]);
                if chosen & 8 == 0 {
                    self.live(to);
                } else {
                    self.pass(to);
                }
            }
            5 => {
                let address = pod(is_v6, byte()?);
                self.forget(address);
                let world = self.world.borrow();
                let its = |key: &FlowKey| key.pod.ip() == address;
                assert!(!world.sockets.values().any(|socket| its(&socket.key)));
            }
            6 => {
                let error = ERRORS[usize::from(byte()? % 8)];
                self.world.borrow_mut().fails = Some(error);
            }
            _ => {
                let (which, ready) = (byte()?, byte()?);
                let world = self.world.borrow();
                let late = world
                    .closed
                    .get(usize::from(which) % world.closed.len().max(1));
                let late = late.copied();
                drop(world);
                if let Some(id) = late {
                    self.wake(id, ready);
                }
            }
        }
        self.answer();
        Ok(())
    }

    /// Pods answer what comes, and what comes of that.
    fn answer(&mut self) {
        for _ in 0..64 {
            let world = self.world.borrow();
            let waiting = world.ends.iter().find(|(_, ends)| ends.unanswered);
            let waiting = waiting.map(|(key, _)| *key);
            drop(world);
            let (true, Some(key)) = (self.answers, waiting) else {
                break;
            };
            self.segment(key, 1, 0, 0);
        }
    }

    /// Time passes, and what is due is done in it. A connection whose pod answers does not end.
    fn live(&mut self, to: Instant) {
        let living: Vec<_> = self.world.borrow().living().collect();
        for _ in 0..MAX_TIMERS {
            let Some(due) = self.egress.poll_at().filter(|due| *due <= to) else {
                break;
            };
            self.pass(due.max(self.now));
            self.answer();
        }
        self.pass(to);
        let world = self.world.borrow();
        let is_there = |id: &FlowId| world.sockets.contains_key(id);
        assert!(
            !self.answers || living.iter().all(is_there),
            "a connection ends though both its ends live"
        );
    }

    /// What must be true at any time.
    pub(crate) fn check(&self) {
        let world = self.world.borrow();
        world.check_delivered();
        self.egress.audit().expect("the books of memory agree");
        let counters = self.egress.counters();
        assert_eq!(counters.open, world.sockets.len() as u64);
        assert_eq!(counters.opened, world.made);
        assert_eq!(counters.opened, counters.open + world.closed.len() as u64);
        if world.sockets.is_empty() && !self.has_fragments {
            assert_eq!(self.egress.poll_at(), None, "nothing is left to do");
        }
    }

    /// Ends all flows.
    pub(crate) fn finish(mut self) {
        if self.ends_idle {
            for _ in 0..MAX_TIMERS {
                let Some(due) = self.egress.poll_at() else {
                    break;
                };
                self.pass(due.max(self.now));
            }
        } else {
            for byte in 0..2 {
                self.forget(pod(self.is_v6, byte));
            }
        }
        assert_eq!(self.egress.counters().open, 0, "flows that do not end");
        self.has_fragments = false;
        self.check();
    }

    fn act(&mut self, id: FlowId, kind: u8, more: u8) {
        let act = match kind {
            0 => Act::Connect(Ok(())),
            1 => Act::Connect(Err(ERRORS[usize::from(more % 8)])),
            2 => Act::Give(u32::from(more) * u32::from(more)),
            3 => Act::Take(usize::from(more) * 100),
            4 => Act::End,
            5 => Act::Fail(ERRORS[usize::from(more % 8)]),
            6 => Act::Datagram {
                len: usize::from(more) * 6,
                from: more / 3,
            },
            _ => Act::Datagram {
                len: more.into(),
                from: more / 3,
            },
        };
        self.world.borrow_mut().act(id, act);
        self.wake(id, 3);
    }

    fn wake(&mut self, id: FlowId, ready: u8) {
        let ready = Ready {
            readable: ready & 1 != 0,
            writable: ready & 2 != 0,
        };
        let Self { egress, host, .. } = self;
        egress.ready(self.now, id, ready, host);
        self.poll();
    }

    /// Pods take what egress has for them.
    fn poll(&mut self) {
        while let Some(output) = self.egress.poll_output() {
            self.pods.take(output);
        }
    }

    fn forget(&mut self, pod: IpAddr) {
        self.world.borrow_mut().forgets = true;
        let Self { egress, host, .. } = self;
        egress.forget_pod(pod, host);
        self.poll();
        self.world.borrow_mut().forgets = false;
    }

    fn pass(&mut self, to: Instant) {
        self.now = to;
        let due = self.egress.poll_at();
        let mut world = self.world.borrow_mut();
        (world.time, world.burst) = (to - Instant::ZERO, 0);
        world.wakes = due.is_some_and(|due| to > due + LATE);
        drop(world);
        let Self { egress, host, .. } = self;
        egress.handle_timeout(self.now, host);
        self.poll();
        self.world.borrow_mut().wakes = false;
        let due = self.egress.poll_at();
        assert!(due.is_none_or(|due| due > to), "timers spin");
    }

    /// Sends a segment of the pod's stream; `fault` says what is wrong with it, mostly nothing.
    fn segment(&mut self, key: FlowKey, kind: u8, len: usize, fault: u8) {
        let mut segment = Segment {
            len,
            syn: kind == 0,
            fin: kind == 4,
            rst: kind == 5,
            window: if kind == 7 { 0 } else { 60_000 },
            is_super: kind == 6,
        };
        match kind {
            3 => segment.len = mss(&key),
            6 => segment.len = 20_000,
            _ => {}
        }
        let mut world = self.world.borrow_mut();
        let ends = world.ends.entry(key).or_default();
        if segment.syn {
            ends.next = initial(&key);
            ends.expected = None;
            ends.strange = self.egress.find(&key).is_some();
        }
        ends.strange |= fault >= 240;
        let (mut seq, mut ack) = (ends.next, ends.expected.unwrap_or(0));
        match fault {
            // A connection begins where it always does, so that what belongs where is known.
            _ if segment.syn => {}
            240 => seq = seq.wrapping_add(1 + len as u32),
            241 => seq = seq.wrapping_sub(1),
            242 => seq = seq.wrapping_sub(50),
            243 => seq = seq.wrapping_add(0x7fff_0000),
            244 => ack = ack.wrapping_add(1),
            245 => ack = ack.wrapping_sub(100_000),
            _ => {}
        }
        let at = seq.wrapping_sub(initial(&key)).wrapping_sub(1);
        let behind = if segment.syn { at.wrapping_add(1) } else { at };
        let data = content(seed(&key, false), behind, segment.len);
        ends.sends(behind, segment.len, segment.fin);
        ends.reset |= segment.rst;
        if fault < 240 {
            let taken = segment.len as u32 + u32::from(segment.syn || segment.fin);
            ends.next = seq.wrapping_add(taken);
        }
        ends.unanswered = false;
        let has_ack = !segment.syn && ends.expected.is_some();
        drop(world);
        let packet = tcp(key, (seq, has_ack.then_some(ack)), &segment, &data);
        let kind = match key.pod.is_ipv6() {
            false => GsoKind::TcpV4,
            true => GsoKind::TcpV6,
        };
        let gso = segment.is_super.then_some((kind, mss(&key)));
        self.send(key, packet, fault, gso);
    }

    /// Sends a datagram, or a superpacket of several.
    fn datagram(&mut self, key: FlowKey, len: usize, fault: u8) {
        // Its content depends on its length.
        let is_super = fault == 200 && len > 0;
        let data = content(
            seed(&key, false) + len as u32,
            0,
            if is_super { len * 5 } else { len },
        );
        let size = len.max(1);
        let builder = of(&key).udp(key.pod.port(), key.remote.port());
        let mut packet = Vec::new();
        builder.write(&mut packet, &data).expect("a vector grows");
        let mut world = self.world.borrow_mut();
        world.ends.entry(key).or_default();
        let parts = data.chunks(size).map(<[u8]>::to_vec);
        world.offered = if data.is_empty() {
            [vec![]].into()
        } else {
            parts.collect()
        };
        drop(world);
        self.send(key, packet, fault, is_super.then_some((GsoKind::Udp, size)));
    }

    fn echo(&mut self, key: FlowKey, len: usize, fault: u8) {
        let data = content(seed(&key, false), 0, len);
        let (builder, number) = (of(&key), (key.pod.port(), len as u16));
        let mut packet = Vec::new();
        let written = if key.pod.is_ipv6() {
            let request = builder.icmpv6_echo_request(number.0, number.1);
            request.write(&mut packet, &data)
        } else {
            let request = builder.icmpv4_echo_request(number.0, number.1);
            request.write(&mut packet, &data)
        };
        written.expect("a vector grows");
        let mut world = self.world.borrow_mut();
        world.ends.entry(key).or_default();
        world.offered = [packet[header_len(&key)..].to_vec()].into();
        drop(world);
        self.send(key, packet, fault, None);
    }

    /// Gives egress a packet, with what is wrong below its transport's header.
    fn send(
        &mut self,
        key: FlowKey,
        mut packet: Vec<u8>,
        fault: u8,
        gso: Option<(GsoKind, usize)>,
    ) {
        // Nobody sums up what is unfinished, and smoltcp sums up nothing where it is fuzzed.
        let is_unsummed = gso.is_some() || cfg!(fuzzing) && key.protocol == Protocol::Ping;
        let fault = if fault == 246 && is_unsummed {
            0
        } else {
            fault
        };
        let is_broken = matches!(fault, 246 | 247 | 249);
        let is_fragment = fault == 248;
        match fault {
            // A sum, a length of the transport's, a fragment, another protocol.
            246 => *packet.last_mut().expect("it has bytes") ^= 0x55,
            247 => packet.truncate(header_len(&key) + UDP_HEADER_LEN - 1),
            // The first of several.
            248 if key.pod.is_ipv6() => {
                packet.truncate(40 + (packet.len() - 40) / 8 * 8);
                packet.splice(40..40, [packet[6], 0, 0, 1, 0, 0, 0, 7]);
                packet[6] = 44;
            }
            248 => packet[6] |= 0x20,
            249 if key.pod.is_ipv6() => packet[6] = 132,
            249 => packet[9] = 132,
            _ => {}
        }
        // The router passes on no broken header.
        let len = packet.len();
        if key.pod.is_ipv6() {
            Ipv6Packet::new_unchecked(&mut packet).set_payload_len((len - 40) as u16);
        } else {
            let mut header = Ipv4Packet::new_unchecked(&mut packet);
            header.set_total_len(len as u16);
            header.fill_checksum();
        }
        let mut storage = [vec![0; HEADROOM], packet].concat();
        let packet = PacketBuf::new(&mut storage, HEADROOM, len).expect("there is room");
        let offload = gso.map_or_else(Header::default, |(kind, size)| Header {
            checksum: Checksum::Partial {
                start: header_len(&key) as u16,
                offset: if kind == GsoKind::Udp { 6 } else { 16 },
            },
            gso: Some(Gso {
                kind,
                size: size as u16,
                ecn: false,
            }),
            hdr_len: (header_len(&key)
                + if kind == GsoKind::Udp {
                    UDP_HEADER_LEN
                } else {
                    TCP_HEADER_LEN
                }) as u16,
        });
        let packet = packet.with_offload(offload);
        let mut world = self.world.borrow_mut();
        (world.current, world.burst) = (Some(key), 0);
        drop(world);
        let Self { egress, host, .. } = self;
        let taken = egress.from_pod(self.now, &packet, host);
        self.poll();
        let mut world = self.world.borrow_mut();
        world.current = None;
        if is_broken {
            assert!(taken.is_err(), "a broken packet is taken");
        }
        if is_fragment {
            self.has_fragments |= taken.is_ok();
        } else if taken.is_ok() && key.protocol != Protocol::Tcp {
            assert!(world.offered.is_empty(), "a datagram does not go on");
        }
        world.offered.clear();
    }
}

fn tcp(key: FlowKey, (seq, ack): (u32, Option<u32>), segment: &Segment, data: &[u8]) -> Vec<u8> {
    let mut builder = of(&key).tcp(key.pod.port(), key.remote.port(), seq, segment.window);
    if segment.syn {
        builder = builder.syn();
    }
    if segment.fin {
        builder = builder.fin();
    }
    if segment.rst {
        builder = builder.rst();
    }
    if let Some(ack) = ack {
        builder = builder.ack(ack);
    }
    let mut packet = Vec::new();
    builder.write(&mut packet, data).expect("a vector grows");
    packet
}
