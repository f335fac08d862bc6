//! A packet socket (packet(7)): frames of an interface that the host's kernel uses as well.
//!
//! The kernel keeps its addresses and answers for them; what the filter lets pass it sees too, but
//! as the packets are not for it, it drops them, unless it forwards.
//!
//! Frames leave through the interface's queueing discipline. `PACKET_QDISC_BYPASS` would save its
//! lock, but then the kernel segments no superpackets for a device that cannot
//! (`__dev_direct_xmit` drops what it would have to segment), a full transmit ring loses frames
//! instead of holding them back, and our traffic has no share beside that of the host but the first.

#![allow(unsafe_code)] // an address and a name; each block says why it is sound

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use muslin_encap::offload::virtio::{self, Header};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc::{self, sock_filter};
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::{LinkAddr, SockaddrLike, bind, setsockopt, sockopt};
use smoltcp::wire::EthernetAddress;
use socket2::{Domain, Socket, Type};
use tracing::debug;

use super::error::OpenError;
use crate::device;
use crate::error::errno;
use crate::host::option;
use crate::underlay::bpf::attach_filter;
use crate::underlay::messages::{Messages, Overflow};

/// What the kernel is asked to queue in each direction, in bytes: superpackets need a lot. Of what
/// arrives, one of several queues has a share.
const SEND_BYTES: usize = 8 << 20;
const SHARE_BYTES: usize = 2 << 20;
/// The longest headers of a superpacket in bytes: Ethernet, IPv4 and TCP with all their options.
const MAX_HEADER_LEN: u16 = 14 + 60 + 60;

/// An Ethernet interface that is up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    address: LinkAddr,
    hardware_address: EthernetAddress,
}

impl Link {
    /// Finds an interface by its name in this thread's network namespace.
    pub(super) fn find(name: &str) -> Result<Self, OpenError> {
        if name.len() >= libc::IFNAMSIZ {
            return Err(OpenError::NameTooLong(name.to_owned()));
        }
        let other = |error: Errno| OpenError::Other(name.to_owned(), error.into());
        let mut rows = getifaddrs().map_err(other)?;
        let found = rows.find_map(|row| {
            let address = row.address.filter(|_| row.interface_name == name)?;
            Some((row.flags, *address.as_link_addr()?))
        });
        let (flags, address) = found.ok_or_else(|| OpenError::NoInterface(name.to_owned()))?;
        let hardware_address = address.addr().unwrap_or_default();
        if address.hatype() != libc::ARPHRD_ETHER {
            return Err(OpenError::NotEthernet {
                name: name.to_owned(),
                hardware_type: address.hatype(),
            });
        }
        if !flags.contains(InterfaceFlags::IFF_UP) {
            return Err(OpenError::Down(name.to_owned()));
        }
        Ok(Self {
            address,
            hardware_address: EthernetAddress(hardware_address),
        })
    }

    /// Its MAC address.
    pub(super) const fn hardware_address(&self) -> EthernetAddress {
        self.hardware_address
    }

    /// Its address for a socket that is to receive frames of every type.
    fn every_type(&self) -> Option<LinkAddr> {
        let mut address = *self.address.as_ref();
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the pointer is to a whole `sockaddr_ll`, whose length is given, and which lives
        // until it has been copied.
        unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(len)) }
    }
}

/// A socket that gets frames for the pods, and sends any.
#[derive(Debug)]
pub(super) struct PacketSocket {
    socket: Socket,
    overflow: Overflow,
    link: Link,
    /// Whether frames have a virtio-net header in front.
    has_header: bool,
}

