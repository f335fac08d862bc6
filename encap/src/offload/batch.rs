//! Groups outgoing datagrams into the fewest messages for `sendmmsg`.
//!
//! Every message costs the kernel a pass through its stack, however many datagrams it has. So
//! superpackets become trains ([`crate::offload::split`]), and so do single packets of one length
//! that follow each other to one destination, as in a flood of small datagrams. A [`Message`] has
//! the pieces (iovecs) of its datagrams in order, and the length at which the kernel cuts them
//! apart (`UDP_SEGMENT`). Pieces point to the packets where they are; headers of segments are
//! written into an area of the caller's. What is sealed ([`Seal`]) is copied there as a whole.
//!
//! ```
//! use muslin_encap::offload::batch::{Queued, SendBatch};
//! use muslin_encap::offload::split::Checksums;
//! use muslin_encap::offload::virtio::Header;
//!
//! let (small, other) = ([0; 60], [0; 90]);
//! let queued = |packet, key| Queued {
//!     key,
//!     packet,
//!     network: 0,
//!     offload: Header::default(),
//!     checksums: Checksums::Complete,
//! };
//! let mut batch = SendBatch::new(&mut [], true);
//! for packet in [queued(&small[..], "a"), queued(&small, "a"), queued(&other, "b")] {
//!     batch.push(&packet, &mut None)?.expect("there is room");
//! }
//! let messages: Vec<_> = batch.messages().iter().map(|it| (it.key, it.datagrams)).collect();
//! assert_eq!(messages, [("a", 2), ("b", 1)]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::io::IoSlice;

use arrayvec::ArrayVec;

use crate::offload::split::{self, Checksums, Split, TrainLimits};
use crate::offload::virtio::{Gso, Header};

/// The most messages of one batch.
const MAX_MESSAGES: usize = 64;
/// The most pieces of all messages of a batch; the kernel takes 1024 in one message (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Bytes of header area with which a batch has room for several superpackets.
pub const HEADERS_LEN: usize = 4 * split::HEADERS_LEN;

/// An encapsulated packet that waits to be sent.
#[derive(Debug, Clone, Copy)]
pub struct Queued<'p, K> {
    /// Its destination: packets with equal keys may share a message.
    pub key: K,
    /// The payload of the datagram.
    pub packet: &'p [u8],
    /// Offset of the inner IP header in that payload, in bytes.
    pub network: usize,
    /// Its virtio-net header. The checksum of a single packet leaves as it is.
    pub offload: Header,
    /// The checksums that the segments of a superpacket get.
    pub checksums: Checksums,
}

/// One message: datagrams of one length to one destination; the last may be shorter.
#[derive(Debug, Clone)]
pub struct Message<K> {
    /// Its destination.
    pub key: K,
    /// How many of the caller's packets end in this message.
    pub packets: usize,
    /// The number of datagrams, at least one.
    pub datagrams: usize,
    /// Length in bytes of every datagram but the last.
    pub datagram_len: usize,
    first: usize,
    pieces: usize,
    /// The number of pieces of each datagram.
    pieces_each: usize,
    bytes: usize,
    /// Whether no further datagram may be added.
    closed: bool,
}

/// Messages that are sent together, in order.
#[derive(Debug)]
pub struct SendBatch<'a, K> {
    messages: ArrayVec<Message<K>, MAX_MESSAGES>,
    pieces: ArrayVec<IoSlice<'a>, MAX_PIECES>,
    /// Where headers are made, and sealed datagrams.
    headers: &'a mut [u8],
    /// Whether the socket splits trains (`UDP_SEGMENT`).
    trains: bool,
}

/// What a tunnel with keys does to each datagram before it is sent.
///
/// Such a tunnel cannot repeat what is in front of the inner packets of a superpacket, as
/// [`SendBatch::push`] does: each datagram has a counter and is encrypted as a whole.
pub trait Seal<K> {
    /// Length in bytes of what is sent for a datagram of `len` bytes; for a longer one it is no less.
    fn len(&self, len: usize) -> usize;

    /// Seals the datagram to `key` that is in two pieces into `sealed`, which is as long as [`Self::len`] says.
    /// False if it cannot: the datagram is lost then. Datagrams are sealed in the order in which they are
    /// sent.
    fn seal(&mut self, key: K, pieces: [&[u8]; 2], sealed: &mut [u8]) -> bool;
}

/// The batch has no room for a packet or for the rest of a superpacket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

