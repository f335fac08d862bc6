//! What a network's backend means for one node: how it encapsulates, and which MTUs follow.

use std::net::IpAddr;

use muslin_encap::mtu::{InvalidMtu, Mtu};
use muslin_encap::offload::split::TrainLimits;
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_encap::tunnel::{Format, wireguard};
use smoltcp::wire::IpVersion;
use thiserror::Error;

use crate::control::lease::{Backend, ConfigFault, TunnelPorts, vtep_mac_v6};
use crate::datapath::tunnel::Tunnel;

/// Bytes of the headers in front of a packet: inner Ethernet, VXLAN, UDP and IPv6.
const VXLAN_OVER_IPV6: u16 = 70;
/// The same of WireGuard: UDP, IPv6, and what is around an encrypted packet.
const WIREGUARD_OVER_IPV6: u16 = 80;

/// How a network's packets travel to and from a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelPlan {
    /// The encapsulation.
    pub tunnel: Tunnel,
    /// UDP ports of the tunnel's ends.
    pub ports: TunnelPorts,
    /// Whether packets go bare to nodes on the same link.
    pub is_direct: bool,
    /// MTU of pods.
    pub mtu: Mtu,
    /// MTU of the underlay.
    pub outer: Mtu,
    /// The same, where somebody has named it: it does not follow the interface then.
    named: Option<Mtu>,
    /// The IP version of the tunnel's ends that the pods' MTU is for: that of IPv4, if there is one.
    version: IpVersion,
    /// Whether the tunnel has an end of IPv6 here.
    has_end_v6: bool,
}

