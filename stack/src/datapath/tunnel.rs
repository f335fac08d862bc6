//! The tunnel: how packets get into datagrams for peers, and out of theirs.

use std::net::IpAddr;

use muslin_encap::buffer::PacketBuf;
use muslin_encap::tunnel::vxlan::{self, Vni, VtepMac};
use muslin_encap::tunnel::{Format, ipip};
use smoltcp::wire::EthernetProtocol;

use crate::datapath::frame;
use crate::drops::DropReason;

/// How this node's tunnel encapsulates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tunnel {
    /// VXLAN with this network identifier, from a VTEP of this MAC address.
    Vxlan {
        /// The network's identifier.
        vni: Vni,
        /// This node's own VTEP.
        mac: VtepMac,
        /// The same of IPv6, if the node has a lease of it: flannel has another device, with the same
        /// identifier and port.
        mac_v6: Option<VtepMac>,
    },
    /// flannel's UDP format.
    Udp,
    /// IPv4 in IPv4 (RFC 2003).
    Ipip,
    /// WireGuard. What is encrypted is an IP packet of either version; keys and sessions are elsewhere
    /// (`wireguard`).
    WireGuard,
    /// There is none: all peers are next hops on the uplink, as with flannel's host-gw.
    None,
}

/// What a datagram carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inner {
    /// An IPv4 packet, still to be checked.
    Ipv4,
    /// An IPv6 packet, still to be checked.
    Ipv6,
    /// A frame with an ARP message, for the VTEP with this MAC address.
    Arp(VtepMac),
    /// A frame with IPv6 for a group, which the VTEP with this MAC address hears.
    Group(VtepMac),
}

impl Tunnel {
    /// A short stable name for machines, as flannel calls its backends; `none` if there is none.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Vxlan { .. } => "vxlan",
            Self::Udp => "udp",
            Self::Ipip => "ipip",
            Self::WireGuard => "wireguard",
            Self::None => "none",
        }
    }

    /// The encapsulation format.
    #[must_use]
    pub const fn format(&self) -> Option<Format> {
        match self {
            Self::Vxlan { .. } => Some(Format::Vxlan),
            Self::Udp => Some(Format::Udp),
            Self::Ipip => Some(Format::Ipip),
            Self::WireGuard => Some(Format::WireGuard),
            Self::None => None,
        }
    }

    /// Whether it carries packets of the IP version of `address`.
    pub(super) const fn carries(&self, address: IpAddr) -> bool {
        match (self, address) {
            (Self::WireGuard, _) | (Self::Vxlan { .. } | Self::Udp | Self::Ipip, IpAddr::V4(_)) => {
                true
            }
            (Self::Vxlan { mac_v6, .. }, IpAddr::V6(_)) => mac_v6.is_some(),
            (Self::Udp | Self::Ipip, IpAddr::V6(_)) | (Self::None, _) => false,
        }
    }

    /// The MAC address of this node's own VTEP, if it has one.
    pub(super) const fn vtep_mac(&self) -> Option<VtepMac> {
        match self {
            Self::Vxlan { mac, .. } => Some(*mac),
            Self::Udp | Self::Ipip | Self::WireGuard | Self::None => None,
        }
    }

    /// The same of IPv6.
    pub(super) const fn vtep_mac_v6(&self) -> Option<VtepMac> {
        match self {
            Self::Vxlan { mac_v6, .. } => *mac_v6,
            Self::Udp | Self::Ipip | Self::WireGuard | Self::None => None,
        }
    }

    /// Makes an IPv4 packet what the datagram to a peer carries, whose VTEP has this MAC address.
    ///
    /// # Errors
    /// The reason to drop it: there is no such address, or no room in front of the packet.
    #[inline]
    pub(super) fn encapsulate(
        &self,
        theirs: Option<VtepMac>,
        packet: &mut PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        if let Self::Vxlan { mac, .. } = self {
            let theirs = theirs.ok_or(DropReason::NoVtepMac)?;
            frame::prepend(packet, mac.get(), theirs.get())
                .map_err(|_| DropReason::HeadroomExceeded)?;
        }
        self.encapsulate_frame(packet)
    }

    /// The same with an IPv6 packet.
    ///
    /// # Errors
    /// Likewise; `NextHopUnreachable` if the tunnel carries no IPv6.
    #[inline]
    pub(super) fn encapsulate_v6(
        &self,
        theirs: Option<VtepMac>,
        packet: &mut PacketBuf<'_>,
    ) -> Result<(), DropReason> {
        if *self == Self::WireGuard {
            return Ok(());
        }
        let ours = self.vtep_mac_v6().ok_or(DropReason::NextHopUnreachable)?;
        let theirs = theirs.ok_or(DropReason::NoVtepMac)?;
        frame::prepend_as(packet, ours.get(), theirs.get(), EthernetProtocol::Ipv6)
            .map_err(|_| DropReason::HeadroomExceeded)?;
        self.encapsulate_frame(packet)
    }

    /// Puts the header of the tunnel on an inner frame, if its format has one.
    ///
    /// # Errors
    /// The reason to drop it: there is no room in front of the frame.
    #[inline]
    pub(super) fn encapsulate_frame(&self, packet: &mut PacketBuf<'_>) -> Result<(), DropReason> {
        match self {
            Self::Vxlan { vni, .. } => {
                vxlan::encapsulate(packet, *vni).map_err(|_| DropReason::HeadroomExceeded)
            }
            // The kernel writes the header of IPv4 in IPv4, and whoever seals a packet that of WireGuard.
            Self::Udp | Self::Ipip | Self::WireGuard | Self::None => Ok(()),
        }
    }

    /// Takes what a datagram carries out of it.
    ///
    /// # Errors
    /// The reason to drop it: it is malformed, or not for this node's tunnel.
    #[inline]
    pub(super) fn decapsulate(&self, packet: &mut PacketBuf<'_>) -> Result<Inner, DropReason> {
        match self {
            Self::None => Err(DropReason::UnknownPeer),
            Self::Udp => Ok(Inner::Ipv4),
            Self::Ipip => {
                let inner = ipip::inner_offset(packet.as_slice());
                packet.trim_front(inner.map_err(|_| DropReason::IpipHeader)?);
                Ok(Inner::Ipv4)
            }
            Self::WireGuard => match packet.as_slice().first().map(|byte| byte >> 4) {
                Some(6) => Ok(Inner::Ipv6),
                _ => Ok(Inner::Ipv4),
            },
            Self::Vxlan { vni, mac, mac_v6 } => decapsulate_vxlan(*vni, *mac, *mac_v6, packet),
        }
    }

    /// Whether a datagram may be of this network, as the header of the tunnel says.
    pub(super) fn takes(&self, datagram: &[u8]) -> bool {
        match self {
            Self::Vxlan { vni, .. } => {
                vxlan::Packet::new_checked(datagram).is_ok_and(|packet| packet.vni() == *vni)
            }
            // Only what could be opened gets here.
            Self::Udp | Self::Ipip | Self::WireGuard => true,
            Self::None => false,
        }
    }
}

