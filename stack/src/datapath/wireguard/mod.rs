//! WireGuard: keys, sessions and endpoints of peers, for a data path whose tunnel is one.
//!
//! It stands between the data path and the sockets. A packet whose verdict is to go to a peer is given to
//! [`WireGuard::ready`]; what has a session is sealed as the datagrams are made ([`WireGuard::seal`]), and what
//! has none waits ([`WireGuard::stage`]) until the handshake that it starts is over. A datagram is opened in its
//! place ([`WireGuard::open`]) before the data path takes what was in it. Handshakes, keepalives and packets
//! that have waited long enough are polled ([`WireGuard::poll_output`]) after every call.
//!
//! The protocol is that of the WireGuard paper; sanstun has its messages, sessions and timers. Time, the time of
//! day and randomness are parameters.

mod link;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::time;

use muslin_encap::ip::{v4, v6};
use muslin_encap::offload::batch::Seal;
use muslin_encap::offload::split::Checksums;
use muslin_encap::offload::virtio::Header;
use muslin_encap::tunnel::wireguard::{HEADER_LEN, PublicKey, message_len};
use sanstun::{
    Committed, Error, Event, Interface, Received, ReceivedMessage, StaticSecret, TransportData,
    Tunnel, TunnelConfig,
};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::IpVersion;
use zeroize::Zeroizing;

use self::link::{Link, LinkId, Links};
use crate::datapath::frame;
use crate::datapath::peer::{Peer, PeerId};
use crate::drops::DropReason;
use crate::secret::Secret;

/// Handshake messages in a second from which on senders must show that they are where they say they are. Each
/// takes up to a quarter of a millisecond.
const HANDSHAKES: u64 = 200;
/// How often timers are looked at while packets come and go; the protocol's shortest is of 5 s.
const TICK: Duration = Duration::from_millis(250);
/// How often it is looked who sends in an unknown session, which anybody can.
const CALL_BACK: Duration = Duration::from_millis(50);
/// Keepalives and handshakes that wait to be polled; there is one per peer at most.
const OUTPUT_LEN: usize = 4096;

/// The public key of a private one (RFC 7748 section 6.1).
#[must_use]
pub fn public_key(private: &Secret) -> PublicKey {
    PublicKey(sanstun::PublicKey::from(&static_secret(private)).to_bytes())
}

fn static_secret(private: &Secret) -> StaticSecret {
    StaticSecret::from(Zeroizing::new(*private.bytes()))
}

/// How flannel divides a node's WireGuard into devices, each with a port of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// One for each IP version of the underlay, which carries pods' packets of that version: the mode
    /// `separate`. A peer has the same key in both.
    Two,
    /// One for all.
    One,
}

/// What a node's WireGuard is.
#[derive(Debug, Clone)]
pub struct WireGuardConfig {
    /// The node's own key.
    pub private_key: Secret,
    /// A key that all nodes have beside their own.
    pub preshared_key: Option<Secret>,
    /// How often a peer hears of this node at least; `None` if it need not.
    pub keepalive: Option<Duration>,
    /// How many devices there are.
    pub devices: Devices,
}

/// Where time begins, and what is unpredictable.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The time.
    pub now: Instant,
    /// The same on a clock that never goes back.
    pub instant: time::Instant,
    /// The time of day: since 1970, in UTC. It must not go back over restarts, or peers take handshakes for
    /// old ones.
    pub unix: time::Duration,
    /// From the operating system; the same seed gives the same keys.
    pub seed: Secret,
}

/// The sessions of a worker with all peers.
pub struct WireGuard {
    clock: Clock,
    config: WireGuardConfig,
    /// By IP version of the underlay, or the first for both.
    devices: Vec<Interface>,
    links: Links,
    output: VecDeque<Output>,
    /// Where messages are opened, and segments are put together.
    room: Box<[u8]>,
    /// When a timer is due, as far as is known, and whether more is known since packets came or went.
    due: Option<Instant>,
    looked: Instant,
    touched: bool,
    /// Packets that waited in vain.
    given_up: u64,
    /// Before when no unknown session is looked into.
    call_back_at: Instant,
    counters: Counters,
}

