//! Sockets of the host, one for each flow.

use std::collections::{HashMap, HashSet};
use std::io::{self, IoSlice, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use muslin_stack::datapath::egress::{
    Complaint, FlowId, FlowKey, Host, HostError, IpVersion, Marks, Protocol,
};
use nix::errno::Errno;
use nix::libc::{self, MSG_NOSIGNAL, in_addr, in_pktinfo, in6_addr, in6_pktinfo};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{
    ControlMessage, MsgFlags, SockaddrStorage, recvfrom, sendmsg, setsockopt,
    sockopt::{Ipv4RecvErr, Ipv6RecvErr},
};
use socket2::{Domain, Socket, TcpKeepalive, Type};
use tracing::debug;

use super::address::{self, any, version_of};
use super::error_queue;
use super::token::Token;
use crate::dns::{self, DnsConnector};
use crate::error::errno;
use crate::host::option;

/// After so long without a word the other end is asked whether it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(120);

/// The sockets of a worker's flows, whose events come by its epoll.
pub(crate) struct Sockets {
    epoll: Arc<Epoll>,
    /// Where queries go, if this is a node.
    dns: Option<DnsConnector>,
    sockets: HashMap<FlowId, FlowSocket>,
    /// Flows of datagrams to the gateway: an end of theirs is none of a datagram without bytes.
    to_gateway: HashSet<FlowId>,
    /// Flows that share a socket.
    clients: HashMap<Client, FlowId>,
    /// Whether the kernel cuts trains of datagrams apart.
    takes_trains: bool,
}

/// The number of a published port and the address of who sends to it.
pub(crate) type Client = (u32, SocketAddr);

enum FlowSocket {
    Own(Socket, IpVersion),
    /// A published UDP port's, by which each client is answered from the address it asked.
    Shared {
        socket: Arc<Socket>,
        client: Client,
        local: IpAddr,
    },
}

impl Sockets {
    /// No sockets; their events will come by `epoll`, and queries of pods go through the connector.
    pub(crate) fn new(epoll: Arc<Epoll>, dns: Option<DnsConnector>) -> Self {
        Self {
            epoll,
            dns,
            sockets: HashMap::new(),
            to_gateway: HashSet::new(),
            clients: HashMap::new(),
            takes_trains: false,
        }
    }

    /// Sends trains of datagrams with one call from now on (`UDP_SEGMENT`, Linux 4.18).
    pub(crate) const fn send_trains(&mut self) {
        self.takes_trains = true;
    }

    /// Gives a flow a socket that is connected to its other end.
    ///
    /// # Errors
    /// If the kernel does not watch it; the flow has none then.
    pub(crate) fn adopt(&mut self, flow: FlowId, socket: Socket) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let domain = socket.domain()?;
        if socket.r#type()? == Type::STREAM && domain != Domain::UNIX {
            prepare(&socket)?;
        }
        let version = match domain {
            Domain::IPV6 => IpVersion::Ipv6,
            // Or none, and nothing of it.
            _ => IpVersion::Ipv4,
        };
        self.watch(flow, socket, version)
    }

    fn watch(&mut self, flow: FlowId, socket: Socket, version: IpVersion) -> io::Result<()> {
        // An event for each change and no more: the flow knows what its socket is ready for.
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLET;
        let event = EpollEvent::new(flags, Token::Flow(flow).into());
        self.epoll.add(&socket, event)?;
        self.sockets.insert(flow, FlowSocket::Own(socket, version));
        Ok(())
    }

    /// Gives a flow a published port's socket, which others read, for a client that has sent to
    /// `local`. Answers come from there, so it does so again when the client sends elsewhere.
    pub(crate) fn share(
        &mut self,
        flow: FlowId,
        socket: Arc<Socket>,
        client: Client,
        local: IpAddr,
    ) {
        self.clients.insert(client, flow);
        let shared = FlowSocket::Shared {
            socket,
            client,
            local,
        };
        self.sockets.insert(flow, shared);
    }

    /// The flow of a published port's client, if it has one.
    pub(crate) fn flow_of(&self, client: Client) -> Option<FlowId> {
        self.clients.get(&client).copied()
    }

    /// Whether a flow's answers to its client come from this address.
    pub(crate) fn answers_from(&self, flow: FlowId, address: IpAddr) -> bool {
        let entry = self.sockets.get(&flow);
        matches!(entry, Some(FlowSocket::Shared { local, .. }) if *local == address)
    }

    fn get(&self, flow: FlowId) -> Result<&Socket, HostError> {
        match self.sockets.get(&flow) {
            Some(FlowSocket::Own(socket, _)) => Ok(socket),
            // Whoever reads it reads for all.
            Some(FlowSocket::Shared { .. }) => Err(HostError::WouldBlock),
            None => Err(HostError::Failed),
        }
    }
}

