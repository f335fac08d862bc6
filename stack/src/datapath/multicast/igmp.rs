//! Messages about groups of IPv4: IGMP of all three versions (RFC 1112, RFC 2236, RFC 3376).

use std::net::Ipv4Addr;

use muslin_encap::ip::checksum;
use smoltcp::time::Duration;
use smoltcp::wire::{EthernetAddress, EthernetProtocol, IpProtocol, Ipv4Packet};

use super::{QUERY_INTERVAL, ROBUSTNESS, Records, Report, code, mac_of};
use crate::datapath::frame;
use crate::drops::DropReason;

const QUERY: u8 = 0x11;
const REPORT_V1: u8 = 0x12;
const REPORT_V2: u8 = 0x16;
const LEAVE: u8 = 0x17;
const REPORT_V3: u8 = 0x22;

/// An IPv4 header with the Router Alert option (RFC 2113).
const HEADER_LEN: usize = 24;
/// A query without sources.
const QUERY_LEN: usize = 12;
/// Bytes of a frame with a query.
pub const QUERY_FRAME_LEN: usize = frame::HEADER_LEN + HEADER_LEN + QUERY_LEN;

/// All hosts of a link.
const ALL_SYSTEMS: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);

/// Whether an IPv4 packet, which need not be whole, says that it carries IGMP.
#[must_use]
pub fn is_igmp(packet: &[u8]) -> bool {
    packet.get(9).map(|protocol| IpProtocol::from(*protocol)) == Some(IpProtocol::Igmp)
}

/// Whether a message of IGMP is a query.
#[must_use]
pub fn is_query(message: &[u8]) -> bool {
    message.first() == Some(&QUERY)
}

/// Reads an IPv4 packet with IGMP whose header has been checked ([`muslin_encap::ip::v4::check`]), and
/// gives out what a host says of groups.
///
/// # Errors
/// `ForeignQuerier` for a query, which no host sends; `IgmpInvalid` for what is broken, is not of its
/// own link, or no host has to say.
pub fn read(packet: &[u8], mut each: impl FnMut(Report)) -> Result<(), DropReason> {
    let view = Ipv4Packet::new_unchecked(packet);
    let message = packet.get(usize::from(view.header_len())..);
    let message = message.ok_or(DropReason::IgmpInvalid)?;
    let is_whole = !view.more_frags() && view.frag_offset() == 0;
    if is_query(message) {
        return Err(DropReason::ForeignQuerier);
    }
    if !is_whole || view.hop_limit() != 1 || message.len() < 8 || checksum::sum(message) != 0xffff {
        return Err(DropReason::IgmpInvalid);
    }
    let mut tell = |group: &[u8], joins| {
        let group: Option<[u8; 4]> = group.try_into().ok();
        if let Some(group) = group.filter(|it| Ipv4Addr::from(*it).is_multicast()) {
            let group = Ipv4Addr::from(group).into();
            each(Report { group, joins });
        }
    };
    match message[0] {
        REPORT_V1 | REPORT_V2 => tell(&message[4..8], true),
        LEAVE => tell(&message[4..8], false),
        REPORT_V3 => {
            let records = Records::new(message, 4).ok_or(DropReason::IgmpInvalid)?;
            for (group, joins) in records {
                if let Some(joins) = joins {
                    tell(group, joins);
                }
            }
        }
        _ => return Err(DropReason::IgmpInvalid),
    }
    Ok(())
}