/// Seals what is sent to one peer.
pub struct Sealer<'a> {
    wireguard: &'a mut WireGuard,
    now: Instant,
    peer: PeerId,
}

impl<K> Seal<K> for Sealer<'_> {
    fn len(&self, len: usize) -> usize {
        message_len(len)
    }

    fn seal(&mut self, _: K, [header, payload]: [&[u8]; 2], message: &mut [u8]) -> bool {
        let Self {
            wireguard,
            now,
            peer,
        } = self;
        if payload.is_empty() {
            return wireguard.seal(*now, *peer, header, message).is_ok();
        }
        let mut room = std::mem::take(&mut wireguard.room);
        let len = header.len() + payload.len();
        let sealed = room.get_mut(..len).is_some_and(|whole| {
            whole[..header.len()].copy_from_slice(header);
            whole[header.len()..].copy_from_slice(payload);
            wireguard.seal(*now, *peer, whole, message).is_ok()
        });
        wireguard.room = room;
        sealed
    }
}

/// What became of handshakes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Handshakes after which both sides have keys.
    pub handshakes: u64,
    /// Handshakes that this node began, or tried again.
    pub initiations: u64,
    /// Senders that were asked to show where they are, since too many handshakes came.
    pub cookies: u64,
}

/// What is to be sent.
#[derive(Debug)]
pub enum Output {
    /// A handshake message or a keepalive.
    Datagram(SocketAddr, sanstun::Datagram),
    /// A packet that waited, for a peer that has a session now.
    Packet(PeerId, Staged),
}

/// A packet that waits for a session.
#[derive(Debug)]
pub struct Staged {
    /// The IP packet.
    pub packet: Vec<u8>,
    /// Its virtio-net header.
    pub offload: Header,
    /// The checksums that it leaves with.
    pub checksums: Checksums,
}

/// What was in a datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// A packet of this peer, which is there in the datagram now.
    Packet(PeerId, Range<usize>),
    /// Nothing for the data path.
    Consumed,
}

/// How it stands with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkState {
    /// The peer; a node that has both IP versions in one device is two.
    pub peer: PeerId,
    /// Its public key.
    pub public_key: PublicKey,
    /// Where datagrams go now.
    pub endpoint: SocketAddr,
    /// Whether that is where it was heard of, not where its lease says.
    pub roamed: bool,
    /// When the last handshake with it was over.
    pub handshake: Option<Instant>,
    /// How many packets wait for one.
    pub staged: usize,
}

/// Two clocks that run alike.
#[derive(Debug, Clone, Copy)]
struct Clock {
    start: Instant,
    instant: time::Instant,
}

impl Clock {
    /// A time on the engine's clock; none is before the start.
    fn at(self, now: Instant) -> time::Instant {
        let since = now.total_micros() - self.start.total_micros();
        self.instant + time::Duration::from_micros(since.max(0) as u64)
    }

    /// The reverse, a microsecond later rather than earlier.
    fn time(self, at: time::Instant) -> Instant {
        let since = at.saturating_duration_since(self.instant);
        self.start + Duration::from_micros(since.as_nanos().div_ceil(1000) as u64)
    }
}

impl WireGuard {
    /// WireGuard without peers.
    #[must_use]
    pub fn new(config: WireGuardConfig, origin: Origin) -> Self {
        let Origin {
            now,
            instant,
            unix,
            seed,
        } = origin;
        let count = match config.devices {
            Devices::Two => 2,
            Devices::One => 1,
        };
        let devices = (0..count).map(|number| {
            let mut seed = *seed.bytes();
            seed[0] ^= number;
            Interface::new(Zeroizing::new(seed), instant, unix)
                .with_static_private(static_secret(&config.private_key))
                .with_handshake_limit(HANDSHAKES)
        });
        Self {
            clock: Clock {
                start: now,
                instant,
            },
            devices: devices.collect(),
            links: Links::default(),
            output: VecDeque::new(),
            room: vec![0; frame::MAX_LEN].into_boxed_slice(),
            due: None,
            looked: now,
            touched: false,
            given_up: 0,
            call_back_at: now,
            counters: Counters::default(),
            config,
        }
    }

