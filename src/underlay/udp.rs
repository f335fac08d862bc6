//! The tunnel's sockets: some that datagrams arrive at (see [`queues`]), and some that they leave
//! from, so that flows differ in their outer source port as those of a kernel's VXLAN device do (RFC
//! 7348 section 5): networks spread them over links, and receivers over queues, by it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use muslin_encap::offload::batch::{Message, SendBatch};
use muslin_encap::tunnel::Format;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tracing::{debug, warn};

use super::batch::{self, Received};
use super::bpf::{NOTHING, attach_filter};
use super::messages::Overflow;
use super::queues;
use super::self_test::{self, Findings};
use super::socket::{Options, Port, discover_mtu, open, share_port};
use crate::error::errno;
use crate::host::option;

/// How long a router may take to say that a datagram is too large.
const ANSWER: Duration = Duration::from_millis(300);
/// Bytes of an IPv4 and a UDP header.
const UDP_HEADERS: u16 = 28;

impl Options {
    /// Without what the kernel has but does wrong.
    pub(crate) fn without_defects(mut self, address: IpAddr) -> Self {
        if self.gso && has_known_defect() {
            warn!(
                "this kernel's UDP segmentation is defective (Linux 7.0 to 7.1.4): it is not used"
            );
            self.gso = false;
        }
        match self_test::examine(address, self) {
            Ok(Findings {
                gso_fails,
                gro_fails,
            }) => {
                if gso_fails {
                    warn!(
                        "this kernel corrupts segmented UDP sends: datagrams are sent one by one instead"
                    );
                }
                if gro_fails {
                    warn!("this kernel corrupts coalesced UDP receives: UDP_GRO is not used");
                }
                self.gso &= !gso_fails;
                self.gro &= !gro_fails;
            }
            Err(error) => debug!("cannot test segmented UDP sends: {error}"),
        }
        self
    }
}

/// A datagram's destination, and the socket it leaves from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    socket: usize,
    destination: SocketAddr,
}

impl Route {
    /// The destination.
    pub(super) const fn destination(&self) -> SocketAddr {
        self.destination
    }
}

/// A tunnel's non-blocking sockets on a public address of the node: UDP, or raw IP (which requires
/// CAP_NET_RAW) where packets have no UDP header.
#[derive(Debug)]
pub struct TunnelSocket {
    /// The tunnel's own port, from which datagrams leave, too.
    main: Queue,
    /// The other sockets that share it.
    queues: Vec<Queue>,
    /// Other ports that datagrams leave from.
    others: Vec<std::net::UdpSocket>,
    /// Whether the kernel segments UDP sends, as far as that is known.
    gso: AtomicBool,
    gro: bool,
    /// Whether a warning was logged that a segmented send was too long for a path.
    warned: AtomicBool,
}

/// The descriptors of a worker's sockets, from one process to another.
#[derive(Debug)]
pub(crate) struct Adopted {
    /// Those that datagrams arrive at; the tunnel's own port is the first.
    pub(crate) queues: Vec<OwnedFd>,
    /// Those that they only leave from.
    pub(crate) others: Vec<OwnedFd>,
}

/// What waits in queues to be read, in bytes of the kernel's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// What waits.
    pub bytes: u64,
    /// What may wait.
    pub limit: u64,
}

impl Backlog {
    /// Adds other queues.
    pub(crate) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.limit += other.limit;
    }
}

/// A socket that datagrams arrive at.
#[derive(Debug)]
struct Queue {
    socket: std::net::UdpSocket,
    overflow: Overflow,
}

