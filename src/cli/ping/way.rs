//! Who is asked on the way to what is pinged.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use muslin_stack::addresses::{Nets, ipv4};
use muslin_stack::api::control::{Peer, Status, Table};
use muslin_stack::api::trace::{Beginning, Protocol, Question, Summary};

use crate::control::Client;
use crate::error::{Error, Result};

/// Somebody on the way who answers pings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hop {
    /// What people call it.
    pub(super) name: String,
    /// Its address.
    pub(super) address: Ipv4Addr,
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
    /// The gateways on it, and at last what is pinged.
    pub(super) hops: Vec<Hop>,
}

/// The way from a pod of a node to `target`: the node's own data path is asked where that is.
///
/// # Errors
/// If nothing is called so, or it is not in the pod network.
pub(super) async fn find(socket: &Path, from: &str, target: &str) -> Result<Way> {
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
    Ok(Way {
        node: status.node.clone(),
        source,
        mtu: status.mtu,
        hops: hops(&status, &peers, target, destination)?,
    })
}

fn hops(status: &Status, peers: &[Peer], target: &str, address: IpAddr) -> Result<Vec<Hop>> {
    let network = status.network.ipv4();
    let address = ipv4(address);
    let address = address.filter(|it| network.is_some_and(|network| network.contains(it)));
    let address = address.ok_or_else(|| {
        Error::usage(format!(
            "{target} is not in the pod network {}: 'muslin run -- ping {target}' asks outside",
            status.network
        ))
    })?;
    let mut hops = Vec::new();
    let holds = |subnet: &Nets| subnet.ipv4().is_some_and(|it| it.contains(&address));
    // The switch brings packets to pods of the same node, and no gateway.
    if let Some(gateway) = status.gateway.ipv4()
        && !holds(&status.subnet)
    {
        hops.push(Hop {
            name: format!("gateway of {}", status.node),
            address: gateway,
        });
    }
    if let Some(peer) = peers.iter().find(|peer| holds(&peer.subnet)) {
        hops.extend(gateway(peer));
    }
    // What is pinged may be one of them.
    hops.retain(|hop| hop.address != address);
    hops.push(Hop {
        name: target.to_owned(),
        address,
    });
    Ok(hops)
}

/// Where a peer itself answers: muslin at its gateway, flannel's kernel at least at its base address.
fn gateway(peer: &Peer) -> Option<Hop> {
    let base = u32::from(peer.subnet.ipv4()?.network());
    Some(match &peer.node {
        Some(node) => Hop {
            name: format!("gateway of {node}"),
            address: Ipv4Addr::from(base.saturating_add(1)),
        },
        None => Hop {
            name: format!("node at {}", peer.public_ip),
            address: Ipv4Addr::from(base),
        },
    })
}
