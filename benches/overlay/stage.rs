//! The paths that are measured: two pods, and what is between them.

use std::fmt;
use std::net::Ipv4Addr;

use clap::ValueEnum;
use muslin_bench::flannel_udp;
use muslin_bench::machine::resident_bytes;
use muslin_bench::path::Path;
use muslin_bench::pods::{
    self, UNDERLAY, VXLAN_MTU, attached_pod, bridge, bridged_pod, flannel_vxlan, host_address,
    hosts, node,
};
use muslin_bench::window::{Ends, Process};
use muslin_lab::{Host, Lab, Node, Offload, SOON, poll_until};
use serde_json::{Map, Value, json};

/// MTU of the underlay, and of pods without encapsulation.
const ETHERNET_MTU: u16 = 1500;

/// The share of packets that a lossy wire loses.
const LOSS: f64 = 0.005;

/// What carries packets from pod to pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Route {
    /// The kernel's VXLAN device, set up as flannel does.
    KernelVxlan,
    /// Two nodes with the VXLAN backend.
    MuslinVxlan,
    /// The same, with metrics and pages that are read all the time.
    MuslinVxlanWatched,
    /// Two nodes with the UDP backend.
    MuslinUdp,
    /// A process that moves packets one by one, as the proxy of flannel's UDP backend does.
    FlannelUdp,
    /// Hosts that route to each other, set up as flannel's host-gw does.
    KernelHostGw,
    /// Two nodes with the host-gw backend.
    MuslinHostGw,
    /// Pods on one Linux bridge.
    KernelBridge,
    /// Pods of one node.
    MuslinNode,
    /// The host itself to a pod of another host, by the kernel's VXLAN device.
    KernelHost,
    /// The same by a node's host interface, with the VXLAN backend.
    MuslinHost,
    /// No path: an idle node with pods.
    Memory,
}

/// What is between two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Underlay {
    /// A veth pair as it is, which hands over superpackets whole.
    Veth,
    /// One between network cards: the sender's kernel makes superpackets, which are cut before they
    /// cross, and the receiver's merges what arrives.
    Card,
    /// One that carries no packet above its MTU, and whose ends neither make nor merge any.
    DumbWire,
    /// The same, which loses one packet of 200 in each direction, at random.
    Lossy,
}

/// A path on an underlay, where it crosses one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Case {
    pub(crate) route: Route,
    pub(crate) underlay: Option<Underlay>,
}

impl Route {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::KernelVxlan => "kernel-vxlan",
            Self::MuslinVxlan => "muslin-vxlan",
            Self::MuslinVxlanWatched => "muslin-vxlan-watched",
            Self::MuslinUdp => "muslin-udp",
            Self::FlannelUdp => "flannel-udp (its proxy's way)",
            Self::KernelHostGw => "kernel-host-gw",
            Self::MuslinHostGw => "muslin-host-gw",
            Self::KernelBridge => "kernel-bridge",
            Self::MuslinNode => "muslin-node",
            Self::KernelHost => "kernel-host",
            Self::MuslinHost => "muslin-host",
            Self::Memory => "memory",
        }
    }

    /// Whether it is measured only if it is asked for.
    pub(crate) fn is_special(self) -> bool {
        self == Self::MuslinVxlanWatched
    }

    pub(crate) fn on(self, underlay: Underlay) -> Case {
        Case {
            route: self,
            underlay: Some(underlay),
        }
    }

    pub(crate) fn alone(self) -> Case {
        Case {
            route: self,
            underlay: None,
        }
    }
}