#[inline]
fn decapsulate_vxlan(
    vni: Vni,
    mac: VtepMac,
    mac_v6: Option<VtepMac>,
    packet: &mut PacketBuf<'_>,
) -> Result<Inner, DropReason> {
    let theirs = vxlan::decapsulate(packet).map_err(|error| match error {
        vxlan::Error::TooShort { .. } => DropReason::VxlanTooShort,
        vxlan::Error::NoVni => DropReason::VxlanNoVni,
    })?;
    if theirs != vni {
        return Err(DropReason::UnknownVni);
    }
    let view = frame::parse(packet.as_slice())?;
    if view.src_addr() == mac.get() {
        return Err(DropReason::SourceMacOwn);
    }
    if !view.src_addr().is_unicast() {
        return Err(DropReason::SourceMacGroup);
    }
    if view.ethertype() == EthernetProtocol::Arp {
        return Ok(Inner::Arp(mac));
    }
    if view.dst_addr() != mac.get() {
        let mac = mac_v6.ok_or(DropReason::DestinationMacForeign)?;
        return decapsulate_vxlan_v6(mac, packet);
    }
    if view.ethertype() != EthernetProtocol::Ipv4 {
        return Err(DropReason::EtherTypeUnsupported);
    }
    packet.trim_front(frame::HEADER_LEN);
    Ok(Inner::Ipv4)
}

/// What a frame carries that is not for the VTEP of IPv4. The one of IPv6 takes nothing else.
fn decapsulate_vxlan_v6(mac: VtepMac, packet: &mut PacketBuf<'_>) -> Result<Inner, DropReason> {
    let view = frame::parse(packet.as_slice())?;
    let destination = view.dst_addr();
    if view.src_addr() == mac.get() {
        return Err(DropReason::SourceMacOwn);
    }
    let is_v6 = view.ethertype() == EthernetProtocol::Ipv6;
    if is_v6 && destination.is_multicast() {
        return Ok(Inner::Group(mac));
    }
    if destination != mac.get() {
        return Err(DropReason::DestinationMacForeign);
    }
    if !is_v6 {
        return Err(DropReason::EtherTypeUnsupported);
    }
    packet.trim_front(frame::HEADER_LEN);
    Ok(Inner::Ipv6)
}

#[cfg(test)]
mod tests {
    use muslin_encap::buffer::HEADROOM;

    use super::*;

    /// IPv4 in IPv4 is another thing: what goes out has no outer header yet.
    #[test]
    fn what_one_end_puts_in_the_other_takes_out() {
        let vtep = |last| VtepMac::from_random([2, 0, 0, 0, 0, last]);
        let vxlan = |last| Tunnel::Vxlan {
            vni: Vni::new(7).unwrap(),
            mac: vtep(last),
            mac_v6: None,
        };
        for (ours, theirs) in [(vxlan(1), vxlan(2)), (Tunnel::Udp, Tunnel::Udp)] {
            let mut storage = [5; HEADROOM + 60];
            let mut packet = PacketBuf::new(&mut storage, HEADROOM, 60).unwrap();
            ours.encapsulate(Some(vtep(2)), &mut packet).unwrap();
            assert!(theirs.takes(packet.as_slice()) && !Tunnel::None.takes(packet.as_slice()));
            assert_eq!(theirs.decapsulate(&mut packet), Ok(Inner::Ipv4));
            assert_eq!(packet.as_slice(), [5; 60]);
        }
        let mut storage = [5; HEADROOM];
        let mut packet = PacketBuf::new(&mut storage, HEADROOM, 0).unwrap();
        let unknown = vxlan(1).encapsulate(None, &mut packet);
        assert_eq!(unknown, Err(DropReason::NoVtepMac));
    }
}
