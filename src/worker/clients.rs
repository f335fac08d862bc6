//! PortMapping ports: connections and datagrams of the machine's clients, for pods of this node.
//!
//! The first worker has them all, with the flows that begin here. What pods answer comes to the
//! queue of their device that was last written to, as long as the kernel remembers that, which is
//! a few seconds; where a packet comes to another worker, that one hands it over.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use muslin_stack::Instant;
use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::api::published::{PortMapping, Transport};
use muslin_stack::datapath::port::PortId;
use muslin_stack::datapath::published::{Client, pod_address};
use muslin_stack::datapath::work::{self, Turn};
use muslin_stack::drops::DropReason;
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use proxy_header::{ProxiedAddress, ProxyHeader};
use socket2::Socket;
use tracing::{debug, warn};

use super::packet_loop::PacketLoop;
use super::published::{Port, PublishedPorts};
use crate::error::errno;
use crate::host::Token;

/// Connections taken from one port before the others have their turn.
const ACCEPTS: usize = 64;
/// How long a port waits after the kernel had no descriptors or not enough memory for a connection.
const PAUSE: muslin_stack::Duration = muslin_stack::Duration::from_millis(200);

/// The address of a pod to which a port of the host's address leads, and the overlay's network of the same
/// IP version.
fn place(pod: Addresses, network: Nets, host: IpAddr) -> Option<(IpAddr, IpNet)> {
    let pod = pod_address(pod, host)?;
    let network = match pod {
        IpAddr::V4(_) => network.ipv4()?.into(),
        IpAddr::V6(_) => network.ipv6()?.into(),
    };
    Some((pod, network))
}

impl PacketLoop {
    /// Takes the published ports of an attached pod; all workers know them, and the first has the
    /// sockets.
    pub(super) fn publish(
        &mut self,
        device: PortId,
        address: Addresses,
        network: Nets,
        all: Vec<(PortMapping, Option<Socket>)>,
    ) {
        for (ports, socket) in all {
            let Some((pod, network)) = place(address, network, ports.address) else {
                warn!("{ports} is not published: the pod has no address");
                continue;
            };
            let pod = SocketAddr::new(pod, ports.pod_port);
            if ports.transport == Transport::Udp
                && let Err(reason) = self.path.expect_datagrams(pod)
            {
                warn!("{ports} is not published: {}", reason.describe());
                continue;
            }
            let Some(socket) = socket else { continue };
            let index = self.published.next;
            self.published.next = index.wrapping_add(1);
            let event = Token::Published(index).readable();
            if self.reads
                && let Err(error) = self.epoll.add(&socket, event)
            {
                warn!("cannot wait for connections to the published port {ports}: {error}");
                continue;
            }
            let port = Port {
                device,
                pod,
                network,
                ports,
                socket: Arc::new(socket),
                turn: Turn::default(),
            };
            self.published.ports.insert(index, port);
        }
    }

    /// Takes what has come to a published port.
    pub(super) fn read_published(&mut self, index: u32) {
        let now = self.clock.now();
        let Some(port) = self.published.ports.get(&index) else {
            return;
        };
        match port.ports.transport {
            Transport::Tcp => self.accept(now, index),
            Transport::Udp => self.receive(now, index),
        }
    }

    /// Lets ports go on that the kernel had nothing for.
    pub(super) fn resume_published(&mut self, now: Instant) {
        if self.published.pauses.is_none_or(|until| now < until) {
            return;
        }
        self.published.pauses = None;
        for (index, port) in &self.published.ports {
            let mut event = Token::Published(*index).readable();
            let _ = self.epoll.modify(&*port.socket, &mut event);
        }
    }

