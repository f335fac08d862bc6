//! Many messages per system call: `recvmmsg` into buffers that are reused.

#![allow(unsafe_code)] // the call and its headers; each block says why it is sound

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use arrayvec::ArrayVec;
use nix::libc;

use crate::host::option;

/// Messages of one `recvmmsg` where they are short.
const MANY: usize = 64;
/// Messages where they are long: what is read must still be in the cache when it is sent.
const FEW: usize = 16;
/// Bytes of the longest short message. A train of datagrams or a superpacket is longer.
const SHORT_LEN: usize = 2048;
/// Room for control messages: a segment length takes 24 bytes.
pub(super) const CONTROL_LEN: usize = 32;

/// Control messages, where the kernel may write and read their headers.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(super) struct Control(pub(super) [u8; CONTROL_LEN]);

/// Messages of one call, with what was known of each. The buffers are used again from the first on,
/// so that those in use stay in the cache.
#[derive(Debug)]
pub(super) struct Messages<M> {
    storage: Box<[u8]>,
    /// Bytes of the longest message.
    message_len: usize,
    messages: ArrayVec<Message<M>, MANY>,
    /// How many the next call asks for.
    asked: usize,
    /// Messages that the last call found to be lost.
    lost: u64,
}

#[derive(Debug)]
struct Message<M> {
    index: usize,
    len: usize,
    about: M,
}

/// Messages that the kernel has dropped since the socket was opened, modulo 2^32, as last reported.
///
/// The socket is asked. With the messages themselves (`SO_RXQ_OVFL`) Linux 6.18 copies the count out of
/// memory that its own check of such copies forbids, if a TCP connection of this machine has made the
/// packet: that ends the thread (`usercopy_abort` in `put_cmsg`).
#[derive(Debug, Default)]
pub(super) struct Overflow(AtomicU32);

impl Overflow {
    /// How many these are more than before.
    pub(super) fn take(&self, socket: &impl AsFd) -> u64 {
        option::drops(socket).map_or(0, |count| {
            count.wrapping_sub(self.0.swap(count, Relaxed)).into()
        })
    }
}

/// What the kernel says of a message.
pub(super) struct Arrival<'a> {
    /// Its length in bytes.
    pub(super) len: usize,
    /// The sender's address.
    pub(super) name: &'a libc::sockaddr_storage,
    /// Length of every datagram but the last, if it is a train.
    pub(super) segment: Option<usize>,
}

impl<M> Messages<M> {
    /// Buffers for messages of up to `message_len` bytes. Their starts are on cache lines.
    pub(super) fn new(message_len: usize) -> Self {
        // Of these the kernel gives memory only to what is written to.
        let storage = vec![0; MANY * message_len.next_multiple_of(64)];
        Self {
            storage: storage.into_boxed_slice(),
            message_len,
            messages: ArrayVec::new(),
            asked: FEW,
            lost: 0,
        }
    }

