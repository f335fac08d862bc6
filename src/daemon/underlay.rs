//! How a node reaches others: what the network's configuration means on this machine, and the
//! sockets for it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::Ipv4Net;
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::Format;
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::api::control::Link;
use muslin_stack::api::events::EventKind;
use muslin_stack::control::lease::{LeaseRecord, NetworkConfig};
use muslin_stack::control::tunnel::{TunnelFault, TunnelPlan};
use muslin_stack::datapath::tunnel::Tunnel;
use muslin_stack::datapath::uplink::Uplink;
use tracing::{debug, info, warn};

use super::settings::NodeSettings;
use crate::condition::{Condition, Need};
use crate::error::{Context, Error, Result};
use crate::journal::Journal;
use crate::store::{self, Store};
use crate::takeover::InheritedWorker;
use crate::underlay::{
    self, Adopted, Audience, KernelNetwork, NoInterface, Options, PublicInterface, TunnelSocket,
    TunnelSockets, Underlay, UplinkKind,
};

/// Ports a VXLAN tunnel sends from besides its own, to spread flows over links and queues.
const SOURCE_PORTS: usize = 7;
/// Interval at which the interface is checked, even if the kernel reports no change.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Where a node's tunnel ends, and who it is there.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) interface: PublicInterface,
    /// The record that a static list has for it.
    pub(super) listed: Option<LeaseRecord>,
}

/// Who sends to this node.
pub(super) fn audience(settings: &NodeSettings) -> Audience {
    match store::is_shared(&settings.store) {
        true => Audience::Others,
        false => Audience::Machine,
    }
}

