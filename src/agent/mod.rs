//! The agent in a pod: pings and transfers on request.
//!
//! `muslin demo`, `muslin doctor` and `muslin ping` run `muslin agent` in pods, so that these need nothing but
//! this binary. Frames as they are it neither sends nor shows, since that would be a way to those of
//! others where the program has capabilities; for tests there is a program besides, `muslin-probe`,
//! that does. An agent reads one [`Request`] a line from its standard input and
//! writes one [`Answer`] a line to its standard output, both JSON; it ends with its input, and all
//! its listeners with it. [`Agent`] is the other end of these pipes.

use std::io::{self, BufRead, Read, Write};

use serde::Serialize;
use serde_json::Value;

use crate::error::{Context, Result};

mod client;
mod packet;
mod ping;
mod pods;
mod protocol;
mod transfer;

pub use client::Agent;
pub use protocol::{
    Answer, Echoed, Exchanged, IcmpError, Interface, Listening, Opened, Ping, Pinged, Refused,
    Reply, Request, Sent,
};

/// Bytes of the longest request.
const MAX_LINE: u64 = 1 << 20;

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
    use std::net::{Ipv4Addr, SocketAddr};

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
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, listening.port));
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
