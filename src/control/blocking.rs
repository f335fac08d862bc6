//! One end of a control connection without a runtime: whoever uses it waits, until a deadline.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};

use super::connection::{MAX_BESIDE, MAX_MESSAGE};

/// A connection.
#[derive(Debug)]
pub(crate) struct BlockingConnection(OwnedFd);

impl BlockingConnection {
    /// A connection over an open `SOCK_SEQPACKET` socket.
    pub(crate) fn new(socket: impl Into<OwnedFd>) -> Self {
        Self(socket.into())
    }

    /// Connects to the node that listens at a socket.
    ///
    /// # Errors
    /// `NotFound` if there is no socket, `ConnectionRefused` if nobody listens, `WouldBlock` at the
    /// deadline, and what else `connect` says.
    pub(crate) fn connect(path: &Path, until: Instant) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        // Also that of `connect`, which waits while too many others do. Zero would be no limit.
        let left = until.saturating_duration_since(Instant::now());
        socket.set_write_timeout(Some(left.max(Duration::from_millis(1))))?;
        socket.connect(&SockAddr::unix(path)?)?;
        Ok(Self::new(socket))
    }

    /// Sends a message, with descriptors if there are some.
    ///
    /// # Errors
    /// `InvalidInput` if it is longer than `MAX_MESSAGE`, `TimedOut` at the deadline; else the socket's.
    pub(crate) fn send(
        &self,
        message: &impl Serialize,
        beside: &[BorrowedFd<'_>],
        until: Instant,
    ) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut room = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_BESIDE))];
        let mut rights = SendAncillaryBuffer::new(&mut room);
        if !beside.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(beside)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = [IoSlice::new(&bytes)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        self.by(until, PollFlags::POLLOUT, || {
            sendmsg(&self.0, &bytes, &mut rights, flags)
        })?;
        Ok(())
    }

    /// Receives a message and the descriptors beside it; `None` at the end.
    ///
    /// # Errors
    /// `InvalidData` for what is not such a message, or is longer than `MAX_MESSAGE`; `TimedOut` at the
    /// deadline.
    pub(crate) fn receive<T: DeserializeOwned>(
        &self,
        until: Instant,
    ) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; MAX_MESSAGE + 1];
        let mut room = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_BESIDE))];
        let mut beside = Vec::new();
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let len = self.by(until, PollFlags::POLLIN, || {
            let mut rights = RecvAncillaryBuffer::new(&mut room);
            let mut pieces = [IoSliceMut::new(&mut bytes)];
            let received = recvmsg(&self.0, &mut pieces, &mut rights, flags)?;
            for message in rights.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    beside.extend(descriptors);
                }
            }
            Ok(received.bytes)
        })?;
        if len == 0 {
            return Ok(None);
        }
        let message = bytes.get(..len).filter(|it| it.len() <= MAX_MESSAGE);
        let message = message.ok_or(io::ErrorKind::InvalidData)?;
        let message = serde_json::from_slice(message)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((message, beside)))
    }

    /// Another descriptor of the socket.
    ///
    /// # Errors
    /// If there are no more.
    pub(crate) fn copy(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// The socket, for a runtime.
    pub(crate) fn into_socket(self) -> OwnedFd {
        self.0
    }

    /// Does what the socket can do as soon as it can.
    fn by<T>(
        &self,
        until: Instant,
        event: PollFlags,
        mut attempt: impl FnMut() -> rustix::io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match attempt() {
                Err(rustix::io::Errno::AGAIN) => {}
                Err(rustix::io::Errno::INTR) => continue,
                result => return result.map_err(io::Error::from),
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut waits = [PollFd::new(self.0.as_fd(), event)];
            // Whatever it says, the next attempt shows what there is.
            let _ = poll(&mut waits, timeout(left));
        }
    }
}

/// A time to wait that ends no earlier.
fn timeout(left: Duration) -> PollTimeout {
    let millis = left.as_millis() + 1;
    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_in_time() {
        let (one, other) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let (one, other) = (BlockingConnection::new(one), BlockingConnection::new(other));
        let soon = || Instant::now() + Duration::from_secs(60);
        let file = tempfile::tempfile().unwrap();
        one.send(&"hello", &[file.as_fd(), file.as_fd()], soon())
            .unwrap();
        one.send(&7, &[], soon()).unwrap();
        let (text, beside) = other.receive::<String>(soon()).unwrap().unwrap();
        assert_eq!((text.as_str(), beside.len()), ("hello", 2));
        let error = other.receive::<String>(soon()).unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::InvalidData,
            "a number is no text"
        );
        let error = other.receive::<String>(Instant::now()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let long = one.send(&"x".repeat(MAX_MESSAGE), &[], soon()).unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::InvalidInput);
        drop(one);
        assert!(other.receive::<String>(soon()).unwrap().is_none());
    }
}