    /// The device that has an underlay address.
    fn device_of(&self, endpoint: SocketAddr) -> usize {
        usize::from(endpoint.is_ipv6()).min(self.devices.len() - 1)
    }

    /// Adds a peer, or takes what has changed about it. What is heard of its endpoint counts more than what
    /// was said before: only another endpoint than the last that was said is taken. A peer without what
    /// WireGuard needs is removed.
    pub fn set_peer(&mut self, now: Instant, peer: &Peer) {
        let Some(end) = peer.wireguard else {
            return self.remove_peer(peer.id);
        };
        let device = self.device_of(end.endpoint);
        let version = match peer.subnet {
            ipnet::IpNet::V4(_) => IpVersion::Ipv4,
            ipnet::IpNet::V6(_) => IpVersion::Ipv6,
        };
        let key = (device, end.public_key);
        if self
            .links
            .of_peer(peer.id)
            .is_some_and(|it| it.key() != key)
        {
            self.remove_peer(peer.id);
        }
        if let Some(id) = self.links.by_key(key) {
            let lost = self.links.join(id, (peer.id, version), end.endpoint);
            self.given_up += lost as u64;
            return;
        }
        // A key that is no point has no tunnel: what goes to that peer waits in vain.
        let tunnel = self.new_tunnel(now, key);
        let link = Link::new(key, tunnel, end.endpoint, now);
        self.links.insert(link, (peer.id, version));
        self.touched |= self.config.keepalive.is_some();
    }

    fn new_tunnel(&mut self, now: Instant, (device, key): (usize, PublicKey)) -> Option<Tunnel> {
        let mut config = TunnelConfig::default();
        if let Some(key) = &self.config.preshared_key {
            config = config.with_preshared_key(Zeroizing::new(*key.bytes()).into());
        }
        if let Some(interval) = self.config.keepalive {
            config = config.with_persistent_keepalive(interval.into());
        }
        let at = self.clock.at(now);
        let device = self.devices.get_mut(device)?;
        device.new_tunnel(key.0.into(), config, at).ok()
    }

    /// Forgets a peer, and what waits for it.
    pub fn remove_peer(&mut self, peer: PeerId) {
        self.given_up += self.links.remove_peer(peer) as u64;
    }