    fn accept(&mut self, now: Instant, index: u32) {
        for _ in 0..ACCEPTS {
            let Some(port) = self.published.ports.get(&index) else {
                return;
            };
            match port.socket.accept() {
                Ok((stream, _)) => {
                    self.welcome(now, index, stream);
                    self.send_own(now);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if is_passing(errno(&error)) => {}
                Err(error) => {
                    debug!("the published port {} pauses: {error}", port.ports);
                    let token = Token::Published(index).into();
                    let mut none = EpollEvent::new(EpollFlags::empty(), token);
                    let _ = self.epoll.modify(&*port.socket, &mut none);
                    self.published.pauses = Some(now + PAUSE);
                    return;
                }
            }
        }
    }

    /// Asks the pod for a connection.
    fn welcome(&mut self, now: Instant, index: u32, stream: Socket) {
        let Self {
            path,
            sockets,
            published,
            ..
        } = self;
        let Some(port) = published.ports.get(&index) else {
            return;
        };
        let (Some(client), Some(local)) = (
            stream.peer_addr().ok().and_then(|it| it.as_socket()),
            stream.local_addr().ok().and_then(|it| it.as_socket()),
        ) else {
            // It has gone already.
            return;
        };
        let preface = if port.ports.proxy {
            preface(client, local)
        } else {
            Vec::new()
        };
        let by = Client {
            address: client,
            local: local.ip(),
        };
        match path.accept(now, port.published(), by, &preface, sockets) {
            Ok(flow) => {
                if let Err(error) = sockets.adopt(flow, stream) {
                    // The flow ends when it finds that it has no socket.
                    debug!("cannot wait for a client of {}: {error}", port.ports);
                }
            }
            Err(reason) => {
                path.node_mut().count_drops(reason, 1);
                let _ = stream.set_linger(Some(Duration::ZERO));
            }
        }
    }

    fn receive(&mut self, now: Instant, index: u32) {
        if let Some(port) = self.published.ports.get_mut(&index) {
            port.turn.begin();
        }
        loop {
            let PublishedPorts {
                ports,
                buffer,
                control,
                ..
            } = &mut self.published;
            let Some(port) = ports.get_mut(&index).filter(|port| port.turn.goes_on()) else {
                return;
            };
            match port.receive(buffer, control) {
                Ok((len, client, local)) => {
                    port.turn.take(work::of_packets(1, len));
                    if let Err(reason) = self.deliver(now, index, len, (client, local)) {
                        self.path.node_mut().count_drops(reason, 1);
                    }
                    self.send_own(now);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(error) => {
                    debug!("the published port {}: {error}", port.ports);
                    return;
                }
            }
        }
    }

    /// Gives a client's datagram to its flow, which it begins if there is none.
    fn deliver(
        &mut self,
        now: Instant,
        index: u32,
        len: usize,
        (client, local): (SocketAddr, IpAddr),
    ) -> Result<(), DropReason> {
        let Self {
            path,
            sockets,
            published,
            ..
        } = self;
        let PublishedPorts { ports, buffer, .. } = published;
        let port = ports.get(&index).ok_or(DropReason::PortGone)?;
        let known = sockets.flow_of((index, client));
        let by = Client {
            address: client,
            local,
        };
        let payload = &buffer[..len];
        let flow = path.deliver(now, port.published(), by, known, payload, sockets)?;
        if known != Some(flow) || !sockets.answers_from(flow, local) {
            sockets.share(flow, port.socket.clone(), (index, client), local);
        }
        Ok(())
    }
}

/// Whether to go on accepting: these errors are of the new connection, not of the socket
/// (accept(2)).
fn is_passing(error: Errno) -> bool {
    matches!(
        error,
        Errno::EINTR
            | Errno::ECONNABORTED
            | Errno::ENETDOWN
            | Errno::EPROTO
            | Errno::ENOPROTOOPT
            | Errno::EHOSTDOWN
            | Errno::ENONET
            | Errno::EHOSTUNREACH
            | Errno::EOPNOTSUPP
            | Errno::ENETUNREACH
            | Errno::EPERM
    )
}

/// A header with the source of a connection (PROXY protocol, version 2).
fn preface(client: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let addresses = ProxiedAddress::stream(client, local);
    let mut header = Vec::new();
    // Two addresses of one IP version fit.
    let _ = ProxyHeader::with_address(addresses).encode_v2(&mut header);
    header
}
