//! A pod's interface inside its namespace, set up by rtnetlink.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use muslin_stack::addresses::{Addresses, Nets};
use muslin_stack::api::control::Link;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkUnspec};
use tracing::warn;

use super::ipv6;
use super::message;
use crate::error::{Context, Error, Result};
use crate::netlink;

/// Frames that may wait for the node. At the kernel's own 1,000 the bursts of a few connections
/// overflow it.
pub(crate) const QUEUE_LEN: u32 = 4096;
const LOOPBACK: &str = "lo";

/// What a pod's interface is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Its addresses with the length of the node's subnets.
    pub address: Nets,
    /// The gateways.
    pub gateway: Addresses,
    /// What it can send at once.
    pub link: Link,
    /// What is reached through the gateways.
    pub routes: Vec<IpNet>,
}

impl Assignment {
    /// The same for a kernel without IPv6; nothing if that leaves no address.
    fn without_ipv6(&self) -> Option<Self> {
        let address = Nets::new(self.address.ipv4(), None)?;
        let gateway = Addresses::new(self.gateway.ipv4(), None)?;
        let routes = self.routes.iter().filter(|it| it.addr().is_ipv4());
        Some(Self {
            address,
            gateway,
            link: self.link,
            routes: routes.copied().collect(),
        })
    }

    /// The routes of an IP version, by its gateway.
    async fn add_routes(&self, handle: &Handle, index: u32, gateway: IpAddr) -> Result<()> {
        let is_its = |route: &&IpNet| route.addr().is_ipv4() == gateway.is_ipv4();
        for route in self.routes.iter().filter(is_its) {
            let mtu = self.link.route_mtu(gateway);
            let message = message::route(index, *route, Some(gateway), mtu.map(u32::from));
            let added = handle.route().add(message).replace().execute().await;
            added.context(format!("adding the route to {route} by {gateway}"))?;
        }
        Ok(())
    }
}

/// Gives the interface `name` of this thread's network namespace its addresses in place of any
/// other, MTU and routes, and sets it and the loopback interface up. Where the kernel has no IPv6 it goes
/// without, and a warning says so.
///
/// # Errors
/// What the kernel refused.
pub async fn configure(name: &str, assignment: &Assignment) -> Result<()> {
    netlink::with(async |handle| set_up(handle, name, assignment).await).await?
}

/// Sets the loopback interface of this thread's network namespace up, and gives it these addresses, too.
///
/// # Errors
/// What the kernel refused.
pub(crate) async fn configure_loopback(addresses: &[IpNet]) -> Result<()> {
    let set = async |handle: &Handle| {
        let loopback = set_loopback_up(handle).await?;
        for net in addresses {
            add_address(handle, (loopback, LOOPBACK), *net).await?;
        }
        Ok(())
    };
    netlink::with(set).await?
}

/// Gives the interface `name` of this thread's network namespace the MTU and length of superpackets that
/// are assigned now.
///
/// # Errors
/// What the kernel refused.
pub async fn set_link(name: &str, assignment: &Assignment) -> Result<()> {
    let set = async |handle: &Handle| {
        let index = index(handle, name).await?;
        set_mtu(handle, (index, name), assignment.link).await?;
        match assignment.gateway.ipv6().filter(|_| ipv6::is_on(name)) {
            Some(gateway) => assignment.add_routes(handle, index, gateway.into()).await,
            None => Ok(()),
        }
    };
    netlink::with(set).await?
}

async fn set_mtu(handle: &Handle, (index, name): (u32, &str), link: Link) -> Result<()> {
    let message = LinkUnspec::new_with_index(index).mtu(link.mtu.into());
    let set = handle.link().set(message.build()).execute().await;
    set.context(format!("giving {name} an MTU of {}", link.mtu))?;
    let segments = LinkAttribute::GsoMaxSegs(link.gso_max_segs.into());
    netlink::tune(handle, index, segments).await;
    Ok(())
}

async fn set_up(handle: &Handle, name: &str, assignment: &Assignment) -> Result<()> {
    set_loopback_up(handle).await?;

    let index = index(handle, name).await?;
    set_mtu(handle, (index, name), assignment.link).await?;
    let reduced = match assignment.address.ipv6().map(|_| ipv6::prepare(name)) {
        Some(Err(reason)) => {
            let reduced = assignment.without_ipv6();
            let reduced = reduced.ok_or_else(|| Error::failed(format!("{name}: {reason}")))?;
            warn!("{name} has no IPv6 address: {reason}");
            Some(reduced)
        }
        _ => None,
    };
    let assignment = reduced.as_ref().unwrap_or(assignment);
    let up = LinkUnspec::new_with_index(index).up().build();
    let set = handle.link().set(up).execute().await;
    set.context(format!("setting {name} up"))?;
    netlink::tune(handle, index, LinkAttribute::TxQueueLen(QUEUE_LEN)).await;

    let Assignment {
        address, gateway, ..
    } = assignment;
    // What an earlier attachment left, when the node has another subnet now.
    netlink::flush_addresses(handle, index, address.addresses()).await?;
    for net in address.iter::<IpNet>() {
        add_address(handle, (index, name), net).await?;
    }
    for gateway in gateway.iter::<IpAddr>() {
        assignment.add_routes(handle, index, gateway).await?;
    }
    Ok(())
}

/// Sets the loopback interface up and returns its index.
async fn set_loopback_up(handle: &Handle) -> Result<u32> {
    let loopback = index(handle, LOOPBACK).await?;
    let up = LinkUnspec::new_with_index(loopback).up().build();
    let set = handle.link().set(up).execute().await;
    set.context("setting the loopback interface up")?;
    Ok(loopback)
}

async fn add_address(handle: &Handle, (index, name): (u32, &str), net: IpNet) -> Result<()> {
    let mut add = handle.address().add(index, net.addr(), net.prefix_len());
    *add.message_mut() = message::address(index, net);
    let added = add.replace().execute().await;
    added.context(format!("giving {name} the address {net}"))
}

async fn index(handle: &Handle, name: &str) -> Result<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links
        .try_next()
        .await
        .context(format!("looking for {name}"))?;
    let link = link.ok_or_else(|| Error::failed(format!("there is no interface {name}")))?;
    Ok(link.header.index)
}
