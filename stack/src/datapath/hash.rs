//! Hashing that is the same in every run of the same seed and unknown to those who send packets.

use std::hash::{BuildHasher, DefaultHasher, Hasher};

use foldhash::fast::FixedState;
use muslin_encap::ip::v6;

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

/// The same of a well-formed IPv6 packet.
#[must_use]
pub fn flow_v6(packet: &[u8], seed: Seed) -> u32 {
    use smoltcp::wire::{IpProtocol, Ipv6Packet};
    let mut hasher = FixedState::with_seed(seed.0).build_hasher();
    if let Ok(upper) = v6::upper_layer(packet) {
        let ip = Ipv6Packet::new_unchecked(packet);
        hasher.write_u128(ip.src_addr().to_bits());
        hasher.write_u128(ip.dst_addr().to_bits());
        let protocol = IpProtocol::from(upper.protocol);
        // What a fragment carries its Fragment header says, which may be another extension header's.
        if upper.fragment.is_none() {
            hasher.write_u8(upper.protocol);
        }
        let has_ports =
            matches!(protocol, IpProtocol::Tcp | IpProtocol::Udp) && upper.fragment.is_none();
        let payload = packet.get(upper.offset..).unwrap_or_default();
        if has_ports && let Some(ports) = payload.first_chunk() {
            hasher.write_u32(u32::from_be_bytes(*ports));
        }
    }
    hasher.finish() as u32
}

#[cfg(test)]
mod tests {
    use etherparse::{IpNumber, Ipv4Header, UdpHeader};

    use super::*;

    const HEADER_LEN: usize = 20;

    fn packet(protocol: IpNumber, source: u8, destination: u8, ports: (u16, u16)) -> Vec<u8> {
        let addresses = ([10, 244, 1, source], [10, 244, 2, destination]);
        let ip = Ipv4Header::new(8, 64, protocol, addresses.0, addresses.1).unwrap();
        let udp = UdpHeader::without_ipv4_checksum(ports.0, ports.1, 0).unwrap();
        [&ip.to_bytes()[..], &udp.to_bytes()[..]].concat()
    }

    #[test]
    fn a_flow_is_its_addresses_protocol_and_ports() {
        let hash = |packet: &[u8]| flow(packet, Seed(7));
        let udp = IpNumber::UDP;
        let first = packet(udp, 2, 3, (1000, 2000));
        let others = [
            packet(udp, 3, 3, (1000, 2000)),
            packet(udp, 2, 2, (1000, 2000)),
            packet(udp, 3, 2, (1000, 2000)),
            packet(IpNumber::TCP, 2, 3, (1000, 2000)),
            packet(IpNumber::SCTP, 2, 3, (1000, 2000)),
            packet(udp, 2, 3, (1001, 2000)),
            packet(udp, 2, 3, (1000, 2001)),
            packet(udp, 2, 3, (2000, 1000)),
        ];
        let hashes: std::collections::HashSet<_> = others.iter().map(|it| hash(it)).collect();
        assert_eq!(hashes.len(), others.len());
        assert!(!hashes.contains(&hash(&first)));
        let mut later = first.clone();
        later[HEADER_LEN - 12] = 9;
        later.push(9);
        assert_eq!(hash(&later), hash(&first), "time to live and content");
        assert_ne!(flow(&first, Seed(8)), hash(&first));
    }

    #[test]
    fn fragments_and_protocols_without_ports_go_by_their_addresses() {
        let hash = |packet: &[u8]| flow(packet, Seed(7));
        let flags = |more: u8, units: u8, ports| {
            let mut fragment = packet(IpNumber::UDP, 2, 3, ports);
            fragment[6..8].copy_from_slice(&[more << 5, units]);
            hash(&fragment)
        };
        let first = flags(1, 0, (1000, 2000));
        for later in [
            flags(1, 5, (1, 2)),
            flags(0, 9, (3, 4)),
            flags(1, 0, (5, 6)),
        ] {
            assert_eq!(later, first);
        }
        assert_ne!(flags(0, 0, (1000, 2000)), first);
        let sctp = |ports| hash(&packet(IpNumber::SCTP, 2, 3, ports));
        assert_eq!(sctp((1, 2)), sctp((3, 4)));
    }

    #[test]
    fn seeds_make_other_hashes() {
        assert_eq!(Seed(1).hash_one(5), Seed(1).hash_one(5));
        assert_ne!(Seed(1).hash_one(5), Seed(2).hash_one(5));
    }
}
