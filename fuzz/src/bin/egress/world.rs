//! The scripted host, the pods, and what each has sent the other.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;

use etherparse::{IpNumber, Ipv4HeaderSlice, Ipv6HeaderSlice, TcpHeaderSlice, UdpHeaderSlice};
use ipnet::{IpNet, Ipv4Net};
use muslin_encap::buffer::{HEADROOM, PacketBuf};
use muslin_encap::offload::split::{Checksums, MAX_HEADER_LEN, Split, TrainLimits};
use muslin_stack::Duration;
use muslin_stack::datapath::egress::{
    self, Complaint, FlowId, FlowKey, Host, HostError, IpVersion, LINK_LOCAL, Marks, Output,
    Protocol,
};
use muslin_stack::datapath::icmp::may_answer;

/// MTU of pods.
pub(crate) const MTU: u16 = 1450;
/// Where a cloud tells secrets.
pub(crate) const METADATA: &str = "fd00:ec2::254";
/// A node's tunnel, which nobody may reach.
pub(crate) const TUNNEL: u16 = 8472;
/// Pods and their gateway, of each IP version.
pub(crate) const SUBNETS: &str = "10.244.1.0/24,fd00:10::/64";
/// Flows that may be at once.
pub(crate) const FLOWS: usize = 4;
/// Many more packets than what may be under way needs.
const BURST: usize = 1000;

/// The byte at a place of a stream or datagram; which one the key and the direction say.
pub(crate) fn pattern(seed: u32, at: u32) -> u8 {
    (at.wrapping_mul(0x9e37_79b1) >> 11) as u8 ^ seed.wrapping_mul(101) as u8
}

/// The last byte of an end's address.
fn last(end: SocketAddr) -> u8 {
    match end.ip() {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => address.octets()[15],
    }
}

/// Of a direction between two ends.
pub(crate) fn seed(key: &FlowKey, from_host: bool) -> u32 {
    let (pod, remote) = (last(key.pod), last(key.remote));
    u32::from(pod) + 3 * u32::from(remote) + u32::from(key.pod.port()) + u32::from(from_host) * 77
}

/// What both ends of a key know, which outlives its flows.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    /// What the pod sends next, and expects next.
    pub(crate) next: u32,
    pub(crate) expected: Option<u32>,
    /// The sequence number of the host's first byte, and how many numbers have come so far.
    first: Option<u32>,
    sent: u32,
    /// After how many bytes the pod has ended its stream, and how many it has sent at most.
    pub(crate) fin: Option<i32>,
    pub(crate) most: i32,
    /// Whether the pod has sent something behind its end, or has ended twice: it may have what it
    /// wants then.
    pub(crate) lies: bool,
    /// How much of the pod's stream was acknowledged, its end included.
    acknowledged: i32,
    /// Whether the pod has sent what no system sends, or has asked again.
    pub(crate) strange: bool,
    /// Whether the pod has reset the connection.
    pub(crate) reset: bool,
    /// Whether something has come that the pod has not acknowledged.
    pub(crate) unanswered: bool,
    /// Bytes that the host has given, and whether those are all.
    given: u32,
    ended: bool,
}

impl Socket {
    /// Whether it is that of a packet of a pod.
    fn is_for(&self, packet: &FlowKey) -> bool {
        self.key == *packet || self.key == packet.mapping()
    }
}

impl Ends {
    /// Whether the pod has had its answer, and has neither ended its stream nor said what is wrong.
    /// Nothing is under way: pods repeat nothing.
    fn are_living(&self) -> bool {
        let is_known = self.first.is_some() && self.acknowledged == self.most;
        let goes_on = is_known && self.fin.is_none();
        goes_on && !self.reset && !self.lies && !self.strange
    }

    /// Whether both streams have ended, and the pod knows that all of its own has come.
    fn are_done(&self) -> bool {
        let has_come = |fin: i32| fin.checked_add(1) == Some(self.acknowledged);
        self.ended && self.fin.is_some_and(has_come) && !self.lies && !self.reset
    }

