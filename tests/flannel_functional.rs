//! Flannel's own functional tests against a real etcd, with our nodes in place of its daemons.
//!
//! The numbers are those of flannel's `functional/etcd_test.go`. Its
//! daemons are asked for a file with their subnet within 30 s, ours answer a status request; its
//! addresses are on a dummy interface, ours in pods.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::net::Ipv4Addr;
use std::time::Duration;

use muslin::agent::Agent;
use muslin_lab::etcd::{Etcd, PREFIX};
use muslin_lab::{Lab, Node, NodeConfig, traffic};

/// How long nodes may take to be ready, as flannel's.
const READY: Duration = Duration::from_secs(30);
/// MTU of the underlay in bytes.
const UNDERLAY: u16 = 1500;

/// A network as its administrator describes it.
struct Network {
    prefix: &'static str,
    config: &'static str,
    backend: &'static str,
    mtu: u16,
}

const VXLAN: Network = Network {
    prefix: PREFIX,
    config: r#"{ "Network": "10.10.0.0/16", "Backend": {"Type": "vxlan"}}"#,
    backend: "vxlan",
    mtu: UNDERLAY - 50,
};

const UDP: Network = Network {
    prefix: PREFIX,
    config: r#"{ "Network": "10.10.0.0/16", "Backend": {"Type": "udp"}}"#,
    backend: "udp",
    mtu: UNDERLAY - 28,
};

const HOST_GW: Network = Network {
    prefix: PREFIX,
    config: r#"{ "Network": "10.10.0.0/16", "Backend": {"Type": "host-gw"}}"#,
    backend: "host-gw",
    mtu: UNDERLAY,
};

const IPIP: Network = Network {
    prefix: PREFIX,
    config: r#"{ "Network": "10.10.0.0/16", "Backend": {"Type": "ipip"}}"#,
    backend: "ipip",
    mtu: UNDERLAY - 20,
};

/// Networks that share hosts and etcd: by backend, and by port where that is the same.
const SHARED: [Network; 3] = [
    Network {
        prefix: "/vxlan/network",
        config: r#"{ "Network": "10.11.0.0/16", "Backend": {"Type": "vxlan"}}"#,
        ..VXLAN
    },
    Network {
        prefix: "/udp/network",
        config: r#"{ "Network": "10.12.0.0/16", "Backend": {"Type": "udp"}}"#,
        ..UDP
    },
    Network {
        prefix: "/other/network",
        config: r#"{ "Network": "10.13.0.0/16", "Backend": {"Type": "vxlan", "Port": 8473}}"#,
        ..VXLAN
    },
];

/// The nodes of one network, one a host, with a pod each.
struct Members {
    nodes: Vec<Node>,
    pods: Vec<Agent>,
}

impl Members {
    /// Starts all at once and waits until they are ready.
    fn start(
        network: &Network,
        configs: impl Fn(u8) -> NodeConfig,
        hosts: &[muslin_lab::Host],
    ) -> Self {
        let mut nodes: Vec<_> = (1..)
            .zip(hosts)
            .map(|(number, host)| configs(number).spawn(host))
            .collect();
        for node in &mut nodes {
            node.wait_ready(READY);
            assert_eq!(node.status("backend"), network.backend);
            assert_eq!(node.mtu(), network.mtu);
        }
        for node in &nodes {
            node.wait_peers(1);
        }
        let pods = nodes.iter().map(|node| node.pod("pod")).collect();
        Self { nodes, pods }
    }

    fn addresses(&mut self) -> Vec<Ipv4Addr> {
        let pods = self.pods.iter_mut();
        pods.map(|pod| pod.address("eth0").unwrap()).collect()
    }

    /// Three pings from A's address to B's, and three back; and to what flannel calls the subnet's
    /// address, which here is the gateway.
    fn ping(&mut self) {
        let addresses = self.addresses();
        for (from, to) in [(0, 1), (1, 0)] {
            traffic::ping(&mut self.pods[from], addresses[to]);
            traffic::ping(&mut self.pods[from], self.nodes[to].address(1));
        }
    }
}

fn hosts(lab: &Lab) -> [muslin_lab::Host; 2] {
    [1, 2].map(|number| lab.host(&format!("h{number}"), address(number)))
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, number)
}

fn check(network: &Network) {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    etcd.configure(network.prefix, network.config);
    let config = |number: u8| {
        NodeConfig::new(&format!("n{number}"), address(number), &etcd.store())
            .with("--mtu", UNDERLAY)
    };
    let mut members = Members::start(network, config, &hosts(&lab));
    members.ping();
    for node in &members.nodes {
        assert_eq!(node.status("network"), "10.10.0.0/16");
        assert_eq!(node.losses(), Default::default());
    }
    // The configuration is the administrator's.
    let stored = etcd.get(&format!("{}/config", network.prefix)).unwrap();
    assert_eq!((stored.value.as_str(), stored.version), (network.config, 1));
    assert_eq!(etcd.leases(network.prefix).len(), 2);
}

#[test]
fn f1_vxlan() {
    check(&VXLAN);
}

#[test]
fn f2_udp() {
    check(&UDP);
}

#[test]
fn f3_host_gw() {
    check(&HOST_GW);
}

#[test]
fn f4_ipip() {
    check(&IPIP);
}

#[test]
fn f8_several_networks_on_the_same_hosts() {
    let Some(lab) = Lab::new() else { return };
    let Some(etcd) = Etcd::start(&lab) else {
        return;
    };
    let hosts = hosts(&lab);
    let mut networks = SHARED.each_ref().map(|network| {
        etcd.configure(network.prefix, network.config);
        let config = |number: u8| {
            NodeConfig::new(&format!("n{number}"), address(number), &etcd.store())
                .with("--etcd-prefix", network.prefix)
                .with("--egress", "off")
                .with("--mtu", UNDERLAY)
        };
        Members::start(network, config, &hosts)
    });
    let addresses = networks.each_mut().map(Members::addresses);
    for (index, network) in networks.iter_mut().enumerate() {
        network.ping();
        let others = addresses.iter().enumerate();
        for (_, others) in others.filter(|(other, _)| *other != index) {
            for (pod, to) in network.pods.iter_mut().zip(others) {
                traffic::unreachable(pod, *to);
            }
        }
    }
    for network in SHARED {
        let leases = etcd.leases(network.prefix);
        assert_eq!(leases.len(), 2, "{leases:?}");
    }
    assert_eq!(etcd.list(PREFIX).0, []);
}
