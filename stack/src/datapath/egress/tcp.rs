//! A pod's TCP connections, which end here, in smoltcp.
//!
//! smoltcp asks every socket of a set about every packet, so each connection has a set of its own
//! and packets are assigned to connections before smoltcp sees them. All share one interface, which
//! has any address and no link layer.
//!
//! Nothing on the way to a pod loses packets, so there is no congestion control: what a pod does not
//! take stays in the host's socket.

use std::hash::BuildHasher;
use std::num::{NonZeroU16, NonZeroUsize};

use muslin_encap::buffer::HEADROOM;
use muslin_encap::ip::transport::{self, TCP_HEADER_LEN, Transport};
use muslin_encap::ip::{mss, v4, v6};
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet, SocketStorage};
use smoltcp::phy::{
    Checksum as Checks, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken,
};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpVersion, TcpOption, TcpPacket};

use super::flow::FlowState;
use super::head;
use super::host::{FlowId, Host, HostError, Ready};
use super::key::Key;
use super::memory::Grant;
use super::output::{Buffer, Outbox};
use super::table::Moved;
use super::version_of;
use crate::datapath::hash::Seed;

/// After so long without a word a pod is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(120);
/// How often at least a pod is asked in the time that a connection may be silent.
const KEEP_ALIVES: u32 = 4;
/// A pod that has not answered for so long is gone.
const TIMEOUT: Duration = Duration::from_secs(600);
/// What a segment may have if nobody says so, in IPv6 (RFC 9293 section 3.7.1). In IPv4 smoltcp knows.
const DEFAULT_MSS: u16 = 1220;
/// Packets that a connection sends at a time; what is left has its turn later.
const MAX_BURST: usize = 1024;
/// Bytes of IP and TCP headers without options: those of IPv6.
const HEADERS_LEN: usize = v6::HEADER_LEN + TCP_HEADER_LEN;

/// The interfaces of all connections.
pub(super) struct Ends {
    /// After so long without a word a pod is asked whether it is there.
    keep_alive: Duration,
    mtu: Mtu,
    seed: Seed,
    v4: Side,
    v6: Side,
    /// A packet on its way out.
    outgoing: Outgoing,
}

/// The interface of all connections of one IP version.
struct Side {
    interface: Interface,
    capabilities: DeviceCapabilities,
}

/// A connection's end.
pub(super) struct Connection {
    /// When its pod was last heard, even if it had nothing to say.
    pub(super) heard: Instant,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    version: IpVersion,
    /// Bytes in a segment that the pod takes, by what it has said.
    mss: u16,
    pub(super) grant: Grant,
    /// Whether the pod's stream is here to its end.
    complete: bool,
    /// Whether the host has all of it, and knows.
    pub(super) shut: bool,
    /// Whether the host's stream has ended and the pod will know.
    ended: bool,
    /// When the pod's last word came, if the host has not taken all by then.
    left_at: Option<Instant>,
}

/// How a connection is after it was looked after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It goes on, and is to be looked after at that time.
    Open(Option<Instant>),
    /// It is over; both streams have ended if it is not a reset.
    Over { reset: bool },
}

/// How far a connection to a pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Pending,
    Connected,
    Refused,
}

