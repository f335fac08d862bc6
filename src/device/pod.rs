//! What a pod is attached by: a TAP device, or a socket whose other end is a pod in a process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use muslin_encap::offload::virtio::{self, Header};
use smoltcp::wire::EthernetAddress;

use super::frame::FrameDevice;
use super::socket::FrameSocket;
use super::tap::Tap;

/// A queue of a pod's device, by its descriptor.
#[derive(Debug)]
pub enum PodDevice {
    /// A TAP device.
    Tap(Tap),
    /// One end of a pair of sockets.
    Socket(FrameSocket),
}

impl PodDevice {
    /// Wraps a descriptor that another process opened, and makes it non-blocking.
    ///
    /// # Errors
    /// `InvalidInput` if it is not a device for a pod.
    pub fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        if let Ok(socket) = FrameSocket::from_descriptor(descriptor.try_clone()?) {
            return Ok(Self::Socket(socket));
        }
        Tap::from_descriptor(descriptor).map(Self::Tap)
    }

    /// Another descriptor of the same queue.
    ///
    /// # Errors
    /// If there are too many descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tap(tap) => Self::Tap(tap.try_clone()?),
            Self::Socket(socket) => Self::Socket(socket.try_clone()?),
        })
    }

    /// Takes the queue out of use, or back into it. A socket has one alone, which is in use.
    pub fn use_queue(&self, used: bool) {
        match self {
            Self::Tap(tap) => tap.use_queue(used),
            Self::Socket(_) => {}
        }
    }

    /// Has the interface stay when its last descriptor is closed, or go with it. A socket is none.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn set_persistent(&self, persistent: bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_persistent(persistent),
            Self::Socket(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Has the other end do everything itself from now on.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn disable_offloads(&mut self) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.disable_offloads(),
            Self::Socket(socket) => {
                socket.disable_offloads();
                Ok(())
            }
        }
    }

    /// The MAC address of the interface. A socket has none: the node gives one.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn hardware_address(&self) -> io::Result<Option<EthernetAddress>> {
        match self {
            Self::Tap(tap) => tap.hardware_address().map(Some),
            Self::Socket(_) => Ok(None),
        }
    }

    /// Reads the next frame from the pod and returns its length in bytes and the raw virtio-net
    /// header in front of it.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; anything else means that the pod is gone.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<([u8; virtio::LEN], usize)> {
        match self {
            Self::Tap(tap) => tap.receive(buffer),
            Self::Socket(socket) => socket.receive(buffer),
        }
    }
}

impl FrameDevice for PodDevice {
    fn has_offloads(&self) -> bool {
        match self {
            Self::Tap(tap) => tap.has_offloads(),
            Self::Socket(socket) => socket.has_offloads(),
        }
    }

    fn send(&self, header: &Header, head: &[u8], tail: &[&[u8]]) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.send(header, head, tail),
            Self::Socket(socket) => socket.send(header, head, tail),
        }
    }
}

impl AsFd for PodDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(tap) => tap.as_fd(),
            Self::Socket(socket) => socket.as_fd(),
        }
    }
}
