//! The kernel's network configuration, asked over rtnetlink.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use muslin_stack::addresses::Addresses;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkUnspec, MulticastGroup, new_connection, new_multicast_connection};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::debug;

use crate::error::{Context, Error, Result};

/// The same on a thread of its own, where nothing can be awaited.
///
/// # Errors
/// If there is no connection.
pub(crate) fn with_blocking<T: Send>(ask: impl AsyncFnOnce(&Handle) -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_io().build();
            let runtime = runtime.context("cannot speak rtnetlink")?;
            runtime.block_on(with(ask))
        });
        let failed = |_| Err(Error::failed("rtnetlink's thread has ended"));
        thread.join().unwrap_or_else(failed)
    })
}

/// How long changes that belong together may take: an interface that appears gets its address, its
/// MTU and its routes one after the other.
const SETTLING: Duration = Duration::from_millis(200);

/// Speaks rtnetlink in the network namespace of this thread, for as long as `ask` takes.
///
/// # Errors
/// If there is no connection; what `ask` has to say is its own.
pub(crate) async fn with<T>(ask: impl AsyncFnOnce(&Handle) -> T) -> Result<T> {
    let (connection, handle, _) = new_connection().context("cannot speak rtnetlink")?;
    let connection = tokio::spawn(connection);
    let answer = ask(&handle).await;
    connection.abort();
    Ok(answer)
}

/// Sets what an interface also works without, as in sandboxes with a small netlink: bursts are lost
/// sooner then, and longer superpackets are cut by the node, in twice as many calls.
pub(crate) async fn tune(handle: &Handle, index: u32, attribute: LinkAttribute) {
    let link = LinkUnspec::new_with_index(index)
        .append_extra_attribute(attribute.clone())
        .build();
    if let Err(error) = handle.link().set(link).execute().await {
        debug!("the interface does without {attribute:?}: {error}");
    }
}

/// Removes the addresses of an interface but these and link-local ones of IPv6, with the routes that have
/// them.
///
/// # Errors
/// What the kernel refused.
pub(crate) async fn flush_addresses(handle: &Handle, index: u32, keep: Addresses) -> Result<()> {
    let keep: Vec<IpAddr> = keep.iter().collect();
    let is_other = |address: &IpAddr| match address {
        IpAddr::V6(address) if address.is_unicast_link_local() => false,
        address => !keep.contains(address),
    };
    let mut addresses = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    while let Some(message) = addresses.try_next().await.context("reading addresses")? {
        let is_other = message.attributes.iter().any(|attribute| match attribute {
            AddressAttribute::Local(address) => is_other(address),
            // On a point-to-point link of IPv4 this is the other end.
            AddressAttribute::Address(address) => address.is_ipv6() && is_other(address),
            _ => false,
        });
        if is_other {
            let removed = handle.address().del(message).execute().await;
            removed.context("removing an old address")?;
        }
    }
    Ok(())
}

/// News of interfaces, addresses and IPv4 routes in the network namespace of this thread.
pub(crate) struct Changes {
    /// Nothing if the kernel reports none, as in some sandboxes.
    news: Option<BoxStream<'static, ()>>,
    connection: Option<AbortHandle>,
}

impl Changes {
    /// Listens from now on.
    pub(crate) fn listen() -> Self {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
        ];
        match new_multicast_connection(&groups) {
            Ok((connection, _, messages)) => Self {
                news: Some(messages.map(|_| ()).boxed()),
                connection: Some(tokio::spawn(connection).abort_handle()),
            },
            Err(error) => {
                debug!("the kernel reports no changes of interfaces: {error}");
                Self {
                    news: None,
                    connection: None,
                }
            }
        }
    }

    /// Waits until something has changed and nothing more follows at once, or for so long.
    pub(crate) async fn wait(&mut self, patience: Duration) {
        let Some(news) = &mut self.news else {
            return sleep(patience).await;
        };
        match timeout(patience, news.next()).await {
            Err(_) => {}
            Ok(Some(())) => {
                // Where changes never end they are looked at nevertheless.
                let settle =
                    async { while let Ok(Some(())) = timeout(SETTLING, news.next()).await {} };
                let _ = timeout(patience, settle).await;
            }
            Ok(None) => {
                self.news = None;
                sleep(patience).await;
            }
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        if let Some(connection) = &self.connection {
            connection.abort();
        }
    }
}
