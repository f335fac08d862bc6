//! What tests of egress stand on.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};

use etherparse::{IpHeaders, IpNumber, NetSlice, PacketBuilder, PacketBuilderStep, UdpHeader};
use muslin_encap::buffer::HEADROOM;
use muslin_encap::offload::split::{Checksums, MAX_HEADER_LEN, Split, TrainLimits};
use smoltcp::iface::{Config as InterfaceConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::*;

pub(super) const MTU: u16 = 1450;
/// Subnets of the node.
pub(super) const SUBNETS: &str = "10.244.1.0/24,fd00:10:244:1::/64";

thread_local! {
    /// The IP version of the pod's packets in the test that runs.
    static VERSION: Cell<IpVersion> = const { Cell::new(IpVersion::Ipv4) };
}

/// Runs a test of what is the same with both IP versions.
pub(super) fn both(test: impl Fn()) {
    for version in [IpVersion::Ipv4, IpVersion::Ipv6] {
        println!("with {version}");
        with(version, &test);
    }
}

/// Runs a test with an IP version.
pub(super) fn with<R>(version: IpVersion, test: impl FnOnce() -> R) -> R {
    let before = VERSION.replace(version);
    let result = test();
    VERSION.set(before);
    result
}

pub(super) fn is_v6() -> bool {
    VERSION.get() == IpVersion::Ipv6
}

/// One of two values, by the IP version of the test that runs.
pub(super) fn of<T>(ipv4: T, ipv6: T) -> T {
    if is_v6() { ipv6 } else { ipv4 }
}

fn parse<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

/// A pod of this node.
pub(super) fn pod_at(number: u8) -> IpAddr {
    parse(&of(
        format!("10.244.1.{number}"),
        format!("fd00:10:244:1::{number}"),
    ))
}

pub(super) fn pod() -> IpAddr {
    pod_at(2)
}

pub(super) fn gateway() -> IpAddr {
    pod_at(1)
}

/// Somebody outside.
pub(super) fn outside(number: u8, port: u16) -> SocketAddr {
    let address = of(format!("192.0.2.{number}"), format!("2001:db8::{number}"));
    SocketAddr::new(parse(&address), port)
}

pub(super) fn server() -> SocketAddr {
    outside(80, 80)
}

/// The host's loopback address.
pub(super) fn localhost() -> IpAddr {
    parse(of("127.0.0.1", "::1"))
}

/// A packet with these addresses.
pub(super) fn from_to(from: IpAddr, to: IpAddr) -> PacketBuilderStep<IpHeaders> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
        _ => panic!("from {from} to {to}"),
    }
}

/// An echo request, or its reply.
pub(super) fn ping(
    is_reply: bool,
    ends: (IpAddr, IpAddr),
    number: (u16, u16),
    payload: &[u8],
) -> Vec<u8> {
    let (id, seq) = number;
    let builder = from_to(ends.0, ends.1);
    let mut bytes = Vec::new();
    match (is_reply, ends.0.is_ipv6()) {
        (false, false) => builder
            .icmpv4_echo_request(id, seq)
            .write(&mut bytes, payload),
        (true, false) => builder
            .icmpv4_echo_reply(id, seq)
            .write(&mut bytes, payload),
        (false, true) => builder
            .icmpv6_echo_request(id, seq)
            .write(&mut bytes, payload),
        (true, true) => builder
            .icmpv6_echo_reply(id, seq)
            .write(&mut bytes, payload),
    }
    .unwrap();
    bytes
}

/// What `from` says of a packet to a pod: "destination unreachable".
pub(super) fn unreachable(from: IpAddr, code: u8, to: IpAddr, offender: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = from_to(from, to);
    match is_v6() {
        false => builder
            .icmpv4_raw(3, code, [0; 4])
            .write(&mut packet, offender),
        true => builder
            .icmpv6_raw(1, code, [0; 4])
            .write(&mut packet, offender),
    }
    .unwrap();
    packet
}

/// Bytes of an IP header.
pub(super) fn ip_len() -> usize {
    of(20, 40)
}

/// What an independent parser reads in a packet's IP header.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: IpNumber,
    pub(super) dont_fragment: bool,
}

