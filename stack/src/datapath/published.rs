//! PublishedPort ports: which client's connection or datagram becomes which flow of a pod.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use smoltcp::time::Instant;

use super::Datapath;
use crate::addresses::ipv4;
use crate::datapath::egress::{FlowId, FlowKey, Host, Protocol};
use crate::datapath::filter::Filter;
use crate::datapath::guard;
use crate::datapath::observe::Observer;
use crate::drops::DropReason;

/// A port of the host that leads to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedPort {
    /// What it carries.
    pub protocol: Protocol,
    /// The pod and its port.
    pub pod: SocketAddr,
    /// The overlay's network.
    pub network: IpNet,
}

/// Who uses a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client {
    /// Its address and port.
    pub address: SocketAddr,
    /// The host's address that it used.
    pub local: IpAddr,
}

impl PublishedPort {
    fn key(&self, remote: SocketAddr) -> FlowKey {
        FlowKey {
            protocol: self.protocol,
            pod: self.pod,
            remote,
        }
    }

    /// The address that a pod can tell from its own network's and answer: not that of a client on
    /// this machine, nor one that looks like a pod's, nor one of another IP version than its own.
    fn visible(&self, client: Client) -> Option<FlowKey> {
        let address = client.address.ip();
        let is_visible = address.is_ipv4() == self.pod.is_ipv4()
            && ipv4(address).is_none_or(|address| !guard::is_martian(address))
            && !self.network.contains(&address)
            && address != client.local
            && client.address.port() != 0;
        is_visible.then(|| self.key(client.address))
    }
}

impl<O: Observer, F: Filter> Datapath<O, F> {
    /// Begins a client's TCP connection to a pod, which gets `preface` first (see [`Egress::dial`]).
    /// The pod sees the client's own address where it can, else the gateway's.
    ///
    /// # Errors
    /// Why there is none. Nothing is counted.
    ///
    /// [`Egress::dial`]: crate::datapath::egress::Egress::dial
    pub fn accept(
        &mut self,
        now: Instant,
        published: PublishedPort,
        client: Client,
        preface: &[u8],
        host: &mut impl Host,
    ) -> Result<FlowId, DropReason> {
        let visible = self.visible(published, client);
        let free = visible.filter(|key| self.egress.find(key).is_none());
        let any_port = || published.key(SocketAddr::new(self.node.gateway_ipv4().into(), 0));
        let key = free.unwrap_or_else(any_port);
        self.egress.dial(now, key, preface, host)
    }

    /// Sends a pod a client's datagram (see [`Egress::deliver`]), by the flow that the client is
    /// `known` to have or by a new one.
    ///
    /// # Errors
    /// Why it is dropped. Nothing is counted.
    ///
    /// [`Egress::deliver`]: crate::datapath::egress::Egress::deliver
    pub fn deliver(
        &mut self,
        now: Instant,
        published: PublishedPort,
        client: Client,
        known: Option<FlowId>,
        payload: &[u8],
        host: &mut impl Host,
    ) -> Result<FlowId, DropReason> {
        let key = match known.and_then(|flow| self.egress.key(flow)) {
            Some(key) => key,
            None => self.key_for(published, client)?,
        };
        self.egress.deliver(now, key, payload, host)
    }

    /// What the pod sends to the host's own addresses does not come to flows where there is a host
    /// interface.
    fn visible(&self, published: PublishedPort, client: Client) -> Option<FlowKey> {
        let is_host = |address| ipv4(address).is_some_and(|it| self.node.is_at_host(it));
        let visible = published.visible(client);
        visible.filter(|key| !is_host(key.remote.ip()))
    }

    /// The ends of a new flow of datagrams.
    fn key_for(&mut self, published: PublishedPort, client: Client) -> Result<FlowKey, DropReason> {
        let visible = self.visible(published, client);
        if let Some(key) = visible.filter(|key| self.egress.find(key).is_none()) {
            return Ok(key);
        }
        let mut key = published.key(SocketAddr::new(self.node.gateway_ipv4().into(), 0));
        key.remote.set_port(self.egress.free_port(key)?);
        Ok(key)
    }
}
