//! A pod: smoltcp's TCP, UDP and ping behind a port.
//!
//! It has a stack only once it talks, because most pods of a large cluster do not.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::Ipv6Net;
use muslin_encap::mtu::Mtu;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::{Socket, icmp, tcp, udp};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{
    ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, Icmpv4Packet,
    Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpAddress, IpCidr, IpProtocol, Ipv4Cidr, Ipv4Packet,
    Ipv6Cidr, Ipv6Packet, TcpPacket,
};

use super::device::{Assigned, Device, HEAD_LEN, Identity, Order, Report, Sent, pattern};
use crate::datapath::frame;
use crate::datapath::ndp::Message;

/// Where pods listen.
pub(super) const PORT: u16 = 5000;
/// From where they send datagrams.
const QUERY_PORT: u16 = 5001;
const FIRST_CLIENT_PORT: u16 = 49_152;
/// Bytes that a socket buffers in each direction: more than the longest segment.
const BUFFER: usize = 8192;
/// Connections at once; a SYN for one more is refused.
const MAX_CONNECTIONS: usize = 64;
/// How long a connection lives without an answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a ping waits for a neighbour.
const NEIGHBOUR_PATIENCE: Duration = Duration::from_secs(3);

/// A pod.
pub(super) struct Pod {
    assigned: Assigned,
    stack: Option<Box<Stack>>,
    reports: Vec<Report>,
}

impl Pod {
    pub(super) fn new(assigned: &Assigned) -> Self {
        Self {
            assigned: *assigned,
            stack: None,
            reports: Vec::new(),
        }
    }

    /// Whether there is something to be done about a frame. What others ask each other is no reason
    /// to have a stack.
    fn is_for_us(&self, bytes: &[u8]) -> bool {
        let Ok(view) = frame::parse(bytes) else {
            return false;
        };
        let is_asked = || match frame::arp(view.payload()) {
            Some(ArpRepr::EthernetIpv4 {
                target_protocol_addr,
                ..
            }) => target_protocol_addr == self.assigned.address,
            _ => false,
        };
        let is_solicited = || match Message::parse(view.payload()) {
            Ok(Some(Message::Solicitation(asked))) => {
                let own = self.assigned.ipv6.map(|(net, _)| net.addr());
                own == Some(asked.target)
            }
            _ => false,
        };
        let to = view.dst_addr();
        to == self.assigned.mac
            || to.is_broadcast() && is_asked()
            || to.is_multicast() && view.ethertype() == EthernetProtocol::Ipv6 && is_solicited()
    }

    fn place(&self) -> Place {
        let it = &self.assigned;
        let cidr = Ipv4Cidr::new(it.address, it.subnet.prefix_len());
        (it.mac, cidr, it.gateway, it.ipv6)
    }

    fn stack(&mut self, now: Instant) -> &mut Stack {
        let (place, mtu, seed) = (self.place(), self.assigned.mtu, self.assigned.seed);
        self.stack
            .get_or_insert_with(|| Box::new(Stack::new(now, place, mtu, seed)))
    }
}

impl Device for Pod {
    fn receive(&mut self, now: Instant, frame: &[u8]) {
        if self.is_for_us(frame) {
            let stack = self.stack(now);
            stack.expect_connection(frame);
            stack.queues.received.push_back(frame.to_vec());
        }
    }

    fn set_mtu(&mut self, now: Instant, mtu: Mtu) {
        self.assigned.mtu = mtu;
        let (place, seed) = (self.place(), self.assigned.seed);
        if let Some(stack) = &mut self.stack {
            stack.queues.mtu = usize::from(mtu.get()) + frame::HEADER_LEN;
            // smoltcp asks a device for its MTU once.
            stack.interface = interface(now, place, &mut stack.queues, seed);
        }
    }

    fn order(&mut self, now: Instant, order: Order) {
        let result = match order {
            Order::Talk {
                to,
                flow,
                bytes,
                ends_first,
            } => self.stack(now).connect(to, (flow, bytes), ends_first),
            Order::Query {
                to,
                identity,
                bytes,
            } => {
                self.stack(now).query(to, identity, bytes);
                return;
            }
            Order::Ping {
                to,
                identity,
                bytes,
            } => {
                self.stack(now).ping(to, identity, bytes);
                return;
            }
            Order::Rest => {
                self.stack = None;
                return;
            }
            Order::Misbehave { .. } => return,
        };
        if let (Err(why), Order::Talk { flow, .. }) = (result, order) {
            self.reports.push(Report::Failed { flow, why });
        }
    }

