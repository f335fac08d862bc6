//! Ports of this machine that lead to pods, and how they are taken.

use std::io;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use muslin_stack::addresses::Nets;
use muslin_stack::api::control::Code;
use muslin_stack::api::published::{PortMapping, Transport};
use muslin_stack::datapath::guard;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Socket, Type};

use super::address::{self, version_of};
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
pub(crate) fn bind(all: &[PortMapping], network: impl Into<Nets>) -> Result<Vec<Bound>> {
    let network = network.into();
    all.iter().map(|one| bind_one(*one, network)).collect()
}

fn bind_one(mut published: PortMapping, network: Nets) -> Result<Bound> {
    let PortMapping {
        address,
        host_port,
        transport,
        ..
    } = published;
    if let Some(network) = network.iter().find(|net: &IpNet| net.contains(&address)) {
        return Err(Error::usage(format!(
            "cannot publish on {address}: it lies in the pod network {network}, and pods reach each \
             other directly"
        )));
    }
    let is_own = address.is_loopback() || address.is_unspecified();
    let is_unicast = match address {
        IpAddr::V4(address) => !guard::is_martian(address),
        IpAddr::V6(address) => !guard::is_martian_v6(address),
    };
    if !is_own && !is_unicast {
        return Err(Error::usage(format!(
            "cannot publish on {address}: it is not a unicast address"
        )));
    }
    if matches!(address, IpAddr::V6(address) if address.is_unicast_link_local()) {
        return Err(Error::usage(format!(
            "cannot publish on {address}: a link-local address says nothing without its link; choose \
             another, or '::' for all"
        )));
    }
    let socket = open(transport, SocketAddr::new(address, host_port));
    let socket = socket.map_err(|error| refusal(&published, &error))?;
    let local = socket.local_addr().ok().and_then(|it| it.as_socket());
    published.host_port = local.map_or(host_port, |local| local.port());
    Ok(Bound { published, socket })
}

fn open(transport: Transport, at: SocketAddr) -> io::Result<Socket> {
    let kind = match transport {
        Transport::Tcp => Type::STREAM,
        Transport::Udp => Type::DGRAM,
    };
    let socket = address::open(version_of(at), kind, None)?;
    match transport {
        Transport::Tcp => {
            // Connections that have ended do not keep their port (TIME-WAIT).
            socket.set_reuse_address(true)?;
            socket.bind(&at.into())?;
            socket.listen(BACKLOG)?;
        }
        Transport::Udp => {
            // An answer leaves from the address that was asked.
            match at {
                SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
                SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
            }
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
        Errno::EAFNOSUPPORT => Error::failed(format!(
            "cannot publish on {address}: this machine has no IPv6"
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
        let network: Nets = "10.244.0.0/16,fd00:10::/48".parse().unwrap();
        let bind = |text: &str| {
            bind(
                &muslin_stack::api::published::Ports::all(&[text.parse().unwrap()]),
                network,
            )
        };
        for (transport, at) in [
            ("tcp", "127.0.0.1"),
            ("udp", "127.0.0.1"),
            ("tcp", "[::1]"),
            ("udp", "[::1]"),
            ("tcp", "[::]"),
        ] {
            let bound = bind(&format!("{at}:0:80/{transport}")).unwrap();
            let port = bound[0].published.host_port;
            assert_ne!(port, 0);
            let again = bind(&format!("{at}:{port}:81/{transport}")).unwrap_err();
            assert!(again.to_string().contains("another process"), "{again}");
            drop(bound);
            bind(&format!("{at}:{port}:81/{transport}")).unwrap();
        }
        // The two versions are apart.
        let all = bind("[::]:0:80").unwrap();
        let port = all[0].published.host_port;
        bind(&format!("0.0.0.0:{port}:80")).unwrap();
        for (text, part) in [
            ("10.244.1.1:8080:80", "pod network"),
            ("[fd00:10::1]:8080:80", "pod network"),
            ("[fe80::1]:8080:80", "without its link"),
            ("[ff02::1]:8080:80", "not a unicast address"),
            ("[2001:db8::1]:8080:80", "no such address"),
            ("224.0.0.1:8080:80", "not a unicast address"),
            ("198.51.100.1:8080:80", "no such address"),
        ] {
            let error = bind(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
