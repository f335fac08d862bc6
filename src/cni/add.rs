//! ADD: every step that fails, and every crash between two of them, leaves nothing behind. The
//! device goes with its descriptors until the node has recorded it, a reservation with the connection.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use muslin_stack::api::cni::error::Error;
use muslin_stack::api::cni::request::reserve;
use muslin_stack::api::cni::result::{Added, Dns, Interface, Ip, Route};
use muslin_stack::api::cni::{self, Reply, Reserved};
use muslin_stack::api::control::Attached;

use super::call::{Call, Result};
use super::delegate::Delegate;
use super::interface::{Made, Wanted, exists, index, make};
use super::namespace::Namespace;
use super::node::{Node, PATIENCE, Trouble, unexpected};
use super::{del, restore};

/// How the result is told.
pub(super) type Tell<'a> = &'a dyn Fn(&Added) -> Result<()>;

/// How long a node is waited for: it may start at the same time, as after a reboot.
const READY: Duration = Duration::from_secs(5);

/// Attaches the container, and tells the result. Where that cannot be told, nothing is left of it.
pub(super) fn run(call: &Call, tell: Tell<'_>) -> Result<()> {
    let environment = &call.environment;
    let path = environment.netns.as_deref().unwrap_or_default();
    let namespace = Namespace::of_container(path, environment.may_be_own_netns)?;
    let name = &environment.interface;
    namespace.within(|| match index(name) {
        Some(_) => Err(exists(name)),
        None => Ok(()),
    })?;
    let mut node = Node::await_ready(&call.config.socket, Instant::now() + READY)
        .map_err(|trouble| trouble.into_error())?;
    let delegate = Delegate::of(call)?;
    let done = match &delegate {
        None => attach(call, &namespace, &mut node, None, tell),
        Some(delegate) => {
            let given = delegate.add();
            let done = given.and_then(|it| attach(call, &namespace, &mut node, Some(it), tell));
            if done.is_err() {
                delegate.undo();
            }
            done
        }
    };
    done?;
    restore::run(&mut node);
    Ok(())
}

/// All that follows once addresses are chosen, if others than the node do that.
fn attach(
    call: &Call,
    namespace: &Namespace,
    node: &mut Node,
    given: Option<Added>,
    tell: Tell<'_>,
) -> Result<()> {
    let Call {
        environment,
        config,
        ..
    } = call;
    let is_delegated = given.is_some();
    let given = given.unwrap_or_default();
    let delegated: Vec<_> = given.ips.iter().map(|ip| ip.address.addr()).collect();
    let place = reserve(environment, config, namespace.id.clone(), &delegated)?;
    let key = place.key.clone();
    let until = || Instant::now() + PATIENCE;
    let asked = node.ask::<std::fs::File>(cni::Call::Reserve(Box::new(place)), &[], until());
    let reserved = match asked.map_err(|trouble| trouble.into_error())? {
        Reply::Reserved(reserved) => reserved,
        other => return Err(unexpected(&other).into_error()),
    };
    let attached = &reserved.attached;
    if is_delegated {
        // The node adds one of the IP version for which the delegate has none.
        let has: Vec<IpAddr> = attached.address.addresses().iter().collect();
        if delegated.is_empty() || delegated.iter().any(|address| !has.contains(address)) {
            let text = format!("the node gives {}, not what ipam does", attached.address);
            return Err(Error::Failed(text));
        }
    }
    let mtu = config.mtu.unwrap_or(u16::MAX).min(attached.link.mtu);
    let routes = routes(attached, given.routes);
    let alias = environment.alias();
    let addresses: Vec<_> = attached.address.iter().collect();
    let wanted = Wanted {
        name: &environment.interface,
        alias: &alias,
        mtu,
        addresses: &addresses,
        routes: &routes,
        reserved: &reserved,
    };
    let made = namespace.within(|| make(&wanted))?;
    let commit = cni::Call::Commit { key: key.clone() };
    if let Err(trouble) = node.command_with(commit, &made.queues, until()) {
        if let Trouble::Lost(why) = &trouble {
            // The node may have taken the device nevertheless, or take it yet.
            del::end_without_answer(call, &key, why);
        }
        return Err(trouble.into_error());
    }
    let result = result(call, &reserved, mtu, &made, given.dns);
    tell(&result).inspect_err(|_| {
        // Nobody knows of it.
        let _ = node.command(cni::Call::Release { key }, until());
    })
}

/// What is reached through the gateways: by the node, and by the delegate where that adds to it.
fn routes(attached: &Attached, delegated: Vec<Route>) -> Vec<Route> {
    let own = attached.routes.iter().map(|dst| {
        let mut route = Route::new(*dst, gateway(attached, dst));
        let mtu = route
            .gw
            .and_then(|gateway| attached.link.route_mtu(gateway));
        route.mtu = mtu.map(u32::from);
        route
    });
    let mut routes: Vec<_> = own.collect();
    for mut route in delegated {
        route.gw = route.gw.or_else(|| gateway(attached, &route.dst));
        if !routes.iter().any(|it| it.dst.trunc() == route.dst.trunc()) {
            routes.push(route);
        }
    }
    routes
}

/// The gateway of the IP version of this.
fn gateway(attached: &Attached, of: &IpNet) -> Option<IpAddr> {
    match of {
        IpNet::V4(_) => attached.gateway.ipv4().map(IpAddr::from),
        IpNet::V6(_) => attached.gateway.ipv6().map(IpAddr::from),
    }
}

fn result(call: &Call, reserved: &Reserved, mtu: u16, made: &Made, dns: Dns) -> Added {
    let Call {
        environment,
        config,
        ..
    } = call;
    let attached = &reserved.attached;
    let sandbox = environment.netns.as_deref().unwrap_or_default();
    let interface = Interface::new(&environment.interface, &reserved.mac, mtu.into(), sandbox);
    let ip = |net: &IpNet| Ip::new(*net, gateway(attached, net));
    let ips = made.addresses.iter().map(ip).collect();
    // The administrator's and the runtime's word is the last, as with the reference plugins.
    let of_node = || {
        let mut dns = Dns::default();
        dns.nameservers = attached.dns.iter().map(ToString::to_string).collect();
        dns.search.clone_from(&attached.search);
        dns.options.clone_from(&attached.dns_options);
        dns
    };
    let told = [config.dns.clone(), dns];
    let told = told.into_iter().find(|dns| !dns.is_empty());
    let mut added = config.previous.clone().unwrap_or_default();
    let routes = made.routes.clone();
    added.add(interface, ips, routes, told.unwrap_or_else(of_node));
    added
}