impl TunnelSocket {
    /// Binds as many groups of sockets; the kernel keeps a flow at one of them.
    ///
    /// # Errors
    /// `AddrInUse` if another tunnel has the port, `AddrNotAvailable` if the address is not on
    /// this machine.
    pub fn bind(address: SocketAddr, options: Options, groups: usize) -> io::Result<Vec<Self>> {
        if options.format == Format::Ipip {
            return Self::bind_raw(address, options, groups);
        }
        // Sockets that share a port share it with another node of the same user, too. So the first
        // is bound alone, which fails beside any other, and shares its port afterwards.
        let first = open(options.format, address, Port::Own)?;
        let address = first.local_addr()?;
        let options = options.without_defects(address.ip());
        share_port(&first)?;
        let mut first = Some(first);
        let shared = || open(options.format, address, Port::Shared);
        let all = (0..groups).map(|_| {
            let main = first.take().map_or_else(shared, Ok)?;
            let queues = (1..queues::QUEUES)
                .map(|_| shared())
                .collect::<io::Result<_>>()?;
            Self::group(address, options, main, queues)
        });
        let all = all.collect::<io::Result<Vec<_>>>()?;
        if let Some(first) = all.first()
            && let Err(error) = queues::spread(&first.main.socket, options.format, groups)
        {
            debug!("the kernel chooses the tunnel's queues: {error}");
        }
        Ok(all)
    }

    fn bind_raw(address: SocketAddr, options: Options, groups: usize) -> io::Result<Vec<Self>> {
        let all = (0..groups).map(|index| {
            let main = open(options.format, address, Port::Own)?;
            if index > 0 {
                // The kernel gives a packet to all raw sockets; these only send.
                attach_filter(&SockRef::from(&main), &[NOTHING])?;
            }
            Self::group(address, options, main, Vec::new())
        });
        all.collect()
    }

    /// The sockets of a worker: those that datagrams arrive at, and others to send from.
    fn group(
        address: SocketAddr,
        options: Options,
        main: std::net::UdpSocket,
        queues: Vec<std::net::UdpSocket>,
    ) -> io::Result<Self> {
        let any_port = SocketAddr::new(address.ip(), 0);
        let others = (0..options.source_ports).map(|_| {
            let other = open(options.format, any_port, Port::Own)?;
            // Nobody reads what strangers send there.
            attach_filter(&SockRef::from(&other), &[NOTHING])?;
            Ok(other)
        });
        let others = others.collect::<io::Result<_>>()?;
        Ok(Self::of(options, main, queues, others))
    }

    fn of(
        options: Options,
        main: std::net::UdpSocket,
        queues: Vec<std::net::UdpSocket>,
        others: Vec<std::net::UdpSocket>,
    ) -> Self {
        let main = Queue::new(main, options);
        let gro = main.is_joining();
        let queues = queues.into_iter().map(|socket| Queue::new(socket, options));
        Self {
            queues: queues.collect(),
            others,
            gso: (options.gso && getsockopt(&main.socket, sockopt::UdpGsoSegment).is_ok()).into(),
            gro,
            warned: false.into(),
            main,
        }
    }

