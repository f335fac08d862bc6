//! A look at whether trains of datagrams arrive as they were sent, at a node's start.
//!
//! Kernels have garbled what they cut apart (`UDP_SEGMENT`) without a word to the sender. So a few
//! short trains go from one socket of this machine to another, and their datagrams are compared with
//! what was sent. That passes the kernel's own cutting and joining, and finds kernels and sandboxes
//! that take the options and do something else.
//!
//! What a network card or its driver does it cannot find. On the loopback interface a train stays
//! whole up to the receiving socket, which takes lengths and checksums of what it cuts for granted;
//! Linux 7.0 to 7.1.4 garble just those, and are known by their number (`has_known_defect`). A
//! hypervisor's kernel may have the defect as well.
//!
//! The way to a peer is tried by `muslin doctor`, when it is asked: echo requests that travel in
//! trains, which any kind of peer answers. A node does not do so by itself: with several workers
//! the answer comes to any of them, and a peer that limits echo requests or is slow must not cost
//! the node its trains. `--offload tap,gro` is for those whose doctor says that trains get lost.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use muslin_encap::offload::batch::{Queued, SendBatch};
use muslin_encap::offload::split::Checksums;
use muslin_encap::offload::virtio::Header;
use muslin_encap::tunnel::Format;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::batch::{self, Received};
use super::socket::{Options, Port, open};

/// How long datagrams that should be there already may take on a busy machine.
const PATIENCE: Duration = Duration::from_millis(500);
/// The trains: how many datagrams of which length, and the length of one more.
const TRAINS: [(usize, usize, usize); 4] = [
    (1, 1400, 1400),
    (5, 1400, 1400),
    (40, 1400, 33),
    (7, 101, 1),
];

/// What does not arrive as it was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Findings {
    /// Trains that this kernel cuts.
    pub(super) gso_fails: bool,
    /// Trains that it joins.
    pub(super) gro_fails: bool,
}

/// Sends trains from an address of this machine to itself, as far as the options want some.
///
/// # Errors
/// If there are no sockets.
pub(super) fn examine(address: IpAddr, options: Options) -> io::Result<Findings> {
    Pair::open(address)?.examine(options)
}

/// Two sockets.
struct Pair {
    sender: UdpSocket,
    receiver: UdpSocket,
    received: Received,
}

impl Pair {
    fn open(address: IpAddr) -> io::Result<Self> {
        let any_port = SocketAddr::new(address, 0);
        Ok(Self {
            sender: open(Format::Udp, any_port, Port::Own)?,
            receiver: open(Format::Udp, any_port, Port::Own)?,
            received: Received::default(),
        })
    }

    fn examine(&mut self, options: Options) -> io::Result<Findings> {
        let mut findings = Findings::default();
        let wanted = options.gso && getsockopt(&self.sender, sockopt::UdpGsoSegment).is_ok();
        // Where datagrams do not arrive singly either, nothing can be said of trains.
        if !wanted || !self.carries_all(false)? {
            return Ok(findings);
        }
        findings.gso_fails = !self.carries_all(true)?;
        let joins = !findings.gso_fails && options.gro;
        if joins && setsockopt(&self.receiver, sockopt::UdpGroSegment, &true).is_ok() {
            findings.gro_fails = !self.carries_all(true)?;
        }
        Ok(findings)
    }

    /// Whether all datagrams arrive as they were sent, in trains or one by one.
    fn carries_all(&mut self, trains: bool) -> io::Result<bool> {
        for (index, (count, len, last)) in TRAINS.into_iter().enumerate() {
            let lens = std::iter::repeat_n(len, count).chain([last]);
            let datagrams: Vec<_> = lens
                .enumerate()
                .map(|(place, len)| content(index * 64 + place, len))
                .collect();
            if !self.carries(&datagrams, trains)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn carries(&mut self, datagrams: &[Vec<u8>], trains: bool) -> io::Result<bool> {
        let mut batch = SendBatch::new(&mut [], trains);
        for packet in datagrams {
            let queued = Queued {
                key: (),
                packet,
                network: 0,
                offload: Header::default(),
                checksums: Checksums::Complete,
            };
            let pushed = batch.push(&queued, &mut None);
            if !matches!(pushed, Ok(Ok(()))) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        }
        let destination = self.receiver.local_addr()?;
        let mut rest = batch.messages();
        while !rest.is_empty() {
            match batch::send(self.sender.as_fd(), &batch, rest, |()| destination) {
                Ok(sent) => rest = &rest[sent.min(rest.len())..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Ok(false),
            }
        }
        Ok(self.receive(datagrams.len())? == datagrams)
    }

    /// So many datagrams of the sender's, or those that arrive in time.
    fn receive(&mut self, count: usize) -> io::Result<Vec<Vec<u8>>> {
        let from = self.sender.local_addr()?;
        let end = Instant::now() + PATIENCE;
        let mut all = Vec::new();
        while all.len() < count {
            let left = end.saturating_duration_since(Instant::now());
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut ready = [PollFd::new(self.receiver.as_fd(), PollFlags::POLLIN)];
            if left.is_zero() || poll(&mut ready, wait)? == 0 {
                break;
            }
            batch::receive(self.receiver.as_fd(), &mut self.received)?;
            let datagrams = self.received.datagrams();
            let its = datagrams.filter(|(source, _)| *source == from);
            all.extend(its.map(|(_, datagram)| datagram.to_vec()));
        }
        Ok(all)
    }
}

/// Bytes that are different in each datagram and at each place.
fn content(number: usize, len: usize) -> Vec<u8> {
    let bytes = (0..len).map(|place| number * 131 + place * 7 + place / 251);
    bytes.map(|byte| byte as u8).collect()
}

#[cfg(test)]
mod tests {
    use socket2::SockFilter;

    use super::*;

    const UDP_HEADER_LEN: u32 = 8;

    const ALL: Options = Options {
        format: Format::Udp,
        source_ports: 0,
        gso: true,
        gro: true,
    };

    const LOCALHOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    /// What is found where the kernel makes this of messages that are longer than so many bytes.
    fn examine_where(longer: u32, becomes: u32) -> Findings {
        // BPF: load the message's length; behind the next instruction if it is not greater; return
        // the length it is cut to.
        let filter = [
            SockFilter::new(0x80, 0, 0, 0),
            SockFilter::new(0x25, 0, 1, longer + UDP_HEADER_LEN),
            SockFilter::new(0x06, 0, 0, becomes),
            SockFilter::new(0x06, 0, 0, u32::MAX),
        ];
        let mut pair = Pair::open(LOCALHOST).unwrap();
        let receiver = socket2::SockRef::from(&pair.receiver);
        receiver.attach_filter(&filter).unwrap();
        pair.examine(ALL).unwrap()
    }

    #[test]
    fn this_kernel_keeps_its_word() {
        let findings = examine(LOCALHOST, ALL).unwrap();
        assert_eq!(findings, Findings::default());
    }

    #[test]
    fn what_becomes_of_trains_is_told_from_what_becomes_of_datagrams() {
        let fails = Findings {
            gso_fails: false,
            gro_fails: true,
        };
        assert_eq!(examine_where(1400, 0), fails, "trains are lost");
        assert_eq!(examine_where(1400, 2000), fails, "trains are cut off");
        assert_eq!(examine_where(65_535, 0), Findings::default());
        assert_eq!(examine_where(0, 0), Findings::default(), "all is lost");
    }
}
