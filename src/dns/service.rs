//! The service: it decides of each query who answers it, and counts them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::op::ResponseCode;
use muslin_stack::addresses::Nets;
use muslin_stack::control::names::Names;
use muslin_stack::datapath::egress::Nat64Prefix;
use parking_lot::RwLock;
use tracing::debug;

use super::dns64;
use super::forward::forward;
use super::message::{Rejected, Request, Transport};
use super::quota::{CONNECTIONS, QUERIES, Quota, Ticket, Turns};
use super::resolvers::Resolvers;
use super::zones::Zones;

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
    nat64: Option<Nat64Prefix>,
    names: Arc<RwLock<Names>>,
    resolvers: Resolvers,
    pub(super) queries: Arc<Quota>,
    pub(super) connections: Arc<Quota>,
    pub(super) turns: Turns,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    queries: AtomicU64,
    answered: AtomicU64,
    forwarded: AtomicU64,
    failed: AtomicU64,
}

/// What to do with a query.
pub(super) enum Reply {
    /// To answer this.
    Now(Vec<u8>),
    /// To ask the resolvers.
    Ask(Box<Asked>, Ticket),
    /// Nothing: it is not a query.
    Nothing,
}

/// A query that is for resolvers.
pub(super) struct Asked {
    request: Request,
    /// The prefix of addresses that may be made.
    nat64: Option<Nat64Prefix>,
}

impl Dns {
    pub(super) fn new(
        network: Nets,
        nat64: Option<Nat64Prefix>,
        names: Arc<RwLock<Names>>,
        resolvers: Resolvers,
    ) -> Arc<Self> {
        Arc::new(Self {
            zones: Zones::new(network, nat64),
            nat64,
            names,
            resolvers,
            queries: Quota::new(QUERIES),
            connections: Quota::new(CONNECTIONS),
            turns: Turns::default(),
            counts: Counts::default(),
        })
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
    pub(crate) fn resolvers(&self) -> Vec<SocketAddr> {
        self.resolvers.list()
    }

    /// In which domains pods look for short names now, and with which options (resolv.conf(5)).
    pub(crate) fn search(&self) -> (Vec<String>, Vec<String>) {
        self.resolvers.search()
    }

    /// Answers a query from what is known here, if it can be.
    pub(super) fn take(&self, pod: IpAddr, bytes: &[u8], transport: Transport) -> Reply {
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
                let nat64 = self.nat64.filter(|_| dns64::is_for(pod, &request));
                Reply::Ask(Box::new(Asked { request, nat64 }), ticket)
            }
        }
    }

    /// Has a resolver of the host answer a query.
    pub(super) async fn ask(&self, asked: &Asked, _ticket: Ticket) -> Vec<u8> {
        let Asked { request, nat64 } = asked;
        let answer = match nat64 {
            Some(prefix) => dns64::ask(*prefix, &self.resolvers, request).await,
            None => forward(&self.resolvers, request).await,
        };
        let counter = match answer {
            Some(_) => &self.counts.forwarded,
            None => &self.counts.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        answer.unwrap_or_else(|| request.failure())
    }
}