    /// The messages of the last call, in order.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&M, &mut [u8])> {
        let len = self.message_len.next_multiple_of(64);
        let buffers = self.storage.chunks_exact_mut(len).enumerate();
        let mut messages = self.messages.iter().peekable();
        buffers.filter_map(move |(index, buffer)| {
            let message = messages.next_if(|message| message.index == index)?;
            Some((&message.about, buffer.get_mut(..message.len)?))
        })
    }

    /// What is known of the last call's messages, with their lengths.
    pub(super) fn abouts(&self) -> impl Iterator<Item = (&M, usize)> {
        self.messages
            .iter()
            .map(|message| (&message.about, message.len))
    }

    /// The last call's only message and its length, if there was one only.
    pub(super) fn lone(&self) -> Option<(&M, usize)> {
        match self.messages.as_slice() {
            [message] => Some((&message.about, message.len)),
            _ => None,
        }
    }

    /// How many messages the last call brought.
    pub(super) const fn count(&self) -> usize {
        self.messages.len()
    }

    /// Messages of the last call that were lost, since they were cut off.
    pub(super) const fn lost(&self) -> u64 {
        self.lost
    }

    /// Counts a message of the last call as lost.
    pub(super) const fn count_lost(&mut self) {
        self.lost += 1;
    }

    /// Receives what is there, up to a batch of messages, and returns whether there may be more. Each
    /// is put behind `skipped` bytes of its buffer, which are part of it from then on; `about` says
    /// what there is to know of it, or nothing if it cannot be used.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; else what the socket has to say.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        skipped: usize,
        mut about: impl FnMut(&Arrival<'_>) -> Option<M>,
    ) -> io::Result<bool> {
        self.messages.clear();
        self.lost = 0;
        let asked = self.asked;
        let mut names = ArrayVec::<libc::sockaddr_storage, MANY>::new();
        let mut parts = ArrayVec::<libc::iovec, MANY>::new();
        let mut controls = ArrayVec::<Control, MANY>::new();
        let len = self.message_len;
        let buffers = self.storage.chunks_exact_mut(len.next_multiple_of(64));
        for buffer in buffers.take(asked) {
            let buffer = &mut buffer[skipped..len];
            parts.push(libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            });
            // SAFETY: an address is plain data for which zero is a value.
            names.push(unsafe { MaybeUninit::zeroed().assume_init() });
            controls.push(Control([0; CONTROL_LEN]));
        }
        let mut headers = ArrayVec::<libc::mmsghdr, MANY>::new();
        let rooms = names.iter_mut().zip(&mut parts).zip(&mut controls);
        for ((name, part), control) in rooms {
            // SAFETY: a header is plain data for which zero is a value.
            let mut header: libc::mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
            let message = &mut header.msg_hdr;
            message.msg_name = (&raw mut *name).cast();
            message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            message.msg_iov = part;
            message.msg_iovlen = 1;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = CONTROL_LEN as _;
            headers.push(header);
        }
        // SAFETY: every header points to a name, a vector of one buffer and control data that live
        // until the call returns, with their lengths; the number of headers is given.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for (index, (header, name)) in headers.iter().zip(&names).take(count).enumerate() {
            let len = header.msg_len as usize;
            // SAFETY: the kernel filled in the header, whose control data is still there.
            let segment = unsafe { read_segment(&header.msg_hdr) };
            let is_whole = header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            let arrival = Arrival { len, name, segment };
            let about = is_whole.then(|| about(&arrival)).flatten();
            let Some(about) = about else {
                self.lost += 1;
                continue;
            };
            let len = skipped + len;
            self.messages.push(Message { index, len, about });
        }
        self.adapt();
        Ok(count == asked)
    }

    /// The same where one call reads one message: `read` is given one buffer after the other and
    /// returns how many bytes of it the message has.
    ///
    /// # Errors
    /// The first error of `read`, if nothing was read before.
    pub(super) fn receive_each(
        &mut self,
        mut read: impl FnMut(&mut [u8]) -> io::Result<(usize, M)>,
    ) -> io::Result<bool> {
        self.messages.clear();
        self.lost = 0;
        let len = self.message_len;
        let buffers = self.storage.chunks_exact_mut(len.next_multiple_of(64));
        let mut more = true;
        for (index, buffer) in buffers.take(self.asked).enumerate() {
            match read(&mut buffer[..len]) {
                Ok((len, about)) => self.messages.push(Message { index, len, about }),
                Err(error) if index == 0 => return Err(error),
                // Any other error is returned by the next call.
                Err(error) => {
                    more = error.kind() != io::ErrorKind::WouldBlock;
                    break;
                }
            }
        }
        self.adapt();
        Ok(more)
    }

    /// Asks for more messages next time if those of this call were short.
    fn adapt(&mut self) {
        let are_short = self.messages.iter().all(|it| it.len <= SHORT_LEN);
        self.asked = if are_short { MANY } else { FEW };
    }
}

/// The length of a train's datagrams.
///
/// # Safety
/// `header` must be as `recvmmsg` left it, and its control data must be readable.
unsafe fn read_segment(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: the header is a valid one, as the caller says; the macros stay within the control
    // data, and the kernel puts four bytes of data behind this header.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(control) = next.as_ref() {
            if (control.cmsg_level, control.cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO) {
                let len = libc::CMSG_DATA(control).cast::<u32>().read_unaligned();
                return Some(len as usize);
            }
            next = libc::CMSG_NXTHDR(header, control);
        }
    }
    None
}