    fn poll(&mut self, now: Instant) -> Vec<Sent> {
        let Some(stack) = &mut self.stack else {
            return Vec::new();
        };
        stack.poll(now, &mut self.reports);
        let sent = stack.queues.sent.drain(..);
        sent.map(Sent::from).collect()
    }

    fn poll_at(&mut self, now: Instant) -> Option<Instant> {
        let stack = self.stack.as_mut()?;
        stack.interface.poll_at(now, &stack.sockets)
    }

    fn reports(&mut self) -> Vec<Report> {
        std::mem::take(&mut self.reports)
    }
}

/// A pod's network stack.
struct Stack {
    interface: Interface,
    queues: Queues,
    sockets: SocketSet<'static>,
    pings: SocketHandle,
    /// What its pings have as their identifier.
    ident: u16,
    queries: SocketHandle,
    /// Since when the first ping waits for its neighbour.
    stuck: Option<Instant>,
    sequence: u16,
    connections: BTreeMap<SocketHandle, Connection>,
    next_port: u16,
}

/// What is done with a connection.
#[derive(Debug)]
enum Connection {
    /// Nobody has connected yet, or the head is not complete.
    Server {
        head: Vec<u8>,
    },
    Exchange(Exchange),
    /// Everything is done but the end of the connection.
    Over,
}

/// Bytes that go one way and come back the other.
#[derive(Debug)]
struct Exchange {
    is_client: bool,
    /// Whether this end ends its stream as soon as all is sent.
    ends_first: bool,
    flow: u64,
    bytes: usize,
    sent: usize,
    received: usize,
}

/// A pod's MAC address, its address and its gateway, and those of IPv6.
type Place = (
    EthernetAddress,
    Ipv4Cidr,
    Ipv4Addr,
    Option<(Ipv6Net, Ipv6Addr)>,
);

fn interface(
    now: Instant,
    (mac, cidr, gateway, ipv6): Place,
    queues: &mut Queues,
    seed: u64,
) -> Interface {
    let mut config = Config::new(HardwareAddress::Ethernet(mac));
    config.random_seed = seed;
    let mut interface = Interface::new(config, queues, now);
    interface.update_ip_addrs(|addresses| {
        // There is room for eight.
        let _ = addresses.push(IpCidr::Ipv4(cidr));
        if let Some((net, _)) = ipv6 {
            let cidr = Ipv6Cidr::new(net.addr(), net.prefix_len());
            let _ = addresses.push(IpCidr::Ipv6(cidr));
        }
    });
    let _ = interface.routes_mut().add_default_ipv4_route(gateway);
    if let Some((_, gateway)) = ipv6 {
        let _ = interface.routes_mut().add_default_ipv6_route(gateway);
    }
    interface
}

impl Stack {
    fn new(now: Instant, place: Place, mtu: Mtu, seed: u64) -> Self {
        let mut queues = Queues {
            mtu: usize::from(mtu.get()) + frame::HEADER_LEN,
            received: VecDeque::new(),
            sent: VecDeque::new(),
        };
        let interface = interface(now, place, &mut queues, seed);
        let ident = seed as u16 | 1;
        let mut sockets = SocketSet::new(Vec::new());
        let pings = sockets.add(ping_socket(ident));
        let queries = sockets.add(query_socket());
        Self {
            interface,
            queues,
            sockets,
            pings,
            ident,
            queries,
            stuck: None,
            sequence: 0,
            connections: BTreeMap::new(),
            next_port: FIRST_CLIENT_PORT,
        }
    }