/// Why a node cannot be in a network.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TunnelFault {
    /// It cannot encapsulate as the network's configuration has it.
    #[error("{0}")]
    Config(#[from] ConfigFault),
    /// The underlay's interface has an MTU that is none.
    #[error("{0}")]
    Interface(#[from] InvalidMtu),
    /// Nothing is left for pods beside the tunnel's headers.
    #[error("an underlay MTU of {} leaves no room for pods", .0.get())]
    NoRoom(Mtu),
}

impl TunnelPlan {
    /// What a network's backend means for a node with this VTEP, whose underlay's interface has this
    /// MTU. An MTU that is `named` for the node counts first, then that of the backend, then the
    /// interface's.
    ///
    /// # Errors
    /// `TunnelFault` if the node cannot be in that network.
    pub fn new(
        backend: &Backend,
        vtep_mac: VtepMac,
        named: Option<Mtu>,
        interface: u32,
    ) -> Result<Self, TunnelFault> {
        let (tunnel, configured) = match backend {
            Backend::Vxlan(options) => {
                let (vni, mac) = (options.vni, vtep_mac);
                (
                    Tunnel::Vxlan {
                        vni,
                        mac,
                        mac_v6: None,
                    },
                    options.mtu,
                )
            }
            Backend::Udp { .. } => (Tunnel::Udp, None),
            Backend::HostGw => (Tunnel::None, None),
            Backend::Ipip { .. } => (Tunnel::Ipip, None),
            Backend::WireGuard(options) => (Tunnel::WireGuard, options.mtu),
            Backend::Other(name) => return Err(ConfigFault::OtherBackend(name.clone()).into()),
        };
        let named = named.or(configured);
        let version = IpVersion::Ipv4;
        let (mtu, outer) = mtus(tunnel, version, named, interface)?;
        Ok(Self {
            tunnel,
            ports: backend.ports(),
            is_direct: backend.is_direct(),
            mtu,
            outer,
            named,
            version,
            has_end_v6: false,
        })
    }

    /// The same for a node that carries IPv6 alone, on an interface with this MTU.
    ///
    /// # Errors
    /// `TunnelFault` if that leaves no room for pods.
    pub fn with_ipv6_alone(self, interface: u32) -> Result<Self, TunnelFault> {
        let version = IpVersion::Ipv6;
        Self { version, ..self }.with_ipv6().on(interface)
    }

    /// The same for a node that carries IPv6, too: with VXLAN it has another VTEP for that.
    #[must_use]
    pub fn with_ipv6(mut self) -> Self {
        if let Tunnel::Vxlan { mac, mac_v6, .. } = &mut self.tunnel {
            *mac_v6 = Some(vtep_mac_v6(*mac));
        }
        self.has_end_v6 = matches!(self.tunnel, Tunnel::Vxlan { .. } | Tunnel::WireGuard);
        self
    }

    /// Whether the tunnel has an end at this address, if it is one of the node's.
    #[must_use]
    pub const fn has_end(&self, address: IpAddr) -> bool {
        address.is_ipv4() || self.has_end_v6
    }

    /// The same on an interface with this MTU.
    ///
    /// # Errors
    /// `TunnelFault` if that leaves no room for pods.
    pub fn on(&self, interface: u32) -> Result<Self, TunnelFault> {
        let (mtu, outer) = mtus(self.tunnel, self.version, self.named, interface)?;
        Ok(Self {
            mtu,
            outer,
            ..*self
        })
    }

    /// MTU of pods' IPv6 packets to other nodes; nothing if these do not fit (RFC 8200 section 5), or the
    /// backend takes none.
    #[must_use]
    pub fn mtu_v6(&self) -> Option<Mtu> {
        let mtu = match self.tunnel {
            Tunnel::Vxlan { .. } => Format::Vxlan.inner_mtu(self.outer, IpVersion::Ipv6).ok()?,
            Tunnel::WireGuard => self.mtu,
            Tunnel::None => self.outer,
            Tunnel::Udp | Tunnel::Ipip => return None,
        };
        (mtu >= Mtu::MIN_IPV6).then_some(mtu)
    }

    /// MTU of the underlay that [`Self::mtu_v6`] needs.
    #[must_use]
    pub fn least_outer_v6(&self) -> Mtu {
        let least = Mtu::MIN_IPV6.get();
        let outer = match self.tunnel {
            Tunnel::Vxlan { .. } => least + VXLAN_OVER_IPV6,
            Tunnel::WireGuard => least + WIREGUARD_OVER_IPV6,
            Tunnel::None | Tunnel::Udp | Tunnel::Ipip => least,
        };
        Mtu::new(outer.into()).unwrap_or(Mtu::MAX)
    }

    /// Segments of the longest superpacket that a pod may send: with all its headers it leaves with
    /// one call.
    #[must_use]
    pub fn gso_max_segs(&self) -> u16 {
        let len = usize::from(self.mtu.get());
        let datagram = match self.tunnel.format() {
            Some(Format::WireGuard) => wireguard::message_len(len),
            format => len + format.map_or(0, Format::network_offset),
        };
        let segments = TrainLimits::UDP_SEGMENT.fitting(datagram);
        segments.max(1) as u16
    }
}

/// MTU of pods and of the underlay, which is that of the interface if no other is named.
fn mtus(
    tunnel: Tunnel,
    version: IpVersion,
    named: Option<Mtu>,
    interface: u32,
) -> Result<(Mtu, Mtu), TunnelFault> {
    let outer = match named {
        Some(mtu) => mtu,
        // A loopback interface's is larger than any IPv4 packet.
        None => Mtu::new(interface.min(u16::MAX.into()))?,
    };
    // flannel has one MTU for WireGuard, whichever version carries it.
    let version = match tunnel {
        Tunnel::WireGuard => IpVersion::Ipv6,
        _ => version,
    };
    let inner = |format: Format| format.inner_mtu(outer, version);
    let mtu = tunnel.format().map_or(Ok(outer), inner);
    Ok((mtu.map_err(|_| TunnelFault::NoRoom(outer))?, outer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::lease::{VxlanOptions, WireGuardMode, WireGuardOptions};

    const INTERFACE: u32 = 1500;

    fn vtep_mac() -> VtepMac {
        VtepMac::from_random([1; 6])
    }

    fn plan(backend: &Backend) -> TunnelPlan {
        TunnelPlan::new(backend, vtep_mac(), None, INTERFACE).unwrap()
    }

    #[test]
    fn each_backend_has_its_tunnel() {
        let options = VxlanOptions::default();
        let (vni, mac) = (options.vni, vtep_mac());
        let direct_routing = true;
        for (backend, tunnel, port, is_direct, mtu) in [
            (
                Backend::Vxlan(options),
                Tunnel::Vxlan {
                    vni,
                    mac,
                    mac_v6: None,
                },
                8472,
                false,
                1450,
            ),
            (Backend::Udp { port: 8285 }, Tunnel::Udp, 8285, false, 1472),
            (
                Backend::Ipip { direct_routing },
                Tunnel::Ipip,
                0,
                true,
                1480,
            ),
            (Backend::HostGw, Tunnel::None, 0, true, 1500),
        ] {
            let plan = plan(&backend);
            assert_eq!(
                (plan.tunnel, plan.ports, plan.is_direct, plan.mtu.get()),
                (tunnel, TunnelPorts::same(port), is_direct, mtu)
            );
            assert_eq!(plan.outer, Mtu::ETHERNET);
        }
        let other = Backend::Other("ipsec".to_owned());
        let fault = ConfigFault::OtherBackend("ipsec".to_owned());
        assert_eq!(
            TunnelPlan::new(&other, vtep_mac(), None, INTERFACE),
            Err(TunnelFault::Config(fault))
        );
    }

    #[test]
    fn wireguard_has_one_mtu_and_a_port_for_each_ip_version() {
        let backend = |mode, mtu| {
            Backend::WireGuard(WireGuardOptions {
                mode,
                mtu: Mtu::new(mtu).ok(),
                ..WireGuardOptions::default()
            })
        };
        let [ipv4, ipv6] = ["192.0.2.1", "fd00::1"].map(|ip| ip.parse().unwrap());
        for (mode, port_v6) in [
            (WireGuardMode::Separate, 51821),
            (WireGuardMode::Auto, 51820),
        ] {
            let plan = plan(&backend(mode, 0));
            assert_eq!((plan.tunnel, plan.is_direct), (Tunnel::WireGuard, false));
            assert_eq!((plan.ports.of(ipv4), plan.ports.of(ipv6)), (51820, port_v6));
            assert!(plan.has_end(ipv4) && !plan.has_end(ipv6));
            assert!(plan.with_ipv6().has_end(ipv6));
            let alone = plan.with_ipv6_alone(INTERFACE).unwrap();
            assert!(alone.has_end(ipv6));
            for plan in [plan, plan.with_ipv6(), alone] {
                assert_eq!(plan.mtu.get(), 1408);
                assert_eq!(plan.mtu_v6(), Some(plan.mtu));
                assert_eq!(plan.on(9000).unwrap().mtu.get(), 8912);
            }
        }
        // A superpacket of 45 segments is one train of messages of 1,440 bytes.
        assert_eq!(
            plan(&backend(WireGuardMode::Separate, 0)).gso_max_segs(),
            45
        );
        // flannel subtracts from what is configured, too.
        let plan = plan(&backend(WireGuardMode::Separate, 1400));
        assert_eq!((plan.mtu.get(), plan.outer.get()), (1312, 1400));
    }

    #[test]
    fn ipv6_needs_1280_bytes_beside_the_tunnels_headers() {
        for (backend, least) in [
            (Backend::Vxlan(VxlanOptions::default()), 1350),
            (Backend::HostGw, 1280),
            (Backend::WireGuard(WireGuardOptions::default()), 1360),
        ] {
            let plan = plan(&backend);
            assert_eq!(plan.least_outer_v6().get(), least);
            let fits = plan.on(least.into()).unwrap();
            assert_eq!(fits.mtu_v6(), Some(Mtu::MIN_IPV6));
            assert_eq!(plan.on(u32::from(least) - 1).unwrap().mtu_v6(), None);
            // Alone it is the MTU of pods.
            let alone = plan.with_ipv6_alone(INTERFACE).unwrap();
            assert_eq!(Some(alone.mtu), alone.mtu_v6());
            assert_eq!(
                alone.on(1400).unwrap().mtu,
                alone.on(1400).unwrap().mtu_v6().unwrap()
            );
        }
    }

    #[test]
    fn an_mtu_that_is_named_does_not_follow_the_interface() {
        let free = plan(&Backend::Udp { port: 1 });
        assert_eq!(free.on(1400).unwrap().mtu.get(), 1372);
        assert_eq!(free.on(100_000).unwrap().outer, Mtu::MAX);
        assert!(matches!(free.on(67), Err(TunnelFault::Interface(_))));
        let least = Mtu::new(80).unwrap();
        assert_eq!(free.on(80), Err(TunnelFault::NoRoom(least)));
        let configured = Backend::Vxlan(VxlanOptions {
            mtu: Mtu::new(1300).ok(),
            ..VxlanOptions::default()
        });
        let of_backend = plan(&configured);
        assert_eq!(of_backend.on(67).unwrap().mtu.get(), 1250);
        let named = Mtu::new(1200).ok();
        let named = TunnelPlan::new(&configured, vtep_mac(), named, INTERFACE).unwrap();
        assert_eq!((named.mtu.get(), named.outer.get()), (1150, 1200));
    }
}