impl Underlay {
    pub(crate) const ALL: [Self; 4] = [Self::Veth, Self::Card, Self::DumbWire, Self::Lossy];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::Card => "card",
            Self::DumbWire => "dumb wire",
            Self::Lossy => "lossy wire",
        }
    }

    /// Whether it is measured only if it is asked for.
    pub(crate) fn is_special(self) -> bool {
        self == Self::Lossy
    }

    /// Whether frames above the MTU go from the sender's kernel to its device.
    pub(crate) fn lets_giants_leave(self) -> bool {
        self == Self::Veth
    }

    /// Whether the receiver's kernel gets frames above the MTU.
    pub(crate) fn has_giants_arrive(self) -> bool {
        matches!(self, Self::Veth | Self::Card)
    }

    /// Makes it of a host's end of a veth pair.
    fn make(self, host: &Host) {
        match self {
            Self::Veth => {}
            Self::Card => {
                // The kernel cuts in software, after its queues and before the device.
                host.without(UNDERLAY, Offload::Segmentation);
                host.without(UNDERLAY, Offload::TrainSegmentation);
                host.with(UNDERLAY, Offload::Merging);
                // Without a queue a veth pair drops what its receiver has no room for.
                host.sh(&format!("tc qdisc replace dev {UNDERLAY} root pfifo_fast"));
            }
            Self::DumbWire => {
                host.segments(UNDERLAY);
                // Superpackets of packet sockets do not say of how many segments they are.
                host.without(UNDERLAY, Offload::Segmentation);
                host.without(UNDERLAY, Offload::Merging);
            }
            Self::Lossy => {
                Self::DumbWire.make(host);
                host.sh(&format!(
                    "iptables --append INPUT --in-interface {UNDERLAY} --match statistic \
                     --mode random --probability {LOSS} --jump DROP"
                ));
            }
        }
    }
}

impl Case {
    pub(crate) fn all() -> Vec<Self> {
        let tunnels = [
            Route::KernelVxlan,
            Route::MuslinVxlan,
            Route::MuslinUdp,
            Route::KernelHostGw,
            Route::MuslinHostGw,
        ];
        let mut cases = Vec::new();
        for underlay in Underlay::ALL {
            cases.extend(tunnels.map(|route| route.on(underlay)));
        }
        let on_veth = [
            Route::MuslinVxlanWatched,
            Route::FlannelUdp,
            Route::KernelHost,
            Route::MuslinHost,
        ];
        cases.extend(on_veth.map(|route| route.on(Underlay::Veth)));
        let others = [Route::KernelBridge, Route::MuslinNode, Route::Memory];
        cases.extend(others.map(Route::alone));
        cases
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.underlay {
            Some(underlay) => write!(f, "{}, {}", self.route.name(), underlay.name()),
            None => write!(f, "{}", self.route.name()),
        }
    }
}

impl Path for Case {
    fn group(self) -> usize {
        match self.underlay {
            Some(underlay) => underlay as usize,
            None => Underlay::ALL.len(),
        }
    }

    /// The kernel is grey, muslin is not.
    fn colour(self) -> &'static str {
        match self.route {
            Route::KernelVxlan | Route::KernelHostGw | Route::KernelBridge | Route::KernelHost => {
                "#9aa5b1"
            }
            Route::FlannelUdp => "#937860",
            Route::MuslinVxlan => "#2f7ed8",
            Route::MuslinVxlanWatched => "#0b4f9c",
            Route::MuslinUdp => "#55a868",
            Route::MuslinHostGw => "#c44e52",
            Route::MuslinNode => "#8172b3",
            Route::MuslinHost => "#64b5cd",
            Route::Memory => "#dd8452",
        }
    }

    fn labels(self) -> Map<String, Value> {
        let underlay = self.underlay.map(Underlay::name);
        let path = ("path".to_owned(), json!(self.route.name()));
        [path, ("underlay".to_owned(), json!(underlay))]
            .into_iter()
            .collect()
    }

    fn is_path(self) -> bool {
        self.route != Route::Memory
    }
}

/// Two pods that reach each other.
pub(crate) struct Stage {
    /// Ends of the underlay, where there is one.
    pub(crate) hosts: Vec<Host>,
    pub(crate) ends: Ends,
    nodes: Vec<Node>,
    /// Of hosts that have flannel's UDP backend, or of nodes that are watched.
    beside: Vec<Process>,
    _lab: Lab,
}