/// Reads an IP header, of which the packet may be cut short, and gives what is behind it.
pub(super) fn read(packet: &[u8]) -> (Read, &[u8]) {
    if packet[0] >> 4 == 4 {
        let (ip, rest) = etherparse::Ipv4Header::from_slice(packet).unwrap();
        assert_eq!(ip.calc_header_checksum(), ip.header_checksum);
        let read = Read {
            source: ip.source.into(),
            destination: ip.destination.into(),
            protocol: ip.protocol,
            dont_fragment: ip.dont_fragment,
        };
        (read, rest)
    } else {
        let (ip, rest) = etherparse::Ipv6Header::from_slice(packet).unwrap();
        let read = Read {
            source: ip.source.into(),
            destination: ip.destination.into(),
            protocol: ip.next_header,
            dont_fragment: false,
        };
        (read, rest)
    }
}

/// Checks the checksum of a whole packet, and that it ends where it says.
pub(super) fn assert_whole(packet: &[u8]) {
    let (ip, rest) = read(packet);
    let slice = etherparse::SlicedPacket::from_ip(packet).unwrap();
    let (Some(NetSlice::Ipv4(_) | NetSlice::Ipv6(_)), Some(transport)) =
        (slice.net, slice.transport)
    else {
        panic!("{packet:?}");
    };
    let len = match (ip.source, u16::from_be_bytes([packet[2], packet[3]])) {
        (IpAddr::V4(_), total) => usize::from(total),
        (IpAddr::V6(_), _) => 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
    };
    assert_eq!(len, packet.len());
    let _ = transport;
    let sum = match (ip.source, ip.destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            muslin_encap::ip::checksum::sum(&[from.octets(), to.octets()].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            muslin_encap::ip::checksum::sum(&[from.octets(), to.octets()].concat())
        }
        _ => panic!("of two versions"),
    };
    let has_pseudo_header = ip.protocol != IpNumber::ICMP;
    let pseudo = muslin_encap::ip::checksum::add(sum, u16::from(ip.protocol.0));
    let pseudo = muslin_encap::ip::checksum::add(pseudo, rest.len() as u16);
    let all = muslin_encap::ip::checksum::sum(rest);
    let all = match has_pseudo_header {
        true => muslin_encap::ip::checksum::add(all, pseudo),
        false => all,
    };
    assert_eq!(all, 0xffff, "{packet:?}");
}

/// Reads a packet of UDP with its checksum: from where, to which port, and what it carries.
pub(super) fn read_udp(packet: &[u8]) -> (SocketAddr, u16, Vec<u8>) {
    assert_whole(packet);
    let (ip, rest) = read(packet);
    assert_eq!(ip.protocol, IpNumber::UDP);
    let (udp, payload) = UdpHeader::from_slice(rest).unwrap();
    let from = SocketAddr::new(ip.source, udp.source_port);
    (from, udp.destination_port, payload.to_vec())
}

/// Bytes that differ from place to place.
pub(super) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| (at.wrapping_mul(31) ^ (at >> 8)) as u8 ^ seed;
    (0..len).map(byte).collect()
}

/// What a socket for datagrams has received and sent.
type Datagrams = (VecDeque<Vec<u8>>, Vec<Vec<u8>>);

/// A socket of the host.
#[derive(Debug, Default)]
pub(super) struct FakeSocket {
    pub(super) to: Option<SocketAddr>,
    /// The IP version of a mapping's socket.
    pub(super) version: Option<IpVersion>,
    /// How connecting ends, if it has.
    pub(super) connected: Option<Result<(), HostError>>,
    /// Datagrams instead of streams, with one other end.
    pub(super) datagrams: Option<Datagrams>,
    /// What a mapping's socket has received and sent.
    pub(super) received: VecDeque<(SocketAddr, Vec<u8>)>,
    pub(super) sent: Vec<(SocketAddr, Vec<u8>)>,
    /// What the other end has sent, and whether that is all.
    pub(super) inbox: VecDeque<u8>,
    pub(super) ended: bool,
    /// What it has received, and how much more it takes.
    pub(super) outbox: Vec<u8>,
    pub(super) room: usize,
    pub(super) shut: bool,
    /// An error that reads and writes have.
    pub(super) error: Option<HostError>,
    /// What the headers of datagrams have, each time it changed.
    pub(super) marks: Vec<Marks>,
    /// What is wrong with datagrams, and what that quotes.
    pub(super) complaints: VecDeque<(Complaint, Vec<u8>)>,
}

