//! Many datagrams per system call: `recvmmsg` into buffers that are reused, and `sendmmsg` of a
//! plan.
//!
//! With `UDP_GRO` a message may be a train of datagrams of one length (the last may be shorter)
//! from one sender, with `UDP_SEGMENT` the same in the other direction; both lengths travel as
//! control messages, as an `int` and as 16 bits. Buffers have the size of the longest train, because
//! the kernel cuts longer ones off.

#![allow(unsafe_code)] // the two calls and their headers; each block says why it is sound

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use arrayvec::ArrayVec;
use muslin_encap::plan::{Plan, Send};
use nix::libc;
use socket2::SockAddr;

/// Messages of one `recvmmsg`.
const MESSAGES: usize = 16;
/// Messages of one `sendmmsg`.
const SENDS: usize = 64;
/// Bytes of the longest datagram or train.
const MESSAGE_LEN: usize = 65_535;
/// Bytes of one buffer, whose start is on a cache line.
const BUFFER_LEN: usize = MESSAGE_LEN.next_multiple_of(64);
/// Room for control messages: a segment length and a counter take 48 bytes.
const CONTROL_LEN: usize = 64;

/// Control messages, where the kernel may write and read their headers.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL_LEN]);

/// What one call received. The buffers are used again from the first on, so that those in use stay
/// in the cache.
#[derive(Debug)]
pub struct Received {
    storage: Box<[u8]>,
    messages: ArrayVec<Message, MESSAGES>,
    /// Datagrams the kernel has dropped since the socket is open, modulo 2^32, as far as it told.
    overflow: u32,
    /// Datagrams that were lost since the call before.
    lost: u64,
}

#[derive(Debug, Clone, Copy)]
struct Message {
    index: usize,
    len: usize,
    source: SocketAddr,
    /// Length of every datagram but the last; not zero.
    datagram_len: usize,
}

impl Default for Received {
    fn default() -> Self {
        Self {
            storage: vec![0; MESSAGES * BUFFER_LEN].into_boxed_slice(),
            messages: ArrayVec::new(),
            overflow: 0,
            lost: 0,
        }
    }
}

impl Received {
    /// The datagrams of the last call with their senders, in order.
    pub fn datagrams(&mut self) -> impl Iterator<Item = (SocketAddr, &mut [u8])> {
        let buffers = self.storage.chunks_exact_mut(BUFFER_LEN).enumerate();
        let mut messages = self.messages.iter().peekable();
        buffers
            .filter_map(move |(index, buffer)| {
                let message = messages.next_if(|message| message.index == index)?;
                Some((message, buffer.get_mut(..message.len)?))
            })
            .flat_map(|(message, train)| {
                // One that is empty is a datagram too.
                let empty = if train.is_empty() {
                    Some(&mut [][..])
                } else {
                    None
                };
                let datagrams = train.chunks_mut(message.datagram_len).chain(empty);
                datagrams.map(|datagram| (message.source, datagram))
            })
    }

    /// Whether there was one datagram only.
    #[must_use]
    pub fn is_lone(&self) -> bool {
        match self.messages.as_slice() {
            [message] => message.len <= message.datagram_len,
            _ => false,
        }
    }

    /// Datagrams that the last call found to be lost: the socket's queue had been full, or they
    /// were cut off.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }
}

/// Receives what is there, up to [`MESSAGES`] messages, and returns whether there may be more.
pub(super) fn receive(socket: BorrowedFd<'_>, into: &mut Received) -> io::Result<bool> {
    into.messages.clear();
    into.lost = 0;
    // SAFETY: all of these are plain data for which zero is a value.
    let (mut headers, mut names, mut parts) = unsafe {
        (
            MaybeUninit::<[libc::mmsghdr; MESSAGES]>::zeroed().assume_init(),
            MaybeUninit::<[libc::sockaddr_storage; MESSAGES]>::zeroed().assume_init(),
            MaybeUninit::<[libc::iovec; MESSAGES]>::zeroed().assume_init(),
        )
    };
    let mut controls = [Control([0; CONTROL_LEN]); MESSAGES];
    let buffers = into.storage.chunks_exact_mut(BUFFER_LEN);
    for ((((header, name), part), control), buffer) in (headers.iter_mut())
        .zip(&mut names)
        .zip(&mut parts)
        .zip(&mut controls)
        .zip(buffers)
    {
        part.iov_base = buffer.as_mut_ptr().cast();
        part.iov_len = MESSAGE_LEN;
        let header = &mut header.msg_hdr;
        header.msg_name = (&raw mut *name).cast();
        header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        header.msg_iov = part;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL_LEN;
    }
    // SAFETY: every header points to a name, a vector of one buffer and control data that live
    // until the call returns, with their lengths; the number of headers is given.
    let count = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            MESSAGES as libc::c_uint,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
        )
    };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    for (index, (header, name)) in headers.iter().zip(&names).take(count).enumerate() {
        let len = header.msg_len as usize;
        // SAFETY: the kernel filled in the header, whose control data is still there.
        let (segment, overflow) = unsafe { read_control(&header.msg_hdr) };
        if let Some(overflow) = overflow {
            into.lost += u64::from(overflow.wrapping_sub(into.overflow));
            into.overflow = overflow;
        }
        let (Some(source), 0) = (address(name), header.msg_hdr.msg_flags & libc::MSG_TRUNC) else {
            into.lost += 1;
            continue;
        };
        into.messages.push(Message {
            index,
            len,
            source,
            datagram_len: segment.filter(|len| *len > 0).unwrap_or(len).max(1),
        });
    }
    Ok(count == MESSAGES)
}

