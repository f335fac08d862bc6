//! The virtio-net header, `virtio_net_hdr` (virtio 1.2 section 5.1.6): what is still to be done to
//! a frame. A TAP device opened with `IFF_VNET_HDR` has it in front of every frame.
//!
//! ```text
//! 0 flags: u8   1 gso_type: u8   2 hdr_len   4 gso_size   6 csum_start   8 csum_offset: u16
//! ```
//! A TAP device uses the form of ten bytes, in the machine's byte order, unless it was configured
//! otherwise by `TUNSETVNETHDRSZ` and `TUNSETVNETLE`. The form of virtio 1.x has twelve bytes and
//! is always little-endian; a TAP device leaves its last two bytes (`num_buffers`) alone.
//!
//! All offsets count from the first byte of the frame. `hdr_len` is only a hint: for a packet that
//! the kernel forwarded it may cover the whole first buffer. So nothing here depends on it, and
//! [`Header::check`] only checks that it lies inside the frame.

use thiserror::Error;

/// Length in bytes of the header that a TAP device uses by default.
pub const LEN: usize = 10;
/// Length in bytes of the form with `num_buffers` (virtio 1.2 section 5.1.6, `VIRTIO_F_VERSION_1`).
pub const LEN_WITH_BUFFERS: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// What is known about the transport checksum of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Checksum {
    /// Nothing: the receiver has to verify it.
    #[default]
    Unknown,
    /// The field holds the sum of the pseudo header only, folded and not inverted. The sum of all
    /// bytes from `start` to the end is still to be written there (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
    Partial {
        /// Offset in the frame where summing starts: the transport header.
        start: u16,
        /// Offset of the field from `start`: 16 for TCP, 6 for UDP.
        offset: u16,
    },
    /// It has been verified (`VIRTIO_NET_HDR_F_DATA_VALID`).
    Valid,
}

/// The protocol of a superpacket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GsoKind {
    /// TCP over IPv4 (`VIRTIO_NET_HDR_GSO_TCPV4`).
    TcpV4,
    /// TCP over IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`).
    TcpV6,
    /// UDP over IPv4 or IPv6; each segment is a datagram (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp,
}

/// How a superpacket is to be segmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gso {
    /// The protocol.
    pub kind: GsoKind,
    /// Bytes of payload in every segment but the last, which may have less. Not zero.
    pub size: u16,
    /// Whether the TCP header has the CWR flag, which belongs to the first segment only
    /// (`VIRTIO_NET_HDR_GSO_ECN`).
    pub ecn: bool,
}

/// A virtio-net header. With the default one nothing is left to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Header {
    /// The state of the transport checksum.
    pub checksum: Checksum,
    /// How to segment the frame, for a superpacket.
    pub gso: Option<Gso>,
    /// Length in bytes of all headers of a superpacket, as a hint.
    pub hdr_len: u16,
}

/// Why bytes are not a virtio-net header, or not that of the frame behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// Fewer bytes than the header has.
    #[error("{len} bytes are too few for a virtio-net header")]
    TooShort {
        /// The number of bytes.
        len: usize,
    },
    /// A segmentation type that was not negotiated: UFO, tunnels, or a future one.
    #[error("the virtio-net header has segmentation type {0:#04x}")]
    GsoType(u8),
    /// A superpacket whose segments would be empty.
    #[error("the virtio-net header has a segment size of zero")]
    GsoSize,
    /// A superpacket without a partial checksum (virtio 1.2 section 5.1.6.2: `NEEDS_CSUM` must
    /// be set with any segmentation type).
    #[error("the virtio-net header has a segmentation type and no partial checksum")]
    GsoChecksum,
    /// The checksum field lies beyond the end of the frame.
    #[error("the checksum at {start}+{offset} lies outside a frame of {len} bytes")]
    ChecksumOutside {
        /// Offset where summing starts.
        start: u16,
        /// Offset of the field from there.
        offset: u16,
        /// Length of the frame in bytes.
        len: usize,
    },
    /// The header length is longer than the frame.
    #[error("headers of {hdr_len} bytes do not fit a frame of {len} bytes")]
    HeaderLen {
        /// The field's value in bytes.
        hdr_len: u16,
        /// Length of the frame in bytes.
        len: usize,
    },
}

