//! A machine: its address, what it keeps on disk, and the node's process while that runs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::iter;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::vxlan::VtepMac;
use smoltcp::time::Instant;
use smoltcp::wire::EthernetAddress;

use super::agent::Agent;
use super::device::{Device, Sent};
use super::due::{Due, Timer, Who};
use super::sharing::NameAgent;
use super::worker::Worker;
use crate::control::ipam::{Memory, PodName};
use crate::control::lease::{NetworkConfig, SubnetKey};
use crate::control::plane::ControlPlane;
use crate::control::pods::Pods;
use crate::datapath::node::Node;
use crate::datapath::port::PortId;

/// A machine.
pub(super) struct Machine {
    pub(super) public_ip: Ipv4Addr,
    /// Its public IPv6 address, if it has one.
    pub(super) public_ipv6: Option<Ipv6Addr>,
    /// MTU of its interface.
    pub(super) mtu: Mtu,
    pub(super) disk: Option<Disk>,
    /// Whether that is a copy of another machine's.
    pub(super) is_copy: bool,
    /// Whether a node is to run here.
    pub(super) is_wanted: bool,
    /// The devices that are to be attached, and the number of their kind.
    pub(super) pods: BTreeMap<PodName, usize>,
    pub(super) process: Option<Process>,
    /// Processes that were started here.
    pub(super) starts: u64,
    /// Network cards that it had before.
    pub(super) cards: u8,
    /// It stands still.
    pub(super) frozen: Option<Frozen>,
    /// When it last woke after it had stood still for long.
    pub(super) slept: Option<Instant>,
}

/// What outlives a process: the state directory.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) vtep_mac: VtepMac,
    pub(super) gateway_mac: VtepMac,
    pub(super) lease: Option<SubnetKey>,
    pub(super) addresses: Option<Memory>,
}

/// A node's process.
pub(super) struct Process {
    pub(super) number: u64,
    pub(super) agent: Agent,
    /// The network's configuration once that is known.
    pub(super) config: Option<NetworkConfig>,
    pub(super) control: ControlPlane,
    pub(super) running: Option<LeasedNode>,
}

/// A node that has its lease.
pub(super) struct LeasedNode {
    pub(super) key: SubnetKey,
    pub(super) config: NetworkConfig,
    pub(super) gateway_mac: EthernetAddress,
    pub(super) pods: Pods<()>,
    pub(super) names: NameAgent,
    /// Its workers: each has the whole node, and flows of its own.
    pub(super) workers: Vec<Worker>,
    pub(super) ports: BTreeMap<PortId, Plugged>,
    /// Pods of the process before that are not attached again yet.
    pub(super) unplugged: BTreeSet<PodName>,
    /// The addresses of all pods of the processes before that were not attached again, and until when
    /// nobody may be told that they are not there.
    pub(super) awaited: (BTreeSet<IpAddr>, Instant),
    /// MAC addresses of pods that are no longer attached; a frame of theirs may be on its way.
    pub(super) gone: BTreeSet<EthernetAddress>,
}

/// A device behind a port.
pub(super) struct Plugged {
    pub(super) name: PodName,
    /// Whether it does all that pods do.
    pub(super) answers: bool,
    pub(super) mac: EthernetAddress,
    pub(super) address: Ipv4Addr,
    /// Its IPv6 address, if its node has an IPv6 subnet.
    pub(super) address_v6: Option<Ipv6Addr>,
    /// What the device's pings say of who sent them.
    pub(super) sender: u64,
    pub(super) device: Box<dyn Device>,
    pub(super) timer: Timer,
    /// Frames that the node has not taken yet, by the worker that will.
    pub(super) waiting: Vec<VecDeque<Sent>>,
    /// Turns since it took the last one of them.
    pub(super) idle_turns: u32,
}

/// A machine stands still.
#[derive(Debug)]
pub(super) struct Frozen {
    pub(super) since: Instant,
    /// What is due when it wakes.
    pub(super) held: Vec<Due>,
    /// How many of that are packets.
    pub(super) packets: usize,
}

impl Machine {
    pub(super) fn process(&mut self, who: Who) -> Option<&mut Process> {
        self.process
            .as_mut()
            .filter(|process| process.number == who.process)
    }

    pub(super) fn running(&mut self, who: Who) -> Option<&mut LeasedNode> {
        self.process(who)?.running.as_mut()
    }

    /// Whether the interface has room for IPv6, which it need not have kept.
    pub(super) fn carries_ipv6(&self) -> bool {
        let plan = self.process.as_ref().and_then(|it| it.control.plan());
        plan.is_some_and(|plan| plan.mtu_v6().is_some())
    }

    /// Its subnets, each with the address by which others reach it.
    pub(super) fn places(&self) -> Vec<(IpNet, IpAddr)> {
        let process = self.process.as_ref();
        let running = process.and_then(|process| process.running.as_ref());
        let Some(key) = running.map(|running| running.key) else {
            return Vec::new();
        };
        let ipv6 = self.public_ipv6.filter(|_| self.carries_ipv6());
        let ipv4 = key.ipv4().map(|net| (net.into(), self.public_ip.into()));
        let ipv6 = key
            .ipv6()
            .zip(ipv6)
            .map(|(net, host)| (net.into(), host.into()));
        ipv4.into_iter().chain(ipv6).collect()
    }

    /// The IPv6 address of one of its pods, if the interface has room for IPv6.
    pub(super) fn pod_v6(&self, is_it: impl Fn(PortId, &Plugged) -> bool) -> Option<Ipv6Addr> {
        let process = self.process.as_ref().filter(|_| self.carries_ipv6())?;
        let mut ports = process.running.as_ref()?.ports.iter();
        let (_, plugged) = ports.find(|(port, plugged)| is_it(**port, plugged))?;
        plugged.address_v6
    }
}

impl Plugged {
    /// The device's addresses.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let ipv6 = self.address_v6.map(IpAddr::V6);
        iter::once(IpAddr::V4(self.address)).chain(ipv6)
    }
}

impl LeasedNode {
    /// Its IPv4 subnet, which all nodes with a data path have.
    pub(super) fn ipv4(&self) -> Ipv4Net {
        self.key.ipv4().unwrap_or_default()
    }

    /// The node, as the first worker has it: what the control plane says all of them have.
    pub(super) fn node(&self) -> &Node {
        self.workers[0].path.node()
    }

    /// Does something to the node of every worker.
    pub(super) fn each_node(&mut self, mut change: impl FnMut(&mut Node)) {
        for worker in &mut self.workers {
            change(worker.path.node_mut());
        }
    }

    /// Has others told of this node's pods.
    pub(super) fn name_pods(&mut self, now: Instant) {
        self.names.sharer.set_pods(now, self.pods.records());
    }
}
