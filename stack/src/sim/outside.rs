//! What is outside the overlay: servers that do well or badly, each at an address that says how.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use smoltcp::time::{Duration, Instant};

use super::random::{Random, Stream};

/// Where servers are (TEST-NET-2).
const NETWORK: [u8; 3] = [198, 51, 100];
/// The same of IPv6 (RFC 3849).
const NETWORK_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0);
/// The echo service (RFC 862).
const PORT: u16 = 7;
/// After so long Linux gives up a connection that nobody answers.
const HOST_PATIENCE: Duration = Duration::from_secs(130);

/// A server outside. All send back what they get, as far as they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Server {
    /// It does what it should.
    Good,
    /// It takes little at a time, and answers late.
    Slow,
    /// It stops in the middle, and goes on after a while.
    Stalls,
    /// It has its end of the stream at once, ends it, and takes what comes then.
    GivesFirst,
    /// It resets connections, some of them late.
    Resets,
    /// It refuses connections, and has nothing at the port of datagrams.
    Refuses,
    /// There is no way to it.
    Unreachable,
    /// The last router does not find it.
    Lost,
    /// It says nothing.
    Silent,
}

impl Server {
    /// All of them.
    pub(super) const ALL: [Self; 9] = [
        Self::Good,
        Self::Slow,
        Self::Stalls,
        Self::GivesFirst,
        Self::Resets,
        Self::Refuses,
        Self::Unreachable,
        Self::Lost,
        Self::Silent,
    ];

    /// Where it is.
    pub(super) const fn address(self) -> SocketAddrV4 {
        let [a, b, c] = NETWORK;
        SocketAddrV4::new(Ipv4Addr::new(a, b, c, self as u8 + 1), PORT)
    }

    /// Where it is in IPv6.
    fn address_v6(self) -> Ipv6Addr {
        Ipv6Addr::from_bits(NETWORK_V6.to_bits() | (self as u128 + 1))
    }

    /// Where a pod reaches it, by the one or the other IP version.
    pub(super) fn reached(self, by_ipv6: bool) -> SocketAddr {
        match by_ipv6 {
            true => SocketAddr::new(self.address_v6().into(), PORT),
            false => self.address().into(),
        }
    }

    /// The one at an address.
    pub(super) fn at(address: impl Into<IpAddr>) -> Option<Self> {
        let address = address.into();
        let mut all = Self::ALL.into_iter();
        all.find(|server| match address {
            IpAddr::V4(address) => *server.address().ip() == address,
            IpAddr::V6(address) => server.address_v6() == address,
        })
    }

    /// Whether a connection to it brings everything back.
    pub(super) const fn is_fair(self) -> bool {
        matches!(
            self,
            Self::Good | Self::Slow | Self::Stalls | Self::GivesFirst
        )
    }

    /// Whether connections to it come about.
    pub(super) const fn accepts(self) -> bool {
        self.is_fair() || matches!(self, Self::Resets)
    }

    /// Whether it answers datagrams.
    pub(super) const fn echoes(self) -> bool {
        self.accepts()
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Good => "that does what it should",
            Self::Slow => "that is slow",
            Self::Stalls => "that stops in the middle",
            Self::GivesFirst => "that ends its stream first",
            Self::Resets => "that resets connections",
            Self::Refuses => "that refuses all",
            Self::Unreachable => "to which there is no way",
            Self::Lost => "that the last router does not find",
            Self::Silent => "that says nothing",
        };
        write!(f, "a server outside {text}, {}", self.address().ip())
    }
}

/// How a server treats one socket.
#[derive(Debug, Clone)]
pub(super) struct Script {
    /// Until something first happens.
    pub(super) latency: Duration,
    /// Between two of its turns.
    pub(super) pace: Duration,
    /// Bytes that it takes and gives in each.
    pub(super) chunk: usize,
    /// After how many bytes it stops, and for how long.
    pub(super) stop: Option<(usize, Duration)>,
    /// After how many bytes it resets the connection.
    pub(super) resets: Option<usize>,
    /// From which other port it answers datagrams, as TFTP does (RFC 1350 section 4). It is none of a
    /// tunnel's, of which pods hear nothing.
    pub(super) answers_from: Option<u16>,
}

impl Script {
    pub(super) fn new(server: Server, random: &mut Random) -> Self {
        let millis =
            |random: &mut Random, least, most| Duration::from_millis(random.between(least, most));
        Self {
            latency: match server {
                Server::Slow => millis(random, 100, 20_000),
                Server::Lost => millis(random, 1_000, 3_000),
                Server::Silent => HOST_PATIENCE,
                _ => millis(random, 1, 80),
            },
            pace: match server {
                Server::Slow => millis(random, 5, 40),
                _ => Duration::from_micros(random.between(10, 5_000)),
            },
            chunk: match server {
                Server::Slow => random.between(50, 500) as usize,
                _ => random.pick(&[1_000, 4_000, 16_000]),
            },
            stop: (server == Server::Stalls)
                .then(|| (random.below(4_000) as usize, millis(random, 100, 40_000))),
            resets: (server == Server::Resets).then(|| random.below(4_000) as usize),
            answers_from: (random.below(2) == 0).then(|| random.between(10_000, 50_000) as u16),
        }
    }
}

/// The ways of machines to servers.
#[derive(Debug)]
pub(super) struct Outside {
    /// Machines that have none.
    cut: BTreeSet<usize>,
    /// When machines last had none.
    last_cut: BTreeMap<usize, Instant>,
    random: Random,
}

impl Outside {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            cut: BTreeSet::new(),
            last_cut: BTreeMap::new(),
            random: Random::new(seed, Stream::Outside),
        }
    }

    /// A seed for a machine's egress or its sockets.
    pub(super) fn seed(&mut self) -> u64 {
        self.random.number()
    }

    pub(super) fn cut(&mut self, now: Instant, machine: usize) {
        self.cut.insert(machine);
        self.last_cut.insert(machine, now);
    }

    pub(super) fn heal(&mut self, now: Instant) {
        for machine in std::mem::take(&mut self.cut) {
            self.last_cut.insert(machine, now);
        }
    }

    pub(super) fn is_cut(&self, machine: usize) -> bool {
        self.cut.contains(&machine)
    }

    /// Whether a machine has had no way out since then.
    pub(super) fn was_cut(&self, machine: usize, since: Instant) -> bool {
        let last = self.last_cut.get(&machine);
        self.is_cut(machine) || last.is_some_and(|last| *last >= since)
    }
}