impl Host for Sockets {
    fn open(
        &mut self,
        flow: FlowId,
        protocol: Protocol,
        version: IpVersion,
    ) -> Result<(), HostError> {
        let bound = new_socket(protocol, version).and_then(|socket| {
            // Sending binds it as well, but lack of ports looks like lack of room then.
            socket.bind(&any(version).into())?;
            self.watch(flow, socket, version)
        });
        bound.map_err(|error| why_none(&error))
    }

    fn connect(
        &mut self,
        flow: FlowId,
        protocol: Protocol,
        to: SocketAddr,
    ) -> Result<(), HostError> {
        let version = version_of(to);
        let socket = new_socket(protocol, version).map_err(|error| why_none(&error))?;
        match socket.connect(&to.into()) {
            Ok(()) => {}
            Err(error) if errno(&error) == Errno::EINPROGRESS => {}
            // There is no address of this machine from which to send.
            Err(error) if to.is_ipv6() && errno(&error) == Errno::EADDRNOTAVAIL => {
                return Err(HostError::NetUnreachable);
            }
            Err(error) => return Err(why_none(&error)),
        }
        let watched = self.watch(flow, socket, version);
        watched.map_err(|error| why_none(&error))
    }

    fn serve(&mut self, flow: FlowId, key: FlowKey) -> Result<(), HostError> {
        let dns = self.dns.as_ref().ok_or(HostError::Refused)?;
        if key.remote.port() != dns::PORT {
            return Err(HostError::Refused);
        }
        let socket = dns.connect(key.pod, key.protocol);
        let watched = socket.and_then(|socket| self.watch(flow, socket, version_of(key.pod)));
        watched.map_err(|error| why_none(&error))?;
        if key.protocol == Protocol::Udp {
            self.to_gateway.insert(flow);
        }
        Ok(())
    }

    fn dialled(&mut self, flow: FlowId, result: Result<(), HostError>) {
        if let Err(error) = result {
            debug!("no connection to a pod for flow {flow:?}: {error}");
        }
    }

    fn connected(&mut self, flow: FlowId) -> Result<(), HostError> {
        let socket = self.get(flow)?;
        match socket.take_error() {
            Ok(None) => {}
            Ok(Some(error)) | Err(error) => return Err(host_error(&error)),
        }
        match socket.peer_addr() {
            Ok(_) => Ok(()),
            Err(error) if errno(&error) == Errno::ENOTCONN => Err(HostError::WouldBlock),
            Err(error) => Err(host_error(&error)),
        }
    }

    fn send(&mut self, flow: FlowId, to: SocketAddr, bytes: &[u8]) -> Result<(), HostError> {
        let socket = self.get(flow)?;
        let sent = socket.send_to_with_flags(bytes, &to.into(), MSG_NOSIGNAL);
        sent.map(|_| ()).map_err(|error| host_error(&error))
    }

    fn receive(
        &mut self,
        flow: FlowId,
        buffer: &mut [u8],
    ) -> Result<(usize, SocketAddr), HostError> {
        let received = recvfrom::<SockaddrStorage>(self.get(flow)?.as_raw_fd(), buffer);
        let (len, from) = received.map_err(|error| host_error(&error.into()))?;
        let from = from.as_ref().and_then(address::ip);
        Ok((len, from.unwrap_or(any(IpVersion::Ipv4))))
    }

    fn read(&mut self, flow: FlowId, buffer: &mut [u8]) -> Result<usize, HostError> {
        let mut socket = self.get(flow)?;
        match socket.read(buffer) {
            // The service has ended, and with it the node.
            Ok(0) if self.to_gateway.contains(&flow) => Err(HostError::WouldBlock),
            read => read.map_err(|error| host_error(&error)),
        }
    }

    fn write(&mut self, flow: FlowId, bytes: &[u8]) -> Result<usize, HostError> {
        if bytes.is_empty() && self.to_gateway.contains(&flow) {
            // No query, and it would look like the end.
            return Ok(0);
        }
        let sent = match self.sockets.get(&flow) {
            Some(FlowSocket::Own(socket, _)) => socket.send_with_flags(bytes, MSG_NOSIGNAL),
            Some(FlowSocket::Shared {
                socket,
                client,
                local,
            }) => answer(socket, client.1, *local, bytes),
            None => return Err(HostError::Failed),
        };
        sent.map_err(|error| host_error(&error))
    }

    fn send_train(
        &mut self,
        flow: FlowId,
        to: Option<SocketAddr>,
        datagrams: &[u8],
        size: u16,
    ) -> Result<(), HostError> {
        if !self.takes_trains || self.to_gateway.contains(&flow) {
            return Err(HostError::Failed);
        }
        let sent = sendmsg(
            self.get(flow)?.as_raw_fd(),
            &[IoSlice::new(datagrams)],
            &[ControlMessage::UdpGsoSegments(&size)],
            MsgFlags::MSG_NOSIGNAL,
            to.map(SockaddrStorage::from).as_ref(),
        );
        sent.map(|_| ()).map_err(|error| host_error(&error.into()))
    }

