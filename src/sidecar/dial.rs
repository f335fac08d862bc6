//! Connections to what clients name.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4};
use std::sync::Arc;

use muslin_stack::api::control::Attached;
use muslin_stack::api::socks5::{Host, Target};
use thiserror::Error;

use super::overlay::{DatagramSocket, Overlay, Stream};
use super::resolve::{ResolveError, resolve};
use crate::{attach, error};

/// Why there is no connection.
#[derive(Debug, Error)]
pub(super) enum DialError {
    /// The name leads nowhere.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The overlay has no such addresses.
    #[error("{0}: the pod network has no IPv6")]
    Ipv6(Ipv6Addr),
    /// It was tried.
    #[error("{0}: {1}")]
    Connect(SocketAddrV4, io::Error),
}

/// Connects by a pod's address.
pub(super) struct Dialler {
    overlay: Arc<Overlay>,
    address: Ipv4Addr,
    resolver: Ipv4Addr,
    search: Vec<String>,
}

impl Dialler {
    /// Connections by the address of an attached pod, whose gateway knows the names.
    ///
    /// # Errors
    /// If it has no IPv4 address.
    pub(super) fn new(overlay: Arc<Overlay>, attached: &Attached) -> error::Result<Self> {
        let (address, gateway) = attach::place(attached)?;
        Ok(Self {
            overlay,
            address: address.addr(),
            resolver: gateway,
            search: attached.search.clone(),
        })
    }

    /// The address connections are made by.
    pub(super) fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Connects to a host's port.
    pub(super) async fn connect(&self, (host, port): &Target) -> Result<Stream, DialError> {
        let to = SocketAddrV4::new(self.resolve(host).await?, *port);
        let connected = self.overlay.connect(to).await;
        connected.map_err(|error| DialError::Connect(to, error))
    }

    /// Takes a UDP port of the pod's address.
    pub(super) async fn bind(&self) -> io::Result<DatagramSocket> {
        self.overlay.bind().await
    }

    /// The address of a host.
    pub(super) async fn resolve(&self, host: &Host) -> Result<Ipv4Addr, DialError> {
        match host {
            Host::Ip(IpAddr::V4(address)) => Ok(*address),
            Host::Ip(IpAddr::V6(address)) => match address.to_ipv4_mapped() {
                Some(address) => Ok(address),
                None => Err(DialError::Ipv6(*address)),
            },
            Host::Name(name) => {
                let socket = self.bind().await.map_err(ResolveError::Resolver)?;
                Ok(resolve(&socket, self.resolver, name, &self.search).await?)
            }
        }
    }
}
