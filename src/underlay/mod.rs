//! The underlay: the interface, and what carries packets between nodes: the tunnel's UDP sockets, and
//! the uplink for bare packets.

mod batch;
mod bpf;
mod interface;
pub mod ipv6;
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
    Audience, InterfaceChoice, NoInterface, PublicInterface, choose as choose_interface,
    forwards_ipv4,
};
pub use kernel::{Conflict, KernelNetwork};
pub use socket::Options;
pub use sockets::TunnelSockets;
pub(crate) use sockets::ends;
pub(crate) use udp::Adopted;
pub use udp::{Backlog, Route, TunnelSocket, path_mtu};
pub use uplink::{Frames, OpenError as UplinkError, Uplink, UplinkKind};

pub(crate) use crate::netlink::Changes;

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
