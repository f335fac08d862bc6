//! The uplink: how a node without tunnels (host-gw) sends and receives Ethernet frames in its LAN.
//!
//! Either packet sockets on the interface that the host's kernel has there too, or a TAP that
//! somebody bridges into the LAN. Each worker has its own, and a flow stays with one of them.

mod error;
mod fanout;
mod filter;
mod packet_socket;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;

pub use error::{Failure, OpenError};
use muslin_encap::offload::virtio::{self, Header};
use muslin_stack::addresses::Nets;
use muslin_stack::datapath::work;
use nix::errno::Errno;
use nix::libc;
use nix::sys::eventfd::{EfdFlags, EventFd};
use packet_socket::{Link, PacketSocket};
use smoltcp::wire::EthernetAddress;
use thiserror::Error;

use super::messages::Messages;
use crate::device::{self, FrameDevice, Tap};
use crate::error::errno;

/// Bytes of the longest frame, with the virtio-net header in front of it. The IP header of one in
/// a buffer that starts on a cache line is aligned to eight bytes.
const MESSAGE_LEN: usize = virtio::LEN + 14 + 65_535;

/// How a node reaches its LAN below IP. Its text form is `packet` or `tap:NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum UplinkKind {
    /// A packet socket on the underlay's interface.
    #[default]
    PacketSocket,
    /// A TAP of that name, made if there is none, which somebody bridges into the LAN.
    Tap(String),
}

/// Text that is not an uplink.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "'{0}' is not an uplink: it is 'packet', or 'tap:NAME' with a name of at most 15 bytes without \
     spaces, slashes and colons"
)]
pub struct InvalidUplink(pub String);

impl FromStr for UplinkKind {
    type Err = InvalidUplink;

    fn from_str(text: &str) -> Result<Self, InvalidUplink> {
        if text == "packet" {
            return Ok(Self::PacketSocket);
        }
        // As the kernel has it (`dev_valid_name`), which also fills in a number for `%d`.
        let forbidden = |c: char| c.is_whitespace() || "/:%".contains(c);
        text.strip_prefix("tap:")
            .filter(|name| (1..libc::IFNAMSIZ).contains(&name.len()))
            .filter(|name| !name.contains(forbidden) && !matches!(*name, "." | ".."))
            .map(|name| Self::Tap(name.to_owned()))
            .ok_or_else(|| InvalidUplink(text.to_owned()))
    }
}

impl fmt::Display for UplinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PacketSocket => f.write_str("packet"),
            Self::Tap(name) => write!(f, "tap:{name}"),
        }
    }
}

/// A worker's way to the LAN. Frames arrive in queues, each of which has a descriptor that is readable
/// when there are some. What a pod of another node sends is in one of them (see `queues`).
#[derive(Debug)]
pub struct Uplink {
    device: Device,
    hardware_address: EthernetAddress,
}

#[derive(Debug)]
enum Device {
    /// Frames leave by the first.
    PacketSockets(PacketSocket, Vec<PacketSocket>),
    Tap(Tap),
    /// A TAP that another worker reads, and what stands for it where it is waited for.
    SendOnly(Tap, EventFd),
}

impl Uplink {
    /// Opens as many uplinks, one for each worker, on the interface of this name, for what the LAN
    /// sends to the subnets.
    ///
    /// Packet sockets get what is for the subnets, ARP and neighbour discovery, and nothing else. What a TAP gives has
    /// not been looked at; if it has fewer queues than there are workers, the first reads it and all
    /// send. ARP frames arrive at one of the workers, which has to inform the others.
    ///
    /// # Errors
    /// `OpenError` in words for people.
    pub fn open(
        kind: &UplinkKind,
        interface: &str,
        subnets: Nets,
        groups: usize,
    ) -> Result<Vec<Self>, OpenError> {
        match kind {
            UplinkKind::PacketSocket => Self::open_packet_sockets(interface, subnets, groups),
            UplinkKind::Tap(name) => Self::open_tap(name, groups),
        }
    }

    fn open_packet_sockets(
        interface: &str,
        subnets: Nets,
        groups: usize,
    ) -> Result<Vec<Self>, OpenError> {
        let link = Link::find(interface)?;
        let hardware_address = link.hardware_address();
        let open = || {
            let workers = fanout::open(link, subnets, groups)?.into_iter();
            let uplinks = workers.map(|sockets| {
                let mut sockets = sockets.into_iter();
                let first = sockets.next().ok_or(Errno::ENODEV)?;
                Ok(Self {
                    device: Device::PacketSockets(first, sockets.collect()),
                    hardware_address,
                })
            });
            uplinks.collect::<io::Result<_>>()
        };
        open().map_err(|error| match errno(&error) {
            Errno::EPERM | Errno::EACCES => OpenError::NoCapability(interface.to_owned()),
            Errno::EAFNOSUPPORT => OpenError::NoPacketSockets,
            Errno::ENODEV | Errno::ENXIO => OpenError::NoInterface(interface.to_owned()),
            _ => OpenError::Other(interface.to_owned(), error),
        })
    }

