//! Datagrams of a SOCKS5 client (RFC 1928 section 7).
//!
//! The relay lives as long as the connection that asked for it, and is for that client alone. It
//! has one port of the pod's address, so that all who are sent to see the same client.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UdpSocket};
use tracing::debug;

use super::super::dial::Dialler;
use super::super::overlay::DatagramSocket;
use super::wire;

/// The longest datagram of IPv4, and a SOCKS5 header with a name in front.
const BUFFER_LEN: usize = 65_535 + 262;
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

    /// Where the client has to send to; nothing if that is no IPv4 address.
    pub(super) fn address(&self) -> io::Result<Option<SocketAddrV4>> {
        let address = self.local.local_addr()?;
        Ok(match address.ip().to_canonical() {
            IpAddr::V4(ip) => Some(SocketAddrV4::new(ip, address.port())),
            IpAddr::V6(_) => None,
        })
    }

    /// Relays until the client's connection ends, or nothing comes for long.
    pub(super) async fn run(mut self, stream: &mut TcpStream, dialler: &Dialler) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_LEN];
        // What a client says on its connection then means nothing.
        let mut said = [0; 64];
        loop {
            tokio::select! {
                read = stream.read(&mut said) => if read? == 0 {
                    return Ok(());
                },
                received = self.local.recv_from(&mut buffer) => {
                    let (len, from) = received?;
                    self.send(&buffer[..len], from, dialler).await?;
                }
                received = self.overlay.receive() => {
                    let (from, payload) = received?;
                    self.give(from, &payload).await;
                }
                () = tokio::time::sleep(IDLE) => return Ok(()),
            }
        }
    }

    /// Sends a client's datagram.
    async fn send(&mut self, bytes: &[u8], from: SocketAddr, dialler: &Dialler) -> io::Result<()> {
        let is_client = from.ip() == self.client && self.from.is_none_or(|known| known == from);
        if !is_client {
            debug!("SOCKS5: a datagram from {from}, who is not the relay's client");
            return Ok(());
        }
        self.from = Some(from);
        let ((host, port), header) = match wire::datagram(bytes) {
            Ok(Some(target)) => target,
            Ok(None) => return Ok(()),
            Err(fault) => {
                debug!("SOCKS5: a datagram has {fault}");
                return Ok(());
            }
        };
        let to = match dialler.resolve(&host).await {
            Ok(address) => SocketAddrV4::new(address, port),
            Err(error) => {
                debug!("SOCKS5: a datagram goes nowhere: {error}");
                return Ok(());
            }
        };
        self.overlay.send(to, &bytes[header..])
    }

    /// Gives the client a datagram.
    async fn give(&self, from: SocketAddrV4, payload: &[u8]) {
        let Some(client) = self.from else { return };
        let datagram = [&wire::datagram_header(from), payload].concat();
        if let Err(error) = self.local.send_to(&datagram, client).await {
            debug!("SOCKS5: a datagram for {client}: {error}");
        }
    }
}
