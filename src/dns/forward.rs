//! Asking the resolvers of the host.
//!
//! Each query has a socket of its own, so that its port is as unpredictable as its number (RFC
//! 5452), and only what answers its question by that socket counts.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::Resolvers;
use super::message::{Request, Transport};
use crate::state;

/// How long one resolver may take. Most clients ask again after 5 s.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long all may take together.
const ALL: Duration = Duration::from_millis(4500);

/// The answer to a query, from the first resolver that gives one; nothing if none does in time.
pub(super) async fn forward(resolvers: &Resolvers, request: &Request) -> Option<Vec<u8>> {
    let end = Instant::now() + ALL;
    // A lost datagram is sent a second time.
    for round in 0..2 {
        let mut any_is_silent = false;
        for (place, resolver) in resolvers.in_turn() {
            let until = end.min(Instant::now() + PATIENCE);
            match timeout_at(until, ask(resolver, request)).await {
                Ok(Ok(answer)) => {
                    if round == 0 {
                        resolvers.answered(place);
                    }
                    return Some(answer);
                }
                Ok(Err(error)) => debug!("the resolver {resolver}: {error}"),
                Err(_) => {
                    any_is_silent = true;
                    debug!("the resolver {resolver} does not answer");
                }
            }
        }
        if !any_is_silent || Instant::now() >= end {
            // Those that refuse would do so again.
            return None;
        }
    }
    None
}

async fn ask(resolver: SocketAddr, request: &Request) -> io::Result<Vec<u8>> {
    let id = u16::from_ne_bytes(state::random().map_err(io::Error::other)?);
    let query = request.bytes_as(id);
    match request.transport {
        Transport::Datagram => ask_by_datagram(resolver, request, id, &query).await,
        Transport::Stream => ask_by_stream(resolver, request, id, &query).await,
    }
}

async fn ask_by_datagram(
    resolver: SocketAddr,
    request: &Request,
    id: u16,
    query: &[u8],
) -> io::Result<Vec<u8>> {
    let any: IpAddr = match resolver {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let limit = request.limit();
    // One byte more tells an answer that is too long.
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

async fn ask_by_stream(
    resolver: SocketAddr,
    request: &Request,
    id: u16,
    query: &[u8],
) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    stream.set_nodelay(true)?;
    write_message(&mut stream, query).await?;
    let answer = read_message(&mut stream).await?;
    let answer = answer.and_then(|answer| request.take_answer(id, answer));
    answer.ok_or_else(|| io::Error::other("it answers something else"))
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
