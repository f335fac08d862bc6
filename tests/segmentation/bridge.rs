//! The kernel's segmentation: what is written to a TAP with offloads comes out of a plain one.

use std::os::fd::AsFd as _;

use muslin::device::{FrameDevice as _, Tap};
use muslin_encap::offload::virtio::Header;
use muslin_lab::inside;
use muslin_lab::{SOON, poll_until};
use nix::poll::{PollFd, PollFlags, poll};

/// A frame that ends a train: of a type for local experiments (IEEE 802, EtherType 0x88b5).
const MARKER: [u8; 20] = [
    2, 0, 0, 0, 8, 1, 2, 0, 0, 0, 8, 2, 0x88, 0xb5, 1, 2, 3, 4, 5, 6,
];

/// Ample time for a frame, in milliseconds.
const PATIENCE: u16 = 50_000;

/// Two TAPs on a bridge in this process' network namespace.
pub(crate) struct Bridge {
    source: Tap,
    sink: Tap,
}

impl Bridge {
    pub(crate) fn new() -> Self {
        let open = |name, offloads| {
            let mut queues = Tap::open(name, offloads, 1).unwrap();
            queues.pop().unwrap()
        };
        let (source, sink) = (open("source", true), open("sink", false));
        assert!(source.has_offloads() && !sink.has_offloads());
        // Nothing but the test's frames shall cross it, in segments of any length, and none be
        // lost.
        inside::sh(
            "ip link add bridge type bridge stp_state 0 mcast_snooping 0
             for it in bridge source sink; do ip link set $it addrgenmode none; done
             for it in source sink; do
                 ip link set $it master bridge mtu 65521 txqueuelen 4096 up
             done
             ip link set bridge mtu 65521 up",
        );
        let bridge = Self { source, sink };
        // The kernel enables a port some time after its interface has come up.
        poll_until(SOON, "the bridge", || {
            bridge.source.send(&Header::default(), &MARKER, &[]).ok()?;
            bridge.receive()
        });
        while bridge.receive().is_some() {}
        bridge
    }

    /// Has the kernel segment a superpacket.
    pub(crate) fn segment(&self, header: &Header, frame: &[u8]) -> Vec<Vec<u8>> {
        self.source.send(header, frame, &[]).unwrap();
        self.source.send(&Header::default(), &MARKER, &[]).unwrap();
        let mut frames = Vec::new();
        loop {
            let mut waited = [PollFd::new(self.sink.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut waited, PATIENCE).unwrap();
            assert_ne!(ready, 0, "{} frames, then none", frames.len());
            match self.receive() {
                Some(frame) if frame == MARKER => return frames,
                frame => frames.extend(frame),
            }
        }
    }

    /// A frame that has arrived.
    fn receive(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 66_000];
        match self.sink.receive(&mut buffer) {
            Ok((_, len)) => Some(buffer[..len].to_vec()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }
}