    /// Notes that the pod sends this part of its stream, maybe with the end behind it.
    pub(crate) fn sends(&mut self, at: u32, len: usize, fin: bool) {
        let end = (at as i32).wrapping_add(len as i32);
        if len > 0 {
            self.most = self.most.max(end);
        }
        if fin {
            self.lies |= self.fin.is_some_and(|before| before != end);
            self.fin = Some(end);
        }
        self.lies |= self.fin.is_some_and(|fin| fin < self.most);
    }
}

/// How many sequence numbers come before the pod's first byte.
pub(crate) fn initial(key: &FlowKey) -> u32 {
    // Some wrap soon.
    u32::from(key.pod.port().is_multiple_of(2)) * 0xffff_ff00
}

#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) key: FlowKey,
    connected: bool,
    outcome: Option<Result<(), HostError>>,
    inbox: u32,
    ended: bool,
    /// What has come, and from where.
    datagrams: VecDeque<(SocketAddr, Vec<u8>)>,
    /// Where the pod has sent to last.
    latest: Option<SocketAddr>,
    written: u32,
    room: usize,
    shut: bool,
    error: Option<HostError>,
    /// When it last had or took something.
    used: Duration,
}

/// What a script has a socket do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Act {
    Connect(Result<(), HostError>),
    Give(u32),
    Take(usize),
    End,
    Fail(HostError),
    Datagram { len: usize, from: u8 },
}

/// Where datagrams come from: who was asked last, another port of that, others, and such as a pod
/// must not hear.
fn sender(latest: SocketAddr, which: u8) -> SocketAddr {
    let at = |ipv4: &str, ipv6: &str, port| {
        let address = if latest.is_ipv6() { ipv6 } else { ipv4 };
        SocketAddr::new(address.parse().expect("an address"), port)
    };
    match which % 8 {
        1 => SocketAddr::new(latest.ip(), latest.port() ^ 0x4000),
        2 => at("192.0.2.2", "2001:db8::2", 443),
        3 => at("203.0.113.9", "2001:db8:113::9", 9),
        4 => at("169.254.169.254", METADATA, 80),
        5 => SocketAddr::new(latest.ip(), TUNNEL),
        6 => at("10.244.1.1", "fd00:10::1", 53),
        7 => at("127.0.0.1", "::1", 53),
        _ => latest,
    }
}

/// Whether pods may send there, and hear what comes from there.
fn is_open(protocol: Protocol, address: SocketAddr) -> bool {
    let closed: [IpNet; 6] = [
        LINK_LOCAL.into(),
        "10.244.1.0/24".parse().expect("a net"),
        Ipv4Net::new_assert(Ipv4Addr::LOCALHOST, 8).into(),
        "fd00:10::/64".parse().expect("a net"),
        IpAddr::from(Ipv6Addr::LOCALHOST).into(),
        METADATA.parse::<IpAddr>().expect("an address").into(),
    ];
    let is_tunnel = protocol == Protocol::Udp && address.port() == TUNNEL;
    let is_closed = |net: &IpNet| net.contains(&address.ip());
    !is_tunnel && !closed.iter().any(is_closed)
}

#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) ends: BTreeMap<FlowKey, Ends>,
    pub(crate) sockets: BTreeMap<FlowId, Socket>,
    /// Flows that were, with what their sockets are told too late.
    pub(crate) closed: Vec<FlowId>,
    /// Packets that have come to pods since egress was last called.
    pub(crate) burst: usize,
    /// Sockets that were made.
    pub(crate) made: u64,
    /// The time since the start.
    pub(crate) time: Duration,
    /// Whether the process has stood still until now.
    pub(crate) wakes: bool,
    /// Whether a pod vanishes just now.
    pub(crate) forgets: bool,
    /// Why the next socket cannot be made.
    pub(crate) fails: Option<HostError>,
    /// The key of the packet that the pod sends now, and the datagrams it has in it.
    pub(crate) current: Option<FlowKey>,
    pub(crate) offered: VecDeque<Vec<u8>>,
    /// What was read and has not come to its pod.
    read: VecDeque<(FlowKey, Vec<u8>)>,
}

