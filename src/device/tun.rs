//! The host's interface: a TUN device, one IP packet per system call.
//!
//! Whoever may make interfaces makes it once, persistent, with several queues, and for the node's user
//! ([`Tun::make`]). That user opens it from then on without privileges ([`Tun::open`]), as often as the
//! node is started.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use muslin_encap::offload::virtio::{self, Header};
use nix::libc;
use nix::net::if_::if_nametoindex;

use super::frame::FrameDevice;
use super::tap::{OpenError, Tap, open_queue};

/// A queue of a TUN device, by its descriptor.
#[derive(Debug)]
pub struct Tun(Tap);

impl Tun {
    /// Opens so many queues of the interface `name` in the network namespace of this thread. Where there
    /// is none it is made, by those who may.
    ///
    /// # Errors
    /// `OpenError` in words for people: `Forbidden` if the interface is another user's, `Exists` if it is
    /// no TUN device with several queues.
    pub fn open(name: &str, queues: usize) -> Result<Vec<Self>, OpenError> {
        let open = || {
            let queue = open_queue(name, libc::IFF_TUN, true)?;
            Tap::of_mode(queue, libc::IFF_TUN).map(Self)
        };
        let queues = (0..queues.max(1)).map(|_| open());
        let queues = queues.collect::<io::Result<_>>();
        queues.map_err(|error| OpenError::new(name, error))
    }

    /// A queue that another process opened.
    ///
    /// # Errors
    /// `InvalidInput` if it is not one of a TUN device.
    pub(crate) fn from_descriptor(queue: OwnedFd) -> io::Result<Self> {
        Tap::of_mode(queue, libc::IFF_TUN).map(Self)
    }

    /// Makes the interface, if it is not there, persistent and for that user. A node that has it open
    /// goes on with its queues.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn make(name: &str, owner: u32) -> Result<(), OpenError> {
        if is_made(name, owner) {
            return Ok(());
        }
        for queue in Self::open(name, 1)? {
            // The kernel gives packets to queues that are in use.
            queue.0.use_queue(false);
            let made = queue.0.set_owner(owner);
            let made = made.and_then(|()| queue.0.set_persistent(true));
            made.map_err(|error| OpenError::new(name, error))?;
        }
        Ok(())
    }

    /// Another descriptor of the same queue.
    ///
    /// # Errors
    /// If there are too many descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Has the host do everything itself from now on.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn disable_offloads(&mut self) -> io::Result<()> {
        self.0.disable_offloads()
    }

    /// Reads the next packet from the host and returns its length in bytes and the raw virtio-net
    /// header in front of it.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; anything else means that the interface is gone.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<([u8; virtio::LEN], usize)> {
        self.0.receive(buffer)
    }
}

/// Whether sysfs knows an interface as [`Tun::make`] makes it: to look does not disturb it, as another
/// queue does, which gets packets until it is taken out of use.
fn is_made(name: &str, owner: u32) -> bool {
    let read = |file: &str| {
        let text = std::fs::read_to_string(format!("/sys/class/net/{name}/{file}"));
        text.map(|text| text.trim().to_owned()).unwrap_or_default()
    };
    // It may show another namespace.
    let Ok(index) = if_nametoindex(name) else {
        return false;
    };
    let wanted = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | IFF_PERSIST;
    let flags = read("tun_flags");
    let flags = i32::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap_or_default();
    read("ifindex") == index.to_string()
        && read("owner") == owner.to_string()
        && flags & (wanted | libc::IFF_TAP) == wanted
}

/// What sysfs says of a persistent device (`linux/if_tun.h`).
const IFF_PERSIST: libc::c_int = 0x0800;

impl FrameDevice for Tun {
    const NETWORK: usize = 0;

    fn has_offloads(&self) -> bool {
        self.0.has_offloads()
    }

    fn send(&self, header: &Header, head: &[u8], tail: &[&[u8]]) -> io::Result<()> {
        self.0.send(header, head, tail)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
