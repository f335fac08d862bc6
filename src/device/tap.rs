//! A pod's interface: a TAP device, one Ethernet frame per system call.
//!
//! With offloads a frame may be a superpacket of up to 64 KiB, and each has a virtio-net header in
//! front (virtio 1.2 section 5.1.6) that says what is still to be done to it. Kernels and sandboxes
//! that have no offloads give the plain device.
//!
//! Whoever may make a TAP in a network namespace opens it there with [`Tap::open`] and passes the
//! descriptor on; the node wraps what it gets with [`Tap::from_descriptor`] and never enters a
//! namespace. The interface lives as long as any copy of the descriptor.

#![allow(unsafe_code)] // ioctls and a raw descriptor; each block says why it is sound

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use muslin_encap::offload::virtio::{self, Header};
use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;
use smoltcp::wire::EthernetAddress;
use thiserror::Error;
use tracing::debug;

use super::frame::FrameDevice;
use super::now;
use crate::error::errno;

/// Where the kernel keeps TAP devices.
const TUN: &str = "/dev/net/tun";
/// What the kernel may leave to the node, most first: checksums, TCP over IPv4 and IPv6 with ECN,
/// and UDP (since Linux 6.2).
const OFFLOADS: [libc::c_uint; 3] = [
    TUN_F_CSUM | TUN_F_TSO | TUN_F_USO,
    TUN_F_CSUM | TUN_F_TSO,
    TUN_F_CSUM,
];
const TUN_F_CSUM: libc::c_uint = 0x01;
/// `TUN_F_TSO4`, `TUN_F_TSO6` and `TUN_F_TSO_ECN`.
const TUN_F_TSO: libc::c_uint = 0x02 | 0x04 | 0x08;
/// `TUN_F_USO4` and `TUN_F_USO6`.
const TUN_F_USO: libc::c_uint = 0x20 | 0x40;

/// A TAP device by its descriptor.
#[derive(Debug)]
pub struct Tap {
    descriptor: OwnedFd,
    /// Whether frames have a virtio-net header in front.
    has_header: bool,
    /// Whether that may say something.
    offloads: bool,
}

/// Why a TAP device could not be made.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no `/dev/net/tun`.
    #[error(
        "/dev/net/tun does not exist: load the kernel module 'tun', or pass the device to the \
         container (--device /dev/net/tun)"
    )]
    NoDevice,
    /// `/dev/net/tun` may not be opened.
    #[error(
        "no permission for /dev/net/tun: run 'sudo chmod 666 /dev/net/tun' (the mode that most \
         distributions give it), or let the container have the device"
    )]
    NoPermission,
    /// No interface may be made in this namespace.
    #[error(
        "no permission to make an interface here: the network namespace belongs to another user \
         or user namespace, or a security module like AppArmor forbids it"
    )]
    Forbidden,
    /// An interface of that name exists.
    #[error("an interface '{0}' already exists: choose another name")]
    Exists(String),
    /// Anything else.
    #[error("the TAP device '{0}' cannot be made: {1}")]
    Other(String, io::Error),
}

mod request {
    //! ioctls of `linux/if_tun.h` and `linux/sockios.h`.

    use nix::libc;

    // Declared with the size of an `unsigned int`, though the kernel writes an `ifreq`.
    nix::ioctl_read_bad!(
        tun_get_iff,
        nix::request_code_read!(b'T', 210, size_of::<libc::c_uint>()),
        libc::ifreq
    );
    nix::ioctl_read_bad!(get_hardware_address, libc::SIOCGIFHWADDR, libc::ifreq);
    // Declared with the size of an `int`, though the kernel reads an `ifreq`.
    nix::ioctl_write_ptr_bad!(
        tun_set_iff,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
    nix::ioctl_write_ptr_bad!(
        tun_set_queue,
        nix::request_code_write!(b'T', 217, size_of::<libc::c_int>()),
        libc::ifreq
    );
    // The value is the argument itself, not a pointer to it.
    nix::ioctl_write_int_bad!(
        tun_set_offload,
        nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>())
    );
    nix::ioctl_write_ptr!(tun_set_header_len, b'T', 216, libc::c_int);
    // Likewise the value itself.
    nix::ioctl_write_int_bad!(
        tun_set_persist,
        nix::request_code_write!(b'T', 203, size_of::<libc::c_int>())
    );
    nix::ioctl_write_int_bad!(
        tun_set_owner,
        nix::request_code_write!(b'T', 204, size_of::<libc::c_int>())
    );
}

impl Tap {
    /// Makes the interface `name` in the network namespace of this thread, or opens it if it is
    /// there and nobody has it open; with offloads and that many queues if they are wanted and
    /// there are some. Else it has one queue.
    ///
    /// # Errors
    /// `OpenError` in words for people.
    pub fn open(name: &str, offloads: bool, queues: usize) -> Result<Vec<Self>, OpenError> {
        Self::open_or_make(name, offloads, queues, 0)
    }

