//! The kernel's merging: what comes out of a VXLAN interface whose datagrams came in one train.
//!
//! A tunnel hands its frames to GRO by a queue of its own, which is emptied after the datagrams of
//! a train have all been taken apart. So a train that is written at once is merged as far as its
//! frames allow, and nothing depends on time. But a train has datagrams of one length. Therefore
//! there are two tunnels, one in the other: the length of an inner datagram says where its frame
//! ends, and what is behind it makes all outer ones equal (and unfit for merging themselves).

#![allow(unsafe_code)] // one socket option, where it is set

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};

use etherparse::PacketBuilder;
use muslin_bed::packets::L3;
use muslin_encap::ip::transport::Transport;
use muslin_encap::offload::virtio::{self, Header};
use muslin_lab::{Offload, inside};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{LinkAddr, bind, recvfrom, setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

const OUTER_PORT: u16 = 4790;
const INNER_PORT: u16 = 4791;
/// VXLAN headers for the outer and the inner network.
const VNI: [[u8; 8]; 2] = [[8, 0, 0, 0, 0, 0, 1, 0], [8, 0, 0, 0, 0, 0, 2, 0]];
/// The outer interface, and who sends to it.
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 1, 2]];
const IPS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 99, 0, 2)];
/// Frames in one train: a few less than the kernel takes out of a queue in one go.
const MAX_FRAMES: usize = 60;
/// Ample time for a frame, in milliseconds.
const PATIENCE: u16 = 50_000;
/// What came out of the inner tunnel.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) virtio: Header,
    pub(crate) bytes: Vec<u8>,
}

impl Received {
    /// The frames it consists of.
    fn count(&self) -> usize {
        let Some(gso) = self.virtio.gso else { return 1 };
        let at = Transport::parse(&self.bytes, L3).unwrap();
        at.payload_len().div_ceil(gso.size.into())
    }
}

/// A tunnel in a tunnel, in this process' network namespace.
pub(crate) struct Tunnels {
    sender: UdpSocket,
    capture: Socket,
}

impl Tunnels {
    pub(crate) fn new() -> Self {
        let [ip, _] = IPS;
        inside::sh(&format!(
            "ip link add outer address 02:00:00:00:01:01 type vxlan \
                 id 1 dstport {OUTER_PORT} local 127.0.0.1 nolearning
             ip link add inner type vxlan id 2 dstport {INNER_PORT} local {ip} nolearning
             for it in outer inner; do ip link set $it addrgenmode none up; done
             ip addr add {ip}/24 dev outer
             {}",
            Offload::ForwardedMerging.on("inner")
        ));
        Self {
            sender: UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(),
            capture: capture("inner"),
        }
    }

    /// Has the kernel merge frames.
    pub(crate) fn merge(&self, frames: &[Vec<u8>]) -> Vec<Received> {
        assert!(frames.len() <= MAX_FRAMES);
        let mut datagrams: Vec<_> = frames.iter().map(|frame| datagram(frame)).collect();
        let len = 1 + datagrams.iter().map(Vec::len).max().unwrap_or_default();
        for datagram in &mut datagrams {
            datagram.resize(len, 0);
        }
        setsockopt(&self.sender, sockopt::UdpGsoSegment, &(len as i32)).unwrap();
        let to = (Ipv4Addr::LOCALHOST, OUTER_PORT);
        self.sender.send_to(&datagrams.concat(), to).unwrap();
        let mut received = Vec::new();
        let mut left = frames.len();
        while left > 0 {
            if let Some(one) = self.receive() {
                left -= one.count();
                received.push(one);
                continue;
            }
            let mut waited = [PollFd::new(self.capture.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut waited, PATIENCE).unwrap();
            assert_ne!(ready, 0, "{left} of {} frames have not come", frames.len());
        }
        received
    }

    fn receive(&self) -> Option<Received> {
        let mut buffer = vec![0; 66_000];
        let (len, from) = match recvfrom::<LinkAddr>(self.capture.as_raw_fd(), &mut buffer) {
            Ok(received) => received,
            Err(Errno::EAGAIN) => return None,
            Err(error) => panic!("{error}"),
        };
        // What the kernel itself has to say on a new interface is not looked for.
        let from = from.map(|from| from.pkttype());
        if from == Some(libc::PACKET_OUTGOING) {
            return self.receive();
        }
        Some(Received {
            virtio: Header::parse(&buffer).unwrap(),
            bytes: buffer[virtio::LEN..len].to_vec(),
        })
    }
}

/// A socket that gets the frames of an interface with their virtio-net headers.
fn capture(interface: &str) -> Socket {
    let link = getifaddrs()
        .unwrap()
        .filter(|row| row.interface_name == interface)
        .find_map(|row| row.address?.as_link_addr().copied())
        .unwrap();
    let every = i32::from((libc::ETH_P_ALL as u16).to_be());
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(every.into())).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.set_recv_buffer_size(1 << 20).unwrap();
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one `int`, which lives until the call returns.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    Errno::result(set).unwrap();
    bind(socket.as_raw_fd(), &link).unwrap();
    socket
}

/// The payload of an outer datagram.
fn datagram(frame: &[u8]) -> Vec<u8> {
    let [to, from] = MACS;
    let [ip, peer] = IPS;
    let mut datagram = VNI[0].to_vec();
    PacketBuilder::ethernet2(from, to)
        .ipv4(peer.octets(), ip.octets(), 64)
        .udp(INNER_PORT, INNER_PORT)
        .write(&mut datagram, &[&VNI[1], frame].concat())
        .unwrap();
    datagram
}
