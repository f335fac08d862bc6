//! A client's connection, which is more than hyper's: it is seen whether the client sends on, and the
//! end is such that the client can read what it was answered.

use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a client is listened to that was answered before it had said all.
const FAREWELL: Duration = Duration::from_secs(10);

/// A client; clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Client(Arc<TcpStream>);

impl Client {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self(Arc::new(stream))
    }

    /// Waits until the client has sent something that is still unread, or has ended.
    pub(super) async fn sends(&self) {
        // Reading reports its error.
        let _ = self.0.peek(&mut [0]).await;
    }

    /// Ends the connection. A client that still sends would be told of a reset, and could lose what
    /// it was answered, so it is listened to for a while (RFC 9112 section 9.6).
    pub(super) async fn end(self) {
        // It may have ended by itself.
        let _ = SockRef::from(&*self.0).shutdown(Shutdown::Write);
        let mut rest = vec![0; 16 << 10];
        let mut listen = async || {
            while self.0.readable().await.is_ok() {
                match self.0.try_read(&mut rest) {
                    Ok(0) => return,
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                    Ok(_) | Err(_) => {}
                }
            }
        };
        // Whoever sends for ever is not listened to for ever.
        let _ = timeout(FAREWELL, listen()).await;
    }
}

impl AsyncRead for Client {
    fn poll_read(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(task))?;
            match self.0.try_read(buffer.initialize_unfilled()) {
                Ok(len) => {
                    buffer.advance(len);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Client {
    fn poll_write(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(task, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        task: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(task))?;
            match self.0.try_write_vectored(parts) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(&*self.0).shutdown(Shutdown::Write))
    }
}