/// The length of a train's datagrams, and the counter of those that were dropped.
///
/// # Safety
/// `header` must be as `recvmmsg` left it, and its control data must be readable.
unsafe fn read_control(header: &libc::msghdr) -> (Option<usize>, Option<u32>) {
    let (mut segment, mut overflow) = (None, None);
    // SAFETY: the header is a valid one, as the caller says; the macros stay within the control
    // data, and the kernel puts four bytes of data behind each of these two headers.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(control) = next.as_ref() {
            let value = || libc::CMSG_DATA(control).cast::<u32>().read_unaligned();
            match (control.cmsg_level, control.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => segment = Some(value() as usize),
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => overflow = Some(value()),
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, control);
        }
    }
    (segment, overflow)
}

fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: that family's address has this form and fits the storage.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in>() };
            let address = u32::from_be(name.sin_addr.s_addr).into();
            Some(SocketAddrV4::new(address, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: that family's address has this form and fits the storage.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in6>() };
            let address = name.sin6_addr.s6_addr.into();
            let port = u16::from_be(name.sin6_port);
            Some(SocketAddrV6::new(address, port, 0, name.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// Sends messages of a plan, at most [`SENDS`], and returns how many the kernel took; the error is
/// that of the first one.
pub(super) fn send<K: Copy + Eq>(
    socket: BorrowedFd<'_>,
    plan: &Plan<'_, K>,
    sends: &[Send<K>],
    destination: impl Fn(K) -> SocketAddr,
) -> io::Result<usize> {
    let sends = &sends[..sends.len().min(SENDS)];
    let mut names: ArrayVec<SockAddr, SENDS> = ArrayVec::new();
    names.extend(sends.iter().map(|send| destination(send.key).into()));
    let mut controls = [Control([0; CONTROL_LEN]); SENDS];
    let mut headers: ArrayVec<libc::mmsghdr, SENDS> = ArrayVec::new();
    for ((send, name), control) in sends.iter().zip(&names).zip(&mut controls) {
        let pieces = plan.pieces(send);
        // SAFETY: the header is plain data for which zero is a value.
        let mut header: libc::mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        let message = &mut header.msg_hdr;
        message.msg_name = name.as_ptr().cast_mut().cast();
        message.msg_namelen = name.len();
        // An `IoSlice` is an `iovec`, which the kernel does not write to here.
        message.msg_iov = pieces.as_ptr().cast_mut().cast();
        message.msg_iovlen = pieces.len();
        if send.datagrams > 1 {
            message.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: the control data has room for a header and two bytes.
            message.msg_controllen = unsafe { write_segment(message, send.datagram_len) };
        }
        headers.push(header);
    }
    // SAFETY: every header points to a name, pieces and control data that live until the call
    // returns, with their lengths; the number of headers is given.
    let count = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            headers.len() as libc::c_uint,
            libc::MSG_DONTWAIT,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes the control message that cuts a train apart, and returns its length.
///
/// # Safety
/// `message.msg_control` must point to at least `CONTROL_LEN` writable, aligned bytes.
unsafe fn write_segment(message: &mut libc::msghdr, datagram_len: usize) -> usize {
    message.msg_controllen = CONTROL_LEN;
    // A train is shorter than 64 KiB.
    let value = datagram_len as u16;
    let len = size_of::<u16>() as libc::c_uint;
    // SAFETY: there is room for one header with its data, as the caller says.
    unsafe {
        if let Some(control) = libc::CMSG_FIRSTHDR(message).as_mut() {
            control.cmsg_level = libc::SOL_UDP;
            control.cmsg_type = libc::UDP_SEGMENT;
            control.cmsg_len = libc::CMSG_LEN(len) as usize;
            libc::CMSG_DATA(control)
                .cast::<u16>()
                .write_unaligned(value);
        }
        libc::CMSG_SPACE(len) as usize
    }
}
