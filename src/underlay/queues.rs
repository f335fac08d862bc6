//! Queues of what comes from other nodes: which of the sockets that share a tunnel's port, or an
//! uplink, a packet comes to.
//!
//! In one queue whoever sends most stands before all others: one pod's flood makes those of a whole
//! cluster wait for as long as the queue is, and lose what comes while it is full. So each worker has
//! several, and reads them in turn. What a pod sends is in one of them, by the inner packet's source:
//! a flood waits for itself, however many flows it is in.

use std::io;
use std::net::SocketAddr;

use muslin_encap::tunnel::Format;
use nix::libc::{self, sock_filter};

use super::bpf::{alu, alu_x, in_ip_header, load, statement, x_from_a};
use crate::host::option;

/// Queues of a worker; a power of two.
pub(super) const QUEUES: usize = 16;

/// Where the end of the source address is in an outer IP header, and then the source port. There are no
/// options or extension headers as a rule; what is there otherwise is as good to tell flows apart.
const OUTER: (u32, u32) = (12, 20);
const OUTER_V6: (u32, u32) = (20, 40);
/// Where the source address is in an inner IPv4 header.
const INNER_SOURCE: usize = 12;
/// Where the middle of the source address is in an inner IPv6 header, by which nodes differ, and its end,
/// by which a node's pods do.
const INNER_SOURCE_V6: (usize, usize) = (12, 20);
/// Where the receiver's index is in a message of WireGuard: what is inside nobody sees, but all that a peer
/// sends in a session has the same.
const RECEIVER: usize = 4;
/// An odd number whose multiples look random (the golden ratio's).
const MIX: u32 = 0x9e37_79b1;

/// Has the kernel choose among all sockets that share the port of this one, in the order they were
/// bound in: [`QUEUES`] for each worker.
///
/// # Errors
/// If the kernel cannot. It chooses by the outer addresses and ports then.
pub(super) fn spread(
    socket: &std::net::UdpSocket,
    format: Format,
    workers: usize,
) -> io::Result<()> {
    let program = match socket.local_addr()? {
        SocketAddr::V4(_) => program(format, workers as u32),
        SocketAddr::V6(_) => program_v6(format, workers as u32),
    };
    option::attach_reuseport_program(socket, &program)
}

/// A program that returns the number of a socket. A flow has the worker that its outer source port
/// says (RFC 7348 section 5). What is too short for an inner header is in the first queue.
fn program(format: Format, workers: u32) -> Vec<sock_filter> {
    let source = match format {
        Format::WireGuard => RECEIVER,
        _ => format.network_offset() + INNER_SOURCE,
    };
    worker(OUTER, workers)
        .into_iter()
        .chain(queue_of_worker(source as u32, QUEUES as u32))
        .collect()
}

/// The same where the outer and the inner packet are of IPv6.
fn program_v6(format: Format, workers: u32) -> Vec<sock_filter> {
    if format == Format::WireGuard {
        let queue = queue_of_worker(RECEIVER as u32, QUEUES as u32);
        return worker(OUTER_V6, workers).into_iter().chain(queue).collect();
    }
    let (node, pod) = INNER_SOURCE_V6;
    let [node, pod] = [node, pod].map(|at| (format.network_offset() + at) as u32);
    worker(OUTER_V6, workers)
        .into_iter()
        .chain(queue_of_worker_v6((node, pod), QUEUES as u32))
        .collect()
}

/// The begin of a program: it loads the number of a worker, by the end of the outer source address and the
/// port at these offsets.
fn worker((source, port): (u32, u32), workers: u32) -> [sock_filter; 7] {
    [
        load(libc::BPF_W, in_ip_header(source)),
        x_from_a(),
        load(libc::BPF_H, in_ip_header(port)),
        alu_x(libc::BPF_XOR),
        alu(libc::BPF_MUL, MIX),
        alu(libc::BPF_RSH, 16),
        alu(libc::BPF_MOD, workers.max(1)),
    ]
}

