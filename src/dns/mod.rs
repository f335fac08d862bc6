//! DNS for pods, at their gateway's port 53: names of pods are answered here, all others go to the
//! resolvers of the host.
//!
//! A pod's query comes by one end of a pair of Unix sockets, of which a worker has the other: no
//! port of the host is opened, so only pods can send queries, and each query's pod is known.

mod connector;
mod dns64;
mod forward;
mod host;
mod message;
mod quota;
mod resolvers;
mod serve;
mod service;
#[cfg(test)]
mod tests;
mod zones;

use std::sync::Arc;

pub use connector::DnsConnector;
pub(crate) use host::{PORT, RESOLV_CONF};
use muslin_stack::addresses::Nets;
use muslin_stack::control::names::Names;
use muslin_stack::datapath::egress::Nat64Prefix;
use parking_lot::RwLock;
pub(crate) use resolvers::Resolvers;
pub(crate) use service::Dns;
pub(crate) use zones::DOMAIN;

use crate::error::{Context, Result};

/// Starts a service for the pods of a network whose names are in `names`, and who reach IPv4 by a
/// prefix of IPv6 if there is one; returns it and the way to it. It has a thread of its own, for as long as there is a way to it: floods of queries hold up
/// nothing else.
///
/// # Errors
/// If no thread can be started.
pub(crate) fn start(
    network: impl Into<Nets>,
    nat64: Option<Nat64Prefix>,
    names: Arc<RwLock<Names>>,
    resolvers: Resolvers,
) -> Result<(Arc<Dns>, DnsConnector)> {
    let dns = Dns::new(network.into(), nat64, names, resolvers);
    let (connector, pod_sockets) = DnsConnector::new();
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build();
    let runtime = runtime.context("cannot resolve names")?;
    let service = dns.clone();
    let thread = std::thread::Builder::new().name("names".to_owned());
    let thread = thread.spawn(move || runtime.block_on(serve::receive(service, pod_sockets)));
    thread.context("cannot resolve names")?;
    Ok((dns, connector))
}
