//! Ports of this machine that lead to pods, and how they are taken.

use std::io;
use std::net::SocketAddrV4;

use ipnet::Ipv4Net;
use muslin_stack::addresses::ipv4;
use muslin_stack::api::control::Code;
use muslin_stack::api::published::{PortMapping, Transport};
use muslin_stack::datapath::guard;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use crate::error::{Error, Result, errno};

/// Connections that wait to be taken (the kernel has a bound of its own, net.core.somaxconn).
const BACKLOG: i32 = 1024;

/// A published port that is taken.
#[derive(Debug)]
pub(crate) struct Bound {
    /// The host's port is that which was chosen.
    pub(crate) published: PortMapping,
    pub(crate) socket: Socket,
}

/// Takes ports on this machine; connections wait from then on.
///
/// # Errors
/// Why one cannot be had, and what to do.
pub(crate) fn bind(all: &[PortMapping], network: Ipv4Net) -> Result<Vec<Bound>> {
    all.iter().map(|one| bind_one(*one, network)).collect()
}

fn bind_one(mut published: PortMapping, network: Ipv4Net) -> Result<Bound> {
    let PortMapping {
        address,
        host_port,
        transport,
        ..
    } = published;
    let address = ipv4(address).ok_or_else(|| {
        Error::usage(format!(
            "cannot publish on {address}: ports are published on IPv4 addresses only, so far"
        ))
    })?;
    if network.contains(&address) {
        return Err(Error::usage(format!(
            "cannot publish on {address}: it lies in the pod network {network}, and pods reach each \
             other directly"
        )));
    }
    let is_own = address.is_loopback() || address.is_unspecified();
    if !is_own && guard::is_martian(address) {
        return Err(Error::usage(format!(
            "cannot publish on {address}: it is not a unicast address"
        )));
    }
    let socket = open(transport, SocketAddrV4::new(address, host_port));
    let socket = socket.map_err(|error| refusal(&published, &error))?;
    let local = socket.local_addr().ok().and_then(|it| it.as_socket_ipv4());
    published.host_port = local.map_or(host_port, |local| local.port());
    Ok(Bound { published, socket })
}

fn open(transport: Transport, at: SocketAddrV4) -> io::Result<Socket> {
    let kind = match transport {
        Transport::Tcp => Type::STREAM,
        Transport::Udp => Type::DGRAM,
    };
    let socket = Socket::new(Domain::IPV4, kind.nonblocking(), None)?;
    match transport {
        Transport::Tcp => {
            // Connections that have ended do not keep their port (TIME-WAIT).
            socket.set_reuse_address(true)?;
            socket.bind(&at.into())?;
            socket.listen(BACKLOG)?;
        }
        Transport::Udp => {
            // An answer leaves from the address that was asked.
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
            socket.bind(&at.into())?;
        }
    }
    Ok(socket)
}

fn refusal(published: &PortMapping, error: &io::Error) -> Error {
    let PortMapping {
        transport,
        address,
        host_port,
        ..
    } = published;
    let port = format!("port {host_port}/{transport}");
    match errno(error) {
        Errno::EADDRINUSE => {
            let message = format!(
                "{port} on {address} is in use by another process of this machine: choose another \
                 port, or find the process with 'ss -lnp'"
            );
            Error::refused(Code::PortTaken, message)
        }
        Errno::EACCES => Error::failed(format!(
            "{port} is for root only: choose one from 1024 on, or let root allow it with 'sysctl \
             net.ipv4.ip_unprivileged_port_start={host_port}'"
        )),
        Errno::EADDRNOTAVAIL => Error::failed(format!(
            "cannot publish on {address}: this machine has no such address"
        )),
        _ => Error::failed(format!("cannot publish {port} on {address}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_and_a_foreign_address_are_refused() {
        let network = "10.244.0.0/16".parse().unwrap();
        let bind = |text: &str| {
            bind(
                &muslin_stack::api::published::Ports::all(&[text.parse().unwrap()]),
                network,
            )
        };
        for transport in ["tcp", "udp"] {
            let bound = bind(&format!("127.0.0.1:0:80/{transport}")).unwrap();
            let port = bound[0].published.host_port;
            assert_ne!(port, 0);
            let again = bind(&format!("127.0.0.1:{port}:81/{transport}")).unwrap_err();
            assert!(again.to_string().contains("another process"), "{again}");
            drop(bound);
            bind(&format!("127.0.0.1:{port}:81/{transport}")).unwrap();
        }
        for (text, part) in [
            ("10.244.1.1:8080:80", "pod network"),
            ("[::1]:8080:80", "IPv4 addresses only"),
            ("224.0.0.1:8080:80", "not a unicast address"),
            ("198.51.100.1:8080:80", "no such address"),
        ] {
            let error = bind(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
