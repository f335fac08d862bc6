//! Two workers: packets of flows that the first one has, where the kernel brings them to the other.

use std::collections::VecDeque;
use std::sync::Arc;

use muslin_encap::buffer::OwnedPacket;
use muslin_encap::offload::virtio::{Checksum, Gso, GsoKind, Header};
use smoltcp::socket::tcp::State;

use super::bed::*;
use super::*;

fn client() -> SocketAddr {
    outside(7, 51_234)
}

const PORT: u16 = 8080;

/// Two workers of a node and what one has handed to the other.
struct Workers {
    first: Bed,
    second: Bed,
    queue: VecDeque<OwnedPacket>,
}

impl Workers {
    fn new() -> Self {
        let mut workers = Self {
            first: Bed::new(),
            second: Bed::new(),
            queue: VecDeque::new(),
        };
        let owners = Arc::new(Owners::new(7));
        for (worker, number) in [&mut workers.first, &mut workers.second]
            .into_iter()
            .zip(0..)
        {
            worker.egress.share(owners.clone(), number);
            let pod = SocketAddr::new(pod(), PORT);
            worker.egress.expect_datagrams(pod).unwrap();
        }
        workers
    }

    /// The second one takes a packet of the pod, as its queue of the device brings it.
    fn take(&mut self, packet: &PacketBuf<'_>) {
        assert_eq!(
            self.second
                .call(|egress, now, host| egress.from_pod(now, packet, host)),
            Ok(())
        );
        let expected = (0, packet.as_slice().to_vec());
        assert_eq!(
            self.second.pods.handed_over.drain(..).collect::<Vec<_>>(),
            [expected]
        );
        self.queue.push_back(OwnedPacket::copy(packet));
    }

    /// The first one takes what was handed to it, and loses none.
    fn hand_over(&mut self) {
        while let Some(mut packet) = self.queue.pop_front() {
            let taken = self
                .first
                .call(|egress, now, host| egress.from_sibling(now, &packet.packet(), host));
            assert_eq!(taken, Ok(()));
        }
    }
}

fn key(protocol: Protocol) -> FlowKey {
    FlowKey {
        protocol,
        pod: SocketAddr::new(pod(), PORT),
        remote: client(),
    }
}

/// A UDP packet of the pod with the sum of its pseudo header instead of a checksum.
fn unfinished(payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    from_to(pod(), client().ip())
        .udp(PORT, client().port())
        .write(&mut bytes, payload)
        .unwrap();
    let at = Transport::parse(&bytes, 0).unwrap();
    let pseudo = at.pseudo_header(&bytes, at.end - at.l4);
    bytes[at.checksum_offset()..at.checksum_offset() + 2].copy_from_slice(&pseudo.to_be_bytes());
    bytes
}

#[test]
fn a_superpacket_that_is_handed_over_is_as_many_datagrams() {
    both(|| {
        let longest = 65_535 - 8 - ip_len();
        for (len, size) in [(2500, 1000), (1, 1000), (3000, 1000), (longest, 1400)] {
            let mut workers = Workers::new();
            let id = workers
                .first
                .call(|egress, now, host| egress.deliver(now, key(Protocol::Udp), b"hello", host));
            let id = id.unwrap();
            workers.first.host.adopt_datagrams(id);

            let payload = pattern(len, 3);
            let mut bytes = unfinished(&payload);
            let offload = Header {
                checksum: Checksum::Partial {
                    start: ip_len() as u16,
                    offset: 6,
                },
                gso: Some(Gso {
                    kind: GsoKind::Udp,
                    size,
                    ecn: false,
                }),
                hdr_len: ip_len() as u16 + 8,
            };
            let len = bytes.len();
            let packet = PacketBuf::new(&mut bytes, 0, len).unwrap();
            workers.take(&packet.with_offload(offload));
            workers.hand_over();
            let socket = &workers.first.host.sockets[&id];
            let (_, outbox) = socket.datagrams.as_ref().unwrap();
            let expected: Vec<_> = payload.chunks(size.into()).map(<[u8]>::to_vec).collect();
            assert_eq!(*outbox, expected);
            assert_eq!(workers.second.egress.counters().opened, 0);
        }
    });
}

/// What a device says is right is not looked at again, and need not be there.
#[test]
fn what_a_device_has_verified_stays_so_when_it_is_handed_over() {
    both(|| {
        let mut workers = Workers::new();
        let first = &mut workers.first;
        let handle = first.listen(PORT);
        let id = first.call(|egress, now, host| egress.dial(now, key(Protocol::Tcp), b"", host));
        let id = id.unwrap();
        first.host.adopt(id);
        first.wait(Duration::from_millis(1));
        assert_eq!(first.socket(handle).state(), State::Established);

        let stream = pattern(100_000, 9);
        let mut sent = 0;
        for _ in 0..10_000 {
            let first = &mut workers.first;
            if sent < stream.len() {
                sent += first.socket(handle).send_slice(&stream[sent..]).unwrap();
            }
            let Bed { pod, pods, now, .. } = first;
            pod.device.incoming.append(&mut pods.packets);
            pod.poll(*now);
            for mut bytes in std::mem::take(&mut pod.device.outgoing) {
                let at = Transport::parse(&bytes, 0).unwrap();
                bytes[at.checksum_offset()] ^= 0x5a;
                let offload = Header {
                    checksum: Checksum::Valid,
                    ..Header::default()
                };
                let len = bytes.len();
                let packet = PacketBuf::new(&mut bytes, 0, len).unwrap();
                workers.take(&packet.with_offload(offload));
            }
            workers.hand_over();
            workers.first.pass(Duration::from_millis(1));
            if workers.first.host.sockets[&id].outbox.len() == stream.len() {
                break;
            }
        }
        assert!(workers.first.host.sockets[&id].outbox == stream);
        assert_eq!(workers.first.egress.counters().reset, 0);
    });
}