    fn mark(&mut self, flow: FlowId, marks: Marks) {
        // A query has no header by the time a service reads it.
        let is_query = self.to_gateway.contains(&flow);
        let Some(FlowSocket::Own(socket, version)) = self.sockets.get(&flow).filter(|_| !is_query)
        else {
            return;
        };
        if let Err(error) = mark(socket, *version, marks) {
            debug!("a datagram is sent without its options: {error}");
        }
    }

    fn complaint(&mut self, flow: FlowId, quoted: &mut [u8]) -> Option<Complaint> {
        match self.sockets.get(&flow)? {
            FlowSocket::Own(socket, version) => error_queue::next(socket, *version, quoted),
            FlowSocket::Shared { .. } => None,
        }
    }

    fn shutdown(&mut self, flow: FlowId) -> Result<(), HostError> {
        let shut = self.get(flow)?.shutdown(std::net::Shutdown::Write);
        shut.map_err(|error| host_error(&error))
    }

    fn close(&mut self, flow: FlowId, reset: bool) {
        self.to_gateway.remove(&flow);
        match self.sockets.remove(&flow) {
            Some(FlowSocket::Own(socket, _)) if reset => {
                // Closing sends a reset then; where it cannot be set, the end is an ordinary one.
                let _ = socket.set_linger(Some(Duration::ZERO));
            }
            Some(FlowSocket::Shared { client, .. }) => {
                self.clients.remove(&client);
            }
            Some(FlowSocket::Own(..)) | None => {}
        }
    }
}

fn new_socket(protocol: Protocol, version: IpVersion) -> io::Result<Socket> {
    let kind = match protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp | Protocol::Ping => Type::DGRAM,
    };
    let number = match (protocol, version) {
        (Protocol::Tcp, _) => socket2::Protocol::TCP,
        (Protocol::Udp, _) => socket2::Protocol::UDP,
        (Protocol::Ping, IpVersion::Ipv4) => socket2::Protocol::ICMPV4,
        // Under the same rule, net.ipv4.ping_group_range.
        (Protocol::Ping, IpVersion::Ipv6) => socket2::Protocol::ICMPV6,
    };
    let socket = address::open(version, kind, Some(number))?;
    match (protocol, version) {
        (Protocol::Tcp, _) => prepare(&socket)?,
        (_, IpVersion::Ipv4) => setsockopt(&socket, Ipv4RecvErr, &true)?,
        (_, IpVersion::Ipv6) => setsockopt(&socket, Ipv6RecvErr, &true)?,
    }
    Ok(socket)
}

/// Has what a socket sends carry these marks.
fn mark(socket: &Socket, version: IpVersion, marks: Marks) -> io::Result<()> {
    let tos = u32::from(marks.dscp) << 2;
    match version {
        IpVersion::Ipv4 => {
            let discovery = match marks.dont_fragment {
                true => libc::IP_PMTUDISC_DO,
                false => libc::IP_PMTUDISC_DONT,
            };
            socket.set_ttl_v4(marks.ttl.into())?;
            socket.set_tos_v4(tos)?;
            option::set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, discovery)
        }
        IpVersion::Ipv6 => {
            let discovery = match marks.dont_fragment {
                true => libc::IPV6_PMTUDISC_DO,
                // Here that is to cut what is longer than the path, but not what no router would.
                false => libc::IPV6_PMTUDISC_WANT,
            };
            socket.set_unicast_hops_v6(marks.ttl.into())?;
            socket.set_tclass_v6(tos)?;
            let name = libc::IPV6_MTU_DISCOVER;
            option::set(socket, libc::IPPROTO_IPV6, name, discovery)
        }
    }
}

/// Sends a datagram from one of this machine's addresses.
fn answer(socket: &Socket, to: SocketAddr, from: IpAddr, bytes: &[u8]) -> io::Result<usize> {
    let send = |information: ControlMessage<'_>| {
        let sent = sendmsg(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            &[information],
            MsgFlags::MSG_NOSIGNAL,
            Some(&SockaddrStorage::from(to)),
        );
        sent.map_err(io::Error::from)
    };
    match from {
        IpAddr::V4(from) => send(ControlMessage::Ipv4PacketInfo(&in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: in_addr {
                s_addr: u32::from_ne_bytes(from.octets()),
            },
            ipi_addr: in_addr { s_addr: 0 },
        })),
        IpAddr::V6(from) => send(ControlMessage::Ipv6PacketInfo(&in6_pktinfo {
            ipi6_addr: in6_addr {
                s6_addr: from.octets(),
            },
            // A client's link-local address has its link with it.
            ipi6_ifindex: 0,
        })),
    }
}