    /// Makes the interface as [`Self::open`] does, but opens none that is there. One with several queues
    /// could be opened although somebody has it open.
    ///
    /// # Errors
    /// `OpenError` in words for people.
    pub fn create(name: &str, offloads: bool, queues: usize) -> Result<Vec<Self>, OpenError> {
        if if_nametoindex(name).is_ok() {
            return Err(OpenError::Exists(name.to_owned()));
        }
        Self::open_or_make(name, offloads, queues, libc::IFF_TUN_EXCL)
    }

    fn open_or_make(
        name: &str,
        offloads: bool,
        queues: usize,
        first: libc::c_int,
    ) -> Result<Vec<Self>, OpenError> {
        let descriptors = match offloads.then(|| open_with_offloads(name, queues, first)) {
            Some(Ok(descriptors)) => descriptors,
            Some(Err(error)) if first != 0 && errno(&error) == Errno::EBUSY => {
                return Err(OpenError::new(name, error));
            }
            Some(Err(error)) => {
                // What stands in the way of any device stands in the way of the plain one too.
                debug!("{name} cannot have offloads: {error}");
                vec![open_plain(name)?]
            }
            None => vec![open_plain(name)?],
        };
        let queues = descriptors.into_iter().map(Self::from_descriptor);
        let queues = queues.collect::<io::Result<_>>();
        queues.map_err(|error| OpenError::Other(name.to_owned(), error))
    }

    /// Another descriptor of the same queue.
    ///
    /// # Errors
    /// If there are too many descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            descriptor: self.descriptor.try_clone()?,
            ..*self
        })
    }

    /// Lets the interface stay when its last descriptor is closed, or go then. That needs no
    /// privileges.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn set_persistent(&self, stays: bool) -> io::Result<()> {
        // SAFETY: the argument is a number.
        unsafe { request::tun_set_persist(self.descriptor.as_raw_fd(), stays.into()) }?;
        Ok(())
    }

    /// Gives the interface to a user, who may open it from then on without privileges.
    ///
    /// # Errors
    /// If this process may not, or the user is none of its user namespace.
    pub fn set_owner(&self, user: u32) -> io::Result<()> {
        // SAFETY: the argument is a number.
        unsafe { request::tun_set_owner(self.descriptor.as_raw_fd(), user.cast_signed()) }?;
        Ok(())
    }

    /// Takes the queue out of use, or back into it: the kernel gives frames only to queues in use.
    /// A device has at least one.
    pub fn use_queue(&self, used: bool) {
        let mut interface = empty_request();
        let flags = if used {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        interface.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the kernel reads one `ifreq`, which lives until the call returns.
        let set =
            unsafe { request::tun_set_queue(self.descriptor.as_raw_fd(), &raw const interface) };
        // It may be so already, or be the only queue of a device that can have no other.
        if let Err(error) = set {
            debug!("a queue is left unchanged: {error}");
        }
    }

    /// Wraps a descriptor that another process opened, and makes it non-blocking.
    ///
    /// # Errors
    /// `InvalidInput` if it is not a TAP device without packet information.
    pub fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        Self::of_mode(descriptor, libc::IFF_TAP)
    }

    /// The same for a device of that mode, `IFF_TAP` or `IFF_TUN`.
    pub(super) fn of_mode(descriptor: OwnedFd, mode: libc::c_int) -> io::Result<Self> {
        let mut interface = empty_request();
        // SAFETY: the kernel writes one `ifreq`, into one that lives until the call returns; on a
        // descriptor of another kind it fails.
        unsafe { request::tun_get_iff(descriptor.as_raw_fd(), &raw mut interface) }.map_err(
            |_| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the descriptor is not a TAP or TUN device",
                )
            },
        )?;
        // SAFETY: TUNGETIFF fills in the flags, which are valid for any bits.
        let flags = i32::from(unsafe { interface.ifr_ifru.ifru_flags });
        let wanted = mode | libc::IFF_NO_PI;
        if flags & (libc::IFF_TAP | libc::IFF_TUN | libc::IFF_NO_PI) != wanted {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the device is not of the expected mode without packet information",
            ));
        }
        let has_header = flags & libc::IFF_VNET_HDR != 0;
        if has_header {
            let len = virtio::LEN as libc::c_int;
            // SAFETY: the kernel reads one `int`, which lives until the call returns.
            unsafe { request::tun_set_header_len(descriptor.as_raw_fd(), &raw const len) }?;
        }
        now::stop_waiting(descriptor.as_fd())?;
        Ok(Self {
            descriptor,
            has_header,
            offloads: has_header,
        })
    }

    /// Lets the kernel do everything itself from now on.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn disable_offloads(&mut self) -> io::Result<()> {
        if self.has_header {
            // SAFETY: the argument is a number.
            unsafe { request::tun_set_offload(self.descriptor.as_raw_fd(), 0) }?;
        }
        self.offloads = false;
        Ok(())
    }

    /// The MAC address of the interface.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn hardware_address(&self) -> io::Result<EthernetAddress> {
        let mut interface = empty_request();
        // SAFETY: the kernel writes one `ifreq`, into one that lives until the call returns.
        unsafe { request::get_hardware_address(self.descriptor.as_raw_fd(), &raw mut interface) }?;
        // SAFETY: SIOCGIFHWADDR fills in the hardware address, which is valid for any bytes.
        let data = unsafe { interface.ifr_ifru.ifru_hwaddr.sa_data };
        let mut address = [0; 6];
        for (byte, raw) in address.iter_mut().zip(data) {
            *byte = raw.cast_unsigned();
        }
        Ok(EthernetAddress(address))
    }

    /// Reads the next frame from the pod and returns its length in bytes and the raw virtio-net
    /// header in front of it (all zero from a plain device: nothing is left to do).
    ///
    /// # Errors
    /// `WouldBlock` if there is none; anything else means that the interface is gone.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<([u8; virtio::LEN], usize)> {
        let mut header = [0; virtio::LEN];
        if !self.has_header {
            let len = now::read(self.as_fd(), &mut [IoSliceMut::new(buffer)])?;
            return Ok((header, len));
        }
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(buffer)];
        let len = now::read(self.as_fd(), &mut parts)?;
        let len = len.checked_sub(virtio::LEN).ok_or(Errno::EIO)?;
        Ok((header, len))
    }
}

