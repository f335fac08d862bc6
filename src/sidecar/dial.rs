//! Connections to what clients name.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use muslin_stack::addresses::Addresses;
use muslin_stack::api::control::Attached;
use muslin_stack::api::socks5::{Host, Target};
use thiserror::Error;
use tokio::time::sleep;

use super::command::Place;
use super::overlay::{DatagramSocket, Overlay, Stream};
use super::resolve::{ResolveError, resolve};
use crate::error;

/// How long the next address waits for the one before it (RFC 8305 section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Addresses of a name that are tried.
const MAX_ATTEMPTS: usize = 8;

/// Why there is no connection.
#[derive(Debug, Error)]
pub(super) enum DialError {
    /// The name leads nowhere.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The pod has no address of the same IP version.
    #[error("{0}: the pod has no address of that IP version")]
    Version(IpAddr),
    /// It was tried.
    #[error("{0}: {1}")]
    Connect(SocketAddr, io::Error),
}

/// Connects by a pod's addresses.
pub(super) struct Dialler {
    overlay: Arc<Overlay>,
    address: Addresses,
    resolver: IpAddr,
    search: Vec<String>,
}

impl Dialler {
    /// Connections by the addresses of an attached pod, whose gateway knows the names.
    ///
    /// # Errors
    /// If it has none.
    pub(super) fn new(overlay: Arc<Overlay>, attached: &Attached) -> error::Result<Self> {
        let Place {
            address, gateway, ..
        } = attached.try_into()?;
        let ipv4 = address.ipv4().and(gateway.ipv4()).map(IpAddr::V4);
        let ipv6 = address.ipv6().and(gateway.ipv6()).map(IpAddr::V6);
        let resolver = ipv4.or(ipv6);
        Ok(Self {
            overlay,
            address,
            resolver: resolver.ok_or_else(|| error::Error::failed("the pod has no gateway"))?,
            search: attached.search.clone(),
        })
    }

    /// The pod's address of the IP version of another.
    fn own(&self, peer: IpAddr) -> Option<IpAddr> {
        match peer {
            IpAddr::V4(_) => self.address.ipv4().map(IpAddr::V4),
            IpAddr::V6(_) => self.address.ipv6().map(IpAddr::V6),
        }
    }

    /// Connects to a host's port; also the pod's address by which it is done. Of a name's addresses the
    /// first that answers counts, IPv6 and IPv4 in turn.
    pub(super) async fn connect(
        &self,
        (host, port): &Target,
    ) -> Result<(Stream, IpAddr), DialError> {
        let addresses = in_turn(&self.resolve(host).await?);
        let addresses = addresses.into_iter().take(MAX_ATTEMPTS);
        let ends: Vec<_> = addresses.map(|it| SocketAddr::new(it, *port)).collect();
        let connect = |to: SocketAddr| async move {
            let own = self.own(to.ip()).ok_or(DialError::Version(to.ip()))?;
            let connected = self.overlay.connect(to).await;
            let stream = connected.map_err(|error| DialError::Connect(to, error))?;
            Ok((stream, own))
        };
        race(ends, ATTEMPT_DELAY, connect).await
    }

    /// Takes a UDP port of the pod's addresses.
    pub(super) async fn bind(&self) -> io::Result<DatagramSocket> {
        self.overlay.bind().await
    }

    /// The address of a host to which datagrams go: of IPv4 if it has one, since nobody says whether they
    /// arrive, and outside not everybody has IPv6.
    pub(super) async fn for_datagrams(&self, host: &Host) -> Result<IpAddr, DialError> {
        let mut all = self.resolve(host).await?;
        all.sort_by_key(IpAddr::is_ipv6);
        // There is one at least.
        let none = || ResolveError::Resolver(io::ErrorKind::NotFound.into()).into();
        all.into_iter().next().ok_or_else(none)
    }

