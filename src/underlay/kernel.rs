//! What this machine's kernel has of the pod network by itself: addresses, routes and VXLAN
//! interfaces, as flannel, CNI plugins and Docker set them up. Pods behind them are not the node's.

use std::fmt;
use std::net::Ipv4Addr;

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use muslin_stack::control::lease::overlap;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::links::{self, Address, Interface};
use crate::error::{Context, Result};
use crate::netlink;

/// Where the steps between flannel and muslin are.
const GUIDE: &str = "docs/flannel-migration.md";

/// The kernel's addresses, routes and VXLAN interfaces in this network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelNetwork {
    interfaces: Vec<Interface>,
    /// Unicast routes but the default one, with the interface they lead to.
    routes: Vec<(Ipv4Net, Option<u32>)>,
}

/// Something of the kernel's that gets in a node's way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// What there is, and what follows.
    pub detail: String,
    /// What to do.
    pub advice: String,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.detail, self.advice)
    }
}

impl KernelNetwork {
    /// Reads them.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub async fn read() -> Result<Self> {
        let read = netlink::with(async |handle| Self::ask(handle).await).await?;
        read.context("cannot read this machine's interfaces and routes")
    }

    /// Reads them where nothing can be awaited.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn read_blocking() -> Result<Self> {
        let read = netlink::with_blocking(async |handle| Self::ask(handle).await)?;
        read.context("cannot read this machine's interfaces and routes")
    }

    /// Reads the interfaces alone.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub async fn read_interfaces() -> Result<Self> {
        let read = netlink::with(async |handle| links::interfaces(handle).await).await?;
        let interfaces = read.context("cannot read this machine's interfaces")?;
        Ok(Self {
            interfaces,
            routes: Vec::new(),
        })
    }

    /// The addresses of an interface.
    #[must_use]
    pub fn addresses_of(&self, name: &str) -> Vec<Ipv4Addr> {
        let interface = self.interfaces.iter().find(|it| it.name == name);
        let addresses = interface.into_iter().flat_map(|it| &it.addresses);
        addresses.map(|address| address.ip).collect()
    }

    async fn ask(handle: &Handle) -> std::result::Result<Self, rtnetlink::Error> {
        let interfaces = links::interfaces(handle).await?;
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let mut dump = handle.route().get(all).execute();
        let mut routes = Vec::new();
        while let Some(message) = dump.try_next().await? {
            routes.extend(route(&message));
        }
        Ok(Self { interfaces, routes })
    }

    /// This machine's addresses.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        let addresses = self.interfaces.iter().flat_map(|it| &it.addresses);
        addresses.map(|address| address.ip)
    }

    /// The same without an interface that is the node's own, and what is behind it.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        let own = self.interfaces.iter().find(|it| it.name == name);
        if let Some(index) = own.map(|own| own.index) {
            self.interfaces.retain(|it| it.index != index);
            self.routes.retain(|(_, to)| *to != Some(index));
        }
        self
    }

    /// The VXLAN interface that has a UDP port: at all addresses, whatever its own is.
    #[must_use]
    pub fn vxlan_on(&self, port: u16) -> Option<Conflict> {
        let mut interfaces = self.interfaces.iter();
        let vxlan = interfaces.find(|it| it.vxlan == Some(port) && it.is_up)?;
        let name = &vxlan.name;
        Some(Conflict {
            detail: format!("UDP port {port} is in use by {name}, a VXLAN interface of the kernel"),
            advice: format!(
                "if flanneld runs here, stop it; it leaves the interface, which 'sudo ip link del \
                 {name}' removes ({GUIDE})"
            ),
        })
    }

    /// Interfaces with addresses of a node's own subnet, but for those of its pods.
    #[must_use]
    pub fn in_own_subnet(&self, subnet: Ipv4Net, pods: &[Ipv4Addr]) -> Vec<Conflict> {
        let conflict = |(name, address): (&str, &Address)| Conflict {
            detail: format!(
                "{name} has {}/{}, of this node's own subnet {subnet}: pods behind it are cut \
                 off, since their packets arrive at the node, which does not know them",
                address.ip,
                address.prefix.prefix_len()
            ),
            advice: format!(
                "attach them to the node with 'muslin attach' or restart them, and remove the \
                 interface with 'sudo ip link del {name}' ({GUIDE})"
            ),
        };
        self.inside(subnet, pods).map(conflict).collect()
    }

    /// Routes that have addresses of the pod network in them, also wider ones, but for those of a
    /// node's own subnet.
    #[must_use]
    pub fn routes_overlapping(&self, network: Ipv4Net, subnet: Option<Ipv4Net>) -> Vec<Conflict> {
        self.conflicting(network, subnet, |route| overlap(route, network))
    }

    /// Routes into the pod network alone, but for those of a node's own subnet.
    #[must_use]
    pub fn routes_inside(&self, network: Ipv4Net, subnet: Ipv4Net) -> Vec<Conflict> {
        self.conflicting(network, Some(subnet), |route| network.contains(&route))
    }

    fn conflicting(
        &self,
        network: Ipv4Net,
        subnet: Option<Ipv4Net>,
        conflicts: impl Fn(Ipv4Net) -> bool,
    ) -> Vec<Conflict> {
        let is_own = |route: Ipv4Net| subnet.is_some_and(|subnet| subnet.contains(&route));
        let into = self.routes.iter().copied();
        let into = into.filter(|(route, _)| conflicts(*route) && !is_own(*route));
        let (by_vxlan, others): (Vec<_>, Vec<_>) =
            into.partition(|(_, interface)| self.vxlan_at(*interface).is_some());
        let mut conflicts = Vec::new();
        if let Some(name) = by_vxlan.iter().find_map(|(_, it)| self.vxlan_at(*it)) {
            conflicts.push(Conflict {
                detail: format!(
                    "this machine's kernel has routes into the pod network {network} by {name}: \
                     {}, so packets from outside pods bypass the node",
                    list(&by_vxlan)
                ),
                advice: format!(
                    "flannel leaves them; 'sudo ip link del {name}' removes them all ({GUIDE})"
                ),
            });
        }
        if !others.is_empty() {
            conflicts.push(Conflict {
                detail: format!(
                    "this machine's kernel has routes into the pod network {network}: {}",
                    list(&others)
                ),
                advice: format!(
                    "if flannel's host-gw or a CNI plugin left them, remove them ({GUIDE}); if \
                     something else uses these addresses here, pods will not reach it: choose another \
                     --network where that matters"
                ),
            });
        }
        conflicts
    }

    /// Interfaces with an address inside a subnet that may have pods behind them, as VXLAN interfaces
    /// do not.
    fn inside(&self, subnet: Ipv4Net, but: &[Ipv4Addr]) -> impl Iterator<Item = (&str, &Address)> {
        let bridges = self.interfaces.iter().filter(|it| it.vxlan.is_none());
        let all = bridges.flat_map(|interface| {
            let addresses = interface.addresses.iter();
            addresses.map(|address| (interface.name.as_str(), address))
        });
        let but = but.to_vec();
        all.filter(move |(_, address)| subnet.contains(&address.ip) && !but.contains(&address.ip))
    }

    fn vxlan_at(&self, index: Option<u32>) -> Option<&str> {
        let interface = self.interfaces.iter().find(|it| Some(it.index) == index)?;
        interface.vxlan.map(|_| interface.name.as_str())
    }
}