impl FrameDevice for Tap {
    fn has_offloads(&self) -> bool {
        self.offloads
    }

    /// `tail` has at most [`merge::MAX_SEGMENTS`](muslin_encap::offload::merge::MAX_SEGMENTS) - 1 pieces.
    ///
    /// # Errors
    /// EIO (`Uncategorized`) if the interface is down.
    fn send(&self, header: &Header, head: &[u8], tail: &[&[u8]]) -> io::Result<()> {
        let header = self.has_header.then_some(header);
        now::with_parts(header, head, tail, |parts| now::write(self.as_fd(), parts))
    }
}

fn open_plain(name: &str) -> Result<OwnedFd, OpenError> {
    let device = tun_tap::Iface::without_packet_info(name, tun_tap::Mode::Tap);
    let device = device.map_err(|error| OpenError::new(name, error))?;
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) })
}

/// Opens all queues, the first with these flags more.
fn open_with_offloads(name: &str, queues: usize, first: libc::c_int) -> io::Result<Vec<OwnedFd>> {
    let is_multiqueue = queues > 1;
    let open = |index: usize| {
        let more = if index == 0 { first } else { 0 };
        open_queue(name, libc::IFF_TAP | more, is_multiqueue)
    };
    let queues = (0..queues.max(1)).map(open);
    queues.collect::<io::Result<_>>().or_else(|error| {
        // One that is there already may be of the other kind.
        let other = open_queue(name, libc::IFF_TAP | first, !is_multiqueue);
        Ok(vec![other.map_err(|_| error)?])
    })
}

/// Opens a queue of a device of that mode, with a virtio-net header and offloads.
pub(super) fn open_queue(
    name: &str,
    mode: libc::c_int,
    is_multiqueue: bool,
) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open(TUN)?;
    let mut interface = request_for(name)?;
    let mut flags = mode | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if is_multiqueue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // Flags are 16 bits.
    interface.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads one `ifreq`, which lives until the call returns.
    unsafe { request::tun_set_iff(device.as_raw_fd(), &raw const interface) }?;
    let mut result = Ok(0);
    for offloads in OFFLOADS {
        // SAFETY: the argument is a number.
        result = unsafe { request::tun_set_offload(device.as_raw_fd(), offloads as libc::c_int) };
        if result.is_ok() {
            break;
        }
    }
    result?;
    Ok(device.into())
}

impl OpenError {
    pub(super) fn new(name: &str, error: io::Error) -> Self {
        match errno(&error) {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => Self::NoDevice,
            Errno::EACCES => Self::NoPermission,
            Errno::EPERM => Self::Forbidden,
            Errno::EBUSY | Errno::EEXIST => Self::Exists(name.to_owned()),
            // So the kernel calls an interface of that name that is not a TAP.
            Errno::EINVAL if if_nametoindex(name).is_ok() => Self::Exists(name.to_owned()),
            _ => Self::Other(name.to_owned(), error),
        }
    }
}

fn request_for(name: &str) -> io::Result<libc::ifreq> {
    let mut request = empty_request();
    // The last byte stays zero.
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::ENAMETOOLONG.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    Ok(request)
}

fn empty_request() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tap_is_taken() {
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let error = Tap::from_descriptor(file).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let (one, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        assert!(Tap::from_descriptor(one.into()).is_err());
    }
}
