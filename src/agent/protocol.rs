//! What is said to an agent, one JSON object a line, and what it answers.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What an agent can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Sends echo requests; the answer is a [`Pinged`].
    Ping(Ping),
    /// Listens for the other requests' connections and datagrams on a port of every address; 0
    /// is any. The answer is a [`Listening`].
    Listen {
        /// TCP and UDP port.
        port: u16,
    },
    /// Sends bytes to a listener, which counts and digests them; the answer is a [`Sent`].
    Send {
        /// The listener.
        to: SocketAddr,
        /// How many.
        bytes: u64,
        /// Which.
        seed: u64,
    },
    /// Opens a connection that stays, to a listener; the answer is an [`Opened`].
    Open {
        /// The listener.
        to: SocketAddr,
    },
    /// Sends bytes through an open connection and compares what comes back; the answer is an
    /// [`Exchanged`].
    Exchange {
        /// The connection.
        id: u64,
        /// How many.
        bytes: u64,
        /// Which.
        seed: u64,
    },
    /// Closes a connection; the answer is empty.
    Close {
        /// The connection.
        id: u64,
    },
    /// Sends datagrams to a listener, one after the other, and compares what comes back; the
    /// answer is an [`Echoed`].
    Udp {
        /// The listener.
        to: SocketAddr,
        /// How many.
        count: u32,
        /// Bytes of each.
        size: usize,
        /// How long to wait for each, in milliseconds.
        timeout_ms: u64,
    },
    /// Asks for the network interfaces; the answer is a list of [`Interface`].
    Interfaces {},
    /// Sends Ethernet frames as they are out of an interface; the answer is empty.
    Inject {
        /// The interface.
        interface: String,
        /// The frames in hexadecimal digits.
        frames: Vec<String>,
    },
    /// Starts to keep what arrives at an interface; the answer is empty.
    Capture {
        /// The interface.
        interface: String,
    },
    /// Ends the capture; the answer is a list of frames in hexadecimal digits, in the order of
    /// their arrival.
    Captured {},
}

/// Echo requests to send.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ping {
    /// Whom to ask.
    pub to: IpAddr,
    /// How many times.
    pub count: u16,
    /// Milliseconds between two.
    pub interval_ms: u64,
    /// Bytes of payload: 28 less than the IPv4 packet, 48 less than that of IPv6.
    pub size: usize,
    /// Time to live or hop limit, if not the system's.
    pub ttl: Option<u8>,
    /// Whether routers, and this system, must not fragment it. One that is longer than this
    /// system's interface, or than a router has said lately, is refused with `EMSGSIZE`.
    pub dont_fragment: bool,
    /// How long to wait for answers after the last request, in milliseconds.
    pub timeout_ms: u64,
}

impl Ping {
    /// Three small ones in quick succession, for which there is ample time.
    #[must_use]
    pub fn new(to: impl Into<IpAddr>) -> Self {
        Self {
            to: to.into(),
            count: 3,
            interval_ms: 5,
            size: 56,
            ttl: None,
            dont_fragment: false,
            timeout_ms: 5000,
        }
    }
}

/// What became of echo requests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pinged {
    /// The replies, in the order of their arrival, duplicates included.
    pub replies: Vec<Reply>,
    /// ICMP errors about them.
    pub errors: Vec<IcmpError>,
    /// Those that this system refused to send.
    pub refused: Vec<Refused>,
}

impl Pinged {
    /// Whether there are `count` replies with the payload of their request, and nothing else.
    #[must_use]
    pub fn is_perfect(&self, count: u16) -> bool {
        let mut seen: Vec<u16> = self.replies.iter().map(|reply| reply.seq).collect();
        seen.sort_unstable();
        self.errors.is_empty()
            && self.refused.is_empty()
            && self.replies.iter().all(|reply| reply.intact)
            && seen.into_iter().eq(0..count)
    }
}

/// An echo reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's number, from 0.
    pub seq: u16,
    /// Round trip in microseconds.
    pub rtt_us: u64,
    /// The reply's TTL or hop limit, where the system reports it.
    pub ttl: Option<u8>,
    /// Whether the payload is the request's.
    pub intact: bool,
}

/// An ICMP error that quotes an echo request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IcmpError {
    /// The request's number.
    pub seq: u16,
    /// Who sent the error.
    pub from: IpAddr,
    /// Type of ICMP, or of ICMPv6 if that address is of IPv6.
    #[serde(rename = "type")]
    pub kind: u8,
    /// Its code.
    pub code: u8,
    /// Next hop's MTU in bytes, of "fragmentation needed" and "packet too big".
    pub mtu: Option<u16>,
}

/// A request that could not be sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The request's number.
    pub seq: u16,
    /// The error's name, such as `EMSGSIZE`.
    pub error: String,
}

/// A listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listening {
    /// Its port.
    pub port: u16,
}

/// A connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Its number.
    pub id: u64,
}

/// A transfer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sent {
    /// Bytes of payload that arrived.
    pub bytes: u64,
    /// From the first to the receiver's word that it has all, without the connection's set-up.
    pub seconds: f64,
    /// Whether all arrived as they were sent.
    pub intact: bool,
}

/// What came back of an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Exchanged {
    /// Bytes of payload that came back.
    pub bytes: u64,
    /// From the first to the last of them.
    pub seconds: f64,
    /// Whether all came back as they were sent.
    pub intact: bool,
    /// The longest time in seconds in which none came back.
    pub gap_seconds: f64,
}

impl Exchanged {
    /// The longest time in which no byte came back.
    #[must_use]
    pub fn longest_gap(&self) -> Duration {
        Duration::try_from_secs_f64(self.gap_seconds).unwrap_or(Duration::MAX)
    }
}

/// Datagrams and their echoes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Echoed {
    /// Datagrams sent.
    pub sent: u32,
    /// Echoes with the same content.
    pub intact: u32,
}

/// An address of a network interface, or an interface that has none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The interface's name.
    pub name: String,
    /// Its address.
    pub address: Option<IpAddr>,
    /// MAC address in hexadecimal digits with colons.
    pub mac: Option<String>,
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// What was asked for.
    Ok(Value),
    /// Why not, in one line.
    Error(String),
}