/// Chooses the underlay's interface, again and again until there is one, with a word about one that
/// is not as usual.
pub(super) async fn find_place(
    settings: &NodeSettings,
    store: &dyn Store,
    (condition, journal): (&Condition, &Journal),
) -> Result<Place> {
    let mut changes = underlay::Changes::listen();
    let mut is_away = false;
    let place = loop {
        let reason = match look(settings, store).await {
            Ok(place) => break place,
            Err(NoInterface::Never(error)) => return Err(error),
            Err(NoInterface::NotYet(reason)) => reason,
        };
        if condition.lack(Need::Interface, &reason) {
            let text = format!("{reason}: waiting for it");
            journal.note(EventKind::InterfaceAway, "underlay", text);
            is_away = true;
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
    if is_away {
        let text = format!("the interface {name} is there: its address is {address}");
        journal.note(EventKind::InterfaceBack, "underlay", text);
    }
    if address.is_loopback() && settings.underlay.public_ip.is_none() {
        warn!("this machine has no address that others can reach: only nodes on it can be peers");
    }
    if place.interface.is_translated() && matches!(settings.uplink, UplinkKind::PacketSocket) {
        info!(
            "the public address {public_ip} is not on this machine: the tunnel is bound to \
             {address} ({name}), so NAT must translate one to the other"
        );
    }
    Ok(place)
}

async fn look(
    settings: &NodeSettings,
    store: &dyn Store,
) -> std::result::Result<Place, NoInterface> {
    let mut interface = underlay::choose_interface(&settings.underlay, audience(settings)).await?;
    interface.address_v6 = underlay::ipv6::choose(&settings.underlay, &interface, None).await;
    interface.link_v6 = underlay::ipv6::link(&interface).await;
    match store.listed(interface.public_ip) {
        Ok(listed) => Ok(Place { interface, listed }),
        Err(error) => Err(NoInterface::NotYet(error.to_string())),
    }
}

/// What a network's configuration means here.
///
/// # Errors
/// Why this node cannot be in that network.
pub(super) fn plan(
    config: &NetworkConfig,
    settings: &NodeSettings,
    interface: &PublicInterface,
    vtep_mac: VtepMac,
) -> Result<TunnelPlan> {
    if !config.enable_ipv4 {
        return Err(Error::usage(
            "the network has IPv6 alone, and this node needs IPv4 beside it: enable EnableIPv4",
        ));
    }
    let mut ends = [interface.public_ip, interface.address].into_iter();
    if let Some(end) = ends.find(|end| config.network.contains(end)) {
        return Err(Error::usage(format!(
            "the public address {end} lies in the pod network {}: choose another --network, or \
             another address with --public-ip",
            config.network
        )));
    }
    if let (Some(range), Some(end)) = (&config.ipv6, settings.underlay.public_ipv6)
        && range.network.contains(&end)
    {
        return Err(Error::usage(format!(
            "the public address {end} lies in the pod network {}: choose another with --public-ipv6",
            range.network
        )));
    }
    let plan = TunnelPlan::new(&config.backend, vtep_mac, settings.mtu, interface.mtu);
    let plan = plan.map_err(|fault| misfit(&fault, interface))?;
    check_uplink(&plan, settings, interface)?;
    Ok(match (config.ipv6, interface.address_v6) {
        (Some(_), Some(_)) => plan.with_ipv6(),
        _ => plan,
    })
}

/// The same with what the interface is now.
pub(super) fn follow_interface(
    plan: &TunnelPlan,
    interface: &PublicInterface,
) -> Result<TunnelPlan> {
    let followed = plan.on(interface.mtu);
    followed.map_err(|fault| misfit(&fault, interface))
}

fn misfit(fault: &TunnelFault, interface: &PublicInterface) -> Error {
    match fault {
        TunnelFault::Interface(_) => Error::usage(format!("{}: {fault}", interface.name)),
        TunnelFault::Config(_) | TunnelFault::NoRoom(_) => Error::usage(fault),
    }
}

/// What the interfaces of pods with an address of each of these subnets are to have.
pub(super) fn link(plan: &TunnelPlan, subnets: Nets) -> Link {
    let mtu_v6 = subnets.ipv6().and_then(|_| plan.mtu_v6());
    Link {
        mtu: plan.mtu.get(),
        mtu_v6: mtu_v6.map(Mtu::get),
        gso_max_segs: plan.gso_max_segs(),
    }
}

/// Whether bare packets could reach this node at all.
fn check_uplink(
    plan: &TunnelPlan,
    settings: &NodeSettings,
    interface: &PublicInterface,
) -> Result<()> {
    let PublicInterface {
        name,
        address,
        public_ip,
        prefix,
        ..
    } = interface;
    let only = matches!(plan.tunnel, Tunnel::None);
    match &settings.uplink {
        UplinkKind::PacketSocket if only && interface.is_translated() => {
            Err(Error::usage(format!(
                "host-gw needs the public address {public_ip} on the interface itself, and \
                 {name} has {address}: unencapsulated packets cannot pass NAT"
            )))
        }
        UplinkKind::Tap(tap) if !only => Err(Error::usage(format!(
            "--uplink tap:{tap} requires the backend host-gw: a tunnel ends at an address \
             of this machine"
        ))),
        UplinkKind::Tap(tap) if !interface.is_translated() || !prefix.contains(public_ip) => {
            Err(Error::usage(format!(
                "--uplink tap:{tap} needs an address of its own in {prefix}, the network of \
                 {name}: give it with --public-ip"
            )))
        }
        UplinkKind::PacketSocket | UplinkKind::Tap(_) => Ok(()),
    }
}

/// Takes the tunnel's port, for each worker, and looks whether there can be an uplink.
pub(super) fn bind(
    plan: &mut TunnelPlan,
    network: Ipv4Net,
    settings: &NodeSettings,
    interface: &PublicInterface,
) -> Result<Vec<Option<TunnelSockets>>> {
    if plan.is_direct {
        let uplink = underlay::Uplink::open(&settings.uplink, &interface.name, network.into(), 1);
        match uplink {
            Ok(_) => {}
            Err(error) if matches!(plan.tunnel, Tunnel::None) => {
                return Err(Error::failed(error));
            }
            Err(error) => {
                warn!(
                    "the network has DirectRouting, but {error}: this node uses the tunnel to all \
                     others, and does not receive what nodes on the same link send without it"
                );
                plan.is_direct = false;
            }
        }
    }
    bind_tunnel(plan, settings, interface.ends())
}

fn bind_tunnel(
    plan: &TunnelPlan,
    settings: &NodeSettings,
    addresses: Addresses,
) -> Result<Vec<Option<TunnelSockets>>> {
    let Some(format) = plan.tunnel.format() else {
        return Ok((0..settings.workers).map(|_| None).collect());
    };
    let mut all: Vec<_> = (0..settings.workers).map(|_| None).collect();
    for end in ends(plan, addresses) {
        for (sockets, bound) in all.iter_mut().zip(bind_end(plan, settings, (format, end))?) {
            let sockets: &mut TunnelSockets = sockets.get_or_insert_default();
            sockets.take_over(bound.into());
        }
    }
    Ok(all)
}

/// Where a tunnel ends: at both addresses, if it carries both IP versions here.
fn ends(plan: &TunnelPlan, addresses: Addresses) -> impl Iterator<Item = SocketAddr> {
    let carries_ipv6 = matches!(
        plan.tunnel,
        Tunnel::Vxlan {
            mac_v6: Some(_),
            ..
        }
    );
    let ends = underlay::ends(addresses, plan.port);
    ends.filter(move |end| carries_ipv6 || end.is_ipv4())
}

/// Where a tunnel ends in IPv6, if it does.
pub(super) fn end_v6(plan: &TunnelPlan, interface: &PublicInterface) -> Option<SocketAddr> {
    ends(plan, interface.ends()).find(SocketAddr::is_ipv6)
}

fn bind_end(
    plan: &TunnelPlan,
    settings: &NodeSettings,
    (format, end): (Format, SocketAddr),
) -> Result<Vec<TunnelSocket>> {
    let options = options(format, settings);
    TunnelSocket::bind(end, options, settings.workers).map_err(|error| {
        Error::failed(match error.kind() {
            std::io::ErrorKind::AddrInUse => port_in_use(end),
            std::io::ErrorKind::PermissionDenied if plan.port == 0 => String::from(
                "the backend ipip needs CAP_NET_RAW: let systemd start the node with \
                 AmbientCapabilities=CAP_NET_RAW, or give the container --cap-add NET_RAW",
            ),
            _ if plan.port == 0 => format!("cannot send from {}: {error}", end.ip()),
            _ => format!("cannot listen on UDP {end}: {error}"),
        })
    })
}

fn options(format: Format, settings: &NodeSettings) -> Options {
    match format {
        Format::Vxlan => settings.offload.sockets(format, SOURCE_PORTS),
        // flannel's UDP backend sends from the port it listens on.
        Format::Udp | Format::Ipip => settings.offload.sockets(format, 0),
    }
}

/// The tunnel's sockets of an earlier process, if they are what would be bound now.
pub(super) fn reuse(
    kept: Vec<Adopted>,
    plan: &TunnelPlan,
    settings: &NodeSettings,
    addresses: Addresses,
) -> Option<Vec<Option<TunnelSockets>>> {
    let format = plan.tunnel.format().filter(|it| *it != Format::Ipip)?;
    let options = options(format, settings);
    let ends = Addresses::collect(ends(plan, addresses).map(|end| end.ip()))?;
    let has_ends = |it: &Adopted| it.has_ends(ends, plan.port, options);
    let fits = kept.len() == settings.workers && kept.iter().all(has_ends);
    if !fits {
        return None;
    }
    let options = options.without_defects(ends.iter().next()?);
    let sockets = kept
        .into_iter()
        .map(|it| TunnelSockets::adopt(it, options).map(Some));
    sockets.collect::<std::io::Result<_>>().ok()
}

/// What the tunnel's sockets may use, for a process that will get them from another.
pub(super) fn tested(
    plan: &TunnelPlan,
    settings: &NodeSettings,
    addresses: Addresses,
) -> Option<Options> {
    let format = plan.tunnel.format()?;
    let address = addresses.iter().next()?;
    Some(options(format, settings).without_defects(address))
}

/// The tunnel's sockets with the uplink for the pods of these subnets, for each worker, and what the
/// node is on its link.
pub(super) fn join(
    plan: &TunnelPlan,
    tunnels: Vec<Option<TunnelSockets>>,
    subnets: Nets,
    settings: &NodeSettings,
    interface: &PublicInterface,
) -> Result<(Vec<Underlay>, Option<Uplink>)> {
    let mut uplinks = Vec::new();
    if plan.is_direct {
        let opened =
            underlay::Uplink::open(&settings.uplink, &interface.name, subnets, settings.workers);
        uplinks = opened.map_err(Error::failed)?;
    }
    Ok(combine(plan, tunnels, uplinks, settings, interface))
}

/// The same with what a process had that this one takes over.
pub(super) fn adopt(
    plan: &TunnelPlan,
    workers: Vec<InheritedWorker>,
    options: Option<Options>,
    settings: &NodeSettings,
    interface: &PublicInterface,
) -> Result<(Vec<Underlay>, Option<Uplink>)> {
    let (tunnels, uplinks): (Vec<_>, Vec<_>) =
        workers.into_iter().map(|it| (it.tunnel, it.uplink)).unzip();
    let adopt = |tunnel: Option<Adopted>| match (tunnel, options) {
        (Some(tunnel), Some(options)) => TunnelSockets::adopt(tunnel, options).map(Some),
        (None, None) => Ok(None),
        _ => Err(std::io::ErrorKind::InvalidInput.into()),
    };
    let tunnels: std::io::Result<_> = tunnels.into_iter().map(adopt).collect();
    let tunnels = tunnels.context("cannot go on with the tunnel's sockets")?;
    let uplinks = match plan.is_direct {
        true => {
            let uplinks = uplinks.into_iter().flatten().collect();
            let adopted = underlay::Uplink::adopt(&settings.uplink, &interface.name, uplinks);
            adopted.context("cannot go on with the uplink")?
        }
        false => Vec::new(),
    };
    Ok(combine(plan, tunnels, uplinks, settings, interface))
}

/// Copies of the tunnel's sockets; none if they cannot be had, or bare packets come by other ones.
pub(super) fn copies(underlays: &[Underlay]) -> Vec<Adopted> {
    let tunnels = underlays.iter().filter(|it| it.uplink.is_none());
    let copies = tunnels
        .filter_map(|it| it.tunnel.as_ref())
        .map(TunnelSockets::copy);
    copies.collect::<std::io::Result<_>>().unwrap_or_default()
}

fn combine(
    plan: &TunnelPlan,
    tunnels: Vec<Option<TunnelSockets>>,
    uplinks: Vec<underlay::Uplink>,
    settings: &NodeSettings,
    interface: &PublicInterface,
) -> (Vec<Underlay>, Option<Uplink>) {
    let uplink = uplinks.first().map(|device| {
        let len = interface.prefix.prefix_len();
        let net = Ipv4Net::new_assert(interface.public_ip, len);
        let nets = Nets::with_ipv4(net, interface.link_v6);
        let mut uplink = Uplink::new(device.hardware_address(), nets, plan.outer);
        uplink.answers = matches!(settings.uplink, UplinkKind::Tap(_));
        uplink
    });
    if uplink.is_some_and(|uplink| !uplink.answers)
        && underlay::forwards_ipv4(&interface.name) == Some(true)
    {
        warn!(
            "this machine's kernel forwards packets that arrive on {0}, so it answers for the \
             pods or \
             forwards their packets a second time: switch that off with 'sysctl \
             net.ipv4.conf.{0}.forwarding=0'",
            interface.name
        );
    }
    let mut uplinks = uplinks.into_iter();
    let join = |tunnel| Underlay {
        tunnel,
        uplink: uplinks.next(),
    };
    (tunnels.into_iter().map(join).collect(), uplink)
}

/// New sockets after the interface has changed; without ones for an end of the tunnel that
/// stays, since the old ones have its port.
pub(super) fn open(
    plan: &TunnelPlan,
    subnets: Nets,
    settings: &NodeSettings,
    (before, now): (&PublicInterface, &PublicInterface),
) -> Result<(Vec<Underlay>, Option<Uplink>)> {
    let former: Vec<IpAddr> = before.ends().iter().collect();
    let new = now.ends();
    let new = new.iter().filter(|address| !former.contains(address));
    let tunnels = match Addresses::collect(new) {
        None => (0..settings.workers).map(|_| None).collect(),
        Some(new) => bind_tunnel(plan, settings, new)?,
    };
    join(plan, tunnels, subnets, settings, now)
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

/// Warns of the kernel's addresses and routes in the pod network, which hide it from pods or programs:
/// nothing else would show the cause. Those of the node's own interface for the host are as they should be.
pub(super) fn warn_of_kernel(
    kernel: &KernelNetwork,
    own_interface: Option<&str>,
    network: Ipv4Net,
    subnet: Ipv4Net,
) {
    let kernel = kernel.clone().without(own_interface.unwrap_or_default());
    let own = kernel.in_own_subnet(subnet, &[]);
    for conflict in own.iter().chain(&kernel.routes_inside(network, subnet)) {
        warn!("{conflict}");
    }
}

/// The kernel's network state, or nothing if it cannot be read.
pub(super) fn kernel() -> KernelNetwork {
    KernelNetwork::read_blocking().unwrap_or_else(|error| {
        debug!("{error}");
        KernelNetwork::default()
    })
}
