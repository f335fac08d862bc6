//! Plans: what a seed lets happen to which cluster.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::vxlan::VtepMac;

use super::event::{Event, Forgery};
use super::link::Weather;
use super::outside::Server;
use super::random::{Random, Stream};
use super::rogue::Rogue;
use crate::control::lease::{
    Backend, Ipv6Range, LeaseRecord, NetworkConfig, RENEW_MARGIN, VxlanOptions, WantedConfig,
};
use crate::datapath::egress::Protocol;

/// All pods of the cluster.
const NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);
/// The same of IPv6, where the network has it.
const IPV6_NETWORK: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, 0), 60);
const HOUR: u64 = 3_600_000;

/// A cluster and what happens to it. The same seed makes the same plan.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Plan {
    /// The seed it was made from, and from which all chances of its run come.
    pub seed: u64,
    /// The cluster.
    pub setup: Setup,
    /// The links at the start.
    pub weather: Weather,
    /// What happens, in order.
    pub steps: Vec<Step>,
    /// Whether a day passes at the end, in which leases of machines that are gone run out.
    pub rests: bool,
}

/// Something that happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Which step of its plan it is.
    pub number: usize,
    /// Milliseconds since the one before.
    pub after: u64,
    /// What happens.
    pub event: Event,
}

/// A cluster before anything happens.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Setup {
    /// MTU of each machine's interface.
    pub mtus: Vec<Mtu>,
    /// The network.
    pub config: NetworkConfig,
    /// Whether the store has the network's configuration, or the first node writes it.
    pub is_configured: bool,
    /// Whether the store says how long keys live still, as SQLite does and etcd does not.
    pub tells_ttl: bool,
    /// Whether nodes take datagrams from nodes with a lease only.
    pub guards_peers: bool,
    /// How many workers each node has.
    pub workers: u8,
    /// Whether nodes share the names of their pods.
    pub shares_names: bool,
    /// How long before its end a lease is renewed.
    pub renew_margin: Duration,
}

impl Setup {
    /// A network with so many machines at a link of 1,500 bytes: the store has its configuration and
    /// does as etcd does, peers are guarded against, and leases are renewed as flannel's are.
    #[must_use]
    pub fn new(config: NetworkConfig, machines: usize) -> Self {
        Self {
            mtus: vec![Mtu::ETHERNET; machines],
            config,
            is_configured: true,
            tells_ttl: false,
            guards_peers: true,
            workers: 1,
            shares_names: false,
            renew_margin: RENEW_MARGIN,
        }
    }

    /// Whether the store is one that flannel's nodes use, too.
    pub(super) fn is_etcd(&self) -> bool {
        !self.tells_ttl
    }

    /// Which network a node asks for.
    pub(super) fn wanted_config(&self) -> WantedConfig {
        match self.is_configured {
            true => WantedConfig::Any,
            false => WantedConfig::IfNone(self.config.clone()),
        }
    }

    /// The record of a node in this network.
    pub(super) fn record(&self, public_ip: Ipv4Addr, mac: [u8; 6]) -> LeaseRecord {
        LeaseRecord::of(&self.config.backend, public_ip, VtepMac::from_random(mac))
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mtus: Vec<_> = self.mtus.iter().map(|mtu| mtu.get()).collect();
        write!(
            f,
            "{} machines with MTUs of {mtus:?}, {}",
            mtus.len(),
            self.config
        )?;
        if !self.guards_peers {
            write!(f, ", peers are not guarded against")?;
        }
        if self.workers > 1 {
            write!(f, ", {} workers each", self.workers)?;
        }
        Ok(())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; links have {}", self.setup, self.weather)?;
        let mut at = 0;
        for step in &self.steps {
            at += step.after;
            let (number, event) = (step.number, &step.event);
            writeln!(
                f,
                "{:>9}.{:03} s  {number:>3}: {event}",
                at / 1000,
                at % 1000
            )?;
        }
        write!(f, "then everything is mended")?;
        if self.rests {
            write!(f, ", all pods talk, and a day passes")?;
        }
        Ok(())
    }
}