impl<'a, K: Copy + Eq> SendBatch<'a, K> {
    /// An empty batch. The header area should have [`HEADERS_LEN`] bytes, or none if there are no
    /// superpackets. Without `trains` every datagram is a message.
    #[must_use]
    pub fn new(headers: &'a mut [u8], trains: bool) -> Self {
        Self {
            messages: ArrayVec::new(),
            pieces: ArrayVec::new(),
            headers,
            trains,
        }
    }

    /// Adds a packet. A superpacket may need several batches: `split` keeps its state in between,
    /// and is `None` before its first and after its last batch.
    ///
    /// # Errors
    /// The outer error if it is a superpacket that cannot be split. The inner one, `Full`, if the
    /// packet or the rest of it is for the next batch.
    pub fn push<'p: 'a>(
        &mut self,
        queued: &Queued<'p, K>,
        split: &mut Option<Split<'p>>,
    ) -> Result<Result<(), Full>, split::Error> {
        let Queued {
            key,
            packet,
            network,
            offload,
            checksums,
        } = *queued;
        let Some(gso) = offload.gso else {
            return Ok(self.datagram(key, packet, 1));
        };
        let mut rest = match split.take() {
            Some(rest) => rest,
            None => whole(packet, network, (gso, checksums), |len| len)?,
        };
        while rest.remaining() > 0 {
            if self.train(key, &mut rest).is_err() {
                *split = Some(rest);
                return Ok(Err(Full));
            }
        }
        if let Some(last) = self.messages.last_mut() {
            last.packets += 1;
        }
        Ok(Ok(()))
    }

    /// Adds a packet as [`Self::push`] does, with each of its datagrams sealed into the header area, which
    /// must have room for the longest of them.
    ///
    /// # Errors
    /// Those of [`Self::push`].
    pub fn push_sealed<'p>(
        &mut self,
        queued: &Queued<'p, K>,
        split: &mut Option<Split<'p>>,
        seal: &mut impl Seal<K>,
    ) -> Result<Result<(), Full>, split::Error> {
        let Queued {
            key,
            packet,
            network,
            offload,
            checksums,
        } = *queued;
        let Some(gso) = offload.gso else {
            return Ok(self.sealed(key, [packet, &[]], 1, seal));
        };
        let mut rest = match split.take() {
            Some(rest) => rest,
            None => whole(packet, network, (gso, checksums), |len| seal.len(len))?,
        };
        let mut header = [0; split::MAX_HEADER_LEN];
        let longest = seal.len(network + rest.mtu_needed());
        while rest.remaining() > 0 {
            // Once a segment is cut off it must be sent.
            if !self.has_room(longest) {
                *split = Some(rest);
                return Ok(Err(Full));
            }
            let Ok(Some(train)) = rest.next_train(&mut header, TrainLimits::ONE) else {
                *split = Some(rest);
                return Ok(Err(Full));
            };
            let packets = usize::from(rest.remaining() == 0);
            for (header, payload) in train.segments() {
                if self.sealed(key, [header, payload], packets, seal).is_err() {
                    return Ok(Err(Full));
                }
            }
        }
        Ok(Ok(()))
    }

    /// Whether there is room for another datagram that is copied.
    fn has_room(&self, len: usize) -> bool {
        self.headers.len() >= len && !self.pieces.is_full() && !self.messages.is_full()
    }

    /// Adds a datagram of two pieces, sealed, with which so many packets end.
    fn sealed(
        &mut self,
        key: K,
        pieces: [&[u8]; 2],
        packets: usize,
        seal: &mut impl Seal<K>,
    ) -> Result<(), Full> {
        let whole = seal.len(pieces.iter().map(|piece| piece.len()).sum());
        if !self.has_room(whole) {
            return Err(Full);
        }
        let (sealed, rest) = std::mem::take(&mut self.headers).split_at_mut(whole);
        self.headers = rest;
        if !seal.seal(key, pieces, sealed) {
            return Ok(());
        }
        self.datagram(key, sealed, packets)
    }

    /// The messages in order.
    pub fn messages(&self) -> &[Message<K>] {
        &self.messages
    }

    /// The pieces of a message of this batch, in order.
    pub fn pieces(&self, message: &Message<K>) -> &[IoSlice<'a>] {
        let end = message.first + message.pieces;
        self.pieces.get(message.first..end).unwrap_or_default()
    }

    /// The pieces of each datagram of a message of this batch.
    pub fn datagrams(&self, message: &Message<K>) -> impl Iterator<Item = &[IoSlice<'a>]> {
        self.pieces(message).chunks(message.pieces_each.max(1))
    }

    /// Whether there are no messages.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Adds a datagram with which so many packets end.
    fn datagram(&mut self, key: K, packet: &'a [u8], packets: usize) -> Result<(), Full> {
        if self.pieces.is_full() {
            return Err(Full);
        }
        let len = packet.len();
        match self.messages.last_mut() {
            Some(last) if self.trains && last.takes(key, len) => {
                last.pieces += 1;
                last.datagrams += 1;
                last.packets += packets;
                last.bytes += len;
                last.closed = len < last.datagram_len;
            }
            _ => {
                let message = Message {
                    key,
                    packets,
                    datagrams: 1,
                    datagram_len: len,
                    first: self.pieces.len(),
                    pieces: 1,
                    pieces_each: 1,
                    bytes: len,
                    closed: len == 0,
                };
                self.messages.try_push(message).map_err(|_| Full)?;
            }
        }
        self.pieces.push(IoSlice::new(packet));
        Ok(())
    }

    /// Adds the next train of a superpacket.
    fn train<'p: 'a>(&mut self, key: K, split: &mut Split<'p>) -> Result<(), Full> {
        let limits = TrainLimits::UDP_SEGMENT;
        let count = split.remaining().min(limits.segments);
        let needed = count * split.header_len();
        let messages = if self.trains { 1 } else { count };
        if self.headers.len() < needed
            || self.pieces.remaining_capacity() < 2 * count
            || self.messages.remaining_capacity() < messages
        {
            return Err(Full);
        }
        let (headers, rest) = std::mem::take(&mut self.headers).split_at_mut(needed);
        self.headers = rest;
        let Ok(Some(train)) = split.next_train(headers, limits) else {
            return Err(Full);
        };
        let first = self.pieces.len();
        let mut lens = ArrayVec::<usize, { TrainLimits::UDP_SEGMENT.segments }>::new();
        for (header, payload) in train.segments() {
            self.pieces.push(IoSlice::new(header));
            self.pieces.push(IoSlice::new(payload));
            lens.push(header.len() + payload.len());
        }
        let message = |first, datagrams, datagram_len, bytes| Message {
            key,
            packets: 0,
            datagrams,
            datagram_len,
            first,
            pieces: 2 * datagrams,
            pieces_each: 2,
            bytes,
            closed: true,
        };
        if self.trains {
            let (datagram_len, bytes) = (train.datagram_len(), train.total_len());
            self.messages
                .push(message(first, train.count(), datagram_len, bytes));
        } else {
            for (i, len) in lens.into_iter().enumerate() {
                self.messages.push(message(first + 2 * i, 1, len, len));
            }
        }
        Ok(())
    }
}

