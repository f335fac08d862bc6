//! The tunnel's socket: one datagram per system call.

#![allow(unsafe_code)] // one socket option that no library sets

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::libc;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// What the kernel is asked to queue in each direction, in bytes; it grants up to
/// `net.core.rmem_max` and `wmem_max`.
const QUEUE_BYTES: usize = 4 << 20;

/// How long a router may take to say that a datagram is too large.
const ANSWER: Duration = Duration::from_millis(300);
/// Bytes of an IPv4 and a UDP header.
const UDP_HEADERS: u16 = 28;

/// A non-blocking UDP socket on the node's public address.
#[derive(Debug)]
pub struct UdpSocket(std::net::UdpSocket);

impl UdpSocket {
    /// Binds the socket.
    ///
    /// # Errors
    /// `AddrInUse` if another tunnel has the port, `AddrNotAvailable` if the address is not on
    /// this machine.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::DGRAM,
            Some(Protocol::UDP),
        )?;
        socket.set_nonblocking(true)?;
        socket.set_recv_buffer_size(QUEUE_BYTES)?;
        socket.set_send_buffer_size(QUEUE_BYTES)?;
        if address.is_ipv4() {
            // As Linux' VXLAN devices do: outer packets have no "don't fragment" flag, so an
            // underlay with a smaller MTU than expected slows the tunnel down instead of
            // swallowing large packets.
            discover_mtu(&socket, libc::IP_PMTUDISC_DONT)?;
        }
        socket.bind(&SockAddr::from(address))?;
        Ok(Self(socket.into()))
    }

    /// Receives a datagram and returns its length in bytes and where it came from.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.0.recv_from(buffer)
    }

    /// Sends a datagram.
    ///
    /// # Errors
    /// `WouldBlock` if the send queue is full, else what the kernel refuses it for.
    pub fn send(&self, datagram: &[u8], destination: SocketAddr) -> io::Result<()> {
        self.0.send_to(datagram, destination)?;
        Ok(())
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The MTU of the path to `peer` in bytes of IP packets, as far as this machine knows it after a
/// datagram that fills `mtu` bytes and must not be fragmented was sent there.
///
/// # Errors
/// If nothing can be sent there at all.
pub fn path_mtu(from: Ipv4Addr, peer: SocketAddrV4, mtu: u16) -> io::Result<u32> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    discover_mtu(&socket, libc::IP_PMTUDISC_DO)?;
    socket.bind(&SockAddr::from(SocketAddrV4::new(from, 0)))?;
    socket.connect(&SockAddr::from(peer))?;
    socket.set_read_timeout(Some(ANSWER))?;
    let socket: std::net::UdpSocket = socket.into();
    let datagram = vec![0; usize::from(mtu.saturating_sub(UDP_HEADERS))];
    let sent = socket.send(&datagram);
    if !matches!(&sent, Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE)) {
        sent?;
        // A router that says no is heard as an error of the socket, before the time is over.
        let _ = socket.recv(&mut [0; 1]);
    }
    let known = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::IpMtu)?;
    Ok(known.try_into().unwrap_or_default())
}

fn discover_mtu(socket: &Socket, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the option's value is an `int` that lives until the call returns, and its length is
    // given; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_arrives_with_its_source() {
        let local = "127.0.0.1:0".parse().unwrap();
        let (one, other) = (
            UdpSocket::bind(local).unwrap(),
            UdpSocket::bind(local).unwrap(),
        );
        let address = |socket: &UdpSocket| socket.0.local_addr().unwrap();
        let mut buffer = [0; 9];
        assert_eq!(
            other.receive(&mut buffer).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        one.send(b"packet", address(&other)).unwrap();
        assert_eq!(other.receive(&mut buffer).unwrap(), (6, address(&one)));
        assert_eq!(&buffer[..6], b"packet");
        let taken = UdpSocket::bind(address(&one)).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }
}