impl Stage {
    /// Sets it up; `None` where this machine has no labs.
    pub(crate) fn new(case: Case) -> Option<Self> {
        let lab = Lab::without_limit()?;
        Some(match case.route {
            Route::KernelVxlan => Self::kernel_vxlan(lab, case.underlay),
            Route::MuslinVxlan => Self::muslin(lab, case.underlay, "vxlan"),
            Route::MuslinVxlanWatched => Self::watched(lab, case.underlay),
            Route::MuslinUdp => Self::muslin(lab, case.underlay, "udp"),
            Route::FlannelUdp => Self::flannel_udp(lab, case.underlay),
            Route::KernelHostGw => Self::kernel_host_gw(lab, case.underlay),
            Route::MuslinHostGw => Self::muslin(lab, case.underlay, "host-gw"),
            Route::KernelBridge => Self::kernel_bridge(lab),
            Route::KernelHost => Self::kernel_vxlan(lab, case.underlay).seen_from_host(),
            Route::MuslinHost => {
                let stage = Self::muslin(lab, case.underlay, "vxlan");
                make_interface(&stage.nodes[0]);
                stage.seen_from_host()
            }
            Route::MuslinNode | Route::Memory => Self::muslin_node(lab),
        })
    }

    fn kernel_vxlan(lab: Lab, underlay: Option<Underlay>) -> Self {
        Self::kernel(lab, underlay, VXLAN_MTU, |host, number| {
            host.sh(&flannel_vxlan(number));
        })
    }

    fn flannel_udp(lab: Lab, underlay: Option<Underlay>) -> Self {
        let mut proxies = Vec::new();
        let mut stage = Self::kernel(lab, underlay, flannel_udp::MTU, |host, number| {
            proxies.push(pods::flannel_udp(host, number));
        });
        stage.beside = proxies;
        stage
    }

    /// The same with the first host as the source.
    fn seen_from_host(mut self) -> Self {
        self.ends.source = self.hosts[0].clone();
        self
    }

    fn kernel_host_gw(lab: Lab, underlay: Option<Underlay>) -> Self {
        Self::kernel(lab, underlay, ETHERNET_MTU, |host, number| {
            let peer = 3 - number;
            let next = host_address(peer);
            host.sh(&format!(
                "ip route replace 10.244.{peer}.0/24 via {next} dev {UNDERLAY}"
            ));
        })
    }

    /// Two hosts whose kernels forward, and something that shows each the way to the other.
    fn kernel(
        lab: Lab,
        underlay: Option<Underlay>,
        mtu: u16,
        mut connect: impl FnMut(&Host, u8),
    ) -> Self {
        let hosts = wired_hosts(&lab, underlay);
        let mut pods = Vec::new();
        for (host, number) in hosts.iter().zip([1_u8, 2]) {
            bridge(host, number, mtu);
            pods.push(bridged_pod(&lab, host, (number, 2), mtu));
            connect(host, number);
        }
        let [source, sink] = pods.try_into().ok().unwrap();
        Self {
            hosts,
            ends: Ends {
                source,
                sink,
                address: Ipv4Addr::new(10, 244, 2, 2),
            },
            nodes: Vec::new(),
            beside: Vec::new(),
            _lab: lab,
        }
    }

    fn muslin(lab: Lab, underlay: Option<Underlay>, backend: &str) -> Self {
        let hosts = wired_hosts(&lab, underlay);
        let nodes = hosts.iter().zip([1, 2]);
        let nodes = nodes.map(|(host, number)| node(&lab, host, number, backend));
        let nodes = nodes.collect();
        Self::with_pods(lab, hosts, nodes)
    }