    fn open_tap(name: &str, groups: usize) -> Result<Vec<Self>, OpenError> {
        let queues = Tap::open(name, true, groups).map_err(|error| match error {
            device::OpenError::Exists(name) => OpenError::TapInUse(name),
            other => OpenError::Tap(other),
        })?;
        let uplinks = Self::on_tap(queues, groups);
        uplinks.map_err(|error| OpenError::Other(name.to_owned(), error))
    }

    fn on_tap(queues: Vec<Tap>, groups: usize) -> io::Result<Vec<Self>> {
        let first = queues.first().ok_or(Errno::ENODEV)?.try_clone()?;
        let hardware_address = beside(first.hardware_address()?);
        let mut queues = queues.into_iter();
        let device = || match queues.next() {
            Some(tap) => Ok(Device::Tap(tap)),
            None => {
                let silent = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
                Ok(Device::SendOnly(first.try_clone()?, silent))
            }
        };
        let devices: io::Result<Vec<_>> = std::iter::repeat_with(device).take(groups).collect();
        let uplinks = devices?.into_iter().map(|device| Self {
            device,
            hardware_address,
        });
        Ok(uplinks.collect())
    }

    /// Those of another process, which has sent the descriptors of its workers' queues.
    ///
    /// # Errors
    /// If there is no such interface any more, or a descriptor is no such device.
    pub(crate) fn adopt(
        kind: &UplinkKind,
        interface: &str,
        workers: Vec<Vec<OwnedFd>>,
    ) -> io::Result<Vec<Self>> {
        let groups = workers.len();
        let UplinkKind::PacketSocket = kind else {
            // A worker without a queue has an event descriptor in place of one.
            let queues = workers.into_iter().flatten();
            let taps = queues.filter_map(|it| Tap::from_descriptor(it).ok());
            return Self::on_tap(taps.collect(), groups);
        };
        let link = Link::find(interface).map_err(io::Error::other)?;
        let adopt = |sockets: Vec<OwnedFd>| {
            let mut sockets = sockets
                .into_iter()
                .map(|socket| PacketSocket::adopt(link, socket));
            Ok(Self {
                device: Device::PacketSockets(
                    sockets.next().ok_or(Errno::ENODEV)?,
                    sockets.collect(),
                ),
                hardware_address: link.hardware_address(),
            })
        };
        workers.into_iter().map(adopt).collect()
    }

    /// The MAC address by which the LAN knows the node: that of the interface, which is the host's
    /// too, or with a TAP one of the node's own.
    #[must_use]
    pub const fn hardware_address(&self) -> EthernetAddress {
        self.hardware_address
    }

    /// The descriptors of its queues, in the order of their numbers.
    pub fn queues(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let (first, others) = match &self.device {
            Device::PacketSockets(first, others) => (first.as_fd(), &others[..]),
            Device::Tap(tap) => (tap.as_fd(), &[][..]),
            Device::SendOnly(_, silent) => (silent.as_fd(), &[][..]),
        };
        std::iter::once(first).chain(others.iter().map(PacketSocket::as_fd))
    }

    /// Frames that queues have lost since they were last asked.
    pub fn take_losses(&self) -> u64 {
        match &self.device {
            Device::PacketSockets(first, others) => {
                let all = std::iter::once(first).chain(others);
                all.map(PacketSocket::take_losses).sum()
            }
            Device::Tap(_) | Device::SendOnly(..) => 0,
        }
    }

    /// Receives a batch of frames from a queue and returns whether there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; `Failure` classifies the other errors.
    pub fn receive(&self, queue: usize, into: &mut Frames) -> io::Result<bool> {
        match &self.device {
            Device::PacketSockets(first, others) => {
                let socket = match queue.checked_sub(1) {
                    None => first,
                    Some(index) => others.get(index).ok_or(Errno::EAGAIN)?,
                };
                socket.receive(&mut into.0)
            }
            Device::Tap(tap) => into.0.receive_each(|buffer| {
                let (front, buffer) = buffer.split_at_mut(virtio::LEN);
                let (header, len) = tap.receive(buffer)?;
                front.copy_from_slice(&header);
                Ok((virtio::LEN + len, ()))
            }),
            Device::SendOnly(..) => Err(Errno::EAGAIN.into()),
        }
    }
}

