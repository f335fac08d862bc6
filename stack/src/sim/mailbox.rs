//! A simulated host's socket for datagrams or echo requests, with the servers that it asks.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};

use smoltcp::time::Duration;
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, Icmpv6Message, Icmpv6Packet};

use super::constants::{ROUTER, ROUTER_V6};
use super::device::Identity;
use super::due::Happening;
use super::outside::{Script, Server};
use super::random::Random;
use crate::datapath::egress::{Complaint, HostError, Marks, Protocol, Ready};
use crate::datapath::icmp::IcmpError;

/// What the host calls all its echo requests.
const IDENT: u16 = 0x0707;
/// A slow server's host has no room for each datagram with this number.
const FULL: u64 = 3;
/// Of an ICMP echo message.
const HEADER_LEN: usize = 8;

/// A socket for datagrams.
pub(super) struct Mailbox {
    pub(super) protocol: Protocol,
    pub(super) marks: Option<Marks>,
    /// The servers to which it has sent something.
    ends: BTreeMap<IpAddr, End>,
    /// The one to which it was to send last.
    pub(super) latest: Option<IpAddr>,
    /// The payload of which the last datagram was the beginning or the next piece, and where the piece
    /// ended: a rogue says of a datagram that it is a superpacket.
    train: Option<(Identity, usize)>,
    /// What has come, and from where.
    pub(super) answers: VecDeque<(SocketAddr, Vec<u8>)>,
    /// Datagrams without a receiver, and where they were sent.
    pub(super) failures: VecDeque<(SocketAddr, Vec<u8>)>,
    /// Bytes that went out, and that were read.
    pub(super) written: u64,
    pub(super) read: u64,
}

/// How a server treats one socket.
struct End {
    server: Server,
    script: Script,
    attempts: u64,
}

impl Mailbox {
    pub(super) fn new(protocol: Protocol) -> Self {
        Self {
            protocol,
            marks: None,
            ends: BTreeMap::new(),
            latest: None,
            train: None,
            answers: VecDeque::new(),
            failures: VecDeque::new(),
            written: 0,
            read: 0,
        }
    }

    pub(super) fn ready(&self) -> Ready {
        Ready {
            readable: !self.answers.is_empty() || !self.failures.is_empty(),
            writable: true,
        }
    }

    /// Why the socket fails, if it does.
    fn failure(&self) -> Option<HostError> {
        let (to, _) = self.failures.front()?;
        Some(match Server::at(to.ip()) {
            Some(Server::Refuses) => HostError::Refused,
            _ => HostError::HostUnreachable,
        })
    }

    /// Whether a datagram may go out there.
    pub(super) fn check(
        &mut self,
        to: IpAddr,
        is_cut: bool,
        random: &mut Random,
    ) -> Result<(), HostError> {
        self.latest = Some(to);
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let server = Server::at(to).filter(|server| !is_cut && *server != Server::Unreachable);
        let server = server.ok_or(HostError::NetUnreachable)?;
        let end = self.ends.entry(to).or_insert_with(|| End {
            server,
            script: Script::new(server, random),
            attempts: 0,
        });
        end.attempts += 1;
        if server == Server::Slow && end.attempts.is_multiple_of(FULL) {
            return Err(HostError::WouldBlock);
        }
        Ok(())
    }

    /// Whose datagram this is; nothing for a further piece of one that was cut.
    pub(super) fn read_identity(
        &mut self,
        to: IpAddr,
        bytes: &[u8],
    ) -> Result<Option<Identity>, &'static str> {
        self.written += bytes.len() as u64;
        if self.marks.is_none() {
            return Err("sends datagrams without marks");
        }
        let payload = match self.protocol {
            Protocol::Ping => {
                let data = bytes.get(HEADER_LEN..);
                let data = data.ok_or("sends half an echo request")?;
                if bytes[0] != echo_request(to) {
                    return Err("sends what is no echo request");
                }
                data
            }
            Protocol::Tcp | Protocol::Udp => bytes,
        };
        let begins = Identity::read(payload).map(|identity| (identity, 0));
        let (identity, at) = begins.or(self.train).ok_or("sends a datagram of nobody")?;
        let end = at + payload.len();
        if identity.payload(end).get(at..) != Some(payload) {
            return Err("sends another datagram than it was given");
        }
        self.train = Some((identity, end));
        Ok((at == 0).then_some(identity))
    }

    /// What a server does about a datagram, and when.
    pub(super) fn reaction(&self, to: SocketAddr, bytes: &[u8]) -> Option<(Duration, Happening)> {
        let End { server, script, .. } = self.ends.get(&to.ip())?;
        if server.echoes() {
            let mut from = to;
            if self.protocol == Protocol::Udp {
                from.set_port(script.answers_from.unwrap_or(to.port()));
            }
            let answer = Happening::Answer(from, answer(self.protocol, to.ip(), bytes));
            return Some((script.latency, answer));
        }
        let fails = match server {
            Server::Refuses => self.protocol == Protocol::Udp,
            Server::Lost => true,
            _ => false,
        };
        fails.then(|| (script.latency, Happening::Failure(to, bytes.to_vec())))
    }

    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<(usize, SocketAddr), HostError> {
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let (from, answer) = self.answers.pop_front().ok_or(HostError::WouldBlock)?;
        buffer[..answer.len()].copy_from_slice(&answer);
        self.read += answer.len() as u64;
        Ok((answer.len(), from))
    }

    pub(super) fn complain(&mut self, quoted: &mut [u8]) -> Option<Complaint> {
        let (to, failure) = self.failures.pop_front()?;
        let len = failure.len().min(quoted.len());
        quoted[..len].copy_from_slice(&failure[..len]);
        let (error, from) = match Server::at(to.ip()) {
            Some(Server::Refuses) => (IcmpError::PortUnreachable, to.ip()),
            _ => (IcmpError::HostUnreachable, router(to)),
        };
        Some(Complaint {
            error,
            from: Some(from),
            to,
            len,
        })
    }
}

/// The router that says that it does not find an address.
fn router(to: SocketAddr) -> IpAddr {
    match to {
        SocketAddr::V4(_) => ROUTER.into(),
        SocketAddr::V6(_) => ROUTER_V6.into(),
    }
}

/// The type of echo requests to an address (RFC 792, RFC 4443 section 4.1).
fn echo_request(to: IpAddr) -> u8 {
    match to {
        IpAddr::V4(_) => Icmpv4Message::EchoRequest.into(),
        IpAddr::V6(_) => Icmpv6Message::EchoRequest.into(),
    }
}

/// What a server at an address answers, without the checksum of ICMPv6, which the host has verified.
fn answer(protocol: Protocol, server: IpAddr, bytes: &[u8]) -> Vec<u8> {
    let mut answer = bytes.to_vec();
    match (protocol, server) {
        (Protocol::Ping, IpAddr::V4(_)) => {
            let mut echo = Icmpv4Packet::new_unchecked(&mut answer);
            echo.set_msg_type(Icmpv4Message::EchoReply);
            echo.set_echo_ident(IDENT);
            echo.fill_checksum();
        }
        (Protocol::Ping, IpAddr::V6(_)) => {
            let mut echo = Icmpv6Packet::new_unchecked(&mut answer);
            echo.set_msg_type(Icmpv6Message::EchoReply);
            echo.set_echo_ident(IDENT);
        }
        (Protocol::Tcp | Protocol::Udp, _) => {}
    }
    answer
}
