//! Which IP packets came in, and which of them have left, told apart by their identification.

use std::collections::BTreeMap;

/// Bytes of an IPv4 header that are looked at.
const LOOKED_AT: usize = 20;

/// What came and what left.
#[derive(Debug, Default)]
pub struct Ledger {
    came: Vec<Came>,
    left: BTreeMap<(u16, u16), usize>,
}

#[derive(Debug)]
struct Came {
    ident: u16,
    /// How many packets it may become, with the identifications that follow.
    packets: u16,
    ttl: u8,
    /// Whether this node is no hop of its.
    from_egress: bool,
}

impl Ledger {
    /// An IP packet comes in that may be taken apart into so many, from egress or elsewhere.
    pub fn come(&mut self, packet: &[u8], packets: u16, from_egress: bool) {
        if packet.len() >= LOOKED_AT {
            self.came.push(Came {
                ident: word(packet, 4),
                packets,
                ttl: packet[8],
                from_egress,
            });
        }
    }

    /// An IP packet of another's leaves, after so many hops; egress has counted its own.
    ///
    /// # Panics
    /// If it never came, or has left already, or its TTL is not what it should be.
    pub fn leave(&mut self, packet: &[u8], hops: u8) {
        if packet.len() < LOOKED_AT {
            return;
        }
        let (ident, offset) = (word(packet, 4), word(packet, 6) & 0x1fff);
        let of_this = |came: &&Came| ident.wrapping_sub(came.ident) < came.packets;
        let left = self.left.entry((ident, offset)).or_default();
        *left += 1;
        let came = self.came.iter().filter(of_this);
        assert!(*left <= came.clone().count(), "packet {ident} leaves again");
        let mut had = came.map(|came| (came.ttl, if came.from_egress { 0 } else { hops }));
        assert!(
            had.any(|(ttl, hops)| packet[8].checked_add(hops) == Some(ttl)),
            "packet {ident} has another TTL"
        );
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