    /// Copies of its descriptors, for another process.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub(crate) fn copy(&self) -> io::Result<Adopted> {
        let copy = |socket: &std::net::UdpSocket| socket.as_fd().try_clone_to_owned();
        let queues = self.all().map(|queue| copy(&queue.socket));
        Ok(Adopted {
            queues: queues.collect::<io::Result<_>>()?,
            others: self.others.iter().map(copy).collect::<io::Result<_>>()?,
        })
    }

    /// The sockets of a worker of another process.
    ///
    /// # Errors
    /// `InvalidInput` if there are none.
    pub(crate) fn adopt(adopted: Adopted, options: Options) -> io::Result<Self> {
        let mut queues = adopted.queues.into_iter().map(std::net::UdpSocket::from);
        let main = queues.next().ok_or(io::ErrorKind::InvalidInput)?;
        let others = adopted.others.into_iter().map(Into::into).collect();
        let adopted = Self::of(options, main, queues.collect(), others);
        // That process has counted these.
        adopted.take_losses();
        Ok(adopted)
    }

    /// Whether trains may leave.
    pub fn has_gso(&self) -> bool {
        self.gso.load(Ordering::Relaxed)
    }

    /// Whether trains may arrive.
    pub const fn has_gro(&self) -> bool {
        self.gro
    }

    /// The way to a peer for a flow with this hash; always the same for the same flow, since
    /// datagrams of two sockets may overtake each other.
    pub fn route(&self, destination: SocketAddr, flow: u32) -> Route {
        Route {
            socket: flow as usize % (self.others.len() + 1),
            destination,
        }
    }

    /// Whether it is of IPv6.
    pub(super) fn is_ipv6(&self) -> bool {
        let address = self.main.socket.local_addr();
        address.is_ok_and(|address| address.is_ipv6())
    }

    /// The tunnel's address and port.
    #[cfg(test)]
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.main.socket.local_addr()
    }

    /// The descriptors of its queues, in the order of their numbers.
    pub fn queues(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.all().map(|queue| queue.socket.as_fd())
    }

    fn all(&self) -> impl Iterator<Item = &Queue> {
        std::iter::once(&self.main).chain(&self.queues)
    }

    /// Datagrams that queues have lost since they were last asked.
    pub fn take_losses(&self) -> u64 {
        let each = self.all().map(|queue| queue.overflow.take(&queue.socket));
        each.sum()
    }

    /// What waits in its queues.
    pub(crate) fn backlog(&self) -> Backlog {
        let mut whole = Backlog::default();
        for queue in self.all() {
            let (bytes, limit) = option::backlog(&queue.socket).unwrap_or_default();
            whole.add(Backlog {
                bytes: bytes.into(),
                limit: limit.into(),
            });
        }
        whole
    }

    /// Receives datagrams from a queue and returns whether there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    pub fn receive(&self, queue: usize, into: &mut Received) -> io::Result<bool> {
        let queue = self.all().nth(queue).ok_or(io::ErrorKind::NotFound)?;
        batch::receive(queue.socket.as_fd(), into)
    }

    /// Sends messages of a batch, and reports which were lost for which reason.
    pub fn send(
        &self,
        batch: &SendBatch<'_, Route>,
        messages: &[Message<Route>],
        mut lost: impl FnMut(&Message<Route>, Errno),
    ) {
        let mut rest = messages;
        while let Some(first) = rest.first() {
            let socket = self.socket(first.key);
            let is_same = |send: &&Message<Route>| send.key.socket == first.key.socket;
            let count = rest.iter().take_while(is_same).count();
            let sent = batch::send(socket.as_fd(), batch, &rest[..count], |key| key.destination);
            match sent.map_err(|error| errno(&error)) {
                Ok(sent) => rest = &rest[sent.min(rest.len())..],
                Err(Errno::EINTR) => {}
                Err(error) => {
                    if let Err(error) = self.send_singly(batch, first, error) {
                        lost(first, error);
                    }
                    rest = &rest[1..];
                }
            }
        }
    }

    /// What became of a message that the kernel refused: if it was a train, its datagrams are sent
    /// one by one.
    fn send_singly(
        &self,
        batch: &SendBatch<'_, Route>,
        send: &Message<Route>,
        error: Errno,
    ) -> Result<(), Errno> {
        let to = send.key.destination;
        match error {
            _ if send.datagrams == 1 => return Err(error),
            // The device has no checksums (before Linux 6.11), or the kernel no trains.
            Errno::EIO | Errno::EINVAL => {
                if self.gso.swap(false, Ordering::Relaxed) {
                    warn!(
                        "the kernel refuses segmented UDP sends ({error}): datagrams are sent one by one from now on"
                    );
                }
            }
            // This path's MTU is smaller than the tunnel's; others' need not be.
            Errno::EMSGSIZE => {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    warn!(
                        "datagrams of {} bytes to {to} exceed the path's MTU and are sent one by \
                         one, in fragments: start the node with a smaller --mtu",
                        send.datagram_len
                    );
                }
            }
            _ => return Err(error),
        }
        let socket = SockRef::from(self.socket(send.key));
        let to = SockAddr::from(to);
        let mut result = Ok(());
        for datagram in batch.datagrams(send) {
            if let Err(error) = socket.send_to_vectored(datagram, &to) {
                result = Err(errno(&error));
            }
        }
        result
    }

    /// Sends one datagram from the tunnel's own port.
    ///
    /// # Errors
    /// `WouldBlock` if the send queue is full, else what the kernel refuses it for.
    pub fn send_one(&self, datagram: &[u8], destination: SocketAddr) -> io::Result<()> {
        self.main.socket.send_to(datagram, destination)?;
        Ok(())
    }

    fn socket(&self, route: Route) -> &std::net::UdpSocket {
        let other = route.socket.checked_sub(1);
        let other = other.and_then(|index| self.others.get(index));
        other.unwrap_or(&self.main.socket)
    }
}

