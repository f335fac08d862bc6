//! Who is asked on the way to what is pinged.

use std::net::IpAddr;
use std::path::Path;

use muslin_stack::addresses::Nets;
use muslin_stack::api::control::{Peer, Status, Table};
use muslin_stack::api::trace::{Beginning, Protocol, Question, Summary, Version};
use muslin_stack::datapath::gateway;

use crate::control::Client;
use crate::error::{Error, Result};

/// Somebody on the way who answers pings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hop {
    /// What people call it.
    pub(super) name: String,
    /// Its address.
    pub(super) address: IpAddr,
}

/// The way from a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    /// The node that it begins at.
    pub(super) node: String,
    /// The address of the pod that it begins at.
    pub(super) source: IpAddr,
    /// What that node's pods may send, in bytes.
    pub(super) mtu: u16,
    /// What of a pod's lets no longer ones pass.
    pub(super) limits: &'static str,
    /// The gateways on it, and at last what is pinged.
    pub(super) hops: Vec<Hop>,
}

/// The way from a pod of a node to `target`: the node's own data path is asked where that is.
///
/// # Errors
/// If nothing is called so, or it is not in the pod network.
pub(super) async fn find(
    socket: &Path,
    from: &str,
    target: &str,
    version: Option<Version>,
) -> Result<Way> {
    let client = Client::connect(socket).await?;
    let beginning = Beginning {
        from: from.to_owned(),
        to: target.to_owned(),
        protocol: Protocol::Icmp,
        source_port: 1,
        destination_port: 0,
        size: 0,
        ttl: 64,
        dont_fragment: false,
        version,
        has_mark: false,
    };
    let part = client.trace(Question::Beginning(beginning)).await?;
    let mut status = client.report::<Status>(Table::Status).await?;
    let status = status.pop();
    let status = status.ok_or_else(|| Error::failed("the node sent no status"))?;
    let peers = client.report::<Peer>(Table::Peers).await?;
    let Summary {
        source,
        destination,
        ..
    } = part.packet;
    let route_mtu = status
        .mtu_v6
        .filter(|mtu| source.is_ipv6() && *mtu < status.mtu);
    Ok(Way {
        node: status.node.clone(),
        source,
        mtu: route_mtu.unwrap_or(status.mtu),
        limits: match route_mtu {
            Some(_) => "default route",
            None => "interface",
        },
        hops: hops(&status, &peers, target, destination)?,
    })
}

fn hops(status: &Status, peers: &[Peer], target: &str, address: IpAddr) -> Result<Vec<Hop>> {
    if !holds(&status.network, address) {
        return Err(Error::usage(format!(
            "{target} is not in the pod network {}: 'muslin run -- ping {target}' asks outside",
            status.network
        )));
    }
    let mut hops = Vec::new();
    // The switch brings packets to pods of the same node, and no gateway.
    let own = match address {
        IpAddr::V4(_) => status.gateway.ipv4().map(IpAddr::V4),
        IpAddr::V6(_) => status.gateway.ipv6().map(IpAddr::V6),
    };
    if let Some(gateway) = own
        && !holds(&status.subnet, address)
    {
        hops.push(Hop {
            name: format!("gateway of {}", status.node),
            address: gateway,
        });
    }
    if let Some(peer) = peers.iter().find(|peer| holds(&peer.subnet, address)) {
        hops.extend(gateway_of(peer, address));
    }
    // What is pinged may be one of them.
    hops.retain(|hop| hop.address != address);
    hops.push(Hop {
        name: target.to_owned(),
        address,
    });
    Ok(hops)
}

fn holds(nets: &Nets, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(it) => nets.ipv4().is_some_and(|net| net.contains(&it)),
        IpAddr::V6(it) => nets.ipv6().is_some_and(|net| net.contains(&it)),
    }
}

/// Where a peer itself answers in the IP version of an address: muslin at its gateway, flannel's kernel at
/// least at its base address.
fn gateway_of(peer: &Peer, address: IpAddr) -> Option<Hop> {
    let [base, gateway] = match address {
        IpAddr::V4(_) => {
            let subnet = peer.subnet.ipv4()?;
            [subnet.network().into(), gateway::address(subnet).into()]
        }
        IpAddr::V6(_) => {
            let subnet = peer.subnet.ipv6()?;
            [subnet.network().into(), gateway::address_v6(subnet).into()]
        }
    };
    Some(match &peer.node {
        Some(node) => Hop {
            name: format!("gateway of {node}"),
            address: gateway,
        },
        None => Hop {
            name: format!("node at {}", peer.public_ip),
            address: base,
        },
    })
}
