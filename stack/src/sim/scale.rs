//! A large cluster: how many messages it takes, and how long until all tables are right.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use smoltcp::time::{Duration, Instant};

use super::cluster::Cluster;
use super::event::Event;
use super::kind;
use super::link::Weather;
use super::oracle::Flow;
use super::outcome::{Failure, Figures, Violation};
use super::outside::Server;
use super::plan::Setup;
use super::random::{Random, Stream};
use crate::control::lease::{Backend, NetworkConfig, VxlanOptions};

/// Room for 65,534 nodes.
const NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8);
const SUBNET_LEN: u8 = 24;
/// All nodes start within so many milliseconds.
const STORM: u64 = 2_000;
/// How long the halves do not see each other, in seconds.
const PARTITION: u64 = 60;
/// How long all tables may take to be right, in steps of a tenth of a second.
const PATIENCE: u64 = 3_000;
/// How long nodes write their records again, however many there are.
const REPETITIONS: Duration = Duration::from_secs(240);
const STEP: Duration = Duration::from_millis(100);
const BYTES: usize = 3_000;

/// What a part of a run took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Phase {
    /// What happened.
    pub name: &'static str,
    /// Milliseconds of virtual time from the last event until all tables were right, or everybody
    /// had talked.
    pub millis: u64,
    /// How much happened meanwhile.
    pub figures: Figures,
    /// Routes of all nodes together at its end.
    pub routes: usize,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            millis,
            figures,
            routes,
        } = self;
        write!(
            f,
            "| {name} | {}.{} s | {} | {} | {} | {routes} |",
            millis / 1000,
            millis % 1000 / 100,
            figures.requests,
            figures.events,
            figures.datagrams,
        )
    }
}

/// A large cluster while its phases run.
pub struct Scale {
    cluster: Cluster,
    random: Random,
    pods: usize,
    before: Figures,
}

impl fmt::Debug for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a cluster of {} machines", self.cluster.machines.len())
    }
}

impl Scale {
    /// A cluster of so many machines with so many pods each, none of which runs yet.
    ///
    /// # Panics
    /// Never: the network fits.
    #[must_use]
    pub fn new(seed: u64, machines: usize, pods: usize) -> Self {
        let backend = Backend::Vxlan(VxlanOptions::default());
        let config = NetworkConfig::new(NETWORK, Some(SUBNET_LEN), backend);
        let config = config.unwrap_or_else(|error| unreachable!("{error}"));
        let setup = Setup::new(config, machines);
        Self {
            cluster: Cluster::new(seed, setup, Weather::FAIR, false),
            random: Random::new(seed, Stream::Plan),
            pods,
            before: Figures::default(),
        }
    }

    /// All nodes join within two seconds, with all their pods.
    ///
    /// # Errors
    /// What was wrong.
    pub fn join(&mut self) -> Result<Phase, Failure> {
        let machines = self.cluster.machines.len();
        let starts: Vec<_> = (0..machines).collect();
        self.phase("join storm", |scale| scale.start_all(&starts))
    }

    /// Time passes in which nodes write their records again for watchers that lose changes.
    ///
    /// # Errors
    /// What was wrong.
    pub fn settle(&mut self) -> Result<Phase, Failure> {
        self.phase(
            "four minutes, in which records are written again",
            |scale| scale.cluster.run(REPETITIONS),
        )
    }

    /// Of all nodes a twentieth leaves, another crashes and comes back with nothing, and as many as
    /// have left join again.
    ///
    /// # Errors
    /// What was wrong.
    pub fn churn(&mut self) -> Result<Phase, Failure> {
        let machines = self.some(self.cluster.machines.len() / 10);
        let (left, crashed) = machines.split_at(machines.len() / 2);
        let (left, crashed) = (left.to_vec(), crashed.to_vec());
        self.phase("churn of 10 %", |scale| {
            for (left, crashed) in left.iter().zip(&crashed) {
                scale.cluster.apply(&Event::Leave(*left))?;
                scale.cluster.apply(&Event::Crash(*crashed))?;
                scale.cluster.apply(&Event::Forget(*crashed))?;
                scale.cluster.run(Duration::from_millis(20))?;
            }
            scale.start_all(&machines)
        })
    }

    /// The store and half of the nodes are cut off from the other half for a minute, while a
    /// twentieth of the nodes leaves; then everything is mended.
    ///
    /// # Errors
    /// What was wrong.
    pub fn part(&mut self) -> Result<Phase, Failure> {
        let machines = self.cluster.machines.len();
        let leaving = self.some(machines / 20);
        let half = machines / 2..machines;
        self.phase("halves for a minute, then healed", |scale| {
            let cluster = &mut scale.cluster;
            cluster.apply(&Event::Partition(half.clone().collect()))?;
            for machine in leaving.iter().filter(|machine| !half.contains(machine)) {
                cluster.apply(&Event::Leave(*machine))?;
            }
            cluster.run(Duration::from_secs(PARTITION))?;
            cluster.apply(&Event::Mend)
        })
    }

