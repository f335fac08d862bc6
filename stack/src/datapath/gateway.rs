//! The gateway: a node's own addresses, `.1` for its pods and `.0`, from which flannel nodes send.
//!
//! This is the one module that wraps smoltcp's interfaces. There are two, because smoltcp's
//! Ethernet interface drops what it has no neighbour for and asks once a second for all of them:
//! the Ethernet one answers ARP and nothing else; IP packets go through one without a link layer,
//! whose replies our own router sends on, to a pod or to a peer alike.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use muslin_encap::ip::v4;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};

/// Larger than any reply. The router cuts replies to the real MTU, because smoltcp panics when it
/// has to cut an ICMP error, and sums what an earlier reply left in its buffer into the checksum
/// of a shorter one.
const MTU: usize = v4::MAX_LEN;

/// The services on a node's own addresses.
pub struct Gateway {
    arp: Endpoint,
    ip: Endpoint,
}

struct Endpoint {
    interface: Interface,
    device: Queues,
    sockets: SocketSet<'static>,
}

impl Gateway {
    /// A gateway with the addresses `.1` and `.0` of `subnet`.
    #[must_use]
    pub fn new(subnet: Ipv4Net, mac: EthernetAddress, random_seed: u64, now: Instant) -> Self {
        let endpoint = |hardware, medium, mtu| {
            let mut device = Queues::new(medium, mtu);
            let mut config = Config::new(hardware);
            config.random_seed = random_seed;
            let mut interface = Interface::new(config, &mut device, now);
            interface.update_ip_addrs(|addresses| {
                let gateway = Ipv4Cidr::new(self::address(subnet), subnet.prefix_len());
                let base = Ipv4Cidr::new(subnet.network(), 32);
                // Capacity for eight is a feature of the dependency; two always fit.
                let _ = addresses.push(IpCidr::Ipv4(gateway));
                let _ = addresses.push(IpCidr::Ipv4(base));
            });
            Endpoint {
                interface,
                device,
                sockets: SocketSet::new(Vec::new()),
            }
        };
        Self {
            arp: endpoint(
                HardwareAddress::Ethernet(mac),
                Medium::Ethernet,
                MTU + super::frame::HEADER_LEN,
            ),
            ip: endpoint(HardwareAddress::Ip, Medium::Ip, MTU),
        }
    }

    /// Hears an ARP frame and gives each frame of the answer to `reply`.
    pub fn arp(&mut self, now: Instant, frame: &[u8], reply: impl FnMut(&[u8])) {
        self.arp.process(now, frame, reply);
    }

    /// Takes an IP packet for one of the gateway's addresses and gives each packet of the answer
    /// to `reply`.
    pub fn ip(&mut self, now: Instant, packet: &[u8], reply: impl FnMut(&[u8])) {
        self.ip.process(now, packet, reply);
    }
}

/// The gateway's address in a subnet: the first after the base.
#[must_use]
pub fn address(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()).saturating_add(1))
}

impl Endpoint {
    fn process(&mut self, now: Instant, packet: &[u8], mut reply: impl FnMut(&[u8])) {
        self.device.push(packet);
        self.interface
            .poll_ingress_single(now, &mut self.device, &mut self.sockets);
        while let Some(answer) = self.device.sent.pop_front() {
            reply(&answer);
            self.device.free.push(answer);
        }
    }
}

/// A device of two queues with recycled buffers: a packet needs one, and its answer another.
struct Queues {
    capabilities: DeviceCapabilities,
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
    free: Vec<Vec<u8>>,
}

impl Queues {
    fn new(medium: Medium, mtu: usize) -> Self {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = medium;
        capabilities.max_transmission_unit = mtu;
        Self {
            capabilities,
            received: VecDeque::with_capacity(1),
            sent: VecDeque::with_capacity(1),
            free: Vec::with_capacity(2),
        }
    }

    fn push(&mut self, packet: &[u8]) {
        let mut buffer = self.free.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(packet);
        self.received.push_back(buffer);
    }
}

struct Received<'a> {
    packet: Vec<u8>,
    free: &'a mut Vec<Vec<u8>>,
}

struct Send<'a> {
    sent: &'a mut VecDeque<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Device for Queues {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Send<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Send<'_>)> {
        let packet = self.received.pop_front()?;
        let buffer = self.free.pop().unwrap_or_default();
        let send = Send {
            sent: &mut self.sent,
            buffer,
        };
        Some((
            Received {
                packet,
                free: &mut self.free,
            },
            send,
        ))
    }

    /// There are no sockets: all that is sent answers something.
    fn transmit(&mut self, _: Instant) -> Option<Send<'_>> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(&self.packet);
        self.free.push(self.packet);
        result
    }
}

impl TxToken for Send<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(mut self, len: usize, f: F) -> R {
        self.buffer.clear();
        self.buffer.resize(len, 0);
        let result = f(&mut self.buffer);
        self.sent.push_back(self.buffer);
        result
    }
}
