//! Echo requests by raw sockets, or by Linux' unprivileged ICMP socket where those are forbidden.
//!
//! Requests leave with an IP header of our own, because only so "don't fragment" is on and off as
//! asked; the system would choose.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use muslin_encap::ip::{checksum, v4};
use nix::errno::Errno;
use nix::libc;
use smoltcp::wire::{Icmpv4Packet, IpProtocol, Ipv4Packet};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::protocol::{IcmpError, Ping, Pinged, Refused, Reply};
use super::transfer::Generator;

const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
const TIME_EXCEEDED: u8 = 11;
const ICMP_HEADER_LEN: usize = 8;
/// The most that fits an IP packet.
const MAX_PAYLOAD: usize = v4::MAX_LEN - v4::HEADER_LEN - ICMP_HEADER_LEN;

pub(super) fn ping(ping: &Ping) -> io::Result<Pinged> {
    if ping.size > MAX_PAYLOAD {
        let text = format!("the payload of a ping is at most {MAX_PAYLOAD} bytes");
        return Err(io::Error::other(text));
    }
    let (socket, headers) = open(ping)?;
    let mut session = Session {
        ping,
        socket,
        headers,
        ident: next_ident(),
        sent: HashMap::new(),
        open: 0,
        result: Pinged::default(),
    };
    session.run()?;
    Ok(session.result)
}

/// A socket, and if it is a raw one another that sends packets with IP headers of our own.
fn open(ping: &Ping) -> io::Result<(Socket, Option<Socket>)> {
    let icmp = |kind| Socket::new(Domain::IPV4, kind, Some(Protocol::ICMPV4));
    let (socket, headers) = match icmp(Type::RAW) {
        Ok(socket) => {
            let protocol = Protocol::from(libc::IPPROTO_RAW);
            let headers = Socket::new(Domain::IPV4, Type::RAW, Some(protocol))?;
            (socket, Some(headers))
        }
        Err(error) if ping.dont_fragment => return Err(error),
        Err(_) => (icmp(Type::DGRAM)?, None),
    };
    if let Some(ttl) = ping.ttl {
        socket.set_ttl_v4(ttl.into())?;
    }
    Ok((socket, headers))
}

/// Tells the pings of one agent apart, and of several in one namespace as far as can be.
fn next_ident() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let process = std::process::id() as u16;
    process
        .wrapping_mul(251)
        .wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))
}

struct Session<'a> {
    ping: &'a Ping,
    socket: Socket,
    /// Sends with IP headers of our own; then `socket` is raw, too, and gives IP headers.
    headers: Option<Socket>,
    ident: u16,
    /// When each request was sent.
    sent: HashMap<u16, Instant>,
    /// Requests without a reply or an error.
    open: usize,
    result: Pinged,
}

