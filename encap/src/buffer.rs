//! A packet inside a larger buffer, with room in front for the headers still to come.
//!
//! The storage belongs to the caller (a worker keeps one for its lifetime), so putting a tunnel
//! header in front of a packet moves an offset and writes the header; the payload stays in place.
//!
//! A superpacket comes with a virtio-net header, which says what is still to be done to it. One
//! that was merged from segments has only its first segment in the buffer; the payloads of the
//! others, its tail, are elsewhere, and the buffer knows where.

use thiserror::Error;

use crate::ip::checksum;
use crate::offload::virtio::{Checksum, Header};

/// Bytes to keep free in front of a packet that is read from a device or socket. A VXLAN header, an
/// inner Ethernet header and a virtio-net header fit, and the packet starts on a cache line.
pub const HEADROOM: usize = 64;

/// The buffer is too small for what is to be put into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the buffer has room for {room} bytes where {needed} are needed")]
pub struct NoRoom {
    /// Bytes needed.
    pub needed: usize,
    /// Bytes available.
    pub room: usize,
}

/// A packet that occupies part of a borrowed buffer and can grow to the front.
#[derive(Debug)]
pub struct PacketBuf<'a> {
    storage: &'a mut [u8],
    start: usize,
    end: usize,
    /// Where the bytes of the packet are that come behind those in the buffer, and how many of them
    /// belong to it.
    tail: &'a [&'a [u8]],
    tail_len: usize,
    /// What is still to be done to the packet, with offsets that count from `origin`.
    offload: Header,
    origin: usize,
}

impl<'a> PacketBuf<'a> {
    /// The `len` bytes of `storage` that begin at offset `headroom`, as a packet.
    ///
    /// # Errors
    /// `NoRoom` if the storage is shorter than `headroom + len`.
    pub fn new(storage: &'a mut [u8], headroom: usize, len: usize) -> Result<Self, NoRoom> {
        let (needed, room) = (headroom.saturating_add(len), storage.len());
        if needed > room {
            return Err(NoRoom { needed, room });
        }
        Ok(Self {
            storage,
            start: headroom,
            end: headroom + len,
            tail: &[],
            tail_len: 0,
            offload: Header::default(),
            origin: headroom,
        })
    }

    /// Adds a virtio-net header, whose offsets count from the packet's present first byte.
    #[must_use]
    pub fn with_offload(mut self, offload: Header) -> Self {
        self.offload = offload;
        self.origin = self.start;
        self
    }

    /// The same as [`Self::with_offload`] for a packet that was filled in its place.
    pub fn set_offload(&mut self, offload: Header) {
        self.offload = offload;
        self.origin = self.start;
    }

    /// Adds a tail: further bytes that are not in the buffer, in pieces.
    #[must_use]
    pub fn with_tail(mut self, tail: &'a [&'a [u8]]) -> Self {
        self.tail = tail;
        self.tail_len = tail.iter().map(|piece| piece.len()).sum();
        self
    }

    /// The pieces of its tail, which may have more bytes than belong to a packet that was truncated.
    #[inline]
    pub const fn tail(&self) -> &'a [&'a [u8]] {
        self.tail
    }

    /// What is still to be done to the packet, with offsets from its first byte: nothing, if its
    /// header no longer fits it.
    pub fn offload(&self) -> Header {
        let moved = if self.start >= self.origin {
            self.offload.moved(self.start - self.origin, 0)
        } else {
            self.offload.moved(0, self.origin - self.start)
        };
        moved.unwrap_or_default()
    }

    /// Whether the packet is neither a superpacket nor has a tail.
    #[inline]
    pub fn is_single(&self) -> bool {
        self.offload.gso.is_none() && self.tail_len == 0
    }

    /// Completes the partial checksum of a single packet. The segments of a superpacket get theirs
    /// when it is split.
    pub fn complete_checksum(&mut self) {
        if !self.is_single() {
            return;
        }
        if let Checksum::Partial { start, offset } = self.offload().checksum {
            // Nothing is written if the field is outside: such a packet is as broken as before.
            let _ = checksum::complete(self.as_mut_slice(), start.into(), offset.into());
        }
        self.offload = Header::default();
    }

    /// Length of the whole packet in bytes, its tail included.
    #[inline]
    pub fn total_len(&self) -> usize {
        self.len() + self.tail_len
    }

    /// Length in bytes of the part of the packet that is in the buffer.
    #[inline]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether the buffer has no bytes of the packet.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Free bytes in front of the packet.
    pub fn headroom(&self) -> usize {
        self.start
    }

    /// The packet's bytes in the buffer, without its tail.
    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        &self.storage[self.start..self.end]
    }

    /// The packet's bytes in the buffer, for editing in place.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.end]
    }

    /// Grows the packet by `len` bytes at its front and returns those bytes, which are not cleared.
    ///
    /// # Errors
    /// `NoRoom` if less than `len` bytes are free in front; the packet is unchanged then.
    pub fn prepend(&mut self, len: usize) -> Result<&mut [u8], NoRoom> {
        if len > self.start {
            return Err(NoRoom {
                needed: len,
                room: self.start,
            });
        }
        self.start -= len;
        Ok(&mut self.storage[self.start..self.start + len])
    }

    /// Removes up to `len` bytes from the front; the packet is empty if it had fewer.
    pub fn trim_front(&mut self, len: usize) {
        self.start = self.start.saturating_add(len).min(self.end);
    }

    /// Shortens the packet to at most `len` bytes, counting its tail, which is cut first.
    pub fn truncate(&mut self, len: usize) {
        self.tail_len = self.tail_len.min(len.saturating_sub(self.len()));
        self.end = self.end.min(self.start.saturating_add(len));
    }

    /// Replaces the packet by a copy of `bytes`, with `HEADROOM` bytes free in front where the
    /// buffer is large enough for that. The packet then has no virtio-net header and no tail.
    ///
    /// # Errors
    /// `NoRoom` if the whole buffer is shorter than `bytes`; the packet is unchanged then.
    pub fn replace(&mut self, bytes: &[u8]) -> Result<(), NoRoom> {
        let room = self.storage.len();
        if bytes.len() > room {
            return Err(NoRoom {
                needed: bytes.len(),
                room,
            });
        }
        self.start = HEADROOM.min(room - bytes.len());
        self.end = self.start + bytes.len();
        self.storage[self.start..self.end].copy_from_slice(bytes);
        (self.tail, self.tail_len) = (&[], 0);
        self.offload = Header::default();
        Ok(())
    }
}