/// A host whose sockets do what tests say.
#[derive(Debug, Default)]
pub(super) struct FakeHost {
    pub(super) sockets: BTreeMap<FlowId, FakeSocket>,
    /// Sockets that were closed, and whether by a reset.
    pub(super) closed: Vec<(FlowId, bool)>,
    /// The socket that was made last.
    pub(super) latest: Option<FlowId>,
    /// What `connect` says at once.
    pub(super) refuses: Option<HostError>,
    /// Ports of the gateway that are served.
    pub(super) serves: Vec<(Protocol, u16)>,
    /// Sizes of the trains it has sent, if it can.
    pub(super) trains: Option<Vec<(usize, u16)>>,
    /// What became of connections to pods.
    pub(super) dialled: Vec<(FlowId, Result<(), HostError>)>,
}

impl FakeHost {
    /// Gives a flow a socket that is connected already.
    pub(super) fn adopt(&mut self, id: FlowId) {
        let socket = FakeSocket {
            room: usize::MAX,
            ..FakeSocket::default()
        };
        assert!(self.sockets.insert(id, socket).is_none(), "{id:?} twice");
    }

    fn make(&mut self, id: FlowId, socket: FakeSocket) -> Result<(), HostError> {
        if let Some(error) = self.refuses {
            return Err(error);
        }
        self.latest = Some(id);
        assert!(self.sockets.insert(id, socket).is_none(), "{id:?} twice");
        Ok(())
    }

    /// Gives a flow a socket for datagrams if it has none.
    pub(super) fn adopt_datagrams(&mut self, id: FlowId) {
        self.sockets.entry(id).or_insert_with(|| FakeSocket {
            datagrams: Some(Datagrams::default()),
            ..FakeSocket::default()
        });
    }
}

impl Host for FakeHost {
    fn open(
        &mut self,
        id: FlowId,
        protocol: Protocol,
        version: IpVersion,
    ) -> Result<(), HostError> {
        assert_ne!(protocol, Protocol::Tcp);
        let socket = FakeSocket {
            version: Some(version),
            ..FakeSocket::default()
        };
        self.make(id, socket)
    }

    fn connect(&mut self, id: FlowId, protocol: Protocol, to: SocketAddr) -> Result<(), HostError> {
        let socket = FakeSocket {
            to: Some(to),
            datagrams: (protocol != Protocol::Tcp).then(Default::default),
            room: usize::MAX,
            ..FakeSocket::default()
        };
        self.make(id, socket)
    }

    fn serve(&mut self, id: FlowId, key: FlowKey) -> Result<(), HostError> {
        if !self.serves.contains(&(key.protocol, key.remote.port())) {
            return Err(HostError::Refused);
        }
        self.connect(id, key.protocol, key.remote)
    }

    fn dialled(&mut self, id: FlowId, result: Result<(), HostError>) {
        assert!(self.sockets.contains_key(&id), "{id:?} is closed already");
        self.dialled.push((id, result));
    }

    fn connected(&mut self, id: FlowId) -> Result<(), HostError> {
        let result = self.sockets[&id].connected;
        result.unwrap_or(Err(HostError::WouldBlock))
    }

    fn send(&mut self, id: FlowId, to: SocketAddr, bytes: &[u8]) -> Result<(), HostError> {
        let socket = self.sockets.get_mut(&id).unwrap();
        assert_eq!((socket.to, &socket.datagrams), (None, &None), "no mapping");
        if let Some(error) = socket.error.take() {
            return Err(error);
        }
        let version = version_of(to);
        assert_eq!(socket.version, Some(version), "to {to}");
        socket.sent.push((to, bytes.to_vec()));
        Ok(())
    }

    fn receive(&mut self, id: FlowId, buffer: &mut [u8]) -> Result<(usize, SocketAddr), HostError> {
        let socket = self.sockets.get_mut(&id).unwrap();
        if let Some(error) = socket.error.take() {
            return Err(error);
        }
        let (from, datagram) = socket.received.pop_front().ok_or(HostError::WouldBlock)?;
        buffer[..datagram.len()].copy_from_slice(&datagram);
        Ok((datagram.len(), from))
    }

