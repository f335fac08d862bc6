//! Bytes between a client and the overlay.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::BytesMut;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// What is read at once, in bytes.
const BUFFER_LEN: usize = 64 << 10;
/// After so long without a word a client is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(120);
/// How long the other end may be silent after one has ended. Nobody may be there any more, and
/// nothing else would tell.
const HALF_CLOSED: Duration = Duration::from_secs(5 * 60);

/// Copies both ways until both ends have ended, or the second says nothing more; each sees the other's
/// end. A reset is passed on.
pub(super) async fn relay(
    mut client: TcpStream,
    other: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    let copied = copy_both(&mut client, other).await;
    if copied.is_err() {
        // Closing sends a reset then; where it cannot be set, the end is an ordinary one.
        let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
    }
    copied
}

/// Has the system find out whether a client of a relay is there, and send what comes for it at once.
pub(super) fn prepare(client: &TcpStream) -> io::Result<()> {
    // Waiting for more is for the pod's own system.
    client.set_nodelay(true)?;
    SockRef::from(client).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE))
}

/// Copies both ways until both ends have ended, or the second says nothing more; each sees the other's
/// end.
pub(super) async fn copy_both(
    client: impl AsyncRead + AsyncWrite + Unpin,
    other: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    copy_patiently(client, other, HALF_CLOSED).await
}

async fn copy_patiently(
    client: impl AsyncRead + AsyncWrite + Unpin,
    other: impl AsyncRead + AsyncWrite + Unpin,
    patience: Duration,
) -> io::Result<()> {
    let (from_client, to_client) = split(client);
    let (from_other, to_other) = split(other);
    let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut outwards = pin!(copy(from_client, to_other, &out));
    let mut backwards = pin!(copy(from_other, to_client, &back));
    tokio::select! {
        done = &mut outwards => {
            done?;
            while_heard(backwards, &back, patience).await
        }
        done = &mut backwards => {
            done?;
            while_heard(outwards, &out, patience).await
        }
    }
}

/// Copies until the end, and passes that on; counts the bytes.
async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    count: &AtomicU64,
) -> io::Result<()> {
    loop {
        let mut part = read(&mut from).await?;
        if part.is_empty() {
            return to.shutdown().await;
        }
        count.fetch_add(part.len() as u64, Relaxed);
        to.write_all_buf(&mut part).await?;
    }
}

/// Reads what there is. No memory is held until there is something: most connections are silent.
async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<BytesMut> {
    poll_fn(|context| {
        let mut part = BytesMut::with_capacity(BUFFER_LEN);
        let read = pin!(from.read_buf(&mut part)).poll(context);
        read.map_ok(|_| part)
    })
    .await
}

/// Waits for the end of what still brings something.
async fn while_heard(
    mut copied: impl Future<Output = io::Result<()>> + Unpin,
    count: &AtomicU64,
    patience: Duration,
) -> io::Result<()> {
    loop {
        let before = count.load(Relaxed);
        match timeout(patience, &mut copied).await {
            Ok(done) => return done,
            Err(_) if count.load(Relaxed) == before => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};
    use tokio::net::TcpListener;

    use super::*;

    /// A client, the relay's end of its connection, and both ends of one to somewhere else.
    async fn ends() -> (TcpStream, TcpStream, DuplexStream, DuplexStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        let (other, server) = duplex(1024);
        (client.unwrap(), accepted.unwrap().0, other, server)
    }

    #[tokio::test]
    async fn both_ways_end_by_themselves() {
        let (mut client, accepted, other, mut server) = ends().await;
        let relayed = relay(accepted, other);
        let talk = async {
            client.write_all(&[7; 100_000]).await.unwrap();
            client.shutdown().await.unwrap();
            let mut all = Vec::new();
            server.read_to_end(&mut all).await.unwrap();
            assert_eq!(all, [7; 100_000]);
            server.write_all(b"answer").await.unwrap();
            drop(server);
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "answer");
        };
        let (relayed, ()) = tokio::join!(relayed, talk);
        relayed.unwrap();
    }

    #[tokio::test]
    async fn who_is_left_alone_is_not_waited_for() {
        const PATIENCE: Duration = Duration::from_millis(200);
        let (mut client, mut accepted, other, mut server) = ends().await;
        let relayed = copy_patiently(&mut accepted, other, PATIENCE);
        let talk = async {
            client.shutdown().await.unwrap();
            // What still comes is waited for.
            for _ in 0..6 {
                tokio::time::sleep(PATIENCE / 2).await;
                server.write_all(b"x").await.unwrap();
            }
        };
        let (relayed, ()) = tokio::join!(relayed, talk);
        assert_eq!(relayed.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let mut said = [0; 6];
        client.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"xxxxxx");
    }
}
