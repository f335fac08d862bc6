//! Processes: how a node starts and ends, and what changes of its lease mean for it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::ControlFlow;
use std::sync::Arc;

use muslin_encap::mtu::Mtu;
use muslin_encap::offload::split::Checksums;
use muslin_encap::tunnel::vxlan::VtepMac;
use smoltcp::time::{Duration, Instant};

use super::Cluster;
use crate::control::lease::{
    Change, ConfigFault, Identity, Manager, ManagerSettings, OwnChange, SubnetKey,
};
use crate::control::names::SharerSettings;
use crate::control::peers::Here;
use crate::control::plane::{ControlPlane, Operation};
use crate::control::pods::Pods;
use crate::control::tunnel::{TunnelFault, TunnelPlan};
use crate::datapath::Datapath;
use crate::datapath::egress::{Egress, Owners};
use crate::datapath::guard::Policy;
use crate::datapath::node::{Node, NodeConfig};
use crate::sim::agent::Agent;
use crate::sim::constants::{IPV6_UNDERLAY, LIMITS, PREFIX};
use crate::sim::due::{Due, Who};
use crate::sim::machine::{Disk, LeasedNode, Process};
use crate::sim::outcome::Violation;
use crate::sim::outside::Outside;
use crate::sim::plan::Setup;
use crate::sim::random::Random;
use crate::sim::sharing::{NameAgent, node_name};
use crate::sim::way_out::{self, WayOut};
use crate::sim::worker::Worker;

/// When a node that has ended by itself is started again.
const RESTART: Duration = Duration::from_secs(10);
/// How long pods of an earlier process may take to be attached again, as in `src/daemon/`.
const AWAITED: Duration = Duration::from_secs(10);

impl Cluster {
    /// Starts a node on a machine where none runs.
    pub(super) fn start(&mut self, number: usize) -> Result<(), Violation> {
        let now = self.queue.now();
        let machine = &mut self.machines[number];
        if machine.process.is_some() || !machine.is_wanted {
            return Ok(());
        }
        let random = &mut self.random;
        let disk = machine.disk.get_or_insert_with(|| Disk {
            vtep_mac: VtepMac::from_random(random.mac()),
            gateway_mac: VtepMac::from_random(random.mac()),
            lease: None,
            addresses: None,
        });
        let manager = Manager::new(ManagerSettings {
            identity: Identity {
                public_ip: machine.public_ip,
                public_ipv6: machine
                    .public_ipv6
                    .filter(|_| machine.mtu.get() >= IPV6_UNDERLAY),
                vtep_mac: disk.vtep_mac,
                public_key: None,
            },
            prefix: PREFIX.to_owned(),
            checksums: Checksums::Complete,
            multicast: false,
            previous: disk.lease.and_then(|lease| lease.ipv4()),
            previous_ipv6: disk.lease.and_then(|lease| lease.ipv6()),
            wanted_config: self.setup.wanted_config(),
            renew_margin: self.setup.renew_margin,
            repeats: self.setup.is_etcd(),
            random_seed: random.number(),
        });
        machine.starts += 1;
        let who = Who {
            machine: number,
            process: machine.starts,
        };
        machine.process = Some(Process {
            number: machine.starts,
            agent: Agent::new(manager, now),
            config: None,
            control: ControlPlane::default(),
            running: None,
        });
        self.log.note(now, || format!("machine {number} starts"));
        self.drive(who)
    }

    /// The process has ended, and so have its pods.
    pub(super) fn end_process(&mut self, who: Who, how: &str) {
        let now = self.queue.now();
        let machine = &mut self.machines[who.machine];
        if machine.process(who).is_some() {
            machine.process = None;
            self.log
                .note(now, || format!("machine {} {how}", who.machine));
        }
    }

    /// The process has ended by itself, and is started again if a node is to run here.
    pub(super) fn end_for_now(&mut self, who: Who, how: &str) {
        if self.machines[who.machine].process(who).is_some() {
            self.end_process(who, how);
            let at = self.queue.now() + RESTART;
            self.queue.schedule(at, Due::Start(who.machine));
        }
    }

    /// Gives a machine another public address, if that is free.
    pub(super) fn move_machine(&mut self, number: usize, to: Ipv4Addr) -> Result<(), Violation> {
        if self.addresses.contains_key(&to) {
            return Ok(());
        }
        let machine = &mut self.machines[number];
        let old = std::mem::replace(&mut machine.public_ip, to);
        self.addresses.remove(&old);
        self.addresses.insert(to, number);
        self.former.retain(|former| *former != to);
        self.former.push(old);
        self.tell_link(number);
        match self.who(number) {
            Some(who) => self.tell_address(who),
            None => Ok(()),
        }
    }

