//! How a node reaches others: what the network's configuration means on this machine, and the
//! sockets for it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use muslin_encap::mtu::Mtu;
use muslin_encap::tunnel::Format;
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::api::control::Link;
use muslin_stack::api::events::EventKind;
use muslin_stack::control::lease::{LeaseRecord, NetworkConfig, WantedConfig};
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
    self, Adopted, Audience, InterfaceChoice, Ipv4End, Ipv6End, KernelNetwork, NoInterface,
    Options, PublicInterface, TunnelSocket, TunnelSockets, Underlay, UplinkKind,
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
/// is not as usual. Of IPv6 it has the address that was published before, while it is valid.
pub(super) async fn find_place(
    settings: &NodeSettings,
    store: &dyn Store,
    published: Option<Ipv6Addr>,
    (condition, journal): (&Condition, &Journal),
) -> Result<Place> {
    let mut changes = underlay::Changes::listen();
    let mut is_away = false;
    let place = loop {
        let reason = match look(settings, store, published).await {
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
    let PublicInterface { name, .. } = &place.interface;
    if is_away {
        let addresses = place.interface.addresses();
        let text = format!("the interface {name} is there: its address is {addresses}");
        journal.note(EventKind::InterfaceBack, "underlay", text);
    }
    let Some(Ipv4End {
        address, public_ip, ..
    }) = place.interface.ends.ipv4()
    else {
        return Ok(place);
    };
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
    published: Option<Ipv6Addr>,
) -> std::result::Result<Place, NoInterface> {
    let networks = asked_networks(settings);
    let audience = audience(settings);
    let chosen =
        underlay::choose_interface(&settings.underlay, audience, networks, published).await;
    let interface = chosen?;
    let public_ip = interface.ends.ipv4().map(|end| end.public_ip);
    match store.listed(public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED)) {
        Ok(listed) => Ok(Place { interface, listed }),
        Err(error) => Err(NoInterface::NotYet(error.to_string())),
    }
}

/// The pod networks that the user asks for, without knowing those of the store.
pub(super) fn asked_networks(settings: &NodeSettings) -> Option<Nets> {
    match &settings.wanted_config {
        WantedConfig::Exactly(config) => Some(config.networks()),
        WantedConfig::Any | WantedConfig::IfNone(_) => None,
    }
}

/// What a node of a network makes of an interface that was chosen before the network was known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fit {
    /// It can be used as it is.
    Good,
    /// Another one is looked for, for this reason.
    Bad(String),
    /// There may be an address of IPv6 soon, which the network wants: why it is not there.
    Soon(String),
    /// The node goes without IPv6, for this reason.
    WithoutIpv6(String),
}

