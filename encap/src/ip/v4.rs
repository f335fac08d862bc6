//! IPv4 headers (RFC 791 section 3.1).
//!
//! The router checks every packet that it forwards with [`check_head`], whichever way it came.

use smoltcp::wire::Ipv4Packet;
use thiserror::Error;

use crate::ip::checksum;

/// Why bytes are not one IPv4 packet (RFC 791 section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Error {
    /// Fewer bytes than an IPv4 header has.
    #[error("{len} bytes are too few for an IPv4 header")]
    TooShort {
        /// Bytes there were.
        len: usize,
    },
    /// The version field is not 4.
    #[error("IP version {0} where 4 is expected")]
    Version(u8),
    /// The header length field is below the minimum of 20 bytes or beyond the packet.
    #[error("an IPv4 header length of {0} bytes is not possible here")]
    HeaderLen(u8),
    /// The total length field is smaller than the header or larger than what arrived.
    #[error("a total length of {total} bytes where {len} bytes arrived")]
    TotalLen {
        /// The field's value in bytes.
        total: u16,
        /// Bytes there were.
        len: usize,
    },
    /// The header checksum is wrong.
    #[error("the IPv4 header checksum is wrong")]
    Checksum,
}

/// Checks that `packet` begins with one whole IPv4 packet and returns its total length in bytes.
/// Bytes behind that length (Ethernet pads short frames) are not part of it.
///
/// # Errors
/// The first thing that is wrong with the header.
pub fn check(packet: &[u8]) -> Result<usize, Error> {
    check_head(packet, packet.len())
}

/// The same of a packet of `len` bytes of which only the first part is here, with all of the
/// header.
///
/// # Errors
/// As [`check`].
pub fn check_head(packet: &[u8], len: usize) -> Result<usize, Error> {
    let view = Ipv4Packet::new_unchecked(packet);
    if packet.len() < smoltcp::wire::IPV4_HEADER_LEN {
        return Err(Error::TooShort { len: packet.len() });
    }
    if view.version() != 4 {
        return Err(Error::Version(view.version()));
    }
    let header_len = usize::from(view.header_len());
    if header_len < smoltcp::wire::IPV4_HEADER_LEN || header_len > packet.len() {
        return Err(Error::HeaderLen(view.header_len()));
    }
    let total = usize::from(view.total_len());
    if total < header_len || total > len {
        return Err(Error::TotalLen {
            total: view.total_len(),
            len,
        });
    }
    if checksum::compute(&packet[..header_len]) != 0 {
        return Err(Error::Checksum);
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::udp_packet;

    #[test]
    fn a_packet_is_as_long_as_it_says() {
        let mut bytes = udp_packet(b"hello");
        assert_eq!(check(&bytes), Ok(33));
        bytes.extend([0; 13]);
        assert_eq!(check(&bytes), Ok(33), "Ethernet padding is not part of it");
    }

    #[test]
    fn each_malformation_has_its_own_error() {
        let good = udp_packet(b"hello");
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            check(&bytes)
        };
        assert_eq!(check(&[]), Err(Error::TooShort { len: 0 }));
        assert_eq!(check(&good[..19]), Err(Error::TooShort { len: 19 }));
        assert_eq!(with(0, 0x65), Err(Error::Version(6)));
        assert_eq!(with(0, 0x44), Err(Error::HeaderLen(16)));
        assert_eq!(with(0, 0x4f), Err(Error::HeaderLen(60)));
        assert_eq!(with(3, 19), Err(Error::TotalLen { total: 19, len: 33 }));
        assert_eq!(with(3, 34), Err(Error::TotalLen { total: 34, len: 33 }));
        assert_eq!(
            check(&good[..32]),
            Err(Error::TotalLen { total: 33, len: 32 })
        );
        assert_eq!(with(8, 63), Err(Error::Checksum));
    }

    proptest! {
        #[test]
        fn an_independent_parser_agrees(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..80),
            version in prop::sample::select(vec![0x45u8, 0x46, 0x4f, 0x44, 0x65]),
            total in 0u16..90,
            fix in any::<bool>(),
        ) {
            if bytes.len() >= 20 {
                bytes[0] = version;
                bytes[2..4].copy_from_slice(&total.to_be_bytes());
                // Their parser forgets the reserved flag, which counts in the checksum.
                bytes[6] &= 0x7f;
                let header = usize::from(version & 0x0f) * 4;
                if fix && (20..=bytes.len()).contains(&header) {
                    bytes[10..12].fill(0);
                    let sum = checksum::compute(&bytes[..header]);
                    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                }
            }
            let theirs = etherparse::Ipv4HeaderSlice::from_slice(&bytes).ok().filter(|header| {
                let total = usize::from(header.total_len());
                total >= header.slice().len()
                    && total <= bytes.len()
                    && header.to_header().calc_header_checksum() == header.header_checksum()
            });
            prop_assert_eq!(
                check(&bytes).ok(),
                theirs.map(|header| usize::from(header.total_len()))
            );
        }
    }
}