    /// smoltcp's listening sockets take one connection each, so there is one for each SYN.
    fn expect_connection(&mut self, bytes: &[u8]) {
        let Some((from, port)) = syn(bytes) else {
            return;
        };
        let is_known = self.sockets.iter().any(|(_, socket)| match socket {
            Socket::Tcp(socket) => {
                let remote = socket.remote_endpoint();
                let is_this =
                    |remote: smoltcp::wire::IpEndpoint| remote.addr == from && remote.port == port;
                socket.is_listening() || remote.is_some_and(is_this)
            }
            _ => false,
        });
        if is_known || self.connections.len() >= MAX_CONNECTIONS {
            return;
        }
        let mut socket = socket();
        if socket.listen(PORT).is_ok() {
            let handle = self.sockets.add(socket);
            let head = Vec::new();
            self.connections.insert(handle, Connection::Server { head });
        }
    }

    fn connect(
        &mut self,
        to: SocketAddr,
        (flow, bytes): (u64, usize),
        ends_first: bool,
    ) -> Result<(), &'static str> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err("it has too many connections");
        }
        let port = self.next_port;
        self.next_port = port.checked_add(1).unwrap_or(FIRST_CLIENT_PORT);
        let mut socket = socket();
        let context = self.interface.context();
        let connected = socket.connect(context, to, port);
        connected.map_err(|_| "it cannot connect")?;
        let handle = self.sockets.add(socket);
        let exchange = Exchange {
            is_client: true,
            ends_first,
            flow,
            bytes,
            sent: 0,
            received: 0,
        };
        self.connections
            .insert(handle, Connection::Exchange(exchange));
        Ok(())
    }

    fn ping(&mut self, to: IpAddr, identity: Identity, bytes: usize) {
        self.sequence = self.sequence.wrapping_add(1);
        if let IpAddr::V6(to) = to {
            return self.ping_v6(to, identity, bytes);
        }
        let socket = self.sockets.get_mut::<icmp::Socket<'_>>(self.pings);
        let data = identity.payload(bytes);
        let repr = Icmpv4Repr::EchoRequest {
            ident: self.ident,
            seq_no: self.sequence,
            data: &data,
        };
        // A full buffer is a ping that is lost.
        if let Ok(buffer) = socket.send(repr.buffer_len(), to.into()) {
            let mut packet = Icmpv4Packet::new_unchecked(buffer);
            repr.emit(&mut packet, &ChecksumCapabilities::default());
        }
    }

    fn ping_v6(&mut self, to: Ipv6Addr, identity: Identity, bytes: usize) {
        let from = self.interface.get_source_address_ipv6(&to);
        let socket = self.sockets.get_mut::<icmp::Socket<'_>>(self.pings);
        let data = identity.payload(bytes);
        let repr = Icmpv6Repr::EchoRequest {
            ident: self.ident,
            seq_no: self.sequence,
            data: &data,
        };
        if let Ok(buffer) = socket.send(repr.buffer_len(), to.into()) {
            let mut packet = Icmpv6Packet::new_unchecked(buffer);
            repr.emit(&from, &to, &mut packet, &ChecksumCapabilities::default());
        }
    }

    fn query(&mut self, to: SocketAddr, identity: Identity, bytes: usize) {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.queries);
        // So is one of a datagram.
        let _ = socket.send_slice(&identity.payload(bytes), to);
    }

    fn poll(&mut self, now: Instant, reports: &mut Vec<Report>) {
        loop {
            self.interface
                .poll(now, &mut self.queues, &mut self.sockets);
            if !self.serve(reports) {
                break;
            }
        }
        self.hear_answers(reports);
        self.hear_datagrams(reports);
        self.forget_stuck_pings(now);
    }

    /// smoltcp would wait for ever for a neighbour that is not there, and ask for no other.
    fn forget_stuck_pings(&mut self, now: Instant) {
        let socket = self.sockets.get::<icmp::Socket<'_>>(self.pings);
        if socket.send_queue() == 0 {
            self.stuck = None;
        } else if now >= *self.stuck.get_or_insert(now) + NEIGHBOUR_PATIENCE {
            self.sockets.remove(self.pings);
            self.pings = self.sockets.add(ping_socket(self.ident));
            self.stuck = None;
        }
    }

    fn hear_answers(&mut self, reports: &mut Vec<Report>) {
        let socket = self.sockets.get_mut::<icmp::Socket<'_>>(self.pings);
        while let Ok((bytes, from)) = socket.recv() {
            if matches!(from, IpAddress::Ipv6(_)) {
                // Its checksum smoltcp has verified.
                if let [129, _, _, _, _, _, _, _, data @ ..] = bytes {
                    reports.extend(answer(data));
                }
                continue;
            }
            let packet = Icmpv4Packet::new_checked(bytes);
            let repr = packet.and_then(|packet| {
                Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).map(
                    |repr| match repr {
                        Icmpv4Repr::EchoReply { data, .. } => data.to_vec(),
                        _ => Vec::new(),
                    },
                )
            });
            reports.extend(repr.ok().and_then(|data| answer(&data)));
        }
    }

    fn hear_datagrams(&mut self, reports: &mut Vec<Report>) {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.queries);
        while let Ok((bytes, _)) = socket.recv() {
            reports.extend(answer(bytes));
        }
    }

    /// Moves bytes of all connections; whether there was anything to do.
    fn serve(&mut self, reports: &mut Vec<Report>) -> bool {
        let mut is_busy = false;
        let mut ended = Vec::new();
        for (handle, connection) in &mut self.connections {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(*handle);
            match connection {
                Connection::Server { head } => {
                    if let Some(exchange) = read_head(socket, head) {
                        *connection = Connection::Exchange(exchange);
                        is_busy = true;
                    } else if !socket.is_open()
                        || (!socket.may_recv()
                            && !socket.is_listening()
                            && socket.state() != tcp::State::SynReceived)
                    {
                        socket.abort();
                        ended.push(*handle);
                        is_busy = true;
                    }
                }
                Connection::Exchange(exchange) => match exchange.go_on(socket) {
                    Progress::None => {}
                    Progress::Some => is_busy = true,
                    Progress::Done => {
                        if exchange.is_client {
                            reports.push(Report::Talked(exchange.flow));
                        }
                        socket.close();
                        *connection = Connection::Over;
                        is_busy = true;
                    }
                    Progress::Failed(why) => {
                        let flow = exchange.flow;
                        if exchange.is_client {
                            reports.push(Report::Failed { flow, why });
                        }
                        socket.abort();
                        *connection = Connection::Over;
                        is_busy = true;
                    }
                    Progress::Wrong(what) => {
                        reports.push(Report::Wrong(what));
                        socket.abort();
                        *connection = Connection::Over;
                        is_busy = true;
                    }
                },
                Connection::Over => {
                    if matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait) {
                        ended.push(*handle);
                    }
                }
            }
        }
        for handle in ended {
            self.connections.remove(&handle);
            self.sockets.remove(handle);
        }
        is_busy
    }
}

