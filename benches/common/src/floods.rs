//! Floods: what a hostile pod sends as fast as it can.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use etherparse::PacketBuilder;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn, bind, sendmsg};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

/// The pod's interface.
const INTERFACE: &str = "eth0";
const BROADCAST: [u8; 6] = [0xff; 6];
/// Datagrams of a train, and the bytes of each.
const TRAIN: (usize, u16) = (64, 10);
/// Names and ports are different for so many packets.
const VARIETY: u16 = 20_000;
/// How long an address may take to be found.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Flood {
    /// Nothing.
    Quiet,
    /// Small datagrams to another pod of the node.
    UdpHere,
    /// Small datagrams to a pod of another node.
    UdpThere,
    /// Large ones.
    LargeUdpThere,
    /// Trains of small datagrams to a pod of another node, each with one call.
    TrainsThere,
    /// ARP requests, to all.
    Arp,
    /// Large broadcasts.
    Broadcasts,
    /// Datagrams from addresses that are not the pod's.
    Spoofed,
    /// Packets whose time to live ends at the node.
    Ttl,
    /// Frames of random bytes.
    Random,
    /// Echo requests to the gateway.
    Pings,
    /// Questions to the gateway's name server.
    Names,
    /// Connections to outside the overlay, each from another port.
    Connections,
    /// Datagrams to outside, each from another port.
    UdpOutside,
    /// Trains to outside.
    TrainsOutside,
    /// Fragments of packets to outside that never become whole.
    Fragments,
}

/// Whom a flood is for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Targets {
    pub own: Ipv4Addr,
    pub gateway: Ipv4Addr,
    pub here: Ipv4Addr,
    pub there: Ipv4Addr,
    pub outside: Ipv4Addr,
}

impl Flood {
    /// Whether it stays in the overlay.
    pub const fn is_inside(self) -> bool {
        !matches!(
            self,
            Self::Names
                | Self::Connections
                | Self::UdpOutside
                | Self::TrainsOutside
                | Self::Fragments
        )
    }

    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Floods until the time is over, and returns how many packets the kernel took.
pub fn send(flood: Flood, to: Targets, duration: Duration) -> io::Result<u64> {
    let end = Instant::now() + duration;
    match flood {
        Flood::Quiet => {
            std::thread::sleep(duration);
            Ok(0)
        }
        Flood::TrainsThere => send_trains(to.there, end),
        Flood::TrainsOutside => send_trains(to.outside, end),
        _ => send_frames(&frames(flood, to)?, end),
    }
}

fn send_trains(to: Ipv4Addr, end: Instant) -> io::Result<u64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let (count, size) = TRAIN;
    let bytes = vec![7; count * usize::from(size)];
    let address = SockaddrIn::from(SocketAddrV4::new(to, 9));
    let mut sent = 0;
    while Instant::now() < end {
        let train = sendmsg(
            socket.as_raw_fd(),
            &[io::IoSlice::new(&bytes)],
            &[ControlMessage::UdpGsoSegments(&size)],
            MsgFlags::empty(),
            Some(&address),
        );
        // Full queues, and what others say of it, do not end a flood.
        sent += u64::from(train.is_ok()) * count as u64;
    }
    Ok(sent)
}

fn send_frames(frames: &[Vec<u8>], end: Instant) -> io::Result<u64> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    let link = getifaddrs()?
        .filter(|row| row.interface_name == INTERFACE)
        .find_map(|row| row.address?.as_link_addr().copied())
        .ok_or(io::ErrorKind::NotFound)?;
    bind(socket.as_raw_fd(), &link)?;
    let mut sent = 0;
    loop {
        for batch in frames.chunks(64) {
            for frame in batch {
                sent += u64::from(socket.send(frame).is_ok());
            }
            if Instant::now() >= end {
                return Ok(sent);
            }
        }
    }
}

