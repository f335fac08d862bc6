//! Messages about groups of IPv6: MLD of both versions (RFC 2710, RFC 3810).

use std::net::Ipv6Addr;

use muslin_encap::ip::v6;
use smoltcp::time::Duration;
use smoltcp::wire::{EthernetAddress, EthernetProtocol, IpProtocol};

use super::{QUERY_INTERVAL, ROBUSTNESS, Records, Report, code, mac_of};
use crate::datapath::frame;
use crate::datapath::ndp;
use crate::drops::DropReason;

/// ICMPv6 types (RFC 2710 section 3, RFC 3810 section 5).
pub(in crate::datapath) const QUERY: u8 = 130;
pub(in crate::datapath) const REPORT: u8 = 131;
pub(in crate::datapath) const DONE: u8 = 132;
pub(in crate::datapath) const REPORT_V2: u8 = 143;

/// A Hop-by-Hop Options header with the Router Alert option (RFC 2711).
const OPTIONS: [u8; 8] = [58, 0, 5, 2, 0, 0, 1, 0];
/// A query without sources.
const QUERY_LEN: usize = 28;
/// Bytes of a frame with a query.
pub const QUERY_FRAME_LEN: usize = frame::HEADER_LEN + v6::HEADER_LEN + OPTIONS.len() + QUERY_LEN;

/// Where a packet's message about groups begins, if that is what it carries.
///
/// # Errors
/// The reason to drop it: its headers hide what it is about.
pub fn find(packet: &[u8]) -> Result<Option<usize>, DropReason> {
    let upper = v6::upper_layer(packet)?;
    let is_icmp = IpProtocol::from(upper.protocol) == IpProtocol::Icmpv6;
    let kind = packet.get(upper.offset);
    let is_one = is_icmp
        && !upper.is_later_fragment()
        && matches!(kind, Some(&(QUERY | REPORT | DONE | REPORT_V2)));
    Ok(is_one.then_some(upper.offset))
}

/// Reads a packet whose message about groups begins at `offset` ([`find`]), and gives out what a host says
/// of groups. That the packet is from its link was checked at its port.
///
/// # Errors
/// `ForeignQuerier` for a query, which no host sends; `MldInvalid` for what is broken.
pub fn read(packet: &[u8], offset: usize, mut each: impl FnMut(Report)) -> Result<(), DropReason> {
    let len = v6::check(packet)?;
    let message = packet.get(offset..len).ok_or(DropReason::MldInvalid)?;
    if message.first() == Some(&QUERY) {
        return Err(DropReason::ForeignQuerier);
    }
    if message.len() < 8 || !v6::has_icmp_checksum(&packet[..len], offset) {
        return Err(DropReason::MldInvalid);
    }
    let mut tell = |group: &[u8], joins| {
        let group: Option<[u8; 16]> = group.try_into().ok();
        if let Some(group) = group.filter(|it| Ipv6Addr::from(*it).is_multicast()) {
            let group = Ipv6Addr::from(group).into();
            each(Report { group, joins });
        }
    };
    match message[0] {
        kind @ (REPORT | DONE) => {
            let group = message.get(8..24).ok_or(DropReason::MldInvalid)?;
            tell(group, kind == REPORT);
        }
        _ => {
            let records = Records::new(message, 16).ok_or(DropReason::MldInvalid)?;
            for (group, joins) in records {
                if let Some(joins) = joins {
                    tell(group, joins);
                }
            }
        }
    }
    Ok(())
}

/// Writes a frame with a query from `source`, a link-local address (RFC 3810 section 5.1), that hosts
/// answer within `response`, for one group or for all.
#[must_use]
pub fn write_query(
    (mac, source): (EthernetAddress, Ipv6Addr),
    group: Option<Ipv6Addr>,
    response: Duration,
) -> [u8; QUERY_FRAME_LEN] {
    let destination = group.unwrap_or(ndp::ALL_NODES);
    let mut bytes = [0; QUERY_FRAME_LEN];
    let (link, packet) = bytes.split_at_mut(frame::HEADER_LEN);
    link[..6].copy_from_slice(mac_of(destination.into()).as_bytes());
    link[6..12].copy_from_slice(mac.as_bytes());
    link[12..].copy_from_slice(&u16::from(EthernetProtocol::Ipv6).to_be_bytes());
    let header = v6::Header {
        traffic_class: 0,
        flow_label: 0,
        payload_len: (OPTIONS.len() + QUERY_LEN) as u16,
        next_header: IpProtocol::HopByHop,
        hop_limit: 1,
        source,
        destination,
    };
    let offset = v6::HEADER_LEN + OPTIONS.len();
    packet[..v6::HEADER_LEN].copy_from_slice(&header.to_bytes());
    packet[v6::HEADER_LEN..offset].copy_from_slice(&OPTIONS);
    let message = &mut packet[offset..];
    message[0] = QUERY;
    // In milliseconds. None of ours is so long that it needs an exponent (section 5.1.3).
    let delay = u16::try_from(response.total_millis()).unwrap_or(0x7fff);
    message[4..6].copy_from_slice(&delay.min(0x7fff).to_be_bytes());
    let group = group.unwrap_or(Ipv6Addr::UNSPECIFIED);
    message[8..24].copy_from_slice(&group.octets());
    message[24] = ROBUSTNESS;
    message[25] = code(QUERY_INTERVAL.secs());
    v6::fill_icmp_checksum(packet, offset);
    bytes
}

