//! Internet checksums (RFC 1071), updated rather than recomputed where one field changes.
//!
//! A router that decrements the TTL changes one 16-bit word of the header; the checksum follows
//! from that word alone (RFC 1624), whatever options the header has. The full sum is smoltcp's.

use smoltcp::wire::checksum;

/// Offset of the TTL in an IPv4 header.
const TTL: usize = 8;
/// Offset of the protocol number, the other half of the TTL's word.
const PROTOCOL: usize = 9;
/// Offset of the header checksum, network order.
const CHECKSUM: usize = 10;
/// Length of an IPv4 header without options.
const MIN_HEADER_LEN: usize = 20;

/// The checksum after a 16-bit word it covers changed from `old` to `new` (RFC 1624 section 3,
/// equation 3). All in host order.
#[must_use]
pub const fn update(checksum: u16, old: u16, new: u16) -> u16 {
    let sum = !checksum as u32 + !old as u32 + new as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// The Internet checksum of `data`, ready for a header field; zero over data whose own checksum
/// field is right.
#[must_use]
pub fn compute(data: &[u8]) -> u16 {
    !checksum::data(data)
}

/// Decrements the TTL of an IPv4 packet by one, with its header checksum, and returns the new
/// value; `None` if the packet is too short for a header or its TTL is already zero, in which case
/// it is unchanged.
pub fn decrement_ttl(packet: &mut [u8]) -> Option<u8> {
    let header = packet.get_mut(..MIN_HEADER_LEN)?;
    let old = u16::from_be_bytes([header[TTL], header[PROTOCOL]]);
    let ttl = header[TTL].checked_sub(1)?;
    header[TTL] = ttl;
    let new = u16::from_be_bytes([ttl, header[PROTOCOL]]);
    let sum = u16::from_be_bytes([header[CHECKSUM], header[CHECKSUM + 1]]);
    header[CHECKSUM..CHECKSUM + 2].copy_from_slice(&update(sum, old, new).to_be_bytes());
    Some(ttl)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_example_of_rfc_1624() {
        // Section 4: a checksum of 0xDD2F, a word that goes from 0x5555 to 0x3285.
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn a_short_packet_or_a_dead_one_is_left_alone() {
        assert_eq!(decrement_ttl(&mut [0x45; 19]), None);
        let mut dead = [0; 20];
        assert_eq!(decrement_ttl(&mut dead), None);
        assert_eq!(dead, [0; 20]);
    }

    fn fill_checksum(header: &mut [u8]) {
        header[CHECKSUM..CHECKSUM + 2].fill(0);
        let sum = compute(header);
        header[CHECKSUM..CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
    }

    proptest! {
        #[test]
        fn an_update_agrees_with_a_full_sum(
            mut data in proptest::collection::vec(any::<u8>(), 40),
            word in 0usize..19,
            new in any::<u16>(),
        ) {
            // A header always holds a word that is not zero (the version), so that the two
            // representations of zero cannot differ.
            data[38] = 0x45;
            let at = word * 2;
            let old = u16::from_be_bytes([data[at], data[at + 1]]);
            let before = compute(&data);
            data[at..at + 2].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(update(before, old, new), compute(&data));
        }

        #[test]
        fn a_decremented_ttl_leaves_a_valid_header(
            mut header in proptest::collection::vec(any::<u8>(), 20..60),
            ttl in 1u8..,
        ) {
            header.truncate(header.len() & !1);
            header[0] = 0x45;
            header[TTL] = ttl;
            fill_checksum(&mut header);
            prop_assert_eq!(decrement_ttl(&mut header), Some(ttl - 1));
            prop_assert_eq!(header[TTL], ttl - 1);
            prop_assert_eq!(compute(&header), 0);
        }
    }
}