    /// The addresses of a host that the pod can speak to, one at least.
    async fn resolve(&self, host: &Host) -> Result<Vec<IpAddr>, DialError> {
        match host {
            Host::Ip(address) => {
                let address = address.to_canonical();
                let may = self.own(address).is_some();
                may.then(|| vec![address])
                    .ok_or(DialError::Version(address))
            }
            Host::Name(name) => {
                let socket = self.bind().await.map_err(ResolveError::Resolver)?;
                let found = resolve(&socket, self.resolver, name, &self.search, self.address);
                Ok(found.await?)
            }
        }
    }
}

/// Addresses of IPv6 and IPv4 in turn, IPv6 first (RFC 8305 section 4).
fn in_turn(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let of = |is_v6: bool| addresses.iter().filter(move |it| it.is_ipv6() == is_v6);
    let (mut ipv6, mut ipv4) = (of(true), of(false));
    let mut all = Vec::new();
    loop {
        let pair = [ipv6.next(), ipv4.next()];
        if pair == [None; 2] {
            return all;
        }
        all.extend(pair.into_iter().flatten());
    }
}

/// The first of several attempts that succeeds. Each begins when the one before it has failed, or has
/// taken so long; the error is that of the last.
async fn race<T, E, F: Future<Output = Result<T, E>>>(
    ends: Vec<SocketAddr>,
    delay: Duration,
    attempt: impl Fn(SocketAddr) -> F,
) -> Result<T, E> {
    let mut ends = ends.into_iter();
    let mut running = FuturesUnordered::new();
    running.extend(ends.next().map(&attempt));
    loop {
        let is_last = ends.len() == 0;
        let finished = tokio::select! {
            finished = running.next() => finished,
            () = sleep(delay), if !is_last => None,
        };
        match finished {
            Some(Err(error)) if is_last && running.is_empty() => return Err(error),
            Some(Ok(done)) => return Ok(done),
            Some(Err(_)) | None => running.extend(ends.next().map(&attempt)),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn versions_take_turns_and_ipv6_begins() {
        let all = ["10.0.0.1", "10.0.0.2", "fd00::1", "10.0.0.3"].map(address);
        let expected = ["fd00::1", "10.0.0.1", "10.0.0.2", "10.0.0.3"].map(address);
        assert_eq!(in_turn(&all), expected);
        assert_eq!(in_turn(&[]), Vec::<IpAddr>::new());
    }

    /// What becomes of attempts that succeed, fail, or hang, and how many were begun.
    async fn raced(attempts: &[Option<bool>], delay: Duration) -> (Result<usize, usize>, usize) {
        let ends = (0..).take(attempts.len());
        let ends = ends.map(|port: u16| SocketAddr::new(address("::"), port));
        let begun = std::cell::Cell::new(0);
        let attempt = |to: SocketAddr| {
            begun.set(begun.get() + 1);
            let number = usize::from(to.port());
            async move {
                match attempts[number] {
                    Some(true) => Ok(number),
                    Some(false) => Err(number),
                    None => std::future::pending().await,
                }
            }
        };
        let result = race(ends.collect(), delay, attempt).await;
        (result, begun.get())
    }

    #[tokio::test]
    async fn the_next_address_waits_for_an_error_or_a_while() {
        let (yes, no) = (Some(true), Some(false));
        let never = Duration::from_secs(3600);
        assert_eq!(raced(&[yes, None], never).await, (Ok(0), 1));
        assert_eq!(raced(&[no, yes, yes], never).await, (Ok(1), 2));
        assert_eq!(raced(&[no, no], never).await, (Err(1), 2));
        let begun = Instant::now();
        assert_eq!(raced(&[None, yes, yes], ATTEMPT_DELAY).await, (Ok(1), 2));
        assert!(begun.elapsed() >= ATTEMPT_DELAY);
        let short = Duration::from_millis(10);
        assert_eq!(raced(&[None, no, None, yes], short).await, (Ok(3), 4));
    }
}
