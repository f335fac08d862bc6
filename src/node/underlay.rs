//! How a node reaches others: what the network's configuration means on this machine, and the
//! sockets for it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use muslin_encap::mtu::Mtu;
use muslin_encap::offload::split::TrainLimits;
use muslin_encap::tunnel::Format;
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_stack::lease::{Backend, ConfigFault, NetworkConfig};
use muslin_stack::peer::Tunnel;
use muslin_stack::uplink::Uplink;
use smoltcp::wire::IpVersion;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::Settings;
use super::front::Front;
use crate::control::protocol::Link;
use crate::error::{Error, Result};
use crate::flannel::{Condition, Need};
use crate::lease::store::{self, Store};
use crate::underlay::{
    self, Audience, KernelNetwork, NoInterface, PublicInterface, UdpSocket, Underlay, UplinkKind,
    Wanted,
};

/// Ports a VXLAN tunnel sends from besides its own, to spread flows over links and queues.
const SOURCE_PORTS: usize = 7;
/// How often the interface is looked at, even if the kernel tells of no change.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How a network's packets travel to and from this node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) tunnel: Tunnel,
    /// MTU of pods.
    pub(super) mtu: Mtu,
    /// MTU of the underlay.
    pub(super) outer: Mtu,
    /// The same, where somebody has named it: it does not follow the interface then.
    fixed: Option<Mtu>,
    /// UDP port of the tunnel, 0 if it has none.
    pub(super) port: u16,
    /// Whether packets go bare to nodes on the same link.
    pub(super) is_direct: bool,
}

/// Where a node's tunnel ends, and who it is there.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) interface: PublicInterface,
    /// The VTEP's MAC address that a static list has for it.
    pub(super) vtep_mac: Option<VtepMac>,
}

/// Who sends to this node.
pub(super) fn audience(settings: &Settings) -> Audience {
    match store::is_shared(&settings.store) {
        true => Audience::Others,
        false => Audience::Machine,
    }
}

/// Chooses the underlay's interface, again and again until there is one, with a word about one that
/// is not as usual.
pub(super) async fn find_place(
    settings: &Settings,
    store: &dyn Store,
    condition: &Condition,
) -> Result<Place> {
    let mut changes = underlay::Changes::listen();
    let place = loop {
        let reason = match look(settings, store).await {
            Ok(place) => break place,
            Err(NoInterface::Never(error)) => return Err(error),
            Err(NoInterface::NotYet(reason)) => reason,
        };
        if condition.lack(Need::Interface, &reason) {
            warn!("{reason}: waiting for that");
        }
        changes.wait(LOOK_AGAIN).await;
    };
    condition.have(Need::Interface);
    let PublicInterface {
        name,
        address,
        public_ip,
        ..
    } = &place.interface;
    if address.is_loopback() && settings.underlay.public_ip.is_none() {
        warn!("this machine has no address for others: only nodes on it can be peers");
    }
    if place.interface.is_translated() && matches!(settings.uplink, UplinkKind::PacketSocket) {
        info!(
            "the public address {public_ip} is not on this machine: the tunnel is bound to \
             {address} ({name}), and something must translate one to the other"
        );
    }
    Ok(place)
}

async fn look(settings: &Settings, store: &dyn Store) -> std::result::Result<Place, NoInterface> {
    let interface = underlay::choose_interface(&settings.underlay, audience(settings)).await?;
    match store.vtep_mac(interface.public_ip) {
        Ok(vtep_mac) => Ok(Place {
            interface,
            vtep_mac,
        }),
        Err(error) => Err(NoInterface::NotYet(error.to_string())),
    }
}

impl Plan {
    /// What a network's configuration means here, or why this node cannot be in it.
    pub(super) fn new(
        config: &NetworkConfig,
        settings: &Settings,
        interface: &PublicInterface,
        vtep_mac: VtepMac,
    ) -> Result<Self> {
        let mut ends = [interface.public_ip, interface.address].into_iter();
        if let Some(end) = ends.find(|end| config.network.contains(end)) {
            return Err(Error::usage(format!(
                "the public address {end} lies in the pod network {}: choose another --network, or \
                 another address with --public-ip",
                config.network
            )));
        }
        let (tunnel, port, configured) = match &config.backend {
            Backend::Vxlan(options) => {
                let (vni, mac) = (options.vni, vtep_mac);
                (Tunnel::Vxlan { vni, mac }, options.port, options.mtu)
            }
            Backend::Udp { port } => (Tunnel::Udp, *port, None),
            Backend::HostGw => (Tunnel::None, 0, None),
            Backend::Ipip { .. } => (Tunnel::Ipip, 0, None),
            Backend::Other(name) => {
                return Err(Error::usage(ConfigFault::OtherBackend(name.clone())));
            }
        };
        let fixed = settings.mtu.or(configured);
        let (mtu, outer) = mtus(tunnel, fixed, interface)?;
        let plan = Self {
            tunnel,
            mtu,
            outer,
            fixed,
            port,
            is_direct: config.backend.is_direct(),
        };
        plan.check_uplink(settings, interface)?;
        Ok(plan)
    }

