//! A pod's interface inside its namespace, set up by rtnetlink.

use std::net::Ipv4Addr;

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use muslin_stack::api::control::Link;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use crate::error::{Context, Error, Result};
use crate::netlink;

/// Frames that may wait for the node. At the kernel's own 1,000 the bursts of a few connections
/// overflow it.
pub(crate) const QUEUE_LEN: u32 = 4096;

/// What a pod's interface is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Its address with the length of the node's subnet.
    pub address: Ipv4Net,
    /// The gateway.
    pub gateway: Ipv4Addr,
    /// What it can send at once.
    pub link: Link,
    /// What is reached through the gateway.
    pub routes: Vec<Ipv4Net>,
}

/// Gives the interface `name` of this thread's network namespace its address in place of any other,
/// MTU and routes, and sets it and the loopback interface up.
///
/// # Errors
/// What the kernel refused.
pub async fn configure(name: &str, assignment: &Assignment) -> Result<()> {
    netlink::with(async |handle| set_up(handle, name, assignment).await).await?
}

/// Gives the interface `name` of this thread's network namespace another MTU and length of
/// superpackets.
///
/// # Errors
/// What the kernel refused.
pub async fn set_link(name: &str, link: Link) -> Result<()> {
    let set = async |handle: &Handle| {
        let index = index(handle, name).await?;
        set_mtu(handle, (index, name), link).await
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
    let loopback = index(handle, "lo").await?;
    let up = LinkUnspec::new_with_index(loopback).up().build();
    let set = handle.link().set(up).execute().await;
    set.context("setting the loopback interface up")?;

    let index = index(handle, name).await?;
    set_mtu(handle, (index, name), assignment.link).await?;
    let up = LinkUnspec::new_with_index(index).up().build();
    let set = handle.link().set(up).execute().await;
    set.context(format!("setting {name} up"))?;
    netlink::tune(handle, index, LinkAttribute::TxQueueLen(QUEUE_LEN)).await;

    let Assignment {
        address, gateway, ..
    } = assignment;
    // What an earlier attachment left, when the node has another subnet now.
    netlink::flush_addresses(handle, index, address.addr()).await?;
    let add = handle
        .address()
        .add(index, address.addr().into(), address.prefix_len());
    let added = add.replace().execute().await;
    added.context(format!("giving {name} the address {address}"))?;

    for route in &assignment.routes {
        let message = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(route.network(), route.prefix_len())
            .gateway(*gateway)
            .output_interface(index)
            .build();
        let added = handle.route().add(message).replace().execute().await;
        added.context(format!("adding the route to {route} by {gateway}"))?;
    }
    Ok(())
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