impl FrameDevice for Uplink {
    fn has_offloads(&self) -> bool {
        match &self.device {
            Device::PacketSockets(socket, _) => socket.has_header(),
            Device::Tap(tap) | Device::SendOnly(tap, _) => tap.has_offloads(),
        }
    }

    /// # Errors
    /// Those that `Failure` classifies.
    fn send(&self, header: &Header, head: &[u8], tail: &[&[u8]]) -> io::Result<()> {
        match &self.device {
            Device::PacketSockets(socket, _) => socket.send(header, head, tail),
            Device::Tap(tap) | Device::SendOnly(tap, _) => tap.send(header, head, tail),
        }
    }
}

/// The MAC address of what is at the node's end of a TAP. The interface's own is the bridge's: it
/// would not pass on a frame to that. As libvirt does, the two differ in the first byte, which no
/// numbering of interfaces changes.
fn beside(EthernetAddress([first, rest @ ..]): EthernetAddress) -> EthernetAddress {
    let [b, c, d, e, f] = rest;
    // Locally administered, and unicast.
    EthernetAddress([(first ^ 0x40) & !0x01 | 0x02, b, c, d, e, f])
}

/// The frames of one call. Buffers are used again.
#[derive(Debug)]
pub struct Frames(Messages<()>);

impl Default for Frames {
    fn default() -> Self {
        Self(Messages::new(MESSAGE_LEN))
    }
}

impl Frames {
    /// The frames of the last call with their raw virtio-net headers, in order.
    pub fn frames(&mut self) -> impl Iterator<Item = ([u8; virtio::LEN], &mut [u8])> {
        self.0.iter_mut().filter_map(|((), message)| {
            let (header, frame) = message.split_first_chunk_mut()?;
            Some((*header, frame))
        })
    }

    /// How many frames the last call brought; a superpacket is one.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.0.count()
    }

    /// Work of the frames of the last call.
    #[must_use]
    pub fn work(&mut self) -> u64 {
        let each = self.frames().map(|(header, frame)| {
            let gso = Header::parse(&header).ok().and_then(|header| header.gso);
            let size = gso.map_or(usize::MAX, |gso| gso.size.into());
            work::of_superpacket(frame.len().div_ceil(size.max(1)), frame.len())
        });
        each.sum()
    }

    /// Frames of the last call that were lost, since they were
    /// too long or of an unknown kind.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.0.lost()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uplink_is_a_packet_socket_or_a_tap() {
        for (text, kind) in [
            ("packet", UplinkKind::PacketSocket),
            ("tap:lan0", UplinkKind::Tap("lan0".to_owned())),
            (
                "tap:fifteen-letters",
                UplinkKind::Tap("fifteen-letters".to_owned()),
            ),
        ] {
            assert_eq!(text.parse(), Ok(kind.clone()));
            assert_eq!(kind.to_string(), text);
        }
        for text in [
            "",
            "Packet",
            "tap",
            "tap:",
            "tap:a/b",
            "tap:a b",
            "tap:..",
            "tap:%d",
            "tap:sixteen-letters-",
        ] {
            let refused = text.parse::<UplinkKind>();
            assert_eq!(refused, Err(InvalidUplink(text.to_owned())));
        }
    }

    #[test]
    fn the_end_of_a_tap_has_an_address_of_its_own() {
        for mac in [[0x52, 0x54, 0, 1, 2, 3], [0xfe; 6], [0, 1, 2, 3, 4, 5]] {
            let (mac, other) = (EthernetAddress(mac), beside(EthernetAddress(mac)));
            assert!(other.is_unicast() && other.is_local() && other != mac);
            assert_eq!(other.0[1..], mac.0[1..]);
        }
    }

    #[test]
    fn interfaces_that_cannot_be_uplinks_are_refused_in_words() {
        let open = |name: &str| {
            let subnet = "10.244.1.0/24".parse().unwrap();
            let opened = Uplink::open(&UplinkKind::PacketSocket, name, subnet, 1);
            opened.unwrap_err().to_string()
        };
        assert!(open("lo").contains("lo is the loopback interface"));
        assert!(open("no-such-iface").contains("no interface 'no-such-iface'"));
        assert!(open("sixteen-letters-").contains("at most 15 bytes"));
    }
}
