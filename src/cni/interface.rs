//! A pod's interface, for a thread that is in the pod's network namespace.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use muslin_encap::tunnel::vxlan::VtepMac;
use muslin_stack::api::cni::Reserved;
use muslin_stack::api::cni::error::Error;
use muslin_stack::api::cni::result::Route;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::unistd::geteuid;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::call::Result;
use super::kernel::{Change, Kernel};
use crate::device::{OpenError, Tap};
use crate::netns::{QUEUE_LEN, ipv6, message};

/// What an interface is to have.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Its alias, by which it is known to be ours.
    pub(super) alias: &'a str,
    /// Its MTU in bytes.
    pub(super) mtu: u16,
    /// Its addresses.
    pub(super) addresses: &'a [IpNet],
    /// Its routes, each with its gateway.
    pub(super) routes: &'a [Route],
    /// What the node says.
    pub(super) reserved: &'a Reserved,
}

/// An interface, and what it has.
pub(super) struct Made {
    /// The queues of its device.
    pub(super) queues: Vec<Tap>,
    /// Its addresses.
    pub(super) addresses: Vec<IpNet>,
    /// Its routes.
    pub(super) routes: Vec<Route>,
}

/// The interface that has a name now.
pub(super) fn index(name: &str) -> Option<u32> {
    if_nametoindex(name).ok()
}

/// Makes an interface and gives it what it is to have. It goes with the last of its descriptors.
/// Says what it has then: a default route is left alone where there is one, and where the kernel has no
/// IPv6 there is nothing of that.
pub(super) fn make(wanted: &Wanted<'_>) -> Result<Made> {
    let Wanted { name, reserved, .. } = *wanted;
    let queues = Tap::create(name, reserved.offloads, reserved.queues);
    let queues = queues.map_err(|error| match error {
        OpenError::Exists(name) => exists(&name),
        error => Error::Failed(error.to_string()),
    })?;
    let failed = |error: io::Error| Error::Failed(format!("setting {name} up: {error}"));
    let first = queues.first().ok_or_else(|| failed(Errno::ENODEV.into()))?;
    let owned = first
        .set_owner(reserved.owner)
        .or_else(|error| match error {
            // The node's user is not known in this user namespace, as in that of rootless runtimes. Without
            // an owner everybody in the pod could have the device.
            error if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
                first.set_owner(geteuid().as_raw())
            }
            error => Err(error),
        });
    owned.map_err(failed)?;
    let index = index(name).ok_or_else(|| failed(Errno::ENODEV.into()))?;
    let (addresses, routes) = possible(wanted)?;
    let wanted = Wanted {
        addresses: &addresses,
        routes: &routes,
        ..*wanted
    };
    let routes = configure(index, &wanted)?;
    Ok(Made {
        queues,
        addresses,
        routes,
    })
}

/// What of the addresses and routes the kernel can give an interface that is not up yet.
fn possible(wanted: &Wanted<'_>) -> Result<(Vec<IpNet>, Vec<Route>)> {
    let name = wanted.name;
    let (mut addresses, mut routes) = (wanted.addresses.to_vec(), wanted.routes.to_vec());
    if addresses.iter().all(|it| it.addr().is_ipv4()) {
        return Ok((addresses, routes));
    }
    if let Err(reason) = ipv6::prepare(name) {
        addresses.retain(|it| it.addr().is_ipv4());
        routes.retain(|route| route.dst.addr().is_ipv4());
        if addresses.is_empty() {
            return Err(Error::Failed(format!("{name}: {reason}")));
        }
        eprintln!("muslin-cni: {name} has no IPv6 address: {reason}");
    }
    Ok((addresses, routes))
}

/// What a runtime is told that adds the same interface twice.
pub(super) fn exists(name: &str) -> Error {
    Error::Failed(format!("an interface '{name}' is in the container already"))
}

/// What becomes of an error of one change.
#[derive(Clone, Copy)]
enum Need {
    /// The interface cannot do without.
    Must,
    /// It can, as in sandboxes with a small netlink.
    May,
    /// A route that others may have made already.
    Default,
}