    /// How it stands with all peers.
    pub fn links(&self) -> impl Iterator<Item = LinkState> + '_ {
        self.links.states()
    }

    /// What became of handshakes.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Where a packet to a peer goes now, if there is a session to seal it in.
    pub fn ready(&mut self, now: Instant, peer: PeerId) -> Option<SocketAddr> {
        let at = self.clock.at(now);
        let link = self.links.of_peer_mut(peer)?;
        if !link.has_session(at) {
            return None;
        }
        Some(link.endpoint)
    }

    /// Keeps a packet to a peer until there is a session, and sees to that there will be one. What has waited
    /// longest makes room for it.
    ///
    /// # Errors
    /// `PeerGone`, or why it cannot wait.
    pub fn stage(&mut self, now: Instant, peer: PeerId, staged: Staged) -> Result<(), DropReason> {
        let link = self.links.of_peer_mut(peer).ok_or(DropReason::PeerGone)?;
        self.given_up += link.stage(peer, staged) as u64;
        self.touched = true;
        let id = link.id;
        self.call(now, id);
        Ok(())
    }

    /// Begins a handshake, unless one is going on.
    fn call(&mut self, now: Instant, id: LinkId) {
        self.renew(now, id);
        let at = self.clock.at(now);
        let Some(link) = self.links.get_mut(id) else {
            return;
        };
        let endpoint = link.endpoint;
        let tunnel = link.tunnel.as_mut();
        if let Some(datagram) = tunnel.and_then(|it| it.initiate_handshake(at)) {
            self.counters.initiations += 1;
            self.push(endpoint, datagram);
        }
    }

    /// Seals a packet to a peer that is ready into a message at the beginning of `message`, which must have
    /// room for [`message_len`] of it. Returns the message's length.
    ///
    /// # Errors
    /// Why it cannot be sealed.
    pub fn seal(
        &mut self,
        now: Instant,
        peer: PeerId,
        packet: &[u8],
        message: &mut [u8],
    ) -> Result<usize, DropReason> {
        let at = self.clock.at(now);
        let link = self.links.of_peer_mut(peer).ok_or(DropReason::PeerGone)?;
        let tunnel = link.tunnel.as_mut().ok_or(DropReason::WireguardNoSession)?;
        let pending = tunnel.begin_encapsulate(at);
        let pending = pending.map_err(|_| DropReason::WireguardNoSession)?;
        self.touched = true;
        let sealed = pending.encrypt(packet, message);
        sealed.map_err(|_| DropReason::HeadroomExceeded)?;
        Ok(message_len(packet.len()))
    }

    /// Seals the datagrams to a peer that is ready, as they are made.
    pub fn sealer(&mut self, now: Instant, peer: PeerId) -> Sealer<'_> {
        Sealer {
            wireguard: self,
            now,
            peer,
        }
    }

    /// Takes a datagram.
    ///
    /// # Errors
    /// The reason to drop it.
    pub fn open(
        &mut self,
        now: Instant,
        source: SocketAddr,
        datagram: &mut [u8],
    ) -> Result<Opened, DropReason> {
        let at = self.clock.at(now);
        let number = self.device_of(source);
        let device = self.devices.get_mut(number);
        let device = device.ok_or(DropReason::WireguardMalformed)?;
        match device.receive(source, datagram, at).map_err(reason)? {
            Received::SendCookieReply(reply) => {
                self.counters.cookies += 1;
                self.push(source, reply);
                Ok(Opened::Consumed)
            }
            Received::Message(ReceivedMessage::TransportData(message)) => {
                self.open_data(now, (number, source), message, datagram)
            }
            Received::Message(message) => {
                self.touched = true;
                self.take_handshake(now, (number, source), message)?;
                Ok(Opened::Consumed)
            }
        }
    }

    fn open_data(
        &mut self,
        now: Instant,
        (device, source): (usize, SocketAddr),
        message: TransportData,
        datagram: &mut [u8],
    ) -> Result<Opened, DropReason> {
        let at = self.clock.at(now);
        let Some(id) = self.links.by_tunnel(device, message.tunnel_id()) else {
            self.call_back(now, device, source);
            return Err(DropReason::WireguardNoSession);
        };
        let link = self.links.get_mut(id);
        let link = link.ok_or(DropReason::WireguardNoSession)?;
        let tunnel = link.tunnel.as_mut().ok_or(DropReason::WireguardNoSession)?;
        let pending = tunnel.begin_decapsulate(message, at).map_err(reason)?;
        let decrypted = pending.decrypt(datagram, &mut self.room[..]);
        let committed = tunnel.commit_decapsulate(decrypted, at).map_err(reason)?;
        self.touched = true;
        link.heard(source);
        let opened = match committed {
            Committed::Keepalive => Ok(Opened::Consumed),
            Committed::Data { buffer, len } => take_out(link, &buffer[..len], datagram),
        };
        // What was waiting may go once the first message has shown that the other side has the keys, too.
        if link.has_staged() {
            let id = link.id;
            self.release(now, id);
        }
        opened
    }

    /// A node that sends in a session that this one does not know had one with an earlier process here. It
    /// would notice after 15 s without an answer; a handshake is sooner.
    fn call_back(&mut self, now: Instant, device: usize, source: SocketAddr) {
        if now < self.call_back_at {
            return;
        }
        self.call_back_at = now + CALL_BACK;
        let at = self.clock.at(now);
        let is_its = |link: &&mut Link| {
            link.key().0 == device && link.endpoint == source && !link.has_session(at)
        };
        let found = self.links.iter_mut().find(is_its).map(|link| link.id);
        if let Some(id) = found {
            self.touched = true;
            self.call(now, id);
        }
    }

    /// Takes a message of a handshake.
    fn take_handshake(
        &mut self,
        now: Instant,
        (device, source): (usize, SocketAddr),
        message: ReceivedMessage,
    ) -> Result<(), DropReason> {
        let at = self.clock.at(now);
        let (id, answer) = match message {
            ReceivedMessage::HandshakeInitiation(initiation) => {
                let key = PublicKey(initiation.peer_static_public().to_bytes());
                let id = self.links.by_key((device, key));
                let id = id.ok_or(DropReason::WireguardUnknownKey)?;
                self.renew(now, id);
                let tunnel = self.tunnel_mut(id)?;
                (id, tunnel.handle_handshake_initiation(initiation, at))
            }
            ReceivedMessage::HandshakeResponse(response) => {
                let id = self.links.by_tunnel(device, response.tunnel_id());
                let id = id.ok_or(DropReason::WireguardNoSession)?;
                let tunnel = self.tunnel_mut(id)?;
                (id, tunnel.handle_handshake_response(response, at))
            }
            ReceivedMessage::CookieReply(reply) => {
                let id = self.links.by_tunnel(device, reply.tunnel_id());
                let id = id.ok_or(DropReason::WireguardNoSession)?;
                let tunnel = self.tunnel_mut(id)?;
                return tunnel.handle_cookie_reply(reply, at).map_err(reason);
            }
            ReceivedMessage::TransportData(_) => return Ok(()),
        };
        let answer = answer.map_err(reason)?;
        self.counters.handshakes += 1;
        if let Some(link) = self.links.get_mut(id) {
            link.heard(source);
            link.handshake = Some(now);
        }
        self.push(source, answer);
        self.release(now, id);
        Ok(())
    }

    fn tunnel_mut(&mut self, id: LinkId) -> Result<&mut Tunnel, DropReason> {
        let link = self.links.get_mut(id);
        let tunnel = link.and_then(|link| link.tunnel.as_mut());
        tunnel.ok_or(DropReason::WireguardNoSession)
    }

    /// Gives a link whose tunnel has expired another.
    fn renew(&mut self, now: Instant, id: LinkId) {
        let Some(link) = self.links.get_mut(id) else {
            return;
        };
        if link.tunnel.as_ref().is_none_or(Tunnel::is_expired) {
            let key = link.key();
            let tunnel = self.new_tunnel(now, key);
            self.links.set_tunnel(id, tunnel);
        }
    }

    /// Lets packets go that have waited for a session, if there is one.
    fn release(&mut self, now: Instant, id: LinkId) {
        let at = self.clock.at(now);
        let Some(link) = self.links.get_mut(id) else {
            return;
        };
        if link.has_staged() && link.has_session(at) {
            let all = link.staged.take();
            self.output
                .extend(all.map(|(peer, staged)| Output::Packet(peer, staged)));
        }
    }

    /// Something to send that is not for the data path. What does not fit is sent again by the protocol.
    fn push(&mut self, to: SocketAddr, datagram: sanstun::Datagram) {
        if self.output.len() < OUTPUT_LEN {
            self.output.push_back(Output::Datagram(to, datagram));
        }
    }

    /// What is to be sent. To be called after every other call until nothing is left.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.output.pop_front()
    }

    /// Packets that have waited for a session in vain since this was last asked.
    pub const fn take_given_up(&mut self) -> u64 {
        std::mem::replace(&mut self.given_up, 0)
    }

    /// When [`Self::handle_timeout`] is next needed, if ever.
    #[must_use]
    pub fn poll_at(&self) -> Option<Instant> {
        let soon = self.touched.then(|| self.looked + TICK);
        match (self.due, soon) {
            (Some(due), Some(soon)) => Some(due.min(soon)),
            (due, soon) => due.or(soon),
        }
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.poll_at().is_none_or(|due| now < due) {
            return;
        }
        self.call_silent(now);
        let at = self.clock.at(now);
        let (mut due, mut datagrams) = (None::<time::Instant>, Vec::new());
        for link in self.links.iter_mut() {
            let Some(tunnel) = &mut link.tunnel else {
                continue;
            };
            if tunnel.poll_timeout().is_some_and(|due| due <= at) {
                tunnel.handle_timeout(at);
            }
            while let Some(event) = tunnel.poll_event() {
                match event {
                    Event::SendHandshakeInitiation(datagram) => {
                        self.counters.initiations += 1;
                        datagrams.push((link.endpoint, datagram));
                    }
                    Event::SendKeepalive(datagram) => datagrams.push((link.endpoint, datagram)),
                    Event::Established { .. } => {}
                    Event::ConnectionExpired => {
                        self.given_up += link.staged.take().count() as u64;
                        // Nothing is heard from elsewhere.
                        link.endpoint = link.leased;
                    }
                }
            }
            due = [due, tunnel.poll_timeout()].into_iter().flatten().min();
        }
        if let Some(interval) = self.config.keepalive {
            // A session that ends is begun anew by then.
            let call = at + time::Duration::from(interval);
            due = Some(due.map_or(call, |due| due.min(call)));
        }
        for (to, datagram) in datagrams {
            self.push(to, datagram);
        }
        self.due = due.map(|due| self.clock.time(due).max(now + Duration::from_micros(1)));
        (self.looked, self.touched) = (now, false);
    }
}

