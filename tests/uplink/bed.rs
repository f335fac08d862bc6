//! A cable between this process' network namespace, where the uplink is, and another host's.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::sync::mpsc::{Sender, channel};

use etherparse::PacketBuilder;
use muslin::device::FrameDevice as _;
use muslin::underlay::uplink::{Failure, Frames, Uplink, UplinkKind};
use muslin_encap::offload::virtio::Header;
use muslin_lab::inside;
use muslin_lab::{SOON, poll_until};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::sys::socket::{LinkAddr, bind, recvfrom};
use nix::unistd::{Pid, gettid};
use socket2::{Domain, Socket, Type};

/// The pods' subnet.
pub(crate) const SUBNET: &str = "10.244.1.0/24";
/// The other host's end of the cable, and the uplink's.
pub(crate) const FAR: [u8; 6] = [2, 0, 0, 0, 8, 1];
pub(crate) const NEAR: [u8; 6] = [2, 0, 0, 0, 8, 2];
/// What the padding of a frame says that ends others.
const MARK: u8 = 0xee;
/// Ample time for a frame, in milliseconds.
const PATIENCE: u16 = 50_000;

/// A thread in a network namespace of its own.
pub(crate) struct Far(Sender<Box<dyn FnOnce() + Send>>);

impl Far {
    /// Does something there.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = channel();
        let job = move || sender.send(job()).unwrap();
        self.0.send(Box::new(job)).unwrap();
        receiver.recv().unwrap()
    }

    pub(crate) fn sh(&self, script: &'static str) {
        self.run(|| inside::sh(script));
    }
}

/// The other host, a socket for whatever is on the cable there, and the cable: `near` and `far`.
pub(crate) struct Bed {
    pub(crate) far: Far,
    wire: Socket,
    markers: Cell<u8>,
}

impl Bed {
    pub(crate) fn new() -> Self {
        // The kernel keeps frames in order only if they are sent on one processor.
        let mut one = CpuSet::new();
        one.set(first_cpu()).unwrap();
        sched_setaffinity(Pid::from_raw(0), &one).unwrap();
        let (jobs, todo) = channel::<Box<dyn FnOnce() + Send>>();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        let far = Far(jobs);
        let thread = far.run(gettid);
        inside::sh(&format!(
            "ip link add near address {} type veth peer name far address {} netns {thread}
             ip link set near addrgenmode none up",
            text(NEAR),
            text(FAR),
        ));
        far.sh("ip link set far addrgenmode none up");
        let wire = far.run(|| open("far"));
        let markers = Cell::new(0);
        Self { far, wire, markers }
    }

    /// As many packet sockets, when frames pass both ways.
    pub(crate) fn uplinks(&self, groups: usize) -> Vec<Uplink> {
        self.uplinks_for(SUBNET, groups)
    }

    /// The same for other subnets, of which one is of IPv4.
    pub(crate) fn uplinks_for(&self, subnets: &str, groups: usize) -> Vec<Uplink> {
        let kind = UplinkKind::PacketSocket;
        let subnets = subnets.parse().unwrap();
        let uplinks = Uplink::open(&kind, "near", subnets, groups).unwrap();
        self.wait_for(&uplinks);
        self.heard_by_each(&uplinks);
        uplinks
    }

    /// Waits until they are heard and one of them hears, if only ARP that is for all.
    pub(crate) fn wait_for(&self, uplinks: &[Uplink]) {
        poll_until(SOON, "the cable", || {
            self.send(&arp(FAR, [0xff; 6], 0));
            for uplink in uplinks {
                let hello = arp(uplink.hardware_address().0, [0xff; 6], 0);
                let _ = uplink.send(&Header::default(), &hello, &[]);
            }
            let heard = uplinks.iter().flat_map(received).count();
            (heard > 0 && self.receive().is_some()).then_some(())
        });
        self.receive_all(&uplinks[0]);
    }

    /// Sends a frame from the other host.
    pub(crate) fn send(&self, frame: &[u8]) {
        self.wire.send(frame).unwrap();
    }

