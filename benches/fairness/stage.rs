//! The scenes: two hosts with pods, one of which floods.

use std::fmt;
use std::net::Ipv4Addr;

use clap::ValueEnum;
use muslin_bench::floods::{Flood, Targets};
use muslin_bench::path::Path;
use muslin_bench::pods::{
    VXLAN_MTU, attached_pod, bridge, bridged_pod, flannel_vxlan, host_address, hosts, node,
};
use muslin_lab::{Host, Lab, Node};
use serde_json::{Map, Value, json};

/// Who carries the pods' packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum System {
    /// A bridge and a VXLAN device, set up as flannel does.
    Kernel,
    /// Two nodes with the VXLAN backend.
    Muslin,
}

/// A system with a flood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Scene {
    pub(crate) flood: Flood,
    pub(crate) system: System,
}

impl System {
    pub(crate) const fn under(self, flood: Flood) -> Scene {
        Scene {
            flood,
            system: self,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Muslin => "muslin",
        }
    }
}

impl Scene {
    /// All; the kernel's bridge has no way to outside of its own.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let floods = Flood::value_variants().iter();
        floods.flat_map(|flood| {
            let kernel = flood.is_inside().then_some(System::Kernel.under(*flood));
            kernel.into_iter().chain([System::Muslin.under(*flood)])
        })
    }
}

impl fmt::Display for Scene {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.flood.name(), self.system.name())
    }
}

impl Path for Scene {
    fn group(self) -> usize {
        self.flood as usize
    }

    /// The kernel is grey, muslin is not.
    fn colour(self) -> &'static str {
        match self.system {
            System::Kernel => "#9aa5b1",
            System::Muslin => "#2f7ed8",
        }
    }

    fn labels(self) -> Map<String, Value> {
        let system = ("system".to_owned(), json!(self.system.name()));
        [system, ("flood".to_owned(), json!(self.flood.name()))]
            .into_iter()
            .collect()
    }
}

/// Four pods, three of them on one host.
pub(crate) struct Stage {
    pub(crate) flooder: Host,
    pub(crate) victim: Host,
    /// On the victim's host, and on the other.
    pub(crate) here: Host,
    pub(crate) there: Host,
    pub(crate) targets: Targets,
    _hosts: Vec<Host>,
    _nodes: Vec<Node>,
    _lab: Lab,
}

impl Stage {
    /// Sets it up; `None` where this machine has no labs.
    pub(crate) fn new(system: System) -> Option<Self> {
        let lab = Lab::without_limit()?;
        Some(match system {
            System::Kernel => Self::kernel(lab),
            System::Muslin => Self::muslin(lab),
        })
    }

    fn kernel(lab: Lab) -> Self {
        let hosts = hosts(&lab);
        for (host, number) in hosts.iter().zip([1, 2]) {
            bridge(host, number, VXLAN_MTU);
            host.sh(&flannel_vxlan(number));
        }
        let pod = |number: u8, last| {
            let host = &hosts[usize::from(number) - 1];
            bridged_pod(&lab, host, (number, last), VXLAN_MTU)
        };
        let address = |number, last| Ipv4Addr::new(10, 244, number, last);
        Self {
            flooder: pod(1, 2),
            victim: pod(1, 3),
            here: pod(1, 4),
            there: pod(2, 2),
            targets: Targets {
                own: address(1, 2),
                gateway: address(1, 1),
                here: address(1, 4),
                there: address(2, 2),
                outside: host_address(2),
            },
            _hosts: hosts,
            _nodes: Vec::new(),
            _lab: lab,
        }
    }

    fn muslin(lab: Lab) -> Self {
        let hosts = hosts(&lab);
        let nodes: Vec<_> = hosts
            .iter()
            .zip([1, 2])
            .map(|(host, number)| node(&lab, host, number, "vxlan"))
            .collect();
        for node in &nodes {
            node.wait_peers(1);
        }
        let (flooder, own) = attached_pod(&lab, &nodes[0], "flooder");
        let (victim, _) = attached_pod(&lab, &nodes[0], "victim");
        let (here, here_at) = attached_pod(&lab, &nodes[0], "here");
        let (there, there_at) = attached_pod(&lab, &nodes[1], "there");
        let [a, b, c, _] = own.octets();
        Self {
            flooder,
            victim,
            here,
            there,
            targets: Targets {
                own,
                gateway: Ipv4Addr::new(a, b, c, 1),
                here: here_at,
                there: there_at,
                outside: host_address(2),
            },
            _hosts: hosts,
            _nodes: nodes,
            _lab: lab,
        }
    }
}