    /// One pod of each node talks to one of another node over TCP.
    ///
    /// # Errors
    /// What was wrong.
    pub fn talk(&mut self) -> Result<Phase, Failure> {
        let result = self.talk_once();
        self.end("a pod of each node talks to one elsewhere", result)
    }

    /// One pod of each node talks to a server outside over TCP.
    ///
    /// # Errors
    /// What was wrong.
    pub fn go_out(&mut self) -> Result<Phase, Failure> {
        let result = self.go_out_once();
        self.end("a pod of each node talks to a server outside", result)
    }

    fn go_out_once(&mut self) -> Result<u64, Violation> {
        let pods = self.cluster.plugged();
        let mut flows = Vec::new();
        for first in pods.chunk_by(|one, other| one.0 == other.0) {
            let (who, port, _) = first[0];
            let flow = self
                .cluster
                .fetch((who, port), Server::Good, BYTES, false)?;
            flows.extend(flow);
        }
        self.await_talks(&flows)
    }

    fn start_all(&mut self, machines: &[usize]) -> Result<(), Violation> {
        for machine in machines {
            while self.cluster.machines[*machine].pods.len() < self.pods {
                self.cluster.attach(*machine, kind::POD)?;
            }
            self.cluster.apply(&Event::Join(*machine))?;
            let pause = STORM * 1000 / self.cluster.machines.len() as u64;
            self.cluster.run(Duration::from_micros(pause))?;
        }
        Ok(())
    }

    fn some(&mut self, count: usize) -> Vec<usize> {
        let machines = self.cluster.machines.len();
        let mut chosen = BTreeSet::new();
        while chosen.len() < count {
            chosen.insert(self.random.index(machines));
        }
        chosen.into_iter().collect()
    }

    fn phase(
        &mut self,
        name: &'static str,
        events: impl FnOnce(&mut Self) -> Result<(), Violation>,
    ) -> Result<Phase, Failure> {
        let result = events(self).and_then(|()| self.converge());
        self.end(name, result)
    }

    fn converge(&mut self) -> Result<u64, Violation> {
        let began = self.cluster.queue.now();
        for _ in 0..PATIENCE {
            if self.cluster.is_converged() {
                let mut text = String::new();
                self.cluster.differences(&mut text);
                if text.is_empty() {
                    self.cluster.check_tables()?;
                    return Ok(self.since(began));
                }
            }
            self.cluster.run(STEP)?;
        }
        let mut text = String::new();
        self.cluster.differences(&mut text);
        text.truncate(2_000);
        Err(Violation(format!("tables do not converge:{text}")))
    }

    fn talk_once(&mut self) -> Result<u64, Violation> {
        let pods = self.cluster.plugged();
        let mut flows = Vec::new();
        for first in pods.chunk_by(|one, other| one.0 == other.0) {
            let (who, port, _) = first[0];
            let (other, _, to) = self.random.pick(&pods);
            if other != who {
                flows.push(self.cluster.talk((who, port), to, BYTES)?);
            }
        }
        self.await_talks(&flows)
    }

    fn await_talks(&mut self, flows: &[u64]) -> Result<u64, Violation> {
        let began = self.cluster.queue.now();
        for _ in 0..PATIENCE {
            self.cluster.run(STEP)?;
            let flow = |flow: &u64| self.cluster.oracle.flow(*flow);
            if flows.iter().any(|it| matches!(flow(it), Flow::Failed(_))) {
                return Err(Violation("a pod does not reach another".to_owned()));
            }
            if flows.iter().all(|it| flow(it) == Flow::Done) {
                return Ok(self.since(began));
            }
        }
        Err(Violation("pods still talk".to_owned()))
    }

    fn since(&self, began: Instant) -> u64 {
        (self.cluster.queue.now() - began).total_millis()
    }

    fn end(
        &mut self,
        name: &'static str,
        result: Result<u64, Violation>,
    ) -> Result<Phase, Failure> {
        let millis = result.map_err(|violation| Failure {
            violation,
            log: Vec::new(),
            tables: String::new(),
        })?;
        let now = self.cluster.figures;
        let figures = now.since(&std::mem::replace(&mut self.before, now));
        Ok(Phase {
            name,
            millis,
            figures,
            routes: self.cluster.routes(),
        })
    }
}
