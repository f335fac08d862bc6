//! The way from a worker to the service: one end of a pair of Unix sockets for each pod's socket.

use std::io;
use std::net::{IpAddr, SocketAddr};

use muslin_stack::datapath::egress::Protocol;
use nix::errno::Errno;
use socket2::{Domain, Socket, Type};
use tokio::sync::mpsc;

use super::message::Transport;

/// Sockets of pods that may wait to be taken.
const WAITING: usize = 256;

/// A worker's handle to the DNS server, to which it passes its pods' sockets.
#[derive(Debug, Clone)]
pub struct DnsConnector(mpsc::Sender<PodSocket>);

/// A socket for one pod's queries.
#[derive(Debug)]
pub(super) struct PodSocket {
    pub(super) pod: IpAddr,
    pub(super) transport: Transport,
    pub(super) socket: Socket,
}

impl DnsConnector {
    /// A handle, and who comes by it.
    pub(super) fn new() -> (Self, mpsc::Receiver<PodSocket>) {
        let (sender, pod_sockets) = mpsc::channel(WAITING);
        (Self(sender), pod_sockets)
    }

    /// A socket for queries of the pod at `pod`: a stream, or one that preserves datagrams.
    ///
    /// # Errors
    /// If there are no descriptors, or the server's queue is full.
    pub(crate) fn connect(&self, pod: SocketAddr, protocol: Protocol) -> io::Result<Socket> {
        let (kind, transport) = match protocol {
            Protocol::Tcp => (Type::STREAM, Transport::Stream),
            Protocol::Udp => (Type::SEQPACKET, Transport::Datagram),
            Protocol::Ping => return Err(io::ErrorKind::Unsupported.into()),
        };
        let (near, far) = Socket::pair(Domain::UNIX, kind.nonblocking(), None)?;
        let pod_socket = PodSocket {
            pod: pod.ip(),
            transport,
            socket: far,
        };
        let taken = self.0.try_send(pod_socket);
        taken.map_err(|_| Errno::EAGAIN)?;
        Ok(near)
    }
}
