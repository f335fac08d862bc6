//! The host interface: found when it is there, by a node that could not make it.
//!
//! `muslin host-interface` makes it for the node's user, who may open it without privileges. So the
//! node looks for it itself, and finds it again after it was started anew.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ipnet::Ipv4Net;
use muslin_stack::api::events::EventKind;
use muslin_stack::datapath::host_interface::{HostFlows, HostInterface};
use nix::net::if_::if_nametoindex;
use nix::unistd::geteuid;
use parking_lot::Mutex;
use tracing::warn;

use super::running::RunningNode;
use crate::device::{OpenError, Tun};
use crate::error::{Context, Error, Result};
use crate::netlink::Changes;
use crate::random::random;
use crate::underlay::KernelNetwork;

/// The interface's name, unless another is given.
pub(crate) const NAME: &str = "muslin0";

/// How often the interface and the host's addresses are looked at, if the kernel reports no change.
const LOOK: Duration = Duration::from_secs(5);

/// What is known of the interface.
#[derive(Debug, Default)]
pub(super) struct HostState {
    /// The host's addresses, while it is open.
    addresses: Mutex<Vec<IpAddr>>,
    is_lost: AtomicBool,
    /// Queues that the process before this one had.
    inherited: Mutex<Vec<Tun>>,
}

impl HostState {
    /// The host's addresses that pods reach by the interface.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        self.addresses.lock().clone()
    }

    /// Goes on with the queues of the process before this one.
    pub(super) fn inherit(&self, queues: Vec<OwnedFd>) {
        let queues = queues.into_iter().map(Tun::from_descriptor);
        match queues.collect() {
            Ok(queues) => *self.inherited.lock() = queues,
            Err(error) => warn!("cannot go on with the host interface: {error}"),
        }
    }

    /// A worker cannot read from the interface any more.
    pub(super) fn lose(&self) {
        self.is_lost.store(true, Ordering::Relaxed);
    }
}

/// Looks for the interface, and follows it and the host's addresses, for as long as the node runs.
pub(super) async fn follow(name: String, mut changes: Changes, running: Arc<RunningNode>) {
    let seed = match random() {
        Ok(seed) => u64::from_ne_bytes(seed),
        Err(error) => return warn!("there is no host interface: {error}"),
    };
    let mut follower = Follower {
        name,
        flows: Arc::new(HostFlows::new(seed)),
        open: None,
        complaint: String::new(),
        running,
    };
    loop {
        match follower.look().await {
            Ok(()) => follower.complaint.clear(),
            Err(error) => follower.complain(&error),
        }
        changes.wait(LOOK).await;
    }
}

struct Follower {
    name: String,
    /// They outlive the interface.
    flows: Arc<HostFlows>,
    /// The index of the interface that is open.
    open: Option<u32>,
    /// What was logged last.
    complaint: String,
    running: Arc<RunningNode>,
}

impl Follower {
    async fn look(&mut self) -> Result<()> {
        let found = if_nametoindex(self.name.as_str()).ok();
        let is_lost = self.running.host.is_lost.swap(false, Ordering::Relaxed);
        if self.open.is_some() && (found != self.open || is_lost) {
            self.close()?;
        }
        // Who is not there is not made: that would need privileges.
        let Some(index) = found else {
            return Ok(());
        };
        let kernel = KernelNetwork::read_interfaces().await?;
        // It is another node's, or of an earlier lease, or not finished yet.
        let (base, own) = (
            self.running.facts.ipv4_subnet()?.network(),
            kernel.addresses_of(&self.name),
        );
        if !own.contains(&base) {
            if self.open.is_some() {
                self.close()?;
            }
            return match own.as_slice() {
                [] => Ok(()),
                [other, ..] => Err(Error::failed(format!(
                    "the interface {} has the address {other}, and this node's would be {base}: run \
                     'sudo muslin host-interface', or start the node with another --host-interface",
                    self.name
                ))),
            };
        }
        let addresses = host_addresses(kernel.addresses(), self.running.facts.config.network);
        let host = HostInterface {
            addresses: addresses.clone(),
            flows: self.flows.clone(),
        };
        if self.open.is_some() {
            if addresses != self.running.host.addresses() {
                self.running
                    .workers
                    .set_host(&host)
                    .map_err(Error::failed)?;
                *self.running.host.addresses.lock() = addresses;
            }
            return Ok(());
        }
        let facts = &self.running.facts;
        let mut queues = std::mem::take(&mut *self.running.host.inherited.lock());
        if queues.is_empty() {
            let opened = Tun::open(&self.name, facts.settings.workers);
            queues = opened.map_err(|error| self.explain(error))?;
        }
        if !facts.settings.offload.tap {
            for queue in &mut queues {
                let disabled = queue.disable_offloads();
                disabled.context("cannot disable offloads")?;
            }
        }
        let opened = self.running.workers.open_host(&host, queues);
        opened.context("cannot use the host interface")?;
        *self.running.host.addresses.lock() = addresses;
        self.open = Some(index);
        let name = &self.name;
        let text =
            format!("the host interface {name} is open: this machine and pods reach each other");
        let journal = &self.running.journal;
        journal.note(EventKind::HostInterfaceOpen, name, text);
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        self.open = None;
        self.running.host.addresses.lock().clear();
        let text = format!("the host interface {} is gone", self.name);
        let journal = &self.running.journal;
        journal.note(EventKind::HostInterfaceGone, &self.name, text);
        self.running.workers.close_host().map_err(Error::failed)
    }

    /// Why the interface cannot be opened, and what to do.
    fn explain(&self, error: OpenError) -> Error {
        let name = &self.name;
        match error {
            OpenError::Forbidden => Error::failed(format!(
                "the interface {name} belongs to another user than {}: run 'sudo muslin \
                 host-interface', or start the node with another --host-interface",
                geteuid()
            )),
            OpenError::Exists(_) => Error::failed(format!(
                "the interface {name} is no TUN device of 'muslin host-interface': start the node \
                 with another --host-interface"
            )),
            other => Error::failed(format!("the interface {name} cannot be opened: {other}")),
        }
    }

    /// Warns once.
    fn complain(&mut self, error: &Error) {
        let text = error.to_string();
        if text != self.complaint {
            warn!("{text}");
            self.complaint = text;
        }
    }
}

/// Those of all addresses that are the host's alone.
fn host_addresses(all: impl Iterator<Item = Ipv4Addr>, network: Ipv4Net) -> Vec<IpAddr> {
    let is_own = |address: &Ipv4Addr| {
        !address.is_loopback() && !address.is_unspecified() && !network.contains(address)
    };
    let mut own: Vec<_> = all.filter(is_own).map(IpAddr::V4).collect();
    own.sort_unstable();
    own.dedup();
    own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_the_pod_network_are_not_the_hosts() {
        let all = [
            "127.0.0.1",
            "10.9.0.1",
            "10.244.1.0",
            "10.9.0.1",
            "10.8.0.1",
        ];
        let all = all.map(|address| address.parse().unwrap());
        let own = host_addresses(all.into_iter(), "10.244.0.0/16".parse().unwrap());
        let expected = ["10.8.0.1", "10.9.0.1"].map(|address| address.parse::<Ipv4Addr>().unwrap());
        assert_eq!(own, expected);
    }
}
