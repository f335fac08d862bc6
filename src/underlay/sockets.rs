//! A worker's sockets of the tunnel, of each IP version that it has an end of.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use muslin_encap::offload::batch::{Message, SendBatch};
use muslin_stack::addresses::Addresses;
use muslin_stack::control::lease::TunnelPorts;
use nix::errno::Errno;
use socket2::SockRef;

use super::batch::Received;
use super::queues::QUEUES;
use super::socket::Options;
use super::udp::{Adopted, Backlog, Route, TunnelSocket};

/// A worker's sockets. A node has one set of IPv4 and one of IPv6: what pods send by an IP version goes to
/// other nodes by the same, unless the tunnel is WireGuard's.
#[derive(Debug, Default)]
pub struct TunnelSockets {
    ipv4: Option<TunnelSocket>,
    ipv6: Option<TunnelSocket>,
}

/// The ends of a tunnel with these addresses.
pub(crate) fn ends(addresses: Addresses, ports: TunnelPorts) -> impl Iterator<Item = SocketAddr> {
    let all: Vec<_> = addresses.iter().collect();
    all.into_iter()
        .map(move |ip| SocketAddr::new(ip, ports.of(ip)))
}

/// The same for people; addresses alone where the tunnel has no port.
pub(crate) fn describe_ends(addresses: Addresses, ports: TunnelPorts) -> String {
    let describe = |end: SocketAddr| match end.port() {
        0 => end.ip().to_string(),
        _ => end.to_string(),
    };
    let words: Vec<String> = ends(addresses, ports).map(describe).collect();
    words.join(", ")
}

impl From<TunnelSocket> for TunnelSockets {
    fn from(socket: TunnelSocket) -> Self {
        let (ipv4, ipv6) = match socket.is_ipv6() {
            true => (None, Some(socket)),
            false => (Some(socket), None),
        };
        Self { ipv4, ipv6 }
    }
}

impl TunnelSockets {
    /// Takes what the other one has in place of its own of the same IP version.
    pub(crate) fn take_over(&mut self, other: Self) {
        self.ipv4 = other.ipv4.or(self.ipv4.take());
        self.ipv6 = other.ipv6.or(self.ipv6.take());
    }

