//! What egress is, and its bounds.

use std::net::{IpAddr, SocketAddr};

use muslin_encap::ip::v6;
use muslin_encap::mtu::Mtu;
use smoltcp::time::Duration;

use super::key::Protocol;
use super::policy::Policy;
use crate::addresses::Nets;
use crate::datapath::gateway;
use crate::drops::DropReason;

/// What egress is. Further fields may come: [`EgressConfig::new`] makes one, of which others can be changed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EgressConfig {
    /// Which destinations it reaches.
    pub policy: Policy,
    /// The node's subnets: its pods, and the gateway's addresses. Without any this is no node but an
    /// [`crate::endpoint::Endpoint`], for which all others are pods.
    pub subnets: Option<Nets>,
    /// MTU of pods.
    pub mtu: Mtu,
    /// Bounds.
    pub limits: Limits,
    /// Unpredictable; the same seed gives the same run.
    pub random_seed: u64,
}

impl EgressConfig {
    /// Egress of an endpoint, with the default limits; a node's has subnets, too.
    #[must_use]
    pub fn new(policy: Policy, mtu: Mtu, random_seed: u64) -> Self {
        Self {
            policy,
            subnets: None,
            mtu,
            limits: Limits::default(),
            random_seed,
        }
    }

    pub(super) fn is_gateway(&self, address: IpAddr) -> bool {
        let subnets = self.subnets;
        subnets.is_some_and(|subnets| gateway::addresses(subnets).contains(address))
    }

    /// Whether an address is in the node's subnet of its IP version.
    pub(super) fn is_in_subnet(&self, address: IpAddr) -> bool {
        let subnets = self.subnets;
        match address {
            IpAddr::V4(address) => subnets
                .and_then(|subnets| subnets.ipv4())
                .is_some_and(|it| it.contains(&address)),
            IpAddr::V6(address) => subnets
                .and_then(|subnets| subnets.ipv6())
                .is_some_and(|it| it.contains(&address)),
        }
    }

    /// Whether pods have flows of a socket's IP version: a link with less than 1280 bytes carries no
    /// IPv6 (RFC 8200 section 5).
    pub(super) const fn carries(&self, address: SocketAddr) -> bool {
        address.is_ipv4() || self.mtu.get() >= v6::MIN_MTU
    }

    /// By which address a pod knows who has sent it something by a mapping.
    ///
    /// # Errors
    /// The reason to drop it.
    pub(super) fn source(
        &self,
        protocol: Protocol,
        pod: SocketAddr,
        from: SocketAddr,
    ) -> Result<SocketAddr, DropReason> {
        if self.is_gateway(from.ip()) {
            return Err(DropReason::EgressDenied);
        }
        self.policy.check_source(protocol, from, pod.is_ipv6())
    }
}

/// Bounds of the flow table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Flows of all protocols.
    pub flows: usize,
    /// Those of them that one pod may have begun, and that may have been begun to its published ports.
    pub flows_of_pod: usize,
    /// Bytes of the buffers of TCP connections.
    pub memory: usize,
    /// How long a TCP connection may be silent: nothing goes either way, and its pod does not even
    /// answer keep-alives, of which it gets some in that time (RFC 5382 section 5: no less than 2
    /// hours 4 minutes). Whether the other end lives the host's keep-alives find out.
    pub tcp_idle: Duration,
    /// How long a UDP flow may be idle (RFC 4787 section 4.3: no less than 2 minutes).
    pub udp_idle: Duration,
    /// How long echo requests may be idle (RFC 5508 section 3.2: no less than a minute).
    pub ping_idle: Duration,
    /// How long a UDP flow to the gateway may be idle: most have one question and its answer.
    pub service_idle: Duration,
}

impl Limits {
    /// No more than fit with so many sockets of the host. No pod's share is all of them.
    #[must_use]
    pub fn within(self, sockets: usize) -> Self {
        let flows = self.flows.min(sockets.max(2));
        Self {
            flows,
            flows_of_pod: self.flows_of_pod.min(flows / 2),
            ..self
        }
    }

    /// The same bounds for each of several workers.
    #[must_use]
    pub fn shared(self, workers: usize) -> Self {
        let workers = workers.max(1);
        Self {
            flows: self.flows.div_ceil(workers),
            flows_of_pod: self.flows_of_pod.div_ceil(workers),
            memory: self.memory / workers,
            ..self
        }
    }
}

impl Limits {
    pub(super) const fn idle(&self, protocol: Protocol) -> Duration {
        match protocol {
            Protocol::Tcp => self.tcp_idle,
            Protocol::Udp => self.udp_idle,
            Protocol::Ping => self.ping_idle,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: 4096,
            flows_of_pod: 2048,
            memory: 128 << 20,
            tcp_idle: Duration::from_secs(2 * 3600 + 4 * 60),
            udp_idle: Duration::from_secs(120),
            ping_idle: Duration::from_secs(60),
            service_idle: Duration::from_secs(30),
        }
    }
}
