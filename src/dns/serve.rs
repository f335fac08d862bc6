//! The sockets of pods: queries come in, answers go out.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_seqpacket::UnixSeqpacket;
use tracing::debug;

use super::connector::PodSocket;
use super::forward::{read_message, write_message};
use super::message::Transport;
use super::quota::Turn;
use super::service::{Dns, Reply};

/// Queries of one connection under way to resolvers.
const PIPELINED: u32 = 32;
/// How long a connection may be idle (RFC 7766 section 6.2.3: some seconds).
const IDLE: Duration = Duration::from_secs(10);
/// How long a pod may take to take an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest query in a datagram. A longer one is cut, and so malformed.
const MAX_QUERY: usize = 4096;

/// Serves the pods' sockets until no worker can pass any.
pub(super) async fn receive(dns: Arc<Dns>, mut pod_sockets: mpsc::Receiver<PodSocket>) {
    while let Some(pod_socket) = pod_sockets.recv().await {
        let dns = dns.clone();
        tokio::spawn(async move {
            let pod = pod_socket.pod;
            let served = match pod_socket.transport {
                Transport::Datagram => serve_datagrams(&dns, pod_socket).await,
                Transport::Stream => match dns.connections.enter(pod) {
                    Some(_ticket) => serve_stream(&dns, pod_socket).await,
                    None => Err(io::Error::other("it has too many connections")),
                },
            };
            if let Err(error) = served {
                debug!("DNS with the pod {pod}: {error}");
            }
        });
    }
}

/// Answers datagrams until the flow ends, of which its worker decides.
async fn serve_datagrams(dns: &Arc<Dns>, pod_socket: PodSocket) -> io::Result<()> {
    let pod = pod_socket.pod;
    let socket = Arc::new(UnixSeqpacket::try_from(std::os::fd::OwnedFd::from(
        pod_socket.socket,
    ))?);
    let turn = dns.turns.of(pod);
    let mut query = vec![0; MAX_QUERY];
    loop {
        let len = socket.recv(&mut query).await?.bytes_read();
        if len == 0 {
            return Ok(());
        }
        match take(dns, &turn, pod, (&query[..len], Transport::Datagram)).await {
            Reply::Nothing => {}
            Reply::Now(answer) => send(&socket, &answer).await?,
            Reply::Ask(request, ticket) => {
                let (dns, socket) = (dns.clone(), socket.clone());
                tokio::spawn(async move {
                    let answer = dns.ask(&request, ticket).await;
                    if let Err(error) = send(&socket, &answer).await {
                        debug!("DNS with the pod {pod}: {error}");
                    }
                });
            }
        }
    }
}

/// Takes a query when it is the pod's turn.
async fn take(
    dns: &Dns,
    turn: &Turn,
    pod: IpAddr,
    (query, transport): (&[u8], Transport),
) -> Reply {
    let turn = turn.lock().await;
    let reply = dns.take(pod, query, transport);
    // Another pod comes first, then another socket of this one.
    tokio::task::yield_now().await;
    drop(turn);
    reply
}

async fn send(socket: &UnixSeqpacket, answer: &[u8]) -> io::Result<()> {
    timeout(PATIENCE, socket.send(answer)).await??;
    Ok(())
}

/// Answers the queries of a connection, each when its answer is there (RFC 7766 section 7).
async fn serve_stream(dns: &Arc<Dns>, pod_socket: PodSocket) -> io::Result<()> {
    let pod = pod_socket.pod;
    let stream =
        std::os::unix::net::UnixStream::from(std::os::fd::OwnedFd::from(pod_socket.socket));
    let (mut reader, writer) = UnixStream::from_std(stream)?.into_split();
    let writer = Arc::new(tokio::sync::Mutex::new(writer));
    let turn = dns.turns.of(pod);
    let places = Arc::new(Semaphore::new(PIPELINED as usize));
    while let Some(query) = timeout(IDLE, read_message(&mut reader)).await?? {
        let place = places
            .clone()
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        let (request, ticket) = match take(dns, &turn, pod, (&query, Transport::Stream)).await {
            // A client that sends this is out of sync.
            Reply::Nothing => {
                return Err(io::Error::other("it sent something that is not a query"));
            }
            Reply::Now(answer) => {
                timeout(PATIENCE, write_message(&mut *writer.lock().await, &answer)).await??;
                continue;
            }
            Reply::Ask(request, ticket) => (request, ticket),
        };
        let (dns, writer) = (dns.clone(), writer.clone());
        tokio::spawn(async move {
            let answer = dns.ask(&request, ticket).await;
            let mut writer = writer.lock().await;
            let written = timeout(PATIENCE, write_message(&mut *writer, &answer)).await;
            if !matches!(written, Ok(Ok(()))) {
                debug!("DNS with the pod {pod}: it does not read an answer");
            }
            drop(place);
        });
    }
    // The connection is the pod's until it has all its answers.
    let _ = places.acquire_many(PIPELINED).await;
    Ok(())
}
