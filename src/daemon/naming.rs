//! What a node does for names: its own pods' are known at once, here and to those who share them.

use std::sync::Arc;

use ipnet::IpNet;
use muslin_stack::addresses::Nets;
use muslin_stack::control::ipam::PodName;
use muslin_stack::control::names::{Names, NodeRecord, PodRecord};
use parking_lot::RwLock;
use tokio::sync::watch;

use super::pods::Pods;
use super::settings::NodeSettings;
use crate::dns::{self, Dns, DnsConnector, RESOLV_CONF, Resolvers};
use crate::error::{Error, Result};

/// The pods' names, and the DNS service that resolves them.
pub(super) struct NameService {
    pub(super) dns: Arc<Dns>,
    pub(super) names: Arc<RwLock<Names>>,
    node: PodName,
    subnets: Nets,
    pods: watch::Sender<Vec<PodRecord>>,
}

impl NameService {
    /// The service for a node with these subnets of these networks, and its connector.
    pub(super) fn start(
        settings: &NodeSettings,
        network: Nets,
        subnets: Nets,
    ) -> Result<(Self, DnsConnector)> {
        let names = Arc::new(RwLock::new(Names::default()));
        for subnet in subnets.iter::<IpNet>() {
            names.write().lease(subnet);
        }
        let nat64 = settings.egress.as_ref().and_then(|egress| egress.nat64);
        let resolvers = resolvers(settings, network)?;
        let (dns, connector) = dns::start(network, nat64, names.clone(), resolvers)?;
        let naming = Self {
            dns,
            names,
            node: settings.name.parse().map_err(Error::usage)?,
            subnets,
            pods: watch::Sender::default(),
        };
        Ok((naming, connector))
    }

    /// This node's pods are these now.
    pub(super) fn set_pods(&self, pods: &Pods) {
        let record = NodeRecord {
            node: self.node.clone(),
            subnet: self.subnets,
            pods: pods.records(),
            stopped: false,
        };
        self.pods.send_replace(record.pods.clone());
        self.names.write().set(record);
    }

    /// What there is to share.
    pub(super) fn pods(&self) -> watch::Receiver<Vec<PodRecord>> {
        self.pods.subscribe()
    }

    /// The node's name.
    pub(super) fn node(&self) -> &PodName {
        &self.node
    }
}

/// The resolvers that a node's settings name, or else those of the host; none where nothing outside
/// is for pods.
///
/// # Errors
/// Bad usage for one that a node cannot reach.
pub(super) fn resolvers(settings: &NodeSettings, network: Nets) -> Result<Resolvers> {
    if settings.dns.is_empty() && settings.egress.is_some() {
        Ok(Resolvers::in_file(RESOLV_CONF, network))
    } else {
        Resolvers::named(&settings.dns, network)
    }
}