impl World {
    pub(crate) fn act(&mut self, id: FlowId, act: Act) {
        let Some(socket) = self.sockets.get_mut(&id) else {
            return;
        };
        let is_stream = socket.key.protocol == Protocol::Tcp;
        match act {
            Act::Connect(outcome) if socket.outcome.is_none() => socket.outcome = Some(outcome),
            Act::Give(bytes) if is_stream && !socket.ended => socket.inbox += bytes,
            Act::Take(room) => socket.room = room,
            Act::End => socket.ended = true,
            Act::Fail(error) => socket.error = Some(error),
            Act::Datagram { len, from } if !is_stream => {
                let latest = socket.latest.expect("a pod has sent something");
                let mut from = sender(latest, from);
                if socket.key.protocol == Protocol::Ping {
                    from.set_port(0);
                }
                let seed = seed(&socket.key, true) + socket.datagrams.len() as u32;
                let mut bytes: Vec<_> = (0..len as u32).map(|at| pattern(seed, at)).collect();
                if socket.key.protocol == Protocol::Ping {
                    // An echo reply, with a number of the host's, mostly.
                    bytes.splice(0..0, [if len == 13 { 3 } else { 0 }, 0, 0, 0, 7, 7, 0, 1]);
                }
                socket.datagrams.push_back((from, bytes));
            }
            Act::Connect(_) | Act::Give(_) | Act::Datagram { .. } => {}
        }
    }

    /// Whether a flow may end that the host has not taken all of yet.
    fn may_end(&self, socket: &Socket) -> bool {
        let makes_room = |key: &FlowKey| !self.sockets.values().any(|it| it.is_for(key));
        let is_evicted =
            self.sockets.len() + 1 == FLOWS && self.current.as_ref().is_some_and(makes_room);
        let is_idle = self.time >= socket.used + egress::Limits::default().tcp_idle;
        self.forgets || is_evicted || is_idle || socket.error.is_some()
    }

    fn socket(&mut self, id: FlowId) -> &mut Socket {
        let socket = self.sockets.get_mut(&id);
        socket.unwrap_or_else(|| panic!("{id:?} has no socket"))
    }

    /// Makes a socket for what a pod sends now.
    fn make(&mut self, id: FlowId, key: FlowKey, connected: bool) -> Result<(), HostError> {
        let current = self.current.expect("a pod sends something");
        if let Some(error) = self.fails.take() {
            return Err(error);
        }
        assert!(!self.closed.contains(&id), "{id:?} was another's");
        let is_double = |socket: &Socket| socket.is_for(&current);
        assert!(
            !self.sockets.values().any(is_double),
            "{current:?} has two sockets"
        );
        let ends = self.ends.entry(current).or_default();
        *ends = Ends {
            next: ends.next,
            strange: ends.strange,
            ..Ends::default()
        };
        let socket = Socket {
            key,
            connected,
            outcome: None,
            inbox: 0,
            ended: false,
            datagrams: VecDeque::new(),
            latest: None,
            written: 0,
            room: usize::MAX,
            shut: false,
            error: None,
            used: self.time,
        };
        assert!(self.sockets.insert(id, socket).is_none(), "{id:?} twice");
        assert!(self.sockets.len() <= FLOWS, "too many sockets");
        self.made += 1;
        Ok(())
    }

    /// Connections whose ends are both there and have not had enough of each other.
    pub(crate) fn living(&self) -> impl Iterator<Item = FlowId> {
        let is_living = |(_, socket): &(&FlowId, &Socket)| {
            socket.connected
                && socket.error.is_none()
                && !socket.ended
                && self.ends.get(&socket.key).is_some_and(Ends::are_living)
        };
        let living = self.sockets.iter().filter(is_living);
        living.map(|(id, _)| *id)
    }

