//! Datagrams of a SOCKS5 client (RFC 1928 section 7).
//!
//! The relay lives as long as the connection that asked for it, and is for that client alone. It
//! has one port of the pod's address, so that all who are sent to see the same client.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use muslin_encap::ip::v4;
use muslin_stack::api::socks5::{self as wire, Host, Target};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UdpSocket};
use tracing::debug;

use super::super::dial::Dialler;
use super::super::overlay::DatagramSocket;
use super::lookups::Lookups;

/// The longest datagram of IPv4, and a SOCKS5 header with a name in front.
const BUFFER_LEN: usize = v4::MAX_LEN + 262;
/// After so long without a datagram the relay ends (RFC 4787 section 4.3: no less than 2 minutes).
const IDLE: Duration = Duration::from_secs(600);

/// A relay that a client has been given.
pub(super) struct Relay {
    /// Where the client sends to.
    local: UdpSocket,
    overlay: DatagramSocket,
    client: IpAddr,
    /// Where the client sends from, as soon as it has sent.
    from: Option<SocketAddr>,
}

impl Relay {
    /// A relay for the client of `stream`, on the address that the client reached.
    pub(super) async fn open(stream: &TcpStream, dialler: &Dialler) -> io::Result<Self> {
        let local = SocketAddr::new(stream.local_addr()?.ip(), 0);
        Ok(Self {
            local: UdpSocket::bind(local).await?,
            overlay: dialler.bind().await?,
            client: stream.peer_addr()?.ip(),
            from: None,
        })
    }

    /// Where the client has to send to.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        let address = self.local.local_addr()?;
        Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
    }

    /// Relays until the client's connection ends, or nothing comes for long. Datagrams to a name wait
    /// until it is looked up; others do not.
    pub(super) async fn run(mut self, stream: &mut TcpStream, dialler: &Dialler) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_LEN];
        let mut lookups = Lookups::new();
        // What a client says on its connection then means nothing.
        let mut said = [0; 64];
        loop {
            tokio::select! {
                read = stream.read(&mut said) => if read? == 0 {
                    return Ok(());
                },
                received = self.local.recv_from(&mut buffer) => {
                    let (len, from) = received?;
                    let Some(((host, port), payload)) = self.take(&buffer[..len], from) else {
                        continue;
                    };
                    let address = match host {
                        Host::Name(name) => lookups.find(name, (port, payload), |name| async move {
                            dialler.for_datagrams(&Host::Name(name)).await
                        }),
                        Host::Ip(_) => dialler.for_datagrams(&host).await.map_or_else(|error| {
                            debug!("SOCKS5: a datagram was not sent: {error}");
                            None
                        }, Some),
                    };
                    if let Some(address) = address {
                        self.overlay.send(SocketAddr::new(address, port), payload)?;
                    }
                }
                Some((address, datagrams)) = lookups.next() => {
                    for (port, payload) in datagrams {
                        self.overlay.send(SocketAddr::new(address, port), &payload)?;
                    }
                }
                received = self.overlay.receive() => {
                    let (from, payload) = received?;
                    self.give(from, &payload).await;
                }
                () = tokio::time::sleep(IDLE) => return Ok(()),
            }
        }
    }

    /// Where a client's datagram is to go, and what it says.
    fn take<'a>(&mut self, bytes: &'a [u8], from: SocketAddr) -> Option<(Target, &'a [u8])> {
        let is_client = from.ip() == self.client && self.from.is_none_or(|known| known == from);
        if !is_client {
            debug!("SOCKS5: a datagram from {from}, which is not the relay's client");
            return None;
        }
        self.from = Some(from);
        match wire::datagram(bytes) {
            Ok(target) => target.map(|(target, header)| (target, &bytes[header..])),
            Err(fault) => {
                debug!("SOCKS5: a datagram has {fault}");
                None
            }
        }
    }

    /// Gives the client a datagram.
    async fn give(&self, from: SocketAddr, payload: &[u8]) {
        let Some(client) = self.from else { return };
        let datagram = [&wire::datagram_header(from)[..], payload].concat();
        if let Err(error) = self.local.send_to(&datagram, client).await {
            debug!("SOCKS5: a datagram for {client}: {error}");
        }
    }
}