/// What is to be told of the answer to a ping or a datagram.
fn answer(data: &[u8]) -> Option<Report> {
    let identity = Identity::read(data)?;
    if data == identity.payload(data.len()) {
        return Some(Report::Answered(identity.ping));
    }
    Some(Report::Wrong(format!(
        "the answer to ping {} is not what was sent",
        identity.ping
    )))
}

fn query_socket() -> udp::Socket<'static> {
    let buffer =
        || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 2 * BUFFER]);
    let mut queries = udp::Socket::new(buffer(), buffer());
    // Nor can this.
    let _ = queries.bind(QUERY_PORT);
    queries
}

fn ping_socket(ident: u16) -> icmp::Socket<'static> {
    let buffer =
        || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 2 * BUFFER]);
    let mut pings = icmp::Socket::new(buffer(), buffer());
    // It cannot fail: the socket is new, and the identifier is not that of nobody.
    let _ = pings.bind(icmp::Endpoint::Ident(ident));
    pings
}

fn socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_timeout(Some(PATIENCE));
    socket.set_nagle_enabled(false);
    socket
}

/// From where a frame asks for a connection.
fn syn(bytes: &[u8]) -> Option<(IpAddress, u16)> {
    let view = EthernetFrame::new_checked(bytes).ok()?;
    if view.ethertype() == EthernetProtocol::Ipv6 {
        let ip = Ipv6Packet::new_checked(view.payload()).ok()?;
        let is_tcp = ip.next_header() == IpProtocol::Tcp;
        let tcp = TcpPacket::new_checked(ip.payload())
            .ok()
            .filter(|_| is_tcp)?;
        let is_syn = tcp.syn() && !tcp.ack() && tcp.dst_port() == PORT;
        return is_syn.then(|| (ip.src_addr().into(), tcp.src_port()));
    }
    if view.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let ip = Ipv4Packet::new_checked(view.payload()).ok()?;
    if ip.next_header() != IpProtocol::Tcp || ip.frag_offset() != 0 {
        return None;
    }
    let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
    let is_syn = tcp.syn() && !tcp.ack() && tcp.dst_port() == PORT;
    is_syn.then(|| (ip.src_addr().into(), tcp.src_port()))
}

