//! Why there is no uplink, and what can go wrong with one.

use std::io;

use nix::errno::Errno;
use nix::libc;
use thiserror::Error;

use crate::device;
use crate::error::errno;

/// Why an uplink could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// No packet socket may be opened in this network namespace.
    #[error(
        "host-gw needs CAP_NET_RAW in the network namespace of {0}: let systemd start \
         the node with AmbientCapabilities=CAP_NET_RAW, give the container --cap-add NET_RAW, or \
         use a bridged TAP with --uplink tap:NAME"
    )]
    NoCapability(String),
    /// The kernel knows no packet sockets.
    #[error(
        "host-gw needs packet sockets, which this kernel does not have: load the kernel module \
         'af_packet', or use a bridged TAP with --uplink tap:NAME"
    )]
    NoPacketSockets,
    /// There is no interface of that name.
    #[error("there is no interface '{0}' for host-gw: choose another with --iface")]
    NoInterface(String),
    /// The interface is not up.
    #[error("the interface {0} is down: run 'ip link set {0} up'")]
    Down(String),
    /// The interface carries no Ethernet frames.
    #[error(
        "host-gw needs Ethernet between the nodes, but {name} is {}: choose another interface \
         with --iface, or use the vxlan backend",
        describe(*.hardware_type)
    )]
    NotEthernet {
        /// The interface.
        name: String,
        /// Its type, as `linux/if_arp.h` numbers them.
        hardware_type: u16,
    },
    /// No interface can have that name.
    #[error("'{0}' is too long for an interface name, which has at most 15 bytes")]
    NameTooLong(String),
    /// Somebody else has the TAP device open.
    #[error("the TAP device {0} is in use: another node, or a virtual machine, has it open")]
    TapInUse(String),
    /// The TAP device cannot be made or opened.
    #[error("no uplink: {0}")]
    Tap(#[source] device::OpenError),
    /// Anything else.
    #[error("no uplink on {0}: {1}")]
    Other(String, #[source] io::Error),
}

/// An interface's type in words.
fn describe(hardware_type: u16) -> String {
    let words = match hardware_type {
        libc::ARPHRD_LOOPBACK => "the loopback interface",
        libc::ARPHRD_NONE => "a device without Ethernet (tun, WireGuard)",
        libc::ARPHRD_PPP => "a point-to-point link (PPP)",
        libc::ARPHRD_TUNNEL | libc::ARPHRD_SIT | libc::ARPHRD_IPGRE => "an IP tunnel",
        libc::ARPHRD_INFINIBAND => "InfiniBand",
        other => return format!("an interface of type {other}"),
    };
    words.to_owned()
}

/// Why a frame was not sent, or none is received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Failure {
    /// The kernel's queue is full, or empty; later there is room, or a frame.
    #[error("the queue is full")]
    QueueFull,
    /// The interface is down. It is used again as soon as it is up.
    #[error("the interface is down")]
    Down,
    /// The interface is gone; the uplink is of no use any more.
    #[error("the interface is gone")]
    Gone,
    /// The frame is longer than the interface's MTU allows.
    #[error("the frame is too long for the interface's MTU")]
    TooLong,
    /// The kernel does not take this superpacket; its segments it would.
    #[error("the kernel refuses the GSO packet")]
    Refused,
    /// Anything else.
    #[error("{}", .0.desc())]
    Other(Errno),
}

impl From<&io::Error> for Failure {
    fn from(error: &io::Error) -> Self {
        match errno(error) {
            Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM => Self::QueueFull,
            // The latter from a TAP.
            Errno::ENETDOWN | Errno::EIO => Self::Down,
            Errno::ENODEV | Errno::ENXIO | Errno::EBADFD => Self::Gone,
            Errno::EMSGSIZE => Self::TooLong,
            Errno::EINVAL => Self::Refused,
            other => Self::Other(other),
        }
    }
}
