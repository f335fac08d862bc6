//! The agent in a pod: pings and transfers on request.
//!
//! `muslin demo` and `muslin doctor` run `muslin agent` in their pods, so that these need nothing but
//! this binary. Frames as they are it neither sends nor shows, since that would be a way to those of
//! others where the program has capabilities; for tests there is a program besides, `muslin-probe`,
//! that does. An agent reads one [`Request`] a line from its standard input and
//! writes one [`Answer`] a line to its standard output, both JSON; it ends with its input, and all
//! its listeners with it. [`Agent`] is the other end of these pipes.

use std::io::{self, BufRead, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Context, Result};

mod client;
mod packet;
mod ping;
mod transfer;

pub use client::Agent;

/// Bytes of the longest request.
const MAX_LINE: u64 = 1 << 20;

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
        to: SocketAddrV4,
        /// How many.
        bytes: u64,
        /// Which.
        seed: u64,
    },
    /// Opens a connection that stays, to a listener; the answer is an [`Opened`].
    Open {
        /// The listener.
        to: SocketAddrV4,
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
        to: SocketAddrV4,
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
    pub to: Ipv4Addr,
    /// How many times.
    pub count: u16,
    /// Milliseconds between two.
    pub interval_ms: u64,
    /// Bytes of payload: 28 less than the IP packet.
    pub size: usize,
    /// Time to live, if not the system's.
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
    pub fn new(to: Ipv4Addr) -> Self {
        Self {
            to,
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
    /// The reply's TTL, where the system reports it.
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
    pub from: Ipv4Addr,
    /// ICMP type.
    #[serde(rename = "type")]
    pub kind: u8,
    /// ICMP code.
    pub code: u8,
    /// Next hop's MTU in bytes, of "fragmentation needed".
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
    pub address: Option<Ipv4Addr>,
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

/// Serves standard input and output until the input ends.
///
/// # Errors
/// If the pipes fail.
pub fn main() -> Result<()> {
    let state = State::default();
    serve(state, io::stdin().lock(), io::stdout().lock()).context("the agent's pipes")
}

/// The same with frames as they are.
///
/// # Errors
/// If the pipes fail.
pub fn probe() -> Result<()> {
    let state = State {
        frames: Some(Frames::default()),
        ..State::default()
    };
    serve(state, io::stdin().lock(), io::stdout().lock()).context("the probe's pipes")
}

fn serve(mut state: State, mut input: impl BufRead, mut output: impl Write) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        if line.last() != Some(&b'\n') && line.len() as u64 == MAX_LINE {
            return Err(io::Error::other("a request is too long"));
        }
        let answer = serde_json::from_slice(&line)
            .map_err(|error| format!("no request: {error}"))
            .and_then(|request| state.answer(request))
            .map_or_else(Answer::Error, Answer::Ok);
        serde_json::to_writer(&mut output, &answer)?;
        output.write_all(b"\n")?;
        output.flush()?;
    }
}

#[derive(Default)]
struct State {
    connections: transfer::Connections,
    /// The way to frames, if it has one.
    frames: Option<Frames>,
}

#[derive(Default)]
struct Frames {
    capture: Option<packet::Capture>,
    injector: packet::Injector,
}

impl State {
    fn frames(&mut self) -> std::result::Result<&mut Frames, String> {
        let frames = self.frames.as_mut();
        frames.ok_or_else(|| "only 'muslin-probe' sends and shows frames".to_owned())
    }

    fn answer(&mut self, request: Request) -> std::result::Result<Value, String> {
        let text = |error: io::Error| error.to_string();
        match request {
            Request::Ping(ping) => ping::ping(&ping).map(json).map_err(text)?,
            Request::Listen { port } => transfer::listen(port).map(json).map_err(text)?,
            Request::Send { to, bytes, seed } => {
                transfer::send(to, bytes, seed).map(json).map_err(text)?
            }
            Request::Open { to } => self.connections.open(to).map(json).map_err(text)?,
            Request::Exchange { id, bytes, seed } => {
                let exchanged = self.connections.exchange(id, bytes, seed);
                exchanged.map(json).map_err(text)?
            }
            Request::Close { id } => self.connections.close(id).map(json).map_err(text)?,
            Request::Udp {
                to,
                count,
                size,
                timeout_ms,
            } => {
                let echoed = transfer::datagrams(to, count, size, timeout_ms);
                echoed.map(json).map_err(text)?
            }
            Request::Interfaces {} => packet::interfaces().map(json).map_err(text)?,
            Request::Inject { interface, frames } => {
                let sent = self.frames()?.injector.send(&interface, &frames);
                sent.map(json).map_err(text)?
            }
            Request::Capture { interface } => {
                let frames = self.frames()?;
                frames.capture = Some(packet::Capture::start(&interface).map_err(text)?);
                json(())
            }
            Request::Captured {} => {
                let capture = self
                    .frames()?
                    .capture
                    .take()
                    .ok_or("no capture is running")?;
                capture.finish().map(json).map_err(text)?
            }
        }
    }
}

fn json(value: impl Serialize) -> std::result::Result<Value, String> {
    serde_json::to_value(value).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(input: &str) -> Vec<Answer> {
        let mut output = Vec::new();
        serve(State::default(), input.as_bytes(), &mut output).unwrap();
        String::from_utf8(output)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn line(request: &Request) -> String {
        serde_json::to_string(request).unwrap() + "\n"
    }

    fn ok<T: serde::de::DeserializeOwned>(answer: &Answer) -> T {
        match answer {
            Answer::Ok(value) => serde_json::from_value(value.clone()).unwrap(),
            Answer::Error(text) => panic!("{text}"),
        }
    }

    #[test]
    fn nonsense_is_refused_and_the_next_request_answered() {
        let input = "nonsense\n\n{\"do\":\"fly\"}\n{\"do\":\"close\",\"id\":7}\n\
                     {\"do\":\"captured\"}\n{\"do\":\"inject\",\"interface\":\"none\",\
                     \"frames\":[\"0g\"]}\n{\"do\":\"interfaces\"}";
        let answers = talk(input);
        assert_eq!(answers.len(), 7);
        for answer in &answers[..6] {
            assert!(matches!(answer, Answer::Error(_)), "{answer:?}");
        }
        let interfaces: Vec<Interface> = ok(&answers[6]);
        assert!(interfaces.iter().any(|interface| interface.name == "lo"));
    }

    #[test]
    fn an_agent_has_no_way_to_frames() {
        let interface = "lo".to_owned();
        let frames = vec!["00".repeat(60)];
        let requests = [
            Request::Capture {
                interface: interface.clone(),
            },
            Request::Inject { interface, frames },
            Request::Captured {},
        ];
        for answer in talk(&requests.iter().map(line).collect::<String>()) {
            let Answer::Error(text) = answer else {
                panic!("{answer:?}")
            };
            assert!(text.contains("muslin-probe"), "{text}");
        }
    }

    #[test]
    fn bytes_arrive_and_are_compared() {
        let listening: Listening = ok(&talk(&line(&Request::Listen { port: 0 }))[0]);
        let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, listening.port);
        let input = [
            Request::Send {
                to,
                bytes: 1_000_003,
                seed: 5,
            },
            Request::Send {
                to,
                bytes: 0,
                seed: 5,
            },
            Request::Open { to },
            Request::Exchange {
                id: 0,
                bytes: 100_001,
                seed: 6,
            },
            Request::Exchange {
                id: 0,
                bytes: 1,
                seed: 7,
            },
            Request::Close { id: 0 },
            Request::Udp {
                to,
                count: 3,
                size: 1000,
                timeout_ms: 5000,
            },
        ];
        let answers = talk(&input.iter().map(line).collect::<String>());
        for (index, bytes) in [(0, 1_000_003), (1, 0), (3, 100_001), (4, 1)] {
            let sent: Sent = ok(&answers[index]);
            assert_eq!((sent.bytes, sent.intact), (bytes, true));
        }
        assert_eq!(ok::<Opened>(&answers[2]).id, 0);
        assert_eq!(ok::<Echoed>(&answers[6]), Echoed { sent: 3, intact: 3 });
    }

    #[test]
    fn a_perfect_ping_has_every_reply_once() {
        let reply = |seq| Reply {
            seq,
            rtt_us: 1,
            ttl: Some(64),
            intact: true,
        };
        let mut pinged = Pinged {
            replies: vec![reply(1), reply(0)],
            ..Pinged::default()
        };
        assert!(pinged.is_perfect(2));
        assert!(!pinged.is_perfect(3));
        pinged.replies.push(reply(1));
        assert!(!pinged.is_perfect(2));
        pinged.replies.pop();
        pinged.replies[0].intact = false;
        assert!(!pinged.is_perfect(2));
    }
}