impl Session<'_> {
    fn run(&mut self) -> io::Result<()> {
        let interval = Duration::from_millis(self.ping.interval_ms);
        for seq in 0..self.ping.count {
            self.send(seq)?;
            if seq + 1 < self.ping.count {
                self.receive_until(Instant::now() + interval, false)?;
            }
        }
        self.receive_until(
            Instant::now() + Duration::from_millis(self.ping.timeout_ms),
            true,
        )
    }

    fn payload(&self, seq: u16) -> Vec<u8> {
        let mut payload = vec![0; self.ping.size];
        let seed = u64::from(self.ident) << 16 | u64::from(seq);
        Generator::new(seed).fill(&mut payload);
        payload
    }

    fn send(&mut self, seq: u16) -> io::Result<()> {
        let mut packet = vec![0; ICMP_HEADER_LEN];
        packet[0] = ECHO_REQUEST;
        packet[4..6].copy_from_slice(&self.ident.to_be_bytes());
        packet[6..8].copy_from_slice(&seq.to_be_bytes());
        packet.extend(self.payload(seq));
        let sum = checksum::compute(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        self.sent.insert(seq, Instant::now());
        match self.transmit(seq, &packet) {
            Ok(_) => self.open += 1,
            Err(error) => {
                let error = match error.raw_os_error().map(Errno::from_raw) {
                    Some(errno) => format!("{errno:?}"),
                    None => error.to_string(),
                };
                self.result.refused.push(Refused { seq, error });
            }
        }
        Ok(())
    }

    fn transmit(&self, seq: u16, icmp: &[u8]) -> io::Result<usize> {
        let to = SockAddr::from(SocketAddrV4::new(self.ping.to, 0));
        if let Some(headers) = &self.headers {
            // The system fills in the source address and the checksum.
            let header = v4::Header {
                dscp: 0,
                total_len: (v4::HEADER_LEN + icmp.len()) as u16,
                ident: self.ident.wrapping_add(seq).max(1),
                dont_fragment: self.ping.dont_fragment,
                ttl: self.ping.ttl.unwrap_or(v4::DEFAULT_TTL),
                protocol: IpProtocol::Icmp,
                source: Ipv4Addr::UNSPECIFIED,
                destination: self.ping.to,
            };
            let mut packet = header.to_bytes().to_vec();
            packet.extend(icmp);
            match headers.send_to(&packet, &to) {
                // The other socket cuts it into fragments.
                Err(error)
                    if error.raw_os_error() == Some(libc::EMSGSIZE) && !self.ping.dont_fragment => {
                }
                sent => return sent,
            }
        }
        self.socket.send_to(icmp, &to)
    }

    /// Hears what arrives until then, or until there is news of every request.
    fn receive_until(&mut self, deadline: Instant, all: bool) -> io::Result<()> {
        let mut buffer = vec![0; 65_536];
        while !(all && self.open == 0) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.socket
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match (&self.socket).read(&mut buffer) {
                Ok(len) => self.hear(&buffer[..len]),
                Err(error) if is_pause(&error) => {}
                // An unprivileged socket is told about errors on its way so.
                Err(_) if self.headers.is_none() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn hear(&mut self, packet: &[u8]) {
        if self.headers.is_none() {
            self.hear_icmp(None, self.ping.to, packet);
        } else if let Ok(view) = Ipv4Packet::new_checked(packet) {
            self.hear_icmp(Some(view.hop_limit()), view.src_addr(), view.payload());
        }
    }

    fn hear_icmp(&mut self, ttl: Option<u8>, from: Ipv4Addr, icmp: &[u8]) {
        let Ok(view) = Icmpv4Packet::new_checked(icmp) else {
            return;
        };
        let kind = u8::from(view.msg_type());
        match kind {
            ECHO_REPLY => {
                let ours = view.echo_ident() == self.ident || self.headers.is_none();
                if ours && from == self.ping.to {
                    self.hear_reply(view.echo_seq_no(), ttl, &icmp[ICMP_HEADER_LEN..]);
                }
            }
            UNREACHABLE | TIME_EXCEEDED => {
                let Some(seq) = self.quoted(&icmp[ICMP_HEADER_LEN..]) else {
                    return;
                };
                let code = view.msg_code();
                self.news(seq);
                self.result.errors.push(IcmpError {
                    seq,
                    from,
                    kind,
                    code,
                    mtu: ((kind, code) == (UNREACHABLE, 4))
                        .then(|| u16::from_be_bytes([icmp[6], icmp[7]])),
                });
            }
            _ => {}
        }
    }

    fn hear_reply(&mut self, seq: u16, ttl: Option<u8>, payload: &[u8]) {
        let Some(sent) = self.sent.get(&seq) else {
            return;
        };
        let rtt_us = u64::try_from(sent.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.news(seq);
        self.result.replies.push(Reply {
            seq,
            rtt_us,
            ttl,
            intact: payload == self.payload(seq),
        });
    }

    /// Counts the first news of a request.
    fn news(&mut self, seq: u16) {
        let result = &self.result;
        let known = result.replies.iter().any(|reply| reply.seq == seq)
            || result.errors.iter().any(|error| error.seq == seq);
        if !known {
            self.open = self.open.saturating_sub(1);
        }
    }

    /// The number of the request of ours that an error quotes: its IP header and at least eight
    /// bytes.
    fn quoted(&self, quote: &[u8]) -> Option<u16> {
        // The quote may be shorter than the packet's length says.
        let (header, rest) = v4::split_header(quote)?;
        let view = Ipv4Packet::new_unchecked(header);
        let icmp = rest.first_chunk::<ICMP_HEADER_LEN>()?;
        let [kind, _, _, _, i0, i1, s0, s1] = *icmp;
        let seq = u16::from_be_bytes([s0, s1]);
        let ours = view.next_header() == IpProtocol::Icmp
            && view.dst_addr() == self.ping.to
            && kind == ECHO_REQUEST
            && u16::from_be_bytes([i0, i1]) == self.ident
            && self.sent.contains_key(&seq);
        ours.then_some(seq)
    }
}

fn is_pause(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
