//! PublishedPort ports: which client's connection or datagram becomes which flow of a pod.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use smoltcp::time::Instant;

use super::Datapath;
use crate::addresses::{Addresses, ipv4};
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
            && can_be_answered(address)
            && !self.network.contains(&address)
            && address != client.local
            && client.address.port() != 0;
        is_visible.then(|| self.key(client.address))
    }
}

/// Which of a pod's addresses a port of the host leads to: the one of the IP version of the host's
/// address, so that the pod sees its clients, or else the one that it has.
#[must_use]
pub fn pod_address(pod: Addresses, host: IpAddr) -> Option<IpAddr> {
    let same = pod
        .iter()
        .find(|it: &IpAddr| it.is_ipv4() == host.is_ipv4());
    same.or_else(|| pod.iter().next())
}

/// Whether what a pod sends to an address comes to its gateway.
fn can_be_answered(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !guard::is_martian(address),
        IpAddr::V6(address) => {
            !guard::is_martian_v6(address)
                && !address.is_unspecified()
                && !address.is_unicast_link_local()
        }
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
        let key = match free {
            Some(key) => key,
            None => self.gateway_end(published)?,
        };
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

    /// The ends of a flow that comes from the gateway's address, with no port yet.
    fn gateway_end(&self, published: PublishedPort) -> Result<FlowKey, DropReason> {
        let gateway = self.egress.gateway(published.pod.ip());
        let gateway = gateway.ok_or(DropReason::EgressFamily)?;
        Ok(published.key(SocketAddr::new(gateway, 0)))
    }

    /// The ends of a new flow of datagrams.
    fn key_for(&mut self, published: PublishedPort, client: Client) -> Result<FlowKey, DropReason> {
        let visible = self.visible(published, client);
        if let Some(key) = visible.filter(|key| self.egress.find(key).is_none()) {
            return Ok(key);
        }
        let mut key = self.gateway_end(published)?;
        key.remote.set_port(self.egress.free_port(key)?);
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_leads_to_the_address_that_shows_its_clients() {
        let to = |pod: &str, host: &str| {
            let address = pod_address(pod.parse().unwrap(), host.parse().unwrap());
            address.unwrap().to_string()
        };
        assert_eq!(to("10.244.1.2,fd00::2", "0.0.0.0"), "10.244.1.2");
        assert_eq!(to("10.244.1.2,fd00::2", "::1"), "fd00::2");
        assert_eq!(to("10.244.1.2", "::"), "10.244.1.2");
        assert_eq!(to("fd00::2", "0.0.0.0"), "fd00::2");
    }

    #[test]
    fn a_pod_sees_a_client_that_it_can_answer() {
        let published = |pod: &str, network: &str| PublishedPort {
            protocol: Protocol::Tcp,
            pod: pod.parse().unwrap(),
            network: network.parse().unwrap(),
        };
        let ipv4 = published("10.244.1.2:80", "10.244.0.0/16");
        let ipv6 = published("[fd00:10::2]:80", "fd00:10::/48");
        let sees = |port: PublishedPort, client: &str, local: &str| {
            let client = Client {
                address: client.parse().unwrap(),
                local: local.parse().unwrap(),
            };
            port.visible(client).is_some()
        };
        assert!(sees(ipv4, "192.0.2.1:1000", "192.0.2.9"));
        assert!(sees(ipv6, "[2001:db8::1]:1000", "2001:db8::9"));
        for (port, client, local) in [
            (ipv4, "[2001:db8::1]:1000", "2001:db8::9"),
            (ipv6, "192.0.2.1:1000", "192.0.2.9"),
            (ipv4, "127.0.0.1:1000", "127.0.0.1"),
            (ipv6, "[::1]:1000", "::1"),
            (ipv6, "[fe80::1]:1000", "fe80::9"),
            (ipv6, "[2001:db8::9]:1000", "2001:db8::9"),
            (ipv6, "[fd00:10::7]:1000", "2001:db8::9"),
            (ipv6, "[2001:db8::1]:0", "2001:db8::9"),
        ] {
            assert!(!sees(port, client, local), "{client}");
        }
    }
}
