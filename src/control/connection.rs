//! One end of a control connection: JSON messages with descriptors.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{self, Poll, ready};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_seqpacket::UnixSeqpacket;
use tokio_seqpacket::ancillary::{AncillaryMessageWriter, OwnedAncillaryMessage};

/// The longest message in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Descriptors that may be beside a message: one for each queue of a device.
pub(super) const MAX_BESIDE: usize = 64;
/// Room for control data: a header and those descriptors.
const ANCILLARY_LEN: usize = 32 + 4 * MAX_BESIDE;

/// A message's bytes and the descriptors beside it.
type Packet = (Vec<u8>, Vec<OwnedFd>);

/// A connection.
#[derive(Debug)]
pub struct Connection(UnixSeqpacket);

impl Connection {
    /// A connection over an open socket.
    #[must_use]
    pub fn new(socket: UnixSeqpacket) -> Self {
        Self(socket)
    }

    /// Sends a message, with descriptors if there are some.
    ///
    /// # Errors
    /// `InvalidInput` if it is longer than `MAX_MESSAGE`; else the socket's.
    pub async fn send(
        &self,
        message: &impl Serialize,
        beside: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the message is too long",
            ));
        }
        let mut room = [0; ANCILLARY_LEN];
        let mut ancillary = AncillaryMessageWriter::new(&mut room);
        ancillary.add_fds(beside)?;
        self.0.send_with_ancillary(&bytes, &mut ancillary).await?;
        Ok(())
    }

    /// Receives a message and the descriptors beside it; `None` at the end.
    ///
    /// # Errors
    /// `InvalidData` for what is not such a message, or is longer than `MAX_MESSAGE`.
    pub async fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let Some((bytes, beside)) = poll_fn(|context| self.poll_packet(context)).await? else {
            return Ok(None);
        };
        let message = serde_json::from_slice(&bytes);
        // Otherwise a message that breaks off would count as a broken connection.
        let message = message.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((message, beside)))
    }

    /// The next packet. There is a buffer only while there is one: most connections are those of
    /// attached pods, which have nothing to say.
    fn poll_packet(&self, context: &mut task::Context<'_>) -> Poll<io::Result<Option<Packet>>> {
        let mut bytes = vec![0; MAX_MESSAGE + 1];
        let mut room = [0; ANCILLARY_LEN];
        let received = self
            .0
            .poll_recv_with_ancillary(context, &mut bytes, &mut room);
        let (info, ancillary) = ready!(received)?;
        // All descriptors are owned here, so that those we did not ask for are closed.
        let mut beside = Vec::new();
        for message in ancillary.into_messages() {
            if let OwnedAncillaryMessage::FileDescriptors(descriptors) = message {
                beside.extend(descriptors);
            }
        }
        let len = info.bytes_read();
        if len > MAX_MESSAGE || info.truncated() {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the message is too long",
            )));
        }
        bytes.truncate(len);
        Poll::Ready(Ok((len > 0).then_some((bytes, beside))))
    }

    /// Another descriptor of the socket, for another process.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub(crate) fn copy(&self) -> io::Result<OwnedFd> {
        self.0.as_fd().try_clone_to_owned()
    }

    /// The other end's user.
    ///
    /// # Errors
    /// The socket's.
    pub fn peer_uid(&self) -> io::Result<u32> {
        Ok(self.0.peer_cred()?.uid())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[tokio::test]
    async fn messages_and_descriptors_arrive() {
        let (one, other) = UnixSeqpacket::pair().unwrap();
        let (one, other) = (Connection::new(one), Connection::new(other));
        let file = tempfile::tempfile().unwrap();
        one.send(&"hello", &[file.as_fd(), file.as_fd()])
            .await
            .unwrap();
        one.send(&7, &[]).await.unwrap();
        let (text, descriptor) = other.receive::<String>().await.unwrap().unwrap();
        assert_eq!(text, "hello");
        assert_eq!(descriptor.len(), 2);
        let error = other.receive::<String>().await.unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::InvalidData,
            "a number is no text"
        );
        assert!(one.send(&"x".repeat(MAX_MESSAGE), &[]).await.is_err());
        one.0.send(b"\"breaks o").await.unwrap();
        let error = other.receive::<String>().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        drop(one);
        assert!(other.receive::<String>().await.unwrap().is_none());
    }
}
