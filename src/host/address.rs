//! Addresses of sockets, of either IP version.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use muslin_stack::datapath::egress::IpVersion;
use nix::sys::socket::SockaddrStorage;
use socket2::{Domain, Protocol, Socket, Type};

/// Any address and any port.
pub(crate) const fn any(version: IpVersion) -> SocketAddr {
    match version {
        IpVersion::Ipv4 => SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        IpVersion::Ipv6 => SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
    }
}

/// The IP version of an address.
pub(crate) const fn version_of(address: SocketAddr) -> IpVersion {
    match address {
        SocketAddr::V4(_) => IpVersion::Ipv4,
        SocketAddr::V6(_) => IpVersion::Ipv6,
    }
}

/// What the kernel says of an address, if it is one of IP.
pub(crate) fn ip(address: &SockaddrStorage) -> Option<SocketAddr> {
    let ipv4 = || Some(SocketAddr::V4((*address.as_sockaddr_in()?).into()));
    let ipv6 = || Some(SocketAddr::V6((*address.as_sockaddr_in6()?).into()));
    ipv4().or_else(ipv6)
}

/// A socket that never waits, and of IPv6 takes nothing of IPv4 (RFC 3493 section 5.3).
///
/// # Errors
/// If there is none, as on a machine without IPv6.
pub(crate) fn open(
    version: IpVersion,
    kind: Type,
    protocol: Option<Protocol>,
) -> io::Result<Socket> {
    let domain = match version {
        IpVersion::Ipv4 => Domain::IPV4,
        IpVersion::Ipv6 => Domain::IPV6,
    };
    let socket = Socket::new(domain, kind.nonblocking(), protocol)?;
    if version == IpVersion::Ipv6 {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}