    fn watched(lab: Lab, underlay: Option<Underlay>) -> Self {
        let hosts = wired_hosts(&lab, underlay);
        let nodes = hosts.iter().zip([1, 2]);
        let nodes = nodes.map(|(host, number)| pods::watched_node(&lab, host, number, "vxlan"));
        let (nodes, readers): (Vec<_>, Vec<_>) = nodes.unzip();
        let mut stage = Self::with_pods(lab, hosts, nodes);
        stage.beside = readers.into_iter().flatten().collect();
        stage
    }

    /// Two nodes of two hosts, with a pod each.
    fn with_pods(lab: Lab, hosts: Vec<Host>, nodes: Vec<Node>) -> Self {
        for node in &nodes {
            node.wait_peers(1);
        }
        let source = attached_pod(&lab, &nodes[0], "source").0;
        let (sink, address) = attached_pod(&lab, &nodes[1], "sink");
        Self {
            hosts,
            ends: Ends {
                source,
                sink,
                address,
            },
            nodes,
            beside: Vec::new(),
            _lab: lab,
        }
    }

    fn kernel_bridge(lab: Lab) -> Self {
        let host = lab.namespace("host");
        bridge(&host, 1, VXLAN_MTU);
        Self {
            ends: Ends {
                source: bridged_pod(&lab, &host, (1, 2), VXLAN_MTU),
                sink: bridged_pod(&lab, &host, (1, 3), VXLAN_MTU),
                address: Ipv4Addr::new(10, 244, 1, 3),
            },
            hosts: vec![host],
            nodes: Vec::new(),
            beside: Vec::new(),
            _lab: lab,
        }
    }

    fn muslin_node(lab: Lab) -> Self {
        let host = lab.host("host", host_address(1));
        let node = node(&lab, &host, 1, "vxlan");
        let source = attached_pod(&lab, &node, "source").0;
        let (sink, address) = attached_pod(&lab, &node, "sink");
        Self {
            hosts: vec![host],
            ends: Ends {
                source,
                sink,
                address,
            },
            nodes: vec![node],
            beside: Vec::new(),
            _lab: lab,
        }
    }
}

impl Drop for Stage {
    /// Takes host interfaces away, so that nodes hold what they held at their start.
    fn drop(&mut self) {
        for node in &self.nodes {
            let _ = node.client(&["host-interface", "--remove"]).status();
        }
    }
}

/// Makes a node's host interface, and waits until the node has it open.
fn make_interface(node: &Node) {
    let made = node.client(&["host-interface"]).status();
    assert!(made.unwrap().success());
    poll_until(SOON, "the host interface", || {
        let interface = &node.query("status")["host_interface"];
        (!interface.is_null()).then_some(())
    });
}

/// A node that has so many pods and nothing to do.
pub(crate) struct IdleNode {
    node: Node,
    _pods: Vec<Host>,
    _lab: Lab,
}

impl IdleNode {
    /// Sets it up; `None` where this machine has no labs.
    pub(crate) fn new(pods: usize) -> Option<Self> {
        let lab = Lab::without_limit()?;
        let host = lab.host("host", host_address(1));
        let node = node(&lab, &host, 1, "vxlan");
        let names = (1..=pods).map(|number| format!("pod{number}"));
        Some(Self {
            _pods: names
                .map(|name| attached_pod(&lab, &node, &name).0)
                .collect(),
            node,
            _lab: lab,
        })
    }

    /// Its resident memory in megabytes.
    pub(crate) fn resident_megabytes(&self) -> f64 {
        let pid = self.node.query("status")["pid"].as_u64();
        resident_bytes(pid.unwrap() as u32) / 1e6
    }
}

/// Two hosts, and what a case has between them.
fn wired_hosts(lab: &Lab, underlay: Option<Underlay>) -> Vec<Host> {
    let hosts = hosts(lab);
    if let Some(underlay) = underlay {
        hosts.iter().for_each(|host| underlay.make(host));
    }
    hosts
}