/// Prepares to split a superpacket, each segment of which must fit a datagram.
fn whole<'p>(
    packet: &'p [u8],
    network: usize,
    (gso, checksums): (Gso, Checksums),
    sealed_len: impl Fn(usize) -> usize,
) -> Result<Split<'p>, split::Error> {
    let split = Split::new(packet, network, gso, checksums)?;
    let len = sealed_len(network + split.mtu_needed());
    if len > TrainLimits::UDP_SEGMENT.bytes {
        return Err(split::Error::TooLong { len });
    }
    Ok(split)
}

impl<K: Eq> Message<K> {
    /// Whether a single datagram may be added.
    fn takes(&self, key: K, len: usize) -> bool {
        let limits = TrainLimits::UDP_SEGMENT;
        !self.closed
            && self.key == key
            && (1..=self.datagram_len).contains(&len)
            && self.datagrams < limits.segments
            && self.bytes + len <= limits.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::virtio::GsoKind;

    fn single(key: u8, packet: &[u8]) -> Queued<'_, u8> {
        Queued {
            key,
            packet,
            network: 0,
            offload: Header::default(),
            checksums: Checksums::Complete,
        }
    }

    /// The datagrams of a batch as the receiver sees them.
    fn received(batch: &SendBatch<'_, u8>) -> Vec<(u8, Vec<u8>)> {
        let mut all = Vec::new();
        for message in batch.messages() {
            let bytes: Vec<u8> = batch
                .pieces(message)
                .iter()
                .flat_map(|p| p.to_vec())
                .collect();
            let cut: Vec<_> = bytes.chunks(message.datagram_len.max(1)).collect();
            let pieces: Vec<_> = batch.datagrams(message).map(<[_]>::concat_pieces).collect();
            assert_eq!(cut, pieces);
            assert_eq!(cut.len(), message.datagrams);
            all.extend(
                cut.into_iter()
                    .map(|datagram| (message.key, datagram.to_vec())),
            );
        }
        all
    }

