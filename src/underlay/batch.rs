//! Many datagrams per system call: batches of them received, and `sendmmsg` of a batch.
//!
//! With `UDP_GRO` a message may be a train of datagrams of one length (the last may be shorter)
//! from one sender, with `UDP_SEGMENT` the same in the other direction; both lengths travel as
//! control messages, as an `int` and as 16 bits. Buffers have the size of the longest train, because
//! the kernel cuts longer ones off.

#![allow(unsafe_code)] // the call and its headers; each block says why it is sound

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use arrayvec::ArrayVec;
use muslin_encap::ip::v4;
use muslin_encap::offload::batch::{Message, SendBatch};
use muslin_stack::datapath::work;
use nix::libc;
use socket2::SockAddr;

use super::messages::{CONTROL_LEN, Control, Messages};

/// Messages of one `sendmmsg`.
const SENDS: usize = 64;
/// Bytes of the longest datagram or train.
const MESSAGE_LEN: usize = v4::MAX_LEN;

/// What one call received.
#[derive(Debug)]
pub struct Received(Messages<Train>);

/// What is known of a message besides its bytes.
#[derive(Debug, Clone, Copy)]
struct Train {
    source: SocketAddr,
    /// Length of every datagram but the last; not zero.
    datagram_len: usize,
}

impl Default for Received {
    fn default() -> Self {
        Self(Messages::new(MESSAGE_LEN))
    }
}

impl Received {
    /// The datagrams of the last call with their senders, in order.
    pub fn datagrams(&mut self) -> impl Iterator<Item = (SocketAddr, &mut [u8])> {
        self.0.iter_mut().flat_map(|(train, bytes)| {
            // One that is empty is a datagram too.
            let empty = if bytes.is_empty() {
                Some(&mut [][..])
            } else {
                None
            };
            let datagrams = bytes.chunks_mut(train.datagram_len).chain(empty);
            datagrams.map(|datagram| (train.source, datagram))
        })
    }

    /// Whether there was one datagram only.
    #[must_use]
    pub fn is_lone(&self) -> bool {
        let lone = self.0.lone();
        lone.is_some_and(|(train, len)| len <= train.datagram_len)
    }

    /// How many messages the last call brought; a train is one.
    #[must_use]
    pub const fn messages(&self) -> usize {
        self.0.count()
    }

    /// Work of the messages of the last call.
    #[must_use]
    pub fn work(&self) -> u64 {
        let each = self
            .0
            .abouts()
            .map(|(train, len)| work::of_superpacket(len.div_ceil(train.datagram_len), len));
        each.sum()
    }

    /// Datagrams of the last call that were lost, since they were cut off.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.0.lost()
    }
}

/// Receives what is there, up to a batch of messages, and returns whether there may be more.
pub(super) fn receive(socket: BorrowedFd<'_>, into: &mut Received) -> io::Result<bool> {
    into.0.receive(socket, 0, |arrival| {
        let segment = arrival.segment.filter(|len| *len > 0);
        Some(Train {
            source: address(arrival.name)?,
            datagram_len: segment.unwrap_or(arrival.len).max(1),
        })
    })
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
    batch: &SendBatch<'_, K>,
    sends: &[Message<K>],
    destination: impl Fn(K) -> SocketAddr,
) -> io::Result<usize> {
    let sends = &sends[..sends.len().min(SENDS)];
    let mut names: ArrayVec<SockAddr, SENDS> = ArrayVec::new();
    names.extend(sends.iter().map(|send| destination(send.key).into()));
    let mut controls = [Control([0; CONTROL_LEN]); SENDS];
    let mut headers: ArrayVec<libc::mmsghdr, SENDS> = ArrayVec::new();
    for ((send, name), control) in sends.iter().zip(&names).zip(&mut controls) {
        let pieces = batch.pieces(send);
        // SAFETY: the header is plain data for which zero is a value.
        let mut header: libc::mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        let message = &mut header.msg_hdr;
        message.msg_name = name.as_ptr().cast_mut().cast();
        message.msg_namelen = name.len();
        // An `IoSlice` is an `iovec`, which the kernel does not write to here.
        message.msg_iov = pieces.as_ptr().cast_mut().cast();
        message.msg_iovlen = pieces.len() as _;
        if send.datagrams > 1 {
            message.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: the control data has room for a header and two bytes.
            message.msg_controllen = unsafe { write_segment(message, send.datagram_len) } as _;
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
            libc::MSG_DONTWAIT as _,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes the control message that cuts a train apart, and returns its length.
///
/// # Safety
/// `message.msg_control` must point to at least `CONTROL_LEN` writable, aligned bytes.
unsafe fn write_segment(message: &mut libc::msghdr, datagram_len: usize) -> usize {
    message.msg_controllen = CONTROL_LEN as _;
    // A train is shorter than 64 KiB.
    let value = datagram_len as u16;
    let len = size_of::<u16>() as libc::c_uint;
    // SAFETY: there is room for one header with its data, as the caller says.
    unsafe {
        if let Some(control) = libc::CMSG_FIRSTHDR(message).as_mut() {
            control.cmsg_level = libc::SOL_UDP;
            control.cmsg_type = libc::UDP_SEGMENT;
            control.cmsg_len = libc::CMSG_LEN(len) as _;
            libc::CMSG_DATA(control)
                .cast::<u16>()
                .write_unaligned(value);
        }
        libc::CMSG_SPACE(len) as usize
    }
}
