//! A pod's interface: the plain TAP device, one Ethernet frame per system call.
//!
//! Whoever may make a TAP in a network namespace opens it there with [`Tap::open`] and passes the
//! descriptor on; the node wraps what it gets with [`Tap::from_descriptor`] and never enters a
//! namespace. The interface lives as long as any copy of the descriptor.

#![allow(unsafe_code)] // ioctls and a raw descriptor; each block says why it is sound

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use smoltcp::wire::EthernetAddress;
use thiserror::Error;

use crate::error::errno;

/// A TAP device by its descriptor.
#[derive(Debug)]
pub struct Tap(OwnedFd);

/// Why a TAP device could not be made.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no `/dev/net/tun`.
    #[error(
        "/dev/net/tun is not there: load the kernel module 'tun', or pass the device to the \
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
    #[error("an interface '{0}' is there already: choose another name")]
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
}

impl Tap {
    /// Makes the interface `name` in the network namespace of this thread.
    ///
    /// # Errors
    /// `OpenError` in words for people.
    pub fn open(name: &str) -> Result<Self, OpenError> {
        let device = tun_tap::Iface::without_packet_info(name, tun_tap::Mode::Tap);
        let device = device.map_err(|error| match errno(&error) {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => OpenError::NoDevice,
            Errno::EACCES => OpenError::NoPermission,
            Errno::EPERM => OpenError::Forbidden,
            Errno::EBUSY | Errno::EEXIST => OpenError::Exists(name.to_owned()),
            _ => OpenError::Other(name.to_owned(), error),
        })?;
        // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, which nobody else has.
        let descriptor = unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) };
        Self::from_descriptor(descriptor).map_err(|error| OpenError::Other(name.to_owned(), error))
    }

    /// Wraps a descriptor that somebody else opened, and makes it non-blocking.
    ///
    /// # Errors
    /// `InvalidInput` if it is not a plain TAP device (Ethernet frames, no packet information, no
    /// virtio header).
    pub fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        let mut interface = empty_request();
        // SAFETY: the kernel writes one `ifreq`, into one that lives until the call returns; on a
        // descriptor of another kind it fails.
        unsafe { request::tun_get_iff(descriptor.as_raw_fd(), &raw mut interface) }.map_err(
            |_| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the descriptor is not a TAP device",
                )
            },
        )?;
        // SAFETY: TUNGETIFF fills in the flags, which are valid for any bits.
        let flags = i32::from(unsafe { interface.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI;
        let compared = wanted | libc::IFF_TUN | libc::IFF_VNET_HDR;
        if flags & compared != wanted {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the device is not a TAP without packet information and virtio header",
            ));
        }
        let status = OFlag::from_bits_truncate(fcntl(&descriptor, FcntlArg::F_GETFL)?);
        fcntl(&descriptor, FcntlArg::F_SETFL(status | OFlag::O_NONBLOCK))?;
        Ok(Self(descriptor))
    }

    /// The MAC address of the interface.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn hardware_address(&self) -> io::Result<EthernetAddress> {
        let mut interface = empty_request();
        // SAFETY: the kernel writes one `ifreq`, into one that lives until the call returns.
        unsafe { request::get_hardware_address(self.0.as_raw_fd(), &raw mut interface) }?;
        // SAFETY: SIOCGIFHWADDR fills in the hardware address, which is valid for any bytes.
        let data = unsafe { interface.ifr_ifru.ifru_hwaddr.sa_data };
        let mut address = [0; 6];
        for (byte, raw) in address.iter_mut().zip(data) {
            *byte = raw.cast_unsigned();
        }
        Ok(EthernetAddress(address))
    }

    /// Reads the next frame from the pod and returns its length in bytes.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; anything else means that the interface is gone.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(&self.0, buffer)?)
    }

    /// Hands a frame to the pod.
    ///
    /// # Errors
    /// EIO (`Uncategorized`) if the interface is down, `WouldBlock` if it takes no more now.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        nix::unistd::write(&self.0, frame)?;
        Ok(())
    }
}

fn empty_request() -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
