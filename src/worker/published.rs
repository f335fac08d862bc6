//! A worker's published ports.

use std::collections::HashMap;
use std::io::IoSliceMut;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use ipnet::Ipv4Net;
use muslin_encap::ip::v4;
use muslin_stack::Instant;
use muslin_stack::api::published::PortMapping;
use muslin_stack::datapath;
use muslin_stack::datapath::port::PortId;
use muslin_stack::datapath::work::Turn;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg};
use socket2::Socket;

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
    pub(super) pod: SocketAddrV4,
    /// The overlay's network.
    pub(super) network: Ipv4Net,
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
            buffer: vec![0; v4::MAX_LEN].into_boxed_slice(),
            control: nix::cmsg_space!(nix::libc::in_pktinfo),
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
            pod: self.pod.into(),
            network: self.network.into(),
        }
    }

    /// A datagram's length, its sender and the address it came to.
    pub(super) fn receive(
        &self,
        buffer: &mut [u8],
        control: &mut [u8],
    ) -> Result<(usize, SocketAddrV4, Ipv4Addr), Errno> {
        let mut pieces = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message =
            recvmsg::<SockaddrIn>(self.socket.as_raw_fd(), &mut pieces, Some(control), flags)?;
        let client = message.address.ok_or(Errno::EINTR)?;
        let mut local = Ipv4Addr::UNSPECIFIED;
        for information in message.cmsgs()? {
            if let ControlMessageOwned::Ipv4PacketInfo(info) = information {
                local = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
            }
        }
        Ok((message.bytes, client.into(), local))
    }
}