impl Header {
    /// Parses the header at the start of `bytes`, with numbers in the machine's byte order.
    /// Anything behind the first ten bytes is ignored, so this parses the form of twelve bytes too.
    ///
    /// # Errors
    /// `Error` if there are too few bytes, or a segmentation type that is unknown or has no size.
    /// Unknown flags are ignored, as virtio 1.2 section 5.1.6.4.1 demands.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let Some(&[flags, kind, h0, h1, g0, g1, s0, s1, o0, o1]) = bytes.first_chunk::<LEN>()
        else {
            return Err(Error::TooShort { len: bytes.len() });
        };
        let checksum = if flags & NEEDS_CSUM != 0 {
            Checksum::Partial {
                start: u16::from_ne_bytes([s0, s1]),
                offset: u16::from_ne_bytes([o0, o1]),
            }
        } else if flags & DATA_VALID != 0 {
            Checksum::Valid
        } else {
            Checksum::Unknown
        };
        Ok(Self {
            checksum,
            gso: Gso::parse(kind, u16::from_ne_bytes([g0, g1]))?,
            hdr_len: u16::from_ne_bytes([h0, h1]),
        })
    }

    /// The ten bytes of the header, with numbers in the machine's byte order.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; LEN] {
        let (flags, start, offset) = match self.checksum {
            Checksum::Unknown => (0, 0, 0),
            Checksum::Partial { start, offset } => (NEEDS_CSUM, start, offset),
            Checksum::Valid => (DATA_VALID, 0, 0),
        };
        let (kind, size) = self
            .gso
            .map_or((GSO_NONE, 0), |gso| (gso.kind_byte(), gso.size));
        let ([h0, h1], [g0, g1]) = (self.hdr_len.to_ne_bytes(), size.to_ne_bytes());
        let ([s0, s1], [o0, o1]) = (start.to_ne_bytes(), offset.to_ne_bytes());
        [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1]
    }

    /// Checks the header against the length in bytes of the frame behind it.
    ///
    /// # Errors
    /// `Error` if an offset lies outside the frame, or a superpacket has no partial checksum.
    pub const fn check(&self, len: usize) -> Result<(), Error> {
        if let Checksum::Partial { start, offset } = self.checksum
            && start as usize + offset as usize + 2 > len
        {
            return Err(Error::ChecksumOutside { start, offset, len });
        }
        if self.gso.is_some() && !matches!(self.checksum, Checksum::Partial { .. }) {
            return Err(Error::GsoChecksum);
        }
        if self.hdr_len as usize > len {
            let hdr_len = self.hdr_len;
            return Err(Error::HeaderLen { hdr_len, len });
        }
        Ok(())
    }

    /// The header after the `from` bytes in front of the IP header have been replaced by `to`
    /// bytes. `None` if an offset would not fit its field.
    #[must_use]
    pub fn moved(mut self, from: usize, to: usize) -> Option<Self> {
        let shift = |offset: u16| {
            let offset = usize::from(offset).checked_sub(from)?.checked_add(to)?;
            u16::try_from(offset).ok()
        };
        if let Checksum::Partial { start, .. } = &mut self.checksum {
            *start = shift(*start)?;
        }
        if self.hdr_len != 0 {
            // The hint may be missing.
            self.hdr_len = shift(self.hdr_len).unwrap_or_default();
        }
        Some(self)
    }
}

impl Gso {
    const fn parse(kind: u8, size: u16) -> Result<Option<Self>, Error> {
        let ecn = kind & GSO_ECN != 0;
        let known = match kind & !GSO_ECN {
            GSO_NONE if !ecn => return Ok(None),
            GSO_TCPV4 => GsoKind::TcpV4,
            GSO_TCPV6 => GsoKind::TcpV6,
            GSO_UDP_L4 if !ecn => GsoKind::Udp,
            _ => return Err(Error::GsoType(kind)),
        };
        if size == 0 {
            return Err(Error::GsoSize);
        }
        Ok(Some(Self {
            kind: known,
            size,
            ecn,
        }))
    }