    trait ConcatPieces {
        fn concat_pieces(&self) -> Vec<u8>;
    }

    impl ConcatPieces for [IoSlice<'_>] {
        fn concat_pieces(&self) -> Vec<u8> {
            self.iter().flat_map(|piece| piece.to_vec()).collect()
        }
    }

    #[test]
    fn datagrams_of_one_length_leave_together() {
        let packets = [
            (1, 50),
            (1, 50),
            (1, 20),
            (1, 50),
            (2, 50),
            (2, 60),
            (2, 60),
        ]
        .map(|(key, len)| (key, vec![len as u8; len]));
        for (trains, shape) in [
            (true, vec![(1, 3), (1, 1), (2, 1), (2, 2)]),
            (false, packets.iter().map(|(key, _)| (*key, 1)).collect()),
        ] {
            let mut headers = [];
            let mut batch = SendBatch::new(&mut headers, trains);
            assert!(batch.is_empty());
            for (key, packet) in &packets {
                batch
                    .push(&single(*key, packet), &mut None)
                    .unwrap()
                    .unwrap();
            }
            let found: Vec<_> = batch
                .messages()
                .iter()
                .map(|s| (s.key, s.datagrams))
                .collect();
            assert_eq!(found, shape);
            assert_eq!(received(&batch), packets);
            assert!(!batch.is_empty());
        }
    }

    #[test]
    fn a_train_of_datagrams_has_the_kernels_limits() {
        let packet = [0; 1400];
        let mut headers = [];
        let mut batch = SendBatch::new(&mut headers, true);
        for _ in 0..100 {
            batch.push(&single(1, &packet), &mut None).unwrap().unwrap();
        }
        let found: Vec<_> = batch
            .messages()
            .iter()
            .map(|message| message.datagrams)
            .collect();
        assert_eq!(found, [46, 46, 8]);
    }

    #[test]
    fn segments_that_no_datagram_carries_are_refused() {
        let packet = crate::testing::udp_packet(&[3; 65_480]);
        let gso = |size| Header {
            gso: Some(Gso {
                kind: GsoKind::Udp,
                size,
                ecn: false,
            }),
            ..Header::default()
        };
        let mut headers = vec![0; HEADERS_LEN];
        let mut batch = SendBatch::new(&mut headers, true);
        let mut push = |size| {
            let queued = Queued {
                offload: gso(size),
                ..single(1, &packet)
            };
            batch.push(&queued, &mut None)
        };
        let len = 65_508;
        assert_eq!(push(65_480), Err(split::Error::TooLong { len }));
        assert_eq!(push(65_479), Ok(Ok(())));
    }

    #[test]
    fn a_superpacket_goes_on_in_the_next_plan() {
        let mut packet = crate::testing::udp_packet(&[3; 1000]);
        packet.splice(0..0, [0; 22]);
        packet[20] = 8;
        let offload = Header {
            gso: Some(Gso {
                kind: GsoKind::Udp,
                size: 10,
                ecn: false,
            }),
            ..Header::default()
        };
        let queued = Queued {
            key: 1,
            packet: &packet,
            network: 22,
            offload,
            checksums: Checksums::Complete,
        };
        for (trains, plans) in [(true, 1), (false, 2)] {
            let mut headers = vec![0; HEADERS_LEN];
            let (mut split, mut count, mut all) = (None, 0, Vec::new());
            loop {
                let mut batch = SendBatch::new(&mut headers, trains);
                let done = batch.push(&queued, &mut split).unwrap();
                count += 1;
                all.extend(received(&batch));
                let packets: usize = batch.messages().iter().map(|message| message.packets).sum();
                assert_eq!(packets, usize::from(done.is_ok()));
                if done.is_ok() {
                    break;
                }
            }
            assert_eq!((all.len(), count), (100, plans), "trains: {trains}");
            assert!(
                all.iter()
                    .all(|(_, datagram)| datagram.len() == 22 + 28 + 10)
            );
        }
    }

    /// A seal that shows what it must: a number for each datagram to a key, and bytes that depend on
    /// it; pads to even lengths.
    #[derive(Default)]
    struct Toy {
        next: [u32; 3],
    }