impl Connection {
    fn new(
        now: Instant,
        keep_alive: Duration,
        version: IpVersion,
        grant: Grant,
        open: impl FnOnce(&mut Socket<'static>),
    ) -> Self {
        let buffer = || SocketBuffer::new(vec![0; grant.len]);
        let mut socket = Socket::new(buffer(), buffer());
        // What the host gives goes on at once.
        socket.set_nagle_enabled(false);
        socket.set_keep_alive(Some(keep_alive));
        socket.set_timeout(Some(TIMEOUT));
        open(&mut socket);
        let mut sockets = SocketSet::new(vec![SocketStorage::EMPTY]);
        let handle = sockets.add(socket);
        Self {
            heard: now,
            sockets,
            handle,
            version,
            mss: DEFAULT_MSS,
            grant,
            complete: false,
            shut: false,
            ended: false,
            left_at: None,
        }
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    fn segment(&self) -> Segment {
        Segment {
            version: self.version,
            mss: self.mss,
        }
    }

    /// Keeps what a pod says of its segments.
    fn hear_mss(&mut self, packet: &[u8]) {
        if self.version == IpVersion::Ipv6
            && let Ok(at) = Transport::parse(packet, 0)
            && let segment = TcpPacket::new_unchecked(&packet[at.l4..at.end])
            && segment.syn()
        {
            self.mss = mss_of(segment.options()).unwrap_or(DEFAULT_MSS);
        }
    }

    /// How far the pod is with its answer to a SYN.
    pub(super) fn progress(&mut self) -> Progress {
        match self.socket().state() {
            State::SynSent | State::SynReceived => Progress::Pending,
            State::Closed | State::Listen => Progress::Refused,
            _ => Progress::Connected,
        }
    }

    /// Sends the pod what comes before all that the host has for it; false if it is too much.
    pub(super) fn begin_with(&mut self, preface: &[u8]) -> bool {
        let socket = self.socket();
        // A pod may end its stream at once, and has this one still.
        preface.is_empty() || socket.send_slice(preface) == Ok(preface.len())
    }

    /// How far it is.
    pub(super) fn state(&self) -> FlowState {
        let socket = self.sockets.get::<Socket<'_>>(self.handle);
        match socket.state() {
            State::Listen | State::SynSent | State::SynReceived => FlowState::Connecting,
            State::Established => FlowState::Open,
            State::CloseWait | State::FinWait1 | State::FinWait2 => FlowState::HalfClosed,
            State::Closing | State::LastAck | State::TimeWait | State::Closed => FlowState::Closing,
        }
    }

    /// Ends it with a reset.
    pub(super) fn abort(&mut self) {
        // What the host has not taken yet is nobody's.
        self.complete = false;
        self.socket().abort();
    }

    /// Whether both streams have ended, and the host has not taken all of the pod's.
    fn is_left_behind(&self) -> bool {
        self.complete && self.ended && !self.shut
    }

    /// The time as smoltcp is to know it: at the end of TIME-WAIT it would throw away what the host
    /// has not taken.
    fn time(&mut self, now: Instant) -> Instant {
        if self.is_left_behind() && self.socket().state() == State::TimeWait {
            *self.left_at.get_or_insert(now)
        } else {
            now
        }
    }

    /// Moves what can be moved between the connection's two ends.
    pub(super) fn relay(
        &mut self,
        id: FlowId,
        ready: &mut Ready,
        host: &mut impl Host,
    ) -> Result<Moved, HostError> {
        Ok(Moved {
            sent: self.take_out(id, ready, host)?,
            received: self.bring_in(id, ready, host)?,
        })
    }

    fn take_out(
        &mut self,
        id: FlowId,
        ready: &mut Ready,
        host: &mut impl Host,
    ) -> Result<usize, HostError> {
        let mut moved = 0;
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        // What a pod sends behind its end is nobody's.
        while ready.writable && !self.shut && socket.can_recv() {
            let written = socket.recv(|bytes| match host.write(id, bytes) {
                Ok(len) => (len.min(bytes.len()), Ok(len)),
                Err(error) => (0, Err(error)),
            });
            match written {
                Ok(Ok(len)) => moved += len,
                Ok(Err(HostError::WouldBlock)) => ready.writable = false,
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        self.complete |= matches!(
            socket.state(),
            State::CloseWait | State::Closing | State::LastAck | State::TimeWait
        );
        if self.complete && !self.shut && !socket.can_recv() {
            self.shut = true;
            host.shutdown(id)?;
        }
        Ok(moved)
    }

    fn bring_in(
        &mut self,
        id: FlowId,
        ready: &mut Ready,
        host: &mut impl Host,
    ) -> Result<usize, HostError> {
        let mut moved = 0;
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        while ready.readable && !self.ended && socket.can_send() {
            let read = socket.send(|room| match host.read(id, room) {
                Ok(len) => (len.min(room.len()), Ok(len)),
                Err(error) => (0, Err(error)),
            });
            match read {
                Ok(Ok(0)) => {
                    self.ended = true;
                    socket.close();
                    // The pod's last word may end the connection, and is answered before that.
                    socket.set_ack_delay(None);
                }
                Ok(Ok(len)) => moved += len,
                Ok(Err(HostError::WouldBlock)) => ready.readable = false,
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(moved)
    }
}

impl Side {
    /// An interface with any address.
    fn new(mtu: usize, outgoing: &mut Outgoing, random_seed: u64, now: Instant) -> Self {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = mtu;
        // The router and the demultiplexing have verified what needs it; what goes out is unfinished
        // until a pod's device is known.
        capabilities.checksum.ipv4 = Checks::Tx;
        capabilities.checksum.tcp = Checks::None;
        capabilities.segmentation.tcpv4 = NonZeroUsize::new(v4::MAX_LEN);
        capabilities.segmentation.tcpv6 = NonZeroUsize::new(v4::MAX_LEN);
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = random_seed;
        let mut wire = Wire {
            capabilities: &capabilities,
            incoming: None,
            outgoing,
        };
        let mut interface = Interface::new(config, &mut wire, now);
        interface.set_any_ip(true);
        Self {
            interface,
            capabilities,
        }
    }
}

impl Ends {
    pub(super) fn new(config: &super::config::EgressConfig, now: Instant) -> Self {
        let mut outgoing = Outgoing::new();
        let mut side = |mtu: usize| Side::new(mtu, &mut outgoing, config.random_seed, now);
        Self {
            keep_alive: KEEP_ALIVE.min(config.limits.tcp_idle / KEEP_ALIVES),
            mtu: config.mtu,
            seed: Seed(config.random_seed),
            v4: side(config.mtu.get().into()),
            // smoltcp 0.14 sends no packet of IPv6 that is longer than the MTU, superpackets as others, and
            // does not tell of what size their segments are to be.
            v6: side(v4::MAX_LEN),
            outgoing,
        }
    }

    /// Has packets to pods fit another MTU from now on.
    pub(super) fn set_mtu(&mut self, mtu: Mtu, now: Instant) {
        self.mtu = mtu;
        // smoltcp asks a device for its MTU once. Connections have their state in sets of their own.
        let random_seed = self.seed.hash_one(now.total_micros());
        self.v4 = Side::new(mtu.get().into(), &mut self.outgoing, random_seed, now);
    }

    /// The interface of an IP version, and what is on its way out.
    fn side(&mut self, version: IpVersion) -> (&mut Side, &mut Outgoing) {
        let side = match version {
            IpVersion::Ipv4 => &mut self.v4,
            IpVersion::Ipv6 => &mut self.v6,
        };
        (side, &mut self.outgoing)
    }

    /// A connection that waits for the pod's SYN.
    pub(super) fn accept(&self, now: Instant, key: Key, grant: Grant) -> Connection {
        Connection::new(now, self.keep_alive, version_of(key.pod), grant, |socket| {
            // Ports are never zero and the socket is new; it would refuse nothing else.
            let _ = socket.listen(key.remote);
        })
    }

    /// A connection that begins with a SYN to the pod.
    pub(super) fn dial(&mut self, now: Instant, key: Key, grant: Grant) -> Connection {
        let (keep_alive, version) = (self.keep_alive, version_of(key.pod));
        let context = self.side(version).0.interface.context();
        Connection::new(now, keep_alive, version, grant, |socket| {
            // Where an address is zero the socket stays closed, as after a refusal.
            let _ = socket.connect(context, key.pod, key.remote);
        })
    }

    /// Gives a packet to the connection it belongs to.
    pub(super) fn receive(
        &mut self,
        now: Instant,
        connection: &mut Connection,
        packet: &[u8],
        out: &mut Outbox,
    ) {
        connection.heard = now;
        connection.hear_mss(packet);
        let segment = connection.segment();
        self.process(now, segment, &mut connection.sockets, packet, out);
        // When the pod acknowledges the end of a stream without a window, smoltcp 0.14 goes on
        // probing the window, without a pause, although there is nothing left to send.
        let is_done = matches!(
            connection.socket().state(),
            State::FinWait2 | State::TimeWait
        );
        if is_done && let Some(opened) = with_window(packet) {
            let opened = opened.as_slice();
            self.process(now, segment, &mut connection.sockets, opened, out);
        }
    }

    /// Refuses a packet of no connection by a reset.
    pub(super) fn refuse(&mut self, now: Instant, packet: &[u8], out: &mut Outbox) {
        let version = match packet.first().map(|first| first >> 4) {
            Some(6) => IpVersion::Ipv6,
            Some(_) | None => IpVersion::Ipv4,
        };
        // A reset has no payload.
        let none = Segment { version, mss: 0 };
        self.process(now, none, &mut SocketSet::new([]), packet, out);
    }

    fn process(
        &mut self,
        now: Instant,
        segment: Segment,
        sockets: &mut SocketSet<'_>,
        packet: &[u8],
        out: &mut Outbox,
    ) {
        let mtu = self.mtu;
        let (side, outgoing) = self.side(segment.version);
        let mut wire = Wire {
            capabilities: &side.capabilities,
            incoming: Some(packet),
            outgoing,
        };
        side.interface.poll_ingress_single(now, &mut wire, sockets);
        outgoing.send(mtu, segment, out);
    }

    /// Sends what a connection has to send.
    pub(super) fn transmit(
        &mut self,
        now: Instant,
        connection: &mut Connection,
        out: &mut Outbox,
    ) -> Outcome {
        let (mtu, segment) = (self.mtu, connection.segment());
        let (side, outgoing) = self.side(segment.version);
        let interface = &mut side.interface;
        let time = connection.time(now);
        for _ in 0..MAX_BURST {
            let mut wire = Wire {
                capabilities: &side.capabilities,
                incoming: None,
                outgoing,
            };
            interface.poll_egress(time, &mut wire, &mut connection.sockets);
            if !outgoing.send(mtu, segment, out) || out.is_full() {
                break;
            }
        }
        match connection.socket().state() {
            State::TimeWait | State::Closed if connection.is_left_behind() => Outcome::Open(None),
            // A reset before the connection is there makes the socket listen again.
            State::Closed | State::Listen => Outcome::Over {
                reset: !(connection.shut && connection.ended),
            },
            // The pod's last word was answered. Nothing that is lost here waits on the way, and a
            // pod that repeats it is told that there is no connection.
            State::TimeWait => Outcome::Over { reset: false },
            _ => Outcome::Open(interface.poll_at(now, &connection.sockets)),
        }
    }
}

/// A segment without data or options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bare {
    bytes: [u8; HEADERS_LEN],
    len: usize,
}

impl Bare {
    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// What acknowledges the same as a segment without a window, and has one.
fn with_window(packet: &[u8]) -> Option<Bare> {
    let at = Transport::parse(packet, 0).ok()?;
    let segment = TcpPacket::new_checked(&packet[at.l4..at.end]).ok()?;
    if !segment.ack() || segment.window_len() != 0 {
        return None;
    }
    let end = segment.seq_number() + segment.segment_len();
    let header_len = match at.version {
        IpVersion::Ipv4 => v4::HEADER_LEN,
        IpVersion::Ipv6 => v6::HEADER_LEN,
    };
    let len = header_len + TCP_HEADER_LEN;
    let mut bytes = [0; HEADERS_LEN];
    let copy = &mut bytes[..len];
    copy[..header_len].copy_from_slice(&packet[..header_len]);
    copy[header_len..].copy_from_slice(&segment.into_inner()[..TCP_HEADER_LEN]);
    head::set_plain(copy);
    let mut segment = TcpPacket::new_unchecked(&mut copy[header_len..]);
    segment.clear_flags();
    segment.set_ack(true);
    segment.set_header_len(TCP_HEADER_LEN as u8);
    segment.set_seq_number(end);
    segment.set_window_len(1);
    Some(Bare { bytes, len })
}

/// The device between smoltcp and a call about one packet.
struct Wire<'a> {
    capabilities: &'a DeviceCapabilities,
    incoming: Option<&'a [u8]>,
    outgoing: &'a mut Outgoing,
}

/// The segments of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    version: IpVersion,
    /// Bytes that the pod takes in one.
    mss: u16,
}

impl Segment {
    /// Bytes of payload in a segment whose headers, all options included, have so many.
    fn size(self, mtu: Mtu, headers: usize) -> u16 {
        let longest = mtu.get().min(self.mss.saturating_add(HEADERS_LEN as u16));
        longest.saturating_sub(headers as u16).max(1)
    }
}

/// The maximum segment size that is among options.
fn mss_of(mut options: &[u8]) -> Option<u16> {
    while let Ok((rest, option)) = TcpOption::parse(options) {
        match option {
            TcpOption::MaxSegmentSize(mss) => return Some(mss),
            TcpOption::EndOfList => return None,
            _ if rest.is_empty() => return None,
            _ => options = rest,
        }
    }
    None
}

/// Room for one packet.
struct Outgoing {
    storage: Buffer,
    packet: Option<(usize, PacketMeta)>,
}

impl Outgoing {
    fn new() -> Self {
        Self {
            storage: Outbox::buffer(),
            packet: None,
        }
    }

    /// Sends the packet, if there is one.
    fn send(&mut self, mtu: Mtu, segment: Segment, out: &mut Outbox) -> bool {
        let Some((len, meta)) = self.packet.take() else {
            return false;
        };
        let packet = &mut self.storage[HEADROOM..HEADROOM + len];
        if let Ok(at) = Transport::parse(packet, 0) {
            let checksum = Checksum::Partial {
                start: at.l4 as u16,
                offset: transport::Protocol::Tcp.checksum_offset() as u16,
            };
            let size = match at.version {
                IpVersion::Ipv4 => meta.segmentation_offload_size.map(NonZeroU16::get),
                IpVersion::Ipv6 => {
                    mss::clamp(packet, checksum, mtu);
                    let size = segment.size(mtu, at.payload);
                    (at.payload_len() > size.into()).then_some(size)
                }
            };
            let pseudo = at.pseudo_header(packet, at.end - at.l4);
            let field = at.checksum_offset();
            packet[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
            let offload = Header {
                checksum,
                gso: size.map(|size| Gso {
                    kind: match at.version {
                        IpVersion::Ipv4 => GsoKind::TcpV4,
                        IpVersion::Ipv6 => GsoKind::TcpV6,
                    },
                    size,
                    ecn: false,
                }),
                hdr_len: at.payload as u16,
            };
            out.send(&mut self.storage, len, offload);
        }
        true
    }
}

struct Incoming<'a>(&'a [u8]);

struct Room<'a>(&'a mut Outgoing, PacketMeta);

impl Device for Wire<'_> {
    type RxToken<'a>
        = Incoming<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Room<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Incoming<'_>, Room<'_>)> {
        let incoming = self.incoming.take()?;
        Some((
            Incoming(incoming),
            Room(self.outgoing, PacketMeta::default()),
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        let is_free = self.outgoing.packet.is_none();
        is_free.then_some(Room(self.outgoing, PacketMeta::default()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let end = HEADROOM + len.min(v4::MAX_LEN);
        // Longer ones there are not; such a packet would be sent without its end.
        self.0.packet = Some((end - HEADROOM, self.1));
        if len > v4::MAX_LEN {
            return f(&mut vec![0; len]);
        }
        f(&mut self.0.storage[HEADROOM..end])
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.1 = meta;
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{Ipv4Header, PacketBuilder, TcpHeader};

    use super::*;

    #[test]
    fn what_gets_a_window_acknowledges_the_same() {
        let segment = |window| {
            PacketBuilder::ipv4([10, 244, 1, 2], [192, 0, 2, 80], 64).tcp(5000, 80, 1000, window)
        };
        let mut packet = Vec::new();
        let last = segment(0).ack(77).fin().psh();
        last.write(&mut packet, b"hello").unwrap();
        let opened = with_window(&packet).unwrap();
        let (ip, rest) = Ipv4Header::from_slice(opened.as_slice()).unwrap();
        assert_eq!(usize::from(ip.total_len), 40);
        let (opened, data) = TcpHeader::from_slice(rest).unwrap();
        let mut expected = TcpHeader::new(5000, 80, 1006, 1);
        expected.ack = true;
        expected.acknowledgment_number = 77;
        expected.checksum = opened.checksum;
        assert_eq!((opened, data), (expected, &[][..]));

        for other in [segment(1).ack(77), segment(0).rst(), segment(5)] {
            let mut packet = Vec::new();
            other.write(&mut packet, &[]).unwrap();
            assert_eq!(with_window(&packet), None);
        }
        assert_eq!(with_window(&packet[..39]), None);
    }
}