    fn read(&mut self, id: FlowId, buffer: &mut [u8]) -> Result<usize, HostError> {
        let socket = self.sockets.get_mut(&id).unwrap();
        if let Some((inbox, _)) = &mut socket.datagrams {
            if let Some(error) = socket.error.take() {
                return Err(error);
            }
            let datagram = inbox.pop_front().ok_or(HostError::WouldBlock)?;
            buffer[..datagram.len()].copy_from_slice(&datagram);
            return Ok(datagram.len());
        }
        let len = buffer.len().min(socket.inbox.len());
        if len == 0 {
            let idle = if socket.ended {
                Ok(0)
            } else {
                Err(HostError::WouldBlock)
            };
            return socket.error.map_or(idle, Err);
        }
        for (to, from) in buffer.iter_mut().zip(socket.inbox.drain(..len)) {
            *to = from;
        }
        Ok(len)
    }

    fn write(&mut self, id: FlowId, bytes: &[u8]) -> Result<usize, HostError> {
        let socket = self.sockets.get_mut(&id).unwrap();
        if let Some((_, outbox)) = &mut socket.datagrams {
            if let Some(error) = socket.error.take() {
                return Err(error);
            }
            outbox.push(bytes.to_vec());
            return Ok(bytes.len());
        }
        assert!(!socket.shut, "written after the end");
        let len = bytes.len().min(socket.room);
        match (socket.error, len) {
            (Some(error), _) => return Err(error),
            (None, 0) => return Err(HostError::WouldBlock),
            (None, _) => {}
        }
        socket.room -= len;
        socket.outbox.extend_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn send_train(
        &mut self,
        id: FlowId,
        to: Option<SocketAddr>,
        datagrams: &[u8],
        size: u16,
    ) -> Result<(), HostError> {
        let trains = self.trains.as_mut().ok_or(HostError::Failed)?;
        trains.push((datagrams.len(), size));
        for datagram in datagrams.chunks(size.into()) {
            match to {
                Some(to) => self.send(id, to, datagram)?,
                None => drop(self.write(id, datagram)?),
            }
        }
        Ok(())
    }

    fn mark(&mut self, id: FlowId, marks: Marks) {
        self.sockets.get_mut(&id).unwrap().marks.push(marks);
    }

    fn complaint(&mut self, id: FlowId, quoted: &mut [u8]) -> Option<Complaint> {
        let (complaint, bytes) = self.sockets.get_mut(&id)?.complaints.pop_front()?;
        quoted[..bytes.len()].copy_from_slice(&bytes);
        Some(complaint)
    }

    fn shutdown(&mut self, id: FlowId) -> Result<(), HostError> {
        self.sockets.get_mut(&id).unwrap().shut = true;
        Ok(())
    }

    fn close(&mut self, id: FlowId, reset: bool) {
        assert!(self.sockets.remove(&id).is_some(), "{id:?} is closed twice");
        self.closed.push((id, reset));
    }
}

/// What goes to pods, as whole packets of at most the MTU.
#[derive(Debug, Default)]
pub(super) struct FakePods {
    pub(super) packets: VecDeque<Vec<u8>>,
    pub(super) reports: Vec<(IcmpError, Vec<u8>)>,
    /// What others outside have said.
    pub(super) relayed: Vec<(IpAddr, IcmpError, Vec<u8>)>,
    pub(super) lost: BTreeMap<DropReason, u64>,
    /// Length of the longest packet before it was taken apart.
    pub(super) longest: usize,
    /// Packets for other workers.
    pub(super) handed_over: Vec<(u8, Vec<u8>)>,
    pub(super) to_predecessor: Vec<Vec<u8>>,
    /// Why the router drops all packets, if it does.
    pub(super) loses: Option<DropReason>,
}

impl FakePods {
    /// Takes what egress has for the router, and says why a packet does not get to its pod.
    fn take(&mut self, output: Output<'_>) -> Result<(), DropReason> {
        match output {
            Output::Packet(mut packet) => return self.send(&mut packet),
            Output::Error(error, offender) => {
                assert!(crate::datapath::icmp::may_answer(offender), "{offender:?}");
                self.reports.push((error, offender.to_vec()));
            }
            Output::Relayed(from, error, offender) => {
                assert!(crate::datapath::icmp::may_answer(offender), "{offender:?}");
                self.relayed.push((from, error, offender.to_vec()));
            }
            Output::Lost(reason, packets) => *self.lost.entry(reason).or_default() += packets,
            Output::HandOver(Holder::Predecessor, mut packet) => {
                let packet = packet.packet().as_slice().to_vec();
                self.to_predecessor.push(packet);
            }
            Output::HandOver(Holder::Worker(worker), mut packet) => {
                let packet = packet.packet().as_slice().to_vec();
                self.handed_over.push((worker, packet));
            }
        }
        Ok(())
    }

