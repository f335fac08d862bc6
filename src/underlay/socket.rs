//! The sockets that datagrams of the tunnel come and go by.

use std::io;
use std::net::SocketAddr;

use muslin_encap::tunnel::Format;
use muslin_encap::tunnel::ipip;
use nix::libc;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use crate::host::option;

/// What the kernel is asked to queue for sending, in bytes, and for receiving, in one queue or in
/// each of several; it grants up to `net.core.wmem_max` and `rmem_max`.
const SEND_BYTES: usize = 4 << 20;
const RECEIVE_BYTES: usize = 4 << 20;
const SHARE_BYTES: usize = 2 << 20;

/// What the sockets may use of what the kernel has.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How the tunnel's packets look.
    pub format: Format,
    /// Source ports besides the tunnel's own.
    pub source_ports: usize,
    /// Whether trains leave with one call (`UDP_SEGMENT`, Linux 4.18).
    pub gso: bool,
    /// Whether they may arrive with one (`UDP_GRO`, Linux 5.0).
    pub gro: bool,
}

/// Whose a socket's port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Port {
    /// Its own.
    Own,
    /// That of other sockets of this user, too.
    Shared,
}

/// A non-blocking socket with long queues.
pub(super) fn open(
    format: Format,
    address: SocketAddr,
    port: Port,
) -> io::Result<std::net::UdpSocket> {
    let (kind, protocol) = match format {
        Format::Vxlan | Format::Udp | Format::WireGuard => (Type::DGRAM, Protocol::UDP),
        Format::Ipip => (Type::RAW, Protocol::from(i32::from(ipip::PROTOCOL))),
    };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_port(port == Port::Shared)?;
    socket.set_recv_buffer_size(match port {
        Port::Own => RECEIVE_BYTES,
        Port::Shared => SHARE_BYTES,
    })?;
    socket.set_send_buffer_size(SEND_BYTES)?;
    // As Linux' VXLAN devices do: outer packets have no "don't fragment" flag, so an underlay with a
    // smaller MTU than expected slows the tunnel down instead of swallowing large packets. In IPv6 this
    // machine cuts them once a router has said so (RFC 8200 section 5).
    match address {
        SocketAddr::V4(_) => discover_mtu(&socket, libc::IP_PMTUDISC_DONT)?,
        SocketAddr::V6(_) => {
            // IPv4 has sockets of its own.
            socket.set_only_v6(true)?;
            let (level, name) = (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER);
            option::set(&socket, level, name, libc::IPV6_PMTUDISC_DONT)?;
        }
    }
    socket.bind(&SockAddr::from(address))?;
    Ok(socket.into())
}

/// Lets others share the port of a socket that was bound alone.
pub(super) fn share_port(socket: &std::net::UdpSocket) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_recv_buffer_size(SHARE_BYTES)?;
    socket.set_reuse_port(true)
}

/// Sets how Linux finds out the path MTU (`IP_MTU_DISCOVER`, ip(7)).
pub(super) fn discover_mtu(socket: &Socket, value: libc::c_int) -> io::Result<()> {
    option::set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value)
}