/// Routes for people, but not thousands of them.
fn list(routes: &[(Ipv4Net, Option<u32>)]) -> String {
    const SHOWN: usize = 4;
    let shown = routes.iter().take(SHOWN);
    let mut text: Vec<_> = shown.map(|(route, _)| route.to_string()).collect();
    if routes.len() > SHOWN {
        text.push(format!("{} more", routes.len() - SHOWN));
    }
    text.join(", ")
}

fn route(message: &RouteMessage) -> Option<(Ipv4Net, Option<u32>)> {
    let len = message.header.destination_prefix_length;
    if message.header.kind != RouteType::Unicast || len == 0 {
        return None;
    }
    let attributes = || message.attributes.iter();
    let destination = attributes().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    })?;
    let interface = attributes().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    Some((Ipv4Net::new(destination, len).ok()?, interface))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn interface(index: u32, name: &str, vxlan: Option<u16>, addresses: &[&str]) -> Interface {
        Interface {
            index,
            name: name.to_owned(),
            vxlan,
            is_up: true,
            addresses: (addresses.iter().map(|text| Address::configured(net(text)))).collect(),
            ..Interface::default()
        }
    }

    /// A machine as flannel leaves it, in a LAN that covers the pod network.
    fn flannels() -> KernelNetwork {
        KernelNetwork {
            interfaces: vec![
                interface(1, "lo", None, &["127.0.0.1/8"]),
                interface(2, "eth0", None, &["10.9.0.1/8"]),
                interface(3, "flannel.1", Some(8472), &["10.244.1.0/32"]),
                interface(4, "cni0", None, &["10.244.1.1/24"]),
            ],
            routes: vec![
                (net("10.0.0.0/8"), Some(2)),
                (net("10.244.1.0/24"), Some(4)),
                (net("10.244.2.0/24"), Some(3)),
                (net("10.244.3.0/24"), Some(3)),
                (net("172.17.0.0/16"), None),
            ],
        }
    }

    #[test]
    fn a_vxlan_interface_is_found_by_its_port() {
        let conflict = flannels().vxlan_on(8472).unwrap();
        assert!(conflict.advice.contains("ip link del flannel.1"));
        assert_eq!(flannels().vxlan_on(8473), None);
        let mut down = flannels();
        down.interfaces[2].is_up = false;
        assert_eq!(down.vxlan_on(8472), None);
    }

    #[test]
    fn interfaces_in_the_own_subnet_are_named_but_for_pods() {
        let named = |subnet, pods: &[&str]| {
            let pods: Vec<_> = pods.iter().map(|text| text.parse().unwrap()).collect();
            let conflicts = flannels().in_own_subnet(net(subnet), &pods);
            let words = conflicts.into_iter().map(|it| {
                let name = it.detail.split(' ').next().unwrap().to_owned();
                assert!(it.advice.contains(&format!("ip link del {name}")), "{it}");
                name
            });
            words.collect::<Vec<_>>()
        };
        assert_eq!(named("10.244.1.0/24", &[]), ["cni0"]);
        assert_eq!(
            named("10.244.1.0/24", &["10.244.1.1"]),
            Vec::<String>::new()
        );
        assert_eq!(named("10.244.2.0/24", &[]), Vec::<String>::new());
    }

    #[test]
    fn routes_into_the_pod_network_are_told_from_those_of_the_own_subnet() {
        let network = net("10.244.0.0/16");
        let all = flannels().routes_overlapping(network, Some(net("10.244.1.0/24")));
        let [vxlan, lan] = all.as_slice() else {
            panic!("{all:?}");
        };
        assert!(vxlan.detail.contains("10.244.2.0/24, 10.244.3.0/24"));
        assert!(vxlan.advice.contains("ip link del flannel.1"));
        assert!(lan.detail.contains(": 10.0.0.0/8"), "{lan}");
        let without_node = flannels().routes_overlapping(network, None);
        assert!(without_node[1].detail.contains("10.0.0.0/8, 10.244.1.0/24"));
        assert_eq!(
            flannels().routes_overlapping(net("192.168.0.0/16"), None),
            []
        );
        let inside = flannels().routes_inside(network, net("10.244.1.0/24"));
        assert_eq!(inside, all[..1], "not those of the LAN");
    }

    #[test]
    fn many_routes_are_counted() {
        let routes = (0..9).map(|i| (Ipv4Net::new([10, i, 0, 0].into(), 16).unwrap(), None));
        let routes: Vec<_> = routes.collect();
        assert!(list(&routes).ends_with("10.3.0.0/16, 5 more"));
    }

    #[tokio::test]
    async fn both_ways_to_read_see_the_same() {
        let network = KernelNetwork::read().await.unwrap();
        assert_eq!(network, KernelNetwork::read_blocking().unwrap());
        assert!(network.interfaces.iter().any(|it| it.name == "lo"));
    }
}