/// Whether an interface has what a network of this configuration needs, where the plan leaves so much room.
pub(super) fn fit(
    config: &NetworkConfig,
    plan: &TunnelPlan,
    interface: &PublicInterface,
    wanted: &InterfaceChoice,
) -> Fit {
    let Some(range) = &config.ipv6 else {
        return Fit::Good;
    };
    if !config.enable_ipv4 && interface.ends.ipv4().is_some() {
        return Fit::Bad(format!(
            "{} was chosen for its IPv4 address",
            interface.name
        ));
    }
    let Some(end) = interface.ends.ipv6() else {
        return match wanted.public_ipv6 {
            Some(public) => Fit::Soon(format!(
                "the public address {public} is not on this machine"
            )),
            None if interface.awaits_ipv6 => Fit::Soon(format!(
                "the IPv6 address of {} is tentative",
                interface.name
            )),
            None => Fit::WithoutIpv6("this node has no public IPv6 address".to_owned()),
        };
    };
    let address = end.address;
    if range.network.contains(&address) {
        let network = range.network;
        return Fit::Bad(format!(
            "the public address {address} lies in the pod network {network}"
        ));
    }
    if plan.mtu_v6().is_none() {
        let (least, backend) = (plan.least_outer_v6().get(), config.backend.name());
        return Fit::WithoutIpv6(format!(
            "IPv6 needs an MTU of {least} with {backend}, and that of {} is {}: its address {address} is \
             not used",
            interface.name,
            plan.outer.get()
        ));
    }
    Fit::Good
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
    let ends = interface.ends.ipv4();
    let ends = ends.map(|end| [end.public_ip, end.address]);
    let mut ends = ends.into_iter().flatten();
    if let Some(end) = ends.find(|end| config.enable_ipv4 && config.network.contains(end)) {
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
    Ok(match fit(config, &plan, interface, &settings.underlay) {
        Fit::Good if !config.enable_ipv4 => {
            let plan = plan.with_ipv6_alone(interface.mtu);
            plan.map_err(|fault| misfit(&fault, interface))?
        }
        Fit::Good if config.ipv6.is_some() => plan.with_ipv6(),
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
    let name = &interface.name;
    let Some(Ipv4End {
        address,
        public_ip,
        prefix,
    }) = interface.ends.ipv4()
    else {
        return match &settings.uplink {
            UplinkKind::Tap(tap) => Err(Error::usage(format!(
                "--uplink tap:{tap} needs an address of its own of IPv4, and this node has none"
            ))),
            UplinkKind::PacketSocket => Ok(()),
        };
    };
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
        UplinkKind::Tap(tap) if !interface.is_translated() || !prefix.contains(&public_ip) => {
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
    networks: Nets,
    settings: &NodeSettings,
    interface: &PublicInterface,
) -> Result<Vec<Option<TunnelSockets>>> {
    if plan.is_direct {
        let uplink = underlay::Uplink::open(&settings.uplink, &interface.name, networks, 1);
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
    bind_tunnel(plan, settings, interface.addresses())
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
        for (sockets, bound) in all.iter_mut().zip(bind_end(settings, format, end)?) {
            let sockets: &mut TunnelSockets = sockets.get_or_insert_default();
            sockets.take_over(bound.into());
        }
    }
    Ok(all)
}

/// Where a tunnel ends: at both addresses, if it carries both IP versions here.
fn ends(plan: &TunnelPlan, addresses: Addresses) -> impl Iterator<Item = SocketAddr> {
    let plan = *plan;
    underlay::ends(addresses, plan.ports).filter(move |end| plan.has_end(end.ip()))
}

/// Where a tunnel ends in IPv6, if it does.
pub(super) fn end_v6(plan: &TunnelPlan, interface: &PublicInterface) -> Option<SocketAddr> {
    ends(plan, interface.addresses()).find(SocketAddr::is_ipv6)
}

/// Where a tunnel ends in IPv4, if it does.
pub(super) fn end_v4(plan: &TunnelPlan, interface: &PublicInterface) -> Option<SocketAddr> {
    ends(plan, interface.addresses()).find(SocketAddr::is_ipv4)
}

fn bind_end(settings: &NodeSettings, format: Format, end: SocketAddr) -> Result<Vec<TunnelSocket>> {
    let options = options(format, settings);
    TunnelSocket::bind(end, options, settings.workers).map_err(|error| {
        Error::failed(match error.kind() {
            std::io::ErrorKind::AddrInUse => port_in_use(end),
            std::io::ErrorKind::PermissionDenied if end.port() == 0 => String::from(
                "the backend ipip needs CAP_NET_RAW: let systemd start the node with \
                 AmbientCapabilities=CAP_NET_RAW, or give the container --cap-add NET_RAW",
            ),
            _ if end.port() == 0 => format!("cannot send from {}: {error}", end.ip()),
            _ => format!("cannot listen on UDP {end}: {error}"),
        })
    })
}

fn options(format: Format, settings: &NodeSettings) -> Options {
    match format {
        Format::Vxlan => settings.offload.sockets(format, SOURCE_PORTS),
        // flannel's UDP backend sends from the port it listens on, and a peer of WireGuard answers where
        // datagrams come from.
        Format::Udp | Format::Ipip | Format::WireGuard => settings.offload.sockets(format, 0),
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
    let ends: Vec<SocketAddr> = ends(plan, addresses).collect();
    let has_ends = |it: &Adopted| it.has_ends(&ends, options);
    let fits = kept.len() == settings.workers && kept.iter().all(has_ends);
    if !fits {
        return None;
    }
    let options = options.without_defects(ends.first()?.ip());
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
        let ipv4 = |end: Ipv4End| Ipv4Net::new_assert(end.public_ip, end.prefix.prefix_len());
        let ipv6 = |end: Ipv6End| Ipv6Net::new_assert(end.address, end.prefix.prefix_len());
        let nets = match settings.uplink {
            UplinkKind::PacketSocket => interface.ends.map(ipv4, ipv6),
            // The IPv6 address is the host's, which answers for it itself.
            UplinkKind::Tap(_) => match interface.ends.ipv4() {
                Some(end) => ipv4(end).into(),
                None => interface.prefixes(),
            },
        };
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
    let former: Vec<IpAddr> = before.addresses().iter().collect();
    let new = now.addresses();
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
    (network, subnet): (Ipv4Net, Ipv4Net),
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
