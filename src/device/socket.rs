//! A pod's interface that is no interface: one end of a pair of `SOCK_SEQPACKET` sockets, for a pod
//! whose address lives in a process.
//!
//! Each packet is a frame with its virtio-net header in front, as with a TAP device, so superpackets
//! pass. The other end is gone when this one is read to its end. What does not fit into the other
//! end's queue is refused, as a TAP device refuses it.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use muslin_encap::offload::virtio::{self, Header};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, getsockname, getsockopt, setsockopt, socketpair,
    sockopt,
};

use super::frame::FrameDevice;
use super::now;

/// Bytes of frames that may wait for the other end, as far as the system allows
/// (net.core.wmem_max).
const QUEUE_LEN: usize = 4 << 20;

/// One end of a pair of sockets that carries frames.
#[derive(Debug)]
pub struct FrameSocket {
    descriptor: OwnedFd,
    offloads: bool,
}

impl FrameSocket {
    /// Both ends of a new pair.
    ///
    /// # Errors
    /// If there are no descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self::from_descriptor(one)?, Self::from_descriptor(other)?))
    }

    /// Wraps a descriptor that another process opened, and leaves it blocking or not.
    ///
    /// # Errors
    /// `InvalidInput` if it is not such a socket.
    pub fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        let is_unix = getsockname::<UnixAddr>(descriptor.as_raw_fd()).is_ok();
        let kind = getsockopt(&descriptor, sockopt::SockType);
        if !is_unix || kind != Ok(SockType::SeqPacket) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is not a local SOCK_SEQPACKET socket",
            ));
        }
        // It gets as much as there is; bursts are lost sooner with less.
        setsockopt(&descriptor, sockopt::SndBuf, &QUEUE_LEN)?;
        Ok(Self {
            descriptor,
            offloads: true,
        })
    }

    /// Another descriptor of the same end.
    ///
    /// # Errors
    /// If there are too many descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            descriptor: self.descriptor.try_clone()?,
            ..*self
        })
    }

    /// Gives the other end neither superpackets nor unfinished checksums from now on.
    pub fn disable_offloads(&mut self) {
        self.offloads = false;
    }

    /// Reads the next frame and returns its length in bytes and its raw virtio-net header.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; anything else means that the other end is gone, or sends what
    /// is no frame.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<([u8; virtio::LEN], usize)> {
        let mut header = [0; virtio::LEN];
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(buffer)];
        let len = now::receive(self.as_fd(), &mut parts)?;
        let len = len.checked_sub(virtio::LEN).ok_or(Errno::EPIPE)?;
        Ok((header, len))
    }
}

impl FrameDevice for FrameSocket {
    fn has_offloads(&self) -> bool {
        self.offloads
    }

    fn send(&self, header: &Header, head: &[u8], tail: &[&[u8]]) -> io::Result<()> {
        now::send_frame(self, Some(header), head, tail)
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use muslin_encap::offload::virtio::{Gso, GsoKind};

    use super::*;

    #[test]
    fn frames_pass_whole_and_the_end_is_seen() {
        let (one, other) = FrameSocket::pair().unwrap();
        let mut buffer = vec![0; 70_000];
        let nothing = other.receive(&mut buffer).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        let header = Header {
            gso: Some(Gso {
                kind: GsoKind::TcpV4,
                size: 1400,
                ecn: false,
            }),
            ..Header::default()
        };
        let (head, tail) = ([1; 60_000], [2; 5000]);
        one.send(&header, &head, &[&tail]).unwrap();
        let (raw, len) = other.receive(&mut buffer).unwrap();
        assert_eq!((raw, len), (header.to_bytes(), 65_000));
        assert_eq!(
            (&buffer[..60_000], &buffer[60_000..len]),
            (&head[..], &tail[..])
        );
        drop(one);
        let end = other.receive(&mut buffer).unwrap_err();
        assert_ne!(end.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_full_end_refuses_and_what_it_has_stays() {
        let (one, other) = FrameSocket::pair().unwrap();
        let mut sent = 0_u32;
        let refusal = loop {
            match one.send(&Header::default(), &sent.to_be_bytes(), &[&[0; 1400]]) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refusal.kind(), io::ErrorKind::WouldBlock);
        let mut buffer = [0; 2000];
        for number in 0..sent {
            other.receive(&mut buffer).unwrap();
            assert_eq!(buffer[..4], number.to_be_bytes());
        }
    }

    #[test]
    fn whoever_has_the_other_descriptor_cannot_make_us_wait() {
        use super::now::tests::{at_once, clear_nonblock};
        let (one, other) = FrameSocket::pair().unwrap();
        let passed = one.try_clone().unwrap();
        clear_nonblock(&passed);
        let (received, refused) = at_once(move || {
            let received = one.receive(&mut [0; 100]).unwrap_err();
            let refused = loop {
                if let Err(error) = one.send(&Header::default(), &[0; 9000], &[]) {
                    break error;
                }
            };
            (received, refused)
        });
        assert_eq!(received.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        drop(other);
    }

    #[test]
    fn other_descriptors_are_refused() {
        let (datagrams, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for descriptor in [datagrams.into(), udp.into(), OwnedFd::from(file)] {
            let error = FrameSocket::from_descriptor(descriptor).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