    fn send(&mut self, packet: &mut PacketBuf<'_>) -> Result<(), DropReason> {
        if let Some(reason) = self.loses {
            return Err(reason);
        }
        self.longest = self.longest.max(packet.len());
        assert!(packet.headroom() >= HEADROOM);
        let Some(gso) = packet.offload().gso else {
            packet.complete_checksum();
            self.packets.push_back(packet.as_slice().to_vec());
            return Ok(());
        };
        packet.offload().check(packet.len()).unwrap();
        let mut split = Split::new(packet.as_slice(), 0, gso, Checksums::Complete).unwrap();
        let mut header = [0; MAX_HEADER_LEN];
        while let Some(train) = split.next_train(&mut header, TrainLimits::ONE).unwrap() {
            for (header, payload) in train.segments() {
                self.packets.push_back([header, payload].concat());
            }
        }
        Ok(())
    }
}

/// A pod with smoltcp's TCP, which verifies every checksum.
pub(super) struct FakePod {
    interface: Interface,
    pub(super) device: FakeDevice,
    pub(super) sockets: SocketSet<'static>,
}

impl FakePod {
    fn new() -> Self {
        let mut device = FakeDevice::default();
        let config = InterfaceConfig::new(HardwareAddress::Ip);
        let mut interface = Interface::new(config, &mut device, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(pod().into(), 0)).unwrap();
        });
        Self {
            interface,
            device,
            sockets: SocketSet::new(Vec::new()),
        }
    }

    /// Takes what has come, and makes what is to be sent.
    pub(super) fn poll(&mut self, now: Instant) {
        self.interface
            .poll(now, &mut self.device, &mut self.sockets);
    }
}

#[derive(Default)]
pub(super) struct FakeDevice {
    pub(super) incoming: VecDeque<Vec<u8>>,
    pub(super) outgoing: VecDeque<Vec<u8>>,
}

pub(super) struct Incoming(Vec<u8>);
pub(super) struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl Device for FakeDevice {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.pop_front()?;
        Some((Incoming(packet), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU.into();
        capabilities
    }
}

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}

/// Egress between a pod and a host.
pub(super) struct Bed {
    pub(super) now: Instant,
    pub(super) egress: Egress,
    pub(super) host: FakeHost,
    pub(super) pods: FakePods,
    pub(super) pod: FakePod,
    /// Why packets were dropped.
    pub(super) dropped: Vec<DropReason>,
    next_port: u16,
}

impl Bed {
    pub(super) fn new() -> Self {
        Self::with(Limits::default(), Policy::new(Rules::default()))
    }

    pub(super) fn with(limits: Limits, policy: Policy) -> Self {
        let config = EgressConfig {
            policy,
            subnets: Some(SUBNETS.parse().unwrap()),
            mtu: Mtu::new(MTU.into()).unwrap(),
            limits,
            random_seed: 7,
        };
        Self {
            now: Instant::ZERO,
            egress: Egress::new(config, Instant::ZERO),
            host: FakeHost::default(),
            pods: FakePods::default(),
            pod: FakePod::new(),
            dropped: Vec::new(),
            next_port: 40_000,
        }
    }

    /// Calls egress, and takes what it has for the router.
    pub(super) fn call<R>(
        &mut self,
        call: impl FnOnce(&mut Egress, Instant, &mut FakeHost) -> R,
    ) -> R {
        let result = call(&mut self.egress, self.now, &mut self.host);
        while let Some(output) = self.egress.poll_output() {
            if let Err(reason) = self.pods.take(output) {
                self.egress.undelivered(self.now, reason);
            }
        }
        result
    }