    /// Copies of its descriptors, for another process.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub(crate) fn copy(&self) -> io::Result<Adopted> {
        let mut all = Adopted {
            queues: Vec::new(),
            others: Vec::new(),
        };
        for socket in self.all() {
            let its = socket.copy()?;
            all.queues.extend(its.queues);
            all.others.extend(its.others);
        }
        Ok(all)
    }

    /// The sockets of a worker of another process.
    ///
    /// # Errors
    /// `InvalidInput` if there are none.
    pub(crate) fn adopt(adopted: Adopted, options: Options) -> io::Result<Self> {
        let mut all = Self::default();
        for adopted in adopted.by_version() {
            all.take_over(TunnelSocket::adopt(adopted, options)?.into());
        }
        match all.queue_numbers() {
            0 => Err(io::ErrorKind::InvalidInput.into()),
            _ => Ok(all),
        }
    }

    /// Whether trains may leave.
    pub fn has_gso(&self) -> bool {
        self.all().all(TunnelSocket::has_gso)
    }

    /// Whether trains may arrive.
    pub fn has_gro(&self) -> bool {
        self.all().any(TunnelSocket::has_gro)
    }

    /// The way to a peer for a flow with this hash; nothing if there is no socket of its IP version.
    pub fn route(&self, destination: SocketAddr, flow: u32) -> Option<Route> {
        Some(self.of(destination)?.route(destination, flow))
    }

    /// The descriptors of its queues with their numbers, which those of IPv6 have behind all of IPv4.
    pub fn queues(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let ipv4 = self.ipv4.iter().flat_map(TunnelSocket::queues);
        let ipv6 = self.ipv6.iter().flat_map(TunnelSocket::queues);
        (0..).zip(ipv4).chain((QUEUES..).zip(ipv6))
    }

    /// How many numbers of queues there are.
    pub fn queue_numbers(&self) -> usize {
        self.queues().last().map_or(0, |(last, _)| last + 1)
    }

    fn all(&self) -> impl Iterator<Item = &TunnelSocket> {
        self.ipv4.iter().chain(&self.ipv6)
    }

    fn of(&self, destination: SocketAddr) -> Option<&TunnelSocket> {
        match destination {
            SocketAddr::V4(_) => self.ipv4.as_ref(),
            SocketAddr::V6(_) => self.ipv6.as_ref(),
        }
    }

    /// Datagrams that queues have lost since they were last asked.
    pub fn take_losses(&self) -> u64 {
        self.all().map(TunnelSocket::take_losses).sum()
    }

    /// What waits in its queues.
    pub(crate) fn backlog(&self) -> Backlog {
        let mut whole = Backlog::default();
        for socket in self.all() {
            whole.add(socket.backlog());
        }
        whole
    }

    /// Receives datagrams from the queue of a number and returns whether there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    pub fn receive(&self, queue: usize, into: &mut Received) -> io::Result<bool> {
        let (socket, queue) = match queue.checked_sub(QUEUES) {
            Some(queue) => (&self.ipv6, queue),
            None => (&self.ipv4, queue),
        };
        let socket = socket.as_ref().ok_or(io::ErrorKind::NotFound)?;
        socket.receive(queue, into)
    }

    /// Sends a whole batch, and reports which messages were lost for which reason.
    pub fn send(&self, batch: &SendBatch<'_, Route>, mut lost: impl FnMut(&Message<Route>, Errno)) {
        let is_same = |one: &Message<Route>, other: &Message<Route>| {
            one.key.destination().is_ipv4() == other.key.destination().is_ipv4()
        };
        for messages in batch.messages().chunk_by(is_same) {
            let socket = messages
                .first()
                .and_then(|it| self.of(it.key.destination()));
            match socket {
                Some(socket) => socket.send(batch, messages, &mut lost),
                None => messages.iter().for_each(|it| lost(it, Errno::EAFNOSUPPORT)),
            }
        }
    }

    /// Sends one datagram from the tunnel's own port.
    ///
    /// # Errors
    /// `WouldBlock` if the send queue is full, `Unsupported` if there is no socket of that IP version,
    /// else what the kernel refuses it for.
    pub fn send_one(&self, datagram: &[u8], destination: SocketAddr) -> io::Result<()> {
        let socket = self.of(destination);
        let socket = socket.ok_or(io::ErrorKind::Unsupported)?;
        socket.send_one(datagram, destination)
    }
}

impl Adopted {
    /// Whether these are the sockets of a tunnel with these ends.
    pub(crate) fn has_ends(&self, all: &[SocketAddr], options: Options) -> bool {
        let at = |socket: &std::os::fd::OwnedFd| {
            let address = SockRef::from(socket).local_addr().ok()?;
            address.as_socket()
        };
        let ends_at = |end| self.queues.iter().filter(|it| at(it) == Some(end)).count();
        self.queues.len() == QUEUES * all.len()
            && self.others.len() == options.source_ports * all.len()
            && all.iter().all(|end| ends_at(*end) == QUEUES)
    }