impl Plan {
    /// The plan of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed, Stream::Plan);
        let setup = setup(seed, &mut random);
        let weather = match random.chance(500) {
            true => Weather::FAIR,
            false => some_weather(&mut random),
        };
        let machines = setup.mtus.len();
        let mut steps = Vec::new();
        let mut add = |after, event| {
            let number = steps.len();
            steps.push(Step {
                number,
                after,
                event,
            });
        };
        for machine in 0..machines {
            add(random.below(1500), Event::Join(machine));
        }
        for machine in 0..machines {
            for _ in 0..random.between(1, 2) {
                add(random.below(100), Event::Attach(machine));
            }
        }
        for _ in 0..random.between(4, 40) {
            let after = match random.below(20) {
                0 => random.between(1, 30) * HOUR,
                1..=5 => random.below(30),
                6..=10 => random.below(2_000),
                _ => random.below(20_000),
            };
            add(after, some_event(&mut random, machines));
        }
        let rests = random.chance(150);
        Self {
            seed,
            setup,
            weather,
            steps,
            rests,
        }
    }

    /// A plan of one's own, with links as they should be: what happens, each so many milliseconds
    /// after the one before.
    #[must_use]
    pub fn scripted(
        seed: u64,
        setup: Setup,
        events: impl IntoIterator<Item = (u64, Event)>,
    ) -> Self {
        let steps = events.into_iter().enumerate();
        let steps = steps.map(|(number, (after, event))| Step {
            number,
            after,
            event,
        });
        Self {
            seed,
            setup,
            weather: Weather::FAIR,
            steps: steps.collect(),
            rests: false,
        }
    }

    /// The same with some steps only, by their numbers. Each still happens at its time.
    #[must_use]
    pub fn only(&self, numbers: &[usize]) -> Self {
        let mut plan = self.clone();
        let mut skipped = 0;
        plan.steps.retain_mut(|step| {
            if numbers.contains(&step.number) {
                step.after += std::mem::take(&mut skipped);
                return true;
            }
            skipped += step.after;
            false
        });
        plan
    }
}

fn setup(seed: u64, random: &mut Random) -> Setup {
    let machines = random.between(2, 5);
    let backend = match random.below(10) {
        0..5 => Backend::Vxlan(VxlanOptions::default()),
        5 => Backend::Vxlan(VxlanOptions {
            direct_routing: true,
            ..VxlanOptions::default()
        }),
        6..8 => Backend::HostGw,
        8 => Backend::Udp {
            port: muslin_encap::tunnel::udp::PORT,
        },
        _ => Backend::Ipip {
            direct_routing: random.chance(400),
        },
    };
    // A stream of its own, so that plans stay what they were.
    let carries_ipv6 = matches!(backend, Backend::Vxlan(_) | Backend::HostGw);
    let is_dual = carries_ipv6 && Random::new(seed, Stream::Families).chance(400);
    let len = random.pick(&[24, 24, 26, 29]);
    let config = NetworkConfig::new(NETWORK, Some(len), backend);
    let config = config.and_then(|config| match is_dual {
        // Few subnets, so that nodes often draw the same one.
        true => config.with_ipv6(Ipv6Range::new(IPV6_NETWORK, Some(64))?),
        false => Ok(config),
    });
    let mtus = (0..machines).map(|_| some_mtu(random));
    Setup {
        mtus: mtus.collect(),
        // All these lengths fit the network.
        config: config.unwrap_or_else(|error| unreachable!("{error}")),
        is_configured: random.chance(500),
        tells_ttl: random.chance(500),
        guards_peers: random.chance(850),
        // A stream of its own, so that plans stay what they were.
        shares_names: true,
        workers: Random::new(seed, Stream::Workers).pick(&[1, 1, 2, 3]),
        renew_margin: match random.chance(800) {
            true => RENEW_MARGIN,
            false => Duration::from_secs(60 * random.between(1, 1439)),
        },
    }
}

fn some_mtu(random: &mut Random) -> Mtu {
    let mtu = random.pick(&[1500, 1500, 1500, 1400, 1280, 4000]);
    Mtu::new(mtu).unwrap_or(Mtu::ETHERNET)
}

fn some_weather(random: &mut Random) -> Weather {
    let mut chance = |most| match random.chance(400) {
        true => random.below(most) as u16,
        false => 0,
    };
    let (loss, duplication) = (chance(150), chance(100));
    let (reordering, corruption) = (chance(200), chance(50));
    Weather {
        latency: random.pick(&[50, 200, 5_000, 80_000]),
        jitter: random.pick(&[0, 100, 10_000]),
        loss,
        duplication,
        reordering,
        corruption,
        mtu: match random.chance(150) {
            true => random.between(600, 1500) as u16,
            false => u16::MAX,
        },
    }
}