    /// The same with what the interface is now.
    pub(super) fn on(&self, interface: &PublicInterface) -> Result<Self> {
        let (mtu, outer) = mtus(self.tunnel, self.fixed, interface)?;
        Ok(Self {
            mtu,
            outer,
            ..*self
        })
    }

    /// What the interfaces of pods are to have.
    pub(super) fn link(&self) -> Link {
        Link {
            mtu: self.mtu.get(),
            gso_max_segs: self.gso_max_segs(),
        }
    }

    /// Whether bare packets could reach this node at all.
    fn check_uplink(&self, settings: &Settings, interface: &PublicInterface) -> Result<()> {
        let PublicInterface {
            name,
            address,
            public_ip,
            prefix,
            ..
        } = interface;
        let only = matches!(self.tunnel, Tunnel::None);
        match &settings.uplink {
            UplinkKind::PacketSocket if only && interface.is_translated() => {
                Err(Error::usage(format!(
                    "host-gw needs the public address {public_ip} on the interface itself, and \
                     {name} has {address}: nothing can translate bare packets"
                )))
            }
            UplinkKind::Tap(tap) if !only => Err(Error::usage(format!(
                "--uplink tap:{tap} goes with the backend host-gw only: a tunnel ends at an address \
                 of this machine"
            ))),
            UplinkKind::Tap(tap) if !interface.is_translated() || !prefix.contains(public_ip) => {
                Err(Error::usage(format!(
                    "--uplink tap:{tap} needs an address of its own in {prefix}, the network of \
                     {name}: name it with --public-ip"
                )))
            }
            UplinkKind::PacketSocket | UplinkKind::Tap(_) => Ok(()),
        }
    }

    /// Takes the tunnel's port, for each worker, and looks whether there can be an uplink.
    pub(super) fn bind(
        &mut self,
        network: Ipv4Net,
        settings: &Settings,
        interface: &PublicInterface,
    ) -> Result<Vec<Option<UdpSocket>>> {
        if self.is_direct {
            let uplink = underlay::Uplink::open(&settings.uplink, &interface.name, network, 1);
            match uplink {
                Ok(_) => {}
                Err(error) if matches!(self.tunnel, Tunnel::None) => {
                    return Err(Error::failed(error));
                }
                Err(error) => {
                    warn!(
                        "the network has DirectRouting, but {error}: this node uses the tunnel for \
                         all others, and does not get what nodes on the same link send around it"
                    );
                    self.is_direct = false;
                }
            }
        }
        self.bind_tunnel(settings, interface.address)
    }

    fn bind_tunnel(
        &self,
        settings: &Settings,
        address: Ipv4Addr,
    ) -> Result<Vec<Option<UdpSocket>>> {
        let Some(format) = self.tunnel.format() else {
            return Ok((0..settings.workers).map(|_| None).collect());
        };
        let end = SocketAddr::new(address.into(), self.port);
        let options = match format {
            Format::Vxlan => settings.offload.sockets(format, SOURCE_PORTS),
            // flannel's UDP backend sends from the port it listens on.
            Format::Udp | Format::Ipip => settings.offload.sockets(format, 0),
        };
        let sockets = UdpSocket::bind(end, options, settings.workers).map_err(|error| {
            Error::failed(match error.kind() {
                std::io::ErrorKind::AddrInUse => port_in_use(end),
                std::io::ErrorKind::PermissionDenied if self.port == 0 => String::from(
                    "the backend ipip needs CAP_NET_RAW: let systemd start the node with \
                     AmbientCapabilities=CAP_NET_RAW, or give the container --cap-add NET_RAW",
                ),
                _ if self.port == 0 => format!("cannot send from {}: {error}", end.ip()),
                _ => format!("cannot listen on UDP {end}: {error}"),
            })
        })?;
        Ok(sockets.into_iter().map(Some).collect())
    }

    /// The tunnel's sockets with the uplink for the pods of `subnet`, for each worker, and what the
    /// node is on its link.
    pub(super) fn join(
        &self,
        tunnels: Vec<Option<UdpSocket>>,
        subnet: Ipv4Net,
        settings: &Settings,
        interface: &PublicInterface,
    ) -> Result<(Vec<Underlay>, Option<Uplink>)> {
        let mut uplinks = Vec::new();
        if self.is_direct {
            let opened =
                underlay::Uplink::open(&settings.uplink, &interface.name, subnet, settings.workers);
            uplinks = opened.map_err(Error::failed)?;
        }
        let uplink = uplinks.first().map(|device| Uplink {
            mac: device.hardware_address(),
            address: interface.public_ip,
            prefix: interface.prefix,
            mtu: self.outer,
            answers: matches!(settings.uplink, UplinkKind::Tap(_)),
        });
        if uplink.is_some_and(|uplink| !uplink.answers)
            && underlay::forwards_ipv4(&interface.name) == Some(true)
        {
            warn!(
                "this machine's kernel forwards what arrives on {0}, so it answers for the pods or \
                 sends their packets on a second time: switch that off with 'sysctl \
                 net.ipv4.conf.{0}.forwarding=0'",
                interface.name
            );
        }
        let mut uplinks = uplinks.into_iter();
        let join = |tunnel| Underlay {
            tunnel,
            uplink: uplinks.next(),
        };
        Ok((tunnels.into_iter().map(join).collect(), uplink))
    }

