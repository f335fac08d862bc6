//! Asking the resolvers of the host.
//!
//! The next resolver is asked when one fails, or takes its time; the first answer that is none of a
//! failure counts. Each query has a socket of its own, so that its port is as unpredictable as its
//! number (RFC 5452), and only what answers its question by that socket counts.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::message::{Answer, Request, Transport};
use super::resolvers::{Resolvers, Turn};
use crate::random::random;

/// How long one resolver is asked alone.
const HEAD_START: Duration = Duration::from_secs(1);
/// After so long a datagram counts as lost, and is sent again.
const LOST: Duration = Duration::from_secs(2);
/// How long all may take together. Most clients ask again after 5 s.
const ALL: Duration = Duration::from_millis(4500);
/// How long those may take that did not answer lately, if there are no others.
const SILENT: Duration = Duration::from_secs(1);

/// The answer to a query: the first that is none of a failure, or else a failure; nothing if there
/// is none in time.
pub(super) async fn forward(resolvers: &Resolvers, request: &Request) -> Option<Vec<u8>> {
    let mut round = Round::new(resolvers);
    let mut outcomes = FuturesUnordered::new();
    let answer = loop {
        tokio::select! {
            biased;
            Some((turn, outcome)) = outcomes.next() => {
                if let Some(answer) = round.take(turn, outcome) {
                    break Some(answer);
                }
                if round.is_over() {
                    break None;
                }
            }
            () = sleep_until(round.next_at), if !round.waiting.is_empty() => {
                if let Some(turn) = round.next() {
                    outcomes.push(async move { (turn, ask(turn.address, request).await) });
                }
            }
            () = sleep_until(round.end) => break None,
        }
    };
    round.finish();
    answer.or(round.failure.map(|(_, answer)| answer))
}

/// A query on its way from one resolver to the next.
struct Round<'a> {
    resolvers: &'a Resolvers,
    /// All of them, in the order in which they are asked.
    turns: Vec<Turn>,
    waiting: VecDeque<Turn>,
    /// Those that were asked and of which nothing came yet, and when that was.
    asked: Vec<(Turn, Instant)>,
    /// The failure that the foremost one answers.
    failure: Option<(usize, Vec<u8>)>,
    /// When the next one is asked.
    next_at: Instant,
    end: Instant,
}

impl<'a> Round<'a> {
    fn new(resolvers: &'a Resolvers) -> Self {
        let (turns, now) = (resolvers.in_turn(), Instant::now());
        let mut round = Self {
            resolvers,
            waiting: turns.iter().copied().collect(),
            turns,
            asked: Vec::new(),
            failure: None,
            next_at: now,
            end: now + ALL,
        };
        round.hurry();
        round
    }

    /// Whom to ask now.
    fn next(&mut self) -> Option<Turn> {
        let turn = self.waiting.pop_front()?;
        let now = Instant::now();
        self.asked.push((turn, now));
        self.next_at = if turn.is_silent {
            now
        } else {
            now + HEAD_START
        };
        Some(turn)
    }

    /// Takes what came of asking one; the answer, if another one need not be asked.
    fn take(&mut self, turn: Turn, outcome: io::Result<Answer>) -> Option<Vec<u8>> {
        let address = turn.address;
        match outcome {
            Ok(answer) => {
                self.resolvers.answered(address);
                if !answer.is_failure {
                    return Some(answer.bytes);
                }
                debug!("the resolver {address} fails");
                let place = self.turns.iter().position(|it| *it == turn);
                let place = place.unwrap_or(usize::MAX);
                if self
                    .failure
                    .as_ref()
                    .is_none_or(|(known, _)| place < *known)
                {
                    self.failure = Some((place, answer.bytes));
                }
            }
            Err(error) => {
                debug!("the resolver {address}: {error}");
                self.note_if_silent(turn);
            }
        }
        self.asked.retain(|(asked, _)| *asked != turn);
        self.next_at = Instant::now();
        self.hurry();
        None
    }

    /// Whether no resolver is left.
    fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.asked.is_empty()
    }

    /// Does not wait for long for those that did not answer lately, if they are all that is left.
    fn hurry(&mut self) {
        let asked = self.asked.iter().map(|(turn, _)| turn);
        if self.waiting.iter().chain(asked).all(|turn| turn.is_silent) {
            self.end = self.end.min(Instant::now() + SILENT);
        }
    }

    /// Notes who has not answered.
    fn finish(&self) {
        for (turn, _) in &self.asked {
            debug!("the resolver {} does not answer", turn.address);
            self.note_if_silent(*turn);
        }
    }

    fn note_if_silent(&self, turn: Turn) {
        let asked = self.asked.iter().find(|(asked, _)| *asked == turn);
        if let Some((_, at)) = asked.filter(|(_, at)| at.elapsed() >= HEAD_START) {
            self.resolvers.is_silent_since(turn.address, at.into_std());
        }
    }
}

/// Asks one resolver, until it answers or cannot be asked.
async fn ask(resolver: SocketAddr, request: &Request) -> io::Result<Answer> {
    match request.transport {
        Transport::Datagram => loop {
            if let Ok(outcome) = timeout(LOST, ask_by_datagram(resolver, request)).await {
                return outcome;
            }
        },
        Transport::Stream => ask_by_stream(resolver, request).await,
    }
}

/// The query with an unpredictable ID.
fn numbered(request: &Request) -> io::Result<(u16, Vec<u8>)> {
    let id = u16::from_ne_bytes(random().map_err(io::Error::other)?);
    Ok((id, request.bytes_as(id)))
}

async fn ask_by_datagram(resolver: SocketAddr, request: &Request) -> io::Result<Answer> {
    let (id, query) = numbered(request)?;
    let any: IpAddr = match resolver {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(&query).await?;
    let limit = request.limit();
    // One byte more reveals an answer that is too long.
    let mut buffer = vec![0; limit + 1];
    loop {
        let len = socket.recv(&mut buffer).await?;
        let Some(answer) = request.take_answer(id, buffer[..len].to_vec()) else {
            continue;
        };
        return Ok(if len > limit {
            request.truncated()
        } else {
            answer
        });
    }
}

async fn ask_by_stream(resolver: SocketAddr, request: &Request) -> io::Result<Answer> {
    let (id, query) = numbered(request)?;
    let mut stream = TcpStream::connect(resolver).await?;
    stream.set_nodelay(true)?;
    write_message(&mut stream, &query).await?;
    let answer = read_message(&mut stream).await?;
    let answer = answer.and_then(|answer| request.take_answer(id, answer));
    answer.ok_or_else(|| io::Error::other("the answer does not match the query"))
}

/// Reads a message with its length in front; nothing where the stream ends between two.
pub(super) async fn read_message(
    stream: &mut (impl AsyncReadExt + Unpin),
) -> io::Result<Option<Vec<u8>>> {
    let len = match stream.read_u16().await {
        Ok(len) => len,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; len.into()];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Writes a message with its length in front, at once.
pub(super) async fn write_message(
    stream: &mut (impl AsyncWriteExt + Unpin),
    message: &[u8],
) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(io::Error::other)?;
    let framed = [&len.to_be_bytes(), message].concat();
    stream.write_all(&framed).await
}