    const fn kind_byte(self) -> u8 {
        let kind = match self.kind {
            GsoKind::TcpV4 => GSO_TCPV4,
            GsoKind::TcpV6 => GSO_TCPV6,
            GsoKind::Udp => GSO_UDP_L4,
        };
        if self.ecn { kind | GSO_ECN } else { kind }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(flags: u8, kind: u8, numbers: [u16; 4]) -> Vec<u8> {
        let numbers = numbers.into_iter().flat_map(u16::to_ne_bytes);
        [flags, kind].into_iter().chain(numbers).collect()
    }

    #[test]
    fn what_linux_writes_is_read() {
        // As seen on a TAP device of Linux 6.18 with TSO and USO.
        let header = Header::parse(&bytes(1, 1, [66, 1398, 34, 16])).unwrap();
        let partial = Checksum::Partial {
            start: 34,
            offset: 16,
        };
        let gso = Gso {
            kind: GsoKind::TcpV4,
            size: 1398,
            ecn: false,
        };
        assert_eq!(header.checksum, partial);
        assert_eq!((header.gso, header.hdr_len), (Some(gso), 66));
        assert_eq!(header.check(66), Ok(()));

        let ecn = Header::parse(&bytes(1, 0x84, [86, 1378, 54, 16])).unwrap();
        let kind = GsoKind::TcpV6;
        assert_eq!(
            ecn.gso,
            Some(Gso {
                kind,
                size: 1378,
                ecn: true
            })
        );
        let valid = Header::parse(&bytes(2, 0, [0; 4])).unwrap();
        assert_eq!(valid.checksum, Checksum::Valid);
        let none = Header::parse(&bytes(0xf8, 0, [0, 9, 9, 9])).unwrap();
        assert_eq!(
            none,
            Header::default(),
            "numbers without a flag say nothing"
        );
    }

    #[test]
    fn each_malformation_has_its_own_error() {
        assert_eq!(Header::parse(&[0; 9]), Err(Error::TooShort { len: 9 }));
        assert!(Header::parse(&[0; LEN_WITH_BUFFERS]).is_ok());
        for kind in [2, 3, 6, 0x21, 0x41, 0x80, 0x85] {
            let parsed = Header::parse(&bytes(1, kind, [0, 9, 0, 0]));
            assert_eq!(parsed, Err(Error::GsoType(kind)));
        }
        let parsed = Header::parse(&bytes(1, 1, [0, 0, 0, 0]));
        assert_eq!(parsed, Err(Error::GsoSize));

        let check = |flags, kind, numbers, len| {
            Header::parse(&bytes(flags, kind, numbers))
                .unwrap()
                .check(len)
        };
        assert_eq!(check(1, 0, [0, 0, 34, 16], 52), Ok(()));
        let (start, offset, len) = (34, 16, 51);
        assert_eq!(
            check(1, 0, [0, 0, 34, 16], 51),
            Err(Error::ChecksumOutside { start, offset, len })
        );
        assert!(check(1, 0, [0, 0, u16::MAX, u16::MAX], 70_000).is_err());
        assert_eq!(check(0, 1, [54, 9, 0, 0], 99), Err(Error::GsoChecksum));
        assert_eq!(check(2, 5, [54, 9, 0, 0], 99), Err(Error::GsoChecksum));
        let (hdr_len, len) = (100, 99);
        assert_eq!(
            check(1, 1, [100, 9, 34, 16], 99),
            Err(Error::HeaderLen { hdr_len, len })
        );
    }

    #[test]
    fn offsets_follow_the_packet() {
        let header = Header::parse(&bytes(1, 1, [66, 1398, 34, 16])).unwrap();
        let bare = header.moved(14, 0).unwrap();
        assert_eq!(
            bare,
            Header::parse(&bytes(1, 1, [52, 1398, 20, 16])).unwrap()
        );
        assert_eq!(bare.moved(0, 14), Some(header));
        assert_eq!(header.moved(35, 0), None);
        assert_eq!(header.moved(0, 65_535), None);
        assert_eq!(Header::default().moved(14, 0), Some(Header::default()));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..14)) {
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
                let _ = header.check(usize::from(bytes[2]) * 300);
            }
        }
    }
}
