//! A worker's published ports.

use std::collections::HashMap;
use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ipnet::IpNet;
use muslin_encap::ip::v6;
use muslin_stack::Instant;
use muslin_stack::api::published::PortMapping;
use muslin_stack::datapath;
use muslin_stack::datapath::port::PortId;
use muslin_stack::datapath::work::Turn;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use socket2::Socket;

use crate::host::address;

/// A worker's published ports.
pub(super) struct PublishedPorts {
    pub(super) ports: HashMap<u32, Port>,
    pub(super) next: u32,
    /// When those that pause go on.
    pub(super) pauses: Option<Instant>,
    pub(super) buffer: Box<[u8]>,
    pub(super) control: Vec<u8>,
}

pub(super) struct Port {
    /// The port of the pod's device.
    pub(super) device: PortId,
    pub(super) pod: SocketAddr,
    /// The overlay's network of the pod's IP version.
    pub(super) network: IpNet,
    pub(super) ports: PortMapping,
    pub(super) socket: Arc<Socket>,
    /// What it has left of its turn to be read.
    pub(super) turn: Turn,
}

impl Default for PublishedPorts {
    fn default() -> Self {
        Self {
            ports: HashMap::new(),
            next: 0,
            pauses: None,
            buffer: vec![0; v6::MAX_LEN].into_boxed_slice(),
            control: nix::cmsg_space!(nix::libc::in6_pktinfo),
        }
    }
}

impl PublishedPorts {
    /// When those that pause go on.
    pub(super) fn poll_at(&self) -> Option<Instant> {
        self.pauses
    }

    /// Closes the ports of a pod.
    pub(super) fn close(&mut self, device: PortId) {
        self.ports.retain(|_, port| port.device != device);
    }
}

impl Port {
    pub(super) fn published(&self) -> datapath::published::PublishedPort {
        datapath::published::PublishedPort {
            protocol: self.ports.transport.into(),
            pod: self.pod,
            network: self.network,
        }
    }

    /// A datagram's length, its sender and the address it came to.
    pub(super) fn receive(
        &self,
        buffer: &mut [u8],
        control: &mut [u8],
    ) -> Result<(usize, SocketAddr, IpAddr), Errno> {
        let mut pieces = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message =
            recvmsg::<SockaddrStorage>(self.socket.as_raw_fd(), &mut pieces, Some(control), flags)?;
        let client = message.address.as_ref().and_then(address::ip);
        let client = client.ok_or(Errno::EINTR)?;
        let mut local = IpAddr::from(Ipv4Addr::UNSPECIFIED);
        for information in message.cmsgs()? {
            match information {
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    local = info.ipi_spec_dst.s_addr.to_ne_bytes().into();
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    local = info.ipi6_addr.s6_addr.into();
                }
                _ => {}
            }
        }
        Ok((message.bytes, client, local))
    }
}