/// Writes a frame with a query from `source` (RFC 3376 section 4.1) that hosts answer within `response`,
/// for one group or for all.
#[must_use]
pub fn write_query(
    (mac, source): (EthernetAddress, Ipv4Addr),
    group: Option<Ipv4Addr>,
    response: Duration,
) -> [u8; QUERY_FRAME_LEN] {
    let destination = group.unwrap_or(ALL_SYSTEMS);
    let mut bytes = [0; QUERY_FRAME_LEN];
    let (link, rest) = bytes.split_at_mut(frame::HEADER_LEN);
    link[..6].copy_from_slice(mac_of(destination.into()).as_bytes());
    link[6..12].copy_from_slice(mac.as_bytes());
    link[12..].copy_from_slice(&u16::from(EthernetProtocol::Ipv4).to_be_bytes());
    let (header, message) = rest.split_at_mut(HEADER_LEN);
    // Version and length in words; precedence of internetwork control (RFC 3376 section 4).
    header[..2].copy_from_slice(&[0x46, 0xc0]);
    header[2..4].copy_from_slice(&((HEADER_LEN + QUERY_LEN) as u16).to_be_bytes());
    header[8..10].copy_from_slice(&[1, IpProtocol::Igmp.into()]);
    header[12..16].copy_from_slice(&source.octets());
    header[16..20].copy_from_slice(&destination.octets());
    header[20..].copy_from_slice(&[0x94, 4, 0, 0]);
    let sum = !checksum::sum(header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    message[0] = QUERY;
    // In tenths of a second.
    message[1] = code(response.total_micros() / 100_000);
    let group = group.unwrap_or(Ipv4Addr::UNSPECIFIED);
    message[4..8].copy_from_slice(&group.octets());
    message[8] = ROBUSTNESS;
    message[9] = code(QUERY_INTERVAL.secs());
    let sum = !checksum::sum(message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    bytes
}

#[cfg(test)]
pub(in crate::datapath) mod tests {
    use std::net::IpAddr;

    use muslin_encap::ip::v4;
    use proptest::prelude::*;

    use super::*;
    use crate::datapath::multicast::QUERY_RESPONSE_INTERVAL;

    /// A packet with this message and a right checksum, as hosts send it.
    pub(in crate::datapath) fn packet(source: Ipv4Addr, to: Ipv4Addr, message: &[u8]) -> Vec<u8> {
        let header = v4::Header {
            dscp: 0,
            total_len: (v4::HEADER_LEN + message.len()) as u16,
            ident: 0,
            dont_fragment: true,
            ttl: 1,
            protocol: IpProtocol::Igmp,
            source,
            destination: to,
        };
        let mut message = message.to_vec();
        if message.len() >= 4 {
            message[2..4].fill(0);
            let sum = !checksum::sum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        [&header.to_bytes()[..], &message].concat()
    }

    /// A report of IGMPv3 with records of a type, a group and a number of sources.
    pub(in crate::datapath) fn report(records: &[(u8, [u8; 4], u16)]) -> Vec<u8> {
        let mut message = vec![REPORT_V3, 0, 0, 0, 0, 0];
        message.extend((records.len() as u16).to_be_bytes());
        for (kind, group, sources) in records {
            message.extend([*kind, 0]);
            message.extend(sources.to_be_bytes());
            message.extend(group);
            message.extend((0..*sources).flat_map(|at| [192, 0, 2, at as u8]));
        }
        message
    }

    fn heard(packet: &[u8]) -> Result<Vec<(IpAddr, bool)>, DropReason> {
        let mut all = Vec::new();
        read(packet, |it| all.push((it.group, it.joins)))?;
        Ok(all)
    }

    const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
    const GROUP: [u8; 4] = [239, 1, 2, 3];

    fn said(message: &[u8]) -> Result<Vec<(IpAddr, bool)>, DropReason> {
        heard(&packet(POD, Ipv4Addr::new(224, 0, 0, 22), message))
    }

    #[test]
    fn hosts_of_each_version_are_understood() {
        let group = IpAddr::from(GROUP);
        let short = |kind: u8| [&[kind, 0, 0, 0][..], &GROUP].concat();
        assert_eq!(said(&short(REPORT_V1)), Ok(vec![(group, true)]));
        assert_eq!(said(&short(REPORT_V2)), Ok(vec![(group, true)]));
        assert_eq!(said(&short(LEAVE)), Ok(vec![(group, false)]));
        assert_eq!(said(&short(QUERY)), Err(DropReason::ForeignQuerier));
        assert_eq!(said(&short(0x13)), Err(DropReason::IgmpInvalid));
        for (kind, sources, expected) in [
            (1, 0, Some(false)),
            (1, 2, Some(true)),
            (2, 0, Some(true)),
            (2, 3, Some(true)),
            (3, 0, Some(false)),
            (3, 1, Some(true)),
            (4, 0, Some(true)),
            (5, 1, Some(true)),
            (5, 0, None),
            (6, 1, None),
            (7, 0, None),
        ] {
            let other = (4, [239, 9, 9, 9], 2);
            let all = said(&report(&[(kind, GROUP, sources), other])).unwrap();
            let of_it = all.iter().find(|it| it.0 == group).map(|it| it.1);
            assert_eq!(of_it, expected, "type {kind}, {sources} sources");
            assert_eq!(all.last(), Some(&([239, 9, 9, 9].into(), true)));
        }
        // What no group is, is passed over.
        assert_eq!(said(&report(&[(4, [10, 0, 0, 1], 0)])), Ok(vec![]));
    }

    #[test]
    fn what_is_broken_is_not_believed() {
        let good = packet(POD, [224, 0, 0, 22].into(), &report(&[(4, GROUP, 1)]));
        assert!(heard(&good).is_ok());
        let invalid = Err(DropReason::IgmpInvalid);
        let broken = |at: usize, value: u8| {
            let mut packet = good.clone();
            packet[at] = value;
            heard(&packet)
        };
        assert_eq!(broken(8, 2), invalid, "a TTL of 2");
        assert_eq!(broken(6, 0x20), invalid, "a fragment");
        assert_eq!(broken(7, 1), invalid, "a later fragment");
        assert_eq!(broken(22, 0xff), invalid, "checksum");
        for len in v4::HEADER_LEN..good.len() {
            let to = [224, 0, 0, 22].into();
            let cut = packet(POD, to, &good[v4::HEADER_LEN..len]);
            assert_eq!(heard(&cut), invalid, "{len}");
        }
        // More records, or sources, than there are.
        let mut message = report(&[(4, GROUP, 0)]);
        message[7] = 2;
        assert_eq!(said(&message), invalid);
        let mut message = report(&[(4, GROUP, 0)]);
        message[11] = 1;
        assert_eq!(said(&message), invalid);
    }

    #[test]
    fn queries_are_as_hosts_want_them() {
        let from = (EthernetAddress([2; 6]), Ipv4Addr::new(10, 244, 1, 1));
        for group in [None, Some(Ipv4Addr::from(GROUP))] {
            let bytes = write_query(from, group, QUERY_RESPONSE_INTERVAL);
            let packet = &bytes[frame::HEADER_LEN..];
            assert_eq!(v4::check(packet), Ok(packet.len()));
            let view = Ipv4Packet::new_checked(packet).unwrap();
            assert_eq!(view.dst_addr(), group.unwrap_or(ALL_SYSTEMS));
            assert_eq!((view.hop_limit(), view.src_addr()), (1, from.1));
            assert_eq!(bytes[..6], *mac_of(view.dst_addr().into()).as_bytes());
            let message = &packet[HEADER_LEN..];
            assert_eq!(checksum::sum(message), 0xffff);
            assert_eq!(message[..2], [QUERY, 100]);
            assert_eq!(message[8..], [2, 125, 0, 0]);
            assert_eq!(heard(packet), Err(DropReason::ForeignQuerier));
        }
    }

    proptest! {
        /// Nothing that a host can send makes it fall, or tells of what is no group.
        #[test]
        fn any_bytes_are_read(message in proptest::collection::vec(any::<u8>(), 0..80), kind: u8) {
            let mut message = message;
            if let Some(first) = message.first_mut() {
                *first = [REPORT_V1, REPORT_V2, LEAVE, REPORT_V3, kind][usize::from(kind % 5)];
            }
            if let Ok(all) = said(&message) {
                prop_assert!(all.iter().all(|(group, _)| group.is_multicast()));
                prop_assert!(all.len() <= message.len() / 8);
            }
        }
    }
}
