//! The underlay: what becomes of a datagram between two machines.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use smoltcp::time::{Duration, Instant};

use super::random::{Random, Stream};

/// How links behave. Chances are in thousandths, for each datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Weather {
    /// The shortest time that a datagram takes, in microseconds.
    pub latency: u64,
    /// How much longer some take, in microseconds; they keep their order.
    pub jitter: u64,
    /// How many are lost.
    pub loss: u16,
    /// How many arrive twice.
    pub duplication: u16,
    /// How many are overtaken by later ones.
    pub reordering: u16,
    /// How many arrive with another byte than was sent.
    pub corruption: u16,
    /// The longest that gets through, in bytes of its IP packet.
    pub mtu: u16,
}

impl Weather {
    /// Links as they should be.
    pub const FAIR: Self = Self {
        latency: 200,
        jitter: 100,
        loss: 0,
        duplication: 0,
        reordering: 0,
        corruption: 0,
        mtu: u16::MAX,
    };
}

impl fmt::Display for Weather {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "latency {}+{} us", self.latency, self.jitter)?;
        let chances = [
            ("lost", self.loss),
            ("doubled", self.duplication),
            ("reordered", self.reordering),
            ("corrupted", self.corruption),
        ];
        for (what, chance) in chances.into_iter().filter(|(_, chance)| *chance > 0) {
            write!(f, ", {}.{} % {what}", chance / 10, chance % 10)?;
        }
        if self.mtu < u16::MAX {
            write!(f, ", MTU {}", self.mtu)?;
        }
        Ok(())
    }
}

/// What becomes of a datagram.
#[derive(Debug)]
pub(super) enum Fate {
    /// It does not arrive, and why.
    Lost(&'static str),
    Arrives {
        at: Instant,
        /// The byte that changes on its way, and how.
        corrupted: Option<(usize, u8)>,
        /// When it arrives once more.
        again: Option<Instant>,
    },
}

/// The links between machines, and between each of them and the store.
#[derive(Debug)]
pub(super) struct Underlay {
    pub(super) weather: Weather,
    /// Machines on the other side of a partition; the store is on this one.
    pub(super) other_side: BTreeSet<usize>,
    /// Pairs of machines, the smaller number first, between which nothing gets through.
    pub(super) cut: BTreeSet<(usize, usize)>,
    /// The last arrival in each direction: without reordering nothing overtakes.
    last: BTreeMap<(usize, usize), Instant>,
    random: Random,
}

impl Underlay {
    pub(super) fn new(seed: u64, weather: Weather) -> Self {
        Self {
            weather,
            other_side: BTreeSet::new(),
            cut: BTreeSet::new(),
            last: BTreeMap::new(),
            random: Random::new(seed, Stream::Underlay),
        }
    }

    /// Mends everything.
    pub(super) fn heal(&mut self) {
        self.weather = Weather::FAIR;
        self.other_side.clear();
        self.cut.clear();
    }

    /// What becomes of a datagram of so many bytes in an IP packet of `outer` bytes.
    pub(super) fn carry(
        &mut self,
        now: Instant,
        (from, to): (usize, usize),
        len: usize,
        outer: usize,
    ) -> Fate {
        let Weather {
            latency,
            jitter,
            loss,
            duplication,
            reordering,
            corruption,
            mtu,
        } = self.weather;
        let is_parted = self.other_side.contains(&from) != self.other_side.contains(&to);
        if is_parted || self.cut.contains(&(from.min(to), from.max(to))) {
            return Fate::Lost("no way");
        }
        if outer > mtu.into() {
            return Fate::Lost("too large");
        }
        let random = &mut self.random;
        if random.chance(loss) {
            return Fate::Lost("bad luck");
        }
        let mut at = now + Duration::from_micros(latency + random.below(jitter + 1));
        let last = self.last.entry((from, to)).or_insert(at);
        if random.chance(reordering) {
            at += Duration::from_micros(random.between(1, 20) * (latency + jitter));
        } else {
            at = at.max(*last);
            *last = at;
        }
        let again = random.chance(duplication);
        let again = again.then(|| at + Duration::from_micros(random.below(50_000)));
        let corrupted = random
            .chance(corruption)
            .then(|| (random.index(len.max(1)), 1u8 << random.below(8)));
        Fate::Arrives {
            at,
            corrupted,
            again,
        }
    }
}
