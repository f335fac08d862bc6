//! A packet inside a larger buffer, with room in front for the headers still to come.
//!
//! The storage belongs to the caller (a worker keeps one for its lifetime), so putting a tunnel
//! header in front of a packet moves an offset and writes the header; the payload stays in place.

use thiserror::Error;

/// Bytes kept free in front of a packet that is read from a device or socket: a VXLAN header, an
/// inner Ethernet header and a virtio-net header fit, and the packet starts on a cache line.
pub const HEADROOM: usize = 64;

/// There is not enough room in the buffer for what is to be put into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the buffer has room for {room} bytes where {needed} are needed")]
pub struct NoRoom {
    /// Bytes that are needed.
    pub needed: usize,
    /// Bytes that are there.
    pub room: usize,
}

/// A packet that occupies part of a borrowed buffer and can grow to the front.
#[derive(Debug)]
pub struct PacketBuf<'a> {
    storage: &'a mut [u8],
    start: usize,
    end: usize,
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
        })
    }

    /// Length of the packet in bytes.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether the packet has no bytes.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Bytes free in front of the packet.
    pub fn headroom(&self) -> usize {
        self.start
    }

    /// The packet's bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.storage[self.start..self.end]
    }

    /// The packet's bytes, to be edited in place.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.end]
    }

    /// Grows the packet by `len` bytes at its front and returns those bytes, whose content is
    /// whatever lay there before.
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

    /// Shortens the packet to at most `len` bytes by cutting its end.
    pub fn truncate(&mut self, len: usize) {
        self.end = self.end.min(self.start.saturating_add(len));
    }

    /// Replaces the packet by a copy of `bytes`, with `HEADROOM` bytes free in front where the
    /// buffer is large enough for that.
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
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        packet.truncate(usize::MAX);
        packet.trim_front(usize::MAX);
        assert!(packet.is_empty());
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