fn prepare(stream: &Socket) -> io::Result<()> {
    // What the pod sends goes on at once; waiting for more is for its own system.
    stream.set_tcp_nodelay(true)?;
    stream.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE))
}

/// What it means to a flow that it has no socket.
fn why_none(error: &io::Error) -> HostError {
    match host_error(error) {
        // No event reports when there is enough again.
        HostError::WouldBlock => HostError::Exhausted,
        other => other,
    }
}

/// What an error of the host means to a flow.
fn host_error(error: &io::Error) -> HostError {
    match errno(error) {
        Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS => HostError::WouldBlock,
        Errno::ECONNREFUSED => HostError::Refused,
        // A machine without IPv6 has no sockets of it.
        Errno::ENETUNREACH | Errno::EAFNOSUPPORT => HostError::NetUnreachable,
        Errno::EHOSTUNREACH | Errno::EHOSTDOWN => HostError::HostUnreachable,
        Errno::ETIMEDOUT => HostError::TimedOut,
        Errno::ECONNRESET | Errno::ECONNABORTED | Errno::EPIPE | Errno::ENOTCONN => {
            HostError::Reset
        }
        Errno::EACCES | Errno::EPERM => HostError::NotPermitted,
        Errno::EMSGSIZE => HostError::TooLong,
        Errno::EMFILE
        | Errno::ENFILE
        | Errno::ENOMEM
        | Errno::ENOSPC
        | Errno::EADDRNOTAVAIL
        | Errno::EADDRINUSE => HostError::Exhausted,
        _ => {
            debug!("a socket of egress: {error}");
            HostError::Failed
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::epoll::EpollCreateFlags;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn flow(index: u32) -> FlowId {
        FlowId {
            index,
            generation: 0,
        }
    }

    fn server(localhost: IpAddr) -> UdpSocket {
        let server = UdpSocket::bind((localhost, 0)).unwrap();
        server.set_read_timeout(Some(SOON)).unwrap();
        server
    }

    #[test]
    fn datagrams_go_and_come_in_both_versions() {
        for (version, localhost) in [
            (IpVersion::Ipv4, IpAddr::from(Ipv4Addr::LOCALHOST)),
            (IpVersion::Ipv6, IpAddr::from(Ipv6Addr::LOCALHOST)),
        ] {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
            let mut sockets = Sockets::new(Arc::new(epoll), None);
            let server = server(localhost);
            let to = server.local_addr().unwrap();
            sockets.open(flow(1), Protocol::Udp, version).unwrap();
            let marks = Marks {
                ttl: 7,
                dscp: 46,
                dont_fragment: true,
            };
            sockets.mark(flow(1), marks);
            sockets.send(flow(1), to, b"hello").unwrap();
            let mut buffer = [0; 100];
            let (len, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..len], from.ip()), (&b"hello"[..], localhost));
            server.send_to(b"answer", from).unwrap();
            let socket = sockets.get(flow(1)).unwrap();
            let marked = match version {
                IpVersion::Ipv4 => (socket.ttl_v4().unwrap(), socket.tos_v4().unwrap()),
                IpVersion::Ipv6 => (
                    socket.unicast_hops_v6().unwrap(),
                    socket.tclass_v6().unwrap(),
                ),
            };
            assert_eq!(marked, (7, 46 << 2));
            let mut waited = [PollFd::new(
                std::os::fd::AsFd::as_fd(socket),
                PollFlags::POLLIN,
            )];
            assert_eq!(poll(&mut waited, PollTimeout::from(10_000u16)), Ok(1));
            let received = sockets.receive(flow(1), &mut buffer);
            assert_eq!(received, Ok((6, to)));

            // One of a published port's clients is answered from the address that it asked.
            let port = address::open(version, Type::DGRAM, None).unwrap();
            port.bind(&any(version).into()).unwrap();
            let port_number = port.local_addr().unwrap().as_socket().unwrap().port();
            sockets.share(flow(2), Arc::new(port), (0, to), localhost);
            sockets.write(flow(2), b"shared").unwrap();
            let (len, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], b"shared");
            assert_eq!(from, SocketAddr::new(localhost, port_number));
        }
    }

    #[test]
    fn a_socket_of_one_version_reaches_none_of_the_other() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut sockets = Sockets::new(Arc::new(epoll), None);
        let version = IpVersion::Ipv6;
        sockets.open(flow(1), Protocol::Udp, version).unwrap();
        let server = server(Ipv4Addr::LOCALHOST.into());
        let port = server.local_addr().unwrap().port();
        let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
        let sent = sockets.send(flow(1), (mapped, port).into(), b"x");
        assert_eq!(sent, Err(HostError::NetUnreachable));
    }
}
