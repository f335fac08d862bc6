//! Many datagrams by one system call.

#![allow(
    unsafe_code,
    reason = "the safe interfaces cannot keep their headers from call to call"
)]

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use nix::libc;

/// Datagrams per system call.
pub(crate) const BATCH: usize = 64;

/// Buffers for datagrams and the headers that tell the kernel where they are.
pub(crate) struct Batch {
    bytes: Vec<u8>,
    size: usize,
    /// Points into `bytes`, which never moves.
    vectors: Vec<libc::iovec>,
    /// Points into `vectors`, which never moves.
    headers: Vec<libc::mmsghdr>,
}

impl Batch {
    /// Buffers of this size for each datagram.
    pub(crate) fn new(size: usize) -> Self {
        let mut bytes = vec![0; size * BATCH];
        let mut vectors: Vec<_> = bytes
            .chunks_mut(size)
            .map(|chunk| libc::iovec {
                iov_base: chunk.as_mut_ptr().cast(),
                iov_len: size,
            })
            .collect();
        let headers = vectors
            .iter_mut()
            .map(|vector| {
                // SAFETY: all zeroes are a valid header: no address, no data, no control messages.
                let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                header.msg_hdr.msg_iov = vector;
                header.msg_hdr.msg_iovlen = 1;
                header
            })
            .collect();
        Self {
            bytes,
            size,
            vectors,
            headers,
        }
    }

    /// The buffers, to be filled.
    pub(crate) fn buffers(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.bytes.chunks_mut(self.size)
    }

    /// Sends all buffers on a connected socket and returns how many went.
    pub(crate) fn send(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        debug_assert_eq!(self.vectors.len(), BATCH);
        // SAFETY: there are so many headers, and what they point to lives as long as `self`.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as u32,
                0,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Waits for datagrams and returns those that are there.
    pub(crate) fn receive(
        &mut self,
        socket: &UdpSocket,
    ) -> io::Result<impl Iterator<Item = &[u8]>> {
        // SAFETY: there are so many headers; the buffers they point to live as long as `self`, are
        // as large as the vectors say, and are borrowed by nobody else while `self` is.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_WAITFORONE,
                std::ptr::null_mut(),
            )
        };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        let buffers = self.bytes.chunks(self.size).zip(&self.headers);
        Ok(buffers.take(received).map(|(buffer, header)| {
            // A datagram larger than its buffer is cut, and its content wrong then.
            &buffer[..buffer.len().min(header.msg_len as usize)]
        }))
    }
}
