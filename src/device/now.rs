//! Reads and writes that never wait.
//!
//! O_NONBLOCK belongs to the open file, which whoever passed a descriptor still has: it can be
//! cleared at any time, and the thread that carries everybody's packets would wait for one pod. So
//! every call says by itself that it must not wait.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use arrayvec::ArrayVec;
use muslin_encap::offload::merge::MAX_SEGMENTS;
use muslin_encap::offload::virtio::Header;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};
use nix::sys::uio::{readv, writev};
use rustix::io::{ReadWriteFlags, preadv2, pwritev2};

/// Where a file is read that has no places.
const NOWHERE: u64 = u64::MAX;

/// Whether the kernel's TAP devices know RWF_NOWAIT (Linux since 5.8).
static IS_KNOWN: AtomicBool = AtomicBool::new(true);

/// Reads from a TAP device.
///
/// # Errors
/// `WouldBlock` if there is nothing.
pub(super) fn read(device: BorrowedFd<'_>, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    match if_known(|flags| preadv2(device, parts, NOWHERE, flags)) {
        Some(done) => done,
        None => {
            stop_waiting(device)?;
            Ok(readv(device, parts)?)
        }
    }
}

/// Writes to a TAP device.
///
/// # Errors
/// `WouldBlock` if it takes no more.
pub(super) fn write(device: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    match if_known(|flags| pwritev2(device, parts, NOWHERE, flags)) {
        Some(done) => done,
        None => {
            stop_waiting(device)?;
            Ok(writev(device, parts)?)
        }
    }
}

/// What a call with RWF_NOWAIT returns; nothing where the kernel does not know that.
fn if_known(
    call: impl FnOnce(ReadWriteFlags) -> rustix::io::Result<usize>,
) -> Option<io::Result<usize>> {
    if !IS_KNOWN.load(Ordering::Relaxed) {
        return None;
    }
    let done = call(ReadWriteFlags::NOWAIT);
    if done == Err(rustix::io::Errno::OPNOTSUPP) {
        IS_KNOWN.store(false, Ordering::Relaxed);
        return None;
    }
    Some(done.map_err(io::Error::from))
}

/// Lets calls for a file return at once, as long as nobody else changes that: what there is for
/// kernels that know nothing better.
pub(super) fn stop_waiting(file: BorrowedFd<'_>) -> io::Result<()> {
    let status = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL)?);
    if !status.contains(OFlag::O_NONBLOCK) {
        fcntl(file, FcntlArg::F_SETFL(status | OFlag::O_NONBLOCK))?;
    }
    Ok(())
}

/// Takes the next message from a socket.
///
/// # Errors
/// `WouldBlock` if there is none.
pub(super) fn receive(socket: BorrowedFd<'_>, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT;
    Ok(recvmsg::<()>(socket.as_raw_fd(), parts, None, flags)?.bytes)
}

/// Gives a socket a message.
///
/// # Errors
/// `WouldBlock` if it takes no more.
pub(super) fn send(socket: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    Ok(sendmsg::<()>(socket.as_raw_fd(), parts, &[], flags, None)?)
}

/// Gives a socket a frame as one message: a virtio-net header if there is one, `head` and all of
/// `tail`, which has at most [`MAX_SEGMENTS`] - 1 pieces.
///
/// # Errors
/// `WouldBlock` if it takes no more.
pub(crate) fn send_frame(
    socket: &impl AsFd,
    header: Option<&Header>,
    head: &[u8],
    tail: &[&[u8]],
) -> io::Result<()> {
    with_parts(header, head, tail, |parts| send(socket.as_fd(), parts))
}

/// The pieces of a frame for one call.
pub(super) fn with_parts(
    header: Option<&Header>,
    head: &[u8],
    tail: &[&[u8]],
    call: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>,
) -> io::Result<()> {
    let header = header.map(Header::to_bytes);
    let mut parts = ArrayVec::<IoSlice<'_>, { MAX_SEGMENTS + 1 }>::new();
    parts.extend(header.iter().map(|header| IoSlice::new(header)));
    parts.push(IoSlice::new(head));
    for piece in tail {
        let pushed = parts.try_push(IoSlice::new(piece));
        pushed.map_err(|_| Errno::EMSGSIZE)?;
    }
    call(&parts)?;
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Lets calls for a file wait again, as somebody else does who has it, too.
    pub(crate) fn clear_nonblock(file: &impl AsFd) {
        let status = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL).unwrap());
        fcntl(file, FcntlArg::F_SETFL(status - OFlag::O_NONBLOCK)).unwrap();
    }

    /// What a call that must not wait returns.
    pub(crate) fn at_once<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || sender.send(call()));
        let returned = receiver.recv_timeout(Duration::from_secs(20));
        returned.expect("it does not wait")
    }

    #[test]
    fn a_file_that_waits_is_told_not_to() {
        let (reader, _writer) = io::pipe().unwrap();
        let returned = at_once(move || {
            stop_waiting(reader.as_fd()).unwrap();
            clear_nonblock(&reader);
            stop_waiting(reader.as_fd()).unwrap();
            readv(&reader, &mut [IoSliceMut::new(&mut [0; 9])])
        });
        assert_eq!(returned, Err(Errno::EAGAIN));
    }
}