/// Reads what a client says first.
fn read_head(socket: &mut tcp::Socket<'_>, head: &mut Vec<u8>) -> Option<Exchange> {
    while head.len() < HEAD_LEN && socket.can_recv() {
        let mut byte = [0];
        if socket.recv_slice(&mut byte) != Ok(1) {
            break;
        }
        head.extend(byte);
    }
    let (flow, rest) = head.split_first_chunk()?;
    let bytes = rest.first_chunk()?;
    Some(Exchange {
        is_client: false,
        ends_first: false,
        flow: u64::from_be_bytes(*flow),
        bytes: u64::from_be_bytes(*bytes) as usize,
        sent: 0,
        received: 0,
    })
}

enum Progress {
    None,
    Some,
    Done,
    Failed(&'static str),
    Wrong(String),
}

impl Exchange {
    /// What this end sends at an offset: a client its head first.
    fn outgoing(&self, offset: usize) -> u8 {
        match offset.checked_sub(HEAD_LEN) {
            Some(offset) if self.is_client => pattern(self.flow, offset),
            None if self.is_client => {
                let head = u128::from(self.flow) << 64 | self.bytes as u128;
                head.to_be_bytes()[offset]
            }
            Some(_) | None => pattern(!self.flow, offset),
        }
    }

    fn incoming(&self, offset: usize) -> u8 {
        pattern(
            if self.is_client {
                !self.flow
            } else {
                self.flow
            },
            offset,
        )
    }

    fn to_send(&self) -> usize {
        self.bytes + if self.is_client { HEAD_LEN } else { 0 }
    }

    fn go_on(&mut self, socket: &mut tcp::Socket<'_>) -> Progress {
        let mut is_busy = false;
        while socket.can_recv() {
            let mut buffer = [0; 1024];
            let Ok(len) = socket.recv_slice(&mut buffer) else {
                break;
            };
            is_busy |= len > 0;
            for byte in &buffer[..len] {
                let expected = self.incoming(self.received);
                if *byte != expected || self.received >= self.bytes {
                    let (flow, at) = (self.flow, self.received);
                    return Progress::Wrong(format!(
                        "TCP flow {flow} has the byte {byte} at {at}, where {expected} was sent"
                    ));
                }
                self.received += 1;
            }
        }
        // A server answers once it has everything.
        let may_send = self.is_client || self.received == self.bytes;
        while may_send && self.sent < self.to_send() && socket.can_send() {
            let len = (self.to_send() - self.sent).min(1024);
            let bytes: Vec<_> = (self.sent..self.sent + len)
                .map(|offset| self.outgoing(offset))
                .collect();
            let Ok(len) = socket.send_slice(&bytes) else {
                break;
            };
            is_busy |= len > 0;
            self.sent += len;
        }
        if self.ends_first && self.sent == self.to_send() && socket.may_send() {
            socket.close();
        }
        if self.sent == self.to_send() && self.received == self.bytes {
            Progress::Done
        } else if !socket.is_open() {
            Progress::Failed("the connection was refused, reset, or had no answer")
        } else if is_busy {
            Progress::Some
        } else if !socket.may_recv()
            && socket.state() == tcp::State::CloseWait
            && self.received < self.bytes
        {
            Progress::Failed("the other end closed it early")
        } else {
            Progress::None
        }
    }
}

/// The way between a pod's stack and its node.
struct Queues {
    mtu: usize,
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);

struct Send<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::Device for Queues {
    type RxToken<'a> = Received;
    type TxToken<'a> = Send<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Send<'_>)> {
        let frame = self.received.pop_front()?;
        Some((Received(frame), Send(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Send<'_>> {
        Some(Send(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu;
        capabilities
    }
}

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Send<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}
