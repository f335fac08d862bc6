//! The underlay: the interface, and what carries packets between nodes: the tunnel's UDP sockets, and
//! the uplink for bare packets.

use std::net::Ipv6Addr;

use muslin_stack::addresses::Nets;

mod batch;
mod bpf;
mod interface;
mod ipv6;
mod kernel;
mod links;
mod messages;
mod queues;
mod self_test;
mod socket;
mod sockets;
mod udp;
pub mod uplink;

pub use batch::Received;
pub use interface::{
    Audience, InterfaceChoice, Ipv4End, Ipv6End, NoInterface, PublicInterface, forwards_ipv4,
};
pub use kernel::{Conflict, KernelNetwork};
pub use socket::Options;
pub use sockets::TunnelSockets;
pub(crate) use sockets::{describe_ends, ends};
pub(crate) use udp::Adopted;
pub use udp::{Backlog, Route, TunnelSocket, path_mtu};
pub use uplink::{Frames, OpenError as UplinkError, Uplink, UplinkKind};

pub(crate) use crate::netlink::Changes;

/// Chooses the underlay's interface among those of this machine, for a node of these pod networks as far as
/// they are known. It has ends of the IP versions that the node needs, and of IPv6 the one that was
/// published before, while it is valid.
///
/// # Errors
/// Why there is none like that, and what to do.
pub async fn choose_interface(
    wanted: &InterfaceChoice,
    audience: Audience,
    networks: Option<Nets>,
    published: Option<Ipv6Addr>,
) -> Result<PublicInterface, NoInterface> {
    let pods = networks.and_then(|it| it.ipv6());
    let has_ipv6 = networks.is_none_or(|it| it.ipv6().is_some());
    if networks.is_some_and(|it| it.ipv4().is_none()) {
        return ipv6::choose(wanted, pods, published).await;
    }
    match interface::choose(wanted, audience).await {
        Ok(interface) if has_ipv6 => Ok(ipv6::complete(interface, wanted, pods, published).await),
        // The network may be one of IPv6 alone.
        Err(NoInterface::NotYet(reason)) if networks.is_none() && wanted.public_ip.is_none() => {
            let alone = ipv6::choose(wanted, pods, published).await;
            alone.map_err(|_| NoInterface::NotYet(reason))
        }
        chosen => chosen,
    }
}

/// What a worker reaches other nodes by.
#[derive(Debug)]
pub struct Underlay {
    /// For encapsulated packets.
    pub tunnel: Option<TunnelSockets>,
    /// For bare ones.
    pub uplink: Option<Uplink>,
}

impl Underlay {
    /// Whether the kernel can be trusted to segment UDP sends, as far as that is known.
    pub(crate) fn takes_trains(&self) -> bool {
        let of_kernel = || !udp::has_known_defect();
        self.tunnel
            .as_ref()
            .map_or_else(of_kernel, TunnelSockets::has_gso)
    }
}