    /// Gives a machine's interface another MTU, which its node and pods follow.
    pub(super) fn resize_machine(&mut self, number: usize, mtu: Mtu) -> Result<(), Violation> {
        let now = self.queue.now();
        let machine = &mut self.machines[number];
        machine.mtu = mtu;
        if let Some(process) = &mut machine.process
            && let Some(plan) = process.control.plan()
        {
            let plan = plan.on(mtu.get().into()).map_err(misfit)?;
            process.control.set_plan(plan);
            process.update_tables(now);
            // As the workers do: what is too little for IPv6 is none for it.
            if let (Some(running), Some(mtu)) = (&mut process.running, plan.mtu_v6()) {
                running.each_node(|node| node.set_mtu_v6(mtu));
            }
        }
        self.tell_link(number);
        match self.who(number) {
            Some(who) => self.settle(who),
            None => Ok(()),
        }
    }

    /// Lets two machines exchange their public addresses.
    pub(super) fn swap_machines(&mut self, one: usize, other: usize) -> Result<(), Violation> {
        let (first, second) = (self.machines[one].public_ip, self.machines[other].public_ip);
        for (machine, address) in [(one, second), (other, first)] {
            self.machines[machine].public_ip = address;
            self.addresses.insert(address, machine);
            self.tell_link(machine);
        }
        for machine in [one, other] {
            if let Some(who) = self.who(machine) {
                self.tell_address(who)?;
            }
        }
        Ok(())
    }

