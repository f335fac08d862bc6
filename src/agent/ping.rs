//! Echo requests by raw sockets, or by Linux' unprivileged ICMP socket where those are forbidden.
//!
//! Those of IPv4 leave with an IP header of our own, because only so "don't fragment" is on and off as
//! asked; the system would choose. In IPv6 it is an option of the socket (RFC 3542 section 11.2).

use std::collections::HashMap;
use std::io::{self, IoSliceMut, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use muslin_encap::ip::{checksum, v4, v6};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, setsockopt, sockopt};
use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv6Packet};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::protocol::{IcmpError, Ping, Pinged, Refused, Reply};
use super::transfer::Generator;

/// Types and codes of ICMP (RFC 792), or of ICMPv6 (RFC 4443).
struct Kinds {
    echo_request: u8,
    echo_reply: u8,
    /// Errors that quote what they are about.
    errors: &'static [u8],
    /// Type and code of the one that has an MTU in the last two bytes of its header. In ICMPv6 these are
    /// the lower half of it, which is enough for links that there are.
    too_long: (u8, u8),
}

const V4: Kinds = Kinds {
    echo_request: 8,
    echo_reply: 0,
    errors: &[3, 11],
    too_long: (3, 4),
};
const V6: Kinds = Kinds {
    echo_request: 128,
    echo_reply: 129,
    errors: &[1, 2, 3, 4],
    too_long: (2, 0),
};
const ICMP_HEADER_LEN: usize = 8;
/// The most that fits an IPv4 packet.
const MAX_PAYLOAD: usize = v4::MAX_LEN - v4::HEADER_LEN - ICMP_HEADER_LEN;

pub(super) fn ping(ping: &Ping) -> io::Result<Pinged> {
    if ping.size > MAX_PAYLOAD {
        let text = format!("the payload of a ping is at most {MAX_PAYLOAD} bytes");
        return Err(io::Error::other(text));
    }
    let sockets = match ping.to {
        IpAddr::V4(_) => Sockets::open_v4(ping),
        IpAddr::V6(_) => Sockets::open_v6(ping),
    };
    let mut session = Session {
        ping,
        kinds: if ping.to.is_ipv4() { &V4 } else { &V6 },
        sockets: sockets?,
        ident: next_ident(),
        sent: HashMap::new(),
        open: 0,
        result: Pinged::default(),
    };
    session.run()?;
    Ok(session.result)
}

/// What requests leave by, and answers come by.
struct Sockets {
    socket: Socket,
    /// Whether it is a raw one, which hears everything and has the identifier that is sent.
    is_raw: bool,
    /// Sends with IPv4 headers of our own; then `socket` gives IPv4 headers.
    headers: Option<Socket>,
}

/// A message of ICMP or ICMPv6.
struct Heard<'b> {
    /// The TTL or hop limit that it came with, if that is known.
    ttl: Option<u8>,
    from: IpAddr,
    icmp: &'b [u8],
}

/// A raw socket and true, or an unprivileged one where raw ones are forbidden and it is enough.
fn icmp_socket(domain: Domain, protocol: Protocol, ping: &Ping) -> io::Result<(Socket, bool)> {
    let icmp = |kind| Socket::new(domain, kind, Some(protocol));
    match icmp(Type::RAW) {
        Ok(socket) => Ok((socket, true)),
        // It does not hear errors as they are.
        Err(error) if ping.dont_fragment => Err(error),
        Err(_) => Ok((icmp(Type::DGRAM)?, false)),
    }
}

impl Sockets {
    fn open_v4(ping: &Ping) -> io::Result<Self> {
        let (socket, is_raw) = icmp_socket(Domain::IPV4, Protocol::ICMPV4, ping)?;
        let protocol = Protocol::from(libc::IPPROTO_RAW);
        let headers = is_raw.then(|| Socket::new(Domain::IPV4, Type::RAW, Some(protocol)));
        if let Some(ttl) = ping.ttl {
            socket.set_ttl_v4(ttl.into())?;
        }
        Ok(Self {
            socket,
            is_raw,
            headers: headers.transpose()?,
        })
    }

