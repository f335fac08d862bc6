//! A node's way out: the sockets of its egress, and bounds that are reached.

use std::collections::BTreeSet;

use muslin_encap::mtu::Mtu;
use smoltcp::time::Instant;

use super::constants::TUNNEL;
use super::sockets::Sockets;
use crate::addresses::Nets;
use crate::datapath::egress::{Direction, EgressConfig, FlowKey, Limits, Policy, Rules};

/// Few, so that they are reached.
pub(super) const FLOWS: usize = 5;
pub(super) const FLOWS_OF_POD: usize = 4;
/// For buffers that are smaller than what most flows carry.
const MEMORY: usize = 128 << 10;

/// The sockets of a node's egress, and what was true of it before.
pub(super) struct WayOut {
    pub(super) sockets: Sockets,
    /// Flows that had made room for others, and those that were there then.
    pub(super) evicted: u64,
    pub(super) flows: BTreeSet<(FlowKey, Direction)>,
    /// How often a timeout was handled in which millisecond.
    timeouts: (i64, u32),
}

/// What egress of a node with these subnets is.
pub(super) fn config(subnets: Nets, mtu: Mtu, seed: u64) -> EgressConfig {
    let limits = Limits {
        flows: FLOWS,
        flows_of_pod: FLOWS_OF_POD,
        memory: MEMORY,
        ..Limits::default()
    };
    EgressConfig {
        policy: Policy::new(Rules {
            tunnel_ports: vec![TUNNEL.port()],
            ..Rules::default()
        }),
        subnets: Some(subnets),
        mtu,
        limits,
        random_seed: seed,
    }
}

impl WayOut {
    pub(super) fn new(seed: u64, now: Instant) -> Self {
        Self {
            sockets: Sockets::new(seed, now),
            evicted: 0,
            flows: BTreeSet::new(),
            timeouts: (0, 0),
        }
    }

    pub(super) fn count_timeout(&mut self, now: Instant) -> u32 {
        let millis = now.total_millis();
        if self.timeouts.0 != millis {
            self.timeouts = (millis, 0);
        }
        self.timeouts.1 += 1;
        self.timeouts.1
    }
}
