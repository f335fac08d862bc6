//! Packets by flannel's `udp` backend, in the way of its proxy: a TUN device without offloads and a UDP
//! socket, and one packet per system call between them.

#![allow(
    unsafe_code,
    reason = "a device has no descriptor that can be borrowed otherwise"
)]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, IntoRawFd as _};

use ipnet::Ipv4Net;
use muslin_encap::ip::v4;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

/// As flannel has it.
pub const DEVICE: &str = "flannel0";
/// Of the device: the underlay's, without the headers of IPv4 and UDP.
pub const MTU: u16 = 1472;
/// As flannel has it.
const PORT: u16 = 8285;
/// Where an IPv4 header has its destination.
const DESTINATION: usize = 16;

/// What connects the device and the socket.
pub(crate) struct Proxy {
    device: File,
    socket: UdpSocket,
    routes: Vec<(Ipv4Net, SocketAddrV4)>,
    buffer: Vec<u8>,
}

impl Proxy {
    /// Opens the device and the socket, with one peer.
    pub(crate) fn open(own: Ipv4Addr, subnet: Ipv4Net, peer: Ipv4Addr) -> io::Result<Self> {
        let device = tun_tap::Iface::without_packet_info(DEVICE, tun_tap::Mode::Tun)?;
        // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, which nobody else has.
        let device = unsafe { File::from_raw_fd(device.into_raw_fd()) };
        fcntl(
            &device,
            FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK),
        )?;
        Ok(Self {
            device,
            socket: UdpSocket::bind((own, PORT))?,
            routes: vec![(subnet, SocketAddrV4::new(peer, PORT))],
            buffer: vec![0; MTU.into()],
        })
    }

    /// Carries packets for ever. It waits only after neither side had one.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        loop {
            let mut sources = [
                PollFd::new(self.device.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            ];
            poll(&mut sources, PollTimeout::NONE)?;
            while self.send_one()? | self.receive_one()? {}
        }
    }

    /// Takes a packet from the device to its peer, if there is one. What nobody can take is lost.
    fn send_one(&mut self) -> io::Result<bool> {
        let Some(len) = unless_empty(self.device.read(&mut self.buffer))? else {
            return Ok(false);
        };
        let packet = &mut self.buffer[..len];
        let next = next_hop(&self.routes, packet);
        if let Some(next) = next.filter(|_| v4::decrement_ttl(packet) > Some(0)) {
            let _ = self.socket.send_to(packet, next);
        }
        Ok(true)
    }

    /// Takes a packet from the socket to the device, if there is one.
    fn receive_one(&mut self) -> io::Result<bool> {
        let socket = self.socket.as_raw_fd();
        let received = recv(socket, &mut self.buffer, MsgFlags::MSG_DONTWAIT);
        let Some(len) = unless_empty(received.map_err(io::Error::from))? else {
            return Ok(false);
        };
        let packet = &mut self.buffer[..len];
        if v4::decrement_ttl(packet) > Some(0) {
            let _ = self.device.write(packet);
        }
        Ok(true)
    }
}

/// `None` where there is nothing to read.
fn unless_empty(read: io::Result<usize>) -> io::Result<Option<usize>> {
    match read {
        Ok(len) => Ok(Some(len)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // The peer's answer to what came before its socket was there.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(None),
        Err(error) => Err(error),
    }
}

/// The peer of the first route that has the packet's destination.
fn next_hop(routes: &[(Ipv4Net, SocketAddrV4)], packet: &[u8]) -> Option<SocketAddrV4> {
    let destination: &[u8; 4] = packet.get(DESTINATION..)?.first_chunk()?;
    let destination = Ipv4Addr::from(*destination);
    let mut fitting = routes.iter().filter(|(net, _)| net.contains(&destination));
    fitting.next().map(|(_, peer)| *peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_goes_to_the_peer_that_has_its_destination() {
        let routes = [(1, 11), (2, 12)].map(|(net, host)| {
            let net = Ipv4Net::new(Ipv4Addr::new(10, 244, net, 0), 24).unwrap();
            (net, SocketAddrV4::new(Ipv4Addr::new(10, 9, 0, host), PORT))
        });
        let mut packet = [0; 20];
        packet[16..].copy_from_slice(&[10, 244, 2, 7]);
        assert_eq!(next_hop(&routes, &packet), Some(routes[1].1));
        packet[18] = 3;
        assert_eq!(next_hop(&routes, &packet), None);
        assert_eq!(next_hop(&routes, &packet[..19]), None);
    }
}