impl WireGuard {
    /// Begins handshakes with nodes that are to hear of this one without a packet for them.
    fn call_silent(&mut self, now: Instant) {
        let Some(interval) = self.config.keepalive else {
            return;
        };
        let at = self.clock.at(now);
        let silent = self.links.iter_mut().filter_map(|link| {
            let is_due = now >= link.call_at && !link.has_session(at);
            is_due.then(|| {
                link.call_at = now + interval;
                link.id
            })
        });
        for id in silent.collect::<Vec<_>>() {
            self.call(now, id);
        }
    }
}

/// Puts a packet that was opened where the message was.
fn take_out(link: &Link, packet: &[u8], datagram: &mut [u8]) -> Result<Opened, DropReason> {
    let (version, len) = match packet.first().map(|byte| byte >> 4) {
        Some(4) => (IpVersion::Ipv4, v4::check_head(packet, packet.len())?),
        Some(6) => (IpVersion::Ipv6, v6::check_head(packet, packet.len())?),
        _ => return Err(DropReason::WireguardMalformed),
    };
    // Of a version that its lease has not, it is nobody's.
    let peer = link.peer(version).ok_or(DropReason::SourceNotInLease)?;
    let range = HEADER_LEN..HEADER_LEN + len;
    let room = datagram.get_mut(range.clone());
    room.ok_or(DropReason::WireguardMalformed)?
        .copy_from_slice(&packet[..len]);
    Ok(Opened::Packet(peer, range))
}

/// Why a message is dropped.
fn reason(error: Error) -> DropReason {
    match error {
        Error::DuplicateCounter | Error::InvalidCounter | Error::ReplayedHandshakeInitiation => {
            DropReason::WireguardReplayed
        }
        Error::NoCurrentSession
        | Error::ConnectionExpired
        | Error::WrongIndex
        | Error::UnexpectedPacket => DropReason::WireguardNoSession,
        Error::RateLimited => DropReason::WireguardRate,
        Error::WrongKey | Error::LowOrderPoint => DropReason::WireguardUnknownKey,
        Error::InvalidMac | Error::InvalidAeadTag => DropReason::WireguardForged,
        Error::InvalidPacket | Error::DestinationBufferTooSmall { .. } | Error::EmptyPlaintext => {
            DropReason::WireguardMalformed
        }
    }
}
