//! The packet sockets of all workers as one group (`PACKET_FANOUT`, packet(7)): the kernel looks at a
//! frame once, and gives it to one of them.

use std::io;

use muslin_stack::addresses::Nets;
use nix::errno::Errno;
use nix::libc::{self, c_int, c_uint, sock_filter};

use super::filter;
use super::packet_socket::{Link, PacketSocket};
use crate::error::errno;
use crate::host::option;
use crate::underlay::bpf::{
    NOTHING, alu, alu_x, ancillary, in_ip_header, load, statement, x_from_a,
};
use crate::underlay::queues::{QUEUES, queue_of_worker, queue_of_worker_v6};

/// The most sockets of a group in kernels before 5.10 (`PACKET_FANOUT_MAX`).
const MAX_SOCKETS: usize = 256;
/// Where the addresses are in an IPv4 header.
const SOURCE: u32 = 12;
const DESTINATION: u32 = 16;
/// Where in an IPv6 header the parts of addresses are by which nodes differ, and those by which pods do.
const SOURCE_V6: (u32, u32) = (12, 20);
const DESTINATION_V6: (u32, u32) = (28, 36);

/// Opens sockets on a link for what is sent to the subnets: for each of the workers as many, in the
/// order of their queues.
///
/// # Errors
/// EPERM without `CAP_NET_RAW`, `EAFNOSUPPORT` if there are no packet sockets.
pub(super) fn open(
    link: Link,
    subnets: Nets,
    workers: usize,
) -> io::Result<Vec<Vec<PacketSocket>>> {
    let queues = queues_of(workers);
    // Until all are in the group each would get every frame.
    let open = || PacketSocket::open(link, &[NOTHING]);
    let first = open()?;
    let group = Group::begin(&first)?;
    option::attach_fanout_program(&first, &program(workers, queues))?;
    let mut sockets = vec![first];
    for _ in 1..workers * queues {
        let socket = open()?;
        group.join(&socket)?;
        sockets.push(socket);
    }
    let filter = filter::program(subnets);
    sockets.iter().try_for_each(|it| it.set_filter(&filter))?;
    let mut sockets = sockets.into_iter();
    let each = (0..workers).map(|_| sockets.by_ref().take(queues).collect());
    Ok(each.collect())
}

/// Sockets for each of so many workers; a power of two.
fn queues_of(workers: usize) -> usize {
    let most = MAX_SOCKETS / workers.max(1);
    // The largest power of two that is not larger.
    most.checked_ilog2().map_or(1, |log| QUEUES.min(1 << log))
}

/// A group that sockets join.
struct Group {
    /// As the option has it: the number, and the kind above it.
    name: c_int,
}

impl Group {
    fn begin(first: &PacketSocket) -> io::Result<Self> {
        let begin = |flags: c_uint| {
            let kind = libc::PACKET_FANOUT_CBPF | libc::PACKET_FANOUT_FLAG_UNIQUEID | flags;
            // Any number will do; the kernel then names the group.
            let name = (kind << 16).cast_signed();
            option::set(first, libc::SOL_PACKET, libc::PACKET_FANOUT, name)
        };
        let flags = libc::PACKET_FANOUT_FLAG_IGNORE_OUTGOING;
        let flags = match begin(flags) {
            Ok(()) => flags,
            // Linux 5.18 has it. The filter refuses what goes out, too.
            Err(error) if errno(&error) == Errno::EINVAL => {
                begin(0)?;
                0
            }
            Err(error) => return Err(error),
        };
        let [value] = option::get(first, libc::SOL_PACKET, libc::PACKET_FANOUT)?;
        let kind = libc::PACKET_FANOUT_CBPF | flags;
        let name = value & 0xffff | kind << 16;
        Ok(Self {
            name: name.cast_signed(),
        })
    }

    fn join(&self, socket: &PacketSocket) -> io::Result<()> {
        option::set(socket, libc::SOL_PACKET, libc::PACKET_FANOUT, self.name)
    }
}

/// A program that returns the number of a socket. A flow has the worker that its addresses say, so
/// that its fragments stay together, and both its directions. ARP comes to any.
fn program(workers: usize, queues: usize) -> Vec<sock_filter> {
    let of_ipv6 = program_v6(workers, queues);
    let is_ipv6 = [
        load(libc::BPF_W, ancillary(libc::SKF_AD_PROTOCOL)),
        sock_filter {
            // It is short.
            jf: of_ipv6.len() as u8,
            ..statement(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                libc::ETH_P_IPV6.cast_unsigned(),
            )
        },
    ];
    let of_ipv4 = program_v4(workers, queues);
    is_ipv6.into_iter().chain(of_ipv6).chain(of_ipv4).collect()
}

fn program_v6(workers: usize, queues: usize) -> Vec<sock_filter> {
    let part = |at| load(libc::BPF_W, in_ip_header(at));
    let worker = [
        part(SOURCE_V6.0),
        x_from_a(),
        part(DESTINATION_V6.0),
        alu_x(libc::BPF_XOR),
        x_from_a(),
        part(SOURCE_V6.1),
        alu_x(libc::BPF_XOR),
        x_from_a(),
        part(DESTINATION_V6.1),
        alu_x(libc::BPF_XOR),
        alu(libc::BPF_MOD, workers.max(1) as u32),
    ];
    let (node, pod) = SOURCE_V6;
    let places = (in_ip_header(node), in_ip_header(pod));
    let queue = queue_of_worker_v6(places, queues as u32);
    worker.into_iter().chain(queue).collect()
}

fn program_v4(workers: usize, queues: usize) -> Vec<sock_filter> {
    let worker = [
        load(libc::BPF_W, in_ip_header(SOURCE)),
        x_from_a(),
        load(libc::BPF_W, in_ip_header(DESTINATION)),
        alu_x(libc::BPF_XOR),
        // There are as many as the machine has processors.
        alu(libc::BPF_MOD, workers.max(1) as u32),
    ];
    let queue = queue_of_worker(in_ip_header(SOURCE), queues as u32);
    worker.into_iter().chain(queue).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_as_many_sockets_as_kernels_take() {
        for workers in 1..=MAX_SOCKETS {
            let queues = queues_of(workers);
            assert!(queues.is_power_of_two() && queues <= QUEUES);
            assert!(workers * queues <= MAX_SOCKETS);
            assert!(queues == QUEUES || 2 * workers * queues > MAX_SOCKETS);
        }
        assert_eq!(queues_of(1000), 1);
    }
}
