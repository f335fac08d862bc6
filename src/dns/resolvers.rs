//! The resolvers of the host.

use std::fs;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use nix::net::if_::if_nametoindex;
use parking_lot::Mutex;
use resolv_conf::{Config, ScopedIp};
use tracing::{debug, info};

use super::PORT;
use crate::error::{Error, Result};

/// Where a host's resolvers are listed.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// How long the list is not looked at again.
const HOLD: Duration = Duration::from_secs(1);
/// As many as libraries use (resolv.conf(5)).
const MAX: usize = 3;

/// Which resolvers are asked.
#[derive(Debug)]
pub(crate) struct Resolvers {
    /// Addresses of pods: no socket of the host reaches one, and one of them is the service's own.
    network: Ipv4Net,
    source: Source,
    /// How many at the front of the list did not answer lately: they are asked last.
    silent: AtomicUsize,
}

#[derive(Debug)]
enum Source {
    Named(Vec<SocketAddr>),
    File { path: PathBuf, last: Mutex<Read> },
}

/// What was read last.
#[derive(Debug, Default)]
struct Read {
    at: Option<Instant>,
    text: Option<Vec<u8>>,
    list: Vec<SocketAddr>,
}

impl Resolvers {
    /// These resolvers.
    ///
    /// # Errors
    /// Bad usage for an address that cannot be one.
    pub(crate) fn named(addresses: &[IpAddr], network: Ipv4Net) -> Result<Self> {
        for address in addresses {
            let fault = match address {
                IpAddr::V4(v4) if network.contains(v4) => {
                    format!(
                        "lies in the pod network {network}, which the node's host does not reach"
                    )
                }
                address if address.is_unspecified() || address.is_multicast() => {
                    "is no resolver's address".to_owned()
                }
                _ => continue,
            };
            return Err(Error::usage(format!("--dns: {address} {fault}")));
        }
        let list = addresses.iter().map(|it| SocketAddr::new(*it, PORT));
        Ok(Self::new(network, Source::Named(list.collect())))
    }

    /// Those that a file like [`RESOLV_CONF`] lists from time to time.
    pub(crate) fn in_file(path: impl Into<PathBuf>, network: Ipv4Net) -> Self {
        let source = Source::File {
            path: path.into(),
            last: Mutex::default(),
        };
        Self::new(network, source)
    }

    fn new(network: Ipv4Net, source: Source) -> Self {
        Self {
            network,
            source,
            silent: AtomicUsize::new(0),
        }
    }

    /// The resolvers as they are now.
    pub(super) fn list(&self) -> Vec<SocketAddr> {
        let (path, mut last) = match &self.source {
            Source::Named(list) => return list.clone(),
            Source::File { path, last } => (path, last.lock()),
        };
        let now = Instant::now();
        if last.at.is_some_and(|at| now < at + HOLD) {
            return last.list.clone();
        }
        last.at = Some(now);
        let text = fs::read(path).unwrap_or_else(|error| {
            debug!("{}: {error}", path.display());
            Vec::new()
        });
        if last.text.as_ref() != Some(&text) {
            last.list = self.parse(&text);
            last.text = Some(text);
            self.silent.store(0, Ordering::Relaxed);
            info!("resolvers by {}: {:?}", path.display(), last.list);
        }
        last.list.clone()
    }

    /// The resolvers in the order in which they are to be asked, each with its place.
    pub(super) fn in_turn(&self) -> Vec<(usize, SocketAddr)> {
        let mut list: Vec<_> = self.list().into_iter().enumerate().collect();
        let silent = self.silent.load(Ordering::Relaxed);
        let len = list.len().max(1);
        list.rotate_left(silent % len);
        list
    }

    /// The one in this place has answered, and those before it have not.
    pub(super) fn answered(&self, place: usize) {
        self.silent.store(place, Ordering::Relaxed);
    }

    fn parse(&self, text: &[u8]) -> Vec<SocketAddr> {
        let (config, _) = Config::parse_with_errors(text);
        let listed = config.get_nameservers_or_local();
        let listed = listed.iter().filter_map(socket_address);
        let is_pods = |address: &SocketAddr| match address.ip() {
            IpAddr::V4(v4) => self.network.contains(&v4),
            IpAddr::V6(_) => false,
        };
        listed.filter(|it| !is_pods(it)).take(MAX).collect()
    }
}

fn socket_address(address: &ScopedIp) -> Option<SocketAddr> {
    Some(match address {
        ScopedIp::V4(v4) => SocketAddr::new((*v4).into(), PORT),
        ScopedIp::V6(v6, None) => SocketAddr::new((*v6).into(), PORT),
        ScopedIp::V6(v6, Some(interface)) => {
            let index = interface.parse().ok();
            let index = index.or_else(|| if_nametoindex(interface.as_str()).ok())?;
            SocketAddrV6::new(*v6, PORT, 0, index).into()
        }
    })
}

#[cfg(test)]
impl Resolvers {
    /// Resolvers at any ports.
    pub(super) fn at(list: Vec<SocketAddr>) -> Self {
        Self::new("10.1.0.0/16".parse().unwrap(), Source::Named(list))
    }
}
