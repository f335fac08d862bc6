//! How many bytes each encapsulation costs, and which MTU remains for the pods.

use smoltcp::wire::IpVersion;

use crate::ip::transport::UDP_HEADER_LEN;
use crate::ip::{v4, v6};
use crate::mtu::{InvalidMtu, Mtu};
use crate::tunnel::{vxlan, wireguard};

const ETHERNET_HEADER_LEN: usize = 14;

/// An encapsulation format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// VXLAN: an Ethernet frame behind a VXLAN header (RFC 7348 section 5).
    Vxlan,
    /// flannel's UDP format: a bare IPv4 packet.
    Udp,
    /// IPv4 in IP: a bare IPv4 packet without UDP (RFC 2003).
    Ipip,
    /// WireGuard: an encrypted IP packet in a data message (the WireGuard paper, section 5.4.6).
    WireGuard,
}

impl Format {
    /// Bytes by which the outer IP packet is longer than the inner one: 50 for VXLAN over IPv4 and
    /// 70 over IPv6; 28 and 48 for UDP; 20 and 40 for IP in IP; 60 and 80 for WireGuard, without padding.
    #[must_use]
    pub const fn overhead(self, outer: IpVersion) -> u16 {
        let outer = match outer {
            IpVersion::Ipv4 => v4::HEADER_LEN,
            IpVersion::Ipv6 => v6::HEADER_LEN,
        };
        let udp = match self {
            Self::Vxlan | Self::Udp | Self::WireGuard => UDP_HEADER_LEN,
            Self::Ipip => 0,
        };
        let sealed = match self {
            Self::WireGuard => wireguard::HEADER_LEN + wireguard::TAG_LEN,
            Self::Vxlan | Self::Udp | Self::Ipip => 0,
        };
        (outer + udp + self.network_offset() + sealed) as u16
    }

    /// Bytes in front of the inner IP packet in a datagram that is given to a socket: 22 for VXLAN,
    /// none for UDP, and none for IP in IP, whose outer header the kernel writes. None for WireGuard,
    /// either: a packet is sealed as a whole when it is sent.
    #[must_use]
    pub const fn network_offset(self) -> usize {
        match self {
            Self::Vxlan => vxlan::HEADER_LEN + ETHERNET_HEADER_LEN,
            Self::Udp | Self::Ipip | Self::WireGuard => 0,
        }
    }

    /// Bytes in front of the inner IP packet in a datagram that a socket receives: as in
    /// [`Self::network_offset`], but 20 for IP in IP, because a raw socket receives the outer
    /// header too (raw(7)). An outer header with options is longer; see
    /// [`super::ipip::inner_offset`]. Messages of WireGuard are opened first.
    #[must_use]
    pub const fn received_network_offset(self) -> usize {
        match self {
            Self::Vxlan | Self::Udp | Self::WireGuard => self.network_offset(),
            Self::Ipip => v4::HEADER_LEN,
        }
    }

    /// The MTU of inner packets on an underlay whose own MTU is `outer`. WireGuard's is a multiple of 16,
    /// so that no packet is padded beyond it.
    ///
    /// ```
    /// use muslin_encap::{IpVersion, mtu::Mtu, tunnel::Format};
    ///
    /// let inner = Format::Vxlan.inner_mtu(Mtu::ETHERNET, IpVersion::Ipv4);
    /// assert_eq!(inner.map(Mtu::get), Ok(1450));
    /// ```
    ///
    /// # Errors
    /// `InvalidMtu` if less than the minimum of IPv4 remains.
    pub fn inner_mtu(self, outer: Mtu, version: IpVersion) -> Result<Mtu, InvalidMtu> {
        let rest = u32::from(outer.get()).saturating_sub(self.overhead(version).into());
        Mtu::new(match self {
            Self::WireGuard => rest - rest % wireguard::PADDING as u32,
            Self::Vxlan | Self::Udp | Self::Ipip => rest,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overheads_are_flannels() {
        use IpVersion::{Ipv4, Ipv6};
        assert_eq!(Format::Vxlan.overhead(Ipv4), 50);
        assert_eq!(Format::Vxlan.overhead(Ipv6), 70);
        assert_eq!(Format::Udp.overhead(Ipv4), 28);
        assert_eq!(Format::Udp.overhead(Ipv6), 48);
        assert_eq!(Format::Vxlan.network_offset(), 22);
        assert_eq!(Format::Udp.network_offset(), 0);
        assert_eq!(Format::Ipip.overhead(Ipv4), 20);
        assert_eq!(Format::Ipip.overhead(Ipv6), 40);
        assert_eq!(Format::WireGuard.overhead(Ipv4), 60);
        assert_eq!(Format::WireGuard.overhead(Ipv6), 80);
    }

    #[test]
    fn only_raw_sockets_receive_more_than_they_send() {
        let offsets = |format: Format| (format.network_offset(), format.received_network_offset());
        assert_eq!(offsets(Format::Vxlan), (22, 22));
        assert_eq!(offsets(Format::Udp), (0, 0));
        assert_eq!(offsets(Format::Ipip), (0, 20));
        assert_eq!(offsets(Format::WireGuard), (0, 0));
    }

    #[test]
    fn an_underlay_leaves_what_it_does_not_cost() {
        let inner = |format: Format, outer| {
            format
                .inner_mtu(Mtu::new(outer).unwrap(), IpVersion::Ipv4)
                .map(Mtu::get)
        };
        assert_eq!(inner(Format::Vxlan, 1500), Ok(1450));
        assert_eq!(inner(Format::Udp, 1500), Ok(1472));
        assert_eq!(inner(Format::Ipip, 1500), Ok(1480));
        assert_eq!(inner(Format::WireGuard, 1500), Ok(1440));
        assert_eq!(inner(Format::WireGuard, 1480), Ok(1408));
        assert_eq!(inner(Format::Vxlan, 118), Ok(68));
        assert_eq!(inner(Format::Vxlan, 117), Err(InvalidMtu(67)));
        assert_eq!(inner(Format::Udp, 68), Err(InvalidMtu(40)));
    }
}
