//! IPv4 in IPv4 (RFC 2003): an inner packet directly behind an outer header of protocol 4.
//!
//! Sending needs no codec: a raw socket of that protocol takes the inner packet, and the kernel
//! writes the outer header. A received datagram has that header in front (raw(7)).

use std::net::Ipv4Addr;

use smoltcp::wire::IpProtocol;
use thiserror::Error;

use crate::ip::v4;

/// Protocol number of IPv4 in an IP packet (RFC 2003 section 3.1).
pub const PROTOCOL: u8 = 4;

/// Why a datagram is not IPv4 in IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// The outer header is malformed.
    #[error("the outer header: {0}")]
    Outer(#[from] v4::Error),
    /// The outer packet is a fragment.
    #[error("the outer packet is a fragment")]
    Fragment,
    /// The outer packet carries another protocol.
    #[error("the outer header has protocol {0}, not IPv4 in IP")]
    Protocol(u8),
}

/// The offset in bytes of the inner packet in a datagram that a raw socket received. The inner
/// packet itself is not checked.
///
/// # Errors
/// `Error` if the outer header is malformed, of a fragment, or of another protocol.
pub fn inner_offset(datagram: &[u8]) -> Result<usize, Error> {
    let (header_len, _) = v4::lengths(datagram, datagram.len())?;
    if v4::is_fragment(datagram) {
        return Err(Error::Fragment);
    }
    match datagram[v4::field::PROTOCOL] {
        PROTOCOL => Ok(header_len),
        other => Err(Error::Protocol(other)),
    }
}

/// What a raw socket receives of an inner packet that came from `source` to `destination`, for tests
/// and traces.
#[must_use]
pub fn received(source: Ipv4Addr, destination: Ipv4Addr, inner: &[u8]) -> Vec<u8> {
    let header = v4::Header {
        dscp: 0,
        total_len: (v4::HEADER_LEN + inner.len()) as u16,
        ident: 0,
        dont_fragment: false,
        ttl: 64,
        protocol: IpProtocol::from(PROTOCOL),
        source,
        destination,
    };
    [&header.to_bytes(), inner].concat()
}

#[cfg(test)]
mod tests {
    use etherparse::{IpNumber, Ipv4Header, Ipv4Options};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::udp_packet;

    fn wrapped(inner: &[u8], options: &[u8], protocol: u8) -> Vec<u8> {
        let mut outer = Ipv4Header {
            total_len: (20 + options.len() + inner.len()) as u16,
            time_to_live: 64,
            protocol: IpNumber(protocol),
            source: [192, 168, 1, 2],
            destination: [192, 168, 1, 3],
            options: Ipv4Options::try_from(options).unwrap(),
            ..Ipv4Header::default()
        };
        outer.header_checksum = outer.calc_header_checksum();
        [&outer.to_bytes(), inner].concat()
    }

    #[test]
    fn the_inner_packet_is_behind_the_outer_header() {
        let inner = udp_packet(b"inside");
        for (options, offset) in [(&[][..], 20), (&[1; 8][..], 28), (&[1; 40][..], 60)] {
            let mut datagram = wrapped(&inner, options, 4);
            assert_eq!(inner_offset(&datagram), Ok(offset));
            assert_eq!(datagram[offset..], inner);
            datagram.extend([9; 5]);
            assert_eq!(inner_offset(&datagram), Ok(offset), "padding");
        }
    }

    #[test]
    fn each_malformation_has_its_own_error() {
        let good = wrapped(&udp_packet(b"inside"), &[], 4);
        let outer = |error| Err(Error::Outer(error));
        let (len, total) = (good.len(), good.len() as u16);
        assert_eq!(
            inner_offset(&good[..19]),
            outer(v4::Error::TooShort { len: 19 })
        );
        assert_eq!(
            inner_offset(&good[..len - 1]),
            outer(v4::Error::TotalLen {
                total,
                len: len - 1
            })
        );
        let with = |at: usize, value| {
            let mut bytes = good.clone();
            bytes[at] = value;
            inner_offset(&bytes)
        };
        assert_eq!(with(0, 0x65), outer(v4::Error::Version(6)));
        assert_eq!(with(0, 0x44), outer(v4::Error::HeaderLen(16)));
        let total = 19;
        assert_eq!(with(3, 19), outer(v4::Error::TotalLen { total, len }));
        for (at, value) in [(6, 0x20), (6, 0x1f), (7, 1)] {
            assert_eq!(with(at, value), Err(Error::Fragment));
        }
        assert_eq!(with(6, 0x40), Ok(20), "may not be fragmented");
        for protocol in [17, 41, 94] {
            assert_eq!(with(9, protocol), Err(Error::Protocol(protocol)));
        }
    }

    proptest! {
        #[test]
        fn an_offset_is_inside(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(offset) = inner_offset(&bytes) {
                prop_assert!((20..=60).contains(&offset) && offset <= bytes.len());
            }
        }
    }
}
