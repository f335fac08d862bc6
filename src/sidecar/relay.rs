//! Bytes between a client and the overlay.

use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{self, Poll};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader, ReadBuf, copy_buf, split};
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
    // What the pod sends goes on at once; waiting for more is for its own system.
    client.set_nodelay(true)?;
    SockRef::from(&client).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE))?;
    let copied = copy_both(&mut client, other, HALF_CLOSED).await;
    if copied.is_err() {
        // Closing sends a reset then; where it cannot be set, the end is an ordinary one.
        let _ = SockRef::from(&client).set_linger(Some(Duration::ZERO));
    }
    copied
}

async fn copy_both(
    client: &mut TcpStream,
    other: impl AsyncRead + AsyncWrite + Unpin,
    patience: Duration,
) -> io::Result<()> {
    let (from_client, to_client) = client.split();
    let (from_other, to_other) = split(other);
    let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut outwards = pin!(copy(Counted(from_client, &out), to_other));
    let mut backwards = pin!(copy(Counted(from_other, &back), to_client));
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

/// Copies until the end, and passes that on.
async fn copy(from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    copy_buf(&mut BufReader::with_capacity(BUFFER_LEN, from), &mut to).await?;
    to.shutdown().await
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

/// Counts what is read.
struct Counted<'a, R>(R, &'a AtomicU64);

impl<R: AsyncRead + Unpin> AsyncRead for Counted<'_, R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.0).poll_read(context, buffer);
        let len = buffer.filled().len() - before;
        self.1.fetch_add(len as u64, Relaxed);
        read
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, DuplexStream, duplex};
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
        let relayed = copy_both(&mut accepted, other, PATIENCE);
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
