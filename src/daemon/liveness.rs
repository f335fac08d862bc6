//! Which of the other nodes are alive, as far as this one can know.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use ipnet::IpNet;
use muslin_stack::control::lease::{Signs, Standing};
use muslin_stack::control::names::Names;
use muslin_stack::datapath::peer::{Path, Peer, PeerId};
use tokio::time::{Instant, sleep};

use super::running::RunningNode;
use crate::error::{Error, Result};
use crate::lease::table::Known;
use crate::worker::PeerStates;

/// How long peers have to answer.
const PATIENCE: Duration = Duration::from_millis(900);
/// When their answers are looked for first; later it takes twice as long each time, because every
/// look copies what went to and came from all peers.
const FIRST_LOOK: Duration = Duration::from_millis(15);

/// The other nodes at one moment.
pub(super) struct Census {
    /// The peers at that moment.
    pub(super) states: PeerStates,
    /// The peers that have answered when they were asked.
    pub(super) answered: HashSet<PeerId>,
    lives: HashMap<IpNet, Signs>,
}

impl Census {
    /// Asks those for a sign of life of which nothing was heard for a while, and waits a moment for
    /// what they answer.
    pub(super) async fn take(running: &RunningNode) -> Result<Self> {
        let mut states = running.workers.peers().await.map_err(Error::failed)?;
        let mut answered = HashSet::new();
        let alone = alone(running);
        let mut quiet = quiet(&states, &running.naming.names.read(), &alone);
        if !quiet.is_empty() {
            let asked = quiet.keys().copied().collect();
            running.workers.probe(asked).map_err(Error::failed)?;
        }
        let deadline = Instant::now() + PATIENCE;
        let mut look = FIRST_LOOK;
        while !quiet.is_empty() && Instant::now() < deadline {
            sleep(look).await;
            look *= 2;
            states = running.workers.peers().await.map_err(Error::failed)?;
            for state in &states.peers {
                let id = state.peer.id;
                let before = quiet.get(&id);
                if before.is_some_and(|before| state.received.packets > *before) {
                    quiet.remove(&id);
                    answered.insert(id);
                }
            }
        }
        Ok(Self::of(states, answered))
    }

    /// Asks nobody, since it is known who has answered a moment ago.
    pub(super) async fn knowing(running: &RunningNode, answered: HashSet<PeerId>) -> Result<Self> {
        let states = running.workers.peers().await.map_err(Error::failed)?;
        Ok(Self::of(states, answered))
    }

    fn of(states: PeerStates, answered: HashSet<PeerId>) -> Self {
        Self {
            lives: lives(&states, &answered),
            states,
            answered,
        }
    }

    /// What is known of the node with a lease.
    pub(super) fn known(&self, names: &Names, subnet: IpNet) -> Known {
        let record = names.record(subnet);
        let signs = self.lives.get(&subnet);
        Known {
            node: record.map(|record| record.node.to_string()),
            signs: signs.map(|signs| with_names(*signs, names, subnet)),
        }
    }
}

/// The peers that are halves of leases with IPv6 alone.
fn alone(running: &RunningNode) -> HashSet<PeerId> {
    let control = running.control.lock();
    let peers = control.peers().iter();
    let alone = peers.filter(|(key, _)| key.ipv4().is_none());
    alone.filter_map(|(_, known)| known.id_v6).collect()
}

/// The peers that have to be asked, with the packets that came from each before.
fn quiet(states: &PeerStates, names: &Names, alone: &HashSet<PeerId>) -> HashMap<PeerId, u64> {
    let lives = lives(states, &HashSet::new());
    let is_quiet = |subnet: IpNet| {
        let signs = lives.get(&subnet).copied().unwrap_or_default();
        Standing::of(with_names(signs, names, subnet)) != Standing::Alive
    };
    let reachable = states.peers.iter();
    let reachable = reachable.filter(|state| state.path != Path::Unreachable);
    // A node that has both IP versions is asked by IPv4.
    let is_asked = |peer: &Peer| matches!(peer.subnet, IpNet::V4(_)) || alone.contains(&peer.id);
    reachable
        .filter(|state| is_asked(&state.peer) && is_quiet(state.peer.subnet))
        .map(|state| (state.peer.id, state.received.packets))
        .collect()
}

fn with_names(signs: Signs, names: &Names, subnet: IpNet) -> Signs {
    Signs {
        has_stopped: names.record(subnet).is_some_and(|record| record.stopped),
        ..signs
    }
}

/// The signs of each peer, by its lease.
fn lives(states: &PeerStates, answered: &HashSet<PeerId>) -> HashMap<IpNet, Signs> {
    // What comes from an address counts for the first peer there.
    let mut hosts = HashMap::<_, Signs>::new();
    for state in &states.peers {
        let signs = hosts.entry(state.peer.address.ip()).or_default();
        let age = state.heard.map(|heard| (states.now - heard).total_micros());
        let age = age.map(Duration::from_micros);
        signs.heard = signs.heard.into_iter().chain(age).min();
        signs.answers |= answered.contains(&state.peer.id);
    }
    let peers = states.peers.iter().map(|state| &state.peer);
    peers
        .map(|peer| (peer.subnet, hosts.get(&peer.address.ip()).copied()))
        .map(|(subnet, signs)| (subnet, signs.unwrap_or_default()))
        .collect()
}