fn configure(index: u32, wanted: &Wanted<'_>) -> Result<Vec<Route>> {
    let attached = &wanted.reserved.attached;
    let mut changes: Vec<(String, Need, Change)> = Vec::new();
    let mut add = |what: String, need: Need, change: Change| changes.push((what, need, change));

    let mac: VtepMac =
        wanted.reserved.mac.parse().map_err(|error| {
            Error::Failed(format!("the node gives a wrong MAC address: {error}"))
        })?;
    let identity = vec![
        LinkAttribute::Address(mac.get().0.to_vec()),
        LinkAttribute::Mtu(wanted.mtu.into()),
        LinkAttribute::IfAlias(wanted.alias.to_owned()),
    ];
    add(
        "giving it its MAC address".to_owned(),
        Need::Must,
        set(index, identity),
    );
    let segments = LinkAttribute::GsoMaxSegs(attached.link.gso_max_segs.into());
    add(String::new(), Need::May, set(index, vec![segments]));
    let queue = LinkAttribute::TxQueueLen(QUEUE_LEN);
    add(String::new(), Need::May, set(index, vec![queue]));
    let mut up = link(index);
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    let up = (RouteNetlinkMessage::SetLink(up), 0);
    add("setting it up".to_owned(), Need::Must, up);
    for net in wanted.addresses {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        let change = (
            RouteNetlinkMessage::NewAddress(message::address(index, *net)),
            flags,
        );
        add(format!("giving it the address {net}"), Need::Must, change);
    }
    for route in wanted.routes {
        let need = if route.dst.prefix_len() == 0 {
            Need::Default
        } else {
            Need::Must
        };
        // The kernel has made one to the interface's own subnet itself.
        let flags = match need {
            Need::Default => NLM_F_CREATE | NLM_F_EXCL,
            _ => NLM_F_CREATE | NLM_F_REPLACE,
        };
        let made = message::route(index, route.dst, route.gw, route.mtu);
        let change = (RouteNetlinkMessage::NewRoute(made), flags);
        add(format!("adding the route to {}", route.dst), need, change);
    }

    let name = wanted.name;
    let failed = |what: &str, error: io::Error| Error::Failed(format!("{name}: {what}: {error}"));
    let mut kernel = Kernel::open().map_err(|error| failed("rtnetlink", error))?;
    let (told, changes): (Vec<_>, Vec<_>) = changes
        .into_iter()
        .map(|(what, need, change)| ((what, need), change))
        .unzip();
    let results = kernel.change(changes);
    let results = results.map_err(|error| failed("rtnetlink", error))?;
    let before_routes = told.len() - wanted.routes.len();
    let mut routes = Vec::new();
    for (i, ((what, need), result)) in told.iter().zip(results).enumerate() {
        match (result, need) {
            (Ok(()), _) => {
                let made = i.checked_sub(before_routes);
                routes.extend(made.and_then(|i| wanted.routes.get(i)).cloned());
            }
            (Err(_), Need::May) => {}
            (Err(error), Need::Default) if error.kind() == io::ErrorKind::AlreadyExists => {}
            (Err(error), _) => return Err(failed(what, error)),
        }
    }
    Ok(routes)
}

fn link(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn set(index: u32, attributes: Vec<LinkAttribute>) -> Change {
    let mut message = link(index);
    message.attributes = attributes;
    (RouteNetlinkMessage::SetLink(message), 0)
}

/// What an interface has.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Whether it is up.
    pub(super) is_up: bool,
    /// Its alias.
    pub(super) alias: Option<String>,
    /// Its addresses.
    pub(super) addresses: Vec<IpNet>,
    /// Where its routes lead, in all tables.
    pub(super) routes: Vec<IpNet>,
}

/// The alias of an interface.
pub(super) fn alias(index: u32) -> io::Result<Option<String>> {
    Ok(look_at_link(&mut Kernel::open()?, index)?.alias)
}

/// Looks at an interface.
pub(super) fn look_at(index: u32) -> io::Result<Found> {
    let mut kernel = Kernel::open()?;
    let mut found = look_at_link(&mut kernel, index)?;
    let addresses = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    for answer in kernel.ask(addresses, true)? {
        if let RouteNetlinkMessage::NewAddress(message) = answer
            && message.header.index == index
        {
            found.addresses.extend(address_of(&message));
        }
    }
    let routes = RouteNetlinkMessage::GetRoute(RouteMessage::default());
    for answer in kernel.ask(routes, true)? {
        if let RouteNetlinkMessage::NewRoute(message) = answer {
            let oif = RouteAttribute::Oif(index);
            if message.attributes.contains(&oif) {
                found.routes.extend(destination(&message));
            }
        }
    }
    Ok(found)
}

fn look_at_link(kernel: &mut Kernel, index: u32) -> io::Result<Found> {
    let mut found = Found::default();
    for answer in kernel.ask(RouteNetlinkMessage::GetLink(link(index)), false)? {
        if let RouteNetlinkMessage::NewLink(message) = answer {
            found.is_up = message.header.flags.contains(LinkFlags::Up);
            found.alias = message.attributes.into_iter().find_map(|it| match it {
                LinkAttribute::IfAlias(alias) => Some(alias),
                _ => None,
            });
        }
    }
    Ok(found)
}

fn address_of(message: &AddressMessage) -> Option<IpNet> {
    let all = message.attributes.iter();
    // Where both are there, `Address` is the other end of a link.
    let local = all.clone().find_map(|it| match it {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        all.clone().find_map(|it| match it {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    });
    IpNet::new(address?, message.header.prefix_len).ok()
}

fn destination(message: &RouteMessage) -> Option<IpNet> {
    let len = message.header.destination_prefix_length;
    let named = message.attributes.iter().find_map(|it| match it {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::from(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        _ => None,
    });
    let any = match message.header.address_family {
        AddressFamily::Inet => Some(IpAddr::from([0; 4])),
        AddressFamily::Inet6 => Some(IpAddr::from([0; 16])),
        _ => None,
    };
    IpNet::new(named.or(any)?, len).ok()
}

/// Deletes an interface, if it has this alias.
pub(super) fn delete(name: &str, wanted: &str) -> io::Result<()> {
    let Some(index) = index(name) else {
        return Ok(());
    };
    let mut kernel = Kernel::open()?;
    if look_at_link(&mut kernel, index)?.alias.as_deref() != Some(wanted) {
        return Ok(());
    }
    let results = kernel.change(vec![(RouteNetlinkMessage::DelLink(link(index)), 0)])?;
    let deleted: io::Result<()> = results.into_iter().collect();
    match deleted {
        // It went meanwhile with the node's descriptors.
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(()),
        deleted => deleted,
    }
}