fn some_event(random: &mut Random, machines: usize) -> Event {
    let machine = random.index(machines);
    let other = random.index(machines);
    let pod = random.index(16);
    let another = random.index(16);
    match random.below(136) {
        0..=5 => Event::Join(machine),
        6..=8 => Event::Leave(machine),
        9..=13 => Event::Crash(machine),
        14..=15 => Event::Forget(machine),
        16..=21 => Event::Attach(machine),
        22..=26 => Event::Detach {
            machine,
            pod: random.index(4),
        },
        27..=29 => Event::Move(machine),
        30 => Event::Inherit(machine),
        31 if random.chance(500) => Event::Swap(machine, other),
        31 => Event::Clone {
            from: machine,
            to: other,
        },
        32..=34 => {
            let side = (0..machines).filter(|_| random.chance(500));
            Event::Partition(side.collect())
        }
        35..=36 if machine != other => Event::Cut(machine, other),
        35..=40 => Event::Weather(some_weather(random)),
        41..=44 => Event::Mend,
        45..=46 => Event::StoreDown,
        47..=51 => Event::StoreUp,
        52..=53 => Event::StoreCut(machine),
        54..=56 => Event::StoreLoss(random.below(400) as u16),
        57 => Event::StoreSlow(random.between(10, 2_500)),
        58 => Event::StoreLags,
        59..=60 => Event::Compact,
        61..=62 => Event::EndWatches,
        63 => Event::Wipe,
        64..=65 => Event::DeleteRecord(machine),
        66 => Event::DeleteAll,
        67..=71 => Event::Rewrite {
            machine,
            what: match random.below(6) {
                0 | 1 => Forgery::Rubbish,
                2 => Forgery::Reservation,
                3 => Forgery::ShortLife,
                4 => Forgery::Stranger,
                _ => Forgery::Neighbour(other),
            },
        },
        72 if random.chance(500) => Event::Overlap {
            machine,
            is_wider: random.chance(500),
        },
        72..=73 => Event::Foreign(random.below(256) as u8),
        74..=84 => Event::Talk {
            from: pod,
            to: another,
            bytes: random.pick(&[1, 100, 3_000, 20_000, 60_000]),
        },
        85..=94 => Event::Ping {
            from: pod,
            to: another,
            bytes: random.pick(&[24, 56, 1_000, 1_400, 3_000, 6_000]),
        },
        95..=98 => Event::Misbehave {
            victim: pod,
            trick: random.below(Rogue::OUTSIDE.into()) as u8,
        },
        99 if random.chance(400) => Event::NewCard(machine),
        99 if random.chance(500) => Event::Lie(machine),
        100..=111 => Event::Fetch {
            pod,
            server: some_server(random),
            count: random.pick(&[1, 1, 2, 3, 7]),
            bytes: random.pick(&[1, 100, 3_000, 20_000, 60_000]),
            ends_first: random.chance(300),
        },
        112..=118 => Event::Query {
            pod,
            server: some_server(random),
            protocol: random.pick(&[Protocol::Udp, Protocol::Ping]),
            count: random.pick(&[1, 1, 4]),
            bytes: random.pick(&[24, 56, 1_000, 1_400, 3_000, 6_000]),
        },
        119 => Event::CutOutside(machine),
        120..=123 => Event::Misbehave {
            victim: pod,
            trick: random.between(Rogue::OUTSIDE.into(), u64::from(Rogue::TRICKS) - 1) as u8,
        },
        124..=125 => Event::Flannel(random.below(256) as u8),
        126 => Event::Misconfigure(random.below(4) as u8),
        127..=128 => Event::Resize {
            machine,
            mtu: some_mtu(random),
        },
        129..=131 => Event::Freeze {
            machine,
            seconds: random.pick(&[1, 4, 30, 300, 3_600, 100_000]),
        },
        132..=135 => Event::Visit {
            pod,
            bytes: random.pick(&[1, 100, 3_000, 20_000]),
            is_local: random.chance(300),
        },
        _ => Event::Replay,
    }
}

fn some_server(random: &mut Random) -> Server {
    match random.chance(300) {
        true => Server::Good,
        false => random.pick(&Server::ALL),
    }
}
