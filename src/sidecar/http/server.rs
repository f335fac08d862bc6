//! A server's connection. That a server takes no more is no reason not to hear what it answers: what
//! is sent then goes nowhere, and its answer, or that there is none, is read.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tracing::debug;

/// A connection to a server.
#[derive(Debug)]
pub(super) struct Server<S> {
    stream: S,
    is_deaf: bool,
}

impl<S> Server<S> {
    pub(super) const fn new(stream: S) -> Self {
        Self {
            stream,
            is_deaf: false,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Server<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(task, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Server<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.is_deaf {
            match ready!(Pin::new(&mut self.stream).poll_write(task, bytes)) {
                Err(error) => {
                    debug!("HTTP proxy: a server accepts no more: {error}");
                    self.is_deaf = true;
                }
                written => return Poll::Ready(written),
            }
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_deaf {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_flush(task)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_deaf {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(task)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn the_answer_of_a_server_that_takes_no_more_is_read() {
        let (near, mut far) = tokio::net::UnixStream::pair().unwrap();
        far.write_all(b"413").await.unwrap();
        drop(far);
        let mut server = Server::new(near);
        for _ in 0..3 {
            server.write_all(&[0; 1000]).await.unwrap();
            server.flush().await.unwrap();
        }
        let mut answer = String::new();
        server.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "413");
        server.shutdown().await.unwrap();
    }
}
