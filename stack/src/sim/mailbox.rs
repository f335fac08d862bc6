//! A simulated host's socket for datagrams or echo requests, with the server that it asks.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use smoltcp::wire::{Icmpv4Message, Icmpv4Packet};

use super::device::Identity;
use super::outside::{Script, Server};
use super::sockets::{Happening, ROUTER};
use crate::egress::{Complaint, HostError, Marks, Protocol, Ready};
use crate::icmp::IcmpError;

/// What the host calls all its echo requests.
const IDENT: u16 = 0x0707;
/// A slow server's host has no room for each datagram with this number.
const FULL: u64 = 3;
/// Of an ICMP echo message.
const HEADER_LEN: usize = 8;

/// A socket for datagrams.
pub(super) struct Mailbox {
    server: Server,
    pub(super) script: Script,
    pub(super) marks: Option<Marks>,
    pub(super) answers: VecDeque<Vec<u8>>,
    /// Datagrams that have found nobody.
    pub(super) failures: VecDeque<Vec<u8>>,
    attempts: u64,
    /// Bytes that went out, and that were read.
    pub(super) written: u64,
    pub(super) read: u64,
}

impl Mailbox {
    pub(super) fn new(server: Server, script: Script) -> Self {
        Self {
            server,
            script,
            marks: None,
            answers: VecDeque::new(),
            failures: VecDeque::new(),
            attempts: 0,
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

    fn failure(&self) -> HostError {
        match self.server {
            Server::Refuses => HostError::Refused,
            _ => HostError::HostUnreachable,
        }
    }

    /// Whether a datagram may go out.
    pub(super) fn check(&mut self, is_cut: bool) -> Result<(), HostError> {
        self.attempts += 1;
        if !self.failures.is_empty() {
            Err(self.failure())
        } else if is_cut {
            Err(HostError::NetUnreachable)
        } else if self.server == Server::Slow && self.attempts.is_multiple_of(FULL) {
            Err(HostError::WouldBlock)
        } else {
            Ok(())
        }
    }

    /// Whose datagram this is.
    pub(super) fn read_identity(
        &mut self,
        protocol: Protocol,
        bytes: &[u8],
    ) -> Result<Identity, &'static str> {
        self.written += bytes.len() as u64;
        if self.marks.is_none() {
            return Err("sends datagrams without marks");
        }
        let payload = match protocol {
            Protocol::Ping => {
                let echo = Icmpv4Packet::new_checked(bytes);
                let echo = echo.map_err(|_| "sends half an echo request")?;
                if echo.msg_type() != Icmpv4Message::EchoRequest {
                    return Err("sends what is no echo request");
                }
                &bytes[HEADER_LEN..]
            }
            Protocol::Tcp | Protocol::Udp => bytes,
        };
        let identity = Identity::read(payload).ok_or("sends a datagram of nobody")?;
        if payload == identity.payload(payload.len()) {
            Ok(identity)
        } else {
            Err("sends another datagram than it was given")
        }
    }

    /// What the server does about a datagram.
    pub(super) fn reaction(&self, protocol: Protocol, bytes: &[u8]) -> Option<Happening> {
        if self.server.echoes() {
            return Some(Happening::Answer(answer(protocol, bytes)));
        }
        let fails = match self.server {
            Server::Refuses => protocol == Protocol::Udp,
            Server::Lost => true,
            _ => false,
        };
        fails.then(|| Happening::Failure(bytes.to_vec()))
    }

    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, HostError> {
        if !self.failures.is_empty() {
            return Err(self.failure());
        }
        let answer = self.answers.pop_front().ok_or(HostError::WouldBlock)?;
        buffer[..answer.len()].copy_from_slice(&answer);
        self.read += answer.len() as u64;
        Ok(answer.len())
    }

    pub(super) fn complain(&mut self, to: Ipv4Addr, quoted: &mut [u8]) -> Option<Complaint> {
        let failure = self.failures.pop_front()?;
        let len = failure.len().min(quoted.len());
        quoted[..len].copy_from_slice(&failure[..len]);
        let (error, from) = match self.server {
            Server::Refuses => (IcmpError::PortUnreachable, to),
            _ => (IcmpError::HostUnreachable, ROUTER),
        };
        Some(Complaint {
            error,
            from: Some(from),
            len,
        })
    }
}

fn answer(protocol: Protocol, bytes: &[u8]) -> Vec<u8> {
    let mut answer = bytes.to_vec();
    if protocol == Protocol::Ping {
        let mut echo = Icmpv4Packet::new_unchecked(&mut answer);
        echo.set_msg_type(Icmpv4Message::EchoReply);
        echo.set_echo_ident(IDENT);
        echo.fill_checksum();
    }
    answer
}
