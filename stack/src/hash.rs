//! Hashing that is the same in every run of the same seed and unknown to those who send packets.

use std::hash::{BuildHasher, DefaultHasher, Hasher};

use foldhash::fast::FixedState;

/// Builds hashers from an injected random seed, so that nobody can choose addresses that collide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed(pub u64);

impl BuildHasher for Seed {
    type Hasher = DefaultHasher;

    fn build_hasher(&self) -> DefaultHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.0);
        hasher
    }
}

/// A hash of the flow of a well-formed IPv4 packet: equal for all packets of a connection in one
/// direction. Fragments count by their addresses and protocol only, since all but the first have
/// no ports.
#[must_use]
pub fn flow(packet: &[u8], seed: Seed) -> u32 {
    use smoltcp::wire::{IpProtocol, Ipv4Packet};
    // It only chooses a socket and a worker: one who makes flows collide slows down those alone.
    let mut hasher = FixedState::with_seed(seed.0).build_hasher();
    if let Ok(ip) = Ipv4Packet::new_checked(packet) {
        let (source, destination) = (ip.src_addr().to_bits(), ip.dst_addr().to_bits());
        hasher.write_u64(u64::from(source) << 32 | u64::from(destination));
        hasher.write_u8(ip.next_header().into());
        let has_ports = matches!(ip.next_header(), IpProtocol::Tcp | IpProtocol::Udp)
            && ip.frag_offset() == 0
            && !ip.more_frags();
        if has_ports && let Some(ports) = ip.payload().first_chunk() {
            hasher.write_u32(u32::from_be_bytes(*ports));
        }
    }
    hasher.finish() as u32
}