/// The end of a program whose accumulator has a worker's number: it returns that of one of the
/// worker's `queues`, a power of two, by the address at offset `source`. Pods with consecutive
/// addresses, as a node gives them out, are in different ones.
pub(super) fn queue_of_worker(source: u32, queues: u32) -> [sock_filter; 12] {
    [
        alu(libc::BPF_MUL, queues),
        statement(libc::BPF_ST, 0),
        load(libc::BPF_W, source),
        x_from_a(),
        alu(libc::BPF_RSH, 8),
        alu(libc::BPF_MUL, MIX),
        alu_x(libc::BPF_ADD),
        alu(libc::BPF_AND, queues - 1),
        x_from_a(),
        statement(libc::BPF_LD | libc::BPF_MEM, 0),
        alu_x(libc::BPF_ADD),
        statement(libc::BPF_RET | libc::BPF_A, 0),
    ]
}

/// The same by what nodes differ in and what a node's pods do, at these offsets of an IPv6 header.
pub(super) fn queue_of_worker_v6((node, pod): (u32, u32), queues: u32) -> [sock_filter; 13] {
    [
        alu(libc::BPF_MUL, queues),
        statement(libc::BPF_ST, 0),
        load(libc::BPF_W, node),
        alu(libc::BPF_MUL, MIX),
        alu(libc::BPF_RSH, 16),
        x_from_a(),
        load(libc::BPF_W, pod),
        alu_x(libc::BPF_ADD),
        alu(libc::BPF_AND, queues - 1),
        x_from_a(),
        statement(libc::BPF_LD | libc::BPF_MEM, 0),
        alu_x(libc::BPF_ADD),
        statement(libc::BPF_RET | libc::BPF_A, 0),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};
    use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket as Plain};

    use super::*;
    use crate::underlay::{Options, Received, TunnelSocket};

    const WORKERS: usize = 2;

    /// A tunnel's sockets on one machine, and which of them what a pod sends comes to.
    struct Tunnel {
        workers: Vec<TunnelSocket>,
        format: Format,
    }

    impl Tunnel {
        fn open(format: Format) -> Self {
            Self::open_at("127.0.0.1:0", format)
        }

        fn open_at(end: &str, format: Format) -> Self {
            let options = Options {
                format,
                source_ports: 0,
                gso: true,
                gro: true,
            };
            let workers = TunnelSocket::bind(end.parse().unwrap(), options, WORKERS);
            let workers = workers.unwrap();
            Self { workers, format }
        }

        /// The worker and the queue.
        fn place_of(&self, flow: &Plain, pod: Ipv4Addr) -> (usize, usize) {
            let mut packet = vec![0; self.format.network_offset() + INNER_SOURCE];
            packet.extend(pod.octets());
            packet.extend([7; 40]);
            self.place_of_bytes(flow, &packet)
        }

        fn place_of_bytes(&self, flow: &Plain, packet: &[u8]) -> (usize, usize) {
            let address = self.workers[0].address().unwrap();
            flow.send_to(packet, address).unwrap();
            let mut received = Received::default();
            let mut places = Vec::new();
            for (worker, socket) in self.workers.iter().enumerate() {
                for queue in 0..QUEUES {
                    while socket.receive(queue, &mut received).is_ok() {
                        let all: Vec<_> = received.datagrams().map(|(_, it)| it.to_vec()).collect();
                        assert_eq!(all, [packet]);
                        places.push((worker, queue));
                    }
                }
            }
            assert_eq!(places.len(), 1, "{places:?}");
            places[0]
        }
    }

    fn flow() -> Plain {
        Plain::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
    }

    #[test]
    fn a_pod_has_a_queue_and_a_flow_a_worker() {
        for format in [Format::Vxlan, Format::Udp] {
            let tunnel = Tunnel::open(format);
            let flows: Vec<_> = (0..40).map(|_| flow()).collect();
            let mut queues = HashMap::<_, HashSet<_>>::new();
            let mut workers = HashMap::<_, HashSet<_>>::new();
            for last in 2..2 + QUEUES as u8 {
                for (number, flow) in flows.iter().enumerate() {
                    let pod = Ipv4Addr::new(10, 244, 7, last);
                    let (worker, queue) = tunnel.place_of(flow, pod);
                    queues.entry(pod).or_default().insert(queue);
                    workers.entry(number).or_default().insert(worker);
                }
            }
            assert!(queues.values().all(|its| its.len() == 1), "{queues:?}");
            let all: HashSet<_> = queues.values().flatten().collect();
            assert_eq!(all.len(), QUEUES, "neighbours share no queue");
            assert!(workers.values().all(|its| its.len() == 1), "{workers:?}");
            let all: HashSet<_> = workers.values().flatten().collect();
            assert_eq!(all.len(), WORKERS);
        }
    }

    #[test]
    fn pods_of_different_nodes_are_spread_as_well() {
        let tunnel = Tunnel::open(Format::Vxlan);
        let flow = flow();
        let places = (0..64).map(|node| tunnel.place_of(&flow, Ipv4Addr::new(10, 244, node, 2)));
        assert!(places.collect::<HashSet<_>>().len() > QUEUES / 2);
    }

    #[test]
    fn ipv6_has_the_same_queues() {
        let tunnel = Tunnel::open_at("[::1]:0", Format::Vxlan);
        let flows: Vec<_> = (0..40)
            .map(|_| Plain::bind((Ipv6Addr::LOCALHOST, 0)).unwrap())
            .collect();
        let place = |flow: &Plain, pod: Ipv6Addr| {
            let mut packet = vec![0; tunnel.format.network_offset() + 8];
            packet.extend(pod.octets());
            packet.extend([7; 40]);
            tunnel.place_of_bytes(flow, &packet)
        };
        let mut queues = HashMap::<_, HashSet<_>>::new();
        let mut workers = HashMap::<_, HashSet<_>>::new();
        for last in 2..2 + QUEUES as u16 {
            for (number, flow) in flows.iter().enumerate() {
                let pod = Ipv6Addr::new(0xfd00, 0, 0, 7, 0, 0, 0, last);
                let (worker, queue) = place(flow, pod);
                queues.entry(pod).or_default().insert(queue);
                workers.entry(number).or_default().insert(worker);
            }
        }
        assert!(queues.values().all(|its| its.len() == 1), "{queues:?}");
        let all: HashSet<_> = queues.values().flatten().collect();
        assert_eq!(all.len(), QUEUES, "neighbours share no queue");
        assert!(workers.values().all(|its| its.len() == 1), "{workers:?}");
        let all: HashSet<_> = workers.values().flatten().collect();
        assert_eq!(all.len(), WORKERS);
        let nodes =
            (0..64).map(|node| place(&flows[0], Ipv6Addr::new(0xfd00, 0, 0, node, 0, 0, 0, 2)));
        assert!(nodes.collect::<HashSet<_>>().len() > QUEUES / 2);
    }

    #[test]
    fn what_is_too_short_comes_too() {
        let tunnel = Tunnel::open(Format::Vxlan);
        for len in [0, 1, 8, 37] {
            assert_eq!(tunnel.place_of_bytes(&flow(), &vec![9; len]), (0, 0));
        }
    }

    #[test]
    fn a_flood_leaves_room_for_others() {
        let tunnel = Tunnel::open(Format::Vxlan);
        let (socket, flow) = (&tunnel.workers[0], flow());
        let address = socket.address().unwrap();
        let mut packet = vec![0; 1400];
        packet[34..38].copy_from_slice(&[10, 244, 7, 2]);
        for _ in 0..40_000 {
            flow.send_to(&packet, address).unwrap();
        }
        packet[34..38].copy_from_slice(&[10, 244, 7, 3]);
        flow.send_to(&packet, address).unwrap();
        let mut received = Received::default();
        let mut has_other = false;
        for worker in &tunnel.workers {
            for queue in 0..QUEUES {
                while worker.receive(queue, &mut received).is_ok() {
                    has_other |= received.datagrams().any(|(_, it)| it == packet);
                }
            }
        }
        assert!(has_other);
    }
}