#[cfg(test)]
pub(in crate::datapath) mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::datapath::multicast::QUERY_RESPONSE_INTERVAL;

    const POD: &str = "fe80::2";
    const GROUP: &str = "ff05::1:3";

    fn address(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    /// A packet with this message and a right checksum, as hosts send it.
    pub(in crate::datapath) fn packet(source: &str, to: &str, message: &[u8]) -> Vec<u8> {
        let header = v6::Header {
            traffic_class: 0,
            flow_label: 0,
            payload_len: (OPTIONS.len() + message.len()) as u16,
            next_header: IpProtocol::HopByHop,
            hop_limit: 1,
            source: address(source),
            destination: address(to),
        };
        let mut packet = [&header.to_bytes()[..], &OPTIONS, message].concat();
        if message.len() >= 4 {
            v6::fill_icmp_checksum(&mut packet, v6::HEADER_LEN + OPTIONS.len());
        }
        packet
    }

    /// A report of MLDv2 with records of a type, a group and a number of sources.
    pub(in crate::datapath) fn report(records: &[(u8, &str, u16)]) -> Vec<u8> {
        let mut message = vec![REPORT_V2, 0, 0, 0, 0, 0];
        message.extend((records.len() as u16).to_be_bytes());
        for (kind, group, sources) in records {
            message.extend([*kind, 0]);
            message.extend(sources.to_be_bytes());
            message.extend(address(group).octets());
            message.extend((0..*sources).flat_map(|_| address("fd00::9").octets()));
        }
        message
    }

    fn heard(packet: &[u8]) -> Result<Vec<(IpAddr, bool)>, DropReason> {
        let mut all = Vec::new();
        let offset = find(packet)?.ok_or(DropReason::MldInvalid)?;
        read(packet, offset, |it| all.push((it.group, it.joins)))?;
        Ok(all)
    }

    fn said(message: &[u8]) -> Result<Vec<(IpAddr, bool)>, DropReason> {
        heard(&packet(POD, "ff02::16", message))
    }

    /// A message of MLDv1.
    fn short(kind: u8) -> Vec<u8> {
        [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &address(GROUP).octets()].concat()
    }

    #[test]
    fn hosts_of_each_version_are_understood() {
        let group = IpAddr::V6(address(GROUP));
        assert_eq!(said(&short(REPORT)), Ok(vec![(group, true)]));
        assert_eq!(said(&short(DONE)), Ok(vec![(group, false)]));
        assert_eq!(said(&short(QUERY)), Err(DropReason::ForeignQuerier));
        let records = [(4, GROUP, 0), (3, "ff05::9", 0), (6, "ff05::8", 1)];
        let left = (IpAddr::V6(address("ff05::9")), false);
        assert_eq!(said(&report(&records)), Ok(vec![(group, true), left]));
        assert_eq!(said(&report(&[(4, "fd00::1", 0)])), Ok(vec![]));
    }

    #[test]
    fn what_is_broken_is_not_believed() {
        let invalid = Err(DropReason::MldInvalid);
        for good in [short(REPORT), report(&[(4, GROUP, 1)])] {
            assert!(said(&good).is_ok());
            for len in 1..good.len() {
                assert_eq!(said(&good[..len]), invalid, "{len}");
            }
            let mut damaged = packet(POD, "ff02::16", &good);
            let last = damaged.len() - 1;
            damaged[last] ^= 1;
            assert_eq!(heard(&damaged), invalid, "checksum");
        }
        let mut more = report(&[(4, GROUP, 0)]);
        more[7] = 2;
        assert_eq!(said(&more), invalid);
    }

    #[test]
    fn queries_are_as_hosts_want_them() {
        let from = (EthernetAddress([2; 6]), address("fe80::1"));
        for group in [None, Some(address(GROUP))] {
            let bytes = write_query(from, group, QUERY_RESPONSE_INTERVAL);
            let packet = &bytes[frame::HEADER_LEN..];
            assert_eq!(v6::check(packet), Ok(packet.len()));
            let offset = find(packet).unwrap().unwrap();
            assert!(v6::has_icmp_checksum(packet, offset));
            let to = group.unwrap_or(ndp::ALL_NODES);
            assert_eq!(bytes[..6], *mac_of(to.into()).as_bytes());
            assert_eq!((packet[7], &packet[24..40]), (1, &to.octets()[..]));
            assert_eq!(packet[offset + 4..offset + 6], 10_000_u16.to_be_bytes());
            assert_eq!(heard(packet), Err(DropReason::ForeignQuerier));
        }
    }

    proptest! {
        /// Nothing that a host can send makes it fall, or tells of what is no group.
        #[test]
        fn any_bytes_are_read(message in proptest::collection::vec(any::<u8>(), 4..120), kind: u8) {
            let mut message = message;
            message[0] = [QUERY, REPORT, DONE, REPORT_V2][usize::from(kind % 4)];
            if let Ok(all) = said(&message) {
                prop_assert!(all.iter().all(|(group, _)| group.is_multicast()));
                prop_assert!(all.len() <= message.len() / 20);
            }
        }
    }
}