impl Queue {
    fn new(socket: std::net::UdpSocket, options: Options) -> Self {
        if options.gro {
            // Whether it does is queried later.
            let _ = setsockopt(&socket, sockopt::UdpGroSegment, &true);
        }
        Self {
            socket,
            overflow: Overflow::default(),
        }
    }

    /// Whether the kernel joins what arrives to trains.
    fn is_joining(&self) -> bool {
        getsockopt(&self.socket, sockopt::UdpGroSegment).unwrap_or(false)
    }
}

/// Whether the kernel is one of those that garble headers of what they cut for some devices, which
/// cannot be seen from here: Linux 7.0 to 7.1.4.
pub(super) fn has_known_defect() -> bool {
    let release = nix::sys::utsname::uname();
    let release = release
        .as_ref()
        .map(|name| name.release().to_string_lossy());
    release.is_ok_and(|release| garbles_trains(&release))
}

fn garbles_trains(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().unwrap_or_default());
    let mut next = || numbers.next().unwrap_or_default();
    let version = (next(), next(), next());
    ((7, 0, 0)..=(7, 1, 4)).contains(&version)
}

/// The MTU of the path to `peer` in bytes of IP packets, as far as this machine knows it after a
/// datagram that fills `mtu` bytes and must not be fragmented was sent there.
///
/// # Errors
/// If nothing can be sent there at all.
pub fn path_mtu(from: Ipv4Addr, peer: SocketAddrV4, mtu: u16) -> io::Result<u32> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    discover_mtu(&socket, libc::IP_PMTUDISC_DO)?;
    socket.bind(&SockAddr::from(SocketAddrV4::new(from, 0)))?;
    socket.connect(&SockAddr::from(peer))?;
    socket.set_read_timeout(Some(ANSWER))?;
    let socket: std::net::UdpSocket = socket.into();
    let datagram = vec![0; usize::from(mtu.saturating_sub(UDP_HEADERS))];
    let sent = socket.send(&datagram);
    if !matches!(&sent, Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE)) {
        sent?;
        // A router's refusal arrives as an error of the socket, before the timeout.
        let _ = socket.recv(&mut [0; 1]);
    }
    let known = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::IpMtu)?;
    Ok(known.try_into().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use muslin_encap::offload::batch::Queued;
    use muslin_encap::offload::split::Checksums;
    use muslin_encap::offload::virtio::Header;

    use super::*;

    const ALL: Options = Options {
        format: Format::Vxlan,
        source_ports: 3,
        gso: true,
        gro: true,
    };

    fn bind(options: Options) -> TunnelSocket {
        let mut groups = TunnelSocket::bind("127.0.0.1:0".parse().unwrap(), options, 1).unwrap();
        groups.pop().unwrap()
    }

    /// Reads from a queue that has something.
    fn read(socket: &TunnelSocket, received: &mut Received) -> io::Result<bool> {
        let mut queues = 0..socket.queues().count();
        let has_some = queues.find_map(|queue| socket.receive(queue, received).ok());
        has_some.ok_or(io::ErrorKind::WouldBlock.into())
    }

    /// What arrives until `count` datagrams are there, or for long; in no particular order.
    fn receive(socket: &TunnelSocket, count: usize) -> Vec<Vec<u8>> {
        let mut received = Received::default();
        let mut all = Vec::new();
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while all.len() < count && std::time::Instant::now() < end {
            match read(socket, &mut received) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            all.extend(received.datagrams().map(|(_, datagram)| datagram.to_vec()));
        }
        all.sort();
        all
    }

    #[test]
    fn a_batch_arrives_whole_whatever_the_kernel_is_asked_for() {
        for (gso, gro) in [(true, true), (true, false), (false, true)] {
            let options = Options { gso, gro, ..ALL };
            let (one, other) = (bind(options), bind(options));
            assert_eq!((one.has_gso(), one.has_gro()), (gso, gro));
            let packets: Vec<Vec<u8>> = (0..100u8)
                .map(|i| vec![i; if i < 90 { 1200 } else { i.into() }])
                .collect();
            let mut batch = SendBatch::new(&mut [], one.has_gso());
            let destination = other.address().unwrap();
            for packet in &packets {
                let queued = Queued {
                    key: one.route(destination, 5),
                    packet,
                    network: 0,
                    offload: Header::default(),
                    checksums: Checksums::Complete,
                };
                batch.push(&queued, &mut None).unwrap().unwrap_or(());
            }
            one.send(&batch, batch.messages(), |_, error| panic!("{error}"));
            let sent: usize = batch.messages().iter().map(|send| send.datagrams).sum();
            assert_eq!(
                receive(&other, sent),
                packets[..sent],
                "gso: {gso}, gro: {gro}"
            );
        }
    }

    #[test]
    fn a_train_that_the_kernel_refuses_arrives_all_the_same() {
        let (one, other) = (bind(ALL), bind(ALL));
        // Longer than any MTU of the loopback interface lets a train's datagrams be.
        let packets = [[1; 40_000], [2; 40_000]];
        let mut batch = SendBatch::new(&mut [], true);
        let destination = other.address().unwrap();
        for packet in &packets {
            let queued = Queued {
                key: one.route(destination, 0),
                packet: &packet[..30_000],
                network: 0,
                offload: Header::default(),
                checksums: Checksums::Complete,
            };
            batch.push(&queued, &mut None).unwrap().unwrap();
        }
        assert_eq!(batch.messages().len(), 1);
        let send = &batch.messages()[0];
        for error in [Errno::EMSGSIZE, Errno::EIO] {
            one.send_singly(&batch, send, error).unwrap();
            let all = receive(&other, 2);
            assert_eq!(all, packets.map(|packet| packet[..30_000].to_vec()));
        }
        assert!(!one.has_gso(), "EIO is remembered");
        assert_eq!(
            one.send_singly(&batch, send, Errno::EPERM),
            Err(Errno::EPERM)
        );
    }

    #[test]
    fn what_overflows_the_queue_is_counted() {
        let (one, other) = (bind(ALL), bind(ALL));
        let destination = other.address().unwrap();
        let mut received = Received::default();
        let (mut sent, mut arrived, mut lost) = (0, 0, 0);
        for burst in [40_000, 1, 40_000] {
            for _ in 0..burst {
                one.send_one(&[7; 1400], destination).unwrap();
            }
            sent += burst;
            while read(&other, &mut received).is_ok() {
                arrived += received.datagrams().count() as u64;
                assert_eq!(received.lost(), 0);
            }
            lost += other.take_losses();
            assert_eq!(arrived + lost, sent);
        }
        assert!(lost > 0);
        // Another process goes on with the socket, and counts what is lost from then on.
        let again = TunnelSocket::adopt(other.copy().unwrap(), ALL).unwrap();
        assert_eq!(again.take_losses(), 0);
    }

    #[test]
    fn kernels_that_garble_trains_are_known() {
        let known = |release| garbles_trains(release);
        assert!(known("7.0.0-rc1") && known("7.1.4+deb") && known("7.0.9"));
        assert!(!known("7.1.5") && !known("6.18.44") && !known("7.2.0") && !known(""));
    }

    #[test]
    fn a_port_that_is_taken_is_refused() {
        let one = bind(ALL);
        for groups in [1, 2] {
            let taken = TunnelSocket::bind(one.address().unwrap(), ALL, groups);
            assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        }
        let mut received = Received::default();
        let error = one.receive(0, &mut received).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn of_nodes_that_want_a_port_at_once_one_gets_it() {
        for _ in 0..20 {
            let address = bind(ALL).address().unwrap();
            let nodes = [1, 2, 1, 2]
                .map(|groups| std::thread::spawn(move || TunnelSocket::bind(address, ALL, groups)));
            let bound = nodes.map(|node| node.join().unwrap());
            let count = bound.iter().filter(|bound| bound.is_ok()).count();
            assert_eq!(count, 1);
        }
    }
}