    fn open_v6(ping: &Ping) -> io::Result<Self> {
        let (socket, is_raw) = icmp_socket(Domain::IPV6, Protocol::ICMPV6, ping)?;
        if let Some(hop_limit) = ping.ttl {
            socket.set_unicast_hops_v6(hop_limit.into())?;
        }
        setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true)?;
        setsockopt(&socket, sockopt::Ipv6DontFrag, &ping.dont_fragment)?;
        Ok(Self {
            socket,
            is_raw,
            headers: None,
        })
    }

    /// The next message. One whose socket does not say who sent it is from `from`.
    fn receive<'b>(&self, from: IpAddr, buffer: &'b mut [u8]) -> io::Result<Option<Heard<'b>>> {
        if from.is_ipv6() {
            return self.receive_v6(buffer);
        }
        let len = (&self.socket).read(buffer)?;
        let packet = &buffer[..len];
        if !self.is_raw {
            return Ok(Some(Heard {
                ttl: None,
                from,
                icmp: packet,
            }));
        }
        let view = Ipv4Packet::new_checked(packet).ok();
        Ok(view.map(|view| Heard {
            ttl: Some(view.hop_limit()),
            from: view.src_addr().into(),
            icmp: view.payload(),
        }))
    }

    fn receive_v6<'b>(&self, buffer: &'b mut [u8]) -> io::Result<Option<Heard<'b>>> {
        let mut pieces = [IoSliceMut::new(buffer)];
        let mut space = nix::cmsg_space!(libc::c_int);
        let fd = self.socket.as_raw_fd();
        let got = recvmsg::<SockaddrIn6>(fd, &mut pieces, Some(&mut space), MsgFlags::empty())?;
        let mut hop_limit = None;
        for message in got.cmsgs()? {
            if let ControlMessageOwned::Ipv6HopLimit(value) = message {
                hop_limit = u8::try_from(value).ok();
            }
        }
        let (from, len) = (got.address.map(|it| it.ip()), got.bytes);
        Ok(from.map(|from| Heard {
            ttl: hop_limit,
            from: from.into(),
            icmp: &buffer[..len],
        }))
    }
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
    kinds: &'static Kinds,
    sockets: Sockets,
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
        packet[0] = self.kinds.echo_request;
        packet[4..6].copy_from_slice(&self.ident.to_be_bytes());
        packet[6..8].copy_from_slice(&seq.to_be_bytes());
        packet.extend(self.payload(seq));
        // That of ICMPv6 the system writes, which knows the source address.
        let sum = match self.ping.to {
            IpAddr::V4(_) => checksum::compute(&packet),
            IpAddr::V6(_) => 0,
        };
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
        let to = SockAddr::from(SocketAddr::new(self.ping.to, 0));
        if let (Some(headers), IpAddr::V4(destination)) = (&self.sockets.headers, self.ping.to) {
            // The system fills in the source address and the checksum.
            let header = v4::Header {
                dscp: 0,
                total_len: (v4::HEADER_LEN + icmp.len()) as u16,
                ident: self.ident.wrapping_add(seq).max(1),
                dont_fragment: self.ping.dont_fragment,
                ttl: self.ping.ttl.unwrap_or(v4::DEFAULT_TTL),
                protocol: IpProtocol::Icmp,
                source: Ipv4Addr::UNSPECIFIED,
                destination,
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
        self.sockets.socket.send_to(icmp, &to)
    }

    /// Hears what arrives until then, or until there is news of every request.
    fn receive_until(&mut self, deadline: Instant, all: bool) -> io::Result<()> {
        let mut buffer = vec![0; 65_536];
        while !(all && self.open == 0) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let left = left.max(Duration::from_millis(1));
            self.sockets.socket.set_read_timeout(Some(left))?;
            match self.sockets.receive(self.ping.to, &mut buffer) {
                Ok(Some(heard)) => self.hear(&heard),
                Ok(None) => {}
                Err(error) if is_pause(&error) => {}
                // An unprivileged socket is told about errors on its way so.
                Err(_) if !self.sockets.is_raw => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn hear(&mut self, heard: &Heard<'_>) {
        let Heard { ttl, from, icmp } = *heard;
        let Some((header, rest)) = icmp.split_first_chunk::<ICMP_HEADER_LEN>() else {
            return;
        };
        let [kind, code, _, _, i0, i1, s0, s1] = *header;
        if kind == self.kinds.echo_reply {
            let is_ours = u16::from_be_bytes([i0, i1]) == self.ident || !self.sockets.is_raw;
            if is_ours && from == self.ping.to {
                self.hear_reply(u16::from_be_bytes([s0, s1]), ttl, rest);
            }
        } else if self.kinds.errors.contains(&kind)
            && let Some(seq) = self.quoted(rest)
        {
            self.news(seq);
            let is_too_long = (kind, code) == self.kinds.too_long;
            let mtu = is_too_long.then(|| u16::from_be_bytes([s0, s1]));
            self.result.errors.push(IcmpError {
                seq,
                from,
                kind,
                code,
                mtu,
            });
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
        let (protocol, to, rest): (_, IpAddr, _) = match self.ping.to {
            IpAddr::V4(_) => {
                let (header, rest) = v4::split_header(quote)?;
                let view = Ipv4Packet::new_unchecked(header);
                (view.next_header(), view.dst_addr().into(), rest)
            }
            IpAddr::V6(_) => {
                let upper = v6::upper_layer(quote).ok()?;
                let view = Ipv6Packet::new_unchecked(quote);
                let rest = quote.get(upper.offset..)?;
                let rest = (!upper.is_later_fragment()).then_some(rest)?;
                (upper.protocol.into(), view.dst_addr().into(), rest)
            }
        };
        let icmp = rest.first_chunk::<ICMP_HEADER_LEN>()?;
        let [kind, _, _, _, i0, i1, s0, s1] = *icmp;
        let seq = u16::from_be_bytes([s0, s1]);
        let ours = matches!(protocol, IpProtocol::Icmp | IpProtocol::Icmpv6)
            && to == self.ping.to
            && kind == self.kinds.echo_request
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