    /// Nothing that was read stays behind.
    pub(crate) fn check_delivered(&self) {
        assert_eq!(self.read, [], "datagrams that did not come to their pod");
    }

    fn receive(&mut self, packet: &[u8]) {
        self.burst += 1;
        assert!(self.burst < BURST, "packets without an end");
        let (protocol, addresses, payload) = read(packet);
        match protocol {
            IpNumber::TCP => {
                assert!(packet.len() <= MTU.into(), "too long");
                self.receive_segment(addresses, payload);
            }
            IpNumber::UDP => self.receive_datagram(addresses, payload),
            IpNumber::ICMP | IpNumber::IPV6_ICMP => self.receive_echo(addresses, payload),
            other => panic!("protocol {other:?}"),
        }
    }

    fn receive_segment(&mut self, (pod, remote): (IpAddr, IpAddr), payload: &[u8]) {
        let tcp = TcpHeaderSlice::from_slice(payload).expect("a TCP header");
        let data = &payload[tcp.slice().len()..];
        // Zero has two forms, and who finishes checksums cannot tell TCP's from UDP's.
        let sum = match (remote, pod) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                tcp.calc_checksum_ipv4_raw(from.octets(), to.octets(), data)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                tcp.calc_checksum_ipv6_raw(from.octets(), to.octets(), data)
            }
            _ => panic!("from {remote} to {pod}"),
        };
        let sum = match sum {
            Ok(0) if tcp.checksum() == 0xffff => Ok(0xffff),
            sum => sum,
        };
        assert_eq!(sum, Ok(tcp.checksum()), "a wrong checksum of TCP");
        let key = FlowKey {
            protocol: Protocol::Tcp,
            pod: SocketAddr::new(pod, tcp.destination_port()),
            remote: SocketAddr::new(remote, tcp.source_port()),
        };
        let ends = self.ends.get_mut(&key);
        let ends = ends.unwrap_or_else(|| panic!("nobody asked for {key:?}"));
        if tcp.rst() {
            assert!(data.is_empty());
            return;
        }
        let acknowledged = tcp.acknowledgment_number().wrapping_sub(initial(&key));
        ends.acknowledged = acknowledged.wrapping_sub(1) as i32;
        if tcp.syn() {
            assert!(tcp.ack() && data.is_empty());
            let acknowledged = tcp.acknowledgment_number();
            assert_eq!(acknowledged, initial(&key).wrapping_add(1));
            ends.first = Some(tcp.sequence_number().wrapping_add(1));
            ends.expected = ends.first;
            ends.sent = 0;
            ends.unanswered = true;
            return;
        }
        let Some(first) = ends.first else {
            panic!("a segment before the connection was there");
        };
        let at = tcp.sequence_number().wrapping_sub(first);
        // Keep-alives have a byte that was there before, and what it is does not matter.
        let is_probe = data.len() == 1 && at.wrapping_add(1) <= ends.sent;
        let seed = seed(&key, true);
        let len = data.len() as u32;
        if is_probe {
            ends.unanswered = true;
            return;
        }
        if at <= ends.given {
            let is_right = |(byte, at): (&u8, u32)| *byte == pattern(seed, at);
            assert!(data.iter().zip(at..).all(is_right), "another content");
            assert!(at + len <= ends.given, "more than the host gave");
            ends.sent = ends.sent.max(at + len + u32::from(tcp.fin()));
        } else {
            // Its end is a number, too, and is acknowledged behind.
            let is_behind = at == ends.given + 1 && ends.ended && len == 0;
            assert!(is_behind, "{at} of {}", ends.given);
        }
        if tcp.fin() {
            assert!(ends.ended && at + len == ends.given, "no end of the host's");
        }
        if ends.expected == Some(tcp.sequence_number()) {
            let taken = len + u32::from(tcp.fin());
            ends.expected = Some(tcp.sequence_number().wrapping_add(taken));
        }
        ends.unanswered |= len > 0 || tcp.fin();
    }

    fn receive_datagram(&mut self, (pod, remote): (IpAddr, IpAddr), payload: &[u8]) {
        let udp = UdpHeaderSlice::from_slice(payload).expect("a UDP header");
        let data = &payload[udp.slice().len()..];
        assert_eq!(usize::from(udp.length()), payload.len());
        let header = udp.to_header();
        let sum = match (remote, pod) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                header.calc_checksum_ipv4_raw(from.octets(), to.octets(), data)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                header.calc_checksum_ipv6_raw(from.octets(), to.octets(), data)
            }
            _ => panic!("from {remote} to {pod}"),
        };
        assert_eq!(sum, Ok(udp.checksum()), "a wrong checksum of UDP");
        let key = FlowKey {
            protocol: Protocol::Udp,
            pod: SocketAddr::new(pod, udp.destination_port()),
            remote: SocketAddr::new(remote, udp.source_port()),
        };
        let (of, bytes) = self.read.pop_front().expect("something was read");
        assert!(of == key && bytes == data, "another datagram for {key:?}");
    }

    fn receive_echo(&mut self, (pod, remote): (IpAddr, IpAddr), payload: &[u8]) {
        let (of, bytes) = self.read.pop_front().expect("something was read");
        assert_eq!((of.protocol, of.remote.ip()), (Protocol::Ping, remote));
        assert_eq!(of.pod.ip(), pod);
        let reply = if pod.is_ipv6() { 129 } else { 0 };
        assert_eq!(payload[..2], [reply, 0], "an echo reply");
        assert_eq!(
            payload[4..6],
            of.pod.port().to_be_bytes(),
            "the pod's number"
        );
        assert!(payload[6..] == bytes[6..], "another content");
    }
}

