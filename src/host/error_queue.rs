//! The kernel's error queue: ICMP errors for datagrams that a socket has sent (ip(7), `IP_RECVERR`).

use std::io::IoSliceMut;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use muslin_stack::datapath::egress::{Complaint, IpVersion};
use muslin_stack::datapath::icmp::IcmpError;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use socket2::Socket;

use super::address::{self, any};

/// Takes the next ICMP error, or the host's own about a datagram that is too long, with what it
/// quotes behind the transport's header, or from ICMP's on. The socket is of this IP version.
pub(super) fn next(socket: &Socket, version: IpVersion, quoted: &mut [u8]) -> Option<Complaint> {
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    loop {
        let mut parts = [IoSliceMut::new(quoted)];
        let fd = socket.as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut control), flags).ok()?;
        let len = message.bytes;
        let complaint = message.cmsgs().ok()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, offender) => {
                let offender = offender.map(|it| it.sin_addr.s_addr.to_ne_bytes().into());
                read(&error, offender)
            }
            ControlMessageOwned::Ipv6RecvErr(error, offender) => {
                read(&error, offender.map(|it| it.sin6_addr.s6_addr.into()))
            }
            _ => None,
        });
        // Others pods have no use for.
        if let Some((error, from)) = complaint {
            let to = message.address.as_ref().and_then(address::ip);
            return Some(Complaint {
                error,
                from,
                to: to.unwrap_or(any(version)),
                len,
            });
        }
    }
}

/// What an error is, and who says so.
fn read(
    error: &libc::sock_extended_err,
    offender: Option<IpAddr>,
) -> Option<(IcmpError, Option<IpAddr>)> {
    let (kind, code, mtu) = (error.ee_type, error.ee_code, error.ee_info);
    match error.ee_origin {
        libc::SO_EE_ORIGIN_ICMP => Some((IcmpError::from_wire(kind, code, mtu)?, Some(offender?))),
        libc::SO_EE_ORIGIN_ICMP6 => {
            Some((IcmpError::from_wire_v6(kind, code, mtu)?, Some(offender?)))
        }
        libc::SO_EE_ORIGIN_LOCAL if error.ee_errno == Errno::EMSGSIZE as u32 => {
            let mtu = mtu.try_into().unwrap_or(u16::MAX);
            Some((IcmpError::FragmentationNeeded(mtu), None))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::socket::{
        setsockopt,
        sockopt::{Ipv4RecvErr, Ipv6RecvErr},
    };
    use socket2::Type;

    use super::*;

    #[test]
    fn a_port_that_nobody_has_is_told_with_what_was_sent_there() {
        for (version, localhost) in [
            (IpVersion::Ipv4, IpAddr::from(Ipv4Addr::LOCALHOST)),
            (IpVersion::Ipv6, IpAddr::from(Ipv6Addr::LOCALHOST)),
        ] {
            let free = UdpSocket::bind((localhost, 0)).unwrap();
            let to = SocketAddr::new(localhost, free.local_addr().unwrap().port());
            drop(free);
            let socket = address::open(version, Type::DGRAM, None).unwrap();
            match version {
                IpVersion::Ipv4 => setsockopt(&socket, Ipv4RecvErr, &true).unwrap(),
                IpVersion::Ipv6 => setsockopt(&socket, Ipv6RecvErr, &true).unwrap(),
            }
            socket.bind(&any(version).into()).unwrap();
            let mut quoted = [0; 500];
            assert_eq!(next(&socket, version, &mut quoted), None);
            socket.send_to(b"hello", &to.into()).unwrap();
            let mut waited = [PollFd::new(socket.as_fd(), PollFlags::empty())];
            poll(&mut waited, PollTimeout::from(5000u16)).unwrap();
            let expected = Complaint {
                error: IcmpError::PortUnreachable,
                from: Some(localhost),
                to,
                len: 5,
            };
            assert_eq!(next(&socket, version, &mut quoted), Some(expected));
            assert_eq!(&quoted[..5], b"hello");
            assert_eq!(next(&socket, version, &mut quoted), None);
        }
    }
}
