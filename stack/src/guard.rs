//! What a sender may claim: a pod its own MAC and IP addresses, a peer the addresses of its lease.
//!
//! CVE-2020-10749 and its relatives are why router advertisements from pods are never forwarded:
//! a rogue one takes over the traffic of every host that accepts it.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::wire::{
    ArpPacket, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv6Message, Icmpv6Packet,
    IpProtocol, Ipv4Packet, Ipv6Packet,
};

use crate::drops::DropReason;
use crate::port::Attachment;

/// Which guards are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// A datagram must come from a node that holds a lease, with inner sources of that lease.
    pub peers: bool,
}

/// Checks the sender of a frame from a pod.
///
/// # Errors
/// The reason to drop it.
pub fn check_pod(
    frame: &EthernetFrame<&[u8]>,
    attachment: &Attachment,
    own: &[EthernetAddress],
) -> Result<(), DropReason> {
    let source = frame.src_addr();
    if !source.is_unicast() {
        return Err(DropReason::SourceMacGroup);
    }
    if own.contains(&source) {
        return Err(DropReason::SourceMacOwn);
    }
    if attachment.guarded && source != attachment.mac {
        return Err(DropReason::SourceMacSpoofed);
    }
    match frame.ethertype() {
        EthernetProtocol::Arp => check_arp(frame.payload(), attachment),
        EthernetProtocol::Ipv4 => check_ipv4(frame.payload(), attachment),
        EthernetProtocol::Ipv6 => check_ipv6(frame.payload(), attachment),
        EthernetProtocol::Unknown(_) => Ok(()),
    }
}

/// Whether an IPv4 source address cannot be that of one host.
#[must_use]
pub fn is_martian(source: Ipv4Addr) -> bool {
    source.is_multicast()
        || source.is_broadcast()
        || source.is_loopback()
        || source.octets()[0] == 0
        || source.octets()[0] >= 240
}

fn owns(attachment: &Attachment, address: impl Into<IpAddr>) -> bool {
    !attachment.guarded || attachment.addresses.contains(&address.into())
}

fn check_arp(payload: &[u8], attachment: &Attachment) -> Result<(), DropReason> {
    let Ok(arp) = ArpPacket::new_checked(payload) else {
        return Ok(());
    };
    if arp.hardware_len() != 6 || arp.protocol_len() != 4 {
        return Ok(());
    }
    if attachment.guarded && arp.source_hardware_addr() != attachment.mac.as_bytes() {
        return Err(DropReason::SourceMacSpoofed);
    }
    let [a, b, c, d] = *arp.source_protocol_addr() else {
        return Ok(());
    };
    let source = Ipv4Addr::new(a, b, c, d);
    // A probe for a duplicate address comes from 0.0.0.0 (RFC 5227 section 2.1.1).
    if source.is_unspecified() || owns(attachment, source) {
        Ok(())
    } else {
        Err(DropReason::SourceAddressSpoofed)
    }
}

fn check_ipv4(payload: &[u8], attachment: &Attachment) -> Result<(), DropReason> {
    // Malformed packets are the router's to refuse; here only the source counts.
    let Ok(packet) = Ipv4Packet::new_checked(payload) else {
        return Ok(());
    };
    let source = packet.src_addr();
    if is_martian(source) {
        Err(DropReason::SourceAddressInvalid)
    } else if owns(attachment, source) {
        Ok(())
    } else {
        Err(DropReason::SourceAddressSpoofed)
    }
}

fn check_ipv6(payload: &[u8], attachment: &Attachment) -> Result<(), DropReason> {
    let Ok(packet) = Ipv6Packet::new_checked(payload) else {
        return Ok(());
    };
    if packet.next_header() == IpProtocol::Icmpv6
        && Icmpv6Packet::new_checked(packet.payload()).is_ok_and(|icmp| {
            matches!(
                icmp.msg_type(),
                Icmpv6Message::RouterAdvert | Icmpv6Message::Redirect
            )
        })
    {
        return Err(DropReason::RouterAdvertisement);
    }
    let source = packet.src_addr();
    if source.is_multicast() || source.is_loopback() {
        Err(DropReason::SourceAddressInvalid)
    } else if source.is_unspecified() || source.is_unicast_link_local() || owns(attachment, source)
    {
        Ok(())
    } else {
        Err(DropReason::SourceAddressSpoofed)
    }
}