    /// Segments of the longest superpacket that a pod may send: with all its headers it leaves with
    /// one call.
    fn gso_max_segs(&self) -> u16 {
        let headers = self.tunnel.format().map_or(0, Format::network_offset);
        let segments = TrainLimits::UDP_SEGMENT.fitting(usize::from(self.mtu.get()) + headers);
        segments.max(1) as u16
    }

    /// New sockets after the interface has changed; without ones for the tunnel where its end stays,
    /// since the old ones have its port.
    pub(super) fn open(
        &self,
        subnet: Ipv4Net,
        settings: &Settings,
        (before, now): (&PublicInterface, &PublicInterface),
    ) -> Result<(Vec<Underlay>, Option<Uplink>)> {
        let tunnels = match before.address == now.address {
            true => (0..settings.workers).map(|_| None).collect(),
            false => self.bind_tunnel(settings, now.address)?,
        };
        self.join(tunnels, subnet, settings, now)
    }
}

/// Who has the tunnel's port, as far as can be seen.
fn port_in_use(end: SocketAddr) -> String {
    let kernel = kernel();
    match kernel.vxlan_on(end.port()) {
        Some(conflict) => conflict.to_string(),
        None => format!(
            "UDP port {} of {} is in use: another node or flannel, perhaps another user's, runs there; \
             stop it, or give this node another address with --public-ip, or all nodes of its \
             network another --port",
            end.port(),
            end.ip()
        ),
    }
}

/// Says what this machine's kernel has of the pod network, which pods or programs miss then: nobody
/// else would see why.
pub(super) fn warn_of_kernel(kernel: &KernelNetwork, network: Ipv4Net, subnet: Ipv4Net) {
    let own = kernel.in_own_subnet(subnet, &[]);
    for conflict in own.iter().chain(&kernel.routes_inside(network, subnet)) {
        warn!("{conflict}");
    }
}

/// What this machine's kernel has, or nothing if it does not tell.
pub(super) fn kernel() -> KernelNetwork {
    KernelNetwork::read_blocking().unwrap_or_else(|error| {
        debug!("{error}");
        KernelNetwork::default()
    })
}

/// MTU of pods and of the underlay, which is that of the interface if no other is named.
fn mtus(tunnel: Tunnel, named: Option<Mtu>, interface: &PublicInterface) -> Result<(Mtu, Mtu)> {
    let own = Mtu::new(interface.mtu.min(u16::MAX.into()));
    let outer = match named {
        Some(mtu) => mtu,
        None => own.map_err(|error| Error::usage(format!("{}: {error}", interface.name)))?,
    };
    let inner = |format: Format| format.inner_mtu(outer, IpVersion::Ipv4);
    let mtu = tunnel.format().map_or(Ok(outer), inner).map_err(|_| {
        Error::usage(format!(
            "an underlay MTU of {} leaves no room for pods",
            outer.get()
        ))
    })?;
    Ok((mtu, outer))
}

/// Takes the underlay and the lease along when the interface gets another address, as laptops and
/// virtual machines do, or comes back after it was gone. Until the node runs `seen` has the
/// interface as it is.
pub(super) async fn follow(
    front: Arc<Front>,
    wanted: Wanted,
    audience: Audience,
    seen: watch::Sender<PublicInterface>,
    public_ip: watch::Sender<Ipv4Addr>,
) {
    let mut changes = underlay::Changes::listen();
    let mut complaint = String::new();
    loop {
        changes.wait(LOOK_AGAIN).await;
        // Between two addresses there may be none for a while.
        let Ok(now) = underlay::choose_interface(&wanted, audience).await else {
            continue;
        };
        let Some(running) = front.running() else {
            public_ip.send_if_modified(|it| std::mem::replace(it, now.public_ip) != now.public_ip);
            seen.send_if_modified(|it| {
                *it != now && {
                    *it = now;
                    true
                }
            });
            continue;
        };
        let followed = match running.follow(&now) {
            Ok(followed) => followed,
            Err(error) => {
                let text = error.to_string();
                if text != complaint {
                    warn!("the underlay cannot follow {}: {text}", now.name);
                    complaint = text;
                }
                continue;
            }
        };
        if followed.is_moved {
            info!(
                "the public address is {} now, on {}",
                now.public_ip, now.name
            );
            public_ip.send_replace(now.public_ip);
        } else if followed.has_uplink {
            info!("the uplink on {} is opened anew", now.name);
        }
        if let Some(mtu) = followed.mtu {
            info!(
                "the MTU of {} is {}, that of pods {mtu} now",
                now.name, now.mtu
            );
        }
        complaint.clear();
    }
}