/// A packet in memory of its own, with its virtio-net header, as one worker hands it to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedPacket {
    bytes: Vec<u8>,
    offload: Header,
}

impl AsRef<[u8]> for PacketBuf<'_> {
    /// The same as [`Self::as_slice`].
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl OwnedPacket {
    /// A copy of a packet, which must not have a tail.
    #[must_use]
    pub fn copy(packet: &PacketBuf<'_>) -> Self {
        Self {
            bytes: packet.as_slice().to_vec(),
            offload: packet.offload(),
        }
    }

    /// The packet, without headroom.
    #[must_use]
    pub fn packet(&mut self) -> PacketBuf<'_> {
        let end = self.bytes.len();
        PacketBuf {
            storage: &mut self.bytes,
            start: 0,
            end,
            tail: &[],
            tail_len: 0,
            offload: self.offload,
            origin: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_the_packet_with_its_header() {
        let offload = Header {
            checksum: Checksum::Partial {
                start: 3,
                offset: 6,
            },
            ..Header::default()
        };
        let mut storage = *b"....frame-and-packet";
        let packet = PacketBuf::new(&mut storage, 4, 16).unwrap();
        let mut packet = packet.with_offload(offload);
        packet.trim_front(2);
        let expected = packet.offload();
        assert_eq!(expected, offload.moved(2, 0).unwrap());
        let mut copy = OwnedPacket::copy(&packet);
        let copied = copy.packet();
        assert_eq!(copied.as_slice(), packet.as_slice());
        assert_eq!((copied.offload(), copied.headroom()), (expected, 0));
    }

    #[test]
    fn headers_go_in_front_without_moving_the_packet() {
        let mut storage = *b"....payload";
        let mut packet = PacketBuf::new(&mut storage, 4, 7).unwrap();
        packet.prepend(2).unwrap().copy_from_slice(b"hd");
        assert_eq!(packet.as_slice(), b"hdpayload");
        assert_eq!(packet.headroom(), 2);
        packet.trim_front(2);
        packet.truncate(3);
        assert_eq!(packet.as_slice(), b"pay");
        assert!(!packet.is_empty());
        packet.truncate(usize::MAX);
        packet.trim_front(usize::MAX);
        assert!(packet.is_empty());
    }

    #[test]
    fn the_virtio_header_follows_its_packet() {
        let partial = |start| Checksum::Partial { start, offset: 6 };
        let offload = Header {
            checksum: partial(34),
            ..Header::default()
        };
        let mut storage = [0; 200];
        storage[64 + 12] = 8;
        let udp = crate::testing::udp_packet(b"payload");
        storage[64 + 14..][..udp.len()].copy_from_slice(&udp);
        let mut packet = PacketBuf::new(&mut storage, 64, 14 + udp.len())
            .unwrap()
            .with_offload(offload);
        assert_eq!(packet.offload().checksum, partial(34));
        packet.trim_front(14);
        assert_eq!(packet.offload().checksum, partial(20));
        packet.prepend(36).unwrap();
        assert_eq!(packet.offload().checksum, partial(56));
        packet.complete_checksum();
        assert_eq!(packet.offload(), Header::default());
        packet.trim_front(36);
        let at = crate::ip::transport::Transport::parse(packet.as_slice(), 0).unwrap();
        let field = at.checksum_offset();
        assert_ne!(packet.as_slice()[field..field + 2], udp[field..field + 2]);
    }

    #[test]
    fn a_tail_counts_but_is_not_here() {
        let mut storage = [0; 100];
        let pieces = [&[1; 10][..], &[2; 20]];
        let packet = PacketBuf::new(&mut storage, 10, 50).unwrap();
        let mut packet = packet.with_tail(&pieces);
        assert_eq!(packet.tail().concat(), pieces.concat());
        assert!(!packet.is_single());
        assert_eq!((packet.len(), packet.total_len()), (50, 80));
        packet.trim_front(10);
        packet.truncate(60);
        assert_eq!((packet.len(), packet.total_len()), (40, 60));
        packet.truncate(20);
        assert_eq!((packet.len(), packet.total_len()), (20, 20));
        assert!(packet.is_single());
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let mut storage = [0; 8];
        assert_eq!(
            PacketBuf::new(&mut storage, 6, 3).unwrap_err(),
            NoRoom { needed: 9, room: 8 }
        );
        assert!(PacketBuf::new(&mut storage, 9, 0).is_err());
        let mut packet = PacketBuf::new(&mut storage, 2, 6).unwrap();
        assert_eq!(
            packet.prepend(3).unwrap_err(),
            NoRoom { needed: 3, room: 2 }
        );
        assert_eq!(packet.len(), 6);
        assert!(packet.replace(&[1; 9]).is_err());
        packet.replace(&[1; 8]).unwrap();
        assert_eq!(packet.as_slice(), [1; 8]);
        assert_eq!(packet.headroom(), 0);
    }
}