    /// A frame that has arrived at the other host.
    pub(crate) fn receive(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 66_000];
        loop {
            match recvfrom::<LinkAddr>(self.wire.as_raw_fd(), &mut buffer) {
                Ok((_, from)) if from.unwrap().pkttype() == libc::PACKET_OUTGOING => {}
                Ok((len, _)) => return Some(buffer[..len].to_vec()),
                Err(Errno::EAGAIN) => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// A frame that ends what was sent so far.
    fn marker(&self, from: [u8; 6], to: [u8; 6]) -> Vec<u8> {
        self.markers.set(self.markers.get() + 1);
        let mut frame = arp(from, to, self.markers.get());
        *frame.last_mut().unwrap() = MARK;
        frame
    }

    /// What arrives at the other host of all that an uplink has sent so far.
    pub(crate) fn receive_all(&self, uplink: &Uplink) -> Vec<Vec<u8>> {
        let marker = self.marker(uplink.hardware_address().0, FAR);
        uplink.send(&Header::default(), &marker, &[]).unwrap();
        let mut frames = Vec::new();
        loop {
            match self.receive() {
                Some(frame) if frame == marker => return frames,
                Some(frame) => frames.push(frame),
                None => wait_for_any([self.wire.as_fd()].into_iter()),
            }
        }
    }

    /// What arrives at a lone worker's uplink of all that the other host has sent so far, queue by queue.
    pub(crate) fn heard_by(&self, uplink: &Uplink) -> Vec<(Header, Vec<u8>)> {
        let mut each = self.heard_by_each(std::slice::from_ref(uplink));
        each.pop().unwrap()
    }

    /// The same of all workers' uplinks.
    pub(crate) fn heard_by_each(&self, uplinks: &[Uplink]) -> Vec<Vec<(Header, Vec<u8>)>> {
        let marker = self.marker(FAR, uplinks[0].hardware_address().0);
        self.send(&marker);
        let mut heard = vec![Vec::new(); uplinks.len()];
        let mut take = || {
            let mut has_marker = false;
            for (uplink, heard) in uplinks.iter().zip(&mut heard) {
                let frames = received(uplink);
                has_marker |= frames.iter().any(|frame| frame.1 == marker);
                heard.extend(frames.into_iter().filter(|it| !is_marker(&it.1)));
            }
            has_marker
        };
        while !take() {
            wait_for_any(uplinks.iter().flat_map(Uplink::queues));
        }
        // Queues that were read before it came may have some by now.
        take();
        heard
    }
}

/// The processor to stay on: the first that this thread may use.
fn first_cpu() -> usize {
    let allowed = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut all = 0..CpuSet::count();
    all.find(|cpu| allowed.is_set(*cpu).unwrap()).unwrap()
}

/// A socket for all frames of an interface of this thread's namespace.
fn open(interface: &str) -> Socket {
    let link = getifaddrs()
        .unwrap()
        .filter(|row| row.interface_name == interface)
        .find_map(|row| row.address?.as_link_addr().copied())
        .unwrap();
    let every = i32::from((libc::ETH_P_ALL as u16).to_be());
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(every.into())).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.set_recv_buffer_size(1 << 20).unwrap();
    bind(socket.as_raw_fd(), &link).unwrap();
    socket
}

/// A batch of frames of each queue; empty if there is none.
pub(crate) fn received(uplink: &Uplink) -> Vec<(Header, Vec<u8>)> {
    let queues = 0..uplink.queues().count();
    queues
        .flat_map(|queue| received_by(uplink, queue))
        .collect()
}

/// The same of one queue.
pub(crate) fn received_by(uplink: &Uplink, queue: usize) -> Vec<(Header, Vec<u8>)> {
    let mut frames = Frames::default();
    match uplink.receive(queue, &mut frames) {
        Ok(_) => {}
        Err(error) => {
            // It was down until the cable was plugged in.
            let failure = Failure::from(&error);
            assert!(matches!(failure, Failure::QueueFull | Failure::Down));
        }
    }
    assert_eq!(frames.lost(), 0);
    let each = frames.frames().map(|(header, frame)| {
        let header = Header::parse(&header).unwrap();
        header.check(frame.len()).unwrap();
        (header, frame.to_vec())
    });
    each.collect()
}

/// Waits for frames in any of an uplink's queues.
pub(crate) fn wait(uplink: &Uplink) {
    wait_for_any(uplink.queues());
}

fn wait_for_any<'a>(descriptors: impl Iterator<Item = BorrowedFd<'a>>) {
    let mut waited: Vec<_> = descriptors
        .map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN))
        .collect();
    assert_ne!(poll(&mut waited, PATIENCE).unwrap(), 0, "nothing comes");
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The frames that come, one by one, without ARP.
pub(crate) struct Listener<'a> {
    uplink: &'a Uplink,
    waiting: VecDeque<(Header, Vec<u8>)>,
}

impl<'a> Listener<'a> {
    pub(crate) fn new(uplink: &'a Uplink) -> Self {
        let waiting = VecDeque::new();
        Self { uplink, waiting }
    }

    pub(crate) fn next(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some(frame) = self.waiting.pop_front() {
                return frame;
            }
            wait(self.uplink);
            let batch = received(self.uplink).into_iter();
            self.waiting.extend(batch.filter(|it| !is_arp(&it.1)));
        }
    }
}

pub(crate) fn is_arp(frame: &[u8]) -> bool {
    frame[12..14] == [8, 6]
}

fn is_marker(frame: &[u8]) -> bool {
    is_arp(frame) && frame.last() == Some(&MARK)
}

/// An ARP request that says nothing but this number.
pub(crate) fn arp(from: [u8; 6], to: [u8; 6], number: u8) -> Vec<u8> {
    let start = [0, 1, 8, 0, 6, 4, 0, 1];
    [&to[..], &from, &[8, 6], &start, &[number; 20], &[0; 18]].concat()
}

/// A UDP packet in a frame to the uplink's host, or another.
pub(crate) fn udp(to: [u8; 6], source: [u8; 4], destination: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(FAR, to)
        .ipv4(source, destination, 64)
        .udp(4000, 53)
        .write(&mut frame, payload)
        .unwrap();
    frame
}