/// What a packet carries, to whom and from whom, and what is behind its header.
fn read(packet: &[u8]) -> (IpNumber, (IpAddr, IpAddr), &[u8]) {
    if packet[0] >> 4 == 6 {
        let ip = Ipv6HeaderSlice::from_slice(packet).expect("an IPv6 header");
        let len = ip.slice().len() + usize::from(ip.payload_length());
        assert_eq!(len, packet.len(), "a wrong length");
        assert!(ip.hop_limit() > 0);
        let addresses = (ip.destination_addr().into(), ip.source_addr().into());
        return (ip.next_header(), addresses, &packet[ip.slice().len()..]);
    }
    let ip = Ipv4HeaderSlice::from_slice(packet).expect("an IPv4 header");
    assert_eq!(usize::from(ip.total_len()), packet.len(), "a wrong length");
    assert_eq!(ip.header_checksum(), ip.to_header().calc_header_checksum());
    assert!(ip.ttl() > 0 && !ip.is_fragmenting_payload());
    let addresses = (ip.destination_addr().into(), ip.source_addr().into());
    (ip.protocol(), addresses, &packet[ip.slice().len()..])
}

/// The host's side of the world.
pub(crate) struct HostSide(pub(crate) Rc<RefCell<World>>);

impl Host for HostSide {
    fn open(
        &mut self,
        id: FlowId,
        protocol: Protocol,
        version: IpVersion,
    ) -> Result<(), HostError> {
        let world = &mut *self.0.borrow_mut();
        let key = world.current.expect("a pod sends something");
        assert_eq!(version == IpVersion::Ipv6, key.pod.is_ipv6());
        assert_eq!(protocol, key.protocol);
        assert_ne!(protocol, Protocol::Tcp, "a connection has one other end");
        world.make(id, key.mapping(), true)
    }

    fn connect(&mut self, id: FlowId, protocol: Protocol, to: SocketAddr) -> Result<(), HostError> {
        let world = &mut *self.0.borrow_mut();
        let key = world.current.expect("a pod sends something");
        assert_eq!((protocol, to), (key.protocol, key.remote));
        assert_eq!(protocol, Protocol::Tcp, "datagrams have many other ends");
        assert!(is_open(protocol, to), "{to} is forbidden");
        world.make(id, key, false)
    }

