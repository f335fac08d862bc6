//! `muslin host-interface`: the interface by which the host and pods reach each other, made once by
//! whoever may make interfaces.

use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use muslin_stack::api::control::{Status, Table};
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use tokio::time::sleep;
use tracing::warn;

use super::NodeChoice;
use crate::control::Client;
use crate::daemon::HOST_INTERFACE;
use crate::device::{OpenError, Tun};
use crate::error::{Context, Error, Result};
use crate::netlink;
use crate::netns::QUEUE_LEN;
use crate::process::block_on;

/// How often a node is looked for with `--wait`.
const LOOK: Duration = Duration::from_millis(500);

/// How often the interface is made as it should be with `--watch`.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    node: NodeChoice,
    /// The interface's name, which the node has as --host-interface
    #[arg(long, value_name = "NAME", default_value = HOST_INTERFACE)]
    interface: String,
    /// The user who may open the interface [default: the node's, whose the control socket is]
    #[arg(long, value_name = "UID")]
    owner: Option<u32>,
    /// Wait until a node is ready
    #[arg(long, conflicts_with = "remove")]
    wait: bool,
    /// Stay, and make the interface again whenever it is not as it should be
    #[arg(long, requires = "wait")]
    watch: bool,
    /// Remove the interface
    #[arg(long, conflicts_with = "owner")]
    remove: bool,
}

/// What the interface is to have.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    network: Ipv4Net,
    subnet: Ipv4Net,
    mtu: u16,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    block_on(async {
        if arguments.remove {
            return remove(&arguments.interface).await;
        }
        make(arguments).await?;
        if !arguments.watch {
            return Ok(());
        }
        loop {
            sleep(LOOK_AGAIN).await;
            // What was possible once may be so again.
            if let Err(error) = make(arguments).await {
                warn!("{error}");
            }
        }
    })
}

/// Makes the interface as the node says.
async fn make(arguments: &Arguments) -> Result<()> {
    let (wanted, user) = ask(arguments).await?;
    let owner = arguments.owner.unwrap_or(user);
    let name = arguments.interface.as_str();
    Tun::make(name, owner).map_err(|error| explain(name, error))?;
    netlink::with(async |handle| set_up(handle, name, wanted).await).await?
}

/// Asks the node what the interface is to have, and whose process it is.
async fn ask(arguments: &Arguments) -> Result<(Wanted, u32)> {
    let mut told = String::new();
    loop {
        let error = match status(arguments).await {
            Ok((status, user)) => return Ok((wanted(&status)?, user)),
            Err(error) if !arguments.wait || matches!(error, Error::Usage(_)) => return Err(error),
            Err(error) => error.to_string(),
        };
        if error != told {
            warn!("waiting for a node: {error}");
            told = error;
        }
        sleep(LOOK).await;
    }
}

async fn status(arguments: &Arguments) -> Result<(Status, u32)> {
    let socket = arguments.node.socket()?;
    let client = Client::connect(&socket).await?;
    let mut rows = client.report::<Status>(Table::Status).await?;
    let status = rows.pop();
    let status = status.ok_or_else(|| Error::failed("the node sent no status"))?;
    Ok((status, owner(&socket)?))
}

/// The user who made a socket.
fn owner(socket: &Path) -> Result<u32> {
    let metadata = socket.metadata();
    let metadata = metadata.context(format!("cannot look at {}", socket.display()))?;
    Ok(metadata.uid())
}

fn wanted(status: &Status) -> Result<Wanted> {
    let (network, subnet) = (status.network.ipv4(), status.subnet.ipv4());
    let (Some(network), Some(subnet)) = (network, subnet) else {
        return Err(Error::failed("the node has no IPv4 subnet"));
    };
    Ok(Wanted {
        network,
        subnet,
        mtu: status.mtu,
    })
}

fn explain(name: &str, error: OpenError) -> Error {
    match error {
        OpenError::Forbidden => Error::failed(format!(
            "no permission to make {name}: run this as root, or with CAP_NET_ADMIN in the network \
             namespace of the node"
        )),
        OpenError::Exists(_) => Error::failed(format!(
            "an interface {name} is there already that is no TUN device with several queues: remove \
             it, or choose another name with --interface"
        )),
        other => Error::failed(other),
    }
}

/// Gives the interface its address, MTU and route, in place of what it had.
async fn set_up(handle: &Handle, name: &str, wanted: Wanted) -> Result<()> {
    let Wanted {
        network,
        subnet,
        mtu,
    } = wanted;
    let index = if_nametoindex(name).context(format!("{name} is gone"))?;
    // There is no IPv6 in the pod network yet, and what the kernel says of its own accord is lost.
    let silent = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    netlink::tune(handle, index, LinkAttribute::AfSpecUnspec(vec![silent])).await;
    netlink::tune(handle, index, LinkAttribute::TxQueueLen(QUEUE_LEN)).await;
    let link = LinkUnspec::new_with_index(index).mtu(mtu.into()).up();
    let set = handle.link().set(link.build()).execute().await;
    set.context(format!("setting {name} up with an MTU of {mtu}"))?;
    let base = subnet.network();
    netlink::flush_addresses(handle, index, base.into()).await?;
    let add = handle.address().add(index, base.into(), 32);
    let added = add.replace().execute().await;
    added.context(format!("giving {name} the address {base}/32"))?;
    flush_routes(handle, index, network).await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(network.network(), network.prefix_len())
        .output_interface(index)
        .scope(RouteScope::Link)
        .pref_source(base)
        .build();
    let added = handle.route().add(route).replace().execute().await;
    added.context(format!("adding the route to {network} by {name}"))
}

/// Removes routes to other networks.
async fn flush_routes(handle: &Handle, index: u32, keep: Ipv4Net) -> Result<()> {
    let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let mut routes = handle.route().get(all).execute();
    while let Some(message) = routes.try_next().await.context("reading routes")? {
        if is_other_route(&message, index, keep) {
            let removed = handle.route().del(message).execute().await;
            removed.context("removing an old route")?;
        }
    }
    Ok(())
}

/// Whether a route of the main table leads by an interface to another network.
fn is_other_route(message: &RouteMessage, index: u32, keep: Ipv4Net) -> bool {
    let mut is_by_it = false;
    let mut destination = Ipv4Addr::UNSPECIFIED;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(by) => is_by_it |= *by == index,
            RouteAttribute::Destination(RouteAddress::Inet(to)) => destination = *to,
            _ => {}
        }
    }
    let header = &message.header;
    let is_main = header.table == rtnetlink::packet_route::route::RouteHeader::RT_TABLE_MAIN;
    let to = (destination, header.destination_prefix_length);
    is_main && is_by_it && to != (keep.network(), keep.prefix_len())
}

/// Removes the interface; nothing is to be done where there is none.
async fn remove(name: &str) -> Result<()> {
    let Ok(index) = if_nametoindex(name) else {
        return Ok(());
    };
    let removed = netlink::with(async |handle| {
        let mut links = handle.link().get().match_index(index).execute();
        let link = links.try_next().await?;
        // A TUN device has no link-layer address.
        let flags = link.map(|link| link.header.flags);
        if flags.is_some_and(|flags| !flags.contains(LinkFlags::Pointopoint)) {
            return Ok(false);
        }
        handle.link().del(index).execute().await.map(|()| true)
    });
    let removed = removed.await?;
    if removed.context(format!("removing {name}"))? {
        Ok(())
    } else {
        Err(Error::failed(format!(
            "{name} is no interface of 'muslin host-interface'"
        )))
    }
}