    /// Gives egress a packet of the pod.
    pub(super) fn send(&mut self, packet: &[u8]) {
        let mut storage = packet.to_vec();
        let packet = PacketBuf::new(&mut storage, 0, packet.len()).unwrap();
        if let Err(reason) = self.call(|egress, now, host| egress.from_pod(now, &packet, host)) {
            self.dropped.push(reason);
        }
    }

    /// What has come for the pod.
    pub(super) fn received(&mut self) -> Vec<Vec<u8>> {
        self.pods.packets.drain(..).collect()
    }

    /// An event of a socket, of which the pod's TCP does not hear.
    pub(super) fn wake_quietly(&mut self, id: FlowId) {
        let ready = Ready {
            readable: true,
            writable: false,
        };
        self.call(|egress, now, host| egress.ready(now, id, ready, host));
        self.assert_waits();
    }

    /// What is due is done.
    fn assert_waits(&self) {
        let due = self.egress.poll_at();
        assert!(due.is_none_or(|due| due > self.now), "{due:?}");
    }

    /// Lets time pass, with everything that is due in it; the pod hears nothing.
    pub(super) fn live(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(due) = self.egress.poll_at().filter(|due| *due <= end) {
            self.pass(due.max(self.now) - self.now);
        }
        self.pass(end - self.now);
    }

    /// Does what is due at a later time, and nothing before that.
    pub(super) fn pass(&mut self, duration: Duration) {
        self.now += duration;
        self.call(|egress, now, host| egress.handle_timeout(now, host));
        self.assert_waits();
    }

    /// Moves packets to and fro until there are none.
    pub(super) fn settle(&mut self) {
        loop {
            let Self { pod, pods, now, .. } = self;
            pod.device.incoming.append(&mut pods.packets);
            pod.poll(*now);
            if self.pod.device.outgoing.is_empty() {
                return;
            }
            while let Some(packet) = self.pod.device.outgoing.pop_front() {
                self.send(&packet);
            }
        }
    }

    /// Lets time pass, with everything that is due in it.
    pub(super) fn wait(&mut self, duration: Duration) {
        let end = self.now + duration;
        loop {
            self.settle();
            let theirs = self.pod.interface.poll_at(self.now, &self.pod.sockets);
            let due = [self.egress.poll_at(), theirs].into_iter().flatten().min();
            self.now = due.map_or(end, |due| {
                due.max(self.now + Duration::from_micros(1)).min(end)
            });
            self.call(|egress, now, host| egress.handle_timeout(now, host));
            if self.now == end {
                return self.settle();
            }
        }
    }

    /// Begins a connection of the pod.
    pub(super) fn connect(&mut self, to: SocketAddr) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 65_536]);
        let mut socket = Socket::new(buffer(), buffer());
        self.next_port += 1;
        socket
            .connect(self.pod.interface.context(), to, self.next_port)
            .unwrap();
        let handle = self.pod.sockets.add(socket);
        self.settle();
        handle
    }

    /// Lets the pod wait for a connection.
    pub(super) fn listen(&mut self, port: u16) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 65_536]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.listen(port).unwrap();
        self.pod.sockets.add(socket)
    }

    pub(super) fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.pod.sockets.get_mut(handle)
    }

    /// The host's socket that was made last.
    pub(super) fn last(&self) -> FlowId {
        self.host.latest.unwrap()
    }

    pub(super) fn fake(&mut self, id: FlowId) -> &mut FakeSocket {
        self.host.sockets.get_mut(&id).unwrap()
    }

    /// An event of a socket.
    pub(super) fn wake(&mut self, id: FlowId) {
        let ready = Ready {
            readable: true,
            writable: true,
        };
        self.call(|egress, now, host| egress.ready(now, id, ready, host));
        self.settle();
        self.assert_waits();
    }

    /// Says how connecting ended.
    pub(super) fn answer(&mut self, id: FlowId, result: Result<(), HostError>) {
        self.fake(id).connected = Some(result);
        self.wake(id);
    }

    /// A connection that is there.
    pub(super) fn established(&mut self) -> (SocketHandle, FlowId) {
        let handle = self.connect(server());
        let id = self.last();
        self.answer(id, Ok(()));
        assert!(self.socket(handle).may_send());
        (handle, id)
    }
}