    /// What a change of the lease means for the node, as in `src/daemon/`. It breaks when the process
    /// has ended.
    pub(super) fn take_change(
        &mut self,
        who: Who,
        change: Change,
    ) -> Result<ControlFlow<()>, Violation> {
        let now = self.queue.now();
        self.log
            .note(now, || format!("machine {}: {change:?}", who.machine));
        let Some(process) = self.machines[who.machine].process(who) else {
            return Ok(ControlFlow::Break(()));
        };
        let Some(change) = process.control.take(change) else {
            process.update_tables(now);
            return Ok(ControlFlow::Continue(()));
        };
        match change {
            OwnChange::Configured(config) => process.config = Some(config),
            OwnChange::Acquired(key) => self.run_node(who, key)?,
            OwnChange::Left => {
                self.end_for_now(who, "has left");
                return Ok(ControlFlow::Break(()));
            }
            OwnChange::Lost(_) => {
                self.end_for_now(who, "has lost its lease");
                return Ok(ControlFlow::Break(()));
            }
            OwnChange::AwaitsConfig(fault) => {
                if !self.was_misconfigured && !matches!(fault, ConfigFault::Missing(_)) {
                    let machine = who.machine;
                    return Err(Violation(format!("machine {machine} refuses: {fault}")));
                }
            }
            OwnChange::Renewed
            | OwnChange::NoIpv6(_)
            | OwnChange::Races { .. }
            | OwnChange::Changed { .. }
            | OwnChange::Overlap { .. }
            | OwnChange::Disputed(_)
            | OwnChange::Replaced { .. }
            | OwnChange::Moved { .. }
            | OwnChange::Skipped { .. } => {}
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The node has its lease: its data path begins.
    pub(super) fn run_node(&mut self, who: Who, key: SubnetKey) -> Result<(), Violation> {
        let now = self.queue.now();
        let number = who.machine;
        let machine = &mut self.machines[number];
        let (Some(disk), Some(process)) = (&mut machine.disk, &mut machine.process) else {
            return Ok(());
        };
        if let Some(running) = &process.running {
            let old = running.key;
            return Err(Violation(format!(
                "machine {number} runs with {old} and gets {key}: its pods are stranded"
            )));
        }
        let Some(config) = process.config.clone() else {
            return Err(Violation(format!(
                "machine {number} has {key} and no network configuration"
            )));
        };
        disk.lease = Some(key);
        let mtu = machine.mtu.get().into();
        let plan = TunnelPlan::new(&config.backend, disk.vtep_mac, None, mtu).map_err(misfit)?;
        let plan = match key.ipv6() {
            Some(_) => plan.with_ipv6(),
            None => plan,
        };
        if key.ipv6().is_some() && plan.mtu_v6().is_none() {
            // The interface has got another MTU since it began.
            self.end_for_now(who, "has no room for IPv6");
            return Ok(());
        }
        let node = node_config(&plan, key, disk, &self.setup, &mut self.random);
        let workers = workers(&node, key, &self.setup, &mut self.outside, now)?;
        let memory = disk.addresses.as_ref();
        let awaited: BTreeSet<_> = memory
            .iter()
            .flat_map(|memory| memory.addresses())
            .collect();
        let is_restart = memory.is_some();
        let names = SharerSettings {
            prefix: PREFIX.to_owned(),
            network: config.networks(),
            node: node_name(number),
            subnet: key,
        };
        let mut running = LeasedNode {
            key,
            config,
            gateway_mac: disk.gateway_mac.get(),
            pods: Pods::new(key.nets(), disk.addresses.clone()),
            names: NameAgent::new(names, now),
            workers,
            ports: BTreeMap::new(),
            unplugged: BTreeSet::new(),
            awaited: (awaited, now + AWAITED),
            gone: BTreeSet::new(),
        };
        let networks = running.config.networks();
        let (awaited, until) = running.awaited.clone();
        running.each_node(|node| {
            node.set_egress(Some(networks));
            node.await_pods(awaited.iter().copied(), until);
        });
        process
            .control
            .start(running.config.clone(), plan, key, Here::default());
        process.running = Some(running);
        process.update_tables(now);
        self.tell_link(number);
        self.check_owners(number, key)?;
        let names: Vec<_> = self.machines[number].pods.keys().cloned().collect();
        for name in names {
            if is_restart {
                self.plug_later(who, name);
            } else {
                self.plug(who, &name)?;
            }
        }
        self.drive_names(who)?;
        self.settle(who)
    }

    /// No two nodes may have a subnet, unless somebody has taken the record of one of them away: it
    /// expired, or was deleted or written by others. A node that is on its way out no longer counts.
    pub(super) fn check_owners(&self, number: usize, key: SubnetKey) -> Result<(), Violation> {
        for (other, machine) in self.machines.iter().enumerate() {
            let process = machine.process.as_ref().filter(|_| other != number);
            let Some(process) = process.filter(|process| !process.agent.is_leaving) else {
                continue;
            };
            if let Some(running) = &process.running
                && running.key.overlaps(&key)
                && !self.oracle.is_excused(running.key, other)
            {
                let theirs = running.key;
                return Err(Violation(format!(
                    "machine {number} has {key} and machine {other} has {theirs} at the same time"
                )));
            }
        }
        Ok(())
    }
}

impl Process {
    /// Does what follows from changes of leases.
    fn update_tables(&mut self, now: Instant) {
        let Some(running) = &mut self.running else {
            return;
        };
        while let Some(operation) = self.control.poll() {
            operation.apply_to_names(&mut running.names.names);
            for worker in &mut running.workers {
                operation.apply(&mut worker.path, now);
            }
            if let Operation::SetMtu(mtu) = operation {
                for plugged in running.ports.values_mut() {
                    plugged.device.set_mtu(now, mtu);
                }
            }
        }
    }
}

/// The workers of a node. Their chances outside are each their own.
fn workers(
    node: &NodeConfig,
    key: SubnetKey,
    setup: &Setup,
    outside: &mut Outside,
    now: Instant,
) -> Result<Vec<Worker>, Violation> {
    let mut workers = Vec::new();
    let mut owners = None;
    for number in 0..setup.workers {
        let node = Node::new(node.clone(), now).map_err(|error| Violation(error.to_string()))?;
        let egress = way_out::config(key.nets(), node.mtu(), outside.seed());
        let seed = egress.random_seed;
        let mut path = Datapath::new(node, Egress::new(egress, now));
        if setup.workers > 1 {
            let owners = owners.get_or_insert_with(|| Arc::new(Owners::new(seed)));
            path.share(owners.clone(), number);
        }
        workers.push(Worker::new(path, WayOut::new(outside.seed(), now)));
    }
    Ok(workers)
}

fn node_config(
    plan: &TunnelPlan,
    key: SubnetKey,
    disk: &Disk,
    setup: &Setup,
    random: &mut Random,
) -> NodeConfig {
    NodeConfig {
        subnet: key.nets(),
        gateway_mac: disk.gateway_mac.get(),
        tunnel: plan.tunnel,
        mtu: plan.mtu,
        mtu_v6: plan.mtu_v6().unwrap_or(plan.mtu),
        clamp_mss: true,
        guard: Policy {
            peers: setup.guards_peers,
        },
        limits: LIMITS,
        random_seed: random.number(),
    }
}

fn misfit(fault: TunnelFault) -> Violation {
    Violation(fault.to_string())
}
