//! Names of an association's datagrams, which are looked up while other datagrams go on.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;
use tracing::debug;

/// Names that are looked up at once.
const AT_ONCE: usize = 16;
/// Bytes of datagrams that wait for all of them.
const WAITING: usize = 128 << 10;
/// What a datagram takes beside its bytes.
const OVERHEAD: usize = 64;
/// How long an address counts for its name: what a node's own names hold.
const HOLD: Duration = Duration::from_secs(5);
/// Names whose addresses are known.
const KNOWN: usize = 64;

/// A datagram without its address: a port, and what it says.
pub(super) type Datagram = (u16, Vec<u8>);

/// The names of one association, which `E` can say nothing of.
pub(super) struct Lookups<'a, E> {
    known: HashMap<String, (Instant, IpAddr)>,
    waiting: HashMap<String, Vec<Datagram>>,
    /// Bytes that wait.
    bytes: usize,
    running: FuturesUnordered<BoxFuture<'a, (String, Result<IpAddr, E>)>>,
}

impl<'a, E: std::fmt::Display + 'a> Lookups<'a, E> {
    pub(super) fn new() -> Self {
        Self {
            known: HashMap::new(),
            waiting: HashMap::new(),
            bytes: 0,
            running: FuturesUnordered::new(),
        }
    }

    /// The address of a name, if it is known. If not, the datagram waits until `look_up` knows it,
    /// behind others to that name, or is lost where too many wait.
    pub(super) fn find<F>(
        &mut self,
        name: String,
        datagram: (u16, &[u8]),
        look_up: impl FnOnce(String) -> F,
    ) -> Option<IpAddr>
    where
        F: Future<Output = Result<IpAddr, E>> + Send + 'a,
    {
        let now = Instant::now();
        if let Some((_, address)) = self.known.get(&name).filter(|(until, _)| now < *until) {
            return Some(*address);
        }
        let (port, payload) = datagram;
        let is_new = !self.waiting.contains_key(&name);
        let bytes = self.bytes + payload.len() + OVERHEAD;
        if bytes > WAITING || is_new && self.waiting.len() == AT_ONCE {
            debug!("SOCKS5: a datagram to {name} is lost: too many wait for names");
            return None;
        }
        self.bytes = bytes;
        if is_new {
            let found = look_up(name.clone());
            let name = name.clone();
            self.running
                .push(Box::pin(async move { (name, found.await) }));
        }
        let datagrams = self.waiting.entry(name).or_default();
        datagrams.push((port, payload.to_vec()));
        None
    }

    /// The next address that becomes known, and the datagrams that have waited for it; nothing if
    /// none is looked up.
    pub(super) async fn next(&mut self) -> Option<(IpAddr, Vec<Datagram>)> {
        loop {
            let (name, found) = self.running.next().await?;
            let datagrams = self.waiting.remove(&name).unwrap_or_default();
            let bytes = datagrams.iter().map(|(_, it)| it.len() + OVERHEAD);
            self.bytes -= bytes.sum::<usize>();
            match found {
                Ok(address) => {
                    self.remember(name, address);
                    return Some((address, datagrams));
                }
                Err(error) => debug!("SOCKS5: datagrams are not sent: {error}"),
            }
        }
    }

    fn remember(&mut self, name: String, address: IpAddr) {
        let now = Instant::now();
        if self.known.len() >= KNOWN {
            self.known.retain(|_, (until, _)| now < *until);
        }
        if self.known.len() < KNOWN {
            self.known.insert(name, (now + HOLD, address));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use std::net::Ipv4Addr;

    use super::*;

    const ONE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 1, 2));

    fn slow(_: String) -> impl Future<Output = Result<IpAddr, String>> + Send {
        pending()
    }

    #[tokio::test]
    async fn a_slow_name_delays_no_other_and_order_is_kept() {
        let mut lookups = Lookups::new();
        assert_eq!(lookups.find("slow".to_owned(), (1, b"a"), slow), None);
        for (port, payload) in [(2, b"b"), (3, b"c")] {
            let found = lookups.find("quick".to_owned(), (port, payload), |_| ready(Ok(ONE)));
            assert_eq!(found, None);
        }
        let nobody = |_| ready(Err("nobody".to_owned()));
        assert_eq!(lookups.find("nobody".to_owned(), (4, b"d"), nobody), None);
        let (address, datagrams) = lookups.next().await.unwrap();
        assert_eq!(address, ONE);
        assert_eq!(datagrams, [(2, b"b".to_vec()), (3, b"c".to_vec())]);
        // It is known now, and nothing waits but what the slow name is for.
        assert_eq!(lookups.find("quick".to_owned(), (5, b"e"), slow), Some(ONE));
        let waits = tokio::time::timeout(Duration::from_millis(100), lookups.next()).await;
        assert!(waits.is_err(), "{waits:?}");
        assert_eq!(lookups.bytes, 1 + OVERHEAD);
    }

    #[tokio::test]
    async fn what_waits_for_names_is_bounded() {
        let mut lookups = Lookups::new();
        for i in 0..10_000_u32 {
            let name = format!("name-{}", i % 100);
            assert_eq!(lookups.find(name, (1, &[0; 1000]), slow), None);
        }
        assert_eq!(
            (lookups.waiting.len(), lookups.running.len()),
            (AT_ONCE, AT_ONCE)
        );
        let waiting = lookups.waiting.values().map(Vec::len).sum::<usize>();
        assert_eq!(waiting, WAITING / (1000 + OVERHEAD));
        assert!(lookups.bytes <= WAITING);

        let mut lookups = Lookups::new();
        for i in 0..2 * KNOWN {
            let name = format!("name-{i}");
            let found = |_| ready(Ok::<_, String>(ONE));
            assert_eq!(lookups.find(name, (1, b"a"), found), None);
            assert!(lookups.next().await.is_some());
        }
        assert_eq!((lookups.known.len(), lookups.bytes), (KNOWN, 0));
    }
}