    fn serve(&mut self, id: FlowId, key: FlowKey) -> Result<(), HostError> {
        panic!("{id:?}: {key:?} is not for the gateway");
    }

    fn dialled(&mut self, id: FlowId, _: Result<(), HostError>) {
        panic!("nobody dialled {id:?}");
    }

    fn connected(&mut self, id: FlowId) -> Result<(), HostError> {
        let mut world = self.0.borrow_mut();
        let socket = world.socket(id);
        let outcome = socket.outcome.unwrap_or(Err(HostError::WouldBlock));
        socket.connected = outcome.is_ok();
        outcome
    }

    fn send(&mut self, id: FlowId, to: SocketAddr, bytes: &[u8]) -> Result<(), HostError> {
        let world = &mut *self.0.borrow_mut();
        let current = world.current.expect("a pod sends something");
        let socket = world.sockets.get_mut(&id).expect("it has a socket");
        assert_eq!((socket.key, to), (current.mapping(), current.remote));
        assert!(is_open(current.protocol, to), "{to} is forbidden");
        socket.latest = Some(to);
        if let Some(error) = socket.error.take() {
            return Err(error);
        }
        let offered = world.offered.pop_front().expect("the pod sent it");
        if socket.room == 0 {
            return Err(HostError::WouldBlock);
        }
        assert!(offered == bytes, "another datagram");
        Ok(())
    }

    fn receive(&mut self, id: FlowId, buffer: &mut [u8]) -> Result<(usize, SocketAddr), HostError> {
        let world = &mut *self.0.borrow_mut();
        let socket = world.sockets.get_mut(&id).expect("it has a socket");
        if let Some(error) = socket.error.take() {
            return Err(error);
        }
        let (from, bytes) = socket.datagrams.pop_front().ok_or(HostError::WouldBlock)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        let len = bytes.len();
        let protocol = socket.key.protocol;
        // What is no reply goes no further.
        if is_open(protocol, from) && (protocol == Protocol::Udp || bytes[0] == 0) {
            let key = FlowKey {
                remote: from,
                ..socket.key
            };
            world.read.push_back((key, bytes));
        }
        Ok((len, from))
    }

    fn read(&mut self, id: FlowId, buffer: &mut [u8]) -> Result<usize, HostError> {
        let world = &mut *self.0.borrow_mut();
        let socket = world.sockets.get_mut(&id).expect("it has a socket");
        assert!(socket.connected, "read before it is connected");
        assert_eq!(socket.key.protocol, Protocol::Tcp, "it has senders");
        assert!(!buffer.is_empty(), "an empty read looks like the end");
        let ends = world.ends.get_mut(&socket.key).expect("it has ends");
        let len = buffer.len().min(socket.inbox as usize);
        if len == 0 {
            if let Some(error) = socket.error {
                return Err(error);
            }
            if !socket.ended {
                return Err(HostError::WouldBlock);
            }
            ends.ended = true;
            return Ok(0);
        }
        let seed = seed(&socket.key, true);
        for (byte, at) in buffer[..len].iter_mut().zip(ends.given..) {
            *byte = pattern(seed, at);
        }
        socket.inbox -= len as u32;
        socket.used = world.time;
        ends.given += len as u32;
        Ok(len)
    }

    fn write(&mut self, id: FlowId, bytes: &[u8]) -> Result<usize, HostError> {
        let world = &mut *self.0.borrow_mut();
        let socket = world.sockets.get_mut(&id).expect("it has a socket");
        assert!(socket.connected, "written before it is connected");
        assert_eq!(socket.key.protocol, Protocol::Tcp, "nobody knows where");
        assert!(!socket.shut, "written after the end");
        if let Some(error) = socket.error {
            return Err(error);
        }
        let len = bytes.len().min(socket.room);
        if len == 0 {
            return Err(HostError::WouldBlock);
        }
        let seed = seed(&socket.key, false);
        let is_right = |(byte, at): (&u8, u32)| *byte == pattern(seed, at);
        let is_stream = bytes[..len].iter().zip(socket.written..).all(is_right);
        let lies = world.ends[&socket.key].lies;
        assert!(is_stream || lies, "another content at {}", socket.written);
        socket.written += len as u32;
        socket.used = world.time;
        socket.room -= len;
        Ok(len)
    }

