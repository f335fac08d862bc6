//! The resolvers for names outside the pod network, and their order.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use muslin_stack::addresses::Nets;
use parking_lot::Mutex;

use super::host::{self, HostFile, PORT, RESOLV_CONF};
use crate::error::{Error, Result};

/// How long a resolver that did not answer is asked after the others.
const SILENCE: Duration = Duration::from_secs(30);

/// The resolvers of a node.
#[derive(Debug)]
pub(crate) struct Resolvers {
    /// Those that were named; nothing if the host's are asked.
    named: Option<Vec<SocketAddr>>,
    file: HostFile,
    health: Mutex<HashMap<SocketAddr, Health>>,
}

/// What is known of a resolver.
#[derive(Debug, Default)]
struct Health {
    /// When it answered last.
    answered: Option<Instant>,
    /// It did not answer lately, and until then comes last.
    silent_until: Option<Instant>,
}

/// A resolver that is to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) address: SocketAddr,
    /// Whether it did not answer lately.
    pub(super) is_silent: bool,
}

impl Resolvers {
    /// These resolvers. What else the host's file says counts.
    ///
    /// # Errors
    /// Bad usage for an address that cannot be one.
    pub(crate) fn named(addresses: &[IpAddr], network: impl Into<Nets>) -> Result<Self> {
        let network = network.into();
        for address in addresses {
            let ip = address.to_canonical();
            let pods = network.iter().find(|network: &IpNet| network.contains(&ip));
            let fault = match (address, pods) {
                (_, Some(network)) => {
                    format!("lies in the pod network {network}, which the node's host cannot reach")
                }
                (address, None) if address.is_unspecified() || address.is_multicast() => {
                    "is not an address of a resolver".to_owned()
                }
                _ => continue,
            };
            return Err(Error::usage(format!("--dns: {address} {fault}")));
        }
        let list = addresses.iter().map(|it| SocketAddr::new(*it, PORT));
        Ok(Self::new(
            Some(list.collect()),
            HostFile::new(RESOLV_CONF, network),
        ))
    }

    /// Those that a file like [`RESOLV_CONF`] lists from time to time.
    pub(crate) fn in_file(path: impl Into<PathBuf>, network: impl Into<Nets>) -> Self {
        Self::new(None, HostFile::new(path, network))
    }

    fn new(named: Option<Vec<SocketAddr>>, file: HostFile) -> Self {
        Self {
            named,
            file,
            health: Mutex::default(),
        }
    }

    /// The resolvers as they are now.
    pub(super) fn list(&self) -> Vec<SocketAddr> {
        match &self.named {
            Some(named) => named.clone(),
            None => self.file.read().resolvers.clone(),
        }
    }

    /// In which domains pods look for short names now, and with which of the host's options.
    pub(super) fn search(&self) -> (Vec<String>, Vec<String>) {
        if self.list().is_empty() {
            // No resolver knows the host's domains.
            return (host::search(std::iter::empty()), Vec::new());
        }
        let config = self.file.read();
        (config.search.clone(), config.options.clone())
    }

    /// The resolvers in the order in which they are to be asked: those that did not answer lately
    /// come last. From time to time a query finds out whether one of them answers again.
    pub(super) fn in_turn(&self) -> Vec<Turn> {
        let mut list = Vec::new();
        for address in self.list() {
            if !list.contains(&address) {
                list.push(address);
            }
        }
        let now = Instant::now();
        let mut health = self.health.lock();
        health.retain(|address, _| list.contains(address));
        let silence = |address: &SocketAddr| health.get(address).and_then(|it| it.silent_until);
        let has_other = list.iter().any(|address| silence(address).is_none());
        let mut turns: Vec<_> = list
            .iter()
            .map(|address| Turn {
                address: *address,
                is_silent: silence(address).is_some_and(|until| now < until || !has_other),
            })
            .collect();
        for turn in turns.iter().filter(|turn| !turn.is_silent) {
            // The others do not wait for what this query finds out.
            if let Some(Health {
                silent_until: Some(until),
                ..
            }) = health.get_mut(&turn.address)
            {
                *until = now + SILENCE;
            }
        }
        turns.sort_by_key(|turn| turn.is_silent);
        turns
    }

    /// This one has answered.
    pub(super) fn answered(&self, address: SocketAddr) {
        let mut health = self.health.lock();
        *health.entry(address).or_default() = Health {
            answered: Some(Instant::now()),
            silent_until: None,
        };
    }

    /// This one was asked at some time and has not answered that; nor anything else, unless it is
    /// known better.
    pub(super) fn is_silent_since(&self, address: SocketAddr, asked: Instant) {
        let mut health = self.health.lock();
        let health = health.entry(address).or_default();
        if health.answered.is_none_or(|answered| answered < asked) {
            health.silent_until = Some(Instant::now() + SILENCE);
        }
    }
}

#[cfg(test)]
impl Resolvers {
    /// Resolvers at any ports.
    pub(super) fn at(list: Vec<SocketAddr>) -> Self {
        let network: Nets = "10.1.0.0/16".parse().unwrap();
        Self::new(Some(list), HostFile::new("/nonexistent", network))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(resolvers: &Resolvers) -> Vec<(u16, bool)> {
        let turns = resolvers.in_turn();
        let turns = turns.iter().map(|it| (it.address.port(), it.is_silent));
        turns.collect()
    }

    #[test]
    fn who_does_not_answer_comes_last_and_is_tried_from_time_to_time() {
        let [one, two] = [1, 2].map(|port| SocketAddr::from(([192, 0, 2, 1], port)));
        let resolvers = Resolvers::at(vec![one, two]);
        let first = Instant::now();
        assert_eq!(turns(&resolvers), [(1, false), (2, false)]);
        resolvers.is_silent_since(one, first);
        assert_eq!(turns(&resolvers), [(2, false), (1, true)]);
        // One query tries it, and not all that come then.
        let over = |address| {
            let mut health = resolvers.health.lock();
            health.get_mut(&address).unwrap().silent_until = Some(first);
        };
        over(one);
        assert_eq!(turns(&resolvers), [(1, false), (2, false)]);
        assert_eq!(turns(&resolvers), [(2, false), (1, true)]);
        resolvers.answered(one);
        assert_eq!(turns(&resolvers), [(1, false), (2, false)]);
        // What it does not answer counts for nothing while it answers others.
        resolvers.is_silent_since(one, first);
        assert_eq!(turns(&resolvers), [(1, false), (2, false)]);
        // If none answers all are tried anyway.
        let now = Instant::now();
        resolvers.is_silent_since(one, now);
        resolvers.is_silent_since(two, now);
        over(one);
        assert_eq!(turns(&resolvers), [(1, true), (2, true)]);
    }
}