/// What is sent again and again.
fn frames(flood: Flood, to: Targets) -> io::Result<Vec<Vec<u8>>> {
    let own = own_mac()?;
    let gateway = mac_of(to.gateway)?;
    let udp = |target: [u8; 6],
               source: Ipv4Addr,
               destination: Ipv4Addr,
               ports: (u16, u16),
               ttl,
               payload: &[u8]| {
        let mut frame = Vec::new();
        let packet = PacketBuilder::ethernet2(own, target)
            .ipv4(source.octets(), destination.octets(), ttl)
            .udp(ports.0, ports.1);
        // Writing to memory does not fail.
        packet.write(&mut frame, payload).unwrap();
        frame
    };
    let ports = || 1024..1024 + VARIETY;
    Ok(match flood {
        Flood::UdpHere => vec![udp(mac_of(to.here)?, to.own, to.here, (4000, 9), 64, b"x")],
        Flood::UdpThere => vec![udp(gateway, to.own, to.there, (4000, 9), 64, b"x")],
        Flood::LargeUdpThere => vec![udp(gateway, to.own, to.there, (4000, 9), 64, &[7; 1400])],
        Flood::Broadcasts => {
            let all = Ipv4Addr::BROADCAST;
            vec![udp(BROADCAST, to.own, all, (4000, 9), 64, &[7; 1400])]
        }
        Flood::Spoofed => {
            let others = (0..200).map(|last| Ipv4Addr::new(10, 244, 9, last));
            let all = others.map(|from| udp(gateway, from, to.there, (4000, 9), 64, b"x"));
            all.collect()
        }
        Flood::Ttl => vec![udp(gateway, to.own, to.there, (4000, 9), 1, b"x")],
        Flood::Names => {
            let question = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x04here\x06muslin\0\0\x01\0\x01";
            let all =
                ports().map(|port| udp(gateway, to.own, to.gateway, (port, 53), 64, question));
            all.collect()
        }
        Flood::UdpOutside => {
            let all = ports().map(|port| udp(gateway, to.own, to.outside, (port, 9), 64, b"x"));
            all.collect()
        }
        Flood::Connections => ports()
            .map(|port| {
                let mut frame = Vec::new();
                let packet = PacketBuilder::ethernet2(own, gateway)
                    .ipv4(to.own.octets(), to.outside.octets(), 64)
                    .tcp(port, 9, 1, 65_535)
                    .syn();
                packet.write(&mut frame, &[]).unwrap();
                frame
            })
            .collect(),
        Flood::Pings => {
            let mut frame = Vec::new();
            let packet = PacketBuilder::ethernet2(own, gateway)
                .ipv4(to.own.octets(), to.gateway.octets(), 64)
                .icmpv4_echo_request(1, 1);
            packet.write(&mut frame, &[7; 1000]).unwrap();
            vec![frame]
        }
        Flood::Fragments => {
            let first = udp(gateway, to.own, to.outside, (4000, 9), 64, &[7; 1392]);
            (0..VARIETY)
                .map(|number| first_fragment(&first, number))
                .collect()
        }
        Flood::Arp => vec![arp(own, to)],
        Flood::Random => random(own, gateway),
        Flood::Quiet | Flood::TrainsThere | Flood::TrainsOutside => Vec::new(),
    })
}

/// A packet with this identification of which more is to come.
fn first_fragment(frame: &[u8], number: u16) -> Vec<u8> {
    const IP: usize = 14;
    let mut frame = frame.to_vec();
    frame[IP + 4..IP + 6].copy_from_slice(&number.to_be_bytes());
    frame[IP + 6..IP + 8].copy_from_slice(&0x2000_u16.to_be_bytes());
    let mut header = etherparse::Ipv4Header::from_slice(&frame[IP..]).unwrap().0;
    header.header_checksum = header.calc_header_checksum();
    frame[IP..IP + 20].copy_from_slice(&header.to_bytes());
    frame
}

fn arp(own: [u8; 6], to: Targets) -> Vec<u8> {
    let mut frame = [&BROADCAST[..], &own, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
    frame.extend(own);
    frame.extend(to.own.octets());
    frame.extend([0; 6]);
    frame.extend(to.here.octets());
    frame
}

/// Frames to anybody, and packets to the gateway, of random bytes.
fn random(own: [u8; 6], gateway: [u8; 6]) -> Vec<Vec<u8>> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..1500)
        .map(|number: usize| {
            let mut target = gateway;
            if number.is_multiple_of(3) {
                target = std::array::from_fn(|_| byte());
            }
            let mut frame = [&target[..], &own, &[8, 0]].concat();
            frame.extend((0..number % 1400).map(|_| byte()));
            frame
        })
        .collect()
}

fn own_mac() -> io::Result<[u8; 6]> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{INTERFACE}/address"))?;
    parse_mac(text.trim()).ok_or_else(|| io::Error::other(text))
}

/// The address that the kernel has found for a neighbour.
fn mac_of(address: Ipv4Addr) -> io::Result<[u8; 6]> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        // It asks for the address before it sends.
        let _ = socket.send_to(b"x", (address, 9));
        let table = std::fs::read_to_string("/proc/net/arp")?;
        let rows = table
            .lines()
            .map(|row| row.split_whitespace().collect::<Vec<_>>());
        let mut its = rows.filter(|row| row.first() == Some(&address.to_string().as_str()));
        let mac = its.find_map(|row| parse_mac(row.get(3)?));
        if let Some(mac) = mac.filter(|mac| *mac != [0; 6]) {
            return Ok(mac);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(io::ErrorKind::HostUnreachable.into())
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok())
        .collect();
    bytes?.try_into().ok()
}
