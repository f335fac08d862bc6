//! DNS for pods, at their gateway's port 53: names of pods are answered here, all others go to the
//! resolvers of the host.
//!
//! A pod's query comes by one end of a pair of Unix sockets, of which a worker has the other: no
//! port of the host is opened, so only pods can send queries, and each query's pod is known.

mod forward;
mod host;
mod message;
mod resolvers;
mod serve;
#[cfg(test)]
mod tests;
mod zones;

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::op::ResponseCode;
pub(crate) use host::{PORT, RESOLV_CONF};
use message::{Rejected, Request, Transport};
use muslin_stack::control::names::Names;
use muslin_stack::datapath::egress::Protocol;
use nix::errno::Errno;
use parking_lot::RwLock;
pub(crate) use resolvers::Resolvers;
use serve::{Quota, Ticket, Turns};
use socket2::{Domain, Socket, Type};
use tokio::sync::mpsc;
use tracing::debug;
pub(crate) use zones::DOMAIN;
use zones::Zones;

use crate::error::{Context, Result};

/// Sockets of pods that may wait to be taken.
const WAITING: usize = 256;

/// What became of queries since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Queries from pods.
    pub(crate) queries: u64,
    /// Those that were answered from the names of pods, or refused.
    pub(crate) answered: u64,
    /// Those that a resolver has answered.
    pub(crate) forwarded: u64,
    /// Those that no resolver has answered in time, or that were too many at once.
    pub(crate) failed: u64,
}

/// The service.
pub(crate) struct Dns {
    zones: Zones,
    names: Arc<RwLock<Names>>,
    resolvers: Resolvers,
    queries: Arc<Quota>,
    connections: Arc<Quota>,
    turns: Turns,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    queries: AtomicU64,
    answered: AtomicU64,
    forwarded: AtomicU64,
    failed: AtomicU64,
}

/// A worker's handle to the DNS server, to which it passes its pods' sockets.
#[derive(Debug, Clone)]
pub struct DnsConnector(mpsc::Sender<PodSocket>);

/// A socket for one pod's queries.
#[derive(Debug)]
struct PodSocket {
    pod: Ipv4Addr,
    transport: Transport,
    socket: Socket,
}

impl DnsConnector {
    /// A socket for queries of the pod at `pod`: a stream, or one that preserves datagrams.
    ///
    /// # Errors
    /// If there are no descriptors, or the server's queue is full.
    pub(crate) fn connect(&self, pod: SocketAddrV4, protocol: Protocol) -> io::Result<Socket> {
        let (kind, transport) = match protocol {
            Protocol::Tcp => (Type::STREAM, Transport::Stream),
            Protocol::Udp => (Type::SEQPACKET, Transport::Datagram),
            Protocol::Ping => return Err(io::ErrorKind::Unsupported.into()),
        };
        let (near, far) = Socket::pair(Domain::UNIX, kind.nonblocking(), None)?;
        let pod_socket = PodSocket {
            pod: *pod.ip(),
            transport,
            socket: far,
        };
        let taken = self.0.try_send(pod_socket);
        taken.map_err(|_| Errno::EAGAIN)?;
        Ok(near)
    }
}

/// What to do with a query.
enum Reply {
    /// To answer this.
    Now(Vec<u8>),
    /// To ask the resolvers.
    Ask(Box<Request>, Ticket),
    /// Nothing: it is not a query.
    Nothing,
}

impl Dns {
    /// A service for the pods of a network whose names are in `names`, and the way to it. It has a
    /// thread of its own, for as long as there is a way to it: floods of queries hold up nothing else.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(crate) fn start(
        network: ipnet::Ipv4Net,
        names: Arc<RwLock<Names>>,
        resolvers: Resolvers,
    ) -> Result<(Arc<Self>, DnsConnector)> {
        let (dns, connector, pod_sockets) = Self::new(network, names, resolvers);
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build();
        let runtime = runtime.context("cannot resolve names")?;
        let service = dns.clone();
        let thread = std::thread::Builder::new().name("names".to_owned());
        let thread = thread.spawn(move || runtime.block_on(serve::receive(service, pod_sockets)));
        thread.context("cannot resolve names")?;
        Ok((dns, connector))
    }

    /// The service, the way to it, and who comes by it.
    fn new(
        network: ipnet::Ipv4Net,
        names: Arc<RwLock<Names>>,
        resolvers: Resolvers,
    ) -> (Arc<Self>, DnsConnector, mpsc::Receiver<PodSocket>) {
        let dns = Arc::new(Self {
            zones: Zones::new(network),
            names,
            resolvers,
            queries: Quota::new(serve::QUERIES),
            connections: Quota::new(serve::CONNECTIONS),
            turns: Turns::default(),
            counts: Counts::default(),
        });
        let (sender, pod_sockets) = mpsc::channel(WAITING);
        (dns, DnsConnector(sender), pod_sockets)
    }

    /// What became of queries.
    pub(crate) fn counters(&self) -> Counters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            queries: read(&self.counts.queries),
            answered: read(&self.counts.answered),
            forwarded: read(&self.counts.forwarded),
            failed: read(&self.counts.failed),
        }
    }

    /// The resolvers that are asked now.
    pub(crate) fn resolvers(&self) -> Vec<std::net::SocketAddr> {
        self.resolvers.list()
    }

    /// In which domains pods look for short names now, and with which options (resolv.conf(5)).
    pub(crate) fn search(&self) -> (Vec<String>, Vec<String>) {
        self.resolvers.search()
    }

    /// Answers a query from what is known here, if it can be.
    fn take(&self, pod: Ipv4Addr, bytes: &[u8], transport: Transport) -> Reply {
        let request = match Request::read(bytes, transport) {
            Ok(request) => request,
            Err(Rejected::NoQuery) => return Reply::Nothing,
            Err(Rejected::With(answer)) => {
                self.counts.queries.fetch_add(1, Ordering::Relaxed);
                self.counts.answered.fetch_add(1, Ordering::Relaxed);
                return Reply::Now(answer);
            }
        };
        self.counts.queries.fetch_add(1, Ordering::Relaxed);
        let here = self.zones.answer(&request, &self.names.read());
        let here = here.or_else(|| {
            let has_resolvers = !self.resolvers.list().is_empty();
            (!has_resolvers).then(|| request.answer(ResponseCode::Refused))
        });
        match here {
            Some(answer) => {
                let (code, records) = (answer.metadata.response_code, answer.answers.len());
                debug!(
                    "DNS: {}: answered here, {code}, records: {records}",
                    request.question
                );
                self.counts.answered.fetch_add(1, Ordering::Relaxed);
                Reply::Now(request.encode(&answer))
            }
            None => {
                debug!("DNS: {}: for the resolvers", request.question);
                let Some(ticket) = self.queries.enter(pod) else {
                    self.counts.failed.fetch_add(1, Ordering::Relaxed);
                    return Reply::Now(request.failure());
                };
                Reply::Ask(Box::new(request), ticket)
            }
        }
    }

    /// Has a resolver of the host answer a query.
    async fn ask(&self, request: &Request, _ticket: Ticket) -> Vec<u8> {
        let answer = forward::forward(&self.resolvers, request).await;
        let counter = match answer {
            Some(_) => &self.counts.forwarded,
            None => &self.counts.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        answer.unwrap_or_else(|| request.failure())
    }
}