    impl Seal<u8> for Toy {
        fn len(&self, len: usize) -> usize {
            5 + len.next_multiple_of(2) + 1
        }

        fn seal(&mut self, key: u8, [one, two]: [&[u8]; 2], sealed: &mut [u8]) -> bool {
            sealed[5..5 + one.len()].copy_from_slice(one);
            sealed[5 + one.len()..][..two.len()].copy_from_slice(two);
            let number = &mut self.next[usize::from(key)];
            let (head, rest) = sealed.split_at_mut(5);
            head[0] = key;
            head[1..].copy_from_slice(&number.to_be_bytes());
            let (last, text) = rest.split_last_mut().unwrap();
            text.iter_mut().for_each(|byte| *byte ^= *number as u8);
            *last = text.iter().fold(0, |sum, byte| sum ^ byte);
            *number += 1;
            true
        }
    }

    /// The number of a sealed datagram to a key, and its text, padded.
    fn open((key, sealed): &(u8, Vec<u8>)) -> (u32, Vec<u8>) {
        assert_eq!(sealed[0], *key);
        let number = u32::from_be_bytes(sealed[1..5].try_into().unwrap());
        let (last, text) = sealed[5..].split_last().unwrap();
        assert_eq!(text.iter().fold(0, |sum, byte| sum ^ byte), *last);
        (
            number,
            text.iter().map(|byte| byte ^ number as u8).collect(),
        )
    }

    #[test]
    fn sealed_datagrams_open_in_order() {
        let single_packet = [7; 60];
        let superpacket = crate::testing::udp_packet(&[3; 1005]);
        let offload = Header {
            gso: Some(Gso {
                kind: GsoKind::Udp,
                size: 10,
                ecn: false,
            }),
            ..Header::default()
        };
        let super_queued = Queued {
            offload,
            ..single(1, &superpacket)
        };
        let queued = [
            single(1, &single_packet),
            super_queued,
            single(2, &single_packet),
            single(1, &single_packet[..33]),
        ];
        // What leaves unsealed, in the same order.
        let mut headers = vec![0; HEADERS_LEN];
        let mut plain = SendBatch::new(&mut headers, true);
        for queued in &queued {
            plain.push(queued, &mut None).unwrap().unwrap();
        }
        let plain = received(&plain);
        for trains in [true, false] {
            let (mut seal, mut split) = (Toy::default(), None);
            let (mut all, mut packets, mut batches, mut messages) = (Vec::new(), 0, 0, 0);
            let mut rest = queued.iter().peekable();
            while rest.peek().is_some() {
                let mut area = vec![0; 4000];
                let mut batch = SendBatch::new(&mut area, trains);
                while let Some(queued) = rest.peek() {
                    match batch.push_sealed(queued, &mut split, &mut seal).unwrap() {
                        Ok(()) => rest.next(),
                        Err(Full) => break,
                    };
                }
                all.extend(received(&batch));
                packets += batch.messages().iter().map(|it| it.packets).sum::<usize>();
                messages += batch.messages().len();
                batches += 1;
            }
            assert_eq!((packets, batches > 1), (queued.len(), true));
            assert!(trains == (messages < all.len()), "{messages} messages");
            let mut next = [0; 3];
            assert_eq!(all.len(), plain.len());
            for (sealed, (key, text)) in all.iter().zip(&plain) {
                let (number, opened) = open(sealed);
                assert_eq!((sealed.0, number), (*key, next[usize::from(*key)]));
                next[usize::from(*key)] += 1;
                assert_eq!(&opened[..text.len()], text);
                assert!(opened.len() - text.len() <= 1);
            }
        }
    }

    #[test]
    fn segments_that_no_datagram_carries_when_sealed_are_refused() {
        let packet = crate::testing::udp_packet(&[3; 65_480]);
        let push = |size| {
            let offload = Header {
                gso: Some(Gso {
                    kind: GsoKind::Udp,
                    size,
                    ecn: false,
                }),
                ..Header::default()
            };
            let queued = Queued {
                offload,
                ..single(1, &packet)
            };
            let mut area = vec![0; HEADERS_LEN];
            let mut batch = SendBatch::new(&mut area, true);
            batch.push_sealed(&queued, &mut None, &mut Toy::default())
        };
        let len = 5 + 65_507 + 2;
        assert_eq!(push(65_479), Err(split::Error::TooLong { len }));
        assert!(push(65_000).is_ok());
    }
}