impl PacketSocket {
    /// Opens one on a link, for what this filter lets pass.
    ///
    /// # Errors
    /// EPERM without `CAP_NET_RAW`, `EAFNOSUPPORT` if there are no packet sockets.
    pub(super) fn open(link: Link, filter: &[sock_filter]) -> io::Result<Self> {
        // Of no protocol yet, so that nothing comes before the filter is there.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        socket.set_nonblocking(true)?;
        attach_filter(&socket, filter)?;
        if setsockopt(&socket, sockopt::RcvBufForce, &SHARE_BYTES).is_err() {
            socket.set_recv_buffer_size(SHARE_BYTES)?;
        }
        socket.set_send_buffer_size(SEND_BYTES)?;
        // The filter refuses them too, but only after they have been copied.
        if let Err(error) = set(&socket, libc::PACKET_IGNORE_OUTGOING) {
            debug!("the socket's filter also sees outgoing frames: {error}");
        }
        let has_header = match set(&socket, libc::PACKET_VNET_HDR) {
            Ok(()) => true,
            Err(error) => {
                debug!("the uplink has no GSO packets: {error}");
                false
            }
        };
        let address = link.every_type().ok_or(Errno::EINVAL)?;
        bind(socket.as_raw_fd(), &address)?;
        Ok(Self {
            socket,
            overflow: Overflow::default(),
            link,
            has_header,
        })
    }

    /// One that another process has opened on a link.
    pub(super) fn adopt(link: Link, socket: OwnedFd) -> Self {
        let socket = Socket::from(socket);
        // It is so already if there are such headers.
        let has_header = set(&socket, libc::PACKET_VNET_HDR).is_ok();
        let adopted = Self {
            socket,
            overflow: Overflow::default(),
            link,
            has_header,
        };
        // That process has counted these.
        adopted.take_losses();
        adopted
    }

    /// Has another filter decide from now on.
    pub(super) fn set_filter(&self, filter: &[sock_filter]) -> io::Result<()> {
        attach_filter(&self.socket, filter)
    }

    /// Frames that the queue has lost since it was last asked.
    pub(super) fn take_losses(&self) -> u64 {
        self.overflow.take(&self.socket)
    }

    /// Whether frames may be superpackets, and have unfinished checksums.
    pub(super) const fn has_header(&self) -> bool {
        self.has_header
    }

    /// Receives frames, each with a virtio-net header in front.
    ///
    /// # Errors
    /// ENETDOWN once when the interface has gone down, ENODEV when it is gone.
    pub(super) fn receive(&self, into: &mut Messages<()>) -> io::Result<bool> {
        // Where the kernel writes no header it stays zero: nothing is left to do.
        let skipped = if self.has_header { 0 } else { virtio::LEN };
        let received = into.receive(self.socket.as_fd(), skipped, |arrival| {
            (skipped + arrival.len >= virtio::LEN).then_some(())
        });
        match received {
            // A superpacket of a kind that the header has no number for: it is lost.
            Err(error) if errno(&error) == Errno::EINVAL => {
                into.count_lost();
                Ok(true)
            }
            // The socket keeps silent from then on, without a word about why.
            Err(error) if errno(&error) == Errno::ENETDOWN && self.is_gone() => {
                Err(Errno::ENODEV.into())
            }
            other => other,
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// ENOBUFS or `WouldBlock` if a queue is full, ENETDOWN, ENXIO if the interface is gone,
    /// EMSGSIZE, EINVAL if the kernel does not take this superpacket.
    pub(super) fn send(&self, header: &Header, head: &[u8], tail: &[&[u8]]) -> io::Result<()> {
        // The kernel puts that much into one piece of memory, however much it is.
        let hdr_len = header.hdr_len.min(MAX_HEADER_LEN);
        let header = Header { hdr_len, ..*header };
        let header = self.has_header.then_some(&header);
        device::send_frame(&self.socket, header, head, tail)
    }

    fn is_gone(&self) -> bool {
        let mut name = [0; libc::IFNAMSIZ];
        // There are far fewer interfaces than 2^32.
        let index = self.link.address.ifindex() as libc::c_uint;
        // SAFETY: the name is written to a buffer of the length that names have at most.
        // (nix takes no name for an empty one.)
        unsafe { libc::if_indextoname(index, name.as_mut_ptr()) }.is_null()
    }
}

fn set(socket: &Socket, name: libc::c_int) -> io::Result<()> {
    option::set(socket, libc::SOL_PACKET, name, 1)
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