    /// Those of each IP version of which there are some.
    fn by_version(self) -> impl Iterator<Item = Self> {
        let is_ipv6 = |socket: &std::os::fd::OwnedFd| {
            let address = SockRef::from(socket).local_addr();
            address.is_ok_and(|address| address.is_ipv6())
        };
        let (queues_v6, queues): (Vec<_>, Vec<_>) = self.queues.into_iter().partition(is_ipv6);
        let (others_v6, others): (Vec<_>, Vec<_>) = self.others.into_iter().partition(is_ipv6);
        let ipv4 = Self { queues, others };
        let ipv6 = Self {
            queues: queues_v6,
            others: others_v6,
        };
        [ipv4, ipv6].into_iter().filter(|it| !it.queues.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use muslin_encap::offload::batch::Queued;
    use muslin_encap::offload::split::Checksums;
    use muslin_encap::offload::virtio::Header;
    use muslin_encap::tunnel::Format;

    use super::*;

    const OPTIONS: Options = Options {
        format: Format::Vxlan,
        source_ports: 2,
        gso: true,
        gro: true,
    };

    fn both() -> TunnelSockets {
        let mut all = TunnelSockets::default();
        for end in ["127.0.0.1:0", "[::1]:0"] {
            let bound = TunnelSocket::bind(end.parse().unwrap(), OPTIONS, 1);
            all.take_over(bound.unwrap().pop().unwrap().into());
        }
        all
    }

    fn address(socket: Option<&TunnelSocket>) -> SocketAddr {
        socket.unwrap().address().unwrap()
    }

    #[test]
    fn a_batch_for_peers_of_both_ip_versions_arrives() {
        let (one, other) = (both(), both());
        let to = [address(other.ipv4.as_ref()), address(other.ipv6.as_ref())];
        let packets: Vec<(SocketAddr, Vec<u8>)> = (0..40u8)
            .map(|i| (to[usize::from(i / 4 % 2)], vec![i; 1200]))
            .collect();
        let mut batch = SendBatch::new(&mut [], one.has_gso());
        for (to, packet) in &packets {
            let queued = Queued {
                key: one.route(*to, 5).unwrap(),
                packet,
                network: 0,
                offload: Header::default(),
                checksums: Checksums::Complete,
            };
            batch.push(&queued, &mut None).unwrap().unwrap();
        }
        one.send(&batch, |_, error| panic!("{error}"));
        let mut received = Received::default();
        let mut arrived = Vec::new();
        let end = Instant::now() + Duration::from_secs(20);
        while arrived.len() < packets.len() && Instant::now() < end {
            for (queue, _) in other.queues() {
                if other.receive(queue, &mut received).is_ok() {
                    let its = received.datagrams();
                    let its = its.map(|(from, it)| (from.is_ipv6(), it.to_vec()));
                    arrived.extend(its);
                }
            }
        }
        arrived.sort_by_key(|(_, packet)| packet[0]);
        let expected = packets.iter().map(|(to, it)| (to.is_ipv6(), it.clone()));
        assert_eq!(arrived, expected.collect::<Vec<_>>());
    }

    #[test]
    fn without_a_socket_of_its_ip_version_nothing_is_sent() {
        let mut both = both();
        let to = address(both.ipv6.as_ref());
        both.ipv6 = None;
        assert_eq!(both.route(to, 1), None);
        let refused = both.send_one(&[1], to).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
        assert_eq!(both.queue_numbers(), QUEUES);
    }

    #[test]
    fn both_go_on_in_another_process() {
        let one = both();
        let both = [address(one.ipv4.as_ref()), address(one.ipv6.as_ref())];
        assert_eq!(one.queue_numbers(), 2 * QUEUES);
        let copies = one.copy().unwrap();
        assert!(copies.has_ends(&both, OPTIONS));
        let other = [both[0], SocketAddr::new(both[1].ip(), both[0].port())];
        assert!(!copies.has_ends(&other, OPTIONS), "other ports");
        let again = TunnelSockets::adopt(copies, OPTIONS).unwrap();
        for (mine, its) in [(&one.ipv4, &again.ipv4), (&one.ipv6, &again.ipv6)] {
            assert_eq!(address(mine.as_ref()), address(its.as_ref()));
        }
        let only = TunnelSockets {
            ipv4: one.ipv4,
            ipv6: None,
        };
        let only = only.copy().unwrap();
        assert!(only.has_ends(&both[..1], OPTIONS));
        assert!(!only.has_ends(&both, OPTIONS));
    }

    #[test]
    fn each_ip_version_may_have_a_port_of_its_own() {
        let addresses = "192.0.2.1,2001:db8::1".parse().unwrap();
        for (ipv4, ipv6, text) in [
            (0, 0, "192.0.2.1, 2001:db8::1"),
            (8472, 8472, "192.0.2.1:8472, [2001:db8::1]:8472"),
            (51820, 51821, "192.0.2.1:51820, [2001:db8::1]:51821"),
        ] {
            assert_eq!(describe_ends(addresses, TunnelPorts { ipv4, ipv6 }), text);
        }
    }

    #[test]
    fn ports_of_both_ip_versions_are_apart() {
        let free = TunnelSocket::bind("[::]:0".parse().unwrap(), OPTIONS, 1);
        let port = address(free.unwrap().first()).port();
        let bind = |end: &str| {
            let end = SocketAddr::new(end.parse().unwrap(), port);
            TunnelSocket::bind(end, OPTIONS, 2).unwrap()
        };
        let _held = (bind("::"), bind("0.0.0.0"));
    }
}