    fn mark(&mut self, id: FlowId, marks: Marks) {
        let world = self.0.borrow();
        assert!(world.sockets.contains_key(&id), "{id:?} has no socket");
        assert!(marks.ttl > 0, "a packet whose time is over");
    }

    fn complaint(&mut self, id: FlowId, _: &mut [u8]) -> Option<Complaint> {
        let world = self.0.borrow();
        assert!(world.sockets.contains_key(&id), "{id:?} has no socket");
        None
    }

    fn shutdown(&mut self, id: FlowId) -> Result<(), HostError> {
        let world = &mut *self.0.borrow_mut();
        let socket = world.sockets.get_mut(&id).expect("it has a socket");
        let ends = &world.ends[&socket.key];
        let has_ended = ends.fin == Some(socket.written as i32);
        assert!(has_ended || ends.lies, "no end of the pod's");
        assert!(!socket.shut, "ended twice");
        socket.shut = true;
        socket.error.map_or(Ok(()), Err)
    }

    fn close(&mut self, id: FlowId, reset: bool) {
        let world = &mut *self.0.borrow_mut();
        let socket = world.sockets.remove(&id);
        let socket = socket.unwrap_or_else(|| panic!("{id:?} is closed twice"));
        assert!(!world.wakes, "{:?} ends as the process wakes", socket.key);
        world.closed.push(id);
        if socket.key.protocol == Protocol::Tcp && world.ends[&socket.key].are_done() {
            let is_whole = socket.shut && !reset;
            assert!(is_whole || world.may_end(&socket), "a stream lost its end");
        }
    }
}

/// The pods' side.
pub(crate) struct PodSide(pub(crate) Rc<RefCell<World>>);

impl PodSide {
    /// Takes what egress has for the router.
    pub(crate) fn take(&self, output: Output<'_>) {
        match output {
            Output::Packet(mut packet) => self.receive(&mut packet),
            Output::Error(_, offender) | Output::Relayed(_, _, offender) => {
                self.check_told(offender)
            }
            Output::Lost(..) => {}
            Output::HandOver(holder, _) => panic!("there is no {holder:?}"),
        }
    }

    fn receive(&self, packet: &mut PacketBuf<'_>) {
        assert!(packet.headroom() >= HEADROOM);
        let mut world = self.0.borrow_mut();
        let Some(gso) = packet.offload().gso else {
            packet.complete_checksum();
            world.receive(packet.as_slice());
            return;
        };
        packet
            .offload()
            .check(packet.len())
            .expect("a valid header");
        let split = Split::new(packet.as_slice(), 0, gso, Checksums::Complete);
        let mut split = split.expect("it can be split");
        let mut header = [0; MAX_HEADER_LEN];
        while let Some(train) = split
            .next_train(&mut header, TrainLimits::ONE)
            .expect("it can be split")
        {
            for (header, payload) in train.segments() {
                world.receive(&[header, payload].concat());
            }
        }
    }

    fn check_told(&self, offender: &[u8]) {
        assert!(may_answer(offender), "nobody may be told of {offender:?}");
        let world = self.0.borrow();
        let source: IpAddr = if offender[0] >> 4 == 6 {
            let ip = Ipv6HeaderSlice::from_slice(offender).expect("an IPv6 header");
            ip.source_addr().into()
        } else {
            let ip = Ipv4HeaderSlice::from_slice(offender).expect("an IPv4 header");
            ip.source_addr().into()
        };
        let is_known = |key: &FlowKey| key.pod.ip() == source;
        assert!(world.ends.keys().any(is_known), "nobody sent {offender:?}");
    }
}
