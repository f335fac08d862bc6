//! The kernel's error queue: ICMP errors for datagrams that a socket has sent (ip(7), `IP_RECVERR`).

use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;

use muslin_stack::datapath::egress::Complaint;
use muslin_stack::datapath::icmp::IcmpError;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg};
use socket2::Socket;

/// Takes the next ICMP error, or the host's own about a datagram that is too long, with what it
/// quotes behind the transport's header, or from ICMP's on.
pub(super) fn next(socket: &Socket, quoted: &mut [u8]) -> Option<Complaint> {
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    loop {
        let mut parts = [IoSliceMut::new(quoted)];
        let fd = socket.as_raw_fd();
        let message = recvmsg::<SockaddrIn>(fd, &mut parts, Some(&mut control), flags).ok()?;
        let len = message.bytes;
        let complaint = message.cmsgs().ok()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, offender) => read(&error, offender),
            _ => None,
        });
        // Others pods have no use for.
        if let Some((error, from)) = complaint {
            let nowhere = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
            let to = message.address.map_or(nowhere, SocketAddrV4::from);
            return Some(Complaint {
                error,
                from: from.map(IpAddr::V4),
                to: to.into(),
                len,
            });
        }
    }
}

fn read(
    error: &libc::sock_extended_err,
    offender: Option<libc::sockaddr_in>,
) -> Option<(IcmpError, Option<Ipv4Addr>)> {
    match error.ee_origin {
        libc::SO_EE_ORIGIN_ICMP => {
            let from = offender?.sin_addr.s_addr.to_ne_bytes();
            let error = IcmpError::from_wire(error.ee_type, error.ee_code, error.ee_info)?;
            Some((error, Some(from.into())))
        }
        libc::SO_EE_ORIGIN_LOCAL if error.ee_errno == Errno::EMSGSIZE as u32 => {
            let mtu = error.ee_info.try_into().unwrap_or(u16::MAX);
            Some((IcmpError::FragmentationNeeded(mtu), None))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::socket::{setsockopt, sockopt::Ipv4RecvErr};
    use socket2::{Domain, Type};

    use super::*;

    #[test]
    fn a_port_that_nobody_has_is_told_with_what_was_sent_there() {
        let free = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, free.local_addr().unwrap().port());
        drop(free);
        let socket = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), None).unwrap();
        setsockopt(&socket, Ipv4RecvErr, &true).unwrap();
        socket
            .bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0).into())
            .unwrap();
        let mut quoted = [0; 500];
        assert_eq!(next(&socket, &mut quoted), None);
        socket.send_to(b"hello", &to.into()).unwrap();
        let mut waited = [PollFd::new(socket.as_fd(), PollFlags::empty())];
        poll(&mut waited, PollTimeout::from(5000u16)).unwrap();
        let expected = Complaint {
            error: IcmpError::PortUnreachable,
            from: Some(Ipv4Addr::LOCALHOST.into()),
            to: to.into(),
            len: 5,
        };
        assert_eq!(next(&socket, &mut quoted), Some(expected));
        assert_eq!(&quoted[..5], b"hello");
        assert_eq!(next(&socket, &mut quoted), None);
    }
}
